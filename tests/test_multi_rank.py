"""The process harness: results, processes that stay, and every way a run can fail, reported soon and by rank."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

from tests.multi_rank import Pools, RankError, Ranks, run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs or none")

SECONDS_TO_REPORT = 10  # the harness takes 1 to 2; the rest is for a busy machine


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    """Two ranks whose failures cost the other tests no start."""
    own = Ranks(2)
    yield own
    own.close()


def place(label: str, value: torch.Tensor) -> tuple[str, int, int, torch.Tensor]:
    total = value * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return label, dist.get_rank(), int(os.environ["LOCAL_RANK"]), total


def test_results_come_in_rank_order(ranks: Pools) -> None:
    found = ranks(2).run(place, "here", torch.arange(3.0))
    assert [row[:3] for row in found] == [("here", 0, 0), ("here", 1, 1)]
    assert all(torch.equal(row[3], 3 * torch.arange(3.0)) for row in found)


def pid() -> int:
    return os.getpid()


def leave_a_mark() -> None:
    os.environ["MARK_OF_AN_EARLIER_RUN"] = str(dist.get_rank())
    torch.use_deterministic_algorithms(True)


def marks() -> tuple[str, bool]:
    return os.environ.pop("MARK_OF_AN_EARLIER_RUN"), torch.are_deterministic_algorithms_enabled()


def test_processes_stay(ranks: Pools) -> None:
    before = ranks(2).run(pid)
    ranks(2).run(leave_a_mark)
    assert ranks(2).run(marks) == [("0", False), ("1", False)]
    assert ranks(2).run(pid) == before
    assert len({*before, os.getpid()}) == 3


def tensor_ranks(forms_groups: bool, size: int) -> tuple[int, int, int]:
    """A sum over the tensor ranks, and the process groups and threads there are at the end."""
    from em_megatron.parallel.process_groups import initialize

    total = torch.ones(1)
    if forms_groups:
        layout = initialize(tensor_model_parallel_size=size)
        dist.all_reduce(total, group=layout.pg_collection.tp)
    return int(total), len(dist.distributed_c10d._world.pg_map), len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU backend")
def test_groups_end_with_their_run(ranks: Pools) -> None:
    seen = [ranks(2).run(tensor_ranks, True, size) for size in (2, 1, 2)]
    assert [[rank[0] for rank in run] for run in seen] == [[2, 2], [1, 1], [2, 2]]
    after = ranks(2).run(tensor_ranks, False, 0)
    assert all(groups == 1 for _, groups, _ in after)
    # Three layouts have been formed, and each group of one has 3 threads.
    one_layout = max(threads for _, _, threads in seen[0])
    assert all(threads < one_layout for _, _, threads in after)


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    dist.barrier()


def hang_while_rank_one_fails() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    time.sleep(1000)


@pytest.mark.parametrize("function", [fail_on_rank_one, hang_while_rank_one_fails])
def test_exception_of_a_rank_is_raised_and_ends_the_others(pool: Ranks, function: Any) -> None:
    before = pool.run(pid)
    start = time.monotonic()
    with pytest.raises(KeyError, match="the reason") as caught:
        pool.run(function)
    assert time.monotonic() - start < SECONDS_TO_REPORT
    assert isinstance(caught.value.__cause__, RankError)
    lines = str(caught.value.__cause__).splitlines()
    assert all(line.startswith("rank 1: ") for line in lines)
    assert any(function.__name__ in line for line in lines)
    assert not any(is_alive(process) for process in before)
    assert set(pool.run(pid)).isdisjoint(before)


def end_rank_one(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "message"),
    [("signal", "Rank 1 was ended by signal 9"), ("exit", "Rank 1 exited with code 0 in the middle of a run")],
)
def test_rank_that_ends_is_named(pool: Ranks, how: str, message: str) -> None:
    pool.run(pid)
    start = time.monotonic()
    # The other rank reports that the connection was closed, which is not the cause.
    with pytest.raises(RankError, match=message):
        pool.run(end_rank_one, how)
    assert time.monotonic() - start < SECONDS_TO_REPORT


def sleep_on_rank_one(seconds: float) -> int:
    if dist.get_rank() == 1:
        time.sleep(seconds)
    return dist.get_rank()


def test_timeout_ends_the_run(pool: Ranks) -> None:
    assert pool.run(sleep_on_rank_one, 0) == [0, 1]
    start = time.monotonic()
    # Rank 0 waits at the barrier that ends a run.
    with pytest.raises(RankError, match=r"Ranks \[0, 1\] were still running"):
        pool.run(sleep_on_rank_one, 1000, timeout=1)
    assert 1 < time.monotonic() - start < SECONDS_TO_REPORT


class UnpicklableError(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def raise_unpicklable() -> NoReturn:
    raise UnpicklableError("it", "happened")


def return_unpicklable() -> Any:
    return (number for number in range(3))


def leave_the_default_group() -> bool:
    dist.destroy_process_group()
    return dist.is_initialized()


def test_what_does_not_pickle_is_told(pool: Ranks) -> None:
    with pytest.raises(RankError, match="rank 0: UnpicklableError: it happened"):
        run_ranks(raise_unpicklable, 1)
    with pytest.raises(TypeError, match="cannot pickle 'generator'"):
        run_ranks(return_unpicklable, 1)
    before = pool.run(pid)
    with pytest.raises(Exception, match="lambda"):
        pool.run(lambda: None)
    assert pool.run(pid) == before, "the ranks have not seen it"


def test_function_may_leave_the_default_group(pool: Ranks) -> None:
    before = pool.run(pid)
    assert pool.run(leave_the_default_group) == [False, False]
    assert set(pool.run(pid)).isdisjoint(before)


def test_rank_that_died_in_between_is_replaced(pool: Ranks) -> None:
    before = pool.run(pid)
    os.kill(before[1], signal.SIGKILL)
    pool._processes[1].join()
    assert set(pool.run(pid)).isdisjoint(before)


def is_alive(process: int) -> bool:
    """Whether this process runs; one that has ended and was not waited for does not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_close_leaves_no_process(pool: Ranks) -> None:
    processes = pool.run(pid)
    assert all(map(is_alive, processes))
    pool.close()
    assert not any(map(is_alive, processes))
    pool.close()


PARENT = """
import os
from tests.multi_rank import Ranks
from tests.test_multi_rank import pid
if __name__ == "__main__":
    print(*Ranks(1).run(pid), flush=True)
    {end}
"""


def test_ranks_end_with_their_parent(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    parents = []
    for code, end in ((0, "pass"), (-signal.SIGKILL, "os.kill(os.getpid(), 9)")):
        script = tmp_path / f"parent{code}.py"
        script.write_text(PARENT.format(end=end))
        parents.append((code, subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE)))
    for code, parent in parents:
        output, _ = parent.communicate(timeout=100)
        assert parent.returncode == code
        deadline = time.monotonic() + SECONDS_TO_REPORT
        while is_alive(int(output)):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_pools_keep_three_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: set[int] = set()
    monkeypatch.setattr(Ranks, "close", lambda self: closed.add(self.world_size))
    pools = Pools()
    for size, expected in ((1, set()), (2, set()), (4, set()), (1, set()), (8, {2}), (1, {2}), (2, {2, 4})):
        assert pools(size) is pools(size)
        assert pools(size).world_size == size
        assert closed == expected
    pools.close()
    assert closed == {1, 2, 4, 8}
