"""Texts that are large, broken or no files; and downloads that go wrong."""
import gzip
import os
import socket
import struct
import tarfile

import numpy as np
import pytest
import torch

import bert
import common
import gpt
import lora
from common import UserError


def args_of(script, data, out, **more):
    small = dict(steps=1, batch=4, context=12, dim=8, depth=1, heads=1, device="cpu", dtype="float32")
    return script.Args(data=str(data), out=str(out), **{**small, **more})


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in str(tmp_path / "pipe"), "/dev/zero":
        for utf8 in True, False:
            with pytest.raises(UserError, match="is no regular file"):
                common.load_text(path, utf8=utf8)


def test_a_text_of_nul_bytes_is_empty(tmp_path):
    (tmp_path / "x.txt").write_bytes(bytes(5000))
    with pytest.raises(UserError, match="is empty"):
        common.load_text(str(tmp_path / "x.txt"))


def test_the_byte_that_is_no_utf8_is_named_in_a_large_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"fine words " * 200_000 + b"caf\xe9 " + b"fine " * 9)
    with pytest.raises(UserError, match="byte 0xe9 at 2200003"):
        common.load_text(str(tmp_path / "x.txt"), utf8=True)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_an_archive_of_links_or_devices_is_refused(kind, tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("data_1.bin")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "x.tar.gz").rename(tmp_path / "cifar10/cifar-10-binary.tar.gz")
    with pytest.raises(UserError, match="truncated or not CIFAR-10's binary archive"):
        common.read_cifar10("cifar10", tmp_path)


def test_no_more_of_a_gzip_is_unpacked_than_mnist_holds(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    bomb = struct.pack(">IIII", 0x803, 1 << 18, 16, 32) + bytes(1 << 27)           # 128 MB, as declared
    (tmp_path / "mnist" / common.IDX[0]).write_bytes(gzip.compress(bomb, 1))
    with pytest.raises(UserError, match="truncated or broken"):
        common.read_idx("mnist", tmp_path)


def test_closing_evaluations_are_capped(tmp_path, monkeypatch):
    raw = b"the cat sat on the mat. " * 100_000                                                # 2.4 MB
    text = common.Text(["x"], [raw[:24_000]], [raw])
    monkeypatch.setattr(common, "load_text", lambda *a, **k: text)
    words = common.Words.of(text.train, 100)
    args = args_of(bert, "x", tmp_path)
    train, val = bert.windows(args, words, text)
    model, read, masked = bert.BERT(words.vocab, 12, 8, 1, 2).eval(), [], bert.mask
    monkeypatch.setattr(bert, "mask", lambda x, *how: read.append(x) or masked(x, *how))
    bert.evaluate(args, model, train[:, 0, 0], val, repeats=1)
    assert len(val) > 60_000 and torch.cat(read)[:, 1:-1].equal(common.evenly(val, 4000))
    seen = []
    monkeypatch.setattr(gpt, "evaluate", lambda args, model, val, tokens: seen.append(val) or (1., 1.))
    gpt.main(args_of(gpt, "x", tmp_path / "run", length=3))
    assert seen[0].shape == (2 ** 18 // 12, 12)


def test_a_model_that_went_too_far_is_one_sentence(tmp_path):
    model = gpt.GPT(257, 12, 8, 1, 2)
    model.norm.weight.data.fill_(float("nan"))
    for script in gpt, lora:
        with pytest.raises(UserError, match="cannot be computed any more: try a smaller --lr"):
            script.evaluate(args_of(gpt, "x", tmp_path), model, torch.zeros(3, 12, dtype=torch.int64))


def test_a_checkpoint_that_is_a_pipe_or_has_texts_for_numbers(tmp_path):
    os.mkfifo(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="there is no .*checkpoint.pt"):
        common.read_checkpoint(tmp_path)
    os.remove(tmp_path / "checkpoint.pt")
    state = dict(format=common.FORMAT, script="gpt.py", args={}, model={}, step="3", seconds="4", about={}, kind="Muon", optimizer={})
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="lacks step, seconds"):
        common.read_checkpoint(tmp_path)
    torch.save(state | dict(step=3, seconds=4.), tmp_path / "checkpoint.pt")
    assert common.read_checkpoint(tmp_path)["step"] == 3


@pytest.mark.parametrize("x, y, words", [((20, 8, 8), 9, "y_train is int64 .9,., not one label for each of 20"),
                                         ((), 20, "x_train is uint8 .., not square images")])
def test_arrays_of_another_form(x, y, words, tmp_path):
    np.savez(tmp_path / "x.npz", x_train=np.zeros(x, np.uint8), y_train=np.arange(y))
    with pytest.raises(UserError, match=words):
        common.read_npz(tmp_path / "x.npz")


def test_an_npz_that_declares_more_than_memory_holds(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", x_train=np.zeros((50, 100, 100), np.uint8), y_train=np.zeros(50))
    monkeypatch.setattr(common, "memory", lambda: 400_000)
    with pytest.raises(UserError, match="declares 50.,... bytes, more than memory holds"):
        common.read_npz(tmp_path / "x.npz")
    monkeypatch.undo()
    assert 2 ** 28 < common.memory() < 2 ** 45 and len(common.read_npz(tmp_path / "x.npz")[0]) == 40


# ------------------------------------------------------------------------------------ downloads


@pytest.fixture
def mirrors(serve):
    """Mirrors whose answers are the functions of the dict; the second has the right file."""
    content, answers = b"the right one" * 1000, {}
    answers["/second/x.gz"] = lambda h: h.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + content)

    def answer(handler):
        answers[handler.path](handler)
        handler.close_connection = True
    serve(answer, content)
    return content, answers


def reset(handler):
    """Resets the connection."""
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


@pytest.mark.parametrize("answer, why", [
    (reset, "reset"),                                                   # before a single header
    (lambda h: h.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: many\r\n\r\nx"), "SHA-256"),
    (lambda h: h.wfile.write(b"nonsense\r\n\r\n"), "nonsense")])
def test_a_mirror_that_fails_is_named_with_its_cause_and_the_next_is_asked(mirrors, answer, why, tmp_path):
    content, answers = mirrors
    right, answers["/first/x.gz"], answers["/second/x.gz"] = answers["/second/x.gz"], answer, answer
    with pytest.raises(UserError, match=f"could not download x.gz .http://.*first/: .*{why}"):
        common.fetch("mnist", "x.gz", tmp_path)
    answers["/second/x.gz"] = right
    assert common.fetch("mnist", "x.gz", tmp_path).read_bytes() == content
    assert [path.name for path in (tmp_path / "mnist").iterdir()] == ["x.gz"]
