"""LoRA: adapt a pre-trained GPT by training low-rank matrices that are added to its frozen weights.

Paper    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
         (IA)^3: Liu et al. 2022 (T-Few), arXiv 2205.05638. BitFit: Ben Zaken et al. 2021, arXiv
         2106.10199

Idea     A GPT knows one text and is to learn another from k short examples. Each of its matrices is
         an associative memory: W x = sum_i v_i (k_i . x) compares x with keys k_i and adds up the
         values v_i. To change it "a little bit" is to add a few such pairs: W0 + A B^T, with the
         columns of B as keys, those of A as values, and W0 (d1, d2) frozen: rank (d1 + d2) numbers
         to train and to store instead of d1 d2.

Loss     GPT's, L = -1 / T sum_t log p(x_t | BOS, newline, x_1 ... x_{t-1}). What is trained:
         lora    A and B of y = W0 x + (alpha / rank) A B^T x, for each matrix W0 of a block
         ia3     three vectors l per block: l_k * (W_k x), l_v * (W_v x), W_2 (l_f * gelu(W_1 x))
         bitfit  all biases
         first, middle, last: two blocks at that place (surgical fine-tuning); full: everything
         Beside it, in-context: nothing; the examples stand in the prompt, if the context holds them

Flow     the base: a GPT that learned the old text, as in gpt.py (trained once: <out>/base)
         examples of the new text, tokens and targets (k, 1 + T) each: a newline and the T bytes
         after it (of --data x.tsv whole lines, of which the loss counts the second column)
         A. mask      shift: BOS before, without the last one -> inputs, target (B, 1 + T)
         B. predict   the GPT, with what was added to it      -> logits (B, 1 + T, 257)
         C. compare   cross-entropy of what counts: not the newline
         at the end   the loss on the new text, and on the OLD one: what was forgotten

Run      python lora.py --method lora --k 64
Expect   64 examples of pycode, beginnings of lines, bring the loss on others from 1.92 ± 0.02 to
         1.70 ± 0.01 nats per token, with 2.9 % of the parameters (1.70 ± 0.01 with all: --method
         full); on pydocs it goes from 1.35 ± 0.00 to 1.39 ± 0.00 (1.38 ± 0.00) (3 seeds; 151 s of
         training for the base, then a few seconds, on 1 thread, beside other jobs; Intel(R) Xeon(R)
         Processor, 2 cores, Python 3.11.7, torch 2.13.0+cpu)
Differs  The paper writes W0 + B A, and adapts matrices of the attention only; here it is every
         matrix of a block, with one B for query, key and value. (IA)^3 scales biases, too, and has
         one loss of T-Few's three. Learning rates were chosen on the text that is reported.

Try      --method full, bitfit, ia3, last; --lr 0.01, ten times the usual rate: what is forgotten?
         --rank 1, or --targets qkv --rank 12 (as many parameters as --rank 3): is that enough?
         --k 2: is training better, or are two examples in the prompt? (More: experiments/adapt.py)
"""
import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common

# -------------------------------------------------------------------------------------- settings

Method = Literal["lora", "ia3", "bitfit", "first", "middle", "last", "full"]
# Of three or four rates for each, the best on average over k: experiments/adapt.py --search
LR = dict(lora=1e-3, ia3=1e-2, bitfit=1e-3, first=1e-4, middle=1e-4, last=1e-4, full=5e-5)


