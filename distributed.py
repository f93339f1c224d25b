"""One process or several, and what they tell each other.

    torchrun --nproc_per_node=8 train.py ...        # sets RANK, LOCAL_RANK, WORLD_SIZE and where to meet

Each process trains on its share of every batch, and torch's DistributedDataParallel averages their gradients. What else
they must agree on goes through the functions below, which all processes call at the same places. With one process alone
there is nobody to ask, and they return at once.
"""

import itertools
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from data import DataError

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on this machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def join(device):
    """Meet the other processes; -> the device of this one: each has a GPU of its own, or all share the CPU."""
    if WORLD_SIZE == 1:
        return device
    if device.startswith("cuda"):
        if (gpus := torch.cuda.device_count()) < LOCAL_WORLD_SIZE:
            raise ValueError(
                f"{LOCAL_WORLD_SIZE} processes need as many GPUs, here are {gpus}: change --nproc_per_node"
            )
        device = f"cuda:{LOCAL_RANK}"
    if RANK:  # the first process speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return device


def leave():
    """Wait for the others, then part: if one left early and in error, torchrun would end those still at work."""
    wait()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def defer():
    """Let the first process report an error that may be everybody's: when it ends, torchrun ends the others."""
    if RANK:
        time.sleep(5)


def wait():
    """Wait for all processes to come here."""
    total(torch.zeros(1))


def total(x):
    """x, summed over the processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def anywhere(condition):
    """Whether the condition holds in any process. It goes from CPU to CPU: no GPU is waited for."""
    return bool(condition) if WORLD_SIZE == 1 else total(torch.tensor(int(bool(condition)))).item() > 0


def union(items):
    """A set of strings: what all processes together have."""
    if WORLD_SIZE == 1:
        return items
    sets = [None] * WORLD_SIZE
    dist.all_gather_object(sets, items)
    return set().union(*sets)


class Stopped(Exception):
    """Ctrl-C was pressed, and the step that was under way is done."""


class Stop:
    """What asks a run to stop: Ctrl-C, or data that cannot be read. It stops between steps, all processes together.

    with Stop() as stop:
        for batch in stop.before(batches):
            ...
        stop.heed()
    """

    def __init__(self):
        self.reason = None

    def __enter__(self):
        self.handler = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.handler)
        self.reason = None  # whose traceback holds all that the run held, worker processes too

    def interrupt(self, *_):
        if self.reason and WORLD_SIZE == 1:  # a second Ctrl-C will not wait (several processes are torchrun's to end)
            raise KeyboardInterrupt
        self.reason = Stopped()

    def before(self, batches):
        """The batches up to where there is a reason to stop."""
        try:
            yield from itertools.takewhile(lambda _: self.reason is None, batches)
        except DataError as e:
            self.reason = e

    def heed(self):
        """Stop if any process has a reason to."""
        if anywhere(self.reason):
            raise self.reason or Stopped()
