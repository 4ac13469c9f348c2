"""The lecture's comparison: what do SimCLR's, an autoencoder's and MAE's features buy?

Each is pre-trained on the same images, without labels, by its own script. Then the same few labels
are given to a linear probe on the frozen encoder, and to fine-tuning of the whole encoder; the
same for each encoder with random weights (fine-tuned: supervised from scratch), and for raw
pixels. At the end: linear probes, with all labels, for each attribute of the images, also of an
encoder that was supervised on all labels.

Run      make compare                  two data sets, three seeds: hours on a CPU
         make compare ARGS=--quick     one of each, hardly trained: minutes
Writes   compare-<data>.json, from a file for each seed, and compare-<data>.svg in --out, beside the
         runs. What is done is not done again, and what was interrupted is continued.
"""
import copy
import json
import platform
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

import repeat                                             # first: it finds the scripts
import autoencoder, common, curves, mae, shared, simclr

# script: its module, what its encoder is, its name in tables, steps on a CPU: minutes for each
METHODS = {"simclr": (simclr, "ResNet", "SimCLR", 2000),
           "autoencoder": (autoencoder, "encoder", "autoencoder", 3000),
           "mae": (mae, "ViT", "MAE", 4000)}
QUICK = ("--data shapes --seeds 1 --labels 1 20 0 --steps 100 --tune-steps 50 "
         "--out runs/compare-quick")


def options(argv=None):
    """The command line. Exits with status 2 and one sentence where it makes no sense."""
    parser = common.Parser(prog="compare.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", nargs="+", default=["shapes", "fashion-mnist"], metavar="NAME",
        help="data sets, as the scripts take them [shapes fashion-mnist]")
    add("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 [3]")
    add("--labels", type=int, nargs="+", default=[1, 5, 20, 100, 0], metavar="N",
        help="labelled images per class, 0: all [1 5 20 100 0]")
    add("--steps", type=int, metavar="N", help="pre-training steps of each method [on a CPU 2000, "
        "3000 and 4000; else the scripts' own]")
    add("--tune-steps", type=int, default=200, metavar="N",
        help="steps of each fine-tuning; five times as many with all labels [200]")
    add("--quick", action="store_true", help=QUICK)
    add("--out", default="runs/compare", metavar="FOLDER",
        help="what is done there is not done again [runs/compare]")
    add("--data-dir", default=common.Args.data_dir, metavar="FOLDER",
        help=f"where downloads are kept ($DATA_DIR) [{common.Args.data_dir}]")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps [auto]")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.quick:
        args = parser.parse_args([*QUICK.split(), *argv])
    for name in "seeds", "steps", "tune_steps":
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"{common.flag(name)} must be 1 or more, not {value}")
    if min(args.labels) < 0 or len(set(args.labels)) < len(args.labels):
        parser.error("--labels must be 1 or more, or 0 for all, each once")
    return args


def pretrain(args, name, data, seed):
    """Runs a script, or continues its run, or takes the one that is done. Returns its folder."""
    module, steps = METHODS[name][0], args.steps or args.device[:3] == "cpu" and METHODS[name][3]
    out = Path(args.out) / f"{Path(data).stem}-{name}-{seed}"
    flags = ["--data", data, "--seed", seed, "--labels", 1, "--device", args.device,
             "--data-dir", args.data_dir]
    flags += ["--steps", steps] * bool(steps)
    if module is mae:      # the fine-tuning is done here; AdamW, since the others train with it
        flags += ["--tune", "linear", "--optimizer", "adamw", "--weight-decay", .05]
    if (out / "checkpoint.pt").exists():
        state = common.read_checkpoint(out, f"{name}.py")
        how = state["args"]
        same = (how["data"], how["seed"], how["steps"]) == (data, seed, steps or how["steps"])
        common.require(same, f"{out} is a run of {how['steps']} steps on {how['data']} with seed "
                       f"{how['seed']}: choose another --out")
        if (out / "result.json").exists() and state["step"] == how["steps"]:
            return out
    common.say(f"\n{name}.py on {data}, seed {seed}")
    repeat.run(f"{name}.py", out, flags)
    return out


