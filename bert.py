"""BERT: mask 15 % of the words, predict them from both sides; then fine-tune on a few labels.

Paper    Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language
         Understanding", arXiv 1810.04805. --strategy span: Joshi et al. 2019 (SpanBERT), arXiv
         1907.10529; pmi: Levine et al. 2020 (PMI-Masking), arXiv 2010.01825

Idea     A masked autoencoder of words: mask some, predict them from the words on both sides. Words
         carry more information than patches of an image, so fewer are masked. Some show as random
         words instead of [MASK]: so no word can be trusted, and all have to be represented. [CLS],
         before a text, attends to all of it: it is what a classifier reads in fine-tuning.

Loss     L = -1 / |M| sum_{i in M} log p(x_i | x~)
         over the masked words M only, x~ the text as it shows; in nats per word; a uniform guess
         costs ln V. Perplexity: e^L

Flow     texts x (B, T): [CLS], words, [SEP]
         A. mask      choose_positions -> positions (B, n), target (B, n): the words there
                      corrupt          -> tokens (B, T): x with [MASK] or random words there
         B. predict   bidirectional Transformer, MLM head -> logits (B, n, V), at positions only
         C. compare   cross-entropy of the masked words
         fine-tuning  output at [CLS] -> a layer and tanh (pool) -> a new linear layer (Classifier)

Run      python bert.py --fill "the <mask> statement is used to <mask>"
Expect   36.6 ± 0.4 % of the masked words of new text are right, at a perplexity of 32.7 ± 0.4
         (unigram baseline 7.1 % and 267); the part that a passage is from, 20 labels per class:
         53.4 ± 2.6 % (untrained 32.1 ± 3.1 %) (3 seeds; 109 s of training on 1 thread, beside other
         jobs; Intel(R) Xeon(R) Processor, 2 cores, Python 3.11.7, torch 2.13.0+cpu)
Differs  80 % of the masked words show as [MASK] and 20 % as random words, as in the lecture
         (Stanford's CS330); --keep 0.1 is the paper's 80/10/10. A token is a lower-case word or a
         punctuation mark; rare ones are [UNK], never masked. No next-sentence prediction, so no
         loss trains the output at [CLS] before fine-tuning. Muon (common.py) trains the matrices of
         the blocks, AdamW the rest; the paper has Adam for all. Larger initial weights in narrow
         models. span: without SpanBERT's second loss. pmi: all n-grams above a threshold.

Try      --strategy span, pmi: is a phrase harder to predict than as many words? (See log.jsonl.)
         --mask-ratio 0.05, 0.4, 0.8: which perplexity is lowest, which fine-tuning best?
         --optimizer adamw: how many steps does it take to the same perplexity?
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
    """Settings of bert.py: for a GPU, and in `cpu` smaller ones for two cores."""
    steps: int = 5000               # training steps, 0 or more
    batch: int = 128                # windows of the text per step
    lr: float = 1e-3                # peak learning rate
    warmup: float = 0.1             # fraction of the steps in which the rate rises, in [0, 1]
    optimizer: Literal["muon", "adamw"] = "muon"   # muon: for the matrices of the blocks
    muon_lr: float = 0.02           # peak learning rate of these matrices, in (0, inf)
    weight_decay: float = 0.1       # decay, of matrices only (BERT, app. A.2: 0.01)
    weights: str = ""               # BERT as published: a folder; not trained without --steps
    data: str = "pydocs"            # pydocs, pycode, shakespeare, a file or a folder of .txt files
    vocab: int = 8192               # tokens at most, special ones included, 6 or more
    context: int = 128              # tokens of a window, [CLS] and [SEP] included, 4 or more
    dim: int = 256                  # channels
    depth: int = 4                  # blocks
    heads: int = 4                  # attention heads (on a CPU 8: with few it learns later)
    dropout: float = 0.1            # dropout probability, in [0, 1) (BERT, app. A.2)
    mask_ratio: float = 0.15        # fraction of the words to mask, in (0, 1) (BERT, sec. 3.1)
    keep: float = 0.0               # fraction of masked words that stay, in [0, 0.2] (paper: 0.1)
    strategy: Literal["token", "span", "pmi"] = "token"   # mask words, spans, or common phrases
    fill: str = ""                  # a sentence of your own with <mask> in it, to be filled in
    classes: int = 6                # parts of the text that passages are classified by, 2 or more
    passage: int = 32               # tokens of a passage, [CLS] and [SEP] included, 3 or more
    labels: tuple[int, ...] = (1, 5, 20)   # labelled passages per class
    tune_steps: int = 200           # steps of each fine-tuning, 0 or more
    tune_lr: float = 5e-4           # peak learning rate of fine-tuning

    cpu = dict(steps=2500, batch=64, context=32, dim=128, depth=2, heads=8, dropout=0.,
               tune_steps=60)
    published = dict(steps=0, batch=16, lr=3e-5, optimizer="adamw", data="", tune_steps=60,
                     tune_lr=5e-5)


# ------------------------------------------------------------------------------------- the model
# B batch, T tokens, n masked positions, C channels, H heads, D = C / H, V vocabulary.


class BERT(nn.Module):
    """BERT with its head for masked language modelling (MLM): tokens (B, T) and positions (B, n) ->
    logits of the words at these positions, (B, n, V).

    attention_mask (B, T): False or 0 at padding, to which no token attends. segments (B, T): 0 or
    1, for pairs of texts. The texts of this script need neither. Raises ValueError where a text is
    longer than the context. The tensors are those of the published weights, renamed.
    """

    def __init__(self, vocab, context, dim, depth, heads, dropout=0.):
        super().__init__()
        self.dropout = dropout
        self.token_embed = nn.Embedding(vocab, dim)      # also the matrix to the logits
        self.pos_embed = nn.Embedding(context, dim)
        self.segment_embed = nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.pooler = nn.Linear(dim, dim)                # on [CLS]; random until fine-tuning
        self.mlm_transform = nn.Linear(dim, dim)
        self.mlm_norm = nn.LayerNorm(dim, eps=1e-12)
        self.mlm_bias = nn.Parameter(torch.zeros(vocab))
        std = .02 * math.sqrt(768 / dim)       # BERT's .02 suits its 768 channels; narrower models
        for layer in self.modules():           # learn sooner with more
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, tokens, positions, attention_mask=None, segments=None):
        x = self.encode(tokens, positions, attention_mask, segments)                # (B, n, C)
        x = self.mlm_norm(F.gelu(self.mlm_transform(x)))
        return F.linear(x, self.token_embed.weight, self.mlm_bias)                  # (B, n, V)

    def encode(self, tokens, positions=None, attention_mask=None, segments=None):
        """The Transformer alone: tokens (B, T) -> (B, T, C). With positions (B, n) the last block
        computes only these: (B, n, C)."""
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
        """A text as one vector, for a classifier: a layer on [CLS], (B, T) -> (B, C)."""
        first = torch.zeros_like(tokens[:, :1])                          # the position of [CLS]
        x = self.encode(tokens, first, attention_mask, segments)                    # (B, 1, C)
        return self.pooler(x[:, 0]).tanh()


class Classifier(nn.Module):
    """A BERT to be fine-tuned, with a new linear layer on pool(): texts (B, T) -> (B, classes).

    Between them is a BatchNorm, as in MAE's probes (MAE, A.1), so that the scale of pool() does not
    matter. At first all classes get the same score.
    """

    def __init__(self, bert, classes):
        super().__init__()
        dim = bert.pooler.out_features
        self.bert, self.norm = bert, nn.BatchNorm1d(dim, affine=False)
        self.head = nn.Linear(dim, classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens):
        return self.head(self.norm(self.bert.pool(tokens)))


class Block(nn.Module):
    """Post-norm Transformer block: (B, T, C) -> (B, T, C), or (B, n, C) at positions (B, n): the
    same as to gather them afterwards, with less work."""

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
    """Multi-head attention, from tokens y (B, n, C) to all tokens x (B, T, C) of the text:
    (B, n, C). Query, key and value are layers of their own, as in the published weights."""

    def __init__(self, dim, heads, dropout=0.):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels cannot be divided among {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, y, x, attention_mask=None):
        B, _, C = x.shape
        split = lambda z: z.view(B, -1, self.heads, C // self.heads).transpose(1, 2)
        q, k, v = split(self.query(y)), split(self.key(x)), split(self.value(x))    # (B, H, ., D)
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None].bool()                   # (B, 1, 1, T)
        dropout = self.dropout if self.training else 0.
        z = F.scaled_dot_product_attention(q, k, v, attention_mask, dropout)        # (B, H, n, D)
        return F.dropout(self.proj(z.transpose(1, 2).reshape(B, -1, C)), dropout)


class MLP(nn.Module):
    """Two layers, applied to each token: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, dropout=0.):
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training)


