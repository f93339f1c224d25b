"""Data sets held entirely on the device, where batches are made and augmented: no loader process is needed.

A data set is a class with the constants num_classes and img_size (pixels per side) and a method read(), and a line in
the table in datasets.py:

    class Digits(Dataset):
        num_classes, img_size = 10, 28

        def read(self):
            return (images, labels), (test_images, test_labels)

    data = Digits(root, batch_size=128, seed=0, fraction=1.0, augment="none", device="cpu").load()
    images, targets = data.train_batch(step)        # (B, 3, S, S) float, normalised and augmented; (B,) int64
    for images, labels in data.test_batches(): ...  # the test set once, not augmented
    for images, labels in data.test_batches(img_size=48): ...  # and at another size

Which images a training step sees depends only on the seed and the step. Augmentation draws from torch's global
generator: if it is seeded before each step, a run can stop and resume at any step with the same batches. augment is
"3" for DeiT III's random crop, flip, 3-Augment and jitter, or "mix" to add Mixup or CutMix, with soft targets
(B, num_classes). Each of world_size processes gets every world_size'th image of a batch and of the test set, starting
at its rank: its shard. For this, each makes the whole batch here.
"""

import hashlib
import math
import os
import pickle
import tarfile
import tempfile
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lab.augment import mix, three_augment
from lab.distributed import local_rank_0_first
from lab.errors import UserError, first_line
from lab.files import locked


class Dataset:
    """Images that fit into the device's memory. A subclass has num_classes, img_size and

        read() -> (images, labels), (test_images, test_labels): (N, 3, S, S) uint8 and (N,) int64, on the CPU

    fraction < 1 trains on a subset of the images, the same for every seed; an epoch then repeats them.
    """

    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # of the training images' channels
    class_names = None  # numbers
    corrupt = frozenset()  # files that could not be read
    fingerprint = ""  # of what was found in a folder: number of images and classes, and a checksum of their names

    def __init__(self, root, *, batch_size=1, seed=0, fraction=1.0, augment="none", device="cpu", rank=0, world_size=1):
        if batch_size % world_size:
            raise UserError(f"{world_size} processes cannot share {batch_size} images equally: change --batch-size")
        self.root, self.batch_size, self.seed, self.fraction = Path(root), batch_size, seed, fraction
        self.augment, self.device, self.rank, self.world_size = augment, torch.device(device), rank, world_size
        levels = torch.tensor([self.mean, self.std], device=device).view(2, 3, 1, 1) * 255
        self.pixel_mean, self.pixel_std = levels

    def load(self):
        """Read the data. Raises UserError."""
        (images, labels), (test_images, test_labels) = self.read()
        for x, y in (images, labels), (test_images, test_labels):
            if x.dtype != torch.uint8 or x.shape[:2] not in ((len(y), 1), (len(y), 3)):
                found = f"images {tuple(x.shape)} {str(x.dtype)[6:]} and {len(y)} labels"
                raise UserError(f"read() must return images (N, 3, S, S) uint8 and N labels, not {found}")
        least, most = torch.cat([labels, test_labels]).aminmax()
        if least < 0 or most >= self.num_classes:
            raise UserError(f"labels are {least} to {most}, but num_classes is {self.num_classes}")
        self.train_size = len(images)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        part = order[: max(1, round(self.fraction * len(images)))]
        self.images, self.labels = images[part].to(self.device), labels[part].to(self.device)
        self.test_images, self.test_labels = test_images.to(self.device), test_labels.to(self.device)
        return self

    @property
    def rank_batch_size(self):
        """Number of images per batch on this rank."""
        return self.batch_size // self.world_size

    def shard(self, *tensors):
        """This rank's part of tensors that hold a whole batch or the whole test set."""
        return tuple(x[self.rank :: self.world_size] for x in tensors)

    def normalise(self, images):
        return (images - self.pixel_mean) / self.pixel_std

    def train_batch(self, step):
        """This rank's images (B / world_size, 3, S, S) of a step, normalised, and their labels or soft targets."""
        i = torch.from_numpy(batch_indices(step, self.batch_size, len(self.images), self.seed))
        if self.images.is_cuda:  # copies from pinned memory are asynchronous
            i = i.pin_memory().to(self.device, non_blocking=True)
        images, targets = self.images[i], self.labels[i]
        if self.augment != "none":
            images = 255 * three_augment(images)
        if self.augment == "mix":
            images, targets = mix(images, targets, self.num_classes)
        images, targets = self.shard(images, targets)
        return self.normalise(images), targets

    def test_set(self, img_size=None):
        """Test images (N, 3, S, S) uint8, resized (bicubic) if another size is asked for; labels (N,)."""
        if img_size in (None, self.img_size):
            return self.test_images, self.test_labels
        resized = (
            F.interpolate(images.float(), size=(img_size, img_size), mode="bicubic", antialias=True)
            for images in self.test_images.split(500)
        )
        return torch.cat([images.round().clamp(0, 255).byte() for images in resized]), self.test_labels

    def test_batches(self, batch_size=500, **which):
        """Yield this rank's shard of test_set(**which) in batches."""
        images, labels = self.shard(*self.test_set(**which))
        for batch in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            yield self.normalise(batch[0]), batch[1]


