"""Batches made ahead: by a thread, or by worker processes, in the same order as without.

Which batch comes next follows from its number alone, so workers that die are replaced and go on with the next number, and
nothing is lost or read twice.
"""

import logging
import os
import queue
import re
import signal
import threading
from collections.abc import Generator, Iterator
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from em_megatron.data.manifest import DataError
from em_megatron.data.stream import Batch, RankBatches

log = logging.getLogger(__name__)

RESTARTS = 3  # of the workers without a batch in between
LONGEST_CLOSE = 5.0  # seconds to wait for a batch that is being made
DEATH = re.compile(r"exited unexpectedly|is killed by signal")  # what DataLoader says
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class _Failed(Exception):  # noqa: N818  # not raised: it travels from a worker to the run
    """What a worker raised, without the traceback that DataLoader would add to a user's message."""


class _Batches(Dataset[Batch | _Failed]):
    """Batches for torch's DataLoader."""

    def __init__(self, batches: RankBatches) -> None:
        self._batches = batches

    def __getitem__(self, index: int) -> Batch | _Failed:
        try:
            return self._batches[index]
        except DataError as error:
            return _Failed(str(error))


def load(batches: RankBatches, workers: int = 0, prefetch: int = 4) -> Generator[tuple[Batch, int]]:
    """Endless (batch, consumed samples after it) of one data-parallel rank, in order.

    To resume, give RankBatches the number that came with the last batch that was used.
    workers: processes that make batches; 0: this one does, when a batch is asked for. prefetch: batches that the workers
    together make ahead, at least one each.

    Raises:
        DataError: a shard is damaged, or the workers die again and again.
    """
    if workers:
        yield from _from_workers(batches, workers, prefetch)
    for index in count():
        yield batches[index], batches.consumed_after(index)


def _from_workers(batches: RankBatches, workers: int, prefetch: int) -> Generator[tuple[Batch, int]]:
    index = deaths = 0
    while True:
        first = index
        index, death = yield from _until_a_death(batches, workers, prefetch, first)
        deaths = deaths + 1 if index == first else 1
        if deaths > RESTARTS:
            raise DataError(
                f"data workers die again and again ({death}): look for the reason in the system's log (out of memory? "
                "/dev/shm full?), and give a smaller data.workers"
            )
        log.warning("a data worker died (%s); new ones go on with the same batch", death)


def _until_a_death(
    batches: RankBatches, workers: int, prefetch: int, index: int
) -> Generator[tuple[Batch, int], None, tuple[int, str]]:
    """Batches from `index` on; gives the next one and the reason when a worker has died. The others are ended then."""
    loader = _loader(batches, workers, prefetch, index)
    try:
        for batch in loader:
            if isinstance(batch, _Failed):
                raise DataError(str(batch))
            index += 1
            yield batch, batches.consumed_after(index - 1)
    except RuntimeError as error:
        if not DEATH.search(str(error)):
            raise
        return index, str(error)
    raise AssertionError("the numbers of the batches do not end")


def _loader(batches: RankBatches, workers: int, prefetch: int, first: int) -> Iterator[Batch | _Failed]:
    """Batches `first`, `first` + 1, ... Spawned workers share nothing with this process that a fork could break.

    Signals that ask the run to stop go to all processes of a rank. The run then saves, and needs its workers for that long:
    they are born with these signals blocked, and leave the group that torchrun and Slurm send them to.
    """
    loader: DataLoader[Any] = DataLoader(
        _Batches(batches),
        batch_size=None,
        sampler=count(first),
        num_workers=workers,
        prefetch_factor=max(1, -(-prefetch // workers)),
        multiprocessing_context="spawn",
        generator=torch.Generator(),  # else it would draw from the random state of the run
        worker_init_fn=_leave_group,
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_group(worker: int) -> None:
    os.setpgid(0, 0)
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)  # forgets what came meanwhile
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which DataLoader ends a worker that does not end by itself
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def ahead[Item](items: Iterator[Item], depth: int) -> Generator[Item]:
    """The same items in the same order, with up to `depth` of them made ahead by one background thread.

    An exception of the source is raised here in its turn. The thread ends, and closes the source, when the returned
    iterator is closed, which waits LONGEST_CLOSE at most: a shard that is being fetched takes longer.
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
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=produce, name="data-prefetch", daemon=True)
    thread.start()
    try:
        while (entry := ready.get())[0]:
            yield entry[1]
        if entry[1] is not None:
            raise entry[1]
    finally:
        closed.set()
        thread.join(LONGEST_CLOSE)
