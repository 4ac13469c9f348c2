"""Flamingo in numbers: its answers beside those of its LM alone, and what each of its parts is for.

Groups of questions: captions and questions of scenes with 1, 2 or 3 figures and of kinds (pairs of
shape and colour) that were in no training image; and few-shot episodes: a new word, one of two or
of three; a held-out new word (one that came with no image in training; its syllables did, in other
words); a question that is not asked. Answers count where they are exactly right. Beside Flamingo:
the LM alone, without images; the LM with captions in place of the images, as far as they fit its
context; and the most frequent answer of the group.

Run      python experiments/few_shot.py runs/flamingo          evaluates a finished run, or several
         python experiments/few_shot.py --seeds 0 1 2 --ablate -- --lm-steps 900
                                       trains and evaluates; after -- any settings of flamingo.py
Writes   results/<run>.json; with --seeds flamingo-plain.json and, for each ablation,
         flamingo-ablated-<name>.json, with all seeds. Those of one are kept in the folder of its
         run, and are not done again. The runs of a seed use the same LM and the same ViT.
"""
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import common, flamingo, repeat                                                    # noqa: E402

PLAIN = dict(tests=300)                              # beside the usual settings
QUICK = dict(steps=20, tests=24, lm_steps=20, vit_steps=20, images=2000)
ABLATIONS = {"all": dict(attend="all"), "every-2": dict(every=2), "every-4": dict(every=4),
             "latents-0": dict(latents=0), "no-freeze": dict(freeze=False),
             "no-gate": dict(gate_start=math.inf), "start-half": dict(gate_start=.5)}
WHO = dict(flamingo="Flamingo", captions="LM, captions", lm="LM alone", majority="majority")
EPISODES = {"unasked question": "unasked", "new word": "new", "held-out word": "held-out",
            "new word of 3": "new of 3", "held-out word of 3": "held-out of 3"}


def queries(args, tokenizer, context):
    """What is asked, as far as it fits the context, and the scenes it is about: common.queries, with
    names for groups and without words, captions in place of the images, that do not fit."""
    asked, scenes = common.queries(args.seed, args.tests, args.shots)
    fits = lambda text, q: len(tokenizer.encode(f"<end> {text} {q.answer} <end>")) <= context
    found = []
    for q in asked:
        name, column = q.group
        if name in common.ABOUT and column in ("2 figures", "3 figures"):
            column = "2 or 3 figures"
        if fits(q.prompt, q):
            found.append(q._replace(group=f"{name}, {column}", words=q.words * fits(q.words, q)))
    return sorted(found, key=lambda q: q.group), scenes           # alike prompts in a batch


def evaluate(args, model, tokenizer, asked, features):
    """{group: {who: % of the answers that are exactly right}}, who: as in WHO."""
    found, answers = {}, {}
    seen = lambda q: q.group.startswith("caption") and not q.group.endswith("unseen kind")
    groups = lambda q: [q.group, "caption, all"] if seen(q) else [q.group]
    in_words = [q._replace(prompt=q.words) for q in asked if q.words]
    for who, own, media in (("flamingo", asked, features), ("lm", asked, None),
                            ("captions", in_words, None)):
        parts = [own[i:i + 250] for i in range(0, len(own), 250)]
        for part in common.progress(parts, WHO[who]):
            for q, text in zip(part, flamingo.answers(args, model, tokenizer, part, media)):
                for group in groups(q):
                    found.setdefault(group, {}).setdefault(who, []).append(text == q.answer)
    for q in asked:
        for group in groups(q):
            answers.setdefault(group, []).append(q.answer)
    for group, right in found.items():
        for who, hits in right.items():
            right[who] = 100 * sum(hits) / len(hits)
        most = max(map(answers[group].count, set(answers[group])))
        right["majority"] = 100 * most / len(answers[group])
    return dict(sorted(found.items()))


