"""The README: its example and commands run, and the flags, tests, files and results that it names exist."""

import importlib
import json
import re
import shlex
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT

import train
from lab import benchmark, evaluate, experiments, figures

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"(?:python|torchrun \S+) (train\.py|-m lab\.\w+)(?!.* (?:DIR|--help))([^`\n]*)", README)
RESULTS = [*experiments.RESULTS.glob("*.csv"), *experiments.RESULTS.glob("*.json")]


def test_the_example_turns_q_and_k():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(example, names := {})
    assert names["out"].shape == (8, 12, 197, 64) and names["R"].shape == (12, 197, 64, 64)
    assert torch.equal(names["R"][0, 0], torch.eye(64))


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_every_command_is_accepted(monkeypatch, script, flags):
    for module, name in (experiments, "run_set"), (experiments, "report"), (figures, "read_runs"):
        monkeypatch.setattr(module, name, Mock(return_value=[]))  # these scripts parse flags in main
    monkeypatch.setattr(figures, "OF_ENCODINGS", {})
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(script.removeprefix("-m ").removesuffix(".py"))
    assert getattr(module, "parse_args", module.main)(shlex.split(flags, comments=True)) != 2


def test_every_flag_exists(capsys):
    for script in train, evaluate, experiments, figures, benchmark:
        with pytest.raises(SystemExit):
            script.main(["--help"])
    flags = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z][a-z-]+", README.replace("--nproc_per_node", ""))) <= flags


def test_every_test_and_every_file_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert set(re.findall(r"`(test_\w+)`", README)) <= set(re.findall(r"def (test_\w+)\(", tests))
    assert [link for link in re.findall(r"\]\(((?!https?:|#)[^)#]+)", README) if not (ROOT / link).exists()] == []


def test_the_tables_show_the_results(tmp_path):
    (tmp_path / "README.md").write_text(README)
    experiments.report(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == README, "run: python -m lab.experiments --report"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_every_result_has_a_command_and_a_commit(path):
    rows = experiments.read(path.stem) if path.suffix == ".csv" else [json.loads(path.read_text())]
    for row in rows:
        assert re.fullmatch("[0-9a-f]{40}", row["commit"]) and row["torch"] and row["device"] and row["command"]
        if path.suffix == ".csv":
            args = train.parse_args(shlex.split(row["command"])[2:])
            assert (args.pe, str(args.seed), str(args.epochs)) == (row["pe"], row["seed"], row["epochs"])
            assert any(experiments.matches(row, flags) for flags in experiments.SETS[path.stem][0])
