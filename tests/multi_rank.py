"""Runs functions on several ranks, one process each, which stay up in between: the one process harness of the tests."""

import atexit
import contextlib
import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_POLL_SECONDS = 0.01
_GRACE_SECONDS = 1.0
_MOST_SIZES = 3  # of pools alive at once: half a gigabyte a process
_MOST_THREADS = 20
_START_SECONDS = 240.0
# No collective ends a run by itself: the parent does, by the timeout of the run.
_COLLECTIVE_TIMEOUT = timedelta(days=1)


class RankError(RuntimeError):
    """A rank failed in a way that left no exception to raise again: it died, hung, or raised what cannot be pickled."""


@dataclass
class _Failure:
    """What a rank reports in place of a result."""

    time: float
    error: BaseException
    traceback: str


class Ranks:
    """`world_size` processes that run one function after another; started at the first run, and anew after a failure.

    Each rank has torchrun's environment variables, one thread, and torch.distributed up: on gloo, or where CUDA is
    present on nccl with gloo for CPU tensors and rank as the current device. The rank is dist.get_rank(). What a
    function changes in its process (environment, patches, modules) is there in the next run, and what the caller
    changes in its own after the start is not seen; process groups other than the default one end with their run.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[BaseProcess] = []
        self._commands: list[Connection] = []
        self._store: dist.TCPStore | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """Call `function(*args)` on every rank and return what each returned, in rank order.

        `function` must be importable (module level), and arguments and results must pickle; tensors of the results
        arrive on the CPU. The first exception of any rank is raised here, with that rank's traceback as its cause.
        RankError is raised for a rank that died, and after `timeout` seconds, in which a start does not count. After
        any of these every process is ended, and so it is after a function that leaves the default process group.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            # Not pickle: with Megatron-Core loaded, tensors pickle to a reference to it, and reading takes 5 s.
            torch.save((function, args), folder / "call")
            try:
                if not self._processes or any(process.exitcode is not None for process in self._processes):
                    self._start(folder)
                outcomes = self._call(folder, timeout)
            except BaseException:
                self.close()
                raise
        if not all(reusable for _, reusable in outcomes):
            self.close()
        return [result for result, _ in outcomes]

    def close(self) -> None:
        """End every process without waiting for what it does; the next run starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for command in self._commands:
            command.close()
        self._processes, self._commands, self._store = [], [], None
        atexit.unregister(self.close)

    def _start(self, folder: Path) -> None:
        self.close()
        # Before multiprocessing's own handler, which would wait for the processes to end.
        atexit.register(self.close)
        # The parent hosts the store, as torchrun does, so that no port is guessed and lost before it is used.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        reports = [folder / f"{rank}.ready" for rank in range(self.world_size)]
        for rank, report in enumerate(reports):
            receiver, sender = context.Pipe(duplex=False)
            self._commands.append(sender)
            args = (rank, self.world_size, self._store.port, receiver, report)
            process = context.Process(target=_work, args=args)
            process.start()
            self._processes.append(process)
            receiver.close()
        self._wait(reports, _START_SECONDS)

    def _call(self, folder: Path, timeout: float) -> list[tuple[Any, bool]]:
        reports = [folder / f"{rank}.report" for rank in range(self.world_size)]
        for command, report in zip(self._commands, reports, strict=True):
            with contextlib.suppress(BrokenPipeError):  # a rank that has just died, which _wait finds
                command.send((folder / "call", report))
        return self._wait(reports, timeout)

    def _wait(self, reports: list[Path], seconds: float) -> list[Any]:
        """What each rank reported, once all have; raises the first failure."""
        end = time.monotonic() + seconds
        while waiting := [rank for rank, report in enumerate(reports) if not report.exists()]:
            if any(process.exitcode is not None for process in self._processes):
                self._wait_for_the_cause(reports)
                break
            if time.monotonic() > end:
                raise RankError(f"Ranks {waiting} were still running at the end of the time given to them.")
            time.sleep(_POLL_SECONDS)
        exits = [process.exitcode for process in self._processes]
        found = [_read(report) if report.exists() else None for report in reports]
        _raise_first_failure(exits, found)
        return found

    def _wait_for_the_cause(self, reports: list[Path]) -> None:
        """Let the others report for a moment: one of them may know the cause, of which an exit is the consequence."""
        end = time.monotonic() + _GRACE_SECONDS
        ranks = list(zip(self._processes, reports, strict=True))
        while time.monotonic() < end and any(p.exitcode is None and not report.exists() for p, report in ranks):
            time.sleep(_POLL_SECONDS)


class Pools:
    """`pools(world_size)` is the shared Ranks of that size; the processes of three sizes at most are kept alive.

    Call it before each use rather than keeping what it returned, so that it knows which size was used last.
    """

    def __init__(self) -> None:
        self._pools: dict[int, Ranks] = {}  # the one used last at the end

    def __call__(self, world_size: int) -> Ranks:
        pool = self._pools.pop(world_size, None) or Ranks(world_size)
        for other in list(self._pools.values())[: 1 - _MOST_SIZES]:
            other.close()
        self._pools[world_size] = pool
        return pool

    def close(self) -> None:
        """End the processes of every size; later uses start new ones."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """`Ranks.run` on processes of its own, for functions that end or change them for good."""
    ranks = Ranks(world_size)
    try:
        return ranks.run(function, *args, timeout=timeout)
    finally:
        ranks.close()


def _raise_first_failure(exits: list[int | None], found: list[Any]) -> None:
    """Raises for a failure or an early exit; `found` holds each rank's report, None where there is none."""
    unfinished = any(report is None for report in found)
    for rank, (code, report) in enumerate(zip(exits, found, strict=True)):
        # A rank that ended without raising is the cause of the connection errors of the others.
        if unfinished and code is not None and not isinstance(report, _Failure):
            how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code} in the middle of a run"
            raise RankError(f"Rank {rank} {how}.")
    failures = [report for report in found if isinstance(report, _Failure)]
    if failures:
        first = min(failures, key=lambda failure: failure.time)
        raise first.error from RankError(first.traceback)


