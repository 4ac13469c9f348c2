"""Flamingo: gated cross-attention joins a frozen vision encoder to a frozen language model.

Paper    Alayrac et al. 2022, "Flamingo: a Visual Language Model for Few-Shot Learning",
         arXiv 2204.14198

Idea     Freeze a pre-trained language model (LM) and a pre-trained vision encoder (ViT). Train only
         new layers that connect them. A resampler turns the patch tokens of an image into a few
         latents. Gated layers between the LM's blocks attend to the latents of the last image, and
         their output is multiplied by tanh(gate). Gates start at 0: at step 0 this IS the LM. What
         the LM does with text, the whole model does with text and images: describe, answer, and
         (the main point of the paper) learn a task from a few examples in the prompt.

Loss     L = - mean_t log p(x_t | x_<t, the images before x_t), in nats, of all tokens but <image>.
         Gated layers attend to the last image; earlier ones act through the LM's self-attention.

Flow     tokens x (B, 1 + T) with <image> tokens, images (B, M, 3, S, S)
         0. encode    frozen ViT, once per image         -> features (B, M, N, E)
         A. mask      shift by one                       -> inputs (B, T), target (B, T)
         B. predict   once per image: resample N tokens to R latents, project to keys and values
                      LM blocks, a gated layer before one in n of them -> logits (B, T, V)
         C. compare   cross-entropy; <image> is never a target
         sample       with a cache of the LM's keys and values, as in gpt.py

Data     drawn scenes of one to three figures, and documents about them (common.py). <end> ends each
         text. A new word means a kind of figure, a different one in each document.
         the LM       a large red ring on the left . what colour is it ? red <end> ...
         new words    blue moon dax <end> red ring wug <end> red ring wug <end> ...
         Flamingo     <image> what colour is it ? red <end> <image> there is a large red ring ...
         new words    <image> dag <end> <image> kox <end> <image> kox <end> <image> dag <end> ...
         an unasked question        <image> red <end> <image> blue <end> <image> green <end> ...

Run      python flamingo.py
Expect   captions of new scenes: 99.8 ± 0.3, 97.8 ± 0.1 and 90.0 ± 0.6 % exactly right, for 1, 2 and
         3 figures; pairs of shape and colour that it never saw: 99.9 ± 0.2 % of the colours,
         97.3 ± 1.8 % of the shapes right; from examples in the prompt: a question that is not
         asked, after one: 99.8 ± 0.2 %; a new word, after four: 99.6 ± 0.2 % (chance 50), and after
         four a word that no image came with in training, only its syllables in other words:
         96.4 ± 2.6 % (3 seeds; 268 s of training for the LM and the ViT, then 263 s, on 1 thread,
         beside other jobs; Intel(R) Xeon(R) Processor, 2 cores, Python 3.11.7, torch 2.13.0+cpu)
Differs  A toy world of eight shapes in eight colours, with 54 tokens. Few-shot learning is trained:
         of the documents with images 40 % teach new words by examples (--new-words) and 10 % are
         unasked questions; of the LM's, 70 % and 10 %. The paper trains on web pages. Its LM is
         Chinchilla and its vision encoder an NFNet. Here both are trained first: the LM on texts of
         this world in which words stand for the images (sometimes a bare <image> token, whose
         embedding is 0); the ViT with CLIP's loss, in batches of similar colours. Muon trains the
         matrices of the blocks (with orthogonalised steps: common.py) and AdamW the rest (the
         paper: AdamW all); the gates have ten times the learning rate. Text always attends to the
         image before it (in the paper, on web pages, half of the time to the image after it). No
         video.

Try      --gate-start 0.5, or inf (no gates): what does the loss in log.jsonl do in the first steps?
         --attend all; --every 6 (one gated layer); --latents 0; --no-freeze: what gets worse?
         --optimizer adamw, or --lm-steps 200: are new words still learned?
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common

# -------------------------------------------------------------------------------------- settings


@dataclass
class Args(common.Args):
    """Settings of flamingo.py for a GPU; `cpu` has smaller ones for two CPU cores. The comments
    are the help texts of the flags, and the ranges in them are checked."""
    steps: int = 6000               # steps of the multimodal training, 0 or more
    batch: int = 64                 # documents per step
    lr: float = 1e-3                # peak learning rate
    warmup: float = 0.1             # fraction of steps in which the learning rate rises, in [0, 1]
    optimizer: Literal["muon", "adamw"] = "muon"   # Muon for the blocks' matrices, or AdamW for all
    muon_lr: float = 0.02           # peak learning rate of Muon, in (0, inf)
    weight_decay: float = 0.1       # weight decay, on matrices outside the resampler (B.1.2)
    data: str = "scenes"            # images for --prompt: scenes, or an .npz with an array `images`
    images: int = 40_000            # training images, two thirds with a single figure, 500 or more
    tests: int = 1000               # test images; also of unseen kinds, and episodes; 12 or more
    new_words: float = 0.4          # fraction of the documents about new words, in [0, 1]
    image_size: int = 32            # side of the images in pixels
    context: int = 96               # tokens per document, 41 or more
    every: int = 1                  # a gated layer before the first of every n blocks (table 3)
    latents: int = 8                # latents per image (paper: 64), 0 or more; 0: no resampler
    resampler_depth: int = 2        # layers of the resampler (paper: 6)
    attend: Literal["last", "all"] = "last"    # attend to the last image before a token, or to all
    gate_start: float = 0.          # initial gates, before tanh, in [0, inf]; inf: no gates
    gate_lr: float = 10.            # factor: the gates have this multiple of the learning rate
    freeze: bool = True             # keep the LM frozen (--no-freeze: train it, too)
    lm: str = ""                    # LM: folder of a gpt.py run or this script's LM [trains one]
    lm_steps: int = 10_000          # LM: training steps
    lm_batch: int = 64              # LM: documents per step
    lm_lr: float = 1e-3             # LM: peak learning rate
    lm_new_words: float = 0.7       # LM: fraction of the documents about new words, in [0, 1]
    dim: int = 256                  # LM: channels
    depth: int = 6                  # LM: blocks
    heads: int = 8                  # LM: attention heads, also those of the gated layers
    vit: str = ""                   # ViT: folder of a mae.py run or this script's ViT [trains one]
    vit_steps: int = 5000           # ViT: training steps
    vit_batch: int = 256            # ViT: pairs of image and caption per step
    vit_lr: float = 1e-3            # ViT: peak learning rate
    patch: int = 8                  # ViT: side of a patch in pixels
    vit_dim: int = 192              # ViT: channels
    vit_depth: int = 4              # ViT: blocks
    vit_heads: int = 6              # ViT: attention heads
    shots: tuple[int, ...] = (0, 1, 2, 4, 8)    # examples before a few-shot question, in [0, 100]
    prompt: str = ""                # question at the end, such as "<image> what colour is it ?"

    cpu = dict(steps=800, batch=32, lr=3e-3, images=32_000, tests=200, context=48,
               resampler_depth=1, lm_steps=600, lm_batch=96, lm_lr=3e-3, dim=128, depth=4, heads=4,
               vit_steps=800, vit_batch=128, vit_lr=2e-3, vit_dim=128, vit_depth=3, vit_heads=4)


# ------------------------------------------------------------------------------------- the model
# B batch, M images, N visual tokens per image (cls and patches), R latents per image, E channels of
# visual tokens and latents; T new tokens, L keys, C channels of the LM, H heads, D = C / H, V
# vocabulary size.


class Flamingo(nn.Module):
    """A language model that reads text and images: tokens (B, T), one <image> token for each of M
    images -> logits (B, T, V).

    Images are encoded once by the frozen ViT (`encode`), then projected (`project`). image: the
    <image> token; every: a gated layer stands before blocks 0, every, 2 every, ...; attend: "last"
    or "all", as in media_mask; gate_start: the gates' initial value.
    """

    def __init__(self, lm, vit, patch, image, every=1, latents=8, depth=1, attend="last",
                 gate_start=0.):
        super().__init__()
        self.lm, self.vit, self.patch = lm, vit.requires_grad_(False), patch
        self.image, self.every, self.attend = image, every, attend
        C, heads = lm.pos_embed.weight.shape[1], lm.blocks[0].attn.heads
        E, vit_heads = len(vit.norm.weight), vit.blocks[0].attn.heads
        self.resampler = Resampler(E, depth, vit_heads, latents) if latents else nn.LayerNorm(E)
        self.gated = nn.ModuleList(GatedCrossAttention(C, E, heads, gate_start)
                                   for _ in lm.blocks[::every])
        self.train()                       # the frozen parts in evaluation mode: see below

    @torch.no_grad()
    def encode(self, images):
        """0. Encodes normalised images (n, 3, S, S) with the frozen ViT: features (n, N, E)."""
        return self.vit(patchify(images, self.patch))

    def project(self, features):
        """Features (B, M, N, E) -> media: for each gated layer keys and values (2, B, H, M, R, D).
        Without a resampler, R is N."""
        B, M, N, E = features.shape
        latents = self.resampler(features.flatten(0, 1)).view(B, -1, E)     # (B, M R, E)
        return [layer.attn.keys_values(latents).unflatten(3, (M, -1))       # M R -> M, R
                for layer in self.gated]

    def forward(self, tokens, media=None, cache=None, images_before=0):
        """B. media: the result of project(); None: the LM alone. With a cache of the LM, the tokens
        continue those in the cache, images_before (B, 1) of which were <image> tokens. Raises
        ValueError if the text is longer than the context."""
        lm, start = self.lm, cache[0].length if cache else 0
        end, context = start + tokens.shape[1], len(lm.pos_embed.weight)
        if end > context:
            raise ValueError(f"{end} tokens are more than the context of {context}")
        if media is not None:
            M, R = media[0].shape[3:5]
            so_far = images_before + (tokens == self.image).cumsum(1)       # (B, T)
            visible = media_mask(so_far, M, R, self.attend)                 # (B, 1, T, M R)
        x = lm.token_embed(tokens) + lm.pos_embed.weight[start:end]         # (B, T, C)
        for i, block in enumerate(lm.blocks):
            if media is not None and i % self.every == 0:
                keys_values = media[i // self.every].flatten(3, 4)          # (2, B, H, M R, D)
                x = self.gated[i // self.every](x, keys_values, visible)
            x = block(x, cache[i] if cache else None)
        return F.linear(lm.norm(x), lm.token_embed.weight)

    def train(self, mode=True):
        """Keeps frozen parts in evaluation mode, so that a frozen LM has no dropout."""
        super().train(mode)
        for part in (self.vit, self.lm):
            part.train(mode and any(p.requires_grad for p in part.parameters()))
        return self


def media_mask(so_far, M, R, attend="last"):
    """Which of M images, with R latents each, every token attends to: the last image so far, or all
    so far; an <image> token attends to its own. so_far (B, T): the number of <image> tokens up to
    and including each token -> (B, 1, T, M R) bool. A token before the first image attends to none,
    nor, with "last", one after an <image> token without an image. Raises ValueError for a bool."""
    if so_far.dtype == torch.bool:
        raise ValueError("so_far counts <image> tokens: (tokens == IMAGE).cumsum(1)")
    number = torch.arange(1, M + 1, device=so_far.device)                   # of the images
    if attend == "last":
        visible = so_far[:, :, None] == number                              # (B, T, M)
    else:
        visible = so_far[:, :, None] >= number
    return visible[:, None].repeat_interleave(R, 3)


class GatedCrossAttention(nn.Module):
    """Gated cross-attention, then a gated feed-forward layer (Flamingo, fig. 4): x (B, T, C), keys
    and values (2, B, H, L, D), visible (B, 1, T, L) -> (B, T, C). For a token that sees no image,
    the attention adds exactly 0, but the feed-forward layer still applies."""

    def __init__(self, dim, source_dim, heads, gate_start=0.):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, source_dim, heads)
        self.mlp = FeedForward(dim)
        start, trained = float(gate_start), math.isfinite(gate_start)     # tanh(inf) = 1: no gates
        self.attn_gate = nn.Parameter(torch.tensor([start]), requires_grad=trained)
        self.mlp_gate = nn.Parameter(torch.tensor([start]), requires_grad=trained)

    def forward(self, x, keys_values, visible):
        # While the gates are 0, x is unchanged, and only the gates have a gradient. Once they have
        # moved, the layers have one, too.
        x = x + self.attn_gate.tanh() * self.attn(self.norm(x), keys_values, visible)
        return x + self.mlp_gate.tanh() * self.mlp(x)


class Resampler(nn.Module):
    """Perceiver resampler: any number of visual tokens (B, N, E) -> R latents (B, R, E). Learned
    queries attend to the visual tokens in any order, since the ViT has added their positions."""

    def __init__(self, dim, depth, heads, latents):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, dim) * dim ** -.5)
        self.layers = nn.ModuleList(ResamplerLayer(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, visual):
        x = self.latents.expand(len(visual), -1, -1)                        # (B, R, E)
        for layer in self.layers:
            x = layer(x, visual)
        return self.norm(x)


class ResamplerLayer(nn.Module):
    """Latents (B, R, E) attend to visual tokens (B, N, E) AND to themselves (Flamingo, fig. 5)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm_visual = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, dim, heads)
        self.mlp = FeedForward(dim)

    def forward(self, latents, visual):
        query = self.norm_latents(latents)
        source = torch.cat([self.norm_visual(visual), query], 1)            # (B, N + R, E)
        x = latents + self.attn(query, self.attn.keys_values(source))
        return x + self.mlp(x)


