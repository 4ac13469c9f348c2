"""What the seven scripts do on a CUDA GPU, in four phases of nine minutes at most.

    make gpu PYTHON=python3               all phases, with a Python that has PyTorch for CUDA
    make gpu ARGS="--phases a b --only gpt mae"
    make gpu ARGS=--quick                 tiny settings, on a CPU, too: to see that it runs

a  correctness. Each script, with its sizes for a GPU: 50 steps, in which the loss has to fall, and
   its evaluation; the same again, but killed in the midst of a step (and of the trainings that come
   before) and resumed, has to end with the same weights (with deterministic kernels); logits with
   the KV cache are those without, and loss and gradients of a batch those of a CPU in float64: both
   within 1e-4 (the latter or three times the error of a CPU's float32), in float32 without TF32.
   Beside that: the CPU's own float32, and bfloat16.
b  plain commands. Each script as `python mae.py` runs it: seconds of training (and of those that
   come before), peak memory, images or tokens per second, and what came out.
c  speed beside transformers, peft and torchvision, in bfloat16, with the same weights, in turns, as
   in the benchmarks (pairs.py): training steps and sampling, as they come, and compiled on both
   sides. What is not installed is skipped.
d  headlines. GPT's loss on Shakespeare (--text; nanoGPT's README: 1.47 in three minutes on an
   A100). CIFAR-10 (--cifar) in the time that is left: SimCLR's linear probe; MAE's, and fine-tuning
   from all labels. GPT-2 124M with random weights: training, as a share of what products of
   matrices reach in bfloat16 (6 flops per weight and token, and attention's); decoding of one text,
   as a share of the memory's bandwidth (weights and cache are read once per token).

Writes   <out>/gpu-<phase>.json, after each measurement. Each runs in a process of its own, so that
         a crash costs only one. What is done is not done again; the same command measures what
         failed, was skipped, or found no time. runs/gpu has the runs and, as .log, their output.
"""
import contextlib
import copy
import importlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import textwrap
import time
import traceback
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import common, pairs, shared                                                   # noqa: E402
from pairs import DEVICE                                                       # noqa: E402

