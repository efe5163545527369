"""How many blocks the memory computes at once: multiply-adds and bytes of every superchunk size.

One linear map has many factorisations. A superchunk of m blocks reads M_i = A(i) C + Σ_{j<i} G(i,j) X_j and hands on
C ← carry C + inject X. m = 1 is the recurrence, m = num_blocks has no state at all, and the numbers are the same.
"""

from functools import lru_cache


def memory_cost(
    num_blocks: int, superchunk: int, order: int, slots: int, block_length: int, part_of_sample: bool = False
) -> int:
    """Multiply-adds per channel of the memory of `num_blocks` blocks, done `superchunk` blocks at a time.

    Each superchunk pays its strict triangle, slots·block_length per pair of blocks; each but the first also reads the
    state it starts from, slots·order per block; each but the last updates it, order·block_length per block and
    order²/2 (a triangular carry) unless it starts from nothing. Blocks that are part of a larger sample also write at
    their end, and read a state that entered, which is carried from superchunk to superchunk beside their own.
    """
    _check(num_blocks, superchunk, order, slots, block_length)
    cost, carry = 0, order * order // 2
    for start, blocks in _superchunks(num_blocks, superchunk):
        last = start + blocks == num_blocks
        cost += slots * block_length * (blocks * (blocks - 1) // 2)
        if start > 0 or part_of_sample:
            cost += slots * order * blocks
        if not last or part_of_sample:
            cost += order * block_length * blocks + (carry if start > 0 else 0)
        if not last and part_of_sample:
            cost += carry
    return cost


def bank_elements(
    num_blocks: int, superchunk: int, order: int, slots: int, block_length: int, part_of_sample: bool = False
) -> int:
    """Numbers held by the matrices of all superchunks, a carry being stored as a full square."""
    _check(num_blocks, superchunk, order, slots, block_length)
    elements = 0
    for start, blocks in _superchunks(num_blocks, superchunk):
        elements += slots * block_length * _stored_pairs(blocks)
        if start > 0 or part_of_sample:
            elements += slots * order * blocks
        if start + blocks < num_blocks or part_of_sample:
            elements += order * block_length * blocks + (order * order if start > 0 or part_of_sample else 0)
    return elements


@lru_cache(maxsize=256)
def plan(
    num_blocks: int,
    order: int,
    slots: int,
    block_length: int,
    bank_bytes_limit: int = 4 * 2**30,
    bytes_per_element: int = 4,
    part_of_sample: bool = False,
) -> int:
    """The superchunk size in 1 … num_blocks with the fewest multiply-adds whose banks fit in `bank_bytes_limit` bytes.

    Ties go to the larger size. Raises ValueError if no size fits.
    """
    sizes = range(1, num_blocks + 1)
    _check(num_blocks, 1, order, slots, block_length)
    needed = {
        m: bytes_per_element * bank_elements(num_blocks, m, order, slots, block_length, part_of_sample) for m in sizes
    }
    fitting = [m for m in sizes if needed[m] <= bank_bytes_limit]
    if not fitting:
        raise ValueError(
            f"The memory matrices of {num_blocks} blocks at order {order} need at least {min(needed.values())} bytes "
            f"and the limit is {bank_bytes_limit}; lower the order, the slots or the context."
        )
    return min(fitting, key=lambda m: (memory_cost(num_blocks, m, order, slots, block_length, part_of_sample), -m))


def _superchunks(num_blocks: int, superchunk: int) -> list[tuple[int, int]]:
    return [(start, min(superchunk, num_blocks - start)) for start in range(0, num_blocks, superchunk)]


def _stored_pairs(blocks: int) -> int:
    """Block pairs stored for a strict triangle: m(m−1)/2, and the zero fill of each level's last tile."""
    pairs, width = 0, 1
    while width < blocks:
        pairs += len(range(width, blocks, 2 * width)) * width * width
        width *= 2
    return pairs


def _check(num_blocks: int, superchunk: int, order: int, slots: int, block_length: int) -> None:
    if min(num_blocks, superchunk, order, slots, block_length) < 1 or superchunk > num_blocks:
        raise ValueError(
            f"A superchunk holds 1 … num_blocks blocks and all sizes are positive, got superchunk {superchunk}, "
            f"num_blocks {num_blocks}, order {order}, slots {slots}, block_length {block_length}."
        )
