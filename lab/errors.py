"""An error that the user can fix is one line that says how, with exit code 2. A bug keeps its traceback."""

import functools
import re
import sys
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can fix: one line that says how, and the exit code."""

    def __init__(self, why, code=2):
        super().__init__(why)
        self.code = code


@contextmanager
def user_errors(args):
    """Turn a ValueError in the block into a UserError. Names of options in args become flags in its message."""
    try:
        yield
    except ValueError as e:
        words = re.split("([a-z]+_[a-z]+)", str(e))
        raise UserError("".join(f"--{word.replace('_', '-')}" if word in args else word for word in words)) from e


def one_line_errors(main):
    """Decorate a script's main(argv), which may return an exit code."""

    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in sys.stdout, sys.stderr:
            if hasattr(stream, "reconfigure"):  # for terminals that know only ASCII, and log files that someone watches
                stream.reconfigure(errors="replace", line_buffering=True)
        try:
            return main(argv) or 0
        except KeyboardInterrupt:
            print("Stopped at once.", file=sys.stderr)
            return 130
        except Exception as e:
            if (why := explanation(e)) is None:
                raise
            print("error:", " ".join(why.split()), file=sys.stderr)
            hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # half-built objects may complain in __del__
            e.__traceback__ = e.__cause__ = e.__context__ = None  # frees them, so that __del__ runs here
            sys.unraisablehook = hook
            return e.code if isinstance(e, UserError) else 2

    return wrapped


def explanation(e):
    """What is wrong and how to fix it; None for a bug."""
    if is_out_of_memory(e) or is_out_of_memory(e.__cause__):  # also where it became another error
        return "out of memory: try a smaller --batch-size, --micro-batch, --sizes or model, or --device cpu"
    if isinstance(e, UserError):
        return str(e)
    if isinstance(e, OSError):
        what = f"{e.filename or 'a file'} ({e.strerror})" if e.errno else str(e)
        return f"cannot read or write {what}: check free space, permissions and ulimit -n, then run again"
    if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({first_line(e)}): install a C++ compiler, or add --no-compile"
    return None


def is_out_of_memory(e):
    """Python's error, torch's on a GPU and on a CPU, cuBLAS's, and those of sizes beyond 2^63."""
    words = "can't allocate memory", "ALLOC_FAILED", "Storage size calculation overflowed", "Overflow when unpacking"
    return isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" or any(word in str(e) for word in words)


def first_line(e):
    return str(e).partition("\n")[0] or type(e).__name__
