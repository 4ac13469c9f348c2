"""What the benchmarks share: two sides that do one thing are timed in turns, so that the machine's moods fall on both; the
ratio is the median over rounds of theirs / ours (above 1: ours is faster), the middle half of the rounds in brackets: a range
that spans 1 shows no difference."""
import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common                                                                  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ["float32"] + ["bfloat16"] * common.has_bfloat16(DEVICE)        # what it computes in by itself


def kernels(dtype, plain):
    """What a side runs under: autocast, and the kernels that common.autocast chooses, unless plain."""
    if plain:
        return torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16")
    return common.autocast(SimpleNamespace(device=DEVICE, dtype=dtype, compile=False))


def training(loss, model, dtype, plain):
    """A training step, as a function: forward and loss(), backward, fused AdamW over what is trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)

    def step():
        with kernels(dtype, plain):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def agree(what, a, b, tolerance):
    """Stops the benchmark unless two tensors are equal to within a tolerance."""
    error = (a - b).abs().max().item()
    assert error < tolerance, f"{what}: the two sides differ by {error}"


def timed(f):
    """Seconds that f() takes."""
    began = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def pair(ours, theirs, rounds):
    """Both sides timed, after three rounds to warm up: {ours_ms, theirs_ms: medians; ratio, quartiles, range}."""
    times = [], []
    for r in range(-3, rounds):
        for side in (0, 1) if r % 2 else (1, 0):                         # turns in who goes first
            seconds = timed((ours, theirs)[side])
            if r >= 0:
                times[side].append(seconds)
    ratios = [b / a for a, b in zip(*times)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return dict(ours_ms=1000 * statistics.median(times[0]), theirs_ms=1000 * statistics.median(times[1]),
                ratio=middle, quartiles=[low, high], range=[min(ratios), max(ratios)], rounds=rounds)


def lines(f):
    """The figures of a case as lines of a table."""
    text = lambda value: f"{value:.{1 if value < 100 else 0}f}"
    name = f["case"] + (f", beside {f['beside']}" if "beside" in f else "")
    if "ours_ms" in f:
        low, high = f["quartiles"]
        return [(name, f["dtype"], f"{text(f['ours_ms'])} ms", f"{text(f['theirs_ms'])} ms", f"{f['ratio']:.2f} [{low:.2f} to {high:.2f}]")]
    return [(name, f["dtype"], f"{text(f['ours_mb'])} MB", f"{text(f['theirs_mb'])} MB", f"{f['ratio']:.2f}"),
            ("  of it after the imports", f["dtype"], f"{text(f['ours_after_imports_mb'])} MB", f"{text(f['theirs_after_imports_mb'])} MB",
             f"{f['ratio_after_imports']:.2f}")]


def bench(doc, cases, measure, *packages, plain=True):
    """The command line of a benchmark. measure(case, dtype, plain, rounds) -> its figures, a list of {case, beside, and what
    pair() gives}; packages: those beside which it is measured; plain: whether there are kernels to leave out."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(cases), choices=list(cases))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=["float32", "bfloat16"], help="[float32, and bfloat16 where it is native]")
    parser.add_argument("--rounds", type=int, default=20, help="how often; some cases take a share or a multiple of it [20]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures, too")
    parser.set_defaults(plain=False)
    if plain:
        parser.add_argument("--plain", action="store_true", help="ours, too, on PyTorch's choice of kernels")
    args = parser.parse_args()
    versions = dict(torch=torch.__version__) | {name: importlib.metadata.version(name) for name in packages}
    print(f"{common.machine(DEVICE)}, {torch.get_num_threads()} threads, {', '.join(f'{name} {version}' for name, version in versions.items())}")
    rows, figures = [("case", "dtype", "ours", "theirs", "theirs / ours")], []
    for case in args.cases:
        for dtype in args.dtypes:
            for f in measure(case, dtype, args.plain, args.rounds):
                figures.append(dict(dtype=dtype) | f)
                rows += lines(figures[-1])
                print(f"  {' | '.join(rows[-1])}", file=sys.stderr, flush=True)
    print(common.table(rows))
    if args.json:
        name = Path(sys.argv[0]).stem.replace("_", "-")
        args.json.write_text(json.dumps(dict(command=f"make {name}" + " ARGS=--plain" * args.plain, machine=common.machine(DEVICE),
                                             threads=torch.get_num_threads(), versions=versions, figures=figures), indent=1) + "\n")
