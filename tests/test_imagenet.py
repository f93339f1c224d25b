"""Which images a batch holds and which part of them, what becomes of odd and of damaged files, and what is told."""

import io
import math
import os
import pickle
import random
import weakref
from collections import Counter
from shutil import rmtree
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lab import imagenet
from lab.augment import flip_and_color
from lab.cli import UserError
from lab.data import batch_indices
from lab.imagenet import ImageNet, centre_crop, load, random_crop

TRAIN, VAL = {"cat": 7, "ant": 4, "bee": 5}, {"cat": 4, "ant": 2, "bee": 1}  # images of each class
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def no_colors(monkeypatch):
    """What is drawn on the device is augment.py's affair: here it leaves images as they are."""
    monkeypatch.setattr(imagenet, "flip_and_color", lambda images, *_: images)


@pytest.fixture
def root(tmp_path):
    """Noise; of a colour of its own for each image, which number() reads from whatever part of it."""
    i = 0
    for part, classes in ("train", TRAIN), ("val", VAL):
        for name, n in classes.items():
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for k in range(n):
                rgb = np.random.default_rng(i).integers(0, 256, (36, 48, 3), dtype=np.uint8)
                rgb[..., 0] = 8 * i
                suffix = (".png", ".BMP", ".Png")[k % 3]
                Image.fromarray(rgb).save(folder / f"{part}-{name}-{k}{suffix}")
                i += 1
            (folder / "notes.txt").write_text("no image")
            (folder / "._a.jpg").write_text("what a Mac leaves behind")
    return tmp_path


def number(images):
    """Which images of root they are, in the order in which root made them."""
    return denormalise(images)[:, 0].mean(dim=(1, 2)).div(8).round().long().tolist()


def denormalise(images):
    return 255 * (images * STD.view(3, 1, 1) + MEAN.view(3, 1, 1))


def make(root, **options):
    return ImageNet(root, **{"batch_size": 6, "img_size": 16, "workers": 0} | options)


