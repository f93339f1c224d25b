"""Run the experiments behind lab/results/.

    python -m lab.experiments bearing bearing-corner        # on a CPU: minutes per run
    python -m lab.experiments cifar100-small                # on a CPU: three to eight minutes per run
    python -m lab.experiments cifar100-medium               # on a CPU: half an hour per run
    python -m lab.experiments table2 --minutes 25           # on a GPU: stops in time, and continues when called again

A set is a list of runs, most important first. train.py trains each run, and in some sets lab.evaluate evaluates it. Its
row in lab/results/<set>.csv includes the command; a run with a row is not repeated.
Run folders stay in runs/, so that an interrupted run continues where it stopped. lab.report makes tables of the rows.
"""

import csv
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path

from lab.cli import Parser, number
from lab.distributed import on_signals
from lab.errors import UserError, one_line_errors
from lab.files import locked, read_json, write_csv
from vit import ENCODINGS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "lab" / "results"


def each(encodings=ENCODINGS, seeds=range(3), **flags):
    return [{"pe": pe, "seed": seed, **flags} for seed in seeds for pe in encodings]


# 50 epochs for all, then the 400 of van de Geijn et al. 2025: first the three encodings that they compare most closely.
TABLE2 = each(epochs=50) + each(["mixed", "spherical-learned", "axial"], epochs=400) + each(epochs=400)
TABLE7 = [run for fraction in (0.2, 0.4, 0.6, 0.8) for run in each(seeds=[0], epochs=50, fraction=fraction)]
# Feasible without a GPU: the ViT of bearing.
PLAIN_VIT = {"depth": 2, "heads": 4, "head-dim": 24, "dropout": 0, "drop-path": 0, "layer-scale": 0}
SMALL = each(epochs=4, **PLAIN_VIT, **{"batch-size": 64, "opt": "adamw", "augment": "none", "compile": True})
# Twice as deep, ten epochs. First the encodings that the paper ranks.
PARTS = ("ape", "axial", "mixed", "spherical-learned"), ("spherical", "liere")
MEDIUM = [run | {"epochs": 10, "depth": 4} for part in PARTS for run in SMALL if run["pe"] in part]
# (theta, pos-scale): one frequency (theta = 1) or a range, for one equivariant encoding and one that is not. The period
# of 0.875 is 8 patches, as many as a side has, so that the image has no border.
RANGES = [(1, 0.5), (1, 0.75), (1, 0.875), (1, 1), (1, 2), (10, 1), (100, 1), (1000, 1)]
FREQUENCIES = [
    {**run, "pos-scale": scale, "pe-options": f"theta={theta}"}
    for seed in range(6)
    for theta, scale in RANGES
    for run in each(["axial", "spherical"], [seed], dataset="bearing-corner", pool="mean")
]
# Trained under shifts of all positions: what does it cost to learn what is built into equivariant encodings?
NOT_EQUIVARIANT = "spherical", "spherical-learned", "liere"
SHIFT = each(NOT_EQUIVARIANT, range(6), dataset="bearing-corner", pool="mean", shift=4)
SHIFT += [run | {"dataset": "cifar100", "shift": 4} for run in SMALL if run["pe"] in NOT_EQUIVARIANT]
SETS = {  # runs (dicts of train.py's flags), most important first; and evaluate.py's flags, if it is run
    "bearing": (each(seeds=range(6), dataset="bearing"), "--sizes 24 48 64 --shift 4 16 --patch-shift 1 4 --shuffle"),
    "bearing-corner": (
        [run for pool in ("mean", "cls") for run in each(seeds=range(12), dataset="bearing-corner", pool=pool)],
        "--regions",
    ),
    "bearing-frequencies": (FREQUENCIES, "--regions"),
    "shift": (SHIFT, "--shift 4 16 --regions"),
    "cifar100-small": (SMALL, "--shift 4 16"),
    "cifar100-medium": (MEDIUM, "--sizes 24 48 64 --shift 4 16 --patch-shift 1 4 --shuffle"),
    "table2": (TABLE2, "--sizes --shift 4 16 --shuffle"),
    "table7": (TABLE7, ""),
}


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("sets", nargs="+", metavar="SET", choices=SETS, help=f"what to run: {', '.join(SETS)}")
    parser.add_argument("--minutes", type=number(float), default=math.inf, help="stop within this time")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    try:
        with on_signals(interrupt):
            for name in args.sets:
                run_set(name, deadline)
    except Stopped as e:
        print(e, file=sys.stderr)
        return e.code


