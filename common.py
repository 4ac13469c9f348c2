"""What the seven scripts share: settings, data, the code around a training loop, linear probes and
fine-tuning, output. It contains no model, loss, mask, augmentation or sampler.

    settings     Args, setup, cli         a dataclass of settings, also used as the command line
    the machine  find_device, autocast    device, bfloat16, several processes
    training     optimizer, Muon, Run     schedule, log, checkpoints, exact resume
    evaluation   k_shot, probe, finetune  accuracies with k labels per class
    data         load_images              uint8 images on the device, with their labels
                 draw, shapes             the embedded images: ten shapes, drawn in a second
                 scene, paint, caption    scenes of several figures, as images and as words
                 load_text                documents as bytes; the embedded ones are Python's own
                 Bytes, Words             tokenizers: one token per byte, or one per word
    weights      read_weights, published  published weights, under a script's names
    output       save_png, save_curve     pictures; table, report: what a run prints and keeps

`python common.py` prints a table of all runs under runs/.
Letters: B batch, C channels, S side of an image in pixels; images are (B, 3, S, S).
"""
import argparse
import collections
import contextlib
import dataclasses
import difflib
import functools
import gzip
import hashlib
import http.client
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import struct
import string
import sys
import sysconfig
import tarfile
import textwrap
import threading
import time
import traceback
import typing
import unicodedata
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

# ---------------------------------------------------------------------------------- settings


class UserError(ValueError):
    """A mistake that the user can correct. The command line shows it without a traceback."""


class UsageError(UserError):
    """An invalid setting. The exit status is 2."""


def require(condition, sentence, error=UserError):
    """Raises error(sentence) if the condition is false."""
    if not condition:
        raise error(sentence)


@dataclass
class Args:
    """Settings of every script, one per line: name, type and default. The comment is the help text,
    and gives the range unless it is the usual one: int 1 or more, float 0 or more and finite."""
    steps: int = 4000            # training steps, 0 or more
    batch: int = 256             # examples per step
    lr: float = 1e-3             # peak learning rate
    warmup: float = 0.05         # fraction of steps in which the learning rate rises, in [0, 1]
    weight_decay: float = 0.05   # weight decay, on matrices only
    clip: float = 1.0            # maximum gradient norm, in (0, inf]; inf: no clipping
    seed: int = 0                # seed of the training (not of the choice of labels), in [0, 1e9]
    data: str = "shapes"         # shapes, cifar10, fashion-mnist, mnist, an .npz file or a folder
    data_dir: str = os.environ.get("DATA_DIR", "data")   # folder for downloads ($DATA_DIR)
    out: str = ""                # folder for the results [runs/<script>, runs/<script>-2, ...]
    device: str = "auto"         # cuda, mps or cpu; auto: the first that is available
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"   # auto: bfloat16 where it is native
    compile: bool = False        # compile the model with torch.compile (for long runs on a GPU)
    resume: bool = False         # continue the run in --out, or the newest run if none is given
    save_every: float = 30.0     # seconds between checkpoints
    accumulate: int = 1          # split each batch into this many parts, to save memory

    cpu = {}                     # not a setting (no annotation): defaults that differ without a GPU
    published = {}               # defaults that differ with --weights, on any device

    def __new__(cls, *args, **given):
        self = super().__new__(cls)
        self.given = set(given)          # `cpu` and --resume do not change these
        return self

    @property
    def uses_published(self):
        """Whether the run starts from published weights (--weights, or a --base that is no run)."""
        base = getattr(self, "base", "")
        return bool(getattr(self, "weights", "") or base and not has_run(base))


def flag(name):
    """The flag of a setting: mask_ratio -> --mask-ratio."""
    return "--" + name.replace("_", "-")


def typed(value):
    """A setting as typed on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def comments(Args):
    """{setting: the comment on its line}, from the source of the class and its parents."""
    text = {}
    for cls in reversed(Args.__mro__[:-1]):
        with contextlib.suppress(OSError, TypeError):      # a class in a notebook has no source
            # getsource(cls) would do, but it parses the whole module, in 0.1 s.
            source = inspect.getsource(sys.modules[cls.__module__])
            body = re.search(rf"^class {cls.__name__}\b.*?(?=^\S|\Z)", source, re.M | re.S)
            text.update(re.findall(r"^    (\w+):.*?\S\s+# (.*)$", body[0] if body else "", re.M))
    return text


def kind_of(field):
    """The type of a setting's values, and whether it takes several: tuple[int, ...] -> (int, True).
    """
    many = typing.get_origin(field.type) is tuple
    return (typing.get_args(field.type)[0] if many else field.type), many


TYPES = {bool: bool, int: (int, np.integer), float: (int, float, np.integer, np.floating),
         str: (str, os.PathLike)}


def wrong(x, kind, comment):
    """What the value x should be by the type and comment of its setting; None if it is valid."""
    if choices := typing.get_args(kind):                          # a Literal
        return None if x in choices else f"one of {', '.join(map(str, choices))}"
    if not isinstance(x, TYPES[kind]):
        return f"of type {kind.__name__}"
    if kind in (bool, str):
        return None
    if found := re.search(r"in ([\[(])(\S+), (\S+)([\])])", comment):
        low, high = float(found[2]), float(found[3])
        ends = [low] * (found[1] == "[") + [high] * (found[4] == "]")
        return None if low < x < high or x in ends else found[0]
    found = re.search(r"(\d+) or more", comment)
    low = int(found[1]) if found else int(kind is int)
    return None if low <= x < math.inf else f"{low} or more"


def check(args):
    """Raises UsageError for a value that has another type than its setting, or is outside the range
    in the comment. Converts lists, paths and NumPy numbers, which may be given from Python.
    """
    text = comments(type(args))
    for f in dataclasses.fields(args):
        (kind, many), value = kind_of(f), getattr(args, f.name)
        values = list(value) if many and isinstance(value, (tuple, list)) else [value]
        require(values, f"{flag(f.name)} needs a value", UsageError)
        for x in values:
            must = wrong(x, kind, text.get(f.name, ""))
            require(not must, f"{flag(f.name)} must be {must}, not {x!r}", UsageError)
        values = [kind(x) if kind in (int, float, str) else x for x in values]
        setattr(args, f.name, tuple(values) if many else values[0])


class Parser(argparse.ArgumentParser):
    """Reports an error in one sentence, suggests the nearest flag, and exits with status 2."""

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ")
            word = word.split()[0] if word.strip() else repr(word)
            near = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, 1)
            message = f"unknown flag {word}" + (f", did you mean {near[0]}?" if near else "")
        elif found := re.match(r"argument (--[\w-]+)/.* ignored explicit argument", message):
            message = f"{found[1]} takes no value: it is {found[1]} or --no-{found[1][2:]}"
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def parser_of(Args):
    """An argparse parser with a flag for each field, whose help is the comment on its line."""
    doc, text, name = sys.modules[Args.__module__].__doc__ or "", comments(Args), script(Args)
    parser = Parser(
        prog=name, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        usage="%(prog)s [--flag value ...]", description=doc.split("\n\n")[0],
        epilog=f"At the top of {name}: how it works, what to expect, what to try.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=80))
    own = parser.add_argument_group(f"settings of {name}")
    shared = parser.add_argument_group("settings of every script")
    for f in dataclasses.fields(Args):
        kind, many = kind_of(f)
        how = dict(type=kind, metavar={int: "N", float: "X"}.get(kind, "TEXT"))
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            how = dict(type=type(choices[0]), choices=choices, metavar="|".join(map(str, choices)))
        if many:
            how["nargs"] = "+"
        help = text.get(f.name, "").replace("%", "%%")
        if kind is bool:
            help += " [yes]" if f.default else " [no]"
        elif f.default != "":
            smaller = f"; on a CPU {typed(Args.cpu[f.name])}" if f.name in Args.cpu else ""
            help += f" [{typed(f.default)}{smaller}]"
        group = shared if f.name in Args.__mro__[-2].__annotations__ else own
        group.add_argument(flag(f.name), help=help, **how)
    return parser


def script(args):
    """The name of the script whose settings these are, such as mae.py."""
    module = sys.modules[getattr(args, "__module__", type(args).__module__)]
    file = Path(getattr(module, "__file__", None) or "")
    return file.name if file.is_file() else "notebook"


def resolve(args):
    """A copy of the settings with device, folder and sizes filled in. By increasing priority: the
    default, that for a CPU or for published weights, that of a resumed run, and a given value.
    Raises UserError."""
    usual = {f.name: f.default for f in dataclasses.fields(args)}
    given = {name: getattr(args, name) for name in usual
             if name in args.given or getattr(args, name) != usual[name]}
    device = find_device(args.device)
    published = args.uses_published
    smaller = type(args).published if published else type(args).cpu
    if args.resume or not published and not device.startswith("cpu"):
        smaller = {}
    out, saved = saved_run(args) if args.resume else (args.out, {})
    saved = {name: saved[name] for name in usual.keys() & saved.keys() - {"resume", "data_dir"}}
    values = usual | smaller | saved | given | dict(out=out, device=device)
    args = dataclasses.replace(args, **values)
    check(args)
    used = " ".join(f"{flag(k)} {typed(v)}" for k, v in smaller.items()
                    if k not in given and v != "")
    if used:
        say(f"Settings for {'published weights' if published else 'a CPU'}: {used} (flags you give "
            "win).")
    return args


def setup(main):
    """Decorator of a script's main(args): resolves the settings, claims a folder for the run and
    sets the seed, so that main can also be called from a notebook, where errors are raised. A run
    that ends before it has saved anything leaves no folder."""
    @functools.wraps(main)
    def run(args):
        start_processes(args)
        args = resolve(args)
        new = None if args.resume or rank() else claim(args)
        if processes() > 1:
            dist.broadcast_object_list(out := [args.out])
            args.out = out[0]
        torch.set_float32_matmul_precision("high")          # TF32 on GPUs that have it
        torch.manual_seed(args.seed)
        try:
            model = main(args)
            if processes() > 1:
                dist.destroy_process_group()
            return model
        except KeyboardInterrupt:
            kept = f": python {script(args)} --resume --out {args.out} continues it"
            with contextlib.suppress(OSError):              # the terminal may be gone
                rank() or print(f"\nStopped{kept if has_run(args.out) else ''}", file=sys.stderr)
            raise
        finally:
            if new and not has_run(args.out):
                shutil.rmtree(args.out, ignore_errors=True)
            elif new is False and not has_run(args.out):    # the folder existed before
                for name in "settings.json", "log.jsonl":
                    Path(args.out, name).unlink(missing_ok=True)
    return run


def cli(main, Args, argv=None):
    """The command line of a script: calls main(args) with args from the flags."""
    given = vars(parser_of(Args).parse_args(argv))
    args = Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    guarded(main, args, script(args))


def guarded(main, args, name):
    """Calls main(args) of the program `name`. A user's mistake is printed as one sentence and exits
    with status 1, or 2 for a flag; a signal that stops the run keeps its usual status."""
    if hasattr(sys.stdout, "reconfigure"):
        with contextlib.suppress(OSError):              # the descriptor is closed
            sys.stdout.reconfigure(errors="replace")    # terminals without UTF-8
    on_signals(interrupt)
    try:
        main(args)
    except ValueError as error:
        if not ours(error):
            raise
        if rank() == 0:
            print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except (MemoryError, RuntimeError) as error:        # NumPy's; PyTorch's
        if not re.search("out of memory|can't allocate memory|MemoryError", repr(error)):
            raise
        sys.exit(f"{name}: the memory is not enough for these settings: take a smaller --batch, or "
                 "a smaller model")
    except OSError as error:                            # a full disk, a missing folder
        where = error.filename or getattr(args, "out", "") or "runs"
        sys.exit(f"{name}: {error.strerror or error} ({where})")
    except KeyboardInterrupt as error:      # die by the signal, to end a loop in a shell, too
        number = error.args[0] if error.args else signal.SIGINT
        sys.stderr.flush()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def ours(error):
    """Whether code of this folder raised a ValueError on purpose. Otherwise it is a bug."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    here = Path(last.filename).resolve().parent == Path(__file__).resolve().parent
    return isinstance(error, UserError) or here and last.line.startswith("raise ValueError(")


def on_signals(handler):
    """Sets the handler of the signals that stop a run: Ctrl-C, and those of batch systems or closed
    terminals. Returns {signal: previous handler}. Ignored signals (nohup) stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
               if hasattr(signal, name)]
    return {number: signal.signal(number, handler) for number in numbers
            if signal.getsignal(number) not in (signal.SIG_IGN, None)}


def interrupt(number, frame):
    """Signal handler: raises KeyboardInterrupt with the number of the signal."""
    raise KeyboardInterrupt(number)


def say(text="", width=80):
    """Prints text and wraps lines longer than `width` columns. If the output is closed (`| head`, a
    closed terminal), the run continues without printing."""
    wrap = textwrap.TextWrapper(width, break_on_hyphens=False, break_long_words=False).fill
    lines = [line if len(line) <= width else wrap(line) for line in text.split("\n")]
    if rank():
        return
    try:
        print("\n".join(lines), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ------------------------------------------------------------------------------- the machine


def find_device(name):
    """'auto' or the name of a device -> the name of an available device."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    there += ["cpu"]
    if name == "auto":
        local = f":{os.environ['LOCAL_RANK']}" if there[0] == "cuda" and processes() > 1 else ""
        return there[0] + local
    try:
        known = torch.empty(0, device=name).device.type in there
    except (RuntimeError, AssertionError):            # cuda:9, tpu; a PyTorch without CUDA
        known = False
    require(known, f"there is no {name} here: --device takes auto or one of {', '.join(there)}",
            UsageError)
    return name


def has_bfloat16(device):
    """Whether a type of device (cpu, cuda, mps) has native bfloat16 arithmetic."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    ask = getattr(torch.cpu, "get_capabilities", dict)            # since PyTorch 2.13
    able = ask() if device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512" else {}
    return able.get("avx512_bf16", False) or able.get("amx_bf16", False)


def memory():
    """The memory of this machine in bytes; 64 GB if unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):       # Windows
        return 2 ** 36


def precision(args):
    """The resolved --dtype: auto means bfloat16 if native, else float32."""
    able = args.dtype == "auto" and has_bfloat16(args.device.split(":")[0])
    return "bfloat16" if able or args.dtype == "bfloat16" else "float32"


