"""What a run does to folders, files and signals, from the command line and from Python: nothing is lost, nothing is mixed up,
and a resumed run ends bit for bit as one that was never stopped."""
import copy
import dataclasses
import functools
import importlib
import json
import math
import os
import pty
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, at_step, begin, command, killed_at, refused, run
from torch import nn

import common
from common import UserError

SCRIPTS = [f"{name}.py" for name in "simclr autoencoder mae bert gpt lora flamingo".split() if (ROOT / f"{name}.py").exists()]
FLAGS = {   # settings with which a script takes a second
    "simclr.py": "--data {images} --batch 8 --depth 10 --width 8 --dim 8 --labels 1",
    "autoencoder.py": "--data {images} --batch 8 --width 4 --latent 3 --bottleneck variational --corrupt .2 --labels 1",
    "mae.py": "--data {images} --batch 8 --dim 16 --heads 2 --depth 1 --decoder-dim 8 --decoder-heads 2 --decoder-depth 1 "
              "--tune linear --labels 1",
    "bert.py": "--data {text} --batch 4 --dim 16 --heads 2 --depth 1 --context 12 --dropout .1 --passage 8 --classes 2 --labels 1 "
               "--tune-steps 2",
    "gpt.py": "--data {text} --batch 4 --dim 16 --heads 2 --depth 1 --context 16 --dropout .1 --length 8",
    "lora.py": "--data {code} --old {text} --dim 16 --heads 2 --depth 2 --context 40 --example 8 --k 3 --epochs 4 --batch 2 "
               "--length 5 --base-steps 5 --base-batch 2 --rank 2 --dropout .1",
    "flamingo.py": "--batch 4 --dim 16 --heads 2 --depth 2 --lm-steps 3 --lm-batch 4 --vit-steps 3 --vit-batch 4 --vit-dim 8 "
                   "--vit-heads 2 --vit-depth 1 --images 500 --tests 12 --latents 2 --shots 0 1",
}


@pytest.fixture(scope="session")
def flags(tiny, tmp_path_factory):
    """flags(script): the above, with small files of images, text and code in them."""
    folder, words = tmp_path_factory.mktemp("text"), random.Random(0)
    names = "the a cat dog sat on under with red blue old new house tree river and saw it was quick slow".split()
    (folder / "text.txt").write_text("\n".join(" ".join(words.choices(names, k=9)) + "." for _ in range(300)))
    (folder / "code.txt").write_text("\n".join(f"def {words.choice(names)}_{i}(x): return x + {i}" for i in range(160)))
    return lambda script: FLAGS[script].format(images=tiny, text=folder / "text.txt", code=folder / "code.txt").split()


def module_of(script):
    return importlib.import_module(script.removesuffix(".py"))


def settings_of(script, flags, **more):
    """The Args of a script as a notebook makes them: Args(name=value, ...)."""
    module = module_of(script)
    given = vars(common.parser_of(module.Args).parse_args(flags))
    return module.Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()} | more)


def weights(out):
    return torch.load(Path(out, "checkpoint.pt"), weights_only=True)["model"]


def same(a, b):
    """Whether two dicts of tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(folder):
    """{file: (its bytes, the time it was written)} of all files below a folder."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(folder).rglob("*") if path.is_file()}


def log(out):
    """log.jsonl without its times."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


# ------------------------------------------------------------- a script of a few lines, to be fast


@dataclass
class Args(common.Args):
    steps: int = 8               # training steps, 0 or more
    batch: int = 4               # rows per step
    lr: float = .1               # peak learning rate
    width: int = 3               # channels
    first_steps: int = 0         # steps of a training before, 0 or more; 0: there is none
    first_lr: float = .1         # its learning rate
    cpu = dict(lr=.2)


HOOKS = []                       # called with (run, step) in each step


@common.setup
def main(args):
    def train(args, model):
        optimizer = common.adamw(model.parameters(), args.lr, args.weight_decay)
        run = common.Run(args, model, optimizer, uniform=1.25, about=dict(width=args.width))
        for step in run:
            loss = model(run.batch(data)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.log(loss)
            for hook in HOOKS:
                hook(run, step)
        return run

    build = lambda: nn.Sequential(nn.Linear(3, args.width), nn.Dropout(.5), nn.Linear(args.width, 2))
    data = torch.arange(60.).view(20, 3) / 60
    if args.first_steps:
        how, done = common.stage(args, "first", ("width",))
        if not done:
            train(how, build())
        first = common.read_checkpoint(how.out, "test_run.py")["model"]
        torch.manual_seed(args.seed)
    model = build()
    if args.first_steps:
        model.load_state_dict(first)
    run = train(args, model)
    common.report(run, "all went well", dict(random=torch.rand(3).tolist()))
    return model.eval()


def train(**given):
    return main(Args(**dict(device="cpu", dtype="float32") | given))


class Stop(Exception):
    """Ends the process, as far as the run can tell."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    HOOKS.clear()
    yield tmp_path
    HOOKS.clear()


def stop_at(step, error=Stop):
    def hook(run, at):
        if at == step:
            raise error
    return hook


# -------------------------------------------------------------------------------- from Python


