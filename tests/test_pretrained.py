"""Weights that others have published: recognised by names and shapes, computed as timm does, never run as code.

pretrained_timm.npz holds logits of timm's own code, 1.0.31 with torch 2.13 on a CPU, made with this file's stand_in:

    from timm.layers import resample_abs_pos_embed
    from timm.models.eva import Eva

    rope = {"axial": {"rope_temperature": 100.0}, "mixed-ape": {"rope_temperature": 10.0, "rope_type": "mixed"}}
    logits = {}
    for kind, options in rope.items():
        weights = {name: torch.from_numpy(x) for name, x in stand_in(kind).items()}
        for height, width in SIZES:
            model = Eva(
                img_size=(height, width), patch_size=4, num_classes=10, embed_dim=48, depth=2, num_heads=2,
                mlp_ratio=4, attn_type="rope", init_values=1e-5, class_token=True, global_pool="token",
                no_embed_class=True, use_abs_pos_emb=kind.endswith("ape"), use_rot_pos_emb=True,
                rope_grid_indexing="xy", **options,
            ).eval()
            fitting = dict(weights)
            if kind.endswith("ape"):
                fitting["pos_embed"] = resample_abs_pos_embed(
                    weights["pos_embed"], [height // 4, width // 4], [8, 8], num_prefix_tokens=0
                )
            model.load_state_dict(fitting)
            with torch.no_grad():
                logits[f"{kind} {height}x{width}"] = model(images(height, width)).numpy()
    np.savez("tests/pretrained_timm.npz", **logits)
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Call, assert_same, complaint, make_imagenet, small_vit

import train
from lab import evaluate, figures, pretrained
from lab.files import read_json
from lab.run import read_run
from lab.weights import read_weights
from vit import ViT

SIZES = (32, 32), (48, 48), (32, 40)
LOGITS = np.load(Path(__file__).parent / "pretrained_timm.npz")
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16"}


def stand_in(kind="axial", classes=10):
    """A file's arrays: RoPE-ViT's in timm, of two layers with two heads. Strong weights, so that positions matter."""
    shapes = {"cls_token": (1, 1, 48), "patch_embed.proj.weight": (48, 3, 4, 4), "patch_embed.proj.bias": (48,)}
    for block in "blocks.0.", "blocks.1.":
        layers = {"norm1": (48,), "attn.qkv": (144, 48), "attn.proj": (48, 48)}
        layers |= {"norm2": (48,), "mlp.fc1": (192, 48), "mlp.fc2": (48, 192)}
        shapes |= {f"{block}gamma_{i}": (48,) for i in (1, 2)}
        shapes |= {f"{block}{layer}.weight": shape for layer, shape in layers.items()}
        shapes |= {f"{block}{layer}.bias": shape[:1] for layer, shape in layers.items()}
    shapes |= {"norm.weight": (48,), "norm.bias": (48,), "head.weight": (classes, 48), "head.bias": (classes,)}
    if kind.startswith("mixed"):
        shapes["rope.freqs"] = (2, 2, 2, 12)
    if kind.endswith("ape"):
        shapes["pos_embed"] = (1, 64, 48)
    random, arrays = np.random.RandomState(0), {}  # whose numbers will never change
    for name, shape in sorted(shapes.items()):
        scale = 2 * np.prod(shape[1:]) ** -0.5 if name.endswith("weight") and len(shape) > 1 else 0.5
        arrays[name] = (scale * random.standard_normal(shape)).astype(np.float32)
    return arrays


def images(height, width):
    return torch.from_numpy(np.random.RandomState(1).standard_normal((3, 3, height, width)).astype(np.float32))


def write(path, arrays, **change):
    """A .safetensors file; change(header) before it is written."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, x in arrays.items():
        header[name] = {"dtype": DTYPES[str(x.dtype)], "shape": x.shape, "data_offsets": [offset, offset + x.nbytes]}
        offset += x.nbytes
    for name, about in change.items():
        header[name.replace("_weight", ".weight")] |= about
    text = json.dumps(header).encode()
    data = b"".join(x.astype(x.dtype.newbyteorder("<")).tobytes() for x in arrays.values())
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return Path(path)


def converted(path, *flags):
    assert pretrained.main([str(path), "--out=run", "--heads=2", *flags]) == 0
    _, model = read_run(Path("run"))
    return model.eval()


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["axial", "mixed-ape"])
@pytest.mark.parametrize("height, width", SIZES)
def test_logits_are_those_of_timms_own_code_at_any_size(kind, height, width):
    model, x = converted(write("a.safetensors", stand_in(kind))), images(height, width)
    logits, exact = model(x), model.double()(x.double())
    timms = torch.from_numpy(LOGITS[f"{kind} {height}x{width}"])
    rounding = (logits - exact).abs().max()  # both round, not alike
    assert (timms - exact).abs().max() < 8 * rounding < 1e-4 * exact.std()
    rows_moved = x.unflatten(2, (-1, 4)).roll(1, dims=2).flatten(2, 3)
    assert (model(rows_moved.double()) - exact).abs().max() > 0.1 * exact.std(), "positions matter"


