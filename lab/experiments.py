"""Runs the experiments, keeps their results in lab/results/, and writes the README's tables from these.

    python -m lab.experiments bearing bearing-corner        # on a CPU: minutes a run
    python -m lab.experiments cifar100-small                # on a CPU: a quarter of an hour a run
    python -m lab.experiments table2 --minutes 25           # on a GPU: stops by itself, and goes on when called again
    python -m lab.experiments --report                      # the README's tables, from lab/results/

A set is a list of runs, the most important first. Each is a `python train.py` and, for some sets, a
`python -m lab.evaluate`; then it has a row in lab/results/<set>.csv, which quotes the command, and is not run again.
Run folders stay in runs/, so that a run that was cut short continues where it was.
"""

import sys

if not __package__:  # started as python lab/experiments.py
    sys.path[0] += "/.."

import csv
import math
import re
import shlex
import statistics
import subprocess
import time
from pathlib import Path

from lab.cli import Parser, UserError, number, one_line_errors
from lab.distributed import on_signals
from lab.files import read_json, replacing, write_csv
from lab.runs import NUMBER, read_evaluation, read_result, reading, require
from vit import ENCODINGS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "lab" / "results"
SEEDS = range(3)


def cifar(epochs, encodings=ENCODINGS, seeds=SEEDS, **flags):
    return [{"pe": pe, "seed": seed, "epochs": epochs, **flags} for seed in seeds for pe in encodings]


def bearing(dataset, seeds, encodings=ENCODINGS, **flags):
    return [{"pe": pe, "seed": seed, "dataset": dataset, **flags} for seed in seeds for pe in encodings]


# The short schedule first, then the paper's: with the three encodings that it compares most closely, then with all.
TABLE2 = cifar(50) + cifar(400, ["mixed", "spherical-learned", "axial"]) + cifar(400)
TABLE7 = [run for fraction in (0.2, 0.4, 0.6, 0.8) for run in cifar(50, seeds=[0], fraction=fraction)]
# For those who have no GPU: the ViT that learns bearing.
PLAIN_VIT = {"depth": 2, "heads": 4, "head-dim": 24, "dropout": 0, "drop-path": 0, "layer-scale": 0}
SMALL = cifar(4, **PLAIN_VIT, **{"batch-size": 64, "opt": "adamw", "augment": "none", "compile": True})
# One frequency or a range of them, for an encoding that is equivariant and for one that is not.
RANGES = [(1, 0.5), (1, 1), (1, 2), (10, 1), (100, 1), (1000, 1)]
FREQUENCIES = [
    {**run, "pos-scale": scale, "pe-options": f"theta={theta}"}
    for seed in range(6)
    for theta, scale in RANGES
    for run in bearing("bearing-corner", [seed], ["axial", "spherical"], pool="mean")
]
SETS = {  # runs, each one a dict of train.py's flags, in order of worth; and evaluate.py's flags, if it has a part
    "bearing": (bearing("bearing", range(6)), "--sizes 24 48 64 --shift 4 16 --patch-shift 1 4 --shuffle"),
    "bearing-corner": (
        [run for pool in ("mean", "cls") for run in bearing("bearing-corner", range(12), pool=pool)],
        "--regions",
    ),
    "bearing-frequencies": (FREQUENCIES, "--regions"),
    "cifar100-small": (SMALL, "--sizes 24 48 64 --shift 4 16 --patch-shift 1 4 --shuffle"),
    "table2": (TABLE2, "--sizes --shift 4 16 --shuffle"),
    "table7": (TABLE7, ""),
}
TEXT = "pe", "pe-options", "dataset", "pool", "opt", "augment", "compile", "device", "torch", "commit", "command"
SAME = {"figure3": "table2"}  # the same runs, tested at other sizes


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"what to run: {', '.join(SETS | SAME)}")
    parser.add_argument("--minutes", type=number(float), default=math.inf, help="stop before that much time is over")
    parser.add_argument("--report", action="store_true", help="write the README's tables from results/")
    args = parser.parse_args(argv)
    if unknown := set(args.sets) - set(SETS | SAME):
        parser.error(f"there is no set {', '.join(unknown)}: take {', '.join(SETS | SAME)}")
    if not args.sets and not args.report:
        parser.error(f"nothing to do: name a set ({', '.join(SETS | SAME)}) or add --report")
    deadline = time.monotonic() + 60 * args.minutes
    code = 0
    try:
        with on_signals(interrupt):
            for name in args.sets:
                run_set(SAME.get(name, name), deadline)
    except Stopped as e:
        print(e, file=sys.stderr)
        code = e.code
    if args.report:
        report()
    return code


class Stopped(Exception):
    """Why no more is run, and the exit code."""

    def __init__(self, why, code=0):
        super().__init__(why)
        self.code = code


