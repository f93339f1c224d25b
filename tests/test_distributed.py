"""Several processes train like one: the same weights, every test image once, one stop for all, and no hanging."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import SMALL, TINY, as_flags, make_imagenet, weights

import common
import distributed
import train
from data import CIFAR100, Bearing

ROOT = Path(__file__).parents[1]
IMAGENET = {"dataset": "imagenet", "data-dir": "in", "img-size": 16, "patch-size": 8, "workers": 1, "batch-size": 8}
FLAGS = as_flags(SMALL | IMAGENET | {"jitter": 0.5})


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A working directory for all tests here. 24 training images are 3 steps an epoch; two cannot halve 21."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("distributed"))
    make_imagenet("in")
    for name in "abc":
        Path(f"in/val/{name}/7.jpeg").unlink()
    yield
    os.chdir(before)


def torchrun(script, *flags, at_step=None, on_rank_1="pass"):
    """Start two processes of train.py. on_rank_1 is run there before a step."""
    Path(script).write_text(
        "import os, signal, sys, train\n"
        "train_step = train.train_step\n"
        "def step(*args):\n"
        f"    if train.RANK == 1 and args[4]['step'] == {at_step}:\n"
        f"        {on_rank_1}\n"
        "    train_step(*args)\n"
        "train.train_step = step\n"
        "sys.exit(train.main())\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def end(process):
    """-> exit code, lines of output, of errors."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out.splitlines(), err.splitlines()


def assert_same_run(a, b):
    a, b = weights(a), weights(b)
    assert a["step"] == b["step"]
    for name, value in a["model"].items():
        torch.testing.assert_close(value, b["model"][name], rtol=0, atol=1e-5)
    assert len(a["log"]) == len(b["log"])
    for row_a, row_b in zip(a["log"], b["log"], strict=True):
        assert row_a["test_accuracy"] == row_b["test_accuracy"]
        assert row_a["train_loss"] == pytest.approx(row_b["train_loss"], abs=2e-4)
        assert row_a["train_accuracy"] == pytest.approx(row_b["train_accuracy"], abs=0.02)


@pytest.fixture(scope="module")
def whole():
    """What one process comes to, in 9 steps."""
    assert train.main([*FLAGS, "--out=whole"]) == 0
    return "whole"


@pytest.fixture(scope="module")
def started():
    """Runs of two processes, all at once, because most of what they take is to begin."""
    shutil.copytree("in", "broken")
    for path in Path("broken/train/a").glob("*"):
        path.write_bytes(b"no image")
    shutil.copytree("in/train/a", "broken/train/aa")  # so that some batches are whole
    shutil.copytree("in/val/a", "broken/val/aa")
    hit = "os.kill(os.getpid(), signal.{})".format
    return {
        "stopped": torchrun("stopped.py", *FLAGS, "--out=stopped", at_step=4, on_rank_1=hit("SIGINT")),
        "killed": torchrun("killed.py", *FLAGS, "--out=killed", "--epochs=1000", at_step=4, on_rank_1=hit("SIGKILL")),
        "damaged": torchrun("damaged.py", *FLAGS, "--out=damaged", "--data-dir=broken"),
    }


@pytest.fixture(scope="module")
def stopped(started):
    """What two processes come to until Ctrl-C reaches one of them in its 5th step."""
    code, _, err = end(started["stopped"])
    (line,) = (line for line in err if line.startswith("Stopped"))
    assert "after step 5. To go on: torchrun --nproc_per_node=2 " in line and line.endswith(" --resume")
    assert code != 0 and weights("stopped")["step"] == 5
    return "stopped"


def test_two_processes_stop_together_and_one_goes_on_to_the_same_end(whole, stopped):
    shutil.copytree(stopped, "one")
    assert train.main([*FLAGS, "--out=one", "--resume"]) == 0
    assert_same_run(whole, "one")
    one, both = (json.loads(Path(f"{out}/result.json").read_text())["device"] for out in ("whole", "one"))
    assert both.startswith("2 x cpu") and both.endswith(f", then {one}")


def test_two_processes_go_on_to_the_same_end_in_small_parts(whole, stopped):
    shutil.copytree(stopped, "two")
    code, out, err = end(torchrun("two.py", *FLAGS, "--out=two", "--resume", "--micro-batch=2"))
    assert code == 0, err
    assert_same_run(whole, "two")
    assert [line.split()[1] for line in out if line.startswith("epoch")] == ["2", "3"]  # of one process
    assert sum("test accuracy after 3 epochs" in line for line in out) == 1
    assert json.loads(Path("two/result.json").read_text())["device"].startswith("2 x cpu")


def test_a_damaged_image_on_one_process_stops_both_and_all_is_saved(started):
    code, _, err = end(started["damaged"])
    errors = [line for line in err if line.startswith("error: ")]
    assert 1 <= len(errors) <= 2 and all("cannot read broken/train/a/" in e and "--resume" in e for e in errors)
    assert code != 0 and Path("damaged/last.pt").exists() and not Path("damaged/result.json").exists()


