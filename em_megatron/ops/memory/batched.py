"""The memory operator in batched PyTorch: a few large matrix products, no loop over blocks or heads.

Legend: L block length, N order, S slots, m blocks of a superchunk, ch channels (samples · KV heads · c).

A superchunk of m blocks reads    M = A C_start + G X ,   G strictly lower triangular in blocks [m·S, m·L].
The bank stores G by levels of a binary split (level l: pairs of groups of w = 2^l blocks, the right one reads the left),
so one batched product per level does exactly the work of the triangle.

The map is linear, so what the blocks at hand give and what a state that entered from before them gives are computed
apart and added: the first needs nothing from other ranks (`MemoryScan`, in the order write, read_own, read_all).
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from em_megatron.hippo.banks import MemoryBanks, Superchunk
from em_megatron.ops.block_layout import BlockLayout, Run
from em_megatron.ops.memory.schedule import chunk_keys


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


class MemoryScan:
    """Runs of one history n and length k, side by side as channels, read and written from a zero state.

    Args:
        x: [k·L, ch] the runs' tokens; unless they leave, the last block is not written and may hold anything.
        chunks: superchunks that follow one another from block n on; the last may be longer than what is left of x.
        leave: whether the state after the last block is wanted.
    """

    def __init__(self, x: Tensor, chunks: list[Superchunk], slots: int, block_length: int, leave: bool) -> None:
        self.x, self.chunks, self.slots, self.block_length = x, chunks, slots, block_length
        self.history, self.num_blocks = chunks[0].start_block, x.shape[0] // block_length
        self._states: list[Tensor | None] = []  # at the start of each chunk, [N, ch] in fp32 or better
        self.end: Tensor | None = None  # after the last block
        for chunk, tokens in zip(chunks, self._tokens(), strict=True):
            self._states.append(self.end)
            if chunk is not chunks[-1] or leave:
                added = chunk.inject @ tokens.to(chunk.inject.dtype)
                self.end = added if self.end is None else torch.addmm(added, chunk.carry, self.end)

    def _tokens(self) -> tuple[Tensor, ...]:
        first, length = self.history, self.block_length
        starts = [(chunk.start_block - first) * length for chunk in self.chunks]
        sizes = [b - a for a, b in zip(starts, [*starts[1:], self.x.shape[0]], strict=True)]
        return self.x.split(sizes)  # whose gradient is put together once, where that of slices is filled in for each

    def read_own(self) -> list[Tensor]:
        """What the blocks of a chunk read from the blocks before them in it: [blocks·S, ch] per chunk."""
        found = []
        for chunk, tokens in zip(self.chunks, self._tokens(), strict=True):
            blocks = tokens.shape[0] // self.block_length
            if blocks > 1:
                levels = _first_blocks(chunk.triangle, blocks)
                found.append(TriangleProduct.apply(tokens, blocks, self.slots, *levels))
            else:
                found.append(tokens.new_zeros(blocks * self.slots, tokens.shape[1]))
        return found

    def read_all(self, own: list[Tensor], entering: Tensor | None) -> Tensor:
        """Slots of every block [k, S, ch], zeros where there is no history.

        Args:
            own: what `read_own` gave.
            entering: [N, ch] state after the n blocks before the runs; None for n = 0.
        """
        pieces = []
        for chunk, y, state in zip(self.chunks, own, self._states, strict=True):
            before = _sum(state, entering)
            if before is not None:
                assert chunk.read_carry is not None  # only the chunk at the start of a document has no history
                y = torch.addmm(y, chunk.read_carry[: y.shape[0]], before.to(y.dtype))
            pieces.append(y)
            if entering is not None and chunk is not self.chunks[-1]:
                entering = chunk.carry @ entering
        return torch.cat(pieces).view(self.num_blocks, self.slots, -1)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _first_blocks(triangle: tuple[Tensor, ...], size: int) -> list[Tensor]:
    """The levels of the triangle over the first `size` blocks of a superchunk; what lies beyond is computed for nobody."""
    return [g[: len(range(1 << level, size, 2 << level))] for level, g in enumerate(triangle) if 1 << level < size]


class BlockMemory:
    """The memory of the blocks at hand, in three steps, so that states can travel between ranks meanwhile.

    1. constructing it writes: `leaving_states` then holds what the blocks at hand add to documents that go on;
    2. `read_own()` computes what needs no state from elsewhere;
    3. `slots(entering)` adds the states that documents brought along.

    Args:
        signal: [T_local, b, h, c], raw keys and values side by side.
        layout: the documents of the blocks at hand.
        banks: the matrices of this order, block length and sampler.
        superchunk: m, blocks computed at once.
    """

    def __init__(self, signal: Tensor, layout: BlockLayout, banks: MemoryBanks, superchunk: int) -> None:
        self.layout, self.banks, self.shape = layout, banks, signal.shape[1:]
        self.like = signal.new_zeros(())
        self.groups = _groups(layout)
        self.scans = [self._scan(signal, runs, min(superchunk, layout.num_blocks)) for runs in self.groups]
        self._own: list[list[Tensor]] | None = None

    def _scan(self, signal: Tensor, runs: list[Run], superchunk: int) -> MemoryScan:
        layout, length, size = self.layout, self.layout.block_length, runs[0].num_blocks
        if self._are_all(runs):
            x = signal.flatten(1)
        else:
            spans = [signal[run.first_block * length : (run.first_block + size) * length, run.row] for run in runs]
            x = torch.stack(spans, 1).flatten(1)
        leave = runs[0] in layout.leaving
        chunks = _chunks(runs[0], leave, layout, self.banks, superchunk, x)
        return MemoryScan(x, chunks, self.banks.slots, length, leave)

    def _are_all(self, runs: list[Run]) -> bool:
        """Whether these runs are all that is at hand: one document per sample, alike in history and fate."""
        return len(runs) == self.layout.batch_size and runs[0].num_blocks == self.layout.num_blocks

    @property
    def leaving_states(self) -> Tensor | None:
        """[N, leaving runs, h, c] in the order of layout.leaving: states after the last block at hand, as if nothing
        had been there before the first; None if no document goes on."""
        found: dict[int, Tensor] = {}
        for runs, scan in zip(self.groups, self.scans, strict=True):
            if scan.end is not None and runs[0] in self.layout.leaving:
                for run, state in zip(
                    runs, scan.end.unflatten(-1, (len(runs), *self.shape[1:])).unbind(1), strict=True
                ):
                    found[run.row] = state
        return torch.stack([found[run.row] for run in self.layout.leaving], 1) if found else None

    def read_own(self) -> None:
        """Step 2; `slots` does it where it was left out."""
        self._own = [scan.read_own() for scan in self.scans]

    def slots(self, entering: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Memory keys and values [B_local, S, b, h, d], zeros for blocks without a history.

        Args:
            entering: [N, rows, h, c] states of the documents that began before the blocks at hand, in the order of
                layout.entering_rows; None if there are none.
        """
        if self._own is None:
            self.read_own()
        assert self._own is not None
        column = {row: index for index, row in enumerate(self.layout.entering_rows)}
        found = []
        for runs, scan, own in zip(self.groups, self.scans, self._own, strict=True):
            state = None
            if scan.history:
                assert entering is not None
                state = entering[:, [column[run.row] for run in runs]].flatten(1)
            found.append(scan.read_all(own, state))  # [k, S, runs·h·c]
        keys, values = self._place(found).chunk(2, -1)
        return keys, values

    def _place(self, scanned: list[Tensor]) -> Tensor:
        layout = self.layout
        if self.groups and self._are_all(self.groups[0]):
            return scanned[0].unflatten(-1, self.shape)
        slots = self.like.new_zeros(layout.num_blocks, layout.batch_size, self.banks.slots, *self.shape[1:])
        reading = [(runs, piece) for runs, piece in zip(self.groups, scanned, strict=True) if runs[0] in layout.runs]
        if reading:
            where = [(run.first_block + step, run.row) for runs, _ in reading
                     for step in range(runs[0].num_blocks) for run in runs]  # fmt: skip
            what = [piece.unflatten(-1, (len(runs), *self.shape[1:])).movedim(2, 1).flatten(0, 1)
                    for runs, piece in reading]  # fmt: skip
            blocks, rows = torch.tensor(where).T.to(self.like.device)
            slots = slots.index_put((blocks, rows), torch.cat(what))
        return slots.movedim(2, 1)


def _groups(layout: BlockLayout) -> list[list[Run]]:
    """Runs that are read or go on, those of equal history, length and fate together."""

    def key(run: Run) -> tuple[int, int, bool]:
        return run.history, run.num_blocks, run in layout.leaving

    spans = sorted({*layout.runs, *layout.leaving}, key=lambda run: (key(run), run.row, run.first_block))
    return [list(group) for _, group in groupby(spans, key=key)]


def _chunks(
    run: Run, leave: bool, layout: BlockLayout, banks: MemoryBanks, superchunk: int, x: Tensor
) -> list[Superchunk]:
    """The matrices for a run."""
    keys = chunk_keys(run, leave, layout, superchunk)
    if not keys[0].shared:
        banks.make_room(len(keys))
    return [key.matrices(banks, x.dtype, x.device) for key in keys]
