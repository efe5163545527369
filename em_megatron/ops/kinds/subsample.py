"""Plain subsampling: the slots of a block are S raw keys and values of its history, at the sampler's moments.

The same reader as Elastic Memory's, without the compression: it asks whether HiPPO does more than sampling.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from em_megatron.hf.kinds_elastic_memory import sampled_tokens
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.kinds.exchange import whole_sample
from em_megatron.ops.kinds.reading import Reading, readers
from em_megatron.ops.transfer import to_device
from em_megatron.ops.trapezoid_attention import trapezoid_attention


def subsample_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, reading: Reading, weights: Mapping[str, Tensor]
) -> Tensor:
    """softmax([Q Kᵀ[sampled] | RoPE(Q) RoPE(K)ᵀ + causal] / √d) [V[sampled]; V]: [T, b, hq, d].

    Block i of a document reads tokens ⌊u_j · i·L⌋ of it. Under context parallelism the tokens of all ranks are gathered.
    """
    signal = (key.detach(), value.detach()) if reading.memory.detach_memory else (key, value)
    if layout.crosses_ranks:
        signal = (whole_sample(signal[0], reading.group), whole_sample(signal[1], reading.group))
    if not readers(layout) and not layout.crosses_ranks:
        return reading.local(query, key, value, layout)
    tokens = _tokens_read(layout, reading.points, query.device)
    rows = torch.arange(layout.batch_size, device=query.device)[:, None, None]
    slots = tuple(x.transpose(0, 1)[rows, tokens].permute(1, 2, 0, 3, 4) for x in signal)
    base, kernels = reading.rotary_base, reading.memory.kernels
    return trapezoid_attention(query, key, value, (slots[0], slots[1]), layout, base, kernels)


def _tokens_read(layout: BlockLayout, points: tuple[float, ...], device: torch.device) -> Tensor:
    """[b, B_local, S] which tokens of its sample a block reads; anything where it has no history."""
    name = (_tokens_read, points)
    if name not in layout.derived:
        at = torch.zeros(layout.batch_size, layout.num_blocks, len(points), dtype=torch.int64)
        before = layout.sequence_rank * layout.num_blocks if layout.crosses_ranks else 0
        for reader in readers(layout):
            first = (before + reader.block - reader.history) * layout.block_length
            at[reader.row, reader.block] = first + sampled_tokens(points, reader.history * layout.block_length)
        layout.derived[name] = to_device(at, device)
    found: Tensor = layout.derived[name]
    return found
