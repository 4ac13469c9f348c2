"""flamingo.py against loops in float64, torch's own modules, its language model alone, and what must not reach what."""
import copy
import json
import math
import random
import shutil
import signal
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, refused, run
from torch import nn

import common
import flamingo
import gpt
import mae

SMALL = dict(every=1, lm_steps=3, lm_batch=4, dim=16, heads=2, depth=2, vit_steps=3, vit_batch=4, vit_dim=8, vit_heads=2, vit_depth=1,
             steps=3, batch=4, images=500, tests=12, latents=2, dtype="float32", device="cpu")      # seconds instead of minutes
FLAGS = [word for name, value in SMALL.items() for word in (common.flag(name), value)]
V, CONTEXT, C, DEPTH, IMAGE, END = 30, 24, 16, 3, 1, 0
TEXT = torch.tensor([[0, 4, 5, 1, 6, 7, 0, 1, 8, 9, 0, 1, 10, 11, 12, 0],
                     [0, 1, 5, 1, 6, 7, 0, 9, 8, 9, 0, 2, 10, 1, 12, 0]])       # three <image> tokens each
POSITIONS = [[3, 7, 11], [1, 3, 13]]                                            # of these
MODES = pytest.mark.parametrize("attend", ["last", "all"])


def new_model(attend="last", every=1, start=.7, latents=4, seed=0):
    """A Flamingo whose weights, gates and biases all matter."""
    torch.manual_seed(seed)
    lm, vit = flamingo.GPT(V, CONTEXT, C, DEPTH, 2), flamingo.ViT(8, 4, 12, 1, 3)
    for p in (*lm.parameters(), *vit.parameters()):
        nn.init.normal_(p, std=.2)
    return flamingo.Flamingo(lm.requires_grad_(False), vit, 4, IMAGE, every, latents, 2, attend, start).eval()


def images(n=6, seed=1):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def project(model, x):
    """The media of six images, for two texts with three <image> tokens each."""
    return model.project(model.encode(x).unflatten(0, (2, 3)))


def of_text(media, i):
    """The media of text i alone."""
    return [layer[:, i:i + 1] for layer in media]


# ------------------------------------------------------------------------------------------- the model


@MODES
def test_with_gates_at_zero_it_is_the_lm_bit_for_bit(attend):
    for every in 1, 2:
        model = new_model(attend, every, start=0.)
        plain = gpt.GPT(V, CONTEXT, C, DEPTH, 2).eval()
        plain.load_state_dict(model.lm.state_dict())
        for autocast in False, True:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                media, alone = project(model, images()), plain(TEXT)
                assert torch.equal(model(TEXT, media), alone) and torch.equal(model(TEXT), alone)
        model.gated[1].attn_gate.data += .1
        assert not torch.equal(model(TEXT, project(model, images())), plain(TEXT))


@MODES
def test_media_mask_equals_loops(attend):
    """Also where a text has more <image> tokens than there are images."""
    torch.manual_seed(0)
    so_far, M, R = torch.randint(0, 6, (4, 7)), 4, 3
    visible = flamingo.media_mask(so_far, M, R, attend)
    assert visible.shape == (4, 1, 7, M * R) and visible.dtype == torch.bool
    for b in range(4):
        for t in range(7):
            n = so_far[b, t].item()
            for key in range(M * R):
                number = 1 + key // R
                expected = number == n if attend == "last" else number <= n
                assert visible[b, 0, t, key] == expected


@MODES
def test_tokens_before_the_first_image_get_exactly_zero(attend):
    model, found = new_model(attend), []
    for layer in model.gated:
        layer.attn.register_forward_hook(lambda module, inputs, output: found.append(output))
    logits = [model(TEXT, project(model, images(seed=seed))) for seed in (1, 2)]
    assert len(found) == 2 * DEPTH
    for row, positions in enumerate(POSITIONS):
        first = positions[0]
        assert torch.equal(logits[0][row, :first], logits[1][row, :first])
        assert (logits[0][row, first:] - logits[1][row, first:]).abs().amax(1).min() > 1e-4
        for output in found:
            assert not output[row, :first].any() and output[row, first:].abs().amax(1).min() > 0
    without = model(torch.full((1, 5), 7), model.project(torch.zeros(1, 1, 5, 12)))
    assert without.isfinite().all()                                            # a text without any <image>


@MODES
@pytest.mark.parametrize("j", [0, 1, 2])
def test_image_j_reaches_what_comes_after_it(attend, j):
    """All later tokens through the text; directly, in one gated layer, those up to the next <image> alone."""
    model, x = new_model(attend), images()
    other = x.clone()
    other[j], other[3 + j] = images(2, seed=5)
    a, b = (project(model, part) for part in (x, other))
    moved = (model(TEXT, a) - model(TEXT, b)).abs().amax(2)
    h, visible = torch.randn(2, TEXT.shape[1], C), flamingo.media_mask((TEXT == IMAGE).cumsum(1), 3, 4, attend)
    direct = [model.gated[0](h, media[0].flatten(3, 4), visible) for media in (a, b)]
    direct = (direct[0] - direct[1]).abs().amax(2)
    for row, positions in enumerate(POSITIONS):
        end = positions[j + 1] if attend == "last" and j < 2 else TEXT.shape[1]
        assert not moved[row, :positions[j]].any() and moved[row, positions[j]:].min() > 1e-5
        assert not direct[row, :positions[j]].any() and not direct[row, end:].any()
        assert direct[row, positions[j]:end].min() > 1e-4


@MODES
def test_gated_layer_equals_the_papers_formulas_in_float64(attend):
    model = new_model(attend).double()
    layer, B, T = model.gated[1], *TEXT.shape
    latents, h = torch.randn(B, 3, 4, 12).double(), torch.randn(B, T, C).double()
    y = layer(h, layer.attn.keys_values(latents.flatten(1, 2)), flamingo.media_mask((TEXT == IMAGE).cumsum(1), 3, 4, attend))
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
                keys, values = ([row[i:i + C][own] for row in rows] for i in (0, C))
                if rows:
                    scores = torch.stack([query[own] @ key / math.sqrt(D) for key in keys])
                    weights = scores.exp() / scores.exp().sum()
                    out[own] = sum(weight * value for weight, value in zip(weights, values))
            x = h[b, t] + layer.attn_gate.tanh() * (W.proj.weight @ out)
            hidden = (layer.mlp.fc1.weight @ layer.mlp.norm(x)).clamp(min=0) ** 2
            x = x + layer.mlp_gate.tanh() * (layer.mlp.fc2.weight @ hidden)
            torch.testing.assert_close(y[b, t], x, rtol=1e-10, atol=1e-10)


def test_resampler_equals_torchs_attention_and_knows_no_order():
    torch.manual_seed(0)
    model, visual = flamingo.Resampler(12, 2, 3, 5).double(), torch.randn(2, 9, 12).double()
    x = model.latents.expand(2, -1, -1)
    for layer in model.layers:
        query = layer.norm_latents(x)
        keys = torch.cat([layer.norm_visual(visual), query], 1)                # the latents, too
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


