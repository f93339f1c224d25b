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

try:
    RANK = int(os.environ.get("RANK", 0))
    LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on this machine
    WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
    LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not 0 <= RANK < WORLD_SIZE or (WORLD_SIZE > 1 and "MASTER_ADDR" not in os.environ):
        raise ValueError
except ValueError:
    print("error: RANK and WORLD_SIZE are not as torchrun sets them: use it, or unset them", file=sys.stderr)
    sys.exit(2)


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


@contextmanager
def on_signals(handler):
    """Call handler(number, frame) at Ctrl-C and at what schedulers and closed terminals send."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else nohup started this
        signals.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Stopped(Exception):
    """A signal came, or another rank cannot continue: all ranks stop between two steps."""


class Stop:
    """A signal, or data that one rank cannot read, stops all ranks at the same place.

    with Stop.on_signals() as stop:
        for batch in stop.watch(batches):   # ends early where there is a reason to stop
            ...
        stop.raise_if_stopped()
    """

    def __init__(self):
        self.signal, self.error = 0, None

    @classmethod
    @contextmanager
    def on_signals(cls):
        stop = cls()
        try:
            with on_signals(stop.interrupt):
                yield stop
        finally:
            stop.error = None  # its traceback holds all that the run held, worker processes too

    def interrupt(self, number, frame):
        if number == self.signal == signal.SIGINT and WORLD_SIZE == 1:  # a second Ctrl-C will not wait
            raise KeyboardInterrupt  # (several ranks get each signal from the terminal and from torchrun)
        self.signal = number

    def watch(self, batches):
        """The batches, up to where there is a reason to stop."""
        try:
            yield from itertools.takewhile(lambda _: not self.signal, batches)
        except Exception as e:
            self.error = e

    def raise_if_stopped(self):
        """If any rank has a reason to stop, raise Stopped on all, with its own error as the cause."""
        if any_rank(self.signal or self.error):
            raise Stopped from None if self.signal else self.error
