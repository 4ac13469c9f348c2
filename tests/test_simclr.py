"""simclr.py against loops, colorsys, torch's own losses and a functional forward of the ResNet."""
import colorsys
import json
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import call, refused, run
from torch import nn

import common
import simclr

SMALL = "--width 8 --depth 10 --dim 8 --batch 8 --labels 1 0 --dtype float32 --device cpu".split()


def settings(**given):
    return simclr.Args(**dict(width=8, depth=10, dim=8, batch=8, labels=(1, 0), dtype="float32", device="cpu") | given)


# ---------------------------------------------------------------------------------- the losses


def double_loop(z, t):
    """NT-Xent as eq. 1 says it, term by term, in Python's floats."""
    z, total = [[float(v) for v in row] for row in z], 0.
    cos = lambda a, b: sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)
    n = len(z)
    for i in range(n):
        j = (i + n // 2) % n
        candidates = sum(math.exp(cos(z[i], z[k]) / t) for k in range(n) if k != i)
        total -= math.log(math.exp(cos(z[i], z[j]) / t) / candidates)
    return total / n


@pytest.mark.parametrize("t", [.05, .5, 2.])
def test_ntxent_equals_a_double_loop(t):
    z1, z2 = torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = double_loop(torch.cat([z1, z2]), t)
    assert simclr.ntxent(z1, z2, t).item() == pytest.approx(expected, rel=1e-10)
    assert simclr.ntxent(z1.float(), z2.float(), t).item() == pytest.approx(expected, rel=1e-5)


def test_ntxent_is_the_lectures_n_way_classification():
    """Each view is a query with 2 N - 1 classes, the other views, of which its positive is the label; the
    mean over both directions is the mean of the two one-sided losses."""
    torch.manual_seed(0)
    N, z = 5, torch.randn(10, 4, dtype=torch.float64)
    unit = F.normalize(z, dim=1)
    halves = []
    for start in 0, N:
        losses = []
        for i in range(start, start + N):
            classes = [k for k in range(2 * N) if k != i]
            logits = unit[classes] @ unit[i] / .3
            losses.append(F.cross_entropy(logits[None], torch.tensor([classes.index((i + N) % (2 * N))])))
        halves.append(sum(losses) / N)
    z1, z2 = z.chunk(2)
    torch.testing.assert_close(simclr.ntxent(z1, z2, .3), sum(halves) / 2, rtol=1e-10, atol=0)
    assert abs(halves[0] - halves[1]) > 1e-3                             # one direction is not enough
    torch.testing.assert_close(simclr.ntxent(z2, z1, .3), simclr.ntxent(z1, z2, .3))


def test_ntxent_does_not_depend_on_the_length_of_z():
    z1, z2 = torch.randn(2, 4, 5, dtype=torch.float64)
    scaled = z1 * torch.rand(4, 1).add(.1), z2 * torch.rand(4, 1).add(.1)
    torch.testing.assert_close(simclr.ntxent(*scaled, .5), simclr.ntxent(z1, z2, .5))


def test_loss_and_gradient_of_a_uniform_guess():
    """Views at right angles: the loss is ln(2 N - 1), and the gradient of each z points from its positive to
    the mean of all other views: (mean of others - positive) / (N t), worked out by hand."""
    N, t = 6, .5
    z = torch.linalg.qr(torch.randn(20, 2 * N, dtype=torch.float64))[0].T.requires_grad_()
    loss = simclr.ntxent(*z.chunk(2), t)
    assert loss.item() == pytest.approx(math.log(2 * N - 1), rel=1e-12)
    loss.backward()
    for i in range(2 * N):
        others = sum(z[j] for j in range(2 * N) if j != i) / (2 * N - 1)
        torch.testing.assert_close(z.grad[i], ((others - z[(i + N) % (2 * N)]) / (N * t)).detach())


def test_losses_stay_float32_under_autocast():
    z = torch.randn(2, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got = simclr.ntxent(*z, .1), simclr.triplet(*z, .5)
    assert torch.equal(got[0], simclr.ntxent(*z, .1)) and torch.equal(got[1], simclr.triplet(*z, .5))


def test_triplet_equals_torchs_where_the_definitions_agree():
    """torch's takes the distance itself; the lecture and FaceNet square it: both, over all triplets."""
    N, z = 4, torch.randn(8, 5, dtype=torch.float64)
    unit = F.normalize(z, dim=1)
    triples = [(i, (i + N) % (2 * N), k) for i in range(2 * N) for k in range(2 * N) if k not in (i, (i + N) % (2 * N))]
    assert len(triples) == 2 * N * (2 * N - 2)
    a, p, n = (unit[list(column)] for column in zip(*triples))
    expected = F.triplet_margin_loss(a, p, n, margin=.7, eps=0)
    torch.testing.assert_close(simclr.triplet(*z.chunk(2), .7, square=False), expected, rtol=1e-7, atol=1e-9)
    squared = F.relu((a - p).square().sum(1) - (a - n).square().sum(1) + .7).mean()
    torch.testing.assert_close(simclr.triplet(*z.chunk(2), .7), squared)
    assert abs(expected - squared) > 1e-2                                # and these are two losses


def test_gradient_of_triplet_is_that_of_the_loss_written_out():
    """Nothing is detached."""
    z = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    got, = torch.autograd.grad(simclr.triplet(*z.chunk(2), .7), z)
    unit = F.normalize(z, dim=1)
    expected = torch.stack([F.relu((unit[i] - unit[(i + 4) % 8]).square().sum() - (unit[i] - unit[k]).square().sum() + .7)
                            for i in range(8) for k in range(8) if k % 4 != i % 4]).mean()
    torch.testing.assert_close(got, torch.autograd.grad(expected, z)[0])


@pytest.mark.parametrize("loss", [simclr.ntxent, simclr.triplet])
@pytest.mark.parametrize("shapes", [((1, 4), (1, 4)), ((3, 4), (2, 4)), ((3, 4), (3, 5))])
def test_losses_refuse_what_has_no_negatives_or_no_pairs(loss, shapes):
    with pytest.raises(ValueError, match="2 or more images"):
        loss(*map(torch.zeros, shapes), .5)


# ------------------------------------------------------------------------------ the transforms


def bilinear(image, x, y):
    """The colour at (x, y) pixels, centres at .5, by the four nearest; beyond the edge, the edge."""
    S = image.shape[-1]
    x, y = min(max(x - .5, 0), S - 1), min(max(y - .5, 0), S - 1)
    i, j = min(int(y), S - 2), min(int(x), S - 2)
    v, u = y - i, x - j
    return ((1 - v) * ((1 - u) * image[:, i, j] + u * image[:, i, j + 1])
            + v * ((1 - u) * image[:, i + 1, j] + u * image[:, i + 1, j + 1]))


def test_crop_and_mirror_equal_a_loop_over_pixels():
    torch.manual_seed(0)
    S, x = 9, torch.rand(5, 3, 9, 9)
    size = torch.rand(5, 2) * .7 + .3
    centre = size / 2 + (1 - size) * torch.rand(5, 2)
    mirror = torch.tensor([True, False, True, False, True])
    got = simclr.crop(x, centre, size, mirror)
    for b in range(5):
        for i in range(S):
            for j in range(S):
                across = (S - 1 - j if mirror[b] else j) + .5
                px = ((centre[b, 0] - size[b, 0] / 2) * S + across * size[b, 0]).item()
                py = ((centre[b, 1] - size[b, 1] / 2) * S + (i + .5) * size[b, 1]).item()
                torch.testing.assert_close(got[b, :, i, j], bilinear(x[b], px, py), rtol=1e-4, atol=1e-5)


def test_a_crop_of_everything_is_the_image_and_one_of_whole_pixels_is_torchs_resize():
    x, half = torch.rand(1, 3, 8, 8), torch.full((1, 2), .5)
    no = torch.tensor([False])
    torch.testing.assert_close(simclr.crop(x, half, 2 * half, no), x)
    torch.testing.assert_close(simclr.crop(x, half, 2 * half, ~no), x.flip(3))
    got = simclr.crop(x, half, half, no)[..., 1:-1, 1:-1]                # inside, where no neighbour is cut off
    expected = F.interpolate(x[..., 2:6, 2:6], size=8, mode="bilinear", align_corners=False)[..., 1:-1, 1:-1]
    torch.testing.assert_close(got, expected)


def one(image, kind, by):
    """One transform of one image (3, S, S) with values in [0, 1], pixel by pixel."""
    light = .299 * image[0] + .587 * image[1] + .114 * image[2]
    if kind == 0:
        return (image * by).clamp(0, 1)
    if kind == 1:
        return (image * by + (1 - by) * light.mean()).clamp(0, 1)
    if kind == 2:
        return (image * by + (1 - by) * light).clamp(0, 1)
    out = torch.empty_like(image)
    for i in range(image.shape[1]):
        for j in range(image.shape[2]):
            h, s, v = colorsys.rgb_to_hsv(*image[:, i, j].tolist())
            out[:, i, j] = torch.tensor(colorsys.hsv_to_rgb((h + by) % 1, s, v))
    return out


def test_jitter_equals_one_image_at_a_time_in_each_of_the_24_orders():
    torch.manual_seed(0)
    order = torch.cartesian_prod(*[torch.arange(4)] * 4)
    order = order[(order.sort(1).values == torch.arange(4)).all(1)]
    assert len(order) == 24
    x = torch.rand(24, 3, 5, 5)
    x[::3, :, 0] = x[::3, :1, 0]                                         # grey pixels have no hue
    factors = torch.cat([torch.rand(24, 3) * 1.6 + .2, torch.rand(24, 1) - .5], 1)
    before = x.clone()
    got = simclr.jitter(x, factors, order)
    assert torch.equal(x, before)                                        # not in place
    for b in range(24):
        expected = x[b]
        for kind in order[b].tolist():
            expected = one(expected, kind, factors[b, kind].item())
        torch.testing.assert_close(got[b], expected, rtol=1e-4, atol=2e-5)
    unchanged = torch.tensor([[1., 1., 1., 0.]]).repeat(24, 1)
    torch.testing.assert_close(simclr.jitter(x, unchanged, order), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", [-.5, -.13, 0., .2, .5])
def test_hue_equals_colorsys(change):
    x = torch.rand(2, 3, 6, 6)
    x[0, :, 0, 0], x[0, :, 0, 1], x[0, :, 0, 2] = torch.tensor([1., 0, 0]), torch.zeros(3), torch.ones(3)
    got = simclr.adjust_hue(x, torch.full((2,), change))
    for b in range(2):
        torch.testing.assert_close(got[b], one(x[b], 3, change), rtol=1e-4, atol=1e-5)


def test_blur_equals_a_convolution_with_the_whole_kernel():
    x, sigma = torch.rand(3, 3, 40, 40), torch.tensor([.3, 1., 2.])
    got, at = simclr.blur(x, sigma), torch.arange(-2, 3)
    for b in range(3):
        kernel = torch.exp(-(at[:, None] ** 2 + at ** 2) / (2 * sigma[b] ** 2))
        kernel = (kernel / kernel.sum()).expand(3, 1, 5, 5)
        expected = F.conv2d(F.pad(x[b:b + 1], (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
        torch.testing.assert_close(got[b:b + 1], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(simclr.blur(x[..., :1, :1], sigma), x[..., :1, :1])              # one pixel has no neighbours


@pytest.mark.parametrize("x", [torch.rand(2, 3, 8, 6), torch.rand(2, 1, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
                               torch.rand(2, 3, 8, 8, dtype=torch.float64)])
def test_augment_refuses_other_images(x):
    with pytest.raises(ValueError, match=r"augment takes images \(B, 3, S, S\) of float32 in \[0, 1\], not \(2, "):
        simclr.augment(x)


def test_augment_samples_what_the_paper_says():
    """20 % grey, 50 % mirrored, 80 % jittered, areas uniform, and each image for itself."""
    torch.manual_seed(0)
    n = 4000
    ramp = torch.linspace(.3, .7, 16).expand(1, 3, 16, 16) * torch.tensor([1., .8, .6]).view(1, 3, 1, 1)
    x = ramp.repeat(n, 1, 1, 1)
    x.requires_grad_(False)
    before = x.clone()
    views = simclr.augment(x, .25, 1., .2)
    assert torch.equal(x, before)                                        # not in place
    assert views.shape == x.shape and views.min() >= 0 and views.max() <= 1
    fraction = lambda hit: hit.float().mean().item()
    error = 4 * (.25 / n) ** .5
    assert fraction((views[:, 0] - views[:, 2]).abs().amax((1, 2)) < 1e-6) == pytest.approx(.2, abs=error + .01)
    plain = simclr.augment(x, .25, 0., 0.)                               # crops and drops alone
    slope = plain[:, 0, 8, 15] - plain[:, 0, 8, 0]
    assert fraction(slope < 0) == pytest.approx(.5, abs=error)
    coloured = (plain[:, 0] - plain[:, 2]).abs().amax((1, 2)) > 1e-6
    width = slope[coloured].abs() / (.4 / 15) / 15                       # fraction of the side that is left
    assert width.min() > .25 ** .5 * (3 / 4) ** .5 - .1 and width.max() < 1.01
    torch.manual_seed(1)
    kept = simclr.augment(x[:, :, :1, :1].expand(-1, -1, 16, 16).contiguous(), 1., 1., 0.)
    colour = kept[:, :, 0, 0]
    same = (colour - x[:, :, 0, 0]).abs().amax(1) < 1e-5
    assert fraction(same) == pytest.approx(.2 * .8, abs=error + .01)        # neither jittered nor grey
    assert len({tuple(v.tolist()) for v in colour}) > .7 * n
    torch.manual_seed(2)
    blurred = simclr.augment(torch.rand(200, 3, 32, 32), .5, .5, .1, blurred=True)
    assert blurred.isfinite().all() and 0 <= blurred.min() and blurred.max() <= 1 + 1e-6


def test_boxes_factors_and_orders_are_sampled_for_each_image(monkeypatch):
    """Boxes lie in the image and anywhere in it; factors fill their ranges; all 24 orders come up."""
    seen = {}
    monkeypatch.setattr(simclr, "crop", lambda x, *sampled: seen.setdefault("crop", sampled) and x)
    monkeypatch.setattr(simclr, "jitter", lambda x, *sampled: seen.setdefault("jitter", sampled) and x)
    torch.manual_seed(0)
    n = 4800
    simclr.augment(torch.rand(n, 3, 2, 2), .2, .5, .1)
    centre, size, mirror = seen["crop"]
    low, high = centre - size / 2, centre + size / 2
    assert low.min() > -1e-6 and high.max() < 1 + 1e-6
    place = (low / (1 - size))[(size < .9).all(1)]                       # 0: at the edge, 1: at the other
    assert (place.mean(0) - .5).abs().max() < .02 and (place.std(0) - 12 ** -.5).abs().max() < .02
    area, ratio = size.prod(1), size[:, 0] / size[:, 1]
    free = (size < 1).all(1)                                             # not cut to the image
    assert area.min() >= .2 - 1e-6 and area.max() <= 1 and area[area < .7].mean().item() == pytest.approx(.45, abs=.01)
    assert 3 / 4 - 1e-6 <= ratio[free].min() and ratio[free].max() <= 4 / 3 + 1e-6
    assert ratio[area < .7].log().mean().abs() < .02 and abs(mirror.float().mean() - .5) < .03
    factors, order = seen["jitter"]
    moved = (factors != torch.tensor([1., 1., 1., 0.])).any(1)
    assert abs(moved.float().mean() - .8) < .025
    for i, (least, most) in enumerate([(.6, 1.4)] * 3 + [(-.1, .1)]):    # 0.8 x jitter strength; hue
        f = (factors[moved, i] - least) / (most - least)
        assert f.min() >= 0 and f.max() <= 1 and abs(f.mean() - .5) < .02 and abs(f.std() - 12 ** -.5) < .02
    assert torch.corrcoef(factors[moved].T).triu(1).abs().max() < .06    # each factor for itself
    counts = (order * torch.tensor([1, 4, 16, 64])).sum(1).unique(return_counts=True)[1]
    assert len(counts) == 24 and (counts - n / 24).abs().max() < 5 * (n / 24) ** .5
    assert (order.sort(1).values == torch.arange(4)).all()


def test_blur_falls_on_half_of_the_views_with_sigmas_from_a_tenth_to_two(monkeypatch):
    seen = []
    monkeypatch.setattr(simclr, "blur", lambda x, sigma: seen.append(sigma) or 0 * x - 1)
    torch.manual_seed(0)
    x = torch.rand(2000, 3, 4, 4)
    views = simclr.augment(x, blurred=True)
    blurred = (views == -1).all((1, 2, 3))
    assert abs(blurred.float().mean() - .5) < .05 and len(seen[0]) == blurred.sum()
    assert .1 <= seen[0].min() < .15 and 1.95 < seen[0].max() <= 2
    assert (simclr.augment(x) >= 0).all() and len(seen) == 1             # and on none unless asked


# ------------------------------------------------------------------------------------ the model

RESNET18 = {"conv1.weight": (64, 3, 7, 7), "fc.weight": (1000, 512), "fc.bias": (1000,)}    # torchvision's, written down


def norm(name, channels):
    for part in "weight", "bias", "running_mean", "running_var":
        RESNET18[f"{name}.{part}"] = (channels,)
    RESNET18[f"{name}.num_batches_tracked"] = ()


norm("bn1", 64)
for name, i, o in [("layer1.0", 64, 64), ("layer1.1", 64, 64), ("layer2.0", 64, 128), ("layer2.1", 128, 128),
                   ("layer3.0", 128, 256), ("layer3.1", 256, 256), ("layer4.0", 256, 512), ("layer4.1", 512, 512)]:
    RESNET18[f"{name}.conv1.weight"], RESNET18[f"{name}.conv2.weight"] = (o, i, 3, 3), (o, o, 3, 3)
    norm(f"{name}.bn1", o), norm(f"{name}.bn2", o)
for name, i, o in [("layer2.0", 64, 128), ("layer3.0", 128, 256), ("layer4.0", 256, 512)]:
    RESNET18[f"{name}.downsample.0.weight"] = (o, i, 1, 1)
    norm(f"{name}.downsample.1", o)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_names_and_shapes_are_those_of_torchvisions_resnet18():
    assert len(RESNET18) == 122 and shapes(simclr.ResNet(18, 64, stem=7, classes=1000)) == RESNET18
    small = shapes(simclr.ResNet(18, 64))
    assert small == {k: v for k, v in RESNET18.items() if k[:2] != "fc"} | {"conv1.weight": (64, 3, 3, 3)}
    parameters = sum(math.prod(v) for k, v in RESNET18.items() if "running" not in k and "num_" not in k)
    assert parameters == 11_689_512                                      # as torchvision's page says


def test_a_state_dict_moves_either_way_to_torchvision():
    theirs = pytest.importorskip("torchvision", exc_type=Exception, reason="needs torchvision").models.resnet18()
    ours = simclr.ResNet(18, 64, stem=7, classes=1000)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("stem, depth", [(3, 10), (3, 18), (7, 18)])
def test_resnet_equals_a_functional_forward(stem, depth):
    """From the description of the paper (sec. 3.3, fig. 2 and 3B) and the tensors' names alone."""
    torch.manual_seed(0)
    model = simclr.ResNet(depth, 4, stem, classes=5).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point():                                    # statistics, too, must matter
            value.copy_(torch.rand_like(value) + .5 if "var" in name else torch.randn_like(value) * .3)
    w, x = model.state_dict(), torch.randn(2, 3, 40, 40)

    def bn(x, name):
        get = lambda part: w[f"{name}.{part}"].view(1, -1, 1, 1)
        return (x - get("running_mean")) / (get("running_var") + 1e-5).sqrt() * get("weight") + get("bias")

    y = F.relu(bn(F.conv2d(x, w["conv1.weight"], stride=stem // 3, padding=stem // 2), "bn1"))
    y = F.max_pool2d(y, 3, 2, 1) if stem == 7 else y
    for i in 1, 2, 3, 4:
        for j in range({10: 1, 18: 2}[depth]):
            name, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            z = F.relu(bn(F.conv2d(y, w[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
            z = bn(F.conv2d(z, w[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in w:
                y = bn(F.conv2d(y, w[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1")
            y = F.relu(z + y)
    expected = F.linear(F.adaptive_avg_pool2d(y, 1).flatten(1), w["fc.weight"], w["fc.bias"])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for n, m in model.named_modules() if "downsample" not in n)
    assert layers == depth                                               # which is what the number counts


def test_a_depth_that_no_resnet_here_has():
    with pytest.raises(ValueError, match="10 or 18 layers"):
        simclr.ResNet(12, 8)


def test_neighbours_are_those_of_a_loop(tiny, tmp_path, monkeypatch):
    args = settings(data=str(tiny), out=str(tmp_path))
    images = common.load_images(args)
    torch.manual_seed(0)
    model, sheets = simclr.build(args, 8).eval(), []
    monkeypatch.setattr(common, "save_png", lambda path, pictures, *a, **k: sheets.append(pictures))
    same = simclr.neighbours(args, model, images, 5)
    y, x = images.test_labels["class"], images.test.float() / 255
    for which, f in enumerate([model.encoder, nn.Flatten()]):
        h = f(images.normalize(images.test)).detach()
        cos = F.cosine_similarity(h[:, None], h[None], dim=2)
        nearest = [sorted((j for j in range(20) if j != i), key=lambda j: -cos[i, j])[:5] for i in range(20)]
        assert same[which] == pytest.approx(100 * sum(y[i] == y[j] for i in range(20) for j in nearest[i]).item() / 100)
        rows = sheets[0].view(12, 2, 6, 3, 8, 8)[:, which]
        for i in range(12):
            assert torch.equal(rows[i], x[[i, *nearest[i]]])


# ----------------------------------------------------------------------------------- the script


def test_it_learns_what_the_views_have_in_common():
    """Images of two independent patterns; both views have the first, and each another second."""
    torch.manual_seed(0)
    model = simclr.SimCLR(10, 8, 16)
    optimizer = common.adamw(model.parameters(), 3e-3, 0.)
    patterns = torch.randn(2, 2, 3, 8, 8)
    make = lambda first, second: patterns[0][first] + patterns[1][second] + .3 * torch.randn(len(first), 3, 8, 8)
    for _ in range(60):
        first = torch.randint(2, (32,)).repeat(2)
        loss = simclr.ntxent(*model(make(first, torch.randint(2, (64,)))).chunk(2), .5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    a, b = torch.randint(2, (2, 300))
    h = model.eval().encoder(make(a, b)).detach()
    probe = lambda y: common.probe(h[:200], y[:200], h[200:], y[200:], 5)
    assert probe(a) > 90, (probe(a), probe(b))
    # 31 views of one's own kind at cosine 1, 32 of the other at -1: no loss can be lower
    assert loss.item() == pytest.approx(math.log(31 + 32 * math.exp(-4)), abs=.3)


@pytest.mark.parametrize("loss", ["ntxent", "triplet"])
def test_the_whole_script(tiny, tmp_path, loss):
    done = run("--data", tiny, "--steps", 12, "--out", tmp_path, "--loss", loss, *SMALL, script="simclr.py")
    assert done.returncode == 0, done.stderr
    assert ("(uniform guess 2.708)" in done.stdout) == (loss == "ntxent")
    assert "neighbours.png" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["command"].startswith("python simclr.py --steps 12 --batch 8")
    accuracy = result["figures"]["accuracy"]
    assert list(accuracy) == ["raw pixels", "untrained ResNet", "SimCLR"]
    assert all(len(row) == 2 for row in accuracy.values()) and (tmp_path / "neighbours.png").exists()
    for row in accuracy.values():
        assert "  ".join(f"{x:5.1f}" for x in row) in done.stdout        # the table has the same numbers


def test_the_table_at_the_sizes_of_a_gpu_fits_80_columns(capsys):
    ids = dict(shape=torch.arange(10), colour=torch.arange(10) % 8)
    images = common.Images(*[torch.zeros(10, 3, 2, 2, dtype=torch.uint8)] * 2, ids, ids,
                           dict(shape=common.SHAPES, colour=list(common.COLOURS)))
    rows = {name: [12.3] * 5 for name in ("raw pixels", "untrained ResNet", "SimCLR")}
    table = common.label_table(simclr.Args(), images, rows)
    assert len(table.splitlines()) == 5 and max(map(len, table.splitlines())) <= 80


def stop_after(monkeypatch, name, calls):
    """Ctrl-C arrives in this call of a function of simclr.py."""
    usual, count = getattr(simclr, name), []

    def called(*a, **k):
        count.append(1)
        if len(count) == calls:
            signal.raise_signal(signal.SIGINT)
        return usual(*a, **k)
    monkeypatch.setattr(simclr, name, called)


def test_stopped_and_resumed_ends_as_one_never_stopped(tiny, tmp_path, monkeypatch):
    """BatchNorm's running statistics, too."""
    how = dict(data=str(tiny), steps=9)
    whole = simclr.main(settings(**how, out=str(tmp_path / "whole"))).state_dict()
    stop_after(monkeypatch, "ntxent", 5)
    with pytest.raises(KeyboardInterrupt):
        simclr.main(settings(**how, out=str(tmp_path / "cut")))
    done = run("--resume", "--out", tmp_path / "cut", script="simclr.py")
    assert done.returncode == 0 and "Continuing from step 5" in done.stdout, done.stderr
    cut = torch.load(tmp_path / "cut/checkpoint.pt", weights_only=True)["model"]
    assert set(whole) == set(cut)
    for name in whole:
        assert torch.equal(whole[name], cut[name]), name
    again = run("--resume", "--steps", 0, "--out", tmp_path / "cut", script="simclr.py")    # evaluates without training
    assert again.returncode == 0 and again.stdout.split("\n\n")[1:] == done.stdout.split("\n\n")[1:]


@pytest.mark.parametrize("flags, words", [
    ("--batch 1", ["--batch must be 2 or more, not 1"]),
    ("--temperature 0", ["--temperature must be in (0, inf), not 0.0"]),
    ("--temperature nan", ["--temperature must be in (0, inf), not nan"]),
    ("--temperature inf", ["--temperature must be in (0, inf), not inf"]),
    ("--margin -1", ["--margin must be 0 or more, not -1.0"]),
    ("--crop-scale 0", ["--crop-scale must be in (0, 1], not 0.0"]),
    ("--hue .6", ["--hue must be in [0, 0.5], not 0.6"]),
    ("--jitter -1", ["--jitter must be 0 or more, not -1.0"]),
    ("--warmup 1.5", ["--warmup must be in [0, 1], not 1.5"]),
    ("--clip 0", ["--clip must be in (0, inf], not 0.0"]),
    ("--depth 12", ["--depth", "10, 18"]),
    ("--loss simclr", ["--loss", "ntxent"]),
    ("--width 4", ["--width must be 8 or more, not 4"]),
    ("--labels -1", ["--labels must be 0 or more, not -1"]),
    ("--temprature 1", ["did you mean --temperature?"]),
])
def test_a_bad_flag_gets_one_sentence(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        common.cli(simclr.main, simclr.Args, flags.split())
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("simclr.py: ") and text.count("\n") == 1
    assert all(word in text for word in words), text
    assert not list(tmp_path.iterdir())


def test_too_many_labels_are_refused_before_training(tiny, tmp_path):
    done = call("--data", tiny, "--out", tmp_path / "run", *SMALL, "--labels", 33, script="simclr.py")
    refused(done, 1, "--labels 33 is too many: a class has only 32", script="simclr.py")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how, called", [({}, {"ntxent"}), (dict(blur=True), {"ntxent", "blur"}),
                                         (dict(loss="triplet"), {"triplet"})])
def test_settings_reach_the_method(tiny, tmp_path, monkeypatch, how, called):
    calls, given = set(), {}

    def watch(name):
        usual = getattr(simclr, name)

        def watched(*a):
            calls.add(name)
            given[name] = a
            return usual(*a)
        monkeypatch.setattr(simclr, name, watched)
    for name in "ntxent", "triplet", "blur", "augment":
        watch(name)
    monkeypatch.setattr(common, "linear_probe", lambda args, f, images: [50.] * len(args.labels))
    simclr.main(settings(data=str(tiny), steps=3, out=str(tmp_path / "run"), temperature=.3, margin=.4,
                         crop_scale=.6, jitter=.7, hue=.1, **how))
    x, *numbers = given["augment"]
    assert calls == called | {"augment"} and numbers == [.6, .7, .1, "blur" in how]
    assert x.shape == (16, 3, 8, 8) and torch.equal(x[:8], x[8:])        # z1 and z2 are of the same images
    assert len(x.unique(dim=0)) == 8 and 0 <= x.min() and x.max() <= 1
    z1, z2, number = given["triplet" if "loss" in how else "ntxent"]
    assert number == (.4 if "loss" in how else .3) and z1.shape == z2.shape == (8, 8)


def test_what_the_rows_of_the_table_are_of(tiny, tmp_path, monkeypatch):
    """Raw pixels; then h, never z, of the untrained and of the trained ResNet, both in evaluation mode; the
    untrained one has the weights with which the training began."""
    probed = []
    monkeypatch.setattr(common, "linear_probe", lambda args, f, images: probed.append(f) or [50.] * len(args.labels))
    args = settings(data=str(tiny), steps=3, out=str(tmp_path / "run"))
    torch.manual_seed(args.seed)
    start = simclr.build(args, 8).encoder.state_dict()
    model = simclr.main(args)
    pixels, untrained, trained = probed
    assert isinstance(pixels, nn.Flatten) and trained is model.encoder
    for f in untrained, trained:
        assert type(f) is simclr.ResNet and not f.training and f(torch.rand(2, 3, 8, 8)).shape == (2, 64)
    assert all(torch.equal(value, start[name]) for name, value in untrained.state_dict().items())
    assert not torch.equal(trained.conv1.weight, start["conv1.weight"])
    assert (trained.bn1.running_mean != 0).any()