class CrossAttention(nn.Module):
    """Queries from x (B, T, C), keys and values from another sequence (B, L, E): (B, T, C). There
    are no biases, so that a token that attends to nothing gets exactly 0."""

    def __init__(self, dim, source_dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels cannot be divided among {heads} heads")
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(source_dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def keys_values(self, source):
        """Source tokens (B, L, E) -> keys and values (2, B, H, L, D)."""
        B, L, _ = source.shape
        return self.kv(source).view(B, L, 2, self.heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x, keys_values, visible=None):
        """visible (B, 1, T, L) bool: the keys that each token attends to; None: all."""
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.heads, -1).transpose(1, 2)            # (B, H, T, D)
        k, v = keys_values                                                  # (B, H, L, D) each
        if visible is None:
            x = F.scaled_dot_product_attention(q, k, v)
        else:                  # softmax over no keys is nan: use all keys there, then zero it
            none = ~visible.any(-1, keepdim=True)                           # (B, 1, T, 1)
            x = F.scaled_dot_product_attention(q, k, v, visible | none)
            x = x.masked_fill(none, 0.)
        return self.proj(x.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """LayerNorm, two layers, a squared ReLU between (Flamingo, A.1.4): (B, T, C) -> (B, T, C)."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim, bias=False)
        self.fc2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(self.norm(x))).square())


# The vision encoder: a copy of mae.py's ViT (its Block is called ViTBlock here, and so on).


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
        self.blocks = nn.ModuleList(ViTBlock(dim, heads) for _ in range(depth))
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


class ViTBlock(nn.Module):
    """Pre-norm Transformer block: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ViTAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ViTMLP(dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViTAttention(nn.Module):
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


class ViTMLP(nn.Module):
    """Two linear layers with a GELU between, applied to each token: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


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


# The language model: a copy of gpt.py's GPT.


class GPT(nn.Module):
    """GPT-2: tokens (B, T) -> logits (B, T, V) for the token that follows each of them.

    With a cache from new_cache(), the tokens continue those in the cache: passing a prompt and then
    one token at a time gives the same logits as passing the whole text. Raises ValueError if the
    text is longer than the context.
    """

    def __init__(self, vocab, context, dim, depth, heads, dropout=0.):
        super().__init__()
        self.dropout = dropout
        self.token_embed = nn.Embedding(vocab, dim)      # tied: the output layer uses it, too
        self.pos_embed = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        # As in GPT-2: std 0.02, positions 0.01. The last layers of the 2 depth residual branches
        # start smaller, since the outputs of all branches add up.
        for name, p in self.named_parameters():
            if p.ndim > 1:
                ends_branch = name.endswith(("proj.weight", "fc2.weight"))
                std = .02 / math.sqrt(2 * depth) if ends_branch else .02
                nn.init.normal_(p, std=.01 if name == "pos_embed.weight" else std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, cache=None):
        context = len(self.pos_embed.weight)
        start = cache[0].length if cache else 0
        end = start + tokens.shape[1]
        if end > context:
            raise ValueError(f"{end} tokens are more than the context of {context}")
        x = self.token_embed(tokens) + self.pos_embed.weight[start:end]             # (B, T, C)
        x = F.dropout(x, self.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, cache[i] if cache else None)
        return F.linear(self.norm(x), self.token_embed.weight)                      # (B, T, V)

    def new_cache(self, batch):
        """Returns an empty KV cache for a batch of texts: one Cache per block."""
        context, dim = self.pos_embed.weight.shape
        return [Cache(batch, block.attn.heads, context, dim // block.attn.heads,
                      self.pos_embed.weight) for block in self.blocks]


class Block(nn.Module):
    """Pre-norm Transformer block: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, heads, dropout=0.):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = MLP(dim, dropout)

    def forward(self, x, cache=None):
        x = x + self.attn(self.norm1(x), cache)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Causal multi-head self-attention: (B, T, C) -> (B, T, C). Each token attends to itself and to
    the tokens before it. With a cache, the T new tokens also attend to the cached ones."""

    def __init__(self, dim, heads, dropout=0.):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels cannot be divided among {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        H, D = self.heads, C // self.heads
        q, k, v = self.qkv(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)    # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)                                       # each (B, H, L, D)
        # The T new tokens are the last of all L. Each attends to the cached ones and to the new
        # ones up to itself. is_causal is a triangle at the top left: right if nothing is cached.
        L, attn_mask = k.shape[2], None
        if 1 < T < L:                    # True: attends. A single new token attends to all L.
            attn_mask = torch.ones(T, L, dtype=torch.bool, device=x.device).tril(L - T)
        x = F.scaled_dot_product_attention(              # softmax(q k^T / sqrt(D) + mask) v
            q, k, v, attn_mask, self.dropout if self.training else 0.,
            is_causal=cache is None or T == L)
        x = self.proj(x.transpose(1, 2).reshape(B, T, C))
        return F.dropout(x, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a GELU between, applied to each token: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, dropout=0.):
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        x = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Cache:
    """KV cache of one block: the keys and the values of the L tokens so far, (B, H, L, D) each.
    Memory for the whole context is allocated once; like: a tensor of its dtype and device."""

    def __init__(self, batch, heads, context, head_dim, like):
        self.k = like.new_empty(batch, heads, context, head_dim)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def append(self, k, v):
        """Appends keys and values of T new tokens (B, H, T, D); returns all L, (B, H, L, D)."""
        start = self.length
        self.length += k.shape[2]
        self.k[:, :, start:self.length] = k
        self.v[:, :, start:self.length] = v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


# Only for the training of the ViT; Flamingo does not use the text encoder.


class CLIP(nn.Module):
    """The ViT and a text encoder, for the training of the ViT. The text encoder is simpler than
    CLIP's: it sums a vector for each word at each of 16 positions, enough for these captions."""

    def __init__(self, vit, vocab, dim, patch):
        super().__init__()
        self.vit, self.patch, self.vocab = vit, patch, vocab
        self.image_proj, self.text_proj = nn.Linear(dim, 64), nn.Linear(16 * vocab, 64)
        self.scale = nn.Parameter(torch.tensor(math.log(10.)))    # log(1 / temperature), learned
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, images, captions):
        """Images (B, 3, S, S), captions (B, 16) -> an embedding of each, (B, 64), and a scale."""
        tokens = self.vit(patchify(images, self.patch))[:, 1:]              # drop cls
        words = F.one_hot(captions, self.vocab).flatten(1).float()
        scale = self.scale.exp().clamp(max=100)
        return self.image_proj(tokens.mean(1)), self.text_proj(words), scale


# ------------------------------------------------------------------------------------ the method


def distance(prediction, target):
    """C. Mean cross-entropy of logits (B, T, V) and tokens (B, T), in nats per token. Targets of
    -100 are ignored."""
    return F.cross_entropy(prediction.flatten(0, 1).float(), target.flatten())


def mask(x, image):
    """A. Tokens x (B, 1 + T), -100 after the end of a text -> inputs (B, T), and the target (B, T):
    the next token, or -100 if that is <image> or after the end. (gpt.py prepends BOS; here each
    text begins with <end> already.)"""
    inputs, target = x[:, :-1], x[:, 1:]
    end = x[:, :1]
    return torch.where(inputs < 0, end, inputs), target.masked_fill(target == image, -100)


def clip_loss(image, text, scale):
    """CLIP's loss (Flamingo, B.1.3) on the embeddings of n images and of their captions, (n, 64)
    each: match each image to its caption and vice versa. A uniform guess costs ln n."""
    logits = scale * F.normalize(image.float(), dim=1) @ F.normalize(text.float(), dim=1).T
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


@torch.inference_mode()
def sample(model, prompts, media, n, end, temperature=0.):
    """Samples up to n tokens after each of the prompts, a list of (t,) of any lengths, and stops
    before the token `end`: a list of (n,) or shorter. temperature 0: only the most likely token.

    All texts are generated together, one position at a time. Within a prompt its own token is kept
    instead of the sampled one, so no padding is needed. Raises ValueError if a prompt is longer
    than the context or has more <image> tokens than there are images.
    """
    lengths, device = [len(prompt) for prompt in prompts], model.lm.pos_embed.weight.device
    context, most = len(model.lm.pos_embed.weight), max(lengths)
    if most > context:
        raise ValueError(f"a prompt of {most} tokens is longer than the context of {context}")
    text = torch.full((len(prompts), min(most + n, context)), end, device=device)
    given = torch.zeros_like(text, dtype=torch.bool)                # True in the prompts
    for i, prompt in enumerate(prompts):
        text[i, :len(prompt)] = torch.as_tensor(prompt)
        given[i, :len(prompt)] = True
    count = int(((text == model.image) & given).sum(1).max())
    if media is not None and count > media[0].shape[3]:
        raise ValueError(f"a prompt has {count} <image> tokens, and there are "
                         f"{media[0].shape[3]} images")
    cache, start = model.lm.new_cache(len(prompts)), 0
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for t in range(min(lengths), text.shape[1]):
        images_before = (text[:, :start] == model.image).sum(1, keepdim=True)
        logits = model(text[:, start:t], media, cache, images_before)[:, -1].float()     # (B, V)
        logits[:, model.image] = -math.inf                         # it generates text only
        token = logits.argmax(1)
        if temperature > 0:
            p = ((logits - logits.amax(1, keepdim=True)) / temperature).softmax(1)   # as in gpt.py
            token = torch.multinomial(p, 1)[:, 0]
        text[:, t] = torch.where(given[:, t], text[:, t], token)
        start = t                                  # the cache now holds t tokens of each text
        done |= ~given[:, t] & (text[:, t] == end)
        if done.all():
            break
    new = [row[length:length + n] for row, length in zip(text, lengths)]
    return [row[:int((row != end).cumprod(0).sum())] for row in new]       # up to the first end


def normalize(images, mean=(.2, .2, .2), std=(.2, .2, .2)):
    """uint8 images (n, 3, S, S) -> about mean 0, variance 1 (scenes have a dark background)."""
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (mean, std))
    return (images.float() / 255 - mean) / std


