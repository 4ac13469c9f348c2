"""What several experiments share: the flags of lora.py beside their own, files of figures that are
continued, lora.py's training as a function, the names of its methods, and how a mean is written."""
import contextlib
import copy
import io
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common, lora                                                            # noqa: E402


WHERE = "machine", "threads", "versions"          # of figures: where they were measured first
NAMES = dict(lora="LoRA", ia3="(IA)³", bitfit="BitFit", first="first two blocks",
             middle="middle two blocks", last="last two blocks", full="full fine-tuning")


def parse(parser, argv, quick, without):
    """The command line of an experiment, with flags of lora.py: (own, {name: value of lora.Args}).
    --quick gives the flags `quick` of lora.py, and later ones win; without: what is refused."""
    own, rest = parser.parse_known_args(argv)
    flags = common.parser_of(lora.Args)
    flags.prog = parser.prog
    given = vars(flags.parse_args(quick * own.quick + rest))
    for name in set(without) & set(given):
        parser.error(f"{common.flag(name)} cannot be used here")
    return own, {name: tuple(value) if isinstance(value, list) else value
                 for name, value in given.items()}


def new_result(command, figures, settings, device):
    """What a file holds at first. command: a list of words; settings: {name: value}."""
    settings = {name: value for name, value in settings.items()
                if name not in ("out", "data_dir", "resume")}
    return dict(command=" ".join(map(str, command)), summary="", figures=figures,
                machine=common.machine(device), threads=torch.get_num_threads(), seconds=0.,
                settings=json.loads(json.dumps(settings)),
                versions=dict(python=platform.python_version(), torch=torch.__version__))


def continued(path, new, free=(), fixed=()):
    """The new result, with the figures that the file holds already. Raises UserError where they are
    of other settings. free: settings that change no figure; fixed: figures that must be the same.
    """
    path = Path(path)
    if not path.exists():
        return new
    try:
        old = json.loads(path.read_text())
        differ = [common.flag(name) for name, value in new["settings"].items()
                  if name not in free and old["settings"].get(name) != value]
        differ += [name for name in fixed if old["figures"][name] != new["figures"][name]]
        for name, value in new["figures"].items():
            value == {} and old["figures"][name].items()             # raises where it is no dict
        new = new | {name: old[name] for name in ("figures", "seconds", *WHERE)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        script = Path(new["command"].split()[1]).name
        raise common.UserError(f"{path} is no file of {script}: choose another --out") from None
    common.require(not differ, f"{path} has figures of another {', '.join(differ)}: choose another "
                   "--out")
    return new


def save(path, result):
    """Writes the file in one motion."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with common.replacing(path) as f:
        f.write((json.dumps(result, indent=1) + "\n").encode())


def fit(args, base, examples, bos=lora.BYTES.BOS, watch=lambda run, n: None):
    """Adapts a copy of the base to examples (k, 2, 1 + T) as lora.py does. watch(run, n) is called
    when n steps are done and the learning rate of the next is set. Returns the model, in evaluation
    mode; the number of trained parameters; and the run's seconds."""
    torch.manual_seed(args.seed)
    model = lora.adapt_base(args, copy.deepcopy(base)).train()
    optimizer = common.adamw(model.parameters(), args.lr, args.weight_decay)
    with tempfile.TemporaryDirectory() as args.out, contextlib.redirect_stdout(io.StringIO()):
        run = common.Run(args, model, optimizer)
        for step in run:
            watch(run, step)
            x, target = run.batch(examples).unbind(1)
            with run.autocast():
                loss = lora.distance(model(lora.mask(x, bos)[0]), target)
            run.update(loss)
        watch(run, args.steps)
    trained = sum(p.numel() for p in lora.adapter_state(model).values())
    return model.eval(), trained, run.seconds


def mean_std(values, digits=1):
    """Mean and standard deviation, for a table of 80 columns."""
    return common.mean_std(values, digits).replace(" +- ", " ±")
