"""Examples in the prompt, or training on them? The same k examples, on a GPT that can do both.

With 20 to 70 examples, training a little is better than examples in the prompt, say Liu et al. 2022
("T-Few", arXiv 2205.05638) of models of billions of parameters. Here one can see what it hangs on.

The GPT learned an invented language: each of 128 words takes an ending, and the words are in 16
classes with 4 endings each. A dialect, the task, chooses one of the four for each class. A text of
the training is 33 words of one dialect, each followed by its ending, and no dialect comes twice in
practice (there are 4^16). So the GPT learns to find out the dialect from the words so far.

Then come new dialects, of two kinds, each with k examples, which are words with their endings:
    of the family     a dialect as in training
    half outside      eight of the classes take the endings of each other: never so in training
In-context has the examples in its prompt, as many as its context holds; LoRA, (IA)^3, BitFit and
full tuning train on them, all in each step, without any in the prompt. Asked are the endings of all
other words. The row "shown" is the fraction of them whose class is among the examples': of the
others one can only guess.

The learning rate is the best of several for each kind, method and k, on other dialects (--choose)
and the base of the first seed. In-context has nothing to choose.

With --base the same is asked of GPT-2, which has learned no such language: the words are English, a
class is of one kind (animals, colours ...), and the endings are syllables, as in "horse: ba". GPT-2
knows the kinds, but not their syllables.

Expect   In the family the prompt and training alike know all that the examples show, and the prompt
         has the least loss; at 64 examples, of which the context holds 32, training is better. Half
         outside, the prompt knows half of what they show, and training 80 to 100 %: it is better
         from a few examples on (at 32 it has 72 to 90 % of the endings right, the prompt 45).

Run      python experiments/prompt_or_training.py            three bases, five dialects of a kind
         python experiments/prompt_or_training.py --base gpt2/    GPT-2; for a GPU
         python experiments/prompt_or_training.py --quick    hardly trained, and little: seconds
Writes   one JSON file (--out), after every few trainings, and beside it the curves as an SVG. The
         same command continues it; more of --seeds or --tasks add to it; with other settings it is
         refused. The bases are in runs/.
"""
import copy
import math
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import common, curves, lora, shared                                            # noqa: E402

CLASSES, WORDS, ENDINGS = 16, 128, 4              # words of all classes together; endings of each
BOS = WORDS + CLASSES * ENDINGS                   # tokens: words, endings, BOS
KINDS = ["of the family", "half outside"]
WITH_BASE = "of English words"                    # the kind of task with --base
LABELS = shared.NAMES | {                         # in the picture
    "of the family": "as in pre-training", "half outside": "half of each unlike pre-training",
    "in-context": "in the prompt", "the base": "no examples", "shown": "what the examples show"}
RATES = dict(lora=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), ia3=(1e-2, 3e-2, 1e-1, 3e-1, 1.),
             bitfit=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), full=(1e-4, 3e-4, 1e-3, 3e-3))
GPT2_RATES = dict(lora=(1e-4, 3e-4, 1e-3, 3e-3), ia3=(3e-3, 1e-2, 3e-2, 1e-1),
                  bitfit=(3e-4, 1e-3, 3e-3, 1e-2), full=(1e-5, 3e-5, 1e-4))
METHODS = ["the base", "in-context", *RATES]
USUAL = dict(context=66, dim=64, depth=2, heads=4, base_steps=800, base_batch=32, base_lr=3e-3,
             muon_lr=.02, base_dropout=0., steps=100, weight_decay=.01)
QUICK = dict(dim=16, heads=2, base_steps=20, base_batch=4, steps=3)
ENGLISH = [line.split() for line in """horse sheep goat wolf lion tiger mouse rabbit
red blue green yellow black white brown pink
bread cheese butter rice soup cake meat sugar
king queen prince duke lord emperor count pope
one two three four five six seven eight
head hand foot arm leg eye ear nose
north south east west left right up down
iron gold silver copper tin lead steel zinc
car bus train ship boat truck plane bicycle
rain snow wind storm cloud fog ice thunder
Monday Tuesday Wednesday Thursday Friday Saturday Sunday weekend
doctor teacher lawyer nurse farmer baker soldier judge
France Germany Italy Spain China Japan Russia Egypt
apple pear cherry lemon grape banana peach plum
chair table desk bed shelf bench sofa stool
shirt coat hat shoe glove scarf dress sock""".splitlines()]                    # a class a line


