"""lora.py beside the peft package on GPT2LMHeadModel of transformers, with the same weights.

    make bench-lora                             all cases, about 4 minutes on 2 cores
    make bench-lora ARGS="--cases step --rounds 40"

step      a training step of LoRA, rank 8 on qkv, of a 6 x 384 GPT, 257 tokens, context 256, batch
          8: forward, loss, backward, fused AdamW over what is trained
memory    the same, each side in a process of its own, 5 steps: the most memory that the process
          had (VmHWM), and how much of it came after the imports

Both sides have the same weights, A and B included, and must agree on the loss and on the gradients
of A and B before they are timed. In bfloat16 a step runs under autocast. Timed in turns; the ratio
is the median over rounds of theirs / ours (above 1: ours is faster), with the middle half in
brackets.

Their side runs as it comes, and once more with what makes it faster in training: the fused GELU
(the same function as GPT-2's default, which is written out in Python) and no cache.
"""
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

import torch

from pairs import DEVICE, autocast, bench, pair, training       # first: it finds the scripts
import pairs
import lora

pairs.CONTEXT = 256                                   # as --context there

CASES = ["step", "memory"]
NEEDS = dict.fromkeys(CASES, ["transformers.GPT2LMHeadModel", "peft.get_peft_model"])
HOW = dict(vocab=257, context=256, dim=384, depth=6, heads=6)
RANK, ALPHA, BATCH = 8, 16., 8
FUSED = ", fused GELU, no cache"
NAME = "step, 6 x 384, context 256, batch 8, rank 8 on qkv"

# GPT-2's matrices are transposed, and A and B have each other's names
RENAMED = [("token_embed", "wte"), ("pos_embed", "wpe"), ("blocks.", "h."), ("norm1", "ln_1"),
           ("norm2", "ln_2"), ("attn.qkv.linear", "attn.c_attn.base_layer"),
           ("attn.qkv.A", "attn.c_attn.lora_B.default.weight"),
           ("attn.qkv.B", "attn.c_attn.lora_A.default.weight"), ("attn.proj", "attn.c_proj"),
           ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")]


def ours():
    """Our GPT with LoRA; A is not zero, so that all gradients can be compared."""
    torch.manual_seed(0)
    model = lora.adapt(lora.GPT(**HOW), "lora", ["qkv"], RANK, ALPHA)
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        torch.nn.init.normal_(p, std=.05)
    return model.to(DEVICE)


def theirs(fused):
    """GPT2LMHeadModel with peft's LoRA, with other weights; fused: with what is faster in training
    than its defaults."""
    import peft
    import transformers
    faster = dict(activation_function="gelu_pytorch_tanh", use_cache=False) if fused else {}
    config = transformers.GPT2Config(
        vocab_size=HOW["vocab"], n_positions=HOW["context"], n_embd=HOW["dim"],
        n_layer=HOW["depth"], n_head=HOW["heads"], resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.,
        bos_token_id=256, eos_token_id=None, **faster)
    how = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), how)
    return model.to(DEVICE).train()


def copy_weights(mine, other):
    """Gives peft's model our weights."""
    state = {}
    for name, value in mine.state_dict().items():
        if name.endswith("_extra_state"):
            continue
        for a, b in RENAMED:
            name = name.replace(a, b)
        name = f"ln_f{name[4:]}" if name.startswith("norm") else name
        transposed = value.ndim == 2 and name.startswith("h.") and "lora_B" not in name
        state[f"base_model.model.transformer.{name}"] = value.T if transposed else value
    wrong = other.load_state_dict(state, strict=False)
    assert wrong.missing_keys == ["base_model.model.lm_head.weight"] \
        and not wrong.unexpected_keys, wrong                                      # it is tied


def sides(which, dtype, fused):
    """{side: (model, its loss, a training step)}"""
    torch.manual_seed(1)
    inputs, target = lora.mask(torch.randint(256, (BATCH, 256), device=DEVICE), 256)
    built = {}
    for side in which:
        model = ours() if side == "ours" else theirs(fused)
        logits = model if side == "ours" else lambda x, model=model: model(x).logits
        loss = lambda logits=logits: lora.distance(logits(inputs), target)
        built[side] = model, loss, training(loss, model, dtype, side == "ours")
    return built


def agree(mine, other):
    """Stops the benchmark unless losses and gradients of A and B are equal."""
    (a, a_loss, _), (b, b_loss, _) = mine, other
    copy_weights(a, b)
    with autocast("float32"):
        x = a_loss()
    y = b_loss()
    x.backward(), y.backward()
    assert abs(x - y) < 1e-5, (x, y)
    grads = {name: p.grad for name, p in b.named_parameters() if p.requires_grad}
    assert len(grads) == len(lora.adapter_state(a)) == 2 * HOW["depth"]
    for i, block in enumerate(a.blocks):
        prefix = f"base_model.model.transformer.h.{i}.attn.c_attn.lora_"
        for p, name in (block.attn.qkv.A, "B"), (block.attn.qkv.B, "A"):
            grad = grads[f"{prefix}{name}.default.weight"]
            grad = grad if p.shape == grad.shape else grad.T
            assert (p.grad - grad).abs().max() < 1e-4 * grad.abs().max(), prefix
    for model in (a, b):
        model.zero_grad()


def timed_step(dtype, fused, rounds):
    """The figures of the case `step`."""
    built = sides(("ours", "theirs"), dtype, fused)
    agree(built["ours"], built["theirs"])
    return dict(case=NAME, beside="peft" + FUSED * fused,
                **pair(built["ours"][2], built["theirs"][2], rounds))


def peak(side, dtype, fused):
    """In a process of its own: prints the most memory it had, in MB, and what it had before the
    model."""
    status = Path("/proc/self/status")
    high = lambda: int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e6
    if side == "theirs":
        import peft
        import transformers
        transformers.GPT2LMHeadModel, peft.get_peft_model                       # lazily imported
    before = high()
    _, _, run = sides([side], dtype, fused)[side]
    for _ in range(5):
        run()
    print(json.dumps([high(), before]))


def memory(dtype, fused, times=3):
    """The figures of the case `memory`: medians of several processes per side."""
    found = {"ours": [], "theirs": []}
    for _ in range(times):
        for side in found:
            line = [sys.executable, __file__, "peak", side, dtype, "fused" * fused]
            done = subprocess.run(line, check=True, capture_output=True, text=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    mb = {side: [sorted(column)[times // 2] for column in zip(*runs)]
          for side, runs in found.items()}
    (a, a0), (b, b0) = mb["ours"], mb["theirs"]
    return dict(case=NAME.replace("step", "memory"), beside="peft" + FUSED * fused, ours_mb=a,
                theirs_mb=b, ratio=b / a, ours_after_imports_mb=a - a0,
                theirs_after_imports_mb=b - b0, ratio_after_imports=(b - b0) / (a - a0))


def measure(case, dtype, rounds):
    """The figures of a case, beside peft as it comes and with its faster settings."""
    return [timed_step(dtype, fused, rounds) if case == "step" else memory(dtype, fused)
            for fused in (False, True)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:                                    # memory() runs this file again
        side, dtype, fused = sys.argv[2:]
        peak(side, dtype, bool(fused))
    else:
        bench(__doc__, CASES, measure, NEEDS)
