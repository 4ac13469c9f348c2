"""What the README says is true: its commands run, its figures are those of results/, its links exist.

Run as a program (`make results`), it writes the figures of results/ into the README and the docstrings.
"""
import json
import re
import shlex
import statistics
import textwrap

import pytest
from conftest import DATA, ROOT, run

FENCES = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
COMMANDS = [line.split(" #")[0].strip() for block in FENCES for line in block.replace("\\\n", " ").splitlines()
            if line.startswith("python ")]
QUICK = {   # added to a command, so that it takes seconds
    "mae.py": "--steps 2 --tune-steps 2 --labels 1 --draws 1 --dim 16 --heads 1 --depth 1"}


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


def speed(pattern):
    """Our step beside the other package's."""
    (bench,) = load(pattern)
    lines = ["| model | dtype | ours, ms | theirs, ms | theirs / ours |", "|---|---|---:|---:|---:|"]
    for f in bench["figures"]:
        low, high = f["quartiles"]
        lines.append(f"| {f['case']} | {f['dtype']} | {f['ours_ms']:.0f} | {f['theirs_ms']:.0f} "
                     f"| {f['ratio']:.2f} [{low:.2f} to {high:.2f}] |")
    lines.append(f"\n{bench['machine']}, {bench['threads']} threads, torch {bench['versions']['torch']}, "
                 f"transformers {bench['versions']['transformers']}.")
    return "\n".join(lines)


def expect(pattern):
    """The line of a script's docstring."""
    runs = load(pattern)
    k, who = runs[0]["figures"]["labels"][-1], "{}, tune all"
    ours, blank = (spread([v for r in runs for v in r["figures"]["accuracy"][who.format(name)][-1]])
                   for name in ("MAE", "untrained ViT"))
    text = (f"the shape, from {k} labels a class: {ours} % fine-tuned, {blank} % from scratch, chance 10 % "
            f"({len(runs)} seeds; {statistics.mean(r['seconds'] for r in runs):.0f} s of training on "
            f"{runs[0]['machine']}, torch {runs[0]['versions']['torch']})")
    return textwrap.fill(text, 91, subsequent_indent=" " * 9)


FIGURES = {"few_labels": few_labels, "speed": speed}


def written(text):
    """The README with each <!-- kind pattern --> ... <!-- end --> filled in anew."""
    fill = lambda m: f"<!-- {m[1]} {m[2]} -->\n\n{FIGURES[m[1]](m[2])}\n\n<!-- end -->"
    return re.sub(r"<!-- (\w+) (\S+) -->.*?<!-- end -->", fill, text, flags=re.S)


def expected(text):
    """A script with the Expect line of its docstring filled in anew."""
    name = re.search(r"Run      python (\w+)\.py", text)[1]
    return re.sub(r"^Expect   .*?(?=\n\w)", lambda m: "Expect   " + expect(f"{name}-shapes-*.json"), text,
                  count=1, flags=re.M | re.S)


def test_figures_come_from_results(scripts):
    text = (ROOT / "README.md").read_text()
    assert len(re.findall(r"<!-- end -->", text)) >= 3
    assert written(text) == text, "README: run `make results`"
    for script in scripts:
        text = (ROOT / script).read_text()
        assert expected(text) == text, f"{script}: run `make results`"


def test_there_are_commands():
    assert len(COMMANDS) >= 5 and any("--mask-ratio 0.75" in c for c in COMMANDS)


@pytest.mark.parametrize("line", COMMANDS)
def test_command_runs(line, tmp_path):
    script, *flags = shlex.split(line)[1:]
    if script == "common.py":                                            # the table of all runs
        done = run(ROOT / "results", script=script)
        assert done.returncode == 1 and "no finished run" in done.stderr
        return
    if flags == ["--help"]:
        assert run(*flags, script=script).stdout.startswith(f"usage: {script}")
        return
    if "--data" in flags:
        name = flags[flags.index("--data") + 1]
        if name.startswith("my-") or not (DATA / name).exists():
            pytest.skip(f"{name} is not here")
        flags += ["--data-dir", DATA]
    quick = [*QUICK[script].split(), "--out", tmp_path / "run"]
    if "--resume" in flags:
        assert run(*quick, script=script).returncode == 0
    done = run(*flags, *quick, script=script)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/result.json").exists()


def test_links_and_files_exist():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    for target in links:
        assert target.startswith("http") or (ROOT / target).exists(), target
    for name in re.findall(r"`(\w+\.(?:py|txt))`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"make (\w+)", text):
        assert re.search(rf"^({name}:|SCRIPTS =.*\b{name}\b)", (ROOT / "Makefile").read_text(), re.M), name


if __name__ == "__main__":
    for path, fill in (ROOT / "README.md", written), (ROOT / "mae.py", expected):
        path.write_text(fill(path.read_text()))
