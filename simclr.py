"""SimCLR: learn features in which views of the same image agree and those of other images differ.

Paper    Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations",
         arXiv 2002.05709. triplet: Schroff et al. 2015 (FaceNet), arXiv 1503.03832

Idea     Make two random views of each image: crop, mirror, change the colours. For each view, find
         which of the 2 N - 1 other views in the batch shows the same image. Crop and colours are
         random, so they do not help; the content of the image does. Nothing is reconstructed. The
         choice of views is the only supervision: if it leaves a shortcut, the model learns that.

Loss     NT-Xent: L = mean over all 2 N views i of
             -log ( exp(cos(z_i, z_j) / τ) / sum_{k != i} exp(cos(z_i, z_k) / τ) ),
         where j is the other view of the same image (the positive), k any view but i, and τ the
         temperature. It is a cross-entropy with 2 N - 1 classes; a uniform guess costs ln(2 N - 1).
         --loss triplet (older): mean of max(0, |z_i - z_j|^2 - |z_i - z_k|^2 + margin), where k is
         any view of another image (a negative) and z lies on the unit sphere.

Flow     images (N, 3, S, S) in [0, 1], each twice
         t(x)  augment  crop, mirror, jitter, greyscale      -> views (2 N, 3, S, S)
         f(x)  encode   ResNet                               -> h (2 N, C), the features
         g(h)  project  two layers, discarded after training -> z1, z2 (N, dim) each
         L(z)  compare  each view with all others            -> loss ()

Data     drawn images of 32 x 32 pixels: one of ten shapes, in one of eight colours, anywhere. The
         views change the colour, so the features should hold less of it than raw pixels do. (A
         linear probe is a linear classifier on frozen features.)

Run      python simclr.py --temperature 0.2
Expect   a linear probe of h finds the shape, from 20 labels per class, in 63.7 ± 2.8 % (raw pixels
         12.4 ± 0.0 %, chance 10 %), and the colour, from all labels, in 37.5 ± 10.8 % (raw pixels
         99.7 ± 0.0 %, chance 12.5 %) (3 seeds; 91 s of training on 1 thread, beside other jobs;
         Intel(R) Xeon(R) Processor, 2 cores, Python 3.11.7, torch 2.13.0+cpu)
Differs  A ResNet-18 (on a CPU ResNet-10) instead of ResNet-50, and AdamW instead of LARS. Only the
         first layer of g has a BatchNorm. A crop wider than the image is cut, not sampled again.
         The triplet loss averages over all triplets; FaceNet selects semi-hard ones. Views and
         temperature are chosen to learn shapes and not colours; the paper's for CIFAR-10 are
         --crop-scale 0.08 --jitter 0.5 --hue 0.1 --temperature 0.5.

Try      --jitter 0 --hue 0: which probe gains, and which loses? (A fifth of the views stays grey.)
         --temperature 0.05, 0.2, 1: which loss is nearest to a uniform guess, and which gives the
         best features?
         --loss triplet --margin 0.1, 1: which gradient is left once all margins are met?
"""
import copy
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
    """Settings of simclr.py for a GPU; `cpu` has smaller ones for two CPU cores. The comments
    are the help texts of the flags, and the ranges in them are checked."""
    steps: int = 2000               # training steps, 0 or more
    batch: int = 512                # images per step, two views of each, 2 or more
    lr: float = 4e-3                # peak learning rate
    warmup: float = 0.25            # fraction of steps in which the learning rate rises, in [0, 1]
    weight_decay: float = 0.05      # weight decay, on matrices only
    clip: float = math.inf          # maximum gradient norm, in (0, inf]; inf: none (1 is worse)
    loss: Literal["ntxent", "triplet"] = "ntxent"    # all negatives at once, or triplets
    temperature: float = 0.2        # divides the similarities, in (0, inf) (for CIFAR-10: 0.5)
    margin: float = 0.5             # triplet: how much farther away negatives should be
    crop_scale: float = 0.5         # minimum area of a crop as a fraction, in (0, 1] (paper: 0.08)
    jitter: float = 1.0             # strength of the jitter in brightness, contrast, saturation
    hue: float = 0.5                # maximum change of the hue, in [0, 0.5]; 1 is a full circle
    blur: bool = False              # blur half of the views (SimCLR, app. A; not for CIFAR-10)
    weights: str = ""               # .pth of torchvision's ResNet-18 (photos: --image-size 128)
    skip_broken: bool = False       # skip the pictures of a folder that cannot be read
    image_size: int = 32            # side in pixels; pictures of a folder are cropped to squares
    depth: Literal[10, 18] = 18     # layers of the ResNet
    width: int = 64                 # channels of the first stage, 8 or more; doubled in each next
    dim: int = 128                  # dimensions of z, where views are compared (SimCLR, sec. 2.3)
    labels: tuple[int, ...] = (1, 5, 20, 0)   # labelled images per class, 0 or more (0: all)

    cpu = dict(steps=800, batch=64, depth=10, width=16)
    published = dict(steps=0, batch=64, lr=1e-4, labels=(1, 5, 20))


