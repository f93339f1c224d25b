"""DeiT III's augmentation (Touvron et al. 2022) of a whole batch on its device, drawn separately for each image.

    images = three_augment(images)                      # (B, 3, S, S) uint8 -> float in [0, 1]
    images, targets = mix(images, labels, num_classes)  # Mixup or CutMix; soft targets (B, num_classes)

In this order: a random resized crop (bicubic), a flip, one of greyscale, solarize and Gaussian blur, then brightness,
contrast and saturation in random order. The distributions are torchvision's and the operations Pillow's, clipping
included, but without rounding to whole levels in between. (arXiv 2204.07118)

Resizing and blurring are linear and separable, so they are products with two matrices per image:

    out = Y in X^T      Y, X (S, S): row i holds the weights of the input's pixels in the output's pixel i

All draws come from torch's global generators: the device's, and for mix the CPU's. The host never waits for a GPU:
every image goes through every operation, and torch.where picks. Call it outside autocast.
"""

import math

import torch
import torch.nn.functional as F

GREY, SOLARIZE, BLUR = range(3)
BRIGHTNESS, CONTRAST, SATURATION = range(3)


def three_augment(images):
    """images (B, 3, S, S) uint8 -> (B, 3, S, S) float in [0, 1]."""
    start, size = draw_crops(len(images), images.shape[-1], images.device)
    return flip_and_color(crop(images / 255, start, size))


def flip_and_color(images, rank=0, world_size=1):
    """Everything after the crop: images (B, 3, S, S) float in [0, 1] -> the same shape, in [0, 1].

    If images are every world_size'th of a batch, starting at rank, the result is the same as in the whole batch.
    """
    B, random = len(images) * world_size, {"device": images.device}
    flips, kinds, sigma = torch.rand(B, **random) < 0.5, torch.randint(3, (B,), **random), torch.rand(B, **random)
    factors, order = torch.rand(B, 3, **random), torch.rand(B, 3, **random)
    flips, kinds, sigma, factors, order = (x[rank::world_size] for x in (flips, kinds, sigma, factors, order))
    images = one_of_three(mirror(images, flips), kinds, 0.1 + 1.9 * sigma)
    return jitter(images, 0.7 + 0.6 * factors, order.argsort(dim=1))


def draw_crops(B, S, device, tries=10):
    """-> start, size (2, B) in whole pixels, vertical and horizontal: area 0.08 to 1, width / height 3/4 to 4/3.

    As torchvision's RandomResizedCrop: the first of ten tries that fits in the image, or the whole image if none does.
    """
    area = S**2 * (0.08 + 0.92 * torch.rand(tries, B, device=device))
    ratio = (math.log(4 / 3) * (2 * torch.rand(tries, B, device=device) - 1)).exp()
    size = torch.stack([area / ratio, area * ratio]).sqrt().round()
    size = F.pad(size, (0, 0, 0, 1), value=S)  # (2, tries + 1, B): the last one always fits
    first = (size.amax(dim=0) <= S).int().argmax(dim=0)
    size = size.gather(1, first.expand(2, 1, B)).squeeze(1)
    return (torch.rand(2, B, device=device) * (S - size + 1)).floor(), size


def crop(images, start, size):
    """images (B, 3, S, S): the crop given by start, size (2, B), resized to S x S."""
    rows, columns = resize_matrices(start, size, images.shape[-1])
    return transform(rows, images, columns)


def mirror(images, where):
    """images (B, 3, S, S), flipped horizontally where (B,) is true."""
    return torch.where(where.view(-1, 1, 1, 1), images.flip(3), images)


def resize_matrices(start, size, S):
    """start, size (...) -> (..., S, S): pixels start to start + size resized to S by cubic convolution (a = -1/2).

    Each output pixel is a weighted sum of the four input pixels around it that are in the crop; weights sum to 1.
    """
    start, size = start[..., None, None], size[..., None, None]
    centre = start + size * (torch.arange(S, device=start.device)[:, None] + 0.5) / S  # of each output pixel
    tap = (centre - 0.5).floor() + torch.arange(-1, 3, device=start.device)  # (..., S, 4)
    t = (tap + 0.5 - centre).abs()
    weight = (1 - t) * torch.where(t < 1, 1 + t - 1.5 * t**2, (2 - t) ** 2 / 2)
    weight = torch.where((tap >= start) & (tap < start + size), weight, 0.0)  # so the clamped taps below add nothing
    weight = weight / weight.sum(dim=-1, keepdim=True)
    return weight.new_zeros(*tap.shape[:-1], S).scatter_add_(-1, tap.clamp(0, S - 1).long(), weight)


