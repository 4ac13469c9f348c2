"""Autoencoder: squeeze an image through a bottleneck, rebuild it, and ask what the code knows.

Paper    Hinton & Salakhutdinov 2006, "Reducing the Dimensionality of Data with Neural Networks".
         noise: Kingma & Welling 2013, arXiv 1312.6114. sparse: Makhzani & Frey 2013, arXiv
         1312.5663. --corrupt: Vincent et al. 2008, "Extracting and Composing Robust Features"

Idea     Whoever can rebuild an image from a short code has kept what matters in it, one would
         think. If the code may be as large as the image, copying is enough, so something has to be
         in short supply: dimensions (narrow), precision (noise), active dimensions (sparse), or the
         decoder's strength (weak); noise and weak have few dimensions, too. But what costs most
         squared error is kept first, the colours above all, not what the image is OF: the code is
         more like a hash of x than a conceptual summary.

Loss     L = 1 / P || x - decode(squeeze(encode(x~))) ||^2
             [+ price / P KL(q(code | x~) || N(0, 1))]
         x~ is x or, with --corrupt, x with pixels blanked; P pixel values in an image; the price
         (2 beta of a beta-VAE whose decoder has variance 1) is paid with --bottleneck noise, and
         the KL is that of noise of scale 1, whatever --noise says. Always guessing the mean costs
         about 1.

Flow     images (B, 3, S, S)
         A. mask      hide nothing, or blank some pixels      -> masked (B, 3, S, S), target = x
         B. predict   encode   three strided convolutions     -> (B, 4 width, S / 8, S / 8)
                               linear (not none, sparse)      -> code (B, code)
                      squeeze  add noise, or zero most of it  -> code (B, code)
                      decode   linear, three convolutions up  -> (B, 3, S, S)
         C. compare   squared error on every pixel

Run      python autoencoder.py --bottleneck narrow
Expect   a linear probe on the code reads the shape, from 20 labels a class, at 11.3 ± 0.2 % (raw
         pixels 11.7 ± 0.0 %, chance 10 %), and the colour, from all labels, at
         95.3 ± 0.4 % (raw pixels 99.7 ± 0.0 %, chance 12.5 %) (3 seeds; 57 s of training
         on 2 threads; AMD EPYC, 2 cores, torch 2.13.0+cpu)
Differs  Convolutions and AdamW instead of stacked restricted Boltzmann machines; top-k keeps k per
         image at test time, too; the probe reads the code's mean where noise is added.

Try      --bottleneck none, narrow, noise, sparse, weak: the error changes fourfold. And the probe,
         at 20 labels, and at all?
         --code 8, 64, 512: what is the last thing that a shrinking code still knows?
         --corrupt 0.5: half of the pixels are blanked. Does the probe gain? (Whole patches: mae.py)
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common

# -------------------------------------------------------------------------------------- settings


@dataclass
class Args(common.Args):
    """Settings of autoencoder.py: for a GPU, and under `cpu` smaller ones for two cores."""
    steps: int = 4000               # training steps
    batch: int = 256                # images a step
    lr: float = 1e-3                # peak learning rate
    weight_decay: float = 0.01      # AdamW's decay, on matrices only
    bottleneck: Literal["none", "narrow", "noise", "sparse", "weak"] = "narrow"  # what is short
    code: int = 64                  # dimensions of the code (narrow, noise, weak)
    keep: int = 64                  # sparse: those kept, of 4 x width x (side / 8)^2
    noise: float = 1.0              # with noise: its scale in the code; 1: as in a VAE
    price: float = 0.1              # with noise: the KL's weight beside the summed squared error
    corrupt: float = 0.0            # share of the pixels blanked in the input (denoising)
    image_size: int = 32            # side in pixels of drawn shapes, and of a folder's pictures
    width: int = 48                 # channels of the first convolution, doubled in each of the next
    labels: tuple[int, ...] = (1, 5, 20, 0)   # labelled images a class for the table, 0: all
    draws: int = 3                  # repeats of these with other images, for mean and spread
    supervised: bool = True         # train the same encoder on all labels, too, for as many steps

    cpu = dict(steps=1500, batch=64)

    def check(self):
        super().check()
        self.at_least(1, "code", "keep", "width", "image_size", "draws")
        self.at_least(0, "noise", "price", "labels")
        common.require(0 <= self.corrupt < 1, "--corrupt must be from 0 to below 1, not "
                       f"{self.corrupt}: some pixels have to stay visible")


# ------------------------------------------------------------------------------------- the model
# B batch, C channels, S side of the image in pixels, s = S / 8 rounded up.


class Encoder(nn.Module):
    """Image -> code: (B, 3, S, S) -> (B, code). With code 0 the last map, flat, is the code: at
    width 48, and S a multiple of 8, it has as many numbers as the image."""

    def __init__(self, size, width, code):
        super().__init__()
        conv = lambda i, o: nn.Conv2d(i, o, 3, 2, 1)                 # halves the side, rounding up
        self.conv1, self.conv2 = conv(3, width), conv(width, 2 * width)
        self.conv3 = conv(2 * width, 4 * width)
        self.length = 4 * width * math.ceil(size / 8) ** 2           # of the last map, flat
        self.head = nn.Linear(self.length, code) if code else nn.Identity()

    def forward(self, x):
        return self.head(self.features(x))

    def features(self, x):
        """All but the last layer: (B, 3, S, S) -> (B, 4 width s^2)."""
        x = F.relu(self.conv1(x))                                    # (B, width, S / 2, S / 2)
        x = F.relu(self.conv2(x))                                    # (B, 2 width, S / 4, S / 4)
        return F.relu(self.conv3(x)).flatten(1)                      # (B, 4 width s^2)


class Decoder(nn.Module):
    """Code -> image, the encoder's mirror: (B, code) -> (B, 3, S, S)."""

    def __init__(self, size, width, code):
        super().__init__()
        self.size, self.side = size, math.ceil(size / 8)
        up = lambda i, o: nn.ConvTranspose2d(i, o, 4, 2, 1)          # doubles the side
        self.head = nn.Linear(code, 4 * width * self.side ** 2) if code else nn.Identity()
        self.conv1, self.conv2 = up(4 * width, 2 * width), up(2 * width, width)
        self.conv3 = up(width, 3)

    def forward(self, code):
        x = F.relu(self.head(code)).unflatten(1, (-1, self.side, self.side))    # (B, 4 width, s, s)
        x = F.relu(self.conv2(F.relu(self.conv1(x))))                # (B, width, 4 s, 4 s)
        return self.conv3(x)[..., :self.size, :self.size]            # cut: 28 pixels come out as 32


