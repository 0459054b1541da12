"""Settings of the whole suite."""

import os

import torch

# As many as are asked for; else a core for each worker: two threads in two workers would wait for each other.
THREADS = int(os.environ.get("OMP_NUM_THREADS") or (1 if "PYTEST_XDIST_WORKER" in os.environ else 2))
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)