@pytest.mark.parametrize("script", SCRIPTS)
def test_main_from_python(script, flags, here, capsys):
    """As in a notebook: device and sizes are resolved, the run is seeded, writes into its own folder and nowhere else, and
    returns the trained model; and the command line continues it."""
    module, stem = module_of(script), script.removesuffix(".py")
    project = {path.name for path in ROOT.iterdir()}
    torch.manual_seed(99)
    model = module.main(settings_of(script, flags(script), steps=3))
    assert isinstance(model, nn.Module) and not model.training
    assert os.listdir() == ["runs"] and os.listdir("runs") == [stem] and {path.name for path in ROOT.iterdir()} == project
    state = common.read_checkpoint(f"runs/{stem}", script)
    assert state["step"] == 3 and same(state["model"], {k: v.cpu() for k, v in model.state_dict().items()})
    assert {"log.jsonl", "settings.json", "result.json"} < set(os.listdir(f"runs/{stem}"))
    device = state["args"]["device"]
    assert device in ("cpu", "cuda", "mps")
    given = vars(common.parser_of(module.Args).parse_args(flags(script)))
    for name, value in module.Args.cpu.items():
        if name not in {*given, "steps"} and device == "cpu":
            assert state["args"][name] == value, name
    torch.rand(5)                                               # the random numbers before a run make no difference
    again = module.main(settings_of(script, flags(script), steps=3))
    assert sorted(os.listdir("runs")) == [stem, f"{stem}-2"] and same(model.state_dict(), again.state_dict())
    done = run("--resume", "--out", f"runs/{stem}", "--steps", 5, script=script, cwd=here)
    assert done.returncode == 0 and f"Continuing from step 3 of runs/{stem}/checkpoint.pt." in " ".join(done.stdout.split()), done.stderr
    assert common.read_checkpoint(f"runs/{stem}", script)["step"] == 5


@pytest.mark.parametrize("given, words", [
    (dict(mask_ratio=1.5), "--mask-ratio must be in .0, 1., not 1.5"), (dict(patch=3), "a patch of 3 pixels does not divide"),
    (dict(dim=18), "18 channels cannot hold"), (dict(batch=99), "--batch 99 is more than the 64"), (dict(data="no such"), "no data set"),
    (dict(resume=True), "there is no run of mae.py to resume"), (dict(device="cuda:99"), "there is no cuda:99 here"),
    (dict(tune="some"), "--tune must be one of linear, last, all"), (dict(out="file"), "cannot write to file")])
def test_a_mistake_in_python_raises_and_leaves_nothing(given, words, flags, here, capsys):
    Path("file").write_text("")
    module = module_of("mae.py")
    with pytest.raises(ValueError, match=words):
        module.main(settings_of("mae.py", flags("mae.py"), **dict(steps=2) | given))
    assert os.listdir() == ["file"] or os.listdir("runs") == []


def in_a_notebook(code, folder, how="-c"):
    """Runs code whose __main__ has no __file__, as in a notebook."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    line, text = ([sys.executable, "-"], code) if how == "-" else ([sys.executable, "-c", code], "")
    return subprocess.run(line, input=text, capture_output=True, text=True, timeout=100, cwd=folder)


def test_a_notebook(flags, here):
    """Its checkpoint is one of mae.py; another cell's run is another run."""
    done = in_a_notebook(f"""
import mae, common
parsed = vars(common.parser_of(mae.Args).parse_args({flags("mae.py")!r}))
given = dict(parsed, labels=[1])
for seed in 0, 1:
    model = mae.main(mae.Args(steps=3, seed=seed, **given))
print("returned", type(model).__name__)
try:
    mae.main(mae.Args(mask_ratio=2))
except ValueError as error:
    print("raised", error)
""", here)
    assert done.returncode == 0 and "returned MAE" in done.stdout and "raised --mask-ratio must be" in done.stdout, done.stderr
    assert sorted(os.listdir("runs")) == ["mae", "mae-2"]
    done = run("--resume", "--steps", 6, cwd=here)
    assert done.returncode == 0 and "Continuing from step 3 of runs/mae-2/checkpoint.pt." in done.stdout, done.stderr
    assert common.read_checkpoint("runs/mae-2", "mae.py")["args"]["seed"] == 1


@pytest.mark.parametrize("how", ["-", "-c"])
def test_a_script_that_was_typed_into_a_notebook(how, here):
    done = in_a_notebook("""
import common, torch
from dataclasses import dataclass
@dataclass
class Args(common.Args):
    width: int = 3    # channels
@common.setup
def main(args):
    model = torch.nn.Linear(args.width, 1)
    optimizer = common.adamw(model.parameters(), args.lr, 0.)
    run = common.Run(args, model, optimizer)
    for step in run:
        loss = model(run.batch(torch.ones(9, args.width))).square().mean()
        loss.backward(), optimizer.step(), optimizer.zero_grad(), run.log(loss)
    return model
main(Args(steps=3, batch=2, width=5, device="cpu"))
main(Args(steps=6, resume=True))
print(common.read_checkpoint("runs/notebook", "notebook")["step"])
""", here, how)
    assert done.returncode == 0 and done.stdout.endswith("\n6\n"), done.stderr


def test_ctrl_c_in_a_notebook_saves_and_gives_the_cell_back(here, capsys):
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    whole = train(out="whole")
    HOOKS.append(lambda run, step: os.kill(os.getpid(), signal.SIGINT) if step == 4 else None)
    with pytest.raises(KeyboardInterrupt):
        train(out="cut")
    assert "continues it" in capsys.readouterr().err and common.read_checkpoint("cut")["step"] == 5
    assert {number: signal.getsignal(number) for number in usual} == usual
    HOOKS.clear()
    assert same(whole.state_dict(), train(out="cut", resume=True).state_dict())


def test_an_error_in_the_loop_leaves_the_handlers_as_they_were(here):
    usual = signal.getsignal(signal.SIGINT)
    HOOKS.append(stop_at(3))
    with pytest.raises(Stop):
        train()
    assert signal.getsignal(signal.SIGINT) is usual


def test_a_run_in_a_thread(here):
    """Where no signal can be handled: a web server, a notebook's widget."""
    found = []
    thread = threading.Thread(target=lambda: found.append(train()))
    thread.start(), thread.join()
    assert same(found[0].state_dict(), train().state_dict())


# -------------------------------------------------------------------------------------- folders


def test_each_run_has_a_folder_of_its_own(here):
    for seed in range(3):
        train(seed=seed)
    assert sorted(os.listdir("runs")) == ["test_run", "test_run-2", "test_run-3"]
    for seed, name in enumerate(["test_run", "test_run-2", "test_run-3"]):
        assert common.read_checkpoint(f"runs/{name}")["args"]["seed"] == seed
        settings = json.loads(Path("runs", name, "settings.json").read_text())
        assert settings["script"] == "test_run.py" and settings["args"]["seed"] == seed


