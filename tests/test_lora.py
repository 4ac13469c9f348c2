"""lora.py against dense twins in float64, formulas and the SVD; what is trained, kept, refused and resumed."""
import copy
import json
import math
import signal
import subprocess
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import command, refused, run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import common
import gpt
import lora

TRAINED = ["lora", "ia3", "bias", "first", "middle", "last", "full"]
WHERE = ["qkv", "proj", "fc1", "fc2"]
C, DEPTH, V, CONTEXT = 24, 4, 40, 16


@pytest.fixture
def base():
    return new_base()


def new_base(depth=DEPTH, seed=0):
    torch.manual_seed(seed)
    model = lora.GPT(V, CONTEXT, C, depth, 3)
    for p in model.parameters():                  # biases and norms, too, must matter
        nn.init.normal_(p, std=.2)
    return model


def tokens(n=3, t=CONTEXT):
    return torch.randint(V, (n, t), generator=torch.Generator().manual_seed(5))


def moved(model, std=.1):
    """The model with its trained tensors moved away from where they start."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in lora.trained(model).values():
            p += std * torch.randn_like(p)
    return model


def train(model, steps=3, lr=1e-2, args=None):
    """A few steps under common.Run; returns the run."""
    args = args or common.Args(steps=steps, batch=3, lr=lr, device="cpu", dtype="float32", warmup=0.)
    loop = common.Run(args, model, part="a trial")
    x = tokens()
    for _ in loop:
        masked, target = lora.mask(loop.batch(x), V - 1)
        loop.update(lora.distance(model(masked), target))
    return loop


# ------------------------------------------------------------------------------------- the layers


@pytest.mark.parametrize("method", [*TRAINED, "prompt"])
def test_at_the_start_it_is_the_base_bit_for_bit(base, method):
    x = tokens()
    for autocast in False, True:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            before = base.eval()(x)
            model = lora.adapt(copy.deepcopy(base), method, WHERE, rank=3, dropout=.5)
            assert torch.equal(model.eval()(x), before)
            assert torch.equal(model.train()(x), before)                   # dropout of nothing is nothing
            if method != "prompt":
                assert not torch.equal(moved(model)(x), before)


def test_lora_equals_a_dense_twin_in_float64():
    torch.manual_seed(0)
    linear = nn.Linear(7, 5).double()
    layer, x = lora.LoRA(linear, rank=3, alpha=6.), torch.randn(2, 4, 7, dtype=torch.float64)
    nn.init.normal_(layer.A)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B))
    assert A.shape == (5, 3) and B.shape == (7, 3)
    dense = linear.weight.detach() + 6. / 3 * sum(torch.outer(A[:, r], B[:, r]) for r in range(3))
    twin = x @ dense.T + linear.bias.detach()
    torch.testing.assert_close(layer(x), twin, rtol=1e-12, atol=1e-12)
    out = torch.randn_like(twin)
    layer(x).backward(out), twin.backward(out)
    torch.testing.assert_close(layer.A.grad, A.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.B.grad, B.grad, rtol=1e-12, atol=1e-12)
    memories = x @ linear.weight.T + linear.bias                           # the docstring's view, one memory at a time
    for r in range(3):
        memories = memories + 2. * (x @ B[:, r])[..., None] * A[:, r]
    torch.testing.assert_close(layer(x), memories, rtol=1e-12, atol=1e-12)


def test_lora_starts_with_one_factor_at_zero():
    torch.manual_seed(0)
    layer = lora.LoRA(nn.Linear(400, 300), rank=8, alpha=8.)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}
    assert not layer.A.any() and layer.B.std().item() == pytest.approx(400 ** -.5, rel=.05)
    layer(torch.randn(9, 400)).square().sum().backward()
    assert layer.A.grad.abs().min() > 0 and not layer.B.grad.any()
    nn.init.zeros_(layer.B)
    layer.zero_grad()
    layer(torch.randn(9, 400)).square().sum().backward()
    assert not layer.A.grad.any() and not layer.B.grad.any()               # both at zero never move


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_step_zero_moves_what_it_should(base, method):
    model = lora.adapt(base, method, WHERE, rank=2)
    lora.distance(model(tokens()), tokens()).backward()
    for name, p in lora.trained(model).items():
        assert p.grad.any() == (not name.endswith(".B")), name


def test_merged_equals_unmerged_and_unmerge_restores(base):
    before = copy.deepcopy(base.state_dict())
    model, x = moved(lora.adapt(base, "lora", WHERE, rank=3)).eval(), tokens()
    layers = [m for m in model.modules() if isinstance(m, lora.LoRA)]
    assert len(layers) == 4 * DEPTH
    free = model(x)
    for layer in layers:
        layer.merge(), layer.merge()                                       # twice adds once
    merged = model(x)
    assert not torch.equal(merged, free)                                   # another way to compute it
    torch.testing.assert_close(merged, free, rtol=0, atol=1e-5 * free.abs().max().item())
    plain = lora.GPT(V, CONTEXT, C, DEPTH, 3)                              # the merged weights are a plain GPT's
    plain.load_state_dict({k.replace(".linear.", "."): v for k, v in model.state_dict().items() if k[-2:] not in (".A", ".B")})
    assert torch.equal(plain.eval()(x), merged)
    for layer in layers:
        layer.unmerge(), layer.unmerge()
    for name, value in model.state_dict().items():
        if name[-2:] not in (".A", ".B"):
            torch.testing.assert_close(value, before[name.replace(".linear.", ".")], rtol=0, atol=1e-6)
    torch.testing.assert_close(model(x), free, rtol=0, atol=1e-5)


def test_merging_is_seen_by_the_faster_kernels(base):
    """common.autocast keeps copies of weights where nothing is trained: they must not go stale."""
    args = common.Args(device="cpu", dtype="float32")
    model, prompt = moved(lora.adapt(base, "lora", ["qkv"], rank=3)).eval(), tokens()[0, :3]
    texts = []
    with common.autocast(args):
        for merge in None, lora.LoRA.merge, lora.LoRA.unmerge:
            for m in model.modules():
                if merge and isinstance(m, lora.LoRA):
                    merge(m)
            texts.append(lora.sample(model, prompt, 9).tolist())
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("rank", [1, 3])
def test_the_update_has_at_most_the_rank(base, rank):
    before = copy.deepcopy(base.state_dict())
    model = lora.adapt(base.double(), "lora", WHERE, rank=rank)
    train(model)
    for path, layer in model.named_modules():
        if isinstance(layer, lora.LoRA):
            layer.merge()
            update = layer.linear.weight - before[f"{path}.weight"].double()
            s = torch.linalg.svdvals(update)
            assert s[rank - 1] > 1e-6 * s[0] and s[rank] < 1e-12, path
            torch.testing.assert_close(update, layer.update(), rtol=0, atol=1e-12)


def test_lora_drops_inputs_of_its_own_branch_only():
    torch.manual_seed(0)
    layer, x = lora.LoRA(nn.Linear(50, 20), rank=4, alpha=4., dropout=.25), torch.randn(1, 50)
    nn.init.normal_(layer.A)
    exact = layer.eval()(x)
    draws = layer.train()(x.expand(40_000, 50))
    torch.testing.assert_close(draws.mean(0, keepdim=True), exact, rtol=0, atol=.05)
    match = ((draws[:9] - layer.linear(x)) @ torch.linalg.pinv(layer.A.T)).detach()    # B^T of the inputs that are left
    for row in match:
        kept = torch.linalg.lstsq((layer.B * x.T).T, row).solution
        assert (layer.B.T @ (kept[:, None] * x.T) - row[:, None]).abs().max() < 1e-3
    torch.testing.assert_close(draws.std(0), ((layer.A @ layer.B.T * x) * math.sqrt(.25 / .75)).norm(dim=1),
                               rtol=.05, atol=0)


def test_ia3_equals_its_definition_in_float64(base):
    model, x = moved(lora.adapt(base.double(), "ia3")), torch.randn(2, 5, C, dtype=torch.float64)
    block = model.blocks[1]
    qkv, l_kv, l_f = block.attn.qkv.linear, block.attn.qkv.scale, block.mlp.fc2.scale
    assert l_kv.shape == (2 * C,) and l_f.shape == (4 * C,)
    q, k, v = (x @ w.T + b for w, b in zip(qkv.weight.split(C), qkv.bias.split(C)))
    k, v = k * l_kv[:C], v * l_kv[C:]
    heads = lambda a: a.view(2, 5, 3, C // 3).transpose(1, 2)
    scores = heads(q) @ heads(k).transpose(2, 3) / math.sqrt(C // 3)
    scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf)
    out = (scores.softmax(3) @ heads(v)).transpose(1, 2).reshape(2, 5, C)
    torch.testing.assert_close(block.attn(x), block.attn.proj(out), rtol=1e-9, atol=1e-9)
    hidden = F.gelu(block.mlp.fc1(x), approximate="tanh")
    twin = (l_f * hidden) @ block.mlp.fc2.linear.weight.T + block.mlp.fc2.linear.bias
    torch.testing.assert_close(block.mlp(x), twin, rtol=1e-9, atol=1e-9)


def test_ia3_folds_into_the_weights(base):
    model, x = moved(lora.adapt(base, "ia3"), .3).eval(), tokens()
    free = model(x)
    for m in model.modules():
        if isinstance(m, lora.IA3):
            m.merge(), m.merge()
    plain = lora.GPT(V, CONTEXT, C, DEPTH, 3)
    plain.load_state_dict({k.replace(".linear.", "."): v for k, v in model.state_dict().items() if not k.endswith(".scale")})
    torch.testing.assert_close(plain(x), free, rtol=0, atol=1e-5 * free.abs().max().item())
    assert torch.equal(plain(x), model(x))


# ------------------------------------------------------------------------------- what is trained


def names_due(method, depth=DEPTH):
    """What a method trains, by the names of a plain GPT, written out; LoRA and (IA)^3: what it puts in."""
    matrices = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    blocks = {"first": (0, 1), "middle": (1, 2), "last": (2, 3)}
    if method == "lora":
        return {f"blocks.{i}.{matrices[m]}.{f}" for i in range(depth) for m in WHERE for f in "AB"}
    if method == "ia3":
        return {f"blocks.{i}.{m}.scale" for i in range(depth) for m in ("attn.qkv", "mlp.fc2")}
    every = set(dict(new_base(depth).named_parameters()))
    if method == "bias":
        return {f"blocks.{i}.{m}.bias" for i in range(depth) for m in ("norm1", "norm2", *matrices.values())} | {"norm.bias"}
    return {name for name in every if method == "full" or name.startswith(tuple(f"blocks.{i}." for i in blocks[method]))}


@pytest.mark.parametrize("method", TRAINED)
def test_training_changes_the_named_tensors_alone(base, method):
    before = copy.deepcopy(base.state_dict())
    model = lora.adapt(base, method, WHERE, rank=2)
    start = copy.deepcopy(model.state_dict())
    loop = train(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == set(lora.trained(model)) == names_due(method)
    for name, value in model.state_dict().items():
        if name not in changed:
            assert torch.equal(value, before[name.replace(".linear.", ".")])
    frozen = [p for name, p in model.named_parameters() if name not in changed]
    assert all(p.grad is None for p in frozen)
    held = {id(p) for p in loop.optimizer.state}
    assert held == {id(p) for p in lora.trained(model).values()}           # optimizer state for these only


@pytest.mark.parametrize("method, formula", [
    ("lora", DEPTH * 5 * (4 * C + 2 * C + 5 * C + 5 * C)), ("ia3", DEPTH * 6 * C), ("bias", DEPTH * 11 * C + C),
    ("first", 2 * (12 * C * C + 13 * C)), ("middle", 2 * (12 * C * C + 13 * C)), ("last", 2 * (12 * C * C + 13 * C)),
    ("full", DEPTH * (12 * C * C + 13 * C) + (V + CONTEXT + 2) * C)])
def test_number_of_trained_parameters(base, method, formula):
    model = lora.adapt(base, method, WHERE, rank=5)
    assert sum(p.numel() for p in lora.trained(model).values()) == formula


class Products(TorchDispatchMode):
    """The shapes of all matrix products' results."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if f.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.append(tuple(out.shape))
        return out


