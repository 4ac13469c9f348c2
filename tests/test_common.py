"""common.py: the shapes world, the readers, the settings, the schedule, the probe, the PNG. What a run does to folders and
signals is in test_run.py."""
import dataclasses
import gzip
import hashlib
import io
import json
import math
import re
import socket
import struct
import sys
import tarfile
import types
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, run
from torch import nn

import common
from common import UserError


@dataclass
class Args(common.Args):
    rate: float = 0.5        # fraction of 100 % of it, in (0, 1]
    names: tuple[int, ...] = (1, 2)      # some numbers
    labels: tuple[int, ...] = (1, 5)     # labelled images per class, 0 or more
    norm: bool = True                    # whether to
    image_size: int = 32                 # side in pixels
    cpu = dict(batch=7, rate=0.25)


def settings(**given):
    return Args(**dict(device="cpu", dtype="float32") | given)


def load(data, data_dir="data", size=32):
    """common.load_images without a script."""
    return common.load_images(settings(data=str(data), data_dir=str(data_dir), image_size=size))


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
        fraction = y.bincount() / len(y)
        assert (fraction * len(fraction) - 1).abs().max() < .25, name
    for a in labels:
        for b in labels:
            if a != b:       # chi-squared of the contingency table stays near its degrees of freedom
                table = torch.zeros(int(labels[a].max()) + 1, int(labels[b].max()) + 1)
                table.index_put_((labels[a], labels[b]), torch.ones(5000), accumulate=True)
                expected = table.sum(1, keepdim=True) * table.sum(0) / 5000
                freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
                assert ((table - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** .5, (a, b)


def test_what_is_easy_and_what_is_hard():
    """A linear probe on pixels (means of 2 x 2) reads the colour, and not the shape: that takes a representation."""
    images = load("shapes")
    train, test = (torch.nn.functional.avg_pool2d(x.float(), 2).flatten(1) for x in (images.train[:3000], images.test))
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
    images = load("fashion-mnist", folder)
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
            load("fashion-mnist", fashion[0])
    path.write_bytes(gzip.compress(idx(np.zeros(30, np.uint8))))
    with pytest.raises(UserError, match="not an IDX file of 3 dimensions"):
        load("fashion-mnist", fashion[0])


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
    images = load("cifar10", tmp_path)
    assert images.train.shape == (20, 3, 32, 32) and images.test.shape == (4, 3, 32, 32)
    assert images.names["class"][:2] == ["airplane", "automobile"]
    third = records["data_batch_3.bin"][1]                               # the tenth training image
    assert images.train_labels["class"][9] == third[0]
    assert images.train[9, 2, 5, 7] == third[1 + 2 * 1024 + 5 * 32 + 7]
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="truncated or not CIFAR-10's binary archive"):
        load("cifar10", tmp_path)


def test_labels_of_other_images_are_refused(tmp_path, monkeypatch):
    x, y = np.zeros((6, 28, 28), np.uint8), np.arange(6, dtype=np.uint8)
    for labels in y[:4], y + 9:
        monkeypatch.setattr(common, "read_idx", lambda *_: (x, labels, x, y, common.MNIST))
        with pytest.raises(UserError, match="the labels of mnist in .* are not those of its images"):
            load("mnist", tmp_path)


def test_a_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("x_train", b"text")
    with pytest.raises(UserError, match="holds no array x_train, but x_train"):
        load(tmp_path / "x.npz")


def test_npz(tmp_path):
    path, x, y = tmp_path / "x.npz", np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 3
    good = dict(x_train=x, y_train=y, x_test=x, y_test=y)
    np.savez(path, **good, classes=np.array(["a", "b", "c"]))
    assert load(path).names == {"class": ["a", "b", "c"]}
    bad = [(dict(x=x, y=y), "holds no array x_train, but x, y"), (dict(y_train=y), "has no x_train"),
           (good | dict(x_train=np.array([{}, "pickled"], object)), "it holds pickled objects"),
           (good | dict(x_train=x.astype(np.int32)), "x_train is int32: take uint8, or floats"),
           (good | dict(x_train=x + 1.5), "x_train has floats from 1.5 to 1.5: scale them"),
           (good | dict(x_train=x[0, 0]), r"x_train is uint8 \(8, 3\), not square images"),
           (good | dict(x_test=x[..., :2]), r"x_test is uint8 \(6, 8, 8, 2\), not square images"),
           (good | dict(x_train=x[:, :, :5]), r"\(6, 8, 5, 3\), not square"),
           (good | dict(y_train=y[:3]), "y_train is int64 .3,., not one label for each of 6 images"),
           (good | dict(y_test=y + 1), "y_test has labels that y_train lacks"),
           (good | dict(y_test=np.array(list("abcabc"))), "y_test has labels that y_train lacks"),
           ({k: v for k, v in good.items() if k != "y_test"}, "labels of one part alone"),
           (good | dict(x_test=np.zeros((6, 4, 4, 3), np.uint8)), "train and test differ in size")]
    for arrays, message in bad:
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=message):
            load(path)
    whole = path.read_bytes()
    for broken in whole[:300], b"", b"no zip", whole.replace(b"descr", b"d'sc("), whole.replace(b"(6, 8", b"(6**"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="truncated or no .npz"):
            load(path)
    with pytest.raises(UserError, match="there is no file"):
        load(tmp_path / "none.npz")