def test_the_whole_equals_its_parts_one_after_another():
    """Flamingo of one text, from its ViT, resampler, blocks and gated layers, with torch's masked attention."""
    model, x = new_model(every=2), images()
    for row in range(2):
        latents = torch.cat([model.resampler(model.vit(flamingo.patchify(image[None], 4))) for image in x[3 * row:3 * row + 3]])
        so_far = (TEXT[row] == IMAGE).cumsum(0)
        h = model.lm.token_embed(TEXT[row]) + model.lm.pos_embed.weight[:16]
        for i, block in enumerate(model.lm.blocks):
            if i % 2 == 0:
                layer = model.gated[i // 2]
                k, v = layer.attn.kv(latents.flatten(0, 1)).split(C, 1)
                forbidden = torch.tensor([[n != 1 + key // 4 for key in range(12)] for n in so_far.tolist()])
                y, _ = F.multi_head_attention_forward(
                    layer.attn.q(layer.norm(h))[:, None], k[:, None], v[:, None], C, 2, None, None, None, None, False, 0.,
                    torch.eye(C), None, attn_mask=forbidden, use_separate_proj_weight=True, q_proj_weight=torch.eye(C),
                    k_proj_weight=torch.eye(C), v_proj_weight=torch.eye(C))
                y = layer.attn.proj(y[:, 0]).masked_fill((so_far == 0)[:, None], 0.)
                h = h + layer.attn_gate.tanh() * y
                h = h + layer.mlp_gate.tanh() * layer.mlp(h)
            h = block(h[None])[0]
        logits = model.lm.norm(h) @ model.lm.token_embed.weight.T
        torch.testing.assert_close(model(TEXT, project(model, x))[row], logits, rtol=1e-4, atol=1e-5)


def test_images_are_encoded_in_patches_and_positions():
    model, x = new_model(), images(1)
    a = model.encode(x)
    assert a.shape == (1, 5, 12) and not a.requires_grad
    patches = flamingo.patchify(x, 4)
    assert torch.equal(a, model.vit(patches))
    latents = model.resampler(model.vit(patches.flip(1)))                      # the ViT has positions, so the order of
    assert (latents - model.resampler(a)).abs().max() > 1e-3                   # patches matters to it
    twin = mae.ViT(8, 4, 12, 1, 3).eval()
    twin.load_state_dict(model.vit.state_dict())
    assert torch.equal(twin(patches), a)


def test_a_gated_layer_before_every_nth_block():
    for every, n in (1, 3), (2, 2), (3, 1), (4, 1):
        model = new_model(every=every)
        assert len(model.gated) == n
        order = []
        for i, layer in enumerate(model.gated):
            layer.register_forward_hook(lambda *_, i=i: order.append(f"gated {i}"))
        for i, block in enumerate(model.lm.blocks):
            block.register_forward_hook(lambda *_, i=i: order.append(f"block {i}"))
        model(TEXT, project(model, images()))
        expected = []
        for i in range(DEPTH):
            expected += [f"gated {i // every}"] * (i % every == 0) + [f"block {i}"]
        assert order == expected


def test_without_a_resampler_all_visual_tokens_are_there():
    model = new_model(latents=0)
    features = model.encode(images()).unflatten(0, (2, 3))
    media = model.project(features)[0]
    assert media.shape == (2, 2, 2, 3, 5, 8)                                   # keys and values, B, H, M, N, D
    direct = model.gated[0].attn.kv(model.resampler(features))                 # (2, 3, 5, 2 C)
    torch.testing.assert_close(media[0, 1, 1, 2], direct[1, 2, :, 8:16])
    torch.testing.assert_close(media[1, 0, 1, 1], direct[0, 1, :, C + 8:])


def test_no_gate_and_an_unfrozen_lm(tmp_path):
    model = new_model(start=math.inf)
    assert all(layer.attn_gate.tanh() == 1 and not layer.attn_gate.requires_grad for layer in model.gated)
    twin = new_model(start=20.)                                                # tanh(20) is 1, too, to rounding
    torch.testing.assert_close(model(TEXT, project(model, images())), twin(TEXT, project(twin, images())))
    train(model, tmp_path)                                                     # can be saved, though inf is not finite
    assert (tmp_path / "checkpoint.pt").exists()
    model = new_model()
    model.lm.requires_grad_(True)
    before = copy.deepcopy(model.lm.state_dict())
    train(model, tmp_path)
    assert all(not torch.equal(p, before[name]) for name, p in model.lm.named_parameters())


def test_what_is_frozen_stays_in_evaluation_mode():
    lm = flamingo.GPT(V, CONTEXT, C, DEPTH, 2, dropout=.5)
    model = flamingo.Flamingo(lm.requires_grad_(False), flamingo.ViT(8, 4, 12, 1, 3), 4, IMAGE)
    assert model.training and model.resampler.training and not model.lm.training and not model.vit.training
    assert torch.equal(model(TEXT), model(TEXT))
    lm.requires_grad_(True)
    model.train()
    assert model.lm.training and not model.vit.training and not model.eval().lm.training


# ------------------------------------------------------------------------------------------- sampling


@MODES
@pytest.mark.parametrize("cuts", [[1] * 16, [5, 1, 1, 9], [16], [3, 1, 12], [2, 14]])
def test_cached_equals_uncached(attend, cuts):
    model = new_model(attend)
    media = project(model, images())
    whole, cache, parts, start = model(TEXT, media), model.lm.new_cache(2), [], 0
    for part in TEXT.split(cuts, 1):
        before = (TEXT[:, :start] == IMAGE).sum(1, keepdim=True)
        parts.append(model(part, media, cache, before))
        start += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="25 tokens are more than the context of 24"):
        model(torch.zeros(2, 9, dtype=torch.long), media, cache, before)


def without_cache(model, prompt, media, n, end, temperature=0.):
    """What sample() writes after one prompt, from the whole text each time."""
    text = list(prompt)
    for _ in range(min(n, CONTEXT - len(prompt))):
        logits = model(torch.tensor([text]), media)[0, -1].float()
        logits[IMAGE] = -math.inf
        token = logits.argmax() if temperature == 0 else torch.multinomial((logits / temperature).softmax(0), 1)
        if token == end:
            break
        text.append(token.item())
    return text[len(prompt):]


@MODES
def test_sampling_equals_sampling_without_a_cache(attend):
    model = new_model(attend)
    media = project(model, images())
    prompts = [TEXT[0, :9].tolist(), TEXT[1, :5].tolist()]
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            for temperature in 0., 1.:
                torch.manual_seed(3)
                (new,) = flamingo.sample(model, [prompt], of_text(media, i), 12, 99, temperature)
                torch.manual_seed(3)
                assert new.tolist() == without_cache(model, prompt, of_text(media, i), 12, 99, temperature)
                assert len(new) == 12
        for end in range(V):                                                   # up to an end, which is left out
            (new,) = flamingo.sample(model, prompts[:1], of_text(media, 0), 12, end)
            assert new.tolist() == without_cache(model, prompts[0], of_text(media, 0), 12, end) and end not in new


@MODES
def test_ragged_prompts_are_continued_as_each_alone(attend):
    """Of lengths and numbers of images that differ, with an <end> inside the prompts."""
    ended, prompts = 0, [TEXT[0, :9].tolist(), TEXT[1, :5].tolist(), [0, 1, 5, 0, 1, 7, 8, 0, 9], [0, 1, 5], [0, 3], TEXT[0].tolist()]
    for seed in 15, 21, 22, 38:
        model = new_model(attend, seed=seed)
        with torch.no_grad():
            model.lm.token_embed.weight[END] *= 2                              # likelier than others
        media = model.project(model.encode(images(18, seed)).unflatten(0, (6, 3)))
        together = flamingo.sample(model, prompts, media, 6, END)
        for i, prompt in enumerate(prompts):
            (alone,) = flamingo.sample(model, [prompt], of_text(media, i), 6, END)
            assert together[i].tolist() == alone.tolist()
            with torch.no_grad():
                assert alone.tolist() == without_cache(model, prompt, of_text(media, i), 6, END)
        ended += len({len(new) for new in together}) > 1
    assert ended                                                               # some texts have ended while others went on


def test_images_are_projected_once_per_text():
    model, count = new_model(), []
    media = project(model, images())
    for module in (model.vit, model.resampler, *(layer.attn.kv for layer in model.gated)):
        module.register_forward_hook(lambda *_: count.append(1))
    flamingo.sample(model, [TEXT[0, :9].tolist(), TEXT[1, :9].tolist()], media, 5, END)
    assert not count


def test_it_writes_no_image_tokens():
    model = new_model()
    with torch.no_grad():
        model.lm.token_embed.weight[IMAGE] = 0.
        model.lm.norm.bias += 5 * model.lm.token_embed.weight.sum(0).sign()
        model.lm.token_embed.weight[IMAGE] = model.lm.norm.bias.sign()         # now <image> is likeliest by far
    media = project(model, images())
    assert model(TEXT, media)[:, -1].argmax(1).tolist() == [IMAGE, IMAGE]
    for temperature in 0., 1., 1e-40:
        rows = flamingo.sample(model, [TEXT[0, :9].tolist(), TEXT[1, :9].tolist()], media, 9, 99, temperature)
        assert all(len(row) == 9 and IMAGE not in row for row in rows)


def test_what_sample_refuses():
    model = new_model()
    media = project(model, images())
    with pytest.raises(ValueError, match="4 <image> tokens, and there are 3 images"):
        flamingo.sample(model, [[0, 1, 1, 1, 1], [0]], media, 5, END)
    for prompts in [[0] * 26, [0] * 25], [[0] * 26, [0]], [[0] * 26]:          # one prompt alone, too
        with pytest.raises(ValueError, match="a prompt of 26 tokens is longer than the context of 24"):
            flamingo.sample(model, prompts, media, 5, END)
    assert len(flamingo.sample(model, [[0, 1] + [5] * 20], of_text(media, 0), 9, 99)[0]) == 2      # what is left of it
    assert len(flamingo.sample(model, [[0, 1] + [5] * 22], of_text(media, 0), 9, 99)[0]) == 0


# ------------------------------------------------------------------------------------------- training


def train(model, out, n=3, loss=None, **how):
    """n steps on two texts; returns the optimizer."""
    args = flamingo.Args(**(dict(steps=n, batch=2, lr=1e-2, device="cpu", dtype="float32", warmup=0., out=str(out)) | how))
    optimizer = flamingo.build_optimizer(args, model)
    loop, features = common.Run(args, model, optimizer), model.encode(images()).unflatten(0, (2, 3))
    for _ in loop:
        inputs, target = flamingo.mask(loop.batch(TEXT), IMAGE)
        loss = flamingo.distance(model(inputs, model.project(features)), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loop.log(loss)
    return optimizer


def test_what_is_frozen_stays_and_costs_nothing(tmp_path):
    model = new_model(start=0.)
    before = copy.deepcopy(model.state_dict())
    optimizer = train(model, tmp_path)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        frozen = name.startswith(("lm.", "vit."))
        assert torch.equal(p, before[name]) == frozen, name
        assert p.requires_grad != frozen and (id(p) in held) != frozen and (p in optimizer.state) != frozen
        assert not frozen or p.grad is None
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items() if k.startswith(("lm.", "vit.")))


def test_gates_have_a_rate_of_their_own_and_the_resampler_no_decay(tmp_path):
    model = new_model(start=0.)
    optimizer = train(model, tmp_path, 1, lr=1e-3, gate_lr=7., weight_decay=.3, optimizer="adamw")
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            group = of[id(p)]
            assert group.get("times", 1.) == (7. if name.endswith("gate") else 1.), name
            assert group["weight_decay"] == (.3 if name.startswith("gated") and p.ndim > 1 else 0.), name
    assert all(abs(gate.item()) == pytest.approx(7e-3, rel=1e-3) for layer in model.gated for gate in (layer.attn_gate, layer.mlp_gate))


def test_at_the_start_the_gates_alone_have_a_gradient():
    model = new_model(start=0.)
    flamingo.distance(model(TEXT, project(model, images())), TEXT).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert bool(p.grad.any()) == name.endswith("gate"), name           # tanh(0) = 0 times the rest


def test_mask_and_distance():
    x = torch.tensor([[0, 1, 5, 6, 0, 1, 7, 0, -100, -100]])
    inputs, target = flamingo.mask(x, IMAGE)
    assert inputs.tolist() == [[0, 1, 5, 6, 0, 1, 7, 0, 0]]
    assert target.tolist() == [[-100, 5, 6, 0, -100, 7, 0, -100, -100]]        # never <image>, nothing after the end
    logits = torch.randn(1, 9, V)
    targets = [(t, y) for t, y in enumerate(target[0].tolist()) if y >= 0]
    by_hand = sum(-logits[0, t].log_softmax(0)[y] for t, y in targets) / len(targets)
    torch.testing.assert_close(flamingo.distance(logits, target), by_hand)


def test_heads_of_the_cross_attention_divide_its_channels():
    with pytest.raises(ValueError, match="^16 channels cannot be divided among 3 heads$"):
        flamingo.GatedCrossAttention(16, 8, 3)


def test_clip_loss_equals_a_loop():
    torch.manual_seed(0)
    a, b, scale = torch.randn(5, 7).double(), torch.randn(5, 7).double(), 3.
    similarity = [[scale * F.cosine_similarity(x, y, dim=0).item() for y in b] for x in a]
    loss = 0.
    for i in range(5):
        loss -= math.log(math.exp(similarity[i][i]) / sum(math.exp(s) for s in similarity[i])) / 10
        loss -= math.log(math.exp(similarity[i][i]) / sum(math.exp(row[i]) for row in similarity)) / 10
    assert flamingo.clip_loss(a, b, scale).item() == pytest.approx(loss, rel=1e-5)
    assert flamingo.clip_loss(torch.ones(5, 7), torch.ones(5, 7), scale).item() == pytest.approx(math.log(5), rel=1e-5)


def test_clip_reads_the_positions_of_words():
    torch.manual_seed(0)
    model, x = flamingo.CLIP(flamingo.ViT(8, 4, 12, 1, 3), V, 12, 4), images(2)
    words = torch.zeros(2, 16, dtype=torch.long)
    words[:, :3] = torch.tensor([[4, 5, 6], [6, 5, 4]])
    image, text, scale = model(x, words)
    assert scale.item() == pytest.approx(10) and image.shape == text.shape == (2, 64)
    table = model.text_proj.weight.view(64, 16, V)                             # a vector for each word at each position
    for i in range(2):
        by_hand = model.text_proj.bias + sum(table[:, j, words[i, j]] for j in range(16))
        torch.testing.assert_close(text[i], by_hand)
        tokens = model.vit(flamingo.patchify(x[i:i + 1], 4))[0, 1:]
        torch.testing.assert_close(image[i], model.image_proj(tokens.mean(0)))
    assert (text[0] - text[1]).abs().max() > .01


# ------------------------------------------------------------------------------------------ the world


def test_images_show_what_captions_say():
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
    assert ask(three, "side") == ask(column, "side") == (None, None, None)     # the caption does not say
    assert {ask(two, "shape")[1:], common.question(random.Random(4), two, "shape")[1:]} <= {
        ("what shape is the red one ?", "circle"), ("what shape is the blue one ?", "heart")}
    tokens = common.SceneTokens()
    rng = random.Random(0)
    for _ in range(300):
        figures = common.scene(rng)
        about, question, answer = common.question(rng, figures)
        assert about in common.ABOUT and len(tokens.encode(common.caption(figures))) <= 16
        for text in common.caption(figures), question, answer:
            assert tokens.decode(tokens.encode(text)) == text
    assert all(len({kind[i] for kind in common.UNSEEN}) == 8 for i in (0, 1))  # each shape, each colour once


def documents(n=60):
    tokens, scenes = common.SceneTokens(), common.Scenes(0, 1000, common.SEEN)
    return tokens, scenes, *common.image_documents(0, tokens, scenes, n, 64, .5)


def test_what_flamingo_reads():
    """<image> tokens and images fit each other, unseen kinds and held-out words do not occur, and only the examples of a
    document say what its new words mean."""
    tokens, scenes, x, ids = documents(400)
    sorts = {"image alone": 0, "colour": 0, "shape": 0, "both": 0, "caption": 0}
    for row, shown in zip(x, ids):
        text = row[row >= 0].tolist()
        assert text[0] == tokens.end and text[-1] == tokens.end and (row >= 0).long().diff().max() <= 0
        chunks = tokens.decode(text).split("<end>")[1:-1]
        meant, by = {}, set()
        for chunk, i in zip(chunks, shown.tolist()):
            assert chunk.strip().startswith("<image>") and chunk.count("<image>") == 1
            figures, words = scenes.all[i], chunk.split()[1:]
            assert not any((f.shape, f.colour) in common.UNSEEN for f in figures)
            if words[-1] in common.NEW_WORDS:
                shape, colour = common.FIGURES[figures[0].shape], list(common.COLOURS)[figures[0].colour]
                sort = {(): "image alone", (colour,): "colour", (shape,): "shape", (colour, shape): "both"}[tuple(words[:-1])]
                sorts[sort] += 1
                by |= {sort}
                assert len(figures) == 1 and words[-1] in common.TRAINED
                assert meant.setdefault((colour, shape), words[-1]) == words[-1]
            elif words[0] == "there":
                sorts["caption"] += 1
                assert " ".join(words[2:]) == common.caption(figures)
            elif "?" in words:
                about = {"colour": "colour", "shape": "shape", "many": "number", "side": "side"}[words[1]]
                assert any(common.question(random.Random(s), figures, about)[1:] == (" ".join(words[:-1]), words[-1]) for s in range(20))
        assert len(set(meant.values())) == len(meant)
        assert len(by - {"image alone"}) <= 1                                  # in words in one way, or not at all
    in_words = sum(sorts[by] for by in ("colour", "shape", "both"))
    assert min(sorts.values()) > 30 and .3 < in_words / (in_words + sorts["image alone"]) < .5
    words = {word for row in x for word in tokens.decode(row[row >= 0]).split()}
    assert not words & set(common.HELD_OUT) and set(common.TRAINED) <= words
    came = {token for row in x for token in row[row >= 0].tolist()}            # but all their syllables do, in other words
    assert all(came >= set(tokens.encode(word)) for word in common.HELD_OUT)
    again = documents(400)
    assert torch.equal(again[2], x) and torch.equal(again[3], ids)
    sizes = set()
    for seed in range(8):                                                      # no more columns than images
        short, shown = common.image_documents(seed, tokens, scenes, 1, 27)
        assert short.shape == (1, 28) and shown.shape[1] == (short == tokens.image).sum()
        sizes.add(shown.shape[1])
    assert len(sizes) > 1


def read(tokens, row):
    """The chunks of a document as (has <image>, words); not the first <end>, and not the last, cut chunk."""
    chunks = [chunk.split() for chunk in tokens.decode(row).split("<end>")[1:-1]]
    return [("<image>" in chunk, [word for word in chunk if word != "<image>"]) for chunk in chunks]


def test_what_the_lm_reads():
    """<image> before all, half or none of the chunks; after some of them the words for the image are missing. New words
    come with a colour, a shape, or both, in a document in one way."""
    tokens = common.SceneTokens()
    x = common.text_documents(0, tokens, 400, 64, .4)
    assert x.shape == (400, 65) and set(x.flatten().tolist()) == set(range(tokens.vocab))
    assert set(common.NEW_WORDS) <= {w for row in x for w in tokens.decode(row).split()}
    ways, with_image, missing = {}, {}, {}
    for row in x:
        chunks = [(image, words) for image, words in read(tokens, row)[:9] if words[-1:] and words[-1] in common.NEW_WORDS]
        if len(chunks) < 9:                                                    # one episode of new words
            continue
        in_words = [words for _, words in chunks if len(words) > 1]
        for words in in_words:
            assert all(w in common.COLOURS or w in common.FIGURES for w in words[:-1]) and len(words) < 4
        way = {tuple("colour" if w in common.COLOURS else "shape" for w in words[:-1]) for words in in_words}
        assert len(way) <= 1
        ways[str(way)] = ways.get(str(way), 0) + 1
        meant = {}
        for *kind, name in in_words:
            assert meant.setdefault(tuple(kind), name) == name
        assert all(image for image, words in chunks if len(words) == 1)        # none is missing without an <image>
        fraction = sum(image for image, _ in chunks) / len(chunks)
        sort = fraction if fraction in (0, 1) else .5
        with_image[sort] = with_image.get(sort, 0) + 1
        missing[len(in_words) < len(chunks)] = missing.get(len(in_words) < len(chunks), 0) + 1
    n = sum(with_image.values())
    assert n > 60 and .35 < with_image[1] / n < .65 and min(with_image[0], with_image[.5]) > .1 * n and .15 < missing[True] / n < .6
    assert min(ways.get(str({way}), 0) for way in (("colour",), ("shape",), ("colour", "shape"))) > .08 * n


def test_new_words_come_with_what_separates_the_kinds():
    """A colour does not stand for two kinds of one colour with different names."""
    scenes, found = common.Scenes(0, 1000, common.SEEN), set()
    for seed in range(200):
        for kind in "colour", "shape", "both":
            episode = common.new_words(random.Random(seed), scenes, common.NEW_WORDS, 8, 3, kind)
            pairs = {scenes.all[i][0][:2] for i, _, _ in episode}
            ((by,),) = [{words for _, words, _ in episode}]
            values = {pair[kind == "colour"] for pair in pairs} if kind != "both" else pairs
            assert by == (kind if len(values) == 3 else "both") and len(pairs) == len({name for _, _, name in episode}) == 3
            found.add((kind, by))
    assert len(found) == 5
    figures = scenes.all[scenes.single[0]]
    colour, shape = list(common.COLOURS)[figures[0].colour], common.FIGURES[figures[0].shape]
    texts = [common.in_words(figures, kind, "dax") for kind in ("colour", "shape", "both", "caption")]
    assert texts == [f"{colour} dax", f"{shape} dax", f"{colour} {shape} dax", f"{common.caption(figures)} . dax"]


def test_two_thirds_of_the_chunks_about_scenes_are_captions():
    """They alone say the size; and what they say of a scene is so."""
    rng, scenes = random.Random(0), common.Scenes(0, 600, common.SEEN)
    chunks = common.captions(rng, scenes, 4000)
    captions = [(i, text) for i, kind, text in chunks if kind == "caption"]
    assert .62 < len(captions) / 4000 < .68
    assert all(text == f"there is {common.caption(scenes.all[i])}" for i, text in captions)
    questions = [text for _, kind, text in chunks if kind == "question"]
    assert len(questions) == 4000 - len(captions) and not any(word in text for text in questions for word in ("small", "large"))
    assert min(sum(f"what {about}" in text for text in questions) for about in ("colour", "shape")) > 300


def test_tokens():
    tokens = common.SceneTokens(common.Bytes())
    text = tokens.encode("<end> <image> dax <end> <image> a red one")
    assert text == [256, 0, *b"dax", 256, 0, *b"a red one"] and (tokens.image, tokens.end, tokens.vocab) == (0, 256, 257)
    assert tokens.encode("<image> dax <end>") == [0, *b"dax", 256]
    assert tokens.decode(b"a red one") == "a red one"
    tokens = common.SceneTokens()
    with pytest.raises(common.UserError, match="has no word 'sphere'"):
        tokens.encode("a red sphere")
    assert tokens.encode("<image>what colour is it?") == tokens.encode("<image> what colour is it ?")
    pieces = lambda text: [tokens.words[t] for t in tokens.encode(text)]
    assert pieces("<image> blicket <end> red dag") == ["<image>", "bli", "##cket", "<end>", "red", "da", "##g"]
    for word in common.NEW_WORDS:
        assert tokens.decode(tokens.encode(f"a {word} .")) == f"a {word} ." and len(tokens.encode(word)) == 2
    with pytest.raises(common.UserError, match="has no word 'cket'"):
        tokens.encode("a cket")
    assert len(common.NEW_WORDS) == len(set(common.NEW_WORDS)) == 16 and len(common.HELD_OUT) == 4
    for i in 0, 1:                                                             # no syllable is held out
        assert len({tuple(tokens.encode(word))[i] for word in common.TRAINED}) == 4


def test_scenes_of_the_same_colours_are_side_by_side():
    scenes = common.Scenes(0, 600, common.SEEN)
    assert sorted(torch.cat(scenes.alike()).tolist()) == list(range(600))
    for n, own in enumerate(scenes.alike(), 1):
        colours = [tuple(sorted(figure.colour for figure in scenes.all[i])) for i in own]
        assert {len(scenes.all[i]) for i in own} == {n} and colours == sorted(colours) and len(set(colours)) < len(own) / 2


def test_as_many_captions_of_one_as_of_two_and_of_three_figures():
    scenes = common.Scenes(0, 600, common.SEEN)
    counts = [len(scenes.all[i]) for i, _, _ in common.captions(random.Random(0), scenes, 3000)]
    assert all(.28 < counts.count(n) / 3000 < .39 for n in (1, 2, 3))


# ----------------------------------------------------------------------------------------- evaluation


def asked_in_a_test(tests=40):
    asked, scenes = common.queries(0, tests, (0, 1, 2))
    assert len(scenes) == 2 * tests + 2000
    return flamingo.Args(device="cpu", tests=tests), common.SceneTokens(), scenes, asked


def test_what_is_asked():
    """Prompts, images and answers belong together; the word asked for was shown, by another image."""
    args, tokens, scenes, asked = asked_in_a_test()
    assert len([q for q in asked if q.group[0] == "new word"]) == 3 * 40
    for (row, column), prompt, images, answer, words in asked:
        own = [scenes[i] for i in images]
        assert "<image>" not in words and (words.endswith(".") if row.startswith("unasked") else words)
        assert prompt.startswith("<image>") and prompt.count("<image>") == len(images)
        if row == "caption":
            assert prompt == "<image> there is" and answer == common.caption(own[0])
        elif row in common.ABOUT:
            questions = [common.question(random.Random(seed), own[0], row)[1:] for seed in range(20)]
            assert (prompt.removeprefix("<image> "), answer) in questions
        else:
            assert len(images) == 1 + int(column) == len(set(images)) and min(images) >= 80
            assert prompt.endswith("<image>")
            examples = [chunk.split()[-1] for chunk in prompt.split("<end>")[:-1]]
            if "word" in row:
                shown = dict(zip([figures[0][:2] for figures in own], examples))
                assert answer in (common.TRAINED if row.startswith("new word") else common.HELD_OUT)
                assert words.endswith(common.kind_name(own[-1][0])) and \
                    len(set(examples)) == len(shown) == min(3 if row.endswith("of 3") else 2, len(examples))
                assert not examples or shown[own[-1][0][:2]] == answer
            else:
                texts = {about: [common.question(random.Random(0), figures, about)[2] for figures in own] for about in common.ABOUT[:3]}
                assert [*examples, answer] in texts.values()
        if row in ("caption", *common.ABOUT):
            assert column == ("unseen kind" if images[0] >= 40 else ["1 figure", "2 figures", "3 figures"][len(own[0]) - 1])
            assert (own[0][0][:2] in common.UNSEEN) == (column == "unseen kind")
    groups = [q.group for q in asked]
    assert groups == sorted(groups) and ("caption", "3 figures") in groups and ("side", "2 figures") in groups


def test_exactly_right_answers_are_counted(monkeypatch):
    args, tokens, _, asked = asked_in_a_test()

    def answers(args, model, tokens, part, features=None):
        return [q.answer if len(q.answer) % (3 if features is None else 2) else f"{q.answer} and" for q in part]
    monkeypatch.setattr(flamingo, "answers", answers)
    right = flamingo.evaluate(args, None, tokens, asked, "features")
    for group, percent in right.items():
        own = [q for q in asked if q.group == group or group[0] == "LM alone" and q.group[1] == group[1]]
        by = 3 if group[0] == "LM alone" else 2
        assert percent == pytest.approx(100 * sum(len(q.answer) % by > 0 for q in own) / len(own))
    assert set(right) == {q.group for q in asked} | {("LM alone", sort) for sort in common.SORTS}


def small_model():
    """A Flamingo whose answers depend on the image, its tokenizer, and features of four images that differ much."""
    args, tokens = flamingo.Args(device="cpu", dtype="float32"), common.SceneTokens()
    torch.manual_seed(0)
    lm, vit = flamingo.GPT(tokens.vocab, 64, 16, 2, 2), flamingo.ViT(32, 8, 8, 1, 2)
    model = flamingo.Flamingo(lm, vit, 8, tokens.image, latents=0, gate_start=1.).eval()
    for p in model.gated.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=.3)
    x = common.paint([common.scene(random.Random(i)) for i in range(4)])
    features = flamingo.encode(args, model, x, dict(mean=(.2, .2, .2), std=(.2, .2, .2)))
    assert features.dtype == torch.bfloat16 and torch.equal(features, model.encode((x.float() / 255 - .2) / .2).bfloat16())
    return args, model, tokens, torch.randn(features.shape).bfloat16()


def test_answers_mix_no_queries():
    """Queries of different lengths and numbers of images in a batch are answered as each alone; without features the LM
    alone answers."""
    args, model, tokens, features = small_model()
    asked = [common.Query((), "<image> what colour is it ?", [2], "red"), common.Query((), "<image> dax <end> <image>", [0, 3], "dax"),
             common.Query((), "<image> a", [1], "small red star on the left")] * 90                 # more than one batch
    together, alone = flamingo.answers(args, model, tokens, asked, features), flamingo.answers(args, model, tokens, asked)
    assert len(together) == len(alone) == 270 and together[:3] == together[3:6] == together[-3:]
    other = flamingo.answers(args, model, tokens, [q._replace(images=[(i + 1) % 4 for i in q.images]) for q in asked[:3]], features)
    assert all(text != text_other for text, text_other in zip(together, other))          # they depend on the images
    for q, text, text_alone in zip(asked[:3], together, alone):
        prompt = tokens.encode(f"<end> {q.prompt}")
        (new,) = flamingo.sample(model, [prompt], model.project(features[q.images][None].float()), 64, tokens.end)
        assert text == tokens.decode(new)
        (new,) = flamingo.sample(model, [[t for t in prompt if t != tokens.image]], None, 64, tokens.end)
        assert text_alone == tokens.decode(new)


def test_statistics_of_the_vit_normalize_images():
    x = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    y = flamingo.normalize(x, [.1, .2, .3], [.5, .6, .7])
    for c, (mean, std) in enumerate(((.1, .5), (.2, .6), (.3, .7))):
        torch.testing.assert_close(y[:, c], (x[:, c] / 255 - mean) / std)


# ----------------------------------------------------------------------------------------- the script


def main(out, **how):
    """flamingo.main in this process."""
    return flamingo.main(flamingo.Args(**(SMALL | dict(out=str(out)) | how)))


def saved(path):
    return torch.load(path / "checkpoint.pt", weights_only=True)


def figures(out):
    return json.loads((out / "result.json").read_text())["figures"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of seconds, and what it printed."""
    out = tmp_path_factory.mktemp("flamingo") / "run"
    process = run(*FLAGS, "--prompt", "<image> what colour is it ?", "--out", out, script="flamingo.py")
    assert process.returncode == 0, process.stderr
    return out, process.stdout


def test_what_a_run_shows(done):
    out, text = done
    assert all(len(line) <= 80 for line in text.splitlines())
    f = figures(out)
    assert {"caption, 1 figure", "colour, unseen kind", "new word, 0", "unasked question, 4", "LM alone, 3 figures"} <= set(f["right"])
    assert {"held-out word, 2"} <= set(f["right"]) and not [group for group in f["right"] if "of 3" in group]    # few_shot.py has these
    assert f["lines"][-1].startswith("<image> what colour is it ? -> ") and f["lines"][-1] in " ".join(text.split())
    assert [line[:2] for line in f["lines"] if line[:2].strip()][:12] == [f"{i:>2}" for i in range(1, 13)]
    assert (out / "scenes.png").read_bytes()[:4] == b"\x89PNG"
    for words in ("First the LM", "Then the ViT", "Last the multimodal training", "tanh of the gates", "exactly right, %", "examples in the prompt"):
        assert words in text
    assert {p.name for p in out.iterdir()} == {"lm", "vit", "checkpoint.pt", "log.jsonl", "loss.svg", "result.json", "settings.json", "scenes.png"}


def test_how_the_lm_and_the_vit_are_trained(tmp_path, monkeypatch):
    """The LM starts from weights for its width and reads each document once; of four batches of the ViT one holds single
    figures, one pairs and one triples, of few colours."""
    read, tokens = [], common.SceneTokens()
    args = common.resolve(flamingo.Args(**SMALL | dict(lm_steps=4, vit_steps=8, vit_batch=6, lm_new_words=.2, lm_lr=0., out=str(tmp_path))))
    monkeypatch.setattr(flamingo, "mask", lambda x, image: read.append(x) or (x[:, :-1], x[:, 1:]))
    assert flamingo.train_lm(args, tokens) == f"{tmp_path}/lm"
    made = common.text_documents(0, tokens, 16, args.context, .2)
    assert sorted(torch.cat(read).tolist()) == sorted(made.tolist())
    assert saved(tmp_path / "lm")["model"]["blocks.0.attn.qkv.weight"].std().item() == pytest.approx(.02 * math.sqrt(768 / 16), rel=.1)
    scenes, captions = common.Scenes(0, 500, common.SEEN), []
    forward = flamingo.CLIP.forward
    monkeypatch.setattr(flamingo.CLIP, "forward", lambda self, x, y: captions.append(y) or forward(self, x, y))
    assert flamingo.train_vit(args, tokens, scenes, common.paint(scenes.all)) == f"{tmp_path}/vit"
    figures = [[sum(word in common.COLOURS for word in tokens.decode(row).split()) for row in batch] for batch in captions]
    assert [set(counts) for counts in figures[1:4] + figures[5:]] == [{1}, {2}, {3}] * 2 and set(figures[0] + figures[4]) == {1, 2, 3}
    first = lambda row: min([*common.COLOURS].index(w) for w in tokens.decode(row).split() if w in common.COLOURS)
    colours = [{first(row) for row in batch} for batch in captions]
    assert all(len(own) <= 2 for own in colours[1:4] + colours[5:]) and len(colours[0]) > 2


def test_captions_belong_to_their_images(tmp_path, monkeypatch):
    pairs, tokens = [], common.SceneTokens()
    args = common.resolve(flamingo.Args(**SMALL | dict(out=str(tmp_path))))
    scenes = common.Scenes(0, 500, common.SEEN)
    x, forward = common.paint(scenes.all), flamingo.CLIP.forward
    monkeypatch.setattr(flamingo.CLIP, "forward", lambda self, x, y: pairs.append((x, y)) or forward(self, x, y))
    flamingo.train_vit(args, tokens, scenes, x)
    normal = flamingo.normalize(x)
    for batch, words in pairs:
        for image, row in zip(batch, words):
            (i,) = (normal == image).all(3).all(2).all(1).nonzero()
            expected = tokens.encode(common.caption(scenes.all[i]))
            assert row.tolist() == expected + [0] * (16 - len(expected))


def test_what_a_step_sees(tmp_path, monkeypatch):
    """The batches hold only as many images as their documents show, and no image is of an unseen kind."""
    seen, made, project, image_documents = [], [], flamingo.Flamingo.project, common.image_documents
    monkeypatch.setattr(common, "image_documents", lambda *how: made.append(how) or image_documents(*how))
    monkeypatch.setattr(flamingo, "mask", lambda x, image, mask=flamingo.mask: seen.append(x) or mask(x, image))
    monkeypatch.setattr(flamingo.Flamingo, "project", lambda self, features: seen.append(features.shape[:2]) or project(self, features))
    monkeypatch.setattr(flamingo, "show", lambda *_: None)
    model = main(tmp_path, steps=5, new_words=.6, context=64)
    assert not model.training
    x, shapes = seen[3:13:2], seen[4:13:2]                                     # after three steps of the LM
    assert [rows.shape for rows in x] == [(4, 65)] * 5
    assert all(shape[0] == 4 and shape[1] >= (rows == 1).sum(1).max() for rows, shape in zip(x, shapes))
    assert [how[-3:] for how in made] == [(20, 64, .6)]
    assert not any(figure[:2] in common.UNSEEN for how in made for figures in how[2].all for figure in figures)


def test_the_embedding_of_image_stays_zero(done):
    """While the LM learns, and of no other token."""
    rows = saved(done[0] / "lm")["model"]["token_embed.weight"]
    assert not rows[1].any() and rows.any(1).sum() == len(rows) - 1
    assert torch.equal(saved(done[0])["model"]["lm.token_embed.weight"], rows)


def test_lm_and_vit_are_kept_and_frozen(done, tmp_path, monkeypatch):
    """In the run neither changed in the multimodal training; another run beside it takes both, unless its settings differ."""
    out, _ = done
    weights = saved(out)
    for part in "lm", "vit":
        first = saved(out / part)["model"]
        own = {k.removeprefix("vit."): v for k, v in first.items() if part == "lm" or k.startswith("vit.")}
        ours = {k.removeprefix(f"{part}."): v for k, v in weights["model"].items() if k.startswith(f"{part}.")}
        assert set(own) == set(ours) and all(torch.equal(own[k], ours[k]) for k in own)
    trained = sum(len(group["params"]) for group in weights["optimizer"]["param_groups"])
    assert trained == sum(not k.startswith(("lm.", "vit.")) for k in weights["model"])
    main(out.parent / "again")
    assert not (out.parent / "again/lm").exists() and not (out.parent / "again/vit").exists()
    again = saved(out.parent / "again")["model"]
    assert all(torch.equal(again[k], v) for k, v in weights["model"].items())
    for changes, anew in (dict(dim=18), "lm"), (dict(lm_steps=4), "lm"), (dict(lm_new_words=.5), "lm"), (dict(vit_dim=12), "vit"), \
            (dict(images=502), "vit"), (dict(seed=1), "lm vit"), (dict(every=2), ""), (dict(gate_lr=2.), ""), (dict(freeze=False), ""):
        args = common.resolve(flamingo.Args(**SMALL | dict(out=str(out.parent / "third")) | changes))
        for name, settings in ("lm", flamingo.LM), ("vit", flamingo.VIT):
            how, is_done = common.stage(args, name, settings)
            assert is_done == (name not in anew.split()) and how.steps == getattr(args, f"{name}_steps"), changes


EIGHT = dict(lm_steps=8, vit_steps=8, steps=8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was not stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    main(out, **EIGHT)
    return out


@pytest.mark.parametrize("part", ["lm", "vit", ""])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(part, whole, tmp_path, monkeypatch):
    """Bit for bit, wherever it was stopped."""
    log = common.Run.log

    def stop(self, loss):
        log(self, loss)
        if self.out.name == (part or "run") and self.step == 4:
            signal.raise_signal(signal.SIGINT)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)           # in the background it may be ignored
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            main(tmp_path / "run", **EIGHT)
    signal.signal(signal.SIGINT, usual)
    assert saved(tmp_path / "run" / part)["step"] == 5
    flamingo.main(flamingo.Args(resume=True, out=str(tmp_path / "run")))
    for name in "", "lm", "vit":
        a, b = (saved(out / name)["model"] for out in (whole, tmp_path / "run"))
        assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert figures(whole) == figures(tmp_path / "run")


def test_a_finished_run_answers_a_prompt(done, tmp_path):
    """Without training; about its own test images, or about the images of an .npz."""
    out, flags = done[0], ["--resume", "--steps", 0, "--out", done[0], "--prompt"]
    before, right = (out / "checkpoint.pt").read_bytes(), figures(out)["right"]
    asked = run(*flags, "<image> there is", script="flamingo.py")
    assert asked.returncode == 0 and "<image> there is ->" in asked.stdout and "First" not in asked.stdout, asked.stderr
    assert figures(out)["right"] == right
    assert "exactly right" not in asked.stdout                              # the tables are not made again
    flags.append("<image> a red circle <end> <image> what shape is it ?")
    x = common.paint([common.scene(random.Random(i), 1) for i in range(3)]).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "own.npz", images=x)
    asked = run(*flags, "--data", tmp_path / "own.npz", script="flamingo.py")
    assert asked.returncode == 0 and "what shape is it ? -> " in asked.stdout, asked.stderr
    np.savez(tmp_path / "large.npz", images=x.repeat(2, 1).repeat(2, 2))
    np.savez(tmp_path / "none.npz", pictures=x)
    np.savez(tmp_path / "one.npz", images=x[:1])
    (tmp_path / "broken.npz").write_bytes(b"no zip")
    resume = lambda **how: flamingo.main(flamingo.Args(resume=True, steps=0, out=str(out), **how))
    for name, words in (("large", "large.npz: images is .3, 64, 64, 3., not .n, 32, 32, 3.: scale them"), ("none", "holds no array images, but pictures"),
                        ("broken", "truncated,? or no .npz"), ("missing", "there is no file"),
                        ("one", "--prompt has 2 <image> tokens, and there are 1 images")):
        with pytest.raises(common.UserError, match=words):
            resume(prompt=flags[-1], data=str(tmp_path / f"{name}.npz"))
    for how, words in ((dict(data=str(tmp_path / "own.npz")), "needs a --prompt"), (dict(data="shapes", prompt="a"), "--data takes scenes, or an .npz"),
                       (dict(prompt="<image> a sphere"), "has no word 'sphere'"), (dict(prompt="a " * 70), "shorten it"),
                       (dict(prompt="<image> " * 13), "13 <image> tokens, and there are 12 images of --data scenes")):
        with pytest.raises(common.UserError, match=words):
            resume(**dict(prompt="") | how)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_a_gpt_of_bytes_and_the_vit_of_a_mae(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a red circle is a dax. " * 200)
    gpt.main(gpt.Args(data=str(tmp_path / "text.txt"), dim=16, heads=2, depth=2, batch=4, context=64, length=5, steps=2, dropout=.5,
                      device="cpu", out=str(tmp_path / "gpt")))
    monkeypatch.setattr(mae, "few_labels", lambda *_: {f"{name}, linear probe": [0.] for name in ("MAE", "untrained ViT")})
    mae.main(mae.Args(dim=16, heads=2, depth=1, decoder_dim=8, decoder_heads=2, decoder_depth=1, batch=8, steps=2, tune="linear", labels=(1,),
                      device="cpu", out=str(tmp_path / "mae")))
    process = run(*FLAGS, "--lm", tmp_path / "gpt", "--vit", tmp_path / "mae", "--out", tmp_path / "run", script="flamingo.py")
    assert process.returncode == 0 and "First" not in process.stdout and "Then" not in process.stdout, process.stderr
    weights = saved(tmp_path / "run")["model"]
    assert weights["lm.token_embed.weight"].shape == (257, 16) and weights["vit.patch_embed.weight"].shape == (16, 48)
    assert all(torch.equal(weights[f"lm.{k}"], v) for k, v in saved(tmp_path / "gpt")["model"].items())
    state = saved(tmp_path / "mae")
    assert all(torch.equal(weights[k.replace("encoder.", "vit.")], v) for k, v in state["model"].items() if k.startswith("encoder."))
    args = flamingo.Args(device="cpu", lm=str(tmp_path / "gpt"), vit=str(tmp_path / "mae"))
    vit, patch, statistics = flamingo.load_vit(args, args.vit)
    assert patch == 4 and statistics == {name: state["about"][name] for name in ("mean", "std")}      # those of its own images
    right = figures(tmp_path / "run")["right"]
    assert "new word, 1" in right and "caption, 3 figures" not in right        # too long, in bytes
    lines = figures(tmp_path / "run")["lines"]                                 # so a question comes first
    assert [line[:2] for line in lines if line[:2].strip()] == [f"{i:>2}" for i in range(1, 13)]


@pytest.mark.parametrize("how, words", [
    (dict(every=0), "--every must be .*1 or more, not 0"),
    (dict(latents=-1), "--latents must be .*0 or more, not -1"),
    (dict(context=20), "--context must be .*41 or more, not 20"),
    (dict(gate_start=math.nan), r"--gate-start must be .*in \[0, inf\], not nan"),
    (dict(shots=(1, -1)), r"--shots must be .*in \[0, 100\], not -1"),
    (dict(shots=(1500,)), r"--shots must be .*in \[0, 100\], not 1500"),
    (dict(images=100), "--images must be .*500 or more"),
    (dict(tests=5), "--tests must be .*12 or more"),
    (dict(lm_new_words=2.), r"--lm-new-words must be .*in \[0, 1\]"),
    (dict(new_words=-1.), r"--new-words must be .*in \[0, 1\]"),
    (dict(gate_lr=-1.), "--gate-lr must be .*0 or more"),
    (dict(lm_lr=-1.), "--lm-lr must be .*0 or more"),
    (dict(attend="none"), "--attend must be one of last, all, not 'none'"),
    (dict(patch=5), "a patch of 5 pixels does not divide images of 32 x 32 pixels"),
    (dict(heads=3), "16 channels cannot be divided among 3 heads"),
    (dict(vit_heads=3), "8 channels cannot be divided among 3 heads"),
    (dict(vit_dim=6), "6 channels cannot hold sines and cosines"),
    (dict(vit_batch=501), "--vit-batch 501 is more than the 500 --images")])
def test_bad_settings_are_found_before_the_training(how, words, tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, "log", lambda *_: pytest.fail("it trains"))
    with pytest.raises(ValueError, match=words):
        main(tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_bad_settings_on_the_command_line(tmp_path):
    for flags, status, words in (["--patch", 5], 1, "a patch of 5 pixels"), (["--every", 0], 2, "--every must be"), \
            (["--evry", 2], 2, "did you mean --every?"), (["--attend", "none"], 2, "invalid choice: 'none'"), \
            (["--vit-batch", 501], 1, "--vit-batch 501 is more than"):
        refused(call(*FLAGS, *flags, "--out", tmp_path / "out", script="flamingo.py"), status, words, script="flamingo.py")


def test_other_and_broken_folders(done, tmp_path):
    out = done[0]

    def no(words, error=ValueError, **how):
        with pytest.raises(error, match=words):
            main(tmp_path / "out", **{name: str(value) if name in ("lm", "vit") else value for name, value in how.items()})

    def broken(state):
        (tmp_path / "broken").mkdir(exist_ok=True)
        torch.save(state, tmp_path / "broken/checkpoint.pt")
        return tmp_path / "broken"
    no("there is no nowhere/checkpoint.pt: choose another --lm", lm="nowhere")
    no(f"holds no LM: try --lm {out}/lm", lm=out)
    no("holds no LM", lm=out / "vit")
    no(f"holds no ViT: try --vit {out}/vit", lm=out / "lm", vit=out)
    no("holds no ViT", lm=out / "lm", vit=out / "lm")
    no("a patch of 8 pixels does not divide images of 36 x 36", lm=out / "lm", vit=out / "vit", image_size=36, patch=6)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/checkpoint.pt").write_bytes(b"no checkpoint")
    no("not a checkpoint that can be read", lm=tmp_path / "broken")
    for script, flag in ("mae.py", "lm"), ("gpt.py", "vit"):
        no(f"written by {script}.*choose another --{flag}", **dict(lm=out / "lm") | {flag: broken(dict(script=script))})
    state = saved(out / "lm")
    no(r"trained on images \(shapes\).*another --lm", lm=broken({**state, "script": "gpt.py", "args": {**state["args"], "data": "shapes"}}))
    state["model"]["pos_embed.weight"] = state["model"]["pos_embed.weight"][:30]
    no("has 54 tokens and a context of 30, and 54 and at least 41 are needed", lm=broken(state))
    state["model"]["token_embed.weight"] = state["model"]["token_embed.weight"][:50]
    no("has 50 tokens", lm=broken(state))
    assert not (tmp_path / "out").exists()
    with pytest.raises(common.UserError, match="does not fit this model"):
        flamingo.main(flamingo.Args(resume=True, out=str(out / "lm"), device="cpu"))


def test_it_learns_to_see():
    """The multimodal training alone, gates from 0, between an LM and a ViT that were never trained: with the right images
    it can say the colour of new ones, with those of others it cannot."""
    tokens, args = common.SceneTokens(), types.SimpleNamespace(optimizer="adamw", lr=5e-3, weight_decay=.1, gate_lr=10.)
    scenes = common.Scenes(0, 2000, common.KINDS, single=True)
    colours = [list(common.COLOURS)[figures[0].colour] for figures in scenes.all]
    x = torch.tensor([tokens.encode(f"<end> <image> what colour is it ? {colour} <end>") for colour in colours])
    torch.manual_seed(0)
    lm, vit = flamingo.GPT(tokens.vocab, 64, 32, 2, 2), flamingo.ViT(32, 8, 32, 1, 2)
    for p in lm.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=.2)
    model = flamingo.Flamingo(lm.requires_grad_(False), vit, 8, tokens.image, latents=4)
    features = model.encode(flamingo.normalize(common.paint(scenes.all)))[:, None]
    optimizer, steps = flamingo.build_optimizer(args, model), 300
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * common.schedule(step, steps, .1) * group.get("times", 1.)
        i = torch.randint(1800, (32,))
        inputs, target = flamingo.mask(x[i], tokens.image)
        flamingo.distance(model(inputs, model.project(features[i])), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        inputs, target = flamingo.mask(x[1800:], tokens.image)
        right, wrong = (flamingo.distance(model(inputs, model.project(own))[:, -2:-1], target[:, -2:-1]).item()      # of the colour
                        for own in (features[1800:], features[1800:].roll(1, 0)))
    assert right < 1.6 and wrong > right + 1, (right, wrong)                   # a uniform guess: ln 8 = 2.08


def test_a_run_killed_before_its_evaluation_makes_it_on_resume(done, tmp_path):
    """Also with a --prompt, which a finished run only answers."""
    out = shutil.copytree(done[0], tmp_path / "run")
    (out / "result.json").unlink()
    again = run("--resume", "--steps", 0, "--out", out, "--prompt", "<image> what colour is it ?", script="flamingo.py")
    assert again.returncode == 0 and "exactly right, %" in again.stdout, again.stderr
    assert figures(out)["right"] == figures(done[0])["right"]


def test_what_is_easily_given_wrongly():
    """A gate as an int is a number, too; a mask instead of counts is refused."""
    assert flamingo.GatedCrossAttention(8, 8, 2, gate_start=1).mlp_gate.item() == 1.
    with pytest.raises(ValueError, match="so_far counts <image> tokens"):
        flamingo.media_mask(TEXT == IMAGE, 3, 4)
