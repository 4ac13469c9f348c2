"""What the README says is true: its commands and its Python run, its figures are those of results/,
its links and names exist.

Run as a program (`make results`), it writes the figures of results/ into the README and docstrings.
"""
import ast
import importlib
import json
import re
import shlex
import statistics
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, ROOT, run

PAGES = ROOT / "README.md", ROOT / "results/README.md", ROOT / "experiments/README.md"
README, RESULTS, _ = (page.read_text() for page in PAGES)
TEMPLATES = (ROOT / "results/templates.md").read_text()

# ------------------------------------------------------------- results/, and figures taken from it


def load(pattern):
    """The measurements of results/ whose names fit a pattern, such as one for several seeds."""
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob(f"{pattern}"))]
    assert found, f"no results/{pattern}"
    return found


def number(values, digits=1):
    """Mean and, of several, the standard deviation."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def cell(runs, path, digits=1):
    """A figure, such as "accuracy/MAE, tune all/1", over runs: "" if it was not measured. One that is
    a list, of repeats in a run, counts as its mean, or, of a single run, as several. a=b is the first
    of a list of dicts whose a is b."""
    found = []
    for r in runs:
        value = r["figures"]
        for key in path.split("/"):
            name, equal, wanted = key.partition("=")
            if isinstance(value, dict) and key not in value:
                return ""
            if equal:
                value = next(x for x in value if x.get(name) == wanted)
            else:
                value = value[int(key) if isinstance(value, list) else key]
        found.append(value)
    if len(runs) == 1 and isinstance(found[0], list):
        (found,) = found
    return number([statistics.mean(x) if isinstance(x, list) else x for x in found], digits)


def filled(text):
    """A text with its {files: path of a figure: decimals} filled in, and {script: lines}."""
    text = re.sub(r"\{(\w+\.py): lines\}", lambda m: str(len((ROOT / m[1]).read_text().splitlines())), text)
    return re.sub(r"\{([^{}:]+): ([^{}:]+)(?:: (\d))?\}",
                  lambda m: cell(load(f"{m[1]}.json"), m[2], int(m[3] or 1)), text)


def where(r):
    """The machine and the versions of a measurement."""
    return f"{r['machine']}, {', '.join(map(' '.join, r['versions'].items()))}".replace("python", "Python")


def over(runs):
    """Of what the figures are a mean."""
    repeats = runs[0].get("settings", {}).get("repeats", 1)
    if len(runs) > 1:
        return f"Mean ± standard deviation over {len(runs)} seeds"
    return f"Mean ± standard deviation over {repeats} choices of the labels" if repeats > 1 else "One run"


def table(head, rows, align="---:"):
    """Rows of texts as Markdown."""
    rule = "|---|" + f"{align}|" * (len(head) - 1)
    lines = [f"| {' | '.join(row)} |" for row in [head, *rows]]
    return "\n".join([lines[0], rule, *lines[1:]])


# --------------------------------------------------------- blocks of the README: <!-- name files -->


def accuracies(patterns):
    """Accuracy of each encoder by labels per class and, of the shapes, of the colour."""
    rows = {}
    for runs in map(load, patterns.split(",")):
        figures = runs[0]["figures"]
        for who, row in figures["accuracy"].items():
            rows.setdefault(who, [cell(runs, f"accuracy/{who}/{i}") for i in range(len(row))])
    head = [f"{k} per class" if k else "all labels" for k in figures["labels"]]
    head = ["accuracy in %", *head, "colour, all labels"][:1 + max(map(len, rows.values()))]
    order = sorted(rows, key=lambda who: ("tune last" in who) + 2 * ("tune all" in who))
    parts = f"; the parts: {', '.join(figures['parts'])}" if "parts" in figures else ""
    note = f" {runs[0]['note']}." if "note" in runs[0] else ""
    return table(head, [[who, *rows[who]] for who in order]) + f"\n\n{over(runs)}{parts}; {where(runs[0])}.{note}"


COLUMNS = {   # script: (title, figure, digits) of each column
    "simclr.py": [("shape, 20 per class, %", "accuracy/SimCLR/2", 1),
                  ("shape, all labels, %", "accuracy/SimCLR/3", 1),
                  ("colour, all labels, %", "accuracy/SimCLR/4", 1)],
    "autoencoder.py": [("squared error", "error", 3),
                       ("shape, 20 per class, %", "accuracy/autoencoder/2", 1),
                       ("shape, all labels, %", "accuracy/autoencoder/3", 1),
                       ("colour, all labels, %", "accuracy/autoencoder/4", 1)],
    "mae.py": [("squared error", "error", 3)] + [
        (f"{how}, {k} per class, %", f"accuracy/MAE, {how}/{i}", 1)
        for how in ("linear probe", "tune all") for i, k in enumerate((20, 100))],
    "bert.py": [("right, %", "masked/accuracy", 1), ("perplexity", "masked/perplexity", 1),
                ("unigram baseline, %", "unigram/accuracy", 1),
                ("its perplexity", "unigram/perplexity", 1)],
    "gpt.py": [("nats per token", "loss", 3), ("bits per byte", "bits", 3)],
    "flamingo.py": [("captions, 1 figure", "right/caption, 1 figure/flamingo", 1),
                    ("LM, captions for images", "right/caption, 1 figure/captions", 1),
                    ("shape, unseen kinds", "right/shape, unseen kind/flamingo", 1),
                    ("unasked, 4 shots", "right/unasked question, 4/flamingo", 1),
                    ("new word, 4 shots", "right/new word, 4/flamingo", 1),
                    ("held-out word, 4 shots", "right/held-out word, 4/flamingo", 1)]}
PAPER = {"--optimizer adamw": "70.7", "--gate-start inf": "66.5", "--attend all": "63.5", "--no-freeze": "62.7",
         "--latents 0": "66.6", "--every 2": "68.2", "--every 4": "59.8"}


def options(r):
    """The flags of a measurement's command, without those that only say what is sampled, or a seed."""
    line = re.sub(r" --seed \d+| --length \d+| --(prompt|fill) '[^']*'| --fill .*?(?= --|$)", "", r["command"])
    return [flag.strip() for flag in re.findall(r"--[^-\s][^\s]*(?: (?!--)\S+)*", line)]