def transform(rows, images, columns):
    """Y image X^T of each image (B, 3, S, S), Y and X (B, S, S), clipped after each axis as in Pillow."""
    images = torch.einsum("bcyx,bkx->bcyk", images, columns).clamp_(0, 1)
    return torch.einsum("biy,bcyk->bcik", rows, images).contiguous().clamp_(0, 1)


def one_of_three(images, choice, sigma):
    """images (B, 3, S, S): by choice (B,) greyscale, solarized, or blurred by sigma (B,) pixels."""
    choice = choice.view(-1, 1, 1, 1)
    solarized = torch.minimum(images, 1 - images)
    other = torch.where(choice == SOLARIZE, solarized, blur(images, sigma))
    return torch.where(choice == GREY, grey(images), other)


def grey(images):
    """(B, 3, S, S) -> (B, 1, S, S): luma as in ITU-R BT.601 and Pillow's mode L."""
    r, g, b = images.split(1, dim=1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def blur(images, sigma):
    """Gaussian blur of images (B, 3, S, S) by sigma (B,) pixels, up to 2.4: as in Pillow, three box blurs in a row.

    A box has a third of the variance: pixels up to `whole` away have weight 1, the next ones `part` (Gwosdek et al.
    2011). Border pixels are repeated outwards.
    """
    S = images.shape[-1]
    variance = sigma[:, None] ** 2 / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (variance - whole * (whole + 1) / 3) / (2 * ((whole + 1) ** 2 - variance))
    offset = torch.arange(-2, 3, device=images.device)
    box = (whole + part + 1 - offset.abs()).clamp(0, 1)  # (B, 5)
    box = box / box.sum(dim=1, keepdim=True)
    source = (torch.arange(S, device=images.device) + offset[:, None]).clamp(0, S - 1)  # (5, S)
    matrix = (box @ F.one_hot(source, S).flatten(1).to(box.dtype)).view(-1, S, S)
    matrix = matrix @ matrix @ matrix
    return transform(matrix, images, matrix)


def jitter(images, factors, order):
    """Blend images (B, 3, S, S) with black, their mean grey and their greyscale, as in Pillow's ImageEnhance.

    factors (B, 3) are for brightness, contrast and saturation, 1 for no change; order (B, 3) is their order.
    """
    for kind, factor in zip(order.T, factors.gather(1, order).T, strict=True):
        kind, luma = kind.view(-1, 1, 1, 1), grey(images)
        other = torch.where(kind == CONTRAST, luma.mean(dim=(2, 3), keepdim=True), luma)
        other = torch.where(kind == BRIGHTNESS, 0.0, other)
        images = torch.lerp(other, images, factor.view(-1, 1, 1, 1)).clamp_(0, 1)
    return images


def mix(images, labels, num_classes):
    """images (B, 3, S, S), labels (B,) -> the batch mixed with itself in reverse order, targets (B, num_classes).

    Mixup (Zhang et al. 2018, alpha 0.8) or CutMix (Yun et al. 2019, alpha 1), drawn once for the whole batch.
    """
    if torch.rand(()).item() < 0.5:
        lam = draw_beta(0.8)
        images = torch.lerp(images.flip(0), images, lam)
    else:
        rows, columns = draw_box(images.shape[-1], draw_beta(1.0))
        images, lam = cutmix(images, rows, columns)
    targets = F.one_hot(labels, num_classes).float()
    return images, torch.lerp(targets.flip(0), targets, lam)


def noisy_positions(model, grid, jitter=0.0, shift=0.0):
    """Positions (T, 2) of grid x grid patches for a ViT, with noise. jitter, shift: standard deviations in patches.

    jitter moves each patch by itself, by up to half a patch, but no class token (Yu et al. 2025, section 3.4.2). shift
    moves all tokens together. Drawn once per step for the whole batch.
    """
    pos = model.positions(grid, grid)
    noise = (jitter * torch.randn_like(pos)).clamp(-0.5, 0.5)
    noise[: model.num_prefix_tokens] = 0
    return pos + model.spacing * (noise + shift * torch.randn_like(pos[0]))


def draw_beta(alpha):
    return torch.distributions.Beta(alpha, alpha).sample().item()


def draw_box(S, lam):
    """-> rows, columns (slices) of a box that covers 1 - lam of the image, clipped at its borders."""
    half = int(S * math.sqrt(1 - lam)) // 2
    return [slice(max(0, centre - half), min(S, centre + half)) for centre in torch.randint(S, (2,)).tolist()]


def cutmix(images, rows, columns):
    """-> images (B, 3, S, S) with their partners' pixels in the box, and the fraction that stays their own."""
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[:, :, rows, columns].flip(0)
    return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / images.shape[-1] ** 2
