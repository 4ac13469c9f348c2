"""BERT: hide 15 % of the words, guess them from both sides; then fine-tune on a few labels.

Paper    Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language
         Understanding", arXiv 1810.04805. span: Joshi et al. 2019 (SpanBERT), arXiv 1907.10529;
         pmi: Levine et al. 2020 (PMI-Masking), arXiv 2010.01825

Idea     Hide a part, guess it from the rest: the recipe of mae.py, for words. They carry more than
         patches, so fewer are hidden. Most of the hidden words show as [MASK] and some as another
         word, for later there will be no [MASK]: the model cannot tell which words to believe, and
         has to keep a good picture of all of them. A special token in front, [CLS], sees the whole
         text, and a new layer on top of it answers a question about it after fine-tuning.

Loss     L = -1 / |M| sum_{i in M} log p(x_i | x with M hidden)
         over the hidden words M only: a cross-entropy in nats, at chance ln V. Perplexity is e^L.

Flow     words (B, T), [CLS] in front, [SEP] at the end
         A. mask      group    words that are hidden together  -> (B, T) group of each word
                      mask     hide groups until 15 % are gone -> words (B, T), places (B, n), and
                               (of a CPU's 30 words: 4)           the words that stood there (B, n)
         B. predict   bidirectional Transformer, then the head -> logits (B, n, V), at places only
         C. compare   cross-entropy on the hidden words

Run      python bert.py --fill "the <mask> statement is used to <mask>"
Expect   18.9 ± 0.4 % of the hidden words of new text are right, at a perplexity of 109 ± 3 (7.1 %
         and 267 by frequency alone) (3 seeds; 94 s of training on 2 threads; AMD EPYC, 2
         cores, torch 2.13.0+cpu)
Differs  Of the hidden words 80 % show as [MASK] and 20 % as others; none stays as it is (--keep),
         as in the lecture; the share is rounded to whole words.
         A token is a lower-case word or a mark (full stop, bracket), not a piece of a word; rare
         ones are [UNK], never hidden; no next-sentence prediction (later work found it needless),
         so no loss reads what comes out at [CLS] before fine-tuning; other words are drawn from the
         real words, never [PAD] and its like; AdamW's second beta is 0.95, not 0.999, the schedule
         a cosine; the first weights of narrow models are larger; a BatchNorm before the new head in
         fine-tuning. span: without SpanBERT's second loss, at the ends. pmi: n-grams of 2 to 5
         words, seen 10 times or more, with 2 nats or more (the paper ranks them). The tensors are
         BERT's: the published ones load by renaming.

Try      --strategy span, pmi: is a whole phrase harder to guess than as many single words? (The
         loss in log.jsonl tells; the score at the end is always for single words, 15 % of them.)
         --mask-ratio 0.05, 0.15, 0.4, 0.8: which perplexity is lowest, which [CLS] is best?
         --keep 0.1: the paper's 80/10/10. What changes?
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
    """Settings of bert.py: for a GPU, and under `cpu` smaller ones for two cores."""
    steps: int = 5000               # training steps
    batch: int = 128                # windows of the text a step
    lr: float = 1e-3                # peak learning rate
    warmup: float = 0.1             # share of steps in which the rate rises (post-norm needs more)
    weight_decay: float = 0.01      # AdamW's decay, on matrices only (BERT, app. A.2)
    data: str = "pydocs"            # pydocs, pycode, shakespeare, a file or a folder of .txt files
    vocab: int = 8192               # tokens at most, special ones included
    context: int = 128              # tokens of a window, [CLS] and [SEP] included
    dim: int = 256                  # channels
    depth: int = 4                  # blocks
    heads: int = 4                  # attention heads (on a CPU 8: with few it learns later)
    dropout: float = 0.1            # share of the channels dropped (BERT, app. A.2)
    mask_ratio: float = 0.15        # share of the words hidden, rounded to whole ones (sec. 3.1)
    keep: float = 0.0               # share of these that stay as they are (BERT, app. A.1: 0.1)
    strategy: Literal["token", "span", "pmi"] = "token"   # hide words, spans, or fixed phrases
    fill: str = ""                  # a sentence of your own with <mask> in it, to be filled in
    classes: int = 6                # parts of the text that a passage is told apart by
    passage: int = 32               # tokens of such a passage, [CLS] and [SEP] included
    labels: tuple[int, ...] = (1, 5, 20)   # labelled passages a class that it gets for this
    tune_steps: int = 200           # steps of each fine-tuning
    tune_lr: float = 5e-4           # its peak learning rate
    draws: int = 3                  # repeats with other labelled passages, for mean and spread

    cpu = dict(steps=2500, batch=64, context=32, dim=128, depth=2, heads=8, dropout=0.,
               tune_steps=60)

    def check(self):
        super().check()
        self.at_least(1, "depth", "labels", "draws")
        self.at_least(0, "tune_steps", "tune_lr")
        self.at_least(2, "classes")
        self.multiple("dim", "heads")
        self.below_1("dropout")
        need = common.require
        need(0 < self.mask_ratio < 1, "--mask-ratio must be above 0 and below 1, not "
             f"{self.mask_ratio}: some words have to stay visible, and some hidden")
        need(0 <= self.keep <= .2, f"--keep must be from 0 to 0.2, not {self.keep}: 80 % of the "
             "hidden words always become [MASK]")
        need(self.vocab > 5, f"--vocab must be 6 or more, not {self.vocab}: five are special")
        need(self.context > 3, f"--context must be 4 or more, not {self.context}: [CLS], two words "
             "and [SEP]")
        need(2 < self.passage <= self.context, f"--passage must be 3 or more, and at most "
             f"--context {self.context}, not {self.passage}")
        need(not self.fill or "<mask>" in self.fill, "--fill has no <mask> in it: put one where a "
             'word is to be guessed, as in --fill "the <mask> statement"')


# ------------------------------------------------------------------------------------- the model
# B batch, T tokens, n of them asked for, C channels, H heads, D = C / H, V vocabulary.


class Attention(nn.Module):
    """Multi-head attention of n tokens y (B, n, C) to all tokens x (B, T, C): -> (B, n, C).

    real (B, T) bool: where it is False (padding; the texts here have none, yours may), nobody
    looks. Query, key and value are layers of their own, as in the published weights.
    """

    def __init__(self, dim, heads, dropout=0.):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, y, x, real=None):
        B, T, C = x.shape
        split = lambda z: z.view(B, -1, self.heads, C // self.heads).transpose(1, 2)
        q, k, v = split(self.query(y)), split(self.key(x)), split(self.value(x))    # (B, H, ., D)
        seen = None if real is None else real[:, None, None]                        # (B, 1, 1, T)
        drop = self.dropout if self.training else 0.
        z = F.scaled_dot_product_attention(q, k, v, seen, drop)
        return F.dropout(self.proj(z.transpose(1, 2).reshape(B, -1, C)), drop)


class MLP(nn.Module):
    """Two layers, each token for itself: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, dropout=0.):
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training)


