"""The benchmark times in turns, counts memory to the byte, and saves every row."""

import itertools
import json
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import complaint, make_imagenet

from lab import benchmark
from vit import ENCODINGS

EXPONENTIALS = "liere", "comrope-ap", "comrope-ld"
PARTS = [part for part in benchmark.PARTS if part != "decoding"]
TINY = ["--device=cpu", "--depth=1", "--heads=1", "--head-dim=16", "--img-size=16", "--batch-size=2", "--repeats=2"]
pytestmark = pytest.mark.usefixtures("tiny_bearing")  # for its empty folder


@pytest.fixture(autouse=True)
def without_a_cpp_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def measured(*flags):
    assert benchmark.main([*TINY, "--json=costs.json", *flags]) == 0
    return json.loads(Path("costs.json").read_text(encoding="utf-8"))


def test_every_part_has_its_rows_on_file_and_on_screen(capsys):
    found = measured(*PARTS, "--pe", "none", "spherical", "comrope-ap")
    assert found.keys() == {"device", "torch", "commit", "command", "settings", "rows"}
    rows = {part: [row for row in found["rows"] if row["part"] == part] for part in PARTS}
    vits, ropes = ("none", "spherical", "comrope-ap"), ("spherical", "comrope-ap")
    both_ways = [("encoding, forward and backward", pe, "attention") for pe in ropes]
    memory = [("training step, memory", pe, "none") for pe in vits]
    assert {part: [(row["what"], row["pe"], row["base"]) for row in rows[part]] for part in PARTS} == {
        "step": [("training step", pe, "none") for pe in vits],
        "inference": [("inference", pe, "none") for pe in vits],
        "memory": memory + [("encoding, memory", pe, "q and k") for pe in ropes],
        "tokens": both_ways * 4,
        "peers": [
            (f"{what}, {mode}", "comrope-ap", "torch.matrix_exp")
            for mode in ("eager", "compiled")
            for what in ("forward", "forward and backward")
        ],
    }
    assert {(row["tokens"], row["batch_size"]) for row in rows["tokens"]} == {(64, 64), (256, 16), (1024, 4), (4096, 1)}
    for row in found["rows"]:
        assert "megabytes" in row or (0 < row["low"] <= row["ratio"] <= row["high"] and row["milliseconds"] > 0)
    none, spherical, _, triplets, exponentials = (row["ratio"] for row in rows["memory"])
    assert none == 1 < spherical and 0 < triplets < exponentials
    _, *lines = capsys.readouterr().out.splitlines()
    for line, row in zip(lines, found["rows"], strict=True):
        assert all(text in line for text in (row["what"], row["pe"], f"{row['ratio']:.3f} of {row['base']}"))


def test_decoding_is_compared_with_plain_pillow():
    make_imagenet("photos", n=2)
    for row, what in zip(measured("decoding", "--photos=photos")["rows"], ("random crop", "centre crop"), strict=True):
        assert (row["what"], row["base"], row["images"]) == (what, "Pillow", 12)


def test_defaults_are_all_encodings_and_settings_for_the_device():
    flags = "--device=cpu", "--device=cuda:1 --batch-size=4", "--device=cuda --no-amp"
    cpu, gpu, exact = (benchmark.parse_args(line.split()) for line in flags)
    assert cpu.parts == PARTS[:4] and cpu.pe == list(ENCODINGS)
    assert (cpu.img_size, cpu.batch_size, cpu.amp, cpu.compile) == (32, 32, False, False)
    assert (gpu.img_size, gpu.batch_size, gpu.amp, gpu.compile) == (224, 4, True, True) and not exact.amp


def test_options_reach_every_encoding():
    args = benchmark.parse_args([*TINY, "--pe", "liere", "comrope-ld", "--pe-options", "block_size=4"])
    assert [benchmark.vit_of(pe, args).blocks[0].attn.rope.block_size for pe in args.pe] == [4, 4]
    benchmark.vit_of("none", args)  # which they are compared with


def test_other_ways_to_do_it_give_the_same_rotation():
    for layer in benchmark.layers(benchmark.parse_args([*TINY, "--pe", "axial", "mixed", *EXPONENTIALS])):
        layer.rope.double()
        layer.q, layer.k, layer.pos = layer.q.double(), layer.k.double(), layer.pos.double()
        name, encode, _ = next(benchmark.others(layer))
        assert name == ("torch.matrix_exp" if layer.pe in EXPONENTIALS else "complex numbers")
        torch.testing.assert_close(tuple(encode()), layer.encode(), rtol=0, atol=1e-10)


def test_libraries_that_are_installed_are_peers(monkeypatch):
    """Two that rotate nothing stand in for timm and rotary-embedding-torch."""
    table = torch.zeros(4, 4, 16)
    module = Mock(get_embed=lambda: table, get_axial_freqs=lambda *shape: table, parameters=lambda: [])
    module.to = lambda device: module
    library = Mock(apply_rot_embed_cat=lambda x, table: x.clone(), apply_rotary_emb=lambda table, x: x.clone())
    library.RotaryEmbedding = library.RotaryEmbeddingCat = library.RotaryEmbeddingMixed = lambda *_, **__: module
    for name in "timm.layers", "rotary_embedding_torch":
        monkeypatch.setitem(sys.modules, name, library)
    rows = measured("peers", "--pe", "axial")["rows"]
    names = ["complex numbers", "timm", "rotary-embedding-torch"]
    assert [row["base"] for row in rows] == [name for name in names for _ in range(4)]


