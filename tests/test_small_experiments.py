"""experiments/fine_tune.py, while_training.py and search.py: their figures are those of the scripts themselves, the
training is not changed, and what is done is kept."""
import copy
import json
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, Forked, interrupted, refused, run
from torch import nn

import autoencoder
import bert
import common
import mae

sys.path.insert(0, str(ROOT / "experiments"))
import fine_tune, repeat, search, while_training  # noqa: E402

BERT = dict(steps=3, batch=4, context=12, dim=16, depth=2, heads=2, passage=8, classes=2, labels=(1, 2), tune_steps=2,
            tune_lr=.01, dtype="float32", device="cpu")
IMAGES = {"autoencoder.py": "--width 4 --latent 8 --batch 8 --corrupt 0.2 --lr 0.01 --dtype float32 --device cpu".split(),
          "simclr.py": "--width 8 --batch 8 --dim 8 --dtype float32 --device cpu".split(), "mae.py": SMALL}


# ------------------------------------------------------------------------------------ fine_tune.py


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of bert.py, and its result."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "texts").mkdir()
    (folder / "texts/fox.txt").write_text("the quick brown fox jumps over the lazy dog and runs. " * 40)
    (folder / "texts/sea.txt").write_text("a ship sails on the wide sea where the quick dog runs, far away. " * 40)
    bert.main(bert.Args(**BERT, data=str(folder / "texts"), out=str(folder / "run")))
    return folder / "run", json.loads((folder / "run/result.json").read_text())


def tuned(*flags):
    fine_tune.main(fine_tune.options([*map(str, flags)]))
    return json.loads(open(flags[flags.index("--out") + 1]).read())


def test_fine_tune(finished, tmp_path, capsys):
    """The first choice is that of the script; the others, and the methods that it lacks, are computed one by one."""
    folder, own = finished
    rows = tuned(folder, "--repeats", 2, "--out", tmp_path / "a.json")["figures"]["accuracy"]
    for name in "bag of words, linear", "untrained, tune all", "BERT, tune all":
        assert [row[0] for row in rows[name]] == own["figures"]["accuracy"][name], name
    assert [len(row) for row in rows.values()] == [2] * 8 and all(len(cell) == 2 for row in rows.values() for cell in row)

    args, model, passages, figures = fine_tune.load(fine_tune.options([str(folder)]))
    model.requires_grad_(False)
    for part in model.blocks[-1], model.pooler:
        part.requires_grad_(True)
    assert rows["BERT, tune last"][1][1] == bert.finetune(args, model, passages, 2, seed=1)
    shown = capsys.readouterr().out
    assert f"{figures['majority']:.1f}" in shown and common.mean_std(rows["BERT, tune all"][0]) in shown


def test_what_is_probed_and_what_is_tuned(finished, monkeypatch):
    """Features, one passage at a time; and the parts of the model that take gradients."""
    args, model, passages, _ = fine_tune.load(fine_tune.options([str(finished[0])]))
    monkeypatch.setattr(common, "probe", lambda *given: given)
    monkeypatch.setattr(bert, "finetune", lambda args, model, passages, k, seed: (model, seed))
    fits = fine_tune.methods(args, model, passages)
    torch.manual_seed(args.seed)
    untrained = bert.build(args, len(model.mlm_bias))
    expected = {"bag of words, linear": lambda x: torch.tensor([(x == w).sum() for w in range(len(model.mlm_bias))]).float(),
                "untrained, frozen [CLS]": lambda x: untrained.encode(x[None])[0, 0],
                "BERT, frozen [CLS]": lambda x: model.encode(x[None])[0, 0],
                "BERT, frozen mean of words": lambda x: sum(model.encode(x[None])[0, j] for j in range(1, 7)) / 6}
    for name, f in expected.items():
        train, labels, test, test_labels, k, seed = fits[name](2, 1)
        assert (k, seed) == (2, 1) and labels is passages.labels and test_labels is passages.test_labels
        for features, x in (train, passages.train), (test, passages.test):
            assert torch.allclose(features, torch.stack([*map(f, x)]), atol=1e-5), name
    for name, base in ("untrained", untrained), ("BERT", model):
        for how, parts in ("last", ("blocks.1.", "pooler.")), ("all", ("",)):
            tuned, seed = fits[f"{name}, tune {how}"](2, 1)
            assert seed == 1 and all(p.requires_grad == n.startswith(parts) for n, p in tuned.named_parameters())
            assert all(x.equal(base.state_dict()[n]) for n, x in tuned.state_dict().items())


def test_fine_tune_continues(finished, tmp_path, monkeypatch):
    """More repeats are added, also after it was stopped: the file is that of one run with all."""
    folder, _ = finished
    whole = tuned(folder, "--repeats", 2, "--out", tmp_path / "whole.json")
    tuned(folder, "--repeats", 1, "--out", tmp_path / "part.json")
    calls = interrupted(monkeypatch, common, "probe", 3)
    with pytest.raises(KeyboardInterrupt):
        tuned(folder, "--repeats", 2, "--out", tmp_path / "part.json")
    kept = json.loads((tmp_path / "part.json").read_text())["figures"]["accuracy"]
    assert [len(cell) for row in kept.values() for cell in row] == [2, 2] + [1] * 14
    tuned(folder, "--repeats", 2, "--out", tmp_path / "part.json")
    assert json.loads((tmp_path / "part.json").read_text())["figures"] == whole["figures"]
    assert len(calls) == 3 + 6                                    # probes: what was done is not done again


