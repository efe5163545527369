"""Placement rules: by hand on a page, and as properties of random corpora."""

import numpy as np
import pytest

from em_megatron.data.packing import MAX_OPEN_BLOCKS, PackedIndex, pack


def packed_in_order(lengths: list[int], sequence_length: int, block_length: int) -> PackedIndex:
    return pack(np.array(lengths), np.arange(len(lengths)), sequence_length, block_length)


def test_a_page_of_pieces() -> None:
    """T=12, L=4, so three blocks a sample. Documents of 6, 3, 1, 11 and 2 pairs:

    sample 0:  0 0 0 0 | 0 0 4 4 | 1 1 1 2      1, 2 and 4 are short; 2 fits best beside 1, 4 behind 0
    sample 1:  3 3 3 3 | 3 3 3 3 | 3 3 3 .      3 is long and starts at a block boundary
    """
    packed = packed_in_order([7, 4, 2, 12, 3], 12, 4)
    assert packed.pieces(0) == [(0, 0, 6, 0), (4, 0, 2, 6), (1, 0, 3, 8), (2, 0, 1, 11)]
    assert packed.pieces(1) == [(3, 0, 11, 0)]
    assert packed.num_samples == 2


def test_a_long_document_goes_on_in_the_next_samples() -> None:
    """T=8, L=4: 2 pairs, then 19 pairs cut to 4 + 8 + 4 (at block 0 of sample 2) and a rest of 3 that is short."""
    packed = packed_in_order([3, 20], 8, 4)
    assert packed.pieces(0) == [(0, 0, 2, 0), (1, 0, 4, 4)]
    assert packed.pieces(1) == [(1, 4, 12, 0)]
    assert packed.pieces(2) == [(1, 12, 19, 0)]
    assert packed.num_samples == 3
    assert packed.efficiency == pytest.approx(21 / 24)


def test_the_rest_of_a_cut_document_follows_where_it_must() -> None:
    """T=8, L=4. Documents of 1, 15, 1 and 2 pairs; 1 is cut to 4 + 8 and a rest of 3, which fits behind 0:

    as usual:  0 1 1 1 | 1 1 1 1    1 1 1 1 | 1 1 1 1    2 3 3 . | . . . .
    following: 0 3 3 . | 1 1 1 1    1 1 1 1 | 1 1 1 1    1 1 1 2 | . . . .
    """
    lengths, order = np.array([2, 16, 2, 3]), np.arange(4)
    usual = pack(lengths, order, 8, 4)
    assert usual.pieces(0) == [(0, 0, 1, 0), (1, 12, 15, 1), (1, 0, 4, 4)]
    assert usual.pieces(1) == [(1, 4, 12, 0)]
    assert usual.pieces(2) == [(2, 0, 1, 0), (3, 0, 2, 1)]
    following = pack(lengths, order, 8, 4, rest_follows=True)
    assert following.pieces(0) == [(0, 0, 1, 0), (3, 0, 2, 1), (1, 0, 4, 4)]
    assert following.pieces(1) == usual.pieces(1)
    assert following.pieces(2) == [(1, 12, 15, 0), (2, 0, 1, 3)]


def random_lengths(generator: np.random.Generator, count: int, block: int) -> np.ndarray:
    kinds = [
        generator.integers(2, block + 2, count),
        generator.integers(2, 4 * block, count),
        np.full(count, block + 1),
        np.full(count, block + 2),
        2 + generator.geometric(1 / (3 * block), count),
        generator.choice([2, block, block + 1, block + 2, 10 * block + 1, 97 * block], count),
    ]
    return np.maximum(2, kinds[int(generator.integers(len(kinds)))])


