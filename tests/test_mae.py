"""mae.py against loops, torch's own modules and an independent forward in the official layout."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, call, refused, run
from torch import nn

import common
import mae


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = mae.MAE(image_size=8, patch=2, dim=16, depth=2, heads=2, decoder_dim=8, decoder_depth=1,
                    decoder_heads=2)
    for p in model.parameters():              # biases and norms, too, must matter
        nn.init.normal_(p, std=.3)
    return model


def encoder_layer(block, dim, heads):
    """torch's own Transformer layer with the weights of one of our blocks."""
    layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0, activation=F.gelu, norm_first=True,
                                       batch_first=True, layer_norm_eps=1e-6)
    names = {"attn.qkv.weight": "self_attn.in_proj_weight", "attn.qkv.bias": "self_attn.in_proj_bias",
             "attn.proj": "self_attn.out_proj", "mlp.fc1": "linear1", "mlp.fc2": "linear2"}
    state = {}
    for key, value in block.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[key] = value
    layer.load_state_dict(state)
    return layer


def official(model, x, noise, ratio, p, norm_pix=False):
    """The loss as in the authors' models_mae.py, from its description: convolution, sort the noise
    twice, predict every patch, and average the error with a mask."""
    e, B, N = model.encoder, len(x), noise.shape[1]
    C = e.patch_embed.out_features
    kernel = e.patch_embed.weight.view(C, p, p, 3).permute(0, 3, 1, 2)      # the published layout
    tokens = F.conv2d(x, kernel, e.patch_embed.bias, stride=p).flatten(2).transpose(1, 2)
    tokens = tokens + e.pos_embed[:, 1:]
    shuffle = noise.argsort(1)
    back = shuffle.argsort(1)
    keep = int(N * (1 - ratio))
    tokens = torch.stack([tokens[b, shuffle[b, :keep]] for b in range(B)])
    tokens = torch.cat([(e.cls_token + e.pos_embed[:, :1]).expand(B, -1, -1), tokens], 1)
    for block in e.blocks:
        tokens = encoder_layer(block, C, block.attn.heads)(tokens)
    latent = model.decoder_embed(e.norm(tokens))
    full = torch.cat([latent[:, 1:], model.mask_token.expand(B, N - keep, -1)], 1)
    full = torch.stack([full[b, back[b]] for b in range(B)])
    full = torch.cat([latent[:, :1], full], 1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        full = encoder_layer(block, full.shape[2], block.attn.heads)(full)
    prediction = model.decoder_pred(model.decoder_norm(full))[:, 1:]
    n = x.shape[2] // p
    target = x.reshape(B, 3, n, p, n, p).permute(0, 2, 4, 3, 5, 1).reshape(B, N, -1)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** .5
    masked = (back >= keep).float()
    return (((prediction - target) ** 2).mean(-1) * masked).sum() / masked.sum()


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_and_gradients_equal_the_official_ones(small, monkeypatch, norm_pix):
    x, noise = torch.randn(3, 3, 8, 8), torch.rand(3, 16)
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: noise)
    inputs, target = mae.mask(x, 2, .75, norm_pix)
    loss = mae.distance(small(*inputs), target)
    theirs = official(small, x, noise, .75, 2, norm_pix)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(loss, [small.encoder.patch_embed.weight, small.mask_token])
    # the reference copies the blocks' weights, so compare what it holds itself
    its = torch.autograd.grad(theirs, [small.encoder.patch_embed.weight, small.mask_token])
    for a, b in zip(mine, its):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_block_equals_torchs_transformer_layer():
    torch.manual_seed(0)
    block = mae.Block(24, 3)
    for p in block.parameters():
        nn.init.normal_(p, std=.3)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(block(x), encoder_layer(block, 24, 3)(x), rtol=1e-5, atol=1e-5)


def test_patchify_by_loops_and_back():
    x, p = torch.randn(2, 3, 12, 12), 4
    patches = mae.patchify(x, p)
    for b, row, column, i, j, c in [(0, 0, 0, 0, 0, 0), (1, 2, 1, 3, 0, 2), (0, 1, 2, 2, 3, 1)]:
        assert patches[b, row * 3 + column, (i * p + j) * 3 + c] == x[b, c, row * p + i, column * p + j]
    assert torch.equal(mae.unpatchify(patches, p), x)


