"""Which images a batch holds and which part of each, and how odd and corrupt files are handled."""

import io
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import struct
import unicodedata
import zlib
from collections import Counter
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from shutil import copytree, rmtree
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import posix
from PIL import Image, ImageOps

from lab import imagenet
from lab.augment import flip_and_color, mix
from lab.errors import UserError
from lab.imagenet import ImageNet, centre_crop, load, random_crop

EPS = torch.finfo(torch.float32).eps
AUGMENTED = 128 * EPS  # between computations of an image of 0 to 1: a few eps for each box blur, jitter and so on
FILES = [
    f"{part}/{name}/{part}-{name}-{k}{('.png', '.BMP', '.Png')[k % 3]}"
    for part, classes in {"train": {"cat": 7, "ant": 4, "bee": 5}, "val": {"cat": 4, "ant": 2, "bee": 1}}.items()
    for name, n in classes.items()
    for k in range(n)
]
LABELS = [("ant", "bee", "cat").index(Path(file).parent.name) for file in FILES]


@pytest.fixture(autouse=True)
def no_colors(monkeypatch):
    """Augmentation on the device has its own tests (test_augment.py); here it does nothing."""
    monkeypatch.setattr(imagenet, "flip_and_color", lambda images, *_: images)


@pytest.fixture
def root(tmp_path):
    """Noise, with a different red value in each image, from which numbers() recognises any part of it."""
    for i, file in enumerate(FILES):
        rgb = np.random.default_rng(i).integers(0, 256, (36, 48, 3), dtype=np.uint8)
        rgb[..., 0] = 8 * i
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgb).save(tmp_path / file)
    for folder in *tmp_path.glob("*"), *tmp_path.glob("*/*"):
        (folder / "notes.txt").write_text("no class and no image", encoding="utf-8")
        (folder / "._a.jpg").write_text("what a Mac leaves behind", encoding="utf-8")
    return tmp_path


def levels(images):
    """Normalised images (B, 3, S, S) -> 0 to 255."""
    mean, std = torch.tensor([ImageNet.mean, ImageNet.std]).view(2, 3, 1, 1)
    return 255 * (images * std + mean)


def numbers(images):
    """Which images of root they are, as indices into FILES."""
    return levels(images)[:, 0].mean(dim=(1, 2)).div(8).round().long().tolist()


def make(root, **options):
    return ImageNet(root, **{"batch_size": 6, "augment": "3", "img_size": 16, "workers": 0} | options)


