"""LoRA: change a pre-trained model a little bit, beside other answers to what should be trained.

Paper    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
         (IA)^3: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper
         than In-Context Learning" (T-Few), arXiv 2205.05638

Idea     A GPT knows one text and is to learn another from k short examples. Two aims: keep what it
         knew, and do not store a new version of every parameter. A matrix is an associative
         memory: W x = sum_i v_i (k_i . x) finds how alike x is to each key k_i, and adds up the
         values v_i in that proportion (singular vectors, times their singular values, are such
         keys and values). To change it "a little bit" is to add a few memories: W0 + A B^T, with
         the columns of B as keys and those of A as values, and W0 frozen.

Loss     GPT's, L = -1 / T sum_t log p(x_t | BOS, newline, x_1 ... x_{t-1}), over what is trained:
         lora    A, B of y = W0 x + (alpha / rank) A B^T x        rank (d1 + d2) a matrix (d1, d2)
         ia3     three vectors l a block: l_k * (W_k x), l_v * (W_v x), W_2 (l_f * gelu(W_1 x))
         bias    all biases
         first, middle, last: two blocks at that place in the GPT; full: all of it
         prompt  nothing: the k examples stand in the prompt ("in-context learning")

Flow     before       a GPT learns the old text, as in gpt.py (once: it is kept in --out/base)
         k examples (k, 1 + T) of the new text: a newline, and the T bytes behind it
         A. mask      shift: BOS in front, the last one off   -> (B, 1 + T); owed: x but the newline
         B. predict   the GPT, with what was added to it      -> logits (B, 1 + T, 257)
         C. compare   cross-entropy of the T bytes
         after that   loss on the new text and on the OLD one (what was forgotten), bytes to store

Run      python lora.py
Expect   64 examples of pycode, beginnings of lines, bring the loss on others from 1.95 ± 0.02 to
         1.78 ± 0.01 nats a token with LoRA, 2.9 % of the parameters, and to 1.78 ± 0.01
         with all of them; that on whole windows of pydocs goes from 1.52 ± 0.00 to
         1.57 ± 0.00 and 1.56 ± 0.01 (3 bases; 45 s for all methods after 109 s for the
         base, on 2 threads; AMD EPYC, 2 cores, torch 2.13.0+cpu)
Differs  As in LoRA's paper: alpha / rank, one factor normal at first, the other zero (with the
         names swapped: there W0 + B A). Other than there: on every matrix of a block, not on
         attention's alone; query, key and value are one matrix, so that their updates share the
         keys B; and alpha is the rank unless it is given. (IA)^3 without
         T-Few's two other losses and its pre-training of the vectors.

Try      (each with --out runs/other --base runs/lora/base, which is kept)
         --method lora --rank 1: is one memory enough? And --where qkv --rank 12, which costs as
         much as --rank 3?
         --lr 0.001, 0.003, 0.01: which method breaks first, and what does it forget?
         --k 1 2 4: do examples help more in training, or in the prompt?
"""
import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

import common

# -------------------------------------------------------------------------------------- settings

Method = Literal["all", "lora", "ia3", "bias", "first", "middle", "last", "full", "prompt"]
FREE = "method", "k", "draws", "prompt", "length", "temperature"     # change no training
# Best on average over k = 1 to 256, of three or four rates each, chosen on the texts that are
# reported; some are the lowest rate that was tried: results/lora-search.json
LR = dict(lora=1e-3, ia3=1e-2, bias=1e-3, first=1e-4, middle=1e-4, last=1e-4, full=5e-5)


