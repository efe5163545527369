"""The other memory kinds for one document, one query after another: the truth that the operators are compared with.

Every function takes query [T, hq, d] and key, value [T, hk, d] of one document that begins at a block boundary, all
unrotated, and gives [T, hq, d]. T may end within a block. Query head j reads KV head j // (hq / hk).

Legend: L block length, `first` the first token of a query's block: its history is tokens 0 … first − 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from em_megatron.ops.rotary import rotary_tables, rotate

Read = Callable[[int, int, int], Tensor]  # (token, head, first token of its block) → [d]


def full(query: Tensor, key: Tensor, value: Tensor, length: int, base: float) -> Tensor:
    """softmax(RoPE(q_t) RoPE(K_{≤t})ᵀ / √d) V_{≤t}."""
    return _each(query, length, lambda t, head, first: _causal(query, key, value, t, head, 0, base))


def transformer_xl(query: Tensor, key: Tensor, value: Tensor, length: int, base: float) -> Tensor:
    """The same over the own block and the one before, which has no gradient."""

    def read(t: int, head: int, first: int) -> Tensor:
        start = max(0, first - length)
        keys = torch.cat([key[:start], key[start:first].detach(), key[first:]])
        values = torch.cat([value[:start], value[start:first].detach(), value[first:]])
        return _causal(query, keys, values, t, head, start, base)

    return _each(query, length, read)


def subsample(query: Tensor, key: Tensor, value: Tensor, length: int, base: float, points: Sequence[float]) -> Tensor:
    """One softmax over tokens ⌊u · first⌋, without positions, and the own block."""

    def read(t: int, head: int, first: int) -> Tensor:
        kv = head // (query.shape[1] // key.shape[1])
        at = [int(point * first) for point in points] if first else []
        logits, values = _logits(query, key, t, head, first, base), value[first : t + 1, kv]
        logits = torch.cat([key[at, kv] @ query[t, head], logits])
        return torch.softmax(logits / query.shape[2] ** 0.5, 0) @ torch.cat([value[at, kv], values])

    return _each(query, length, read)


def infini(
    query: Tensor, key: Tensor, value: Tensor, length: int, base: float, gate: Tensor, delta: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """σ(β) φ(q) M / (φ(q) z) + (1 − σ(β)) A_local; and M [hk, d, d], z [hk, d] after each whole block."""
    phi: Callable[[Tensor], Tensor] = lambda x: torch.where(x > 0, x + 1, x.exp())  # noqa: E731
    heads, dim = key.shape[1:]
    states = []
    matrix, normalizer = key.new_zeros(heads, dim, dim), key.new_zeros(heads, dim)
    for start in range(0, key.shape[0] - length + 1, length):
        matrices, normalizers = [], []
        for head in range(heads):
            k, v = phi(key[start : start + length, head]), value[start : start + length, head]
            if delta and start:
                v = v - (k @ matrix[head]) / (k @ normalizer[head])[:, None]
            matrices.append(matrix[head] + sum(torch.outer(k[i], v[i]) for i in range(length)))
            normalizers.append(normalizer[head] + k.sum(0))
        matrix, normalizer = torch.stack(matrices), torch.stack(normalizers)
        states.append((matrix, normalizer))

    def read(t: int, head: int, first: int) -> Tensor:
        local = _causal(query, key, value, t, head, first, base)
        if not first:
            return local
        kv, (m, z) = head // (query.shape[1] // heads), states[first // length - 1]
        q = phi(query[t, head])
        share = torch.sigmoid(gate[head])
        return share * (q @ m[kv]) / (q @ z[kv]) + (1 - share) * local

    return _each(query, length, read), states


def memorizing(
    query: Tensor, key: Tensor, value: Tensor, length: int, base: float, gate: Tensor, scale: Tensor, pairs: int, top_k: int
) -> Tensor:  # fmt: skip
    """σ(b) softmax(scale · q̂ K̂ᵀ) V + (1 − σ(b)) A_local over the last `pairs` of the history, or the best `top_k`."""

    def unit(x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).sum() + 1e-6)

    def read(t: int, head: int, first: int) -> Tensor:
        local = _causal(query, key, value, t, head, first, base)
        if not first:
            return local
        kv = head // (query.shape[1] // key.shape[1])
        kept = range(max(0, first - pairs), first)
        logits = torch.stack([scale[head] * unit(query[t, head]) @ unit(key[s, kv].detach()) for s in kept])
        best = logits.argsort(descending=True)[: top_k or len(kept)]
        found = torch.softmax(logits[best], 0) @ value[kept.start : first, kv].detach()[best]
        share = torch.sigmoid(gate[head])
        return share * found + (1 - share) * local

    return _each(query, length, read)


def _each(query: Tensor, length: int, read: Read) -> Tensor:
    tokens, heads = query.shape[:2]
    rows = [torch.stack([read(t, head, t // length * length) for head in range(heads)]) for t in range(tokens)]
    return torch.stack(rows)


def _logits(query: Tensor, key: Tensor, t: int, head: int, start: int, base: float) -> Tensor:
    """RoPE(q_t) RoPE(k_s)ᵀ of tokens s = start … t, positions from `start`, not scaled."""
    kv = head // (query.shape[1] // key.shape[1])
    cos, sin = rotary_tables(t + 1 - start, query.shape[2], base, query.dtype, query.device)
    turned = rotate(query[t, head], cos[t - start], sin[t - start])
    return rotate(key[start : t + 1, kv], cos, sin) @ turned


def _causal(query: Tensor, key: Tensor, value: Tensor, t: int, head: int, start: int, base: float) -> Tensor:
    """Attention of query t to tokens start … t."""
    kv = head // (query.shape[1] // key.shape[1])
    logits = _logits(query, key, t, head, start, base) / query.shape[2] ** 0.5
    return torch.softmax(logits, 0) @ value[start : t + 1, kv]
