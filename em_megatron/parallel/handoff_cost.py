"""What passing the memory between context-parallel ranks costs: bytes, an estimate of time, and the choice it makes."""

from __future__ import annotations

HANDOFFS = ("all_gather", "chain")

# Assumptions of the estimate, not measurements: one 200 Gbit/s link per GPU between nodes; the start of a step of a
# collective; and of a hop of the chain, which is a receive, a matrix product and a send.
BYTES_PER_SECOND = 25e9
SECONDS_PER_STEP = 10e-6
SECONDS_PER_HOP = 50e-6
MOST_PIECES = 8


def state_bytes(order: int, channels: int, itemsize: int = 4) -> int:
    """Bytes of a layer's state of keys and values for `channels` = samples · KV heads · 2 · d on this rank."""
    return order * channels * itemsize


def received_bytes(kind: str, sequence_size: int, state: int) -> int:
    """Bytes the rank that receives most gets in a layer's forward pass, or in its backward pass: as many."""
    if sequence_size == 1:
        return 0
    return state * (sequence_size - 1 if kind == "all_gather" else 1)


def ring_attention_bytes(sequence_size: int, local_tokens: int, channels: int, itemsize: int = 2) -> int:
    """Bytes of keys and values each rank gets in the forward pass of ring attention over the same sample."""
    return (sequence_size - 1) * local_tokens * channels * itemsize


def chain_pieces(sequence_size: int, channels: int) -> int:
    """Pieces a state is cut into on the chain: more where more ranks would wait, never more than channels of a head."""
    return max(1, min(MOST_PIECES, sequence_size - 1, channels))


def estimated_seconds(kind: str, sequence_size: int, state: int) -> float:
    """Time until the last rank has its state.

    all_gather: a ring of (ranks − 1) steps that each move a whole state. chain: the first piece makes (ranks − 1) hops,
    the others follow one behind another.
    """
    hops = sequence_size - 1
    if kind == "all_gather":
        return hops * (SECONDS_PER_STEP + state / BYTES_PER_SECOND)
    pieces = chain_pieces(sequence_size, MOST_PIECES)
    return (hops + pieces - 1) * (SECONDS_PER_HOP + state / pieces / BYTES_PER_SECOND)


def choose_handoff(sequence_size: int, state: int) -> str:
    """The way with the smaller estimate; ties go to all_gather."""
    return min(HANDOFFS, key=lambda kind: estimated_seconds(kind, sequence_size, state))