def test_sincos_equals_the_formula_by_loops():
    side, dim = 3, 16
    table = mae.sincos_pos_embed(side, side, dim)
    assert table.shape == (1, 1 + side * side, dim) and (table[0, 0] == 0).all()
    for row in range(side):
        for column in range(side):
            expected = []
            for position in column, row:                                 # the column goes first
                angles = [position / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[0, 1 + row * side + column], torch.tensor(expected))


def test_unshuffle_undoes_random_masking():
    x = torch.randn(5, 16, 7)
    visible, masked, ids_shuffle = mae.random_masking(x, .6)
    assert visible.shape[1] == 16 - round(16 * .6)
    assert len({tuple(ids) for ids in ids_shuffle.tolist()}) == 5
    assert torch.equal(mae.unshuffle(torch.cat([visible, masked], 1), ids_shuffle), x)
    assert mae.random_masking(torch.zeros(1, 100, 1), .8)[0].shape[1] == 20      # int() would keep 19


@pytest.mark.parametrize("ratio", [0., .001, .999, 1., -.5, 1.5, math.nan])
def test_a_ratio_that_masks_all_or_nothing_is_refused(ratio):
    with pytest.raises(ValueError):
        mae.random_masking(torch.zeros(2, 16, 3), ratio)


def test_masking_is_uniform():
    torch.manual_seed(0)
    ids_shuffle = mae.random_masking(torch.zeros(4000, 16, 1), .75)[2]
    count = torch.bincount(ids_shuffle[:, :4].flatten(), minlength=16)   # how often each is visible
    assert (count - 1000).abs().max() < 4 * (4000 * .25 * .75) ** .5


def test_the_prediction_depends_on_visible_patches_alone(small):
    x = torch.randn(2, 3, 8, 8)

    def masked_with_the_same_seed(patches):
        torch.manual_seed(1)
        return mae.mask(mae.unpatchify(patches, 2), 2, .75)

    patches = mae.patchify(x, 2)
    (visible, ids), target = masked_with_the_same_seed(patches)
    ids_of = lambda part: part[:, :, None].expand(-1, -1, 12)
    changed = patches.scatter_add(1, ids_of(ids[:, 4:]), torch.randn(2, 12, 12))
    inputs2, target2 = masked_with_the_same_seed(changed)
    assert torch.equal(ids, inputs2[1]) and not torch.equal(target, target2)
    assert torch.equal(small(visible, ids), small(*inputs2))
    changed = patches.scatter_add(1, ids_of(ids[:, :4]), torch.ones(2, 4, 12))
    inputs3, _ = masked_with_the_same_seed(changed)
    assert not torch.allclose(small(visible, ids), small(*inputs3))


@pytest.mark.parametrize("shape", [(1, 8, 9), (4, 7, 8), (3, 9, 9)])
def test_images_that_cannot_be_cut_into_patches(shape):
    with pytest.raises(ValueError, match=f"a patch of 2 pixels does not divide images of {shape[1]} x {shape[2]} pixels"):
        mae.mask(torch.randn(5, *shape), 2, .75)


@pytest.mark.parametrize("size", [4, 6, 16])
def test_images_of_another_size_than_the_models(small, size):
    x = torch.randn(2, 3, size, size)
    with pytest.raises(ValueError, match=f"^{size ** 2 // 4} patches per image, and this model is for 16$"):
        small(*mae.mask(x, 2, .5)[0])
    with pytest.raises(ValueError, match=f"^{size ** 2 // 4} patches per image, and this ViT is for 16$"):
        small.encoder(mae.patchify(x, 2))


def test_the_model_can_be_exported_for_any_batch(small):
    inputs = lambda B: mae.mask(torch.randn(B, 3, 8, 8), 2, .75)[0]
    batch = torch.export.Dim("B", min=2, max=64)
    exported = torch.export.export(small, inputs(3), dynamic_shapes=({0: batch}, {0: batch})).module()
    for B in 2, 7:
        torch.testing.assert_close(exported(*(x := inputs(B))), small(*x))


