"""Corpora of many shards, mixed in groups: exact coverage, one order for everybody, counts kept between starts."""

import itertools
import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from em_megatron.data import stream as module
from em_megatron.data.shards import ShardReader
from em_megatron.data.stream import TokenStream
from tests.data.handmade import PAD, CountingReader, write_corpus

T, L = 8, 4
LENGTHS = [int(n) for n in np.random.default_rng(3).integers(2, 40, 60)]
SHARDS = 7


def make_stream(shuffle_shards: int, slots: int = 0, counts: Path | None = None, seed: int = 1) -> TokenStream:
    reader = CountingReader(LENGTHS, SHARDS)
    return TokenStream(reader, T, L, seed, pad_id=-1, slots=slots, shuffle_shards=shuffle_shards, counts_folder=counts)


def pairs(stream: TokenStream, samples: range) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for n in samples:
        sample = stream.sample(n)
        real = sample["loss_mask"] == 1
        found.update(zip(sample["tokens"][real].tolist(), sample["labels"][real].tolist(), strict=True))
    return found


def first_of_epochs(stream: TokenStream, epochs: int) -> list[int]:
    """The first sample of epochs 0, 1, ..., found by walking."""
    firsts, n = [0], 0
    while len(firsts) <= epochs:
        n += 1
        if stream.locate(n)[0] == len(firsts) * stream.groups_per_epoch:
            firsts.append(n)
    return firsts


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("shuffle_shards", [1, 2, 3, 7, 50])
def test_every_epoch_holds_every_pair_once(shuffle_shards: int, slots: int) -> None:
    stream = make_stream(shuffle_shards, slots)
    assert stream.groups_per_epoch == -(-SHARDS // shuffle_shards)
    expected: Counter[tuple[int, int]] = Counter()
    for document, length in enumerate(LENGTHS):
        expected.update(itertools.pairwise(stream.reader.tokens(document, 0, length).tolist()))
    firsts = first_of_epochs(stream, 3)
    for first, stop in itertools.pairwise(firsts):
        assert pairs(stream, range(first, stop)) == expected
        assert stream.epochs(first).is_integer()
        assert stream.epochs(first) < stream.epochs(first + 1) < stream.epochs(stop)
    assert stream.epochs(firsts[2]) == 2


def test_a_group_reads_its_shards_only_and_epochs_mix_other_ones() -> None:
    stream, together = make_stream(2), []
    firsts = stream.reader.first_documents
    for number in range(8):
        documents = stream.group(number).packed.documents
        shards = set((np.searchsorted(firsts, documents, side="right") - 1).tolist())
        assert len(shards) == (1 if number % 4 == 3 else 2)
        together.append(shards)
    for epoch in (together[:4], together[4:]):
        assert sorted(itertools.chain(*epoch)) == list(range(SHARDS))
    assert together[:4] != together[4:]


def test_any_sample_first(tmp_path: Path) -> None:
    """The order does not depend on what was read before, nor on counts kept from another start."""
    whole = [make_stream(2).sample(n)["tokens"].tolist() for n in range(300)]
    for n in (299, 0, 77, 150):
        assert make_stream(2).sample(n)["tokens"].tolist() == whole[n]
        assert make_stream(2, counts=tmp_path).sample(n)["tokens"].tolist() == whole[n]


def test_counts_are_kept_and_a_damaged_file_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_stream(2, counts=tmp_path).sample(299)
    (path,) = tmp_path.glob("samples-*.json")
    counts = json.loads(path.read_text())
    packed: list[int] = []
    pack = module.pack
    monkeypatch.setattr(module, "pack", lambda *a, **k: packed.append(1) or pack(*a, **k))

    def packs() -> int:
        packed.clear()
        found = make_stream(2, counts=tmp_path).sample(299)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        return len(packed)

    assert packs() == 2  # its own group, and the first, by which a stream shows at its start that it can be packed
    for damage in ("", "[1, 2", '{"a": 1}', "[1, -2]"):
        path.write_text(damage)
        assert packs() >= len(counts)
        assert json.loads(path.read_text()) == counts
    assert make_stream(3, counts=tmp_path).sample(0)["tokens"].shape == (T,)
    assert make_stream(2, counts=tmp_path, seed=2).sample(99) is not None
    assert len(list(tmp_path.glob("samples-*.json"))) == 3


def test_the_next_group_is_made_in_the_background() -> None:
    stream = make_stream(2)
    size = len(stream.group(0).order)
    stream.sample(0)
    assert 1 not in stream._groups
    stream.sample(size - 1)
    for thread in threading.enumerate():
        if thread.name == "data-look-ahead":
            thread.join()
    assert stream._groups[1].done()
    assert stream.sample(size)["tokens"].tolist() == make_stream(2).sample(size)["tokens"].tolist()


def test_real_shards_in_groups(tmp_path: Path) -> None:
    """The same documents from files: whatever is open at a time, and with one shard at hand."""
    write_corpus(tmp_path, LENGTHS, shard_tokens=100)
    readers = [ShardReader(tmp_path), ShardReader(tmp_path, shards_kept=1)]
    streams = [TokenStream(reader, T, L, 1, PAD, shuffle_shards=4) for reader in readers]
    assert streams[0].groups_per_epoch > 2
    for n in range(300):
        one, other = (stream.sample(n) for stream in streams)
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert len(readers[1]._open) == 1


def test_no_shard_to_mix_is_refused() -> None:
    with pytest.raises(ValueError, match="mixed within 0 shards; give at least 1"):
        make_stream(0)