class Block(nn.Module):
    """Post-norm Transformer block: (B, T, C) -> (B, T, C), or the tokens at places (B, n) only."""

    def __init__(self, dim, heads, dropout=0.):
        super().__init__()
        self.attn = Attention(dim, heads, dropout)
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = MLP(dim, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x, at=None, real=None):
        y = x if at is None else take(x, at)
        y = self.norm1(y + self.attn(y, x, real))
        return self.norm2(y + self.mlp(y))


def take(x, at):
    """The tokens of x (B, T, C) at places (B, n), other places in each text: (B, n, C)."""
    return x.gather(1, at[:, :, None].expand(-1, -1, x.shape[2]))


class BERT(nn.Module):
    """B. BERT with its head for hidden words. forward(masked): tokens (B, T) and places (B, n) ->
    the logits of the words at these places, (B, n, V)."""

    def __init__(self, vocab, context, dim, depth, heads, dropout=0.):
        super().__init__()
        self.dropout = dropout
        self.token_embed = nn.Embedding(vocab, dim)      # also the matrix to the logits
        self.pos_embed = nn.Embedding(context, dim)
        self.segment_embed = nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.pooler = nn.Linear(dim, dim)                # on [CLS]; random until fine-tuning
        self.head = nn.Linear(dim, dim)                  # before the matrix to the logits
        self.head_norm = nn.LayerNorm(dim, eps=1e-12)
        self.head_bias = nn.Parameter(torch.zeros(vocab))
        std = .02 * math.sqrt(768 / dim)           # BERT's .02 is for 768 channels; a narrow model
        for layer in self.modules():               # that starts with it learns later
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, masked, real=None):
        tokens, places = masked
        x = self.head_norm(F.gelu(self.head(self.encode(tokens, places, real))))    # (B, n, C)
        return F.linear(x, self.token_embed.weight, self.head_bias)                 # (B, n, V)

    def encode(self, tokens, at=None, real=None, segment=None):
        """Tokens (B, T) -> (B, T, C); with places `at` (B, n), where the last block then ends, only
        these, (B, n, C). real (B, T) bool: no padding; segment (B, T): 0 or 1."""
        segment = torch.zeros_like(tokens) if segment is None else segment
        x = self.token_embed(tokens) + self.pos_embed.weight[:tokens.shape[1]]
        x = F.dropout(self.norm(x + self.segment_embed(segment)), self.dropout, self.training)
        for block in self.blocks[:-1]:
            x = block(x, real=real)
        return self.blocks[-1](x, at, real)

    def pool(self, tokens, real=None):
        """One more layer on [CLS], for a classifier: (B, T) -> (B, C)."""
        cls = self.encode(tokens, torch.zeros_like(tokens[:, :1]), real)            # (B, 1, C)
        return self.pooler(cls[:, 0]).tanh()


