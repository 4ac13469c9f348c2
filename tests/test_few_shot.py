"""experiments/few_shot.py: what is asked, how it is counted, and that what is done is kept."""
import json
import math
import sys

import pytest
import torch
from conftest import ROOT, refused, run

import common
import flamingo

sys.path.insert(0, str(ROOT / "experiments"))
import few_shot  # noqa: E402

SCRIPT = "experiments/few_shot.py"
SMALL = ("--every 1 --lm-steps 60 --lm-batch 32 --lm-lr .01 --dim 32 --heads 2 --depth 1 --vit-steps 3 --vit-batch 4 --vit-dim 8 "
         "--vit-heads 2 --vit-depth 1 --steps 3 --batch 4 --images 500 --tests 12 --latents 2 --shots 0 1 2 --dtype float32 "
         "--device cpu").split()


def asked_in_a_test(tests=40, seed=0, shots=(0, 1, 2), context=64, bytes=False):
    args, tokens = flamingo.Args(device="cpu", tests=tests, seed=seed, shots=shots), common.SceneTokens(common.Bytes() if bytes else None)
    asked, scenes = few_shot.queries(args, tokens, context)
    return scenes, asked


def test_what_is_asked():
    """Each prompt, its images and its captions belong together; a word that is asked for was shown by another image."""
    scenes, asked = asked_in_a_test()
    for group, prompt, images, answer, in_words in asked:
        assert prompt.count("<image>") == len(images) and "<image>" not in in_words
        if group.startswith("caption"):
            assert answer == common.caption(scenes[images[0]]) and prompt == "<image> there is"
            assert in_words in ("", f"{answer} . there is")
        elif "word" in group:
            assert prompt.endswith("<image>") and in_words.count("<end>") == len(images) - 1
            assert in_words.endswith(common.kind_name(scenes[images[-1]][0]))
            names = common.HELD_OUT if group.startswith("held-out") else common.TRAINED
            assert answer in names
            shown = dict((scenes[i][0][:2], chunk.split()[-1]) for i, chunk in zip(images, prompt.split("<end>")[:-1]))
            assert len(set(images)) == len(images)                             # the image asked about was not shown,
            assert len(images) == 1 or shown[scenes[images[-1]][0][:2]] == answer      # its kind was
            assert len(set(shown.values())) == len(shown) == min(3 if "of 3" in group else 2, len(images) - 1)
        elif group.startswith("unasked"):
            assert prompt.endswith("<image>")
            assert in_words == "" or in_words.endswith(".") and in_words.count(" . ") == len(images) - 1
        else:
            assert prompt == f"<image> {in_words.split(' . ')[1]}" and answer in [*in_words.split(), *common.NUMBERS, "right"]
        if "unseen" in group:
            assert scenes[images[0]][0][:2] in common.UNSEEN and 40 <= images[0] < 80
        if group.endswith("figure"):
            assert len(scenes[images[0]]) == 1
    assert len({q.group for q in asked}) == 16 + 15


def test_the_questions_are_those_of_the_results():
    """The same random stream for all time: so figures of different versions can be compared."""
    _, asked = asked_in_a_test(tests=12, seed=3)
    held_out = [(q.prompt, q.answer, q.images) for q in asked if q.group == "held-out word, 2"]
    assert len(held_out) == 12 and held_out[:2] == [
        ("<image> wug <end> <image> blicket <end> <image>", "blicket", [835, 509, 65]),
        ("<image> blicket <end> <image> wug <end> <image>", "wug", [27, 460, 1397])]
    _, asked = asked_in_a_test(tests=300, shots=(0, 1, 2, 4, 8), context=48)
    groups = {}                                    # how often the most frequent answer occurs tells the questions
    for q in asked:
        groups.setdefault(q.group, []).append(q.answer)
    right = json.loads((ROOT / "results/flamingo-plain.json").read_text())["runs"][0]["figures"]["right"]
    assert {group: right[group]["majority"] for group in groups} == pytest.approx(
        {group: 100 * max(map(answers.count, answers)) / len(answers) for group, answers in groups.items()})
    assert set(right) == {*groups, "caption, all"}


