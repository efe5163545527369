"""What the operators of the memory kinds share: which blocks have a history, and moving them out of a sample and back.

Legend: T tokens at hand, L block length, B blocks at hand, b samples, h heads, d head dimension, n blocks that read.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from em_megatron.config import MemoryConfig
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.rotary import rotary_tables, rotate
from em_megatron.ops.transfer import to_device
from em_megatron.ops.trapezoid_attention import trapezoid_attention


@dataclass(frozen=True)
class Reading:
    """How a layer reads: the memory section, the rotary base, the moments of a sampler, the context-parallel group."""

    memory: MemoryConfig
    rotary_base: float
    points: tuple[float, ...] = ()
    group: Any = None

    def local(self, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout) -> Tensor:
        """Block-local attention of all tokens, [T, b, hq, d]."""
        return trapezoid_attention(query, key, value, None, layout, self.rotary_base, self.memory.kernels)


@dataclass(frozen=True)
class Reader:
    """A block at hand that has a history: its sample, its place, and how many blocks of its document come before."""

    row: int
    block: int
    history: int


def readers(layout: BlockLayout) -> list[Reader]:
    """Blocks with a history, document after document; known on the host."""
    found: list[Reader] | None = layout.derived.get(readers)
    if found is None:
        found = [
            Reader(run.row, run.first_block + i, run.history + i)
            for run in layout.runs
            for i in range(run.num_blocks)
            if run.history + i
        ]
        layout.derived[readers] = found
    return found


def pick(x: Tensor, layout: BlockLayout, reading: bool = True) -> Tensor:
    """[T, b, h, d] → the blocks of `readers`, [n, h, L, d], or with reading=False all others."""
    blocks, rows = _indices(layout, reading, x.device)
    by_block = x.view(-1, layout.block_length, *x.shape[1:])
    return by_block[blocks, :, rows].transpose(1, 2)


def put(found: Tensor, layout: BlockLayout, reading: bool = True) -> Tensor:
    """What `pick` gave, [n, h, L, d] → [T, b, h, d], zeros elsewhere."""
    heads, length, dim = found.shape[1:]
    blocks, rows = _indices(layout, reading, found.device)
    out = found.new_zeros(layout.num_blocks, layout.batch_size, length, heads, dim)
    return out.index_put((blocks, rows), found.transpose(1, 2)).transpose(1, 2).flatten(0, 1)


def gated(read: Tensor, local: Tensor, gate: Tensor, layout: BlockLayout) -> Tensor:
    """σ(gate) · read + (1 − σ(gate)) · local for tokens with a history, `local` for the others; gate [h]."""
    share = torch.sigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))
    at = layout.memory_tokens.T[..., None] * share
    return torch.lerp(local, read.to(local.dtype), at[..., None].to(local.dtype))


def untouched(local: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """`local`, tied to parameters that no token here uses: every rank has a gradient for them, zero."""
    for weight in weights.values():
        local = local + 0.0 * weight.sum().to(local.dtype)
    return local


def rotated(x: Tensor, first: int, base: float) -> Tensor:
    """x [..., n, d] at positions first … first + n − 1."""
    stop = first + x.shape[-2]
    cos, sin = rotary_tables(_round_up(stop), x.shape[-1], base, x.dtype, x.device)
    return rotate(x, cos[first:stop], sin[first:stop])


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of the last n of m tokens to all up to themselves, already rotated: [k, hq, n, d] from [k, hk, m, d]."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    tokens, count = query.shape[2], key.shape[2]
    if tokens == count:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if query.device.type == "cpu":
        visible = torch.ones(tokens, count, dtype=torch.bool).tril(count - tokens)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    mask: Any = causal_lower_right(tokens, count)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _round_up(length: int) -> int:
    """Lengths that tables are kept for: powers of two, so that few are made."""
    return 1 << max(0, length - 1).bit_length()


def _indices(layout: BlockLayout, reading: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks and samples of the readers, or of all other blocks."""
    name = (_indices, reading)
    if name not in layout.derived:
        places = [(reader.block, reader.row) for reader in readers(layout)]
        if not reading:
            every = itertools.product(range(layout.num_blocks), range(layout.batch_size))
            places = sorted(set(every) - set(places))
        both = torch.tensor(places, dtype=torch.int64).view(-1, 2).T.contiguous()
        layout.derived[name] = to_device(both, device)
    blocks, rows = layout.derived[name]
    return blocks, rows
