"""flamingo.py's layers beside the flamingo-pytorch package, with the same weights on the same tensors.

    make bench-flamingo                             all cases, about 2 minutes on 2 cores
    make bench-flamingo ARGS="--cases decode --rounds 40"

layers    the resampler (2 layers, 64 latents of 64 visual tokens) and one gated cross-attention layer with its
          feed-forward layer, forward and backward: dim 384, 8 heads, batch 4, 256 tokens, 4 pictures
decode    cross-attention while a text is written, token by token, 64 tokens behind 192, 4 pictures of 64 latents: ours
          keeps the pictures' keys and values; theirs has no cache and makes them anew at each token. (It is given one
          token at a time, with its time in the place of its marks, which is the fastest use that it allows.)

The media mask is on in all. Before the clock starts, both sides must agree on outputs and gradients, with our squared
ReLU in their feed-forward layers; then they are timed as they come, with a GELU there. Attention has 48 channels a head
on both sides. In bfloat16 both run under autocast. `--plain` leaves out the faster kernels that common.autocast chooses
on some CPUs. Timed in turns; the ratio is the median over rounds of theirs / ours (above 1: ours is faster), the middle
half in brackets.
"""
import torch
from torch import nn

from pairs import DEVICE, bench, kernels, pair           # first: it knows where flamingo.py is
import flamingo

DIM, HEADS, LATENTS, DEPTH, B, T, M, N, NEW = 384, 8, 64, 2, 4, 256, 4, 64, 64


class SquaredReLU(nn.Module):
    """In the place of their GELU, for the comparison of numbers."""

    def forward(self, x):
        return x.relu().square()


def ours():
    """Our resampler and layer; gates open, so that all gradients can be compared."""
    torch.manual_seed(0)
    return nn.ModuleList([flamingo.Resampler(DIM, DEPTH, HEADS, LATENTS),
                          flamingo.GatedCrossAttention(DIM, DIM, HEADS, .5)]).to(DEVICE)


def theirs(mine, squared=False):
    """The package's, with our weights under its names."""
    import flamingo_pytorch as package
    how = dict(dim=DIM, dim_head=DIM // HEADS, heads=HEADS)
    other = nn.ModuleList([package.PerceiverResampler(**how, depth=DEPTH, num_latents=LATENTS, num_media_embeds=M),
                           package.GatedCrossAttentionBlock(**how)]).to(DEVICE)
    state = {name: torch.zeros_like(value) for name, value in other.state_dict().items() if "pos_emb" in name}
    for name, value in mine.state_dict().items():
        part, name = name.split(".", 1)
        if part == "0":
            for a, b in ((".norm_latents", ".0.norm_latents"), (".norm_visual", ".0.norm_media"), (".attn.", ".0."), (".mlp.norm.", ".1.0."), (".mlp.fc1.", ".1.1."), (".mlp.fc2.", ".1.3.")):
                name = name.replace(a, b)
        else:
            for a, b in (("mlp_gate", "ff_gate"), ("mlp.norm.", "ff.0."), ("mlp.fc1.", "ff.1."), ("mlp.fc2.", "ff.3.")):
                name = name.replace(a, b)
            name = f"attn.{name}" if name.startswith("norm.") else name
        for a, b in ((".q.", ".to_q."), (".kv.", ".to_kv."), (".proj.", ".to_out.")):
            name = name.replace(a, b)
        state[f"{part}.{name}"] = value
    other.load_state_dict(state)
    if squared:
        for parent in list(other.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.GELU):
                    setattr(parent, name, SquaredReLU())
    return other


def tensors():
    """Text (B, T, DIM), visual tokens (B, M, N, DIM), and where the marks are (B, T): the first not at the beginning."""
    torch.manual_seed(1)
    marks = torch.zeros(B, T, dtype=torch.bool, device=DEVICE)
    marks[:, 9::T // M] = True
    return torch.randn(B, T, DIM, device=DEVICE), torch.randn(B, M, N, DIM, device=DEVICE), marks


def forward(side, model, x, visual, marks):
    """(B, T, DIM)"""
    resampler, layer = model
    if side == "theirs":
        return layer(x, resampler(visual), media_locations=marks)
    latents = resampler(visual.flatten(0, 1)).view(B, M * LATENTS, DIM)
    k, v = layer.attn.keys(latents)
    pairs, seen = flamingo.reach([(k.unflatten(2, (M, LATENTS)), v.unflatten(2, (M, LATENTS)))], marks.long().cumsum(1))
    return layer(x, *pairs[0], seen)


def agree():
    """Stops the benchmark unless outputs and gradients are equal."""
    mine = ours()
    found = {}
    for side, model in ("ours", mine), ("theirs", theirs(mine, squared=True)):
        x, visual, marks = tensors()
        x.requires_grad_(), visual.requires_grad_()
        y = forward(side, model, x, visual, marks)
        y.square().sum().backward()
        weights = model[0].layers[0][0].to_kv.weight if side == "theirs" else model[0].layers[0].attn.kv.weight
        found[side] = y.detach(), x.grad, visual.grad, weights.grad
    for a, b in zip(*found.values()):
        assert (a - b).abs().max() < 1e-4 * b.abs().max(), (a - b).abs().max()


def layers(dtype, plain, rounds):
    """The figures of the case `layers`, after a check that both give the same."""
    agree()
    mine = ours()
    x, visual, marks = tensors()
    sides = []
    for side, model in ("ours", mine), ("theirs", theirs(mine)):
        def run(side=side, model=model, plain=plain or side == "theirs"):
            with kernels(dtype, plain):
                y = forward(side, model, x, visual, marks)
            y.float().square().mean().backward()
            model.zero_grad()
        sides.append(run)
    return dict(case=f"resampler and gated layer, dim {DIM}, {LATENTS} latents, {M} pictures, {T} tokens, batch {B}",
                beside="flamingo-pytorch", **pair(*sides, rounds))


@torch.no_grad()
def decode(dtype, plain, rounds):
    """The figures of the case `decode`, after a check that both give the same."""
    mine = ours().eval()
    other = theirs(mine).eval()
    x, visual, marks = tensors()
    latents = mine[0](visual.flatten(0, 1)).view(B, M, LATENTS, DIM)
    time, layer = marks.long().cumsum(1), mine[1]

    def our():
        with kernels(dtype, plain):
            pair = tuple(t.unflatten(2, (M, LATENTS)) for t in layer.attn.keys(latents.flatten(1, 2)))      # once
            out = []
            for t in range(T - NEW, T):
                pairs, seen = flamingo.reach([pair], time[:, t:t + 1])
                out.append(layer.attn(layer.norm(x[:, t:t + 1]), *pairs[0], seen))
        return torch.cat(out, 1)

    def their():
        with kernels(dtype, True):
            return torch.cat([other[1].attn(x[:, t:t + 1], latents, media_locations=time[:, t:t + 1]) for t in range(T - NEW, T)], 1)
    whole = other[1].attn(x, latents, media_locations=marks)[:, -NEW:]
    for y in our(), their():
        assert (y.float() - whole).abs().max() < (1e-5 if dtype == "float32" else .05) * whole.abs().max()
    return dict(case=f"cross-attention, {NEW} tokens one by one, dim {DIM}, {M} pictures of {LATENTS} latents, batch {B}",
                beside="flamingo-pytorch", **pair(our, their, rounds))


if __name__ == "__main__":
    bench(__doc__, ["layers", "decode"], lambda case, *how: [dict(layers=layers, decode=decode)[case](*how)], "flamingo-pytorch")