def smooth(width, height):
    """An RGB image so smooth that JPEG and resizing lose nothing."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.BICUBIC)


def difference(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float))


def batches(data, steps):
    return [data.train_batch(step) for step in steps]


def same(a, b):
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("augment", ["none", "3"])
def test_every_epoch_sees_every_image_once_with_its_label_in_a_new_order(root, augment):
    data = make(root, augment=augment)
    assert (data.num_classes, data.img_size, data.train_size) == (3, 16, 16)
    images, labels = (torch.cat(parts) for parts in zip(*batches(data, range(8)), strict=True))  # three epochs
    assert images.shape == (48, 3, 16, 16) and images.dtype == torch.float32 and images.is_contiguous()
    assert labels.tolist() == [LABELS[i] for i in numbers(images)]
    epochs = np.array(numbers(images)).reshape(3, 16)
    assert (np.sort(epochs) == range(16)).all() and len(np.unique(epochs, axis=0)) == 3
    assert numbers(make(root, seed=1).train_batch(0)[0]) != numbers(images[:6])


def test_a_fraction_is_the_same_for_all_seeds_and_leaves_the_epoch_as_long(root):
    seen = []
    for seed in 0, 1:
        data = make(root, batch_size=4, fraction=0.5, seed=seed)
        assert data.train_size == 16
        seen.append(Counter(i for images, _ in batches(data, range(4)) for i in numbers(images)))
    assert seen[0] == seen[1] and len(seen[0]) == 8 and set(seen[0].values()) == {2}


def test_classes_can_be_limited_to_the_first(root):
    (root / "val" / "cat").rename(root / "val" / "dog")  # which does not concern the first two
    data = make(root, limit_classes=2)
    assert (data.num_classes, data.train_size) == (2, 9)
    assert {label for _, labels in batches(data, range(3)) for label in labels.tolist()} == {0, 1}
    assert sorted(label for _, labels in data.test_batches() for label in labels.tolist()) == [0, 0, 1]


@posix
def test_hidden_folders_and_what_is_no_file_are_left_out(root, capsys):
    expected = batches(make(root), [0])
    capsys.readouterr()
    for folder in ".ipynb_checkpoints", "ant/deeper.jpg", "ant/.hidden":
        (root / "train" / folder).mkdir()
    os.mkfifo(root / "train/ant/pipe.jpg")
    for circle in "train/circle", "val/bee/circle.jpg":
        (root / circle).symlink_to(circle)
    (root / "val/ant/b.tif").write_bytes(b"")
    data = make(root)
    assert same(batches(data, [0]), expected) and data.num_classes == 3
    assert capsys.readouterr().out.startswith("10 files and folders among the images are ignored: ")  # 6 are notes
    make(root, rank=1, world_size=2)
    assert not capsys.readouterr().out


def test_a_changed_folder_is_noticed(root):
    contents = make(root).fingerprint
    assert contents.startswith("16 + 7 images of 3 classes")
    (root / FILES[0]).rename(root / "train/ant/another.png")
    renamed = make(root).fingerprint
    (root / FILES[-2]).unlink()
    assert len({contents, renamed, make(root).fingerprint}) == 3


def test_what_workers_need_is_said_before_they_lack_it(root, monkeypatch):
    monkeypatch.setattr(imagenet.shutil, "disk_usage", lambda path: Mock(free=64 << 20))
    message = error(make(root, img_size=512, workers=2).train_batch, 0)
    assert "64 MB" in message and "need 318" in message and "--workers" in message and "--shm-size" in message
    batch, test = (2 * n * 3 * 16**2 for n in (6, 100))  # one worker, two batches each
    data, shared = make(root, workers=1), Mock(free=batch + test - 1)
    monkeypatch.setattr(imagenet.shutil, "disk_usage", lambda path: shared)
    error(data.train_batch, 0)
    shared.free += 1
    data.train_batch(0)
    shared.free -= batch  # what training leaves
    assert list(data.test_batches())


def test_shared_memory_that_fills_amid_a_run_is_an_error_of_one_line(root, monkeypatch):
    monkeypatch.setattr(imagenet, "get_worker_info", Mock(return_value="a worker"))
    monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=RuntimeError("No space left on device")))
    message = error(make(root).train_batch, 0)
    assert message.startswith("shared memory is full (No space left on device): use fewer --workers")


def test_too_many_open_files_is_an_error_of_one_line(root):
    worker = map(Mock(side_effect=RuntimeError("Too many open files. Communication with the workers ...")), [0])
    assert error(imagenet.next_batch, worker) == "too many open files: raise ulimit -n, or use fewer --workers"


@posix
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])  # the latter from its parent
def test_a_killed_worker_is_an_error_of_one_line(root, name):
    others, data = set(active_children()), make(root, workers=1)
    data.train_batch(0)
    (worker,) = set(active_children()) - others
    os.kill(worker.pid, signal.Signals[name])
    assert "try fewer --workers" in error(batches, data, range(1, 9))


def test_the_order_of_files_is_not_the_file_systems(root, monkeypatch):
    scandir, expected = os.scandir, batches(make(root), [0])
    for reverse in False, True:
        by_name = partial(sorted, key=lambda entry: entry.name, reverse=reverse)
        monkeypatch.setattr(os, "scandir", lambda path, by_name=by_name: by_name(scandir(path)))
        assert same(batches(make(root), [0]), expected)


def test_a_batch_is_the_same_whoever_reads_it_and_whenever(root):
    expected, data = make(root), make(root, workers=2)
    data.train, data.test = pickle.loads(pickle.dumps((data.train, data.test)))  # as a spawned process gets them
    first = batches(expected, range(4))
    steps = 0, 1, 2, 3, 2, 3, 1, 1, 3
    for some in expected, data:
        assert same(batches(some, steps), [first[step] for step in steps])
    assert same(data.test_batches(batch_size=3), expected.test_batches(batch_size=3))


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_workers_may_be_started_in_any_way(root, monkeypatch, method):
    expected = batches(make(root), range(2))
    monkeypatch.setattr(imagenet, "DataLoader", partial(imagenet.DataLoader, multiprocessing_context=method))
    assert same(batches(make(root, workers=1), range(2)), expected)


def test_workers_are_kept_from_step_to_step_and_end_with_the_data_set(root):
    others, data = set(active_children()), make(root, workers=2)
    data.train_batch(3)
    workers = set(active_children()) - others
    batches(data, range(4, 7))
    assert len(workers) == 2 and set(active_children()) - others == workers
    del data  # and no cycle keeps it for the garbage collector, whose workers are waited for, 5 s each
    assert set(active_children()) == others


def test_an_image_is_cropped_anew_in_each_place_step_and_seed(root):
    crops = [batches(make(root, batch_size=2, fraction=0.01, seed=seed), range(3)) for seed in (0, 1)]
    images = torch.cat([images for seed in crops for images, _ in seed])
    assert len(set(numbers(images))) == 1 and len(images.unique(dim=0)) == 12


def test_nothing_is_drawn_from_the_global_generators(root):
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), np.random.get_state()[2]

    before, data = states(), make(root)
    batches(data, [0, 1, 5])
    list(data.test_batches())
    assert states() == before


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
                assert (images - all_images[rank::world_size]).abs().max() < AUGMENTED / min(ImageNet.std)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_each_test_image_is_on_exactly_one_rank(root, world_size):
    seen = []
    for rank in range(world_size):
        for images, labels in make(root, rank=rank, world_size=world_size, batch_size=24).test_batches(batch_size=2):
            assert 1 <= len(labels) == len(images) <= 2
            seen += zip(numbers(images), labels.tolist(), strict=True)
    assert sorted(seen) == list(enumerate(LABELS))[16:]


@pytest.mark.parametrize("size", [(48, 48), (60, 48), (48, 72), (96, 48)])
@pytest.mark.parametrize("S", [14, 28, 42])
def test_the_test_transform_is_resize_and_centre_crop(tmp_path, size, S):
    """In sizes where it splits no pixel."""
    image = smooth(*size)
    image.save(tmp_path / "a.png")
    width, height = (side * round(S / 0.875) // 48 for side in size)
    left, top = (width - S) // 2, (height - S) // 2
    expected = image.resize((width, height), Image.BICUBIC).crop((left, top, left + S, top + S))
    assert difference(load(tmp_path / "a.png", S), expected).max() <= 1


def test_images_are_middles_in_the_size_asked_for_unless_augmented(root, monkeypatch):
    monkeypatch.setattr(imagenet, "flip_and_color", None)  # must not be called
    data = make(root, batch_size=16, augment="none")
    default, large = (torch.cat([x for x, _ in data.test_batches(2, img_size)]) for img_size in (None, 40))
    for S, images in (16, data.train_batch(0)[0]), (16, default), (40, large):
        for number, image in zip(numbers(images), levels(images), strict=True):
            assert difference(image.permute(1, 2, 0), load(root / FILES[number], S)).max() < 255 * 8 * EPS


@pytest.mark.parametrize(
    "suffix, S", [*(("jpg", S) for S in (10, 16, 47, 90, 180, 300)), ("png", 10), ("bmp", 10), ("webp", 10)]
)
def test_no_more_of_a_jpeg_is_decoded_than_needed_and_it_looks_the_same(tmp_path, monkeypatch, suffix, S):
    """Other formats can only be decoded at full size."""
    path, sizes, resize = tmp_path / f"a.{suffix}", [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *args: sizes.append(self.size) or resize(self, *args))
    for width, height in (500, 375), (333, 701):
        smooth(width, height).save(path, quality=95)
        whole = Image.open(path).convert("RGB")
        for seed in None, *range(4):
            crop = random_crop if seed is not None else centre_crop
            box = crop(width, height, S if seed is None else np.random.default_rng(seed))
            expected = whole.resize((S, S), Image.BICUBIC, box)
            image = load(path, S, seed if seed is None else np.random.default_rng(seed))
            side = min(box[2] - box[0], box[3] - box[1])
            reduced = next(r for r in (8, 4, 2, 1) if r == 1 or (side >= r * S and suffix == "jpg"))
            assert sizes[-1] == (math.ceil(width / reduced), math.ceil(height / reduced))
            assert difference(image, expected).mean() < 1 and difference(image, expected).max() < 12


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_images_are_upright(tmp_path, suffix, orientation):
    """Also for random crops, which are drawn before the image is rotated."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path, stored = tmp_path / f"a.{suffix}", tmp_path / f"stored.{suffix}"
    smooth(90, 60).save(path, exif=exif)
    smooth(90, 60).save(stored)
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    for S, limit in (50, 2), (24, 8), (12, 8):  # a JPEG at 1/1, 1/2 and 1/4, whose width is not a whole number then
        expected = upright.resize((S, S), Image.BICUBIC, centre_crop(*upright.size, S))
        assert difference(load(path, S), expected).max() <= limit
        crop = Image.fromarray(load(stored, S, np.random.default_rng(3)))
        crop.getexif()[0x0112] = orientation
        assert difference(load(path, S, np.random.default_rng(3)), ImageOps.exif_transpose(crop)).max() == 0


