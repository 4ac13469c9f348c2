"""autoencoder.py: each bottleneck against its definition, and what an autoencoder can and cannot do."""
import json
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import call, refused, run

import autoencoder
import common

SMALL = "--width 4 --latent 3 --k 5 --batch 8 --labels 1 0 --dtype float32 --device cpu".split()
KINDS = "none", "narrow", "variational", "sparse", "weak"


def settings(**given):
    return autoencoder.Args(**dict(width=4, latent=3, k=5, batch=8, labels=(1, 0), dtype="float32", device="cpu") | given)


def model_of(kind, size=8, width=6, latent=5, **how):
    torch.manual_seed(0)
    return autoencoder.Autoencoder(size, width, latent, kind, **how)


@pytest.mark.parametrize("size", [1, 8, 28, 30, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_any_size_of_image_comes_back(kind, size):
    model, x = model_of(kind, size, 2, k=2), torch.randn(2, 3, size, size)
    assert model(x)[0].shape == x.shape
    assert model.encode(x).shape == (2, 5 if kind in ("narrow", "variational", "weak") else model.encoder.features_dim)


@pytest.mark.parametrize("shape", [(3, 8, 6), (3, 9, 9), (1, 8, 8), (8, 8, 3)])
def test_images_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=f"images of {' x '.join(map(str, shape))}, and this model is for 3 x 8 x 8"):
        model_of("narrow")(torch.randn(2, *shape))


def test_without_a_bottleneck_the_latent_is_as_large_as_the_image():
    assert autoencoder.Args.width == 48
    assert model_of("none", 32, 48).encode(torch.randn(1, 3, 32, 32)).shape == (1, 3 * 32 * 32)


def test_encoder_and_decoder_equal_a_functional_forward():
    model, x = model_of("narrow", 16), torch.randn(3, 3, 16, 16)
    w = dict(model.named_parameters())
    y = x
    for i in 1, 2, 3:
        y = F.conv2d(y, w[f"encoder.conv{i}.weight"], w[f"encoder.conv{i}.bias"], 2, 1).clamp(min=0)
    z = y.flatten(1) @ w["encoder.to_latent.weight"].T + w["encoder.to_latent.bias"]
    torch.testing.assert_close(model.encode(x), z, rtol=1e-4, atol=1e-5)
    y = (z @ w["decoder.from_latent.weight"].T + w["decoder.from_latent.bias"]).view(3, 24, 2, 2)
    for i in 1, 2, 3:
        y = F.conv_transpose2d(y.clamp(min=0), w[f"decoder.conv{i}.weight"], w[f"decoder.conv{i}.bias"], 2, 1)
    torch.testing.assert_close(model(x)[0], y, rtol=1e-4, atol=1e-5)


def test_a_weak_decoder_is_linear():
    decode = model_of("weak").decoder
    a, b = torch.randn(2, 4, 5)
    torch.testing.assert_close(decode(.3 * a + .7 * b), .3 * decode(a) + .7 * decode(b))


# -------------------------------------------------------------------------------- bottlenecks


@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_k_keeps_exactly_the_k_largest(k):
    z = torch.randn(50, 10)
    z[0] = torch.tensor([1.] * 10)                                       # equal ones, too
    kept = autoencoder.top_k(z, k)
    assert ((kept != 0).sum(1) == k).all() and torch.equal(kept[kept != 0], z[kept != 0])
    for row, left in zip(z[1:], kept[1:]):
        assert sorted(left[left != 0].tolist()) == sorted(row.tolist())[-k:]


def test_gradients_of_top_k_are_those_of_what_it_keeps():
    z = torch.randn(4, 6, requires_grad=True)
    autoencoder.top_k(z, 2).sum().backward()
    assert torch.equal(z.grad, (autoencoder.top_k(z, 2) != 0).float())


def test_sparse_decodes_the_k_largest_alone():
    model, x = model_of("sparse", k=4), torch.randn(3, 3, 8, 8)
    assert ((model.encode(x) != 0).sum(1) <= 4).all()                    # features below 0 are 0 already
    torch.testing.assert_close(model(x)[0], model.decoder(autoencoder.top_k(model.encoder(x), 4)))


def test_kl_divergence_equals_torchs():
    mean, log_var = torch.randn(2, 7, 5, dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (log_var / 2).exp()), normal(0., 1.)).sum(1)
    torch.testing.assert_close(autoencoder.kl_divergence(mean, log_var), expected, rtol=1e-7, atol=1e-9)


