"""What the seven scripts share, or what would hide a method if it stood in one: settings, data, the
training loop's surroundings, few-label evaluation, pictures. No model, loss, mask or augmentation
lives here, but the linear heads that read features.

    settings     Args, start            a dataclass becomes the command line
    the machine  device, autocast       which there is; bfloat16, and faster kernels on a CPU
    data         load_images            uint8 images that live on the device, with their labels
                 draw, shapes           the embedded world: ten figures, drawn in a second
                 scene, paint, caption, question     several figures, in pictures and in words
                 load_text              documents as bytes; the embedded one is Python's own manual
                 Bytes, Words           tokenizers: a token a byte, or a token a word
    training     Run                    optimizer, schedule, bar, log, checkpoint, exact resume
                 stage, stage_done      a training before the training, kept for the next time
                 Series                 several short trainings, their results kept one by one
    evaluation   few, encode, probe, finetune     what do k labels a class buy?
                 few_shot, supervised   the rows of a table: at few labels, and at all
    output       save_png, table, report

`python common.py` prints one table of all runs under runs/.
Letters: B batch, C channels, S side of an image in pixels; images are (B, 3, S, S).
"""
import argparse
import collections
import contextlib
import dataclasses
import difflib
import gzip
import hashlib
import http.client
import inspect
import json
import math
import os
import platform
import re
import shlex
import signal
import struct
import sys
import sysconfig
import tarfile
import textwrap
import threading
import time
import typing
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can mend. `start` prints it as one sentence, without a traceback."""


# ---------------------------------------------------------------------------------- settings


@dataclass
class Args:
    """Settings of every script. One line each: name, type, default, and its --help as a comment."""
    steps: int = 4000            # training steps
    batch: int = 256             # examples a step
    lr: float = 1e-3             # peak learning rate
    warmup: float = 0.05         # share of the steps in which the learning rate rises
    weight_decay: float = 0.05   # AdamW's decay, on matrices only
    clip: float = 1.0            # longest gradient, longer ones are cut to it; 0: never cut
    seed: int = 0                # seed of the weights and of every step's randomness
    data: str = "shapes"         # shapes, cifar10, fashion-mnist, mnist, an .npz file or a folder
    data_dir: str = os.environ.get("DATA_DIR", "data")   # where downloads are kept ($DATA_DIR)
    out: str = ""                # folder for what the run writes [runs/<script>]
    device: str = "auto"         # cuda, mps or cpu; auto takes the first that is there
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"   # auto: bfloat16 where it is native
    compile: bool = False        # compile the model first (pays on a GPU, in longer runs)
    resume: bool = False         # go on from the checkpoint in --out, with its settings
    save_every: float = 30.0     # seconds between checkpoints

    cpu = {}                     # no annotation, so no setting: defaults that differ without a GPU

    def check(self):
        """Raises UserError where a value makes no sense. Scripts extend it."""
        self.at_least(1, "batch")
        self.at_least(0, "steps", "lr", "weight_decay", "clip", "save_every")
        self.share("warmup")
        require(0 <= self.seed < 2 ** 32, f"--seed must be from 0 to 2^32 - 1, not {self.seed}")

    def at_least(self, least, *names):
        """Raises UserError where one of these settings is less, infinite or not a number."""
        for name in names:
            value = getattr(self, name)
            all_of = value if isinstance(value, tuple) else (value,)
            require(all_of and all(least <= x < math.inf for x in all_of),
                    f"{flag(name)} must be {least} or more, and finite, not {words(value)}"
                    if math.inf in all_of else
                    f"{flag(name)} must be {least} or more, not {words(value)}")

    def share(self, *names):
        """Raises UserError where one of these settings is not from 0 to 1."""
        for name in names:
            value = getattr(self, name)
            require(0 <= value <= 1, f"{flag(name)} must be from 0 to 1, not {value}")

    def below_1(self, *names):
        """Raises UserError where one of these settings is not from 0 to below 1."""
        for name in names:
            value = getattr(self, name)
            require(0 <= value < 1, f"{flag(name)} must be from 0 to below 1, not {value}")

    def multiple(self, dim, heads, of=1):
        """Raises UserError unless dim is a multiple of heads, both 1 or more, and of `of`."""
        self.at_least(1, dim, heads)
        d, h = getattr(self, dim), getattr(self, heads)
        also = f" and of {of}, for the sines and cosines of x and y" if of > 1 else ""
        require(d % h == 0 == d % of, f"{flag(dim)} must be a multiple of {flag(heads)} {h}{also}, "
                f"not {d}")


def require(condition, sentence):
    """Raises UserError(sentence) unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def script():
    """The name of the script that runs, such as mae.py."""
    return Path(sys.argv[0]).name


def flag(name):
    """The flag of a setting: mask_ratio -> --mask-ratio."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, with exit status 2, and the nearest flag that exists."""

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            word = message.split(": ")[1].split()[0]
            near = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, 1)
            message = f"unknown flag {word}" + (f", did you mean {near[0]}?" if near else "")
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def help_of(Args):
    """{setting: the comment on its line}, read from the source of the class and its parents."""
    text = {}
    for cls in reversed(Args.__mro__[:-1]):
        text.update(re.findall(r"^    (\w+):.*?\S\s+# (.*)$", inspect.getsource(cls), re.M))
    return text


