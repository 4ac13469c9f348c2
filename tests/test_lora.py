"""lora.py against dense twins in float64 and formulas; what is trained, kept, refused and resumed."""
import copy
import dataclasses
import json
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import call, killed_at, refused, run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import common
import gpt
import lora

METHODS = ["lora", "ia3", "bitfit", "first", "middle", "last", "full"]
TARGETS = ["qkv", "proj", "fc1", "fc2"]
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


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def plain_state(model):
    """The weights of an adapted and merged GPT under the names of a plain one."""
    return {k.replace(".linear.", "."): v for k, v in model.state_dict().items()
            if k.rsplit(".", 1)[-1] not in ("A", "B", "scale", "_extra_state")}


def moved(model, std=.1):
    """The model with its trained tensors moved away from where they start."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in trained(model).values():
            p += std * torch.randn_like(p)
    return model


def train(model, steps=3, lr=1e-2):
    """A few steps of training; returns the optimizer."""
    optimizer = common.adamw(model.parameters(), lr, .1)
    for _ in range(steps):
        inputs, target = lora.mask(tokens(), V - 1)
        lora.distance(model(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# ------------------------------------------------------------------------------------- the layers


@pytest.mark.parametrize("method", METHODS)
def test_at_the_start_it_is_the_base_bit_for_bit(base, method):
    x = tokens()
    for autocast in False, True:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            before = base.eval()(x)
            model = lora.adapt(copy.deepcopy(base), method, TARGETS, rank=3, dropout=.5)
            assert torch.equal(model.eval()(x), before)
            assert torch.equal(model.train()(x), before)                   # dropout of nothing is nothing
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
    total = x @ linear.weight.T + linear.bias                              # the docstring's view: one key and value at a time
    for r in range(3):
        total = total + 2. * (x @ B[:, r])[..., None] * A[:, r]
    torch.testing.assert_close(layer(x), total, rtol=1e-12, atol=1e-12)


def test_the_papers_names_of_the_factors():
    """The paper, loralib and peft: W0 x + (alpha / r) lora_B (lora_A x)."""
    torch.manual_seed(0)
    linear, x = nn.Linear(7, 5).double(), torch.randn(4, 7, dtype=torch.float64)
    layer = lora.LoRA(linear, rank=2, alpha=6.)
    nn.init.normal_(layer.A)
    lora_A, lora_B = layer.B.T, layer.A
    assert lora_A.shape == (2, 7) and lora_B.shape == (5, 2)
    torch.testing.assert_close(layer(x), linear(x) + 6 / 2 * (x @ lora_A.T @ lora_B.T), rtol=1e-12, atol=1e-12)


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
    model = lora.adapt(base, method, TARGETS, rank=2)
    lora.distance(model(tokens()), tokens()).backward()
    for name, p in trained(model).items():
        assert p.grad.any() == (not name.endswith(".B")), name


def test_merged_equals_unmerged_and_unmerge_restores(base):
    before = copy.deepcopy(base.state_dict())
    model, x = moved(lora.adapt(base, "lora", TARGETS, rank=3)).eval(), tokens()
    layers = [m for m in model.modules() if isinstance(m, lora.LoRA)]
    assert len(layers) == 4 * DEPTH
    free = model(x)
    for layer in layers:
        layer.merge(), layer.merge()                                       # twice adds once
    merged = model(x)
    assert not torch.equal(merged, free)                                   # another way to compute it
    torch.testing.assert_close(merged, free, rtol=0, atol=1e-5 * free.abs().max().item())
    plain = lora.GPT(V, CONTEXT, C, DEPTH, 3)                              # the merged weights are a plain GPT's
    plain.load_state_dict(plain_state(model))
    assert torch.equal(plain.eval()(x), merged)
    for layer in layers:
        layer.unmerge(), layer.unmerge()
    for name, value in plain_state(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(model(x), free, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_what_is_added_has_at_most_the_rank(base, rank):
    before = copy.deepcopy(base.state_dict())
    model = lora.adapt(base.double(), "lora", TARGETS, rank=rank)
    train(model)
    for path, layer in model.named_modules():
        if isinstance(layer, lora.LoRA):
            layer.merge()
            delta = layer.linear.weight - before[f"{path}.weight"].double()
            s = torch.linalg.svdvals(delta)
            assert s[rank - 1] > 1e-6 * s[0] and s[rank] < 1e-12, path
            torch.testing.assert_close(delta, layer.delta(), rtol=0, atol=1e-12)


def test_lora_drops_inputs_of_its_own_branch_only():
    torch.manual_seed(0)
    layer, x = lora.LoRA(nn.Linear(50, 20), rank=4, alpha=4., dropout=.25), torch.randn(1, 50)
    nn.init.normal_(layer.A)
    exact = layer.eval()(x)
    outputs = layer.train()(x.expand(40_000, 50))
    torch.testing.assert_close(outputs.mean(0, keepdim=True), exact, rtol=0, atol=.05)
    match = ((outputs[:9] - layer.linear(x)) @ torch.linalg.pinv(layer.A.T)).detach()    # B^T of the inputs that are left
    for row in match:
        kept = torch.linalg.lstsq((layer.B * x.T).T, row).solution
        assert (layer.B.T @ (kept[:, None] * x.T) - row[:, None]).abs().max() < 1e-3
    torch.testing.assert_close(outputs.std(0), ((layer.A @ layer.B.T * x) * math.sqrt(.25 / .75)).norm(dim=1),
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
    plain.load_state_dict(plain_state(model))
    torch.testing.assert_close(plain(x), free, rtol=0, atol=1e-5 * free.abs().max().item())
    assert torch.equal(plain(x), model(x))


# ------------------------------------------------------------------------------- what is trained


def expected_names(method, depth=DEPTH):
    """What a method trains, by the names of a plain GPT, written out; LoRA and (IA)^3: what it puts in."""
    matrices = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    blocks = {"first": (0, 1), "middle": (1, 2), "last": (2, 3)}
    if method == "lora":
        return {f"blocks.{i}.{matrices[m]}.{f}" for i in range(depth) for m in TARGETS for f in "AB"}
    if method == "ia3":
        return {f"blocks.{i}.{m}.scale" for i in range(depth) for m in ("attn.qkv", "mlp.fc2")}
    every = set(dict(new_base(depth).named_parameters()))
    if method == "bitfit":
        return {f"blocks.{i}.{m}.bias" for i in range(depth) for m in ("norm1", "norm2", *matrices.values())} | {"norm.bias"}
    return {name for name in every if method == "full" or name.startswith(tuple(f"blocks.{i}." for i in blocks[method]))}


@pytest.mark.parametrize("method", METHODS)
def test_training_changes_the_named_tensors_alone(base, method):
    before = copy.deepcopy(base.state_dict())
    model = lora.adapt(base, method, TARGETS, rank=2)
    start = copy.deepcopy(model.state_dict())
    optimizer = train(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == set(lora.adapter_state(model)) == expected_names(method)
    for name, value in model.state_dict().items():
        if name not in changed and not name.endswith("_extra_state"):
            assert torch.equal(value, before[name.replace(".linear.", ".")])
    frozen = [p for name, p in model.named_parameters() if name not in changed]
    assert all(p.grad is None for p in frozen)
    held = {id(p) for p in optimizer.state}
    assert held == {id(p) for p in trained(model).values()}           # optimizer state for these only


@pytest.mark.parametrize("method, formula", [
    ("lora", DEPTH * 5 * (4 * C + 2 * C + 5 * C + 5 * C)), ("ia3", DEPTH * 6 * C), ("bitfit", DEPTH * 11 * C + C),
    ("first", 2 * (12 * C * C + 13 * C)), ("middle", 2 * (12 * C * C + 13 * C)), ("last", 2 * (12 * C * C + 13 * C)),
    ("full", DEPTH * (12 * C * C + 13 * C) + (V + CONTEXT + 2) * C)])
def test_number_of_trained_parameters(base, method, formula):
    model = lora.adapt(base, method, TARGETS, rank=5)
    assert sum(p.numel() for p in lora.adapter_state(model).values()) == formula


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
    assert either(backward("lora")) == either(backward("ia3")) == either(backward("bitfit")) == []
    assert len(either(backward("last"))) == 8
    assert len(backward("last")) < len(backward("first")) / 1.3            # nothing goes below what is trained


@pytest.mark.parametrize("depth, expected", [(1, [0]), (2, [0, 1]), (3, [1, 2]), (5, [3, 4]), (6, [4, 5])])
def test_two_blocks_at_a_place(depth, expected):
    blocks = lambda method: sorted({int(n.split(".")[1]) for n in lora.adapter_state(lora.adapt(new_base(depth), method))})
    assert blocks("last") == expected and blocks("first") == list(range(min(2, depth)))
    middle = blocks("middle")
    assert middle == {1: [0], 2: [0, 1], 3: [0, 1], 5: [1, 2], 6: [2, 3]}[depth]


@pytest.mark.parametrize("how, words", [
    (dict(method="lora", rank=C), "rank 24 of a 24 x 3 matrix: it can be 1 to 3"), (dict(method="LoRA"), "there is no method 'LoRA'"),
    (dict(method="lora", targets=["0", "x"]), "no matrix 'x'"), (dict(method="ia3"), "ia3 is for a GPT")])
def test_what_is_refused_changes_nothing(how, words):
    """Also where the first layer would fit, and only the second does not."""
    model = nn.Sequential(nn.Linear(C, C), nn.Linear(3, C))
    with pytest.raises(ValueError, match=words):
        lora.adapt(model, **dict(targets=["0", "1"]) | how)
    assert all(p.requires_grad for p in model.parameters()) and all(isinstance(layer, nn.Linear) for layer in model)


@pytest.mark.parametrize("first", ["lora", "ia3"])
@pytest.mark.parametrize("second", ["lora", "ia3"])
def test_a_model_is_adapted_once(first, second, base):
    model = lora.adapt(base, first)
    with pytest.raises(ValueError, match="adapted already: merge_and_unload it first"):
        lora.adapt(model, second)
    lora.adapt(lora.merge_and_unload(model), second)


def test_wrong_names_and_ranks(base):
    with pytest.raises(ValueError, match="no matrix 'qkw' in this model: it has qkv, proj, fc1, fc2"):
        lora.adapt(base, "lora", ["qkv", "qkw"])
    for rank in 0, C + 1:
        with pytest.raises(ValueError, match=f"rank {rank} of a 72 x 24 matrix: it can be 1 to 24"):
            lora.adapt(base, "lora", ["qkv"], rank=rank)
    lora.adapt(base, "lora", ["qkv"], rank=C)
    with pytest.raises(ValueError, match="no method 'adapter'"):
        lora.adapt(base, "adapter")
    small = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2))
    with pytest.raises(ValueError, match="last is for a GPT of this file, not for Sequential"):
        lora.adapt(small, "last")
    with pytest.raises(ValueError, match="rank 3 of a 2 x 9 matrix"):
        lora.adapt(small, "lora", ["0", "1"], rank=3)
    assert all(isinstance(layer, nn.Linear) for layer in small)                 # nothing was replaced
    assert lora.adapt(small, "lora", "0", rank=4)[0].scale == 1.                # one name, and the scale without alpha


# ------------------------------------------------------------------------------------- the method


def test_mask_and_distance_are_gpts(base):
    x = tokens()
    for ours, theirs in zip(lora.mask(x, 7), gpt.mask(x, 7)):
        assert torch.equal(ours, theirs)
    assert lora.distance(base(x), x) == gpt.distance(base(x), x)


def test_in_context_prepends_the_examples():
    examples, x = torch.tensor([[0, 1, 2], [0, 3, 4]]), torch.tensor([[5, 6], [7, 8], [9, 1]])
    assert lora.in_context(examples, x).tolist() == [[0, 1, 2, 0, 3, 4, a, b] for a, b in x.tolist()]


def test_any_model_of_linear_layers_can_be_adapted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
    before, x = copy.deepcopy(model), torch.randn(2, 4)
    lora.adapt(model, "lora", ["2"], rank=2)
    assert isinstance(model[0], nn.Linear) and isinstance(model[2], lora.LoRA)
    assert torch.equal(model(x), before(x)) and set(lora.adapter_state(model)) == {"2.A", "2.B"}


def test_loss_after_examples_is_that_of_the_text_alone():
    """By hand: token by token, the probability of each byte after BOS, the examples and what comes before it."""
    torch.manual_seed(0)
    model = lora.GPT(257, 32, C, 2, 3).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=.2)
    args = common.Args(device="cpu", dtype="float32")
    x, two = torch.randint(256, (3, 5)), torch.randint(256, (2, 6))
    for examples, before in (None, [256]), (two, [256, *two.flatten().tolist()]):
        for given in 0, 1:
            nats, target = 0., F.pad(x[:, given:], (given, 0), value=-100)
            for row in x.tolist():
                for t in range(given, 5):
                    logits = model(torch.tensor([before + row[:t]]))[0, -1]
                    nats -= logits.log_softmax(0)[row[t]].item() / (3 * (5 - given))
            assert lora.evaluate(args, model, x, target, examples) == pytest.approx(nats, abs=1e-5)


def test_examples_begin_where_lines_do(tmp_path):
    text = b"ab cd\nefg\n\nhijkl\n" * 9
    for i in 1, 2:
        (tmp_path / f"{i}.txt").write_bytes(text + b"the end %d\n" % i * 6)
    args = lora.Args(data=str(tmp_path), example=7, k=1, device="cpu")
    train, val = common.load_examples(args, lora.BYTES)
    for part, rows in zip(("train", "val"), (train, val)):
        found = []
        for raw in getattr(common.load_text(str(tmp_path)), part):          # documents are not glued together
            found += [raw[i:i + 8] for i in range(len(raw) - 7) if raw[i:i + 1] == b"\n" and raw[i + 1:i + 2] != b"\n"]
        assert [bytes(row.tolist()) for row in rows[:, 0]] == found and len(found) > 3
        assert (rows[:, 1, 0] == -100).all() and torch.equal(rows[:, 1, 1:], rows[:, 0, 1:])
    two, five = (common.choose(train, k, 3) for k in (2, 5))
    assert torch.equal(two, five[:2]) and not torch.equal(two, common.choose(train, 2, 4))
    assert len(common.choose(train, len(train), 3).unique(dim=0)) == len(train.unique(dim=0))


def test_recipe():
    args = lora.Args(batch=16, epochs=20, steps=100)
    for k, batch, steps in (1, 1, 20), (16, 16, 20), (64, 16, 80), (256, 16, 100):
        how = dataclasses.replace(args, k=k)
        lora.recipe(how)
        assert (how.batch, how.steps, how.lr) == (batch, steps, lora.LR["lora"])
        lora.recipe(how)
        assert (how.batch, how.steps) == (batch, steps)                     # twice is once: a run is resumed
    for method in METHODS:
        how = dataclasses.replace(args, method=method)
        lora.recipe(how)
        assert how.lr == lora.LR[method]
    how = lora.Args(method="full", lr=.5)
    lora.recipe(how)
    assert how.lr == .5
    layers = [lora.adapt_base(lora.Args(rank=3, alpha=alpha), new_base()).blocks[0].attn.qkv for alpha in (0., 6.)]
    assert [layer.scale for layer in layers] == [1., 2.]


def test_sample_equals_the_whole_text_at_every_token(base):
    """Without a cache; several texts at once."""
    prompt = text = tokens(2)[:, :3]
    torch.manual_seed(4)
    for _ in range(10):
        p = (base.eval()(text)[:, -1] / .1).softmax(1)
        text = torch.cat([text, torch.multinomial(p, 1)], 1)
    torch.manual_seed(4)
    assert lora.sample(base, prompt, 10, temperature=.1).tolist() == text[:, 3:].tolist()
    torch.manual_seed(4)
    new = lora.sample(base, prompt, 10, temperature=.7)
    torch.manual_seed(4)
    assert torch.equal(new, gpt.sample(base, prompt, 10, temperature=.7))


def test_an_adapter_comes_back(base, tmp_path):
    x, about = tokens(), dict(fingerprint="a base", base="a folder")
    for method in METHODS:
        args = lora.Args(method=method, targets=("proj", "fc1"), rank=3, alpha=5., out=str(tmp_path))
        model = moved(lora.adapt_base(args, copy.deepcopy(base))).eval()
        path, count = lora.save_adapter(args, model, about), sum(p.numel() for p in trained(model).values())
        assert 4 * count < path.stat().st_size < 4 * count + 600 * len(trained(model)) + 3000       # and nothing else
        file = torch.load(path, weights_only=True)
        assert file["adapter"] == dict(method=method, targets=("proj", "fc1"), rank=3, alpha=5.)
        again = lora.adapt(copy.deepcopy(base), **file["adapter"])
        lora.load_adapter(again, file["tensors"])
        assert torch.equal(again.eval()(x), model(x)) and not torch.equal(again(x), base.eval()(x))


def test_adapters_on_one_base_are_switched(base):
    model, x = lora.adapt(base, "lora", TARGETS, rank=2).eval(), tokens()
    adapters, outputs = {}, {}
    for name in "none", "one", "two":
        adapters[name], outputs[name] = lora.adapter_state(model), model(x)
        moved(model)
    assert not torch.equal(outputs["one"], outputs["two"])
    for name in "two", "none", "one", "two":
        assert lora.load_adapter(model, adapters[name]) is model and torch.equal(model(x), outputs[name]), name
    for other in lora.adapt(new_base(), "lora", TARGETS, rank=3), lora.adapt(new_base(), "lora", ["qkv"], rank=2), \
            lora.adapt(new_base(), "ia3"), new_base():
        with pytest.raises(ValueError, match="another method, rank or targets"):
            lora.load_adapter(other, adapters["two"])
    model.blocks[1].mlp.fc1.merge()
    with pytest.raises(ValueError, match="is merged: load the new one before"):
        lora.load_adapter(model, adapters["one"])


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_merged_state_is_known_as_merged(base, method):
    fresh, x = lora.adapt(copy.deepcopy(base), method), tokens()
    model = moved(lora.adapt(base, method)).eval()
    free = model(x)
    for merged in [True, False][:1 + (method == "lora")]:                   # of (IA)^3 there is no way back
        for m in model.modules():
            if hasattr(m, "merged"):
                m.merge() if merged else m.unmerge()
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(fresh.eval()(x), free, rtol=0, atol=1e-5 * free.abs().max().item())
        assert {m.merged for m in fresh.modules() if hasattr(m, "merged")} == {merged}


@pytest.mark.parametrize("method", METHODS)
def test_merged_and_unloaded_it_is_a_plain_gpt(base, method):
    names, x = [*base.state_dict()], tokens()
    model = moved(lora.adapt(base, method)).eval()
    free = model(x)
    assert lora.merge_and_unload(model) is model and [*model.state_dict()] == names
    torch.testing.assert_close(model(x), free, rtol=0, atol=1e-5 * free.abs().max().item())
    assert {type(m) for m in model.modules()} == {type(m) for m in new_base().modules()}


@pytest.mark.parametrize("mode", [True, False])
def test_inside_torchs_transformer(mode):
    """A layer of torch reads the weights of out_proj and, in evaluation, of linear1: they are those with the addition."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0., batch_first=True).train(mode)
    plain, x = copy.deepcopy(layer), torch.randn(2, 5, 16)
    model = moved(lora.adapt(nn.Sequential(layer), "lora", ["out_proj", "linear1", "linear2"], rank=2))
    with torch.inference_mode(not mode):
        for name in "self_attn.out_proj", "linear1", "linear2":
            plain.get_submodule(name).weight.data += layer.get_submodule(name).delta()
        y, expected = model(x), plain(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    if mode:
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for name, p in trained(model).items())


