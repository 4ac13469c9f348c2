"""gpt.py against OpenAI's forward written in numpy, torch's own layer, prefixes, and sampling by hand."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, refused, run
from torch import nn

import common
import gpt

BOS = common.Bytes.BOS
SMALL = "--dim 16 --heads 2 --depth 1 --batch 4 --context 16 --length 20 --dtype float32 --device cpu".split()


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = gpt.GPT(vocab=30, context=16, dim=24, depth=2, heads=3)
    for p in model.parameters():              # biases and norms, too, must matter
        nn.init.normal_(p, std=.3)
    return model.eval()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return path


# ------------------------------------------------------------------------------------- the model


def test_block_equals_torchs_transformer_layer():
    torch.manual_seed(0)
    block, names = gpt.Block(24, 3).double(), {
        "attn.qkv.weight": "self_attn.in_proj_weight", "attn.qkv.bias": "self_attn.in_proj_bias",
        "attn.proj": "self_attn.out_proj", "mlp.fc1": "linear1", "mlp.fc2": "linear2"}
    layer = nn.TransformerEncoderLayer(24, 3, 96, dropout=0, activation=lambda x: F.gelu(x, approximate="tanh"),
                                       norm_first=True, batch_first=True, layer_norm_eps=1e-5).double()
    state = {}
    for key, value in block.state_dict().items():
        nn.init.normal_(value, std=.3)
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[key] = value
    layer.load_state_dict(state)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    torch.testing.assert_close(block(x), layer(x, src_mask=causal, is_causal=True), rtol=1e-9, atol=1e-9)


def openai_names(model):
    """Our tensors under the names and in the layout of OpenAI's release: matrices are (in, out)."""
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in [("token_embed.weight", "wte"), ("pos_embed.weight", "wpe"), ("blocks.", "h"),
                             ("norm1", "ln_1"), ("norm2", "ln_2"), ("norm.", "ln_f."), ("attn.qkv", "attn.c_attn"),
                             ("attn.proj", "attn.c_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")]:
            name = name.replace(ours, theirs)
        norm = "ln_" in name
        name = name.replace(".weight", ".g" if norm else ".w").replace(".bias", ".b")
        state[name] = (value.T if value.ndim == 2 and name.startswith("h") else value).double().numpy()
    return state


