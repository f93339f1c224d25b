"""ImageNet, or any images in folders like ImageNet's: read by worker processes, augmented on the device.

    root/train/<class>/<image>        root/val/<class>/<image>        .jpeg .jpg .png .bmp .webp

    data = ImageNet(root, batch_size=512, augment="mix", device="cuda", workers=8)
    images, targets = data.train_batch(step)        # as in data.py; fastest if steps are consecutive
    for images, labels in data.test_batches(): ...

Decoding JPEGs can take longer than training on them, so as little as possible is decoded. The crop is chosen first,
from the size in the header. A JPEG stores blocks of 8 x 8 frequencies: without the higher ones, it decodes to 1/2, 1/4
or 1/8 of its size, and faster. The smallest size that leaves the crop at least S pixels per side is decoded, then
cropped and resized in one step. uint8 batches go to the device, which flips, colours, mixes and normalises them.

Which crop of which image a sample is depends only on the seed, the step and its place in the batch: not on the number
of workers, nor on the number of processes (world_size) that share each batch.
"""

import itertools
import math
import os
import shutil
import signal
import unicodedata
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, get_worker_info

from lab.augment import flip_and_color, mix
from lab.data import Dataset, batch_indices
from lab.distributed import LOCAL_WORLD_SIZE
from lab.errors import UserError, first_line

SUFFIXES = ".jpeg", ".jpg", ".png", ".bmp", ".webp"
FORMATS = "JPEG", "PNG", "BMP", "WEBP"  # and no others, whatever the file name: for some, Pillow starts programs
IMAGENET_1K = "ImageNet-1k"  # what a published model was trained on: the 1000 classes of imagenet_classes.txt, in order
TRIES = 100  # after so many unreadable images in a row, something else is wrong
LESS_MEMORY = "use fewer --workers (or 0), a smaller --batch-size, or docker run --shm-size"
SCALES = {"L;2": 85, "L;4": 17, "I;16B": 1 / 256, "RGB;16B": 1 / 256}  # of a PNG's transparent level, to 8 bits
warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")  # odd EXIF data is read as far as possible
warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: they also wait for disks
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # large images; Pillow refuses huge ones


class ImageNet(Dataset):
    """fraction < 1 trains on a subset of the images, the same for every seed; limit_classes keeps the first by name.

    An unreadable image raises a UserError. With skip_corrupt it is instead replaced by another one in training and left
    out of the test; corrupt holds the paths of such files that this rank has met.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, root, *, img_size=224, workers=8, limit_classes=None, skip_corrupt=False, **options):
        super().__init__(root, **options)
        train, val = Path(root, "train"), Path(root, "val")
        classes = find_classes(train, val, limit_classes)
        (files, labels, left_out), (tests, test_labels, more) = (
            find_images(folder, classes) for folder in (train, val)
        )
        if self.rank == 0 and left_out + more:
            print(f"{left_out + more} files and folders among the images are ignored: not {', '.join(SUFFIXES)} files")
        part = np.random.default_rng(0).permutation(len(files))[: max(1, round(self.fraction * len(files)))]
        self.classes, self.num_classes, self.img_size, self.train_size = classes, len(classes), img_size, len(files)
        known = imagenet_classes()
        self.class_names = [known.get(name, name) for name in classes]
        names = zlib.crc32(b"/".join([*map(os.fsencode, classes), *files, *tests]))
        self.fingerprint = f"{len(files)} + {len(tests)} images of {len(classes)} classes (names: {names:08x})"
        self.train = Reader(train, files[part], labels[part], img_size, self.augment != "none", skip_corrupt)
        self.test = Reader(val, tests, test_labels, img_size, False, skip_corrupt)
        self.workers = workers
        self.batches, self.next_step, self.corrupt = None, None, set()

    def load(self):
        return self

    def train_batch(self, step):
        """-> images (B / world_size, 3, S, S), labels (B / world_size,) or soft targets (B / world_size, num_classes).

        Workers read ahead, so the next step's images are ready soon; asking for any other step restarts them.
        """
        if step != self.next_step:
            self.batches = self.results(self.train, self.train_jobs(step), self.rank_batch_size)
        images, targets = next(self.batches)
        self.next_step = step + 1
        if self.augment != "none":
            images = 255 * flip_and_color(images / 255, self.rank, self.world_size)
        if self.augment == "mix":  # partners are on the same rank
            images, targets = mix(images, targets, self.num_classes)
        return self.normalise(images), targets

    def test_batches(self, batch_size=100, img_size=None):
        """Yield this rank's shard of the test images, each once: a centre crop of 7/8 of the shorter side."""
        reader = replace(self.test, S=img_size or self.img_size)
        for images, labels in self.results(reader, self.test_jobs(batch_size), batch_size):
            if len(labels):  # else all of them were corrupt
                yield self.normalise(images), labels

    def train_jobs(self, start):
        """Endless jobs for Reader: this rank's shard of step start, start + 1 and so on."""
        B, n, seed = self.batch_size, len(self.train.files), self.seed
        places = range(self.rank, B, self.world_size)
        return (  # without a reference to self, so that deleting the data set ends its workers in an orderly way
            (batch_indices(step, B, n, seed)[places], [(seed, step, place) for place in places])
            for step in itertools.count(start)
        )

    def test_jobs(self, batch_size):
        i = np.arange(self.rank, len(self.test.files), self.world_size)
        for start in range(0, len(i), batch_size):
            part = i[start : start + batch_size]
            yield part, [None] * len(part)

    def results(self, reader, jobs, batch_size):
        """Yield images (B, 3, S, S) uint8 and labels (B,) of all jobs in order, on the device. Workers run the jobs."""
        images = batch_size + 100 * (reader is self.train)  # the test begins while training still reads ahead
        ahead = 2 * self.workers * LOCAL_WORLD_SIZE * images * 3 * reader.S**2  # bytes
        shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
        if ahead > shared:
            raise UserError(
                f"shared memory (/dev/shm) has {shared >> 20} MB, but {self.workers} workers that read ahead need "
                f"{ahead >> 20}: {LESS_MEMORY}"
            )
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=jobs,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",  # copies from there are asynchronous
            worker_init_fn=set_signals,
            generator=torch.Generator(),  # else it draws from the global one when it starts, and a resumed step differs
        )
        return received(loader, self.device, self.corrupt)  # without self, so that workers end with the data set


