import contextlib
import dataclasses
import functools
import hashlib
import http.server
import importlib
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DATA = ROOT / os.environ.get("DATA_DIR", "data")                     # real data, where it exists

SMALL = ("--dim 16 --heads 2 --depth 1 --decoder-dim 8 --decoder-heads 2 --decoder-depth 1 --batch 8 "
         "--tune linear --labels 1 --dtype float32 --device cpu").split()    # seconds instead of minutes


def command(*flags, script="mae.py"):
    return [sys.executable, str(ROOT / script), *map(str, flags)]


signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's background job ignores it

# Importing torch takes seconds, and there are hundreds of runs: a server that has it forks for each. (Optimizers import
# torch._dynamo.)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "numpy", "tqdm"])


def forked(script, flags, folder, most, cwd, before):
    """What `python script flags` does, in a process of its own, with its output in files; of images only the first few,
    if `most` says how many. before: a function that is called first, in that process."""
    for name, stream in ("stdout", sys.stdout), ("stderr", sys.stderr):
        stream.flush()
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    sys.argv = [str(ROOT / script), *flags]
    if most:
        import common
        load, cut = common.load_images, lambda labels: {name: y[:most] for name, y in labels.items()}
        common.load_images = lambda *a, **k: (lambda x: dataclasses.replace(
            x, train=x.train[:most], test=x.test[:most], train_labels=cut(x.train_labels), test_labels=cut(x.test_labels)))(load(*a, **k))
    if before:
        before()
    runpy.run_path(sys.argv[0], run_name="__main__")


def begin(*flags, script="mae.py", folder, most=None, cwd=ROOT, before=None):
    """A process of a script that has just begun; its output goes to the files stdout and stderr of a folder."""
    process = SERVER.Process(target=forked, args=(script, list(map(str, flags)), folder, most, cwd, before))
    process.start()
    return process


def run(*flags, script="mae.py", timeout=300, most=None, cwd=ROOT, before=None):
    """The finished process of a script, with what it printed as text. most, before: as in forked."""
    with tempfile.TemporaryDirectory() as folder:
        process = begin(*flags, script=script, folder=folder, most=most, cwd=cwd, before=before)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{script} {' '.join(map(str, flags))}: not done after {timeout} s")
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(command(*flags, script=script), process.exitcode, out, err)


def call(*flags, script="mae.py"):
    """What run() returns, in this process: of a command that ends before anything is trained."""
    import common
    module, out, err = importlib.import_module(script.removesuffix(".py")), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(common, "on_signals"):
        try:
            status = common.cli(module.main, module.Args, [*map(str, flags)])
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(flags, status, out.getvalue(), err.getvalue())


def at_step(step, *numbers):
    """For run(before=...): the process sends itself these signals while it takes a step."""
    import common
    add = common.Run.log

    def send(self, loss):
        add(self, loss)
        if self.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)
    common.Run.log = send


def killed_at(step, *numbers):
    return functools.partial(at_step, step, *numbers)


class Forked(multiprocessing.get_context("fork").Process):
    """As much of Popen([python, script, flag, ...]) as experiments/repeat.py takes."""

    def run(self):
        sys.argv = self.line
        runpy.run_path(self.line[0], run_name="__main__")

    def __init__(self, line):
        super().__init__()
        self.line = line[1:]
        self.start()

    def wait(self):
        self.join()
        return self.exitcode


def forking():
    """For run(before=...): the scripts that repeat.py starts are forked, too."""
    popen = subprocess.Popen
    subprocess.Popen = lambda line, **how: Forked(line) if line[0] == sys.executable else popen(line, **how)


def refused(process, status, *words, script="mae.py"):
    """Asserts that a run ended with one plain sentence that has these words in it."""
    text = process.stderr.strip()
    assert process.returncode == status, text
    assert "Traceback" not in text and text.startswith(f"{script}: ") and len(text.splitlines()) == 1, text
    for word in words:
        assert word in text, (word, text)


def interrupted(monkeypatch, where, name, number):
    """Ctrl-C at a call of where.name: the first, second ... Returns the list of its calls."""
    function, calls = getattr(where, name), []

    def stopped(*args, **how):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return function(*args, **how)
    monkeypatch.setattr(where, name, stopped)
    return calls


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A new and an old text, as flags of lora.py."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "fox.txt").write_text("the quick brown fox\njumps over the lazy dog\n\nand away\n" * 40)
    (folder / "old.txt").write_text("".join(f"line {i} of what it knew, {i * i}\n" for i in range(200)))
    return "--data", folder / "fox.txt", "--old", folder / "old.txt"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """An .npz of 64 + 20 images of 8 x 8 in two classes: dark and light."""
    r = np.random.default_rng(0)
    y = np.arange(84) % 2
    x = (r.integers(0, 120, (84, 8, 8, 3)) + 120 * y[:, None, None, None]).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])
    return path


@pytest.fixture(scope="session")
def scripts():
    """The scripts of the seven that are there."""
    names = "simclr autoencoder mae bert gpt lora flamingo".split()
    return [f"{name}.py" for name in names if (ROOT / f"{name}.py").exists()]


@pytest.fixture
def serve(monkeypatch):
    """serve(answer, content): answer(handler) answers for two mirrors of a file x.gz of MNIST, whose content is known."""
    import common
    servers = []

    def begin(answer, content):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                answer(self)

            def log_message(self, *_):
                pass
        web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(web)
        threading.Thread(target=web.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{web.server_port}"
        monkeypatch.setitem(common.MIRRORS, "mnist", [f"{at}/first/", f"{at}/second/"])
        monkeypatch.setitem(common.SHA256["mnist"], "x.gz", hashlib.sha256(content).hexdigest())
    yield begin
    for web in servers:
        web.shutdown()
