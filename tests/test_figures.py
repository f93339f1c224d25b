"""Figures show what the encodings compute and what runs logged. Every picture is written, and none is blank."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EQUIVARIANT, ROOT, ROTARY, SMALL, as_flags, complaint
from PIL import Image

import train
from lab import evaluate, experiments, figures
from lab.figures import OF_ENCODINGS, OF_RUNS
from lab.files import read_json, write_json
from lab.rotations import channel_groups, encodings, equivariance_error, frequencies, grid, patterns, walk
from vit import ENCODINGS

P = torch.tensor([1.5, 0.8], dtype=torch.float64)
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch, tiny_bearing):
    monkeypatch.setitem(figures.STYLE, "savefig.dpi", 60)
    monkeypatch.setitem(OF_ENCODINGS, "moving-query", partial(figures.moving_query, frames=2))


GROUPS = [("axial", 24, {}, 2), ("mixed", 25, {}, 2), ("spherical", 26, {}, 3), ("liere", 24, {}, 24)]
GROUPS += [("liere", 26, {"block_size": 8}, 8), ("comrope-ap", 24, {"block_size": 4}, 4), ("comrope-ld", 24, {}, 8)]


@pytest.mark.parametrize("pe, head_dim, options, size", GROUPS)
def test_channel_groups_turn_apart_from_each_other(pe, head_dim, options, size):
    rope = ENCODINGS[pe](head_dim, 2, **options)
    groups, R = channel_groups(rope), rope.rotation(P[None])
    assert [len(group) for group in groups] == head_dim // size * [size]
    assert len({i for group in groups for i in group}) == head_dim // size * size
    for group in groups:
        others = [i for i in range(R.shape[-1]) if i not in group]
        assert not R[..., group, :][..., others].any()


def test_patterns_are_the_scores_of_a_query_with_itself_turned_row_by_row():
    assert grid(3, 1).tolist() == [[x, y] for y in (-1, 0, 1) for x in (-1, 0, 1)]
    for name, rope in encodings(24, 2).items():
        torch.manual_seed(3)
        found = patterns(rope, grid(5))
        torch.manual_seed(3)
        q, R = torch.randn(24, dtype=torch.float64), rope.rotation(grid(5))[0].detach()
        for scores, group in zip(found, [*channel_groups(rope), [*range(24)]], strict=True):
            z = torch.zeros_like(q)
            z[group] = q[group]
            close(scores, (R @ z) @ z / (z @ z), msg=name)


def test_the_equivariance_error_is_zero_where_promised_and_visible_elsewhere():
    q, along, ropes = grid(7), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], encodings(24)
    names = [name for name in ropes if name in ENCODINGS]
    assert set(names[: len(EQUIVARIANT)]) == set(EQUIVARIANT) and sorted(names) == sorted(ROTARY)
    for pe in ROTARY:
        error = equivariance_error(ropes[pe], P, q)
        assert error.max() < 1e-12 if pe in EQUIVARIANT else 0.1 < error.max() <= 2 + 1e-12, pe
    assert equivariance_error(ropes["liere"], P, along * P).max() < 1e-12
    assert equivariance_error(ropes["spherical"], P, torch.cat([P[0].expand(9, 1), along], dim=1)).max() < 1e-12
    Rp, Rq, Rqp = (ropes["liere"].rotation(at[None])[0, 0].detach() for at in (P, q[5], q[5] - P))
    close(equivariance_error(ropes["liere"], P, q)[5], torch.linalg.svdvals(Rp.T @ Rq - Rqp)[0])


@pytest.mark.parametrize("pe, z", [("mixed", [0.6, -0.8]), ("spherical", [0.0, 0.6, 0.8])])
def test_two_ways_meet_on_the_circle_and_not_on_the_sphere(pe, z):
    rope, x, y, z = ENCODINGS[pe](len(z), 1), (1.2, 0.0), (0.0, 1.2), torch.tensor(z, dtype=torch.float64)
    x_first, y_first = walk(rope, z, x, y), walk(rope, z, y, x)
    for path in x_first, y_first:
        assert torch.equal(path[0, 0], z) and torch.equal(path[0, -1], path[1, 0])
        close(path.norm(dim=-1), torch.ones(2, 60, dtype=torch.float64))
    apart = (x_first[1, -1] - y_first[1, -1]).norm()
    assert apart > 0.5 if pe == "spherical" else apart < 1e-12
    R = rope.rotation(torch.tensor([[1.2, 1.2]], dtype=torch.float64))[0, 0].detach()
    close(y_first[1, -1], R @ z)  # R rolls with y, then yaws with x


@pytest.mark.parametrize("pe", ["axial-learned", "uniform", "mixed", "spherical-learned", "comrope-ap", "comrope-ld"])
def test_frequencies_are_how_fast_groups_turn(pe):
    rope, places = encodings(24, 3)[pe].double(), [[0.3, 0], [0, 0.3], [0.3, 0.2]]
    w = frequencies(rope).detach().double()
    for p in torch.tensor(places[: 3 if pe in EQUIVARIANT else 2]).double():
        turned = torch.linalg.eigvals(rope.rotation(p[None])[:, 0].detach()).angle().abs()  # by w and by -w
        turned = turned.sort(descending=True).values[:, : 2 * w.shape[-1] : 2]
        close(turned, torch.einsum("m,hmg->hg", p, w).abs().sort(descending=True).values.expand_as(turned))
    assert frequencies(ENCODINGS["liere"](24, 2)) is None
    assert frequencies(SimpleNamespace(freqs=torch.ones(2, 12))) is None  # of an encoding that is not known here


def test_no_two_encodings_look_alike(monkeypatch):
    for i in range(12):
        monkeypatch.setitem(ENCODINGS, f"new-{i}", type("New", (), {}))
    names = [
        *ENCODINGS,
        *(f"liere, block_size = {b}" for b in (2, 4, 8)),
        "comrope-ap, block_size = 4",
        "axial, theta = 9",
    ]
    for what in "linestyle", "marker":
        assert len({(look["color"], look[what]) for look in figures.looks(names).values()}) == len(names)


def drawn(capsys, *flags):
    """{name: path} of the pictures drawn, and the printed output."""
    capsys.readouterr()
    assert figures.main([*flags]) == 0
    out, err = capsys.readouterr()
    paths = {Path(line).stem: Path(line) for line in out.splitlines() if line.endswith((".png", ".gif"))}
    for path in paths.values():
        assert len(Image.open(path).convert("RGB").getcolors(maxcolors=2**24)) > 25, path
    return paths, out + err


def test_encodings_are_drawn_alike_each_time_and_new_ones_too(capsys, monkeypatch):
    monkeypatch.setitem(ENCODINGS, "sixth", partial(ENCODINGS["spherical"], theta=5.0))
    found, _ = drawn(capsys, "--out=pictures")
    assert list(found) == list(OF_ENCODINGS) and all(path.parent == Path("pictures") for path in found.values())
    assert "sixth" in [axes.get_title() for axes in figures.all_frequencies().axes]
    monkeypatch.setattr(figures, "OF_ENCODINGS", {"frequencies": figures.all_frequencies})
    torch.manual_seed(99)
    assert drawn(capsys)[0]["frequencies"].read_bytes() == found["frequencies"].read_bytes()


def test_the_corner_has_a_dot_for_each_result(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    assert figures.bearing_corner() is None
    kinds = {"ape": "no rotation", "axial": "equivariant", "mixed": "equivariant", "liere": "not equivariant"}
    reads = {"cls": "a class token", "mean": "the mean of all patches"}
    results = [(pe, reads[pool], 20.0 + 9 * i + len(pool)) for i, pe in enumerate(kinds) for pool in reads]
    row, dots = {"accuracy": 1, "command": "python"}, []
    for (pe, _, x), pool in zip(results, list(reads) * len(kinds), strict=True):
        experiments.append("bearing-corner", row | {"pe": pe, "pool": pool, "region lower right": x})
    moved = {"pool": "cls", "region lower right": 99, "token moved lower right": 98}
    experiments.append("bearing-corner", row | {"pe": "axial"} | moved)
    results += [("axial", "a class token", 99), ("axial", "a class token, moved along", 98)]
    for axes in figures.bearing_corner().axes:
        names = [text.get_text() for text in axes.get_yticklabels()]
        for line in axes.lines:
            if line.get_marker() != "o":
                continue
            dots += [(axes.get_ylabel(), names[round(y)], line.get_label(), x) for x, y in line.get_xydata()]
    assert sorted(dots) == sorted((kinds[pe], pe, label, x) for pe, label, x in results)


def test_the_film_moves_the_query_and_the_patterns(monkeypatch):
    frames = []
    for figure in figures.moving_query(frames=3):
        images = [axes.images[0].get_array().copy() for axes in figure.axes]
        frames.append((figure.axes[0].lines[1].get_xydata().tolist(), images))
    assert len(frames) == 3 and frames[0][0] == [[0, 0]] != frames[1][0]
    for now, later in zip(frames[0][1], frames[1][1], strict=True):
        assert now[22, 22] == pytest.approx(1) and abs(now - later).max() > 1e-3  # a key where the query is scores 1


def trained(pe, seed=0, *flags):
    settings = SMALL | {"depth": 1, "epochs": 2, "pe": pe, "seed": seed, "out": f"{pe}-{seed}"}
    assert train.main([*as_flags(settings), *flags]) == 0
    return settings["out"]


def test_runs_are_drawn_and_those_not_evaluated_are_named(capsys, monkeypatch):
    monkeypatch.setitem(ENCODINGS, "sixth", partial(ENCODINGS["liere"], block_size=4))
    runs = [trained("mixed"), trained("sixth"), trained("none")]
    found, printed = drawn(capsys, *runs)
    assert list(found) == ["curves", "learned-frequencies", "cost"] and printed.count("is skipped") == 2
    assert "python -m lab.evaluate none-0 mixed-0 sixth-0\n" in printed
    assert evaluate.main([*runs, "--device=cpu", "--sizes", "24", "64", "--shift", "1", "--patch-shift", "2"]) == 0
    found, printed = drawn(capsys, *runs)
    assert list(found) == list(OF_RUNS) and "lab.evaluate" not in printed
    (folder,) = {path.parent for path in found.values()}
    assert f"/{folder}/" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


def test_runs_are_drawn_as_recorded():
    runs = [trained("mixed", 1), trained("mixed"), trained("liere", 0, "--pe-options", "block_size=4")]
    recorded = (40, 30, {"48": 40, "64": 9}), (60, 70, {"48": 60}), (30, 10, {})
    for run, (speed, shift, sizes) in zip(runs, recorded, strict=True):
        accuracies = {"test": {"test": 80}, "size": {"24": 20} | sizes, "shift": {"2": shift}}
        write_json(Path(run, "evaluation.json"), {"accuracies": accuracies})
        result = {"images_per_second": speed, "test_accuracy": shift, "device": "cpu"}
        write_json(Path(run, "result.json"), read_json(Path(run, "result.json")) | result)
    read = figures.read_runs(map(Path, runs))

    def line(figure, name="mixed"):
        return next(line for line in figure.axes[0].lines if line.get_label() == name).get_xydata().tolist()

    assert line(figures.sizes(read)) == [[24, 20], [32, 80], [48, 50]]
    assert line(figures.shifts(read)) == [[0, 80], [2, 50]]
    logs = zip(*(run.log for run in read if run.name == "mixed"), strict=True)
    means = [[a["epoch"], (a["test_accuracy"] + b["test_accuracy"]) / 2] for a, b in logs]
    assert line(figures.curves(read)) == means and line(figures.curves(read), "liere, block_size = 4")
    assert sorted(line(figures.cost(read))) == [[1.0, 70.0], [1.5, 30.0]]
    assert figures.sizes(read).get_suptitle() == "Best at 48 pixels: mixed 50.0 %"
    title = re.fullmatch("Best after epoch 2: .* (.*) %, then .* (.*) %", figures.curves(read).get_suptitle())
    assert float(title[1]) >= float(title[2])
    read[0].result["device"] = "another"
    assert figures.cost(read) is None


def test_runs_that_cannot_be_compared_get_one_line(capsys):
    assert "there is no nowhere/last.pt" in complaint(capsys, figures.main, "nowhere")
    runs = trained("axial"), trained("mixed", 0, "--pool=mean", "--lr=1e-3")
    assert "differ in --lr, --pool" in complaint(capsys, figures.main, *runs)