def test_the_latent_is_sampled_with_the_mean_and_the_variance_of_the_encoder():
    model, x = model_of("variational", noise=.5), torch.randn(1, 3, 8, 8)
    decoded = []
    model.decoder.register_forward_pre_hook(lambda m, inputs: decoded.append(inputs[0]))
    kl = model(x.expand(20_000, -1, -1, -1))[1]
    features = model.encoder.features(x)
    mean, log_var = model.encoder.to_latent(features)[0], model.log_var(features)[0]
    torch.testing.assert_close(decoded[0].mean(0), mean, rtol=0, atol=.03)
    torch.testing.assert_close(decoded[0].std(0), .5 * (log_var / 2).exp(), rtol=.05, atol=0)
    expected = autoencoder.kl_divergence(mean[None], log_var[None]).item()
    assert kl.shape == (20_000,) and kl[0].item() == pytest.approx(expected, rel=1e-5)
    model.eval()(x)
    assert torch.equal(decoded[1], model.encode(x))                      # in evaluation there is no noise


def test_the_loss_is_that_of_a_beta_vae_whose_decoder_has_variance_one_half():
    """beta KL - log N(x; decode(z), 1/2), but for a constant, and per pixel value."""
    model, x = model_of("variational").eval(), torch.randn(6, 3, 8, 8)
    prediction, kl = model(x)
    nll = -torch.distributions.Normal(prediction, .5 ** .5).log_prob(x).flatten(1).sum(1)
    constant = -torch.distributions.Normal(0., .5 ** .5).log_prob(torch.zeros(())) * 192
    expected = (nll - constant + .7 * kl).mean() / 192
    torch.testing.assert_close(autoencoder.distance(prediction, x, kl, .7), expected, rtol=1e-4, atol=1e-5)


def train(kind, steps=12, beta=.1, **how):
    """The weights after some steps on white noise, and the losses."""
    torch.manual_seed(0)
    data = torch.randn(64, 3, 8, 8)
    torch.manual_seed(1)
    model, losses = autoencoder.Autoencoder(8, 6, 6, kind, **how), []
    optimizer = common.adamw(model.parameters(), 3e-3, 0.)
    for step in range(steps):
        torch.manual_seed(step)
        x = data[torch.randint(64, (16,))]
        prediction, kl = model(x)
        loss = autoencoder.distance(prediction, x, kl, beta)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.state_dict(), losses


def test_variational_without_noise_and_with_beta_0_is_narrow_bit_for_bit():
    narrow, losses = train("narrow")
    variational, same = train("variational", noise=0., beta=0.)
    assert losses == same and set(narrow) < set(variational)
    for name, value in narrow.items():
        assert torch.equal(value, variational[name]), name
    assert train("variational", noise=0., beta=1.)[1] != losses          # and each of the two matters
    assert train("variational", noise=1., beta=0.)[1] != losses


def test_a_larger_beta_makes_the_kl_smaller():
    x, kl = torch.randn(64, 3, 8, 8), []
    for beta in 0., 10.:
        model = autoencoder.Autoencoder(8, 6, 6, "variational")
        model.load_state_dict(train("variational", 150, beta=beta)[0])
        kl.append(model(x)[1].mean().item())
    assert kl[1] < .4 * kl[0], kl


def test_two_numbers_hold_less_than_the_whole_image(tmp_path):
    """With the same training, two numbers do not hold what colour is where; a latent as large as the image
    does; and the two largest of its numbers do not, either."""
    images = common.Images(*[common.shapes(500, 0, 16)[0]] * 2, {}, {}, {})
    error = {}
    for kind in KINDS:
        args = settings(bottleneck=kind, latent=2, k=2, width=16, out=str(tmp_path))
        torch.manual_seed(0)
        model = autoencoder.build(args, 16)
        optimizer = common.adamw(model.parameters(), 3e-3, 0.)
        for _ in range(200):
            x = images.normalize(images.train[torch.randint(500, (32,))])
            prediction, kl = model(x)
            autoencoder.distance(prediction, x, kl, .1).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
        error[kind] = autoencoder.reconstruct(args, model.eval(), images)
    x = images.normalize(images.test).flatten(1)
    rest = torch.linalg.svdvals(x - x.mean(0))[2:].square().sum() / x.numel()    # what two components leave
    assert error["weak"] > .999 * rest, (error, rest)        # no linear decoder of two numbers beats PCA
    assert all(1.2 * error["none"] < error[kind] for kind in error if kind != "none"), error


def test_impossible_bottlenecks_are_refused():
    with pytest.raises(ValueError, match="no bottleneck 'noise'"):
        model_of("noise")
    with pytest.raises(ValueError, match="k = 25 is more than the 24 dimensions"):
        model_of("sparse", k=25)
    model_of("sparse", k=24), model_of("narrow", k=25)                   # the last has no use for k


