"""All scripts on a pretend GPU (pretend_gpu.py): nothing is computed from tensors of two devices, and what comes out is what
a CPU gives, bit for bit. What CUDA itself rounds, or draws, differently is not tested here."""
import contextlib
import itertools
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from pretend_gpu import pretend_gpu
from test_bert import published_names
from test_run import SCRIPTS, Stop, flags, here, log, module_of, same, settings_of      # noqa: F401
from test_weights import authors_mae, bpe_folder, random_weights, safetensors, transformers_gpt2, wordpiece_folder
from torch import nn

import bert
import common
import flamingo
import gpt
import mae
import simclr

sys.path.insert(0, str(ROOT / "experiments"))
import adapt, compare, few_shot, fine_tune, repeat, while_training  # noqa: E402

TWO = RuntimeError, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
INDEX = RuntimeError, "indices should be either on cpu or on the same device as the indexed tensor"
GENERATOR = RuntimeError, "Expected a 'cuda' device type for generator but found 'cpu'"
TO_NUMPY = TypeError, "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()"


def given():
    """Tensors on the pretend GPU, g (3, 3), row (3,) and i (2,), and the same on the CPU, without g in their names."""
    g, row, i = torch.arange(9.).view(3, 3), torch.ones(3), torch.tensor([2, 0])
    return SimpleNamespace(
        g=g.to("cuda"), grow=row.to("cuda"), gi=i.to("cuda"), gone=torch.tensor(2., device="cuda"), layer=nn.Linear(3, 3).to("cuda"),
        c=g, crow=row, ci=i, cone=torch.tensor(2.), generator=torch.Generator())


