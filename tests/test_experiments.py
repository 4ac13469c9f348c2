"""experiments/compare.py, the lecture's comparison; experiments/repeat.py, one script with several seeds; and what the
benchmarks have in common."""
import json
import os
import signal
import statistics
import sys
import time
import types
from xml.etree import ElementTree

import numpy as np
import conftest
import pytest
import torch
from conftest import ROOT, SMALL

import common
import simclr

sys.path.insert(0, str(ROOT / "experiments"))
import compare, pairs, repeat  # noqa: E402


def run(*flags, script="compare.py", **how):
    return conftest.run(*flags, script=f"experiments/{script}", **how)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "experiments").glob("*.py")
                                          if path.name not in ("pairs.py", "curves.py", "shared.py")))
def test_help(script):
    """Without the packages that the benchmarks are beside."""
    done = run("--help", script=script)
    assert done.returncode == 0 and f"usage: {script}" in done.stdout and not done.stderr


# ------------------------------------------------------------------------------------- compare.py


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory):
    """A finished comparison: its folder, its flags, and what it printed."""
    folder = tmp_path_factory.mktemp("compare")
    flags = ["--data", tiny, "--seeds", 2, "--steps", 2, "--tune-steps", 2, "--labels", 1, 5, 0,
             "--device", "cpu", "--out", folder]
    done = run(*flags, before=conftest.forking)
    assert done.returncode == 0, done.stderr
    return folder, flags, done.stdout


def figures(folder, seed):
    return json.loads((folder / f"compare-tiny-{seed}.json").read_text())["figures"]


def test_the_whole_comparison(compared, tiny):
    """Tables, figures and curves."""
    folder, _, shown = compared
    for row in ("raw pixels", "untrained ResNet", "SimCLR", "autoencoder", "untrained ViT", "MAE",
                "supervised encoder"):
        assert f"\n{row} " in shown, row
    how = simclr.Args(data=str(tiny), device="cpu")
    images = common.load_images(how)                               # the figures, by hand
    (y, test_y), seeds = images.class_labels(), [figures(folder, seed) for seed in range(2)]
    for seed, found in enumerate(seeds):
        state = torch.load(folder / f"tiny-simclr-{seed}/checkpoint.pt", weights_only=True)
        model = simclr.SimCLR(10, 16, 128)
        model.load_state_dict(state["model"])
        model.to(memory_format=torch.channels_last).eval()
        train, test = (common.encode(how, model.encoder, images, x)
                       for x in (images.train, images.test))
        expected = [common.probe(train, y, test, test_y, k, seed) for k in (1, 5, 0)]
        assert found["linear"]["SimCLR"] == pytest.approx(expected, abs=5.1)      # one of 20 images
        assert found["attributes"]["MAE"]["class"] == found["linear"]["MAE"][2]
        assert set(found["tune"]) == set(found["linear"]) - {"raw pixels"}
        assert all(len(row) == 3 for part in ("linear", "tune") for row in found[part].values())
    assert seeds[0] != seeds[1]
    both = json.loads((folder / "compare-tiny.json").read_text())
    assert [result["figures"] for result in repeat.apart(both)] == seeds and "chance" in both
    assert ElementTree.parse(folder / "compare-tiny.svg").getroot().tag.endswith("svg")


def test_what_is_done_is_kept(compared, tmp_path):
    """Stopped after two methods, the third is done again; whole, nothing is. Other settings and broken files are
    refused."""
    folder, flags, shown = compared
    path = folder / "compare-tiny-1.json"
    whole = json.loads(path.read_text())
    part = json.loads(path.read_text()) | dict(whole=False, seconds=1000.)
    for rows in part["figures"].values():
        rows.pop("MAE")
    whole["figures"]["linear"]["SimCLR"] = part["figures"]["linear"]["SimCLR"] = [1., 2., 3.]
    path.write_text(json.dumps(part))
    done = run(*flags)
    assert done.returncode == 0 and "step 1" not in done.stdout, done.stderr      # the runs are done
    again = json.loads(path.read_text())
    assert again["whole"] and again["figures"] == whole["figures"] and again["seconds"] > 1000

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")
              if path.suffix in (".pt", ".json")}
    again = run(*flags)
    assert again.returncode == 0 and again.stdout == done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    conftest.refused(run(*flags, "--tune-steps", 3), 1, "is of other settings: choose another --out",
                     script="compare.py")
    path.write_text("{")
    conftest.refused(run(*flags), 1, "compare-tiny-1.json is broken: remove it", script="compare.py")
    path.write_text(json.dumps(whole))


