"""train.py: its files, its errors, and runs that stop anywhere and resume to the same result, bit for bit."""

import csv
import itertools
import math
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    ROTARY,
    TINY,
    Call,
    assert_resumes_to_the_same_end,
    bad,
    before,
    cifar_split,
    complaint,
    ctrl_c,
    interrupted,
    make_imagenet,
    pickled,
    posix,
    run,
    weights,
)
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

import train
from lab import data, environment, evaluate
from lab.accuracy import accuracy
from lab.augment import noisy_positions
from lab.data import Bearing
from lab.errors import one_line_errors
from lab.files import read_json
from lab.imagenet import ImageNet
from lab.pictures import plot_curves
from lab.run import read_run
from vit import ENCODINGS, ViT

pytestmark = pytest.mark.usefixtures("tiny_bearing")
FOLDERS = ["--dataset=imagenet", "--data-dir=in", "--img-size=32", "--patch-size=16", "--batch-size=6", "--workers=0"]


without_mps = pytest.mark.skipif(torch.backends.mps.is_built(), reason="this torch has the mps backend")


@pytest.fixture
def cifar():
    """A CIFAR-100 of noise in data/: 64 training images and 20 test images."""
    Path("data/cifar-100-python").mkdir(parents=True)
    for name, n in ("train", 64), ("test", 20):
        Path("data/cifar-100-python", name).write_bytes(pickled(cifar_split(n)))
    return "--dataset=cifar100"


