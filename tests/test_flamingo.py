"""flamingo.py against loops in float64, its language model alone, and what must not reach what."""
import copy
import json
import math
import random
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command, refused, run
from torch import nn

import common
import flamingo
import gpt

SMALL = ("--every 1 --lm-steps 3 --lm-batch 4 --dim 16 --heads 2 --depth 2 --eye-steps 3 --eye-batch 4 --eye-dim 8 --eye-heads 2 "
         "--eye-depth 1 --steps 3 --batch 4 --images 500 --tests 12 --latents 2 --dtype float32 --device cpu").split()
SHORT = flamingo.Tokens().short
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
                media = model.media(seen_by(model, pictures()))
                plain = gpt.GPT(V, CONTEXT, C, DEPTH, 2)
                plain.load_state_dict(model.lm.state_dict())
                alone = plain.eval()(TEXT)
                assert torch.equal(model(TEXT, media), alone) and torch.equal(model(TEXT), alone)
        model.gated[1].attn_gate.data += .1
        assert not torch.equal(model(TEXT, model.media(seen_by(model, pictures()))), plain(TEXT))


@MODES
def test_before_the_first_picture_nothing_is_seen(attend):
    model, found = new_model(attend), []
    for layer in model.gated:
        layer.attn.register_forward_hook(lambda module, inputs, output: found.append(output))
    logits = [model(TEXT, model.media(seen_by(model, pictures(seed=seed)))) for seed in (1, 2)]
    for row, marks in enumerate(MARKS):
        assert torch.equal(logits[0][row, :marks[0]], logits[1][row, :marks[0]])
        assert (logits[0][row, marks[0]:] - logits[1][row, marks[0]:]).abs().amax(1).min() > 1e-4
        for output in found:
            assert not output[row, :marks[0]].any() and output[row, marks[0]:].abs().amax(1).min() > 0
    blind = model(torch.full((1, 5), 7), model.media(torch.zeros(1, 1, 5, 12)))
    assert blind.isfinite().all()                                             # a text without any mark


@MODES
@pytest.mark.parametrize("j", [0, 1, 2])
def test_picture_j_reaches_what_comes_after_it(attend, j):
    """All later tokens through the text; directly, in one gated layer, those up to the next mark alone."""
    model, x = new_model(attend), pictures()
    other = x.clone()
    other[j], other[3 + j] = pictures(2, seed=5)
    a, b = (model.media(seen_by(model, p)) for p in (x, other))
    moved = (model(TEXT, a) - model(TEXT, b)).abs().amax(2)
    h, time = torch.randn(2, TEXT.shape[1], C), (TEXT == IMAGE).cumsum(1)
    direct = []
    for media in a, b:
        pairs, seen = flamingo.reach(media, time, attend)
        direct.append(model.gated[0](h, *pairs[0], seen))
    direct = (direct[0] - direct[1]).abs().amax(2)
    for row, marks in enumerate(MARKS):
        end = marks[j + 1] if attend == "last" and j < 2 else TEXT.shape[1]
        assert not moved[row, :marks[j]].any() and moved[row, marks[j]:].min() > 1e-5
        assert not direct[row, :marks[j]].any() and not direct[row, end:].any()
        assert direct[row, marks[j]:end].min() > 1e-4


def test_a_single_token_sees_what_it_sees_among_others():
    """Before the first mark nothing, then its last picture, of its own text; behind a mark too many, nothing."""
    model = new_model("last")
    layer, latents, h = model.gated[1], torch.randn(3, 2, 4, 12), torch.randn(3, 5, C)
    k, v = layer.attn.keys(latents.flatten(1, 2))
    media = [tuple(x.unflatten(2, (2, 4)) for x in (k, v))]
    count = torch.tensor([[0, 1, 2, 3, 3], [0, 0, 1, 2, 3], [1, 1, 2, 2, 2]])
    pairs, seen = flamingo.reach(media, count)
    whole = layer.attn(h, *pairs[0], seen)
    for t in range(5):
        pairs, seen = flamingo.reach(media, count[:, t:t + 1])
        torch.testing.assert_close(layer.attn(h[:, t:t + 1], *pairs[0], seen), whole[:, t:t + 1], rtol=1e-4, atol=1e-6)
    blind = (count < 1) | (count > 2)
    assert not whole[blind].any() and whole[~blind].abs().amax(1).min() > 0


@MODES
def test_cross_attention_equals_a_loop_in_float64(attend):
    model = new_model(attend).double()
    layer, B, T = model.gated[1], *TEXT.shape
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
            x = h[b, t] + layer.attn_gate.tanh() * (W.proj.weight @ out)
            hidden = (layer.mlp.fc1.weight @ layer.mlp.norm(x)).clamp(min=0) ** 2
            x = x + layer.mlp_gate.tanh() * (layer.mlp.fc2.weight @ hidden)
            torch.testing.assert_close(y[b, t], x, rtol=1e-10, atol=1e-10)


def test_resampler_equals_torchs_attention_and_knows_no_order():
    torch.manual_seed(0)
    model, visual = flamingo.Resampler(12, 2, 3, 5).double(), torch.randn(2, 9, 12).double()
    x = model.latents.expand(2, -1, -1)
    for i in range(2):
        layer = model.layers[i]
        query = layer.norm_latents(x)
        keys = torch.cat([layer.norm_visual(visual), query], 1)                  # the latents, too
        W = layer.attn
        y, _ = F.multi_head_attention_forward(
            query.transpose(0, 1), keys.transpose(0, 1), keys.transpose(0, 1), 12, 3, None, None, None, None, False, 0.,
            W.proj.weight, None, use_separate_proj_weight=True, q_proj_weight=W.q.weight, k_proj_weight=W.kv.weight[:12],
            v_proj_weight=W.kv.weight[12:])
        x = x + y.transpose(0, 1)
        mlp = layer.mlp
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
    for every, n in (1, 3), (2, 2), (3, 1), (4, 1):
        model = new_model(every=every)
        assert len(model.gated) == n
        order = []
        for i, layer in enumerate(model.gated):
            layer.register_forward_hook(lambda *_, i=i: order.append(f"look {i}"))
        for i, block in enumerate(model.lm.blocks):
            block.register_forward_hook(lambda *_, i=i: order.append(f"block {i}"))
        model(TEXT, model.media(seen_by(model, pictures())))
        due = []
        for i in range(DEPTH):
            due += [f"look {i // every}"] * (i % every == 0) + [f"block {i}"]
        assert order == due                                                    # before the block, not behind it


