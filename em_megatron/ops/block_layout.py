"""Where documents lie in a batch, seen block by block.

A sample packs documents (arXiv 2602.11212; README, "Documents"). One of `block_length` tokens or more starts at a
block boundary and owns a memory that is empty there. Shorter ones share a block and see only themselves.
Everything the operators need follows from one integer per token, its segment id.

Under context parallelism a sample is cut into equal runs of blocks, one per rank. Every rank reads the ids of the
whole sample, so each knows, without asking, what enters from the left and what goes on to the right. A sample may also
go on from, and be continued by, another one in the same batch slot; only its first and last document can.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from em_megatron.ops.transfer import to_device

PADDING = 0  # segment id of tokens that belong to no document


@dataclass(frozen=True)
class Run:
    """The part of a document that covers `num_blocks` consecutive blocks of sample `row` from `first_block` on.

    `first_block` counts from the first block at hand (this rank's), `history` the blocks of the document before it.
    The last block may be partly filled; it is read from memory, and written to it only where the document goes on
    beyond the blocks at hand, and then it is full.
    """

    row: int
    first_block: int
    num_blocks: int
    history: int = 0


@dataclass(frozen=True)
class BlockLayout:
    """Document structure of the part of a micro-batch that this rank holds (all of it without context parallelism).

    Attributes:
        segment_ids: [b, T_local] integers; equal numbers inside one sample mean the same document, 0 is padding.
        block_length: tokens per block, L.
        runs: the documents with a memory to read here: of two blocks or more, or with a history (host side).
        leaving: the documents that go on beyond the last block at hand, on the next rank or in the next sample.
        memory_tokens: [b, T_local] bool, tokens that may read the slots of their block.
        shared: [B_local] whether a block at hand holds more than one document in any sample, so that a local mask is needed.
        history: [ranks + 1][b] blocks of memory that enter each rank's part of each sample, 0 where its first block
            starts a document; the last line is what the end of the sample hands on to the next one in its slot.
        sequence_rank: which part this is, from 0.
        slots: [b] the batch slot of each sample, by which memory is carried from sample to sample; may be empty where
            none is.
    """

    segment_ids: Tensor
    block_length: int
    runs: tuple[Run, ...]
    leaving: tuple[Run, ...]
    memory_tokens: Tensor
    shared: tuple[bool, ...]
    history: tuple[tuple[int, ...], ...]
    sequence_rank: int = 0
    slots: tuple[int, ...] = ()

    @cached_property
    def derived(self) -> dict[object, Any]:
        """What operators work out from this layout, kept here so that one layer does it for all."""
        return {}

    @cached_property
    def readers(self) -> Tensor:
        """[B_local·b] int32, block after block: how many leading tokens of a block read its slots."""
        tokens = self.memory_tokens.view(self.batch_size, self.num_blocks, self.block_length)
        return tokens.sum(-1, dtype=torch.int32).T.contiguous().flatten()

    @cached_property
    def _segment_bounds(self) -> tuple[Tensor, Tensor]:
        ids = self.segment_ids.view(-1, self.block_length)
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        number = new.cumsum(-1, dtype=torch.int32)
        start = torch.searchsorted(number, number)
        stop = torch.searchsorted(number, number, right=True)
        return start.to(torch.int32).view_as(self.segment_ids), stop.to(torch.int32).view_as(self.segment_ids)

    @property
    def segment_start(self) -> Tensor:
        """[b, T_local] int32, where in its block the document of a token begins."""
        return self._segment_bounds[0]

    @property
    def segment_stop(self) -> Tensor:
        """[b, T_local] int32, where in its block the document of a token ends."""
        return self._segment_bounds[1]

    @property
    def shared_blocks(self) -> bool:
        """Whether any block at hand holds more than one document."""
        return any(self.shared)

    @property
    def batch_size(self) -> int:
        return self.segment_ids.shape[0]

    @property
    def num_blocks(self) -> int:
        """Blocks at hand, B_local."""
        return self.segment_ids.shape[1] // self.block_length

    @property
    def sequence_size(self) -> int:
        """Ranks that share a sample."""
        return len(self.history) - 1

    @property
    def sample_blocks(self) -> int:
        """Blocks of a whole sample, B."""
        return self.num_blocks * self.sequence_size

    @property
    def entering_rows(self) -> list[int]:
        """Samples whose first document at hand began before it."""
        return [row for row, blocks in enumerate(self.history[self.sequence_rank]) if blocks]

    @property
    def crosses_ranks(self) -> bool:
        """Whether any document of the micro-batch spans two ranks; the same answer on all of them."""
        return any(any(line) for line in self.history[1:-1])

    @property
    def continued_rows(self) -> list[int]:
        """Samples whose last document goes on in the next sample of their slot; the same answer on all ranks."""
        return [row for row, blocks in enumerate(self.history[-1]) if blocks]

    @classmethod
    def from_segment_ids(
        cls,
        segment_ids: Tensor,
        block_length: int,
        device: torch.device | None = None,
        *,
        sequence_rank: int = 0,
        sequence_size: int = 1,
        history: Tensor | None = None,
        continues: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> BlockLayout:
        """Reads the layout off the segment ids of whole samples, and keeps this rank's part.

        Args:
            segment_ids: [b, T] integers on the CPU (as the data stream gives them).
            block_length: tokens per block.
            device: where the tensors of the layout go (default: stay).
            sequence_rank, sequence_size: which of how many equal parts of T this rank holds.
            history: [b] tokens of each sample's first document that its slot has read before, multiples of L.
            continues: [b] whether each sample's last document goes on in the next sample of its slot.
            slots: [b] batch slots, needed with `history` and `continues`.

        Raises:
            ValueError: T is not a multiple of `block_length` × `sequence_size`.
        """
        rows, tokens = segment_ids.shape
        if tokens % (block_length * sequence_size):
            raise ValueError(
                f"a sample of {tokens} tokens is not a whole number of blocks of {block_length} on each of "
                f"{sequence_size} ranks: choose data.sequence_length as a multiple of memory.block_length "
                "× context_parallel_size"
            )
        before = [0] * rows if history is None else (history // block_length).tolist()
        goes_on = [False] * rows if continues is None else continues.tolist()
        blocks = segment_ids.view(rows, -1, block_length)
        first, last = blocks[..., 0], blocks[..., -1]
        uniform = (blocks == first[..., None]).all(-1)
        continued = torch.zeros_like(uniform)
        continued[:, 1:] = uniform[:, :-1] & (last[:, :-1] == first[:, 1:]) & (first[:, 1:] != PADDING)
        continued[:, 0] = torch.tensor(before) > 0
        memory_tokens = (blocks == first[..., None]) & continued[..., None]

        documents = [_stretches(row, flags, before[row]) for row, flags in enumerate(continued.tolist())]
        size = blocks.shape[1] // sequence_size
        table = tuple(
            tuple(_entering(documents[row], rank * size, goes_on[row]) for row in range(rows))
            for rank in range(sequence_size + 1)
        )
        mine = [_cut(run, sequence_rank * size, size) for row in documents for run in row]
        after = table[sequence_rank + 1]
        here = slice(sequence_rank * size, (sequence_rank + 1) * size)
        return cls(
            segment_ids=to_device(blocks[:, here].flatten(1).contiguous(), device),
            block_length=block_length,
            runs=tuple(run for run in mine if run and (run.num_blocks > 1 or run.history)),
            leaving=tuple(run for run in mine if run and run.first_block + run.num_blocks == size and after[run.row]),
            memory_tokens=to_device(memory_tokens[:, here].flatten(1).contiguous(), device),
            shared=tuple((~uniform[:, here].all(0)).tolist()),
            history=table,
            sequence_rank=sequence_rank,
            slots=tuple(slots.tolist()) if slots is not None else (),
        )

    @classmethod
    def single_document(
        cls, batch_size: int, tokens: int, block_length: int, device: torch.device | None = None
    ) -> BlockLayout:
        """A batch in which every sample is one document."""
        return cls.from_segment_ids(torch.ones(batch_size, tokens, dtype=torch.int32), block_length, device)


def _stretches(row: int, continued: list[bool], history: int) -> list[Run]:
    """Maximal stretches of blocks of a whole sample in which each continues the document of the one before it."""
    starts = [block for block, flag in enumerate(continued) if block == 0 or not flag]
    stops = [*starts[1:], len(continued)]
    return [Run(row, start, stop - start, 0 if start else history) for start, stop in zip(starts, stops, strict=True)]


def _entering(documents: list[Run], block: int, goes_on: bool) -> int:
    """Blocks of history of the document that covers the blocks on both sides of the start of `block`, else 0."""
    for run in documents:
        end = run.first_block + run.num_blocks
        if run.first_block < block < end or (block == end and run is documents[-1] and goes_on):
            return run.history + block - run.first_block
    return documents[0].history if block == 0 else 0


def _cut(run: Run, start: int, size: int) -> Run | None:
    """What blocks start … start + size − 1 hold of a run, counted from `start`; None if nothing."""
    first, stop = max(run.first_block, start), min(run.first_block + run.num_blocks, start + size)
    if first >= stop:
        return None
    return Run(run.row, first - start, stop - first, run.history + first - run.first_block)
