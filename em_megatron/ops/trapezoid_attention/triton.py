"""Trapezoidal attention with Triton kernels: host side and gradients. `kernels.py` has the kernels and the legend.

Deterministic in both directions: each program owns what it writes. The gradient of the queries and those of keys and
slots therefore come from kernels of their own, each of which computes the scores again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import cdiv, next_power_of_2

from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.dispatch import interpreting
from em_megatron.ops.rotary import rotary_tables
from em_megatron.ops.tiles import INTERPRETED_TILE, precision_of
from em_megatron.ops.trapezoid_attention import kernels

ROTATE_ROWS = INTERPRETED_TILE if interpreting() else 64  # rows of a program of the memory-bound kernels


class AttentionLaunches:
    """The kernels for tensors of one shape and layout.

    Args:
        query, key: [T, b, hq, d] and [T, b, hk, d].
        num_slots: S, 0 without a memory.
        rotary_base: base of the rotary frequencies.
    """

    def __init__(self, query: Tensor, key: Tensor, num_slots: int, layout: BlockLayout, rotary_base: float) -> None:
        self.tokens, self.rows, self.heads, self.dim = query.shape
        self.kv_heads, self.length = key.shape[2], layout.block_length
        self.blocks = layout.num_blocks * self.rows  # n
        self.group = self.heads // self.kv_heads
        self.scale = math.log2(math.e) / math.sqrt(self.dim)
        self.cos, self.sin = rotary_tables(self.length, self.dim, rotary_base, torch.float32, query.device)
        self.readers, self.start, self.stop = layout.readers, layout.segment_start, layout.segment_stop
        self.block_d, self.block_h = (max(16, next_power_of_2(width)) for width in (self.dim, self.dim // 2))
        self.constants = {
            "L": self.length,
            "D": self.dim,
            "BLOCK_D": self.block_d,
            "BLOCK_H": self.block_h,
            "SEGMENTS": layout.shared_blocks,
            "PRECISION": precision_of(query.dtype),
        }
        self.num_slots = num_slots

    def _by_queries(self, meta: dict[str, int]) -> tuple[int, int, int]:
        return cdiv(self.length, meta["BLOCK_M"]), self.heads, self.blocks

    def rotated(self, x: Tensor) -> Tensor:
        """[T, b, h, d] → [n, h, L, d], rotated to the positions in the block."""
        out = torch.empty(self.blocks, x.shape[2], self.length, self.dim, dtype=x.dtype, device=x.device)
        grid = (cdiv(self.length, ROTATE_ROWS), x.shape[2], self.blocks)
        kernels.rotate_kernel[grid](
            x, self.cos, self.sin, out, *x.stride()[:3], self.rows, self.length,
            D=self.dim, BLOCK_H=self.block_h, BLOCK_M=ROTATE_ROWS,
        )  # fmt: skip
        return out

    def forward(self, query: Tensor, key: Tensor, value: Tensor, slots: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Output [T, b, hq, d] and log-sum-exp [n, hq, L]; `key` is rotated."""
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(self.blocks, self.heads, self.length, dtype=torch.float32, device=query.device)
        kernels.forward_kernel[self._by_queries](
            query, key, value, *slots, self.cos, self.sin, self.readers, self.start, out, lse,
            *query.stride()[:3], *value.stride()[:3], *slots[0].stride()[:3],
            self.rows, self.group, self.tokens, self.scale, S=self.num_slots, **self.constants,
        )  # fmt: skip
        return out, lse

    def delta(self, out: Tensor, dout: Tensor) -> Tensor:
        """Σ out · dout, [n, hq, L]."""
        found = torch.empty(self.blocks, self.heads, self.length, dtype=torch.float32, device=out.device)
        grid = (cdiv(self.length, ROTATE_ROWS), self.heads, self.blocks)
        kernels.delta_kernel[grid](
            out, dout, found, *dout.stride()[:3], self.rows, self.length,
            D=self.dim, BLOCK_D=self.block_d, BLOCK_M=ROTATE_ROWS,
        )  # fmt: skip
        return found

    def query_gradient(self, query: Tensor, key: Tensor, value: Tensor, slots: tuple[Tensor, Tensor], dout: Tensor,
                       lse: Tensor, delta: Tensor) -> Tensor:  # fmt: skip
        """[T, b, hq, d]; `key` is rotated."""
        found = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        kernels.query_gradient_kernel[self._by_queries](
            query, key, value, *slots, self.cos, self.sin, self.readers, self.start, dout, lse, delta, found,
            *query.stride()[:3], *value.stride()[:3], *slots[0].stride()[:3], *dout.stride()[:3],
            self.rows, self.group, self.tokens, self.scale, S=self.num_slots, **self.constants,
        )  # fmt: skip
        return found

    def key_gradients(self, rotated: Tensor, key: Tensor, value: Tensor, dout: Tensor, lse: Tensor,
                      delta: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Of keys and values, [T, b, hk, d]; `rotated` queries, `key` rotated."""
        found = [torch.empty(value.shape, dtype=value.dtype, device=value.device) for _ in range(2)]
        kernels.key_gradient_kernel[lambda meta: (cdiv(self.length, meta["BLOCK_N"]), self.kv_heads, self.blocks)](
            rotated, key, value, self.cos, self.sin, self.stop, dout, lse, delta, *found,
            *value.stride()[:3], *dout.stride()[:3], self.rows, self.group, self.tokens, self.scale, **self.constants,
        )  # fmt: skip
        return found[0], found[1]

    def slot_gradients(self, query: Tensor, slots: tuple[Tensor, Tensor], dout: Tensor, lse: Tensor,
                       delta: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Of memory keys and values, [n, hk, S, d]."""
        found = [torch.empty(slots[0].shape, dtype=query.dtype, device=query.device) for _ in range(2)]
        kernels.slot_gradient_kernel[lambda meta: (cdiv(self.num_slots, meta["BLOCK_N"]), self.kv_heads, self.blocks)](
            query, *slots, self.readers, dout, lse, delta, *found,
            *query.stride()[:3], *slots[0].stride()[:3], *dout.stride()[:3],
            self.rows, self.group, self.scale, S=self.num_slots, **self.constants,
        )  # fmt: skip
        return found[0], found[1]


class TrapezoidAttention(torch.autograd.Function):
    """query, key, value [T, b, h, d], slots [n, hk, S, d] or None → output [T, b, hq, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slot_keys: Tensor | None,
        slot_values: Tensor | None,
        layout: BlockLayout,
        rotary_base: float,
    ) -> Tensor:
        launches = AttentionLaunches(query, key, 0 if slot_keys is None else slot_keys.shape[2], layout, rotary_base)
        slots = _or_anything(slot_keys, slot_values, query)
        out, lse = launches.forward(query, launches.rotated(key), value, slots)
        ctx.launches = launches
        ctx.save_for_backward(query, key, value, slot_keys, slot_values, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, slot_keys, slot_values, out, lse = ctx.saved_tensors
        launches: AttentionLaunches = ctx.launches
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        slots, rotated_key = _or_anything(slot_keys, slot_values, query), launches.rotated(key)
        delta = launches.delta(out, dout)
        d_slots: tuple[Tensor | None, Tensor | None] = (None, None)
        if slot_keys is not None and any(ctx.needs_input_grad[3:5]):
            d_slots = launches.slot_gradients(query, slots, dout, lse, delta)
        d_key, d_value = launches.key_gradients(launches.rotated(query), rotated_key, value, dout, lse, delta)
        d_query = launches.query_gradient(query, rotated_key, value, slots, dout, lse, delta)
        return d_query, d_key, d_value, *d_slots, None, None


def _or_anything(keys: Tensor | None, values: Tensor | None, anything: Tensor) -> tuple[Tensor, Tensor]:
    """The slots, or a tensor that stands in their place in the arguments of a kernel that never looks at them."""
    return (anything, anything) if keys is None or values is None else (keys, values)


def _blocks_first(x: Tensor) -> Tensor:
    """Slots [B, S, b, hk, d] → [n, hk, S, d]; a view of what the memory kernels wrote."""
    return x.permute(0, 2, 3, 1, 4).contiguous().flatten(0, 1)


def trapezoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read_slots: Callable[[], tuple[Tensor, Tensor]] | None,
    layout: BlockLayout,
    rotary_base: float,
) -> Tensor:
    """See the public function for shapes."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    slots = (None, None) if read_slots is None else tuple(_blocks_first(x) for x in read_slots())
    out: Tensor = TrapezoidAttention.apply(query, key, value, *slots, layout, rotary_base)
    return out
