"""The experiments: what is run and what is skipped, what a row says, and that the README shows what results/ holds."""

import csv
import json
import math
import re
import shlex
import subprocess
import time
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import pytest
from test_train import as_flags, complaint

import benchmark
import evaluate
import experiments
import train
from data import Bearing
from experiments import SETS, TABLES, Stopped, measured, priced, read, run_set, seeds, table
from vit import ENCODINGS

ROOT = Path(__file__).parents[1]
SMALL = {"dataset": "bearing", "depth": 1, "heads": 1, "head-dim": 8, "batch-size": 32, "epochs": 1}


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Runs scripts in this process, on a tiny task and a set "tiny" of two runs; a list of what was called."""
    monkeypatch.setattr(Bearing, "train_size", 64)
    monkeypatch.setattr(Bearing, "test_size", 50)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    runs = [{"pe": pe, "seed": 1} | SMALL for pe in ("ape", "axial")]
    monkeypatch.setitem(SETS, "tiny", (runs, "--shift 4 --shuffle"))
    monkeypatch.chdir(tmp_path)
    calls = []

    def call(script, deadline):
        calls.append(script)
        assert {"train.py": train, "evaluate.py": evaluate}[script[0]].main(script[1:]) == 0

    monkeypatch.setattr(experiments, "call", call)
    return calls


def test_a_run_becomes_a_row_and_is_not_run_again(calls, tmp_path):
    run_set("tiny", math.inf)
    assert [script[0] for script in calls] == ["train.py", "evaluate.py"] * 2
    with open(tmp_path / "results" / "tiny.csv", newline="") as f:
        ape, axial = rows = list(csv.DictReader(f))
    assert rows == read("tiny")
    assert {"pe": "axial", "seed": "1", "epochs": "1", "dataset": "bearing"}.items() <= axial.items()
    assert axial["shift 4"] == axial["accuracy"] and ape["shift 4"] == "" and ape["patches shuffled"]
    assert float(axial["seconds"]) > 0 and float(axial["images_per_second"]) > 0 and axial["torch"] and axial["device"]
    assert len(re.match("[0-9a-f]{40}", axial["commit"])[0]) == 40
    repeated = train.parse_args(shlex.split(axial["command"])[2:])
    assert (repeated.pe, repeated.seed, repeated.head_dim) == ("axial", 1, 8)
    calls.clear()
    run_set("tiny", math.inf)
    assert not calls


def test_a_run_that_is_trained_but_has_no_row_is_only_evaluated(calls, tmp_path):
    run_set("tiny", math.inf)
    before, trained = read("tiny"), {path: path.read_bytes() for path in Path("runs").rglob("last.pt")}
    (tmp_path / "results" / "tiny.csv").unlink()
    calls.clear()
    run_set("tiny", math.inf)
    assert read("tiny") == before and len(trained) == 2
    assert all("--resume" in script for script in calls if script[0] == "train.py")
    assert {path: path.read_bytes() for path in Path("runs").rglob("last.pt")} == trained


def test_no_run_is_begun_that_would_not_end_in_time(calls, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    inner = experiments.call

    def slow(script, deadline):
        now[0] += 10 * (script[0] == "train.py")
        inner(script, deadline)

    monkeypatch.setattr(experiments, "call", slow)
    with pytest.raises(Stopped, match="no time for another") as stopped:
        run_set("tiny", 15)
    assert stopped.value.code == 0 and [row["pe"] for row in read("tiny")] == ["ape"]
    run_set("tiny", 25)
    assert [row["pe"] for row in read("tiny")] == ["ape", "axial"]


def test_at_the_deadline_a_run_is_saved_and_goes_on_later(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Process(subprocess.Popen):
        """Its deadline comes after the first epoch."""

        def wait(self, timeout=None):
            while timeout is not None and self.poll() is None:
                time.sleep(0.05)
                if Path("run/log.csv").exists():
                    raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait()

    monkeypatch.setattr(subprocess, "Popen", Process)
    command = ["train.py", *as_flags(SMALL | {"epochs": 1000}), "--out=run"]
    with pytest.raises(Stopped, match="time is over") as stopped:
        experiments.call(command, time.monotonic() + 60)
    assert stopped.value.code == 0 and Path("run/last.pt").exists() and not Path("run/result.json").exists()
    with pytest.raises(Stopped, match=r"train\.py .* failed") as stopped:  # a run that fails ends all
        experiments.call(command, math.inf)
    assert stopped.value.code == 2


def test_tables_show_mean_spread_and_number_of_seeds(calls, monkeypatch):
    for seed, accuracy in enumerate((70, 71, 73)):
        row = {"pe": "axial", "seed": seed, "epochs": 50, "accuracy": accuracy, "shift 1": 60, "command": "python"}
        experiments.append("tiny", row)
    experiments.append("tiny", row | {"seed": 0, "epochs": 400, "accuracy": 80})
    experiments.append("tiny", {"pe": "ape", "seed": 0, "epochs": 50, "accuracy": 50, "command": "python"})
    assert measured("tiny", epochs=50)("axial") == "71.3 ± 1.5"  # variance (16 + 1 + 25) / 9 / 2
    assert measured("tiny", epochs=400)("axial") == "80.0"
    assert measured("tiny", epochs=400)("ape") == measured("tiny")("liere") == "*not measured*"
    assert measured("tiny", "shift 1")("ape") == "-"
    assert seeds("tiny", epochs=50)("axial") == "3"
    monkeypatch.setitem(TABLES, "tiny", [("short", measured("tiny", epochs=50))])
    assert "| `axial` | 71.3 ± 1.5 |\n" in table("tiny") and table("tiny").count("\n") == 2 + len(ENCODINGS)


def test_prices_come_from_the_benchmarks_file(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    assert priced("cpu", "step")("axial") == "*not measured*"
    rows = [
        {"what": "step", "pe": "axial", "ratio": 1.0834, "low": 1.0, "high": 1.25},
        {"what": "memory", "pe": "axial", "tokens": 64, "ratio": 0.5},
        {"what": "memory", "pe": "axial", "tokens": 4096, "ratio": 2.25},
    ]
    (tmp_path / "benchmark-cpu.json").write_text(json.dumps({"rows": rows}))
    assert priced("cpu", "step")("axial") == "1.08 (1.00 to 1.25)"
    assert priced("cpu", "memory", tokens=4096)("axial") == "2.25"
    assert priced("cpu", "step")("none") == "-" and priced("cuda", "step")("axial") == "*not measured*"


def test_every_set_asks_for_what_the_scripts_take(capsys):
    for runs, evaluation in SETS.values():
        for flags in runs:
            args = train.parse_args(experiments.as_flags(flags))
            assert args.pe == flags["pe"] and args.seed == flags["seed"]
        evaluate.parse_args(["run", *evaluation.split()])
    for flags in ["no such set"], [], ["table2", "--minutes", "0"]:
        complaint(capsys, experiments.main, *flags)


def test_figure_3_is_of_the_runs_of_table_2(monkeypatch):
    names = []
    monkeypatch.setattr(experiments, "run_set", lambda name, deadline: names.append(name))
    assert experiments.main(["figure3", "table7"]) == 0 and names == ["table2", "table7"]


def test_time_that_is_over_does_not_keep_the_report_from_being_written(calls, monkeypatch):
    monkeypatch.setattr(experiments, "report", report := Mock())
    monkeypatch.setattr(experiments, "run_set", Mock(side_effect=Stopped("Stopped.", 130)))
    assert experiments.main(["tiny", "--report"]) == 130 and report.called


def test_damaged_results_and_a_readme_without_marks_are_told(capsys, monkeypatch, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in TABLES))
    experiments.report(path)
    whole = path.read_text()
    monkeypatch.setattr(experiments, "report", Mock(side_effect=ValueError("Oh")))
    assert complaint(capsys, experiments.main, "--report") == "error: Oh\n"
    monkeypatch.undo()
    path.write_text(whole.replace("<!-- /bearing -->", ""))
    with pytest.raises(ValueError, match="has no <!-- bearing --> with <!-- /bearing --> behind it"):
        experiments.report(path)
    assert path.read_text() == whole.replace("<!-- /bearing -->", "")
    path.write_text(whole)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    for name in "bearing.csv", "benchmark-cpu.json":
        damaged = tmp_path / "results" / name
        damaged.write_bytes(b"\xff\xfe{\n garbage")
        with pytest.raises(ValueError, match=f"{damaged} is damaged"):
            experiments.report(path)
        damaged.unlink()


@pytest.mark.parametrize("name", TABLES)
def test_the_readme_shows_what_results_hold(name):
    text = (ROOT / "README.md").read_text()
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    assert text.count(start) == text.count(end) == 1
    assert text.partition(start)[2].partition(end)[0] == table(name), "run: python experiments.py --report"


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.csv")), ids=lambda path: path.stem)
def test_every_result_is_a_run_of_its_set_from_a_commit(path):
    runs = SETS[path.stem][0]
    for row in read(path.stem):
        assert sum(experiments.matches(row, flags) for flags in runs) >= 1
        assert re.fullmatch("[0-9a-f]{40}(, then [0-9a-f]{40})*", row["commit"])
        flags = train.parse_args(shlex.split(row["command"])[2:])
        assert flags.pe == row["pe"] and str(flags.seed) == row["seed"] and str(flags.epochs) == row["epochs"]


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("benchmark-*.json")), ids=lambda path: path.stem)
def test_every_price_was_measured_by_a_command_at_a_commit(path):
    found = json.loads(path.read_text())
    assert re.fullmatch("[0-9a-f]{40}", found["commit"]) and found["torch"] and found["device"]
    script, *flags = shlex.split(found["command"])[1:]
    assert script == "benchmark.py" and benchmark.parse_args(flags).parts
    assert {row["pe"] for row in found["rows"] if row["part"] == "step"} == set(ENCODINGS)


def test_every_column_shows_what_its_title_says(monkeypatch):
    sizes = (24, 28, 32, 40, 48, 56, 64)
    run = {"pe": "axial", "epochs": 50}
    short = run | {"accuracy": 50} | {f"size {px}": px for px in sizes}
    long = short | {"epochs": 400, "accuracy": 400} | {f"size {px}": 0 for px in sizes}
    table7 = [run | {"fraction": part, "accuracy": 100 * part} for part in (0.2, 0.4, 0.6, 0.8)]
    rows = {"table2": 3 * [short] + 2 * [long], "table7": table7}
    monkeypatch.setattr(experiments, "read", lambda name: [{k: str(v) for k, v in row.items()} for row in rows[name]])
    shown = {name: [cell("axial") for _, cell in TABLES[name]] for name in ("table2", "figure3", "table7")}
    assert shown["table2"][1:] == ["400.0 ± 0.0", "2", "50.0 ± 0.0", "3"]
    assert shown["figure3"] == [*(f"{px}.0 ± 0.0" for px in sizes), "3"]
    assert shown["table7"][1:] == ["20.0", "40.0", "60.0", "80.0", "1"]


def test_sets_hold_the_runs_and_evaluations_that_the_tables_show():
    (table2, evaluations), (table7, _) = SETS["table2"], SETS["table7"]
    assert {(run["pe"], run["seed"], run["epochs"]) for run in table2} == {*product(ENCODINGS, range(3), (50, 400))}
    assert {(run["pe"], run["fraction"]) for run in table7} == {*product(ENCODINGS, (0.2, 0.4, 0.6, 0.8))}
    assert evaluate.parse_args(["run", *evaluations.split()]).sizes == []
    for name in "bearing", "cifar100-small":
        args = evaluate.parse_args(["run", *SETS[name][1].split()])
        assert (args.shift, args.patch_shift, args.shuffle) == ([4, 16], [1, 4], True)
        shown = {title for title, _ in TABLES[name] if title.endswith(" px")}
        assert shown and shown <= {f"{size} px" for size in args.sizes}
    assert {(run["pe"], run["seed"]) for run in SETS["cifar100-small"][0]} == {*product(ENCODINGS, range(3))}


def test_minutes_are_of_60_seconds(monkeypatch):
    deadlines = []
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)
    monkeypatch.setattr(experiments, "run_set", lambda name, deadline: deadlines.append(deadline))
    assert experiments.main(["table2", "--minutes", "25"]) == 0 and deadlines == [1507]
