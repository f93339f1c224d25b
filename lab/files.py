"""Files that are there whole or not at all: each is written under a temporary name, then renamed."""

import csv
import json
import os
from contextlib import contextmanager

from lab.cli import UserError


@contextmanager
def replacing(path):
    """Gives a temporary path, which becomes `path` if the block succeeds and vanishes if it does not."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def make_folder(path):
    """Make the folder `path` that a script was given by --out, with its parents, unless it is there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {path} ({e.strerror}): choose another folder with --out") from e


def write_json(path, content):
    with replacing(path) as tmp:
        tmp.write_text(json.dumps(content, indent=2, default=str) + "\n")


def read_json(path):
    """What write_json wrote, a dict; {} if there is no such file."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (TypeError, ValueError) as e:
        raise UserError(f"{path} is corrupt ({e}): delete it, and have it made again") from e


def write_csv(path, rows, columns):
    with replacing(path) as tmp, open(tmp, "w", newline="") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)
