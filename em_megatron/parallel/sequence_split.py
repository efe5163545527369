"""The contiguous, block-aligned split of samples over context-parallel ranks.

Megatron's own split is zigzag, because causal attention over the whole sample costs more the later the query is. Here
attention is local to a block and costs the same everywhere, and a recurrence needs its tokens in order.
"""

from __future__ import annotations

from torch import Tensor


def local_part(x: Tensor, sequence_rank: int, sequence_size: int) -> Tensor:
    """The tokens [b, T / sequence_size] of a rank, from [b, T]; `BlockLayout` refuses samples that cannot be shared."""
    size = x.shape[1] // sequence_size
    return x[:, sequence_rank * size : (sequence_rank + 1) * size]
