"""Samples a person can read, and an order that depends on nothing but the seed and the sample number."""

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from em_megatron.data.loading import ahead, load
from em_megatron.data.order import permutation
from em_megatron.data.shards import ShardReader
from em_megatron.data.stream import RankBatches, TokenStream
from tests.data.handmade import PAD, write_corpus

LENGTHS = [7, 4, 30, 2, 3, 12, 9, 5, 5, 21, 6]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, LENGTHS, shard_tokens=30)
    return ShardReader(folder)


def make_stream(reader: ShardReader, seed: int = 1, shuffle: bool = True, slots: int = 0) -> TokenStream:
    return TokenStream(reader, sequence_length=8, block_length=4, seed=seed, pad_id=PAD, shuffle=shuffle, slots=slots)


def test_a_sample_a_person_can_read(tmp_path: Path) -> None:
    """T=8, L=4. Document 0 has 6 pairs; document 1 has 9, of which 8 fill sample 1 and 1 goes behind document 0."""
    write_corpus(tmp_path, [7, 10])
    stream = make_stream(ShardReader(tmp_path), shuffle=False)
    first, second = stream.sample(0), stream.sample(1)
    assert stream.num_samples() == 2
    assert first["tokens"].tolist() == [2, 1, 2, 3, 4, 5, 108, PAD]
    assert first["labels"].tolist() == [1, 2, 3, 4, 5, 3, 3, PAD]
    assert first["loss_mask"].tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
    assert first["segment_ids"].tolist() == [1, 1, 1, 1, 1, 1, 2, 0]
    assert first["positions"].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert second["tokens"].tolist() == [2, 101, 102, 103, 104, 105, 106, 107]
    assert second["labels"].tolist() == [101, 102, 103, 104, 105, 106, 107, 108]
    assert {name: (array.dtype.name, array.shape) for name, array in first.items()} == {
        "tokens": ("int64", (8,)),
        "labels": ("int64", (8,)),
        "loss_mask": ("float32", (8,)),
        "segment_ids": ("int32", (8,)),
        "positions": ("int32", (8,)),
        "history": ("int64", ()),
        "continues": ("bool", ()),
        "slot": ("int64", ()),
    }


def test_the_order_of_a_run_without_slots_stays(reader: ShardReader) -> None:
    """A golden epoch and the start of the next one: a change here would give running trainings other data."""
    stream = make_stream(reader)
    samples = [stream.sample(n) for n in range(len(GOLDEN_TOKENS))]
    assert [sample["tokens"].tolist() for sample in samples] == GOLDEN_TOKENS
    assert all(sample["history"] == sample["slot"] == 0 and not sample["continues"] for sample in samples)
    assert [stream.num_samples(0), stream.num_samples(1)] == [12, 12]


GOLDEN_TOKENS = [
    [2, 1001, 1002, 1003, 1004, 2, 101, 102],
    [204, 205, 206, 207, 208, 209, 210, 211],
    [908, 909, 910, 911, 912, 913, 914, 915],
    [2, 501, 502, 503, 504, 505, 506, 507],
    [4, 5, PAD, PAD, 2, 801, 802, 803],
    [212, 213, 214, 215, 216, 217, 218, 219],
    [220, 221, 222, 223, 224, 225, 226, 227],
    [2, 901, 902, 903, 904, 905, 906, 907],
    [2, 601, 602, 603, 604, 605, 606, 607],
    [916, 917, 918, 919, 2, 201, 202, 203],
    [508, 509, 510, PAD, 2, 1, 2, 3],
    [228, 2, 401, 2, 2, 701, 702, 703],
    [220, 221, 222, 223, 224, 225, 226, 227],
    [916, 917, 918, 919, 2, 801, 802, 803],
]


def pairs_of(stream: TokenStream, epoch: int) -> Counter[tuple[int, int]]:
    first = sum(stream.num_samples(e) for e in range(epoch))
    found: Counter[tuple[int, int]] = Counter()
    for n in range(first, first + stream.num_samples(epoch)):
        sample = stream.sample(n)
        real = sample["loss_mask"] == 1
        assert np.array_equal(real, sample["segment_ids"] > 0)
        assert np.all(sample["tokens"][~real] == PAD)
        found.update(zip(sample["tokens"][real].tolist(), sample["labels"][real].tolist(), strict=True))
    return found


def test_every_epoch_holds_every_pair_once(reader: ShardReader) -> None:
    expected: Counter[tuple[int, int]] = Counter()
    for document in range(len(reader)):
        expected.update(itertools.pairwise(reader.tokens(document).tolist()))
    stream = make_stream(reader)
    for epoch in range(4):
        assert pairs_of(stream, epoch) == expected
    validation: Counter[tuple[int, int]] = Counter()
    for sample in stream.validation_samples():
        real = sample["loss_mask"] == 1
        validation.update(zip(sample["tokens"][real].tolist(), sample["labels"][real].tolist(), strict=True))
    assert validation == expected


def test_epochs_differ_and_are_functions_of_the_seed(reader: ShardReader) -> None:
    one, same, other = make_stream(reader), make_stream(reader), make_stream(reader, seed=2)
    count = 5 * one.num_samples(0)
    run = [one.sample(n)["tokens"].tolist() for n in range(count)]
    assert run == [same.sample(n)["tokens"].tolist() for n in reversed(range(count))][::-1]
    assert run != [other.sample(n)["tokens"].tolist() for n in range(count)]
    starts = np.cumsum([0] + [one.num_samples(epoch) for epoch in range(3)])
    epochs = [run[a:b] for a, b in itertools.pairwise(starts.tolist())]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [one.locate(int(start)) for start in starts] == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_validation_is_in_the_corpus_order(reader: ShardReader) -> None:
    shuffled, plain = make_stream(reader), make_stream(reader, shuffle=False)
    for n, sample in enumerate(shuffled.validation_samples()):
        assert all(np.array_equal(sample[name], plain.sample(n)[name]) for name in sample)
    assert n == plain.num_samples() - 1