# ------------------------------------------------------------------------------------ the method

PAD, UNK, CLS, SEP, MASK = SPECIAL = range(5)      # the first tokens are special: never hidden


def spans(B, T, p=.2, longest=10, device=None):
    """Groups of neighbours for --strategy span: (B, T), the number of each token's group.

    Lengths are geometric, cut at the longest and renormalised: P(l) ~ p (1 - p)^(l - 1), mean 3.80
    (SpanBERT, sec. 3.1). mask() cuts the last one of a text where the share is full.
    """
    share = (1 - p) ** torch.arange(longest, device=device)
    length = 1 + share.multinomial(B * T, replacement=True).view(B, T)
    end = length.cumsum(1)                                                      # of each span
    starts = torch.zeros(B, T + 1, dtype=torch.int64, device=device)
    return starts.scatter_(1, end.clamp(max=T), 1)[:, :T].cumsum(1)


def information(tokens, longest=5):
    """Pointwise mutual information of the n-gram that begins at each of N tokens, and how often it
    occurs: {n: (nats, count)}, both (N - n + 1,), for n from 2 to `longest`.

    For n words: log p(w) - max sum_j log p(part_j) over all ways to cut w into two or more parts
    (PMI-Masking, eq. 3). A phrase is dense if even its likeliest parts would hardly meet by chance.
    """
    logs, best, found = {}, {}, {}                  # log p; the likeliest way to cut, or not to
    name = torch.zeros_like(tokens)
    for n in range(1, min(longest, len(tokens)) + 1):
        size = len(tokens) - n + 1
        pairs = name[:size] * (tokens.max() + 1) + tokens[n - 1:]      # an (n-1)-gram and a word
        _, name, count = pairs.unique(return_inverse=True, return_counts=True)
        logs[n] = best[n] = (count[name] / size).log()
        if n > 1:
            cuts = [logs[k][:size] + best[n - k][k:] for k in range(1, n)]
            cut = torch.stack(cuts).amax(0)
            best[n] = torch.maximum(logs[n], cut)
            found[n] = logs[n] - cut, count[name]
    return found


def phrases(tokens, least=10, nats=2., longest=5):
    """Groups for --strategy pmi: (N,) numbers; the words of a dense phrase share one.

    Dense: seen `least` times, with at least so many nats of mutual information, and without special
    tokens. The text is read from left to right, and the longest phrase wins.
    """
    length = torch.zeros(len(tokens), dtype=torch.int64)           # of the longest phrase from here
    special = F.pad((tokens < len(SPECIAL)).long().cumsum(0), (1, 0))
    for n, (pmi, count) in information(tokens, longest).items():
        plain = special[n:] == special[:-n]
        length[:len(pmi)][(pmi >= nats) & (count >= least) & plain] = n
    group, i = [], 0
    for n in length.tolist():
        if len(group) == i:                                             # here a new group begins
            group += [i] * max(1, n)
        i += 1
    return torch.tensor(group)


