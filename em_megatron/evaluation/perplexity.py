"""Held-out loss, perplexity and bits per byte, overall and by position in the context.

A document longer than a sample is cut, and the memory of each piece starts empty: the position counts from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from em_megatron.config import RunConfig
from em_megatron.data.stream import TokenStream
from em_megatron.evaluation.scoring import num_rounds, scored_rounds
from em_megatron.parallel.process_groups import Layout
from em_megatron.training.loss import sum_over_world
from em_megatron.training.metrics import perplexity
from em_megatron.training.step import is_reporting_rank

POSITION_BINS_PER_BLOCK = 2


class PositionTally:
    """Sums of loss, tokens and text bytes in bins of the position in the context."""

    def __init__(self, bins: int, bin_width: int, token_bytes: Tensor) -> None:
        self.bin_width, self.token_bytes = bin_width, token_bytes
        self.sums = torch.zeros(3, bins, dtype=torch.float64, device=token_bytes.device)

    def add(self, positions: Tensor, labels: Tensor, losses: Tensor, loss_mask: Tensor) -> None:
        """All of one shape; losses in nats, positions in the document's piece."""
        at = (positions // self.bin_width).flatten().long()
        losses = losses.double().flatten()
        values = torch.stack([losses, torch.ones_like(losses), self.token_bytes[labels].flatten()])
        self.sums.scatter_add_(1, at.expand(3, -1), values * loss_mask.double().flatten())


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


def combined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summary of several corpora's tokens together, from the summary of each (`summarise`)."""
    bins = sorted({(row["start"], row["stop"]) for part in parts for row in part["positions"]})
    width = bins[0][1] - bins[0][0]
    sums = torch.zeros(3, bins[-1][1] // width, dtype=torch.float64)
    for part in parts:
        for row in part["positions"]:
            sums[:2, row["start"] // width] += torch.tensor([row["loss"] * row["tokens"], row["tokens"]])
        sums[2, 0] += part["bytes"]
    return summarise(sums, width)


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
    samples = stream.validation_samples(max_samples, layout.dp_rank, layout.dp_size)
    most = -(-stream.num_validation_samples(max_samples) // layout.dp_size)
    rounds = scored_rounds(config, layout, model, samples, most)
    for _ in range(num_rounds(config, layout, most)):
        if interrupted():
            whole = False
            break
        for batch, losses in next(rounds):
            tally.add(batch.positions, batch.labels, losses, batch.loss_mask)
    for chunk, training in zip(model, was_training, strict=True):
        chunk.train(training)
    if not whole:
        return None
    return summarise(sum_over_world(tally.sums, is_reporting_rank(layout)), width)
