"""Ends a check in which a rank dies, hangs or fails: with one sentence that names the node, and soon, on every rank."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NoReturn

from em_megatron.environment.exchange import Exchange, HealthError
from em_megatron.environment.report import cause

BEAT_SECONDS = 0.25
SILENCE_SECONDS = 2.0  # without a beat for so long a rank is taken for dead
FAREWELL_SECONDS = 5.0  # ranks leave this time for rank 0 to print


class Supervision:
    """A thread beside the check, for a `with` block around it.

    It leaves a beat with the step's name in the store, looks whether another rank has failed, and whether this rank's
    step lasts too long. Collectives release the interpreter's lock, so it works while one hangs. Whatever fails, in
    the block too, ends this process with exit code 1: nothing waits for a rank that will not come.
    """

    def __init__(self, exchange: Exchange, last_words: Callable[[str], None]) -> None:
        """`last_words` prints the sentence, and on rank 0 what is known by then."""
        self._exchange = exchange.clone()
        self._last_words = last_words
        self._place = exchange.place
        self._step, self._limit = "starting", exchange.limit
        self._deadline = time.monotonic() + self._limit
        self._ending = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervision", daemon=True)

    def __enter__(self) -> Supervision:
        self._beat(0)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            text = str(error) if isinstance(error, HealthError) else cause(error)
            self._end(f"{text} (while {self._step})")
        self._done.set()
        self._thread.join()

    @contextlib.contextmanager
    def step(self, text: str, limit: float | None = None) -> Iterator[None]:
        """A part of the check that must be over within `limit` seconds, by default those of the exchange."""
        self._limit = self._exchange.limit if limit is None else limit
        self._step, self._deadline = text, time.monotonic() + self._limit
        yield

    def _watch(self) -> None:
        beats = 0
        while not self._done.wait(BEAT_SECONDS):
            beats += 1
            try:
                self._beat(beats)
                failed = self._exchange.has("failed")
            except RuntimeError as error:
                if not self._done.is_set():
                    self._end(f"the store of node 0 is gone ({cause(error)}) while {self._step}")
                return
            if failed:
                self._end("another rank failed")
            elif time.monotonic() > self._deadline + 1:  # what has a time limit itself says more
                self._end(f"{self._step} took more than {self._limit:g} s")

    def _beat(self, number: int) -> None:
        self._exchange.put(f"beat/{self._place.rank}", [number, self._place.name, self._step])

    def _end(self, text: str) -> NoReturn:
        if not self._ending.acquire(blocking=False):
            time.sleep(2 * FAREWELL_SECONDS)  # the other thread is ending this process
        sentence = f"error (node {self._place.name}): {text}"
        with contextlib.suppress(RuntimeError, HealthError):  # the store may be gone
            if not self._exchange.has("failed"):
                sentence += self._silent_nodes()
            first = self._exchange.first("failed", sentence)
            sentence = self._exchange.store.get("failed").decode()
            if self._place.rank and not first:
                self._leave()
        self._last_words(sentence)
        with contextlib.suppress(RuntimeError):
            if self._place.rank == 0:
                self._exchange.put("printed", True)
                time.sleep(2 * BEAT_SECONDS)  # the store may end with this rank
        self._leave()

    def _leave(self) -> NoReturn:
        """Ends this process, on other ranks than 0 once that one has printed: torchrun and Slurm then end the others."""
        end = time.monotonic() + FAREWELL_SECONDS
        with contextlib.suppress(RuntimeError):
            while self._place.rank and time.monotonic() < end and not self._exchange.has("printed"):
                time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def _silent_nodes(self) -> str:
        """Which nodes give no sign of life any more or, if all do, which are at another step."""
        before = self._beats()
        time.sleep(SILENCE_SECONDS)
        after = self._beats()
        others = [rank for rank in before if rank != self._place.rank]
        silent = {before[rank][1] for rank in others if before[rank][0] == after[rank][0]}
        silent |= {f"rank {rank}" for rank in range(self._place.world_size) if rank not in after}
        if silent:
            return f"; no sign of life from {', '.join(sorted(silent))}"
        elsewhere = {f"{name} is {step}" for _, name, step in (after[rank] for rank in others) if step != self._step}
        return f"; {', '.join(sorted(elsewhere)[:4])}" if elsewhere else ""

    def _beats(self) -> dict[int, tuple[int, str, str]]:
        """Number, node and step of the last beat of each rank that gave one."""
        ranks = [rank for rank in range(self._place.world_size) if self._exchange.has(f"beat/{rank}")]
        return {rank: tuple(self._exchange.get(f"beat/{rank}")) for rank in ranks}
