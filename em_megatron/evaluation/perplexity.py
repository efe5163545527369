"""Held-out loss, perplexity and bits per byte, overall and by position in the context.

A document longer than a sample is cut, and the memory of each piece starts empty: the position counts from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from em_megatron.config import RunConfig
from em_megatron.data.stream import TokenStream, collate
from em_megatron.parallel.process_groups import Layout
from em_megatron.training.loss import sum_over_world
from em_megatron.training.metrics import perplexity
from em_megatron.training.microbatch import MicroBatch
from em_megatron.training.step import is_reporting_rank, run_schedule, token_loss_step

POSITION_BINS_PER_BLOCK = 2


class PositionTally:
    """Sums of loss, tokens and text bytes in bins of the position in the context."""

    def __init__(self, bins: int, bin_width: int, token_bytes: Tensor) -> None:
        self.bin_width, self.token_bytes = bin_width, token_bytes
        self.sums = torch.zeros(3, bins, dtype=torch.float64, device=token_bytes.device)

    def add(self, batch: MicroBatch, losses: Tensor) -> None:
        """batch and losses [b, T] in nats."""
        at = (batch.positions // self.bin_width).flatten().long()
        losses = losses.double().flatten()
        values = torch.stack([losses, torch.ones_like(losses), self.token_bytes[batch.labels].flatten()])
        self.sums.scatter_add_(1, at.expand(3, -1), values * batch.loss_mask.double().flatten())


def summarise(sums: Tensor, bin_width: int) -> dict[str, Any]:
    """loss (nats per token), perplexity, bits_per_byte, tokens, bytes, and the same loss per bin of positions."""
    total, tokens, text_bytes = sums.sum(1).tolist()
    positions = [
        {
            "start": index * bin_width,
            "stop": (index + 1) * bin_width,
            "loss": loss / count,
            "perplexity": perplexity(loss / count),
            "tokens": int(count),
        }
        for index, (loss, count, _) in enumerate(sums.T.tolist())
        if count
    ]
    return {
        "loss": total / tokens,
        "perplexity": perplexity(total / tokens),
        "bits_per_byte": total / math.log(2) / text_bytes,
        "tokens": int(tokens),
        "bytes": int(text_bytes),
        "positions": positions,
    }


def evaluate(
    config: RunConfig,
    layout: Layout,
    model: list[torch.nn.Module],
    stream: TokenStream,
    token_bytes: Tensor,
    max_samples: int = 0,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """One pass over the held-out samples, each read once by one data-parallel rank.

    Args:
        config: the run.
        layout: where this rank stands.
        model: this rank's chunks.
        stream: the held-out split.
        token_bytes: [vocab] text bytes per token id.
        max_samples: read only so many, evenly spread; 0 reads all.
        interrupted: asked before every round of batches, by all ranks together, who are told alike.

    Returns:
        What `summarise` gives, over all ranks, on every rank; None where it was interrupted.
    """
    device = next(model[0].parameters()).device
    width = max(1, config.memory.block_length // POSITION_BINS_PER_BLOCK)
    tally = PositionTally(-(-config.data.sequence_length // width), width, token_bytes.to(device, torch.float64))
    was_training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    whole = True
    with torch.no_grad():
        for group in _my_batches(stream, max_samples, layout, config, device):
            if interrupted():
                whole = False
                break
            if group is None:
                continue
            size, feeds = group[0].tokens.shape[0], [iter(group) for _ in model]
            found = run_schedule(token_loss_step, feeds, model, config, len(group), size, forward_only=True)
            for batch, losses in zip(group, found, strict=False):  # nothing is found before the last pipeline stage
                tally.add(batch, losses)
    for chunk, training in zip(model, was_training, strict=True):
        chunk.train(training)
    if not whole:
        return None
    return summarise(sum_over_world(tally.sums, is_reporting_rank(layout)), width)


def _my_batches(
    stream: TokenStream, max_samples: int, layout: Layout, config: RunConfig, device: torch.device
) -> Iterator[list[MicroBatch] | None]:
    """This data-parallel rank's micro-batches, as many at a time as a schedule takes: one, or, interleaved, one for
    each pipeline stage, the last of them filled up with samples whose tokens do not count.

    Every rank has as many rounds; None where others have a sample more.
    """
    rows, together = config.training.micro_batch_size, layout.pp_size if layout.vpp_size else 1
    mine = stream.validation_samples(max_samples, layout.dp_rank, layout.dp_size)
    most = -(-stream.num_validation_samples(max_samples) // layout.dp_size)
    for _ in range(-(-most // (rows * together))):
        group = list(islice(mine, rows * together))
        if not group:
            yield None
            continue
        if together > 1:
            idle = {**group[-1], "loss_mask": np.zeros_like(group[-1]["loss_mask"])}
            group += [idle] * (rows * together - len(group))
        yield [
            MicroBatch.from_batch(
                collate(group[first : first + rows]), config.memory.block_length, device, layout.cp_rank, layout.cp_size
            )
            for first in range(0, len(group), rows)
        ]
