"""Flamingo: a frozen language model and a frozen eye, joined by gated cross-attention.

Paper    Alayrac et al. 2022, "Flamingo: a Visual Language Model for Few-Shot Learning",
         arXiv 2204.14198

Idea     How would you build a model that reads pictures and text, and writes? From scratch? No.
         Take a language model and a vision encoder that are there, freeze both, and train only what
         joins them. A resampler turns the patches of any picture into a few tokens; between the
         blocks of the language model new layers look at these. Each is multiplied by the tanh of a
         gate that starts at 0, so that at the first step this IS the language model. What that does
         with text, the whole shall do with pictures: describe them, answer, and (the paper's point)
         find out from a few examples before the question what is wanted.

Loss     L = - mean_t log p(x_t | x_<t, the last picture before x_t)          in nats a token,
         over all tokens but the <image> marks; pictures further back reach x_t through the text

Flow     tokens x (B, 1 + T) with <image> marks, pictures (B, M, 3, S, S)
         0. see       the frozen eye, once a picture   -> visual tokens (B, M, N, E)
         A. mask      shift: what is seen (B, T), what is owed (B, T); which picture: reach, in B
         B. predict   resample     N tokens of each picture -> R latents        (N: patches and cls)
                      the LM's blocks, a gated look at the last picture before every n-th
                                                       -> logits (B, T, V)
         C. compare   cross-entropy of all but the marks
         sample       the text's keys and values are cached as in gpt.py, the pictures' once

Run      python flamingo.py
Expect   of held-out scenes 93.7 ± 1.1, 0.0 ± 0.0 and 0.0 ± 0.0 % of the captions of 1, 2 and 3
         figures are right to the word; of single figures of unseen kinds 98.8 ± 0.8 % of
         the colours and 90.0 ± 0.9 % of the shapes (chance 12.5); a question that is not
         asked is found out from one example (99.0 ± 0.5 %), what a new word means, from 4,
         is not (44.3 ± 4.9 %, chance 50) (3 seeds; 131 s of training the join, after 97 s
         for the LM and the eye, on 2 threads; AMD EPYC, 2 cores, torch 2.13.0+cpu)
Differs  A world of eight shapes in eight colours, a language of 60 words. The LM learns from text
         in which words stand in the place of pictures, so that, given enough steps (the last of
         Try), it binds new words before it has eyes: from short documents at first; later with
         <image> marks, some with no words beside them. The row of the mark is 0 while it learns, so
         that later what is seen there counts. The join begins with short documents, too, most of
         them about new words. The gates learn at ten times the rate; a cosine schedule. The eye is
         a ViT, its captions are read by a table of words. No video, so no time embedding; the row
         of <end> is the frozen LM's own, and the mark's is trained with --no-freeze. Text always
         looks at the picture before it (theirs, on pages of the web, half of the time at the next).

Try      (each with --out runs/other --lm runs/flamingo/lm --eye runs/flamingo/eye, which are kept)
         --gate-start 0.5, or inf (no gate): what does the loss in log.jsonl do at the first steps?
         --attend all (nothing tells which picture is which): which answers get worse?
         --every 4, with the CPU's 4 blocks: one look, before the first. What is lost, what is not?
         --lm-steps 900 --eye-steps 500 --steps 650, without --lm and --eye (a quarter of an hour):
         the LM may bind new words ("LM, told"). Flamingo, too? With --seed 1? With --lm-short 0?
"""
import dataclasses
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import common

# -------------------------------------------------------------------------------------- settings


@dataclass
class Args(common.Args):
    """Settings of flamingo.py: for a GPU, and under `cpu` smaller ones for two cores."""
    steps: int = 6000               # training steps of the join
    batch: int = 64                 # documents a step
    lr: float = 1e-3                # peak learning rate
    warmup: float = 0.1             # share of the steps in which the learning rate rises
    weight_decay: float = 0.1       # AdamW's decay, on matrices, not the resampler's (B.1.2)
    data: str = "scenes"            # what the prompt is about: scenes, or an .npz with `images`
    images: int = 40_000            # painted scenes to train on, two thirds of single figures
    tests: int = 1000               # held-out scenes, as many more of unseen kinds, and episodes
    short: float = 0.4              # share of the steps, from the first, that see short documents
    image_size: int = 32            # side of a picture in pixels
    context: int = 96               # tokens of a document
    every: int = 1                  # a gated look before every n-th block, from the first (table 3)
    latents: int = 8                # tokens that the resampler makes of a picture (paper: 64)
    resampler_depth: int = 2        # its layers (paper: 6)
    attend: Literal["last", "all"] = "last"    # pictures that a token sees: the last before it, all
    gate_start: float = 0.          # what gates start at, before tanh; inf: no gates
    gate_lr: float = 10.            # the gates' learning rate, as a multiple of --lr
    resample: bool = True           # resample, or look at all visual tokens
    freeze: bool = True             # keep the LM as it is
    lm: str = ""                    # folder of a run of gpt.py, or an lm; its sizes count then
    lm_steps: int = 10_000          # LM: training steps
    lm_batch: int = 64              # LM: documents a step
    lm_lr: float = 1e-3             # LM: peak learning rate
    lm_short: float = 0.5           # LM: share of the steps, from the first, with short documents
    lm_share: float = 0.4           # LM: share of the long documents that give new words
    dim: int = 256                  # LM: channels
    depth: int = 6                  # LM: blocks
    heads: int = 8                  # LM: attention heads, of the gated layers, too
    eye: str = ""                   # folder of a run of mae.py, or an eye; its sizes count then
    eye_steps: int = 5000           # eye: training steps
    eye_batch: int = 256            # eye: pictures with captions a step
    eye_lr: float = 1e-3            # eye: peak learning rate
    patch: int = 8                  # eye: side of a patch in pixels
    eye_dim: int = 192              # eye: channels
    eye_depth: int = 4              # eye: blocks
    eye_heads: int = 6              # eye: attention heads
    shots: tuple[int, ...] = (0, 1, 2, 4, 8)    # examples before the question
    prompt: str = ""                # asked at the end: "<image> what colour is it ?"
    temperature: float = 0.         # divides the logits of its answer; 0 takes the most likely

    cpu = dict(steps=560, batch=32, lr=3e-3, images=16_000, tests=200, context=48,
               resampler_depth=1, lm_steps=200, lm_batch=96, lm_lr=3e-3, dim=128, depth=4, heads=4,
               eye_steps=400, eye_batch=128, eye_lr=2e-3, eye_dim=128, eye_depth=3, eye_heads=4)

    def check(self):
        super().check()
        self.at_least(1, "every", "resampler_depth", "depth", "patch", "eye_depth", "image_size",
                      "lm_batch", "eye_batch", "lm_steps", "eye_steps")
        self.at_least(0, "lm_lr", "eye_lr", "gate_lr", "temperature", "shots")
        self.at_least(12, "tests")
        self.at_least(500, "images")
        self.multiple("dim", "heads")
        self.multiple("eye_dim", "eye_heads", 4)
        self.share("short", "lm_short", "lm_share")
        need = common.require
        need(self.eye_batch <= self.images, f"--eye-batch {self.eye_batch} is more than the "
             f"{self.images} pictures (--images)")
        need(self.image_size % self.patch == 0, f"--patch {self.patch} does not divide the "
             f"{self.image_size} x {self.image_size} pictures (--image-size)")
        need(self.latents > 0, f"--latents must be 1 or more, not {self.latents}; without a "
             "resampler: --no-resample")
        need(self.context > 40, f"--context must be 41 or more, not {self.context}: a picture, a "
             "question and its answer have to fit")
        need(not math.isnan(self.gate_start), "--gate-start must be a number, or inf for no gate, "
             "not nan")
        need(max(self.shots) <= 100, f"--shots must be 100 at most, not {max(self.shots)}")


