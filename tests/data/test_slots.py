"""Where memory is carried, a slot of the global batch reads its documents in order, sample by sample."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from em_megatron.data.loading import load
from em_megatron.data.order import PADDING, slot_order
from em_megatron.data.shards import ShardReader
from em_megatron.data.stream import RankBatches, Sample, TokenStream
from tests.data.handmade import PAD, SPACING, CountingReader, write_corpus

T, L = 12, 4
CORPORA = {
    "shorter than a block": [2, 3, 4, 2, 3, 3, 4, 2, 4, 4, 3],
    "exactly a block": [L + 1] * 13,
    "exactly a sample": [T + 1] * 7,
    "one document over many samples": [23 * T + L + 1],
    "two documents over many samples, rests shorter than a block": [15 * T + 2, 9 * T + L],
    "rests shorter than a block": [T + 2, 2 * T + 3, T + L, 2, T + 3, 3, 3 * T + 2] * 3,
    "one short document": [3],
    "a bit of everything": [7, 4, 30, 2, 3, 12, 9, 5, 5, 21, 6, 7 * T + 2, 13, 14, 4 * T + 1, 2, 100],
    "many": [2 + (k * k * 37 + k) % 61 for k in range(150)],
}


def make_stream(lengths: list[int], slots: int, seed: int = 3, shuffle: bool = True) -> TokenStream:
    return TokenStream(CountingReader(lengths), T, L, seed, pad_id=-1, shuffle=shuffle, slots=slots)


def read_epoch(stream: TokenStream, epoch: int) -> list[list[Sample]]:
    """[round][slot]: the samples of an epoch, which begins where the rounds before it end."""
    G = stream.slots
    rounds = [-(-stream.num_samples(e) // G) for e in range(epoch + 1)]
    first = G * sum(rounds[:epoch])
    return [[stream.sample(first + r * G + slot) for slot in range(G)] for r in range(rounds[epoch])]


def pieces_of(sample: Sample) -> list[tuple[int, int, int]]:
    """(document, start, stop) of each piece, read from the sample's ids; the rest of it has to be padding."""
    segments = sample["segment_ids"]
    assert np.array_equal(sample["loss_mask"], segments > 0)
    assert np.all(sample["tokens"][segments == 0] == -1)
    found = []
    for segment in range(1, segments.max() + 1):
        tokens, labels = sample["tokens"][segments == segment], sample["labels"][segments == segment]
        document, start = divmod(int(tokens[0]), SPACING)
        assert np.array_equal(tokens, SPACING * document + np.arange(start, start + len(tokens)))
        assert np.array_equal(labels, tokens + 1)
        found.append((document, start, start + len(tokens)))
    return found


def test_slots_a_person_can_read(tmp_path: Path) -> None:
    """T=8, L=4, documents of 27, 1 and 9 pairs in five samples; slot 0 reads two of them, slot 1 three:

    slot 0:  0 0 0 0 | 0 0 0 0     0 0 0 0 | 0 0 0 0     . . . . | . . . .
    slot 1:  0 0 0 0 | 0 0 0 0     0 0 0 1 | 2 2 2 2     2 2 2 2 | 2 . . .
    """
    write_corpus(tmp_path, [28, 2, 10])
    stream = TokenStream(ShardReader(tmp_path), 8, 4, seed=0, pad_id=PAD, shuffle=False, slots=2)
    samples = [stream.sample(n) for n in range(6)]
    assert stream.num_samples() == 5
    assert [sample["tokens"].tolist() for sample in samples] == [
        [2, 1, 2, 3, 4, 5, 6, 7],
        [16, 17, 18, 19, 20, 21, 22, 23],
        [8, 9, 10, 11, 12, 13, 14, 15],
        [24, 25, 26, 2, 2, 201, 202, 203],
        [PAD] * 8,
        [204, 205, 206, 207, 208, PAD, PAD, PAD],
    ]
    assert [int(sample["slot"]) for sample in samples] == [0, 1, 0, 1, 0, 1]
    assert [int(sample["history"]) for sample in samples] == [0, 0, 8, 8, 0, 4]
    assert [bool(sample["continues"]) for sample in samples] == [True, True, False, True, False, False]
    assert samples[4]["loss_mask"].sum() == samples[4]["segment_ids"].sum() == 0
    assert [stream.locate(n) for n in (0, 5, 6, 11, 12)] == [(0, 0), (0, 5), (1, 0), (1, 5), (2, 0)]


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("corpus", CORPORA)
def test_every_epoch_holds_every_pair_once(corpus: str, slots: int) -> None:
    lengths = CORPORA[corpus]
    stream = make_stream(lengths, slots)
    everything = {(d, k) for d, length in enumerate(lengths) for k in range(length - 1)}
    for epoch in range(3):
        pieces = [piece for row in read_epoch(stream, epoch) for sample in row for piece in pieces_of(sample)]
        seen = Counter((document, k) for document, start, stop in pieces for k in range(start, stop))
        assert set(seen) == everything
        assert set(seen.values()) == {1}