@dataclass
class Args(common.Args):
    """Settings of lora.py: for a GPU, and under `cpu` smaller ones for two cores."""
    passes: int = 20                # times that each example is seen: passes x k / batch steps
    steps: int = 1000               # training steps of an adaptation, at most
    batch: int = 16                 # examples a step, at most k
    lr: float = 0.                  # peak learning rate; 0: the best of a search, for each method
    warmup: float = 0.1             # share of the steps in which the learning rate rises
    weight_decay: float = 0.01      # AdamW's decay, on matrices only (LoRA, E2E recipe)
    data: str = "pycode"            # new text: pycode, pydocs, shakespeare, a file or a folder
    method: Method = "all"          # what is trained (prompt: nothing, the examples stand in it)
    k: tuple[int, ...] = (1, 4, 16, 64, 256)    # numbers of examples
    draws: int = 3                  # repeats with other examples and first weights, for the spread
    example: int = 24               # bytes of an example: the beginning of a line, and on
    where: str = "qkv,proj,fc1,fc2"    # LoRA: matrices of each block that get memories
    rank: int = 3                   # LoRA: memories that each of them gets
    alpha: float = 0.               # LoRA: the update is scaled by alpha / rank; 0: not scaled
    dropout: float = 0.             # LoRA: share of its inputs dropped
    adapter: str = ""               # an adapter to look at, in place of training one
    base: str = ""                  # folder of a run of gpt.py; else one is trained in --out/base
    old: str = ""                   # base: text that it knows (default pydocs, or that of --base)
    base_steps: int = 5000          # base: training steps
    base_batch: int = 64            # base: windows of the text a step
    base_lr: float = 1e-3           # base: peak learning rate
    base_dropout: float = 0.2       # base: share of the channels dropped
    context: int = 256              # base: tokens that it can see, with BOS
    dim: int = 384                  # base: channels
    depth: int = 6                  # base: blocks
    heads: int = 6                  # base: attention heads
    prompt: str = "def "            # what the samples begin with
    length: int = 150               # bytes of a sample
    temperature: float = 0.8        # divides the logits: 1 as it learned, less prefers the likely

    cpu = dict(k=(4, 64), base_steps=2400, base_batch=8, base_lr=3e-3, base_dropout=0.,
               context=128, dim=128, depth=4, heads=4)

    def check(self):
        common.require(self.steps > 0, f"--steps must be 1 or more, not {self.steps}: --resume "
                       "alone looks again")
        super().check()
        self.at_least(1, "k", "draws", "passes", "rank", "base_steps", "base_batch", "depth",
                      "length")
        self.at_least(2, "example")
        self.at_least(0, "alpha", "base_lr")
        self.multiple("dim", "heads")
        self.below_1("dropout", "base_dropout")
        need = common.require
        need(len(set(self.k)) == len(self.k), f"--k {common.words(self.k)} names a number twice")
        need(self.context > 1, f"--context must be 2 or more, not {self.context}: BOS and a token")
        need(0 < self.temperature < math.inf, "--temperature must be above 0, not "
             f"{self.temperature}")


