"""All scripts on a pretend GPU (pretend_gpu.py): nothing is computed from tensors of two devices,
and what comes out is what a CPU gives, bit for bit. How CUDA itself rounds, and which random
numbers it draws, cannot be tested without one."""
import contextlib
import copy
import itertools
import json
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from pretend_gpu import pretend_gpu
from test_bert import published_names
from test_run import SCRIPTS, Stop, flags, here, log, module_of, same, settings_of   # noqa: F401
from test_weights import (authors_mae, bpe_folder, random_weights, safetensors, transformers_gpt2,
                          wordpiece_folder)
from torch import nn

import bert
import common
import gpt
import lora
import mae
import simclr

sys.path.insert(0, str(ROOT / "experiments"))
import adapt, compare, few_shot, fine_tune, repeat, while_training  # noqa: E402


def on(device):
    """With the pretend GPU, where the device is one."""
    return pretend_gpu() if device == "cuda" else contextlib.nullcontext()


# -------------------------------------------------------------------------- the pretend GPU


TWO = RuntimeError, "Expected all tensors to be on the same device"
INDEX = RuntimeError, "indices should be either on cpu or on the same device as the indexed tensor"
GENERATOR = RuntimeError, "Expected a 'cuda' device type for generator but found 'cpu'"
NUMPY = TypeError, "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy"
ORDINAL = RuntimeError, "invalid device ordinal"


def given():
    """On the pretend GPU x (3, 3), row (3,), ids (2,), number () and a layer; the same on the CPU
    are c, crow, cids and cnumber."""
    c, crow, cids, cnumber = torch.arange(9.).view(3, 3), torch.ones(3), torch.tensor([2, 0]), \
        torch.tensor(2.)
    return SimpleNamespace(
        x=c.to("cuda"), row=crow.to("cuda"), ids=cids.to("cuda"), number=cnumber.to("cuda"),
        c=c, crow=crow, cids=cids, cnumber=cnumber, layer=nn.Linear(3, 3).to("cuda"),
        generator=torch.Generator())


def attention(q, k, v, mask=None):
    """That of tensors (T, C), with one head."""
    return F.scaled_dot_product_attention(*(t[None, None] for t in (q, k, v)), mask)


def with_a_hook(x):
    """The gradient of the first rows, whose hook makes a tensor on the CPU; after it, split's makes
    zeros for the others."""
    part = x.requires_grad_().split(2)[0]
    part.register_hook(lambda gradient: gradient if torch.ones(2).is_cpu else None)
    part.sum().backward()
    return x.grad