# ------------------------------------------------------------------------------------- the model
# N images, B = 2 N views, C channels, S side of an image in pixels.


class SimCLR(nn.Module):
    """An encoder f and a projection head g (SimCLR, fig. 2): views (B, 3, S, S) -> z (B, dim)."""

    def __init__(self, depth, width, dim, stem=3):
        super().__init__()
        self.encoder = ResNet(depth, width, stem)
        C = self.encoder.dim
        self.project = nn.Sequential(nn.Linear(C, C, bias=False), nn.BatchNorm1d(C), nn.ReLU(),
                                     nn.Linear(C, dim))

    def forward(self, x):
        h = self.encoder(x)                                     # (B, C), the features
        # z drops what varies among views; h retains more of it (SimCLR, sec. 4.2).
        return self.project(h)


class ResNet(nn.Module):
    """ResNet-18 (He et al. 2015, arXiv 1512.03385), or ResNet-10 with one block per stage instead
    of two: (B, 3, S, S) -> (B, 8 width).

    stem: kernel size of the first convolution. For small images it is 3, without max-pooling
    (SimCLR, B.9); stem=7 and classes=1000 give torchvision's resnet18 with the same names of the
    parameters. With a width below 8, PyTorch 2.13 computes wrong gradients on some CPUs.
    """

    def __init__(self, depth=18, width=64, stem=3, classes=0):
        super().__init__()
        if depth not in (10, 18):
            raise ValueError(f"a ResNet of basic blocks has 10 or 18 layers here, not {depth}")
        self.dim, n = 8 * width, (depth - 2) // 8      # four stages of n blocks of two layers each
        self.conv1 = nn.Conv2d(3, width, kernel_size=stem, stride=2 if stem > 3 else 1,
                               padding=stem // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1) if stem > 3 else nn.Identity()

        def stage(inputs, outputs, stride):
            blocks = [BasicBlock(inputs, outputs, stride)]
            blocks += [BasicBlock(outputs, outputs, 1) for _ in range(n - 1)]
            return nn.Sequential(*blocks)

        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.layer4 = stage(4 * width, 8 * width, 2)
        self.fc = nn.Linear(self.dim, classes) if classes else nn.Identity()
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.pool(F.relu(self.bn1(self.conv1(x))))           # (B, width, S, S) with stem 3
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))    # (B, 8 width, S / 8, S / 8)
        return self.fc(x.mean((2, 3)))                               # (B, 8 width)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: (B, inputs, s, s) -> (B, outputs, s / stride, s /
    stride)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                                            nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


# ------------------------------------------------------------------------------------ the method


def ntxent(z1, z2, temperature=.5):
    """L(z). NT-Xent loss (SimCLR, eq. 1) of two views z1, z2 (N, dim) of the same images: ()."""
    N = len(z1)
    sim = similarity(z1, z2, temperature).fill_diagonal_(-math.inf)      # i itself is no candidate
    i = torch.arange(N, device=sim.device)
    return F.cross_entropy(sim, torch.cat([i + N, i]))                   # each row's other view


