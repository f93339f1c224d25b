"""lab.experiments and lab.report: which runs are started, what their rows contain, and the tables made from them."""

import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, SMALL, as_flags, complaint, posix

import train
from lab import benchmark, distributed, evaluate, experiments, gpu_first, report
from lab.data import REGIONS
from lab.environment import environment
from lab.errors import UserError
from lab.experiments import SETS, Failed, Stopped, append, read
from lab.files import write_json
from lab.report import TABLES, table
from vit import ENCODINGS

PUBLISHED = experiments.RESULTS / "published.csv"


@pytest.fixture(autouse=True)
def tiny_set(monkeypatch, tiny_bearing, tmp_path):
    """An empty results folder, and a set of three tiny runs."""
    for module in experiments, report:
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    flags = {flag: value for flag, value in SMALL.items() if flag != "device"} | {"epochs": 1, "seed": 1}
    monkeypatch.setitem(SETS, "tiny", ([{"pe": pe} | flags for pe in ("none", "ape", "axial")], "--shift 4 --shuffle"))


def pretend(script, deadline):
    """Write the files of train.py or lab.evaluate without training, with the given numbers as accuracies."""
    if script[0] != "-m":
        args = train.parse_args(script[1:])
        args.out.mkdir(parents=True)
        result = {"train_seconds": 1, "images_per_second": 1, "device": "cpu", "torch": "2.13", "commit": None}
        accuracy = 100 * args.fraction if args.fraction < 1 else args.epochs / 10
        result |= {"epochs": args.epochs, "test_accuracy": accuracy}
        return write_json(args.out / "result.json", result)
    args = evaluate.parse_args(script[2:])
    sizes = [4 * round(8 * times) for times in evaluate.SIZES] if args.sizes == [] else args.sizes
    asked = {"size": sizes}
    if ENCODINGS[re.search("pe=([a-z-]+)", args.runs[0].name)[1]]:
        asked |= {"shift": args.shift, "patch shift": args.patch_shift}
    found = {kind: {f"{x:g}": x for x in numbers or []} for kind, numbers in asked.items()}
    found |= {"test": {"test": 1}}
    found |= {"patches": {"shuffled": 1}} if args.shuffle else {}
    found |= {"region": dict.fromkeys(REGIONS, 1), "token moved": {"lower right": 1}} if args.regions else {}
    write_json(args.runs[0] / "evaluation.json", {"accuracies": found})


def test_a_run_is_trained_and_evaluated_once_and_becomes_a_row(monkeypatch):
    def call(script, deadline):
        calls.append(script[0])
        main, *flags = [evaluate.main, *script[2:]] if script[0] == "-m" else [train.main, *script[1:]]
        assert main([*flags, "--device=cpu"]) == 0

    calls = []
    monkeypatch.setattr(experiments, "call", call)
    assert experiments.main(["tiny"]) == 0 and calls == [ROOT / "train.py", "-m"] * 3
    _, ape, axial = rows = read("tiny")
    assert {"pe": "axial", "seed": "1", "epochs": "1", "dataset": "bearing"}.items() <= axial.items()
    assert axial["accuracy"] and axial["shift 4"] and ape["shift 4"] == "" and ape["patches shuffled"]
    assert float(axial["seconds"]) > 0 and float(axial["images_per_second"]) > 0
    assert all(axial[name] == (environment("cpu")[name] or "") for name in ("device", "torch", "commit"))
    repeated = train.parse_args(shlex.split(axial["command"])[2:])
    assert (repeated.pe, repeated.seed, repeated.head_dim) == ("axial", 1, SMALL["head-dim"])
    assert experiments.main(["tiny"]) == 0 and len(calls) == 6
    for path in Path("tiny.csv"), *Path("runs").rglob("evaluation.json"):
        path.unlink()
    assert experiments.main(["tiny"]) == 0 and read("tiny") == rows  # the seconds too: it was not trained again


@posix
@pytest.mark.parametrize("number, why, code", [(0, "Time is up", 0), (15, "Stopped", 143)])
def test_deadline_and_signals_save_the_run(monkeypatch, number, why, code):
    class Process(subprocess.Popen):
        def wait(self, timeout=None):
            while timeout is not None and self.poll() is None and not Path("run/log.csv").exists():
                time.sleep(0.05)
            if timeout is not None and number:
                signal.raise_signal(number)
            return super().wait(timeout and 0)

    monkeypatch.setattr(subprocess, "Popen", Process)
    flags = as_flags(SMALL | {"epochs": 10**6, "batch-size": 512, "patch-size": 16, "out": "run"})
    with distributed.on_signals(experiments.interrupt), pytest.raises(experiments.Stopped, match=why) as stopped:
        experiments.call([ROOT / "train.py", *flags], time.monotonic() + 60)
    assert stopped.value.code == code and Path("run/last.pt").exists() and not Path("run/result.json").exists()


