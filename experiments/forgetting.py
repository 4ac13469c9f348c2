"""To change little, is that to forget little? Old text against new text, at the same new loss.

As lora.py adapts its base, the losses on the new and on the old text are taken at several steps: a
curve for each method and learning rate. Methods that have trained for as long differ in how far
they went; on the curves they are compared where they know the new text equally well.

Each seed has its own base, examples and first weights. The rates are lora.LR's, the best of a
search, and three times as high. A rate rises over the first steps, and then stays as it is.

Expect   Where all know the new text equally well (1.575 nats per token, from 1.921), full tuning has
         forgotten least (the old loss rose by 0.025), then the last two blocks (0.027), LoRA
         (0.056), BitFit (0.158) and (IA)^3 (0.197). The fewer parameters are trained, the farther
         they move: the weights together by 0.9, 1.5, 3.2, 10.5 and 17.1 %.

Run      python experiments/forgetting.py            1024 examples, three bases
         python experiments/forgetting.py --quick    a tiny GPT, hardly trained: seconds
Writes   one JSON file (--out), after each training, and beside it the curves as an SVG. The same
         command continues it; more of --seeds, --methods or --times add to it; of other settings it
         is refused. The bases are in runs/.
"""
import copy
import dataclasses
import math
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import common, curves, lora, shared                                            # noqa: E402

METHODS = list(get_args(lora.Method))
USUAL = ["lora", "ia3", "bitfit", "last", "full"]
QUICK = ("--dim 16 --heads 2 --depth 2 --context 60 --base-steps 40 --base-batch 4 --example 12 "
         "--k 32 --epochs 8 --batch 8").split()
RISE = 10                                        # steps in which the learning rate rises
LEVELS = .5, 1.                                  # fractions of the way to the new loss of all
FREE = ("device", "save_every", "compile", "seed", "method", "prompt", "length", "temperature",
        "lr", "warmup")                          # settings that change no figure here


def options(argv=None):
    """The command line: the flags here, and in .args those of lora.py. Status 2 for a mistake."""
    parser = common.Parser(
        prog="forgetting.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
        usage="%(prog)s [--flag value ...]", epilog="The other flags are those of lora.py (see "
        "python lora.py --help), without --method, --lr, --warmup, --seed, --base and "
        "--resume.")
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=USUAL, metavar="NAME",
        help=f"any of {' '.join(METHODS)} [{' '.join(USUAL)}]")
    add("--times", nargs="+", type=float, default=[1., 3.], metavar="X",
        help="learning rates, as multiples of each method's usual one [1 3]")
    add("--seeds", nargs="+", type=int, metavar="N", help="each with its own base [0 1 2; with "
        "--quick 0 1]")
    add("--quick", action="store_true", help=" ".join(QUICK))
    add("--out", metavar="FILE", help="file of the figures [results/forgetting.json; with --quick "
        "runs/quick-forgetting.json]")
    own, given = shared.parse(parser, argv, QUICK, ["method", "lr", "warmup", "seed", "base",
                                                     "resume"])
    own.seeds = own.seeds or [0, 1, 2][:2 if own.quick else 3]
    for name in "methods", "times", "seeds":
        values = getattr(own, name)
        if len(set(values)) < len(values):
            parser.error(f"--{name}: each once")
    if not all(0 < x < math.inf for x in own.times) or not all(0 <= x <= 1e9 for x in own.seeds):
        parser.error("--times must be above 0, and --seeds from 0 to 1e9")
    own.out = own.out or f"{'runs/quick-' if own.quick else 'results/'}forgetting.json"
    own.args = lora.Args(**dict(k=1024) | given)
    return own


def points(steps):
    """The steps after which to evaluate: none, all, and halves of all down to one."""
    return sorted({0, steps} | {steps >> i for i in range(steps.bit_length())})


def rate_of(method, times):
    """A learning rate, as the file names it."""
    return f"{lora.LR[method] * times:g}"


def new_result(own, args):
    """What the file holds at first: the settings."""
    settings = dataclasses.asdict(args) | dict(dtype=common.precision(args))
    flags = common.command(dataclasses.replace(args, warmup=lora.Args.warmup, lr=lora.Args.lr,
                                               steps=own.args.steps)).split(" ")[2:]
    command = ["python experiments/forgetting.py", "--methods", *own.methods, "--times",
               *(f"{x:g}" for x in own.times), "--seeds", *own.seeds, *flags]
    return shared.new_result(command, dict(at=points(args.steps), bases={}, rows={}), settings,
                             args.device)