def openai(p, tokens, heads):
    """GPT-2's forward from its description, in numpy: tokens (T,) -> logits (T, V)."""
    norm = lambda x, n: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p[n + ".g"] + p[n + ".b"]
    gelu = lambda x: .5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + .044715 * x ** 3)))
    linear = lambda x, n: x @ p[n + ".w"] + p[n + ".b"]
    x = p["wte"][tokens] + p["wpe"][:len(tokens)]
    for i in range(sum(name.endswith("ln_1.g") for name in p)):
        q, k, v = np.split(linear(norm(x, f"h{i}.ln_1"), f"h{i}.attn.c_attn"), 3, axis=-1)
        D, out = q.shape[1] // heads, []
        for h in range(heads):
            s = slice(h * D, (h + 1) * D)
            for t in range(len(tokens)):                                 # token t, to those up to itself
                w = np.exp(q[t, s] @ k[:t + 1, s].T / np.sqrt(D))
                out.append(w / w.sum() @ v[:t + 1, s])
        a = np.array(out).reshape(heads, len(tokens), D).transpose(1, 0, 2).reshape(len(tokens), -1)
        x = x + linear(a, f"h{i}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"h{i}.ln_2"), f"h{i}.mlp.c_fc")), f"h{i}.mlp.c_proj")
    return norm(x, "ln_f") @ p["wte"].T


def test_logits_equal_openais_by_renaming(small):
    tokens = torch.randint(30, (2, 16))
    for row, logits in zip(tokens, small.double()(tokens)):
        np.testing.assert_allclose(logits.detach().numpy(), openai(openai_names(small), row.numpy(), 3), rtol=1e-9, atol=1e-9)


def test_gpt2_has_its_148_tensors_and_124_million_parameters():
    with torch.device("meta"):
        model = gpt.GPT(50257, 1024, 768, 12, 12)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert len(model.state_dict()) == 148 and len(list(model.parameters())) == 148       # the head is tied


def test_the_first_weights_are_gpt2s():
    torch.manual_seed(0)
    model = gpt.GPT(1000, 400, 64, 8, 4)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            residual = "proj" in name or "fc2" in name
            std = .01 if name.startswith("pos") else .02 / math.sqrt(16) if residual else .02
            assert abs(p.std() / std - 1) < .05, name
        else:
            assert torch.equal(p, torch.full_like(p, float("norm" in name and name.endswith("weight")))), name
    x = torch.randint(1000, (4, 100))
    assert abs(gpt.distance(model(gpt.mask(x, 0)[0]), x) - math.log(1000)) < .1           # a uniform guess


def test_no_token_depends_on_a_later_one(small):
    x = torch.randint(30, (1, 16))
    before = small(x)
    for t in range(16):
        y = x.clone()
        y[0, t] = (y[0, t] + 1) % 30
        after = small(y)
        assert torch.equal(after[:, :t], before[:, :t])
        assert ((after - before)[0, t:].abs().amax(1) > 1e-6).all()                       # all from t on change


def test_dropout_falls_on_every_branch_in_training_only(small):
    x = torch.randint(30, (2, 8))
    model = gpt.GPT(30, 16, 24, 2, 3, dropout=.3)
    model.load_state_dict(small.state_dict())
    assert torch.equal(model.eval()(x), small(x))
    assert not torch.equal(model.train()(x), model(x))
    for part, args in (model.blocks[0].attn, (torch.ones(1, 4, 24),)), (model.blocks[0].mlp, (torch.ones(1, 4, 24),)):
        zeros = (part(*args) == 0).float().mean()                                         # whole channels are gone
        assert .05 < zeros < .6 and (part.eval()(*args) != 0).all()


# ------------------------------------------------------------------------- mask, predict, compare


def test_an_autoregressive_model_is_a_masked_autoencoder_with_a_causal_mask(small):
    """The lecture's claim. The recipe of a masked autoencoder, mask a part and predict it from the rest,
    done T times by hand, where token t and all after it are cut off and the target is token t alone:
    its mean loss is GPT's, and its gradient is GPT's gradient."""
    small.double()
    x, T, mean = torch.randint(29, (3, 9)), 9, 0.
    for t in range(T):
        visible = torch.cat([torch.full((3, 1), 29), x[:, :t]], 1)                        # BOS is 29 here
        mean = mean + F.cross_entropy(small(visible)[:, -1], x[:, t]) / T
    recipe = torch.autograd.grad(mean, list(small.parameters()))
    inputs, target = gpt.mask(x, 29)
    loss = gpt.distance(small(inputs), target)
    torch.testing.assert_close(loss.double(), mean, rtol=1e-6, atol=1e-6)                 # the loss is float32
    for a, b in zip(torch.autograd.grad(loss, list(small.parameters())), recipe):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_mask_shifts_by_one_and_every_token_is_a_target():
    x = torch.arange(6).view(2, 3)
    inputs, target = gpt.mask(x, 99)
    assert inputs.tolist() == [[99, 0, 1], [99, 3, 4]] and target is x


def test_distance_by_hand():
    logits = torch.tensor([[[0., math.log(3)], [2., 2.]]])
    loss = gpt.distance(logits, torch.tensor([[1, 0]]))
    assert abs(loss - (math.log(4 / 3) + math.log(2)) / 2) < 1e-6


# ------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("cuts", [[16], [1] * 16, [5] + [1] * 11, [3, 4, 1, 6, 2], [15, 1], [1, 15]])
def test_cached_logits_equal_uncached(small, cuts):
    x = torch.randint(30, (3, 16))
    whole, cache, found = small(x), small.new_cache(3), []
    for chunk in x.split(cuts, 1):
        found.append(small(chunk, cache))
        assert {block.length for block in cache} == {sum(f.shape[1] for f in found)}
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-5, atol=1e-5)


def test_the_cache_is_allocated_once_and_holds_keys_and_values(small):
    cache, x = small.new_cache(2), torch.randint(30, (2, 9))
    addresses = [block.k.data_ptr() for block in cache]
    small(x[:, :5], cache), small(x[:, 5:], cache)
    assert [block.k.data_ptr() for block in cache] == addresses and cache[0].k.shape == (2, 3, 16, 8)
    block = small.blocks[0]
    _, k, v = block.attn.qkv(block.norm1(small.token_embed(x) + small.pos_embed.weight[:9])).view(2, 9, 3, 3, 8).unbind(2)
    torch.testing.assert_close(cache[0].k[:, :, :9], k.transpose(1, 2))
    torch.testing.assert_close(cache[0].v[:, :, :9], v.transpose(1, 2))