# ---------------------------------------------------------------------------- mask, compare


def test_mask_sets_pixels_to_0_and_the_target_is_all_of_x():
    torch.manual_seed(0)
    x = torch.randn(20, 3, 32, 32)
    before = x.clone()
    inputs, target = autoencoder.mask(x, .3)
    assert target is x and torch.equal(x, before)
    blank = (inputs == 0).all(1)
    assert abs(blank.float().mean().item() - .3) < 4 * (.3 * .7 / blank.numel()) ** .5
    assert torch.equal(inputs[(~blank)[:, None].expand_as(x)], x[(~blank)[:, None].expand_as(x)])
    assert autoencoder.mask(x)[0] is x and autoencoder.mask(x, 0.)[1] is x


def test_distance_by_loops():
    a, b = torch.randn(2, 2, 3, 4, 4)
    expected = sum((p - t) ** 2 for p, t in zip(a.flatten().tolist(), b.flatten().tolist())) / 96
    assert autoencoder.distance(a, b).item() == pytest.approx(expected, rel=1e-5)
    kl = torch.tensor([3., 5.])
    assert autoencoder.distance(a, b, kl, .5).item() == pytest.approx(expected + .5 * 4 / 48, rel=1e-5)


@pytest.mark.parametrize("corrupt", [0., .3])
def test_the_error_is_the_mean_over_all_images_and_the_picture_shows_them(tmp_path, monkeypatch, corrupt):
    model, x = model_of("narrow").eval(), torch.randint(0, 256, (750, 3, 8, 8), dtype=torch.uint8)
    x[500:] //= 4                                                        # parts of 500 and 250, unlike
    images, sheets = common.Images(x, x, {}, {}, {}), []
    monkeypatch.setattr(common, "save_png", lambda path, pictures, *a: sheets.append(pictures))
    z, masks = images.normalize(x), []
    mask = autoencoder.mask
    monkeypatch.setattr(autoencoder, "mask", lambda *a: masks.append(mask(*a)) or masks[-1])
    error = autoencoder.reconstruct(settings(corrupt=corrupt, out=str(tmp_path)), model, images)
    inputs = torch.cat([m[0] for m in masks[:2]])
    assert torch.equal(inputs, z) == (corrupt == 0)
    assert error == pytest.approx(F.mse_loss(model(inputs)[0], z).item(), rel=1e-5)
    first = masks[2][0]                                                  # of the 24 pictures
    expected = [first] * (corrupt > 0) + [model(first)[0], z[:24]]
    torch.testing.assert_close(sheets[0], images.denormalize(torch.stack(expected, 1).flatten(0, 1)))


def test_interpolation_goes_from_one_image_to_the_other():
    model = model_of("variational").eval()
    a, b = torch.randn(2, 4, 3, 8, 8)
    between = autoencoder.interpolate(model, a, b, 5)
    assert between.shape == (4, 5, 3, 8, 8)
    torch.testing.assert_close(between[:, 0], model(a)[0])
    torch.testing.assert_close(between[:, 4], model(b)[0])
    torch.testing.assert_close(between[:, 1], model.decoder(.75 * model.encode(a) + .25 * model.encode(b)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_tensor(kind):
    model, x = model_of(kind, k=9), torch.randn(8, 3, 8, 8)
    prediction, kl = model(x)
    autoencoder.distance(prediction, x, kl, .1).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


# ----------------------------------------------------------------------------------- the script


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_script(tiny, tmp_path, kind):
    done = run("--data", tiny, "--steps", 70, "--out", tmp_path, "--bottleneck", kind, "--corrupt", .1, "--lr", .01,
               *SMALL, script="autoencoder.py")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.replace(str(tmp_path), "out").splitlines())) <= 80      # a folder is not wrapped
    for file in "reconstructions.png", "interpolations.png":
        assert (tmp_path / file).exists() and file in done.stdout
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert list(figures["accuracy"]) == ["raw pixels", "untrained encoder", "autoencoder"]
    for row in figures["accuracy"].values():
        assert "  ".join(f"{x:5.1f}" for x in row) in done.stdout        # the table has the same numbers
    assert f"Mean squared error on new images: {figures['error']:.3f} (" in done.stdout
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log]
    assert log[-1]["step"] == 70 and sum(losses[-10:]) < .9 * sum(losses[:10])