@contextlib.contextmanager
def autocast(args, dtype=None):
    """Autocasts to bfloat16 if dtype, or else --dtype, says so. The weights stay float32."""
    kind, on = args.device.split(":")[0], (dtype or precision(args)) == "bfloat16"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(kind, torch.bfloat16, enabled=on))
        short = getattr(args, "context", 0) < 256                # training in bfloat16 on short
        if on and kind == "cpu" and short and torch.is_grad_enabled():   # texts is faster without
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))            # fused attention
        yield


# Several GPUs: torchrun --nproc-per-node 4 mae.py runs one process per GPU. Each process computes
# its part of every batch; the gradients are averaged. Process 0 writes and prints for all.


def start_processes(args):
    """Joins the process group if torchrun started this process."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        cuda = args.device in ("auto", "cuda") and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")


def processes():
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """The rank of this process, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def first(f):
    """Calls f() in process 0 first, then in the others, which can use the files that it left."""
    if rank():
        dist.barrier()
    try:
        return f()
    finally:                                 # where it fails, the others fail in the same way
        if processes() > 1 and rank() == 0:
            dist.barrier()


# ---------------------------------------------------------------------------------- training


def schedule(step, steps, warmup):
    """Fraction of the peak learning rate at a step: linear warm-up, then cosine decay to 0."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return .5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def adamw(parameters, lr, weight_decay, betas=(.9, .95)):
    """Fused AdamW over the trainable tensors, with weight decay on matrices only."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.ndim > 1], weight_decay=weight_decay),
              dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr, betas, fused=True)


class Muon(torch.optim.AdamW):
    """Muon for the matrices of groups with `parts`, AdamW for the rest.

    Muon (K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) is SGD with momentum,
    but the update of each matrix is orthogonalised. A few directions dominate a gradient; with all
    singular values at about 1, a step moves as far in the rare directions. A matrix (d1, d2) counts
    as `parts` matrices (d1 / parts, d2), such as query, key and value. dtype: of this computation.
    """

    def __init__(self, groups, lr, betas, momentum=.95, dtype=torch.float32):
        super().__init__(groups, lr, betas, fused=True)
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self):
        same = {}                          # orthogonalise equal shapes together
        for group in self.param_groups:
            for p in group["params"] if group.get("parts") else ():
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:              # AdamW expects a step in it
                    state.update(step=torch.zeros(()), momentum=torch.zeros_like(p))
                state["momentum"].lerp_(p.grad, 1 - self.momentum)
                update = p.grad.lerp(state["momentum"], self.momentum)           # Nesterov
                p.grad = None                                          # so that AdamW skips it
                p.mul_(1 - group["lr"] * group["weight_decay"])
                for w, u in zip(p.chunk(group["parts"]), update.chunk(group["parts"])):
                    rate = group["lr"] * max(1., len(u) / u.shape[1]) ** .5
                    w, u = (w.mT, u.mT) if len(u) > u.shape[1] else (w, u)
                    same.setdefault(u.shape, []).append((w, u, rate))
        for weights, updates, rates in (zip(*rows) for rows in same.values()):
            for w, u, rate in zip(weights, orthogonalize(torch.stack(updates), self.dtype), rates):
                w.sub_(u, alpha=rate)
        super().step()


def orthogonalize(x, dtype=torch.float32):
    """Matrices x = U S V^T (n, d1, d2), d1 <= d2 -> approximately U V^T. Five Newton-Schulz steps
    x <- a x + b (x x^T) x + c (x x^T)^2 x bring most singular values into [0.7, 1.2]."""
    a, b, c = 3.4445, -4.7750, 2.0315           # a: the growth of small ones per step
    x = x.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT                                                          # (n, d1, d1)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()


def groups(args, named, weight_decay):
    """Parameter groups for an optimizer, from pairs (name, parameter), without frozen parameters.
    Only matrices have weight decay. With --optimizer muon, the matrices of the blocks, which have a
    number in their names (blocks.0.mlp.fc1.weight), get `parts` and --muon-lr."""
    found = {}
    for name, p in named:
        parts = 0
        if args.optimizer == "muon" and p.ndim == 2 and re.search(r"\.\d+\.", name):
            parts = 3 if name.endswith("qkv.weight") else 2 if name.endswith("kv.weight") else 1
        if p.requires_grad:
            found.setdefault((parts, p.ndim > 1), []).append(p)
    return [dict(params=params, parts=parts, weight_decay=weight_decay * matrices,
                 times=args.muon_lr / args.lr if parts and args.lr else 1.)
            for (parts, matrices), params in found.items()]


def optimizer(args, named):
    """Builds --optimizer from pairs (name, parameter): AdamW, or Muon for the blocks' matrices and
    AdamW for the rest."""
    own = groups(args, named, args.weight_decay)
    if args.optimizer == "muon":
        return Muon(own, args.lr, betas=(.9, .95), dtype=getattr(torch, precision(args)))
    return torch.optim.AdamW(own, args.lr, betas=(.9, .95), fused=True)


