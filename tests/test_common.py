"""common.py: the shapes world, the readers, the settings, the schedule, the probe, the PNG."""
import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import signal
import struct
import sys
import tarfile
import threading
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, run
from torch import nn

import common
from common import UserError


# ------------------------------------------------------------------------------- the shapes world


def test_shapes_are_a_function_of_the_seed():
    (a, la), (b, lb), (c, _) = common.shapes(50, 3), common.shapes(50, 3), common.shapes(50, 4)
    assert a.shape == (50, 3, 32, 32) and a.dtype == torch.uint8
    assert torch.equal(a, b) and all(torch.equal(la[k], lb[k]) for k in la)
    assert not torch.equal(a, c)


def test_every_figure_has_the_area_of_its_disc():
    """Within 12 %, so that the amount of paint does not give the kind away; the edge is where d = 0."""
    n = len(common.SHAPES)
    black = torch.zeros(n, 3, 128, 128)
    ones = torch.ones(n)
    common.draw(black, torch.arange(n), torch.ones(n, 3), 20 * ones, 64 * ones, 64 * ones, .3 * ones)
    area = black[:, 0].sum((1, 2)) / (math.pi * 400)
    assert ((area - 1).abs() < .12).all(), dict(zip(common.SHAPES, area.tolist()))
    edge = torch.cat([black[:, :, 0], black[:, :, -1], black[..., 0], black[..., -1]], 2)
    assert edge.sum() == 0


def test_a_disc_is_anti_aliased_to_its_exact_area():
    canvas = common.draw(torch.zeros(1, 3, 32, 32), torch.tensor([0]), torch.ones(1, 3), torch.tensor([9.]),
                         torch.tensor([15.3]), torch.tensor([16.8]), torch.tensor([0.]))
    assert canvas[0, 0].sum().item() == pytest.approx(math.pi * 81, rel=.01)
    at = torch.arange(32) + .5
    x, y = (canvas[0, 0].sum(0) * at).sum() / canvas[0, 0].sum(), (canvas[0, 0].sum(1) * at).sum() / canvas[0, 0].sum()
    assert x.item() == pytest.approx(15.3, abs=.05) and y.item() == pytest.approx(16.8, abs=.05)


def test_turning_is_counter_clockwise():
    """A half disc lies above its straight side; a quarter turn brings it to the left of the centre."""
    half = torch.tensor([common.SHAPES.index("half")] * 2)
    two = lambda v: torch.full((2,), float(v))
    canvas = common.draw(torch.zeros(2, 3, 64, 64), half, torch.ones(2, 3), two(16), two(32), two(32),
                         torch.tensor([0., math.pi / 2]))[:, 0]
    assert canvas[0, 22].sum() > 0 and canvas[0, 42].sum() == 0          # reaches up, not down
    assert canvas[1, :, 22].sum() > 0 and canvas[1, :, 42].sum() == 0    # reaches left, not right


def test_attributes_are_balanced_and_independent():
    _, labels = common.shapes(5000, 0)
    for name, y in labels.items():
        share = y.bincount() / len(y)
        assert (share * len(share) - 1).abs().max() < .25, name
    for a in labels:
        for b in labels:
            if a != b:       # chi-squared of the contingency table stays near its degrees of freedom
                table = torch.zeros(int(labels[a].max()) + 1, int(labels[b].max()) + 1)
                table.index_put_((labels[a], labels[b]), torch.ones(5000), accumulate=True)
                due = table.sum(1, keepdim=True) * table.sum(0) / 5000
                freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
                assert ((table - due) ** 2 / due).sum() < freedom + 5 * (2 * freedom) ** .5, (a, b)


def test_what_is_easy_and_what_is_hard():
    """A linear probe on pixels reads the colour, and not the shape: honest work for a representation."""
    images = common.load_images("shapes")
    train, test = images.train[:3000].flatten(1).float(), images.test.flatten(1).float()
    got = {k: common.probe(train, images.train_labels[k][:3000], test, images.test_labels[k])
           for k in ("shape", "colour")}
    assert got["shape"] < 20 and got["colour"] > 90, got                 # chance: 10 and 12.5


