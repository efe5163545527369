"""What steps cost: throughput, waits for data, memory; and for a single step, communication and the slowest rank.

A step's communication is seen in two ways. On GPUs it is the time in which NCCL kernels ran, some of it beside other
kernels (hidden) and the rest alone (exposed). On CPUs, where gloo works in threads of its own, it is the time that calls
of process groups, and waits for what they began, kept this process from computing: all of it exposed. Both hold the time
in which a rank waits for others to come, so the rank with the most time of its own is the one the others wait for.
"""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from em_megatron.training.metrics import peak_flops

_RANK_BITS = 20

# Calls in which gloo works before it returns, and those that only begin something; torch releases name them differently.
_GROUP_CALLS = (
    "_allgather_base",
    "_end_coalescing",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "gather_single",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)


class Interval(NamedTuple):
    """From start to end, in seconds of any clock."""

    start: float
    end: float


class StepCost(NamedTuple):
    """One step on one rank, in seconds: all of it, the part with communication, the part with nothing but that."""

    seconds: float
    communication: float
    exposed: float


class StepClock:
    """Times the steps of this rank between rows; every rank has one, and all call `row` together.

    Args:
        flops_per_token: of the model, forward and backward, for MFU.
        world_size: ranks of the run.
        device: of this rank.
    """

    def __init__(self, flops_per_token: float, world_size: int, device: torch.device) -> None:
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._flops, self._world, self._device = flops_per_token, world_size, device
        self._begin_row(time.perf_counter())

    def timed[T](self, data: Iterator[T]) -> Iterator[T]:
        """`data`, whose every next item is waited for on this clock."""
        while True:
            start = time.perf_counter()
            try:
                item = next(data)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield item

    def count(self, tokens: int) -> None:
        """A step is done, in which so many tokens counted on all ranks."""
        self._steps += 1
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens inside (validation, saving)."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def row(self) -> dict[str, float]:
        """What the steps since the last row cost.

        Returns:
            tokens_per_second, and per GPU (on CPUs per rank); mfu where the peak of the device is known; step_seconds,
            the mean; data_wait, the share of the time that the rank which waited longest for data did so; memory_peak_gb
            of the rank with most, in 1e9 bytes: of tensors on GPUs (memory_reserved_gb with the allocator's reserve), of
            the process since its start on CPUs. In a world of several, data_wait_rank and memory_peak_rank name those.
        """
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        rate = self._tokens / seconds
        found: dict[str, float] = {
            "tokens_per_second": rate,
            "tokens_per_second_per_gpu": rate / self._world,
            "step_seconds": seconds / max(self._steps, 1),
        }
        if self._peak is not None:
            found["mfu"] = rate * self._flops / (self._peak * self._world)
        microseconds = round(1e6 * self._waited)
        (wait, waiting), (memory, holder), (reserved, _) = largest(
            [microseconds, *memory_peaks(self._device)], self._device
        )
        found |= {"data_wait": min(1.0, wait / 1e6 / seconds), "memory_peak_gb": memory / 1e9}
        if reserved:
            found["memory_reserved_gb"] = reserved / 1e9
        if self._world > 1:
            found |= {"data_wait_rank": waiting, "memory_peak_rank": holder}
        self._begin_row(now)
        return found

    def _begin_row(self, now: float) -> None:
        self._start, self._waited, self._steps, self._tokens = now, 0.0, 0, 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)