def parser_of(Args):
    """An argparse parser with a flag for each field; the help of one is the comment on its line."""
    doc, text = sys.modules[Args.__module__].__doc__ or "", help_of(Args)
    parser = Parser(
        allow_abbrev=False, argument_default=argparse.SUPPRESS, usage="%(prog)s [--flag value ...]",
        description=doc.split("\n\n")[0], epilog=f"At the top of {script()}: how it works, what to "
        "expect, what to try.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=80))
    own = parser.add_argument_group(f"settings of {script()}")
    shared = parser.add_argument_group("settings of every script")
    for f in dataclasses.fields(Args):
        kind, many = f.type, typing.get_origin(f.type) is tuple
        kind = typing.get_args(kind)[0] if many else kind
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
        elif f.default not in ("", "auto"):
            smaller = f"; on a CPU {words(Args.cpu[f.name])}" if f.name in Args.cpu else ""
            help += f" [{words(f.default)}{smaller}]"
        group = shared if f.name in Args.__mro__[-2].__annotations__ else own
        group.add_argument(flag(f.name), help=help, **how)
    return parser


def words(value):
    """A setting as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def cli(Args, argv=None):
    """The command line as an Args. Later wins: default, setting for CPUs, --resume's, given flag.

    Exits with status 2 and one sentence where a flag is unknown or its value makes no sense.
    """
    parser = parser_of(Args)
    given = vars(parser.parse_args(argv))
    args = Args(**given)
    args.out = args.out or f"runs/{Path(script()).stem}"
    try:
        args.device = device(args.device)
        saved = read_checkpoint(args.out, script())["args"] if args.resume else {}
        smaller = Args.cpu if args.device == "cpu" and not saved else {}
        mine = {f.name for f in dataclasses.fields(Args)} - {"resume", "out", "device", "data_dir"}
        for name, value in {**smaller, **saved, **given}.items():
            if name in mine:
                setattr(args, name, tuple(value) if isinstance(value, list) else value)
        args.check()
    except UserError as error:
        parser.error(str(error))
    used = " ".join(f"{flag(k)} {words(v)}" for k, v in smaller.items() if k not in given)
    if used:
        say(f"No GPU here, so the settings for a CPU: {used} (flags you give win).")
    return args


def say(text, indent=""):
    """Prints, wrapped to 80 columns; `indent` stands in front of all lines but the first."""
    print("\n".join(textwrap.wrap(text, 80, subsequent_indent=indent, break_on_hyphens=False,
                                  break_long_words=False)))


def start(main, Args, argv=None):
    """Reads the flags, seeds, runs main(args), and turns a user's mistake into one sentence."""
    args, began = cli(Args, argv), time.time()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")          # TF32 on GPUs that have it
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a terminal without UTF-8 gets marks
    try:
        main(args)
    except UserError as error:
        sys.exit(f"{script()}: {error}")
    except OSError as error:                            # a full disk, a folder that is gone
        sys.exit(f"{script()}: {error.strerror or error} ({error.filename or args.out})")
    except KeyboardInterrupt:
        path = Path(args.out) / "checkpoint.pt"              # an older run's does not count; the
        ours = path.exists() and (args.resume or path.stat().st_mtime > began - 1)   # clocks differ
        saved = f": go on with python {script()} --resume --out {args.out}"
        sys.exit(f"\nStopped{saved if ours else ''}")


# ------------------------------------------------------------------------------- the machine


def device(name):
    """'auto' or a name -> the name of a device that is there."""
    there = ["cuda"] if torch.cuda.is_available() else []
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    name = there[0] if name == "auto" else name
    require(name.split(":")[0] in there, f"there is no {name} here: --device takes auto or one of "
            + ", ".join(there))
    return name


def has_bfloat16(device):
    """Whether a kind of device (cpu, cuda, mps) computes in bfloat16 by itself."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device == "cpu" else {}
    return able.get("avx512_bf16", False) or able.get("amx_bf16", False)


def precision(args):
    """The --dtype that is meant: auto is bfloat16 where it is native, else float32."""
    able = args.dtype == "auto" and has_bfloat16(args.device.split(":")[0])
    return "bfloat16" if able or args.dtype == "bfloat16" else "float32"


@contextlib.contextmanager
def autocast(args, dtype=None):
    """bfloat16 where dtype, or else --dtype, says so; the weights stay float32. While it lasts, two
    functions of torch.nn.functional have faster kernels on a CPU."""
    kind, on = args.device.split(":")[0], (dtype or precision(args)) == "bfloat16"
    kernels = [torch.autocast(kind, torch.bfloat16, enabled=on)]
    if kind == "cpu" and not args.compile:
        kernels += [Float32Attention()] + [OneDNN()] * (OneDNN.pays() and not on)
    with contextlib.ExitStack() as stack:
        for kernel in kernels:
            stack.enter_context(kernel)
        yield


class Instead:
    """Inside a `with`, puts `function` in the place of torch.nn.functional.<name>."""

    def __enter__(self):
        self.usual = getattr(F, self.name)
        setattr(F, self.name, self.function)
        return self

    def __exit__(self, *error):
        setattr(F, self.name, self.usual)


class Float32Attention(Instead):
    """Computes attention in float32 where autocast says bfloat16; the products around it stay. On a
    CPU PyTorch 2.13 is faster so, forward and backward: 2.7 times at 65 tokens, 1.4 at 257."""
    name = "scaled_dot_product_attention"

    def function(self, q, k, v, *args, **kwargs):
        wide = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") \
            else contextlib.nullcontext()
        with wide:
            return self.usual(q.float(), k.float(), v.float(), *args, **kwargs).to(q.dtype)


class OneDNN(Instead):
    """Sends nn.Linear to oneDNN instead of MKL, which leaves half of an AMD processor's AVX-512
    idle. In float32 1.3 to 2 times as fast there, forward and backward, equal to rounding.

    Without gradients (in bfloat16, too) it keeps a copy of each weight in another layout, as long
    as the weight stays as it is. When text is sampled, a row or a few at a time, all the time goes
    into reading weights, and so they are read 2 to 3 times as fast.
    """
    name = "linear"

    def __init__(self):
        self.kept = {}                              # id: weight, its version, its copy

    @staticmethod
    def pays():
        able = torch.cpu.get_capabilities()
        return "AMD" in able.get("cpu_name", "") and able.get("avx512_f", False)

    def function(self, x, weight, bias=None):
        grad, kind = torch.is_grad_enabled(), x.dtype
        able = kind == torch.float32 or kind == torch.bfloat16 and not grad
        if not able or kind != weight.dtype or torch.is_autocast_enabled("cpu") or x.ndim < 2 \
                or x.numel() == 0:
            return self.usual(x, weight, bias)
        if grad:
            return Linear.apply(x, weight, bias)
        if not isinstance(weight, nn.Parameter):
            return onednn(x, weight, bias)
        parts, (N, K), rows = torch.get_num_threads(), weight.shape, x.numel() // x.shape[-1]
        single = rows == 1 and kind == torch.float32 and K % parts == 0
        _, version, copy = self.kept.get((id(weight), single), (None, None, None))
        if version is None and not single:          # once, as for a prompt: a copy would not pay
            self.kept[id(weight), single] = weight, -1, None
            return onednn(x, weight, bias)
        if version != weight._version:
            if single:                     # transposed, and cut along K into a part for each thread
                copy = weight.T.contiguous().view(parts, K // parts, N)
            else:                          # as oneDNN likes it best, for 16 rows or so
                copy = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
            self.kept[id(weight), single] = weight, weight._version, copy
        if not single:
            return onednn(x, copy, bias)
        y = torch.bmm(x.reshape(parts, 1, K // parts), copy).sum(0)                     # (1, N)
        return (y if bias is None else y + bias).view(*x.shape[:-1], N)


class Linear(torch.autograd.Function):
    """x (..., K), weight (N, K), bias (N) or None -> (..., N), as F.linear."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)    # frozen: no need
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        return (onednn(grad, weight.T) if ctx.needs_input_grad[0] else None,
                onednn(flat.T, x.flatten(0, -2).T) if ctx.needs_input_grad[1] else None,
                flat.sum(0) if ctx.needs_input_grad[2] else None)


def onednn(x, weight, bias=None):
    """x weight^T + bias by oneDNN. (..., K), (N, K), (N) -> (..., N)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# -------------------------------------------------------------------------------------- data


@dataclass
class Images:
    """A labelled set of images on the device, as uint8; `labels` has a row of ids per attribute."""
    train: torch.Tensor                       # (n, 3, S, S) uint8
    test: torch.Tensor                        # (m, 3, S, S) uint8
    train_labels: dict[str, torch.Tensor]     # attribute -> (n,) int64
    test_labels: dict[str, torch.Tensor]      # attribute -> (m,) int64
    names: dict[str, list[str]]               # attribute -> name of each id; the first is THE class

    def __post_init__(self):
        sample = self.train[:5000].float() / 255
        self.size = self.train.shape[-1]
        self.mean = sample.mean((0, 2, 3)).view(3, 1, 1)
        self.std = sample.std((0, 2, 3)).view(3, 1, 1).clamp(min=1e-3)

    def normalize(self, x):
        """uint8, or floats in [0, 1] -> mean 0 and variance 1: always guessing the mean costs 1."""
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        return (x - self.mean) / self.std

    def denormalize(self, x):
        """The way back, to [0, 1]."""
        return (x.float() * self.std + self.mean).clamp(0, 1)


SHAPES = "circle ring half square bar triangle star cross heart moon".split()
COLOURS = {"red": (.86, .16, .16), "orange": (.96, .55, .10), "yellow": (.95, .87, .20),
           "green": (.18, .65, .25), "cyan": (.25, .80, .85), "blue": (.17, .30, .85),
           "purple": (.50, .20, .65), "pink": (.97, .55, .75)}


def distance_to(kind, x, y):
    """Signed distance from (x, y), y upwards, to the edge of a figure of area about pi; inside it
    is negative. x and y (...) in units of the figure's radius."""
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
    if kind == "heart":                       # a square on its corner, and discs on two sides
        u, v = (x + y + .35) * .707, (y - x + .35) * .707
        return torch.minimum(box(u, v, .64, .64),
                             torch.minimum(disc(u, v - .64, .64), disc(u - .64, v, .64)))
    fifth = 2 * math.pi / 5                   # star: fold the plane into half a point: one edge
    angle = (torch.remainder(torch.atan2(x, y) + fifth / 2, fifth) - fifth / 2).abs()
    r, tip, notch = (x * x + y * y).sqrt(), 1.6, .7
    nx, ny = tip - notch * math.cos(fifth / 2), notch * math.sin(fifth / 2)
    return (r * angle.sin() * nx + (r * angle.cos() - tip) * ny) / math.hypot(nx, ny)


def draw(canvas, shape, colour, radius, x, y, turn):
    """Paints one anti-aliased figure on each image of canvas (n, 3, S, S), in place.

    shape (n,) ids into SHAPES; colour (n, 3) in [0, 1]; radius of the disc of equal area and centre
    x, y (n,) in pixels; turn (n,) in radians, counter-clockwise.
    """
    at = torch.arange(canvas.shape[-1], device=canvas.device) + .5
    for kind in range(len(SHAPES)):
        for i in (shape == kind).nonzero().flatten().split(256):     # chunks that fit the cache
            cos, sin, r, px, py = (t[i, None, None] for t in (turn.cos(), turn.sin(), radius, x, y))
            u, v = (at - px) / r, (py - at[:, None]) / r
            d = distance_to(SHAPES[kind], cos * u + sin * v, cos * v - sin * u) * r
            cover = (.5 - d).clamp(0, 1)[:, None]                    # share of the pixel inside
            canvas[i] = torch.lerp(canvas[i], colour[i, :, None, None], cover)
    return canvas


def shapes(n, seed=0, size=32, device="cpu"):
    """n images of the shapes world: one figure on a plain ground, lit from above in all of them. (A
    slope of each image's own would be a shortcut: SimCLR learned it, and no shapes.)

    Returns images (n, 3, size, size) uint8 and {attribute: (n,) int64}: shape (10), colour (8),
    size (3), place (9, a 3 x 3 grid) and turn (8 directions), drawn independently of each other.
    """
    u = torch.rand(14, n, generator=torch.Generator().manual_seed(seed)).to(device)
    between = lambda row, low, high: (low + (high - low) * u[row])[:, None, None]
    labels = {"shape": (u[0] * len(SHAPES)).long(), "colour": (u[1] * len(COLOURS)).long(),
              "size": (u[2] * 3).long(), "place": (u[4] * 3).long() * 3 + (u[3] * 3).long(),
              "turn": (u[5] * 8).long()}
    radius = size * between(2, .13, .25).flatten()
    x, y = (1.5 * radius + u[row] * (size - 3 * radius) for row in (3, 4))   # wholly in the frame
    colour = torch.tensor(list(COLOURS.values()), device=device)[labels["colour"]]
    colour = (colour * between(6, .85, 1.15)[:, 0] + .08 * (u[7:10].T - .5)).clamp(0, 1)
    ramp = torch.linspace(.075, -.075, size, device=device)[:, None].expand(size, size)
    shade = (between(10, .35, .75) + ramp)[:, None] + .12 * (u[11:14].T - .5)[..., None, None]
    canvas = draw(shade.clamp(0, 1), labels["shape"], colour, radius, x, y, 2 * math.pi * u[5])
    return (canvas * 255).round().byte(), labels


# The shapes world in pictures and words: scenes of one to three figures, what is said and asked of
# them, and new words for old things. flamingo.py reads it.

FIGURES = [kind for kind in SHAPES if kind not in ("half", "bar")]      # those with a plain name
KINDS = [(shape, colour) for shape in range(len(FIGURES)) for colour in range(len(COLOURS))]
UNSEEN = [(i, (3 * i + 1) % len(COLOURS)) for i in range(len(FIGURES))]  # one of each, kept back
SEEN = [kind for kind in KINDS if kind not in UNSEEN]
NUMBERS = ["one", "two", "three"]
ABOUT = ["colour", "shape", "number", "side"]
NEW_WORDS = "dax blicket wug toma fep zib koba mip lun vosk tazz pim gorp nal sefi rud".split()


class Figure(typing.NamedTuple):
    """A figure of a scene, by ids: FIGURES, COLOURS, 0 small or 1 large, 0 left or 1 right, 0 top
    or 1 bottom."""
    shape: int
    colour: int
    size: int
    column: int
    row: int


def scene(rng, count=None, kinds=KINDS):
    """Figures of some kinds (shape, colour), as one reads: row by row. All shapes and all colours
    of a scene differ; two figures are neighbours. rng: random.Random; count: 1 to 3, else any."""
    count = count or rng.randint(1, 3)
    chosen = rng.sample(kinds, count)
    while any(len(set(ids)) < count for ids in zip(*chosen)):
        chosen = rng.sample(kinds, count)
    first = rng.randrange(4)                              # quarter 0 1
    quarters = rng.sample(range(4), count)                #         2 3
    if count == 2:
        quarters = [first, first ^ rng.choice([1, 2])]    # beside it, or above or below
    return [Figure(*kind, rng.randrange(2), quarter % 2, quarter // 2)
            for kind, quarter in zip(chosen, sorted(quarters))]


def paint(scenes, seed=0, size=32, device="cpu"):
    """Pictures of n scenes, on a dark ground: (n, 3, size, size) uint8. The exact place, size, turn
    and hue of each figure are drawn at random."""
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
    """What a scene shows: 'a small red circle left of a large blue star'."""
    parts = [f"a {('small', 'large')[f.size]} {kind_name(f)}" for f in figures]
    if len(parts) == 1:
        return f"{parts[0]} on the {('left', 'right')[figures[0].column]}"
    if len(parts) == 2:
        return f"{' left of ' if figures[0].row == figures[1].row else ' above '}".join(parts)
    return f"{parts[0]} , {parts[1]} and {parts[2]}"


def question(rng, figures, about=None):
    """(about, question, answer) of a scene, about one of its figures: colour, shape, number or
    side, any if it is None. The caption tells the answer; so of a side it is asked of single
    figures and of two in a row, and else (None, None, None) is returned."""
    abouts = ABOUT if len(figures) == 1 or len(figures) == 2 and figures[0].row == figures[1].row \
        else ABOUT[:3]
    about = about or rng.choice(abouts)
    if about not in abouts:
        return None, None, None
    figure, single = rng.choice(figures), len(figures) == 1
    colour, shape = list(COLOURS)[figure.colour], FIGURES[figure.shape]
    which = "it" if single else f"the {shape}"
    if about == "colour":
        return about, f"what colour is {which} ?", colour
    if about == "shape":
        return about, f"what shape is {'it' if single else f'the {colour} one'} ?", shape
    if about == "number":
        return about, "how many figures are there ?", NUMBERS[len(figures) - 1]
    return about, f"which side is {which} on ?", ("left", "right")[figure.column]


def load_images(name, data_dir="data", size=32, device="cpu"):
    """A data set by name -> Images.

    `shapes` is drawn at `size` pixels. `fashion-mnist`, `mnist` and `cifar10` are read from
    data_dir, and fetched there first if they are missing. `x.npz` holds x_train, y_train, x_test,
    y_test, with images (n, S, S) or (n, S, S, 3) uint8. A folder holds one folder of pictures per
    class, or train/ and test/ of that form; without these, every fifth picture is for the test.
    These two are shuffled. Raises UserError for what is missing, broken or of another form.
    """
    if name == "shapes":
        train, test = shapes(20_000, 0, size, device), shapes(2_000, 1, size, device)
        rows, columns = ("top", "middle", "bottom"), ("left", "centre", "right")
        names = dict(shape=SHAPES, colour=list(COLOURS), size=["small", "medium", "large"],
                     place=[f"{row} {column}" for row in rows for column in columns],
                     turn=[f"{45 * i} degrees" for i in range(8)])
        return Images(train[0], test[0], train[1], test[1], names)
    if name in IMAGE_SETS:
        read = read_cifar10 if name == "cifar10" else read_idx
        *arrays, classes = read(name, Path(data_dir))
    elif name.endswith(".npz"):
        *arrays, classes = read_npz(Path(name))
    elif Path(name).is_dir():
        *arrays, classes = read_folder(Path(name), size)
    else:
        raise UserError(f"there is no data set {name!r}: --data takes {', '.join(IMAGE_SETS)}, "
                        "shapes, an .npz file, or a folder with one folder of pictures per class")
    x_train, y_train, x_test, y_test = arrays
    for split, x, y in ("train", x_train, y_train), ("test", x_test, y_test):
        x_name, y_name = f"{name}: x_{split} is {x.dtype} {x.shape}", f"y_{split}"
        require(x.dtype == np.uint8 and x.ndim in (3, 4) and x.shape[3:] in ((), (3,))
                and x.shape[1] == x.shape[2],
                f"{x_name}, not square uint8 images (n, S, S) or (n, S, S, 3)")
        require(len(x) > 0 and y.shape == (len(x),) and y.dtype.kind in "iu",
                f"{x_name}, and {y_name} is {y.dtype} {y.shape}: one integer for each image is due")
        require(0 <= y.min() and y.max() < len(classes), f"{name}: labels of {y_name} reach from "
                f"{y.min()} to {y.max()}, but there are {len(classes)} classes")
    require(x_train.shape[1] == x_test.shape[1], f"{name}: train and test differ in size")
    require(len(set(y_train.tolist())) > 1, f"{name}: all training images are of one class")

    def images(x):
        x = torch.from_numpy(np.array(x)).to(device)
        if x.ndim == 3:
            return x[:, None].expand(-1, 3, -1, -1)       # grey is stored once and seen three times
        return x.permute(0, 3, 1, 2).contiguous()

    if name not in IMAGE_SETS:
        x_train, y_train, x_test, y_test = *mixed(x_train, y_train), *mixed(x_test, y_test)
    labels = [{"class": torch.from_numpy(y.astype(np.int64)).to(device)} for y in (y_train, y_test)]
    return Images(images(x_train), images(x_test), *labels, {"class": [str(c) for c in classes]})


def mixed(x, y):
    """Images and labels in another order, always the same: often they are sorted by class, and the
    first few thousand are to be like all."""
    order = np.random.default_rng(0).permutation(len(x))
    return x[order], y[order]


IMAGE_SETS = "fashion-mnist", "mnist", "cifar10"


def is_images(name):
    """Whether --data NAME is about images, where it may be a text as well."""
    return name in ("shapes", *IMAGE_SETS) or name.endswith(".npz")


MNIST = list("0123456789")
FASHION = "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
IDX = ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
       "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
MIRRORS = {   # the first that has the file is taken
    "fashion-mnist": [
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "https://fashion-mnist.s3.eu-central-1.amazonaws.com/"],
    "mnist": ["https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/"],
    "cifar10": ["https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
                "https://www.cs.toronto.edu/~kriz/"],
    "shakespeare": ["https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                    "tinyshakespeare/"]}
SHA256 = {    # of each file or, for Fashion-MNIST, of what its gzip holds: mirrors compress anew
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
EMBEDDED = {"shakespeare": "pydocs"}    # what to take instead without a network; else the shapes


def fetch(name, file, data_dir, kept=None):
    """The path data_dir/name/file (or data_dir/kept), downloaded from a mirror if it is not there.
    The name appears only once the SHA-256 fits: a broken download never enters the cache."""
    path = data_dir / (kept or Path(name, file))
    if path.exists():
        return path
    part, wrong = path.with_name(f"{path.name}.{os.getpid()}.part"), []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for mirror in MIRRORS[name]:
            with open(part, "wb") as f:
                try:
                    download(mirror + file, f)
                except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
                    wrong.append(f"{mirror}: {getattr(error, 'reason', error)}")
                    continue
            if SHA256[name][file] in digests(part):
                os.replace(part, path)
                return path
            wrong.append(f"{mirror}: not the SHA-256 that is due, so it was thrown away")
    except OSError as error:
        why = f"cannot write {path} ({error.strerror}): choose another --data-dir"
        raise UserError(why) from None
    finally:
        part.unlink(missing_ok=True)
    raise UserError(f"could not download {file} ({'; '.join(wrong)}). Put the file at {path} "
                    "yourself, or use the embedded data, which needs no network: --data "
                    + EMBEDDED.get(name, "shapes"))


def download(url, file):
    """Copies a page into an open file, under a progress bar."""
    with urllib.request.urlopen(url, timeout=20) as page:
        size = int(page.headers.get("Content-Length") or 0) or None
        with tqdm(desc=url.split("/")[-1], total=size, unit="B", unit_scale=True, ncols=80) as bar:
            while chunk := page.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))


def digests(path):
    """SHA-256 of a file and, if it is a gzip file, of what it holds."""
    found = []
    for opener in open, gzip.open:
        with contextlib.suppress(OSError, EOFError, zlib.error), opener(path, "rb") as f:
            found.append(hashlib.file_digest(f, "sha256").hexdigest())
    return found


def read_idx(name, data_dir):
    """The four gzipped IDX files of MNIST's layout -> x_train, y_train, x_test, y_test, classes."""
    arrays = []
    for file in IDX:
        path, dims = fetch(name, file, data_dir), 3 if "images" in file else 1
        try:
            raw = gzip.decompress(path.read_bytes())
            require(raw[:4] == bytes([0, 0, 8, dims]),
                    f"{path} is not an IDX file of {dims} dimensions: delete it to fetch it anew")
            shape = np.frombuffer(raw, ">u4", dims, 4)            # after the magic number
            arrays.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape))
        except (OSError, EOFError, ValueError, zlib.error):
            raise UserError(f"{path} is truncated or broken: delete it to fetch it anew") from None
    return *arrays, FASHION if name == "fashion-mnist" else MNIST


def read_cifar10(name, data_dir):
    """CIFAR-10's binary archive, read in place: records of a label and the planes R, G and B."""
    path = fetch(name, "cifar-10-binary.tar.gz", data_dir)
    parts = {"data": [], "test": []}
    try:
        with tarfile.open(path) as tar:
            for member in sorted(tar, key=lambda m: m.name):
                if member.name.endswith(".bin"):
                    raw = np.frombuffer(tar.extractfile(member).read(), np.uint8)
                    parts[Path(member.name).name[:4]].append(raw.reshape(-1, 3073))
        train, test = (np.concatenate(parts[key]) for key in ("data", "test"))
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zlib.error):
        raise UserError(f"{path} is truncated or not CIFAR-10's binary archive: delete it to fetch "
                        "it anew") from None
    split = lambda a: (a[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), a[:, 0])
    return *split(train), *split(test), CIFAR10


