"""What to run first on a GPU: nothing here has been measured on one.

    python -m lab.gpu_first --minutes 15

Five independent steps: the tests that need a GPU; two epochs of each encoding with the paper's
CIFAR-100 recipe (96 steps, compiled, in bfloat16); a run that is stopped and resumed; what an encoding costs; and, with
the time that is left, the runs of lab.experiments table2. Each step says what to expect and what to report. CIFAR-100
is downloaded to data/. Run it again to continue where it stopped. (The tests need requirements-dev.txt.)
"""

import math
import subprocess
import sys
import time
from pathlib import Path

import torch

from lab.cli import Parser, number
from lab.distributed import on_signals
from lab.errors import UserError, one_line_errors
from lab.experiments import RESULTS, ROOT, Failed, Stopped, call, interrupt
from lab.run import read_checkpoint
from vit import ENCODINGS


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=number(float), default=15, help="stop within this time (%(default)s)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("torch finds no GPU: on a CPU, start with train.py --dataset bearing")
    deadline, outcomes, code = time.monotonic() + 60 * args.minutes, [], 0
    try:
        with on_signals(interrupt):
            for step in STEPS:
                print(f"\n{step.__doc__}\n", flush=True)
                try:
                    step(deadline)
                    outcomes.append(f"{step.__name__}: done")
                except Failed as e:
                    outcomes.append(f"{step.__name__}: {e}, please report the output above")
                    code = 1
    except Stopped as e:  # at the deadline or by a signal
        outcomes.append(f"{step.__name__}: {e}")
        code = e.code
    print("", *outcomes, sep="\n")
    return code


def tests(deadline):
    """1. The tests that need a GPU. Expect: all pass, none is skipped. Report: what fails."""
    call(["-m", "pytest", "-q", ROOT / "tests" / "test_gpu.py"], deadline)


def encodings(deadline):
    """2. Two epochs of each encoding. Expect: more than 3 % (chance: 1), and nearly the speed of none, but for LieRE.

    Report: the last lines.
    """
    found = []
    for pe in ENCODINGS:
        out = Path("runs", f"gpu-first-{pe}")
        resume = ["--resume"] if (out / "last.pt").exists() else []
        try:
            call([ROOT / "train.py", f"--pe={pe}", "--epochs=2", f"--out={out}", *resume], deadline)
            first, second = read_checkpoint(out)["log"]
            rate = 48 * 1024 / (second["seconds"] - first["seconds"])  # the first epoch compiles
            found.append(f"{pe}: {rate:.0f} images/s in the second epoch, {second['test_accuracy']} %")
        except Failed as e:
            found.append(f"{pe}: {e}")
    print("", *found, sep="\n")
    if failed := sum("failed" in line for line in found):
        raise Failed(f"{failed} of {len(found)} failed", 1)


def resume(deadline):
    """3. A run that is stopped and resumed. Expect: "Stopped after step", then 94 to 100 %. Report: anything else."""
    out = Path("runs/gpu-first-resume")
    script = [ROOT / "train.py", "--dataset=bearing", "--pe=spherical", f"--out={out}"]
    if not (out / "last.pt").exists():
        process = subprocess.Popen([sys.executable, *script])
        try:
            while process.poll() is None and not (out / "log.csv").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            process.terminate()
            process.wait()
    call([*script, "--resume"], deadline)


def cost(deadline):
    """4. What an encoding costs a ViT-S at 224 pixels. Expect, compiled: at most 1.2 times the time of none, LieRE 3.5.

    Report: lab/results/benchmark-cuda.json.
    """
    call(["-m", "lab.benchmark", "step", "inference", f"--json={RESULTS / 'benchmark-cuda.json'}"], deadline)


def accuracies(deadline):
    """5. CIFAR-100 by the paper's recipe, each encoding for 50 epochs. Report: lab/results/table2.csv."""
    minutes = max(0.1, (deadline - time.monotonic()) / 60)
    call(["-m", "lab.experiments", "table2", f"--minutes={minutes}"], math.inf)


STEPS = tests, encodings, resume, cost, accuracies

if __name__ == "__main__":
    sys.exit(main())
