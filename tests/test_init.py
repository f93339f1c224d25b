"""train.py --init: a run that starts from another's weights, with another encoding, other classes or other sizes."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import (
    ROTARY,
    SMALL,
    as_flags,
    assert_resumes_to_the_same_end,
    assert_same,
    bad,
    complaint,
    interrupted,
    make_imagenet,
    run,
    weights,
)

import train
from lab import evaluate
from lab.augment import noisy_positions
from lab.files import read_json
from vit import ENCODINGS, ViT

pytestmark = pytest.mark.usefixtures("tiny_bearing")
STAY = "--lr=1e-60", "--epochs=1"  # weights stay as they are
FOLDERS = "--dataset=imagenet", "--data-dir=in", "--batch-size=6", "--workers=0", "--opt=adamw", "--augment=none"
BARE = as_flags({name: SMALL[name] for name in ("dataset", "device", "batch-size")})  # no sizes


def model_of(out):
    return weights(out)["model"]


def same_but(a, b):
    """The names of parameters that are not the same, bit for bit, in two models."""
    same = {name for name in a.keys() & b.keys() if a[name].shape == b[name].shape and torch.equal(a[name], b[name])}
    return (a.keys() | b.keys()) - same


def test_a_run_starts_from_the_weights_and_sizes_of_another():
    sizes = "--patch-size=8", "--layer-scale=0.1", "--pos-unit=patch", "--pos-scale=0.5", "--ape"
    assert run("--out=a", "--pe=axial", "--pe-options", "theta=50", *sizes) == 0
    assert train.main([*BARE, "--init=a", "--out=b", *STAY]) == 0
    assert_same(model_of("b"), model_of("a"))
    assert_same(weights("b")["vit"], weights("a")["vit"])
    assert read_json(Path("b/config.json"))["init"] == weights("b")["config"]["init"] == "a"
    assert train.main([*BARE, "--init=a/last.pt", "--out=c", *STAY]) == 0
    assert_same(model_of("c"), model_of("a"))


def test_its_rate_is_a_tenth_unless_it_is_given():
    assert run("--out=a", "--epochs=1") == 0
    scratch, given = read_json(Path("a/config.json"))["lr"], ["--lr=0.5"]
    for flags, lr in ([], scratch / 10), (["--opt=lamb"], scratch / 10), (given, 0.5):
        assert train.parse_args([*BARE, "--init=a", "--out=b", *flags]).lr == lr
    assert train.parse_args(["--init=a", "--out=b", "--opt=lamb", "--layer-scale=0"]).lr == 4e-4


def test_it_resumes_to_the_same_bits_without_what_it_came_from(capsys):
    assert run("--out=a", "--pe=mixed") == 0

    def stop(*flags):
        interrupted(*flags)
        shutil.rmtree("a")

    assert_resumes_to_the_same_end("--init=a", "--pe=axial-learned", stop=stop)
    assert "--init was a, is b" in bad(capsys, "--init=b", "--pe=axial-learned", "--out=cut", "--resume")
    assert "--init was a, is None" in bad(capsys, "--pe=axial-learned", "--out=cut", "--resume")


@pytest.mark.parametrize("old, new", [*pairwise(ROTARY), ("ape", "mixed"), ("mixed", "ape")])
def test_another_encoding_keeps_all_but_the_encodings_own(old, new):
    assert run("--out=a", f"--pe={old}", "--epochs=1", "--head-dim=24") == 0
    assert run("--out=b", "--init=a", f"--pe={new}", "--head-dim=24", *STAY) == 0
    own = {name for name in model_of("a") | model_of("b") if ".rope." in name or name == "pos_embed"}
    assert same_but(model_of("a"), model_of("b")) == own


def test_an_absolute_embedding_may_stay_beside_a_new_encoding():
    assert run("--out=a", "--pe=ape", "--epochs=1") == 0
    assert run("--out=b", "--init=a", "--pe=axial", "--ape", "--pos-unit=patch", *STAY) == 0
    assert_same(model_of("b"), model_of("a"))


@pytest.mark.parametrize("pe", ["ape", "mixed", "spherical"])
def test_other_classes_get_a_fresh_head_and_other_sizes_fit(pe):
    make_imagenet("in")
    assert run("--out=a", f"--pe={pe}", "--epochs=1", "--head-dim=24") == 0
    jitter = ["--jitter=1"] if pe in ROTARY else []
    sizes = "--img-size=48", "--layer-scale=0", "--head-dim=24"
    assert run("--out=b", "--init=a", *FOLDERS, *sizes, *jitter, *STAY) == 0
    assert same_but(model_of("a"), model_of("b")) == {"head.weight", "head.bias"}
    assert weights("b")["vit"]["img_size"] == 32 and weights("b")["data"]["img_size"] == 48
    assert evaluate.main(["b", "--data-dir=in", "--shuffle", "--device=cpu"]) == 0
    found = read_json(Path("b/evaluation.json"))["accuracies"]["test"]["test"]
    assert found == weights("b")["log"][-1]["test_accuracy"]


def test_jitter_moves_the_patches_of_other_sizes():
    torch.manual_seed(0)
    model = ViT("axial", depth=1)
    moves = (noisy_positions(model, 12, 1.0) - model.positions(12, 12)) / model.spacing
    assert moves.shape == (145, 2) and not moves[0].any() and moves.abs().max() < 0.5001


def test_what_contradicts_the_weights_gets_one_line(capsys):
    assert run("--out=a", "--pe=axial", "--pe-options", "theta=50", "--epochs=1") == 0
    Path("empty").mkdir()
    for flags, says in {
        "--depth 3": "a has --depth 2, not 3: leave it out",
        "--heads 4 --head-dim 6": "a has --head-dim 12, not 6",
        "--patch-size 8": "a has --patch-size 4, not 8",
        "--pool mean": "a has --pool cls, not mean",
        "--pos-unit patch": "a has --pos-unit image, not patch",
        "--layer-scale 0.1": "a has --layer-scale 0.0, not 0.1",
        "--ape": "a has --ape False, not True",
        "--pe-options theta=60": "a has --pe-options theta=50: leave them out",
        "--init nowhere": "there is no nowhere: name a run's folder, or a file of weights",
        "--init empty": "there is no empty/last.pt",
    }.items():
        assert says in complaint(capsys, train.main, *BARE, "--init=a", "--out=b", *flags.split())
        assert not Path("b").exists()


def test_an_encoding_that_left_the_table_can_only_be_replaced(capsys, monkeypatch):
    assert run("--out=a", "--pe=comrope-ld", "--epochs=1") == 0
    monkeypatch.delitem(ENCODINGS, "comrope-ld")  # the last: it returns to the end
    says = "a has --pe comrope-ld, which vit.py does not know"
    assert says in complaint(capsys, train.main, *BARE, "--init=a", "--out=b")
    assert run("--init=a", "--out=b", "--pe=mixed", "--epochs=1") == 0


def test_a_folder_for_the_new_run_is_asked_for(capsys):
    assert "--init needs a folder for the new run: add --out" in complaint(capsys, train.main, *BARE, "--init=a")
    assert "there is no b" in complaint(capsys, train.main, *BARE, "--init=a", "--out=b", "--resume")
