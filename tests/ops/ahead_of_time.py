"""Compiles every kernel with every configuration for GPUs that are not there, and says what came out.

    python -m tests.ops.ahead_of_time --capability 90 --shape "bf16 d=128"

One JSON line per kernel and configuration: registers, bytes of stack (what registers spill to), shared memory, and
which instructions multiply matrices. It must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from em_megatron.ops.memory import kernels as memory
from em_megatron.ops.tiles import Tiles
from em_megatron.ops.trapezoid_attention import kernels as attention

SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes a program may use (CUDA programming guide)

SHAPES = {
    "bf16 d=128": {
        "dtype": "bf16",
        "S": 512,
        "L": 2048,
        "P": 576,
        "D": 128,
        "BLOCK_D": 128,
        "BLOCK_H": 64,
        "SEGMENTS": False,
    },
    "bf16 d=64, packed": {
        "dtype": "bf16",
        "S": 128,
        "L": 512,
        "P": 128,
        "D": 64,
        "BLOCK_D": 64,
        "BLOCK_H": 32,
        "SEGMENTS": True,
    },
    "fp16 d=80, odd": {
        "dtype": "fp16",
        "S": 100,
        "L": 500,
        "P": 128,
        "D": 80,
        "BLOCK_D": 128,
        "BLOCK_H": 64,
        "SEGMENTS": True,
    },
    "fp32 d=64": {
        "dtype": "fp32",
        "S": 128,
        "L": 512,
        "P": 128,
        "D": 64,
        "BLOCK_D": 64,
        "BLOCK_H": 32,
        "SEGMENTS": False,
    },
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}

FLAGS = {"HAS_TOKENS": True, "HAS_STATES": True, "ACCUMULATE": False}
KERNELS: dict[str, tuple[Any, list[Tiles], Any]] = {
    "read": (memory.read_kernel, memory.CONFIGS, memory.fits),
    "write": (memory.write_kernel, memory.STATE_CONFIGS, memory.fits),
    "signal_gradient": (memory.signal_gradient_kernel, memory.CONFIGS, memory.fits),
    "state_gradient": (memory.state_gradient_kernel, memory.STATE_CONFIGS, memory.fits),
    "forward": (attention.forward_kernel, attention.FORWARD_CONFIGS, attention.query_side_fits),
    "query_gradient": (attention.query_gradient_kernel, attention.QUERY_GRADIENT_CONFIGS, attention.query_side_fits),
    "key_gradient": (attention.key_gradient_kernel, attention.KEY_GRADIENT_CONFIGS, attention.key_side_fits),
    "slot_gradient": (attention.slot_gradient_kernel, attention.KEY_GRADIENT_CONFIGS, attention.key_side_fits),
    "rotate": (attention.rotate_kernel, [{"BLOCK_M": 64, "num_warps": 4, "num_stages": 1}], None),
    "delta": (attention.delta_kernel, [{"BLOCK_M": 64, "num_warps": 4, "num_stages": 1}], None),
}

WITH_FP32_MATRICES = ("write", "signal_gradient", "state_gradient")
FP32_POINTERS = ("states", "dstates", "carry", "inject", "cos", "sin", "lse", "delta")
INT_POINTERS = ("table", "readers", "start", "stop")


def source(kernel: Any, sizes: dict[str, Any], tiles: Tiles) -> ASTSource:
    """The kernel specialised as a launch on aligned, contiguous tensors would do it."""
    function = kernel if isinstance(kernel, triton.runtime.JITFunction) else kernel.fn
    precision = "tf32x3" if sizes["dtype"] == "fp32" else "tf32"
    known = {**sizes, **FLAGS, "PRECISION": precision, **tiles}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if function.params[index].is_constexpr:
            signature[name], constants[(index,)] = "constexpr", known[name]
        elif name.startswith("p_"):
            kind = "fp32" if name[2:] in FP32_POINTERS else "i32" if name[2:] in INT_POINTERS else sizes["dtype"]
            signature[name] = f"*{kind}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
            if name.startswith("stride_") or name in ("tokens", "L"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, attributes)


def candidates(capability: int, shape: str) -> Iterator[tuple[str, Tiles]]:
    """Kernels and those of their configurations that a device with this much shared memory would try."""
    sizes = SHAPES[shape]
    for name, (_, configs, fits) in KERNELS.items():
        itemsize = 4 if name in WITH_FP32_MATRICES else ITEMSIZE[sizes["dtype"]]
        limit = SHARED_MEMORY[capability]
        fitting = [c for c in configs if fits is None or fits(c, sizes["BLOCK_D"], itemsize, limit)]
        yield from ((name, tiles) for tiles in fitting or configs[-1:])


def compile_one(name: str, tiles: Tiles, capability: int, shape: str) -> dict[str, Any]:
    options = {"num_warps": tiles["num_warps"], "num_stages": tiles["num_stages"]}
    compiled = triton.compile(
        source(KERNELS[name][0], SHAPES[shape], tiles), target=GPUTarget("cuda", capability, 32), options=options
    )
    usage = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    products = sorted(set(re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)))
    return {
        "kernel": name, "capability": capability, "shape": shape, **tiles,
        "registers": usage["REG"], "stack": usage["STACK"], "shared": compiled.metadata.shared, "products": products,
    }  # fmt: skip


def resources(cubin: bytes) -> dict[str, int]:
    """What the assembler says a kernel takes: REG per thread, STACK in bytes per thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([str(tool), "-res-usage", file.name], text=True)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles every kernel for GPUs that need not be there.")
    parser.add_argument("--capability", type=int, action="append", choices=sorted(SHARED_MEMORY), required=True)
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES), required=True)
    parser.add_argument("--kernel", action="append", choices=sorted(KERNELS))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [
        (name, tiles, capability, shape)
        for capability in arguments.capability
        for shape in arguments.shape
        for name, tiles in candidates(capability, shape)
        if not arguments.kernel or name in arguments.kernel
    ]
    with ThreadPoolExecutor(arguments.workers) as pool:
        for row in pool.map(lambda job: compile_one(*job), jobs):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