def encoders(args, name, out, images, seed):
    """The settings of a run, and its encoder with random weights, and as it was trained: f of
    normalised images (B, 3, S, S) -> features (B, C)."""
    module, pair = METHODS[name][0], []
    state = common.read_checkpoint(out, f"{name}.py")
    how = module.Args(**{k: tuple(v) if isinstance(v, list) else v
                         for k, v in state["args"].items()})
    how.device = args.device
    for trained in False, True:
        torch.manual_seed(seed)
        model = module.build(how, images.size).eval()
        if trained:
            model.load_state_dict(state["model"])
        pair.append(mae.MeanPooled(model.encoder, how.patch) if module is mae else model.encoder)
    return how, pair


def measure(args, images, seed, data, found, keep):
    """Adds the figures of a seed to found: {"linear", "tune": {encoder: accuracies in %, one for
    each of --labels}, "attributes": {encoder: {attribute: accuracy in % of a linear probe with all
    labels}}}. What is there is not done again; keep() is called after each method."""
    what, (y, test_y) = next(iter(images.names)), images.class_labels()

    def probe(who, f, names, each_k=True):
        train, test = (common.encode(how, f.eval(), images, x) for x in (images.train, images.test))
        if each_k:
            found["linear"][who] = [common.probe(train, y, test, test_y, k, seed)
                                    for k in args.labels]
        found["attributes"][who] = {name: common.probe(train, images.train_labels[name], test,
                                                       images.test_labels[name])
                                    for name in names if name in images.names}

    for name, (_, kind, title, _) in METHODS.items():
        if title in found["tune"]:
            continue
        how, pair = encoders(args, name, pretrain(args, name, data, seed), images, seed)
        if name == "simclr":
            probe("raw pixels", nn.Flatten(), [what, "colour"])      # more takes minutes
        for who, f in zip((f"untrained {kind}", title), pair):
            probe(who, f, images.names)
            accuracies = []
            for k in common.progress(args.labels, f"tuning {who}"):
                i, g = common.k_shot(y, k, seed), copy.deepcopy(f)
                steps = args.tune_steps * (1 if k else 5)
                accuracies.append(common.finetune(how, g, images, images.train[i], y[i], test_y,
                                                  steps, 1e-3, seed=seed))
                if k == 0 and f is pair[0]:
                    probe(f"supervised {kind}", g, images.names, each_k=False)
            found["tune"][who] = accuracies
        keep()


def tables(args, images, seeds):
    """The figures of all seeds as three tables, of 80 columns at most."""
    what = next(iter(images.names))
    count = [str(k or "all") for k in args.labels]
    cell = lambda part, who, key: shared.mean_std([found[part][who][key] for found in seeds])
    names = list(images.names)
    chance = {name: f"{100 / len(images.names[name]):.1f}" for name in names}
    for part, title in (("linear", f"{what}, linear"), ("tune", f"{what}, tuned")):
        yield [[title, *count], ["chance", *[chance[what]] * len(count)]] + [
            [who, *(cell(part, who, i) for i in range(len(count)))] for who in seeds[0][part]]
    yield [["all labels", *names], ["chance", *chance.values()]] + [
        [who, *(cell("attributes", who, name) if name in row else "" for name in names)]
        for who, row in seeds[0]["attributes"].items()]


def draw(labels, seeds, chance, most):
    """The curves as an SVG, linear probe and fine-tuning beside each other. most: labelled images
    per class where k is 0, all."""
    counts, style, panels = [k or most for k in labels], {}, []
    for colour, (_, kind, method, _) in enumerate(METHODS.values()):
        style |= {method: (colour, 0), f"untrained {kind}": (colour, 1)}
    for part, title in ("linear", "linear probe"), ("tune", "fine-tuned"):
        lines = {}
        for who in style:
            found = np.array([seed[part][who] for seed in seeds])
            spread = found.std(0, ddof=1) if len(seeds) > 1 else 0 * found[0]
            lines[who] = sorted(zip(counts, found.mean(0).tolist(), spread.tolist()))
        lines["chance"] = [(k, chance, 0.) for k in sorted(counts)]
        panels.append(dict(title=title, x="labelled images per class", y="accuracy in %",
                           lines=lines))
    return curves.draw(panels, log2=True, y_ends=(0, 100), style=style | {"chance": (5, 2)},
                       ticks={most: "all"} if 0 in labels else {})