def test_arrays_of_others(tmp_path):
    """Labels in any form are renumbered and keep their names; images in any usual form are the same."""
    r = np.random.default_rng(0)
    path, x, y = tmp_path / "x.npz", r.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), np.arange(40) % 3

    def loaded(x, y, x_test=x[:10], y_test=None, **more):
        np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y[:10] if y_test is None else y_test, **more)
        return load(path)
    usual = loaded(x, y)
    same = {"(n, 1)": y[:, None], "from 1": y + 1, "gaps": np.array([-4, 5, 9])[y], "strings": np.array(["a", "b", "c"])[y],
            "floats": y * 1., "bytes": y.astype(np.uint8), "bools": y > 0}
    names = {"(n, 1)": ["0", "1", "2"], "from 1": ["1", "2", "3"], "gaps": ["-4", "5", "9"], "strings": ["a", "b", "c"],
             "floats": ["0.0", "1.0", "2.0"], "bytes": ["0", "1", "2"], "bools": ["False", "True"]}
    for name, labels in same.items():
        images = loaded(x, labels)
        expected = [part["class"].clamp(max=1 if name == "bools" else 2) for part in (usual.train_labels, usual.test_labels)]
        assert images.names == {"class": names[name]} and torch.equal(images.train, usual.train), name
        assert torch.equal(images.train_labels["class"], expected[0]) and torch.equal(images.test_labels["class"], expected[1]), name
    assert loaded(x, y, classes=np.array(["cat", "dog", "owl"])).names == {"class": ["cat", "dog", "owl"]}
    assert loaded(x, 2 * y, classes=np.array(list("abcde"))).names == {"class": ["a", "c", "e"]}
    for classes in np.array(list("ab")), np.array(2):                                           # these cannot be theirs
        assert loaded(x, y, classes=classes).names == {"class": ["0", "1", "2"]}
    floats = loaded((x / 255).astype(np.float32), y, (x[:10] / 255).astype(np.float32))
    assert torch.equal(floats.train, usual.train)
    grey, column = loaded(x[..., 0], y, x[:10, ..., 0]), loaded(x[..., :1], y, x[:10, ..., :1])
    assert torch.equal(grey.train, column.train) and grey.train.shape == (40, 3, 8, 8)
    np.savez(path, train_images=x, train_labels=y[:, None], test_images=x[:10], test_labels=y[:10, None], val_images=x, val_labels=y)
    assert torch.equal(load(path).train, usual.train) and load(path).names == usual.names                   # MedMNIST's names
    np.savez(path, images=x)
    assert load(path).names == {} and len(load(path).test) == 8
    np.savez(path, x_train=x)
    alone = load(path)
    assert alone.names == alone.train_labels == alone.test_labels == {}
    assert sorted(alone.test.flatten(1).tolist()) == sorted(torch.tensor(x[4::5]).permute(0, 3, 1, 2).flatten(1).tolist())
    assert len(alone.train) == 32 and alone.about()["classes"] == []
    assert load_of_one_class(path, x).names == {}


def load_of_one_class(path, x):
    np.savez(path, x_train=x, y_train=np.zeros(40), x_test=x, y_test=np.zeros(40))
    return load(path)


def test_the_table_says_what_the_most_frequent_class_gives():
    x = torch.zeros(20, 3, 2, 2, dtype=torch.uint8)
    table = lambda y: common.label_table(common.Args.__new__(Labels), common.Images(
        x, x, {"class": y}, {"class": y}, {"class": ["cat", "dog"]}), {"pixels": [50.]})
    assert "always" not in table(torch.arange(20) % 2)
    rare = table((torch.arange(20) == 3).long())
    assert [line.split()[-1] for line in rare.splitlines()] == ["all", "50.0", "95.0", "50.0"] and "always the same class" in rare


class Labels(common.Args):
    labels = (0,)


@pytest.fixture
def album(tmp_path, monkeypatch):
    """album(*paths) makes pictures, files that say their grey value, and loads the folder: Pillow need not be there."""
    image = types.SimpleNamespace(registered_extensions=lambda: {".jpg": "JPEG", ".png": "PNG", ".pdf": "PDF"}, OPEN={"JPEG": 0, "PNG": 0}, DecompressionBombError=ZeroDivisionError)
    monkeypatch.setitem(sys.modules, "PIL", types.SimpleNamespace(Image=image))

    def square(file, size):
        return np.full((size, size, 3), int(file.read_text()), np.uint8), (40, 30 if "9" in file.read_text() else 60)
    monkeypatch.setattr(common, "square", square)

    def made(*paths, skip=False):
        for i, name in enumerate(paths):
            (tmp_path / "album" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "album" / name).write_text("no" if "broken" in name else str(i))
        return common.load_images(types.SimpleNamespace(data=str(tmp_path / "album"), image_size=4, device="cpu", skip_broken=skip))
    return made


def greys(images):
    return sorted(images.train[:, 0, 0, 0].tolist()), sorted(images.test[:, 0, 0, 0].tolist())


def test_pictures_without_labels(album, capsys):
    """Lying flat, at any depth, or in one folder: every fifth is for the test."""
    images = album(*(f"{i:02}.jpg" for i in range(12)))
    assert images.names == {} and greys(images) == ([0, 1, 2, 3, 5, 6, 7, 8, 10, 11], [4, 9])
    assert "album: 12 pictures (without labels) of 40 x 30 to 40 x 60 pixels, 2 of them to test on." in capsys.readouterr().out.replace("\n", " ")
    images = album("2024/May/a.jpg", "2024/June/b.PNG", "c/d/e/f.jpg")              # beside those that lie flat
    assert images.names == {} and sum(map(len, greys(images))) == 15


def test_a_folder_of_one_class_has_no_labels(album):
    images = album(*(f"cat/{i}.jpg" for i in range(6)))
    assert images.names == {} and greys(images) == ([0, 1, 2, 3, 5], [4])


def test_class_folders_and_what_is_left_out(album, capsys):
    images = album(*(f"cat/{i}.jpg" for i in range(5)), *(f"dog/deep/{i}.png" for i in range(10)), "dog/notes.txt", "list.csv",
                   "more.csv", "licence.pdf", "Thumbs.db", ".hidden/x.jpg", "cat/.x.jpg")        # Pillow only writes .pdf
    assert images.names == {"class": ["cat", "dog"]} and greys(images)[1] == [4, 9, 14]
    assert images.test_labels["class"].bincount().tolist() == [1, 2] and images.train_labels["class"].bincount().tolist() == [4, 8]
    assert torch.equal((images.train[:, 0, 0, 0] > 4).long(), images.train_labels["class"])
    said = capsys.readouterr().out.replace("\n", " ")
    assert "15 pictures (cat 5, dog 10)" in said and "left out: 2 .csv, 1 .db, 1 .txt, 1 .pdf." in said