def smooth(width, height, seed=0):
    """An RGB image with nothing in it that a JPEG, or a resize, has to leave out."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.BICUBIC)


def generator():
    return np.random.default_rng(3)


def difference(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float))


def batches(data, steps):
    return [data.train_batch(step) for step in steps]


def same(a, b):
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


# Which images, in what order, with which labels.


def test_an_epoch_sees_every_training_image_once_with_its_label(root):
    data = make(root, batch_size=4, augment="none")
    assert (data.num_classes, data.img_size, data.train_size) == (3, 16, 16)
    images, labels = (torch.cat(parts) for parts in zip(*batches(data, range(4)), strict=True))
    assert images.shape == (16, 3, 16, 16) and images.dtype == torch.float32 and images.is_contiguous()
    assert sorted(number(images)) == list(range(16))
    made = ["cat"] * 7 + ["ant"] * 4 + ["bee"] * 5
    assert labels.tolist() == [["ant", "bee", "cat"].index(made[i]) for i in number(images)]


def test_the_order_is_that_of_the_other_data_sets(root):
    data = make(root, augment="none")
    every = np.array(number(torch.cat([images for images, _ in batches(make(root, batch_size=16), [0])])))
    in_order = np.empty(16, dtype=int)
    in_order[batch_indices(0, 16, 16, 0)] = every
    for step in 0, 1, 2, 9:
        assert number(data.train_batch(step)[0]) == in_order[batch_indices(step, 6, 16, 0)].tolist()


def test_a_fraction_is_the_same_for_all_seeds_and_leaves_the_epoch_as_long(root):
    seen = []
    for seed in 0, 1:
        data = make(root, batch_size=4, fraction=0.5, seed=seed)
        assert data.train_size == 16
        seen.append(Counter(i for images, _ in batches(data, range(4)) for i in number(images)))
    assert seen[0] == seen[1] and len(seen[0]) == 8 and set(seen[0].values()) == {2}


def test_classes_can_be_limited_to_the_first(root):
    data = make(root, limit_classes=2)
    assert (data.num_classes, data.train_size) == (2, 9)
    assert {label for _, labels in batches(data, range(3)) for label in labels.tolist()} == {0, 1}
    assert sorted(label for _, labels in data.test_batches() for label in labels.tolist()) == [0, 0, 1]
    (root / "val" / "cat").rename(root / "val" / "dog")  # no concern of the first two
    make(root, limit_classes=2)


# Whoever reads it, and whenever, a sample is the same.


def test_workers_change_nothing(root):
    expected = batches(make(root), range(4))
    data = make(root, workers=2)
    assert same(batches(data, range(4)), expected)
    assert same(data.test_batches(batch_size=3), make(root).test_batches(batch_size=3))


def test_a_worker_can_be_a_process_that_shares_no_memory(root):
    """As workers are on a Mac, and on Linux from Python 3.14 on."""
    data = make(root)
    reader, job = pickle.loads(pickle.dumps((data.train, next(data.train_jobs(0)))))
    images, labels, damaged = reader[job]
    expected = data.train_batch(0)
    assert same([(data.normalise(torch.tensor(images).permute(0, 3, 1, 2)), torch.tensor(labels))], [expected])
    assert damaged == []


def test_a_step_is_the_same_wherever_one_starts(root):
    data = make(root)
    first = batches(data, range(4))
    assert same(batches(data, [2, 3]), first[2:]) and same(batches(data, [1, 1, 3]), [first[i] for i in (1, 1, 3)])
    assert not same(batches(make(root, seed=1), [0]), first[:1])


def test_workers_are_kept_from_step_to_step(root):
    data = make(root)
    data.train_batch(3)
    kept = data.batches
    batches(data, range(4, 7))
    assert data.batches is kept


def test_a_data_set_that_nobody_holds_is_freed(root):
    """And ends its workers, who would not hear of it from the garbage collector and be waited for, 5 s each."""
    data = make(root)
    data.train_batch(0)
    alive = weakref.ref(data)
    del data
    assert alive() is None


def test_an_image_is_cropped_anew_in_each_place_and_step(root):
    images = torch.cat([images for images, _ in batches(make(root, batch_size=2, fraction=0.01), range(3))])
    assert len(set(number(images))) == 1 and len(images.unique(dim=0)) == 6


def test_nothing_is_drawn_from_the_global_generators(root):
    data = make(root)
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    batches(data, [0, 1, 5])
    list(data.test_batches())
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(3) == expected[1]).all()


def test_ranks_share_each_batch_and_all_that_is_drawn_for_it(root, monkeypatch):
    monkeypatch.setattr(imagenet, "flip_and_color", flip_and_color)

    def seeded(**options):
        data = make(root, **options)
        return [[torch.manual_seed(step), *data.train_batch(step)][1:] for step in range(3)]

    whole = seeded()
    for world_size in 2, 3:
        for rank in range(world_size):
            own = seeded(rank=rank, world_size=world_size)
            for (images, labels), (all_images, all_labels) in zip(own, whole, strict=True):
                assert torch.equal(labels, all_labels[rank::world_size])
                torch.testing.assert_close(images, all_images[rank::world_size], rtol=0, atol=1e-4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_each_test_image_is_on_exactly_one_rank(root, world_size):
    seen = []
    for rank in range(world_size):
        for images, labels in make(root, rank=rank, world_size=world_size, batch_size=24).test_batches(batch_size=2):
            assert 1 <= len(labels) == len(images) <= 2
            seen += zip(number(images), labels.tolist(), strict=True)
    labels = [2] * 4 + [0] * 2 + [1]
    assert sorted(seen) == [(16 + k, labels[k]) for k in range(7)]


# Which part of an image.


def test_a_crop_shows_the_part_of_the_image_that_its_box_says(tmp_path):
    y, x = np.mgrid[:200, :250].astype(np.uint8)
    Image.fromarray(np.stack([x, y, 0 * x], axis=-1)).save(tmp_path / "a.png")
    middle = np.arange(16) + 0.5
    for seed in range(20):
        left, top, right, bottom = random_crop(250, 200, np.random.default_rng(seed))
        image = load(tmp_path / "a.png", 16, np.random.default_rng(seed)).astype(float)
        columns = left + (right - left) * middle / 16 - 0.5
        rows = top + (bottom - top) * middle / 16 - 0.5
        inner = slice(2, -2)  # where no border of the image is near
        assert difference(image[..., 0], columns)[:, inner].max() <= 1
        assert difference(image[..., 1], rows[:, None])[inner].max() <= 1


def torchvision_crop(width, height):
    """RandomResizedCrop as torchvision has it."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = random.randint(0, height - h), random.randint(0, width - w)
            return left, top, left + w, top + h
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * 4 / 3), height
    else:
        w, h = width, height
    top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