RULES = {        # what is computed: on which device the result is, None if it is no tensor; or how
    "add": (lambda t: t.x + t.c, TWO),                                          # it is refused
    "add a row": (lambda t: t.c + t.row, TWO),
    "add one element": (lambda t: t.x + torch.ones(1), TWO),
    "add a number": (lambda t: t.x + t.cnumber, "cuda"),
    "add to a number": (lambda t: t.cnumber + t.x, "cuda"),
    "add numbers": (lambda t: t.cnumber + t.number, "cuda"),
    "add the GPU's number": (lambda t: t.c + t.number, TWO),
    "add in place": (lambda t: t.x.add_(t.c), TWO),
    "add in place to a number": (lambda t: t.cnumber.add_(t.number), TWO),
    "subtract a number in place": (lambda t: t.x.sub_(t.cnumber), "cuda"),
    "out": (lambda t: torch.add(t.x, t.x, out=torch.empty(3, 3)), TWO),
    "compare": (lambda t: t.x == t.c, TWO),
    "equal": (lambda t: torch.equal(t.x, t.c), TWO),
    "matmul": (lambda t: t.x @ t.c, TWO),
    "lerp": (lambda t: torch.lerp(t.x, t.x, t.crow), TWO),
    "cat": (lambda t: torch.cat([t.x, t.c]), TWO),
    "stack": (lambda t: torch.stack([t.row, t.crow]), TWO),
    "stack numbers": (lambda t: torch.stack([t.number, t.cnumber]), TWO),
    "where": (lambda t: torch.where(t.x > 1, t.x, t.c), TWO),
    "where, condition": (lambda t: torch.where(t.c > 1, t.x, t.x), TWO),
    "where, numbers": (lambda t: torch.where(t.x > 1, 1., t.cnumber), "cuda"),
    "masked_fill": (lambda t: t.x.masked_fill(t.c > 1, 0.), TWO),
    "masked_fill by a number": (lambda t: t.x.masked_fill(t.x > 1, t.cnumber), "cuda"),
    "gather": (lambda t: t.x.gather(1, t.cids[:, None]), TWO),
    "scatter": (lambda t: t.x.scatter(1, t.cids[:, None], 1.), TWO),
    "scatter_add": (lambda t: t.x.scatter_add_(0, t.ids[None], t.crow[None, :2]), TWO),
    "index_select": (lambda t: t.x.index_select(0, t.cids), TWO),
    "index_fill": (lambda t: t.x.index_fill(0, t.cids, 0.), TWO),
    "embedding": (lambda t: F.embedding(t.cids, t.x), TWO),
    "one_hot": (lambda t: F.one_hot(t.ids, 3), "cuda"),
    "linear": (lambda t: t.layer(t.c), TWO),
    "linear, bias": (lambda t: F.linear(t.x, t.x, t.crow), TWO),
    "layer_norm": (lambda t: F.layer_norm(t.x, [3], t.crow), TWO),
    "cross_entropy": (lambda t: F.cross_entropy(t.x[:2], t.cids), TWO),
    "mse_loss": (lambda t: F.mse_loss(t.x, t.c), TWO),
    "attention": (lambda t: attention(t.x, t.x, t.c), TWO),
    "attention, mask": (lambda t: attention(t.x, t.x, t.x, torch.eye(3, dtype=torch.bool)), TWO),
    "grid_sample": (lambda t: F.grid_sample(t.x[None, None], torch.zeros(1, 2, 2, 2),
                                            align_corners=False), TWO),
    "index by the CPU's": (lambda t: t.x[t.cids], "cuda"),
    "index by the CPU's mask": (lambda t: t.x[t.crow > 0], "cuda"),
    "index the CPU's": (lambda t: t.c[t.ids], INDEX),
    "index the CPU's by a mask": (lambda t: t.c[t.x > 1], INDEX),
    "index the CPU's by a number": (lambda t: t.c[t.ids[0]], "cpu"),
    "set rows": (lambda t: t.x.__setitem__(t.cids, t.x[1:] + 1), None),
    "set rows to the CPU's": (lambda t: t.x.__setitem__(t.ids, t.c[:2]), TWO),
    "set rows to a number": (lambda t: t.x.__setitem__(t.ids, t.cnumber), None),
    "set rows of the CPU's": (lambda t: t.c.__setitem__(t.ids, t.c[:2]), INDEX),
    "set a slice to the CPU's": (lambda t: t.x.__setitem__(slice(2), t.c[:2]), None),
    "copy_": (lambda t: t.x.copy_(t.c), "cuda"),
    "copy_ to the CPU's": (lambda t: t.c.copy_(t.x), "cpu"),
    "fill_": (lambda t: t.x.fill_(t.cnumber), "cuda"),
    "a gradient": (lambda t: t.layer(t.x).sum().backward() or t.layer.weight.grad, "cuda"),
    "a gradient back to the CPU": (lambda t: (
        t.c.requires_grad_().to("cuda") * t.x).sum().backward() or t.c.grad, "cpu"),
    "a gradient back to the GPU": (lambda t: (
        t.x.requires_grad_().cpu() * t.c).sum().backward() or t.x.grad, "cuda"),
    "a gradient with a hook": (lambda t: with_a_hook(t.x), "cuda"),
    "a parameter's data": (lambda t: setattr(t.layer.weight, "data", t.c) or t.layer(t.x), TWO),
    "numpy": (lambda t: t.x.numpy(), NUMPY),
    "an array": (lambda t: np.asarray(t.x), NUMPY),
    "numpy on the CPU": (lambda t: t.x.cpu().numpy(), None),
    "item and tolist": (lambda t: t.number.item() + t.ids.tolist()[0], None),
    "cpu": (lambda t: t.x.cpu() + t.c, "cpu"),
    "cpu of the CPU's": (lambda t: t.c.cpu() is t.c and t.c, "cpu"),
    "to": (lambda t: t.c.to("cuda") + t.x, "cuda"),
    "to copies": (lambda t: t.c.to("cuda").zero_() is not None and t.c.sum() == 36, "cpu"),
    "to where it is": (lambda t: t.x.to("cuda") is t.x and t.x, "cuda"),
    "to another's": (lambda t: t.c.to(t.ids), "cuda"),
    "to another type": (lambda t: t.x.to(torch.int64), "cuda"),
    "to a second GPU": (lambda t: t.c.to("cuda:1"), ORDINAL),
    "a view": (lambda t: t.x.T[1:].flatten(), "cuda"),
    "a copy": (lambda t: copy.deepcopy(t.x), "cuda"),
    "a clone": (lambda t: t.x.detach().clone(), "cuda"),
    "zeros": (lambda t: torch.zeros(3), "cpu"),
    "arange": (lambda t: torch.arange(3, device=t.x.device), "cuda"),
    "randperm": (lambda t: torch.randperm(3, device="cuda"), "cuda"),
    "randint": (lambda t: torch.randint(3, (2,), device="cuda:0"), "cuda"),
    "tensor": (lambda t: torch.tensor([1, 2], device="cuda"), "cuda"),
    "as_tensor": (lambda t: torch.as_tensor(t.c, device="cuda") + t.x, "cuda"),
    "as_tensor copies": (lambda t: torch.as_tensor(t.c, device="cuda") is not None and t.c, "cpu"),
    "new_zeros": (lambda t: t.x.new_zeros(3), "cuda"),
    "new_tensor": (lambda t: t.x.new_tensor([1.]), "cuda"),
    "zeros_like": (lambda t: torch.zeros_like(t.x), "cuda"),
    "zeros_like on the CPU": (lambda t: torch.zeros_like(t.x, device="cpu"), "cpu"),
    "empty_like of the CPU's": (lambda t: torch.empty_like(t.c), "cpu"),
    "multinomial": (lambda t: torch.multinomial(t.row, 2), "cuda"),
    "multinomial, generator": (lambda t: t.row.multinomial(2, generator=t.generator), GENERATOR),
    "normal_, generator": (lambda t: t.x.normal_(generator=t.generator), GENERATOR),
    "randperm, generator": (
        lambda t: torch.randperm(3, device="cuda", generator=t.generator), GENERATOR),
    "randperm, generator, to": (
        lambda t: torch.randperm(3, generator=t.generator).to(t.x.device), "cuda"),
    "inference": (lambda t: torch.inference_mode()(t.layer)(t.x), "cuda"),
    "inference, two devices": (lambda t: torch.inference_mode()(t.layer)(t.c), TWO),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    """Those of CUDA's tensors, and its kinds of errors; the sentences differ with the operator."""
    compute, expected = RULES[rule]
    with pretend_gpu():
        if isinstance(expected, tuple):
            with pytest.raises(expected[0], match=re.escape(expected[1])):
                compute(given())
        elif expected is None:
            assert not torch.is_tensor(compute(given()))
        else:
            found = compute(given())
            assert (found.device.type, found.is_cuda) == (expected, expected == "cuda")


def test_a_module_moves_in_place():
    """A parameter stays the same object: its hooks are kept, and its place in the optimizer."""
    model, seen = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), []
    weight = model[0].weight
    weight.register_hook(lambda gradient: seen.append(gradient.is_cuda))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with pretend_gpu():
        assert weight.is_cpu and model.to("cuda")[0].weight is weight and weight.is_cuda
        model(torch.ones(4, 3, device="cuda")).square().sum().backward()
        optimizer.step()
        there = [*model.buffers(), *optimizer.state[weight].values()]
        assert seen == [True] and len(there) == 6 and all(x.is_cuda for x in there)
        state = optimizer.state_dict()
        model.cpu(), optimizer.load_state_dict(state)
        assert weight is model[0].weight and weight.is_cpu
        assert optimizer.state[weight]["exp_avg"].is_cpu