@pytest.mark.parametrize("train, test", [("train", "val"), ("Train", "TEST"), ("train", "Validation"), ("TRAIN", "valid")])
def test_parts_of_any_name(album, train, test):
    images = album(*(f"{train}/{c}/{i}.jpg" for c in "ab" for i in range(3)), *(f"{test}/{c}/{i}.jpg" for c in "ab" for i in range(2)),
                   "readme.jpg", "other/x.jpg")
    assert images.names == {"class": ["a", "b"]} and greys(images) == ([*range(6)], [*range(6, 10)])
    assert torch.equal(images.test_labels["class"], (images.test[:, 0, 0, 0] > 7).long())


def test_parts_without_labels(album):
    images = album(*(f"train/{i}.jpg" for i in range(3)), "test/0.jpg")
    assert images.names == {} and greys(images) == ([0, 1, 2], [3])


def test_test_pictures_without_classes_do_not_take_those_of_training_away(album, capsys):
    images = album(*(f"train/{c}/{i}.jpg" for c in "ab" for i in range(5)), *(f"test/{i}.jpg" for i in range(3)), "val/a/0.jpg")
    assert images.names == {"class": ["a", "b"]} and greys(images) == ([0, 1, 2, 3, 5, 6, 7, 8], [4, 9])
    said = capsys.readouterr().out.replace("\n", " ")
    assert "left out: 3 test pictures without a class, 1 pictures in other folders." in said


def test_a_class_that_is_in_the_test_alone(album):
    with pytest.raises(UserError, match="no picture to train on is of the class c"):
        album("train/a/0.jpg", "train/b/0.jpg", "test/c/0.jpg", "test/a/1.jpg")


def test_broken_pictures_are_named_or_skipped(album, capsys):
    names = [*(f"{i}.jpg" for i in range(9)), "broken.jpg"]
    with pytest.raises(UserError, match="cannot read the picture .*broken.jpg .*--skip-broken"):
        album(*names)
    assert greys(album(*names, skip=True)) == ([0, 1, 2, 3, 5, 6, 7, 8], [4])
    said = capsys.readouterr().out.replace("\n", " ")                       # a long path wraps elsewhere
    assert "9 pictures" in said and "left out: 1 broken." in said


def test_too_few_pictures(album):
    with pytest.raises(UserError, match="has 0 pictures to train on and 0 to test on: it needs five or more"):
        album("readme.txt")
    with pytest.raises(UserError, match="has 4 pictures"):
        album(*(f"{i}.jpg" for i in range(4)))


@pytest.mark.parametrize("name", ["nowhere", ""])                        # "": an empty variable of a shell
def test_no_such_data(name):
    with pytest.raises(UserError, match=f"there is no data set '{name}': --data takes fashion-mnist, "):
        load(name)


def test_own_images_are_shuffled_with_their_labels(tmp_path):
    """In the same way each time: sorted by class, the first of them would be of one class."""
    y = np.repeat(np.arange(4), 50)
    x = np.broadcast_to(y[:, None, None].astype(np.uint8) * 50, (200, 8, 8))
    np.savez(tmp_path / "x.npz", x_train=x, y_train=y, x_test=x[::2], y_test=y[::2])
    first, again = (load(tmp_path / "x.npz") for _ in range(2))
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
    images = load(tmp_path, size=8)
    assert images.train.shape == (8, 3, 8, 8) and images.names == {"class": ["cat", "dog"]}
    assert dict(zip(images.test[:, 0, 4, 4].tolist(), images.test_labels["class"].tolist())) == {40: 0, 200: 1}
    (tmp_path / "dog/3.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="cannot read the picture .*dog/3.png"):
        load(tmp_path, size=8)


@pytest.fixture
def pictures(tmp_path):
    """pictures(path, image): saves a picture of Pillow's below the folder, five times; it returns the folder."""
    pytest.importorskip("PIL.Image", reason="needs Pillow")

    def save(path, image, ending="png", **how):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for i in range(5):
            image.save(tmp_path / path / f"{i}.{ending}", **how)
        return tmp_path
    return save


def grey(value, size=8):
    return __import__("PIL.Image").Image.new("RGB", (size, size), (value,) * 3)


@pytest.mark.parametrize("other", ["test", "val"])
def test_folders_for_training_and_test(pictures, other):
    for part, value in ("train", 50), (other, 150):
        for i, name in enumerate(("cat", "dog")):
            folder = pictures(f"{part}/{name}", grey(value + i))
    images = load(folder, size=8)
    assert images.names == {"class": ["cat", "dog"]} and sorted(images.train[:, 0, 0, 0].tolist()) == [50] * 5 + [51] * 5
    assert sorted(images.test[:, 0, 0, 0].tolist()) == [150] * 5 + [151] * 5
    assert torch.equal(images.test_labels["class"], (images.test[:, 0, 0, 0] - 150).long())


def test_hidden_folders_and_files_are_no_pictures(pictures):
    for name in "cat", "dog", ".ipynb_checkpoints", "cat/.ipynb_checkpoints":
        folder = pictures(name, grey(90))
    (folder / "cat/.DS_Store").write_bytes(b"hidden")
    images = load(folder, size=8)
    assert images.names == {"class": ["cat", "dog"]} and len(images.train) + len(images.test) == 10


def test_pictures_of_all_kinds_of_files(pictures):
    """16-bit greys keep their range, a telephone's picture stands upright, and what is transparent is white."""
    from PIL import Image
    ramp = (np.linspace(0, 1, 8)[None].repeat(8, 0) * 65535).astype(np.uint16)
    half = Image.new("RGB", (8, 8))
    half.paste((255, 0, 0), (0, 0, 8, 4))                                # red above; and Exif says: turn it to the right
    turned = Image.Exif()
    turned[0x0112] = 6
    disc = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    disc.paste((0, 0, 0, 255), (2, 2, 6, 6))
    cases = {"grey": (Image.fromarray(ramp), {}), "turned": (half, dict(exif=turned)), "clear": (disc, {}), "palette": (grey(77).quantize(4), {}),
             "inks": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {})}
    for name, (image, how) in cases.items():
        ending = "jpg" if name == "inks" else "png"
        folder = pictures(f"{name}/a", image, ending, **how)
        pictures(f"{name}/b", image, ending, **how)
    found = {name: load(folder / name, size=8).train[0] for name in cases}
    assert np.abs(found["grey"][0, 0].numpy() - np.linspace(0, 255, 8)).max() < 1
    assert found["turned"][0, :, 0].tolist() == [0] * 8 and found["turned"][0, :, 7].tolist() == [255] * 8
    assert found["clear"][:, 0, 0].tolist() == [255] * 3 and found["clear"][:, 3, 3].tolist() == [0] * 3
    assert (found["palette"] == 77).all()
    assert (found["inks"][0] > 200).all() and (found["inks"][1:] < 60).all()
    for mode, values in ("F", np.linspace(0, 1, 64, dtype=np.float32)), ("I", np.arange(64, dtype=np.int32)):
        folder = pictures(f"deep{mode}", Image.fromarray(values.reshape(8, 8), mode), "tif")
        with pytest.raises(UserError, match="cannot read the picture .*tif .it has 32 bits a channel: save it with 8 or 16"):
            load(folder / f"deep{mode}", size=8)


