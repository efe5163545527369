"""Memory operator: keys and values of a layer → the slots each block of tokens reads."""

from __future__ import annotations

from torch import Tensor

from em_megatron.hippo.banks import MemoryBanks
from em_megatron.hippo.cost_model import plan
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.memory import batched, naive
from em_megatron.ops.memory.naive import memory_read, memory_write

__all__ = ["block_memory", "memory_read", "memory_slots", "memory_write"]

IMPLEMENTATIONS = ("batched", "naive")


def memory_slots(
    signal: Tensor,
    layout: BlockLayout,
    banks: MemoryBanks,
    superchunk: int = 0,
    implementation: str = "batched",
    entering: Tensor | None = None,
) -> Tensor:
    """What each block reads: M_i = read(u) · C(after block i−1), for keys and values together (arXiv 2602.11212).

    Args:
        signal: [T, b, h, c], raw (unrotated) keys and values side by side, c = 2·d.
        layout: the documents of the batch; their memories never mix.
        banks: matrices of one order, block length, sampler and discretization.
        superchunk: blocks computed at once; 0 lets the cost model choose. Up to rounding it changes nothing.
        implementation: "batched", or "naive" for the step-by-step reference.
        entering: [N, rows, h, c] states of the documents that began before the blocks at hand, in the order of
            layout.entering_rows; None if there are none.

    Returns:
        [B, S, b, h, c], slots per block; zeros for blocks without a history. Differentiable in `signal`, `entering`.

    Raises:
        ValueError: unknown implementation.
    """
    if implementation == "naive":
        return naive.memory_slots(signal, layout, banks.order, banks.points, banks.discretization, entering)
    if implementation != "batched":
        raise ValueError(f"memory implementation '{implementation}' is unknown: choose one of {IMPLEMENTATIONS}")
    return block_memory(signal, layout, banks, superchunk).slots(entering)


def block_memory(signal: Tensor, layout: BlockLayout, banks: MemoryBanks, superchunk: int = 0) -> batched.BlockMemory:
    """`memory_slots` in steps, for states that come from other ranks meanwhile; arguments as there."""
    if not superchunk:
        part = layout.sequence_size > 1 or any(any(line) for line in layout.history)
        superchunk = plan(layout.num_blocks, banks.order, banks.slots, banks.block_length, part_of_sample=part)
    return batched.BlockMemory(signal, layout, banks, superchunk)
