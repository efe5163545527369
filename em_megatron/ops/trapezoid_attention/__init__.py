"""Trapezoidal attention: every block of tokens reads its memory slots and, causally, itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.dispatch import choose
from em_megatron.ops.rotary import rotary_tables
from em_megatron.ops.trapezoid_attention import batched, naive

__all__ = ["trapezoid_attention"]


def trapezoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]] | None,
    layout: BlockLayout,
    rotary_base: float = 10000.0,
    implementation: str = "auto",
) -> Tensor:
    """O = softmax([Q Kmemᵀ | RoPE(Q) RoPE(K)ᵀ + causal] / √d) [Vmem; V], block by block (arXiv 2602.11212).

    Memory keys carry no position and meet the unrotated query; rotary positions count inside the block. Tokens see
    their own document only, and the slots only where `layout.memory_tokens` says so.

    Args:
        query: [T, b, hq, d], unrotated.
        key, value: [T, b, hk, d], unrotated; hq is a multiple of hk.
        slots: memory keys and values, each [B, S, b, hk, d], or a function that gives them and is called after the
            blocks' own part where the two are computed apart; None for block-local attention.
        layout: the documents of the batch.
        rotary_base: base of the rotary frequencies.
        implementation: see `dispatch.choose`; "naive" is the query-by-query reference.

    Returns:
        [T, b, hq, d].

    Raises:
        ValueError: unknown implementation, one that cannot run here, or an odd head dimension.
    """
    name = choose(implementation, query.device, query.dtype, query.shape[-1]).name
    read_slots = slots if slots is None or callable(slots) else lambda: slots
    if name == "triton":
        from em_megatron.ops.trapezoid_attention import triton

        return triton.trapezoid_attention(query, key, value, read_slots, layout, rotary_base)
    cos, sin = rotary_tables(layout.block_length, query.shape[-1], rotary_base, query.dtype, query.device)
    module = naive if name == "naive" else batched
    return module.trapezoid_attention(query, key, value, read_slots, layout, cos, sin)
