"""What benchmark.py says of costs: it times in turns, counts memory to the byte, and files all that it measures."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from test_train import complaint, make_imagenet
from torch import nn

import benchmark
from benchmark import compare, make_vit, parse_args, peak_memory
from vit import ENCODINGS

ENCODING_PARTS = [part for part in benchmark.PARTS if part != "decoding"]
TINY = ["--device=cpu", "--depth=1", "--heads=1", "--head-dim=16", "--img-size=16", "--batch-size=2", "--repeats=2"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def measured(*flags):
    assert benchmark.main([*TINY, "--json=costs.json", *flags]) == 0
    return json.loads(Path("costs.json").read_text())


def keys(rows):
    return [(row["what"], row["pe"], row["base"]) for row in rows]


def test_every_part_has_its_rows_on_file_and_on_the_screen(capsys):
    found = measured(*ENCODING_PARTS, "--pe", "none", "spherical", "comrope-ap")
    assert found.keys() == {"device", "torch", "commit", "command", "settings", "rows"}
    assert found["settings"]["head_dim"] == 16 and "json" not in found["settings"]
    parts = {name: [row for row in found["rows"] if row["part"] == name] for name in ENCODING_PARTS}
    all_three, two = ("none", "spherical", "comrope-ap"), ("spherical", "comrope-ap")
    both = [("encoding, forward and backward", pe, "attention") for pe in two]
    assert {name: keys(rows) for name, rows in parts.items()} == {
        "step": [("training step", pe, "none") for pe in all_three],
        "inference": [("inference", pe, "none") for pe in all_three],
        "alone": [("encoding, forward", pe, "attention") for pe in two] + both,
        "memory": [("training step, memory", pe, "none") for pe in all_three]
        + [("encoding, memory", pe, "q and k") for pe in two],
        "tokens": both * 4,
        "head-dim": both * 3,
        "exponential": [("exponential", "comrope-ap", "torch.matrix_exp")],
        "recipe": [("augmentation", "axial", "training step"), ("LAMB", "axial", "fused AdamW")],
    }
    sizes = {(row["tokens"], row["batch_size"]) for row in parts["tokens"]}
    assert sizes == {(64, 64), (256, 16), (1024, 4), (4096, 1)}
    assert {row["head_dim"] for row in parts["head-dim"]} == {32, 64, 128}
    assert {(row["tokens"], row["head_dim"], row["batch_size"]) for row in parts["alone"]} == {(16, 16, 2)}
    for row in found["rows"]:
        if "megabytes" not in row:
            assert 0 < row["low"] <= row["ratio"] <= row["high"] and row["milliseconds"] > 0
    memory = {(row["what"], row["pe"]): row["ratio"] for row in parts["memory"]}
    assert memory["training step, memory", "none"] == 1 < memory["training step, memory", "spherical"]
    assert 0 < memory["encoding, memory", "spherical"] < memory["encoding, memory", "comrope-ap"]
    title, *lines = capsys.readouterr().out.splitlines()
    assert found["device"] in title and len(lines) == len(found["rows"])
    for line, row in zip(lines, found["rows"], strict=True):
        assert (
            line.startswith(row["what"]) and f" {row['pe']} " in line and f"{row['ratio']:.3f} of {row['base']}" in line
        )


def test_decoding_is_compared_with_plain_pillow():
    make_imagenet("photos", n=2)
    first, second = measured("decoding", "--photos=photos")["rows"]
    assert (first["what"], second["what"]) == ("random crop", "centre crop")
    assert first["images"] == 12 and first["base"] == "Pillow" and first["ratio"] > 0


def test_without_parts_it_prices_the_encodings_and_by_default_all_of_them():
    args = parse_args(["--device=cpu"])
    assert args.parts == ["step", "inference", "alone", "memory", "tokens", "head-dim"] and args.pe == list(ENCODINGS)


def test_what_is_measured_by_default_depends_on_the_device():
    def defaults(*flags):
        args = parse_args([*flags])
        return args.img_size, args.patch_size, args.batch_size, args.head_dim, args.amp, args.compile

    assert defaults("--device=cpu") == (32, 4, 32, 60, False, False)
    assert defaults("--device=cuda:1") == (224, 16, 256, 64, True, True)
    assert defaults("--device=cuda", "--no-compile", "--no-amp", "--batch-size=4") == (224, 16, 4, 64, False, False)
    assert defaults("--device=cpu", "--compile", "--amp", "--head-dim=8") == (32, 4, 32, 8, True, True)


def test_block_size_is_for_those_that_have_blocks():
    args = parse_args([*TINY, "--block-size=4"])
    for pe in "liere", "comrope-ap", "comrope-ld":
        assert make_vit(pe, args).blocks[0].attn.rope.block_size == 4
    make_vit("axial", args)


# Time


class Clock:
    """Time that passes only in the functions it makes."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(benchmark, "now", lambda: self.now)

    def taking(self, *durations):
        """A function whose calls take as long as these, one after another, and then as long as the last one."""
        durations, calls = list(durations), []

        def f():
            self.now += durations[min(len(calls), len(durations) - 1)]
            calls.append(self.now)

        f.calls = calls
        return f