def received(loader, device, corrupt):
    """Yield images (B, 3, S, S) uint8 and labels (B,) on the device. Adds the paths of unreadable files to corrupt."""
    batches = iter(loader)
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler can raise anywhere, even during an update
    while (batch := next_batch(batches)) is not None:
        if isinstance(batch, str):
            raise UserError(batch)
        images, labels, unreadable = batch
        corrupt.update(unreadable)
        labels = torch.tensor(labels, dtype=torch.int64, pin_memory=device.type == "cuda")
        images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
        yield images.permute(0, 3, 1, 2).contiguous(), labels


def next_batch(batches):
    """The next batch from a worker, None at the end. Raises a UserError if the worker was killed."""
    try:
        return next(batches, None)
    except (RuntimeError, EOFError, OSError) as e:
        if "Too many open files" in str(e):
            raise UserError("too many open files: raise ulimit -n, or use fewer --workers") from e
        if isinstance(e, RuntimeError) and not str(e).startswith(("DataLoader worker", "Pin memory thread exited")):
            raise
        raise UserError(f"a worker died ({first_line(e)}): memory may be short, try fewer --workers") from e


def set_signals(worker):
    """Ctrl-C reaches all processes. The main one decides when to stop, and may need more images until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how the main process ends this one; not the main one's handler


def find_classes(train, val, limit):
    """-> the class names. A class's label is its index."""
    for folder in train, val:
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist: --data-dir must be a folder of train/<class>/ and val/<class>/")
    names, tested = ({entry.name for entry in listed(folder) if os.path.isdir(entry)} for folder in (train, val))
    classes = sorted(names)
    if not classes:
        raise UserError(f"{train} has no classes: put the images of each class into their own folder there")
    if limit is not None and not 1 <= limit <= len(classes):
        raise UserError(f"{train} has {len(classes)} classes: --limit-classes must be from 1 to that, not {limit}")
    wanted = set(classes[:limit])
    for name in sorted(wanted - tested) or sorted(tested - names if limit is None else []):
        (here, there), others = ((train, val), tested) if name in names else ((val, train), names)
        fix = f"train and val must have folders for the same classes, so add it or delete {here / name}"
        if not wanted & tested:
            fix = f"images must lie directly in {val}/<class>/"
        if unicodedata.normalize("NFC", name) in {unicodedata.normalize("NFC", other) for other in others}:
            fix = f"{there} has the same name in another Unicode form, so rename one of the two"
        raise UserError(f"{there / name} does not exist: {fix}")
    return classes[:limit]


def imagenet_classes():
    """{folder: name} of ImageNet-1k's classes, in the order of their labels."""
    lines = (Path(__file__).parent / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)


def listed(folder):
    """Entries of a folder that are not hidden: notebooks and Macs leave .ipynb_checkpoints and ._names behind."""
    return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]


def is_file(entry):
    return os.path.isfile(entry) if entry.is_symlink() else entry.is_file()  # a link may go in a circle