def test_a_failed_run_stops_the_set(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)  # where there is no train.py
    assert experiments.main(["tiny"]) == 2 and not read("tiny")
    assert f"error: {tmp_path}/train.py --pe=none" in capsys.readouterr().err


def test_impossible_flags_get_one_line(capsys):
    assert "'table8' (choose from" in complaint(capsys, experiments.main, "table8")
    assert "required: SET" in complaint(capsys, experiments.main)
    assert "--minutes" in complaint(capsys, experiments.main, "table2", "--minutes=0")


def cells(name):
    """A table's column titles, and {encoding: cells}."""
    lines = [
        [cell.strip() for cell in line.replace("`", "").strip("|").split("|")] for line in table(name).splitlines()
    ]
    return lines[0][1:], {line[0]: line[1:] for line in lines[2:]}


OF_SETS = {name: "table2" if name == "figure3" else name.removesuffix("-shifts") for name in TABLES}


@pytest.mark.parametrize("name, of_set", [item for item in OF_SETS.items() if item[1] in SETS])
def test_a_finished_set_fills_its_table(monkeypatch, name, of_set):
    """The scripts accept the set's flags, and a column with a number in its title shows the result for that number."""
    monkeypatch.setattr(experiments, "call", pretend)
    assert experiments.main([of_set]) == 0
    if "medium" in name:
        shutil.copy(PUBLISHED, ".")
    titles, rows = cells(name)
    assert titles == [title.replace("`", "") for title, _ in TABLES[name]]
    pes = {run["pe"] for run in SETS[of_set][0]}
    assert list(rows) == [pe for pe in ENCODINGS if pe in pes and (ENCODINGS[pe] or not name.endswith("shifts"))]
    for title, *column in zip(titles, *rows.values(), strict=True):
        number = re.search(r"\d+|$", title.replace("0 epochs", " epochs"))[0]  # a tenth of the epochs
        assert all(cell.startswith(number and f"{number}.0") for cell in column), title
        assert column.count("-") == (title in ("minus axial", "in the paper"))  # axial's, to itself


def test_tables_show_mean_error_and_seeds_of_what_was_measured():
    assert table("table2") == ""
    append("published", {"pe": "ape", "table2: 2025": "64.2", "table7: 2025": "45.9"})
    assert (
        table("table2") == "| `--pe` | published: 2025 | here |\n| --- | --- | --- |\n| `ape` | 64.2 | not run yet |\n"
    )
    for seed, accuracy in enumerate((70, 71, 73)):
        append("table2", {"pe": "axial", "seed": seed, "epochs": 50, "accuracy": accuracy, "command": "python"})
    append("table2", {"pe": "ape", "seed": 0, "epochs": 50, "accuracy": 80, "size 24": 7, "command": "python"})
    start = "| `--pe` | published: 2025 | 50 epochs | seeds |\n| --- | --- | --- | --- |\n"
    assert table("table2") == start + "| `ape` | 64.2 | 80.0 | 1 |\n| `axial` | - | 71.3 ± 0.9 | 3 |\n"
    assert cells("figure3") == (["24 px", "seeds"], {"ape": ["7.0", "1"], "axial": ["-", "3"]})
    append("table2", {"pe": "ape", "seed": 1, "epochs": 50, "accuracy": 80, "command": "python"})
    assert cells("figure3")[1]["ape"] == ["7.0 (n = 1)", "2"]


def test_differences_are_taken_between_runs_with_the_same_seed():
    for pe, accuracies in ("none", (9, 9)), ("axial", (20, 23)), ("mixed", (25, 28)), ("liere", (26, 30)):
        for name in "bearing", "cifar100-small", "cifar100-medium":
            for seed, accuracy in enumerate(accuracies):
                append(name, {"pe": pe, "seed": seed, "accuracy": accuracy, "command": "python"})
    append("bearing", {"pe": "axial", "seed": 2, "accuracy": 90, "command": "python"})  # not shared
    shutil.copy(PUBLISHED, ".")
    found = {name: [row[1] for row in cells(name)[1].values()] for name in ("bearing", "cifar100-small")}
    assert found["bearing"] == ["-12.5 ± 1.5", "-", "+5.0 ± 0.0", "+6.5 ± 0.5"]
    pooled = math.sqrt((1.5**2 + 0.5**2) / 3)
    assert found["cifar100-small"] == [f"{mean} ± {pooled:.1f}" if mean else "-" for mean in (-12.5, 0, "+5.0", "+6.5")]
    rows = {pe: row[1:3] for pe, row in cells("cifar100-medium")[1].items()}
    assert rows["mixed"] == [f"+5.0 ± {pooled:.1f}", "+2.6"] and rows["axial"] == ["-", "-"] and rows["none"][1] == "-"