# ------------------------------------------------------------------------------------- the model
# B batch, T tokens that are new, L tokens in all, C channels, H heads, D = C / H, V vocabulary.
# As far as GPT it is gpt.py's model, word for word.


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
    """B. GPT-2: tokens (B, T) -> logits of the token after each, (B, T, V).

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


class LoRA(nn.Module):
    """W0 x + (alpha / rank) A B^T x (+ bias): a frozen nn.Linear with `rank` memories more.

    x (..., d2) -> (..., d1); A (d1, rank) and B (d2, rank) are trained. B holds the keys that x is
    compared with, A the values that are added. Raises ValueError where the rank is below 1 or above
    min(d1, d2).
    """

    def __init__(self, linear, rank, alpha, dropout=0.):
        super().__init__()
        d1, d2 = linear.weight.shape
        if not 1 <= rank <= min(d1, d2):
            raise ValueError(f"rank {rank} of a {d1} x {d2} matrix: it can be 1 to {min(d1, d2)}")
        self.linear = linear.requires_grad_(False)
        self.scale, self.dropout, self.merged = alpha / rank, dropout, False
        # One factor is zero, so that training starts from W0 itself. Not both: each one's gradient
        # is a product with the other, and with both at zero neither would ever move. Not neither:
        # W0 + A B^T would be noise on what the model knows. A is the zero: the first step writes
        # values for keys that are there, at random; then the keys move, too.
        self.A = nn.Parameter(linear.weight.new_zeros(d1, rank))
        self.B = nn.Parameter(linear.weight.new_empty(d2, rank).normal_(std=d2 ** -.5))

    def forward(self, x):
        y = self.linear(x)
        if self.merged:
            return y
        match = F.linear(F.dropout(x, self.dropout, self.training), self.B.T)       # (..., rank)
        return y + F.linear(match, self.scale * self.A)

    def update(self):
        """What is added to the weight: (d1, d2)."""
        return self.scale * self.A @ self.B.T

    @torch.no_grad()
    def merge(self):
        """Adds the update to the weight: from now on it costs what the plain layer costs. For use,
        not for training."""
        if not self.merged:
            self.linear.weight += self.update()
        self.merged = True

    @torch.no_grad()
    def unmerge(self):
        """Takes it out again, up to rounding."""
        if self.merged:
            self.linear.weight -= self.update()
        self.merged = False


class IA3(nn.Module):
    """(IA)^3: a frozen nn.Linear, with its inputs, or the last of its outputs, times a vector that
    is trained, at first all ones. x (..., d2) -> (..., d1); outputs: how many; 0: the inputs."""

    def __init__(self, linear, outputs=0):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.outputs, self.merged = outputs, False
        self.scale = nn.Parameter(linear.weight.new_ones(outputs or linear.in_features))

    def forward(self, x):
        if self.merged:
            return self.linear(x)
        if not self.outputs:
            return self.linear(x * self.scale)
        others = self.linear.out_features - self.outputs
        return self.linear(x) * F.pad(self.scale, (others, 0), value=1.)

    @torch.no_grad()
    def merge(self):
        """Multiplies the weight: from now on it costs what the plain layer costs."""
        if not self.merged and self.outputs:
            for tensor in self.linear.parameters():                  # weight (d1, d2), bias (d1)
                tensor[-self.outputs:] *= self.scale.view(-1, *[1] * (tensor.ndim - 1))
        elif not self.merged:
            self.linear.weight *= self.scale
        self.merged = True


# ------------------------------------------------------------------------------------ the method


def mask(x, bos):
    """A. Tokens x (B, T) -> what the model may see before each of them, (B, T), and the tokens it
    owes (has to predict), (B, T).

    Shifting by one, with causal attention behind it, hides x_t and all that follows from the place
    that predicts x_t.
    """
    return F.pad(x[:, :-1], (1, 0), value=bos), x


def distance(prediction, target):
    """C. Mean cross-entropy of logits (B, T, V) with tokens (B, T), in nats a token."""
    return F.cross_entropy(prediction.flatten(0, 1).float(), target.flatten())


def linears(model, where):
    """The linear layers of all blocks that have one of the names: {path in the model: nn.Linear}.
    Raises ValueError for a name that no layer has."""
    found = {f"blocks.{path}": layer for path, layer in model.blocks.named_modules()
             if isinstance(layer, nn.Linear)}
    names = list(dict.fromkeys(path.split(".")[-1] for path in found))
    for name in where:
        if name not in names:
            raise ValueError(f"there is no matrix {name!r} in a block: it has {', '.join(names)}")
    return {path: layer for path, layer in found.items() if path.split(".")[-1] in where}


def adapt(model, method, where=("qkv", "proj", "fc1", "fc2"), rank=3, alpha=3., dropout=0.):
    """Freezes a GPT, in place, but for what the method trains. Returns the model; what is trained
    are its tensors that take gradients, and at first it computes what it computed before."""
    model.requires_grad_(False)
    depth, dim = len(model.blocks), model.pos_embed.weight.shape[1]
    if method == "lora":
        for path, linear in linears(model, where).items():
            model.set_submodule(path, LoRA(linear, rank, alpha, dropout))
    elif method == "ia3":
        for block in model.blocks:
            block.attn.qkv = IA3(block.attn.qkv, outputs=2 * dim)          # keys and values
            block.mlp.fc2 = IA3(block.mlp.fc2)                             # after the GELU
    elif method == "bias":
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias"))
    elif method in ("first", "middle", "last"):             # below 4 blocks they overlap
        i = {"first": 0, "middle": (depth - 2) // 2, "last": depth - 2}[method]
        model.blocks[max(0, i):max(0, i) + 2].requires_grad_(True)
    elif method == "full":
        model.requires_grad_(True)
    elif method != "prompt":
        raise ValueError(f"there is no method {method!r}")
    return model


def trained(model):
    """The tensors that take gradients, by name: they are the adapter, all that has to be stored."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def prompted(examples, x):
    """In-context learning: k examples (k, T), behind each other, in front of all texts x (B, T'):
    (B, k T + T'). What parts them is in them: here each begins with a newline."""
    return torch.cat([examples.flatten().expand(len(x), -1), x], 1)


