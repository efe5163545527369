"""Where documents lie in a batch, seen block by block.

A sample packs documents (arXiv 2602.11212; README, "Documents"). One of `block_length` tokens or more starts at a
block boundary and owns a memory that is empty there. Shorter ones share a block and see only themselves.
Everything the operators need follows from one integer per token, its segment id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = 0  # segment id of tokens that belong to no document


@dataclass(frozen=True)
class Run:
    """A document that covers `num_blocks` consecutive blocks of sample `row` from block `first_block` on.

    The last of them may be partly filled; it is read from memory, never written to it.
    """

    row: int
    first_block: int
    num_blocks: int


@dataclass(frozen=True)
class BlockLayout:
    """Document structure of one micro-batch.

    Attributes:
        segment_ids: [b, T] integers; equal numbers inside one sample mean the same document, 0 is padding.
        block_length: tokens per block, L.
        runs: documents of two blocks or more, the only ones with a memory to read (host side).
        memory_tokens: [b, T] bool, tokens that may read the slots of their block.
        shared_blocks: whether some block holds more than one document, so that a local mask is needed.
    """

    segment_ids: Tensor
    block_length: int
    runs: tuple[Run, ...]
    memory_tokens: Tensor
    shared_blocks: bool

    @property
    def batch_size(self) -> int:
        return self.segment_ids.shape[0]

    @property
    def num_blocks(self) -> int:
        return self.segment_ids.shape[1] // self.block_length

    @property
    def is_single_document(self) -> bool:
        """Whether every sample is one document from its first to its last token."""
        whole = [run for run in self.runs if run.num_blocks == self.num_blocks]
        return len(whole) == self.batch_size and not self.shared_blocks

    @classmethod
    def from_segment_ids(
        cls, segment_ids: Tensor, block_length: int, device: torch.device | None = None
    ) -> BlockLayout:
        """Reads the layout off segment ids.

        Args:
            segment_ids: [b, T] integers on the CPU (as the data stream gives them).
            block_length: tokens per block.
            device: where the tensors of the layout go (default: stay).

        Raises:
            ValueError: T is not a multiple of `block_length`.
        """
        rows, tokens = segment_ids.shape
        if tokens % block_length:
            raise ValueError(
                f"a sample of {tokens} tokens is not a whole number of blocks of {block_length}: "
                "choose data.sequence_length as a multiple of memory.block_length"
            )
        blocks = segment_ids.view(rows, -1, block_length)
        first, last = blocks[..., 0], blocks[..., -1]
        uniform = (blocks == first[..., None]).all(-1)
        continues = torch.zeros_like(uniform)
        continues[:, 1:] = uniform[:, :-1] & (last[:, :-1] == first[:, 1:]) & (first[:, 1:] != PADDING)
        memory_tokens = (blocks == first[..., None]) & continues[..., None]
        return cls(
            segment_ids=segment_ids.to(device),
            block_length=block_length,
            runs=_runs(continues.tolist()),
            memory_tokens=memory_tokens.view(rows, tokens).to(device),
            shared_blocks=not bool(uniform.all()),
        )

    @classmethod
    def single_document(
        cls, batch_size: int, tokens: int, block_length: int, device: torch.device | None = None
    ) -> BlockLayout:
        """A batch in which every sample is one document."""
        return cls.from_segment_ids(torch.ones(batch_size, tokens, dtype=torch.int32), block_length, device)


def _runs(continues: list[list[bool]]) -> tuple[Run, ...]:
    """Maximal stretches of blocks in which each continues the document of the one before it."""
    runs = []
    for row, flags in enumerate(continues):
        start = 0
        for block in range(1, len(flags) + 1):
            if block == len(flags) or not flags[block]:
                if block - start > 1:
                    runs.append(Run(row, start, block - start))
                start = block
    return tuple(runs)