def test_fine_tune_refuses(finished, tmp_path):
    folder, script = finished[0], "experiments/fine_tune.py"
    refuse = lambda status, *flags, words: refused(run(*flags, script=script), status, *words, script="fine_tune.py")
    refuse(2, words=["either", "--quick"])
    refuse(2, folder, "--repeats", 0, words=["1 or more"])
    refuse(1, tmp_path, words=["there is no", "checkpoint.pt"])
    refuse(1, folder, "--labels", 10_000, words=["too many"])
    path = tmp_path / "a.json"
    path.write_text("{}")
    refuse(1, folder, "--out", path, words=["no file of fine_tune.py"])
    tuned(folder, "--repeats", 1, "--labels", 1, "--out", tmp_path / "b.json")
    refuse(1, folder, "--out", tmp_path / "b.json", words=["another labels"])
    state = common.read_checkpoint(folder) | dict(step=2)
    torch.save(state, tmp_path / "checkpoint.pt")
    refuse(1, tmp_path, words=["2 of 3 steps", "--resume"])


# ------------------------------------------------------------------------------- while_training.py


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An .npz of 64 + 200 images of 8 x 8 in two classes that are hard to tell apart: accuracies differ."""
    r = np.random.default_rng(0)
    y = np.arange(264) % 2
    x = (r.integers(0, 240, (264, 8, 8, 3)) + 10 * y[:, None, None, None]).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])
    return path


def watch(script, tiny, *flags, at=(0, 2, 4), out="w.json"):
    """Runs the experiment in the present folder; returns its result."""
    while_training.main(while_training.options([script, "--at", *at, "--labels", 1, "--out", out, "--", *IMAGES[script],
                                                "--steps", 4, "--labels", 1, "--data", tiny, *flags]))
    return json.loads(open(out).read())


def own_run(script, tiny):
    """The script's own run: its weights and its result."""
    done = run(*IMAGES[script], "--steps", 4, "--labels", 1, "--data", tiny, "--out", f"{script}-own", script=script,
               cwd=".")
    assert done.returncode == 0, done.stderr
    return common.read_checkpoint(f"{script}-own"), json.loads(open(f"{script}-own/result.json").read())


def equal(a, b):
    assert a["step"] == b["step"] == 4 and a["model"].keys() == b["model"].keys()
    return all(x.equal(b["model"][name]) for name, x in a["model"].items())


@pytest.mark.parametrize("script", IMAGES)
def test_while_training(script, tiny, tmp_path, monkeypatch, capsys):
    """The training ends with the same weights bit for bit, and the last evaluation is that of the script."""
    monkeypatch.chdir(tmp_path)
    weights, own = own_run(script, tiny)
    result = watch(script, tiny)
    assert equal(common.read_checkpoint("runs/w-0"), weights)
    found = result["figures"]["at"]
    assert list(found) == ["0", "2", "4"] and result["settings"] == own["settings"]
    name = {"autoencoder.py": "autoencoder", "simclr.py": "SimCLR", "mae.py": "MAE, linear probe"}[script]
    assert found["4"]["accuracy"] == own["figures"]["accuracy"][name]
    assert found["4"]["error"] == own["figures"].get("error")
    untrained = {"autoencoder.py": "untrained encoder", "simclr.py": "untrained ResNet", "mae.py": "untrained ViT, linear probe"}
    assert found["0"]["accuracy"] == own["figures"]["accuracy"][untrained[script]]
    if script == "simclr.py":
        assert found["2"]["error"] is None
    else:
        errors = [f["error"] for f in found.values()]
        assert len(set(errors)) == 3 and errors[2] < errors[0]
        assert f"{errors[1]:.3f}" in capsys.readouterr().out


def test_while_training_continues(tiny, tmp_path, monkeypatch):
    """Stopped in an evaluation and between two, and continued: the same figures and weights."""
    monkeypatch.chdir(tmp_path)
    whole = watch("autoencoder.py", tiny, out="whole.json")
    calls = interrupted(monkeypatch, while_training, "evaluate", 2)
    with pytest.raises(KeyboardInterrupt):
        watch("autoencoder.py", tiny, "--save-every", 0)
    assert list(json.loads(open("w.json").read())["figures"]["at"]) == ["0"]
    assert common.read_checkpoint("runs/w-0")["step"] == 1
    result = watch("autoencoder.py", tiny, "--save-every", 0)
    assert result["figures"] == whole["figures"] and len(calls) == 4
    assert equal(common.read_checkpoint("runs/w-0"), common.read_checkpoint("runs/whole-0"))
    assert watch("autoencoder.py", tiny) == result and len(calls) == 4               # it is done: read only
    both = repeat.apart(watch("autoencoder.py", tiny, "--seed", 1, out="whole.json"))                     # is added
    assert both[0]["figures"] == whole["figures"] != both[1]["figures"] and list(both[1]["figures"]["at"]) == ["0", "2", "4"]
    with pytest.raises(common.UserError, match="after step 1 already"):
        watch("autoencoder.py", tiny, at=(1, 4))
    with pytest.raises(common.UserError, match="another --latent"):
        watch("autoencoder.py", tiny, "--latent", 4)
    open("w.json", "w").write("[]")
    with pytest.raises(common.UserError, match="no file of while_training"):
        watch("autoencoder.py", tiny)