def gather(x, positions):
    """The tokens of x (B, T, C) at positions (B, n), others in each text: (B, n, C)."""
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))


# ------------------------------------------------------------------------------------ the method

PAD, UNK, CLS, SEP, MASK = range(5)      # the special tokens, which are never masked
FIRST_WORD = 5                           # all tokens from here on are words


def distance(prediction, target):
    """C. Mean cross-entropy of logits (B, n, V) with the masked words (B, n), in nats per word;
    -100 in the target: nothing is masked there."""
    loss = F.cross_entropy(prediction.flatten(0, 1).float(), target.flatten(), reduction="sum")
    return loss / (target >= 0).sum().clamp(min=1)            # clamp: texts of special tokens alone


def mask(x, span_ids, vocab, ratio=.15, keep=0.):
    """A. Masks words of the texts x (B, T). Returns the inputs of the model, (tokens (B, T),
    positions (B, n)), and the target (B, n): the words that were there, or -100.

    span_ids (B, T): neighbours with the same id are masked together, so with
    torch.arange(T).expand(B, T) each word alone. vocab: size of the vocabulary; ratio: fraction of
    the words to mask; keep: fraction of these that stay as they are. x is not changed.
    """
    positions, target = choose_positions(x, span_ids, ratio)
    words = x.gather(1, positions)
    u = rand_per_span(span_ids).gather(1, positions)        # a span is corrupted in one way
    shown = torch.where(target < 0, words, corrupt(words, u, vocab, keep))
    return (x.scatter(1, positions, shown), positions), target


