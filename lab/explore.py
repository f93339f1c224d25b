"""Explore with the mouse how encodings score keys, and where a trained model attends.

    python -m lab.explore                          # all encodings at initialisation: drag the query in any map
    python -m lab.explore --pe mixed spherical     # these alone: rotary names in vit.ENCODINGS
    python -m lab.explore RUN                      # a trained model on its test images: click a patch
    python -m lab.explore RUN --image FILE         # on an image of your own
    python -m lab.explore --save FILE.png          # any of these without a window

Sliders shift all positions. Keys are listed on the window.
"""

import math
import sys
import textwrap
from contextlib import suppress
from itertools import count, repeat
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.widgets import CheckButtons, Slider
from torch.overrides import TorchFunctionMode

from lab.cli import Parser, folder
from lab.data import CIFAR100, Bearing
from lab.datasets import DATASETS
from lab.errors import UserError, first_line, one_line_errors, user_errors
from lab.evaluate import class_labels
from lab.files import atomic_write
from lab.imagenet import IMAGENET_1K, load
from lab.pictures import BLUE, FROM_ZERO, GREY, PALE, RED, SIGNED, SKY, STYLE, heading, style
from lab.rotations import channel_groups, encodings, grid, scores, symmetry
from lab.run import read_run

SIZE = 14, 8  # of the window, in inches of 100 pixels
N, HALF = 61, 10  # keys per side of a map, and how far they are from its centre, in patches
PATCH = 2 * math.pi / 13  # in units of position: a training image of 14 x 14 patches spans [-pi, pi]
HEAD_DIM = 24
HEAD = range(HEAD_DIM)  # all channels
BEARINGS = "right", "lower right", "down", "lower left", "left", "upper left", "up", "upper right"


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    with style(**STYLE), matplotlib.rc_context({"toolbar": "None"}):
        figure = Figure(SIZE) if args.save else window()
        if args.run:
            trained(figure, args)
        else:
            Encodings(figure, chosen(args.pe))
        save(figure, args.save) if args.save else matplotlib.pyplot.show()


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", type=folder, metavar="RUN", help="folder that train.py or lab.pretrained has written")
    add("--pe", nargs="+", help="rotary encodings to show (all)")
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
        from matplotlib import pyplot  # here because it looks for a display

        figure = pyplot.figure("Explore", SIZE)
        if figure.canvas.required_interactive_framework:
            return figure
    raise UserError("there is no display to open a window on: add --save FILE.png")


def save(figure, path=None):
    """Write a PNG, by default the first explore-<i>.png that does not exist."""
    path = path or next(path for i in count(1) if not (path := Path(f"explore-{i}.png")).exists())
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format="png")
    print(path, flush=True)


# What both pages stand on


def connect(page, keys, about, texts):
    """Let the page answer the mouse (page.click) and keys, which are listed at the bottom.

    keys: {key: (what it does, function)}; about: a line on the maps; texts: those that page.redraw() draws again, with
    all images, patches and lines, over a copy of the rest, which takes longer
    """
    figure, canvas, background = page.figure, page.figure.canvas, None
    keys = keys | {"r": ("reset", page.reset), "s": ("save a PNG", lambda: save(figure))}
    live = [*(artist for ax in figure.axes for artist in (*ax.images, *ax.patches, *ax.lines)), *texts]
    for artist in live:
        artist.set_animated(True)

    def press(event):
        if event.key in keys:
            keys[event.key][1]()

    def mouse(event):
        if event.button == 1 and event.inaxes is not None:
            page.click(event)

    def drawn(event):
        nonlocal background
        if not figure.canvas.is_saving():
            background = figure.canvas.copy_from_bbox(figure.bbox)
            redraw()

    def redraw():
        if background is not None:
            figure.canvas.restore_region(background)
            for artist in live:
                figure.draw_artist(artist)
            figure.canvas.blit(figure.bbox)

    if canvas.manager:
        canvas.mpl_disconnect(canvas.manager.key_press_handler_id)  # matplotlib's own keys
    for event, act in {
        "button_press_event": mouse,
        "motion_notify_event": mouse,
        "key_press_event": press,
        "draw_event": drawn,
    }.items():
        canvas.mpl_connect(event, act)
    lines = about, "      ".join(f"{key}: {what}" for key, (what, _) in keys.items())
    figure.supxlabel("\n".join(lines), fontsize=10, color=GREY, linespacing=1.6)
    page.redraw = redraw


def slider(axes, label, least, most, start, changed, **options):
    look = {"color": PALE, "track_color": PALE, "initcolor": "white", "handle_style": {"facecolor": BLUE}}
    made = Slider(axes, label, least, most, valinit=start, **look, **options)
    made.drawon = False  # changed does that
    made.on_changed(changed)
    return made


