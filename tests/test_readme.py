"""The README and its two other pages: examples and commands run; flags, tests, files and results exist."""

import importlib
import json
import re
import shlex
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, SMALL, as_flags

import train
from lab import benchmark, evaluate, experiments, explore, figures, gpu_first, pretrained, report
from vit import ENCODINGS

PAGES = {
    ROOT / name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "lab/README.md", "lab/results/README.md")
}
TEXT = re.sub("```diff.*?```", "", "".join(PAGES.values()), flags=re.DOTALL)  # tests/test_changes.py tries those
COMMANDS = re.findall(r"(?:python|torchrun \S+) (train\.py|-m lab\.\w+)(?!.* (?:DIR|--help|golden))([^`\n]*)", TEXT)
EXAMPLE, TUTORIAL = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
MEASURED = {*experiments.RESULTS.glob("*.csv"), *experiments.RESULTS.glob("*.json")}
MEASURED = sorted(MEASURED - {experiments.RESULTS / "published.csv"})


def test_the_example_turns_q_and_k():
    exec(EXAMPLE, names := {})
    assert names["q"].shape == names["k"].shape == (8, 6, 196, 64)
    rope, q = names["rope"], torch.randn(8, 6, 196, 64)
    turned = rope.rotation(names["pos"]) @ q[..., None]
    torch.testing.assert_close(rope.rotate(q, names["pos"]), turned[..., 0])


def test_the_tutorials_encoding_is_what_it_says_and_trains(monkeypatch, tiny_bearing, float64):
    Path("rope_golden.py").write_text(TUTORIAL, encoding="utf-8")
    monkeypatch.syspath_prepend(".")
    golden = importlib.import_module("rope_golden")
    monkeypatch.setitem(ENCODINGS, "golden", golden.GoldenRoPE)
    rope, (p, q) = golden.GoldenRoPE(head_dim=9, num_heads=2), torch.randn(2, 50, 2)
    torch.testing.assert_close(rope.rotation(p).mT @ rope.rotation(q), rope.rotation(q - p), rtol=0, atol=1e-12)
    x, pos = torch.randn(3, 4, 50, 9), torch.randn(3, 50, 2)
    turned = torch.einsum("bhtij,bhtj->bhti", rope.rotation(pos).repeat_interleave(2, dim=1), x)
    torch.testing.assert_close(rope.rotate(x, pos), turned, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="pos"):
        rope.rotate(x, pos[:, :1])
    assert train.main(["--pe=golden", *as_flags(SMALL), "--out=run"]) == 0


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_every_command_is_accepted(monkeypatch, script, flags):
    for module, name in (experiments, "run_set"), (report, "report"), (figures, "read_runs"):
        monkeypatch.setattr(module, name, Mock(return_value=[]))  # these scripts parse flags in main
    monkeypatch.setattr(train, "adopt_flags", Mock())  # those of a run that a reader has made
    monkeypatch.setattr(figures, "OF_ENCODINGS", {})
    monkeypatch.setattr(gpu_first, "torch", Mock())  # has a GPU
    monkeypatch.setattr(gpu_first, "STEPS", [])
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(script.removeprefix("-m ").removesuffix(".py"))
    assert getattr(module, "parse_args", module.main)(shlex.split(flags, comments=True)) != 2


def test_every_flag_exists(capsys):
    for script in train, evaluate, experiments, explore, report, figures, benchmark, pretrained, gpu_first:
        with pytest.raises(SystemExit):
            script.main(["--help"])
    flags = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z][a-z-]+", re.sub("--nproc_per_node|--shm-size", "", TEXT))) <= flags


def test_every_test_and_every_file_exists():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert set(re.findall(r"`(test_\w+)`", TEXT)) <= set(re.findall(r"def (test_\w+)\(", tests))
    for page, text in PAGES.items():
        links = re.findall(r"\]\(((?!https?:|#)[^)#]+)", text)
        assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_tables_show_the_results(tmp_path):
    for page, text in PAGES.items():
        (tmp_path / "page.md").write_text(text, encoding="utf-8")
        report.report([tmp_path / "page.md"])
        assert (tmp_path / "page.md").read_text(encoding="utf-8") == text, f"{page}: run python -m lab.report"


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.name)
def test_every_result_has_a_command_and_a_commit(path):
    rows = experiments.read(path.stem) if path.suffix == ".csv" else [json.loads(path.read_text(encoding="utf-8"))]
    for row in rows:
        assert re.fullmatch("[0-9a-f]{40}", row["commit"]) and row["torch"] and row["device"] and row["command"]
        if path.suffix == ".csv":
            args = train.parse_args(shlex.split(row["command"])[2:])
            assert (args.pe, str(args.seed), str(args.epochs)) == (row["pe"], row["seed"], row["epochs"])
            assert any(experiments.matches(row, flags) for flags in experiments.SETS[path.stem][0])
