"""The command line of all scripts, and the one place that turns errors a user can fix into one line."""

import argparse
import ast
import functools
import inspect
import math
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from lab.distributed import LOCAL_RANK, LOCAL_WORLD_SIZE, WORLD_SIZE, defer


class UserError(Exception):
    """An error that the user can fix: one line that says how, and the exit code."""

    def __init__(self, why, code=2):
        super().__init__(why)
        self.code = code


def one_line_errors(main):
    """Decorate a script's main(argv): an error that the user can fix prints one line and gives exit code 2.

    Bugs are raised with their traceback. main may return another exit code.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        with redirect_stdout(Output(sys.stdout)), redirect_stderr(Output(sys.stderr)):
            try:
                return main(argv) or 0
            except KeyboardInterrupt:
                print("Stopped at once.", file=sys.stderr)
                return 130
            except Exception as e:
                if WORLD_SIZE > 1 and isinstance(e, RuntimeError) and "by peer" in str(e):
                    return 1  # another rank ended, and printed why
                if (why := explanation(e)) is None:
                    raise
                defer()
                print("error:", " ".join(why.splitlines()), file=sys.stderr)
                return getattr(e, "code", 2)

    return wrapped


def explanation(e):
    """What is wrong and how to fix it; None for a bug."""
    if isinstance(e, UserError | OSError):
        return str(e)
    if is_out_of_memory(e):
        return "out of memory: try a smaller --batch-size, --micro-batch or model"
    if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({first_line(e)}): install a C++ compiler, or add --no-compile"
    return None


def is_out_of_memory(e):
    words = "can't allocate memory", "ALLOC_FAILED"  # torch on a CPU, cuBLAS
    return isinstance(e, MemoryError | torch.OutOfMemoryError) or any(word in str(e) for word in words)


def first_line(e):
    return str(e).partition("\n")[0] or type(e).__name__


class Output:
    """A stream whose reader may exit early, such as `| head -1`, without stopping the run."""

    def __init__(self, stream):
        self.stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        if getattr(self.stream, "errors", None) == "strict":
            self.stream.reconfigure(errors="replace")  # for ASCII-only terminals

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()  # so that a log file shows each epoch at once
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class Parser(argparse.ArgumentParser):
    """Shows the script's docstring for --help, takes no abbreviations and reports errors in one line."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message):  # without the usage
        raise UserError(message)


def number(kind, least=None, most=math.inf):
    """An argparse type: an int64 or a float32, positive or at least `least`, and at most `most`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if most == math.inf and value > (2**63 - 1 if kind is int else torch.finfo(torch.float32).max):
            raise argparse.ArgumentTypeError(f"is too large: {text}")
        if not (value > 0 if least is None else value >= least) or value > most:
            limits = ("> 0" if least is None else f">= {least}") + (f" and <= {most}" if most < math.inf else "")
            raise argparse.ArgumentTypeError(
                f"must be {'an integer' if kind is int else 'a number'} {limits}, not {text}"
            )
        return value

    return parse


def folder(text):
    """An argparse type: a Path, but not "", which would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, not be empty")
    return Path(text)


def parse_options(words, pe, make):
    """--pe-options: ["block_size=4", "theta=50"] -> {"block_size": 4, "theta": 50}, keyword options of make()."""
    parameters = inspect.signature(make).parameters.values() if make else ()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "pos_dim"}
    options = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in known:
            raise UserError(f"--pe {pe} has no option {name!r}: it has {', '.join(known) or 'none'}")
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, TypeError, ValueError):  # a word, such as init=uniform
            value = text
        like = known[name]
        if like is not None and type(value) is not type(like) and (type(like), type(value)) != (float, int):
            raise UserError(f"--pe-options {name} must be like {like}, not {text!r}")
        options[name] = value
    return options


def add_device_flags(parser):
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda, cuda:1 ... (%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (if on CUDA)")


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
        raise UserError(f"--device {name} cannot be used ({first_line(e)}): try --device cpu") from e
