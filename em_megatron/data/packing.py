"""Placement of documents into samples of B blocks of L tokens, such that memory can be reset at block boundaries.

A document of n stored ids (bos ... eos) has n-1 (input, label) pairs. The rules:

- a piece of L pairs or more starts at a block boundary, because its memory starts there, empty or carried over;
- a document longer than the room left in the sample is cut at the sample's end and goes on at position 0 of the next
  sample as a new piece; a rest of fewer than L pairs is a short piece, unless it must follow (`rest_follows`, for
  memory that is carried from sample to sample): then it too lies at position 0 of the next sample;
- a short piece lies within one block and may share it, also with the end of a long piece.

Short pieces go where they fit best among the partly filled blocks so far (at most MAX_OPEN_BLOCKS are remembered),
so one pass over the documents packs in O(documents · log MAX_OPEN_BLOCKS).
"""

from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

MAX_OPEN_BLOCKS = 256


@dataclass(frozen=True)
class PackedIndex:
    """Samples as slices of flat arrays of pieces, in the order of their position. All arrays are int64.

    documents, starts, stops, positions: [pieces]. Piece p has the inputs tokens[start:stop] and the labels
    tokens[start+1:stop+1] of its document and lies at positions[p] of its sample.
    offsets: [samples + 1]; the pieces of sample s are offsets[s]:offsets[s+1].
    """

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    positions: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sequence_length: int
    block_length: int

    @property
    def num_samples(self) -> int:
        return len(self.offsets) - 1

    @property
    def efficiency(self) -> float:
        """Share of the samples' tokens that are not padding, 0..1."""
        room = self.num_samples * self.sequence_length
        return float((self.stops - self.starts).sum()) / room if room else 0.0

    def renumbered(self, numbers: NDArray[np.int64]) -> "PackedIndex":
        """The same placements of documents numbers[0], numbers[1], ..."""
        return replace(self, documents=numbers[self.documents])

    def pieces(self, sample: int) -> list[tuple[int, int, int, int]]:
        """(document, start, stop, position) of each piece of a sample."""
        part = slice(self.offsets[sample], self.offsets[sample + 1])
        columns = (self.documents, self.starts, self.stops, self.positions)
        return list(zip(*(column[part].tolist() for column in columns), strict=True))


@dataclass
class _Packer:
    """Fills blocks numbered from 0 over all samples; a position is counted from the start of the first sample."""

    sequence_length: int
    block_length: int
    rest_follows: bool
    next_free: int = 0  # position of the first untouched block
    open_blocks: list[tuple[int, int]] = field(default_factory=list)  # (room, position of the room), sorted
    placed: array = field(default_factory=lambda: array("q"))  # type: ignore[type-arg]  # four numbers a piece

    def add(self, document: int, pairs: int) -> None:
        start = 0
        while pairs - start >= self.block_length:
            room = self.sequence_length - self.next_free % self.sequence_length
            stop = min(pairs, start + room)
            self._place_in_new_block(document, start, stop)
            start = stop
        if start == pairs:
            return
        if start and self.rest_follows:
            self._place_in_new_block(document, start, pairs)
        else:
            self._add_short(document, start, pairs)

    def _add_short(self, document: int, start: int, stop: int) -> None:
        length = stop - start
        slot = bisect_left(self.open_blocks, (length, -1))
        if slot == len(self.open_blocks):
            self._place_in_new_block(document, start, stop)
            return
        room, position = self.open_blocks.pop(slot)
        self.placed.extend((document, start, stop, position))
        self._open(room - length, position + length)

    def _place_in_new_block(self, document: int, start: int, stop: int) -> None:
        self.placed.extend((document, start, stop, self.next_free))
        end = self.next_free + stop - start
        self.next_free = -(-end // self.block_length) * self.block_length
        self._open(self.next_free - end, end)

    def _open(self, room: int, position: int) -> None:
        if room:
            insort(self.open_blocks, (room, position))
            if len(self.open_blocks) > MAX_OPEN_BLOCKS:
                del self.open_blocks[0]


def check_sizes(sequence_length: int, block_length: int) -> None:
    """Raises ValueError unless a sample is a whole number of blocks."""
    if block_length < 1 or sequence_length < 1 or sequence_length % block_length:
        raise ValueError(
            f"sequence_length {sequence_length} is not a multiple of block_length {block_length}; "
            "choose a sequence length of whole blocks"
        )


def pack(
    lengths: NDArray[np.int64],
    order: NDArray[np.int64],
    sequence_length: int,
    block_length: int,
    rest_follows: bool = False,
) -> PackedIndex:
    """Places documents into samples; the result depends on nothing but the arguments.

    lengths: [documents] stored ids of each document, each at least 2. order: the documents to place, in this order.
    sequence_length: T, tokens of a sample, a multiple of block_length. block_length: L.
    rest_follows: whether the rest of a cut document lies at position 0 of the next sample even where it is shorter
    than L, so that a piece starts inside its document (start > 0) if and only if it goes on from the sample before.
    Raises ValueError for lengths or sizes that cannot be packed.
    """
    check_sizes(sequence_length, block_length)
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.min() < 2:
        document = int(lengths.argmin())
        raise ValueError(f"document {document} has {lengths[document]} ids; a document needs 2 for one prediction")
    packer = _Packer(sequence_length, block_length, rest_follows)
    for document, pairs in zip(np.asarray(order).tolist(), (lengths[order] - 1).tolist(), strict=True):
        packer.add(document, pairs)
    return _index(packer)


def _index(packer: _Packer) -> PackedIndex:
    rows = np.array(packer.placed, dtype=np.int64).reshape(-1, 4)
    rows = rows[np.argsort(rows[:, 3], kind="stable")]
    documents, starts, stops, positions = rows.T.copy()
    num_samples = -(-packer.next_free // packer.sequence_length)
    edges = np.arange(num_samples + 1, dtype=np.int64) * packer.sequence_length
    return PackedIndex(
        documents,
        starts,
        stops,
        positions % packer.sequence_length,
        np.searchsorted(positions, edges).astype(np.int64),
        packer.sequence_length,
        packer.block_length,
    )