class Run:
    """The code around a training step, so that the step itself stays visible in the script:

        run = Run(args, model, optimizer)
        for step in run:                      # sets seed and learning rate; continues a resumed run
            x = run.batch(data)
            with run.autocast():
                loss = distance(model(x), x)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            run.log(loss)                     # for the bar, log.jsonl and the checkpoint

    The random numbers of a step depend only on (seed, step): a run that was killed and resumed ends
    with the same weights, bit for bit, as an uninterrupted run (on a CPU with the same number of
    threads; on a GPU with torch.use_deterministic_algorithms(True)). Ctrl-C and other signals to
    stop save a checkpoint after the step. A loss that is not finite stops the run and keeps the
    last good checkpoint. uniform: the loss of a uniform guess, printed next to the loss. about:
    what the model needs to know about its data, such as Images.about() or a vocabulary; it is saved
    in the checkpoint. Its `fingerprint` of frozen weights, if any, must be equal on resuming.
    """

    def __init__(self, args, model, optimizer, uniform=None, about=None):
        self.args, self.model, self.optimizer = args, model, optimizer
        self.uniform, self.about, self.out = uniform, about or {}, Path(args.out)
        self.step, self.seconds = 0, 0.          # so far
        self.saved = None                        # the step of the checkpoint
        self.pending, self.loss = None, None     # the last loss, on the device and as a number
        self.epoch, self.order = None, None      # see batch()
        self.stop = None                         # the signal that stops the run
        self.parts = processes() * args.accumulate       # per batch
        require(args.batch % self.parts == 0, f"--batch {args.batch} cannot be divided into "
                f"{self.parts} parts, for --accumulate and the processes: take a multiple")
        self.micro, self.weight, self.mean = 0, 1., 0.   # of these parts: see part()
        self.stops = torch.zeros(())             # number of processes asked to stop
        self.out.mkdir(parents=True, exist_ok=True)
        if args.resume and (self.out / "checkpoint.pt").exists():
            self.load()
        if args.compile:
            model.compile()

    def __iter__(self):
        args, every, last_save = self.args, math.ceil(self.args.steps / 200), time.monotonic()
        began, log = last_save - self.seconds, self.open_log()
        line = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        bar = tqdm(total=args.steps, initial=self.step, ncols=80, leave=False, bar_format=line,
                   disable=not (sys.stderr and sys.stderr.isatty()) or rank() > 0)
        usual = on_signals(self.interrupt)
        try:
            while self.step < args.steps:
                self.lr = args.lr * schedule(self.step, args.steps, args.warmup)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.lr * group.get("times", 1.)   # times: a group's factor
                for self.micro in range(args.accumulate):
                    torch.manual_seed(args.seed * 1_000_003 + self.step)
                    yield self.step
                self.step += 1
                self.seconds, last = time.monotonic() - began, self.step == args.steps
                bar.update()
                if last or self.step % every == 0:
                    self.show(log, bar)
                stop = self.stops.item() if processes() > 1 else self.stop       # all or none
                if last or stop or time.monotonic() - last_save > args.save_every:
                    self.save()
                    last_save = time.monotonic()
                if stop:
                    self.stop = self.stop or signal.SIGTERM
                    break
        finally:
            bar.close()
            log.close()
            for number, handler in usual.items():
                signal.signal(number, handler)
            torch.manual_seed(args.seed)               # what follows is independent of steps
        if self.stop:
            signal.raise_signal(self.stop)
        if self.saved is None:                         # no steps: the initial or loaded model
            self.save()
        if processes() > 1:
            dist.barrier()                             # all files are written
        if self.loss is not None:
            say(f"{self.step} steps in {self.seconds:.0f} s, {self.status()} in the last step.")
            self.curve()

    def batch(self, data):
        """The next args.batch rows of data, (B, ...). Each epoch has a new order of the rows."""
        n, size = len(data), self.args.batch
        require(size <= n, f"--batch {size} is more than the {n} training examples")
        if n > 2 ** 23:                        # too many for an order: random rows
            return data[torch.randint(n, (size,)).to(data.device)]
        epoch, i = divmod(self.step, n // size)
        if self.epoch != (epoch, n):
            g = torch.Generator().manual_seed(self.args.seed * 1_000_003 + epoch)
            self.epoch, self.order = (epoch, n), torch.randperm(n, generator=g).to(data.device)
        return data[self.order[i * size:(i + 1) * size]]

    def part(self, batch):
        """The rows of this process and part of --accumulate, from a batch: a tensor (B, ...) or a
        tuple of them. Each part has its own random numbers from here on. If targets in the last
        tensor are ignored (-100), parts are weighted by the number of other targets."""
        if self.parts == 1:
            return batch
        i = rank() * self.args.accumulate + self.micro
        cut = lambda x: tuple(map(cut, x)) if isinstance(x, tuple) else x.chunk(self.parts)[i]
        before, self.weight = self.weight, 1.
        target = batch[-1] if isinstance(batch, tuple) else batch
        if target.dtype == torch.int64:
            counted = torch.stack([(x != -100).sum() for x in target.chunk(self.parts)])
            self.weight = (counted[i].clamp(min=1) / counted.float().mean().clamp(min=1e-6)).item()
        for p in self.model.parameters() if self.micro else ():
            if p.grad is not None:
                p.grad *= before / self.weight                   # so that reduce() weights all
        torch.manual_seed((self.args.seed * 1_000_003 + self.step) * 1_009 + i)
        return cut(batch)

    def reduce(self, loss):
        """Call after backward(). Returns False until the last part of --accumulate; then averages
        the gradient over all parts and processes, as DistributedDataParallel does."""
        if self.parts == 1:
            return True
        self.mean = self.mean * (self.micro > 0) + self.weight * loss.detach() / self.parts
        if self.micro < self.args.accumulate - 1:
            return False
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        more = torch.stack([self.mean, self.mean.new_tensor(float(self.stop is not None))])
        flat = torch.cat([*(g.flatten() for g in grads), more])
        flat[:-2] *= self.weight / self.parts
        if processes() > 1:
            dist.all_reduce(flat)
        self.mean, self.stops = flat[-2], flat[-1]
        for g, whole in zip(grads, flat.split([*(g.numel() for g in grads), 2])):
            g.copy_(whole.view_as(g))
        return True

    def update(self, loss):
        """The end of a training step, for earlier stages; main() of each script spells it out."""
        loss.backward()
        if self.reduce(loss):
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.log(loss)

    @staticmethod
    def gather(z):
        """Gathers rows (n, ...) from all processes, with gradients: (processes * n, ...)."""
        if processes() == 1:
            return z
        from torch.distributed.nn.functional import all_gather      # not in all builds of PyTorch
        return torch.cat(all_gather(z))

    def autocast(self):
        """Context manager: autocast to the precision of --dtype."""
        return autocast(self.args)

    def log(self, loss):
        """Records the loss of this step. The next step reads it, so that a GPU does not wait."""
        self.check()
        self.pending = loss.detach() if self.parts == 1 else self.mean

    def check(self):
        """Reads the loss of the last step. Raises UserError if it is not finite."""
        if self.pending is not None:
            self.loss, self.pending = self.pending.item(), None
            self.finite(math.isfinite(self.loss), f"the loss was {self.loss}")

    def finite(self, condition, what):
        """Raises UserError if the condition is false."""
        kept = "no checkpoint was written yet" if self.saved is None else \
            f"the checkpoint of step {self.saved} is kept"
        muon = " or --muon-lr" * isinstance(self.optimizer, Muon)
        require(condition, f"at step {self.step - 1} {what}; {kept}. Try a smaller --lr{muon}")

    def save(self):
        """Writes checkpoint.pt. Raises UserError if the weights are not finite."""
        self.check()
        weights = self.model.state_dict()
        self.finite(all(p.isfinite().all() for p in self.model.parameters() if p.requires_grad),
                    "the weights were not finite, though the loss was")
        state = dict(format=FORMAT, script=script(self.args), args=dataclasses.asdict(self.args),
                     step=self.step, seconds=self.seconds, about=self.about, model=weights,
                     kind=type(self.optimizer).__name__, optimizer=self.optimizer.state_dict())
        kept = "" if self.saved is None else f"; the one of step {self.saved} is kept"
        with replacing(self.out / "checkpoint.pt", f" at step {self.step}{kept}") as f:
            torch.save(state, f)
        self.saved = self.step

    def load(self):
        """Continues from the checkpoint. Raises UserError if it is of another model."""
        path, state = self.out / "checkpoint.pt", read_checkpoint(self.out, script(self.args))
        fill_in(self.model, state["model"], path,
                hint="; leave out the flags that change the model, or start a new run")
        require(state["about"].get("fingerprint") == self.about.get("fingerprint"),
                f"{path} is of another base: continue with its own, or start a new run")
        groups = [{k: v for k, v in group.items() if k != "params"}
                  for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            fits = state["kind"] == type(self.optimizer).__name__
        except (ValueError, KeyError, TypeError):
            fits = False
        require(fits, f"{path} is of another optimizer: give its --optimizer, or start a new run")
        for group, options in zip(self.optimizer.param_groups, groups):
            group.update(options)                               # of the present flags
        self.step, self.seconds, self.saved = state["step"], state["seconds"], state["step"]
        self.args.steps = max(self.args.steps, self.step)       # --steps 0: evaluate, do not train
        say(f"Continuing from step {self.step} of {path}.")

    def interrupt(self, number, _):
        """Signal handler: stops the run after this step."""
        self.stop = number
        signal.signal(number, interrupt)                       # a second one stops at once

    def open_log(self):
        """Opens log.jsonl (at most 200 lines per run) and drops lines later than the checkpoint."""
        if rank():
            return open(os.devnull, "a")
        path, kept = self.out / "log.jsonl", ""
        with contextlib.suppress(ValueError):                  # the last line may be cut off
            for line in path.read_text().splitlines() if self.step and path.exists() else ():
                kept += line + "\n" if json.loads(line)["step"] <= self.step else ""
        with replacing(path) as f:
            f.write(kept.encode())
        return open(path, "a", buffering=1)

    def show(self, log, bar):
        """Writes the last loss to the log, and shows it with the speed in the bar or as a line."""
        self.check()
        steps = self.args.steps
        rate = self.step * self.args.batch / max(self.seconds, 1e-9)
        log.write(json.dumps(dict(step=self.step, loss=self.loss, lr=self.lr,
                                  seconds=round(self.seconds, 2))) + "\n")
        bar.set_postfix_str(f"{self.status()}, {rate:,.0f} ex/s", refresh=False)     # examples
        if bar.disable and self.step % math.ceil(steps / 10) < math.ceil(steps / 200):
            say(f"step {self.step}/{steps}  {self.status()}  {rate:,.0f} examples/s")

    def curve(self):
        """Writes loss.svg, a plot of the losses in log.jsonl."""
        with contextlib.suppress(OSError, ValueError, KeyError):       # only the plot needs the log
            rows = [json.loads(row) for row in (self.out / "log.jsonl").read_text().splitlines()]
            x, y = [row["step"] for row in rows], [row["loss"] for row in rows]
            save_curve(self.out / "loss.svg", x, y, "loss over training steps")

    def status(self):
        """The last loss and, if known, the loss of a uniform guess."""
        uniform = "" if self.uniform is None else f" (uniform guess {self.uniform:.3f})"
        return f"loss {self.loss:.4f}{uniform}"


FORMAT = 2      # of checkpoints; others are refused


def read_checkpoint(folder, *scripts, flag="--out"):
    """Reads the checkpoint in a folder, to the CPU: its script, args, step, seconds, about, model
    and optimizer. Raises UserError if there is none, or if another script than these wrote it."""
    path = Path(folder) / "checkpoint.pt"
    require(path.is_file(), f"there is no {path}: choose another {flag}, or start a new run")
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        by, version = state["script"], state.get("format")
    except Exception as error:                          # torch raises many types for a broken file
        raise UserError(f"{path} is not a checkpoint that can be read ({type(error).__name__}): "
                        f"delete it, or choose another {flag}") from None
    require(by in scripts or not scripts, f"{path} was written by {by}, not by "
            f"{' or '.join(scripts)}: choose another {flag}")
    require(version == FORMAT, f"{path} was written by another version of {by} (format {version}, "
            f"this is {FORMAT}): use that version, or start a new run")
    kinds = dict(args=dict, model=dict, step=int, seconds=(int, float), about=dict, kind=str,
                 optimizer=dict)
    wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
    require(not wrong, f"{path} lacks {', '.join(wrong)}: it is broken, or no checkpoint of a "
            f"run; choose another {flag}")
    return state


def runs_of(args):
    """The folders runs/mae, runs/mae-2, ... of this script that hold a run: {number: path}."""
    runs, pattern = {}, rf"{Path(script(args)).stem}(?:-(\d+))?"
    for path in Path("runs").glob("*"):
        match = re.fullmatch(pattern, path.name)
        if match and (has_run(path) or (path / "settings.json").exists()):
            runs[int(match[1] or 1)] = path
    return runs


def has_run(out):
    """Whether a folder contains anything saved by a run or by an earlier stage of it."""
    names = "checkpoint.pt", "result.json", "*/checkpoint.pt"
    return any(any(Path(out).glob(name)) for name in names)


def claim(args):
    """Creates the folder of a new run, --out or the next of runs/mae, runs/mae-2, ..., writes its
    settings.json and sets args.out. Returns whether the folder is new. Two runs never share one:
    creating a folder, or a file with mode "x", succeeds only once. Raises UserError."""
    stem, first, new = Path(script(args)).stem, max(runs_of(args), default=0) + 1, False
    names = [args.out] if args.out else (
        f"runs/{stem}-{n}" if n > 1 else f"runs/{stem}" for n in itertools.count(first))
    try:
        for out in map(Path, names):
            with contextlib.suppress(FileExistsError):
                out.mkdir(parents=True)
                new = True
                break
        args.out = str(out)
        if not new and has_run(out):
            raise FileExistsError
        with open(out / "settings.json", "x") as f:
            json.dump(dict(script=script(args), args=dataclasses.asdict(args)), f, indent=1)
        return new
    except FileExistsError:
        raise UserError(f"{out} holds a run: --resume --out {out} continues it; or choose another "
                        "--out") from None
    except OSError as error:
        if new:
            shutil.rmtree(out, ignore_errors=True)
        raise UserError(f"cannot write to {out} ({error.strerror}): choose another --out") from None


def saved_run(args):
    """The run that --resume continues, in --out or the newest in runs/: (folder, settings)."""
    runs = runs_of(args)
    out = Path(args.out or (runs[max(runs)] if runs else "runs"))
    if (out / "checkpoint.pt").exists():
        return str(out), read_checkpoint(out, script(args))["args"]
    path = out / "settings.json"                         # killed before the first checkpoint
    require(path.exists(), f"there is no run of {script(args)} to resume in {out}: leave out "
            "--resume to start one")
    try:
        state = json.loads(path.read_text())
        by, settings = state["script"], dict(state["args"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be read: delete {out} and start a new run") from None
    require(by == script(args), f"{path} was written by {by}: choose another --out")
    return str(out), settings


def stage(args, name, same, **settings):
    """An earlier stage of the training, kept in <out>/<name>: returns its Args, and whether it has
    been completed, there or in a folder next to args.out. It takes the settings that begin with its
    name (lm_steps: its steps), and `settings`. same: the settings, besides those of the training,
    that must be equal to reuse it. Raises UserError."""
    same = (*same, "steps", "batch", "lr", "optimizer", "muon_lr", "warmup", "weight_decay", "clip",
            "seed", "dtype")
    own, prefix = Path(args.out, name), f"{name}_"
    for key in dataclasses.asdict(args):
        if key.startswith(prefix) and hasattr(args, key.removeprefix(prefix)):
            settings[key.removeprefix(prefix)] = getattr(args, key)
    how = dataclasses.replace(args, out=str(own), resume=False, compile=False, **settings)
    for path in [own, *sorted(Path(args.out).parent.glob(f"*/{name}"))]:
        try:
            state = read_checkpoint(path, script(args))
        except (UserError, OSError):
            continue
        differ = [flag(key) for key in same
                  if state["args"].get(key) != getattr(how, key, None)]
        if not differ and state["step"] == how.steps:
            return dataclasses.replace(how, out=str(path)), True
        if path == own:
            require(not differ, f"{path} was trained with another {', '.join(differ)}: start a new "
                    "run")
            how.resume = True
    return how, False


@contextlib.contextmanager
def replacing(path, when=""):
    """Context manager: a file that replaces `path` atomically at the end, so that readers see the
    complete old file or the complete new one. Raises UserError if it cannot be written."""
    part = Path(path).with_name(f"{Path(path).name}.part")
    if rank():                                         # only process 0 writes
        with open(os.devnull, "wb") as f:
            yield f
        return
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:           # torch.save wraps a full disk in either,
        if isinstance(error.__context__, KeyboardInterrupt):      # and hides a second Ctrl-C
            raise error.__context__ from None
        why = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"cannot write {path}{when} ({why})") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def fingerprint(weights):
    """A hash of weights {name: tensor on the CPU}: eight hexadecimal digits."""
    digest = hashlib.sha256()
    for w in weights.values():
        digest.update(w.contiguous().numpy())
    return digest.hexdigest()[:8]


# -------------------------------------------------------------------------------- evaluation


def evenly(x, n):
    """n evenly spaced rows of x, or all if there are fewer."""
    return x[torch.linspace(0, len(x) - 1, min(n, len(x))).long()]


def k_shot(labels, k, seed=0):
    """Indices of k random examples per class (0: all): (k * classes,), on the device of labels.
    Raises UserError if a class has fewer."""
    least = labels.unique(return_counts=True)[1].min()
    require(k <= least, f"--labels {k} is too many: a class has only {least} labelled examples")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order.to(labels.device)
    return torch.cat([order[labels[order] == c][:k or None] for c in labels.unique()])


@torch.no_grad()
def encode(args, f, data, x, batch=500):
    """Applies f to all of x in batches, without gradients: (n, C) float. x: uint8 images
    (n, 3, S, S) or tokens (n, T) of data, Images or Passages, which normalises them first."""
    with autocast(args):
        h = torch.cat([f(data.normalize(part)).float() for part in x.split(batch)])
    bounded(h.abs().max() < 1e15, "features")
    return h


def bounded(condition, what="loss"):
    """Raises UserError if the condition is false: the training has diverged."""
    require(condition, f"the {what} of the model cannot be computed any more: try a smaller --lr")


def probe(train, labels, test, test_labels, k=0, seed=0, decay=1e-2):
    """Accuracy in % of a linear classifier on frozen features: logistic regression on k examples
    per class (0: all), optimised to convergence with L-BFGS.

    train (n, C), labels (n,), test (m, C), test_labels (m,). Features are standardised over all of
    train, labelled or not; the loss includes decay / 2 times the sum of the squared weights.
    """
    mean, std = train.mean(0), train.std(0) + 1e-6
    i = k_shot(labels, k, seed)
    x, y, test = (train[i] - mean) / std, labels[i], (test - mean) / std
    head = nn.Linear(x.shape[1], int(labels.max()) + 1, device=x.device)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), y) + decay / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return 100 * (head(test).argmax(1) == test_labels).float().mean().item()


def linear_probe(args, f, images):
    """Accuracies in % of linear probes on the features of a frozen encoder: for the class with each
    number in args.labels, and for the colour with all labels, if the images have one.

    f maps normalised images (B, 3, S, S) to features (B, C).
    """
    train, test = (encode(args, f, images, x) for x in (images.train, images.test))
    fit = lambda name, k: probe(train, images.train_labels[name], test, images.test_labels[name], k)
    row = [fit(next(iter(images.names)), k) for k in args.labels]
    return row + [fit("colour", 0)] if "colour" in images.names else row


def linear_probes(args, images, encoders):
    """linear_probe for {encoder: f}: {encoder: accuracies in %}; empty without labels."""
    encoders = encoders if images.names else {}
    return {name: linear_probe(args, f, images)
            for name, f in progress(encoders.items(), "linear probes")}


def best_probe(args, images, rows, name):
    """'shape 64.8 % from 20 labels per class': a result of linear_probes, for the largest number in
    --labels."""
    if not rows:
        return "no labels"
    most, what = max(args.labels), next(iter(images.names))
    how = f"{most} labels per class" if most else "all labels"
    return f"{what} {rows[name][args.labels.index(most)]:.1f} % from {how}"


def label_table(args, images, rows):
    """A table of chance and {encoder: accuracies in %} for each number in args.labels, and of the
    colour with all labels, if all rows have one. If one class is much more frequent than others, a
    row gives the accuracy of always predicting it."""
    if not images.names:
        return "Without labels there is nothing to probe or to fine-tune."
    what, wide = next(iter(images.names)), min(map(len, rows.values()))
    head = [str(k or "all") for k in args.labels] + ["colour, all"]
    names = [what] * len(args.labels) + ["colour"] * ("colour" in images.names)
    chance, ids = [100 / len(images.names[name]) for name in names], images.test_labels
    most = [100 * (ids[name].bincount().max() / len(ids[name])).item() for name in names]
    same = {f"always the same {what}": most} if most[0] > 1.15 * chance[0] else {}
    rows = {"chance": chance, **same, **rows}
    return table([[f"{what}, accuracy in % by labels per class", *head[:wide]],
                  *([name, *(f"{x:.1f}" for x in row[:wide])] for name, row in rows.items())])


def finetune(args, f, data, x, labels, test_labels, steps, lr, batch=64, seed=0):
    """Accuracy in % on data.test after training a new linear head and the unfrozen part of f.

    data: Images or Passages. f maps normalised images (B, 3, S, S), or tokens (B, T), to features
    (B, C) and is changed in place. x (n, ...) with labels (n,) are the labelled ones of data;
    test_labels (m,).
    """
    torch.manual_seed(seed)
    dim = encode(args, f.eval(), data, x[:1]).shape[1]
    head = nn.Linear(dim, int(labels.max()) + 1)
    nn.init.zeros_(head.weight)                  # at first all get the same scores
    norm = nn.BatchNorm1d(dim, affine=False)     # as in MAE, A.1: scales differ widely
    model = nn.Sequential(f, norm, head).to(x.device).train()
    optimizer = adamw(model.parameters(), lr, weight_decay=.05)
    for step in progress(range(steps), "fine-tuning"):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps, .1)
        i = torch.randint(len(x), (min(batch, len(x)),), device=x.device)
        with autocast(args):
            loss = F.cross_entropy(model(data.normalize(x[i])), labels[i])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = encode(args, model.eval(), data, data.test)
    return 100 * (scores.argmax(1) == test_labels).float().mean().item()


# -------------------------------------------------------------------------------------- data


@dataclass
class Images:
    """A data set of uint8 images on the device, with their labels if they have any."""
    train: torch.Tensor                       # (n, 3, S, S) uint8
    test: torch.Tensor                        # (m, 3, S, S) uint8
    train_labels: dict[str, torch.Tensor]     # attribute -> (n,) int64
    test_labels: dict[str, torch.Tensor]      # attribute -> (m,) int64
    names: dict[str, list[str]]               # attribute -> names of ids; the first is the class

    def __post_init__(self):
        sample = self.train[:5000].float() / 255
        self.size = self.train.shape[-1]
        self.mean = sample.mean((0, 2, 3)).view(3, 1, 1)
        self.std = sample.std((0, 2, 3)).view(3, 1, 1).clamp(min=1e-3)

    def normalize(self, x):
        """uint8, or floats in [0, 1] -> mean 0 and variance 1, so a constant prediction costs 1."""
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        return (x - self.mean) / self.std

    def denormalize(self, x):
        """Inverse of normalize, to [0, 1]."""
        return (x.float() * self.std + self.mean).clamp(0, 1)

    def imagenet(self):
        """Uses ImageNet's mean and std from now on, as published models expect."""
        for name, x in dict(mean=[.485, .456, .406], std=[.229, .224, .225]).items():
            setattr(self, name, torch.tensor(x, device=self.train.device).view(3, 1, 1))

    def class_labels(self):
        """The class ids of the training images (n,) and of the test images (m,)."""
        what = next(iter(self.names))
        return self.train_labels[what], self.test_labels[what]

    def check(self, labels, pool=None):
        """Raises UserError if a class has fewer than max(labels) images among the first `pool`, for
        images with labels."""
        if self.names:
            k_shot(self.class_labels()[0][:pool], max(labels))

    def about(self):
        """What a trained model needs to know of its images: size in pixels, mean and std of the
        channels in [0, 1], names of the classes."""
        return dict(image_size=self.size, mean=self.mean.flatten().tolist(),
                    std=self.std.flatten().tolist(), classes=next(iter(self.names.values()), []))