class Autoencoder(nn.Module):
    """Image -> code -> image. Something has to be in short supply, or a copy would do; with the
    bottleneck none nothing is."""

    def __init__(self, size, width, code, bottleneck="narrow", keep=64, noise=1.):
        super().__init__()
        self.bottleneck, self.keep, self.noise = bottleneck, keep, noise
        if bottleneck in ("none", "sparse"):     # as many numbers as in the image (at width 48): a
            code = 0                             # copy fits, as it does not into 64
        self.encoder = Encoder(size, width, code)
        if bottleneck == "weak":         # a decoder that cannot unscramble: the code must be plain
            self.decoder = nn.Sequential(nn.Linear(code, 3 * size ** 2),
                                         nn.Unflatten(1, (3, size, size)))
        else:
            self.decoder = Decoder(size, width, code)
        if bottleneck == "noise":
            self.log_var = nn.Linear(self.encoder.length, code)

    def forward(self, x):
        """B. (B, 3, S, S) -> the same rebuilt, and the nats of each code (B,); 0. without noise."""
        features, nats = self.encoder.features(x), 0.
        code = self.encoder.head(features)
        if self.bottleneck == "noise":   # a code that is blurred can only tell what is worth it
            code, log_var = code.float(), self.log_var(features).float()
            nats = kl(code, log_var)
            if self.training:            # reparametrised: gradients reach both layers
                code = code + self.noise * (log_var / 2).exp() * torch.randn_like(code)
        if self.bottleneck == "sparse":  # many numbers, but each image may use only a few of them
            code = top_k(code, self.keep)
        return self.decoder(code), nats

    def code(self, x):
        """What a probe reads: the code as the decoder gets it, without noise. (B, code)."""
        code = self.encoder(x)
        return top_k(code, self.keep) if self.bottleneck == "sparse" else code


# ------------------------------------------------------------------------------------ the method


def mask(x, corrupt=0.):
    """A. Images (B, 3, S, S) -> what the model may see, and what it owes, all of x either way: two
    (B, 3, S, S). corrupt blanks that share of the pixels, to 0, which is the mean."""
    if not corrupt:
        return x, x
    return x.masked_fill(torch.rand_like(x[:, :1]) < corrupt, 0.), x


def top_k(code, k):
    """Keeps the k largest magnitudes of each row of (B, code), and zeroes the others."""
    kept = code.abs().topk(k, 1).indices
    return torch.zeros_like(code).scatter(1, kept, code.gather(1, kept))


def kl(mean, log_var):
    """KL(N(mean, exp(log_var)) || N(0, 1)) of a code's independent dimensions (Kingma & Welling,
    app. B), in nats an image: two (B, code) -> (B,)."""
    return (mean.square() + log_var.exp() - 1 - log_var).sum(1) / 2


def distance(prediction, target, nats=0., price=0.):
    """C. Mean squared error of all pixel values of (B, 3, S, S) and, for a noisy code, the price of
    its nats (B,): a number."""
    price = price * torch.as_tensor(nats).mean() / target[0].numel()
    return F.mse_loss(prediction.float(), target) + price


def interpolate(model, a, b, steps):
    """Images decoded from codes on the line from a to b, (n, 3, S, S) each: (n, steps, 3, S, S)."""
    share = torch.linspace(0, 1, steps, device=a.device)[:, None]
    codes = torch.lerp(model.code(a)[:, None], model.code(b)[:, None], share)    # (n, steps, code)
    return model.decoder(codes.flatten(0, 1)).unflatten(0, (len(a), steps))


