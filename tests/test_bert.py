"""bert.py against torch's own layer, an independent forward in the published layout, counts and loops."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import call, refused, run
from torch import nn

import bert
import common
from bert import CLS, MASK, PAD, SEP, UNK, add_special_tokens

SMALL = ("--dim 16 --heads 2 --depth 1 --batch 4 --context 12 --passage 8 --classes 2 --labels 1 --tune-steps 2 "
         "--dtype float32 --device cpu").split()


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = bert.BERT(vocab=40, context=12, dim=24, depth=3, heads=3)
    for p in model.parameters():              # biases and norms, too, must matter
        nn.init.normal_(p, std=.3)
    return model.eval()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of two documents in words of their own."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "fox.txt").write_text("the quick brown fox jumps over the lazy dog and runs. " * 40)
    (folder / "sea.txt").write_text("a ship sails on the wide sea under the grey clouds, far away. " * 40)
    return folder


def encoder_layer(block):
    """torch's own post-norm layer with the weights of one of our blocks, in evaluation mode."""
    dim, heads = block.norm1.weight.numel(), block.attn.heads
    layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0, activation=F.gelu, norm_first=False,
                                       batch_first=True, layer_norm_eps=1e-12).to(block.norm1.weight.dtype)
    ours, state = block.state_dict(), {}
    for kind in "weight", "bias":
        state[f"self_attn.in_proj_{kind}"] = torch.cat([ours[f"attn.{name}.{kind}"] for name in ("query", "key", "value")])
        for a, b in ("attn.proj", "self_attn.out_proj"), ("mlp.fc1", "linear1"), ("mlp.fc2", "linear2"), \
                ("norm1", "norm1"), ("norm2", "norm2"):
            state[f"{b}.{kind}"] = ours[f"{a}.{kind}"]
    layer.load_state_dict(state)
    return layer


# ------------------------------------------------------------------------------------- the model


def test_block_equals_torchs_transformer_layer():
    torch.manual_seed(0)
    block, x = bert.Block(24, 3).double(), torch.randn(4, 9, 24, dtype=torch.float64)
    for p in block.parameters():
        nn.init.normal_(p, std=.3)
    layer, attention_mask = encoder_layer(block), torch.arange(9) < torch.tensor([9, 5, 7, 1])[:, None]
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    close(block(x), layer(x))
    ours, theirs = block(x, attention_mask=attention_mask), layer(x, src_key_padding_mask=~attention_mask)
    close(ours[attention_mask], theirs[attention_mask])
    positions = torch.tensor([[3, 0], [1, 1], [6, 2], [0, 0]])
    close(block(x, positions, attention_mask), bert.gather(ours, positions))
    close(block(x, positions, attention_mask.long()), bert.gather(ours, positions))     # zeros and ones, as others have it


def published_names(model):
    """Our tensors under the names of the published BERT; one for one, nothing is cut or joined."""
    state = {}
    for name, value in model.state_dict().items():
        for a, b in [("token_embed", "embeddings.word_embeddings"), ("pos_embed", "embeddings.position_embeddings"),
                     ("segment_embed", "embeddings.token_type_embeddings"), ("blocks.", "encoder.layer."),
                     ("attn.proj", "attention.output.dense"), ("attn.", "attention.self."), ("norm1", "attention.output.LayerNorm"),
                     ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"), ("norm2", "output.LayerNorm"),
                     ("pooler.", "pooler.dense."), ("mlm_norm", "cls.predictions.transform.LayerNorm"),
                     ("mlm_bias", "cls.predictions.bias"), ("mlm_transform", "cls.predictions.transform.dense")]:
            name = name.replace(a, b)
        name = f"embeddings.LayerNorm{name[4:]}" if name.startswith("norm.") else name
        state[name if name.startswith("cls.") else f"bert.{name}"] = value
    return state


def published(p, tokens, segments, heads):
    """BERT's forward from its paper, with the published names: logits at every token, and the pooled [CLS]."""
    norm = lambda x, n: F.layer_norm(x, x.shape[-1:], p[f"{n}.weight"], p[f"{n}.bias"], 1e-12)
    linear = lambda x, n: x @ p[f"{n}.weight"].T + p[f"{n}.bias"]
    gelu = lambda x: x * .5 * (1 + torch.erf(x / math.sqrt(2)))
    e = "bert.embeddings."
    x = p[e + "word_embeddings.weight"][tokens] + p[e + "position_embeddings.weight"][:tokens.shape[1]] \
        + p[e + "token_type_embeddings.weight"][segments]
    x = norm(x, e + "LayerNorm")
    for i in range(sum("output.dense.weight" in n and "attention" in n for n in p)):
        b = f"bert.encoder.layer.{i}."
        q, k, v = (linear(x, f"{b}attention.self.{n}").chunk(heads, -1) for n in ("query", "key", "value"))
        a = [(qi @ ki.transpose(1, 2) / math.sqrt(qi.shape[-1])).softmax(-1) @ vi for qi, ki, vi in zip(q, k, v)]
        x = norm(x + linear(torch.cat(a, -1), b + "attention.output.dense"), b + "attention.output.LayerNorm")
        x = norm(x + linear(gelu(linear(x, b + "intermediate.dense")), b + "output.dense"), b + "output.LayerNorm")
    h = norm(gelu(linear(x, "cls.predictions.transform.dense")), "cls.predictions.transform.LayerNorm")
    logits = h @ p[e + "word_embeddings.weight"].T + p["cls.predictions.bias"]
    return x, logits, linear(x[:, 0], "bert.pooler.dense").tanh()