def test_captions_in_place_of_images_have_to_fit():
    _, asked = asked_in_a_test(context=48, shots=(0, 8))
    lost = {q.group for q in asked if not q.words}
    assert "unasked question, 8" in lost and "caption, 1 figure" not in lost
    assert {q.group.split(",")[0] for q in asked} >= {"new word", "unasked question"}
    for q in asked:
        assert len(common.SceneTokens().encode(f"<end> {q.words} {q.answer} <end>")) <= 48
    _, asked = asked_in_a_test(context=64, bytes=True)
    assert "caption, 3 figures" not in {q.group for q in asked}                # too long, in bytes


def test_right_answers_are_counted(monkeypatch):
    """The figures of the tables, from answers that are given by hand."""
    _, asked = asked_in_a_test(context=48, shots=(0, 1, 2, 8))
    in_words = {q.words for q in asked} - {""}
    assert any(not q.words for q in asked)

    def answers(args, model, tokens, part, features):
        assert len(part) <= 250
        if features is None:                                                   # the LM is right with captions alone
            return [q.answer if q.prompt in in_words else "no" for q in part]
        return [q.answer if len(q.answer) % 2 else f"{q.answer} and" for q in part]
    monkeypatch.setattr(flamingo, "answers", answers)
    found = few_shot.evaluate(None, None, None, asked, "features")
    assert len(found) == 16 + 20 + 1                                           # and all captions
    for group, right in found.items():
        own = [q for q in asked if q.group == group or group == "caption, all" and q.group in (
            "caption, 1 figure", "caption, 2 figures", "caption, 3 figures")]
        assert right["flamingo"] == pytest.approx(100 * sum(len(q.answer) % 2 for q in own) / len(own)) and right["lm"] == 0
        assert right.get("captions", 100) == 100 and ("captions" in right) == any(q.words for q in own)
        texts = [q.answer for q in own]
        assert right["majority"] == pytest.approx(100 * max(texts.count(text) for text in texts) / len(own))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Trained and evaluated in seconds: the folder, and what was printed."""
    out = tmp_path_factory.mktemp("few_shot")
    process = run("--seeds", 1, "--out", out, "--", *SMALL, script=SCRIPT)
    assert process.returncode == 0, process.stderr
    return out, process.stdout


def test_figures_equal_one_question_after_another(done):
    """From the checkpoint, one prompt at a time, without the batches."""
    out, text = done
    result = json.loads((out / "flamingo-plain.json").read_text())
    right = result["figures"]["right"]
    args, model, tokens, statistics, seconds = few_shot.load(out / "plain-1", "cpu")
    weights = torch.load(out / "plain-1/checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(model.state_dict()[name], w) for name, w in weights.items())
    assert not model.training and result["figures"]["base_seconds"] == sum(seconds) and min(seconds) > 0
    asked, scenes = few_shot.queries(args, tokens, 48)
    images = common.paint(scenes, args.seed + 1_000_000)
    hits = {}
    for q in asked:
        if not q.group.startswith(("number", "colour, unseen", "unasked question, 1", "new word, 1", "held-out word, 0")):
            continue
        features = model.encode(flamingo.normalize(images[q.images], **statistics)).bfloat16().float()
        media = model.project(features[None])
        for who, prompt, own in (("flamingo", q.prompt, media), ("lm", q.prompt.replace("<image>", ""), None),
                                 ("captions", q.words, None)):
            (answer,) = flamingo.sample(model, [tokens.encode(f"<end> {prompt}")], own, len(q.answer.split()) + 1, tokens.end)
            hits.setdefault((q.group, who), []).append(tokens.decode(answer) == q.answer)
    assert len(hits) == 3 * 7
    for (group, who), own in hits.items():
        assert right[group][who] == pytest.approx(100 * sum(own) / len(own)), (group, who)
    assert any(0 < right[group][who] for group, who in hits)
    assert all(len(line) <= 80 for line in text.splitlines())
    for words in "exactly right, %", "examples in the prompt", "held-out word", "LM, captions", "majority":
        assert words in text


def test_what_is_done_is_kept(done, tmp_path):
    out, text = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = run("--seeds", 1, "--out", out, "--", *SMALL, script=SCRIPT)
    words = " ".join(again.stdout.split())              # lines are wrapped, and paths differ in length
    assert again.returncode == 0 and "is there already" in words and "step 1" not in words
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    tables = lambda text: text[text.rindex("\nexactly right"):]
    assert tables(again.stdout) == tables(text)
    refused(run("--seeds", 1, "--out", out, "--", *SMALL, "--latents", 3, script=SCRIPT), 1, "is of another --latents: choose another --out",
            script="few_shot.py")
    kept, path = (out / "flamingo-plain.json").read_text(), tmp_path / "plain-1.json"
    folder = run(out / "plain-1", "--out", tmp_path, script=SCRIPT)           # a finished run gives the same figures
    assert folder.returncode == 0 and path.read_text() == kept and tables(folder.stdout) == tables(text)
    path.write_text(kept.replace('"majority": ', '"majority": 1'))
    again = run(out / "plain-1", "--out", tmp_path, script=SCRIPT)
    assert again.returncode == 0 and tables(again.stdout) != tables(text)      # nothing was evaluated again
    path.write_text(kept[:100])
    refused(run(out / "plain-1", "--out", tmp_path, script=SCRIPT), 1, "cannot be read", script="few_shot.py")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_a_run_that_was_stopped_continues(done, tmp_path, monkeypatch):
    """And the runs of a seed use one LM and one ViT."""
    out, _ = done
    monkeypatch.setattr(few_shot, "ABLATIONS", {"no-gate": dict(gate_start=math.inf)})
    options = few_shot.options(["--seeds", "1", "--ablate", "--out", str(tmp_path), "--", *SMALL])
    main, count = flamingo.main, []

    def stop(args):
        """The second run stops after it was trained, before it was evaluated."""
        count.append(args.resume)
        if len(count) == 2:
            monkeypatch.setattr(flamingo, "show", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        return main(args)
    with monkeypatch.context() as patch:
        patch.setattr(flamingo, "main", stop)
        with pytest.raises(KeyboardInterrupt):
            few_shot.main(options)
    monkeypatch.undo()
    monkeypatch.setattr(few_shot, "ABLATIONS", {"no-gate": dict(gate_start=math.inf)})
    assert (tmp_path / "plain-1/few-shot.json").exists() and not (tmp_path / "ablated-no-gate-1/few-shot.json").exists()
    few_shot.main(options)
    figures, run_result = (tmp_path / name for name in ("plain-1/few-shot.json", "plain-1/result.json"))
    before, text = run_result.stat().st_mtime_ns, figures.read_text()
    figures.unlink()
    few_shot.main(options)                                                     # the run is not done again
    assert figures.read_text() == text and run_result.stat().st_mtime_ns == before
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(results) == {"flamingo-plain", "flamingo-ablated-no-gate"}
    assert sorted(path.parent.name for path in tmp_path.glob("*/lm")) == ["plain-1"]
    assert sorted(path.parent.name for path in tmp_path.glob("*/vit")) == ["plain-1"]
    assert results["flamingo-ablated-no-gate"]["figures"]["gates"] == [[1., 1.]]
    first = json.loads((out / "flamingo-plain.json").read_text())
    assert results["flamingo-plain"]["figures"]["right"] == first["figures"]["right"]
    assert results["flamingo-ablated-no-gate"]["figures"]["trained"] == first["figures"]["trained"] - 2


def test_tables_are_means_and_fit_80_columns():
    groups = ["caption, 1 figure", "caption, unseen kind", "shape, unseen kind", "unasked question, 4", "new word, 4", "held-out word, 4"]
    results = [dict(figures=dict(shots=[0, 1, 2, 4, 8], right={
        name: dict(flamingo=90. + 5 * seed, captions=100., lm=0., majority=12.) for name in groups + [f"new word, {k}" for k in (0, 1, 2, 8)]}))
        for seed in range(3)]
    one, two = few_shot.tables(results)
    assert one[1] == ["caption, 1 figure", "95.0 ±5.0", "100.0 ±0.0", "0.0 ±0.0", "12.0 ±0.0"] and len(one) == 4
    assert two[5] == ["new word", "", "", "", "", ""] and two[6] == ["  Flamingo"] + ["95.0 ±5.0"] * 5
    assert two[2] == ["  Flamingo", "-", "-", "-", "95.0 ±5.0", "-"]
    three = few_shot.ablations({"plain": results, "ablated-latents-0": results[:2]})
    assert three[1] == ["plain", "95 ±5", "100 ±0", "95 ±5", "95 ±5", "95 ±5", "95 ±5"] and three[2][:2] == ["latents-0", "92 ±4"]
    for rows in one, two, three:
        assert max(map(len, common.table(rows).splitlines())) <= 80


def test_ablations_and_settings(tmp_path):
    """Each ablation is one setting that flamingo.py has; what comes after -- wins over the usual sizes."""
    args = few_shot.options(["--ablate", "--seeds", "0", "4", "--out", str(tmp_path), "--", "--steps", "7", "--device", "cpu", "--shots", "1", "2"])
    jobs = list(few_shot.jobs(args))
    assert len(jobs) == 2 * 8 and jobs[0][0] == "plain"
    usual = jobs[0][3]
    assert usual == few_shot.PLAIN | dict(steps=7, device="cpu", shots=(1, 2), seed=0)
    for name, folder, path, settings in jobs[1:8]:
        ((key, value),) = settings.items() - (usual | {}).items()
        assert getattr(flamingo.Args(), key) != value and name.startswith("ablated-")
        common.check(flamingo.Args(**settings))
        assert path == folder / "few-shot.json" and folder.name == f"{name}-0"
    assert jobs[8][3] == usual | dict(seed=4)
    quick = list(few_shot.jobs(few_shot.options(["--quick"])))
    assert len(quick) == 1 and quick[0][3]["steps"] == 20 and str(quick[0][1]) == "runs/few-shot-quick/plain-0"
    (plain,) = few_shot.jobs(few_shot.options([]))
    assert str(plain[2]) == "runs/few-shot/plain-0/few-shot.json" and str(plain[1]) == "runs/few-shot/plain-0"


def test_bad_input(done, tmp_path):
    no = lambda status, *flags, words: refused(run(*flags, script=SCRIPT), status, *words, script="few_shot.py")
    no(1, tmp_path / "nothing", words=["there is no", "holds no finished run of flamingo.py"])
    no(1, done[0] / "plain-1/lm", words=["holds no finished run of flamingo.py"])
    no(2, tmp_path, "--ablate", words=["--seeds, --ablate and --quick train runs"])
    no(2, "--", "--seed", 3, words=["take --seeds and --out"])
    no(2, "--seed", 3, words=["unknown flag --seed", "did you mean --seeds?"])
    no(1, "--out", tmp_path, "--", *SMALL, "--heads", 3, words=["cannot be divided among 3 heads"])
    process = run("--", "--evry", 2, script=SCRIPT)
    assert process.returncode == 2 and "unknown flag --evry, did you mean --every?" in process.stderr
    help = run("--help", script=SCRIPT)
    assert help.returncode == 0 and "--ablate" in help.stdout and "settings of flamingo.py" in help.stdout