def run_set(name, deadline):
    """Train and evaluate what results/<name>.csv has no row of, one after another; raises Stopped at the deadline."""
    runs, evaluation = SETS[name]
    rate = 0  # seconds an epoch, the slowest so far
    for flags in runs:
        if any(matches(row, flags) for row in read(name)):
            continue
        start, epochs = time.monotonic(), flags.get("epochs", 1)
        if start + rate * epochs > deadline:
            raise Stopped("There is no time for another run. The same command goes on.")
        out = Path("runs", ",".join(f"{flag}={value}" for flag, value in flags.items()))
        train = ["train.py", *as_flags(flags)]
        resume = ["--resume"] if (out / "last.pt").exists() else []
        call([*train, f"--out={out}", *resume], deadline)
        result = read_result(out)
        row = flags | {"epochs": result["epochs"], "accuracy": result["test_accuracy"]}
        if evaluation:
            call(["lab/evaluate.py", str(out), *evaluation.split()], deadline)
            found = read_evaluation(out)
            row |= {f"{kind} {key}": value for kind in found for key, value in found[kind].items() if kind != "test"}
        row |= {"seconds": result["train_seconds"], "images_per_second": result["images_per_second"]}
        row |= {key: result[key] for key in ("device", "torch", "commit")}
        append(name, row | {"command": shlex.join(["python", *train])})
        rate = max(rate, (time.monotonic() - start) / epochs)


def as_flags(flags):
    return [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()]


def interrupt(number, frame):
    raise KeyboardInterrupt(number)


