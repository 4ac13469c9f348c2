"""Runs a script for several seeds, and reports mean and standard deviation of its figures.

Each seed has its own folder in --out. What is done is not done again, and what was interrupted is
continued, so the same command with more seeds adds to the others.

Run      python experiments/repeat.py mae.py --seeds 0 1 2 -- --mask-ratio 0.5
         python experiments/repeat.py gpt.py --quick
Writes   a run per seed in --out; with --name NAME the figures of all, too, as results/NAME.json
"""
import contextlib
import dataclasses
import importlib
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import common                                                                  # noqa: E402

RESULTS = Path("results")
FREE = {"seed", "out", "data_dir", "resume", "save_every"}    # settings that change no figure


def options(argv=None):
    """The command line. Exits with status 2 and one sentence where it makes no sense."""
    parser = common.Parser(
        prog="repeat.py", description=__doc__.split("\n\n")[0],
        usage="%(prog)s SCRIPT [--seeds N ...] [--name NAME] [--out FOLDER] [-- --flag value ...]",
        epilog="What follows -- are flags of the script: see python SCRIPT --help.")
    parser.add_argument("script", metavar="SCRIPT", help="such as mae.py")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="[0 1 2]")
    parser.add_argument("--name", default="", metavar="NAME",
                        help="write the figures of all seeds to results/NAME.json")
    parser.add_argument("--out", default="", metavar="FOLDER",
                        help="where the runs are [runs/repeat-NAME, or runs/repeat-<script>]")
    parser.add_argument("--quick", action="store_true",
                        help="--seeds 0 1 -- --steps 2: to see how it goes (flags you give win)")
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    cut = argv.index("--") if "--" in argv else len(argv)
    args, script_flags = parser.parse_args(argv[:cut]), argv[cut + 1:]
    script = Path(args.script)
    if not (ROOT / script).is_file() or script.suffix != ".py":
        parser.error(f"there is no script {args.script}")
    args.flags = ["--steps", "2"] * args.quick + script_flags
    args.seeds = args.seeds or [0, 1, 2][:2 if args.quick else 3]
    if len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds: each once")
    args.out = args.out or f"runs/repeat-{args.name or script.stem}{'-quick' * args.quick}"
    return args


def settings(args):
    """The settings of the runs, {name: value}. Raises SystemExit or UserError for wrong flags."""
    Args = getattr(importlib.import_module(Path(args.script).stem), "Args", None)
    common.require(Args, f"{args.script} has no settings of one run: it repeats by itself")
    given = vars(common.parser_of(Args).parse_args(args.flags))
    for name in {"seed", "out", "resume"} & set(given):
        raise common.UsageError(f"{common.flag(name)} is set for each run: leave it out")
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    with contextlib.redirect_stdout(io.StringIO()):        # the script says it, too
        how = [common.resolve(Args(**given, seed=seed)) for seed in args.seeds][0]
    found = dataclasses.asdict(how) | dict(dtype=common.precision(how))
    return json.loads(json.dumps({k: v for k, v in found.items() if k not in FREE}))


def has_result(out, wanted):
    """Whether a run in a folder is done. Raises UserError where there is one of other settings."""
    result, start = Path(out) / "result.json", Path(out) / "settings.json"
    path = result if result.exists() else start
    if not path.exists():
        return False
    try:
        saved = json.loads(path.read_text())["settings" if path == result else "args"]
    except (ValueError, KeyError, TypeError):
        raise common.UserError(f"{path} cannot be read: delete {out}, and the same command runs it "
                               "again") from None
    if path == start and saved.get("dtype") == "auto":
        saved["dtype"] = wanted["dtype"]
    differ = [common.flag(name) for name in wanted if saved.get(name) != wanted[name]]
    common.require(not differ, f"{out} holds a run with another {', '.join(differ)}: choose "
                   "another --out")
    return path == result


def run(script, out, flags):
    """Runs a script in a folder, or continues the run that is there. Raises UserError where it
    fails. Signals that ask to stop are passed on, so that the script can save."""
    resume = ["--resume"] * (Path(out) / "settings.json").exists()
    line = [sys.executable, ROOT / script, *flags, "--out", out, *resume]
    stopped, process = None, subprocess.Popen([*map(str, line)], process_group=0)
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt as error:
            stopped = error
            process.send_signal(error.args[0] if error.args else signal.SIGINT)
    if stopped:
        print("The same command continues from there.", file=sys.stderr)
        raise stopped
    common.require(status == 0, f"{script} ended with status {status}, see above; the same command "
                   "continues from there")


def together(results):
    """The results (dicts as in result.json) of several seeds as one: what all of them share, and in
    a list `runs` what differs. Of a single seed it is the result itself."""
    if len(results) == 1:
        return results[0]
    parts = [result | dict(
        seed=result["settings"]["seed"],
        command=re.sub(r" --seed \d+", "", result.get("command", "")),
        settings={k: v for k, v in result["settings"].items() if k != "seed"})
        for result in results]
    shared = {k: v for k, v in parts[0].items() if all(part.get(k) == v for part in parts)}
    runs = [{k: v for k, v in part.items() if k not in shared} for part in parts]
    return shared | dict(runs=sorted(runs, key=lambda run: run["seed"]))


def apart(found):
    """The results in what together() made of them, one per seed."""
    shared = {k: v for k, v in found.items() if k != "runs"}
    results = [shared | run for run in found.get("runs", [{}])]
    for result in results:
        if "seed" in result:
            result["settings"] = result["settings"] | dict(seed=result.pop("seed"))
    return results


def save(path, results):
    """Writes results of several seeds to a file, in one motion, unless they are there."""
    path, text = Path(path), json.dumps(together(results), indent=1) + "\n"
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        with common.replacing(path) as f:
            f.write(text.encode())


def keep(path, result):
    """Writes the result of a seed to a file, beside those of other seeds that are there."""
    found = apart(json.loads(Path(path).read_text())) if Path(path).exists() else []
    seed = result["settings"]["seed"]
    save(path, [*(r for r in found if r["settings"]["seed"] != seed), result])


def numbers(value, name=""):
    """All numbers in the figures: pairs of a name, such as 'accuracy, MAE, 0', and a number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value
    elif isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(part, f"{name}, {key}" if name else str(key))


def figures(out):
    """The numbers that came out of a run, {name: number}; of settings that it repeats none."""
    result = json.loads((Path(out) / "result.json").read_text())
    given = result["settings"]
    return dict(numbers({k: v for k, v in result["figures"].items() if given.get(k) != v}))


def main(args):
    wanted = settings(args)
    for i, seed in enumerate(args.seeds, 1):
        out = Path(args.out) / str(seed)
        if not has_result(out, wanted):
            common.say(f"\n{args.script}, seed {seed} ({i} of {len(args.seeds)})")
            run(args.script, out, [*args.flags, "--seed", seed])
    if args.name:
        save(RESULTS / f"{args.name}.json", [
            json.loads((Path(args.out) / str(seed) / "result.json").read_text())
            for seed in args.seeds])
    found = [figures(Path(args.out) / str(seed)) for seed in args.seeds]
    rows = [[name, common.mean_std([f[name] for f in found], 3)] for name in found[0]
            if all(name in f for f in found)]
    head = "mean +- standard deviation" if len(found) > 1 else "value"
    rows = [["seeds " + " ".join(map(str, args.seeds)), head], *rows]
    common.say(f"\n{common.table(rows)}")


if __name__ == "__main__":
    args = options()
    common.guarded(main, args, "repeat.py")