def spectrum(update):
    """Of an update of a matrix (d1, d2), how much of its squared length lies in its 1, 2, ... most
    important directions: (min(d1, d2),), rising to 1. A rank r update has all in r of them."""
    squares = torch.linalg.svdvals(update.float()).square()
    return squares.cumsum(0) / squares.sum().clamp(min=1e-30)


@torch.inference_mode()
def sample(model, prompt, n, temperature=1., seed=0):
    """Continues a prompt of (t,) tokens by n: (n,), t + n within the context. With the KV cache;
    gpt.py has the whole story."""
    g, cache, text = torch.Generator().manual_seed(seed), model.cache(1), []
    new = prompt[None].to(model.pos_embed.weight.device)
    for _ in range(n):
        logits = model(new, cache)[:, -1].float()
        p = ((logits - logits.max()) / temperature).softmax(1)
        text.append(torch.multinomial(p.cpu(), 1, generator=g))
        new = text[-1].to(new.device)
    return torch.cat(text, 1)[0]


# ------------------------------------------------------------------------------------------ look


BYTES = common.Bytes()
BOS, NEWLINE = BYTES.BOS, ord("\n")
# settings that make another base
BASE = "steps", "batch", "lr", "weight_decay", "warmup", "clip", "seed", "dtype", "data", \
    "context", "dim", "depth", "heads", "dropout"


@dataclass
class Base:
    """A pre-trained GPT: the model, its context in tokens, the text that it knows, its name, which
    says who it is, and the seconds that its training took."""
    model: nn.Module
    context: int
    data: str
    name: str
    seconds: float


def pretrain(args):
    """Trains the base, as gpt.py does, unless it is there already. Returns its folder."""
    how = dataclasses.replace(args, steps=args.base_steps, batch=args.base_batch, lr=args.base_lr,
                              dropout=args.base_dropout, weight_decay=.1, warmup=.05,
                              data=args.old or "pydocs", out=f"{args.out}/base", resume=False)
    if common.stage_done(how, BASE):
        return how.out
    train = windows(args, how.data, args.context)[0]
    model = GPT(BYTES.vocab, args.context, args.dim, args.depth, args.heads, args.base_dropout)
    check_base(args, model)
    common.say(f"First the base, a GPT that learns {how.data}. It is kept in {how.out}, for the "
               "next time.")
    run = common.Run(how, model.to(args.device), chance=math.log(BYTES.vocab))
    with common.stage("the base", run):
        for step in run:
            masked, target = mask(run.batch(train).long(), BOS)
            prediction = model(masked)
            loss = distance(prediction, target)
            run.update(loss)
    return how.out


def check_base(args, model):
    """Raises UserError where the model has no matrix --where, or --rank or a text does not fit."""
    try:
        adapt(copy.deepcopy(model), "lora", args.where.split(","), args.rank)
    except ValueError as error:
        raise common.UserError(f"--where {args.where} --rank {args.rank}: {error}") from None
    context, n = len(model.pos_embed.weight), len(args.prompt.encode(errors="surrogateescape"))
    common.require(args.example < context > n + 2, f"the base's context of {context} tokens is too "
                   f"short for --example {args.example}, or for --prompt with {n} bytes")
    room = context // (args.example + 1) - 1
    common.require(fits(args, context), f"no --k fits: the base's context of {context} tokens has "
                   f"room for {room} examples of {args.example} bytes, and a text of that length "
                   "behind them")


def load_base(args, folder):
    """The base in a folder of a run of gpt.py or of lora.py."""
    state = common.read_checkpoint(folder, "gpt.py", "lora.py", flag="--base",
                                   otherwise="python gpt.py makes one, or leave out --base")
    common.require("model" in state, f"{folder} holds no base: try --base {folder}/base")
    how, weights = state["args"], state["model"]
    common.require(not common.is_images(how["data"]), f"the base in {folder} was trained on images "
                   f"({how['data']}), and this is about text: take another --base")
    vocab, context = (len(weights[f"{name}_embed.weight"]) for name in ("token", "pos"))
    model = GPT(vocab, context, how["dim"], how["depth"], how["heads"])     # from now on no dropout
    model.load_state_dict(weights)
    check_base(args, model)
    name = (f"{how['depth']} x {how['dim']} GPT of {how['data']}, step {state['step']}, "
            f"{common.fingerprint(weights)}")
    return Base(model.to(args.device).eval(), context, args.old or how["data"], name,
                state["seconds"])