def call(script, deadline):
    """Run one of our scripts to its end; at the deadline, or by a signal, it is asked to save and stop."""
    process = subprocess.Popen(
        [sys.executable, ROOT / script[0], *script[1:]], process_group=0
    )  # gets signals from here
    try:
        process.wait(None if deadline == math.inf else max(0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as e:
        process.terminate()
        process.wait()
        if isinstance(e, KeyboardInterrupt):
            raise Stopped("Stopped. The same command goes on.", 128 + e.args[0]) from None
        raise Stopped("The time is over. The same command goes on.") from None
    if process.returncode:
        raise Stopped(f"error: {shlex.join(script)} failed", process.returncode)


def read(name):
    """The rows of results/<name>.csv, dicts of strings."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with reading(path), open(path, newline="") as f:
        rows = list(csv.DictReader(f))
        for row in rows:
            require(row, {"pe": str, "accuracy": str, "command": str})
            numbers = [float(cell) for column, cell in row.items() if column not in TEXT and cell]
            if not row["accuracy"] or not all(map(math.isfinite, numbers)):
                raise ValueError("not a number")
    return rows


def append(name, row):
    rows = [*read(name), row]
    longest = sorted(rows, key=len, reverse=True)  # an encoding that is told no positions lacks some columns
    columns = list(dict.fromkeys(column for row in longest for column in row))
    RESULTS.mkdir(exist_ok=True)
    write_csv(RESULTS / f"{name}.csv", rows, columns)


def matches(row, flags):
    return all(row.get(flag) == str(value) for flag, value in flags.items())


# The report: tables between two marks in the README, <!-- NAME --> and <!-- /NAME -->, one row an encoding.

PUBLISHED = {  # van de Geijn et al. 2025: the title of a column and what stands there
    "cost": (
        "training step, published",
        {  # their table 9, seconds on an A100, as ratios to the 3.9 of ape
            "ape": "1",
            "axial": "1.67",
            "axial-learned": "1.46",
            "uniform": "1.69",
            "mixed": "1.33",
            "spherical": "1.72",
            "spherical-learned": "1.49",
            "liere": "3.49",
        },
    ),
    "table2": (
        "published, 400 epochs",
        {
            "ape": "64.2 ± 0.9",
            "axial": "72.1 ± 0.6",
            "axial-learned": "72.9 ± 0.6",
            "uniform": "70.5 ± 0.2",
            "mixed": "74.7 ± 0.3",
            "spherical": "73.2 ± 0.4",
            "spherical-learned": "74.1 ± 0.4",
            "liere": "73.1 ± 0.2",
        },
    ),
    "table7": (
        "published, 400 epochs",
        {
            "ape": "45.9, 53.4, 57.7, 59",
            "axial": "55.3, 63.3, 66.0, 69.9",
            "axial-learned": "56.6, 62.5, 66.8, 69.1",
            "uniform": "52.8, 59.7, 64.1, 65.8",
            "mixed": "56.9, 64.4, 70.0, 71.6",
            "spherical": "56.0, 63.6, 67.6, 69.8",
            "spherical-learned": "57.2, 65.3, 69.8, 72.6",
        },
    ),
}


def measured(name, column="accuracy", **flags):
    """What a table says of an encoding: mean ± standard deviation over seeds of a column of lab/results/<name>.csv."""

    def cell(pe):
        rows = [row for row in read(name) if matches(row, flags | {"pe": pe})]
        values = [float(row[column]) for row in rows if row.get(column)]
        if not values:
            return None
        return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    return cell


def cost(file, what, **sizes):
    """A ratio that lab.benchmark wrote into lab/results/<file>.json, with its quartiles if it is of times."""

    def cell(pe):
        path = RESULTS / f"{file}.json"
        with reading(path):
            rows = require(read_json(path).get("rows", []), [{"what": str, "pe": str, "ratio": NUMBER}])
        for row in rows:
            if (sizes | {"what": what, "pe": pe}).items() <= row.items():
                spread = f" ({row['low']:.2f} to {row['high']:.2f})" if "low" in row else ""
                return f"{row['ratio']:.{2 if row['ratio'] < 10 else 0}f}{spread}"
        return None

    return cell


def seeds(name, **flags):
    """How many runs there were of it."""
    return lambda pe: str(sum(matches(row, flags | {"pe": pe}) for row in read(name)) or "")


def evaluated(name, *sizes):
    """The columns of what evaluate.py has found."""
    found = {f"{size} px": f"size {size}" for size in sizes} | {
        "all shifted by 4": "shift 4",
        "by 16": "shift 16",
        "patches shifted by 1": "patch shift 1",
        "by 4": "patch shift 4",
        "shuffled": "patches shuffled",
    }
    columns = [(title, measured(name, column)) for title, column in found.items()]
    return [("test", measured(name)), *columns, ("seeds", seeds(name))]


TABLES = {  # name: its columns, each one a title and what was measured of an encoding, None or "" for nothing
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
    "cifar100-small": evaluated("cifar100-small", 24, 48, 64),
    "cost": [
        ("on a GPU", cost("benchmark-cuda", "training step")),
        ("on a CPU", cost("benchmark-cpu", "training step")),
        ("inference, on a CPU", cost("benchmark-cpu", "inference")),
        ("memory of a step", cost("benchmark-cpu", "training step, memory")),
        (
            "encoding alone, of attention",
            cost("benchmark-cpu", "encoding, forward and backward", part="tokens", tokens=1024),
        ),
        ("its memory, of q and k", cost("benchmark-cpu", "encoding, memory")),
    ],
    "peers": [
        (f"{mode}, of {base}", cost("peers-cpu", f"forward and backward, {mode}", base=base))
        for base in ("complex numbers", "timm", "rotary-embedding-torch", "torch.matrix_exp")
        for mode in ("eager", "compiled")
    ],
    "table7": [
        *((f"{part:.0%}, 50 epochs", measured("table7", fraction=part)) for part in (0.2, 0.4, 0.6, 0.8)),
        ("seeds", seeds("table7", fraction=0.2)),
    ],
    "bearing": evaluated("bearing", 48, 64),
    "bearing-corner": [
        ("class token: where learned", measured("bearing-corner", "region upper left", pool="cls")),
        ("opposite", measured("bearing-corner", "region lower right", pool="cls")),
        ("everywhere", measured("bearing-corner", "region everywhere", pool="cls")),
        ("seeds", seeds("bearing-corner", pool="cls")),
        ("mean: where learned", measured("bearing-corner", "region upper left", pool="mean")),
        ("opposite", measured("bearing-corner", "region lower right", pool="mean")),
        ("everywhere", measured("bearing-corner", "region everywhere", pool="mean")),
        ("seeds", seeds("bearing-corner", pool="mean")),
    ],
}


def report(path=ROOT / "README.md"):
    """Write the tables into the README, each between its marks."""
    text = path.read_text()
    for name in re.findall("<!-- ([a-z0-9-]+) -->\n", text):
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found or name not in TABLES:
            names = ", ".join(TABLES)
            raise UserError(f"{path} has {start.strip()} without {end} behind it, or its name is not one of {names}")
        text = before + start + table(name) + end + after
    with replacing(path) as tmp:
        tmp.write_text(text)


def table(name):
    """The table in Markdown: rows and columns for what was measured, nothing where nothing was."""
    found = {pe: [cell(pe) for _, cell in TABLES[name]] for pe in ENCODINGS}
    found = {pe: cells for pe, cells in found.items() if any(cells)}
    if not found:
        return ""
    kept = [i for i, column in enumerate(zip(*found.values(), strict=True)) if any(column)]
    title, theirs = PUBLISHED.get(name, (None, {}))
    lines = [["`--pe`", *[title] * bool(title), *(TABLES[name][i][0] for i in kept)]]
    lines.append(["---"] * len(lines[0]))
    for pe, cells in found.items():
        lines.append([f"`{pe}`", *[theirs.get(pe, "-")] * bool(title), *(cells[i] or "-" for i in kept)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
