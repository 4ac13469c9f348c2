"""All ways of lora.py to adapt a GPT, at several numbers k of examples, each repeated.

A repeat takes other examples and other first weights (seed + 1000 * repeat) for the same base. In
the rows "in-context" nothing is trained: the k examples are in the prompt, where they fit.

Run      python experiments/adapt.py                three repeats at five k
         python experiments/adapt.py --context 256 --base-steps 4000 --k 1 2 4 8 16 64 256
         python experiments/adapt.py --search       each method at several learning rates, on
                                                    lines that are not in the tables
         python experiments/adapt.py --quick        a tiny GPT, hardly trained: less than a minute
Writes   one JSON file (--out), after each training. The same command continues it; more of --k,
         --methods or --repeats and another --seed add to it; of other settings it is refused. The
         base is in runs/.
"""
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import get_args

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import common, lora, shared                                                    # noqa: E402
from repeat import apart, keep                                                 # noqa: E402

METHODS = [*get_args(lora.Method), "in-context"]
RATES = dict(lora=(5e-4, 1e-3, 2e-3, 5e-3), ia3=(3e-3, 1e-2, 3e-2), bitfit=(1e-3, 3e-3, 1e-2),
             first=(3e-5, 1e-4, 3e-4), middle=(1e-4, 3e-4, 1e-3), last=(1e-4, 3e-4, 1e-3),
             full=(2e-5, 5e-5, 1e-4, 2e-4))                                    # of --search
QUICK = ("--dim 16 --heads 2 --depth 2 --context 60 --base-steps 20 --base-batch 4 --example 12 "
         "--epochs 2").split()
FREE = ("device", "save_every", "compile", "method", "base", "prompt", "length",
        "temperature", "methods", "k", "repeats")             # settings that change no figure


def options(argv=None):
    """The command line: the flags here, and in .args those of lora.py. Status 2 for a mistake."""
    parser = common.Parser(
        prog="adapt.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
        usage="%(prog)s [--flag value ...]", epilog="The other flags are those of lora.py (see "
        "python lora.py --help), without --method and --resume.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME",
                        help=f"any of {' '.join(METHODS)} [all]")
    parser.add_argument("--k", nargs="+", type=int, default=[1, 4, 16, 64, 256], metavar="N",
                        help="numbers of examples [1 4 16 64 256; with --quick 1 4]")
    parser.add_argument("--repeats", type=int, default=3, metavar="N",
                        help="repeats with other examples and first weights [3; with --quick 2]")
    parser.add_argument("--search", action="store_true", help="compare learning rates")
    parser.add_argument("--quick", action="store_true", help=" ".join(QUICK))
    parser.add_argument("--out", metavar="FILE", help="file of the figures [results/lora-adapt"
                        ".json; with --search lora-search.json; with --quick in runs/]")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(k=[1, 4], repeats=2)
    own, given = shared.parse(parser, argv, QUICK, ["method", "resume"])
    if own.search and "lr" in given:
        parser.error("--lr cannot be used here")
    if min(*own.k, own.repeats) < 1 or len(set(own.k)) < len(own.k):
        parser.error("--k and --repeats must be 1 or more, each --k another number")
    name = f"{'search' if own.search else 'adapt'}.json"
    own.out = own.out or ("runs/quick-" if own.quick else "results/lora-") + name
    own.args = lora.Args(**given, k=max(own.k),
                         out=f"runs/{Path(own.out).stem}-{given.get('seed', 0)}")
    return own


def new_result(own, args, about, model):
    """What the file holds at first: the settings and the base."""
    settings = dataclasses.asdict(args) | dict(
        dtype=common.precision(args), methods=own.methods, k=own.k, repeats=own.repeats,
        search=own.search)
    depth, dim = len(model.blocks), model.pos_embed.weight.shape[1]
    state = common.read_checkpoint(about["base"]) if common.has_run(about["base"]) else \
        dict(step=0, seconds=0.)                                               # of GPT-2
    base = f"{depth} x {dim} GPT of {about['old']}, step {state['step']}, {about['fingerprint']}"
    command = common.command(dataclasses.replace(args, k=lora.Args.k)).split(" ")[2:]
    command = ["python experiments/adapt.py", *["--search"] * own.search, "--k", *own.k, *command]
    figures = dict(base=base, base_seconds=state["seconds"], old=about["old"],
                   parameters=sum(p.numel() for p in model.parameters()), rows={},
                   counts=[n for n in (1, 2, 3, 4, 8, 16, 32) if n <= dim], energy={},
                   energy_k=0)
    return shared.new_result(command, figures, settings, args.device)