def test_files(tmp_path):
    """A file tells the device; without a GPU it is read only where another one is asked for."""
    path, other, layer = tmp_path / "x.pt", tmp_path / "y.pt", nn.Linear(2, 2)
    with pretend_gpu():
        torch.save(layer.to("cuda").state_dict(), path), torch.save(torch.ones(2), other)
        assert torch.load(path)["weight"].is_cuda and torch.load(other).is_cpu
        assert torch.load(path, map_location="cpu")["weight"].is_cpu
        assert torch.load(other, map_location="cuda").is_cuda
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
            torch.load(path)
    assert torch.equal(torch.load(path, map_location="cpu")["weight"], layer.weight)


def test_it_leaves_nothing_behind():
    names = "is_available is_bf16_supported get_device_name synchronize device_count".split()
    state = lambda: [getattr(torch.cuda, name) for name in names] + [
        torch.autocast, torch.autograd._engine_run_backward, *torch.serialization._package_registry]
    before = state()
    with pytest.raises(KeyError), pretend_gpu():
        assert common.find_device("auto") == common.find_device("cuda") == "cuda"
        with pytest.raises(common.UsageError, match="there is no cuda:1 here"):
            common.find_device("cuda:1")
        assert common.machine("cuda") == "Pretend GPU" and not common.has_bfloat16("cuda")
        raise KeyError
    assert state() == before and torch.zeros(2).device.type == "cpu"
    with pretend_gpu(bfloat16=True):
        assert common.precision(SimpleNamespace(dtype="auto", device="cuda")) == "bfloat16"


