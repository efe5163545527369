"""The memory operator, step by step: the truth the fast paths are compared with.

Legend: L block length, N order, S slots, T tokens, b samples, h KV heads, c channels (keys and values side by side).
"""

from __future__ import annotations

import torch
from torch import Tensor

from em_megatron.hippo import legs, recurrences
from em_megatron.hippo.banks import MemoryBanks
from em_megatron.ops.block_layout import BlockLayout


def memory_write(state: Tensor, block: Tensor, tokens_before: int, discretization: str = "exact") -> Tensor:
    """C(t1) = carry(t0 → t1) C(t0) + inject(t0, t1; t1) X   (HiPPO-LegS, arXiv 2008.07669).

    Args:
        state: [N, ...], the projection of the first `tokens_before` tokens (zeros where there are none).
        block: [n, ...], the next n tokens of the signal.
        tokens_before: t0.
        discretization: how the signal is held between tokens.

    Returns:
        [N, ...], the projection of the first t0 + n tokens.
    """
    order, after = state.shape[0], tokens_before + block.shape[0]
    carry = recurrences.carry(discretization, order, tokens_before, after).to(state)
    inject = recurrences.inject(discretization, order, tokens_before, after, after).to(state)
    return torch.tensordot(carry, state, 1) + torch.tensordot(inject, block, 1)


def memory_read(state: Tensor, points: Tensor) -> Tensor:
    """The history at the moments `points` in (0, 1): [N, ...] → [S, ...]."""
    return torch.tensordot(legs.read(state.shape[0], points).to(state), state, 1)


def memory_slots(
    signal: Tensor,
    layout: BlockLayout,
    order: int,
    points: Tensor,
    discretization: str = "exact",
    entering: Tensor | None = None,
) -> Tensor:
    """What each block reads: the state of its document after the block before it.

    Args:
        signal: [T, b, h, c].
        layout: the documents of the batch.
        order: N.
        points: [S] moments in (0, 1).
        discretization: how the signal is held between tokens.
        entering: [N, rows, h, c] states of the documents that began before, in the order of layout.entering_rows.

    Returns:
        [B, S, b, h, c]; zeros for blocks without a history.
    """
    length = layout.block_length
    slots = signal.new_zeros(layout.num_blocks, len(points), *signal.shape[1:])
    for run in layout.runs:
        state = signal.new_zeros(order, *signal.shape[2:])
        if run.history:
            assert entering is not None
            state = entering[:, layout.entering_rows.index(run.row)].to(signal.dtype)
            slots[run.first_block, :, run.row] = memory_read(state, points)
        for step in range(run.num_blocks - 1):
            start, before = (run.first_block + step) * length, (run.history + step) * length
            state = memory_write(state, signal[start : start + length, run.row], before, discretization)
            slots[run.first_block + step + 1, :, run.row] = memory_read(state, points)
    return slots


class NaiveMemory:
    """`memory_slots` in the steps of the other implementations; it gives no states to go on with.

    Args:
        key, value: [T, b, h, d].
        layout, banks: as in `memory_slots`.
    """

    leaving_states = None

    def __init__(self, key: Tensor, value: Tensor, layout: BlockLayout, banks: MemoryBanks) -> None:
        self.signal, self.layout, self.banks = torch.cat([key, value], -1), layout, banks

    def read_own(self) -> None:
        """Nothing: all is computed at once."""

    def slots(self, entering: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Memory keys and values [B, S, b, h, d], zeros for blocks without a history."""
        banks = self.banks
        found = memory_slots(self.signal, self.layout, banks.order, banks.points, banks.discretization, entering)
        keys, values = found.chunk(2, -1)
        return keys, values
