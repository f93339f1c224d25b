"""What evaluate.py says of a model: that it moves, mixes and resizes what it says, and files what it finds."""

import json
from pathlib import Path

import pytest
import torch
from test_train import SMALL, as_flags, complaint, make_imagenet, weights

import evaluate
import train
from data import REGIONS, Bearing
from evaluate import shuffled
from vit import ViT

TINY = as_flags(SMALL | {"depth": 1, "epochs": 1})


@pytest.fixture(autouse=True)
def tiny_bearing(monkeypatch, tmp_path):
    monkeypatch.setattr(Bearing, "train_size", 64)
    monkeypatch.setattr(Bearing, "test_size", 120)
    monkeypatch.chdir(tmp_path)


def trained(pe, *flags):
    assert train.main([*TINY, f"--pe={pe}", f"--out={pe}", *flags]) == 0
    return pe


def evaluated(run, *flags):
    assert evaluate.main([run, "--device=cpu", *flags]) == 0
    return json.loads(Path(run, "evaluation.json").read_text())


def test_everything_is_evaluated_filed_and_shown(capsys):
    found = evaluated(trained("spherical"))
    assert {kind: list(values) for kind, values in found.items()} == {
        "test": ["test"],
        "size": ["24", "28", "32", "40", "48", "56", "64"],
        "shift": ["1", "2", "4", "8", "16"],
        "patch shift": ["1", "2", "4", "8", "16"],
        "patches": ["shuffled"],
        "region": ["everywhere", "upper left", "lower right"],
    }
    result = json.loads(Path("spherical/result.json").read_text())
    for values in found["test"]["test"], found["size"]["32"], found["region"]["everywhere"]:
        assert values == result["test_accuracy"]
    out = capsys.readouterr().out
    assert (
        "spherical on bearing, seed 0, epoch 1 of 1" in out and f"shuffled: {found['patches']['shuffled']:.1f}" in out
    )


def test_a_flag_asks_for_one_thing_and_adds_it_to_what_is_known():
    run = trained("axial")
    assert evaluated(run, "--sizes", "24", "64").keys() == {"test", "size"}
    found = evaluated(run, "--shift", "0.5", "--shuffle")
    assert found.keys() == {"test", "size", "shift", "patches"}
    assert found["size"].keys() == {"24", "64"} and found["shift"].keys() == {"0.5"}
    assert evaluated(run, "--sizes", "32")["size"].keys() == {"24", "64", "32"}
    assert evaluated(run, "--shift") == evaluated(run, "--shift")


@pytest.mark.parametrize("pe, pool", [("none", "cls"), ("ape", "cls"), ("spherical", "mean")])
def test_what_does_not_apply_is_left_out(pe, pool):
    found = evaluated(trained(pe, f"--pool={pool}"))
    assert "patch shift" not in found and ("shift" in found) == (pe == "spherical")
    Path(pe, "evaluation.json").unlink()
    assert evaluated(pe, "--patch-shift").keys() == {"test"}


def positions_seen(run, monkeypatch, *flags):
    """All pos (T, 2) that the model is told for its evaluation, and its own."""
    seen, forward = [], ViT.forward

    def spy(model, images, pos=None):
        if pos is not None:
            assert len(images) <= 50
            seen.append(pos - model.positions(8, 8))
        return forward(model, images, pos)

    with monkeypatch.context() as patch:
        patch.setattr(ViT, "forward", spy)
        evaluated(run, *flags)
    return torch.stack(seen)


def test_shifts_move_all_positions_alike_and_patch_shifts_all_but_the_class_tokens(monkeypatch):
    run = trained("axial")
    monkeypatch.setattr(Bearing, "test_size", 5000)
    patch = 2 * torch.pi / 7
    moves = positions_seen(run, monkeypatch, "--shift", "3") / patch  # (100 batches, 65, 2)
    torch.testing.assert_close(moves, moves[:, :1].expand_as(moves), atol=1e-4, rtol=0)
    assert abs(moves[:, 0].std() - 3) < 0.6 and abs(moves[:, 0].mean()) < 0.9
    assert len(moves[:, 0].unique()) == 200  # for x and for y
    others = positions_seen(run, monkeypatch, "--patch-shift", "3") / patch
    assert not others[:, 0].any()
    torch.testing.assert_close(others[:, 1:], moves[:, 1:], atol=1e-4, rtol=0)  # the same draws


