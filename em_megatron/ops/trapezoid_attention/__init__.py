"""Trapezoidal attention: every block of tokens reads its memory slots and, causally, itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.rotary import rotary_tables
from em_megatron.ops.trapezoid_attention import batched, naive

__all__ = ["trapezoid_attention"]

IMPLEMENTATIONS = {"batched": batched.trapezoid_attention, "naive": naive.trapezoid_attention}


def trapezoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]] | None,
    layout: BlockLayout,
    rotary_base: float = 10000.0,
    implementation: str = "batched",
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
        implementation: "batched", or "naive" for the query-by-query reference.

    Returns:
        [T, b, hq, d].

    Raises:
        ValueError: unknown implementation or odd head dimension.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation '{implementation}' is unknown: choose one of {sorted(IMPLEMENTATIONS)}"
        )
    cos, sin = rotary_tables(layout.block_length, query.shape[-1], rotary_base, query.dtype, query.device)
    read_slots = slots if slots is None or callable(slots) else lambda: slots
    return IMPLEMENTATIONS[implementation](query, key, value, read_slots, layout, cos, sin)