def mask(x, group, vocab, ratio=.15, keep=0.):
    """A. Hides groups of words, drawn at random, in texts x (B, T) until `ratio` (rounded) is gone.

    group (B, T): neighbours with the same number are hidden together (the last group is cut where
    the share is full). Special tokens, which come first in the vocabulary, are never hidden. Of the
    groups 80 % become [MASK], the share `keep` stays as it is, the rest become random words.
    Returns (tokens (B, T), places (B, n)) and the words owed (to be predicted) there, (B, n).
    All texts have n places; one that owes fewer has -100 in the rest (of a CPU's 32 tokens 30 are
    words: n is 5, and 4 are owed). x is not changed.
    """
    (B, T), device = x.shape, x.device
    word = x >= len(SPECIAL)
    unit = F.pad(group[:, 1:] != group[:, :-1], (1, 0)).cumsum(1)     # groups, from 0 in each text
    order, dice = torch.rand(2, B, T, device=device).gather(2, unit.expand(2, B, T))   # by group
    count = (word.sum(1, keepdim=True) * ratio).round().clamp(min=1)
    n = max(1, round(ratio * T))
    order = order.masked_fill(~word, 2.)                                         # specials are last
    places = order.argsort(stable=True, dim=1)[:, :n]                      # a group stays together
    owed = (torch.arange(n, device=device) < count) & word.gather(1, places)
    words, dice = x.gather(1, places), dice.gather(1, places)
    other = torch.randint(len(SPECIAL), vocab, (B, n), device=device)
    shown = torch.where(dice < .8, MASK, torch.where(dice < 1 - keep, other, words))
    tokens = x.scatter(1, places, torch.where(owed, shown, words))
    return (tokens, places), words.masked_fill(~owed, -100)


def distance(prediction, target):
    """C. Mean cross-entropy of logits (B, n, V) with the hidden words (B, n), -100: not owed; in
    nats a word."""
    loss = F.cross_entropy(prediction.flatten(0, 1).float(), target.flatten(), reduction="sum")
    return loss / (target >= 0).sum().clamp(min=1)               # a text without words owes nothing


# ------------------------------------------------------------------------------------------ look


def build(args, vocab):
    """The BERT of these settings, on the device."""
    return BERT(vocab, args.context, args.dim, args.depth, args.heads,
                args.dropout).to(args.device)


def stream(words, documents):
    """Documents behind each other, [SEP] in front of each: (N,) tokens."""
    between = torch.tensor([SEP])
    return torch.cat([part for raw in documents
                      for part in (between, words.encode(raw.decode()))])


def wrap(x):
    """[CLS] in front of texts (B, T), and [SEP] behind them: (B, T + 2)."""
    return F.pad(F.pad(x, (1, 0), value=CLS), (0, 1), value=SEP)


def windows(args, words, text):
    """Text to train on, (n, 2, T - 2): from every start, words and the numbers of the phrases that
    they are part of; and to validate on, (m, T - 2)."""
    train, val = (stream(words, part) for part in (text.train, text.val))
    size = args.context - 2
    common.require(len(val) >= size <= len(train), f"the last tenth of --data {args.data} has "
                   f"{len(val)} words, the rest {len(train)}, and --context {args.context} needs "
                   "as many in either: take a longer text or a shorter context")
    common.require((val >= len(SPECIAL)).any(), f"the last tenth of --data {args.data} has no word "
                   "that the rest has twice: take a longer text")
    phrase = phrases(train) if args.strategy == "pmi" else torch.arange(len(train))
    train = torch.stack([train, phrase], 1).to(args.device)
    return train.unfold(0, size, 1), val.to(args.device).unfold(0, size, size)


def grouped(args, rows):
    """Rows of `windows` (B, 2, T - 2) -> texts (B, T), and the groups that --strategy hides."""
    x, phrase = rows.unbind(1)
    x = wrap(x)
    if args.strategy == "span":
        return x, spans(*x.shape, device=x.device)
    return x, F.pad(phrase, (1, 1), value=-1)


@torch.no_grad()
def evaluate(args, model, train, val, draws=4):
    """Guesses single hidden words, 15 %, none of which stays, of the texts to validate on
    (m, T - 2): (accuracy in %, perplexity) of the model, and of a guess by how frequent each word
    is in the training text (N,)."""
    vocab, device = len(model.head_bias), val.device
    count = 1. + train[train >= len(SPECIAL)].bincount(minlength=vocab)
    usual = (count / count.sum()).log()
    sums = torch.zeros(5)
    for draw in range(draws):
        torch.manual_seed(draw)
        for x in map(wrap, val.split(100)):
            alone = torch.arange(x.shape[1], device=device).expand_as(x)
            masked, target = mask(x, alone, vocab)
            with common.autocast(args):
                logits = model(masked).float()[target >= 0]
            target = target[target >= 0]
            guesses = (target == usual.argmax()).sum(), -usual[target].sum()
            sums += torch.tensor([len(target), (logits.argmax(1) == target).sum(),
                                  F.cross_entropy(logits, target, reduction="sum"), *guesses])
    n, right, nats, usual_right, usual_nats = sums.tolist()
    n = max(n, 1)
    perplexity = lambda nats: math.exp(min(nats / n, 100))
    return (100 * right / n, perplexity(nats)), (100 * usual_right / n, perplexity(usual_nats))