RED, GREEN, GREY, WHITE, BLACK = (200, 40, 30), (30, 150, 60), (90, 90, 90), (255, 255, 255), (0, 0, 0)


def halves(mode, left, right, size=(40, 30)):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def palette():
    image = halves("P", 1, 2)
    image.putpalette([*BLACK, *RED, *GREEN])
    return image


ODD = {  # an image, how it is saved, and the colours of its halves, as a person sees them
    "grey.jpg": (halves("L", 90, 0), {}, GREY, BLACK),
    "grey and alpha.png": (halves("LA", (90, 255), (0, 0)), {}, GREY, WHITE),
    "bits.png": (halves("1", 1, 0), {}, WHITE, BLACK),
    "16 bits.png": (halves("I;16", 90 * 257, 65535), {}, GREY, WHITE),
    "dark 16 bits.png": (halves("I;16", 300, 0), {}, (1, 1, 1), BLACK),
    "cmyk, inverted by Adobe, at 1-8.jpg": (halves("RGB", RED, GREEN, (400, 300)).convert("CMYK"), {}, RED, GREEN),
    "palette.png": (palette(), {}, RED, GREEN),
    "a transparent colour.png": (palette(), {"transparency": 2}, RED, WHITE),
    "a palette with alpha.png": (palette(), {"transparency": bytes([255, 255, 0])}, RED, WHITE),
    "rgb with a transparent colour.png": (halves("RGB", RED, GREEN), {"transparency": GREEN}, RED, WHITE),
    "grey with a transparent level.png": (halves("L", 90, 7), {"transparency": 7}, GREY, WHITE),
    "rgba.png": (halves("RGBA", (*RED, 255), (*GREEN, 0)), {}, RED, WHITE),
    "half.png": (halves("RGBA", (*RED, 255), (0, 0, 0, 128)), {}, RED, (127, 127, 127)),
    "rgba.webp": (halves("RGBA", (*RED, 255), (*GREEN, 0)), {"lossless": True}, RED, WHITE),
    "a JPEG called.png": (halves("RGB", RED, GREEN, (64, 48)), {"format": "JPEG"}, RED, GREEN),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_look_as_a_person_sees_them(tmp_path, name):
    image, options, left, right = ODD[name]
    image.save(tmp_path / name, **{"quality": 95} | options)
    shown = load(tmp_path / name, 24)
    assert shown.shape == (24, 24, 3) and shown.dtype == np.uint8
    assert difference(shown[:, :9], left).max() <= 3 and difference(shown[:, 15:], right).max() <= 3


@pytest.mark.parametrize("bits, channels, level", [(2, 1, 1), (4, 1, 5), (16, 1, 0x8010), (16, 3, 0x8010)])
def test_a_pngs_transparent_level_is_white_at_every_depth(tmp_path, bits, channels, level):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = channels * 16 * f"{level:0{bits}b}" + channels * 16 * bits * "0"
    row = b"\0" + int(pixels, 2).to_bytes(len(pixels) // 8, "big")
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", 32, 32, bits, 2 * (channels == 3), 0, 0, 0),
        b"tRNS": channels * level.to_bytes(2, "big"),
        b"IDAT": zlib.compress(32 * row),
        b"IEND": b"",
    }
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(itertools.starmap(chunk, parts.items())))
    shown = load(tmp_path / "a.png", 16)
    assert (shown[:, :5] == 255).all() and not shown[:, -5:].any()


