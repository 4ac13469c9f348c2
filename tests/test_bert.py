"""bert.py against torch's own layer, an independent forward in the published layout, counts and loops."""
import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import refused, run
from torch import nn

import bert
import common
from bert import CLS, MASK, PAD, SEP, UNK

SMALL = ("--dim 16 --heads 2 --depth 1 --batch 4 --context 12 --passage 8 --classes 2 --labels 1 --draws 1 --tune-steps 2 "
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
    layer, real = encoder_layer(block), torch.arange(9) < torch.tensor([9, 5, 7, 1])[:, None]
    torch.testing.assert_close(block(x), layer(x), rtol=1e-9, atol=1e-9)
    ours, theirs = block(x, real=real), layer(x, src_key_padding_mask=~real)
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-9, atol=1e-9)
    at = torch.tensor([[3, 0], [1, 1], [6, 2], [0, 0]])
    torch.testing.assert_close(block(x, at, real), bert.take(block(x, real=real), at), rtol=1e-9, atol=1e-9)


def published_names(model):
    """Our tensors under the names of the published BERT; each has its one place, and nothing is cut or joined."""
    state = {}
    for name, value in model.state_dict().items():
        for a, b in [("token_embed", "embeddings.word_embeddings"), ("pos_embed", "embeddings.position_embeddings"),
                     ("segment_embed", "embeddings.token_type_embeddings"), ("blocks.", "encoder.layer."),
                     ("attn.proj", "attention.output.dense"), ("attn.", "attention.self."), ("norm1", "attention.output.LayerNorm"),
                     ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"), ("norm2", "output.LayerNorm"),
                     ("pooler.", "pooler.dense."), ("head_norm", "cls.predictions.transform.LayerNorm"),
                     ("head_bias", "cls.predictions.bias"), ("head.", "cls.predictions.transform.dense.")]:
            name = name.replace(a, b)
        name = f"embeddings.LayerNorm{name[4:]}" if name.startswith("norm.") else name
        state[name if name.startswith("cls.") else f"bert.{name}"] = value
    return state


def published(p, tokens, segment, heads):
    """BERT's forward from its paper, with the published names: logits at every token, and the pooled [CLS]."""
    norm = lambda x, n: F.layer_norm(x, x.shape[-1:], p[f"{n}.weight"], p[f"{n}.bias"], 1e-12)
    linear = lambda x, n: x @ p[f"{n}.weight"].T + p[f"{n}.bias"]
    gelu = lambda x: x * .5 * (1 + torch.erf(x / math.sqrt(2)))
    e = "bert.embeddings."
    x = p[e + "word_embeddings.weight"][tokens] + p[e + "position_embeddings.weight"][:tokens.shape[1]] \
        + p[e + "token_type_embeddings.weight"][segment]
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
    tokens, segment = torch.randint(40, (3, 12)), torch.randint(2, (3, 12))
    p, at = published_names(small), torch.tensor([[0, 5], [11, 2], [3, 3]])
    assert len(p) == 3 + 2 + 3 * 16 + 2 + 5                 # all but cls.seq_relationship, which guessed the next sentence
    zero = torch.zeros_like(segment)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    close(small.encode(tokens, segment=segment), published(p, tokens, segment, 3)[0])
    hidden, logits, pooled = published(p, tokens, zero, 3)
    close(small.encode(tokens), hidden)
    close(small((tokens, at)), bert.take(logits, at))
    close(small.pool(tokens), pooled)


def test_bert_base_has_its_110_million_parameters():
    with torch.device("meta"):
        model = bert.BERT(30522, 512, 768, 12, 12)
    count = sum(p.numel() for p in model.parameters())
    assert count - 768 ** 2 - 3 * 768 - 30522 == 109_482_240                    # the encoder, without the head for words