# --------------------------------------------------------------------------------------- the memory


@MODES
@pytest.mark.parametrize("cuts", [[1] * 16, [5, 1, 1, 9], [16], [3, 1, 12], [2, 14]])
def test_cached_equals_uncached(attend, cuts):
    model = new_model(attend)
    media = model.media(seen_by(model, pictures()))
    whole, memory = model(TEXT, media), model.memory(2)
    parts = [model(part, media, memory) for part in TEXT.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    assert memory.marks.flatten().tolist() == [3, 3]


@MODES
def test_sampling_with_and_without_the_memory_is_the_same(attend):
    model = new_model(attend)
    media = model.media(seen_by(model, pictures()))
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
    media = model.media(seen_by(model, pictures()))
    for module in (model.eye, model.resampler, *(layer.attn.kv for layer in model.gated)):
        module.register_forward_hook(lambda *_: count.append(1))
    flamingo.sample(model, [TEXT[0, :9].tolist(), TEXT[1, :9].tolist()], media, 5, END)
    assert not count


def test_an_end_inside_a_prompt_ends_nothing():
    ended, prompts = 0, [[0, 1, 5], [0, 1, 5, 0, 1, 7, 8, 0, 9]]
    for seed in 15, 21, 22, 38:
        model = new_model(seed=seed)
        with torch.no_grad():
            model.lm.token_embed.weight[END] *= 2                              # likelier than others
        media = model.media(seen_by(model, pictures()))
        together = flamingo.sample(model, prompts, media, 6, END)
        for i, prompt in enumerate(prompts):
            (alone,) = flamingo.sample(model, [prompt], [tuple(x[i:i + 1] for x in pair) for pair in media], 6, END)
            assert together[i].tolist() == alone.tolist()
        ended += len(together[0]) < 5 and len(together[1]) > 0
    assert ended                                                               # one text has ended while the other's prompt went on


def test_it_writes_no_marks():
    model = new_model()
    with torch.no_grad():
        model.lm.token_embed.weight[IMAGE] = 0.
        model.lm.norm.bias += 5 * model.lm.token_embed.weight.sum(0).sign()
        model.lm.token_embed.weight[IMAGE] = model.lm.norm.bias.sign()         # now a mark is likeliest by far
    media = model.media(seen_by(model, pictures()))
    assert model(TEXT, media)[:, -1].argmax(1).tolist() == [IMAGE, IMAGE]
    for temperature in 0., 1., 1e-40:
        rows = flamingo.sample(model, [TEXT[0, :9].tolist(), TEXT[1, :9].tolist()], media, 9, 99, temperature)
        assert all(len(row) == 9 and IMAGE not in row for row in rows)


def test_what_sample_refuses():
    model = new_model()
    media = model.media(seen_by(model, pictures()))
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
        loop.update(flamingo.distance(model(masked, model.media(visual)), target))
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


def test_gates_have_a_rate_of_their_own_and_the_resampler_no_decay():
    model = new_model(start=0.)
    args = flamingo.Args(steps=1, batch=2, lr=1e-3, gate_lr=7., weight_decay=.3, warmup=0., device="cpu", dtype="float32")
    optimizer = flamingo.optimizer(args, model)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            group = of[id(p)]
            assert group.get("times", 1.) == (7. if name.endswith("gate") else 1.), name
            assert group["weight_decay"] == (.3 if name.startswith("gated") and p.ndim > 1 else 0.), name
    loop, visual = common.Run(args, model, optimizer, part="a trial"), seen_by(model, pictures())
    for _ in loop:
        loop.update(flamingo.distance(model(TEXT, model.media(visual)), TEXT))
    assert all(abs(gate.item()) == pytest.approx(7e-3, rel=1e-3) for layer in model.gated for gate in (layer.attn_gate, layer.mlp_gate))


def test_at_the_start_the_gates_alone_have_a_gradient():
    model, visual = new_model(start=0.), None
    visual = seen_by(model, pictures())
    flamingo.distance(model(TEXT, model.media(visual)), TEXT).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert bool(p.grad.any()) == name.endswith("gate"), name           # tanh(0) = 0 times the rest


def test_no_gate_and_an_unfrozen_lm():
    model = new_model(start=math.inf)
    assert all(layer.attn_gate.tanh() == 1 and not layer.attn_gate.requires_grad for layer in model.gated)
    twin = new_model(start=20.)                                                # tanh(20) is 1, too, to rounding
    media = model.media(seen_by(model, pictures()))
    torch.testing.assert_close(model(TEXT, media), twin(TEXT, twin.media(seen_by(twin, pictures()))))
    model = new_model()
    model.lm.requires_grad_(True)
    before = copy.deepcopy(model.lm.state_dict())
    steps(model)
    assert all(not torch.equal(p, before[name]) for name, p in model.lm.named_parameters())


def test_without_a_resampler_all_visual_tokens_are_seen():
    model = new_model(latents=0)
    visual = seen_by(model, pictures())
    k, v = model.media(visual)[0]
    assert k.shape == v.shape == (2, 2, 3, 5, 8)
    direct = model.gated[0].attn.kv(model.resampler(visual))                   # (2, 3, 5, 2 C)
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


# ----------------------------------------------------------------------------------------- the world


def test_pictures_show_what_is_said():
    """Count, colour, side and size of the figures, read from the pixels without any network."""
    rng = random.Random(0)
    scenes = [common.scene(rng) for _ in range(300)]
    x = common.paint(scenes, 3).float() / 255
    assert torch.equal((x * 255).round().byte(), common.paint(scenes, 3)) and not torch.equal(x[:, 0], common.paint(scenes, 4)[:, 0] / 255)
    hues = torch.tensor(list(common.COLOURS.values()))
    areas = {0: [], 1: []}
    for picture, figures in zip(x, scenes):
        words = common.caption(figures)
        assert words.count("a ") == len(figures) == len({f.shape for f in figures}) == len({f.colour for f in figures})
        quarters = [(f.row, f.column) for f in figures]
        assert quarters == sorted(quarters)                                    # as one reads
        for f in figures:
            r, c = 16 * f.row, 16 * f.column
            part = picture[:, r:r + 16, c:c + 16]
            bright = part.amax(0) > .4                                         # figures are, the ground is not
            areas[f.size].append(bright.sum().item())
            hue = part[:, bright].median(1).values
            assert F.cosine_similarity(hue, hues, dim=1).argmax() == f.colour
            assert f"{('small', 'large')[f.size]} {list(common.COLOURS)[f.colour]} {common.FIGURES[f.shape]}" in words
        for r in (0, 1):
            for c in (0, 1):
                if (r, c) not in quarters:
                    assert picture[:, 16 * r + 4:16 * r + 12, 16 * c + 4:16 * c + 12].amax() < .4
    assert np.median(areas[1]) > 1.5 * np.median(areas[0])


def test_captions_and_questions():
    F_ = common.Figure
    one, two = [F_(0, 0, 0, 1, 0)], [F_(0, 0, 0, 0, 1), F_(6, 5, 1, 1, 1)]
    assert common.caption(one) == "a small red circle on the right"
    assert common.caption(two) == "a small red circle left of a large blue heart"
    column = [F_(0, 0, 0, 0, 0), F_(6, 5, 1, 0, 1)]
    assert common.caption(column) == "a small red circle above a large blue heart"
    three = [*two[:1], F_(4, 7, 1, 1, 0), F_(7, 2, 0, 1, 1)]
    assert common.caption(three) == "a small red circle , a large pink star and a small yellow moon"
    ask = lambda figures, about: common.question(random.Random(1), figures, about)
    assert ask(one, "colour") == ("colour", "what colour is it ?", "red")
    assert ask(one, "side") == ("side", "which side is it on ?", "right")
    assert ask(three, "number") == ("number", "how many figures are there ?", "three")
    assert ask(three, "side") == ask(column, "side") == (None, None, None)       # the caption does not tell
    assert {ask(two, "shape")[1:], common.question(random.Random(4), two, "shape")[1:]} <= {
        ("what shape is the red one ?", "circle"), ("what shape is the blue one ?", "heart")}
    tokens = flamingo.Tokens()
    rng = random.Random(0)
    for _ in range(300):
        figures = common.scene(rng)
        about, question, answer = common.question(rng, figures)
        assert about in common.ABOUT and len(tokens.encode(common.caption(figures))) <= 16
        for text in common.caption(figures), question, answer:
            assert tokens.decode(tokens.encode(text)) == text
    assert all(len({kind[i] for kind in common.UNSEEN}) == 8 for i in (0, 1))    # each shape, each colour once


def documents(n=60, **changes):
    args = flamingo.Args(device="cpu", context=64, **changes)
    tokens, scenes = flamingo.Tokens(), flamingo.Scenes(0, 1000, common.SEEN)
    x, at = flamingo.interleaved(args, tokens, scenes, n, 64, .5)
    return tokens, scenes, x, at


def test_what_pictures_come_with():
    """Marks and pictures fit each other, kinds and words that are kept back do not occur, a new word is never told by
    anything but its own episode."""
    tokens, scenes, x, at = documents(400)
    sorts = {"new": 0, "colour": 0, "shape": 0, "kind": 0, "caption": 0}
    for row, places in zip(x, at):
        said = row[row >= 0].tolist()
        assert said[0] == tokens.end and said[-1] == tokens.end and (row >= 0).long().diff().max() <= 0
        chunks = tokens.decode(said).split("<end>")[1:-1]
        meant, by = {}, set()
        for chunk, place in zip(chunks, places.tolist()):
            assert chunk.strip().startswith("<image>") and chunk.count("<image>") == 1
            figures, words = scenes.all[place], chunk.split()[1:]
            assert not any((f.shape, f.colour) in common.UNSEEN for f in figures)
            if words[-1] in common.NEW_WORDS:
                shape, colour = common.FIGURES[figures[0].shape], list(common.COLOURS)[figures[0].colour]
                sort = {(): "new", (colour,): "colour", (shape,): "shape", (colour, shape): "kind"}[tuple(words[:-1])]
                sorts[sort] += 1
                by |= {sort}
                assert len(figures) == 1 and words[-1] in common.NEW_WORDS[flamingo.KEPT:]
                assert meant.setdefault((colour, shape), words[-1]) == words[-1]
            elif words[0] == "there":
                sorts["caption"] += 1
                assert " ".join(words[2:]) == common.caption(figures)
            elif "?" in words:
                about = {"colour": "colour", "shape": "shape", "many": "number", "side": "side"}[words[1]]
                assert any(common.question(random.Random(s), figures, about)[1:] == (" ".join(words[:-1]), words[-1]) for s in range(20))
        assert len(set(meant.values())) == len(meant)
        assert len(by - {"new"}) <= 1                                          # told in one way, or not at all
    told = sum(sorts[by] for by in ("colour", "shape", "kind"))
    assert min(sorts.values()) > 30 and .3 < told / (told + sorts["new"]) < .5
    words = {word for row in x for word in tokens.decode(row[row >= 0]).split()}
    assert not words & set(common.NEW_WORDS[:flamingo.KEPT]) and set(common.NEW_WORDS[flamingo.KEPT:]) <= words
    again = documents(400)
    assert torch.equal(again[2], x) and torch.equal(again[3], at)
    sizes = set()
    for seed in range(8):                                                      # no more places than pictures
        args = flamingo.Args(device="cpu", context=64, seed=seed)
        short, places = flamingo.interleaved(args, tokens, scenes, 1, SHORT, .3)
        assert short.shape == (1, SHORT + 1) and places.shape[1] == (short == tokens.image).sum()
        sizes.add(places.shape[1])
    assert len(sizes) > 1


def read(tokens, row):
    """The chunks of a document as (mark, words); not the first end, and not the last, cut chunk."""
    chunks = [chunk.split() for chunk in tokens.decode(row).split("<end>")[1:-1]]
    return [("<image>" in chunk, [word for word in chunk if word != "<image>"]) for chunk in chunks]


def test_what_the_lm_reads_has_no_picture():
    """The first documents have no marks either, and a new word stands behind the words for its kind: always those."""
    args, tokens = flamingo.Args(device="cpu", context=64), flamingo.Tokens()
    x = flamingo.texts(args, tokens, 200, SHORT, marks=False)
    assert x.shape == (200, SHORT + 1) and (x[:, 0] == tokens.end).all() and not (x == tokens.image).any()
    text = " ".join(tokens.decode(row) for row in x)
    assert ". what colour is" in text and "there is a small" in text
    episodes = 0
    for row in x:
        meant = {}
        chunks = [words for _, words in read(tokens, row)]
        if len(chunks) > 3 and all(len(words) == 3 and words[-1] in common.NEW_WORDS for words in chunks):
            episodes += 1
            for colour, shape, name in chunks[:9]:
                assert colour in common.COLOURS and shape in common.FIGURES
                assert meant.setdefault((colour, shape), name) == name
    assert 90 < episodes < 150


def test_what_the_lm_reads_before_the_join():
    """Marks before all, half or none of the chunks; behind some of them the words for the picture are lost. New words
    are told by colour, shape, or both, in a document in one way."""
    args, tokens = flamingo.Args(device="cpu", context=64), flamingo.Tokens()
    x = flamingo.texts(args, tokens, 400, 64, marks=True)
    assert x.shape == (400, 65) and set(tokens.words) <= {w for row in x for w in tokens.decode(row).split()}
    ways, marked, lost = {}, {}, {}
    for row in x:
        chunks = [(mark, words) for mark, words in read(tokens, row)[:9] if words[-1:] and words[-1] in common.NEW_WORDS]
        if len(chunks) < 9:                                                    # one episode of new words
            continue
        told = [words for _, words in chunks if len(words) > 1]
        for words in told:
            assert all(w in common.COLOURS or w in common.FIGURES for w in words[:-1]) and len(words) < 4
        way = {tuple("colour" if w in common.COLOURS else "shape" for w in words[:-1]) for words in told}
        assert len(way) <= 1
        ways[str(way)] = ways.get(str(way), 0) + 1
        meant = {}
        for *kind, name in told:
            assert meant.setdefault(tuple(kind), name) == name
        assert all(mark for mark, words in chunks if len(words) == 1)          # none is lost without a mark
        share = sum(mark for mark, _ in chunks) / len(chunks)
        sort = share if share in (0, 1) else .5
        marked[sort] = marked.get(sort, 0) + 1
        lost[len(told) < len(chunks)] = lost.get(len(told) < len(chunks), 0) + 1
    n = sum(marked.values())
    assert n > 60 and .35 < marked[1] / n < .65 and min(marked[0], marked[.5]) > .1 * n and .15 < lost[True] / n < .6
    assert min(ways.get(str({way}), 0) for way in (("colour",), ("shape",), ("colour", "shape"))) > .08 * n


def test_naming_by_what_tells_kinds_apart():
    """A colour is not said of two kinds of one colour with different names."""
    scenes, found = flamingo.Scenes(0, 1000, common.SEEN), set()
    for seed in range(200):
        for how in "colour", "shape", "kind":
            episode = flamingo.naming(random.Random(seed), scenes, common.NEW_WORDS, 8, 3, how)
            kinds = {scenes.all[i][0][:2] for i, _, _ in episode}
            ((by,),) = [{h for _, h, _ in episode}]
            values = {kind[how == "colour"] for kind in kinds} if how != "kind" else kinds
            assert by == (how if len(values) == 3 else "kind") and len(kinds) == len({t for _, _, t in episode}) == 3
            found.add((how, by))
    assert len(found) == 5
    figures = scenes.all[scenes.single[0]]
    colour, shape = list(common.COLOURS)[figures[0].colour], common.FIGURES[figures[0].shape]
    said = [flamingo.described(figures, how, "dax") for how in ("colour", "shape", "kind", "caption")]
    assert said == [f"{colour} dax", f"{shape} dax", f"{colour} {shape} dax", f"{common.caption(figures)} . dax"]


def test_tokens_of_bytes():
    tokens = flamingo.Tokens(bytes=True)
    said = tokens.encode("<end> <image> dax <end> <image> a red one")
    assert said == [256, 0, *b"dax", 256, 0, *b"a red one"] and (tokens.image, tokens.end, tokens.vocab) == (0, 256, 257)
    assert tokens.encode("<image> dax <end>") == [0, *b"dax", 256]
    assert tokens.decode(b"a red one") == "a red one"
    with pytest.raises(common.UserError, match="knows no word 'sphere'"):
        flamingo.Tokens().encode("a red sphere")
    assert flamingo.Tokens().encode("<image>what colour is it?") == flamingo.Tokens().encode("<image> what colour is it ?")


def test_ask_mixes_no_queries():
    """Queries of different lengths and numbers of pictures in a batch are answered as each alone; blind and told, the
    LM's answers do not depend on pictures."""
    args, tokens = flamingo.Args(device="cpu", dtype="float32"), flamingo.Tokens()
    torch.manual_seed(0)
    lm, eye = flamingo.GPT(tokens.vocab, 64, 16, 2, 2), flamingo.ViT(4, 192, 8, 1, 2)
    for p in lm.parameters():
        nn.init.normal_(p, std=.3)
    model = flamingo.Flamingo(lm, eye, 8, tokens.image, start=1.).eval()
    scenes = [common.scene(random.Random(i)) for i in range(4)]
    visual = flamingo.views(args, model, common.paint(scenes))
    asked = [flamingo.Query("", "<image> what colour is it ?", [2], "red", "a red star . what colour is it ?"),
             flamingo.Query("", "<image> dax <end> <image>", [0, 3], "dax", "red star dax <end> red star"),
             flamingo.Query("", "<image> a", [1], "small red star on the left", "")]
    together = flamingo.ask(args, model, tokens, asked, visual)
    n = 1 + max(len(q.answer.split()) for q in asked)
    for q, said in zip(asked, together):
        (alone,) = flamingo.sample(model, [tokens.encode(f"<end> {q.prompt}")], model.media(visual[q.at][None].float()), n, tokens.end)
        assert said == tokens.decode(alone)
    for how, prompts in ("blind", [q.prompt.replace("<image>", "") for q in asked]), ("told", [q.told for q in asked]):
        for said, prompt in zip(flamingo.ask(args, model, tokens, asked, visual, how), prompts):
            (alone,) = flamingo.sample(model, [tokens.encode(f"<end> {prompt}")], None, n, tokens.end)
            assert said == tokens.decode(alone)


def test_two_thirds_of_what_is_said_are_captions():
    """They alone tell the size; and what is said of a scene is so."""
    rng, scenes = random.Random(0), flamingo.Scenes(0, 600, common.SEEN)
    said = flamingo.talk(rng, scenes, 4000)
    captions = [(i, text) for i, how, text in said if how == "caption"]
    assert .62 < len(captions) / 4000 < .68
    assert all(text == f"there is {common.caption(scenes.all[i])}" for i, text in captions)
    asked = [(i, text) for i, how, text in said if how == "question"]
    assert len(asked) == 4000 - len(captions) and not any(word in text for _, text in asked for word in ("small", "large"))
    abouts = [sum(f"what {about}" in text for _, text in asked) for about in ("colour", "shape")]
    assert min(abouts) > 300


def test_exact_answers_are_counted(monkeypatch):
    """The figures of the table, from answers that are given by hand."""
    args = flamingo.Args(device="cpu", tests=40, shots=(0, 1, 2))
    tokens = flamingo.Tokens()
    *parts, pictures = flamingo.held_out(args)
    assert len(pictures) == 2080
    asked = flamingo.queries(args, *parts, 64, tokens)
    scenes = [figures for part in parts for figures in part.all]
    for group, prompt, at, answer, told in asked:
        assert prompt.count("<image>") == len(at)
        if group.startswith("caption"):
            assert answer == common.caption(scenes[at[0]]) and prompt == "<image> there is"
            assert told in ("", f"{answer} . there is")
        elif group.startswith(("new", "kept")):
            assert prompt.endswith("<image>") and "<image>" not in told and told.count("<end>") == len(at) - 1
            assert told.endswith(common.kind_name(scenes[at[-1]][0]))
            names = common.NEW_WORDS[:4] if group.startswith("kept") else common.NEW_WORDS[4:]
            assert answer in names
            shown = dict((scenes[i][0][:2], chunk.split()[-1]) for i, chunk in zip(at, prompt.split("<end>")[:-1]))
            assert len(set(at)) == len(at)                                     # the picture asked about was not shown,
            assert len(at) == 1 or shown[scenes[at[-1]][0][:2]] == answer      # its kind was
            assert len(set(shown.values())) == len(shown) == min(2, len(at) - 1)
        elif group.startswith("answers"):
            assert prompt.endswith("<image>") and (told == "" or told.endswith(".") and told.count(" . ") == len(at) - 1)
        else:
            assert prompt == f"<image> {told.split(' . ')[1]}" and answer in [*told.split(), *common.NUMBERS, "right"]
        if "unseen" in group:
            assert scenes[at[0]][0][:2] in common.UNSEEN and 40 <= at[0] < 80
    monkeypatch.setattr(flamingo, "ask", lambda a, m, t, asked, v, how="pictures": [
        q[3] if how == "pictures" and i % 2 or how == "told" else "no" for i, q in enumerate(asked)])
    found = flamingo.evaluate(args, None, tokens, asked, None)
    for group, right in found.items():
        own = [i for i, q in enumerate(asked) if q[0] == group or group == "caption, all" and q[0] in (
            "caption, 1 figure", "caption, 2 figures", "caption, 3 figures")]
        assert right["flamingo"] == pytest.approx(100 * sum(i % 2 for i in own) / len(own)) and right["lm"] == 0
        assert right.get("told", 100) == 100
        answers = [asked[i][3] for i in own]
        assert right["majority"] == pytest.approx(100 * max(answers.count(a) for a in answers) / len(own))
    assert {"caption, 1 figure", "caption, 3 figures", "colour, unseen kind", "side, 2 or 3 figures", "new words, 0",
            "kept words, 2", "answers, 2"} <= set(found)


# ---------------------------------------------------------------------------------------- the script


def result(out):
    return json.loads((out / "result.json").read_text())["figures"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of seconds, and what it printed."""
    out = tmp_path_factory.mktemp("flamingo")
    process = run(*SMALL, "--prompt", "<image> what colour is it ?", "--out", out, script="flamingo.py")
    assert process.returncode == 0, process.stderr
    return out, process.stdout


def test_how_the_language_and_the_eye_are_learned(tmp_path, monkeypatch):
    """The LM reads short documents first and starts from weights for its width; of three batches of the eye two hold
    single figures of one colour."""
    seen = []
    monkeypatch.setattr(common, "script", lambda: "flamingo.py")
    args = common.cli(flamingo.Args, [*SMALL, "--lm-steps", "4", "--eye-steps", "6", "--lm-short", ".5", "--lm-lr", "0", "--out", str(tmp_path)])
    monkeypatch.setattr(flamingo, "mask", lambda x, image: seen.append(x.shape[1]) or (x[:, :-1], x[:, 1:]))
    flamingo.learn_language(args, flamingo.Tokens())
    assert seen == [SHORT + 1] * 2 + [args.context + 1] * 2
    weights = torch.load(tmp_path / "lm/checkpoint.pt", weights_only=True)["model"]
    assert weights["blocks.0.attn.qkv.weight"].std().item() == pytest.approx(.02 * math.sqrt(768 / 16), rel=.1)
    tokens, scenes, captions = flamingo.Tokens(), flamingo.Scenes(0, 500, common.SEEN), []
    forward = flamingo.Captioned.forward
    monkeypatch.setattr(flamingo.Captioned, "forward", lambda self, x, y: captions.append(y) or forward(self, x, y))
    flamingo.learn_to_see(args, tokens, scenes, common.paint(scenes.all))
    colours = [{word for row in batch for word in tokens.decode(row).split() if word in common.COLOURS} for batch in captions]
    assert [len(names) == 1 for names in colours] == [False, True, True] * 2 and len(set.union(*colours[1:3])) == 2


def test_short_documents_come_first(tmp_path, monkeypatch):
    """In the join, too; and the batches hold only as many pictures as their documents show."""
    seen, media = [], flamingo.Flamingo.media
    monkeypatch.setattr(common, "script", lambda: "flamingo.py")
    monkeypatch.setattr(flamingo, "mask", lambda x, image, mask=flamingo.mask: seen.append(x) or mask(x, image))
    monkeypatch.setattr(flamingo.Flamingo, "media", lambda self, visual: seen.append(visual.shape[:2]) or media(self, visual))
    flags = [*SMALL, "--steps", "5", "--short", ".4", "--context", "64", "--out", str(tmp_path)]
    common.start(flamingo.main, flamingo.Args, flags)
    x, shown = seen[3:13:2], seen[4:13:2]                                      # after three steps of the LM
    assert [len(row) for row, *_ in x] == [SHORT + 1] * 2 + [65] * 3
    assert all(shape[0] == 4 and shape[1] >= (rows == 1).sum(1).max() for rows, shape in zip(x, shown))
    names = [sum(flamingo.Tokens.WORDS[t - 2] in common.NEW_WORDS for row in rows for t in row.tolist() if t > 1) for rows in x]
    assert all(names[:2])


def test_a_mark_by_itself_says_nothing(done):
    """The row of <image> stays 0 while the LM learns, and nothing else does."""
    weights = torch.load(done[0] / "lm/checkpoint.pt", weights_only=True)
    rows = weights["model"]["token_embed.weight"]
    assert not rows[1].any() and rows.any(1).sum() == len(rows) - 1
    start = torch.load(done[0] / "checkpoint.pt", weights_only=True)["model"]["lm.token_embed.weight"]
    assert torch.equal(start, rows)


def test_what_a_run_shows(done):
    out, text = done
    assert all(len(line) <= 80 for line in text.splitlines())
    f = result(out)
    assert f["shots"] == [0, 1, 2, 4, 8] and len(f["gates"]) == 2 and f["trained"] > 0
    for name in "caption, 1 figure", "colour, unseen kind", "new words, 0", "answers, 4":
        assert set(f["right"][name]) | {"told"} == {"flamingo", "lm", "told", "majority"}
    assert (out / "scenes.png").read_bytes()[:4] == b"\x89PNG" and "<image> what colour is it ? -> " in text
    for words in ("First the LM", "Then the eye", "Last, what joins them", "tanh of the gates", "right to the word, %"):
        assert words in text
    assert {p.name for p in out.iterdir()} >= {"lm", "eye", "checkpoint.pt", "log.jsonl", "result.json", "scenes.png"}


def test_stages_are_kept_and_frozen(done):
    """A second run trains neither the LM nor the eye, and in the first neither changed while the join was trained."""
    out, _ = done
    kept = {part: (out / part / "checkpoint.pt").read_bytes() for part in ("lm", "eye")}
    weights = torch.load(out / "checkpoint.pt", weights_only=True)
    for part in "lm", "eye":
        stage = torch.load(out / part / "checkpoint.pt", weights_only=True)["model"]
        own = {k.removeprefix("eye."): v for k, v in stage.items() if part == "lm" or k.startswith("eye.")}
        ours = {k.removeprefix(f"{part}."): v for k, v in weights["model"].items() if k.startswith(f"{part}.")}
        assert set(own) == set(ours) and all(torch.equal(own[k], ours[k]) for k in own)
    trained = sum(len(group["params"]) for group in weights["optimizer"]["param_groups"])
    assert trained == sum(not k.startswith(("lm.", "eye.")) for k in weights["model"])
    again = run(*SMALL, "--steps", 2, "--out", out, script="flamingo.py")
    assert again.returncode == 0 and "First the LM" not in again.stdout and "Then the eye" not in again.stdout
    assert kept == {part: (out / part / "checkpoint.pt").read_bytes() for part in kept}
    twice = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    assert not torch.equal(twice["gated.0.attn.q.weight"], weights["model"]["gated.0.attn.q.weight"])          # 2 steps, not 3
    same = run(*SMALL, "--out", out, script="flamingo.py")
    assert same.returncode == 0
    twice = torch.load(out / "checkpoint.pt", weights_only=True)["model"]      # the same join, whether the stages were there or not
    assert all(torch.equal(twice[k], v) for k, v in weights["model"].items())
    for flags, anew in (["--dim", 18], "lm"), (["--lm-steps", 4], "lm"), (["--lm-share", .5], "lm"), (["--eye-dim", 12], "eye"), (["--images", 502], "eye"), (["--every", 2], ""), (["--gate-lr", 2], ""):
        args = common.cli(flamingo.Args, list(map(str, [*SMALL, "--out", out, *flags])))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "script", lambda: "flamingo.py")
            for name, settings in ("lm", flamingo.LM), ("eye", flamingo.EYE):
                how = flamingo.part(args, name)
                assert common.stage_done(how, settings) == how.resume == (name != anew), flags


def test_resumed_equals_uninterrupted(done, tmp_path):
    stages = ["--lm", done[0] / "lm", "--eye", done[0] / "eye"]
    flags = [*SMALL, *stages, "--steps", 120]
    whole = run(*flags, "--out", tmp_path / "a", script="flamingo.py")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(command(*flags, "--save-every", .1, "--out", tmp_path / "b", script="flamingo.py"),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(3000):
        if (tmp_path / "b/checkpoint.pt").exists() or process.poll() is not None:
            break
        time.sleep(.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert 0 < torch.load(tmp_path / "b/checkpoint.pt", weights_only=True)["step"] < 120
    again = run("--resume", "--out", tmp_path / "b", script="flamingo.py")
    assert again.returncode == 0, again.stderr
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a) and result(tmp_path / "a") == result(tmp_path / "b")
    asked = run("--resume", "--steps", 0, "--prompt", "<image> there is", "--out", tmp_path / "b", script="flamingo.py")
    assert asked.returncode == 0 and "<image> there is ->" in asked.stdout
    assert result(tmp_path / "a")["right"] == result(tmp_path / "b")["right"]


@pytest.mark.parametrize("part, what", [("lm", "the LM"), ("eye", "the eye")])
def test_an_interrupted_stage_goes_on(part, what, tmp_path):
    flags = [*SMALL, f"--{part}-steps", 900, "--save-every", .1, "--out", tmp_path]
    process = subprocess.Popen(command(*flags, script="flamingo.py"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(3000):
        if (tmp_path / part / "checkpoint.pt").exists() or process.poll() is not None:
            break
        time.sleep(.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and f"of {what}: the same command goes on" in error and "Traceback" not in error
    half = torch.load(tmp_path / part / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < half < 900
    again = run(*flags, script="flamingo.py")
    assert again.returncode == 0 and f"Going on from step {half}" in again.stdout, again.stderr


def test_a_gpt_and_a_mae_from_elsewhere(done, tmp_path):
    """An LM of bytes, and an eye with other patches."""
    (tmp_path / "text.txt").write_text("a red circle is a dax. " * 200)
    made = run("--data", tmp_path / "text.txt", *"--dim 16 --heads 2 --depth 2 --batch 4 --context 64 --length 5 --steps 2".split(),
               "--device", "cpu", "--out", tmp_path / "gpt", script="gpt.py")
    assert made.returncode == 0, made.stderr
    made = run(*"--dim 16 --heads 2 --depth 1 --decoder-dim 8 --decoder-heads 2 --decoder-depth 1 --batch 8 --steps 2 --tune linear".split(),
               *"--labels 1 --device cpu".split(), "--out", tmp_path / "mae", script="mae.py")
    assert made.returncode == 0, made.stderr
    process = run(*SMALL, "--lm", tmp_path / "gpt", "--eye", tmp_path / "mae", "--out", tmp_path / "run", script="flamingo.py")
    assert process.returncode == 0 and "First" not in process.stdout and "Then" not in process.stdout, process.stderr
    weights = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["model"]
    assert weights["lm.token_embed.weight"].shape == (257, 16) and weights["eye.patch_embed.weight"].shape == (16, 48)
    gpts = torch.load(tmp_path / "gpt/checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(weights[f"lm.{k}"], v) for k, v in gpts.items())
    right = result(tmp_path / "run")["right"]
    assert "new words, 1" in right and "caption, 3 figures" not in right       # too long, in bytes


def test_own_pictures(done, tmp_path):
    flags = ["--resume", "--steps", 0, "--out", done[0], "--prompt", "<image> a red circle <end> <image> what shape is it ?"]
    x = common.paint([common.scene(random.Random(i), 1) for i in range(3)]).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "own.npz", images=x)
    asked = run(*flags, "--data", tmp_path / "own.npz", script="flamingo.py")
    assert asked.returncode == 0 and "what shape is it ? -> " in asked.stdout, asked.stderr
    np.savez(tmp_path / "large.npz", images=x.repeat(2, 1).repeat(2, 2))
    np.savez(tmp_path / "none.npz", pictures=x)
    np.savez(tmp_path / "one.npz", images=x[:1])
    (tmp_path / "broken.npz").write_bytes(b"no zip")
    for name, words in (("large", ["images is uint8 (3, 64, 64, 3)", "(n, 32, 32, 3) uint8 is due"]), ("none", ["holds pictures; due is images"]),
                        ("broken", ["truncated, or no .npz"]), ("missing", ["there is no file"]),
                        ("one", ["--prompt has 2 <image> marks, and there are 1 pictures"])):
        refused(run(*flags, "--data", tmp_path / f"{name}.npz", script="flamingo.py"), 1, *words, script="flamingo.py")
    before = (done[0] / "checkpoint.pt").read_bytes()
    refused(run(*flags[:5], "--prompt", "", "--data", tmp_path / "own.npz", script="flamingo.py"), 1, "needs a --prompt", script="flamingo.py")
    refused(run(*flags, "--data", "shapes", script="flamingo.py"), 1, "--data takes scenes, or an .npz", script="flamingo.py")
    refused(run(*flags[:5], "--prompt", "<image> a sphere", script="flamingo.py"), 1, "knows no word 'sphere'", script="flamingo.py")
    refused(run(*flags[:5], "--prompt", "a " * 70, script="flamingo.py"), 1, "shorten it", script="flamingo.py")
    assert (done[0] / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("flags, words", [
    (["--every", "0"], ["--every must be 1 or more, not 0"]),
    (["--latents", "0"], ["--latents must be 1 or more", "--no-resample"]),
    (["--patch", "5"], ["--patch 5 does not divide the 32 x 32 pictures"]),
    (["--heads", "3"], ["--dim must be a multiple of --heads 3, not 16"]),
    (["--eye-dim", "6"], ["--eye-dim must be a multiple of --eye-heads 2 and of 4"]),
    (["--context", "20"], ["--context must be 41 or more"]),
    (["--gate-start", "nan"], ["--gate-start must be a number"]),
    (["--shots", "-1"], ["--shots must be 0 or more"]),
    (["--shots", "1500"], ["--shots must be 100 at most, not 1500"]),
    (["--images", "100"], ["--images must be 500 or more"]),
    (["--tests", "5"], ["--tests must be 12 or more"]),
    (["--lm-short", "2"], ["--lm-short must be from 0 to 1"]),
    (["--lm-share", "2"], ["--lm-share must be from 0 to 1"]),
    (["--short", "-1"], ["--short must be from 0 to 1"]),
    (["--gate-lr", "-1"], ["--gate-lr must be 0 or more"]),
    (["--eye-batch", "501"], ["--eye-batch 501 is more than the 500 pictures"]),
    (["--lm-lr", "-1"], ["--lm-lr must be 0 or more"]),
    (["--temperature", "inf"], ["--temperature must be 0 or more"]),
    (["--attend", "none"], ["invalid choice: 'none'", "last"]),
    (["--evry", "2"], ["unknown flag --evry", "did you mean --every?"])])
def test_bad_flags(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        common.start(lambda args: None, flamingo.Args, [*SMALL, *flags])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and len(text.strip().splitlines()) == 1
    for word in words:
        assert word in text


def test_foreign_and_broken_stages(done, tmp_path):
    out, _ = done
    flamingo_py = lambda *flags: run(*SMALL, "--out", tmp_path / "out", *flags, script="flamingo.py")
    no = lambda *flags, words: refused(flamingo_py(*flags), 1, *words, script="flamingo.py")
    no("--lm", "nowhere", words=["there is no nowhere/checkpoint.pt", "python gpt.py", "--lm"])
    no("--lm", out, words=["holds no LM", f"--lm {out}/lm"])
    no("--lm", out / "eye", words=["holds no LM"])
    no("--lm", out / "lm", "--eye", out, words=["holds no eye", f"--eye {out}/eye"])
    no("--lm", out / "lm", "--eye", out / "lm", words=["holds no eye"])
    no("--lm", out / "lm", "--eye", out / "eye", "--image-size", 36, "--patch", 6, words=["patches of 8 pixels", "--image-size 36"])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/checkpoint.pt").write_bytes(b"no checkpoint")
    no("--lm", tmp_path / "broken", words=["not a checkpoint that can be read"])
    for script, flag in ("mae.py", "--lm"), ("gpt.py", "--eye"):
        torch.save(dict(script=script), tmp_path / "broken/checkpoint.pt")
        no("--lm", out / "lm", flag, tmp_path / "broken", words=[f"written by {script}", flag])
    state = torch.load(out / "lm/checkpoint.pt", weights_only=True)
    torch.save({**state, "script": "gpt.py", "args": {**state["args"], "data": "shapes"}}, tmp_path / "broken/checkpoint.pt")
    no("--lm", tmp_path / "broken", words=["trained on images (shapes)", "another --lm"])
    state["model"]["pos_embed.weight"] = state["model"]["pos_embed.weight"][:30]
    torch.save(state, tmp_path / "broken/checkpoint.pt")
    no("--lm", tmp_path / "broken", words=["a context of 30 tokens", "41 or more"])
    state["model"]["token_embed.weight"] = state["model"]["token_embed.weight"][:50]
    torch.save(state, tmp_path / "broken/checkpoint.pt")
    no("--lm", tmp_path / "broken", words=["has 50 tokens"])
    refused(run("--resume", "--out", out / "lm", "--every", 1, script="flamingo.py"), 1, "does not fit", script="flamingo.py")
    assert not (tmp_path / "out/checkpoint.pt").exists()


def test_it_learns_to_see():
    """The join alone, gates from 0, between an LM and an eye that were never trained: with the right pictures the colour
    of new ones is told, with those of others it stays at chance."""
    tokens, losses = flamingo.Tokens(), []
    scenes = flamingo.Scenes(0, 800, common.KINDS, single=True)
    colours = [list(common.COLOURS)[figures[0].colour] for figures in scenes.all]
    x = torch.tensor([tokens.encode(f"<end> <image> what colour is it ? {colour} <end>") for colour in colours])
    for wrong in False, True:
        torch.manual_seed(0)
        lm, eye = flamingo.GPT(tokens.vocab, 64, 32, 2, 2), flamingo.ViT(4, 192, 32, 1, 2)
        for p in lm.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=.2)
        model = flamingo.Flamingo(lm.requires_grad_(False), eye, 8, tokens.image, latents=4)
        args = flamingo.Args(steps=200, batch=32, lr=1e-2, device="cpu", dtype="float32")
        visual = flamingo.views(args, model, common.paint(scenes.all))[:, None].float()
        visual = visual.roll(1, 0) if wrong else visual
        loop = common.Run(args, model, flamingo.optimizer(args, model), part="a trial")
        for _ in loop:
            i = loop.batch(torch.arange(600))
            masked, target = flamingo.mask(x[i], tokens.image)
            loop.update(flamingo.distance(model(masked, model.media(visual[i])), target))
        with torch.no_grad():
            masked, target = flamingo.mask(x[600:], tokens.image)
            prediction = model(masked, model.media(visual[600:]))
            losses.append(flamingo.distance(prediction[:, -2:-1], target[:, -2:-1]).item())      # of the colour alone
    assert losses[0] < 1.6 and losses[1] > 1.9, losses                          # chance: ln 8 = 2.08
