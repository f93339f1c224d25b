"""The built-in task; CIFAR-100, from its download to its batches; and files that try to do harm."""

import hashlib
import io
import itertools
import math
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Call, cifar_split, pickled, posix
from PIL import Image

from lab import data
from lab.data import CIFAR100, Bearing, BearingCorner, batch_indices
from lab.errors import UserError

EPS = torch.finfo(torch.float32).eps
DATA, ARCHIVE = Path("new/data"), Path("cifar-100-python.tar.gz")


@pytest.fixture(autouse=True)
def website(tmp_path, monkeypatch):
    """data.py downloads from the empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "CIFAR100_URL", ARCHIVE.absolute().as_uri())


@pytest.fixture
def archive(monkeypatch):
    """archive(*more) -> the bytes of a small archive with the official layout, which data.py accepts."""

    def make(*more):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, n in ("train", 50), ("test", 20), *((name, 1) for name in more):
                raw = pickled(cifar_split(n, seed=n))
                info = tarfile.TarInfo(f"cifar-100-python/{name}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
        monkeypatch.setattr(data, "CIFAR100_SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())
        return buffer.getvalue()

    return make


@pytest.fixture
def cifar(archive):
    ARCHIVE.write_bytes(archive())
    return lambda **options: CIFAR100(DATA, **{"batch_size": 20} | options).load()


def test_cifar_is_downloaded_once_and_read_as_it_was_packed(cifar):
    cifar()
    ARCHIVE.unlink()
    task, test, train = cifar(), cifar_split(20, seed=20), cifar_split(50, seed=50)
    assert np.array_equal(task.test_images.flatten(1).numpy(), test[b"data"])
    assert task.test_labels.tolist() == test[b"fine_labels"]
    assert {i.numpy().tobytes() for i in task.images} == {i.tobytes() for i in train[b"data"]}
    assert sorted(os.listdir(DATA)) == [".lock", "cifar-100-python", "cifar-100-python.tar.gz"]


@pytest.mark.parametrize("damage", [None, lambda raw: raw[:-100], lambda raw: raw[:500] + b"!" + raw[501:]])
def test_a_failed_download_says_why_and_leaves_nothing(archive, damage):
    if damage:
        ARCHIVE.write_bytes(damage(archive()))
    why = "invalid hash" if damage else "urlopen error"
    with pytest.raises(UserError, match=f"^cannot download [^\n]*{why}[^\n]*: run again, or download [^\n]*$"):
        CIFAR100(DATA, batch_size=10).load()
    assert not DATA.exists() or os.listdir(DATA) == [".lock"]


def test_an_archive_that_is_there_is_read_or_if_corrupt_left_alone(archive):
    raw, path = archive(), DATA / ARCHIVE
    DATA.mkdir(parents=True)
    path.write_bytes(raw[:-1])
    with pytest.raises(UserError, match="delete it and run again"):
        CIFAR100(DATA, batch_size=10).load()
    assert path.read_bytes() == raw[:-1]
    path.write_bytes(raw)
    assert len(CIFAR100(DATA, batch_size=10).load().images) == 50


@posix
def test_two_runs_can_unpack_one_archive_at_once(archive):
    DATA.mkdir(parents=True)
    (DATA / ARCHIVE).write_bytes(archive())
    workers = [multiprocessing.get_context("fork").Process(target=CIFAR100(DATA, batch_size=10).load) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sorted(os.listdir(DATA)) == [".lock", "cifar-100-python", ARCHIVE.name]


def test_an_archive_cannot_write_outside_its_folder(archive):
    ARCHIVE.write_bytes(archive("../../../evil", "meta"))
    CIFAR100(DATA, batch_size=10).load()
    assert not list(Path().rglob("evil")) and sorted(os.listdir(DATA / "cifar-100-python")) == ["test", "train"]


@pytest.mark.parametrize(
    "hostile",
    [
        pickle.dumps(Call(os.mkdir, "harm"), protocol=2),
        pickle.dumps(Call(eval, "__import__('os').mkdir('harm')"), protocol=2),
        pickle.dumps({b"data": Call(os.mkdir, "harm")}, protocol=4),
        b"cos\nmkdir\n(S'harm'\ntR.",
        b"(S'harm'\nios\nmkdir\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        b"cnumpy\nfromfile\n.",
        b"cnumpy.core.multiarray\nfromfile\n.",
    ],
)
def test_a_pickle_that_would_run_code_is_refused(hostile):
    Path("train").write_bytes(hostile)
    with pytest.raises(UserError, match="it asks for"):
        data.read_cifar100(Path("train"))
    assert os.listdir() == ["train"]
    if b"mkdir" in hostile:
        pickle.loads(hostile)  # it would have
        assert Path("harm").is_dir()


SPLIT = cifar_split(5)
CORRUPT = {
    "missing": None,
    "empty": b"",
    "text": b"not a pickle",
    "truncated": pickled(SPLIT)[:-50],
    "a list": pickled([np.zeros(1)]),
    "no labels": pickled({b"data": SPLIT[b"data"]}),
    "too few labels": pickled(SPLIT | {b"fine_labels": [0] * 4}),
    "label 100": pickled(SPLIT | {b"fine_labels": [100] * 5}),
    "label 1.7": pickled(SPLIT | {b"fine_labels": [1.7] * 5}),
    "label '7'": pickled(SPLIT | {b"fine_labels": [b"7"] * 5}),
    "label True": pickled(SPLIT | {b"fine_labels": [True] * 5}),
    "labels an array": pickled(SPLIT | {b"fine_labels": np.zeros(5, np.int64)}),
    "addresses for numpy to read": pickled(SPLIT | {b"fine_labels": np.full(5, 7)}).replace(b"i8", b"O8"),
    "columns first": pickled(SPLIT | {b"data": np.asfortranarray(SPLIT[b"data"])}),
    "floats": pickled(SPLIT | {b"data": np.zeros((5, 3072), np.float32)}),
    "too few pixels": pickled(SPLIT | {b"data": np.zeros((5, 99), np.uint8)}),
}


@pytest.mark.parametrize("raw", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_file_is_an_error_of_one_line(raw):
    if raw is not None:
        Path("test").write_bytes(raw)
    with pytest.raises(UserError, match=r"^cannot read .*delete .* and run again[^\n]*$"):
        data.read_cifar100(Path("test"))


def seeded_batch(task, step):
    torch.manual_seed(0)
    return task.train_batch(step)


@pytest.mark.parametrize("n, batch_size", [(10, 4), (10, 10), (3, 8), (7, 1)])
def test_every_pass_sees_every_image_once_in_a_new_order(n, batch_size):
    steps = 6 * n // math.gcd(n, batch_size)
    stream, other = (np.concatenate([batch_indices(s, batch_size, n, seed) for s in range(steps)]) for seed in (0, 1))
    passes = stream[: len(stream) // n * n].reshape(-1, n)
    assert (np.sort(passes, axis=1) == np.arange(n)).all()
    assert len({tuple(p) for p in passes}) > 1 and not np.array_equal(stream, other)


@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_images_keep_their_labels_and_depend_on_seed_and_step(cifar, fraction):
    packed = cifar_split(50, seed=50)
    label = {i.tobytes(): n for i, n in zip(packed[b"data"], packed[b"fine_labels"], strict=True)}
    batches = []
    for seed, step in (1, 0), (1, 1), (2, 0), (1, 0):
        task = cifar(fraction=fraction, seed=seed)
        images, labels = task.train_batch(step)
        batches.append([i.numpy().tobytes() for i in (images * task.pixel_std + task.pixel_mean).round().byte()])
        assert [label[i] for i in batches[-1]] == labels.tolist()
    assert batches[0] == batches[3] and batches[0] != batches[1] and batches[0] != batches[2]


def test_a_fraction_is_the_same_for_every_seed_and_lies_within_a_larger_one(cifar):
    def images(**options):
        return {i.numpy().tobytes() for i in cifar(**options).images}

    assert len(images(fraction=0.2)) == 10 and len(images(fraction=1e-9)) == 1
    assert images(fraction=0.2) == images(fraction=0.2, seed=5)
    assert images(fraction=0.2) < images(fraction=0.6) < images()


def test_test_batches_are_normalised_by_mean_and_std(cifar):
    task = cifar()
    images, labels = zip(*task.test_batches(batch_size=12), strict=True)
    assert [len(part) for part in labels] == [12, 8]
    mean, std = torch.tensor([task.mean, task.std], dtype=torch.float64).view(2, 3, 1, 1)
    exact = (task.test_images.double() / 255 - mean) / std
    assert (torch.cat(images) - exact).abs().max() < 8 * EPS  # of numbers around 2


@pytest.mark.parametrize("augment", ["3", "mix"])
def test_augmented_images_keep_their_targets(cifar, augment):
    """Black stays black; grey gets up to 30 % darker or lighter, equally in an image and its partner."""
    task = cifar(augment=augment)
    task.images = torch.where(task.labels < 50, 0, 100).byte().view(-1, 1, 1, 1).repeat(1, 3, 32, 32)
    (images, targets), (again, _) = (seeded_batch(task, 0) for _ in range(2))
    assert images.shape == (20, 3, 32, 32) and images.dtype == torch.float32 and torch.equal(images, again)
    if augment == "3":
        targets = torch.nn.functional.one_hot(targets, 100)
    grey = targets[:, 50:].sum(dim=1)
    level = (images * task.pixel_std + task.pixel_mean).mean(dim=(1, 2, 3))
    pairs = (grey + grey.flip(0) - 1).abs() < 4 * EPS  # of a black image and a grey one
    whole = level + level.flip(0)
    assert (level / whole - grey)[
        pairs
    ].abs().max() < 64 * EPS * 255 / 70  # levels of up to 255, known to a few eps, over at least 70
    assert 69.9 < whole[pairs].min() < 85 < 115 < whole[pairs].max() < 130.1


@pytest.mark.parametrize("img_size", [24, 48])
def test_test_images_of_another_size_are_pillows_bicubic_ones(cifar, img_size):
    """Wherever nothing is clipped (Pillow clips after each axis); clipped values do not wrap around."""
    task = cifar()
    task.test_images = 64 + task.test_images // 2
    images, labels = task.test_set(img_size)
    assert torch.equal(labels, task.test_labels) and images.dtype == torch.uint8
    for ours, original in zip(images, task.test_images, strict=True):
        pillows = Image.fromarray(original.permute(1, 2, 0).numpy()).resize((img_size, img_size), Image.BICUBIC)
        assert (ours.permute(1, 2, 0).int() - torch.from_numpy(np.array(pillows)).int()).abs().max() <= 1
    task.test_images[..., :16], task.test_images[..., 16:] = 0, 255
    row = task.test_set(img_size)[0][0, 0, 0].int()  # bicubic overshoots at an edge
    assert (row.diff() >= 0).all() and row[0] == 0 and row[-1] == 255


def squares(image):
    """The centres (y, x) of the red and the blue square in an image (3, S, S) of bytes."""
    image = image.permute(1, 2, 0).numpy().astype(int)
    return [np.argwhere((image == colour).all(-1)).mean(0) for colour in ([255, 0, 0], [0, 0, 255])]


@pytest.mark.parametrize("img_size", [32, 48])
def test_bearing_is_labelled_by_the_direction_from_red_to_blue(img_size):
    images, labels = Bearing(batch_size=64).draw(500, "cpu", torch.Generator().manual_seed(1), img_size)
    assert images.shape == (500, 3, img_size, img_size)
    for image, label in zip(images, labels.tolist(), strict=True):
        (ry, rx), (by, bx) = squares(image)
        degrees = math.degrees(math.atan2(by - ry, bx - rx)) % 360
        assert abs((degrees - 45 * label + 180) % 360 - 180) < 22.5
    assert torch.bincount(labels, minlength=8).min() > 30


@pytest.mark.parametrize("region, start, stop", [("everywhere", 0, 8), ("upper left", 0, 4), ("lower right", 4, 8)])
def test_bearings_squares_fill_the_region_and_nothing_else(region, start, stop):
    corner = BearingCorner(batch_size=500)
    images, _ = corner.test_set(region=region)
    cells = {tuple(int(c) // 4 for c in square) for image in images for square in squares(image)}
    assert cells == set(itertools.product(range(start, stop), repeat=2))
    assert (region == "upper left") == torch.equal(images, corner.test_set()[0])


def test_bearings_test_set_is_fixed_and_its_training_images_are_new_each_time():
    a, b = Bearing(batch_size=64, seed=0), Bearing(batch_size=64, seed=1)
    assert torch.equal(a.test_set()[0], b.test_set()[0]) and len(a.test_set()[0]) == a.test_size
    assert not torch.equal(a.train_batch(0)[0], a.train_batch(0)[0])
    images, again = seeded_batch(a, 0)[0], seeded_batch(b, 7)[0]
    assert torch.equal(images, again) and images.shape == (64, 3, 32, 32)
    assert abs(images.mean()) < 0.1 and abs(images.std() - 1) < 0.1


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: Bearing(batch_size=64, fraction=0.5), "leave --fraction out"),
        (lambda: Bearing(batch_size=64, augment="3"), "leave --augment out"),
        (lambda: Bearing(batch_size=64, world_size=3), "change --batch-size"),
        (lambda: Bearing(batch_size=64).test_set(img_size=30), "cells of 4 pixels"),  # no whole cells
        (lambda: Bearing(batch_size=64).test_set(img_size=4), "cells of 4 pixels"),  # one cell for two squares
    ],
)
def test_bearing_refuses_what_it_cannot_do(make, why):
    with pytest.raises(UserError, match=why):
        make()
