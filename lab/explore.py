"""Explore with the mouse how encodings score keys, and where a trained model attends.

    python -m lab.explore                          # encodings at initialisation: drag the query in any map
    python -m lab.explore --pe mixed spherical     # these alone: rotary names in vit.ENCODINGS
    python -m lab.explore RUN                      # a trained model on its test images: click a patch
    python -m lab.explore RUN --image FILE         # on an image of your own
    python -m lab.explore --save FILE.png          # any of these without a window

Sliders shift all positions. The window lists its shortcuts.
"""

import math
import sys
import textwrap
from contextlib import suppress
from itertools import count, cycle, repeat
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.widgets import CheckButtons, Slider
from torch.overrides import TorchFunctionMode

from lab.cli import Parser, folder
from lab.datasets import DATASETS
from lab.errors import UserError, first_line, one_line_errors, user_errors
from lab.files import atomic_write
from lab.imagenet import IMAGENET_1K, ImageNet, imagenet_classes, load
from lab.pictures import BLUE, FROM_ZERO, GREY, PALE, RED, SIGNED, SKY, STYLE, heading, style
from lab.rotations import channel_groups, encodings, grid, scores, symmetry
from lab.run import class_labels, read_run
from vit import ENCODINGS

SIZE = 14, 8  # of the window, in inches of 100 pixels
N, HALF = 61, 10  # keys per side of a map, and how far they are from its centre, in patches
PATCH = 2 * math.pi / 13  # in units of position: a training image of 14 x 14 patches spans [-pi, pi]
HEAD_DIM = 24
HEAD = range(HEAD_DIM)  # all channels


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    with style(**STYLE), matplotlib.rc_context({"toolbar": "None"}):
        figure = Figure(SIZE) if args.save else window()
        if args.run:
            trained(figure, args)
        else:
            Encodings(figure, chosen(args.pe))
        save(figure, args.save) if args.save else pyplot.show()


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", type=folder, metavar="RUN", help="folder that train.py or lab.pretrained has written")
    rotary = [name for name, make in ENCODINGS.items() if make]
    add("--pe", nargs="+", choices=rotary, help="encodings to show (all, LieRE in blocks of 8)")
    add("--image", type=Path, metavar="FILE", help="an image to look at instead of the test set")
    add("--data-dir", type=folder, help="folder of the data sets and downloads (data)")
    add("--save", type=Path, metavar="FILE.png", help="write what the window would show")
    args = parser.parse_args(argv)
    if args.run and args.pe:
        parser.error("a trained model has an encoding of its own: leave out --pe, or the run")
    if (args.image or args.data_dir) and not args.run:
        parser.error("--image and --data-dir are for a trained model: name the folder of a run")
    return args


def window():
    """An empty figure in a window of its own."""
    with suppress(ImportError):  # of a backend that needs a display, if MPLBACKEND names it
        figure = pyplot.figure("Explore", SIZE)
        if figure.canvas.required_interactive_framework:
            figure.canvas.mpl_disconnect(figure.canvas.manager.key_press_handler_id)  # matplotlib's own keys
            return figure
    raise UserError("there is no display to open a window on: add --save FILE.png")


def save(figure, path=None):
    """Write a PNG, by default the first explore-<i>.png that does not exist."""
    path = path or next(path for i in count(1) if not (path := Path(f"explore-{i}.png")).exists())
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format="png")
    print(path, flush=True)


