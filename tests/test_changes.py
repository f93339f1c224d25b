"""Changes that a reader makes to train.py or lab/: they train, stop, and resume to the same bits, or get one line."""

import collections
import enum
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, assert_resumes_to_the_same_end, assert_same, bad, before, interrupted, run, weights
from torch import nn
from torch.optim.swa_utils import AveragedModel

import train
from lab.data import Bearing, Dataset
from lab.datasets import DATASETS
from lab.errors import UserError
from lab.files import plain
from lab.run import load_checkpoint, save_checkpoint
from rope_axial import AxialRoPE
from vit import ENCODINGS, ViT

pytestmark = pytest.mark.usefixtures("tiny_bearing")
CHAPTER = (ROOT / "lab/README.md").read_text(encoding="utf-8").partition("## Change it\n")[2].partition("\n## ")[0]
CHANGES = dict(re.findall(r"^### ([^\n]+)\n.*?```diff\n(.*?)```", CHAPTER, re.MULTILINE | re.DOTALL))
FLAGS = {"Another optimizer": ["--opt=lion"], "A data set": ["--dataset=digits", "--data-dir=."]}
FLAGS["A second loss"] = ["--teacher=teacher"]
SCRIPT = """
import itertools, signal, sys, train
import torch.nn.functional as F
from lab.data import Bearing

def cross_entropy(*args, function=F.cross_entropy, calls=itertools.count(1)):
    if next(calls) == 7:
        signal.raise_signal(signal.SIGINT)
    return function(*args)

Bearing.train_size, Bearing.test_size = 64, 50
assert train.main([*sys.argv[1:], "--out=whole"]) == 0
F.cross_entropy = cross_entropy
assert train.main([*sys.argv[1:], "--out=cut"]) == 130
assert train.main([*sys.argv[1:], "--out=cut", "--resume"]) == 0
"""


def copy_project():
    for path in *ROOT.glob("*.py"), *ROOT.glob("lab/*.py"), *ROOT.glob("lab/*.txt"):
        copy = Path(path.relative_to(ROOT))
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)


@pytest.mark.parametrize("name", CHANGES)
def test_a_documented_change_resumes_to_the_same_bits(name):
    copy_project()
    subprocess.run(["git", "apply"], input=CHANGES[name], encoding="utf-8", check=True)
    draw = np.random.default_rng(0).integers
    images, labels = draw(0, 256, (84, 3, 16, 16), dtype=np.uint8), draw(0, 10, 84)
    np.savez("digits.npz", images=images[:64], labels=labels[:64], test_images=images[64:], test_labels=labels[64:])
    if name == "A second loss":
        assert run("--out=teacher") == 0
    command = [sys.executable, "-c", SCRIPT, *TINY, *FLAGS.get(name, [])]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert_same(weights("whole"), weights("cut"))
    assert name != "Logging elsewhere" or len(Path("cut/log.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_five_changes_are_documented():
    assert len(CHANGES) == 5 and FLAGS.keys() < CHANGES.keys()


class Flat(torch.optim.Optimizer):
    """Momentum for all parameters in one tensor, and whole numbers beside it."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 1e-3})

    @torch.no_grad()
    def step(self):
        ps = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grad = torch.cat([p.grad.flatten() for p in ps])
        state = self.state[ps[0]]
        state["count"] = state.get("count", torch.zeros((), dtype=torch.int64)) + 1
        state["sign"] = grad > 0
        state["flat"] = 0.9 * state.get("flat", 0) + grad
        for p, m in zip(ps, state["flat"].split([p.numel() for p in ps]), strict=True):
            p.sub_(m.view_as(p), alpha=self.param_groups[0]["lr"] / state["count"].item())


class Empty(torch.optim.Optimizer):
    """Signs of gradients; its only memory is a number in its groups."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 1e-3, "count": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"] / group["count"])


