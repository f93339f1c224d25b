"""Write the tables of README.md and lab/results/README.md from the rows in lab/results/.

    python -m lab.report

A table stands between two marks, <!-- NAME --> and <!-- /NAME -->. Most have a row per encoding.
"""

import itertools
import math
import re
import statistics
import sys
from functools import partial

from lab.cli import Parser
from lab.errors import UserError, one_line_errors
from lab.experiments import NOT_EQUIVARIANT, RANGES, RESULTS, ROOT, matches, read
from lab.files import atomic_write, read_json
from lab.results.stats import (
    as_text,
    difference,
    mean_and_interval,
    permutation_test,
    sign_flip_test,
    standard_error,
)
from vit import ENCODINGS


@one_line_errors
def main(argv=None):
    Parser(__doc__).parse_args(argv)
    report()


PUBLISHED = {  # van de Geijn et al. 2025: a table's columns, each a title and its cells
    "table2": {
        "CIFAR-100, 400 epochs": {
            "ape": "64.2 ± 0.9",
            "axial": "72.1 ± 0.6",
            "axial-learned": "72.9 ± 0.6",
            "uniform": "70.5 ± 0.2",
            "mixed": "74.7 ± 0.3",
            "spherical": "73.2 ± 0.4",
            "spherical-learned": "74.1 ± 0.4",
            "liere": "73.1 ± 0.2",
        },
        "ImageNet-1k, 200 epochs": {
            "ape": "72.7 ± 0.1",
            "axial": "75.6 ± 0.2",
            "axial-learned": "75.7 ± 0.4",
            "uniform": "74.9 ± 0.3",
            "mixed": "77.4 ± 0.1",
            "spherical": "76.4 ± 0.3",
            "spherical-learned": "77.4 ± 0.2",
        },
    },
    "table7": {
        "20, 40, 60, 80 % of CIFAR-100": {
            "ape": "45.9, 53.4, 57.7, 59",
            "axial": "55.3, 63.3, 66.0, 69.9",
            "axial-learned": "56.6, 62.5, 66.8, 69.1",
            "uniform": "52.8, 59.7, 64.1, 65.8",
            "mixed": "56.9, 64.4, 70.0, 71.6",
            "spherical": "56.0, 63.6, 67.6, 69.8",
            "spherical-learned": "57.2, 65.3, 69.8, 72.6",
        },
    },
}


def values(name, column="accuracy", **flags):
    """A column of lab/results/<name>.csv, from the rows that match these flags."""
    return [float(row[column]) for row in read(name) if matches(row, flags) and row.get(column)]


def paired(*series):
    """A list of numbers for each (set, column, flags) in series, from the seeds that all of them have."""
    found = [
        {row["seed"]: float(row[column]) for row in read(name) if matches(row, flags) and row.get(column)}
        for name, column, flags in series
    ]
    return [[numbers[seed] for seed in sorted(set.intersection(*map(set, found)))] for numbers in found]


def measured(name, column="accuracy", **flags):
    """A function cell(pe): the mean over seeds of a column of lab/results/<name>.csv, and its interval."""
    return lambda pe: mean_and_interval(values(name, column, pe=pe, **flags))


def benchmark(file):
    """The rows of lab/results/<file>.json; none if there is no such file."""
    path = RESULTS / f"{file}.json"
    rows = read_json(path).get("rows")
    if path.exists() and not rows:
        raise UserError(f"{path} is corrupt (it has no rows): restore it from a copy")
    return rows or []


def cost(file, what, **sizes):
    """A function cell(pe): a ratio from lab.benchmark's lab/results/<file>.json, with quartiles if it is of times."""

    def cell(pe):
        for row in benchmark(file):
            if (sizes | {"what": what, "pe": pe}).items() <= row.items():
                spread = f" ({row['low']:.2f} to {row['high']:.2f})" if row.get("low") is not None else ""
                return f"{row['ratio']:.{2 if row['ratio'] < 10 else 0}f}{spread}"
        return None

    return cell


def seeds(name, **flags):
    """A function cell(pe): the number of runs."""
    return lambda pe: str(sum(matches(row, flags | {"pe": pe}) for row in read(name)) or "")


def sizes(name, *pixels):
    """The columns of accuracies at other sizes, and with shuffled patches."""
    found = {f"{size} px": f"size {size}" for size in pixels} | {"shuffled patches": "patches shuffled"}
    columns = [(title, measured(name, column)) for title, column in found.items()]
    return [("test", measured(name)), *columns, ("seeds", seeds(name))]


