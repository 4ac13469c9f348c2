"""Masked autoencoder (MAE): hide 75 % of an image's patches, encode the others, paint the hidden.

Paper    He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377

Idea     An autoencoder that sees all it has to rebuild can copy. So hide most of the image: what is
         hidden follows only from knowing what things look like. The encoder works on the visible
         patches alone, which makes it cheap (a quarter of the tokens) and keeps it honest; a small
         decoder paints the hidden patches and is thrown away after training.

Loss     L = 1 / (|M| P) sum_{i in M} || x_i - decode(encode(x_V), M)_i ||^2
         over the hidden patches M only, from the visible ones V; P pixel values in a patch
         (with --norm-pix each x_i has its own mean and variance taken out). Pixels have mean 0 and
         variance 1: always guessing the mean costs about 1.

Flow     images (B, 3, S, S)
         A. mask      patchify, hide      -> visible (B, n, P), their places, hidden (B, N - n, P)
         B. predict   encode              -> (B, 1 + n, C)     cls and the visible patches
                      fill in mask tokens -> (B, 1 + N, C')    all places, C' channels
                      decode              -> (B, N - n, P)     the hidden patches
         C. compare   squared error on the hidden patches

Run      python mae.py --mask-ratio 0.75
Expect   the shape, from 100 labels a class: 28.6 ± 3.6 % fine-tuned, 12.3 ± 1.2 % from scratch,
         chance 10 % (3 seeds; 145 s of training on 2 threads; AMD EPYC, 2 cores, torch
         2.13.0+cpu)
Differs  Small images, so small patches (4 px of 32); features are the mean of the patch tokens, for
         the linear probe, too (the paper's reads cls; ours is fitted by L-BFGS); no augmentation,
         in pre-training (the paper crops and mirrors) or fine-tuning, no layer decay or drop path;
         a BatchNorm before the new head in fine-tuning, too; pixels predicted as they are unless
         --norm-pix says otherwise.

Try      --mask-ratio 0.25, 0.5, 0.9: which error is lowest, and which features are best?
         --tune last, then --resume --tune all (no second pre-training): how much of the encoder has
         to move before it is good?
         --norm-pix: do the features get better? (Its pictures are lent the patches' contrast.)
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
    """Settings of mae.py: for a GPU, and under `cpu` smaller ones for two cores."""
    steps: int = 4000               # training steps
    batch: int = 512                # images a step
    lr: float = 1e-3                # peak learning rate (MAE, table 8: 1.5e-4 batch / 256)
    weight_decay: float = 0.05      # AdamW's decay, on matrices only (MAE, table 8)
    mask_ratio: float = 0.75        # share of the patches hidden from the encoder (MAE, fig. 5)
    norm_pix: bool = False          # predict each patch with its own mean and variance taken out
    image_size: int = 32            # side in pixels of drawn shapes, and of a folder's pictures
    patch: int = 4                  # side of a patch in pixels
    dim: int = 192                  # channels of the encoder (ViT-Tiny)
    depth: int = 12                 # blocks of the encoder
    heads: int = 3                  # attention heads of the encoder
    decoder_dim: int = 96           # channels of the decoder
    decoder_depth: int = 4          # blocks of the decoder
    decoder_heads: int = 3          # attention heads of the decoder
    tune: Literal["linear", "last", "all"] = "all"  # nothing but the probe, last block, all
    labels: tuple[int, ...] = (1, 5, 20, 100)        # labelled images a class for each fine-tuning
    tune_steps: int = 1000          # steps of each fine-tuning
    tune_lr: float = 1e-3           # its peak learning rate
    draws: int = 1                  # repeats with other labelled images, for mean and spread

    cpu = dict(steps=2000, batch=64, lr=3e-3, dim=128, depth=4, heads=2, decoder_dim=64,
               decoder_depth=2, decoder_heads=2, labels=(20, 100), tune_steps=150)

    def check(self):
        super().check()
        self.at_least(1, "patch", "image_size", "depth", "decoder_depth", "labels", "draws")
        self.at_least(0, "tune_steps", "tune_lr")
        self.multiple("dim", "heads", 4)
        self.multiple("decoder_dim", "decoder_heads", 4)
        common.require(0 < self.mask_ratio < 1, "--mask-ratio must be above 0 and below 1, not "
                       f"{self.mask_ratio}: some patches have to stay visible, and some hidden")


# ------------------------------------------------------------------------------------- the model
# B batch, N patches, T tokens, C channels, H heads, D = C / H, P = 3 p^2 pixel values of a patch.


class Attention(nn.Module):
    """Multi-head self-attention, every token to every token: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, T, C = x.shape
        H, D = self.heads, C // self.heads
        q, k, v = self.qkv(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)    # each (B, H, T, D)
        x = F.scaled_dot_product_attention(q, k, v)                  # softmax(q k^T / sqrt(D)) v
        return self.proj(x.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers, each token for itself: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sincos(side, dim):
    """Fixed position code of a side x side grid, row by row: (1, 1 + side^2, dim).

    Half the channels tell the column, half the row, each by sines then cosines of falling frequency
    10000^(-4 i / dim). The row in front is the cls token's: zeros.
    """
    frequency = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) * 4 / dim)
    angle = torch.arange(side)[:, None] * frequency                         # (side, dim / 4)
    code = torch.cat([angle.sin(), angle.cos()], 1)                         # (side, dim / 2)
    column, row = code.repeat(side, 1), code.repeat_interleave(side, 0)     # each (side^2, dim / 2)
    return F.pad(torch.cat([column, row], 1), (0, 0, 1, 0)).float()[None]