def corrupt(words, u, vocab, keep=0.):
    """What shows in place of the masked words: [MASK] for 80 % of them, the word itself for the
    fraction `keep` (0.2 or less), a random word for the rest. u, of the same shape, is uniform in
    [0, 1)."""
    random = torch.randint(FIRST_WORD, vocab, words.shape, device=words.device)
    return torch.where(u < .8, MASK, torch.where(u < 1 - keep, random, words))


def choose_positions(x, span_ids, ratio=.15):
    """Chooses random words of the texts x (B, T): positions (B, n), and the words there (B, n).

    Each span gets a random number, the tokens are sorted by it, and the first are taken: whole
    spans, until the fraction `ratio` of the words (rounded, 1 or more) is reached; the last span is
    cut there. All texts have n = round(ratio * T) positions; since special tokens are no words,
    some need fewer, and the rest get -100 in place of the word.
    """
    is_word = x >= FIRST_WORD
    count = (is_word.sum(1, keepdim=True) * ratio).round().clamp(min=1)             # (B, 1)
    n = max(1, round(ratio * x.shape[1]))
    order = rand_per_span(span_ids).masked_fill(~is_word, 2.)           # special tokens come last
    positions = order.argsort(stable=True, dim=1)[:, :n]                # stable: spans stay whole
    chosen = (torch.arange(n, device=x.device) < count) & is_word.gather(1, positions)
    return positions, x.gather(1, positions).masked_fill(~chosen, -100)