# ------------------------------------------------------------------------------------ scripts


STAGES = {"lora.py": ["base"], "flamingo.py": ["lm", "vit"]}         # trainings that come first


def finish(script, flags, device, out, **more):
    """Runs a script from Python, with a CPU's sizes on any device. Returns its model."""
    module, own = module_of(script), settings_of(script, flags(script))
    values = module.Args.cpu | {name: getattr(own, name) for name in own.given}
    values |= dict(steps=3, dtype="float32", device=device, out=out, save_every=0.)
    return module.main(module.Args(**values | more))


@pytest.fixture
def watched(monkeypatch):
    """Each step of a training is checked: its loss, parameters, buffers and the optimizer's state
    (but for the number of the step) are on the device. watched["stop"]: the folder of a training
    that Stop ends in its second step."""
    add, found = common.Run.log, dict(stop=None, steps=0)

    def log(run, loss):
        model, state = run.model, run.optimizer.state.values()
        there = [loss, *model.parameters(), *model.buffers(),
                 *(x for own in state for x in own.values() if x.ndim)]
        assert {x.device.type for x in there} == {run.args.device}
        found["steps"] += 1
        add(run, loss)
        if Path(run.args.out).name == found["stop"] and run.step == 1:
            raise Stop
    monkeypatch.setattr(common.Run, "log", log)
    return found


def equal(a, b):
    """Asserts that two runs left the same weights, losses, figures and pictures."""
    checkpoints = sorted(path.parent.relative_to(a) for path in Path(a).rglob("checkpoint.pt"))
    assert checkpoints
    for name in checkpoints:
        assert same(*(common.read_checkpoint(Path(run, name))["model"] for run in (a, b))), name
        assert log(Path(a, name)) == log(Path(b, name))
    one, two = (json.loads(Path(run, "result.json").read_text())["figures"] for run in (a, b))
    assert one == two
    pictures = [{path.name: path.read_bytes() for path in Path(run).glob("*.png")}
                for run in (a, b)]
    assert pictures[0] == pictures[1]


