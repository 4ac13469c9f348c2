"""MAE beside SimCLR with the same encoder, the same images and the same time on the processor.

Both pre-train mae.py's ViT: MAE by reconstructing masked patches (once for each --mask-ratio),
SimCLR by two augmented views of all patches, with simclr.py's augmentations, projection head and
loss. Both use Muon. Then labels come in: a linear probe of the frozen mean of the patches, and
fine-tuning of all; the same for a ViT with random weights. At a quarter and at half of the time,
fine-tuning at one number of labels shows where each is heading.

Run      python experiments/same_encoder.py --data fashion-mnist --seeds 0 1 2
         python experiments/same_encoder.py --data cifar10.npz --methods mae --mask-ratios .5 .75 .9
         python experiments/same_encoder.py --quick      seconds of training: to see that it runs
Writes   one JSON file (--out), after each encoder; the same command continues it.
"""
import copy
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common, mae, simclr                                                     # noqa: E402
from repeat import apart, keep                                                 # noqa: E402


class Contrastive(nn.Module):
    """A ViT and SimCLR's projection head: views (B, 3, S, S) -> z (B, 64)."""

    def __init__(self, encoder, patch, dim):
        super().__init__()
        self.features = mae.MeanPooled(encoder, patch)
        self.encoder = encoder
        self.project = nn.Sequential(nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim),
                                     nn.ReLU(), nn.Linear(dim, 64))

    def forward(self, x):
        return self.project(self.features(x))


def options(argv=None):
    """The command line. Exits with status 2 and one sentence where it makes no sense."""
    parser = common.Parser(prog="same_encoder.py", description=__doc__.split("\n\n")[0],
                           allow_abbrev=False)
    add = parser.add_argument
    add("--data", default="fashion-mnist", metavar="NAME", help="as mae.py takes it [fashion-mnist]")
    add("--data-dir", default=common.Args.data_dir, metavar="FOLDER", help="of downloads")
    add("--methods", nargs="+", default=["mae", "simclr", "untrained"], metavar="NAME",
        choices=["mae", "simclr", "untrained"], help="mae, simclr, untrained [all]")
    add("--mask-ratios", nargs="+", type=float, default=[.75], metavar="X", help="of MAE [0.75]")
    add("--seconds", type=float, default=240., metavar="X",
        help="of the processor, for each pre-training [240]")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="seeds [0]")
    add("--labels", nargs="+", type=int, default=[1, 5, 20, 100, 0], metavar="N",
        help="labelled images per class, 0: all [1 5 20 100 0]")
    add("--tune-steps", type=int, default=150, metavar="N",
        help="of each fine-tuning; five times as many with all labels [150]")
    add("--quick", action="store_true", help="shapes, 1 second, 2 steps, in runs/")
    add("--out", metavar="FILE", help="[results/same-encoder-<data>.json]")
    own = parser.parse_args(argv)
    if own.quick:
        parser.set_defaults(data="shapes", seconds=1., labels=[1, 5], tune_steps=2,
                            out="runs/same-encoder-quick.json")
        own = parser.parse_args(argv)
    if min(own.seconds, own.tune_steps, 1 + min(own.labels), min(own.mask_ratios)) <= 0:
        parser.error("--seconds, --tune-steps, --labels and --mask-ratios must be positive")
    own.out = Path(own.out or f"results/same-encoder-{Path(own.data).stem}.json")
    return own


def build(args, images, method):
    """The model that a method trains; its encoder is the same, by the seed."""
    torch.manual_seed(args.seed)
    model = mae.build(args, images.size)
    if method == "simclr":
        torch.manual_seed(args.seed)
        model = Contrastive(model.encoder, args.patch, args.dim).to(args.device)
    return model


def loss_of(args, how, images, model, x, method):
    """The loss of a batch of images (B, 3, S, S) uint8."""
    if method == "simclr":
        views = simclr.augment(x.repeat(2, 1, 1, 1) / 255, how.crop_scale, how.jitter, how.hue)
        return simclr.ntxent(*model(images.normalize(views)).chunk(2), how.temperature)
    inputs, target = mae.mask(images.normalize(x), args.patch, args.mask_ratio)
    return mae.distance(model(*inputs), target)


