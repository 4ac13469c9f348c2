"""The lecture's comparison: what do SimCLR's, an autoencoder's and MAE's features buy?

Each is pre-trained on the same images, without labels, by its own script. Then the same few labels
are given to a linear probe on the frozen encoder, and to the whole encoder, which is fine-tuned;
the same for each encoder with random weights (fine-tuned: supervised from scratch), and for raw
pixels. At the end: which attributes of an image does a linear probe read with all labels?

Run      make compare                      two data sets, three seeds: hours on a CPU
         make compare ARGS=--quick         one of each, hardly trained: minutes
Writes   compare-<data>-<seed>.json and compare-<data>.svg in --out, beside the runs. What is there
         already, whole, is not done again.
"""
import copy
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import autoencoder, common, mae, simclr                                        # noqa: E402

# script: its module, what its encoder is, its name in tables, steps on a CPU: minutes for each
METHODS = {"simclr": (simclr, "ResNet", "SimCLR", 2000),
           "autoencoder": (autoencoder, "encoder", "autoencoder", 3000),
           "mae": (mae, "ViT", "MAE", 4000)}
COLOURS = ["#9a6700", "#cf222e", "#8250df"], ["#d29922", "#ff7b72", "#bc8cff"]   # light, dark


def options(argv=None):
    """The command line, checked. Exits with status 2 and one sentence where it makes no sense."""
    parser = common.Parser(prog="compare.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", nargs="+", default=["shapes", "fashion-mnist"], metavar="NAME",
                        help="data sets, as the scripts take them [shapes fashion-mnist]")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 [3]")
    parser.add_argument("--labels", type=int, nargs="+", default=[1, 5, 20, 100, 0], metavar="N",
                        help="labelled images a class, 0: all [1 5 20 100 0]")
    parser.add_argument("--steps", type=int, metavar="N", help="pre-training steps of each method "
                        "[on a CPU 2000, 3000 and 4000; else the scripts' own]")
    parser.add_argument("--tune-steps", type=int, default=200, metavar="N",
                        help="steps of a fine-tuning; five times as many with all labels [200]")
    parser.add_argument("--quick", action="store_true",
                        help="--data shapes --seeds 1 --labels 1 20 0 --steps 100 --tune-steps 50 "
                        "--out runs/compare-quick")
    parser.add_argument("--out", default="runs/compare", metavar="NAME",
                        help="what is there already is not done again [runs/compare]")
    parser.add_argument("--data-dir", default="data", metavar="NAME",
                        help="where downloads are kept [data]")
    parser.add_argument("--device", default="auto", metavar="NAME",
                        help="auto, cpu, cuda or mps [auto]")
    args = parser.parse_args(argv)
    if args.quick:
        args = parser.parse_args(["--data", "shapes", "--seeds", "1", "--labels", "1", "20", "0",
                                  "--steps", "100", "--tune-steps", "50", "--out", "runs/compare-quick",
                                  *(sys.argv[1:] if argv is None else argv)])
    for name in "seeds", "steps", "tune_steps":
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"{common.flag(name)} must be 1 or more, not {value}")
    if min(args.labels) < 0 or len(set(args.labels)) < len(args.labels):
        parser.error("--labels must be 1 or more, or 0 for all, each once")
    args.device = common.device(args.device)
    return args


def pretrain(args, name, data, seed):
    """Runs a script, or goes on with it, or takes what it left. Returns the folder of the run."""
    module, steps = METHODS[name][0], args.steps or args.device == "cpu" and METHODS[name][3]
    out = Path(args.out) / f"{Path(data).stem}-{name}-{seed}"
    flags = ["--data", data, "--seed", seed, "--labels", 1, "--draws", 1, "--out", out,
             "--device", args.device, "--data-dir", args.data_dir]
    flags += ["--steps", steps] * bool(steps)
    flags += ["--tune", "linear"] if module is mae else ["--no-supervised"]      # that is done here
    if (out / "checkpoint.pt").exists():
        state = common.read_checkpoint(out, f"{name}.py")
        how = state["args"]
        common.require((how["data"], how["seed"], how["steps"]) == (data, seed, steps or how["steps"]),
                       f"{out} is a run of {how['steps']} steps on {how['data']} with seed "
                       f"{how['seed']}: choose another --out")
        if (out / "result.json").exists() and state["step"] == how["steps"]:
            return out
        flags.append("--resume")
    print(f"\n{name}.py on {data}, seed {seed}", flush=True)
    line = [sys.executable, ROOT / f"{name}.py", *flags]
    with subprocess.Popen([*map(str, line)]) as script:
        try:
            status = script.wait()
        except KeyboardInterrupt:          # the script was interrupted, too: it may save what it has
            script.wait()
            raise
    common.require(status == 0, f"{name}.py ended with status {status}, see above; the same command "
                   "goes on from there")
    return out


