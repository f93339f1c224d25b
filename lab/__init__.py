"""The laboratory: what train.py and the experiments stand on. Nobody needs it to understand an encoding."""

import os

if os.environ.get("MPLBACKEND", "").startswith("module://"):
    del os.environ["MPLBACKEND"]  # a notebook's, which it exports to what it starts, where it may not be found
