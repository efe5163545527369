"""The loss: a sum over tokens and their count, both taken over all ranks before anything is divided."""

from __future__ import annotations

import torch
from torch import Tensor


def loss_function(loss_mask: Tensor, token_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What Megatron's schedules expect with `calculate_per_token_loss`.

    Args:
        loss_mask: [b, T] of this rank, 1 on tokens that count.
        token_losses: [b, T] negative log-likelihoods in nats.

    Returns:
        (sum over counted tokens, their number as int, [sum, number] detached in fp64 for the log).
    """
    total = (token_losses.float() * loss_mask).sum()
    count = loss_mask.sum()
    return total, count.int(), torch.stack([total.detach().double(), count.double()])


def token_loss_function(token_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Validation: keeps the loss of every token, [b, T]."""
    return token_losses.sum(), torch.ones((), dtype=torch.int, device=token_losses.device), token_losses.detach()


def sum_over_world(values: Tensor, contributes: bool) -> Tensor:
    """Sum over the ranks that contribute, known to all ranks afterwards. One contributor per data- and context-parallel
    rank: the first tensor rank of the last pipeline stage."""
    values = values if contributes else torch.zeros_like(values)
    torch.distributed.all_reduce(values)
    return values