def encoders(args, name, out, images, seed):
    """The encoder of a run with random weights, and as it was trained: f of normalised images
    (B, 3, S, S) -> features (B, C)."""
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
        f = mae.Features(model.encoder, how.patch) if module is mae else model.encoder
        pair.append(f)
    return how, pair


def measure(args, images, data, seed, found, keep):
    """Fills in the figures of a seed: found = {"linear", "tune": {who: accuracies in %, one for each
    of --labels}, "knows": {who: {attribute: accuracy in % of a linear probe with all labels}}}.
    What is there is not done again; keep() is called after each method."""
    what = next(iter(images.names))
    y, test_y = images.train_labels[what], images.test_labels[what]

    def probe(who, f, names, curve=True):
        with common.autocast(how):
            train, test = (common.encode(f.eval(), images, x) for x in (images.train, images.test))
        if curve:
            found["linear"][who] = [common.probe(train, y, test, test_y, k, seed)
                                    for k in args.labels]
        found["knows"][who] = {name: common.probe(train, images.train_labels[name], test,
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
            found["tune"][who] = []
            for k in common.progress(args.labels, f"tuning {who}"):
                few, g = common.few(y, k, seed), copy.deepcopy(f)
                steps = args.tune_steps * (1 if k else 5)
                found["tune"][who].append(common.finetune(
                    g, images, images.train[few], y[few], test_y, how, steps, 1e-3, seed=seed))
                if k == 0 and f is pair[0]:          # what does it know that learned this alone?
                    probe(f"supervised {kind}", g, images.names, curve=False)
        keep()


def tables(args, images, seeds):
    """The figures of all seeds as three tables, of 80 columns at most."""
    what = next(iter(images.names))
    count = [f"{k} a class" if k else "all labels" for k in args.labels]
    over = lambda part, who, at: common.spread(
        [found[part][who][at] for found in seeds]).replace(" +- ", " ±")            # 80 columns
    names = list(images.names)
    chance = {name: f"{100 / len(images.names[name]):.1f}" for name in names}
    for part, title in (("linear", f"{what}, linear"), ("tune", f"{what}, tuned")):
        yield [[title, *count], ["chance", *[chance[what]] * len(count)]] + [
            [who, *(over(part, who, i) for i in range(len(count)))] for who in seeds[0][part]]
    yield [["all labels", *names], ["chance", *chance.values()]] + [
        [who, *(over("knows", who, name) if name in knows else "" for name in names)]
        for who, knows in seeds[0]["knows"].items()]


def draw(labels, seeds, chance, most):
    """The curves as an SVG, linear probe and fine-tuning beside each other; a text that a browser
    shows on a light and on a dark ground. most: labelled images a class where k is 0, all."""
    wide, high, left, top, gap = 300, 240, 44, 34, 60
    counts = [k or most for k in labels]
    order = sorted(range(len(counts)), key=lambda i: counts[i])
    first, last = np.log(min(counts)), np.log(max(max(counts), min(counts) + 1))
    x = lambda i, panel: left + panel * (wide + gap) + wide * (np.log(counts[i]) - first) / (
        last - first)
    y = lambda value: top + high * (1 - value / 100)
    light, dark = COLOURS
    rules = [f".c{i}{{stroke:{c};fill:{c}}}" for i, c in enumerate(light)]
    rules += ["@media (prefers-color-scheme:dark){"] + [
        f".c{i}{{stroke:{c};fill:{c}}}" for i, c in enumerate(dark)] + ["}"]
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 366" font-size="12" '
             'font-family="sans-serif">', "<style>text{fill:#808080;stroke:none}.g{stroke:#808080;"
             f"stroke-width:.5;fill:none}}{''.join(rules)}path{{fill:none!important}}</style>"]
    text = lambda x, y, words, anchor="middle": parts.append(
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>')
    for panel, (part, title) in enumerate((("linear", "linear probe, accuracy in %"),
                                           ("tune", "fine-tuned, accuracy in %"))):
        text(left + panel * (wide + gap) + wide / 2, top - 14, title)
        for value in 0, 20, 40, 60, 80, 100:
            text(left + panel * (wide + gap) - 6, y(value) + 4, value, "end")
            parts.append(f'<path class="g" d="M{left + panel * (wide + gap)} {y(value):.1f}h{wide}"/>')
        parts.append(f'<path class="g" stroke-dasharray="2 3" '
                     f'd="M{left + panel * (wide + gap)} {y(chance):.1f}h{wide}"/>')
        text(left + panel * (wide + gap) + wide, y(chance) + 12, "chance", "end")
        for i in order:
            text(x(i, panel), top + high + 18, counts[i] if labels[i] else "all")
        text(left + panel * (wide + gap) + wide / 2, top + high + 36, "labelled images a class")
        for m, (_, kind, method, _) in enumerate(METHODS.values()):
            for who, dash in (f"untrained {kind}", ' stroke-dasharray="5 4"'), (method, ""):
                mean = [np.mean([found[part][who][i] for found in seeds]) for i in order]
                line = "L".join(f"{x(i, panel):.1f} {y(v):.1f}" for i, v in zip(order, mean))
                parts.append(f'<path class="c{m}" stroke-width="2"{dash} d="M{line}"/>')
                if not dash:
                    parts += [f'<circle class="c{m}" r="3" cx="{x(i, panel):.1f}" '
                              f'cy="{y(v):.1f}"/>' for i, v in zip(order, mean)]
    at = left
    for m, (_, kind, method, _) in enumerate(METHODS.values()):
        for words, dash in (method, ""), (f"untrained {kind}", ' stroke-dasharray="5 4"'):
            parts.append(f'<path class="c{m}" stroke-width="2"{dash} d="M{at} 350h22"/>')
            text(at + 27, 354, words, "start")
            at += 40 + 6.6 * len(words)
    return "\n".join([*parts, "</svg>"]) + "\n"


def command(args, data):
    """What does this again, for a data set."""
    steps = f" --steps {args.steps}" if args.steps else ""
    return (f"python benchmarks/compare.py --data {data} --seeds {args.seeds} --labels "
            f"{' '.join(map(str, args.labels))}{steps} --tune-steps {args.tune_steps}")


def compare(args, data):
    """One data set, all seeds: prints the tables, writes the figures and the curves."""
    images, seeds = common.load_images(data, args.data_dir, device=args.device), []
    what = next(iter(images.names))
    common.few(images.train_labels[what], max(args.labels))                          # too many? now
    most = int(images.train_labels[what].unique(return_counts=True)[1].min())
    for seed in range(args.seeds):
        path = Path(args.out) / f"compare-{Path(data).stem}-{seed}.json"
        about = dict(data=data, seed=seed, labels=args.labels, steps=args.steps,
                     tune_steps=args.tune_steps, device=args.device)
        result = dict(command=command(args, data), settings=about, seconds=0., whole=False,
                      machine=common.machine(args.device), threads=torch.get_num_threads(),
                      versions=dict(python=platform.python_version(), torch=torch.__version__),
                      chance={name: 100 / len(ids) for name, ids in images.names.items()}, most=most,
                      figures=dict(linear={}, tune={}, knows={}))
        if path.exists():
            try:
                result = json.loads(path.read_text())
                same = result["settings"] == about
            except (ValueError, KeyError, TypeError):
                raise common.UserError(f"{path} is broken: remove it, and this seed is done "
                                       "again") from None
            common.require(same, f"{path} is of other settings: choose another --out")
            result.setdefault("most", most)                           # an older version did not say
        if not result["whole"]:
            began = time.time() - result["seconds"]

            def keep():
                result["seconds"] = round(time.time() - began, 1)
                part = path.with_suffix(".part")                     # the old one, or the new one
                part.write_text(json.dumps(result, indent=1) + "\n")
                part.replace(path)

            measure(args, images, data, seed, result["figures"], keep)
            result["whole"] = True
            keep()
        seeds.append(result["figures"])
    print(f"\n{data}: accuracy in %, {len(images.test):,} new images"
          + f", mean ± spread of {len(seeds)} seeds" * (len(seeds) > 1))
    for rows in tables(args, images, seeds):
        print(f"\n{common.table(rows)}")
    curves = Path(args.out) / f"compare-{Path(data).stem}.svg"
    curves.write_text(draw(args.labels, seeds, 100 / len(images.names[what]), most))
    print(f"\nCurves: {curves}", flush=True)


def main():
    args = options()
    try:
        common.folder(args.out)
        for data in args.data:
            compare(args, data)
    except (common.UserError, OSError) as error:
        sys.exit(f"compare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ncompare.py: stopped; the same command goes on from there")


if __name__ == "__main__":
    main()
