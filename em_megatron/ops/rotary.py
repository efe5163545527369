"""Rotary position embedding by halves, with positions that count inside a block (0 … L−1)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def rotary_tables(
    length: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of position · base^(−2i/d), each [length, d/2], computed in fp64 (arXiv 2104.09864).

    Raises:
        ValueError: odd head dimension.
    """
    if head_dim % 2:
        raise ValueError(f"rotary embedding needs an even head dimension, not {head_dim}: change model.kv_channels")
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i+d/2}); x [..., d], cos and sin broadcastable to [..., d/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
