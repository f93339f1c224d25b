"""The README's promises that can be run."""

import re
from pathlib import Path

import pytest
import torch

import benchmark
import evaluate
import experiments
import train
from vit import ENCODINGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_turns_what_it_says():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(example, names)
    assert names["out"].shape == (8, 12, 197, 64) and names["R"].shape == (1, 197, 64, 64)
    assert torch.equal(names["R"][0, 0], torch.eye(64))


@pytest.mark.parametrize("script", [train, evaluate, benchmark], ids=lambda script: script.__name__)
def test_every_command_is_one_that_the_script_takes(script):
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    commands = re.findall(rf"(?:python|torchrun --nproc_per_node=8) {script.__name__}\.py(.*)", blocks)
    assert commands
    for command in commands:
        script.parse_args(command.split())


def test_every_flag_that_it_names_is_one_of_the_scripts(capsys):
    for script in train, evaluate, experiments, benchmark:
        with pytest.raises(SystemExit):
            script.main(["--help"])
    flags = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z][a-z-]+", README.replace("--nproc_per_node", ""))) <= flags


def test_every_test_that_it_names_exists():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", README)
    assert len(names) > 5
    for name in names:
        assert f"def {name}(" in tests


def test_every_picture_that_it_shows_exists():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert len(pictures) == len(set(pictures)) > 4
    for picture in pictures:
        assert (ROOT / picture).read_bytes()[:4] == b"\x89PNG"


def test_every_encoding_is_in_the_table():
    for name in ENCODINGS:
        assert f"`{name}`" in README