# -------------------------------------------------------------------- the LM and the vision encoder

LM = "lm_new_words", "context", "dim", "depth", "heads"                     # these define the LM
VIT = "images", "image_size", "patch", "vit_dim", "vit_depth", "vit_heads"  # and these the ViT


def train_lm(args, tokenizer):
    """Trains a GPT on the language of the toy world, text only. Returns the folder of the run."""
    lm_args, done = common.stage(args, "lm", LM)
    if done:
        return lm_args.out
    torch.manual_seed(args.seed)
    model = GPT(tokenizer.vocab, args.context, args.dim, args.depth, args.heads)
    with torch.no_grad():
        for p in model.parameters():             # narrow models learn sooner with larger weights
            p *= math.sqrt(768 / args.dim) if p.ndim > 1 else 1.
        model.token_embed.weight[tokenizer.image] = 0
    # The embedding of <image> stays 0: the gated layers alone say what the image shows.
    image = torch.tensor(tokenizer.image, device=args.device)
    model.token_embed.weight.register_hook(lambda gradient: gradient.index_fill(0, image, 0.))
    model.to(args.device)
    common.say(f"First the LM: training on text only. It is kept in {lm_args.out}.")
    n = min(lm_args.steps * lm_args.batch, 60_000)
    x = common.text_documents(args.seed, tokenizer, n, args.context, args.lm_new_words)
    x = x.to(args.device)                                                   # (n, 1 + T)
    optimizer = common.optimizer(lm_args, model.named_parameters())
    run = common.Run(lm_args, model, optimizer, uniform=math.log(tokenizer.vocab))
    for step in run:
        with run.autocast():
            inputs, target = mask(run.batch(x), tokenizer.image)                    # A. mask
            inputs, target = run.part((inputs, target))                     # this process's part
            prediction = model(inputs)                                              # B. predict
            loss = distance(prediction, target)                                     # C. compare
        run.update(loss)                   # backward, clip, step: spelled out in main()
    return lm_args.out


