"""mae.py against loops, torch's own modules and an independent forward in the official layout."""
import json
import math
import random
import signal
import subprocess
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, command, refused, run
from torch import nn

import common
import mae


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = mae.MAE(grid=4, pixels=12, dim=16, depth=2, heads=2, decoder_dim=8, decoder_depth=1,
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
    hidden = (back >= keep).float()
    return (((prediction - target) ** 2).mean(-1) * hidden).sum() / hidden.sum()


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_and_gradients_equal_the_official_ones(small, monkeypatch, norm_pix):
    x, noise = torch.randn(3, 3, 8, 8), torch.rand(3, 16)
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: noise)
    masked, target = mae.mask(x, 2, .75, norm_pix)
    loss = mae.distance(small(masked), target)
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
    table = mae.sincos(side, dim)
    assert table.shape == (1, 1 + side * side, dim) and (table[0, 0] == 0).all()
    for row in range(side):
        for column in range(side):
            due = []
            for place in column, row:                                    # the width goes first
                angles = [place / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
                due += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[0, 1 + row * side + column], torch.tensor(due))


def test_restore_undoes_hide():
    x = torch.randn(5, 16, 7)
    visible, hidden, order = mae.hide(x, .6)
    assert visible.shape[1] == 16 - round(16 * .6) and len({tuple(o) for o in order.tolist()}) == 5
    assert torch.equal(mae.restore(torch.cat([visible, hidden], 1), order), x)
    assert [round(mae.hide(torch.zeros(1, 100, 1), .8)[0].shape[1])] == [20]     # int() would keep 19


def test_hiding_is_uniform():
    torch.manual_seed(0)
    order = mae.hide(torch.zeros(4000, 16, 1), .75)[2]
    count = torch.bincount(order[:, :4].flatten(), minlength=16)         # how often each place is visible
    assert (count - 1000).abs().max() < 4 * (4000 * .25 * .75) ** .5


def test_hidden_patches_are_never_seen(small):
    x = torch.randn(2, 3, 8, 8)
    torch.manual_seed(1)
    (visible, order), target = mae.mask(x, 2, .75)
    patches = mae.patchify(x, 2)
    changed = patches.scatter_add(1, order[:, 4:, None].expand(-1, -1, 12), torch.randn(2, 12, 12))
    torch.manual_seed(1)
    (visible2, order2), target2 = mae.mask(mae.unpatchify(changed, 2), 2, .75)
    assert torch.equal(order, order2) and not torch.equal(target, target2)
    assert torch.equal(small((visible, order)), small((visible2, order2)))
    seen = patches.scatter_add(1, order[:, :4, None].expand(-1, -1, 12), torch.ones(2, 4, 12))
    torch.manual_seed(1)
    masked3, _ = mae.mask(mae.unpatchify(seen, 2), 2, .75)
    assert not torch.allclose(small((visible, order)), small(masked3))   # but the visible ones are


def test_loss_is_the_mean_over_hidden_pixels_only():
    prediction, target = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    due = sum((prediction[b, n, i] - target[b, n, i]).item() ** 2
              for b in range(2) for n in range(3) for i in range(12)) / 72
    assert mae.distance(prediction, target).item() == pytest.approx(due, rel=1e-5)


