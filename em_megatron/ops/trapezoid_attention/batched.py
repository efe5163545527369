"""Trapezoidal attention in batched PyTorch, all blocks and heads at once.

Legend: B blocks, L block length, S slots, b samples, hq query heads, hk KV heads, r = hq/hk, d head dimension.

One softmax over two parts, the slots (a rectangle [L, S], unrotated queries) and the block itself (a triangle [L, L],
rotated). On the CPU each part runs in torch's flash kernel and the two are joined by their log-sum-exp; the backward of
each part then takes the joint output and the joint log-sum-exp, which is exact, and no [L, S+L] matrix is stored. The
block's own part comes first and the slots are asked for after it, so that what they wait for has time to arrive.
Elsewhere one `scaled_dot_product_attention` sees both parts through a doubled head dimension: [q; rotated q] meets
[slot; 0] and [0; rotated key].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.rotary import rotate

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# A log-sum-exp so large that exp(score − it) is exactly zero, and small enough to stay finite in fp32.
_NOTHING = 1.0e30


class _Joint:
    """What the join of both parts found, for the backward of the local part."""

    out: Tensor
    lse: Tensor


class LocalFlash(torch.autograd.Function):
    """Attention of a block to itself, whose backward takes the joint output and log-sum-exp (CPU kernels).

    The gradient that comes in is that of the joint output: `JoinMemory` hands it on as it is.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, joint: _Joint
    ) -> tuple[Tensor, Tensor]:
        """query, key, value [n, hq, L, d], rotated; mask [n, 1, L, L] → out as query, log-sum-exp [n, hq, L]."""
        out, lse = _flash(query, key, value, 0.0, mask is None, attn_mask=mask)
        ctx.save_for_backward(query, key, value, mask)
        ctx.joint = joint
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        grads = _flash_backward(
            grad.contiguous(), query, key, value, ctx.joint.out, ctx.joint.lse, 0.0, mask is None, attn_mask=mask
        )
        return *grads, None, None


class JoinMemory(torch.autograd.Function):
    """Attention to the slots, joined with that of the block by log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key_memory: Tensor,
        value_memory: Tensor,
        readable: Tensor,
        local: Tensor,
        lse_local: Tensor,
        joint: _Joint,
    ) -> Tensor:
        """query, local [n, hq, L, d]; key_memory, value_memory [n, hk, S, d]; readable [n, L]; lse_local [n, hq, L].

        The r query heads of a KV head meet the same slots, so they are laid out as r·L queries.
        """
        q_folded = query.reshape(query.shape[0], key_memory.shape[1], -1, query.shape[-1])
        memory, lse_memory = _flash(q_folded, key_memory, value_memory, 0.0, False)
        lse_memory = lse_memory.reshape(lse_local.shape).masked_fill(~readable[:, None], -_NOTHING)
        lse = torch.logaddexp(lse_local, lse_memory)
        share = (lse_memory - lse).exp()[..., None].to(query.dtype)
        out = torch.lerp(local, memory.reshape(local.shape), share)
        joint.out, joint.lse = out.detach(), lse
        ctx.save_for_backward(q_folded, key_memory, value_memory, readable, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_folded, key_memory, value_memory, readable, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        lse_memory = lse.masked_fill(~readable[:, None], _NOTHING).reshape(q_folded.shape[:-1])
        d_query, d_key_memory, d_value_memory = _flash_backward(
            grad.reshape(q_folded.shape),
            q_folded,
            key_memory,
            value_memory,
            out.reshape(q_folded.shape),
            lse_memory,
            0.0,
            False,
        )
        return d_query.reshape(grad.shape), d_key_memory, d_value_memory, None, grad, None, None


def _fold(x: Tensor, length: int) -> Tensor:
    """[T, b, h, d] → [b·B, h, L, d]."""
    tokens, rows, heads, dim = x.shape
    x = x.view(tokens // length, length, rows, heads, dim)
    return x.permute(2, 0, 3, 1, 4).reshape(-1, heads, length, dim)


def _unfold(x: Tensor, rows: int) -> Tensor:
    """[b·B, h, L, d] → [T, b, h, d]."""
    n, heads, length, dim = x.shape
    return x.view(rows, n // rows, heads, length, dim).permute(1, 3, 0, 2, 4).reshape(-1, rows, heads, dim)


def _fold_slots(x: Tensor) -> Tensor:
    """[B, S, b, hk, d] → [b·B, hk, S, d]."""
    return x.permute(2, 0, 3, 1, 4).flatten(0, 1)


def _expand_heads(x: Tensor, group: int) -> Tensor:
    """[n, hk, L, d] → [n, hk·r, L, d]."""
    return x if group == 1 else x.repeat_interleave(group, 1)


def _visible(layout: BlockLayout) -> Tensor:
    """Which own tokens a token sees: causal and of its document, [b·B, 1, L, L] bool."""
    segments = layout.segment_ids.view(-1, layout.block_length)
    same = segments[:, :, None] == segments[:, None, :]
    return same.tril()[:, None]


def trapezoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read_slots: Callable[[], tuple[Tensor, Tensor]] | None,
    layout: BlockLayout,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """See the public function for shapes; `read_slots` gives memory keys and values when they are needed."""
    length, rows, group = layout.block_length, query.shape[1], query.shape[2] // key.shape[2]
    q, k, v = (_fold(x, length) for x in (query, key, value))
    q_rotated, k_rotated = rotate(q, cos, sin), rotate(k, cos, sin)
    k_rotated, v = _expand_heads(k_rotated, group), _expand_heads(v, group)
    visible = _visible(layout) if layout.shared_blocks else None
    if read_slots is None:
        out = F.scaled_dot_product_attention(q_rotated, k_rotated, v, attn_mask=visible, is_causal=visible is None)
        return _unfold(out, rows)
    readable = layout.memory_tokens.view(-1, length)
    if q.device.type != "cpu":
        k_memory, v_memory = (_fold_slots(x) for x in read_slots())
        return _unfold(_one_softmax(q, q_rotated, k_rotated, v, k_memory, v_memory, readable, visible), rows)
    mask, joint = None, _Joint()
    if visible is not None:
        mask = q.new_zeros(visible.shape).masked_fill(~visible, float("-inf"))
    local, lse = LocalFlash.apply(q_rotated, k_rotated, v, mask, joint)
    k_memory, v_memory = (_fold_slots(x) for x in read_slots())
    return _unfold(JoinMemory.apply(q, k_memory, v_memory, readable, local, lse, joint), rows)


def _one_softmax(
    q: Tensor,
    q_rotated: Tensor,
    k_rotated: Tensor,
    v: Tensor,
    k_memory: Tensor,
    v_memory: Tensor,
    readable: Tensor,
    visible: Tensor | None,
) -> Tensor:
    """Both parts in one masked attention over [S + L] keys with a doubled query-key dimension."""
    n, heads, length, dim = q.shape
    group, slots = heads // k_memory.shape[1], k_memory.shape[2]
    if visible is None:
        visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().expand(n, 1, -1, -1)
    mask = torch.cat([readable[:, None, :, None].expand(-1, -1, -1, slots), visible], -1)
    keys = torch.cat([F.pad(_expand_heads(k_memory, group), (0, dim)), F.pad(k_rotated, (dim, 0))], 2)
    values = torch.cat([_expand_heads(v_memory, group), v], 2)
    queries = torch.cat([q, q_rotated], -1)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=dim**-0.5)