def variants(patterns):
    """A row for each choice of flags, over its seeds; the flags of the first row are not repeated."""
    groups = {}
    for r in (r for pattern in patterns.split(",") for r in load(pattern)):
        groups.setdefault(" ".join(options(r)), []).append(r)
    first, *_ = groups.values()
    script = first[0]["command"].split()[1]
    rows, counts = [], {len(runs) for runs in groups.values()}
    for runs in groups.values():
        own = options(runs[0])                              # of the first row only another optimizer
        own = [flag for flag in own if (flag not in options(first[0]) if rows else "optimizer" in flag)]
        flags = " ".join(own) or "as it is"
        row = [flags if flags == "as it is" else f"`{flags}`", *[str(len(runs))] * (len(counts) > 1)]
        row += [cell(runs, path, digits) for _, path, digits in COLUMNS[script]]
        rows.append(row + [PAPER.get(flags, "")] * (script == "flamingo.py"))
    head = [f"`{script}`", *["seeds"] * (len(counts) > 1), *(title for title, *_ in COLUMNS[script])]
    return table(head + ["the paper's score"] * (script == "flamingo.py"), rows) + (
        f"\n\n{over(first)}; {where(first[0])}.")


def shown(pattern):
    """What a model wrote, filled in, or said of images."""
    (r,) = load(pattern)
    f = r["figures"]
    text = f["text"].strip() if "text" in f else "\n\n".join(f["filled"]) if "filled" in f else "\n".join(f["lines"])
    return f"```text\n{text}\n```\n\n`{r['command']}`"