def build_vit(args):
    """Builds the ViT of these settings, with random weights."""
    return ViT(args.image_size, args.patch, args.vit_dim, args.vit_depth, args.vit_heads)


def train_vit(args, tokenizer, scenes, images):
    """Trains a ViT to match images (n, 3, S, S) and captions. Returns the folder of the run."""
    vit_args, done = common.stage(args, "vit", VIT)
    if done:
        return vit_args.out
    torch.manual_seed(args.seed)
    model = CLIP(build_vit(args), tokenizer.vocab, args.vit_dim, args.patch).to(args.device)
    common.say("Then the ViT: training to match images and captions. "
               f"It is kept in {vit_args.out}.")
    words, alike = scenes.captions(tokenizer).to(args.device), scenes.alike()
    optimizer = common.optimizer(vit_args, model.named_parameters())
    run = common.Run(vit_args, model, optimizer, uniform=math.log(vit_args.batch),
                     about=dict(mean=(.2, .2, .2), std=(.2, .2, .2)))
    # Three steps of four have hard negatives: scenes of 1, 2 or 3 figures, sorted by colour, so
    # that those of a batch differ only in shapes, sizes and places.
    for step in run:
        if step % 4 == 0:
            i = run.batch(torch.arange(len(images), device=args.device))
        else:
            own = alike[step % 4 - 1]
            start = torch.randint(max(1, len(own) - vit_args.batch + 1), (1,)).item()
            i = own[start:start + vit_args.batch].to(args.device)
        with run.autocast():
            loss = clip_loss(*model(normalize(images[i]), words[i]))
        run.update(loss)                   # backward, clip, step: spelled out in main()
    return vit_args.out