def read(path, settings, key="settings"):
    """A JSON file about a run of these settings. Raises UserError for any other."""
    common.require(path.exists(), f"there is no {path}: {path.parent} holds no finished run of "
                   "flamingo.py")
    try:
        found = json.loads(path.read_text())
        there = found[key] | {}
    except (OSError, ValueError, KeyError, TypeError):
        raise common.UserError(f"{path} cannot be read: delete it, it can be made again") from None
    free = "device", "data_dir", "compile", "save_every", "data", "prompt"
    differ = [common.flag(name) for name, value in json.loads(json.dumps(settings)).items()
              if name not in free and value not in (there.get(name, value), "auto")]
    common.require(not differ, f"{path} is of another {', '.join(differ)}: choose another --out")
    return found


def train(folder, settings):
    """Runs flamingo.py with these settings, or continues it, unless that is done."""
    begun = (folder / "settings.json").exists()
    if begun:
        read(folder / "settings.json", settings, "args")
    if not (folder / "result.json").exists():
        flamingo.main(flamingo.Args(**settings, out=str(folder), resume=begun))


def load(folder, device):
    """A finished run: its Args, its model in evaluation mode, its tokenizer, {mean, std} of its
    images, and the seconds that the training of its LM and of its ViT took."""
    state, folders = common.read_checkpoint(folder, "flamingo.py"), []
    args = flamingo.Args(**state["args"] | dict(out=str(folder), device=common.find_device(device)))
    for name, settings in ("lm", flamingo.LM), ("vit", flamingo.VIT):
        how, done = common.stage(args, name, settings)
        common.require(getattr(args, name) or done, f"the {name} of {folder} is not there any "
                       f"more: python flamingo.py --resume --out {folder} trains it again")
        folders.append(getattr(args, name) or how.out)
    lm, tokenizer = flamingo.load_lm(args, folders[0])
    vit, patch, statistics = flamingo.load_vit(args, folders[1])
    model = flamingo.Flamingo(lm, vit, patch, tokenizer.image, args.every, args.latents,
                              args.resampler_depth, args.attend, args.gate_start)
    model.load_state_dict(state["model"])
    seconds = [common.read_checkpoint(name)["seconds"] for name in folders]
    return args, model.to(args.device).eval(), tokenizer, statistics, seconds


def measure(folder, path, device):
    """Evaluates a finished run: its result.json with other figures, which is written to path."""
    result = read(folder / "result.json", {})
    args, model, tokenizer, statistics, seconds = load(folder, device)
    asked, scenes = queries(args, tokenizer, len(model.lm.pos_embed.weight))
    images = common.paint(scenes, args.seed + 1_000_000, args.image_size, args.device)
    features = flamingo.encode(args, model, images, statistics)
    right = evaluate(args, model, tokenizer, asked, features)
    captions = right.get("caption, all", {}).get("flamingo", math.nan)
    result["summary"] = f"captions {captions:.1f} %"
    result["figures"] = dict(
        right=right, shots=args.shots, lines=result["figures"]["lines"],
        base_seconds=sum(seconds),
        gates=[[layer.attn_gate.tanh().item(), layer.mlp_gate.tanh().item()]
               for layer in model.gated],
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad))
    path.parent.mkdir(parents=True, exist_ok=True)
    with common.replacing(path) as f:
        f.write((json.dumps(result, indent=1) + "\n").encode())
    return result


def cell(results, group, who, digits=1):
    """The mean and, of several results, the standard deviation of a figure, as text."""
    found = [result["figures"]["right"].get(group, {}) for result in results]
    values = [right[who] for right in found if who in right]
    return common.mean_std(values, digits).replace(" +- ", " ±") if values else "-"


def tables(results):
    """The results of one run or several as two tables, of 80 columns at most."""
    shots, episodes = results[0]["figures"]["shots"], [*EPISODES]
    names = {name: 0 for result in results for name in result["figures"]["right"]}     # each once
    yield [["exactly right, %", *WHO.values()]] + [
        [name, *(cell(results, name, who) for who in WHO)]
        for name in names if name.split(", ")[0] not in episodes]
    rows = [["number of examples", *map(str, shots)]]
    for name in episodes:
        rows += [[name, *[""] * len(shots)]] + [
            [f"  {WHO[who]}", *(cell(results, f"{name}, {k}", who) for k in shots)]
            for who in ("flamingo", "captions", "lm")]
    yield rows


