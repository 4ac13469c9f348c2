"""GPT: predict the next token from those before it, and write text with a cache of keys and values.

Paper    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2). Pixels
         as tokens: Chen et al. 2020, "Generative Pretraining from Pixels"

Idea     Predict each token from those before it. (It is a masked autoencoder with a special mask:
         to predict token t, mask t and all that follow.) One pass predicts ALL tokens, where BERT
         predicts 15 %. And such a model can write: sample a token, append it, repeat. Earlier
         tokens never attend to later ones, so their keys and values do not change: a KV cache
         keeps them, and a new token costs the layers of one token, and attention to all before it.

Loss     L = -1 / T sum_t log p(x_t | BOS, x_1 ... x_{t-1}),   in nats per token; a uniform guess
         costs ln 257. Bits per byte: the sum over all tokens, ends of documents included, divided
         by ln 2 and by the number of bytes; in windows one after another, so that the first tokens
         of each have little before them.

Flow     tokens x (B, T): bytes of a text, or the pixels of a small grey image, row by row. In a
         text, BOS stands before each document, so it is predicted, too, where a document ends.
         A. mask      shift: BOS before, without the last one -> inputs (B, T); target x
         B. predict   causal Transformer                      -> logits (B, T, 257)
         C. compare   cross-entropy at every token
         sample       prompt -> cache (prefill); then one token at a time

Run      python gpt.py --prompt "The "
Expect   1.347 ± 0.003 nats per token on new text, 1.95 ± 0.00 bits per byte (3 seeds; 162 s of
         training on 1 thread, beside other jobs; Intel(R) Xeon(R) Processor, 2 cores, Python
         3.11.7, torch 2.13.0+cpu)
Differs  A token is a byte (257 with BOS), not one of 50,257 pieces of words (byte-pair encoding).
         Every window begins with a BOS, in the midst of a document, too. Residual branches start
         with smaller weights, as in the paper (OpenAI's published code: not). Muon trains the
         matrices of the blocks (its steps are orthogonalised: common.py), AdamW the rest (theirs:
         Adam for all). Pixels are 256 greys, theirs 512 colours. --weights loads the published
         GPT-2, of any size, with its tokenizer.

Try      --steps 0 --resume --temperature 0, 0.5, 1, 2: where does it repeat itself, and where does
         it fall apart?
         --data shapes: which part of a figure can it complete, and what does it make up?
         --context 32 --batch 64 (on a CPU as many tokens per step as usual): how much of the loss
         needs what is far away?
"""
import dataclasses
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
    """Settings of gpt.py: for a GPU, and in `cpu` smaller ones for two cores."""
    steps: int = 5000               # training steps, 0 or more
    batch: int = 64                 # windows of the text, or images, per step
    lr: float = 1e-3                # peak learning rate
    optimizer: Literal["muon", "adamw"] = "muon"   # muon: for the matrices of the blocks
    muon_lr: float = 0.02           # peak learning rate of these matrices, in (0, inf)
    weight_decay: float = 0.1       # decay, of matrices only
    weights: str = ""               # GPT-2 as published: a folder; it writes, and --steps tunes it
    data: str = "pydocs"            # pydocs, pycode, shakespeare, file, folder; shapes, mnist ...
    context: int = 256              # tokens of a window, BOS included, 2 or more (images: side^2)
    dim: int = 384                  # channels
    depth: int = 6                  # blocks
    heads: int = 6                  # attention heads
    dropout: float = 0.2            # dropout probability, against overfitting, in [0, 1)
    image_size: int = 14            # side in pixels to which images are scaled, 2 or more
    prompt: str = "The "            # what the sample at the end begins with
    length: int = 400               # tokens of that sample
    temperature: float = 0.8        # divides the logits: 1 as trained, 0 the most likely token
    top_k: int = 0                  # sample from the k most likely tokens, 0 or more; 0: from all
    top_p: float = 1.0              # sample from the fewest tokens of this total, in (0, 1]

    cpu = dict(steps=1100, batch=16, lr=3e-3, muon_lr=0.04, context=128, dim=128, depth=4, heads=4,
               dropout=0.)
    published = dict(steps=0, batch=4, lr=3e-5, optimizer="adamw", data="", prompt="The", length=60)


# ------------------------------------------------------------------------------------- the model
# B batch, T new tokens, L tokens in all, C channels, H heads, D = C / H, V vocabulary.


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
    """C. Mean cross-entropy of logits (B, T, V) with tokens (B, T), in nats per token."""
    return F.cross_entropy(prediction.flatten(0, 1).float(), target.flatten())


