"""lab.evaluate shifts, shuffles and resizes as documented, and saves its results."""

import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import EQUIVARIANT, SMALL, Call, as_flags, complaint, make_imagenet, weights

import train
from lab import benchmark, evaluate, experiments, figures, imagenet, report
from lab.data import REGIONS, Bearing
from lab.evaluate import shuffled
from lab.files import read_json
from vit import ViT

TINY = as_flags(SMALL | {"depth": 1, "epochs": 1, "head-dim": 24})
pytestmark = pytest.mark.usefixtures("tiny_bearing")


def trained(pe, *flags):
    assert train.main([*TINY, f"--pe={pe}", "--out=run", *flags]) == 0


def evaluated(*flags):
    assert evaluate.main(["run", "--device=cpu", *flags]) == 0
    return read_json(Path("run/evaluation.json"))["accuracies"]


@pytest.fixture
def given(monkeypatch):
    """The model's inputs: training mode, images, and the shift of positions (T, 2) or (B, T, 2) in patches."""
    given, forward = [], ViT.forward

    def spy(model, images, pos=None):
        moves = None if pos is None else (pos - model.positions(model.grid, model.grid)) / model.spacing
        given.append((model.training, images, moves))
        return forward(model, images, pos)

    monkeypatch.setattr(ViT, "forward", spy)
    return given