def test_tables_are_means_and_fit_80_columns():
    seeds = [dict(linear={"untrained encoder": [10 + s] * 5, "SimCLR": [100.] * 5}, tune={"SimCLR": [s] * 5},
                  attributes={"raw pixels": {"shape": 1. + s}, "SimCLR": {"shape": 2., "colour": 100. - s}})
             for s in (0, 2, 4)]
    args = compare.options(["--device", "cpu"])
    images = types.SimpleNamespace(names={"shape": ["a"] * 10, "colour": ["b"] * 8})
    linear, tuned, attributes = compare.tables(args, images, seeds)
    assert linear[0] == ["shape, linear", "1", "5", "20", "100", "all"]
    assert linear[2] == ["untrained encoder", *["12.0 ±2.0"] * 5]
    assert linear[1] == ["chance", *["10.0"] * 5] and tuned[2][1] == "2.0 ±2.0"
    assert attributes == [["all labels", "shape", "colour"], ["chance", "10.0", "12.5"],
                          ["raw pixels", "3.0 ±2.0", ""], ["SimCLR", "2.0 ±0.0", "98.0 ±2.0"]]
    tables = map(common.table, (linear, tuned, attributes))
    assert max(len(line) for text in tables for line in text.splitlines()) <= 80


def test_the_curves_are_where_the_figures_are():
    names = "untrained ResNet", "SimCLR", "untrained encoder", "autoencoder", "untrained ViT", "MAE"
    seeds = [{part: {name: [10. + s, 50., 100.] for name in names} for part in ("linear", "tune")} for s in (-5, 5)]
    text = compare.draw([1, 10, 0], seeds, 10., 100)
    picture = ElementTree.fromstring(text)
    curves = [node for node in picture.iter() if node.get("stroke-width") == "2" and "L" in node.get("d", "")]
    assert len(curves) == 14                                    # two panels of six, and chance
    points = np.array([[list(map(float, point.split())) for point in node.get("d")[1:].split("L")] for node in curves])
    width = np.ptp(points[0, :, 0])
    assert np.allclose(np.diff(points[:, :, 0], axis=1), width / 2, atol=.1)   # 1, 10, 100: even
    rise = points[:, 0, 1] - points[:, :, 1].T
    rise = rise[:, [i for i in range(14) if i % 7 != 6]]
    assert np.allclose(rise[2] / rise[1], 90 / 40, atol=.02)    # y falls from 10 over 50 to 100 %
    assert np.allclose(points[6::7, :, 1], points[0, 0, 1], atol=.1)           # chance: 10 %
    dashed = [bool(node.get("stroke-dasharray")) for node in curves]
    assert dashed == [False, True, False, True, False, True, True] * 2          # the untrained, and chance
    assert [node.get("class") for node in curves[:6]] == ["c0", "c0", "c1", "c1", "c2", "c2"]
    words = [node.text for node in picture.iter() if node.text and node.tag.endswith("text")]
    assert {"1", "10", "all", "SimCLR", "untrained ViT", "chance", "fine-tuned", "accuracy in %"} <= set(words)
    assert "100" in words and words.count("all") == 2


@pytest.mark.parametrize("flags, words", [
    (["--seeds", "0"], "--seeds must be 1 or more, not 0"),
    (["--steps", "0"], "--steps must be 1 or more, not 0"),
    (["--labels", "-1"], "--labels must be 1 or more, or 0 for all"),
    (["--labels", "5", "5"], "each once"),
    (["--data", "nothing"], "there is no data set 'nothing'"),
    (["--device", "abacus"], "there is no abacus here"),
])
def test_bad_flags(flags, words, tmp_path):
    status = 1 if "--data" in flags else 2
    conftest.refused(run(*flags, "--out", tmp_path), status, words, script="compare.py")


