"""Masked autoencoder (MAE): mask 75 % of an image's patches and reconstruct them from the rest.

Paper    He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377

Idea     An autoencoder that sees everything it has to reconstruct can copy. So mask most of the
         image: a few masked patches can be guessed from their neighbours, but 75 % of them only by
         knowing what things look like. The encoder, a Vision Transformer (ViT), processes only the
         visible patches: a quarter of the tokens. A small decoder reconstructs the masked patches
         and is discarded after pre-training. Its input for every masked patch is the same learned
         vector, the mask token; the position embedding added to it tells which patch to predict.

Loss     L = 1 / (|M| P) sum_{i in M} || x_i - decode(encode(x_V), M)_i ||^2
         The sum is over the masked patches M; V are the visible patches, P is the number of pixel
         values per patch. With --norm-pix, each x_i is normalised to mean 0 and variance 1.
         Pixels have mean 0 and variance 1, so predicting the mean everywhere costs about 1.

Flow     images (B, 3, S, S)
         A. mask      patchify            -> patches (B, N, P)
                      random_masking      -> visible (B, n, P), masked (B, N - n, P)
         B. predict   encoder             -> (B, 1 + n, C)     cls token and visible patches
                      decoder_embed       -> (B, 1 + n, C')    C' decoder channels
                      append mask tokens  -> (B, 1 + N, C')    unshuffled, positions added
                      decoder             -> (B, N - n, P)     the masked patches
         C. compare   mean squared error on the masked patches
         later        all patches -> encoder -> mean of the patch tokens (B, C) -> a new linear
                      layer, trained with the encoder (fine-tuning) or alone (linear probe)

Data     drawn images of 32 x 32 pixels: one of ten shapes, in one of eight colours, anywhere

Run      python mae.py --mask-ratio 0.75
Expect   the shape, from 100 labels per class: 40.7 ± 1.3 % fine-tuned, 12.3 ± 1.0 % from scratch,
         chance 10 % (3 seeds; 179 s of training on 1 thread, beside other jobs; Intel(R) Xeon(R)
         Processor, 2 cores, Python 3.11.7, torch 2.13.0+cpu)
Differs  The images are small, and so are the patches (4 of 32 pixels). The last layer predicts only
         the masked patches (the authors' code predicts all patches and masks the loss). The linear
         probe uses the mean of the patch tokens (the paper's: the cls token). Fine-tuning, like the
         probe, has a BatchNorm before the new layer. Muon trains the matrices of the blocks (with
         orthogonalised steps: common.py) and AdamW the rest; in the paper and in fine-tuning, AdamW
         trains all. No augmentation, layer-wise learning rate decay or drop path. "From scratch" is
         the same number of fine-tuning steps from random weights (the paper takes more).

Try      --mask-ratio 0.25, 0.5, 0.9: which gives the lowest error, and which the best features?
         --tune last, then --resume --tune all (this does not repeat the pre-training): how much of
         the encoder has to change for a good accuracy?
         --norm-pix: do the features get better?
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
    """Settings of mae.py for a GPU; `cpu` has smaller ones for two CPU cores. The comments are
    the help texts of the flags, and the ranges in them are checked."""
    steps: int = 4000               # training steps, 0 or more
    batch: int = 512                # images per step
    lr: float = 1e-3                # peak learning rate (the paper's: 1.5e-4 batch / 256)
    optimizer: Literal["muon", "adamw"] = "muon"   # Muon for the blocks' matrices, or AdamW for all
    muon_lr: float = 0.02           # peak learning rate of Muon, in (0, inf)
    weight_decay: float = 0.1       # weight decay, on matrices only (MAE, table 8: 0.05)
    mask_ratio: float = 0.75        # fraction of the patches to mask, in (0, 1)
    norm_pix: bool = False          # normalise each target patch by its own mean and variance
    image_size: int = 32            # side in pixels; pictures of a folder are cropped to squares
    weights: str = ""               # folder or .pth file of a published MAE; also give --data
    skip_broken: bool = False       # skip the pictures of a folder that cannot be read
    patch: int = 4                  # side of a patch in pixels
    dim: int = 192                  # channels of the encoder (ViT-Tiny)
    depth: int = 12                 # blocks of the encoder
    heads: int = 3                  # attention heads of the encoder
    decoder_dim: int = 96           # channels of the decoder
    decoder_depth: int = 4          # blocks of the decoder
    decoder_heads: int = 3          # attention heads of the decoder
    tune: Literal["linear", "last", "all"] = "all"  # linear probe only, or tune last block, or all
    labels: tuple[int, ...] = (1, 5, 20, 100)        # labelled images per class, 1 or more
    tune_steps: int = 1000          # steps of each fine-tuning, 0 or more
    tune_lr: float = 1e-3           # peak learning rate of fine-tuning

    cpu = dict(steps=2000, batch=64, lr=3e-3, dim=128, depth=4, heads=2, decoder_dim=64,
               decoder_depth=2, decoder_heads=2, labels=(100,), tune_steps=150)
    published = dict(steps=0, batch=32, lr=1e-4, optimizer="adamw", image_size=224, data="",
                     labels=(5,), tune_steps=50, tune_lr=1e-4)


# ------------------------------------------------------------------------------------- the model
# B batch, N patches, n visible patches, P = 3 p^2 pixel values per patch; C channels of the
# encoder, C' of the decoder.


class MAE(nn.Module):
    """A ViT encodes the visible patches; a smaller decoder predicts the masked ones (MAE, fig. 1).

    ids_shuffle (B, N), from random_masking below: the positions of the visible patches, and then
    those of the masked ones. image_size: the side in pixels, or (height, width).
    """

    def __init__(self, image_size, patch, dim, depth, heads, decoder_dim, decoder_depth,
                 decoder_heads, channels=3):
        super().__init__()
        self.encoder = ViT(image_size, patch, dim, depth, heads, channels)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim) * .02)
        position = sincos_pos_embed(*self.encoder.grid, decoder_dim)
        self.register_buffer("decoder_pos_embed", position, persistent=False)
        blocks = (Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, channels * patch ** 2)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, visible, ids_shuffle):
        """B. Visible patches (B, n, P), ids_shuffle (B, N) -> masked patches (B, N - n, P)."""
        n, N = visible.shape[1], math.prod(self.encoder.grid)
        if ids_shuffle.shape[1] != N:
            raise ValueError(f"{ids_shuffle.shape[1]} patches per image, and this model is for {N}")
        latent = self.encoder(visible, ids_shuffle[:, :n])                  # (B, 1 + n, C)
        x = self.append_mask_tokens(self.decoder_embed(latent), ids_shuffle)
        x = x + self.decoder_pos_embed                                      # (B, 1 + N, C')
        for block in self.decoder_blocks:
            x = block(x)
        x = gather(x, 1 + ids_shuffle[:, n:])        # the masked patches; token 0 is cls
        return self.decoder_pred(self.decoder_norm(x))                      # (B, N - n, P)

    def append_mask_tokens(self, x, ids_shuffle):
        """cls and visible tokens (B, 1 + n, C') -> cls and all N tokens in order (B, 1 + N, C')."""
        cls, visible = x[:, :1], x[:, 1:]
        B, n, _ = visible.shape
        mask_tokens = self.mask_token.to(x.dtype)                   # bfloat16 under autocast
        mask_tokens = mask_tokens.expand(B, ids_shuffle.shape[1] - n, -1)
        tokens = unshuffle(torch.cat([visible, mask_tokens], 1), ids_shuffle)
        return torch.cat([cls, tokens], 1)


class ViT(nn.Module):
    """Vision Transformer for some or all patches of an image: (B, n, P) -> (B, 1 + n, C).

    ids (B, n) are the positions of the patches in the image, counted row by row; None means all N
    patches in order. Token 0 of the output is the cls token, which belongs to no patch. It can
    be used to classify the image, and has no target in pre-training (as in MAE). image_size: the
    side in pixels, or (height, width).
    """

    def __init__(self, image_size, patch, dim, depth, heads, channels=3):
        super().__init__()
        height, width = [image_size] * 2 if isinstance(image_size, int) else image_size
        if height % patch or width % patch:
            raise ValueError(f"a patch of {patch} pixels does not divide images of {height} x "
                             f"{width} pixels: take a divisor of {math.gcd(height, width)}")
        self.grid = height // patch, width // patch          # rows and columns of patches
        self.patch_embed = nn.Linear(channels * patch ** 2, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * .02)
        position = sincos_pos_embed(*self.grid, dim)
        self.register_buffer("pos_embed", position, persistent=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, patches, ids=None):
        B, n, _ = patches.shape
        position = self.pos_embed[:, 1:].expand(B, -1, -1)
        if ids is not None:                          # add the position of each patch
            position = gather(position, ids)
        elif n != position.shape[1]:
            raise ValueError(f"{n} patches per image, and this ViT is for {position.shape[1]}")
        x = self.patch_embed(patches) + position
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)
        x = torch.cat([cls, x], 1)                                          # (B, 1 + n, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def sincos_pos_embed(rows, columns, dim):
    """Fixed 2-D sin-cos position embedding of N = rows x columns patches: (1, 1 + N, dim).

    The first half of the channels encodes the column, the second half the row: first sines, then
    cosines, with frequencies 10000^(-4 i / dim). Index 0 is for the cls token and is zero.
    """
    if dim % 4:
        raise ValueError(f"{dim} channels cannot hold sines and cosines of x and y: take a "
                         "multiple of 4")
    frequency = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) * 4 / dim)
    angle = torch.arange(max(rows, columns))[:, None] * frequency           # (side, dim / 4)
    code = torch.cat([angle.sin(), angle.cos()], 1)                         # (side, dim / 2)
    column = code[:columns].repeat(rows, 1)                                 # 0 1 2 0 1 2 ...
    row = code[:rows].repeat_interleave(columns, 0)                         # 0 0 0 1 1 1 ...
    patches = torch.cat([column, row], 1).float()                           # (N, dim)
    return torch.cat([torch.zeros(1, dim), patches])[None]


# The Transformer. T tokens, H heads, D = C / H.


class Attention(nn.Module):
    """Multi-head self-attention: (B, T, C) -> (B, T, C). Every token attends to every token."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels cannot be divided among {heads} heads")
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
    """Two linear layers with a GELU between, applied to each token: (B, T, C) -> (B, T, C)."""

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


