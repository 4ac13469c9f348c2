"""experiments/same_encoder.py: the same ViT for both methods, budgets in processor time, and its file."""
import json
import sys

import pytest
import torch
from conftest import ROOT, refused, run

sys.path.insert(0, str(ROOT / "experiments"))
import common  # noqa: E402
import mae  # noqa: E402
import repeat  # noqa: E402
import same_encoder  # noqa: E402


def test_a_quick_run_is_continued(tiny, tmp_path):
    flags = ["--data", tiny, "--seconds", .3, "--labels", 1, 2, "--tune-steps", 2, "--out", tmp_path / "x.json"]
    done = run(*flags, "--methods", "mae", "untrained", script="experiments/same_encoder.py", cwd=tmp_path)
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 100, done.stderr
    read = lambda: repeat.apart(json.loads((tmp_path / "x.json").read_text()))
    (rows,) = (r["figures"] for r in read())
    assert set(rows) == {"MAE, 0.75 masked", "untrained"} and rows["MAE, 0.75 masked"]["steps"] > 0
    assert len(rows["MAE, 0.75 masked"]["heading"]) == 3 and rows["untrained"]["heading"] == []
    again = run(*flags, "--methods", "mae", "simclr", script="experiments/same_encoder.py", cwd=tmp_path)
    assert again.returncode == 0 and "SimCLR, seed 0" in again.stdout and "MAE, 0.75 masked, seed 0" not in again.stdout
    (new,) = (r["figures"] for r in read())
    assert {name: new[name] for name in rows} == rows and len(new) == 3
    other = run(*flags, "--methods", "untrained", "--seeds", 0, 1, script="experiments/same_encoder.py", cwd=tmp_path)
    assert other.returncode == 0 and [r["settings"]["seed"] for r in read()] == [0, 1] and read()[0]["figures"] == new
    refused(run(*flags, "--seconds", 2, script="experiments/same_encoder.py", cwd=tmp_path), 1, "is of other settings",
            script="same_encoder.py")
    refused(run("--seconds", 0, script="experiments/same_encoder.py"), 2, "must be positive", script="same_encoder.py")


def test_both_methods_begin_with_the_same_encoder_and_train_it(tiny, monkeypatch):
    args = common.resolve(mae.Args(data=str(tiny), image_size=8, device="cpu", batch=8, dim=16, heads=2, depth=1, clip=1.))
    images = common.load_images(args)
    a, b = (same_encoder.build(args, images, method).encoder.state_dict() for method in ("mae", "simclr"))
    assert all(torch.equal(x, b[name]) for name, x in a.items())
    clock = iter(range(1000))
    monkeypatch.setattr(same_encoder.time, "process_time", lambda: next(clock) * 1.)      # each step takes a second
    own, seen = same_encoder.options(["--seconds", "8"]), []
    for method in "mae", "simclr":
        model, steps = same_encoder.pretrain(own, args, images, method, lambda part, _: seen.append(part))
        moved = model.encoder.state_dict()
        assert steps == 8 and not torch.equal(moved["patch_embed.weight"], a["patch_embed.weight"])
    assert seen == [.25, .5, 1.] * 2


@pytest.mark.parametrize("k", [1, 2])
def test_fine_tuning_leaves_the_encoder_as_it_is(k, tiny):
    args = common.resolve(mae.Args(data=str(tiny), image_size=8, device="cpu", dim=16, heads=2, depth=1))
    images, own = common.load_images(args), same_encoder.options(["--tune-steps", "3"])
    encoder = same_encoder.build(args, images, "mae").encoder
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    assert 0 <= same_encoder.tuned(own, args, images, encoder, k) <= 100
    assert all(torch.equal(x, before[name]) for name, x in encoder.state_dict().items())
