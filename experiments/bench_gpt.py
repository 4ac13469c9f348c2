"""gpt.py beside GPT2LMHeadModel of the transformers package, with the same weights.

    make bench-gpt                              all cases, about 8 minutes on 2 cores
    make bench-gpt ARGS="--cases step --rounds 30"

step      a training step: forward, loss, backward, fused AdamW; 6 x 384, 257 tokens, context 256,
          batch 8
sample    256 tokens, greedy, with both caches, after a prompt of 17 tokens: 6 x 384, batch 1
sample16  the same, batch 16
sample124M  the same with GPT-2's 124M, batch 1
uncached  the same at 6 x 384, batch 1, beside our own model without its cache

Both sides have the same weights, and must agree before they are timed: on the loss of a step, and
on the logits after the prompt (the texts themselves differ from where two tokens are equally
likely, up to rounding). In bfloat16 a step runs under autocast, and for sampling the weights are
bfloat16. Timed in turns; the ratio is the median over rounds of theirs / ours (above 1: ours is
faster), with the middle half in brackets.
"""
import torch
from torch.nn import functional as F

from pairs import DEVICE, agree, bench, pair, training           # first: it finds the scripts
import pairs
import gpt, lora

pairs.CONTEXT = 256                                   # as --context there

SMALL = dict(vocab=257, context=512, dim=384, depth=6, heads=6)
GPT2 = dict(vocab=50257, context=1024, dim=768, depth=12, heads=12)


def peer(ours, vocab, context, dim, depth, heads):
    """GPT2LMHeadModel with our weights."""
    import transformers
    config = transformers.GPT2Config(
        vocab_size=vocab, n_positions=context, n_embd=dim, n_layer=depth, n_head=heads,
        resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., bos_token_id=vocab - 1, eos_token_id=None,
        pad_token_id=vocab - 1)
    theirs = transformers.GPT2LMHeadModel(config)
    wrong = theirs.load_state_dict(lora.publish(ours), strict=False)
    assert wrong.missing_keys == ["lm_head.weight"] and not wrong.unexpected_keys, wrong    # tied
    return theirs.to(DEVICE)


def step(dtype):
    """A training step of ours and of theirs."""
    torch.manual_seed(0)
    how = SMALL | dict(context=256)
    ours = gpt.GPT(**how).to(DEVICE)
    theirs = peer(ours, **how).train()
    inputs, target = gpt.mask(torch.randint(256, (8, 256), device=DEVICE), 256)

    def their_loss():
        return gpt.distance(theirs(inputs).logits, target)

    def our_loss():
        return gpt.distance(ours(inputs), target)

    with torch.no_grad():
        agree("the loss", our_loss(), their_loss(), 1e-4)
    return ("step, 6 x 384, context 256, batch 8", "GPT2LMHeadModel",
            training(our_loss, ours, dtype), training(their_loss, theirs, dtype, ours=False))


def uncached(model, x, n):
    """What gpt.sample(model, x, n, temperature=0.) gives, from the whole text each time."""
    start = x.shape[1]
    with torch.inference_mode():
        for _ in range(n):
            x = torch.cat([x, model(x)[:, -1].argmax(1, keepdim=True)], 1)
    return x[:, start:]


def sampling(dtype, how, batch, n=256, cached=True):
    """Sampling n tokens: ours with the cache, beside theirs or beside ours without."""
    torch.manual_seed(0)
    ours = gpt.GPT(**how).to(DEVICE).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=.06) if p.ndim > 1 else None    # a text that does not repeat
    theirs = peer(ours, **how).eval().to(getattr(torch, dtype)) if cached else None
    ours = ours.to(getattr(torch, dtype))
    prompt = F.pad(torch.randint(256, (batch, 16), device=DEVICE), (1, 0), value=how["vocab"] - 1)

    def mine():
        return gpt.sample(ours, prompt, n, temperature=0.)

    def generate():
        with torch.no_grad():
            return theirs.generate(prompt, max_new_tokens=n, do_sample=False,
                                   attention_mask=torch.ones_like(prompt))
    name = f"{n} tokens, {how['depth']} x {how['dim']}, batch {batch}"
    assert mine().shape == (batch, n)
    if not cached:
        if dtype == "float32":           # in bfloat16 rounding decides between two likely tokens
            agree("the texts", mine(), uncached(ours, prompt, n), 1)
        return name, "no cache", mine, lambda: uncached(ours, prompt, n)
    with torch.no_grad():
        agree("logits", ours(prompt).float(), theirs(prompt).logits.float(),
              1e-3 if dtype == "float32" else .5)
    assert generate().shape == (batch, 17 + n)
    return name, "generate", mine, generate


CASES = {   # case -> fraction of the rounds, and what
    "step": (1., step),
    "sample": (.5, lambda dtype: sampling(dtype, SMALL, 1)),
    "sample16": (.25, lambda dtype: sampling(dtype, SMALL, 16)),
    "sample124M": (.25, lambda dtype: sampling(dtype, GPT2, 1)),
    "uncached": (.25, lambda dtype: sampling(dtype, SMALL, 1, cached=False)),
}
NEEDS = {case: ["transformers.GPT2LMHeadModel"] for case in CASES if case != "uncached"}


def measure(case, dtype, rounds):
    """The figures of a case."""
    fraction, build = CASES[case]
    name, other, *sides = build(dtype)
    return [dict(case=name, beside=other, **pair(*sides, max(2, round(fraction * rounds))))]


if __name__ == "__main__":
    bench(__doc__, CASES, measure, NEEDS)