def test_a_killed_process_ends_the_other(started):
    code, _, err = end(started["killed"])
    assert code != 0 and any("Signal 9 (SIGKILL)" in line for line in err)
    assert not any("by peer" in line for line in err)  # what the other one has to say of it is of no use
    assert not Path("killed/result.json").exists()


@pytest.mark.parametrize("size", [1, 4, 8])
def test_micro_batches_add_up_to_the_batch(whole, size):
    assert train.main([*FLAGS, f"--out=micro{size}", f"--micro-batch={size}"]) == 0
    assert_same_run(whole, f"micro{size}")


def test_a_micro_batch_must_divide_a_processs_share(capsys):
    assert train.main([*FLAGS, "--out=none", "--micro-batch=5"]) == 2
    assert capsys.readouterr().err == "error: --micro-batch must divide the 8 images of a process: try 4\n"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_what_lies_on_the_device(world_size, monkeypatch):
    monkeypatch.setattr(Bearing, "test_size", 20)
    noise = torch.randint(256, (30, 3, 32, 32), dtype=torch.uint8)

    def made(kind, augment, rank=0, world_size=1):
        """A batch's images and targets, and those of the test set."""
        data = kind("data", batch_size=6, augment=augment, rank=rank, world_size=world_size)
        if kind is CIFAR100:
            data.images = data.test_images = noise
            data.labels = data.test_labels = torch.arange(30)
        torch.manual_seed(0)
        batch = data.train_batch(3)
        return *batch, *(torch.cat(parts) for parts in zip(*data.test_batches(batch_size=4), strict=True))

    for which in (Bearing, "none"), (CIFAR100, "mix"):
        for rank in range(world_size):
            for own, all_ in zip(made(*which, rank, world_size), made(*which), strict=True):
                assert torch.equal(own, all_[rank::world_size])


def test_what_all_processes_have_met_is_told_by_the_first(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    assert common.failed("why") == 2 and not waits
    monkeypatch.setattr(distributed, "RANK", 1)
    assert common.failed("why") == 2 and len(waits) == 1
    assert capsys.readouterr().err == "error: why\n" * 2


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 4)
    monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes need as many GPUs, here are 2: change --nproc_per_node"):
        distributed.join("cuda")


def test_dropout_differs_from_process_to_process(monkeypatch):
    """Their shares of a batch are different images, which should not lose the same channels."""
    args = train.parse_args([*TINY, "--dropout=0.5", "--out=none"])
    model, data, optimizer, state = train.set_up(args)
    batch = next(train.train_batches(args, data, state))
    dropped = []
    model.pos_drop.register_forward_hook(lambda module, x, y: dropped.append(y == 0))
    for rank in 0, 0, 1:
        monkeypatch.setattr(train, "RANK", rank)
        train.train_step(args, model, batch, optimizer, state, 4)
        state["step"] = 0
    assert dropped[0].float().mean() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(dropped[0], dropped[1]) and not torch.equal(dropped[0], dropped[2])


def test_dropout_does_not_repeat_what_augmentation_drew(monkeypatch):
    args = train.parse_args([*TINY, "--out=none"])
    model, data, optimizer, state = train.set_up(args)
    batches, seeds = train.train_batches(args, data, state), []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for rank in 0, 1:
        monkeypatch.setattr(train, "RANK", rank)
        train.train_step(args, model, next(batches), optimizer, state, 4)
    assert len(seeds) == len(set(seeds)) == 4  # of two steps' batches, and of their dropout


def test_a_second_ctrl_c_does_not_wait(monkeypatch, capsys):
    train_step = train.train_step

    def twice(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        train_step(*args)

    monkeypatch.setattr(train, "train_step", twice)
    assert train.main([*FLAGS, "--out=twice"]) == 130
    assert "Stopped at once: what came after the last save is lost." in capsys.readouterr().err
    assert not Path("twice/last.pt").exists() and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_says_once_how_fast_it_is_and_when_it_will_end(monkeypatch, capsys):
    monkeypatch.setattr(train, "SPEED_SECONDS", 0)
    monkeypatch.setattr(train, "FIRST_STEPS", 2)
    assert train.main([*FLAGS, "--out=told"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if " to go, until " in line)
    rate, left = float(line.split()[0]), line.split()[3]
    assert rate > 0 and left.startswith("0:0")


def test_profile_tells_where_the_time_goes_and_writes_nothing(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path(whole).iterdir()}
    assert train.main([*FLAGS, f"--out={whole}", "--profile=3"]) == 0
    out = capsys.readouterr().out
    assert "images/s in 3 steps of 8" in out and "3 epochs of 24 images would take 0:00:0" in out
    parts = {line[2:26].strip(): float(line.split()[-3]) for line in out.splitlines() if line.endswith("%")}
    names = ["waiting for images", "transfer", "augmentation", "forward", "backward", "optimizer", "the rest"]
    assert list(parts) == [*names, "in all"] and all(parts[name] > 0 for name in ("forward", "backward"))
    assert sum(parts[name] for name in names) == pytest.approx(parts["in all"], abs=0.5)
    assert {path: path.stat().st_mtime_ns for path in Path(whole).iterdir()} == before