def test_padding_changes_nothing(small):
    x = torch.randint(5, 40, (2, 9))
    padded = F.pad(x, (0, 3), value=PAD)
    real, at = padded != PAD, torch.tensor([[1, 4], [2, 8]])
    torch.testing.assert_close(small((padded, at), real), small((x, at)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small.pool(padded, real), small.pool(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(small.pool(padded), small.pool(x), atol=1e-3)


def test_both_sides_are_seen(small):
    x, at = torch.randint(5, 40, (1, 12)), torch.tensor([[6]])
    before = small((x, at))
    for t in range(12):
        y = x.clone()
        y[0, t] = 5 + (y[0, t] - 4) % 35
        assert not torch.allclose(small((y, at)), before, atol=1e-4), t


def test_dropout_in_training_only(small):
    model = bert.BERT(40, 12, 24, 3, 3, dropout=.3)
    model.load_state_dict(small.state_dict())
    x = torch.randint(40, (2, 12)), torch.zeros(2, 1, dtype=torch.int64)
    assert torch.equal(model.eval()(x), small(x)) and not torch.equal(model.train()(x), model(x))


def test_gradients_reach_every_tensor_but_the_pooler():
    torch.manual_seed(0)
    model, x = bert.BERT(40, 12, 24, 2, 3), torch.randint(5, 40, (4, 12))
    masked, target = bert.mask(x, torch.arange(12).expand_as(x), 40)
    loss = bert.distance(model(masked), target)
    assert abs(loss - math.log(40)) < .2                                        # at chance
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("pooler"), name
        assert p.grad is None or name.endswith("key.bias") or p.grad.abs().max() > 0, name


# -------------------------------------------------------------------------------------- the mask


def plenty(keep=0., ratio=.15, group=None, n=1000, T=128):
    """100,000 words of text between special tokens, and what mask makes of them."""
    torch.manual_seed(1)
    x = torch.randint(5, 500, (n, T))
    x[:, 0], x[:, -1], x[:, 60], x[::3, 61] = CLS, SEP, UNK, SEP
    before = x.clone()
    group = torch.arange(T).expand_as(x) if group is None else group
    (tokens, places), target = bert.mask(x, group, 500, ratio, keep)
    assert torch.equal(x, before)                                               # the input is not changed
    hidden = torch.zeros_like(x, dtype=torch.bool)
    for row, at, t in zip(hidden, places, target):
        row[at[t >= 0]] = True
    return x, tokens, places, target, hidden


@pytest.mark.parametrize("keep", [0., .1])
def test_15_per_cent_are_hidden_80_show_as_mask_and_20_as_others(keep):
    x, tokens, places, target, hidden = plenty(keep)
    real = x >= 5
    n, m = int(real.sum()), int(hidden.sum())
    assert n > 1e5 and abs(m / n - .15) < 3 * math.sqrt(.15 * .85 / n)
    assert (hidden.sum(1) == (.15 * real.sum(1)).round()).all()                 # in each text as many as are due
    assert not (hidden & ~real).any() and torch.equal(tokens[~hidden], x[~hidden])   # special tokens, and the rest: as they were
    shown, was = tokens[hidden], x[hidden]
    near = lambda count, share: abs(int(count) / m - share) < 3 * math.sqrt(share * (1 - share) / m)
    assert near((shown == MASK).sum(), .8)
    others = shown[shown != MASK]
    assert others.min() >= 5 and near((shown == was).sum(), max(keep, 1e-9) + (.2 - keep) / 495)
    assert near(((shown != MASK) & (shown != was)).sum(), (.2 - keep) * 494 / 495)
    drawn = others if not keep else others[others != was[shown != MASK]]
    share = drawn.bincount(minlength=500)[5:].float()
    assert share.std() < 1.3 * math.sqrt(share.mean())                          # every word is drawn alike
    assert torch.equal(target[target >= 0], torch.cat([row[at[t >= 0]] for row, at, t in zip(x, places, target)]))


def test_every_word_is_hidden_alike():
    x, _, _, _, hidden = plenty()
    share = hidden.float().mean(0)[(x >= 5).all(0)]
    assert abs(share - .15).max() < 4.5 * math.sqrt(.15 * .85 / 1000)


def test_the_loss_at_the_masked_places_equals_the_one_computed_everywhere(small):
    torch.manual_seed(0)
    x = torch.randint(5, 40, (6, 12))
    x[:, 0], x[:, -1], x[2, 5:] = CLS, SEP, PAD                                  # one text is shorter, and owes less
    masked, target = bert.mask(x, torch.arange(12).expand_as(x), 40, ratio=.4)
    assert (target[2] >= 0).sum() == 2 and (target[0] >= 0).sum() == 4
    loss = bert.distance(small(masked, x != PAD), target)
    tokens, places = masked
    everywhere = torch.arange(12).expand_as(x)
    logits = small((tokens, everywhere), x != PAD)                              # every block and the head at all places
    nothing = bert.distance(torch.randn(2, 3, 40, requires_grad=True), torch.full((2, 3), -100))
    assert nothing == 0                                                         # a text of special tokens owes nothing
    label = torch.full_like(x, -100).scatter(1, places, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=-100))


def test_neighbours_of_a_group_are_hidden_together():
    torch.manual_seed(0)
    lengths = torch.tensor([3, 1, 2, 4, 1, 5, 2, 2])
    group = torch.arange(8).repeat_interleave(lengths).repeat(300, 6)           # numbers come back: neighbours count
    x = torch.randint(5, 500, group.shape)
    (tokens, places), target = bert.mask(x, group, 500, .15)
    hidden = torch.zeros_like(x, dtype=torch.bool).scatter_(1, places, True)
    number = F.pad(group[:, 1:] != group[:, :-1], (1, 0)).cumsum(1)
    for row in range(300):
        torn, kinds = 0, set()
        for g in range(48):
            i = (number[row] == g).nonzero().flatten()
            inside = hidden[row, i]
            if inside.any() and not inside.all():
                torn += 1
                assert inside[:int(inside.sum())].all()                         # the rest of the share, from its front
            if inside.all():
                shown = tokens[row, i]
                assert (shown == MASK).all() or (shown != MASK).all()           # one lot for all of it
        assert torn <= 1


def test_lengths_of_spans_are_a_geometric_distribution_cut_at_ten():
    torch.manual_seed(0)
    group = bert.spans(2000, 500)
    assert (group[:, 1:] - group[:, :-1]).unique().tolist() == [0, 1] and group[:, 0].max() == 0
    inner = torch.cat([row.bincount()[:-1] for row in group])                   # the last one is cut by the end
    share = torch.tensor([.2 * .8 ** (k - 1) for k in range(1, 11)], dtype=torch.float64)
    share /= share.sum()
    mean = (share * torch.arange(1, 11)).sum()
    assert abs(mean - 3.797) < 1e-3 and inner.max() == 10
    n, std = len(inner), math.sqrt((share * torch.arange(1, 11) ** 2).sum() - mean ** 2)
    assert n > 1e5 and abs(inner.double().mean() - mean) < 4 * std / math.sqrt(n) + .01
    seen = inner.bincount(minlength=11)[1:] / n
    assert (seen - share).abs().max() < 4 * math.sqrt(.25 / n) + .002
    x, tokens, places, target, hidden = plenty(group=bert.spans(1000, 128))     # and 15 % all the same
    assert abs(int(hidden.sum()) / int((x >= 5).sum()) - .15) < .0034


# ------------------------------------------------------------------------------------ information


def mutual(counts, sizes, words):
    """The definition, by recursion over every way to cut."""
    p = lambda part: math.log(counts[len(part)][part] / sizes[len(part)])
    def ways(part):
        yield p(part)
        for i in range(1, len(part)):
            for rest in ways(part[i:]):
                yield p(part[:i]) + rest
    return p(words) - max(p(words[:i]) + rest for i in range(1, len(words)) for rest in ways(words[i:]))


def test_information_equals_its_definition():
    torch.manual_seed(0)
    text = torch.randint(5, 9, (60,)).tolist() + [11, 12, 13] * 4 + torch.randint(5, 9, (30,)).tolist()
    counts, sizes = {}, {}
    for n in range(1, 6):
        grams = [tuple(text[i:i + n]) for i in range(len(text) - n + 1)]
        counts[n], sizes[n] = {g: grams.count(g) for g in grams}, len(grams)
    found = bert.information(torch.tensor(text), 5)
    for n in range(2, 6):
        pmi, count = found[n]
        for i in range(len(text) - n + 1):
            g = tuple(text[i:i + n])
            assert count[i] == counts[n][g] and abs(pmi[i] - mutual(counts, sizes, g)) < 1e-4, (n, i)


def test_phrases_are_found_and_the_longest_wins():
    torch.manual_seed(0)
    noise = lambda: torch.randint(5, 60, (9,)).tolist()
    text = sum((noise() + [70, 71, 72] for _ in range(40)), []) + sum((noise() + [80, 81, SEP, 82, 83] for _ in range(30)), [])
    group = bert.phrases(torch.tensor(text), least=10, nats=2.)
    assert len(group) == len(text)
    together = lambda i, n: len(set(group[i:i + n].tolist())) == 1
    for i, t in enumerate(text):
        if t == 70:
            assert together(i, 3) and group[i - 1] != group[i] != group[i + 3]
        if t == 80:
            assert together(i, 2) and not together(i + 1, 2) and not together(i + 2, 2) and together(i + 3, 2)
    rare = bert.phrases(torch.tensor(text), least=41, nats=2.)
    assert len(rare.unique()) == len(text)                                      # nothing is seen so often
    assert len(bert.phrases(torch.tensor(text), least=10, nats=50.).unique()) == len(text)


# ------------------------------------------------------------------------------------------ look


def words_of(texts):
    text = common.load_text(str(texts), parts=2)
    return text, common.Words.of(text.train, 100)


def settings(texts, tmp_path, **more):
    return bert.Args(**dict(data=str(texts), context=12, passage=8, classes=2, dim=16, depth=2, heads=2, dropout=0.,
                            device="cpu", dtype="float32", out=str(tmp_path)) | more)


def test_special_tokens_are_the_first_of_the_vocabulary(texts):
    _, words = words_of(texts)
    names = [words.words[i] for i in (PAD, UNK, CLS, SEP, MASK)]
    assert names == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and bert.SPECIAL == range(5)


def test_windows_and_groups(texts, tmp_path):
    text, words = words_of(texts)
    args = settings(texts, tmp_path)
    train, val = bert.windows(args, words, text)
    assert train.shape[1:] == (2, 10) and val.shape[1:] == (10,)
    assert words.decode(train[1, 0]) == "the quick brown fox jumps over the lazy dog and" and train[0, 0, 0] == SEP
    assert torch.equal(train[5, 0], train[4, 0].roll(-1).index_copy(0, torch.tensor([9]), train[5, 0, 9:]))
    x, group = bert.grouped(args, train[:4])
    assert (x[:, 0] == CLS).all() and (x[:, -1] == SEP).all() and torch.equal(x[:, 1:-1], train[:4, 0])
    assert (group[:, 1:] != group[:, :-1]).all()                                # each word alone
    torch.manual_seed(0)
    spans = bert.grouped(settings(texts, tmp_path, strategy="span"), train[:4])[1]
    torch.manual_seed(0)
    assert torch.equal(spans, bert.spans(4, 12))
    args = settings(texts, tmp_path, strategy="pmi")
    train, _ = bert.windows(args, words, text)
    group = bert.grouped(args, train[:4])[1]
    assert torch.equal(group[:, 1:-1], bert.phrases(bert.stream(words, text.train)).unfold(0, 10, 1)[:4])
    assert (group[:, 0] == -1).all()


def test_evaluation_by_hand(texts, tmp_path):
    """A model that gives every word the logarithm of its share in the training text scores as the baseline does."""
    text, words = words_of(texts)
    args = settings(texts, tmp_path)
    train, val = bert.windows(args, words, text)
    stream = bert.stream(words, text.train)
    model = bert.BERT(words.vocab, 12, 16, 1, 2)
    for p in model.parameters():
        nn.init.zeros_(p)
    count = 1. + torch.tensor([sum(stream == i) * (i >= 5) for i in range(words.vocab)])
    model.head_bias.data = (count / count.sum()).log()
    (right, perplexity), (usual, chance) = bert.evaluate(args, model, stream, val)
    assert right == pytest.approx(usual) and perplexity == pytest.approx(chance, rel=1e-4)
    assert 1 < chance < words.vocab and 0 < usual < 50
    again = bert.evaluate(args, model, stream, val)
    assert again[0] == (right, perplexity)                                      # the same words are hidden
    model = bert.BERT(words.vocab, 12, 16, 1, 2).eval()                         # which words show is the same, too: no --keep may help
    kept = settings(texts, tmp_path, keep=.2)
    assert kept.keep == .2 and bert.evaluate(kept, model, stream, val) == bert.evaluate(args, model, stream, val)


def test_a_model_learns_to_fill_in(texts, tmp_path):
    text, words = words_of(texts)
    args = settings(texts, tmp_path, fill="the quick <mask> fox jumps <mask> the lazy dog")
    train, val = bert.windows(args, words, text)
    torch.manual_seed(0)
    model = bert.BERT(words.vocab, 12, 32, 2, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(600):
        x, group = bert.grouped(args, train[torch.randint(len(train), (32,))])
        masked, target = bert.mask(x, group, words.vocab, .15)
        loss = bert.distance(model(masked), target)
        loss.backward(), optimizer.step(), optimizer.zero_grad()
    tokens, places = bert.own(args, words)
    assert tokens[places].tolist() == [MASK, MASK] and places.tolist() == [2, 5]
    lines = bert.fill(args, model.eval(), words, tokens, places).splitlines()
    assert lines[0] == "the quick [1] fox jumps [2] the lazy dog"
    assert lines[1].split()[:2] == ["[1]", "brown"] and lines[2].split()[:2] == ["[2]", "over"]
    (right, perplexity), (usual, chance) = bert.evaluate(args, model, bert.stream(words, text.train), val)
    assert right > 40 > usual + 20 and perplexity < chance / 2


def test_sentences_are_of_plain_known_words(texts):
    text, words = words_of(texts)
    stream = bert.stream(words, text.train)
    found = bert.sentences(words, stream, 3, 1, 14)
    assert len(found) == 3
    for tokens, places in found:
        assert words.decode(tokens) == "the quick brown fox jumps over the lazy dog and runs." and len(places) == 2
        assert places.max() < len(tokens) - 1                                   # the full stop is no riddle
    assert [t.tolist() for t, _ in bert.sentences(words, stream, 3, 1, 14)] == [t.tolist() for t, _ in found]


def test_passages_and_what_is_tuned(texts, tmp_path, monkeypatch):
    text, words = words_of(texts)
    args = settings(texts, tmp_path, tune_steps=100, tune_lr=3e-3)
    data = bert.Passages(args, words, text)
    assert data.names == ["sea.txt", "fox.txt"] and data.train.shape[1] == 8
    sea = set(words.encode("ship sails sea clouds").tolist())
    for x, y in (data.train, data.labels), (data.test, data.test_labels):
        for row, label in zip(x, y):
            assert bool(sea & set(row.tolist())) == (label == 0) and row[0] == CLS and row[-1] == SEP
    torch.manual_seed(0)
    model, tuned = bert.BERT(words.vocab, 12, 16, 2, 2), []
    before = {k: v.clone() for k, v in model.state_dict().items()}
    finetune = common.finetune
    monkeypatch.setattr(common, "finetune", lambda f, *a, **k: (tuned.append(f), finetune(f, *a, **k))[1])
    for how in "last", "all":
        score = bert.tune(args, model, data, how, 10, 0)
        assert how == "last" or score > 70
        for name, value in before.items():
            assert torch.equal(model.state_dict()[name], value), name           # the original is left alone
            moves = not name.startswith("head") and (how == "all" or name.startswith(("blocks.1.", "pooler.")))
            if not name.endswith("key.bias"):                                   # the softmax does not see it
                assert torch.equal(tuned[-1].model.state_dict()[name], value) != moves, (how, name)


# -------------------------------------------------------------------------------------- the whole


def test_the_whole_script_and_a_look_without_training(texts, tmp_path):
    out = tmp_path / "run"
    done = run("--data", texts, "--steps", 30, "--out", out, *SMALL, "--fill", "the <mask> fox", script="bert.py")
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    figures = result["figures"]
    assert figures["blanks"][0].startswith("the [1] fox\n   [1]  ") and figures["blanks"][0] in done.stdout
    assert "it was:" in figures["blanks"][1] and len(figures["blanks"]) == 5
    assert f"{figures['masked']['accuracy']:.1f} % right" in done.stdout
    assert set(figures["accuracy"]) == {"bag of words, linear", "untrained, frozen [CLS]", "BERT, frozen [CLS]",
                                        "BERT, frozen mean of words", "untrained, tune last", "untrained, tune all",
                                        "BERT, tune last", "BERT, tune all"}
    again = run("--steps", 0, "--resume", "--out", out, "--fill", "<mask> dog", script="bert.py")
    assert again.returncode == 0 and "\n[1] dog\n" in again.stdout, again.stderr
    after = json.loads((out / "result.json").read_text())
    assert after["figures"]["masked"] == figures["masked"] and after["settings"]["steps"] == 30
    other = run("--steps", 0, "--resume", "--out", out, "--data", texts / "sea.txt", "--fill", "the quick <mask> fox", script="bert.py")
    assert "the quick [1] fox" in other.stdout, other.stderr                    # the words it was trained with, whatever the text


def test_both_models_are_evaluated_without_dropout(texts, tmp_path, monkeypatch):
    """The trained one and its untrained twin, which the training did not touch."""
    given, built, build = [], [], bert.build

    def kept(*args):
        model = build(*args)
        built.append(copy.deepcopy(model.state_dict()))
        return model
    monkeypatch.setattr(bert, "build", kept)

    def few_shot(args, model, untrained, data):
        given.extend([model, untrained])
        return {"nobody": [[0.] for _ in args.labels]}
    monkeypatch.setattr(bert, "few_shot", few_shot)
    monkeypatch.setattr("sys.argv", ["bert.py"])
    args = common.cli(bert.Args, list(map(str, ["--data", texts, "--steps", 3, "--out", tmp_path, *SMALL, "--dropout", .5])))
    bert.main(args)
    model, untrained = given
    x = torch.arange(5, 10)[None]
    for m in model, untrained:
        assert m.dropout == .5 and torch.equal(m.pool(x), m.pool(x))
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert len(built) == 2 and all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, built[1][name]) for name, value in untrained.state_dict().items())
    assert not torch.equal(model.token_embed.weight, built[0]["token_embed.weight"])


@pytest.mark.parametrize("strategy", ["span", "pmi"])
def test_strategies_run(texts, tmp_path, strategy):
    done = run("--data", texts, "--steps", 3, "--out", tmp_path, *SMALL, "--strategy", strategy, script="bert.py")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags, words", [
    ("--mask-ratio 1", ["--mask-ratio must be above 0 and below 1, not 1.0"]),
    ("--mask-ratio 0", ["some hidden"]),
    ("--keep .3", ["--keep must be from 0 to 0.2, not 0.3"]),
    ("--strategy all", ["--strategy", "token"]),
    ("--fill the_statement", ["--fill has no <mask>"]),
    ("--context 3", ["--context must be 4 or more, not 3"]),
    ("--passage 65 --context 64", ["--passage must be 3 or more, and at most --context 64, not 65"]),
    ("--vocab 5", ["--vocab must be 6 or more, not 5"]),
    ("--classes 1", ["--classes must be 2 or more"]),
    ("--dim 30 --heads 4", ["--dim must be a multiple of --heads 4, not 30"]),
    ("--labels 0", ["--labels must be 1 or more, not 0"]),
    ("--tune-lr -1", ["--tune-lr must be 0 or more, not -1.0"]),
    ("--tune-steps -5", ["--tune-steps must be 0 or more, not -5"]),
    ("--depth 0", ["--depth"]),
    ("--dropout -1", ["--dropout"]),
])
def test_a_bad_flag_gets_one_sentence(flags, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bert.py"])
    with pytest.raises(SystemExit) as stop:
        common.start(lambda args: None, bert.Args, flags.split())
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("bert.py: ") and text.count("\n") == 1
    assert all(word in text for word in words), text


def test_texts_that_will_not_do(texts, tmp_path):
    def refuse(content, *words, flags=()):
        (tmp_path / "x.txt").write_bytes(content)
        refused(run("--data", tmp_path / "x.txt", "--out", tmp_path / "run", *SMALL, *flags, script="bert.py"), 1, *words,
                script="bert.py")
    refuse(b"\n", "is empty")
    refuse(b"a few words " * 5, "--context 12 needs as many", "longer text")
    refuse(b"caf\xe9 " * 500, "x of --data", "is not UTF-8 (byte 0xe9 at 3)", "save it as UTF-8", "gpt.py takes any bytes")
    refuse(b"some words " * 300, "--labels 50 is too many", flags=["--labels", "50"])
    refuse(b"some words " * 300, "--fill has 11 words and signs, and --context 12 holds 10",
           flags=["--fill", "<mask> " + "word " * 10])
    refuse(bytes(range(32, 127)), "no word of this text occurs twice", flags=["--context", "4", "--passage", "4"])
    rare = lambda a: b"one two three four " * 20 + b"".join(b"%d " % i for i in range(a, a + 30))
    refuse(rare(100) + rare(200), "has no word that the rest has twice", flags=["--classes", "2"])
    refuse(b"some words " * 60, "no 9 parts that are long enough", flags=["--classes", "9", "--context", "8", "--passage", "8"])