SERVER = multiprocessing.get_context("spawn" if DEVICE == "cuda" else "forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "numpy", "tqdm"])    # no fork with CUDA
SCRIPTS = "gpt", "bert", "mae", "simclr", "autoencoder", "lora", "flamingo"
SHORT = dict(         # beside 50 steps, in phase a
    bert=dict(labels=(5,), tune_steps=20), mae=dict(labels=(20,), tune_steps=20),
    lora=dict(base_steps=50, k=16, epochs=50),
    flamingo=dict(lm_steps=50, vit_steps=50, images=5000, tests=24))
TEXT, IMAGE = dict(dim=32, depth=2, heads=2), dict(image_size=16, batch=16, labels=(1,))
QUICK = dict(         # beside 50 steps, with --quick
    gpt=dict(TEXT, batch=8, context=32, length=8),
    bert=dict(TEXT, batch=8, context=32, vocab=500, labels=(1,), tune_steps=2),
    mae=dict(TEXT, **IMAGE, decoder_dim=16, decoder_depth=1, decoder_heads=2, tune_steps=2),
    simclr=dict(IMAGE, depth=10, width=8, dim=8), autoencoder=dict(IMAGE, width=8, latent=8),
    lora=dict(TEXT, k=16, epochs=50, base_steps=50, base_batch=8, context=32, length=8),
    flamingo=dict(TEXT, batch=8, lm_steps=50, lm_batch=8, vit_steps=50, vit_batch=16, vit_dim=32,
                  vit_depth=1, vit_heads=2, images=500, tests=12, shots=(0, 1)))
GPT2 = dict(vocab=50304, context=1024, dim=768, depth=12, heads=12)    # 50,257 words, rounded up
SMALL = dict(TEXT, vocab=512, context=64)                              # with --quick
BATCH = dict(gpt=8, bert=256, mae=64, lora=64, resnet=128, sample=1)   # in phase c


class Skip(Exception):
    """What cannot be measured here, in a sentence."""


def load(name):
    """A script or a benchmark, as a module."""
    return importlib.import_module(name)


def run(name, out, how):
    """main() of a script in a folder, or what is left of it: its model and its result.json."""
    script = load(name)
    model = script.main(script.Args(**how, out=str(out), resume=(out / "settings.json").exists()))
    return model, json.loads((out / "result.json").read_text())


def new(path):
    """A path where nothing is."""
    shutil.rmtree(path, ignore_errors=True)
    return path


# ------------------------------------------------------------------------------- a. correctness


class Killed(KeyboardInterrupt):
    """What a run dies of here."""


class Deterministic(common.Run):
    """A run with deterministic kernels and a checkpoint in its midst. With a set as `killed` it
    dies five steps later, in the midst of a step, and its folder is put there: each run dies once.
    """
    killed = None

    def __iter__(self):
        torch.use_deterministic_algorithms(True)
        try:
            yield from super().__iter__()
        finally:
            torch.use_deterministic_algorithms(False)

    def log(self, loss):
        half = self.args.steps // 2
        self.args.save_every = 0. if self.step == half else math.inf
        if self.killed is not None and self.step == half + 5 and self.out not in self.killed:
            self.killed.add(self.out)
            raise Killed
        super().log(loss)


def losses(out):
    """{folder of a training: mean loss of its first and of its last five steps}, of a run."""
    logs = {path.parent.name: [json.loads(line)["loss"] for line in path.open()]
            for path in sorted(out.rglob("log.jsonl"))}
    return {name: [statistics.mean(x[:5]), statistics.mean(x[-5:])] for name, x in logs.items()}


def media(m, images):
    """The keys and values of images (B, M, 3, S, S) for a Flamingo."""
    return m.project(m.encode(images.flatten(0, 1)).unflatten(0, images.shape[:2]))


def example(name, model, B=8):
    """A script's inputs and target, on the CPU; and its loss, a function of a model and these."""
    script, loss = load(name), lambda m, *batch: script.distance(m(*batch[:-1]), single(batch[-1]))
    single = lambda x: x.float() if x.is_floating_point() else x     # as distance() makes logits
    images = lambda vit, patch: torch.randn(B, 3, *(patch * side for side in vit.grid))
    torch.manual_seed(1)
    if name == "simclr":
        views = script.augment(torch.rand(B, 3, 32, 32).repeat(2, 1, 1, 1)) - .5
        return [views], lambda m, x: script.ntxent(*m(x).chunk(2), .2)
    if name == "autoencoder":
        x = torch.randn(B, 3, *[model.image_size] * 2)
        return [x], lambda m, x: script.distance(m(x)[0], single(x))
    if name == "mae":
        inputs, target = script.mask(images(model.encoder, 4), 4, .75)
        return [*inputs, target], loss
    if name == "bert":
        V, T = len(model.mlm_bias), len(model.pos_embed.weight)
        x = script.add_special_tokens(torch.randint(script.FIRST_WORD, V, (B, T - 2)))
        inputs, target = script.mask(x, torch.arange(T).expand_as(x), V)
        return [*inputs, target], loss
    if name == "flamingo":
        V, T = len(model.lm.token_embed.weight), len(model.lm.pos_embed.weight)
        x = torch.randint(2, V, (B, T + 1)).masked_fill(torch.arange(T + 1) % 20 == 3, model.image)
        inputs, target = script.mask(x, model.image)
        x = torch.stack([images(model.vit, model.patch) for _ in range(T // 20 + 1)], 1)
        return [inputs, x, target], lambda m, x, images, y: script.distance(
            m(x, media(m, images)), y)
    inputs, target = script.mask(torch.randint(256, (B, len(model.pos_embed.weight))), 256)
    return [inputs, target], loss                                                   # gpt, lora


def gradients(name, model, device, dtype):
    """The loss of an example, as a list, and its gradients, a list of float64 tensors on the CPU,
    in "float32", "float64" or "bfloat16" (autocast) on a device; without dropout."""
    kind = torch.float64 if dtype == "float64" else torch.float32
    m, (batch, loss) = copy.deepcopy(model).to(device, kind), example(name, model)
    m.train(name == "simclr")                                        # for BatchNorm, as in training
    smooth = lambda x, inplace=False: torch.nn.functional.silu(x)    # ReLU's gradient jumps at 0,
    with contextlib.ExitStack() as stack:                            # where rounding decides
        stack.enter_context(mock.patch("torch.nn.functional.relu", smooth))
        if dtype == "bfloat16":
            stack.enter_context(pairs.autocast(dtype))
        value = loss(m, *(x.to(device, kind if x.is_floating_point() else None) for x in batch))
    m.zero_grad()
    value.backward()
    found = [p.grad for p in m.parameters() if p.grad is not None]
    return [[x.detach().double().cpu() for x in part] for part in ([value], found)]


def error(found, expected):
    """The largest distance of a tensor from the expected one, as a fraction of its norm, or of a
    thousandth of the largest norm, if that is more."""
    norms = [x.norm() for x in expected]
    return max(((x - y).norm() / max(norm, max(norms) / 1000)).item()
               for x, y, norm in zip(found, expected, norms))


def cached(name, model):
    """error() of float32 logits with the KV cache, of a prompt and then token by token, from those
    without it."""
    (x, *rest), _ = example(name, model, B=2)
    x, lm, part = x[:, :48].to(DEVICE), model, lambda a, b, cache: model(x[:, a:b], cache)
    if name == "flamingo":
        lm, keys = model.lm, media(model, rest[0].to(DEVICE))
        part = lambda a, b, cache: model(x[:, a:b], keys, cache,
                                         (x[:, :a] == model.image).sum(1, keepdim=True))
    cache, T = lm.new_cache(2), x.shape[1]
    parts = [part(0, T // 2, cache), *(part(t, t + 1, cache) for t in range(T // 2, T))]
    return error([torch.cat(parts, 1)], [part(0, T, None)])


def correct(own, name, seconds):
    """Phase a: a script is trained twice, and its model computes the same in several ways."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"             # deterministic matrix products
    how = settings(own, name) if own.quick else dict(steps=50) | SHORT.get(name, {})
    folder, killed, states, near = new(own.runs / f"a-{name}"), set(), [], {}
    for part, dies in ("whole", None), ("killed", killed):
        out, model = folder / part / "run", None     # apart: neither finds the other's base
        with mock.patch.object(common, "Run", Deterministic), \
                mock.patch.object(Deterministic, "killed", dies):
            while model is None:
                with contextlib.suppress(Killed):
                    model, result = run(name, out, how)
        states.append(common.read_checkpoint(out)["model"])
    loss = losses(folder / "whole")
    torch.set_float32_matmul_precision("highest")                 # no TF32
    torch.backends.cudnn.allow_tf32 = False
    exact = gradients(name, model, "cpu", "float64")
    for key, *where in [("float32", DEVICE, "float32"), ("CPU", "cpu", "float32"),
                        ("bfloat16", DEVICE, "bfloat16")]:
        near[key] = max(map(error, gradients(name, model, *where), exact))
    if name in ("gpt", "flamingo"):
        with torch.no_grad():
            near["cache"] = cached(name, model.eval())
    checks = {"the loss falls": all(b < a for a, b in loss.values()),
              "each training was killed": len(killed) == len(loss),
              "the same weights": all(x.equal(states[1][key]) for key, x in states[0].items()),
              "float32 as on a CPU": near["float32"] < max(1e-4, 3 * near["CPU"]),
              "logits with the cache": near.get("cache", 0.) < 1e-4}
    wrong = "".join(f"NOT: {check}; " for check, right in checks.items() if not right)
    return dict(checks=checks, loss=loss, errors=near, result=result, summary=wrong
                + f"loss {loss['run'][0]:.2f} -> {loss['run'][1]:.2f}, killed {len(killed)} x"
                + "".join(f"; {key} {value:.0e}" for key, value in near.items()))


# ---------------------------------------------------------------------------- b. plain commands


def peak_mb():
    """The most memory so far, in MB: on a GPU of PyTorch's, else of this process."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def plain(own, name, seconds):
    """Phase b: a script's plain command. A run that found too little time is continued."""
    out, began = own.runs / f"b-{name}", time.monotonic()
    _, result = run(name, out, settings(own, name) if own.quick else {})
    args, took, whole = result["settings"], result["seconds"], time.monotonic() - began
    tokens = args.get("example" if name == "lora" else "context")
    unit = "tokens" if tokens else "images"
    rate = args["steps"] * args["batch"] * (tokens or 1) / max(took, .1)
    before = {path.parent.name: json.loads(path.read_text().splitlines()[-1])["seconds"]
              for path in sorted(out.glob("*/log.jsonl"))}
    return dict(seconds=took, before=before, whole=whole, peak_mb=peak_mb(), rate=rate, unit=unit,
                result=result, summary=f"{took:.0f} s"
                + "".join(f", {part} {s:.0f} s" for part, s in before.items())
                + f"; {peak_mb():,.0f} MB; {rate:,.0f} {unit}/s; {result['summary']}")


# ------------------------------------------------------------------------ c. beside other packages


def compiled(loss, model, dtype, ours=True):
    """pairs.training of a compiled model."""
    model.compile()
    return pairs.training(loss, model, dtype, ours)


def compiling(peer):
    """bench_gpt.peer, with our model compiled, and theirs made to compile itself in generate()."""
    def build(ours, **sizes):
        theirs = peer(ours, **sizes)
        theirs.generation_config.cache_implementation = "static"
        ours.compile()
        return theirs
    return build


def gpt_step(bench, dtype, B, how):
    """A training step of our GPT and of transformers'."""
    torch.manual_seed(0)
    ours = bench.gpt.GPT(**how).to(DEVICE)
    theirs, V = bench.peer(ours, **how).train(), how["vocab"]
    inputs, target = bench.gpt.mask(torch.randint(V, (B, how["context"]), device=DEVICE), V - 1)
    our_loss = lambda: bench.gpt.distance(ours(inputs), target)
    their_loss = lambda: bench.gpt.distance(theirs(inputs).logits, target)
    with torch.no_grad():
        pairs.agree("the loss", our_loss(), their_loss(), 1e-3)
    return (bench.training(our_loss, ours, dtype),
            bench.training(their_loss, theirs, dtype, ours=False))


def resnet_step(bench, dtype, B, size):
    """A training step of our ResNet-18 and of torchvision's, both in channels_last."""
    import torchvision
    torch.manual_seed(0)
    ours, theirs = bench.simclr.ResNet(18, 64, 7, 1000), torchvision.models.resnet18()
    theirs.load_state_dict(ours.state_dict())
    models = [model.to(DEVICE, memory_format=torch.channels_last) for model in (ours, theirs)]
    x = torch.randn(B, 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)
    losses = [lambda model=model: model(x).float().square().mean() for model in models]
    pairs.agree("the loss", *(loss() for loss in losses), 1e-3)
    return [bench.training(loss, model, dtype) for loss, model in zip(losses, models)]


def beside(own, name, seconds):
    """Phase c: what pairs.pair() finds for one kind of work, eager or compiled on both sides. The
    benchmarks' own sizes are for a CPU: what they read is set to larger ones, in this process."""
    (kind, how), q = name.split(), own.quick
    bench = load(f"bench_{dict(sample='gpt', resnet='simclr').get(kind, kind)}")
    classes = ["torchvision.models"] if kind == "resnet" else next(iter(bench.NEEDS.values()))
    for needed in classes:
        if why := pairs.missing(needed):
            raise Skip(f"{needed} cannot be imported ({why})")
    dtype, rounds, B = pairs.DTYPES[-1], 2 if q else 20, 1 if q else BATCH[kind]
    bench.B = bench.BATCH = B
    bench.training = compiled if how == "compiled" else pairs.training
    if kind == "gpt":
        sides = gpt_step(bench, dtype, B, SMALL if q else bench.GPT2)
    elif kind == "bert":
        sides = bench.sides("full", dtype)
    elif kind == "resnet":
        sides = resnet_step(bench, dtype, B + q, 32 if q else 224)
    elif kind == "sample":
        bench.peer = compiling(bench.peer) if how == "compiled" else bench.peer
        sides = bench.sampling(dtype, SMALL if q else bench.GPT2, B, 8 if q else 256)[2:]
    if kind == "mae":
        what, size, patch, _, *sizes = bench.CASES["tiny" if q else "base"]
        bench.CASES["gpu"] = what, size, patch, B, *sizes
        (found,) = bench.measure("gpu", dtype, rounds)
    else:
        found = bench.timed_step(dtype, True, rounds) if kind == "lora" else \
            pairs.pair(*sides, rounds)
    (low, high), other = found["quartiles"], classes[-1].split(".")[0]
    return found | dict(case=f"{name}, batch {B}", dtype=dtype, beside=other, summary=f"{dtype}, "
                        f"{found['ours_ms']:.1f} ms; {other} {found['theirs_ms']:.1f} ms, "
                        f"{found['ratio']:.2f} times as long [{low:.2f} to {high:.2f}]")


# --------------------------------------------------------------------------------- d. headlines


class Timed(common.Run):
    """A run of `budget` seconds: after 60 steps it sets how many there are, by the last 40."""
    budget = 0.

    def __iter__(self):
        began, marks = time.monotonic(), {}
        for step in super().__iter__():
            if step in (20, 60):
                pairs.timed(lambda: None)                               # waits for the GPU
                marks[step] = time.monotonic()
            if step == 60:
                left = self.budget - (marks[60] - began)
                self.args.steps = 61 + max(0, int(40 * left / (marks[60] - marks[20])))
            yield step


def cifar(own, name, seconds, **how):
    """A script trained on --cifar for so many seconds: its settings, model and result. With --quick
    a small model, without --cifar on drawn shapes."""
    if not own.cifar and not own.quick:
        raise Skip("there is no CIFAR-10: --cifar FILE.npz, with x_train, y_train, x_test, y_test")
    out, script = new(own.runs / f"d-{name}"), load(name)
    how |= settings(own, name) if own.quick else {}
    how |= dict(steps=20_000) | (dict(data=own.cifar) if own.cifar else {})
    with mock.patch.object(common, "Run", Timed), mock.patch.object(Timed, "budget", seconds):
        args = common.resolve(script.Args(out=str(out), **how))
        return args, script.main(args), json.loads((out / "result.json").read_text())


def probed(args, f, images):
    """Accuracy in % of a linear probe of all training images' labels on the features f."""
    parts = zip((images.train, images.test), images.class_labels())
    return common.probe(*(x for part, labels in parts
                          for x in (common.encode(args, f, images, part), labels)))


def simclr(own, seconds):
    """SimCLR with its views for CIFAR-10, in all but a minute of the time; a linear probe."""
    args, model, result = cifar(own, "simclr", 3 if own.quick else seconds - 60, batch=512,
                                jitter=.5, hue=.1, crop_scale=.08, temperature=.5, labels=(1,))
    right = probed(args, model.encoder, common.load_images(args))
    return dict(accuracy=right, result=result, summary=f"{Path(args.data).name}, "
                f"{result['seconds']:.0f} s: linear probe {right:.1f} %")


def mae(own, seconds):
    """MAE's ViT-Tiny in half of the time; a linear probe; fine-tuning from all labels, in a third
    of the time, without augmentation."""
    args, model, result = cifar(own, "mae", 3 if own.quick else seconds / 2, batch=512, patch=2,
                                decoder_dim=192, tune="linear", labels=(1,))
    images, f = common.load_images(args), load("mae").MeanPooled(model.encoder, args.patch)
    linear, (labels, test_labels) = probed(args, f, images), images.class_labels()
    tune = lambda steps: common.finetune(args, copy.deepcopy(f), images, images.train, labels,
                                         test_labels, steps, args.tune_lr, batch=256)
    tune(5)
    each = (pairs.timed(lambda: tune(50)) - pairs.timed(lambda: tune(10))) / 40
    steps = max(1, int((1 if own.quick else seconds / 3) / max(each, 1e-3)))
    began, tuned = time.monotonic(), tune(steps)
    took = time.monotonic() - began
    return dict(linear=linear, tuned=tuned, tune_steps=steps, tune_seconds=took, result=result,
                summary=f"{Path(args.data).name}, {result['seconds']:.0f} s: linear probe "
                f"{linear:.1f} %; fine-tuned, {took:.0f} s, {tuned:.1f} %")


def shakespeare(own, seconds):
    """gpt.py's plain settings, with Muon, at the sizes that nanoGPT has for this text; the loss on
    its last tenth."""
    text = Path(own.text or Path(common.Args.data_dir, "tinyshakespeare.txt"))
    if not text.exists() and not own.quick:
        raise Skip(f"there is no Shakespeare: --text FILE (or {text})")
    how = settings(own, "gpt") if own.quick else {}
    how |= dict(data=str(text)) if text.exists() else {}
    _, result = run("gpt", new(own.runs / "d-shakespeare"), how)
    loss = result["figures"]["loss"]
    return dict(loss=loss, result=result,
                summary=f"{result['seconds']:.0f} s: {loss:.4f} nats per token")


def matrix_rate(n):
    """Flops per second of products of bfloat16 matrices (n, n), the best of ten times ten."""
    a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
    return 20 * n ** 3 / min(pairs.timed(lambda: [a @ b for _ in range(10)]) for _ in range(10))


def copy_rate(size):
    """Bytes per second, read and written, of copies of so many bytes, the best of ten."""
    a, b = (torch.ones(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * size / min(pairs.timed(lambda: a.copy_(b)) for _ in range(10))


def weights_read(model):
    """How many weights of a GPT a token needs: all but the positions."""
    return sum(p.numel() for p in model.parameters()) - model.pos_embed.weight.numel()


def training(own, seconds):
    """GPT-2 124M: tokens per second of training steps, and their share of the matrix rate."""
    gpt, how, rows = load("gpt"), SMALL if own.quick else GPT2, []
    best, T = matrix_rate(256 if own.quick else 8192), how["context"]
    for B, fast in [(2, False)] if own.quick else [(32, False), (32, True), (64, True)]:
        torch.manual_seed(0)
        torch.compiler.reset()
        model, distance = gpt.GPT(**how).to(DEVICE), gpt.distance
        if fast:
            model.compile()
            distance = torch.compile(distance)
        optimizer = common.adamw(model.parameters(), 6e-4, .1)
        x = torch.randint(how["vocab"], (B, T), device=DEVICE)

        def five():
            for _ in range(5):
                inputs, target = gpt.mask(x, 0)
                with pairs.autocast("bfloat16"):
                    loss = distance(model(inputs), target)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
                optimizer.step()
                optimizer.zero_grad()
        flops = 6 * weights_read(model) + 12 * how["depth"] * how["dim"] * T         # of a token
        with contextlib.suppress(torch.OutOfMemoryError):
            rate = 5 * B * T / statistics.median([pairs.timed(five) for _ in range(6)][1:])
            rows.append(dict(batch=B, compiled=fast, tokens_per_second=rate, peak_mb=peak_mb(),
                             share=100 * rate * flops / best))
    row = max(rows, key=lambda row: row["share"])
    return dict(rows=rows, flops_per_token=flops, matrix_rate=best, summary=f"{row['share']:.1f} % "
                f"of {best / 1e12:.2f} TFLOP/s, {row['tokens_per_second']:,.0f} tokens/s, batch "
                f"{row['batch']}{', compiled' * row['compiled']}")


def captured(f):
    """All that f() launches as one CUDA graph: a function, with what f() returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        f(), f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = f()
    return lambda: (graph.replay(), found)[1]


def decoding(own, seconds):
    """GPT-2 124M in bfloat16 writes a text: gpt.sample, and its greedy loop as one CUDA graph; then
    both with a compiled model. Tokens per second, and the share of the bandwidth."""
    gpt, how, n = load("gpt"), SMALL if own.quick else GPT2, 16 if own.quick else 256
    torch.manual_seed(0)
    model, best = gpt.GPT(**how).to(DEVICE).eval().bfloat16(), copy_rate(2 ** 20 if own.quick else
                                                                         2 ** 31)
    prompt = torch.randint(256, (1, 16), device=DEVICE)
    size = 2 * (weights_read(model) + 2 * how["depth"] * how["dim"] * (16 + n / 2))    # of a token

    @torch.inference_mode()
    def greedy():
        cache, x, tokens = model.new_cache(1), prompt, []
        for _ in range(n):
            x = model(x, cache)[:, -1].argmax(1, keepdim=True)
            tokens.append(x)
        return torch.cat(tokens, 1)
    expected, rows, cuda = greedy(), {}, DEVICE == "cuda"
    for way in ["sample", *["graph"] * cuda, "compiled sample", *["compiled graph"] * cuda]:
        if way == "compiled sample":
            model.compile()
        try:
            f = captured(greedy) if "graph" in way else lambda: gpt.sample(model, prompt, n, 0.)
            same = (f() == expected).float().mean().item()
            rate = n / statistics.median(pairs.timed(f) for _ in range(6))
            rows[way] = dict(tokens_per_second=rate, share=100 * rate * size / best, same=same)
        except Exception as why:                                  # the other ways can be measured
            rows[way] = dict(failed=f"{type(why).__name__}: {why}"[:300])
    return dict(rows=rows, bytes_per_token=size, copy_rate=best, summary=f"{best / 1e12:.2f} TB/s"
                + "".join(f"; {way} {row['share']:.1f} %, {row['tokens_per_second']:,.0f} tokens/s"
                          if "share" in row else f"; {way} FAILED" for way, row in rows.items()))


# ---------------------------------------------------------------------------------- the program

HEADLINES = dict(shakespeare=shakespeare, training=training, decoding=decoding, simclr=simclr,
                 mae=mae)
PHASES = dict(        # what it shows, how it is measured, and minutes that each measurement needs
    a=("correctness", correct, dict.fromkeys(SCRIPTS, 1) | dict(flamingo=2)),
    b=("plain command", plain, dict.fromkeys(SCRIPTS, 1)),
    c=("beside others", beside, {f"{kind} {how}": 1 for how in ("eager", "compiled") for kind in
                                 ("gpt", "bert", "mae", "lora", "resnet", "sample")}),
    d=("headline", lambda own, name, seconds: HEADLINES[name](own, seconds),
       dict(shakespeare=4, training=3, decoding=2, simclr=8.5, mae=8.5)))


def settings(own, name):
    """The settings of a script for --quick."""
    data = dict(data=str(own.runs / "shapes.npz")) if "image_size" in QUICK[name] else {}
    return dict(steps=50) | QUICK[name] | data


def options(argv=None):
    """The command line."""
    parser = common.Parser(prog="gpu.py", description=__doc__, allow_abbrev=False,
                           formatter_class=common.argparse.RawDescriptionHelpFormatter)
    add, known = parser.add_argument, {name for *_, names in PHASES.values() for name in names}
    add("--phases", nargs="+", default=[*PHASES], choices=PHASES, metavar="a|b|c|d", help="[all]")
    add("--only", nargs="+", default=known, choices=known, metavar="NAME",
        help="what to measure, such as gpt, or 'gpt eager' [all]")
    add("--minutes", type=float, default=9., metavar="X", help="at most, for each phase [9]")
    add("--out", type=Path, metavar="FOLDER",
        help="where the figures are [results; with --quick runs/gpu-quick]")
    add("--text", default="", metavar="FILE", help="Shakespeare [tinyshakespeare.txt in $DATA_DIR]")
    add("--cifar", default="", metavar="FILE", help="CIFAR-10 as an .npz")
    add("--quick", action="store_true", help="tiny settings, on a CPU, too")
    own = parser.parse_args(argv)
    if DEVICE != "cuda" and not own.quick:
        parser.error("there is no CUDA GPU here: --quick shows on a CPU that it runs")
    own.out = own.out or Path("runs/gpu-quick" if own.quick else "results")
    own.runs = own.out / "runs" if own.quick else Path("runs/gpu")
    return own


def measure(own, phase, name, seconds, log, file):
    """In a process of its own: the figures of a measurement, or why there are none, into a file."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    try:
        found = PHASES[phase][1](own, name, seconds)
    except Skip as why:
        found = dict(skipped=str(why))
    except Exception as why:
        traceback.print_exc()
        found = dict(failed=f"{type(why).__name__}: {why}")
    with common.replacing(file) as f:
        f.write(json.dumps(found).encode())


def measured(own, phase, name, seconds):
    """The figures of a measurement, or why there are none within so many seconds."""
    log = own.runs / f"{phase}-{name.replace(' ', '-')}.log"
    file = log.with_suffix(".json")
    file.unlink(missing_ok=True)
    process = SERVER.Process(target=measure, args=(own, phase, name, seconds, log, file))
    process.start()
    try:
        process.join(seconds)
        late = process.is_alive()
        process.terminate()                                # a run that still goes on saves first
        process.join(15)
    finally:
        process.kill()
    if file.exists():
        return json.loads(file.read_text())
    return dict(skipped="no time was left") if late else dict(
        failed=f"it ended with status {process.exitcode}: {log}")


def done(figures):
    """Whether these are figures of a measurement."""
    return bool(figures) and not {"failed", "skipped"} & figures.keys()


def begun(own, phase):
    """What the file of a phase holds, or a new result. Raises UserError if it is of another
    machine."""
    path, start = own.out / f"gpu-{phase}.json", shared.new_result(
        [f'make gpu ARGS="--phases {phase}{" --quick" * own.quick}"'], {},
        dict(phase=phase, quick=own.quick), DEVICE)
    if not path.exists():
        return start
    old = json.loads(path.read_text())
    differ = [key for key in ("machine", "versions", "settings") if old[key] != start[key]]
    common.require(not differ, f"{path} has another {', '.join(differ)}: choose another --out")
    return old


def lines(phase, name, f):
    """The rows of the table for a measurement."""
    text = f.get("summary") or "; ".join(f"{key}: {f[key]}" for key in ("failed", "skipped")
                                         if key in f)
    first, *rest = textwrap.wrap(text, 58, break_on_hyphens=False) or [""]
    return [[f"{phase} {name}", first.ljust(58)], *(["", line.ljust(58)] for line in rest)]


def main(own):
    own.out.mkdir(parents=True, exist_ok=True), own.runs.mkdir(parents=True, exist_ok=True)
    if own.quick:
        x, labels = common.shapes(1000, size=16)
        x, y = x.permute(0, 2, 3, 1).numpy(), labels["shape"].numpy()
        common.np.savez(own.runs / "shapes.npz", x_train=x[200:], y_train=y[200:], x_test=x[:200],
                        y_test=y[:200])
    rows, wrong = [["", ""]], False
    for phase in own.phases:
        (what, _, names), result, began = PHASES[phase], begun(own, phase), time.monotonic()
        figures = result["figures"]
        for name in [name for name in names if name in own.only and not done(figures.get(name))]:
            left = 60 * own.minutes - (time.monotonic() - began)
            if time.monotonic() - began > 1 and left < names[name] * (6 if own.quick else 60):
                figures[name] = dict(skipped="no time was left")
            else:
                common.say(f"{what}: {name}")
                figures[name] = measured(own, phase, name, left)
            result["seconds"] += left - (60 * own.minutes - (time.monotonic() - began))
            result["summary"] = f"{what}: {', '.join(n for n in figures if done(figures[n]))}"
            shared.save(own.out / f"gpu-{phase}.json", result)
        rows += [row for name, f in figures.items() for row in lines(phase, name, f)]
        wrong |= any("failed" in f or "NOT: " in f.get("summary", "") for f in figures.values())
    common.say(f"\n{common.machine(DEVICE)}, torch {torch.__version__}\n{common.table(rows)}\n\n"
               f"Figures: {own.out}/gpu-*.json")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    own = options()
    common.guarded(main, own, "gpu.py")
