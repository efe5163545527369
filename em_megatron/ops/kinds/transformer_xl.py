"""Transformer-XL (arXiv 1901.02860): each block also attends to the block before it, whose keys and values are detached."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.kinds.exchange import last_block_from_the_left
from em_megatron.ops.kinds.reading import Reading, causal_attention, pick, put, readers, rotated, where_read


def previous_block_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, reading: Reading, weights: Mapping[str, Tensor]
) -> Tensor:
    """Causal attention to the block before and the block itself, rotary positions 0 … 2L − 1: [T, b, hq, d]."""
    before_key, before_value = _before(key, layout, reading), _before(value, layout, reading)
    local = reading.local(query, key, value, layout)
    if not readers(layout):
        return local
    base = reading.rotary_base
    keys = torch.cat([pick(before_key, layout), pick(key, layout)], 2)
    values = torch.cat([pick(before_value, layout), pick(value, layout)], 2)
    queries = rotated(pick(query, layout), layout.block_length, base)
    read = causal_attention(queries, rotated(keys, 0, base), values)
    return where_read(put(read, layout), local, layout)


def _before(x: Tensor, layout: BlockLayout, reading: Reading) -> Tensor:
    """Each block's place holds the block before it, detached, the first one that of the rank to the left."""
    x = x.detach()
    group = reading.group if layout.crosses_ranks else None
    return torch.cat([last_block_from_the_left(x, layout.block_length, group), x[: -layout.block_length]])