def read_npz(path):
    """x_train, y_train, x_test, y_test and, if there, classes. Nothing is ever unpickled."""
    due = "x_train", "y_train", "x_test", "y_test"
    try:
        with np.load(path, allow_pickle=False) as file:
            require(set(due) <= set(file.files),
                    f"{path} holds {', '.join(file.files)}; due are {', '.join(due)}")
            arrays = [file[key] for key in due]
            classes = file["classes"] if "classes" in file else np.arange(arrays[1].max() + 1)
            return *arrays, classes.tolist()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        why = "it holds pickled objects" if "pickle" in str(error) else "it is truncated or no .npz"
        raise UserError(f"cannot read {path}: {why}; write plain arrays with np.savez") from None


def read_pictures(path, size, device="cpu"):
    """`images` (n, size, size, 3) uint8 of an .npz -> (n, 3, size, size). Raises UserError for what
    is missing, broken or of another form."""
    try:
        with np.load(path, allow_pickle=False) as file:
            require("images" in file, f"{path} holds {', '.join(file.files)}; due is images")
            x = file["images"]
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error):
        why = "it is truncated, or no .npz of plain arrays"
        raise UserError(f"cannot read {path}: {why}") from None
    require(x.dtype == np.uint8 and x.ndim == 4 and x.shape[1:] == (size, size, 3) and len(x) > 0,
            f"{path}: images is {x.dtype} {x.shape}, and (n, {size}, {size}, 3) uint8 is due: "
            "scale them, or take another --image-size")
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().to(device)