def windows(args, name, T):
    """Stretches of T tokens of a text: to train on from every start, (n, T); to validate on behind
    each other, (m, T)."""
    text = common.load_text(name, args.data_dir, flag="--old")
    train, val = (BYTES.stream(part).to(args.device) for part in (text.train, text.val))
    common.require(len(val) >= T <= len(train), f"the last tenth of --old {name} has {len(val)} "
                   f"tokens, the rest {len(train)}, and a context of {T} needs as many in either: "
                   "take a longer text or a shorter --context")
    return train.unfold(0, T, 1), val.unfold(0, T, T)


def examples(args):
    """Stretches of --example bytes of the new text from the beginning of a line, and the newline in
    front of each: to train on (n, 1 + T), and to validate on (m, 1 + T)."""
    text, T = common.load_text(args.data, args.data_dir), args.example

    def begins(documents):
        stream = BYTES.stream(documents).to(args.device)
        if len(stream) <= T:
            return stream.new_empty(0, T + 1)
        x = stream.unfold(0, T + 1, 1)
        return x[(x[:, 0] == NEWLINE) & (x[:, 1] != NEWLINE) & (x != BOS).all(1)]
    train, val = begins(text.train), begins(text.val)
    most = max(args.k)
    common.require(most <= len(train) and len(val), f"--k {most} is more than the {len(train)} "
                   f"examples that --data {args.data} has ({len(val)} in its last tenth, to test "
                   f"on), {T} bytes each, from the beginning of a line: take a longer text, or a "
                   "smaller --k or --example")
    return train, val


def evenly(x, n):
    """n rows of x, evenly apart (all if there are fewer)."""
    return x[torch.linspace(0, len(x) - 1, min(n, len(x))).long()].long()