def rand_per_span(span_ids):
    """Uniform numbers in [0, 1), one for each span, at all tokens of it: (B, T)."""
    span = F.pad(span_ids[:, 1:] != span_ids[:, :-1], (1, 0)).cumsum(1)    # 0, 1, 2 in each text
    return torch.rand(span.shape, device=span.device).gather(1, span)


def spans(B, T, p=.2, longest=10, device=None):
    """Span ids for --strategy span, spans of random lengths: (B, T).

    The lengths are geometric, cut at the longest and renormalised: P(l) ~ p (1 - p)^(l - 1), with
    a mean of 3.80 (SpanBERT, sec. 3.1). In short texts the last one is often cut: of a CPU's 4
    masked words per text, the mean is 2.4.
    """
    weight = (1 - p) ** torch.arange(longest, device=device)
    length = 1 + weight.multinomial(B * T, replacement=True).view(B, T)      # T spans are enough
    start = length.cumsum(1).clamp(max=T)                                    # of all but the first
    is_start = torch.zeros(B, T + 1, dtype=torch.int64, device=device).scatter_(1, start, 1)
    return is_start[:, :T].cumsum(1)


def pmi(tokens, longest=5):
    """Pointwise mutual information of the n-gram that starts at each of N tokens, and how often it
    occurs: {n: (PMI in nats, count)}, each (N - n + 1,), for n from 2 to `longest`.

    PMI(w) = log p(w) - max sum_j log p(part_j) over all ways to cut w into two or more parts
    (PMI-Masking, eq. 3). It is high where the words occur together far more often than even the
    likeliest parts would by chance.
    """
    log_p, best, found = {}, {}, {}           # best[n]: the maximum over all cuts, or no cut
    ids = torch.zeros_like(tokens)            # number of the (n - 1)-gram that starts at each token
    for n in range(1, min(longest, len(tokens)) + 1):
        size = len(tokens) - n + 1
        pairs = ids[:size] * (tokens.max() + 1) + tokens[n - 1:]     # and the next word: n-grams
        _, ids, count = pairs.unique(return_inverse=True, return_counts=True)
        log_p[n] = best[n] = (count[ids] / size).log()
        if n > 1:
            cuts = [log_p[k][:size] + best[n - k][k:] for k in range(1, n)]
            cut = torch.stack(cuts).amax(0)
            best[n] = torch.maximum(log_p[n], cut)
            found[n] = log_p[n] - cut, count[ids]
    return found


def pmi_spans(tokens, min_count=10, min_pmi=2., longest=5):
    """Span ids for --strategy pmi, of a whole text: (N,).

    A span is an n-gram without special tokens that occurs min_count times or more, with a PMI of
    min_pmi nats or more. From left to right, the longest is taken; any other token is a span alone.
    """
    length = torch.ones(len(tokens), dtype=torch.int64)       # of the longest span from here on
    special = F.pad((tokens < FIRST_WORD).long().cumsum(0), (1, 0))          # special tokens before
    for n, (nats, count) in pmi(tokens, longest).items():
        words_only = special[n:] == special[:-n]
        length[:len(nats)][(nats >= min_pmi) & (count >= min_count) & words_only] = n
    ids = []
    for i, n in enumerate(length.tolist()):
        if len(ids) == i:                                     # the span before has ended
            ids += [i] * n
    return torch.tensor(ids)


def add_special_tokens(x):
    """[CLS] before texts (B, T) and [SEP] after them: (B, T + 2)."""
    return F.pad(F.pad(x, (1, 0), value=CLS), (0, 1), value=SEP)


# ------------------------------------------------------------------------------------ evaluation