def test_an_encoding_is_its_own_control():
    for seed, (right, below) in enumerate([(90, 30), (80, 40), (100, 20)]):
        row = {"pe": "spherical", "seed": seed, "pool": "mean", "accuracy": 99, "command": "python"}
        append("bearing-corner", row | {"region upper right": right, "region lower left": below})
    append("bearing-corner", row | {"seed": 3, "region upper right": 0})  # whose other quarter is missing
    titles, rows = cells("corner-mean")
    assert dict(zip(titles, rows["spherical"], strict=True))["right minus below"] == "+60.0 ± 11.5"  # 20 / sqrt(3)


def test_training_under_shifts_is_compared_with_the_usual():
    places = [f"region {place}" for place in REGIONS] + ["all moved down"]
    for name, down in ("bearing-corner", 25), ("shift", 93):
        for seed in (0, 1) if name == "bearing-corner" else (0,):
            row = {"pe": "spherical", "seed": seed, "dataset": "bearing-corner", "pool": "mean", "accuracy": 99}
            append(name, row | dict.fromkeys(places, 99) | {"all moved down": down, "command": "python"})
    usual, shifted = table("under-shifts").splitlines()[2:]
    assert usual == "| `spherical` | 0 | 99.0 |  | 99.0 | 99.0 | 99.0 | 25.0 |  | 1 |"
    assert shifted == "| `spherical` | 4 | 99.0 | +0.0 | 99.0 | 99.0 | 99.0 | 93.0 |  | 1 |"
    for seed, usual, shifted in (0, 30, 29), (1, 28, 26), (2, 29, None):
        row = {"pe": "liere", "seed": seed, "shift 4": 20, "command": "python"}
        append("cifar100-small", row | {"accuracy": usual})
        if shifted:
            append("shift", row | {"dataset": "cifar100", "accuracy": shifted, "shift 4": shifted})
    usual, shifted = table("cifar100-under-shifts").splitlines()[2:]
    assert usual == "| `liere` | 0 | 29.0 ± 1.0 |  | 20.0 ± 0.0 |  | 2 |"
    assert shifted == "| `liere` | 4 | 27.5 ± 1.5 | -1.5 ± 0.5 | 27.5 ± 1.5 |  | 2 |"


def test_frequencies_and_peers_have_a_row_for_what_was_measured():
    flags = {"pe": "axial", "pe-options": "theta=10", "pos-scale": 1, "accuracy": 99, "command": "python"}
    places = {"region upper left": 90, "region lower right": 50, "region everywhere": 60}
    for options in {}, {"pe-options": "theta=1", "pos-scale": 0.875, "left for right lower left": 9}:
        append("bearing-frequencies", flags | places | options)
    single, several = table("frequencies").splitlines()[2:]
    assert single == "| `axial` | 0.875 (8) | 90.0 | 50.0 | 60.0 | 9.0 |  | 1 |"
    assert several == "| `axial` | 0.38 to 1 | 90.0 | 50.0 | 60.0 | - |  | 1 |"
    rows = [{"what": what, "pe": "axial", "base": "timm", "ratio": x} for what, x in (("forward", 0.5), ("both", 2))]
    write_json(Path("peers-cpu.json"), {"rows": rows})
    assert table("peers").splitlines()[0] == "| `--pe` | beside | forward | both |"
    assert table("peers").splitlines()[2:] == ["| `axial` | timm | 0.50 | 2.00 |"]


def test_costs_are_those_of_the_benchmarks_file():
    step = {"what": "training step", "pe": "axial", "ratio": 1.0834, "low": 1.0, "high": 1.25}
    memory = [
        {"what": "encoding, memory", "pe": pe, "ratio": x, "low": None} for pe, x in (("axial", 2.25), ("liere", 450.4))
    ]
    tokens = {"part": "tokens", "what": "encoding, forward and backward", "pe": "axial"}
    rows = [step, *memory, *(tokens | {"tokens": n, "ratio": n} for n in (64, 1024))]
    write_json(Path("benchmark-cpu.json"), {"rows": rows})
    assert cells("cost") == (["on a CPU"], {"axial": ["1.08 (1.00 to 1.25)"]})
    titles, found = cells("cost-alone")
    assert titles == ["encoding alone, of attention", "its memory, of q and k"]
    assert found == {"axial": ["1024", "2.25"], "liere": ["-", "450"]}


