"""flamingo.py against loops in float64, its language model alone, and what must not reach what."""
import copy
import json
import math
import random
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command, refused, run
from torch import nn

import common
import flamingo
import gpt

SMALL = ("--lm-steps 3 --lm-batch 4 --dim 16 --heads 2 --depth 2 --eye-steps 3 --eye-batch 4 --eye-dim 8 --eye-heads 2 "
         "--eye-depth 1 --steps 3 --batch 4 --images 500 --tests 12 --latents 2 --dtype float32 --device cpu").split()
V, CONTEXT, C, DEPTH, IMAGE, END = 30, 24, 16, 3, 1, 0
TEXT = torch.tensor([[0, 4, 5, 1, 6, 7, 0, 1, 8, 9, 0, 1, 10, 11, 12, 0],
                     [0, 1, 5, 1, 6, 7, 0, 9, 8, 9, 0, 2, 10, 1, 12, 0]])       # three marks each
MARKS = [[3, 7, 11], [1, 3, 13]]


def new_model(attend="last", every=1, start=.7, latents=4, seed=0):
    """A Flamingo whose weights, gates and biases all matter."""
    torch.manual_seed(seed)
    lm, eye = flamingo.GPT(V, CONTEXT, C, DEPTH, 2), flamingo.ViT(2, 48, 12, 1, 3)
    for p in (*lm.parameters(), *eye.parameters()):
        nn.init.normal_(p, std=.2)
    return flamingo.Flamingo(lm.requires_grad_(False), eye, 4, IMAGE, every, latents, 2, attend, start).eval()


def pictures(n=6, seed=1):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def seen_by(model, x):
    """Visual tokens of pictures for two texts with three marks each."""
    return model.see(x).unflatten(0, (2, 3))


MODES = pytest.mark.parametrize("attend", ["last", "all"])

# ------------------------------------------------------------------------------- what is it made of


@MODES
def test_with_gates_at_zero_it_is_the_lm_bit_for_bit(attend):
    for every in 1, 2:
        model = new_model(attend, every, start=0.)
        for autocast in False, True:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                media = model.look(seen_by(model, pictures()))
                plain = gpt.GPT(V, CONTEXT, C, DEPTH, 2)
                plain.load_state_dict(model.lm.state_dict())
                alone = plain.eval()(TEXT)
                assert torch.equal(model(TEXT, media), alone) and torch.equal(model(TEXT), alone)
        model.looks[1].attn_gate.data += .1
        assert not torch.equal(model(TEXT, model.look(seen_by(model, pictures()))), plain(TEXT))


@MODES
def test_before_the_first_picture_nothing_is_seen(attend):
    model, found = new_model(attend), []
    for layer in model.looks:
        layer.attn.register_forward_hook(lambda module, inputs, output: found.append(output))
    logits = [model(TEXT, model.look(seen_by(model, pictures(seed=seed)))) for seed in (1, 2)]
    for row, marks in enumerate(MARKS):
        assert torch.equal(logits[0][row, :marks[0]], logits[1][row, :marks[0]])
        assert (logits[0][row, marks[0]:] - logits[1][row, marks[0]:]).abs().amax(1).min() > 1e-4
        for output in found:
            assert not output[row, :marks[0]].any() and output[row, marks[0]:].abs().amax(1).min() > 0
    blind = model(torch.full((1, 5), 7), model.look(torch.zeros(1, 1, 5, 12)))
    assert blind.isfinite().all()                                             # a text without any mark