def experiment(script, out, device):
    """What an experiment finds in a finished run."""
    if script == "flamingo.py":
        file = Path(out, "few_shot.json")
        return few_shot.measure(Path(out), file, device)["figures"]["right"]
    if script == "bert.py":
        file = Path(out, "fine_tune.json")
        fine_tune.main(fine_tune.options([out, "--out", str(file), "--repeats", "1"]))
        return json.loads(file.read_text())["figures"]["accuracy"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script(script, flags, here, watched, capsys):         # noqa: F811
    """Training, evaluation, samples, pictures, experiments; and the same from checkpoints, where
    each training was stopped."""
    finish(script, flags, "cpu", "a/run")
    found = experiment(script, "a/run", "cpu")
    with pretend_gpu():
        model, steps = finish(script, flags, "cuda", "b/run"), watched["steps"]
        assert steps >= 6 and all(x.is_cuda for x in [*model.parameters(), *model.buffers()])
        assert experiment(script, "b/run", "cuda") == found
        for watched["stop"] in [*STAGES.get(script, []), "run"]:
            with pytest.raises(Stop):
                finish(script, flags, "cuda", "c/run", resume=Path("c").exists())
        watched["stop"] = None
        finish(script, flags, "cuda", "c/run", resume=True)
    equal("a/run", "b/run"), equal("a/run", "c/run")
    result = json.loads(Path("b/run/result.json").read_text())
    assert (result["machine"], result["settings"]["device"]) == ("Pretend GPU", "cuda")


OTHER = {"simclr.py": dict(blur=True, loss="triplet"), "autoencoder.py": dict(
             bottleneck="sparse", k=5), "mae.py": dict(tune="all", labels=(2,), tune_steps=2),
         "bert.py": dict(strategy="span"), "gpt.py": dict(image_size=8, top_k=3, top_p=.9),
         "lora.py": dict(method="ia3"), "flamingo.py": dict(attend="all", latents=0)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_settings(script, flags, tiny, here, watched, monkeypatch, capsys):     # noqa: F811
    """In bfloat16 where a GPU has it, with the autocast of a CPU, but for the kernel of attention
    that common.py chooses there."""
    monkeypatch.setattr(common, "sdpa_kernel", lambda _: contextlib.nullcontext())
    more = OTHER[script] | dict(data=str(tiny)) if script == "gpt.py" else OTHER[script]
    if script == "flamingo.py":
        np.savez("own.npz", images=np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3))
        more = more | dict(data="own.npz", prompt="<image> what colour is it ?")
    finish(script, flags, "cpu", "a/run", dtype="bfloat16", **more)
    with pretend_gpu(bfloat16=True):
        finish(script, flags, "auto", "b/run", dtype="auto", **more)
    equal("a/run", "b/run")
    settings = json.loads(Path("b/run/result.json").read_text())["settings"]
    assert (settings["device"], settings["dtype"]) == ("cuda", "bfloat16")


@pytest.mark.parametrize("first, then", [("cpu", "cuda"), ("cuda", "cpu")])
def test_another_device_continues(first, then, flags, here, watched, capsys):         # noqa: F811
    finish("bert.py", flags, "cpu", "a/run")
    watched["stop"] = "run"
    with on(first), pytest.raises(Stop):
        finish("bert.py", flags, first, "b/run")
    watched["stop"] = None
    with on(then):
        finish("bert.py", flags, then, "b/run", resume=True)
    equal("a/run", "b/run")


def test_drawn_images():
    """Those of the shapes world, as --data shapes and flamingo.py take them."""
    scenes = common.Scenes(0, 9, common.KINDS).all
    images, labels = common.shapes(30, size=16)
    painted = common.paint(scenes, size=16)
    with pretend_gpu():
        x, y = common.shapes(30, size=16, device="cuda")
        z = common.paint(scenes, size=16, device="cuda")
        found = common.load_images(SimpleNamespace(data="shapes", image_size=6, device="cuda"))
        assert all(t.is_cuda for t in [x, z, *y.values(), found.train, found.test, found.mean,
                                       *found.train_labels.values(), *found.test_labels.values()])
        assert torch.equal(x.cpu(), images) and torch.equal(z.cpu(), painted)
        assert all(torch.equal(y[name].cpu(), labels[name]) for name in labels)


# -------------------------------------------------------------------------------- experiments


def on_both(run, folder):
    """run(device) on the CPU, and on the pretend GPU, each in a folder of its own: the results."""
    found = []
    for device in "cpu", "cuda":
        Path(folder, device).mkdir()
        with contextlib.chdir(Path(folder, device)), on(device):
            found.append(run(device))
    return found


def figures(name):
    """The figures of a file."""
    return json.loads(Path(name).read_text())["figures"]


def test_gpt_is_adapted(flags, here, capsys):         # noqa: F811
    own = flags("lora.py")
    own = own[own.index("--data"):][:2] + own[own.index("--old"):][:2]
    own += ("--dim 16 --heads 2 --depth 2 --context 40 --base-steps 3 --base-batch 2 --base-lr "
            ".003 --base-dropout 0 --example 8 --batch 2 --rank 2 --epochs 1 --dtype float32 --k 1 "
            "3 --repeats 1 --out x.json").split()

    def run(device):
        adapt.main(adapt.options([*own, "--device", device]))
        found = figures("x.json")
        for cell in [cell for row in found["rows"].values() for cell in row.values()]:
            del cell["seconds"]
        return found["rows"], found["start"], found["energy"]
    (rows, start, one), (rows2, start2, two) = on_both(run, here)
    assert rows == rows2 and start == start2 and len(rows) == 8
    for method, name in itertools.product(one, one["lora"]):
        # singular values: under any mode of torch's another routine computes them
        assert one[method][name] == pytest.approx(two[method][name], abs=1e-5)


SMALL = {"simclr.py": dict(width=8, dim=8), "autoencoder.py": dict(width=4, latent=3),
         "mae.py": dict(dim=16, heads=2, depth=1, decoder_dim=8, decoder_heads=2, decoder_depth=1)}


def test_encoders_are_compared(tiny, here, monkeypatch, capsys):         # noqa: F811
    """Linear probes and fine-tuning; the scripts run in this process."""
    def script(name, out, given):
        module = module_of(name)
        values = vars(common.parser_of(module.Args).parse_args([*map(str, given)]))
        values = module.Args.cpu | values | SMALL[name] | dict(out=str(out), labels=(1,), batch=8)
        module.main(module.Args(**values, dtype="float32"))
    monkeypatch.setattr(repeat, "run", script)
    short = ["--data", str(tiny), "--labels", "1", "--steps", "2"]

    def run(device):
        compare.main(compare.options([*short, "--seeds", "1", "--tune-steps", "2", "--out", "out",
                                      "--device", device]))
        while_training.main(while_training.options([
            "autoencoder.py", "--at", "0", "2", "--labels", "1", "--out", "x.json", "--", *short,
            "--width", "4", "--batch", "8", "--dtype", "float32"]))
        return figures("out/compare-tiny-0.json"), figures("x.json")
    one, two = on_both(run, here)
    assert one == two and len(one[0]["tune"]) == 6


# -------------------------------------------------------------------------- published weights


def test_published_weights(tiny, tmp_path, capsys):
    """GPT-2, BERT, MAE and ResNet-18, with their tokenizers: what is computed is the same."""
    vocab = bpe_folder(tmp_path / "gpt2")
    state = transformers_gpt2(random_weights(gpt.GPT(len(vocab), 40, 24, 2, 3)))
    safetensors(tmp_path / "gpt2/model.safetensors", state)
    (tmp_path / "gpt2/config.json").write_text('{"n_head": 3}')
    (tmp_path / "x.txt").write_text("in the queue abc 12 \n\n" * 99)
    wordpiece_folder(tmp_path / "bert")
    words = common.WordPiece.load(tmp_path / "bert")
    state = published_names(random_weights(bert.BERT(words.vocab, 20, 16, 2, 2)))
    for name in "bert.embeddings.word_embeddings.weight", "cls.predictions.bias":
        state[name] = state[name][words.published.argsort()]
    safetensors(tmp_path / "bert/model.safetensors", state)
    (tmp_path / "bert/config.json").write_text('{"num_attention_heads": 2}')
    state = authors_mae(random_weights(mae.MAE(8, 2, 16, 2, 2, 8, 1, 2)))
    torch.save(state, tmp_path / "mae.pth")
    torch.save(simclr.ResNet(18, 8, stem=7).state_dict(), tmp_path / "resnet.pth")
    asked = [(gpt, "gpt2", dict(prompt="the queen", length=6)),
             (gpt, "gpt2", dict(data="x.txt", steps=2, context=12, length=6)),
             (bert, "bert", dict(fill="the <mask> runs away.")),
             (mae, "mae.pth", dict(data=tiny, image_size=8, labels=(2,), tune_steps=2, steps=1)),
             (simclr, "resnet.pth", dict(data=tiny, labels=(1,), steps=1)),
             (lora, "gpt2", dict(data="x.txt", old=tmp_path / "x.txt", k=4, example=8, epochs=1, length=6))]

    def run(device):
        for script, weights, more in asked:
            if "data" in more:
                more["data"] = tmp_path / more["data"]
            how = dict(device=device, dtype="float32", batch=8, out=f"{weights}-{len(more)}")
            how["base" if script is lora else "weights"] = tmp_path / weights
            model = script.main(script.Args(**how | more))
            there = {x.device.type for x in [*model.parameters(), *model.buffers()]}
            assert there == {device}
        text = capsys.readouterr().out.splitlines()
        return ([line for line in text if "/s" not in line and " steps in " not in line],
                [figures(path) for path in sorted(Path().glob("*/result.json"))])
    one, two = on_both(run, tmp_path)
    assert one == two and len(one[1]) == 4 and "the [1] runs away." in one[0]


# ----------------------------------------------------------------------------------- mistakes


def planted(monkeypatch, name, old="", new=""):
    """A module of the project, made anew of its source, with other words in it."""
    path = ROOT / f"{name}.py"
    source, module = path.read_text(), types.ModuleType(name)
    assert old in source, f"{path.name} has no {old!r} any more: plant another mistake"
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source.replace(old, new) if old else source, path, "exec"), module.__dict__)
    return module