# ------------------------------------------------------------------------------------- the model
# B batch, M pictures, N visual tokens of one, R latents of one, E their channels; T tokens that
# are new, L that can be looked at, C channels of the LM, H heads, D = C / H, V vocabulary.
# First the language model, gpt.py's.


class Cache:
    """KV cache of one block: the keys and values of all L tokens so far, (B, H, L, D) each, in room
    for a whole context that is allocated once."""

    def __init__(self, batch, heads, context, head_dim, like):
        self.k = like.new_empty(batch, heads, context, head_dim)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def add(self, k, v):
        """Appends those of T new tokens (B, H, T, D); returns those of all, (B, H, L, D)."""
        new, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, new:self.length] = k
        self.v[:, :, new:self.length] = v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


class Attention(nn.Module):
    """Multi-head self-attention, each token to itself and those before it: (B, T, C) -> (B, T, C).

    With a cache, the T tokens come after those that it holds, and are added to it.
    """

    def __init__(self, dim, heads, dropout=0.):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        H, D = self.heads, C // self.heads
        q, k, v = self.qkv(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)    # each (B, H, T, D)
        if cache is not None:
            k, v = cache.add(k, v)                                          # each (B, H, L, D)
        L, seen = k.shape[2], None
        if 1 < T < L:        # new token i sees L - T + i + 1 keys; is_causal would count from key 0
            seen = torch.ones(T, L, dtype=torch.bool, device=x.device).tril(L - T)
        drop = self.dropout if self.training else 0.
        x = F.scaled_dot_product_attention(q, k, v, seen, drop, is_causal=1 < T == L)
        return F.dropout(self.proj(x.transpose(1, 2).reshape(B, T, C)), drop)


class MLP(nn.Module):
    """Two layers, each token for itself: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, dropout=0.):
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        x = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


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


class GPT(nn.Module):
    """GPT-2: tokens (B, T) -> logits of the token after each, (B, T, V).

    Without a cache the tokens stand at places 0 to T - 1; with one, from `cache()`, behind those
    that it holds, so that a prompt, one token, or a few at a time give the same logits as the
    whole. Raises ValueError where they are more than the context holds.
    """

    def __init__(self, vocab, context, dim, depth, heads, dropout=0.):
        super().__init__()
        self.dropout = dropout
        self.token_embed = nn.Embedding(vocab, dim)              # the head is the same matrix
        self.pos_embed = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        for name, p in self.named_parameters():                  # as GPT-2: 0.02, places 0.01
            if p.ndim > 1:
                residual = name.endswith(("proj.weight", "fc2.weight"))     # 2 depth terms add up
                std = .02 / math.sqrt(2 * depth) if residual else .02
                nn.init.normal_(p, std=.01 if name == "pos_embed.weight" else std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, cache=None):
        context = len(self.pos_embed.weight)
        old = cache[0].length if cache else 0
        new = old + tokens.shape[1]
        if new > context:
            raise ValueError(f"{new} tokens are more than the context of {context} holds")
        x = self.token_embed(tokens) + self.pos_embed.weight[old:new]               # (B, T, C)
        x = F.dropout(x, self.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, cache[i] if cache else None)
        return F.linear(self.norm(x), self.token_embed.weight)

    def cache(self, batch):
        """An empty cache for a batch: a Cache for each block."""
        context, dim = self.pos_embed.weight.shape
        return [Cache(batch, block.attn.heads, context, dim // block.attn.heads,
                      self.pos_embed.weight) for block in self.blocks]


# The eye, mae.py's (where a name is taken, it begins with Eye), and the eye while it learns.


class EyeAttention(nn.Module):
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


class EyeMLP(nn.Module):
    """Two layers, each token for itself: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class EyeBlock(nn.Module):
    """Pre-norm Transformer block: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = EyeAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = EyeMLP(dim)

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

    Token 0 is cls. Without `places`, the patches are all of the image, in order. grid: patches to a
    side; P: numbers in a patch.
    """

    def __init__(self, grid, pixels, dim, depth, heads):
        super().__init__()
        self.patch_embed = nn.Linear(pixels, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * .02)
        self.register_buffer("pos_embed", sincos(grid, dim), persistent=False)
        self.blocks = nn.ModuleList(EyeBlock(dim, heads) for _ in range(depth))
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


class Captioned(nn.Module):
    """The eye while it learns, beside a reader of captions: a vector for each word at each of 16
    places, added up. The captions of this world are so regular that no more is needed."""

    def __init__(self, eye, vocab, dim, patch):
        super().__init__()
        self.eye, self.patch, self.vocab = eye, patch, vocab
        self.of_eye, self.of_reader = nn.Linear(dim, 64), nn.Linear(16 * vocab, 64)
        self.scale = nn.Parameter(torch.tensor(math.log(10.)))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, pictures, captions):
        """Pictures (B, 3, S, S) and captions (B, 16) -> a vector of each, and their scale."""
        tokens = self.eye(patchify(pictures, self.patch))[:, 1:]
        words = F.one_hot(captions, self.vocab).flatten(1).float()
        return self.of_eye(tokens.mean(1)), self.of_reader(words), self.scale.exp().clamp(max=100)


