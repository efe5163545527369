"""The contiguous, block-aligned split of samples over context-parallel ranks.

Megatron's own split is zigzag, because causal attention over the whole sample costs more the later the query is. Here
attention is local to a block and costs the same everywhere, and a recurrence needs its tokens in order.
"""

from __future__ import annotations

from torch import Tensor


def local_part(x: Tensor, sequence_rank: int, sequence_size: int) -> Tensor:
    """The tokens [b, T / sequence_size] of a rank, from [b, T].

    Raises:
        ValueError: T cannot be shared equally.
    """
    tokens = x.shape[1]
    if tokens % sequence_size:
        raise ValueError(
            f"{tokens} tokens cannot be shared equally by {sequence_size} context-parallel ranks: "
            "choose data.sequence_length as a multiple of memory.block_length × context_parallel_size"
        )
    size = tokens // sequence_size
    return x[:, sequence_rank * size : (sequence_rank + 1) * size]
