"""GPT: hide the future, predict the next token. With a cache of keys and values it writes text.

Paper    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2). Pixels
         as tokens: Chen et al. 2020, "Generative Pretraining from Pixels"

Idea     A masked autoencoder with a special mask: where token t is guessed, it and all that come
         after it are hidden. One pass owes (has to predict) ALL tokens, each from what stands
         before it, where BERT owes 15 %; and a model that gives each token's probabilities from
         those before can write: draw a token, put it behind the others, and go on. Earlier tokens
         never see later ones, so their keys and values stay as they are: a KV cache holds them, and
         a step costs one token.

Loss     L = -1 / T sum_t log p(x_t | BOS, x_1 ... x_{t-1}),   in nats a token, at chance ln 257.
         Bits a byte: the sum over all tokens, ends of documents included, divided by ln 2 and by
         the number of bytes.

Flow     tokens x (B, T): bytes of a text, or the pixels of a small grey image, row by row
         A. mask      shift: BOS in front, the last one off   -> (B, T), and x itself is owed
         B. predict   causal Transformer                      -> logits (B, T, 257)
         C. compare   cross-entropy at every token
         sample       prompt -> cache; then one token at a time

Run      python gpt.py --prompt "The "
Expect   1.439 ± 0.004 nats a token on new text, 2.08 ± 0.01 bits a byte (3 seeds; 136 s of training
         on 2 threads; AMD EPYC, 2 cores, torch 2.13.0+cpu)
Differs  A token is a byte (257 with BOS), not one of 50,257 pieces of words (byte-pair encoding);
         BOS stands in front of every window, and of each new document. Residual branches
         start with smaller weights, as the paper says, and OpenAI's published code does not. Pixels
         are 256 greys, theirs 512 colours. The tensors are GPT-2's: OpenAI's load by renaming,
         matrices transposed.

Try      --steps 0 --resume --temperature 0, 0.5, 1, 2: where does it repeat itself, and where does
         it fall apart?
         --data shapes: which part of a figure can it complete, and what does it make up?
         --context 32 --batch 64 (on a CPU as many tokens a step as usual): how much of the loss
         needs what is far away?
"""
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import common

# -------------------------------------------------------------------------------------- settings


@dataclass
class Args(common.Args):
    """Settings of gpt.py: for a GPU, and under `cpu` smaller ones for two cores."""
    steps: int = 5000               # training steps
    batch: int = 64                 # windows of the text, or images, a step
    lr: float = 1e-3                # peak learning rate
    weight_decay: float = 0.1       # AdamW's decay, on matrices only
    data: str = "pydocs"            # pydocs, pycode, shakespeare, file, folder; shapes, mnist ...
    context: int = 256              # tokens that the model can see, with BOS (images: side^2)
    dim: int = 384                  # channels
    depth: int = 6                  # blocks
    heads: int = 6                  # attention heads
    dropout: float = 0.2            # share of the channels dropped, against learning by heart
    side: int = 14                  # side in pixels to which images are made smaller
    prompt: str = "The "            # what the sample at the end begins with
    length: int = 400               # tokens of that sample
    temperature: float = 0.8        # divides the logits: 1 as it learned, 0 the most likely only
    top_k: int = 0                  # draw from the k most likely tokens only, 0: from all
    top_p: float = 1.0              # draw from the likeliest that hold this share of probability

    cpu = dict(steps=2000, batch=16, lr=3e-3, context=128, dim=128, depth=4, heads=4, dropout=0.)

    def check(self):
        super().check()
        self.at_least(1, "depth", "length")
        self.at_least(2, "side")
        self.at_least(0, "top_k", "temperature")
        self.multiple("dim", "heads")
        self.below_1("dropout")
        need = common.require
        need(self.context > 1, f"--context must be 2 or more, not {self.context}: BOS and a token")
        need(0 < self.top_p <= 1, f"--top-p must be above 0 and 1 at most, not {self.top_p}")
        n = len(self.prompt.encode(errors="surrogateescape"))
        need(n < self.context, f"--prompt has {n} bytes, and --context {self.context} holds "
             f"{self.context - 1} beside BOS: shorten it, or take a longer context")


# ------------------------------------------------------------------------------------- the model
# B batch, T tokens that are new, L tokens in all, C channels, H heads, D = C / H, V vocabulary.


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


