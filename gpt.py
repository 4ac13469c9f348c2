"""GPT: predict the next token from the tokens before it, and generate text with a KV cache.

Paper    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2). Pixels
         as tokens: Chen et al. 2020, "Generative Pretraining from Pixels"

Idea     Predict each token from the tokens before it. (This is a masked autoencoder with a special
         mask: to predict token t, mask t and all tokens after it.) One pass predicts ALL tokens;
         BERT predicts 15 %. The model can also generate: sample a token, append it, repeat.
         Earlier tokens never attend to later ones, so their keys and values do not change. A KV
         cache stores them: only the new token passes through the layers, and attends to the cache.

Loss     L = -1 / T sum_t log p(x_t | BOS, x_1 ... x_{t-1}), in nats per token. A uniform guess
         costs ln 257. Bits per byte is the loss summed over all tokens, BOS included, divided by
         ln 2 and by the number of bytes. The windows do not overlap, so the first tokens of each
         window have little context.

Flow     tokens x (B, T): the bytes of a text, or the pixels of a small grey image, row by row. Each
         document of a text begins with BOS, so BOS is also the target where a document ends.
         A. mask      prepend BOS, drop the last token -> inputs (B, T), target x
         B. predict   causal Transformer               -> logits (B, T, 257)
         C. compare   cross-entropy at every token
         sample       prompt -> cache (prefill); then one token at a time

Data     the reference manual inside every Python; the last tenth of each document is new text

Run      python gpt.py --prompt "The "
Expect   1.347 ± 0.003 nats per token on new text, 1.95 ± 0.00 bits per byte (3 seeds; 162 s of
         training on 1 thread, beside other jobs; Intel(R) Xeon(R) Processor, 2 cores, Python
         3.11.7, torch 2.13.0+cpu)
Differs  A token is a byte (257 with BOS), not one of 50,257 subwords (byte-pair encoding). Every
         window begins with BOS, even in the middle of a document. The last layers of the residual
         branches start with smaller weights, as in the paper but not in OpenAI's code. Muon trains
         the matrices of the blocks (with orthogonalised steps: common.py) and AdamW the rest;
         OpenAI used Adam. A pixel is one of 256 greys, in the paper one of 512 colours. --weights
         loads the published GPT-2 in any size, with its tokenizer.

Try      --steps 0 --resume --temperature 0, 0.5, 1, 2: at which temperature does the text repeat
         itself, and at which does it fall apart?
         --data shapes: which part of a figure does the model complete, and what does it make up?
         --context 32 --batch 64 (on a CPU this keeps the number of tokens per step): how much of
         the loss depends on distant tokens?
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
    """Settings of gpt.py for a GPU; `cpu` has smaller ones for two CPU cores. The comments are
    the help texts of the flags, and the ranges in them are checked."""
    steps: int = 5000               # training steps, 0 or more
    batch: int = 64                 # windows of text, or images, per step
    lr: float = 1e-3                # peak learning rate
    optimizer: Literal["muon", "adamw"] = "muon"   # Muon for the blocks' matrices, or AdamW for all
    muon_lr: float = 0.02           # peak learning rate of Muon, in (0, inf)
    weight_decay: float = 0.1       # weight decay, on matrices only
    weights: str = ""               # folder of a published GPT-2; trained with --data and --steps N
    data: str = "pydocs"            # pydocs, pycode, shakespeare, a path; images: shapes, mnist ...
    context: int = 256              # tokens that the model reads, 2 or more (of images: side^2)
    dim: int = 384                  # channels
    depth: int = 6                  # blocks
    heads: int = 6                  # attention heads
    dropout: float = 0.2            # dropout probability, in [0, 1)
    image_size: int = 14            # side of the images in pixels, 2 or more
    prompt: str = "The "            # text that the sample at the end continues
    length: int = 400               # tokens to sample
    temperature: float = 0.8        # divides the logits; 1: as trained; 0: most likely token only
    top_k: int = 0                  # sample from the k most likely tokens, 0 or more; 0: from all
    top_p: float = 1.0              # nucleus sampling: total probability of the tokens, in (0, 1]

    cpu = dict(steps=1100, batch=16, lr=3e-3, muon_lr=0.04, context=128, dim=128, depth=4, heads=4,
               dropout=0.)
    published = dict(steps=0, batch=4, lr=3e-5, optimizer="adamw", data="", prompt="The", length=60)


# ------------------------------------------------------------------------------------- the model
# B batch, T new tokens, L all tokens so far, C channels, H heads, D = C / H, V vocabulary size.


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
    """C. Mean cross-entropy of logits (B, T, V) and tokens (B, T), in nats per token."""
    return F.cross_entropy(prediction.flatten(0, 1).float(), target.flatten())


def mask(x, bos):
    """A. Tokens x (B, T) -> inputs (B, T), shifted right by one, and the target, x itself.

    For h e l l o the inputs are BOS h e l l. The shift and causal attention together mask x_t and
    all tokens after it in the prediction of x_t.
    """
    return torch.cat([torch.full_like(x[:, :1], bos), x[:, :-1]], 1), x


@torch.inference_mode()
def sample(model, prompt, n, temperature=1., top_k=0, top_p=1.):
    """Samples n tokens after each prompt (B, T): (B, n). Call model.eval() first. T + n is at most
    the context plus one, because the last token is not fed back (sample_text goes on)."""
    cache, x, tokens = model.new_cache(len(prompt)), prompt, []
    for _ in range(n):
        logits = model(x, cache)[:, -1]              # (B, V); x: the prompt, then the last token
        x = torch.multinomial(distribution(logits, temperature, top_k, top_p), 1)        # (B, 1)
        tokens.append(x)
    return torch.cat(tokens, 1)


def distribution(logits, temperature=1., top_k=0, top_p=1.):
    """Logits (B, V) -> probabilities to sample from, (B, V) float32.

    The logits are divided by temperature; 0 means greedy decoding: only the most likely token.
    top_k then keeps the k most likely tokens (0: all), and top_p the smallest set of them, at least
    one, whose probabilities sum to top_p or more (nucleus sampling, arXiv 1904.09751).
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(1), logits.shape[1]).float()
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    p = ((logits.float() - logits.amax(1, keepdim=True)) / temperature).softmax(1)
    if 0 < top_k < p.shape[1]:
        values, ids = p.topk(top_k, 1)
        p = torch.zeros_like(p).scatter(1, ids, values)
    if top_p < 1:
        values, ids = (p / p.sum(1, keepdim=True)).sort(stable=True, dim=1, descending=True)
        before = values.cumsum(1) - values                       # total of the more likely tokens
        drop = before > top_p - 1e-6                             # 1e-6: rounding errors of the sum
        drop[:, 0] = False                                       # always keep the most likely
        values = values.masked_fill(drop, 0.)
        p = torch.zeros_like(p).scatter(1, ids, values)
    return p / p.sum(1, keepdim=True)


