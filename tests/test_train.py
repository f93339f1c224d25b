"""The training script: its files, its errors, and that a run can be stopped anywhere and go on to the very same end."""

import csv
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import Call, pickled, split

import common
import data
import evaluate
import stopwatch
import train
from common import reading
from data import Bearing
from distributed import Stop
from vit import ViT

ROOT = Path(__file__).parents[1]
SMALL = {"dataset": "bearing", "device": "cpu", "depth": 2, "heads": 2, "head-dim": 12, "batch-size": 16, "epochs": 3}


def as_flags(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


TINY = as_flags(SMALL)
DEIT = "--opt lamb --lr 4e-3 --warmup-epochs 5 --weight-decay 0.05 --depth 12 --heads 6 --layer-scale 1e-4 --pool cls"
SIMPLE = "--opt adamw --lr 2e-3 --warmup-epochs 1 --weight-decay 0.05 --depth 2 --heads 4 --layer-scale 0 --pool cls"
DROP = "--dropout %s --drop-path %s"


@pytest.fixture(autouse=True)
def tiny_bearing(monkeypatch, tmp_path, request):
    """Four steps an epoch, 50 test images, a working directory to write into, and no time lost with drawing."""
    if "curves" not in request.node.name:
        monkeypatch.setattr(train, "plot", lambda *_: None)
    monkeypatch.setattr(Bearing, "train_size", 64)
    monkeypatch.setattr(Bearing, "test_size", 50)
    monkeypatch.chdir(tmp_path)


def run(*flags):
    return train.main([*TINY, *map(str, flags)])


def weights(out):
    return torch.load(Path(out) / "last.pt", weights_only=True)


def interrupted(monkeypatch, step, *flags):
    """A run that Ctrl-C stops after so many steps."""
    train_step = train.train_step

    def interrupting(*args):
        if args[4]["step"] == step:
            signal.raise_signal(signal.SIGINT)
        train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupting)
        assert run(*flags) == 130


