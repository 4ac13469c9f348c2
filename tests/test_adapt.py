"""experiments/adapt.py: all methods of lora.py, in one file of figures."""
import json
import sys

import conftest
import pytest
import torch
from conftest import ROOT, run

import lora

sys.path.insert(0, str(ROOT / "experiments"))
import adapt, common, repeat  # noqa: E402

METHODS = ["lora", "ia3", "bitfit", "first", "middle", "last", "full"]
SMALL = ("--dim 16 --heads 2 --depth 2 --context 40 --base-steps 3 --base-batch 2 --example 8 --epochs 2 --batch 2 "
         "--rank 2 --dtype float32 --device cpu").split()


@pytest.fixture(scope="module")
def done(texts, tmp_path_factory):
    """A finished run: its folder, its flags, its figures, and what it printed."""
    folder = tmp_path_factory.mktemp("adapt")
    flags = [*texts, *SMALL, "--out", folder / "a.json"]
    process = adapt_py(folder, *flags, "--k", 1, 3, "--repeats", 2)
    assert process.returncode == 0, process.stderr
    return folder, flags, figures(folder), process.stdout


def adapt_py(folder, *flags):
    return run(*flags, script="experiments/adapt.py", cwd=folder)


def refused(process, status, *words):
    conftest.refused(process, status, *words, script="adapt.py")


def figures(folder, name="a"):
    return json.loads((folder / f"{name}.json").read_text())["figures"]


def test_all_methods_at_all_k(done):
    folder, _, found, text = done
    rows = found["rows"]
    assert list(rows) == [*METHODS, "in-context"] and max(map(len, text.splitlines())) <= 80
    for method, row in rows.items():
        assert list(row) == ["1", "3"], method
        assert all(len(values) == 2 for f in row.values() for values in f.values())
        assert row["3"]["new"][0] != row["3"]["new"][1]                     # other examples
        assert f"\n3{method.rjust(12)} " in text
    assert rows["in-context"]["3"]["bytes"] == [27, 27] and rows["in-context"]["3"]["trained"] == [0, 0]
    assert rows["in-context"]["1"]["old"] == [found["start"][1]] * 2
    assert found["energy"]["lora"]["fc1"][1] == pytest.approx(1, abs=1e-5) and found["energy"]["full"]["fc1"][1] < .999
    assert found["counts"] == [1, 2, 3, 4, 8, 16] and found["energy"]["full"]["qkv"][-1] == pytest.approx(1, abs=1e-5)
    state = json.loads((folder / "a.json").read_text())
    assert state["command"].startswith("python experiments/adapt.py --k 1 3 ") and "--rank 2" in state["command"]
    assert state["summary"].startswith("lora ") and state["settings"]["repeats"] == 2


@pytest.mark.parametrize("method, k, repeat", [("lora", 3, 0), ("lora", 3, 1), ("ia3", 1, 1), ("full", 3, 1)])
def test_figures_are_those_of_lora_py(method, k, repeat, done, texts, tmp_path):
    """One run of lora.py for the same base, with the seed of the repeat."""
    folder, _, found, _ = done
    process = run(*texts, *SMALL, "--method", method, "--k", k, "--seed", 1000 * repeat, "--base", folder / "runs/a-0/base",
                  "--out", tmp_path / "lora", script="lora.py")
    assert process.returncode == 0, process.stderr
    rows = json.loads((tmp_path / "lora/result.json").read_text())["figures"]["rows"]
    assert [rows["the base"][name] for name in ("new", "old")] == found["start"]
    ours = {name: values[repeat] for name, values in found["rows"][method][str(k)].items()}
    for name in "new", "old", "trained":
        assert rows[method][name] == ours[name], name
    assert abs(rows[method]["bytes"] - ours["bytes"]) <= 64                 # the file knows its base, ours does not
    label = f"{k} examples in the prompt (in-context)"
    assert rows[label]["new"] == found["rows"]["in-context"][str(k)]["new"][repeat]


def test_the_same_command_does_nothing_twice(done):
    folder, flags, found, text = done
    before = [*folder.rglob("*")]
    again = adapt_py(folder, *flags, "--k", 1, 3, "--repeats", 2)
    assert again.returncode == 0 and figures(folder) == found, again.stderr
    assert "repeat" not in again.stdout and [*folder.rglob("*")] == before
    assert text.endswith(again.stdout[again.stdout.index("\nCumulative"):])


