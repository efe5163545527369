"""Looks into steps: the share of communication, the slowest rank, windows under a profiler; none changes a number."""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from em_megatron.config import ConfigError
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.loop import train
from em_megatron.training.measurements import CallMeter, KernelMeter, StepClock
from em_megatron.training.profiling import NsysWindow, Profiler, check_profiling, span
from em_megatron.training.setup import set_up
from tests.multi_rank import Pools, leave_groups
from tests.training.corpora import run_config

SHORT = ("training.train_steps=6", "validation.interval=0")
TENSOR = ("parallel.tensor_model_parallel_size=2",)
ALWAYS = ("logging.communication_interval=1",)


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def losses(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in rows]


# --- communication and the slowest rank, on two ranks ---


def slow_on_rank_1(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(0.1)  # four times a step
        return original(self, *args, **options)

    return forward


def broken_on_rank_1(original: Callable[..., Any]) -> Callable[..., Any]:
    def start(self: Any) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("no profiler here")
        original(self)

    return start


def train_runs(corpus: Path, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of some runs, by name."""

    from em_megatron.model.elastic_attention import TrapezoidCore

    rows = {}
    for name, overrides, patched in (
        ("measured", (*TENSOR, *ALWAYS), None),
        ("not measured", (*TENSOR, "logging.communication_interval=0"), None),
        ("now and then", (*TENSOR, "logging.communication_interval=2", "logging.interval=3"), None),
        ("slow rank", ALWAYS, (TrapezoidCore, "forward", slow_on_rank_1)),
        ("broken rank", (*TENSOR, *ALWAYS), (CallMeter, "start", broken_on_rank_1)),
        ("window", (*TENSOR, *ALWAYS, "profiling.first_step=3", "profiling.steps=2", "profiling.ranks=[1]"), None),
    ):
        leave_groups()
        config = run_config(corpus, folder, f"name={name.replace(' ', '_')}", *SHORT, *overrides)
        with pytest.MonkeyPatch.context() as patch:
            if patched is not None:
                owner, attribute, change = patched
                patch.setattr(owner, attribute, change(getattr(owner, attribute)))
            train(set_up(config, dist.get_world_size()))
        assert "CallMeter" not in repr(dist.Work.wait) + repr(dist.ProcessGroup.allreduce)
        rows[name] = rows_of(config.run_dir)
    return rows


@pytest.fixture(scope="module")
def runs(ranks: Pools, chain_corpus, tmp_path_factory) -> tuple[dict[str, list[dict[str, Any]]], Path]:
    folder = tmp_path_factory.mktemp("runs")
    return ranks(2).run(train_runs, chain_corpus, folder, timeout=280)[0], folder


def test_measuring_changes_no_number(runs):
    rows, _ = runs
    assert losses(rows["measured"]) == losses(rows["not measured"])
    assert losses(rows["window"]) == losses(rows["broken rank"]) == losses(rows["not measured"])


def test_tensor_parallel_ranks_communicate(runs):
    rows, _ = runs
    for row in rows["measured"]:
        assert 0.01 < row["communication_share"] < 1
        assert row["exposed_communication_share"] == row["communication_share"]  # what a CPU knows of
        assert row["slowest_rank"] in (0, 1)
        assert row["data_wait_rank"] in (0, 1)
        assert row["memory_peak_rank"] in (0, 1)
        assert row["tokens_per_second_per_gpu"] == row["tokens_per_second"] / 2
    assert not any("communication_share" in row for row in rows["not measured"])


def test_a_row_has_the_last_measurement_before_it(runs):
    rows, _ = runs
    assert [(row["step"], "communication_share" in row) for row in rows["now and then"]] == [(3, True), (6, True)]


def test_the_slow_rank_is_named(runs):
    """Its 0.4 s of sleep are its own time; the other one spends them waiting for its gradients."""
    rows = runs[0]["slow rank"]
    assert [row["slowest_rank"] for row in rows].count(1) >= 5  # the machine may have held up the other one once
    assert median(row["slowest_rank_excess"] for row in rows) > 0.2
    assert median(row["communication_share"] for row in rows) > 0.15


def test_a_rank_that_cannot_measure_is_left_out(runs):
    rows, _ = runs
    assert all(row["slowest_rank"] == 0 and row["communication_share"] > 0 for row in rows["broken rank"])


def test_no_measurement_in_a_window(runs):
    """Steps 3 and 4, and 2, which warms up; the trace is that of the rank that was asked for."""
    rows, folder = runs
    assert [row["step"] for row in rows["window"] if "communication_share" in row] == [1, 5, 6]
    names = sorted(path.name for path in (folder / "window/profile").iterdir())
    assert names == ["step_00000003-rank_0001.json.gz", "step_00000003-rank_0001.txt"]


def communicate() -> dict[str, float]:
    """Seconds that a rank spends in each way to communicate, while the other one comes 0.2 s late."""
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    here, both = torch.zeros(8), torch.zeros(16)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def exchange() -> None:
        pair = [dist.P2POp(dist.isend, here, other), dist.P2POp(dist.irecv, both[:8], other)]
        for work in dist.batch_isend_irecv(pair):
            work.wait()

    ways: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(here),
        "asynchronous": lambda: dist.all_reduce(here, async_op=True).wait(),
        "all_gather": lambda: dist.all_gather([here.clone(), here.clone()], here),
        "all_gather_single": lambda: gather(both, here),
        "reduce_scatter_single": lambda: scatter(here, both),
        "broadcast": lambda: dist.broadcast(here, 1),
        "send and recv": lambda: dist.send(here, 0) if rank else dist.recv(here, 1),
        "isend and irecv": exchange,
        "object": lambda: dist.broadcast_object_list([rank], src=1),
        "barrier": dist.barrier,
    }
    found = {}
    for name, way in ways.items():
        dist.barrier()
        meter = CallMeter()
        meter.start()
        if rank == 1:
            time.sleep(0.2)
        way()
        found[name] = meter.stop().exposed
    return found


def test_every_way_to_communicate_is_seen(ranks):
    waiting, late = ranks(2).run(communicate)
    for name, seconds in waiting.items():
        assert seconds > 0.1, name
        assert seconds > late[name], name


def test_a_group_call_that_fails_leaves_nothing_behind():
    """The step's error comes through, and the methods are torch's own again."""
    before = vars(dist.Work)["wait"], vars(dist.ProcessGroup)["allreduce"]
    meter = CallMeter()
    meter.start()
    assert vars(dist.Work)["wait"] is not before[0]
    with pytest.raises(TypeError):
        dist.ProcessGroup.allreduce(None)
    assert len(meter._calls) == 1
    meter.stop()
    assert (vars(dist.Work)["wait"], vars(dist.ProcessGroup)["allreduce"]) == before


# --- kernels: the events of a GPU, made by hand ---


class Event:
    def __init__(self, name: str, start: float, end: float, device: str = "CUDA", annotation: bool = False) -> None:
        self.name, self.start_ns, self.end_ns = (lambda: name), (lambda: start * 1e9), (lambda: end * 1e9)
        self.device_type = lambda: SimpleNamespace(name=device)
        self.is_user_annotation = lambda: annotation


def test_kernels_hide_communication(monkeypatch):
    events = [
        Event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 0.0, 4.0),
        Event("nccl:all_reduce", 0.0, 9.0, annotation=True),
        Event("_memory_forward_kernel", 1.0, 3.0),
        Event("cudaLaunchKernel", 0.0, 9.0, device="CPU"),
        Event("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 5.0, 6.0),
    ]
    made = SimpleNamespace(start=lambda: None, stop=lambda: None)
    made.profiler = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: made)
    meter = KernelMeter()
    meter.start()
    cost = meter.stop()
    assert (cost.communication, cost.exposed) == (pytest.approx(5.0), pytest.approx(3.0))


def test_torch_events_have_what_is_read_of_them():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3) + 1
    event = next(event for event in profile.profiler.kineto_results.events() if event.name() == "aten::add")
    assert event.device_type().name == "CPU"
    assert event.end_ns() >= event.start_ns() > 0
    assert event.is_user_annotation() is False


# --- windows ---


def train_alone(corpus: Path, folder: Path, name: str, *overrides: str) -> Path:
    config = run_config(corpus, folder, f"name={name}", *SHORT, *overrides)
    try:
        train(set_up(config, world_size=1))
    finally:
        shutdown()
    return config.run_dir


def profiled_steps(trace: Path) -> list[str]:
    with gzip.open(trace, "rt") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert any(name.startswith("aten::") for name in names)
    return sorted(name for name in names if name.startswith("ProfilerStep"))


@pytest.fixture(scope="module")
def plain(chain_corpus, tmp_path_factory) -> list[tuple[float, float]]:
    """The losses of a run without a profiler."""
    return losses(rows_of(train_alone(chain_corpus, tmp_path_factory.mktemp("plain"), "plain")))


def test_a_window_of_two_steps(chain_corpus, tmp_path, plain):
    run = train_alone(chain_corpus, tmp_path, "run", "profiling.first_step=3", "profiling.steps=2")
    trace = run / "profile/step_00000003-rank_0000.json.gz"
    assert len(profiled_steps(trace)) == 2
    assert "aten::" in (run / "profile/step_00000003-rank_0000.txt").read_text()
    assert len(list((run / "profile").iterdir())) == 2
    assert losses(rows_of(run)) == plain


def test_a_window_over_the_end_of_a_call(chain_corpus, tmp_path, plain):
    """The first call profiles steps 1 and 2 without warm-up, the second one, which begins in the window, step 3."""
    window = ("profiling.first_step=1", "profiling.steps=3")
    run = train_alone(chain_corpus, tmp_path, "run", *window, "training.stop_after_steps=2")
    assert [path.name for path in sorted((run / "profile").glob("*.gz"))] == ["step_00000001-rank_0000.json.gz"]
    train_alone(chain_corpus, tmp_path, "run", *window)
    assert (run / "profile/step_00000003-rank_0000.json.gz").is_file()
    train_alone(chain_corpus, tmp_path, "run", *window)
    assert len(list((run / "profile").iterdir())) == 4
    assert losses(rows_of(run)) == plain


@pytest.mark.parametrize(
    "method",
    [
        "start",
        pytest.param("step", marks=pytest.mark.slow),
        pytest.param("stop", marks=pytest.mark.slow),
        "export_chrome_trace",
    ],
)
def test_a_profiler_that_fails_does_not_stop_training(chain_corpus, tmp_path, plain, caplog, monkeypatch, method):
    def fail(*args: Any) -> None:
        raise RuntimeError("CUPTI is in use")

    monkeypatch.setattr(torch.profiler.profile, method, fail)
    with caplog.at_level(logging.WARNING):
        run = train_alone(chain_corpus, tmp_path, "run", "profiling.first_step=2", "profiling.steps=2")
    assert losses(rows_of(run)) == plain
    assert caplog.text.count("profiling failed (CUPTI is in use); the run goes on without it") == 1
    assert not list(run.glob("profile/*.gz"))
    monkeypatch.undo()
    torch.autograd._disable_profiler() if torch.autograd._profiler_enabled() else None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of CUDA's profiler, where there is no CUDA."""
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: found.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: found.append("stop"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", found.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: found.append("pop"))
    monkeypatch.setattr(NsysWindow, "marks", False)
    return found


def nsys_profiler(monkeypatch: pytest.MonkeyPatch, step: int, rank: int = 1) -> Profiler:
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    settings = ("profiling.tool=nsys", "profiling.first_step=2", "profiling.steps=2", "profiling.ranks=[1]", *ALWAYS)
    clock = StepClock(1.0, 4, torch.device("cpu"))
    return Profiler(run_config(Path("none"), Path("none"), *settings), torch.device("cuda"), clock, step)


def test_nsys_window(calls, monkeypatch):
    profiler = nsys_profiler(monkeypatch, step=0)
    for step in range(1, 5):
        with profiler.step(step), span("forward"):
            calls.append("train")
    profiler.close()
    inside = ["forward", "train", "pop", "pop"]
    assert calls == ["step 1", *inside, "start", "step 2", *inside, "step 3", *inside, "stop", "step 4", "train", "pop"]


def test_nsys_window_that_ends_early(calls, monkeypatch):
    profiler = nsys_profiler(monkeypatch, step=2)
    with pytest.raises(KeyError), profiler.step(3):
        raise KeyError
    profiler.close()
    assert calls == ["start", "step 3", "pop", "stop"]


def test_other_ranks_have_no_window(calls, monkeypatch):
    profiler = nsys_profiler(monkeypatch, step=0, rank=0)
    for step in (1, 2):
        with profiler.step(step), span("forward"):
            pass
    profiler.close()
    assert calls == []


# --- what is refused ---

WINDOW = ("profiling.first_step=3",)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ((*WINDOW, "profiling.tool=nsys"), "profiling.tool 'nsys' records GPUs and there is none here: choose torch"),
        ((*WINDOW, "profiling.ranks=[0,4,-1]"), "profiling.ranks is 4, -1, but the ranks of this run are 0 to 3"),
        ((*WINDOW, "profiling.ranks=[]"), "profiling.ranks is empty"),
        (("profiling.first_step=21",), "profiling.first_step 21 is after the last step, training.train_steps 20"),
    ],
)
def test_refused(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence.replace("[", r"\[")):
        check_profiling(run_config(Path("none"), Path("none"), *overrides), 4, cuda_available=False)


@pytest.mark.parametrize(
    "overrides", [("profiling.tool=nsys", "profiling.ranks=[9]"), (*WINDOW, "profiling.ranks=[3,0]"), ("seed=1",)]
)
def test_not_refused(overrides):
    check_profiling(run_config(Path("none"), Path("none"), *overrides), 4, cuda_available=False)


def test_nsys_is_not_refused_on_gpus():
    check_profiling(run_config(Path("n"), Path("n"), *WINDOW, "profiling.tool=nsys"), 1, cuda_available=True)
