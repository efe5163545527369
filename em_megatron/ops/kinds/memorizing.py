"""Memorizing Transformer (arXiv 2203.08913): each block reads the last M keys and values before it, behind a gate.

Keys are normalised, before RoPE, and have no gradient, nor have values: gradients reach the queries, their scale and the
gate. Under context parallelism the keys and values of all ranks are gathered.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from em_megatron.hf.kinds_elastic_memory import best_pairs, normalised
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.kinds.exchange import whole_sample
from em_megatron.ops.kinds.reading import Reading, gated, pick, put, readers, untouched

QUERIES_AT_ONCE = 256  # that choose their best pairs: bounds the scores held in memory


def memorizing_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, reading: Reading, weights: Mapping[str, Tensor]
) -> Tensor:
    """σ(b) softmax(scale · q̂ K̂ᵀ) V + (1 − σ(b)) V_local where there is a history, V_local elsewhere: [T, b, hq, d]."""
    local = reading.local(query, key, value, layout)
    keys, values, before = normalised(key.detach()), value.detach(), 0
    if layout.crosses_ranks:
        keys, values = whole_sample(keys, reading.group), whole_sample(values, reading.group)
        before = layout.sequence_rank * layout.num_blocks
    if not readers(layout):
        return untouched(local, weights)
    queries = normalised(pick(query, layout)) * weights["scale"].to(query.dtype)[:, None, None]
    found = []
    for reader, turned in zip(readers(layout), queries.split(1), strict=True):
        last = (before + reader.block) * layout.block_length
        first = last - min(reader.history * layout.block_length, reading.memory.pairs)
        kept = [x[first:last, reader.row].transpose(0, 1)[None] for x in (keys, values)]
        found.append(_read(turned, kept[0], kept[1], reading.memory.top_k))
    return gated(put(torch.cat(found), layout), local, weights["gate"], layout)


def _read(query: Tensor, keys: Tensor, values: Tensor, top_k: int) -> Tensor:
    """[1, hq, L, d] of queries [1, hq, L, d] and m pairs [1, hk, m, d]."""
    if not 0 < top_k < keys.shape[2]:
        group = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(query, keys, values, scale=1.0)
    pieces = [
        checkpoint(best_pairs, piece, keys, values, top_k, use_reentrant=False, preserve_rng_state=False)
        for piece in query.split(QUERIES_AT_ONCE, 2)
    ]
    return torch.cat(pieces, 2)
