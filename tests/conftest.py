"""Shared by the tests: encodings by name, tiny runs, small data sets, and one-line error messages."""

import os

# One thread a process: pytest -n auto has a process for each core, and small tensors keep no second thread busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import inspect
import io
import itertools
import pickle
import re
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train
from lab.data import Bearing
from vit import ENCODINGS, ViT

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals, links, locks or devices")

# The encodings: a new line in vit.py's table is tested like all others.

ROTARY = [pe for pe, make in ENCODINGS.items() if make is not None]


def promises_equivariance(pe):
    """Whether the docstring of an encoding's file says "equivariant" or "not equivariant"; None if it says neither."""
    text = inspect.getmodule(type(ENCODINGS[pe](64, 1))).__doc__ or ""
    return not re.search(r"\bnot\s+equivariant", text) if "equivariant" in text else None


EQUIVARIANT = [pe for pe in ROTARY if promises_equivariance(pe) is True]
NOT_EQUIVARIANT = [pe for pe in ROTARY if promises_equivariance(pe) is False]


@pytest.fixture
def default_dtype():
    """torch.set_default_dtype, for one test."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64(default_dtype):
    """Draws and computes everything in float64, with a fixed seed."""
    torch.manual_seed(0)
    default_dtype(torch.float64)


def scores(rope, q, k, pos):
    """The score of every query with every key: (B, H, T, T)."""
    q, k = rope(q, k, pos)
    return q @ k.mT


def small_vit(pe, **options):
    """Two layers of two heads, in evaluation mode. Attention in the first is far from uniform, so positions matter."""
    torch.manual_seed(0)
    vit = ViT(pe, **{"num_classes": 10, "depth": 2, "num_heads": 2, "head_dim": 24} | options).eval()
    torch.nn.init.normal_(vit.blocks[0].attn.qkv.weight)
    return vit


# Tiny runs of train.py

SMALL = {"dataset": "bearing", "device": "cpu", "depth": 2, "heads": 2, "head-dim": 12, "batch-size": 16, "epochs": 3}


def as_flags(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


TINY = as_flags(SMALL)


@pytest.fixture
def tiny_bearing(monkeypatch, tmp_path):
    """Four steps of 16 images per epoch, 50 test images, no pictures, and an empty working directory to write into."""
    monkeypatch.setattr("lab.pictures.plot_curves", lambda path, *_: path.write_bytes(b""))
    monkeypatch.setattr(Bearing, "train_size", 64)
    monkeypatch.setattr(Bearing, "test_size", 50)
    monkeypatch.chdir(tmp_path)


def weights(out):
    """The contents of last.pt in the run's folder."""
    return torch.load(Path(out) / "last.pt", weights_only=True)


def run(*flags):
    """A tiny run of train.py, in this process."""
    return train.main([*TINY, *flags])


def bad(capsys, *flags):
    return complaint(capsys, train.main, *TINY, *flags)


@contextmanager
def before(owner, name, act, call=None):
    """Call act(*arguments) before each call of owner.name, or before one of them."""
    function, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == call or call is None:
            act(*args)
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        yield


def ctrl_c(*_):
    signal.raise_signal(signal.SIGINT)


def interrupted(*flags, at=(F, "cross_entropy"), call=5):
    """A run that Ctrl-C stops in its fifth step, or before another function call."""
    with before(*at, ctrl_c, call):
        assert run(*flags) == 130


def assert_same(a, b, name=""):
    """Two checkpoints, or parts of them, are the same, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a.keys() - {"seconds", "workers"}:  # what may differ
            assert_same(a[key], b[key], f"{name} {key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{name} {i}")
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)
    else:
        assert a == b, name


def assert_resumes_to_the_same_end(*flags, stop=interrupted, then=()):
    """A resumed run ends as one that was never stopped, bit for bit, with the same files."""
    assert run("--out=whole", *flags) == 0
    stop("--out=cut", *flags)
    assert run("--out=cut", *flags, "--resume", *then) == 0
    assert_same(weights("whole"), weights("cut"))
    assert {*os.listdir("whole")} == {*os.listdir("cut")}


def complaint(capsys, main, *flags):
    """The one-line error, with exit code 2, that main gives for invalid flags."""
    capsys.readouterr()
    code = main([*map(str, flags)])
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err.replace(os.sep, "/")


# Small data sets in the official formats


def make_imagenet(root, n=8, classes="abc"):
    """Three classes of n noise images each, in ImageNet's layout."""
    rng = np.random.default_rng(0)
    for part, name, i in itertools.product(("train", "val"), classes, range(n)):
        path = Path(root, part, name, f"{i}.jpeg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)


class Python2Pickler(pickle._Pickler):
    """Pickles byte strings as Python 2 did."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_bytes(self, raw):
        self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)
        self.memoize(raw)

    dispatch[bytes] = save_bytes


def pickled(content):
    """Pickles as in CIFAR-100's official files: protocol 2, byte strings, numpy's old module name."""
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_split(n, seed=0):
    """The contents of CIFAR-100's train or test file, with n noise images."""
    random = np.random.default_rng(seed)
    return {
        b"data": random.integers(0, 256, (n, 3072), dtype=np.uint8),
        b"fine_labels": random.integers(0, 100, n).tolist(),
        b"coarse_labels": [0] * n,
        b"filenames": [b"a.png"] * n,
        b"batch_label": b"training batch 1 of 1",
    }


class Call:
    """Pickles to a function call: a file that would run code."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call
