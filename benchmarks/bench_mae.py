"""Our MAE training step beside ViTMAEForPreTraining of the `transformers` package.

    make bench-mae                              all cases, about 3 minutes on 2 cores
    make bench-mae ARGS="--cases tiny --rounds 30"

Both sides hold the same weights, get the same images and the same order of patches, and must agree
on the loss before the clock starts. A step is: hide, forward, loss, backward, fused AdamW. The steps
alternate, ours and theirs, so that the machine's moods fall on both; the ratio is the median over
rounds of theirs / ours (above 1: ours is faster), the middle half of the rounds in brackets: a
range that spans 1 shows no difference. `--plain` leaves out the faster kernels that common.autocast
chooses on some CPUs; `--json FILE` also keeps the figures.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers

import common
import mae
from pairs import compare, pair

CASES = {   # side, patch, batch, (dim, depth, heads), (dim, depth, heads) of the decoder
    "tiny": ("ViT-Tiny, patch 2, 32 px", 32, 2, 32, (192, 12, 3), (128, 4, 4)),
    "base": ("ViT-B/16, 224 px", 224, 16, 2, (768, 12, 12), (512, 8, 16)),
}


def peer(ours, side, patch, encoder, decoder):
    """ViTMAEForPreTraining with our weights, both tables of positions included."""
    config = transformers.ViTMAEConfig(
        hidden_size=encoder[0], num_hidden_layers=encoder[1], num_attention_heads=encoder[2],
        intermediate_size=4 * encoder[0], decoder_hidden_size=decoder[0],
        decoder_num_hidden_layers=decoder[1], decoder_num_attention_heads=decoder[2],
        decoder_intermediate_size=4 * decoder[0], image_size=side, patch_size=patch, mask_ratio=.75,
        layer_norm_eps=1e-6)
    theirs = transformers.ViTMAEForPreTraining(config)
    state = {}
    for name, value in [*ours.state_dict().items(), ("encoder.pos_embed", ours.encoder.pos_embed),
                        ("decoder.decoder_pos_embed", ours.decoder_pos_embed)]:
        for a, b in [("encoder.blocks", "vit.layers"), ("decoder_blocks", "decoder.decoder_layers"),
                     ("encoder.norm", "vit.layernorm"), ("encoder.patch_embed", "vit.embeddings.patch_embeddings.projection"),
                     ("encoder.cls_token", "vit.embeddings.cls_token"),
                     ("encoder.pos_embed", "vit.embeddings.position_embeddings"),
                     ("norm1", "layernorm_before"), ("norm2", "layernorm_after"), ("attn.proj", "attention.o_proj")]:
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


def measure(case, dtype, rounds, plain):
    """Seconds of each of our steps and of theirs: (ours, theirs, the first loss of each)."""
    _, side, patch, batch, encoder, decoder = CASES[case]
    args = SimpleNamespace(device="cuda" if torch.cuda.is_available() else "cpu", dtype=dtype,
                           compile=False)
    torch.manual_seed(0)
    ours = mae.MAE(side // patch, 3 * patch * patch, *encoder, *decoder).to(args.device)
    theirs = peer(ours, side, patch, encoder, decoder).to(args.device)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-4, fused=True) for m in (ours, theirs)]
    x = torch.randn(batch, 3, side, side, device=args.device)

    def our_loss():
        masked, target = mae.mask(x, patch, .75)
        return mae.distance(ours(masked), target)

    def their_loss():
        return theirs(x).loss

    def step(loss, optimizer):
        usual = torch.autocast(args.device, torch.bfloat16, enabled=dtype == "bfloat16")
        with common.autocast(args) if loss is our_loss and not plain else usual:
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():                    # the same noise on both sides, so the same patches hidden
        torch.manual_seed(1)
        a = our_loss().item()
        torch.manual_seed(1)
        b = their_loss().item()
    assert abs(a - b) < 1e-4 * abs(b), f"the two sides disagree: {a} and {b}"
    steps = [lambda side=side: step((our_loss, their_loss)[side], optimizers[side]) for side in (0, 1)]
    return *pair(*steps, rounds), (a, b)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plain", action="store_true", help="ours, too, on PyTorch's choice of kernels")
    args = parser.parse_args()
    print(f"{common.machine()}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.get_num_threads()} threads; {args.rounds} rounds; milliseconds a step")
    rows = [("case", "dtype", "ours (min to max)", "theirs (min to max)", "theirs / ours")]
    results = []
    for case in args.cases:
        for dtype in args.dtypes:
            ours, theirs, losses = measure(case, dtype, args.rounds, args.plain)
            found = compare(ours, theirs)
            text = lambda t: f"{1000 * statistics.median(t):.0f} ({1000 * min(t):.0f} to {1000 * max(t):.0f})"
            rows.append((f"{CASES[case][0]}, batch {CASES[case][3]}", dtype, text(ours), text(theirs),
                         "{:.2f} [{:.2f} to {:.2f}]".format(found["ratio"], *found["quartiles"])))
            results.append(dict(case=rows[-1][0], dtype=dtype, losses=losses, rounds=args.rounds, **found))
            print(f"  {' | '.join(rows[-1])}", file=sys.stderr, flush=True)
    print(common.table(rows))
    if args.json:
        args.json.write_text(json.dumps(dict(
            command="make bench-mae" + " ARGS=--plain" * args.plain, machine=common.machine(), threads=torch.get_num_threads(),
            versions=dict(torch=torch.__version__, transformers=transformers.__version__),
            figures=results), indent=1) + "\n")


if __name__ == "__main__":
    main()
