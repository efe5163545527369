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

# Of queries that go at once on a CPU: with more, every pass over them comes from memory instead of its caches, and
# buffers are returned to the system and zeroed again at each use.
_PIECE_BYTES = 4 * 2**20

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


def _visible(segments: Tensor) -> Tensor:
    """Which own tokens a token sees: causal and of its document, [n, L] → [n, 1, L, L] bool."""
    same = segments[:, :, None] == segments[:, None, :]
    return same.tril()[:, None]


def _pieces(x: Tensor, layout: BlockLayout, blocks: int) -> list[Tensor]:
    """[b, T] per token → [n, L] for every so many blocks of all samples, in the order of `_fold`."""
    by_block = x.view(layout.batch_size, layout.num_blocks, layout.block_length)
    return [piece.flatten(0, 1) for piece in by_block.split(blocks, 1)]


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
    blocks = _blocks_of_a_piece(query, layout)
    tokens = list(zip(*(x.split(blocks * layout.block_length) for x in (query, key, value)), strict=True))
    segments = _pieces(layout.segment_ids, layout, blocks) if layout.shared_blocks else [None] * len(tokens)
    own = [_Own(q, k, v, cos, sin, masked) for (q, k, v), masked in zip(tokens, segments, strict=True)]
    if read_slots is None:
        found = [piece.alone() for piece in own]
    else:
        start = [piece.start() for piece in own]
        readable = _pieces(layout.memory_tokens, layout, blocks)
        slots = [[_fold_slots(piece) for piece in x.split(blocks)] for x in read_slots()]
        found = [piece.join(*rest) for piece, *rest in zip(own, start, *slots, readable, strict=True)]
    out = [_unfold(x, query.shape[1]) for x in found]
    return out[0] if len(out) == 1 else torch.cat(out)


def _blocks_of_a_piece(query: Tensor, layout: BlockLayout) -> int:
    """How many blocks go at once: on a CPU as many as its caches may hold, elsewhere all."""
    if query.device.type != "cpu":
        return layout.num_blocks
    return max(1, _PIECE_BYTES // (query.nbytes // layout.num_blocks))


class _Own:
    """Some blocks of all samples: query, key and value [t, b, h, d], their segment ids [n, L] where a mask is needed."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, segments: Tensor | None
    ) -> None:
        length, group = cos.shape[0], query.shape[2] // key.shape[2]
        self.q, k, v = (_fold(x, length) for x in (query, key, value))
        self.q_rotated = rotate(self.q, cos, sin)
        self.k_rotated, self.v = _expand_heads(rotate(k, cos, sin), group), _expand_heads(v, group)
        self.visible = _visible(segments) if segments is not None else None
        self.joint = _Joint()

    def alone(self) -> Tensor:
        """Attention of blocks that read no slots, [n, hq, L, d]."""
        return F.scaled_dot_product_attention(
            self.q_rotated, self.k_rotated, self.v, attn_mask=self.visible, is_causal=self.visible is None
        )

    def start(self) -> tuple[Tensor, Tensor] | None:
        """The part that needs no slots, where the two parts are computed apart: output and log-sum-exp."""
        if self.q.device.type != "cpu":
            return None
        mask = None
        if self.visible is not None:
            mask = self.q.new_zeros(self.visible.shape).masked_fill(~self.visible, float("-inf"))
        out: tuple[Tensor, Tensor] = LocalFlash.apply(self.q_rotated, self.k_rotated, self.v, mask, self.joint)
        return out

    def join(self, local: tuple[Tensor, Tensor] | None, k_memory: Tensor, v_memory: Tensor, readable: Tensor) -> Tensor:
        """[n, hq, L, d] from what `start` gave, slots [n, hk, S, d], and who may read them [n, L]."""
        if local is not None:
            out: Tensor = JoinMemory.apply(self.q, k_memory, v_memory, readable, *local, self.joint)
            return out
        return _one_softmax(self.q, self.q_rotated, self.k_rotated, self.v, k_memory, v_memory, readable, self.visible)


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