def continued(own, new):
    """The figures that the file holds already, in the new result. Raises UserError where they are
    of other settings."""
    path = Path(own.out)
    if not path.exists():
        return new
    try:
        found = apart(json.loads(path.read_text()))
        differ = [common.flag(name) for name, value in new["settings"].items() if name != "seed"
                  and name not in FREE and any(r["settings"].get(name) != value for r in found)]
        for old in (r for r in found if r["settings"]["seed"] == own.args.seed):
            differ += ["base"] * (old["figures"]["base"] != new["figures"]["base"])
            new = new | {name: old[name] for name in ("figures", "seconds", *shared.WHERE)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise common.UserError(f"{path} is no file of adapt.py: choose another --out") from None
    common.require(not differ, f"{path} has figures of another {', '.join(differ)}: choose another "
                   "--out")
    return new


def cells(own, args, context):
    """What is to be done: (method, learning rate, k, repeat); in-context, where the context holds k
    examples and one more."""
    for method in own.methods:
        for lr in RATES.get(method, ()) if own.search else [args.lr]:
            for k in own.k:
                if method != "in-context" or (k + 1) * (args.example + 1) <= context:
                    yield from ((method, lr, k, repeat) for repeat in range(own.repeats))


def fit(args, base, examples, val, old, bos):
    """Adapts a copy of the base as lora.py does. Returns the model and its figures: losses in nats
    per token, trained parameters, bytes of the adapter, seconds per step."""
    model, trained, seconds = shared.fit(args, base, examples, bos)
    with tempfile.TemporaryDirectory() as args.out:
        size = lora.save_adapter(args, model, dict(fingerprint="")).stat().st_size
    return model, lora.losses(args, model, val, old, bos) | dict(
        trained=trained, bytes=size, seconds=seconds / max(1, args.steps))


def cumulative_energy(delta):
    """The fraction of the squared norm of a matrix (d1, d2) that is in its 1, 2, ... largest
    singular values: (min(d1, d2),), rising to 1. A matrix of rank r reaches 1 at the r-th."""
    squares = torch.linalg.svdvals(delta.float()).square()
    return squares.cumsum(0) / squares.sum().clamp(min=1e-30)


@torch.no_grad()
def energies(args, model, base, counts):
    """{target: cumulative energy of what was added to its matrices, at each of counts}, the mean
    over the blocks."""
    found = {name: [] for name in args.targets}
    for path, linear in lora.target_layers(base, args.targets).items():
        layer = model.get_submodule(path)
        delta = layer.delta() if isinstance(layer, lora.LoRA) else layer.weight - linear.weight
        found[path.split(".")[-1]].append(cumulative_energy(delta)[[n - 1 for n in counts]])
    return {name: torch.stack(parts).mean(0).tolist() for name, parts in found.items()}


def place(own, figures, method, lr, k):
    """Where the figures of a method at k (in a search: at a learning rate, too) are: {name: a list,
    one value per repeat}."""
    row = figures["rows"].setdefault(method, {})
    return (row.setdefault(f"{lr:g}", {}) if own.search else row).setdefault(str(k), {})


def compared(own, figures):
    """The table: for each k and method, mean and standard deviation over the repeats. And a line:
    each method's lowest loss on new text."""
    table = [["k", "method", "trained", "bytes", "new text", "old text", "ms"],
             ["0", "the base", "0", "0", *(f"{loss:.3f}" for loss in figures["start"]), "-"]]
    for k in map(str, own.k):
        for method in (m for m in own.methods if k in figures["rows"].get(m, {})):
            f = figures["rows"][method][k]
            table.append([k, method, f"{f['trained'][0]:,}", f"{f['bytes'][0]:,}",
                          common.mean_std(f["new"], 3), common.mean_std(f["old"], 3),
                          f"{1000 * np.mean(f['seconds']):.0f}"])
    lowest = {m: min(np.mean(f["new"]) for f in ks.values()) for m, ks in figures["rows"].items()}
    return table, ", ".join(f"{method} {loss:.3f}" for method, loss in lowest.items())


def searched(figures):
    """The table: for each method and learning rate, the mean over all k and repeats. And a line:
    each method's best rate."""
    table, best = [["method", "learning rate", "new text", "old text"]], {}
    for method, rates in figures["rows"].items():
        mean = {lr: [np.mean([f[name] for f in ks.values()]) for name in ("new", "old")]
                for lr, ks in rates.items()}
        best[method] = min(mean, key=lambda lr: mean[lr][0])
        table += [[method, "best: " * (lr == best[method]) + lr, f"{new:.3f}", f"{old:.3f}"]
                  for lr, (new, old) in mean.items()]
    return table, ", ".join(f"{method} {lr}" for method, lr in best.items())


def main(own):
    args = common.resolve(own.args)
    torch.set_float32_matmul_precision("high")
    known = lora.load_base(args, args.base) if args.base else None
    weights = known[1]["weights"] if known else ""
    tokenizer = common.BPE.load(weights) if weights else lora.BYTES
    train, val = common.load_examples(args, tokenizer)
    if own.search:                                  # on other text than what is reported
        train, val = train[:len(train) * 9 // 10], train[len(train) * 9 // 10:]
        common.require(max(own.k) <= len(train) and len(val), f"--k {max(own.k)} is more than the "
                       f"{len(train)} examples that a search trains on: take a smaller --k")
    torch.manual_seed(args.seed)
    base, about = known or lora.load_base(args, lora.pretrain(args))
    context = len(base.pos_embed.weight)
    val, old = lora.to_test(args, val, about["old"], context, tokenizer)
    result = continued(own, new_result(own, args, about, base))
    figures = result["figures"]
    figures["start"] = start = list(lora.losses(args, base, val, old, tokenizer.BOS).values())
    bar = common.progress(list(cells(own, args, context)), "adapting")
    for method, lr, k, repeat in bar:
        row = place(own, figures, method, lr, k)
        if len(row.get("new", ())) > repeat:                                    # it is done
            continue
        how = dataclasses.replace(args, k=k, lr=lr, seed=args.seed + 1000 * repeat)
        examples = common.choose(train, k, how.seed)
        if method == "in-context":
            given = common.in_a_row(examples, tokenizer.BOS)
            new = lora.evaluate(how, base, *val.unbind(1), given, tokenizer.BOS)
            found = dict(new=new, old=start[1], trained=0, seconds=0.,
                         bytes=tokenizer.sizes[given.cpu()].sum().item())
        else:
            how.method = method
            lora.recipe(how)
            try:
                model, found = fit(how, base, examples, val, old, tokenizer.BOS)
            except common.UserError as error:                                   # it diverged
                raise common.UserError(f"{method}, k = {k}: {error}") from None
            result["seconds"] += found["seconds"] * how.steps
            if method in ("lora", "full") and (repeat, own.search) == (0, False) and \
                    k == max(*own.k, figures["energy_k"]):
                figures["energy"][method] = energies(how, model, base, figures["counts"])
                figures["energy_k"] = k
        for name, value in found.items():
            row.setdefault(name, []).append(value)
        keep(own.out, result)
        if bar.disable:                                                         # no terminal
            common.say(f"{method}, k = {k}, rate {how.lr:g}, repeat {repeat}: {found['new']:.3f}")
    table, result["summary"] = searched(figures) if own.search else compared(own, figures)
    keep(own.out, result)
    report(own, figures, table)


def report(own, figures, table):
    """The tables on the terminal."""
    if figures["energy"]:
        rows = [[f"{method}, {name}", *(f"{100 * x:.0f}" for x in row)]
                for method, names in figures["energy"].items() for name, row in names.items()]
        common.say("\nCumulative energy of the singular values of what was added to a matrix, in "
                   f"%, at k = {figures['energy_k']}:\n\n"
                   + common.table([["largest", *map(str, figures["counts"])], *rows]))
    common.say(f"\nBase: {figures['base']}. Losses in nats per token on new text "
               f"({Path(own.args.data).name}) and old text ({Path(figures['old']).name}):\n\n"
               f"{common.table(table)}\n\nFigures: {own.out}")


if __name__ == "__main__":
    own = options()
    common.guarded(main, own, "adapt.py")