def mask(x, bos):
    """A. Tokens x (B, T) -> the inputs (B, T), shifted by one, and the target, x itself.

    Of h e l l o the inputs are BOS h e l l. The shift, with causal attention, masks x_t and all
    that follow where x_t is predicted.
    """
    return F.pad(x[:, :-1], (1, 0), value=bos), x


@torch.inference_mode()
def sample(model, prompt, n, temperature=1., top_k=0, top_p=1.):
    """Continues the prompts (B, T) by n tokens: (B, n). The model should be in evaluation mode. T +
    n is at most the context and one, since the last token is not read again."""
    cache, x, tokens = model.new_cache(len(prompt)), prompt, []
    for _ in range(n):
        logits = model(x, cache)[:, -1]              # (B, V); first the prompt, then one token each
        x = torch.multinomial(distribution(logits, temperature, top_k, top_p), 1)        # (B, 1)
        tokens.append(x)
    return torch.cat(tokens, 1)


def distribution(logits, temperature=1., top_k=0, top_p=1.):
    """Logits (B, V) -> the probabilities to sample from, (B, V) float32.

    temperature divides the logits; 0 is greedy: the most likely token only. Then top_k keeps the k
    most likely tokens (0: all), and top_p the fewest of them whose probabilities sum to top_p or
    more (nucleus sampling, arXiv 1904.09751), at least one.
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(1), logits.shape[1]).float()
    p = ((logits.float() - logits.amax(1, keepdim=True)) / temperature).softmax(1)
    if 0 < top_k < p.shape[1]:
        values, ids = p.topk(top_k, 1)
        p = torch.zeros_like(p).scatter(1, ids, values)
    if top_p < 1:
        values, ids = (p / p.sum(1, keepdim=True)).sort(stable=True, dim=1, descending=True)
        before = values.cumsum(1) - values                       # sum of the more likely tokens
        before[:, 0] = -1.                                       # the most likely is always kept
        values = values.masked_fill(before > top_p - 1e-6, 0.)   # 1e-6: rounding of the sums
        p = torch.zeros_like(p).scatter(1, ids, values)
    return p / p.sum(1, keepdim=True)


def sample_text(model, prompt, n, bos, stop=None, **how):
    """Continues one text, tokens (T,), by n tokens, which may be more than the context, or up to
    `stop`: (n,) or shorter. **how: as for sample. Raises ValueError where BOS and the prompt are
    more than the context."""
    context, window = len(model.pos_embed.weight), F.pad(prompt, (1, 0), value=bos)
    if len(window) > context:
        raise ValueError(f"{len(window)} tokens are more than the context of {context}")
    text = prompt[:0]                                                # what is new
    while len(text) < n:
        if len(window) > context:        # it is full: read the last half of it again, after BOS
            window = F.pad(window[-(context // 2):], (1, 0), value=bos)
        new = sample(model, window[None], min(n - len(text), context + 1 - len(window)), **how)[0]
        if stop is not None and (new == stop).any():
            return torch.cat([text, new[:int((new == stop).nonzero()[0])]])
        text, window = torch.cat([text, new]), torch.cat([window, new])
    return text


# ------------------------------------------------------------------------------------ evaluation


BYTES = common.Bytes()
BOS = BYTES.BOS


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


def pixels(args):
    """Images as rows of grey bytes: train (n, S^2), validation (m, S^2) uint8. Shapes are drawn at
    twice the size and averaged, so that edges are smooth."""
    size = args.image_size
    images = common.load_images(dataclasses.replace(args, image_size=2 * size))

    def rows(x):
        grey = x.float().mean(1, keepdim=True)                                   # (B, 1, 2 S, 2 S)
        return F.interpolate(grey, size=[size, size], mode="area").round().byte().flatten(1)
    return [torch.cat([rows(part) for part in x.split(1000)])
            for x in (images.train, images.test[:2000])]


def windows(args, tokens=BYTES):
    """Windows of --context tokens of a text: to train on from every start, (n, context); to
    validate on one after another, (m, context)."""
    text, T = common.load_text(args.data, args.data_dir), args.context
    train, val = (tokens.stream(part).to(args.device) for part in (text.train, text.val))
    common.require(len(val) >= T <= len(train), f"the last tenth of --data {args.data} has "
                   f"{len(val)} tokens, the rest {len(train)}, and --context {T} needs as many in "
                   "both: take a longer text or a shorter context")
    return train.unfold(0, T, 1), val.unfold(0, T, T)


@torch.no_grad()
def evaluate(args, model, val, tokens=BYTES):
    """Loss on the validation tokens (m, T): nats per token, and bits per byte."""
    nats, count, sizes = 0., 0, tokens.sizes.to(val.device)     # count: bytes
    for x in common.progress(val.split(max(1, 8192 // val.shape[1])), "evaluating"):
        inputs, target = mask(x.long(), tokens.BOS)
        with common.autocast(args):
            nats += distance(model(inputs), target).item() * x.numel()
        count += sizes[target].sum().item()
    common.bounded(math.isfinite(nats))
    return nats / val.numel(), nats / math.log(2) / count


def how(args):
    """The settings of sample."""
    return dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)


def prompt_tokens(args, tokens=BYTES):
    """--prompt as tokens (n,). Raises UserError where BOS and they exceed --context."""
    prompt = tokens.encode(args.prompt.encode(errors="surrogateescape")).to(args.device)
    common.require(len(prompt) < args.context, f"--prompt has {len(prompt)} tokens, and --context "
                   f"{args.context} holds {args.context - 1} beside BOS: shorten it")
    return prompt


def write(args, model, prompt, tokens=BYTES):
    """The text that the model writes after the prompt, at most to the end of a document."""
    torch.manual_seed(args.seed)
    new = sample_text(model, prompt, args.length, tokens.BOS, stop=tokens.BOS, **how(args))
    return tokens.decode(torch.cat([prompt, new]))


def complete(args, model, val):
    """Writes completions.png: the upper half of twelve images, two completions, the original."""
    size, half = args.image_size, args.image_size // 2 * args.image_size
    given = val[:12, :half].long()
    twice = given.repeat_interleave(2, 0)
    prompt = F.pad(twice, (1, 0), value=BOS)
    torch.manual_seed(args.seed)
    new = sample(model, prompt, size ** 2 - half, **how(args))
    both = torch.cat([twice, new.clamp(max=255)], 1).view(-1, 2, size ** 2)
    upper = F.pad(given, (0, size ** 2 - half), value=128)
    sheet = torch.cat([upper[:, None], both, val[:12, None].long()], 1).view(-1, 1, size, size)
    common.save_png(f"{args.out}/completions.png", sheet.expand(-1, 3, -1, -1) / 255, 12, group=4,
                    zoom=-(-84 // size))


# ------------------------------------------------------------------------------------------ main


@common.setup
def main(args):
    images, model, tokens = common.is_images(args.data), None, BYTES
    if args.weights:
        common.require(not images, f"--weights are of a text model, not for --data {args.data}")
        model, tokens = load_gpt2(args, args.weights, dropout=args.dropout)
    prompt = None if images else prompt_tokens(args, tokens)
    if args.weights and not args.data:                              # nothing to train on or to test
        common.say(write(args, model.to(args.device).eval(), prompt, tokens))
        return model
    train, val = pixels(args) if images else windows(args, tokens)             # (n, T), (m, T)
    val = common.evenly(val, max(1, (2 ** 14 if args.weights else 2 ** 18) // val.shape[1]))
    model = model or GPT(tokens.vocab, train.shape[1], args.dim, args.depth, args.heads,
                         args.dropout)
    model.to(args.device)
    optimizer = common.optimizer(args, model.named_parameters())
    run = common.Run(args, model, optimizer, uniform=math.log(tokens.vocab))
    for step in run:                       # sets the seed and the learning rate of this step
        with run.autocast():
            inputs, target = run.part(mask(run.batch(train).long(), tokens.BOS))    # A. mask
            prediction = model(inputs)                                              # B. predict
            loss = distance(prediction, target)                                     # C. compare
        loss.backward()
        if not run.reduce(loss):           # of --accumulate parts, and of processes, the mean
            continue
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)

    model.eval()
    nats, bits = evaluate(args, model, val, tokens)
    text = complete(args, model, val) if images else write(args, model, prompt, tokens)
    what, unit = ("images", "pixel") if images else ("text", "byte")
    common.report(run, f"{nats:.3f} nats per token, {bits:.3f} bits per {unit}",
                  dict(loss=nats, bits=bits, uniform=run.uniform, text=text))
    common.say(f"\nPicture: {args.out}/completions.png (given | completed | again | original)"
               if images else f"\n{text}")
    common.say(f"\nLoss on new {what}: {nats:.3f} nats per token (uniform guess "
               f"{run.uniform:.3f}), {bits:.3f} bits per {unit}.")
    return model


if __name__ == "__main__":
    common.cli(main, Args)
