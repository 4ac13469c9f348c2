"""What the README says is true: its commands and its Python run, its figures are those of results/,
its links and names exist.

Run as a program (`make results`), it writes the figures of results/ into the pages and docstrings.
"""
import ast
import functools
import importlib
import json
import re
import shlex
import statistics
import sys
import textwrap

import numpy as np
import pytest
from conftest import DATA, ROOT, forking, run

sys.path.insert(0, str(ROOT / "experiments"))
import compare, forgetting, prompt_or_training, repeat  # noqa: E402

PAGES = ROOT / "README.md", ROOT / "results/README.md", ROOT / "experiments/README.md"
README, RESULTS, _ = (page.read_text() for page in PAGES)

# ------------------------------------------- figures: before them <!-- file of results/, and path in it -->

MARKER, FIGURE = re.compile(r"(<!-- .+? -->)"), re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?: ± ?\d+(?:\.\d+)?)?")


@functools.cache
def load(name):
    """The results in a file of results/, one per seed; of two experiments with the tables that these compute of curves."""
    found = repeat.apart(json.loads((ROOT / f"results/{name}.json").read_text()))
    if name == "forgetting":
        found[0]["table"] = {" ".join(row[:2]): row[2:] for row in forgetting.table(found[0]["figures"])[0]}
    if name == "prompt-or-training":
        table = lambda kind: prompt_or_training.table(found[0]["figures"], kind, "accuracy")
        found[0]["table"] = {kind: {row[0]: row[1:] for row in table(kind)} for kind in prompt_or_training.KINDS}
    return found


def at(value, path):
    """The values at a path in dicts and lists, such as "accuracy/SimCLR/2"; * is each key in turn."""
    key, _, rest = path.partition("/")
    value = {str(i): x for i, x in enumerate(value)} if path and isinstance(value, list) else value
    return [x for k in (value if key == "*" else [key]) for x in at(value[k], rest)] if path else [value]


def values(marker):
    """What a marker stands for, of each figure the values of all seeds. {a; b}: a, then b; " %": times 100. Of seconds it is
    their median: other jobs ran beside some."""
    if some := re.search(r"{(.+?)}", marker):
        return [x for part in some[1].split("; ") for x in values(marker.replace(some[0], part, 1))]
    name, path = marker.removesuffix(" %").split("/", 1)
    if name.endswith(".py"):
        return [[len((ROOT / name).read_text().splitlines())]]
    found = [list(x) for x in zip(*(at(r if path.split("/")[0] in r else r["figures"], path) for r in load(name)))]
    found = [x[0] if len(x) == 1 and isinstance(x[0], list) else x for x in found]           # of a single run its repeats
    found = [[100 * value for value in x] for x in found] if marker.endswith(" %") else found
    return [[statistics.median(x)] for x in found] if path.endswith("seconds") else found


def shown(found, old):
    """The mean of some values with the decimals of the old figure, and where that has one their standard deviation."""
    if isinstance(found[0], str):
        return found[0]
    found = [statistics.mean(x) if isinstance(x, list) else x for x in found]
    digits = f"{',' * (',' in old)}.{len(old.split()[0].partition('.')[2])}f"
    return f"{statistics.mean(found):{digits}}" + (
        f" ± {statistics.stdev(found):{digits}}" if "±" in old and len(found) > 1 else "")


def updated(text):
    """A page with the figures of results/, and what differs: [(marker, what is here, what is there)]. The figures of a
    marker are the next ones in its line. Of a text it only says whether it stands before the next marker."""
    parts, differ = MARKER.split(text), []
    for i in range(1, len(parts), 2):
        found, (line, *rest) = values(parts[i][5:-4]), parts[i + 1].split("\n", 1)
        texts = [x[0] for x in found if isinstance(x[0], str) and not FIGURE.fullmatch(x[0])]
        missing = iter([x for x in found if x[0] not in texts])

        def put(old):
            new = shown(x, old[0]) if (x := next(missing, None)) else old[0]
            differ.extend([(parts[i], old[0], new)] * (new != old[0]))
            return new
        parts[i + 1] = "\n".join([FIGURE.sub(put, line), *rest])
        differ += [(parts[i], "nothing", x) for x in [*missing, *(x for x in texts if x.strip() not in parts[i + 1])]]
    return "".join(parts), differ