def load_lm(args, folder):
    """Loads the LM and its tokenizer from the folder of a run of gpt.py or of this script's LM."""
    state = common.read_checkpoint(folder, "gpt.py", common.script(args), flag="--lm")
    saved, weights = state["args"], state["model"]
    common.require("token_embed.weight" in weights, f"{folder} holds no LM: try --lm {folder}/lm")
    text = common.Bytes() if state["script"] == "gpt.py" else None
    if saved.get("weights"):                  # GPT-2: shorten the context, add the token <image>
        text, embed = common.BPE.load(saved["weights"]), weights["token_embed.weight"]
        weights["token_embed.weight"] = torch.cat([embed, embed.mean(0, keepdim=True)])
        weights["pos_embed.weight"] = weights["pos_embed.weight"][:args.context]
    tokenizer = common.SceneTokens(text)
    vocab, context = (len(weights[f"{name}_embed.weight"]) for name in ("token", "pos"))
    common.require(not (tokenizer.text and common.is_images(saved["data"])), f"the LM in {folder} "
                   f"was trained on images ({saved['data']}), not on text: take another --lm")
    common.require(vocab == tokenizer.vocab and context > 40, f"the LM in {folder} has {vocab} "
                   f"tokens and a context of {context}, and {tokenizer.vocab} and at least 41 are "
                   "needed")
    lm = GPT(vocab, context, saved["dim"], saved["depth"], saved["heads"])    # without dropout
    lm.load_state_dict(weights)
    return lm.requires_grad_(not args.freeze), tokenizer