def shifts(name):
    """The columns of accuracies with shifted positions, which only rotary encodings see."""
    found = {"all by 4": "shift 4", "all by 16": "shift 16"}
    found |= {"patches by 1": "patch shift 1", "patches by 4": "patch shift 4"}
    return [(title, measured(name, column)) for title, column in found.items()]


ROTARY = [pe for pe, rope in ENCODINGS.items() if rope]
PLACES = {"where it learned": "upper left", "opposite corner": "lower right", "everywhere": "everywhere"}
MOVED = {title: f"region {place}" for title, place in PLACES.items()}
MOVED |= {"moved right": "all moved right", "moved down": "all moved down"}


def corner(pool):
    """The columns of bearing-corner, for one way to pool."""
    columns = [(title, measured("bearing-corner", f"region {place}", pool=pool)) for title, place in PLACES.items()]
    moved = ("opposite corner, token moved", measured("bearing-corner", "token moved lower right", pool=pool))
    return [*columns, *[moved] * (pool == "cls"), ("seeds", seeds("bearing-corner", pool=pool))]


TABLES = {  # name: columns, each a title and a cell(pe), which returns None or "" if nothing was measured
    "table2": [
        ("400 epochs", measured("table2", epochs=400)),
        ("seeds", seeds("table2", epochs=400)),
        ("50 epochs", measured("table2", epochs=50)),
        ("seeds", seeds("table2", epochs=50)),
    ],
    "figure3": [
        *((f"{size} px", measured("table2", f"size {size}", epochs=50)) for size in (24, 28, 32, 40, 48, 56, 64)),
        ("seeds", seeds("table2", epochs=50)),
    ],
    "cifar100-medium": sizes("cifar100-medium", 24, 48, 64),
    "cifar100-medium-shifts": shifts("cifar100-medium"),
    "cifar100-small": sizes("cifar100-small", 24, 48, 64),
    "cifar100-small-shifts": shifts("cifar100-small"),
    "cost": [
        ("on a GPU", cost("benchmark-cuda", "training step")),
        ("on a CPU", cost("benchmark-cpu", "training step")),
        ("inference, on a CPU", cost("benchmark-cpu", "inference")),
        ("memory of a step", cost("benchmark-cpu", "training step, memory")),
    ],
    "cost-alone": [
        (
            "encoding alone, of attention",
            cost("benchmark-cpu", "encoding, forward and backward", part="tokens", tokens=1024),
        ),
        ("its memory, of q and k", cost("benchmark-cpu", "encoding, memory")),
    ],
    "table7": [
        *((f"{part:.0%}, 50 epochs", measured("table7", fraction=part)) for part in (0.2, 0.4, 0.6, 0.8)),
        ("seeds", seeds("table7", fraction=0.2)),
    ],
    "bearing": sizes("bearing", 24, 48, 64),
    "bearing-shifts": shifts("bearing"),
    "corner-mean": corner("mean"),
    "corner-cls": corner("cls"),
    "summary": [
        ("`bearing`", measured("bearing")),
        ("all positions shifted, s.d. 16 patches", measured("bearing", "shift 16")),
        ("opposite corner, no class token", measured("bearing-corner", "region lower right", pool="mean")),
        ("cost of a training step", cost("benchmark-cpu", "training step")),
    ],
}


def peers():
    """Rows that compare our encodings with other implementations."""
    rows, found = benchmark("peers-cpu"), {}
    for row in rows:
        found.setdefault((row["pe"], row["base"]), {})[row["what"]] = f"{row['ratio']:.2f}"
    titles = list(dict.fromkeys(row["what"] for row in rows))
    lines = [[f"`{pe}`", base, *map(times.get, titles)] for (pe, base), times in found.items()]
    return [["`--pe`", "beside", *titles], *lines]


def frequencies():
    """Accuracies in the corners and everywhere, for encodings with one frequency or a range of them.

    p tests the difference between the two encodings in the opposite corner.
    """
    lines = []
    for pe, (theta, scale) in itertools.product(("axial", "spherical"), RANGES):
        name, flags = "bearing-frequencies", {"pe-options": f"theta={theta}", "pos-scale": scale}
        found = [values(name, f"region {place}", pe=pe, **flags) for place in PLACES.values()]
        if found[0]:
            other = pe != "axial" and values(name, "region lower right", pe="axial", **flags)
            p = as_text(permutation_test(found[1], other)) if other else ""
            cells = [*map(mean_and_interval, found), str(len(found[0])), p]
            lines.append([f"`{pe}`", frequency_range(pe, theta, scale), *cells])
    return [["`--pe`", "frequencies (period in patches)", *PLACES, "seeds", "p, opposite corner"], *lines]


