"""Evaluates an encoder while it is trained: does it get better at the class as the loss falls?

Runs autoencoder.py, simclr.py or mae.py once. After each of the steps --at: the squared error on
test images, where the script has one, and linear probes of the class at each of --labels, and of
the colour from all labels (of mae.py's first 5,000 images, as in the script). This does not change
the training: it ends with the weights of the script's own run.

Run      python experiments/while_training.py autoencoder.py --at 46 187 750 3000 -- --steps 3000
         python experiments/while_training.py mae.py --quick
Writes   one JSON file (--out), after each evaluation; the run is in runs/. The same command
         continues both, another --seed adds to the file. What follows -- are flags of the script.
"""
import contextlib
import dataclasses
import importlib
import io
import json
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import common, repeat                                                          # noqa: E402

ENCODERS = {"autoencoder.py": lambda script, args, model: model.encode,
            "simclr.py": lambda script, args, model: model.encoder,
            "mae.py": lambda script, args, model: script.MeanPooled(model.encoder, args.patch)}
QUICK = ["--steps", "16"]


class Watched(common.Run):
    """A run that calls after(run, n) when n steps are done, also before its first step. That may
    take random numbers: the next step sets its seed after it. Its time is not part of `seconds`."""
    evaluating, training = 0., 0.

    def __init__(self, after, *args, **settings):
        super().__init__(*args, **settings)
        self.after = after

    def __iter__(self):
        self.after(self, self.step)
        for step in super().__iter__():
            yield step                                       # the script does its step
            start = time.monotonic()
            self.after(self, step + 1)
            self.evaluating += time.monotonic() - start

    seconds = property(lambda self: self.training,
                       lambda self, x: setattr(self, "training", x - self.evaluating))


def options(argv=None):
    """The command line. given: the settings of the script after its --."""
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = common.Parser(
        prog="while_training.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
        usage="%(prog)s SCRIPT [--at N ...] [--labels N ...] [--out FILE] [-- --flag value ...]",
        epilog="What follows -- are flags of the script: see python SCRIPT --help.")
    add = parser.add_argument
    add("script", choices=ENCODERS, metavar="SCRIPT", help=", ".join(ENCODERS))
    add("--at", type=int, nargs="+", metavar="N", help="steps after which to evaluate, 0: before "
        "the first [all of the steps, a 4th, a 16th and a 64th of them]")
    add("--labels", type=int, nargs="+", default=[20, 0], metavar="N",
        help="labelled images per class, 0: all [20 0]")
    add("--quick", action="store_true", help=f"-- {' '.join(QUICK)} (flags you give win)")
    add("--out", metavar="FILE", help="file of the figures [results/<script>-while-training"
        ".json; with --quick runs/quick-...]; the run is in runs/<name of the file>-<seed>")
    own = parser.parse_args(argv[:cut])
    Args = importlib.import_module(Path(own.script).stem).Args
    given = vars(common.parser_of(Args).parse_args(QUICK * own.quick + argv[cut + 1:]))
    if {"out", "resume"} & set(given):
        parser.error("--out and --resume cannot come after --")
    own.given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    name = f"{Path(own.script).stem}-while-training.json"
    own.out = own.out or ("runs/quick-" if own.quick else "results/") + name
    own.run = f"runs/{Path(own.out).stem}-{given.get('seed', 0)}"
    return own


def load_images(script, args):
    """The images of a run; of the training images only those that the script's probes take."""
    images, n = common.load_images(args), getattr(script, "POOL", None)
    labels = {name: y[:n] for name, y in images.train_labels.items()}
    return dataclasses.replace(images, train=images.train[:n], train_labels=labels)


def evaluate(script, args, model, images, labels):
    """dict(error, accuracy): the squared error on test images, or None, and accuracies in % of
    linear probes, as common.linear_probe has them. The model ends in training mode."""
    model.eval()
    error = script.reconstruct(args, model, images) if hasattr(script, "reconstruct") else None
    f = ENCODERS[common.script(args)](script, args, model)
    accuracy = common.linear_probe(dataclasses.replace(args, labels=tuple(labels)), f, images)
    model.train()
    return dict(error=error, accuracy=accuracy)


def continued(own, new):
    """What the file holds of this seed, or else `new`. Raises UserError where it is of other
    settings."""
    if not Path(own.out).exists():
        return new
    try:
        found = repeat.apart(json.loads(Path(own.out).read_text()))
        differ = [common.flag(name) for name, value in new["settings"].items()
                  if name != "seed" and any(old["settings"][name] != value for old in found)]
        differ += ["--labels"] * any(old["figures"]["labels"] != own.labels for old in found)
        same = [r for r in found if r["settings"]["seed"] == new["settings"]["seed"]]
        [old["figures"]["at"].items() for old in found]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise common.UserError(f"{own.out} is no file of while_training.py: choose another --out"
                               ) from None
    common.require(not differ, f"{own.out} has figures of another {', '.join(differ)}: choose "
                   "another --out")
    return same[0] if same else new


def train(own, script, args, result):
    """Runs the script, or continues its run; each evaluation is saved in the result."""
    found, out = result["figures"]["at"], own.run
    repeat.has_result(out, result["settings"])                       # raises if of other settings
    images = load_images(script, args)
    common.k_shot(images.class_labels()[0], max(own.labels))         # raises now if too few

    def after(run, n):
        missing = [step for step in own.at if str(step) not in found and step <= n]
        common.require(missing in ([], [n]), f"the run in {out} is after step "
                       f"{missing and missing[0]} already: choose another --out")
        if missing:
            found[str(n)] = evaluate(script, run.args, run.model, images, own.labels)
            repeat.keep(own.out, result)

    with mock.patch.object(common, "Run", lambda *a, **how: Watched(after, *a, **how)):
        script.main(script.Args(**own.given, out=out, resume=Path(out, "settings.json").exists()))
    result |= json.loads(Path(out, "result.json").read_text()) | dict(figures=result["figures"])
    repeat.keep(own.out, result)


def main(own):
    script = importlib.import_module(Path(own.script).stem)
    with contextlib.redirect_stdout(io.StringIO()):                  # the script says it, too
        args = common.resolve(script.Args(**own.given))
    own.at = sorted({*own.at} if own.at else {args.steps // 4 ** i for i in range(4)})
    common.require(0 <= own.at[0] and own.at[-1] <= args.steps and min(own.labels) >= 0,
                   f"--at must be from 0 to --steps, {args.steps}, and --labels 0 or more",
                   common.UsageError)
    settings = dataclasses.asdict(args) | dict(dtype=common.precision(args))
    settings = {k: v for k, v in settings.items() if k not in repeat.FREE - {"seed"}}
    result = continued(own, dict(settings=json.loads(json.dumps(settings)),
                                 figures=dict(labels=own.labels, at={})))
    found = result["figures"]["at"]
    if "seconds" not in result or not set(map(str, own.at)) <= set(found):
        train(own, script, args, result)
    what = "shape" if args.data == "shapes" else "class"
    head = [f"{what}, {f'{k} per class' if k else 'all'}" for k in own.labels] + ["colour, all"]
    rows = [[n, "-" if f["error"] is None else f"{f['error']:.3f}",
             *(f"{x:.1f}" for x in f["accuracy"])]
            for n, f in sorted(found.items(), key=lambda pair: int(pair[0]))]
    rows = [["step", "squared error", *head][:len(rows[0])], *rows]
    common.say("\nSquared error on new images, and accuracies of linear probes in %:\n\n"
               f"{common.table(rows)}\n\nFigures: {own.out}")


if __name__ == "__main__":
    own = options()
    common.guarded(main, own, "while_training.py")