def memory_peaks(device: torch.device) -> tuple[int, int]:
    """Bytes: on a GPU the peaks of tensors and of the allocator since they were reset; else the process's peak and 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), 0


def largest(values: Sequence[int], device: torch.device) -> list[tuple[int, int]]:
    """The largest of each value over all ranks and the last rank that has it, by one all-reduce.

    values: at least 0 and below 2^43; equally many on every rank.
    """
    packed = [value << _RANK_BITS | dist.get_rank() for value in values]
    over_ranks = torch.tensor(packed, dtype=torch.int64, device=device)
    dist.all_reduce(over_ranks, op=dist.ReduceOp.MAX)
    return [(item >> _RANK_BITS, item & ((1 << _RANK_BITS) - 1)) for item in over_ranks.tolist()]


class CallMeter:
    """The cost of one step on a CPU: of what lies between `start` and `stop`.

    Every way to communicate from Python, by whatever name, ends in a method of a process group, and waits for what it
    began in `Work.wait`; in between, these are replaced in this process.
    """

    def __init__(self) -> None:
        self._calls: list[Interval] = []
        self._originals: list[tuple[type, str, Any]] = []

    def start(self) -> None:
        groups = vars(dist.ProcessGroup)
        self._originals = [(dist.Work, "wait", vars(dist.Work)["wait"])]
        self._originals += [(dist.ProcessGroup, name, groups[name]) for name in _GROUP_CALLS if name in groups]
        for owner, name, original in self._originals:
            setattr(owner, name, self._timed(original))
        self._start = time.perf_counter()

    def stop(self) -> StepCost:
        seconds = time.perf_counter() - self._start
        for owner, name, original in self._originals:
            setattr(owner, name, original)
        return cost_of_step(seconds, self._calls, [])

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._calls.append(Interval(start, time.perf_counter()))

        return call


class KernelMeter:
    """The cost of one step on a GPU, from the kernels and copies that torch's profiler sees between `start` and `stop`."""

    def start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        self._profile: Any = profile(activities=[ProfilerActivity.CUDA])
        self._profile.start()
        self._start = time.perf_counter()

    def stop(self) -> StepCost:
        torch.cuda.synchronize()
        seconds = time.perf_counter() - self._start
        self._profile.stop()
        talk: list[Interval] = []
        other: list[Interval] = []
        # The raw events: building torch's tree of some hundred thousand takes longer than a step.
        for event in self._profile.profiler.kineto_results.events():
            if event.device_type().name == "CUDA" and not event.is_user_annotation():
                name, interval = event.name(), Interval(event.start_ns() / 1e9, event.end_ns() / 1e9)
                (talk if is_communication(name) else other).append(interval)
        return cost_of_step(seconds, talk, other)


def is_communication(kernel: str) -> bool:
    """Whether a kernel of this name is one of NCCL's."""
    return kernel.startswith("nccl")


def cost_of_step(seconds: float, communication: Iterable[Interval], other: Iterable[Interval]) -> StepCost:
    """From the intervals of communication and of the device's other work within a step of so many seconds."""
    communication, other = list(communication), list(other)
    return StepCost(seconds, covered(communication), covered([*communication, *other]) - covered(other))


def covered(intervals: Iterable[Interval]) -> float:
    """Seconds in which at least one of them lies."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def costs_of_ranks(own: StepCost, device: torch.device) -> list[StepCost]:
    """Every rank's cost, by one all-gather."""
    mine = torch.tensor(own, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [StepCost(*cost.tolist()) for cost in everyone]


def summary(costs: Sequence[StepCost]) -> dict[str, float]:
    """The shares of a step, as means over ranks, and the rank that kept the others waiting.

    costs: by rank; not finite for a rank that could not measure.

    Returns:
        communication_share, exposed_communication_share; with several ranks slowest_rank, and slowest_rank_excess: by how
        much its own time, outside exposed communication, is above the median rank's, relative to that. Nothing, where no
        rank could measure.
    """
    known = {rank: cost for rank, cost in enumerate(costs) if all(map(math.isfinite, cost)) and cost.seconds > 0}
    if not known:
        return {}
    found: dict[str, float] = {
        "communication_share": statistics.fmean(cost.communication / cost.seconds for cost in known.values()),
        "exposed_communication_share": statistics.fmean(cost.exposed / cost.seconds for cost in known.values()),
    }
    if len(costs) > 1:
        busy = {rank: cost.seconds - cost.exposed for rank, cost in known.items()}
        slowest = max(busy, key=lambda rank: busy[rank])
        excess = busy[slowest] / max(statistics.median(busy.values()), 1e-9) - 1
        found |= {"slowest_rank": slowest, "slowest_rank_excess": excess}
    return found