def test_numbers_go_on_after_the_highest(here):
    for name in "runs/test_run-7", "runs/test_run-12":
        train(out=name)
    for name in "test_run-x", "test_run-20x", "other-30", "test_run-30", "test_run-8":
        Path("runs", name).mkdir()                                       # none of these holds a run of this script
    Path("runs/test_run-13").write_text("a file")
    train()
    assert Path("runs/test_run-14/checkpoint.pt").exists()               # 13 was taken


def test_resume_takes_the_newest_by_number(here):
    for seed in range(11):
        train(seed=seed)
    for path in "runs/test_run/checkpoint.pt", "runs/test_run":          # touched last; and "-9" comes after "-11" in a listing
        os.utime(path, (2e9, 2e9))
    before = files("runs")
    train(resume=True, steps=9)
    changed = {Path(name).parent.name for name, content in files("runs").items() if before[name] != content}
    assert changed == {"test_run-11"} and common.read_checkpoint("runs/test_run-11")["args"]["seed"] == 10


@pytest.mark.parametrize("given", [dict(), dict(steps=20), dict(seed=1), dict(batch=99)])
def test_the_folder_of_a_run_is_refused_and_untouched(given, here):
    train(out="mine")
    before = files(here)
    with pytest.raises(UserError, match="mine holds a run: --resume --out mine continues it; or choose another --out"):
        train(out="mine", **given)
    with pytest.raises(UserError, match="holds a run"):
        train(out="mine/", **given)
    assert files(here) == before


@pytest.mark.parametrize("left", ["checkpoint.pt", "result.json", "settings.json", "lm/checkpoint.pt"])
def test_what_makes_a_folder_one_of_a_run(left, here):
    """Whatever a run leaves, even one that was killed early, or an older version."""
    path = Path("mine", left)
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    before = files(here)
    with pytest.raises(UserError, match="mine holds a run"):
        train(out="mine")
    assert files(here) == before


def test_a_folder_with_other_things_in_it_can_be_used(here):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep this")
    with pytest.raises(UserError):
        train(out="mine", batch=99)
    assert os.listdir("mine") == ["notes.txt"]
    train(out="mine")
    assert {"notes.txt", "checkpoint.pt", "settings.json"} < set(os.listdir("mine"))


def test_a_refused_command_leaves_older_runs_and_no_folder(flags, here):
    assert run(*flags("mae.py"), "--steps", 3, cwd=here).returncode == 0
    before = files(here)
    for wrong in "--batch 65", "--batch 65 --out new", "--patch 3 --out new", "--labels 40", "--steps -1", "--data nowhere":
        done = run(*flags("mae.py"), *wrong.split(), cwd=here)
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert files(here) == before and os.listdir("runs") == ["mae"] and os.listdir() == ["runs"]
    refused(run("--resume", "--batch", 65, "--steps", 9, cwd=here), 1, "--batch 65 is more than the 64 training examples")
    assert {name: content[0] for name, content in files(here).items()} == {name: content[0] for name, content in before.items()}


def test_an_error_before_anything_was_saved_leaves_no_folder(here):
    train()
    HOOKS.append(stop_at(2))
    for given in dict(), dict(out="new"), dict(out="new/deep"), dict(first_steps=5):
        with pytest.raises(Stop):
            train(**given)
    assert os.listdir("runs") == ["test_run"] and set(os.listdir()) <= {"runs", "new"} and not list(here.glob("new/*"))


def test_an_error_after_the_last_step_keeps_what_was_trained(here, monkeypatch):
    def fails(*_):
        raise Stop
    report = common.report
    monkeypatch.setattr(common, "report", fails)
    with pytest.raises(Stop):
        train()
    monkeypatch.setattr(common, "report", report)
    train(resume=True)
    assert json.loads(Path("runs/test_run/result.json").read_text())["summary"] == "all went well"


def test_no_two_runs_claim_the_same_folder(here):
    """Sixteen at once, with the default folder; and with the same --out only one of them."""
    common.say()
    for out in "", "mine":
        found, refusals, barrier = [], [], threading.Barrier(16)
        resolved = common.resolve(Args(device="cpu", lr=.1, out=out))

        def claims():
            args = copy.copy(resolved)
            barrier.wait()
            try:
                common.claim(args)
                found.append(args.out)
            except UserError as error:
                refusals.append(str(error))

        threads = [threading.Thread(target=claims) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if out:
            assert found == ["mine"] and len(refusals) == 15 and all("holds a run" in text for text in refusals)
        else:
            assert sorted(found) == sorted(["runs/test_run"] + [f"runs/test_run-{n}" for n in range(2, 17)])


def test_two_runs_at_once_do_not_mix(flags, here):
    processes, alone = [], {}
    for seed in 1, 2:
        Path(f"output-{seed}").mkdir()
        processes.append(begin(*flags("mae.py"), "--steps", 60, "--seed", seed, "--save-every", 0, folder=here / f"output-{seed}", cwd=here))
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for seed in 1, 2:
        assert run(*flags("mae.py"), "--steps", 60, "--seed", seed, "--out", f"alone-{seed}", cwd=here).returncode == 0
        alone[seed] = weights(f"alone-{seed}")
    assert sorted(os.listdir("runs")) == ["mae", "mae-2"]
    seeds = set()
    for name in "runs/mae", "runs/mae-2":
        seed = common.read_checkpoint(name)["args"]["seed"]
        seeds.add(seed)
        assert same(weights(name), alone[seed]) and log(name) == log(f"alone-{seed}")
    assert seeds == {1, 2}


def test_all_runs_as_one_table(here, capsys, monkeypatch):
    """A result.json that is empty, cut off or another program's costs its own row only."""
    train(), train(steps=9)
    for name, content in dict(empty="", cut='{"command": "python', foreign='{"accuracy": 5}', list="[1, 2]", number="7", null="null",
                              types='{"settings": {"data": 3, "steps": 1}, "seconds": "x", "summary": []}').items():
        Path("runs", name).mkdir()
        Path("runs", name, "result.json").write_text(content)
    Path("runs/bytes").mkdir()
    Path("runs/bytes/result.json").write_bytes(b"\xff\xfe\x00{")
    Path("runs/folder/result.json").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["common.py"])
    common.main()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if "result.json" in line or "all went well" in line}
    assert set(rows) == {"test_run", "test_run-2", "empty", "cut", "foreign", "list", "number", "null", "types", "bytes", "folder"}
    assert all(("cannot be read" in row) == (not name.startswith("test_run")) for name, row in rows.items())
    done = run("runs", script="common.py", cwd=here)
    assert done.returncode == 0 and done.stdout.count("all went well") == 2, done.stderr


