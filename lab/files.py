"""Atomic files, which are written under a temporary name and then renamed, and locks of folders."""

import csv
import json
import os
import re
from collections.abc import Set
from contextlib import contextmanager, suppress

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

from lab.distributed import RANK
from lab.errors import UserError


@contextmanager
def atomic_write(path):
    """Yield a temporary path, which is renamed to `path` if the block succeeds and deleted if it fails."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())  # the content reaches the disk before the name
        os.replace(tmp, path)
    except OSError as e:
        e.filename = str(e.filename or path).removesuffix(".tmp")  # a full disk's error has no name
        raise
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def locked(folder, wait=False):
    """Create the folder, and hold its lock in this block: another process gets a UserError, or waits if wait is true.

    Rank 0 locks for all ranks. A lock ends with its process, even if that is killed. Windows and some file systems have
    none.
    """
    if RANK and not wait:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "wb") as file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError) as e:  # the latter on some systems
            raise UserError(f"another process is writing to {folder}: wait for it, or choose another folder") from e
        except OSError:
            pass
        try:
            yield
        finally:
            with suppress(OSError):  # Windows cannot delete an open file; the folder may not be empty
                if not wait:  # else those who wait would lock a file that is no longer there
                    path.unlink()
                folder.rmdir()


def plain(x):
    """Keep what JSON can hold; replace the rest by its text, without the address, which differs between runs."""
    if isinstance(x, dict):
        return {name: plain(part) for name, part in x.items()}
    try:
        return json.loads(json.dumps(x, default=lambda x: sorted(x) if isinstance(x, Set) else os.fspath(x)))
    except TypeError:
        return re.sub(" at 0x[0-9a-f]+", "", repr(x))


def write_json(path, content):
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(plain(content), indent=2) + "\n", encoding="utf-8")


def read_json(path):
    """The dict that write_json wrote; {} if there is no such file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (TypeError, ValueError) as e:
        raise UserError(f"{path} is corrupt ({e}): move it away, and generate it again") from e


def write_csv(path, rows):
    """Rows are dicts. One that lacks a column leaves it empty; the columns are in the order of the longest row's."""
    columns = dict.fromkeys(column for row in sorted(rows, key=len, reverse=True) for column in row)
    with atomic_write(path) as tmp, open(tmp, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)