def build(args, vocab):
    """The BERT of these settings, on the device."""
    return BERT(vocab, args.context, args.dim, args.depth, args.heads,
                args.dropout).to(args.device)


# The names of BERT's authors for the parts of this model, and ours (-: is not loaded).
NAMES = ("position_ids=- seq_relationship=- bert.= gamma=weight beta=bias "
         "embeddings.word_embeddings=token_embed embeddings.position_embeddings=pos_embed "
         "embeddings.token_type_embeddings=segment_embed embeddings.LayerNorm=norm "
         "encoder.layer=blocks attention.self=attn attention.output.dense=attn.proj "
         "attention.output.LayerNorm=norm1 intermediate.dense=mlp.fc1 output.dense=mlp.fc2 "
         "output.LayerNorm=norm2 pooler.dense=pooler cls.predictions.transform.dense=mlm_transform "
         "cls.predictions.transform.LayerNorm=mlm_norm cls.predictions.=mlm_ "
         "mlm_decoder.weight=token_embed.weight mlm_decoder.bias=mlm_bias")


def load_published(args):
    """The BERT and the tokenizer in the folder --weights; sets the sizes of args. Where there is no
    head for masked words (sentence encoders have none) that head is random."""
    state, config = common.published(args.weights, "BERT", NAMES, "pos_embed.weight")
    words = common.WordPiece.load(args.weights)
    for name in {"token_embed.weight", "mlm_bias"} & state.keys():
        if len(state[name]) == words.vocab:                    # here the special tokens come first
            state[name] = state[name][words.published]
    common.require("num_attention_heads" in config, f"--weights {args.weights} has no config.json")
    context, args.dim = state["pos_embed.weight"].shape
    args.depth = sum(name.endswith("query.weight") for name in state)
    args.heads = config["num_attention_heads"]
    model = BERT(words.vocab, context, args.dim, args.depth, args.heads, args.dropout)
    common.fill_in(model, state, args.weights, config, missing=("pooler", "mlm"))
    return model.to(args.device), words, "mlm_bias" in state


def start(args, text=None):
    """The model at the start, its tokenizer, and whether it can fill in words without training. A
    resumed run keeps the words that it started with."""
    if args.weights:
        return load_published(args)
    if text is None or args.resume and Path(args.out, "checkpoint.pt").exists():
        state = common.read_checkpoint(args.out, common.script(args))
        words = common.Words(state["about"].get("vocabulary", []))
    else:
        words = common.Words.of(text.train, args.vocab)
    return build(args, words.vocab), words, True


def windows(args, words, text):
    """Windows of --context tokens, two of them special. To train on from every start, tokens and
    span ids: (n, 2, T - 2); to validate on one after another, tokens: (m, T - 2)."""
    train, val, size = words.stream(text.train), words.stream(text.val), args.context - 2
    common.require(len(val) >= size <= len(train), f"the last tenth of --data {args.data} has "
                   f"{len(val)} words, the rest {len(train)}, and --context {args.context} needs "
                   f"{size} in both: take a longer text or a shorter context")
    span_ids = pmi_spans(train.long()) if args.strategy == "pmi" else torch.arange(len(train))
    train = torch.stack([train, span_ids.int()], 1).to(args.device)
    val = common.evenly(val.long().to(args.device).unfold(0, size, size), 4000)
    common.require((val >= FIRST_WORD).any(), f"the last tenth of --data {args.data} has no word "
                   "that the rest has twice: take a longer text")
    return train.unfold(0, size, 1), val


def examples(args, rows):
    """Training windows (B, 2, T - 2) -> texts x and their span ids, each (B, T)."""
    x, span_ids = rows.long().unbind(1)
    x = add_special_tokens(x)
    if args.strategy == "span":
        return x, spans(*x.shape, device=x.device)
    return x, F.pad(span_ids, (1, 1), value=-1)


