"""Several processes (torchrun), and the parts of --accumulate: together they compute what one process computes at once."""
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT, begin, refused, run

import bert
import common
import simclr

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TEXT = "the cat and the dog saw a bird in the old garden, and then it rained.\n" * 200


def torchrun(script, *flags, cwd):
    """Two processes of a script."""
    return subprocess.run([*TORCHRUN, ROOT / script, *map(str, flags)], capture_output=True, text=True, cwd=cwd, timeout=200,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))


def one_of(count, rank, port):
    """Makes this process one of so many, as torchrun does."""
    os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE=str(count), RANK=str(rank), LOCAL_RANK=str(rank))


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def two(script, *flags, cwd):
    """What torchrun() returns, without its imports: the processes are forked."""
    port, folders = free_port(), [cwd / "rank-0", cwd / "rank-1"]
    [folder.mkdir() for folder in folders]
    processes = [begin(*flags, script=script, folder=folder, cwd=cwd, before=functools.partial(one_of, 2, rank, port))
                 for rank, folder in enumerate(folders)]
    for process in processes:
        process.join(200)
        process.kill()
    out, err = ("".join((folder / name).read_text() for folder in folders) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(flags, any(process.exitcode for process in processes), out, err)


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def close(a, b, tolerance=1e-5):
    """Whether two runs have the same losses and weights, up to rounding."""
    assert losses(a) == pytest.approx(losses(b), abs=tolerance)
    assert max((x.float() - weights(b)[name].float()).abs().max().item() for name, x in weights(a).items() if x.numel()) < tolerance


# At a low rate: AdamW divides by the size of a gradient, and so enlarges the rounding of gradients that are nearly 0.
SETTINGS = {
    "gpt": "--optimizer adamw --dim 16 --depth 2 --heads 2 --context 24 --length 5",
    "bert": "--optimizer adamw --dim 16 --heads 2 --context 12 --passage 8 --classes 2 --labels 1 --tune-steps 1 --keep 0.1",
    "mae": "--optimizer adamw --dim 16 --depth 1 --heads 2 --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --tune linear --labels 2",
    "autoencoder": "--width 4 --latent 8 --labels 2",
    "lora": "--optimizer adamw --dim 16 --depth 1 --heads 2 --context 40 --k 32 --epochs 4 --base-steps 4 --base-batch 8 --base-lr 3e-5 "
            "--length 5",
    "flamingo": "--optimizer adamw --dim 16 --depth 1 --heads 2 --vit-dim 16 --vit-depth 1 --vit-heads 2 --images 500 --tests 12 --shots 0 "
                "--lm-steps 4 --lm-batch 8 --lm-lr 3e-5 --vit-steps 3 --vit-batch 16",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_or_two_parts_are_one_batch(name, tiny, tmp_path):
    """Also masks: they are drawn for the whole batch. And where other numbers of tokens count (flamingo.py)."""
    (tmp_path / "text.txt").write_text(TEXT)
    data = dict(gpt=["--data", "text.txt"], bert=["--data", "text.txt"], lora=["--data", "text.txt", "--old", "text.txt"], flamingo=[])
    flags = [*SETTINGS[name].split(), *data.get(name, ["--data", tiny, "--image-size", 8]), "--lr", 3e-5, "--device", "cpu", "--dtype", "float32"]
    flags += [] if name == "lora" else ["--steps", 6, "--batch", 8]
    done = run(*flags, "--out", tmp_path / "one/run", script=f"{name}.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    both = two(f"{name}.py", *flags, "--out", tmp_path / "two/run", cwd=tmp_path)
    assert both.returncode == 0, both.stderr
    assert len(both.stdout.splitlines()) == len(done.stdout.splitlines())                 # one of them speaks
    assert "torchrun --nproc-per-node 2" in json.loads((tmp_path / "two/run/result.json").read_text())["command"]
    parts = run(*flags, "--accumulate", 2, "--out", tmp_path / "parts/run", script=f"{name}.py", cwd=tmp_path)
    assert parts.returncode == 0, parts.stderr
    stage = dict(lora="base", flamingo="lm").get(name)
    for other in "two", "parts":
        close(tmp_path / "one/run", tmp_path / other / "run")
        if stage:
            close(tmp_path / "one/run" / stage, tmp_path / other / "run" / stage)


def together(work, *args, nprocs=2):
    """Runs work(rank, *args) in processes; those that wait for each other for a minute are killed."""
    started = mp.start_processes(work, args, nprocs=nprocs, join=False, start_method="fork")
    if not started.join(60) and not started.join(60):
        for process in started.processes:
            process.kill()
        pytest.fail("the processes wait for each other")


def contrast(rank, port, x, folder):
    """One of two processes: its part of the images, by a linear encoder, and the loss of all."""
    one_of(2, rank, port)
    common.start_processes(common.Args(device="cpu"))
    torch.manual_seed(0)
    encoder = torch.nn.Linear(6, 4)
    z1, z2 = (common.Run.gather(encoder(part.chunk(2)[rank])) for part in x)
    loss = simclr.ntxent(z1, z2, .5)
    loss.backward()
    torch.save((loss.detach(), encoder.weight.grad), folder / f"{rank}.pt")


def gradient(rank, port, world, accumulate, folder):
    """The gradient of a batch of which some targets do not count, and the loss of the log."""
    if world > 1:
        one_of(world, rank, port)
        common.start_processes(common.Args(device="cpu"))
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(6, 4), torch.randn(8, 3, 6), torch.randint(4, (8, 3))
    y[0, :2] = y[5, 1:] = y[6:] = -100                              # a part of two rows has none that counts
    args = common.Args(steps=1, batch=8, device="cpu", accumulate=accumulate, out=str(folder / f"{world}{accumulate}"))
    run = common.Run(args, model, torch.optim.SGD(model.parameters(), 0.))
    for _ in run:
        inputs, target = run.part((x, y))
        loss = bert.distance(model(inputs), target)
        loss.backward()
        if run.reduce(loss):
            run.log(loss)
    if rank == 0:
        torch.save((model.weight.grad, run.loss), folder / f"{world}{accumulate}.pt")


def test_the_gradient_is_that_of_the_whole_batch(tmp_path):
    """Also its size, to which AdamW is blind."""
    for world in 1, 2:
        for accumulate in 1, 2, 4:
            if world > 1:
                together(gradient, free_port(), world, accumulate, tmp_path)
            else:
                gradient(0, 0, 1, accumulate, tmp_path)
    whole, loss = torch.load(tmp_path / "11.pt")
    assert whole.norm() > .1
    for name in "12", "14", "21", "22", "24":
        grad, other = torch.load(tmp_path / f"{name}.pt")
        torch.testing.assert_close(grad, whole), name
        assert other == pytest.approx(loss, rel=1e-5), name


def test_negatives_come_from_all_processes(tmp_path):
    torch.manual_seed(1)
    x = torch.randn(2, 8, 6)
    together(contrast, free_port(), x, tmp_path)
    torch.manual_seed(0)
    encoder = torch.nn.Linear(6, 4)
    loss = simclr.ntxent(encoder(x[0]), encoder(x[1]), .5)
    loss.backward()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close([loss.detach()] * 2, [found[0][0], found[1][0]])
    torch.testing.assert_close(encoder.weight.grad, (found[0][1] + found[1][1]) / 2)       # as reduce() averages it
    assert not torch.allclose(encoder.weight.grad, found[0][1])


def test_simclr(tiny, tmp_path):
    flags = ["--data", tiny, "--image-size", 8, "--width", 8, "--batch", 8, "--steps", 3, "--labels", 2, "--device", "cpu"]
    refused(run(*flags, "--accumulate", 2, script="simclr.py"), 2, "--accumulate is not for SimCLR", script="simclr.py")
    done = torchrun("simclr.py", *flags, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "run/neighbours.png").exists(), done.stderr
    assert f"uniform guess {torch.tensor(15.).log():.3f}" in done.stdout                   # of all 2 x 8 - 1


def test_what_cannot_be_divided(tiny, tmp_path):
    flags = ["--data", tiny, "--image-size", 8, "--batch", 7, "--steps", 2, "--labels", 2, "--device", "cpu", "--out", tmp_path / "run"]
    refused(run(*flags, "--accumulate", 2), 1, "--batch 7 cannot be divided into 2 parts")
    done = two("mae.py", *flags, cwd=tmp_path)
    assert done.returncode and done.stderr.count("mae.py: --batch 7 cannot be divided") == 1 and not (tmp_path / "run").exists()


def workers(process):
    """The processes that torchrun started."""
    return [int(pid) for pid in open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()]


@pytest.mark.parametrize("how", ["a process is killed", "torchrun is asked to stop"])
def test_one_ends_with_the_other_and_one_process_goes_on(how, tiny, tmp_path):
    flags = ["--data", tiny, "--image-size", 8, "--dim", 16, "--depth", 1, "--heads", 2, "--tune", "linear", "--labels", 2, "--batch", 8,
             "--device", "cpu", "--out", tmp_path / "run"]
    process = subprocess.Popen([*TORCHRUN, ROOT / "mae.py", *map(str, flags), "--steps", "100000", "--save-every", "0.2"], cwd=tmp_path,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    try:
        for _ in range(1200):
            if (tmp_path / "run/checkpoint.pt").exists():
                break
            time.sleep(.1)
        pids, began = workers(process), time.monotonic()
        assert len(pids) == 2
        os.kill(pids[1], signal.SIGKILL) if how.startswith("a process") else process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
        assert process.returncode and time.monotonic() - began < 60
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
        assert error.count("Stopped: python mae.py --resume") == (how != "a process is killed"), error
    finally:
        process.kill()
    step = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"]
    done = run("--resume", "--out", tmp_path / "run", "--steps", step + 2)
    assert done.returncode == 0 and f"Continuing from step {step}" in done.stdout, done.stderr


def test_broken_data_is_said_once(tmp_path):
    (tmp_path / "data/mnist").mkdir(parents=True)
    for name in common.IDX:
        (tmp_path / "data/mnist" / name).write_bytes(b"x")
    ended = two("mae.py", "--data", "mnist", "--data-dir", tmp_path / "data", "--out", tmp_path / "run", cwd=tmp_path)
    assert ended.returncode and ended.stderr.count("truncated or broken") == 1 and "Traceback" not in ended.stderr