def test_layers_that_are_not_linear_are_refused():
    for layer in nn.Conv1d(4, 4, 1), nn.Embedding(4, 4), nn.Bilinear(2, 2, 2):
        with pytest.raises(ValueError, match=f"not for {type(layer).__name__}"):
            lora.LoRA(layer, 1, 1.)
        with pytest.raises(ValueError, match=f"not for {type(layer).__name__}"):
            lora.IA3(layer)


# ------------------------------------------------------------------------------------- the script


SMALL = ("--dim 16 --heads 2 --depth 3 --context 40 --base-steps 3 --base-batch 2 --example 8 --k 3 --epochs 2 "
         "--batch 2 --rank 2 --length 90 --dtype float32 --device cpu --prompt fox").split()


@pytest.fixture(scope="module")
def done(texts, tmp_path_factory):
    """A finished run, and what it printed."""
    out = tmp_path_factory.mktemp("lora") / "run"
    process = run(*texts, *SMALL, "--out", out, script="lora.py")
    assert process.returncode == 0, process.stderr
    return out, process.stdout


@pytest.fixture
def lora_py(texts, tmp_path):
    """Runs lora.py with the small settings, flags after them, and --out in tmp_path."""
    return lambda *flags, out="out", how=run: how(*texts, *SMALL, "--out", tmp_path / out, *flags, script="lora.py")