def test_a_run_writes_config_log_curves_checkpoint_and_result(capsys, monkeypatch):
    monkeypatch.setattr("lab.pictures.plot_curves", plot_curves)
    steps, out = [], Path("runs/bearing-axial-s9")  # of its epochs, the first is the best
    with before(F, "cross_entropy", lambda *args: steps.append(args)):
        assert run("--pe=axial", "--seed=9") == 0
    assert {path.name for path in out.iterdir()} == {"config.json", "curves.png", "last.pt", "log.csv", "result.json"}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    config, result = read_json(out / "config.json"), read_json(out / "result.json")
    assert {"lr": 2e-3, "heads": 2}.items() <= config.items()
    assert {"pe": "axial", "dataset": "bearing", "seed": 9, "epochs": 3}.items() <= result.items()
    assert {"device", "torch", "commit", "command"} <= config.keys() & result.keys()
    assert result["parameters"] == sum(p.numel() for p in weights(out)["model"].values())
    rows = list(csv.DictReader((out / "log.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        epoch, steps = steps[:4], steps[4:]
        loss = torch.stack([F.cross_entropy(*step) for step in epoch]).mean().item()
        correct = torch.cat([logits.argmax(dim=1) == labels for logits, labels in epoch]).double().mean().item()
        assert float(row["train_loss"]) == pytest.approx(loss, abs=1e-4)  # it has four digits
        assert float(row["train_accuracy"]) == pytest.approx(100 * correct, abs=1e-2)
    assert float(row["test_accuracy"]) == result["test_accuracy"]
    shown = capsys.readouterr().out
    assert f"axial on bearing, seed 9: {result['test_accuracy']} %" in shown.splitlines()[-1] and "GPU" not in shown


def test_a_finished_run_is_neither_overwritten_nor_changed(capsys):
    run("--out=a")
    last_line = capsys.readouterr().out.splitlines()[-1]
    files = {path: path.stat().st_mtime_ns for path in Path("a").iterdir()}
    assert "add --resume" in bad(capsys, "--out=a")
    line = bad(capsys, "--out=a", "--resume", "--lr=0.5", "--pe=axial")
    assert "--lr was 0.002, is 0.5" in line and "--pe was spherical, is axial" in line
    assert run("--out=a", "--resume", "--amp") == 0  # which is free to change
    assert capsys.readouterr().out.splitlines()[-1] == last_line
    assert {path: path.stat().st_mtime_ns for path in Path("a").iterdir()} == files


def test_new_weights_remove_the_results_of_older_ones(monkeypatch):
    interrupted("--out=a")
    Path("a/evaluation.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert run("--out=a", "--resume") == 0
    assert not Path("a/evaluation.json").exists()
    assert read_json(Path("a/result.json"))["torch"] == "9.9" != read_json(Path("a/config.json"))["torch"]
    Path("a/last.pt").unlink()
    interrupted("--out=a")
    assert not Path("a/result.json").exists()


def test_the_bar_shows_the_share_of_time_spent_waiting_for_images(monkeypatch):
    make_imagenet("in")
    clock, shown = [0], []

    def takes(seconds):
        return lambda *_: clock.append(clock[-1] + seconds)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    monkeypatch.setattr(train, "SHOW_SECONDS", 0)
    monkeypatch.setattr(tqdm, "set_postfix_str", lambda bar, text, *_, **__: shown.append(text))
    wait, test = before(ImageNet, "train_batch", takes(3)), before(ImageNet, "test_batches", takes(100))
    with wait, before(F, "cross_entropy", takes(1)), test:
        assert run(*FOLDERS, "--out=a", "--epochs=1") == 0
    assert len(shown) == 4 and all("loss" in text and "waiting for images 75%" in text for text in shown)
    assert {"train_seconds": 16, "images_per_second": 1.5}.items() <= read_json(Path("a/result.json")).items()


def test_the_environment_names_the_commit_and_uncommitted_changes_of_code(monkeypatch):
    monkeypatch.setattr(environment, "ROOT", Path.cwd())
    for name in "code.py", "rows.csv":
        Path(name).write_text("a", encoding="utf-8")
    for words in "init -q", "add .", "-c user.name=a -c user.email=a commit -qm a":
        subprocess.run(["git", *words.split()], check=True)
    commit = environment.environment("cpu")["commit"]
    assert re.fullmatch("[0-9a-f]{40}", commit)
    Path("rows.csv").write_text("b", encoding="utf-8")  # a result, which does not change the next one
    assert environment.environment("cpu")["commit"] == commit
    Path("code.py").write_text("b", encoding="utf-8")
    assert environment.environment("cpu")["commit"] == f"{commit}-dirty"


@pytest.mark.parametrize(
    "name, call, step", [("train_batch", 1, 1), ("train_batch", 8, 8), ("step", 12, 12), ("test_batches", 3, 12)]
)
def test_ctrl_c_anywhere_saves_and_resumes_to_the_same_bits(name, call, step, capsys):
    owner = AdamW if name == "step" else Bearing  # an update ends before the run does
    assert_resumes_to_the_same_end("--pe=spherical-learned", stop=partial(interrupted, at=(owner, name), call=call))
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"Stopped after step {step}. To continue: python " in said and said.endswith(" --resume")


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(capsys):
    previous = signal.getsignal(signal.SIGINT)
    with before(Bearing, "train_batch", ctrl_c, call=3), before(Bearing, "train_batch", ctrl_c, call=3):
        assert run("--out=a") == 130
    assert capsys.readouterr().err == "Stopped at once.\n"
    assert not Path("a/last.pt").exists() and signal.getsignal(signal.SIGINT) == previous


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_of_schedulers_and_terminals_stop_a_run_as_ctrl_c_does(name, capsys):
    number = signal.Signals[name]
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with before(F, "cross_entropy", lambda *_: signal.raise_signal(number), call=2):
        assert run("--out=a") == 128 + number
    assert "Stopped after step 2. To continue: python " in capsys.readouterr().err and weights("a")["step"] == 2
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with before(F, "cross_entropy", lambda *_: signal.raise_signal(signal.SIGHUP), call=2):
        assert run("--out=b") == 0
    assert signal.signal(signal.SIGHUP, previous) == signal.SIG_IGN


def test_the_first_epoch_is_saved():
    saved = []
    with before(F, "cross_entropy", lambda *_: saved.append(weights("a")["step"]), call=5):
        assert run("--out=a") == 0
    assert saved == [4]


@posix
def test_sigkill_in_the_midst_of_saving_keeps_the_checkpoint_before():
    code = """if True:
        import itertools, os, pathlib, signal, sys, train
        from lab.data import Bearing
        Bearing.train_size, Bearing.test_size, train.CHECKPOINT_SECONDS = 64, 50, 0
        def write(path, content, function=pathlib.Path.write_bytes, calls=itertools.count(1)):
            if next(calls) == 7:
                function(path, content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            function(path, content)
        pathlib.Path.write_bytes = write
        sys.exit(train.main())"""

    def kill(*flags):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        killed = subprocess.run([sys.executable, "-c", code, *TINY, *flags], env=env, capture_output=True)
        assert killed.returncode == -signal.SIGKILL and weights("cut")["step"] == 5, killed.stderr

    assert_resumes_to_the_same_end(stop=kill)


@pytest.mark.parametrize("pe", ENCODINGS)
def test_every_encoding_trains_and_resumes_to_the_same_bits(pe):
    assert_resumes_to_the_same_end(f"--pe={pe}", "--head-dim=24", f"--jitter={int(pe in ROTARY)}")


@pytest.mark.parametrize("opt", ["lamb", "adamw"])
def test_the_papers_recipe_resumes_to_the_same_bits(opt, cifar):
    assert_resumes_to_the_same_end(cifar, f"--opt={opt}")


@pytest.mark.parametrize("workers", [0, 2])
def test_imagenet_resumes_to_the_same_bits(workers):
    make_imagenet("in")
    flags = [*FOLDERS, f"--workers={workers}", "--limit-classes=2"]
    assert_resumes_to_the_same_end(*flags, stop=partial(interrupted, call=3), then=["--workers=1"])
    assert weights("whole")["step"] == 3 * (16 // 6) and len(weights("whole")["model"]["head.bias"]) == 2


def test_a_corrupt_image_stops_the_run_with_its_path_or_is_skipped(capsys):
    make_imagenet("in")
    Path("in/train/b/3.jpeg").write_bytes(b"no image")
    line = bad(capsys, *FOLDERS, "--out=a")
    assert "in/train/b/3.jpeg" in line and "--skip-corrupt" in line
    assert run(*FOLDERS, "--out=a", "--skip-corrupt") == 0
    assert "corrupt images skipped: 1" in capsys.readouterr().out
    assert read_json(Path("a/result.json"))["skipped_images"] == 1
    for name in "a", "b":
        Path(f"in/val/{name}/3.jpeg").write_bytes(b"no image")
    assert evaluate.main(["a", "--data-dir=in", "--shuffle"]) == 0  # as the run left out
    assert read_json(Path("a/evaluation.json"))["skipped_images"] == 2
    assert "corrupt images skipped: 2" in capsys.readouterr().out
    line = complaint(capsys, evaluate.main, "a", "--data-dir=elsewhere")
    assert "elsewhere" in line and "corrupt" not in line


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--pe rope", "choose from"),
        ("--opt sgd", "choose from"),
        ("--epoch 3", "--epoch"),
        ("--epochs 0", "--epochs: must be an integer >= 1, not 0"),
        ("--lr 0", "--lr: must be a number > 0, not 0"),
        ("--lr nan", "--lr: must be a number > 0, not nan"),
        ("--weight-decay -1", "must be a number >= 0, not -1"),
        ("--dropout 1", "--dropout: must be a number >= 0 and <= 0.9"),
        ("--seed " + "9" * 400, "--seed: is too large: 9"),
        ("--fraction 1.5", "> 0 and <= 1"),
        ("--fraction 0.5", "leave --fraction out"),
        ("--augment mix", "leave --augment out"),
        ("--workers 2", "--dataset bearing takes no --workers: leave it out"),
        ("--skip-corrupt", "--dataset bearing takes no --skip-corrupt: leave it out"),
        ("--patch-size 5", "--img-size must be a multiple of --patch-size = 5, got 32"),
        ("--micro-batch 5", "--micro-batch must divide the 16 images per process"),
        ("--jitter 1 --pe ape", "leave --jitter and --shift out"),
        ("--shift 1 --pe none", "leave --jitter and --shift out"),
        ("--pe axial --pe-options block_size=4", "axial has no option 'block_size': it has learned, uniform, theta"),
        ("--pe ape --pe-options theta=4", "--pe ape has no option 'theta': it has none"),
        ("--pe axial --pe-options theta=far", "theta must be of type float, such as 100.0, not 'far'"),
        ("--pe axial --pe-options learned=1", "learned must be of type bool, such as False, not '1'"),
        ("--pe axial-learned --pe-options learned=False", "axial-learned means learned=True: leave learned out"),
        ("--pe comrope-ap --pe-options kind=ld", "comrope-ap means kind=ap: leave kind out, or choose another --pe"),
        (
            "--pe liere --pe-options block_size=13",
            "block_size must be a whole number from 2 to --head-dim = 12, got 13",
        ),
        ("--device gpu", "--device gpu cannot be used"),
        ("--device meta", "--device meta cannot be used"),
        pytest.param("--device mps", "with arguments from the 'MPS' backend): try --device cpu", marks=without_mps),
        ("--epochs 1" + "0" * 300, "--epochs: is too large"),
        ("--opt lamb --lr 1e39", "--lr: is too large: 1e39"),
        ("--batch-size 1000000000000000", "out of memory: try a smaller --batch-size"),
        (f"--batch-size {2**63 - 1}", "out of memory: try a smaller --batch-size"),
        (f"--head-dim {2**63 - 1}", "out of memory: try a smaller --batch-size, --micro-batch, --sizes or model"),
        ("--out=", "--out: must name a folder"),
        ("--device cuda:99", "try --device cpu"),
        ("--resume", "there is no runs/bearing-spherical-s0/last.pt to continue: leave --resume out"),
        pytest.param("--out /dev/null/run", "/dev/null/run (Not a directory): check", marks=posix),
    ],
)
def test_bad_flags_get_one_line_and_write_nothing(flags, says, capsys):
    assert says in bad(capsys, *flags.split())
    assert {path.name for path in Path().rglob("*") if path.is_file()} <= {"config.json"}


TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}


@pytest.mark.parametrize(
    "wrong", [{"RANK": "abc"}, {"WORLD_SIZE": "2"}, {"RANK": "1"}, TWO, TWO | {"MASTER_PORT": "a"}]
)
def test_an_environment_that_is_not_torchruns_gets_one_line(wrong, monkeypatch, capsys):
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(ROOT / "lab" / "distributed.py")  # as every script does first
    assert re.fullmatch("error: RANK, WORLD_SIZE, .* torchrun .*\n", capsys.readouterr().err)


@posix
def test_a_closed_pipe_leaves_a_run_that_resumes():
    code = f"import train; from lab.data import Bearing; Bearing.train_size = 64; train.main({[*TINY, '--out=a']})"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" | head -1'], env=env, capture_output=True)
    assert run("--out=a", "--resume") == 0 and read_json(Path("a/result.json"))


def test_a_terminal_that_knows_only_ascii_is_enough():
    command = [sys.executable, ROOT / "train.py", *TINY, "--epochs=1", "--out=köln"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0 and b"to k?ln/" in done.stdout


@posix
def test_a_folder_has_one_writer_and_a_killed_one_does_not_block_it(capsys):
    assert run("--out=a") == 0
    code = "import lab.files, pathlib\nwith lab.files.locked(pathlib.Path('a')): print('locked', flush=True), input()"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        assert "another process is writing to a: wait for it" in bad(capsys, "--out=a")
        assert "another process is writing to a" in complaint(capsys, evaluate.main, "a")
        other.kill()
    assert run("--out=a", "--resume") == 0 and not Path("a/.lock").exists()


@pytest.mark.parametrize("name", ["config.json", "log.csv", "curves.png", "result.json", "evaluation.json"])
def test_a_folder_of_something_else_is_left_as_it_is(name, capsys):
    path = Path("a", name)
    path.parent.mkdir()
    path.write_text('{"model": "mine"}', encoding="utf-8")
    assert f"{path} does not belong to a run: choose another folder with --out" in bad(capsys, "--out=a")
    assert os.listdir("a") == [name] and path.read_text(encoding="utf-8") == '{"model": "mine"}'


@pytest.mark.parametrize("dataset, why", [("cifar100", "cannot download"), ("imagenet", "data/train does not exist")])
def test_on_a_cpu_a_large_data_set_wants_a_gpu_or_suggests_bearing(dataset, why, capsys, monkeypatch):
    monkeypatch.setattr(data, "CIFAR100_URL", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    assert run(f"--dataset={dataset}") == 2
    out, err = capsys.readouterr()
    assert "GPU" in out and "--dataset bearing" in out and out.count("\n") == 1
    assert (
        why in err and err.count("\n") == 1 and {path.name for path in Path().rglob("*") if path.is_file()} <= {".lock"}
    )


def test_nothing_half_built_complains_after_the_line(capsys, monkeypatch):
    class HalfBuilt:  # as torch's loaders are, whose processes could not start
        def __del__(self):
            raise AttributeError

    @one_line_errors
    def main(argv):
        half_built = HalfBuilt()  # noqa: F841
        raise OSError(24, "Too many open files")

    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    assert "(Too many open files): check" in complaint(capsys, main) and not heard


def test_a_full_gpu_gets_advice_and_a_bug_its_traceback(capsys, monkeypatch):
    interrupted("--out=a")
    for owner, name in (torch, "load"), (F, "cross_entropy"):
        with before(owner, name, Mock(side_effect=torch.OutOfMemoryError)):
            assert "try a smaller --batch-size, --micro-batch" in bad(capsys, "--out=a", "--resume")
    with pytest.raises(RuntimeError, match="bug"), before(F, "cross_entropy", Mock(side_effect=RuntimeError("bug"))):
        run("--out=a", "--resume")


def test_a_missing_compiler_suggests_no_compile():
    command = [sys.executable, ROOT / "train.py", *TINY, "--compile", "--out=a"]
    env = os.environ | {"CXX": "nowhere", "TORCHINDUCTOR_CACHE_DIR": "cache"}
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "compiler" in done.stderr and "--no-compile" in done.stderr


@pytest.mark.parametrize("part, name", [(0, "log.csv"), (0.01, "last.pt"), (0.5, "last.pt")])
def test_a_disk_that_fills_while_saving_keeps_the_last_checkpoint(part, name, capsys):
    resource = pytest.importorskip("resource")
    interrupted("--out=a")
    saved, (soft, hard) = Path("a/last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(part * len(saved)), hard))  # no file becomes larger
    try:
        line = bad(capsys, "--out=a", "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"a/{name} (File too large): check free space" in line
    assert Path("a/last.pt").read_bytes() == saved


def test_a_corrupt_or_hostile_checkpoint_is_refused_and_runs_no_code(capsys):
    run("--out=a")
    path, whole, other, harm = Path("a/last.pt"), Path("a/last.pt").read_bytes(), weights("a"), Call(os.mkdir, "harm")
    place = other["model"]["head.weight"].numpy().tobytes()
    damaged = whole.replace(place, bytes(len(place)))
    for content in whole[:-1000], whole[: len(whole) // 2], b"", damaged, pickle.dumps(harm, protocol=2):
        path.write_bytes(content)
        assert "a/last.pt is corrupt" in bad(capsys, "--out=a", "--resume")
    for content in {"config": harm}, [1]:
        torch.save(content, path)
        assert "a/last.pt is not a checkpoint of train.py" in bad(capsys, "--out=a", "--resume")
    del other["optimizer"]
    torch.save(other, path)
    assert "a/last.pt has no optimizer" in bad(capsys, "--out=a", "--resume")
    assert not Path("harm").exists()
    path.unlink()
    path.mkdir()
    assert "there is no a/last.pt" in bad(capsys, "--out=a", "--resume")


def test_moments_are_copied_into_memory_that_an_optimizer_can_write_to(capsys):
    interrupted("--out=a")
    saved, place = weights("a"), Path("a/last.pt")
    moments = saved["optimizer"]["state"][0]
    for name, wrong in ("exp_avg", torch.zeros(1)), ("exp_avg_sq", moments["exp_avg_sq"][None]):
        right, moments[name] = moments[name], wrong
        torch.save(saved, place)
        assert f"does not fit this optimizer, which has changed since: {name}" in bad(capsys, "--out=a", "--resume")
        moments[name] = right
    moments["exp_avg"] = torch.zeros(()).expand_as(moments["exp_avg"])  # all of it in one place
    torch.save(saved, place)
    assert run("--out=a", "--resume") == 0 and weights("a")["optimizer"]["state"][0]["exp_avg"].unique().numel() > 1


def test_only_a_checkpoint_that_was_read_whole_is_called_corrupt(capsys):
    make_imagenet("in")
    interrupted(*FOLDERS, "--out=a", call=2)
    for what in "train", "val":
        for path in Path("in", what, "c").iterdir():
            path.unlink()
        Path("in", what, "c").rmdir()
    resume = *FOLDERS, "--out=a", "--resume"
    assert re.search("data set was 24 .* of 3 classes .*, is 16 .* of 2 classes", bad(capsys, *resume))
    assert "was trained on 24" in complaint(capsys, evaluate.main, "a", "--data-dir=in")
    for error, says in (MemoryError(), "out of memory"), (OSError(5, "Input/output error"), "Input/output error"):
        with before(Path, "read_bytes", Mock(side_effect=error)):
            assert says in bad(capsys, *resume)
    with before(torch, "load", Mock(side_effect=MemoryError())):  # where other errors say that the file is wrong
        assert "out of memory" in bad(capsys, *resume)


def test_a_finished_run_without_a_result_gets_one():
    run("--out=a")
    Path("a/result.json").unlink()
    assert run("--out=a", "--resume") == 0 and read_json(Path("a/result.json"))


def test_weights_and_moments_not_finite_are_named_not_saved(capsys, monkeypatch):
    assert run("--out=a", "--lr=1e38", "--epochs=1", "--batch-size=64") == 1  # in the last step
    assert re.search(r"error: \S+ became NaN or infinite", capsys.readouterr().err)
    assert {*os.listdir("a")} == {"config.json", "log.csv"}
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)

    def spoil(optimizer):
        optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"][0] = math.nan

    with before(Optimizer, "zero_grad", spoil, call=6):  # after an update, which would spoil weights in the next one
        assert run("--out=b") == 1
    assert "exp_avg of patch_embed.proj.weight became NaN or infinite" in capsys.readouterr().err
    assert weights("b")["step"] == 5


def test_there_is_no_result_without_a_tested_image(capsys):
    make_imagenet("in")
    assert run(*FOLDERS, "--out=a", "--epochs=1") == 0
    for path in Path("in/val").rglob("*.jpeg"):
        path.write_bytes(b"no image")
    assert "no test image could be read: check --data-dir\n" in bad(capsys, *FOLDERS, "--out=b", "--skip-corrupt")
    assert not Path("b/result.json").exists()


def test_nan_at_the_first_step_is_not_blamed_on_the_rate(capsys):
    assert run("--pe=liere", "--pos-scale=1e30", "--out=a") == 1
    assert "NaN or infinite at the first step: change --pos-scale" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(what, capsys, monkeypatch):
    def spoil(logits, labels):
        logits.data.fill_(math.nan) if what == "loss" else logits.register_hook(lambda grad: grad * math.nan)

    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    with before(F, "cross_entropy", spoil, call=6):
        assert run("--out=a") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "became NaN or infinite: try a lower --lr" in line
    assert weights("a")["step"] == 5 and all(p.isfinite().all() for p in weights("a")["model"].values())
    assert not Path("a/result.json").exists()


DEIT = "--opt lamb --lr 4e-3 --warmup-epochs 5 --weight-decay 0.05 --depth 12 --heads 6 --layer-scale 1e-4 --pool cls"
OURS = "--opt adamw --lr 2e-3 --warmup-epochs 1 --weight-decay 0.05 --depth 2 --heads 4 --layer-scale 0 --pool cls"
DROP = "--dropout {0} --drop-path {0} --epochs {1} --batch-size {2} --augment {3} --patch-size {4} --head-dim {5}"


@pytest.mark.parametrize(
    "dataset, recipe",
    [
        ("cifar100", f"{DEIT} {DROP.format(0.1, 400, 1024, 'mix', 4, 60)}"),
        ("imagenet", f"{DEIT} {DROP.format(0, 200, 512, '3', 16, 64)}"),
        ("bearing", f"{OURS} {DROP.format(0, 10, 64, 'none', 4, 24)}"),
    ],
)
def test_a_recipe_stays_as_it_was_published(dataset, recipe):
    """van de Geijn et al. 2025, tables 5 and 6; for bearing, the recipe of lab/results/."""
    flags = "--dataset", dataset
    assert train.parse_args(flags) == train.parse_args([*flags, *recipe.split()])
    assert dataset == "bearing" or train.parse_args([*flags, "--opt=adamw"]).lr == 1e-3


def test_help_names_every_flag_and_its_defaults(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    for flag in vars(train.parse_args([])):
        assert f"--{flag.replace('_', '-')} " in shown
    assert "cifar100 400, imagenet 200, else 10" in " ".join(shown.split())


def test_flags_reach_the_model():
    flags = "--dropout=0.3", "--drop-path=0.2", "--layer-scale=0.5", "--pool=mean", "--pe=liere"
    assert run("--out=a", *flags, "--lr=1e-9", "--pe-options", "block_size=5") == 0
    _, model = read_run(Path("a"))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    assert {block.drop_path.rate for block in model.blocks} == {0.2}
    assert all(block.ls1.gamma.mean().item() == pytest.approx(0.5, abs=1e-6) for block in model.blocks)
    assert model.num_prefix_tokens == 0 and model.blocks[0].attn.rope.block_size == 5


def test_flags_change_the_course_of_a_run_but_not_its_length(cifar):
    first, labels, last = [], [], []
    flags = "--seed=0 --seed=1 --fraction=0.5 --augment=3 --augment=mix --jitter=1 --shift=1 --opt=adamw"
    for flag in flags.split():
        begin = before(ViT, "forward", lambda model, *_: first.append(model.head.weight.clone()), call=1)
        with begin, before(F, "cross_entropy", lambda _, y: labels.append(y), call=1):
            assert run(cifar, "--epochs=1", "--lr=1e-3", "--augment=none", f"--out={flag}", flag) == 0
        assert weights(flag)["step"] == 4
        last.append(weights(flag)["model"]["head.weight"])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(last, 2))
    assert not torch.equal(first[0], first[1]) and not torch.equal(labels[0], labels[1])  # of the two seeds


def test_only_linear_maps_decay():
    def set_to_1_without_gradient(optimizer):
        for p in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
            p.data.fill_(1)
            p.grad.zero_()

    with before(AdamW, "step", set_to_1_without_gradient):
        assert run("--pe=spherical-learned", "--weight-decay=0.5", "--out=a") == 0
    decayed = {name for name, p in weights("a")["model"].items() if (p < 1).all()}
    blocks = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert decayed == blocks | {"patch_embed.proj.weight", "head.weight"}


@pytest.mark.parametrize("warmup_epochs, W", [(1, 4), (5, 8)])
def test_learning_rate_warms_up_linearly_for_a_fifth_at_most_and_falls_as_a_cosine(warmup_epochs, W):
    rates = []
    with before(AdamW, "step", lambda optimizer: rates.append([group["lr"] for group in optimizer.param_groups])):
        assert run("--epochs=10", f"--warmup-epochs={warmup_epochs}", "--lr=0.01", "--out=a") == 0
    warmup = [(step + 1) / (W + 1) for step in range(W)]
    cosine = [(1 + math.cos(math.pi * step / (40 - W))) / 2 for step in range(40 - W)]
    for of_group in zip(*rates, strict=True):
        assert of_group == pytest.approx([0.01 * x for x in warmup + cosine])


@pytest.mark.parametrize("scale, least, most", [(1e-3, 0, 0.1), (1e3, 0.999, 1.001)])
def test_gradients_are_clipped_to_a_norm_of_1(scale, least, most):
    norms = []

    def record(optimizer):
        grads = [p.grad.double() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(grads).item())

    scaled = before(F, "cross_entropy", lambda logits, _: logits.register_hook(lambda grad: scale * grad))
    with scaled, before(AdamW, "step", record):
        assert run("--epochs=1", "--out=a") == 0
    assert len(norms) == 4 and all(least < norm < most for norm in norms)


def test_dropout_repeats_neither_another_ranks_draws_nor_those_of_the_augmentation(monkeypatch):
    def draw(to):
        return lambda *_: to.append(torch.rand(()).item())

    draws = []
    for rank in 0, 1:
        monkeypatch.setattr(train, "RANK", rank)
        draws += [], []
        with before(Bearing, "train_batch", draw(draws[-2])), before(ViT, "forward", draw(draws[-1])):
            assert run("--epochs=1", f"--out={rank}") == 0
    augmentation, dropout, same, other = draws
    assert augmentation == same and len({*augmentation, *dropout, *other}) == 4 + 5 + 5  # the fifth is of the test


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_jitter_keeps_every_patch_within_itself_and_the_class_token_in_place(pool):
    torch.manual_seed(0)
    model = ViT("axial", depth=1, pool=pool)
    first, pos = model.num_prefix_tokens, model.positions(8, 8)
    moves = torch.stack([noisy_positions(model, model.grid, 0.2) - pos for _ in range(200)]) / model.spacing
    assert not moves[:, :first].any()
    assert abs(moves[:, first:].std() - 0.2) < 0.01 and 0.4999 < moves.abs().max() < 0.5001


def test_shift_moves_all_tokens_by_one_offset_per_step():
    torch.manual_seed(0)
    model = ViT("axial", depth=1)
    moves = torch.stack([noisy_positions(model, 8, shift=3) - model.positions(8, 8) for _ in range(400)])
    moves /= model.spacing
    torch.testing.assert_close(moves, moves[:, :1].expand_as(moves), rtol=0, atol=1e-5)
    assert moves[:, 0].std(dim=0).sub(3).abs().max() < 0.45  # four standard errors
    assert abs(moves[:, 0].T.corrcoef()[0, 1]) < 0.2


def test_bfloat16_autocasts_training_and_test_but_not_the_weights():
    dtypes, linear = set(), torch.nn.Linear(1, 1)
    with before(ViT, "forward", lambda model, images, *_: dtypes.add((model.training, linear(images[..., :1]).dtype))):
        assert run("--amp", "--pe=spherical-learned", "--out=a") == 0
    assert dtypes == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert {p.dtype for p in weights("a")["model"].values()} == {torch.float32}


def test_accuracy_is_of_all_images_and_of_the_whole_model_without_a_graph():
    model, seen, images = ViT("axial", depth=1, num_heads=2, head_dim=12, dropout=0.5), [], torch.zeros(4, 3, 32, 32)
    right = model.eval()(images).argmax(dim=1)
    model.train().register_forward_hook(lambda model, _, logits: seen.append((model.training, logits.requires_grad)))
    assert accuracy(model, [(images, right), (images[:1], right[:1] + 1)], amp=False) == 80
    assert seen == [(False, False)] * 2


@pytest.mark.parametrize("missing", [False, True])
def test_a_picture_that_fails_is_a_warning(monkeypatch, capsys, missing):
    if missing:
        monkeypatch.setitem(sys.modules, "lab.pictures", None)  # as if matplotlib were not installed
    else:
        monkeypatch.setattr("lab.pictures.plot_curves", Mock(side_effect=RuntimeError("no LaTeX")))
    assert run("--epochs=1", "--out=out") == 0
    (warning,) = {line for line in capsys.readouterr().err.splitlines() if "warning" in line}
    assert warning.startswith("warning: out/curves.png could not be drawn: ")
    assert Path("out/result.json").exists() and not Path("out/curves.png").exists()


def test_curves_ignore_a_notebooks_backend_and_a_matplotlibrc(tmp_path):
    Path("matplotlibrc").write_text("text.usetex: True\nbackend: module://nowhere\n", encoding="utf-8")
    row = {"epoch": 1, "train_loss": 1, "train_accuracy": 2, "test_accuracy": 3}
    draw = f"import pathlib, lab.pictures; lab.pictures.plot_curves(pathlib.Path('a.png'), 'a_b', [{row}])"
    theirs = {"MPLBACKEND": "module://nowhere", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", draw], env=os.environ | theirs, check=True)
    assert Path("a.png").stat().st_size > 1000