@torch.no_grad()
def change(model, base):
    """How far all weights together moved from those of the base: the norm of the difference, in %
    of the norm of the base's. What LoRA and (IA)^3 added counts as the change of their matrices."""
    new, old = lora.merge_and_unload(copy.deepcopy(model)).state_dict(), base.state_dict()
    norm = lambda weights: sum(w.float().square().sum().item() for w in weights) ** .5
    return 100 * norm(new[name] - w for name, w in old.items()) / norm(old.values())


def follow(args, base, examples, at, measure):
    """Adapts a copy of the base as lora.py does, but at a constant rate after the first steps.
    Returns the figures: {new, old, change: for each of the steps `at` the losses, in nats per
    token, and change(); trained: parameters; seconds: with the evaluations}. measure(model) ->
    dict(new, old)."""
    found = dict(new=[], old=[], change=[])

    def watch(run, n):
        for group in run.optimizer.param_groups:
            group["lr"] = args.lr * min(1., (n + 1) / RISE)
        if n in at:
            for name, loss in measure(run.model.eval()).items():
                found[name].append(loss)
            found["change"].append(change(run.model, base))
            run.model.train()
    _, trained, seconds = shared.fit(args, base, examples, watch=watch)
    return found | dict(trained=trained, seconds=seconds)


def load(args, seed):
    """The base of a seed, which is trained if it is not there yet: the model, what it is, and the
    texts: examples (k, 2, 1 + T), new (m, 2, 1 + T) and old (m, context) to evaluate on."""
    train, val = common.load_examples(args, lora.BYTES)
    torch.manual_seed(seed)
    model, about = lora.load_base(args, args.base or lora.pretrain(args))
    new, old = lora.to_test(args, val, about["old"], len(model.pos_embed.weight))
    return model, about, common.choose(train, args.k, seed), new, old


def reached(curve, loss, what="old"):
    """The old loss (or the change) where a curve {new, old, change} first comes to this new loss,
    on the straight line between the two points around it; nan where it never does."""
    new, old = curve["new"], curve[what]
    for i, value in enumerate(new):
        if value <= loss + 1e-9:
            if i == 0 or value == new[i - 1]:
                return old[i]
            part = min(1., (new[i - 1] - loss) / (new[i - 1] - value))
            return old[i - 1] + part * (old[i] - old[i - 1])
    return math.nan


def common_loss(figures, seed):
    """The least new loss that all curves of a seed reach."""
    return max(min(row[seed]["new"]) for rates in figures["rows"].values()
               for row in rates.values())


def compared(figures):
    """Of each method and rate: {level: the rise of the old loss at that fraction of the way to the
    new loss that all reach, "change": the change at the last level, "least": its own least new
    loss, "there": the rise there}, one value per seed each. And the new losses themselves, {level:
    one value per seed}."""
    found, losses = {}, {level: [] for level in LEVELS}
    for seed, start in figures["bases"].items():
        least = common_loss(figures, seed)
        for level in LEVELS:
            losses[level].append(start["new"] - level * (start["new"] - least))
        for method, rates in figures["rows"].items():
            for rate, row in rates.items():
                cell, curve = found.setdefault((method, rate), {}), row[seed]
                for level in LEVELS:
                    rise = reached(curve, losses[level][-1]) - start["old"]
                    cell.setdefault(level, []).append(rise)
                cell.setdefault("change", []).append(reached(curve, losses[1.][-1], "change"))
                best = int(np.argmin(curve["new"]))
                cell.setdefault("least", []).append(curve["new"][best])
                cell.setdefault("there", []).append(curve["old"][best] - start["old"])
    return found, losses


def asked(own, figures):
    """The figures of those seeds, methods and rates alone that the command names."""
    seeds = list(map(str, own.seeds))
    rows = {method: {rate_of(method, x): {seed: figures["rows"][method][rate_of(method, x)][seed]
                                          for seed in seeds} for x in own.times}
            for method in own.methods}
    return figures | dict(bases={seed: figures["bases"][seed] for seed in seeds}, rows=rows)