def controls(figure, changed):
    """Three cells above the lines at the bottom, the first two with sliders that shift x and y; and these sliders."""
    cells = figure.add_gridspec(1, 3, left=0.1, right=0.92, bottom=0.11, top=0.135, wspace=1.3).subplots()
    options = {"valstep": 1, "valfmt": "%+g patches"}
    return cells, [
        slider(cell, f"shift all {x}", -16, 16, 0, changed, **options) for cell, x in zip(cells, "xy", strict=False)
    ]


# The encodings


class Encodings:
    """A column for each encoding: scores of a query with equal keys everywhere, in a group of channels and the head."""

    def __init__(self, figure, ropes):
        self.figure, self.places = figure, grid(N, HALF).to(torch.get_default_dtype())
        heading(figure, "Drag the query: equivariant patterns move with it, the others change shape")
        right = min(0.91, 0.09 + 0.22 * len(ropes))
        place = {"left": 0.09, "right": right, "bottom": 0.3, "top": 0.82, "wspace": 0.12, "hspace": 0.22}
        maps = figure.add_gridspec(2, len(ropes), **place).subplots(squeeze=False)
        self.maps = [*maps.flat]
        self.columns = [column(*item, axes) for item, axes in zip(ropes.items(), maps.T, strict=True)]
        for axes, label in zip(maps[:, 0], ["a group", "the whole head"], strict=True):
            axes.set(ylabel=f"{label}\ny, patches", yticks=[-7, 0, 7])
        maps[1, 0].annotate("scores\nchange", (0, 0), (-10, -58), "axes fraction", "offset points", ha="right")
        scale = figure.add_axes((right + 0.015, 0.35, 0.008, 0.4))
        figure.colorbar(self.columns[0].images[0], scale, label="score / |q|²", ticks=[-1, 0, 1])
        cells, self.shift = controls(figure, self.turn)
        self.factor = slider(cells[2], "frequencies", 0.1, 4, 1, self.turn_all, valfmt="x %.2f")
        keys = {"n": ("new random query", self.new_query), "g": ("next group", self.next_group)}
        about = "dot: query; orange: high score for an equal key there, blue: low; dashed: extent of a training image"
        numbers = [control.valtext for control in (*self.shift, self.factor)]
        connect(self, keys, about, [*numbers, *(column.change for column in self.columns)])
        self.query, self.group = torch.zeros(1, 2), 0
        self.new_query()

    def new_query(self):
        self.z = torch.randn(HEAD_DIM)
        self.turn_all()

    def next_group(self):
        self.group += 1
        self.show()
        self.figure.canvas.draw_idle()  # also the names of the channels

    def reset(self):
        self.query, self.group = torch.zeros(1, 2), -1
        for control in *self.shift, self.factor:
            control.reset()
        self.next_group()

    def click(self, event):
        if event.inaxes in self.maps:
            self.query = torch.tensor([[event.xdata, event.ydata]])
            self.show()

    def turned(self, rope, at):
        """The query, or an equal key, at positions at (T, 2), in patches: (T, D). A factor on them is one on angles."""
        z = self.z.expand(1, 1, len(at), -1)
        return rope.rotate(z, self.factor.val * PATCH * at.to(z.dtype))[0, 0]

    def turn_all(self, _=None):
        """Turn the keys at their own positions, and shifted."""
        for column in self.columns:
            column.still = self.turned(column.rope, self.places)
        self.turn()

    def turn(self, _=None):
        """Turn the keys at their shifted positions. (A query that moves turns no key.)"""
        self.offset = torch.tensor([float(control.val) for control in self.shift])
        for column in self.columns:
            column.moved = self.turned(column.rope, self.places + self.offset) if self.offset.any() else column.still
        self.show()

    def show(self):
        for column in self.columns:
            still, moved = self.turned(column.rope, torch.cat([self.query, self.query + self.offset]))
            group = column.groups[self.group % len(column.groups)]
            for image, dot, channels in zip(column.images, column.dots, [group, HEAD], strict=True):
                image.set_data(scores(moved, column.moved, channels).view(N, N).numpy())
                dot.set_data(*self.query.T)
            change = (scores(still, column.still, HEAD) - scores(moved, column.moved, HEAD)).abs().max()
            column.change.set(text=f"{change:.2f}", color=RED if change >= 0.005 else GREY)
            column.axes[0].set_xlabel(f"channels {group[0]}-{group[-1]}", fontsize=9)
        self.redraw()


