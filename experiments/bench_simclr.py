"""The parts of simclr.py that take most of its time, beside what people would use instead.

    make bench-simclr                           all cases, about 3 minutes on 2 cores
    make bench-simclr ARGS="--cases loss --rounds 50"

loss      NT-Xent forward and backward, 512 x 2 views of 128 dimensions, float32, beside NTXentLoss
          of the lightly package on the same tensors
layout    a training step of ResNet-18 on 64 x 2 views of 32 pixels in channels_last, beside the
          same step in PyTorch's usual layout (NCHW): all else is equal, so the ratio is due to the
          layout
augment   512 views of 32 pixels: crop, mirror, jitter, grey, beside kornia's same pipeline

Before they are timed, both sides must agree: on the loss and its gradient, on the loss of a step,
and on each transform with the same random numbers (kornia chooses one order of the jitter for a
whole batch, ours one for each image: for the comparison ours gets kornia's). Timed in turns; the
ratio is the median over rounds of theirs / ours (above 1: ours is faster), with the middle half in
brackets.
"""
import torch
from torch import nn

from pairs import DEVICE, agree, bench, pair           # first: it finds the scripts
import simclr

NEEDS = dict(loss=["lightly.loss.NTXentLoss"], augment=["kornia.augmentation.ColorJitter"])


def loss(_):
    """Ours and lightly's: two functions that run forward and backward."""
    from lightly.loss import NTXentLoss
    theirs, z = NTXentLoss(temperature=.2), torch.randn(1024, 128, device=DEVICE)
    z.requires_grad_()

    def run(f):
        z.grad = None
        value = f(*z.chunk(2))
        value.backward()
        return value.detach(), z.grad

    sides = [lambda: run(lambda z1, z2: simclr.ntxent(z1, z2, .2)), lambda: run(theirs)]
    (a, da), (b, db) = (side() for side in sides)
    agree("NT-Xent", a, b, 1e-5), agree("its gradient", da, db, 1e-8)
    return "NT-Xent, 512 x 2 views, 128 dimensions", "lightly", *sides


def layout(dtype):
    """A step in channels_last and one in NCHW, with the same weights and images."""
    def side(layout):
        torch.manual_seed(0)
        model = simclr.SimCLR(18, 64, 128).to(DEVICE).to(memory_format=layout)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
        x = torch.randn(128, 3, 32, 32, device=DEVICE).contiguous(memory_format=layout)

        def step():
            with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
                value = simclr.ntxent(*model(x).chunk(2), .2)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            return value.detach()
        return step

    sides = [side(torch.channels_last), side(torch.contiguous_format)]
    a, b = (step() for step in sides)
    agree("the loss of a step", a, b, 1e-3 if dtype == "float32" else .05)
    return "ResNet-18 step, 64 x 2 views, 32 px", "NCHW", *sides


def kornias(x, crop_scale, jitter_strength, hue, p):
    """Kornia's transforms of our pipeline; p: how often it jitters, and drops the colours."""
    import kornia.augmentation as K
    s = .8 * jitter_strength
    return [K.RandomResizedCrop(x.shape[-2:], (crop_scale, 1.), (3 / 4, 4 / 3), p=1.,
                                cropping_mode="resample", align_corners=False),
            K.RandomHorizontalFlip(p=.5), K.ColorJitter(s, s, s, hue, p=p[0]),
            K.RandomGrayscale(p=p[1])]


def same_transforms(x):
    """Stops the benchmark unless ours, given kornia's random numbers, make the same images."""
    n, S = len(x), x.shape[-1]
    crop, flip, jitter, grey = kornias(x, .5, 1., .5, (1., 1.))
    theirs, box = crop(x), crop._params["src"].to(x)
    step = (box[:, 2] - box[:, 0]) / (S - 1)      # kornia aligns the centres of the outer pixels
    centre = (box[:, 0] + .5 + step * (S - 1) / 2) / S
    no = torch.zeros(n, dtype=torch.bool, device=x.device)
    agree("crop", theirs, simclr.crop(x, centre, step, no), 1e-4)
    theirs, mirrored = flip(x), flip._params["batch_prob"].to(x.device) > .5
    whole = torch.ones(n, 2, device=x.device)
    agree("mirror", theirs, simclr.crop(x, whole / 2, whole, mirrored), 1e-5)
    theirs, q = jitter(x), jitter._params
    kinds = "brightness", "contrast", "saturation", "hue"
    factors = torch.stack([q[f"{kind}_factor"] for kind in kinds], 1).to(x)
    agree("jitter", theirs, simclr.jitter(x, factors, q["order"].repeat(n, 1).to(x.device)), 1e-4)
    agree("grey", grey(x), simclr.rgb_to_grayscale(x).expand_as(x), 1e-5)


def augment(_):
    """Our view of 512 images and kornia's."""
    x = torch.rand(512, 3, 32, 32, device=DEVICE)
    for _ in range(8):                                   # each time in another order of the jitter
        same_transforms(x[:64])
    pipeline = nn.Sequential(*kornias(x, .5, 1., .2, (.8, .2)))
    return ("augmentation of 512 images, 32 px", "kornia",
            lambda: simclr.augment(x, .5, 1., .2), lambda: pipeline(x))


CASES = dict(loss=loss, layout=layout, augment=augment)


def measure(case, dtype, rounds):
    """The figures of a case."""
    if dtype != "float32" and case != "layout":
        return []
    torch.manual_seed(0)
    name, other, *sides = CASES[case](dtype)
    times = rounds if case == "layout" else 2 * rounds
    return [dict(case=name, beside=other, **pair(*sides, times))]


if __name__ == "__main__":
    bench(__doc__, CASES, measure, NEEDS)