def follow(samples: list[Sample]) -> None:
    """Walks one slot through an epoch and counts, piece by piece, what it has read of its last document."""
    last, read, promised = (-1, 0), 0, False  # (document, stop) of the last piece and the pairs read of that document
    for number, sample in enumerate(samples):
        pieces = pieces_of(sample)
        goes_on = bool(pieces) and pieces[0][:2] == last
        history = int(sample["history"])
        assert history == (read if goes_on else 0)
        assert history % L == 0
        assert promised == goes_on == (history > 0)
        for at, (document, start, stop) in enumerate(pieces):
            assert start == 0 or (at == 0 and (goes_on or number == 0)), "a document goes on without its memory"
            read = stop - start + (history if at == 0 else 0)
            last = (document, stop)
        promised = bool(sample["continues"])
    assert not promised


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("corpus", CORPORA)
def test_a_slot_carries_the_document_it_goes_on_with(corpus: str, slots: int) -> None:
    stream = make_stream(CORPORA[corpus], slots)
    for epoch in range(3):
        rows = read_epoch(stream, epoch)
        assert all(int(sample["slot"]) == slot for row in rows for slot, sample in enumerate(row))
        assert all(sample["history"] == 0 for sample in rows[0])
        for slot in range(slots):
            follow([row[slot] for row in rows])


@pytest.mark.parametrize("seed", range(20))
def test_random_corpora_are_followed(seed: int) -> None:
    generator = np.random.default_rng(seed)
    longest = int(generator.choice([L, 3 * L, 2 * T, 20 * T]))
    lengths = generator.integers(2, longest + 2, int(generator.integers(1, 40))).tolist()
    stream = make_stream(lengths, int(generator.integers(1, 9)), seed)
    for slot in range(stream.slots):
        follow([row[slot] for row in read_epoch(stream, 1)])


def test_documents_longer_than_samples_have_the_whole_history() -> None:
    """A document of 24 samples: one slot reads all of it, of three slots each reads a third from an empty memory."""
    lengths = CORPORA["one document over many samples"]
    one = [row[0] for row in read_epoch(make_stream(lengths, 1), 0)]
    assert [int(sample["history"]) for sample in one] == [T * k for k in range(24)]
    three = read_epoch(make_stream(lengths, 3), 0)
    assert [[int(sample["history"]) for sample in row] for row in three] == [[T * k] * 3 for k in range(8)]
    assert [[bool(sample["continues"]) for sample in row] for row in three] == [[True] * 3] * 7 + [[False] * 3]


def test_slots_read_runs_of_the_packing_order() -> None:
    assert slot_order(7, 3).reshape(-1, 3).tolist() == [[0, 2, 4], [1, 3, 5], [PADDING, PADDING, 6]]
    assert slot_order(6, 3).reshape(-1, 3).tolist() == [[0, 2, 4], [1, 3, 5]]
    assert slot_order(2, 5).tolist() == [PADDING, PADDING, 0, PADDING, 1]
    assert slot_order(0, 5).tolist() == []
    for samples, slots in itertools.product(range(1, 40), range(1, 12)):
        rows = slot_order(samples, slots).reshape(-1, slots)
        read = rows.T[rows.T != PADDING]
        assert read.tolist() == list(range(samples))
        assert PADDING not in rows[:-1], "a slot is out of samples before the last round"


def test_epochs_follow_on_and_differ() -> None:
    stream, same = (make_stream(CORPORA["many"], 4) for _ in range(2))
    lengths = [4 * -(-stream.num_samples(epoch) // 4) for epoch in range(4)]
    starts = [0, *itertools.accumulate(lengths)]
    assert [stream.locate(start) for start in starts] == [(epoch, 0) for epoch in range(5)]
    assert stream.locate(starts[2] - 1) == (1, lengths[1] - 1)
    run = [stream.sample(n) for n in range(starts[3])]
    again = [same.sample(n) for n in reversed(range(starts[3]))][::-1]
    assert all(np.array_equal(one[name], two[name]) for one, two in zip(run, again, strict=True) for name in one)
    first, second = ([s["tokens"].tolist() for s in run[a:b]] for a, b in itertools.pairwise(starts[:3]))
    assert first != second


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (2, 2), (1, 4), (8, 1)])
def test_a_slot_stays_with_its_row_over_the_steps(size: int, ranks: int) -> None:
    """Steps of 8 samples: what a row of a microbatch of a rank promises, the same row finds one step later."""
    per_step = 8 // (size * ranks)
    for rank in range(ranks):
        batches = (batch for batch, _ in load(RankBatches(make_stream(CORPORA["many"], 8), 0, size, rank, ranks)))
        steps = [list(itertools.islice(batches, per_step)) for _ in range(30)]
        for before, after in itertools.pairwise(steps):
            for now, then in zip(before, after, strict=True):
                assert now["slot"].tolist() == then["slot"].tolist()
                assert now["continues"].tolist() == (then["history"] > 0).tolist()


def test_validation_is_the_same_with_slots() -> None:
    plain, slotted = (make_stream(CORPORA["a bit of everything"], slots) for slots in (0, 3))
    for expected, found in zip(plain.validation_samples(), slotted.validation_samples(), strict=True):
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert found["history"] == found["slot"] == 0
        assert not found["continues"]
