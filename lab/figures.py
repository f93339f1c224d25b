"""Figures: what the encodings do, and the results of training with them.

    python -m lab.figures            # the encodings at initialisation, and lab/results/bearing-*.csv
    python -m lab.figures runs/*     # runs that differ in encoding and seed: curves, frequencies, sizes, shifts, cost

The first command writes PNGs into lab/figures/: attention, order, moving-query (a GIF), frequencies, equivariance,
bearing-corner, bearing-control and bearing-frequencies. The second one writes curves, learned-frequencies, sizes,
shifts and cost into figures/, which git ignores. Sizes and shifts need the results of lab.evaluate. With several seeds,
lines show the mean and bands the range. Each picture is a function that returns a Figure, or None if there is nothing
to show. Figure numbers are those of the paper (van de Geijn et al. 2025, arXiv 2511.08368).
"""

import io
import math
import shlex
import sys
from collections import defaultdict
from inspect import isgenerator
from itertools import cycle
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image

from lab import experiments
from lab.cli import Parser
from lab.datasets import DATASETS
from lab.errors import UserError, one_line_errors
from lab.files import atomic_write
from lab.pictures import BLUE, COLOURS, FROM_ZERO, GREEN, GREY, ORANGE, PALE, RED, SIGNED, SKY, STYLE, heading, style
from lab.rotations import (
    channel_groups,
    encodings,
    equivariance_error,
    equivariant,
    frequencies,
    grid,
    patterns,
    scores,
    symmetry,
    walk,
)
from lab.run import differing, flag, read_of_run, read_run
from rope_mixed import MixedRoPE
from rope_spherical import SphericalRoPE
from vit import ENCODINGS


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders that train.py has written")
    parser.add_argument("--out", type=Path, help="where the pictures go (lab/figures/, of runs: figures/)")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs)
    args.out = args.out or Path("figures" if runs else "lab/figures")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (OF_RUNS if runs else OF_ENCODINGS).items():
        with style(**STYLE):
            figure = draw(runs) if runs else draw()
            path = args.out / f"{name}.{'gif' if isgenerator(figure) else 'png'}"
            if figure:
                with atomic_write(path) as tmp:
                    write_film(tmp, figure) if isgenerator(figure) else figure.savefig(tmp, format="png")
        print(path if figure else f"{path} is skipped: there is nothing to show", flush=True)
    if lacking := [str(run.folder) for run in runs if not run.evaluation]:
        print(f"To include all runs in sizes and shifts: python -m lab.evaluate {shlex.join(lacking)}", file=sys.stderr)


def write_film(path, figures):
    """Write figures as the frames of a GIF with the first one's palette, which takes a third of the space."""
    frames = []
    for figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        image = Image.open(buffer).convert("RGB")
        frames.append(image.quantize(32, palette=frames[0] if frames else None, dither=Image.Dither.NONE))
    frames[0].save(path, format="gif", save_all=True, append_images=frames[1:], duration=100, loop=0)


