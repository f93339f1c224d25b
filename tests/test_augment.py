"""Every operation against Pillow or a plain definition, every draw against the distribution it claims."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from lab import augment
from lab.augment import (
    BLUR,
    GREY,
    SOLARIZE,
    crop,
    cutmix,
    draw_beta,
    draw_box,
    draw_crops,
    jitter,
    mirror,
    mix,
    one_of_three,
    three_augment,
)

ENHANCE = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def noise(B, S):
    return torch.randint(256, (B, 3, S, S), dtype=torch.uint8)


def to_pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def levels(image):
    """A Pillow image -> (3, S, S) float, 0 to 255."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()


def boxes(B, S):
    """start, size (2, B): crops of any shape, the whole, single pixels and single lines among them."""
    size = torch.randint(1, S + 1, (2, B))
    size[:, :6] = torch.tensor([[S, 1, 1, S, S - 1, 2], [S, 1, S, 1, S - 1, 2]])
    start = (torch.rand(2, B) * (S - size + 1)).long()
    start[:, 6:8] = (S - size)[:, 6:8]
    return start, size


def pillow_box(start, size):
    top, left, height, width = *start.tolist(), *size.tolist()
    return left, top, left + width, top + height


def spy(monkeypatch, name):
    """A list that gets the arguments of each call of augment's function of that name."""
    calls, function = [], getattr(augment, name)

    def recording(*args, **kwargs):
        calls.append((*args, *kwargs.values()))
        return function(*args, **kwargs)

    monkeypatch.setattr(augment, name, recording)
    return calls


def assert_mean(sample, mean, sd):
    """The mean of independent draws (N, ...), as it should be within 5 standard errors."""
    assert ((sample.double().mean(dim=0) - mean).abs() < 5 * sd / math.sqrt(len(sample))).all()


def assert_uniform(sample, low, high):
    assert sample.min() >= low and sample.max() <= high
    assert_mean(sample, (low + high) / 2, (high - low) / math.sqrt(12))
    assert_mean((sample - (low + high) / 2) ** 2, (high - low) ** 2 / 12, (high - low) ** 2 / math.sqrt(180))


# Crop, resize, flip


@pytest.mark.parametrize("S", [20, 32])
def test_crop_is_pillows_to_float_precision_where_nothing_clips(S):
    """Pillow neither rounds nor clips images of floats. The sizes of cubic weights sum to 1.25 at most on an axis."""
    B = 100
    images, (start, size) = 0.3 + 0.4 * torch.rand(B, 3, S, S), boxes(B, S)
    ours = crop(images, start, size)
    for i in range(B):
        image = Image.fromarray(images[i, 0].numpy()).crop(pillow_box(start[:, i], size[:, i]))
        theirs = torch.from_numpy(np.array(image.resize((S, S), Image.Resampling.BICUBIC)))
        assert (ours[i, 0] - theirs).abs().max() < 2e-6


@pytest.mark.parametrize("S", [20, 32])
def test_crop_is_pillows_clipping_included(S):
    """Bytes are rounded after each axis: half a level, and 1.25 times that from the first."""
    B = 100
    images, (start, size) = noise(B, S), boxes(B, S)
    ours = 255 * crop(images / 255, start, size)
    for i in range(B):
        image = to_pillow(images[i]).crop(pillow_box(start[:, i], size[:, i])).resize((S, S), Image.Resampling.BICUBIC)
        assert (ours[i] - levels(image)).abs().max() < 1.13


def test_a_mirror_exchanges_left_and_right_where_it_shall():
    images, where = noise(50, 20), torch.arange(50) % 2 == 0
    mirrored = mirror(images, where)
    for before, after, flip in zip(images, mirrored, where, strict=True):
        assert torch.equal(after.float(), levels(ImageOps.mirror(to_pillow(before))) if flip else before.float())


def torchvision_crop(S):
    """One draw as RandomResizedCrop makes it, by the word of torchvision's documentation and code."""
    for _ in range(10):
        area, ratio = S * S * random.uniform(0.08, 1), math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= S and 0 < h <= S:
            return random.randint(0, S - h), random.randint(0, S - w), h, w
    return 0, 0, S, S