# ------------------------------------------------------------------------------------- the tasks


def endings(dialect, words):
    """The tokens of the endings of words (..., n) in dialects (..., CLASSES), which hold the number
    of each class's ending among all endings. The class of a word is its number modulo CLASSES."""
    return WORDS + dialect.gather(-1, words % CLASSES)


def dialects(n, generator=None):
    """n dialects of the family at random: (n, CLASSES)."""
    choice = torch.randint(ENDINGS, (n, CLASSES), generator=generator)
    return torch.arange(CLASSES) * ENDINGS + choice


def texts(n, generator=None, words=33):
    """n texts, each of so many words of a dialect of its own, with endings: (n, 2 * words)."""
    order = torch.rand(n, WORDS, generator=generator).argsort(-1)[:, :words]
    return torch.stack([order, endings(dialects(n, generator), order)], -1).flatten(1)


def task(kind, number):
    """All words in one order, with their endings in a dialect: (WORDS, 2). The first k are the
    examples, also of a larger k. Tasks of the two kinds with the same number have the same words
    and choices."""
    generator = torch.Generator().manual_seed(number)
    order = torch.randperm(WORDS, generator=generator)
    dialect, cycle = dialects(1, generator)[0], torch.randperm(CLASSES, generator=generator)
    if kind == KINDS[1]:
        cycle = cycle[:CLASSES // 2]
        dialect[cycle] = dialect[cycle.roll(1)]                  # of these none keeps its own
    return torch.stack([order, endings(dialect, order)], -1)


def shown(x, k):
    """The fraction of the words after the k examples in x (WORDS, 2) whose class is among theirs,
    in %."""
    return 100 * torch.isin(x[k:, 0] % CLASSES, x[:k, 0] % CLASSES).float().mean().item()


class Language(NamedTuple):
    """How a GPT is told words with their endings. The loss ignores targets of -100."""
    rows: Callable              # words and endings (n, 2) -> tokens and targets (n, 2, T)
    BOS: int                    # begins each text, and pads the tokens
    longest: int                # the most tokens of a word with its ending


def invented(x):
    """Words and endings (n, 2) as tokens and targets (n, 2, 2): each is a token."""
    return torch.stack([x, torch.stack([torch.full_like(x[:, 0], -100), x[:, 1]], 1)], 1)


def english(tokenizer):
    """The Language of lines such as "horse: ba" for a tokenizer. The four endings of a class differ
    in the vowel, and all others begin with another letter."""
    def one(word, ending):
        given = f"{ENGLISH[word % CLASSES][word // CLASSES]}:"
        vowel, consonant = "aeio"[(ending - WORDS) % ENDINGS], "bdfghjklmnprstvz"[
            (ending - WORDS) // ENDINGS]
        return [tokenizer.encode(part) for part in (given, f" {consonant}{vowel}", "\n")]

    def rows(x):
        parts = [one(*pair) for pair in x.tolist()]
        target = [torch.cat([torch.full_like(given, -100), ending, torch.full_like(end, -100)])
                  for given, ending, end in parts]
        return torch.stack([pad_sequence([*map(torch.cat, parts)], True, tokenizer.BOS),
                            pad_sequence(target, True, -100)], 1).to(x.device)

    longest = max(sum(map(len, one(word, ending))) for word in range(WORDS)
                  for ending in range(WORDS, BOS, ENDINGS))
    return Language(rows, tokenizer.BOS, longest)


INVENTED = Language(invented, BOS, 2)


# ---------------------------------------------------------------------------------- the learners


def pretrain(args):
    """The base, which is trained unless it is there: a GPT in evaluation mode, and what it is."""
    how, done = common.stage(args, "base", ("data", "context", "dim", "depth", "heads", "dropout"),
                             weight_decay=.1, warmup=.05, data="dialects")
    if not done:
        common.say(f"First the base of seed {args.seed}. It is kept in {how.out}.")
        torch.manual_seed(args.seed)
        model = lora.GPT(BOS + 1, args.context, args.dim, args.depth, args.heads,
                         args.base_dropout).to(args.device)
        optimizer = common.optimizer(how, model.named_parameters())
        run = common.Run(how, model, optimizer, uniform=math.log(ENDINGS))
        for step in run:
            inputs, target = lora.mask(texts(how.batch).to(args.device), BOS)
            with run.autocast():
                loss = lora.distance(model(inputs)[:, 1::2], target[:, 1::2])    # of endings
            run.update(loss)
    return lora.load_base(args, how.out)


@torch.no_grad()
def evaluate(model, asked, examples, language, in_context=False):
    """Of the endings of words (m, 2), in_context: after the examples (k, 2) in the same prompt:
    accuracy in %, the same of those words alone whose class is among the examples', and loss in
    nats per token of the endings."""
    right, nats, count = [], 0., 0
    given = common.in_a_row(language.rows(examples), language.BOS)
    for part in language.rows(asked).split(max(1, 4096 // (len(given) + 1))):
        x, target = part.unbind(1)
        inputs, _ = lora.mask(lora.in_context(given, x) if in_context else x, language.BOS)
        logits, counted = model(inputs)[:, -x.shape[1]:].float(), target >= 0
        right.append((logits.argmax(-1) == target).logical_or(~counted).all(1))
        nats += lora.distance(logits, target).item() * counted.sum().item()
        count += counted.sum().item()
    right = 100 * torch.cat(right).float()
    known = torch.isin(asked[:, 0] % CLASSES, examples[:, 0] % CLASSES)
    return dict(accuracy=right.mean().item(), accuracy_shown=right[known].mean().item(),
                loss=nats / count)


def tune(base, method, lr, examples, args, language):
    """A copy of the base that was trained on the examples (k, 2) in one of lora.py's ways."""
    torch.manual_seed(args.seed)
    model = lora.adapt(copy.deepcopy(base), method)
    optimizer = common.adamw(model.parameters(), lr, args.weight_decay)
    x, target = language.rows(examples).unbind(1)
    inputs, _ = lora.mask(x, language.BOS)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * common.schedule(step, args.steps, args.warmup)
        loss = lora.distance(model(inputs), target)                              # of endings
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def learn(base, method, lr, x, k, args, language):
    """Accuracies and loss of a method that has the first k rows of a task x (WORDS, 2), on the
    others."""
    examples, asked = x[:k], x[k:]
    model = tune(base, method, lr, examples, args, language) if method in RATES else base
    return evaluate(model, asked, examples, language, method == "in-context")


# ----------------------------------------------------------------------------------- the program


def options(argv=None):
    """The command line. Exits with status 2 and one sentence where it makes no sense."""
    parser = common.Parser(prog="prompt_or_training.py", description=__doc__.split("\n\n")[0],
                           allow_abbrev=False, usage="%(prog)s [--flag value ...]")
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, metavar="N", help="each with its own base and dialects "
        "[0 1 2; with --quick 0 1]")
    add("--tasks", type=int, metavar="N", help="dialects of each kind for each seed [5; with "
        "--quick 2]")
    add("--choose", type=int, metavar="N", help="other dialects, to choose the learning rates on "
        "[2; with --quick 1]")
    add("--k", nargs="+", type=int, metavar="N", help="numbers of examples [1 2 4 8 16 32 64; with "
        "--quick 1 4 64]")
    add("--base", default="", metavar="FOLDER", help="published weights of GPT-2 [trains a base for "
        "each seed]")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps [auto]")
    add("--quick", action="store_true", help="sizes that are too small to learn anything")
    add("--out", metavar="FILE", help="file of the figures [results/prompt-or-training.json, "
        "with --base prompt-or-training-<its folder>.json; with --quick quick-... in runs/]")
    own = parser.parse_args(argv)
    usual = dict(seeds=[0, 1], tasks=2, choose=1, k=[1, 4, 64]) if own.quick else dict(
        seeds=[0, 1, 2], tasks=5, choose=2, k=[1, 2, 4, 8, 16, 32, 64])
    for name, value in usual.items():
        setattr(own, name, getattr(own, name) or value)
    if min(own.tasks, own.choose, *own.k) < 1 or max(own.k) > WORDS - 32:
        parser.error(f"--tasks, --choose and --k must be 1 or more, and --k at most {WORDS - 32}")
    if min(own.seeds) < 0 or max(own.seeds) > 1e9 or max(own.tasks, own.choose) > 1000:
        parser.error("--seeds must be from 0 to 1e9, and --tasks and --choose at most 1000")
    if len(set(own.seeds)) < len(own.seeds) or len(set(own.k)) < len(own.k):
        parser.error("--seeds and --k: each once")
    own.k.sort()
    name = "-".join(["prompt-or-training", *[Path(own.base).resolve().name] * bool(own.base)])
    own.out = own.out or ("runs/quick-" if own.quick else "results/") + f"{name}.json"
    own.sizes = USUAL | (QUICK if own.quick else {})
    if own.base:                                                    # it has its own sizes
        own.sizes = {name: own.sizes[name] for name in ("steps", "weight_decay")}
    own.kinds, own.rates = ([WITH_BASE], GPT2_RATES) if own.base else (KINDS, RATES)
    return own


def new_result(own):
    """What the file holds at first: the settings."""
    lists = [f"--{name} {' '.join(map(str, getattr(own, name)))}" for name in ("seeds", "k")]
    base = own.base and Path(own.base).resolve().name
    command = ["python experiments/prompt_or_training.py", *["--quick"] * own.quick, *lists,
               f"--tasks {own.tasks} --choose {own.choose}", *[f"--base {base}"] * bool(base)]
    settings = own.sizes | (dict(base=base) if base else {}) | dict(
        k=own.k, choose=own.choose, dtype="float32")
    return shared.new_result(command, dict(k=own.k, bases={}, rates={}, rows={}), settings,
                             common.find_device(own.device))


def number(seed, i, choose=False):
    """The number of the i-th task of a seed, or of the i-th task to choose rates on: no two are the
    same."""
    return 2000 * seed + 1000 * choose + i


def load(own, seed, figures):
    """The settings of a seed, its base and the language. Raises UserError where the file is of
    another base."""
    args = lora.Args(**own.sizes, seed=seed, out=f"runs/{Path(own.out).stem}-{seed}",
                     base=own.base, device=common.find_device(own.device), dtype="float32")
    if own.base:
        common.require(args.uses_published, f"--base {own.base} is a run, which knows no English: "
                       "it must be a folder with published weights of GPT-2")
        (base, about), language = lora.load_base(args, own.base), english(common.BPE.load(own.base))
    else:
        (base, about), language = pretrain(args), INVENTED
    known = figures["bases"].setdefault(str(seed), about["fingerprint"])
    common.require(known == about["fingerprint"], f"{own.out} has figures of another base for seed "
                   f"{seed}: choose another --out")
    return args, base, language


def cells(own, fits=lambda k: True):
    """What there is to do: (kind, method, k); in-context, where k examples and one more fit the
    context, and the base for each k, too, since each k asks other words."""
    for kind in own.kinds:
        for method in METHODS:
            for k in own.k:
                if method != "in-context" or fits(k):
                    yield kind, method, k


def place(tree, *names):
    """The dict at these keys of nested dicts, which are made where they are missing."""
    for name in names:
        tree = tree.setdefault(str(name), {})
    return tree


def choose(own, result):
    """Fills in figures["rates"]: {kind: {method: {k: {rate: the losses on the tasks to choose on}}}
    }, with the base of the first seed of the file."""
    figures = result["figures"]
    wanted = [(kind, method, k, lr) for kind, method, k in cells(own)
              for lr in own.rates.get(method, ())]
    missing = [cell for cell in wanted if len(place(figures["rates"], *cell[:3]).get(
        f"{cell[3]:g}", ())) < own.choose]
    if not missing:
        return
    seed = int(next(iter(figures["bases"]), own.seeds[0]))
    args, base, language = load(own, seed, figures)
    start = time.monotonic() - result["seconds"]
    for n, (kind, method, k, lr) in enumerate(common.progress(missing, "choosing rates")):
        tasks = [task(kind, number(seed, i, choose=True)) for i in range(own.choose)]
        place(figures["rates"], kind, method, k)[f"{lr:g}"] = [
            learn(base, method, lr, x.to(args.device), k, args, language)["loss"] for x in tasks]
        result["seconds"] = time.monotonic() - start
        if n % 8 == 7 or n == len(missing) - 1:
            shared.save(own.out, result)


def best(figures, kind, method, k):
    """The chosen learning rate, as the file names it: the least mean loss; "" where there is
    none."""
    rates = figures["rates"].get(kind, {}).get(method, {}).get(str(k), {})
    sound = {lr: np.mean(losses) for lr, losses in rates.items() if np.isfinite(losses).all()}
    return min(sound, key=sound.get, default="")


def measure(own, result, seed):
    """Fills in figures["rows"] for a seed: {kind: {method: {k: {seed: {accuracy, loss: a value per
    task}}}}}, also accuracy_shown; and, as if it were an accuracy, what the examples show."""
    figures, known = result["figures"], None
    context, longest = own.sizes.get("context"), INVENTED.longest
    if own.base:
        known = load(own, seed, figures)
        context, longest = len(known[1].pos_embed.weight), known[2].longest
    missing = [cell for cell in cells(own, lambda k: (k + 1) * longest <= context)
               if len(place(figures["rows"], *cell, seed).get("accuracy", ())) < own.tasks]
    if not missing:
        return
    args, base, language = known or load(own, seed, figures)
    start = time.monotonic() - result["seconds"]
    for kind, method, k in common.progress(missing, f"seed {seed}"):
        row = place(figures["rows"], kind, method, k, seed)
        limit = place(figures["rows"], kind, "shown", k, seed)
        for i in range(len(row.get("accuracy", ())), own.tasks):
            x, lr = task(kind, number(seed, i)), best(figures, kind, method, k)
            found = learn(base, method, float(lr or 0), x.to(args.device), k, args, language)
            for name, value in found.items():
                row.setdefault(name, []).append(value)
            if method == METHODS[0]:
                limit.setdefault("accuracy", []).append(shown(x, k))
        result["seconds"] = time.monotonic() - start
        shared.save(own.out, result)


def asked(own, figures):
    """The figures of those seeds and tasks alone that the command names."""
    cut = lambda seeds: {seed: {name: values[:own.tasks] for name, values in f.items()}
                         for seed, f in seeds.items() if int(seed) in own.seeds}
    rows = {kind: {method: {k: cut(f) for k, f in ks.items()}
                   for method, ks in methods.items()} for kind, methods in figures["rows"].items()}
    return figures | dict(rows=rows)


def means(figures, kind, method, k, what="accuracy"):
    """A mean over tasks for each seed; nothing where the context does not hold k examples."""
    row = figures["rows"][kind].get(method, {}).get(str(k), {})
    return [np.mean(f[what]) for f in row.values() if what in f]


def table(figures, kind, what):
    """Rows of a table: for each method and k the mean over seeds, of the accuracy with the standard
    deviation."""
    def cell(method, k):
        found = means(figures, kind, method, k, what)
        if what != "accuracy":
            digits = 2 if what == "loss" else 0
            return f"{np.mean(found):.{digits}f}" if found else ""
        return shared.mean_std(found, 0) if found else ""
    names = METHODS + ["shown"] * (what == "accuracy")
    return [["k", *map(str, figures["k"])]] + [
        [method, *(cell(method, k) for k in figures["k"])] for method in names]


def ahead(figures, kind, method, k, what):
    """By how much a method is better than in-context with k examples, or where these do not fit
    with the most that do: the mean of the differences on the same tasks, and its standard error."""
    def values(who, k):
        row = figures["rows"][kind][who].get(str(k), {})
        return np.array([value for f in row.values() for value in f.get(what, ())])
    prompts = [values("in-context", n) for n in figures["k"] if n <= k]
    found = values(method, k) - [x for x in prompts if len(x)][-1]
    found = -found if what == "loss" else found
    return found.mean(), found.std(ddof=1) / len(found) ** .5 if len(found) > 1 else 0.


def crossing(figures, kind, method, what):
    """The least k from which on a method is better than in-context by more than two standard
    errors; None if there is no such k."""
    first = None
    for k in figures["k"]:
        mean, error = ahead(figures, kind, method, k, what)
        first = (first or k) if mean > 2 * error else None
    return first


def crossings(figures):
    """A sentence per kind of task and measure."""
    for kind in figures["rows"]:
        for what, more in ("accuracy", "more often right"), ("loss", "less loss"):
            first = {method: crossing(figures, kind, method, what) for method in RATES}
            words = [f"{method} from k = {k}" if k else f"{method} never"
                     for method, k in first.items()]
            yield f"{more} than in-context, {kind}: {', '.join(words)}"


def lead(figures, kind):
    """Rows of a table: how much more often right than in-context, in points, and standard errors.
    """
    cell = lambda pair: f"{pair[0]:+.0f} ±{pair[1]:.0f}"
    return [["k", *map(str, figures["k"])]] + [
        [method, *(cell(ahead(figures, kind, method, k, "accuracy")) for k in figures["k"])]
        for method in RATES]


def draw(figures):
    """The curves of the accuracy as an SVG."""
    panels = []
    for kind in figures["rows"]:
        lines = {}
        for method in ["in-context", *RATES, "the base", "shown"]:
            found = [(k, means(figures, kind, method, k)) for k in figures["k"]]
            lines[LABELS[method]] = [(k, np.mean(x), np.std(x, ddof=1) if len(x) > 1 else 0.)
                                     for k, x in found if x]
        panels.append(dict(title=f"new dialects, {LABELS.get(kind, kind)}", x="examples k",
                           y="endings of other words, % right", lines=lines))
    return curves.draw(panels, log2=True, y_ends=(0, 100))


def report(own, figures):
    """The tables on the terminal."""
    what = ["", "More than in-context, which stays at the most that its "
            "context holds (points, ± standard error)", "Of the words whose class is among the "
            "examples', % right", "Loss, nats per ending"]
    for kind in own.kinds:
        what[0] = (f"New dialects {kind} ({len(own.seeds)} seeds, {own.tasks} dialects each), "
                   "% of the endings right")
        tables = [table(figures, kind, "accuracy"), lead(figures, kind),
                  table(figures, kind, "accuracy_shown"), table(figures, kind, "loss")]
        for words, rows in zip(what, tables):
            common.say(f"\n{words}:\n\n{common.table(rows)}")
    common.say("\nBy more than two standard errors from there on:\n\n"
               + "\n".join(f"{line[0].upper()}{line[1:]}." for line in crossings(figures)))


def main(own):
    torch.set_float32_matmul_precision("high")
    result = shared.continued(own.out, new_result(own))
    figures = result["figures"]
    choose(own, result)
    for seed in own.seeds:
        measure(own, result, seed)
    figures = asked(own, figures)
    result["summary"] = "; ".join(crossings(figures))
    shared.save(own.out, result)
    chart = Path(own.out).with_suffix(".svg")
    chart.write_text(draw(figures))
    report(own, figures)
    common.say(f"\nFigures: {own.out}; curves: {chart}")


if __name__ == "__main__":
    own = options()
    common.guarded(main, own, "prompt_or_training.py")