def test_the_encoder_computes_visible_patches_only(small):
    """A quarter of the tokens, and cls: the point of MAE's speed."""
    shapes = []
    small.encoder.norm.register_forward_hook(lambda layer, x, y: shapes.append(tuple(y.shape)))
    small(*mae.mask(torch.randn(2, 3, 8, 8), 2, .75)[0])
    assert shapes == [(2, 1 + 4, 16)]


def test_loss_is_the_mean_over_masked_pixels_only():
    prediction, target = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    expected = sum((prediction[b, n, i] - target[b, n, i]).item() ** 2
              for b in range(2) for n in range(3) for i in range(12)) / 72
    assert mae.distance(prediction, target).item() == pytest.approx(expected, rel=1e-5)


def test_norm_pix_target_has_mean_0_and_variance_1():
    _, target = mae.mask(torch.randn(4, 3, 8, 8) * 3 + 1, 4, .5, norm_pix=True)
    torch.testing.assert_close(target.mean(2), torch.zeros(4, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(2), torch.ones(4, 2), atol=1e-4, rtol=0)


def test_encoder_takes_patches_in_any_order(small):
    patches = mae.patchify(torch.randn(2, 3, 8, 8), 2)
    ids = torch.rand(2, 16).argsort(1)
    a, b = small.encoder(patches), small.encoder(mae.gather(patches, ids), ids)
    torch.testing.assert_close(a[:, 0], b[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a[:, 1:], mae.unshuffle(b[:, 1:], ids), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_tensor():
    torch.manual_seed(0)
    model = mae.MAE(8, 2, 16, 2, 2, 8, 1, 2)                             # as initialised
    inputs, target = mae.mask(torch.randn(2, 3, 8, 8), 2, .75)
    mae.distance(model(*inputs), target).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_a_model_learns_to_reconstruct():
    """Images of one colour: what is masked follows from what is visible, and the error falls."""
    torch.manual_seed(0)
    model = mae.MAE(8, 2, 32, 2, 2, 32, 1, 2)
    optimizer = common.adamw(model.parameters(), 3e-3, 0.)
    for _ in range(150):
        x = torch.randn(32, 3, 1, 1).expand(-1, -1, 8, 8).contiguous()
        inputs, target = mae.mask(x, 2, .75)
        loss = mae.distance(model(*inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < .2                                          # predicting the mean costs 1


@pytest.mark.parametrize("tune", ["last", "all"])
def test_tuning_moves_what_it_says(tiny, tune, monkeypatch):
    args = common.resolve(mae.Args(
        data=tiny, tune=tune, dim=16, heads=2, depth=2, decoder_dim=8, decoder_heads=2,
        decoder_depth=1, device="cpu", dtype="float32", tune_steps=20, tune_lr=3e-3))
    images = common.load_images(args)
    torch.manual_seed(0)
    f = mae.MeanPooled(mae.build(args, 8).encoder, args.patch)
    before = {k: v.clone() for k, v in f.state_dict().items()}
    tuned, finetune = [], common.finetune
    monkeypatch.setattr(common, "finetune", lambda args, f, *a: (tuned.append(f), finetune(args, f, *a))[1])
    score = mae.finetune(args, f, images, 10)
    assert score > 90                                                    # dark from light is easy
    for name, value in before.items():
        assert torch.equal(f.state_dict()[name], value), name            # the original is left alone
        moves = tune == "all" or name.startswith(("encoder.blocks.1.", "encoder.norm."))
        if name != "encoder.cls_token" or tune == "last":
            assert torch.equal(tuned[0].state_dict()[name], value) != moves, name


@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_picture_shows_visible_patches_as_they_are(tiny, tmp_path, monkeypatch, norm_pix):
    """Masked | reconstructed | original; the error is that of the test images."""
    args = common.resolve(mae.Args(
        data=tiny, out=str(tmp_path), patch=2, dim=16, heads=2, depth=1, decoder_dim=8, decoder_heads=2,
        decoder_depth=1, norm_pix=norm_pix, device="cpu", dtype="float32"))
    images, sheets = common.load_images(args), []
    monkeypatch.setattr(common, "save_png", lambda path, x, *a, **k: sheets.append(x))
    model = mae.build(args, 8)
    error = mae.reconstruct(args, model, images)
    masked, reconstructed, original = sheets[0].view(20, 3, 3, 8, 8).unbind(1)
    torch.testing.assert_close(original, images.test[:24] / 255, rtol=0, atol=1e-5)
    same = (masked - original).abs().amax(1) < 1e-5                      # (20, 8, 8): visible pixels
    assert .2 < same.float().mean() < .3
    as_pixels = same[:, None].expand_as(original)
    torch.testing.assert_close(reconstructed[as_pixels], original[as_pixels])
    inputs, target = mae.mask(images.normalize(images.test), 2, .75, norm_pix)
    expected = F.mse_loss(model(*inputs), target).item()                 # with another mask
    assert error == pytest.approx(expected, rel=.3)


def test_norm_pix_pictures_have_the_mean_and_variance_of_their_patches(tiny, tmp_path, monkeypatch):
    """A model that predicts each normalised patch exactly gives back the original."""
    args = common.resolve(mae.Args(data=tiny, out=str(tmp_path), patch=2, norm_pix=True, device="cpu"))
    images, sheets, true = common.load_images(args), [], []
    monkeypatch.setattr(common, "save_png", lambda path, x, *a, **k: sheets.append(x))
    random_masking = mae.random_masking

    def watched(patches, ratio):
        parts = random_masking(patches, ratio)
        true.append(mae.normalize_patches(parts[1]))
        return parts

    monkeypatch.setattr(mae, "random_masking", watched)
    assert mae.reconstruct(args, lambda visible, ids: true[-1], images) < 1e-9
    _, reconstructed, original = sheets[0].view(20, 3, 3, 8, 8).unbind(1)
    torch.testing.assert_close(reconstructed, original, rtol=0, atol=1e-5)


def test_the_whole_script(tiny, tmp_path):
    out = tmp_path / "run"
    done = run("--data", tiny, "--steps", 30, "--out", out, *SMALL, "--tune", "all", "--tune-steps", 2)
    assert done.returncode == 0, done.stderr
    assert "reconstructions.png" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80 + len(str(out))
    result = json.loads((out / "result.json").read_text())
    assert result["command"].startswith(f"python mae.py --steps 30 --batch 8 --data {tiny} --dtype float32")
    assert "--dim 16 --depth 1" in result["command"] and "out" not in result["settings"]
    assert set(result["figures"]["accuracy"]) == {
        "raw pixels, linear probe", "untrained ViT, linear probe", "MAE, linear probe",
        "untrained ViT, tune all", "MAE, tune all"}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 31)) and log[-1]["loss"] < log[0]["loss"]
    assert "tiny.npz" in run(out.parent, script="common.py").stdout
    before = result["figures"]
    done = run("--resume", "--steps", 0, "--out", out, "--data", tiny)   # evaluates without training
    assert done.returncode == 0 and "Continuing from step 30" in done.stdout, done.stderr
    assert json.loads((out / "result.json").read_text())["figures"] == before


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("flags, words", [
    ("--mask-ration .5", ["unknown flag --mask-ration", "did you mean --mask-ratio?"]),
    ("--mask-ratio 1.5", ["--mask-ratio must be in (0, 1), not 1.5"]),
    ("--mask-ratio 1", ["--mask-ratio must be in (0, 1), not 1.0"]),
    ("--mask-ratio 0", ["--mask-ratio must be in (0, 1), not 0.0"]),
    ("--mask-ratio nan", ["--mask-ratio must be in (0, 1), not nan"]),
    ("--steps many", ["--steps", "invalid int value"]),
    ("--steps -1", ["--steps must be 0 or more, not -1"]),
    ("--lr nan", ["--lr must be 0 or more, not nan"]),
    ("--lr inf", ["--lr must be 0 or more, not inf"]),
    ("--tune some", ["--tune", "linear"]),
    ("--labels 5 0", ["--labels must be 1 or more, not 0"]),
    ("--labels", ["--labels", "at least one argument"]),
    ("--tune-lr nan", ["--tune-lr must be 0 or more, not nan"]),
    ("--device tpu", ["there is no tpu here", "cpu"]),
    ("--batch 0", ["--batch must be 1 or more, not 0"]),
    ("--clip 0", ["--clip must be in (0, inf], not 0.0"]),
    ("--warmup 1.1", ["--warmup must be in [0, 1], not 1.1"]),
    ("--seed -1", ["--seed must be in [0, 1e9], not -1"]),
])
def test_a_bad_flag_gets_one_sentence(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        common.cli(mae.main, mae.Args, flags.split())
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("mae.py: ") and text.count("\n") == 1
    assert all(word in text for word in words), text
    assert not list(tmp_path.iterdir())


def test_a_bad_flag_in_a_process_of_its_own():
    refused(run("--mask-ratio", 1.5), 2, "--mask-ratio must be in (0, 1), not 1.5")


@pytest.mark.parametrize("flags, words", [
    ("--patch 3", ["a patch of 3 pixels does not divide images of 8 x 8 pixels"]),
    ("--mask-ratio .01", ["a mask ratio of 0.01 leaves 4 of 4 patches visible"]),
    ("--mask-ratio .99", ["a mask ratio of 0.99 leaves 0 of 4 patches visible"]),
    ("--batch 65", ["--batch 65 is more than the 64 training examples"]),
    ("--dim 30 --heads 4", ["30 channels cannot hold sines and cosines", "multiple of 4"]),
    ("--dim 32 --heads 3", ["32 channels cannot be divided among 3 heads"]),
    ("--decoder-dim 20 --decoder-heads 3", ["20 channels cannot be divided among 3 heads"]),
    ("--labels 33", ["--labels 33 is too many: a class has only 32 labelled examples"]),
])
def test_settings_that_do_not_fit_get_one_sentence(tiny, tmp_path, flags, words):
    """Raised where the constraint is, shown without a traceback; and nothing is left behind."""
    out = tmp_path / "run"
    refused(call("--data", tiny, "--out", out, *SMALL, *flags.split()), 1, *words)
    assert not out.exists()


def test_grey_and_oblong_images():
    """Patches of (B, 1, H, W) row by row; positions of a wide image; a step of training has the gradient of the masked ones."""
    x, p = torch.arange(2 * 4 * 6.).view(2, 1, 4, 6), 2
    patches = mae.patchify(x, p)
    assert patches.shape == (2, 6, 4) and patches[0, 4].tolist() == [14, 15, 20, 21]         # second row, second column
    assert torch.equal(mae.unpatchify(patches, p, rows=2), x)
    for wrong in dict(), dict(rows=4):
        with pytest.raises(ValueError, match="6 patches are not"):
            mae.unpatchify(patches, p, **wrong)
    square, wide = mae.sincos_pos_embed(3, 3, 8)[0, 1:].view(3, 3, 8), mae.sincos_pos_embed(2, 3, 8)[0, 1:].view(2, 3, 8)
    assert torch.equal(wide, square[:2])
    assert torch.equal(mae.sincos_pos_embed(3, 2, 8)[0, 1:].view(3, 2, 8), square[:, :2])
    torch.manual_seed(0)
    model = mae.MAE((4, 6), p, dim=8, depth=1, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2, channels=1)
    inputs, target = mae.mask(x / 48, p, .5)
    prediction = model(*inputs)
    assert prediction.shape == target.shape == (2, 3, 4)
    mae.distance(prediction, target).backward()
    assert all(q.grad is not None for q in model.parameters())
    for size, words in ((5, 6), "5 x 6"), ((4, 7), "4 x 7"), (5, "5 x 5"):
        with pytest.raises(ValueError, match=f"a patch of 2 pixels does not divide images of {words} pixels"):
            mae.ViT(size, 2, 8, 1, 2)
    with pytest.raises(ValueError, match="4 patches per image, and this model is for 6"):
        model(*mae.mask(torch.zeros(1, 1, 4, 4), p, .5)[0])