@pytest.mark.parametrize("script", [evaluate, experiments, report, figures, benchmark])
def test_scripts_show_how_they_are_started(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert f"python -m {script.__name__}" in capsys.readouterr().out
    assert "--wrong" in complaint(capsys, script.main, "bearing", "--wrong")


def test_everything_is_evaluated_kept_and_shown(capsys):
    trained("spherical")
    found = evaluated()
    assert {kind: list(values) for kind, values in found.items()} == {
        "test": ["test"],
        "size": ["24", "28", "32", "40", "48", "56", "64"],
        "shift": ["1", "2", "4", "8", "16"],
        "patch shift": ["1", "2", "4", "8", "16"],
        "patches": ["shuffled"],
        "region": ["everywhere", "upper left", "upper right", "lower left", "lower right"],
        "left for right": ["lower left"],
        "all moved": ["right", "down", "down 1", "down 2"],
        "token moved": ["lower right"],
    }
    result = read_json(Path("run/result.json"))["test_accuracy"]
    assert found["test"]["test"] == found["size"]["32"] == found["region"]["everywhere"] == result
    shown = capsys.readouterr().out
    assert "spherical on bearing, seed 0, epoch 1 of 1" in shown
    assert f"shuffled: {found['patches']['shuffled']:.1f}" in shown


def test_a_flag_asks_for_one_thing_and_adds_it_to_what_is_known():
    trained("axial")
    assert evaluated("--sizes", "24", "64").keys() == {"test", "size"}
    found = evaluated("--shift", "0.5", "--shuffle")
    assert found.keys() == {"test", "size", "shift", "patches"}
    assert found["size"].keys() == {"24", "64"} and found["shift"].keys() == {"0.5"}
    assert evaluated("--sizes", "32")["size"].keys() == {"24", "64", "32"}


@pytest.mark.parametrize("pe, pool", [("none", "cls"), ("ape", "cls"), ("spherical", "mean")])
def test_what_does_not_apply_is_left_out(pe, pool):
    trained(pe, f"--pool={pool}")
    found = evaluated()
    assert found.keys().isdisjoint(["patch shift", "token moved"])
    assert ("shift" in found) == ("all moved" in found) == (pe == "spherical")
    Path("run/evaluation.json").unlink()
    assert evaluated("--patch-shift").keys() == {"test"}


def test_shifts_move_all_positions_alike_and_patch_shifts_all_but_the_class_tokens(given, monkeypatch):
    def moves(flag, seed=0):
        trained("axial", "--patch-size=8", f"--seed={seed}")
        given.clear()
        evaluated(flag, "3")
        shutil.rmtree("run")
        return torch.cat([moved for *_, moved in given if moved is not None])  # (images, T, 2)

    assert not set(moves("--shift")[:, 0, 0].tolist()) & set(moves("--shift", seed=1)[:, 0, 0].tolist())
    monkeypatch.setattr(Bearing, "test_size", 2000)
    all_, others = moves("--shift"), moves("--patch-shift")
    atol = 32 * torch.finfo(all_.dtype).eps  # positions and moves are below 32 patches, and rounded twice
    torch.testing.assert_close(all_, all_[:, :1].expand_as(all_), rtol=0, atol=atol)
    assert len(all_[:, 0].unique(dim=0)) == 400
    assert abs(all_[:, 0].std() - 3) < 0.3 and abs(all_[:, 0].mean()) < 0.43  # four standard errors
    assert not others[:, 0].any()
    torch.testing.assert_close(others[:, 1:], all_[:, 1:], rtol=0, atol=atol)  # the same draws


@pytest.mark.parametrize("pe", ["mixed", "spherical"])
def test_equivariant_encodings_ignore_a_shift_unless_the_class_token_stays(pe, float64, monkeypatch):
    trained(pe)
    monkeypatch.setattr(Bearing, "test_size", 200)
    saved = weights("run")
    for name, weight in saved["model"].items():  # so large that each image gets its own answer
        if name.endswith("weight") and weight.dim() > 1:
            weight.normal_(std=0.5)
    torch.save(saved, "run/last.pt")
    found = evaluated("--shift", "4", "16", "--patch-shift", "4", "16")
    assert (set(found["shift"].values()) == set(found["test"].values())) == (pe in EQUIVARIANT)
    assert set(found["patch shift"].values()) != set(found["test"].values())


def test_a_shuffle_moves_whole_patches_each_image_in_its_own_way():
    images = torch.arange(5 * 3 * 12 * 8.0).view(5, 3, 12, 8)
    before, after = (F.unfold(x, 4, stride=4) for x in (images, shuffled(images, 4)))  # (5, 48, 6)
    order = (after[:, 0, :, None] == before[:, 0, None, :]).int().argmax(dim=-1)  # by a patch's first pixel
    assert torch.equal(order.sort().values, torch.arange(6).expand(5, 6))
    assert torch.equal(after, before.gather(2, order[:, None].expand_as(after)))
    assert len(order.unique(dim=0)) > 1


def test_errors_get_one_line(capsys, monkeypatch):
    trained("axial", "--patch-size=8")
    assert "multiples of patch_size = 8" in complaint(capsys, evaluate.main, "run", "--sizes", "36")
    shutil.rmtree("run")
    trained("axial")
    assert "RUN" in complaint(capsys, evaluate.main)
    assert "there is no nowhere/last.pt" in complaint(capsys, evaluate.main, "nowhere")
    assert "cells of 4 pixels" in complaint(capsys, evaluate.main, "run", "--sizes", "30")
    assert "out of memory: try a smaller" in complaint(capsys, evaluate.main, "run", "--sizes", "40000000")
    torch.save({"vit": Call(os.mkdir, "harm")}, "run/last.pt")
    assert "run/last.pt is not a checkpoint of train.py" in complaint(capsys, evaluate.main, "run")
    assert not Path("harm").exists()
    monkeypatch.setattr(evaluate, "WORLD_SIZE", 2)
    assert "start it with python, not with torchrun" in complaint(capsys, evaluate.main, "run")


@pytest.mark.parametrize("name", ["evaluation", "result"])
def test_results_that_are_broken_or_of_another_run_are_refused(name, capsys):
    trained("axial", "--seed=1")
    evaluated("--shuffle")
    other = Path(f"run/{name}.json").read_text(encoding="utf-8")
    shutil.rmtree("run")
    trained("axial")
    scripts = [(figures, ["run", "--out=pictures"])]
    if name == "evaluation":
        scripts.append((evaluate, ["run", "--shuffle"]))
    else:
        scripts.append((train, [*TINY, "--pe=axial", "--out=run", "--resume"]))
    for content, says in (other, "belongs to another run (seed 1)"), ("[1", "is corrupt"), ("[1]", "is corrupt"):
        Path(f"run/{name}.json").write_text(content, encoding="utf-8")
        for script, flags in scripts:
            assert f"run/{name}.json {says}" in complaint(capsys, script.main, *flags)


def test_every_script_refuses_a_checkpoint_that_lacks_a_part(capsys):
    trained("axial")
    saved = weights("run")
    for part in "config", "model", "vit", "data", "log":
        torch.save({name: x for name, x in saved.items() if name != part}, "run/last.pt")
        for script in evaluate, figures, train:
            flags = [*TINY, "--pe=axial", "--out=run", "--resume"] if script is train else ["run"]
            assert f"run/last.pt is not a checkpoint of train.py ('{part}')" in complaint(capsys, script.main, *flags)


def test_runs_of_an_older_version_are_evaluated_or_say_what_has_changed(capsys):
    trained("axial")
    saved = weights("run")
    del saved["config"]["shift"]
    torch.save(saved, "run/last.pt")
    assert evaluated("--sizes", "24") and figures.sizes(figures.read_runs([Path("run")]))
    of_data, of_model = "does not fit its data set, which has changed", "does not fit the model, which has changed"
    for part, name, says in ("data", "renamed", of_data), ("config", "dataset", of_data), ("vit", "renamed", of_model):
        torch.save(saved | {part: saved[part] | {name: "x"}}, "run/last.pt")
        Path("run/evaluation.json").unlink(missing_ok=True)
        assert says in complaint(capsys, evaluate.main, "run")


def test_each_evaluation_is_of_the_images_that_it_names(given):
    trained("axial")
    given.clear()
    evaluated("--sizes", "24", "--shuffle", "--regions")
    data = Bearing(batch_size=1)
    regions = [{"region": region} for region in (*REGIONS, "lower left")]
    which = [{}, {"img_size": 24}, {}, *regions, {}, {}, {}, {}, {"region": "lower right"}]
    want = [data.normalise(data.test_set(**w)[0]) for w in which]
    torch.manual_seed(0)
    want[2] = shuffled(want[2], 4)
    assert all(torch.equal(a, b) for a, b in zip((images for _, images, _ in given), want, strict=True))
    *others, right, down, down_1, down_2, token_moved = (moves for _, _, moves in given)
    assert others == [None] * len(others)
    for moves, offset in (right, (4.0, 0.0)), (down, (0.0, 4.0)), (down_1, (0.0, 1.0)), (down_2, (0.0, 2.0)):
        torch.testing.assert_close(moves, torch.tensor(offset).expand(65, 2))
    torch.testing.assert_close(token_moved, torch.tensor([[4.0, 4.0], *[[0.0, 0.0]] * 64]))


def test_answers_that_take_left_for_right_are_counted(monkeypatch):
    """A model that sees the lower left quarter in a mirror."""
    exchange = {"left": "right", "right": "left"}
    mirrored = [" ".join(exchange.get(word, word) for word in name.split()) for name in Bearing.class_names]
    _, labels = Bearing(batch_size=1).test_set(region="lower left")
    answers = torch.tensor([Bearing.class_names.index(mirrored[label]) for label in labels])
    trained("none")
    monkeypatch.setattr(ViT, "forward", lambda model, images, pos=None: F.one_hot(answers, 8))
    assert evaluated("--regions")["left for right"] == {"lower left": 100}


def test_an_evaluation_may_use_fewer_workers_than_the_run(capsys, monkeypatch):
    make_imagenet("in")
    trained("none", "--dataset=imagenet", "--data-dir=in", "--workers=1", "--img-size=32", "--patch-size=16")
    monkeypatch.setattr(imagenet.shutil, "disk_usage", lambda path: Mock(free=0))
    assert "use fewer --workers" in complaint(capsys, evaluate.main, "run", "--data-dir=in")
    assert evaluated("--data-dir=in", "--shuffle", "--workers=0")
