"""Autoencoder: compress an image to a small latent z, and reconstruct the image from z.

Paper    Hinton & Salakhutdinov 2006, "Reducing the Dimensionality of Data with Neural Networks".
         variational: Kingma & Welling 2013, arXiv 1312.6114. sparse: Makhzani & Frey 2013, arXiv
         1312.5663. --corrupt: Vincent et al. 2008, "Extracting and Composing Robust Features ..."

Idea     One would think that z has to hold what matters in an image to reconstruct it. To prevent
         a plain copy, something is in the way: few dimensions (narrow; "undercomplete"), noise
         (variational), few nonzero dimensions (sparse) or a linear decoder (weak). Variational and
         weak have few dimensions, too. With --corrupt it is a denoising autoencoder. But z first
         keeps what lowers the squared error most, large areas and colours, not what an image shows.

Loss     L = 1 / P ( || x - decode(z) ||^2 + beta KL(q(z | x~) || N(0, I)) )
         x~ is x or, with --corrupt, x with some pixels set to 0; P is the number of pixel values.
         z is encode(x~); for sparse, encode keeps the k largest values. Only variational has the KL
         and samples z from q(z | x~) = N(mean, variance); beta is twice the variance of a Gaussian
         decoder (VAE with unit variance: 2). Pixels have mean 0 and variance 1, so predicting the
         mean costs about 1.

Flow     images (B, 3, S, S)
         A. mask      set some pixels (or none) to 0     -> inputs x~ (B, 3, S, S), target x
         B. predict   encoder      three convolutions    -> h (B, 4 width s^2), s = S / 8
                      to_latent    linear                -> z (B, Z)      none, sparse: h itself
                      bottleneck   noise, or top-k       -> z (B, Z)
                      from_latent  linear                -> (B, 4 width, s, s)
                      decoder      three convolutions up -> (B, 3, S, S)  weak: one linear layer
         C. compare   mean squared error on all pixels

Data     drawn images of 32 x 32 pixels: one of ten shapes, in one of eight colours, anywhere

Run      python autoencoder.py --bottleneck narrow
Expect   a linear probe (a linear classifier) of z finds the shape, from 20 labels per class, in
         10.8 ± 0.3 % (raw pixels 12.4 ± 0.0 %, chance 10 %), and the colour, from all labels, in
         95.5 ± 0.5 % (raw pixels 99.7 ± 0.0 %, chance 12.5 %) (3 seeds; 92 s of training on 1
         thread, beside other jobs; Intel(R) Xeon(R) Processor, 2 cores, Python 3.11.7, torch
         2.13.0+cpu)
Differs  Convolutions and AdamW replace stacked restricted Boltzmann machines. The sparse bottleneck
         keeps k values per image at test time, too.

Try      --bottleneck none, variational, sparse, weak: which has the lowest error, the best probe?
         --latent 8, 64, 512: what does a very small latent still hold?
         --corrupt 0.5 (sets half of the pixels to 0): does the probe gain? (mae.py masks patches)
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


Bottleneck = Literal["none", "narrow", "variational", "sparse", "weak"]


@dataclass
class Args(common.Args):
    """Settings of autoencoder.py for a GPU; `cpu` has smaller ones for two CPU cores. The
    comments are the help texts of the flags, and the ranges in them are checked."""
    steps: int = 4000               # training steps, 0 or more
    batch: int = 256                # images per step
    lr: float = 1e-3                # peak learning rate
    weight_decay: float = 0.01      # weight decay, on matrices only
    bottleneck: Bottleneck = "narrow"   # what limits z: nothing, size, noise, zeros, the decoder
    latent: int = 64                # dimensions of z (narrow, variational, weak)
    k: int = 64                     # sparse: dimensions kept, of 4 x width x (image_size / 8)^2
    noise: float = 1.0              # variational: scale of the noise in z (the KL assumes 1)
    beta: float = 0.1               # variational: weight of the KL, beside the sum of the squares
    corrupt: float = 0.0            # probability of setting an input pixel to 0, in [0, 1)
    skip_broken: bool = False       # skip the pictures of a folder that cannot be read
    image_size: int = 32            # side in pixels; pictures of a folder are cropped to squares
    width: int = 48                 # channels of the first convolution, doubled in each next
    labels: tuple[int, ...] = (1, 5, 20, 0)   # labelled images per class, 0 or more (0: all)

    cpu = dict(steps=1500, batch=64)


# ------------------------------------------------------------------------------------- the model
# B batch, S side of an image in pixels, s = S / 8 rounded up; Z dimensions of z: latent, or
# 4 width s^2 for none and sparse.


class Autoencoder(nn.Module):
    """Images -> latent z -> images, with a bottleneck: none, narrow, variational, sparse or weak.

    latent: the size of z, except for none and sparse: there z has 4 width s^2 dimensions, of which
    sparse keeps k. Raises ValueError if the bottleneck is unknown or k is too large.
    """

    def __init__(self, image_size, width, latent, bottleneck="narrow", k=64, noise=1.):
        super().__init__()
        if bottleneck not in ("none", "narrow", "variational", "sparse", "weak"):
            raise ValueError(f"there is no bottleneck {bottleneck!r}")
        self.bottleneck, self.k, self.noise = bottleneck, k, noise
        self.image_size = image_size
        if bottleneck in ("none", "sparse"):
            latent = 0          # no to_latent and from_latent: z is the features h. With width 48
                                # these are as many numbers as the image has: a copy would fit.
        self.encoder = Encoder(image_size, width, latent)
        if bottleneck == "sparse" and k > self.encoder.features_dim:
            raise ValueError(f"top-k with k = {k} is more than the {self.encoder.features_dim} "
                             "dimensions of the latent")
        if bottleneck == "weak":        # linear decoder: its best reconstruction is that of PCA
            self.decoder = nn.Sequential(nn.Linear(latent, 3 * image_size ** 2),
                                         nn.Unflatten(1, (3, image_size, image_size)))
        else:
            self.decoder = Decoder(image_size, width, latent)
        if bottleneck == "variational":
            self.log_var = nn.Linear(self.encoder.features_dim, latent)

    def forward(self, x):
        """B. Images (B, 3, S, S) -> reconstructions (B, 3, S, S), and the KL (B,) or None.
        Raises ValueError for images of another size."""
        if x.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"images of {' x '.join(map(str, x.shape[1:]))}, and this model is "
                             f"for 3 x {self.image_size} x {self.image_size}")
        h = self.encoder.features(x)                                 # (B, 4 width s^2)
        z, kl = self.encoder.to_latent(h), None                      # (B, Z)
        if self.bottleneck == "sparse":
            z = top_k(z, self.k)
        if self.bottleneck == "variational":                         # q(z | x) = N(mean, variance)
            mean, log_var = z.float(), self.log_var(h).float()       # (B, latent) each
            kl = kl_divergence(mean, log_var)                        # (B,)
            z = mean
            if self.training:      # the reparameterisation trick: gradients reach mean and log_var
                z = mean + self.noise * (log_var / 2).exp() * torch.randn_like(mean)
        return self.decoder(z), kl

    def encode(self, x):
        """Images -> the decoder's input z, without noise (variational: the mean): (B, Z)."""
        z = self.encoder(x)
        return top_k(z, self.k) if self.bottleneck == "sparse" else z