def sample_text(model, prompt, n, bos, stop=None, **how):
    """Samples n tokens after one prompt (T,), without BOS, which this adds; beyond the context if
    need be: (n,), or fewer if the token `stop` comes up first. **how: arguments of sample. Raises
    ValueError if the prompt is no (T,), or if BOS and the prompt do not fit into the context."""
    if prompt.ndim != 1:
        raise ValueError(f"sample_text takes one prompt (T,), not {tuple(prompt.shape)}")
    context, window = len(model.pos_embed.weight), F.pad(prompt, (1, 0), value=bos)
    if len(window) > context:
        raise ValueError(f"{len(window)} tokens are more than the context of {context}")
    text = prompt[:0]                                                # the new tokens
    while len(text) < n:
        if len(window) > context:        # full: restart from BOS and its last half
            window = F.pad(window[-(context // 2):], (1, 0), value=bos)
        new = sample(model, window[None], min(n - len(text), context + 1 - len(window)), **how)[0]
        if stop is not None and (new == stop).any():
            return torch.cat([text, new[:(new == stop).nonzero()[0, 0]]])
        text, window = torch.cat([text, new]), torch.cat([window, new])
    return text


# ------------------------------------------------------------------------ the data and the weights


BYTES = common.Bytes()
BOS = BYTES.BOS


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


def pixels(args):
    """Images as sequences of grey pixels: train (n, S^2) and validation (m, S^2), uint8. They are
    averaged down, to smooth the edges; the embedded ones are drawn at twice the size."""
    size = args.image_size
    images = common.load_images(dataclasses.replace(args, image_size=2 * size))

    def rows(x):
        grey = x.float().mean(1, keepdim=True)                                   # (B, 1, 2 S, 2 S)
        return F.interpolate(grey, size=[size, size], mode="area").round().byte().flatten(1)
    return [torch.cat([rows(part) for part in x.split(1000)])
            for x in (images.train, images.test[:2000])]


# ------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def evaluate(args, model, val, tokenizer=BYTES):
    """Loss on the validation tokens (m, T): (nats per token, bits per byte)."""
    nats, count, sizes = 0., 0, tokenizer.sizes.to(val.device)     # count: bytes
    for x in common.progress(val.split(max(1, 8192 // val.shape[1])), "evaluating"):
        inputs, target = mask(x.long(), tokenizer.BOS)
        with common.autocast(args):
            nats += distance(model(inputs), target).item() * x.numel()
        count += sizes[target].sum().item()
    common.bounded(math.isfinite(nats))
    return nats / val.numel(), nats / math.log(2) / count


def sampling(args):
    """The arguments of sample that the settings determine."""
    return dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)


def prompt_tokens(args, tokenizer=BYTES):
    """--prompt as tokens (n,). Raises UserError if BOS and the prompt exceed --context."""
    prompt = tokenizer.encode(args.prompt.encode(errors="surrogateescape")).to(args.device)
    common.require(len(prompt) < args.context, f"--prompt has {len(prompt)} tokens, and --context "
                   f"{args.context} holds {args.context - 1} beside BOS: shorten it")
    return prompt


def write(args, model, prompt, tokenizer=BYTES):
    """The prompt and what the model generates after it, up to --length or the next BOS."""
    torch.manual_seed(args.seed)
    bos = tokenizer.BOS
    new = sample_text(model, prompt, args.length, bos, stop=bos, **sampling(args))
    return tokenizer.decode(torch.cat([prompt, new]))


def complete(args, model, val):
    """Writes completions.png: twelve times an upper half, two completions and the original."""
    size, half = args.image_size, args.image_size // 2 * args.image_size
    given = val[:12, :half].long()
    twice = given.repeat_interleave(2, 0)
    prompt = F.pad(twice, (1, 0), value=BOS)
    torch.manual_seed(args.seed)
    new = sample(model, prompt, size ** 2 - half, **sampling(args))
    both = torch.cat([twice, new.clamp(max=255)], 1).view(-1, 2, size ** 2)
    upper = F.pad(given, (0, size ** 2 - half), value=128)
    sheet = torch.cat([upper[:, None], both, val[:12, None].long()], 1).view(-1, 1, size, size)
    common.save_png(f"{args.out}/completions.png", sheet.expand(-1, 3, -1, -1) / 255, 12, group=4,
                    zoom=math.ceil(84 / size))


# ------------------------------------------------------------------------------------------ main


@common.setup
def main(args):
    images, model, tokenizer = common.is_images(args.data), None, BYTES
    if args.weights:
        common.require(not images, f"--weights are of a text model, not for --data {args.data}")
        model, tokenizer = load_gpt2(args, args.weights, dropout=args.dropout)
    prompt = None if images else prompt_tokens(args, tokenizer)
    if args.weights and not args.data:                              # no data: generate only
        common.require(not args.steps, "--steps trains --weights on a text: give its --data, too")
        common.say(write(args, model.to(args.device).eval(), prompt, tokenizer))
        return model
    train, val = pixels(args) if images else common.windows(                   # (n, T), (m, T)
        args, args.data, args.context, tokenizer)
    most = 2 ** 14 if args.weights else 2 ** 18                 # tokens to evaluate, evenly spaced
    val = common.evenly(val, max(1, most // val.shape[1]))
    model = model or GPT(tokenizer.vocab, train.shape[1], args.dim, args.depth, args.heads,
                         args.dropout)
    model.to(args.device)
    optimizer = common.optimizer(args, model.named_parameters())
    run = common.Run(args, model, optimizer, uniform=math.log(tokenizer.vocab))
    for step in run:                       # sets the seed and the learning rate of this step
        with run.autocast():
            inputs, target = mask(run.batch(train).long(), tokenizer.BOS)           # A. mask
            inputs, target = run.part((inputs, target))                     # this process's part
            prediction = model(inputs)                                              # B. predict
            loss = distance(prediction, target)                                     # C. compare
        loss.backward()
        if not run.reduce(loss):           # averages over --accumulate parts and processes
            continue
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)

    model.eval()
    nats, bits = evaluate(args, model, val, tokenizer)
    text = complete(args, model, val) if images else write(args, model, prompt, tokenizer)
    what, unit = ("images", "pixel") if images else ("text", "byte")
    common.report(run, f"{nats:.3f} nats per token, {bits:.3f} bits per {unit}",
                  dict(loss=nats, bits=bits, uniform=run.uniform, text=text))
    common.say(f"\nPicture: {args.out}/completions.png (given | completion | another | original)"
               if images else f"\n{text}")
    common.say(f"\nLoss on new {what}: {nats:.3f} nats per token (uniform guess "
               f"{run.uniform:.3f}), {bits:.3f} bits per {unit}.")
    return model


if __name__ == "__main__":
    common.cli(main, Args)