@dataclass
class Args(common.Args):
    """Settings of lora.py: for a GPU, and in `cpu` smaller ones for two cores."""
    method: Method = "lora"         # what is trained
    k: int = 64                     # examples of the new text
    epochs: int = 20                # times that each example is used: epochs * k / batch steps
    steps: int = 1000               # training steps at most, 0 or more
    batch: int = 16                 # examples per step, at most k
    lr: float = 0.                  # peak learning rate; 0: the best of a search for the method
    warmup: float = 0.1             # fraction of the steps in which the rate rises, in [0, 1]
    weight_decay: float = 0.01      # AdamW's decay, of matrices only (LoRA, table 11, GPT-2 on E2E)
    data: str = "pycode"            # new text: pycode, pydocs, shakespeare, a file or a folder
    example: int = 24               # tokens of an example, which starts with a line, 2 or more
    targets: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2")    # LoRA: matrices that are adapted
    rank: int = 3                   # LoRA: columns of A and of B
    alpha: float = 0.               # LoRA: A B^T is multiplied by alpha / rank; 0: by 1
    dropout: float = 0.             # LoRA: dropout probability of its inputs, in [0, 1)
    base: str = ""                  # run of gpt.py or lora.py, or a GPT-2 [trained: <out>/base]
    old: str = ""                   # text that the base knows [pydocs, or the one of --base]
    base_steps: int = 5000          # base: training steps
    base_batch: int = 64            # base: windows of the text per step
    base_lr: float = 1e-3           # base: peak learning rate
    optimizer: Literal["muon", "adamw"] = "muon"   # base: muon, for the matrices of the blocks
    muon_lr: float = 0.02           # base: peak learning rate of these matrices, in (0, inf)
    base_dropout: float = 0.2       # base: dropout probability, in [0, 1)
    context: int = 256              # base: tokens of a window, BOS included, 2 or more
    dim: int = 384                  # base: channels
    depth: int = 6                  # base: blocks
    heads: int = 6                  # base: attention heads
    prompt: str = "def "            # what the samples begin with
    length: int = 150               # tokens of a sample
    temperature: float = 0.8        # divides the logits: 1 as it learned, in (0, inf)

    cpu = dict(base_steps=2400, base_batch=8, base_lr=3e-3, base_dropout=0., context=128, dim=128,
               depth=4, heads=4)
    published = dict(epochs=5, batch=4, rank=4, example=64, prompt="The", length=60)


# ------------------------------------------------------------------------------------- the model


class LoRA(nn.Module):
    """A frozen nn.Linear with a low-rank addition to its weight: W0 + (alpha / rank) A B^T.

    x (..., d2) -> (..., d1); only A (d1, rank) and B (d2, rank) are trained. The paper, loralib and
    peft write W0 + B A, with the names swapped: lora_A is B^T here, and lora_B is A. Raises
    ValueError where the rank is above min(d1, d2), and for a layer that is no nn.Linear: the weight
    of transformers' Conv1D, for example, is transposed.
    """

    def __init__(self, linear, rank, alpha, dropout=0.):
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"LoRA is for nn.Linear, not for {type(linear).__name__}")
        d1, d2 = linear.weight.shape
        if not 1 <= rank <= min(d1, d2):
            raise ValueError(f"rank {rank} of a {d1} x {d2} matrix: it can be 1 to {min(d1, d2)}")
        self.linear = linear.requires_grad_(False)
        self.scale, self.dropout, self.merged = alpha / rank, dropout, False
        # One factor is zero, so that training starts from W0 itself.
        # Both zero: the gradient of each is a product with the other, so neither would ever move.
        # None zero: W0 + A B^T would start as W0 with noise.
        # A is the zero: the first step writes values for random keys; then the keys move, too.
        self.A = nn.Parameter(linear.weight.new_zeros(d1, rank))
        self.B = nn.Parameter(linear.weight.new_empty(d2, rank).normal_(std=d2 ** -.5))

    def forward(self, x):
        y = self.linear(x)
        if self.merged:
            return y
        match = F.linear(F.dropout(x, self.dropout, self.training), self.B.T)       # (..., rank)
        return y + F.linear(match, self.scale * self.A)

    def delta(self):
        """What is added to the weight: (d1, d2)."""
        return self.scale * self.A @ self.B.T

    @property
    def weight(self):
        """W0 and what is added, (d1, d2): some modules, such as nn.MultiheadAttention, read the
        weight of a layer instead of calling it (then without dropout)."""
        return self.linear.weight if self.merged else self.linear.weight + self.delta()

    @property
    def bias(self):
        """That of the frozen layer."""
        return self.linear.bias

    @torch.no_grad()
    def merge(self):
        """Adds delta() to the weight, after training: the layer then costs what the plain one
        costs."""
        if not self.merged:
            self.linear.weight += self.delta()
        self.merged = True

    @torch.no_grad()
    def unmerge(self):
        """Subtracts it again: the weight is W0 up to rounding."""
        if self.merged:
            self.linear.weight -= self.delta()
        self.merged = False

    def get_extra_state(self):
        """A part of state_dict(): whether the weight holds delta() already."""
        return torch.tensor(self.merged)

    def set_extra_state(self, merged):
        self.merged = bool(merged)