def test_a_row_has_median_and_quartiles_of_turns(monkeypatch):
    def compared(run, base, *paces):
        """A row whose functions take these seconds per call (the last one repeats), scaled by a pace for each pair."""

        def taking(seconds):
            seconds = itertools.chain(seconds, itertools.repeat(seconds[-1]))
            return lambda: now.append(now[-1] + next(seconds) * next(pace))

        now, pace = [0.0], itertools.chain(*zip(paces, paces, strict=True), itertools.repeat(1))
        monkeypatch.setattr(benchmark, "now", lambda: now[-1])
        row = benchmark.compare(taking(run), taking(base), benchmark.parse_args(["--device=cpu", "--repeats=5"]))
        assert now[-1] > 5 * 2 * 0.02  # shorter turns, in seconds, would not be exact
        return [row[name] for name in ("ratio", "low", "high", "milliseconds")]

    assert compared([0.5], [0.25]) == pytest.approx([2, 2, 2, 500])
    assert compared([9, 9, 5, 1, 4, 2, 3], [1]) == pytest.approx([3, 2, 4, 3000])  # two calls warm up
    assert compared([0.003], [0.0013]) == pytest.approx([3 / 1.3, 3 / 1.3, 3 / 1.3, 3])  # many calls a turn
    assert compared([3], [2], 1, 1, 1, 5, 2, 30, 7) == pytest.approx([1.5, 1.5, 1.5, 15000])  # a slow moment hits both


def test_peak_memory_is_the_most_held_at_a_time():
    def copies(f):
        return benchmark.peak_memory(f, benchmark.parse_args(["--device=cpu"])) / x.nbytes

    x, kept = torch.randn(1 << 16), [torch.randn(1 << 16)]
    leaf = x.clone().requires_grad_()
    assert copies(lambda: x.neg_()) == 0 and copies(lambda: x.exp()) == 1
    assert copies(lambda: x.exp().exp().exp().exp()) == 2  # the third takes the place of the first
    assert copies(lambda: [x.exp(), x.exp(), x.exp().exp()]) == 4
    assert copies(lambda: (x.exp().exp(), None)[1] or x.exp()) == 2  # the peak is not the end
    assert copies(lambda: torch.autograd.grad(leaf.exp().exp(), leaf, x)) == 4  # two results, each with its gradient
    assert copies(lambda: (kept.append(x.clone()), kept.pop(0))) == 1  # the one held before is not counted


class Applied(torch.nn.Module):
    def __init__(self, f, head_dim, num_heads):
        super().__init__()
        self.f = f

    def forward(self, q, k, pos):
        return self.f(q), self.f(k)


@pytest.mark.parametrize("amp, size", [("--no-amp", 4), ("--amp", 2)])
def test_an_encodings_memory_is_in_units_of_q_and_k(monkeypatch, amp, size):
    monkeypatch.setitem(ENCODINGS, "copy", lambda *sizes: Applied(lambda z: 1 * z, *sizes))
    monkeypatch.setitem(ENCODINGS, "twice", lambda *sizes: Applied(lambda z: z.exp().exp(), *sizes))  # keeps z.exp()
    copy, twice = measured("memory", "--pe", "copy", "twice", amp)["rows"][2:]
    assert copy["ratio"] == copy["megabytes"] == 0 and twice["ratio"] == pytest.approx(1, rel=1e-3)
    assert twice["megabytes"] == pytest.approx(2 * 4096 * 16 * size / 1e6, rel=1e-3)


def test_all_is_compiled_and_nothing_falls_back(monkeypatch):
    """Even for more sizes than torch.compile caches versions of a function (here 3)."""
    compiled, compile_module, parts = set(), torch.nn.Module.compile, PARTS[:4]
    backend = {"backend": lambda graph, inputs: compiled.add(part) or graph}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_module(self, **options | backend))
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for part in parts:
            measured(part, "--compile", "--pe", "axial")
    part = "not compiled"
    measured("step", "inference", "memory", "--pe", "axial")
    assert compiled == set(parts)


def test_what_cannot_be_measured_gets_one_line(capsys, monkeypatch):
    Path("folder").mkdir()
    Path("mine.json").write_text("{}", encoding="utf-8")
    for why, *flags in (
        ("no part speed: choose from step, inference", "speed"),
        ("--pe", "--pe", "rope"),
        ("--pe axial has no option 'block_size'", "--pe", "liere", "axial", "--pe-options", "block_size=4"),
        ("multiple of --patch-size = 4, not 18", "--img-size=18"),
        ("--repeats", "--repeats=1"),
        ("no folder nowhere", "--json=nowhere/costs.json"),
        ("folder", "step", "--pe", "none", "--json=folder"),
        ("not a file of lab.benchmark", "--json=mine.json"),
        ("--device nowhere cannot be used", "--device=nowhere"),
        ("--device meta cannot be used", "--device=meta"),
        ("--head-dim must be at least", "step", "--pe", "spherical", "--head-dim=2"),
        ("multiple of 4 for peers, not 18", "peers", "--pe", "axial", "--head-dim=18"),
        ("none ape has nothing to measure in tokens", "tokens", "--pe", "none", "ape"),
        ("--photos", "decoding", "--photos=nowhere"),
    ):
        assert why in complaint(capsys, benchmark.main, *TINY, *flags)
    monkeypatch.setitem(benchmark.PARTS, "step", Mock(side_effect=torch.OutOfMemoryError))
    assert "smaller --batch-size" in complaint(capsys, benchmark.main, *TINY, "step")


def test_a_stopped_benchmark_leaves_its_rows_on_file(monkeypatch):
    def stopped(args):
        yield {"what": "training step", "pe": "none", "base": "none", "ratio": 1.23456789, "megabytes": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setitem(benchmark.PARTS, "step", stopped)
    assert benchmark.main([*TINY, "--json=costs.json", "step"]) == 130
    (row,) = json.loads(Path("costs.json").read_text(encoding="utf-8"))["rows"]
    assert row["part"] == "step" and row["ratio"] == 1.235