def frequency_range(pe, theta, scale):
    """An encoding's lowest and highest frequency in the ViT of bearing, as text; or its only one, and the period."""
    w = scale * ENCODINGS[pe](24, 4, theta=theta).frequencies().unique()
    return f"{w[0]:g} ({7 / w[0]:.3g})" if len(w) == 1 else f"{w[0]:.2g} to {w[-1]:g}"  # 7 patches span 2 pi


def corner_test():
    """Rows that test whether equivariant encodings do better in the opposite corner."""
    lines = []
    for title, pool, column, without in (
        ("mean", "mean", "region lower right", None),
        ("mean, without `uniform`", "mean", "region lower right", "uniform"),
        ("cls", "cls", "region lower right", None),
        ("cls, token moved", "cls", "token moved lower right", None),
    ):
        rotary = [pe for pe in ROTARY if pe != without]
        found = {pe: values("bearing-corner", column, pe=pe, pool=pool) for pe in rotary}
        runs = [(file_of(pe), number) for pe, numbers in found.items() for number in numbers]
        encodings = [(file_of(pe), statistics.mean(numbers)) for pe, numbers in found.items() if numbers]
        files = [(file, statistics.mean(mean for of, mean in encodings if of == file)) for file in dict(encodings)]
        a, b = by_kind(encodings)
        if a and b:
            error = math.sqrt(sum(statistics.pvariance(means) / max(1, len(means) - 1) for means in (a, b)))  # Welch's
            tests = {"encodings": encodings, "files": files, "runs": runs}
            lines.append(
                [
                    title,
                    *(f"{statistics.mean(means):.1f} ({min(means):.1f} to {max(means):.1f})" for means in (a, b)),
                    f"{statistics.mean(a) - statistics.mean(b):.1f} ± {error:.1f}",
                    *(
                        f"{as_text(permutation_test(*by_kind(pairs)))} ({len(pairs)} {name})"
                        for name, pairs in tests.items()
                    ),
                ]
            )
    titles = ["equivariant", "not equivariant", "difference, s.e.", "p over encodings", "p over files", "p over runs"]
    return [["`--pool`", *titles], *lines]


def by_kind(pairs):
    """Numbers, given with their encoding's file, in two lists: of equivariant encodings and of the others.

    A file's docstring says which it is; tests/test_equivariance.py verifies it.
    """
    kinds = [], []
    for file, number in pairs:
        kinds["not equivariant" in " ".join(sys.modules[file].__doc__.split())].append(number)
    return kinds


def file_of(pe):
    return getattr(ENCODINGS[pe], "func", ENCODINGS[pe]).__module__


def control():
    """Rows of what the same runs carry over along x and along y; and with positions moved by half an image instead.

    With the two quarters' difference, its standard error over seeds and p by flipping its signs.
    """
    lines = []
    for pe in ROTARY:
        flags = {"pe": pe, "pool": "mean"}
        places = "region upper left", "region upper right", "region lower left", "all moved right", "all moved down"
        learned, right, below, *moved = paired(*(("bearing-corner", place, flags) for place in places))
        if right:
            cells = [*map(mean_and_interval, (learned, right, below)), difference(right, below)]
            cells += [as_text(sign_flip_test(right, below)), *map(mean_and_interval, moved), str(len(right))]
            lines.append([f"`{pe}`", *cells])
    titles = ["where it learned", "upper right", "lower left", "difference, s.e.", "p", "moved right", "moved down"]
    return [["`--pe`", *titles, "seeds"], *lines]


def under_shifts(dataset, base, columns, **flags):
    """Rows of encodings that are not equivariant, trained as usual (in the set base) and under shifts of all positions.

    With the change of the first column, paired by seed.
    """
    titles, columns = zip(*columns.items(), strict=True)
    lines = []
    for pe in NOT_EQUIVARIANT:
        runs = {"0": (base, {"pe": pe} | flags), "4": ("shift", {"pe": pe, "dataset": dataset})}
        usual, shifted = paired(*((name, columns[0], of) for name, of in runs.values()))
        for shift, (name, of) in runs.items():
            found = [values(name, column, **of) for column in columns]
            if found[0]:
                change = difference(shifted, usual) if shift != "0" and usual else ""
                first, *rest = map(mean_and_interval, found)
                lines.append([f"`{pe}`", shift, first, change, *rest, str(len(found[0]))])
    return [["`--pe`", "`--shift`", titles[0], "change, s.e.", *titles[1:], "seeds"], *lines]