def result(out):
    return json.loads((out / "result.json").read_text())["figures"]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


IN_CONTEXT = "3 examples in the prompt (in-context)"


def test_the_table(done):
    out, text = done
    figures = result(out)
    rows = figures["rows"]
    assert list(rows) == ["the base", IN_CONTEXT, "lora"] and max(map(len, text.splitlines())) <= 80
    assert rows["the base"]["trained"] == rows["the base"]["bytes"] == 0
    assert rows[IN_CONTEXT]["old"] == rows["the base"]["old"] and rows[IN_CONTEXT]["new"] != rows["the base"]["new"]
    assert (rows[IN_CONTEXT]["trained"], rows[IN_CONTEXT]["bytes"]) == (0, 27)
    assert rows["lora"]["trained"] == 3 * 2 * (4 + 2 + 5 + 5) * 16
    assert rows["lora"]["bytes"] == (out / "adapter.pt").stat().st_size
    assert rows["lora"]["new"] != rows["the base"]["new"] and rows["lora"]["old"] != rows["the base"]["old"]
    assert set(figures["texts"]) == {"the base", "lora"} and all(t.startswith("fox") for t in figures["texts"].values())
    for who, row in rows.items():
        assert f"\n{who} " in text and f"{row['new']:.3f}" in text and f"{row['bytes']:,}" in text
    assert "Sample of the base:" in text and "Sample of lora:" in text
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 3                 # 2 epochs of 3 in batches of 2


