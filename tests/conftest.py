"""For every test: one thread per process, CPU backend, Triton's interpreter where there is no GPU, new buffers filled with
NaN, and pools of ranks to share."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ["EM_DATA_CACHE"] = tempfile.mkdtemp(prefix="em-data-cache-")  # of these tests, not the user's

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined; ranks inherit it

from tests.multi_rank import Pools

atexit.register(shutil.rmtree, os.environ["EM_DATA_CACHE"], ignore_errors=True)
torch.set_num_threads(1)
torch.utils.deterministic.fill_uninitialized_memory = True  # takes effect where deterministic algorithms are asked for

# One tolerance for every comparison in fp64: a few hundred roundings of 1e-16 each.
FP64 = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture
def unwritten_is_nan():
    """`torch.empty` and its kin return NaN, so that a result that was never written cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pools]:
    """`ranks(2).run(function, *args)` on two processes that all tests share."""
    pools = Pools()
    yield pools
    pools.close()
