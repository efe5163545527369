"""Transformer-XL (arXiv 1901.02860): each block also attends to the block before it, whose keys and values are detached."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.kinds.exchange import last_block_from_the_left
from em_megatron.ops.kinds.reading import Reading, causal_attention, pick, put, readers, rotated


def previous_block_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, reading: Reading, weights: Mapping[str, Tensor]
) -> Tensor:
    """Causal attention to the block before and the block itself, rotary positions 0 … 2L − 1: [T, b, hq, d].

    Blocks without one before them, and short documents that share a block, attend to themselves.
    """
    before = _before(torch.cat([key, value], -1).detach(), layout, reading)
    if not readers(layout):
        return reading.local(query, key, value, layout)
    base, length = reading.rotary_base, layout.block_length
    earlier = pick(before, layout).chunk(2, -1)
    keys, values = (torch.cat([past, pick(x, layout)], 2) for past, x in zip(earlier, (key, value), strict=True))
    read = causal_attention(rotated(pick(query, layout), length, base), rotated(keys, 0, base), values)
    if layout.shared_blocks:
        local = reading.local(query, key, value, layout)
        return torch.where(layout.memory_tokens.T[..., None, None], put(read, layout), local)
    q, k, v = (pick(x, layout, reading=False) for x in (query, key, value))
    alone = causal_attention(rotated(q, 0, base), rotated(k, 0, base), v)
    return put(read, layout) + put(alone, layout, reading=False)


def _before(signal: Tensor, layout: BlockLayout, reading: Reading) -> Tensor:
    """Each block's place holds the block before it, the first one that of the rank to the left."""
    group = reading.group if layout.crosses_ranks else None
    return torch.cat([last_block_from_the_left(signal, layout.block_length, group), signal[: -layout.block_length]])
