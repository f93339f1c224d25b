"""Every operation against Pillow or a plain definition, every random draw against its stated distribution."""

import itertools
import math
import random
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from lab import augment
from lab.augment import BLUR, GREY, SOLARIZE, crop, mix, one_of_three, three_augment
from lab.imagenet import random_crop

EPS = torch.finfo(torch.float32).eps
ENHANCE = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    random.seed(0)


def noise(B, S):
    return torch.randint(256, (B, 3, S, S), dtype=torch.uint8)


def to_pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def levels(image):
    """A Pillow image -> (3, S, S) float, 0 to 255."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()


def pillow_crop(image, start, size):
    (top, left), (height, width) = start.tolist(), size.tolist()
    return image.crop((left, top, left + width, top + height)).resize(image.size, Image.Resampling.BICUBIC)


def pillow_choice(image, choice, sigma):
    if choice == GREY:
        return image.convert("L").convert("RGB")
    return ImageOps.solarize(image) if choice == SOLARIZE else image.filter(ImageFilter.GaussianBlur(sigma))


def pillow_jitter(image, factors, order):
    for kind in order:
        image = ENHANCE[kind](image).enhance(factors[kind])
    return image


def assert_mean(sample, mean, sd):
    """The mean of independent draws (N, ...) is as expected, within 5 standard errors."""
    assert ((sample.double().mean(dim=0) - mean).abs() < 5 * sd / math.sqrt(len(sample))).all()


def assert_uniform(sample, low, high):
    assert sample.min() >= low and sample.max() <= high
    assert_mean(sample, (low + high) / 2, (high - low) / math.sqrt(12))
    assert_mean((sample - (low + high) / 2) ** 2, (high - low) ** 2 / 12, (high - low) ** 2 / math.sqrt(180))


@pytest.mark.parametrize("S", [20, 32])
def test_a_crop_is_pillows(S):
    """For floats, which Pillow neither rounds nor clips, and for bytes, which it rounds and clips after each axis.

    In float32 a place is off by up to S eps, and so is a weight, on both axes. Rounding takes half a level on each
    axis, and the second multiplies what the first took by up to 1.25, the sum of cubic weights without their signs.
    """
    B = 100
    size = torch.randint(1, S + 1, (2, B))
    size[:, :6] = torch.tensor([[S, 1, 1, S, S - 1, 2], [S, 1, S, 1, S - 1, 2]])
    start = (torch.rand(2, B) * (S - size + 1)).long()
    start[:, 6:8] = (S - size)[:, 6:8]
    gentle, rough = 0.3 + 0.4 * torch.rand(B, 3, S, S), noise(B, S)
    floats, clipped = crop(gentle, start, size), 255 * crop(rough / 255, start, size)
    for i, box in enumerate(zip(start.T, size.T, strict=True)):
        pillows = np.array(pillow_crop(Image.fromarray(gentle[i, 0].numpy()), *box))
        assert (floats[i, 0] - torch.from_numpy(pillows)).abs().max() < 4 * S * EPS
        assert (clipped[i] - levels(pillow_crop(to_pillow(rough[i]), *box))).abs().max() < 1.13


def torchvision_crop(width, height):
    """RandomResizedCrop according to torchvision's documentation and code."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * 4 / 3), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


def crops_of_images(n, width, height):
    draw = np.random.default_rng(0)
    crops = np.array([random_crop(width, height, draw) for _ in range(n)]).T
    return *crops[:2], *(crops[2:] - crops[:2])


def crops_of_a_batch(n, S, _):
    (top, left), (height, width) = (x.int().numpy() for x in augment.draw_crops(n, S, "cpu"))
    return left, top, width, height


@pytest.mark.parametrize(
    "draw, size, n",
    [(crops_of_images, size, 4000) for size in ((500, 375), (300, 300), (40, 110), (9, 7), (1, 1))]
    + [(crops_of_a_batch, (S, S), 20_000) for S in (20, 32)],
)
def test_crops_are_distributed_as_torchvisions(draw, size, n):
    """Two-sample Kolmogorov-Smirnov tests: edges, sides, area, ratio, and how the edges depend on each other."""
    samples = []
    for left, top, w, h in draw(n, *size), np.array([torchvision_crop(*size) for _ in range(n)]).T:
        assert min(left.min(), top.min()) >= 0 and min(w.min(), h.min()) > 0
        assert (left + w).max() <= size[0] and (top + h).max() <= size[1]
        samples.append([left, top, w, h, left + w, top + h, w * h, w / h, left * top, (left == 0) & (top == 0)])
    for a, b in zip(*samples, strict=True):
        values = np.union1d(a, b)
        cumulative = [np.searchsorted(np.sort(x), values, side="right") / n for x in (a, b)]
        assert np.abs(cumulative[0] - cumulative[1]).max() < 1.95 * math.sqrt(
            2 / n
        )  # one seed in a thousand exceeds it
    for extreme, most in (min, 10 / n), (max, math.sqrt(2 / n)):  # few areas are near the largest
        ours, theirs = (extreme(sample[6]) / (size[0] * size[1]) for sample in samples)
        assert abs(ours - theirs) <= most


