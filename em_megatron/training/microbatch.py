"""Micro-batches on the device, with the layout of their documents: this rank's part of each sample."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.transfer import to_device
from em_megatron.parallel.sequence_split import local_part


@dataclass(frozen=True)
class MicroBatch:
    """tokens, labels [b, T_local] int64; loss_mask [b, T_local] float32; positions [b, T_local] in the document's piece.

    copied: recorded on another stream behind the copies to the device; None where this stream made them.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    layout: BlockLayout
    copied: torch.cuda.Event | None = None

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

        def part(name: str) -> Tensor:
            return to_device(local_part(batch[name], sequence_rank, sequence_size), device)

        return cls(part("tokens"), part("labels"), part("loss_mask"), part("positions"), layout)


def micro_batches(
    batches: Iterator[tuple[dict[str, Tensor], int]],
    block_length: int,
    device: torch.device,
    sequence_rank: int = 0,
    sequence_size: int = 1,
) -> Generator[MicroBatch]:
    """Micro-batches on the device. On a GPU the copies go through a stream of their own, beside what computes there:
    pass them through `arrived` before use."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread, which may be one that reads ahead; it would begin with device 0
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch, _ in batches:
        with torch.cuda.stream(side) if side else nullcontext():
            made = MicroBatch.from_batch(batch, block_length, device, sequence_rank, sequence_size)
        yield replace(made, copied=side.record_event()) if side else made


def arrived(batches: Generator[MicroBatch]) -> Generator[MicroBatch]:
    """The data iterator of Megatron's schedules: micro-batches that the current stream may read. Closing it closes theirs."""
    try:
        for batch in batches:
            if batch.copied is not None:
                stream = torch.cuda.current_stream(batch.tokens.device)
                stream.wait_event(batch.copied)
                layout = batch.layout
                tensors = (batch.tokens, batch.labels, batch.loss_mask, batch.positions)
                for tensor in (*tensors, layout.segment_ids, layout.memory_tokens):
                    tensor.record_stream(stream)  # else its memory would be given away while it is read
            yield batch
    finally:
        batches.close()
