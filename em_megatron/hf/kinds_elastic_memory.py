"""The systems that Elastic Memory is measured against, block after block: how they read and write what they keep.

This file travels with the weights; it needs torch alone. Decoding runs it, here and in `transformers`, and the training
path is compared with it.

Legend: g rows of the batch that stand at the same place, hq query and hk key/value heads, n tokens at hand, all of one
block, d head dimension, L block length, m tokens kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Kept = dict[str, Tensor]  # what a layer keeps of the text, by name, each [g, hk, …]
Weights = Mapping[str, Tensor]  # the kind's own parameters of a layer, by name
QUERIES_AT_ONCE = 512  # bounds the scores held in memory


class Steps:
    """Block-local attention; the other kinds add a memory. Nothing is changed in place: what is kept is given back.

    Args:
        block_length: L.
        rope_theta: base of the rotary frequencies.
        has_memory: whether this layer has the kind's memory; otherwise it is block-local.
        settings: those of the kind, by the names of its attributes.
    """

    def __init__(self, block_length: int, rope_theta: float, has_memory: bool, **settings: Any) -> None:
        self.block_length, self.rope_theta, self.has_memory = block_length, rope_theta, has_memory
        for name, value in settings.items():
            setattr(self, name, value)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, kept: Kept, tokens: int, weights: Weights
    ) -> tuple[Tensor, Kept]:
        """Takes n tokens that fit the block at hand.

        Args:
            query: [g, hq, n, d], unrotated, and key, value [g, hk, n, d].
            kept: what was kept up to here; empty at a document's start.
            tokens: read before these.
            weights: the layer's own parameters of the kind.

        Returns:
            (output [g, hq, n, d], what is kept now).
        """
        first = tokens % self.block_length
        if first:
            key, value = torch.cat([kept["keys"], key], 2), torch.cat([kept["values"], value], 2)
        past = {name: x for name, x in kept.items() if name not in ("keys", "values")}
        parts, last = [], first
        for part in query.split(QUERIES_AT_ONCE, 2):
            last += part.shape[2]
            own = key[:, :, :last], value[:, :, :last]
            if self.has_memory and tokens >= self.block_length:
                parts.append(self.read(part, *own, past, tokens - first, weights))
            else:
                parts.append(self.local(part, *own))
        out = torch.cat(parts, 2)
        if key.shape[2] < self.block_length:
            return out, {**past, "keys": key, "values": value}
        return out, self.close(past, key, value, tokens - first) if self.has_memory else {}

    def local(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of the last n tokens of the block to the block, rotary positions from 0."""
        return causal_attention(query, key, value, self.rope_theta)

    def read(self, query: Tensor, key: Tensor, value: Tensor, past: Kept, history: int, weights: Weights) -> Tensor:
        """Output where there is a history of so many tokens; key and value of the block up to now."""
        return self.local(query, key, value)

    def close(self, past: Kept, key: Tensor, value: Tensor, history: int) -> Kept:
        """What is kept after a block, whose keys and values [g, hk, L, d] are these, with `history` tokens before it."""
        return {}


class Full(Steps):
    """Causal attention to all of the text. Keys are kept unrotated and turned at each use."""

    def read(self, query: Tensor, key: Tensor, value: Tensor, past: Kept, history: int, weights: Weights) -> Tensor:
        keys, values = torch.cat([past["past_keys"], key], 2), torch.cat([past["past_values"], value], 2)
        return causal_attention(query, keys, values, self.rope_theta)

    def close(self, past: Kept, key: Tensor, value: Tensor, history: int) -> Kept:
        if not history:
            return {"past_keys": key, "past_values": value}
        pairs = (("past_keys", key), ("past_values", value))
        return {name: torch.cat([past[name], x], 2) for name, x in pairs}


class TransformerXL(Steps):
    """Causal attention to the block and the one before it, detached; rotary positions 0 … 2L − 1."""

    def read(self, query: Tensor, key: Tensor, value: Tensor, past: Kept, history: int, weights: Weights) -> Tensor:
        keys, values = torch.cat([past["past_keys"], key], 2), torch.cat([past["past_values"], value], 2)
        return causal_attention(query, keys, values, self.rope_theta)

    def close(self, past: Kept, key: Tensor, value: Tensor, history: int) -> Kept:
        return {"past_keys": key.detach(), "past_values": value.detach()}