@pytest.mark.parametrize(
    "size, box", [((1000, 30), (480, 0, 520, 30)), ((30, 1000), (0, 480, 30, 520)), ((400, 3), (198, 0, 202, 3))]
)
def test_where_no_try_fits_the_crop_is_the_middle(size, box):
    draw = np.random.default_rng(0)
    assert all(random_crop(*size, draw) == box for _ in range(50))
    start, sides = augment.draw_crops(3, 20, "cpu", tries=0)
    assert (start == 0).all() and (sides == 20).all()


@pytest.mark.parametrize("S", [5, 32])
def test_grey_solarize_and_blur_are_pillows_each_where_it_is_chosen(S):
    """Pillow rounds grey values (and their weights, to 16 bits), and a blur after each of six boxes: half a level."""
    images, choice, sigma = noise(240, S), torch.arange(3).repeat(80), torch.linspace(0.1, 2, 240)
    for image, kind, s, ours in zip(images, choice, sigma, one_of_three(images / 255, choice, sigma), strict=True):
        difference = 255 * ours - levels(pillow_choice(to_pillow(image), kind, s.item()))
        assert difference.abs().max() < {GREY: 0.502, SOLARIZE: 0, BLUR: 3.2}[kind.item()] + 255 * 4 * EPS


def test_a_blur_has_the_variance_of_its_gaussian():
    """Seen on a single light pixel."""
    sigma, light, d = torch.linspace(0.1, 2, 20), torch.zeros(20, 3, 33, 33), torch.arange(-16.0, 17)
    light[:, :, 16, 16] = 1
    spots = one_of_three(light, torch.full((20,), BLUR), sigma).double()
    for axis in 2, 3:
        variance = (spots.sum(dim=axis) * d**2).sum(dim=2)
        assert (variance - sigma[:, None].double() ** 2).abs().max() < 64 * EPS


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("factor", [0.7, 0.9, 1.3])
def test_one_jitter_is_pillows(kind, factor):
    """Pillow truncates the result, and rounds the grey value, which has the weight |1 - factor|."""
    images, factors = noise(20, 20), torch.ones(20, 3)
    factors[:, kind] = factor
    ours = 255 * augment.jitter(images / 255, factors, torch.tensor([[0, 1, 2]]).expand(20, 3))
    for image, out in zip(images, ours, strict=True):
        difference = out - levels(ENHANCE[kind](to_pillow(image)).enhance(factor))
        assert difference.min() > -0.16 and difference.max() < 1.16


def test_jitter_is_pillows_in_all_six_orders():
    """Up to Pillow's three truncations. Without clipping the operations would commute, in any order."""
    orders, repeats = list(itertools.permutations(range(3))), 15
    images, factors = noise(6 * repeats, 20), 0.7 + 0.6 * torch.rand(6 * repeats, 3)
    ours = 255 * augment.jitter(images / 255, factors, torch.tensor(orders * repeats))
    difference = torch.empty(6 * repeats, 6)
    for i, j in itertools.product(range(6 * repeats), range(6)):
        theirs = levels(pillow_jitter(to_pillow(images[i]), factors[i].tolist(), orders[j]))
        difference[i, j] = (ours[i] - theirs).abs().max()
    worst = difference.view(repeats, 6, 6).amax(dim=0)  # [our order, Pillow's order]
    assert worst.diag().max() < 4 and (worst + 99 * torch.eye(6)).min() > 10


@pytest.fixture
def augmented(monkeypatch):
    """augmented(images) -> three_augment(images); its draws: start, size, flip, choice, sigma, factors, order."""
    names = "crop", "mirror", "one_of_three", "jitter"
    spies = [Mock(wraps=getattr(augment, name)) for name in names]
    for name, spy in zip(names, spies, strict=True):
        monkeypatch.setattr(augment, name, spy)
    return lambda images: (three_augment(images), [x for spy in spies for x in spy.call_args.args[1:]])


@pytest.mark.parametrize("B, S", [(1, 20), (60, 32)])
def test_three_augment_is_pillows_pipeline(augmented, B, S):
    """They differ by Pillow's rounding in up to eleven steps: over 1500 images at most 7.7 levels, 1.9 on average."""
    images = noise(B, S)
    before = images.clone()
    ours, (start, size, flip, choice, sigma, factors, order) = augmented(images)
    assert ours.shape == (B, 3, S, S) and ours.dtype == torch.float32 and ours.is_contiguous()
    assert ((ours >= 0) & (ours <= 1)).all() and torch.equal(images, before)
    for i, image in enumerate(images):
        image = pillow_crop(to_pillow(image), start[:, i].int(), size[:, i].int())
        image = pillow_choice(ImageOps.mirror(image) if flip[i] else image, choice[i], sigma[i].item())
        image = pillow_jitter(image, factors[i].tolist(), order[i].tolist())
        difference = (255 * ours[i] - levels(image)).abs()
        assert difference.max() < 8.5 and difference.mean() < 2