SHAPES = "circle ring half square bar triangle star cross heart moon".split()
COLOURS = {"red": (.86, .16, .16), "orange": (.96, .55, .10), "yellow": (.95, .87, .20),
           "green": (.18, .65, .25), "cyan": (.25, .80, .85), "blue": (.17, .30, .85),
           "purple": (.50, .20, .65), "pink": (.97, .55, .75)}


def distance_to(kind, x, y):
    """Signed distance from (x, y) to the edge of a figure of area about pi, negative inside. x and
    y (...) are in units of the figure's radius, y upwards."""
    box = lambda x, y, a, b: torch.maximum(x.abs() - a, y.abs() - b)
    disc = lambda x, y, r: (x * x + y * y).sqrt() - r
    if kind == "circle":
        return disc(x, y, 1)
    if kind == "ring":
        return disc(x, y, .85).abs() - .3
    if kind == "half":
        return torch.maximum(disc(x, y + .6, 1.42), -.6 - y)
    if kind == "square":
        return box(x, y, .89, .89)
    if kind == "bar":
        return box(x, y, .52, 1.5)
    if kind == "triangle":
        return torch.maximum(x.abs() * .866 + y * .5, -y) - .78
    if kind == "cross":
        return torch.minimum(box(x, y, .4, 1.25), box(x, y, 1.25, .4))
    if kind == "moon":
        return torch.maximum(disc(x - .4, y, 1.4), -disc(x - 1.05, y, 1.05))
    if kind == "heart":                       # a square on its corner, two discs
        u, v = (x + y + .35) * .707, (y - x + .35) * .707
        return torch.minimum(box(u, v, .64, .64),
                             torch.minimum(disc(u, v - .64, .64), disc(u - .64, v, .64)))
    fifth = 2 * math.pi / 5                   # star: fold the plane onto one edge
    angle = (torch.remainder(torch.atan2(x, y) + fifth / 2, fifth) - fifth / 2).abs()
    r, tip, notch = (x * x + y * y).sqrt(), 1.6, .7
    nx, ny = tip - notch * math.cos(fifth / 2), notch * math.sin(fifth / 2)
    return (r * angle.sin() * nx + (r * angle.cos() - tip) * ny) / math.hypot(nx, ny)


def draw(canvas, shape, colour, radius, x, y, turn):
    """Draws one anti-aliased figure on each image of canvas (n, 3, S, S), in place.

    shape (n,): ids into SHAPES; colour (n, 3) in [0, 1]; radius (n,) of the disc of equal area, and
    centre x, y (n,), in pixels; turn (n,) in radians, counter-clockwise.
    """
    at = torch.arange(canvas.shape[-1], device=canvas.device) + .5
    for kind in range(len(SHAPES)):
        for i in (shape == kind).nonzero().flatten().split(256):     # chunks that fit the cache
            cos, sin, r, px, py = (t[i, None, None] for t in (turn.cos(), turn.sin(), radius, x, y))
            u, v = (at - px) / r, (py - at[:, None]) / r
            d = distance_to(SHAPES[kind], cos * u + sin * v, cos * v - sin * u) * r
            cover = (.5 - d).clamp(0, 1)[:, None]                    # fraction of the pixel inside
            canvas[i] = torch.lerp(canvas[i], colour[i, :, None, None], cover)
    return canvas


def shapes(n, seed=0, size=32, device="cpu"):
    """Draws n images of one figure each on a plain background, all lit from above. (If the light
    differed among images, it would be a shortcut: SimCLR learned it instead of shapes.)

    Returns images (n, 3, size, size), uint8, and {attribute: (n,) int64}: shape (10), colour (8),
    size (3), place (9, a 3 x 3 grid) and turn (8 directions), which are independent of each other.
    """
    u = torch.rand(14, n, generator=torch.Generator().manual_seed(seed)).to(device)
    between = lambda row, low, high: (low + (high - low) * u[row])[:, None, None]
    labels = {"shape": (u[0] * len(SHAPES)).long(), "colour": (u[1] * len(COLOURS)).long(),
              "size": (u[2] * 3).long(), "place": (u[4] * 3).long() * 3 + (u[3] * 3).long(),
              "turn": (u[5] * 8).long()}
    radius = size * between(2, .13, .25).flatten()
    x, y = (1.5 * radius + u[row] * (size - 3 * radius) for row in (3, 4))   # inside the image
    colour = torch.tensor(list(COLOURS.values()), device=device)[labels["colour"]]
    colour = (colour * between(6, .85, 1.15)[:, 0] + .08 * (u[7:10].T - .5)).clamp(0, 1)
    ramp = torch.linspace(.075, -.075, size, device=device)[:, None].expand(size, size)
    shade = (between(10, .35, .75) + ramp)[:, None] + .12 * (u[11:14].T - .5)[..., None, None]
    canvas = draw(shade.clamp(0, 1), labels["shape"], colour, radius, x, y, 2 * math.pi * u[5])
    return (canvas * 255).round().byte(), labels


# The shapes world of flamingo.py, in images and words: scenes of one to three figures, captions of
# them and questions about them, and new words for known things.

FIGURES = [kind for kind in SHAPES if kind not in ("half", "bar")]      # plain names only
KINDS = [(shape, colour) for shape in range(len(FIGURES)) for colour in range(len(COLOURS))]
UNSEEN = [(i, (3 * i + 1) % len(COLOURS)) for i in range(len(FIGURES))]  # one per shape, held out
SEEN = [kind for kind in KINDS if kind not in UNSEEN]
NUMBERS = ["one", "two", "three"]
ABOUT = ["colour", "shape", "number", "side"]
BEGINNINGS, ENDINGS = "bli da ko wu".split(), "cket x ba g".split()        # syllables of new words
NEW_WORDS = [a + b for a in BEGINNINGS for b in ENDINGS]
HELD_OUT = [a + b for a, b in zip(BEGINNINGS, ENDINGS)]      # never with an image in training
TRAINED = [word for word in NEW_WORDS if word not in HELD_OUT]


class Figure(typing.NamedTuple):
    """A figure of a scene: ids of FIGURES and COLOURS, 0 small or 1 large, 0 left or 1 right, 0 top
    or 1 bottom."""
    shape: int
    colour: int
    size: int
    column: int
    row: int