def read_folder(path, size):
    """folder/<class>/<picture>, or folder/{train,test}/<class>/<picture>, cropped and scaled."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("a folder of pictures is read with Pillow: pip install pillow") from None

    def square(file):
        try:
            picture = Image.open(file).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            raise UserError(f"cannot read the picture {file}: mend it or move it away") from None
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = left, top, left + side, top + side
        return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box))

    parts = ["train", "test"] if (path / "train").is_dir() and (path / "test").is_dir() else [""]
    classes = sorted(p.name for p in (path / parts[0]).iterdir() if p.is_dir())
    x, y = {"train": [], "test": []}, {"train": [], "test": []}
    for part in parts:
        for label, name in enumerate(classes):
            files = sorted(p for p in (path / part / name).glob("**/[!.]*") if p.is_file())
            for i, file in enumerate(files):
                split = part or ("test" if i % 5 == 4 else "train")
                x[split].append(square(file))
                y[split].append(label)
    require(len(classes) > 1 and x["train"] and x["test"], f"{path} needs two or more folders, one "
            "per class, with at least five pictures each")
    return *(np.array(a) for a in (x["train"], y["train"], x["test"], y["test"])), classes


@dataclass
class Text:
    """Documents as bytes: the first nine tenths of each to train on, the last to validate."""
    names: list[str]
    train: list[bytes]
    val: list[bytes]


def load_text(name, data_dir="data", parts=1, utf8=False, flag="--data"):
    """A text by name -> Text. A single document is first cut into that many parts; with utf8 each
    has to be UTF-8; flag is the one to name in messages.

    `pydocs` is the reference manual inside every Python, `pycode` the modules of its standard
    library, `shakespeare` the 1.1 MB of char-rnn, fetched to data_dir if it is not there. Else a
    file, or a folder of .txt files. Raises UserError for what is missing, unreadable or empty.
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
            path = fetch(name, "input.txt", Path(data_dir), "tinyshakespeare.txt")
        files = sorted(path.glob("**/*.txt")) if path.is_dir() else [path]
        hidden = lambda file: any(part[0] == "." for part in file.relative_to(path).parts)
        files = [file for file in files if not hidden(file)]
        require(name and path.exists(), f"there is no text {name!r}: {flag} takes pydocs, pycode, "
                "shakespeare, a file, or a folder of .txt files; for images gpt.py takes shapes, "
                f"{', '.join(IMAGE_SETS)} or an .npz")
        require(files, f"{path} holds no .txt file")
        try:
            documents = {file.stem if len(files) == 1 else str(file.relative_to(path)):
                         file.read_bytes() for file in files}
        except OSError as error:
            raise UserError(f"cannot read {error.filename} ({error.strerror})") from None
    documents = {name: raw for name, raw in documents.items() if raw.strip()}
    require(documents, f"the text of {flag} {name} is empty")
    for document, raw in documents.items() if utf8 else ():
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            why = f"(byte {raw[error.start]:#x} at {error.start})"
            raise UserError(f"{document} of {flag} {name} is not UTF-8 {why}: save it as UTF-8; "
                            "gpt.py takes any bytes") from None
    if len(documents) == 1 and parts > 1:
        (raw,) = documents.values()
        at = [boundary(raw, len(raw) * i // parts) for i in range(parts + 1)]
        documents = {f"part {i}": raw[a:b] for i, (a, b) in enumerate(zip(at, at[1:]), 1)}
    cut = [boundary(raw, len(raw) * 9 // 10) for raw in documents.values()]
    return Text(list(documents), [raw[:at] for raw, at in zip(documents.values(), cut)],
                [raw[at:] for raw, at in zip(documents.values(), cut)])


def boundary(raw, at):
    """The place in some bytes where the next character of UTF-8 begins, from `at` on."""
    while at < len(raw) and raw[at] & 0xC0 == 0x80:
        at += 1
    return at


def manual():
    """{topic: bytes} of the manual that help() shows, without its tables. Many topics contain
    others, word for word; each paragraph is kept once, in the longest, so that no text is trained
    AND tested on."""
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
    """The text, with a mark in the place of what would upset a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}"
                   for c in text.replace("\r\n", "\n"))


class Bytes:
    """Tokenizer: a token for each byte, 0 to 255, and BOS, which stands where a text begins."""
    BOS, vocab = 256, 257

    def encode(self, text):
        """str or bytes -> (n,) int64."""
        raw = text.encode() if isinstance(text, str) else text
        return torch.from_numpy(np.frombuffer(raw, np.uint8).astype(np.int64))

    def decode(self, tokens):
        """(n,) -> str; what is no UTF-8, or would upset a terminal, shows as a question mark."""
        return printable(bytes(t for t in map(int, tokens) if t < 256).decode(errors="replace"))

    def stream(self, documents):
        """All documents behind each other, BOS in front of each: (n,) int64."""
        bos = torch.tensor([self.BOS])
        return torch.cat([part for raw in documents for part in (bos, self.encode(raw))])


class Words:
    """Tokenizer: lower-case words and punctuation marks, the most frequent of a text."""
    SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]           # tokens 0 to 4

    def __init__(self, words):
        self.words = self.SPECIAL + [word for word in words if word not in self.SPECIAL]
        self.vocab = len(self.words)
        self.ids = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def of(cls, documents, most):
        """The tokenizer of some documents (bytes, UTF-8): at most `most` tokens, each seen twice.
        Raises UserError where no word was."""
        count = collections.Counter(w for raw in documents for w in cls.split(raw.decode()))
        usual = sorted((word for word in count if count[word] > 1), key=lambda w: (-count[w], w))
        require(usual, "no word of this text occurs twice: take a longer text")
        return cls(usual[:most - len(cls.SPECIAL)])

    @staticmethod
    def split(text):
        """The words and the marks of a text; a run of the same mark, such as >>>, is one."""
        text = text.removeprefix("\ufeff").lower()                     # Windows' mark of UTF-8
        return [m[0] for m in re.finditer(r"\w+|([^\w\s])\1*", text)]

    def encode(self, text):
        """str -> (n,) int64; of the special tokens a text can yield [UNK] alone."""
        return torch.tensor([self.ids.get(word, 1) for word in self.split(text)], dtype=torch.int64)

    def decode(self, tokens):
        """(n,) -> str."""
        return self.join([self.words[int(t)] for t in tokens])

    @staticmethod
    def join(words):
        """Words as a text: spaces between them, but none before a full stop or in brackets."""
        text = printable(" ".join(words))
        text = re.sub(r"(?<=\w) ([-/]) (?=\w)|(?<=\d) (\.) (?=\d)", r"\1\2", text)
        text = re.sub(r"(?<=\w) (['’]) (?=(s|t|d|m|re|ll|ve)\b)", r"\1", text)
        return re.sub(r" (?=[.,;:!?)\]}])|(?<=[(\[{]) ", "", text)


# ---------------------------------------------------------------------------------- training


def schedule(step, steps, warmup):
    """Share of the peak learning rate at a step: a line up, then half a cosine down to 0."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return .5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def adamw(parameters, lr, weight_decay, betas=(.9, .95)):
    """Fused AdamW over the trainable tensors; vectors (biases, norms, gates) do not decay."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.ndim > 1], weight_decay=weight_decay),
              dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr, betas, fused=True)


class Run:
    """What surrounds a training loop, so that the loop itself stays in view:

        run = Run(args, model)                  # optimizer, schedule, bar, log, checkpoint
        for step in run:                        # under autocast; goes on where it stopped
            x = run.batch(images.train)
            run.update(distance(model(x), x))   # backward, clip, step

    Each step's randomness depends on (seed, step) alone: a run that was killed and resumed ends
    with the same weights, bit for bit, as one that was not, and draws the same after its last step
    (on a CPU, with as many threads; on a GPU after torch.use_deterministic_algorithms(True), and
    the weights alone). Flags that are given with --resume count from there on. Ctrl-C saves after
    the step it falls in. A loss that is not finite stops the run and leaves the last good
    checkpoint.
    """

    def __init__(self, args, model, optimizer=None, chance=None, vocabulary=None, part=""):
        self.args, self.model, self.chance = args, model, chance    # chance: the loss of guessing
        self.vocabulary = vocabulary       # of a tokenizer: goes into the checkpoint with the model
        self.part, self.keep = part, not part      # which of many short ones: no bar, log or files
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer or adamw(self.parameters, args.lr, args.weight_decay)
        self.step, self.wrote, self.seconds = 0, None, 0.     # wrote: step of the newest checkpoint
        self.order, self.pending, self.stop = (None, None), None, False
        self.out = folder(args.out) if self.keep else Path(args.out)
        if args.resume and self.keep:
            self.load()
        if args.compile:
            model.compile()

    def __iter__(self):
        args, began = self.args, self.seconds
        self.began, saved = time.time() - began, time.time()
        ctrl_c = threading.current_thread() is threading.main_thread()
        if ctrl_c:
            usual = signal.signal(signal.SIGINT, self.interrupt)
        line = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=args.steps, initial=self.step, ncols=80, leave=False,
                        bar_format=line, disable=None if self.keep else True)
        self.log = self.open_log()
        try:
            while self.step < args.steps:
                torch.manual_seed(args.seed * 1_000_003 + self.step)
                with autocast(args):
                    yield self.step
                self.step += 1
                self.seconds = time.time() - self.began
                self.bar.update()
                last = self.step == args.steps
                if last or self.stop or time.time() - saved > args.save_every:
                    self.check()
                    if self.keep:
                        self.save()
                    saved = time.time()
                if last or self.step % -(-args.steps // 200) == 0:
                    self.check()
                    if self.keep:
                        self.show()
                if self.stop:
                    raise KeyboardInterrupt
        finally:
            self.bar.close()
            self.log.close()
            if ctrl_c:
                signal.signal(signal.SIGINT, usual)
        if self.seconds > began and self.keep:
            print(f"{self.step} steps in {self.seconds:.0f} s, {self.words()} in the last.")

    def batch(self, data):
        """The next args.batch rows of data, (B, ...): each row once an epoch, in a new order."""
        n, size = len(data), self.args.batch
        require(size <= n, f"--batch {size} is more than the {n} training examples")
        epoch, i = divmod(self.step, n // size)
        if self.order[0] != (epoch, n):
            g = torch.Generator().manual_seed(self.args.seed * 1_000_003 + epoch)
            self.order = (epoch, n), torch.randperm(n, generator=g).to(data.device)
        return data[self.order[1][i * size:(i + 1) * size]]

    def update(self, loss):
        """Backward, clip, one step of the optimizer at this step's learning rate."""
        args = self.args
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, args.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * schedule(self.step, args.steps, args.warmup)
            group["lr"] *= group.get("times", 1.)           # of a group's own learning rate
        self.check()                            # the step before: its loss is there without waiting
        self.pending = self.step, loss.detach(), norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.clear_autocast_cache()            # it holds bfloat16 copies of the old weights

    def check(self):
        """Stops the run if the last update's loss or gradient was not finite."""
        if self.pending:
            step, loss, norm = self.pending
            self.pending, self.loss, self.norm = None, loss.item(), norm.item()
            if not math.isfinite(self.loss + self.norm):
                kept = f"{self.part}: other results are kept" if self.part else \
                    "no checkpoint was written yet"
                if self.wrote is not None:
                    kept = f"the checkpoint of step {self.wrote} is kept"
                raise UserError(f"at step {step} the loss was {self.loss:.4g} and its gradient "
                                f"{self.norm:.4g}; {kept}. Try a smaller --lr")

    def save(self):
        """Writes checkpoint.pt in one motion: whoever looks sees the old one or the new one, whole.
        One that was there before a new run, without --resume, is kept as previous.pt."""
        state = dict(script=script(), args=dataclasses.asdict(self.args), step=self.step,
                     seconds=self.seconds, model=self.model.state_dict(),
                     optimizer=self.optimizer.state_dict(), vocabulary=self.vocabulary,
                     random=torch.get_rng_state())     # for what comes after the last step
        kept = "" if self.wrote is None else f"; the one of step {self.wrote} is kept"
        write_checkpoint(state, self.out / "checkpoint.pt", self.wrote is None,
                         f" at step {self.step}", kept)
        self.wrote = self.step

    def load(self):
        """Takes up the checkpoint in --out; raises UserError where it is of another model."""
        state, path = read_checkpoint(self.args.out, script()), self.out / "checkpoint.pt"
        here, there = ({k: tuple(v.shape) for k, v in weights.items()}
                       for weights in (self.model.state_dict(), state["model"]))
        for name in {**here, **there}:
            a, b = there.get(name, "missing"), here.get(name, "missing")
            require(a == b, f"{path} does not fit this model: {name} is {a} there and {b} here; "
                    "leave out the flags that change the model, or choose another --out")
        self.model.load_state_dict(state["model"])
        groups = [{k: v for k, v in group.items() if k != "params"}
                  for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, options in zip(self.optimizer.param_groups, groups):
            group.update(options)                               # of the flags that are given now
        if "random" in state:
            torch.set_rng_state(state["random"])
        self.step, self.seconds, self.wrote = state["step"], state["seconds"], state["step"]
        self.args.steps = max(self.args.steps, self.step)       # --steps 0: look, do not train
        print(f"Going on from step {self.step} of {path}.")

    @contextlib.contextmanager
    def aside(self):
        """After update: a look at the model in evaluation mode, whose time does not
        count as training. It leaves no trace in the steps to come."""
        start, kind = time.time(), self.args.device.split(":")[0]
        self.model.eval()
        with torch.autocast(kind, enabled=False):
            yield
        self.model.train()
        self.began += time.time() - start

    def note(self, **figures):
        """Keeps figures of the step that is being done in log.jsonl, for `notes`."""
        self.log.write(json.dumps(dict(step=self.step + 1, note=figures)) + "\n")

    def notes(self):
        """{step: figures} of all that `note` kept, before a resume, too."""
        lines = map(json.loads, (self.out / "log.jsonl").read_text().splitlines())
        return {line["step"]: line["note"] for line in lines if "note" in line}

    def interrupt(self, *_):
        self.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)     # a second Ctrl-C stops at once

    def open_log(self):
        """log.jsonl, a line every half per cent; what is later than the checkpoint is dropped."""
        path = self.out / "log.jsonl"
        if not self.keep:
            return open(os.devnull, "w")
        lines = path.read_text().split("\n") if self.step and path.exists() else []
        step = lambda line: int(re.match(r'\{"step": (\d+),.*\}$|', line)[1] or self.step + 1)
        path.write_text("".join(line + "\n" for line in lines if step(line) <= self.step))
        return open(path, "a", buffering=1)

    def show(self):
        """The newest loss and the speed: into the log, and behind the bar or as a line of text."""
        args, lr = self.args, self.optimizer.param_groups[0]["lr"]
        rate = self.step * args.batch / max(self.seconds, 1e-9)
        self.log.write(json.dumps(dict(step=self.step, loss=self.loss, gradient=self.norm, lr=lr,
                                  seconds=round(self.seconds, 2))) + "\n")
        self.bar.set_postfix_str(f"{self.words()}, {rate:,.0f}/s", refresh=False)
        if self.bar.disable and self.step % -(-args.steps // 10) < -(-args.steps // 200):
            print(f"step {self.step}/{args.steps}  {self.words()}  {rate:,.0f}/s", flush=True)

    def words(self):
        """The newest loss and, where it is known, what guessing would cost."""
        chance = "" if self.chance is None else f" (chance {self.chance:.3f})"
        return f"loss {self.loss:.4f}{chance}"


class Series:
    """What surrounds several short trainings: the figures of each, kept as soon as it is done.

        series = Series(args, about, free=("k",))     # settings that say which, not how
        for fit in series.rest(fits):                 # those that are not done yet, under a bar
            series.add(fit, loss=...)
        series.done                                   # {fit: figures}

    With --resume nothing is done twice, unless a setting that is not free has changed, or `about`,
    the name of what they have in common.
    """

    def __init__(self, args, about="", free=()):
        self.args, self.about, self.out = args, about, folder(args.out)
        self.path, self.done, self.seconds, self.fresh = self.out / "checkpoint.pt", {}, 0., True
        if args.resume:
            state = read_checkpoint(args.out, script())
            require("done" in state, f"{self.path} is one training, not a series: choose another "
                    "--out")
            free = {*free, "out", "device", "data_dir", "resume", "save_every"}
            same = lambda settings: {k: v for k, v in settings.items() if k not in free}
            if state["about"] == about and same(state["args"]) == same(dataclasses.asdict(args)):
                self.done, self.seconds, self.fresh = state["done"], state["seconds"], False
            else:
                say(f"Other settings than those in {self.path}, so all is done anew.")

    def rest(self, fits):
        """The fits (tuples) that are still to be done. Ctrl-C stops a training after its step, and
        else after the fit."""
        bar = progress([fit for fit in fits if fit not in self.done], "fits")
        ctrl_c, self.stop = threading.current_thread() is threading.main_thread(), False
        if ctrl_c:
            usual = signal.signal(signal.SIGINT, self.interrupt)
        try:
            for fit in bar:
                bar.set_postfix_str(" ".join(map(str, fit)))
                self.began = time.time()
                yield fit
                if self.stop:
                    raise KeyboardInterrupt
        finally:
            if ctrl_c:
                signal.signal(signal.SIGINT, usual)

    def interrupt(self, *_):
        self.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)     # a second Ctrl-C stops at once

    def add(self, fit, **figures):
        """Keeps the figures of the fit that `rest` gave last, in checkpoint.pt; one of another
        series that was there is kept as previous.pt."""
        self.done[fit] = figures
        self.seconds += time.time() - self.began
        state = dict(script=script(), args=dataclasses.asdict(self.args), about=self.about,
                     done=self.done, seconds=self.seconds)
        write_checkpoint(state, self.path, self.fresh)
        self.fresh = False


def folder(out):
    """The folder as a Path, made if it is not there. Raises UserError if one cannot write to it."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".try").write_text("")
        (out / ".try").unlink()
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): choose another --out") from None
    return out


def write_checkpoint(state, path, fresh=False, when="", kept="", what="a checkpoint"):
    """Writes a file in one motion: whoever looks sees the old one or the new one, whole. With
    `fresh`, one that is there is of another run, and is kept as previous.pt. Raises UserError."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if path.exists() and fresh:
            os.replace(path, path.with_name("previous.pt"))
        os.replace(part, path)
    except (OSError, RuntimeError) as error:           # torch.save wraps a full disk in either
        part.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"cannot write {what} to {path.parent}{when} ({why}){kept}") from None


def stage_done(how, settings):
    """Sets how.resume where the run in how.out has the same of these settings (names), as they were
    typed, so that a Run goes on from there; and tells whether that run has done all its steps."""
    if not (Path(how.out) / "checkpoint.pt").exists():
        return False
    state = read_checkpoint(how.out, script())
    how.resume = all(state["args"].get(name) == getattr(how, name) for name in settings)
    return how.resume and state["step"] == how.steps


@contextlib.contextmanager
def stage(what, run):
    """Says how to go on when the training of a part (what) is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        raise UserError(f"stopped at step {run.step} of {what}: the same command goes on from "
                        "there") from None


def read_checkpoint(out, *due, otherwise="leave out --resume to start anew", flag="--out"):
    """The newest checkpoint of a run, on the CPU. Raises UserError if there is none, if it is
    broken, or if a script other than those that are due wrote it."""
    path = Path(out) / "checkpoint.pt"
    require(path.exists(), f"there is no {path} to go on from: {otherwise}")
    return read_saved(path, *due, flag=flag)


def read_saved(path, *due, flag="--out"):
    """What a script, one of those that are due (none: any), saved in a file, on the CPU. Raises
    UserError as read_checkpoint."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        by = state["script"]
    except Exception as error:                          # torch raises many kinds for a broken file
        raise UserError(f"{path} is not a checkpoint that can be read ({type(error).__name__}): "
                        f"delete it, or choose another {flag}") from None
    require(by in due or not due, f"{path} was written by {by}, not by {' or '.join(due)}: choose "
            f"another {flag}")
    return state


def fingerprint(weights):
    """Eight hexadecimal digits that tell {name: tensor on the CPU} from others of its names."""
    return hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest()[:8]


# -------------------------------------------------------------------------------- evaluation


def few(labels, k, seed=0):
    """Indices of k random examples of each class (all if k is 0): (k * classes,) on labels' device.
    Raises UserError where a class has fewer."""
    least = labels.unique(return_counts=True)[1].min()
    require(k <= least, f"--labels {k} is too many: a class has only {least} labelled examples")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order.to(labels.device)
    return torch.cat([order[labels[order] == c][:k or None] for c in labels.unique()])


@torch.no_grad()
def encode(f, images, x, batch=500):
    """f of every image of x (n, 3, S, S) uint8, normalised, without gradients: (n, C) float."""
    return torch.cat([f(images.normalize(part)).float() for part in x.split(batch)])


def probe(train, labels, test, test_labels, k=0, seed=0, decay=1e-2):
    """Accuracy in % of a linear classifier on frozen features: logistic regression on k examples of
    each class (0: all), fitted to its optimum with L-BFGS.

    train (n, C), labels (n,), test (m, C), test_labels (m,). Features are standardised over all of
    train, labelled or not; a square of a weight costs decay / 2.
    """
    mean, std = train.mean(0), train.std(0) + 1e-6
    i = few(labels, k, seed)
    x, y, test = (train[i] - mean) / std, labels[i], (test - mean) / std
    head = nn.Linear(x.shape[1], int(labels.max()) + 1, device=x.device)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), y) + decay / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    pays = x.device.type == "cpu" and OneDNN.pays()
    with OneDNN() if pays else contextlib.nullcontext():
        optimizer.step(closure)
    return 100 * (head(test).argmax(1) == test_labels).float().mean().item()


def finetune(f, images, x, labels, test_labels, args, steps, lr, batch=64, seed=0):
    """Accuracy in % on images.test after training a new linear head and what of f takes gradients.

    f maps normalised images (B, 3, S, S) to features (B, C) and is changed in place; x (n, 3, S, S)
    uint8 with labels (n,) are the few labelled images; test_labels (m,).
    """
    torch.manual_seed(seed)
    dim = encode(f.eval(), images, x[:1]).shape[1]
    head = nn.Linear(dim, int(labels.max()) + 1)
    nn.init.zeros_(head.weight)                  # at first all classes are equally likely
    norm = nn.BatchNorm1d(dim, affine=False)     # as in MAE, A.1, for probes: scales differ widely
    model = nn.Sequential(f, norm, head).to(x.device).train()
    optimizer = adamw(model.parameters(), lr, weight_decay=.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps, .1)
        i = torch.randint(len(x), (min(batch, len(x)),), device=x.device)
        with autocast(args):
            loss = F.cross_entropy(model(images.normalize(x[i])), labels[i])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with autocast(args):
        scores = encode(model.eval(), images, images.test)
    return 100 * (scores.argmax(1) == test_labels).float().mean().item()


def few_shot(args, f, images, labels, others=()):
    """Freezes f, and fits a linear head on k labels a class (0: all), for each k of labels, and for
    each of args.draws choices of them.

    f maps normalised images (B, 3, S, S) to features (B, C). Returns {attribute: for each k
    accuracies in % on the test images, one a draw}; `others` are read with all labels only.
    """
    with autocast(args):                  # encode is under no_grad: the encoder is frozen
        train, test = (encode(f, images, x) for x in (images.train, images.test))

    def fit(name, k, draw):
        y, test_y = images.train_labels[name], images.test_labels[name]
        return probe(train, y, test, test_y, k, draw)

    what = next(iter(images.names))
    draws = {k: range(args.draws if k else 1) for k in labels}        # all labels: one way to draw
    knows = {what: [[fit(what, k, draw) for draw in draws[k]] for k in labels]}
    others = [name for name in others if name in images.names and name != what]
    return knows | {name: [[fit(name, 0, 0)]] for name in others}


def supervised(args, f, images, steps):
    """Trains an encoder on the class of ALL training images, without augmentation, to be probed
    like the others: what do features know that were made to answer this very question?

    f maps normalised images (B, 3, S, S) to features (B, C); it is changed in place, and returned.
    """
    print("Now the same encoder, supervised, for as many steps ...", flush=True)
    what = next(iter(images.names))
    finetune(f, images, images.train, images.train_labels[what], images.test_labels[what], args,
             steps, args.lr, args.batch, args.seed)
    return f


# ------------------------------------------------------------------------------------ output


def save_png(path, pictures, columns, group=0, zoom=3):
    """Writes pictures (n, 3, S, S) in [0, 1] as one PNG, row by row, each pixel zoom times as
    large. A wider gap parts every `group` pictures."""
    n, _, S, _ = pictures.shape
    rows, side = -(-n // columns), S * zoom
    left = [c * (side + 4) + (c // group * 12 if group else 0) for c in range(columns)]
    sheet = np.full((rows * (side + 4) - 4, left[-1] + side, 3), 255, np.uint8)
    large = (pictures * 255).round().byte().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    for i, picture in enumerate(large.permute(0, 2, 3, 1).cpu().numpy()):
        y, x = i // columns * (side + 4), left[i % columns]
        sheet[y:y + side, x:x + side] = picture
    lines = b"".join(b"\0" + line.tobytes() for line in sheet)       # 0: this line is not filtered
    chunk = lambda kind, data: (struct.pack(">I", len(data)) + kind + data
                                + struct.pack(">I", zlib.crc32(kind + data)))
    head = struct.pack(">IIBBBBB", sheet.shape[1], sheet.shape[0], 8, 2, 0, 0, 0)     # 8-bit RGB
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                           + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def table(rows):
    """Rows of texts -> aligned lines: the first column to the left, the others to the right."""
    wide = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(wide[0]), *map(str.rjust, row[1:], wide[1:])]).rstrip()
                     for row in rows)


def spread(values, digits=1):
    """'61.2', or '61.2 +- 0.8' (mean and sample standard deviation) of several values."""
    text = f"{np.mean(values):.{digits}f}"
    return text + f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def comparison(images, labels, rows):
    """The table of who knows what. rows {who: {attribute: [accuracies of the draws, per column]}}:
    the class of the images at each of labels (0: all), then other attributes with all labels."""
    what, *others = images.names
    others = [name for name in others if all(name in knows for knows in rows.values())]
    count = lambda k: f"{k} a class" if k else "all labels"
    lines = [[f"{what}, accuracy in %", *map(count, labels), *(f"{name}, all" for name in others)]]
    guess = [f"{100 / len(images.names[name]):.1f}" for name in [what] * len(labels) + others]
    lines += [["chance", *guess]]
    lines += [[who, *map(spread, knows[what]), *(spread(knows[name][0]) for name in others)]
              for who, knows in rows.items()]
    return table(lines)


def known(images, knows):
    """One row of `comparison` in words, with all labels: 'shape 45 % (chance 10), colour ...'."""
    chance = {name: 100 / len(images.names[name]) for name in knows}
    return ", ".join(f"{name} {np.mean(scores[-1]):.0f} % (chance {chance[name]:.0f})"
                     for name, scores in knows.items())


def progress(things, what):
    """The things, one by one, under a bar that vanishes at the end (none without a terminal)."""
    return tqdm(things, what, ncols=80, leave=False, disable=None)


def machine(device="cpu"):
    """What the figures were measured on, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1] or cpu
    return f"{cpu}, {os.cpu_count()} cores"


def command(args):
    """The command line that gives these settings on the same kind of device."""
    usual = {f.name: f.default for f in dataclasses.fields(args)}
    usual |= type(args).cpu if args.device == "cpu" else {}
    line = ["python", script()]
    for name, value in dataclasses.asdict(args).items():
        skip = name in ("out", "data_dir", "device", "resume", "save_every")
        if value != usual[name] and not skip:
            if isinstance(value, bool):
                line.append(flag(name if value else f"no_{name}"))
            else:
                if type(value) is str and value.startswith("-"):
                    line.append(f"{flag(name)}={shlex.quote(value)}")
                else:
                    line += [flag(name), shlex.quote(value) if type(value) is str else words(value)]
    return " ".join(line)


def report(run, summary, figures):
    """Writes result.json: what was run, on what, and what came out. `summary` is its line in the
    table of all runs."""
    settings = dataclasses.asdict(run.args) | dict(dtype=precision(run.args))     # not "auto"
    for name in "out", "data_dir", "resume":            # where it was done, not what
        del settings[name]
    result = dict(command=command(run.args), summary=summary, figures=figures,
                  machine=machine(run.args.device), threads=torch.get_num_threads(),
                  seconds=round(run.seconds, 1), settings=settings, versions=dict(
                      python=platform.python_version(), torch=torch.__version__))
    (run.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def main():
    """All runs under a folder (runs/ if none is given) as one table."""
    parser = Parser(description="All finished runs as one table.")
    parser.add_argument("folder", nargs="?", default="runs", help="where the runs are [runs]")
    root = Path(parser.parse_args().folder)
    rows = [("run", "data", "steps", "minutes", "what came out")]
    for path in sorted(root.glob("**/result.json")):
        r = json.loads(path.read_text())
        rows.append((str(path.parent.relative_to(root)), Path(r["settings"]["data"]).name,
                     str(r["settings"]["steps"]), f"{r['seconds'] / 60:.1f}", r["summary"]))
    if len(rows) == 1:
        sys.exit(f"There is no finished run under {root}/ yet: python mae.py makes one.")
    print(table(rows))


if __name__ == "__main__":
    main()