def test_everything_equals_the_published_forward_by_renaming(small):
    small.double()
    tokens, segments = torch.randint(40, (3, 12)), torch.randint(2, (3, 12))
    p, positions = published_names(small), torch.tensor([[0, 5], [11, 2], [3, 3]])
    assert len(p) == 3 + 2 + 3 * 16 + 2 + 5                 # all but cls.seq_relationship, for next-sentence prediction
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for given, used in (None, torch.zeros_like(segments)), (segments, segments):
        hidden, logits, pooled = published(p, tokens, used, 3)
        close(small.encode(tokens, segments=given), hidden)
        close(small(tokens, positions, segments=given), bert.gather(logits, positions))
        close(small.pool(tokens, segments=given), pooled)


def test_bert_base_has_its_110_million_parameters():
    with torch.device("meta"):
        model = bert.BERT(30522, 512, 768, 12, 12)
    count = sum(p.numel() for p in model.parameters())
    assert count - 768 ** 2 - 3 * 768 - 30522 == 109_482_240                    # the encoder, without the MLM head


def test_padding_changes_nothing(small):
    x = torch.randint(5, 40, (2, 9))
    padded = F.pad(x, (0, 3), value=PAD)
    attention_mask, positions = padded != PAD, torch.tensor([[1, 4], [2, 8]])
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    close(small(padded, positions, attention_mask), small(x, positions))
    close(small.pool(padded, attention_mask), small.pool(x))
    close(small.encode(padded, attention_mask=attention_mask)[:, :9], small.encode(x))
    assert not torch.allclose(small.pool(padded), small.pool(x), atol=1e-3)


def test_the_words_on_both_sides_matter(small):
    x, positions = torch.randint(5, 40, (1, 12)), torch.tensor([[6]])
    before = small(x, positions)
    for t in range(12):
        y = x.clone()
        y[0, t] = 5 + (y[0, t] - 4) % 35
        assert not torch.allclose(small(y, positions), before, atol=1e-4), t


def test_a_text_longer_than_the_context_is_refused_in_one_sentence(small):
    x, positions = torch.randint(5, 40, (2, 13)), torch.zeros(2, 1, dtype=torch.int64)
    for call in lambda: small(x, positions), lambda: small.encode(x), lambda: small.pool(x):
        with pytest.raises(ValueError, match="^13 tokens are more than the context of 12$"):
            call()
    with pytest.raises(ValueError, match="^24 channels cannot be divided among 5 heads$"):
        bert.BERT(40, 12, 24, 1, 5)


def test_dropout_in_training_only(small):
    model = bert.BERT(40, 12, 24, 3, 3, dropout=.3)
    model.load_state_dict(small.state_dict())
    x = torch.randint(40, (2, 12)), torch.zeros(2, 1, dtype=torch.int64)
    assert torch.equal(model.eval()(*x), small(*x)) and not torch.equal(model.train()(*x), model(*x))


def test_gradients_reach_every_tensor_but_the_pooler():
    torch.manual_seed(0)
    model, x = bert.BERT(40, 12, 24, 2, 3), torch.randint(5, 40, (4, 12))
    inputs, target = bert.mask(x, torch.arange(12).expand_as(x), 40)
    loss = bert.distance(model(*inputs), target)
    assert abs(loss - math.log(40)) < .2                                        # about a uniform guess
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("pooler"), name
        assert p.grad is None or name.endswith("key.bias") or p.grad.abs().max() > 0, name


# -------------------------------------------------------------------------------------- the mask


def plenty(keep=0., ratio=.15, span_ids=None, n=1000, T=128):
    """100,000 words of text between special tokens, and what mask makes of them."""
    torch.manual_seed(1)
    x = torch.randint(5, 500, (n, T))
    x[:, 0], x[:, -1], x[:, 60], x[::3, 61] = CLS, SEP, UNK, SEP
    before = x.clone()
    span_ids = torch.arange(T).expand_as(x) if span_ids is None else span_ids
    (tokens, positions), target = bert.mask(x, span_ids, 500, ratio, keep)
    assert torch.equal(x, before)                                               # the input is not changed
    masked = torch.zeros_like(x, dtype=torch.bool)
    for row, ids, t in zip(masked, positions, target):
        row[ids[t >= 0]] = True
    return x, tokens, positions, target, masked