class Page:
    """Maps in which the mouse moves a query, with sliders and shortcuts.

    A subclass has maps, show(), which draws what is chosen, and compute(), which a slider calls and which calls show().
    """

    def __init__(self, figure, about, keys, centre):
        """about: a line on the maps; keys: {key: (what it does, function)}; centre: where the query starts"""
        self.figure, self.centre, self.sliders = figure, centre, []
        self.query, self.index = centre, 0  # the index is that of a group of channels, or of a layer
        keys |= {"r": ("reset", self.reset), "s": ("save a PNG", lambda: save(figure))}

        def press(event):
            if event.key in keys:
                keys[event.key][1]()

        def mouse(event):
            if event.button == 1 and event.inaxes in self.maps:
                self.query = event.xdata, event.ydata
                self.show()

        for name, act in ("key_press", press), ("button_press", mouse), ("motion_notify", mouse):
            figure.canvas.mpl_connect(f"{name}_event", act)
        lines = about, "      ".join(f"{key}: {what}" for key, (what, _) in keys.items())
        figure.supxlabel("\n".join(lines), fontsize=10, color=GREY, linespacing=1.6)

    def cells(self, rows, columns, **place):
        grid = self.figure.add_gridspec(rows, columns, wspace=0.12, hspace=0.25, **place)
        return grid.subplots(squeeze=False, subplot_kw={"xticks": [], "yticks": [], "frameon": False})

    def add_slider(self, label, least, most, start, **options):
        axes = self.figure.add_axes((0.1 + 0.335 * len(self.sliders), 0.11, 0.15, 0.025))
        slider = Slider(axes, label, least, most, valinit=start, color=PALE, initcolor="none", **options)
        slider.on_changed(lambda _: self.compute())
        self.sliders.append(slider)

    def add_shift(self):
        for x in "xy":
            self.add_slider(f"shift all {x}", -16, 16, 0, valstep=1, valfmt="%+g patches")

    def shift(self):
        """Of x and y, in patches."""
        return torch.tensor([float(slider.val) for slider in self.sliders[:2]])

    def go(self, step):
        """To another group of channels, or another layer."""
        self.index += step
        self.show()

    def reset(self):
        self.query, self.index = self.centre, 0
        for slider in self.sliders:
            slider.reset()
        self.show()


class Encodings(Page):
    """A column for each encoding: scores of a query with equal keys everywhere, in a group of channels and the head."""

    def __init__(self, figure, ropes):
        about = "dot: query; orange: high score for an equal key there, blue: low; dashed: extent of a training image"
        keys = {"n": ("new random query", self.new_query), "g": ("next group", lambda: self.go(1))}
        super().__init__(figure, about, keys, centre=(0.0, 0.0))
        heading(figure, "Drag the query: equivariant patterns move with it, the others change shape")
        right = min(0.91, 0.09 + 0.22 * len(ropes))
        axes = self.cells(2, len(ropes), left=0.09, right=right, bottom=0.3, top=0.82)
        self.maps = [*axes.flat]
        self.columns = [Column(*item, pair) for item, pair in zip(ropes.items(), axes.T, strict=True)]
        for row, label in zip(axes[:, 0], ["a group", "the whole head"], strict=True):
            row.set(ylabel=f"{label}\ny, patches", yticks=[-7, 0, 7])
        row.annotate("scores\nchange", (0, 0), (-10, -36), "axes fraction", "offset points", ha="right")
        scale = figure.add_axes((right + 0.015, 0.35, 0.008, 0.4))
        figure.colorbar(self.columns[0].images[0], scale, label="score / |q|²", ticks=[-1, 0, 1])
        self.add_shift()
        self.add_slider("frequencies", 0.1, 4, 1, valfmt="x %.2f")
        self.new_query()

    def new_query(self):
        self.z = torch.randn(HEAD_DIM)
        self.compute()

    def compute(self):
        """Turn the keys, at their own positions and shifted. (A query that moves turns no key.)"""
        places = grid(N, HALF)
        for column in self.columns:
            column.keys = self.turned(column.rope, places), self.turned(column.rope, places + self.shift())
        self.show()

    def turned(self, rope, at):
        """The query, or an equal key, at positions at (T, 2), in patches: (T, D). Scaling them scales the angles."""
        pos = self.sliders[2].val * PATCH * at.to(self.z.dtype)
        return rope.rotate(self.z.expand(1, 1, len(at), -1), pos)[0, 0]

    def show(self):
        at = torch.tensor([self.query])
        for column in self.columns:
            queries = self.turned(column.rope, torch.cat([at, at + self.shift()]))
            still, moved = map(scores, queries, column.keys, (HEAD, HEAD))
            group = column.groups[self.index % len(column.groups)]
            for image, found in zip(column.images, [scores(queries[1], column.keys[1], group), moved], strict=True):
                image.set_data(found.view(N, N).numpy())
            for dot in column.dots:
                dot.set_data(*at.T)
            column.axes[0].set_xlabel(f"channels {group[0]}-{group[-1]}", fontsize=9)
            change = (still - moved).abs().max()
            column.change.set(text=f"{change:.2f}", color=RED if change >= 0.005 else GREY)
        self.figure.canvas.draw_idle()


