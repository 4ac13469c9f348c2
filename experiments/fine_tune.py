"""What a few labelled passages are worth to a finished run of bert.py: eight ways to use them.

Which part of the text is a passage from? Each accuracy is for several choices of the k labelled
passages per class. Linear probes: of a bag of words, of the frozen output at [CLS], and of the mean
of the frozen outputs at the words. Fine-tuning: of the last block and the pooler, or of all.

Run      python experiments/fine_tune.py runs/bert --repeats 3
         python experiments/fine_tune.py --quick      a tiny BERT, hardly trained: a minute
Writes   one JSON file (--out), after each accuracy. The same command continues it; more of
         --repeats adds to it; with another run or other --labels it is refused.
"""
import copy
import functools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bert, common                                                            # noqa: E402

QUICK = dict(steps=20, dim=32, heads=2, tune_steps=5, labels=(1, 5))


def options(argv=None):
    """The command line. Exits with status 2 and one sentence where it makes no sense."""
    parser = common.Parser(prog="fine_tune.py", description=__doc__.split("\n\n")[0],
                           usage="%(prog)s FOLDER [--flag value ...]", allow_abbrev=False)
    add = parser.add_argument
    add("folder", nargs="?", metavar="FOLDER", help="a finished run of bert.py")
    add("--repeats", type=int, default=3, metavar="N", help="choices of the passages [3]")
    add("--labels", type=int, nargs="+", metavar="N", help="passages per class [as in the run]")
    add("--quick", action="store_true", help="train a tiny BERT first, in runs/quick-bert")
    add("--out", metavar="FILE", help="file of the figures [results/<run>-fine-tune.json; with "
        "--quick in runs/]")
    own = parser.parse_args(argv)
    if own.quick == bool(own.folder):
        parser.error("give either the folder of a finished run of bert.py or --quick")
    if min(own.repeats, *own.labels or [1]) < 1:
        parser.error("--repeats and --labels must be 1 or more")
    own.folder = Path(own.folder or "runs/quick-bert")
    own.out = own.out or (f"{'runs' if own.quick else 'results'}/"
                          f"{own.folder.resolve().name}-fine-tune.json")
    return own


def load(own):
    """A finished run: its settings, its model in evaluation mode, its passages; and the figures as
    they are at first."""
    state = common.read_checkpoint(own.folder, "bert.py", flag="FOLDER")
    args = bert.Args(**state["args"] | dict(device=common.find_device("auto"), compile=False))
    common.require(state["step"] == args.steps, f"{own.folder} has done {state['step']} of "
                   f"{args.steps} steps: python bert.py --resume --out {own.folder} finishes it")
    args.labels = tuple(own.labels or args.labels)
    args.out, args.resume = str(own.folder), True
    model, tokenizer, _ = bert.load_or_build(args)
    text = common.load_text(args.data, args.data_dir, parts=args.classes, utf8=True)
    passages = common.Passages(args, tokenizer, text)
    common.k_shot(passages.labels, max(args.labels))                       # raises now if too few
    model.load_state_dict(state["model"])
    model.eval()
    most = passages.test_labels.bincount().max().item() / len(passages.test_labels)
    return args, model, passages, dict(
        run=common.fingerprint(state["model"]), labels=list(args.labels), parts=passages.names,
        device=args.device, majority=100 * most, accuracy={})


def methods(args, model, passages):
    """{method: a function (k, seed) -> accuracy in %}; the seed chooses k passages per class."""
    vocab = len(model.mlm_bias)
    torch.manual_seed(args.seed)
    untrained = bert.build(args, vocab).eval()           # random, as without --weights
    bag = lambda x: x.new_zeros(len(x), vocab).scatter_add_(1, x, torch.ones_like(x))
    cls = lambda m: lambda x: m.encode(x, torch.zeros_like(x[:, :1]))[:, 0]
    mean = lambda x: model.encode(x)[:, 1:-1].mean(1)                      # without [CLS], [SEP]

    @functools.lru_cache(1)
    def features(f):
        return [common.encode(args, f, passages, x) for x in (passages.train, passages.test)]

    def frozen(f):
        return lambda k, seed: common.probe(features(f)[0], passages.labels, features(f)[1],
                                            passages.test_labels, k, seed)

    def tune(m, last=False):
        if last:
            m = copy.deepcopy(m).requires_grad_(False)
            m.blocks[-1].requires_grad_(True), m.pooler.requires_grad_(True)
        return lambda k, seed: bert.finetune(args, m, passages, k, seed)

    return {"bag of words, linear": frozen(bag), "untrained, frozen [CLS]": frozen(cls(untrained)),
            "BERT, frozen [CLS]": frozen(cls(model)), "BERT, frozen mean of words": frozen(mean),
            "untrained, tune last": tune(untrained, last=True),
            "untrained, tune all": tune(untrained),
            "BERT, tune last": tune(model, last=True), "BERT, tune all": tune(model)}


def continued(own, new):
    """The figures, with the accuracies that the file holds already. Raises UserError where these
    are of another run."""
    if not Path(own.out).exists():
        return new
    try:
        old = json.loads(Path(own.out).read_text())["figures"]
        differ = [name for name in new if name != "accuracy" and old[name] != new[name]]
        new = new | dict(accuracy=old["accuracy"])
    except (OSError, ValueError, KeyError, TypeError):
        raise common.UserError(f"{own.out} is no file of fine_tune.py: choose another --out"
                               ) from None
    common.require(not differ, f"{own.out} has figures of another {', '.join(differ)}: choose "
                   "another --out")
    return new


def main(own):
    if own.quick and not (own.folder / "result.json").exists():
        begun = (own.folder / "settings.json").exists()
        bert.main(bert.Args(**QUICK, out=str(own.folder), resume=begun))
    torch.set_float32_matmul_precision("high")
    args, model, passages, figures = load(own)
    try:
        result = dict(json.loads((own.folder / "result.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise common.UserError(f"{own.folder}/result.json cannot be read: python bert.py --resume "
                               f"--out {own.folder} writes it again") from None
    result["figures"] = figures = continued(own, figures)
    fits, rows = methods(args, model, passages), figures["accuracy"]
    cells = [(name, i, seed) for name in fits for i in range(len(args.labels))
             for seed in range(own.repeats)]
    Path(own.out).parent.mkdir(parents=True, exist_ok=True)
    for name, i, seed in common.progress(cells, "few labels"):
        row = rows.setdefault(name, [[] for _ in args.labels])[i]
        if len(row) > seed:                                                    # it is done
            continue
        row.append(fits[name](args.labels[i], seed))
        result["summary"] = f"{name}: {common.mean_std(row)} % from {args.labels[i]} per class"
        with common.replacing(own.out) as f:
            f.write((json.dumps(result, indent=1) + "\n").encode())
    table = [["accuracy in %", *(f"{k} per class" for k in args.labels)],
             ["always the same part", *[f"{figures['majority']:.1f}"] * len(args.labels)],
             *([name, *map(common.mean_std, row)] for name, row in rows.items())]
    common.say(f"\nWhich part is a passage of {args.passage - 2} words from: "
               f"{', '.join(passages.names)}?\n\n{common.table(table)}\n\nFigures: {own.out}")


if __name__ == "__main__":
    own = options()
    common.guarded(main, own, "fine_tune.py")
