"""Ends a rank that makes no progress, after writing down where its threads stand.

When one rank hangs, all others wait for it in a collective: every rank's watchdog runs out at about the same time, so
that the folder of stacks shows both where the others wait and what the one does.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path

from em_megatron.training.stopping import StopRequest

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: another start may do better
FIRST_STEP = 3.0  # times as long, for compilation and tuning of kernels
SECONDS_AFTER_SIGTERM = 20.0  # at least: a rank whose peers are gone would wait until the collective's time limit
LONGEST_PHASES = 2.5  # and as many times the longest phase so far: of a step that began, and of one more
SECONDS_FOR_OTHERS = 10.0  # to write their stacks, before the launcher ends them because this rank has ended
_LONGER = 30.0  # after which Python's own watchdog acts, should a thread hold the interpreter's lock
_POLL_SECONDS = 0.5
SETTING_UP, SAVING = "set-up", "saving"


class Watchdog:
    """Call `beat` whenever something was done. Nothing happens while beats are less than `minutes` apart.

    Args:
        folder: of the stacks, `rank_00000.txt` and so on; made when the first one is written.
        rank: of this process.
        minutes: longest time between beats; 0 watches only for what a SIGTERM leaves undone.
        stop: after a SIGTERM a phase other than SAVING has SECONDS_AFTER_SIGTERM to end, more where steps take longer.
    """

    def __init__(self, folder: Path, rank: int, minutes: float, stop: StopRequest) -> None:
        self.path = folder / f"rank_{rank:05d}.txt"
        self._rank, self._seconds, self._stop = rank, minutes * 60, stop
        self._phase, self._last, self._factor = SETTING_UP, time.monotonic(), FIRST_STEP
        self._longest = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        """Begins to watch."""
        self._thread.start()
        self.beat(SETTING_UP)
        return self

    def beat(self, phase: str) -> None:
        """Progress: `phase` begins now."""
        now = time.monotonic()
        if self._factor == 1.0 and self._phase != SAVING:
            self._longest = max(self._longest, now - self._last)
        self._phase, self._last = phase, now
        if self._seconds:
            faulthandler.dump_traceback_later(self._limit() + _LONGER, exit=True, file=sys.__stderr__ or 2)

    def first_step_done(self) -> None:
        """From here on the limit is the one that was asked for."""
        self._factor = 1.0

    def stop(self) -> None:
        """Watches no longer."""
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _limit(self) -> float:
        return self._seconds * self._factor

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            now, phase = time.monotonic(), self._phase
            waited = now - self._last
            if self._seconds and waited > self._limit():
                self._end(phase, waited, "")
            terminated = self._stop.terminated_at()
            patience = max(SECONDS_AFTER_SIGTERM, LONGEST_PHASES * self._longest)
            if terminated and phase != SAVING and now - max(self._last, terminated) > patience:
                self._end(phase, waited, " after SIGTERM")

    def _end(self, phase: str, waited: float, why: str) -> None:
        """Writes the stacks of all threads, says so, and ends this process without waiting for anything."""
        head = f"rank {self._rank} on {socket.gethostname()}: no progress for {waited:.0f} s{why} in: {phase}"
        where = f"; stacks in {self.path}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w") as file:
                file.write(f"{head}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            where = f"; its stacks could not be written ({error})"
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        print(f"error ({head}{where})", file=sys.stderr, flush=True)
        if not why:
            time.sleep(SECONDS_FOR_OTHERS)
        os._exit(EXIT_CODE)