def table(figures):
    """The table, and a line: the rise of the old loss at the new loss that all reach."""
    found, losses = compared(figures)
    rows = [["method", "rate", *(f"at new {np.mean(x):.3f}" for x in losses.values()),
             "change, %", "lowest new", "old, there"]]
    rows += [[method, rate, *(shared.mean_std(cell[level], 3) for level in LEVELS),
              f"{np.mean(cell['change']):.1f}", shared.mean_std(cell["least"], 3),
              f"{np.mean(cell['there']):.3f}"]
             for (method, rate), cell in found.items()]
    end = ", ".join(f"{method} {rate} +{np.mean(cell[1.]):.3f}"
                    for (method, rate), cell in found.items())
    return rows, f"old loss at a new loss of {np.mean(losses[1.]):.3f}: {end}"


def draw(figures, times):
    """The curves as an SVG: a panel for each multiple of the usual rates."""
    panels, seeds = [], list(figures["bases"])
    for x in times:
        lines = {}
        for method, rates in figures["rows"].items():
            if row := rates.get(rate_of(method, x)):
                new, old = (np.array([row[seed][what] for seed in seeds])
                            for what in ("new", "old"))
                spread = old.std(0, ddof=1) if len(seeds) > 1 else 0 * old[0]
                lines[shared.NAMES[method]] = [*zip(new.mean(0), old.mean(0), spread)]
        panels.append(dict(title=f"{f'{x:g} times ' * (x != 1)}the usual learning rate",
                           x="loss on new text (training goes to the left)",
                           y="loss on old text", lines=lines))
    return curves.draw(panels)


def prepared(own, seed):
    """The settings of lora.py for a seed, complete. own.args: resolved."""
    args = dataclasses.replace(own.args, seed=seed, out=f"runs/{Path(own.out).stem}-{seed}", lr=1.)
    lora.recipe(args)                                # batch and steps
    return args


def main(own):
    own.args = common.resolve(own.args)
    torch.set_float32_matmul_precision("high")
    result = shared.continued(own.out, new_result(own, prepared(own, own.seeds[0])), FREE)
    figures = result["figures"]
    for seed in own.seeds:
        missing = [(method, x) for method in own.methods for x in own.times if str(seed)
                   not in figures["rows"].get(method, {}).get(rate_of(method, x), {})]
        if not missing:
            continue
        args = prepared(own, seed)
        base, about, examples, new, old = load(args, seed)
        start = lora.losses(args, base, new, old)
        known = figures["bases"].setdefault(str(seed), start | dict(base=about["fingerprint"]))
        common.require(known["base"] == about["fingerprint"], f"{own.out} has figures of another "
                       f"base for seed {seed}: choose another --out")
        for method, x in common.progress(missing, f"seed {seed}"):
            how = dataclasses.replace(args, method=method, lr=lora.LR[method] * x)
            try:
                found = follow(how, base, examples, figures["at"],
                               lambda model: lora.losses(how, model, new, old))
            except common.UserError as error:                                   # it diverged
                raise common.UserError(f"{method}, rate {how.lr:g}: {error}") from None
            row = figures["rows"].setdefault(method, {}).setdefault(rate_of(method, x), {})
            row[str(seed)] = found
            result["seconds"] += found["seconds"]
            shared.save(own.out, result)
            common.say(f"seed {seed}, {method}, rate {how.lr:g}: new {found['new'][-1]:.3f}, old "
                       f"{found['old'][-1]:.3f}")
    figures = asked(own, figures)
    rows, result["summary"] = table(figures)
    shared.save(own.out, result)
    chart = Path(own.out).with_suffix(".svg")
    chart.write_text(draw(figures, own.times))
    new, old = (shared.mean_std([f[name] for f in figures["bases"].values()], 3)
                for name in ("new", "old"))
    common.say(f"\nThe base: {new} on new text, {old} on old text (nats "
               f"per token; seeds {' '.join(figures['bases'])}). How far the old loss rose when "
               "the new loss had come half of the way to the least that all reach, and all of it, "
               "and how far the weights had moved by then; each one's least new loss, and the rise "
               f"there:\n\n{common.table(rows)}\n\n"
               f"Figures: {own.out}; curves: {chart}")


if __name__ == "__main__":
    own = options()
    common.guarded(main, own, "forgetting.py")
