"""benchmarks/compare.py: the lecture's comparison."""
import json
import os
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import numpy as np
import conftest
import pytest
import torch
from conftest import ROOT

import common
import simclr

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare  # noqa: E402


def run(*flags):
    return conftest.run(*flags, script="benchmarks/compare.py")


def test_the_whole_comparison(tiny, tmp_path):
    """Tables, figures and curves; a second time nothing is done again, and other settings are refused."""
    flags = ["--data", tiny, "--seeds", 2, "--steps", 2, "--tune-steps", 2, "--labels", 1, 5, 0, "--device", "cpu",
             "--out", tmp_path]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    for row in "raw pixels", "untrained ResNet", "SimCLR", "autoencoder", "untrained ViT", "MAE", "supervised encoder":
        assert f"\n{row} " in done.stdout, row
    seeds = [json.loads((tmp_path / f"compare-tiny-{seed}.json").read_text())["figures"] for seed in range(2)]

    images = common.load_images(str(tiny))                         # the figures, by hand
    y, test_y = images.train_labels["class"], images.test_labels["class"]
    for seed, found in enumerate(seeds):
        state = torch.load(tmp_path / f"tiny-simclr-{seed}/checkpoint.pt", weights_only=True)
        model = simclr.SimCLR(10, 16, 128)
        model.load_state_dict(state["model"])
        model.to(memory_format=torch.channels_last).eval()
        train, test = (common.encode(model.encoder, images, x) for x in (images.train, images.test))
        due = [common.probe(train, y, test, test_y, k, seed) for k in (1, 5, 0)]
        assert found["linear"]["SimCLR"] == pytest.approx(due, abs=5.1)           # one of 20 images
        assert found["knows"]["MAE"]["class"] == found["linear"]["MAE"][2]
        assert set(found["tune"]) == set(found["linear"]) - {"raw pixels"}
        assert all(len(row) == 3 for part in ("linear", "tune") for row in found[part].values())
    assert seeds[0] != seeds[1]

    path = tmp_path / "compare-tiny-1.json"                        # stopped after two methods: the third is done again
    whole = json.loads(path.read_text())
    part = json.loads(path.read_text()) | dict(whole=False, seconds=1000.)
    for rows in part["figures"].values():
        rows.pop("MAE")
    part["figures"]["linear"]["SimCLR"] = whole["figures"]["linear"]["SimCLR"] = [1., 2., 3.]       # what is there stays
    path.write_text(json.dumps(part))
    assert run(*flags).returncode == 0
    again = json.loads(path.read_text())
    assert again["whole"] and again["figures"] == whole["figures"] and again["seconds"] > 1000

    done = run(*flags)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in (".pt", ".json")}
    again = run(*flags)
    tail = lambda text: text[text.index("accuracy in %, 20 new images"):]
    assert again.returncode == 0 and "step 1" not in again.stdout and tail(again.stdout) == tail(done.stdout)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = run(*flags, "--tune-steps", 3)
    assert other.returncode == 1 and "is of other settings: choose another --out" in other.stderr
    assert "Traceback" not in other.stderr
    path.write_text("{")
    broken = run(*flags)
    assert broken.returncode == 1 and "compare-tiny-1.json is broken: remove it" in broken.stderr and "Traceback" not in broken.stderr


def test_tables_are_means_and_fit_80_columns():
    seeds = [dict(linear={"untrained encoder": [10 + s] * 5, "SimCLR": [100.] * 5}, tune={"SimCLR": [s] * 5},
                  knows={"raw pixels": {"shape": 1. + s}, "SimCLR": {"shape": 2., "colour": 100. - s}}) for s in (0, 2, 4)]
    args = compare.options(["--device", "cpu"])
    images = type("Images", (), dict(names={"shape": ["a"] * 10, "colour": ["b"] * 8}))
    linear, tuned, knows = compare.tables(args, images, seeds)
    assert linear[0] == ["shape, linear", "1 a class", "5 a class", "20 a class", "100 a class", "all labels"]
    assert linear[2] == ["untrained encoder", *["12.0 ±2.0"] * 5] and linear[1] == ["chance", *["10.0"] * 5] and tuned[2][1] == "2.0 ±2.0"
    assert knows == [["all labels", "shape", "colour"], ["chance", "10.0", "12.5"], ["raw pixels", "3.0 ±2.0", ""],
                     ["SimCLR", "2.0 ±0.0", "98.0 ±2.0"]]
    assert max(len(line) for rows in (linear, tuned, knows) for line in common.table(rows).splitlines()) <= 80


def test_the_curves_are_where_the_figures_are():
    rows = {name: [10., 50., 100.] for name in ("untrained ResNet", "SimCLR", "untrained encoder", "autoencoder", "untrained ViT", "MAE")}
    text = compare.draw([1, 10, 0], [dict(linear=rows, tune=rows)], 10., 100)
    picture = ElementTree.fromstring(text)
    curves = [node.get("d") for node in picture.iter() if node.get("stroke-width") == "2" and "L" in node.get("d", "")]
    assert len(curves) == 12                                    # two panels of six
    points = np.array([[list(map(float, point.split())) for point in curve[1:].split("L")] for curve in curves])
    assert np.allclose(np.diff(points[:, :, 0], axis=1), np.ptp(points[0, :, 0]) / 2, atol=.1)       # 1, 10, 100: even steps
    rise = points[:, 0, 1] - points[:, :, 1].T
    assert np.allclose(rise[2] / rise[1], 90 / 40, atol=.02)    # y falls from 10 over 50 to 100 %
    words = [node.text for node in picture.iter() if node.text and node.tag.endswith("text")]
    assert {"1", "10", "all", "SimCLR", "untrained ViT", "fine-tuned, accuracy in %"} <= set(words)


@pytest.mark.parametrize("flags, words", [
    (["--seeds", "0"], "--seeds must be 1 or more, not 0"),
    (["--steps", "0"], "--steps must be 1 or more, not 0"),
    (["--labels", "-1"], "--labels must be 1 or more, or 0 for all"),
    (["--labels", "5", "5"], "each once"),
    (["--data", "nothing"], "there is no data set 'nothing'"),
])
def test_bad_flags(flags, words, tmp_path):
    done = run(*flags, "--out", tmp_path)
    assert done.returncode in (1, 2) and words in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr


def test_quick_is_small_and_flags_win():
    args = compare.options(["--quick", "--seeds", "2", "--device", "cpu"])
    assert (args.data, args.seeds, args.labels, args.steps) == (["shapes"], 2, [1, 20, 0], 100)


def test_ctrl_c_lets_the_script_save(tiny, tmp_path):
    """A terminal interrupts both; the script writes what it has, and the same command goes on from there. (A shell's job
    in the background would ignore the signal, and the tests may be one.)"""
    done = subprocess.Popen([sys.executable, "benchmarks/compare.py", "--data", tiny, "--seeds", "1", "--steps", "100000", "--device", "cpu",
                             "--labels", "1", "--out", tmp_path], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    log = tmp_path / "tiny-simclr-0/log.jsonl"
    for _ in range(1200):
        if log.exists() and done.poll() is None:
            break
        time.sleep(.1)
    time.sleep(1)
    os.killpg(done.pid, signal.SIGINT)
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 1 and "compare.py: stopped; the same command goes on from there" in errors and "Traceback" not in errors
    assert torch.load(tmp_path / "tiny-simclr-0/checkpoint.pt", weights_only=True)["step"] > 0