@pytest.mark.parametrize("keep", [0., .1])
def test_15_per_cent_are_masked_80_show_as_mask_and_20_as_others(keep):
    x, tokens, positions, target, masked = plenty(keep)
    is_word = x >= 5
    n, m = int(is_word.sum()), int(masked.sum())
    assert n > 1e5 and abs(m / n - .15) < 3 * math.sqrt(.15 * .85 / n)
    assert (masked.sum(1) == (.15 * is_word.sum(1)).round()).all()              # in each text exactly as many
    assert not (masked & ~is_word).any() and torch.equal(tokens[~masked], x[~masked])   # all else: as it was
    shown, was = tokens[masked], x[masked]
    near = lambda count, p: abs(int(count) / m - p) < 3 * math.sqrt(p * (1 - p) / m)
    assert near((shown == MASK).sum(), .8)
    others = shown[shown != MASK]
    assert others.min() >= 5 and near((shown == was).sum(), max(keep, 1e-9) + (.2 - keep) / 495)
    assert near(((shown != MASK) & (shown != was)).sum(), (.2 - keep) * 494 / 495)
    random = others if not keep else others[others != was[shown != MASK]]
    count = random.bincount(minlength=500)[5:].float()
    assert count.std() < 1.3 * math.sqrt(count.mean())                          # every word is equally likely
    assert torch.equal(target[target >= 0], torch.cat([row[ids[t >= 0]] for row, ids, t in zip(x, positions, target)]))


def test_what_shows_by_hand():
    u = torch.tensor([[0., .5, .79, .8, .89, .9, .95, .999]])
    words = torch.full_like(u, 7, dtype=torch.int64)
    kinds = lambda keep: ["mask" if t == MASK else "word" if t == 7 else "random"
                          for t in bert.corrupt(words, u, 10 ** 9, keep)[0].tolist()]
    assert kinds(0.) == ["mask"] * 3 + ["random"] * 5
    assert kinds(.1) == ["mask"] * 3 + ["random"] * 2 + ["word"] * 3
    assert kinds(.2) == ["mask"] * 3 + ["word"] * 5
    shown = bert.corrupt(torch.full((40, 40), 7), torch.full((40, 40), .9), 8)
    assert shown.unique().tolist() == [5, 6, 7]                                 # of the vocabulary, without special tokens


def test_positions_equal_a_loop():
    """Spans in random order, word by word, until enough are chosen."""
    for seed, ratio in enumerate((.05, .15, .4, .8)):
        torch.manual_seed(seed)
        x, span_ids = torch.randint(0, 30, (50, 20)), torch.randint(0, 3, (50, 20))
        x[0] = PAD
        torch.manual_seed(seed)
        positions, target = bert.choose_positions(x, span_ids, ratio)
        torch.manual_seed(seed)
        number = bert.rand_per_span(span_ids)
        for row in range(50):
            words = [t for t in range(20) if x[row, t] >= 5]
            ordered = sorted(words, key=lambda t: (number[row, t].item(), t))
            chosen = ordered[:max(1, round(len(words) * ratio))]
            n = len(chosen)
            assert positions[row, :n].tolist() == chosen and target[row, :n].tolist() == x[row, chosen].tolist()
            assert (target[row, n:] == -100).all() and len(target[row]) == max(1, round(20 * ratio))


def test_a_span_has_one_random_number():
    torch.manual_seed(0)
    span_ids = torch.tensor([[4, 4, 9, 9, 4], [1, 2, 2, 2, 2]])
    a, b = bert.rand_per_span(span_ids).tolist()
    assert a[0] == a[1] != a[2] == a[3] != a[4] != a[0] and b[0] != b[1] == b[2] == b[3] == b[4]
    numbers = bert.rand_per_span(torch.arange(1000).expand(100, -1))
    assert 0 <= numbers.min() and numbers.max() < 1 and abs(numbers.mean() - .5) < .005


def test_every_word_is_masked_equally_often():
    x, _, _, _, masked = plenty()
    fraction = masked.float().mean(0)[(x >= 5).all(0)]
    assert abs(fraction - .15).max() < 4.5 * math.sqrt(.15 * .85 / 1000)


