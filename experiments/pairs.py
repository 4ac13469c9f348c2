"""What the benchmarks have in common. Two sides that do the same are timed in turns, so that what
else the machine does falls on both. The ratio is the median over rounds of theirs / ours (above 1:
ours is faster), with the middle half of the rounds in brackets: a range that contains 1 shows no
difference.
"""
import argparse
import importlib
import importlib.metadata
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

# torchvision's wheel is for CUDA: beside a CPU build of torch its own operators do not load, and its
# import, which transformers and lightly need, fails where it describes these. Nothing here uses them.
try:
    import torchvision                                                         # noqa: F401
except (ImportError, RuntimeError):
    for name in "nms", "qnms":
        torch.library.define(f"torchvision::{name}", "(Tensor x, Tensor scores, float iou) -> Tensor")

sys.path.insert(0, str(Path(__file__).parent.parent))
import common                                                                  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTEXT = 0                                   # of a benchmark's texts, which chooses the attention
DTYPES = ["float32"] + ["bfloat16"] * common.has_bfloat16(DEVICE)            # where it is native


def autocast(dtype, ours=True):
    """The precision of a case: of our side as in our scripts, of theirs as PyTorch has it."""
    if ours:
        return common.autocast(SimpleNamespace(device=DEVICE, dtype=dtype, context=CONTEXT))
    return torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16")


def training(loss, model, dtype, ours=True):
    """A training step, as a function: forward and loss(), backward, fused AdamW over what is
    trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)

    def step():
        with autocast(dtype, ours):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def agree(what, a, b, tolerance):
    """Stops the benchmark unless two tensors are equal to within a tolerance."""
    error = (a - b).abs().max().item()
    if not error < tolerance:
        raise AssertionError(f"{what}: the two sides differ by {error}")


def timed(f):
    """Seconds that f() takes."""
    start = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def pair(ours, theirs, rounds):
    """Both sides timed, after three rounds to warm up: {ours_ms, theirs_ms: medians; ratio,
    quartiles, range}."""
    times = [], []
    for r in common.progress(range(-3, rounds), "rounds"):
        for side in (0, 1) if r % 2 else (1, 0):                         # each is first in turn
            seconds = timed((ours, theirs)[side])
            if r >= 0:
                times[side].append(seconds)
    ratios = [b / a for a, b in zip(*times)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return dict(ours_ms=1000 * statistics.median(times[0]),
                theirs_ms=1000 * statistics.median(times[1]), ratio=middle, quartiles=[low, high],
                range=[min(ratios), max(ratios)], rounds=rounds)


def lines(f):
    """The figures of a case as lines of a table."""
    text = lambda value, unit: f"{value:.{1 if value < 100 else 0}f} {unit}"
    name = f["case"] + (f", beside {f['beside']}" if "beside" in f else "")
    if "ours_ms" in f:
        low, high = f["quartiles"]
        return [(name, f["dtype"], text(f["ours_ms"], "ms"), text(f["theirs_ms"], "ms"),
                 f"{f['ratio']:.2f} [{low:.2f} to {high:.2f}]")]
    after = "after_imports_mb"
    return [(name, f["dtype"], text(f["ours_mb"], "MB"), text(f["theirs_mb"], "MB"),
             f"{f['ratio']:.2f}"),
            ("  of it after the imports", f["dtype"], text(f[f"ours_{after}"], "MB"),
             text(f[f"theirs_{after}"], "MB"), f"{f['ratio_after_imports']:.2f}")]


def missing(name):
    """Why a class such as "transformers.BertForMaskedLM" cannot be imported here, or ""."""
    module, _, attribute = name.rpartition(".")
    try:
        getattr(importlib.import_module(module), attribute)
    except Exception as error:               # a package of another build raises any kind
        while error.__cause__:
            error = error.__cause__
        return (str(error) or type(error).__name__).strip().splitlines()[-1]
    return ""


def possible(cases, needs):
    """The cases whose packages can be imported; what cannot is reported, a sentence per class."""
    reasons = {name: missing(name) for case in cases for name in needs.get(case, ())}
    for name, why in reasons.items():
        if why:
            common.say(f"{name} cannot be imported ({why}); left out: "
                       f"{', '.join(case for case in cases if name in needs.get(case, ()))}.")
    return [case for case in cases if not any(reasons[name] for name in needs.get(case, ()))]


def parser(doc, cases):
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(cases), choices=list(cases))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=["float32", "bfloat16"],
                        help="[float32, and bfloat16 where it is native]")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="how often; some cases "
                        "take a fraction or a multiple of it, but 2 or more [20]")
    parser.add_argument("--quick", action="store_true", help="--rounds 2: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser


def bench(doc, cases, measure, needs):
    """A benchmark as a program. measure(case, dtype, rounds) -> its figures, a list of {case,
    beside, and what pair() gives}; needs: {case: classes of other packages that it uses}."""
    options = parser(doc, cases)
    args = options.parse_args()
    args.rounds = 2 if args.quick else args.rounds
    if args.rounds < 2:
        options.error(f"--rounds must be 2 or more, not {args.rounds}")
    cases = possible(args.cases, needs)
    if not cases:
        sys.exit(f"{Path(sys.argv[0]).name}: no case is left; make bench makes an environment with "
                 "all packages")
    packages = {name.split(".")[0].replace("_", "-"): None for case in cases
                for name in needs.get(case, ())}
    versions = dict(torch=torch.__version__)
    versions |= {name: importlib.metadata.version(name) for name in packages}
    common.say(f"{common.machine(DEVICE)}, {torch.get_num_threads()} threads, "
               f"{', '.join(f'{name} {version}' for name, version in versions.items())}")
    rows, figures = [("case", "dtype", "ours", "theirs", "theirs / ours")], []
    for case in cases:
        for dtype in args.dtypes:
            for f in measure(case, dtype, args.rounds):
                figures.append(dict(dtype=dtype) | f)
                rows += lines(figures[-1])
                print(f"  {' | '.join(rows[-1])}", file=sys.stderr, flush=True)
    print(common.table(rows))
    if args.json:
        result = dict(command=f"make {Path(sys.argv[0]).stem.replace('_', '-')}",
                      machine=common.machine(DEVICE), threads=torch.get_num_threads(),
                      versions=versions, figures=figures)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
