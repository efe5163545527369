"""How much of a signal N coefficients keep: Gaussian white noise and a smooth signal, against N / T, in fp64.

White noise has nothing to compress, so a memory of N numbers keeps a share of about N / T of its variance; of a smooth
signal almost all of it is kept (design, elastic_memory.md, section 2). This measures the memory alone, without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from em_megatron.hippo.legs import inject

SMOOTH_WAVES = 4


def kept_variance(signal: Tensor, order: int) -> float:
    """Share of the variance of signal [T, channels] that is explained by its N coefficients, fp64.

    The best piecewise constant reading of the projection: with J = inject(N, 0, T, T) [N, T], the values of the polynomial
    averaged over each token are T · Jᵀ C.
    """
    tokens = signal.shape[0]
    matrix = inject(order, 0, tokens, tokens)
    restored = tokens * matrix.T @ (matrix @ signal)
    return 1 - float((signal - restored).square().sum() / signal.square().sum())


def noise(tokens: Sequence[int], orders: Sequence[int], channels: int = 16, seed: int = 0) -> dict[str, Any]:
    """Rows {tokens, order, ratio N / T, white, smooth}: explained variance of white noise and of a smooth signal."""
    rows = []
    for count in tokens:
        generator = torch.Generator().manual_seed(seed)
        white = torch.randn(count, channels, dtype=torch.float64, generator=generator)
        at = torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
        phase = torch.rand(channels, dtype=torch.float64, generator=generator)
        smooth = torch.sin(2 * torch.pi * (SMOOTH_WAVES * at + phase))
        for order in orders:
            if order < count:
                rows.append(
                    {
                        "tokens": count,
                        "order": order,
                        "ratio": order / count,
                        "white": kept_variance(white, order),
                        "smooth": kept_variance(smooth, order),
                    }
                )
    return {"channels": channels, "seed": seed, "rows": rows}