RULES = {    # what is computed from them: the device it is on (None: no tensor), or how it is refused
    "add": (lambda t: t.g + t.c, TWO),
    "add a row": (lambda t: t.c + t.grow, TWO),
    "add a single element": (lambda t: t.g + torch.ones(1), TWO),
    "add a number": (lambda t: t.g + t.cone, "cuda"),
    "add to a number": (lambda t: t.cone + t.g, "cuda"),
    "add numbers": (lambda t: t.cone + t.gone, "cuda"),
    "add a number of the GPU to a CPU's": (lambda t: t.c + t.gone, TWO),
    "add in place": (lambda t: t.g.add_(t.c), TWO),
    "add in place to a number": (lambda t: t.cone.add_(t.gone), TWO),
    "subtract in place": (lambda t: t.g.sub_(t.cone), "cuda"),
    "compare": (lambda t: t.g == t.c, TWO),
    "equal": (lambda t: torch.equal(t.g, t.c), TWO),
    "matmul": (lambda t: t.g @ t.c, TWO),
    "cat": (lambda t: torch.cat([t.g, t.c]), TWO),
    "stack numbers": (lambda t: torch.stack([t.gone, t.cone]), TWO),
    "where": (lambda t: torch.where(t.g > 1, t.g, t.c), TWO),
    "where, condition": (lambda t: torch.where(t.c > 1, t.g, t.g), TWO),
    "where, numbers": (lambda t: torch.where(t.g > 1, 1., t.cone), "cuda"),
    "masked_fill": (lambda t: t.g.masked_fill(t.c > 1, 0.), TWO),
    "masked_fill by a number": (lambda t: t.g.masked_fill(t.g > 1, t.cone), "cuda"),
    "lerp": (lambda t: torch.lerp(t.g, t.g, t.crow), TWO),
    "gather": (lambda t: t.g.gather(1, t.ci[:, None]), TWO),
    "scatter": (lambda t: t.g.scatter(1, t.ci[:, None], 1.), TWO),
    "scatter_add": (lambda t: t.g.scatter_add_(0, t.gi[None], t.crow[None, :2]), TWO),
    "index_select": (lambda t: t.g.index_select(0, t.ci), TWO),
    "index_fill": (lambda t: t.g.index_fill(0, t.ci, 0.), TWO),
    "embedding": (lambda t: F.embedding(t.ci, t.g), TWO),
    "one_hot": (lambda t: F.one_hot(t.gi, 3), "cuda"),
    "linear": (lambda t: t.layer(t.c), TWO),
    "linear, bias": (lambda t: F.linear(t.g, t.g, t.crow), TWO),
    "layer_norm": (lambda t: F.layer_norm(t.g, [3], t.crow), TWO),
    "cross_entropy": (lambda t: F.cross_entropy(t.g[:2], t.ci), TWO),
    "mse_loss": (lambda t: F.mse_loss(t.g, t.c), TWO),
    "attention": (lambda t: F.scaled_dot_product_attention(*[t.g[None, None]] * 2, t.c[None, None]), TWO),
    "attention, mask": (lambda t: F.scaled_dot_product_attention(*[t.g[None, None]] * 3, torch.ones(3, 3, dtype=bool).tril()), TWO),
    "grid_sample": (lambda t: F.grid_sample(t.g[None, None], torch.zeros(1, 2, 2, 2), align_corners=False), TWO),
    "index by a CPU's": (lambda t: t.g[t.ci], "cuda"),
    "index by a CPU's mask": (lambda t: t.g[t.crow > 0], "cuda"),
    "index a CPU's": (lambda t: t.c[t.gi], INDEX),
    "index a CPU's by a mask": (lambda t: t.c[t.g > 1], INDEX),
    "index a CPU's by a number": (lambda t: t.c[t.gi[0]], "cpu"),
    "set rows": (lambda t: t.g.__setitem__(t.ci, t.g[1:] + 1), None),
    "set rows to a CPU's": (lambda t: t.g.__setitem__(t.gi, t.c[:2]), TWO),
    "set rows to a number": (lambda t: t.g.__setitem__(t.gi, t.cone), None),
    "set rows of a CPU's": (lambda t: t.c.__setitem__(t.gi, t.c[:2]), INDEX),
    "set a slice to a CPU's": (lambda t: t.g[:2].__setitem__(slice(None), t.c[:2]), None),
    "copy_": (lambda t: t.g.copy_(t.c), "cuda"),
    "copy_ to a CPU's": (lambda t: t.c.copy_(t.g), "cpu"),
    "fill_": (lambda t: t.g.fill_(t.cone), "cuda"),
    "out": (lambda t: torch.add(t.g, t.g, out=torch.empty(3, 3)), TWO),
    "a gradient": (lambda t: t.layer(t.g).sum().backward() or t.layer.weight.grad, "cuda"),
    "a parameter's new data": (lambda t: setattr(t.layer.weight, "data", t.c) or t.layer(t.g), TWO),
    "numpy": (lambda t: t.g.numpy(), TO_NUMPY),
    "an array": (lambda t: __import__("numpy").asarray(t.g), TO_NUMPY),
    "numpy on the CPU": (lambda t: t.g.cpu().numpy(), None),
    "item": (lambda t: t.gone.item() + t.gi.tolist()[0], None),
    "cpu": (lambda t: t.g.cpu() + t.c, "cpu"),
    "cpu of a CPU's": (lambda t: t.c.cpu().untyped_storage() is t.c.untyped_storage() and t.c, "cpu"),
    "to": (lambda t: t.c.to("cuda") + t.g, "cuda"),
    "to copies": (lambda t: t.c.to("cuda").zero_() is not None and t.c.sum() == 36, "cpu"),
    "to where it is": (lambda t: t.g.to("cuda") if t.g.to("cuda") is t.g else None, "cuda"),
    "to another's": (lambda t: t.c.to(t.gi), "cuda"),
    "to another type": (lambda t: t.g.to(torch.int64), "cuda"),
    "to a second GPU": (lambda t: t.c.to("cuda:1"), (RuntimeError, "invalid device ordinal")),
    "a view": (lambda t: t.g.T[1:].flatten(), "cuda"),
    "a copy": (lambda t: __import__("copy").deepcopy(t.g), "cuda"),
    "detach": (lambda t: t.g.detach().clone(), "cuda"),
    "a factory": (lambda t: torch.zeros(3), "cpu"),
    "a factory there": (lambda t: torch.arange(3, device=t.g.device), "cuda"),
    "randperm": (lambda t: torch.randperm(3, device="cuda"), "cuda"),
    "randint": (lambda t: torch.randint(3, (2,), device="cuda:0"), "cuda"),
    "tensor": (lambda t: torch.tensor([1, 2], device="cuda"), "cuda"),
    "as_tensor": (lambda t: torch.as_tensor(t.c, device="cuda") + t.g, "cuda"),
    "as_tensor leaves its data": (lambda t: torch.as_tensor(t.c, device="cuda") is not None and t.c, "cpu"),
    "new_zeros": (lambda t: t.g.new_zeros(3), "cuda"),
    "new_tensor": (lambda t: t.g.new_tensor([1.]), "cuda"),
    "zeros_like": (lambda t: torch.zeros_like(t.g), "cuda"),
    "zeros_like elsewhere": (lambda t: torch.zeros_like(t.g, device="cpu"), "cpu"),
    "empty_like of a CPU's": (lambda t: torch.empty_like(t.c), "cpu"),
    "multinomial": (lambda t: torch.multinomial(t.grow, 2), "cuda"),
    "multinomial, generator": (lambda t: torch.multinomial(t.grow, 2, generator=t.generator), GENERATOR),
    "randperm, generator": (lambda t: torch.randperm(3, device="cuda", generator=t.generator), GENERATOR),
    "normal_, generator": (lambda t: t.g.normal_(generator=t.generator), GENERATOR),
    "randperm, generator, CPU": (lambda t: torch.randperm(3, generator=t.generator).to(t.g.device), "cuda"),
    "inference": (lambda t: torch.inference_mode()(lambda: t.layer(t.g))(), "cuda"),
    "inference, mixed": (lambda t: torch.inference_mode()(lambda: t.layer(t.c))(), TWO),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    """As torch of CUDA has them."""
    compute, expected = RULES[rule]
    with pretend_gpu():
        if isinstance(expected, tuple):
            with pytest.raises(expected[0]) as error:
                compute(given())
            assert expected[1] in str(error.value)
            return
        found = compute(given())
        assert not torch.is_tensor(found) if expected is None else found.device.type == expected
        if expected is not None:
            assert (found.is_cuda, found.is_cpu) == (expected == "cuda", expected == "cpu")


def test_a_module_moves_in_place():
    """Parameters stay the same objects, as on a real GPU: what was registered on one, or given to an optimizer, is kept."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    weight, seen = model[0].weight, []
    weight.register_hook(lambda gradient: seen.append(gradient.is_cuda) or gradient)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with pretend_gpu():
        assert not weight.is_cuda and model.to("cuda")[0].weight is weight and weight.is_cuda
        model(torch.ones(4, 3, device="cuda")).square().sum().backward()
        optimizer.step()
        assert seen == [True] and all(x.is_cuda for x in [*model.buffers(), *optimizer.state[weight].values()])
        state = optimizer.state_dict()
        model.cpu(), optimizer.load_state_dict(state)
        assert weight is model[0].weight and weight.is_cpu and optimizer.state[weight]["exp_avg"].is_cpu


def test_files(tmp_path):
    """A file remembers the device, and is read on a machine without a GPU only where that is asked for."""
    path, layer = tmp_path / "x.pt", nn.Linear(2, 2)
    with pretend_gpu():
        torch.save(layer.to("cuda").state_dict(), path)
        assert torch.load(path)["weight"].is_cuda and torch.load(path, map_location="cpu")["weight"].is_cpu
        torch.save(torch.ones(2), tmp_path / "cpu.pt")
        assert torch.load(tmp_path / "cpu.pt").is_cpu and torch.load(tmp_path / "cpu.pt", map_location="cuda").is_cuda
    with pytest.raises(RuntimeError, match="Attempting to deserialize object on a CUDA device"):
        torch.load(path)
    assert torch.equal(torch.load(path, map_location="cpu")["weight"], layer.weight)


def test_it_leaves_nothing_behind():
    names = "is_available", "is_bf16_supported", "get_device_name", "synchronize", "device_count"
    before = [getattr(torch.cuda, name) for name in names], torch.autocast, list(torch.serialization._package_registry)
    with pytest.raises(KeyError), pretend_gpu():
        assert torch.cuda.is_available() and common.find_device("auto") == common.find_device("cuda") == "cuda"
        with pytest.raises(common.UsageError):
            common.find_device("cuda:1")
        assert common.machine("cuda") == "Pretend GPU" and not common.has_bfloat16("cuda")
        raise KeyError
    assert before == ([getattr(torch.cuda, name) for name in names], torch.autocast, list(torch.serialization._package_registry))
    assert torch.zeros(2).device.type == "cpu" and common.find_device("cpu") == "cpu"
    with pretend_gpu(bfloat16=True):
        assert common.precision(SimpleNamespace(dtype="auto", device="cuda")) == "bfloat16"


# ------------------------------------------------------------------------------------ scripts


STAGES = {"lora.py": ["base"], "flamingo.py": ["lm", "vit"]}         # trainings that come first


def finish(script, flags, device, out, **more):
    """Runs a script from Python, with a CPU's sizes on any device. Returns its model."""
    module, own = module_of(script), settings_of(script, flags(script))
    values = module.Args.cpu | {name: getattr(own, name) for name in own.given} | dict(steps=3, dtype="float32")
    return module.main(module.Args(**values | dict(device=device, out=out, save_every=0.) | more))


@pytest.fixture
def watched(monkeypatch):
    """Each step of a training is checked: loss, parameters, buffers, gradients and the optimizer's state (but for the number of
    a step) are on the device. watched["stop"]: the folder of the training that Stop ends in its second step."""
    add, found = common.Run.log, dict(stop=None, steps=0)

    def log(run, loss):
        model, state = run.model, run.optimizer.state.values()
        there = [loss, *model.parameters(), *model.buffers(), *(x for s in state for x in s.values() if x.ndim)]
        assert {x.device.type for x in there} == {run.args.device}
        found["steps"] += 1
        add(run, loss)
        if Path(run.args.out).name == found["stop"] and run.step == 1:
            raise Stop
    monkeypatch.setattr(common.Run, "log", log)
    return found


def equal(a, b):
    """Asserts that two runs left the same weights, losses, figures and pictures. (Of the size of adapter.pt the name of the
    device is a part.)"""
    for path in sorted(Path(a).rglob("checkpoint.pt")):
        other = Path(b) / path.relative_to(a)
        states = [common.read_checkpoint(name.parent) for name in (path, other)]
        assert same(*(state["model"] for state in states)), path
        assert log(path.parent) == log(other.parent)
    results = [json.loads(Path(name, "result.json").read_text())["figures"] for name in (a, b)]
    for figures in results:
        for row in figures["rows"].values() if "rows" in figures else ():
            row.pop("bytes")
    assert results[0] == results[1]
    names = sorted(path.name for path in Path(a).glob("*.png"))
    assert names == sorted(path.name for path in Path(b).glob("*.png"))
    assert all(Path(a, name).read_bytes() == Path(b, name).read_bytes() for name in names)


def experiment(script, out, device):
    """What an experiment finds in a finished run."""
    if script == "flamingo.py":
        return few_shot.measure(Path(out), Path(out, "few_shot.json"), device)["figures"]["right"]
    if script == "bert.py":
        fine_tune.main(fine_tune.options([out, "--out", f"{out}/fine_tune.json", "--repeats", "1"]))
        return json.loads(Path(out, "fine_tune.json").read_text())["figures"]["accuracy"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script(script, flags, here, watched, capsys):         # noqa: F811
    """Training, evaluation, samples, pictures, experiments; and the same from checkpoints, where each training was stopped."""
    finish(script, flags, "cpu", "a/run")
    found = experiment(script, "a/run", "cpu")
    with pretend_gpu():
        model = finish(script, flags, "cuda", "b/run")
        assert experiment(script, "b/run", "cuda") == found
        assert watched["steps"] > 5 and all(x.is_cuda for x in [*model.parameters(), *model.buffers()])
        for watched["stop"] in [*STAGES.get(script, []), "run"]:
            with pytest.raises(Stop):
                finish(script, flags, "cuda", "c/run", resume=Path("c").exists())
        watched["stop"] = None
        finish(script, flags, "cuda", "c/run", resume=True)
    equal("a/run", "b/run"), equal("a/run", "c/run")
    result = json.loads(Path("b/run/result.json").read_text())
    assert result["machine"] == "Pretend GPU" and result["settings"]["device"] == "cuda"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_in_bfloat16(script, flags, here, watched, monkeypatch, capsys):         # noqa: F811
    """As autocast has it on a CPU, but for the kernel of attention, which a CPU alone chooses."""
    monkeypatch.setattr(common, "sdpa_kernel", lambda _: contextlib.nullcontext())
    finish(script, flags, "cpu", "a/run", steps=2, dtype="bfloat16")
    with pretend_gpu(bfloat16=True):
        finish(script, flags, "cuda", "b/run", steps=2, dtype="auto")
    equal("a/run", "b/run")
    assert json.loads(Path("b/run/result.json").read_text())["settings"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("first, then", [("cpu", "cuda"), ("cuda", "cpu")])
def test_another_device_continues(first, then, flags, here, watched, capsys):         # noqa: F811
    on = lambda device: pretend_gpu() if device == "cuda" else contextlib.nullcontext()
    finish("bert.py", flags, "cpu", "a/run")
    watched["stop"] = "run"
    with on(first), pytest.raises(Stop):
        finish("bert.py", flags, first, "b/run")
    watched["stop"] = None
    with on(then):
        finish("bert.py", flags, then, "b/run", resume=True)
    equal("a/run", "b/run")


# -------------------------------------------------------------------------------- experiments


def on_both(what, folder):
    """what(device) in a folder of its own on the CPU, and on the pretend GPU: both results."""
    found = []
    for device in "cpu", "cuda":
        with contextlib.chdir(folder), pretend_gpu() if device == "cuda" else contextlib.nullcontext():
            Path(device).mkdir()
            with contextlib.chdir(device):
                found.append(what(device))
    return found


def figures(name, *times):
    """The figures of a file, without what depends on the machine."""
    text = json.loads(Path(name).read_text())["figures"]
    for row in text.get("rows", {}).values():
        for cell in row.values():
            cell.pop("seconds"), cell.pop("bytes")
    return {key: value for key, value in text.items() if key not in ("base_seconds", "stages", "device")}


def test_gpt_is_adapted(flags, here, capsys):         # noqa: F811
    def run(device):
        sizes = " --rank 2 --epochs 1 --dtype float32 --k 1 3 --repeats 1 --out x.json --device ".split()
        own = [x for name, x in zip(flags("lora.py"), flags("lora.py")[1:]) if name in ("--data", "--old")]
        small = ("--dim 16 --heads 2 --depth 2 --context 40 --base-steps 3 --base-batch 2 --base-lr .003 --base-dropout 0 "
                 "--example 8 --batch 2").split()
        adapt.main(adapt.options(["--data", own[0], "--old", own[1], *small, *sizes, device]))
        return figures("x.json")
    a, b = on_both(run, here)
    one, two = a.pop("energy"), b.pop("energy")
    assert a == b and len(a["rows"]) == 8
    for method, name in itertools.product(one, one["lora"]):            # singular values: another routine
        assert one[method][name] == pytest.approx(two[method][name], abs=1e-5)


def test_encoders_are_compared(tiny, here, monkeypatch, capsys):         # noqa: F811
    """Linear probes and fine-tuning; the scripts run in this process."""
    small = {"simclr.py": dict(width=8, dim=8, batch=8), "autoencoder.py": dict(width=4, latent=3, batch=8),
             "mae.py": dict(dim=16, heads=2, depth=1, decoder_dim=8, decoder_heads=2, decoder_depth=1, batch=8)}

    def script(name, out, given):
        module = module_of(name)
        own = module.Args.cpu | vars(common.parser_of(module.Args).parse_args([*map(str, given)])) | dict(out=str(out), **small[name])
        module.main(module.Args(**own | dict(labels=(1,), dtype="float32")))
    monkeypatch.setattr(repeat, "run", script)

    def run(device):
        compare.main(compare.options(["--data", str(tiny), "--seeds", "1", "--labels", "1", "--steps", "2", "--tune-steps", "2",
                                      "--device", device, "--out", "out"]))
        own = while_training.options(["autoencoder.py", "--at", "0", "2", "--labels", "1", "--out", "x.json", "--", "--data", str(tiny),
                                      "--steps", "2", "--width", "4", "--batch", "8", "--labels", "1", "--dtype", "float32"])
        while_training.main(own)
        return figures("out/compare-tiny-0.json"), figures("x.json")
    a, b = on_both(run, here)
    assert a == b and len(a[0]["tune"]) > 5


# ----------------------------------------------------------------------------------- mistakes


def planted(monkeypatch, name, old, new):
    """A module of the project, made of its source with other words in it, in the place of the one that is there."""
    path = ROOT / f"{name}.py"
    source, module = path.read_text(), types.ModuleType(name)
    assert old in source, f"{path.name} has no {old!r} any more: plant another mistake"
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source.replace(old, new), path, "exec"), module.__dict__)
    return module


TARGET = "positive = torch.arange(len(sim), device=sim.device)"
MISTAKES = [    # a file, what is left out of a line of it, and how a run of the script ends
    ("simclr", TARGET, TARGET.replace(", device=sim.device", ""), TWO),
    ("autoencoder", "torch.linspace(0, 1, n, device=a.device)", "torch.linspace(0, 1, n)", TWO),
    ("mae", "torch.rand(B, N, device=patches.device)", "torch.rand(B, N)", TWO),
    ("bert", "words.shape, device=words.device)", "words.shape)", TWO),
    ("gpt", "= mask(run.batch(train).long(), tokens.BOS)", "= mask(run.batch(train).long().cpu(), tokens.BOS)", TWO),
    ("lora", "linear.weight.new_zeros(d1, rank)", "torch.zeros(d1, rank)", TWO),
    ("lora", "torch.tensor([BOS, NEWLINE]), prompt]).to(args.device)", "torch.tensor([BOS, NEWLINE]), prompt])", TWO),
    ("flamingo", "torch.arange(1, M + 1, device=so_far.device)", "torch.arange(1, M + 1)", TWO),
    ("common", "torch.randperm(n, generator=g).to(", "torch.randperm(n, generator=g, device=data.device).to(", GENERATOR),
    ("common", "large.permute(0, 2, 3, 1).cpu().numpy()", "large.permute(0, 2, 3, 1).numpy()", TO_NUMPY),
]


@pytest.mark.parametrize("name, old, new, error", MISTAKES)
def test_a_mistake_is_found(name, old, new, error, flags, here, monkeypatch, capsys):         # noqa: F811
    planted(monkeypatch, name, old, new)
    script = "autoencoder" if name == "common" else name
    if name == "common":
        planted(monkeypatch, script, "", "")                        # which imports it
    with pretend_gpu(), pytest.raises(error[0]) as found:
        finish(f"{script}.py", flags, "cuda", "run")
    assert error[1] in str(found.value)


def test_a_causal_mask_on_the_cpu_is_found(monkeypatch):
    """It is needed where several tokens come after others: no script does that."""
    def logits(module):
        model = module.GPT(5, 8, 8, 1, 2).to("cuda")
        cache, x = model.new_cache(1), torch.tensor([[1, 2, 3, 4]], device="cuda")
        return torch.cat([model(x[:, :2], cache), model(x[:, 2:], cache)], 1), model(x)
    with pretend_gpu():
        torch.testing.assert_close(*logits(gpt))
        with pytest.raises(TWO[0], match=TWO[1]):
            logits(planted(monkeypatch, "gpt", "dtype=torch.bool, device=x.device).tril", "dtype=torch.bool).tril"))


# -------------------------------------------------------------------------- published weights


def test_published_weights(tiny, tmp_path, capsys):
    """GPT-2, BERT, MAE and ResNet-18: the tensors are on the device, and what is computed is the same."""
    vocab, out = bpe_folder(tmp_path / "gpt2"), []
    safetensors(tmp_path / "gpt2/model.safetensors", transformers_gpt2(random_weights(gpt.GPT(len(vocab), 40, 24, 2, 3))))
    (tmp_path / "gpt2/config.json").write_text('{"n_head": 3}')
    (tmp_path / "x.txt").write_text("in the queue abc 12 \n\n" * 99)
    wordpiece_folder(tmp_path / "bert")
    words = common.WordPiece.load(tmp_path / "bert")
    state = published_names(random_weights(bert.BERT(words.vocab, 20, 16, 2, 2)))
    for name in "bert.embeddings.word_embeddings.weight", "cls.predictions.bias":
        state[name] = state[name][words.published.argsort()]
    safetensors(tmp_path / "bert/model.safetensors", state)
    (tmp_path / "bert/config.json").write_text('{"num_attention_heads": 2}')
    torch.save(authors_mae(random_weights(mae.MAE(8, 2, 16, 2, 2, 8, 1, 2))), tmp_path / "mae.pth")
    torch.save(simclr.ResNet(18, 8, stem=7).state_dict(), tmp_path / "resnet.pth")

    def run(device):
        how = dict(device=device, dtype="float32", out="run")
        for script, given in (
                (gpt, dict(weights="gpt2", prompt="the queen", length=6)),
                (gpt, dict(weights="gpt2", prompt="the queen", length=6, data="x.txt", steps=2, context=12)),
                (bert, dict(weights="bert", fill="the <mask> runs away.")),
                (mae, dict(weights="mae.pth", data=tiny, image_size=8, labels=(2,), tune_steps=2, steps=1, batch=8)),
                (simclr, dict(weights="resnet.pth", data=tiny, labels=(1,), steps=1, batch=8))):
            for name in {"weights", "data"} & set(given):
                given[name] = tmp_path / given[name]
            model = script.main(script.Args(**how | given | dict(out=f"{script.__name__}-{len(given)}")))
            assert {x.device.type for x in [*model.parameters(), *model.buffers()]} == {device}
        return capsys.readouterr().out, [figures(path) for path in sorted(Path().glob("*/result.json"))]
    a, b = on_both(run, tmp_path)
    plain = lambda text: [line for line in text.splitlines() if "/s" not in line and " steps in " not in line]
    assert plain(a[0]) == plain(b[0]) and a[1] == b[1] and len(a[1]) == 3
