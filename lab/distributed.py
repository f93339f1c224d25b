"""One process or several, and the communication between them.

    torchrun --nproc_per_node=8 train.py ...        # sets RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR

Each process (rank) trains on its part of every batch, and torch's DistributedDataParallel averages the gradients.
Everything else that ranks must agree on goes through the functions below, which all ranks call in the same order. In a
single process they return at once.
"""

import itertools
import os
import signal
import sys
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist

try:
    RANK = int(os.environ.get("RANK", 0))
    LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on this machine
    WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
    LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not 0 <= RANK < WORLD_SIZE or (WORLD_SIZE > 1 and "MASTER_ADDR" not in os.environ):
        raise ValueError
except ValueError:
    print("error: RANK and WORLD_SIZE are invalid: use torchrun to set them, or unset both", file=sys.stderr)
    sys.exit(2)


def init(device):
    """Connect to the other ranks."""
    if RANK:  # only rank 0 prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if WORLD_SIZE > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def cleanup():
    """Wait for the other ranks, then disconnect: if one exited early with an error, torchrun would kill the rest."""
    wait()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def defer():
    """Let rank 0 report an error that all ranks may have: when it exits, torchrun kills the others."""
    if RANK:
        time.sleep(5)


def wait():
    """Wait for all ranks to get here."""
    total(torch.zeros(1))


@contextmanager
def rank_0_first():
    """Rank 0 of each machine runs the block before the others, which then find what it downloaded and wrote."""
    if LOCAL_RANK:
        wait()
    yield
    if not LOCAL_RANK:
        wait()


def total(x):
    """Sum x over the ranks, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def any_rank(condition):
    """Whether the condition holds on any rank. Ranks communicate on the CPU, without waiting for a GPU."""
    return total(torch.tensor(int(bool(condition)))).item() > 0


def union(items):
    """The union of all ranks' sets of strings."""
    if WORLD_SIZE == 1:
        return items
    sets = [None] * WORLD_SIZE
    dist.all_gather_object(sets, items)
    return set().union(*sets)


@contextmanager
def on_signals(handler):
    """Call handler(number, frame) on Ctrl-C and on the signals of schedulers and closing terminals."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        signals.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Stopped(Exception):
    """A signal came, or some rank cannot continue: all ranks stop between two steps."""


class Stop:
    """Stops all ranks at the same step, after a signal or if one of them cannot read its data.

    stop = Stop()
    with on_signals(stop.interrupt):
        for batch in stop.watch(batches):   # ends early if there is a reason to stop
            ...
        stop.raise_if_stopped()
    """

    def __init__(self):
        self.signal, self.error = 0, None

    def interrupt(self, number, frame):
        if number == self.signal == signal.SIGINT and WORLD_SIZE == 1:  # a second Ctrl-C stops at once
            raise KeyboardInterrupt  # (with several ranks, the terminal and torchrun each send the signal)
        self.signal = number

    def watch(self, batches):
        """Yield the batches until there is a reason to stop."""
        try:
            yield from itertools.takewhile(lambda _: not self.signal, batches)
        except Exception as e:
            self.error = e

    def raise_if_stopped(self):
        """If any rank has a reason to stop, raise Stopped on all: with all ranks' errors, its own one as the cause."""
        if any_rank(self.signal or self.error):
            error = None if self.signal else self.error
            self.error = None  # its traceback keeps the run's objects alive, worker processes included
            raise Stopped(*sorted(union({str(error)} if error else set()))) from error