def ablations(results):
    """{name: results of all seeds} as a table of a few figures, a row per ablation."""
    shots = results["plain"][0]["figures"]["shots"]
    k = 4 if 4 in shots else shots[-1]
    columns = {"caption": ("caption, 1 figure", "flamingo"),
               "LM, captions": ("caption, 1 figure", "captions"),
               "shape": ("shape, unseen kind", "flamingo"),
               **{title: (f"{name}, {k}", "flamingo") for name, title in EPISODES.items()
                  if "of 3" not in name}}
    return [["exactly right, %", *columns]] + [
        [name.removeprefix("ablated-"), *(cell(seeds, *of, digits=0) for of in columns.values())]
        for name, seeds in results.items()]


def options(argv):
    """The command line. given: the settings of flamingo.py after its --."""
    at = argv.index("--") if "--" in argv else len(argv)
    parser = common.Parser(
        prog="few_shot.py", allow_abbrev=False, description=__doc__.split("\n\n")[0],
        usage="%(prog)s [FOLDER ...] [--flag value ...] [-- settings of flamingo.py]")
    add = parser.add_argument
    add("folders", nargs="*", metavar="FOLDER", help="finished runs of flamingo.py to evaluate")
    add("--seeds", nargs="+", type=int, metavar="N", help="seeds of the runs to train [0]")
    add("--ablate", action="store_true", help="train with each ablation, too")
    add("--quick", action="store_true", help="hardly train, in runs/few-shot-quick")
    add("--out", default="", metavar="TEXT", help="folder of the figures [results] and of the runs "
        "[runs/few-shot]")
    args, rest = parser.parse_args(argv[:at]), common.parser_of(flamingo.Args)
    args.given = {name: tuple(value) if isinstance(value, list) else value
                  for name, value in vars(rest.parse_args(argv[at + 1:])).items()}
    if args.folders and (args.seeds or args.ablate or args.quick):
        parser.error("--seeds, --ablate and --quick train runs: give them without a FOLDER")
    if {"seed", "out", "resume"} & set(args.given):
        parser.error("--seed, --out and --resume cannot come after --: take --seeds and --out")
    args.out = args.out or "runs/few-shot-quick" * args.quick
    return args


def jobs(args):
    """What is to be done: (name, folder of the run, path of its figures, settings) each."""
    out, runs = Path(args.out or "results"), Path(args.out or "runs/few-shot")
    for folder in map(Path, args.folders):
        settings = read(folder / "result.json", {})["settings"]
        yield "plain", folder, out / f"{folder.resolve().name}.json", settings
    device = common.find_device(args.given.get("device", "auto"))
    usual = QUICK if args.quick else PLAIN if device.startswith("cpu") else {}
    names = {"plain": {}} | {f"ablated-{name}": how for name, how in ABLATIONS.items()
                              if args.ablate}
    for seed in () if args.folders else args.seeds or [0]:
        for name, how in names.items():
            folder = runs / f"{name}-{seed}"
            yield (name, folder, folder / "few-shot.json",
                   usual | args.given | how | dict(seed=seed))


def main(args):
    results = {}
    for name, folder, path, settings in jobs(args):
        if path.exists():
            common.say(f"{path} is there already.")
            result = read(path, settings)
        else:
            common.say(f"\nThe run {folder}:")
            if not args.folders:
                train(folder, settings)
            result = measure(folder, path, args.given.get("device", "auto"))
        results.setdefault(name, []).append(result)
    if not args.folders:
        for name, found in results.items():
            repeat.save(Path(args.out or "results") / f"flamingo-{name}.json", found)
    both = [*tables(results["plain"])] + [ablations(results)] * args.ablate
    common.say("".join(f"\n{common.table(rows)}\n" for rows in both))
    common.say("LM, captions: the LM alone, with captions in place of the images. When all have been "
               "shown, the new word is one of two, or of three: always the same one is right in 50 "
               "or 33 %." + " Means ± standard deviations." * (len(results["plain"]) > 1))


if __name__ == "__main__":
    common.guarded(main, options(sys.argv[1:]), "few_shot.py")
