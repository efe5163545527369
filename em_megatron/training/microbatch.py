"""Micro-batches on the device, with the layout of their documents: this rank's part of each sample."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.transfer import to_device
from em_megatron.parallel.sequence_split import local_part


@dataclass(frozen=True)
class MicroBatch:
    """tokens, labels [b, T_local] int64; loss_mask [b, T_local] float32; positions [b, T_local] in the document's piece."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    layout: BlockLayout

    @classmethod
    def from_batch(
        cls,
        batch: dict[str, Tensor],
        block_length: int,
        device: torch.device,
        sequence_rank: int = 0,
        sequence_size: int = 1,
    ) -> MicroBatch:
        """From the stream's host tensors of whole samples; the layout is read on the host, without synchronisation."""
        layout = BlockLayout.from_segment_ids(
            batch["segment_ids"],
            block_length,
            device,
            sequence_rank=sequence_rank,
            sequence_size=sequence_size,
            history=batch["history"],
            continues=batch["continues"],
            slots=batch["slot"],
        )
        parts = {
            name: to_device(local_part(batch[name], sequence_rank, sequence_size), device)
            for name in ("tokens", "labels", "loss_mask", "positions")
        }
        return cls(**parts, layout=layout)


def micro_batches(
    batches: Iterator[tuple[dict[str, Tensor], int]],
    block_length: int,
    device: torch.device,
    sequence_rank: int = 0,
    sequence_size: int = 1,
) -> Generator[MicroBatch]:
    """The data iterator of Megatron's schedules; closing it ends the thread that reads ahead."""
    for batch, _ in batches:
        yield MicroBatch.from_batch(batch, block_length, device, sequence_rank, sequence_size)