def pretrain(own, args, images, method, look):
    """Trains for --seconds of the processor. look(fraction, model) is called at a quarter, at half
    and at the end; what it takes does not count. Returns the model and the number of steps."""
    model, how = build(args, images, method), simclr.Args()
    optimizer = common.optimizer(args, model.named_parameters())
    used, step, marks = 0., 0, [.25, .5, 1.]
    while marks:
        torch.manual_seed(args.seed * 1_000_003 + step)
        began, done = time.process_time(), used / own.seconds
        rate = min(1., done / .05 + 1e-3) * .5 * (1 + math.cos(math.pi * min(1., done)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate * group.get("times", 1.)
        x = images.train[torch.randint(len(images.train), (args.batch,), device=args.device)]
        with common.autocast(args):
            loss = loss_of(args, how, images, model, x, method)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        used, step = used + time.process_time() - began, step + 1
        common.bounded(loss.isfinite())
        if used >= marks[0] * own.seconds:
            look(marks.pop(0), model.eval())
            model.train()
    return model.eval(), step


def tuned(own, args, images, encoder, k):
    """Accuracy in % of a copy of the encoder, fine-tuned on k labelled images per class."""
    labels, test_labels = images.class_labels()
    i = common.k_shot(labels, k, args.seed)
    f = mae.MeanPooled(copy.deepcopy(encoder), args.patch).requires_grad_(True)
    steps = own.tune_steps * (1 if k else 5)
    return common.finetune(args, f, images, images.train[i], labels[i], test_labels, steps,
                           args.tune_lr, seed=args.seed)


def measure(own, args, images, method):
    """{linear, tuned: accuracies in % at each of --labels; heading: fine-tuned at a quarter, half
    and all of the time; steps}."""
    heading, middle = [], sorted(own.labels, key=lambda k: k or math.inf)[-2:][0]
    if method == "untrained":
        model, steps = build(args, images, "mae"), 0
    else:
        look = lambda part, model: heading.append(tuned(own, args, images, model.encoder, middle))
        model, steps = pretrain(own, args, images, method, look)
    labels, test_labels = images.class_labels()
    f = mae.MeanPooled(model.encoder, args.patch)
    train, test = (common.encode(args, f, images, x) for x in (images.train, images.test))
    return dict(linear=[common.probe(train, labels, test, test_labels, k, args.seed)
                        for k in own.labels],
                tuned=[tuned(own, args, images, model.encoder, k) for k in own.labels],
                heading=heading, heading_labels=middle, steps=steps)


def table(own, rows):
    """A row for each method: mean and standard deviation over the seeds, at each of --labels."""
    head = [["accuracy in % by labels per class", *(str(k or "all") for k in own.labels)]]
    cells = lambda runs, key: [common.mean_std([run[key][i] for run in runs]).replace(" +- ", " ±")
                               for i in range(len(own.labels))]
    return head + [[f"{name}, {key}", *cells(runs, key)]
                   for key in ("linear", "tuned") for name, runs in rows.items()]


def main(own):
    torch.set_float32_matmul_precision("high")
    args = common.resolve(mae.Args(data=own.data, data_dir=own.data_dir, batch=64, clip=1.))
    images = common.load_images(args)
    images.check(own.labels)
    settings = dict(data=Path(own.data).name, seconds=own.seconds, labels=own.labels,
                    tune_steps=own.tune_steps, dtype=common.precision(args))
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    shared = dict(command=" ".join(["python experiments/same_encoder.py", *words]),
                  machine=common.machine(args.device), threads=torch.get_num_threads(),
                  versions=dict(python=platform.python_version(), torch=torch.__version__))
    found = {}                                                          # {seed: its figures}
    for result in apart(json.loads(own.out.read_text())) if own.out.exists() else []:
        seed = result["settings"].pop("seed")
        common.require(result["settings"] == settings, f"{own.out} is of other settings: choose "
                       "another --out")
        found[seed] = result["figures"]
    cells = [(f"MAE, {ratio:g} masked" if method == "mae" else dict(simclr="SimCLR").get(
              method, method), method, ratio, seed) for seed in own.seeds for method in own.methods
             for ratio in (own.mask_ratios if method == "mae" else [0.])]
    for name, method, ratio, seed in cells:
        figures = found.setdefault(seed, {})
        if name not in figures:
            args.seed, args.mask_ratio = seed, ratio
            figures[name] = measure(own, args, images, method)
            common.say(f"{name}, seed {seed}: {figures[name]['steps']} steps, tuned "
                       + " ".join(f"{x:.1f}" for x in figures[name]["tuned"]))
            keep(own.out, shared | dict(settings=settings | dict(seed=seed), figures=figures))
    names = dict.fromkeys(name for figures in found.values() for name in figures)
    rows = {name: [figures[name] for figures in found.values() if name in figures]
            for name in names}
    middle = next(iter(rows.values()))[0]["heading_labels"]
    common.say(f"\n{common.table(table(own, rows))}\n\nFine-tuned on {middle} labels per class, "
               "after a quarter, half and all of the time:", 100)
    for name, runs in rows.items():
        parts = zip(*(run["heading"] for run in runs))
        common.say(f"  {name}: {', '.join(common.mean_std(part) for part in parts)}")
    common.say(f"\nFigures: {own.out}")


if __name__ == "__main__":
    common.guarded(main, options(), "same_encoder.py")