def test_no_gradients_are_computed_for_frozen_weights(base):
    x = tokens(5)

    def backward(method):
        model = lora.adapt(copy.deepcopy(base), method, ["qkv"], rank=2)
        loss = lora.distance(model(x), x)
        with Products() as seen:
            loss.backward()
        return seen.shapes
    weights = {(3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (V, C)}
    either = lambda shapes: [s for s in shapes if s in weights or s[::-1] in weights]
    assert len(either(backward("full"))) == 4 * DEPTH + 1                  # the test can see them
    assert either(backward("lora")) == either(backward("ia3")) == either(backward("bias")) == []
    assert len(either(backward("last"))) == 8
    assert len(backward("last")) < len(backward("first")) / 1.3            # nothing goes below what is trained


@pytest.mark.parametrize("depth, due", [(1, [0]), (2, [0, 1]), (3, [1, 2]), (5, [3, 4]), (6, [4, 5])])
def test_two_blocks_at_a_place(depth, due):
    blocks = lambda method: sorted({int(n.split(".")[1]) for n in lora.trained(lora.adapt(new_base(depth), method))})
    assert blocks("last") == due and blocks("first") == list(range(min(2, depth)))
    middle = blocks("middle")
    assert middle == {1: [0], 2: [0, 1], 3: [0, 1], 5: [1, 2], 6: [2, 3]}[depth]


def test_wrong_names_and_ranks(base):
    with pytest.raises(ValueError, match="no matrix 'qkw' in a block: it has qkv, proj, fc1, fc2"):
        lora.adapt(base, "lora", ["qkv", "qkw"])
    for rank in 0, C + 1:
        with pytest.raises(ValueError, match=f"rank {rank} of a 72 x 24 matrix: it can be 1 to 24"):
            lora.adapt(base, "lora", ["qkv"], rank=rank)
    lora.adapt(base, "lora", ["qkv"], rank=C)
    with pytest.raises(ValueError, match="no method 'adapter'"):
        lora.adapt(base, "adapter")


# ------------------------------------------------------------------------------------- the method


def test_mask_and_distance_are_gpts(base):
    x = tokens()
    for ours, theirs in zip(lora.mask(x, 7), gpt.mask(x, 7)):
        assert torch.equal(ours, theirs)
    assert lora.distance(base(x), x) == gpt.distance(base(x), x)


def test_prompted_puts_the_examples_in_front():
    examples, x = torch.tensor([[0, 1, 2], [0, 3, 4]]), torch.tensor([[5, 6], [7, 8], [9, 1]])
    assert lora.prompted(examples, x).tolist() == [[0, 1, 2, 0, 3, 4, a, b] for a, b in x.tolist()]


def test_loss_behind_a_prompt_is_that_of_the_text_alone():
    """By hand: token by token, the probability of each byte that is owed behind BOS, examples and what came before."""
    torch.manual_seed(0)
    model = lora.GPT(257, 32, C, 2, 3).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=.2)
    args = common.Args(device="cpu", dtype="float32")
    x, few = torch.randint(256, (3, 5)), torch.randint(256, (2, 6))
    for examples, before in (None, [256]), (few, [256, *few.flatten().tolist()]):
        for given in 0, 1:
            nats = 0.
            for row in x.tolist():
                for t in range(given, 5):
                    logits = model(torch.tensor([before + row[:t]]))[0, -1]
                    nats -= logits.log_softmax(0)[row[t]].item() / (3 * (5 - given))
            assert lora.evaluate(args, model, x, given, examples) == pytest.approx(nats, abs=1e-5)


