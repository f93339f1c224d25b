"""One process or several, and what they tell each other.

    torchrun --nproc_per_node=8 train.py ...        # sets RANK, LOCAL_RANK, WORLD_SIZE and where to meet

Each process, a rank, trains on its part of every batch, and torch's DistributedDataParallel averages their gradients.
What else they must agree on goes through the functions below, which all ranks call at the same places. A process that
is alone has nobody to ask: they return at once.
"""

import itertools
import os
import signal
import sys
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on this machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def init(device):
    """Meet the other ranks."""
    if RANK:  # rank 0 speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if WORLD_SIZE > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def cleanup():
    """Wait for the others, then part: if one ended early and in error, torchrun would end those still at work."""
    wait()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def defer():
    """Let rank 0 report an error that may be everybody's: when it ends, torchrun ends the others."""
    if RANK:
        time.sleep(5)


def wait():
    """Wait for all ranks to come here."""
    total(torch.zeros(1))


@contextmanager
def rank_0_first():
    """Rank 0 runs the block, then all others do: what it downloads and writes is there for them."""
    if RANK:
        wait()
    yield
    if not RANK:
        wait()


def total(x):
    """x, summed over the ranks, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def any_rank(condition):
    """Whether the condition holds on any rank. It goes from CPU to CPU: no GPU is waited for."""
    return bool(condition) if WORLD_SIZE == 1 else total(torch.tensor(int(bool(condition)))).item() > 0


def union(items):
    """A set of strings: those of all ranks."""
    if WORLD_SIZE == 1:
        return items
    sets = [None] * WORLD_SIZE
    dist.all_gather_object(sets, items)
    return set().union(*sets)


class Stopped(Exception):
    """Ctrl-C was pressed, or another rank cannot continue: all ranks stop between two steps."""


class Stop:
    """Ctrl-C, or data that one rank cannot read, stops all ranks at the same place.

    with Stop() as stop:
        for batch in stop.watch(batches):   # ends early where there is a reason to stop
            ...
        stop.raise_if_stopped()
    """

    def __init__(self):
        self.interrupted, self.error = False, None

    def __enter__(self):
        self.handler = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.handler)
        self.error = None  # its traceback holds all that the run held, worker processes too

    def interrupt(self, *_):
        if self.interrupted and WORLD_SIZE == 1:  # a second Ctrl-C will not wait (of several ranks torchrun ends all)
            raise KeyboardInterrupt
        self.interrupted = True

    def watch(self, batches):
        """The batches, up to where there is a reason to stop."""
        try:
            yield from itertools.takewhile(lambda _: not self.interrupted, batches)
        except Exception as e:
            self.error = e

    def raise_if_stopped(self):
        """If any rank has a reason to stop, raise Stopped on all, with its own error as the cause."""
        if any_rank(self.interrupted or self.error):
            raise Stopped from self.error