class Subsample(Full):
    """One softmax over the block and S raw keys and values of the history, which carry no position, as slots do."""

    points: Sequence[float]
    detach: bool = False

    def read(self, query: Tensor, key: Tensor, value: Tensor, past: Kept, history: int, weights: Weights) -> Tensor:
        at = sampled_tokens(self.points, history).to(key.device)
        slot_keys, slot_values = (past[name].index_select(2, at) for name in ("past_keys", "past_values"))
        block = scores(query, key, self.rope_theta)
        both = torch.cat([grouped_scores(query, slot_keys), block], -1)
        return weighted(both * query.shape[-1] ** -0.5, torch.cat([slot_values, value], 2))

    def close(self, past: Kept, key: Tensor, value: Tensor, history: int) -> Kept:
        return super().close(past, *((key.detach(), value.detach()) if self.detach else (key, value)), history)


class Infini(Steps):
    """A matrix of associations M [g, hk, d, d] and its normalizer z [g, hk, d], read through φ = ELU + 1 before RoPE
    (arXiv 2404.07143), mixed with the block's own attention by one gate per query head."""

    update: str = "linear"
    detach: bool = False

    def read(self, query: Tensor, key: Tensor, value: Tensor, past: Kept, history: int, weights: Weights) -> Tensor:
        read = associations(query, past["matrix"], past["normalizer"])
        return gated(read, self.local(query, key, value), weights["gate"])

    def close(self, past: Kept, key: Tensor, value: Tensor, history: int) -> Kept:
        if self.detach:
            key, value = key.detach(), value.detach()
        matrix, normalizer = association_update(key, value, self.update, past.get("matrix"), past.get("normalizer"))
        return {"matrix": matrix, "normalizer": normalizer}


class Memorizing(Steps):
    """A FIFO of the last `pairs` keys, normalised and before RoPE, and values of the text, detached (arXiv 2203.08913);
    a query reads all of them, or its `top_k` best, and one gate per head mixes that with the block's own attention."""

    pairs: int
    top_k: int = 0

    def read(self, query: Tensor, key: Tensor, value: Tensor, past: Kept, history: int, weights: Weights) -> Tensor:
        turned = normalised(query) * weights["scale"].to(query.dtype)[:, None, None]
        keys, values = (past[name][:, :, -self.pairs :] for name in ("past_keys", "past_values"))  # may be fewer now
        read = best_pairs(turned, keys, values, self.top_k)
        return gated(read, self.local(query, key, value), weights["gate"])

    def close(self, past: Kept, key: Tensor, value: Tensor, history: int) -> Kept:
        new = {"past_keys": normalised(key.detach()), "past_values": value.detach()}
        if history:
            new = {name: torch.cat([past[name], x], 2) for name, x in new.items()}
        return {name: x[:, :, -self.pairs :] for name, x in new.items()}


def gated(read: Tensor, local: Tensor, gate: Tensor) -> Tensor:
    """σ(gate) · read + (1 − σ(gate)) · local, gate [hq] over [g, hq, n, d]."""
    share = torch.sigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))[:, None, None]
    return torch.lerp(local, read.to(local.dtype), share.to(local.dtype))


def positive(x: Tensor) -> Tensor:
    """φ = ELU + 1, in fp32 or better."""
    return torch.nn.functional.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1


def associations(query: Tensor, matrix: Tensor, normalizer: Tensor) -> Tensor:
    """φ(Q) M / (φ(Q) z): query [g, hq, n, d], M [g, hk, d, d], z [g, hk, d] → [g, hq, n, d] in fp32 or better."""
    found = positive(query).unflatten(1, (matrix.shape[1], -1))
    with torch.autocast(query.device.type, enabled=False):
        read = (found @ matrix[:, :, None]) / (found @ normalizer[:, :, None, :, None])
    return read.flatten(1, 2)


def association_update(
    key: Tensor, value: Tensor, update: str, matrix: Tensor | None, normalizer: Tensor | None
) -> tuple[Tensor, Tensor]:
    """M ← M + φ(K)ᵀ V, or M + φ(K)ᵀ (V − φ(K) M / (φ(K) z)) with the delta rule; z ← z + Σ φ(K).

    key, value [g, hk, L, d]; M [g, hk, d, d] and z [g, hk, d], None in a document's first block.
    """
    found = positive(key)
    value, total = value.to(found.dtype), found.sum(2)
    with torch.autocast(key.device.type, enabled=False):  # a late block adds less than bf16 can tell from nothing
        if matrix is None or normalizer is None:
            return found.transpose(-1, -2) @ value, total
        if update == "delta":
            value = value - (found @ matrix) / (found @ normalizer[..., None])
        return matrix + found.transpose(-1, -2) @ value, normalizer + total