def expected(script):
    """What a docstring says to expect; what results/README.md says, with markers; the latter with the docstring's figures."""
    says = re.search(r"^Expect   (.*?)(?=\n\w)", (ROOT / script).read_text(), re.M | re.S)[1]
    (row,) = re.findall(rf"^\| `{script}` \| (.* seeds; .*) \|$", PAGES[1].read_text(), re.M)
    parts, figures = MARKER.split(row), iter(FIGURE.findall(says := " ".join(says.split())))
    parts[::2] = [FIGURE.sub(lambda old: next(figures, old[0]), part) for part in parts[::2]]
    return says, row, "".join(parts)


def curves():
    """{file of results/: its text}, the curves of the results."""
    drawn, (forgot,), (prompts,) = {}, load("forgetting"), load("prompt-or-training")
    for data in "compare-shapes", "compare-fashion-mnist":
        (r, *_), (chance, *_) = load(data), load(data)[0]["chance"].values()
        drawn[f"{data}.svg"] = compare.draw(r["settings"]["labels"], [x["figures"] for x in load(data)], chance, r["most"])
    times = [float(x) for x in re.search(r"--times ([\d. ]+)", forgot["command"])[1].split()]
    return drawn | {"forgetting.svg": forgetting.draw(forgot["figures"], times),
                    "prompt-or-training.svg": prompt_or_training.draw(prompts["figures"])}


def test_figures_come_from_results(scripts):
    pages = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
    both = pages | {script: expected(script)[2] for script in scripts}
    wrong = [f"{page}: {marker} {old}, in results/ {new}" for page in both for marker, old, new in updated(both[page])[1]]
    wrong += [f"{page}: no marker in {line}" for page, text in pages.items() for line in text.splitlines()
              if re.search(r"\d ± ?\d", line) and not MARKER.search(line)]
    wrong += [f"{script}: Expect is not what results/README.md says" for script in scripts
              if expected(script)[0] != MARKER.sub("", expected(script)[1])]
    assert not wrong, "\n".join(["run `make results`", *wrong])


def test_curves_come_from_results():
    for name, text in curves().items():
        assert (ROOT / "results" / name).read_text() == text, f"{name}: run `make results`"


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
QUICK["experiments/same_encoder.py"] = "--quick --data shapes --seconds 1 --labels 1 --seeds 0 --methods mae"
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
    if script == "experiments/while_training.py":
        at = flags.index("--")
        flags, added = flags[:at], ["--at", 1, 2, "--labels", 1, *flags[at:], *QUICK[flags[0]].split()]
    done = run(*flags, *added, script=script, most=300, cwd=folder, before=forking)
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
        compare.options(flags)
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
    if "--weights" in flags or line.endswith("--base gpt2/"):            # tests/test_weights.py has such files
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
    PAGES[1].write_text(updated(PAGES[1].read_text())[0])                  # the docstrings are taken from it
    for path in sorted(ROOT.glob("[!c]*.py")):
        says, row, _ = expected(path.name)
        if says != MARKER.sub("", row):
            whole = re.sub(" (?=[±%])|(?<=±) ", "\a", MARKER.sub("", row))                  # a figure stays on its line
            new = textwrap.fill(f"Expect   {whole}", 100, subsequent_indent=" " * 9).replace("\a", " ")
            path.write_text(re.sub(r"^Expect   .*?(?=\n\w)", lambda m: new, path.read_text(), count=1, flags=re.M | re.S))
    for page in PAGES:
        page.write_text(updated(page.read_text())[0])
        for marker, old, new in updated(page.read_text())[1]:              # words, such as the name of a processor
            print(f"{page.relative_to(ROOT)}: write {new} after {marker}")
    for name, text in curves().items():
        (ROOT / "results" / name).write_text(text)