def test_more_than_the_context_is_an_error(small):
    with pytest.raises(ValueError, match="17 tokens are more than the context of 16"):
        small(torch.zeros(1, 17, dtype=torch.int64))
    cache = small.new_cache(1)
    small(torch.zeros(1, 15, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="17 tokens"):                                    # a slice of one position would fit any
        small(torch.zeros(1, 2, dtype=torch.int64), cache)


def test_the_model_can_be_exported_for_any_length(small):
    tokens = lambda T: torch.randint(30, (2, T))
    length = torch.export.Dim("T", min=2, max=16)
    exported = torch.export.export(small, (tokens(8),), dynamic_shapes=({1: length},)).module()
    for T in 2, 13, 16:
        torch.testing.assert_close(exported(x := tokens(T)), small(x))


class Recorder(nn.Module):
    """A model that keeps the last logits of every call."""

    def __init__(self, model):
        super().__init__()
        self.model, self.logits, self.sizes = model, [], []
        self.pos_embed, self.new_cache = model.pos_embed, model.new_cache

    def forward(self, tokens, cache=None):
        logits = self.model(tokens, cache)
        self.logits.append(logits[:, -1])
        self.sizes.append(tokens.shape[1])
        return logits


def by_hand(model, prompt, n, bos):
    """One text, continued greedily without a cache: the rule of a full context from its description."""
    window, new, found, context = [bos, *prompt], [], [], len(model.pos_embed.weight)
    for _ in range(n):
        found.append(model(torch.tensor([window]))[0, -1])
        new.append(int(found[-1].argmax()))
        window.append(new[-1])
        if len(window) > context:
            window = [bos] + window[-(context // 2):]
    return new, torch.stack(found)


def test_sampling_with_the_cache_equals_sampling_by_hand(small):
    """Prefill, then a token at a time: the same logits and tokens as whole texts without a cache."""
    prompt, recorder = torch.randint(30, (3, 4)), Recorder(small)
    new = gpt.sample(recorder, prompt, 12, temperature=0.)
    assert recorder.sizes == [4] + [1] * 11 and new.shape == (3, 12)
    for i, row in enumerate(prompt):
        expected, logits = by_hand(small, row[1:].tolist(), 12, int(row[0]))
        assert new[i].tolist() == expected
        torch.testing.assert_close(torch.stack(recorder.logits)[:, i], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [0, 3, 9, 14, 15])
def test_past_a_full_context_the_text_equals_that_by_hand(small, length):
    prompt, recorder = torch.randint(29, (length,)), Recorder(small)
    new = gpt.sample_text(recorder, prompt, 40, 29, temperature=0.)
    expected, logits = by_hand(small, prompt.tolist(), 40, 29)
    assert new.tolist() == expected
    torch.testing.assert_close(torch.cat(recorder.logits), logits, rtol=1e-5, atol=1e-5)
    assert recorder.sizes[0] == 1 + length and recorder.sizes.count(9) == math.ceil((24 + length) / 8)    # BOS and 8


def test_a_prompt_has_to_fit(small):
    assert len(gpt.sample_text(small, torch.zeros(15, dtype=torch.int64), 3, 29)) == 3
    with pytest.raises(ValueError, match="17 tokens are more than the context of 16"):
        gpt.sample_text(small, torch.zeros(16, dtype=torch.int64), 3, 29)
    with pytest.raises(ValueError, match="17 tokens are more than the context of 16"):
        gpt.sample(small, torch.zeros(1, 14, dtype=torch.int64), 4)


# ------------------------------------------------------------------------------------- sampling


def test_distribution_by_hand():
    logits = torch.tensor([[.1, .2, .4, .3]]).log()
    p = lambda **how: gpt.distribution(logits, **how)[0].tolist()
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    close(p(), [.1, .2, .4, .3])
    close(p(temperature=.5), np.array([1, 4, 16, 9]) / 30)                                # p^2, to sum 1
    close(p(temperature=2.), np.sqrt([1, 2, 4, 3]) / np.sqrt([1, 2, 4, 3]).sum())
    close(p(temperature=0.), [0, 0, 1, 0])
    close(p(top_k=2), [0, 0, 4 / 7, 3 / 7])
    close(p(top_k=9), [.1, .2, .4, .3])
    close(p(top_p=.39), [0, 0, 1, 0])
    close(p(top_p=.41), [0, 0, 4 / 7, 3 / 7])                                             # the one that crosses p counts
    close(p(top_p=.89), [0, 2 / 9, 4 / 9, 3 / 9])
    close(p(top_k=3, top_p=.7), [0, 0, 4 / 7, 3 / 7])                                     # of 4/9, 3/9, 2/9: 7/9 passes .7
    close(p(temperature=.5, top_k=2), [0, 0, 16 / 25, 9 / 25])


def test_rows_of_a_distribution_are_their_own():
    logits = torch.randn(5, 12)
    for how in dict(top_k=4), dict(top_p=.6), dict(temperature=0.):
        rows = torch.cat([gpt.distribution(row[None], **how) for row in logits])
        torch.testing.assert_close(gpt.distribution(logits, **how), rows)


def test_the_nucleus_is_the_smallest_that_reaches_p():
    """Sums that are exact in theory and rounded in practice: ten equal tokens, p = 0.3: three of them."""
    for V in 10, 100:
        for k in range(1, V):
            p = gpt.distribution(torch.zeros(1, V), top_p=k / V)[0]
            assert (p > 0).sum() == k and abs(p.sum() - 1) < 1e-6, (V, k)
    p = gpt.distribution(torch.tensor([[0., 1., 5.]]), top_p=0.)                          # at least one
    assert p.tolist() == [[0., 0., 1.]]


def test_extreme_logits_give_finite_distributions():
    for logits in torch.tensor([[1e4, 0., -1e4]]), torch.tensor([[-math.inf, 0., 0.]]), torch.zeros(1, 3):
        for how in dict(temperature=1e-5), dict(temperature=.1, top_k=2), dict(top_p=.5), dict(temperature=100.):
            p = gpt.distribution(logits, **how)
            assert p.isfinite().all() and abs(p.sum() - 1) < 1e-6


def test_greedy_is_deterministic_and_a_seed_is_a_text(small):
    def text(seed, **how):
        torch.manual_seed(seed)
        return gpt.sample_text(small, torch.tensor([3, 1, 4]), 30, 29, **how).tolist()
    assert text(1, temperature=0.) == text(2, temperature=0.) == text(3, top_k=1)
    assert text(1) == text(1) != text(2)


def test_samples_have_the_frequencies_of_the_model(small):
    """The token after BOS, sampled 4000 times, against its distribution: chi squared."""
    torch.manual_seed(0)
    for how in dict(temperature=1.5), dict(top_k=5), dict(top_p=.7):
        count = gpt.sample(small, torch.full((4000, 1), 29), 1, **how).flatten().bincount(minlength=30)
        expected = 4000 * gpt.distribution(small(torch.tensor([[29]]))[:, -1], **how)[0]
        assert (count[expected == 0] == 0).all()
        likely = expected > 5
        assert likely.sum() > 2
        chi = ((count[likely] - expected[likely]) ** 2 / expected[likely]).sum()
        assert chi < likely.sum() + 5 * math.sqrt(2 * likely.sum())


def test_rows_of_a_batch_are_sampled_independently(small):
    torch.manual_seed(0)
    new = gpt.sample(small, torch.full((50, 1), 29), 15, temperature=2.)
    assert len({tuple(row) for row in new.tolist()}) == 50


def test_a_stop_token_ends_a_text_and_is_left_out(small):
    def text(prompt, **how):
        torch.manual_seed(3)
        return gpt.sample_text(small, torch.tensor(prompt), 40, 29, **how).tolist()
    whole = text([4, 4])
    for stop in set(whole):                                    # early, late, before and after a full context
        assert text([4, 4], stop=stop) == whole[:whole.index(stop)]
    never = next(t for t in range(30) if t not in whole)
    assert text([4, 4], stop=never) == whole
    assert text([4, 4, 7], stop=4) == (lambda w: w[:w.index(4)] if 4 in w else w)(text([4, 4, 7]))    # the prompt's do not count


# ------------------------------------------------------------------------------------------ data


def test_windows_and_the_loss_on_them(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 5)
    (tmp_path / "b.txt").write_text("0123456789" * 4)
    args = gpt.Args(data=str(tmp_path), context=3, device="cpu", dtype="float32")
    train, val = common.windows(args, args.data, args.context, gpt.BYTES)
    decode = lambda row: common.Bytes().decode(row)
    assert train.shape == (45 + 36 + 2 - 2, 3) and train[0].tolist() == [BOS, 97, 98]     # 90 % of each, and BOS
    assert decode(train[1]) == "abc" and train[44].tolist() == [ord("d"), ord("e"), BOS]
    assert val.tolist() == [[BOS, *b"fg"], [*b"hij"], [BOS, *b"67"]]                       # the remainder does not fill a window
    torch.manual_seed(0)
    model = gpt.GPT(257, 3, 8, 1, 2)
    nats, bits = gpt.evaluate(args, model, val)
    losses = [F.cross_entropy(model(torch.tensor([[BOS, *row[:t]]]))[0, -1], row[t]).item() for row in val.long() for t in range(3)]
    assert abs(nats - np.mean(losses)) < 1e-5 and abs(bits - sum(losses) / math.log(2) / 7) < 1e-5    # 7 bytes, 2 BOS


def test_pixels_are_means_of_squares(tiny):
    args = gpt.Args(data=str(tiny), image_size=4, device="cpu")
    train, val = gpt.pixels(args)
    x = common.load_images(args).train
    assert train.shape == (64, 16) and val.shape == (20, 16) and train.dtype == torch.uint8
    for i, r, c in (0, 0, 0), (5, 1, 2), (63, 3, 3):
        mean = x[i, :, 2 * r:2 * r + 2, 2 * c:2 * c + 2].double().mean()
        assert abs(train[i, 4 * r + c] - mean) <= .51


def test_a_model_learns_a_sentence():
    torch.manual_seed(0)
    x = common.Bytes().encode("to be, or not to be: ")[None]
    model = gpt.GPT(257, 24, 32, 2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(150):
        inputs, target = gpt.mask(x, BOS)
        loss = gpt.distance(model(inputs), target)
        loss.backward(), optimizer.step(), optimizer.zero_grad()
    new = gpt.sample_text(model, x[0, :6], 15, BOS, temperature=0.)
    assert loss < .1 and common.Bytes().decode(new) == " or not to be: "


# -------------------------------------------------------------------------------------- the whole


def test_the_whole_script_and_a_sample_without_training(text, tmp_path):
    out = tmp_path / "run"
    done = run("--data", text, "--steps", 60, "--lr", .01, "--out", out, *SMALL, "--prompt", "the fox", script="gpt.py")
    assert done.returncode == 0, done.stderr
    figures = json.loads((out / "result.json").read_text())["figures"]
    assert f"\n\n{figures['text']}\n\n" in done.stdout and figures["text"].startswith("the fox")
    flat = " ".join(done.stdout.split())
    assert f"{figures['loss']:.3f} nats per token (uniform guess 5.549)" in flat
    assert figures["loss"] < 4 and figures["bits"] == pytest.approx(figures["loss"] / math.log(2), rel=.1)
    again = run("--steps", 0, "--resume", "--out", out, "--prompt", "a dog", "--temperature", 0, script="gpt.py")
    assert again.returncode == 0 and "\n\na dog" in again.stdout, again.stderr
    after = json.loads((out / "result.json").read_text())
    assert after["figures"]["loss"] == figures["loss"] and after["settings"]["steps"] == 60    # what was trained


def test_pixels_are_completed(tiny, tmp_path):
    flags = ["--data", tiny, "--image-size", 4, "--steps", 20, "--out", tmp_path / "run", *SMALL]
    done = run(*flags, script="gpt.py")
    assert done.returncode == 0 and "completions.png" in done.stdout and "bits per pixel" in " ".join(done.stdout.split()), done.stderr
    assert (tmp_path / "run/completions.png").read_bytes()[:4] == b"\x89PNG"
    figures = json.loads((tmp_path / "run/result.json").read_text())["figures"]
    assert figures["text"] is None and figures["bits"] == pytest.approx(figures["loss"] / math.log(2))


@pytest.mark.parametrize("size", [4, 3])
def test_completions_keep_the_upper_half(tiny, tmp_path, monkeypatch, size):
    if size == 3:                                                   # an odd side: the upper row of three
        images = np.load(tiny)
        tiny = tmp_path / "six.npz"
        np.savez(tiny, **{k: v[:, :6, :6] if k.startswith("x") else v for k, v in images.items()})
    args = gpt.Args(data=str(tiny), image_size=size, device="cpu", dtype="float32", out=str(tmp_path))
    _, val = gpt.pixels(args)
    sheets = []
    monkeypatch.setattr(common, "save_png", lambda path, x, *a, **k: sheets.append(x))
    torch.manual_seed(0)
    gpt.complete(args, gpt.GPT(257, size ** 2, 16, 1, 2).eval(), val)
    given, first, second, whole = (255 * sheets[0][:, 0].view(12, 4, size, size)).round().unbind(1)
    half = size // 2
    assert torch.equal(whole, val[:12].view(12, size, size).float())
    for x in given, first, second:
        assert torch.equal(x[:, :half], whole[:, :half]) and not torch.equal(x[:, half:], whole[:, half:])
    assert (given[:, half:] == 128).all() and not torch.equal(first, second)


def test_a_text_ends_where_its_document_does_and_a_pixel_is_a_byte(tiny, tmp_path, monkeypatch):
    """With a model that predicts nothing but BOS."""
    model = gpt.GPT(257, 16, 8, 1, 2)
    for p in model.parameters():
        nn.init.zeros_(p)
    model.norm.bias.data.fill_(1.)
    model.token_embed.weight.data[BOS] = 9.
    args = gpt.Args(data=str(tiny), image_size=4, device="cpu", dtype="float32", out=str(tmp_path), prompt="Here")
    sheets = []
    monkeypatch.setattr(common, "save_png", lambda path, x, *a, **k: sheets.append(x))
    gpt.complete(args, model, gpt.pixels(args)[1])
    assert (sheets[0].view(12, 4, 3, 4, 4)[:, 1:3, :, 2:] == 1).all()
    assert gpt.write(args, model, gpt.prompt_tokens(args)) == "Here"


@pytest.mark.parametrize("flags, words", [
    ("--temperature -1", ["--temperature must be 0 or more, not -1.0"]),
    ("--top-k -1", ["--top-k must be 0 or more, not -1"]),
    ("--top-p 0", ["--top-p must be in (0, 1], not 0.0"]),
    ("--top-p 1.5", ["--top-p must be in (0, 1], not 1.5"]),
    ("--context 1", ["--context must be 2 or more, not 1"]),
    ("--dropout 1", ["--dropout must be in [0, 1), not 1.0"]),
    ("--length 0", ["--length must be 1 or more, not 0"]),
    ("--image-size 1", ["--image-size must be 2 or more, not 1"]),
    ("--depth 0", ["--depth must be 1 or more, not 0"]),
    ("--promt x", ["unknown flag --promt", "did you mean --prompt?"]),
])
def test_a_bad_flag_gets_one_sentence(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        common.cli(gpt.main, gpt.Args, flags.split())
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("gpt.py: ") and text.count("\n") == 1
    assert all(word in text for word in words), text
    assert not list(tmp_path.iterdir())


def test_greedy_and_all_tokens_are_no_bad_flags():
    args = common.resolve(gpt.Args(**vars(common.parser_of(gpt.Args).parse_args(
        "--temperature 0 --top-k 0 --prompt= --top-p 1 --device cpu".split()))))
    assert (args.temperature, args.top_k, args.prompt, args.top_p) == (0, 0, "", 1)


@pytest.mark.parametrize("flags, words", [
    ("--dim 30 --heads 4", ["30 channels cannot be divided among 4 heads"]),
    ("--prompt abcdefgh --context 8", ["--prompt has 8 tokens, and --context 8 holds 7", "shorten it"]),
])
def test_settings_that_do_not_fit_get_one_sentence(text, tmp_path, flags, words):
    """Before the training, not after it; and nothing is left behind."""
    out = tmp_path / "run"
    refused(call("--data", text, "--out", out, *SMALL, *flags.split(), script="gpt.py"), 1, *words, script="gpt.py")
    assert not out.exists()


def test_texts_that_will_not_do(tmp_path):
    for content, words in (b" \n", ["is empty"]), (b"short", ["a context of 16 needs as many", "longer text"]):
        (tmp_path / "x.txt").write_bytes(content)
        refused(call("--data", tmp_path / "x.txt", "--out", tmp_path / "run", *SMALL, script="gpt.py"), 1, *words, script="gpt.py")
    refused(call("--data", tmp_path / "none.txt", "--out", tmp_path / "run", *SMALL, script="gpt.py"), 1,
            "there is no text", "--data takes pydocs", script="gpt.py")


def test_bytes_that_are_not_utf8_work(tmp_path):
    (tmp_path / "x.txt").write_bytes(bytes(range(256)) * 4)
    done = run("--data", tmp_path / "x.txt", "--out", tmp_path / "run", "--steps", 2, *SMALL, "--prompt", "\\", script="gpt.py")
    assert done.returncode == 0, done.stderr


def test_sample_text_takes_one_prompt():
    with pytest.raises(ValueError, match=r"takes one prompt \(T,\), not \(1, 3\)"):
        gpt.sample_text(gpt.GPT(257, 12, 8, 1, 2).eval(), torch.zeros(1, 3, dtype=torch.int64), 4, bos=256)