def normalised(x: Tensor) -> Tensor:
    """x / √(Σ x² + 1e-6) over the head dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def best_pairs(query: Tensor, keys: Tensor, values: Tensor, top_k: int) -> Tensor:
    """softmax(Q Kᵀ) V over the `top_k` best of m pairs for each query, over all of them for 0: [g, hq, n, d].

    query [g, hq, n, d] is scaled already; keys and values [g, hk, m, d] have no gradient.
    """
    if not 0 < top_k < keys.shape[2]:
        return weighted(grouped_scores(query, keys), values)
    with torch.no_grad():
        best = grouped_scores(query, keys).topk(top_k, -1).indices  # [g, hq, n, k]
    group = query.shape[1] // keys.shape[1]
    at = best.flatten(2)[..., None].expand(-1, -1, -1, query.shape[-1])
    chosen_keys, chosen_values = (
        x.repeat_interleave(group, 1).gather(2, at).unflatten(2, best.shape[2:]) for x in (keys, values)
    )
    logits = (query[..., None, :] * chosen_keys).sum(-1)
    shares = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(values.dtype)
    return (shares[..., None] * chosen_values).sum(-2)


def sampled_tokens(points: Sequence[float], history: int) -> Tensor:
    """Which of `history` tokens hold the moments u in (0, 1): [S] int64, ⌊u · history⌋."""
    moments = torch.tensor(list(points), dtype=torch.float64, device="cpu")
    return (moments * history).floor().long().clamp(max=history - 1)


def rotated(x: Tensor, first: int, base: float) -> Tensor:
    """Turns the pairs (x_i, x_{i+d/2}) of x [..., n, d], which stand at positions first … first + n − 1."""
    stop = first + x.shape[-2]
    tables = _tables(1 << max(0, stop - 1).bit_length(), x.shape[-1], base, x.dtype, x.device)
    cos, sin = (table[first:stop] for table in tables)
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


@lru_cache(maxsize=16)
def _tables(length: int, dim: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position · base^(−2i/d), each [length, d/2], fit for training whatever the mode of the caller."""
    exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    with torch.inference_mode(False), torch.no_grad():
        frequency = base ** (-torch.arange(0, dim, 2, **exact) / dim)
        angle = torch.arange(length, **exact)[:, None] * frequency
        return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def grouped_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Products of query heads with their key head: [g, hq, n, m]."""
    groups = query.unflatten(1, (keys.shape[1], -1))
    return (groups @ keys[:, :, None].transpose(-1, -2)).flatten(1, 2)


def scores(query: Tensor, keys: Tensor, base: float) -> Tensor:
    """Rotated products [g, hq, n, m] of the last n of m tokens with all up to themselves, −∞ beyond; not scaled."""
    tokens, count = query.shape[2], keys.shape[2]
    found = grouped_scores(rotated(query, count - tokens, base), rotated(keys, 0, base))
    if tokens == 1:
        return found
    future = torch.ones(tokens, count, dtype=torch.bool, device=query.device).triu(count - tokens + 1)
    return found.masked_fill(future, float("-inf"))


def weighted(logits: Tensor, values: Tensor) -> Tensor:
    """softmax(logits [g, hq, n, m]) values [g, hk, m, d], the softmax in fp32 or better: [g, hq, n, d]."""
    shares = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(values.dtype)
    return (shares.unflatten(1, (values.shape[1], -1)) @ values[:, :, None]).flatten(1, 2)


def causal_attention(query: Tensor, keys: Tensor, values: Tensor, base: float) -> Tensor:
    """Attention of the last n of m tokens to all up to themselves, rotary positions from 0: [g, hq, n, d]."""
    return weighted(scores(query, keys, base) * query.shape[-1] ** -0.5, values)


STEPS: dict[str, Callable[..., Steps]] = {
    "block_local": Steps,
    "full": Full,
    "transformer_xl": TransformerXL,
    "subsample": Subsample,
    "infini": Infini,
    "memorizing": Memorizing,
}
# The kind's own parameters of a layer: name → initial value; one number per query head each.
PARAMETERS: dict[str, dict[str, float]] = {"infini": {"gate": 0.0}, "memorizing": {"gate": 0.0, "scale": 1.0}}
