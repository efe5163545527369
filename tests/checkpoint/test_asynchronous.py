"""An asynchronous save writes the state of its call, is whole or not there, and fails on all ranks alike."""

import errno
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import state_dict_saver

from em_megatron.checkpoint.folder import CheckpointError
from em_megatron.checkpoint.sharded import CheckpointStore
from em_megatron.checkpoint.writing import ResultsFile
from tests.checkpoint.tiny_run import content, in_writers, resume, save, trainer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU backend")

KINDS = [("tp2", "plain"), ("vpp2", "bf16"), ("vpp2", "distributed"), ("dp2", "bf16 distributed")]


def wait_for(gate: Path) -> None:
    while not gate.exists():
        time.sleep(0.01)


def probe_snapshot(root: Path) -> dict[str, dict[str, Any]]:
    """Saves the same step both ways, trains on while the writer waits, and resumes from the asynchronous one."""
    results = {}
    for layout, kind in KINDS:
        folder = root / f"{layout} {kind}"
        both = [CheckpointStore(folder / way, keep_last=1) for way in ("at once", "later")]
        run = trainer(layout, kind, dropout=0.3)
        run.train(2)
        at_once = save(both[0], run)
        with in_writers(lambda gate=folder / "gate": wait_for(gate)):
            later = save(both[1], run, asynchronous=True)
        went_on = run.train(2)
        early = (both[1].finalize(), both[1].latest(), later.exists())
        dist.barrier()
        (folder / "gate").touch()
        completed = both[1].finalize(blocking=True)
        one, other = content(at_once), content(later)
        resumed = trainer(layout, kind, seed=8, dropout=0.3)
        resume(both[1], resumed)
        results[f"{layout} {kind}"] = {
            "early": early,
            "completed": completed == later,
            "differing": [key for key in one.keys() | other.keys() if not torch.equal(one[key], other[key])],
            "same documents": [
                (at_once / n).read_text() == (later / n).read_text() for n in ("train_state.json", "config.yaml")
            ],
            "steps": (went_on, resumed.train(2)),
        }
    return results