def turns(n):
    return SimpleNamespace(repeats=n, compile=False)


def test_a_function_that_takes_twice_as_long_has_a_ratio_of_two(monkeypatch):
    clock = Clock(monkeypatch)
    found = compare(clock.taking(0.5), clock.taking(0.25), turns(4))
    assert found == pytest.approx({"ratio": 2, "low": 2, "high": 2, "milliseconds": 500})


def test_a_machine_that_slows_down_does_not_change_the_ratio_since_turns_alternate(monkeypatch):
    clock, moods = Clock(monkeypatch), [1, 1, 1, 5, 2, 30, 7]  # two calls warm up
    run, base = clock.taking(*(3.0 * mood for mood in moods)), clock.taking(*(2.0 * mood for mood in moods))
    found = compare(run, base, turns(5))
    assert found == pytest.approx({"ratio": 1.5, "low": 1.5, "high": 1.5, "milliseconds": 3000 * 5})
    assert len(run.calls) == len(base.calls) == 7
    order = sorted([(t, "run") for t in run.calls] + [(t, "base") for t in base.calls])
    assert [name for _, name in order] == ["run", "base"] * 7


def test_median_and_quartiles_are_those_of_the_ratios(monkeypatch):
    clock = Clock(monkeypatch)
    found = compare(clock.taking(9, 9, 5, 1, 4, 2, 3), clock.taking(1), turns(5))
    assert found == pytest.approx({"ratio": 3, "low": 2, "high": 4, "milliseconds": 3000})


def test_what_is_short_is_called_many_times_a_turn(monkeypatch):
    clock = Clock(monkeypatch)
    run, base = clock.taking(0.003), clock.taking(0.0013)
    found = compare(run, base, turns(3))
    assert found["milliseconds"] == pytest.approx(3) and found["ratio"] == pytest.approx(3 / 1.3)
    assert len(run.calls) == 2 + 3 * 7 and len(base.calls) == 2 + 3 * 16  # 20 ms a turn


# Memory


def backward(x):
    g = x.detach().clone()
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(x.exp().exp(), x, g)


@pytest.mark.parametrize(
    "make, copies",
    [
        (lambda x: lambda: x.neg_(), 0),
        (lambda x: lambda: x.exp(), 1),
        (lambda x: lambda: x.exp().exp(), 2),  # the first is there until the second is
        (lambda x: lambda: x.exp().exp().exp().exp(), 2),  # and then makes place for the third
        (lambda x: lambda: [x.exp(), x.exp(), x.exp().exp()], 4),
        (lambda x: lambda: (x.exp().exp(), None)[1] or x.exp(), 2),  # the peak is not the end
        (backward, 4),  # both results are kept, and have a gradient each
    ],
)
def test_peak_memory_is_what_is_held_at_a_time(make, copies):
    x = torch.randn(1 << 16)
    for _ in range(2):
        assert peak_memory(make(x), parse_args(["--device=cpu"])) == copies * x.nbytes


def test_what_was_held_before_is_not_counted():
    blocks = [torch.randn(1000) for _ in range(3)]

    def run():
        blocks.append(torch.randn(1000))
        blocks.pop(0)

    for _ in range(2):
        assert peak_memory(run, parse_args(["--device=cpu"])) == 4000


