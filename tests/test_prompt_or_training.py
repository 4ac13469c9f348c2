"""experiments/prompt_or_training.py: the tasks and the learners do what the docstring says, and what is done is kept;
and experiments/curves.py, which draws its figures."""
import copy
import json
import math
import re
import sys
from xml.etree import ElementTree

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_weights import bpe_folder, random_weights, safetensors, transformers_gpt2

import common
import lora

sys.path.insert(0, str(ROOT / "experiments"))
import curves, prompt_or_training as experiment  # noqa: E402

CLASSES, WORDS, ENDINGS, BOS = experiment.CLASSES, experiment.WORDS, experiment.ENDINGS, experiment.BOS
FAMILY, HALF = experiment.KINDS
INVENTED = experiment.INVENTED


# ------------------------------------------------------------------------------------------- the tasks


def class_of(ending):
    """Which class has an ending in the language."""
    return (ending - WORDS) // ENDINGS


def test_texts_are_each_of_one_dialect():
    torch.manual_seed(0)
    x = experiment.texts(20).view(20, 33, 2)
    assert x[..., 0].max() < WORDS and WORDS <= x[..., 1].min() <= x[..., 1].max() < BOS
    chosen = set()
    for row in x.tolist():
        assert len({word for word, _ in row}) == 33                                  # no word comes twice
        assert all(class_of(ending) == word % CLASSES for word, ending in row)
        one = {}
        for word, ending in row:
            assert one.setdefault(word % CLASSES, ending) == ending                  # one ending of each class
        chosen.add(tuple(sorted(one.values())))
    assert len(chosen) == 20