@torch.no_grad()
def evaluate(args, model, train, val, repeats=4):
    """Masks single words, 15 %, of new texts (m, T - 2), other ones in each repeat. Returns
    dict(accuracy in %, perplexity) of the model, and of the unigram baseline, which predicts the
    frequencies of the words in the training text (N,) at all positions."""
    vocab, found = len(model.mlm_bias), []
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
            found += zip(target.tolist(), right.tolist(), nats.tolist())
    target, right, nats = map(torch.tensor, zip(*found))
    count = 1. + train[train >= FIRST_WORD].bincount(minlength=vocab).cpu()
    unigram = (count / count.sum()).log()
    score = lambda right, nats: dict(accuracy=100 * right.float().mean().item(),
                                     perplexity=math.exp(min(nats.mean().item(), 100)))
    return score(right, nats), score(target == unigram.argmax(), -unigram[target])


def own_sentence(args, words):
    """--fill as tokens (T,), and the positions of its blanks."""
    common.require("<mask>" in args.fill, "--fill has no <mask> in it: put one where a word is to "
                   'be predicted, as in --fill "the <mask> statement"')
    parts = [words.encode(part) for part in args.fill.split("<mask>")]
    if any((part == UNK).any() for part in parts):
        common.say("Some words of --fill are not in the vocabulary: the model gets [UNK].")
    tokens = torch.cat([t for part in parts for t in (torch.tensor([MASK]), part)][1:])
    common.require(len(tokens) <= args.context - 2, f"--fill has {len(tokens)} words and marks, "
                   f"and --context {args.context} holds {args.context - 2}: shorten it")
    return tokens, (tokens == MASK).nonzero().flatten()


def sentences(words, text, n, seed, longest):
    """n sentences of a text (N,), 8 to 16 plain words and a full stop, each with two words to be
    predicted: [(tokens (T,), positions (2,))]. Without such sentences, windows of the text."""
    ends = (text == words.ids.get(".", -1)).nonzero().flatten()
    plain = [text[a + 1:b + 1] for a, b in zip(ends, ends[1:]) if 9 <= b - a <= min(17, longest)]
    is_plain = lambda t: t >= FIRST_WORD and words.words[t].isalpha()
    plain = [s for s in plain if all(map(is_plain, s[:-1].tolist()))]
    size = min(12, longest)
    plain = plain or [s for s in text.unfold(0, size, size) if (s >= FIRST_WORD).all()]
    g = torch.Generator().manual_seed(seed)
    found = [plain[i] for i in torch.randperm(len(plain), generator=g)[:n]]
    return [(s, torch.randperm(len(s) - 1, generator=g)[:2].sort().values) for s in found]


def ask(args):
    """Fills in --fill by a trained or a published model, without a text or an evaluation."""
    model, words, able = start(args)
    if args.resume:
        model.load_state_dict(common.read_checkpoint(args.out)["model"])
    common.require(able or args.resume, f"--weights {args.weights} has no head for masked words")
    common.say(fill(args, model.eval(), words, *own_sentence(args, words)))
    return model


@torch.no_grad()
def fill(args, model, words, tokens, positions):
    """A text (T,) with numbered blanks, and the most likely words at each of these positions."""
    inputs = tokens.scatter(0, positions, MASK)
    x = add_special_tokens(inputs[None]).to(args.device)
    logits = model(x, 1 + positions[None].to(args.device))[0]                           # (n, V)
    names, lines = [words.words[t] for t in inputs.tolist()], []
    for i, (position, p) in enumerate(zip(positions.tolist(), logits.float().softmax(1)), 1):
        names[position] = f"[{i}]"
        likely = "  ".join(f"{words.words[w]} {100 * q:.0f} %" for q, w in zip(*p.topk(4)))
        was = words.words[tokens[position]]
        lines.append(f"   [{i}]  {likely}" + ("" if was == "[MASK]" else f"   (it was: {was})"))
    return common.printable("\n".join([words.join(names), *lines]))