def test_folder_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(UserError, match="pip install pillow"):
        load(tmp_path)


@pytest.mark.skipif(not (DATA / "fashion-mnist").exists(), reason="no Fashion-MNIST at hand")
def test_the_real_fashion_mnist():
    for file in (DATA / "fashion-mnist").glob("*.gz"):
        digest = hashlib.sha256(gzip.decompress(file.read_bytes())).hexdigest()
        assert digest == common.SHA256["fashion-mnist"][file.name]
    images = load("fashion-mnist", DATA)
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


def test_nine_tenths_of_each_document_are_for_training(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"0123456789" * 3)
    (tmp_path / "sub/a.txt").write_bytes(b"x" * 17 + "\N{EURO SIGN}".encode() + b"y")      # 9/10 fall into the sign
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / "other.pdf").write_bytes(b"not this one")
    (tmp_path / "sub/UPPER.TXT").write_bytes(b"0123456789")
    text = common.load_text(str(tmp_path))
    assert text.names == ["b.txt", "sub/UPPER.TXT", "sub/a.txt"]
    assert text.train == [b"0123456789" * 2 + b"0123456", b"012345678", b"x" * 17 + "\N{EURO SIGN}".encode()]
    assert text.val == [b"789", b"9", b"y"]
    said = capsys.readouterr().out.replace("\n", " ")
    assert "4 documents, 63 bytes; left out: 1 .pdf." in said
    one = common.load_text(str(tmp_path / "other.pdf"))
    assert (one.names, one.train, one.val) == (["other"], [b"not this o"], [b"ne"])
    parts = common.load_text(str(tmp_path / "b.txt"), parts=3)
    assert parts.names == ["part 1", "part 2", "part 3"] and parts.train == [b"012345678"] * 3 and parts.val == [b"9"] * 3


def test_documents_in_markdown_are_read(tmp_path):
    for name in "a.md", "b.MD", "c.txt", "d.Txt", "e.rst", ".hidden.txt":
        (tmp_path / name).write_bytes(b"0123456789")
    assert common.load_text(str(tmp_path)).names == ["a.md", "b.MD", "c.txt", "d.Txt"]


def test_pieces_of_a_text():
    """Cut after a line, else after a word, never in a letter; together they are the text."""
    raw = "a line\n".encode() * 40 + "w\N{EURO SIGN} ".encode() * 60 + "\N{EURO SIGN}".encode() * 50
    parts = list(common.pieces(raw, 50))
    assert "".join(parts).encode() == raw and len(parts) > 8
    assert all(part.endswith("\n") for part in parts[:5]) and all(part[-1] in "\n " for part in parts[:-1])
    assert list(common.pieces(b"")) == [] and list(common.pieces(b"abc")) == ["abc"]


def test_words_of_many_scripts():
    """A vowel sign or an accent stays with its letter; each Chinese character is a word."""
    split = lambda text: list(common.Words.split(text))
    assert split("मौसम बहुत अच्छा है।") == ["मौसम", "बहुत", "अच्छा", "है", "।"]
    assert split("今天天气很好,OK了") == [*"今天天气很好", ",", "ok", "了"]
    assert split("Cafe\N{COMBINING ACUTE ACCENT}s") == ["cafe\N{COMBINING ACUTE ACCENT}s"]
    assert split("ひらがな 한국어 ไม่มี") == ["ひらがな", "한국어", "ไม่มี"]
    assert split("it's >>> x_1 -- 3.5!!") == ["it", "'", "s", ">>>", "x_1", "--", "3", ".", "5", "!!"]


def test_the_words_of_the_embedded_texts_are_what_they_were():
    """In ASCII and in what the manual has beside it, a word is a run of letters, digits and underscores."""
    for name in "pydocs", "pycode":
        text = common.load_text(name)
        for raw in text.train + text.val:
            whole = raw.decode(errors="replace")
            plain = [m[0] for m in re.finditer(r"\w+|([^\w\s])\1*", whole.removeprefix("\ufeff").lower())]
            assert [w for piece in common.pieces(whole.encode()) for w in common.Words.split(piece)] == plain


def test_streams_are_small():
    documents = [b"red green red", b"green blue " * 3]
    words = common.Words.of(documents, 20)
    stream = words.stream(documents)
    assert stream.dtype == torch.int32 and stream.tolist() == [
        t for raw in documents for t in [3, *words.encode(raw.decode()).tolist()]]
    stream = common.Bytes().stream(documents)
    assert stream.dtype == torch.int16 and stream.tolist() == [t for raw in documents for t in (256, *raw)]


def test_batches_of_a_very_long_text(tmp_path):
    """More rows than a run sees come in any order, the same for a step, and no order of all of them is made."""
    data, args = torch.arange(2 ** 23 + 1, dtype=torch.int32), settings(steps=3, batch=2000, out=str(tmp_path))
    model = nn.Linear(1, 1)
    run, seen = common.Run(args, model, common.adamw(model.parameters(), 1e-3, 0.)), []
    for step in run:
        seen.append(run.batch(data))
        run.log(torch.zeros(()))
        assert run.order is None
    rows = torch.cat(seen)
    assert len(rows.unique()) > 5980 and 0 <= rows.min() < 9000 and rows.max() > 2 ** 23 - 9000
    torch.manual_seed(args.seed * 1_000_003 + 1)
    assert torch.equal(seen[1], data[torch.randint(len(data), (2000,))])


