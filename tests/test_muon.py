"""Muon: equal to PyTorch's own, to a singular value decomposition, and to AdamW for what is no matrix
of a block; which matrices it gets; resume."""
import copy

import pytest
import torch
from torch import nn

import common
import flamingo
import gpt


class Args:
    optimizer, lr, muon_lr, weight_decay, device, dtype = "muon", 1e-3, .02, .1, "cpu", "float32"


def gradients(model, steps=4):
    """The same gradients for every model of these shapes, one set per step."""
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        yield


class Two(nn.Module):
    """A stack of layers, wide and tall, and an output layer that does not belong to it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList([nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 24)])
        self.head = nn.Linear(24, 5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has it since 2.9")
def test_equals_pytorch():
    ours, theirs = Two(), Two()
    optimizer = common.optimizer(Args, ours.named_parameters())
    optimizer.dtype = torch.bfloat16                           # as theirs
    matrices = [layer.weight for layer in theirs.blocks]
    muon = torch.optim.Muon(matrices, lr=.02, weight_decay=.1)
    rest = [p for p in theirs.parameters() if all(p is not m for m in matrices)]
    adam = common.adamw(rest, 1e-3, .1)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * group["times"]
    start = [p.detach().clone() for p in ours.parameters()]
    for _ in zip(gradients(ours), gradients(theirs)):
        optimizer.step(), muon.step(), adam.step()
    for (name, a), b, p in zip(ours.named_parameters(), theirs.parameters(), start):
        if name.startswith("blocks") and a.ndim == 2:          # up to bfloat16's rounding
            assert (a - b).norm() < .03 * (b - p).norm(), name
        else:
            assert torch.equal(a, b), name


def test_the_direction_is_that_of_an_svd():
    x = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = common.orthogonalize(x, torch.float64).double()
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    inside = u.mT @ y @ v.mT                     # in the basis of the SVD: diagonal, all near 1
    values = inside.diagonal(dim1=1, dim2=2)
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-6
    assert .65 < values.min() and values.max() < 1.25
    assert torch.equal(common.orthogonalize(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))


def test_fused_layers_are_several_matrices():
    """Query, key and value of one layer, or as three layers: the same steps."""
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict(dict(qkv=nn.Linear(8, 24, bias=False)))])

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
    one, three = Fused(), Apart()
    for p, part in zip(three.parameters(), one.blocks[0]["qkv"].weight.chunk(3)):
        p.data.copy_(part)
    optimizers = [common.optimizer(Args, m.named_parameters()) for m in (one, three)]
    for _ in zip(gradients(one), gradients(three)):
        for optimizer in optimizers:
            optimizer.step()
    whole = torch.cat([p for p in three.parameters()])
    assert torch.allclose(one.blocks[0]["qkv"].weight, whole, atol=1e-6)


def test_what_it_gets():
    model = gpt.GPT(257, 16, 32, 2, 2)
    parts = {id(p): group["parts"] for group in common.groups(Args, model.named_parameters(), .1)
             for p in group["params"]}
    for name, p in model.named_parameters():
        inside = name.startswith("blocks") and p.ndim == 2
        assert parts[id(p)] == (0 if not inside else 3 if "qkv" in name else 1), name
    args = flamingo.Args(device="cpu")
    vit = flamingo.ViT(32, 8, 32, 1, 2)
    whole = flamingo.Flamingo(model.requires_grad_(False), vit, 8, 1)
    optimizer = flamingo.build_optimizer(args, whole)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = dict(whole.named_parameters())
    assert found.keys() == {id(p) for p in named.values() if p.requires_grad}
    for name, p in named.items():
        if p.requires_grad:
            group = found[id(p)]
            muon = p.ndim == 2 and name != "resampler.latents"
            assert bool(group.get("parts")) == muon, name
            assert group["times"] == (10 if name.endswith("gate") else
                                      args.muon_lr / args.lr if muon else 1), name
            decays = p.ndim == 2 and not name.startswith("resampler")
            assert group["weight_decay"] == (args.weight_decay if decays else 0), name
            if name.endswith(".kv.weight"):
                assert group["parts"] == 2


def test_its_state_survives_a_checkpoint():
    def train(optimizer, model, steps):
        for _ in gradients(model, steps):
            optimizer.step()
    a = Two()
    first = common.optimizer(Args, a.named_parameters())
    train(first, a, 3)
    b = copy.deepcopy(a)
    second = common.optimizer(Args, b.named_parameters())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(first, a, 2), train(second, b, 2)
    for (name, x), y in zip(a.named_parameters(), b.parameters()):
        assert torch.equal(x, y), name


def test_a_parameter_without_a_gradient_stays():
    model = Two()
    optimizer = common.optimizer(Args, model.named_parameters())
    before = [p.detach().clone() for p in model.parameters()]
    model.blocks[1].weight.grad = torch.ones(24, 40)
    optimizer.step()
    moved = [name for (name, p), x in zip(model.named_parameters(), before) if not torch.equal(p, x)]
    assert moved == ["blocks.1.weight"]


def test_another_optimizer_is_refused(tmp_path):
    def run(kind, steps, resume):
        model = Two()
        args = gpt.Args(optimizer=kind, steps=steps, resume=resume, device="cpu", out=str(tmp_path))
        optimizer = common.optimizer(args, model.named_parameters())
        for _ in (run := common.Run(args, model, optimizer)):
            loss = model.head(model.blocks[2](torch.ones(1, 24))).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.log(loss)
    run("muon", 2, False)
    with pytest.raises(common.UserError, match="give its --optimizer"):
        run("adamw", 4, True)
    run("muon", 4, True)