class TwiceExp(nn.Module):
    """Keeps one more copy of q and k than it must: the first results."""

    def __init__(self, head_dim, num_heads):
        super().__init__()

    def forward(self, q, k, pos):
        return q.exp().exp(), k.exp().exp()


class Copy(TwiceExp):
    def forward(self, q, k, pos):
        return 1 * q, 1 * k


@pytest.mark.parametrize("amp", ["--no-amp", "--amp"])
def test_an_encodings_memory_is_told_in_units_of_q_and_k(monkeypatch, amp):
    monkeypatch.setitem(ENCODINGS, "copy", Copy)
    monkeypatch.setitem(ENCODINGS, "twice-exp", TwiceExp)
    rows = measured("memory", "--pe", "copy", "twice-exp", amp)["rows"]
    found = {row["pe"]: row for row in rows if row["base"] == "q and k"}
    assert found["copy"]["ratio"] == found["copy"]["megabytes"] == 0
    bytes_each = 2 if amp == "--amp" else 4
    assert found["twice-exp"]["ratio"] == pytest.approx(1, rel=1e-3)
    assert found["twice-exp"]["megabytes"] == pytest.approx(2 * 4096 * 16 * bytes_each / 1e6, rel=1e-3)


# torch.compile


def test_all_is_compiled_and_nothing_falls_back(monkeypatch):
    """The sizes are more than torch.compile keeps versions of one function: beyond these it would run uncompiled."""
    graphs, compile_module = [], nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_module(self, backend=backend, **options))
    sizes = measured("tokens", "head-dim", "--compile", "--pe", "axial", "uniform")["rows"]
    assert len(sizes) == len(graphs) == 2 * (4 + 3)
    for part, compiled in ("step", 2), ("inference", 2), ("alone", 2), ("memory", 3):
        graphs.clear()
        measured(part, "--compile", "--pe", "axial")
        assert len(graphs) == compiled
    graphs.clear()
    measured("step", "inference", "alone", "memory", "--pe", "axial")
    assert not graphs


# What can go wrong


def failing(capsys, *flags):
    return complaint(capsys, benchmark.main, *TINY, *flags)


def test_what_cannot_be_measured_is_told_in_a_line(capsys, monkeypatch):
    assert "no part speed: take step, inference" in failing(capsys, "speed")
    assert "--pe" in failing(capsys, "--pe", "rope")
    assert "multiple of --patch-size = 4, not 18" in failing(capsys, "--img-size=18")
    assert "--repeats" in failing(capsys, "--repeats=1")
    assert "no folder nowhere" in failing(capsys, "--json=nowhere/costs.json")
    assert "--device nowhere cannot be used" in failing(capsys, "--device=nowhere")
    assert "take cpu or cuda" in failing(capsys, "--device=meta")
    assert "head_dim must be at least" in failing(capsys, "step", "--pe", "spherical", "--head-dim=2")
    assert "none ape has no part in alone" in failing(capsys, "alone", "--pe", "none", "ape")
    Path("folder").mkdir()
    assert "folder" in failing(capsys, "step", "--pe", "none", "--json=folder")
    monkeypatch.setitem(benchmark.PARTS, "step", Mock(side_effect=torch.OutOfMemoryError))
    assert "smaller --batch-size" in failing(capsys, "step")


def test_what_a_stopped_run_has_measured_is_on_file(monkeypatch):
    def stopped(args):
        yield {"what": "training step", "pe": "none", "base": "none", "ratio": 1.23456789, "megabytes": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setitem(benchmark.PARTS, "step", stopped)
    assert benchmark.main([*TINY, "--json=costs.json", "step"]) == 130
    (row,) = json.loads(Path("costs.json").read_text())["rows"]
    assert row["part"] == "step" and row["ratio"] == 1.235


@pytest.mark.parametrize("pe", ["liere", "comrope-ap", "comrope-ld"])
def test_what_is_compared_with_torchs_exponential_is_the_same(pe):
    (layer,) = benchmark.layers(parse_args(["--device=cpu", "--pe", pe, "--batch-size=2", "--head-dim=24"]))
    for ours, theirs in zip(layer.encode(), benchmark.encode_by_matrix_exp(layer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
