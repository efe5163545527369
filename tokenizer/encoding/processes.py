"""Processes of this machine: a pool whose workers end with the command, and the sharing of units of work with others."""

import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from em_megatron.data.manifest import DataError
from tokenizer.encoding.claims import Claims

TASKS_PER_WORKER = 4  # in flight, so that memory does not grow with the corpus
REFRESH_SECONDS = 0.2  # of the progress bar
LOOK_AGAIN_SECONDS = 2.0  # for units that others have given up
LOST_WORKER = "a worker process was ended from outside (out of memory?); run the command again, with fewer --workers"


def end_with_parent() -> None:
    """Ends this worker when the process that spawned it is gone; a pool's idle workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("end_with_parent was called outside a worker process")

    def watch(parent: BaseProcess = parent) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def ordered_map[Task, Result](
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Results in the order of the tasks, computed by spawned processes (in this one if workers is 1)."""
    if workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                pending.append(pool.submit(function, task))
                if len(pending) == workers * TASKS_PER_WORKER:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError(LOST_WORKER) from None
        finally:
            pool.shutdown(cancel_futures=True)


_advance: Callable[[int], Any] = lambda amount: None  # noqa: E731  # set in each worker


def advance(amount: int) -> None:
    """Tells the command that runs this task how much of it is done."""
    _advance(amount)


def _start_worker(counter: Any) -> None:
    global _advance

    def add(amount: int) -> None:
        with counter.get_lock():
            counter.value += amount

    _advance = add
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()


class Workers:
    """`count` spawned processes, or this one where it is 1, that run tasks and say how far they are.

    progress: called with what has been done since the last call. Use it as a context.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.progress: Callable[[int], Any] = lambda amount: None
        self._reported = 0
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        global _advance
        if self.count == 1:
            _advance = lambda amount: self.progress(amount)  # noqa: E731
            return self
        context = multiprocessing.get_context("spawn")
        self._counter = context.Value("q", 0)
        self._pool = ProcessPoolExecutor(
            self.count, mp_context=context, initializer=_start_worker, initargs=(self._counter,)
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def submit[Task](self, function: Callable[[Task], None], task: Task) -> Future[None]:
        """Starts a task; in this process it is over when this returns."""
        if self._pool:
            try:
                return self._pool.submit(function, task)
            except BrokenProcessPool:
                raise DataError(LOST_WORKER) from None
        function(task)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def wait(self, running: Iterable[Future[None]]) -> set[Future[None]]:
        """The tasks that are over, after a moment if there is none. Raises what a task raised."""
        finished, _ = wait(running, REFRESH_SECONDS, FIRST_COMPLETED)
        if self._pool:
            value = self._counter.value
            self.progress(value - self._reported)
            self._reported = value
        try:
            for future in finished:
                future.result()
        except BrokenProcessPool:
            raise DataError(LOST_WORKER) from None
        return finished


class Board(NamedTuple):
    """Units of work; NAME is done when the file FOLDER/NAME + suffix is there."""

    units: Sequence[str]
    folder: Path
    suffix: str

    def left(self) -> list[str]:
        """The units that are not done, in order. Raises FileNotFoundError where the folder is gone."""
        done = set(os.listdir(self.folder))
        return [unit for unit in self.units if unit + self.suffix not in done]

    def is_done(self, unit: str) -> bool:
        return (self.folder / (unit + self.suffix)).exists()


def work_off[Task](
    board: Board, claims: Claims, workers: Workers, function: Callable[[Task], None], task_of: Callable[[str], Task]
) -> list[str]:
    """Does every unit that is not done and that no living process has claimed; returns those that others do.

    A task of `function` makes its unit a done one. Raises what a task raises.
    """
    running: dict[Future[None], str] = {}
    waiting: deque[str] = deque()
    looked = float("-inf")
    while True:
        if len(running) < workers.count and not waiting and time.monotonic() - looked > LOOK_AGAIN_SECONDS:
            left, looked = board.left(), time.monotonic()
            waiting.extend(unit for unit in left if unit not in running.values())
            if claims.owners():  # begins where they are not, so that processes seldom meet
                waiting.rotate(-zlib.crc32(repr(claims.owner).encode()) % max(len(waiting), 1))
        while waiting and len(running) < workers.count:
            unit = waiting.popleft()
            if not board.is_done(unit) and claims.acquire(unit):
                if board.is_done(unit):  # by a process that has just given its claim up
                    claims.release(unit)
                else:
                    running[workers.submit(function, task_of(unit))] = unit
        if not running:
            return board.left()
        for future in workers.wait(running):
            claims.release(running.pop(future))
