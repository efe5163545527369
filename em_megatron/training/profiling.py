"""Looks into single steps of a run: what communication costs, and windows of steps under a profiler.

Nothing here changes a number of the training, and nothing that fails here ends it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from em_megatron.config import ConfigError, RunConfig
from em_megatron.training.measurements import CallMeter, KernelMeter, StepClock, StepCost, costs_of_ranks, summary
from em_megatron.training.tracking import attempt, succeeds

TABLE_ROWS = 40
ALLOCATIONS_KEPT = 100_000  # the last ones of a window, in its snapshot of a GPU's memory
MEASURING = "measuring communication"
NOT_MEASURED = StepCost(float("nan"), float("nan"), float("nan"))


def check_profiling(config: RunConfig, world_size: int, cuda_available: bool) -> None:
    """Checks `profiling.*` against a world of `world_size` ranks.

    Raises:
        ConfigError: the window cannot be profiled.
    """
    window = config.profiling
    if not window.first_step:
        return
    if window.tool == "nsys" and not cuda_available:
        raise ConfigError("profiling.tool 'nsys' records GPUs and there is none here: choose torch")
    outside = [rank for rank in window.ranks if not 0 <= rank < world_size]
    if outside or not window.ranks:
        named = ", ".join(map(str, outside)) or "empty"
        raise ConfigError(f"profiling.ranks is {named}, but the ranks of this run are 0 to {world_size - 1}: name some")
    if window.first_step > config.training.train_steps:
        raise ConfigError(
            f"profiling.first_step {window.first_step} is after the last step, training.train_steps "
            f"{config.training.train_steps}: choose an earlier one"
        )


@contextmanager
def span(name: str) -> Iterator[None]:
    """A named part of a step, in the traces of both tools."""
    with ExitStack() as stack:
        stack.enter_context(torch.profiler.record_function(name))
        if NsysWindow.marks:
            stack.enter_context(torch.cuda.nvtx.range(name))
        yield


class Profiler:
    """Put around every step of a run, on all ranks.

    Args:
        config: of the run.
        device: of this rank.
        clock: of the run, which leaves out what looking costs, outside the steps.
        step: the last one done when this call of the run began.
    """

    def __init__(self, config: RunConfig, device: torch.device, clock: StepClock, step: int) -> None:
        self._config, self._device, self._clock = config, device, clock
        self._found: dict[str, float] = {}
        self._window: Window | None = None
        self._first, self._last = window_steps(config, step)
        if self._first <= self._last and dist.get_rank() in config.profiling.ranks:
            kind = NsysWindow if config.profiling.tool == "nsys" else TorchWindow
            self._window = kind(
                self._first, self._last, config.run_dir / "profile", device, warm=self._first > step + 1
            )

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The training of step `number`, counted over the whole run from 1."""
        if self._window is not None:
            with self._clock.paused():
                self._window.begin(number)
        try:
            with self._communication() if self._measures(number) else nullcontext():
                yield
        finally:
            if self._window is not None:
                with self._clock.paused():
                    self._window.finish(number)

    def found(self) -> dict[str, float]:
        """What was measured since the last call, for a row; the keys of `measurements.summary`."""
        found, self._found = self._found, {}
        return found

    def close(self) -> None:
        """Ends a window that is still open, and keeps what it has."""
        if self._window is not None:
            self._window.close()

    def _measures(self, number: int) -> bool:
        """All ranks agree on it; two profilers do not go together, so not in a window or its warm-up step."""
        interval = self._config.logging.communication_interval
        if not interval or number % interval or self._first - 1 <= number <= self._last:
            return False
        # Under nsys, torch's profiler sees no kernels.
        nsys = self._config.profiling.first_step and self._config.profiling.tool == "nsys"
        return not (nsys and self._device.type == "cuda")

    @contextmanager
    def _communication(self) -> Iterator[None]:
        if dist.get_world_size() == 1:
            yield
            self._found = {"communication_share": 0.0, "exposed_communication_share": 0.0}
            return
        meter = KernelMeter() if self._device.type == "cuda" else CallMeter()
        self._finish_kernels()
        with self._clock.paused():
            started = succeeds(MEASURING, meter.start)
        own = None
        try:
            yield
            self._finish_kernels()
        finally:
            with self._clock.paused():
                own = attempt(MEASURING, meter.stop) if started else None
        self._found = summary(costs_of_ranks(own or NOT_MEASURED, self._device))

    def _finish_kernels(self) -> None:
        """What is queued on a GPU belongs to the step that queued it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def window_steps(config: RunConfig, step: int) -> tuple[int, int]:
    """First and last step of the window that are still to come after `step`; the first is later than the last where none
    is."""
    window = config.profiling
    return max(window.first_step, step + 1), window.first_step + window.steps - 1 if window.first_step else 0


class Window(ABC):
    """Steps `first` to `last` under a profiler; what fails is warned of once and given up."""

    def __init__(self, first: int, last: int, folder: Path, device: torch.device, warm: bool) -> None:
        self.first, self.last, self.folder, self.device, self.warm = first, last, folder, device, warm
        self._broken = False

    def begin(self, number: int) -> None:
        """Step `number` comes next."""
        self._try(self.before, number)

    def finish(self, number: int) -> None:
        """Step `number` is over, or has failed."""
        self._try(self.after, number)

    def close(self) -> None:
        self._try(self.end)

    @abstractmethod
    def before(self, number: int) -> None: ...

    @abstractmethod
    def after(self, number: int) -> None: ...

    @abstractmethod
    def end(self) -> None:
        """Does nothing where the window is not open."""

    def _try(self, work: Callable[..., None], *args: Any) -> None:
        if not self._broken:
            self._broken = not succeeds("profiling", lambda: work(*args))


class TorchWindow(Window):
    """torch's profiler: a Chrome trace, a table of the operators that took most and, on GPUs, a snapshot of their memory.

    The step before the window warms the profiler up, unless this call of the run begins within the window.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._profile: Any = None
        self._recorded = 0

    def before(self, number: int) -> None:
        if number == self.first - self.warm:
            self._profile = self._started()
        if number == self.first and self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS_KEPT)

    def after(self, number: int) -> None:
        if self._profile is None:
            return
        self._recorded += number >= self.first
        if number == self.last:
            self.end()
        else:
            self._profile.step()

    def end(self) -> None:
        profile, self._profile = self._profile, None
        if profile is None:
            return
        profile.stop()
        if not self._recorded:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = str(self.folder / f"step_{self.first:08d}-rank_{dist.get_rank():04d}")
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(f"{name}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        key = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        Path(f"{name}.txt").write_text(profile.key_averages().table(sort_by=key, row_limit=TABLE_ROWS))
        profile.export_chrome_trace(f"{name}.writing.json.gz")
        os.replace(f"{name}.writing.json.gz", f"{name}.json.gz")

    def _started(self) -> Any:
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports the absence of GPUs as an error
        active = self.last - self.first + 2  # one more than there are: the window ends at `stop`
        plan = schedule(wait=0, warmup=1, active=active) if self.warm else None
        started = profile(activities=activities, schedule=plan, record_shapes=True)
        started.start()
        return started


class NsysWindow(Window):
    """Starts and stops the capture of a surrounding `nsys profile`, and names steps and their parts by NVTX ranges."""

    marks = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._open = False
        NsysWindow.marks = True

    def before(self, number: int) -> None:
        if number == self.first:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            self._open = True
        torch.cuda.nvtx.range_push(f"step {number}")

    def after(self, number: int) -> None:
        torch.cuda.nvtx.range_pop()
        if number == self.last:
            self.end()

    def end(self) -> None:
        if self._open:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            self._open = NsysWindow.marks = False