def triplet(z1, z2, margin=.5, square=True):
    """L(z). Triplet loss of z1 and z2 (N, dim), as in ntxent: (). The mean of max(0, d(i, positive)
    - d(i, negative) + margin) over all views i and all negatives, the views of other images.

    d is the SQUARED distance on the unit sphere, as in FaceNet (sec. 3.1); with square=False it is
    the distance itself, as in torch's triplet_margin_loss.
    """
    N = len(z1)
    d = 2 - 2 * similarity(z1, z2)                                       # (2 N, 2 N)
    d = d if square else d.clamp(min=1e-12).sqrt()
    positive = d.diagonal(N).repeat(2)[:, None]          # d(i, i + N), and d(i + N, i) is the same
    image = torch.arange(N, device=d.device).repeat(2)   # which image each view shows
    negative = image[:, None] != image                                   # (2 N, 2 N)
    return F.relu(positive - d + margin)[negative].mean()


def similarity(z1, z2, temperature=1.):
    """Similarity matrix (2 N, 2 N): the cosine of each pair of the 2 N rows of z1 and z2 (N, dim),
    divided by the temperature. Raises ValueError for other shapes, or if N is below 2 (without
    negatives).

    Computed in float32 (TF32 on GPUs that have it) or better: bfloat16's 8 bits are not enough.
    """
    if z1.shape != z2.shape or z1.ndim != 2 or len(z1) < 2:
        raise ValueError("z1 and z2 should have one row for each of 2 or more images, and are "
                         f"{tuple(z1.shape)} and {tuple(z2.shape)}")
    z = torch.cat([z1, z2])
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        z = z / temperature ** .5                # in both factors: z @ z.T is cosines / temperature
        return z @ z.T


def augment(x, crop_scale=.08, jitter_strength=1., hue=.2, blurred=False):
    """t(x). A random view of each image (SimCLR, app. A): (B, 3, S, S) in [0, 1] -> same shape.

    crop_scale: minimum area of a crop as a fraction (a crop wider than the image is cut);
    jitter_strength: of brightness, contrast and saturation; hue: its maximum change, where 1 is a
    full circle; blurred: blur half of the views. The defaults, except for the blur, are the paper's
    for ImageNet. Every image gets its own random numbers. To add a transform, add a line. Values
    outside [0, 1] are clipped. Raises ValueError for images of another shape or type.
    """
    if x.shape[1:] != (3, x.shape[-1], x.shape[-1]) or x.dtype != torch.float32:
        raise ValueError("augment takes images (B, 3, S, S) of float32 in [0, 1], not "
                         f"{tuple(x.shape)} of {x.dtype}")
    # Each image has its own random numbers in [0, 1): (B,) each.
    (area, ratio, left, top, mirrored, brightness, contrast, saturation, turn, jittered, greyed,
     blurs) = torch.rand(12, len(x), device=x.device)
    between = lambda u, low, high: low + (high - low) * u
    area = between(area, crop_scale, 1)
    ratio = (between(ratio, -1, 1) * math.log(4 / 3)).exp()          # 3 / 4 to 4 / 3
    size = torch.stack([area * ratio, area / ratio], 1).sqrt().clamp(max=1)          # (B, 2)
    corner = (1 - size) * torch.stack([left, top], 1)                # the box is inside the image
    x = crop(x, size / 2 + corner, size, mirrored < .5)

    s = .8 * jitter_strength
    factors = [between(u, max(0, 1 - s), 1 + s) for u in (brightness, contrast, saturation)]
    factors = torch.stack([*factors, between(turn, -hue, hue)], 1)                   # (B, 4)
    factors[jittered >= .8] = torch.tensor([1., 1., 1., 0.], device=x.device)        # no change
    x = jitter(x, factors, torch.rand(len(x), 4, device=x.device).argsort(1))

    x = torch.where((greyed < .2)[:, None, None, None], rgb_to_grayscale(x), x)
    if blurred:
        sigma, half = between(torch.rand(len(x), device=x.device), .1, 2.), blurs < .5
        x[half] = blur(x[half], sigma[half])
    return x


# The transforms. x is (B, 3, S, S) in [0, 1]; each image has its own parameters.