def scene(rng, count=None, kinds=KINDS):
    """A random scene: figures of the given kinds (shape, colour), row by row. No shape or colour
    repeats; two figures are neighbours. rng: random.Random; count: 1 to 3, or None for any."""
    count = count or rng.randint(1, 3)
    chosen = rng.sample(kinds, count)
    while any(len(set(ids)) < count for ids in zip(*chosen)):
        chosen = rng.sample(kinds, count)
    first = rng.randrange(4)                              # quarter 0 1
    quarters = rng.sample(range(4), count)                #         2 3
    if count == 2:
        quarters = [first, first ^ rng.choice([1, 2])]    # next to or above each other
    return [Figure(*kind, rng.randrange(2), quarter % 2, quarter // 2)
            for kind, quarter in zip(chosen, sorted(quarters))]


def paint(scenes, seed=0, size=32, device="cpu"):
    """Images of n scenes on a dark background: (n, 3, size, size), uint8. The exact place, size,
    turn and hue of each figure are random."""
    n, most = len(scenes), max(map(len, scenes))
    ids = torch.full((n, most, 5), -1)
    for i, figures in enumerate(scenes):
        ids[i, :len(figures)] = torch.tensor(figures)
    shape, colour, large, column, row = ids.to(device).unbind(2)
    u = torch.rand(12, n, most, generator=torch.Generator().manual_seed(seed)).to(device)
    unit, names = size / 32, torch.tensor([SHAPES.index(name) for name in FIGURES], device=device)
    radius = torch.where(large == 1, 4.6 + .8 * u[0], 3. + .6 * u[0]) * unit
    x, y = ((16 * at + 6 + 4 * part) * unit for at, part in ((column, u[1]), (row, u[2])))
    hue = torch.tensor(list(COLOURS.values()), device=device)[colour]             # (n, most, 3)
    hue = (hue * (.85 + .3 * u[3, ..., None]) + .08 * (u[4:7].permute(1, 2, 0) - .5)).clamp(0, 1)
    ramp = torch.linspace(.05, -.05, size, device=device)[:, None]
    shade = .1 + .1 * u[7, :, :1, None, None]
    shade = shade + .08 * (u[8:11, :, :1, None].permute(1, 0, 2, 3) - .5)         # (n, 3, 1, 1)
    canvas = (shade + ramp).clamp(0, 1).expand(n, 3, size, size).contiguous()
    for j in range(most):
        i = (shape[:, j] >= 0).nonzero().flatten()
        canvas[i] = draw(canvas[i], names[shape[i, j]], hue[i, j], radius[i, j], x[i, j], y[i, j],
                         .6 * (u[11, i, j] - .5))
    return (canvas * 255).round().byte()


def kind_name(figure):
    """'red circle'."""
    return f"{list(COLOURS)[figure.colour]} {FIGURES[figure.shape]}"


def caption(figures):
    """Describes a scene: 'a small red circle left of a large blue star'."""
    parts = [f"a {('small', 'large')[f.size]} {kind_name(f)}" for f in figures]
    if len(parts) == 1:
        return f"{parts[0]} on the {('left', 'right')[figures[0].column]}"
    if len(parts) == 2:
        return f"{' left of ' if figures[0].row == figures[1].row else ' above '}".join(parts)
    return f"{parts[0]} , {parts[1]} and {parts[2]}"


def question(rng, figures, about=None):
    """A question about a figure of a scene: (about, question, answer). about: colour, shape, number
    or side; None: a random one. The caption always implies the answer; therefore `side` is only
    asked for one figure or two in a row, and gives (None, None, None) otherwise."""
    single = len(figures) == 1
    in_a_row = single or len(figures) == 2 and figures[0].row == figures[1].row
    about = about or rng.choice(ABOUT if in_a_row else ABOUT[:3])
    if about == "side" and not in_a_row:
        return None, None, None
    figure = rng.choice(figures)
    colour, shape = kind_name(figure).split()
    which, one = ("it", "it") if single else (f"the {shape}", f"the {colour} one")
    text, answer = {
        "colour": (f"what colour is {which} ?", colour), "shape": (f"what shape is {one} ?", shape),
        "number": ("how many figures are there ?", NUMBERS[len(figures) - 1]),
        "side": (f"which side is {which} on ?", ("left", "right")[figure.column])}[about]
    return about, text, answer


# A document is a list of chunks (scene, kind, text): the index of a scene, the kind of words that
# can replace its image, and the text that follows the image.

IN_WORDS = "colour", "shape", "both"      # the words for a single figure


class SceneTokens:
    """Tokenizer of texts with <image>: one token per word of the shapes world, two per new word, as
    in WordPiece (blicket: bli ##cket). For an LM of gpt.py it is the LM's tokenizer (text: Bytes or
    BPE), where <end> is BOS and <image> is byte 0, which no text has, or for BPE a new token."""
    WORDS = [*("a is what colour shape it the one of how many figures are there which side "
               "on left right above small large and two three ? , .").split(), *COLOURS,
             *FIGURES, *BEGINNINGS, *(f"##{ending}" for ending in ENDINGS)]

    def __init__(self, text=None):
        self.text, self.words = text, [] if text else ["<end>", "<image>", *self.WORDS]
        self.end, self.image, self.vocab = 0, 1, len(self.words)
        if text:
            self.end, self.image = text.BOS, 0 if isinstance(text, Bytes) else text.vocab
            self.vocab = max(text.vocab, self.image + 1)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.pieces = {a + b: (a, f"##{b}") for a in BEGINNINGS for b in ENDINGS}

    def encode(self, text):
        """str -> list of tokens. Raises UserError for an unknown word."""
        if self.text:
            special, tokens = {"<end>": [self.end], "<image>": [self.image]}, []
            for part in re.split(" *(<end>) *|(<image>) ?", text.strip(" ")):
                raw = (part or "").encode(errors="surrogateescape")
                tokens += special.get(part) or self.text.encode(raw).tolist()
            return tokens
        found = re.findall(r"<\w+>|\w+|[^\w\s]", text)
        words = [piece for word in found for piece in self.pieces.get(word, (word,))]
        for word in words:
            require(word in self.ids, f"the LM has no word {word!r}; its words are "
                           + " ".join(self.words))
        return [self.ids[word] for word in words]

    def decode(self, tokens):
        """Tokens -> str."""
        if self.text:
            return self.text.decode(t for t in tokens if t != self.image)
        return " ".join(self.words[int(t)] for t in tokens).replace(" ##", "")


class Scenes:
    """n scenes, of which two thirds (or all) have a single figure. single: indices of these; of:
    the same by kind, {(shape, colour): indices}."""

    def __init__(self, seed, n, kinds, single=False):
        rng = random.Random(seed)
        self.all = [scene(rng, 1 if single or i % 2 else None, kinds) for i in range(n)]
        self.single = [i for i, figures in enumerate(self.all) if len(figures) == 1]
        self.of = {}
        for i in self.single:
            self.of.setdefault(self.all[i][0][:2], []).append(i)

    def captions(self, tokenizer):
        """The captions as tokens, padded with 0: (n, 16)."""
        rows = (tokenizer.encode(caption(figures)) for figures in self.all)
        return torch.tensor([row + [0] * (16 - len(row)) for row in rows])

    def alike(self):
        """The indices of the scenes with one, two and three figures, sorted by their colours: three
        tensors."""
        colours = lambda i: sorted(figure.colour for figure in self.all[i])
        order = sorted(range(len(self.all)), key=colours)
        return [torch.tensor([i for i in order if len(self.all[i]) == n]) for n in (1, 2, 3)]


def new_words(rng, scenes, names, k, ways, kind="both"):
    """A few-shot episode: `ways` new words for as many kinds of figures, with k examples and one
    query. The meaning of the words changes with each episode, so it must come from the examples."""
    kinds, names = rng.sample(sorted(scenes.of), ways), rng.sample(names, ways)
    if kind != "both" and len({pair[("shape", "colour").index(kind)] for pair in kinds}) < ways:
        kind = "both"                                # one attribute would not distinguish them
    order = [i % ways for i in range(k)]
    rng.shuffle(order)
    # the query shows a kind from the examples, in another image if there is one
    order.append(rng.choice(order or range(ways)))
    unused = [rng.sample(scenes.of[pair], min(k + 1, len(scenes.of[pair]))) for pair in kinds]
    at = [unused[i].pop() if unused[i] else rng.choice(scenes.of[kinds[i]]) for i in order]
    return [(at[j], kind, names[i]) for j, i in enumerate(order)]


def unasked(rng, scenes, about, k):
    """An episode of answers to the same, unstated question: k examples and one query."""
    at = rng.sample(range(len(scenes.all)) if about == "number" else scenes.single, k + 1)
    return [(i, "answer", question(rng, scenes.all[i], about)[2]) for i in at]


def captions(rng, scenes, k):
    """k captions, or questions with their answers, of random scenes."""
    chunks = []
    for _ in range(k):
        i = rng.randrange(0, len(scenes.all), 2)     # every second scene has 1 to 3 figures
        if rng.random() < .65:                       # only captions give the size
            chunks.append((i, "caption", f"there is {caption(scenes.all[i])}"))
        else:
            chunks.append((i, "question", " ".join(question(rng, scenes.all[i])[1:])))
    return chunks


def document(rng, scenes, names, fraction, kind="both"):
    """One of the three above; `fraction` of the documents introduce new words."""
    sort = rng.random()
    if sort < fraction:
        return new_words(rng, scenes, names, 8, rng.randint(2, 3), kind)
    if sort < fraction + .1:
        return unasked(rng, scenes, rng.choice(ABOUT[:3]), 8)
    return captions(rng, scenes, 9)


def in_words(figures, kind, text):
    """A chunk with words instead of the image: words for the first figure if the kind is one of
    IN_WORDS, else the caption of the scene."""
    colour, shape = list(COLOURS)[figures[0].colour], FIGURES[figures[0].shape]
    words = {"colour": colour, "shape": shape, "both": kind_name(figures[0])}
    return f"{words[kind]} {text}" if kind in IN_WORDS else f"{caption(figures)} . {text}"


def text_documents(seed, tokenizer, n, length, fraction=.7):
    """Training documents of the LM: (n, 1 + length). `fraction` of them are about new words. To
    prepare the LM for images, new words can come with a colour or a shape alone, some documents
    have <image> before all or half of the chunks, and some omit the words for 60 % of these."""
    rng, scenes = random.Random(seed), Scenes(seed, 8000, KINDS)
    rows = torch.full((n, length + 1), tokenizer.end)
    for row in rows:
        text = [tokenizer.end]
        while len(text) < len(row):
            kind = rng.choice((*IN_WORDS, "both"))
            with_image, without_words = rng.choice((0, .5, 1, 1)), rng.choice((0, .6))
            for i, words, chunk in document(rng, scenes, NEW_WORDS, fraction, kind):
                image = rng.random() < with_image
                if not image or rng.random() >= without_words:
                    chunk = in_words(scenes.all[i], words, chunk)
                text += tokenizer.encode("<image> " * image + f"{chunk} <end>")
        row.copy_(torch.tensor(text[:len(row)]))
    return rows


def image_documents(seed, tokenizer, scenes, n, length, fraction=.4):
    """Training documents with images, `fraction` of them about new words: tokens (n, 1 + length),
    with -100 after the last chunk that fits, and the indices of the images (n, M), M at most 9,
    padded with 0, which is never used, because no <image> token refers to it."""
    rng = random.Random(seed + 1)
    x, ids = torch.full((n, length + 1), -100), torch.zeros(n, 9, dtype=torch.long)
    for row, images in zip(x, ids):
        text, shown = [tokenizer.end], []
        while not shown:                             # with bytes, a caption may not fit
            kind = rng.choice(("colour", "shape"))
            for i, words, chunk in document(rng, scenes, TRAINED, fraction, kind):
                if words in IN_WORDS and rng.random() < .4:
                    chunk = in_words(scenes.all[i], words, chunk)           # besides the image
                chunk = tokenizer.encode(f"<image> {chunk} <end>")
                if len(text) + len(chunk) > len(row):
                    break
                text, shown = text + chunk, shown + [i]
        row[:len(text)] = torch.tensor(text)
        images[:len(shown)] = torch.tensor(shown)
    return x, ids[:, :(x == tokenizer.image).sum(1).max()]


class Query(typing.NamedTuple):
    """A question to a model. group: (row, column) in the table; prompt: text with <image> tokens;
    images: the test images for these; answer: the correct answer; words: the prompt with words
    instead of the images."""
    group: tuple
    prompt: str
    images: list
    answer: str = ""
    words: str = ""


SORTS = "1 figure", "2 figures", "3 figures", "unseen kind"


def queries(seed, n, shots):
    """All queries of the evaluation, sorted by group, and their scenes: captions of and questions
    about n test scenes and n single figures of unseen kinds, and n episodes of each sort for each
    number of shots."""
    seed += 1_000_000
    parts = (Scenes(seed, n, SEEN), Scenes(seed + 1, n, UNSEEN, single=True),
             Scenes(seed + 2, 2000, SEEN))
    scenes, unseen, others = parts
    rng, found = random.Random(seed - 999_998), []
    for i, figures in enumerate([*scenes.all, *unseen.all]):
        sort, what = SORTS[len(figures) - 1 if i < n else 3], caption(figures)
        found.append(Query(("caption", sort), "<image> there is", [i], what, f"{what} . there is"))
        for about in ABOUT:
            _, text, answer = question(rng, figures, about)
            if text:
                found.append(Query((about, sort), f"<image> {text}", [i], answer,
                                   in_words(figures, "question", text)))
    for k in shots:
        for _ in range(n):
            for name, episode in (
                    ("new word", new_words(rng, others, TRAINED, k, 2)),
                    ("held-out word", new_words(rng, others, HELD_OUT, k, 2)),
                    ("new word of 3", new_words(rng, others, TRAINED, k, 3)),
                    ("held-out word of 3", new_words(rng, others, HELD_OUT, k, 3)),
                    ("unasked question", unasked(rng, others, rng.choice(ABOUT[:3]), k))):
                at, answer = [2 * n + i for i, _, _ in episode], episode[-1][2]
                prompt = " <end> ".join(f"<image> {text}" for _, _, text in episode)
                words = " <end> ".join(in_words(others.all[i], *rest) for i, *rest in episode)
                found.append(Query((name, str(k)), prompt.removesuffix(f" {answer}"), at, answer,
                                   words.removesuffix(answer).strip()))
    every = [figures for part in parts for figures in part.all]
    return sorted(found, key=lambda q: q.group), every             # similar prompts per batch


def load_images(args):
    """Loads the data set args.data as Images on args.device.

    `shapes` is drawn at args.image_size pixels. `fashion-mnist`, `mnist` and `cifar10` are read
    from args.data_dir, and downloaded first if they are missing. Your own images are an `x.npz`
    (see read_npz) or a folder (see read_folder); they are shuffled, and may have no labels. Raises
    UserError if something is missing, broken or has another format.
    """
    name, size, device = args.data, args.image_size, args.device
    if name == "shapes":
        train, test = shapes(20_000, 0, size, device), shapes(2_000, 1, size, device)
        rows, columns = ("top", "middle", "bottom"), ("left", "centre", "right")
        names = dict(shape=SHAPES, colour=list(COLOURS), size=["small", "medium", "large"],
                     place=[f"{row} {column}" for row in rows for column in columns],
                     turn=[f"{45 * i} degrees" for i in range(8)])
        return Images(train[0], test[0], train[1], test[1], names)
    if name in IMAGE_SETS:
        read = read_cifar10 if name == "cifar10" else read_idx
        *arrays, classes = first(lambda: read(name, Path(args.data_dir)))
    elif name.endswith(".npz"):
        *arrays, classes = read_npz(Path(name))
    elif name and Path(name).is_dir():
        *arrays, classes = read_folder(Path(name), size, getattr(args, "skip_broken", False))
    else:
        raise UserError(f"there is no data set {name!r}: --data takes {', '.join(IMAGE_SETS)}, "
                        "shapes, an .npz file, or a folder of pictures")

    def part(x, y):
        if name in IMAGE_SETS:
            require(len(x) == len(y) and y.max() < len(classes), f"the labels of {name} in "
                    f"{args.data_dir} are not those of its images: delete them to fetch them anew")
        else:                               # often sorted by class
            order = np.random.default_rng(0).permutation(len(x))
            x, y = x[order], y[order]
        x = torch.from_numpy(np.array(x)).to(device)
        # grey: one channel, seen as three
        x = x[:, None].expand(-1, 3, -1, -1) if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
        return x, {"class": torch.from_numpy(y.astype(np.int64)).to(device)}

    (train, labels), (test, test_labels) = part(*arrays[:2]), part(*arrays[2:])
    if len(classes) < 2:                # no classes to learn
        return Images(train, test, {}, {}, {})
    return Images(train, test, labels, test_labels, {"class": [str(c) for c in classes]})


IMAGE_SETS = "fashion-mnist", "mnist", "cifar10"


def is_images(name):
    """Whether --data NAME means images, in a script that also takes text."""
    return name in ("shapes", *IMAGE_SETS) or name.endswith(".npz")


MNIST = list("0123456789")
FASHION = "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
IDX = ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
       "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
MIRRORS = {   # tried in this order
    "fashion-mnist": [
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "https://fashion-mnist.s3.eu-central-1.amazonaws.com/"],
    "mnist": ["https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/"],
    "cifar10": ["https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
                "https://www.cs.toronto.edu/~kriz/"],
    "shakespeare": ["https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                    "tinyshakespeare/"]}
SHA256 = {    # of the files; Fashion-MNIST: of the unpacked files, since mirrors compress anew
    "fashion-mnist": dict(zip(IDX, [
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"])),
    "mnist": dict(zip(IDX, [
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"])),
    "cifar10": {"cifar-10-binary.tar.gz":
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
    "shakespeare": {"input.txt":
                    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}}


def fetch(name, file, data_dir, kept=None):
    """Returns the path data_dir/name/file (or data_dir/kept), after a download from a mirror if it
    is missing. Only what has the right SHA-256 is kept: a .gz as it comes, else unpacked. A slow
    mirror is waited for (Ctrl-C ends it)."""
    path, wrong = data_dir / (kept or Path(name, file)), []
    if path.exists():
        return path
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    for mirror in MIRRORS[name]:
        try:
            with urllib.request.urlopen(mirror + file, timeout=20) as page, tqdm.wrapattr(
                    page, "read", page.length, desc=file, ncols=80) as source:
                raw = b"".join(iter(lambda: source.read(2 ** 16), b""))
        except (OSError, http.client.HTTPException) as error:              # or its URLError
            wrong.append(f"{mirror}: {getattr(error, 'reason', error)}")
            continue
        forms = [raw]
        with contextlib.suppress(OSError, EOFError, zlib.error):
            forms.append(gzip.decompress(raw))
        right = [x for x in forms if hashlib.sha256(x).hexdigest() == SHA256[name][file]]
        if not right:
            wrong.append(f"{mirror}: not the expected SHA-256")
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(raw if file.endswith(".gz") else right[0])
            return part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise UserError(f"cannot write {path} ({error.strerror}): choose another --data-dir"
                            ) from None
    raise UserError(f"could not download {file} ({'; '.join(wrong)}). Put the file at {path} "
                    "yourself, or use the embedded data, which needs no network: --data "
                    + ("pydocs" if name == "shakespeare" else "shapes"))


def read_idx(name, data_dir):
    """Reads four gzipped IDX files, as of MNIST: x_train, y_train, x_test, y_test, classes."""
    arrays = []
    for file in IDX:
        path, dims = fetch(name, file, data_dir), 3 if "images" in file else 1
        try:
            with gzip.open(path) as f:
                raw = f.read(1 << 26)                             # MNIST's largest is 47 MB
            shape = np.frombuffer(raw, ">u4", dims, 4)            # after the magic number
            arrays.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape))
        except (OSError, EOFError, ValueError, zlib.error):
            raw = b""
        require(raw[:4] == bytes([0, 0, 8, dims]), f"{path} is truncated or broken, or not an IDX "
                f"file of {dims} dimensions: delete it to fetch it anew")
    return *arrays, FASHION if name == "fashion-mnist" else MNIST


def read_cifar10(name, data_dir):
    """Reads CIFAR-10's binary archive: each record is a label and the planes R, G and B."""
    path = fetch(name, "cifar-10-binary.tar.gz", data_dir)
    parts = {"data": [], "test": []}
    try:
        with tarfile.open(path) as tar:
            for member in sorted(tar, key=lambda m: m.name):
                if member.isfile() and member.name.endswith(".bin") and member.size < 1 << 26:
                    raw = np.frombuffer(tar.extractfile(member).read(), np.uint8)
                    parts[Path(member.name).name[:4]].append(raw.reshape(-1, 3073))
        train, test = (np.concatenate(parts[key]) for key in ("data", "test"))
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zlib.error):
        raise UserError(f"{path} is truncated or not CIFAR-10's binary archive: delete it to fetch "
                        "it anew") from None
    split = lambda a: (a[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), a[:, 0])
    return *split(train), *split(test), CIFAR10


def read_arrays(path, *names):
    """Reads the arrays of these names from an .npz: {name: array}. Nothing is unpickled. Raises
    UserError if the file is broken or has none of them."""
    require(path.is_file(), f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            large = sum(info.file_size for info in file.zip.infolist())
            require(large < memory(), f"{path} declares {large:,} bytes, more than memory holds")
            found = {key: file[key] for key in file.files if key in names}
            found = {key: x for key, x in found.items() if isinstance(x, np.ndarray)}
            held = ", ".join(file.files)
    except UserError:
        raise
    except Exception as error:                          # NumPy raises many types for a broken file
        pickled = "Object arrays" in str(error)
        why = "it holds pickled objects" if pickled else "it is truncated or no .npz"
        raise UserError(f"cannot read {path}: {why}; write plain arrays with np.savez") from None
    require(found, f"{path} holds no array {names[0]}, but {held}")
    return found


def read_npz(path):
    """Reads an .npz: x_train, y_train, x_test, y_test and the names of the classes.

    The arrays have these names, or MedMNIST's (train_images, train_labels, ...). Images are uint8,
    or floats in [0, 1], (n, S, S), (n, S, S, 1) or (n, S, S, 3); labels are of any type, (n,) or
    (n, 1). If there are no test images, every fifth image is one; without labels, y is 0.
    """
    ours = "x_train", "y_train", "x_test", "y_test"
    theirs = "train_images", "train_labels", "test_images", "test_labels"
    found = read_arrays(path, *ours, *theirs, "images", "classes")
    x, y, x_test, y_test = (found.get(a, found.get(b)) for a, b in zip(ours, theirs))
    x = found.get("images") if x is None else x
    require(x is not None, f"{path} has no x_train")
    x = as_images(f"{path}: x_train", x)
    one_each = lambda part, images, labels: require(
        labels.size == len(images), f"{path}: y_{part} is {labels.dtype} {labels.shape}, not one "
        f"label for each of {len(images)} images")
    if y is not None:
        one_each("train", x, y)
    if x_test is None:
        fifth = np.arange(len(x)) % 5 == 4
        y, y_test = (None, None) if y is None else (y.ravel()[~fifth], y.ravel()[fifth])
        x, x_test = x[~fifth], x[fifth]
    x_test = as_images(f"{path}: x_test", x_test)
    require(len(x) and x.shape[1:] == x_test.shape[1:], f"{path}: train and test differ in size")
    require((y is None) == (y_test is None), f"{path} has labels of one part alone")
    if y is None:
        return x, np.zeros(len(x)), x_test, np.zeros(len(x_test)), [""]
    one_each("test", x_test, y_test)
    names, ids = np.unique(y.ravel(), return_inverse=True)
    test_ids = np.searchsorted(names, y_test.ravel()).clip(max=len(names) - 1)
    require((names[test_ids] == y_test.ravel()).all(), f"{path}: y_test has labels that y_train "
            "lacks")
    given = np.atleast_1d(found.get("classes", names))
    if names.dtype.kind in "iu" and names.min() >= 0 and names.max() < len(given) != len(names):
        given = given[names]                            # some classes have no images
    names = given if len(given) == len(names) else names
    return x, ids, x_test, test_ids, names.tolist()


def as_images(what, x):
    """Converts images of an .npz to uint8 (n, S, S) or (n, S, S, 3), or raises UserError."""
    if x.ndim == 4 and x.shape[3] == 1:
        x = x[..., 0]
    require(x.ndim in (3, 4) and x.shape[3:] in ((), (3,)) and x.shape[1] == x.shape[2] and x.size,
            f"{what} is {x.dtype} {x.shape}, not square images (n, S, S), (n, S, S, 1) or "
            "(n, S, S, 3)")
    if x.dtype.kind == "f":
        require(0 <= x.min() and x.max() <= 1, f"{what} has floats from {x.min():g} to "
                f"{x.max():g}: scale them to [0, 1], or take uint8")
        x = (x * 255).round().astype(np.uint8)
    require(x.dtype == np.uint8, f"{what} is {x.dtype}: take uint8, or floats in [0, 1]")
    return x


def read_pictures(path, size, device="cpu"):
    """Reads `images` (n, size, size, 3) of an .npz: (n, 3, size, size), uint8. Raises UserError if
    something is missing, broken or has another format."""
    x = as_images(f"{path}: images", read_arrays(Path(path), "images")["images"])
    require(x.shape[1:] == (size, size, 3), f"{path}: images is {x.shape}, not (n, {size}, {size}, "
            "3): scale them, or take another --image-size")
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().to(device)


def files_below(folder):
    """The files below a folder, sorted, without hidden files and hidden folders."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def square(file, size):
    """Reads a picture, crops it to a square in the centre and scales it: (size, size, 3), uint8.
    Also returns its original width and height. Transparent pixels become white."""
    from PIL import Image, ImageOps
    picture = Image.open(file)
    own, form = picture.size, picture.format
    picture.draft("RGB", (2 * size, 2 * size))                   # decodes a JPEG at a lower size
    picture = ImageOps.exif_transpose(picture)                   # upright
    if picture.mode == "F" or picture.mode == "I" and form != "PNG":
        raise ValueError("it has 32 bits a channel: save it with 8 or 16")
    if picture.mode[0] == "I":                                   # 16-bit grey
        picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = left, top, left + side, top + side
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box)), own


def list_pictures(path, known):
    """The pictures below a folder, files with known endings: [(file, "train", "test" or "", class
    name or "")], and the number of other files, {ending: n}."""
    files = files_below(path)
    others = collections.Counter(file.suffix.lower() or file.name for file in files
                                 if file.suffix.lower() not in known)
    found = [(file, file.relative_to(path).parts[:-1]) for file in files
             if file.suffix.lower() in known]
    tops = {parts[0].lower() for _, parts in found if parts}
    tests = [name for name in ("test", "val", "valid", "validation") if name in tops]
    part = {"train": "train", tests[0]: "test"} if tests and "train" in tops else {}
    if part:
        own = [(file, parts) for file, parts in found if parts and parts[0].lower() in part]
        others["pictures in other folders"] += len(found) - len(own)
        found = own
    rows = [(file, part[parts[0].lower()] if part else "", (*parts[bool(part):], "")[0])
            for file, parts in found]
    classes = {name for _, split, name in rows if split != "test"}
    if len(classes) < 2 or "" in classes:
        return [(file, split, "") for file, split, _ in rows], +others
    if "" in {name for _, split, name in rows if split == "test"}:       # not usable for tests
        flat = sum(split == "test" for _, split, _ in rows)
        others["test pictures without a class"] = flat
        rows = [(file, "", name) for file, split, name in rows if split == "train"]
    return rows, +others


def read_folder(path, size, skip_broken=False):
    """Reads a folder of pictures: x_train, y_train, x_test, y_test and the names of the classes.
    Prints a summary.

    Its subfolders are classes if there are at least two and no pictures next to them; otherwise
    there is a single class, "", and y is 0. train/ and test/ (or val, valid, validation) contain
    the two parts; without them every fifth picture (of each class) is a test picture. Raises
    UserError for a picture that cannot be read, unless skip_broken.
    """
    try:
        from PIL import Image
    except ImportError:
        raise UserError("a folder of pictures is read with Pillow: pip install pillow") from None
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found, others = list_pictures(path, known)
    x, y, sizes = {"train": [], "test": []}, {"train": [], "test": []}, []
    count = collections.Counter()
    for file, part, name in progress(found, "reading pictures"):
        try:
            picture, own = square(file, size)
        except Exception as error:                      # Pillow raises many types for a broken file
            why = getattr(error, "strerror", None) or str(error).split(" '")[0]
            require(skip_broken, f"cannot read the picture {file} ({why}): mend it, move it away, "
                    "or leave such pictures out with --skip-broken")
            others["broken"] += 1
            continue
        part = part or ("test" if count[name] % 5 == 4 else "train")
        count[name] += 1
        x[part].append(picture), y[part].append(name), sizes.append(own)
    require(x["train"] and x["test"], f"{path} has {len(x['train'])} pictures to train on and "
            f"{len(x['test'])} to test on: it needs five or more, or some in train and in test")
    classes = sorted(set(y["train"]))
    missing = sorted(set(y["test"]) - set(classes))
    require(not missing, f"{path}: no picture to train on is of the class {', '.join(missing)}")
    kinds = [f"{name} {n:,}" for name, n in sorted(count.items())] if len(classes) > 1 else []
    kinds = kinds[:12] + [f"{len(kinds) - 12} more classes"] * (len(kinds) > 12)
    least, most = (" x ".join(map(str, map(pick, zip(*sizes)))) for pick in (min, max))
    left = ", ".join(f"{n:,} {ending}" for ending, n in others.most_common(8))
    say(f"{path}: {len(sizes):,} pictures ({', '.join(kinds) or 'without labels'}) of {least}"
        + f" to {most}" * (least != most) + f" pixels, {len(x['test']):,} of them to test on"
        + f"; left out: {left}" * bool(left) + ".")
    ids = {part: np.array([*map(classes.index, names)]) for part, names in y.items()}
    return np.array(x["train"]), ids["train"], np.array(x["test"]), ids["test"], classes


@dataclass
class Text:
    """Documents as bytes: the first nine tenths of each for training, the rest for validation."""
    names: list[str]
    train: list[bytes]
    val: list[bytes]


def load_text(name, data_dir="data", parts=1, utf8=False, flag="--data"):
    """Loads a text by name. parts: a single document is cut into that many; utf8: whether documents
    have to be UTF-8; flag: the flag to mention in errors.

    `pydocs` is the reference manual inside every Python, `pycode` the modules of its standard
    library, `shakespeare` the 1.1 MB of char-rnn, downloaded to data_dir if it is missing. Others
    are a file, or a folder of .txt and .md files, of which a summary is printed. Raises UserError
    if something is missing, unreadable or empty.
    """
    if name == "pydocs":
        documents = manual()
    elif name == "pycode":
        folder = Path(sysconfig.get_paths()["stdlib"])
        documents = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.py"))}
        require(documents, f"this Python has no source of its standard library in {folder}")
    else:
        path = Path(name)
        if name == "shakespeare":
            path = first(lambda: fetch(name, "input.txt", Path(data_dir), "tinyshakespeare.txt"))
        require(name and path.exists(), f"there is no text {name!r}: {flag} takes pydocs, pycode, "
                "shakespeare, a file, or a folder of .txt files; for images gpt.py takes shapes, "
                f"{', '.join(IMAGE_SETS)} or an .npz")
        documents = read_documents(path)
    documents = {name: raw for name, raw in documents.items() if raw.strip(b" \t\r\n\0")}
    require(documents, f"the text of {flag} {name} is empty")
    for document, raw in documents.items() if utf8 else ():
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{document} of {flag} {name} is not UTF-8 (byte {raw[error.start]:#x} "
                            f"at {error.start}): save it as UTF-8; gpt.py takes any bytes"
                            ) from None
    if len(documents) == 1 and parts > 1:
        (raw,) = documents.values()
        at = [boundary(raw, len(raw) * i // parts) for i in range(parts + 1)]
        documents = {f"part {i}": raw[a:b] for i, (a, b) in enumerate(zip(at, at[1:]), 1)}
    cut = [boundary(raw, len(raw) * 9 // 10) for raw in documents.values()]
    return Text(list(documents), [raw[:at] for raw, at in zip(documents.values(), cut)],
                [raw[at:] for raw, at in zip(documents.values(), cut)])


def windows(args, name, T, tokenizer, flag="--data"):
    """Windows of T tokens of a text: training windows start at every token, (n, T); validation
    windows do not overlap, (m, T)."""
    text = load_text(name, args.data_dir, flag=flag)
    train, val = (tokenizer.stream(part).to(args.device) for part in (text.train, text.val))
    require(len(val) >= T <= len(train), f"the last tenth of {flag} {name} has {len(val)} tokens, "
            f"the rest {len(train)}, and a context of {T} needs as many in both: take a longer "
            "text or a shorter --context")
    return train.unfold(0, T, 1), val.unfold(0, T, T)


def read_documents(path):
    """Reads a file or a folder: {name: bytes}. Prints a summary of a folder."""
    require(path.is_dir() or path.is_file(), f"{path} is no regular file")
    below = files_below(path) if path.is_dir() else []
    files = [file for file in below if file.suffix.lower() in (".txt", ".md")] or [path]
    others = collections.Counter(file.suffix or file.name for file in set(below) - set(files))
    require(path.is_file() or files != [path], f"{path} holds no .txt or .md file")
    try:
        documents = {file.stem if len(files) == 1 else str(file.relative_to(path)):
                     file.read_bytes() for file in files}
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror})") from None
    if below:
        left = ", ".join(f"{n:,} {ending}" for ending, n in others.most_common(8))
        say(f"{path}: {len(files):,} documents, {sum(map(len, documents.values())):,} bytes"
            + f"; left out: {left}" * bool(left) + ".")
    return documents


def pieces(raw, size=2 ** 20, errors="strict"):
    """Decodes bytes (UTF-8) in pieces of about `size` bytes, cut after a line or a word."""
    start = 0
    while start < len(raw):
        at = start + size
        end = raw.find(b"\n", at) + 1 or raw.find(b" ", at) + 1 or len(raw)
        yield raw[start:end].decode(errors=errors)
        start = end


def boundary(raw, at):
    """The first index from `at` on at which a UTF-8 character of raw begins."""
    while at < len(raw) and raw[at] & 0xC0 == 0x80:
        at += 1
    return at


def manual():
    """The manual that help() shows, without its tables: {topic: bytes}. Many topics repeat others
    word for word. Each paragraph of more than 40 characters is kept once, in the longest topic, so
    that it is not used for training AND validation."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python has no manual in it: take another --data") from None
    seen, documents = set(), {}
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        kept = []
        for part in re.split(r"\n{2,}", text.strip()):
            if part not in seen and not part.startswith(("+", "|")):
                kept.append(part)
            if len(part) > 40:
                seen.add(part)
        documents[name] = "\n\n".join(kept).encode()
    return documents


def printable(text):
    """The text, with replacement characters for control characters."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}"
                   for c in text.replace("\r\n", "\n"))


class Bytes:
    """Tokenizer: one token per byte, 0 to 255, and BOS, which precedes a text."""
    BOS, vocab = 256, 257
    sizes = torch.arange(257) < 256          # bytes per token: 1, or 0 for BOS

    def encode(self, text):
        """str or bytes -> (n,) int64."""
        raw = text.encode() if isinstance(text, str) else text
        return torch.from_numpy(np.frombuffer(raw, np.uint8).astype(np.int64))

    def decode(self, tokens):
        """(n,) -> str. Invalid UTF-8 and control characters become replacement characters."""
        return printable(bytes(t for t in map(int, tokens) if t < 256).decode(errors="replace"))

    def stream(self, documents):
        """All documents as one sequence, with BOS before each: (n,) int16, to save memory."""
        parts = [part for raw in documents for part in ([self.BOS], np.frombuffer(raw, np.uint8))]
        return torch.from_numpy(np.concatenate(parts, dtype=np.int16))


@functools.cache
def gpt2_words():
    """GPT-2's regular expression for words: endings such as 's; letters, numbers or other signs,
    with a space before; spaces. Python's re lacks the character classes that it uses."""
    kinds = dict(L="", N="", Z="")
    kind = lambda i: "Z" if chr(i) in "\t\n\v\f\r\x85" else unicodedata.category(chr(i))[0]
    for name, run in itertools.groupby(range(sys.maxunicode + 1), kind):
        first, *rest = run
        if name in kinds:
            kinds[name] += f"\\U{first:08x}-\\U{[first, *rest][-1]:08x}"
    L, N, Z = kinds.values()
    return re.compile(f"'(?:[sdmt]|ll|ve|re)| ?[{L}]+| ?[{N}]+| ?[^{Z}{L}{N}]+"
                      f"|[{Z}]+(?![^{Z}])|[{Z}]+")


class BPE:
    """GPT-2's tokenizer, byte pair encoding: the bytes of a word are merged pair by pair, in the
    order of a list of merges (Radford et al. 2019, sec. 2.2). sizes (vocab,): bytes per token."""

    def __init__(self, vocab, merges):
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]    # written as themselves
        shown = [*plain, *(byte for byte in range(256) if byte not in plain)]
        shown = {chr(b if i < len(plain) else 256 + i - len(plain)): b for i, b in enumerate(shown)}
        self.BOS, self.vocab = vocab["<|endoftext|>"], len(vocab)
        self.bytes = {i: b"" if i == self.BOS else bytes(shown[c] for c in token)
                      for token, i in vocab.items()}
        self.byte_ids = {byte: vocab[c] for c, byte in shown.items()}
        self.pairs = {(vocab[a], vocab[b]): (rank, vocab[a + b])
                      for rank, (a, b) in enumerate(merges)}
        self.sizes = torch.tensor([len(self.bytes[i]) for i in range(self.vocab)])
        self.tokens = functools.lru_cache(2 ** 17)(self.join)

    @classmethod
    def load(cls, folder):
        """Loads the tokenizer of a folder: vocab.json and merges.txt (OpenAI: encoder.json and
        vocab.bpe), or tokenizer.json. Raises UserError."""
        folder = Path(folder).parent if Path(folder).is_file() else folder
        for names in "vocab.json merges.txt", "encoder.json vocab.bpe", "tokenizer.json":
            files = [Path(folder, name) for name in names.split()]
            if not all(file.exists() for file in files):
                continue
            try:
                model = json.loads(files[0].read_text(encoding="utf-8"))
                lines = files[-1].read_text(encoding="utf-8").split("\n")
                if len(files) == 1:
                    lines, model = model["model"]["merges"], model["model"]["vocab"]
                pairs = [line.split(" ") if isinstance(line, str) else line for line in lines
                         if line and not str(line).startswith("#version")]
                return cls(model, pairs)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
                raise UserError(f"{' and '.join(map(str, files))} do not hold GPT-2's byte pair "
                                "encoding, or do not belong together: fetch them anew") from None
        raise UserError(f"{folder} holds no tokenizer: fetch vocab.json and merges.txt to it, too")

    def join(self, word):
        """The tokens of a word. Merges repeatedly, everywhere in it, the pair of neighbours that
        comes first in the list of merges."""
        ids = [self.byte_ids[byte] for byte in word.encode()]
        order = lambda pair: self.pairs.get(pair, (math.inf,))[0]
        while (best := min(zip(ids, ids[1:]), key=order, default=None)) in self.pairs:
            old, ids = ids, []
            for token in old:
                if ids and (ids[-1], token) == best:
                    ids[-1] = self.pairs[best][1]
                else:
                    ids.append(token)
        return ids

    def encode(self, text, dtype=np.int64):
        """str or bytes -> (n,) int64. Invalid UTF-8 becomes U+FFFD."""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        words = itertools.chain.from_iterable(map(self.tokens, gpt2_words().findall(text)))
        return torch.from_numpy(np.fromiter(words, dtype))

    def stream(self, documents):
        """All documents as one sequence, with BOS before each: (n,) int32."""
        BOS = torch.tensor([self.BOS], dtype=torch.int32)
        return torch.cat([part for raw in documents for part in (
            BOS, *(self.encode(text, np.int32) for text in pieces(raw, errors="replace")))])

    def decode(self, tokens):
        """(n,) -> str. Invalid UTF-8 and control characters become replacement characters."""
        return printable(b"".join(self.bytes[int(t)] for t in tokens).decode(errors="replace"))


HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"     # Chinese characters


class Words:
    """Tokenizer: the most frequent lower-case words and punctuation marks of a text."""
    SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]           # tokens 0 to 4

    def __init__(self, words):
        self.words = self.SPECIAL + [word for word in words if word not in self.SPECIAL]
        self.vocab = len(self.words)
        self.ids = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def of(cls, documents, most):
        """Builds the tokenizer of documents (bytes, UTF-8): at most `most` tokens, each of which
        occurs at least twice. Raises UserError if there are none."""
        count = collections.Counter(w for raw in documents for text in pieces(raw)
                                    for w in cls.split(text))
        usual = sorted((word for word in count if count[word] > 1), key=lambda w: (-count[w], w))
        require(usual, "no word of this text occurs twice: take a longer text")
        return cls(usual[:most - len(cls.SPECIAL)])

    @staticmethod
    def split(text):
        """Yields the words and marks of a text. A run of the same mark, such as >>>, is one mark;
        accents and vowel signs stay with their letters; each Chinese character is a word, as in
        BERT."""
        text = text.removeprefix("\ufeff").lower()                     # byte order mark
        signs = "".join(c for c in set(text)                           # marks, and joiners
                        if unicodedata.category(c)[0] == "M" or c in "\u200c\u200d")
        word = f"(?:[^\\W{HAN}][{signs}]*)+" if signs else f"[^\\W{HAN}]+"
        return (m[0] for m in re.finditer(rf"{word}|[{HAN}]|([^\w\s])\1*", text))

    def encode(self, text, dtype=np.int64):
        """str -> (n,) int64. [UNK] is the only special token in the result."""
        return torch.from_numpy(np.fromiter((self.ids.get(w, 1) for w in self.split(text)), dtype))

    def stream(self, documents):
        """All documents (bytes, UTF-8) as one sequence, with [SEP] before each: (n,) int32."""
        sep = torch.tensor([self.ids["[SEP]"]], dtype=torch.int32)
        return torch.cat([part for raw in documents for part in (
            sep, *(self.encode(text, np.int32) for text in pieces(raw)))])

    def decode(self, tokens):
        """(n,) -> str."""
        return self.join([self.words[int(t)] for t in tokens])

    @staticmethod
    def join(words):
        """Joins words with spaces, except before punctuation and inside brackets."""
        text = printable(" ".join(words))
        text = re.sub(r"(?<=\w) ([-/]) (?=\w)|(?<=\d) (\.) (?=\d)", r"\1\2", text)
        text = re.sub(r"(?<=\w) (['’]) (?=(s|t|d|m|re|ll|ve)\b)", r"\1", text)
        return re.sub(r" (?=[.,;:!?)\]}])|(?<=[(\[{]) ", "", text)


class WordPiece(Words):
    """BERT's tokenizer: splits words into the longest pieces in a published vocabulary; pieces
    inside a word begin with ##. Special tokens come first here; published: the published ids."""
    # the range from 2b920 on starts at 2b820 in Google's code
    CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df"
                     "\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]")

    def __init__(self, words, lower=True):
        super().__init__(words)
        self.lower, self.pieces_of = lower, functools.lru_cache(2 ** 17)(self.cut)
        ids = {word: i for i, word in enumerate(words)}
        self.published = torch.tensor([ids[word] for word in self.words])

    @classmethod
    def load(cls, folder):
        """Loads the tokenizer of a folder: vocab.txt, with tokenizer_config.json if present, or
        tokenizer.json. Raises UserError."""
        folder = Path(folder).parent if Path(folder).is_file() else folder
        path, config = Path(folder, "vocab.txt"), Path(folder, "tokenizer_config.json")
        try:
            if path.exists():
                words = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
                rules = json.loads(config.read_text()) if config.exists() else {}
                return cls(words, rules.get("do_lower_case", True))
            path = Path(folder, "tokenizer.json")
            require(path.exists(), f"{folder} holds no tokenizer: fetch vocab.txt to it, too")
            state = json.loads(path.read_text(encoding="utf-8"))
            require(state["model"]["type"] == "WordPiece", f"{path} is no WordPiece vocabulary")
            vocab = state["model"]["vocab"]
            return cls(sorted(vocab, key=vocab.get), state["normalizer"]["lowercase"])
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} does not hold BERT's vocabulary: fetch it anew") from None

    def split(self, text):
        """Yields the pieces of a text, or [UNK] for a word that cannot be split."""
        return itertools.chain.from_iterable(map(self.pieces_of, re.findall(r"[^ \t\n\r]+", text)))

    def cut(self, text):
        """The pieces of a text without ASCII spaces. As in BERT, control characters are removed,
        other spaces unified, accents dropped; a mark or a Chinese character is a word."""
        category, found = unicodedata.category, []
        text = "".join(" " if category(c)[0] == "Z" else c for c in text
                       if c != "\ufffd" and category(c) not in ("Cc", "Cf", "Co"))
        text = self.CJK.sub(r" \g<0> ", text)
        if self.lower:
            text = unicodedata.normalize("NFD", text)                # splits off accents
            text = "".join(c.lower() for c in text if category(c) != "Mn")
        mark = lambda c: c in string.punctuation or category(c)[0] == "P"
        for word in "".join(f" {c} " if mark(c) else c for c in text).split():
            parts, start = [], 0
            while start < len(word):
                prefix, ends = "##" * (start > 0), range(len(word), start, -1)
                end = next((end for end in ends if prefix + word[start:end] in self.ids), 0)
                if not end or len(word) > 100:
                    parts = ["[UNK]"]
                    break
                parts.append(prefix + word[start:end])
                start = end
            found += parts
        return found

    @staticmethod
    def join(words):
        """Joins pieces to a text."""
        return Words.join(" ".join(words).replace(" ##", "").split(" "))


MOST_PASSAGES = 500      # per document


class Passages:
    """Passages of the longest documents, to classify by document: train, test (n, --passage), with
    [CLS] before and [SEP] after each; labels, test_labels (n,); names: those of the documents."""

    def __init__(self, args, tokenizer, text):
        require(args.passage <= args.context, f"--passage {args.passage} is more than --context "
                f"{args.context}: take a shorter passage")
        longest = sorted(range(len(text.train)), key=lambda i: -len(text.train[i]))[:args.classes]
        self.names, size = [text.names[i] for i in longest], args.passage - 2
        train, test = ([tokenizer.encode(documents[i][:2 ** 20].decode(errors="ignore"))
                        for i in longest] for documents in (text.train, text.val))
        require(len(longest) > 1 and min(map(len, train + test)) >= size, f"--data {args.data} has "
                f"no {args.classes} parts that are long enough to classify passages: take fewer "
                "--classes, or a shorter --passage")

        def cut(documents, step):
            parts = [x.unfold(0, size, step)[:MOST_PASSAGES] for x in documents]
            labels = torch.cat([torch.full((len(x),), i) for i, x in enumerate(parts)])
            x = F.pad(torch.cat(parts), (1, 0), value=tokenizer.ids["[CLS]"])
            x = F.pad(x, (0, 1), value=tokenizer.ids["[SEP]"])
            return x.to(args.device), labels.to(args.device)
        self.train, self.labels = cut(train, size)
        self.test, self.test_labels = cut(test, max(1, size // 2))

    def normalize(self, x):
        """Tokens stay as they are. (Images are normalised.)"""
        return x


# The examples of lora.py.


def load_examples(args, tokenizer):
    """Training and validation examples of the new text: tokens and targets, (n, 2, 1 + T) and
    (m, 2, 1 + T), each with the newline before it."""
    text = load_text(args.data, args.data_dir)
    if isinstance(tokenizer, Bytes) and not args.data.endswith(".tsv"):
        train, val = (line_starts(args, part, tokenizer) for part in (text.train, text.val))
    else:
        whole = [a + b for a, b in zip(text.train, text.val)]
        rows = lines(args, [line for raw in whole for line in raw.splitlines()], tokenizer)
        train, val = rows[:len(rows) * 9 // 10], rows[len(rows) * 9 // 10:]
    require(args.k <= len(train) and len(val), f"--k {args.k} is more than the {len(train)} "
            f"examples of {args.example} tokens that --data {args.data} has ({len(val)} in its "
            "last tenth, to test on): take a longer text, or a smaller --k or --example")
    return train, val


def line_starts(args, documents, tokenizer):
    """Examples of T = --example bytes from the start of each line on, into the next if need be."""
    x, T, newline = tokenizer.stream(documents).to(args.device), args.example, ord("\n")
    if len(x) <= T:
        return x.new_empty(0, 2, T + 1)
    i = ((x[:-T] == newline) & (x[1:len(x) - T + 1] != newline)).nonzero().flatten()
    rows = x.unfold(0, T + 1, 1)[i]
    rows = rows[(rows != tokenizer.BOS).all(1)]                              # within one document
    return torch.stack([rows, F.pad(rows[:, 1:], (1, 0), value=-100)], 1)


def lines(args, texts, tokenizer):
    """Examples of whole lines, cut at --example tokens or padded with BOS, which is ignored in the
    loss, and so is the text before the first tab in a .tsv. At most 20,000 of them."""
    pairs, T = args.data.endswith(".tsv"), args.example
    newline, rows = tokenizer.encode("\n"), []
    for i in torch.linspace(0, len(texts) - 1, min(len(texts), 20_000)).long().tolist():
        line = texts[i]
        before, tab, after = line.partition(b"\t") if pairs else (b"", b"", line)
        require(tab or not pairs or not line.strip(), f"line {i + 1} of {args.data} has no tab: "
                "each line is a pair, with a tab between its texts")
        given, counted = tokenizer.encode(before + tab), tokenizer.encode(after + b"\n")
        if after.strip() and len(given) < T:
            x = torch.cat([newline, given, counted])[:T + 1]
            target = torch.cat([torch.full_like(x[:1 + len(given)], -100), x[1 + len(given):]])
            rows.append(torch.stack([F.pad(x, (0, T + 1 - len(x)), value=tokenizer.BOS),
                                     F.pad(target, (0, T + 1 - len(x)), value=-100)]))
    return torch.stack(rows).to(args.device) if rows else torch.zeros(0, 2, T + 1)


def choose(train, k, seed):
    """Chooses k of the examples (n, 2, 1 + T) at random; a smaller k gives the first of them."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train[order[:k].to(train.device)].long()


def in_a_row(examples, bos):
    """The tokens of examples (k, 2, 1 + T) as one sequence (n,), without the BOS of the padding."""
    return examples[:, 0][examples[:, 0] != bos]


# ------------------------------------------------------------------------- published weights

DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
              I64=torch.int64, I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8,
              BOOL=torch.bool)


def read_safetensors(path):
    """Reads a .safetensors file: {name: tensor}. The format is eight bytes with the size of the
    header, the header in JSON, and the numbers (https://huggingface.co/docs/safetensors), which are
    memory-mapped. Raises UserError with the name of the first tensor that is invalid."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(start - 8) if start <= min(size, 10 ** 8) else b"")
            header.pop("__metadata__", None)
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{path} is truncated or no .safetensors file: fetch it anew") from None
    data, found = torch.from_file(str(path), size=size, dtype=torch.uint8), {}
    for name, about in header.items():
        try:
            dtype, (a, b) = DTYPES[about["dtype"]], about["data_offsets"]
            if not 0 <= a <= b <= size - start:
                raise ValueError
            part = data[start + a:start + b]
            part = part.clone() if (start + a) % dtype.itemsize else part          # unaligned
            found[name] = part.view(dtype).view(about["shape"])
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise UserError(f"{path} is truncated or broken at the tensor {name}: fetch it anew"
                            ) from None
    return found


def read_weights(path, wanted, flag="--weights"):
    """Reads published weights: {name: tensor}, and the numbers in the config.json next to them, if
    any. path: a file (.safetensors, or from torch.save), or a folder as on a model hub. No code in
    them is executed. Raises UserError; wanted: what to download, and from where."""
    path = Path(path)
    kinds = "model.safetensors", "*.safetensors", "pytorch_model*.bin", "*.pt", "*.pth"
    shards = [[path]] if path.is_file() else [sorted(path.glob(kind)) for kind in kinds]
    shards = next(filter(None, shards), [])
    require(shards, f"{flag} {path} holds no weights. Fetch {wanted}"
            + ", or give the folder of a run" * (flag == "--base"))
    require(len(shards) == 1 or all("-of-" in file.name for file in shards), f"{flag} {path} holds "
            f"several models: give one, such as {shards[0]}")
    found, config = {}, (path if path.is_dir() else path.parent) / "config.json"
    for file in shards:
        if file.suffix == ".safetensors":
            found |= read_safetensors(file)
            continue
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):     # MAE's authors
                state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:                      # torch raises many types for a broken file
            code = "it holds code, which is not executed" if "weights_only" in str(error) else \
                "it is truncated or was not written by torch.save"
            raise UserError(f"cannot read {file}: {code}") from None
        inner = [state[key] for key in ("state_dict", "model")
                 if isinstance(state, dict) and isinstance(state.get(key), dict)]
        state = inner[0] if inner else state
        require(isinstance(state, dict) and state and all(
            isinstance(name, str) and torch.is_tensor(x) for name, x in state.items()),
            f"{file} holds no table of tensors")
        found |= state
    try:
        settings = json.loads(config.read_text()) if config.exists() else {}
        return found, {name: x for name, x in settings.items() if type(x) in (int, float)}
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{config} cannot be read: fetch it anew") from None


# Published models: which files to download, and from where.
HUB = {
    "GPT-2": "config.json, model.safetensors (548 MB), vocab.json and merges.txt of "
             "https://huggingface.co/openai-community/gpt2, or of gpt2-medium, -large, -xl there",
    "BERT": "config.json, model.safetensors (440 MB) and vocab.txt of "
            "https://huggingface.co/google-bert/bert-base-uncased",
    "MAE": "mae_visualize_vit_base.pth (450 MB) of https://dl.fbaipublicfiles.com/mae/visualize/, "
           "or config.json and the weights of https://huggingface.co/facebook/vit-mae-base",
    "ResNet": "resnet18-f37072fd.pth (47 MB) of https://download.pytorch.org/models/"}


def rename(name, names, back=False):
    """The new name of a tensor. names: "theirs=ours theirs=ours ...", parts of a name to replace,
    one after the other; back: from ours to theirs."""
    for pair in names.split():
        theirs, ours = pair.split("=")
        if not back:
            name = name.replace(theirs, ours)
        elif ours:
            name = name.replace(ours, theirs)
    return name


def published(path, kind, names, needs, flag="--weights"):
    """Reads published weights under a script's names: {name: tensor}, and the config's numbers.

    kind: a key of HUB; names: see rename; tensors with a - in their new name are dropped; needs: a
    name that this kind of model must have. Tensors with the same new name must be equal, because
    they are tied. Raises UserError."""
    weights, config = read_weights(path, HUB[kind], flag)
    state = {}
    for theirs, x in weights.items():
        name = rename(theirs, names)
        require(name not in state or "-" in name or torch.equal(state[name], x), f"{flag} {path} "
                f"has its own {theirs}, and here it is tied to {name}")
        state[name] = x
    state = {name: x for name, x in state.items() if "-" not in name}
    require(needs in state, f"{flag} {path} is no {kind}: fetch {HUB[kind]}")
    return state, config


# GPT-2's names of the tensors = ours (-: the causal mask, not loaded).
GPT2 = ("transformer.= wte=token_embed lm_head=token_embed wpe=pos_embed h.=blocks. ln_f.=norm. "
        "ln_=norm c_attn=qkv attn.c_proj=attn.proj mlp.c_proj=mlp.fc2 c_fc=fc1 .attn.bias=- "
        ".attn.masked_bias=-")

# BERT's names of the tensors = ours (-: not loaded).
BERT = ("position_ids=- seq_relationship=- bert.= gamma=weight beta=bias "
        "embeddings.word_embeddings=token_embed embeddings.position_embeddings=pos_embed "
        "embeddings.token_type_embeddings=segment_embed embeddings.LayerNorm=norm "
        "encoder.layer=blocks attention.self=attn attention.output.dense=attn.proj "
        "attention.output.LayerNorm=norm1 intermediate.dense=mlp.fc1 output.dense=mlp.fc2 "
        "output.LayerNorm=norm2 pooler.dense=pooler cls.predictions.transform.dense=mlm_transform "
        "cls.predictions.transform.LayerNorm=mlm_norm cls.predictions.=mlm_ "
        "mlm_decoder.weight=token_embed.weight mlm_decoder.bias=mlm_bias")

# The names of a ViT's tensors in transformers (versions 4 and 5) and timm = ours.
VIT = ("patch_embeddings.projection=patch_embed patch_embed.proj=patch_embed decoder.= vit.= "
       "embeddings.= position_embeddings=pos_embed decoder_layers=decoder_blocks "
       "encoder.layer=blocks layers.=blocks. attention.q_proj=attn.query "
       "attention.k_proj=attn.key attention.v_proj=attn.value attention.o_proj=attn.proj "
       "attention.attention=attn attention.output.dense=attn.proj intermediate.dense=mlp.fc1 "
       "output.dense=mlp.fc2 layernorm_before=norm1 layernorm_after=norm2 layernorm=norm")


def join_qkv(state):
    """Joins query, key and value of a ViT in one tensor, as in timm and MAE's published code."""
    for name in [name for name in state if "attn.query" in name]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("query", "qkv")] = torch.cat(parts)
    return state


def fill_in(model, state, path, config={}, missing=(), hint=""):
    """Loads tensors into a model by name, and the eps of config, if any, into its LayerNorms. Those
    whose names begin with one of `missing`, and batch counts of BatchNorms, may be missing; they
    keep their values. Raises UserError with the first tensor that does not fit, and the hint."""
    here, there = ({name: tuple(x.shape) for name, x in tensors.items()}
                   for tensors in (model.state_dict(), state))
    for name in {**there, **here}:
        a, b = there.get(name, "missing"), here.get(name, "missing")
        may_miss = name.startswith(missing) or name.endswith("num_batches_tracked")
        require(a == b or a == "missing" and may_miss,
                f"{path} does not fit this model: {name} is {a} there and {b} here{hint}")
    model.load_state_dict(state, strict=False)
    eps = config.get("layer_norm_eps", config.get("layer_norm_epsilon"))
    for layer in model.modules():
        if isinstance(layer, torch.nn.LayerNorm) and eps:
            layer.eps = eps


# ------------------------------------------------------------------------------------ output


def save_png(path, pictures, columns, group=0, zoom=3):
    """Writes pictures (n, 3, S, S) in [0, 1] to one PNG, row by row, enlarged `zoom` times. Groups
    of `group` pictures are separated by a wider gap."""
    n, _, S, _ = pictures.shape
    rows, side = -(-n // columns), S * zoom
    left = [c * (side + 4) + (c // group * 12 if group else 0) for c in range(columns)]
    sheet = np.full((rows * (side + 4) - 4, left[-1] + side, 3), 255, np.uint8)
    large = (pictures * 255).round().byte().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    for i, picture in enumerate(large.permute(0, 2, 3, 1).cpu().numpy()):
        y, x = i // columns * (side + 4), left[i % columns]
        sheet[y:y + side, x:x + side] = picture
    lines = b"".join(b"\0" + line.tobytes() for line in sheet)       # 0: no filter
    chunk = lambda kind, data: (struct.pack(">I", len(data)) + kind + data
                                + struct.pack(">I", zlib.crc32(kind + data)))
    head = struct.pack(">IIBBBBB", sheet.shape[1], sheet.shape[0], 8, 2, 0, 0, 0)     # 8-bit RGB
    with replacing(path) as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines))
                + chunk(b"IEND", b""))


def save_curve(path, x, y, title):
    """Plots y over x, two lists of numbers, as an SVG for light and dark pages."""
    low, high = min(y), max(*y, min(y) + .001)
    span, most = high - low, max(x)
    at = lambda a, b: (f"{70 + 550 * a / most:.1f}", f"{270 - 240 * (b - low) / span:.1f}")
    unit = 10 ** math.floor(math.log10(span))
    unit *= next(f for f in (.1, .2, .5, 1, 2) if span / (f * unit) <= 6)
    grid = [n * unit for n in range(math.ceil(low / unit), math.floor(high / unit) + 1)]
    lines = [f'<line x1="70" x2="620" y1="{at(0, v)[1]}" y2="{at(0, v)[1]}"/><text x="62" '
             f'y="{at(0, v)[1]}" dy="4" text-anchor="end">{v:.6g}</text>' for v in grid]
    lines += [f'<text x="{at(a, 0)[0]}" y="292" text-anchor="middle">{a:,.0f}</text>'
              for a in (most * i / 4 for i in range(5))]
    points = " ".join(",".join(at(a, b)) for a, b in zip(x, y))
    style = ("text { font: 12px sans-serif; fill: #59636e } line { stroke: #d1d9e0 } "
             "polyline { fill: none; stroke: #0969da; stroke-width: 1.5 } "
             "@media (prefers-color-scheme: dark) { text { fill: #9198a1 } "
             "line { stroke: #3d444d } polyline { stroke: #4493f8 } }")
    with replacing(path) as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 310"><style>{style}'
                f'</style><text x="70" y="18">{title}</text>{"".join(lines)}<polyline '
                f'points="{points}"/></svg>\n'.encode())


def table(rows):
    """Aligns rows of texts: the first column to the left, the others to the right."""
    wide = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(wide[0]), *map(str.rjust, row[1:], wide[1:])]).rstrip()
                     for row in rows)


def mean_std(values, digits=1):
    """'61.2', or '61.2 +- 0.8' (mean and sample standard deviation) of several values."""
    text = f"{np.mean(values):.{digits}f}"
    return text + f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def progress(things, what):
    """Iterates over things with a progress bar on a terminal, which is removed at the end."""
    hidden = not (sys.stderr and sys.stderr.isatty()) or rank() > 0
    return tqdm(things, what, ncols=80, leave=False, disable=hidden)


def machine(device="cpu"):
    """The name of the GPU, or of the CPU and its number of cores."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1] or cpu
    return f"{cpu}, {os.cpu_count()} cores"


def command(args):
    """The command line that gives these settings on the same type of device."""
    usual = {f.name: f.default for f in dataclasses.fields(args)}
    usual |= type(args).published if args.uses_published else \
        type(args).cpu if args.device.startswith("cpu") else {}
    line = ["python" if processes() == 1 else f"torchrun --nproc-per-node {processes()}",
            script(args)]
    for name, value in dataclasses.asdict(args).items():
        if value == usual[name] or name in ("out", "data_dir", "device", "resume", "save_every"):
            continue
        if isinstance(value, bool):
            line.append(flag(name if value else f"no_{name}"))
        elif isinstance(value, str) and value.startswith("-"):
            line.append(f"{flag(name)}={shlex.quote(value)}")
        else:
            line += [flag(name), shlex.quote(value) if isinstance(value, str) else typed(value)]
    return " ".join(line)


def report(run, summary, figures):
    """Writes result.json: the command, settings, machine and results (figures). summary: the line
    of this run in the table of all runs."""
    args = run.args
    settings = dataclasses.asdict(args) | dict(dtype=precision(args))                # not "auto"
    for name in "out", "data_dir", "resume":            # not part of the experiment
        del settings[name]
    result = dict(command=command(args), summary=summary, figures=figures,
                  machine=machine(args.device), threads=torch.get_num_threads(),
                  seconds=round(run.seconds, 1), settings=settings, versions=dict(
                      python=platform.python_version(), torch=torch.__version__))
    with replacing(Path(args.out) / "result.json") as f:
        f.write((json.dumps(result, indent=1) + "\n").encode())


def main():
    """Prints a table of all runs under a folder (default: runs/)."""
    parser = Parser(description="All finished runs as one table.")
    parser.add_argument("folder", nargs="?", default="runs", help="where the runs are [runs]")
    root = Path(parser.parse_args().folder)
    rows = [("run", "data", "steps", "minutes", "what came out")]
    for path in sorted(root.glob("**/result.json")):
        name = str(path.parent.relative_to(root))
        try:
            r = json.loads(path.read_text())
            rows.append((name, Path(r["settings"]["data"]).name, str(r["settings"]["steps"]),
                         f"{r['seconds'] / 60:.1f}", str(r["summary"])))
        except (OSError, ValueError, KeyError, TypeError):
            rows.append((name, "?", "?", "?", "result.json cannot be read"))
    if len(rows) == 1:
        sys.exit(f"There is no finished run under {root}/ yet: python mae.py makes one.")
    say(table(rows), math.inf)


if __name__ == "__main__":
    main()
