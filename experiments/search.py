"""Compares settings of a script by what they give on validation data.

The figures that are reported elsewhere come from test data, so settings are chosen on other data:
for a text its first nine tenths, of which the last tenth validates; for images the training images,
of which a tenth validates; for flamingo.py other seeds, hence other scenes and other questions.

Run      python experiments/search.py bert.py --try "--muon-lr 0.01" "--weight-decay 0.3"
         python experiments/search.py gpt.py --quick
Writes   a run per row and seed in --out; all their figures in results/search-<script>.json. What is
         done is not done again; the file has the rows and seeds of the last command.
"""
import contextlib
import io
import json
import platform
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import common, repeat                                                          # noqa: E402

SHOWN = {   # the figures in the table, by their names in repeat.figures
    "bert.py": ["masked, accuracy", "masked, perplexity", "accuracy, BERT, tune all, 2"],
    "gpt.py": ["loss"],
    "mae.py": ["error", "accuracy, MAE, linear probe, 0", "accuracy, MAE, tune all, 0"],
    "flamingo.py": ["right, caption, 1 figure", "right, caption, 2 figures", "right, new word, 1",
                    "right, new word, 4"]}
QUICK = {"bert.py": "--steps 2 --tune-steps 1 --labels 1 2 3", "gpt.py": "--steps 2 --length 5",
         "mae.py": "--steps 2 --tune-steps 1 --labels 1",
         "flamingo.py": "--steps 2 --lm-steps 2 --vit-steps 2 --tests 12 --images 600"}


def options(argv=None):
    """The command line."""
    parser = common.Parser(
        prog="search.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
        usage='%(prog)s SCRIPT [--try "--flag value" ...] [--seeds N ...] [-- --flag value ...]',
        epilog="What follows -- are flags of the script for all rows.")
    parser.add_argument("script", choices=SHOWN, metavar="SCRIPT", help=f"one of {', '.join(SHOWN)}")
    parser.add_argument("--try", dest="rows", nargs="+", default=[], metavar="FLAGS",
                        help="flags of the script, a row each, beside the usual settings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12], metavar="N",
                        help="[10 11 12: not those of the reported figures]")
    parser.add_argument("--quick", action="store_true", help="hardly train, in runs/search-quick")
    parser.add_argument("--out", default="", metavar="FOLDER", help="where the runs are [runs/"
                        "search]")
    argv = list(map(str, sys.argv[1:] if argv is None else argv))
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.rows, args.flags = ["", *args.rows], argv[cut + 1:]
    if args.quick:
        args.flags = [*QUICK[args.script].split(), *args.flags]
    args.out = Path(args.out or f"runs/search{'-quick' * args.quick}")
    args.file = (args.out if args.quick else Path("results")) / f"search-{args.script[:-3]}.json"
    return args


def settings(args, flags):
    """All settings of a run with these flags, as its result.json has them."""
    with contextlib.redirect_stdout(io.StringIO()):
        return repeat.settings(repeat.options([args.script, "--seeds", 0, "--", *flags]))


def validation(args):
    """Flags that make the script train without its test data, which is left for the report."""
    folder = args.out / "data"
    if args.script in ("bert.py", "gpt.py"):
        text = common.load_text("pydocs")
        (folder / "pydocs").mkdir(parents=True, exist_ok=True)
        for name, raw in zip(text.names, text.train):
            with common.replacing(folder / "pydocs" / f"{name.replace('/', '-')}.txt") as f:
                f.write(raw)
        return ["--data", str(folder / "pydocs")]
    if args.script == "mae.py":
        x, labels = common.shapes(20_000)
        x, y = x.permute(0, 2, 3, 1).numpy(), labels["shape"].numpy()
        folder.mkdir(parents=True, exist_ok=True)
        with common.replacing(folder / "shapes.npz") as f:
            np.savez(f, x_train=x[2000:], y_train=y[2000:], x_test=x[:2000], y_test=y[:2000])
        return ["--data", str(folder / "shapes.npz")]
    return []


def main(args):
    common_flags, figures = [*validation(args), *args.flags], {}
    for row in args.rows:
        flags = [*common_flags, *shlex.split(row)]
        for seed in args.seeds:
            name = row.replace("--", "").replace(" ", "-") or "usual"
            out = args.out / args.script[:-3] / name / str(seed)
            if not repeat.has_result(out, settings(args, flags)):
                common.say(f"\n{args.script} {row}, seed {seed}")
                repeat.run(args.script, out, [*flags, "--seed", seed])
            for figure, value in repeat.figures(out).items():
                found = figures.setdefault(row.replace("--", "") or "usual settings", {})
                found.setdefault(figure, []).append(value)
    rows = " ".join(f'"{row}"' for row in args.rows[1:])
    result = dict(command=f"python experiments/search.py {args.script} --try {rows}",
                  seeds=args.seeds, settings=settings(args, common_flags), figures=figures,
                  machine=common.machine(), versions=dict(python=platform.python_version(),
                                                          torch=torch.__version__))
    args.file.parent.mkdir(parents=True, exist_ok=True)
    with common.replacing(args.file) as f:
        f.write((json.dumps(result, indent=1) + "\n").encode())
    shown = SHOWN[args.script]
    cell = lambda found, name: common.mean_std(found[name], 3 if name in ("loss", "error") else 1)
    table = [["mean +- deviation", *(f"({i + 1})" for i in range(len(shown)))],
             *([row, *(cell(found, name) if name in found else "-" for name in shown)]
               for row, found in figures.items())]
    legend = "\n".join(f"({i + 1}) {name}" for i, name in enumerate(shown))
    common.say(f"\n{common.table(table)}\n\n{legend}\n\nFigures: {args.file}")


if __name__ == "__main__":
    args = options()
    common.guarded(main, args, "search.py")