def adapted(patterns):
    """The loss after each way to adapt a GPT at each k, on the new or the old text (`new:`, `old:`)."""
    what, pattern = patterns.split(":")
    runs = load(pattern)
    f, how = runs[0]["figures"], runs[0]["settings"]
    ks = [k for k in how["k"] if k not in (2, 8)]                       # a page has to hold it
    rows = [["the base", "0", "0", *[cell(runs, f"start/{int(what == 'old')}", 3)] * len(ks)]]
    for method, row in f["rows"].items():
        one = list(row.values())[-1]
        trained, size = f"{one['trained'][0]:,}", f"{one['bytes'][0]:,}"
        size = size if one["trained"][0] else f"{how['example'] + 1} × k"
        trained += f" ({100 * one['trained'][0] / f['parameters']:.1f} %)" * (one["trained"][0] > 0)
        rows.append([method, trained, size, *(cell(runs, f"rows/{method}/{k}/{what}", 3) for k in ks)])
    head = [f"loss on {how['data'] if what == 'new' else f['old']}", "trained", "bytes"]
    if what == "old":                  # what is trained stands above, and in-context changes nothing
        head, rows = head[:1], [[row[0], *row[3:]] for row in rows if row[0] != "in-context"]
    return table(head + [f"k = {k}" for k in ks], rows) + (
        f"\n\nNats per token, mean ± standard deviation over {len(runs)} bases, each the mean of {how['repeats']} "
        f"choices of the examples (k = 2 and 8 are in results/); {where(runs[0])}.")


def searched(pattern):
    """Each way to adapt a GPT at the best of some learning rates."""
    (r,) = load(pattern)
    f, how, rows = r["figures"], r["settings"], []
    ks = [str(k) for k in how["k"][-2:]]
    for method, grid in f["rows"].items():
        rows.append([method, ", ".join(f"{float(lr):g}" for lr in sorted(grid, key=float))])
        for k in ks:
            best = min(grid, key=lambda lr: statistics.mean(grid[lr][k]["new"]))
            rows[-1] += [f"{float(best):g}", *(number(grid[best][k][text], 3) for text in ("new", "old"))]
    base = ["nothing (the base)", "", *["", *(f"{x:.3f}" for x in f["start"])] * len(ks)]
    head = ["what is trained", "learning rates tried"]
    head += [title for k in ks for title in (f"best, k = {k}", how["data"], f["old"])]
    return table(head, [base, *rows]) + (
        f"\n\nNats per token, mean ± standard deviation over {how['repeats']} choices of the examples, one base; the best "
        f"learning rate is the one with the least loss on new text. {where(r)}.")


def energy(pattern):
    """How many directions the change of a matrix has."""
    runs = load(pattern)
    f = runs[0]["figures"]
    rows = [[f"{method}, {name}", *(f"{100 * statistics.mean(r['figures']['energy'][method][name][i] for r in runs):.0f}"
                                    for i in range(len(f["counts"])))]
            for method in f["energy"] for name in f["energy"][method]]
    return table(["cumulative energy of the singular values, %", *map(str, f["counts"])], rows) + (
        "\n\nOf the 1, 2, 3 ... largest (squared, of the change of each matrix); mean over the blocks and "
        f"{len(runs)} bases, at k = {max(runs[0]['settings']['k'])}.")


TRIED = {   # script: what a search of its settings shows
    "bert.py": [("masked words right, %", "masked, accuracy", 1), ("tuned on 20 labels, %", "accuracy, BERT, tune all, 2", 1)],
    "gpt.py": [("nats per token", "loss", 3)],
    "mae.py": [("error", "error", 3), ("tuned on 100 labels, %", "accuracy, MAE, tune all, 0", 1)],
    "flamingo.py": [("captions of two figures, %", "right, caption, 2 figures", 1), ("new word from 4 images, %", "right, new word, 4", 1)]}


def tried(pattern):
    """The settings that experiments/search.py compared, on validation data."""
    rows = []
    for r in load(pattern):
        script = r["command"].split()[2]
        usual = f"`--muon-lr {r['settings']['muon_lr']:g} --weight-decay {r['settings']['weight_decay']:g}`"
        for row, found in r["figures"].items():
            rows.append([f"`{script}`", usual if row == "usual settings" else f"`{row}`", ", ".join(
                f"{what} {number(found[name], digits)}" for what, name, digits in TRIED[script])])
    return table(["", "settings", "what came out"], rows, "---") + (
        f"\n\nMean ± standard deviation over seeds {', '.join(map(str, r['seeds']))}; a row differs from the first of its script "
        f"in what it says; {where(r)}.")


