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
        page = trained(figure, args) if args.run else Encodings(figure, chosen(args.pe))
        page.place()
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
    try:
        from matplotlib import pyplot  # here because it looks for a display

        figure = pyplot.figure("Explore", SIZE)
    except ImportError as e:  # of the backend that MPLBACKEND names
        raise UserError(f"no window can be opened ({e}): add --save FILE.png") from e
    if figure.canvas.required_interactive_framework is None:
        raise UserError("there is no display to open a window on: add --save FILE.png")
    return figure


def save(figure, path=None):
    """Write a PNG, by default the first explore-<i>.png that does not exist."""
    path = path or next(path for i in count(1) if not (path := Path(f"explore-{i}.png")).exists())
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format="png")
    print(path, flush=True)


# What both pages stand on


def listen(page, keys, about):
    """Call page.click for each event of a drag, page.place when the size changes, and for a key its function in keys.

    keys: {key: (what it does, function)}, listed at the bottom, below a line about the maps
    """

    def press(event):
        if event.key in keys:
            keys[event.key][1]()

    def mouse(event):
        if event.button == 1 and event.inaxes is not None:
            page.click(event)

    keys = keys | {"r": ("reset", page.reset), "s": ("save a PNG", lambda: save(page.figure))}
    canvas = page.figure.canvas
    if canvas.manager:
        canvas.mpl_disconnect(canvas.manager.key_press_handler_id)  # matplotlib's own keys
    canvas.mpl_connect("key_press_event", press)
    canvas.mpl_connect("resize_event", lambda event: page.place())
    for name in "button_press_event", "motion_notify_event":
        canvas.mpl_connect(name, mouse)
    lines = about, "      ".join(f"{key}: {what}" for key, (what, _) in keys.items())
    page.figure.supxlabel("\n".join(lines), fontsize=10, color=GREY, linespacing=1.6)


def redrawing(figure, texts):
    """A function that redraws all images, patches and lines, and these texts, over the rest, which takes longer."""
    live = [*(artist for ax in figure.axes for artist in (*ax.images, *ax.patches, *ax.lines)), *texts]
    background = None
    for artist in live:
        artist.set_animated(True)

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

    figure.canvas.mpl_connect("draw_event", drawn)
    return redraw


def new_axes(figure, **settings):
    return figure.add_axes((0, 0, 1, 1), **settings)


def put(axes, left, top, width, height):
    """Place axes on the figure, in inches from its upper left corner."""
    W, H = axes.figure.get_size_inches()
    axes.set_position([left / W, 1 - (top + height) / H, width / W, height / H])


def put_controls(cells):
    """Three cells side by side above the lines at the bottom, with room for labels."""
    W, H = cells[0].figure.get_size_inches()
    for i, axes in enumerate(cells):
        put(axes, (i + 0.32) * W / 3, H - 0.9, 0.4 * W / 3, 0.2)


def slider(axes, label, least, most, start, changed, **options):
    look = {"color": PALE, "track_color": PALE, "initcolor": "white", "handle_style": {"facecolor": BLUE}}
    made = Slider(axes, label, least, most, valinit=start, **look, **options)
    made.drawon = False  # changed does that
    made.on_changed(changed)
    return made


def shift_sliders(cells, changed):
    options = {"valstep": 1, "valfmt": "%+g patches"}
    return [
        slider(axes, f"shift all {name}", -16, 16, 0, changed, **options)
        for axes, name in zip(cells, "xy", strict=False)
    ]


# The encodings