def test_tasks():
    """Of each kind all words, half of the classes with their own endings outside of the family, and no other endings."""
    for number in range(8):
        family, half = experiment.task(FAMILY, number), experiment.task(HALF, number)
        assert sorted(family[:, 0].tolist()) == list(range(WORDS)) and family[:, 0].equal(half[:, 0])
        for x in family, half:
            one = dict(zip((x[:, 0] % CLASSES).tolist(), x[:, 1].tolist()))
            assert len(one) == CLASSES and all(one[word % CLASSES] == ending for word, ending in x.tolist())
            own = [c for c, ending in one.items() if class_of(ending) == c]
            assert len(own) == (CLASSES if x is family else CLASSES // 2)
            assert sorted(map(class_of, one.values())) == list(range(CLASSES))       # each class's endings once
    assert not experiment.task(FAMILY, 0).equal(experiment.task(FAMILY, 1))
    numbers = [experiment.number(seed, i, choose) for seed in range(4) for i in range(1000) for choose in (False, True)]
    assert len(set(numbers)) == len(numbers)


def test_shown():
    x = torch.tensor([[0, 9], [1, 9], [CLASSES, 9], [2, 9], [CLASSES + 1, 9], [3, 9]])
    assert experiment.shown(x, 1) == pytest.approx(20) and experiment.shown(x, 2) == 50 and experiment.shown(x, 4) == 50


# ---------------------------------------------------------------------------------------- the learners


def gpt(context=66):
    torch.manual_seed(0)
    model = lora.GPT(BOS + 1, context, 16, 1, 2).eval()
    for p in model.parameters():
        p.data *= 1 + 9 * (p.ndim > 1)                          # so that what comes earlier in the prompt matters
    return model


def test_evaluate_asks_one_word_after_another():
    model, x = gpt(), experiment.task(FAMILY, 0)
    examples, asked = x[:3], x[3:40]
    for prompt in None, examples:
        found = experiment.evaluate(model, asked, examples, INVENTED, prompt is not None)
        right, nats, known = 0, 0., []
        for word, ending in asked.tolist():
            before = [BOS] + ([] if prompt is None else prompt.flatten().tolist()) + [word]
            with torch.no_grad():
                logits = model(torch.tensor([before]))[0, -1]
            right += logits.argmax().item() == ending
            if word % CLASSES in (examples[:, 0] % CLASSES).tolist():
                known.append(logits.argmax().item() == ending)
            nats -= logits.log_softmax(0)[ending].item()
        assert found["accuracy"] == pytest.approx(100 * right / len(asked))
        assert found["accuracy_shown"] == pytest.approx(100 * np.mean(known)) and 0 < len(known) < len(asked)
        assert found["loss"] == pytest.approx(nats / len(asked), rel=1e-4)


@pytest.mark.parametrize("method", experiment.RATES)
def test_tuning(method):
    """Changes only what the method trains, of a copy, and learns the examples."""
    base, args = gpt(), lora.Args(steps=40, weight_decay=.01)
    before, x = copy.deepcopy(base.state_dict()), experiment.task(FAMILY, 0)
    lr = max(experiment.RATES[method])
    model = experiment.tune(base, method, lr, x[:4], args, INVENTED)
    assert all(w.equal(before[name]) for name, w in base.state_dict().items()) and not model.training
    start, end = (experiment.evaluate(m, x[:4], x[:4], INVENTED)["loss"] for m in (base, model))
    assert end < start - dict(full=1., lora=.1, bitfit=.1, ia3=.01)[method]
    assert experiment.learn(base, method, lr, x, 4, args, INVENTED) == experiment.evaluate(model, x[4:], x[:4], INVENTED)
    changed = {name for name, w in lora.merge_and_unload(model).state_dict().items() if not w.equal(before[name])}
    if method == "bitfit":
        assert changed and all(name.endswith("bias") for name in changed)
    elif method != "full":
        assert changed and all(name.startswith("blocks.") for name in changed)
    else:
        assert "token_embed.weight" in changed


def test_learn_without_training():
    base, x = gpt(), experiment.task(HALF, 3)
    assert experiment.learn(base, "the base", 0., x, 5, None, INVENTED) == experiment.evaluate(base, x[5:], x[:5], INVENTED)
    assert experiment.learn(base, "in-context", 0., x, 5, None, INVENTED) == experiment.evaluate(base, x[5:], x[:5], INVENTED, True)


def test_the_base_learns_to_use_examples(tmp_path, monkeypatch):
    """With few classes it takes seconds: from the prompt it knows most of the endings of a new dialect."""
    for name, value in dict(CLASSES=4, WORDS=32, BOS=48, INVENTED=INVENTED._replace(BOS=48)).items():
        monkeypatch.setattr(experiment, name, value)
    args = lora.Args(**experiment.USUAL | dict(base_steps=150, base_batch=16, dim=32, heads=2, base_lr=1e-2), out=str(tmp_path),
                     device="cpu", dtype="float32")
    monkeypatch.setattr(experiment.texts, "__defaults__", (None, 16))
    base, about = experiment.pretrain(args)
    found = [experiment.learn(base, method, 0., experiment.task(FAMILY, 7), 12, args, experiment.INVENTED)["accuracy"]
             for method in ("the base", "in-context")]
    assert found[0] < 60 and found[1] > 80
    again, same = experiment.pretrain(args)                                        # it is kept
    assert same == about and all(w.equal(again.state_dict()[name]) for name, w in base.state_dict().items())


def gpt2(folder, context=80):
    """A folder of a GPT-2 with random weights, that model and its tokenizer."""
    vocab = bpe_folder(folder)
    model = random_weights(lora.GPT(len(vocab), context, 24, 2, 3))
    safetensors(folder / "model.safetensors", transformers_gpt2(model))
    (folder / "config.json").write_text('{"n_head": 3}')
    return model, common.BPE.load(folder)


def test_english(tmp_path):
    """Each word once, each class with four endings of its own; a line is one example, with a loss on its ending alone."""
    model, tokens = gpt2(tmp_path)
    language, x = experiment.english(tokens), experiment.task(experiment.WITH_BASE, 2)
    rows = language.rows(x)
    assert rows.shape[2] == language.longest and len({word for words in experiment.ENGLISH for word in words}) == WORDS
    by_class = {}
    for (word, ending), (row, target) in zip(x.tolist(), rows):
        line, asked = tokens.decode(row[row != tokens.BOS]), tokens.decode(target[target >= 0])
        assert line == f"{experiment.ENGLISH[word % CLASSES][word // CLASSES]}:{asked}\n" and len(asked) == 3
        by_class.setdefault(word % CLASSES, set()).add(asked)
    assert [len(found) for found in by_class.values()] == [1] * CLASSES and len(set.union(*by_class.values())) == CLASSES
    every = torch.tensor([[0, ending] for ending in range(WORDS, BOS)])
    assert len(set(map(str, language.rows(every).tolist()))) == BOS - WORDS


@pytest.mark.parametrize("in_context", [False, True])
def test_evaluate_asks_gpt2_one_word_after_another(tmp_path, in_context):
    model, tokens = gpt2(tmp_path)
    language, x = experiment.english(tokens), experiment.task(experiment.WITH_BASE, 0)
    found = experiment.evaluate(model, x[3:40], x[:3], language, in_context)
    text = lambda pair: (f"{experiment.ENGLISH[pair[0] % CLASSES][pair[0] // CLASSES]}:",
                         f" {'bdfghjklmnprstvz'[class_of(pair[1])]}{'aeio'[(pair[1] - WORDS) % 4]}")
    start = "".join(f"{word}{ending}\n" for word, ending in map(text, x[:3].tolist())) if in_context else ""
    nats, right = [], []
    for pair in x[3:40].tolist():
        word, ending = (tokens.encode(part) for part in text(pair))
        line = torch.cat([torch.tensor([tokens.BOS]), tokens.encode(start), word, ending])
        with torch.no_grad():
            logits = model(line[None, :-1])[0, -len(ending):]
        nats += (-logits.log_softmax(-1)[range(len(ending)), ending.long()]).tolist()
        right.append(logits.argmax(-1).equal(ending.long()))
    assert found["loss"] == pytest.approx(np.mean(nats), rel=1e-4) and found["accuracy"] == pytest.approx(100 * np.mean(right))


# ----------------------------------------------------------------------------------------- the program


def quick(*flags):
    experiment.main(experiment.options(["--quick", "--device", "cpu", *map(str, flags)]))


def figures(name="runs/quick-prompt-or-training.json"):
    return json.loads(open(name).read())["figures"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished quick run: its folder, its figures, and what it printed."""
    folder = tmp_path_factory.mktemp("prompt")
    process = conftest.run("--quick", "--device", "cpu", script="experiments/prompt_or_training.py", cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder, figures(folder / "runs/quick-prompt-or-training.json"), process.stdout


def test_quick(done):
    """All cells, once each, computed again here; tables of at most 80 columns; and the curves."""
    folder, found, text = done
    assert list(found["bases"]) == ["0", "1"] and len(set(found["bases"].values())) == 2
    args = lora.Args(**experiment.USUAL | experiment.QUICK, device="cpu", dtype="float32")
    bases = [lora.load_base(args, folder / f"runs/quick-prompt-or-training-{seed}/base")[0] for seed in (0, 1)]
    for kind in experiment.KINDS:
        assert list(found["rows"][kind]) == [*experiment.METHODS, "shown"]
        for method in experiment.METHODS:
            row = found["rows"][kind][method]
            assert list(row) == (["1", "4"] if method == "in-context" else ["1", "4", "64"])
            for k, seeds in row.items():
                assert all(len(values) == 2 for f in seeds.values() for values in f.values())
                lr = experiment.best(found, kind, method, k)
                if method in experiment.RATES:
                    tried = found["rates"][kind][method][k]
                    assert [*map(float, tried)] == list(experiment.RATES[method]) and tried[lr] == min(tried.values())
                args.seed, task = 1, experiment.task(kind, experiment.number(1, 1))
                ours = experiment.learn(bases[1], method, float(lr or 0), task, int(k), args, INVENTED)
                assert {name: values[1] for name, values in seeds["1"].items()} == ours
                assert found["rows"][kind]["shown"][k]["1"]["accuracy"][1] == experiment.shown(task, int(k))
    assert max(map(len, text.splitlines())) <= 80 and "Less loss than in-context, half outside: lora " in text
    assert common.mean_std(experiment.means(found, FAMILY, "full", 64), 0).replace(" +- ", " ±") in text
    assert (folder / "runs/quick-prompt-or-training.svg").read_text() == experiment.draw(found)


def test_a_published_base(tmp_path, done):
    """--base with GPT-2: every cell, the figures computed again here, and a run is refused."""
    base, tokens = gpt2(tmp_path / "gpt2")
    run = lambda *flags: conftest.run("--quick", "--k", 1, 4, 64, "--tasks", 1, "--seeds", 3, "--device", "cpu", *flags,
                                      script="experiments/prompt_or_training.py", cwd=tmp_path)
    process = run("--base", "gpt2/")
    assert process.returncode == 0 and "New dialects of English words" in process.stdout, process.stderr
    result = json.loads((tmp_path / "runs/quick-prompt-or-training-gpt2.json").read_text())
    assert result["command"].endswith("--base gpt2") and "dim" not in result["settings"] and result["settings"]["base"] == "gpt2"
    found, args = result["figures"], lora.Args(steps=3, weight_decay=.01, seed=3)
    (kind, rows), = found["rows"].items()
    assert [*rows] == [*experiment.METHODS, "shown"] and [*rows["in-context"]] == ["1", "4"]          # 64 do not fit
    for method, k in ("in-context", 4), ("lora", 1), ("full", 64):
        lr = float(experiment.best(found, kind, method, k) or 0)
        ours = experiment.learn(base, method, lr, experiment.task(kind, experiment.number(3, 0)), k, args, experiment.english(tokens))
        assert {name: [value] for name, value in ours.items()} == rows[method][str(k)]["3"]
    assert (tmp_path / "runs/quick-prompt-or-training-gpt2.svg").read_text() == experiment.draw(found)
    _, tokens = gpt2(tmp_path / "short", 5 * experiment.english(tokens).longest - 1)              # 4 fit, but not one more
    assert run("--base", "short").returncode == 0
    short = json.loads((tmp_path / "runs/quick-prompt-or-training-short.json").read_text())["figures"]["rows"][kind]
    assert [*short["in-context"]] == ["1"] and [*short["lora"]] == ["1", "4", "64"]
    again = run("--base", done[0] / "runs/quick-prompt-or-training-0/base")
    conftest.refused(again, 1, "is a run, which knows no English", script="prompt_or_training.py")


def test_the_same_command_does_nothing_twice(done, monkeypatch):
    folder, found, _ = done
    monkeypatch.chdir(folder)
    monkeypatch.setattr(experiment, "learn", None)
    monkeypatch.setattr(common, "machine", lambda device: "another machine")
    before = (folder / "runs/quick-prompt-or-training.json").read_text()
    quick()
    assert (folder / "runs/quick-prompt-or-training.json").read_text() == before and figures() == found


def test_what_was_stopped_continues(done, tmp_path, monkeypatch):
    """After it was stopped twice, and from fewer seeds and tasks: the figures of one run with all."""
    monkeypatch.chdir(tmp_path)
    learn, count = experiment.learn, []

    def stopped(*args):
        count.append(args)
        if len(count) in (20, 70):
            raise KeyboardInterrupt
        return learn(*args)
    monkeypatch.setattr(experiment, "learn", stopped)
    for flags in ("--seeds", 0, "--tasks", 1), ("--seeds", 0, "--tasks", 1):
        with pytest.raises(KeyboardInterrupt):
            quick(*flags)
        assert "rates" in figures()
    quick("--seeds", 0, "--tasks", 1)
    quick()
    rates, cells = 2 * 3 * sum(map(len, experiment.RATES.values())), 2 * (5 * 3 + 2)
    assert figures() == done[1] and rates + 4 * cells <= len(count) <= rates + 4 * cells + 2 * 8     # saved after every 8 rates


def test_figures_of_other_settings_are_never_overwritten(done, monkeypatch, tmp_path):
    folder, found, _ = done
    refuse = lambda status, *flags, words: conftest.refused(conftest.run(
        "--quick", *flags, script="experiments/prompt_or_training.py", cwd=folder), status, *words, script="prompt_or_training.py")
    refuse(1, "--k", 1, 2, words=["figures of another --k", "--out"])
    refuse(1, "--choose", 2, words=["figures of another --choose"])
    broken = tmp_path / "x.json"
    broken.write_text("[]")
    refuse(1, "--out", broken, words=["x.json is no file of prompt_or_training.py"])
    refuse(2, "--k", 97, words=["--k at most 96"])
    refuse(2, "--tasks", -1, words=["1 or more"])
    refuse(2, "--k", 1, 1, words=["each once"])
    refuse(2, "--sead", 1, words=["unknown flag --sead", "--seeds"])
    assert figures(folder / "runs/quick-prompt-or-training.json") == found and broken.read_text() == "[]"
    monkeypatch.chdir(folder)
    state = json.loads(open("runs/quick-prompt-or-training.json").read())
    state["figures"]["bases"]["0"] = "12345678"
    del state["figures"]["rows"][FAMILY]["lora"]
    (tmp_path / "y.json").write_text(json.dumps(state))
    (tmp_path / "z").symlink_to(folder / "runs")
    with pytest.raises(common.UserError, match="another base for seed 0"):
        quick("--out", tmp_path / "y.json")


def made(accuracy):
    """Figures of two tasks of a seed: accuracy {method: {k: their mean}} of both kinds; the two are 4 apart, and of
    methods other than in-context perhaps by `apart` more. Losses are the other way round."""
    def row(value, apart=0.):
        values = [value - 2. - apart, value + 2. + apart]
        return {"0": dict(accuracy=values, loss=[-x for x in values])}
    rows = {method: {str(k): row(*np.atleast_1d(value)) for k, value in ks.items()} for method, ks in accuracy.items()}
    return dict(k=[1, 2, 4, 8], rows={kind: rows for kind in experiment.KINDS})


def test_crossing():
    """From which k on a method is above; the longest prompt that fits stands for longer ones; once is not from there on,
    and what is within two standard errors of the differences is not above."""
    found = made({"in-context": {1: 10., 2: 20., 4: 50.}, "lora": {1: 11., 2: 19., 4: 60., 8: 70.},
                  "ia3": {1: 0., 2: 0., 4: 0., 8: 50.}, "bitfit": {1: 11., 2: 21., 4: (51., .6), 8: (51., .4)},
                  "full": {1: 11., 2: 21., 4: 49., 8: 51.}})
    for what in "accuracy", "loss":
        assert [experiment.crossing(found, FAMILY, m, what) for m in ("lora", "ia3", "bitfit", "full")] == [4, None, 8, 8]
    lines = list(experiment.crossings(found))
    assert lines[0] == "more often right than in-context, of the family: lora from k = 4, ia3 never, bitfit from k = 8, full from k = 8"
    assert lines[3].startswith("less loss than in-context, half outside: lora from k = 4")
    assert experiment.ahead(found, FAMILY, "bitfit", 4, "accuracy") == pytest.approx((1., .6))
    assert experiment.lead(found, FAMILY)[3] == ["bitfit", "+1 ±0", "+1 ±0", "+1 ±1", "+1 ±0"]
    assert experiment.lead(found, FAMILY)[2][-1] == "+0 ±0"


def test_best_rate():
    rates = {"lora": {"4": {"0.2": [0., math.nan], "0.1": [1., 3.], "0.3": [2., 1.5]}}}
    assert experiment.best(dict(rates={FAMILY: rates}), FAMILY, "lora", 4) == "0.3"
    assert experiment.best(dict(rates={FAMILY: rates}), FAMILY, "in-context", 4) == ""


# ------------------------------------------------------------------------------------------- curves.py


PANELS = [dict(title="left < right", x="k", y="% right", lines={"one": [(0, 10., 1.), (1, 20., 2.), (4, 30., 0.)],
                                                                "two": [(1, 5., 0.), (2, 0., 0.)]}),
          dict(title="right", x="k", y="% right", lines={"two": [(1, 100., 0.)], "three": [(2, 50., 5.)]})]


def drawn(*args, **how):
    """The elements of a chart: paths, circles and texts."""
    root = ElementTree.fromstring(curves.draw(*args, **how))
    tag = lambda name: [e for e in root.iter() if e.tag.endswith("}" + name)]
    return root, tag("path"), tag("circle"), tag("text")


def test_a_chart_shows_the_points():
    """Places in pixels are those of the values; bands are there where there is a spread; a name has one colour."""
    root, paths, circles, texts = drawn(PANELS, log2=True, y_ends=(0, 100))
    words = [t.text for t in texts]
    for expected in "left < right", "right", "k", "% right", "one", "two", "three", "100":
        assert expected in words, expected
    below = [t.text for t in texts if float(t.get("y")) == curves.TOP + curves.HIGH + 18]
    assert below == ["0", "1", "2", "4"] * 2
    at = [(float(c.get("cx")), float(c.get("cy")), c.get("class")) for c in circles]
    assert len(at) == 3 + 2 + 1 + 1 and [c[2] for c in at] == ["c0 f"] * 3 + ["c1 f"] * 3 + ["c2 f"]
    (x0, y0, _), (x1, y1, _), (x4, y4, _), (_, _, _), (x2, y2, _) = at[:5]
    assert y0 - y1 == pytest.approx(y1 - y4, abs=.2) and x1 - x0 == pytest.approx(x2 - x1, abs=.2)
    assert x4 - x2 == pytest.approx(x2 - x1, abs=.2) and y2 == curves.TOP + curves.HIGH       # 0 is at the bottom
    assert at[5][1] == curves.TOP and at[5][0] - x1 == pytest.approx(curves.WIDE + curves.GAP, abs=.2)
    bands = [p.get("d") for p in paths if p.get("class").endswith(" b")]
    assert len(bands) == 2
    numbers = [*map(float, re.findall(r"[\d.]+", bands[0]))]
    assert len(numbers) == 12 and numbers[1] == pytest.approx(y0 - curves.HIGH / 100, abs=.11)
    assert numbers[-1] == pytest.approx(y0 + curves.HIGH / 100, abs=.11)
    width, height = map(float, root.get("viewBox").split()[2:])
    assert all(0 <= float(t.get("x")) <= width and 0 <= float(t.get("y")) <= height for t in texts)


def test_a_chart_is_readable_on_light_and_dark_pages():
    text = curves.draw(PANELS)
    light, dark = text.split("@media(prefers-color-scheme:dark){")
    assert all(colour in light for colour in curves.LIGHT) and all(colour in dark for colour in curves.DARK)
    assert "background" not in text and "<rect" not in text and len(curves.LIGHT) == len(curves.DARK) == 8

    def luminance(colour):
        """As the Web Content Accessibility Guidelines define it."""
        rgb = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
        return np.where(rgb <= .04045, rgb / 12.92, ((rgb + .055) / 1.055) ** 2.4) @ [.2126, .7152, .0722]
    for colours, ground in (curves.LIGHT, "#ffffff"), (curves.DARK, "#0d1117"):
        for colour in colours:
            low, high = sorted([luminance(colour), luminance(ground)])
            assert (high + .05) / (low + .05) > 3, colour                           # 3: what graphics need


def test_more_lines_than_colours():
    lines = {f"line {i}": [(0, i, 0.), (1, i, 0.)] for i in range(10)}
    _, paths, _, texts = drawn([dict(title="", x="", y="", lines=lines)])
    shown = [(p.get("class"), p.get("stroke-dasharray")) for p in paths if p.get("stroke-width") == "2"]
    assert len(shown) == 20 and len(set(shown)) == 10 and shown[:10] == shown[10:]
    places = [(t.get("x"), t.get("y")) for t in texts if t.text and t.text.startswith("line")]
    assert len(set(places)) == 10 and len({y for _, y in places}) > 1               # the legend has several rows


@pytest.mark.parametrize("low, high, expected", [(0, 100, [0, 20, 40, 60, 80, 100]), (1.48, 1.93, [1.5, 1.6, 1.7, 1.8, 1.9]),
                                                 (-3, 3, [-3, -2, -1, 0, 1, 2, 3]), (0, .0011, [0, .0002, .0004, .0006, .0008, .001]),
                                                 (0, 0, [0])])
def test_ticks(low, high, expected):
    assert curves.ticks(low, high) == pytest.approx(expected)
