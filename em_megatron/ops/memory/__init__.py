"""Memory operator: keys and values of a layer → the slots each block of tokens reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from em_megatron.hippo.banks import MemoryBanks
from em_megatron.hippo.cost_model import plan
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.dispatch import choose
from em_megatron.ops.memory import batched, naive
from em_megatron.ops.memory.naive import memory_read, memory_write

if TYPE_CHECKING:
    from em_megatron.ops.memory.triton import TritonMemory

__all__ = ["block_memory", "memory_read", "memory_slots", "memory_write"]


def memory_slots(
    signal: Tensor,
    layout: BlockLayout,
    banks: MemoryBanks,
    superchunk: int = 0,
    implementation: str = "auto",
    entering: Tensor | None = None,
) -> Tensor:
    """What each block reads: M_i = read(u) · C(after block i−1), for keys and values together (arXiv 2602.11212).

    Args:
        signal: [T, b, h, c], raw (unrotated) keys and values side by side, c = 2·d.
        layout: the documents of the batch; their memories never mix.
        banks: matrices of one order, block length, sampler and discretization.
        superchunk: blocks computed at once; 0 lets the cost model choose. Up to rounding it changes nothing.
        implementation: see `dispatch.choose`; "naive" is the step-by-step reference.
        entering: [N, rows, h, c] states of the documents that began before the blocks at hand, in the order of
            layout.entering_rows; None if there are none.

    Returns:
        [B, S, b, h, c], slots per block; zeros for blocks without a history. Differentiable in `signal`, `entering`.

    Raises:
        ValueError: unknown implementation, or one that cannot run here.
    """
    key, value = signal.chunk(2, -1)
    return torch.cat(block_memory(key, value, layout, banks, superchunk, implementation).slots(entering), -1)


def block_memory(
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    banks: MemoryBanks,
    superchunk: int = 0,
    implementation: str = "auto",
    bank_dtype: torch.dtype | None = None,
) -> batched.BlockMemory | naive.NaiveMemory | TritonMemory:
    """`memory_slots` in steps, for states that come from other ranks meanwhile.

    Args:
        key, value: [T, b, h, d].
        implementation: see `dispatch.choose`; "naive" gives no `leaving_states`.
        bank_dtype: of the matrices; default: that of the keys. The reference computes in that of the keys.

    Returns:
        What writes on construction, then takes `leaving_states`, `read_own()` and `slots(entering)`, which gives memory
        keys and values, each [B, S, b, h, d].
    """
    name = choose(implementation, key.device, key.dtype, key.shape[-1]).name
    if name == "naive":
        return naive.NaiveMemory(key, value, layout, banks)
    if not superchunk:
        part = layout.sequence_size > 1 or any(any(line) for line in layout.history)
        superchunk = plan(layout.num_blocks, banks.order, banks.slots, banks.block_length, part_of_sample=part)
    dtype = bank_dtype or key.dtype
    if name == "triton":
        from em_megatron.ops.memory.triton import TritonMemory

        return TritonMemory(key, value, layout, banks, superchunk, dtype)
    return batched.BlockMemory(torch.cat([key, value], -1).to(dtype), layout, banks, superchunk)