WHO = {"flamingo": "Flamingo", "captions": "the LM, captions in place of images", "lm": "the LM alone",
       "majority": "most frequent answer"}
EPISODES = "new word", "new word of 3", "held-out word", "held-out word of 3", "unasked question"


def answered(pattern):
    """What Flamingo answers rightly, beside the LM and the most frequent answer."""
    runs = load(pattern)
    rows = [[group, *(cell(runs, f"right/{group}/{who}") for who in WHO)]
            for group in runs[0]["figures"]["right"] if not group.startswith(EPISODES)]
    return table(["exactly right, %", *WHO.values()], rows) + (
        f"\n\n{over(runs)}, {runs[0]['settings']['tests']} held-out scenes and as many of unseen kinds; {where(runs[0])}.")


def shots(pattern):
    """Answers after 0, 1, 2 ... examples."""
    runs = load(pattern)
    counts = runs[0]["figures"]["shots"]
    rows = [[f"{group}: {title}", *(cell(runs, f"right/{group}, {k}/{who}") for k in counts)]
            for group in EPISODES for who, title in WHO.items() if who != "majority"]
    return table(["exactly right, %", *(f"{k} shot{'s' * (k != 1)}" for k in counts)], rows) + (
        f"\n\n{over(runs)}, {runs[0]['settings']['tests']} episodes each; two new words per episode, or three. The one "
        "asked for was shown: at 1 shot it is enough to repeat it; where all were shown, chance is 50 %, or 33.")


def compared(pattern):
    """Three tables of experiments/compare.py."""
    runs = load(pattern)
    figures, chance, labels = runs[0]["figures"], runs[0]["chance"], runs[0]["settings"]["labels"]
    what, *others = chance
    head, tables = [f"{k} per class" if k else "all labels" for k in labels], []
    for part, title in ("linear", f"{what}, linear probe, %"), ("tune", f"{what}, all of it tuned, %"):
        tables.append(table([title, *head], [["chance", *[f"{chance[what]:.1f}"] * len(labels)]] + [
            [who, *(cell(runs, f"{part}/{who}/{i}") for i in range(len(labels)))] for who in figures[part]]))
    if others:
        tables.append(table(["linear probe, all labels, %", *chance], [["chance", *(f"{x:.1f}" for x in chance.values())]] + [
            [who, *(cell(runs, f"attributes/{who}/{name}") for name in chance)] for who in figures["attributes"]]))
    minutes = statistics.mean(r["seconds"] for r in runs) / 60
    return "\n\n".join(tables) + (
        f"\n\n`{runs[0]['command']}`; {over(runs)[0].lower()}{over(runs)[1:]}, each with its own choice of the labels; {minutes:.0f} minutes per "
        f"seed on {runs[0]['threads']} thread, beside another job; {where(runs[0])}.")


def speed(pattern):
    """Our time beside the other package's."""
    (bench,) = load(pattern)
    digits = lambda ms: f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}"
    rows = [[f["case"] + (f", beside {f['beside']}" if "beside" in f else ""), f["dtype"], digits(f["ours_ms"]),
             digits(f["theirs_ms"]), "{:.2f} [{:.2f} to {:.2f}]".format(f["ratio"], *f["quartiles"])]
            for f in bench["figures"] if "ours_ms" in f]
    return table(["what", "dtype", "ours, ms", "theirs, ms", "theirs / ours"], rows) + (
        f"\n\n{bench['threads']} threads; {where(bench)}.")


def memory(pattern):
    """Peak memory beside the other package's."""
    (bench,) = load(pattern)
    rows = [[what + (f", beside {f['beside']}" if not key else ""), f["dtype"], f"{f[f'ours{key}_mb']:.0f}",
             f"{f[f'theirs{key}_mb']:.0f}", f"{f[f'ratio{key}']:.2f}"] for f in bench["figures"] if "ours_mb" in f
            for what, key in (("the whole process", ""), ("of it after the imports", "_after_imports"))]
    return table(["peak memory", "dtype", "ours, MB", "theirs, MB", "theirs / ours"], rows)