def test_examples_begin_where_lines_do(tmp_path):
    text = b"ab cd\nefg\n\nhijkl\n" * 9
    for i in 1, 2:
        (tmp_path / f"{i}.txt").write_bytes(text + b"the end %d\n" % i * 6)
    args = lora.Args(data=str(tmp_path), example=7, k=(1,), device="cpu")
    train, val = lora.examples(args)
    for part, rows in zip(("train", "val"), (train, val)):
        found = []
        for raw in getattr(common.load_text(str(tmp_path)), part):          # documents are not glued together
            found += [raw[i:i + 8] for i in range(len(raw) - 7) if raw[i:i + 1] == b"\n" and raw[i + 1:i + 2] != b"\n"]
        assert [bytes(row.tolist()) for row in rows] == found and len(found) > 3
    few = [lora.choose(train, k, 3) for k in (2, 5)]
    assert torch.equal(few[0], few[1][:2]) and not torch.equal(few[0], lora.choose(train, 2, 4))
    assert len(lora.choose(train, len(train), 3).unique(dim=0)) == len(train.unique(dim=0))


def test_evenly():
    assert lora.evenly(torch.arange(100), 4).tolist() == [0, 33, 66, 99]
    assert lora.evenly(torch.arange(3), 4).tolist() == [0, 1, 2]