# ------------------------------------------------------------------------------------- readers


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """The four IDX files, small."""
    r, arrays = np.random.default_rng(0), {}
    (tmp_path / "fashion-mnist").mkdir()
    for split, n in ("train", 30), ("t10k", 10):
        arrays[split] = r.integers(0, 256, (n, 28, 28), np.uint8), r.integers(0, 10, n, np.uint8)
        for kind, a in zip(("images-idx3", "labels-idx1"), arrays[split]):
            (tmp_path / f"fashion-mnist/{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(a)))
    return tmp_path, arrays


def test_idx(fashion):
    folder, arrays = fashion
    images = common.load_images("fashion-mnist", folder)
    assert images.names["class"][9] == "boot" and images.size == 28
    for split, x, y in ("train", images.train, images.train_labels), ("t10k", images.test, images.test_labels):
        assert x.shape[1:] == (3, 28, 28)
        assert all(np.array_equal(x[:, c], arrays[split][0]) for c in range(3))
        assert np.array_equal(y["class"], arrays[split][1])


def test_broken_idx(fashion):
    path = fashion[0] / "fashion-mnist/train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for broken in whole[:len(whole) // 2], gzip.compress(gzip.decompress(whole)[:-5]), b"", b"<html>":
        path.write_bytes(broken)
        with pytest.raises(UserError, match=f"{path.name} is (truncated or broken|not an IDX file)"):
            common.load_images("fashion-mnist", fashion[0])
    path.write_bytes(gzip.compress(idx(np.zeros(30, np.uint8))))
    with pytest.raises(UserError, match="not an IDX file of 3 dimensions"):
        common.load_images("fashion-mnist", fashion[0])


def test_cifar10_binary_archive(tmp_path):
    """A small archive in the official layout: 5 + 1 files of records <label><1024 R><1024 G><1024 B>."""
    r = np.random.default_rng(0)
    (tmp_path / "cifar10").mkdir()
    path, records = tmp_path / "cifar10/cifar-10-binary.tar.gz", {}
    with tarfile.open(path, "w:gz") as tar:
        for name in ["batches.meta.txt", "readme.html", "data_batch_4.bin", "data_batch_1.bin", "data_batch_2.bin",
                     "data_batch_3.bin", "data_batch_5.bin", "test_batch.bin"]:
            data = b"text"
            if name.endswith(".bin"):
                records[name] = np.concatenate([r.integers(0, 10, (4, 1)), r.integers(0, 256, (4, 3072))], 1)
                data = records[name].astype(np.uint8).tobytes()
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    images = common.load_images("cifar10", tmp_path)
    assert images.train.shape == (20, 3, 32, 32) and images.test.shape == (4, 3, 32, 32)
    assert images.names["class"][:2] == ["airplane", "automobile"]
    third = records["data_batch_3.bin"][1]                               # the tenth training image
    assert images.train_labels["class"][9] == third[0]
    assert images.train[9, 2, 5, 7] == third[1 + 2 * 1024 + 5 * 32 + 7]
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="truncated or not CIFAR-10's binary archive"):
        common.load_images("cifar10", tmp_path)


def test_npz(tmp_path):
    path, x, y = tmp_path / "x.npz", np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 3
    good = dict(x_train=x, y_train=y, x_test=x, y_test=y)
    np.savez(path, **good, classes=np.array(["a", "b", "c"]))
    assert common.load_images(str(path)).names == {"class": ["a", "b", "c"]}
    bad = [(dict(x=x, y=y), "holds x, y; due are x_train, y_train, x_test, y_test"),
           (good | dict(x_train=np.array([{}, "pickled"], object)), "it holds pickled objects"),
           (good | dict(x_train=x.astype(np.float32)), "float32 .* not square uint8 images"),
           (good | dict(x_train=x[:, :, :5]), r"\(6, 8, 5, 3\), not square"),
           (good | dict(y_train=y[:3]), "and y_train is int64 .3,.: one integer for each image"),
           (good | dict(y_test=y + 5), "labels of y_test reach from 5 to 7, but there are 3 classes"),
           (good | dict(y_train=0 * y, y_test=0 * y), "all training images are of one class"),
           (good | dict(x_test=np.zeros((6, 4, 4, 3), np.uint8)), "train and test differ in size")]
    for arrays, message in bad:
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=message):
            common.load_images(str(path))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="truncated or no .npz"):
        common.load_images(str(path))
    with pytest.raises(UserError, match="there is no file"):
        common.load_images(str(tmp_path / "none.npz"))


def test_no_such_data():
    with pytest.raises(UserError, match="there is no data set 'nowhere': --data takes fashion-mnist, "):
        common.load_images("nowhere")


def test_own_images_are_shuffled_with_their_labels(tmp_path):
    """In the same way each time: sorted by class, the first of them would be of one class."""
    y = np.repeat(np.arange(4), 50)
    x = np.broadcast_to(y[:, None, None].astype(np.uint8) * 50, (200, 8, 8))
    np.savez(tmp_path / "x.npz", x_train=x, y_train=y, x_test=x[::2], y_test=y[::2])
    first, again = (common.load_images(str(tmp_path / "x.npz")) for _ in range(2))
    for images, labels in (first.train, first.train_labels), (first.test, first.test_labels):
        assert torch.equal(images[:, 0, 0, 0].long(), 50 * labels["class"])
        assert (labels["class"][:40].bincount(minlength=4) > 2).all()
    assert torch.equal(first.train, again.train) and sorted(first.train_labels["class"].tolist()) == y.tolist()