def test_examples_that_do_not_fit_the_context_have_no_row(done, lora_py, tmp_path):
    process = lora_py("--base", done[0], "--k", 4)                          # (4 + 1) * (8 + 1) > 40
    assert process.returncode == 0, process.stderr
    assert list(result(tmp_path / "out")["rows"]) == ["the base", "lora"]


def test_the_figures_are_those_of_the_adapter(done, texts):
    """What was written, on the base, gives the figures again; so do a plain GPT and merged weights."""
    out, _ = done
    args = common.resolve(lora.Args(device="cpu", dtype="float32", example=8, k=3, data=str(texts[1]), old=str(texts[3])))
    model, about = lora.load_base(args, out)
    assert about["base"] == str(out / "base") and about["old"] == args.old
    file, plain = torch.load(out / "adapter.pt", weights_only=True), copy.deepcopy(model)
    assert file["fingerprint"] == about["fingerprint"]
    lora.load_adapter(lora.adapt(model, **file["adapter"]), file["tensors"])
    val = common.evenly(common.load_examples(args, lora.BYTES)[1], 400)
    old = common.evenly(common.windows(args, args.old, 40, lora.BYTES)[1], 100)
    row = result(out)["rows"]["lora"]
    assert lora.losses(args, model, val, old) == {name: row[name] for name in ("new", "old")}
    with torch.no_grad():
        for path, linear in lora.target_layers(plain, TARGETS).items():
            linear.weight += file["tensors"][f"{path}.A"] @ file["tensors"][f"{path}.B"].T
    assert lora.evaluate(args, plain, *val.unbind(1)) == pytest.approx(row["new"], abs=1e-5)