def encoded(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


JPEG, PNG, BMP, TIFF = (encoded(smooth(60, 40), kind) for kind in ("JPEG", "PNG", "BMP", "TIFF"))
CORRUPT = {
    "empty.jpg": b"",
    "text.jpg": b"<html>404</html>",
    "header.jpg": JPEG[:100],
    "truncated.jpg": JPEG[: len(JPEG) // 2],
    "truncated.png": PNG[: len(PNG) // 2],
    "altered.png": PNG[:60] + b"\0\0\0\0" + PNG[64:],
    "tiff.jpg": TIFF,
    "too large for memory.bmp": BMP[:18] + 2 * (20_000).to_bytes(4, "little") + BMP[26:],
}


def corrupt(root, part, name):
    """Put a bad file among the images of train or val."""
    path = root / part / "ant" / name
    path.write_bytes(CORRUPT[name])
    return path


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_broken_exif_data_leaves_the_picture_upright(tmp_path, suffix):
    whole, broken = tmp_path / f"whole{suffix}", tmp_path / f"broken{suffix}"
    smooth(40, 30).save(whole, lossless=True)
    smooth(40, 30).save(broken, lossless=True, exif=b"Exif\0\0no TIFF header")
    with pytest.raises(Exception), Image.open(broken) as image:  # noqa: B017
        image.load()
        image.getexif()
    assert difference(load(broken, 16), load(whole, 16)).max() == 0


def test_a_bmp_whose_alpha_is_0_everywhere_is_opaque(tmp_path):
    image = smooth(40, 30)
    image.save(tmp_path / "opaque.bmp")
    image.putalpha(0)
    image.save(tmp_path / "transparent.bmp")
    assert difference(load(tmp_path / "transparent.bmp", 16), load(tmp_path / "opaque.bmp", 16)).max() == 0


def error(function, *args):
    """The UserError's message. pytest.raises would keep the traceback alive, and with it the data set's workers."""
    try:
        function(*args)
    except UserError as e:
        assert "\n" not in str(e)
        return str(e)
    pytest.fail("no error")


@pytest.mark.parametrize("name", CORRUPT)
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_corrupt_image_is_an_error_with_its_path_and_a_way_out(root, part, name):
    path, data = corrupt(root, part, name), make(root, batch_size=17)
    message = error(data.train_batch, 0) if part == "train" else error(list, data.test_batches())
    assert message.startswith(f"cannot read {path}") and "--skip-corrupt" in message


def test_corrupt_images_are_replaced_in_training_and_left_out_of_the_test(root):
    for part, name in itertools.product(("train", "val"), CORRUPT):
        corrupt(root, part, name)
    options = {"batch_size": 40, "skip_corrupt": True}  # more than all files
    data = make(root, **options)
    first = batches(data, range(2))
    assert len(data.corrupt) == len(CORRUPT)  # files, however often they were met
    for images, labels in first:
        assert labels.tolist() == [LABELS[i] for i in numbers(images)]
        assert len(labels) == 40 and len(set(numbers(images))) == 16
    assert numbers(first[0][0]) != numbers(first[1][0])
    tested = [i for images, _ in data.test_batches(len(CORRUPT) + 1) for i in numbers(images)]  # both kinds in one
    assert sorted(tested) == list(range(16, 23)) and len(data.corrupt) == 2 * len(CORRUPT)
    assert same(batches(make(root, workers=2, **options), range(2)), first)
    for rank in 0, 1:
        own = batches(make(root, rank=rank, world_size=2, **options), range(2))
        assert same(own, [[part[rank::2] for part in batch] for batch in first])


@pytest.mark.parametrize("skip_corrupt", [False, True])
def test_a_file_that_the_system_cannot_read_is_not_called_corrupt(root, skip_corrupt):
    data = make(root, skip_corrupt=skip_corrupt)
    rmtree(root / "val/bee")
    message = error(list, data.test_batches())
    assert message == f"cannot read {root / FILES[-1]} (No such file or directory): fix that, then run again"


def test_a_lack_of_memory_is_not_called_corrupt(root, monkeypatch):
    monkeypatch.setattr(imagenet, "load", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        make(root, skip_corrupt=True).train_batch(0)


def test_one_good_image_is_enough_to_train_but_none_is_an_error_and_nothing_to_test(root):
    *bad, good = (root / file for file in FILES[:16])
    for path in *bad, *(root / file for file in FILES[16:]):
        path.write_bytes(b"")
    data, *others = (make(root, batch_size=16, skip_corrupt=True, workers=workers) for workers in (0, 0, 1))
    images, labels = data.train_batch(0)
    assert set(numbers(images)) == {15} and set(labels.tolist()) == {1} and len(data.corrupt) == 15
    assert list(data.test_batches(batch_size=3)) == [] and len(data.corrupt) == 22
    good.write_bytes(b"")
    for other in others:
        message = error(other.train_batch, 0)
        assert message.startswith(f"cannot read {root}") and message.endswith(f": check {root}/train")


@pytest.mark.parametrize("augment", ["3", "mix"])
def test_the_augmentation_is_that_of_the_other_data_sets(root, monkeypatch, augment):
    plain, labels = make(root).train_batch(0)
    monkeypatch.setattr(imagenet, "flip_and_color", flip_and_color)
    torch.manual_seed(0)
    images, targets = make(root, augment=augment).train_batch(0)
    torch.manual_seed(0)
    expected = flip_and_color(levels(plain) / 255)
    if augment == "mix":
        expected, labels = mix(expected, labels, 3)
    assert (levels(images) / 255 - expected).abs().max() < AUGMENTED and torch.equal(targets, labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same(root):
    data_sets = make(root), make(root, device="cuda", workers=1)
    cpu, gpu = ([*batches(data, range(3)), *data.test_batches()] for data in data_sets)
    for (expected, expected_labels), (images, labels) in zip(cpu, gpu, strict=True):
        assert images.is_cuda and labels.is_cuda and torch.equal(labels.cpu(), expected_labels)
        assert (images.cpu() - expected).abs().max() < 8 * EPS / min(ImageNet.std)


def test_images_in_the_wrong_place_are_an_error_that_says_where_they_belong(root):
    def found(change):
        copy = root.with_name("copy")
        copytree(root, copy)
        change(copy)
        message = error(lambda: make(copy)).replace(f"{copy}/", "")
        rmtree(copy)
        return message

    def down(folder):  # as in tiny-imagenet
        folder.rename(folder.with_name("x"))
        folder.mkdir()
        folder.with_name("x").rename(folder / "images")

    def flat(val):  # as in the official archive
        for path in val.glob("*/*"):
            path.rename(val / path.name)
        for name in "ant", "bee", "cat":
            (val / name).rmdir()

    def in_both_forms(copy):
        for part, form in ("train", "NFC"), ("val", "NFD"):
            (copy / part / "bee").rename(copy / part / unicodedata.normalize(form, "caf\u00e9"))

    same = "does not exist: train and val must have folders for the same classes, so add it or delete"
    message = found(lambda copy: down(copy / "train/bee"))
    assert message.startswith(
        "train/bee has no images: they must lie directly in train/<class>/, not in train/bee/images"
    )
    for change in down, flat:
        message = found(lambda copy, change=change: change(copy / "val"))
        assert message == "val/ant does not exist: images must lie directly in val/<class>/"
    for there, here in ("val", "train"), ("train", "val"):
        message = found(lambda copy, here=here: (copy / here / "@eaDir").mkdir())
        assert message == f"{there}/@eaDir {same} {here}/@eaDir"
    assert "does not exist: val has the same name in another Unicode form, so rename" in found(in_both_forms)


@pytest.mark.parametrize(
    "deleted, options, why",
    [
        ("train", {}, "ROOT/train does not exist: --data-dir must "),
        ("val", {}, "ROOT/val does not exist: --data-dir must "),
        ("train/*", {}, "ROOT/train has no classes: put "),
        ("val/bee", {}, "ROOT/val/bee does not exist: train and val must "),
        ("train/bee", {}, "ROOT/train/bee does not exist: train and val must "),
        ("val/bee", {"limit_classes": 2}, "ROOT/val/bee does not exist: train and val must "),
        ("train/bee/train-*", {}, "ROOT/train/bee has no images: add some that end in .jpeg, "),
        ("val/bee/val-*", {}, "ROOT/val/bee has no images: add some that end in .jpeg, "),
        ("nothing", {"limit_classes": 4}, "ROOT/train has 3 classes: --limit-classes must "),
        ("nothing", {"limit_classes": 0}, "ROOT/train has 3 classes: --limit-classes must "),
        ("nothing", {"world_size": 4}, "4 processes cannot share 6 images equally: change --batch-size"),
    ],
)
def test_wrong_folders_and_numbers_are_an_error_that_says_what_to_change(root, deleted, options, why):
    for path in root.glob(deleted):
        rmtree(path) if path.is_dir() else path.unlink()
    assert error(lambda: make(root, **options)).startswith(why.replace("ROOT", str(root)))