class IA3(nn.Module):
    """(IA)^3: multiplies the inputs of a frozen nn.Linear by a trained vector, at first ones; with
    outputs=n, its last n outputs instead. x (..., d2) -> (..., d1)."""

    def __init__(self, linear, outputs=0):
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"IA3 is for nn.Linear, not for {type(linear).__name__}")
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
    def multiply(self, scale):
        """Multiplies the frozen layer, in place, as forward() multiplies its inputs or outputs."""
        if not self.outputs:
            self.linear.weight *= scale
        else:
            for tensor in self.linear.parameters():                  # weight (d1, d2), bias (d1)
                tensor[-self.outputs:] *= scale.view(-1, *[1] * (tensor.ndim - 1))

    def merge(self):
        """Multiplies the weight, after training: the layer then costs what the plain one costs."""
        if not self.merged:
            self.multiply(self.scale)
        self.merged = True

    def unmerge(self):
        """Divides it again. Raises ValueError where it was multiplied by 0."""
        if self.merged and (self.scale == 0).any():
            raise ValueError("a weight that was multiplied by 0 cannot be restored")
        if self.merged:
            self.multiply(1 / self.scale)
        self.merged = False

    get_extra_state, set_extra_state = LoRA.get_extra_state, LoRA.set_extra_state