class Column:
    """An encoding, its groups of channels, its two maps, and below them the number by which scores change."""

    def __init__(self, name, rope, axes):
        self.rope, self.groups, self.axes = rope.requires_grad_(False), channel_groups(rope) or [HEAD], axes
        edge, self.images, self.dots = HALF * N / (N - 1), [], []
        look = {"extent": (-edge, edge, edge, -edge), "interpolation": "bilinear"}
        for ax, anchor in zip(axes, "SN", strict=True):  # close to each other
            ax.set_anchor(anchor)
            self.images.append(ax.imshow(torch.zeros(N, N).numpy(), SIGNED, vmin=-1, vmax=1, **look))
            ax.plot([-7, 7, 7, -7, -7], [-7, -7, 7, 7, -7], "--", color="black", linewidth=0.7)
            self.dots += ax.plot(0, 0, "o", color="black", markeredgecolor="white", markersize=8)
        axes[0].set_title(f"{textwrap.fill(name, 13)}\n{symmetry(rope)}", fontsize=8)
        self.change = axes[1].set_xlabel("", fontsize=14, labelpad=14)


def chosen(names):
    """{name: encoding}: those named, or all. LieRE's whole head in one group must be named: it is slow to drag."""
    with user_errors(()):
        ropes = encodings(HEAD_DIM)
    return {n: rope for n, rope in ropes.items() if (n.partition(",")[0] in names if names else n != "liere")}


def trained(figure, args):
    """The page of a run: its model, and its test images or the one that is named."""
    saved, model = read_run(args.run)
    config, data = saved["config"], DATASETS[saved["config"]["dataset"]]  # a class has all that an image needs
    mean, std = torch.tensor([data.mean, data.std]).view(2, 3, 1, 1)
    size = saved["data"].get("img_size") or data.img_size
    if args.data_dir or not args.image:
        data = test_set(data, args.data_dir or Path("data"), saved["data"])
        labels = class_labels(args.run, data, config["data_set"]).tolist()
    names = [*imagenet_classes().values()] if config["data_set"] == IMAGENET_1K else data.class_names
    names = names or [f"class {i}" for i in range(model.head.out_features)]

    def test_images():
        for i, (image, [y]) in cycle(enumerate(data.test_batches(batch_size=1, img_size=size), start=1)):
            while data.corrupt:
                print(f"cannot read {data.corrupt.pop()}", file=sys.stderr)
            yield image * std + mean, labels[y], f"test image {i}: {names[labels[y]]}"
        raise UserError(f"no test image in {data.root} can be read: fix the files")

    images = repeat((read_image(args.image, size), None, args.image.name)) if args.image else test_images()
    return Trained(figure, model, size, lambda image: (image - mean) / std, images, names)


def test_set(kind, root, options):
    """A data set whose test images come in random order, always the same, without those that cannot be read."""
    if not issubclass(kind, ImageNet):
        return kind(root, **options).load()  # in random order already
    data = kind(root, **options | {"workers": 0, "skip_corrupt": True})
    order = torch.randperm(len(data.test.files), generator=torch.Generator().manual_seed(0)).numpy()
    data.test.files, data.test.labels = data.test.files[order], data.test.labels[order]
    return data


def read_image(path, size):
    """The centre of an image in a file: (1, 3, size, size), from 0 to 1."""
    try:
        pixels = torch.tensor(load(path, size))
    except Exception as e:  # a corrupt file can fail in any way
        raise UserError(f"cannot read {path} ({first_line(e)}): name a JPEG, PNG, BMP or WebP image") from e
    return pixels.permute(2, 0, 1)[None] / 255


class AttentionWeights(TorchFunctionMode):
    """A context that records the softmax weights (H, T, T) of each attention layer, for the first image."""

    def __init__(self):
        super().__init__()
        self.layers = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, _ = args
            self.layers.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)[0])
        return function(*args, **(kwargs or {}))