def test_evenly():
    assert common.evenly(torch.arange(101), 5).tolist() == [0, 25, 50, 75, 100]
    assert common.evenly(torch.arange(3), 5).tolist() == [0, 1, 2]


def test_the_source_of_the_standard_library():
    text = common.load_text("pycode")
    assert {"argparse", "textwrap", "json"} & set(text.names) >= {"argparse", "textwrap"}
    i = text.names.index("textwrap")
    assert text.train[i] + text.val[i] == open(__import__("textwrap").__file__, "rb").read()


def test_texts_that_cannot_be_had(tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_bytes(b"\n\n")
    (tmp_path / "none").mkdir()
    for name, words in ("no-such", ["there is no text 'no-such'", "--data takes pydocs, pycode"]), \
            ("", ["there is no text"]), (str(tmp_path / "empty.txt"), ["is empty"]), (str(tmp_path / "none"), ["holds no .txt or .md file"]), \
            ("/dev/zero", ["/dev/zero is no regular file"]):
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
    assert hashlib.sha256(path.read_bytes()).hexdigest() == common.SHA256["shakespeare"]["input.txt"]


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
    assert common.Words.join([*common.Words.split(text)]) == text
    assert "\x1b" not in common.Words.join(["a", "\x1b"])
    with pytest.raises(UserError, match="no word of this text occurs twice"):
        common.Words.of([b"one two three"], 9)


def test_bert_needs_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    assert common.load_text(str(tmp_path)).names == ["a.txt", "b.txt"]
    with pytest.raises(UserError, match="b.txt of --data .* is not UTF-8 .byte 0xe9 at 3.*gpt.py takes any bytes"):
        common.load_text(str(tmp_path), utf8=True)


def test_hidden_files_are_no_text(tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/x.txt").write_bytes(b"not this")
    (tmp_path / "a.txt").write_bytes(b"this")
    assert common.load_text(str(tmp_path)).names == ["a"]


# ----------------------------------------------------------------------------------- downloads


@pytest.fixture
def server(serve):
    """A mirror on this machine, and a file to be had from it."""
    content, pages = b"the right one" * 1000, {}

    def answer(handler):
        page = pages.get(handler.path, b"")
        page, headers = page if isinstance(page, tuple) else (page, {})
        handler.send_response(200 if handler.path in pages else 404)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(page)
        if "Content-Length" in headers:                                  # of more than it sends: reset the connection
            handler.wfile.flush()
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
    serve(answer, content)
    return content, pages


def test_a_download_is_checked_before_use(server, tmp_path, capfd):
    content, pages = server
    path = tmp_path / "mnist/x.gz"
    pages["/first/x.gz"] = content[:-1]
    with pytest.raises(UserError, match="not the expected SHA-256") as e:
        common.fetch("mnist", "x.gz", tmp_path)
    assert f"Put the file at {path} yourself" in str(e.value) and "--data shapes" in str(e.value)
    assert not path.parent.exists()                                      # nothing is kept
    pages["/second/x.gz"] = content                                      # the next mirror is asked
    assert common.fetch("mnist", "x.gz", tmp_path) == path and path.read_bytes() == content
    pages.clear()
    assert common.fetch("mnist", "x.gz", tmp_path) == path               # it is there: no download


def test_a_file_that_was_compressed_anew_is_the_same_file(server, tmp_path):
    content, pages = server
    pages["/first/x.gz"] = gzip.compress(content, 1)
    assert gzip.decompress(common.fetch("mnist", "x.gz", tmp_path).read_bytes()) == content


def test_a_connection_that_is_reset_midway(server, tmp_path):
    """The next mirror is asked, and what is said is not about the disk."""
    content, pages = server
    pages["/first/x.gz"] = content[:5000], {"Content-Length": "999999"}
    with pytest.raises(UserError, match="could not download x.gz .http://127.0.0.1.*first/: .*reset"):
        common.fetch("mnist", "x.gz", tmp_path)
    pages["/second/x.gz"] = content
    assert common.fetch("mnist", "x.gz", tmp_path).read_bytes() == content


def test_a_mirror_that_sends_gzip(server, tmp_path, monkeypatch):
    """Of a text, the text is kept, whether the mirror says that it is compressed or not."""
    content, pages = server
    monkeypatch.setitem(common.SHA256["mnist"], "x.txt", hashlib.sha256(content).hexdigest())
    pages["/first/x.txt"] = gzip.compress(content)[:-50], {"Content-Encoding": "gzip"}
    with pytest.raises(UserError, match="could not download x.txt.*not the expected SHA-256"):
        common.fetch("mnist", "x.txt", tmp_path)
    for i, headers in enumerate(({"Content-Encoding": "gzip"}, {})):
        pages["/second/x.txt"] = gzip.compress(content), headers
        assert common.fetch("mnist", "x.txt", tmp_path / str(i)).read_bytes() == content


def test_a_disk_that_is_full_during_a_download(server, tmp_path, monkeypatch):
    content, pages = server
    pages["/first/x.gz"] = content

    def full(path, raw):
        path.touch()
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="cannot write .*x.gz .No space left on device.: choose another --data-dir"):
        common.fetch("mnist", "x.gz", tmp_path)
    assert not list((tmp_path / "mnist").iterdir())


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setitem(common.MIRRORS, "mnist", ["http://127.0.0.1:9/"])
    with pytest.raises(UserError) as e:
        load("mnist", tmp_path)
    for word in "train-images-idx3-ubyte.gz", "refused", f"Put the file at {tmp_path}", "--data shapes":
        assert word in str(e.value)


# ------------------------------------------------------------------------------------ settings


def test_settings_and_their_order(capsys):
    args = common.resolve(settings(lr=1., norm=False, names=(3, 4, 5), dtype="auto"))
    assert (args.lr, args.norm, args.names, args.batch, args.rate) == (1.0, False, (3, 4, 5), 7, .25)
    assert "--batch 7 --rate 0.25 (flags you give win)" in capsys.readouterr().out
    assert common.resolve(settings(batch=9)).batch == 9
    assert common.resolve(settings(batch=256)).batch == 256              # the default for a GPU, but it was given


def parsed(flags):
    """The settings of a command line, before they are resolved."""
    found = []
    common.cli(found.append, Args, flags.split())
    return found[0]


def test_flags():
    args = parsed("--lr 1 --no-norm --names 3 4 5 --rate=.5 --data=-x")
    assert (args.lr, args.norm, args.names, args.rate, args.data) == (1.0, False, (3, 4, 5), .5, "-x")
    assert args.given == {"lr", "norm", "names", "rate", "data"}


@pytest.mark.parametrize("given", [
    dict(steps=1.5), dict(steps="9"), dict(lr="fast"), dict(norm=1), dict(dtype="bf16"), dict(names=[]), dict(names=[1, 0]),
    dict(names=2.5), dict(lr=math.nan), dict(lr=math.inf), dict(lr=-1), dict(clip=0), dict(rate=0), dict(rate=1.01),
    dict(warmup=-.1), dict(seed=1e9), dict(seed=10 ** 9 + 1), dict(batch=0), dict(steps=-1), dict(image_size=0), dict(data=3),
    dict(labels=[-1])])
def test_values_that_a_setting_cannot_have(given):
    (name,) = given
    with pytest.raises(common.UsageError, match=f"^{common.flag(name)} "):
        common.check(settings(**given))


@pytest.mark.parametrize("given", [
    dict(steps=0), dict(lr=0), dict(clip=math.inf), dict(rate=1), dict(warmup=0), dict(warmup=1), dict(seed=10 ** 9), dict(labels=0)])
def test_values_at_the_edge_of_a_range(given):
    common.check(settings(**given))


def test_settings_from_python_may_be_lists_paths_and_numpys(tmp_path):
    args = common.resolve(settings(steps=np.int64(3), lr=np.float32(.5), names=[1, np.int32(2)], labels=5, data=tmp_path, warmup=1))
    assert (args.steps, args.lr, args.names, args.labels, args.data, args.warmup) == (3, .5, (1, 2), (5,), str(tmp_path), 1.)
    assert type(args.steps) is int and type(args.lr) is float and type(args.warmup) is float
    json.dumps(dataclasses.asdict(args))


def test_a_class_that_has_no_source_has_the_usual_ranges():
    """As in a notebook, or where only compiled files are there."""
    scope = dict(common=common, dataclass=dataclass, __name__="__main__")
    exec("@dataclass\nclass Args(common.Args):\n    width: int = 5     # 0 or more", scope)
    common.check(scope["Args"](width=1))
    for wrong in dict(width=0), dict(warmup=2.):                         # those of its parent stay
        with pytest.raises(common.UsageError):
            common.check(scope["Args"](**wrong))


def test_a_boolean_flag_takes_no_value(capsys):
    with pytest.raises(SystemExit) as e:
        parsed("--compile=False")
    text = capsys.readouterr().err
    assert e.value.code == 2 and "--compile takes no value: it is --compile or --no-compile" in text and text.count("\n") == 1


def test_help_is_the_comments(capsys):
    with pytest.raises(SystemExit) as e:
        parsed("--help")
    text = capsys.readouterr().out
    assert e.value.code == 0 and max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    assert "fraction of 100 % of it, in (0, 1] [0.5; on a CPU 0.25]" in flat and "training steps, 0 or more [4000]" in flat


def test_every_setting_of_every_script_has_a_help(scripts):
    for name in scripts:
        module = __import__(name.removesuffix(".py"))
        text = common.comments(module.Args)
        for field in module.Args.__dataclass_fields__:
            assert text.get(field), f"{name}: --{field} has no comment"
        assert set(module.Args.cpu) <= set(module.Args.__dataclass_fields__)


def test_the_defaults_of_every_script_are_in_their_ranges(scripts):
    for name in scripts:
        module = __import__(name.removesuffix(".py"))
        common.check(module.Args())
        common.resolve(module.Args(device="cpu"))


@pytest.mark.parametrize("device, size", [("cpu", 7), ("cpu:0", 7), ("auto", None)])
def test_a_cpu_takes_the_sizes_for_a_cpu(device, size):
    expected = size or (256 if torch.cuda.is_available() or torch.backends.mps.is_available() else 7)
    assert common.resolve(settings(device=device)).batch == expected


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "cpu:x", "", "meta", "gpu"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(common.UsageError, match="--device takes auto or one of"):
        common.find_device(name)


def test_a_gpu_takes_the_defaults(monkeypatch, capsys):
    monkeypatch.setattr(common, "find_device", lambda name: "cuda")
    args = common.resolve(settings(device="auto"))
    assert (args.device, args.batch, args.rate) == ("cuda", 256, .5) and capsys.readouterr().out == ""


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
    args = settings(steps=20, batch=10, out=str(tmp_path))
    model = nn.Linear(1, 1)
    run, rows = common.Run(args, model, common.adamw(model.parameters(), 0., 0.)), []
    for step in run:
        x = run.batch(torch.arange(100.)[:, None])
        rows.append(x.flatten().tolist())
        run.log(model(x).mean())
    first, second = sum(rows[:10], []), sum(rows[10:], [])
    assert sorted(first) == sorted(second) == list(range(100)) and first != second


def test_the_learning_rate_of_a_step(tmp_path):
    """The schedule's; of a group with its own rate, that many times as much."""
    args = settings(steps=4, batch=1, lr=.1, warmup=.5, out=str(tmp_path))
    a, b = (nn.Linear(1, 1, bias=False) for _ in range(2))
    optimizer = torch.optim.SGD([dict(params=a.parameters()), dict(params=b.parameters(), times=3.)], 1.)
    run = common.Run(args, nn.ModuleList([a, b]), optimizer)
    for step in run:
        before = a.weight.item(), b.weight.item()
        loss = 2 * a.weight.sum() + 2 * b.weight.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)
        expected = .1 * common.schedule(step, 4, .5)
        assert before[0] - a.weight.item() == pytest.approx(2 * expected, rel=1e-3)
        assert before[1] - b.weight.item() == pytest.approx(6 * expected, rel=1e-3)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert [line["lr"] for line in log] == pytest.approx([.1 * common.schedule(step, 4, .5) for step in range(4)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_computes_in_the_dtype_with_the_weights_of_the_step(tmp_path, dtype):
    """Inside a step bfloat16 copies of the weights are kept; after the update they must be new ones."""
    args = settings(steps=3, batch=1, lr=.5, warmup=0, out=str(tmp_path), dtype=dtype)
    model, x = nn.Linear(4, 4), torch.ones(1, 4)
    optimizer = common.adamw(model.parameters(), .5, 0.)
    run = common.Run(args, model, optimizer)
    for step in run:
        with run.autocast():
            before = model(x)
            loss = before.float().square().mean()
        assert str(before.dtype) == f"torch.{dtype}" and model.weight.dtype == torch.float32
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)
        with run.autocast():
            assert not torch.allclose(before.float(), model(x).float(), atol=.05)


def test_the_machine_is_the_one_that_computes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    assert common.machine("cuda:1") == "a GPU, cuda:1" and "cores" in common.machine("cpu")


@pytest.mark.parametrize("able", [False, True])
def test_auto_is_bfloat16_where_it_is_native_and_the_result_says_so(tmp_path, monkeypatch, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(avx512_bf16=able), raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    model = nn.Linear(1, 1)
    for dtype, meant in ("auto", ["float32", "bfloat16"][able]), ("float32", "float32"), ("bfloat16", "bfloat16"):
        args = settings(out=str(tmp_path), dtype=dtype)
        with common.autocast(args):
            assert str(F.linear(torch.ones(1, 8), torch.ones(8, 8)).dtype) == f"torch.{meant}"
        common.report(common.Run(args, model, common.adamw(model.parameters(), 0., 0.)), "", {})
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["settings"]["dtype"] == meant and ("--dtype" in result["command"]) == (dtype != "auto")


def test_auto_is_float32_where_pytorchs_kernels_are_older_than_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(avx512_bf16=True), raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")      # ATEN_CPU_CAPABILITY=avx2
    assert common.precision(settings(dtype="auto")) == "float32"


def test_a_pytorch_that_cannot_say_what_its_cpu_can_do(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)    # before 2.13
    assert common.precision(settings(dtype="auto")) == "float32"


def test_attention_is_as_exact_under_bfloat16_on_a_cpu():
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.bfloat16).unbind()
    with common.autocast(settings(dtype="bfloat16")):
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2 ** -6, atol=2 ** -7)


