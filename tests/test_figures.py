"""What figures.py draws is what the encodings are and the runs say. Every picture is written, and shows something."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import SMALL, as_flags, complaint

import evaluate
import experiments
import figures
import train
from comrope import ComRoPE
from data import Bearing
from figures import (
    OF_ENCODINGS,
    OF_RUNS,
    channel_groups,
    encodings,
    equivariance_error,
    equivariant,
    frequencies,
    grid,
    patterns,
    read_runs,
    walk,
)
from liere import LieRE
from rope_axial import AxialRoPE
from rope_mixed import MixedRoPE
from rope_spherical import SphericalRoPE
from vit import ENCODINGS

TINY = as_flags(SMALL | {"depth": 1, "epochs": 2})
EQUIVARIANT = ["axial", "axial-learned", "uniform", "mixed", "comrope-ap", "comrope-ld"]
OTHERS = ["spherical", "spherical-learned", "liere, b = 8", "liere"]


@pytest.fixture(autouse=True)
def in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.setattr(Bearing, "train_size", 32)
    monkeypatch.setattr(Bearing, "test_size", 60)
    monkeypatch.setitem(figures.STYLE, "savefig.dpi", 60)
    monkeypatch.chdir(tmp_path)


def test_encodings_are_all_that_turn_the_equivariant_ones_first():
    assert list(encodings(24)) == EQUIVARIANT + OTHERS
    assert {pe for pe, make in ENCODINGS.items() if make} == set(EQUIVARIANT + OTHERS) - {"liere, b = 8"}


def test_a_new_encoding_is_drawn_without_being_known(monkeypatch):
    monkeypatch.setitem(ENCODINGS, "sixth", lambda head_dim, num_heads: SphericalRoPE(head_dim, num_heads, theta=5.0))
    assert list(encodings(24)) == [*EQUIVARIANT, *OTHERS, "sixth"]
    assert figures.look("sixth")["color"] not in [figures.look(pe)["color"] for pe in ENCODINGS if pe != "sixth"]
    assert "sixth" in [axes.get_title() for axes in figures.all_frequencies().axes]


def test_no_two_encodings_look_alike():
    names = [*ENCODINGS, "liere, b = 8", "comrope-ap, b = 4", "comrope-ld, b = 4"]
    for what in "linestyle", "marker":
        assert len({(figures.look(name)["color"], figures.look(name)[what]) for name in names}) == len(names)


def strided(count, size, step):
    return [list(range(i, i + size * step, step)) for i in range(count)]


@pytest.mark.parametrize(
    "rope, groups",
    [
        (AxialRoPE(24, 2), strided(12, 2, 12)),
        (MixedRoPE(25, 2), strided(12, 2, 12)),
        (SphericalRoPE(26, 2), strided(8, 3, 8)),
        (LieRE(24, 2), [list(range(24))]),
        (LieRE(26, 2, block_size=8), [list(range(i, i + 8)) for i in (0, 8, 16)]),
        (ComRoPE(24, 2, kind="ap", block_size=4), [list(range(i, i + 4)) for i in range(0, 24, 4)]),
        (ComRoPE(24, 2), [list(range(i, i + 8)) for i in (0, 8, 16)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_groups_are_the_channels_that_the_docstrings_name(rope, groups):
    torch.manual_seed(0)
    assert channel_groups(rope) == groups


def not_additive(scores):
    """What is left of scores (n, n) by place without their part f(x) + g(y)."""
    return (scores - scores.mean(0) - scores.mean(1, keepdim=True) + scores.mean()).abs().max()


def test_axial_patterns_split_into_x_and_y_and_others_do_not():
    for name, rope in encodings(24).items():
        found = patterns(rope, grid(9)).view(-1, 9, 9)
        residue = torch.stack([not_additive(scores) for scores in found])
        if name in ("axial", "axial-learned", "uniform", "comrope-ap"):
            assert residue.max() < 1e-12, name
            for group in found[:-1]:  # stripes along an axis
                assert min(group.std(dim=0).max(), group.std(dim=1).max()) < 1e-12, name
        else:
            assert residue.max() > 0.1, name


@pytest.mark.parametrize("name", EQUIVARIANT + OTHERS)
def test_patterns_are_the_scores_of_a_query_and_itself_turned(name):
    rope, pos = encodings(24, 2)[name], grid(5)
    torch.manual_seed(3)
    q = torch.randn(1, 1, 1, 24, dtype=torch.float64).flatten()
    torch.manual_seed(3)
    *groups, whole = patterns(rope, pos)
    R = rope.rotation(pos)[0].detach()
    torch.testing.assert_close(whole, (R @ q) @ q / (q @ q))
    assert whole.abs().max() <= 1 + 1e-12 and whole.argmax() == 12  # the centre
    torch.testing.assert_close(whole.new_ones(len(groups)), torch.stack(groups)[:, 12])
    part = torch.zeros_like(q)
    part[channel_groups(rope)[0]] = q[channel_groups(rope)[0]]
    torch.testing.assert_close(groups[0], (R @ part) @ part / (part @ part))


def test_the_grid_goes_row_by_row_with_x_first():
    assert grid(3, 1).tolist() == [[x, y] for y in (-1, 0, 1) for x in (-1, 0, 1)]


def test_the_equivariance_error_is_none_or_plain():
    p, q = torch.tensor([1.5, 0.8], dtype=torch.float64), grid(7)
    for name, rope in encodings(24).items():
        error = equivariance_error(rope, p, q)
        assert error.shape == (49,) and equivariant(rope) == (name in EQUIVARIANT)
        assert error.max() < 1e-12 if name in EQUIVARIANT else 0.1 < error.max() <= 2 + 1e-12, name
    rope = encodings(24)["spherical"]
    R = [rope.rotation(at[None])[0, 0] for at in (p, q[5], q[5] - p)]
    largest = np.linalg.svd((R[0].T @ R[1] - R[2]).numpy(), compute_uv=False)[0]
    assert equivariance_error(rope, p, q)[5].item() == pytest.approx(largest, rel=1e-12)


def test_the_error_is_zero_where_the_docstring_says():
    p = torch.tensor([1.5, 0.8], dtype=torch.float64)
    along = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    ropes = encodings(24)
    assert equivariance_error(ropes["liere"], p, along * p).max() < 1e-12
    assert equivariance_error(ropes["spherical"], p, torch.cat([p[0].expand(9, 1), along], dim=1)).max() < 1e-12


def test_both_ways_lead_to_one_place_on_the_circle_and_to_two_on_the_sphere():
    x, y = (1.2, 0.0), (0.0, 1.2)
    pair, triplet = torch.tensor([0.6, -0.8]).double(), torch.tensor([0.0, 0.6, 0.8]).double()
    mixed, spherical = MixedRoPE(2, 1), SphericalRoPE(3, 1)
    ends = {}
    for name, rope, z in ("circle", mixed, pair), ("sphere", spherical, triplet):
        paths = [walk(rope, z, *way) for way in ((x, y), (y, x))]
        for path in paths:
            assert torch.equal(path[0, 0], z) and torch.equal(path[0, -1], path[1, 0])
            torch.testing.assert_close(path.norm(dim=-1), torch.ones(2, 60).double(), atol=1e-6, rtol=0)
        ends[name] = (paths[0][1, -1] - paths[1][1, -1]).norm()
        R = rope.rotation(torch.tensor([[1.2, 1.2]]).double())[0, 0].detach()
        torch.testing.assert_close(paths[1][1, -1], R @ z, atol=1e-6, rtol=0)  # R rolls with y, then yaws with x
    assert ends["circle"] < 1e-6 and ends["sphere"] > 0.5


def test_frequencies_are_how_fast_groups_turn():
    for name in "axial-learned", "mixed", "comrope-ap", "comrope-ld":
        rope = encodings(24, 3)[name]
        w = frequencies(rope).double()  # (H, 2, 12)
        assert w.shape == (3, 2, 12)
        p = torch.tensor([0.3, 0.2], dtype=torch.float64)
        turned = torch.linalg.eigvals(rope.rotation(p[None])[:, 0].detach()).angle().abs().sort().values[:, ::2]
        angles = (0.3 * w[:, 0] + 0.2 * w[:, 1]).abs().sort(dim=1).values
        torch.testing.assert_close(angles, turned, atol=1e-6, rtol=0)
    rope = SphericalRoPE(24, 2, learned=True)
    assert torch.equal(frequencies(rope), rope.freqs)
    assert frequencies(LieRE(24, 2)) is None


def drawn(capsys, *flags):
    """Draw -> paths of the pictures, what was said on stderr."""
    capsys.readouterr()
    assert figures.main([*flags]) == 0
    out, err = capsys.readouterr()
    paths = [Path(line) for line in out.splitlines() if line.endswith(".png")]
    for path in paths:
        image = Image.open(path).convert("RGB")
        assert image.width >= 250 and len(image.getcolors(maxcolors=2**24)) > 50, path
    return {path.stem: path for path in paths}, out + err


def test_without_runs_the_encodings_are_drawn_alike_each_time(capsys, monkeypatch):
    found, _ = drawn(capsys, "--out=pictures")
    assert list(found) == list(OF_ENCODINGS) and all(path.parent == Path("pictures") for path in found.values())
    monkeypatch.setattr(figures, "OF_ENCODINGS", {"frequencies": OF_ENCODINGS["frequencies"]})
    torch.manual_seed(99)
    assert figures.main([]) == 0
    assert Path("figures/frequencies.png").read_bytes() == found["frequencies"].read_bytes()


def test_without_results_there_is_no_picture_of_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "OF_ENCODINGS", {"bearing-corner": figures.bearing_corner})
    found, said = drawn(capsys)
    assert not found and "figures/bearing-corner.png is left out" in said


def test_the_corner_has_a_dot_for_each_result():
    panels = figures.bearing_corner().axes
    assert [axes.get_ylabel() for axes in panels] == ["no rotation", "equivariant", "not equivariant"]
    names = [[text.get_text() for text in axes.get_yticklabels()] for axes in panels]
    assert names == [["none", "ape"], EQUIVARIANT, [pe for pe in OTHERS if pe in ENCODINGS]]
    dots = [
        (names[i][round(y)], line.get_label(), x)
        for i, axes in enumerate(panels)
        for line in axes.lines[:2]
        for x, y in zip(*line.get_data(), strict=True)
    ]
    reads = {"cls": "a class token", "mean": "the mean of all patches"}
    rows = experiments.read("bearing-corner")
    assert sorted(dots) == sorted((row["pe"], reads[row["pool"]], float(row["region lower right"])) for row in rows)


def trained(pe, seed=0, *flags):
    out = f"{pe}-{seed}"
    assert train.main([*TINY, f"--pe={pe}", f"--seed={seed}", f"--out={out}", *flags]) == 0
    return out


def test_runs_are_drawn_and_those_not_evaluated_are_named(capsys):
    runs = [trained("mixed"), trained("liere", 0, "--block-size=4"), trained("none")]
    found, said = drawn(capsys, *runs)
    assert list(found) == ["curves", "learned-frequencies", "cost"]
    assert "python evaluate.py none-0 mixed-0 liere-0\n" in said and said.count("is left out") == 2
    for run in runs:
        assert evaluate.main([run, "--device=cpu", "--sizes", "24", "64", "--shift", "1", "--patch-shift", "2"]) == 0
    found, said = drawn(capsys, *runs)
    assert list(found) == list(OF_RUNS) and "evaluate.py" not in said


def test_what_is_drawn_of_runs_is_what_they_say():
    runs = [trained("mixed", 1), trained("mixed"), trained("liere", 0, "--block-size=4")]
    for run, size, shift in (runs[0], 40.0, 30.0), (runs[1], 60.0, 70.0):
        found = {"test": {"test": 80.0}, "size": {"24": 20.0, "48": size}, "shift": {"2": shift}}
        Path(run, "evaluation.json").write_text(json.dumps(found))
        result = json.loads(Path(run, "result.json").read_text()) | {"images_per_second": size, "test_accuracy": shift}
        Path(run, "result.json").write_text(json.dumps(result))
    read = read_runs(map(Path, runs))
    [line] = [line for line in figures.sizes(read).axes[0].lines if line.get_label() == "mixed"]
    assert list(line.get_xdata()) == [24, 32, 48] and list(line.get_ydata()) == [20, 80, 50]
    [line] = figures.shifts(read).axes[0].lines
    assert list(line.get_xdata()) == [0, 2] and list(line.get_ydata()) == [80, 50]
    lines = {line.get_label(): line for line in figures.curves(read).axes[0].lines}
    logs = [run.log for run in read if run.name == "mixed"]
    assert set(lines) == {"mixed", "liere, b = 4"} and len(logs) == 2
    assert list(lines["mixed"].get_ydata()) == [
        sum(row["test_accuracy"] for row in rows) / 2 for rows in zip(*logs, strict=True)
    ]
    mixed = next(line for line in figures.cost(read[:2]).axes[0].lines)
    assert sorted(zip(mixed.get_xdata(), mixed.get_ydata(), strict=True)) == [(1.0, 70.0), (1.5, 30.0)]
    read[0].result["device"] = "another"
    assert figures.cost(read) is None


def test_a_title_names_the_first_two_at_the_last_x():
    found = {"a": {1: [9.0], 2: [5.0, 7.0]}, "b": {2: [8.0]}, "c": {1: [99.0]}, "d": {2: [1.0]}}
    x, first = figures.best(found)
    assert (x, first) == (2, [("b", 8.0), ("a", 6.0)]) and figures.ranked(first) == "b 8.0 %, then a 6.0 %"


def bad(capsys, *flags):
    return complaint(capsys, figures.main, *flags)


def test_what_cannot_be_drawn_is_told_in_a_line(capsys):
    assert "there is no nowhere/last.pt" in bad(capsys, "nowhere")
    runs = trained("axial"), trained("mixed", 0, "--pool=mean", "--lr=1e-3")
    assert "differ in --lr, --pool" in bad(capsys, *runs)
    Path("file").touch()
    assert "--out" in bad(capsys, runs[0], "--out=file/figures")
    Path(runs[0], "last.pt").write_bytes(b"PK")
    assert "is damaged" in bad(capsys, runs[0])