def test_norm_pix_target_has_mean_0_and_variance_1():
    _, target = mae.mask(torch.randn(4, 3, 8, 8) * 3 + 1, 4, .5, norm_pix=True)
    torch.testing.assert_close(target.mean(2), torch.zeros(4, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(2), torch.ones(4, 2), atol=1e-4, rtol=0)


def test_encoder_takes_patches_in_any_order(small):
    patches = mae.patchify(torch.randn(2, 3, 8, 8), 2)
    shuffled, _, order = mae.hide(patches, 0)
    a, b = small.encoder(patches), small.encoder(shuffled, order)
    torch.testing.assert_close(a[:, 0], b[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a[:, 1:], mae.restore(b[:, 1:], order), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_tensor():
    torch.manual_seed(0)
    model = mae.MAE(4, 12, 16, 2, 2, 8, 1, 2)                            # as initialised
    masked, target = mae.mask(torch.randn(2, 3, 8, 8), 2, .75)
    mae.distance(model(masked), target).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_a_model_learns_to_paint():
    """Halves of one colour: what is hidden follows from what is seen, and the error falls to little."""
    torch.manual_seed(0)
    model = mae.MAE(4, 12, 32, 2, 2, 32, 1, 2)
    optimizer = common.adamw(model.parameters(), 3e-3, 0.)
    for _ in range(150):
        x = torch.randn(32, 3, 1, 1).expand(-1, -1, 8, 8).contiguous()
        masked, target = mae.mask(x, 2, .75)
        loss = mae.distance(model(masked), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < .1                                                     # 1 is guessing the mean


@pytest.mark.parametrize("tune", ["last", "all"])
def test_tuning_moves_what_it_says(tiny, tune, monkeypatch):
    images = common.load_images(str(tiny))
    args = mae.Args(tune=tune, dim=16, heads=2, depth=2, decoder_dim=8, decoder_heads=2, decoder_depth=1,
                    device="cpu", dtype="float32", tune_steps=20, tune_lr=3e-3)
    torch.manual_seed(0)
    f = mae.Features(mae.build(args, 8).encoder, args.patch)
    before = {k: v.clone() for k, v in f.state_dict().items()}
    tuned = []
    finetune = common.finetune
    monkeypatch.setattr(common, "finetune", lambda f, *a, **k: (tuned.append(f), finetune(f, *a, **k))[1])
    score = mae.tune(args, f, images, images.train_labels["class"], images.test_labels["class"], 10, 0)
    assert score > 90                                                    # dark from light is easy
    for name, value in before.items():
        assert torch.equal(f.state_dict()[name], value), name            # the original is left alone
        moves = tune == "all" or name.startswith(("encoder.blocks.1.", "encoder.norm."))
        if name != "encoder.cls_token" or tune == "last":
            assert torch.equal(tuned[0].state_dict()[name], value) != moves, name


def test_the_whole_script(tiny, tmp_path):
    out = tmp_path / "run"
    done = run("--data", tiny, "--steps", 30, "--out", out, *SMALL, "--tune", "all", "--tune-steps", 2)
    assert done.returncode == 0, done.stderr
    assert "class with 1 labels" not in done.stdout and "reconstructions.png" in done.stdout
    result = json.loads((out / "result.json").read_text())
    assert result["command"].startswith(f"python mae.py --steps 30 --batch 8 --data {tiny} --dtype float32")
    assert "--dim 16 --depth 1" in result["command"] and "out" not in result["settings"]
    assert set(result["figures"]["accuracy"]) == {
        "raw pixels, linear", "untrained ViT, linear", "MAE, linear", "untrained ViT, tune all", "MAE, tune all"}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 30 and log[-1]["loss"] < log[0]["loss"]
    assert "tiny.npz" in run(out.parent, script="common.py").stdout
    done = run("--resume", "--steps", 0, "--out", out, "--data", tiny)   # look again without training
    assert done.returncode == 0 and "Going on from step 30" in done.stdout, done.stderr


# --------------------------------------------------------------------------------------- resume


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def test_killed_and_resumed_ends_bit_for_bit_as_one_never_stopped(tiny, tmp_path):
    flags = ["--data", tiny, "--steps", 120, "--save-every", 0, *SMALL]
    assert run(*flags, "--out", tmp_path / "whole").returncode == 0
    cut = tmp_path / "cut"
    process = subprocess.Popen(command(*flags, "--out", cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (cut / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(.002)
    time.sleep(random.random() * .3)
    process.kill()
    process.wait()
    step = torch.load(cut / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < step < 120, f"killed too early or too late: step {step}"
    done = run("--resume", "--out", cut)                                 # its settings come back by themselves
    assert done.returncode == 0 and f"Going on from step {step}" in done.stdout, done.stderr
    whole, cut = weights(tmp_path / "whole"), weights(cut)
    for name in whole:
        assert torch.equal(whole[name], cut[name]), name


def test_ctrl_c_keeps_the_work_and_says_how_to_go_on(tiny, tmp_path):
    flags = ["--data", tiny, "--steps", 1_000_000, *SMALL, "--out", tmp_path]
    process = subprocess.Popen(command(*flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while not (tmp_path / "log.jsonl").exists():
        time.sleep(.05)
    time.sleep(.5)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in text
    assert f"go on with python mae.py --resume --out {tmp_path}" in text
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] > 0


def test_a_checkpoint_of_another_shape_or_script_is_refused(tiny, tmp_path):
    assert run("--data", tiny, "--steps", 2, "--out", tmp_path, *SMALL).returncode == 0
    refused(run("--resume", "--out", tmp_path, "--dim", 32), 1,
            "encoder.cls_token is (1, 1, 16) there and (1, 1, 32) here")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(state | {"script": "gpt.py"}, tmp_path / "checkpoint.pt")
    refused(run("--resume", "--out", tmp_path), 2, "written by gpt.py, not by mae.py")
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    refused(run("--resume", "--out", tmp_path), 2, "not a checkpoint that can be read")
    refused(run("--resume", "--out", tmp_path / "none"), 2, "leave out --resume to start anew")


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("flags, words", [
    ("--mask-ration .5", ["unknown flag --mask-ration", "did you mean --mask-ratio?"]),
    ("--mask-ratio 1.5", ["--mask-ratio must be above 0 and below 1, not 1.5"]),
    ("--mask-ratio 1", ["some patches have to stay visible"]),
    ("--mask-ratio 0", ["some hidden"]),
    ("--steps many", ["--steps", "invalid int value"]),
    ("--steps -1", ["--steps must be 0 or more"]),
    ("--lr nan", ["--lr must be 0 or more"]),
    ("--dim 30 --heads 4", ["--dim must be a multiple of --heads 4 and of 4"]),
    ("--decoder-dim 20 --decoder-heads 3", ["--decoder-dim must be a multiple of --decoder-heads 3", "not 20"]),
    ("--tune some", ["--tune", "linear"]),
    ("--labels 0", ["--labels must be 1 or more, not 0"]),
    ("--tune-lr nan", ["--tune-lr must be 0 or more, not nan"]),
    ("--device tpu", ["there is no tpu here", "cpu"]),
    ("--batch 0", ["--batch"]),
])
def test_a_bad_flag_gets_one_sentence(flags, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mae.py"])
    with pytest.raises(SystemExit) as stop:
        common.start(mae.main, mae.Args, flags.split())
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("mae.py: ") and text.count("\n") == 1
    assert all(word in text for word in words), text


def test_a_bad_flag_in_a_process_of_its_own():
    refused(run("--mask-ratio", 1.5), 2, "--mask-ratio must be above 0 and below 1, not 1.5")


@pytest.mark.parametrize("flags, words", [
    ("--patch 3", ["--patch 3 does not divide the 8 x 8 images"]),
    ("--mask-ratio .01", ["--mask-ratio 0.01 of 4 patches leaves none hidden"]),
    ("--batch 65", ["--batch 65 is more than the 64 training examples"]),
])
def test_settings_that_do_not_fit_the_images(tiny, tmp_path, flags, words):
    refused(run("--data", tiny, "--out", tmp_path, *SMALL, *flags.split()), 1, *words)


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path):
    flags = ["--data", tiny, "--out", tmp_path, *SMALL, "--steps", 50, "--save-every", 0]
    assert run(*flags).returncode == 0
    done = run("--resume", "--out", tmp_path, "--steps", 90, "--lr", "1e38", "--clip", 0)
    refused(done, 1, "the loss was", "the checkpoint of step 5", "Try a smaller --lr")
    assert all(v.isfinite().all() for v in weights(tmp_path).values())


def test_an_output_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run("--data", tiny, *SMALL, "--out", tmp_path / "file"), 1, "cannot write to", "choose another --out")


def run_after(code, *flags):
    """Runs mae.py in a process that executes this code first."""
    words = command(*flags)
    code += "; import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run([words[0], "-c", code, *words[1:]], capture_output=True, text=True, timeout=100)


def test_a_full_disk_keeps_the_older_checkpoint(tiny, tmp_path):
    """The limit on the size of a file stands in for a disk that is full in the middle of a write."""
    assert run("--data", tiny, *SMALL, "--out", tmp_path, "--steps", 3).returncode == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    half = len(before) // 2
    done = run_after(f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({half}, {half}))",
                     "--resume", "--out", tmp_path, "--steps", 9)
    refused(done, 1, "cannot write a checkpoint", "the one of step 3 is kept")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_a_disk_that_is_full_from_the_start(tiny, tmp_path):
    done = run_after("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))",
                     "--data", tiny, *SMALL, "--out", tmp_path, "--steps", 9)
    refused(done, 1, "File too large", str(tmp_path))


def test_killed_in_the_middle_of_a_write_the_older_checkpoint_still_loads(tiny, tmp_path):
    assert run("--data", tiny, *SMALL, "--out", tmp_path, "--steps", 3).returncode == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    done = run_after("import os, torch; torch.save = lambda state, f: (f.write(b'half'), f.flush(), os.kill(os.getpid(), 9))",
                     "--resume", "--out", tmp_path, "--steps", 9)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "checkpoint.pt.part").read_bytes() == b"half"
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert common.read_checkpoint(tmp_path, "mae.py")["step"] == 3


def test_a_checkpoint_is_replaced_and_never_written_over(tiny, tmp_path):
    """A second name of the old file shows that no byte of it was touched by the new one."""
    assert run("--data", tiny, *SMALL, "--out", tmp_path, "--steps", 3).returncode == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "second-name").hardlink_to(tmp_path / "checkpoint.pt")
    assert run("--resume", "--out", tmp_path, "--steps", 9).returncode == 0
    assert (tmp_path / "second-name").read_bytes() == before != (tmp_path / "checkpoint.pt").read_bytes()


def test_an_earlier_run_is_kept_as_previous(tiny, tmp_path):
    for seed in 1, 2:
        assert run("--data", tiny, *SMALL, "--out", tmp_path, "--steps", 3, "--seed", seed).returncode == 0
    state = lambda name: torch.load(tmp_path / name, weights_only=True)["args"]["seed"]
    assert (state("previous.pt"), state("checkpoint.pt")) == (1, 2)