def test_folder_of_pictures(tmp_path):
    Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    for c, grey in ("cat", 40), ("dog", 200):
        (tmp_path / c).mkdir()
        for i in range(5):
            Image.new("RGB", (20, 12), (grey, grey, grey)).save(tmp_path / c / f"{i}.png")
    images = common.load_images(str(tmp_path), size=8)
    assert images.train.shape == (8, 3, 8, 8) and images.names == {"class": ["cat", "dog"]}
    assert dict(zip(images.test[:, 0, 4, 4].tolist(), images.test_labels["class"].tolist())) == {40: 0, 200: 1}
    (tmp_path / "dog/3.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="cannot read the picture .*dog/3.png"):
        common.load_images(str(tmp_path), size=8)


def test_folder_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(UserError, match="pip install pillow"):
        common.load_images(str(tmp_path))


@pytest.mark.skipif(not (DATA / "fashion-mnist").exists(), reason="no Fashion-MNIST at hand")
def test_the_real_fashion_mnist():
    for file in (DATA / "fashion-mnist").glob("*.gz"):
        digest = hashlib.sha256(gzip.decompress(file.read_bytes())).hexdigest()
        assert digest == common.SHA256["fashion-mnist"][file.name]
    images = common.load_images("fashion-mnist", DATA)
    assert images.train.shape == (60000, 3, 28, 28) and images.test.shape == (10000, 3, 28, 28)
    assert images.train_labels["class"].bincount().tolist() == [6000] * 10
    x = images.normalize(images.train[:5000])
    assert x.mean().abs() < 1e-3 and abs(x.std() - 1) < 1e-3
    torch.testing.assert_close(images.denormalize(x[:9]), images.train[:9] / 255)


# ------------------------------------------------------------------------------------------ text


def test_the_manual_has_no_paragraph_twice_and_no_tables():
    text = common.load_text("pydocs")
    assert len(text.names) > 50 and sum(map(len, text.train)) > 200_000
    seen = set()
    for raw in map(bytes.__add__, text.train, text.val):
        parts = [part for part in raw.decode().split("\n\n") if len(part) > 40]
        assert not seen & set(parts) and not any(part.startswith(("+--", "|")) for part in parts)
        seen.update(parts)
    assert any("The \"assert\" statement" in raw.decode() or "assert_stmt" in raw.decode() for raw in text.train)


def test_nine_tenths_of_each_document_are_for_training(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"0123456789" * 3)
    (tmp_path / "sub/a.txt").write_bytes(b"x" * 17 + "\N{EURO SIGN}".encode() + b"y")      # 9/10 fall into the sign
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / "other.md").write_bytes(b"not this one")
    text = common.load_text(str(tmp_path))
    assert text.names == ["b.txt", "sub/a.txt"]
    assert text.train == [b"0123456789" * 2 + b"0123456", b"x" * 17 + "\N{EURO SIGN}".encode()]
    assert text.val == [b"789", b"y"]
    one = common.load_text(str(tmp_path / "other.md"))
    assert (one.names, one.train, one.val) == (["other"], [b"not this o"], [b"ne"])
    parts = common.load_text(str(tmp_path / "b.txt"), parts=3)
    assert parts.names == ["part 1", "part 2", "part 3"] and parts.train == [b"012345678"] * 3 and parts.val == [b"9"] * 3


def test_the_source_of_the_standard_library():
    text = common.load_text("pycode")
    assert {"argparse", "textwrap", "json"} & set(text.names) >= {"argparse", "textwrap"}
    i = text.names.index("textwrap")
    assert text.train[i] + text.val[i] == open(__import__("textwrap").__file__, "rb").read()


