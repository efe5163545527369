"""Signals that ask a run to end: they are noted here at once, and acted on by all ranks together at the next poll.

SIGUSR1, sent some minutes before a job's end: save, end, be requeued. SIGTERM, sent when a job is cancelled or
preempted, or when another rank of this launch has failed: the same, if the other ranks still answer.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Which signal has come to this process, and when. This module imports no torch, so that `catch` can come first."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.received_at = 0.0
        self._pipe: int | None = None

    def catch(self) -> StopRequest:
        """Takes over the two signals; call it in the main thread, before slow imports."""
        self._pipe, ours = os.pipe()
        for end in (self._pipe, ours):
            os.set_blocking(end, False)
        # Written to when the signal comes; the handler itself waits until the main thread is back in Python.
        signal.set_wakeup_fd(ours, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        return self

    @property
    def here(self) -> bool:
        """Whether a signal has come to this rank; other ranks may not have theirs yet."""
        return self.signal is not None

    def terminated_at(self) -> float:
        """When SIGTERM came, on the monotonic clock; 0 if it has not. Any thread may ask, also while the main one is
        blocked in a collective."""
        try:
            numbers = os.read(self._pipe, 64) if self._pipe is not None else b""
        except BlockingIOError:
            numbers = b""
        for number in numbers:
            if number in _SIGNALS:
                self._note(signal.Signals(number))
        return self.received_at if self.signal == signal.SIGTERM else 0.0

    def agreed(self) -> bool:
        """Whether any rank has been asked, known to all: one all-reduce of an integer."""
        import torch
        import torch.distributed as dist

        from em_megatron.parallel.cpu_backend import device

        asked = torch.tensor(int(self.here), device=device())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(signal.Signals(number))

    def _note(self, found: signal.Signals) -> None:
        if self.signal is None or (found == signal.SIGTERM and self.signal != found):
            self.signal, self.received_at = found, time.monotonic()