def test_the_loss_at_the_positions_equals_the_one_computed_everywhere(small):
    torch.manual_seed(0)
    x = torch.randint(5, 40, (6, 12))
    x[:, 0], x[:, -1], x[2, 5:] = CLS, SEP, PAD                                  # one text is shorter, and has fewer targets
    (tokens, positions), target = bert.mask(x, torch.arange(12).expand_as(x), 40, ratio=.4)
    assert (target[2] >= 0).sum() == 2 and (target[0] >= 0).sum() == 4
    loss = bert.distance(small(tokens, positions, x != PAD), target)
    everywhere = torch.arange(12).expand_as(x)
    logits = small(tokens, everywhere, x != PAD)                                # every block and the MLM head at all positions
    label = torch.full_like(x, -100).scatter(1, positions, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=-100))
    nothing = bert.distance(torch.randn(2, 3, 40, requires_grad=True), torch.full((2, 3), -100))
    assert nothing == 0                                                         # texts of special tokens have no targets


def test_neighbours_of_a_span_are_masked_together():
    torch.manual_seed(0)
    lengths = torch.tensor([3, 1, 2, 4, 1, 5, 2, 2])
    span_ids = torch.arange(8).repeat_interleave(lengths).repeat(300, 6)        # ids come back: neighbours count
    x = torch.randint(5, 500, span_ids.shape)
    (tokens, positions), target = bert.mask(x, span_ids, 500, .15)
    masked = torch.zeros_like(x, dtype=torch.bool).scatter_(1, positions, True)
    number = F.pad(span_ids[:, 1:] != span_ids[:, :-1], (1, 0)).cumsum(1)
    for row in range(300):
        torn = 0
        for g in range(48):
            i = (number[row] == g).nonzero().flatten()
            inside = masked[row, i]
            if inside.any() and not inside.all():
                torn += 1
                assert inside[:int(inside.sum())].all()                         # the last span is cut, and begins whole
            if inside.all():
                shown = tokens[row, i]
                assert (shown == MASK).all() or (shown != MASK).all()           # 80/10/10 is decided per span
        assert torn <= 1


def test_lengths_of_spans_are_a_geometric_distribution_cut_at_ten():
    torch.manual_seed(0)
    span_ids = bert.spans(2000, 500)
    assert (span_ids[:, 1:] - span_ids[:, :-1]).unique().tolist() == [0, 1] and span_ids[:, 0].max() == 0
    inner = torch.cat([row.bincount()[:-1] for row in span_ids])                # the last one is cut by the end
    p = torch.tensor([.2 * .8 ** (k - 1) for k in range(1, 11)], dtype=torch.float64)
    p /= p.sum()
    mean = (p * torch.arange(1, 11)).sum()
    assert abs(mean - 3.797) < 1e-3 and inner.max() == 10
    n, std = len(inner), math.sqrt((p * torch.arange(1, 11) ** 2).sum() - mean ** 2)
    assert n > 1e5 and abs(inner.double().mean() - mean) < 4 * std / math.sqrt(n) + .01
    fraction = inner.bincount(minlength=11)[1:] / n
    assert (fraction - p).abs().max() < 4 * math.sqrt(.25 / n) + .002
    x, _, _, _, masked = plenty(span_ids=bert.spans(1000, 128))                 # and 15 % all the same
    assert abs(int(masked.sum()) / int((x >= 5).sum()) - .15) < .0034


# -------------------------------------------------------------------------------------------- PMI


def mutual(counts, sizes, words):
    """The definition, by recursion over every way to cut."""
    p = lambda part: math.log(counts[len(part)][part] / sizes[len(part)])
    def ways(part):
        yield p(part)
        for i in range(1, len(part)):
            for rest in ways(part[i:]):
                yield p(part[:i]) + rest
    return p(words) - max(p(words[:i]) + rest for i in range(1, len(words)) for rest in ways(words[i:]))


def test_pmi_equals_its_definition():
    torch.manual_seed(0)
    text = torch.randint(5, 9, (60,)).tolist() + [11, 12, 13] * 4 + torch.randint(5, 9, (30,)).tolist()
    counts, sizes = {}, {}
    for n in range(1, 6):
        grams = [tuple(text[i:i + n]) for i in range(len(text) - n + 1)]
        counts[n], sizes[n] = {g: grams.count(g) for g in grams}, len(grams)
    found = bert.pmi(torch.tensor(text), 5)
    for n in range(2, 6):
        nats, count = found[n]
        for i in range(len(text) - n + 1):
            g = tuple(text[i:i + n])
            assert count[i] == counts[n][g] and abs(nats[i] - mutual(counts, sizes, g)) < 1e-4, (n, i)