def test_from_python(texts, done, tmp_path):
    """main returns the adapted model; it is the one of the command line, and what is in the file."""
    args = lora.Args(**{flag[2:].replace("-", "_"): type(getattr(lora.Args, flag[2:].replace("-", "_")))(value)
                        for flag, value in zip((*texts, *SMALL)[::2], (*texts, *SMALL)[1::2])}, out=str(tmp_path / "a"))
    model = lora.main(args)
    assert isinstance(model, lora.GPT) and not model.training
    assert same(model.state_dict(), weights(done[0] / "checkpoint.pt"))
    assert all(torch.equal(p, q) for p, q in zip(
        lora.adapter_state(model).values(), torch.load(tmp_path / "a/adapter.pt", weights_only=True)["tensors"].values()))


@pytest.mark.parametrize("method", METHODS)
def test_training_helps(method, helped, lora_py, tmp_path):
    """With all of the text and time enough, every method is better than the base."""
    process = lora_py("--base", helped, *"--k 60 --batch 12 --epochs 15 --lr 0.02 --method".split(), method)
    assert process.returncode == 0, process.stderr
    rows = result(tmp_path / "out")["rows"]
    assert rows[method]["new"] < rows["the base"]["new"] - .02


@pytest.fixture(scope="module")
def helped(texts, tmp_path_factory):
    """The folder of a base of 60 steps."""
    out = tmp_path_factory.mktemp("base") / "run"
    assert run(*texts, *SMALL, "--base-steps", 60, "--steps", 0, "--out", out, script="lora.py").returncode == 0
    return out / "base"