def test_recipe():
    args = lora.Args(batch=16, passes=20, steps=100, seed=3, compile=True)
    for k, batch, steps in (1, 1, 20), (16, 16, 20), (64, 16, 80), (256, 16, 100):
        how = lora.recipe(args, "lora", k, 2)
        assert (how.batch, how.steps, how.seed, how.compile) == (batch, steps, 2003, False)
    assert [lora.recipe(args, m, 1, 0).lr for m in ("lora", "full")] == [lora.LR["lora"], lora.LR["full"]]
    args.lr = .5
    assert lora.recipe(args, "full", 1, 0).lr == .5


def test_what_is_to_be_done():
    args = lora.Args(method="prompt", k=(1, 3, 4), draws=2, example=9)
    assert lora.fits(args, 40) == [("prompt", k, d) for k in (1, 3) for d in (0, 1)]        # (3 + 1) * (9 + 1) fills it
    assert lora.fits(args, 39) == [("prompt", 1, 0), ("prompt", 1, 1)]
    args.method = "all"
    assert len(lora.fits(args, 40)) == 7 * 3 * 2 + 4


def test_collected_are_those_that_were_asked_for():
    done = {(m, k, d): dict(new=100 * k + d) for m in ("full", "lora") for d in (2, 0, 1) for k in (4, 2)}
    args = lora.Args(k=(2,), draws=2)
    assert lora.collect(args, done) == {m: {2: dict(new=[200, 201])} for m in ("lora", "full")}


def test_spectrum():
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 5))[0] for n in (9, 5))
    update = u @ torch.diag(torch.tensor([4., 2., 2., 1., 0.])) @ v.T
    torch.testing.assert_close(lora.spectrum(update), torch.tensor([16., 20., 24., 25., 25.]) / 25, rtol=1e-4, atol=0)
    assert lora.spectrum(torch.zeros(3, 2)).tolist() == [0., 0.]


