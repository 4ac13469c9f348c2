"""What the README says is true: its commands run, its figures are those of results/, its links exist.

Run as a program (`make results`), it writes the figures of results/ into the README and the docstrings.
"""
import json
import re
import shlex
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, ROOT, run

PAGES = ROOT / "README.md", ROOT / "benchmarks/README.md"
README = PAGES[0].read_text()
FENCES = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = [line.split(" #")[0].strip() for block in FENCES for line in block.replace("\\\n", " ").splitlines()
            if line.startswith("python ")] + re.findall(r"`(python \w+\.py[^`]*)`", README)
COMMANDS = sorted({" ".join(shlex.quote(word) for word in shlex.split(line)): line for line in COMMANDS}.values())    # each once
QUICK = {   # added to a command, so that it takes seconds
    "mae.py": "--steps 2 --tune-steps 2 --labels 1 --draws 1 --dim 16 --heads 1 --depth 1",
    "simclr.py": "--steps 2 --labels 1 --draws 1 --width 8 --depth 10 --image-size 12",
    "autoencoder.py": "--steps 2 --labels 1 --draws 1 --width 4 --code 4 --keep 4 --image-size 12",
    "bert.py": "--steps 2 --labels 1 --draws 1 --tune-steps 2 --dim 16 --heads 2 --depth 1",
    "gpt.py": "--steps 2 --length 9 --dim 16 --heads 2 --depth 1",
    "flamingo.py": "--lm-steps 2 --lm-batch 2 --eye-steps 2 --eye-batch 2 --steps 2 --batch 2 --dim 16 --heads 2 --depth 2 --images 500 "
                   "--eye-dim 8 --eye-heads 2 --eye-depth 1 --tests 12 --latents 2 --shots 0 1",
    "lora.py": "--base-steps 2 --base-batch 2 --dim 16 --heads 2 --depth 2 --context 60 --k 1 --passes 1 --draws 1 --length 9"}


def spread(values):
    text = f"{statistics.mean(values):.1f}"
    return f"{text} ± {statistics.stdev(values):.1f}" if len(values) > 1 else text


def load(pattern):
    """The measurements of results/ that fit a pattern, one of them twice or more for several seeds."""
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob(pattern))]
    assert found, f"no results/{pattern}"
    return found


def few_labels(patterns):
    """Accuracy by label count, over seeds and draws; later patterns add the rows that earlier lack."""
    lines, seen = [], set()
    for pattern in reversed(patterns.split(",")):
        runs = load(pattern)
        figures = [r["figures"] for r in runs]
        labels = figures[0]["labels"]
        for i, who in enumerate(figures[0]["accuracy"]):
            cells = [spread([v for f in figures for v in f["accuracy"][who][j]]) for j in range(len(labels))]
            line = f"| {who} | " + " | ".join(cells) + " |"
            assert (line in lines) == (who in seen), f"two measurements of {who} differ"
            if who not in seen:
                lines.append(line)
            seen.add(who)
    lines.sort(key=lambda line: [line.count(f", {how} ") for how in ("linear", "tune last", "tune all")][::-1])
    lines = ["| accuracy in % | " + " | ".join(f"{k} a class" for k in labels) + " |",
             "|---|" + "---:|" * len(labels)] + lines
    n = len(figures) * len(figures[0]["accuracy"]["MAE, linear"][0])
    how = "pre-training seeds" if len(figures) > 1 else "draws of the labelled images and of the head's batches"
    lines.append(f"\nMean ± standard deviation over {n} {how}; {runs[0]['machine']}, torch "
                 f"{runs[0]['versions']['torch']}; training took "
                 f"{statistics.mean(r['seconds'] for r in runs) / 60:.1f} minutes.")
    return "\n".join(lines)


def ratios(patterns):
    """MAE by how much is hidden: a line for each pattern, over its seeds."""
    groups = [load(pattern) for pattern in patterns.split(",")]
    whats = [(who, i) for who in ("MAE, linear", "MAE, tune all") for i in (0, 1)]
    head = [f"{who.removeprefix('MAE, ')}, {groups[0][0]['figures']['labels'][i]} a class, %" for who, i in whats]
    lines = ["| hidden | squared error | " + " | ".join(head) + " |", "|---:|" + "---:|" * 5]
    for runs in groups:
        cells = [number([r["figures"]["error"] for r in runs], 3)]
        cells += [over_seeds(runs, lambda f: f["accuracy"][who][i]) for who, i in whats]
        lines.append(f"| {100 * runs[0]['settings']['mask_ratio']:.0f} % | " + " | ".join(cells) + " |")
    assert len({len(runs) for runs in groups}) == 1
    return "\n".join(lines) + "\n" + measured_on(runs, "seeds")


def speed(pattern):
    """Our time beside the other package's."""
    (bench,) = load(pattern)
    lines = ["| what | dtype | ours, ms | theirs, ms | theirs / ours |", "|---|---|---:|---:|---:|"]
    digits = lambda ms: f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}"
    for f in (f for f in bench["figures"] if "ours_ms" in f):
        low, high = f["quartiles"]
        name = f["case"] + (f", beside {f['beside']}" if "beside" in f else "")
        lines.append(f"| {name} | {f['dtype']} | {digits(f['ours_ms'])} | {digits(f['theirs_ms'])} "
                     f"| {f['ratio']:.2f} [{low:.2f} to {high:.2f}] |")
    versions = ", ".join(f"{name} {version}" for name, version in bench["versions"].items())
    lines.append(f"\n{bench['machine']}, {bench['threads']} threads, {versions}.")
    return "\n".join(lines)


def fastest(_):
    """The least and the most ratio of each benchmark, all cases and dtypes; what is beside our own code is left out."""
    lines = ["| | what | beside | theirs / ours |", "|---|---|---|---:|"]
    what = dict(simclr="loss, augmentation", mae="a training step", bert="a training step", gpt="a training step, sampling",
                lora="a training step", flamingo="resampler and gated layer, decoding")
    for name in what:
        benches = [bench for bench in load(f"bench-{name}*.json") if "plain" not in bench["command"]]
        figures = [f for bench in benches for f in bench["figures"] if "ours_ms" in f and f.get("beside") not in ("no cache", "NCHW")]
        peers = ", ".join(package for package in benches[0]["versions"] if package != "torch")
        low = min(figures, key=lambda f: f["ratio"])
        high = max(figures, key=lambda f: f["ratio"])
        where = ", on two processors" * (len(benches) > 1)
        lines.append(f"| `{name}.py` | {what[name]} | {peers} | {low['ratio']:.2f} ({low['dtype']}) to {high['ratio']:.2f} ({high['dtype']}){where} |")
    return "\n".join(lines)


def over_seeds(runs, get):
    """Mean and spread over runs of get(figures), a list of draws each."""
    return spread([statistics.mean(get(r["figures"])) for r in runs])


def measured_on(runs, what):
    """The line under a table."""
    return (f"\nMean ± standard deviation over {len(runs)} {what} (the draws of the few labels are the same in each); {runs[0]['machine']}, torch "
            f"{runs[0]['versions']['torch']}.")