class Trained(Page):
    """A model on an image: the attention of a patch and of the class token in every head, and what it predicts."""

    def __init__(self, figure, model, size, normalise, images, names):
        about = "square: the patch that you clicked; above each map: its largest weight"
        keys = {
            "left": ("layer before", lambda: self.go(-1)),
            "right": ("next layer", lambda: self.go(1)),
            "n": ("next image", self.next_image),
        }
        self.side = n = size // model.patch_embed.proj.stride[0]
        super().__init__(figure, about, keys, centre=(n // 2, n // 2))
        self.model, self.normalise = model.eval().requires_grad_(False), normalise
        self.images, self.names = images, names
        self.prefix, heads, self.along = model.num_prefix_tokens, model.blocks[0].attn.num_heads, None
        self.picture = figure.add_axes((0.06, 0.46, 0.22, 0.41), xlabel="x, patches", ylabel="y, patches")
        bars = figure.add_axes((0.06, 0.17, 0.22, 0.21), xlim=(0, 1), ylim=(4.5, -0.5))
        bars.axis("off")
        self.best = [(bars.barh(i, 0)[0], bars.text(0.02, i, "", va="center")) for i in range(5)]
        sources, rows = ["the patch", "the class token"][: 1 + self.prefix], math.ceil(heads / 8)
        cells = self.cells(len(sources) * rows, math.ceil(heads / rows), left=0.36, right=0.98, bottom=0.17, top=0.87)
        cells = cells.reshape(len(sources), -1)[:, :heads]
        for axes, source in zip(cells[:, 0], sources, strict=True):
            axes.set_ylabel(f"from\n{source}")
        for axes in cells.flat:
            axes.set_frame_on(True)
            axes.spines[:].set(visible=True, color=PALE)
        self.maps, extent = [self.picture, *cells.flat], (-0.5, n - 0.5, n - 0.5, -0.5)
        self.pixels, *self.weights = (axes.imshow([[0]], FROM_ZERO, vmin=0, extent=extent) for axes in self.maps)
        self.squares = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=BLUE, linewidth=2) for _ in range(1 + heads)]
        for axes, square in zip(self.maps, self.squares, strict=False):
            axes.add_patch(square)
        if model.blocks[0].attn.rope is None:
            figure.text(0.5, 0.12, "This model rotates nothing: it has no positions to shift.", ha="center")
        else:
            self.add_shift()
            if self.prefix:
                free = figure.add_axes((0.77, 0.11, 0.15, 0.025), frameon=False)
                self.along = CheckButtons(free, ["the class token, too"], [True])
                self.along.on_clicked(lambda _: self.compute())
        self.next_image()

    def next_image(self):
        self.image, self.label, about = next(self.images)
        self.pixels.set_data(self.image[0].clamp(0, 1).permute(1, 2, 0).numpy())
        self.picture.set_title(about)
        self.compute()

    def reset(self):
        super().reset()
        if self.along:
            self.along.set_active(0, True)

    def compute(self):
        """Run the model on the image, at the shifted positions."""
        pos = self.model.positions(self.side, self.side)
        if self.sliders:
            staying = self.prefix if self.along and not self.along.get_status()[0] else 0
            pos[staying:] += self.model.spacing * self.shift()
        with AttentionWeights() as attention:
            self.probabilities = self.model(self.normalise(self.image), pos)[0].softmax(dim=0)
        self.attention = attention.layers
        self.show()

    def show(self):
        depth, n = len(self.attention), self.side
        heading(
            self.figure,
            f"Layer {self.index % depth + 1} of {depth}: where each head looks, from the patch that you click",
        )
        x, y = (min(max(round(at), 0), n - 1) for at in self.query)
        for square in self.squares:
            square.set_xy((x - 0.5, y - 0.5))
        attention = self.attention[self.index % depth]
        tokens = [self.prefix + y * n + x, 0][: 1 + self.prefix]
        found = attention[:, tokens, self.prefix :].transpose(0, 1).flatten(0, 1)  # (maps, patches)
        for i, (image, weights) in enumerate(zip(self.weights, found, strict=True)):
            most = max(weights.max(), 3 / len(attention[0]))  # so that an even spread is pale
            image.set(data=weights.view(n, n).numpy(), clim=(0, most))
            image.axes.set_title(f"head {i % len(attention) + 1}: {100 * weights.max():.1f} %", fontsize=8)
        p, classes = self.probabilities.topk(min(5, len(self.names)))
        for (bar, text), share, i in zip(self.best, p.tolist(), classes.tolist(), strict=False):
            bar.set(width=share, color=SKY if i == self.label else PALE)
            text.set_text(f"{self.names[i]}  {100 * share:.1f} %")
        self.figure.canvas.draw_idle()


if __name__ == "__main__":
    sys.exit(main())