class Encoder(nn.Module):
    """Images (B, 3, S, S) -> (B, latent), or the features (B, 4 width s^2) if latent is 0."""

    def __init__(self, image_size, width, latent):
        super().__init__()
        # Each convolution halves the side, rounding up.
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, kernel_size=3, stride=2, padding=1)
        self.features_dim = 4 * width * math.ceil(image_size / 8) ** 2
        self.to_latent = nn.Linear(self.features_dim, latent) if latent else nn.Identity()

    def forward(self, x):
        return self.to_latent(self.features(x))

    def features(self, x):
        """All layers but the last: (B, 3, S, S) -> (B, 4 width s^2)."""
        x = F.relu(self.conv1(x))                                    # (B, width, S / 2, S / 2)
        x = F.relu(self.conv2(x))                                    # (B, 2 width, S / 4, S / 4)
        return F.relu(self.conv3(x)).flatten(1)                      # (B, 4 width s^2)


class Decoder(nn.Module):
    """Mirrors the encoder: z (B, Z) -> images (B, 3, S, S)."""

    def __init__(self, image_size, width, latent):
        super().__init__()
        self.image_size, self.s = image_size, math.ceil(image_size / 8)
        features_dim = 4 * width * self.s ** 2
        self.from_latent = nn.Linear(latent, features_dim) if latent else nn.Identity()
        # Each transposed convolution doubles the side.
        self.conv1 = nn.ConvTranspose2d(4 * width, 2 * width, kernel_size=4, stride=2, padding=1)
        self.conv2 = nn.ConvTranspose2d(2 * width, width, kernel_size=4, stride=2, padding=1)
        self.conv3 = nn.ConvTranspose2d(width, 3, kernel_size=4, stride=2, padding=1)

    def forward(self, z):
        x = F.relu(self.from_latent(z)).unflatten(1, (-1, self.s, self.s))   # (B, 4 width, s, s)
        x = F.relu(self.conv1(x))                                    # (B, 2 width, 2 s, 2 s)
        x = F.relu(self.conv2(x))                                    # (B, width, 4 s, 4 s)
        return self.conv3(x)[..., :self.image_size, :self.image_size]    # crop, such as 32 to 28


# ------------------------------------------------------------------------------------ the method


