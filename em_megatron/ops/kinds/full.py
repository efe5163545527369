"""Causal attention over each document, rotary positions counted over the sample (only differences matter)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from em_megatron.ops.block_layout import BlockLayout, Run
from em_megatron.ops.kinds.exchange import whole_sample
from em_megatron.ops.kinds.reading import Reading, causal_attention, rotated


def full_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, reading: Reading, weights: Mapping[str, Tensor]
) -> Tensor:
    """softmax(RoPE(Q) RoPE(K)ᵀ / √d + causal) V within each document: [T, b, hq, d].

    A document of two blocks or more goes through torch's flash attention by itself; shorter ones are block-local. Under
    context parallelism keys and values of all ranks are gathered where any document crosses ranks.
    """
    whole = len(layout.runs) == layout.batch_size and sum(run.num_blocks for run in layout.runs) == (
        layout.num_blocks * layout.batch_size
    )
    local = query if whole and not layout.shared_blocks else reading.local(query, key, value, layout)
    if not layout.runs and not layout.crosses_ranks:
        return local
    before = 0
    if layout.crosses_ranks:
        key, value = whole_sample(key, reading.group), whole_sample(value, reading.group)
        before = layout.sequence_rank * layout.num_blocks
    found, mine = torch.zeros_like(query), torch.zeros(*query.shape[:2], dtype=torch.bool, device=query.device)
    for run in layout.runs:
        start, stop = _tokens(run, layout.block_length)
        first = (before + run.first_block - run.history) * layout.block_length
        last = first + run.history * layout.block_length + stop - start
        q = query[start:stop, run.row].transpose(0, 1)[None]
        k, v = (x[first:last, run.row].transpose(0, 1)[None] for x in (key, value))
        q, k = rotated(q, last - first - (stop - start), reading.rotary_base), rotated(k, 0, reading.rotary_base)
        found[start:stop, run.row] = causal_attention(q, k, v)[0].transpose(0, 1)
        if not run.history:
            mine[start : start + layout.block_length, run.row] = True
    out = torch.where((mine | layout.memory_tokens.T)[..., None, None], found, local)
    if layout.crosses_ranks and not layout.runs:  # nothing read here, but others wait for this rank's part
        out = out + 0.0 * (key.sum() + value.sum()).to(out.dtype)
    return out


def _tokens(run: Run, block_length: int) -> tuple[int, int]:
    return run.first_block * block_length, (run.first_block + run.num_blocks) * block_length