def test_an_evaluation_leaves_the_model_as_it_is(tiny, tmp_path):
    """In training mode, and with the same weights; the time of evaluations is not that of the training."""
    args = autoencoder.Args(width=4, latent=8, labels=(1,), data=str(tiny), out=str(tmp_path), device="cpu", steps=2)
    images = common.load_images(args)
    model = autoencoder.build(args, images.size)
    before = copy.deepcopy(model.state_dict())
    while_training.evaluate(autoencoder, args, model, images, [1, 0])
    assert model.training and all(x.equal(before[name]) for name, x in model.state_dict().items())

    def slow(run, n):
        time.sleep(.2 * (n > 0))
    layer = nn.Linear(1, 1)
    watched = while_training.Watched(slow, args, layer, common.adamw(layer.parameters(), .1, 0.))
    for step in watched:
        watched.log(layer.weight.sum())
    assert watched.step == 2 and 0 <= watched.seconds < .2 < .4 <= watched.evaluating


def test_only_the_images_of_the_scripts_probes(tiny):
    images = while_training.load_images(mae, mae.Args(data=str(tiny), device="cpu"))
    assert len(images.train) == 64
    images = while_training.load_images(mae, mae.Args(device="cpu", image_size=8))
    all = common.load_images(mae.Args(device="cpu", image_size=8))
    assert len(images.train) == len(images.train_labels["colour"]) == mae.POOL == 5000
    assert images.mean.equal(all.mean) and images.test.equal(all.test)


def test_while_training_refuses(tiny):
    refuse = lambda status, *flags, words: refused(
        run(*flags, script="experiments/while_training.py"), status, *words, script="while_training.py")
    refuse(2, "gpt.py", words=["gpt.py"])
    refuse(2, "mae.py", "--at", 5, "--", "--steps", 4, "--device", "cpu", words=["from 0 to --steps, 4"])
    refuse(2, "mae.py", "--", "--out", "x", words=["cannot come after"])
    refuse(1, "mae.py", "--labels", 60, "--out", "runs/none/w.json", "--", "--data", tiny, words=["too many"])


# ------------------------------------------------------------------------------------------- search.py


def test_search(tmp_path, monkeypatch):
    """Each row with each seed, once; the figures are those of the runs; no text that a script tests on is read."""
    start, ran = repeat.run, []
    monkeypatch.setattr(repeat, "subprocess", types.SimpleNamespace(Popen=lambda line, **_: Forked(line)))
    monkeypatch.setattr(repeat, "run", lambda script, out, flags: ran.append((out.relative_to(tmp_path), flags)) or start(script, out, flags))

    def searched(*more):
        search.main(search.options(["gpt.py", "--quick", "--out", tmp_path, "--seeds", *more]))
        return json.loads((tmp_path / "search-gpt.json").read_text())["figures"]
    first = searched(10, "--try", "--muon-lr 0.5 --batch 4")
    assert list(first) == ["usual settings", "muon-lr 0.5 batch 4"] and len(ran) == 2
    again = searched(10, "--try", "--muon-lr 0.5 --batch 4", "--weight-decay 0")
    assert len(ran) == 3 and [len(found["loss"]) for found in again.values()] == [1, 1, 1]
    assert {row: again[row] for row in first} == first
    for (out, flags), row in zip(ran, again):
        result = json.loads((tmp_path / out / "result.json").read_text())
        assert (result["settings"]["seed"], result["settings"]["steps"]) == (10, 2)
        assert result["settings"]["batch"] == (4 if "batch" in row else 16)
        assert result["figures"]["loss"] == again[row]["loss"][0]
    whole, own = common.load_text("pydocs"), common.load_text(str(tmp_path / "data/pydocs"))
    assert sorted(a + b for a, b in zip(own.train, own.val)) == sorted(whole.train)


def test_search_of_images_and_scenes(tmp_path):
    args = search.options(["mae.py", "--out", tmp_path])
    assert args.file == search.Path("results/search-mae.json") and args.seeds == [10, 11, 12]
    (_, path) = search.validation(args)
    with np.load(path) as file:
        x, labels = common.shapes(20_000)
        assert np.array_equal(file["x_test"], x[:2000].permute(0, 2, 3, 1)) and np.array_equal(file["y_train"], labels["shape"][2000:])
    assert search.validation(search.options(["flamingo.py"])) == []
