"""Micro-batches copied to a GPU on a stream of their own, while another computes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from em_megatron.data.loading import ahead, load
from em_megatron.data.shards import ShardReader
from em_megatron.data.stream import RankBatches, TokenStream
from em_megatron.training.microbatch import MicroBatch, arrived, micro_batches
from tests.data.handmade import PAD, write_corpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ("tokens", "labels", "loss_mask", "positions")


def tensors(batch: MicroBatch) -> list[torch.Tensor]:
    layout = batch.layout
    found = [getattr(batch, name) for name in NAMES]
    return [*found, layout.segment_ids, layout.memory_tokens, layout.readers, layout.segment_start, layout.segment_stop]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_arrives_is_what_was_sent(tmp_path: Path, workers: int) -> None:
    write_corpus(tmp_path, [7, 400, 30, 2, 300, 1200, 9] * 20, shard_tokens=5000)
    stream = TokenStream(ShardReader(tmp_path), 1024, 64, seed=1, pad_id=PAD)
    batches = RankBatches(stream, 0, 4, 0, 1)
    device = torch.device("cuda", torch.cuda.current_device())
    sent = micro_batches(load(batches, 0), 64, torch.device("cpu"))
    received = arrived(ahead(micro_batches(load(batches, workers), 64, device), 4))
    busy = torch.randn(2048, 2048, device=device)
    for expected, found in islice(zip(sent, received, strict=False), 100):
        for _ in range(4):
            busy = torch.nn.functional.normalize(busy @ busy)  # work before which the copies must not be overwritten
        copies = [x.clone() for x in tensors(found)]
        assert found.copied is not None
        del found
        torch.full((4, 1024), -1, device=device)  # takes memory that was given away too early
        for here, there in zip(copies, tensors(expected), strict=True):
            assert torch.equal(here.cpu(), there)
    received.close()