class Stopped(Exception):
    """Why the runs stop, and the exit code."""

    def __init__(self, why, code=0):
        super().__init__(why)
        self.code = code


class Failed(Stopped):
    """A script ended with an error."""


def run_set(name, deadline):
    """Train and evaluate each run that has no row in lab/results/<name>.csv; raises Stopped at the deadline."""
    runs, evaluation = SETS[name]
    for flags in runs:
        if any(matches(row, flags) for row in read(name)):
            continue
        out = Path("runs", ",".join(f"{flag}={value}" for flag, value in flags.items()))
        resume = ["--resume"] if (out / "last.pt").exists() else []
        call([ROOT / "train.py", *as_flags(flags), f"--out={out}", *resume], deadline)
        result = read_json(out / "result.json")
        row = flags | {"epochs": result["epochs"], "accuracy": result["test_accuracy"]}
        if evaluation:
            call(["-m", "lab.evaluate", str(out), *evaluation.split()], deadline)
            found = read_json(out / "evaluation.json")["accuracies"]
            row |= {f"{kind} {key}": value for kind in found for key, value in found[kind].items() if kind != "test"}
        row |= {"seconds": result["train_seconds"], "images_per_second": result["images_per_second"]}
        row |= {key: result[key] for key in ("device", "torch", "commit")}
        append(name, row | {"command": shlex.join(["python", "train.py", *as_flags(flags)])})


def as_flags(flags):
    return [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()]


def interrupt(number, frame):
    raise KeyboardInterrupt(number)


def call(script, deadline):
    """Run one of our scripts; at the deadline or after a signal, ask it to save and stop."""
    process = subprocess.Popen([sys.executable, *script], process_group=0)  # gets signals only from us
    try:
        process.wait(None if deadline == math.inf else max(0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as e:
        process.terminate()
        process.wait()
        if isinstance(e, KeyboardInterrupt):
            raise Stopped("Stopped. Repeat the command to continue.", 128 + e.args[0]) from None
        raise Stopped("Time is up. Repeat the command to continue.") from None
    if process.returncode:
        raise Failed(f"error: {shlex.join(map(str, script))} failed", process.returncode)


def read(name):
    """The rows of lab/results/<name>.csv, dicts of strings."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
    except UnicodeDecodeError:
        rows = []
    if not all(row.get("pe") and None not in (*row, *row.values()) for row in rows or [{}]):
        raise UserError(f"{path} is corrupt: restore it from a copy")
    return rows


def append(name, row):
    with locked(RESULTS, wait=True):  # several sets may run at once
        write_csv(RESULTS / f"{name}.csv", [*read(name), row])


def matches(row, flags):
    return all(row.get(flag) == str(value) for flag, value in flags.items())


def values(name, column="accuracy", **flags):
    """A column of lab/results/<name>.csv, from the rows that match these flags."""
    return [float(row[column]) for row in read(name) if matches(row, flags) and row.get(column)]


def frequency_range(pe, theta, scale):
    """An encoding's lowest and highest frequency in the ViT of bearing, as text; or its only one, and the period."""
    w = scale * ENCODINGS[pe](24, 4, theta=theta).frequencies().unique()
    return f"{w[0]:g} ({7 / w[0]:.3g})" if len(w) == 1 else f"{w[0]:.2g} to {w[-1]:g}"  # 7 patches span 2 pi


if __name__ == "__main__":
    sys.exit(main())
