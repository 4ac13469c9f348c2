"""autoencoder.py: each bottleneck against its definition, and what an autoencoder can and cannot do."""
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import refused, run

import autoencoder
import common

SMALL = "--width 4 --code 3 --keep 5 --batch 8 --labels 1 0 --draws 1 --dtype float32 --device cpu".split()
KINDS = "none", "narrow", "noise", "sparse", "weak"


def model_of(kind, size=8, width=6, code=5, **how):
    torch.manual_seed(0)
    return autoencoder.Autoencoder(size, width, code, kind, **how)


@pytest.mark.parametrize("size", [1, 8, 28, 30, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_any_size_of_image_comes_back(kind, size):
    model, x = model_of(kind, size, 2, keep=2), torch.randn(2, 3, size, size)
    assert model(x)[0].shape == x.shape
    assert model.code(x).shape == (2, 5 if kind in ("narrow", "noise", "weak") else model.encoder.length)


def test_without_a_bottleneck_the_code_has_as_many_numbers_as_the_image():
    assert autoencoder.Args.width == 48
    assert model_of("none", 32, 48).code(torch.randn(1, 3, 32, 32)).shape == (1, 3 * 32 * 32)


def test_encoder_and_decoder_equal_a_functional_forward():
    model, x = model_of("narrow", 16), torch.randn(3, 3, 16, 16)
    w = dict(model.named_parameters())
    y = x
    for i in 1, 2, 3:
        y = F.conv2d(y, w[f"encoder.conv{i}.weight"], w[f"encoder.conv{i}.bias"], 2, 1).clamp(min=0)
    code = y.flatten(1) @ w["encoder.head.weight"].T + w["encoder.head.bias"]
    torch.testing.assert_close(model.code(x), code, rtol=1e-4, atol=1e-5)
    y = (code @ w["decoder.head.weight"].T + w["decoder.head.bias"]).view(3, 24, 2, 2)
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
    code = torch.randn(50, 10)
    code[0] = torch.tensor([1.] * 10)                                    # equal ones, too
    kept = autoencoder.top_k(code, k)
    assert ((kept != 0).sum(1) == k).all() and torch.equal(kept[kept != 0], code[kept != 0])
    for row, left in zip(code[1:], kept[1:]):
        due = sorted(row.abs().tolist())[-k:]
        assert sorted(left[left != 0].abs().tolist()) == due


def test_top_k_lets_gradients_through_where_it_kept():
    code = torch.randn(4, 6, requires_grad=True)
    autoencoder.top_k(code, 2).sum().backward()
    assert torch.equal(code.grad, (autoencoder.top_k(code, 2) != 0).float())


def test_sparse_decodes_nothing_but_what_is_kept():
    model, x = model_of("sparse", keep=4), torch.randn(3, 3, 8, 8)
    assert ((model.code(x) != 0).sum(1) <= 4).all()                      # the map is cut at 0 before
    torch.testing.assert_close(model(x)[0], model.decoder(autoencoder.top_k(model.encoder(x), 4)))


def test_kl_equals_torchs():
    mean, log_var = torch.randn(2, 7, 5, dtype=torch.float64)
    normal = torch.distributions.Normal
    due = torch.distributions.kl_divergence(normal(mean, (log_var / 2).exp()), normal(0., 1.)).sum(1)
    torch.testing.assert_close(autoencoder.kl(mean, log_var), due, rtol=1e-7, atol=1e-9)


def test_noise_has_the_spread_that_the_encoder_says():
    model, x = model_of("noise", noise=.5), torch.randn(1, 3, 8, 8)
    codes = []
    model.decoder.register_forward_pre_hook(lambda m, code: codes.append(code[0]))
    nats = model(x.expand(20_000, -1, -1, -1))[1]
    features = model.encoder.features(x)
    mean, log_var = model.encoder.head(features)[0], model.log_var(features)[0]
    torch.testing.assert_close(codes[0].mean(0), mean, rtol=0, atol=.03)
    torch.testing.assert_close(codes[0].std(0), .5 * (log_var / 2).exp(), rtol=.05, atol=0)
    assert nats.shape == (20_000,) and nats[0].item() == pytest.approx(autoencoder.kl(mean[None], log_var[None]).item(), rel=1e-5)
    model.eval()(x)
    assert torch.equal(codes[1], model.code(x))                          # none when it is only looked at


def train(kind, out, steps=12, **how):
    """The weights after some steps on white noise, and the losses."""
    args = autoencoder.Args(steps=steps, batch=16, lr=3e-3, bottleneck=kind, code=6, width=6, keep=9, out=str(out),
                            device="cpu", dtype="float32", **how)
    torch.manual_seed(0)
    data = torch.randn(64, 3, 8, 8)
    torch.manual_seed(args.seed)
    model, losses = autoencoder.build(args, 8), []
    run = common.Run(args, model)
    for step in run:
        masked, target = autoencoder.mask(run.batch(data), args.corrupt)
        prediction, nats = model(masked)
        losses.append(autoencoder.distance(prediction, target, nats, args.price))
        run.update(losses[-1])
    return model.state_dict(), [loss.item() for loss in losses]


def test_no_noise_at_no_price_is_the_plain_autoencoder_bit_for_bit(tmp_path):
    plain, losses = train("narrow", tmp_path / "a")
    quiet, same = train("noise", tmp_path / "b", noise=0., price=0.)
    assert losses == same and set(plain) < set(quiet)
    for name, value in plain.items():
        assert torch.equal(value, quiet[name]), name
    assert train("noise", tmp_path / "c", noise=0., price=1.)[1] != losses       # and either matters
    assert train("noise", tmp_path / "d", noise=1., price=0.)[1] != losses


def test_a_price_is_paid_in_nats(tmp_path):
    free, dear = (train("noise", tmp_path / str(price), 150, price=price)[0] for price in (0., 10.))
    x, nats = torch.randn(64, 3, 8, 8), []
    for state in free, dear:
        model = autoencoder.Autoencoder(8, 6, 6, "noise")
        model.load_state_dict(state)
        nats.append(model(x)[1].mean().item())
    assert nats[1] < .2 * nats[0], nats


def test_two_numbers_hold_less_than_the_whole_image(tmp_path):
    """With the same training, two numbers cannot say what colour is where; a code as wide as the image
    can; and with the map cut to its two largest numbers, nor can that."""
    images = common.Images(*[common.shapes(1000, 0, 16)[0]] * 2, {}, {}, {})
    error = {}
    for kind in "none", "narrow", "noise", "sparse", "weak":
        args = autoencoder.Args(steps=200, batch=32, lr=5e-3, bottleneck=kind, code=2, keep=2, width=32,
                                out=str(tmp_path / kind), device="cpu", dtype="float32", price=.1)
        torch.manual_seed(0)
        model = autoencoder.build(args, 16)
        run = common.Run(args, model)
        for step in run:
            masked, target = autoencoder.mask(images.normalize(run.batch(images.train)))
            prediction, nats = model(masked)
            run.update(autoencoder.distance(prediction, target, nats, args.price))
        model.eval()
        error[kind] = autoencoder.rebuild(args, model, images)
    assert error["none"] < .3, error
    x = images.normalize(images.test).flatten(1)
    rest = torch.linalg.svdvals(x - x.mean(0))[2:].square().sum() / x.numel()    # what two components leave
    assert error["weak"] > .999 * rest, (error, rest)        # no linear decoder of two numbers beats PCA
    assert all(.35 < error[kind] < 1 for kind in error if kind != "none"), error


# ---------------------------------------------------------------------------- mask, compare


def test_mask_blanks_pixels_and_still_owes_all():
    x = torch.randn(20, 3, 32, 32)
    before = x.clone()
    masked, target = autoencoder.mask(x, .3)
    assert target is x and torch.equal(x, before)
    blank = (masked == 0).all(1)
    share, error = blank.float().mean().item(), (.3 * .7 / blank.numel()) ** .5
    assert abs(share - .3) < 3 * error
    assert torch.equal(masked[(~blank)[:, None].expand_as(x)], x[(~blank)[:, None].expand_as(x)])
    assert autoencoder.mask(x)[0] is x and autoencoder.mask(x, 0.)[1] is x


def test_distance_by_loops():
    a, b = torch.randn(2, 2, 3, 4, 4)
    due = sum((p - t) ** 2 for p, t in zip(a.flatten().tolist(), b.flatten().tolist())) / 96
    assert autoencoder.distance(a, b).item() == pytest.approx(due, rel=1e-5)
    nats = torch.tensor([3., 5.])
    assert autoencoder.distance(a, b, nats, .5).item() == pytest.approx(due + .5 * 4 / 48, rel=1e-5)


def test_the_error_is_the_mean_over_all_images_however_they_are_split():
    model, x = model_of("narrow").eval(), torch.randint(0, 256, (750, 3, 8, 8), dtype=torch.uint8)
    x[500:] //= 4                                                        # parts of 500 and 250, unlike
    images = common.Images(x, x, {}, {}, {})
    z = images.normalize(x)
    due = F.mse_loss(model(z)[0], z).item()
    assert autoencoder.rebuild(autoencoder.Args(), model, images) == pytest.approx(due, rel=1e-5)


def test_interpolation_goes_from_one_image_to_the_other():
    model = model_of("noise").eval()
    a, b = torch.randn(2, 4, 3, 8, 8)
    between = autoencoder.interpolate(model, a, b, 5)
    assert between.shape == (4, 5, 3, 8, 8)
    torch.testing.assert_close(between[:, 0], model(a)[0])
    torch.testing.assert_close(between[:, 4], model(b)[0])
    torch.testing.assert_close(between[:, 1], model.decoder(.75 * model.code(a) + .25 * model.code(b)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_tensor(kind):
    model, x = model_of(kind, keep=9), torch.randn(8, 3, 8, 8)
    prediction, nats = model(x)
    autoencoder.distance(prediction, x, nats, .1).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


# ----------------------------------------------------------------------------------- the script


def test_the_supervised_row_answers_its_question(tiny):
    images = common.load_images(str(tiny))
    args = autoencoder.Args(steps=40, batch=16, width=4, code=3, lr=3e-3, device="cpu", dtype="float32", draws=1)
    f = common.supervised(args, autoencoder.build(args, images.size).encoder, images, 40)
    assert not f.training
    knows = common.few_shot(args, f, images, [5, 0])
    assert knows["class"][1][0] > 95                                     # dark from light


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_script(tiny, tmp_path, kind):
    done = run("--data", tiny, "--steps", 70, "--out", tmp_path, "--bottleneck", kind, "--corrupt", .1, *SMALL,
               *["--no-supervised"] * (kind == "weak"), script="autoencoder.py")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.replace(str(tmp_path), "out").splitlines())) <= 80      # a folder is not wrapped
    for file in "reconstructions.png", "interpolations.png":
        assert (tmp_path / file).exists() and file in done.stdout
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert list(figures["accuracy"]) == ["raw pixels", "untrained encoder", "autoencoder"] + ["supervised"] * (kind != "weak")
    assert list(figures["notes"]) == ["1", "4", "17", "70"]
    assert figures["notes"]["70"]["error"] == pytest.approx(figures["error"], abs=.05)
    assert figures["notes"]["1"]["error"] > figures["notes"]["70"]["error"]


def test_stopped_and_resumed_ends_as_one_never_stopped(tiny, tmp_path):
    """Noise, blanked pixels and the looks on the way included: the looks leave no trace."""
    flags = ["--data", tiny, "--bottleneck", "noise", "--corrupt", .2, *SMALL]
    assert run(*flags, "--steps", 16, "--out", tmp_path / "whole", script="autoencoder.py").returncode == 0
    whole = torch.load(tmp_path / "whole/checkpoint.pt", weights_only=True)
    args = common.cli(autoencoder.Args, list(map(str, [*flags, "--steps", 16, "--out", tmp_path / "cut"])))
    images = common.load_images(str(tiny))
    torch.manual_seed(args.seed)
    model = autoencoder.build(args, 8)
    training = common.Run(args, model)
    with pytest.raises(KeyboardInterrupt):
        for step in training:
            masked, target = autoencoder.mask(images.normalize(training.batch(images.train)), args.corrupt)
            prediction, nats = model(masked)
            training.update(autoencoder.distance(prediction, target, nats, args.price))
            if step == 3:
                with training.aside():
                    training.note(error=9., probes=[[1.]])
            training.stop = step == 5
    state = torch.load(tmp_path / "cut/checkpoint.pt", weights_only=True)
    torch.save(state | {"script": "autoencoder.py"}, tmp_path / "cut/checkpoint.pt")
    done = run("--resume", "--out", tmp_path / "cut", script="autoencoder.py")
    assert done.returncode == 0 and "Going on from step 6" in done.stdout, done.stderr
    cut = torch.load(tmp_path / "cut/checkpoint.pt", weights_only=True)
    for name, value in whole["model"].items():
        assert torch.equal(value, cut["model"][name]), name
    a, b = (json.loads((tmp_path / name / "result.json").read_text())["figures"] for name in ("whole", "cut"))
    assert a["error"] == b["error"] and a["accuracy"] == b["accuracy"] and a["notes"]["16"] == b["notes"]["16"]
    assert b["notes"]["4"]["error"] == 9.                                # what was noted before is kept


@pytest.mark.parametrize("flags, words", [
    ("--code 0", ["--code must be 1 or more, not 0"]),
    ("--keep 0", ["--keep must be 1 or more, not 0"]),
    ("--corrupt 1", ["--corrupt must be from 0 to below 1, not 1.0: some pixels have to stay visible"]),
    ("--corrupt -0.1", ["--corrupt must be from 0 to below 1, not -0.1"]),
    ("--noise -1", ["--noise must be 0 or more, not -1.0"]),
    ("--price nan", ["--price must be 0 or more, not nan"]),
    ("--bottleneck wide", ["--bottleneck", "narrow"]),
    ("--width 0", ["--width must be 1 or more, not 0"]),
    ("--labels -2", ["--labels"]),
    ("--bottelneck none", ["did you mean --bottleneck?"]),
])
def test_a_bad_flag_gets_one_sentence(flags, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["autoencoder.py"])
    with pytest.raises(SystemExit) as stop:
        common.start(lambda args: None, autoencoder.Args, flags.split())     # nothing runs if one slips through
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("autoencoder.py: ") and text.count("\n") == 1
    assert all(word in text for word in words), text


def test_more_kept_than_there_is(tiny, tmp_path):
    done = run("--data", tiny, "--out", tmp_path, *SMALL, "--bottleneck", "sparse", "--keep", 17,
               script="autoencoder.py")
    refused(done, 1, "--keep 17 is more than the 16 dimensions of the code here", script="autoencoder.py")


def test_what_the_rows_of_the_table_probe(tiny, tmp_path, monkeypatch):
    """Raw pixels; then the code of the untrained and of the trained model, and of the supervised encoder."""
    probed = []

    def dummy(args, f, images, labels, others=()):
        assert not getattr(getattr(f, "__self__", None), "training", False)      # while it trains, too
        probed.append(f)
        return {"class": [[50.] for _ in labels]}
    monkeypatch.setattr(common, "few_shot", dummy)
    monkeypatch.setattr("sys.argv", ["autoencoder.py"])
    args = common.cli(autoencoder.Args, list(map(str, ["--data", tiny, "--steps", 3, "--out", tmp_path, *SMALL,
                                                       "--bottleneck", "noise"])))
    torch.manual_seed(args.seed)
    autoencoder.main(args)
    pixels, blank, ours, best = probed[-4:]
    assert isinstance(pixels, torch.nn.Flatten) and type(best) is autoencoder.Encoder and not best.training
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    for f in blank, ours:
        assert f.__func__ is autoencoder.Autoencoder.code and not f.__self__.training
        assert torch.equal(f.__self__.state_dict()["log_var.weight"], trained["log_var.weight"]) == (f is ours)