def limit_file_size() -> None:
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def of_rank_0(store: CheckpointStore, run: Any, asynchronous: bool) -> str:
    """The error of a save in which rank 0 can write no more once the tensors are written."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit() -> None:
        if dist.get_rank() == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, most))

    finalize = state_dict_saver.save_state_dict_async_finalize

    def limited(*args: Any) -> None:
        limit()
        finalize(*args)

    state_dict_saver.save_state_dict_async_finalize = limited
    try:
        save(store, run, asynchronous=asynchronous)
        store.finalize(blocking=True)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        state_dict_saver.save_state_dict_async_finalize = finalize
    return ""


def die() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def without_memory() -> Iterator[None]:
    """Rank 1 cannot fork."""
    fork = os.fork

    def fail() -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    if dist.get_rank() == 1:
        os.fork = fail
    try:
        yield
    finally:
        os.fork = fork


def probe_failures(root: Path) -> dict[str, tuple[str, str]]:
    """For each way to fail: the message of finalize, and the newest checkpoint after it."""
    store = CheckpointStore(root, keep_last=3)
    run = trainer("dp2", "plain")
    run.train(1)
    save(store, run, asynchronous=True)
    results = {}
    for name, failing in (
        ("file too large", in_writers(limit_file_size)),
        ("killed", in_writers(die)),
        ("no process", without_memory()),
    ):
        run.train(1)
        with failing:
            save(store, run, asynchronous=True)
        message = ""
        try:
            store.finalize(blocking=True)
        except CheckpointError as error:
            message = str(error)
        assert store.finalize(blocking=True) is None
        results[name] = (message, store.latest().name)
    for name, asynchronous in (("rank 0 alone, later", True), ("rank 0 alone, at once", False)):
        results[name] = (of_rank_0(store, run, asynchronous), store.latest().name)
    save(store, run, asynchronous=True)
    results["none"] = ("", store.finalize(blocking=True).name)
    return results


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    names = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier")
    plain, calls = {name: getattr(dist, name) for name in names}, Counter()

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return plain[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name in names:
            setattr(dist, name, plain[name])


def probe_pending(root: Path) -> dict[str, Any]:
    """What a store does while a save of it is pending; its writer waits for a gate."""
    store = CheckpointStore(root, keep_last=5)
    run = trainer("tp2", "plain")
    run.train(1)
    save(store, run)
    found: dict[str, Any] = {}
    children = len(psutil.Process().children())
    with counted_collectives() as calls:
        store.finalize()
        store.finalize(blocking=True)
    found["collectives when none is pending"] = dict(calls)
    run.train(1)
    with in_writers(lambda: wait_for(root / "gate")):
        save(store, run, asynchronous=True)
    with counted_collectives() as calls:
        assert store.finalize() is None
    found["collectives when one is pending"] = dict(calls)
    found["latest"] = [store.latest(resuming=resuming).name for resuming in (False, True)]
    found["still there"] = (root / ".step_00000002.writing").is_dir()
    found["writers"] = len(psutil.Process().children()) - children
    run.train(1)
    dist.barrier()
    threading.Timer(0.3, (root / "gate").touch).start()
    start = time.monotonic()
    save(store, run)
    found["waited"] = time.monotonic() - start
    found["steps"] = sorted(path.name for path in root.glob("*step*"))
    found["writers left"] = len(psutil.Process().children()) - children
    return found


def probe(root: Path) -> dict[str, Any]:
    return {
        "snapshot": probe_snapshot(root / "snapshot"),
        "failures": probe_failures(root / "failures"),
        "pending": probe_pending(root / "pending"),
    }


@pytest.mark.parametrize(("layout", "kind"), KINDS)
def test_the_state_of_the_call_is_saved(layout: str, kind: str, ranks: Any) -> None:
    for rank in ranks:
        found = rank["asynchronous"]["snapshot"][f"{layout} {kind}"]
        assert found["early"] == (None, None, False)
        assert found["completed"]
        assert found["differing"] == []
        assert found["same documents"] == [True, True]
        went_on, resumed = found["steps"]
        assert went_on == resumed


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("file too large", "(rank 1: Worker failure: "),
        ("killed", "(rank 0: Worker failure: the writing process ended without a report"),
        ("no process", "no writing process could be started: [Errno 12] Cannot allocate memory"),
        ("rank 0 alone, later", "(rank 0: [Errno 27] File too large)"),
        ("rank 0 alone, at once", "(rank 0: [Errno 27] File too large)"),
    ],
)
def test_a_failed_writer_is_an_error_on_every_rank(way: str, reason: str, ranks: Any) -> None:
    messages = {rank["asynchronous"]["failures"][way] for rank in ranks}
    assert len(messages) == 1
    message, newest = messages.pop()
    assert reason in message
    assert "the checkpoints before it are whole" in message
    assert newest == "step_00000001"


def test_a_save_after_failed_ones(ranks: Any) -> None:
    for rank in ranks:
        assert rank["asynchronous"]["failures"]["none"] == ("", "step_00000004")


def test_a_pending_save_is_left_alone_and_then_waited_for(ranks: Any) -> None:
    for rank in ranks:
        found = rank["asynchronous"]["pending"]
        assert found["latest"] == ["step_00000001", "step_00000001"]
        assert found["still there"]
        assert found["waited"] > 0.25
        assert found["steps"] == ["step_00000001", "step_00000002", "step_00000003"]


def test_looking_for_the_end_costs_one_small_collective(ranks: Any) -> None:
    for rank in ranks:
        found = rank["asynchronous"]["pending"]
        assert found["collectives when none is pending"] == {}
        assert found["collectives when one is pending"] == {"all_reduce": 1}


def test_one_process_writes_and_none_stays(ranks: Any) -> None:
    for rank in ranks:
        assert rank["asynchronous"]["pending"]["writers"] == 1
        assert rank["asynchronous"]["pending"]["writers left"] == 0


def test_a_large_report_does_not_keep_the_writer_alive() -> None:
    report, results = list(range(1_000_000)), ResultsFile()
    writer = multiprocessing.get_context("fork").Process(target=results.put, args=(report,))
    writer.start()
    writer.join(30)
    assert writer.exitcode == 0
    assert results.get_nowait() == report


def test_half_a_report_is_a_failure() -> None:
    results = ResultsFile()
    assert isinstance(results.get_nowait(), RuntimeError)
    results.put(list(range(100)))
    results._file.truncate(50)
    assert isinstance(results.get_nowait(), RuntimeError)