@pytest.mark.parametrize("pe, indifferent", [("axial", True), ("comrope-ld", True), ("spherical", False)])
def test_a_shift_is_nothing_to_an_equivariant_encoding_unless_the_class_token_stays(pe, indifferent):
    path = Path(trained(pe), "last.pt")
    saved = torch.load(path, weights_only=True)
    torch.manual_seed(0)
    for name, weight in saved["model"].items():  # far from its beginning, so that each image gets its own answer
        if name.endswith("weight") and weight.dim() > 1:
            weight.normal_(std=0.5)
    torch.save(saved, path)
    found = evaluated(pe)
    assert (set(found["shift"].values()) == {found["test"]["test"]}) == indifferent
    assert set(found["patch shift"].values()) != {found["test"]["test"]}


def test_a_shuffle_moves_whole_patches_each_image_in_its_own_way():
    images = torch.arange(5 * 3 * 12 * 8.0).view(5, 3, 12, 8)
    mixed = shuffled(images, 4)
    assert mixed.shape == images.shape
    orders = set()
    for before, after in zip(images, mixed, strict=True):
        patches = [
            [image[:, y : y + 4, x : x + 4].numpy().tobytes() for y in (0, 4, 8) for x in (0, 4)]
            for image in (before, after)
        ]
        assert sorted(patches[0]) == sorted(patches[1])
        orders.add(tuple(patches[0].index(patch) for patch in patches[1]))
    assert len(orders) > 1


def test_without_an_encoding_a_shuffle_changes_nothing():
    found = evaluated(trained("none", "--epochs=3"), "--shuffle")
    assert found["patches"]["shuffled"] == found["test"]["test"]


def bad(capsys, *flags):
    return complaint(capsys, evaluate.main, "--device=cpu", *flags)


def test_what_cannot_be_evaluated_is_told_in_a_line(capsys):
    assert "RUN" in bad(capsys)
    assert "there is no nowhere/last.pt" in bad(capsys, "nowhere")
    run = trained("axial")
    assert "cells of 4 pixels" in bad(capsys, run, "--sizes", "30")
    assert "--shift" in bad(capsys, run, "--shift", "far")
    Path(run, "last.pt").write_bytes(b"PK")
    assert "is damaged" in bad(capsys, run)


def test_it_is_for_one_process(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "WORLD_SIZE", 2)
    assert evaluate.main(["run"]) == 2
    assert capsys.readouterr().err == "error: evaluate.py is for one process: start it with python, not with torchrun\n"


def test_each_evaluation_is_of_the_images_that_it_names(monkeypatch):
    run, seen = trained("axial"), []
    monkeypatch.setattr(
        evaluate, "accuracy", lambda _, batches, *__: seen.append(torch.cat([b[0] for b in batches])) or 0
    )
    evaluated(run, "--sizes", "24", "--shuffle", "--regions")
    task = Bearing(batch_size=1)
    which = [{}, {"img_size": 24}, {}, *({"region": region} for region in REGIONS)]
    want = [task.normalise(task.test_set(**w)[0]) for w in which]
    torch.manual_seed(0)
    want[2] = shuffled(want[2], 4)
    assert all(torch.equal(a, b) for a, b in zip(seen, want, strict=True))


def test_a_run_is_evaluated_at_the_size_that_it_was_tested_at(monkeypatch):
    make_imagenet("in")
    settings = {
        "dataset": "imagenet",
        "data-dir": "in",
        "img-size": 32,
        "patch-size": 16,
        "eval-size": 64,
        "workers": 0,
    }
    run, accuracy, sizes = trained("spherical", *as_flags(settings)), evaluate.accuracy, set()

    def spy(model, batches, *rest):
        batches = list(batches)
        sizes.update(images.shape[-1] for images, _ in batches)
        return accuracy(model, batches, *rest)

    monkeypatch.setattr(evaluate, "accuracy", spy)
    found = evaluated(run, "--data-dir=in", "--shuffle", "--shift", "0")
    assert sizes == {64}
    assert found["shift"]["0"] == found["test"]["test"] == weights(run)["log"][-1]["test_accuracy"]
