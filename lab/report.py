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
from lab.experiments import NOT_EQUIVARIANT, RANGES, RESULTS, ROOT, frequency_range, matches, read, values
from lab.files import atomic_write, read_json
from vit import ENCODINGS


@one_line_errors
def main(argv=None):
    Parser(__doc__).parse_args(argv)
    report()


def mean_and_error(numbers, sign="", like=()):
    """The mean over the seeds and its standard error, from the mean variance of samples like it; None if empty."""
    if not numbers:
        return None
    mean = f"{statistics.mean(numbers):{sign}z.1f}"  # z: no -0.0
    if len(numbers) == 1:
        return mean
    variance = statistics.mean(statistics.variance(x) for x in like or [numbers] if len(x) > 1)
    return f"{mean} ± {math.sqrt(variance / len(numbers)):.1f}"


def differences(of, to):
    """One column minus another, each a (set, column, flags), paired by seed."""
    a, b = (
        {row.get("seed"): float(row[column]) for row in read(name) if matches(row, flags) and row.get(column)}
        for name, column, flags in (of, to)
    )
    return [a[seed] - b[seed] for seed in a if seed in b]


def measured(name, column="accuracy", **flags):
    """A function cell(pe): the mean over seeds of a column of lab/results/<name>.csv, and its standard error.

    And the number of runs, if some lack the column.
    """

    def cell(pe):
        numbers, runs = values(name, column, pe=pe, **flags), values(name, pe=pe, **flags)
        return numbers and mean_and_error(numbers) + f" (n = {len(numbers)})" * (len(numbers) < len(runs))

    return cell


def minus(name, other, pooled=False):
    """A function cell(pe): its accuracy minus another encoding's; pooled: with one standard error for all, if few."""

    def to_other(pe):
        return differences(*((name, "accuracy", {"pe": of}) for of in (pe, other)))

    others = [pe for pe in ENCODINGS if pe != other]
    return lambda pe: pe != other and mean_and_error(to_other(pe), "+", [*map(to_other, others)] if pooled else ())


def benchmark(file):
    """The rows of lab/results/<file>.json; none if there is no such file."""
    return read_json(RESULTS / f"{file}.json").get("rows", [])


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


def accuracies(name, *more, pooled=False):
    """The columns of accuracies as trained, and more columns."""
    beside_axial = "minus `axial`", minus(name, "axial", pooled)
    return [("test", measured(name)), beside_axial, *more, ("seeds", seeds(name))]


def sizes(name):
    """The columns of accuracies at other sizes."""
    return [(f"{size} px", measured(name, f"size {size}")) for size in (24, 48, 64)]


def shifts(name):
    """The columns of accuracies with shifted positions, which only rotary encodings see."""
    found = {"all by 4": "shift 4", "all by 16": "shift 16"}
    found |= {"patches by 1": "patch shift 1", "patches by 4": "patch shift 4"}
    return [(title, measured(name, column)) for title, column in found.items()]


def corner(pool):
    """The columns of bearing-corner, for one way to pool."""

    def right_minus_below(pe):
        places = "region upper right", "region lower left"
        return mean_and_error(differences(*(("bearing-corner", it, {"pe": pe, "pool": pool}) for it in places)), "+")

    columns = {
        "where it learned": "region upper left",
        "upper right": "region upper right",
        "lower left": "region lower left",
        "left for right there": "left for right lower left",
        "opposite corner": "region lower right",
        "opposite corner, token moved": "token moved lower right",
        "moved down": "all moved down",
    }
    found = [(title, measured("bearing-corner", column, pool=pool)) for title, column in columns.items()]
    found.insert(3, ("right minus below", right_minus_below))
    return [*found, ("seeds", seeds("bearing-corner", pool=pool))]


def published(name):
    """The columns of a table in van de Geijn et al. 2025, each a title and a cell(pe)."""
    rows = {row["pe"]: row for row in read("published")}
    titles = [title for title in next(iter(rows.values()), {}) if title.startswith(f"{name}: ")]
    return [(title.removeprefix(f"{name}: "), lambda pe, title=title: rows.get(pe, {}).get(title)) for title in titles]