def titled(title, height, width=9):
    """An empty figure, sizes in inches; at a width of 9 its text is legible on a page of 800 pixels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    heading(figure, title)
    return figure


# What the encodings do.


def attention():
    """Scores of a query in the centre: axial groups show stripes along an axis, others oblique waves (figure 1)."""
    n, ropes = 81, encodings(48)
    figure = titled("In axial encodings and comrope-ap a group varies along one axis, in others it need not", 4.2)
    rows = figure.subplots(4, len(ropes), gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    for column, (name, rope) in zip(rows.T, ropes.items(), strict=True):
        *groups, head = patterns(rope, grid(n, 2 * math.pi).float()).view(-1, n, n)
        groups = [groups[i * len(groups) // 4] for i in range(3)] if len(groups) > 1 else []
        for axes, pattern in zip(column[::-1], [head, *reversed(groups)], strict=False):
            image = axes.imshow(pattern.numpy(), cmap=SIGNED, vmin=-1, vmax=1, extent=(-2, 2, 2, -2))
            axes.plot([-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1], "--", color="black", linewidth=0.7)
        column[0].set_title(name.replace("-", "\n").replace(", ", "\n"))
        if not groups:
            column[1].text(0.5, 0.5, "the head\nis one\ngroup", color=GREY, ha="center", va="center")
    for axes in rows.flat:
        axes.set(xticks=[], yticks=[], box_aspect=1)
        axes.spines[:].set_visible(False)
    for axes, label in zip(rows[:, 0], ["a group", "another", "a third", "the head"], strict=True):
        axes.set_ylabel(label)
    figure.colorbar(image, ax=rows, label="score / |q|²", ticks=[-1, 0, 1], shrink=0.6, aspect=25, pad=0.01)
    about = "position of the key, a copy of the query, which is in the centre; dashed: extent of a training image"
    figure.supxlabel(about, fontsize=10)
    return figure


def order():
    """Two paths to one position: on the circle they end at the same point, on the sphere they do not (figure 2)."""
    mixed, spherical = MixedRoPE(2, 1), SphericalRoPE(3, 1)
    mixed.freqs.data = torch.tensor([[[1.0], [0.6]]])
    pair, triplet = (torch.tensor(z, dtype=torch.float64) for z in ((0.28, -0.96), (0.70, -0.35, 0.62)))
    figure = titled("On a circle the order of two rotations does not matter, on a sphere it does", 3.8)
    plane, circle, sphere = panels = figure.subplots(1, 3)
    plane.set_title("Two paths to one position:\nx, then y; y, then x.")
    circle.set_title("They turn a pair of Mixed RoPE\nto the same angle ...")
    sphere.set_title("... but a triplet of Spherical RoPE\nto two points far apart.")
    for axes in panels:
        axes.set(aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    plane.set(xlim=(-0.07, 1.27), ylim=(1.27, -0.07), xlabel="x", ylabel="y")
    circle.add_patch(Circle((0, 0), 1, facecolor="none", edgecolor=PALE))
    sphere.add_patch(Circle((0, 0), 1, facecolor="#f6f6f6", edgecolor=GREY))
    turn = torch.linspace(0, 2 * math.pi, 200, dtype=torch.float64)
    for height in torch.linspace(-1, 1, 11)[1:-1]:
        ring = torch.stack([turn.cos(), turn.sin(), height.expand(200)], dim=1)
        ring[:, :2] *= (1 - height**2).sqrt()
        sphere.plot(*seen(ring), color=PALE, linewidth=0.8)
    along_x, along_y, both = (1.2, 0.0), (0.0, 1.2), (1.2, 1.2)
    for way, colour, radius in ((along_x, along_y), BLUE, 1.0), ((along_y, along_x), RED, 0.9):
        corners = torch.tensor([[(0.0, 0.0), way[0]], [way[0], both]])
        angles = walk(mixed, pair, *way)
        for end in angles[0, 0], angles[-1, -1]:
            circle.plot([0, end[0]], [0, end[1]], color=PALE, linewidth=1, zorder=0)
        paths = corners.unbind(-1), (radius * angles).unbind(-1), seen(walk(spherical, triplet, *way))
        for axes, (x, y) in zip(panels, paths, strict=True):  # each (2, points): two steps
            axes.plot(x.flatten(), y.flatten(), color=colour, linewidth=2.5)
            axes.plot(x[:, -1], y[:, -1], "o", color=colour)
            axes.plot(x[-1, -1], y[-1, -1], "o", color=colour, markersize=9)
            axes.plot(x[0, 0], y[0, 0], "o", color="black", zorder=3)
    return figure


def seen(points, front=(0.80, -0.48, 0.34)):
    """Points (..., 3) of a sphere as they look from afar, the third axis upwards: x and y (...), NaN if hidden."""
    front = torch.tensor(front, dtype=torch.float64)
    right = torch.stack([-front[1], front[0], 0 * front[2]])
    view = torch.stack([right, torch.linalg.cross(front, right)])
    x, y = (points @ (view / view.norm(dim=1, keepdim=True)).T).unbind(-1)
    hidden = points @ front < 0
    return x.masked_fill(hidden, math.nan), y.masked_fill(hidden, math.nan)


def all_frequencies():
    """How fast each group turns with x and with y, before training (figure 1)."""
    ropes = encodings(48, 6)
    ropes["mixed, uniform init"] = MixedRoPE(48, 6, init="uniform")
    shown = {name: w for name, rope in ropes.items() if (w := frequencies(rope)) is not None}
    figure = titled("Axial frequencies lie on the axes; mixed and spherical ones need not", 4.4)
    panels = figure.subplots(2, len(shown) // 2 + 1, sharex=True, sharey=True)
    for axes, name in zip(panels.flat, shown, strict=False):
        scatter(axes, shown[name])
        axes.set_title(name)
    for axes in panels.flat[len(shown) :]:
        axes.axis("off")
    about = "one dot per pair or triplet,\nb / 2 per ComRoPE block;\none colour per head;\nblack: all heads alike"
    panels[-1, -1].text(0, 0.5, about, va="center", color=GREY, transform=panels[-1, -1].transAxes)
    figure.supxlabel("$w_x$, radians per unit of position", fontsize=10)
    for axes in panels[:, 0]:
        axes.set_ylabel("$w_y$")
    return figure


def scatter(axes, w):
    """Dots at frequencies w (H or 1, 2, groups)."""
    axes.axhline(0, color=PALE, linewidth=1, zorder=0)
    axes.axvline(0, color=PALE, linewidth=1, zorder=0)
    for (x, y), colour in zip(w, cycle(COLOURS) if len(w) > 1 else ["black"], strict=False):
        axes.plot(x, y, "o", color=colour, markersize=3.5, alpha=0.8, markeredgewidth=0)
    axes.set_aspect("equal")


def equivariance():
    """Where R(p)^T R(q) is not R(q - p): nowhere for equivariant encodings.

    LieRE is exact for q on the line through p and the origin, Spherical RoPE for q above or below p, as it yaws last.
    """
    n, ropes = 61, encodings(24)
    kinds = {kind: [name for name in ropes if equivariant(ropes[name]) == kind] for kind in (True, False)}
    p = math.pi * torch.tensor([0.5, 0.25], dtype=torch.float64)
    figure = titled("Scores depend on relative positions; with spherical and LieRE also on absolute ones", 3.9)
    panels = figure.subplots(2, max(len(kinds[True]), len(kinds[False]) + 1))  # one is for text
    for axes in panels.flat:
        axes.axis("off")
    for row, (kind, names) in zip(panels, kinds.items(), strict=True):
        for axes, name in zip(row, names, strict=False):
            error = equivariance_error(ropes[name], p, grid(n)).view(n, n)
            image = axes.imshow(
                error.numpy(), FROM_ZERO, vmin=0, vmax=2, extent=(-1, 1, 1, -1), interpolation="bilinear"
            )
            axes.plot(*p / math.pi, "P", color=BLUE, markeredgecolor="white", markersize=8)
            axes.axis("on")
            axes.spines[:].set_visible(True)
            axes.set(title=name, xticks=[], yticks=[], xlabel=f"up to {error.max():.2g}")
        row[0].set_ylabel("equivariant" if kind else "not equivariant")
    figure.colorbar(image, ax=panels, label="|R(p)ᵀR(q) - R(q - p)|", ticks=[0, 1, 2], shrink=0.8, pad=0.01)
    about = "plus: p; q is any place in\na training image; white:\nR(p)ᵀR(q) = R(q - p)"
    panels[1, len(kinds[False])].text(0, 0.5, about, va="center", color=GREY, in_layout=False)
    return figure


@torch.no_grad()
def moving_query(frames=40):
    """Yield a figure that changes: a query moves across the map of its scores with equal keys at all positions.

    For one group of a head and the whole head. Equivariant patterns move with the query, others change shape.
    """
    n, names = 45, ("axial", "mixed", "comrope-ld", "spherical", "liere, b = 8")
    ropes = {name: rope for name, rope in encodings(24).items() if name in names}
    z = torch.randn(24, dtype=torch.float64)  # the query, and every key
    keys = {name: rope.rotation(grid(n, 1.5 * math.pi))[0] @ z for name, rope in ropes.items()}  # (n * n, D)
    figure = titled("Move the query: equivariant patterns move with it, the others change shape", 4.2)
    rows, shown = figure.subplots(2, len(names)), []
    for column, (name, rope) in zip(rows.T, ropes.items(), strict=True):
        for axes, group in zip(column, (channel_groups(rope)[0], range(24)), strict=True):
            image = axes.imshow(
                torch.zeros(n, n).numpy(), SIGNED.resampled(9), vmin=-1, vmax=1, extent=(-1.5, 1.5, 1.5, -1.5)
            )
            axes.plot([-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1], "--", color="black", linewidth=0.7)
            (dot,) = axes.plot(0, 0, "o", color="black", markeredgecolor="white", markersize=6)
            axes.set(xticks=[], yticks=[])
            shown.append((name, group, image, dot))
        column[0].set_title(f"{name}\n{symmetry(rope)}")
    for axes, label in zip(rows[:, 0], ["a group", "the head"], strict=True):
        axes.set_ylabel(label)
    about = "dot: query; orange: high score for a key there, blue: low; dashed: extent of a training image"
    figure.supxlabel(about, fontsize=10)
    for angle in torch.linspace(0, 2 * math.pi, frames + 1, dtype=torch.float64)[:-1]:
        p = 0.75 * math.pi * torch.stack([angle.sin(), (2 * angle).sin()])
        for name, group, image, dot in shown:
            query = ropes[name].rotation(p[None])[0, 0] @ z
            image.set_data(scores(query, keys[name], group).view(n, n).numpy())
            dot.set_data(*(p / math.pi)[:, None])
        yield figure
        figure.set_layout_engine("none")  # keep that of the first frame


def bearing_corner():
    """Accuracy in the corner that training did not show, a dot per run and a tick for the mean (bearing-corner.csv)."""
    rows, ropes, kinds = experiments.read("bearing-corner"), encodings(24), {}
    if not rows:
        return None
    for pe in dict.fromkeys(row["pe"] for row in rows):
        kinds.setdefault(symmetry(ropes[pe]) if pe in ropes else "no rotation", []).append(pe)
    series = [
        ("a class token", "cls", "region lower right", RED, -0.24),
        ("a class token, moved along", "cls", "token moved lower right", GREEN, 0),
        ("the mean of all patches", "mean", "region lower right", BLUE, 0.24),
    ]
    figure = titled("On average, equivariant models do better in a new place, unless a class token stays behind", 6)
    heights = list(map(len, kinds.values()))
    panels = figure.subplots(len(kinds), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (kind, pes) in zip(panels, kinds.items(), strict=True):
        for label, pool, column, colour, offset in series:
            runs = [row for row in rows if row["pe"] in pes and row["pool"] == pool and row.get(column)]
            place = [pes.index(row["pe"]) + offset for row in runs]
            accuracy = [float(row[column]) for row in runs]
            if runs:  # else the layout would make room for points at the origin of the page
                axes.plot(accuracy, place, "o", color=colour, alpha=0.5, markersize=4, clip_on=False, label=label)
            for y in set(place):
                middle = mean(x for x, at in zip(accuracy, place, strict=True) if at == y)
                axes.plot(middle, y, "|", color=colour, markersize=12, markeredgewidth=2)
        axes.axvline(12.5, color=GREY, linewidth=1, zorder=0)
        axes.set(xlim=(0, 100), ylim=(len(pes) - 0.5, -0.5), yticks=range(len(pes)), yticklabels=pes, ylabel=kind)
        axes.tick_params(length=0)
    figure.align_ylabels(panels)
    names = panels[-1].get_legend_handles_labels()
    figure.legend(*names, title="the classifier reads", loc="outside lower center", ncols=3)
    panels[-1].set_xlabel("accuracy in the opposite corner (%); line: chance")
    return figure


def bearing_control():
    """Accuracies to the right of where a model learned and below it, a dot per run (lab/results/bearing-corner.csv)."""
    rows, ropes, series = experiments.read("bearing-corner"), encodings(24), {}
    for row in rows:
        if row["pool"] == "mean" and row["pe"] in ropes and row.get("region upper right"):
            name = "equivariant encodings" if equivariant(ropes[row["pe"]]) else row["pe"]
            series.setdefault(name, []).append([float(row[f"region {it}"]) for it in ("upper right", "lower left")])
    if not series:
        return None
    title = "On average, Spherical RoPE, which ignores shifts along x,\ncarries over far better to the right than down"
    figure = titled(title, 5.4, width=6)
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=PALE, linewidth=1, zorder=0)
    for (name, found), colour in zip(sorted(series.items()), [SKY, GREEN, RED, ORANGE], strict=False):
        axes.plot(*zip(*found, strict=True), "o", color=colour, alpha=0.6, markersize=5, clip_on=False, label=name)
    axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
    axes.set_xlabel("accuracy (%) to the right of where it learned: upper right quarter")
    axes.set_ylabel("below: lower left quarter")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def bearing_frequencies():
    """The same for one frequency or a range of them, from lab/results/bearing-frequencies.csv."""
    if not experiments.read("bearing-frequencies"):
        return None
    figure = titled("On average, axial carries over well with a period of 7 to 9 patches, spherical with none", 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (pe, colour) in zip(panels, (("axial", BLUE), ("spherical", RED)), strict=True):
        names = []
        for theta, scale in experiments.RANGES:
            flags = {"pe": pe, "pe-options": f"theta={theta}", "pos-scale": scale}
            if numbers := experiments.values("bearing-frequencies", "region lower right", **flags):
                axes.plot([len(names)] * len(numbers), numbers, "o", color=colour, alpha=0.5, clip_on=False)
                axes.plot(len(names), mean(numbers), "_", color=colour, markersize=22, markeredgewidth=2)
                names.append(experiments.frequency_range(pe, theta, scale).replace(" ", "\n", 1))
        axes.axhline(12.5, color=GREY, linewidth=1, zorder=0)
        axes.set_xticks(range(len(names)), labels=names)
        axes.set(title=pe, ylim=(0, 100), xlabel="frequencies, radians per unit of position (period in patches)")
    panels[0].set_ylabel("accuracy in the opposite corner (%)")
    return figure


# The results of training.


def read_runs(folders):
    """Read all runs. Raises UserError if a folder has no run, or if the runs cannot be compared."""
    runs = sorted(map(what_is_known, folders), key=lambda run: list(ENCODINGS).index(run.config["pe"]))
    of_encoding = {"pe", "seed", "pe_options"}
    if differ := {name for run in runs for name in differing(runs[0].config, run.config)} - of_encoding:
        what = ", ".join(map(flag, sorted(differ)))
        raise UserError(f"these runs differ in {what}: name runs that differ only in encoding and seed")
    return runs


def what_is_known(folder):
    """The content of last.pt, result.json and evaluation.json; {} if one of the latter two is missing."""
    saved, model = read_run(folder)
    config = saved["config"]
    name = ", ".join([config["pe"], *(f"{option} = {value}" for option, value in config["pe_options"].items())])
    result, evaluation = (read_of_run(folder / name, config) for name in ("result.json", "evaluation.json"))
    found = {"result": result, "evaluation": evaluation.get("accuracies", {})}
    found["img_size"] = saved["data"].get("img_size") or DATASETS[config["dataset"]].img_size
    return SimpleNamespace(folder=folder, name=name, config=config, log=saved["log"], model=model, **found)


def by_name(runs, values):
    """{name: {x: [y of each seed]}} from values(run) = {x: y}, for the x that all seeds have."""
    seeds = defaultdict(list)
    for run in runs:
        if points := values(run):
            seeds[run.name].append(points)
    shared = {name: sorted(set.intersection(*map(set, points))) for name, points in seeds.items()}
    return {name: {x: [points[x] for points in seeds[name]] for x in xs} for name, xs in shared.items() if xs}


def evaluated(run, kind, number, at):
    """{x: accuracy} of one kind of evaluation, and of the test as the one at x = at; {} if there is none."""
    found = {number(x): y for x, y in run.evaluation.get(kind, {}).items()}
    return found and {at: run.evaluation["test"]["test"]} | found


def best(found):
    """The last x, and the (name, mean) of the two that are highest there."""
    x = max(map(max, found.values()))
    means = [(name, mean(points[x])) for name, points in found.items() if x in points]
    return x, sorted(means, key=lambda entry: entry[1], reverse=True)[:2]


def ranked(entries):
    return ", then ".join(f"{name} {accuracy:.1f} %" for name, accuracy in entries)


def looks(names):
    """{name: how it is drawn}: one colour per class of encodings, one line style and marker per name of that class."""
    classes = {pe: getattr(make, "func", make) for pe, make in ENCODINGS.items()}
    palette = [GREY, *COLOURS, *matplotlib.colormaps["tab20"].colors]
    colours = dict(zip(dict.fromkeys(classes.values()), palette, strict=False))
    variants = {cls: cycle([("-", "o"), ("--", "s"), (":", "^"), ("-.", "D")]) for cls in colours}
    found = {}
    for name in names:
        cls = classes[name.partition(",")[0]]
        style, marker = next(variants[cls])
        found[name] = {"color": colours[cls], "linestyle": style, "marker": marker}
    return found


def lines(title, *panels):
    """Plot accuracy against x. A panel is an x label and a result of by_name. -> the figure, its axes."""
    figure = titled(title, 4.2)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    look = looks(dict.fromkeys(name for _, found in panels for name in found))
    for axes, (label, found) in zip(all_axes, panels, strict=True):
        for name, points in found.items():
            x, (low, middle, high) = list(points), ([f(y) for y in points.values()] for f in (min, mean, max))
            axes.plot(x, middle, label=name, markevery=max(1, len(x) // 10), markersize=4, **look[name])
            axes.fill_between(x, low, high, color=look[name]["color"], alpha=0.15, linewidth=0)
        axes.set_xlabel(label)
    finish(all_axes)
    return figure, all_axes


def finish(panels):
    """Add the y label and a legend beside the panels, in the order of the line ends in the first panel."""
    panels[0].set_ylabel("test accuracy (%)")
    entries = zip(*panels[0].get_legend_handles_labels(), strict=True)
    ends = sorted(entries, key=lambda entry: entry[0].get_ydata()[-1], reverse=True)
    panels[0].figure.legend(*zip(*ends, strict=True), loc="outside right upper", handlelength=3)


def curves(runs):
    """Test accuracy by epoch."""
    if found := by_name(runs, lambda run: {row["epoch"]: row["test_accuracy"] for row in run.log}):
        epoch, first = best(found)
        title = f"Best after epoch {epoch}: {ranked(first)}"
        figure, [axes] = lines(title, (f"epoch on {runs[0].config['dataset']}", found))
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        return figure


def sizes(runs):
    """Test accuracy by image size, at the same patch size (figure 3)."""
    trained = runs[0].img_size
    if found := by_name(runs, lambda run: evaluated(run, "size", int, run.img_size)):
        size, first = best(found)
        title = f"Best at {size} pixels: {ranked(first)}"
        figure, [axes] = lines(title, ("side of the test images in pixels; line: of the training images", found))
        axes.axvline(trained, color=PALE, zorder=0)
        axes.set_xticks(sorted(set().union(*found.values())))
        return figure


def shifts(runs):
    """Test accuracy when all positions shift, or all but the class token's (Yu et al. 2025, figure 5)."""
    every = "shift of all positions, in patches", by_name(runs, lambda run: evaluated(run, "shift", float, 0.0))
    but_one = "of all but the class token's", by_name(runs, lambda run: evaluated(run, "patch shift", float, 0.0))
    if panels := [(label, found) for label, found in (every, but_one) if found]:
        figure, all_axes = lines("Equivariant encodings ignore a shift of all positions", *panels)
        for axes, (_, found) in zip(all_axes, panels, strict=True):
            ticks = sorted(set().union(*found.values()))
            axes.set_xscale("symlog", base=2, linthresh=1)
            axes.set_xticks(ticks, labels=[f"{x:g}" for x in ticks])
            axes.set_xlim(-0.2, 1.2 * ticks[-1])
        return figure


