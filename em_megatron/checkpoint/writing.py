"""Megatron's distributed save, in this process or in one forked from it while training goes on."""

import ctypes
import os
import pickle
import queue
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from em_megatron.checkpoint.folder import CheckpointError, sha256
from em_megatron.checkpoint.ranks import from_all_ranks, on_rank_zero

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def write(state: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write the sharded state into `folder`; gives file → SHA-256 of the tensors of all ranks.

    CheckpointError on every rank if one could not.
    """
    from megatron.core import dist_checkpointing

    with _results_through(queue.Queue()), _failures_as_checkpoint_error(folder), _rank_zero_failures() as failures:
        dist_checkpointing.save(state, str(folder), _parallel_over_replicas())
    _raise_on_all_ranks(folder, failures)
    return _merged(folder, partial(_checksums, folder, dist.get_rank()))


class BackgroundWriter:
    """Writes the sharded state, as it is now, into `folder` from a forked process of each rank.

    The process sees the rank's memory as it was at the fork, so training may change everything at once; what it
    changes takes memory twice meanwhile. GPU tensors are copied to the host before. On Linux the process is killed
    when its rank dies (to be exact, when the thread that called this ends).
    """

    def __init__(self, state: dict[str, Any], folder: Path) -> None:
        from megatron.core import dist_checkpointing

        self.folder = folder
        results, self._sums = ResultsFile(), ResultsFile()
        with _results_through(results):
            request = dist_checkpointing.save(
                state, str(folder), _parallel_over_replicas(), async_sharded_save=True, async_strategy="mcore"
            )
        if request.async_fn is not None:  # None where this rank has nothing to write
            work = _then_checksums(request.async_fn, folder, dist.get_rank(), self._sums)
            request = request._replace(async_fn=_ended_with_this_process(work))
        else:
            self._sums.put({})
        self._calls = _start(request, results)

    def ended(self, blocking: bool) -> bool:
        """Whether the tensors are written on all ranks, after waiting for it if `blocking`.

        Called by all ranks together: one all-reduce of an integer, and a few more at the end. Raises CheckpointError
        on every rank if one could not write.
        """
        with _failures_as_checkpoint_error(self.folder), _rank_zero_failures() as failures:
            ended = bool(self._calls.maybe_finalize_async_calls(blocking=blocking))
        if ended:
            _raise_on_all_ranks(self.folder, failures)
        return ended

    def checksums(self) -> dict[str, str]:
        """File → SHA-256 of the tensors' files of all ranks, once `ended`."""
        return _merged(self.folder, self._sums.get_nowait)


class ResultsFile:
    """Hands what the writing process reports over to its rank: a file without a name that both have open.

    It stands for the queue of a manager process, which Megatron would start: that one outlives a killed rank and
    needs an entry script with a __main__ guard. A queue on a pipe would not do: what does not fit into the pipe's
    64 KiB keeps the writer alive until the rank reads, and the rank reads when the writer has ended.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as this object)

    def put(self, report: Any) -> None:
        self._file.write(pickle.dumps(report))
        self._file.flush()

    def get_nowait(self) -> Any:
        """The report, or an exception if the writer ended without one."""
        # pread: the position in the file is shared with the writer.
        content = os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0)
        try:
            return pickle.loads(content)
        except (EOFError, pickle.UnpicklingError):
            return RuntimeError("the writing process ended without a report, as one does that was killed")


def _start(request: Any, results: ResultsFile) -> Any:
    """Megatron's queue with this one request under way."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    calls = AsyncCallsQueue(persistent=False)
    try:
        calls.schedule_async_request(request)
    except OSError as error:  # no memory to fork: reported as a failed write, so that all ranks hear of it
        results.put(RuntimeError(f"no writing process could be started: {error}"))
        calls = AsyncCallsQueue(persistent=False)
        calls.schedule_async_request(request._replace(async_fn=None))
    return calls


def _then_checksums(function: Callable[..., None], folder: Path, rank: int, sums: ResultsFile) -> Callable[..., None]:
    """`function`, and then the checksums of what it wrote, taken in the same process."""

    def work(*args: Any) -> None:
        function(*args)
        sums.put(_checksums(folder, rank))

    return work


def _checksums(folder: Path, rank: int) -> dict[str, str]:
    """File → SHA-256 of this rank's files of tensors."""
    return {path.name: sha256(path) for path in sorted(folder.glob(f"__{rank}_*.distcp"))}


def _merged(folder: Path, mine: Callable[[], Any]) -> dict[str, str]:
    """The checksums of all ranks; CheckpointError on every rank if one has none."""
    found: Any
    try:
        found = mine()
    except OSError as error:
        found = error
    everyone = from_all_ranks(found)
    for rank, sums in enumerate(everyone):
        if isinstance(sums, Exception):
            raise CheckpointError(f"{folder} could not be read back by rank {rank} ({sums})")
    return {name: value for sums in everyone for name, value in sums.items()}


def _ended_with_this_process(function: Callable[..., None]) -> Callable[..., None]:
    """`function` for a forked process, which asks Linux first to be killed when this process dies."""
    # Looked up before the fork: another thread may hold the loader's lock at that moment, for ever in the child.
    prctl = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None
    return partial(_call_in_fork, os.getpid(), prctl, function)


def _call_in_fork(parent: int, prctl: Callable[..., int] | None, function: Callable[..., None], *args: Any) -> None:
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request was heard
        os.kill(os.getpid(), signal.SIGKILL)
    function(*args)


def _parallel_over_replicas() -> Any:
    """Save strategy in which data-parallel replicas share the writing instead of leaving it to the first."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), replicas)


@contextmanager
def _results_through(results: Any) -> Iterator[None]:
    """Let the writer that Megatron makes meanwhile report through `results`, not through a manager process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy

    # Megatron's own asynchronous save, which its synchronous one goes through too, warns that another is preferred.
    torch_strategy._logged_mcore_async_deprecation = True
    before = filesystem_async._results_queue
    filesystem_async._results_queue = results
    try:
        yield
    finally:
        filesystem_async._results_queue = before


@contextmanager
def _failures_as_checkpoint_error(folder: Path) -> Iterator[None]:
    """Turn Megatron's exception, which it raises on all ranks if one could not write, into CheckpointError."""
    try:
        yield
    except CheckpointException as error:  # a BaseException: no caller's handler would see it
        # What failed is known on rank 0 alone.
        failures = [f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items()]
        reason = on_rank_zero(lambda: next(iter(failures), "unknown reason"))
        raise _not_written(folder, reason) from None


def _not_written(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{folder} could not be written ({reason}); the checkpoints before it are whole")


def _raise_on_all_ranks(folder: Path, failures: list[str]) -> None:
    if reason := on_rank_zero(lambda: next(iter(failures), "")):
        raise _not_written(folder, reason)


@contextmanager
def _rank_zero_failures() -> Iterator[list[str]]:
    """Collects the failures of what Megatron writes on rank 0 alone (the list of tensors, its own description).

    Megatron would raise them there while the other ranks wait. Here it goes on as if it were written.
    """
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    found: list[str] = []

    def held(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            try:
                function(*args)
            except OSError as error:
                found.append(f"rank 0: {error}")

        return call

    writer = filesystem_async.FileSystemWriterAsync
    finish, save_config = writer.finish, serialization.save_config
    writer.finish, serialization.save_config = held(finish), held(save_config)
    try:
        yield found
    finally:
        writer.finish, serialization.save_config = finish, save_config