class Encodings:
    """A column for each encoding: scores of a query with equal keys everywhere, in a group of channels and the head."""

    def __init__(self, figure, ropes):
        self.figure, self.keys = figure, grid(N, HALF).to(torch.get_default_dtype())
        heading(figure, "Drag the query: equivariant patterns move with it, the others change shape")
        self.columns = [column(figure, *item) for item in ropes.items()]
        first = self.columns[0]
        for axes, label in zip(first.axes, ["a group", "the whole head"], strict=True):
            axes.set(ylabel=f"{label}\ny, patches", yticks=[-7, 0, 7])
        first.axes[1].annotate("scores\nchange", (0, 0), (-12, -58), "axes fraction", "offset points", ha="right")
        self.scale, *self.cells = (new_axes(figure) for _ in range(4))
        figure.colorbar(first.images[0], self.scale, label="score / |q|²", ticks=[-1, 0, 1])
        self.shift = shift_sliders(self.cells, self.turn)
        self.factor = slider(self.cells[2], "frequencies", 0.1, 4, 1, self.turn_all, valfmt="x %.2f")
        keys = {"n": ("new random query", self.new_query), "g": ("next group", self.next_group)}
        about = "dot: query; orange: high score for an equal key there, blue: low; dashed: extent of a training image"
        listen(self, keys, about)
        numbers = [control.valtext for control in (*self.shift, self.factor)]
        self.redraw = redrawing(figure, [*numbers, *(column.change for column in self.columns)])
        self.query, self.group = torch.zeros(1, 2), 0
        self.new_query()

    def place(self):
        W, H = self.figure.get_size_inches()
        n, left, top, right, bottom = len(self.columns), 0.85, 1.0, 0.9, 2.0
        side = min((W - left - right) / n - 0.15, (H - top - bottom - 0.45) / 2)
        left += (W - left - right - n * (side + 0.15)) / 2
        top += (H - top - bottom - 2 * side - 0.45) / 2
        for i, column in enumerate(self.columns):
            for j, axes in enumerate(column.axes):
                put(axes, left + i * (side + 0.15), top + j * (side + 0.45), side, side)
                for text in axes.title, axes.xaxis.label:
                    text.set_fontsize(min(10, 7.5 * side + 0.5))
        put(self.scale, left + n * (side + 0.15), top, 0.12, 2 * side + 0.45)
        put_controls(self.cells)

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
        if any(event.inaxes in column.axes for column in self.columns):
            self.query = torch.tensor([[event.xdata, event.ydata]])
            self.show()

    def turned(self, rope, at):
        """The query, or an equal key, at positions at (T, 2), in patches: (T, D). A factor on them is one on angles."""
        z = self.z.expand(1, 1, len(at), -1)
        return rope.rotate(z, self.factor.val * PATCH * at.to(z.dtype))[0, 0]

    def turn_all(self, _=None):
        """Turn the keys at their own positions, and shifted."""
        for column in self.columns:
            column.still = self.turned(column.rope, self.keys)
        self.turn()

    def turn(self, _=None):
        """Turn the keys at their shifted positions. (A query that moves turns no key.)"""
        self.offset = torch.tensor([float(control.val) for control in self.shift])
        for column in self.columns:
            column.moved = self.turned(column.rope, self.keys + self.offset) if self.offset.any() else column.still
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
            column.axes[0].set_xlabel(f"channels {group[0]} to {group[-1]}")
        self.redraw()


def column(figure, name, rope):
    """The two maps of an encoding, and what is known of it."""
    edge, images, dots = HALF * N / (N - 1), [], []
    above, below = new_axes(figure), new_axes(figure)
    for axes in above, below:
        zeros = torch.zeros(N, N).numpy()
        images.append(
            axes.imshow(zeros, SIGNED, vmin=-1, vmax=1, extent=(-edge, edge, edge, -edge), interpolation="bilinear")
        )
        axes.plot([-7, 7, 7, -7, -7], [-7, -7, 7, 7, -7], "--", color="black", linewidth=0.7)
        dots += axes.plot(0, 0, "o", color="black", markeredgecolor="white", markersize=8)
        axes.set(xticks=[], yticks=[])
    above.set_title(f"{name}\n{symmetry(rope)}")
    below.set(xlabel="x, patches", xticks=[-7, 0, 7])
    change = below.annotate("", (0.5, 0), (0, -52), "axes fraction", "offset points", ha="center", fontsize=14)
    rope.requires_grad_(False)
    groups = channel_groups(rope) or [HEAD]
    return SimpleNamespace(rope=rope, groups=groups, axes=(above, below), images=images, dots=dots, change=change)