def test_texts_that_cannot_be_had(tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_bytes(b"\n\n")
    (tmp_path / "none").mkdir()
    for name, words in ("no-such", ["there is no text 'no-such'", "--data takes pydocs, pycode"]), \
            ("", ["there is no text"]), (str(tmp_path / "empty.txt"), ["is empty"]), (str(tmp_path / "none"), ["holds no .txt file"]):
        with pytest.raises(UserError) as e:
            common.load_text(name)
        assert all(word in str(e.value) for word in words)
    monkeypatch.setitem(common.MIRRORS, "shakespeare", ["http://127.0.0.1:9/"])
    with pytest.raises(UserError, match="Put the file at .*tinyshakespeare.txt yourself.*--data pydocs"):
        common.load_text("shakespeare", tmp_path)
    monkeypatch.setattr(common.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    with pytest.raises(UserError, match="no source of its standard library"):
        common.load_text("pycode")


def test_shakespeare_is_read_from_the_data_folder(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"To be, or not to be.")
    text = common.load_text("shakespeare", tmp_path)
    assert text.train == [b"To be, or not to b"] and text.val == [b"e."]


def test_the_real_shakespeare():
    path = DATA / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("tinyshakespeare.txt is not here")
    text = common.load_text("shakespeare", DATA)
    assert (len(text.train[0]), len(text.val[0])) == (1_003_854, 111_540)                 # nanoGPT's split
    assert common.digests(path)[0] == common.SHA256["shakespeare"]["input.txt"]


def test_bytes():
    tokens = common.Bytes()
    assert tokens.encode("h\u00e9").tolist() == [104, 195, 169] == tokens.encode(b"h\xc3\xa9").tolist()
    assert tokens.decode(tokens.encode("na\u00efve \u20ac\n")) == "na\u00efve \u20ac\n"
    assert tokens.decode([256, 65, 195, 256, 27, 13, 10, 9]) == "A\ufffd\ufffd\n\t"                # BOS is no text, ESC would upset a terminal
    assert tokens.stream([b"ab", b"c"]).tolist() == [256, 97, 98, 256, 99] and tokens.vocab == 257


def test_words():
    documents = [b"The cat, the CAT and the dog. [MASK] [MASK] >>> >>>", b"the dog; a bird.\n"]
    words = common.Words.of(documents, 100)
    assert words.words[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert words.words[5:] == ["the", ".", ">>>", "[", "]", "cat", "dog", "mask"] and words.vocab == 13   # by count, then by letter
    assert words.encode("The bird. [MASK]").tolist() == [5, 1, 6, 8, 12, 9]               # a text cannot forge a special token
    assert common.Words.of(documents, 7).words[5:] == ["the", "."]
    text = "a (small) dog, well-known: it's 3.5 long, isn't it? and/or"
    assert common.Words.join(common.Words.split(text)) == text
    assert "\x1b" not in common.Words.join(["a", "\x1b"])
    with pytest.raises(UserError, match="no word of this text occurs twice"):
        common.Words.of([b"one two three"], 9)


def test_bert_needs_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    assert common.load_text(str(tmp_path)).names == ["a.txt", "b.txt"]
    with pytest.raises(UserError, match="b.txt of --data .* is not UTF-8 .byte 0xe9 at 3.*gpt.py takes any bytes"):
        common.load_text(str(tmp_path), utf8=True)


def test_what_is_hidden_is_no_text(tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/x.txt").write_bytes(b"not this")
    (tmp_path / "a.txt").write_bytes(b"this")
    assert common.load_text(str(tmp_path)).names == ["a"]


# ----------------------------------------------------------------------------------- downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A mirror on this machine, and a file that is due from it."""
    content, pages = b"what is due" * 1000, {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            self.wfile.write(pages.get(self.path, b""))

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{web.server_port}"
    monkeypatch.setitem(common.MIRRORS, "mnist", [f"{at}/first/", f"{at}/second/"])
    monkeypatch.setitem(common.SHA256["mnist"], "x.gz", hashlib.sha256(content).hexdigest())
    yield content, pages
    web.shutdown()


def test_a_download_is_checked_before_use(server, tmp_path, capfd):
    content, pages = server
    path = tmp_path / "mnist/x.gz"
    pages["/first/x.gz"] = content[:-1]
    with pytest.raises(UserError, match="not the SHA-256 that is due") as e:
        common.fetch("mnist", "x.gz", tmp_path)
    assert f"Put the file at {path} yourself" in str(e.value) and "--data shapes" in str(e.value)
    assert not list(path.parent.iterdir())                               # kept out of the cache, no rest
    pages["/second/x.gz"] = content                                      # the next mirror is asked
    assert common.fetch("mnist", "x.gz", tmp_path) == path and path.read_bytes() == content
    pages.clear()
    assert common.fetch("mnist", "x.gz", tmp_path) == path               # there already: no download


def test_a_file_that_was_compressed_anew_is_the_same_file(server, tmp_path):
    content, pages = server
    pages["/first/x.gz"] = gzip.compress(content, 1)
    assert gzip.decompress(common.fetch("mnist", "x.gz", tmp_path).read_bytes()) == content


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setitem(common.MIRRORS, "mnist", ["http://127.0.0.1:9/"])
    with pytest.raises(UserError) as e:
        common.load_images("mnist", tmp_path)
    for word in "train-images-idx3-ubyte.gz", "refused", f"Put the file at {tmp_path}", "--data shapes":
        assert word in str(e.value)


# ------------------------------------------------------------------------------------ settings


@dataclass
class Args(common.Args):
    rate: float = 0.5        # share of 100 % of it
    names: tuple[int, ...] = (1, 2)      # some numbers
    norm: bool = True
    cpu = dict(batch=7, rate=0.25)


def test_settings_and_their_order(capsys):
    args = common.cli(Args, "--lr 1 --no-norm --names 3 4 5 --device cpu".split())
    assert (args.lr, args.norm, args.names, args.batch, args.rate) == (1.0, False, (3, 4, 5), 7, .25)
    assert "--batch 7 --rate 0.25 (flags you give win)" in capsys.readouterr().out.replace("\n", " ")
    assert common.cli(Args, "--batch 9 --device cpu".split()).batch == 9


def test_help_is_the_comments(capsys):
    with pytest.raises(SystemExit) as e:
        common.cli(Args, ["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and max(map(len, text.splitlines())) <= 80
    assert "share of 100 % of it [0.5; on a CPU 0.25]" in text and "training steps [4000]" in text


def test_every_setting_of_every_script_has_a_help(scripts):
    for name in scripts:
        module = __import__(name.removesuffix(".py"))
        text = common.help_of(module.Args)
        for field in module.Args.__dataclass_fields__:
            assert text.get(field), f"{name}: --{field} has no comment"
        assert set(module.Args.cpu) <= set(module.Args.__dataclass_fields__)


# ------------------------------------------------------------------------------------ training


def test_schedule():
    lr = [common.schedule(s, 100, .1) for s in range(101)]
    assert lr[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert lr[10] == 1 and lr[55] == pytest.approx(.5) and lr[100] == pytest.approx(0)
    assert common.schedule(0, 1, 0) == 1 and common.schedule(0, 2, 1) == .5


def test_adamw_equals_the_published_update():
    """Two steps by hand (Loshchilov & Hutter 2019, algorithm 2); vectors do not decay."""
    w, b = nn.Parameter(torch.tensor([[2.]])), nn.Parameter(torch.tensor([2.]))
    optimizer = common.adamw([w, b], lr=.1, weight_decay=.5)
    theirs = {True: 2., False: 2.}
    m = v = 0.
    for t, g in enumerate([.3, -.2], 1):
        w.grad, b.grad = torch.tensor([[g]]), torch.tensor([g])
        optimizer.step()
        m, v = .9 * m + .1 * g, .95 * v + .05 * g * g
        move = .1 * (m / (1 - .9 ** t)) / ((v / (1 - .95 ** t)) ** .5 + 1e-8)
        theirs = {decays: x - (.1 * .5 * x if decays else 0) - move for decays, x in theirs.items()}
    assert w.item() == pytest.approx(theirs[True], rel=1e-5) and b.item() == pytest.approx(theirs[False], rel=1e-5)


def test_an_epoch_shows_every_example_once(tmp_path):
    args = common.Args(steps=20, batch=10, out=str(tmp_path), device="cpu", dtype="float32")
    model = nn.Linear(1, 1)
    run, seen = common.Run(args, model), []
    for step in run:
        x = run.batch(torch.arange(100.)[:, None])
        seen.append(x.flatten().tolist())
        run.update(model(x).square().mean() * 0)
    first, second = sum(seen[:10], []), sum(seen[10:], [])
    assert sorted(first) == sorted(second) == list(range(100)) and first != second


def test_clipping_and_the_learning_rate_of_a_step(tmp_path):
    args = common.Args(steps=4, batch=1, lr=.1, warmup=.5, clip=1., weight_decay=0., out=str(tmp_path),
                       device="cpu", dtype="float32")
    model = nn.Linear(1, 1, bias=False)
    run = common.Run(args, model, torch.optim.SGD(model.parameters(), 1.))
    for step in run:
        before = model.weight.item()
        run.update(1000 * model.weight.sum())                            # gradient 1000, cut to 1
        due = .1 * common.schedule(step, 4, .5)
        assert before - model.weight.item() == pytest.approx(due, rel=1e-3)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4] and log[0]["gradient"] == 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_computes_in_the_dtype_and_sees_new_weights(tmp_path, dtype):
    """Within a step bfloat16 copies of the weights are kept; after the update they must be new ones."""
    args = common.Args(steps=3, batch=1, lr=.5, warmup=0, out=str(tmp_path), device="cpu", dtype=dtype)
    model = nn.Linear(4, 4)
    run, x = common.Run(args, model), torch.ones(1, 4)
    for step in run:
        before = model(x)
        assert str(before.dtype) == f"torch.{dtype}"
        run.update(before.float().square().mean())
        after = F.linear(x, model.weight, model.bias)
        assert not torch.allclose(before.float(), after.float(), atol=.05)


def test_a_look_aside_leaves_no_trace_and_its_notes_survive_a_resume(tmp_path, monkeypatch):
    clock = [1000.]                                                      # a step takes 1 s, a look 10
    monkeypatch.setattr(common.time, "time", lambda: clock[0])

    def train(out, stop=None, resume=False, looks=True):
        args = common.Args(steps=8, batch=4, lr=.1, out=str(out), device="cpu", dtype="float32", resume=resume)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(.5))
        run, data = common.Run(args, model, chance=1.25), torch.arange(60.).view(20, 3) / 60
        try:
            for step in run:
                run.update(model(run.batch(data)).square().mean())
                clock[0] += 1
                if looks and step % 2:
                    with run.aside():
                        assert not model.training
                        torch.rand(step)                                 # uses up random numbers
                        clock[0] += 10
                        run.note(twice=2 * (step + 1))
                assert model.training
                run.stop = step == stop
        except KeyboardInterrupt:
            pass
        return run, model[0].weight.detach()

    run, whole = train(tmp_path / "a")
    assert run.seconds == 8                                              # the four looks do not count
    assert run.notes() == {i: {"twice": 2 * i} for i in (2, 4, 6, 8)}
    assert torch.equal(whole, train(tmp_path / "b", looks=False)[1])
    train(tmp_path / "c", stop=4)
    log = tmp_path / "c/log.jsonl"
    log.write_text(log.read_text() + json.dumps(dict(step=6, note="of a step that was lost")) + "\n")
    state = torch.load(tmp_path / "c/checkpoint.pt", weights_only=True)
    assert state["step"] == 5
    run, resumed = train(tmp_path / "c", resume=True)
    assert torch.equal(whole, resumed) and run.notes() == {i: {"twice": 2 * i} for i in (2, 4, 6, 8)}
    assert "(chance 1.250)" in run.words()


def test_what_comes_after_the_last_step_is_the_same_when_a_run_is_resumed(tmp_path):
    """The weights of another network, say: of a run stopped before its end, and of one that had ended."""
    def after(out, stop=None, resume=False, **changed):
        args = common.Args(**dict(steps=6, batch=4, lr=.1, out=str(out), device="cpu", dtype="float32", resume=resume) | changed)
        torch.manual_seed(args.seed)
        model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(.5))
        run, data = common.Run(args, model), torch.arange(60.).view(20, 3) / 60
        try:
            for step in run:
                run.update(model(run.batch(data)).square().mean())
                run.stop = step == stop
        except KeyboardInterrupt:
            return None
        return torch.rand(5).tolist(), run

    whole, _ = after(tmp_path / "a")
    assert after(tmp_path / "b", stop=3) is None
    assert after(tmp_path / "b", resume=True)[0] == whole
    again, run = after(tmp_path / "a", resume=True, weight_decay=.25)
    assert again == whole
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [.25, 0]     # the flag that is given now wins


def test_ctrl_c_offers_to_go_on_with_this_run_not_with_an_older_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mae.py"])
    path = tmp_path / "checkpoint.pt"

    def stopped(main, *flags):
        with pytest.raises(SystemExit) as end:
            common.start(main, common.Args, ["--out", str(tmp_path), "--device", "cpu", *flags])
        return str(end.value)

    def before(args):
        raise KeyboardInterrupt

    def after(args):
        torch.save(dict(script="mae.py", args={}), path)
        raise KeyboardInterrupt

    assert stopped(before) == "\nStopped"
    assert stopped(after).endswith(f"go on with python mae.py --resume --out {tmp_path}")
    os.utime(path, (1e9, 1e9))                                           # of an older run
    assert stopped(before) == "\nStopped" and "--resume" in stopped(before, "--resume")


def test_the_machine_is_the_one_that_computes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    assert common.machine("cuda:1") == "a GPU, cuda:1" and "cores" in common.machine("cpu")


@pytest.mark.parametrize("able", [False, True])
def test_auto_is_bfloat16_where_it_is_native_and_the_result_says_so(tmp_path, monkeypatch, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(avx512_bf16=able))
    for dtype, meant in ("auto", ["float32", "bfloat16"][able]), ("float32", "float32"), ("bfloat16", "bfloat16"):
        args = common.Args(out=str(tmp_path), device="cpu", dtype=dtype)
        with common.autocast(args):
            assert str(F.linear(torch.ones(1, 8), torch.ones(8, 8)).dtype) == f"torch.{meant}"
        common.report(common.Run(args, nn.Linear(1, 1)), "", {})
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["settings"]["dtype"] == meant and ("--dtype" in result["command"]) == (dtype != "auto")


# ---------------------------------------------------------------------------------- evaluation


def test_few():
    labels = torch.arange(60) % 3
    i = common.few(labels, 4, seed=1)
    assert labels[i].tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(set(i.tolist())) == 12
    assert torch.equal(i, common.few(labels, 4, seed=1)) and not torch.equal(i, common.few(labels, 4, seed=2))
    assert sorted(common.few(labels, 0).tolist()) == list(range(60))
    assert len(common.few(2 * labels, 4)) == 12                          # ids may have gaps
    with pytest.raises(UserError, match="--labels 21 is too many: a class has only 20"):
        common.few(labels, 21)


def test_the_probe_finds_the_optimum():
    """Its loss has no gradient left: checked by training the same head with plain gradient descent."""
    torch.manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.randn(90, 5) + F.one_hot(y, 5) * 1.5
    test_y = torch.arange(300) % 3
    test = torch.randn(300, 5) + F.one_hot(test_y, 5) * 1.5
    got = common.probe(x, y, test, test_y)
    z, zt = ((a - x.mean(0)) / x.std(0) for a in (x, test))
    w, b = torch.zeros(3, 5, requires_grad=True), torch.zeros(3, requires_grad=True)
    for _ in range(3000):
        loss = F.cross_entropy(z @ w.T + b, y) + .01 / 2 * w.square().sum()
        gw, gb = torch.autograd.grad(loss, [w, b])
        w.data -= .5 * gw
        b.data -= .5 * gb
    due = 100 * ((zt @ w.T + b).argmax(1) == test_y).float().mean().item()
    assert got == pytest.approx(due, abs=.4) and 60 < got < 100
    shuffled = y[torch.randperm(90)]
    assert common.probe(x, shuffled, test, test_y) < 50                  # no label, no knowledge


# -------------------------------------------------------------------------------------- output


def test_png_can_be_read_back(tmp_path):
    r = torch.rand(5, 3, 4, 4)
    common.save_png(tmp_path / "x.png", r, columns=2, zoom=2)
    data = (tmp_path / "x.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (n,), kind = struct.unpack(">I", data[at:at + 4]), data[at + 4:at + 8]
        chunks[kind] = data[at + 8:at + 8 + n]
        assert struct.unpack(">I", data[at + 8 + n:at + 12 + n])[0] == zlib.crc32(kind + chunks[kind])
        at += 12 + n
    w, h = struct.unpack(">II", chunks[b"IHDR"][:8])
    sheet = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(h, 1 + 3 * w)
    assert (sheet[:, 0] == 0).all()
    sheet = sheet[:, 1:].reshape(h, w, 3)
    assert (h, w) == (3 * 8 + 2 * 4, 2 * 8 + 4)
    due = (r[3] * 255).round().byte().permute(1, 2, 0).numpy()           # second row, second column
    assert np.array_equal(sheet[12:20:2, 12:20:2], due) and (sheet[8:12] == 255).all()


def test_table_and_spread():
    assert common.table([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc   d"
    assert common.spread([61.24]) == "61.2" and common.spread([60., 62.]) == "61.0 +- 1.4"


def test_the_table_of_who_knows_what():
    images = common.Images(*[torch.zeros(2, 3, 4, 4, dtype=torch.uint8)] * 2, {}, {},
                           {"shape": list("abcd"), "colour": list("xy"), "size": list("uvw")})
    rows = {"pixels": {"shape": [[30., 32.], [50.]], "colour": [[99.]]},
            "ours": {"shape": [[60., 70.], [80.]], "colour": [[55.]], "size": [[44.]]}}
    assert common.comparison(images, [5, 0], rows).splitlines() == [
        "shape, accuracy in %    5 a class  all labels  colour, all",
        "chance                       25.0        25.0         50.0",
        "pixels                31.0 +- 1.4        50.0         99.0",
        "ours                  65.0 +- 7.1        80.0         55.0"]         # size: not all rows have it
    assert common.known(images, rows["ours"]) == "shape 80 % (chance 25), colour 55 % (chance 50), size 44 % (chance 33)"


def test_normalize_takes_bytes_and_shares():
    x = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    images = common.Images(x, x, {}, {}, {})
    torch.testing.assert_close(images.normalize(x), images.normalize(x / 255))
    assert images.normalize(x).mean().abs() < 1e-3 and images.normalize(x).std() == pytest.approx(1, abs=.01)


def test_no_runs_yet(tmp_path):
    done = run(tmp_path, script="common.py")
    assert done.returncode == 1 and "python mae.py makes one" in done.stderr


def test_attention_stays_float32_under_bfloat16_on_a_cpu():
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.bfloat16).unbind()
    args = common.Args(device="cpu", dtype="bfloat16")
    with common.autocast(args):
        got = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    due = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert got.dtype == torch.bfloat16
    assert (got != due.to(torch.bfloat16)).float().mean() < .02         # one rounding, at the end
    torch.testing.assert_close(got.double(), due, rtol=2 ** -8, atol=1e-6)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 12), (12,), (0, 12)])
def test_onednn_linear_equals_torchs(shape):
    """To the rounding of float32, against float64; gradients, too, and only where they are asked for."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape), torch.randn(8, 12), torch.randn(8)]
    for asked in (1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0):
        mine = [t.clone().requires_grad_(bool(a)) for t, a in zip(tensors, asked)]
        twin = [t.double().requires_grad_(bool(a)) for t, a in zip(tensors, asked)]
        with common.OneDNN():
            y = F.linear(*mine)
        due = F.linear(*twin)
        torch.testing.assert_close(y, due.float(), rtol=1e-5, atol=1e-5)
        grad = torch.randn(y.shape)
        y.backward(grad)
        due.backward(grad.double())
        for a, b in zip(mine, twin):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad.float(), rtol=1e-4, atol=1e-5)
    with common.OneDNN():
        torch.testing.assert_close(nn.Linear(12, 8, bias=False)(tensors[0]).shape, y.shape)
    assert F.linear is torch._C._nn.linear                               # and everything is put back


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("kind", [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported())
def test_onednn_without_gradients_follows_the_weight(kind):
    """The copy that is kept is made anew when the weight changes, in place or as a whole."""
    torch.manual_seed(0)
    layer, tolerance = nn.Linear(48, 40).to(kind), 1e-5 if kind == torch.float32 else 2e-2
    with torch.no_grad(), common.OneDNN() as kernel:
        for rows in 1, 16, 5, 200:
            x = torch.randn(rows, 1, 48).to(kind)
            for change in (lambda: None, lambda: layer.weight.mul_(-2), lambda: setattr(layer, "weight", nn.Parameter(layer.weight + 1))):
                change()
                due = x.double() @ layer.weight.double().T + layer.bias.double()
                torch.testing.assert_close(layer(x).double(), due, rtol=tolerance, atol=tolerance * 10)
        kept = len(kernel.kept)
        F.linear(x, layer.weight * 2)                                    # what is made on the way is not kept
        assert len(kernel.kept) == kept > 1


# -------------------------------------------------------------------------- many short trainings


def series(args, about="a base"):
    return common.Series(args, about, free=("steps",))


def test_a_series_does_nothing_twice_and_loses_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "script", lambda: "some.py")
    args = common.Args(out=str(tmp_path), device="cpu")
    first = series(args)
    assert not list(tmp_path.iterdir())                                    # nothing is written before something is done
    for fit in first.rest([("a", 1), ("b", 1)]):
        first.add(fit, loss=len(first.done))
        if fit == ("a", 1):
            kept = (tmp_path / "checkpoint.pt").read_bytes()
    args.resume, args.steps = True, 7                                      # free: it may change
    again = series(args)
    assert list(again.rest([("b", 1), ("c", 1), ("a", 1)])) == [("c", 1)] and again.done[("b", 1)] == dict(loss=1)
    assert again.seconds == first.seconds > 0 and capsys.readouterr().out == ""
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    for changed in dict(lr=.5), dict(about="another base"):
        about = changed.pop("about", "a base")
        other = series(dataclasses.replace(args, **changed), about)
        assert other.done == {} and "anew" in capsys.readouterr().out
        assert (tmp_path / "checkpoint.pt").read_bytes() == kept           # not touched before there is something else
    for fit in other.rest([("a", 1)]):
        other.add(fit, loss=5)
    assert (tmp_path / "previous.pt").read_bytes() == kept


def test_ctrl_c_ends_a_series_between_two_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "script", lambda: "some.py")
    usual, run = signal.getsignal(signal.SIGINT), series(common.Args(out=str(tmp_path), device="cpu"))
    with pytest.raises(KeyboardInterrupt):
        for fit in run.rest([(1,), (2,), (3,)]):
            if fit == (2,):
                os.kill(os.getpid(), signal.SIGINT)
            run.add(fit, loss=0.)
    assert list(run.done) == [(1,), (2,)] and signal.getsignal(signal.SIGINT) is usual


def test_a_part_of_a_series_leaves_no_files(tmp_path, capsys):
    out = tmp_path / "out"
    args = common.Args(steps=3, batch=2, device="cpu", out=str(out), save_every=0, resume=True)
    model = torch.nn.Linear(2, 1)
    run = common.Run(args, model, part="a part")
    for _ in run:
        run.update(model(run.batch(torch.ones(4, 2))).square().mean())
    assert not out.exists() and capsys.readouterr().out == "" and run.step == 3 and run.seconds > 0


def test_fingerprint():
    weights = dict(a=torch.ones(3), b=torch.zeros(2))
    mark = common.fingerprint(weights)
    assert len(mark) == 8 and mark == common.fingerprint({k: v.clone() for k, v in weights.items()})
    weights["b"][1] = 1e-9
    assert common.fingerprint(weights) != mark


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
def test_onednn_keeps_no_input_for_a_frozen_weight():
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7)
    for frozen in True, False:
        kept, w = [], weight.clone().requires_grad_(not frozen)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
            y = common.Linear.apply(x, w, None)
        assert kept == ([(3, 7)] if frozen else [(5, 7), (3, 7)])
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(grad, 2 * (x @ weight.T) @ weight, rtol=1e-5, atol=1e-5)
