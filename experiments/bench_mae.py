"""Our MAE training step beside ViTMAEForPreTraining of the `transformers` package.

    make bench-mae                              all cases, about 3 minutes on 2 cores
    make bench-mae ARGS="--cases tiny --rounds 30"

Both sides have the same weights, images and order of patches, and must agree on the loss before
they are timed. A step is: mask, forward, loss, backward, fused AdamW. The steps alternate, ours
and theirs, so that what else the machine does falls on both; the ratio is the median over rounds
of theirs / ours (above 1: ours is faster), with the middle half of the rounds in brackets: a range
that contains 1 shows no difference. `--json FILE` also writes the figures.
"""
import torch

from pairs import DEVICE, agree, bench, pair, training           # first: it finds the scripts
import mae

CASES = {   # name, image size, patch, batch, (dim, depth, heads) of the encoder, of the decoder
    "tiny": ("ViT-Tiny, patch 2, 32 px", 32, 2, 32, (192, 12, 3), (128, 4, 4)),
    "base": ("ViT-B/16, 224 px", 224, 16, 2, (768, 12, 12), (512, 8, 16)),
}
NEEDS = dict.fromkeys(CASES, ["transformers.ViTMAEForPreTraining"])

RENAMED = [("encoder.blocks", "vit.layers"), ("decoder_blocks", "decoder.decoder_layers"),
           ("encoder.norm", "vit.layernorm"),
           ("encoder.patch_embed", "vit.embeddings.patch_embeddings.projection"),
           ("encoder.cls_token", "vit.embeddings.cls_token"),
           ("encoder.pos_embed", "vit.embeddings.position_embeddings"),
           ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
           ("attn.proj", "attention.o_proj")]


def peer(ours, image_size, patch, encoder, decoder):
    """ViTMAEForPreTraining with our weights, both tables of positions included."""
    import transformers
    config = transformers.ViTMAEConfig(
        hidden_size=encoder[0], num_hidden_layers=encoder[1], num_attention_heads=encoder[2],
        intermediate_size=4 * encoder[0], decoder_hidden_size=decoder[0],
        decoder_num_hidden_layers=decoder[1], decoder_num_attention_heads=decoder[2],
        decoder_intermediate_size=4 * decoder[0], image_size=image_size, patch_size=patch,
        mask_ratio=.75, layer_norm_eps=1e-6)
    theirs = transformers.ViTMAEForPreTraining(config)
    state = {}
    for name, value in [*ours.state_dict().items(), ("encoder.pos_embed", ours.encoder.pos_embed),
                        ("decoder.decoder_pos_embed", ours.decoder_pos_embed)]:
        for a, b in RENAMED:
            name = name.replace(a, b)
        if name.startswith(("mask_token", "decoder_")):
            name = f"decoder.{name}"
        if name.endswith("projection.weight"):
            value = value.view(-1, patch, patch, 3).permute(0, 3, 1, 2)
        if "attn.qkv" in name:
            for letter, part in zip("qkv", value.chunk(3)):
                state[name.replace("attn.qkv", f"attention.{letter}_proj")] = part
        else:
            state[name] = value
    theirs.load_state_dict(state)
    return theirs.train()


def measure(case, dtype, rounds):
    """The figures of a case."""
    name, image_size, patch, batch, encoder, decoder = CASES[case]
    torch.manual_seed(0)
    ours = mae.MAE(image_size, patch, *encoder, *decoder).to(DEVICE)
    theirs = peer(ours, image_size, patch, encoder, decoder).to(DEVICE)
    x = torch.randn(batch, 3, image_size, image_size, device=DEVICE)

    def our_loss():
        inputs, target = mae.mask(x, patch, .75)
        return mae.distance(ours(*inputs), target)

    def their_loss():
        return theirs(x).loss

    with torch.no_grad():           # the same noise on both sides, so the same patches are masked
        torch.manual_seed(1)
        a = our_loss()
        torch.manual_seed(1)
        b = their_loss()
    agree("the loss", a, b, 1e-4 * b.item())
    steps = training(our_loss, ours, dtype), training(their_loss, theirs, dtype, ours=False)
    return [dict(case=f"{name}, batch {batch}", **pair(*steps, rounds))]


if __name__ == "__main__":
    bench(__doc__, CASES, measure, NEEDS)
