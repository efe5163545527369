"""Micro-batches on the device, with the layout of their documents."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from em_megatron.ops.block_layout import BlockLayout


@dataclass(frozen=True)
class MicroBatch:
    """tokens, labels [b, T] int64; loss_mask [b, T] float32; positions [b, T] in the document's piece."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    layout: BlockLayout

    @classmethod
    def from_batch(cls, batch: dict[str, Tensor], block_length: int, device: torch.device) -> MicroBatch:
        """From the stream's host tensors; the layout is read on the host, where it needs no synchronisation."""
        layout = BlockLayout.from_segment_ids(batch["segment_ids"], block_length, device)
        names = ("tokens", "labels", "loss_mask", "positions")
        return cls(**{name: batch[name].to(device, non_blocking=True) for name in names}, layout=layout)


def micro_batches(
    batches: Iterator[tuple[dict[str, Tensor], int]], block_length: int, device: torch.device
) -> Generator[MicroBatch]:
    """The data iterator of Megatron's schedules; closing it ends the thread that reads ahead."""
    for batch, _ in batches:
        yield MicroBatch.from_batch(batch, block_length, device)
