"""From documents to training batches, as a pure function of (seed, sample number).

    documents of epoch e, permuted by (seed, e)  ->  pack  ->  samples, permuted by (seed, e)  ->  sample n
    where memory is carried:    pack, rests following  ->  G slots of samples in packing order  ->  sample n
    sample n of the run  ->  microbatches of every data-parallel rank  ->  torch tensors

Where memory is carried from one optimizer step to the next, sample n lies in slot n % G of a global batch of G
samples, and a document longer than a sample goes on in the same slot one step later.

Nothing depends on workers, ranks or what was read before, so the whole state of the loader is one integer,
`consumed_samples`. Tensor-, pipeline- and context-parallel peers of a data-parallel rank call with the same rank
and get the same samples.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator
from functools import cached_property
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
PADDING = -1  # in place of a sample's number: a sample without documents


class Epoch(NamedTuple):
    """The packed samples of an epoch and the order they are visited in.

    order: int64 [samples], or [rounds · slots] where memory is carried; PADDING for a slot with no sample left.
    """

    packed: PackedIndex
    order: NDArray[np.int64]


class TokenStream:
    """Samples of T = sequence_length tokens without end: epoch after epoch, each in its own order.

    reader: the documents. sequence_length, block_length: T and L in tokens, T a multiple of L. seed: of the order,
    at least 0. pad_id: fills the rest of a sample. shuffle: False keeps documents and samples in the corpus' order.
    slots: G, the global batch size in samples, where memory is carried from step to step; 0 where it is not.

    With slots, samples are not permuted: of the M packed samples of an epoch, slot g reads g·M//G, ..., (g+1)·M//G - 1,
    one a round. An epoch has ceil(M/G) rounds; a slot with no sample left gives one of padding, which counts as a
    sample of the run, so sample n lies in slot n % G in every epoch.
    Raises ValueError where T is not a multiple of L or the seed or the slots are negative.
    """

    def __init__(
        self,
        reader: ShardReader,
        sequence_length: int,
        block_length: int,
        seed: int,
        pad_id: int,
        shuffle: bool = True,
        slots: int = 0,
    ) -> None:
        if seed < 0:
            raise ValueError(f"the data seed is {seed}; give one of at least 0")
        if slots < 0:
            raise ValueError(f"the stream has {slots} slots; give the global batch size, or 0 to carry no memory")
        self.reader = reader
        self.sequence_length = sequence_length
        self.block_length = block_length
        self.seed = seed
        self.pad_id = pad_id
        self.shuffle = shuffle
        self.slots = slots
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
        lengths = self.reader.document_lengths
        packed = pack(lengths, documents, self.sequence_length, self.block_length, rest_follows=self.slots > 0)
        if self.slots:
            return Epoch(packed, slot_order(packed.num_samples, self.slots))
        return Epoch(packed, self._order(packed.num_samples, number, SAMPLE_ORDER))

    def _order(self, count: int, epoch: int, purpose: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(count)
        return permutation(count, self.seed, epoch, purpose)

    def num_samples(self, epoch: int = 0) -> int:
        """Packed samples of an epoch; it varies a little with the order the documents are packed in.

        With slots, the padding samples of the last round are not counted here: the epoch takes ceil(M/G)·G samples of
        the run, M as given here. Without slots it takes M.
        """
        return self.epoch(epoch).packed.num_samples

    def locate(self, n: int) -> tuple[int, int]:
        """(epoch, number within its order) of sample n. Epochs before it are packed once to count their samples.

        With slots, the number is round · slots + slot.
        """
        if n < 0:
            raise ValueError(f"sample {n} does not exist; samples are numbered from 0")
        firsts = self._first_samples
        with self._lock:
            while firsts[-1] <= n:
                firsts.append(firsts[-1] + len(self.epoch(len(firsts) - 1).order))
        epoch = int(np.searchsorted(firsts, n, side="right")) - 1
        return epoch, n - firsts[epoch]

    def sample(self, n: int) -> Sample:
        """Sample n of the run, a pure function of (corpus, T, L, seed, slots, n). Arrays of [T]:

        tokens int64, labels int64 (the next id of the same document), loss_mask float32 (0 on padding),
        segment_ids int32 (pieces 1, 2, ... by position; padding 0), positions int32 (from the start of the piece).

        Arrays of [], all 0 without slots:

        history int64: tokens of the document at position 0 that this slot read in its samples just before, a multiple
        of L; 0 where its memory starts empty, as in a slot's first sample of an epoch.
        continues bool: whether the last document goes on in this slot's next sample, so that its state is carried.
        slot int64: n % slots.
        """
        number, index = self.locate(n)
        epoch = self.epoch(number)
        return self._build(epoch.packed, int(epoch.order[index]), *self._carried(epoch, index))

    def _carried(self, epoch: Epoch, index: int) -> tuple[int, bool, int]:
        """(history, continues, slot) of sample `index` of an epoch's order.

        The pieces before one at position 0 fill the slot's samples back to the document's start, so the slot read all
        of the document before it, or else T tokens in each of its rounds.
        """
        if not self.slots:
            return 0, False, 0
        number, slot = divmod(index, self.slots)
        history = min(_tokens_before(epoch, index), number * self.sequence_length)
        return history, _tokens_before(epoch, index + self.slots) > 0, slot

    def validation_samples(
        self, count: int = 0, data_parallel_rank: int = 0, data_parallel_size: int = 1
    ) -> Iterator[Sample]:
        """Every sample of the corpus once, in the corpus' own order whatever `shuffle` says, as `sample` gives them
        without slots.

        count: only so many, evenly spread over the corpus; 0 gives all. Of these, data-parallel rank r of n builds
        the r-th, (r+n)-th, ... and no other.
        """
        total, wanted = self._validation.num_samples, self.num_validation_samples(count)
        for index in [i * total // wanted for i in range(wanted)][data_parallel_rank::data_parallel_size]:
            yield self._build(self._validation, index)

    def num_validation_samples(self, count: int = 0) -> int:
        """How many samples `validation_samples` of all data-parallel ranks give."""
        total = self._validation.num_samples
        return min(count or total, total)

    @cached_property
    def _validation(self) -> PackedIndex:
        lengths = self.reader.document_lengths
        return pack(lengths, np.arange(len(lengths)), self.sequence_length, self.block_length)

    def _build(
        self, packed: PackedIndex, index: int, history: int = 0, continues: bool = False, slot: int = 0
    ) -> Sample:
        sample = self._padding()
        pieces = [] if index == PADDING else packed.pieces(index)
        for segment, (document, start, stop, position) in enumerate(pieces, start=1):
            ids = self.reader.tokens(document, start, stop + 1)
            here = slice(position, position + stop - start)
            sample["tokens"][here] = ids[:-1]
            sample["labels"][here] = ids[1:]
            sample["loss_mask"][here] = 1.0
            sample["segment_ids"][here] = segment
            sample["positions"][here] = np.arange(stop - start)
        sample["history"] = np.array(history, dtype=np.int64)
        sample["continues"] = np.array(continues, dtype=np.bool_)
        sample["slot"] = np.array(slot, dtype=np.int64)
        return sample

    def _padding(self) -> Sample:
        T = self.sequence_length
        return {
            "tokens": np.full(T, self.pad_id, dtype=np.int64),
            "labels": np.full(T, self.pad_id, dtype=np.int64),
            "loss_mask": np.zeros(T, dtype=np.float32),
            "segment_ids": np.zeros(T, dtype=np.int32),
            "positions": np.zeros(T, dtype=np.int32),
        }

    def batches(
        self, consumed_samples: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
    ) -> Iterator[tuple[Batch, int]]:
        """Endless (batch, consumed_samples after it) for one data-parallel rank; tensors as `collate` makes them.

        Row k of microbatch i on rank r is sample

            n = consumed_samples + i·micro_batch_size·data_parallel_size + r·micro_batch_size + k

        so microbatch i uses one contiguous run of samples over all ranks, and an optimizer step of G samples uses
        the same G samples for every data_parallel_size and micro_batch_size that divide it. To resume, pass the
        number that came with the last batch that was used. With slots = G and steps of G samples, the samples of a slot
        are read by the same rank, microbatch and row of successive steps.
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


def slot_order(samples: int, slots: int) -> NDArray[np.int64]:
    """The numbers of M samples in the order G slots read them, round after round: int64 [ceil(M/G) · G].

    Slot g has samples g·M//G, ..., (g+1)·M//G - 1, in this order, and PADDING where it has none left.
    """
    edges = np.arange(slots + 1, dtype=np.int64) * samples // slots
    numbers = edges[:-1] + np.arange(-(-samples // slots), dtype=np.int64)[:, None]
    return np.where(numbers < edges[1:], numbers, PADDING).ravel()


def _tokens_before(epoch: Epoch, index: int) -> int:
    """Tokens that the document at position 0 of sample `index` of the order has in earlier samples; 0 past its end."""
    sample = int(epoch.order[index]) if index < len(epoch.order) else PADDING
    return 0 if sample == PADDING else int(epoch.packed.starts[epoch.packed.offsets[sample]])


def collate(samples: list[Sample]) -> Batch:
    """Stacks arrays of [T] to tensors of [len(samples), T] and those of [] to [len(samples)]."""
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