def distance(prediction, target, kl=None, beta=0.):
    """C. Mean squared error over the P pixel values of each image (B, 3, S, S), plus, with a KL
    (B,), beta / P times its mean."""
    loss = F.mse_loss(prediction.float(), target)
    return loss if kl is None else loss + beta * kl.mean() / target[0].numel()


def mask(x, corrupt=0.):
    """A. Images x (B, 3, S, S) -> inputs (B, 3, S, S), in which each pixel is set to 0 (the mean)
    with probability `corrupt`, and the target, x itself."""
    if not corrupt:
        return x, x
    return x.masked_fill(torch.rand_like(x[:, :1]) < corrupt, 0.), x     # one number per pixel


def kl_divergence(mean, log_var):
    """KL(N(mean, exp(log_var)) || N(0, I)) in nats (Kingma & Welling, app. B). mean and log_var
    (B, latent) -> (B,)."""
    return (mean.square() + log_var.exp() - 1 - log_var).sum(1) / 2


def top_k(z, k):
    """Keeps the k largest values in each row of z (B, Z) and sets the others to 0."""
    values, ids = z.topk(k, dim=1)
    return torch.zeros_like(z).scatter(1, ids, values)


def interpolate(model, a, b, n):
    """Decodes n latents on the line from images a to b, (B, 3, S, S) each: (B, n, 3, S, S)."""
    weight = torch.linspace(0, 1, n, device=a.device)[:, None]                   # (n, 1)
    z = torch.lerp(model.encode(a)[:, None], model.encode(b)[:, None], weight)   # (B, n, Z)
    return model.decoder(z.flatten(0, 1)).unflatten(0, (len(a), n))


# ------------------------------------------------------------------------------------ evaluation


def build(args, image_size):
    """Builds the autoencoder of these settings, on the device."""
    return Autoencoder(image_size, args.width, args.latent, args.bottleneck, args.k,
                       args.noise).to(args.device)


@torch.no_grad()
def reconstruct(args, model, images):
    """Writes reconstructions.png, and interpolations.png: ten latents from one image to another.
    Returns the mean squared error on test images that are corrupted as in training."""
    torch.manual_seed(args.seed)
    error = 0.
    for part in images.test.split(500):
        inputs, target = mask(images.normalize(part), args.corrupt)
        error += distance(model(inputs)[0], target).item() * len(part) / len(images.test)

    inputs, x = mask(images.normalize(images.test[:24]), args.corrupt)
    groups = [inputs, model(inputs)[0], x] if args.corrupt else [model(inputs)[0], x]
    sheet = torch.stack(groups, 1).flatten(0, 1)
    common.save_png(f"{args.out}/reconstructions.png", images.denormalize(sheet), 12, len(groups))
    n = max(1, min(8, len(x) // 2))
    a, b = x[:n], x[-n:]
    sheet = torch.cat([a[:, None], interpolate(model, a, b, 10), b[:, None]], 1).flatten(0, 1)
    common.save_png(f"{args.out}/interpolations.png", images.denormalize(sheet), 12)
    return error


# ------------------------------------------------------------------------------------------ main


@common.setup
def main(args):
    images = common.load_images(args)
    images.check(args.labels)                                                # fail early if too few
    model = build(args, images.size)
    untrained = copy.deepcopy(model).eval()
    optimizer = common.adamw(model.parameters(), args.lr, args.weight_decay)
    run = common.Run(args, model, optimizer, about=images.about())
    for step in run:                       # sets the seed and the learning rate of this step
        x = images.normalize(run.batch(images.train))
        with run.autocast():
            inputs, target = mask(x, args.corrupt)                           # A. mask
            inputs, target = run.part((inputs, target))                      # this process's part
            prediction, kl = model(inputs)                                   # B. predict
            loss = distance(prediction, target, kl, args.beta)               # C. compare
        loss.backward()
        if not run.reduce(loss):           # averages over --accumulate parts and processes
            continue
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)

    model.eval()
    error = reconstruct(args, model, images)
    rows = common.linear_probes(args, images, {
        "raw pixels": nn.Flatten(), "untrained encoder": untrained.encode,
        "autoencoder": model.encode})
    common.report(run, f"{args.bottleneck}: error {error:.3f}, "
                  + common.best_probe(args, images, rows, "autoencoder"),
                  dict(error=error, labels=args.labels, accuracy=rows))
    common.say(f"\n{common.label_table(args, images, rows)}\n\nMean squared error on new images: "
               f"{error:.3f} (a constant prediction: about 1).\nPictures: "
               f"{args.out}/reconstructions.png ({'corrupted | ' if args.corrupt else ''}"
               f"reconstructed | original), {args.out}/interpolations.png")
    return model


if __name__ == "__main__":
    common.cli(main, Args)