@MODES
@pytest.mark.parametrize("j", [0, 1, 2])
def test_picture_j_reaches_what_comes_after_it(attend, j):
    """All later tokens through the text; directly, in one gated layer, those up to the next mark alone."""
    model, x = new_model(attend), pictures()
    other = x.clone()
    other[j], other[3 + j] = pictures(2, seed=5)
    a, b = (model.look(seen_by(model, p)) for p in (x, other))
    moved = (model(TEXT, a) - model(TEXT, b)).abs().amax(2)
    h, time = torch.randn(2, TEXT.shape[1], C), (TEXT == IMAGE).cumsum(1)
    direct = []
    for media in a, b:
        pairs, seen = flamingo.reach(media, time, attend)
        direct.append(model.looks[0](h, *pairs[0], seen))
    direct = (direct[0] - direct[1]).abs().amax(2)
    for row, marks in enumerate(MARKS):
        end = marks[j + 1] if attend == "last" and j < 2 else TEXT.shape[1]
        assert not moved[row, :marks[j]].any() and moved[row, marks[j]:].min() > 1e-5
        assert not direct[row, :marks[j]].any() and not direct[row, end:].any()
        assert direct[row, marks[j]:end].min() > 1e-4


@MODES
def test_cross_attention_equals_a_loop_in_float64(attend):
    model = new_model(attend).double()
    layer, B, T = model.looks[1], *TEXT.shape
    latents, h = torch.randn(B, 3, 4, 12).double(), torch.randn(B, T, C).double()
    k, v = layer.attn.keys(latents.flatten(1, 2))
    media = [tuple(x.unflatten(2, (3, 4)) for x in (k, v))]
    pairs, seen = flamingo.reach(media, (TEXT == IMAGE).cumsum(1), attend)
    y = layer(h, *pairs[0], seen)
    D, W = C // 2, layer.attn
    for b in range(B):
        last = 0
        for t in range(T):
            last += TEXT[b, t].item() == IMAGE
            source = latents[b, max(0, last - 1):last] if attend == "last" else latents[b, :last]
            out = torch.zeros(C).double()
            query = W.q.weight @ layer.norm(h[b, t])
            for head in range(2):
                own = slice(head * D, head * D + D)
                rows = [W.kv.weight @ row for row in source.flatten(0, 1)]
                keys, values = ([row[at:at + C][own] for row in rows] for at in (0, C))
                if rows:
                    scores = torch.stack([query[own] @ key / math.sqrt(D) for key in keys])
                    shares = scores.exp() / scores.exp().sum()
                    out[own] = sum(share * value for share, value in zip(shares, values))
            x = h[b, t] + math.tanh(layer.attn_gate) * (W.proj.weight @ out)
            hidden = (layer.mlp.fc1.weight @ layer.mlp.norm(x)).clamp(min=0) ** 2
            x = x + math.tanh(layer.mlp_gate) * (layer.mlp.fc2.weight @ hidden)
            torch.testing.assert_close(y[b, t], x, rtol=1e-10, atol=1e-10)


