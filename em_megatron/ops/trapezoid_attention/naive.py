"""Trapezoidal attention, one query at a time: the truth the fast path is compared with.

Legend: T tokens, L block length, S slots, b samples, hq query heads, hk KV heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.rotary import rotate


def trapezoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read_slots: Callable[[], tuple[Tensor, Tensor]] | None,
    layout: BlockLayout,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """softmax([Q Kmemᵀ | RoPE(Q) RoPE(K)ᵀ + causal] / √d) [Vmem; V], query by query; shapes: public function."""
    length, (tokens, rows, heads, dim) = layout.block_length, query.shape
    group = heads // key.shape[2]
    slots = read_slots() if read_slots is not None else None
    out = torch.empty_like(query)
    for t in range(tokens):
        block, position = divmod(t, length)
        first = block * length
        for row in range(rows):
            for head in range(heads):
                kv = head // group
                own = [s for s in range(first, t + 1) if layout.segment_ids[row, s] == layout.segment_ids[row, t]]
                at = torch.tensor([s - first for s in own])
                q = rotate(query[t, row, head], cos[position], sin[position])
                scores = rotate(key[own, row, kv], cos[at], sin[at]) @ q
                values = value[own, row, kv]
                if slots is not None and layout.memory_tokens[row, t]:
                    scores = torch.cat([slots[0][block, :, row, kv] @ query[t, row, head], scores])
                    values = torch.cat([slots[1][block, :, row, kv], values])
                out[t, row, head] = torch.softmax(scores / dim**0.5, 0) @ values
    return out