def published_minus_axial(pe):
    """The difference on CIFAR-100 in the paper, for encodings of cifar100-medium."""
    means = {row["pe"]: float(row["table2: CIFAR-100, 400 epochs"].split()[0]) for row in read("published")}
    known = means.keys() - {"axial"}
    return pe in known and values("cifar100-medium", pe=pe) and f"{means[pe] - means['axial']:+.1f}"


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
    "cifar100-medium": accuracies(
        "cifar100-medium",
        ("in the paper", published_minus_axial),
        *sizes("cifar100-medium"),
        ("shuffled patches", measured("cifar100-medium", "patches shuffled")),
        pooled=True,
    ),
    "cifar100-medium-shifts": shifts("cifar100-medium"),
    "cifar100-small": accuracies("cifar100-small", pooled=True),
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
    "bearing": accuracies("bearing", *sizes("bearing")),
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
    """Accuracies in the corners and everywhere, for encodings with one frequency or a range of them."""
    lines, name = [], "bearing-frequencies"
    columns = {
        "where it learned": "region upper left",
        "opposite corner": "region lower right",
        "everywhere": "region everywhere",
        "lower left, left for right": "left for right lower left",
    }
    for pe, (theta, scale) in itertools.product(("axial", "spherical"), RANGES):
        flags = {"pe-options": f"theta={theta}", "pos-scale": scale}
        found = [values(name, column, pe=pe, **flags) for column in columns.values()]
        if found[0]:
            both = ((name, "region lower right", flags | {"pe": of}) for of in (pe, "axial"))
            change = mean_and_error(differences(*both), "+") if pe != "axial" else None
            cells = [*(mean_and_error(numbers) or "-" for numbers in found), change or "", str(len(found[0]))]
            lines.append([f"`{pe}`", frequency_range(pe, theta, scale), *cells])
    titles = *columns, "opposite corner, minus `axial`", "seeds"
    return [["`--pe`", "frequencies (period in patches)", *titles], *lines]


def under_shifts(dataset, base, columns, **flags):
    """Rows of encodings that are not equivariant, trained as usual (in the set base) and under shifts of all positions.

    From the seeds that were trained under shifts; with the change of the first column.
    """
    titles, columns = zip(*columns.items(), strict=True)
    lines = []
    for pe in NOT_EQUIVARIANT:
        runs = {"0": (base, {"pe": pe} | flags), "4": ("shift", {"pe": pe, "dataset": dataset})}
        used = [row["seed"] for row in read("shift") if matches(row, runs["4"][1])]
        change = differences(*((name, columns[0], of) for name, of in reversed(runs.values())))
        for shift, (name, of) in runs.items():
            found = [[x for seed in used for x in values(name, column, seed=seed, **of)] for column in columns]
            if found[0]:
                cells = [mean_and_error(numbers) or "" for numbers in found]
                cells.insert(1, (shift != "0" and mean_and_error(change, "+")) or "")
                cells.append(str(len(found[0])))
                lines.append([f"`{pe}`", shift, *cells])
    return [["`--pe`", "`--shift`", titles[0], "change", *titles[1:], "seeds"], *lines]


PLACES = {  # columns of bearing-corner
    "where it learned": "region upper left",
    "upper right": "region upper right",
    "lower left": "region lower left",
    "opposite corner": "region lower right",
    "moved down": "all moved down",
    "shifts, s.d. 16": "shift 16",
}
OTHER_TABLES = {
    "peers": peers,
    "frequencies": frequencies,
    "under-shifts": partial(under_shifts, "bearing-corner", "bearing-corner", PLACES, pool="mean"),
    "cifar100-under-shifts": partial(
        under_shifts, "cifar100", "cifar100-small", {"test": "accuracy", "all by 4": "shift 4", "all by 16": "shift 16"}
    ),
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
    of_paper = [(f"published: {title}", cell) for title, cell in published(name)]
    columns = [*of_paper, *TABLES[name]]
    found = {pe: [cell(pe) for _, cell in columns] for pe in ENCODINGS}
    found = {pe: cells for pe, cells in found.items() if any(cells) and (name != "summary" or all(cells))}
    kept = [i for i, column in enumerate(zip(*found.values(), strict=True)) if any(column)]
    not_run = ["not run yet"] * (len(kept) == len(of_paper) > 0)
    lines = [["`--pe`", *(columns[i][0] for i in kept), *(["here"] if not_run else [])]]
    return lines + [[f"`{pe}`", *(cells[i] or "-" for i in kept), *not_run] for pe, cells in found.items()]


if __name__ == "__main__":
    sys.exit(main())