MISTAKES = [    # a file, words in it, what stands there instead, and how the script then ends
    ("simclr", "torch.arange(N, device=sim.device)", "torch.arange(N)", TWO),
    ("autoencoder", "torch.linspace(0, 1, n, device=a.device)", "torch.linspace(0, 1, n)", TWO),
    ("mae", "torch.rand(B, N, device=patches.device)", "torch.rand(B, N)", TWO),
    ("bert", "words.shape, device=words.device)", "words.shape)", TWO),
    ("gpt", "= distance(prediction, target)", "= distance(prediction, target.cpu())", TWO),
    ("lora", "linear.weight.new_zeros(d1, rank)", "torch.zeros(d1, rank)", TWO),
    ("lora", "value=tokenizer.BOS).to(args.device)", "value=tokenizer.BOS)", TWO),
    ("flamingo", "torch.arange(1, M + 1, device=so_far.device)", "torch.arange(1, M + 1)", TWO),
    ("common", "randperm(n, generator=g)", "randperm(n, generator=g, device=data.device)",
     GENERATOR),
    ("common", "large.permute(0, 2, 3, 1).cpu()", "large.permute(0, 2, 3, 1)", NUMPY)]


@pytest.mark.parametrize("name, old, new, error", MISTAKES)
def test_a_mistake_is_found(name, old, new, error, flags, here, monkeypatch, capsys):  # noqa: F811
    planted(monkeypatch, name, old, new)
    script = name
    if name == "common":
        script = "autoencoder"
        planted(monkeypatch, script)                                 # made anew, it imports common
    with pretend_gpu(), pytest.raises(error[0], match=re.escape(error[1])):
        finish(f"{script}.py", flags, "cuda", "run")


def test_a_causal_mask_on_the_cpu_is_found(monkeypatch):
    """It is used where several tokens come after others, which no script does."""
    def logits(module):
        model = module.GPT(5, 8, 8, 1, 2).to("cuda")
        cache, x = model.new_cache(1), torch.tensor([[1, 2, 3, 4]], device="cuda")
        return torch.cat([model(x[:, :2], cache), model(x[:, 2:], cache)], 1), model(x)
    with pretend_gpu():
        torch.testing.assert_close(*logits(gpt))
        with pytest.raises(TWO[0], match=TWO[1]):
            logits(planted(monkeypatch, "gpt", "torch.bool, device=x.device", "torch.bool"))