def cost(runs):
    """Test accuracy by training time, one marker per run, if all runs used the same kind of device."""
    done = [run for run in runs if run.result]
    if len({run.result["device"] for run in done}) == 1:
        fastest = max(run.result["images_per_second"] for run in done)
        time = by_name(done, lambda run: {"": fastest / run.result["images_per_second"]})
        accuracy = by_name(done, lambda run: {"": run.result["test_accuracy"]})
        _, first = best(accuracy)
        dearest = max(mean(points[""]) for points in time.values())
        figure = titled(f"Best: {ranked(first[:1])}; times differ by a factor of up to {dearest:.2f}", 4.2)
        axes = figure.subplots()
        for name, look in looks(time).items():
            axes.plot(time[name][""], accuracy[name][""], label=name, **look | {"linestyle": ""})
        axes.set_xlabel("training time per image, fastest run = 1")
        finish([axes])
        return figure


def learned_frequencies(runs):
    """(w_x, w_y) by layer, of the first run of each encoding that learns them (figures 4 and 5)."""
    shown = {}
    for run in runs:
        ropes = [block.attn.rope for block in run.model.blocks]
        if ropes[0] is not None and list(ropes[0].parameters()) and frequencies(ropes[0]) is not None:
            shown.setdefault(run.name, list(map(frequencies, ropes)))
    if shown:
        depth = len(runs[0].model.blocks)
        layers = [round(i * (depth - 1) / 5) for i in range(6)] if depth > 6 else range(depth)
        figure = titled("Frequencies after training, by layer", 0.9 + 1.6 * len(layers), max(4.5, 1.8 * len(shown)))
        panels = figure.subplots(len(layers), len(shown), squeeze=False, sharex=True, sharey=True)
        for column, (name, w) in zip(panels.T, shown.items(), strict=True):
            column[0].set_title(name)
            for axes, layer in zip(column, layers, strict=True):
                scatter(axes, w[layer])
        for axes, layer in zip(panels[:, 0], layers, strict=True):
            axes.set_ylabel(f"layer {layer + 1}\n$w_y$")
        figure.supxlabel("$w_x$, radians per unit of position; one colour per head", fontsize=10)
        return figure


OF_ENCODINGS = {
    "attention": attention,
    "order": order,
    "moving-query": moving_query,
    "frequencies": all_frequencies,
    "equivariance": equivariance,
    "bearing-corner": bearing_corner,
    "bearing-control": bearing_control,
    "bearing-frequencies": bearing_frequencies,
}
OF_RUNS = {
    "curves": curves,
    "learned-frequencies": learned_frequencies,
    "sizes": sizes,
    "shifts": shifts,
    "cost": cost,
}

if __name__ == "__main__":
    sys.exit(main())
