"""Losses of every token, from a Megatron model on whatever ranks it is spread over."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from em_megatron.config import RunConfig
from em_megatron.data.stream import Sample, collate
from em_megatron.parallel.process_groups import Layout
from em_megatron.training.microbatch import MicroBatch
from em_megatron.training.step import is_reporting_rank, run_schedule, token_loss_step

Floats = NDArray[np.float64]


def num_rounds(config: RunConfig, layout: Layout, most: int) -> int:
    """Rounds of `scored_rounds` for so many samples of a rank."""
    return -(-most // (config.training.micro_batch_size * (layout.pp_size if layout.vpp_size else 1)))


def scored_rounds(
    config: RunConfig, layout: Layout, model: list[torch.nn.Module], samples: Iterator[Sample], most: int
) -> Iterator[list[tuple[MicroBatch, Tensor]]]:
    """Micro-batches of this data-parallel rank's samples with their losses [b, T_local] in nats, round after round.

    A round is what a schedule takes: one micro-batch, or, interleaved, one for each pipeline stage, the last of them
    filled up with samples whose tokens do not count. Every rank has as many rounds, an empty one where others have a
    sample more; ranks that are not of the last pipeline stage get no losses.

    most: the largest number of samples of a rank.
    """
    rows, together = config.training.micro_batch_size, layout.pp_size if layout.vpp_size else 1
    device = next(model[0].parameters()).device
    for _ in range(num_rounds(config, layout, most)):
        group = list(islice(samples, rows * together))
        if not group:
            yield []
            continue
        if together > 1:
            idle = {**group[-1], "loss_mask": np.zeros_like(group[-1]["loss_mask"])}
            group += [idle] * (rows * together - len(group))
        batches = [
            MicroBatch.from_batch(
                collate(group[first : first + rows]), config.memory.block_length, device, layout.cp_rank, layout.cp_size
            )
            for first in range(0, len(group), rows)
        ]
        feeds, size = [iter(batches) for _ in model], batches[0].tokens.shape[0]
        with torch.no_grad():
            found = run_schedule(token_loss_step, feeds, model, config, len(batches), size, forward_only=True)
        yield list(zip(batches, found, strict=False))  # nothing is found before the last pipeline stage


def text_sample(ids: Sequence[int], length: int, pad_id: int) -> Sample:
    """One text alone in a sample of `length` tokens, its memory empty at the begin."""
    count = len(ids) - 1
    sample: Sample = {
        "tokens": np.full(length, pad_id, dtype=np.int64),
        "labels": np.full(length, pad_id, dtype=np.int64),
        "loss_mask": np.zeros(length, dtype=np.float32),
        "segment_ids": np.zeros(length, dtype=np.int32),
        "positions": np.zeros(length, dtype=np.int32),
        "history": np.array(0, dtype=np.int64),
        "continues": np.array(False),
        "slot": np.array(0, dtype=np.int64),
    }
    sample["tokens"][:count], sample["labels"][:count] = ids[:-1], ids[1:]
    sample["loss_mask"][:count], sample["segment_ids"][:count] = 1, 1
    sample["positions"][:count] = np.arange(count)
    return sample


def text_losses(
    config: RunConfig, layout: Layout, model: list[torch.nn.Module], texts: Sequence[Sequence[int]], pad_id: int
) -> list[Floats]:
    """Losses [len - 1] in nats of the ids of each text but its first, each read with an empty memory; on every rank.

    Texts of equal padded length go together; data-parallel ranks share them.
    """
    shares = layout.tp_size if config.parallel.sequence_parallel else 1
    unit = math.lcm(config.memory.block_length, shares) * layout.cp_size
    lengths = [-(-(len(ids) - 1) // unit) * unit for ids in texts]
    found: dict[tuple[int, int], Floats] = {}
    for length in sorted(set(lengths) - {0}):
        chosen = [index for index, other in enumerate(lengths) if other == length]
        mine = chosen[layout.dp_rank :: layout.dp_size]
        samples = (text_sample(texts[index], length, pad_id) for index in mine)
        sized = replace(config, data=replace(config.data, sequence_length=length))
        most = -(-len(chosen) // layout.dp_size)
        rows = [
            row.double().cpu().numpy()
            for scored in scored_rounds(sized, layout, model, samples, most)
            for _, losses in scored
            for row in losses
        ]
        for index, row in zip(mine, rows, strict=False):  # samples that fill up a round come last
            found[index, layout.cp_rank] = row
    gathered: list[dict[tuple[int, int], Floats]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, found if is_reporting_rank(layout) else {})
    parts = {key: row for rank in gathered for key, row in rank.items()}
    return [
        np.concatenate([parts[index, rank] for rank in range(layout.cp_size)])[: len(ids) - 1]
        if len(ids) > 1
        else np.zeros(0)
        for index, ids in enumerate(texts)
    ]
