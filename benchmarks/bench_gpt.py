"""gpt.py beside GPT2LMHeadModel of the transformers package, with the same weights.

    make bench-gpt                              all cases, about 8 minutes on 2 cores
    make bench-gpt ARGS="--cases step --rounds 30"

step      a training step: forward, loss, backward, fused AdamW; 6 x 384, 257 tokens, context 256, batch 8
sample    256 tokens, greedy, with both caches, after 16 tokens: 6 x 384 at batch 1 and 16, and GPT-2 124M
uncached  the same at 6 x 384, batch 1, beside our own model without its cache

Both sides hold the same weights, and must agree before the clock starts: on the loss of a step, and
on the logits behind the prompt (the texts themselves part where two tokens are equally likely, up to
rounding). In bfloat16 a step runs under autocast, and for sampling the weights are bfloat16. `--plain`
leaves out the faster kernels that common.autocast chooses on some CPUs. Timed in turns; the ratio is
the median over rounds of theirs / ours (above 1: ours is faster), the middle half in brackets.
"""
import torch
import transformers

from pairs import DEVICE, agree, bench, kernels, pair, training           # first: it knows where gpt.py is
import gpt

SMALL, GPT2 = dict(vocab=257, context=512, dim=384, depth=6, heads=6), dict(vocab=50257, context=1024, dim=768, depth=12, heads=12)


def peer(ours, vocab, context, dim, depth, heads):
    """GPT2LMHeadModel with our weights: renamed, matrices transposed."""
    config = transformers.GPT2Config(vocab_size=vocab, n_positions=context, n_embd=dim, n_layer=depth, n_head=heads,
                                     resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., bos_token_id=vocab - 1,
                                     eos_token_id=None, pad_token_id=vocab - 1)
    theirs, state = transformers.GPT2LMHeadModel(config), {}
    for name, value in ours.state_dict().items():
        for a, b in [("token_embed", "wte"), ("pos_embed", "wpe"), ("blocks.", "h."), ("norm1", "ln_1"), ("norm2", "ln_2"),
                     ("attn.qkv", "attn.c_attn"), ("attn.proj", "attn.c_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")]:
            name = name.replace(a, b)
        name = f"ln_f{name[4:]}" if name.startswith("norm") else name
        state[f"transformer.{name}"] = value.T if value.ndim == 2 and name.startswith("h.") else value
    missing = theirs.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys, missing        # it is tied
    return theirs.to(DEVICE)


def step(dtype, plain):
    """A training step of ours and of theirs."""
    torch.manual_seed(0)
    how = SMALL | dict(context=256)
    ours = gpt.GPT(**how).to(DEVICE)
    theirs = peer(ours, **how).train()
    x = torch.randint(256, (8, 256), device=DEVICE)
    masked, target = gpt.mask(x, 256)

    def their_loss():
        return gpt.distance(theirs(masked).logits, target)

    def our_loss():
        return gpt.distance(ours(masked), target)

    with torch.no_grad():
        agree("the loss", our_loss(), their_loss(), 1e-4)
    return ("step, 6 x 384, context 256, batch 8", "GPT2LMHeadModel",
            training(our_loss, ours, dtype, plain), training(their_loss, theirs, dtype, True))


def sampling(dtype, plain, how, batch, n=256, beside="generate"):
    """Writing n tokens: ours with the cache, beside theirs or beside ours without."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    ours = gpt.GPT(**how).to(DEVICE).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=.06) if p.ndim > 1 else None         # a text that does not repeat itself
    theirs = peer(ours, **how).eval().to(kind)
    ours = ours.to(kind)
    bos, prompt = how["vocab"] - 1, torch.randint(256, (batch, 16), device=DEVICE)
    context = lambda: kernels("float32", plain)               # no autocast: the weights are of that dtype

    def mine(cached=True):
        with context():
            return gpt.sample(ours, list(prompt), n, bos, temperature=0., cached=cached)

    def generate():
        with torch.no_grad():
            return theirs.generate(torch.nn.functional.pad(prompt, (1, 0), value=bos), max_new_tokens=n, do_sample=False,
                                   attention_mask=torch.ones(batch, 17, dtype=torch.int64, device=DEVICE))
    with torch.no_grad():
        x = torch.nn.functional.pad(prompt, (1, 0), value=bos)
        agree("logits", ours(x).float(), theirs(x).logits.float(), 1e-3 if dtype == "float32" else .5)
    assert generate().shape == (batch, 17 + n) and {len(row) for row in mine()} == {n}
    name = f"{n} tokens, {how['depth']} x {how['dim']}, batch {batch}"
    if beside == "generate":
        return name, "generate", mine, generate
    return name, "no cache", mine, lambda: mine(cached=False)


CASES = {   # case -> how often, and what
    "step": (1., step),
    "sample": (.5, lambda *a: sampling(*a, SMALL, 1)),
    "sample16": (.25, lambda *a: sampling(*a, SMALL, 16)),
    "sample124M": (.25, lambda *a: sampling(*a, GPT2, 1)),
    "uncached": (.25, lambda *a: sampling(*a, SMALL, 1, beside="no cache")),
}


def measure(case, dtype, plain, rounds):
    """The figures of a case."""
    share, build = CASES[case]
    name, other, *sides = build(dtype, plain)
    return [dict(case=name, beside=other, **pair(*sides, max(5, round(share * rounds))))]


if __name__ == "__main__":
    bench(__doc__, CASES, measure, "transformers")