@pytest.mark.parametrize("size", [(500, 375), (300, 300), (40, 110), (9, 7), (1, 1)])
def test_crops_are_distributed_as_torchvision_distributes_them(size):
    """By the Kolmogorov-Smirnov test of two samples: each edge, the area, the ratio."""
    random.seed(0)
    n, draw = 2000, np.random.default_rng(0)
    samples = []
    for crops in [random_crop(*size, draw) for _ in range(n)], [torchvision_crop(*size) for _ in range(n)]:
        left, top, right, bottom = np.array(crops).T
        assert (left >= 0).all() and (top >= 0).all() and (right <= size[0]).all() and (bottom <= size[1]).all()
        w, h = right - left, bottom - top
        assert (w > 0).all() and (h > 0).all()
        samples.append([left, top, right, bottom, w * h, w / h])
    for a, b in zip(*samples, strict=True):
        values = np.union1d(a, b)
        cumulative = [np.searchsorted(np.sort(x), values, side="right") / n for x in (a, b)]
        assert np.abs(cumulative[0] - cumulative[1]).max() < 1.95 * math.sqrt(2 / n)  # fails once in a thousand, or not


@pytest.mark.parametrize(
    "size, box", [((1000, 30), (480, 0, 520, 30)), ((30, 1000), (0, 480, 30, 520)), ((400, 3), (198, 0, 202, 3))]
)
def test_where_no_try_fits_the_crop_is_the_middle(size, box):
    draw = np.random.default_rng(0)
    assert all(random_crop(*size, draw) == box for _ in range(50))