@pytest.mark.parametrize("S", [20, 32])
def test_crops_are_distributed_as_torchvisions(S):
    N = 20_000
    start, size = draw_crops(N, S, "cpu")
    assert (start >= 0).all() and (size >= 1).all() and (start + size <= S).all()
    random.seed(0)
    ours, theirs = torch.cat([start, size]).T, torch.tensor([torchvision_crop(S) for _ in range(N)], dtype=torch.float)

    def statistics(sample):
        """How often each of top, left, height, width has each value, and what tells how they depend on each other."""
        top, left, h, w = sample.T
        products = torch.stack([h * w, (w / h).log(), top * h, left * w, top * left, (top == 0) * (left == 0)], dim=1)
        return torch.cat([(sample[..., None] == torch.arange(S + 1)).flatten(1), products], dim=1).double()

    a, b = statistics(ours), statistics(theirs)
    error = ((a.var(dim=0) + b.var(dim=0)) / N).sqrt()
    assert ((a.mean(dim=0) - b.mean(dim=0)).abs() <= 5 * error).all()


def test_the_whole_image_where_no_try_fits():
    start, size = draw_crops(3, 20, "cpu", tries=0)
    assert (start == 0).all() and (size == 20).all()


# Grey, solarize, blur


def choose(images, choice, sigma=1.0):
    B = len(images)
    return 255 * one_of_three(images / 255, torch.full((B,), choice), torch.full((B,), sigma))


def test_grey_and_solarize_are_pillows():
    images = noise(20, 20)
    for image, grey, solarized in zip(images, choose(images, GREY), choose(images, SOLARIZE), strict=True):
        assert (grey - levels(to_pillow(image).convert("L"))).abs().max() < 0.51
        assert (solarized - levels(ImageOps.solarize(to_pillow(image)))).abs().max() < 1e-4


SIGMAS = [0.1, 0.3, 0.5, 0.8, 1.0, 1.3, 1.7, 2.0]


