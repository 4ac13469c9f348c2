"""flamingo.py's layers beside the flamingo-pytorch package, with the same weights and tensors.

    make bench-flamingo                             all cases, about 2 minutes on 2 cores
    make bench-flamingo ARGS="--cases decode --rounds 40"

layers    the resampler (2 layers, 64 latents of 64 visual tokens) and one gated cross-attention
          layer with its feed-forward layer, forward and backward: dim 384, 8 heads, batch 4, 256
          tokens, 4 images
decode    cross-attention while a text is written, token by token, 64 tokens after 192, 4 images of
          64 latents: ours keeps the images' keys and values; theirs has no cache and computes them
          again for each token. (It is given one token at a time, with the number of images so far
          in place of the image tokens, which is the fastest use that it allows.)

The media mask is on in all. Before they are timed, both sides must agree on outputs and gradients,
with our squared ReLU in their feed-forward layers; then they are timed as they come, with a GELU
there. Attention has 48 channels per head on both sides. In bfloat16 both run under autocast. Timed
in turns; the ratio is the median over rounds of theirs / ours (above 1: ours is faster), with the
middle half in brackets.
"""
import torch
from torch import nn

from pairs import DEVICE, autocast, bench, pair           # first: it finds the scripts
import flamingo

DIM, HEADS, LATENTS, DEPTH, B, T, M, N, NEW = 384, 8, 64, 2, 4, 256, 4, 64, 64


class SquaredReLU(nn.Module):
    """In place of their GELU, for the comparison of numbers."""

    def forward(self, x):
        return x.relu().square()


def ours():
    """Our resampler and layer; the gates are open, so that all gradients can be compared."""
    torch.manual_seed(0)
    return nn.ModuleList([flamingo.Resampler(DIM, DEPTH, HEADS, LATENTS),
                          flamingo.GatedCrossAttention(DIM, DIM, HEADS, .5)]).to(DEVICE)


RENAMED = [
    [(".norm_latents", ".0.norm_latents"), (".norm_visual", ".0.norm_media"), (".attn.", ".0."),
     (".mlp.norm.", ".1.0."), (".mlp.fc1.", ".1.1."), (".mlp.fc2.", ".1.3.")],   # of the resampler
    [("mlp_gate", "ff_gate"), ("mlp.norm.", "ff.0."), ("mlp.fc1.", "ff.1."),
     ("mlp.fc2.", "ff.3.")]]                                                     # of the layer


def theirs(mine, squared=False):
    """The package's, with our weights under its names."""
    import flamingo_pytorch as package
    how = dict(dim=DIM, dim_head=DIM // HEADS, heads=HEADS)
    other = nn.ModuleList([
        package.PerceiverResampler(**how, depth=DEPTH, num_latents=LATENTS, num_media_embeds=M),
        package.GatedCrossAttentionBlock(**how)]).to(DEVICE)
    state = {name: torch.zeros_like(value) for name, value in other.state_dict().items()
             if "pos_emb" in name}
    for name, value in mine.state_dict().items():
        part, name = name.split(".", 1)
        for a, b in RENAMED[int(part)]:
            name = name.replace(a, b)
        if part == "1" and name.startswith("norm."):
            name = f"attn.{name}"
        for a, b in ((".q.", ".to_q."), (".kv.", ".to_kv."), (".proj.", ".to_out.")):
            name = name.replace(a, b)
        state[f"{part}.{name}"] = value
    other.load_state_dict(state)
    for parent in list(other.modules()) * squared:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GELU):
                setattr(parent, name, SquaredReLU())
    return other


def tensors():
    """Text (B, T, DIM), visual tokens (B, M, N, DIM), and where the image tokens are (B, T): the
    first is not at the beginning."""
    torch.manual_seed(1)
    is_image = torch.zeros(B, T, dtype=torch.bool, device=DEVICE)
    is_image[:, 9::T // M] = True
    x = torch.randn(B, T, DIM, device=DEVICE)
    return x, torch.randn(B, M, N, DIM, device=DEVICE), is_image


def forward(side, model, x, visual, is_image):
    """(B, T, DIM)"""
    resampler, layer = model
    if side == "theirs":
        return layer(x, resampler(visual), media_locations=is_image)
    latents = resampler(visual.flatten(0, 1)).view(B, M * LATENTS, DIM)
    visible = flamingo.media_mask(is_image.cumsum(1), M, LATENTS)
    return layer(x, layer.attn.keys_values(latents), visible)


def agree():
    """Stops the benchmark unless outputs and gradients are equal."""
    mine = ours()
    found = {}
    for side, model in ("ours", mine), ("theirs", theirs(mine, squared=True)):
        x, visual, is_image = tensors()
        x.requires_grad_(), visual.requires_grad_()
        y = forward(side, model, x, visual, is_image)
        y.square().sum().backward()
        layer = model[0].layers[0]
        weights = layer[0].to_kv.weight if side == "theirs" else layer.attn.kv.weight
        found[side] = y.detach(), x.grad, visual.grad, weights.grad
    for a, b in zip(*found.values()):
        assert (a - b).abs().max() < 1e-4 * b.abs().max(), (a - b).abs().max()


def layers(dtype, rounds):
    """The figures of the case `layers`, after a check that both give the same."""
    agree()
    mine, sides = ours(), []
    x, visual, is_image = tensors()
    for side, model in ("ours", mine), ("theirs", theirs(mine)):
        def run(side=side, model=model):
            with autocast(dtype, side == "ours"):
                y = forward(side, model, x, visual, is_image)
            y.float().square().mean().backward()
            model.zero_grad()
        sides.append(run)
    name = (f"resampler and gated layer, dim {DIM}, {LATENTS} latents, {M} images, {T} tokens, "
            f"batch {B}")
    return dict(case=name, beside="flamingo-pytorch", **pair(*sides, rounds))


@torch.no_grad()
def decode(dtype, rounds):
    """The figures of the case `decode`, after a check that both give the same."""
    mine = ours().eval()
    other = theirs(mine).eval()
    x, visual, is_image = tensors()
    latents = mine[0](visual.flatten(0, 1)).view(B, M, LATENTS, DIM)
    so_far, layer, new = is_image.cumsum(1), mine[1], range(T - NEW, T)

    def our():
        with autocast(dtype):
            keys_values = layer.attn.keys_values(latents.flatten(1, 2))      # once for all tokens
            return torch.cat([layer.attn(
                layer.norm(x[:, t:t + 1]), keys_values,
                flamingo.media_mask(so_far[:, t:t + 1], M, LATENTS)) for t in new], 1)

    def their():
        with autocast(dtype, ours=False):
            return torch.cat([other[1].attn(x[:, t:t + 1], latents,
                                            media_locations=so_far[:, t:t + 1]) for t in new], 1)
    whole = other[1].attn(x, latents, media_locations=is_image)[:, -NEW:]
    for y in our(), their():
        error, most = (y.float() - whole).abs().max(), whole.abs().max()
        assert error < (1e-5 if dtype == "float32" else .05) * most, error
    name = (f"cross-attention, {NEW} tokens one by one, dim {DIM}, {M} images of {LATENTS} "
            f"latents, batch {B}")
    return dict(case=name, beside="flamingo-pytorch", **pair(our, their, rounds))


CASES = dict(layers=layers, decode=decode)
NEEDS = dict.fromkeys(CASES, ["flamingo_pytorch.PerceiverResampler"])

if __name__ == "__main__":
    bench(__doc__, CASES, lambda case, *how: [CASES[case](*how)], NEEDS)