@pytest.mark.parametrize("size", [(48, 48), (60, 48), (48, 72), (96, 48)])
@pytest.mark.parametrize("S", [14, 28, 42])
def test_the_test_transform_is_resize_and_centre_crop(tmp_path, size, S):
    """Where no pixel is cut by it."""
    image = smooth(*size)
    image.save(tmp_path / "a.png")
    width, height = (side * round(S / 0.875) // 48 for side in size)
    left, top = (width - S) // 2, (height - S) // 2
    expected = image.resize((width, height), Image.BICUBIC).crop((left, top, left + S, top + S))
    assert difference(load(tmp_path / "a.png", S), expected).max() <= 1


def test_the_test_set_comes_in_the_size_asked_for(root):
    data = make(root)
    for size, expected in (None, 16), (16, 16), (40, 40):
        for images, _ in data.test_batches(batch_size=2, img_size=size):
            assert images.shape[1:] == (3, expected, expected)
            path = root / "val" / "bee" / "val-bee-0.png"
            if 22 in number(images):
                mine = denormalise(images)[number(images).index(22)].permute(1, 2, 0)
                assert difference(mine, load(path, expected)).max() < 1e-3


# JPEGs are decoded at a reduced size.


@pytest.fixture
def decoded(monkeypatch):
    """The sizes of the images that were resized from now on."""
    sizes, resize = [], Image.Image.resize

    def spy(self, *args):
        sizes.append(self.size)
        return resize(self, *args)

    monkeypatch.setattr(Image.Image, "resize", spy)
    return sizes


@pytest.mark.parametrize("size", [(500, 375), (333, 701)])
@pytest.mark.parametrize("S", [10, 16, 47, 90, 180, 300])
def test_no_more_of_a_jpeg_is_decoded_than_needed_and_it_looks_the_same(tmp_path, decoded, size, S):
    smooth(*size).save(tmp_path / "a.jpg", quality=95)
    whole = Image.open(tmp_path / "a.jpg").convert("RGB")
    for draw in None, *range(4):
        box = centre_crop(*size, S) if draw is None else random_crop(*size, np.random.default_rng(draw))
        expected = whole.resize((S, S), Image.BICUBIC, box)
        decoded.clear()
        image = load(tmp_path / "a.jpg", S, None if draw is None else np.random.default_rng(draw))
        (got,) = decoded
        reduced = round(size[0] / got[0])
        assert got == tuple(math.ceil(side / reduced) for side in size) and reduced in (1, 2, 4, 8)
        crop = min(box[2] - box[0], box[3] - box[1])
        assert reduced == 1 or crop / reduced >= S
        assert reduced == 8 or crop / (2 * reduced) < S
        assert difference(image, expected).mean() < 1 and difference(image, expected).max() < 12


def test_other_formats_are_decoded_whole(tmp_path, decoded):
    for suffix in "png", "bmp", "webp":
        smooth(300, 200).save(tmp_path / f"a.{suffix}")
        decoded.clear()
        load(tmp_path / f"a.{suffix}", 10)
        assert decoded == [(300, 200)]


# Odd files.


@pytest.mark.parametrize("orientation", range(0, 10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_images_are_upright(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, path, stored = smooth(90, 60), tmp_path / f"a.{suffix}", tmp_path / f"stored.{suffix}"
    image.save(path, exif=exif)
    image.save(stored)
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    for S, limit in (50, 2), (24, 8), (12, 8):  # a JPEG at 1/1, 1/2 and 1/4, whose width is not a whole number then
        expected = upright.resize((S, S), Image.BICUBIC, centre_crop(*upright.size, S))
        assert difference(load(path, S), expected).max() <= limit
        crop = Image.fromarray(load(stored, S, generator()))
        crop.getexif()[0x0112] = orientation
        assert difference(load(path, S, generator()), ImageOps.exif_transpose(crop)).max() == 0


RED, GREEN, GREY, WHITE, BLACK = (200, 40, 30), (30, 150, 60), (90, 90, 90), (255, 255, 255), (0, 0, 0)


def halves(mode, left, right, size=(40, 30)):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def palette():
    image = halves("P", 1, 2)
    image.putpalette([*BLACK, *RED, *GREEN])
    return image


def words(left, right):
    """16 bits a pixel."""
    return Image.fromarray(np.repeat(np.array([[left] * 20 + [right] * 20], dtype=np.uint16), 30, axis=0))


ODD = {
    "grey.jpg": (halves("L", 90, 0), {}, GREY, BLACK),
    "grey.png": (halves("L", 90, 0), {}, GREY, BLACK),
    "grey and alpha.png": (halves("LA", (90, 255), (0, 0)), {}, GREY, WHITE),
    "bits.png": (halves("1", 1, 0), {}, WHITE, BLACK),
    "16 bits.png": (words(90 * 257, 65535), {}, GREY, WHITE),
    "dark 16 bits.png": (words(300, 255), {}, (1, 1, 1), BLACK),
    "cmyk.jpg": (halves("RGB", RED, GREEN).convert("CMYK"), {"quality": 95}, RED, GREEN),
    "palette.png": (palette(), {}, RED, GREEN),
    "a transparent colour.png": (palette(), {"transparency": 2}, RED, WHITE),
    "a palette with alpha.png": (palette(), {"transparency": bytes([255, 255, 0])}, RED, WHITE),
    "rgb with a transparent colour.png": (halves("RGB", RED, GREEN), {"transparency": GREEN}, RED, WHITE),
    "grey with a transparent level.png": (halves("L", 90, 7), {"transparency": 7}, GREY, WHITE),
    "rgba.png": (halves("RGBA", (*RED, 255), (*GREEN, 0)), {}, RED, WHITE),
    "half.png": (halves("RGBA", (*RED, 255), (0, 0, 0, 128)), {}, RED, (127, 127, 127)),
    "rgba.webp": (halves("RGBA", (*RED, 255), (*GREEN, 0)), {"lossless": True}, RED, WHITE),
    "rgb.BMP": (halves("RGB", RED, GREEN), {}, RED, GREEN),
    "palette.bmp": (palette(), {}, RED, GREEN),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_look_as_a_person_sees_them(tmp_path, name):
    image, options, left, right = ODD[name]
    image.save(tmp_path / name, **options)
    shown = load(tmp_path / name, 24)
    assert shown.shape == (24, 24, 3) and shown.dtype == np.uint8
    assert difference(shown[:, :9], left).max() <= 3 and difference(shown[:, 15:], right).max() <= 3


def test_cmyk_jpegs_that_adobe_inverted(tmp_path):
    image = halves("RGB", RED, GREEN, (400, 300)).convert("CMYK")
    image.save(tmp_path / "a.jpg", quality=95)
    assert Image.open(tmp_path / "a.jpg").info["adobe_transform"] is not None  # and Pillow has inverted it
    shown = load(tmp_path / "a.jpg", 24)  # decoded at 1/8
    assert difference(shown[:, :9], RED).max() <= 3 and difference(shown[:, 15:], GREEN).max() <= 3


def test_a_jpeg_called_png_is_a_jpeg_and_a_tiff_is_not_read(tmp_path):
    smooth(30, 30).save(tmp_path / "a.png", "JPEG")
    assert difference(load(tmp_path / "a.png", 16), smooth(30, 30).resize((16, 16))).mean() < 30
    smooth(30, 30).save(tmp_path / "a.jpg", "TIFF")
    with pytest.raises(Image.UnidentifiedImageError):
        load(tmp_path / "a.jpg", 16)


# Damaged files.


def encoded(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


JPEG, PNG = encoded(smooth(60, 40), "JPEG"), encoded(smooth(60, 40), "PNG")
DAMAGED = {
    "empty.jpg": b"",
    "text.jpg": b"<html>404</html>",
    "header.jpg": JPEG[:100],
    "truncated.jpg": JPEG[: len(JPEG) // 2],
    "truncated.png": PNG[: len(PNG) // 2],
    "altered.png": PNG[:60] + b"\0\0\0\0" + PNG[64:],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_image_is_told_in_a_line(root, name):
    path = root / "train" / "ant" / name
    path.write_bytes(DAMAGED[name])
    told_of(path, make(root, batch_size=17))
    path.rename(root / "val" / "ant" / name)
    data = make(root)
    data.train_batch(0)
    with pytest.raises(UserError, match=f"val/ant/{name}.*--skip-damaged"):
        list(data.test_batches())


def error(data):
    with pytest.raises(UserError) as e:
        data.train_batch(0)
    data.batches = None  # else e's traceback keeps the workers, and left to the garbage collector they take 5 s each
    return str(e.value)


def told_of(path, data):
    message = error(data)
    assert str(path) in message and "--skip-damaged" in message and "\n" not in message and "Traceback" not in message


def test_workers_tell_it_just_as_well(root):
    path = root / "train" / "ant" / "text.jpg"
    path.write_bytes(DAMAGED["text.jpg"])
    told_of(path, make(root, batch_size=17, workers=2))


def test_what_would_fill_the_memory_is_told_like_a_damaged_image(root, monkeypatch):
    path = root / "train" / "ant" / "bomb.png"
    smooth(300, 200).save(path)
    make(root, batch_size=17).train_batch(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    told_of(path, make(root, batch_size=17))


def test_a_folder_with_an_images_name_and_a_file_that_vanished(root):
    path = root / "train" / "ant" / "a.jpg"
    path.mkdir()
    told_of(path, make(root, batch_size=17))
    path.rmdir()
    data = make(root, batch_size=16)
    path = next((root / "train" / "bee").glob("*.png"))
    path.unlink()
    told_of(path, data)


def test_skipping_replaces_them_in_training_and_leaves_them_out_of_the_test(root):
    good = batches(make(root, batch_size=16), [0])[0]
    for part in "train", "val":
        for name, content in DAMAGED.items():
            (root / part / "ant" / name).write_bytes(content)
    data = make(root, batch_size=22, skip_damaged=True)
    first = batches(data, range(3))
    assert len(data.damaged) == 6  # files, however often they were met
    label = dict(zip(number(good[0]), good[1].tolist(), strict=True))
    for images, labels in first:
        assert len(labels) == 22 and [label[i] for i in number(images)] == labels.tolist()
    assert Counter(number(first[0][0])).total() == 22 and len(set(number(first[0][0]))) == 16
    assert number(first[0][0]) != number(first[1][0])
    tested = [i for images, _ in data.test_batches(batch_size=3) for i in number(images)]
    assert sorted(tested) == list(range(16, 23)) and len(data.damaged) == 12
    assert same(batches(make(root, batch_size=22, skip_damaged=True, workers=2), range(3)), first)
    for rank in 0, 1:
        own = batches(make(root, batch_size=22, skip_damaged=True, rank=rank, world_size=2), range(3))
        assert same(own, [[part[rank::2] for part in batch] for batch in first])


def test_mostly_damaged_is_no_trouble_and_all_damaged_is_told(root):
    paths = sorted(path for path in (root / "train").glob("*/train-*"))
    for path in paths[:-1]:
        path.write_bytes(b"")
    data = make(root, batch_size=16, skip_damaged=True)
    images, labels = data.train_batch(0)
    assert set(number(images)) == {6} and set(labels.tolist()) == {2} and len(data.damaged) == 15
    paths[-1].write_bytes(b"")
    for workers in 0, 1:
        message = error(make(root, skip_damaged=True, workers=workers))
        assert message.startswith(f"cannot read {root}") and message.endswith(f" is {root}/train whole?")


def test_a_test_set_of_damaged_images_is_empty(root):
    for path in (root / "val").glob("*/val-*"):
        path.write_bytes(b"")
    data = make(root, skip_damaged=True)
    assert list(data.test_batches(batch_size=3)) == [] and len(data.damaged) == 7


# What happens on the device.


def test_the_augmentation_is_that_of_the_other_data_sets(root, monkeypatch):
    plain, _ = make(root).train_batch(0)
    monkeypatch.setattr(imagenet, "flip_and_color", flip_and_color)
    torch.manual_seed(0)
    images, labels = make(root).train_batch(0)
    torch.manual_seed(0)
    assert torch.allclose(denormalise(images), 255 * flip_and_color(denormalise(plain) / 255), atol=0.01)
    assert labels.shape == (6,) and labels.dtype == torch.int64


def test_without_augmentation_training_images_are_test_images(root, monkeypatch):
    monkeypatch.setattr(imagenet, "flip_and_color", None)
    images, _ = make(root, augment="none").train_batch(0)
    i = number(images).index(0)
    assert (
        difference(denormalise(images)[i].permute(1, 2, 0), load(root / "train/cat/train-cat-0.png", 16)).max() < 1e-3
    )


def test_mixing_makes_soft_targets(root):
    torch.manual_seed(0)
    images, targets = make(root, augment="mix").train_batch(0)
    plain, labels = make(root).train_batch(0)
    assert images.shape == plain.shape and not torch.equal(images, plain)
    assert targets.shape == (6, 3) and torch.allclose(targets.sum(dim=1), torch.ones(6))
    assert (targets[torch.arange(6), labels] > 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same(root):
    data = make(root, device="cuda", workers=1)
    for (images, labels), (expected, same_labels) in zip(
        [*batches(data, range(3)), *data.test_batches()],
        [*batches(make(root), range(3)), *make(root).test_batches()],
        strict=True,
    ):
        assert images.is_cuda and labels.is_cuda and torch.equal(labels.cpu(), same_labels)
        assert torch.allclose(images.cpu(), expected, atol=1e-5)


# What a user can mend is told in a line.


FAULTS = {
    "no root": (rmtree, {}, "ROOT/train is not there: --data-dir "),
    "no train": (lambda root: rmtree(root / "train"), {}, "ROOT/train is not there: --data-dir "),
    "no val": (lambda root: rmtree(root / "val"), {}, "ROOT/val is not there: --data-dir "),
    "no classes": (
        lambda root: [rmtree(path) for path in (root / "train").iterdir()],
        {},
        "ROOT/train has no classes: put ",
    ),
    "not in val": (lambda root: rmtree(root / "val/bee"), {}, "ROOT/val/bee is not there: train and val must "),
    "not in train": (lambda root: (root / "val/cow").mkdir(), {}, "ROOT/train/cow is not there: train and val must "),
    "not in val, limited": (
        lambda root: rmtree(root / "val/bee"),
        {"limit_classes": 2},
        "ROOT/val/bee is not there: train and val must ",
    ),
    "no images": (
        lambda root: [path.unlink() for path in (root / "train/bee").glob("train*")],
        {},
        "ROOT/train/bee has no images: give it some that end in .jpeg, ",
    ),
    "no test images": (
        lambda root: [path.unlink() for path in (root / "val/bee").glob("val*")],
        {},
        "ROOT/val/bee has no images: give it some that end in .jpeg, ",
    ),
    "too many classes": (lambda root: None, {"limit_classes": 4}, "ROOT/train has 3 classes: --limit-classes must "),
    "none of the classes": (lambda root: None, {"limit_classes": 0}, "ROOT/train has 3 classes: --limit-classes must "),
    "uneven ranks": (lambda root: None, {"world_size": 4}, "4 processes cannot share 6 images equally: change --batch"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_in_a_line(root, fault):
    spoil, options, message = FAULTS[fault]
    make(root)
    spoil(root)
    with pytest.raises(UserError) as e:
        make(root, **options)
    assert str(e.value).startswith(message.replace("ROOT", str(root))) and "\n" not in str(e.value)


def test_files_are_in_order_whatever_the_file_system_says(root, monkeypatch):
    listdir, found = os.listdir, []
    for order in 1, -1:
        monkeypatch.setattr(os, "listdir", lambda path, order=order: sorted(listdir(path))[::order])
        found.append(imagenet.find_images(root / "train", list(TRAIN))[0].tolist())
    assert found[0] == found[1]


def test_another_seed_crops_another_part(root):
    a, b = (next(make(root, seed=seed).train_jobs(0))[1] for seed in (0, 1))
    assert not set(a) & set(b)


def test_crops_reach_the_whole_image():
    draw = Mock(integers=lambda n: 0)
    for extreme, side in (max, 300), (min, 85):  # 85: the square root of 0.08, of 300
        draw.uniform = lambda low, high, extreme=extreme: (
            0 if low < 0 else extreme(low, high)
        )  # a square, if of a ratio
        assert random_crop(300, 300, draw) == (0, 0, side, side)