def distribution(logits, temperature=1., top_k=0, top_p=1.):
    """Logits (B, V) -> the probabilities to draw from, (B, V) float32.

    temperature divides the logits; 0 is greedy: all on the most likely. Then top_k keeps the k most
    likely tokens (0: all), and top_p the fewest likeliest that hold the share p of what is left.
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(1), logits.shape[1]).float()
    p = ((logits.float() - logits.amax(1, keepdim=True)) / temperature).softmax(1)
    if 0 < top_k < p.shape[1]:
        p = torch.zeros_like(p).scatter_(1, *p.topk(top_k, 1)[::-1])
    if top_p < 1:
        p, order = (p / p.sum(1, keepdim=True)).sort(stable=True, dim=1, descending=True)
        p = p * (p.cumsum(1) - p < top_p)                     # what the likelier ones leave to hold
        p = torch.zeros_like(p).scatter_(1, order, p)
    return p / p.sum(1, keepdim=True)


def pick(p, u):
    """Tokens (B,) where the running sum of p (B, V) first passes the shares u (B,) in [0, 1)."""
    total = p.cumsum(1)
    last = (total < total[:, -1:]).sum(1)                 # the last token that has a probability
    return torch.minimum((total <= u[:, None] * total[:, -1:]).sum(1), last)


def shares(seed, rows, n):
    """n random numbers in [0, 1) for each row, of seed, seed + 1, ...: (rows, n)."""
    return torch.stack([torch.rand(n, generator=torch.Generator().manual_seed(seed + row))
                        for row in range(rows)])


@torch.inference_mode()
def sample(model, prompts, n, bos, temperature=1., top_k=0, top_p=1., seed=0, stop=None,
           cached=True):
    """Continues each of the prompts, a list of (t,) tokens of any lengths, by n tokens: a list of
    (n,) tokens, shorter where `stop` was drawn, which is left out. In evaluation mode, please.

    A batch is written column by column, with prompts in the place of draws while they last: all
    rows stand at the same place, and nothing is padded. Row i draws with the random numbers of seed
    + i, so alone with that seed it gives the same. When the context is full, its last half is read
    again behind a new BOS, and the text goes on. Without `cached` each token comes from reading all
    of it again: the same, but slower. Raises ValueError where a prompt and BOS exceed the context.
    """
    context, device = len(model.pos_embed.weight), model.pos_embed.weight.device
    lengths = [len(prompt) for prompt in prompts]
    if max(lengths) >= context:
        raise ValueError(f"{max(lengths)} tokens and BOS do not fit a context of {context}")
    text = torch.full((len(prompts), 1 + max(lengths) + n), bos, device=device)
    for row, prompt in zip(text, prompts):
        row[1:1 + len(prompt)] = torch.as_tensor(prompt)
    ends, u = torch.tensor(lengths, device=device), shares(seed, *text.shape).to(device)
    forward = model.forward        # never compiled: the length is another one at each token
    new = window = text[:, :1 + min(lengths)]
    cache, ended = model.cache(len(prompts)), torch.zeros_like(ends, dtype=torch.bool)
    for t in range(new.shape[1], text.shape[1]):
        logits = forward(new, cache) if cached else forward(window)
        token = pick(distribution(logits[:, -1], temperature, top_k, top_p), u[:, t])
        text[:, t] = torch.where(t > ends, token, text[:, t])          # a prompt stays as it is
        if stop is not None:
            ended |= (t > ends) & (text[:, t] == stop)
            if ended.all():
                break
        new = text[:, t:t + 1]
        window = torch.cat([window, new], 1)
        if window.shape[1] > context:
            new = window = F.pad(window[:, -(context // 2):], (1, 0), value=bos)
            for block in cache:
                block.length = 0
    rows = [row[1 + length:][:n] for row, length in zip(text, lengths)]
    return [row if stop is None else row[:(row != stop).cumprod(0).sum()] for row in rows]


# ------------------------------------------------------------------------------------------ look


BYTES = common.Bytes()
BOS = BYTES.BOS


def pixels(args):
    """Images as rows of grey bytes: train (n, side^2), val (m, side^2) uint8."""
    images = common.load_images(args.data, args.data_dir, 2 * args.side)

    def rows(x):
        grey = x.float().mean(1, keepdim=True)                                   # (B, 1, S, S)
        return F.interpolate(grey, size=2 * [args.side], mode="area").round().byte().flatten(1)
    train, val = (torch.cat([rows(part) for part in x.split(1000)])
                  for x in (images.train, images.test[:2000]))
    return train.to(args.device), val.to(args.device)


def windows(args):
    """Stretches of --context tokens of a text: to train on from every start, (n, context); to
    validate on behind each other, (m, context)."""
    text, T = common.load_text(args.data, args.data_dir), args.context
    train, val = (BYTES.stream(part).to(args.device) for part in (text.train, text.val))
    common.require(len(val) >= T <= len(train), f"the last tenth of --data {args.data} has "
                   f"{len(val)} tokens, the rest {len(train)}, and --context {T} needs as many in "
                   "either: take a longer text or a shorter context")
    return train.unfold(0, T, 1), val.unfold(0, T, T)


@torch.no_grad()
def evaluate(args, model, val):
    """Loss on the tokens to validate on, (m, T): nats a token, and bits a byte."""
    nats, count = 0., 0                                         # count: tokens that are bytes
    with common.autocast(args):
        for x in val.split(max(1, 8192 // val.shape[1])):
            masked, target = mask(x.long(), BOS)
            nats += distance(model(masked), target).item() * x.numel()
            count += (target != BOS).sum().item()
    return nats / val.numel(), nats / math.log(2) / count


def write(args, model, prompts, n, **how):
    """sample() with the settings of the command line, in float32."""
    with common.autocast(args, "float32"):
        return sample(model, prompts, n, BOS, args.temperature, args.top_k, args.top_p, args.seed,
                      **how)


def look(args, model, val):
    """What the model writes: a text behind --prompt, which is returned, or completions.png."""
    if not common.is_images(args.data):
        prompt = BYTES.encode(args.prompt.encode(errors="surrogateescape"))
        (new,) = write(args, model, [prompt], args.length, stop=BOS)     # or to the document's end
        return BYTES.decode(torch.cat([prompt, new.cpu()]))
    half, side = args.side // 2 * args.side, args.side
    given = val[:12, :half].long()
    twice = given.repeat_interleave(2, 0)
    drawn = torch.stack(write(args, model, list(twice), side * side - half)).clamp(max=255)
    drawn = torch.cat([twice, drawn], 1).view(-1, 2, side ** 2)
    upper = F.pad(given, (0, side * side - half), value=128)
    sheet = torch.cat([upper[:, None], drawn, val[:12, None].long()], 1).view(-1, 1, side, side)
    common.save_png(f"{args.out}/completions.png", sheet.expand(-1, 3, -1, -1) / 255, 12, group=4,
                    zoom=-(-84 // side))


def speeds(args, model):
    """A whole context, 256 tokens at most, written at batch 1: how many, and how many a second with
    the cache and without."""
    n, found = min(256, len(model.pos_embed.weight)) - 1, []
    for cached in True, False:
        began = time.time()
        write(args, model, [[]], n, cached=cached)[0].tolist()       # tolist: waits for a GPU
        found.append(n / (time.time() - began))
    return n, *found


def tell(args, run, nats, bits, text, speed):
    """The end of the run, in words and in result.json."""
    new, unit = ("images", "pixel") if text is None else ("text", "byte")
    print("" if text is None else f"\n{text}\n")
    common.say(f"Loss on new {new}: {nats:.3f} nats a token (chance "
               f"{math.log(BYTES.vocab):.3f}), {bits:.3f} bits a {unit} (chance "
               f"{math.log2(BYTES.vocab):.3f}).")
    common.say(f"It writes {speed[1]:,.0f} tokens a second with the KV cache, {speed[2]:,.0f} "
               f"without ({speed[0]} tokens, one text).")
    if text is None:
        common.say(f"Picture: {args.out}/completions.png (given | completed | another time | "
                   "original)")
    common.report(run, f"{nats:.3f} nats, {bits:.3f} bits a {unit}",
                  dict(loss=nats, bits=bits, chance=math.log(BYTES.vocab), speed=speed[1:],
                       text=text))


# ------------------------------------------------------------------------------------------ main


def main(args):
    train, val = (pixels if common.is_images(args.data) else windows)(args)         # (n, T), (m, T)
    model = GPT(BYTES.vocab, train.shape[1], args.dim, args.depth, args.heads, args.dropout)
    run = common.Run(args, model.to(args.device), chance=math.log(BYTES.vocab))
    for step in run:
        masked, target = mask(run.batch(train).long(), BOS)
        prediction = model(masked)
        loss = distance(prediction, target)
        run.update(loss)

    model.eval()
    nats, bits = evaluate(args, model, val)
    tell(args, run, nats, bits, look(args, model, val), speeds(args, model))


if __name__ == "__main__":
    common.start(main, Args)
