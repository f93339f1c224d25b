"""What the scripts share: the table of data sets, command lines whose errors are one line, files, accuracy."""

import argparse
import csv
import json
import math
import platform
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from data import CIFAR100, Bearing, BearingCorner, replacing
from distributed import LOCAL_WORLD_SIZE, WORLD_SIZE, defer, total
from imagenet import ImageNet
from vit import ViT

DATASETS = {"cifar100": CIFAR100, "imagenet": ImageNet, "bearing": Bearing, "bearing-corner": BearingCorner}


class Parser(argparse.ArgumentParser):
    """Shows a script's docstring for --help, takes no abbreviations, and complains in one line."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message):  # without the usage in front
        sys.exit(failed(message))


def number(kind, least=None, most=math.inf):
    """A type for argparse: a finite int or float, above 0 or not below `least`, and not above `most`."""

    def parse(text):
        try:
            value = kind(text)
            good = math.isfinite(value) and (value > 0 if least is None else value >= least) and value <= most
        except (ValueError, OverflowError):  # the latter from an integer of hundreds of digits
            good = False
        if not good:
            limits = ("above 0" if least is None else f"from {least} up") + (f" to {most}" if most < math.inf else "")
            raise argparse.ArgumentTypeError(
                f"must be {'an integer' if kind is int else 'a number'} {limits}, not {text}"
            )
        return value

    return parse


def failed(why, code=2):
    defer()
    print(f"error: {why}", file=sys.stderr)
    return code


def add_device_flags(parser):
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda, cuda:1 ... (%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (if on CUDA)")


def usable_device(name):
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # which it is that is waited for, and that graphs are compiled for
        return device
    except (RuntimeError, AssertionError) as e:
        why = str(e).partition("\n")[0] or type(e).__name__
        raise ValueError(f"--device {name} cannot be used ({why}): try --device cpu") from e


def environment(device):
    """Where a run was made, and from what."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # no git, or not a checkout
    return {"device": device_name(device), "torch": str(torch.__version__), "commit": commit, "command": command()}


def device_name(device):
    name = f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    return name if WORLD_SIZE == 1 else f"{WORLD_SIZE} x {name}"


def command(resume=False):
    """What was typed, so that it can be typed again."""
    start = ["python"] if WORLD_SIZE == 1 else ["torchrun", f"--nproc_per_node={LOCAL_WORLD_SIZE}"]
    return shlex.join(start + sys.argv + ["--resume"] * (resume and "--resume" not in sys.argv))


def write_json(path, content):
    with replacing(path) as tmp:
        tmp.write_text(json.dumps(content, indent=2, default=str) + "\n")


def read_json(path):
    """What write_json wrote, a dict; {} if there is no such file."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path} is damaged ({e}): delete it, and have it made anew") from e


def write_csv(path, rows, columns):
    with replacing(path) as tmp, open(tmp, "w", newline="") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_run(folder, device="cpu"):
    """The folder of a run -> what its last.pt holds, and its model."""
    path = folder / "last.pt"
    if not path.exists():
        raise ValueError(f"there is no {path}: name folders that train.py has written")
    with reading(path, "train it again"):
        saved = torch.load(path, map_location=device, weights_only=True)
        model = ViT(**saved["vit"]).to(device)
        model.load_state_dict(saved["model"])
    return saved, model


@contextmanager
def reading(path, advice):
    """What fails in the block, fails because the checkpoint at `path` is damaged: a ValueError says so."""
    try:
        yield
    except Exception as e:  # a damaged file can fail in any way
        if isinstance(e, torch.OutOfMemoryError) or getattr(e, "filename", None):  # but these: it cannot be opened
            raise
        raise ValueError(f"{path} is damaged, or no checkpoint of train.py: {advice}") from e


def autocast(device, amp):
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=amp)


@torch.no_grad()
def accuracy(model, batches, amp, pos=lambda: None):
    """The share (%) of the batches' images that the model gets right, all processes' batches taken together.

    pos() gives each batch's positions (T, 2).
    """
    model.eval()
    count = torch.zeros(2, dtype=torch.int64, device=next(model.parameters()).device)  # hits, images
    for images, labels in batches:
        with autocast(images.device, amp):
            hits = (model(images, pos()).argmax(dim=1) == labels).sum()
        count += torch.stack([hits, torch.full_like(hits, len(labels))])
    hits, n = total(count).tolist()
    return 100 * hits / n if n else math.nan