def fastest(_):
    """The least and the greatest ratio of each benchmark; comparisons with our own code are left out."""
    what = dict(simclr="loss, augmentation", mae="a training step", bert="a training step", gpt="a training step, sampling",
                lora="a training step", flamingo="resampler and gated layer, decoding")
    rows = []
    for name in what:
        benches = [bench for bench in load(f"bench-{name}*.json") if "note" in bench]
        figures = [f for bench in benches for f in bench["figures"]
                   if "ours_ms" in f and f.get("beside") not in ("no cache", "NCHW")]
        low, high = (f"{f['ratio']:.2f} ({f['dtype']})" for f in (pick(figures, key=lambda f: f["ratio"]) for pick in (min, max)))
        peers = ", ".join(package for package in benches[0]["versions"] if package != "torch")
        rows.append([f"`{name}.py`", what[name], peers, f"{low} to {high}" + ", on two processors" * (len(benches) > 1)])
    return table(["", "what", "beside", "theirs / ours"], rows, "---")


def experiment(name):
    """A program of experiments/ as a module."""
    if str(ROOT / "experiments") not in sys.path:
        sys.path.insert(0, str(ROOT / "experiments"))
    return importlib.import_module(name)


def forgotten(file):
    """The old loss at the same new loss, as experiments/forgetting.py shows it."""
    (r,) = load(file)
    (head, *rows), _ = experiment("forgetting").table(r["figures"])
    return table(head, rows) + f"\n\n`{r['command']}`; {len(r['figures']['bases'])} bases; {where(r)}."


def prompted(file):
    """Examples in the prompt beside training, as experiments/prompt_or_training.py shows them."""
    (r,) = load(file)
    show = experiment("prompt_or_training")
    tables = []
    for kind in show.KINDS:
        head, *rows = show.table(r["figures"], kind, "accuracy")
        tables.append(table([f"right, %, {kind}; k =", *head[1:]], rows))
    return "\n\n".join(tables) + f"\n\n`{r['command']}`; {len(r['figures']['bases'])} bases; {where(r)}."


def texts(name):
    """A text of results/templates.md, with its figures."""
    return filled(re.search(rf"^# {name}\n\n(.*?)(?=\n\n# |\n*\Z)", TEMPLATES, re.S | re.M)[1])


def expect(name):
    """The lines of a script's docstring that say what its plain command gives."""
    runs = load(f"{name}-{'shapes' if name in ('simclr', 'autoencoder') else 'muon'}-*.json")
    most = max(r["threads"] for r in runs)                  # some seeds may have run on one, beside others
    seconds = lambda get: f"{statistics.median(get(r) for r in runs if r['threads'] == most):.0f} s"
    time = f"{seconds(lambda r: r['seconds'])} of training"
    if name == "lora":
        time = f"{seconds(lambda r: r['figures']['base_seconds'])} of training for the base, then a few seconds,"
    if name == "flamingo":
        runs = load("flamingo-plain-*.json")                # of the same runs, with the times of their first two trainings
        time = (f"{seconds(lambda r: sum(r['figures']['stages']))} of training for the LM and the ViT, then "
                f"{seconds(lambda r: r['seconds'])},")
    text = f"Expect   {texts(name)} ({len(runs)} seeds; {time} on {most} thread{'s' if most > 1 else ', beside other jobs'}; {where(runs[0])})"
    whole = re.sub(r"(?<=\d) (?=%)| (?=±)|(?<=±) ", "\a", text)                          # a figure stays on its line
    return textwrap.fill(whole, 100, subsequent_indent=" " * 9).replace("\a", " ")


BLOCKS = {f.__name__: f for f in (accuracies, variants, shown, adapted, searched, energy, tried, answered, shots, compared,
                                  speed, memory, fastest, forgotten, prompted, texts)}


def written(text):
    """The README with each <!-- name files --> ... <!-- end --> filled in anew."""
    fill = lambda m: f"<!-- {m[1]} {m[2]} -->\n\n{BLOCKS[m[1]](m[2])}\n\n<!-- end -->"
    return re.sub(r"<!-- (\w+) (\S+) -->.*?<!-- end -->", fill, text, flags=re.S)