def chosen(names):
    """{name: encoding}: those named, or all. LieRE's whole head in one group is too slow to drag unless it is named."""
    with user_errors(ValueError):
        ropes = encodings(HEAD_DIM)
    if unknown := set(names or ()) - ropes.keys():
        raise UserError(f"--pe {min(unknown)} is no rotary encoding: choose from {', '.join(ropes)}")
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
        self.images, self.names, self.shift, self.along = images, names, [], None
        self.prefix, self.heads = model.num_prefix_tokens, model.blocks[0].attn.num_heads
        first = next(images)
        self.side = n = first[0].shape[-1] // model.patch_embed.proj.stride[0]
        self.picture, self.bars, *self.cells = (new_axes(figure) for _ in range(5))
        self.picture.set(xlabel="x, patches", ylabel="y, patches")
        self.maps = []
        for source in ["the patch", "the class token"][: 1 + self.prefix]:
            for head in range(self.heads):
                axes = new_axes(figure, xticks=[], yticks=[], ylabel="" if head else f"from\n{source}")
                axes.spines[:].set(visible=True, color=PALE)
                caption = axes.annotate("", (0.5, 1), (0, 5), "axes fraction", "offset points", ha="center")
                self.maps.append((axes, caption))
        everywhere = [self.picture, *(axes for axes, _ in self.maps)]
        extent = (-0.5, n - 0.5, n - 0.5, -0.5)
        self.pixels, *self.weights = (ax.imshow([[0]], FROM_ZERO, vmin=0, extent=extent) for ax in everywhere)
        self.squares = [
            axes.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor=BLUE, linewidth=2))
            for axes in everywhere[: 1 + self.heads]
        ]
        self.bars.set(xlim=(0, 1), ylim=(4.5, -0.5))
        self.best = [(self.bars.barh(i, 0)[0], self.bars.text(0.02, i, "", va="center")) for i in range(5)]
        for axes in self.bars, *self.cells:
            axes.axis("off")
        if model.blocks[0].attn.rope is None:
            self.cells[1].text(0.5, 0, "This model rotates nothing: it has no positions to shift.", ha="center")
        else:
            self.shift = shift_sliders(self.cells, self.look)
            if self.prefix:
                box = {"frame_props": {"s": 80}, "check_props": {"s": 80}}
                self.along = CheckButtons(self.cells[2], ["the class token, too"], [True], useblit=False, **box)
                self.along.on_clicked(self.look)
        keys = {
            "left": ("layer before", lambda: self.go(-1)),
            "right": ("next layer", lambda: self.go(1)),
            "n": ("next image", lambda: self.open(*next(images))),
        }
        listen(self, keys, "square: the patch that you clicked; above each map: its largest weight")
        texts = [text for _, text in (*self.best, *self.maps)] + [control.valtext for control in self.shift]
        self.redraw = redrawing(figure, texts)
        self.layer, self.query = 0, (n // 2, n // 2)
        self.open(*first)

    def place(self):
        W, H = self.figure.get_size_inches()
        left, top, bottom = 0.3 * W, 0.95, 1.5
        side = min(left - 0.9, H - top - bottom - 2.1)
        put(self.picture, 0.7, top, side, side)
        put(self.bars, 0.7, top + side + 0.55, left - 0.9, 1.5)
        put_controls(self.cells)
        left, width, height = left + 0.6, W - left - 0.8, (H - top - bottom) / (len(self.maps) // self.heads)

        def size(rows):  # of a map, if the heads stand in so many rows
            return min(width / math.ceil(self.heads / rows) - 0.12, height / rows - 0.35)

        rows = max(range(1, self.heads + 1), key=size)
        for i, (axes, caption) in enumerate(self.maps):
            source, head = divmod(i, self.heads)
            row, column = divmod(head, math.ceil(self.heads / rows))
            x, y = left + column * (size(rows) + 0.12), top + (source * rows + row) * (size(rows) + 0.35)
            put(axes, x, y, size(rows), size(rows))
            caption.set_fontsize(min(10, max(5, 9 * size(rows))))

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
        if event.inaxes is self.picture or any(event.inaxes is axes for axes, _ in self.maps):
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
        for i, (image, (_, caption)) in enumerate(zip(self.weights, self.maps, strict=True)):
            found = weights[i % self.heads, tokens[i], self.prefix :]
            most = max(found.max(), 3 / weights.shape[-1])  # so that an even spread is pale
            image.set(data=found.view(self.side, self.side).numpy(), clim=(0, most))
            caption.set_text(f"head {i % self.heads + 1}: {100 * found.max():.1f} %")
        for square in self.squares:
            square.set_xy((x - 0.5, y - 0.5))
        p, classes = self.probabilities.topk(min(5, len(self.names)))
        for (bar, text), share, i in zip(self.best, p.tolist(), classes.tolist(), strict=False):
            bar.set(width=share, color=SKY if i == self.label else PALE)
            text.set_text(f"{self.names[i]}  {100 * share:.1f} %")
        self.redraw()


if __name__ == "__main__":
    sys.exit(main())