def adapt(model, method, targets=("qkv", "proj", "fc1", "fc2"), rank=3, alpha=None, dropout=0.):
    """Freezes a model, in place, except for what the method trains: afterwards these are the
    tensors that require gradients. Returns the model, which computes the same as before. alpha
    None: as the rank. ia3, first, middle and last are for a GPT of this file, the others for any
    model. Raises ValueError, and replaces nothing, where targets or rank do not fit."""
    if method in ("ia3", "first", "middle", "last") and not hasattr(model, "blocks"):
        raise ValueError(f"{method} is for a GPT of this file, not for {type(model).__name__}")
    added = {path: LoRA(linear, rank, rank if alpha is None else alpha, dropout) for path, linear
             in (target_layers(model, targets).items() if method == "lora" else ())}
    model.requires_grad_(False)
    if method == "lora":
        for path, layer in added.items():
            model.set_submodule(path, layer)
    elif method == "ia3":
        for block in model.blocks:
            keys_values = block.attn.qkv.out_features * 2 // 3      # the last two of q, k, v
            block.attn.qkv = IA3(block.attn.qkv, outputs=keys_values)
            block.mlp.fc2 = IA3(block.mlp.fc2)                      # its inputs: after the GELU
    elif method == "bitfit":
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias"))
    elif method in ("first", "middle", "last"):                     # below 4 blocks they overlap
        last = max(0, len(model.blocks) - 2)
        i = {"first": 0, "middle": last // 2, "last": last}[method]
        model.blocks[i:i + 2].requires_grad_(True)
    elif method == "full":
        model.requires_grad_(True)
    else:
        raise ValueError(f"there is no method {method!r}")
    return model


def target_layers(model, targets):
    """The linear layers of a model whose own name is one of the targets: {path: nn.Linear}. Raises
    ValueError for a name that no layer has."""
    targets = [targets] if isinstance(targets, str) else targets
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    names = dict.fromkeys(path.split(".")[-1] for path in layers)
    for name in targets:
        if name not in names:
            raise ValueError(f"no matrix {name!r} in this model: it has {', '.join(names)}")
    return {path: layer for path, layer in layers.items() if path.split(".")[-1] in targets}


def adapter_state(model):
    """A copy of the tensors that require gradients, by name: all that has to be stored beside the
    base. Several adapters share one base: load_adapter switches between them."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_adapter(model, state):
    """Puts an adapter_state into a model that was adapted in the same way. Raises ValueError where
    it does not fit, or where the adapter in the model is merged."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in own.items()} != {name: p.shape for name, p in state.items()}:
        raise ValueError("this adapter is of another model, or of another method, rank or targets")
    if any(getattr(layer, "merged", False) for layer in model.modules()):
        raise ValueError("the adapter in this model is merged: unmerge it first")
    for name, p in own.items():
        p.copy_(state[name])


def merge_and_unload(model):
    """Merges all LoRA and (IA)^3 layers and puts the plain layers back, in place: the model is of
    its old class again, as large and as fast as before. Returns it."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, (LoRA, IA3)):
            layer.merge()
            model.set_submodule(path, layer.linear)
    return model


# gpt.py's GPT, line by line. B batch, T new tokens, L tokens in all, C channels, H heads,
# D = C / H, V vocabulary.


class GPT(nn.Module):
    """GPT-2: tokens (B, T) -> logits of the token after each, (B, T, V).

    With a cache, from new_cache(), the tokens come after those that it holds: a whole text at once,
    or a prompt and then one token at a time, give the same logits. Raises ValueError where they
    are more than the context.
    """

    def __init__(self, vocab, context, dim, depth, heads, dropout=0.):
        super().__init__()
        self.dropout = dropout
        self.token_embed = nn.Embedding(vocab, dim)      # tied: also the matrix to the logits
        self.pos_embed = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        for name, p in self.named_parameters():                  # as GPT-2: 0.02, positions 0.01
            if p.ndim > 1:
                last = name.endswith(("proj.weight", "fc2.weight"))    # the last layer of a branch:
                std = .02 / math.sqrt(2 * depth) if last else .02      # 2 depth of them are summed
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
        """An empty KV cache for a batch of texts: a Cache for each block."""
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
    """Causal multi-head self-attention: each token to itself and those before it, (B, T, C) ->
    (B, T, C). With a cache, the T tokens come after those that it holds, and are appended."""

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
        L, visible = k.shape[2], None    # one new token attends to all L keys: no mask. Of several,
        if 1 < T < L:                    # the last attends to all, the one before it to L - 1, ...
            visible = torch.ones(T, L, dtype=torch.bool, device=x.device).tril(L - T)
        x = F.scaled_dot_product_attention(              # softmax(q k^T / sqrt(D) + mask) v
            q, k, v, visible, self.dropout if self.training else 0.,
            is_causal=T > 1 and (cache is None or T == L))
        x = self.proj(x.transpose(1, 2).reshape(B, T, C))
        return F.dropout(x, self.dropout, self.training)


class MLP(nn.Module):
    """Two layers, applied to each token: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, dropout=0.):
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        x = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Cache:
    """KV cache of one block: keys and values of all L tokens so far, (B, H, L, D) each. Memory for
    a whole context is allocated once."""

    def __init__(self, batch, heads, context, head_dim, like):
        self.k = like.new_empty(batch, heads, context, head_dim)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def append(self, k, v):
        """Appends those of T new tokens (B, H, T, D); returns those of all, (B, H, L, D)."""
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start:self.length] = k
        self.v[:, :, start:self.length] = v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


# ------------------------------------------------------------------------------------ the method


def distance(prediction, target):
    """C. Mean cross-entropy of logits (B, T, V) with tokens (B, T), in nats per token; a target of
    -100 does not count."""
    return F.cross_entropy(prediction.flatten(0, 1).float(), target.flatten())