def take(x, at):
    """The tokens of x (B, T, C) at places (B, n), another choice for each image: (B, n, C)."""
    return x.gather(1, at[:, :, None].expand(-1, -1, x.shape[2]))


class ViT(nn.Module):
    """Vision Transformer over any of the patches: (B, n, P) at places (B, n) -> (B, 1 + n, C).

    Token 0 is cls. Without `places`, the patches are all N in order. grid: patches to a side.
    """

    def __init__(self, grid, pixels, dim, depth, heads):
        super().__init__()
        self.patch_embed = nn.Linear(pixels, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * .02)
        self.register_buffer("pos_embed", sincos(grid, dim), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, patches, places=None):
        B = len(patches)
        position = self.pos_embed[:, 1:].expand(B, -1, -1)
        x = self.patch_embed(patches) + (position if places is None else take(position, places))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)
        x = torch.cat([cls, x], 1)                                          # (B, 1 + n, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MAE(nn.Module):
    """Encoder for what is visible, and a smaller decoder that paints the rest (MAE, fig. 1)."""

    def __init__(self, grid, pixels, dim, depth, heads, decoder_dim, decoder_depth, decoder_heads):
        super().__init__()
        self.encoder = ViT(grid, pixels, dim, depth, heads)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim) * .02)
        self.register_buffer("decoder_pos_embed", sincos(grid, decoder_dim), persistent=False)
        blocks = (Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, pixels)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, masked):
        """B. (visible (B, n, P), order (B, N)) -> the hidden patches as guessed, (B, N - n, P)."""
        visible, order = masked
        n = visible.shape[1]
        latent = self.encoder(visible, order[:, :n])                 # (B, 1 + n, C)
        tokens = self.fill(self.decoder_embed(latent), order)        # (B, 1 + N, decoder_dim)
        return self.decode(tokens, order[:, n:])

    def fill(self, latent, order):
        """cls and the visible tokens (B, 1 + n, C') -> all (B, 1 + N, C') in their places, the mask
        token where nothing was seen. order (B, N)."""
        cls, seen = latent.tensor_split([1], 1)
        blank = self.mask_token.to(seen.dtype).expand(len(seen), order.shape[1] - seen.shape[1], -1)
        return torch.cat([cls, restore(torch.cat([seen, blank], 1), order)], 1)

    def decode(self, tokens, places):
        """All tokens (B, 1 + N, C') -> the pixels of the patches at `places` (B, N - n), the hidden
        ones: (B, N - n, P). Nothing else is owed."""
        x = tokens + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(take(x, 1 + places)))    # cls is token 0


# ------------------------------------------------------------------------------------ the method


def patchify(x, p):
    """Images (B, 3, S, S) -> patches (B, N, P), row by row; inside, too: (row, column, colour)."""
    B, _, S, _ = x.shape
    n = S // p
    return x.reshape(B, 3, n, p, n, p).permute(0, 2, 4, 3, 5, 1).reshape(B, n * n, 3 * p * p)