def knows(patterns):
    """Who knows what: the class at each label count, then what else is there, with all labels."""
    lines = []
    for pattern in patterns.split(","):
        runs = load(pattern)
        figures = runs[0]["figures"]
        rows = figures["accuracy"]
        what, *others = [name for name in rows["raw pixels"]]
        if not lines:
            head = [f"{k} a class" if k else "all labels" for k in figures["labels"]]
            lines = [f"| {what}, accuracy in % | " + " | ".join(head + [f"{name}, all" for name in others]) + " |",
                     "|---|" + "---:|" * (len(head) + len(others))]
        for who in rows:
            if who == "raw pixels" and len(lines) > 2:
                continue
            name = f"{who} {list(rows)[1].split()[1]}" if who == "supervised" else who
            cells = [over_seeds(runs, lambda f: f["accuracy"][who][what][k]) for k in range(len(figures["labels"]))]
            cells += [over_seeds(runs, lambda f: f["accuracy"][who][other][0]) for other in others]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + measured_on(runs, "seeds")


def while_training(pattern):
    """The autoencoder's error and what probes read, along the way."""
    runs = load(pattern)
    what = list(runs[0]["figures"]["accuracy"]["raw pixels"])
    lines = [f"| step | squared error | {what[0]}, 20 a class, % | {what[1]}, all labels, % |", "|---:|---:|---:|---:|"]
    for step in runs[0]["figures"]["notes"]:
        error = statistics.mean(r["figures"]["notes"][step]["error"] for r in runs)
        cells = [over_seeds(runs, lambda f: f["notes"][step]["probes"][i]) for i in (0, 1)]
        lines.append(f"| {step} | {error:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + measured_on(runs, "seeds")


def flags(patterns):
    """One line for each choice of flags, over its seeds."""
    groups = [load(pattern) for pattern in patterns.split(",")]
    priced, labels = "error" in groups[0][0]["figures"], groups[0][0]["figures"]["labels"]
    ours = lambda f: f["accuracy"]["autoencoder" if priced else "SimCLR"]
    lines = ["| `" + re.search(r"\w+\.py", groups[0][0]["command"])[0] + "` |" + " squared error |" * priced
             + " shape, 20 a class, % | shape, all labels, % | colour, all labels, % |", "|---|" + "---:|" * (3 + priced)]
    for runs in groups:
        cells = [number([r["figures"]["error"] for r in runs], 3)] if priced else []
        cells += [over_seeds(runs, lambda f: ours(f)["shape"][labels.index(k)]) for k in (20, 0)]
        cells.append(over_seeds(runs, lambda f: ours(f)["colour"][0]))
        lines.append(f"| {' '.join(plain(runs[0]).split()[2:]) or 'as it is'} | " + " | ".join(cells) + " |")
    assert len({len(runs) for runs in groups}) == 1
    return "\n".join(lines) + "\n" + measured_on(runs, "seeds")


def plain(r):
    """The command of a run, without what differs between seeds."""
    return re.sub(r" --seed \d+", "", r["command"])


def number(values, digits):
    """Mean, and the standard deviation of several."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def losses(patterns):
    """GPT's loss on new text or images, a line for each pattern, over its seeds."""
    lines = ["| `gpt.py` | seeds | nats a token | bits a byte |", "|---|---:|---:|---:|"]
    for pattern in patterns.split(","):
        runs = load(pattern)
        cells = [number([r["figures"][key] for r in runs], 3) for key in ("loss", "bits")]
        command = re.sub(r" --prompt '[^']*'| --length \d+", "", plain(runs[0]))
        lines.append(f"| {' '.join(command.split()[2:]) or 'as it is'} | {len(runs)} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + (f"\n\nMean ± standard deviation; chance is ln 257 = 5.549 nats, 8.006 bits a token. {runs[0]['machine']}, torch "
                              f"{runs[0]['versions']['torch']}, Python {runs[0]['versions']['python']}.")


def sampled(pattern):
    """What a GPT wrote."""
    (r,) = load(pattern)
    return f"```text\n{r['figures']['text'].strip()}\n```\n\n`{r['command']}`, validation loss {r['figures']['loss']:.3f} nats."


def blanks(pattern):
    """What a BERT filled in."""
    (r,) = load(pattern)
    text = "\n\n".join(r["figures"]["blanks"])
    return f"```text\n{text}\n```\n\n`{r['command']}`, {r['seconds'] / 60:.0f} minutes on {r['threads']} thread{'s' * (r['threads'] > 1)}."


def hidden(patterns):
    """BERT's guesses of hidden words, a line for each pattern, over its seeds."""
    lines = ["| `bert.py` | seeds | right, % | perplexity | by frequency alone, % | its perplexity |", "|---|" + "---:|" * 5]
    for pattern in patterns.split(","):
        runs = load(pattern)
        cells = [number([r["figures"][who][key] for r in runs], 1) for who in ("masked", "frequency") for key in ("accuracy", "perplexity")]
        command = re.sub(r' --fill "[^"]*"| --fill .*?(?= --|$)', "", plain(runs[0]))
        lines.append(f"| {' '.join(command.split()[2:]) or 'as it is'} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + (f"\n\nMean ± standard deviation. {runs[0]['machine']}, torch {runs[0]['versions']['torch']}, "
                              f"Python {runs[0]['versions']['python']}.")


def fine_tuned(patterns):
    """Which part is a passage from? A table for BERT's few labels, over seeds."""
    runs = load(patterns)
    figures = [r["figures"] for r in runs]
    labels = figures[0]["labels"]
    lines = ["| accuracy in % | " + " | ".join(f"{k} a class" for k in labels) + " |", "|---|" + "---:|" * len(labels),
             "| always the same part | " + " | ".join([f"{figures[0]['majority']:.1f}"] * len(labels)) + " |"]
    for who in figures[0]["accuracy"]:
        if len(runs) > 1:
            cells = [over_seeds(runs, lambda f: f["accuracy"][who][i]) for i in range(len(labels))]
        else:
            cells = [spread(figures[0]["accuracy"][who][i]) for i in range(len(labels))]
        lines.append(f"| {who} | " + " | ".join(cells) + " |")
    how = f"{len(runs)} seeds" if len(runs) > 1 else f"{len(figures[0]['accuracy'][who][0])} draws of the labelled passages"
    return "\n".join(lines) + (f"\n\nMean ± standard deviation over {how}; the parts: {', '.join(figures[0]['parts'])}. "
                              f"{runs[0]['machine']}, torch {runs[0]['versions']['torch']}." + (f" {runs[0]['note']}." if "note" in runs[0] else ""))


def lora_table(rows, ks, note):
    """rows: [name, then for each k a list of losses, one a base or a draw] as a table."""
    lines = ["| " + " | ".join(note) + " |" + "".join(f" k = {k} |" for k in ks), "|---|" + "---:|" * (len(note) - 1 + len(ks))]
    lines += ["| " + " | ".join([*names, *(number(cell, 3) if cell else "" for cell in cells)]) + " |" for *names, cells in rows]
    return "\n".join(lines)


def of_base(runs, method, k, what):
    """Of runs of lora.py, the mean over the draws of each run: a list; empty where it was not done."""
    if method == "the base":
        return [r["figures"]["start"][what == "old"] for r in runs]
    return [statistics.mean(r["figures"]["rows"][method][str(k)][what]) for r in runs if str(k) in r["figures"]["rows"][method]]


def adapted(patterns):
    """The losses that each method of lora.py gives at each k, on the new or the old text (`new:`, `old:`)."""
    what, pattern = patterns.split(":")
    runs = load(pattern)
    f, how = runs[0]["figures"], runs[0]["settings"]
    ks = [k for k in how["k"] if k not in (2, 8)]                                  # a page has to hold it
    rows = [["the base", "0", "0", [of_base(runs, "the base", k, what) for k in ks]]]
    for method, row in f["rows"].items():
        one = list(row.values())[-1]
        share = f" ({100 * one['trained'][0] / f['parameters']:.1f} %)" if one["trained"][0] else ""
        size = f"{one['bytes'][0]:,}" if one["trained"][0] else f"{how['example']} × k"
        rows.append([method, f"{one['trained'][0]:,}{share}", size, [of_base(runs, method, k, what) for k in ks]])
    if what == "old":                                  # what is trained stands above, and the prompt leaves the base as it is
        rows = [[row[0], row[-1]] for row in rows if row[0] != "prompt"]
    text = lora_table(rows, ks, [f"loss on {how['data'] if what == 'new' else f['old']}", "trained", "bytes"][:len(rows[0]) - 1])
    return (f"{text}\n\nNats a token, mean ± standard deviation over {len(runs)} bases, each the mean of {how['draws']} draws of the examples (k = 2 and 8 are in results/); "
            f"{runs[0]['machine']}, torch {runs[0]['versions']['torch']}, Python {runs[0]['versions']['python']}.")


def searched(pattern):
    """Each method at the best of some learning rates: [new, old] for each k."""
    (r,) = load(pattern)
    ks, lines = r["ks"][-2:], []
    for method, grid in r["figures"].items():
        cells = []
        for k in map(str, ks):
            best = min(grid, key=lambda lr: statistics.mean(grid[lr][k]["new"]))
            cells.append(f"{float(best):g} | {number(grid[best][k]['new'], 3)} | {number(grid[best][k]['old'], 3)}")
        lines.append(f"| {method} | {', '.join(f'{float(lr):g}' for lr in sorted(grid, key=float))} | " + " | ".join(cells) + " |")
    head = "| what is trained | learning rates tried |" + "".join(f" best, k = {k} | {r['data']} | {r['old']} |" for k in ks)
    start = f"| nothing (the base) | |" + "".join(f" | {r['start'][0]:.3f} | {r['start'][1]:.3f} |" for k in ks)
    return "\n".join([head, "|---|---|" + "---:|" * (3 * len(ks)), start, *lines]) + (
        f"\n\nNats a token, mean ± standard deviation over {r['draws']} draws of the examples, one base; the best learning rate is the one "
        f"with the least loss on new text. {r['machine']}, torch {r['versions']['torch']}, Python {r['versions']['python']}.")


def directions(pattern):
    """How many directions an update really uses."""
    runs = load(pattern)
    f = runs[0]["figures"]
    lines = ["| share of the update's squared length, % |" + "".join(f" {n} |" for n in f["counts"]), "|---|" + "---:|" * len(f["counts"])]
    for method in f["shares"]:
        for name in f["shares"][method]:
            cells = [f"{100 * statistics.mean(r['figures']['shares'][method][name][i] for r in runs):.0f}" for i in range(len(f["counts"]))]
            lines.append(f"| {method}, {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + (f"\n\nIn its 1, 2, 3 ... most important directions (squared singular values); mean over the blocks and {len(runs)} bases, at k = {max(runs[0]['settings']['k'])}.")


EPISODES = "new words", "kept words", "answers"


def answered(pattern):
    """What flamingo.py answers rightly, beside the LM told in words, the LM alone and the most frequent answer."""
    runs = load(pattern)
    right = [r["figures"]["right"] for r in runs]
    lines = ["| right to the word, % | Flamingo | the LM, told in words | the LM alone | most frequent |", "|---|" + "---:|" * 4]
    for group in (g for g in right[0] if not g.startswith(EPISODES)):
        cells = [number([r[group][who] for r in right], 1) if who in right[0][group] else ""
                 for who in ("flamingo", "told", "lm", "majority")]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    seeds = f"mean ± standard deviation over {len(runs)} seeds" if len(runs) > 1 else "one run"
    return "\n".join(lines) + (f"\n\n{seeds.capitalize()}, {runs[0]['settings']['tests']} held-out scenes and as many of unseen kinds; "
                              f"{runs[0]['machine']}, torch {runs[0]['versions']['torch']}.")


def shots(pattern):
    """Answers after 0, 1, 2 ... examples."""
    runs = load(pattern)
    f = runs[0]["figures"]
    lines = ["| right to the word, % |" + "".join(f" {k} shot{'s' * (k != 1)} |" for k in f["shots"]), "|---|" + "---:|" * len(f["shots"])]
    for name, what in zip(EPISODES, ("its new word", "its new word, one kept back", "a question that is not asked")):
        for who, title in ("flamingo", "Flamingo"), ("told", "the LM, told in words"), ("lm", "the LM alone"):
            cells = [number([r["figures"]["right"][f"{name}, {k}"][who] for r in runs], 1)
                     if who in f["right"].get(f"{name}, {k}", ()) else "" for k in f["shots"]]
            lines.append(f"| {what}: {title} | " + " | ".join(cells) + " |")
    seeds = f"Mean ± standard deviation over {len(runs)} seeds" if len(runs) > 1 else "One run"
    return "\n".join(lines) + f"\n\n{seeds}, {runs[0]['settings']['tests']} episodes each; two new words an episode. The one asked for was shown: at 1 shot it is enough to repeat it; from 2 on both were shown, and chance is 50 %."


def described(pattern):
    """What flamingo.py says of held-out scenes."""
    (r,) = load(pattern)
    return "```text\n" + "\n".join(r["figures"]["lines"]) + "\n```"


def gates(pattern):
    """tanh of the gates, layer by layer."""
    (r,) = load(pattern)
    every, rows = r["settings"]["every"], list(zip(*r["figures"]["gates"]))
    lines = ["| tanh of the gate before block |" + "".join(f" {i * every} |" for i in range(len(rows[0]))), "|---|" + "---:|" * len(rows[0])]
    lines += [f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |" for name, row in zip(("attention", "feed-forward"), rows)]
    return "\n".join(lines)


PAPER = {"": 70.7, "--gate-start inf": 66.5, "--attend all": 63.5, "--no-freeze": 62.7, "--no-resample": 66.6, "--every 2": 68.2, "--every 4": 59.8}


def ablated(patterns):
    """One line for each flag of flamingo.py that was changed, over seeds, beside the paper's ablation where it has one."""
    groups = [("caption, 1 figure", "flamingo"), ("caption, 1 figure", "told"), ("shape, unseen kind", "flamingo"), ("answers, 4", "flamingo"), ("new words, 4", "flamingo"),
              ("kept words, 4", "flamingo")]
    titles = "captions, 1 figure", "the LM told in words", "shape, unseen kinds", "not asked, 4 shots", "new word, 4 shots", "kept back, 4 shots"
    lines = [f"| flag | {' | '.join(titles)} | the paper's score |", "|---|" + "---:|" * (len(titles) + 1)]
    runs, changed = [r for pattern in patterns.split(",") for r in load(pattern)], {}
    for r in sorted(runs, key=lambda r: (plain(r).count("--"), plain(r))):
        flags = " ".join(flag.strip() for flag in re.findall(r"--(?:gate-start|attend|no-freeze|no-resample|every)\b[^-]*", plain(r)))
        changed.setdefault(flags, []).append(r)
    for flags, same in changed.items():
        cells = [number([r["figures"]["right"][group][who] for r in same], 1) for group, who in groups]
        lines.append(f"| {f'`{flags}`' if flags else 'none'} | {' | '.join(cells)} | {PAPER.get(flags, '')} |")
    (seeds,), (steps,) = {len(same) for same in changed.values()}, {r["settings"]["steps"] for r in runs}
    how = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one run each"
    return "\n".join(lines) + (f"\n\nRight to the word, %; {how} of the command in between ({steps} steps), with one LM and one eye a seed; {runs[0]['machine']}, "
                              f"torch {runs[0]['versions']['torch']}. The paper's: Flamingo-3B, overall score of its tables 3 and 10, for --no-resample with an MLP there; "
                              "where this looks once, before its first block, the paper's does in the middle.")


def overview(_):
    """The seven in a table: what each learns, what it shows at the end, and one figure of its plain command."""
    over = lambda pattern, get: spread([get(r["figures"]) for r in load(pattern)])
    accuracy = lambda who, i: lambda f: statistics.mean(f["accuracy"][who]["shape"][i])
    kinds = load("flamingo-scenes-*.json")
    rows = [
        ("simclr", "two views of an image belong together, and apart from all others", "each image's nearest neighbours",
         f"shape, linear probe, 20 labels a class: {over('simclr-shapes-*.json', accuracy('SimCLR', 2))} % (chance 10)"),
        ("autoencoder", "rebuild an image from a code that is too small, noisy or sparse to copy it", "images rebuilt, and on the way from one to another",
         f"the same: {over('autoencoder-shapes-*.json', accuracy('autoencoder', 2))} %"),
        ("bert", "guess the 15 % of the words that are hidden (on a CPU 13: 4 of 30)", "gaps filled in",
         f"{number([r['figures']['masked']['accuracy'] for r in load('bert-pydocs-*.json')], 1)} % right in new text "
         f"({load('bert-pydocs-*.json')[0]['figures']['frequency']['accuracy']:.1f} by frequency)"),
        ("mae", "paint the 75 % of an image that are hidden", "images painted",
         f"the same: {over('mae-shapes-*.json', lambda f: statistics.mean(f['accuracy']['MAE, linear'][0]))} %; "
         f"fine-tuned, 100 labels a class: {over('mae-shapes-*.json', lambda f: statistics.mean(f['accuracy']['MAE, tune all'][1]))}"),
        ("gpt", "guess the next byte of a text, or the next pixel of an image", "a text, or images completed",
         f"{number([r['figures']['bits'] for r in load('gpt-pydocs-*.json')], 2)} bits a byte of new text (chance 8)"),
        ("lora", "a few examples of another text, for a pre-trained GPT, changed a little bit", "a table of eight ways to adapt",
         "loss on new code, nats a byte, after 64 examples: {} → {}, with {:.1f} % of the parameters".format(
             *(number(of_base(load("lora-pydocs-*.json"), who, max(load("lora-pydocs-0.json")[0]["settings"]["k"]), "new"), 2) for who in ("the base", "lora")),
             100 * load("lora-pydocs-0.json")[0]["figures"]["rows"]["lora"][str(max(load("lora-pydocs-0.json")[0]["settings"]["k"]))]["trained"][0]
             / load("lora-pydocs-0.json")[0]["figures"]["parameters"])),
        ("flamingo", "pictures among text, for a language model and an eye that stay as they are", "what it says of new scenes",
         f"{number([r['figures']['right']['caption, 1 figure']['flamingo'] for r in kinds], 1)} % of the captions of one figure right to the word"),
    ]
    lines = ["| | what it learns | what it shows | measured |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| [`{name}.py`]({name}.py) | {' | '.join(rest)} |" for name, *rest in rows])


def compared(pattern):
    """benchmarks/compare.py: three tables."""
    runs = load(pattern)
    found, chance = [r["figures"] for r in runs], runs[0]["chance"]
    what, labels = next(iter(chance)), runs[0]["settings"]["labels"]
    assert all(r["whole"] and r["settings"]["labels"] == labels for r in runs)
    head = [f"{k} a class" if k else "all labels" for k in labels]
    tables = []
    for part, title in ("linear", f"{what}, linear probe, %"), ("tune", f"{what}, all of it tuned, %"):
        rows = [[who, *(number([f[part][who][i] for f in found], 1) for i in range(len(labels)))] for who in found[0][part]]
        tables.append([[title, *head], ["chance", *[f"{chance[what]:.1f}"] * len(labels)], *rows])
    if len(chance) > 1:
        rows = [[who, *(number([f["knows"][who][name] for f in found], 1) if name in knows else "" for name in chance)]
                for who, knows in found[0]["knows"].items()]
        tables.append([["linear probe, all labels, %", *chance], ["chance", *(f"{value:.1f}" for value in chance.values())], *rows])
    text = "\n\n".join("\n".join("| " + " | ".join(row) + " |" + ("\n|---|" + "---:|" * len(labels if table[0][1:] == head else chance)) * (i == 0)
                                 for i, row in enumerate(table)) for table in tables)
    seeds = f"mean ± standard deviation over {len(runs)} seeds, each with its own draw of the labels" if len(runs) > 1 else "one seed so far"
    return (f"{text}\n\n`{runs[0]['command']}`; {seeds}; {statistics.mean(r['seconds'] for r in runs) / 60:.0f} minutes a seed on {runs[0]['threads']} thread{'s' * (runs[0]['threads'] > 1)}, beside another job; "
            f"{runs[0]['machine']}, torch {runs[0]['versions']['torch']}.")


def claims(_):
    """What the lecture says of these methods, where it is shown, and what was measured here."""
    over = lambda pattern, get: spread([get(r["figures"]) for r in load(pattern)])
    acc = lambda who, what, i: lambda f: statistics.mean(f["accuracy"][who][what][i])
    mae = lambda who, i: lambda f: statistics.mean(f["accuracy"][who][i])
    one = lambda pattern, get: f"{get(load(pattern)[0]['figures']):.1f}"
    lora = lambda who, k: number(of_base(load("lora-curve-*.json"), who, k, "new"), 3)
    at = lambda k: lambda f: f["right"][f"new words, {k}"]["flamingo"]
    cached = next(f for f in load("bench-gpt.json")[0]["figures"] if f.get("beside") == "no cache" and f["dtype"] == "float32")
    ablation = lambda name, who="flamingo": over(f"flamingo-{name}-*.json", lambda f: f["right"]["caption, 1 figure"][who])
    garment = lambda who: over(f"{'simclr' if who == 'SimCLR' else 'autoencoder'}-fashion-*.json", acc(who, "class", 2))
    forgot = lambda who: number(of_base(load("lora-curve-*.json"), who, 256, "old"), 3)
    long = "simclr-long-*.json", "autoencoder-long-*.json"
    shape = "shape, 20 labels a class, %"
    asked = lambda k, who: over("flamingo-scenes-*.json", lambda f: f["right"][f"answers, {k}"][who])
    few = lambda who, i: over("mae-shapes-*.json", mae(who, i))
    bert = lambda who, k: number(next(f["accuracy"][who][f["labels"].index(k)] for f in [load("bert-long.json")[0]["figures"]]), 1)
    compare = lambda data, part, who, i: number([r["figures"][part][who][i] for r in load(f"compare-{data}-*.json")], 1)
    knows = lambda who, name: number([r["figures"]["knows"][who][name] for r in load("compare-shapes-*.json")], 1)
    passages = lambda pattern, who: over(pattern, lambda f: statistics.mean(f["accuracy"][who][f["labels"].index(20)]))
    adapt = "python lora.py --context 256 --base-steps 4000 --k 1 2 4 8 16 64 256"
    rows = [
        ("Rebuilding teaches little of what an image is of: the code is more like a hash of it than a summary", "python autoencoder.py --steps 3000",
         f"{shape}: {over(long[1], acc('autoencoder', 'shape', 2))} (untrained {over(long[1], acc('untrained encoder', 'shape', 2))}; "
         f"chance 10); the colour, all labels: {over(long[1], acc('autoencoder', 'colour', 0))} (chance 12.5)", "yes for the shape; the colour, which costs squared error, it keeps"),
        ("The same, on real images", "python autoencoder.py --data fashion-mnist",
         f"class, 20 labels a class, %: {garment('autoencoder')} (untrained {garment('untrained encoder')}; raw pixels {garment('raw pixels')})",
         "not so: better than untrained, level with pixels"),
        ("A lower error is not a better code", "python autoencoder.py --steps 3000",
         "error {} at the first look, {} at the last; {}: {}, then {}".format(
             *(number([list(r["figures"]["notes"].values())[i]["error"] for r in load(long[1])], 2) for i in (0, -1)), shape,
             *(over(long[1], lambda f: statistics.mean(list(f["notes"].values())[i]["probes"][0])) for i in (0, -1)))
         + "; colour, all labels: {}, then {}".format(*(over(long[1], lambda f: statistics.mean(list(f["notes"].values())[i]["probes"][1])) for i in (0, -1))),
         "yes for the shape, which hardly gains in training; the colour gains"),
        ("It needs a bottleneck", "python autoencoder.py --bottleneck none",
         "shape, 20 labels a class, then all, %: {} and {} without; {} and {} with 64 numbers; {} and {} sparse".format(
             *(over(f"autoencoder-{name}-*.json", acc("autoencoder", "shape", i)) for name in ("kind-none", "shapes", "kind-sparse") for i in (2, 3))),
         "not seen: with all labels the large codes, none and sparse, tell most"),
        ("Comparing views teaches what they share", "python simclr.py --steps 2000",
         f"{shape}: {over(long[0], acc('SimCLR', 'shape', 2))}, an autoencoder {over(long[1], acc('autoencoder', 'shape', 2))}", "yes"),
        ("The same, on real images", "python simclr.py --data fashion-mnist",
         f"class, 20 labels a class, %: {garment('SimCLR')}, an autoencoder {garment('autoencoder')}", "yes, by little: there, pixels are good features"),
        ("The choice of views decides what is learned", "python simclr.py --strength 0.5 --hue 0.1",
         "{}: {} with strong colour jitter, {} with weak".format(
             shape, *(over(f"simclr-{name}-*.json", acc("SimCLR", "shape", 2)) for name in ("shapes", "kind-views"))), "yes"),
        ("The more others to tell apart, the better: large batches", "python simclr.py --no-supervised --batch 256 --steps 200 --lr 0.008",
         "{}, after as many images: {} with 16 a step, {} with 64, {} with 256".format(
             shape, *(over(f"simclr-{name}-*.json", acc("SimCLR", "shape", 2)) for name in ("batch-16", "shapes", "batch-256"))),
         "not seen: 16 and 64 are level; 256 is worse, but takes only 200 steps"),
        ("A softmax over all others (NT-Xent) teaches more than a margin in each triplet", "python simclr.py --loss triplet --margin 0.5",
         "{}: {}, triplets {}".format(
             shape, *(over(f"simclr-{name}-*.json", acc("SimCLR", "shape", 2)) for name in ("shapes", "kind-triplet"))), "yes; margin and learning rate were not tuned"),
        ("MAE's features pay with few labels", "python mae.py",
         f"shape, 100 labels a class, %: {few('MAE, tune all', 1)} tuned, {few('untrained ViT, tune all', 1)} from scratch", "yes, on the shapes from 20 labels a class on (`make compare`)"),
        ("They want fine-tuning more than a linear probe", "python mae.py",
         f"shape, %: at 100 labels a class linear {few('MAE, linear', 1)}, tuned {few('MAE, tune all', 1)}; at 20 {few('MAE, linear', 0)}, {few('MAE, tune all', 0)}. "
         f"Fashion-MNIST, at 100, a longer run: {over('mae-fashion-mnist.json', mae('MAE, linear', 3))}, {over('mae-fashion-mnist.json', mae('MAE, tune all', 3))}",
         "on the shapes at 100 labels; not at 20, not on Fashion-MNIST"),
        ("Images want much to be hidden, about three quarters: one patch tells most of the next", "python mae.py --mask-ratio 0.5",
         "shape, 100 labels a class, %, with a half, three quarters, nine tenths hidden: linear {}, {}, {}; tuned {}, {}, {}".format(
             *(over(f"mae-{name}-*.json", mae(f"MAE, {how}", 1)) for how in ("linear", "tune all") for name in ("ratio-0.5", "shapes", "ratio-0.9"))),
         "in part: a half is as good, within the spread; nine tenths are too much"),
        ("Tuning the last block is nearly as good as all", "python mae.py --tune last",
         f"shape, %: at 100 labels a class last {over('mae-last-*.json', mae('MAE, tune last', 1))}, all {few('MAE, tune all', 1)}; "
         f"at 20 {over('mae-last-*.json', mae('MAE, tune last', 0))}, {few('MAE, tune all', 0)}", "at 20 labels, where neither is better than linear; at 100 no, and no better than linear"),
        ("Masking makes rebuilding a better teacher", "make compare",
         f"shape, %: linear, all labels, MAE {compare('shapes', 'linear', 'MAE', 4)}, autoencoder {compare('shapes', 'linear', 'autoencoder', 4)}; tuned, 100 a class, "
         f"{compare('shapes', 'tune', 'MAE', 3)}, {compare('shapes', 'tune', 'autoencoder', 3)}. Fashion-MNIST: linear {compare('fashion-mnist', 'linear', 'MAE', 4)}, "
         f"{compare('fashion-mnist', 'linear', 'autoencoder', 4)}; tuned {compare('fashion-mnist', 'tune', 'MAE', 3)}, {compare('fashion-mnist', 'tune', 'autoencoder', 3)}",
         "on the shapes from 20 labels on, unless all are used for tuning; not on Fashion-MNIST in so few steps (the encoders differ, too)"),
        ("With few labels comparing is ahead of rebuilding", "make compare",
         f"20 labels a class, linear, %: shape, SimCLR {compare('shapes', 'linear', 'SimCLR', 2)}, MAE {compare('shapes', 'linear', 'MAE', 2)}, "
         f"autoencoder {compare('shapes', 'linear', 'autoencoder', 2)}; Fashion-MNIST {compare('fashion-mnist', 'linear', 'SimCLR', 2)}, "
         f"{compare('fashion-mnist', 'linear', 'MAE', 2)}, {compare('fashion-mnist', 'linear', 'autoencoder', 2)}", f"yes: by far on the shapes, by little on Fashion-MNIST (a longer run of a larger MAE has {over('mae-fashion-mnist.json', mae('MAE, linear', 2))} there)"),
        ("Comparing forgets what the views differ in; rebuilding keeps it", "make compare",
         f"linear, all labels, %: the colour, SimCLR {knows('SimCLR', 'colour')} (untrained ResNet {knows('untrained ResNet', 'colour')}), autoencoder {knows('autoencoder', 'colour')}, "
         f"MAE {knows('MAE', 'colour')}; the place, SimCLR {knows('SimCLR', 'place')} (untrained ResNet {knows('untrained ResNet', 'place')})", "for the colour: less is left of it than without training, and rebuilding keeps it; not for size and place, which crops change, too"),
        ("With many labels pre-training hardly matters, once all is tuned", "make compare",
         f"all labels, tuned, %: shape, SimCLR {compare('shapes', 'tune', 'SimCLR', 4)}, from scratch {compare('shapes', 'tune', 'untrained ResNet', 4)}; autoencoder {compare('shapes', 'tune', 'autoencoder', 4)}, "
         f"{compare('shapes', 'tune', 'untrained encoder', 4)}; "
         f"MAE {compare('shapes', 'tune', 'MAE', 4)}, {compare('shapes', 'tune', 'untrained ViT', 4)}; Fashion-MNIST {compare('fashion-mnist', 'tune', 'SimCLR', 4)}, "
         f"{compare('fashion-mnist', 'tune', 'untrained ResNet', 4)}; {compare('fashion-mnist', 'tune', 'autoencoder', 4)}, {compare('fashion-mnist', 'tune', 'untrained encoder', 4)}; {compare('fashion-mnist', 'tune', 'MAE', 4)}, {compare('fashion-mnist', 'tune', 'untrained ViT', 4)}", "yes for the ResNet and the autoencoder, and on Fashion-MNIST for all; not for the ViT on the shapes, of which it learns little from scratch in 1,000 steps"),
        ("BERT: tuning all is better than the last block, that better than a frozen [CLS]", "python bert.py --steps 10000 --dropout 0.1",
         f"accuracy, 20 labels a class, %: {bert('BERT, tune all', 20)}, {bert('BERT, tune last', 20)}, {bert('BERT, frozen [CLS]', 20)} (frozen mean of words "
         f"{bert('BERT, frozen mean of words', 20)}); at 5: {bert('BERT, tune all', 5)}, {bert('BERT, tune last', 5)}, {bert('BERT, frozen [CLS]', 5)}; at 1: {bert('BERT, tune all', 1)}, {bert('BERT, tune last', 1)}, {bert('BERT, frozen [CLS]', 1)}",
         "at 5 and 20 labels, not at 1; one pre-training run"),
        ("Hiding spans, or phrases that belong together, teaches more than hiding single words", "python bert.py --strategy span",
         "accuracy, 20 labels a class, %, words, spans, phrases: all tuned {}, {}, {}; frozen [CLS] {}, {}, {}; frozen mean of words {}, {}, {}".format(
             *(passages(f"bert-{name}-*.json", f"BERT, {how}") for how in ("tune all", "frozen [CLS]", "frozen mean of words") for name in ("pydocs", "span", "pmi"))),
         "yes, spans the most (after 2,500 steps)"),
        ("Of the hidden words 80 % are [MASK] and 20 % others; the paper leaves half of the latter as they are", "python bert.py --keep 0.1",
         "accuracy, 20 labels a class, %, 80/20, 80/10/10: all tuned {}, {}; frozen [CLS] {}, {}; frozen mean of words {}, {}; hidden words guessed {}, {}".format(
             *(passages(f"bert-{name}-*.json", f"BERT, {how}") for how in ("tune all", "frozen [CLS]", "frozen mean of words") for name in ("pydocs", "keep")),
             *(over(f"bert-{name}-*.json", lambda f: f["masked"]["accuracy"]) for name in ("pydocs", "keep"))),
         "the paper's way is better here, with each seed (after 2,500 steps; in the paper's table 8 the two are level)"),
        ("A GPT is a masked autoencoder with a special mask", 'make test ARGS="-k masked_autoencoder"', "the same loss and gradient, token by token", "yes, exactly"),
        ("Keys and values of earlier tokens can be kept", "make bench-gpt", f"256 tokens {cached['ratio']:.1f} times as fast in float32, and equal", "yes"),
        ("A few memories more in each matrix (LoRA) do as well as tuning it", adapt,
         f"loss on the new text, {lora('the base', 256)} before; after 256 examples {lora('lora', 256)} with 2.9 % of the parameters, {lora('full', 256)} with all; "
         f"after 16 {lora('lora', 16)}, {lora('full', 16)}; after one {lora('lora', 1)}, {lora('full', 1)}", "yes: a little better from 64 on, a little worse at 2 to 16"),
        ("Vectors that scale what is there ((IA)³) do as well, too", adapt,
         f"after 256 examples {lora('ia3', 256)} with 0.4 % of the parameters; after 16 {lora('ia3', 16)}", "as LoRA up to 16 examples; behind at 64 and 256"),
        ("A LoRA is merged into its matrix and costs no time then", 'make test ARGS="-k merge"', "the same logits, up to rounding", "yes: it is the plain layer then"),
        ("To change little is to forget little", adapt,
         f"loss on the old text, {forgot('the base')} before; after 256 examples: (IA)³ (0.4 % of the parameters) {forgot('ia3')}, LoRA (2.9 %) {forgot('lora')}, "
         f"biases (0.7 %) {forgot('bias')}, all {forgot('full')}, the last two blocks (46 %) {forgot('last')}",
         "no: at 256 examples (IA)³ and LoRA, with few, forgot the most, the last and the middle two blocks the least; at 64 LoRA is in the middle, and at each one's best rate the order is another"),
        ("With few examples the prompt is better than training", adapt,
         f"loss on the new text after 4 examples: {lora('prompt', 4)} in the prompt, {lora('lora', 4)} with LoRA, {lora('the base', 4)} without any",
         "no: here the prompt is worse than none (one size of model, examples that are cut off)"),
        ("Frozen parts can be joined, and learn new words from examples in context", load("flamingo-long.json")[0]["command"],
         f"a new word, one of two in sight (chance 50), after 2, 4, 8 pictures, %: {', '.join(one('flamingo-long.json', at(k)) for k in (2, 4, 8))}; one that no picture came with in "
         f"training, after 8: {one('flamingo-long.json', lambda f: f['right']['kept words, 8']['flamingo'])}",
         "yes in this, the longest run (one seed), for words that came with pictures in training; hardly for others; the run in between with one seed of three, the plain one with none"),
        ("They also find out from examples what is asked", "python flamingo.py",
         f"a question that is not asked, after 0 and 1 examples, %: {asked(0, 'flamingo')}, {asked(1, 'flamingo')} (the LM alone {asked(1, 'lm')})", "yes"),
        ("Looking at the last picture alone works best", load("flamingo-ablation-all-0.json")[0]["command"],
         f"captions of one figure, %: {ablation('middle')}; trained with all earlier pictures in sight {ablation('ablation-all')}",
         "yes, with each seed, though the test shows only one picture"),
        ("With gates that start at 0 it is at first the language model that it was", 'make test ARGS="-k gates_at_zero"', "the same logits, bit for bit", "yes, exactly"),
        ("Gates that start closed help", load("flamingo-ablation-no-gate-0.json")[0]["command"],
         f"captions of one figure, %: {ablation('middle')}; without gates {ablation('ablation-no-gate')}, half open at first {ablation('ablation-start-half')}", "not seen: without gates it is as good, and half open ones are worse with one seed of three only"),
        ("A language model that stays frozen keeps what it knew", load("flamingo-ablation-no-freeze-0.json")[0]["command"],
         f"told in words in the place of pictures, captions of one figure, %: {ablation('middle', 'told')}; {ablation('ablation-no-freeze', 'told')} if it is trained, too "
         f"(with pictures {ablation('middle')}, {ablation('ablation-no-freeze')})", "yes; but with pictures the trained one does as well, and binds new words better"),
    ]
    lines = ["| the lecture says | shown by | measured | so? |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {claim} | {'<br>'.join(f'`{c}`' for c in command.split('; '))} | {text} | {so} |" for claim, command, text, so in rows])


def memory(pattern):
    """Peak memory beside the other package's."""
    (bench,) = load(pattern)
    lines = ["| peak memory | dtype | ours, MB | theirs, MB | theirs / ours |", "|---|---|---:|---:|---:|"]
    for f in (f for f in bench["figures"] if "ours_mb" in f):
        for what, key in ("the whole process", ""), ("of it after the imports", "_after_imports"):
            a, b, c = (f"{f[name.format(key)]:.{digits}f}" for name, digits in (("ours{}_mb", 0), ("theirs{}_mb", 0), ("ratio{}", 2)))
            lines.append(f"| {what}{', beside ' + f['beside'] if not key else ''} | {f['dtype']} | {a} | {b} | {c} |")
    return "\n".join(lines)


def expect(name):
    """The lines of a script's docstring that say what its plain command gives."""
    data = {"bert": "pydocs", "gpt": "pydocs", "lora": "pydocs", "flamingo": "scenes"}.get(name, "shapes")
    runs = load(f"{name}-{data}-*.json")
    most = max(r["threads"] for r in runs)                     # some seeds may have run on one core, beside others
    r, seconds = runs[0], statistics.mean(r["seconds"] for r in runs if r["threads"] == most)
    where = (f"({len(runs)} seeds; {seconds:.0f} s of training on {most} thread{'s' * (most > 1)}; {r['machine']}, torch {r['versions']['torch']})")
    if name == "gpt":
        text = (f"{number([r['figures']['loss'] for r in runs], 3)} nats a token on new text, "
                f"{number([r['figures']['bits'] for r in runs], 2)} bits a byte {where}")
    elif name == "lora":
        k, f = max(r["settings"]["k"]), r["figures"]
        loss = lambda who, what: number(of_base(runs, who, k, what), 2)
        base = statistics.mean(r["figures"]["base_seconds"] for r in runs if r["threads"] == most)
        share = 100 * f["rows"]["lora"][str(k)]["trained"][0] / f["parameters"]
        text = (f"{k} examples of pycode, beginnings of lines, bring the loss on others from {loss('the base', 'new')} to {loss('lora', 'new')} nats a token with LoRA, "
                f"{share:.1f} % of the parameters, and to {loss('full', 'new')} with all of them; that on whole windows of pydocs goes from "
                f"{loss('the base', 'old')} to {loss('lora', 'old')} and {loss('full', 'old')} ({len(runs)} bases; {seconds:.0f} s for "
                f"all methods after {base:.0f} s for the base, on {most} thread{'s' * (most > 1)}; {r['machine']}, torch {r['versions']['torch']})")
    elif name == "flamingo":
        get = lambda group: number([r["figures"]["right"][group]["flamingo"] for r in runs], 1)
        before = statistics.mean(sum(r["figures"]["stages"]) for r in runs if r["threads"] == most)
        text = (f"of held-out scenes {get('caption, 1 figure')}, {get('caption, 2 figures')} and {get('caption, 3 figures')} % of the captions "
                f"of 1, 2 and 3 figures are right to the word; of single figures of unseen kinds {get('colour, unseen kind')} % of the colours "
                f"and {get('shape, unseen kind')} % of the shapes (chance 12.5); a question that is not asked is found out from one example "
                f"({get('answers, 1')} %), what a new word means, from 4, is not ({get('new words, 4')} %, chance 50) ({len(runs)} seed{'s' * (len(runs) > 1)}; {seconds:.0f} s of training the join, "
                f"after {before:.0f} s for the LM and the eye, on {most} thread{'s' * (most > 1)}; {r['machine']}, torch {r['versions']['torch']})")
    elif name == "bert":
        get = lambda who, key, digits: number([r["figures"][who][key] for r in runs], digits)
        text = (f"{get('masked', 'accuracy', 1)} % of the hidden words of new text are right, at a perplexity of "
                f"{get('masked', 'perplexity', 0)} ({runs[0]['figures']['frequency']['accuracy']:.1f} % and "
                f"{runs[0]['figures']['frequency']['perplexity']:.0f} by frequency alone) {where}")
    elif name == "mae":
        k, who = r["figures"]["labels"][-1], "{}, tune all"
        ours, blank = (spread([v for r in runs for v in r["figures"]["accuracy"][who.format(name)][-1]])
                       for name in ("MAE", "untrained ViT"))
        text = f"the shape, from {k} labels a class: {ours} % fine-tuned, {blank} % from scratch, chance 10 % {where}"
    else:
        who = {"simclr": "SimCLR", "autoencoder": "autoencoder"}[name]
        few = lambda who: over_seeds(runs, lambda f: f["accuracy"][who]["shape"][f["labels"].index(20)])
        colour = lambda who: over_seeds(runs, lambda f: f["accuracy"][who]["colour"][0])
        text = (f"a linear probe on {'h' if name == 'simclr' else 'the code'} reads the shape, from 20 labels a class, "
                f"at {few(who)} % (raw pixels {few('raw pixels')} %, chance 10 %), and the colour, from all labels, at "
                f"{colour(who)} % (raw pixels {colour('raw pixels')} %, chance 12.5 %) {where}")
    whole = re.sub(r"(?<=\d) (?=%)| (?=±)|(?<=±) ", "\a", text)                          # a figure stays on its line
    return textwrap.fill(whole, 91, subsequent_indent=" " * 9).replace("\a", " ")


FIGURES = {f.__name__: f for f in (few_labels, ratios, speed, fastest, knows, while_training, flags,
                                     losses, sampled, blanks, hidden, fine_tuned, adapted, searched, directions, memory,
                                     answered, shots, described, gates, ablated, overview, compared, claims)}


def written(text):
    """The README with each <!-- kind pattern --> ... <!-- end --> filled in anew."""
    fill = lambda m: f"<!-- {m[1]} {m[2]} -->\n\n{FIGURES[m[1]](m[2])}\n\n<!-- end -->"
    return re.sub(r"<!-- (\w+) (\S+) -->.*?<!-- end -->", fill, text, flags=re.S)


def curves():
    """{results/compare-<data>.svg: its text}, of the runs of benchmarks/compare.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import compare
    drawn = {}
    for data in "shapes", "fashion-mnist":
        runs = load(f"compare-{data}-*.json")
        chance = next(iter(runs[0]["chance"].values()))
        drawn[ROOT / f"results/compare-{data}.svg"] = compare.draw(runs[0]["settings"]["labels"], [r["figures"] for r in runs], chance, runs[0]["most"])
    return drawn


def expected(text):
    """A script with the Expect line of its docstring filled in anew."""
    name = re.search(r"Run      python (\w+)\.py", text)[1]
    return re.sub(r"^Expect   .*?(?=\n\w)", lambda m: "Expect   " + expect(name), text,
                  count=1, flags=re.M | re.S)


def test_figures_come_from_results(scripts):
    for page in PAGES:
        text = page.read_text()
        assert len(re.findall(r"<!-- end -->", text)) >= 3
        assert written(text) == text, f"{page}: run `make results`"
    for script in scripts:
        text = (ROOT / script).read_text()
        assert expected(text) == text, f"{script}: run `make results`"
    for path, text in curves().items():
        assert path.read_text() == text, f"{path.name}: run `make results`"


def test_there_are_commands():
    assert len(COMMANDS) >= 5 and any("--mask-ratio 0.75" in c for c in COMMANDS)


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
            folder = path / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image.fromarray(r.integers(0, 256, (70, 80, 3), np.uint8)).save(folder / f"{i}.png")
    return path


@pytest.mark.parametrize("line", COMMANDS)
def test_command_runs(line, tmp_path):
    script, *flags = shlex.split(line)[1:]
    if script == "common.py":                                            # the table of all runs
        done = run(ROOT / "results", script=script, most=1000)
        assert done.returncode == 1 and "no finished run" in done.stderr
        return
    if flags == ["--help"]:
        assert run(*flags, script=script, most=1000).stdout.startswith(f"usage: {script}")
        return
    if "--data" in flags:
        name = flags[flags.index("--data") + 1]
        kept = DATA / {"shakespeare": "tinyshakespeare.txt"}.get(name, name)
        if name.startswith("my-"):
            flags[flags.index("--data") + 1] = own(tmp_path / name)
        elif name not in ("shapes", "pydocs", "pycode") and not kept.exists():
            pytest.skip(f"{name} is not here")
        flags += ["--data-dir", DATA]
    quick = [*QUICK[script].split(), "--out", tmp_path / "run"]
    if "--resume" in flags or "--adapter" in flags:
        assert run(*quick, script=script, most=1000).returncode == 0
    if "--adapter" in flags:
        assert Path(flags[-1]).name == "lora-64.pt"                          # of the plain command; here k is 1
        flags[-1] = tmp_path / "run/lora-1.pt"
    for flag, other in ("--lm", "gpt.py"), ("--eye", "mae.py"):
        if flag in flags:
            at = flags.index(flag) + 1
            assert flags[at] == f"runs/{other[:-3]}"                         # of the plain command
            flags[at] = tmp_path / other
            assert run(*QUICK[other].split(), "--out", flags[at], script=other, most=1000).returncode == 0
    if "--base" in flags:
        at = flags.index("--base") + 1
        assert flags[at] == "runs/gpt"                                       # of gpt.py's plain command
        flags[at] = tmp_path / "gpt"
        assert run(*QUICK["gpt.py"].split(), "--out", flags[at], script="gpt.py", most=1000).returncode == 0
    done = run(*flags, *quick, script=script, most=1000)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/result.json").exists()


def test_what_was_learned_can_be_used(tmp_path):
    """The lines that read a checkpoint, on a run's own: the features are those that the script's probe reads."""
    import torch
    (lines,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "read_checkpoint" in block)
    assert run(*QUICK["mae.py"].split(), "--out", tmp_path, script="mae.py", most=1000).returncode == 0
    torch.manual_seed(0)
    names = dict(x=torch.randn(3, 3, 32, 32))
    exec(lines.replace("runs/mae", str(tmp_path)), names)
    weights, encoder = names["state"]["model"], names["model"].encoder
    assert all(torch.equal(value, weights[f"encoder.{name}"]) for name, value in encoder.state_dict().items())
    tokens = encoder(names["mae"].patchify(names["x"], 4))
    assert torch.allclose(names["h"], tokens[:, 1:].mean(1)) and names["h"].shape == (3, 16)
    for script, features in ("simclr", "encoder"), ("autoencoder", "code"):
        assert f"model.eval().{features}`" in README and f"probes(model.{features})" in (ROOT / f"{script}.py").read_text()


def test_shell_lines_run():
    """What is not python and not make."""
    lines = [line for block in FENCES for line in block.splitlines() if line.startswith("diff")]
    assert lines
    for line in lines:
        shown = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 1 and not shown.stderr and shown.stdout.count("def main(args):") == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    titles = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)}
    places = re.findall(r"\]\(#([^)]+)\)", text)
    assert set(places) <= titles, set(places) - titles
    assert page != PAGES[0] or links and len(places) > 9
    for target in links:
        assert target.startswith("http") or (page.parent / target).exists(), target
    for name in re.findall(r"`(\w+\.(?:py|txt))`", text):
        assert (ROOT / name).exists(), name
    for line in re.findall(r"^\|.*", text, re.M):                           # the map: names stand in the file before them
        for name, parts in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, (?:and )?)?)+)", line):
            for part in re.findall(r"\w+", parts.replace("and ", "")):
                assert re.search(rf"^ *(def|class) {part}\b", (ROOT / name).read_text(), re.M), (name, part)
    for name in re.findall(r"make (\w+)", text):
        assert re.search(rf"^({name}:|SCRIPTS =.*\b{name}\b)", (ROOT / "Makefile").read_text(), re.M), name


if __name__ == "__main__":
    for path in *PAGES, *(ROOT / script for script in QUICK):
        path.write_text((written if path.suffix == ".md" else expected)(path.read_text()))
    for path, text in curves().items():
        path.write_text(text)