# ------------------------------------------------------------------------------------ the method


def distance(prediction, target):
    """C. Mean squared error between predicted and true masked patches, both (B, N - n, P)."""
    return F.mse_loss(prediction.float(), target)


def mask(x, patch, ratio, norm_pix=False):
    """A. Images (B, 3, S, S) -> the inputs of the model, (visible patches (B, n, P), ids_shuffle
    (B, N)), and the target, the masked patches (B, N - n, P)."""
    visible, masked, ids_shuffle = random_masking(patchify(x, patch), ratio)
    target = normalize_patches(masked) if norm_pix else masked
    return (visible, ids_shuffle), target


def random_masking(patches, ratio):
    """Shuffles the patches (B, N, P) of each image and splits them into visible (B, n, P) and
    masked (B, N - n, P). Returns both and ids_shuffle (B, N).

    ids_shuffle[b, i] is the position in image b of the i-th patch after the shuffle; the first n
    patches are visible. With N = 4, n = 1 and ids_shuffle 2, 0, 3, 1, patch 2 is visible and
    patches 0, 3, 1 are masked. Raises ValueError if no patch is visible or none is masked.
    """
    B, N, _ = patches.shape
    n = N - round(N * ratio)
    if not 0 < n < N:
        raise ValueError(f"a mask ratio of {ratio} leaves {n} of {N} patches visible")
    ids_shuffle = torch.rand(B, N, device=patches.device).argsort(1)
    return gather(patches, ids_shuffle[:, :n]), gather(patches, ids_shuffle[:, n:]), ids_shuffle