# ------------------------------------------------------------------------------- resumed, bit for bit


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """whole(script): the folder of a run of 40 steps that was never stopped."""
    root = tmp_path_factory.mktemp("whole")

    @functools.cache
    def finished(script):
        done = run(*flags(script), "--dtype", "float32", "--device", "cpu", "--steps", 40, "--out", root / script, script=script)
        assert done.returncode == 0, done.stderr
        return root / script
    return finished


@pytest.mark.parametrize("script", [s for s in ("mae.py", "gpt.py") if s in SCRIPTS])
def test_killed_and_resumed_ends_bit_for_bit_as_one_never_stopped(script, whole, flags, tmp_path):
    """Killed three times, in steps 5, 17 and 18, when checkpoints are written in each step."""
    out = tmp_path / "cut"
    cut = [*flags(script), "--dtype", "float32", "--device", "cpu", "--steps", 40, "--save-every", 0, "--out", out]
    for step in 5, 17, 18:
        done = run(*cut, script=script, before=killed_at(step, signal.SIGKILL))
        assert done.returncode == -signal.SIGKILL and common.read_checkpoint(out)["step"] == step
        cut = ["--resume", "--out", out]
    done = run(*cut, script=script)
    assert done.returncode == 0 and "Continuing from step 18" in done.stdout, done.stderr
    assert same(weights(whole(script)), weights(out)) and log(whole(script)) == log(out)
    result = [json.loads((folder / "result.json").read_text())["figures"] for folder in (whole(script), out)]
    assert result[0] == result[1]


def test_killed_at_any_moment(tiny, tmp_path):
    flags = ["--data", tiny, "--steps", 150, "--save-every", 0, *SMALL]
    assert run(*flags, "--out", tmp_path / "whole").returncode == 0
    out = tmp_path / "cut"
    process = begin(*flags, "--out", out, folder=tmp_path)
    while not (out / "checkpoint.pt").exists():
        assert process.is_alive()
        time.sleep(.002)
    time.sleep(random.random() * .2)
    process.kill()
    process.join()
    step = common.read_checkpoint(out)["step"]
    done = run("--resume", "--out", out)
    assert done.returncode == 0 and f"Continuing from step {step}" in done.stdout, done.stderr
    assert same(weights(tmp_path / "whole"), weights(out)) and log(tmp_path / "whole") == log(out)


def test_killed_before_the_first_checkpoint_that_run_is_resumed(flags, here, whole):
    """With its settings, and not an older one."""
    assert run(*flags("mae.py"), "--steps", 3, "--seed", 7, cwd=here).returncode == 0
    before = files("runs/mae")
    cut = [*flags("mae.py"), "--dtype", "float32", "--device", "cpu", "--steps", 40]
    done = run(*cut, cwd=here, before=killed_at(5, signal.SIGKILL))
    assert done.returncode == -signal.SIGKILL and sorted(os.listdir("runs/mae-2")) == ["log.jsonl", "settings.json"]
    done = run("--resume", cwd=here)
    assert done.returncode == 0, done.stderr
    assert same(weights("runs/mae-2"), weights(whole("mae.py"))) and log("runs/mae-2") == log(whole("mae.py"))
    assert files("runs/mae") == before
    Path("runs/mae-3").mkdir()                                           # killed even before it wrote its settings
    done = run("--resume", "--steps", 41, cwd=here)
    assert done.returncode == 0 and "Continuing from step 40 of runs/mae-2" in done.stdout, done.stderr


@pytest.mark.parametrize("content", ["", '{"script": "mae.py"', "[]", '{"script": "mae.py"}', '{"script": "mae.py", "args": 5}'])
def test_settings_that_cannot_be_read(content, here):
    Path("mine").mkdir()
    Path("mine/settings.json").write_text(content)
    refused(run("--resume", "--out", "mine", cwd=here), 1, "settings.json cannot be read: delete mine and start a new run")


def test_settings_of_another_script(here):
    Path("mine").mkdir()
    Path("mine/settings.json").write_text('{"script": "gpt.py", "args": {}}')
    refused(run("--resume", "--out", "mine", cwd=here), 1, "was written by gpt.py: choose another --out")


def test_a_resumed_run_has_its_settings_and_the_flags_given_win(here):
    train(seed=5, width=6, lr=.5, weight_decay=.25)
    state = common.read_checkpoint("runs/test_run")
    assert state["args"]["seed"] == 5 and state["args"]["lr"] == .5
    train(resume=True, steps=12, weight_decay=.125)
    now = common.read_checkpoint("runs/test_run")
    assert {k for k in now["args"] if now["args"][k] != state["args"][k]} - {"out"} == {"steps", "weight_decay", "resume"}
    assert [group["weight_decay"] for group in now["optimizer"]["param_groups"]] == [.125, 0]
    assert now["about"] == dict(width=6)