# ---------------------------------------------------------------------------------- evaluation


def test_k_shot():
    labels = torch.arange(60) % 3
    i = common.k_shot(labels, 4, seed=1)
    assert labels[i].tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(set(i.tolist())) == 12
    assert torch.equal(i, common.k_shot(labels, 4, seed=1)) and not torch.equal(i, common.k_shot(labels, 4, seed=2))
    assert sorted(common.k_shot(labels, 0).tolist()) == list(range(60))
    assert len(common.k_shot(2 * labels, 4)) == 12                          # ids may have gaps
    with pytest.raises(UserError, match="--labels 21 is too many: a class has only 20"):
        common.k_shot(labels, 21)


def test_the_probe_finds_the_optimum():
    """Its loss has no gradient left: checked by training the same head with plain gradient descent."""
    torch.manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.randn(90, 5) + F.one_hot(y, 5) * 1.5
    test_y = torch.arange(300) % 3
    test = torch.randn(300, 5) + F.one_hot(test_y, 5) * 1.5
    found = common.probe(x, y, test, test_y)
    z, zt = ((a - x.mean(0)) / x.std(0) for a in (x, test))
    w, b = torch.zeros(3, 5, requires_grad=True), torch.zeros(3, requires_grad=True)
    for _ in range(3000):
        loss = F.cross_entropy(z @ w.T + b, y) + .01 / 2 * w.square().sum()
        gw, gb = torch.autograd.grad(loss, [w, b])
        w.data -= .5 * gw
        b.data -= .5 * gb
    expected = 100 * ((zt @ w.T + b).argmax(1) == test_y).float().mean().item()
    assert found == pytest.approx(expected, abs=.4) and 60 < found < 100
    shuffled = y[torch.randperm(90)]
    assert common.probe(x, shuffled, test, test_y) < 50                  # labels without meaning teach nothing


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
    expected = (r[3] * 255).round().byte().permute(1, 2, 0).numpy()           # second row, second column
    assert np.array_equal(sheet[12:20:2, 12:20:2], expected) and (sheet[8:12] == 255).all()


