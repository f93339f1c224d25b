"""lab.explore: mouse and keys do what the window says, and what it shows is what encodings and models compute."""

from functools import partial
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import complaint, make_imagenet, run
from matplotlib.backend_bases import KeyEvent, MouseEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from lab import explore
from lab.data import CIFAR100, Bearing
from lab.errors import UserError
from lab.explore import HEAD_DIM, PATCH, Encodings, chosen
from lab.imagenet import imagenet_classes
from lab.pictures import SKY
from lab.rotations import grid
from vit import ENCODINGS


class Sixth(torch.nn.Module):
    """An encoding with no more than the contract: channels 0 and 5 turn with x and y, the others not at all."""

    def __init__(self, head_dim, num_heads):
        super().__init__()
        self.head_dim = head_dim

    def rotation(self, pos):
        A = torch.zeros(self.head_dim, self.head_dim, dtype=pos.dtype)
        A[0, 5], A[5, 0] = -1, 1
        return torch.matrix_exp((pos[:, 0] + 2 * pos[:, 1])[:, None, None] * A)[None]

    def rotate(self, x, pos):
        return (self.rotation(pos).to(x.dtype) @ x[..., None])[..., 0]

    def forward(self, q, k, pos):
        return self.rotate(q, pos), self.rotate(k, pos)


def shown(page):
    """The page on a canvas, as if in a window."""
    page.figure.canvas.draw()
    return page


def canvas():
    figure = Figure(explore.SIZE)
    FigureCanvasAgg(figure)
    return figure


def mouse(axes, x, y, *names, to=None):
    """Press the left button at x, y of the axes, and drag to another point."""
    for name, at in (("button_press_event", (x, y)), ("motion_notify_event", to or (x, y))):
        pixels = axes.transData.transform(at)
        event = MouseEvent(name, axes.figure.canvas, *pixels, button=1)
        axes.figure.canvas.callbacks.process(name, event)
    event = MouseEvent("button_release_event", axes.figure.canvas, *pixels, button=1)
    axes.figure.canvas.callbacks.process(event.name, event)


def key(page, name):
    page.figure.canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", page.figure.canvas, name))


def maps(column):
    return [torch.from_numpy(image.get_array().data.copy()).flatten() for image in column.images]


def assert_scores(page, query, group=0):
    """All maps show q^T R(p)^T R(p') q / |q|^2, with positions shifted and scaled as the sliders say."""
    shift, factor = page.shift(), page.sliders[2].val
    at = torch.arange(0, 61 * 61, 97)
    for column in page.columns:
        places = torch.cat([torch.tensor([query]), grid(61, 10)[at]])
        R = column.rope.rotation(factor * PATCH * (places + shift))[0]
        channels = column.groups[group % len(column.groups)]
        assert [dot.get_xydata().tolist()[0] for dot in column.dots] == [pytest.approx(query)] * 2
        for found, part in zip(maps(column), [channels, range(HEAD_DIM)], strict=True):
            z = torch.zeros(HEAD_DIM)
            z[list(part)] = page.z[list(part)]
            want = (R[1:] @ z) @ (R[0] @ z) / z.square().sum()
            torch.testing.assert_close(found[at], want, rtol=0, atol=1e-9)


@pytest.fixture
def page(float64):
    makes = {pe: ENCODINGS[pe] for pe in ("axial", "mixed", "spherical")} | {"sixth": Sixth}
    return shown(Encodings(canvas(), {name: make(HEAD_DIM, 1) for name, make in makes.items()}))


def test_the_query_moves_in_all_maps_to_where_one_clicks_or_drags(page):
    assert len(page.columns) == 4 and page.columns[3].groups == [[0, 5]]
    assert_scores(page, [0.0, 0.0])
    mouse(page.columns[1].axes[1], 3, -2)
    assert_scores(page, [3.0, -2.0])
    mouse(page.columns[3].axes[0], 3, -2, to=(-7, 4.5))
    assert_scores(page, [-7.0, 4.5])
    dragged = bytes(page.figure.canvas.buffer_rgba())
    page.figure.canvas.draw()
    assert dragged == bytes(page.figure.canvas.buffer_rgba())


def test_a_shift_changes_only_what_is_not_equivariant(page):
    mouse(page.columns[0].axes[0], 3, -2)
    for name, control in zip("xy", page.sliders, strict=False):
        before = [maps(column)[1] for column in page.columns]
        mouse(control.ax, 0, 0.5, to=(5, 0.5))
        assert_scores(page, [3.0, -2.0])
        for column, old in zip(page.columns, before, strict=True):
            changed = (maps(column)[1] - old).abs().max()
            if "spherical" in column.axes[0].get_title() and name == "y":
                assert changed > 0.1 and column.change.get_text() == f"{changed:.2f}"
            else:
                assert changed < 1e-9 and column.change.get_text() == "0.00"
    assert [control.val for control in page.sliders] == [5, 5, 1]