def mask(x, bos):
    """A. Tokens x (B, T) -> the inputs (B, T), shifted by one, and the target, x itself.

    Of h e l l o the inputs are BOS h e l l. The shift, with causal attention, masks x_t and all
    that follow where x_t is predicted.
    """
    return F.pad(x[:, :-1], (1, 0), value=bos), x


def in_context(examples, x):
    """The other way to use k examples (k, T), without training: prepends them all to each text x
    (B, T'), giving (B, k T + T'). Nothing is put between them: here each begins with a newline.
    Examples of several lengths can come one after another, (n,)."""
    return torch.cat([examples.flatten().expand(len(x), -1), x], 1)


@torch.inference_mode()
def sample(model, prompt, n, temperature=1.):
    """Continues the prompts (B, T), at most the context with the result, by n tokens: (B, n). The
    model should be in evaluation mode. (gpt.py has greedy, top-k and nucleus sampling.)"""
    cache, x, tokens = model.new_cache(len(prompt)), prompt, []
    for _ in range(n):
        logits = model(x, cache)[:, -1].float()      # (B, V); first the prompt, then one token each
        p = ((logits - logits.amax(1, keepdim=True)) / temperature).softmax(1)
        x = torch.multinomial(p, 1)                                                     # (B, 1)
        tokens.append(x)
    return torch.cat(tokens, 1)


# -------------------------------------------------------------------------------------- the data


BYTES = common.Bytes()
IGNORE = -100                                 # as a target: this token does not count in the loss


def windows(args, name, T, tokens=BYTES):
    """Windows of T tokens of a text: to train on from every start, (n, T); to validate on one after
    another, (m, T)."""
    text = common.load_text(name, args.data_dir, flag="--old")
    train, val = (tokens.stream(part).to(args.device) for part in (text.train, text.val))
    common.require(len(val) >= T <= len(train), f"the last tenth of --old {name} has {len(val)} "
                   f"tokens, the rest {len(train)}, and a context of {T} needs as many in both: "
                   "take a longer text or a shorter --context")
    return train.unfold(0, T, 1), val.unfold(0, T, T)