def test_table_and_mean_std():
    assert common.table([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc   d"
    assert common.mean_std([61.24]) == "61.2" and common.mean_std([60., 62.]) == "61.0 +- 1.4"


def labelled(attributes):
    """64 + 40 noise images with the ids of attributes {name: number of ids}; the first colours them: id / 10 is added."""
    r = np.random.default_rng(0)
    ids = {name: torch.from_numpy(r.integers(0, n, 104)) for name, n in attributes.items()}
    x = torch.from_numpy(r.integers(0, 20, (104, 3, 4, 4)).astype(np.uint8)) + 25 * ids[next(iter(ids))].byte()[:, None, None, None]
    return common.Images(x[:64], x[64:], {k: y[:64] for k, y in ids.items()}, {k: y[64:] for k, y in ids.items()},
                         {name: [f"{name} {i}" for i in range(n)] for name, n in attributes.items()})


def test_linear_probe_and_its_table():
    images = labelled(dict(shape=3, colour=2, size=3))
    args = settings(labels=(5, 0))
    row = common.linear_probe(args, nn.Flatten(), images)
    assert len(row) == 3 and min(row[:2]) > 95 and row[2] < 90           # the brightness is the shape; the colour is not in it
    lines = common.label_table(args, images, dict(pixels=row)).splitlines()
    assert [line.split()[0] for line in lines] == ["shape,", "chance", "pixels"] and "colour" in lines[0]
    assert lines[1].split()[1:] == ["33.3", "33.3", "50.0"] and lines[2].split()[1:] == [f"{x:.1f}" for x in row]
    lines = common.label_table(args, images, dict(pixels=row, tuned=row[:2])).splitlines()          # not all rows have the colour
    assert "colour" not in lines[0] and [len(line.split()) for line in lines[1:]] == [3, 3, 3]
    one = common.linear_probe(args, nn.Flatten(), labelled(dict(shape=3)))              # images that have none
    assert len(one) == 2 and "colour" not in common.label_table(args, labelled(dict(shape=3)), dict(pixels=one))


def test_encode_is_the_features_in_order(tmp_path):
    images = labelled(dict(shape=3))
    f = lambda x: x.mean((2, 3))
    found = common.encode(settings(), f, images, images.train, batch=10)
    torch.testing.assert_close(found, f(images.normalize(images.train)))
    assert not common.encode(settings(), nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), images, images.train[:3]).requires_grad


def test_fine_tuning_trains_what_takes_gradients():
    images = labelled(dict(shape=3))
    labels, test_labels = images.class_labels()
    f = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 8).requires_grad_(False))
    before = [p.clone() for p in f.parameters()]
    score = common.finetune(settings(), f, images, images.train, labels, test_labels, steps=100, lr=1e-2)
    assert score > 80
    assert [torch.equal(p, q) for p, q in zip(f.parameters(), before)] == [False, False, True, True]
    again = [common.finetune(settings(), nn.Flatten(), images, images.train, labels, test_labels, 5, 1e-2) for _ in range(2)]
    assert again[0] == again[1]                                          # seeded
    start = common.finetune(settings(), nn.Flatten(), images, images.train, labels, test_labels, 0, 1e-2)
    assert start in [pytest.approx(100 * (test_labels == c).float().mean().item()) for c in range(3)]      # the same for every image


