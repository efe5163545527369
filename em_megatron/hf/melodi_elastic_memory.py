"""Melodi (arXiv 2410.03156): the mathematics of one window of one layer. This file travels with the weights.

A window is W tokens x and, once it is full, U summary tokens u behind them. Short-term tokens m come from the window
before, long-term tokens Z from all windows of the last G / L_inc.

Legend: g rows of the batch that stand at the same place, hq query and hk key/value heads, n tokens at hand, d head
dimension, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .kinds_elastic_memory import causal_attention, grouped_scores, weighted


@dataclass(frozen=True)
class WindowMemory:
    """What a layer keeps between calls; every tensor is replaced, never changed.

    tokens: read so far. keys, values: of the window at hand, unrotated, [g, hk, filled, d]. outputs: of the layer for
    them, [g, filled, D]. short: short-term tokens [g, S, D]; short_keys, short_values: theirs, [g, hk, S, d], worked out
    once for all tokens of the next window. long_keys, long_values: [g, hk, ≤ G, d].
    """

    tokens: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None
    outputs: Tensor | None = None
    short: Tensor | None = None
    short_keys: Tensor | None = None
    short_values: Tensor | None = None
    long_keys: Tensor | None = None
    long_values: Tensor | None = None

    def with_window(self, key: Tensor, value: Tensor) -> WindowMemory:
        """With the keys and values of n more tokens of the window, [g, hk, n, d]."""
        return replace(self, keys=joined(self.keys, key, 2), values=joined(self.values, value, 2))

    def with_outputs(self, outputs: Tensor, tokens: int) -> WindowMemory:
        """With the layer's outputs [g, n, D] for them, of which so many are tokens of the text."""
        return replace(self, outputs=joined(self.outputs, outputs, 1), tokens=self.tokens + tokens)

    def with_long(self, key: Tensor, value: Tensor, most: int) -> WindowMemory:
        """With L_inc more long-term tokens, at most `most` of them kept."""
        keys, values = joined(self.long_keys, key, 2), joined(self.long_values, value, 2)
        return replace(self, long_keys=keys[:, :, -most:], long_values=values[:, :, -most:])

    def next_window(self, short: Tensor, key: Tensor, value: Tensor) -> WindowMemory:
        """At a window's end: the short-term tokens, and their keys and values."""
        return replace(self, keys=None, values=None, outputs=None, short=short, short_keys=key, short_values=value)

    @property
    def short_pair(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the short-term tokens; None in a document's first window."""
        if self.short_keys is None or self.short_values is None:
            return None
        return self.short_keys, self.short_values


def joined(before: Tensor | None, new: Tensor, dim: int) -> Tensor:
    """`new` after what is there, if anything is."""
    return new if before is None else torch.cat([before, new], dim)


def window_attention(
    query: Tensor, memory: WindowMemory, short: tuple[Tensor, Tensor] | None, gate: Tensor | None, rope_theta: float
) -> Tensor:
    """Causal attention of the window's last n tokens over [m; window], mixed with that over the long-term tokens.

    Args:
        query: [g, hq, n, d], unrotated.
        memory: the window up to and with these tokens, and the long-term tokens.
        short: keys and values of the short-term tokens, [g, hk, S, d], None in a document's first window.
        gate: [hq·d] of a long-term layer, else None.
        rope_theta: base of the rotary frequencies, which turn [m; window].

    Returns:
        [g, hq, n, d].
    """
    keys, values = memory.keys, memory.values
    assert keys is not None
    assert values is not None
    if short is not None:
        keys, values = torch.cat([short[0], keys], 2), torch.cat([short[1], values], 2)
    out = causal_attention(query, keys, values, rope_theta)
    if gate is None or memory.long_keys is None or memory.long_values is None:
        return out
    logits = grouped_scores(query, memory.long_keys) * query.shape[-1] ** -0.5
    return mixed(out, weighted(logits, memory.long_values), gate)


def mixed(own: Tensor, long: Tensor, gate: Tensor) -> Tensor:
    """σ(g) · own + (1 − σ(g)) · long, both [g, hq, n, d], gate [hq·d]."""
    share = torch.sigmoid(gate.view(own.shape[1], 1, own.shape[3]).to(torch.promote_types(gate.dtype, torch.float32)))
    return torch.lerp(long, own, share.to(own.dtype))


def mix_tokens(normed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map over the token axis: normed [g, W+U, D], weight [k, W+U], bias [k] → [g, k, D]."""
    return weight @ normed + bias[:, None]