def test_what_comes_after_the_last_step_is_the_same_when_a_run_was_resumed(here):
    """The weights of another network, say: of a run stopped before its end, and of one that had ended."""
    figures = lambda out: json.loads(Path(out, "result.json").read_text())["figures"]
    train(out="whole")
    expected = figures("whole")
    HOOKS.append(stop_at(4))
    with pytest.raises(Stop):
        train(out="cut", save_every=0)
    HOOKS.clear()
    train(out="cut", resume=True)
    train(out="whole", resume=True)
    assert figures("cut") == figures("whole") == expected


def test_steps_0_evaluates_without_training(here):
    model = train()
    before = files("runs/test_run")
    again = train(resume=True, steps=0)
    assert same(model.state_dict(), again.state_dict()) and json.loads(Path("runs/test_run/result.json").read_text())["settings"]["steps"] == 8
    name = str(Path("runs/test_run/checkpoint.pt"))
    assert files("runs/test_run")[name] == before[name]


@pytest.mark.parametrize("rest", [b'{"step": 5, "lo', b"\0\0\0\0", b'{"step": 5, "loss": 1.0, "lr": 0.1, "seconds": 1}\n{"step": 6', b"\xff\xfe"])
def test_a_log_that_was_cut_off(rest, here):
    """Lines later than the checkpoint are dropped, and what a full disk or a crash left."""
    train(out="whole")
    HOOKS.append(stop_at(4))
    with pytest.raises(Stop):
        train(out="cut", save_every=0)
    HOOKS.clear()
    with open("cut/log.jsonl", "ab") as f:
        f.write(rest)
    train(out="cut", resume=True)
    assert log("cut")[-4:] == log("whole")[-4:]
    if rest[:1] == b"{":
        assert log("cut") == log("whole")


# -------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_the_resumed_run_ends_as_if_there_had_been_none(number, whole, flags, tmp_path):
    """The process dies by the signal: a shell sees 130, 143, ... and a loop over seeds ends."""
    out = tmp_path / "cut"
    cut = [*flags("mae.py"), "--dtype", "float32", "--device", "cpu", "--steps", 40, "--out", out]
    done = run(*cut, before=killed_at(11, number))
    assert done.returncode == -number and "Traceback" not in done.stderr
    assert f"python mae.py --resume --out {out} continues it" in done.stderr
    assert common.read_checkpoint(out)["step"] == 12                     # after the step in which it came
    done = run(*shlex.split(done.stderr.split("python mae.py ")[1].split(" continues")[0]))
    assert done.returncode == 0, done.stderr
    assert same(weights(whole("mae.py")), weights(out)) and log(whole("mae.py")) == log(out)


def test_a_second_signal_stops_at_once(flags, tmp_path):
    done = run(*flags("mae.py"), "--steps", 40, "--out", tmp_path / "run", before=killed_at(5, signal.SIGINT, signal.SIGINT))
    assert done.returncode == -signal.SIGINT and done.stderr.strip() == "Stopped" and not (tmp_path / "run").exists()
    done = run(*flags("mae.py"), "--steps", 40, "--out", tmp_path / "run", "--save-every", 0,
               before=killed_at(5, signal.SIGTERM, signal.SIGTERM))
    assert done.returncode == -signal.SIGTERM and "continues it" in done.stderr
    assert common.read_checkpoint(tmp_path / "run")["step"] == 5


def ignore_and_send(number, step):
    signal.signal(number, signal.SIG_IGN)
    at_step(step, number)


def test_a_signal_that_is_ignored_stays_so(flags, tmp_path):
    """nohup python mae.py."""
    done = run(*flags("mae.py"), "--steps", 40, "--out", tmp_path / "run", before=functools.partial(ignore_and_send, signal.SIGHUP, 5))
    assert done.returncode == 0 and common.read_checkpoint(tmp_path / "run")["step"] == 40


def before_training(number):
    load = common.load_images

    def send(args):
        os.kill(os.getpid(), number)
        return load(args)
    common.load_images = send


def in_the_evaluation(number):
    def send(*_):
        os.kill(os.getpid(), number)
    common.report = send


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_the_training(number, flags, here, whole):
    older = run(*flags("mae.py"), "--steps", 3, cwd=here)
    assert older.returncode == 0
    before = files(here)
    cut = [*flags("mae.py"), "--dtype", "float32", "--device", "cpu", "--steps", 40]
    done = run(*cut, cwd=here, before=functools.partial(before_training, number))
    assert done.returncode == -number and done.stderr.strip() == "Stopped"          # and no word of an older run
    assert files(here) == before and os.listdir("runs") == ["mae"]
    done = run(*cut, cwd=here, before=functools.partial(in_the_evaluation, number))
    assert done.returncode == -number and "python mae.py --resume --out runs/mae-2 continues it" in done.stderr
    done = run("--resume", cwd=here)
    assert done.returncode == 0 and same(weights("runs/mae-2"), weights(whole("mae.py"))), done.stderr