def sentences(words, text, n, seed, most):
    """n sentences of a text (N,), 8 to 16 plain words and a full stop, at most `most` in all, each
    with two words to be hidden: [(tokens (T,), places (2,))]; or, for want of these, windows."""
    ends = (text == words.ids.get(".", -1)).nonzero().flatten()
    plain = [text[a + 1:b + 1] for a, b in zip(ends, ends[1:]) if 9 <= b - a <= min(17, most)]
    usual = lambda t: t >= len(SPECIAL) and words.words[t].isalpha()
    plain = [s for s in plain if all(map(usual, s[:-1].tolist()))]
    size = min(12, most)
    plain = plain or [s for s in text.unfold(0, size, size) if (s >= len(SPECIAL)).all()]
    g = torch.Generator().manual_seed(seed)
    found = [plain[i] for i in torch.randperm(len(plain), generator=g)[:n]]
    return [(s, (torch.randperm(len(s) - 1, generator=g)[:2]).sort().values) for s in found]


@torch.no_grad()
def fill(args, model, words, tokens, places):
    """The text (T,) with numbered blanks, and the five best guesses for each of its places."""
    shown = tokens.scatter(0, places, MASK)
    x = wrap(shown[None]).to(args.device)
    p = model((x, 1 + places[None].to(args.device)))[0].float().softmax(1)              # (n, V)
    lines, names = [], list(map(words.words.__getitem__, shown))
    for i, place in enumerate(places):
        names[place] = f"[{i + 1}]"
        best = p[i].topk(5)
        guess = "  ".join(f"{words.words[w]} {100 * q:.0f} %" for q, w in zip(*best))
        known = "" if tokens[place] == MASK else f"   (it was: {words.words[tokens[place]]})"
        lines.append(f"   [{i + 1}]  {guess}{known}")
    return common.printable("\n".join([words.join(names), *lines]))


def own(args, words):
    """The user's sentence of --fill: its tokens (T,), and the places of its blanks."""
    parts = [words.encode(part) for part in args.fill.split("<mask>")]
    if any((part == UNK).any() for part in parts):
        common.say("Some words of --fill are not in the vocabulary: the model sees [UNK] there.")
    tokens = torch.cat([t for part in parts for t in (torch.tensor([MASK]), part)][1:])
    common.require(len(tokens) <= args.context - 2, f"--fill has {len(tokens)} words and signs, "
                   f"and --context {args.context} holds {args.context - 2}: shorten it")
    return tokens, (tokens == MASK).nonzero().flatten()


