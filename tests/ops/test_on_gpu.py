"""The operators on a CUDA device: odd sizes against the fp64 references, real sizes against fp64 batched PyTorch on the
same device, no host synchronisation, capture in a CUDA graph, and NVIDIA's checker of memory accesses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from em_megatron.hippo.banks import MemoryBanks
from em_megatron.hippo.samplers import exponential
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.memory import block_memory, memory_slots
from em_megatron.ops.memory import kernels as memory_kernels
from em_megatron.ops.trapezoid_attention import kernels as attention_kernels
from em_megatron.ops.trapezoid_attention import trapezoid_attention
from tests.ops.comparison import compare_attention, compare_memory, compare_passing_states, draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PACKED = torch.tensor([[1] * 155, [1] * 100 + [2] * 20 + [0] * 4 + [3] * 31], dtype=torch.int32)
REAL = torch.tensor([[1] * 32768, [1] * 9000 + [2] * 1200 + [0] * 40 + [3] * 22528], dtype=torch.int32)


@pytest.mark.parametrize("implementation", ["triton", "batched"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("superchunk", [1, 2, 5])
def test_memory(dtype, implementation, superchunk):
    banks = MemoryBanks(40, 31, exponential(13, 2.0))
    compare_memory(PACKED, banks, superchunk, (2, 16), dtype, implementation, "cuda")


@pytest.mark.parametrize("implementation", ["triton", "batched"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("slots", "heads"), [(13, (4, 2, 16)), (19, (6, 2, 20)), (0, (4, 4, 16))])
def test_attention(dtype, implementation, slots, heads):
    compare_attention(PACKED, 31, slots, heads, dtype, implementation, "cuda")


@pytest.mark.parametrize("implementation", ["triton", "batched"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("superchunk", "order"), [(1, 9), (2, 40)])
def test_memory_of_documents_that_come_and_go(dtype, implementation, superchunk, order):
    compare_passing_states(superchunk, order, dtype, implementation, "cuda")


def test_states_do_not_drift_over_many_superchunks():
    """Noise, whose state is as large as what each block adds: what a product cuts off would add up."""
    tokens, length = 96 * 96, 96
    signal = draw(tokens, 1, 1, 32, dtype=torch.bfloat16, device="cuda")
    layout = BlockLayout.single_document(1, tokens, length, torch.device("cuda"))
    banks = MemoryBanks(192, length, exponential(32, 2.0))
    truth = memory_slots(signal, layout, banks, 0, "batched")[-1]
    half = memory_slots(signal.bfloat16(), layout, banks, 1, "triton")[-1].double()
    assert (half - truth).norm() / truth.norm() < 5e-3


@pytest.mark.parametrize("index", range(4))
def test_every_configuration_gives_the_same(index, monkeypatch):
    """Those that the tuner did not choose too, on aligned tensors of whole tiles."""
    for module in (memory_kernels, attention_kernels):
        for kernel in vars(module).values():
            if hasattr(kernel, "configs"):
                monkeypatch.setattr(kernel, "configs", kernel.configs[index : index + 1])
                monkeypatch.setattr(kernel, "cache", {})
                monkeypatch.setattr(kernel, "cache_results", False)
    segments = torch.ones(1, 1024, dtype=torch.int32)
    banks = MemoryBanks(100, 256, exponential(128, 2.0))
    compare_memory(segments, banks, 2, (2, 64), torch.bfloat16, "triton", "cuda", "batched", aligned=True)
    compare_attention(segments, 256, 128, (4, 2, 64), torch.bfloat16, "triton", "cuda", "batched", aligned=True)


@pytest.mark.parametrize(("order", "superchunk"), [(540, 16), (540, 4), (2160, 0)])
def test_memory_at_real_size(order, superchunk):
    banks = MemoryBanks(order, 2048, exponential(512, 3.0))
    compare_memory(REAL, banks, superchunk, (2, 128), torch.bfloat16, "triton", "cuda", "batched", aligned=True)


@pytest.mark.parametrize("rows", [1, 2])
def test_attention_at_real_size(rows):
    compare_attention(REAL[:rows], 2048, 512, (4, 2, 128), torch.bfloat16, "triton", "cuda", "batched", aligned=True)


class Layer:
    """Memory and attention of a layer, forward and backward, on fixed tensors."""

    def __init__(self, tokens: int = 1024, length: int = 128) -> None:
        def draw(heads: int) -> torch.Tensor:
            return torch.randn(tokens, 1, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

        self.inputs = [draw(4), draw(2), draw(2)]
        self.layout = BlockLayout.single_document(1, tokens, length, torch.device("cuda"))
        self.banks = MemoryBanks(100, length, exponential(64, 3.0))

    def __call__(self) -> list[torch.Tensor]:
        query, key, value = self.inputs
        memory = block_memory(key, value, self.layout, self.banks, 4, "triton")
        out = trapezoid_attention(query, key, value, memory.slots, self.layout, implementation="triton")
        return [out, *torch.autograd.grad(out, self.inputs, torch.ones_like(out))]


def test_nothing_waits_for_the_device():
    layer = Layer()
    layer()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_captures_it():
    layer = Layer()
    expected = layer()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    graph.replay()
    torch.cuda.synchronize()
    for ours, truth in zip(captured, expected, strict=True):
        assert torch.equal(ours, truth)


def test_the_same_twice():
    layer = Layer()
    for one, other in zip(layer(), layer(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    """A small run, with tiles that stick out in every direction."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        pytest.skip("compute-sanitizer is not installed")
    program = (
        "import torch\nfrom tests.ops.comparison import compare_attention, compare_memory\n"
        "from tests.ops.test_on_gpu import PACKED, MemoryBanks, exponential\n"
        "banks = MemoryBanks(40, 31, exponential(13, 2.0))\n"
        "compare_memory(PACKED, banks, 2, (2, 16), torch.bfloat16, 'triton', 'cuda')\n"
        "compare_attention(PACKED, 31, 13, (4, 2, 16), torch.bfloat16, 'triton', 'cuda')\n"
    )
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", program],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