def column(name, rope, both):
    """The two maps of an encoding, and what is known of it."""
    edge, images, dots = HALF * N / (N - 1), [], []
    place = {"extent": (-edge, edge, edge, -edge), "interpolation": "bilinear"}
    for axes, anchor in zip(both, "SN", strict=True):  # close to each other
        images.append(axes.imshow(torch.zeros(N, N).numpy(), SIGNED, vmin=-1, vmax=1, **place))
        axes.plot([-7, 7, 7, -7, -7], [-7, -7, 7, 7, -7], "--", color="black", linewidth=0.7)
        dots += axes.plot(0, 0, "o", color="black", markeredgecolor="white", markersize=8)
        axes.set(xticks=[], yticks=[], anchor=anchor)
    both[0].set_title(f"{textwrap.fill(name, 13)}\n{symmetry(rope)}", fontsize=8)
    both[1].set(xlabel="x, patches", xticks=[-7, 0, 7])
    change = both[1].annotate("", (0.5, 0), (0, -52), "axes fraction", "offset points", ha="center", fontsize=14)
    rope.requires_grad_(False)
    groups = channel_groups(rope) or [HEAD]
    return SimpleNamespace(rope=rope, groups=groups, axes=both, images=images, dots=dots, change=change)


def chosen(names):
    """{name: encoding}: those named, or all. LieRE's whole head in one group is too slow to drag unless it is named."""
    with user_errors(ValueError):
        ropes = encodings(HEAD_DIM)
    known = [name for name in ropes if "," not in name]
    if unknown := set(names or ()) - set(known):
        raise UserError(f"--pe {min(unknown)} is no rotary encoding: choose from {', '.join(known)}")
    return {n: rope for n, rope in ropes.items() if (n.partition(",")[0] in names if names else n != "liere")}


# A trained model


def trained(figure, args):
    """The page of a run: its model, and its test images or the one that is named."""
    saved, model = read_run(args.run)
    config, kind, data = saved["config"], DATASETS[saved["config"]["dataset"]], None
    if args.data_dir or not args.image:
        options = saved["data"] | ({"workers": 0} if "workers" in saved["data"] else {})
        data = kind(args.data_dir or Path("data"), **options).load()
        labels = class_labels(args.run, data, config["data_set"]).tolist()
    names = class_names(config, data) or [f"class {i}" for i in range(model.head.out_features)]
    size = config["eval_size"] or saved["data"].get("img_size") or saved["vit"]["img_size"]
    mean, std = torch.tensor([kind.mean, kind.std]).view(2, 3, 1, 1)

    def test_images():
        while True:
            for i, (image, [y]) in enumerate(data.test_batches(batch_size=1, img_size=size), start=1):
                yield image * std + mean, labels[y], f"test image {i}: {names[labels[y]]}"

    images = repeat((read_image(args.image, size), None, args.image.name)) if args.image else test_images()
    return Trained(figure, model, lambda image: (image - mean) / std, images, names)


def class_names(config, data):
    """The names of a model's classes; [] if they are not known."""
    kind, here = DATASETS[config["dataset"]], Path(__file__).parent
    if issubclass(kind, Bearing):
        return BEARINGS
    if issubclass(kind, CIFAR100):
        return (here / "cifar100_classes.txt").read_text().splitlines()
    known = dict(line.split(" ", 1) for line in (here / "imagenet_classes.txt").read_text().splitlines())
    if config["data_set"] == IMAGENET_1K:
        return list(known.values())
    return [known.get(name, name) for name in getattr(data, "classes", [])]


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


