"""Which superchunk of which document a launch works on: small tables, made once per layout and shared by all layers.

Documents of all lengths go through the superchunks side by side. A `Pass` is one superchunk with the documents that have
blocks in it; passes in order of their blocks write states before they are read. A state is known by its number: first
those that enter with documents that began earlier, then those between superchunks, last those that leave.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from em_megatron.hippo.banks import MemoryBanks, Superchunk
from em_megatron.ops.block_layout import BlockLayout, Run
from em_megatron.ops.transfer import to_device

NONE = -1  # no state


@dataclass(frozen=True)
class ChunkKey:
    """A superchunk by its blocks, counted from the start of the document; `shared` ones are kept for good."""

    start_block: int
    num_blocks: int
    shared: bool

    def matrices(self, banks: MemoryBanks, dtype: torch.dtype, device: torch.device) -> Superchunk:
        if self.shared:
            return banks.superchunk(self.start_block, self.num_blocks, dtype, device)
        return banks.block(self.start_block, dtype, device)


def chunk_keys(run: Run, leaves: bool, layout: BlockLayout, superchunk: int) -> list[ChunkKey]:
    """The superchunks a run goes through.

    Documents that begin with a rank's part share the superchunks of that part, whatever their length. For those that
    begin anywhere these would be others each time; they go block by block, with matrices that many can share.
    """
    first, size, part = run.history, run.num_blocks, layout.num_blocks
    aligned = first % part == 0 and first < layout.sample_blocks and (size == part or not leaves)
    if not aligned or superchunk == 1:
        return [ChunkKey(block, 1, shared=False) for block in range(first, first + size)]
    starts = range(first, first + size, superchunk)
    return [ChunkKey(start, min(superchunk, first + part - start), shared=True) for start in starts]


@dataclass
class Pass:
    """One superchunk: lists of lines for the kernels, whose docstrings say what a line holds."""

    key: ChunkKey
    reads: list[tuple[int, ...]] = field(default_factory=list)
    writes: list[tuple[int, ...]] = field(default_factory=list)
    carries: list[tuple[int, ...]] = field(default_factory=list)  # writes of what documents brought, passed on here
    blocks: list[tuple[int, ...]] = field(default_factory=list)
    segments: list[tuple[int, ...]] = field(default_factory=list)  # of documents with a state at the start
    links: list[tuple[int, ...]] = field(default_factory=list)  # segments whose states are computed here
    brought: list[tuple[int, ...]] = field(default_factory=list)  # their segments

    def carries_a_state(self, kind: str) -> bool:
        """Whether a launch over these lines moves a state from the start of the superchunk to its end."""
        if kind in ("writes", "carries"):
            return any(line[2] != NONE for line in getattr(self, kind))
        return any(line[-1] != NONE for line in getattr(self, kind)) and kind in ("segments", "links", "brought")


class Schedule:
    """All passes of a layout.

    Attributes:
        passes: in the order of their blocks.
        num_states: states in all, numbered as the module's docstring says.
        num_entering, num_leaving: of them, in the order of layout.entering_rows and layout.leaving.
        covers_all: whether every block at hand belongs to some pass, so that nothing is left unwritten.
        reads_all: whether every block at hand reads.
    """

    def __init__(self, layout: BlockLayout, superchunk: int) -> None:
        self.num_entering, self.num_leaving = len(layout.entering_rows), len(layout.leaving)
        self._passes: dict[ChunkKey, Pass] = {}
        self._between = self.num_entering
        runs = sorted({*layout.runs, *layout.leaving}, key=lambda run: (run.row, run.first_block))
        chunks = [chunk_keys(run, run in layout.leaving, layout, min(superchunk, layout.num_blocks)) for run in runs]
        inner = sum(len(keys) - 1 for keys in chunks)
        self.num_states = self.num_entering + inner + self.num_leaving
        for run, keys in zip(runs, chunks, strict=True):
            self._add(run, keys, layout)
        self.passes = sorted(self._passes.values(), key=lambda p: (p.key.start_block, p.key.num_blocks))
        blocks = layout.num_blocks * layout.batch_size
        self.covers_all = sum(len(p.blocks) for p in self.passes) == blocks
        self.reads_all = sum(len(p.reads) for p in self.passes) == blocks
        self._tables: dict[tuple[int, str, torch.device], Tensor] = {}

    def _add(self, run: Run, keys: list[ChunkKey], layout: BlockLayout) -> None:
        state = layout.entering_rows.index(run.row) if run.history else NONE
        for key in keys:
            after = NONE
            if key is not keys[-1]:
                after, self._between = self._between, self._between + 1
            elif run in layout.leaving:
                after = self.num_states - self.num_leaving + layout.leaving.index(run)
            computed = state if key is not keys[0] else NONE
            self._segment(run, key, (state, computed, after), layout)
            state = after

    def _segment(self, run: Run, key: ChunkKey, states: tuple[int, int, int], layout: BlockLayout) -> None:
        """The part of a run in a superchunk. states: what it starts from, with all that entered; the same if it is
        written here; and the one written at its end."""
        state, computed, after = states
        found = self._passes.setdefault(key, Pass(key))
        offset = key.start_block - run.history
        first, blocks = run.first_block + offset, min(key.num_blocks, run.num_blocks - offset)
        token, row = first * layout.block_length, run.row
        if run in layout.runs:
            found.reads += [(first + i, row, token, i, state) for i in range(blocks) if i or state != NONE]
        found.blocks += [(row, token, first, j, blocks, after) for j in range(blocks)]
        if after != NONE:
            found.writes.append((row, token, computed, after))
        inner = NONE < after < self.num_states - self.num_leaving
        if run.history and inner:
            found.carries.append((row, token, state, after))
        if state != NONE:
            found.segments.append((row, first, blocks, state, after))
        if computed != NONE:
            found.links.append((row, first, blocks, computed, after))
        if run.history and inner:
            found.brought.append((row, first, blocks, state, after))

    def table(self, index: int, kind: str, device: torch.device) -> Tensor:
        """Lines of a kind of a pass, [n, columns] int32 on the device, those with the most work first."""
        key = (index, kind, device)
        if key not in self._tables:
            lines = getattr(self.passes[index], kind)
            if kind == "reads":
                lines = sorted(lines, key=lambda line: -line[3])
            if kind == "blocks":
                lines = sorted(lines, key=lambda line: line[3] - line[4])
            self._tables[key] = to_device(torch.tensor(lines, dtype=torch.int32), device)
        return self._tables[key]