def assert_same_end(a, b):
    """Two run folders hold the same weights, optimizer state and log, bit for bit, but for the time it took."""
    a, b = weights(a), weights(b)
    assert a["step"] == b["step"]
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    for i, moments in a["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, b["optimizer"]["state"][i][name]), (i, name)
    for row_a, row_b in zip(a["log"], b["log"], strict=True):
        assert row_a | {"seconds": 0} == row_b | {"seconds": 0}


def test_a_run_writes_its_configuration_log_curves_checkpoint_and_result(capsys):
    assert run("--pe", "axial", "--seed", 3) == 0
    out = Path("runs/bearing-axial-s3")
    assert sorted(os.listdir(out)) == ["config.json", "curves.png", "last.pt", "log.csv", "result.json"]
    result, config = (json.loads((out / f"{name}.json").read_text()) for name in ("result", "config"))
    rows = list(csv.DictReader((out / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["test_accuracy"]) == result["test_accuracy"]
    assert result["parameters"] == sum(p.numel() for p in weights(out)["model"].values())
    assert result["images_per_second"] == pytest.approx(3 * 64 / result["train_seconds"], rel=0.2)
    assert {"pe": "axial", "dataset": "bearing", "seed": 3, "epochs": 3}.items() <= result.items()
    assert {"device", "torch", "commit", "command"} <= result.keys() and result["torch"] == torch.__version__
    saved = weights(out)
    assert not saved["totals"].any(), "they are of one epoch"
    assert {group["lr"] for group in saved["optimizer"]["param_groups"]} == {float(rows[-1]["lr"])}
    assert config["lr"] == 2e-3 and config["heads"] == 2
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "axial on bearing" in last_line and str(result["test_accuracy"]) in last_line


def test_the_seed_decides_everything():
    for out, seed in ("a", 0), ("b", 0), ("c", 1):
        run("--out", out, "--seed", seed)
    assert_same_end("a", "b")
    a, c = weights("a")["model"], weights("c")["model"]
    assert not torch.equal(a["head.weight"], c["head.weight"])


@pytest.mark.parametrize("where", ["forward", "optimizer", "evaluation"])
@pytest.mark.parametrize("step", [1, 8])
def test_ctrl_c_anywhere_saves_and_resumes_to_the_same_bits(where, step, monkeypatch, capsys):
    run("--out", "whole", "--pe", "spherical-learned")
    calls = 0

    def interrupting(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == (step if where != "evaluation" else 1 + step // 4):
                signal.raise_signal(signal.SIGINT)
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        if where == "forward":
            patch.setattr(Bearing, "train_batch", interrupting(Bearing.train_batch))
        elif where == "optimizer":  # the signal comes in the midst of the update: it must wait for its end
            patch.setattr(torch.optim.AdamW, "step", interrupting(torch.optim.AdamW.step))
        else:
            patch.setattr(Bearing, "test_batches", interrupting(Bearing.test_batches))
        assert run("--out", "cut", "--pe", "spherical-learned") == 130
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "To go on: python " in last_line and last_line.endswith("--resume")
    assert weights("cut")["step"] == {"forward": step - 1, "optimizer": step, "evaluation": 4 * (1 + step // 4)}[where]
    assert run("--out", "cut", "--pe", "spherical-learned", "--resume") == 0
    assert_same_end("whole", "cut")


@pytest.fixture
def cifar(monkeypatch):
    """A CIFAR-100 of noise, 50 images for training and 20 for the test, in data/."""
    Path("data/cifar-100-python").mkdir(parents=True)
    for name, n in ("train", 50), ("test", 20):
        Path(f"data/cifar-100-python/{name}").write_bytes(pickled(split(n)))
    monkeypatch.setattr(data.CIFAR100, "train_size", 64)


@pytest.mark.parametrize("opt", ["lamb", "adamw"])
def test_the_papers_recipe_stops_anywhere_and_goes_on_to_the_same_bits(opt, cifar, monkeypatch):
    flags = "--dataset", "cifar100", "--opt", opt, "--pe", "spherical-learned"
    assert run("--out", "whole", *flags) == 0
    config = json.loads(Path("whole/config.json").read_text())
    recipe = {"lr": {"lamb": 4e-3, "adamw": 1e-3}[opt], "warmup_epochs": 5, "weight_decay": 0.05, "augment": "mix"}
    assert (recipe | {"dropout": 0.1, "drop_path": 0.1, "layer_scale": 1e-4}).items() <= config.items()
    interrupted(monkeypatch, 5, "--out", "cut", *flags)
    assert run("--out", "cut", *flags, "--resume") == 0
    assert_same_end("whole", "cut")
    state = weights("whole")["optimizer"]["state"][0]
    assert state["step"] == 12 and state["exp_avg"].any()


def make_imagenet(root, n=8):
    """Three classes of noise in ImageNet's layout."""
    rng = np.random.default_rng(0)
    for part, name, i in itertools.product(("train", "val"), "abc", range(n)):
        path = Path(root, part, name, f"{i}.jpeg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize("workers", [0, 2])
def test_imagenet_trains_stops_resumes_and_is_evaluated(workers, monkeypatch, capsys):
    make_imagenet("in")
    flags = ["--dataset=imagenet", "--data-dir=in", "--img-size=32", "--patch-size=16", "--eval-size=48"]
    flags += [f"--workers={workers}", "--batch-size=6", "--limit-classes=2"]
    assert run("--out", "whole", *flags) == 0
    assert weights("whole")["step"] == 3 * (16 // 6)
    assert weights("whole")["model"]["head.weight"].shape == (2, 24)
    interrupted(monkeypatch, 3, "--out", "cut", *flags)
    assert run("--out", "cut", *flags, "--resume", "--workers=1") == 0
    assert_same_end("whole", "cut")
    assert evaluate.main(["whole", "--data-dir=in", "--device=cpu", "--sizes", "48"]) == 0
    found = json.loads(Path("whole/evaluation.json").read_text())
    assert found["size"]["48"] == json.loads(Path("whole/result.json").read_text())["test_accuracy"]


def test_an_image_that_is_none_stops_the_run_with_its_path_or_is_skipped(capsys):
    make_imagenet("in")
    Path("in/train/b/3.jpeg").write_bytes(b"no image")
    flags = ["--dataset=imagenet", "--data-dir=in", "--img-size=32", "--patch-size=16", "--workers=0"]
    line = bad(capsys, "--out=a", *flags)
    assert "in/train/b/3.jpeg" in line and "--skip-damaged" in line and "--resume" in line
    assert run("--out=a", *flags, "--skip-damaged", "--resume") == 0
    assert "1 damaged" in capsys.readouterr().out
    next(Path("in/val").glob("*/*")).write_bytes(b"no image")
    assert evaluate.main(["a", "--data-dir=in", "--shuffle"]) == 0, "it leaves out what the run did"
    capsys.readouterr()
    assert evaluate.main(["a", "--data-dir=elsewhere"]) == 2
    err = capsys.readouterr().err
    assert "elsewhere" in err and "damaged" not in err


def start(out, *flags):
    """The same tiny run, but of 300 epochs, in a process of its own and with a checkpoint after every step."""
    code = (
        "import sys, train, data\n"
        "data.Bearing.train_size, data.Bearing.test_size, train.CHECKPOINT_SECONDS = 64, 50, 0\n"
        "train.plot = lambda *_: None\n"
        "sys.exit(train.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *TINY, "--epochs=300", "--out", out, *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for_step(out, step, process):
    while not Path(out, "last.pt").exists() or weights(out)["step"] < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_kill_9_loses_no_more_than_the_work_since_the_checkpoint():
    process = start("run")
    wait_for_step("run", 6, process)
    process.kill()
    process.communicate()
    killed_at = weights("run")["step"]
    process = start("run", "--resume")
    wait_for_step("run", killed_at + 6, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "To go on" in err and "Traceback" not in err
    assert not list(Path("run").glob("*.tmp"))
    rows = weights("run")["log"]
    # What the same run comes to without a break, in this process
    whole = train.parse_args([*TINY, "--epochs=300", "--out=whole"])
    model, data, optimizer, state = train.set_up(whole)
    batches = train.train_batches(whole, data, state)
    while len(state["log"]) < len(rows):
        for _ in range(4):
            train.train_step(whole, model, next(batches), optimizer, state, 4)
        row = train.finish_epoch(whole, model, data, optimizer, state, Stop())
        assert row | {"seconds": 0} == rows[row["epoch"] - 1] | {"seconds": 0}
    assert 4 * len(rows) > killed_at


def test_resuming_a_finished_run_just_shows_its_result(capsys):
    run("--out", "a")
    first = capsys.readouterr().out.strip().splitlines()[-1]
    files = {path: path.read_bytes() for path in Path("a").glob("*.*")}
    assert run("--out", "a", "--resume", "--amp") == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == first
    assert {path: path.read_bytes() for path in Path("a").glob("*.*")} == files


def complaint(capsys, main, *flags):
    """The one line that a script's main ends with, given flags that cannot do."""
    capsys.readouterr()
    try:
        code = main([*map(str, flags)])
    except SystemExit as e:  # argparse's way
        code = e.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def bad(capsys, *flags):
    return complaint(capsys, train.main, *TINY, *flags)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--pe rope", ["none", "ape", "axial", "spherical-learned"]),
        ("--dataset mnist", ["cifar100", "bearing"]),
        ("--workers 2", ["--workers is for --dataset imagenet"]),
        ("--skip-damaged", ["--skip-damaged is for --dataset imagenet"]),
        ("--patch-size 5", ["multiple of patch_size = 5", "32"]),
        ("--dataset imagenet --eval-size 50", ["--eval-size must be a multiple of --patch-size 16, not 50"]),
        ("--head-dim 2 --pe spherical", ["head_dim must be at least 3"]),
        ("--epochs 0", ["--epochs", "an integer from 1 up, not 0"]),
        ("--epochs 1.5", ["--epochs", "an integer from 1 up"]),
        ("--lr 0", ["--lr", "a number above 0"]),
        ("--lr nan", ["--lr", "a number above 0, not nan"]),
        ("--weight-decay -1", ["from 0 up"]),
        ("--fraction 1.5", ["above 0 to 1"]),
        ("--fraction 0.5", ["leave --fraction out"]),
        ("--augment mix", ["leave --augment out"]),
        ("--augment cutout", ["none", "3", "mix"]),
        ("--opt sgd", ["lamb", "adamw"]),
        ("--dropout 1", ["--dropout", "from 0 up to 0.9"]),
        ("--block-size 8", ["--pe spherical has no blocks", "liere, comrope-ap or comrope-ld"]),
        ("--block-size 1", ["from 2 up"]),
        ("--block-size 13 --pe liere", ["from 2 to head_dim = 12"]),
        ("--jitter 1 --pe ape", ["--pe ape is told no positions"]),
        ("--seed -1", ["--seed", "from 0 up"]),
        ("--seed " + "9" * 400, ["--seed", "from 0 up"]),
        ("--resume", ["no runs/bearing-spherical-s0/last.pt", "leave --resume out"]),
        ("--epoch 3", ["--epoch"]),
        ("--device gpu", ["--device gpu cannot be used", "try --device cpu"]),
    ],
)
def test_bad_flags_get_one_line_and_write_nothing(flags, says, capsys):
    line = bad(capsys, *flags.split())
    assert all(s in line for s in says), line
    assert not os.listdir()


def test_cuda_where_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr(torch, "empty", Mock(side_effect=RuntimeError("no GPU")))
    assert "--device cuda cannot be used (no GPU): try --device cpu" in bad(capsys, "--device", "cuda")
    assert not os.listdir()


def test_no_network_and_bad_archives_are_told(capsys, monkeypatch):
    monkeypatch.setattr(data, "CIFAR100_URL", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    assert "cannot download" in bad(capsys, "--dataset", "cifar100")
    assert not os.listdir()
    Path("data").mkdir()
    Path("data/cifar-100-python.tar.gz").write_bytes(b"half")
    assert "damaged" in bad(capsys, "--dataset", "cifar100")
    assert os.listdir() == ["data"]


def test_a_pickle_that_would_run_code_is_told(capsys):
    Path("data/cifar-100-python").mkdir(parents=True)
    for name in "train", "test":
        Path(f"data/cifar-100-python/{name}").write_bytes(b"cos\nmkdir\n(S'harm'\ntR.")
    assert "it asks for os.mkdir" in bad(capsys, "--dataset", "cifar100")
    assert os.listdir() == ["data"]


def test_on_a_cpu_cifar100_says_first_how_long_it_will_take(capsys, monkeypatch):
    monkeypatch.setattr(data, "CIFAR100_URL", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    assert run("--dataset", "cifar100") == 2
    out = capsys.readouterr().out
    assert "On this CPU 3 epochs will take about" in out and "--dataset bearing" in out


@pytest.mark.parametrize("where", ["make_optimizer", "train_step"])
def test_a_full_gpu_is_told(where, capsys, monkeypatch):
    monkeypatch.setattr(train, where, Mock(side_effect=torch.OutOfMemoryError))
    assert "try --micro-batch" in bad(capsys, "--out", "a")


@pytest.mark.parametrize("lack", ["No working C++ compiler found in", "Failed to find C compiler. Please"])
def test_a_missing_compiler_is_told(lack, capsys, monkeypatch):
    monkeypatch.setattr(train, "train_step", Mock(side_effect=RuntimeError(f"InductorError: {lack} ...")))
    assert "--no-compile" in bad(capsys, "--out", "a")
    monkeypatch.setattr(train, "train_step", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train.main([*TINY, "--out", "b"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(capsys, monkeypatch):
    interrupted(monkeypatch, 5, "--out", "a")
    capsys.readouterr()
    before = Path("a/last.pt").read_bytes()

    @contextmanager
    def full(path):
        yield Path("/dev/full")

    monkeypatch.setattr(train, "replacing", full)
    line = bad(capsys, "--out", "a", "--resume")
    assert "No space left on device" in line and "--resume" in line
    assert Path("a/last.pt").read_bytes() == before


def test_an_out_that_cannot_be_written(capsys):
    Path("file").write_text("")
    assert "choose another folder with --out" in bad(capsys, "--out", "file/run")


def test_a_run_is_not_overwritten_nor_resumed_with_another_configuration(capsys):
    run("--out", "a")
    capsys.readouterr()
    before = Path("a/last.pt").read_bytes()
    assert "--resume" in bad(capsys, "--out", "a")
    line = bad(capsys, "--out", "a", "--resume", "--lr", "0.5", "--pe", "axial")
    assert "--lr was 0.002, is 0.5" in line and "--pe was spherical, is axial" in line
    assert Path("a/last.pt").read_bytes() == before


def test_a_damaged_or_hostile_checkpoint_is_told(capsys):
    run("--out", "a")
    capsys.readouterr()
    whole = Path("a/last.pt").read_bytes()
    other, harm = weights("a"), Call(os.mkdir, "harm")
    del other["optimizer"]
    for make in (
        lambda path: path.write_bytes(whole[:-1000]),
        lambda path: path.write_bytes(whole[: len(whole) // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(pickle.dumps(harm)),
        lambda path: torch.save({"config": harm}, path),
        lambda path: torch.save(other, path),
        lambda path: torch.save([1], path),
    ):
        make(Path("a/last.pt"))
        assert "damaged" in bad(capsys, "--out", "a", "--resume")
        assert not Path("harm").exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(what, capsys, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    cross_entropy, calls = torch.nn.functional.cross_entropy, []

    def bad_at_step_6(logits, labels):
        calls.append(1)
        loss = cross_entropy(logits, labels)
        if len(calls) == 6:
            loss = loss * torch.nan if what == "loss" else loss + (0 * logits.sum()).sqrt()
        return loss

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", bad_at_step_6)
    assert run("--out", "a") == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ") and "NaN or infinite" in err and "last.pt is the last good checkpoint" in err
    assert weights("a")["step"] == 5
    assert all(p.isfinite().all() for p in weights("a")["model"].values())
    assert not Path("a/result.json").exists()


def test_only_linear_maps_decay():
    args = train.parse_args([*TINY, "--pe", "spherical-learned", "--out", "a"])
    model, _, optimizer, _ = train.set_up(args)
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    blocks = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"blocks.{i}.{name}.weight" for i in range(2) for name in blocks}
    assert names == expected | {"patch_embed.proj.weight", "head.weight"}
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine():
    args = train.parse_args(["--epochs", "50", "--warmup-epochs", "5", "--lr", "1"])
    lr = [train.learning_rate(args, step, 10) for step in range(500)]
    assert lr[0] == pytest.approx(1 / 51) and lr[49] == pytest.approx(50 / 51) and lr[50] == 1
    assert lr[275] == pytest.approx(0.5) and 0 < lr[-1] < 1e-4
    assert lr[50:] == sorted(lr[50:], reverse=True)
    args.epochs = 10  # of which warm-up takes a fifth at most
    assert [train.learning_rate(args, step, 10) for step in (19, 20)] == [pytest.approx(20 / 21), 1]


def test_gradients_are_clipped(monkeypatch):
    args = train.parse_args([*TINY, "--out=a"])
    model, data, optimizer, state = train.set_up(args)
    cross_entropy, norms = torch.nn.functional.cross_entropy, []

    def step():
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())

    monkeypatch.setattr(optimizer, "step", step)
    for scale in 1e-3, 1e3:
        monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *x, scale=scale: scale * cross_entropy(*x))
        train.train_step(args, model, data.train_batch(0), optimizer, state, 4)
    small, large = norms
    assert 0 < small < 0.1 and large == pytest.approx(1, abs=1e-3)


def test_a_file_that_cannot_be_opened_is_not_called_damaged():
    with pytest.raises(ValueError, match="is damaged, or no checkpoint"), reading("last.pt", "train it again"):
        raise OSError(22, "Invalid argument")  # as torch.load does with some truncated files
    with pytest.raises(FileNotFoundError), reading("last.pt", "train it again"):
        Path("nowhere").read_bytes()


def test_a_resumed_run_names_all_that_it_was_made_with(monkeypatch):
    interrupted(monkeypatch, 5, "--out", "a")
    before, now = json.loads(Path("a/config.json").read_text()), {"device": "other", "torch": "9.9", "commit": "f00"}
    monkeypatch.setattr(train, "environment", lambda device: before | now)
    run("--out=a", "--resume")
    result = json.loads(Path("a/result.json").read_text())
    for what in now:
        assert result[what] == f"{before[what]}, then {now[what]}"


def test_what_was_found_of_older_weights_does_not_stay(monkeypatch):
    interrupted(monkeypatch, 5, "--out", "a")
    Path("a/evaluation.json").write_text("{}")
    run("--out=a", "--resume")
    assert not Path("a/evaluation.json").exists()


def test_a_run_that_is_made_anew_does_not_show_an_old_result(capsys):
    run("--out=a", "--epochs=1")
    old = json.loads(Path("a/result.json").read_text())
    Path("a/last.pt").unlink()
    run("--out=a", "--epochs=2")
    assert (old["epochs"], json.loads(Path("a/result.json").read_text())["epochs"]) == (1, 2)


@pytest.mark.parametrize("prefix", [0, 1])
def test_jitter_keeps_every_patch_within_itself_and_the_class_token_in_place(prefix):
    torch.manual_seed(0)
    model = train.ViT("axial", depth=1, pool="cls" if prefix else "mean")
    patch, pos = 2 * torch.pi / 7, model.positions(8, 8)
    moves = torch.stack([train.jittered(model, 0.2) - pos for _ in range(200)]) / patch
    assert not moves[:, :prefix].any()
    assert abs(moves[:, prefix:].std() - 0.2) < 0.01 and 0.4999 < moves.abs().max() < 0.5001
    far = (train.jittered(model, 1e6) - pos)[prefix:] / patch
    torch.testing.assert_close(far.abs(), torch.full_like(far, 0.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pe", ["axial", "mixed", "spherical", "liere", "comrope-ap", "comrope-ld"])
def test_every_encoding_trains_with_jitter_and_resumes(pe, monkeypatch):
    flags = ["--pe", pe, "--block-size", "4"] if "rope-" in pe else ["--pe", pe]
    assert run("--out", "plain", *flags) == 0
    flags += ["--jitter", "1"]
    assert run("--out", "whole", *flags) == 0
    interrupted(monkeypatch, 5, "--out", "cut", *flags)
    assert run("--out", "cut", *flags, "--resume") == 0
    assert_same_end("whole", "cut")
    assert not torch.equal(weights("whole")["model"]["head.weight"], weights("plain")["model"]["head.weight"])


def test_block_size_reaches_the_encoding():
    assert run("--pe", "liere", "--block-size", "5", "--epochs", "1") == 0
    shape = weights("runs/bearing-liere-s0")["model"]["blocks.0.attn.rope.generators"].shape
    assert shape == (2, 2, 2, 5, 5)


def test_bfloat16_autocast_trains_on_a_cpu_too(monkeypatch):
    dtypes, forward = set(), train.ViT.forward
    monkeypatch.setattr(train.ViT, "forward", lambda *args: [y := forward(*args), dtypes.add(y.dtype)][0])
    assert run("--amp", "--pe", "spherical-learned", "--epochs", "1", "--pool", "mean") == 0
    assert dtypes == {torch.bfloat16}
    assert weights("runs/bearing-spherical-learned-s0")["model"]["blocks.0.attn.rope.freqs"].dtype == torch.float32


def test_help_names_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    for flag in vars(train.parse_args([])):
        assert f"--{flag.replace('_', '-')} " in shown
    assert "cifar100 400, imagenet 200, bearing 10" in " ".join(shown.split())


def test_the_seed_decides_the_first_weights_and_the_order_of_the_images(cifar):
    def begin(seed):
        flags = "--dataset=cifar100", "--augment=none", f"--seed={seed}", f"--out={seed}"
        model, task, *_ = train.set_up(train.parse_args([*TINY, *flags]))
        return model.head.weight, task.train_batch(0)[1]

    assert not any(torch.equal(a, b) for a, b in zip(begin(0), begin(1), strict=True))


def test_the_result_is_the_last_epochs_at_eval_size(monkeypatch):
    make_imagenet("in")
    sizes, found = [], iter([30.0, 20.0, 10.0])
    monkeypatch.setattr(train, "accuracy", lambda m, b, amp: sizes.append({len(i[0, 0]) for i, _ in b}) or next(found))
    flags = "--dataset=imagenet --data-dir=in --img-size=32 --patch-size=16 --eval-size=48 --workers=0 --out=a"
    assert run(*flags.split()) == 0 and sizes == [{48}] * 3
    assert json.loads(Path("a/result.json").read_text())["test_accuracy"] == 10


def test_every_step_is_taken_at_its_own_learning_rate(monkeypatch):
    args = train.parse_args([*TINY, "--out=a"])
    model, task, optimizer, state = train.set_up(args)
    rates = []
    monkeypatch.setattr(optimizer, "step", lambda: rates.append([g["lr"] for g in optimizer.param_groups]))
    for step in range(3):
        train.train_step(args, model, task.train_batch(step), optimizer, state, 4)
    assert rates == [[train.learning_rate(args, step, 4)] * 2 for step in range(3)]


def test_rates_reach_the_model():
    flags = "--dropout=0.3", "--drop-path=0.2", "--layer-scale=0.5", "--out=a"
    model = train.set_up(train.parse_args([*TINY, *flags]))[0]
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    assert {block.drop_path.rate for block in model.blocks} == {0.2} and (model.blocks[0].ls1.gamma == 0.5).all()


def test_accuracy_is_of_the_whole_model_and_keeps_no_graph():
    model, seen = ViT("axial", depth=1, num_heads=2, head_dim=12, dropout=0.5).train(), []
    model.pos_drop.register_forward_hook(lambda m, x, y: seen.append((m.training, y.requires_grad)))
    common.accuracy(model, [(torch.zeros(2, 3, 32, 32), torch.zeros(2))], amp=False)
    assert seen == [(False, False)]


def test_uncommitted_changes_are_told(tmp_path, monkeypatch):
    file = tmp_path / "common.py"
    file.write_text("a")
    for words in "init -q", "add .", "-c user.name=a -c user.email=a commit -qm a":
        subprocess.run(["git", "-C", tmp_path, *words.split()], check=True)
    monkeypatch.setattr(common, "__file__", str(file))
    assert re.fullmatch("[0-9a-f]{40}", common.environment("cpu")["commit"])
    file.write_text("b")
    assert common.environment("cpu")["commit"].endswith("-dirty")


def test_blocks_of_one_name_add_up(monkeypatch):
    times = iter([0, 1, 5, 7])
    monkeypatch.setattr(stopwatch, "now", lambda: next(times))
    watch = stopwatch.Stopwatch()
    watch.start()
    for _ in range(2):
        with watch("a"):
            pass
    assert watch.seconds == {"a": 3}


@pytest.mark.parametrize(
    "dataset, recipe",
    [
        (
            "cifar100",
            f"{DEIT} --epochs 400 --batch-size 1024 --augment mix --patch-size 4 --head-dim 60 {DROP % (0.1, 0.1)}",
        ),
        ("imagenet", f"{DEIT} --epochs 200 --batch-size 512 --augment 3 --patch-size 16 --head-dim 64 {DROP % (0, 0)}"),
        (
            "bearing",
            f"{SIMPLE} --epochs 10 --batch-size 64 --augment none --patch-size 4 --head-dim 24 {DROP % (0, 0)}",
        ),
    ],
)
def test_a_recipe_is_what_it_was(dataset, recipe):
    """van de Geijn et al. 2025, tables 5 and 6; bearing's is what results/ were made with."""
    assert train.parse_args(["--dataset", dataset]) == train.parse_args(["--dataset", dataset, *recipe.split()])
