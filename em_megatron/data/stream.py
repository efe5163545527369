"""From documents to training batches, as a pure function of (seed, sample number).

    shards of epoch e, permuted by (seed, e), in groups of shuffle_shards
    documents of a group, permuted by (seed, e)  ->  pack  ->  samples, permuted by (seed, e)  ->  sample n
    where memory is carried:    pack, rests following  ->  G slots of samples in packing order  ->  sample n
    sample n of the run  ->  microbatches of every data-parallel rank  ->  torch tensors

Where memory is carried from one optimizer step to the next, sample n lies in slot n % G of a global batch of G
samples, and a document longer than a sample goes on in the same slot one step later.

Nothing depends on workers, ranks or what was read before, so the whole state of the loader is one integer,
`consumed_samples`. Tensor-, pipeline- and context-parallel peers of a data-parallel rank call with the same rank
and get the same samples.
"""

import logging
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from em_megatron.data.manifest import DataError
from em_megatron.data.order import ORDER_VERSION, PADDING, permutation, slot_order
from em_megatron.data.packing import PackedIndex, check_sizes, pack
from em_megatron.data.sample_counts import SampleCounts
from em_megatron.data.threads import in_parallel

log = logging.getLogger(__name__)

Sample = dict[str, NDArray[Any]]
Batch = dict[str, torch.Tensor]

MANY_DOCUMENTS = 16_000_000  # in a group: they take some GB, and half a minute to pack
GROUPS_KEPT = 3  # the one that is read, the next, and the one before
DOCUMENT_ORDER, SAMPLE_ORDER, SHARD_ORDER = 0, 1, 2


class Group(NamedTuple):
    """The packed samples of a group of shards and the order they are visited in.

    order: int64 [samples], or [rounds · slots] where memory is carried; PADDING for a slot with no sample left.
    """

    packed: PackedIndex
    order: NDArray[np.int64]


class Documents(Protocol):
    """What a stream needs of a ShardReader; see there."""

    @property
    def first_documents(self) -> NDArray[np.int64]: ...
    @property
    def document_lengths(self) -> NDArray[np.int64]: ...
    @property
    def identity(self) -> str: ...
    def lengths(self, shard: int) -> NDArray[np.int64]: ...
    def tokens(self, document: int, start: int, stop: int) -> NDArray[np.integer]: ...
    def prepare(self, shards: Sequence[int]) -> None: ...
    def __len__(self) -> int: ...


class Samples(Protocol):
    """The samples of a run by their number."""

    def sample(self, n: int) -> Sample: ...