def command(args, data):
    """What does this again, for a data set."""
    steps = f" --steps {args.steps}" if args.steps else ""
    return (f"python experiments/compare.py --data {data} --seeds {args.seeds} --labels "
            f"{' '.join(map(str, args.labels))}{steps} --tune-steps {args.tune_steps}")


def new_result(args, images, data, seed, most):
    """The JSON file of a seed, without figures."""
    about = dict(data=data, seed=seed, labels=args.labels, steps=args.steps,
                 tune_steps=args.tune_steps, device=args.device)
    return dict(command=command(args, data), settings=about, seconds=0., whole=False,
                machine=common.machine(args.device), threads=torch.get_num_threads(),
                versions=dict(python=platform.python_version(), torch=torch.__version__),
                chance={name: 100 / len(ids) for name, ids in images.names.items()}, most=most,
                figures=dict(linear={}, tune={}, attributes={}))


def one_seed(args, images, data, seed, most):
    """The result of a seed: the figures that its file has, and the others."""
    path = Path(args.out) / f"compare-{Path(data).stem}-{seed}.json"
    result = new_result(args, images, data, seed, most)
    if path.exists():
        try:
            saved = json.loads(path.read_text())
            same = (saved["settings"], set(saved["figures"])) == (
                result["settings"], set(result["figures"]))
            whole, seconds = saved["whole"], saved["seconds"]
        except (ValueError, KeyError, TypeError):
            raise common.UserError(f"{path} is broken: remove it, and this seed is done "
                                   "again") from None
        common.require(same, f"{path} is of other settings: choose another --out")
        if whole:
            return saved
        result |= dict(figures=saved["figures"], seconds=seconds)
    start = time.monotonic() - result["seconds"]

    def keep():
        result["seconds"] = round(time.monotonic() - start, 1)
        with common.replacing(path) as f:
            f.write((json.dumps(result, indent=1) + "\n").encode())

    measure(args, images, seed, data, result["figures"], keep)
    result["whole"] = True
    keep()
    return result


def compare(args, data):
    """One data set, all seeds: prints the tables, writes the figures and the curves."""
    images = common.load_images(SimpleNamespace(
        data=data, data_dir=args.data_dir, image_size=32, device=args.device))
    labels, what = images.class_labels()[0], next(iter(images.names))
    common.k_shot(labels, max(args.labels))                          # are there so many?
    most = int(labels.unique(return_counts=True)[1].min())
    results = [one_seed(args, images, data, seed, most) for seed in range(args.seeds)]
    repeat.save(Path(args.out) / f"compare-{Path(data).stem}.json", results)
    seeds = [result["figures"] for result in results]
    over = f", mean ± standard deviation of {len(seeds)} seeds" * (len(seeds) > 1)
    common.say(f"\n{data}: accuracy in % on {len(images.test):,} new images, by labelled images "
               f"per class{over}")
    for rows in tables(args, images, seeds):
        common.say(f"\n{common.table(rows)}")
    picture = Path(args.out) / f"compare-{Path(data).stem}.svg"
    picture.write_text(draw(args.labels, seeds, 100 / len(images.names[what]), most))
    common.say(f"\nCurves: {picture}")


def main(args):
    args.device = common.find_device(args.device)
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for data in args.data:
            compare(args, data)
    except FileExistsError:
        raise common.UserError(f"{args.out} is a file: choose another --out") from None


if __name__ == "__main__":
    args = options()
    common.guarded(main, args, "compare.py")