def test_stopped_and_resumed_ends_as_one_never_stopped(tiny, tmp_path, monkeypatch):
    """Noise in the latent and corrupted pixels included."""
    how = dict(data=str(tiny), steps=16, bottleneck="variational", corrupt=.2)
    whole = autoencoder.main(settings(**how, out=str(tmp_path / "whole"))).state_dict()
    distance, calls = autoencoder.distance, []

    def interrupted(*a):
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return distance(*a)
    monkeypatch.setattr(autoencoder, "distance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        autoencoder.main(settings(**how, out=str(tmp_path / "cut")))
    done = run("--resume", "--out", tmp_path / "cut", script="autoencoder.py")
    assert done.returncode == 0 and "Continuing from step 6" in done.stdout, done.stderr
    cut = torch.load(tmp_path / "cut/checkpoint.pt", weights_only=True)["model"]
    assert set(whole) == set(cut)
    for name, value in whole.items():
        assert torch.equal(value, cut[name]), name
    figures = lambda: json.loads((tmp_path / "cut/result.json").read_text())["figures"]
    before = figures()
    again = run("--resume", "--steps", 0, "--out", tmp_path / "cut", script="autoencoder.py")    # evaluates without training
    assert again.returncode == 0 and figures() == before


@pytest.mark.parametrize("flags, words", [
    ("--latent 0", ["--latent must be 1 or more, not 0"]),
    ("--k 0", ["--k must be 1 or more, not 0"]),
    ("--corrupt 1", ["--corrupt must be in [0, 1), not 1.0"]),
    ("--corrupt -0.1", ["--corrupt must be in [0, 1), not -0.1"]),
    ("--noise -1", ["--noise must be 0 or more, not -1.0"]),
    ("--beta nan", ["--beta must be 0 or more, not nan"]),
    ("--bottleneck wide", ["--bottleneck", "narrow"]),
    ("--width 0", ["--width must be 1 or more, not 0"]),
    ("--labels -2", ["--labels must be 0 or more, not -2"]),
    ("--bottelneck none", ["did you mean --bottleneck?"]),
])
def test_a_bad_flag_gets_one_sentence(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        common.cli(autoencoder.main, autoencoder.Args, flags.split())
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("autoencoder.py: ") and text.count("\n") == 1
    assert all(word in text for word in words), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, words", [
    ("--bottleneck sparse --k 17", ["top-k with k = 17 is more than the 16 dimensions of the latent"]),
    ("--batch 65", ["--batch 65 is more than the 64 training examples"]),
    ("--labels 33", ["--labels 33 is too many: a class has only 32"]),
])
def test_settings_that_do_not_fit_get_one_sentence(tiny, tmp_path, flags, words):
    done = call("--data", tiny, "--out", tmp_path / "run", *SMALL, *flags.split(), script="autoencoder.py")
    refused(done, 1, *words, script="autoencoder.py")
    assert not (tmp_path / "run").exists()


def test_settings_reach_the_method(tiny, tmp_path, monkeypatch):
    given = {}
    for name in "mask", "distance":
        usual = getattr(autoencoder, name)
        monkeypatch.setattr(autoencoder, name, lambda *a, name=name, usual=usual: given.setdefault(name, a[-1]) and usual(*a))
    monkeypatch.setattr(common, "linear_probe", lambda args, f, images: [50.] * len(args.labels))
    model = autoencoder.main(settings(data=str(tiny), steps=2, out=str(tmp_path / "run"), bottleneck="variational",
                                      corrupt=.3, beta=.7, noise=.6))
    assert given == dict(mask=.3, distance=.7) and model.noise == .6 and model.encoder.to_latent.out_features == 3


def test_what_the_rows_of_the_table_are_of(tiny, tmp_path, monkeypatch):
    """Raw pixels; then the latent of the untrained model, with the weights with which the training began,
    and of the trained one; in evaluation mode: without noise."""
    probed = []
    monkeypatch.setattr(common, "linear_probe", lambda args, f, images: probed.append(f) or [50.] * len(args.labels))
    args = settings(data=str(tiny), steps=3, out=str(tmp_path / "run"), bottleneck="variational")
    torch.manual_seed(args.seed)
    start = autoencoder.build(args, 8).state_dict()
    model = autoencoder.main(args)
    pixels, untrained, trained = probed
    assert isinstance(pixels, torch.nn.Flatten)
    assert trained == model.encode and untrained.__func__ is autoencoder.Autoencoder.encode
    assert not untrained.__self__.training and not model.training
    assert all(torch.equal(value, start[name]) for name, value in untrained.__self__.state_dict().items())
    assert not torch.equal(model.log_var.weight, start["log_var.weight"])