@torch.no_grad()
@pytest.mark.parametrize("wrong", [{"pos_unit": "image"}, {"theta": 100.0}])
def test_logits_tell_another_unit_or_theta(wrong):
    vit, weights = read_weights(write("a.safetensors", stand_in()), heads=2)
    other = ViT(**vit | wrong).eval()
    other.load_state_dict(weights)
    timms = torch.from_numpy(LOGITS["axial 48x48"])
    assert (other(images(48, 48)) - timms).abs().max() > 0.1 * timms.std()


@pytest.mark.parametrize("kind", ["axial", "axial-ape", "mixed", "mixed-ape"])
def test_names_and_shapes_tell_which_model_it_is(kind):
    vit, _ = read_weights(write("a.safetensors", stand_in(kind)), heads=None if "mixed" in kind else 2)
    told = {"pe": kind.split("-")[0], "num_heads": 2, "head_dim": 24, "depth": 2, "num_classes": 10}
    assert told.items() <= vit.items() and vit.get("ape", False) == kind.endswith("ape")
    assert vit["img_size"] == (32 if kind.endswith("ape") else 14 * 4)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_plain_vit_of_timm_is_an_absolute_embedding(pool):
    vit = small_vit("ape", pool=pool)
    torch.save(vit.state_dict(), "a.pth")
    assert torch.equal(converted("a.pth")(images(32, 40)), vit(images(32, 40)))


def of_the_authors(arrays):
    """The same weights as the authors' code saves them."""
    weights = {name: torch.from_numpy(x) for name, x in arrays.items()}
    weights["freqs"] = weights.pop("rope.freqs").flatten(2)
    weights |= {"freqs_t_x": torch.arange(64.0), "freqs_t_y": torch.arange(64.0)}
    return {"model": weights, "args": argparse.Namespace(lr=0.1), "epoch": 400}


def test_all_formats_hold_the_same_weights():
    arrays = stand_in("mixed-ape")
    _, want = read_weights(write("a.safetensors", arrays))
    weights = {name: torch.from_numpy(x) for name, x in arrays.items()}
    write("double.safetensors", {name: x.astype(np.float64) for name, x in arrays.items()})
    torch.save(weights, "a.bin")
    torch.save({"state_dict": weights}, "b.pth")
    torch.save(of_the_authors(arrays), "authors.pth")
    for name in "double.safetensors", "a.bin", "b.pth", "authors.pth":
        assert_same(read_weights(Path(name), heads=2)[1], want, name)