def test_what_is_missing_is_added(done, tmp_path):
    """As after an interruption: some methods, k and repeats are there."""
    folder, flags, found, _ = done
    state = json.loads((folder / "a.json").read_text())
    rows = state["figures"]["rows"]
    del rows["last"], rows["in-context"], rows["full"]["3"]
    for values in rows["lora"]["3"].values():
        del values[1]
    (folder / "b.json").write_text(json.dumps(state))
    again = adapt_py(folder, *flags, "--out", folder / "b.json", "--k", 1, 3, "--repeats", 2)
    assert again.returncode == 0 and again.stdout.count(", repeat ") == 4 + 4 + 2 + 1, again.stderr
    times = lambda f: [f["rows"][method]["1"].pop("seconds") and f["rows"][method]["3"].pop("seconds") for method in f["rows"]]
    ours, theirs = figures(folder, "b"), json.loads(json.dumps(found))
    times(ours), times(theirs)
    assert ours["rows"] == theirs["rows"] and ours["energy"] == theirs["energy"]


def test_another_seed_is_added(done):
    """Both are in one file, and each continues its own."""
    folder, flags, found, _ = done
    (folder / "c.json").write_text((folder / "a.json").read_text())
    for repeats in 1, 2:
        more = adapt_py(folder, *flags, "--out", folder / "c.json", "--methods", "ia3", "--k", 1, "--repeats", repeats, "--seed", 1)
        assert more.returncode == 0 and more.stdout.count(", repeat ") == 1, more.stderr
    both = repeat.apart(json.loads((folder / "c.json").read_text()))
    assert both[0]["figures"] == found and [r["settings"]["seed"] for r in both] == [0, 1]
    assert len(both[1]["figures"]["rows"]["ia3"]["1"]["new"]) == 2 and both[1]["figures"]["start"] != found["start"]
    refused(adapt_py(folder, *flags, "--out", folder / "c.json", "--k", 1, "--seed", 2, "--rank", 1), 1, "c.json has figures of another --rank")


def test_figures_of_other_settings_are_never_overwritten(done, tmp_path):
    folder, flags, _, _ = done
    before = (folder / "a.json").read_bytes()
    for other, word in (["--rank", 1], "--rank"), (["--search"], "--search"), (["--epochs", 3], "--epochs"):
        refused(adapt_py(folder, *flags, "--k", 1, 3, *other), 1, "a.json has figures of another", word, "--out")
    broken = tmp_path / "x.json"
    broken.write_text("{")
    refused(adapt_py(folder, *flags, "--k", 1, 3, "--out", broken), 1, "x.json is no file of adapt.py")
    assert (folder / "a.json").read_bytes() == before and broken.read_text() == "{"


def test_search(done, texts, tmp_path):
    folder, flags, _, _ = done
    process = adapt_py(folder, *flags, "--search", "--methods", "ia3", "in-context", "--k", 2, "--repeats", 2,
                       "--out", tmp_path / "s.json", "--base", folder / "runs/a-0/base")
    assert process.returncode == 0, process.stderr
    found = figures(tmp_path, "s")
    assert list(found["rows"]) == ["ia3"] and list(found["rows"]["ia3"]) == ["0.003", "0.01", "0.03"]
    means = {lr: sum(ks["2"]["new"]) / 2 for lr, ks in found["rows"]["ia3"].items()}
    best = min(means, key=means.get)
    assert json.loads((tmp_path / "s.json").read_text())["summary"] == f"ia3 {best}" and f"best: {best} " in process.stdout
    usual = adapt_py(folder, *flags, "--methods", "ia3", "--k", 2, "--repeats", 2, "--base", folder / "runs/a-0/base",
                     "--out", tmp_path / "u.json")
    assert usual.returncode == 0, usual.stderr
    new = found["rows"]["ia3"]["0.01"]["2"]["new"]
    assert figures(tmp_path, "u")["rows"]["ia3"]["2"]["new"] != new                     # the search is on other lines:
    settings = json.loads((tmp_path / "s.json").read_text())["settings"]
    settings = {name: value for name, value in settings.items() if name in lora.Args.__dataclass_fields__}
    args = lora.Args(**settings | dict(method="ia3", k=2, lr=.01, out=str(tmp_path)))
    train, _ = common.load_examples(args, lora.BYTES)
    train, held_out = train[:len(train) * 9 // 10], train[len(train) * 9 // 10:]
    base, _ = lora.load_base(args, str(folder / "runs/a-0/base"))
    lora.recipe(args)
    model, _, _ = adapt.shared.fit(args, base, common.choose(train, 2, args.seed))
    assert lora.evaluate(args, model, *common.evenly(held_out, 400).unbind(1)) == new[0]
    assert all(lora.LR[method] in rates for method, rates in adapt.RATES.items()) and set(adapt.RATES) == set(METHODS)


def test_quick(tmp_path):
    """As it stands in the docstring; the figures are beside the runs."""
    process = adapt_py(tmp_path, "--quick", "--device", "cpu", "--methods", "lora", "in-context")
    assert process.returncode == 0, process.stderr
    found = figures(tmp_path / "runs", "quick-adapt")
    assert list(found["rows"]["lora"]) == ["1", "4"] and list(found["rows"]["in-context"]) == ["1"]
    assert not (tmp_path / "results").exists()


def test_the_energies_are_of_the_largest_k(done, tmp_path):
    """A later command with a smaller k does not change them, nor call them its own."""
    folder, flags, found, text = done
    assert found["energy_k"] == 3 and "of what was added to a matrix, in %, at k = 3:" in " ".join(text.split())
    (tmp_path / "a.json").write_text((folder / "a.json").read_text())
    process = adapt_py(folder, *flags, "--out", tmp_path / "a.json", "--k", 2, "--repeats", 1)
    assert process.returncode == 0 and "in %, at k = 3:" in " ".join(process.stdout.split()), process.stderr
    assert figures(tmp_path)["energy"] == found["energy"] and "2" in figures(tmp_path)["rows"]["lora"]


def test_cumulative_energy():
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 5))[0] for n in (9, 5))
    delta = u @ torch.diag(torch.tensor([4., 2., 2., 1., 0.])) @ v.T
    torch.testing.assert_close(adapt.cumulative_energy(delta), torch.tensor([16., 20., 24., 25., 25.]) / 25, rtol=1e-4, atol=0)
    assert adapt.cumulative_energy(torch.zeros(3, 2)).tolist() == [0., 0.]