class Passages:
    """Short passages of the longest documents, and the number of the document as their label."""

    def __init__(self, args, words, text):
        size = args.passage - 2
        longest = sorted(range(len(text.train)), key=lambda i: -len(text.train[i]))[:args.classes]
        self.names = [text.names[i] for i in longest]

        def cut(documents, step):
            parts = [words.encode(documents[i].decode()) for i in longest]
            parts = [x.unfold(0, size, step) if len(x) >= size else x.new_empty(0, size)
                     for x in parts]
            labels = torch.cat([torch.full((len(x),), i) for i, x in enumerate(parts)])
            return wrap(torch.cat(parts)).to(args.device), labels.to(args.device)
        self.train, self.labels = cut(text.train, size)
        self.test, self.test_labels = cut(text.val, max(1, size // 2))
        counts = [int((y == i).sum()) for y in (self.labels, self.test_labels)
                  for i in range(len(longest))]
        common.require(len(longest) > 1 and min(counts) > 0, f"--data {args.data} has no "
                       f"{args.classes} parts that are long enough to tell apart: try fewer "
                       "--classes, or a shorter --passage")

    def normalize(self, x):
        """As Images has it; there is nothing to do for tokens."""
        return x


class Features(nn.Module):
    """What a classifier reads, pool()'s: passages (B, T) -> (B, C)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.pool(x)


def tune(args, model, data, how, k, draw):
    """Accuracy in % of a copy of the model with a new head on [CLS], tuned on k passages a class:
    all of it, or its last block and the pooler."""
    f = Features(copy.deepcopy(model).requires_grad_(how == "all"))
    f.model.blocks[-1].requires_grad_(True)
    f.model.pooler.requires_grad_(True)
    few = common.few(data.labels, k, draw)
    return common.finetune(f, data, data.train[few], data.labels[few], data.test_labels, args,
                           args.tune_steps, args.tune_lr, seed=draw)


def few_shot(args, model, untrained, data):
    """Which part is a passage from? {who: for each label count accuracies in %, one a draw}."""
    vocab, draws, rows = len(model.head_bias), range(args.draws), {}
    bag = lambda x: x.new_zeros(len(x), vocab).scatter_add_(1, x, torch.ones_like(x))
    cls = lambda m: lambda x: m.encode(x, torch.zeros_like(x[:, :1]))[:, 0]
    mean = lambda x: model.encode(x)[:, 1:-1].mean(1)
    for who, f in ("bag of words, linear", bag), ("untrained, frozen [CLS]", cls(untrained)), \
            ("BERT, frozen [CLS]", cls(model)), ("BERT, frozen mean of words", mean):
        with common.autocast(args):
            train, test = (common.encode(f, data, x) for x in (data.train, data.test))
        rows[who] = [[common.probe(train, data.labels, test, data.test_labels, k, draw)
                      for draw in draws] for k in args.labels]
    who_tunes = (("untrained, tune last", untrained, "last"),
                 ("untrained, tune all", untrained, "all"),
                 ("BERT, tune last", model, "last"), ("BERT, tune all", model, "all"))
    fits = [(*who, i, draw) for who in who_tunes for i in range(len(args.labels)) for draw in draws]
    for who, m, how, i, draw in common.progress(fits, "fine-tuning"):
        row = rows.setdefault(who, [[] for _ in args.labels])
        row[i].append(tune(args, m, data, how, args.labels[i], draw))
    return rows


def tell(args, run, blanks, scores, data, rows):
    """The end of the run, in words and in result.json."""
    for line in "\n".join(f"\n{blank}" for blank in blanks).split("\n"):
        common.say(line, indent=" " * 8)
    print()
    (right, perplexity), (usual_right, usual_perplexity) = scores
    vocab = len(run.model.head_bias)
    common.say(f"Hidden words of new text: {right:.1f} % right, perplexity {perplexity:.1f} (by "
               f"frequency alone: {usual_right:.1f} %, {usual_perplexity:.1f}; by chance "
               f"{vocab:,}).")
    share = 100 * data.test_labels.bincount().max().item() / len(data.test_labels)
    common.say(f"Which part is a passage of {args.passage - 2} words from: "
               f"{', '.join(data.names)}?")
    lines = [["accuracy in %", *(f"{k} a class" for k in args.labels)],
             ["always the same part", *[f"{share:.1f}"] * len(args.labels)]]
    lines += [[who, *map(common.spread, row)] for who, row in rows.items()]
    print(f"\n{common.table(lines)}\n")
    figures = dict(masked=dict(accuracy=right, perplexity=perplexity),
                   frequency=dict(accuracy=usual_right, perplexity=usual_perplexity),
                   blanks=blanks, vocab=vocab, parts=data.names, majority=share,
                   labels=args.labels, accuracy=rows)
    common.report(run, f"{right:.1f} % of hidden words, perplexity {perplexity:.1f}", figures)


# ------------------------------------------------------------------------------------------ main


def main(args):
    text = common.load_text(args.data, args.data_dir, parts=args.classes, utf8=True)
    kept = args.resume and common.read_checkpoint(args.out, common.script())["vocabulary"]
    words = common.Words(kept) if kept else common.Words.of(text.train, args.vocab)
    train, val = windows(args, words, text)
    data = Passages(args, words, text)
    common.few(data.labels, max(args.labels))                                # too many? now
    asked = [own(args, words)] if args.fill else []
    model, untrained = build(args, words.vocab), build(args, words.vocab).eval()
    run = common.Run(args, model, chance=math.log(words.vocab), vocabulary=words.words)
    for step in run:
        x, group = grouped(args, run.batch(train))
        masked, target = mask(x, group, words.vocab, args.mask_ratio, args.keep)
        prediction = model(masked)
        loss = distance(prediction, target)
        run.update(loss)

    model.eval()
    asked += sentences(words, val.flatten().cpu(), 4, args.seed, args.context - 2)
    blanks = [fill(args, model, words, *sentence) for sentence in asked]
    scores = evaluate(args, model, train[:, 0, 0], val)          # the first word of each window
    tell(args, run, blanks, scores, data, few_shot(args, model, untrained, data))


if __name__ == "__main__":
    common.start(main, Args)