def crop(x, centre, size, mirror):
    """Crops a box from each image, scales it to S x S and mirrors it if asked, in one resampling.

    centre, size (B, 2): x and y as fractions of the side; mirror (B,) bool. Bilinear, as in
    torchvision's RandomResizedCrop for tensors, except that the box may begin between pixels and
    that pixels just outside contribute at its edges.
    """
    S = x.shape[-1]
    at = (torch.arange(S, device=x.device) + .5) / S - .5            # pixel centres, within +- 1/2
    width = torch.where(mirror, -size[:, 0], size[:, 0])             # negative: mirrored
    across = centre[:, :1] + width[:, None] * at                     # (B, S)
    down = centre[:, 1:] + size[:, 1:] * at                          # (B, S)
    grid = torch.stack([across[:, None].expand(-1, S, -1), down[:, :, None].expand(-1, -1, S)], 3)
    return F.grid_sample(x, 2 * grid - 1, padding_mode="border", align_corners=False)


def jitter(x, factors, order):
    """Changes brightness (0), contrast (1), saturation (2) and hue (3), in each image's own order.

    factors (B, 4): the changes; 1, 1, 1, 0 changes nothing. order (B, 4): permutations of 0 to 3.
    """
    x = x.clone()
    for kinds in order.T:                                            # (B,): the next of each image
        for kind in range(4):
            i = (kinds == kind).nonzero()[:, 0]
            x[i] = adjust(x[i], kind, factors[i, kind])
    return x


def adjust(x, kind, factor):
    """One kind of jitter. factor (B,) multiplies each pixel's difference from black (0), from the
    mean grey of the image (1) or from its own grey (2); for kind 3 it is added to the hue."""
    if kind == 3:
        return adjust_hue(x, factor)
    grey = rgb_to_grayscale(x)                                       # (B, 1, S, S)
    origin = {0: torch.zeros_like(grey), 1: grey.mean((2, 3), keepdim=True), 2: grey}[kind]
    return torch.lerp(origin, x, factor[:, None, None, None]).clamp_(0, 1)


def adjust_hue(x, change):
    """Adds change (B,) to the hue of each image, where 1 is a full circle. The value and saturation
    (HSV) stay the same."""
    r, g, b = x.unbind(1)                                            # each (B, S, S)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    divisor = chroma.clamp(min=1e-6)
    hue = torch.where(value == r, (g - b) / divisor,         # in sixths of the circle
                      torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor))
    hue = hue + 6 * change[:, None, None]
    # HSV to RGB: with k = (hue + n) mod 6, a channel is value - chroma max(0, min(k, 4 - k, 1)).
    channel = lambda k: value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.stack([channel((hue + n) % 6) for n in (5, 3, 1)], 1)      # n: red, green, blue


def rgb_to_grayscale(x):
    """Luminance with the weights of ITU-R BT.601: (B, 3, S, S) -> (B, 1, S, S)."""
    return .299 * x[:, :1] + .587 * x[:, 1:2] + .114 * x[:, 2:]


