"""Batches from worker processes: the same ones in the same order, whatever happens to a worker."""

import itertools
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from em_megatron.data.loading import ahead, load
from em_megatron.data.manifest import DataError
from em_megatron.data.shards import ShardReader
from em_megatron.data.stream import Batch, RankBatches, Sample, TokenStream
from tests.data.handmade import PAD, write_corpus

LENGTHS = [7, 4, 30, 2, 3, 12, 9, 5, 5, 21, 6] * 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, LENGTHS, shard_tokens=60)
    return folder


def make_stream(corpus: Path) -> TokenStream:
    return TokenStream(ShardReader(corpus), 8, 4, seed=1, pad_id=PAD, shuffle_shards=2)


def take(corpus: Path, count: int, workers: int, consumed: int = 0, rank: int = 0, ranks: int = 1) -> list[Batch]:
    batches = load(RankBatches(make_stream(corpus), consumed, 2, rank, ranks), workers, prefetch=2)
    found = []
    for batch, after in itertools.islice(ahead(batches, 2), count):
        consumed += 2 * ranks
        assert after == consumed
        found.append(batch)
    return found


def same(ones: list[Batch], others: list[Batch]) -> bool:
    return all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(ones, others, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_same_in_the_same_order(corpus: Path, workers: int) -> None:
    before = torch.get_rng_state()
    assert same(take(corpus, 40, workers, consumed=6), take(corpus, 40, 0, consumed=6))
    assert torch.equal(torch.get_rng_state(), before)  # of dropout


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_workers_share_the_samples_of_one(corpus: Path, ranks: int) -> None:
    alone = [batch["tokens"] for batch in take(corpus, 4 * ranks, 0)]
    shared = [take(corpus, 4, 1, 0, rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat([shared[r][i]["tokens"] for i in range(4) for r in range(ranks)]), torch.cat(alone))


class Killing:
    """Samples of a stream; the process that makes a certain one is killed, until a file says that it was."""

    def __init__(self, corpus: Path, at: int, note: Path | None) -> None:
        self.stream, self.at, self.note, self.main = make_stream(corpus), at, note, os.getpid()

    def sample(self, n: int) -> Sample:
        assert os.getpid() != self.main
        if n == self.at and not (self.note and self.note.exists()):
            if self.note:
                self.note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.stream.sample(n)


def test_a_killed_worker_is_replaced_and_nothing_lost(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batches = load(RankBatches(Killing(corpus, 11, tmp_path / "killed"), 0, 2, 0, 1), workers=2, prefetch=2)
    with caplog.at_level(logging.WARNING):
        found = [batch for batch, _ in itertools.islice(ahead(batches, 1), 20)]
    assert same(found, take(corpus, 20, 0))
    assert "a data worker died" in caplog.text


def test_workers_that_die_again_and_again_end_the_run(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("em_megatron.data.loading.RESTARTS", 0)
    batches = ahead(load(RankBatches(Killing(corpus, 3, None), 0, 2, 0, 1), workers=1, prefetch=1), 1)
    with pytest.raises(DataError, match=r"die again and again .*give a smaller data\.workers"):
        list(itertools.islice(batches, 20))


def test_a_damaged_shard_is_named_through_a_worker(corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path, LENGTHS, shard_tokens=60)
    stream = make_stream(tmp_path)
    shard = tmp_path / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[1600] ^= 1
    shard.write_bytes(content)
    batches = ahead(load(RankBatches(stream, 0, 2, 0, 1), workers=1, prefetch=1), 1)
    with pytest.raises(DataError, match=r"shard file train-000001\.tar .* was altered") as caught:
        list(itertools.islice(batches, 60))
    assert "Traceback" not in str(caught.value)


class Broken:
    """Samples that cannot be made, by a fault of the program."""

    def sample(self, n: int) -> Sample:
        raise RuntimeError("a fault in a worker's program")


def test_a_fault_of_the_program_is_not_taken_for_a_death() -> None:
    batches = ahead(load(RankBatches(Broken(), 0, 2, 0, 1), workers=1, prefetch=1), 1)
    with pytest.raises(RuntimeError, match="a fault in a worker's program"):
        next(batches)


STOPPED = """
import os, signal, sys
from itertools import islice
from pathlib import Path
from tests.data.test_loading import make_stream, same, take
from em_megatron.data.loading import ahead, load
from em_megatron.data.stream import RankBatches

if __name__ == "__main__":
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    corpus = Path(sys.argv[1])
    batches = ahead(load(RankBatches(make_stream(corpus), 0, 2, 0, 1), workers=2, prefetch=2), 1)
    found = []
    for batch, _ in islice(batches, 40):
        found.append(batch)
        if len(found) in (4, 14):
            os.killpg(0, signal.SIGUSR1 if len(found) == 4 else signal.SIGTERM)
    assert same(found, take(corpus, 40, 0))
    batches.close()
    print("all there")
"""


def test_signals_to_the_ranks_of_a_node_spare_the_workers(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "stopped.py"), str(corpus)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "all there", done.stderr
    assert "died" not in done.stderr
    assert "Traceback" not in done.stderr


def test_closing_ends_the_workers(corpus: Path) -> None:
    before = set(torch.multiprocessing.active_children())
    batches = ahead(load(RankBatches(make_stream(corpus), 0, 2, 0, 1), workers=2, prefetch=2), 2)
    next(batches)
    workers = set(torch.multiprocessing.active_children()) - before
    assert len(workers) == 2
    batches.close()
    for worker in workers:
        worker.join(20)
    assert not any(worker.is_alive() for worker in workers)