def test_resampler_equals_torchs_attention_and_knows_no_order():
    torch.manual_seed(0)
    model, visual = flamingo.Resampler(12, 2, 3, 5).double(), torch.randn(2, 9, 12).double()
    x = model.latents.expand(2, -1, -1)
    for i in range(2):
        query = model.norm_latents[i](x)
        keys = torch.cat([model.norm_visual[i](visual), query], 1)               # the latents, too
        W = model.attn[i]
        y, _ = F.multi_head_attention_forward(
            query.transpose(0, 1), keys.transpose(0, 1), keys.transpose(0, 1), 12, 3, None, None, None, None, False, 0.,
            W.proj.weight, None, use_separate_proj_weight=True, q_proj_weight=W.q.weight, k_proj_weight=W.kv.weight[:12],
            v_proj_weight=W.kv.weight[12:])
        x = x + y.transpose(0, 1)
        mlp = model.mlp[i]
        x = x + F.linear(F.relu(F.linear(mlp.norm(x), mlp.fc1.weight)) ** 2, mlp.fc2.weight)
    out = model(visual)
    assert out.shape == (2, 5, 12)
    torch.testing.assert_close(out, model.norm(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(visual[:, torch.randperm(9)]), out, rtol=1e-10, atol=1e-10)
    assert (model(visual[:, :8]) - out).abs().max() > 1e-3


def test_the_eye_is_looked_through_in_patches_and_places():
    model, x = new_model(), pictures(1)
    a = model.see(x)
    assert a.shape == (1, 5, 12) and not a.requires_grad
    patches = flamingo.patchify(x, 4)
    torch.testing.assert_close(a, model.eye(patches), rtol=0, atol=0)
    latents = model.resampler(model.eye(patches.flip(1)))                      # the eye tells places, so the order of
    assert (latents - model.resampler(a)).abs().max() > 1e-3                   # patches matters to it


def test_every_nth_block_gets_a_look():
    for every, n in (1, 3), (2, 2), (3, 1):
        model = new_model(every=every)
        assert len(model.looks) == n
        order = []
        for i, layer in enumerate(model.looks):
            layer.register_forward_hook(lambda *_, i=i: order.append(f"look {i}"))
        for i, block in enumerate(model.lm.blocks):
            block.register_forward_hook(lambda *_, i=i: order.append(f"block {i}"))
        model(TEXT, model.look(seen_by(model, pictures())))
        due = []
        for i in range(DEPTH):
            due += [f"look {i // every}"] * (i % every == 0) + [f"block {i}"]
        assert order == due                                                    # before the block, not behind it


# --------------------------------------------------------------------------------------- the memory


@MODES
@pytest.mark.parametrize("cuts", [[1] * 16, [5, 1, 1, 9], [16], [3, 1, 12], [2, 14]])
def test_cached_equals_uncached(attend, cuts):
    model = new_model(attend)
    media = model.look(seen_by(model, pictures()))
    whole, memory = model(TEXT, media), model.memory(2)
    parts = [model(part, media, memory) for part in TEXT.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    assert memory.marks.flatten().tolist() == [3, 3]


@MODES
def test_sampling_with_and_without_the_memory_is_the_same(attend):
    model = new_model(attend)
    media = model.look(seen_by(model, pictures()))
    prompts = [TEXT[0, :9].tolist(), TEXT[1, :5].tolist()]
    for temperature in 0., 1.:
        a, b = (flamingo.sample(model, prompts, media, 12, END, temperature, 3, cached) for cached in (True, False))
        assert [row.tolist() for row in a] == [row.tolist() for row in b] and max(map(len, a)) > 3
    alone = flamingo.sample(model, prompts[1:], [tuple(x[1:] for x in pair) for pair in media], 12, END)[0]
    together = flamingo.sample(model, prompts, media, 12, END)[1]
    assert together.tolist() == alone.tolist()
    text = prompts[1].copy()
    for _ in range(12):                                                        # by hand
        token = model(torch.tensor([text]), [tuple(x[1:] for x in pair) for pair in media])[0, -1].argmax().item()
        if token == END:
            break
        text.append(token)
    assert together.tolist() == text[5:]
    assert END not in together


def test_pictures_are_looked_at_once_while_a_text_is_written():
    model, count = new_model(), []
    media = model.look(seen_by(model, pictures()))
    for module in (model.eye, model.resampler, *(layer.attn.kv for layer in model.looks)):
        module.register_forward_hook(lambda *_: count.append(1))
    flamingo.sample(model, [TEXT[0, :9].tolist(), TEXT[1, :9].tolist()], media, 5, END)
    assert not count


def test_what_sample_refuses():
    model = new_model()
    media = model.look(seen_by(model, pictures()))
    with pytest.raises(ValueError, match="4 <image> marks, and there are 3 pictures"):
        flamingo.sample(model, [[0, 1, 1, 1, 1], [0]], media, 5, END)
    with pytest.raises(ValueError, match="25 tokens are more than the context of 24"):
        flamingo.sample(model, [[0] * 26, [0] * 25], media, 5, END)
    assert len(flamingo.sample(model, [[0, 1] + [5] * 20], [tuple(x[:1] for x in pair) for pair in media], 9, 99)[0]) == 2


# -------------------------------------------------------------------------------------- the training


def steps(model, n=3, **how):
    args = common.Args(steps=n, batch=2, lr=1e-2, device="cpu", dtype="float32", warmup=0., **how)
    loop, visual = common.Run(args, model, part="a trial"), seen_by(model, pictures())
    for _ in loop:
        masked, target = flamingo.mask(loop.batch(TEXT), IMAGE)
        loop.update(flamingo.distance(model(masked, model.look(visual)), target))
    return loop


def test_what_is_frozen_stays_and_costs_nothing():
    model = new_model(start=0.)
    before = copy.deepcopy(model.state_dict())
    loop = steps(model)
    held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        frozen = name.startswith(("lm.", "eye."))
        assert torch.equal(p, before[name]) == frozen, name
        assert p.requires_grad != frozen and (id(p) in held) != frozen and (p in loop.optimizer.state) != frozen
        assert not frozen or p.grad is None
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items() if k.startswith(("lm.", "eye.")))
    model.train()
    assert not model.lm.training and not model.eye.training and model.resampler.training


def test_at_the_start_the_gates_alone_have_a_gradient():
    model, visual = new_model(start=0.), None
    visual = seen_by(model, pictures())
    flamingo.distance(model(TEXT, model.look(visual)), TEXT).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert bool(p.grad.any()) == name.endswith("gate"), name           # tanh(0) = 0 times the rest


def test_no_gate_and_an_unfrozen_lm():
    model = new_model(start=math.inf)
    assert all(layer.attn_gate.tanh() == 1 and not layer.attn_gate.requires_grad for layer in model.looks)
    twin = new_model(start=20.)                                                # tanh(20) is 1, too, to rounding
    media = model.look(seen_by(model, pictures()))
    torch.testing.assert_close(model(TEXT, media), twin(TEXT, twin.look(seen_by(twin, pictures()))))
    model = new_model()
    model.lm.requires_grad_(True)
    before = copy.deepcopy(model.lm.state_dict())
    steps(model)
    assert all(not torch.equal(p, before[name]) for name, p in model.lm.named_parameters())


def test_without_a_resampler_all_visual_tokens_are_seen():
    model = new_model(latents=0)
    visual = seen_by(model, pictures())
    k, v = model.look(visual)[0]
    assert k.shape == v.shape == (2, 2, 3, 5, 8)
    direct = model.looks[0].attn.kv(model.resampler(visual))                   # (2, 3, 5, 2 C)
    torch.testing.assert_close(k[1, 1, 2], direct[1, 2, :, 8:16])


def test_mask_and_distance():
    x = torch.tensor([[0, 1, 5, 6, 0, 1, 7, 0, -100, -100]])
    masked, target = flamingo.mask(x, IMAGE)
    assert masked.tolist() == [[0, 1, 5, 6, 0, 1, 7, 0, 0]]
    assert target.tolist() == [[-100, 5, 6, 0, -100, 7, 0, -100, -100]]        # never a mark, nothing behind the end
    logits = torch.randn(1, 9, V)
    owed = [(t, y) for t, y in enumerate(target[0].tolist()) if y >= 0]
    by_hand = sum(-logits[0, t].log_softmax(0)[y] for t, y in owed) / len(owed)
    torch.testing.assert_close(flamingo.distance(logits, target), by_hand)


def test_contrast_equals_a_loop():
    torch.manual_seed(0)
    a, b, scale = torch.randn(5, 7).double(), torch.randn(5, 7).double(), 3.
    similar = [[scale * F.cosine_similarity(x, y, dim=0).item() for y in b] for x in a]
    loss = 0.
    for i in range(5):
        loss -= math.log(math.exp(similar[i][i]) / sum(math.exp(s) for s in similar[i])) / 10
        loss -= math.log(math.exp(similar[i][i]) / sum(math.exp(row[i]) for row in similar)) / 10
    assert flamingo.contrast(a, b, scale).item() == pytest.approx(loss, rel=1e-5)
    assert flamingo.contrast(torch.ones(5, 7), b, scale).item() == pytest.approx(
        math.log(5) / 2 + sum(-F.log_softmax(scale * F.normalize(b, dim=1) @ torch.full((7, 1), 7 ** -.5).double(), 0)) .item() / 10, rel=1e-5)
