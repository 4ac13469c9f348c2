"""SimCLR: two views of an image belong together, and apart from the views of all other images.

Paper    Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations",
         arXiv 2002.05709. triplet: Schroff et al. 2015 (FaceNet), arXiv 1503.03832

Idea     Nothing is rebuilt, so features need only what tells images apart. What should NOT help is
         said by the views: crops, mirrors and colours differ at random between two views of one
         image, so features that find the partner among 2 N - 1 candidates have to be about
         something else: what the image is of. The choice of views is the only supervision there is,
         and a shortcut that survives it is taken.

Loss     L = mean over all 2 N views i of
             -log ( exp(cos(z_i, z_j) / t) / sum_{k != i} exp(cos(z_i, z_k) / t) ),
         j the partner of i, k any view but i: a cross-entropy with 2 N - 1 classes, at chance
         ln(2 N - 1).
         --loss triplet, which came first: mean of max(0, |z_i - z_j|^2 - |z_i - z_k|^2 + margin),
         k any view of another image, z on the unit sphere.

Flow     images (N, 3, S, S) in [0, 1], each twice
         t(x)  augment  crop and mirror, jitter colours, drop colours -> views (2 N, 3, S, S),
                        which are then brought to mean 0 and variance 1
         f(x)  encode   ResNet                                        -> h (2 N, C), what is kept
         g(h)  project  two layers, thrown away after training        -> z (2 N, dim)
         L(z)  compare  every view with every other                   -> loss ()

Run      python simclr.py --temperature 0.2
Expect   a linear probe on h reads the shape, from 20 labels a class, at 64.8 ± 2.7 % (raw pixels
         11.7 ± 0.0 %, chance 10 %), and the colour, from all labels, at 37.6 ± 4.3 % (raw
         pixels 99.7 ± 0.0 %, chance 12.5 %) (3 seeds; 63 s of training on 2 threads; AMD
         EPYC, 2 cores, torch 2.13.0+cpu)
Differs  A ResNet-18, on a CPU -10, instead of -50; AdamW instead of LARS; BatchNorm after the first
         layer of g alone; a crop that would be wider than the image is cut, not drawn again; the
         triplet loss averages all triplets, where FaceNet picks hard ones. Views and temperature
         suit the shapes; the paper's for CIFAR-10 are --min-scale 0.08 --strength 0.5 --hue 0.1
         --temperature 0.5.

Try      --strength 0 --hue 0: what does it know now, and what does it no longer know? (A fifth of
         the views still lose their colours.)
         --temperature 0.05, 0.2, 1: which loss is nearest to chance, and which features are best?
         --loss triplet --margin 0.1, 1: when all margins are kept, what gradient is left?
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
    """Settings of simclr.py: for a GPU, and under `cpu` smaller ones for two cores."""
    steps: int = 2000               # training steps
    batch: int = 512                # images a step, two views of each
    lr: float = 4e-3                # peak learning rate of AdamW
    warmup: float = 0.25            # share of steps in which the rate rises (some seeds need this)
    weight_decay: float = 0.05      # AdamW's decay, on matrices only
    clip: float = 0.0               # longest gradient; 0: never cut (at 1 it learned less)
    loss: Literal["ntxent", "triplet"] = "ntxent"   # pick the partner among all, or triplets
    temperature: float = 0.2        # divides the cosines (SimCLR's code: 0.5 for CIFAR-10)
    margin: float = 0.5             # how much further away than the partner the others have to be
    min_scale: float = 0.5          # least share of the image in a crop (SimCLR, app. A: 0.08)
    strength: float = 1.0           # of jitter in brightness, contrast, saturation; times 0.8
    hue: float = 0.5                # largest turn of the hue, 1 a circle (app. A: 0.2 x strength)
    blur: bool = False              # blur half of the views (SimCLR, app. A; not for CIFAR-10)
    image_size: int = 32            # side in pixels of drawn shapes, and of a folder's pictures
    depth: Literal[10, 18] = 18     # layers of the ResNet
    width: int = 64                 # channels of its first stage, doubled in each of the next three
    dim: int = 128                  # channels of z, where views are compared (SimCLR, sec. 2.3)
    labels: tuple[int, ...] = (1, 5, 20, 0)   # labelled images a class for the table, 0: all
    draws: int = 3                  # repeats of these with other images, for mean and spread
    supervised: bool = True         # train the same encoder on all labels, too, for as many steps

    cpu = dict(steps=800, batch=64, depth=10, width=16)

    def check(self):
        common.require(self.batch > 1, f"--batch must be 2 or more, not {self.batch}: an image has "
                       "to be told apart from others")
        super().check()
        self.at_least(1, "dim", "image_size", "draws")
        self.at_least(0, "margin", "strength", "labels")
        need = common.require
        need(0 < self.temperature < math.inf, "--temperature must be above 0, not "
             f"{self.temperature}: the cosines are divided by it")
        need(0 < self.min_scale <= 1, "--min-scale must be above 0 and 1 at most, not "
             f"{self.min_scale}")
        need(0 <= self.hue <= .5, f"--hue must be from 0 to 0.5, half a circle, not {self.hue}")
        # PyTorch 2.13 on AVX2: those of the shortcut's convolution (1 x 1, stride 2, channels_last)
        need(self.width >= 8, f"--width must be 8 or more, not {self.width}: below, some CPUs get "
             "wrong gradients")


# ------------------------------------------------------------------------------------- the model
# B batch, N images of which views are made, C channels, S side in pixels.


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: (B, I, S, S) -> (B, O, S / stride, S / stride)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                                            nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet-18 (He et al. 2015, arXiv 1512.03385), or -10, with one block a stage instead of two:
    (B, 3, S, S) -> (B, 8 width).

    For small images the first convolution is 3 x 3 and nothing is pooled (SimCLR, B.9). stem=7
    and classes=1000 give torchvision's resnet18, tensor for tensor and by the same names.
    """

    def __init__(self, depth=18, width=64, stem=3, classes=0):
        super().__init__()
        self.dim, n = 8 * width, (depth - 2) // 8                # n blocks of two layers in a stage
        self.conv1 = nn.Conv2d(3, width, stem, 2 if stem > 3 else 1, stem // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1) if stem > 3 else nn.Identity()

        def stage(inputs, outputs, stride):
            blocks = [BasicBlock(inputs, outputs, stride)]
            return nn.Sequential(*blocks, *(BasicBlock(outputs, outputs, 1) for _ in range(n - 1)))
        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.layer4 = stage(4 * width, 8 * width, 2)
        self.fc = nn.Linear(self.dim, classes) if classes else nn.Identity()
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.pool(F.relu(self.bn1(self.conv1(x))))           # (B, width, S, S)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))    # (B, 8 width, S / 8, S / 8)
        return self.fc(x.mean((2, 3)))


class SimCLR(nn.Module):
    """f(x), the encoder, and g(h), the projection head (SimCLR, fig. 2): views (B, 3, S, S) ->
    z (B, dim)."""

    def __init__(self, depth, width, dim):
        super().__init__()
        self.encoder = ResNet(depth, width)
        C = self.encoder.dim
        self.project = nn.Sequential(nn.Linear(C, C, bias=False), nn.BatchNorm1d(C), nn.ReLU(),
                                     nn.Linear(C, dim))

    def forward(self, x):
        h = self.encoder(x)              # probes read h: z drops still more of what views differ in
        return self.project(h)


# ------------------------------------------------------------------------------------ the method
# The transforms are batched, with numbers of each image's own; x is (B, 3, S, S) in [0, 1].


def crop(x, centre, size, mirror):
    """A box of each image, scaled to S x S and mirrored where asked, in one resampling.

    centre, size (B, 2): x and y in shares of the side; mirror (B,) bool. Bilinear, as torchvision's
    RandomResizedCrop on tensors, except that the box need not fall on whole pixels, and that pixels
    just outside of it count at its rim.
    """
    S = x.shape[-1]
    at = (torch.arange(S, device=x.device) + .5) / S - .5            # the pixels' places in the box
    width = torch.where(mirror, -size[:, 0], size[:, 0])
    across = centre[:, :1] + width[:, None] * at                     # (B, S)
    down = centre[:, 1:] + size[:, 1:] * at                          # (B, S)
    grid = torch.stack([across[:, None].expand(-1, S, -1), down[:, :, None].expand(-1, -1, S)], 3)
    return F.grid_sample(x, 2 * grid - 1, padding_mode="border", align_corners=False)


def grey(x):
    """Luminance, by the weights of ITU-R BT.601: (B, 3, S, S) -> (B, 1, S, S)."""
    return .299 * x[:, :1] + .587 * x[:, 1:2] + .114 * x[:, 2:]


def turn_hue(x, turn):
    """Turns each image's hues by turn (B,) circles; HSV's value and saturation stay."""
    r, g, b = x.unbind(1)                                            # each (B, S, S)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    pure = chroma.clamp(min=1e-6)
    sixth = torch.where(value == r, (g - b) / pure,
                        torch.where(value == g, 2 + (b - r) / pure, 4 + (r - g) / pure))
    sixth = sixth + 6 * turn[:, None, None]                          # of the circle, from red
    fade = lambda k: value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)     # HSV back to RGB
    return torch.stack([fade((sixth + n) % 6) for n in (5, 3, 1)], 1)