def batch_indices(step, batch_size, n, seed):
    """Indices (batch_size,) of the step'th batch of an endless stream that reshuffles n images in each pass."""
    t = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.concatenate([shuffled(n, seed, k)[t[t // n == k] % n] for k in range(t[0] // n, t[-1] // n + 1)])


@lru_cache(maxsize=2)
def shuffled(n, seed, k):
    return np.random.default_rng((seed, k)).permutation(n)


# Where bearing's squares may be: first row, first column and side, in cells.
REGIONS = {
    "everywhere": (0, 0, 8),
    "upper left": (0, 0, 4),
    "upper right": (0, 4, 4),
    "lower left": (4, 0, 4),
    "lower right": (4, 4, 4),
}


class Bearing(Dataset):
    """The built-in task: noise with a red and a blue square; the class is the direction from red to blue in 8 sectors.

    It cannot be solved without positions, and relative positions are enough. Every training image is new; the test set
    is the same for every seed. Nothing is read or downloaded. Squares sit on a grid of cells.
    """

    num_classes, img_size, train_size, test_size = 8, 32, 3072, 2000
    mean, std = (0.5, 0.5, 0.5), (0.29, 0.29, 0.29)
    class_names = "right", "lower right", "down", "lower left", "left", "upper left", "up", "upper right"
    cell = 4  # its side in pixels
    region = "everywhere"  # where both squares are

    def __init__(self, root=".", **options):
        super().__init__(root, **options)
        if self.fraction != 1:
            raise UserError("bearing has no fixed training set to take a fraction of: leave --fraction out")
        if self.augment != "none":
            raise UserError("bearing needs no augmentation, and flips would make labels wrong: leave --augment out")

    def load(self):
        return self

    def train_batch(self, step):
        images, labels = self.shard(*self.draw(self.batch_size, self.device))
        return self.normalise(images), labels

    def test_set(self, img_size=None, region=None):
        """Test images (N, 3, S, S) uint8, with more or fewer cells if another size is asked for; labels (N,)."""
        images, labels = self.draw(self.test_size, "cpu", torch.Generator().manual_seed(0), img_size, region)
        return images.to(self.device), labels.to(self.device)

    def draw(self, n, device, generator=None, img_size=None, region=None):
        """n new images (n, 3, S, S) uint8 and labels (n,): sector k is centred on k * 45 degrees, y downwards.

        At other sizes than in training, the squares can be anywhere.
        """
        S = img_size or self.img_size
        grid = S // self.cell
        if S % self.cell or grid < 2:
            raise UserError(f"bearing is drawn in cells of {self.cell} pixels: use 2 or more per side, not {S} pixels")
        top, left, side = REGIONS[region or self.region] if self.img_size == S else (0, 0, grid)
        random = {"device": device, "generator": generator}
        images = torch.randint(256, (n, 3, S, S), dtype=torch.uint8, **random)
        red = torch.randint(side**2, (n,), **random)
        blue = (red + torch.randint(1, side**2, (n,), **random)) % side**2  # any cell but red's
        cells, i = images.view(n, 3, grid, self.cell, grid, self.cell), torch.arange(n, device=device)
        for square, channel in (red, 0), (blue, 2):
            row, column = top + square // side, left + square % side
            cells[i, :, row, :, column] = 0
            cells[i, channel, row, :, column] = 255
        dx, dy = blue % side - red % side, blue // side - red // side
        return images, torch.round(torch.atan2(dy, dx) / (math.pi / 4)).long() % 8


class BearingCorner(Bearing):
    """Bearing, trained only in the upper left quarter of the image: does it transfer to another place?"""

    region = "upper left"


class CIFAR100(Dataset):
    """CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test images of 100 classes, 32 x 32.

    Read from root/cifar-100-python, extracted from the official archive, which is downloaded if it is not in root.
    """

    num_classes, img_size = 100, 32
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    class_names = (Path(__file__).parent / "cifar100_classes.txt").read_text(encoding="utf-8").splitlines()

    def read(self):
        with local_rank_0_first():
            folder = cifar100_folder(self.root)
        return read_cifar100(folder / "train"), read_cifar100(folder / "test")


# The official files. The archive is trusted only if its SHA-256 is right, the pickles never are.

CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
CIFAR100_SHA256 = "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"


def cifar100_folder(root):
    """root/cifar-100-python, extracted from the archive in root, which is downloaded if missing."""
    folder, archive = root / "cifar-100-python", root / CIFAR100_URL.rpartition("/")[2]
    if folder.is_dir():
        return folder
    with locked(root, wait=True):
        if folder.is_dir():  # another run extracted it in the meantime
            return folder
        if not archive.exists():
            try:
                torch.hub.download_url_to_file(CIFAR100_URL, str(archive), CIFAR100_SHA256)
            except (OSError, RuntimeError, HTTPException) as e:  # RuntimeError: truncated or altered
                fix = f"run again, or download it by other means and put it at {archive}"
                raise UserError(f"cannot download {CIFAR100_URL} ({first_line(e)}): {fix}") from e
        elif hashlib.sha256(archive.read_bytes()).hexdigest() != CIFAR100_SHA256:
            raise UserError(
                f"{archive} is corrupt, or not the official archive: delete it and run again to download it"
            )
        with tempfile.TemporaryDirectory(dir=root) as tmp, tarfile.open(archive) as tar:
            made = Path(tmp) / folder.name
            made.mkdir()
            for name in "train", "test":  # and nothing else from the archive
                (made / name).write_bytes(tar.extractfile(f"{folder.name}/{name}").read())
            os.replace(made, folder)
    return folder


class CIFARUnpickler(pickle.Unpickler):
    """A pickle can run any function. This allows only the three that make CIFAR's arrays, and does not run them."""

    def find_class(self, module, name):
        if f"{module}.{name}" not in ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which image files do not need")
        return Unbuilt


class Unbuilt:
    """Stands in for the result of a call. An array's state is (version, shape, dtype, is_fortran, bytes)."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        self.state = state


def read_cifar100(path):
    """One of CIFAR-100's two pickles -> images (N, 3, 32, 32) uint8, fine labels (N,) int64."""
    try:
        with open(path, "rb") as f:
            content = CIFARUnpickler(f, encoding="bytes").load()
        labels, (_, shape, _, fortran, pixels) = content[b"fine_labels"], content[b"data"].state
        if shape != (len(labels), 3 * 32 * 32) or fortran or not all(type(x) is int and 0 <= x < 100 for x in labels):
            raise ValueError("there must be one label from 0 to 99 per image")
        images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)  # too long unless the numbers are bytes
        return images.view(len(labels), 3, 32, 32), torch.tensor(labels)
    except Exception as e:  # a corrupt pickle can fail in any way
        raise UserError(f"cannot read {path} ({e}): delete {path.parent} and run again to recreate it") from e
