"""From documents to training batches, as a pure function of (seed, sample number).

    documents of epoch e, permuted by (seed, e)  ->  pack  ->  samples, permuted by (seed, e)  ->  sample n
    sample n of the run  ->  microbatches of every data-parallel rank  ->  torch tensors

Nothing depends on workers, ranks or what was read before, so the whole state of the loader is one integer,
`consumed_samples`. Tensor-, pipeline- and context-parallel peers of a data-parallel rank call with the same rank
and get the same samples.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from em_megatron.data.packing import PackedIndex, pack
from em_megatron.data.shards import ShardReader

Sample = dict[str, NDArray[Any]]
Batch = dict[str, torch.Tensor]

EPOCHS_KEPT = 2
DOCUMENT_ORDER, SAMPLE_ORDER = 0, 1


class Epoch(NamedTuple):
    """The packed samples of an epoch and the order [samples] they are visited in."""

    packed: PackedIndex
    order: NDArray[np.int64]


class TokenStream:
    """Samples of T = sequence_length tokens without end: epoch after epoch, each in its own order.

    reader: the documents. sequence_length, block_length: T and L in tokens, T a multiple of L. seed: of the order,
    at least 0. pad_id: fills the rest of a sample. shuffle: False keeps documents and samples in the corpus' order.
    Raises ValueError where T is not a multiple of L or the seed is negative.
    """

    def __init__(
        self,
        reader: ShardReader,
        sequence_length: int,
        block_length: int,
        seed: int,
        pad_id: int,
        shuffle: bool = True,
    ) -> None:
        if seed < 0:
            raise ValueError(f"the data seed is {seed}; give one of at least 0")
        self.reader = reader
        self.sequence_length = sequence_length
        self.block_length = block_length
        self.seed = seed
        self.pad_id = pad_id
        self.shuffle = shuffle
        self._epochs: OrderedDict[int, Epoch] = OrderedDict()
        self._first_samples = [0]  # of epoch 0, 1, ... as far as they were needed
        self._lock = threading.RLock()
        self.epoch(0)

    def epoch(self, number: int) -> Epoch:
        """The samples of epoch `number`; the last few are kept."""
        with self._lock:
            if number not in self._epochs:
                self._epochs[number] = self._make_epoch(number)
            self._epochs.move_to_end(number)
            found = self._epochs[number]
            if len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
            return found

    def _make_epoch(self, number: int) -> Epoch:
        documents = self._order(len(self.reader), number, DOCUMENT_ORDER)
        packed = pack(self.reader.document_lengths, documents, self.sequence_length, self.block_length)
        return Epoch(packed, self._order(packed.num_samples, number, SAMPLE_ORDER))

    def _order(self, count: int, epoch: int, purpose: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(count)
        return permutation(count, self.seed, epoch, purpose)

    def num_samples(self, epoch: int = 0) -> int:
        """Samples of an epoch; it varies a little with the order the documents are packed in."""
        return self.epoch(epoch).packed.num_samples

    def locate(self, n: int) -> tuple[int, int]:
        """(epoch, number within its order) of sample n. Epochs before it are packed once to count their samples."""
        if n < 0:
            raise ValueError(f"sample {n} does not exist; samples are numbered from 0")
        firsts = self._first_samples
        with self._lock:
            while firsts[-1] <= n:
                firsts.append(firsts[-1] + self.num_samples(len(firsts) - 1))
        epoch = int(np.searchsorted(firsts, n, side="right")) - 1
        return epoch, n - firsts[epoch]

    def sample(self, n: int) -> Sample:
        """Sample n of the run, a pure function of (corpus, T, L, seed, n). Every array is [T]:

        tokens int64, labels int64 (the next id of the same document), loss_mask float32 (0 on padding),
        segment_ids int32 (pieces 1, 2, ... by position; padding 0), positions int32 (from the start of the piece).
        """
        number, index = self.locate(n)
        epoch = self.epoch(number)
        return self._build(epoch.packed, int(epoch.order[index]))

    def validation_samples(
        self, count: int = 0, data_parallel_rank: int = 0, data_parallel_size: int = 1
    ) -> Iterator[Sample]:
        """Every sample of the corpus once, in the corpus' own order whatever `shuffle` says, as `sample` gives them.

        count: only so many, evenly spread over the corpus; 0 gives all. Of these, data-parallel rank r of n builds
        the r-th, (r+n)-th, ... and no other.
        """
        lengths = self.reader.document_lengths
        packed = pack(lengths, np.arange(len(lengths)), self.sequence_length, self.block_length)
        total = packed.num_samples
        wanted = min(count or total, total)
        for index in [i * total // wanted for i in range(wanted)][data_parallel_rank::data_parallel_size]:
            yield self._build(packed, index)

    def _build(self, packed: PackedIndex, index: int) -> Sample:
        T = self.sequence_length
        tokens = np.full(T, self.pad_id, dtype=np.int64)
        labels = np.full(T, self.pad_id, dtype=np.int64)
        loss_mask = np.zeros(T, dtype=np.float32)
        segment_ids = np.zeros(T, dtype=np.int32)
        positions = np.zeros(T, dtype=np.int32)
        for segment, (document, start, stop, position) in enumerate(packed.pieces(index), start=1):
            ids = self.reader.tokens(document, start, stop + 1)
            here = slice(position, position + stop - start)
            tokens[here] = ids[:-1]
            labels[here] = ids[1:]
            loss_mask[here] = 1.0
            segment_ids[here] = segment
            positions[here] = np.arange(stop - start)
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "segment_ids": segment_ids,
            "positions": positions,
        }

    def batches(
        self, consumed_samples: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
    ) -> Iterator[tuple[Batch, int]]:
        """Endless (batch, consumed_samples after it) for one data-parallel rank; arrays are [micro_batch_size, T].

        Row k of microbatch i on rank r is sample

            n = consumed_samples + i·micro_batch_size·data_parallel_size + r·micro_batch_size + k

        so microbatch i uses one contiguous run of samples over all ranks, and an optimizer step of G samples uses
        the same G samples for every data_parallel_size and micro_batch_size that divide it. To resume, pass the
        number that came with the last batch that was used.
        Raises ValueError for a rank or size that cannot be.
        """
        if consumed_samples < 0 or micro_batch_size < 1 or not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(
                f"cannot batch with consumed_samples {consumed_samples}, micro_batch_size {micro_batch_size}, "
                f"data-parallel rank {data_parallel_rank} of {data_parallel_size}: give counts of at least 0, 1 and "
                "a rank below the size"
            )
        return self._batches(consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size)

    def _batches(self, consumed: int, size: int, rank: int, ranks: int) -> Iterator[tuple[Batch, int]]:
        while True:
            first = consumed + rank * size
            consumed += size * ranks
            yield collate([self.sample(n) for n in range(first, first + size)]), consumed


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of range(count) that is a function of the key alone.

    numpy promises equal streams over its versions for bit generators but not for Generator.permutation, and a run
    may be resumed under a newer numpy: so raw 64-bit words are sorted.
    """
    words = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(words, kind="stable")


def collate(samples: list[Sample]) -> Batch:
    """Stacks samples of [T] to tensors of [len(samples), T]."""
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def prefetch[Item](items: Iterator[Item], depth: int) -> Generator[Item]:
    """The same items in the same order, with up to `depth` of them made ahead by one background thread.

    An exception of the source is raised here in its turn. The thread ends when the returned iterator is closed.
    """
    if depth < 1:
        raise ValueError(f"prefetch depth is {depth}; give at least 1")
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(entry: tuple[bool, Any]) -> None:
        while not closed.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put((True, item))
                if closed.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=produce, name="data-prefetch", daemon=True)
    thread.start()
    try:
        while (entry := ready.get())[0]:
            yield entry[1]
        if entry[1] is not None:
            raise entry[1]
    finally:
        closed.set()
        thread.join()