def blur(x, sigma):
    """Gaussian blur with sigma (B,) in pixels; kernel size: a tenth of S (SimCLR, app. A)."""
    S = x.shape[-1]
    r = min(S - 1, max(1, S // 20))                                  # 0 if S is 1
    at = torch.arange(-r, r + 1, device=x.device)
    weight = (-.5 * (at / sigma[:, None]).square()).softmax(1)       # (B, 2 r + 1), sum 1
    for dim in 2, 3:                                                 # vertically, then horizontally
        pad = F.pad(x, (0, 0, r, r) if dim == 2 else (r, r, 0, 0), mode="reflect")
        x = sum(weight[:, i, None, None, None] * pad.narrow(dim, i, S) for i in range(2 * r + 1))
    return x


# --------------------------------------------------------------------- building and loading models


def build(args, image_size):
    """Builds the SimCLR of these settings, on the device. It takes images of any size."""
    stem = 7 if args.weights else 3                          # torchvision's, or for small images
    model = SimCLR(args.depth, args.width, args.dim, stem).to(args.device)
    return model.to(memory_format=torch.channels_last)       # for faster convolutions


def load_published(args):
    """Loads the encoder of --weights (torchvision's names) without its classifier, and sets its
    sizes in args. The projection head is random."""
    weights, _ = common.read_weights(args.weights, common.HUB["ResNet"])
    state = {name: x for name, x in weights.items() if "fc." not in name}
    for prefix in "module.", "encoder.", "backbone.":
        state = {name.removeprefix(prefix): x for name, x in state.items()}
    common.require("conv1.weight" in state, f"--weights {args.weights} is no ResNet")
    args.width, _, stem, _ = state["conv1.weight"].shape
    args.depth = 18 if "layer1.1.conv1.weight" in state else 10
    model = SimCLR(args.depth, args.width, args.dim, stem)
    common.fill_in(model.encoder, state, args.weights)
    return model.to(args.device, memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def neighbours(args, model, images, k):
    """Writes neighbours.png: test images with their k nearest neighbours by h and by raw pixels,
    among the first 2,000. Returns for both the % of neighbours that are of the image's class."""
    x, groups, same = images.test[:2000], [], []
    for f in model.encoder, nn.Flatten():
        h = F.normalize(common.encode(args, f, images, x), dim=1)                   # (n, C)
        nearest = (h @ h.T).fill_diagonal_(-2).topk(k, 1).indices         # (n, k), without itself
        if images.names:
            labels = images.class_labels()[1][:2000]
            same.append(100 * (labels[nearest] == labels[:, None]).float().mean().item())
        groups.append(torch.cat([torch.arange(len(x), device=x.device)[:, None], nearest], 1)[:12])
    sheet = x[torch.stack(groups, 1).flatten()].float() / 255                # rows of 2 (1 + k)
    common.save_png(f"{args.out}/neighbours.png", sheet, 2 * (1 + k), group=1 + k, zoom=2)
    return same


# ------------------------------------------------------------------------------------------ main


@common.setup
def main(args):
    common.require(args.accumulate == 1, "--accumulate is not for SimCLR: its loss compares all "
                   "images of a batch", common.UsageError)
    images = common.load_images(args)
    k = min(5, len(images.test) - 1)
    common.require(k > 0, "one test image has no neighbours: 2 or more are needed")
    images.check(args.labels)                                                # fail early if too few
    if args.weights:
        images.imagenet()
        model, untrained = load_published(args), build(args, images.size)
    else:
        model = build(args, images.size)
        untrained = copy.deepcopy(model)
    optimizer = common.adamw(model.parameters(), args.lr, args.weight_decay)
    uniform = math.log(2 * args.batch - 1) if args.loss == "ntxent" else None
    run = common.Run(args, model, optimizer, uniform=uniform, about=images.about())
    for step in run:                       # sets the seed and the learning rate of this step
        x = run.part(run.batch(images.train))                   # this process's part
        x = x.repeat(2, 1, 1, 1) / 255                          # rows i and i + N are equal
        views = augment(x, args.crop_scale, args.jitter, args.hue, args.blur)           # t(x)
        with run.autocast():
            z1, z2 = model(images.normalize(views)).chunk(2)                            # g(f(x))
            z1, z2 = run.gather(z1), run.gather(z2)      # of all processes of torchrun
            if args.loss == "ntxent":
                loss = ntxent(z1, z2, args.temperature)                                 # L(z)
            else:
                loss = triplet(z1, z2, args.margin)
        loss.backward()
        run.reduce(loss)                   # averages over the processes of torchrun
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)

    model.eval()
    same = neighbours(args, model, images, k)
    name = "SimCLR" if run.step or not args.weights else "published ResNet"
    rows = common.linear_probes(args, images, {
        "raw pixels": nn.Flatten(), "untrained ResNet": untrained.eval().encoder,
        name: model.encoder})
    common.report(run, common.best_probe(args, images, rows, name),
                  dict(neighbours=same, labels=args.labels, accuracy=rows))
    common.say("\n" + common.label_table(args, images, rows))
    if rows:
        common.say(f"\nOf the {k} nearest neighbours of a test image, {same[0]:.0f} % are of its "
                   f"class by the features and {same[1]:.0f} % by raw pixels.")
    common.say(f"Picture: {args.out}/neighbours.png (image | nearest by features || "
               "image | nearest by pixels)")
    return model


if __name__ == "__main__":
    common.cli(main, Args)