def test_spans_of_high_pmi_are_found_and_the_longest_is_taken():
    torch.manual_seed(0)
    noise = lambda: torch.randint(5, 60, (9,)).tolist()
    text = sum((noise() + [70, 71, 72] for _ in range(40)), []) + sum((noise() + [80, 81, SEP, 82, 83] for _ in range(30)), [])
    text = torch.tensor(text)
    span_ids = bert.pmi_spans(text, min_count=10, min_pmi=2.)
    assert len(span_ids) == len(text)
    together = lambda i, n: len(set(span_ids[i:i + n].tolist())) == 1
    for i, t in enumerate(text):
        if t == 70:
            assert together(i, 3) and span_ids[i - 1] != span_ids[i] != span_ids[i + 3]
        if t == 80:
            assert together(i, 2) and not together(i + 1, 2) and not together(i + 2, 2) and together(i + 3, 2)
    single = torch.arange(len(text))
    assert torch.equal(bert.pmi_spans(text, min_count=41), single)              # nothing occurs so often
    assert torch.equal(bert.pmi_spans(text, min_pmi=50.), single)
    assert torch.equal(bert.pmi_spans(text[:1]), single[:1])


# ------------------------------------------------------------------------------------- evaluation


def words_of(texts):
    text = common.load_text(str(texts), parts=2)
    return text, common.Words.of(text.train, 100)


def settings(texts, tmp_path, **more):
    return bert.Args(**dict(data=str(texts), context=12, passage=8, classes=2, dim=16, depth=2, heads=2, dropout=0.,
                            batch=4, steps=3, labels=(1,), tune_steps=2, device="cpu", dtype="float32",
                            out=str(tmp_path)) | more)


def test_special_tokens_are_the_first_of_the_vocabulary(texts):
    _, words = words_of(texts)
    names = [words.words[i] for i in (PAD, UNK, CLS, SEP, MASK)]
    assert names == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] == words.words[:bert.FIRST_WORD]


def test_windows_and_span_ids(texts, tmp_path):
    text, words = words_of(texts)
    args = settings(texts, tmp_path)
    train, val = bert.windows(args, words, text)
    assert train.shape[1:] == (2, 10) and val.shape[1:] == (10,)
    assert words.decode(train[1, 0]) == "the quick brown fox jumps over the lazy dog and" and train[0, 0, 0] == SEP
    assert torch.equal(train[5, 0], train[4, 0].roll(-1).index_copy(0, torch.tensor([9]), train[5, 0, 9:]))
    x, span_ids = bert.examples(args, train[:4])
    assert (x[:, 0] == CLS).all() and (x[:, -1] == SEP).all() and torch.equal(x[:, 1:-1], train[:4, 0])
    assert (span_ids[:, 1:] != span_ids[:, :-1]).all()                          # each word alone
    torch.manual_seed(0)
    span_ids = bert.examples(settings(texts, tmp_path, strategy="span"), train[:4])[1]
    torch.manual_seed(0)
    assert torch.equal(span_ids, bert.spans(4, 12))
    args = settings(texts, tmp_path, strategy="pmi")
    train, _ = bert.windows(args, words, text)
    span_ids = bert.examples(args, train[:4])[1]
    assert torch.equal(span_ids[:, 1:-1], bert.pmi_spans(words.stream(text.train)).unfold(0, 10, 1)[:4])
    assert (span_ids[:, 0] == -1).all() and (span_ids[:, -1] == -1).all()