def test_sample_equals_reading_all_of_it_each_time(base):
    prompt, g, text = tokens()[0, :3], torch.Generator().manual_seed(4), []
    for _ in range(10):
        p = (base.eval()(torch.cat([prompt, torch.tensor(text, dtype=torch.int64)])[None])[0, -1] / .1).softmax(0)
        text.append(torch.multinomial(p[None], 1, generator=g).item())
    assert lora.sample(base, prompt, 10, temperature=.1, seed=4).tolist() == text


def test_an_adapter_comes_back(base, tmp_path):
    x = tokens()
    args = lora.Args(where="proj,fc1", rank=3, alpha=5.)
    owner = lora.Base(base.eval(), CONTEXT, "text", "a base", 0.)
    for method in TRAINED:
        model = moved(lora.adapt(copy.deepcopy(base), method, ["proj", "fc1"], 3, 5.)).eval()
        lora.save_adapter(args, tmp_path / f"{method}.pt", model, method, owner)
        count = lora.size(lora.trained(model))
        assert 4 * count < (tmp_path / f"{method}.pt").stat().st_size < 4 * count + 600 * len(lora.trained(model)) + 3000          # and nothing else
        again, state = lora.load_adapter(tmp_path / f"{method}.pt", owner)
        assert set(state["tensors"]) == set(lora.trained(model)) and state["method"] == method
        assert torch.equal(again(x), model(x)) and not torch.equal(again(x), base(x))
    assert torch.equal(owner.model(x), base(x))
    with pytest.raises(common.UserError, match="belongs to another base, a base; this one is b base"):
        lora.load_adapter(tmp_path / "lora.pt", lora.Base(base, CONTEXT, "text", "b base", 0.))


# ------------------------------------------------------------------------------------- the script


SMALL = ("--dim 16 --heads 2 --depth 3 --context 40 --base-steps 3 --base-batch 2 --example 8 --k 1 3 --passes 2 --draws 2 "
         "--batch 2 --rank 2 --length 90 --dtype float32 --device cpu --prompt fox").split()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "fox.txt").write_text("the quick brown fox\njumps over the lazy dog\n\nand away\n" * 40)
    (folder / "old.txt").write_text("".join(f"line {i} of what it knew, {i * i}\n" for i in range(200)))
    return "--data", folder / "fox.txt", "--old", folder / "old.txt"


@pytest.fixture(scope="module")
def done(texts, tmp_path_factory):
    """A finished run of all methods, and what it printed."""
    out = tmp_path_factory.mktemp("lora") / "run"
    process = run(*texts, *SMALL, "--out", out, script="lora.py")
    assert process.returncode == 0, process.stderr
    return out, process.stdout


def result(out):
    return json.loads((out / "result.json").read_text())["figures"]


def without_times(figures):
    return {**figures, "rows": {m: {k: {n: v for n, v in f.items() if n != "seconds"} for k, f in ks.items()}
                                for m, ks in figures["rows"].items()}}


def test_the_table(done):
    out, text = done
    figures = result(out)
    assert set(figures["rows"]) == {*TRAINED, "prompt"} and max(map(len, text.splitlines())) <= 80
    for method, ks in figures["rows"].items():
        assert list(ks) == ["1", "3"] and all(len(f["new"]) == len(f["old"]) == 2 for f in ks.values())
        if method == "prompt":
            assert ks["3"]["bytes"] == [27, 27] and ks["3"]["trained"] == [0, 0]
            assert ks["3"]["old"] == [figures["start"][1]] * 2 and ks["1"]["new"][0] != figures["start"][0]
            assert ks["1"]["new"][0] != ks["1"]["new"][1]                  # nothing but the examples differs
        else:
            assert ks["3"]["bytes"][0] == (out / f"{method}-3.pt").stat().st_size
            assert ks["3"]["new"][0] != ks["3"]["new"][1] != figures["start"][0]
    assert figures["rows"]["lora"]["1"]["trained"][0] == 3 * 2 * (4 + 2 + 5 + 5) * 16
    assert figures["shares"]["lora"]["fc1"][1] == pytest.approx(1, abs=1e-5) and figures["shares"]["full"]["fc1"][1] < .99
    rows = [line.split() for line in text.splitlines() if line[:2] in ("1 ", "3 ") and "%" not in line and "steps" not in line]
    assert [row[1] for row in rows] == 2 * [*TRAINED, "prompt"]
    assert "the base:" in text and "lora, k = 3:" in text


def test_the_figures_are_those_of_the_adapters(done, texts, tmp_path):
    """Loads what was kept, as a user would, and evaluates it again."""
    out, _ = done
    process = run(*texts, *SMALL, "--out", out, "--adapter", out / "lora-3.pt", script="lora.py")
    assert process.returncode == 0, process.stderr
    loss = result(out)["rows"]["lora"]["3"]
    assert f"{loss['new'][0]:.3f}" in process.stdout and f"{loss['old'][0]:.3f}" in process.stdout      # of the first draw
    beside = run(*texts, *SMALL, "--out", tmp_path / "x", "--adapter", out / "lora-3.pt", script="lora.py")
    assert beside.stdout == process.stdout and not (tmp_path / "x").exists()


