"""Every kernel with every configuration compiles for GPUs that are not there, and fits them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.ops.ahead_of_time import KERNELS, SHAPES, SHARED_MEMORY

# Bytes per thread that registers may spill to: under a third of them in bf16, which trains; half with the masks of odd
# sizes; most in fp32, whose three TF32 products for one no GPU has the registers for (sm_100 is the worst).
STACK = {"bf16": 320, "fp16": 512, "fp32": 896}

# The unit that multiplies matrices on each capability, and the kernels that multiply none.
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
WITHOUT_PRODUCTS = ("rotate", "delta")


def compiled(capability: int, shape: str) -> list[dict]:
    command = [sys.executable, "-m", "tests.ops.ahead_of_time", "--capability", str(capability), "--shape", shape]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def cases():
    for capability in SHARED_MEMORY:
        for shape in SHAPES:
            usual = shape == "bf16 d=128"
            yield pytest.param(
                capability, shape, marks=() if usual else pytest.mark.slow, id=f"sm_{capability} {shape}"
            )


@pytest.mark.parametrize(("capability", "shape"), list(cases()))
def test_compiles_and_fits(capability, shape):
    rows = compiled(capability, shape)
    assert {row["kernel"] for row in rows} == set(KERNELS)
    for row in rows:
        assert row["stack"] <= STACK[SHAPES[shape]["dtype"]], f"registers spill: {row}"
        assert row["shared"] <= SHARED_MEMORY[capability], f"more shared memory than the device has: {row}"
        if row["kernel"] not in WITHOUT_PRODUCTS:
            assert PRODUCTS[capability] in row["products"], f"the matrix unit of this device is not used: {row}"