def test_each_image_gets_draws_of_its_own_independent_and_uniform(augmented):
    N = 20_000
    _, (_, _, flip, choice, sigma, factors, order) = augmented(noise(N, 4))
    assert_mean(flip, 1 / 2, 1 / 2)
    assert_mean(choice[:, None] == torch.arange(3), 1 / 3, math.sqrt(2) / 3)
    assert_uniform(sigma, 0.1, 2)
    for factor in factors.T:
        assert_uniform(factor, 0.7, 1.3)
    orders = torch.tensor(list(itertools.permutations(range(3))))
    assert_mean((order[:, None] == orders).all(dim=2), 1 / 6, math.sqrt(5) / 6)
    draws = torch.stack([flip, choice == GREY, choice == BLUR, sigma, *factors.T, *order.T[:2]]).double()
    correlation = torch.corrcoef(draws)
    correlation[1:3, 1:3] = correlation[7:, 7:] = 0
    assert (correlation.fill_diagonal_(0).abs() < 5 / math.sqrt(N)).all()


@pytest.mark.parametrize("S", [20, 32])
@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.8, 0.995, 1.0])
def test_cutmixs_box_is_centred_on_any_pixel(S, lam):
    """Independently on both axes; sides as in the code of the CutMix paper and of timm."""
    side, N = int(S * math.sqrt(1 - lam)), 3000
    spans = [(max(0, c - side // 2), min(S, c + side // 2)) for c in range(S)]
    drawn = [tuple((axis.start, axis.stop) for axis in augment.draw_box(S, lam)) for _ in range(N)]
    for axis in zip(*drawn, strict=True):
        for span in set(spans) | set(axis):
            p = spans.count(span) / S
            assert abs(axis.count(span) / N - p) <= 5 * math.sqrt(p * (1 - p) / N)
    if side > 1:
        correlation = torch.corrcoef(torch.tensor(drawn).double().sum(dim=2).T)[0, 1]
        assert correlation.abs() < 5 / math.sqrt(N)


@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_beta(alpha):
    lam = torch.tensor([augment.draw_beta(alpha) for _ in range(4000)])
    variance, kurtosis = 1 / (4 * (2 * alpha + 1)), 3 - 6 / (2 * alpha + 3)
    assert_mean(lam, 1 / 2, math.sqrt(variance))
    assert_mean((lam - 1 / 2) ** 2, variance, variance * math.sqrt(kurtosis - 1))


@pytest.mark.parametrize("rows, columns", [((0, 4), (13, 20)), ((5, 5), (0, 9)), ((0, 20), (0, 20))])
def test_mix_is_mixup_or_cutmix_with_the_batch_reversed(monkeypatch, rows, columns):
    """Half of the time each, with Beta(0.8, 0.8) and Beta(1, 1). Targets give the fraction of each image."""
    box, inside, cuts = (slice(*rows), slice(*columns)), torch.zeros(20, 20, dtype=torch.bool), []
    inside[box] = True
    monkeypatch.setattr(augment, "draw_beta", {0.8: 0.3, 1.0: 0.6}.__getitem__)
    monkeypatch.setattr(augment, "draw_box", lambda S, lam: {(20, 0.6): box}[S, lam])
    images, own = torch.rand(5, 3, 20, 20), torch.eye(5)
    before, partners = images.clone(), images.flip(0)
    for _ in range(1000):
        mixed, targets = mix(images, torch.arange(5), 5)
        cuts.append(torch.equal(mixed, torch.where(inside, partners, before)))
        lam = 1 - inside.double().mean() if cuts[-1] else 0.3
        assert cuts[-1] or (mixed - (lam * before + (1 - lam) * partners)).abs().max() < 4 * EPS
        assert (targets - (lam * own + (1 - lam) * own.flip(0))).abs().max() < 4 * EPS
        assert targets.dtype == torch.float32 and torch.equal(images, before)
    assert_mean(torch.tensor(cuts), 1 / 2, 1 / 2)


def test_nothing_depends_on_values_on_the_device():
    """Tensors on the meta device have no values: code that reads one, or needs one for a shape, fails."""
    images = three_augment(torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="meta"))
    for _ in range(10):
        mixed, targets = mix(images, torch.empty(8, dtype=torch.int64, device="meta"), 100)
        assert mixed.shape == (8, 3, 32, 32) and targets.shape == (8, 100) and mixed.is_meta and targets.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_does_not_wait_for_a_gpu():
    images, labels = noise(8, 32).cuda(), torch.zeros(8, dtype=torch.int64).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            mix(three_augment(images), labels, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