def test_training_helps(texts, tmp_path):
    """With all of the text and time enough, every method is better than the base."""
    flags = [*SMALL, *"--k 60 --batch 12 --passes 15 --draws 1 --lr 0.02 --base-steps 60".split(), "--out", tmp_path]
    assert run(*texts, *flags, script="lora.py").returncode == 0
    figures = result(tmp_path)
    for method in TRAINED:
        assert figures["rows"][method]["60"]["new"][0] < figures["start"][0] - .02, method


def test_the_base_is_kept_and_trained_anew_for_other_settings(done, texts):
    out, text = done
    assert "First the base" in text and "3 steps in" in text
    base = (out / "base/checkpoint.pt").read_bytes()
    again = run(*texts, *SMALL, "--out", out, script="lora.py")
    assert "First the base" not in again.stdout and again.returncode == 0
    assert (out / "base/checkpoint.pt").read_bytes() == base
    for flags in ["--base-steps", 4], ["--seed", 1], ["--dim", 18], ["--context", 41], ["--old", texts[1]], ["--base-lr", .1], \
            ["--base-dropout", .1], ["--base-batch", 3], ["--heads", 1], ["--depth", 1], ["--dtype", "auto"]:
        args = common.cli(lora.Args, [*map(str, [*texts, *SMALL, "--out", out, *flags])])
        with pytest.raises(Trained):
            pretrained(args)
    assert pretrained(common.cli(lora.Args, [*map(str, [*texts, *SMALL, "--out", out, "--rank", 3])])) == f"{out}/base"
    other = run(*texts, *SMALL, "--base-steps", 4, "--method", "prompt", "--out", out, script="lora.py")
    assert "4 steps in" in other.stdout and (out / "base/previous.pt").read_bytes() == base


class Trained(Exception):
    """The base is trained."""


def pretrained(args):
    """lora.pretrain, stopped where it would begin to train from the start."""
    def stop(how, model, **_):
        assert not how.resume
        raise Trained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "script", lambda: "lora.py")
        patch.setattr(common, "Run", stop)
        return lora.pretrain(args)


