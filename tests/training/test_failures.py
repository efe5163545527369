"""Nothing hangs: where one rank fails, all end within 30 seconds, with its error, while they wait in any collective."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest
import torch

from tests.training.corpora import recipe

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is off where CUDA is present")

SECONDS = 30
LAYOUTS = {
    "tensor": ("parallel.tensor_model_parallel_size=2",),
    "pipeline": ("parallel.pipeline_model_parallel_size=2",),
    "context, all-gather": ("parallel.context_parallel_size=2", "parallel.memory_handoff=all_gather"),
    "context, chain": ("parallel.context_parallel_size=2", "parallel.memory_handoff=chain"),
    "data": (),
}


@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        pytest.param("tensor", "raise", marks=pytest.mark.slow),
        pytest.param("pipeline", "raise", marks=pytest.mark.slow),
        ("context, all-gather", "kill"),
        pytest.param("context, chain", "raise", marks=pytest.mark.slow),
        pytest.param("data", "kill", marks=pytest.mark.slow),
        pytest.param("tensor", "kill", marks=pytest.mark.slow),
        pytest.param("pipeline", "kill", marks=pytest.mark.slow),
        pytest.param("context, all-gather", "raise", marks=pytest.mark.slow),
        pytest.param("context, chain", "kill", marks=pytest.mark.slow),
    ],
)
def test_a_failing_rank_ends_all(chain_corpus, tmp_path, layout, fault):
    path = recipe(tmp_path / "recipe.yaml", chain_corpus, "data.sequence_length=96", *LAYOUTS[layout])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.training.failing_run", fault, str(path)],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ended = time.time()
    assert done.returncode != 0
    failed = re.search(r"FAILS AT ([\d.]+)", done.stdout)
    assert failed is not None, done.stderr
    seconds = ended - float(failed[1])
    print(f"{layout}, {fault}: all ranks had ended {seconds:.1f} s after the fault")
    assert seconds < SECONDS
    if fault == "raise":
        assert "error (rank 1): the fault of this test" in done.stderr
    else:
        assert "Signal 9 (SIGKILL)" in done.stderr