def test_quick_is_small_and_flags_win():
    args = compare.options(["--quick", "--seeds", "2", "--device", "cpu"])
    assert (args.data, args.seeds, args.labels, args.steps) == (["shapes"], 2, [1, 20, 0], 100)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_script_save(number, tiny, tmp_path):
    """The whole group gets it, as from a terminal; the script saves once, the program ends by the signal, and the same
    command continues from there."""
    process = conftest.begin("--data", tiny, "--seeds", 1, "--steps", 100_000, "--labels", 1, "--device", "cpu",
                             "--out", tmp_path, script="experiments/compare.py", folder=tmp_path, before=os.setsid)
    log = tmp_path / "tiny-simclr-0/log.jsonl"
    for _ in range(1200):
        if log.exists() or not process.is_alive():
            break
        time.sleep(.1)
    time.sleep(1)
    os.killpg(process.pid, number)
    process.join(60)
    errors = (tmp_path / "stderr").read_text()
    assert process.exitcode == -number and "Traceback" not in errors, errors
    assert "The same command continues from there" in errors
    state = torch.load(tmp_path / "tiny-simclr-0/checkpoint.pt", weights_only=True)
    assert 0 < state["step"] < 100_000


# -------------------------------------------------------------------------------------- repeat.py


@pytest.fixture(scope="module")
def repeated(tiny, tmp_path_factory):
    """Two seeds of mae.py: the folder, the flags of the script, and what it printed."""
    folder = tmp_path_factory.mktemp("repeat")
    flags = [*SMALL, "--steps", 2, "--data", tiny]
    done = run("mae.py", "--seeds", 0, 1, "--name", "abc", "--", *flags, script="repeat.py",
               cwd=folder, before=conftest.forking)
    assert done.returncode == 0, done.stderr
    return folder, flags, done.stdout


def test_repeat(repeated):
    """A run for each seed, their figures in results/, mean and standard deviation of each."""
    folder, flags, shown = repeated
    found = json.loads((folder / "results/abc.json").read_text())
    assert "figures" not in found and [run["seed"] for run in found["runs"]] == [0, 1]
    results = repeat.apart(found)
    runs = [json.loads((folder / f"runs/repeat-abc/{seed}/result.json").read_text()) for seed in (0, 1)]
    commands = [run.pop("command") for run in runs]
    assert [{k: v for k, v in result.items() if k != "command"} for result in results] == runs
    assert found["command"] == commands[0] == commands[1].replace(" --seed 1", "") != commands[1]
    assert repeat.together(runs[:1]) == runs[0] and repeat.apart(runs[0]) == runs[:1]
    assert [result["settings"]["seed"] for result in results] == [0, 1]
    errors = [result["figures"]["error"] for result in results]
    assert errors[0] != errors[1]
    row = next(line for line in shown.splitlines() if line.startswith("error "))
    assert row.split() == ["error", f"{statistics.mean(errors):.3f}", "+-",
                           f"{statistics.stdev(errors):.3f}"]
    assert "accuracy, MAE, linear probe, 0" in shown and "labels, 0" not in shown


def test_repeat_keeps_what_is_done(repeated):
    """More seeds are added; a run that was killed before or after its first checkpoint is continued."""
    folder, flags, _ = repeated
    out = folder / "runs/repeat-abc"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    plain = conftest.run(*flags, "--seed", 2, "--out", folder / "plain", cwd=folder)
    assert plain.returncode == 0
    (out / "2").mkdir()                                    # killed before its first checkpoint
    settings = json.loads((folder / "plain/settings.json").read_text())
    settings["args"]["out"] = str(out / "2")
    (out / "2/settings.json").write_text(json.dumps(settings))
    first = conftest.run(*flags, "--seed", 3, "--out", out / "3", cwd=folder)
    assert first.returncode == 0
    (out / "3/result.json").unlink()                       # killed after its last checkpoint
    done = run("mae.py", "--seeds", 0, 1, 2, 3, "--name", "abc", "--", *flags, script="repeat.py",
               cwd=folder, before=conftest.forking)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "seed 2 (3 of 4)" in done.stdout and "seed 1" not in done.stdout
    assert "Continuing from step 2" in done.stdout and (out / "3/result.json").exists()
    weights = [torch.load(path / "checkpoint.pt", weights_only=True)["model"]
               for path in (folder / "plain", out / "2")]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights)))


@pytest.mark.parametrize("flags, status, words", [
    (["nothing.py"], 2, "there is no script nothing.py"),
    (["mae.py", "--seeds", "1", "1"], 2, "--seeds: each once"),
    (["mae.py", "--seeds", "-1"], 2, "--seed must be in [0, 1e9], not -1"),
    (["mae.py", "--", "--out", "x"], 2, "--out is set for each run: leave it out"),
    (["mae.py", "--mask-ratio", "0.5"], 2, "unknown flag --mask-ratio"),
    (["experiments/adapt.py"], 1, "it repeats by itself"),
])
def test_bad_flags_of_repeat(flags, status, words, tmp_path):
    conftest.refused(run(*flags, script="repeat.py", cwd=tmp_path), status, words,
                     script="repeat.py")
    assert not [*tmp_path.iterdir()]


