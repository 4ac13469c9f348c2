"""experiments/gpu.py with --quick: its phases, their files, and that its checks notice what is wrong."""
import importlib.util
import json
import multiprocessing
import sys
import types

import pytest
import torch
from conftest import ROOT, run

import autoencoder
import bert
import common
import flamingo
import gpt
import lora
import mae
import simclr

sys.path.insert(0, str(ROOT / "experiments"))
import gpu  # noqa: E402

# as common.report writes it
SHAPE = {"command", "summary", "figures", "machine", "threads", "seconds", "settings", "versions"}


def forks():
    """The processes of gpu.py are forks of it, which has PyTorch already."""
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda _: context("fork")


def quick(folder, *flags):
    return run("--quick", "--out", folder, *flags, script="experiments/gpu.py", before=forks)


def read(folder, phase):
    return json.loads((folder / f"gpu-{phase}.json").read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of phases a and b of two scripts, and what was printed."""
    folder = tmp_path_factory.mktemp("gpu")
    done = quick(folder, "--phases", "a", "b", "--only", "gpt", "simclr")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture
def own(tmp_path):
    own = types.SimpleNamespace(quick=True, runs=tmp_path, cifar="", text="", phases=["a"], out=tmp_path)
    x, y = torch.randint(256, (100, 16, 16, 3)).byte().numpy(), (torch.arange(100) % 2).numpy()
    gpu.common.np.savez(tmp_path / "shapes.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    return own


def test_phase_a(measured):
    folder, shown = measured
    result = read(folder, "a")
    assert set(result) == SHAPE and set(result["figures"]) == {"gpt", "simclr"}
    assert result["machine"] == common.machine(gpu.DEVICE) and result["versions"]["torch"] == torch.__version__
    for name, f in result["figures"].items():
        assert len(f["checks"]) == 5 and all(f["checks"].values()), name
        log = [json.loads(line)["loss"] for line in (folder / f"runs/a-{name}/killed/run/log.jsonl").open()]
        assert len(log) == 50 and f["loss"] == {"run": pytest.approx([sum(log[:5]) / 5, sum(log[-5:]) / 5])}
        assert 0 < f["errors"]["float32"] < 1e-4 < f["errors"]["bfloat16"] < .2, name
    assert 0 < result["figures"]["gpt"]["errors"]["cache"] < 1e-5
    assert max(map(len, shown.splitlines())) <= 80 and "\na gpt" in shown and "\nb simclr" in shown


def test_phase_b(measured):
    folder, _ = measured
    result = read(folder, "b")
    assert set(result) == SHAPE and set(result["figures"]) == {"gpt", "simclr"}
    for name, unit, each in ("gpt", "tokens", 32), ("simclr", "images", 1):
        f, own = result["figures"][name], json.loads((folder / f"runs/b-{name}/result.json").read_text())
        assert f["result"] == own and own["summary"] in f["summary"]
        assert f["seconds"] == own["seconds"] <= f["whole"] and f["peak_mb"] > 1
        images = 50 * own["settings"]["batch"]
        assert f["unit"] == unit and f["rate"] * max(.1, f["seconds"]) == pytest.approx(images * each)


def test_what_is_done_is_not_done_again(measured):
    folder, _ = measured
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    done = quick(folder, "--phases", "a", "b", "--only", "gpt", "simclr")
    assert done.returncode == 0 and "correctness: " not in done.stdout and "\na gpt" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} == before


def test_another_machine_is_refused(own):
    (own.out / "gpu-a.json").write_text(json.dumps(gpu.begun(own, "a") | dict(machine="an abacus")))
    with pytest.raises(common.UserError, match="another machine"):
        gpu.begun(own, "a")


def test_a_failure_costs_one(tmp_path):
    """It is reported, in the exit status, too; the others are measured, and it is not done."""
    done = quick(tmp_path, "--phases", "d", "--only", "simclr", "training", "--cifar", tmp_path / "none.npz")
    f = read(tmp_path, "d")["figures"]
    assert done.returncode == 1 and "failed: UserError: " in done.stdout
    assert "none.npz" in f["simclr"]["failed"] and not gpu.done(f["simclr"])
    (row,) = f["training"]["rows"]
    weights = 512 * 32 + 2 * (12 * 32 ** 2 + 13 * 32) + 2 * 32                 # blocks, and norms
    assert f["training"]["flops_per_token"] == 6 * weights + 12 * 2 * 32 * 64
    assert row["share"] == pytest.approx(100 * row["tokens_per_second"] * f["training"]["flops_per_token"]
                                         / f["training"]["matrix_rate"])


def test_phase_a_notices(own, monkeypatch):
    """Moments that a resumed run lost, and a cache of which one key is wrong."""
    load, append = common.Run.load, gpt.Cache.append

    def forgets(run):
        load(run)
        run.optimizer.state.clear()

    def wrong(cache, k, v):
        k, v = append(cache, k, v)
        return k.clone().index_fill_(2, torch.tensor([1], device=k.device), 0.), v
    monkeypatch.setattr(common.Run, "load", forgets)
    monkeypatch.setattr(gpt.Cache, "append", wrong)
    found = gpu.correct(own, "gpt", 60)
    right = [check for check, right in found["checks"].items() if right]
    assert right == ["the loss falls", "each training was killed", "float32 as on a CPU"]
    assert found["summary"].startswith("NOT: the same weights; NOT: logits with the cache; ")


def test_gradients_notice(own, monkeypatch):
    """A temperature that is wrong by a thousandth, and that only in float32."""
    model, loss = simclr.SimCLR(10, 8, 8), simclr.ntxent
    exact = gpu.gradients("simclr", model, "cpu", "float64")
    errors = lambda: [gpu.error(*pair) for pair in zip(gpu.gradients("simclr", model, "cpu", "float32"), exact)]
    assert max(errors()) < 1e-4
    monkeypatch.setattr(simclr, "ntxent", lambda z1, z2, t: loss(z1, z2, t * 1.001))
    assert min(errors()) > 1e-4


def test_a_run_of_so_many_seconds(own):
    args, _, result = gpu.cifar(own, "autoencoder", 1.)
    assert 60 < result["settings"]["steps"] < 20_000 == args.steps and result["seconds"] < 60     # of a busy machine, too


def test_what_is_missing_is_skipped(own):
    own.quick = False
    with pytest.raises(gpu.Skip, match="--cifar"):
        gpu.cifar(own, "simclr", 1.)
    if not importlib.util.find_spec("transformers"):
        with pytest.raises(gpu.Skip, match="transformers.GPT2LMHeadModel cannot be imported"):
            gpu.beside(own, "gpt eager", 1.)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    done = run(script="experiments/gpu.py")
    assert done.returncode == 2 and "--quick" in done.stderr and "Traceback" not in done.stderr


SMALL = {"simclr": lambda: simclr.SimCLR(10, 8, 8), "autoencoder": lambda: autoencoder.Autoencoder(16, 8, 8),
         "bert": lambda: bert.BERT(40, 12, 16, 2, 2), "mae": lambda: mae.MAE(16, 4, 16, 1, 2, 16, 1, 2),
         "gpt": lambda: gpt.GPT(257, 12, 16, 2, 2), "lora": lambda: lora.GPT(257, 12, 16, 2, 2),
         "flamingo": lambda: flamingo.Flamingo(flamingo.GPT(54, 41, 16, 2, 2), flamingo.ViT(16, 4, 16, 1, 2), 4, 1)}


@pytest.mark.parametrize("name", SMALL)
def test_an_example_of_every_script(name):
    """What phase a differentiates can be computed for each of them, and has a gradient."""
    torch.manual_seed(0)
    (value,), grads = gpu.gradients(name, SMALL[name](), "cpu", "float64")
    assert value.isfinite() and any(g.any() for g in grads)
