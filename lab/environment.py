"""Where a result was measured, and with which versions and command, so that it can be reproduced."""

import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from lab.distributed import LOCAL_WORLD_SIZE, WORLD_SIZE

ROOT = Path(__file__).parents[1]


def environment(device):
    commit = None  # no git, not a checkout, or a copy inside another repository, whose commit says nothing
    if (ROOT / ".git").exists():
        with suppress(OSError, subprocess.CalledProcessError):
            commit = git("rev-parse", "HEAD") + "-dirty" * bool(git("diff", "HEAD", "--name-only", "--", "*.py"))
    return {"device": device_name(device), "torch": str(torch.__version__), "commit": commit, "command": command()}


def git(*command):
    done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, encoding="utf-8", check=True)
    return done.stdout.strip()


def device_name(device):
    name = f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
    if str(device).startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    return name if WORLD_SIZE == 1 else f"{WORLD_SIZE} x {name}"


def command():
    """The command line that started this process, ready to be run again."""
    torchrun = ["torchrun", f"--nproc_per_node={LOCAL_WORLD_SIZE}", *sys.argv]
    return shlex.join(["python", *sys.orig_argv[1:]] if WORLD_SIZE == 1 else torchrun)