# ------------------------------------------------------------------------------------------ look


def build(args, size):
    """The autoencoder of these settings for images of size x size pixels, on the device."""
    model = Autoencoder(size, args.width, args.code, args.bottleneck, args.keep, args.noise)
    wide = model.encoder.length
    common.require(args.bottleneck != "sparse" or args.keep <= wide,
                   f"--keep {args.keep} is more than the {wide} dimensions of the code here")
    return model.to(args.device)


@torch.no_grad()
def rebuild(args, model, images):
    """Mean squared error on all pixels of the test images, from inputs corrupted as in training,
    without noise in the code; the same pixels are blanked at each look."""
    error = 0.
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        for part in images.test.split(500):
            masked, target = mask(images.normalize(part), args.corrupt)
            error += distance(model(masked)[0], target).item() * len(part) / len(images.test)
    return error


@torch.no_grad()
def look(args, model, images):
    """Writes reconstructions.png, and interpolations.png: from one test image to the next."""
    torch.manual_seed(args.seed)
    masked, x = mask(images.normalize(images.test[:24]), args.corrupt)
    groups = [masked, model(masked)[0], x] if args.corrupt else [x, model(x)[0]]
    sheet = torch.stack(groups, 1).flatten(0, 1)
    n = len(groups)
    common.save_png(f"{args.out}/reconstructions.png", images.denormalize(sheet), 12, group=n)
    n = max(1, min(8, len(x) // 2))
    a, b = x[:n], x[-n:]
    sheet = torch.cat([a[:, None], interpolate(model, a, b, 10), b[:, None]], 1).flatten(0, 1)
    common.save_png(f"{args.out}/interpolations.png", images.denormalize(sheet), 12)


def tell(args, run, images, error, rows):
    """The end of the run, in words and in result.json."""
    what, notes, k = next(iter(images.names)), run.notes(), max(args.labels)
    print()
    if notes:
        common.say("While it trained (the error on new images, then what a linear probe reads):")
        head = ["step", "squared error", f"{what}, {f'{k} a class' if k else 'all'}", "colour, all"]
        lines = [[str(step), f"{note['error']:.3f}", *map(common.spread, note["probes"])]
                 for step, note in notes.items()]
        print(f"\n{common.table([head[:len(lines[0])], *lines])}\n")
    print(f"{common.comparison(images, args.labels, rows)}\n")
    knows = rows["autoencoder"]
    if len(images.names) > 1 and 0 in args.labels:
        knows = knows | {what: [knows[what][args.labels.index(0)]]}
        common.say(f"From the code, a linear probe with all labels reads: "
                   f"{common.known(images, knows)}.")
    common.say(f"Squared error on {len(images.test):,} new images: {error:.3f} (always guessing "
               "the mean: 1.000).")
    common.say(f"Pictures: {args.out}/reconstructions.png ({'masked | ' * (args.corrupt > 0)}"
               f"{'rebuilt | original' if args.corrupt else 'original | rebuilt'}), "
               f"{args.out}/interpolations.png")
    score = rows["autoencoder"][what][args.labels.index(k)]
    summary = (f"{args.bottleneck}: error {error:.3f}, {what} at {k or 'all'} "
               f"label{'s' * (k != 1)}: {common.spread(score)} %")
    common.report(run, summary, dict(error=error, labels=args.labels, accuracy=rows, notes=notes))


# ------------------------------------------------------------------------------------------ main


def main(args):
    images = common.load_images(args.data, args.data_dir, args.image_size, args.device)
    common.few(next(iter(images.train_labels.values())), max(args.labels))    # too many --labels?
    model, untrained = build(args, images.size), build(args, images.size).eval()
    looks = {args.steps // 4 ** i for i in range(4)}
    run = common.Run(args, model)
    for step in run:
        x = images.normalize(run.batch(images.train))
        masked, target = mask(x, args.corrupt)
        prediction, nats = model(masked)
        loss = distance(prediction, target, nats, args.price)
        run.update(loss)
        if step + 1 in looks:                        # the error falls: do the probes rise with it?
            with run.aside():
                probes = common.few_shot(args, model.code, images, [max(args.labels)], ["colour"])
                run.note(error=rebuild(args, model, images), probes=[p[0] for p in probes.values()])

    model.eval()
    error = rebuild(args, model, images)
    look(args, model, images)
    probes = lambda f, names=images.names: common.few_shot(args, f, images, args.labels, names)
    rows = {"raw pixels": probes(nn.Flatten(), ["colour"]),
            "untrained encoder": probes(untrained.code), "autoencoder": probes(model.code)}
    if args.supervised:
        f = build(args, images.size).encoder
        rows["supervised"] = probes(common.supervised(args, f, images, run.step))
    tell(args, run, images, error, rows)


if __name__ == "__main__":
    common.start(main, Args)