def test_evaluation_by_hand(texts, tmp_path):
    """A model that gives every word the logarithm of its frequency in the training text scores as the unigram baseline does."""
    text, words = words_of(texts)
    args = settings(texts, tmp_path)
    _, val = bert.windows(args, words, text)
    stream = words.stream(text.train)
    model = bert.BERT(words.vocab, 12, 16, 1, 2)
    for p in model.parameters():
        nn.init.zeros_(p)
    count = 1. + torch.tensor([sum(stream == i) * (i >= 5) for i in range(words.vocab)])
    model.mlm_bias.data = (count / count.sum()).log()
    ours, unigram = bert.evaluate(args, model, stream, val)
    assert ours == pytest.approx(unigram, rel=1e-4)
    assert 1 < unigram["perplexity"] < words.vocab and 0 < unigram["accuracy"] < 50
    nats, right = [], []
    for repeat in range(4):
        torch.manual_seed(repeat)
        x = add_special_tokens(val)
        _, target = bert.mask(x, torch.arange(12).expand_as(x), words.vocab)
        for t in target[target >= 0].tolist():
            nats.append(-math.log(count[t] / count.sum()))
            right.append(bool(count[t] == count.max()))
    assert len(val) < 100 and unigram["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert unigram["accuracy"] == pytest.approx(100 * sum(right) / len(right), rel=1e-4)
    assert bert.evaluate(args, model, stream, val) == (ours, unigram)           # the same words are masked
    model = bert.BERT(words.vocab, 12, 16, 1, 2).eval()                         # and show as the same words, whatever --keep says
    kept = settings(texts, tmp_path, keep=.2)
    assert kept.keep == .2 and bert.evaluate(kept, model, stream, val) == bert.evaluate(args, model, stream, val)


def test_a_model_learns_to_fill_in(texts, tmp_path):
    """30 % of the words are masked and the rate is moderate, so that this does not depend on the seed or on the processor:
    with each of ten seeds both words had a probability above 0.89, and 97 % of the masked words were right."""
    text, words = words_of(texts)
    args = settings(texts, tmp_path, fill="the quick <mask> fox jumps <mask> the lazy dog and")
    train, val = bert.windows(args, words, text)
    torch.manual_seed(0)
    model = bert.BERT(words.vocab, 12, 32, 2, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(1000):
        x, span_ids = bert.examples(args, train[torch.randint(len(train), (32,))])
        inputs, target = bert.mask(x, span_ids, words.vocab, .3)
        loss = bert.distance(model(*inputs), target)
        loss.backward(), optimizer.step(), optimizer.zero_grad()
    tokens, positions = bert.parse_fill(args, words)
    assert tokens[positions].tolist() == [MASK, MASK] and positions.tolist() == [2, 5]
    lines = bert.fill(args, model.eval(), words, tokens, positions).splitlines()
    assert lines[0] == "the quick [1] fox jumps [2] the lazy dog and"
    assert lines[1].split()[:2] == ["[1]", "brown"] and lines[2].split()[:2] == ["[2]", "over"]
    ours, unigram = bert.evaluate(args, model, words.stream(text.train), val)
    assert ours["accuracy"] > 60 and unigram["accuracy"] < 30 and ours["perplexity"] < unigram["perplexity"] / 3


def test_blanks_are_numbered_and_the_true_words_are_shown(texts, tmp_path):
    """With a model that predicts the same words everywhere."""
    text, words = words_of(texts)
    model = bert.BERT(words.vocab, 12, 16, 1, 2).eval()
    for p in model.parameters():
        nn.init.zeros_(p)
    likely = [words.ids[word] for word in ("fox", "dog", "sea", "ship")]
    model.mlm_bias.data.fill_(-50.)[likely] = torch.tensor([.5, .25, .15, .1]).log()
    text = bert.fill(settings(texts, tmp_path), model, words, words.encode("the lazy dog runs"), torch.tensor([1, 2]))
    guess = "fox 50 %  dog 25 %  sea 15 %  ship 10 %"
    assert text == f"the [1] [2] runs\n   [1]  {guess}   (it was: lazy)\n   [2]  {guess}   (it was: dog)"


def test_sentences_are_of_plain_known_words(texts):
    text, words = words_of(texts)
    stream = words.stream(text.train)
    found = bert.sentences(words, stream, 3, 1, 14)
    assert len(found) == 3
    for tokens, positions in found:
        assert words.decode(tokens) == "the quick brown fox jumps over the lazy dog and runs." and len(positions) == 2
        assert positions.max() < len(tokens) - 1                                # the full stop is never a blank
    assert [t.tolist() for t, _ in bert.sentences(words, stream, 3, 1, 14)] == [t.tolist() for t, _ in found]
    stream = words.encode("the lazy dog and the quick fox " * 9)                # no full stop: windows
    assert [len(tokens) for tokens, _ in bert.sentences(words, stream, 3, 1, 5)] == [5, 5, 5]


def test_passages_and_what_is_tuned(texts, tmp_path, monkeypatch):
    text, words = words_of(texts)
    args = settings(texts, tmp_path, tune_steps=100, tune_lr=3e-3)
    data = common.Passages(args, words, text)
    assert data.names == ["sea.txt", "fox.txt"] and data.train.shape[1] == 8
    sea = set(words.encode("ship sails sea clouds").tolist())
    for x, y in (data.train, data.labels), (data.test, data.test_labels):
        for row, label in zip(x, y):
            assert bool(sea & set(row.tolist())) == (label == 0) and row[0] == CLS and row[-1] == SEP
    assert data.normalize(data.test) is data.test
    data.test, data.test_labels = data.train, data.labels     # all of these, after 10 per class: they repeat
    torch.manual_seed(0)
    model, tuned = bert.BERT(words.vocab, 12, 16, 2, 2), []
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = bert.Pooled
    monkeypatch.setattr(bert, "Pooled", lambda *given: tuned.append(made(*given)) or tuned[-1])
    for how in "all", "last":                     # what takes gradients is tuned: experiments freeze the rest
        if how == "last":
            model.requires_grad_(False)
            model.blocks[-1].requires_grad_(True), model.pooler.requires_grad_(True)
        score = bert.finetune(args, model, data, 10)
        assert how == "last" or score > 80                                      # always the same: 56; sixteen seeds: all 100
        for name, value in before.items():
            assert torch.equal(model.state_dict()[name], value), name           # the original is left alone
            moves = not name.startswith("mlm") and (how == "all" or name.startswith(("blocks.1.", "pooler.")))
            if not name.endswith("key.bias"):                                   # the softmax cancels it
                assert torch.equal(tuned[-1].bert.state_dict()[name], value) != moves, (how, name)


def test_of_a_long_text_some_passages_are_enough(texts, tmp_path, monkeypatch):
    text, words = words_of(texts)
    monkeypatch.setattr(common, "MOST_PASSAGES", 7)
    data = common.Passages(settings(texts, tmp_path), words, text)
    assert data.labels.bincount().tolist() == [7, 7] and data.test_labels.bincount().max() <= 7
    assert len(data.train) == 14 and len(data.test) == len(data.test_labels)


def test_rows_of_few_labels(texts, tmp_path, monkeypatch):
    """The untrained model is the trained one before its training."""
    args, models = settings(texts, tmp_path, labels=(1, 2), seed=5, dropout=.5), []
    text, words = words_of(texts)
    data = common.Passages(args, words, text)
    torch.manual_seed(5)
    start = bert.build(args, words.vocab).state_dict()
    model = bert.build(args, words.vocab).eval()
    monkeypatch.setattr(bert, "finetune", lambda args, model, data, k: models.append(model) or float(k))
    rows = bert.few_labels(args, model, data)
    assert list(rows) == ["bag of words, linear", "untrained, tune all", "BERT, tune all"]
    assert rows["BERT, tune all"] == [1., 2.]
    assert models[2] is models[3] is model and models[0] is models[1]
    assert all(torch.equal(value, start[name]) for name, value in models[0].state_dict().items())


# -------------------------------------------------------------------------------------- the whole


def test_the_whole_script_and_again_without_training(texts, tmp_path):
    out = tmp_path / "run"
    done = run("--data", texts, "--steps", 30, "--out", out, *SMALL, "--fill", "the <mask> fox", script="bert.py")
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    figures = result["figures"]
    assert figures["filled"][0].startswith("the [1] fox\n   [1]  ") and f"\n\n{figures['filled'][0]}\n\n" in done.stdout
    assert "it was:" in figures["filled"][1] and len(figures["filled"]) == 5
    assert f"{figures['masked']['accuracy']:.1f} % of masked words" in done.stdout
    assert set(figures) == {"masked", "unigram", "vocab", "filled", "parts", "labels", "accuracy"}
    rows = figures["accuracy"]
    assert list(rows) == ["bag of words, linear", "untrained, tune all", "BERT, tune all"]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert all([*name.split(), f"{x:.1f}"] in lines for name, (x,) in rows.items()), done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    asked = run("--steps", 0, "--resume", "--out", out, "--data", "gone.txt", "--fill", "<mask> dog", script="bert.py")
    assert asked.returncode == 0 and asked.stdout.startswith("[1] dog\n   [1]  "), asked.stderr      # an answer, without the text
    assert json.loads((out / "result.json").read_text()) == result and "evaluating" not in asked.stderr
    assert figures["filled"][0] in run("--steps", 0, "--resume", "--out", out, "--fill", "the <mask> fox", script="bert.py").stdout
    again = run("--steps", 0, "--resume", "--out", out, "--data", texts / "sea.txt", "--fill", "", script="bert.py")
    after = json.loads((out / "result.json").read_text())
    assert again.returncode == 0 and after["settings"]["steps"] == 30 and after["figures"]["vocab"] == figures["vocab"], again.stderr


def test_main_returns_the_trained_model_without_dropout(texts, tmp_path):
    model = bert.main(settings(texts, tmp_path, dropout=.5))
    x = torch.arange(5, 10)[None]
    assert model.dropout == .5 and torch.equal(model.pool(x), model.pool(x))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(value, saved["model"][name]) for name, value in model.state_dict().items())
    words = saved["about"]["vocabulary"]
    assert words[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and len(words) == len(model.mlm_bias)


def test_killed_and_resumed_ends_bit_for_bit_as_one_never_stopped(texts, tmp_path, monkeypatch):
    how = dict(steps=8, dropout=.2, save_every=0., strategy="span")
    whole = bert.main(settings(texts, tmp_path / "whole", **how)).state_dict()
    log = common.Run.log

    def dies(self, loss):
        log(self, loss)
        if self.step == 5:
            raise RuntimeError("killed")
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", dies)
        with pytest.raises(RuntimeError):
            bert.main(settings(texts, tmp_path / "cut", **how))
    assert torch.load(tmp_path / "cut/checkpoint.pt", weights_only=True)["step"] == 5
    cut = bert.main(bert.Args(resume=True, out=str(tmp_path / "cut"))).state_dict()
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_a_run_killed_before_its_first_checkpoint_is_resumed(texts, tmp_path, monkeypatch):
    args = settings(texts, tmp_path / "run")
    whole = bert.main(settings(texts, tmp_path / "whole")).state_dict()
    common.claim(args)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["settings.json"]
    model = bert.main(bert.Args(resume=True, out=str(tmp_path / "run")))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in whole.items())


@pytest.mark.parametrize("strategy", ["span", "pmi"])
def test_strategies_run(texts, tmp_path, strategy):
    done = run("--data", texts, "--steps", 3, "--out", tmp_path / "run", *SMALL, "--strategy", strategy, script="bert.py")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags, words", [
    ("--mask-ratio 1", ["--mask-ratio must be", "in (0, 1), not 1.0"]),
    ("--mask-ratio 0", ["--mask-ratio must be", "in (0, 1), not 0.0"]),
    ("--keep .3", ["--keep must be", "in [0, 0.2], not 0.3"]),
    ("--strategy all", ["--strategy", "token"]),
    ("--context 3", ["--context must be", "4 or more, not 3"]),
    ("--passage 2", ["--passage must be", "3 or more, not 2"]),
    ("--vocab 5", ["--vocab must be", "6 or more, not 5"]),
    ("--classes 1", ["--classes must be", "2 or more, not 1"]),
    ("--labels 0", ["--labels must be", "1 or more, not 0"]),
    ("--tune-lr -1", ["--tune-lr must be", "0 or more, not -1.0"]),
    ("--tune-steps -5", ["--tune-steps must be", "0 or more, not -5"]),
    ("--depth 0", ["--depth must be", "1 or more, not 0"]),
    ("--dropout -1", ["--dropout must be", "in [0, 1), not -1.0"]),
    ("--warmup 2", ["--warmup must be", "in [0, 1], not 2.0"]),
])
def test_a_bad_flag_gets_one_sentence(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        common.cli(bert.main, bert.Args, flags.split())
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("bert.py: ") and text.count("\n") == 1
    assert all(word in text for word in words), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, words", [
    ("--fill the_statement", ["--fill has no <mask>", "put one where"]),
    ("--passage 13 --context 12", ["--passage 13 is more than --context 12", "take a shorter passage"]),
    ("--dim 30 --heads 4", ["30 channels cannot be divided among 4 heads"]),
    ("--labels 500", ["--labels 500 is too many"]),
])
def test_settings_that_do_not_fit_get_one_sentence(texts, tmp_path, flags, words):
    """Before the training, not after it; and nothing is left behind."""
    out = tmp_path / "run"
    refused(call("--data", texts, "--out", out, *SMALL, *flags.split(), script="bert.py"), 1, *words, script="bert.py")
    assert not out.exists()