def test_the_order_does_not_depend_on_numpy_version() -> None:
    """A golden order: a change here means that running trainings would silently see other data after an update."""
    assert permutation(10, 1234, 0, 0).tolist() == GOLDEN
    assert sorted(permutation(1000, 5, 1).tolist()) == list(range(1000))


GOLDEN = [5, 6, 3, 9, 7, 4, 1, 2, 8, 0]


def take(stream: TokenStream, consumed: int, steps: int, size: int, rank: int, ranks: int) -> list[torch.Tensor]:
    """The rows of `steps` microbatches, each [size, 5 T + 3]: all that a sample holds, side by side."""
    found = []
    for batch, after in itertools.islice(load(RankBatches(stream, consumed, size, rank, ranks)), steps):
        consumed += size * ranks
        assert after == consumed
        assert batch["tokens"].shape == (size, 8)
        assert batch["history"].shape == batch["continues"].shape == batch["slot"].shape == (size,)
        found.append(torch.cat([batch[name].double().view(size, -1) for name in sorted(batch)], dim=1))
    return found


@pytest.mark.parametrize("slots", [0, 4, 16])
@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (4, 4)])
def test_same_samples_for_every_data_parallel_size(reader: ShardReader, size: int, ranks: int, slots: int) -> None:
    """Two optimizer steps of 16 samples: one below the other, the ranks' rows are samples 0, 1, 2, ..."""
    steps = 32 // (size * ranks)
    per_rank = [take(make_stream(reader, slots=slots), 0, steps, size, rank, ranks) for rank in range(ranks)]
    rows = torch.cat([per_rank[rank][step] for step in range(steps) for rank in range(ranks)])
    expected = torch.cat(take(make_stream(reader, slots=slots), 0, 32, 1, 0, 1))
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("slots", [0, 4])
def test_resume_is_exact_at_every_sample_even_with_another_size(reader: ShardReader, slots: int) -> None:
    whole = torch.cat(take(make_stream(reader, slots=slots), 0, 40, 1, 0, 1))
    for consumed in range(32):
        resumed = [take(make_stream(reader, slots=slots), consumed, 2, 2, rank, 2) for rank in range(2)]
        rows = torch.cat([resumed[rank][step] for step in range(2) for rank in range(2)])
        assert torch.equal(rows, whole[consumed : consumed + 8])


@pytest.mark.parametrize("arguments", [(-1, 1, 0, 1), (0, 0, 0, 1), (0, 1, 1, 1), (0, 1, -1, 2), (0, 1, 0, 0)])
def test_impossible_batches_are_refused_at_once(reader: ShardReader, arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot batch with consumed_samples"):
        RankBatches(make_stream(reader), *arguments)


def test_other_refusals(reader: ShardReader) -> None:
    with pytest.raises(ValueError, match="the data seed is -1"):
        make_stream(reader, seed=-1)
    with pytest.raises(ValueError, match="the stream has -1 slots; give the global batch size, or 0"):
        make_stream(reader, slots=-1)
    with pytest.raises(ValueError, match="numbered from 0"):
        make_stream(reader).sample(-1)
    with pytest.raises(ValueError, match="not a multiple"):
        TokenStream(reader, 10, 4, 0, PAD)
    with pytest.raises(ValueError, match="prefetch depth is 0"):
        next(ahead(iter([1]), 0))


def test_prefetch_gives_the_same_and_resumes_from_what_was_used(reader: ShardReader) -> None:
    plain = load(RankBatches(make_stream(reader), 3, 2, 0, 2))
    prefetched = ahead(load(RankBatches(make_stream(reader), 3, 2, 0, 2)), depth=4)
    for _ in range(9):
        (expected, after), (batch, found) = next(plain), next(prefetched)
        assert found == after
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    prefetched.close()
    assert not any(thread.name == "data-prefetch" for thread in threading.enumerate())
    resumed = load(RankBatches(make_stream(reader), found, 2, 0, 2))
    assert torch.equal(next(resumed)[0]["tokens"], next(plain)[0]["tokens"])


def test_prefetch_raises_the_source_error_in_its_turn() -> None:
    def source() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("disk gone")

    prefetched = ahead(source(), depth=8)
    assert [next(prefetched), next(prefetched)] == [1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(prefetched)
    assert list(ahead(iter(range(50)), depth=2)) == list(range(50))


def test_validation_samples_are_spread_and_shared_out(tmp_path: Path) -> None:
    write_corpus(tmp_path, [81] * 10)
    stream = TokenStream(ShardReader(tmp_path), sequence_length=80, block_length=16, seed=0, pad_id=PAD)
    every = [int(sample["tokens"][1]) for sample in stream.validation_samples()]
    assert every == [100 * document + 1 for document in range(10)]
    assert [int(sample["tokens"][1]) for sample in stream.validation_samples(4)] == [1, 201, 501, 701]
    shared = [[int(s["tokens"][1]) for s in stream.validation_samples(5, rank, 2)] for rank in range(2)]
    assert shared == [[1, 401, 801], [201, 601]]
    assert [int(sample["tokens"][1]) for sample in stream.validation_samples(99)] == every