def test_an_interrupted_base_goes_on(texts, tmp_path):
    long = ["--base-steps", 700, "--method", "prompt"]
    process = subprocess.Popen(command(*texts, *SMALL, *long, "--save-every", .2, "--out", tmp_path, script="lora.py"),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "base/checkpoint.pt", process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "the same command goes on" in error and len(error.strip().splitlines()) == 1
    half = torch.load(tmp_path / "base/checkpoint.pt", weights_only=True)["step"]
    assert 0 < half < 700
    again = run(*texts, *SMALL, *long, "--out", tmp_path, script="lora.py")
    assert again.returncode == 0 and f"Going on from step {half}" in again.stdout, again.stderr
    assert torch.load(tmp_path / "base/checkpoint.pt", weights_only=True)["step"] == 700


def wait_for(path, process, seconds=60):
    for _ in range(seconds * 50):
        if path.exists() or process.poll() is not None:
            break
        time.sleep(.02)
    assert path.exists(), process.communicate()


def test_resumed_equals_uninterrupted(done, texts, tmp_path):
    out, _ = done
    run(*texts, *SMALL, "--out", out, script="lora.py")                    # the base of the settings above
    flags = [*SMALL, "--passes", 20, "--base", out / "base"]
    whole = run(*texts, *flags, "--out", tmp_path / "a", script="lora.py")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(command(*texts, *flags, "--out", tmp_path / "b", script="lora.py"),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "b/lora-3.pt", process)                             # so it stops within LoRA or the next
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 1 and not (tmp_path / "b/result.json").exists()
    kept = torch.load(tmp_path / "b/checkpoint.pt", weights_only=True)["done"]
    assert 0 < len(kept) < 30
    again = run("--resume", "--out", tmp_path / "b", script="lora.py")
    assert again.returncode == 0, again.stderr
    a, b = (result(tmp_path / name) for name in "ab")
    assert without_times(a) == without_times(b)
    for fit, figures in kept.items():                                      # not done again: its time is the old one
        assert figures["seconds"] in b["rows"][fit[0]][str(fit[1])]["seconds"]
    more = run("--resume", "--out", tmp_path / "b", "--k", 1, 2, 3, script="lora.py")
    assert more.returncode == 0 and result(tmp_path / "b")["rows"]["lora"]["3"] == b["rows"]["lora"]["3"]
    assert list(result(tmp_path / "b")["rows"]["lora"]) == ["1", "2", "3"]
    fewer = run("--resume", "--out", tmp_path / "b", "--draws", 1, "--prompt", "jump", script="lora.py")
    assert "anew" not in fewer.stdout and result(tmp_path / "b")["rows"]["lora"]["3"]["new"] == b["rows"]["lora"]["3"]["new"][:1]
    kept = (tmp_path / "b/checkpoint.pt").read_bytes()
    wrong = run("--resume", "--out", tmp_path / "b", "--base", "nowhere", script="lora.py")
    assert wrong.returncode == 1 and (tmp_path / "b/checkpoint.pt").read_bytes() == kept        # a mistake loses nothing
    anew = run("--resume", "--out", tmp_path / "b", "--lr", .02, "--k", 3, script="lora.py")
    assert "all is done anew" in anew.stdout and (tmp_path / "b/previous.pt").read_bytes() == kept
    assert anew.returncode == 0 and result(tmp_path / "b")["rows"]["lora"]["3"]["new"] != b["rows"]["lora"]["3"]["new"]


def test_a_base_from_gpt(done, texts, tmp_path):
    made = run("--data", texts[3], *"--dim 16 --heads 2 --depth 1 --batch 4 --context 32 --length 5 --steps 2".split(),
               "--device", "cpu", "--out", tmp_path / "gpt", script="gpt.py")
    assert made.returncode == 0, made.stderr
    flags = [*SMALL, "--base", tmp_path / "gpt", "--method", "lora", "--out", tmp_path / "lora"]
    process = run(*texts[:2], *flags, script="lora.py")
    assert process.returncode == 0 and "1 x 16 GPT of" in process.stdout, process.stderr
    gpts = json.loads((tmp_path / "gpt/result.json").read_text())["figures"]["loss"]
    assert result(tmp_path / "lora")["start"][1] == pytest.approx(gpts, rel=.02)       # the same text, measured alike
    assert not (tmp_path / "lora/base").exists()
    base = done[0] / "base"
    other = run(*texts[:2], *SMALL, "--adapter", tmp_path / "lora/lora-3.pt", "--base", base, script="lora.py")
    refused(other, 1, "lora-3.pt belongs to another base, 1 x 16 GPT of", "this one is 3 x 16 GPT of", "--base", script="lora.py")
    none = run(*texts[:2], *SMALL, "--adapter", tmp_path / "lora/lora-3.pt", script="lora.py")
    refused(none, 1, "there is no", "lora/base/checkpoint.pt", "--base", script="lora.py")


@pytest.mark.parametrize("flags, words", [
    (["--rank", "0"], ["--rank must be 1 or more, not 0"]),
    (["--steps", "0"], ["--steps must be 1 or more, not 0: --resume alone looks again"]),
    (["--k", "4", "0"], ["--k must be 1 or more, not 4 0"]),
    (["--context", "-5"], ["--context must be 2 or more, not -5"]),
    (["--k"], ["--k", "at least one"]),
    (["--k", "2", "1", "2"], ["--k 2 1 2 names a number twice"]),
    (["--draws", "0"], ["--draws must be 1 or more"]),
    (["--passes", "0"], ["--passes must be 1 or more"]),
    (["--example", "1"], ["--example must be 2 or more"]),
    (["--alpha", "-1"], ["--alpha must be 0 or more"]),
    (["--dropout", "1"], ["--dropout must be from 0 to below 1"]),
    (["--base-dropout", "-1"], ["--base-dropout must be from 0 to below 1"]),
    (["--base-steps", "0"], ["--base-steps must be 1 or more"]),
    (["--base-batch", "0"], ["--base-batch must be 1 or more"]),
    (["--base-lr", "nan"], ["--base-lr must be 0 or more"]),
    (["--depth", "0"], ["--depth must be 1 or more"]),
    (["--heads", "3"], ["--dim must be a multiple of --heads 3, not 16"]),
    (["--length", "0"], ["--length must be 1 or more"]),
    (["--temperature", "0"], ["--temperature must be above 0"]),
    (["--method", "adapters"], ["invalid choice: 'adapters'", "lora"]),
    (["--wher", "qkv"], ["unknown flag --wher", "did you mean --where?"])])
def test_bad_flags(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        common.start(lambda args: None, lora.Args, [*SMALL, *flags])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and len(text.strip().splitlines()) == 1
    for word in words:
        assert word in text


@pytest.mark.parametrize("flags, words", [
    (["--rank", "17"], ["--rank 17", "48 x 16 matrix: it can be 1 to 16"]),
    (["--where", "qkv,query"], ["no matrix 'query'", "qkv, proj, fc1, fc2"]),
    (["--k", "1", "999"], ["--k 999 is more than the 107 examples", "11 in its last tenth"]),
    (["--example", "300"], ["0 in its last tenth", "smaller --k or --example"]),
    (["--context", "8"], ["context of 8 tokens is too short", "--example 8"]),
    (["--prompt", "x" * 60], ["too short", "--prompt with 60 bytes"]),
    (["--method", "prompt", "--k", "9"], ["no --k fits: the base's context of 40 tokens has room for 3 examples"]),
    (["--data", "nowhere.txt"], ["no text 'nowhere.txt'", "--data takes"]),
    (["--old", "nowhere.txt"], ["no text 'nowhere.txt'", "--old takes"]),
    (["--context", "9999"], ["the last tenth of --old", "a context of 9999 needs"]),
    (["--base", "nowhere"], ["there is no nowhere/checkpoint.pt", "python gpt.py", "--base"]),
    (["--adapter", "nowhere.pt"], ["there is no base/checkpoint.pt", "--base"]),
    (["--resume"], ["there is no", "leave out --resume"])])
def test_bad_input_before_anything_is_trained(flags, words, texts, tmp_path):
    process = run(*texts, *SMALL, "--out", tmp_path / "out", *flags, script="lora.py")
    refused(process, 2 if flags[0] == "--resume" else 1, *words, script="lora.py")
    assert "steps in" not in process.stdout and not (tmp_path / "out/base/checkpoint.pt").exists()


def test_foreign_and_broken_files(done, texts, tmp_path):
    out, _ = done
    lora_py = lambda *flags: run(*texts, *SMALL, "--out", tmp_path / "out", *flags, script="lora.py")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/checkpoint.pt").write_bytes(b"no checkpoint")
    refused(lora_py("--base", tmp_path / "broken"), 1, "not a checkpoint that can be read", script="lora.py")
    torch.save(dict(script="mae.py"), tmp_path / "broken/checkpoint.pt")
    refused(lora_py("--base", tmp_path / "broken"), 1, "written by mae.py, not by gpt.py or lora.py", "--base", script="lora.py")
    refused(lora_py("--base", out), 1, "holds no base", f"--base {out}/base", script="lora.py")
    refused(lora_py("--base", out / "base", "--adapter", out / "checkpoint.pt"), 1, "not an adapter", script="lora.py")
    refused(lora_py("--base", out / "base", "--adapter", tmp_path / "broken/checkpoint.pt"), 1, "written by mae.py and is not an adapter", script="lora.py")
    refused(run("--resume", "--out", out / "base", script="lora.py"), 1, "is one training, not a series", script="lora.py")
    images = torch.load(out / "base/checkpoint.pt", weights_only=True)
    images["args"]["data"] = "shapes"
    torch.save(images, tmp_path / "broken/checkpoint.pt")
    refused(lora_py("--base", tmp_path / "broken"), 1, "trained on images (shapes)", "--base", script="lora.py")
    refused(lora_py("--base", out / "base", "--adapter", "nowhere.pt"), 1, "there is no adapter nowhere.pt", script="lora.py")
    diverged = lora_py("--base", out / "base", "--method", "full", "--lr", "1e30", "--passes", 9)
    refused(diverged, 1, "full, k = 1", "other results are kept", "smaller --lr", script="lora.py")


def test_dropouts(done, texts, monkeypatch):
    """LoRA's dropout works while it is trained, the base's not any more; all is off in evaluation."""
    seen = []
    monkeypatch.setattr(lora.F, "dropout", lambda x, p, training=True, **_: seen.append((p, training)) or x)
    monkeypatch.setattr(common, "script", lambda: "lora.py")
    base = lora.load_base(lora.Args(example=8, k=(1,), device="cpu"), done[0] / "base")
    model = lora.adapt(base.model, "lora", dropout=.25)
    for train in True, False:
        seen.clear()
        model.train(train)(torch.zeros(1, 3, dtype=torch.int64))
        assert {p for p, training in seen if training and p} == ({.25} if train else set())
    assert all(m.dropout == 0 for m in lora.adapt(new_base(), "lora").modules() if isinstance(m, lora.LoRA))


def test_dropout_is_there_in_training_alone(done, texts, tmp_path):
    flags = [*texts, *SMALL, "--base", done[0] / "base"]
    made = run(*flags, "--method", "lora", "--lr", .05, "--k", 3, "--dropout", .5, "--out", tmp_path, script="lora.py")
    plain = run(*flags, "--method", "lora", "--lr", .05, "--k", 3, "--out", tmp_path / "plain", script="lora.py")
    assert made.returncode == plain.returncode == 0, made.stderr
    loss, other = (result(out)["rows"]["lora"]["3"]["new"] for out in (tmp_path, tmp_path / "plain"))
    assert abs(loss[0] - other[0]) > 1e-6                                  # in training
    again = run(*flags, "--adapter", tmp_path / "lora-3.pt", script="lora.py")
    assert f": {loss[0]:.3f} nats" in again.stdout                         # not when it is measured
