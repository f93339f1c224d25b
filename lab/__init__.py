"""The laboratory: what train.py and the experiments stand on. Nobody needs it to understand an encoding."""

import sys


def excepthook(kind, error, traceback):
    """Ctrl-C needs no traceback, not even while torch is imported."""
    if kind is KeyboardInterrupt:
        print("Stopped at once.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = excepthook