def test_a_shells_loop_ends_with_ctrl_c(flags, here):
    """for s in 0 1 2; do python mae.py --seed $s; done"""
    line = shlex.join([*command(*flags("mae.py"), "--steps", 1_000_000), "--seed"])
    loop = subprocess.Popen(["bash", "-c", f"for s in 0 1 2; do {line} $s; done"], cwd=here, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not Path("runs/mae/log.jsonl").exists():
        assert loop.poll() is None
        time.sleep(.02)
    time.sleep(.5)                                                       # the log is there before the first step
    os.killpg(loop.pid, signal.SIGINT)                                   # what a terminal does
    _, text = loop.communicate(timeout=60)
    assert loop.returncode in (-signal.SIGINT, 130) and text.count("Stopped") == 1 and "Traceback" not in text, text
    assert os.listdir("runs") == ["mae"] and common.read_checkpoint("runs/mae")["step"] > 0


def test_timeout_saves(flags, here):
    """timeout 600 python mae.py: what a batch system does at the end of a job's time, too."""
    process = subprocess.Popen(["timeout", "600", *command(*flags("mae.py"), "--steps", 1_000_000)], cwd=here,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not Path("runs/mae/log.jsonl").exists():
        assert process.poll() is None
        time.sleep(.02)
    time.sleep(.5)                                                       # the log is there before the first step
    process.terminate()                                                  # it passes the signal on, as after 600 s
    _, text = process.communicate(timeout=60)
    assert process.returncode in (124, 143, -signal.SIGTERM) and "--resume --out runs/mae continues it" in text, text
    assert common.read_checkpoint("runs/mae")["step"] > 0


def test_a_terminal_that_is_closed(flags, here):
    """The kernel sends SIGHUP, and what is written to the terminal is an error from then on."""
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", f"import fcntl, os, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
                                f"os.execv({sys.executable!r}, {command(*flags('mae.py'), '--steps', 1_000_000)!r})"],
                               cwd=here, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    while not Path("runs/mae/log.jsonl").exists():
        assert process.poll() is None
        time.sleep(.02)
    time.sleep(.5)                                                       # the log is there before the first step
    os.close(master)
    assert process.wait(60) == -signal.SIGHUP
    assert common.read_checkpoint("runs/mae")["step"] > 0


# ------------------------------------------------------------------------------ output, clock, disk


@pytest.mark.parametrize("where", ["| head -3", ">&-", "> /dev/full"])
def test_a_run_goes_on_when_nobody_reads(where, flags, here):
    line = shlex.join(command(*flags("mae.py"), "--steps", 30))
    done = subprocess.run(["bash", "-c", f"{line} {where}; exit ${{PIPESTATUS[0]}}"], cwd=here, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert common.read_checkpoint("runs/mae")["step"] == 30
    assert set(os.listdir("runs/mae")) == {"checkpoint.pt", "log.jsonl", "loss.svg", "reconstructions.png", "result.json", "settings.json"}


def test_the_table_of_runs_piped_into_head(here):
    for _ in range(9):
        train()
    line = shlex.join(command(script="common.py"))
    done = subprocess.run(["bash", "-c", f"{line} | head -1; exit ${{PIPESTATUS[0]}}"], cwd=here, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("run"), done.stderr


def test_checkpoints_do_not_depend_on_the_clock(here, monkeypatch):
    """Which is set back an hour, or forward, while a run goes on: a step takes 10 s, a checkpoint is due after 25 s."""
    clock, wall, saved = [0.], [1e9], []
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(common.time, "time", lambda: wall[0])
    save = common.Run.save
    monkeypatch.setattr(common.Run, "save", lambda self: (saved.append(self.step), save(self)))

    def tick(run, step):
        clock[0] += 10
        wall[0] += 3600 if step % 3 else -7200
    HOOKS.append(tick)
    train(steps=10, save_every=25)
    assert saved == [3, 6, 9, 10] and common.read_checkpoint("runs/test_run")["seconds"] == 100


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_keeps_the_older_checkpoint(flags, here):
    """The limit on the size of a file stands in for a disk that is full in the middle of a write."""
    assert run(*flags("mae.py"), "--out", "mine", "--steps", 3, cwd=here).returncode == 0
    before = Path("mine/checkpoint.pt").read_bytes()
    done = run("--resume", "--out", "mine", "--steps", 9, cwd=here, before=functools.partial(limit_files, len(before) // 2))
    refused(done, 1, "cannot write mine/checkpoint.pt at step 9; the one of step 3 is kept")
    assert Path("mine/checkpoint.pt").read_bytes() == before and not list(Path("mine").glob("*.part"))
    done = run("--resume", "--out", "mine", "--steps", 9, cwd=here)
    assert done.returncode == 0 and common.read_checkpoint("mine")["step"] == 9


def test_a_second_interrupt_while_a_checkpoint_is_written(here, monkeypatch):
    """torch.save then raises another error, which must not hide it."""
    def save(state, file):
        try:
            raise KeyboardInterrupt(signal.SIGINT)
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert not list(Path("runs").rglob("*.part"))


def test_settings_that_memory_cannot_hold(here):
    done = run("--dim", 2 ** 40, "--steps", 1, cwd=here, script="bert.py")
    refused(done, 1, "the memory is not enough for these settings: take a smaller --batch, or a smaller model", script="bert.py")
    assert not os.path.exists("runs/bert")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), MemoryError(), lambda n: np.zeros(n)])
def test_a_lack_of_memory_is_one_sentence(error, capsys):
    def main(args):
        raise error if isinstance(error, Exception) else error(2 ** 58)
    with pytest.raises(SystemExit, match="x.py: the memory is not enough") as stopped:
        common.guarded(main, None, "x.py")
    assert stopped.value.code == str(stopped.value)                                     # printed, with status 1
    with pytest.raises(RuntimeError, match="a bug"):
        common.guarded(lambda _: (_ for _ in ()).throw(RuntimeError("a bug")), None, "x.py")


def test_a_disk_that_is_full_from_the_start(flags, here):
    done = run(*flags("mae.py"), "--steps", 9, cwd=here, before=functools.partial(limit_files, 300))
    refused(done, 1, "cannot write to runs/mae (File too large): choose another --out")
    assert os.listdir("runs") == []


def test_a_disk_that_is_full_from_the_first_checkpoint_on(here, monkeypatch):
    def full(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*checkpoint.pt at step 8 .No space left on device."):
        train()
    assert os.listdir("runs") == []


def dies_while_it_writes():
    def half(state, f):
        f.write(b"half"), f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = half


def test_killed_in_the_middle_of_a_write_the_older_checkpoint_still_loads(flags, here):
    assert run(*flags("mae.py"), "--steps", 3, cwd=here).returncode == 0
    before = Path("runs/mae/checkpoint.pt").read_bytes()
    done = run("--resume", "--steps", 9, cwd=here, before=dies_while_it_writes)
    assert done.returncode == -signal.SIGKILL and Path("runs/mae/checkpoint.pt.part").read_bytes() == b"half"
    assert Path("runs/mae/checkpoint.pt").read_bytes() == before and common.read_checkpoint("runs/mae", "mae.py")["step"] == 3
    assert run("--resume", "--steps", 9, cwd=here).returncode == 0
    assert common.read_checkpoint("runs/mae")["step"] == 9 and not list(Path("runs/mae").glob("*.part"))


def test_files_are_replaced_and_never_written_over(here):
    """A second name of the old file shows that no byte of it was touched by the new one."""
    train()
    before = files("runs/test_run")
    for name in "checkpoint.pt", "result.json", "log.jsonl":
        Path("runs/test_run", f"second-{name}").hardlink_to(Path("runs/test_run", name))
    train(resume=True, steps=12)
    for name in "checkpoint.pt", "result.json", "log.jsonl":
        old = before[f"runs/test_run/{name}"][0]
        assert Path("runs/test_run", f"second-{name}").read_bytes() == old != Path("runs/test_run", name).read_bytes()


def test_a_folder_that_cannot_be_written(flags, here):
    Path("file").write_text("")
    for out in "file", "file/deeper", "/proc/nothing", "/dev/null":
        refused(run(*flags("mae.py"), "--out", out, cwd=here), 1, f"cannot write to {out}", "choose another --out")
    Path("runs").write_text("a file")
    refused(run(*flags("mae.py"), cwd=here), 1, "cannot write to runs/mae")


# -------------------------------------------------------------------------------------- checkpoints


def rewrite(path, change):
    state = torch.load(path, weights_only=True)
    torch.save(change(state), path)


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


BROKEN = {   # what became of checkpoint.pt, and what is said
    "empty": (lambda path: path.write_bytes(b""), "is not a checkpoint that can be read"),
    "text": (lambda path: path.write_bytes(b"not a checkpoint"), "is not a checkpoint that can be read"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-700]), "is not a checkpoint that can be read"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2]), "is not a checkpoint that can be read"),
    "foreign": (lambda path: torch.save(dict(epoch=3, state_dict={}), path), "is not a checkpoint that can be read"),
    "tensor": (lambda path: torch.save(torch.ones(3), path), "is not a checkpoint that can be read"),
    "object": (lambda path: torch.save(nn.Linear(1, 1), path), "is not a checkpoint that can be read"),
    "script": (lambda path: rewrite(path, lambda s: s | dict(script="gpt.py")), "was written by gpt.py, not by mae.py"),
    "older": (lambda path: rewrite(path, without("format")), "was written by another version of mae.py (format None, this is 2)"),
    "newer": (lambda path: rewrite(path, lambda s: s | dict(format=3)), "was written by another version of mae.py (format 3, this is 2)"),
    "optimizer": (lambda path: rewrite(path, lambda s: s | dict(kind="SGD")), "is of another optimizer"),
    "groups": (lambda path: rewrite(path, lambda s: s | dict(optimizer=dict(state={}, param_groups=[]))), "is of another optimizer"),
    "shape": (lambda path: rewrite(path, lambda s: s | dict(model=s["model"] | {"encoder.cls_token": torch.ones(1, 1, 4)})),
              "encoder.cls_token is (1, 1, 4) there and (1, 1, 16) here"),
    "tensor missing": (lambda path: rewrite(path, lambda s: s | dict(model=without("mask_token")(s["model"]))), "mask_token is missing there"),
    "tensor more": (lambda path: rewrite(path, lambda s: s | dict(model=s["model"] | dict(more=torch.ones(2)))), "more is (2,) there and missing here"),
    **{f"no {key}": (lambda path, key=key: rewrite(path, without(key)), f"lacks {key}")
       for key in ("args", "model", "step", "seconds", "about", "kind", "optimizer")},
    "no script": (lambda path: rewrite(path, without("script")), "is not a checkpoint that can be read"),
}


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """The folder of a run of mae.py, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(*flags("mae.py"), "--steps", 2, "--out", out).returncode == 0
    return out


@pytest.mark.parametrize("kind", BROKEN)
def test_a_checkpoint_that_does_not_fit_gets_one_sentence(kind, finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    damage, words = BROKEN[kind]
    damage(out / "checkpoint.pt")
    before = files(out)
    monkeypatch.setattr(common, "on_signals", lambda handler: {})
    with pytest.raises(SystemExit) as end:
        common.cli(module_of("mae.py").main, module_of("mae.py").Args, ["--resume", "--out", str(out)])
    text = capsys.readouterr().err
    assert end.value.code == 1 and words in text and text.startswith("mae.py: ") and text.count("\n") == 1, text
    assert files(out) == before


def test_a_broken_checkpoint_in_a_process_of_its_own(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    BROKEN["truncated"][0](tmp_path / "run/checkpoint.pt")
    refused(run("--resume", "--out", tmp_path / "run"), 1, BROKEN["truncated"][1])


def test_a_folder_without_a_run_cannot_be_resumed(here):
    refused(run("--resume", cwd=here), 1, "there is no run of mae.py to resume in runs: leave out --resume to start one")
    refused(run("--resume", "--out", "none", cwd=here), 1, "there is no run of mae.py to resume in none")
    assert not os.listdir()


def test_flags_that_change_the_model_cannot_be_resumed(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = files(out)
    refused(run("--resume", "--out", out, "--dim", 32), 1, "encoder.cls_token is (1, 1, 16) there and (1, 1, 32) here",
            "leave out the flags that change the model")
    assert files(out) == before


def test_a_loss_that_is_not_finite_stops_the_run(flags, here):
    assert run(*flags("mae.py"), "--steps", 5, cwd=here).returncode == 0
    before = Path("runs/mae/checkpoint.pt").read_bytes()
    done = run("--resume", "--steps", 90, "--lr", "1e38", "--clip", "inf", cwd=here)
    refused(done, 1, "the loss was", "the checkpoint of step 5 is kept", "Try a smaller --lr")
    assert Path("runs/mae/checkpoint.pt").read_bytes() == before
    done = run(*flags("mae.py"), "--steps", 90, "--lr", "1e38", "--clip", "inf", "--warmup", 0, cwd=here)
    refused(done, 1, "the loss was", "no checkpoint was written yet")
    assert os.listdir("runs") == ["mae"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_saved(value, here):
    """The loss of that step was; its gradient was not."""
    def spoil(run, step):
        if step == 5:
            with torch.no_grad():
                run.model[0].weight[0, 0] = value
    HOOKS.append(spoil)
    with pytest.raises(UserError, match="at step 5 the weights were not finite.*the checkpoint of step 5 is kept"):
        train(save_every=0)
    assert common.read_checkpoint("runs/test_run")["step"] == 5


@pytest.mark.parametrize("step", range(8))
def test_the_step_whose_loss_was_not_finite_is_named(step, here, monkeypatch):
    add = common.Run.log
    monkeypatch.setattr(common.Run, "log", lambda self, loss: add(self, loss * math.nan if self.step == step else loss))
    with pytest.raises(UserError, match=f"at step {step} the loss was nan"):
        train(steps=8)


# -------------------------------------------------------------------------- a training that comes first


def test_a_first_training_is_kept_and_used_again(here, capsys):
    model = train(first_steps=5)
    assert common.read_checkpoint("runs/test_run/first")["step"] == 5
    before = files("runs/test_run")
    again = train(first_steps=5)                                         # another run, beside it
    assert not Path("runs/test_run-2/first").exists() and files("runs/test_run") == before
    assert same(model.state_dict(), again.state_dict())
    for given in dict(first_steps=6), dict(first_lr=.3), dict(seed=1), dict(width=4):
        train(**dict(first_steps=5) | given)
        out = max(Path("runs").iterdir(), key=lambda path: int(path.name.split("-")[1] if "-" in path.name else 1))
        assert (out / "first/checkpoint.pt").exists(), given             # another one is trained
    assert files("runs/test_run") == before


def test_killed_in_the_first_training_it_is_continued(here, capsys):
    """Between its checkpoints, and between the two trainings: with the settings of settings.json, and by itself."""
    whole = train(first_steps=9, out="whole/run")
    stops = {"first": [6], "between": [], "main": [9 + 3]}
    for name, at in stops.items():
        out, count = f"{name}/run", []

        def hook(run, step):
            count.append(step)
            if len(count) - 1 in at:
                raise Stop
        HOOKS[:] = [hook]
        if name == "between":
            HOOKS[:] = [lambda run, step: stop_at(0)(run, step) if run.out.name == "run" else None]
        with pytest.raises(Stop):
            train(first_steps=9, save_every=0, out=out)
        HOOKS.clear()
        assert common.read_checkpoint(f"{out}/first")["step"] == (6 if name == "first" else 9)
        assert Path(out, "checkpoint.pt").exists() == (name == "main")
        before = files(f"{out}/first")
        capsys.readouterr()
        cut = train(resume=True, out=out)
        assert ("Continuing from step 6 of first/run/first/checkpoint.pt" in capsys.readouterr().out) == (name == "first")
        assert same(whole.state_dict(), cut.state_dict()) and log(out) == log("whole/run") and log(f"{out}/first") == log("whole/run/first")
        assert (files(f"{out}/first") == before) == (name != "first")


def test_nothing_is_left_of_a_first_training_that_saved_nothing(here):
    HOOKS.append(stop_at(6))
    with pytest.raises(Stop):
        train(first_steps=9, out="run")
    assert not os.listdir()


def test_a_first_training_with_other_settings_is_not_continued(here):
    HOOKS.append(stop_at(6))
    with pytest.raises(Stop):
        train(first_steps=9, save_every=0)
    HOOKS.clear()
    before = files("runs")
    with pytest.raises(UserError, match="runs/test_run/first was trained with another --lr: start a new run"):
        train(resume=True, first_lr=.3)
    assert files("runs") == before


def test_a_broken_first_training_beside_a_run_is_passed_over(here):
    model = train(first_steps=5)
    Path("runs/test_run/first/checkpoint.pt").write_bytes(b"broken")
    assert same(model.state_dict(), train(first_steps=5).state_dict())
    assert common.read_checkpoint("runs/test_run-2/first")["step"] == 5


# ------------------------------------------------------------------------------------------- flags


def test_device_cpu_0_takes_the_sizes_for_a_cpu(flags, tmp_path):
    for device in "cpu", "cpu:0":
        out = tmp_path / device
        done = run(*flags("mae.py"), "--steps", 2, "--device", device, "--dtype", "float32", "--out", out)
        assert done.returncode == 0 and "--lr 0.003" in done.stdout, done.stderr
        assert common.read_checkpoint(out)["args"]["lr"] == .003
    assert same(weights(tmp_path / "cpu"), weights(tmp_path / "cpu:0"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_of_every_script(script, here, capsys):
    module = module_of(script)

    def ends(*flags):
        with pytest.raises(SystemExit) as end:
            common.cli(module.main, module.Args, flags)
        return end.value.code, *capsys.readouterr()

    for flags, words in ("--compile=False", "--compile takes no value: it is --compile or --no-compile"), \
            ("--compil", "unknown flag --compil, did you mean --compile?"), ("", "unknown flag ''"), ("--no-resume=1", "--resume takes no value"):
        code, out, err = ends(flags)
        assert code == 2 and out == "" and err.startswith(f"{script}: {words}") and err.count("\n") == 1, err
    code, out, err = ends("--help")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    for field in dataclasses.fields(module.Args):
        assert common.flag(field.name) in out
    assert not os.listdir()


def test_a_bug_shows_its_traceback(here):
    """A ValueError that nobody raised on purpose is not a user's mistake."""
    def bug(args):
        int("x")

    def mistake(args):
        raise UserError("one sentence")

    with pytest.raises(ValueError, match="invalid literal"):
        common.cli(bug, Args, [])
    with pytest.raises(SystemExit) as end:
        common.cli(mistake, Args, [])
    assert end.value.code == 1
