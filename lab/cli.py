"""The command line of all scripts."""

import argparse
import ast
import inspect
import math
from pathlib import Path

import torch

from lab.errors import UserError


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
    fixed = getattr(make, "keywords", {})  # of a functools.partial
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("pos_dim", *fixed)}
    options = {}
    for word in words:
        name, _, text = word.partition("=")
        if name in fixed:
            raise UserError(f"--pe {pe} means {name}={fixed[name]}: leave {name} out, or choose another --pe")
        if name not in known:
            raise UserError(f"--pe {pe} has no option {name!r}: it has {', '.join(known) or 'none'}")
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, TypeError, ValueError):  # a word, such as init=uniform
            value = text
        like = known[name]
        if like is not None and type(value) is not type(like) and (type(like), type(value)) != (float, int):
            raise UserError(f"--pe-options {name} must be of type {type(like).__name__}, such as {like}, not {text!r}")
        options[name] = value
    return options


def add_device_flags(parser):
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda, cuda:1, mps ... (%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (on CUDA only)")