def test_the_report_fills_the_marks_of_a_readme_or_leaves_it_as_it_was():
    path, start, end = Path("README.md"), "# Title\n<!-- bearing -->\n", "<!-- /bearing -->\nThe end.\n"
    append("bearing", {"pe": "axial", "accuracy": 99, "command": "python"})
    path.write_text(start + "| stale |\n" + end, encoding="utf-8")
    report.report([path])
    assert path.read_text(encoding="utf-8") == start + table("bearing") + end and "| 99.0 |" in table("bearing")
    whole = start + end + "<!-- cost -->\n<!-- /cost -->\n"
    for name, text in ("", start), ("benchmark-cpu.json", whole), ("bearing.csv", whole):
        path.write_text(text, encoding="utf-8")
        if name:
            Path(name).write_bytes(b"\xff\xfe{\n garbage")
        with pytest.raises(UserError, match=f"{name} is corrupt" if name else "without <!-- /bearing --> after it"):
            report.report([path])
        assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("old, new", [("pe,", "<<<<<<< HEAD\npe,"), (",python train.py", ""), ("99", "\xff")])
def test_rows_that_cannot_be_read_are_refused(old, new):
    append("bearing", {"pe": "axial", "accuracy": 99, "command": "python train.py"})
    path = Path("bearing.csv")
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="latin-1")
    with pytest.raises(UserError, match=r"bearing\.csv is corrupt"):
        read("bearing")


@pytest.mark.parametrize("content", [None, [], {}, {"rows": []}])
def test_the_report_never_erases_a_table(content):
    pages = [Path("a.md"), Path("b.md")]
    for page, name in zip(pages, ("bearing", "cost"), strict=True):
        page.write_text(f"<!-- {name} -->\n| published |\n<!-- /{name} -->\n", encoding="utf-8")
    append("bearing", {"pe": "axial", "accuracy": 99, "command": "python"})
    if content is not None:
        Path("benchmark-cpu.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"b.md would lose its table cost|benchmark-cpu.json is corrupt"):
        report.report(pages)
    assert all(
        "| published |" in page.read_text(encoding="utf-8") for page in pages
    )  # all are made before one is written


def test_a_copy_inside_another_repository_has_no_commit(monkeypatch, tmp_path):
    copy = tmp_path / "theirs" / "copy" / "lab"
    copy.mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", tmp_path / "theirs"], check=True)
    monkeypatch.setattr("lab.environment.ROOT", copy.parent)
    assert environment("cpu")["commit"] is None


@pytest.fixture
def started(monkeypatch):
    """The scripts that lab.gpu_first starts, with their arguments read as they do it. None of them runs."""

    def call(script, deadline):
        name, flags = (script[1], script[2:]) if script[0] == "-m" else ("train", script[1:])
        if name in ("train", "lab.benchmark"):
            {"train": train, "lab.benchmark": benchmark}[name].parse_args(flags)
        started.append((name, *map(str, flags)))
        if outcome := failing.get(name, failing.get(str(flags[0]))):
            raise outcome

    started, failing = [], {}
    log = [{"seconds": 20, "test_accuracy": 3}, {"seconds": 30, "test_accuracy": 6.5}]
    monkeypatch.setattr(gpu_first, "call", call)
    monkeypatch.setattr(gpu_first, "read_checkpoint", lambda out: {"log": log})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "Popen", lambda script: Mock(poll=lambda: 0))
    return started, failing


def test_what_fails_first_on_a_gpu_is_reported_and_the_rest_still_runs(capsys, started):
    started, failing = started
    failing |= {"pytest": Failed("pytest failed", 1), "--pe=liere": Failed("train.py failed", 1)}
    assert gpu_first.main([]) == 1
    names = [name for name, *_ in started]
    assert names == ["pytest", *["train"] * (len(ENCODINGS) + 1), "lab.benchmark", "lab.experiments"]
    shown = capsys.readouterr().out
    assert "tests: pytest failed, please report" in shown and "encodings: 1 of 11 failed, please report" in shown
    assert "\nspherical: 4915 images/s in the second epoch, 6.5 %\n" in shown and "\naccuracies: done\n" in shown


def test_the_first_steps_on_a_gpu_end_at_the_deadline(capsys, started):
    started, failing = started
    failing["--pe=axial"] = Stopped("Time is up.")
    assert gpu_first.main(["--minutes=15"]) == 0
    assert started[-1][1] == "--pe=axial" and "encodings: Time is up." in capsys.readouterr().out


def test_the_first_steps_on_a_gpu_need_one(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no GPU" in complaint(capsys, gpu_first.main)
