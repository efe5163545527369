"""The operators on a CUDA device against the fp64 references on the CPU: outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from em_megatron.hippo.banks import MemoryBanks
from em_megatron.hippo.samplers import exponential
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.memory import memory_slots
from em_megatron.ops.trapezoid_attention import trapezoid_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# fp32 without TF32, and bf16: some tens of roundings of 2⁻²⁴ and 2⁻⁹, relative to the norm of the tensor.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
LENGTH, SLOTS, ROWS, HEADS, KV_HEADS, DIM = 31, 13, 2, 4, 2, 16
SEGMENTS = torch.tensor([[1] * 155, [1] * 100 + [2] * 20 + [0] * 4 + [3] * 31])


def close(ours: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    error = (ours.double().cpu() - truth).norm() / truth.norm()
    assert error < TOLERANCE[dtype], f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_memory(dtype):
    banks = MemoryBanks(40, LENGTH, exponential(SLOTS, 2.0))
    signal = torch.randn(155, ROWS, KV_HEADS, 2 * DIM, dtype=torch.float64).to(dtype).double().requires_grad_()
    truth = memory_slots(signal, BlockLayout.from_segment_ids(SEGMENTS, LENGTH), banks, implementation="naive")
    weight = torch.randn_like(truth).to(dtype).double()
    (gradient,) = torch.autograd.grad((truth * weight).sum(), signal)
    layout = BlockLayout.from_segment_ids(SEGMENTS, LENGTH, torch.device("cuda"))
    for superchunk in (1, 2, 5):
        mine = signal.detach().to("cuda", dtype).requires_grad_()
        slots = memory_slots(mine, layout, banks, superchunk)
        close(slots, truth, dtype, f"slots, superchunk {superchunk}")
        (ours,) = torch.autograd.grad(slots, mine, weight.to("cuda", dtype))
        close(ours, gradient, dtype, f"gradient, superchunk {superchunk}")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention(dtype):
    shapes = {
        "query": (155, ROWS, HEADS, DIM),
        "key": (155, ROWS, KV_HEADS, DIM),
        "value": (155, ROWS, KV_HEADS, DIM),
        "slot keys": (5, SLOTS, ROWS, KV_HEADS, DIM),
        "slot values": (5, SLOTS, ROWS, KV_HEADS, DIM),
    }
    exact = {n: torch.randn(s, dtype=torch.float64).to(dtype).double().requires_grad_() for n, s in shapes.items()}

    def run(named: dict[str, torch.Tensor], device: str, implementation: str) -> torch.Tensor:
        query, key, value, *slots = named.values()
        layout = BlockLayout.from_segment_ids(SEGMENTS, LENGTH, torch.device(device))
        return trapezoid_attention(query, key, value, tuple(slots), layout, implementation=implementation)

    truth = run(exact, "cpu", "naive")
    weight = torch.randn_like(truth).to(dtype).double()
    gradients = torch.autograd.grad((truth * weight).sum(), exact.values())
    mine = {name: value.detach().to("cuda", dtype).requires_grad_() for name, value in exact.items()}
    out = run(mine, "cuda", "batched")
    close(out, truth, dtype, "output")
    for name, ours, gradient in zip(
        mine, torch.autograd.grad(out, mine.values(), weight.to("cuda", dtype)), gradients, strict=True
    ):
        close(ours, gradient, dtype, f"gradient of {name}")