def load_vit(args, folder):
    """Loads the ViT of a run of mae.py or this script: the ViT, its patch size, {mean, std}."""
    state = common.read_checkpoint(folder, "mae.py", common.script(args), flag="--vit")
    saved, about = state["args"], state["about"]
    prefix = "encoder." if state["script"] == "mae.py" else "vit."
    weights = {k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
    is_vit = {"mean", "std"} <= about.keys()                   # a whole Flamingo has a vit., too
    common.require(weights and is_vit, f"{folder} holds no ViT: try --vit {folder}/vit")
    vit = ViT(args.image_size, saved["patch"], saved["dim"], saved["depth"], saved["heads"])
    vit.load_state_dict(weights)
    return vit, saved["patch"], {name: about[name] for name in ("mean", "std")}


# ------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def encode(args, model, images, statistics):
    """Encodes all images (n, 3, S, S) once with the frozen ViT: features (n, N, E), bfloat16."""
    with common.autocast(args):
        return torch.cat([model.encode(normalize(x, **statistics)).bfloat16()
                          for x in images.split(500)])


def answers(args, model, tokenizer, asked, features=None):
    """Answers a list of common.Query: a list of texts. features (n, N, E); None: the LM alone."""
    texts, context = [], len(model.lm.pos_embed.weight)
    for part in (asked[i:i + 250] for i in range(0, len(asked), 250)):
        prompts, media = [tokenizer.encode(f"<end> {q.prompt}") for q in part], None
        with torch.inference_mode(), common.autocast(args):
            if features is None:
                prompts = [[t for t in prompt if t != tokenizer.image] for prompt in prompts]
            else:
                most = max(1, *(len(q.images) for q in part))
                ids = torch.tensor([q.images + [0] * (most - len(q.images)) for q in part])
                media = model.project(features[ids.to(features.device)].float())
            texts += [tokenizer.decode(row).strip() for row in
                      sample(model, prompts, media, context, tokenizer.end)]
    return texts


def evaluate(args, model, tokenizer, asked, features):
    """{(row, column): % of answers exactly right}; row "LM alone": all queries, without images."""
    right, alone = {}, [q for q in asked if q.group[1] in common.SORTS]
    for q, text in zip(asked, answers(args, model, tokenizer, asked, features)):
        right.setdefault(q.group, []).append(text == q.answer)
    for q, text in zip(alone, answers(args, model, tokenizer, alone)):
        right.setdefault(("LM alone", q.group[1]), []).append(text == q.answer)
    return {group: 100 * sum(found) / len(found) for group, found in right.items()}


def describe(args, model, tokenizer, asked, features, images):
    """Writes scenes.png, twelve test images. Returns the model's text about each, as lines."""
    common.save_png(f"{args.out}/scenes.png", images[:12].float() / 255, 6)
    chosen = []                                  # (number, query): a caption and a question each
    for i in range(12):
        about = [q for q in asked if q.images == [i]]                # the caption is the first
        chosen += [(i + 1, q) for q in about[:1]] + [("", q) for q in about[1 + i % 3:][:1]]
    texts, lines = answers(args, model, tokenizer, [q for _, q in chosen], features), []
    for (i, q), text in zip(chosen, texts):
        lines.append(f"{i:>2}  {q.prompt.removeprefix('<image> ')} {text}")
        if text != q.answer:
            lines[-1] += f"\n    WRONG, should be: {q.answer}"
    return lines


def tables(args, model, right):
    """The results as text: tables of captions, questions and few-shot episodes, and the gates."""
    cell = lambda *group: f"{right[group]:.1f}" if group in right else "-"
    grid = lambda corner, rows, columns: common.table(
        [[corner, *columns], *([row, *(cell(row, column) for column in columns)] for row in rows)])
    gates = ", ".join(f"{layer.attn_gate.tanh().item():.2f} {layer.mlp_gate.tanh().item():.2f}"
                      for layer in model.gated)
    return "\n\n".join([
        grid("exactly right, %", ["caption", *common.ABOUT, "LM alone"], common.SORTS),
        grid("examples in the prompt", ["unasked question", "new word", "held-out word"],
             [*map(str, args.shots)]),
        "LM alone: the same questions without images. From 2 examples on, the new word is one of "
        "two (chance 50 %). A held-out word never came with an image in training; its syllables "
        "did, in other words.",
        f"tanh of the gates (attention, feed-forward) of each layer: {gates}"])


def show(args, run, model, tokenizer, pictures, statistics):
    """Evaluates the model and prints the results; of a finished run it only answers --prompt."""
    asked, scenes = common.queries(args.seed, args.tests, args.shots)
    images = common.paint(scenes, args.seed + 1_000_000, args.image_size, args.device)
    context, reply = len(model.lm.pos_embed.weight), []
    if args.prompt:
        query = common.Query((), args.prompt, list(range(args.prompt.count("<image>"))))
        pictures = images[:args.tests] if pictures is None else pictures
        features = encode(args, model, pictures, statistics)
        reply = [f"{args.prompt} -> {answers(args, model, tokenizer, [query], features)[0]}"]
    if reply and run.loss is None and (run.out / "result.json").exists():
        return common.say(reply[0])
    fits = lambda q: len(tokenizer.encode(f"<end> {q.prompt} {q.answer} <end>")) <= context
    asked = [q for q in asked if not q.group[0].endswith("of 3") and fits(q)]
    features = encode(args, model, images, statistics)
    lines = describe(args, model, tokenizer, asked, features, images)
    right = evaluate(args, model, tokenizer, asked, features)
    lines += ["", *reply] if reply else []
    captions = right.get(("caption", "1 figure"), math.nan)             # with bytes, none may fit
    common.report(run, f"captions of one figure {captions:.1f} %",
                  dict(lines=lines, right={", ".join(group): x for group, x in right.items()}))
    common.say(f"\nTwelve test images, in two rows of {args.out}/scenes.png:\n\n"
               + "\n".join(lines) + f"\n\n{tables(args, model, right)}")


# ------------------------------------------------------------------------------------------ main


def build_optimizer(args, model):
    """The resampler has no weight decay (Flamingo, B.1.2). Gates have --gate-lr times the learning
    rate: an Adam step changes a number by about the rate, too little for a gate."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gates = [p for name, p in named if name.endswith("gate")]
    resampler = [(name, p) for name, p in named if name.startswith("resampler")]
    rest = [(name, p) for name, p in named if not name.startswith("resampler")
            and not name.endswith("gate")]
    optimizer = common.optimizer(args, rest)
    for group in common.groups(args, resampler, weight_decay=0.):
        optimizer.add_param_group(group)
    if gates:
        optimizer.add_param_group(dict(params=gates, weight_decay=0., times=args.gate_lr))
    return optimizer


def check(args, tokenizer, context):
    """Raises ValueError for mistakes that would otherwise show only after the training of the LM.
    Returns the images that --prompt is about, (n, 3, S, S) uint8; None: the test scenes."""
    pictures, n = None, args.tests
    if args.data != "scenes":
        common.require(args.data.endswith(".npz"), "--data takes scenes, or an .npz with images "
                       f"that --prompt is about, not {args.data!r}")
        common.require(args.prompt, f"--data {args.data} needs a --prompt about its images, such "
                       'as "<image> what colour is it ?"')
        pictures = common.read_pictures(Path(args.data), args.image_size, args.device)
        n = len(pictures)
    prompt = tokenizer.encode(f"<end> {args.prompt}")
    count = prompt.count(tokenizer.image)
    common.require(count <= n, f"--prompt has {count} <image> tokens, and there are {n} images of "
                   f"--data {args.data}")
    common.require(len(prompt) < context, f"--prompt has {len(prompt)} tokens, and the context of "
                   f"{context} has to hold it and its answer: shorten it")
    if not args.vit:
        build_vit(args)
        common.require(args.vit_batch <= args.images, f"--vit-batch {args.vit_batch} is more than "
                       f"the {args.images} --images")
    return pictures


@common.setup
def main(args):
    words = common.SceneTokens()
    lm, tokenizer = load_lm(args, args.lm) if args.lm else (None, words)
    vit = load_vit(args, args.vit) if args.vit else None
    context = len(lm.pos_embed.weight) if lm else args.context
    pictures = check(args, tokenizer, context)
    scenes = common.Scenes(args.seed, args.images, common.SEEN)
    images = common.paint(scenes.all, args.seed, args.image_size, args.device)
    if not lm:
        lm, _ = load_lm(args, train_lm(args, words))
    vit, patch, statistics = vit or load_vit(args, train_vit(args, words, scenes, images))
    torch.manual_seed(args.seed)
    model = Flamingo(lm, vit, patch, tokenizer.image, args.every, args.latents,
                     args.resampler_depth, args.attend, args.gate_start).to(args.device)
    optimizer = build_optimizer(args, model)
    run = common.Run(args, model, optimizer)
    if run.step < args.steps:                        # else only --prompt or evaluation
        common.say("Last the multimodal training: the resampler and the gated layers.")
        features = encode(args, model, images, statistics)                         # (n, N, E)
        n = min(args.steps * args.batch, 60_000)
        x, ids = common.image_documents(args.seed, tokenizer, scenes, n, context, args.new_words)
        x, ids = x.to(args.device), ids.to(args.device)                 # (n, 1 + T), (n, M)
    for step in run:                       # sets the seed and the learning rate of this step
        i = run.batch(torch.arange(len(x), device=args.device))         # (B,)
        with run.autocast():
            inputs, target = mask(x[i], tokenizer.image)                # A. mask
            inputs, image_ids, target = run.part((inputs, ids[i], target))
            media = model.project(features[image_ids].float())          # of (B, M, N, E)
            prediction = model(inputs, media)                           # B. predict: (B, T, V)
            loss = distance(prediction, target)                         # C. compare
        loss.backward()
        if not run.reduce(loss):           # averages over --accumulate parts and processes
            continue
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)

    model.eval()
    show(args, run, model, tokenizer, pictures, statistics)
    return model


if __name__ == "__main__":
    common.cli(main, Args)