def unshuffle(tokens, ids_shuffle):
    """Moves shuffled tokens (B, N, C) back to their positions in the image. For example,
    unshuffle(torch.cat([visible, masked], 1), ids_shuffle) undoes random_masking."""
    ids_restore = ids_shuffle.argsort(1)                           # the inverse permutation
    return gather(tokens, ids_restore)


def gather(x, ids):
    """Selects the tokens of x (B, T, C) at positions ids (B, n) of each image: (B, n, C)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def patchify(x, p):
    """Images (B, C, H, W) -> patches (B, N, P), row by row; within a patch: row, column, colour."""
    B, C, H, W = x.shape
    if H % p or W % p:
        raise ValueError(f"a patch of {p} pixels does not divide images of {H} x {W} pixels")
    h, w = H // p, W // p                                          # patches: N = h w
    x = x.reshape(B, C, h, p, w, p).permute(0, 2, 4, 3, 5, 1)      # (B, h, w, p, p, C)
    return x.reshape(B, h * w, p * p * C)


def unpatchify(patches, p, rows=None):
    """Inverse of patchify: (B, N, P) -> (B, C, H, W), with `rows` rows of patches; None: square."""
    B, N, P = patches.shape
    h, C = rows or math.isqrt(N), P // p ** 2
    if N % h or (rows is None and h * h != N):
        raise ValueError(f"{N} patches are not {h} rows")
    x = patches.reshape(B, h, N // h, p, p, C).permute(0, 5, 1, 3, 2, 4)     # (B, C, h, p, w, p)
    return x.reshape(B, C, h * p, N // h * p)


def normalize_patches(patches):
    """Normalises each patch of (B, n, P) to mean 0, variance 1 (--norm-pix; MAE, sec. 3)."""
    mean, var = patches.mean(2, keepdim=True), patches.var(2, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


# --------------------------------------------------------------------- building and loading models


def build(args, image_size):
    """Builds the MAE of these settings, on the device."""
    return MAE(image_size, args.patch, args.dim, args.depth, args.heads, args.decoder_dim,
               args.decoder_depth, args.decoder_heads).to(args.device)


def load_published(args, image_size):
    """Loads the MAE of --weights and sets its sizes in args. A missing decoder is random."""
    state, config = common.published(args.weights, "MAE", common.VIT, "patch_embed.weight")
    state = {name if name.startswith(("decoder", "mask_token")) else f"encoder.{name}": x
             for name, x in common.join_qkv(state).items()}
    for name in {"encoder.pos_embed", "decoder_pos_embed"} & state.keys():
        common.require(not state.pop(name)[0, 0].any(),                  # cls token: zeros
                       f"--weights {args.weights} is no MAE: its {name} is learned")
    kernel = state["encoder.patch_embed.weight"].permute(0, 2, 3, 1)            # (C, p, p, 3)
    state["encoder.patch_embed.weight"] = kernel.flatten(1)                     # (C, P)
    args.dim, args.patch = kernel.shape[:2]
    args.heads = config.get("num_attention_heads", min(16, args.dim // 64) or 1)
    blocks = lambda part: sum(f"{part}blocks" in name for name in state) // 12     # tensors each
    args.depth, args.decoder_dim, args.decoder_depth = blocks("encoder."), 512, 8  # as in the paper
    if "decoder_embed.weight" in state:
        args.decoder_dim = len(state["decoder_embed.weight"])
        args.decoder_depth = blocks("decoder_")
    args.decoder_heads = config.get("decoder_num_attention_heads", args.decoder_dim // 32 or 1)
    model = build(args, image_size)
    common.fill_in(model, state, args.weights, config, missing=("decoder", "mask_token"))
    return model


# ------------------------------------------------------------------------------------ evaluation


POOL = 5000      # labelled images come from the first 5,000 only, to limit the time to encode


class MeanPooled(nn.Module):
    """Features for a classifier, the mean of the patch tokens: (B, 3, S, S) -> (B, C)."""

    def __init__(self, encoder, patch):
        super().__init__()
        self.encoder, self.patch = encoder, patch

    def forward(self, x):
        return self.encoder(patchify(x, self.patch))[:, 1:].mean(1)


@torch.no_grad()
def reconstruct(args, model, images):
    """Writes reconstructions.png. Returns the mean squared error on masked test patches."""
    torch.manual_seed(args.seed)
    error = 0.
    for part in images.test.split(500):
        inputs, target = mask(images.normalize(part), args.patch, args.mask_ratio, args.norm_pix)
        error += distance(model(*inputs), target).item() * len(part) / len(images.test)

    x = images.normalize(images.test[:24])
    visible, masked, ids_shuffle = random_masking(patchify(x, args.patch), args.mask_ratio)
    prediction = model(visible, ids_shuffle).float()
    if args.norm_pix:            # undo normalize_patches, with the true mean and variance
        mean, var = masked.mean(2, keepdim=True), masked.var(2, keepdim=True)
        prediction = prediction * (var + 1e-6).sqrt() + mean

    def whole(rest):
        return unpatchify(unshuffle(torch.cat([visible, rest], 1), ids_shuffle), args.patch)
    triples = torch.stack([whole(torch.zeros_like(masked)), whole(prediction), x], 1).flatten(0, 1)
    common.save_png(f"{args.out}/reconstructions.png", images.denormalize(triples), 12, group=3)
    return error


def finetune(args, f, images, k):
    """Accuracy in % of a copy of f with a new head, fine-tuned (--tune) on k images per class."""
    f = copy.deepcopy(f).requires_grad_(args.tune == "all")
    if args.tune == "last":
        f.encoder.blocks[-1].requires_grad_(True)
        f.encoder.norm.requires_grad_(True)
    labels, test_labels = images.class_labels()
    i = common.k_shot(labels[:POOL], k)
    return common.finetune(args, f, images, images.train[i], labels[i], test_labels,
                           args.tune_steps, args.tune_lr)


def few_labels(args, model, images):
    """Accuracies with few labels: {encoder and method: [% for each number in --labels]}."""
    labels, test_labels = images.class_labels()
    torch.manual_seed(args.seed)
    untrained = build(args, images.size)
    encoders = {"untrained ViT": MeanPooled(untrained.encoder, args.patch),
                "MAE": MeanPooled(model.encoder, args.patch)}
    rows = {}
    for name, f in {"raw pixels": nn.Flatten(), **encoders}.items():
        train = common.encode(args, f, images, images.train[:POOL])
        test = common.encode(args, f, images, images.test)
        rows[f"{name}, linear probe"] = [
            common.probe(train, labels[:POOL], test, test_labels, k) for k in args.labels]
    if args.tune != "linear":
        for name, f in encoders.items():
            rows[f"{name}, tune {args.tune}"] = [finetune(args, f, images, k) for k in args.labels]
    return rows


# ------------------------------------------------------------------------------------------ main


@common.setup
def main(args):
    common.require(args.data, "--weights needs --data with pictures: a folder, or an .npz")
    images = common.load_images(args)
    images.check(args.labels, POOL)                                    # fail early if too few
    if args.weights:
        images.imagenet()
        model = load_published(args, images.size)
    else:
        model = build(args, images.size)
    optimizer = common.optimizer(args, model.named_parameters())
    run = common.Run(args, model, optimizer, about=images.about())
    for step in run:                       # sets the seed and the learning rate of this step
        x = images.normalize(run.batch(images.train))
        with run.autocast():
            inputs, target = mask(x, args.patch, args.mask_ratio, args.norm_pix)    # A. mask
            inputs, target = run.part((inputs, target))                     # this process's part
            prediction = model(*inputs)                                     # B. predict
            loss = distance(prediction, target)                             # C. compare
        loss.backward()
        if not run.reduce(loss):           # averages over --accumulate parts and processes
            continue
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)

    model.eval()
    error = reconstruct(args, model, images)
    rows = few_labels(args, model, images) if images.names else {}
    summary = f"error {error:.3f}"
    if rows:
        how = "linear probe" if args.tune == "linear" else f"tune {args.tune}"
        ours, scratch = (rows[f"{name}, {how}"][-1] for name in ("MAE", "untrained ViT"))
        summary += f", MAE {ours:.1f} %, untrained ViT {scratch:.1f} %"
    common.report(run, summary, dict(error=error, labels=args.labels, accuracy=rows))
    constant = "" if args.norm_pix or args.weights else " (a constant prediction: about 1)"
    common.say(f"\n{common.label_table(args, images, rows)}\n\nMean squared error on masked "
               f"patches of new images: {error:.3f}{constant}.\nPicture: "
               f"{args.out}/reconstructions.png (masked | reconstructed | original)")
    return model


if __name__ == "__main__":
    common.cli(main, Args)