def find_images(folder, classes):
    """-> files "class/name" (N,) as bytes, labels (N,), and the number of other entries.

    Files are one array, because reference counting would make each worker copy every string of a list.
    """
    files, labels, left_out = [], [], 0
    for label, c in enumerate(classes):
        entries = listed(folder / c)
        names = sorted(e.name for e in entries if e.name.lower().endswith(SUFFIXES) and is_file(e))
        left_out += len(entries) - len(names)
        if not names:
            fix = f"add some that end in {', '.join(SUFFIXES)}"
            if deeper := [e.name for e in entries if os.path.isdir(e)]:
                fix = f"they must lie directly in {folder}/<class>/, not in {folder / c / deeper[0]}"
            raise UserError(f"{folder / c} has no images: {fix}; or delete it if it is no class")
        files += [os.fsencode(f"{c}/{name}") for name in names]
        labels += [label] * len(names)
    return np.array(files), np.array(labels), left_out


@dataclass
class Reader:
    """What a worker needs: image files, their labels and how to read them."""

    folder: Path
    files: np.ndarray
    labels: np.ndarray
    S: int
    augment: bool
    skip_corrupt: bool

    def __getitem__(self, job):
        """Indices (B,) and a seed for each (None in a test) -> (B, S, S, 3) uint8, labels [B], paths of corrupt files.

        Or an error message, a str: an error raised here would arrive with this process's traceback in it.
        """
        images, labels, corrupt = torch.empty((len(job[0]), self.S, self.S, 3), dtype=torch.uint8), [], []
        try:
            pixels = (images.share_memory_() if get_worker_info() else images).numpy()
        except RuntimeError as e:  # else torch would say so, send nothing, and let the main process wait
            return f"shared memory is full ({first_line(e)}): {LESS_MEMORY}"
        for i, seed in zip(*job, strict=True):
            random = seed and np.random.default_rng(seed)
            for _ in range(TRIES):
                path = self.folder / os.fsdecode(self.files[i])
                try:
                    pixels[len(labels)] = load(path, self.S, random if self.augment else None)
                    labels.append(int(self.labels[i]))
                    break
                except MemoryError:  # not the file's fault
                    raise
                except Exception as e:  # a corrupt file can fail in any way
                    if getattr(e, "errno", None):  # the system's fault, not the image's: Pillow's errors have none
                        return f"cannot read {path} ({e.strerror}): fix that, then run again"
                    if not self.skip_corrupt:
                        why = f"{type(e).__name__}: {e}"
                        return f"cannot read {path} ({why}): fix it, delete it, or use --skip-corrupt"
                corrupt.append(str(path))
                if random is None:
                    break
                i = random.integers(len(self.files))
            else:
                return f"cannot read {path}, nor the {TRIES - 1} images tried before it: check {self.folder}"
        return images[: len(labels)], labels, corrupt


def load(path, S, random=None):
    """A crop of an image, resized to (S, S, 3) uint8: drawn from random, or the centre crop if random is None.

    It is chosen in the image as stored and turned upright last: rows and columns have the same distribution.
    """
    with Image.open(path, formats=FORMATS) as image:
        box = random_crop(*image.size, random) if random else centre_crop(*image.size, S)
        reduced = max((r for r in (2, 4, 8) if r * S <= min(box[2] - box[0], box[3] - box[1])), default=1)
        if reduced > 1 and image.draft(None, (image.width // reduced, image.height // reduced)):  # true for a JPEG
            box = [x / reduced for x in box]
        part = opaque(image).resize((S, S), Image.BICUBIC, box).convert("RGB")
        part.info = {"exif": image.info.get("exif")}
    with suppress(Exception):  # corrupt EXIF data can fail in any way, even in an intact image
        part = ImageOps.exif_transpose(part)
    return np.asarray(part)


def random_crop(width, height, random):
    """-> left, top, right, bottom in whole pixels: area 0.08 to 1, width / height 3/4 to 4/3, log-uniform.

    As torchvision's RandomResizedCrop: the first of ten tries that fits in the image, or if none does, the largest
    centre crop with a ratio of 3/4 to 4/3.
    """
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(-1, 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_crop(width, height, S):
    """-> left, top, right, bottom: the centre S x S after the shorter side is resized to S / 0.875."""
    side = min(width, height) * S / round(S / 0.875)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def opaque(image):
    """An image of any mode -> RGB, or L, which resizes three times as fast. Transparency becomes white."""
    level, scale = image.info.get("transparency"), SCALES.get(image.tile[0][3] if image.tile else None)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "RGBA" and image.format == "BMP" and not image.getchannel("A").getbbox():
        image = image.convert("RGB")  # the fourth byte of such files is unused
    if scale and level is not None:
        image.info["transparency"] = (
            int(scale * level) if isinstance(level, int) else tuple(int(scale * x) for x in level)
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode in ("L", "RGB") else image.convert("RGB")
