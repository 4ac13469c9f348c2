"""experiments/forgetting.py: its training is that of lora.py, what it reads off the curves is right, and what is done is
kept."""
import dataclasses
import json
import math
import re
import sys

import conftest
import pytest
import torch
from conftest import ROOT, interrupted
from torch import nn

import common
import lora

sys.path.insert(0, str(ROOT / "experiments"))
import forgetting  # noqa: E402

SMALL = ("--dim 16 --heads 2 --depth 2 --context 40 --base-steps 3 --base-batch 2 --example 8 --k 6 --epochs 4 --batch 2 "
         "--rank 2 --dtype float32 --device cpu").split()                          # 12 steps


def forget(*flags):
    """The experiment in the present folder; returns its figures."""
    own = forgetting.options([*SMALL, *map(str, flags)])
    forgetting.main(own)
    return json.loads(open(own.out).read())["figures"]


@pytest.fixture(scope="module")
def done(texts, tmp_path_factory):
    """A finished run: its folder, its flags, its figures, and what it printed."""
    folder = tmp_path_factory.mktemp("forgetting")
    flags = [*texts, "--seeds", 0, 3, "--methods", "lora", "full", "--out", "f.json"]
    process = conftest.run(*SMALL, *flags, script="experiments/forgetting.py", cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder, flags, json.loads((folder / "f.json").read_text())["figures"], process.stdout


def test_curves_of_all_methods(done):
    folder, _, found, text = done
    assert found["at"] == [0, 1, 3, 6, 12] and list(found["bases"]) == ["0", "3"]
    assert {method: list(rates) for method, rates in found["rows"].items()} == {
        "lora": ["0.001", "0.003"], "full": ["5e-05", "0.00015"]}
    for rates in found["rows"].values():
        for row in rates.values():
            for curve in row.values():
                assert len(curve["change"]) == 5 and curve["change"][0] < 1e-4 < curve["change"][1] < curve["change"][-1]
            for seed, curve in row.items():
                assert len(curve["new"]) == len(curve["old"]) == 5 and curve["new"][0] != curve["new"][-1]
                assert [curve[name][0] for name in ("new", "old")] == pytest.approx([found["bases"][seed][name]
                                                                                   for name in ("new", "old")], rel=1e-6)
    assert found["bases"]["0"]["base"] != found["bases"]["3"]["base"]
    rows = found["rows"]["lora"]["0.001"], found["rows"]["lora"]["0.003"]
    assert rows[0]["0"]["new"][-1] != rows[1]["0"]["new"][-1] != rows[1]["3"]["new"][-1]
    assert max(map(len, text.splitlines())) <= 80
    assert (folder / "f.svg").read_text() == forgetting.draw(found, [1., 3.])
    state = json.loads((folder / "f.json").read_text())
    assert state["command"].startswith("python experiments/forgetting.py --methods lora full --times 1 3 --seeds 0 3 ")
    assert state["summary"] == forgetting.table(found)[1] and "--rank 2" in state["command"]


def test_the_training_is_that_of_lora_py_at_a_constant_rate(done, monkeypatch):
    """Step by step, without Run: the losses before, after the first and the last step."""
    folder, flags, found, _ = done
    monkeypatch.chdir(folder)
    own = forgetting.options([*SMALL, *map(str, flags)])
    own.args = common.resolve(own.args)
    args = forgetting.prepared(own, 3)
    args.method = "full"
    base, about, examples, new, old = forgetting.load(args, 3)
    assert about["fingerprint"] == found["bases"]["3"]["base"] and examples.equal(common.choose(common.load_examples(args, lora.BYTES)[0], 6, 3))
    torch.manual_seed(3)
    model = lora.adapt_base(args, base)
    optimizer = common.adamw(model.parameters(), 0., args.weight_decay)
    losses = []
    for step in range(12):
        losses.append(lora.losses(args, model, new, old))
        for group in optimizer.param_groups:
            group["lr"] = 3 * lora.LR["full"] * min(1, (step + 1) / 10)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(3 * 1_000_003 + step // 3))
        x = examples[order[step % 3 * 2:][:2]]
        inputs, target = lora.mask(x[:, 0], lora.BYTES.BOS)
        lora.distance(model(inputs)[:, 1:], target[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
    losses.append(lora.losses(args, model, new, old))
    for name in "new", "old":
        ours = [losses[n][name] for n in found["at"]]
        assert found["rows"]["full"]["0.00015"]["3"][name] == pytest.approx(ours, abs=1e-5), name
    assert found["rows"]["full"]["0.00015"]["3"]["trained"] == sum(p.numel() for p in model.parameters())


def test_the_same_command_does_nothing_twice(done, monkeypatch):
    folder, flags, found, _ = done
    monkeypatch.chdir(folder)
    monkeypatch.setattr(forgetting, "follow", None)
    assert forget(*flags) == found


def test_what_was_stopped_continues(done, tmp_path, monkeypatch):
    """From fewer seeds, methods and rates, and after it was stopped: the figures of one run with all."""
    _, flags, found, _ = done
    monkeypatch.chdir(tmp_path)
    count = interrupted(monkeypatch, forgetting, "follow", 5)
    forget(*flags, "--seeds", 3, "--methods", "full", "--times", 3)
    with pytest.raises(KeyboardInterrupt):
        forget(*flags)
    kept = json.loads(open("f.json").read())["figures"]["rows"]
    assert sum(len(row) for rates in kept.values() for row in rates.values()) == 4
    ours = forget(*flags)
    assert len(count) == 9

    def sorted_rows(figures):
        return {method: {rate: {seed: {name: value for name, value in curve.items() if name != "seconds"}
                                for seed, curve in row.items()} for rate, row in rates.items()}
                for method, rates in figures["rows"].items()}
    assert sorted_rows(ours) == sorted_rows(found) and ours["bases"] == found["bases"]


def test_figures_of_other_settings_are_never_overwritten(done, tmp_path):
    folder, flags, _, _ = done
    before = (folder / "f.json").read_bytes()
    refuse = lambda status, *more, words: conftest.refused(conftest.run(
        *SMALL, *flags, *more, script="experiments/forgetting.py", cwd=folder), status, *words, script="forgetting.py")
    refuse(1, "--rank", 1, words=["f.json has figures of another --rank", "--out"])
    refuse(1, "--k", 4, words=["another", "--k"])
    broken = tmp_path / "x.json"
    broken.write_text("{}")
    refuse(1, "--out", broken, words=["x.json is no file of forgetting.py"])
    refuse(2, "--lr", 1, words=["--lr cannot be used here"])
    refuse(2, "--seed", 1, words=["--seed cannot be used here"])
    refuse(2, "--base", "gpt2/", words=["--base cannot be used here"])
    refuse(2, "--seeds", 1, 1, words=["--seeds: each once"])
    refuse(2, "--times", 0, words=["--times must be above 0"])
    refuse(2, "--methods", "adapters", words=["invalid choice"])
    state = json.loads(before)
    state["figures"]["bases"]["0"]["base"] = "12345678"
    del state["figures"]["rows"]["lora"]
    (folder / "g.json").write_text(json.dumps(state))
    for seed in 0, 3:
        (folder / f"runs/g-{seed}").mkdir(parents=True)                             # the bases beside it are used
    refuse(1, "--out", "g.json", words=["another base for seed 0"])
    refuse(1, "--out", "h.json", "--times", 1e30, words=["lora, rate 1e+27: ", "smaller --lr"])
    assert (folder / "f.json").read_bytes() == before


# -------------------------------------------------------------------------- what is read off the curves


def test_reached():
    """The first time, on the straight line between two points."""
    curve = dict(new=[2., 1.8, 1.9, 1.6, 1.7], old=[1., 1.1, 1.2, 1.4, 1.5])
    assert forgetting.reached(curve, 2.) == 1. and forgetting.reached(curve, 3.) == 1.
    assert forgetting.reached(curve, 1.9) == pytest.approx(1.05)
    assert forgetting.reached(curve, 1.8) == pytest.approx(1.1)
    assert forgetting.reached(curve, 1.75) == pytest.approx(1.2 + .5 * .2)
    assert forgetting.reached(curve, 1.6) == pytest.approx(1.4) and math.isnan(forgetting.reached(curve, 1.5))


def made():
    """Two seeds: b goes further than a, and forgets twice as much on its way."""
    a = lambda shift: dict(new=[2. + shift, 1.8 + shift, 1.6 + shift], old=[1., 1.1, 1.3], change=[0., 1., 3.])
    b = lambda shift: dict(new=[2. + shift, 1.7 + shift, 1.5 + shift], old=[1., 1.3, 1.9 + shift], change=[0., 2., 8.])
    rows = {"lora": {"0.001": {"0": a(0.), "1": a(.1)}}, "full": {"5e-05": {"0": b(0.), "1": b(.1)}}}
    return dict(bases={"0": dict(new=2., old=1.), "1": dict(new=2.1, old=1.)}, rows=rows)


@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit", "full"])
def test_change(method):
    """The norm of the difference, of matrices with what was added to them."""
    torch.manual_seed(0)
    base = lora.GPT(9, 8, 16, 2, 2)
    model = lora.adapt(lora.GPT(9, 8, 16, 2, 2), method)
    model.load_state_dict({name: base.state_dict()[name.replace(".linear.", ".")] for name in model.state_dict()
                           if name.replace(".linear.", ".") in base.state_dict()}, strict=False)
    assert forgetting.change(model, base) == 0
    with torch.no_grad():
        for p in lora.adapter_state(model):
            model.get_parameter(p).add_(.1)
    moved, before = [], torch.cat([p.flatten() for p in base.parameters()]).norm()
    for name, p in base.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, lora.LoRA) and name.endswith("weight"):
            moved.append(layer.delta())
        elif isinstance(layer, lora.IA3):
            scale = layer.scale if not layer.outputs else torch.cat([torch.ones(16), layer.scale])
            shape = (-1, 1) if layer.outputs and p.ndim == 2 else (-1,)
            moved.append(p * (scale.view(shape) - 1) if layer.outputs or p.ndim == 2 else 0 * p)
        elif not isinstance(layer, lora.LoRA):
            moved.append(model.get_parameter(name) - p)
    expected = 100 * torch.cat([x.flatten() for x in moved]).norm() / before
    assert expected > .1 and forgetting.change(model, base) == pytest.approx(expected.item(), rel=1e-4)


def test_compared_at_the_same_new_loss():
    found, losses = forgetting.compared(made())
    assert losses[1.] == pytest.approx([1.6, 1.7]) and losses[.5] == pytest.approx([1.8, 1.9])
    a, b = found["lora", "0.001"], found["full", "5e-05"]
    assert a[.5] == pytest.approx([.1, .1]) and a[1.] == pytest.approx([.3, .3])
    assert b[.5] == pytest.approx([.2, .2]) and b[1.] == pytest.approx([.6, .65])
    assert a["change"] == pytest.approx([3., 3.]) and b["change"] == pytest.approx([5., 5.])
    assert b["least"] == pytest.approx([1.5, 1.6]) and b["there"] == pytest.approx([.9, 1.])
    rows, line = forgetting.table(made())
    assert rows[0][2:4] == ["at new 1.850", "at new 1.650"] and rows[2][4:] == ["5.0", "1.550 ±0.071", "0.950"]
    assert line == "old loss at a new loss of 1.650: lora 0.001 +0.300, full 5e-05 +0.625"
    assert max(map(len, common.table(rows).splitlines())) <= 80


def test_draw():
    """A panel for each multiple of the usual rates, and a point for each evaluation, in the mean over seeds."""
    found = made()
    found["rows"]["lora"]["0.003"] = found["rows"]["lora"]["0.001"]
    text = forgetting.draw(found, [1., 3.])
    assert text.count("<circle") == 9 and "the usual learning rate" in text and "3 times the usual learning rate" in text
    assert len(re.findall(r'class="c1 b"', text)) == 1 and 'class="c0 b"' not in text      # seeds differ in b's last old loss


def test_points():
    assert forgetting.points(1000) == [0, 1, 3, 7, 15, 31, 62, 125, 250, 500, 1000]
    assert forgetting.points(1) == [0, 1] and forgetting.points(0) == [0]


def test_quick(tmp_path):
    process = conftest.run("--quick", "--device", "cpu", "--seeds", 0, "--methods", "lora", "full",
                           script="experiments/forgetting.py", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "runs/quick-forgetting.json").read_text())["figures"]
    assert list(found["rows"]) == ["lora", "full"] and list(found["bases"]) == ["0"] and not (tmp_path / "results").exists()
    assert (tmp_path / "runs/quick-forgetting.svg").exists() and "Figures: runs/quick-forgetting.json" in process.stdout


def test_usual_settings():
    own = forgetting.options([])
    assert own.out == "results/forgetting.json" and own.seeds == [0, 1, 2] and own.times == [1., 3.] and own.args.k == 1024
    own.args = dataclasses.replace(own.args, device="cpu")
    args = forgetting.prepared(own, 2)
    assert (args.steps, args.batch, args.seed, args.out) == (1000, 16, 2, "runs/forgetting-2")
    assert forgetting.options(["--quick"]).out == "runs/quick-forgetting.json"