# What joins them.


class CrossAttention(nn.Module):
    """Queries from x (B, T, C), keys and values from another sequence (B, L, E): (B, T, C).

    No biases: what sees nothing gives exactly 0.
    """

    def __init__(self, dim, source, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(source, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def keys(self, source):
        """(B, L, E) -> keys and values, (B, H, L, D) each."""
        B, L, _ = source.shape
        k, v = self.kv(source).view(B, L, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x, k, v, seen=None):
        """x (B, T, C), k, v (B, H, L, D) from keys() -> (B, T, C). seen: which of the L each token
        may look at, bool, to be broadcast to (B, H, T, L)."""
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.heads, -1).transpose(1, 2)            # (B, H, T, D)
        if seen is None:
            x = F.scaled_dot_product_attention(q, k, v)
        elif seen.shape[-1] == 1:                    # one answer for all L
            x = F.scaled_dot_product_attention(q, k, v).masked_fill(~seen, 0.)
        else:                                        # softmax of nothing is not a number, so where
            blind = ~seen.any(-1, keepdim=True)      # nothing is seen: look at all, and drop it
            x = F.scaled_dot_product_attention(q, k, v, seen | blind).masked_fill(blind, 0.)
        return self.proj(x.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """Norm, two layers, a squared ReLU between them (Flamingo, A.1.4): (B, T, C) -> (B, T, C)."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim, bias=False)
        self.fc2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(self.norm(x))).square())


class ResamplerLayer(nn.Module):
    """Latents (B, R, E) look at visual tokens (B, N, E) AND at themselves (Flamingo, fig. 5)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm_visual = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, dim, heads)
        self.mlp = FeedForward(dim)

    def forward(self, latents, visual):
        query = self.norm_latents(latents)
        k, v = self.attn.keys(torch.cat([self.norm_visual(visual), query], 1))
        x = latents + self.attn(query, k, v)
        return x + self.mlp(x)


class Resampler(nn.Module):
    """Perceiver resampler: any number of visual tokens (B, N, E) -> R latents (B, R, E), which
    start as learned queries. Nothing tells the places of the visual tokens but what the eye put
    into them: their order does not matter."""

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


class GatedCrossAttention(nn.Module):
    """Gated cross-attention and a gated feed-forward layer (Flamingo, fig. 4): x (B, T, C), keys
    and values (B, H, L, D), who sees what, from reach() -> (B, T, C). mlp has a norm of its own. A
    token that sees no picture gets 0 from the attention; mlp changes it all the same."""

    def __init__(self, dim, source, heads, start=0.):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, source, heads)
        self.mlp = FeedForward(dim)
        trained = math.isfinite(start)               # tanh(inf) is 1: no gate
        self.attn_gate = nn.Parameter(torch.tensor([start]), requires_grad=trained)
        self.mlp_gate = nn.Parameter(torch.tensor([start]), requires_grad=trained)

    def forward(self, x, k, v, seen):
        x = x + self.attn_gate.tanh() * self.attn(self.norm(x), k, v, seen)      # at 0: the LM,
        return x + self.mlp_gate.tanh() * self.mlp(x)                            # unchanged


class Memory:
    """What a text leaves behind while it is written: the LM's KV cache, and the number of <image>
    marks in each row so far, (B, 1)."""

    def __init__(self, lm, batch):
        self.text = lm.cache(batch)
        self.marks = torch.zeros(batch, 1, dtype=torch.long, device=lm.pos_embed.weight.device)


