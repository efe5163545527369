"""Corpora of many shards, mixed in groups: exact coverage, one order for everybody, counts kept between starts."""

import itertools
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from em_megatron.data import stream as module
from em_megatron.data.manifest import DataError, Manifest
from em_megatron.data.sample_counts import SampleCounts
from em_megatron.data.shards import ShardReader
from em_megatron.data.stream import TokenStream
from em_megatron.data.writing import EncodedDocument, write_shard
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
        assert stream.epochs(stop) == stream.epochs(first) + 1
        shares = np.diff([stream.epochs(n) for n in range(first, stop + 1)]) * (stop - first)
        assert shares.min() > 0.2
        assert shares.max() < 4  # about evenly over the samples
    assert stream.epochs(firsts[2]) == 2


def test_a_group_reads_its_shards_only_and_epochs_mix_other_ones() -> None:
    stream, together = make_stream(2), []
    firsts = stream.reader.first_documents
    for number in range(8):
        documents = stream.group(number).packed.documents
        shards = set((np.searchsorted(firsts, documents, side="right") - 1).tolist())
        assert len(shards) in (1, 2)
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
    kept = path.read_text()
    counts = json.loads(kept)["counts"]
    packed: list[int] = []
    pack = module.pack
    monkeypatch.setattr(module, "pack", lambda *a, **k: packed.append(1) or pack(*a, **k))

    def packs() -> int:
        packed.clear()
        found = make_stream(2, counts=tmp_path).sample(299)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        return len(packed)

    assert packs() == 1  # its own group
    other = json.dumps(json.loads(kept) | {"counts": [count - 1 for count in counts]})
    for damage in ("", kept[: len(kept) // 2], '{"a": 1}', "[1, -2]", other):
        path.write_text(damage)
        assert packs() == len(counts)
        assert path.read_text() == kept
    assert make_stream(3, counts=tmp_path).sample(0)["tokens"].shape == (T,)
    assert make_stream(2, counts=tmp_path, seed=2).sample(99) is not None
    assert len(list(tmp_path.glob("samples-*.json"))) == 3


def test_counting_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    whole = make_stream(2)
    expected = [whole._counts.get(number, whole._count) for number in range(12)]

    def killed_at_seven(number: int) -> int:
        if number == 7:
            raise KeyboardInterrupt
        return expected[number]

    counts = SampleCounts(tmp_path, ["key"])
    with pytest.raises(KeyboardInterrupt):
        counts.get(11, killed_at_seven)
    again, counted = SampleCounts(tmp_path, ["key"]), []
    assert again.get(11, lambda number: counted.append(number) or expected[number]) == expected[11]
    assert counted == [7, 8, 9, 10, 11]
    assert SampleCounts(tmp_path, ["another key"]).counts == []


def test_counts_of_another_corpus_under_this_ones_name_are_noticed(tmp_path: Path) -> None:
    make_stream(2, counts=tmp_path).sample(299)
    wrong = make_stream(2, counts=tmp_path)
    wrong._counts.counts[0] -= 1
    with pytest.raises(DataError, match=r"samples-.*\.json holds other sample counts than the corpus has; delete it"):
        wrong.sample(0)


def test_counts_that_cannot_be_kept_are_counted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    expected = make_stream(2).sample(200)["tokens"].tolist()
    assert make_stream(2, counts=tmp_path / "file" / "folder").sample(200)["tokens"].tolist() == expected


def join_readers() -> None:
    for thread in threading.enumerate():
        if thread.name == "data-read-ahead":
            thread.join()


def test_the_next_group_is_made_in_the_background() -> None:
    stream = make_stream(2)
    stream.sample(0)
    size = len(stream.group(0).order)
    join_readers()
    assert 1 not in stream._groups
    stream.sample(size - 1)
    join_readers()
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


def test_groups_are_as_equal_as_can_be() -> None:
    stream = TokenStream(CountingReader([5] * 99, 33), T, L, 0, pad_id=-1, shuffle_shards=32)
    assert [len(stream._shards(0, place)) for place in range(stream.groups_per_epoch)] == [16, 17]


def test_a_process_ends_while_shards_are_fetched(tmp_path: Path) -> None:
    """Reading ahead waits for servers in threads; a run that has saved does not wait for them."""
    write_corpus(tmp_path, LENGTHS, shard_tokens=100)
    code = f"""
import time
from pathlib import Path
from em_megatron.data.shards import ShardReader
from em_megatron.data.sources import FolderSource
from em_megatron.data.stream import TokenStream
from em_megatron.data.writing import EncodedDocument, write_shard

class Slow(FolderSource):
    def path(self, name, size, sha256):
        if name.endswith(".tar") and name != self.first:
            self.first = self.first or name
            if name != self.first:
                time.sleep(60)
        return super().path(name, size, sha256)

source = Slow(Path({str(tmp_path)!r}))
source.first = ""
stream = TokenStream(ShardReader(source), 8, 4, 1, 0)
print(stream._read_ahead(0, False))
time.sleep(0.5)
"""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)
    assert time.monotonic() - started < 40


def test_a_document_of_50_million_tokens(tmp_path: Path) -> None:
    length, T, L = 50_000_003, 1 << 20, 1 << 16
    ids = np.arange(length, dtype=np.uint16)  # repeats itself, but says where it stands within 65,536
    documents = [EncodedDocument("long", ids.tobytes(), length), EncodedDocument("short", b"\2\0\3\0", 0)]
    shard = write_shard(tmp_path, "train-000000.tar", documents, "<u2")
    assert shard is not None
    Manifest("t" * 64, 65_536, "<u2", "s" * 64, {"train": (shard,)}).save(tmp_path)
    for slots in (0, 1):
        stream = TokenStream(ShardReader(tmp_path), T, L, 1, PAD, slots=slots)
        pairs, starts = 0, []
        for n in range(stream.num_samples()):
            sample = stream.sample(n)
            real = sample["segment_ids"] == 1
            pairs += int(sample["loss_mask"].sum())
            assert np.all((sample["labels"][real] - sample["tokens"][real]) % 65_536 == 1)
            starts.append(int(sample["history"]))
        assert pairs == length
        assert (max(starts) == 47 * T) == (slots == 1)


def test_no_shard_to_mix_is_refused() -> None:
    with pytest.raises(ValueError, match="mixed within 0 shards; give at least 1"):
        make_stream(0)