def test_keys_and_the_factor_do_what_the_window_says(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    q = page.z
    mouse(page.columns[0].axes[0], 3, -2)
    mouse(page.sliders[0].ax, 0, 0.5, to=(-3, 0.5))
    mouse(page.sliders[2].ax, 1, 0.5, to=(2, 0.5))
    key(page, "g")
    assert page.sliders[2].val == pytest.approx(2, abs=0.05)
    assert_scores(page, [3.0, -2.0], group=1)
    assert page.columns[0].axes[0].get_xlabel() == "channels 2-3"
    key(page, "n")
    assert not torch.equal(page.z, q)
    assert_scores(page, [3.0, -2.0], group=1)
    key(page, "r")
    assert page.sliders[2].val == 1 and not page.shift().any()
    assert_scores(page, [0.0, 0.0])
    for i in 1, 2:
        key(page, "s")
        assert Image.open(f"explore-{i}.png").size == (1400, 800)


def test_all_encodings_are_shown_unless_some_are_named(monkeypatch):
    monkeypatch.setitem(ENCODINGS, "sixth", Sixth)
    names = {name.partition(",")[0] for name in chosen(None)}
    assert names == {name for name, make in ENCODINGS.items() if make}
    assert list(chosen(["spherical", "mixed"])) == ["mixed", "spherical"] and len(chosen(["liere"])) == 2
    monkeypatch.setitem(ENCODINGS, "sixth", partial(ENCODINGS["comrope-ap"], block_size=32))
    with pytest.raises(UserError, match="block_size must be a whole number from 2 to head_dim = 24"):
        chosen(None)


# A trained model


def opened(out, *flags):
    """The page of a run."""
    return shown(explore.trained(canvas(), explore.parse_args([out, *flags])))


def independent(page, pos):
    """(logits, weights (H, T, T) by layer), the weights from what each attention layer is given."""
    layers = []

    def record(attn, inputs):
        q, k, _ = attn.qkv(inputs[0]).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if attn.rope is not None:
            R = attn.rope.rotation(inputs[1].double())
            q, k = ((R @ x[..., None])[..., 0] for x in (q, k))
        layers.append(torch.softmax(torch.einsum("bhsd,bhtd->bhst", q, k) / q.shape[-1] ** 0.5, -1)[0])

    hooks = [block.attn.register_forward_pre_hook(record) for block in page.model.blocks]
    logits = page.model(page.normalise(page.image), pos)[0]
    for hook in hooks:
        hook.remove()
    return logits, layers


def assert_shows(page, token, layer, pos):
    """The page shows this layer's attention from patch x, y and the class token, and the best classes."""
    logits, layers = independent(page, pos)
    n, prefix = page.side, page.prefix
    rows = [prefix + token[1] * n + token[0], 0][: 1 + prefix]
    want = [layers[layer][head, row, prefix:] for row in rows for head in range(2)]
    assert len(page.weights) == len(want)
    for image, weights in zip(page.weights, want, strict=True):
        found = torch.from_numpy(image.get_array().data).flatten()
        torch.testing.assert_close(found, weights, rtol=0, atol=1e-10)
        assert f"{100 * weights.max():.1f} %" in image.axes.get_title()
    assert all(square.get_xy() == (token[0] - 0.5, token[1] - 0.5) for square in page.squares)
    p, classes = logits.softmax(0).topk(5)
    texts = [f"{page.names[i]}  {100 * share:.1f} %" for share, i in zip(p, classes, strict=True)]
    assert [text.get_text() for _, text in page.best] == texts
    assert [bar.get_width() for bar, _ in page.best] == pytest.approx(p.tolist())


def test_a_model_shows_its_own_attention_and_predictions_at_any_shift(tiny_bearing, default_dtype):
    assert run("--pe=spherical", "--epochs=1", "--out=run") == 0
    default_dtype(torch.float64)
    page = opened("run")
    image, label = next(Bearing(batch_size=1).test_batches(batch_size=1))
    torch.testing.assert_close(page.normalise(page.image), image, rtol=0, atol=1e-10)
    pixels = page.pixels.get_array().reshape(-1, 3).round(6).tolist()
    assert [1, 0, 0] in pixels and page.picture.get_title() == f"test image 1: {Bearing.class_names[label]}"
    for block in page.model.blocks:  # far from uniform
        block.attn.qkv.weight.mul_(8)
    page.compute()
    pos = page.model.positions(8, 8)
    assert_shows(page, (4, 4), 0, pos)
    mouse(page.picture, 2.4, 6.6)
    mouse(page.maps[3], 2, 6, to=(5, 1))
    key(page, "right")
    assert_shows(page, (5, 1), 1, pos)
    assert "Layer 2 of 2" in page.figure.get_suptitle()
    mouse(page.sliders[1].ax, 0, 0.5, to=(3, 0.5))
    moved = pos + page.model.spacing * torch.tensor([0.0, 3.0])
    assert_shows(page, (5, 1), 1, moved)
    box = page.along.ax.transAxes + page.along.ax.transData.inverted()
    mouse(page.along.ax, *box.transform((0.15, 0.5)))
    moved[0] = 0
    assert_shows(page, (5, 1), 1, moved)
    before, title = page.image, page.picture.get_title()
    key(page, "n")
    assert not torch.equal(page.image, before) and page.picture.get_title() != title
    assert_shows(page, (5, 1), 1, moved)
    key(page, "r")
    assert_shows(page, (4, 4), 0, pos)


@pytest.mark.parametrize("flags, sources", [("--pe=none", 2), ("--pe=ape", 2), ("--pe=mixed --pool=mean", 1)])
def test_every_kind_of_model_is_shown(flags, sources, tiny_bearing, default_dtype):
    assert run(*flags.split(), "--epochs=1", "--out=run") == 0
    default_dtype(torch.float64)
    Image.new("RGB", (50, 40), "red").save("mine.png")
    page = opened("run", "--image=mine.png")
    assert len(page.weights) == 2 * sources and page.picture.get_title() == "mine.png"
    assert page.image.unique().tolist() == [0, 1]
    assert_shows(page, (4, 4), 0, page.model.positions(8, 8))
    for name in "left", "n", "r":
        key(page, name)
    assert page.along is None and len(page.sliders) == (2 if "mixed" in flags else 0)


def test_classes_have_names(tiny_bearing):
    make_imagenet("data", n=1, classes=["n01443537", "mine"])
    assert run("--dataset=imagenet", "--img-size=32", "--workers=0", "--epochs=1", "--out=run") == 0
    page = opened("run")
    assert page.names == ["mine", "goldfish"] and page.picture.get_title() == "test image 1: mine"
    right = [text.get_text().split()[0] for bar, text in page.best if bar.get_facecolor() == to_rgba(SKY)]
    assert right == ["mine"]
    Image.new("RGB", (50, 40)).save("mine.png")
    assert opened("run", "--image=mine.png").names == ["class 0", "class 1"]
    assert Bearing.class_names[:3] == ("right", "lower right", "down")
    assert len(set(CIFAR100.class_names)) == 100 and CIFAR100.class_names[:2] == ["apple", "aquarium fish"]
    assert len(imagenet_classes()) == 1000 and [*imagenet_classes().values()][1] == "goldfish"


def test_images_in_folders_come_in_random_order_without_those_that_cannot_be_read(tiny_bearing, capsys):
    make_imagenet("data", n=4)
    assert run("--dataset=imagenet", "--img-size=32", "--workers=0", "--epochs=1", "--out=run") == 0

    def titles(n):
        page, found = opened("run"), []
        for _ in range(n):
            found.append(page.picture.get_title())
            key(page, "n")
        return found

    found = titles(12)
    classes = [title[-1] for title in found]
    assert len({*classes[:4]}) > 1 and sorted(classes) == [*"aaaabbbbcccc"] and titles(3) == found[:3]
    for path in "a/0.jpeg", "b/1.jpeg", "c/2.jpeg":
        Path("data/val", path).write_bytes(b"")
    capsys.readouterr()
    assert sorted(title[-1] for title in titles(9)) == [*"aaabbbccc"]
    assert capsys.readouterr().err.count("cannot read data/val/") == 3
    for path in Path("data/val").glob("*/*"):
        path.write_bytes(b"")
    assert "no test image in data can be read" in complaint(capsys, explore.main, "run", "--save=x.png")


def test_what_cannot_be_shown_gets_one_line(capsys, monkeypatch, tiny_bearing):
    matplotlib.use("agg")
    for words, *flags in [
        ("there is no display to open a window on: add --save",),
        ("invalid choice: 'ape'", "--pe=ape", "--save=x.png"),
        ("leave out --pe, or the run", "run", "--pe=mixed"),
        ("name the folder of a run", "--image=x.png"),
        ("there is no nowhere/last.pt", "nowhere", "--save=x.png"),
        ("No such file", "--pe=mixed", "--save=nowhere/x.png"),
    ]:
        assert words in complaint(capsys, explore.main, *flags)
    assert run("--epochs=1", "--out=run") == 0
    assert "cannot read none.png" in complaint(capsys, explore.main, "run", "--image=none.png", "--save=x.png")
    assert explore.main(["run", "--save=x.png"]) == 0
    assert len(Image.open("x.png").convert("RGB").getcolors(maxcolors=2**24)) > 100
