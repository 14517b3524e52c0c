"""One thread a process, here and in the processes that tests start: models are tiny, and pytest-xdist uses the cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
