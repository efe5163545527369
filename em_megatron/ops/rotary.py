"""Rotary position embedding by halves, with positions that count inside a block (0 … L−1)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    with torch.inference_mode(False):  # tables made in an evaluation must still serve training
        return _tables(length, head_dim, base, dtype, device)


def _tables(length: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i+d/2}); x [..., d], cos and sin broadcastable to [..., d/2]."""
    out: Tensor = Rotation.apply(x, cos, sin)
    return out


class Rotation(torch.autograd.Function):
    """Two passes over the data, and as many back; keeps nothing but the tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (first, second), (out_first, out_second) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=direction)
    return out