class Flamingo(nn.Module):
    """tokens (B, T), and M pictures for each text, one for each <image> mark -> logits (B, T, V).
    Pictures (B, M, 3, S, S) go flattened through `see`, then, (B, M, N, E), through `media`. The
    eye is frozen here; the lm as it comes."""

    def __init__(self, lm, eye, patch, image, every=1, latents=8, depth=1, attend="last", start=0.):
        super().__init__()
        self.lm, self.eye, self.patch = lm, eye.requires_grad_(False), patch
        self.image, self.every, self.attend = image, every, attend       # image: token of a mark
        dim, heads = lm.pos_embed.weight.shape[1], lm.blocks[0].attn.heads
        E, own = len(eye.norm.weight), eye.blocks[0].attn.heads
        self.resampler = Resampler(E, depth, own, latents) if latents else nn.LayerNorm(E)
        self.gated = nn.ModuleList(GatedCrossAttention(dim, E, heads, start)
                                   for _ in lm.blocks[::every])
        self.train()

    @torch.no_grad()
    def see(self, pictures):
        """0. Normalised pictures (n, 3, S, S) -> visual tokens (n, N, E), by the frozen eye."""
        return self.eye(patchify(pictures, self.patch))

    def media(self, visual):
        """Visual tokens (B, M, N, E) -> keys and values of each gated layer, (B, H, M, R, D); R is
        N without a resampler."""
        B, M, N, E = visual.shape
        latents = self.resampler(visual.flatten(0, 1))                      # (B M, R, E)
        R = latents.shape[1]
        pairs = (layer.attn.keys(latents.view(B, M * R, E)) for layer in self.gated)
        return [tuple(x.unflatten(2, (M, R)) for x in pair) for pair in pairs]

    def forward(self, tokens, media=None, memory=None):
        """B. media: keys and values, as media() gives them; None: the LM alone. With a memory, from
        memory(), the tokens come behind those that it holds. Raises ValueError where they are more
        than it has room for."""
        lm, T = self.lm, tokens.shape[1]
        cache = memory.text if memory else None
        old, context = cache[0].length if cache else 0, len(lm.pos_embed.weight)
        if old + T > context:
            raise ValueError(f"{old + T} tokens are more than the context of {context} holds")
        if media is not None:
            count = (tokens == self.image).cumsum(1)                        # (B, T) marks so far
            if memory:
                count = count + memory.marks
                memory.marks = count[:, -1:]
            media, seen = reach(media, count, self.attend)
        x = lm.token_embed(tokens) + lm.pos_embed.weight[old:old + T]
        for i, block in enumerate(lm.blocks):
            if media is not None and i % self.every == 0:
                x = self.gated[i // self.every](x, *media[i // self.every], seen)
            x = block(x, cache[i] if cache else None)
        return F.linear(lm.norm(x), lm.token_embed.weight)

    def memory(self, batch):
        """An empty Memory for a batch of texts."""
        return Memory(self.lm, batch)

    def train(self, mode=True):
        """What is frozen stays in evaluation mode: an lm with dropout, say."""
        super().train(mode)
        for part in (self.eye, self.lm):
            part.train(mode and any(p.requires_grad for p in part.parameters()))
        return self


# ------------------------------------------------------------------------------------ the method


def patchify(x, p):
    """Images (B, 3, S, S) -> patches (B, N, P), row by row; inside, too: (row, column, colour)."""
    B, _, S, _ = x.shape
    n = S // p
    return x.reshape(B, 3, n, p, n, p).permute(0, 2, 4, 3, 5, 1).reshape(B, n * n, 3 * p * p)


def reach(media, count, attend="last"):
    """Which pictures a token may look at: the last before it, or all before it (attend).

    media: keys and values (B, H, M, R, D) of each layer; count (B, T): of the marks up to
    each token, its own included. -> keys and values (B, H, L, D) of each layer, and who sees what,
    (B, 1, T, L). A token before the first mark sees nothing. L is M R; or R for a single token and
    its last picture, since then nothing else is needed, and all or nothing is seen, (B, 1, 1, 1).
    """
    B, _, M, R, _ = media[0][0].shape
    if count.shape[1] == 1 and attend == "last":
        which = torch.arange(B, device=count.device) * M + (count[:, 0] - 1).clamp(0, M - 1)
        seen = ((count > 0) & (count <= M))[:, None, :, None]       # all R of them, or nothing
        flat = lambda x: x.transpose(1, 2).flatten(0, 1)            # (B M, H, R, D)
        return [tuple(flat(x).index_select(0, which) for x in pair) for pair in media], seen
    number = torch.arange(1, M + 1, device=count.device)                    # of each picture
    seen = count[:, :, None] == number if attend == "last" else count[:, :, None] >= number
    seen = seen[:, None].repeat_interleave(R, 3)
    return [tuple(x.flatten(2, 3) for x in pair) for pair in media], seen


def contrast(picture, text, scale):
    """The eye's loss: n pictures and their captions as vectors, (n, 64) each; each picture has to
    find its caption among all, and each caption its picture (Flamingo, B.1.3). At chance ln n; it
    cannot reach 0 where two captions are the same."""
    similar = scale * F.normalize(picture.float(), dim=1) @ F.normalize(text.float(), dim=1).T
    own = torch.arange(len(similar), device=similar.device)
    return (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2


def mask(x, image):
    """A. Tokens x (B, 1 + T), -100 behind a text's end -> what the model may see (B, T), and what
    it owes (B, T): the next token, -100 where that is a mark or behind the end."""
    masked, target = x[:, :-1], x[:, 1:]
    end = x[:, :1]                                       # a text begins with the end of one
    return torch.where(masked < 0, end, masked), target.masked_fill(target == image, -100)


def distance(prediction, target):
    """C. Mean cross-entropy of logits (B, T, V) with the tokens owed (B, T), in nats a token."""
    return F.cross_entropy(prediction.flatten(0, 1).float(), target.flatten(), ignore_index=-100)


@torch.inference_mode()
def sample(model, prompts, media, n, end, temperature=0., seed=0, cached=True):
    """Continues each of the prompts, a list of (t,) tokens, up to `end`, which is left out, or by n
    tokens: a list of (n,) or shorter. media: as in Flamingo.forward; pictures are looked at once.

    Written column by column, as in gpt.py; temperature 0 takes the most likely token. Raises
    ValueError where a prompt has more marks than there are pictures, or is longer than the context.
    """
    lengths, device = [len(prompt) for prompt in prompts], model.lm.pos_embed.weight.device
    marks = max(int((torch.as_tensor(prompt) == model.image).sum()) for prompt in prompts)
    if media is not None and marks > media[0][0].shape[2]:
        raise ValueError(f"a text has {marks} <image> marks, and there are "
                         f"{media[0][0].shape[2]} pictures")
    size = min(max(lengths) + n, len(model.lm.pos_embed.weight))
    text = torch.full((len(prompts), max(size, max(lengths))), end, device=device)
    for row, prompt in zip(text, prompts):
        row[:len(prompt)] = torch.as_tensor(prompt)
    ends, generator = torch.tensor(lengths, device=device), torch.Generator().manual_seed(seed)
    memory, ended = model.memory(len(prompts)), torch.zeros_like(ends, dtype=torch.bool)
    forward, new = model.forward, text[:, :min(lengths)]          # never compiled, as in gpt.py
    for t in range(min(lengths), text.shape[1]):
        logits = forward(new, media, memory) if cached else forward(text[:, :t], media)
        logits = logits[:, -1].float()
        logits[:, model.image] = -math.inf                    # it writes, and draws no pictures
        token = logits.argmax(1)
        if temperature > 0:
            p = ((logits - logits.amax(1, keepdim=True)) / temperature).softmax(1)
            token = torch.multinomial(p.cpu(), 1, generator=generator)[:, 0].to(device)
        text[:, t] = torch.where(t >= ends, token, text[:, t])           # a prompt stays as it is
        ended |= (t >= ends) & (text[:, t] == end)
        if ended.all():
            break
        new = text[:, t:t + 1]
    rows = [row[length:][:n] for row, length in zip(text, lengths)]
    return [row[:(row != end).cumprod(0).sum()] for row in rows]


# ------------------------------------------------------------------------------------------ look


EPISODES = "new words", "kept words", "answers"
KEPT = 4        # the first of the new words, which come with no picture in training
TOLD = "colour", "shape", "kind"      # what tells the kind of a figure in words; kind: both
# settings that make another LM, another eye; HOW: either
HOW = "steps", "batch", "lr", "warmup", "weight_decay", "clip", "seed", "dtype"
LM = *HOW, "lm_short", "lm_share", "context", "dim", "depth", "heads"
EYE = *HOW, "images", "image_size", "patch", "eye_dim", "eye_depth", "eye_heads"


class Tokens:
    """Tokenizer of texts with marks: a token a word of the shapes world; or a token a byte, for an
    LM of gpt.py, whose BOS is the end of a chunk and whose byte 0, in no text, marks a picture."""
    WORDS = [*("a is what colour shape it the one of how many figures are there which side "
               "on left right above small large and two three ? , .").split(), *common.COLOURS,
             *common.FIGURES, *common.NEW_WORDS]

    def __init__(self, bytes=False):
        self.bytes, self.words = bytes, ["<end>", "<image>", *self.WORDS] * (not bytes)
        self.end, self.image, self.vocab = (256, 0, 257) if bytes else (0, 1, len(self.words))
        self.short = 135 if bytes else 27                # tokens of a short document
        self.ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text):
        """str -> tokens, a list. Raises UserError for a word that is none of the world's."""
        if not self.words:
            parts = text.replace("<image> ", "\0").replace("<image>", "\0").split("<end>")
            raw = [part.strip(" ").encode(errors="surrogateescape") for part in parts]
            return [t for i, part in enumerate(raw) for t in [256] * (i > 0) + list(part)]
        found = re.findall(r"<\w+>|\w+|[^\w\s]", text)
        unknown = [word for word in found if word not in self.ids]
        if unknown:
            raise common.UserError(f"the LM knows no word {unknown[0]!r}: its words are "
                                   + " ".join(self.words))
        return [self.ids[word] for word in found]

    def decode(self, tokens):
        """Tokens -> str."""
        if self.words:
            return " ".join(self.words[int(t)] for t in tokens)
        return common.Bytes().decode(tokens)


class Scenes:
    """Scenes, two thirds of them (or all) of single figures, and where those of a kind are."""

    def __init__(self, seed, n, kinds, single=False):
        rng = random.Random(seed)
        self.all = [common.scene(rng, 1 if single or i % 2 else None, kinds) for i in range(n)]
        self.single = [i for i, figures in enumerate(self.all) if len(figures) == 1]
        self.of = {}                                     # kind: indices of single figures
        for i in self.single:
            self.of.setdefault(self.all[i][0][:2], []).append(i)


def naming(rng, scenes, names, k, ways, how="kind"):
    """An episode: `ways` new words for as many kinds, k examples and one more: [(index of a scene,
    how, text)]. The words mean something else in each episode, so that the examples alone tell.
    how: what tells a kind in words, one of TOLD; "kind" where that does not tell all apart."""
    kinds, names = rng.sample(sorted(scenes.of), ways), rng.sample(names, ways)
    if how != "kind" and len({kind[("shape", "colour").index(how)] for kind in kinds}) < ways:
        how = "kind"
    order = [i % ways for i in range(k)]
    rng.shuffle(order)
    # it is asked of a kind that was shown, but of another picture, while there are any
    order.append(rng.choice(order or range(ways)))
    own = [rng.sample(scenes.of[kind], min(k + 1, len(scenes.of[kind]))) for kind in kinds]
    at = [own[i].pop() if own[i] else rng.choice(scenes.of[kinds[i]]) for i in order]
    return [(at[j], how, names[i]) for j, i in enumerate(order)]


def answering(rng, scenes, about, k):
    """An episode of answers to one question, which is not asked: k examples and one more."""
    at = rng.sample(range(len(scenes.all)) if about == "number" else scenes.single, k + 1)
    return [(i, "answer", common.question(rng, scenes.all[i], about)[2]) for i in at]


def talk(rng, scenes, k):
    """k captions, and questions with their answers, of any scenes."""
    said = []
    for _ in range(k):
        i = rng.randrange(len(scenes.all))
        if rng.random() < .65:                       # only a caption says the size
            said.append((i, "caption", f"there is {common.caption(scenes.all[i])}"))
        else:
            said.append((i, "question", " ".join(common.question(rng, scenes.all[i])[1:])))
    return said


def document(rng, scenes, names, share, how="kind"):
    """[(scene, how, text)] of one of three sorts; `share` of the documents give new names."""
    sort = rng.random()
    if sort < share:
        return naming(rng, scenes, names, 8, rng.randint(2, 3), how)
    if sort < share + .1:
        return answering(rng, scenes, rng.choice(common.ABOUT[:3]), 8)
    return talk(rng, scenes, 9)


def described(figures, how, text):
    """A chunk with words for the picture. how: one of TOLD, of the first figure; else
    the caption of the whole scene."""
    colour, shape = list(common.COLOURS)[figures[0].colour], common.FIGURES[figures[0].shape]
    words = {"colour": colour, "shape": shape, "kind": common.kind_name(figures[0])}
    return f"{words[how]} {text}" if how in TOLD else f"{common.caption(figures)} . {text}"


def texts(args, tokens, n, length, marks):
    """Documents of the shapes world without pictures: (n, 1 + length). With marks they are more
    like what comes in the join: new words stand behind a colour or a shape alone, too; in three of
    four there are <image> marks, before all or half of the chunks; and in half of these some marks
    have no words beside them that stand for the picture."""
    rng, scenes = random.Random(args.seed), Scenes(args.seed, 8000, common.KINDS)
    rows = torch.full((n, length + 1), tokens.end)
    how, share, marked, bare = "kind", .6, 0, 0      # the last two: shares of chunks, and of marks
    for row in rows:
        said = [tokens.end]
        while len(said) < len(row):
            if marks:
                how, share = rng.choice((*TOLD, "kind")), args.lm_share
                marked, bare = rng.choice((0, .5, 1, 1)), rng.choice((0, .6))
            for i, told, text in document(rng, scenes, common.NEW_WORDS, share, how):
                mark = rng.random() < marked
                if not mark or rng.random() >= bare:
                    text = described(scenes.all[i], told, text)
                said += tokens.encode("<image> " * mark + f"{text} <end>")
        row.copy_(torch.tensor(said[:len(row)]))
    return rows


def interleaved(args, tokens, scenes, n, length, share):
    """Documents with pictures, `share` of them about new words: tokens (n, 1 + length), -100 behind
    the last chunk that fits, and the indices of their scenes (n, M), 0 where there are fewer."""
    rng, names = random.Random(args.seed + 1), common.NEW_WORDS[KEPT:]
    x, at = torch.full((n, length + 1), -100), torch.zeros(n, 9, dtype=torch.long)
    for row, places in zip(x, at):
        said, shown = [tokens.end], []
        while not shown:                             # a caption in bytes may not fit
            how = rng.choice(("colour", "shape"))
            for i, told, text in document(rng, scenes, names, share, how):
                if told in TOLD and rng.random() < .4:     # the picture, and in words, too: what
                    text = described(scenes.all[i], told, text)   # the LM can do shows the way
                chunk = tokens.encode(f"<image> {text} <end>")
                if len(said) + len(chunk) > len(row):
                    break
                said, shown = said + chunk, shown + [i]
        row[:len(said)] = torch.tensor(said)
        places[:len(shown)] = torch.tensor(shown)
    return x, at[:, :(x == tokens.image).sum(1).max()]


def part(args, name):
    """Settings of a stage, which is kept in --out/name."""
    return dataclasses.replace(args, out=f"{args.out}/{name}", resume=False, compile=False, **{
        setting: getattr(args, f"{name}_{setting}") for setting in ("steps", "batch", "lr")})


def learn_language(args, tokens):
    """A GPT learns the language of the shapes world, from text alone. Returns its folder."""
    how = part(args, "lm")
    if common.stage_done(how, LM):
        return how.out
    torch.manual_seed(args.seed)
    model = GPT(tokens.vocab, args.context, args.dim, args.depth, args.heads)
    with torch.no_grad():                        # its 0.02 is for GPT-2's 768 channels
        for p in model.parameters():
            p *= math.sqrt(768 / args.dim) if p.ndim > 1 else 1.
        model.token_embed.weight[tokens.image] = 0
    common.say(f"First the LM, which learns the language from text alone ({how.out}).")
    silent = torch.tensor(tokens.image, device=args.device)      # a mark by itself says nothing
    model.token_embed.weight.register_hook(lambda gradient: gradient.index_fill(0, silent, 0.))
    first, most = round(args.lm_short * how.steps), 60_000
    short = texts(args, tokens, min(first * how.batch, most), tokens.short, marks=False)
    long = texts(args, tokens, min((how.steps - first) * how.batch, most), args.context, marks=True)
    short, long = short.to(args.device), long.to(args.device)
    run = common.Run(how, model.to(args.device), chance=math.log(tokens.vocab))
    with common.stage("the LM", run):
        for step in run:
            x = run.batch(short if step < first else long)
            masked, target = mask(x, tokens.image)
            prediction = model(masked)
            loss = distance(prediction, target)
            run.update(loss)
    return how.out


def normalize(pictures):
    """uint8 -> about mean 0 and variance 1, on this dark ground."""
    return (pictures.float() / 255 - .2) / .2


def learn_to_see(args, tokens, scenes, pictures):
    """A ViT learns which caption belongs to a picture (n, 3, S, S). Returns its folder."""
    how = part(args, "eye")
    if common.stage_done(how, EYE):
        return how.out
    torch.manual_seed(args.seed)
    eye = ViT(args.image_size // args.patch, 3 * args.patch ** 2, args.eye_dim, args.eye_depth,
              args.eye_heads)
    model = Captioned(eye, tokens.vocab, args.eye_dim, args.patch)
    common.say(f"Then the eye, which learns to tell pictures by their captions ({how.out}).")
    captions = torch.zeros(len(pictures), 16, dtype=torch.long)
    for row, figures in zip(captions, scenes.all):
        words = tokens.encode(common.caption(figures))
        row[:len(words)] = torch.tensor(words)
    captions = captions.to(args.device)
    alike = [torch.tensor([i for kind, own in scenes.of.items() if kind[1] == colour for i in own])
             for colour in range(len(common.COLOURS))]         # single figures of one colour
    run = common.Run(how, model.to(args.device), chance=math.log(how.batch))
    with common.stage("the eye", run):
        for step in run:
            i = run.batch(torch.arange(len(pictures), device=args.device))
            if step % 3:                             # hard negatives: only shape, size and side
                own = alike[step % len(alike)]       # tell them apart
                i = own[torch.randint(len(own), (how.batch,))].to(args.device)
            loss = contrast(*model(normalize(pictures[i]), captions[i]))
            run.update(loss)
    return how.out


def load_lm(args, folder):
    """The LM in a folder of a run of gpt.py, or of this script, its tokenizer, and the seconds that
    its training took."""
    state = common.read_checkpoint(folder, "gpt.py", common.script(), flag="--lm",
                                   otherwise="python gpt.py makes one, or leave out --lm")
    how, weights = state["args"], state["model"]
    common.require("token_embed.weight" in weights, f"{folder} holds no LM: try --lm {folder}/lm")
    vocab, context = (len(weights[f"{name}_embed.weight"]) for name in ("token", "pos"))
    tokens = Tokens(bytes=state["script"] == "gpt.py")
    common.require(not tokens.bytes or not common.is_images(how["data"]), f"the LM in {folder} was "
                   f"trained on images ({how['data']}), and this is about text: take another --lm")
    common.require(vocab == tokens.vocab, f"the LM in {folder} has {vocab} tokens, and "
                   f"{tokens.vocab} are due: train it anew with this version")
    common.require(context > 40, f"the LM in {folder} has a context of {context} tokens: 41 or "
                   "more are needed for a picture, a question and its answer")
    lm = GPT(vocab, context, how["dim"], how["depth"], how["heads"])     # from now on no dropout
    lm.load_state_dict(weights)
    return lm.requires_grad_(not args.freeze), tokens, state["seconds"]


def load_eye(args, folder):
    """The eye in a folder of a run of mae.py, or of this script, the side of its patches, and the
    seconds that its training took."""
    state = common.read_checkpoint(folder, "mae.py", common.script(), flag="--eye",
                                   otherwise="python mae.py makes one, or leave out --eye")
    how, own = state["args"], state["script"] == common.script()
    prefix, names = ("eye.", ("eye_dim", "eye_depth", "eye_heads")) if own else \
        ("encoder.", ("dim", "depth", "heads"))
    weights = {k[len(prefix):]: v for k, v in state["model"].items() if k.startswith(prefix)}
    alone = not own or "of_reader.weight" in state["model"]       # a join has an eye. in it, too
    common.require(weights and alone, f"{folder} holds no eye: try --eye {folder}/eye")
    patch, pixels = how["patch"], weights["patch_embed.weight"].shape[1]
    common.require(args.image_size % patch == 0, f"the eye in {folder} has patches of {patch} "
                   f"pixels, which do not divide --image-size {args.image_size}")
    eye = ViT(args.image_size // patch, pixels, *(how[name] for name in names))
    eye.load_state_dict(weights)
    return eye, patch, state["seconds"]


def optimizer(args, model):
    """AdamW. The resampler does not decay (Flamingo, B.1.2); the gates learn at --gate-lr times the
    learning rate: everything passes through them, and Adam moves a number by about the rate."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gates = [p for name, p in named.items() if name.endswith("gate")]
    resampler = [p for name, p in named.items() if name.startswith("resampler")]
    rest = [p for name, p in named.items() if not name.startswith("resampler")
            and not name.endswith("gate")]
    adamw = common.adamw(rest, args.lr, args.weight_decay)
    adamw.add_param_group(dict(params=resampler, weight_decay=0.))
    if gates:
        adamw.add_param_group(dict(params=gates, weight_decay=0., times=args.gate_lr))
    return adamw


@torch.no_grad()
def views(args, model, pictures):
    """What the frozen eye sees, once for all: (n, N, E) bfloat16, half of float32's memory."""
    with common.autocast(args):
        return torch.cat([model.see(normalize(x)).bfloat16() for x in pictures.split(500)])


def held_out(args):
    """Scenes to test on, of kinds that were seen; single figures of kinds that were not; scenes for
    episodes; and the pictures of all, behind each other."""
    seed = args.seed + 1_000_000
    parts = (Scenes(seed, args.tests, common.SEEN),
             Scenes(seed + 1, args.tests, common.UNSEEN, single=True),
             Scenes(seed + 2, 2000, common.SEEN))
    scenes = [figures for part in parts for figures in part.all]
    return *parts, common.paint(scenes, seed, args.image_size, args.device)


class Query(NamedTuple):
    """Something to be asked. group: what sort it is; prompt: with marks for pictures; at: of these
    held-out scenes; answer; told: the prompt with words in the place of the pictures."""
    group: str
    prompt: str
    at: list
    answer: str
    told: str


def queries(args, scenes, unseen, others, context, tokens):
    """All that is asked at the end, sorted by group, as far as it fits the context; `told` is ""
    where the words do not fit."""
    rng, asked = random.Random(args.seed + 2), []
    for i, figures in enumerate([*scenes.all, *unseen.all]):
        sort = "unseen kind" if i >= len(scenes.all) else \
            ("1 figure", "2 figures", "3 figures")[len(figures) - 1]
        caption = common.caption(figures)
        asked.append(Query(f"caption, {sort}", "<image> there is", [i], caption,
                           described(figures, "caption", "there is")))
        for about in common.ABOUT:
            _, question, answer = common.question(rng, figures, about)
            if question:
                group = sort if len(figures) == 1 else "2 or 3 figures"
                asked.append(Query(f"{about}, {group}", f"<image> {question}", [i], answer,
                                   described(figures, "question", question)))
    first = len(scenes.all) + len(unseen.all)
    for k in args.shots:
        for _ in range(args.tests):
            for name, episode in (
                    ("new words", naming(rng, others, common.NEW_WORDS[KEPT:], k, 2)),
                    ("kept words", naming(rng, others, common.NEW_WORDS[:KEPT], k, 2)),
                    ("answers", answering(rng, others, rng.choice(common.ABOUT[:3]), k))):
                shown = " <end> ".join(f"<image> {text}" for _, _, text in episode)
                told = " <end> ".join(described(others.all[i], how, text)
                                      for i, how, text in episode)
                answer = shown.split()[-1]
                asked.append(Query(f"{name}, {k}", shown.removesuffix(answer).strip(),
                                   [first + i for i, _, _ in episode], answer,
                                   told.removesuffix(answer).strip()))
    fits = lambda text, q: len(tokens.encode(f"<end> {text} {q.answer} <end>")) <= context
    asked = [q if fits(q.told, q) else q._replace(told="") for q in asked if fits(q.prompt, q)]
    return sorted(asked, key=lambda q: q.group)


def ask(args, model, tokens, asked, visual, how="pictures"):
    """The answers to queries, as texts. how: pictures; blind, the LM alone, without pictures or
    marks; told, the LM alone, with words in their place."""
    said = []
    for part in (asked[i:i + 250] for i in range(0, len(asked), 250)):
        prompts = [tokens.encode(f"<end> {q.told if how == 'told' else q.prompt}")
                   for q in part]
        media, n = None, 1 + max(len(tokens.encode(q.answer)) for q in part)
        with common.autocast(args), torch.inference_mode():
            if how != "pictures":
                prompts = [[t for t in prompt if t != tokens.image] for prompt in prompts]
            else:
                most = max(len(q.at) for q in part)
                at = torch.tensor([q.at + [0] * (most - len(q.at)) for q in part])
                media = model.media(visual[at.to(visual.device)].float())
            new = sample(model, prompts, media, n, tokens.end)
        said += [tokens.decode(row).strip() for row in new]
    return said


def evaluate(args, model, tokens, asked, visual):
    """{group: {who: % of the answers that are right to the word}}; who: flamingo; lm, the
    LM alone; told, the LM alone with words in the place of pictures, if it can be; majority."""
    found, answers = {}, {}
    seen_caption = lambda q: q.group.startswith("caption") and "unseen" not in q.group
    groups = lambda q: [q.group, "caption, all"] if seen_caption(q) else [q.group]
    for who, how in ("flamingo", "pictures"), ("lm", "blind"), ("told", "told"):
        own = [q for q in asked if q.told or how != "told"]
        for q, said in zip(own, ask(args, model, tokens, own, visual, how)):
            for group in groups(q):
                found.setdefault(group, {}).setdefault(who, []).append(said == q.answer)
    for q in asked:
        for group in groups(q):
            answers.setdefault(group, []).append(q.answer)
    for group, right in found.items():
        for who, rows in right.items():
            right[who] = 100 * sum(rows) / len(rows)
        most = max(map(answers[group].count, set(answers[group])))
        right["majority"] = 100 * most / len(answers[group])
    return dict(sorted(found.items()))


def prompt_tokens(args, tokens, context, n):
    """The tokens of --prompt, for n pictures; None without one. Raises UserError where it has more
    marks than there are pictures, or does not fit the context."""
    if not args.prompt:
        return None
    prompt = tokens.encode(f"<end> {args.prompt}")
    marks = prompt.count(tokens.image)
    common.require(marks <= n, f"--prompt has {marks} <image> marks, and there are {n} pictures of "
                   f"--data {args.data}")
    common.require(len(prompt) < context, f"--prompt has {len(prompt)} tokens, and the context of "
                   f"{context} has to hold it and its answer: shorten it")
    return prompt


def own_pictures(args):
    """The pictures of --data, (n, 3, S, S) uint8, or None for held-out scenes. Raises UserError."""
    if args.data == "scenes":
        return None
    common.require(args.data.endswith(".npz"), "--data takes scenes, or an .npz with pictures that "
                   f"--prompt is about, not {args.data!r}")
    common.require(args.prompt, f"--data {args.data} needs a --prompt about its pictures, such as "
                   '"<image> what colour is it ?"')
    return common.read_pictures(Path(args.data), args.image_size, args.device)


def reply(args, model, tokens, prompt, visual):
    """What the model says to --prompt, whose marks stand for visual tokens (n, N, E) in order."""
    with common.autocast(args), torch.inference_mode():
        media = model.media(visual[None, :max(1, prompt.count(tokens.image))].float())
        (new,) = sample(model, [prompt], media, 40, tokens.end, args.temperature, args.seed)
    return tokens.decode(new).strip()


def look(args, model, tokens, asked, visual, pictures):
    """Writes scenes.png, twelve held-out scenes; returns what is said of each, a list of lines."""
    chosen = []
    for i in range(12):                              # its caption, and one of the questions
        own = [q for q in asked if q.at == [i] and not q.group.startswith(EPISODES)]
        chosen += [q for q in own if q.group.startswith("caption")]
        chosen += [q for q in own if q not in chosen][i % 3:][:1]
    lines, replies = [], ask(args, model, tokens, chosen, visual)
    for q, said in zip(chosen, replies):
        wrong = "" if said == q.answer else f"   (it is: {q.answer})"
        number = f"{q.at[0] + 1:>2}" if q.group.startswith("caption") else "  "
        lines.append(f"{number}  {q.prompt.removeprefix('<image> ')} {said}{wrong}")
    common.save_png(f"{args.out}/scenes.png", pictures[:12].float() / 255, 6)
    return lines


def tell(args, run, model, found, lines, answer, seconds):
    """The end of the run, in words and in result.json; seconds: of the LM's and the eye's
    training."""
    print()
    common.say(f"Said of twelve held-out scenes, six in a row of {args.out}/scenes.png:")
    print()
    for line in lines:
        common.say(line, "    ")
    print()
    shots = [k for k in args.shots if f"new words, {k}" in found]
    table = [["right to the word, %", "Flamingo", "LM, told", "LM alone", "most frequent"]]
    number = lambda group, who: f"{found[group][who]:.1f}" if who in found.get(group, {}) else "-"
    table += [[group, *(number(group, who) for who in ("flamingo", "told", "lm", "majority"))]
              for group in found if not group.startswith(EPISODES)]
    print(f"{common.table(table)}\n")
    table = [["examples before the question", *map(str, shots)]]
    for name, what in zip(EPISODES, ("its new word", "a word kept back", "question not asked")):
        for who, title in ("flamingo", "Flamingo"), ("told", "LM, told"), ("lm", "LM alone"):
            table.append([f"{what}, {title}", *(number(f"{name}, {k}", who) for k in shots)])
    print(f"{common.table(table)}\n")
    if max(shots, default=0) > 1:
        common.say("After 1 example the new word is the one that was shown; from 2 on it is one of "
                   "two, and chance is 50 %.")
        print()
    gates = [[layer.attn_gate.tanh().item(), layer.mlp_gate.tanh().item()] for layer in model.gated]
    table = [["tanh of the gates before block", *(str(i * args.every) for i in range(len(gates)))]]
    table += [[name, *(f"{gate[i]:.2f}" for gate in gates)]
              for i, name in enumerate(("attention", "feed-forward"))]
    print(f"{common.table(table)}\n")
    if answer is not None:
        common.say(f"{args.prompt} -> {answer}")
    captions = found["caption, all"]["flamingo"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    common.say(f"Trained were {trained:,} of {sum(p.numel() for p in model.parameters()):,} "
               f"parameters. Of the captions {captions:.1f} % are right to the word.")
    common.report(run, f"captions {captions:.1f} %", dict(
        right=found, shots=shots, gates=gates, lines=lines, trained=trained, stages=seconds))


# ------------------------------------------------------------------------------------------ main


def main(args):
    own = own_pictures(args)
    scenes = Scenes(args.seed, args.images, common.SEEN)
    pictures = common.paint(scenes.all, args.seed, args.image_size, args.device)
    world, there = Tokens(), args.tests if own is None else len(own)     # pictures for a prompt
    if args.eye:                                     # mistakes are better found before the training
        load_eye(args, args.eye)
    if not args.lm:
        prompt_tokens(args, world, args.context, there)
    lm, tokens, lm_seconds = load_lm(args, args.lm or learn_language(args, world))
    context = len(lm.pos_embed.weight)
    prompt = prompt_tokens(args, tokens, context, there)
    eye, patch, eye_seconds = load_eye(args, args.eye
                                       or learn_to_see(args, world, scenes, pictures))
    torch.manual_seed(args.seed)
    latents = args.latents if args.resample else 0
    model = Flamingo(lm, eye, patch, tokens.image, args.every, latents, args.resampler_depth,
                     args.attend, args.gate_start).to(args.device)
    common.say("Last, what joins them.")
    run = common.Run(args, model, optimizer(args, model))
    if run.step < args.steps:
        visual = views(args, model, pictures)                                      # (n, N, E)
        first = round(args.short * args.steps)
        # first short documents, 70 % of them about new words; then long ones, 30 %
        short, long = ([t.to(args.device) for t in interleaved(
            args, tokens, scenes, min(max(1, n * args.batch), 60_000), length, share)]
            for n, length, share in ((first, min(tokens.short, context), .7),
                                     (args.steps - first, context, .3)))
    for step in run:
        x, at = short if step < first else long      # the long ones begin in the midst of an epoch
        i = run.batch(torch.arange(len(x), device=args.device))
        masked, target = mask(x[i], tokens.image)
        prediction = model(masked, model.media(visual[at[i]].float()))
        loss = distance(prediction, target)
        run.update(loss)

    model.eval()
    *scenes, pictures = held_out(args)
    asked, visual = queries(args, *scenes, context, tokens), views(args, model, pictures)
    found = evaluate(args, model, tokens, asked, visual)
    lines = look(args, model, tokens, asked, visual, pictures)
    answer = prompt and reply(args, model, tokens, prompt,
                              visual if own is None else views(args, model, own))
    tell(args, run, model, found, lines, answer, [lm_seconds, eye_seconds])


if __name__ == "__main__":
    common.start(main, Args)
