"""BERT: mask 15 % of the words, predict them from both sides, then fine-tune on a few labels.

Paper    Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language
         Understanding", arXiv 1810.04805. --strategy span: Joshi et al. 2019 (SpanBERT), arXiv
         1907.10529; pmi: Levine et al. 2020 (PMI-Masking), arXiv 2010.01825

Idea     A masked autoencoder of words: mask some, and predict them from the words on both sides.
         Words carry more information than image patches, so fewer are masked. Some are replaced by
         random words instead of [MASK], so the model cannot trust any word and has to represent
         all of them. [CLS], before a text, attends to all of it; its output is for classifiers.

Loss     L = -1 / |M| sum_{i in M} log p(x_i | x~), in nats per word
         The sum is over the masked words M; x~ is the corrupted text. A uniform guess costs ln V.
         The perplexity is e^L.

Flow     texts x (B, T): [CLS], words, [SEP]
         A. mask      choose_positions -> positions (B, n), target (B, n): the words there
                      corrupt          -> tokens (B, T): x with [MASK] or random words there
         B. predict   bidirectional Transformer, MLM head -> logits (B, n, V), at positions only
         C. compare   cross-entropy at the masked words
         fine-tuning  output at [CLS] -> linear layer, tanh (pool) -> new linear layer

Run      python bert.py --fill "the <mask> statement is used to <mask>"
Expect   36.6 ± 0.4 % of the masked words of new text are right, at a perplexity of 32.7 ± 0.4
         (unigram baseline 7.1 % and 267); tuned on 20 labels per class, it names the part of the
         text that a passage is from: 53.4 ± 2.6 % (untrained 32.1 ± 3.1 %) (3 seeds; 109 s of
         training on 1 thread, beside other jobs; Intel(R) Xeon(R) Processor, 2 cores, Python
         3.11.7, torch 2.13.0+cpu)
Differs  80 % of the masked words are replaced by [MASK] and 20 % by random words, as in the lecture
         (Stanford's CS330); --keep 0.1 gives the paper's 80/10/10. A token is a lower-case word or
         a punctuation mark; rare ones are [UNK] and never masked. There is no next-sentence
         prediction, so no loss trains the output at [CLS] before fine-tuning. Muon trains the
         matrices of the blocks (with orthogonalised steps: common.py) and AdamW the rest; the paper
         uses Adam for all. Narrow models start with larger weights. Fine-tuning has a BatchNorm
         before the new layer. span: without SpanBERT's span boundary objective. pmi: masks all
         n-grams above a threshold.

Try      --strategy span, pmi: is a phrase harder to predict than as many single words? (loss.svg)
         --mask-ratio 0.05, 0.4, 0.8: which gives the lowest perplexity, which the best fine-tuning?
         --optimizer adamw: how many more steps does it take to reach the same perplexity?
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


@dataclass
class Args(common.Args):
    """Settings of bert.py for a GPU; `cpu` has smaller ones for two CPU cores. The comments are
    the help texts of the flags, and the ranges in them are checked."""
    steps: int = 5000               # training steps, 0 or more
    batch: int = 128                # windows of text per step
    lr: float = 1e-3                # peak learning rate
    warmup: float = 0.1             # fraction of steps in which the learning rate rises, in [0, 1]
    optimizer: Literal["muon", "adamw"] = "muon"   # Muon for the blocks' matrices, or AdamW for all
    muon_lr: float = 0.02           # peak learning rate of Muon, in (0, inf)
    weight_decay: float = 0.1       # weight decay, on matrices only (BERT, app. A.2: 0.01)
    weights: str = ""               # folder of a published BERT; it is trained only with --steps N
    data: str = "pydocs"            # pydocs, pycode, shakespeare, a file, a folder of .txt or .md
    vocab: int = 8192               # maximum vocabulary size, special tokens included, 6 or more
    context: int = 128              # tokens per window, [CLS] and [SEP] included, 4 or more
    dim: int = 256                  # channels
    depth: int = 4                  # blocks
    heads: int = 4                  # attention heads (a narrow model learns sooner with 8)
    dropout: float = 0.1            # dropout probability, in [0, 1) (BERT, app. A.2)
    mask_ratio: float = 0.15        # fraction of the words to mask, in (0, 1) (BERT, sec. 3.1)
    keep: float = 0.0               # fraction of masked words left as is, in [0, 0.2] (paper: 0.1)
    strategy: Literal["token", "span", "pmi"] = "token"   # mask words, spans, or common phrases
    fill: str = ""                  # a sentence with <mask> in it; the model fills in words there
    classes: int = 6                # parts of the text by which passages are classified, 2 or more
    passage: int = 32               # tokens per passage, [CLS] and [SEP] included, 3 or more
    labels: tuple[int, ...] = (1, 5, 20)   # labelled passages per class, 1 or more
    tune_steps: int = 200           # steps of each fine-tuning, 0 or more
    tune_lr: float = 5e-4           # peak learning rate of fine-tuning

    cpu = dict(steps=2500, batch=64, context=32, dim=128, depth=2, heads=8, dropout=0.,
               tune_steps=60)
    published = dict(steps=0, batch=16, lr=3e-5, optimizer="adamw", data="", tune_steps=60,
                     tune_lr=5e-5)


# ------------------------------------------------------------------------------------- the model
# B batch, T tokens, n masked positions, C channels, H heads, D = C / H, V vocabulary size.


class BERT(nn.Module):
    """BERT with a head for masked language modelling (MLM): tokens (B, T), positions (B, n) ->
    logits (B, n, V) of the words at these positions.

    attention_mask (B, T): False or 0 at padding, to which no token attends. segments (B, T): 0 or
    1, for pairs of texts (transformers: token_type_ids). Pre-training here uses neither. Raises
    ValueError if a text is longer than the context. The parameters are those of the published
    weights, under other names.
    """

    def __init__(self, vocab, context, dim, depth, heads, dropout=0.):
        super().__init__()
        self.dropout = dropout
        self.token_embed = nn.Embedding(vocab, dim)      # tied: the output layer uses it, too
        self.pos_embed = nn.Embedding(context, dim)
        self.segment_embed = nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.pooler = nn.Linear(dim, dim)                # for [CLS]; not trained before fine-tuning
        self.mlm_transform = nn.Linear(dim, dim)
        self.mlm_norm = nn.LayerNorm(dim, eps=1e-12)
        self.mlm_bias = nn.Parameter(torch.zeros(vocab))
        # BERT: 0.02 at all widths. Narrow models learn sooner with larger weights.
        std = .02 * math.sqrt(768 / dim)
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, tokens, positions, attention_mask=None, segments=None):
        x = self.encode(tokens, positions, attention_mask, segments)                # (B, n, C)
        x = self.mlm_norm(F.gelu(self.mlm_transform(x)))
        return F.linear(x, self.token_embed.weight, self.mlm_bias)                  # (B, n, V)

    def encode(self, tokens, positions=None, attention_mask=None, segments=None):
        """The Transformer without the head: tokens (B, T) -> (B, T, C). With positions (B, n), the
        last block computes its output only there: (B, n, C)."""
        T, context = tokens.shape[1], len(self.pos_embed.weight)
        if T > context:
            raise ValueError(f"{T} tokens are more than the context of {context}")
        segments = torch.zeros_like(tokens) if segments is None else segments
        x = self.token_embed(tokens) + self.pos_embed.weight[:T]                    # (B, T, C)
        x = F.dropout(self.norm(x + self.segment_embed(segments)), self.dropout, self.training)
        for block in self.blocks[:-1]:
            x = block(x, attention_mask=attention_mask)
        return self.blocks[-1](x, positions, attention_mask)

    def pool(self, tokens, attention_mask=None, segments=None):
        """Texts (B, T), [CLS] first -> vectors (B, C) for a classifier: a layer on its output."""
        positions = torch.zeros_like(tokens[:, :1])                                 # [CLS] is at 0
        x = self.encode(tokens, positions, attention_mask, segments)                # (B, 1, C)
        return self.pooler(x[:, 0]).tanh()


class Pooled(nn.Module):
    """BERT as an encoder for classifiers: texts (B, T) -> pool() of them (B, C). For fine-tuning, a
    new linear layer follows (in common.finetune after a BatchNorm)."""

    def __init__(self, bert):
        super().__init__()
        self.bert = bert

    def forward(self, tokens):
        return self.bert.pool(tokens)


class Block(nn.Module):
    """Post-norm Transformer block: (B, T, C) -> (B, T, C). With positions (B, n), only the outputs
    there are computed, (B, n, C): the last block skips the others, which nobody reads."""

    def __init__(self, dim, heads, dropout=0.):
        super().__init__()
        self.attn = Attention(dim, heads, dropout)
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = MLP(dim, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x, positions=None, attention_mask=None):
        y = x if positions is None else gather(x, positions)
        y = self.norm1(y + self.attn(y, x, attention_mask))
        return self.norm2(y + self.mlp(y))


class Attention(nn.Module):
    """Multi-head attention: tokens y (B, n, C) attend to all tokens x (B, T, C) of the text:
    (B, n, C). Query, key and value are separate layers, as in the published weights."""

    def __init__(self, dim, heads, dropout=0.):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels cannot be divided among {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, y, x, attention_mask=None):
        B, _, C = x.shape
        H, D = self.heads, C // self.heads
        q = self.query(y).view(B, -1, H, D).transpose(1, 2)                         # (B, H, n, D)
        k = self.key(x).view(B, -1, H, D).transpose(1, 2)                           # (B, H, T, D)
        v = self.value(x).view(B, -1, H, D).transpose(1, 2)
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None].bool()                   # (B, 1, 1, T)
        z = F.scaled_dot_product_attention(                                         # (B, H, n, D)
            q, k, v, attention_mask, self.dropout if self.training else 0.)
        z = self.proj(z.transpose(1, 2).reshape(B, -1, C))
        return F.dropout(z, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a GELU between, applied to each token: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, dropout=0.):
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training)


def gather(x, positions):
    """Selects the tokens of x (B, T, C) at positions (B, n) of each text: (B, n, C)."""
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))


# ------------------------------------------------------------------------------------ the method

PAD, UNK, CLS, SEP, MASK = range(5)      # the special tokens are never masked
FIRST_WORD = 5                           # ids of words start here


def distance(prediction, target):
    """C. Mean cross-entropy of logits (B, n, V) and the masked words (B, n), in nats per word.
    Targets of -100 are ignored."""
    loss = F.cross_entropy(prediction.flatten(0, 1).float(), target.flatten(), reduction="sum")
    return loss / (target >= 0).sum().clamp(min=1)            # clamp: if nothing is masked


def mask(x, span_ids, vocab, ratio=.15, keep=0.):
    """A. Masks words of the texts x (B, T). Returns the inputs of the model, (tokens (B, T),
    positions (B, n)), and the target (B, n): the original words there, or -100.

    span_ids (B, T): neighbours with the same id are masked together; torch.arange(T).expand(B, T)
    masks each word alone. vocab: vocabulary size; ratio: fraction of the words to mask; keep:
    fraction of the masked words that are left as they are. x is not changed.
    """
    positions, target = choose_positions(x, span_ids, ratio)
    words = x.gather(1, positions)
    u = rand_per_span(span_ids).gather(1, positions)        # new numbers: one for a whole span
    replaced = torch.where(target < 0, words, corrupt(words, u, vocab, keep))
    return (x.scatter(1, positions, replaced), positions), target


def corrupt(words, u, vocab, keep=0.):
    """Replaces words of any shape: 80 % of them by [MASK] and the rest by random words, except for
    the fraction `keep` (0.2 or less), which is left as it is. u, of the same shape and uniform in
    [0, 1), decides."""
    random = torch.randint(FIRST_WORD, vocab, words.shape, device=words.device)
    return torch.where(u < .8, MASK, torch.where(u < 1 - keep, random, words))


def choose_positions(x, span_ids, ratio=.15):
    """Chooses words of the texts x (B, T) to mask: positions (B, n), and the words there (B, n).

    Each span gets a random number, the tokens are sorted by it, and the first ones are chosen:
    whole spans, until the fraction `ratio` of the words is reached (rounded, at least 1), where the
    last span is cut. Every text has n = round(ratio * T) positions. Since special tokens are not
    words, some texts need fewer; the remaining positions get -100 instead of a word. (On a CPU a
    text has 30 words and 2 special tokens: n is 5, and 4 of them are used.)
    """
    is_word = x >= FIRST_WORD
    count = (is_word.sum(1, keepdim=True) * ratio).round().clamp(min=1)             # (B, 1)
    n = max(1, round(ratio * x.shape[1]))
    key = rand_per_span(span_ids).masked_fill(~is_word, 2.)             # special tokens go last
    positions = key.argsort(stable=True, dim=1)[:, :n]                  # stable: spans stay whole
    # count is at least 1, also in a text without words, hence is_word.
    chosen = (torch.arange(n, device=x.device) < count) & is_word.gather(1, positions)
    return positions, x.gather(1, positions).masked_fill(~chosen, -100)


def rand_per_span(span_ids):
    """Random numbers, uniform in [0, 1), with the same number at all tokens of a span: (B, T).

    For span_ids 7 7 3 3 3 9, span is 0 0 1 1 1 2, and the numbers are r0 r0 r1 r1 r1 r2.
    """
    span = F.pad(span_ids[:, 1:] != span_ids[:, :-1], (1, 0)).cumsum(1)     # True: a span begins
    number = torch.rand(span.shape, device=span.device)      # one per span; there are at most T
    return number.gather(1, span)


def spans(B, T, p=.2, longest=10, device=None):
    """Span ids (B, T) for --strategy span: spans of random lengths.

    The lengths follow a geometric distribution, truncated at `longest` and renormalised: P(l) ~ p
    (1 - p)^(l - 1), with a mean of 3.80 (SpanBERT, sec. 3.1). choose_positions often cuts the last
    span of a short text: with 4 masked words per text, as on a CPU, the mean is 2.4.
    """
    weight = (1 - p) ** torch.arange(longest, device=device)                # P(1), P(2), ...
    length = 1 + weight.multinomial(B * T, replacement=True).view(B, T)     # T spans are enough
    start = length.cumsum(1).clamp(max=T)                  # lengths 3 1 2: starts 3 4 6 (and 0)
    is_start = torch.zeros(B, T + 1, dtype=torch.int64, device=device).scatter_(1, start, 1)
    return is_start[:, :T].cumsum(1)                       # ids 0 0 0 1 2 2; T is outside


def pmi(tokens, longest=5):
    """Pointwise mutual information (PMI) of the n-gram at each of N tokens, and the number of its
    occurrences: {n: (PMI in nats, count)}, each (N - n + 1,), for n from 2 to `longest`.

    PMI(w) = log p(w) - max sum_j log p(part_j), where the maximum is over all ways to cut w into
    two or more parts (PMI-Masking, eq. 3). It is high if the words occur together far more often
    than even the most likely parts would by chance.
    """
    log_p, best, found = {}, {}, {}           # best[n]: of the likeliest cut, or of no cut
    ids = torch.zeros_like(tokens)            # id of the (n - 1)-gram that starts at each token
    for n in range(1, min(longest, len(tokens)) + 1):
        size = len(tokens) - n + 1
        pairs = ids[:size] * (tokens.max() + 1) + tokens[n - 1:]     # a number for each n-gram
        _, ids, count = pairs.unique(return_inverse=True, return_counts=True)
        log_p[n] = best[n] = (count[ids] / size).log()
        if n > 1:
            cuts = [log_p[k][:size] + best[n - k][k:] for k in range(1, n)]
            cut = torch.stack(cuts).amax(0)
            best[n] = torch.maximum(log_p[n], cut)
            found[n] = log_p[n] - cut, count[ids]
    return found


def pmi_spans(tokens, min_count=10, min_pmi=2., longest=5):
    """Span ids (N,) for --strategy pmi, of a whole text (N,).

    A span is an n-gram without special tokens that occurs at least min_count times and has a PMI of
    at least min_pmi nats. From left to right, the longest is chosen; other tokens are single spans.
    """
    length = torch.ones(len(tokens), dtype=torch.int64)       # of the longest span that starts here
    special = F.pad((tokens < FIRST_WORD).long().cumsum(0), (1, 0))          # special tokens so far
    for n, (value, count) in pmi(tokens, longest).items():
        words_only = special[n:] == special[:-n]
        good = (value >= min_pmi) & (count >= min_count) & words_only
        length[:len(good)].masked_fill_(good, n)              # longer ones replace shorter ones
    ids, length = [], length.tolist()
    while len(ids) < len(length):
        i = len(ids)                                          # the next span starts here
        ids += [i] * length[i]
    return torch.tensor(ids)


def add_special_tokens(x):
    """Adds [CLS] before and [SEP] after the texts (B, T): (B, T + 2)."""
    return F.pad(F.pad(x, (1, 0), value=CLS), (0, 1), value=SEP)


# ------------------------------------------------------------------------ the data and the weights


def build(args, vocab):
    """Builds the BERT of these settings, on the device."""
    return BERT(vocab, args.context, args.dim, args.depth, args.heads,
                args.dropout).to(args.device)


def load_published(args):
    """Loads the BERT of --weights and sets its sizes in args. Returns the model, its tokenizer, and
    whether it has an MLM head; a missing one (as in sentence encoders) is random."""
    state, config = common.published(args.weights, "BERT", common.BERT, "pos_embed.weight")
    tokenizer = common.WordPiece.load(args.weights)
    for name in {"token_embed.weight", "mlm_bias"} & state.keys():
        if len(state[name]) == tokenizer.vocab:                    # special tokens come first here
            state[name] = state[name][tokenizer.published]
    common.require("num_attention_heads" in config, f"--weights {args.weights} has no config.json")
    context, args.dim = state["pos_embed.weight"].shape
    args.depth = sum(name.endswith("query.weight") for name in state)
    args.heads = config["num_attention_heads"]
    model = BERT(tokenizer.vocab, context, args.dim, args.depth, args.heads, args.dropout)
    common.fill_in(model, state, args.weights, config, missing=("pooler", "mlm"))
    return model.to(args.device), tokenizer, "mlm_bias" in state


def load_or_build(args, text=None):
    """Returns the initial model, its tokenizer, and whether it has an MLM head. A resumed run keeps
    its vocabulary."""
    if args.weights:
        return load_published(args)
    if text is None or args.resume and Path(args.out, "checkpoint.pt").exists():
        state = common.read_checkpoint(args.out, common.script(args))
        tokenizer = common.Words(state["about"].get("vocabulary", []))
    else:
        tokenizer = common.Words.of(text.train, args.vocab)
    return build(args, tokenizer.vocab), tokenizer, True


def windows(args, tokenizer, text):
    """Windows of T = --context tokens, without [CLS] and [SEP]. Training windows start at every
    token, tokens and span ids: (n, 2, T - 2); validation windows do not overlap: (m, T - 2)."""
    train, val, size = tokenizer.stream(text.train), tokenizer.stream(text.val), args.context - 2
    common.require(len(val) >= size <= len(train), f"the last tenth of --data {args.data} has "
                   f"{len(val)} words, the rest {len(train)}, and --context {args.context} needs "
                   f"{size} in both: take a longer text or a shorter context")
    span_ids = pmi_spans(train.long()) if args.strategy == "pmi" else torch.arange(len(train))
    train = torch.stack([train, span_ids.int()], 1).to(args.device)
    val = val.long().to(args.device).unfold(0, size, size)
    common.require((val >= FIRST_WORD).any(), f"the last tenth of --data {args.data} has no word "
                   "that the rest has twice: take a longer text")
    return train.unfold(0, size, 1), val


def examples(args, rows):
    """Training windows (B, 2, T - 2) -> texts x with [CLS] and [SEP], span ids: (B, T) each."""
    x, span_ids = rows.long().unbind(1)
    x = add_special_tokens(x)
    if args.strategy == "span":
        return x, spans(*x.shape, device=x.device)
    return x, F.pad(span_ids, (1, 1), value=-1)


# ------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def evaluate(args, model, train, val, repeats=4):
    """Masks 15 % of the words of new texts (m, T - 2), different single words in each repeat.
    Returns dict(accuracy in %, perplexity) of the model, and that of the unigram baseline,
    which always predicts the word frequencies of the training text (N,)."""
    vocab, found, val = len(model.mlm_bias), [], common.evenly(val, 4000)
    for repeat in range(repeats):
        torch.manual_seed(repeat)
        for x in map(add_special_tokens, common.progress(val.split(100), "evaluating")):
            single = torch.arange(x.shape[1], device=x.device).expand_as(x)
            inputs, target = mask(x, single, vocab)
            with common.autocast(args):
                logits = model(*inputs).float()[target >= 0]
            target = target[target >= 0]
            right = logits.argmax(1) == target
            nats = F.cross_entropy(logits, target, reduction="none")
            found.append((target, right, nats))
    target, right, nats = (torch.cat(parts).cpu() for parts in zip(*found))
    count = 1. + train[train >= FIRST_WORD].bincount(minlength=vocab).cpu()
    unigram = (count / count.sum()).log()

    def score(right, nats):
        return dict(accuracy=100 * right.float().mean().item(),
                    perplexity=math.exp(min(nats.mean().item(), 100)))
    return score(right, nats), score(target == unigram.argmax(), -unigram[target])


def parse_fill(args, tokenizer):
    """--fill as tokens (T,), and the positions of its <mask>s."""
    common.require("<mask>" in args.fill, "--fill has no <mask> in it: put one where a word is to "
                   'be predicted, as in --fill "the <mask> statement"')
    parts = [tokenizer.encode(part) for part in args.fill.split("<mask>")]
    if any((part == UNK).any() for part in parts):
        common.say("Some words of --fill are not in the vocabulary: they are read as [UNK].")
    tokens = torch.cat([t for part in parts for t in (torch.tensor([MASK]), part)][1:])
    common.require(len(tokens) <= args.context - 2, f"--fill has {len(tokens)} words and marks, "
                   f"and --context {args.context} holds {args.context - 2}: shorten it")
    return tokens, (tokens == MASK).nonzero().flatten()


def sentences(tokenizer, text, n, seed, longest):
    """n sentences of a text (N,) with 8 to 16 plain words and a full stop, two words of each chosen
    to be predicted: [(tokens (T,), positions (2,))]. If there are none, windows of the text."""
    ends = (text == tokenizer.ids.get(".", -1)).nonzero().flatten()
    plain = [text[a + 1:b + 1] for a, b in zip(ends, ends[1:]) if 9 <= b - a <= min(17, longest)]
    is_plain = lambda t: t >= FIRST_WORD and tokenizer.words[t].isalpha()
    plain = [s for s in plain if all(map(is_plain, s[:-1].tolist()))]
    size = min(12, longest)
    plain = plain or [s for s in text.unfold(0, size, size) if (s >= FIRST_WORD).all()]
    g = torch.Generator().manual_seed(seed)
    found = [plain[i] for i in torch.randperm(len(plain), generator=g)[:n]]
    return [(s, torch.randperm(len(s) - 1, generator=g)[:2].sort().values) for s in found]


def fill_only(args):
    """Fills in --fill with a trained or published model, without training or evaluation."""
    model, tokenizer, has_head = load_or_build(args)
    if args.resume:
        model.load_state_dict(common.read_checkpoint(args.out)["model"])
    common.require(has_head or args.resume,
                   f"--weights {args.weights} has no head for masked words")
    common.say(fill(args, model.eval(), tokenizer, *parse_fill(args, tokenizer)))
    return model


@torch.no_grad()
def fill(args, model, tokenizer, tokens, positions):
    """A text (T,) with numbers at the positions, and the most likely words for each of them."""
    inputs = tokens.scatter(0, positions, MASK)
    x = add_special_tokens(inputs[None]).to(args.device)
    logits = model(x, 1 + positions[None].to(args.device))[0]                           # (n, V)
    names, lines = [tokenizer.words[t] for t in inputs.tolist()], []
    for i, (position, p) in enumerate(zip(positions.tolist(), logits.float().softmax(1)), 1):
        names[position] = f"[{i}]"
        likely = "  ".join(f"{tokenizer.words[w]} {100 * q:.0f} %" for q, w in zip(*p.topk(4)))
        was = tokenizer.words[tokens[position]]
        lines.append(f"   [{i}]  {likely}" + ("" if was == "[MASK]" else f"   (it was: {was})"))
    return common.printable("\n".join([tokenizer.join(names), *lines]))


def finetune(args, model, passages, k, seed=0):
    """Accuracy in % of a copy of the model with a new linear layer, after fine-tuning what requires
    gradients on k passages per class."""
    i = common.k_shot(passages.labels, k, seed)
    return common.finetune(args, Pooled(copy.deepcopy(model)), passages, passages.train[i],
                           passages.labels[i], passages.test_labels, args.tune_steps,
                           args.tune_lr, seed=seed)


def few_labels(args, model, passages):
    """Accuracies with few labels, by the part of a passage: {method: [% for each of --labels]}."""
    vocab, labels, test_labels = len(model.mlm_bias), passages.labels, passages.test_labels
    bag = lambda x: x.new_zeros(len(x), vocab).scatter_add_(1, x, torch.ones_like(x))
    train, test = (common.encode(args, bag, passages, x) for x in (passages.train, passages.test))
    torch.manual_seed(args.seed)
    untrained = build(args, vocab)
    return {"bag of words, linear": [common.probe(train, labels, test, test_labels, k)
                                     for k in args.labels],
            "untrained, tune all": [finetune(args, untrained, passages, k) for k in args.labels],
            "BERT, tune all": [finetune(args, model, passages, k) for k in args.labels]}


# ------------------------------------------------------------------------------------------ main


@common.setup
def main(args):
    if args.steps == 0 and (args.fill and args.resume or args.weights and not args.data):
        return fill_only(args)
    text = common.load_text(args.data, args.data_dir, parts=args.classes, utf8=True)
    model, tokenizer, has_head = load_or_build(args, text)
    train, val = windows(args, tokenizer, text)
    passages = common.Passages(args, tokenizer, text)
    common.k_shot(passages.labels, max(args.labels))                       # fail early if too few
    blanks = [parse_fill(args, tokenizer)] if args.fill else []
    optimizer = common.optimizer(args, model.named_parameters())
    run = common.Run(args, model, optimizer, uniform=math.log(tokenizer.vocab),
                     about=dict(vocabulary=tokenizer.words))
    for step in run:                       # sets the seed and the learning rate of this step
        x, span_ids = examples(args, run.batch(train))
        with run.autocast():
            inputs, target = mask(                                          # A. mask
                x, span_ids, tokenizer.vocab, args.mask_ratio, args.keep)
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
    filled, masked, unigram, result = [], None, None, "no head for masked words"
    if has_head or args.steps:
        start = val.flatten()[:2 ** 17].cpu()
        blanks += sentences(tokenizer, start, 4, args.seed, args.context - 2)
        filled = [fill(args, model, tokenizer, *blank) for blank in blanks]
        masked, unigram = evaluate(args, model, train[:, 0, 0], val)       # the text again
        result = (f"{masked['accuracy']:.1f} % of masked words, perplexity "
                  f"{masked['perplexity']:.1f} (unigram baseline {unigram['accuracy']:.1f} %, "
                  f"{unigram['perplexity']:.1f})")
    rows = few_labels(args, model, passages)
    if (unknown := (val == UNK).float().mean().item()) > 1 / 3:
        result = f"{100 * unknown:.0f} % of the new text is [UNK], so this says little: {result}"
    common.report(run, result, dict(
        masked=masked, unigram=unigram, vocab=tokenizer.vocab, filled=filled, parts=passages.names,
        labels=args.labels, accuracy=rows))
    table = common.table([["accuracy in %", *(f"{k} per class" for k in args.labels)],
                          *([name, *(f"{x:.1f}" for x in row)] for name, row in rows.items())])
    common.say("\n" + "\n\n".join([
        *filled, f"Correct in new text: {result}.", f"Which part is a passage of "
        f"{args.passage - 2} words from: {', '.join(passages.names)}?", table]))
    return model


if __name__ == "__main__":
    common.cli(main, Args)
