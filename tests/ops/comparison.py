"""Compares the operators with the step-by-step references in fp64: outputs, states, and every gradient by name.

Used on the CPU, where Triton's interpreter runs the kernels, and on GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from em_megatron.hippo.banks import MemoryBanks
from em_megatron.hippo.samplers import exponential
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.memory import block_memory, memory_slots
from em_megatron.ops.trapezoid_attention import trapezoid_attention

# Error relative to the norm of the tensor: some tens of roundings of 2⁻²⁴, 2⁻¹² and 2⁻⁹ (fp32 without TF32).
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(ours: Tensor, truth: Tensor, dtype: torch.dtype, name: str) -> None:
    """Checks one tensor against its fp64 truth."""
    assert ours.shape == truth.shape, f"{name}: {tuple(ours.shape)} is not {tuple(truth.shape)}"
    error = (ours.detach().double().cpu() - truth.cpu()).norm() / truth.norm().cpu()
    assert error < TOLERANCE[dtype], f"{name}: relative error {error:.2e}"


def draw(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random numbers that the dtype holds exactly, in fp64."""
    return torch.randn(*shape, dtype=torch.float64).to(dtype).double().to(device)


def as_views(named: dict[str, Tensor], dtype: torch.dtype, device: str, aligned: bool = False) -> dict[str, Tensor]:
    """Leaves of the dtype with the same numbers, the last dimension adjacent: contiguous and aligned as fresh tensors
    are, or none of them contiguous and each with strides of its own."""
    if aligned:
        return {name: value.detach().to(device, dtype, copy=True).requires_grad_() for name, value in named.items()}
    found = {}
    for index, (name, value) in enumerate(named.items()):
        wide = torch.full((*value.shape[:-1], value.shape[-1] + 8 + index), float("nan"), dtype=dtype, device=device)
        wide[..., 4 : 4 + value.shape[-1]] = value.to(device, dtype)
        found[name] = wide[..., 4 : 4 + value.shape[-1]].detach().requires_grad_()
        assert not found[name].is_contiguous()
    return found


def compare_memory(
    segments: Tensor, banks: MemoryBanks, superchunk: int, shape: tuple[int, int], dtype: torch.dtype,
    implementation: str, device: str = "cpu", reference: str = "naive", aligned: bool = False,
) -> None:  # fmt: skip
    """Documents that begin and end here; shape is (h, d). The reference runs on the device if it is "batched"."""
    rows, tokens = segments.shape
    where = "cpu" if reference == "naive" else device
    named = {name: draw(tokens, rows, *shape, dtype=dtype, device=where).requires_grad_() for name in ("key", "value")}
    layout = BlockLayout.from_segment_ids(segments, banks.block_length, torch.device(where))
    truth = memory_slots(torch.cat(list(named.values()), -1), layout, banks, superchunk, reference)
    weight = draw(*truth.shape, dtype=dtype, device=where)
    gradients = torch.autograd.grad((truth * weight).sum(), list(named.values()))

    mine = as_views(named, dtype, device, aligned)
    layout = BlockLayout.from_segment_ids(segments, banks.block_length, torch.device(device))
    slots = torch.cat(block_memory(*mine.values(), layout, banks, superchunk, implementation).slots(), -1)
    close(slots, truth.detach(), dtype, "slots")
    ours = torch.autograd.grad(slots, list(mine.values()), weight.to(device, dtype))
    for name, gradient, expected in zip(named, ours, gradients, strict=True):
        close(gradient, expected, dtype, f"gradient of the {name}")


def compare_attention(
    segments: Tensor, length: int, num_slots: int, heads: tuple[int, int, int], dtype: torch.dtype,
    implementation: str, device: str = "cpu", reference: str = "naive", aligned: bool = False,
) -> None:  # fmt: skip
    """heads is (hq, hk, d)."""
    rows, tokens = segments.shape
    query_heads, kv_heads, dim = heads
    where = "cpu" if reference == "naive" else device
    shapes = {"query": (tokens, rows, query_heads, dim)}
    shapes |= dict.fromkeys(("key", "value"), (tokens, rows, kv_heads, dim))
    if num_slots:
        shapes |= dict.fromkeys(("slot keys", "slot values"), (tokens // length, num_slots, rows, kv_heads, dim))
    named = {name: draw(*shape, dtype=dtype, device=where).requires_grad_() for name, shape in shapes.items()}

    def run(tensors: dict[str, Tensor], on: str, kind: str) -> Tensor:
        query, key, value, *slots = tensors.values()
        layout = BlockLayout.from_segment_ids(segments, length, torch.device(on))
        return trapezoid_attention(query, key, value, tuple(slots) or None, layout, implementation=kind)

    truth = run(named, where, reference)
    weight = draw(*truth.shape, dtype=dtype, device=where)
    gradients = torch.autograd.grad((truth * weight).sum(), list(named.values()))
    mine = as_views(named, dtype, device, aligned)
    out = run(mine, device, implementation)
    close(out, truth.detach(), dtype, "output")
    ours = torch.autograd.grad(out, list(mine.values()), weight.to(device, dtype))
    for name, gradient, expected in zip(named, ours, gradients, strict=True):
        close(gradient, expected, dtype, f"gradient of the {name}")


def compare_passing_states(
    superchunk: int, order: int, dtype: torch.dtype, implementation: str, device: str = "cpu"
) -> None:
    """Two ranks' parts of one sample, the first of which goes on from an earlier step: states are handed on by hand."""
    length, heads, dim, where = 5, 1, 6, torch.device(device)
    segments = torch.tensor([[1] * 40, [1] * 15 + [2] * 15 + [3] * 10], dtype=torch.int32)
    banks = MemoryBanks(order, length, exponential(7, 2.0))
    before = torch.tensor([2 * length, 0])
    whole = BlockLayout.from_segment_ids(segments, length, history=before)
    parts = [
        BlockLayout.from_segment_ids(segments, length, where, history=before, sequence_rank=r, sequence_size=2)
        for r in (0, 1)
    ]
    named = {name: draw(40, 2, heads, dim, dtype=dtype).requires_grad_() for name in ("key", "value")}
    entering = draw(order, 1, heads, 2 * dim, dtype=torch.float32).requires_grad_()
    truth = memory_slots(torch.cat(list(named.values()), -1), whole, banks, 0, "naive", entering)
    weight = draw(*truth.shape, dtype=dtype)
    gradients = torch.autograd.grad((truth * weight).sum(), [*named.values(), entering])

    mine = as_views(named, dtype, device)
    state = entering.detach().to(where, torch.float32).requires_grad_()
    memories = [
        block_memory(mine["key"][span], mine["value"][span], part, banks, superchunk, implementation)
        for span, part in zip((slice(0, 20), slice(20, 40)), parts, strict=True)
    ]
    first = torch.cat(memories[0].slots(state), -1)
    left = memories[0].leaving_states
    assert [run.row for run in parts[0].leaving] == parts[1].entering_rows == [0, 1]
    # What the document of sample 0 brought goes through the first part: carried over it, and added to what it wrote.
    passed = torch.tensordot(banks.carry(2, 6, torch.float32, where), state[:, 0], 1)
    second = torch.cat(memories[1].slots(torch.stack([left[:, 0] + passed, left[:, 1]], 1)), -1)
    slots = torch.cat([first, second])
    close(slots, truth.detach(), dtype, "slots")
    ours = torch.autograd.grad(slots, [*mine.values(), state], weight.to(where, dtype))
    for name, gradient, expected in zip([*named, "entering state"], ours, gradients, strict=True):
        close(gradient, expected, dtype, f"gradient of the {name}")