def _work(rank: int, world_size: int, port: int, commands: Connection, ready: Path) -> None:
    """The life of one rank: join the others, then do what the parent asks until it ends this process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    _report(rank, ready, _join, rank)
    world = dist.group.WORLD
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # the parent is gone, or the user ends all of it
        while True:
            call, report = commands.recv()
            _report(rank, report, _do, call, world)
    os._exit(1)


def _join(rank: int) -> str:
    """Start torch.distributed; returns its backend."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    return backend


def _do(call: Path, world: dist.ProcessGroup) -> tuple[Any, bool]:
    """The function's result, and whether this process can run another one."""
    function, args = torch.load(call, weights_only=False)
    result = function(*args)
    reusable = dist.group.WORLD is world
    if reusable:
        leave_groups()
    return result, reusable


def leave_groups() -> None:
    """Meet the other ranks and leave every process group but the default one; also between the layouts of one call."""
    world = dist.group.WORLD
    if torch.are_deterministic_algorithms_enabled():  # the setter imports torch.compile, which takes 1.5 s
        torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if parallel_state := sys.modules.get("megatron.core.parallel_state"):
        parallel_state.destroy_model_parallel()
    dist.barrier()
    # Megatron only forgets its groups: the 20 of a layout would keep 60 threads and 80 open files.
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not world:
            dist.destroy_process_group(group)
    # Those that cycles of garbage hold live on, and hundreds of idle threads take the processors from other tests.
    if len(os.listdir("/proc/self/task")) > _MOST_THREADS:
        gc.collect()


def _report(rank: int, report: Path, function: Callable[..., Any], *args: Any) -> None:
    """Leave what `function` returns in the file `report`; where it raises, leave that and end this process."""
    partial = report.with_suffix(".writing")
    try:
        torch.save(function(*args), partial)
    except BaseException as error:
        torch.save(_failure(rank, error), partial)
        partial.rename(report)
        # Not sys.exit: destructors of process groups wait for ranks that will not come.
        os._exit(1)
    partial.rename(report)


def _failure(rank: int, error: BaseException) -> _Failure:
    when, text = time.time(), traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RankError(f"rank {rank}: {type(error).__name__}: {error}")
    return _Failure(when, error, textwrap.indent(text, f"rank {rank}: ", lambda line: True))


def _read(report: Path) -> Any:
    return torch.load(report, map_location="cpu", weights_only=False)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