class Trained:
    """A model on an image: the attention of a patch and of the class token in every head, and what it predicts."""

    def __init__(self, figure, model, normalise, images, names):
        self.figure, self.model, self.normalise = figure, model.eval().requires_grad_(False), normalise
        self.names, self.shift, self.along = names, [], None
        self.prefix, self.heads = model.num_prefix_tokens, model.blocks[0].attn.num_heads
        first = next(images)
        self.side = n = first[0].shape[-1] // model.patch_embed.proj.stride[0]
        self.picture, bars = figure.add_axes((0.06, 0.46, 0.22, 0.41)), figure.add_axes((0.06, 0.17, 0.22, 0.21))
        self.picture.set(xlabel="x, patches", ylabel="y, patches")
        columns, sources = min(self.heads, 6), ["the patch", "the class token"][: 1 + self.prefix]
        rows = math.ceil(self.heads / columns)
        place = {"left": 0.36, "right": 0.98, "bottom": 0.17, "top": 0.87, "wspace": 0.1, "hspace": 0.3}
        cells = figure.add_gridspec(rows * len(sources), columns, **place)
        self.maps, self.captions = [self.picture], []
        for i, source in enumerate(sources):
            for head in range(self.heads):
                axes = figure.add_subplot(cells[i * rows + head // columns, head % columns], xticks=[], yticks=[])
                axes.spines[:].set(visible=True, color=PALE)
                axes.set_ylabel("" if head else f"from\n{source}")
                caption = axes.annotate("", (0.5, 1), (0, 4), "axes fraction", "offset points", ha="center", fontsize=8)
                self.maps.append(axes)
                self.captions.append(caption)
        extent = (-0.5, n - 0.5, n - 0.5, -0.5)
        self.pixels, *self.weights = (axes.imshow([[0]], FROM_ZERO, vmin=0, extent=extent) for axes in self.maps)
        self.squares = [
            axes.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor=BLUE, linewidth=2))
            for axes in self.maps[: 1 + self.heads]
        ]
        self.best = [(bars.barh(i, 0)[0], bars.text(0.02, i, "", va="center")) for i in range(5)]
        bars.set(xlim=(0, 1), ylim=(4.5, -0.5))
        bars.axis("off")
        if model.blocks[0].attn.rope is None:
            figure.text(0.5, 0.12, "This model rotates nothing: it has no positions to shift.", ha="center")
        else:
            cells, self.shift = controls(figure, self.look)
            cells[2].axis("off")
            if self.prefix:
                box = {"frame_props": {"s": 80}, "check_props": {"s": 80}}
                self.along = CheckButtons(cells[2], ["the class token, too"], [True], useblit=False, **box)
                self.along.on_clicked(self.look)
        keys = {
            "left": ("layer before", lambda: self.go(-1)),
            "right": ("next layer", lambda: self.go(1)),
            "n": ("next image", lambda: self.open(*next(images))),
        }
        texts = [*self.captions, *(text for _, text in self.best), *(control.valtext for control in self.shift)]
        connect(self, keys, "square: the patch that you clicked; above each map: its largest weight", texts)
        self.layer, self.query = 0, (n // 2, n // 2)
        self.open(*first)

    def open(self, image, label, about):
        self.image, self.label = image, label
        self.pixels.set_data(image[0].clamp(0, 1).permute(1, 2, 0).numpy())
        self.picture.set_title(about)
        self.look()
        self.go(0)

    def go(self, step):
        """To another layer."""
        depth = len(self.model.blocks)
        self.layer = (self.layer + step) % depth
        heading(self.figure, f"Layer {self.layer + 1} of {depth}: where each head looks, from the patch that you click")
        self.show()
        self.figure.canvas.draw_idle()  # also the titles

    def reset(self):
        self.layer, self.query = 0, (self.side // 2, self.side // 2)
        for control in self.shift:
            control.reset()
        if self.along and not self.along.get_status()[0]:
            self.along.set_active(0)
        self.go(0)

    def click(self, event):
        if event.inaxes in self.maps:
            self.query = tuple(min(max(round(at), 0), self.side - 1) for at in (event.xdata, event.ydata))
            self.show()

    def look(self, _=None):
        """Run the model on the image, at the shifted positions."""
        pos = self.model.positions(self.side, self.side)
        first = self.prefix if self.along and not self.along.get_status()[0] else 0
        if self.shift:
            pos[first:] += self.model.spacing * torch.tensor([control.val for control in self.shift], dtype=pos.dtype)
        with AttentionWeights() as attention:
            self.probabilities = self.model(self.normalise(self.image), pos)[0].softmax(dim=0)
        self.attention = attention.layers
        self.show()

    def show(self):
        x, y = self.query
        tokens = [self.prefix + y * self.side + x] * self.heads + [0] * self.heads
        weights = self.attention[self.layer]
        for i, (image, caption) in enumerate(zip(self.weights, self.captions, strict=True)):
            found = weights[i % self.heads, tokens[i], self.prefix :]
            most = max(found.max(), 3 / weights.shape[-1])  # so that an even spread is pale
            image.set(data=found.view(self.side, self.side).numpy(), clim=(0, most))
            caption.set_text(f"head {i % self.heads + 1}: {100 * found.max():.1f} %")
        for square in self.squares:
            square.set_xy((x - 0.5, y - 0.5))
        p, classes = self.probabilities.topk(min(5, len(self.probabilities)))
        for (bar, text), share, i in zip(self.best, p.tolist(), classes.tolist(), strict=False):
            bar.set(width=share, color=SKY if i == self.label else PALE)
            text.set_text(f"{self.names[i]}  {100 * share:.1f} %")
        self.redraw()


if __name__ == "__main__":
    sys.exit(main())