def test_texts_that_will_not_do(texts, tmp_path):
    def refuse(content, *words, flags=()):
        (tmp_path / "x.txt").write_bytes(content)
        refused(call("--data", tmp_path / "x.txt", "--out", tmp_path / "run", *SMALL, *flags, script="bert.py"), 1, *words,
                script="bert.py")
    refuse(b"\n", "is empty")
    refuse(b"a few words " * 5, "--context 12 needs 10 in both", "longer text")
    refuse(b"caf\xe9 " * 500, "x of --data", "is not UTF-8 (byte 0xe9 at 3)", "save it as UTF-8", "gpt.py takes any bytes")
    refuse(b"some words " * 300, "--labels 50 is too many", flags=["--labels", "50"])
    refuse(b"some words " * 300, "--fill has 11 words and marks, and --context 12 holds 10",
           flags=["--fill", "<mask> " + "word " * 10])
    refuse(bytes(range(32, 127)), "no word of this text occurs twice", flags=["--context", "4", "--passage", "4"])
    rare = lambda a: b"one two three four " * 20 + b"".join(b"%d " % i for i in range(a, a + 30))
    refuse(rare(100) + rare(200), "has no word that the rest has twice", flags=["--classes", "2"])
    refuse(b"some words " * 60, "no 9 parts that are long enough", flags=["--classes", "9", "--context", "8", "--passage", "8"])


def test_words_of_fill_that_are_rare_are_said(texts, tmp_path, capsys):
    (tmp_path / "x.txt").write_text("".join(f"one two three {i} . " for i in range(500)))
    bert.main(settings(tmp_path / "x.txt", tmp_path / "run", fill="one <mask> elephant"))
    text = capsys.readouterr().out
    assert "Some words of --fill are not in the vocabulary" in text and "\none [1] [UNK]\n" in text


def test_a_text_of_unknown_words_is_no_success(tmp_path, capsys):
    """More than a third of the new text is [UNK]: it is said where the score stands, and in the table of all runs."""
    (tmp_path / "x.txt").write_text("".join(f"{i}a the {i}b {i}c of . " for i in range(900)))
    bert.main(settings(tmp_path / "x.txt", tmp_path / "run"))
    said = capsys.readouterr().out.replace("\n", " ")
    assert "Correct in new text: 50 % of the new text is [UNK], so this says little: " in said
    assert json.loads((tmp_path / "run/result.json").read_text())["summary"].startswith("50 % of the new text is [UNK]")