def expected(text):
    """A script with the Expect line of its docstring filled in anew."""
    name = re.search(r"Run      python (\w+)\.py", text)[1]
    return re.sub(r"^Expect   .*?(?=\n\w)", lambda m: expect(name), text, count=1, flags=re.M | re.S)


def curves():
    """{results/compare-<data>.svg: its text}, of the runs of experiments/compare.py."""
    drawn = {}
    for data in "shapes", "fashion-mnist":
        runs = load(f"compare-{data}-*.json")
        chance = next(iter(runs[0]["chance"].values()))
        drawn[ROOT / f"results/compare-{data}.svg"] = experiment("compare").draw(
            runs[0]["settings"]["labels"], [r["figures"] for r in runs], chance, runs[0]["most"])
    (r,), (prompts,) = load("forgetting.json"), load("prompt-or-training.json")
    times = [float(x) for x in re.search(r"--times ([\d. ]+)", r["command"])[1].split()]
    drawn[ROOT / "results/forgetting.svg"] = experiment("forgetting").draw(r["figures"], times)
    drawn[ROOT / "results/prompt-or-training.svg"] = experiment("prompt_or_training").draw(prompts["figures"])
    return drawn


def test_figures_come_from_results(scripts):
    for page in PAGES:
        text = page.read_text()
        assert "<!-- end -->" in text
        assert written(text) == text, f"{page}: run `make results`"
    for script in scripts:
        text = (ROOT / script).read_text()
        assert expected(text) == text, f"{script}: run `make results`"


def test_curves_come_from_results():
    for path, text in curves().items():
        assert path.read_text() == text, f"{path.name}: run `make results`"


# ------------------------------------------------------------------------------------ commands


FENCES = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)]
COMMANDS = [line.split(" #")[0].strip() for block in FENCES for line in block.replace("\\\n", " ").splitlines()]
COMMANDS += re.findall(r"`(python [\w/]+\.py[^`]*)`", README + RESULTS)
QUICK = {   # added to a command, so that it takes seconds
    "mae.py": "--steps 2 --batch 8 --tune-steps 2 --labels 1 --dim 16 --heads 1 --depth 1 --decoder-depth 1",
    "simclr.py": "--steps 2 --batch 8 --labels 1 --width 8 --depth 10 --image-size 12",
    "autoencoder.py": "--steps 2 --batch 8 --labels 1 --width 4 --latent 4 --k 4 --image-size 12",
    "bert.py": "--steps 2 --labels 1 --tune-steps 2 --dim 16 --heads 2 --depth 1",
    "gpt.py": "--steps 2 --length 9 --dim 16 --heads 2 --depth 1",
    "lora.py": "--base-steps 2 --base-batch 2 --dim 16 --heads 2 --depth 2 --context 60 --k 1 --epochs 1 --length 9",
    "flamingo.py": "--lm-steps 2 --lm-batch 2 --vit-steps 2 --vit-batch 2 --steps 2 --batch 2 --dim 16 --heads 2 --depth 2 "
                   "--images 500 --vit-dim 8 --vit-heads 2 --vit-depth 1 --tests 12 --shots 0 1",
    "experiments/adapt.py": "--quick --k 1 2 --repeats 1 --base-steps 2 --context 60 --epochs 1"}
QUICK["experiments/search.py"] = "--quick --seeds 0"
QUICK["experiments/forgetting.py"] = "--quick --k 4 --seeds 0"
QUICK["experiments/prompt_or_training.py"] = "--quick --k 1 2 --seeds 0 --tasks 1 --choose 1"
QUICK["experiments/few_shot.py"] = f"--quick --seeds 0 -- {QUICK['flamingo.py']}"


def different(lines):
    """The lines, one of those that are the same command with the flags of QUICK and any optimizer."""
    found = {}
    for line in lines:
        words = shlex.split(line)
        key = " ".join(words)
        for flag in ["--optimizer", "--weight-decay", *re.findall(r"--[a-z-]+", QUICK.get(words[1], ""))]:
            key = re.sub(rf" {flag}( (?!--)\S+)*(?= --|$)", "", key)
        found.setdefault(key, line)
    return sorted(found.values())