def unpatchify(patches, p):
    """The way back: (B, N, P) -> (B, 3, S, S)."""
    B, N, _ = patches.shape
    n = math.isqrt(N)
    return patches.reshape(B, n, n, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(B, 3, n * p, n * p)


def hide(patches, ratio):
    """Shuffles the patches and cuts: -> visible (B, n, P), hidden (B, N - n, P), order (B, N).

    order[b, i] is where in the image the i-th of the shuffled belongs; the first n are visible.
    """
    B, N, _ = patches.shape
    n = N - round(N * ratio)
    order = torch.rand(B, N, device=patches.device).argsort(1)              # a shuffle per image
    return take(patches, order[:, :n]), take(patches, order[:, n:]), order


def restore(tokens, order):
    """Undoes the shuffle: (B, N, C) -> the same tokens in their places. So
    restore(torch.cat([visible, hidden], 1), order) undoes hide()."""
    places = order[:, :, None].expand_as(tokens)
    return torch.empty_like(tokens).scatter_(1, places, tokens)


def standardize(patches):
    """Patches (B, n, P), without the mean and variance of each (--norm-pix; MAE, sec. 4.1)."""
    mean, var = patches.mean(2, keepdim=True), patches.var(2, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


def mask(x, patch, ratio, norm_pix=False):
    """A. Images (B, 3, S, S) -> what the model may see, (visible (B, n, P), order (B, N)), and what
    it owes, (B, N - n, P)."""
    visible, hidden, order = hide(patchify(x, patch), ratio)
    return (visible, order), standardize(hidden) if norm_pix else hidden


def distance(prediction, target):
    """C. Mean squared error over the hidden patches (B, N - n, P), the only ones predicted."""
    return F.mse_loss(prediction.float(), target)


# ------------------------------------------------------------------------------------------ look


POOL = 5000      # the training images that lend the few labels: enough, and quick to encode


class Features(nn.Module):
    """What a classifier reads, the mean of all patches' tokens: (B, 3, S, S) -> (B, C)."""

    def __init__(self, encoder, patch):
        super().__init__()
        self.encoder, self.patch = encoder, patch

    def forward(self, x):
        return self.encoder(patchify(x, self.patch))[:, 1:].mean(1)


def build(args, size):
    """The MAE of these settings for images of size x size pixels, on the device."""
    p, N = args.patch, (size // args.patch) ** 2
    common.require(size % p == 0, f"--patch {p} does not divide the {size} x {size} images of "
                   f"--data {args.data}: try --patch {4 if size % 4 == 0 else 1}")
    common.require(0 < round(N * args.mask_ratio) < N, f"--mask-ratio {args.mask_ratio} of {N} "
                   "patches leaves none hidden or none visible: try 0.75, or a smaller --patch")
    return MAE(size // p, 3 * p * p, args.dim, args.depth, args.heads, args.decoder_dim,
               args.decoder_depth, args.decoder_heads).to(args.device)


@torch.no_grad()
def look(args, model, images):
    """Paints test images: writes reconstructions.png, and returns the error on hidden patches."""
    torch.manual_seed(args.seed)
    error = 0.
    for part in images.test.split(500):
        masked, target = mask(images.normalize(part), args.patch, args.mask_ratio, args.norm_pix)
        error += distance(model(masked), target).item() * len(part) / len(images.test)

    x = images.normalize(images.test[:24])
    visible, hidden, order = hide(patchify(x, args.patch), args.mask_ratio)
    painted = model((visible, order)).float()
    if args.norm_pix:      # it never learned a patch's own mean and variance: lend it the true ones
        mean, var = hidden.mean(2, keepdim=True), hidden.var(2, keepdim=True)
        painted = painted * (var + 1e-6).sqrt() + mean

    def whole(rest):
        return unpatchify(restore(torch.cat([visible, rest], 1), order), args.patch)
    triples = torch.stack([whole(torch.zeros_like(hidden)), whole(painted), x], 1).flatten(0, 1)
    common.save_png(f"{args.out}/reconstructions.png", images.denormalize(triples), 12, group=3)
    return error


def tune(args, f, images, labels, test_labels, k, draw):
    """Accuracy in % of a copy of f with a new head, tuned on k images a class as --tune says."""
    f = copy.deepcopy(f).requires_grad_(args.tune == "all")
    if args.tune == "last":
        f.encoder.blocks[-1].requires_grad_(True)
        f.encoder.norm.requires_grad_(True)
    few = common.few(labels[:POOL], k, draw)
    return common.finetune(f, images, images.train[few], labels[few], test_labels, args,
                           args.tune_steps, args.tune_lr, seed=draw)


def few_shot(args, model, images):
    """What a few labels buy: {who: for each label count accuracies in %, one a draw}, and what a
    linear probe with the most labels reads: {attribute: accuracy in %}."""
    what = next(iter(images.names))
    labels, test_labels = images.train_labels[what], images.test_labels[what]
    torch.manual_seed(args.seed)
    models = build(args, images.size), model
    untrained, trained = (Features(m.encoder, args.patch) for m in models)
    rows, draws = {}, range(args.draws)
    for who, f in ("raw pixels", nn.Flatten()), ("untrained ViT", untrained), ("MAE", trained):
        with common.autocast(args):
            train, test = (common.encode(f, images, x) for x in (images.train[:POOL], images.test))
        rows[f"{who}, linear"] = [
            [common.probe(train, labels[:POOL], test, test_labels, k, draw) for draw in draws]
            for k in args.labels]
        if f is trained:
            knows = {name: common.probe(train, images.train_labels[name][:POOL], test,
                                        images.test_labels[name], max(args.labels))
                     for name in images.names}
    fits = [(who, f, i, draw) for who, f in (("untrained ViT", untrained), ("MAE", trained))
            for i in range(len(args.labels)) for draw in draws if args.tune != "linear"]
    for who, f, i, draw in common.progress(fits, "fine-tuning"):
        row = rows.setdefault(f"{who}, tune {args.tune}", [[] for _ in args.labels])
        row[i].append(tune(args, f, images, labels, test_labels, args.labels[i], draw))
    return rows, knows


def tell(args, run, images, error, rows, knows):
    """The end of the run, in words and in result.json."""
    what, names = next(iter(images.names.items()))
    print()
    common.say(f"Squared error on the hidden patches of {len(images.test):,} new images: "
               f"{error:.3f} (always guessing the mean: "
               f"{'about 1, of what is normalised by --norm-pix' if args.norm_pix else '1.000'}).")
    lines = [[f"{what}, accuracy in %", *(f"{k} a class" for k in args.labels)],
             ["chance", *[f"{100 / len(names):.1f}"] * len(args.labels)]]
    lines += [[who, *map(common.spread, row)] for who, row in rows.items()]
    print(f"\n{common.table(lines)}\n")

    how, k = "linear" if args.tune == "linear" else f"tune {args.tune}", max(args.labels)
    many = f"{k} label{'s' * (k > 1)}"
    ours, untrained = (common.spread(rows[f"{who}, {how}"][args.labels.index(k)])
                   for who in ("MAE", "untrained ViT"))
    if len(knows) > 1:
        known = common.known(images, {name: [[got]] for name, got in knows.items()})
        common.say(f"From MAE's features, a linear probe with {many} a class reads: {known}.")
    common.say(f"With {many} a class ({how}) the {what} is right in {ours} % with "
               f"pre-training, {untrained} % without, {100 / len(names):.1f} % by chance.")
    common.say(f"Picture: {args.out}/reconstructions.png (masked | painted | original)")
    summary = f"{what} at {many}: {ours} %, untrained {untrained} %"
    common.report(run, summary, dict(error=error, labels=args.labels, accuracy=rows, linear=knows))


# ------------------------------------------------------------------------------------------ main


def main(args):
    images = common.load_images(args.data, args.data_dir, args.image_size, args.device)
    common.few(next(iter(images.train_labels.values()))[:POOL], max(args.labels))    # too many?
    model = build(args, images.size)
    run = common.Run(args, model)
    for step in run:
        x = images.normalize(run.batch(images.train))
        masked, target = mask(x, args.patch, args.mask_ratio, args.norm_pix)
        prediction = model(masked)
        loss = distance(prediction, target)
        run.update(loss)

    model.eval()
    error = look(args, model, images)
    tell(args, run, images, error, *few_shot(args, model, images))


if __name__ == "__main__":
    common.start(main, Args)
