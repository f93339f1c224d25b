"""What holds for all tests."""

import os

# One thread a process: pytest -n auto has a process for each core, and small tensors keep no second thread busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