def test_the_base_is_kept_and_trained_anew_for_other_settings(done, texts, tmp_path):
    out, text = done
    assert "First the base" in text and text.count("3 steps in") == 2
    again = run(*texts, *SMALL, "--rank", 3, "--out", out.parent / "other", script="lora.py")
    assert "First the base" not in again.stdout and again.returncode == 0, again.stderr
    about = torch.load(out.parent / "other/checkpoint.pt", weights_only=True)["about"]
    assert about["base"] == str(out / "base") and not (out.parent / "other/base").exists()
    kept = lambda *flags: kept_base([*texts, *SMALL, "--out", out.parent / "new", *flags])
    assert kept("--rank", 3) == kept("--k", 5, "--method", "full", "--epochs", 9) == str(out / "base")
    for flags in ["--base-steps", 4], ["--seed", 1], ["--dim", 18], ["--context", 41], ["--old", texts[1]], ["--base-lr", .1], \
            ["--base-dropout", .1], ["--base-batch", 3], ["--heads", 1], ["--depth", 1], ["--dtype", "auto"]:
        with pytest.raises(Trained):
            kept(*flags)


class Trained(Exception):
    """The base is trained."""


def kept_base(flags):
    """lora.pretrain, stopped where it would begin to train from the start."""
    def stop(how, *_, **__):
        assert not how.resume
        raise Trained
    given = vars(common.parser_of(lora.Args).parse_args([*map(str, flags)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "Run", stop)
        return lora.pretrain(common.resolve(lora.Args(**given)))


def interrupted(*flags):
    """lora.py, interrupted in the eighth step of a training; returns what it printed as errors."""
    process = run(*flags, script="lora.py", before=killed_at(7, signal.SIGINT))
    assert process.returncode == -signal.SIGINT, process.stderr
    return process.stderr


def test_an_interrupted_base_continues(texts, tmp_path):
    flags = [*texts, *SMALL, "--base-steps", 20]
    error = interrupted(*flags, "--out", tmp_path / "a")
    assert f"python lora.py --resume --out {tmp_path / 'a'} continues it" in error and len(error.strip().splitlines()) == 1
    half = torch.load(tmp_path / "a/base/checkpoint.pt", weights_only=True)["step"]
    assert 0 < half < 20
    again = run("--resume", "--out", tmp_path / "a", script="lora.py")
    assert again.returncode == 0 and f"Continuing from step {half}" in again.stdout, again.stderr
    whole = run(*flags, "--out", tmp_path / "apart/b", script="lora.py")
    assert whole.returncode == 0, whole.stderr
    assert same(weights(tmp_path / "a/base/checkpoint.pt"), weights(tmp_path / "apart/b/base/checkpoint.pt"))
    assert same(weights(tmp_path / "a/checkpoint.pt"), weights(tmp_path / "apart/b/checkpoint.pt"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_resumed_equals_uninterrupted(method, done, texts, tmp_path):
    flags = [*texts, *SMALL, "--epochs", 10, "--dropout", .1, "--base", done[0], "--method", method]
    interrupted(*flags, "--out", tmp_path / "a")
    half = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)["step"]
    assert 0 < half < 15 and not (tmp_path / "a/adapter.pt").exists()
    again = run("--resume", "--out", tmp_path / "a", script="lora.py")
    assert again.returncode == 0 and f"Continuing from step {half}" in again.stdout, again.stderr
    whole = run(*flags, "--out", tmp_path / "b", script="lora.py")
    assert whole.returncode == 0, whole.stderr
    assert same(weights(tmp_path / "a/checkpoint.pt"), weights(tmp_path / "b/checkpoint.pt"))
    assert result(tmp_path / "a")["rows"] == result(tmp_path / "b")["rows"]
    again = run("--resume", "--steps", 0, "--prompt", "dog", "--out", tmp_path / "a", script="lora.py")        # only evaluates
    assert again.returncode == 0, again.stderr
    assert result(tmp_path / "a")["rows"] == result(tmp_path / "b")["rows"]
    assert result(tmp_path / "a")["texts"][method].startswith("dog")


def test_resuming_with_another_base_is_refused(done, helped, texts, tmp_path):
    made = run(*texts, *SMALL, "--base", done[0], "--out", tmp_path, script="lora.py")
    assert made.returncode == 0, made.stderr
    before = (tmp_path / "checkpoint.pt").read_bytes()
    refused(run("--resume", "--base", helped, "--out", tmp_path, script="lora.py"), 1, "is of another base", script="lora.py")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_base_from_gpt(done, texts, lora_py, tmp_path):
    made = run("--data", texts[3], *"--dim 16 --heads 2 --depth 1 --batch 4 --context 32 --length 5 --steps 2".split(),
               "--device", "cpu", "--out", tmp_path / "gpt", script="gpt.py")
    assert made.returncode == 0, made.stderr
    process = run(*texts[:2], *SMALL, "--base", tmp_path / "gpt", "--out", tmp_path / "lora", script="lora.py")
    assert process.returncode == 0 and "old text: old.txt" in process.stdout, process.stderr
    gpts = json.loads((tmp_path / "gpt/result.json").read_text())["figures"]["loss"]
    assert result(tmp_path / "lora")["rows"]["the base"]["old"] == pytest.approx(gpts, rel=.02)       # the same text, measured alike
    assert not (tmp_path / "lora/base").exists()


@pytest.mark.parametrize("flags, words", [
    (["--rank", "0"], ["--rank must be 1 or more, not 0"]),
    (["--steps", "-1"], ["--steps must be 0 or more"]),
    (["--k", "0"], ["--k must be 1 or more"]),
    (["--context", "-5"], ["--context must be 2 or more, not -5"]),
    (["--k"], ["--k", "expected one argument"]),
    (["--targets"], ["--targets", "at least one"]),
    (["--epochs", "0"], ["--epochs must be 1 or more"]),
    (["--example", "1"], ["--example must be 2 or more"]),
    (["--alpha", "-1"], ["--alpha must be 0 or more"]),
    (["--dropout", "1"], ["--dropout must be in [0, 1)"]),
    (["--base-dropout", "-1"], ["--base-dropout must be in [0, 1)"]),
    (["--base-steps", "0"], ["--base-steps must be 1 or more"]),
    (["--base-lr", "nan"], ["--base-lr must be 0 or more"]),
    (["--temperature", "0"], ["--temperature must be in (0, inf)"]),
    (["--method", "adapters"], ["invalid choice: 'adapters'", "lora"]),
    (["--target", "qkv"], ["unknown flag --target", "did you mean --targets?"])])
def test_bad_flags(flags, words, capsys):
    def main(args):
        common.resolve(args)
    with pytest.raises(SystemExit) as stop:
        common.cli(main, lora.Args, [*SMALL, *flags])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and len(text.strip().splitlines()) == 1
    for word in words:
        assert word in text


@pytest.mark.parametrize("flags, words", [
    (["--rank", "17"], ["rank 17 of a 48 x 16 matrix: it can be 1 to 16"]),
    (["--heads", "3"], ["16 channels cannot be divided among 3 heads"]),
    (["--targets", "qkv", "query"], ["no matrix 'query'", "qkv, proj, fc1, fc2"]),
    (["--k", "999"], ["--k 999 is more than the 107 examples", "11 in its last tenth"]),
    (["--example", "300"], ["0 in its last tenth", "smaller --k or --example"]),
    (["--context", "8"], ["--example 8 does not fit in --context 8"]),
    (["--data", "nowhere.txt"], ["no text 'nowhere.txt'", "--data takes"]),
    (["--old", "nowhere.txt"], ["no text 'nowhere.txt'", "--old takes"]),
    (["--context", "9999"], ["the last tenth of --old", "a context of 9999 needs"]),
    (["--base", "nowhere"], ["--base nowhere holds no weights. Fetch config.json", "or give the folder of a run"]),
    (["--prompt", "x" * 39], ["--prompt has 39 tokens", "holds 38: shorten it"]),
    (["--resume"], ["there is no", "leave out --resume"])])
def test_bad_input_before_anything_is_trained(flags, words, lora_py, tmp_path):
    process = lora_py(*flags, how=call)
    refused(process, 1, *words, script="lora.py")
    assert "steps in" not in process.stdout and not (tmp_path / "out").exists()


def test_what_does_not_fit_a_base_that_is_there(done, lora_py):
    refused(lora_py("--base", done[0], "--rank", 17, how=call), 1, "rank 17 of a 48 x 16 matrix", script="lora.py")
    refused(lora_py("--base", done[0], "--example", 40, how=call), 1, "41 tokens are more than the context of 40", script="lora.py")
    refused(lora_py("--base", done[0], "--prompt", "x" * 60, how=call), 1, "--prompt has 60 tokens", script="lora.py")


def test_foreign_and_broken_files(done, lora_py, tmp_path):
    out, _ = done
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "checkpoint.pt").write_bytes(b"no checkpoint")
    refused(lora_py("--base", broken, how=call), 1, "not a checkpoint that can be read", script="lora.py")
    state = torch.load(out / "base/checkpoint.pt", weights_only=True)
    torch.save(state | dict(script="mae.py"), broken / "checkpoint.pt")
    refused(lora_py("--base", broken, how=call), 1, "written by mae.py, not by gpt.py or lora.py", "--base", script="lora.py")
    torch.save(state | dict(args=state["args"] | dict(data="shapes")), broken / "checkpoint.pt")
    refused(lora_py("--base", broken, how=call), 1, "trained on images (shapes)", "--base", script="lora.py")
    diverged = lora_py("--base", out, "--method", "full", "--lr", "1e30", "--epochs", 9)
    refused(diverged, 1, "smaller --lr", script="lora.py")


def test_dropout_is_there_in_training_alone(done, lora_py, texts, tmp_path, monkeypatch):
    """LoRA's dropout works while it is trained, the base's not any more; all is off in evaluation."""
    flags = ["--base", done[0], "--lr", .05]
    made, plain = lora_py(*flags, "--dropout", .5), lora_py(*flags, out="plain")
    assert made.returncode == plain.returncode == 0, made.stderr
    rows, other = (result(tmp_path / out)["rows"]["lora"] for out in ("out", "plain"))
    assert abs(rows["new"] - other["new"]) > 1e-6                           # in training
    again = run("--resume", "--out", tmp_path / "out", script="lora.py")
    assert again.returncode == 0 and result(tmp_path / "out")["rows"]["lora"] == rows, again.stderr    # not when it is measured
    seen = []
    monkeypatch.setattr(lora.F, "dropout", lambda x, p, training=True, **_: seen.append((p, training)) or x)
    model = lora.adapt(lora.load_base(lora.Args(device="cpu"), done[0])[0], "lora", dropout=.25)
    for train in True, False:
        seen.clear()
        model.train(train)(torch.zeros(1, 3, dtype=torch.int64))
        assert {p for p, training in seen if training and p} == ({.25} if train else set())


def test_a_folder_is_summarised_once(done, lora_py, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/a.txt").write_text("the cat and the dog\n" * 300)
    made = lora_py("--data", tmp_path / "new", out="folder")
    assert made.returncode == 0 and made.stdout.replace("\n", "").count("1 documents") == 1, made.stderr
