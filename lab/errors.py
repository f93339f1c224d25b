"""An error that the user can fix is one line that says how, with exit code 2. A bug keeps its traceback."""

import functools
import sys
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can fix: one line that says how, and the exit code."""

    def __init__(self, why, code=2):
        super().__init__(why)
        self.code = code


@contextmanager
def user_errors(*kinds):
    """Errors of these kinds in the block are the user's, and say what to do."""
    try:
        yield
    except kinds as e:
        raise UserError(e) from e


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
            return e.code if isinstance(e, UserError) else 2

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
    """Python's error, torch's on a GPU and on a CPU, cuBLAS's, and those of sizes beyond 2^63."""
    words = "can't allocate memory", "ALLOC_FAILED", "Storage size calculation overflowed", "Overflow when unpacking"
    return isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" or any(word in str(e) for word in words)


def first_line(e):
    return str(e).partition("\n")[0] or type(e).__name__
