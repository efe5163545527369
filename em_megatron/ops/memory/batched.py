"""The memory operator in batched PyTorch: a few large matrix products, no loop over blocks or heads.

Legend: L block length, N order, S slots, m blocks of a superchunk, ch channels (samples · KV heads · c).

A superchunk of m blocks reads    M = A C_start + G X ,   G strictly lower triangular in blocks [m·S, m·L].
The bank stores G by levels of a binary split (level l: pairs of groups of w = 2^l blocks, the right one reads the left),
so one batched product per level does exactly the work of the triangle.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from em_megatron.hippo.banks import MemoryBanks
from em_megatron.ops.block_layout import BlockLayout, Run


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    return x if x.shape[0] == rows else torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


class TriangleProduct(torch.autograd.Function):
    """y = G x for the strictly lower block-triangular G of a superchunk; saves no activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_blocks: int, slots: int, *levels: Tensor) -> Tensor:
        """x [m·L, ch] → [m·S, ch], accumulated over levels in fp32 or better."""
        ctx.save_for_backward(*levels)
        ctx.num_blocks, ctx.slots = num_blocks, slots
        length, padded = x.shape[0] // num_blocks, 1 << (num_blocks - 1).bit_length()
        x_padded = _pad_rows(x, padded * length)
        y = x.new_zeros(padded * slots, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        for level, g in enumerate(levels):  # g: [pairs, w·S, w·L]
            pairs, width = g.shape[0], 1 << level
            left = x_padded.view(-1, 2, width * length, x.shape[1])[:pairs, 0]
            y.view(-1, 2, width * slots, x.shape[1])[:pairs, 1] += torch.bmm(g, left)
        return y[: num_blocks * slots].to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dx = Gᵀ dy, [m·S, ch] → [m·L, ch]."""
        levels = ctx.saved_tensors
        num_blocks, slots = ctx.num_blocks, ctx.slots
        padded = 1 << (num_blocks - 1).bit_length()
        length = levels[0].shape[2]
        dy_padded = _pad_rows(dy, padded * slots)
        dx = dy.new_zeros(padded * length, dy.shape[1], dtype=torch.promote_types(dy.dtype, torch.float32))
        for level, g in enumerate(levels):
            pairs, width = g.shape[0], 1 << level
            right = dy_padded.view(-1, 2, width * slots, dy.shape[1])[:pairs, 1]
            dx.view(-1, 2, width * length, dy.shape[1])[:pairs, 0] += torch.bmm(g.transpose(1, 2), right)
        return dx[: num_blocks * length].to(dy.dtype), None, None, *[None] * len(levels)


def memory_scan(x: Tensor, banks: MemoryBanks, superchunk: int, sample_blocks: int) -> Tensor:
    """Slots of every block of documents that all start with the first row of `x` and span k blocks.

    The state is carried in fp32 or better whatever the dtype of `x`.

    Args:
        x: [k·L, ch]; the last block is not read by anyone and may hold anything.
        banks: the matrices of this order, block length and sampler.
        superchunk: m, blocks computed at once (1: recurrence, k: fully parallel). Up to rounding it changes nothing.
        sample_blocks: blocks of a whole sample, ≥ k; documents of every length share the matrices built for it.

    Returns:
        [k, S, ch]; zeros for the first block.
    """
    length, slots = banks.block_length, banks.slots
    num_blocks, channels = x.shape[0] // length, x.shape[1]
    state: Tensor | None = None
    pieces = []
    for start in range(0, num_blocks, superchunk):
        size = min(superchunk, num_blocks - start)
        chunk = banks.superchunk(start, min(superchunk, sample_blocks - start), x.dtype, x.device)
        x_chunk = x[start * length : (start + size) * length]
        y = x.new_zeros(size * slots, channels)
        if size > 1:
            y = TriangleProduct.apply(x_chunk, size, slots, *_first_blocks(chunk.triangle, size))
        if state is not None:
            assert chunk.read_carry is not None  # only the superchunk at the start has no history
            y = torch.addmm(y, chunk.read_carry[: size * slots], state.to(x.dtype))
        pieces.append(y)
        if start + size < num_blocks:
            added = chunk.inject @ x_chunk.to(chunk.inject.dtype)
            state = added if state is None else torch.addmm(added, chunk.carry, state)
    return torch.cat(pieces).view(num_blocks, slots, channels)


def _first_blocks(triangle: tuple[Tensor, ...], size: int) -> list[Tensor]:
    """The levels of the triangle over the first `size` blocks of a superchunk; what lies beyond is computed for nobody."""
    return [g[: len(range(1 << level, size, 2 << level))] for level, g in enumerate(triangle) if 1 << level < size]


def memory_slots(signal: Tensor, layout: BlockLayout, banks: MemoryBanks, superchunk: int) -> Tensor:
    """What each block reads: the state of its document after the block before it.

    Args:
        signal: [T, b, h, c], keys and values of a layer side by side in the last dimension.
        layout: the documents of the batch.
        banks: the matrices of this order, block length and sampler.
        superchunk: m.

    Returns:
        [B, S, b, h, c]; zeros for blocks without a history.
    """
    shape = signal.shape[1:]
    if layout.is_single_document:
        return memory_scan(signal.flatten(1), banks, superchunk, layout.num_blocks).unflatten(-1, shape)
    slots = signal.new_zeros(layout.num_blocks, layout.batch_size, banks.slots, *shape[1:])
    if layout.runs:
        where, what = zip(*(_scan_runs(signal, runs, layout, banks, superchunk)
                            for runs in _by_length(layout.runs)), strict=True)  # fmt: skip
        blocks, rows = torch.cat(where, 1).to(signal.device)
        slots = slots.index_put((blocks, rows), torch.cat(what))
    return slots.movedim(2, 1)


def _by_length(runs: tuple[Run, ...]) -> list[list[Run]]:
    ordered = sorted(runs, key=lambda run: run.num_blocks)
    return [list(group) for _, group in groupby(ordered, key=lambda run: run.num_blocks)]


def _scan_runs(
    signal: Tensor, runs: list[Run], layout: BlockLayout, banks: MemoryBanks, superchunk: int
) -> tuple[Tensor, Tensor]:
    """Scans runs of one length k side by side as channels: (block, row) [2, k·runs] and slots [k·runs, S, h, c]."""
    size, length = runs[0].num_blocks, layout.block_length
    spans = [signal[run.first_block * length : (run.first_block + size) * length, run.row] for run in runs]
    scanned = memory_scan(torch.stack(spans, 1).flatten(1), banks, superchunk, layout.num_blocks)  # [k, S, runs·h·c]
    scanned = scanned.unflatten(-1, (len(runs), *signal.shape[2:])).movedim(2, 1)  # [k, runs, S, h, c]
    where = [(run.first_block + step, run.row) for step in range(size) for run in runs]
    return torch.tensor(where).T, scanned.flatten(0, 1)