class TokenStream:
    """Samples of T = sequence_length tokens without end: epoch after epoch, each in its own order.

    reader: the documents. sequence_length, block_length: T and L in tokens, T a multiple of L. seed: of the order,
    at least 0. pad_id: fills the rest of a sample. shuffle: False keeps documents and samples in the corpus' order.
    slots: G, the global batch size in samples, where memory is carried from step to step; 0 where it is not.
    shuffle_shards: shards in a group; documents are mixed within a group, so that no more than two groups need to be at
    hand. A corpus of no more shards is one group, mixed whole. counts_folder: where the groups' sample counts are kept
    between starts, None: nowhere.

    With slots, samples are not permuted: of the M packed samples of a group, slot g reads g·M//G, ..., (g+1)·M//G - 1,
    one a round. A group has ceil(M/G) rounds; a slot with no sample left gives one of padding, which counts as a
    sample of the run, so sample n lies in slot n % G in every epoch.
    Raises ValueError where T is not a multiple of L, the seed or the slots are negative, or a group has no shard.
    """

    def __init__(
        self,
        reader: Documents,
        sequence_length: int,
        block_length: int,
        seed: int,
        pad_id: int,
        shuffle: bool = True,
        slots: int = 0,
        shuffle_shards: int = 32,
        counts_folder: Path | None = None,
    ) -> None:
        if seed < 0:
            raise ValueError(f"the data seed is {seed}; give one of at least 0")
        if slots < 0:
            raise ValueError(f"the stream has {slots} slots; give the global batch size, or 0 to carry no memory")
        if shuffle_shards < 1:
            raise ValueError(f"documents are mixed within {shuffle_shards} shards; give at least 1")
        self.reader = reader
        self.sequence_length = sequence_length
        self.block_length = block_length
        self.seed = seed
        self.pad_id = pad_id
        self.shuffle = shuffle
        self.slots = slots
        self.shuffle_shards = shuffle_shards
        self.groups_per_epoch = -(-(len(reader.first_documents) - 1) // shuffle_shards)
        self._counts_folder = counts_folder
        check_sizes(sequence_length, block_length)
        self._prepare()

    def _prepare(self) -> None:
        """What another process makes for itself."""
        self._groups: OrderedDict[int, Future[Group]] = OrderedDict()
        self._counts = SampleCounts(self._counts_folder, self._key())
        self._firsts = [0]  # first sample of groups 0, 1, ... as far as they were needed
        self._begun = -1  # the group that was last begun to be read
        self._lock = threading.Lock()
        self._count_lock = threading.Lock()

    def _key(self) -> list[Any]:
        """Everything that the samples depend on."""
        settings = [self.sequence_length, self.block_length, self.seed, self.shuffle, self.slots, self.shuffle_shards]
        return [ORDER_VERSION, self.reader.identity, *settings]

    def __getstate__(self) -> dict[str, Any]:
        made = ("_groups", "_counts", "_firsts", "_begun", "_lock", "_count_lock")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    def group(self, number: int) -> Group:
        """The samples of a group, counted over the epochs; the last few are kept."""
        with self._lock:
            made = self._groups.get(number)
            if made is None:
                mine = made = self._groups[number] = Future()
                while len(self._groups) > GROUPS_KEPT:
                    self._groups.popitem(last=False)
            else:
                mine = None
                self._groups.move_to_end(number)
        if mine is not None:
            try:
                mine.set_result(self._make_group(number))
            except BaseException as error:
                with self._lock:
                    self._groups.pop(number, None)
                mine.set_exception(error)
        return made.result()

    def _make_group(self, number: int) -> Group:
        epoch, place = divmod(number, self.groups_per_epoch)
        shards = self._shards(epoch, place)
        firsts = self.reader.first_documents
        documents = np.concatenate([np.arange(firsts[shard], firsts[shard + 1]) for shard in shards])
        if len(documents) > MANY_DOCUMENTS:
            log.warning("%s documents are mixed at once: give a smaller data.shuffle_shards", f"{len(documents):,}")
        lengths = np.concatenate(in_parallel(self.reader.lengths, shards))
        order = self._order(len(documents), epoch, DOCUMENT_ORDER, place)
        packed = pack(lengths, order, self.sequence_length, self.block_length, rest_follows=self.slots > 0)
        packed = packed.renumbered(documents)
        if self.slots:
            return Group(packed, slot_order(packed.num_samples, self.slots))
        return Group(packed, self._order(packed.num_samples, epoch, SAMPLE_ORDER, place))

    def _shards(self, epoch: int, place: int) -> list[int]:
        """The shards of the group at a place of an epoch; groups are as equal as can be."""
        first, stop = self._edge(place), self._edge(place + 1)
        return sorted(self._visited(epoch)[first:stop].tolist())

    def _visited(self, epoch: int) -> NDArray[np.int64]:
        """The shards in the order of an epoch."""
        count = len(self.reader.first_documents) - 1
        return self._order(count, epoch, SHARD_ORDER, 0) if self.groups_per_epoch > 1 else np.arange(count)

    def _edge(self, place: int) -> int:
        return place * (len(self.reader.first_documents) - 1) // self.groups_per_epoch

    def _order(self, count: int, epoch: int, purpose: int, place: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(count)
        return permutation(count, self.seed, epoch, purpose, *([place] if place else []))

    def num_samples(self, epoch: int = 0) -> int:
        """Packed samples of an epoch; it varies a little with the order the documents are packed in.

        With slots, the padding samples of a group's last round are not counted here: a group takes ceil(M/G)·G samples of
        the run. Without slots it takes M.
        """
        first = epoch * self.groups_per_epoch
        return sum(self.group(number).packed.num_samples for number in range(first, first + self.groups_per_epoch))

    def locate(self, n: int) -> tuple[int, int]:
        """(group, number within its order) of sample n. Groups before it are packed once to count their samples.

        With slots, the number is round · slots + slot.
        """
        if n < 0:
            raise ValueError(f"sample {n} does not exist; samples are numbered from 0")
        firsts = self._firsts
        with self._count_lock:
            while firsts[-1] <= n:
                firsts.append(firsts[-1] + self._counts.get(len(firsts) - 1, self._count))
        number = bisect_right(firsts, n) - 1
        return number, n - firsts[number]

    def _count(self, number: int) -> int:
        return len(self.group(number).order)

    def epochs(self, n: int) -> float:
        """How often the documents were read when samples 0 to n-1 were: whole epochs, and a fraction of the next."""
        number, index = self.locate(n)
        epoch, place = divmod(number, self.groups_per_epoch)
        documents = np.diff(self.reader.first_documents)[self._visited(epoch)]
        before, here = documents[: self._edge(place)].sum(), documents[self._edge(place) : self._edge(place + 1)].sum()
        return epoch + float(before + here * index / self._counts.counts[number]) / len(self.reader)

    @property
    def efficiency(self) -> float:
        """Share of the tokens of the first group's samples that are not padding, 0..1."""
        packed = self.group(0).packed
        if not self.slots:
            return packed.efficiency
        return packed.efficiency * packed.num_samples / len(self.group(0).order)

    def sample(self, n: int) -> Sample:
        """Sample n of the run, a pure function of (corpus, T, L, seed, slots, n). Arrays of [T]:

        tokens int64, labels int64 (the next id of the same document), loss_mask float32 (0 on padding),
        segment_ids int32 (pieces 1, 2, ... by position; padding 0), positions int32 (from the start of the piece).

        Arrays of [], all 0 without slots:

        history int64: tokens of the document at position 0 that this slot read in its samples just before, a multiple
        of L; 0 where its memory starts empty, as in a slot's first sample of a group.
        continues bool: whether the last document goes on in this slot's next sample, so that its state is carried.
        slot int64: n % slots.
        """
        number, index = self.locate(n)
        group = self.group(number)
        if len(group.order) != self._counts.counts[number]:
            raise DataError(
                f"{self._counts.path} holds other sample counts than the corpus has; delete it, and start again"
            )
        self._read_ahead(number, 2 * index >= len(group.order))
        return self._build(group.packed, int(group.order[index]), *self._carried(group, index))

    def _read_ahead(self, number: int, late: bool) -> None:
        """In the background, gets ready the shards of a group that is begun, and late in it the next group and its shards,
        so that reading does not stop where it begins."""
        if self._begun < number:
            self._begun = number
            self._in_background(number)
        elif late and self.groups_per_epoch > 1 and number + 1 not in self._groups:
            self._in_background(number + 1)

    def _in_background(self, number: int) -> None:
        def make() -> None:
            try:
                self.group(number)
                self.reader.prepare(self._shards(*divmod(number, self.groups_per_epoch)))
            except Exception:  # raised again, in its turn, by the sample that needs it
                return

        threading.Thread(target=make, name="data-read-ahead", daemon=True).start()

    def _carried(self, group: Group, index: int) -> tuple[int, bool, int]:
        """(history, continues, slot) of sample `index` of a group's order.

        The pieces before one at position 0 fill the slot's samples back to the document's start, so the slot read all
        of the document before it, or else T tokens in each of its rounds.
        """
        if not self.slots:
            return 0, False, 0
        number, slot = divmod(index, self.slots)
        history = min(_tokens_before(group, index), number * self.sequence_length)
        return history, _tokens_before(group, index + self.slots) > 0, slot

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


def _tokens_before(group: Group, index: int) -> int:
    """Tokens that the document at position 0 of sample `index` of the order has in earlier samples; 0 past its end."""
    sample = int(group.order[index]) if index < len(group.order) else PADDING
    return 0 if sample == PADDING else int(group.packed.starts[group.packed.offsets[sample]])


class RankBatches:
    """The batches of one data-parallel rank, by their number; tensors as `collate` makes them.

    Row k of micro-batch i of rank r of R is sample

        n = consumed_samples + i·micro_batch_size·R + r·micro_batch_size + k

    so micro-batch i uses one contiguous run of samples over all ranks, and an optimizer step of G samples uses the same G
    samples for every data-parallel size and micro-batch size that divide it. With slots = G and steps of G samples, the
    samples of a slot are read by the same rank, micro-batch and row of successive steps.
    Raises ValueError for a rank or size that cannot be.
    """

    def __init__(
        self,
        samples: Samples,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        if consumed_samples < 0 or micro_batch_size < 1 or not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(
                f"cannot batch with consumed_samples {consumed_samples}, micro_batch_size {micro_batch_size}, "
                f"data-parallel rank {data_parallel_rank} of {data_parallel_size}: give counts of at least 0, 1 and "
                "a rank below the size"
            )
        self.samples, self.consumed_samples = samples, consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank, self.data_parallel_size = data_parallel_rank, data_parallel_size

    def __getitem__(self, index: int) -> Batch:
        first = self.consumed_after(index - 1) + self.data_parallel_rank * self.micro_batch_size
        return collate([self.samples.sample(n) for n in range(first, first + self.micro_batch_size)])

    def consumed_after(self, index: int) -> int:
        """The run's consumed samples when micro-batch `index` of every rank is used: what a resumed run begins with."""
        return self.consumed_samples + (index + 1) * self.micro_batch_size * self.data_parallel_size


def collate(samples: list[Sample]) -> Batch:
    """Stacks arrays of [T] to tensors of [len(samples), T] and those of [] to [len(samples)]."""
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