def test_energies_are_of_the_differences_of_the_weights():
    torch.manual_seed(0)
    base, args = lora.GPT(9, 8, 16, 2, 2), lora.Args(targets=("qkv", "fc1"), rank=2)
    model = lora.adapt(lora.GPT(9, 8, 16, 2, 2), "lora", args.targets, rank=2)
    for path, linear in lora.target_layers(base, args.targets).items():
        torch.nn.init.normal_(model.get_submodule(path).A)
        model.get_submodule(path).linear.load_state_dict(linear.state_dict())
    found = adapt.energies(args, model, base, [1, 2, 4])
    assert set(found) == {"qkv", "fc1"} and found["qkv"][1] == pytest.approx(1, abs=1e-5) and found["qkv"][0] < .999
    for path in lora.target_layers(base, args.targets):
        model.get_submodule(path).merge()
        model.set_submodule(path, model.get_submodule(path).linear)
    for name, values in adapt.energies(args, model, base, [1, 2, 4]).items():
        assert values == pytest.approx(found[name], abs=1e-4)


def test_what_is_to_be_done():
    own = adapt.options(["--k", "1", "3", "4", "--repeats", "2", "--example", "9", "--methods", "in-context"])
    held = lambda context: [cell[2:] for cell in adapt.cells(own, own.args, context)]
    assert held(40) == [(1, 0), (1, 1), (3, 0), (3, 1)] and held(39) == [(1, 0), (1, 1)]   # (3 + 1) * (9 + 1) fills 40
    own = adapt.options(["--k", "1", "3", "4", "--repeats", "2", "--example", "9"])
    assert len([*adapt.cells(own, own.args, 40)]) == 7 * 3 * 2 + 4 and own.args.k == 4
    own = adapt.options(["--search", "--seed", "7"])
    assert own.out == "results/lora-search.json" and own.args.out == "runs/lora-search-7"
    assert adapt.options(["--quick", "--k", "2", "--dim", "32"]).args.dim == 32


@pytest.mark.parametrize("flags, words", [
    (["--k", "0"], ["--k and --repeats must be 1 or more"]),
    (["--k", "2", "2"], ["each --k another number"]),
    (["--repeats", "0"], ["must be 1 or more"]),
    (["--methods", "adapters"], ["invalid choice: 'adapters'"]),
    (["--method", "lora"], ["--method cannot be used here"]),
    (["--resume"], ["--resume cannot be used here"]),
    (["--search", "--lr", "1"], ["--lr cannot be used here"]),
    (["--reapeats", "2"], ["unknown flag --reapeats"])])
def test_bad_flags(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        adapt.options(flags)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("adapt.py: ") and len(text.strip().splitlines()) == 1
    for word in words:
        assert word in text


def test_mistakes_are_one_sentence(done, tmp_path):
    folder, flags, _, _ = done
    flags = [*flags, "--out", tmp_path / "x.json"]
    refused(adapt_py(folder, *flags, "--k", 999), 1, "--k 999 is more than the 107 examples")
    refused(adapt_py(folder, *flags, "--rank", 0), 2, "--rank must be 1 or more")
    refused(adapt_py(folder, *flags, "--k", 2, "--base", "nowhere"), 1, "--base nowhere holds no weights. Fetch config.json")
    diverged = adapt_py(folder, *flags, "--k", 3, "--methods", "ia3", "full", "--epochs", 9, "--lr", 1e30,
                        "--base", folder / "runs/a-0/base")
    assert diverged.returncode == 1 and "k = 3: " in diverged.stderr and "Traceback" not in diverged.stderr, diverged.stderr