@pytest.mark.parametrize("S", [5, 20, 32])
def test_blur_is_three_boxes_of_a_third_of_the_variance_over_replicated_borders(S):
    """In float64, with a box's width, of which the two outermost pixels share the fraction, found by bisection."""
    images = noise(len(SIGMAS), S)
    ours = one_of_three(images / 255, torch.full((len(SIGMAS),), BLUR), torch.tensor(SIGMAS))
    offsets = np.arange(-5, 6)

    def box(width):
        weight = np.clip((width + 1) / 2 - abs(offsets), 0, 1)
        return weight / weight.sum()

    for image, sigma, blurred in zip(images.numpy() / 255, SIGMAS, ours, strict=True):
        low, high = 1, 9
        for _ in range(60):
            width = (low + high) / 2
            low, high = (width, high) if (box(width) * offsets**2).sum() < sigma**2 / 3 else (low, width)
        for axis in 1, 2:
            for _ in range(3):
                padded = np.pad(image, [(5, 5) if a == axis else (0, 0) for a in range(3)], mode="edge")
                image = np.lib.stride_tricks.sliding_window_view(padded, 11, axis=axis) @ box(width)
        torch.testing.assert_close(blurred.double(), torch.from_numpy(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_blur_is_pillows(sigma):
    """Which rounds after each of six boxes, half a level each time."""
    images = noise(20, 32)
    for image, blurred in zip(images, choose(images, BLUR, sigma), strict=True):
        assert (blurred - levels(to_pillow(image).filter(ImageFilter.GaussianBlur(sigma)))).abs().max() < 3.2


@pytest.mark.parametrize("sigma", SIGMAS)
def test_blur_is_near_a_gaussian(sigma):
    """A light pixel becomes a spot of variance sigma^2 on each axis, nearly Gaussian once that is wider than pixels."""
    light = torch.zeros(1, 3, 33, 33)
    light[:, :, 16, 16] = 1
    spot = one_of_three(light, torch.tensor([BLUR]), torch.tensor([sigma]))[0, 0].double()
    d = torch.arange(-16.0, 17)
    assert spot.sum().item() == pytest.approx(1, abs=1e-5)
    for axis in 0, 1:
        assert (spot.sum(dim=axis) * d**2).sum().item() == pytest.approx(sigma**2, rel=1e-4)
    gaussian = torch.exp(-(d**2) / (2 * sigma**2))
    gaussian = torch.outer(gaussian, gaussian) / gaussian.sum() ** 2
    if sigma >= 1:
        assert (spot - gaussian).abs().max() < 0.11 * gaussian.max()


def test_each_image_gets_its_own_of_the_three():
    images, sigma = noise(30, 20) / 255, 0.1 + 1.9 * torch.rand(30)
    choice = torch.arange(30) % 3
    mixed = one_of_three(images, choice, sigma)
    for i in range(30):
        alone = one_of_three(*(x[i : i + 1] for x in (images, choice, sigma)))
        assert (mixed[i] - alone).abs().max() < 1e-6


# Brightness, contrast, saturation


def pillow_jitter(image, factors, order):
    for kind in order:
        image = ENHANCE[kind](image).enhance(factors[kind])
    return image


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("factor", [0.7, 0.9, 1.3])
def test_one_jitter_is_pillows(kind, factor):
    """Pillow cuts off the fraction, and rounds the grey, which counts |1 - factor| times."""
    images, factors = noise(20, 20), torch.ones(20, 3)
    factors[:, kind] = factor
    ours = 255 * jitter(images / 255, factors, torch.tensor([[0, 1, 2]]).expand(20, 3))
    for image, out in zip(images, ours, strict=True):
        difference = out - levels(ENHANCE[kind](to_pillow(image)).enhance(factor))
        assert difference.min() > -0.16 and difference.max() < 1.16


def test_jitter_is_pillows_in_all_six_orders():
    """Within what Pillow cuts off three times. What clips is all that tells the orders apart: else they commute."""
    orders, repeats = list(itertools.permutations(range(3))), 15
    images, factors = noise(6 * repeats, 20), 0.7 + 0.6 * torch.rand(6 * repeats, 3)
    ours = 255 * jitter(images / 255, factors, torch.tensor(orders * repeats))
    difference = torch.empty(6 * repeats, 6)
    for i, j in itertools.product(range(6 * repeats), range(6)):
        theirs = levels(pillow_jitter(to_pillow(images[i]), factors[i].tolist(), orders[j]))
        difference[i, j] = (ours[i] - theirs).abs().max()
    worst = difference.view(repeats, 6, 6).amax(dim=0)  # [our order, Pillow's order]
    assert worst.diag().max() < 4 and (worst + 99 * torch.eye(6)).min() > 10


# All together


def test_three_augment_is_pillows_pipeline(monkeypatch):
    """With the draws read off: all that differs is what Pillow rounds or cuts off in each of up to eleven steps."""
    B, S = 60, 32
    names = "crop", "mirror", "one_of_three", "jitter"
    crops, mirrors, threes, jitters = (spy(monkeypatch, name) for name in names)
    images = noise(B, S)
    ours = 255 * three_augment(images)
    (_, start, size), (_, flip), (_, choice, sigma), (_, factors, order) = crops[0], mirrors[0], threes[0], jitters[0]
    for i in range(B):
        image = to_pillow(images[i]).crop(pillow_box(start[:, i].long(), size[:, i].long()))
        image = image.resize((S, S), Image.Resampling.BICUBIC)
        if flip[i]:
            image = ImageOps.mirror(image)
        if choice[i] == GREY:
            image = image.convert("L").convert("RGB")
        elif choice[i] == SOLARIZE:
            image = ImageOps.solarize(image)
        else:
            image = image.filter(ImageFilter.GaussianBlur(sigma[i].item()))
        image = pillow_jitter(image, factors[i].tolist(), order[i].tolist())
        difference = (ours[i] - levels(image)).abs()
        assert difference.max() < 8.5 and difference.mean() < 2  # of 1500 images: 7.7 and 1.9


def test_draws(monkeypatch):
    N = 20_000
    mirrors, threes, jitters = (spy(monkeypatch, name) for name in ("mirror", "one_of_three", "jitter"))
    three_augment(noise(N, 4))
    (_, flip), (_, choice, sigma), (_, factors, order) = mirrors[0], threes[0], jitters[0]
    assert_mean(flip, 1 / 2, 1 / 2)
    assert_mean(choice[:, None] == torch.arange(3), 1 / 3, math.sqrt(2) / 3)
    assert_uniform(sigma, 0.1, 2)
    for kind in range(3):
        assert_uniform(factors[:, kind], 0.7, 1.3)
    orders = torch.tensor(list(itertools.permutations(range(3))))
    assert_mean((order[:, None] == orders).all(dim=2), 1 / 6, math.sqrt(5) / 6)
    draws = torch.stack([flip, choice == GREY, choice == BLUR, sigma, *factors.T, *order.T[:2]]).double()
    independent = torch.corrcoef(draws)
    independent[1:3, 1:3] = independent[7:, 7:] = 0
    assert (independent.fill_diagonal_(0).abs() < 5 / math.sqrt(N)).all()


@pytest.mark.parametrize("B, S", [(1, 32), (1, 20), (7, 20), (64, 32)])
def test_shapes_range_and_seed(B, S):
    images = noise(B, S)
    before = images.clone()
    torch.manual_seed(1)
    a = three_augment(images)
    torch.manual_seed(1)
    b = three_augment(images)
    assert torch.equal(images, before)
    assert a.shape == (B, 3, S, S) and a.dtype == torch.float32 and a.is_contiguous()
    assert a.min() >= 0 and a.max() <= 1 and not a.isnan().any()
    assert torch.equal(a, b) and not torch.equal(a, three_augment(images))


def test_every_image_is_augmented_in_its_own_way(monkeypatch):
    names = "crop", "mirror", "one_of_three", "jitter"
    crops, mirrors, threes, jitters = (spy(monkeypatch, name) for name in names)
    out = three_augment(noise(1, 20).expand(50, 3, 20, 20))
    assert len(out.flatten(1).unique(dim=0)) == 50
    (_, start, size), (_, flip), (_, choice, sigma), (_, factors, order) = crops[0], mirrors[0], threes[0], jitters[0]
    different = [len(drawn.unique(dim=0)) for drawn in (flip, choice, order, start.T, size.T, sigma, factors)]
    assert different[:3] == [2, 3, 6] and min(different[3:5]) > 25 and different[5:] == [50, 50]


# Mixup, CutMix


@pytest.mark.parametrize("rows, columns", [((0, 4), (13, 20)), ((5, 5), (0, 9)), ((0, 20), (0, 20))])
def test_cutmix(rows, columns):
    images = torch.rand(5, 3, 20, 20)
    before = images.clone()
    mixed, weight = cutmix(images, slice(*rows), slice(*columns))
    assert torch.equal(images, before)
    for y, x in itertools.product(range(20), range(20)):
        inside = rows[0] <= y < rows[1] and columns[0] <= x < columns[1]
        assert torch.equal(mixed[:, :, y, x], (images.flip(0) if inside else images)[:, :, y, x])
    assert weight == pytest.approx((mixed[0] == images[0]).double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("S", [20, 32])
@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.8, 0.995, 1.0])
def test_box(S, lam):
    """Any pixel may be the centre, on both axes independently; sides as in the CutMix paper's and timm's code."""
    side = int(S * math.sqrt(1 - lam))
    spans = [(max(0, c - side // 2), min(S, c + side // 2)) for c in range(S)]
    N = 3000
    drawn = [tuple((axis.start, axis.stop) for axis in draw_box(S, lam)) for _ in range(N)]
    for axis in zip(*drawn, strict=True):
        for span in set(spans) | set(axis):
            p = spans.count(span) / S
            assert abs(axis.count(span) / N - p) <= 5 * math.sqrt(p * (1 - p) / N)
    if side > 1:
        correlation = torch.corrcoef(torch.tensor(drawn).double().sum(dim=2).T)[0, 1]
        assert correlation.abs() < 5 / math.sqrt(N)


@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_beta(alpha):
    lam = torch.tensor([draw_beta(alpha) for _ in range(4000)])
    variance, kurtosis = 1 / (4 * (2 * alpha + 1)), 3 - 6 / (2 * alpha + 3)
    assert_mean(lam, 1 / 2, math.sqrt(variance))
    assert_mean((lam - 1 / 2) ** 2, variance, variance * math.sqrt(kurtosis - 1))


def test_mix(monkeypatch):
    """One image black, one white: what a batch shows of either is what the targets say."""
    betas, boxes, N, S = spy(monkeypatch, "draw_beta"), spy(monkeypatch, "draw_box"), 1000, 20
    images, labels = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).repeat(1, 3, S, S), torch.tensor([2, 0])
    cuts = []
    for _ in range(N):
        before = len(boxes)
        mixed, targets = mix(images, labels, 4)
        cuts.append(len(boxes) > before)
        white = mixed[0].mean().item()
        assert targets.flatten().tolist() == pytest.approx([white, 0, 1 - white, 0, 1 - white, 0, white, 0], abs=1e-5)
        assert mixed[1].mean().item() == pytest.approx(1 - white, abs=1e-5)
        assert ((mixed == 0) | (mixed == 1)).all() if cuts[-1] else mixed[0].min() == mixed[0].max()
    assert_mean(torch.tensor(cuts), 1 / 2, 1 / 2)
    assert betas == [(1.0,) if cut else (0.8,) for cut in cuts]


def test_mix_is_mixup_or_cutmix_with_the_batch_reversed(monkeypatch):
    box = slice(0, 4), slice(13, 20)
    monkeypatch.setattr(augment, "draw_beta", lambda alpha: 0.3)
    monkeypatch.setattr(augment, "draw_box", lambda S, lam: {(20, 0.3): box}[S, lam])
    images, eye, cuts = torch.rand(5, 3, 20, 20), torch.eye(5), []
    for _ in range(20):
        mixed, targets = mix(images, torch.arange(5), 5)
        cut = torch.equal(mixed, cutmix(images, *box)[0])
        lam = 1 - 4 * 7 / 400 if cut else 0.3
        assert cut or (mixed - (0.3 * images + 0.7 * images.flip(0))).abs().max() < 1e-6
        assert (targets - (lam * eye + (1 - lam) * eye.flip(0))).abs().max() < 1e-6
        cuts.append(cut)
    assert True in cuts and False in cuts


def test_mix_shapes_and_seed():
    for B in 1, 7, 8:
        images, labels = torch.rand(B, 3, 20, 20), torch.randint(10, (B,))
        before = images.clone()
        for s in range(10):
            torch.manual_seed(s)
            mixed, targets = mix(images, labels, 10)
            torch.manual_seed(s)
            again = mix(images, labels, 10)
            assert torch.equal(mixed, again[0]) and torch.equal(targets, again[1])
            assert torch.equal(images, before) and mixed.shape == images.shape
            assert targets.shape == (B, 10) and targets.dtype == torch.float32
            torch.testing.assert_close(targets.sum(dim=1), torch.ones(B))


# The host never waits


def test_nothing_depends_on_values_on_the_device():
    """Tensors of the meta device have none: whoever reads one, or needs it to know a shape, fails."""
    images = three_augment(torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="meta"))
    for _ in range(10):
        mixed, targets = mix(images, torch.empty(8, dtype=torch.int64, device="meta"), 100)
        assert mixed.shape == (8, 3, 32, 32) and targets.shape == (8, 100)
        assert mixed.is_meta and targets.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_wait_on_a_gpu():
    images, labels = noise(8, 32).cuda(), torch.zeros(8, dtype=torch.int64).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            mix(three_augment(images), labels, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