def choose(train, k, seed):
    """k of the examples (n, T), at random, but the same ones first for every k: (k, T)."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train[order[:k].to(train.device)].long()


@torch.no_grad()
def evaluate(args, model, x, given=0, before=None):
    """Loss on texts x (m, T), whose first `given` tokens are not owed, behind the examples `before`
    (k, T') if there are any: nats a token."""
    nats, owed = 0., x.shape[1] - given
    with common.autocast(args):
        for part in x.split(max(1, 8192 // x.shape[1])):
            masked, target = mask(part if before is None else prompted(before, part), BOS)
            prediction = model(masked)
            nats += distance(prediction[:, -owed:], target[:, -owed:]).item() * len(part)
    return nats / len(x)


def save_adapter(args, path, model, method, base):
    """Writes what was trained, and nothing else."""
    how = dict(where=args.where, rank=args.rank, alpha=args.alpha or args.rank)
    state = dict(script=common.script(), base=base.name, method=method, how=how, data=args.data,
                 tensors={name: p.detach().clone() for name, p in trained(model).items()})
    common.write_checkpoint(state, path, what="an adapter")


def load_adapter(path, base):
    """The base with an adapter from a file: (model, what the file says about it). Raises UserError
    where it is of another base."""
    common.require(Path(path).is_file(), f"there is no adapter {path}")
    state = common.read_saved(path)
    common.require("tensors" in state, f"{path} was written by {state['script']} and is not an "
                   "adapter: those are called by their method and k, as lora-64.pt")
    common.require(state["base"] == base.name, f"{path} belongs to another base, {state['base']}; "
                   f"this one is {base.name}: name its folder with --base")
    how = state["how"]
    model = adapt(copy.deepcopy(base.model), state["method"], how["where"].split(","), how["rank"],
                  how["alpha"])
    own = trained(model)
    with torch.no_grad():
        for name, tensor in state["tensors"].items():
            own[name].copy_(tensor)
    return model.eval(), state


def fits(args, context):
    """What is to be done: (method, k, draw). Of prompts those that the base's context holds."""
    methods = list(get_args(Method))[1:] if args.method == "all" else [args.method]
    held = lambda k: (k + 1) * (args.example + 1) <= context
    return [(method, k, draw) for method in methods for k in args.k for draw in range(args.draws)
            if method != "prompt" or held(k)]


def recipe(args, method, k, draw):
    """The settings of one training: whatever k is, each example is seen --passes times, unless
    --steps ends it sooner."""
    batch = min(args.batch, k)
    return dataclasses.replace(args, seed=args.seed + 1000 * draw, lr=args.lr or LR[method],
                               batch=batch, steps=min(args.steps, round(args.passes * k / batch)),
                               compile=False)       # each copy would be compiled anew


def measure(args, base, fit, model, val, old):
    """What came out of a training: losses in nats a token, what was trained, and the size of the
    adapter; that of the first draw is kept in --out."""
    method, k, draw = fit
    path = Path(args.out) / f"{method}-{k}.pt"
    if draw == 0:
        save_adapter(args, path, model, method, base)
    return dict(new=evaluate(args, model, val, given=1), old=evaluate(args, model, old),
                trained=size(trained(model)), bytes=path.stat().st_size)


def size(tensors):
    """How many numbers are in {name: tensor}."""
    return sum(tensor.numel() for tensor in tensors.values())


def collect(args, done):
    """{method: {k: {figure: a list, one a draw}}} of the fits that are done."""
    rows = {}
    for method, k, draw in sorted(done, key=lambda fit: fit[1:]):
        if k in args.k and draw < args.draws and args.method in ("all", method):
            for name, value in done[method, k, draw].items():
                rows.setdefault(method, {}).setdefault(k, {}).setdefault(name, []).append(value)
    return {method: rows[method] for method in get_args(Method) if method in rows}


def lines(args, base, rows, start):
    """The table: a row for each k and method, mean and spread over the draws."""
    total = size(dict(base.model.named_parameters()))
    names = [f"loss, {Path(name).name}" for name in (args.data, base.data)]
    table = [["k", "method", "trained", "%", "bytes", *names, "ms"],
             ["0", "the base", "0", "0.0", "0", *(f"{loss:.3f}" for loss in start), "-"]]
    for k in args.k:
        table += [[""] * 8]
        for method in (method for method in rows if k in rows[method]):
            f = rows[method][k]
            count, ms = f["trained"][0], 1000 * sum(f["seconds"]) / len(f["seconds"])
            table.append([str(k), method, f"{count:,}", f"{100 * count / total:.1f}",
                          f"{f['bytes'][0]:,}", common.spread(f["new"], 3),
                          common.spread(f["old"], 3), f"{ms:.0f}" if count else "-"])
    return table


@torch.no_grad()
def ranks(args, base, rows):
    """How many directions the updates really use: the shares of their squared length in the 1, 2,
    4, ... most important, {method: {matrix: shares}}, means over the blocks, at the largest k."""
    counts = [n for n in (1, 2, 3, 4, 8, 16, 32) if n <= base.model.pos_embed.weight.shape[1]]
    before, found = linears(base.model, args.where.split(",")), {}
    for method in (m for m in ("lora", "full") if m in rows):
        model, _ = load_adapter(f"{args.out}/{method}-{max(args.k)}.pt", base)
        shares = found.setdefault(method, {name: [] for name in args.where.split(",")})
        for path, linear in before.items():
            layer = model.get_submodule(path)
            new = layer.update() if method == "lora" else layer.weight - linear.weight
            shares[path.split(".")[-1]].append(spectrum(new)[[n - 1 for n in counts]])
        found[method] = {name: torch.stack(parts).mean(0).tolist()
                         for name, parts in shares.items()}
    return counts, found


def write(args, base, model, before=None):
    """A sample behind --prompt, with examples (k, T) before it or without."""
    prompt = BYTES.encode(b"\n" + args.prompt.encode(errors="surrogateescape"))
    prompt = prompt if before is None else prompted(before.cpu(), prompt[None])[0]
    prompt = F.pad(prompt, (1, 0), value=BOS)
    n = min(args.length, base.context - len(prompt))
    with common.autocast(args, "float32"):
        return args.prompt + BYTES.decode(sample(model, prompt, n, args.temperature, args.seed))


def look(args, base, rows, train):
    """{who: what it writes}: the base alone, with examples in its prompt, and with what the first
    draw taught it."""
    texts = {"the base": write(args, base, base.model)}
    for method in rows if len(rows) == 1 else [m for m in ("prompt", "lora") if m in rows]:
        k, model = max(rows[method]), base.model
        if method == "prompt":                            # some room is needed for what is written
            k = min(k, max(0, base.context // 2 - len(args.prompt)) // (args.example + 1))
            text = write(args, base, model, choose(train, k, args.seed))
        else:
            text = write(args, base, load_adapter(f"{args.out}/{method}-{k}.pt", base)[0])
        texts[f"{method}, k = {k}"] = text
    return texts


def inspect(args, val):
    """What the adapter of --adapter does to its base, which is --base or lies beside it."""
    base = load_base(args, args.base or f"{Path(args.adapter).parent}/base")
    model, state = load_adapter(args.adapter, base)
    print(f"the base:\n\n{write(args, base, base.model)}\n\nwith {args.adapter}:\n\n"
          f"{write(args, base, model)}\n")
    common.say(f"{args.adapter}: {state['method']}, {size(trained(model)):,} parameters trained on "
               f"{state['data']}, for the base {base.name}.")
    old = evenly(windows(args, base.data, base.context)[1], 100)
    for name, x, given in (args.data, evenly(val, 400), 1), (base.data, old, 0):
        after, before = (evaluate(args, m, x, given) for m in (model, base.model))
        common.say(f"Loss on new text of {name}: {after:.3f} nats a token (the base "
                   f"{before:.3f}).")


def tell(args, series, base, rows, start, shares, texts):
    """The end of the run, in words and in result.json."""
    for who, text in texts.items():
        print(f"\n{who}:\n\n{text}")
    counts, found = shares
    if found:
        print()
        common.say(f"How many directions does an update really use? At k = {max(args.k)}, the "
                   "share of its squared length in its most important ones (squared singular "
                   f"values, mean of {len(base.model.blocks)} blocks), in %:")
        table = [["", *(str(n) for n in counts)]]
        table += [[f"{method}, {name}", *(f"{100 * share:.0f}" for share in row)]
                  for method in found for name, row in found[method].items()]
        print(f"\n{common.table(table)}")
    total = size(dict(base.model.named_parameters()))
    print()
    common.say(f"The base is a {base.name}, of {total:,} parameters. It gets k examples of "
               f"{args.example} bytes of {args.data} to train on or (prompt) in front of the text. "
               "Loss: nats a token, of other such examples and of whole windows of the old text. "
               "Bytes: what has to be stored. ms: a training step. "
               + (f"Mean and standard deviation of {args.draws} draws" if args.draws > 1 else
                  "One draw") + " of examples and first weights:")
    print("\n" + common.table(lines(args, base, rows, start)) + "\n")
    best = {method: min(sum(f["new"]) / len(f["new"]) for f in ks.values())
            for method, ks in rows.items()}
    common.report(series, ", ".join(f"{method} {loss:.3f}" for method, loss in best.items()),
                  dict(base=base.name, base_seconds=base.seconds, old=base.data, parameters=total,
                       start=start, rows=rows, counts=counts, shares=found, texts=texts))


# ------------------------------------------------------------------------------------------ main


def main(args):
    train, val = examples(args)                                                    # (n, 1 + T)
    if args.adapter:
        return inspect(args, val)
    base = load_base(args, args.base or pretrain(args))
    series = common.Series(args, base.name, free=FREE)
    val, old = evenly(val, 400), evenly(windows(args, base.data, base.context)[1], 100)
    start = [evaluate(args, base.model, val, given=1), evaluate(args, base.model, old)]
    for fit in series.rest(fits(args, base.context)):
        method, k, draw = fit
        few = choose(train, k, args.seed + 1000 * draw)                            # (k, 1 + T)
        if method == "prompt":                                             # nothing is trained
            loss = evaluate(args, base.model, val, given=1, before=few)
            series.add(fit, new=loss, old=start[1],                   # the base is as it was
                       trained=0, bytes=few.numel(), seconds=0.)
            continue
        torch.manual_seed(args.seed + 1000 * draw)
        model = adapt(copy.deepcopy(base.model), method, args.where.split(","), args.rank,
                      args.alpha or args.rank, args.dropout).train()
        run = common.Run(recipe(args, method, k, draw), model, part=f"{method}, k = {k}")
        for step in run:
            masked, target = mask(run.batch(few), BOS)
            prediction = model(masked)
            loss = distance(prediction[:, 1:], target[:, 1:])              # the newline is given
            run.update(loss)
        series.add(fit, seconds=run.seconds / max(1, run.args.steps),
                   **measure(args, base, fit, model.eval(), val, old))

    rows = collect(args, series.done)
    tell(args, series, base, rows, start, ranks(args, base, rows), look(args, base, rows, train))


if __name__ == "__main__":
    common.start(main, Args)