@pytest.mark.parametrize("rest_follows", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_rules_hold_for_random_documents(seed: int, rest_follows: bool) -> None:
    generator = np.random.default_rng(seed)
    L = int(generator.choice([1, 2, 3, 8, 17]))
    T = L * int(generator.integers(1, 7))
    lengths = random_lengths(generator, int(generator.integers(1, 600)), L)
    order = generator.permutation(len(lengths))
    packed = pack(lengths, order, T, L, rest_follows)

    seen = [np.zeros(length - 1, dtype=int) for length in lengths]
    for sample in range(packed.num_samples):
        end = 0
        for document, start, stop, position in packed.pieces(sample):
            seen[document][start:stop] += 1
            assert stop > start
            assert position >= end, "pieces overlap or are out of order"
            end = position + stop - start
            if stop - start >= L:
                assert position % L == 0, "a long piece starts inside a block"
                assert end == T or stop == lengths[document] - 1, "a long document was cut before the sample's end"
            else:
                assert position // L == (end - 1) // L, "a short piece straddles a block boundary"
        assert end <= T
        assert end > 0, "an empty sample"
    assert all(np.all(times == 1) for times in seen), "a pair is missing or comes twice"
    again = pack(lengths, order, T, L, rest_follows)
    for name in ("documents", "starts", "stops", "positions", "offsets"):
        assert np.array_equal(getattr(packed, name), getattr(again, name))
    assert packed.efficiency == pytest.approx((lengths - 1).sum() / (packed.num_samples * T))


@pytest.mark.parametrize("seed", range(60))
def test_what_follows_lies_at_position_0_of_the_next_sample(seed: int) -> None:
    generator = np.random.default_rng(seed)
    L = int(generator.choice([1, 2, 3, 8, 17]))
    T = L * int(generator.integers(1, 7))
    lengths = random_lengths(generator, int(generator.integers(1, 600)), L)
    packed = pack(lengths, generator.permutation(len(lengths)), T, L, rest_follows=True)
    before = (-1, 0)
    for sample in range(packed.num_samples):
        pieces = packed.pieces(sample)
        document, start, _, position = pieces[0]
        assert position == 0
        assert start % L == 0
        assert (start > 0) == ((document, start) == before)
        assert all(start == 0 for _, start, _, _ in pieces[1:]), "a rest does not lie at position 0"
        document, _, stop, _ = pieces[-1]
        before = (document, stop)


def test_only_rests_shorter_than_a_block_change_their_place() -> None:
    """T=16, L=4: the document of 16 pairs is cut to 8 + 8, so it lies the same whether or not its rest must follow."""
    lengths = np.array([5, 3, 2, 9, 4, 4, 17, 2, 3])
    usual, following = (pack(lengths, np.arange(9), 16, 4, follows) for follows in (False, True))
    assert usual.pieces(2)[0] == (6, 8, 16, 0)
    assert usual.num_samples == following.num_samples == 3
    assert [usual.pieces(s) for s in range(3)] == [following.pieces(s) for s in range(3)]


def test_short_documents_fill_the_gaps_of_long_ones() -> None:
    """Documents of 1.5 blocks leave half a block each, which documents of a quarter block fill: no padding at all."""
    long, short = 24 + 1, 4 + 1
    packed = packed_in_order([long] * 40 + [short] * 80, 64, 16)
    assert packed.efficiency == 1.0


def test_many_short_documents_pack_tightly() -> None:
    lengths = np.random.default_rng(0).integers(2, 65, 20_000)
    packed = pack(lengths, np.arange(len(lengths)), 512, 128)
    # Best fit over MAX_OPEN_BLOCKS blocks of pieces up to half a block: measured 0.998.
    assert MAX_OPEN_BLOCKS == 256
    assert packed.efficiency > 0.99


@pytest.mark.parametrize(
    ("lengths", "sizes", "reason"),
    [
        ([5], (10, 4), "sequence_length 10 is not a multiple of block_length 4"),
        ([5], (0, 4), "is not a multiple"),
        ([5], (8, 0), "is not a multiple"),
        ([5, 1], (8, 4), "document 1 has 1 ids"),
    ],
)
def test_refusals(lengths: list[int], sizes: tuple[int, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        packed_in_order(lengths, *sizes)


def test_no_documents_are_no_samples() -> None:
    packed = packed_in_order([], 8, 4)
    assert packed.num_samples == 0
    assert packed.efficiency == 0.0