def jitter(x, factors, order):
    """Brightness (0), contrast (1), saturation (2) and hue (3), in an order of each image's own.

    factors (B, 4): by how much; 1, 1, 1, 0 changes nothing. order (B, 4): each row a permutation.
    """
    for which in order.T:                                            # (B,): the next to be done
        i = (which == 3).nonzero()[:, 0]
        turned = turn_hue(x[i], factors[i, 3])
        kind, light = which.view(-1, 1, 1, 1), grey(x)
        # the first three are one formula: away from black, from the mean grey, from the pixel's own
        # grey; an image whose turn it is for the hue gets nonsense, and the last line replaces it
        origin = torch.where(kind == 1, light.mean((2, 3), keepdim=True), light * (kind == 2))
        x = torch.lerp(origin, x, factors.gather(1, which[:, None])[..., None, None]).clamp_(0, 1)
        x[i] = turned
    return x


def blur(x, sigma):
    """Gaussian blur by sigma (B,) pixels; the kernel spans a tenth of the side (SimCLR, app. A)."""
    S = x.shape[-1]
    r = min(S - 1, max(1, S // 20))                                  # a single pixel stays
    at = torch.arange(-r, r + 1, device=x.device)
    weight = (-.5 * (at / sigma[:, None]).square()).softmax(1)       # (B, 2 r + 1), of sum 1
    for dim in 2, 3:                                                 # down the columns, then across
        pad = F.pad(x, (0, 0, r, r) if dim == 2 else (r, r, 0, 0), mode="reflect")
        x = sum(weight[:, i, None, None, None] * pad.narrow(dim, i, S) for i in range(2 * r + 1))
    return x


def augment(x, min_scale=.08, strength=1., hue=.2, blurred=False):
    """t(x), a random view of each image: x (B, 3, S, S) in [0, 1] -> the same (SimCLR, app. A).

    min_scale: least share of the image in a crop (before one that would be wider than the image is
    cut); strength: of the jitter in brightness, contrast and saturation; hue: largest turn of it,
    in circles; blurred: half of the views, too. Half are mirrored. The defaults of crop and
    jitter are the paper's for ImageNet. A view of another kind is one more line here, with random
    numbers for each image.
    """
    B, u = len(x), torch.rand(12, len(x), device=x.device)
    between = lambda share, low, high: low + (high - low) * share
    area, ratio = between(u[0], min_scale, 1), (between(u[1], -1, 1) * math.log(4 / 3)).exp()
    size = torch.stack([area * ratio, area / ratio], 1).sqrt().clamp(max=1)
    x = crop(x, size / 2 + (1 - size) * u[2:4].T, size, u[4] < .5)

    s = .8 * strength
    factors = torch.cat([between(u[5:8], max(0, 1 - s), 1 + s), between(u[8:9], -hue, hue)]).T
    still = torch.tensor([1., 1., 1., 0.], device=x.device)
    factors = torch.where(u[9, :, None] < .8, factors, still)        # a fifth are not jittered
    x = jitter(x, factors, torch.rand(B, 4, device=x.device).argsort(1))

    drop = u[10] < .2                                                # a fifth lose their colours
    x = torch.where(drop.view(-1, 1, 1, 1), grey(x), x)
    if blurred:
        half = u[11] < .5
        x[half] = blur(x[half], between(torch.rand(B, device=x.device), .1, 2.)[half])
    return x


def cosines(z, temperature=1.):
    """Of all pairs of rows, over the temperature: (2 N, dim) -> (2 N, 2 N). In float32 (TF32 on a
    GPU that has it) or better, for bfloat16's 8 bits are too few."""
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        z = z / temperature ** .5                # 2 N dim divisions instead of (2 N)^2
        return z @ z.T


def ntxent(z, temperature):
    """L(z), NT-Xent (SimCLR, eq. 1): z (2 N, dim), views of image i at i and i + N -> mean ()."""
    sim = cosines(z, temperature).fill_diagonal_(-math.inf)          # nobody is its own partner
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(sim, partner)


def triplet(z, margin, square=True):
    """L(z), mean of max(0, d(i, partner) - d(i, other) + margin) over all views i and all others.

    z (2 N, dim) as for ntxent, compared on the unit sphere. d is the SQUARED distance there, as in
    FaceNet (sec. 3.1); square=False takes the distance itself, as torch's triplet_margin_loss.
    """
    N = len(z) // 2
    d = 2 - 2 * cosines(z)                                           # (2 N, 2 N)
    d = d if square else d.clamp(min=1e-12).sqrt()
    partner = d.diagonal(N).repeat(2)[:, None]                       # d is symmetric
    others = ~torch.eye(N, dtype=torch.bool, device=z.device).repeat(2, 2)
    return F.relu(partner - d + margin)[others].mean()


# ------------------------------------------------------------------------------------------ look


def build(args, size):
    """The SimCLR of these settings, on the device; any size of image will do."""
    model = SimCLR(args.depth, args.width, args.dim).to(args.device)
    return model.to(memory_format=torch.channels_last)       # in which convolutions are faster


@torch.no_grad()
def look(args, model, images):
    """Writes neighbours.png: test images, and the five that are nearest to each under h, beside the
    five nearest in raw pixels, among the first 2,000. Returns for either the share, in %, of
    neighbours of one's own class."""
    x, labels = images.test[:2000], images.test_labels[next(iter(images.names))][:2000]
    groups, same = [], []
    for f in model.encoder, nn.Flatten():
        h = F.normalize(common.encode(f, images, x), dim=1)                                 # (n, C)
        near = (h @ h.T).fill_diagonal_(-2).topk(min(5, len(x) - 1), 1).indices             # (n, 5)
        same.append(100 * (labels[near] == labels[:, None]).float().mean().item())
        groups.append(torch.cat([torch.arange(len(x), device=x.device)[:, None], near], 1)[:12])
    sheet = x[torch.stack(groups, 1).flatten()].float() / 255                     # rows of 2 x 6
    wide = groups[0].shape[1]
    common.save_png(f"{args.out}/neighbours.png", sheet, 2 * wide, group=wide, zoom=2)
    return same


def tell(args, run, images, same, rows):
    """The end of the run, in words and in result.json."""
    what = next(iter(images.names))
    print(f"\n{common.comparison(images, args.labels, rows)}\n")
    knows = rows["SimCLR"]
    if len(images.names) > 1 and 0 in args.labels:
        knows = knows | {what: [knows[what][args.labels.index(0)]]}
        common.say(f"From h, a linear probe with all labels reads: {common.known(images, knows)}.")
    common.say(f"Of the five nearest neighbours of a test image {same[0]:.0f} % are of its {what} "
               f"under h, {same[1]:.0f} % in raw pixels.")
    common.say(f"Picture: {args.out}/neighbours.png (image | nearest under h || image | nearest in "
               "pixels)")
    k = max(args.labels)
    score = rows["SimCLR"][what][args.labels.index(k)]
    summary = f"{what} at {k or 'all'} label{'s' * (k != 1)}: {common.spread(score)} %"
    common.report(run, summary, dict(neighbours=same, labels=args.labels, accuracy=rows))


# ------------------------------------------------------------------------------------------ main


def main(args):
    images = common.load_images(args.data, args.data_dir, args.image_size, args.device)
    common.few(next(iter(images.train_labels.values())), max(args.labels))    # too many --labels?
    common.require(len(images.test) > 1, "one test image has no neighbours: 2 or more are needed")
    model, untrained = build(args, images.size), build(args, images.size).eval()
    N = args.batch
    chance = math.log(2 * N - 1) if args.loss == "ntxent" else args.margin
    run = common.Run(args, model, chance=chance)
    for step in run:
        x = run.batch(images.train).repeat(2, 1, 1, 1) / 255                  # each image twice
        views = images.normalize(augment(x, args.min_scale, args.strength, args.hue, args.blur))
        z = model(views)
        loss = ntxent(z, args.temperature) if args.loss == "ntxent" else triplet(z, args.margin)
        run.update(loss)

    model.eval()
    same = look(args, model, images)
    probes = lambda f, names=images.names: common.few_shot(args, f, images, args.labels, names)
    rows = {"raw pixels": probes(nn.Flatten(), ["colour"]),
            "untrained ResNet": probes(untrained.encoder), "SimCLR": probes(model.encoder)}
    if args.supervised:
        f = build(args, images.size).encoder
        rows["supervised"] = probes(common.supervised(args, f, images, run.step))
    tell(args, run, images, same, rows)


if __name__ == "__main__":
    common.start(main, Args)
