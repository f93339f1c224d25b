"""One process or several, and the communication between them.

    torchrun --nproc_per_node=8 train.py ...        # sets RANK, WORLD_SIZE, MASTER_ADDR and so on

Each process (rank) trains on its shard of every batch, and torch's DistributedDataParallel averages the gradients.
Everything else that ranks must agree on goes through the functions below, which all ranks call in the same order. In a
single process they return at once.
"""

import itertools
import os
import signal
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lab.errors import UserError, first_line

try:
    RANK = int(os.environ.get("RANK", 0))
    LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on this machine
    WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
    LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not 0 <= RANK < WORLD_SIZE:
        raise ValueError
    if WORLD_SIZE > 1 and not (os.environ["MASTER_ADDR"] and 0 < int(os.environ["MASTER_PORT"]) < 2**16):
        raise ValueError
except (KeyError, ValueError):
    names = "RANK, WORLD_SIZE, MASTER_ADDR or MASTER_PORT"
    print(f"error: {names} is missing or invalid: use torchrun to set them, or unset all", file=sys.stderr)
    sys.exit(2)


def usable_device(name):
    """-> this rank's torch.device: with several ranks, a GPU of its own or the shared CPU."""
    if WORLD_SIZE > 1 and name.startswith("cuda"):
        if (gpus := torch.cuda.device_count()) < LOCAL_WORLD_SIZE:
            raise UserError(f"{LOCAL_WORLD_SIZE} processes need a GPU each, found {gpus}: change --nproc_per_node")
        name = f"cuda:{LOCAL_RANK}"
    try:
        number = torch.zeros((), device=name)
        number.item()  # fails on "meta"
        device = number.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the device to synchronise with and to compile for
        return device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} cannot be used ({first_line(e).partition('. ')[0]}): try --device cpu") from e


def init(name):
    """Connect to the other ranks. -> this rank's torch.device"""
    device = usable_device(name)
    if RANK:  # only rank 0 prints
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if WORLD_SIZE > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def cleanup():
    """Wait for the other ranks, then disconnect: if one exited early with an error, torchrun would kill the rest."""
    barrier()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def all_reduce_sum(x):
    """The sum of a tensor over the ranks, computed in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def barrier():
    """Wait for all ranks to get here. Ranks communicate on the CPU, without waiting for a GPU."""
    all_reduce_sum(torch.zeros(1))


@contextmanager
def local_rank_0_first():
    """The first rank of each machine runs the block before the others, which then find what it downloaded."""
    if LOCAL_RANK:
        barrier()
    yield
    if not LOCAL_RANK:
        barrier()


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


class Stop:
    """Signals that stop all ranks between the same two steps.

    stop = Stop()
    with on_signals(stop.interrupt):
        while not stop.asked():     # on any rank
            ...
    """

    signal = 0  # the last one

    def interrupt(self, number, frame):
        if number == self.signal == signal.SIGINT and WORLD_SIZE == 1:  # a second Ctrl-C stops at once
            raise KeyboardInterrupt  # (with several ranks, the terminal and torchrun each send the signal)
        self.signal = number

    def asked(self):
        of_all = all_reduce_sum(torch.tensor(self.signal)).item()
        self.signal = self.signal or min(of_all, signal.SIGINT)  # a rank that got none stops as by Ctrl-C
        return of_all > 0

    def until(self, batches):
        """The batches until a signal reaches this rank."""
        return itertools.takewhile(lambda _: not self.signal, batches)