def test_repeat_refuses_another_run(repeated, tmp_path):
    folder, flags, _ = repeated
    done = run("mae.py", "--name", "abc", "--", *flags, "--mask-ratio", .5, script="repeat.py",
               cwd=folder)
    conftest.refused(done, 1, "holds a run with another --mask-ratio", script="repeat.py")
    done = run("mae.py", "--seeds", 0, "--", *flags, "--patch", 3, script="repeat.py", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr       # the script's own sentence
    assert "a patch of 3 pixels" in done.stderr and "mae.py ended with status 1" in done.stderr
    done = run("mae.py", "--", "--mask-rati", .5, script="repeat.py", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean --mask-ratio?" in done.stderr


def test_numbers():
    figures = dict(a=1, b=[2., dict(c=3)], text="x", none=None, yes=True)
    assert dict(repeat.numbers(figures)) == {"a": 1, "b, 0": 2., "b, 1, c": 3}


# --------------------------------------------------------------------------------- the benchmarks


def test_a_package_that_cannot_be_imported(tmp_path, monkeypatch, capsys):
    """One sentence about it, and only its own cases are left out; others may break inside."""
    (tmp_path / "halfway.py").write_text("raise RuntimeError('operator no::thing\\n\\nis missing')")
    (tmp_path / "lazy.py").write_text(
        "def __getattr__(name):\n    try:\n        import halfway\n    except RuntimeError as error:\n"
        "        raise ModuleNotFoundError('look at the log') from error\n")
    monkeypatch.syspath_prepend(tmp_path)
    needs = dict(a=["lazy.Model"], b=["json.JSONDecoder", "not_there.Model"], c=["json.JSONDecoder"])
    assert pairs.possible(["a", "b", "c", "d"], needs) == ["c", "d"]
    shown = capsys.readouterr().out.split("\n")
    assert shown == ["lazy.Model cannot be imported (is missing); left out: a.",
                     "not_there.Model cannot be imported (No module named 'not_there'); left out: b.", ""]


def test_pairs_are_timed_in_turns(monkeypatch):
    """The ratio of the medians, theirs / ours, of a clock that each side moves by its own time."""
    clock, calls = [0.], []

    def side(name, seconds):
        return lambda: (calls.append(name), clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(pairs.time, "perf_counter", lambda: clock[0])
    found = pairs.pair(side("ours", 2.), side("theirs", 3.), rounds=5)
    assert found["ours_ms"] == pytest.approx(2000) and found["theirs_ms"] == pytest.approx(3000)
    assert found["ratio"] == pytest.approx(1.5) and found["quartiles"] == pytest.approx([1.5, 1.5])
    assert calls[:4] in (["ours", "theirs", "theirs", "ours"], ["theirs", "ours", "ours", "theirs"])
    assert len(calls) == 2 * (3 + 5) and calls.count("ours") == 8


@pytest.mark.parametrize("name", "mae simclr bert gpt lora flamingo".split())
def test_our_side_of_each_benchmark(name):
    """Without the other packages, all that needs none of them runs."""
    bench = __import__(f"bench_{name}")
    assert set(bench.NEEDS) <= set(bench.CASES)
    if name == "gpt":
        bench.SMALL = dict(vocab=257, context=48, dim=16, depth=1, heads=2)
        _, _, ours, theirs = bench.sampling("float32", bench.SMALL, 2, n=20, cached=False)
        assert torch.equal(ours(), theirs())
    if name == "lora":
        bench.HOW.update(dim=16, depth=1, heads=2)
        _, loss, step = bench.sides(["ours"], "float32", False)["ours"]
        before = loss().item()
        step()
        assert loss().item() != before
    if name == "flamingo":
        bench.DIM, bench.HEADS, bench.LATENTS, bench.T, bench.M, bench.N = 16, 2, 3, 32, 2, 5
        model, (x, visual, is_image) = bench.ours(), bench.tensors()
        y = bench.forward("ours", model, x, visual, is_image)
        other = bench.forward("ours", model, x, visual.flip(1), is_image)
        seen = is_image.cumsum(1) > 0
        assert ((y - other).abs().sum(2) > 1e-6).equal(seen) and y.shape == (4, 32, 16)
