"""Candidates run in turns: each once per round, so that what disturbs the machine disturbs them all alike."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from em_megatron.benchmark.floors import Work

Call = Callable[[], object]

SHORTEST = 0.02  # seconds of one reading: shorter calls are repeated
MOST_REPEATS = 100


class UnavailableError(Exception):
    """A candidate cannot run here; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
        group: candidates of one group are compared with each other.
        name: unique in its group.
        prepare: builds all that is not timed and returns the call that is; may raise anything.
        tokens: how many tokens one call takes.
        work: what one call must do.
        is_peer: whether it is what the others of its group are compared with.
        every: it takes part in every so many rounds only.
        single: never repeat a call within a reading (a call that changes what the next one does).
        resident: on the CPU, one more call tells the growth of resident memory.
    """

    group: str
    name: str
    prepare: Callable[[], Call]
    tokens: int
    work: Work
    is_peer: bool = False
    every: int = 1
    single: bool = False
    resident: bool = False


@dataclass
class Measurement:
    """Seconds per call, one number for each round; empty, with a reason, if the candidate could not run.

    peak_bytes: most device memory during a call beyond what was held before it; on the CPU resident memory, of one call
        that is not timed, where the candidate asks for it and the kernel tells it, else None.
    """

    candidate: Candidate
    seconds: list[float] = field(default_factory=list)
    reason: str | None = None
    peak_bytes: int | None = None


Watch = Callable[[int, int, Candidate], None]


def measure(
    candidates: Sequence[Candidate],
    device: torch.device,
    rounds: int,
    seconds: float,
    watch: Watch = lambda done, total, candidate: None,
    warm_up: int = 1,
) -> list[Measurement]:
    """Runs the candidates in turns.

    Args:
        candidates: in the order in which they run in every round.
        device: whose work is waited for, and whose memory is counted.
        rounds: at most so many.
        seconds: no further round begins after so many, counted from the first one.
        watch: told before each call how many of how many are done.
        warm_up: calls of each before the first round.

    Returns:
        One measurement per candidate. One that fails has a reason and no seconds; the others go on.
    """
    found = [Measurement(candidate) for candidate in candidates]
    total, calls = len(found) * (rounds + 1), dict[int, Call]()
    for index, measurement in enumerate(found):
        watch(index, total, measurement.candidate)
        with _failures_noted(measurement):
            calls[index] = measurement.candidate.prepare()
            timed(calls[index], warm_up, device)
            if device.type == "cpu" and measurement.candidate.resident:
                measurement.peak_bytes = resident_growth(calls[index])
    start = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - start > seconds:
            break
        for index, measurement in enumerate(found):
            if measurement.reason is None and number % measurement.candidate.every == 0:
                watch(len(found) * (number + 1) + index, total, measurement.candidate)
                with _failures_noted(measurement):
                    _read(measurement, calls[index], device)
            if measurement.reason is not None:
                calls.pop(index, None)
    return found


def _read(measurement: Measurement, call: Call, device: torch.device) -> None:
    """One more reading; of a short call the mean of several after a first one."""
    before = _held(device)
    took = timed(call, 1, device)
    if took < SHORTEST and not measurement.candidate.single:
        repeats = min(MOST_REPEATS, math.ceil(SHORTEST / max(took, 1e-9)))
        took = timed(call, repeats, device) / repeats
    measurement.seconds.append(took)
    if before is not None:
        peak = torch.cuda.max_memory_allocated(device) - before
        measurement.peak_bytes = max(peak, measurement.peak_bytes or 0)


def _held(device: torch.device) -> int | None:
    """Bytes held now, the peak being counted anew from here."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def resident_growth(call: Call) -> int | None:
    """Most resident bytes of this process during a call beyond those before it; None where Linux does not tell.

    Memory that was freed before is given back to the system first, as far as the allocator can.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _status(name: str) -> int:
    """A size in this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[name].split()[0]) * 1024


def timed(call: Call, repeats: int, device: torch.device) -> float:
    """Seconds of so many calls, until the device is done with them."""
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _failures_noted(measurement: Measurement) -> Iterator[None]:
    """An exception becomes the reason why there is no figure; what it held is let go."""
    try:
        yield
        return
    except UnavailableError as error:  # before it held anything
        measurement.reason = reason_of(error)
        return
    except Exception as error:
        measurement.reason, measurement.seconds = reason_of(error), []
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason_of(error: Exception) -> str:
    """One line for the report."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, UnavailableError) else f"{type(error).__name__}: {text}"[:300]