class Rows(torch.optim.Optimizer):
    """A second moment for each row of a matrix, and for each entry of anything else (as in Adam-mini)."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 1e-3})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                square = p.grad.square()
                self.state[p]["v"] = v = square.mean(dim=1) if p.dim() == 2 else square
                p.sub_(p.grad / (v.unsqueeze(-1) if p.dim() == 2 else v).add(1e-8).sqrt(), alpha=group["lr"])


def muon(groups):
    """Its own optimizer takes matrices only."""
    ps = [p for group in groups for p in group["params"]]
    for p in ps:
        p.requires_grad_(p.dim() == 2)
    return torch.optim.Muon([p for p in ps if p.dim() == 2], lr=1e-3)


NAMES = "SGD", "Adagrad", "RMSprop", "Adafactor", "Adamax", "ASGD", "Rprop", "NAdam", "RAdam"
OPTIMIZERS = {name: getattr(torch.optim, name) for name in NAMES} | {
    "Muon": muon,
    "Flat": Flat,
    "Empty": Empty,
    "Rows": Rows,
}
OPTIMIZERS["momentum"] = partial(torch.optim.SGD, momentum=0.9)
OPTIMIZERS["AMSGrad"] = partial(torch.optim.Adam, amsgrad=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_resumes_to_the_same_bits(name, monkeypatch):
    monkeypatch.setitem(train.OPTIMIZERS, "new", (OPTIMIZERS[name], 1e-3))
    assert_resumes_to_the_same_end("--opt=new", "--pe=spherical-learned", "--epochs=2")


def test_a_groups_own_rate_follows_the_schedule(monkeypatch):
    def own_rates(args, model, make=train.make_optimizer):
        optimizer = make(args, model)
        optimizer.param_groups[1]["lr"] *= 10
        return optimizer

    monkeypatch.setattr(train, "make_optimizer", own_rates)
    rates = []
    with before(torch.optim.AdamW, "step", lambda o: rates.append([group["lr"] for group in o.param_groups])):
        assert_resumes_to_the_same_end()
    assert len({a for a, _ in rates}) > 4 and all(b == pytest.approx(10 * a) for a, b in rates)


def changed_vit(monkeypatch, change):
    """train.py builds a ViT to which change(model) is done."""

    def make(**options):
        model = ViT(**options)
        change(model)
        return model

    monkeypatch.setattr(train, "ViT", make)


def freeze(model):
    model.patch_embed.requires_grad_(False)


def add_unused(model):
    model.unused = nn.Parameter(torch.ones(3))


def use_now_and_then(model):
    model.rare, steps = nn.Parameter(torch.ones(1)), []

    def sometimes(module, args, logits):
        steps.append(module.training)
        return logits * module.rare if torch.rand(()) < 0.3 else logits

    model.register_forward_hook(sometimes)


def add_buffers(model):
    model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    for dtype in torch.bool, torch.int64, torch.bfloat16, torch.complex64, torch.uint8:
        model.register_buffer(f"a_{str(dtype)[6:]}", torch.ones(2, dtype=dtype))


def share(model):
    model.blocks[1].mlp = model.blocks[0].mlp


def transpose(model):
    weight = model.head.weight
    model.head.weight = nn.Parameter(weight.detach().T.contiguous().T)


@pytest.mark.parametrize("change", [freeze, add_unused, use_now_and_then, add_buffers, share, transpose])
def test_unusual_parameters_resume_to_the_same_bits(change, monkeypatch):
    changed_vit(monkeypatch, change)
    assert_resumes_to_the_same_end()


def add_parameter(model):
    model.extra = nn.Parameter(torch.ones(1))


def more_classes(model):
    model.head = nn.Linear(24, 9)


@pytest.mark.parametrize(
    "change, says",
    [
        (add_parameter, 'Missing key(s) in state_dict: "extra"'),
        (more_classes, "size mismatch for head.weight"),
    ],
)
def test_a_changed_model_gets_one_line_that_names_the_change(change, says, monkeypatch, capsys):
    interrupted("--out=a")
    changed_vit(monkeypatch, change)
    line = bad(capsys, "--out=a", "--resume")
    assert "a/last.pt does not fit this model, which has changed since: " in line and says in line


def reorder(model):
    model.blocks = model._modules.pop("blocks")  # now the last


def test_moments_never_go_to_another_parameter(monkeypatch, capsys):
    interrupted("--out=a")
    changed_vit(monkeypatch, reorder)
    assert "its parameters were others, or in another order" in bad(capsys, "--out=a", "--resume")


def add_flag(monkeypatch, *names, **options):
    def add(parser, function=train.add_device_flags):
        function(parser)
        parser.add_argument(*names, **options)

    monkeypatch.setattr(train, "add_device_flags", add)


Colour = enum.Enum("Colour", "RED BLUE")


@dataclass
class Range:
    low: float
    high: float = 1.0


NEW_FLAGS = {  # type, default, another value
    "--path": (Path, Path("a"), "b"),
    "--enum": (Colour.__getitem__, Colour.RED, "BLUE"),
    "--dataclass": (lambda text: Range(float(text)), Range(0.0), "1"),
    "--set": (lambda text: set(text.split(",")), {1, 2}, "3,4"),
    "--tuple": (lambda text: tuple(text.split(",")), (1, 2), "3,4"),
    "--function": (partial(getattr, F), F.relu, "silu"),
    "--number": (np.float32, np.float32(1), "2"),
    "--nan": (float, float("nan"), "2"),
}


def test_flags_of_any_type_resume_and_are_compared(monkeypatch, capsys):
    for name, (kind, default, _) in NEW_FLAGS.items():
        add_flag(monkeypatch, name, type=kind, default=default)
    for out, flags in ("default", []), ("typed", [f"{name}={typed}" for name, (*_, typed) in NEW_FLAGS.items()]):
        interrupted(f"--out={out}", *flags)
        assert run(f"--out={out}", "--resume", *flags) == 0
    line = bad(capsys, "--out=typed", "--resume")
    assert all(f"{name} was " in line for name in NEW_FLAGS)


def test_a_set_is_compared_by_what_it_holds():
    sets = {"set": {"b", "c", "a"}, "frozen": frozenset("bca")}
    assert plain(sets | {"path": Path("a")}) == {"set": [*"abc"], "frozen": [*"abc"], "path": "a"}


def test_runs_older_than_a_flag_resume_and_say_its_value(monkeypatch, capsys):
    interrupted("--out=a")
    add_flag(monkeypatch, "--smoothing", type=float, default=0.1)
    assert run("--out=a", "--resume") == 0
    assert "a/last.pt is older than --smoothing, which is 0.1 from here on\n" in capsys.readouterr().out


CONFIG = {"pe": "none", "dataset": "bearing", "seed": 0}


def state(**more):
    model = nn.Linear(2, 2)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters()), "log": []} | more


def test_what_is_in_the_state_comes_back_in_place(tmp_path):
    def make():
        ema, rows = AveragedModel(nn.Linear(2, 2)), [{"loss": 1.0}]
        weights = nn.Linear(2, 2)
        return state(ema=ema, dict=weights.state_dict(), tensor=torch.rand(3), rows=rows), (ema, weights, rows)

    saved, others = make()
    others[2].append({"loss": 2.0})
    saved |= {"longer": torch.ones(3), "finer": torch.tensor(0.7)}  # which began as in loaded
    save_checkpoint(tmp_path, saved, CONFIG, vit={}, data={})
    loaded, found = make()
    tensor = loaded["tensor"]
    loaded |= {"longer": torch.zeros(0), "finer": torch.tensor(0)}
    load_checkpoint(tmp_path, loaded, CONFIG)
    for a, b in zip(others[:2], found[:2], strict=True):
        assert_same(a.state_dict(), b.state_dict())
    assert found[2] == others[2] and tensor is loaded["tensor"]
    for name in "tensor", "longer", "finer":
        torch.testing.assert_close(loaded[name], saved[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, value",
    [
        ("log", [{"loss": 1.0}, {"loss": np.float32(1)}]),
        ("generator", torch.Generator()),
        ("recent", collections.deque([1])),
        ("act", lambda x: x),
        ("data", {"a": 1}),  # which a checkpoint has itself
        ("deep", {"path": [Path("a")]}),
    ],
)
def test_what_cannot_be_read_back_is_named_and_not_saved(name, value, tmp_path):
    save_checkpoint(tmp_path, state(), CONFIG, vit={}, data={})
    before = (tmp_path / "last.pt").read_bytes()
    where = {"log": "['log'][1]['loss'], a numpy.float32", "deep": "['deep']['path'][0], a pathlib"}
    with pytest.raises(UserError, match=re.escape(f"a checkpoint cannot hold state{where.get(name, f'[{name!r}]')}")):
        save_checkpoint(tmp_path, state(**{name: value}), CONFIG, vit={}, data={})
    assert (tmp_path / "last.pt").read_bytes() == before


class Squares(Dataset):
    num_classes, img_size = 3, 8

    def read(self):
        images, labels = torch.arange(3)[:, None, None, None].expand(3, 3, 8, 8).byte() * 100, torch.arange(3)
        return (images.repeat(30, 1, 1, 1), labels.repeat(30)), (images, labels)


def test_a_data_set_is_a_class_and_a_line(monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, "squares", Squares)
    assert train.parse_args(["--dataset=squares"]).epochs == train.parse_args(["--dataset=bearing"]).epochs
    assert_resumes_to_the_same_end("--dataset=squares")
    assert weights("whole")["step"] == 3 * (90 // 16)
    monkeypatch.setattr(Squares, "num_classes", 2)
    assert "labels are 0 to 2, but num_classes is 2" in bad(capsys, "--dataset=squares", "--out=b")


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda x, y: (x / 255, y), "images (3, 3, 8, 8) float32 and 3 labels"),
        (lambda x, y: (x.movedim(1, -1), y), "images (3, 8, 8, 3) uint8 and 3 labels"),
        (lambda x, y: (x, y[:2]), "images (3, 3, 8, 8) uint8 and 2 labels"),
    ],
)
def test_a_data_set_of_another_form_is_refused(change, found, monkeypatch, capsys):
    train_set, test_set = Squares(".").read()
    monkeypatch.setattr(Squares, "read", lambda self: (train_set, change(*test_set)))
    monkeypatch.setitem(DATASETS, "squares", Squares)
    line = bad(capsys, "--dataset=squares", "--out=a")
    assert f"read() must return images (N, 3, S, S) uint8 and N labels, not {found}\n" in line


def test_grey_images_are_shown_to_all_channels(monkeypatch):
    train_set, test_set = Squares(".").read()
    monkeypatch.setattr(Squares, "read", lambda self: tuple((x[:, :1], y) for x, y in (train_set, test_set)))
    monkeypatch.setitem(DATASETS, "squares", Squares)
    assert run("--dataset=squares", "--out=a") == 0


def test_draws_from_numpy_and_python_resume_to_the_same_bits():
    def flip_some(data, step):
        data.flipped = np.random.rand() < 0.5, random.random() < 0.5

    def flipped(data, images):
        return images.flip([dim for dim, flip in zip((2, 3), data.flipped, strict=True) if flip])

    normalise = Bearing.normalise
    with pytest.MonkeyPatch.context() as patch, before(Bearing, "train_batch", flip_some):
        patch.setattr(Bearing, "flipped", (False, False), raising=False)
        patch.setattr(Bearing, "normalise", lambda data, images: normalise(data, flipped(data, images)))
        assert_resumes_to_the_same_end()


def test_an_option_that_the_vit_would_take_is_refused(monkeypatch, capsys):
    class Dropped(AxialRoPE):
        def __init__(self, head_dim, num_heads, *, dropout=0.0):
            super().__init__(head_dim, num_heads)

    monkeypatch.setitem(ENCODINGS, "dropped", Dropped)
    assert "ViT has an option dropout, too" in bad(capsys, "--pe=dropped", "--out=a")


def test_a_run_that_stops_early_has_a_result():
    copy_project()
    text, line = Path("train.py").read_text(encoding="utf-8"), '                state["sums"].zero_()\n'
    assert text.count(line) == 1
    Path("train.py").write_text(text.replace(line, line + "                break\n"), encoding="utf-8")
    command = "import sys, train; from lab.data import Bearing; Bearing.train_size = 64; sys.exit(train.main())"
    subprocess.run([sys.executable, "-c", command, *TINY, "--out=a"], check=True)
    assert Path("a/result.json").exists()


def test_a_recipe_is_shown_and_its_misspelt_flag_named(monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, "squares", Squares)
    monkeypatch.setitem(train.RECIPES, "squares", {"epochs": 77, "weight_decay": 0.3, "jitter": 0.5})
    args = train.parse_args(["--dataset=squares"])
    assert (args.epochs, args.weight_decay, args.jitter, args.shift) == (77, 0.3, 0.5, 0)
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "squares 77" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setitem(train.RECIPES, "squares", {"epoch": 77})
    with pytest.raises(AttributeError, match="epoch"):
        train.parse_args(["--dataset=squares"])