def compared():
    """Rows of bearing's differences to two encodings, paired by seed, with standard errors and permutation tests."""
    lines, others = [], ("axial", "liere")
    for pe in ROTARY:
        cells = []
        for other in others:
            ours, theirs = paired(*(("bearing", "accuracy", {"pe": of}) for of in (pe, other)))
            told = ours and pe != other
            cells += [difference(ours, theirs), as_text(permutation_test(ours, theirs))] if told else ["", ""]
        if any(cells):
            lines.append([f"`{pe}`", *cells])
    return [["`--pe`", *itertools.chain(*((f"minus `{other}`, s.e.", "p") for other in others))], *lines]


def differences(name):
    """Rows of a set's differences to axial, from the seeds that all its encodings have, beside those of table 2."""
    known = [pe for pe in ENCODINGS if pe != "none" and len(values(name, pe=pe)) > 1]
    found = dict(zip(known, paired(*((name, "accuracy", {"pe": pe}) for pe in known)), strict=True))
    if "axial" not in found or len(found) < 2:
        return []
    error = standard_error(list(found.values()))

    def minus_axial(means, digits):
        return [f"{means[pe] - means['axial']:+.{digits}f}" if pe in means else "-" for pe in known if pe != "axial"]

    columns = {f"minus `axial`, s.e. {error:.2f}": minus_axial({pe: statistics.mean(found[pe]) for pe in known}, 2)}
    for title, cells in PUBLISHED["table2"].items():
        means = {pe: float(cell.split()[0]) for pe, cell in cells.items()}
        columns[f"published: {title}"] = minus_axial(means, 1)
    rows = zip((f"`{pe}`" for pe in known if pe != "axial"), *columns.values(), strict=True)
    return [["`--pe`", *columns], *map(list, rows)]


OTHER_TABLES = {
    "peers": peers,
    "frequencies": frequencies,
    "corner-test": corner_test,
    "control": control,
    "under-shifts": partial(under_shifts, "bearing-corner", "bearing-corner", MOVED, pool="mean"),
    "cifar100-under-shifts": partial(
        under_shifts, "cifar100", "cifar100-small", {"test": "accuracy", "all by 4": "shift 4"}
    ),
    "compared": compared,
    "cifar100-small-differences": partial(differences, "cifar100-small"),
    "cifar100-medium-differences": partial(differences, "cifar100-medium"),
}


def report(paths=(ROOT / "README.md", RESULTS / "README.md")):
    """Write the tables into the pages, each between its marks."""
    pages = {}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for name in re.findall("<!-- ([a-z0-9-]+) -->\n", text):
            start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
            before, _, rest = text.partition(start)
            old, found, after = rest.partition(end)
            if not found or name not in TABLES | OTHER_TABLES:
                names = ", ".join(TABLES | OTHER_TABLES)
                raise UserError(f"{path} has {start.strip()} without {end} after it, or its name is not in {names}")
            new = table(name)
            if old.strip() and not new:
                raise UserError(f"{path} would lose its table {name}: restore the rows in {RESULTS}")
            text = before + start + new + end + after
        pages[path] = text
    for path, text in pages.items():
        with atomic_write(path) as tmp:
            tmp.write_text(text, encoding="utf-8")


def table(name):
    """The table in Markdown; empty if nothing was measured."""
    lines = OTHER_TABLES[name]() if name in OTHER_TABLES else of_encodings(name)
    if len(lines) < 2:
        return ""
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def of_encodings(name):
    """A row per encoding and a column per title, where anything was measured or published."""
    published = [(f"published: {title}", cells.get) for title, cells in PUBLISHED.get(name, {}).items()]
    columns = [*published, *TABLES[name]]
    found = {pe: [cell(pe) for _, cell in columns] for pe in ENCODINGS}
    found = {pe: cells for pe, cells in found.items() if any(cells) and (name != "summary" or all(cells))}
    kept = [i for i, column in enumerate(zip(*found.values(), strict=True)) if any(column)]
    not_run = ["not run yet"] * (len(kept) == len(published) > 0)
    lines = [["`--pe`", *(columns[i][0] for i in kept), *(["here"] if not_run else [])]]
    return lines + [[f"`{pe}`", *(cells[i] or "-" for i in kept), *not_run] for pe, cells in found.items()]


if __name__ == "__main__":
    sys.exit(main())
