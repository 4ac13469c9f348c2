"""Published weights and tokenizers: files as they lie on a model hub, written here from their layout."""
import argparse
import json
import os
import random
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import refused, run
from test_bert import published_names
from torch import nn

import bert
import common
import flamingo
import gpt
import lora
import mae
import simclr
from common import UserError


def safetensors(path, state, pad=0):
    """Writes a .safetensors file; pad: blanks after the header, so that numbers lie on odd places."""
    names = {v: k for k, v in common.DTYPES.items()}
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, x in state.items():
        part = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = dict(dtype=names[x.dtype], shape=list(x.shape), data_offsets=[len(raw), len(raw) + len(part)])
        raw += part
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw)
    return path


# -------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_safetensors_of_every_type(pad, tmp_path):
    state = {str(dtype): torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype) for dtype in common.DTYPES.values()}
    state |= dict(scalar=torch.tensor(2.5), none=torch.zeros(0, 4), random=torch.randn(5, 7).bfloat16())
    found = common.read_safetensors(safetensors(tmp_path / "x.safetensors", state, pad))
    assert found.keys() == state.keys()
    for name, x in state.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape and torch.equal(found[name], x), name


def test_broken_safetensors_name_the_first_tensor(tmp_path):
    path = safetensors(tmp_path / "x.safetensors", dict(a=torch.zeros(3), b=torch.zeros(2, 2)))
    raw, refuse = path.read_bytes(), lambda words: pytest.raises(UserError, match=words)
    for cut in 0, 5, 20:
        path.write_bytes(raw[:cut])
        with refuse("truncated or no .safetensors"):
            common.read_safetensors(path)
    path.write_bytes(raw[:-4])
    with refuse("broken at the tensor b"):
        common.read_safetensors(path)
    for text, words in ((b"[1]", "no .safetensors"), (b"garbage", "no .safetensors"), (b'{"a": 1}', "at the tensor a"),
                        (b'{"c": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "at the tensor c"),
                        (b'{"c": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}', "at the tensor c"),
                        (b'{"c": {"dtype": "F8", "shape": [1], "data_offsets": [0, 1]}}', "at the tensor c"),
                        (b'{"c": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}', "broken at the tensor c"),
                        (b'{"c": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}', "at the tensor c"),
                        (b'{"c": {"dtype": "F32", "shape": [2000000000, "x"], "data_offsets": [0, 4]}}', "at the tensor c"),
                        (b'{"c": {"dtype": "F32", "shape": [99999999999999999999], "data_offsets": [0, 4]}}', "at the tensor c"),
                        (b'{"c": {"dtype": "F32", "shape": [99999999], "data_offsets": [0, 399999996]}}', "at the tensor c")):
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
        with refuse(words):
            common.read_safetensors(path)
    path.write_bytes(struct.pack("<Q", 2 ** 63) + raw)
    with refuse("no .safetensors"):
        common.read_safetensors(path)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_weights_of_a_folder_or_a_file(tmp_path):
    a, b = dict(x=torch.ones(2)), dict(y=torch.zeros(3))
    torch.save({"model": a, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    assert torch.equal(common.read_weights(tmp_path / "a.pth", "")[0]["x"], a["x"])
    torch.save({"state_dict": b}, tmp_path / "b.pt")
    assert common.read_weights(tmp_path / "b.pt", "")[0].keys() == {"y"}
    hub = tmp_path / "hub"
    hub.mkdir()
    with pytest.raises(UserError, match="--weights .*hub holds no weights. Fetch such a file"):
        common.read_weights(hub, "such a file")
    torch.save(b, hub / "pytorch_model.bin")
    assert common.read_weights(hub, "") [0].keys() == {"y"}
    safetensors(hub / "model-00001-of-00002.safetensors", a), safetensors(hub / "model-00002-of-00002.safetensors", b)
    (hub / "config.json").write_text('{"n_head": 3}')
    state, config = common.read_weights(hub, "")
    assert state.keys() == {"x", "y"} and config == {"n_head": 3}
    torch.save(a, tmp_path / "c.pt")
    with pytest.raises(UserError, match="holds several models: give one, such as .*b.pt"):
        common.read_weights(tmp_path, "")
    (hub / "config.json").write_text("[1, 2")
    with pytest.raises(UserError, match="config.json cannot be read"):
        common.read_weights(hub, "")
    torch.save({"model": Evil(tmp_path / "made")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="evil.pth: it holds code, which is not executed"):
        common.read_weights(tmp_path / "evil.pth", "")
    assert not (tmp_path / "made").exists()
    (tmp_path / "cut.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:300])
    with pytest.raises(UserError, match="truncated or was not written by torch.save"):
        common.read_weights(tmp_path / "cut.pth", "")
    for i, other in enumerate(([1, 2], {}, {1: torch.zeros(2)}, {"x": "y"})):
        torch.save(other, tmp_path / f"{i}.pth")
        with pytest.raises(UserError, match="holds no table of tensors"):
            common.read_weights(tmp_path / f"{i}.pth", "")
    torch.save({"model": "resnet18", "state_dict": a}, tmp_path / "named.pth")
    assert common.read_weights(tmp_path / "named.pth", "")[0].keys() == {"x"}


# --------------------------------------------------------------------------------- tokenizers


MERGES = ["t h", "th e", "Ġ the", "Ġ q", "i n", "Ġ t", "q u", "Ġq u", "1 2", "Ċ Ċ", "a b", "b c", "Ġ a"]


def signs():
    """GPT-2's characters for bytes, by their definition: those that print stand for themselves, the others from 256 on."""
    table, n = {}, 0
    for b in range(256):
        shown = 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255
        table[b] = chr(b) if shown else chr(256 + n)
        n += not shown
    return table


def bpe_folder(folder, names=("vocab.json", "merges.txt")):
    """A tokenizer of 256 bytes and a few merges, in GPT-2's two files."""
    folder.mkdir(exist_ok=True)
    tokens = [*signs().values(), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    vocab = {token: (7 * i + 3) % len(tokens) for i, token in enumerate(tokens)}               # in no order
    (folder / names[0]).write_text(json.dumps(vocab)), (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return vocab


def by_hand(vocab, word):
    """The tokens of a word, by the definition: of all pairs the one of the lowest rank, everywhere, until none is left."""
    parts = [signs()[b] for b in word.encode()]
    for merge in [tuple(m.split(" ")) for m in MERGES for _ in range(1)] * len(MERGES):
        best = min((MERGES.index(f"{a} {b}") for a, b in zip(parts, parts[1:]) if f"{a} {b}" in MERGES), default=None)
        if best is None:
            break
        a, b = MERGES[best].split(" ")
        at = 0
        while at < len(parts) - 1:
            if parts[at:at + 2] == [a, b]:
                parts[at:at + 2] = [a + b]
            at += 1
    return [vocab[part] for part in parts]


def test_words_of_gpt2():
    split = common.gpt2_words().findall
    assert split("I'll  go, they'Re 12ab!?\n\n  x") == ["I", "'ll", " ", " go", ",", " they", "'", "Re", " 12", "ab", "!?", "\n\n ", " x"]
    assert split("á\u0301 中文² \u2003x\x1f\x85 ") == ["á", "\u0301", " 中文", "²", " ", "\u2003", "x", "\x1f", "\x85 "]


def test_bpe_by_hand_and_back(tmp_path):
    vocab = bpe_folder(tmp_path / "a")
    tokens, rng = common.BPE.load(tmp_path / "a"), random.Random(0)
    assert tokens.vocab == len(vocab) and tokens.BOS == vocab["<|endoftext|>"] and tokens.sizes[tokens.BOS] == 0
    assert tokens.encode("the queen").tolist() == by_hand(vocab, "the") + by_hand(vocab, " queen")
    for _ in range(300):
        text = "".join(rng.choice("theqabc12 \n\tä中😀") for _ in range(rng.randint(0, 30)))
        ids = tokens.encode(text)
        assert ids.tolist() == [t for word in common.gpt2_words().findall(text) for t in by_hand(vocab, word)], text
        assert b"".join(tokens.bytes[i] for i in ids.tolist()) == text.encode() and tokens.sizes[ids].sum() == len(text.encode())
    stream = tokens.stream([b"the ab", b"12"])
    assert stream.dtype == torch.int32 and stream.tolist() == [tokens.BOS, *tokens.encode("the ab").tolist(), tokens.BOS, vocab["12"]]
    assert tokens.decode(tokens.encode("the\n\n中")) == "the\n\n中" and tokens.encode(b"\xff").tolist() == tokens.encode("\ufffd").tolist()


def test_files_of_bpe(tmp_path):
    vocab, text = bpe_folder(tmp_path / "a"), "in the queue abc"
    first = common.BPE.load(tmp_path / "a").encode(text)
    bpe_folder(tmp_path / "b", ("encoder.json", "vocab.bpe"))
    (tmp_path / "c").mkdir()
    for merges in MERGES, [merge.split(" ") for merge in MERGES]:
        (tmp_path / "c/tokenizer.json").write_text(json.dumps(dict(model=dict(vocab=vocab, merges=merges))))
        for name in "bc":
            assert torch.equal(common.BPE.load(tmp_path / name).encode(text), first)
    with pytest.raises(UserError, match="holds no tokenizer: fetch vocab.json and merges.txt"):
        common.BPE.load(tmp_path)
    for broken in "{", "[1]", '{"a": 1}', json.dumps({k: v for k, v in vocab.items() if k != "the"}):
        (tmp_path / "a/vocab.json").write_text(broken)
        with pytest.raises(UserError, match="do not hold GPT-2's byte pair encoding, or do not belong together"):
            common.BPE.load(tmp_path / "a")


PIECES = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "cafe", "!", "the", "##s", "中", "[", "]", "mask",
          "ship", "sails", "sea", "on", ".", "fox", "runs", "dog", "away", "and", "s"]


def wordpiece_folder(folder):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")


def test_wordpiece(tmp_path):
    wordpiece_folder(tmp_path / "a")
    words = common.WordPiece.load(tmp_path / "a")
    assert words.words[:5] == common.Words.SPECIAL and [PIECES[i] for i in words.published] == words.words
    pieces = lambda text, words=words: [words.words[t] for t in words.encode(text)]
    assert pieces("Unaffable CAFÉ!!\tthe中\u0000x") == ["un", "##aff", "##able", "cafe", "!", "!", "the", "中", "[UNK]"]
    assert pieces("cafe\u0301 the\u200ds [MASK] " + "un" * 51) == ["cafe", "the", "##s", "[", "mask", "]", "[UNK]"]
    assert words.join(pieces("unaffable cafés.")) == "unaffable cafes." and words.encode(" \n").tolist() == []
    (tmp_path / "a/tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert pieces("The the", common.WordPiece.load(tmp_path / "a")) == ["[UNK]", "the"]
    (tmp_path / "b").mkdir()
    spec = dict(model=dict(type="WordPiece", vocab={p: i for i, p in enumerate(PIECES)}), normalizer=dict(lowercase=True))
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(spec))
    assert torch.equal(common.WordPiece.load(tmp_path / "b").published, words.published)
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(spec | dict(model=dict(type="BPE"))))
    with pytest.raises(UserError, match="is no WordPiece vocabulary"):
        common.WordPiece.load(tmp_path / "b")
    for text in "{", "[]", '{"model": {"type": "WordPiece", "vocab": {"a": 0}}, "normalizer": {"lowercase": true}}':
        (tmp_path / "b/tokenizer.json").write_text(text)
        with pytest.raises(UserError, match="does not hold BERT's vocabulary"):
            common.WordPiece.load(tmp_path / "b")
    with pytest.raises(UserError, match="holds no tokenizer: fetch vocab.txt"):
        common.WordPiece.load(tmp_path)


# ------------------------------------------------------------------------------------ scripts


def random_weights(model):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=.2)
    return model.eval()


def transformers_gpt2(model):
    """Our GPT's tensors as transformers saves them."""
    state = {}
    for name, x in model.state_dict().items():
        for a, b in (("token_embed", "wte"), ("pos_embed", "wpe"), ("blocks", "h"), ("norm1", "ln_1"), ("norm2", "ln_2"), ("qkv", "c_attn"),
                     ("proj", "c_proj"), ("fc1", "c_fc"), ("fc2", "c_proj")):
            name = name.replace(a, b)
        name = name.replace("norm.", "ln_f.") if name.startswith("norm.") else name
        state[f"transformer.{name}"] = x.T.contiguous() if x.ndim == 2 and name.startswith("h") else x
    state["lm_head.weight"] = state["transformer.wte.weight"]
    state["transformer.h.0.attn.bias"], state["transformer.h.0.attn.masked_bias"] = torch.ones(1, 1, 40, 40).tril(), torch.tensor(-1e4)
    return state


@pytest.fixture
def gpt2(tmp_path):
    vocab = bpe_folder(tmp_path / "gpt2")
    model = random_weights(gpt.GPT(len(vocab), 48, 24, 2, 3))
    safetensors(tmp_path / "gpt2/model.safetensors", transformers_gpt2(model))
    (tmp_path / "gpt2/config.json").write_text('{"n_head": 3}')
    return model, tmp_path / "gpt2"


def test_gpt2_loads_writes_and_trains(gpt2, tmp_path):
    model, folder = gpt2
    args = common.resolve(gpt.Args(weights=str(folder), device="cpu"))
    found, tokens = gpt.load_gpt2(args, args.weights)
    assert (found.norm.weight.numel(), len(found.blocks), found.blocks[0].attn.heads) == (24, 2, 3)
    x = torch.randint(tokens.vocab, (2, 40))
    assert torch.equal(found.eval()(x), model(x))
    safetensors(folder / "model.safetensors", {k.removeprefix("transformer."): v for k, v in transformers_gpt2(model).items()})
    assert torch.equal(gpt.load_gpt2(args, args.weights)[0].eval()(x), model(x))                  # without the prefix
    out = tmp_path / "run"
    flags = ["--weights", folder, "--device", "cpu", "--out", out, "--prompt", "the queen", "--length", 6, "--temperature", 0]
    done = run(*flags, script="gpt.py")
    new = gpt.sample_text(model, tokens.encode("the queen"), 6, tokens.BOS, stop=tokens.BOS, temperature=0)
    text = tokens.decode(torch.cat([tokens.encode("the queen"), new]))
    assert done.returncode == 0 and text in done.stdout and "--steps 0" in done.stdout and not out.exists(), done.stderr
    refused(run(*flags, "--steps", 2, script="gpt.py"), 1, "--steps trains --weights on a text: give its --data, too", script="gpt.py")
    (tmp_path / "x.txt").write_text("in the queue abc 12 \n\n" * 99)
    done = run(*flags, "--data", tmp_path / "x.txt", "--steps", 2, "--context", 12, script="gpt.py")
    assert done.returncode == 0 and f"uniform guess {np.log(tokens.vocab):.3f}" in done.stdout, done.stderr
    figures = json.loads((out / "result.json").read_text())["figures"]
    val = tokens.stream([b"in the queue abc 12 \n\n" * 99])[-100:]
    assert abs(figures["bits"] * tokens.sizes[val.long()].float().mean() * np.log(2) / figures["loss"] - 1) < .15
    saved = common.read_checkpoint(out)
    assert saved["args"]["dim"] == 24 and saved["step"] == 2
    again = run("--resume", "--out", out, "--steps", 3, script="gpt.py")
    assert again.returncode == 0 and "Continuing from step 2" in again.stdout, again.stderr


def test_other_weights_are_refused(gpt2, tmp_path):
    model, folder = gpt2
    flags = ["--weights", folder, "--device", "cpu", "--out", tmp_path / "run"]
    state = transformers_gpt2(model)
    for change, words in ((lambda: state.pop("transformer.h.1.ln_1.bias"), "blocks.1.norm1.bias is missing there and (24,) here"),
                          (lambda: state.update({"transformer.h.1.ln_1.bias": torch.zeros(24), "extra": torch.zeros(2)}),
                           "extra is (2,) there and missing here"),
                          (lambda: state.update(extra=torch.zeros(2)) or state.pop("transformer.wpe.weight"), "is no GPT-2: fetch config.json, model.safetensors")):
        change()
        safetensors(folder / "model.safetensors", state)
        refused(run(*flags, script="gpt.py"), 1, words, script="gpt.py")
    state = transformers_gpt2(model) | {"lm_head.weight": torch.zeros(len(model.token_embed.weight), 24)}
    safetensors(folder / "model.safetensors", state)
    refused(run(*flags, script="gpt.py"), 1, "has its own lm_head.weight", script="gpt.py")
    refused(run("--base", folder, "--out", tmp_path / "run", script="lora.py"), 1, "has its own lm_head.weight", script="lora.py")
    refused(run("--data", "shapes", *flags, script="gpt.py"), 1, "--weights are of a text model, not for --data shapes", script="gpt.py")
    os.remove(folder / "model.safetensors")
    refused(run(*flags, script="gpt.py"), 1, "holds no weights. Fetch config.json, model.safetensors (548 MB)", "https://", script="gpt.py")
    assert not (tmp_path / "run").exists()


def test_bert_loads_fills_in_and_classifies(tmp_path):
    folder = tmp_path / "bert"
    wordpiece_folder(folder)
    words = common.WordPiece.load(folder)
    model = random_weights(bert.BERT(words.vocab, 20, 16, 2, 2))
    theirs = published_names(model)                               # with their order of the vocabulary
    order = words.published.argsort()
    for name in "bert.embeddings.word_embeddings.weight", "cls.predictions.bias":
        theirs[name] = theirs[name][order]
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x for name, x in theirs.items()}
    extra = {"bert.embeddings.position_ids": torch.arange(20)[None], "cls.seq_relationship.bias": torch.zeros(2),
             "cls.predictions.decoder.weight": theirs["bert.embeddings.word_embeddings.weight"]}
    (folder / "config.json").write_text('{"num_attention_heads": 2}')
    x, positions = torch.randint(5, words.vocab, (3, 9)), torch.tensor([[1, 4]] * 3)
    for state in theirs, old | extra:
        safetensors(folder / "model.safetensors", state)
        args = common.resolve(bert.Args(weights=str(folder), device="cpu"))
        found, _, able = bert.load_published(args)
        assert able and torch.equal(found.eval()(x, positions), model(x, positions)) and torch.equal(found.pool(x), model.pool(x))
    flags = ["--weights", folder, "--device", "cpu", "--out", tmp_path / "run"]
    done = run(*flags, "--fill", "the <mask> runs away.", script="bert.py")
    shown = bert.fill(args, model, words, *bert.parse_fill(bert.Args(fill="the <mask> runs away."), words))
    assert done.returncode == 0 and shown in done.stdout and "the [1] runs away." in shown, done.stderr
    for name, text in dict(sea="the ship sails on the sea . ", fox="the fox runs and the dog runs away . ").items():
        (tmp_path / f"{name}.txt").write_text(text * 60)
    (tmp_path / "texts").mkdir()
    for name in "sea.txt", "fox.txt":
        shutil.move(tmp_path / name, tmp_path / "texts" / name)
    small = ["--data", tmp_path / "texts", "--classes", 2, "--passage", 8, "--context", 12, "--labels", 1, "--tune-steps", 2]
    done = run(*flags, *small, "--steps", 2, script="bert.py")
    assert done.returncode == 0 and "of masked words" in done.stdout and "BERT, tune all" in done.stdout, done.stderr
    asked = run("--resume", "--steps", 0, "--out", tmp_path / "run", "--fill", "the <mask>", script="bert.py")
    assert asked.returncode == 0 and "the [1]" in asked.stdout, asked.stderr
    (folder / "config.json").unlink()
    refused(run(*flags[:4], script="bert.py"), 1, "has no config.json", script="bert.py")
    (folder / "config.json").write_text('{"num_attention_heads": 2}')
    encoder = {name.removeprefix("bert."): x for name, x in theirs.items() if not name.startswith("cls.") and "pooler" not in name}
    safetensors(folder / "model.safetensors", encoder)            # as sentence encoders come
    found, _, able = bert.load_published(common.resolve(bert.Args(weights=str(folder), device="cpu")))
    assert not able and torch.equal(found.eval().encode(x), model.encode(x))
    refused(run(*flags[:4], "--fill", "a <mask>", script="bert.py"), 1, "has no head for masked words", script="bert.py")
    done = run(*flags[:4], *small, "--out", tmp_path / "other", script="bert.py")
    assert done.returncode == 0 and "no head for masked words" in done.stdout and "BERT, tune all" in done.stdout, done.stderr


@pytest.mark.parametrize("broken, words", [
    (dict(decoder=True), "has its own cls.predictions.decoder.weight, and here it is tied to token_embed.weight"),
    (dict(words=torch.zeros(30, 16)), r"token_embed.weight is \(30, 16\) there and \(\d+, 16\) here"),
    (dict(kind="gpt"), "is no BERT: fetch config.json")])
def test_a_bert_that_does_not_fit_is_refused(broken, words, tmp_path):
    wordpiece_folder(tmp_path)
    state = published_names(random_weights(bert.BERT(len(PIECES), 20, 16, 2, 2)))
    if "decoder" in broken:
        state["cls.predictions.decoder.weight"] = torch.zeros_like(state["bert.embeddings.word_embeddings.weight"])
    if "words" in broken:
        state["bert.embeddings.word_embeddings.weight"] = broken["words"]
    safetensors(tmp_path / "model.safetensors", dict(x=torch.zeros(2)) if "kind" in broken else state)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    with pytest.raises(UserError, match=words):
        bert.load_published(common.resolve(bert.Args(weights=str(tmp_path), device="cpu")))


def test_eps_of_the_config_goes_into_the_layer_norms(gpt2):
    _, folder = gpt2
    args = common.resolve(gpt.Args(weights=str(folder), device="cpu"))
    for config, eps in ('{"n_head": 3}', 1e-5), ('{"n_head": 3, "layer_norm_epsilon": 0.25}', .25):
        (folder / "config.json").write_text(config)
        found, _ = gpt.load_gpt2(args, folder)
        assert {layer.eps for layer in found.modules() if isinstance(layer, nn.LayerNorm)} == {eps}


def test_examples_of_lines_and_of_pairs(gpt2, tmp_path):
    tokens = common.BPE.load(gpt2[1])
    ids, newline, none = lambda text: tokens.encode(text).tolist(), tokens.encode("\n").item(), -100
    texts = ["the\tqueen 12", "", "abc\tin the queue, and so on and on", "the " * 12 + "\tabc", "x\t "]
    for name, pairs in ("x.tsv", True), ("x.txt", False):
        rows = common.lines(lora.Args(data=name, example=10, device="cpu"), [text.encode() for text in texts], tokens)
        expected = []
        for text in texts:
            a, b = text.split("\t") if text else ("", "")
            given, counted = (ids(f"{a}\t"), ids(f"{b}\n")) if pairs else ([], ids(f"{text}\n"))
            x = [newline, *given, *counted][:11]
            if text.strip() and (b.strip() or not pairs) and len(given) < 10:
                target = [none, *[none] * len(given), *counted][:11]
                expected.append([x + [tokens.BOS] * (11 - len(x)), target + [none] * (11 - len(x))])
        assert rows.tolist() == expected and len(expected) == (2 if pairs else 4)
    assert common.in_a_row(rows[:1], tokens.BOS).tolist() == [newline, *ids(texts[0] + "\n")]
    with pytest.raises(UserError, match="line 2 of x.tsv has no tab"):
        common.lines(lora.Args(data="x.tsv"), [b"a\tb", b"a b"], common.Bytes())


def test_all_methods_adapt_a_gpt2(gpt2, tmp_path):
    """experiments/adapt.py --base gpt2/; what examples in the prompt take is counted in bytes, not in tokens."""
    (tmp_path / "x.txt").write_text("in the queue abc 12\n" * 99)
    flags = ["--base", gpt2[1], "--data", tmp_path / "x.txt", "--old", tmp_path / "x.txt", "--k", 1, 2, "--example", 8, "--device", "cpu"]
    done = run(*flags, "--repeats", 1, "--epochs", 1, "--out", tmp_path / "a.json", script="experiments/adapt.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "a.json").read_text())["figures"]["rows"]
    tokens = common.BPE.load(gpt2[1])
    x = torch.cat([tokens.encode("\n"), tokens.encode("in the queue abc 12\n")])[:9]               # a newline, and 8 tokens
    assert rows["in-context"]["2"]["bytes"] == [2 * len(tokens.decode(x).encode())] and len(tokens.decode(x).encode()) > 9


def test_lora_adapts_a_gpt2_and_gives_it_back(gpt2, tmp_path):
    model, folder = gpt2
    assert all(torch.equal(x, transformers_gpt2(model)[name]) for name, x in lora.publish(model).items())
    assert lora.publish(model).keys() == transformers_gpt2(model).keys() - {
        "lm_head.weight", "transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"}
    (tmp_path / "x.tsv").write_text("".join(f"queen {i}\tthe queue {i}\n" for i in range(60)))
    (tmp_path / "old.txt").write_text("in the queue abc 12 \n\n" * 99)
    flags = ["--base", folder, "--data", tmp_path / "x.tsv", "--old", tmp_path / "old.txt", "--k", 2, "--example", 14, "--device", "cpu"]
    done = run(*flags, "--epochs", 30, "--lr", .02, "--dtype", "float32", "--out", tmp_path / "run", script="lora.py")
    assert done.returncode == 0 and "--rank 4" in done.stdout, done.stderr
    rows = json.loads((tmp_path / "run/result.json").read_text())["figures"]["rows"]
    assert rows["lora"]["new"] < rows["the base"]["new"] - .3
    args = common.resolve(lora.Args(base=str(folder), data=str(tmp_path / "x.tsv"), example=14, k=2, device="cpu", dtype="float32"))
    tokens, (base, about) = common.BPE.load(folder), lora.load_base(args, args.base)
    assert torch.equal(base.pos_embed.weight, model.pos_embed.weight) and about["old"] == "pydocs"
    nats = []                                                       # by hand: of the last six lines, the second column alone
    for i in range(54, 60):
        given, new = tokens.encode(f"\nqueen {i}\t"), tokens.encode(f"the queue {i}\n")
        x = torch.cat([torch.tensor([tokens.BOS]), given, new])[:16]
        nats.append(-model(x[None, :-1])[0].log_softmax(1)[range(len(x) - 1), x[1:]][len(given):])
    assert torch.cat(nats).mean().item() == pytest.approx(rows["the base"]["new"], rel=1e-5)
    file = torch.load(tmp_path / "run/adapter.pt", weights_only=True)
    lora.load_adapter(lora.adapt(base, **file["adapter"]), file["tensors"])
    assert lora.losses(args, base, common.load_examples(args, tokens)[1], torch.zeros(1, 9), tokens.BOS)["new"] == rows["lora"]["new"]
    x = torch.randint(tokens.vocab, (2, 20))
    before = base(x)
    safetensors(folder / "model.safetensors", lora.publish(lora.merge_and_unload(base)))
    torch.testing.assert_close(gpt.load_gpt2(args, folder)[0].eval()(x), before, rtol=1e-4, atol=1e-4)
    refused(run(*flags, "--k", 99, "--out", tmp_path / "no", script="lora.py"), 1, "--k 99 is more than the 54 examples", script="lora.py")
    wordpiece_folder(folder), (folder / "vocab.json").unlink()
    refused(run(*flags, "--out", tmp_path / "no", script="lora.py"), 1, "holds no tokenizer: fetch vocab.json", script="lora.py")


def authors_mae(model, p=2):
    """Our MAE's tensors under the names of its authors."""
    state = {}
    for name, x in model.state_dict().items():
        name = name.removeprefix("encoder.")
        if name.startswith("patch_embed"):
            name = name.replace("patch_embed", "patch_embed.proj")
            x = x.view(-1, p, p, 3).permute(0, 3, 1, 2).contiguous() if x.ndim == 2 else x
        state[name] = x
    return state | dict(pos_embed=model.encoder.pos_embed, decoder_pos_embed=model.decoder_pos_embed)


def transformers_mae(state):
    """The same, as transformers saves them."""
    found = {}
    for name, x in state.items():
        for a, b in (("decoder_blocks", "decoder.decoder_layers"), ("blocks", "vit.encoder.layer"), ("norm1", "layernorm_before"),
                     ("norm2", "layernorm_after"), ("attn.proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
                     ("mlp.fc2", "output.dense"), ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection")):
            name = name.replace(a, b) if not (a == "blocks" and "decoder" in name) else name
        name = dict(cls_token="vit.embeddings.cls_token", pos_embed="vit.embeddings.position_embeddings").get(name, name)
        name = name.replace("norm.", "vit.layernorm.") if name.startswith("norm.") else name
        name = f"decoder.{name}" if name.startswith(("mask_token", "decoder_")) else name
        if "attn.qkv" in name:
            for part, y in zip(("query", "key", "value"), x.chunk(3)):
                found[name.replace("attn.qkv", f"attention.attention.{part}")] = y
        else:
            found[name] = x
    return found


def test_mae_loads_and_paints(tiny, tmp_path):
    model = random_weights(mae.MAE(8, 2, 16, 2, 2, 8, 1, 2))
    theirs = authors_mae(model)
    torch.save({"model": theirs}, tmp_path / "mae.pth")
    hub = tmp_path / "hub"
    hub.mkdir()
    safetensors(hub / "model.safetensors", transformers_mae(theirs))
    (hub / "config.json").write_text('{"num_attention_heads": 2, "decoder_num_attention_heads": 2}')
    for path in tmp_path / "mae.pth", hub:
        args = common.resolve(mae.Args(weights=str(path), device="cpu", image_size=8))
        found = mae.load_published(args, 8)
        assert (args.dim, args.depth, args.patch, args.decoder_dim, args.decoder_depth) == (16, 2, 2, 8, 1)
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in found.state_dict().items())
    newer = {}                                                      # as transformers 5 calls them in memory
    for name, x in transformers_mae(theirs).items():
        for a, b in (("vit.encoder.layer", "vit.layers"), ("attention.attention.query", "attention.q_proj"),
                     ("attention.attention.key", "attention.k_proj"), ("attention.attention.value", "attention.v_proj"),
                     ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2")):
            name = name.replace(a, b)
        newer[name] = x
    safetensors(hub / "model.safetensors", newer)
    found = mae.load_published(common.resolve(mae.Args(weights=str(hub), device="cpu", image_size=8)), 8)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in found.state_dict().items())
    flags = ["--weights", hub, "--data", tiny, "--image-size", 8, "--labels", 2, "--tune-steps", 2, "--device", "cpu"]
    done = run(*flags, "--out", tmp_path / "run", script="mae.py")
    assert done.returncode == 0 and (tmp_path / "run/reconstructions.png").exists() and "MAE, tune all" in done.stdout, done.stderr
    images = common.load_images(common.resolve(mae.Args(data=str(tiny), image_size=8, device="cpu")))
    images.imagenet()
    error = mae.reconstruct(common.resolve(mae.Args(out=str(tmp_path), patch=2, device="cpu", dtype="float32")), model, images)
    assert abs(json.loads((tmp_path / "run/result.json").read_text())["figures"]["error"] / error - 1) < .02
    encoder = {name: x for name, x in theirs.items() if "decoder" not in name and name != "mask_token"}
    torch.save(encoder, tmp_path / "encoder.pth")
    found = mae.load_published(common.resolve(mae.Args(weights=str(tmp_path / "encoder.pth"), device="cpu")), 8)
    assert torch.equal(found.encoder.blocks[1].attn.qkv.weight, model.encoder.blocks[1].attn.qkv.weight)
    refused(run("--weights", hub, "--out", tmp_path / "no"), 1, "--weights needs --data")
    torch.save(theirs | dict(pos_embed=torch.randn(1, 17, 16)), tmp_path / "vit.pth")
    refused(run("--weights", tmp_path / "vit.pth", "--data", tiny, "--out", tmp_path / "no"), 1, "is no MAE: its encoder.pos_embed is learned")
    torch.save({"x": torch.zeros(2)}, tmp_path / "x.pth")
    refused(run("--weights", tmp_path / "x.pth", "--data", tiny, "--out", tmp_path / "no"), 1, "is no MAE: fetch mae_visualize")


def test_published_models_join_in_flamingo(gpt2, tiny, tmp_path):
    """By way of runs without a step: GPT-2 with one more token for images, and MAE's ViT."""
    model, folder = gpt2
    (tmp_path / "x.txt").write_text("in the queue abc 12 \n\n" * 99)
    own = gpt.main(gpt.Args(weights=str(folder), data=str(tmp_path / "x.txt"), context=20, device="cpu", out=str(tmp_path / "gpt")))
    painter = random_weights(mae.MAE(8, 2, 16, 2, 1, 8, 1, 1))
    torch.save({"model": authors_mae(painter)}, tmp_path / "mae.pth")
    mae.main(mae.Args(weights=str(tmp_path / "mae.pth"), data=str(tiny), image_size=8, labels=(1,), tune="linear", device="cpu",
                      out=str(tmp_path / "mae")))
    args = flamingo.Args(device="cpu", context=44, image_size=8)
    lm, tokens = flamingo.load_lm(args, tmp_path / "gpt")
    vit, patch, statistics = flamingo.load_vit(args, tmp_path / "mae")
    V = own.token_embed.weight.shape[0]
    assert (tokens.image, tokens.vocab, len(lm.pos_embed.weight)) == (V, V + 1, 44)
    ids = tokens.encode("<end> <image> the queue <end> <image> abc")
    text = common.BPE.load(folder)
    assert ids == [text.BOS, V, *text.encode("the queue").tolist(), text.BOS, V, *text.encode("abc").tolist()]
    assert tokens.decode(ids).replace(" ", "") == "thequeueabc"
    torch.manual_seed(0)
    joined, x = flamingo.Flamingo(lm, vit, patch, tokens.image).eval(), text.encode("in the queue abc")[None]
    images = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(joined.encode(images), painter.encoder(mae.patchify(images, 2)))
    media = joined.project(joined.encode(images)[None])
    torch.testing.assert_close(joined(x, media)[..., :V], model(x))                        # gates at 0: the language model
    done = run("--base", tmp_path / "gpt", "--data", tmp_path / "x.txt", "--k", 2, "--example", 8, "--device", "cpu",
               "--out", tmp_path / "lora", script="lora.py")                              # its tokenizer goes with it
    assert done.returncode == 0 and torch.load(tmp_path / "lora/checkpoint.pt")["about"]["weights"] == str(folder), done.stderr


def test_a_resnet_loads_by_torchvisions_names(tiny, tmp_path, monkeypatch):
    model = random_weights(simclr.ResNet(18, 8, stem=7, classes=10))
    own = simclr.ResNet(18, 8, stem=7).eval()
    own.load_state_dict({name: x for name, x in model.state_dict().items() if "fc." not in name})
    for prefix in "", "module.", "module.encoder.", "backbone.":
        state = {prefix + name: x for name, x in model.state_dict().items() if prefix or "num_batches" not in name}
        torch.save({"state_dict": state}, tmp_path / "resnet.pth")
        args = common.resolve(simclr.Args(weights=str(tmp_path / "resnet.pth"), device="cpu"))
        found, x = simclr.load_published(args).eval(), torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(found.encoder(x), own(x), rtol=1e-4, atol=1e-5)
    assert (args.depth, args.width) == (18, 8)
    done = run("--weights", tmp_path / "resnet.pth", "--data", tiny, "--labels", 1, "--device", "cpu", "--out", tmp_path / "run", script="simclr.py")
    assert done.returncode == 0 and "published ResNet" in done.stdout and (tmp_path / "run/neighbours.png").exists(), done.stderr
    state = common.read_checkpoint(tmp_path / "run")                            # as README loads a model
    simclr.build(simclr.Args(**state["args"]), 32).load_state_dict(state["model"])
    encoders = []
    monkeypatch.setattr(common, "linear_probes", lambda args, images, found: encoders.append(found) or {name: [0.] for name in found})
    model = simclr.main(simclr.Args(weights=str(tmp_path / "resnet.pth"), data=str(tiny), labels=(1,), device="cpu", out=str(tmp_path / "b")))
    assert [*encoders[0]] == ["raw pixels", "untrained ResNet", "published ResNet"] and encoders[0]["published ResNet"] is model.encoder
    untrained = encoders[0]["untrained ResNet"]
    assert untrained.conv1.weight.shape == model.encoder.conv1.weight.shape and not untrained.training
    assert not any(torch.equal(a, b) for a, b in zip(untrained.parameters(), model.encoder.parameters()) if a.ndim > 1)


def test_the_base_of_a_run_on_gpt2_is_gpt2(gpt2, tmp_path):
    (tmp_path / "x.txt").write_text("in the queue abc 12\n" * 99)
    flags = ["--data", tmp_path / "x.txt", "--old", tmp_path / "x.txt", "--k", 2, "--example", 8, "--epochs", 1, "--device", "cpu"]
    for name, base in ("one", gpt2[1]), ("two", tmp_path / "one"):
        made = run(*flags, "--base", base, "--out", tmp_path / name, script="lora.py")
        assert made.returncode == 0, made.stderr
    a, b = (json.loads((tmp_path / name / "result.json").read_text())["figures"] for name in ("one", "two"))
    assert a["fingerprint"] == b["fingerprint"] and a["rows"]["the base"] == b["rows"]["the base"]