def test_what_a_model_has_to_know_of_its_images():
    images = labelled(dict(shape=3, colour=2))
    about = images.about()
    assert about["image_size"] == 4 and about["classes"] == ["shape 0", "shape 1", "shape 2"]
    x = images.train[:2].float() / 255
    mean, std = (torch.tensor(about[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close((x - mean) / std, images.normalize(images.train[:2]))
    json.dumps(about)


def test_normalize_takes_bytes_and_fractions():
    x = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    images = common.Images(x, x, {}, {}, {})
    torch.testing.assert_close(images.normalize(x), images.normalize(x / 255))
    assert images.normalize(x).mean().abs() < 1e-3 and images.normalize(x).std() == pytest.approx(1, abs=.01)


def test_no_runs_yet(tmp_path):
    done = run(tmp_path, script="common.py")
    assert done.returncode == 1 and "python mae.py makes one" in done.stderr


def test_fingerprint():
    weights = dict(a=torch.ones(3), b=torch.zeros(2))
    mark = common.fingerprint(weights)
    assert len(mark) == 8 and mark == common.fingerprint({k: v.clone() for k, v in weights.items()})
    weights["b"][1] = 1e-9
    assert common.fingerprint(weights) != mark


def test_say_wraps_long_lines_only(capsys):
    table = "a" + " " * 60 + "b   "
    common.say(f"{table}\n\n{'word ' * 30}\n{'x' * 99}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [table, ""] and "x" * 99 in lines and max(map(len, lines[:-1])) <= 80
    assert " ".join(lines[2:-1]).split() == ["word"] * 30
    common.say("y " * 99, width=math.inf)
    assert capsys.readouterr().out == "y " * 99 + "\n"


def test_the_command_of_a_run_gives_its_settings():
    args = common.resolve(settings(batch=9, names=(4, 5), norm=False, data="-a b's.npz", lr=1e-3, rate=.25, out="x", seed=3))
    line = common.command(args)
    assert line.startswith("python test_common.py ") and "--out" not in line and "--rate" not in line       # .25 is the CPU's
    again = parsed(" ".join(word for word in __import__("shlex").split(line)[2:] if " " not in word))
    assert (again.batch, again.names, again.norm, again.seed) == (9, (4, 5), False, 3)
    words = __import__("shlex").split(line)
    assert "--data=-a b's.npz" in words and "--no-norm" in words


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for error in OSError(28, "No space left on device"), RuntimeError("inline_container.cc: failed writing"):
        with pytest.raises(UserError, match="cannot write .*file at step 3 .(No space left on device|is the disk full.)"):
            with common.replacing(path, " at step 3") as f:
                f.write(b"half")
                raise error
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt):
        with common.replacing(path) as f:
            f.write(b"half")
            raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with common.replacing(path) as f:
        f.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_the_curve_shows_the_losses(tmp_path):
    """The points of the polyline, by hand, and the numbers at the lines; one value, and none that changes."""
    import re
    import xml.etree.ElementTree as tree

    def drawn(x, y):
        common.save_curve(tmp_path / "x.svg", x, y, "title")
        root = tree.parse(tmp_path / "x.svg").getroot()
        named = lambda kind: [e for e in root.iter() if e.tag.endswith("}" + kind)]
        points = [tuple(map(float, p.split(","))) for p in named("polyline")[0].get("points").split()]
        return points, [e.text for e in named("text")], [float(e.get("y1")) for e in named("line")]
    points, texts, lines = drawn([10, 20, 40], [3., 1., 2.])
    assert points == [(207.5, 30.), (345., 270.), (620., 150.)]
    assert texts == ["title", "1", "1.5", "2", "2.5", "3", "0", "10", "20", "30", "40"] and lines == [270., 210., 150., 90., 30.]
    for x, y in ([5], [2.]), ([1, 2], [3., 3.]), ([1, 2], [-1e9, 3e12]), ([1, 2], [0., 1e-30]):
        points, texts, lines = drawn(x, y)
        assert 1 <= len(lines) <= 8 and all(30 <= b <= 270 for _, b in points)
    assert re.search(r"prefers-color-scheme: dark", (tmp_path / "x.svg").read_text())
