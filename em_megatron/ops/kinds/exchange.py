"""Tokens and states of other context-parallel ranks, for kinds that keep them as they are.

Every function is called by all ranks of the group for every layer and micro-batch, whatever their documents, and each
rank's result depends on what it got, so that all take part in the way back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 gave the collective another name and warns of the old one.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


class Gather(torch.autograd.Function):
    """x of every rank, [ranks, *x.shape]; backward: the sum over ranks of the gradients by what this rank gave."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        everyone = x.new_empty(group.size(), *x.shape)
        _all_gather(everyone.flatten(0, 1) if x.dim() else everyone, x.contiguous(), group=group)
        return everyone

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)  # others may hold it too
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.group.rank()], None


def gather(x: Tensor, group: Any) -> Tensor:
    """[ranks, *x.shape], differentiable; without other ranks a view."""
    if group is None or group.size() == 1:
        return x[None]
    out: Tensor = Gather.apply(x, group)
    return out


def whole_sample(x: Tensor, group: Any) -> Tensor:
    """The tokens of all ranks, [T_local, …] → [T, …], differentiable."""
    return gather(x, group).flatten(0, 1)


@torch.no_grad()
def last_block_from_the_left(x: Tensor, block_length: int, group: Any) -> Tensor:
    """The last block [L, …] of the rank before this one, detached; zeros on the first rank."""
    block = x[-block_length:].contiguous()
    found = torch.zeros_like(block)
    if group is None or group.size() == 1:
        return found
    rank, size, waiting = group.rank(), group.size(), []
    if rank + 1 < size:
        waiting.append(dist.P2POp(dist.isend, block, group=group, group_peer=rank + 1))
    if rank:
        waiting.append(dist.P2POp(dist.irecv, found, group=group, group_peer=rank - 1))
    for work in dist.batch_isend_irecv(waiting):
        work.wait()
    return found
