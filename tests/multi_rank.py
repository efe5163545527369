"""Runs a function on several gloo ranks, one process each: the one process harness of these tests."""

import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_POLL_SECONDS = 0.02
_GRACE_SECONDS = 1.0


class RankError(RuntimeError):
    """A rank failed in a way that left no exception to raise again: it died, hung, or raised what cannot be pickled."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*args)` on `world_size` spawned ranks and return what each returned, in rank order.

    Each rank has torchrun's environment variables, one thread, and torch.distributed up on gloo; the rank is
    dist.get_rank(). `function` must be importable (module level), and arguments and results must pickle. The first
    exception of any rank is raised here with that rank's traceback as its cause, and all other ranks are ended.
    After `timeout` seconds every rank is ended and RankError is raised.
    """
    # The parent hosts the store, as torchrun does, so that no port is guessed and lost before it is used.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{rank}.pickle" for rank in range(world_size)]
        ranks: list[BaseProcess] = [
            context.Process(target=_run, args=(function, args, rank, world_size, store.port, reports[rank], timeout))
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            _wait(ranks, reports, time.monotonic() + timeout)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
            for process in ranks:
                if process.pid is not None:
                    process.join()
        return [_read(report)["result"] for report in reports]


def _wait(ranks: list[BaseProcess], reports: list[Path], deadline: float) -> None:
    while any(process.exitcode is None for process in ranks):
        if any(process.exitcode for process in ranks):
            # Others may be about to report the cause of which this exit is the consequence.
            end = time.monotonic() + _GRACE_SECONDS
            while time.monotonic() < end and any(process.exitcode is None for process in ranks):
                time.sleep(_POLL_SECONDS)
            break
        if time.monotonic() > deadline:
            waiting = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
            raise RankError(f"Ranks {waiting} were still running at the end of the time given to them.")
        time.sleep(_POLL_SECONDS)
    _raise_first_failure(ranks, reports)


def _raise_first_failure(ranks: list[BaseProcess], reports: list[Path]) -> None:
    for rank, process in enumerate(ranks):
        # A rank ended by a signal is the cause of the connection errors of the others.
        if process.exitcode is not None and process.exitcode < 0:
            raise RankError(f"Rank {rank} was ended by signal {-process.exitcode}.")
    failures = [_read(report) for report in reports if report.exists()]
    failures = sorted((failure for failure in failures if "error" in failure), key=lambda f: f["time"])
    if failures:
        first = failures[0]
        raise first["error"] from RankError(f"on rank {first['rank']}:\n{first['traceback']}")
    for rank, process in enumerate(ranks):
        if process.exitcode:
            raise RankError(f"Rank {rank} exited with code {process.exitcode} and left no report.")


def _run(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    port: int,
    report: Path,
    timeout: float,
) -> None:
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
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        outcome = {"result": function(*args)}
        if dist.is_initialized():
            dist.barrier()
    except BaseException as error:
        _write(report, _failure(rank, error))
        # Not sys.exit: destructors of process groups wait for ranks that will not come.
        os._exit(1)
    _write(report, outcome)
    os._exit(0)


def _failure(rank: int, error: BaseException) -> dict[str, Any]:
    text = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RankError(f"{type(error).__name__}: {error}")
    return {"rank": rank, "time": time.time(), "error": error, "traceback": text}


def _write(report: Path, content: dict[str, Any]) -> None:
    partial = report.with_suffix(".writing")
    # torch.save and not pickle: with Megatron-Core loaded, tensors pickle to a reference to it, and reading takes 5 s.
    torch.save(content, partial)
    partial.rename(report)


def _read(report: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(report, weights_only=False)
    return content


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
