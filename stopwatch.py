"""Where the time goes.

with timed("forward"):      # costs next to nothing until timed.start()
    ...
timed.seconds               # {"forward": 0.123}: what such blocks took since then
"""

import time
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up what blocks of a name take. A GPU is waited for at both ends, so that its work counts where it is due."""

    def __init__(self):
        self.seconds = None

    def start(self):
        self.seconds = {}

    def stop(self):
        self.seconds = None

    @contextmanager
    def __call__(self, name):
        if self.seconds is None:
            yield
            return
        start = now()
        yield
        self.seconds[name] = self.seconds.get(name, 0) + now() - start


def now():
    """The time in seconds at which all that the GPU was given is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


timed = Stopwatch()