@pytest.mark.parametrize("name, dtype", [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_half_precision_is_read_as_the_numbers_it_is(name, dtype):
    arrays = stand_in() | {"cls_token": np.linspace(0.5, 2, 48, dtype=np.float16).reshape(1, 1, 48)}
    _, weights = read_weights(write("a.safetensors", arrays, cls_token={"dtype": name}), heads=2)
    want = torch.from_numpy(arrays["cls_token"]).view(dtype).float()
    assert torch.equal(weights["cls_token"], want) and weights["cls_token"].dtype == torch.float32


def test_which_of_two_alike_a_file_is_can_be_said():
    """DeiT III's own files have RoPE-ViT's names."""
    path = write("a.safetensors", stand_in("axial-ape"))
    assert read_weights(path, heads=2)[0]["pe"] == "axial"
    vit, weights = read_weights(path, heads=2, pe="ape")
    assert vit["pe"] == "ape" and "theta" not in vit and not weights["pos_embed"][:, 0].any()


@pytest.fixture
def knows_imagenet():
    """The run of a model whose answer is always the last but one of ImageNet's classes, n13133613."""
    arrays = stand_in(classes=1000)
    arrays["head.bias"][998] = 1e6
    return converted(write("a.safetensors", arrays))


def test_a_folder_of_some_of_imagenets_classes_is_mapped_by_name(knows_imagenet, capsys):
    make_imagenet("in", n=4, classes=["n15075141", "n01440764", "n13133613"])
    for i in range(3):  # 1 of 9 images is left of the class that it answers
        Path(f"in/val/n13133613/{i}.jpeg").unlink()
    flags = ["run", "--data-dir=in", "--device=cpu", "--workers=0"]
    assert evaluate.main([*flags, "--sizes", "48", "--shift", "2"]) == 0
    assert read_json(Path("run/evaluation.json"))["accuracies"] == {
        "test": {"test": 11.11},
        "size": {"48": 11.11},
        "shift": {"2": 11.11},
    }
    assert figures.main(["run", "--out=pictures"]) == 0
    for part in "train", "val":
        Path(f"in/{part}/n13133613").rename(f"in/{part}/ear")
    line = complaint(capsys, evaluate.main, *flags)
    assert "run knows ImageNet's classes, in has others, such as ear: name folders as ImageNet's" in line


def test_classes_that_are_not_known_are_not_guessed(capsys):
    converted(write("a.safetensors", stand_in()))
    make_imagenet("in", n=1)
    line = complaint(capsys, evaluate.main, "run", "--data-dir=in", "--device=cpu", "--workers=0")
    assert "run was trained on 10 classes that are not known here" in line


@pytest.mark.parametrize("pe", ["mixed", "spherical"])
def test_a_run_starts_from_a_file_or_its_folder_alike(pe, tiny_bearing):
    published = converted(write("a.safetensors", stand_in("mixed-ape"))).state_dict()
    flags = "--dataset=bearing", "--device=cpu", "--batch-size=16", "--epochs=1", "--lr=1e-60", f"--pe={pe}"
    for start in "run", "a.safetensors":
        assert train.main([*flags, f"--init={start}", f"--out={start}-tuned"]) == 0
        _, tuned = read_run(Path(f"{start}-tuned"))
        new = ("head.",) if pe == "mixed" else ("head.", "attn.rope.")
        kept = {name: x for name, x in tuned.state_dict().items() if not any(part in name for part in new)}
        assert_same(kept, {name: published[name] for name in kept})
        assert len(tuned.head.bias) == 8 and tuned.pos_unit == "patch" and tuned.pos_embed is not None


def truncated(n):
    return lambda: Path("a").write_bytes(write("b", stand_in()).read_bytes()[:n])


def changed(**change):
    return lambda: write("a", stand_in(), **change)


def with_arrays(**more):
    return lambda: write("a", stand_in() | {name: np.float32(x) for name, x in more.items()})


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: None, "there is no a: name a run's folder, or a file of weights"),
        (truncated(0), "a holds no weights that can be read"),
        (truncated(5), "a holds no weights that can be read"),
        (truncated(500), "a holds no weights that can be read"),
        (truncated(-4), "cannot be bytes"),
        (lambda: Path("a").write_bytes(b"\xff" * 8 + b"{}12345678"), "a holds no weights that can be read"),
        (lambda: Path("a").write_bytes(b"\2" + bytes(7) + b"{}"), "it has nothing, but no 'patch_embed.proj.weight'"),
        (
            lambda: Path("a").write_text("<!doctype html>", encoding="utf-8"),
            "(neither .safetensors nor a pickle of tensors alone)",
        ),
        (
            changed(head_weight={"data_offsets": [0, 1 << 40]}),
            "head.weight [10, 48] cannot be bytes 0 to 1099511627776",
        ),
        (changed(head_weight={"data_offsets": [-1920, 0]}), "cannot be bytes -1920 to 0"),
        (changed(head_weight={"data_offsets": 3}), "a holds no weights that can be read"),
        (changed(head_weight={"shape": [10, 49]}), "head.weight [10, 49] cannot be bytes"),
        (changed(head_weight={"shape": [-10, -48]}), "a holds no weights that can be read"),
        (
            changed(head_weight={"shape": [48, 10]}),
            "looks like pe=axial, but has head.bias (10,), head.weight (48, 10) and lacks head.bias",
        ),
        (changed(head_weight={"dtype": "I64"}), "head.weight has the unknown dtype I64"),
        (with_arrays(cls_token=np.full((1, 1, 48), np.nan)), "a holds NaN or infinity, in cls_token"),
        (with_arrays(reg_token=np.ones((1, 4, 48))), "but has reg_token (1, 4, 48) and lacks nothing"),
        (with_arrays(**{"rope.freqs": np.ones((2, 2, 3, 8))}), "rope.freqs is of 3 heads, --heads says 2"),
        (lambda: torch.save(Call(os.mkdir, "harm"), "a"), "nor a pickle of tensors alone"),
        (lambda: torch.save({"model": Call(os.mkdir, "harm")}, "a"), "nor a pickle of tensors alone"),
        (lambda: torch.save([1, 2], "a"), "a holds no weights that can be read"),
        (
            lambda: torch.save({"conv1.weight": torch.ones(2, 2)}, "a"),
            "it has conv1.weight, but no 'patch_embed.proj.weight'",
        ),
        (
            lambda: torch.save({"patch_embed.proj.weight": torch.ones(2, 2)}, "a"),
            "known here: not enough values to unpack",
        ),
    ],
)
def test_bad_files_get_one_line_and_write_nothing(make, says, capsys):
    make()
    assert says in complaint(capsys, pretrained.main, "a", "--out=run", "--heads=2")
    assert not Path("run").exists() and not Path("harm").exists()


def test_what_a_file_does_not_say_is_asked_for_and_checked(capsys):
    write("a", stand_in())
    write("b", {name: x for name, x in stand_in().items() if not name.startswith("blocks.1.mlp")})
    assert "5 heads cannot share a width of 48: add --heads N" in complaint(
        capsys, pretrained.main, "a", "--out=run", "--heads=5"
    )
    write("c", stand_in("mixed"))
    says = "has the frequencies of mixed, --pe says axial"
    assert says in complaint(capsys, pretrained.main, "c", "--out=run", "--pe=axial")
    line = complaint(capsys, pretrained.main, "b", "--out=run", "--heads=2")
    assert "but has nothing and lacks blocks.1.mlp.fc1.bias (192,), blocks.1.mlp.fc1.weight (192, 48), " in line
    converted("a")
    assert "choose another folder with --out" in complaint(capsys, pretrained.main, "a", "--out=run")