def finetune(args, model, passages, k, seed=0):
    """Accuracy in % of a copy of the model as a Classifier, after fine-tuning what takes gradients
    on k passages per class."""
    i = common.k_shot(passages.labels, k, seed)
    x, labels = passages.train[i], passages.labels[i]
    torch.manual_seed(seed)
    classifier = Classifier(copy.deepcopy(model), len(passages.names)).to(args.device).train()
    optimizer = common.adamw(classifier.parameters(), args.tune_lr, weight_decay=.05)
    for step in common.progress(range(args.tune_steps), "fine-tuning"):
        for group in optimizer.param_groups:
            group["lr"] = args.tune_lr * common.schedule(step, args.tune_steps, .1)
        i = torch.randint(len(x), (min(64, len(x)),), device=x.device)
        with common.autocast(args):
            loss = F.cross_entropy(classifier(x[i]), labels[i])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = common.encode(args, classifier.eval(), None, passages.test)
    return 100 * (scores.argmax(1) == passages.test_labels).float().mean().item()


def few_labels(args, model, passages):
    """Which part is a passage from? {method: accuracies in % at each of --labels}."""
    vocab, labels, test_labels = len(model.mlm_bias), passages.labels, passages.test_labels
    bag = lambda x: x.new_zeros(len(x), vocab).scatter_add_(1, x, torch.ones_like(x))
    train, test = (common.encode(args, bag, None, x) for x in (passages.train, passages.test))
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
        return ask(args)
    text = common.load_text(args.data, args.data_dir, parts=args.classes, utf8=True)
    model, words, able = start(args, text)
    train, val = windows(args, words, text)
    passages = common.Passages(args, words, text)
    common.k_shot(passages.labels, max(args.labels))                       # raises now if too few
    blanks = [own_sentence(args, words)] if args.fill else []
    optimizer = common.optimizer(args, model.named_parameters())
    run = common.Run(args, model, optimizer, uniform=math.log(words.vocab),
                     about=dict(vocabulary=words.words))
    for step in run:                       # sets the seed and the learning rate of this step
        x, span_ids = examples(args, run.batch(train))
        with run.autocast():
            inputs, target = run.part(mask(                                 # A. mask
                x, span_ids, words.vocab, args.mask_ratio, args.keep))
            prediction = model(*inputs)                                     # B. predict
            loss = distance(prediction, target)                             # C. compare
        loss.backward()
        if not run.reduce(loss):           # of --accumulate parts, and of processes, the mean
            continue
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)

    model.eval()
    filled, masked, unigram, result = [], None, None, "no head for masked words"
    if able or args.steps:
        blanks += sentences(words, val.flatten().cpu(), 4, args.seed, args.context - 2)
        filled = [fill(args, model, words, *blank) for blank in blanks]
        masked, unigram = evaluate(args, model, train[:, 0, 0], val)       # first words of windows
        result = (f"{masked['accuracy']:.1f} % of masked words, perplexity "
                  f"{masked['perplexity']:.1f} (unigram baseline {unigram['accuracy']:.1f} %, "
                  f"{unigram['perplexity']:.1f})")
    rows = few_labels(args, model, passages)
    if (unknown := (val == UNK).float().mean().item()) > 1 / 3:
        result = f"{100 * unknown:.0f} % of the new text is [UNK], so this says little: {result}"
    common.report(run, result, dict(
        masked=masked, unigram=unigram, vocab=words.vocab, filled=filled, parts=passages.names,
        labels=args.labels, accuracy=rows))
    table = common.table([["accuracy in %", *(f"{k} per class" for k in args.labels)],
                          *([name, *(f"{x:.1f}" for x in row)] for name, row in rows.items())])
    common.say("\n" + "\n\n".join([
        *filled, f"Correct in new text: {result}.", f"Which part is a passage of "
        f"{args.passage - 2} words from: {', '.join(passages.names)}?", table]))
    return model


if __name__ == "__main__":
    common.cli(main, Args)
