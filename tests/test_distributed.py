"""Several processes train like one: same weights, each test image once, all stop together, and none hangs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, as_flags, complaint, make_imagenet, weights

import train
from lab import distributed, files
from lab.data import CIFAR100, Bearing
from lab.files import read_json

IMAGENET = {"dataset": "imagenet", "data-dir": "in", "img-size": 16, "patch-size": 8, "workers": 1, "batch-size": 8}
FLAGS = as_flags(SMALL | IMAGENET | {"jitter": 0.5})
SCRIPT = """
import itertools, os, signal, sys, torch, train
import torch.nn.functional as F

def cross_entropy(*args, function=F.cross_entropy, calls=itertools.count(1)):
    if os.environ["RANK"] == "1" and next(calls) == 5 and "SIGNAL" in os.environ:
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    return function(*args)

F.cross_entropy = cross_entropy
torch.set_default_dtype(torch.float64)
sys.exit(train.main())
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Holds a run of one process: float64, 3 epochs of 3 steps, and 27 test images, odd for two processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("distributed"))
        make_imagenet("in", n=9)
        Path("script.py").write_text(SCRIPT, encoding="utf-8")
        torch.set_default_dtype(torch.float64)
        assert train.main([*FLAGS, "--out=whole"]) == 0
        yield
        torch.set_default_dtype(torch.float32)


def torchrun(*flags, **env):
    """Start two processes of train.py. Rank 1 gets SIGNAL in its fifth step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env
    return subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", env=env
    )


def assert_same_run(a, b):
    """Summed in another order, a gradient of norm 1 differs by 1e-16. Adam divides that by 1e-8 at least."""
    a, b = weights(a), weights(b)
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=9 * 2e-3 * 1e-8)  # in 9 steps at this rate
    assert [row | {"seconds": 0} for row in a["log"]] == [row | {"seconds": 0} for row in b["log"]]


@pytest.fixture(scope="module")
def started():
    """Runs of two processes, all started at once, because starting takes most of their time."""
    if os.name == "nt":
        pytest.skip("Windows has no such signals")
    shutil.copytree("in", "odd")
    Path("odd/val/a/1.jpeg").write_bytes(b"no image")  # which only rank 1 reads
    return {
        "stopped": torchrun(*FLAGS, "--out=stopped", SIGNAL="SIGINT"),
        "killed": torchrun(*FLAGS, "--out=killed", "--epochs=1000", SIGNAL="SIGKILL"),
        "odd": torchrun(*FLAGS, "--out=odd-run", "--data-dir=odd"),
    }


@pytest.fixture(scope="module")
def stopped(started):
    """Two processes; Ctrl-C reaches one of them in its fifth step."""
    _, err = started["stopped"].communicate()
    (line,) = re.findall("^Stopped.*", err, re.MULTILINE)
    assert "after step 5. To continue: torchrun --nproc_per_node=2 " in line and line.endswith(" --resume")
    assert weights("stopped")["step"] == 5
    return "stopped"


def test_two_processes_stop_together_and_one_resumes_to_the_same_end(stopped):
    shutil.copytree(stopped, "one")
    assert train.main([*FLAGS, "--out=one", "--resume"]) == 0
    assert_same_run("whole", "one")


def test_two_processes_resume_to_the_same_end_in_micro_batches(stopped):
    shutil.copytree(stopped, "two")
    out, _ = torchrun(*FLAGS, "--out=two", "--resume", "--micro-batch=2").communicate()
    assert_same_run("whole", "two")
    assert read_json(Path("two/result.json"))["device"].startswith("2 x cpu")
    assert re.findall("^epoch +([0-9]+)", out, re.MULTILINE) == ["2", "3"]  # of one process
    assert out.count("test accuracy after 3 epochs") == 1


def test_an_unreadable_image_is_named_and_stops_all_processes(started):
    _, err = started["odd"].communicate()
    assert re.search("^error: cannot read odd/val/a/1.jpeg .*", err, re.MULTILINE), err
    assert not Path("odd-run/result.json").exists()


def test_a_killed_process_ends_the_other(started):
    _, err = started["killed"].communicate()
    assert "Signal 9 (SIGKILL)" in err


@pytest.mark.parametrize("size", [1, 4, 8])
def test_micro_batches_add_up_to_the_batch(size):
    assert train.main([*FLAGS, f"--out=micro{size}", f"--micro-batch={size}"]) == 0
    assert_same_run("whole", f"micro{size}")


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind, augment", [(Bearing, "none"), (CIFAR100, "mix")])
def test_processes_share_what_lies_on_the_device(kind, augment, world_size):
    images, labels = torch.randint(256, (30, 3, 32, 32), dtype=torch.uint8), torch.arange(30)

    def tensors(**shard):
        """Images and targets of a batch, and of the test set."""
        data = kind("data", batch_size=6, augment=augment, **shard)
        data.images = data.test_images = images  # not used by Bearing
        data.labels = data.test_labels = labels
        torch.manual_seed(0)
        return *data.train_batch(3), *map(torch.cat, zip(*data.test_batches(), strict=True))

    for rank in range(world_size):
        for own, all_ in zip(tensors(rank=rank, world_size=world_size), tensors(), strict=True):
            assert torch.equal(own, all_[rank::world_size])


def test_the_first_process_of_every_machine_downloads_behind_a_lock(monkeypatch, tmp_path):
    for module in distributed, files:
        monkeypatch.setattr(module, "RANK", 8)  # on the second machine of eight processes each
    monkeypatch.setattr(distributed, "barrier", lambda: order.append("wait"))
    order = []
    for local_rank in 0, 1:
        monkeypatch.setattr(distributed, "LOCAL_RANK", local_rank)
        with distributed.local_rank_0_first(), files.locked(tmp_path, wait=True):
            assert (tmp_path / ".lock").exists()
            order.append("download")
    assert order == ["download", "wait", "wait", "download"]


def test_more_processes_than_gpus_get_one_line(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 4)
    monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    line = complaint(capsys, train.main, *FLAGS, "--device=cuda", "--out=none")
    assert "4 processes need a GPU each, found 2: change --nproc_per_node" in line