def load_examples(args, tokens=BYTES):
    """Examples of the new text to train on and to validate on: tokens and targets, (n, 2, 1 + T),
    the newline before an example included."""
    text = common.load_text(args.data, args.data_dir)
    if tokens is BYTES and not args.data.endswith(".tsv"):
        train, val = (line_starts(args, documents) for documents in (text.train, text.val))
    else:
        whole = [a + b for a, b in zip(text.train, text.val)]
        rows = lines(args, [line for raw in whole for line in raw.splitlines()], tokens)
        train, val = rows[:len(rows) * 9 // 10], rows[len(rows) * 9 // 10:]
    common.require(args.k <= len(train) and len(val), f"--k {args.k} is more than the {len(train)} "
                   f"examples of {args.example} tokens that --data {args.data} has ({len(val)} in "
                   "its last tenth, to test on): take a longer text, or a smaller --k or --example")
    return train, val


def line_starts(args, documents):
    """The first T = --example bytes of each line, and what follows a shorter one."""
    x, T, newline = BYTES.stream(documents).to(args.device), args.example, ord("\n")
    if len(x) <= T:
        return x.new_empty(0, 2, T + 1)
    i = ((x[:-T] == newline) & (x[1:len(x) - T + 1] != newline)).nonzero().flatten()
    rows = x.unfold(0, T + 1, 1)[i]
    rows = rows[(rows != BYTES.BOS).all(1)]                              # none of two documents
    return torch.stack([rows, F.pad(rows[:, 1:], (1, 0), value=IGNORE)], 1)


def lines(args, texts, tokens):
    """Whole lines, at most --example tokens, with BOS after a shorter one, which does not count; in
    a .tsv what stands before the first tab does not count either. At most 20,000 of them."""
    pairs, T = args.data.endswith(".tsv"), args.example
    newline, rows = tokens.encode("\n"), []
    for i in torch.linspace(0, len(texts) - 1, min(len(texts), 20_000)).long().tolist():
        line, number = texts[i], i + 1
        before, tab, after = line.partition(b"\t") if pairs else (b"", b"", line)
        common.require(tab or not pairs or not line.strip(), f"line {number} of {args.data} has no "
                       "tab: each line is a pair, with a tab between its texts")
        given, counted = tokens.encode(before + tab), tokens.encode(after + b"\n")
        if after.strip() and len(given) < T:
            x = torch.cat([newline, given, counted])[:T + 1]
            target = torch.cat([torch.full_like(x[:1 + len(given)], IGNORE), x[1 + len(given):]])
            rows.append(torch.stack([F.pad(x, (0, T + 1 - len(x)), value=tokens.BOS),
                                     F.pad(target, (0, T + 1 - len(x)), value=IGNORE)]))
    return torch.stack(rows).to(args.device) if rows else torch.zeros(0, 2, T + 1)


def choose(train, k, seed):
    """k of the examples (n, 2, 1 + T) at random, the same ones first for every k."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train[order[:k].to(train.device)].long()


def in_a_row(examples, bos):
    """The tokens of examples (k, 2, 1 + T) one after another, without the BOS after short ones."""
    return examples[:, 0][examples[:, 0] != bos]


def to_test(args, val, old, context, tokens=BYTES):
    """Of the examples to validate on, and of windows of the old text, some: fewer for a large
    model."""
    m, n = (100, 20) if args.uses_published else (400, 100)
    _, windows_of_old = windows(args, old, min(context, 256), tokens)
    return common.evenly(val, m), common.evenly(windows_of_old, n)


# -------------------------------------------------------------------------------------- the base


def pretrain(args):
    """Trains the base, as gpt.py does, unless it is there already. Returns its folder."""
    how, done = common.stage(
        args, "base", ("data", "context", "dim", "depth", "heads", "dropout"),
        weight_decay=.1, warmup=.05, data=args.old or "pydocs")
    if done:
        return how.out
    train, _ = windows(how, how.data, args.context)
    model = GPT(BYTES.vocab, args.context, args.dim, args.depth, args.heads, args.base_dropout)
    build(args, copy.deepcopy(model))                     # raises now, not later, what does not fit
    common.require(args.example < args.context, f"--example {args.example} does not fit in "
                   f"--context {args.context}, with the newline before it")
    common.say(f"First the base, a GPT that learns {how.data}. It is kept in {how.out}.")
    optimizer = common.optimizer(how, model.to(args.device).named_parameters())
    run = common.Run(how, model, optimizer, uniform=math.log(BYTES.vocab))
    for step in run:
        with run.autocast():
            inputs, target = run.part(mask(run.batch(train).long(), BYTES.BOS))     # A. mask
            prediction = model(inputs)                                              # B. predict
            loss = distance(prediction, target)                                     # C. compare
        loss.backward()
        if not run.reduce(loss):           # of --accumulate parts, and of processes, the mean
            continue
        nn.utils.clip_grad_norm_(model.parameters(), how.clip)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)
    return how.out


def load_base(args, folder):
    """The base in the folder of a run of gpt.py or of lora.py (or the GPT-2 in --base), and what it
    is: its folder, its fingerprint, the old text, which it knows, and the published weights that
    it began with."""
    if args.uses_published:
        model, _ = load_gpt2(args, args.base, "--base")
        return model.to(args.device).eval(), dict(
            base=args.base, fingerprint=common.fingerprint(model.state_dict()),
            old=args.old or "pydocs", weights=args.base)
    read = lambda folder: common.read_checkpoint(folder, "gpt.py", "lora.py", flag="--base")
    folder = read(folder)["about"].get("base", folder)    # of a run that adapted a base: that one
    state = read(folder)
    how, weights = state["args"], state["model"]
    common.require(not common.is_images(how["data"]), f"the base in {folder} was trained on images "
                   f"({how['data']}), and this is about text: take another --base")
    vocab, context = (len(weights[f"{name}_embed.weight"]) for name in ("token", "pos"))
    model = GPT(vocab, context, how["dim"], how["depth"], how["heads"])     # from now on no dropout
    model.load_state_dict(weights)
    return model.to(args.device).eval(), dict(
        base=str(folder), fingerprint=common.fingerprint(weights), old=args.old or how["data"],
        weights=how.get("weights", ""))


# GPT-2's names for the parts of this model, and ours (-: the causal mask, which is not loaded).
NAMES = ("transformer.= wte=token_embed lm_head=token_embed wpe=pos_embed h.=blocks. ln_f.=norm. "
         "ln_=norm c_attn=qkv attn.c_proj=attn.proj mlp.c_proj=mlp.fc2 c_fc=fc1 .attn.bias=- "
         ".attn.masked_bias=-")


def load_gpt2(args, path, flag="--weights", dropout=0.):
    """The GPT-2 in a folder, and its tokenizer; sets the sizes of args."""
    state, config = common.published(path, "GPT-2", NAMES, "pos_embed.weight", flag)
    state = {name: x.T if x.ndim == 2 and "embed" not in name else x
             for name, x in state.items()}                                      # (in, out) there
    tokens, (context, args.dim) = common.BPE.load(path), state["pos_embed.weight"].shape
    args.depth = sum(name.endswith("qkv.weight") for name in state)
    args.heads = config.get("n_head", args.dim // 64)
    model = GPT(tokens.vocab, context, args.dim, args.depth, args.heads, dropout)
    common.fill_in(model, state, path, config)
    return model, tokens


def publish(model):
    """The tensors of a GPT by GPT-2's names, as transformers loads them."""
    found = {common.rename(name, NAMES, back=True): x for name, x in model.state_dict().items()}
    return {f"transformer.{name}": x.T.contiguous() if x.ndim == 2 and "h." in name else x
            for name, x in found.items()}


def build(args, model):
    """The base, adapted in place as the settings say."""
    return adapt(model, args.method, args.targets, args.rank, args.alpha or args.rank, args.dropout)


def recipe(args):
    """Sets the batch, the steps and the learning rate: they follow from k and the method."""
    args.batch = min(args.batch, args.k)
    args.steps = min(args.steps, round(args.epochs * args.k / args.batch))
    args.lr = args.lr or LR[args.method]


# ------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def evaluate(args, model, x, target=None, examples=None, bos=BYTES.BOS):
    """Loss on texts x (m, T), in nats per token: of all tokens, or of the targets (m, T) that are
    not -100; with examples (k, T') or (n,), after these in the same context."""
    nats, count, T = 0., 0, x.shape[1]
    both = torch.stack([x, x if target is None else target], 1).long()
    with common.autocast(args):
        for part in both.split(max(1, 2048 // T)):
            x, target = part.unbind(1)
            inputs, _ = mask(x if examples is None else in_context(examples, x), bos)
            prediction, counted = model(inputs)[:, -T:], (target != IGNORE).sum().item()
            nats, count = nats + distance(prediction, target).item() * counted, count + counted
    common.bounded(math.isfinite(nats))
    return nats / count


def losses(args, model, val, old, bos=BYTES.BOS):
    """The losses on new text, rows (m, 2, 1 + T), and on old text (m, T), in nats per token."""
    return dict(new=evaluate(args, model, *val.unbind(1), bos=bos),
                old=evaluate(args, model, old, bos=bos))


def write(args, model, tokens=BYTES):
    """The text that the model writes after a newline and --prompt."""
    prompt = tokens.encode("\n".encode() + args.prompt.encode(errors="surrogateescape"))
    start = F.pad(prompt, (1, 0), value=tokens.BOS).to(args.device)
    n = max(1, min(args.length, len(model.pos_embed.weight) - len(start)))
    torch.manual_seed(args.seed)
    new = sample(model, start[None], n, args.temperature)[0]
    return tokens.decode(torch.cat([start[1:], new])).removeprefix("\n")


def save_adapter(args, model, about):
    """Writes adapter.pt: what was trained, and how and for which base. Returns its path."""
    path = Path(args.out, "adapter.pt")
    how = {name: getattr(args, name) for name in ("method", "targets", "rank")}
    state = dict(fingerprint=about["fingerprint"],
                 adapter=how | dict(alpha=args.alpha or args.rank),
                 tensors={name: x.cpu() for name, x in adapter_state(model).items()})
    with common.replacing(path) as f:
        torch.save(state, f)
    return path


def report(run, about, rows, texts, count):
    """The end of the run, on the terminal and in result.json. count: parameters of the base."""
    args, before, after = run.args, rows["the base"], rows[run.args.method]
    cells = [[who, f"{row['new']:.3f}", f"{row['old']:.3f}", f"{row['trained']:,}",
              f"{row['bytes']:,}"] for who, row in rows.items()]
    table = common.table([["nats per token", "new text", "old text", "trained", "bytes"], *cells])
    common.say("\n".join(f"\nSample of {who}:\n\n{text}" for who, text in texts.items()))
    common.say(f"\n{table}\n\nNew text: {Path(args.data).name}; old text: "
               f"{Path(about['old']).name}. Trained: {100 * after['trained'] / count:.1f} % of "
               f"{count:,} parameters, stored in {run.out / 'adapter.pt'}.")
    common.report(run, f"{args.method}, {args.k} examples: {before['new']:.3f} -> "
                  f"{after['new']:.3f} nats per token", dict(rows=rows, texts=texts,
                  parameters=count, old=about["old"], fingerprint=about["fingerprint"]))


# ------------------------------------------------------------------------------------------ main


@common.setup
def main(args):
    recipe(args)
    base = load_base(args, args.base) if args.base else None        # raises now if it is wrong
    tokens = common.BPE.load(base[1]["weights"]) if base and base[1]["weights"] else BYTES
    train, val = load_examples(args, tokens)                        # (n, 2, 1 + T), (m, 2, 1 + T)
    model, about = base or load_base(args, pretrain(args))
    count, context = sum(p.numel() for p in model.parameters()), len(model.pos_embed.weight)
    val, old = to_test(args, val, about["old"], context, tokens)
    examples = choose(train, args.k, args.seed)                     # (k, 2, 1 + T)
    start = losses(args, model, val, old, tokens.BOS) | dict(trained=0, bytes=0)
    rows, texts = {"the base": start}, {"the base": write(args, model, tokens)}
    given = in_a_row(examples, tokens.BOS)                          # (n,)
    if len(given) + val.shape[2] <= context:
        rows[f"{args.k} examples in the prompt (in-context)"] = start | dict(
            new=evaluate(args, model, *val.unbind(1), given, tokens.BOS), bytes=given.numel())

    torch.manual_seed(args.seed)
    build(args, model)                                  # in place: freezes the base, adds A and B
    optimizer = common.adamw(model.parameters(), args.lr, args.weight_decay)    # of what is trained
    run = common.Run(args, model.train(), optimizer, about=about)
    for step in run:                       # sets the seed and the learning rate of this step
        with run.autocast():
            x, target = run.part(run.batch(examples).unbind(1)) # (B, 1 + T) each
            inputs, _ = mask(x, tokens.BOS)                     # A. mask
            prediction = model(inputs)                          # B. predict
            loss = distance(prediction, target)                 # C. compare, without the newline
        loss.backward()
        if not run.reduce(loss):           # of --accumulate parts, and of processes, the mean
            continue
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)

    model.eval()
    rows[args.method] = losses(args, model, val, old, tokens.BOS) | dict(
        trained=sum(p.numel() for p in adapter_state(model).values()),
        bytes=common.first(lambda: save_adapter(args, model, about).stat().st_size))
    texts[args.method] = write(args, model, tokens)
    report(run, about, rows, texts, count)
    return model


if __name__ == "__main__":
    common.cli(main, Args)