COMMANDS = different(line for line in COMMANDS if line.startswith("python "))


def test_there_are_commands():
    assert len(COMMANDS) >= 50 and any("--mask-ratio 0.75" in c for c in COMMANDS)


def own(path):
    """What the README calls my-...: images as .npz, a text, a folder of texts; of pictures, where Pillow is."""
    r = np.random.default_rng(0)
    if path.suffix == ".npz":
        x, y = r.integers(0, 256, (160, 16, 16, 3), np.uint8), np.arange(160) % 2
        np.savez(path, x_train=x[:100], y_train=y[:100], x_test=x[100:], y_test=y[100:])
    elif path.suffix == ".txt":
        path.write_text(README)
    elif path.name == "my-texts":
        path.mkdir()
        for script in ROOT.glob("*.py"):
            (path / f"{script.stem}.txt").write_text(script.read_text())
    else:
        image = pytest.importorskip("PIL.Image")
        for i in range(160):
            folder = path if path.name == "my-photos" else path / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image.fromarray(r.integers(0, 256, (70, 80, 3), np.uint8)).save(folder / f"{i}.png")
    return path


def quick(script, folder, *flags):
    """A run of a script that takes seconds, in a folder of its own."""
    added = QUICK.get(script, "").split()
    if script == "experiments/repeat.py":
        at = flags.index("--") if "--" in flags else len(flags)
        flags, added = flags[:at], ["--seeds", 0, "--quick", "--", *flags[at + 1:], *QUICK[flags[0]].split()]
    done = run(*flags, *added, script=script, most=300, cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", COMMANDS)
def test_command_runs(line, tmp_path):
    script, *flags = shlex.split(line)[1:]
    if script == "common.py":                                            # the table of all runs
        done = run(script=script, cwd=tmp_path)
        assert done.returncode == 1 and "There is no finished run under runs/ yet" in done.stderr
        return
    if flags == ["--help"]:
        assert run(*flags, script=script).stdout.startswith(f"usage: {script}")
        return
    if script == "experiments/compare.py":                               # minutes, whatever the flags
        experiment("compare").options(flags)
        return
    for name in re.findall(r"(?<!--out )runs/(\w+)", line):              # of the other's plain command
        quick(f"{name}.py", tmp_path)
    if "--data" in flags:
        at = flags.index("--data") + 1
        kept = DATA / {"shakespeare": "tinyshakespeare.txt"}.get(flags[at], flags[at])
        if flags[at].startswith("my-"):
            own(tmp_path / flags[at])
        elif flags[at] not in ("shapes", "pydocs", "pycode") and not kept.exists():
            pytest.skip(f"{flags[at]} is not here")
        flags += ["--data-dir", DATA]
    if "--weights" in flags:                                             # tests/test_weights.py has such files
        done = run(*flags, script=script, cwd=tmp_path)
        assert done.returncode == 1 and "holds no weights. Fetch" in done.stderr, done.stderr
        return
    if "--resume" in flags or flags == ["runs/flamingo"]:                # of a run, with its settings
        "--resume" in flags and quick(script, tmp_path)
        done = run(*flags, script=script, most=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("Continuing from step" in done.stdout) == ("--resume" in flags and "--fill" not in flags)     # it only answers
    else:
        quick(script, tmp_path, *flags)
    assert any('"figures"' in path.read_text() for path in tmp_path.rglob("*.json"))


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 260


# -------------------------------------------------------------------------------------- Python


def block(words):
    """The one Python block of the README with these words in it."""
    (found,) = (text for text in re.findall(r"```python\n(.*?)```", README + RESULTS, re.S) if words in text)
    return found


def test_the_loop_is_that_of_main():
    loops = [node for node in ast.walk(ast.parse((ROOT / "mae.py").read_text())) if isinstance(node, ast.For)]
    assert ast.unparse(ast.parse(block("for step in run:"))) in map(ast.unparse, loops)


@pytest.mark.parametrize("script", [script for script in QUICK if "/" not in script])
def test_main_can_be_called(script, tmp_path):
    """main(Args(...)) returns the model that the README names; the command line continues the run."""
    import common
    name = script.removesuffix(".py")
    given = vars(common.parser_of(importlib.import_module(name).Args).parse_args(QUICK[script].split()))
    lines = block("mae.main(").replace("mae", name)
    assert "steps=200" in lines
    lines = lines.replace("steps=200", ", ".join(f"{key}={value!r}" for key, value in given.items()))
    (tmp_path / "notebook.py").write_text(f"{lines}\nprint(type(model).__name__, model.training)")
    done = run(script=tmp_path / "notebook.py", most=300, cwd=tmp_path)
    kind = dict(simclr="SimCLR", autoencoder="Autoencoder", bert="BERT", mae="MAE", flamingo="Flamingo").get(name, "GPT")
    assert done.returncode == 0 and done.stdout.endswith(f"{kind} False\n"), done.stderr
    assert re.search(rf"returns the trained model.{{,150}}`{kind}`", README, re.S)
    done = run("--resume", script=script, most=300, cwd=tmp_path)
    assert done.returncode == 0 and re.search(rf"^Continuing from step [12] of runs/{name}/", done.stdout, re.M), done.stderr


def test_what_was_learned_can_be_used(tmp_path, monkeypatch):
    """The lines that read a checkpoint, on a run's own: the features are those that its probe reads."""
    import torch
    quick("mae.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = dict(x=torch.rand(3, 3, 32, 32))
    exec(block("read_checkpoint"), names)
    weights, encoder = names["state"]["model"], names["model"].encoder
    assert all(torch.equal(value, weights[f"encoder.{name}"]) for name, value in encoder.state_dict().items())
    about = names["state"]["about"]
    x = (names["x"] - torch.tensor(about["mean"]).view(3, 1, 1)) / torch.tensor(about["std"]).view(3, 1, 1)
    tokens = encoder(names["mae"].patchify(x, 4))
    assert torch.allclose(names["h"], tokens[:, 1:].mean(1), atol=1e-6) and names["h"].shape == (3, 16)
    for script, features in ("simclr", "encoder"), ("autoencoder", "encode"):
        assert f"model.eval().{features}`" in README and f": model.{features}}}" in (ROOT / f"{script}.py").read_text()


# ---------------------------------------------------------------------------- links and names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    titles = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)}
    anchors = re.findall(r"\]\(#([^)]+)\)", text)
    assert set(anchors) <= titles, set(anchors) - titles
    assert page != PAGES[1] or links and len(anchors) > 9
    for target in links:
        assert target.startswith("http") or (page.parent / target).exists(), target
    for file, anchor in re.findall(r"\]\((\w[\w/]*\.md)#([^)]+)\)", text):
        assert f"#{anchor})" in (page.parent / file).read_text(), anchor
    for name in re.findall(r"`([\w/]+\.(?:py|txt))`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(results/[^`]+)`", text):
        assert list(ROOT.glob(name)), name
    for name in re.findall(r'make test ARGS="-k (\w+)"', text):
        assert re.search(rf"def test_\w*{name}", "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))), name
    for name in re.findall(r"make (\w+)", text):
        assert re.search(rf"^({name}:|SCRIPTS =.*\b{name}\b)", (ROOT / "Makefile").read_text(), re.M), name


def test_names_exist():
    """Of the reading path and of the table from the lecture to the code: each name is in the file before it."""
    parts = re.findall(r"^\d\. `([\w/]+\.py)`(.*?)(?=\n\d\. |\n\n)", README, re.M | re.S)
    parts += [part for line in re.findall(r"^\|.*", README, re.M)
              for part in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, (?:and )?)?)+)", line)]
    assert len(parts) > 20
    for name, rest in parts:
        source = (ROOT / name).read_text()
        for part in re.findall(r"`([\w.]+)`", rest):
            for word in part.split("."):
                assert re.search(rf"^ *(def|class) {word}\b", source, re.M), (name, part)


if __name__ == "__main__":
    for path in *PAGES, *sorted(ROOT.glob("[!c]*.py")):
        path.write_text((written if path.suffix == ".md" else expected)(path.read_text()))
    for path, text in curves().items():
        path.write_text(text)
