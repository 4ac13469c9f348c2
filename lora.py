"""LoRA: adapt a pre-trained GPT by training low-rank matrices that are added to its frozen weights.

Paper    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
         (IA)^3: Liu et al. 2022 (T-Few), arXiv 2205.05638. BitFit: Ben Zaken et al. 2021, arXiv
         2106.10199. Surgical fine-tuning: Lee et al. 2022, arXiv 2210.11466

Idea     A GPT was trained on one text and is to learn another from k short examples. Each of its
         matrices is an associative memory: W x = sum_i v_i (k_i . x) compares x with keys k_i and
         adds up the values v_i. To change it "a little bit", add a few such pairs: W0 + A B^T. W0
         (d1, d2) is frozen, the columns of B are the keys and those of A the values. This takes
         rank (d1 + d2) numbers to train and to store instead of d1 d2.

Loss     GPT's, L = -1 / T sum_t log p(x_t | BOS, newline, x_1 ... x_{t-1}). Each method trains:
         lora    A and B in y = W0 x + (alpha / rank) A B^T x, for each matrix W0 of a block
         ia3     three vectors l per block: l_k * (W_k x), l_v * (W_v x), W_2 (l_ff * gelu(W_1 x))
         bitfit  all biases
         first, middle, last: two blocks at that place (surgical fine-tuning); full: everything
         For comparison, in-context: nothing; the examples are put in the prompt, if they fit

Flow     the base: a GPT trained on the old text, as in gpt.py (once, and kept in <out>/base)
         examples of the new text, tokens and targets (k, 1 + T) each: a newline and the T bytes
         after it (of a .tsv, or with GPT-2: whole lines; of a .tsv the loss counts column 2 only)
         A. mask      prepend BOS, drop the last token -> inputs, target (B, 1 + T)
         B. predict   the adapted GPT                  -> logits (B, 1 + T, 257)
         C. compare   cross-entropy at every token but the newline
         at the end   the loss on the new text, and on the OLD text: how much is forgotten?

Run      python lora.py --method lora --k 64
Expect   64 examples of pycode (beginnings of lines) lower the loss on other lines from 1.92 ± 0.02
         to 1.70 ± 0.01 nats per token, with 2.9 % of the parameters (1.70 ± 0.01 with all: --method
         full), and raise it on pydocs from 1.35 ± 0.00 to 1.39 ± 0.00 (1.38 ± 0.00) (3 seeds; 151 s
         of training for the base, then a few seconds, on 1 thread, beside other jobs; Intel(R)
         Xeon(R) Processor, 2 cores, Python 3.11.7, torch 2.13.0+cpu)
Differs  The paper writes W0 + B A and adapts only matrices of the attention; here every matrix of a
         block is adapted, and query, key and value share one B. alpha is the rank, so the factor is
         1 (the paper's GPT-2: 8); B starts Gaussian, as in the paper, with variance 1 / d2. (IA)^3
         also scales the biases, and has one of T-Few's three losses.

Try      --method full, bitfit, ia3, last; --lr 0.01, ten times the usual: how much is forgotten?
         --rank 1, or --targets qkv --rank 12 (as many parameters as --rank 3): is that enough?
         --k 2: does training help more, or two examples in the prompt? (More: experiments/adapt.py)
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
# The best of three or four learning rates, on average over k and on other lines than the reported
# ones: experiments/adapt.py --search
LR = dict(lora=1e-3, ia3=1e-2, bitfit=1e-3, first=1e-4, middle=1e-4, last=1e-4, full=5e-5)


@dataclass
class Args(common.Args):
    """Settings of lora.py for a GPU; `cpu` has smaller ones for two CPU cores. The comments are
    the help texts of the flags, and the ranges in them are checked."""
    method: Method = "lora"         # what to train: see Loss at the top of lora.py
    k: int = 64                     # examples of the new text to train on
    epochs: int = 20                # passes over the examples: epochs * k / batch steps
    steps: int = 1000               # maximum number of training steps, 0 or more
    batch: int = 16                 # examples per step, at most k
    lr: float = 0.                  # peak learning rate; 0: the best one found for the method
    warmup: float = 0.1             # fraction of steps in which the learning rate rises, in [0, 1]
    weight_decay: float = 0.01      # weight decay, on matrices only (LoRA, table 11: GPT-2 on E2E)
    data: str = "pycode"            # new text: pycode, pydocs, shakespeare, a file or a folder
    example: int = 24               # tokens per example, from the start of a line on, 2 or more
    targets: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2")    # LoRA: layers (qkv: q, k, v in one)
    rank: int = 3                   # LoRA: rank of A B^T, the number of columns of A and of B
    alpha: float = 0.               # LoRA: A B^T is multiplied by alpha / rank; 0: alpha = rank
    dropout: float = 0.             # LoRA: dropout probability for the inputs of B, in [0, 1)
    base: str = ""                  # folder of a run of gpt.py or lora.py, or of GPT-2 [trains one]
    old: str = ""                   # text that the base was trained on [pydocs, or that of --base]
    base_steps: int = 5000          # base: training steps
    base_batch: int = 64            # base: windows of text per step
    base_lr: float = 1e-3           # base: peak learning rate
    optimizer: Literal["muon", "adamw"] = "muon"   # base: Muon for its blocks' matrices, or AdamW
    muon_lr: float = 0.02           # base: peak learning rate of Muon, in (0, inf)
    base_dropout: float = 0.2       # base: dropout probability, in [0, 1)
    context: int = 256              # base: tokens per window, BOS included, 2 or more
    dim: int = 384                  # base: channels
    depth: int = 6                  # base: blocks
    heads: int = 6                  # base: attention heads
    prompt: str = "def "            # text that the samples continue
    length: int = 150               # tokens to sample, or as many as the context holds
    temperature: float = 0.8        # divides the logits; 1: as trained, in (0, inf)

    cpu = dict(base_steps=2400, base_batch=8, base_lr=3e-3, base_dropout=0., context=128, dim=128,
               depth=4, heads=4)
    published = dict(epochs=5, batch=4, rank=4, example=64, prompt="The", length=60)


# ------------------------------------------------------------------------------------- the model


class LoRA(nn.Module):
    """A frozen nn.Linear whose weight W0 gets a trained low-rank term: W0 + (alpha / rank) A B^T.

    x (..., d2) -> (..., d1). Only A (d1, rank) and B (d2, rank) are trained. The paper, loralib and
    peft write W0 + B A with the names swapped: their lora_A is B^T here, and their lora_B is A.
    Raises ValueError if the rank is above min(d1, d2), or if the layer is not an nn.Linear
    (transformers' Conv1D, for example, stores its weight transposed).
    """

    def __init__(self, linear, rank, alpha, dropout=0.):
        super().__init__()
        d1, d2 = self.check(linear, rank)
        self.linear = linear.requires_grad_(False)
        self.scale, self.dropout, self.merged = alpha / rank, dropout, False
        # One factor is zero, so that training starts from W0 itself.
        # Were both zero, neither would ever move: the gradient of each is a product with the other.
        # Were neither zero, training would start from W0 plus noise.
        # A is the zero one: the first step writes values for random keys; then the keys move, too.
        self.A = nn.Parameter(linear.weight.new_zeros(d1, rank))
        self.B = nn.Parameter(linear.weight.new_empty(d2, rank).normal_(std=d2 ** -.5))

    def forward(self, x):
        y = self.linear(x)
        if self.merged:
            return y
        match = F.linear(F.dropout(x, self.dropout, self.training), self.B.T)       # (..., rank)
        return y + F.linear(match, self.scale * self.A)

    def delta(self):
        """The matrix that is added to the weight: (d1, d2)."""
        return self.scale * self.A @ self.B.T

    @torch.no_grad()
    def merge(self):
        """Adds delta() to the weight after training, to make the layer as fast as a plain one."""
        if not self.merged:
            self.linear.weight += self.delta()
        self.merged = True

    @torch.no_grad()
    def unmerge(self):
        """Subtracts delta() again: the weight is W0, up to rounding."""
        if self.merged:
            self.linear.weight -= self.delta()
        self.merged = False

    @staticmethod
    def check(linear, rank):
        """The shape of the weight. Raises ValueError as the constructor does."""
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"LoRA is for nn.Linear, not for {type(linear).__name__}")
        d1, d2 = linear.weight.shape
        if not 1 <= rank <= min(d1, d2):
            raise ValueError(f"rank {rank} of a {d1} x {d2} matrix: it can be 1 to {min(d1, d2)}")
        return d1, d2

    # For modules that read a layer's weight instead of calling it, as nn.MultiheadAttention does.

    @property
    def weight(self):
        """W0 + delta(): (d1, d2). Dropout does not apply to it."""
        return self.linear.weight if self.merged else self.linear.weight + self.delta()

    @property
    def bias(self):
        """The bias of the frozen layer."""
        return self.linear.bias

    def get_extra_state(self):
        """Part of state_dict(): whether the weight includes delta()."""
        return torch.tensor(self.merged)

    def set_extra_state(self, merged):
        self.merged = bool(merged)


class IA3(nn.Module):
    """(IA)^3: multiplies the inputs of a frozen nn.Linear by a trained vector that starts at ones;
    with outputs=n, its last n outputs instead. x (..., d2) -> (..., d1)."""

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
        others = self.scale.new_ones(self.linear.out_features - self.outputs)
        return self.linear(x) * torch.cat([others, self.scale])

    @torch.no_grad()
    def merge(self):
        """Multiplies the weight (and bias) after training, to make the layer as fast as a plain
        one. There is no way back, because a factor can be 0."""
        if self.merged:
            return
        self.merged = True
        if not self.outputs:
            self.linear.weight *= self.scale
            return
        self.linear.weight[-self.outputs:] *= self.scale[:, None]
        if self.linear.bias is not None:
            self.linear.bias[-self.outputs:] *= self.scale

    get_extra_state, set_extra_state = LoRA.get_extra_state, LoRA.set_extra_state


def adapt(model, method, targets=("qkv", "proj", "fc1", "fc2"), rank=3, alpha=None, dropout=0.):
    """Freezes a model in place, except for what the method trains: these are the only tensors that
    require gradients afterwards (a new head is frozen, too: head.requires_grad_(True) trains it).
    Returns the model; its outputs do not change. alpha None: alpha = rank. ia3, first, middle and
    last need a GPT of this file; the others take any model. Raises ValueError, and changes nothing,
    if method, targets or rank do not fit."""
    if method not in ("lora", "ia3", "bitfit", "first", "middle", "last", "full"):
        raise ValueError(f"there is no method {method!r}")
    if method in ("ia3", "first", "middle", "last") and not hasattr(model, "blocks"):
        raise ValueError(f"{method} is for a GPT of this file, not for {type(model).__name__}")
    if method in ("lora", "ia3") and any(isinstance(m, (LoRA, IA3)) for m in model.modules()):
        raise ValueError("this model is adapted already: merge_and_unload it first")
    layers = target_layers(model, targets) if method == "lora" else {}
    for linear in layers.values():
        LoRA.check(linear, rank)
    model.requires_grad_(False)
    if method == "lora":
        alpha = rank if alpha is None else alpha
        for path, linear in layers.items():
            model.set_submodule(path, LoRA(linear, rank, alpha, dropout))
    elif method == "ia3":
        for block in model.blocks:
            keys_values = block.attn.qkv.out_features * 2 // 3      # keys and values of q, k, v
            block.attn.qkv = IA3(block.attn.qkv, outputs=keys_values)
            block.mlp.fc2 = IA3(block.mlp.fc2)                      # inputs: the GELU's outputs
    elif method == "bitfit":
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias"))
    elif method in ("first", "middle", "last"):       # two blocks, some the same if fewer than 6
        last = max(0, len(model.blocks) - 2)
        i = {"first": 0, "middle": last // 2, "last": last}[method]
        model.blocks[i:i + 2].requires_grad_(True)
    else:
        model.requires_grad_(True)
    return model


def target_layers(model, targets):
    """Finds the linear layers of a model by the last part of their path: {path: nn.Linear}. Raises
    ValueError if no layer has the name of a target."""
    targets = [targets] if isinstance(targets, str) else targets
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    names = dict.fromkeys(path.split(".")[-1] for path in layers)     # in order, each once
    for name in targets:
        if name not in names:
            raise ValueError(f"no matrix {name!r} in this model: it has "
                             + (", ".join(filter(None, names)) or "no nn.Linear inside"))
    return {path: layer for path, layer in layers.items() if path.split(".")[-1] in targets}


def adapter_state(model):
    """Copies the tensors that require gradients, {name: tensor}: all that has to be stored besides
    the base. Several adapters can share one base: load_adapter switches between them."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_adapter(model, state):
    """Copies an adapter_state into a model that was adapted in the same way. Returns the model.
    Raises ValueError if it does not fit, or if the adapter in the model is merged."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in own.items()} != {name: p.shape for name, p in state.items()}:
        raise ValueError("this adapter is of another model, or of another method, rank or targets")
    if any(getattr(layer, "merged", False) for layer in model.modules()):
        raise ValueError("the adapter in this model is merged: load the new one before")
    for name, p in own.items():
        p.copy_(state[name])
    return model


def merge_and_unload(model):
    """Merges all LoRA and (IA)^3 layers and replaces them by plain layers, in place. Returns the
    model, which is then as large and as fast as the base, and still frozen."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, (LoRA, IA3)):
            layer.merge()
            model.set_submodule(path, layer.linear)
    return model


# A copy of the GPT of gpt.py. B batch, T new tokens, L all tokens so far, C channels, H heads,
# D = C / H, V vocabulary size.


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


# ------------------------------------------------------------------------------------ the method


def distance(prediction, target):
    """C. Mean cross-entropy of logits (B, T, V) and tokens (B, T), in nats per token. Targets of
    -100 are ignored."""
    return F.cross_entropy(prediction.flatten(0, 1).float(), target.flatten())


def mask(x, bos):
    """A. Tokens x (B, T) -> inputs (B, T), shifted right by one, and the target, x itself.

    For h e l l o the inputs are BOS h e l l. The shift and causal attention together mask x_t and
    all tokens after it in the prediction of x_t.
    """
    return torch.cat([torch.full_like(x[:, :1], bos), x[:, :-1]], 1), x


def in_context(examples, x):
    """Uses k examples (k, T) without training: prepends them all to each text x (B, T'), giving
    (B, k T + T'). There is no separator, because here each example begins with a newline. Examples
    of different lengths can be given as one sequence (n,)."""
    return torch.cat([examples.flatten().expand(len(x), -1), x], 1)


@torch.inference_mode()
def sample(model, prompt, n, temperature=1.):
    """Samples n tokens after each prompt (B, T): (B, n). Call model.eval() first. T + n is at most
    the context plus one. (gpt.py also has greedy, top-k and nucleus sampling.)"""
    cache, x, tokens = model.new_cache(len(prompt)), prompt, []
    for _ in range(n):
        logits = model(x, cache)[:, -1].float()      # (B, V); x: the prompt, then the last token
        p = ((logits - logits.amax(1, keepdim=True)) / temperature).softmax(1)
        x = torch.multinomial(p, 1)                                                     # (B, 1)
        tokens.append(x)
    return torch.cat(tokens, 1)


# -------------------------------------------------------------------------------------- the data


BYTES = common.Bytes()


def to_test(args, val, old, context, tokenizer=BYTES):
    """Subsets of the validation examples and of the old text's validation windows; they are smaller
    for published weights."""
    m, n = (400, 100) if tokenizer is BYTES else (100, 20)
    _, old = common.windows(args, old, min(context, 256), tokenizer, "--old")
    return common.evenly(val, m), common.evenly(old, n)


# -------------------------------------------------------------------------------------- the base


def prompt_tokens(args, context, tokenizer=BYTES):
    """BOS, a newline and --prompt as tokens (n,). Raises UserError if the context is too short."""
    prompt = tokenizer.encode("\n".encode() + args.prompt.encode(errors="surrogateescape"))
    common.require(len(prompt) < context, f"--prompt has {len(prompt) - 1} tokens, and the context "
                   f"of {context} holds {context - 2}: shorten it")
    return F.pad(prompt, (1, 0), value=tokenizer.BOS).to(args.device)


def pretrain(args):
    """Trains the base as gpt.py does, unless this was done before. Returns its folder."""
    base_args, done = common.stage(
        args, "base", ("data", "context", "dim", "depth", "heads", "dropout"),
        weight_decay=.1, warmup=.05, data=args.old or "pydocs")
    if done:
        return base_args.out
    train, _ = common.windows(args, base_args.data, args.context, BYTES, "--old")
    model = GPT(BYTES.vocab, args.context, args.dim, args.depth, args.heads, args.base_dropout)
    adapt_base(args, copy.deepcopy(model))                # fail early if something does not fit
    common.require(args.example < args.context, f"--example {args.example} does not fit in "
                   f"--context {args.context}, with the newline before it")
    prompt_tokens(args, args.context)                     # fails early, too
    common.say(f"First the base: training a GPT on {base_args.data}. "
               f"It is kept in {base_args.out}.")
    optimizer = common.optimizer(base_args, model.to(args.device).named_parameters())
    run = common.Run(base_args, model, optimizer, uniform=math.log(BYTES.vocab))
    for step in run:
        with run.autocast():
            inputs, target = mask(run.batch(train).long(), BYTES.BOS)               # A. mask
            inputs, target = run.part((inputs, target))                     # this process's part
            prediction = model(inputs)                                              # B. predict
            loss = distance(prediction, target)                                     # C. compare
        run.update(loss)                   # backward, clip, step: spelled out in main()
    return base_args.out


def load_base(args, folder):
    """Loads the base from the folder of a run of gpt.py or lora.py, or of GPT-2. Returns it and a
    dict: its folder (base), its fingerprint, the text that it was trained on (old), and the folder
    of the published weights that it started from (weights, "" if none)."""
    read = lambda folder: common.read_checkpoint(folder, "gpt.py", "lora.py", flag="--base")
    if common.has_run(folder):
        base = read(folder)["about"].get("base", folder)      # lora.py: the base of that run
        common.require(Path(base).exists(), f"the base of {folder} is not at {base} any more: give "
                       "its folder as --base")
        folder = base
    if not common.has_run(folder):
        model, _ = load_gpt2(args, folder, "--base")
        about = dict(base=folder, fingerprint=common.fingerprint(model.state_dict()),
                     old=args.old or "pydocs", weights=folder)
        return model.to(args.device).eval(), about
    state = read(folder)
    saved, weights = state["args"], state["model"]
    common.require(not common.is_images(saved["data"]), f"the base in {folder} was trained on "
                   f"images ({saved['data']}), and this is about text: take another --base")
    vocab, context = (len(weights[f"{name}_embed.weight"]) for name in ("token", "pos"))
    model = GPT(vocab, context, saved["dim"], saved["depth"], saved["heads"])     # without dropout
    model.load_state_dict(weights)
    return model.to(args.device).eval(), dict(
        base=str(folder), fingerprint=common.fingerprint(weights), old=args.old or saved["data"],
        weights=saved.get("weights", ""))


def load_gpt2(args, path, flag="--weights", dropout=0.):
    """Loads GPT-2 from a folder and sets its sizes in args. Returns the model, its tokenizer."""
    state, config = common.published(path, "GPT-2", common.GPT2, "pos_embed.weight", flag)
    state = {name: x.T if x.ndim == 2 and "embed" not in name else x
             for name, x in state.items()}                              # theirs are (in, out)
    tokenizer, (context, args.dim) = common.BPE.load(path), state["pos_embed.weight"].shape
    args.depth = sum(name.endswith("qkv.weight") for name in state)
    args.heads = config.get("n_head", args.dim // 64)
    model = GPT(tokenizer.vocab, context, args.dim, args.depth, args.heads, dropout)
    common.fill_in(model, state, path, config)
    return model, tokenizer


def publish(model):
    """The tensors of a GPT under GPT-2's names, as transformers loads them."""
    found = {f"transformer.{common.rename(name, common.GPT2, back=True)}": x
             for name, x in model.state_dict().items()}
    return {name: x.T.contiguous() if x.ndim == 2 and ".h." in name else x
            for name, x in found.items()}


def adapt_base(args, model):
    """Adapts the base in place, as the settings say."""
    return adapt(model, args.method, args.targets, args.rank, args.alpha or args.rank, args.dropout)


def recipe(args):
    """Sets the batch size, steps and learning rate, which depend on k and the method."""
    args.batch = min(args.batch, args.k)
    args.steps = min(args.steps, round(args.epochs * args.k / args.batch))
    args.lr = args.lr or LR[args.method]


# ------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def evaluate(args, model, x, target=None, examples=None, bos=BYTES.BOS):
    """Loss on texts x (m, T), in nats per token, over all tokens or the targets (m, T) that are not
    -100. The examples (k, T') or (n,), if any, are prepended to each text (in-context)."""
    nats, count, T = 0., 0, x.shape[1]
    target, size = x if target is None else target, max(1, 2048 // T)
    for x, target in zip(x.long().split(size), target.long().split(size)):
        inputs, _ = mask(x if examples is None else in_context(examples, x), bos)
        with common.autocast(args):
            prediction = model(inputs)[:, -T:]                      # without those of the examples
        counted = (target != -100).sum().item()
        nats += distance(prediction, target).item() * counted      # distance() is a mean
        count += counted
    common.bounded(math.isfinite(nats))
    return nats / count


def losses(args, model, val, old, bos=BYTES.BOS):
    """Losses on examples of the new text (m, 2, 1 + T) and on old text (m, T), nats per token."""
    return dict(new=evaluate(args, model, *val.unbind(1), bos=bos),
                old=evaluate(args, model, old, bos=bos))


def write(args, model, tokenizer=BYTES):
    """--prompt and the text that the model generates after a newline and the prompt."""
    start = prompt_tokens(args, len(model.pos_embed.weight), tokenizer)
    n = max(1, min(args.length, len(model.pos_embed.weight) - len(start)))
    torch.manual_seed(args.seed)
    new = sample(model, start[None], n, args.temperature)[0]
    return tokenizer.decode(torch.cat([start[1:], new])).removeprefix("\n")


def save_adapter(args, model, about):
    """Writes adapter.pt: the trained tensors, the method and the base. Returns its path."""
    path = Path(args.out, "adapter.pt")
    settings = {name: getattr(args, name) for name in ("method", "targets", "rank")}
    state = dict(fingerprint=about["fingerprint"],
                 adapter=settings | dict(alpha=args.alpha or args.rank),
                 tensors={name: x.cpu() for name, x in adapter_state(model).items()})
    with common.replacing(path) as f:
        torch.save(state, f)
    return path


def report(run, about, rows, texts, count):
    """Prints the results and writes result.json. count: the number of parameters of the base."""
    args, before, after = run.args, rows["the base"], rows[run.args.method]
    cells = [[who, f"{row['new']:.3f}", f"{row['old']:.3f}", f"{row['trained']:,}",
              f"{row['bytes']:,}"] for who, row in rows.items()]
    table = common.table([["nats per token", "new", "old", "trained", "bytes to store"], *cells])
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
    found = None if args.base else common.load_examples(args, BYTES)         # may fail: do it early
    model, about = load_base(args, args.base or pretrain(args))
    tokenizer = common.BPE.load(about["weights"]) if about["weights"] else BYTES
    train, val = found or common.load_examples(args, tokenizer)     # (n, 2, 1 + T), (m, 2, 1 + T)
    count, context = sum(p.numel() for p in model.parameters()), len(model.pos_embed.weight)
    val, old = to_test(args, val, about["old"], context, tokenizer)
    prompt_tokens(args, context, tokenizer)                         # fail early if it is too long
    examples = common.choose(train, args.k, args.seed)              # (k, 2, 1 + T)
    start = losses(args, model, val, old, tokenizer.BOS) | dict(trained=0, bytes=0)
    rows, texts = {"the base": start}, {"the base": write(args, model, tokenizer)}
    given = common.in_a_row(examples, tokenizer.BOS)                # (n,)
    if len(given) + val.shape[2] <= context:
        rows[f"{args.k} examples in the prompt (in-context)"] = start | dict(
            new=evaluate(args, model, *val.unbind(1), given, tokenizer.BOS),
            bytes=tokenizer.sizes[given.cpu()].sum().item())

    torch.manual_seed(args.seed)
    adapt_base(args, model)                             # in place: freezes the base, adds A and B
    optimizer = common.adamw(model.parameters(), args.lr, args.weight_decay)    # trainable only
    run = common.Run(args, model.train(), optimizer, about=about)
    if run.step < args.steps:
        common.say(f"Now {args.method}: training on {args.k} examples of {Path(args.data).name}.")
    for step in run:                       # sets the seed and the learning rate of this step
        with run.autocast():
            x, target = run.part(run.batch(examples).unbind(1)) # (B, 1 + T) each
            inputs, _ = mask(x, tokenizer.BOS)                  # A. mask
            prediction = model(inputs)                          # B. predict
            loss = distance(prediction, target)                 # C. compare, without the newline
        loss.backward()
        if not run.reduce(loss):           # averages over --accumulate parts and processes
            continue
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)

    model.eval()
    rows[args.method] = losses(args, model, val, old, tokenizer.BOS) | dict(
        trained=sum(p.numel() for p in adapter_state(model).values()),
        bytes=common.first(lambda: save_adapter(args, model, about).stat().st_size))
    texts[args.method] = write(args, model, tokenizer)
    report(run, about, rows, texts, count)
    return model


if __name__ == "__main__":
    common.cli(main, Args)
