"""Rows of a run: what a step cost, in every place a user looks."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from em_megatron.config import load_config
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training import measurements
from em_megatron.training.loop import train
from em_megatron.training.measurements import Interval, StepClock, StepCost, cost_of_step, covered, largest, summary
from em_megatron.training.metrics import MetricLog
from em_megatron.training.plots import plot_run
from em_megatron.training.setup import set_up
from tests.training.corpora import run_config

CPU = torch.device("cpu")


# --- what a row says of its steps ---


@pytest.fixture
def world_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measurements, "time", clock)
    return clock


def test_a_row_by_hand(world_of_one, clock):
    def reading():
        for seconds in (1.0, 2.0, 5.0):
            clock.now += seconds
            yield seconds

    steps = StepClock(flops_per_token=1e3, world_size=1, device=CPU)
    data = steps.timed(reading())
    for _ in range(2):
        next(data)
        clock.now += 3.5
        steps.count(500)
    with steps.paused():
        clock.now += 1000.0
    first = steps.row()
    assert first["tokens_per_second"] == first["tokens_per_second_per_gpu"] == pytest.approx(100.0)
    assert first["step_seconds"] == pytest.approx(5.0)
    assert first["data_wait"] == pytest.approx(0.3)
    assert 0.01 < first["memory_peak_gb"] < 100
    assert set(first) == {
        "tokens_per_second",
        "tokens_per_second_per_gpu",
        "step_seconds",
        "data_wait",
        "memory_peak_gb",
    }
    assert list(data) == [5.0]
    clock.now += 5.0
    steps.count(500)
    second = steps.row()
    assert second["data_wait"] == second["tokens_per_second"] / 100 == pytest.approx(0.5)


def test_model_flops_utilisation(world_of_one, clock, monkeypatch):
    monkeypatch.setattr(measurements, "peak_flops", lambda name: {"NVIDIA H100": 1e6}[name])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(measurements, "memory_peaks", lambda device: (3 * 10**9, 4 * 10**9))
    monkeypatch.setattr(measurements, "largest", lambda values, device: [(value, 1) for value in values])
    steps = StepClock(flops_per_token=1e3, world_size=2, device=torch.device("cuda"))
    steps.count(1000)
    clock.now += 2.0
    row = steps.row()
    assert (row["tokens_per_second"], row["tokens_per_second_per_gpu"]) == (500.0, 250.0)
    assert row["mfu"] == 0.25
    assert (row["memory_peak_gb"], row["memory_reserved_gb"], row["memory_peak_rank"]) == (3.0, 4.0, 1)


def largest_of_ranks(values: list[list[int]]) -> list[tuple[int, int]]:
    return largest(values[dist.get_rank()], CPU)


def test_the_largest_of_all_ranks_and_who_has_it(ranks):
    values = [[5, 0, 2**43 - 1], [7, 0, 2**41]]
    assert ranks(2).run(largest_of_ranks, values) == [[(7, 1), (0, 1), (2**43 - 1, 0)]] * 2


# --- communication, from intervals ---


def test_covered_time():
    assert covered([]) == 0.0
    assert covered([Interval(5, 6), Interval(0, 2), Interval(1, 3), Interval(1.5, 1.7), Interval(3, 3)]) == 4.0


def test_cost_of_a_step():
    """Communication from 0 to 4 and 6 to 7; computation from 1 to 3 and 6.5 to 9."""
    cost = cost_of_step(10.0, [Interval(0, 4), Interval(6, 7)], [Interval(1, 3), Interval(6.5, 9)])
    assert cost == StepCost(seconds=10.0, communication=5.0, exposed=2.5)


def test_summary_over_ranks():
    costs = [StepCost(10, 4, 4), StepCost(10, 6, 5), StepCost(10, 2, 1)]
    assert summary(costs) == {
        "communication_share": pytest.approx(0.4),
        "exposed_communication_share": pytest.approx(1 / 3),
        "slowest_rank": 2,
        "slowest_rank_excess": pytest.approx(9 / 6 - 1),
    }
    unknown = StepCost(math.nan, math.nan, math.nan)
    assert summary([costs[0], unknown, costs[1]])["slowest_rank"] == 0
    assert summary([unknown, unknown]) == {}


# --- the log ---


def quiet_log(folder: Path, step: int = 0, progress: bool = False) -> MetricLog:
    config = load_config(
        None,
        [
            "name=run",
            f"output_dir={folder}",
            "data.path=none",
            "model.size=tiny",
            "logging.tensorboard=false",
            "logging.wandb=disabled",
            f"logging.progress={str(progress).lower()}",
        ],
    )
    return MetricLog(config, step, "id", active=True)


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.5, "tokens_per_second": 12345.6, **more}


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    log = quiet_log(tmp_path)
    for step in range(1, 5):
        log.train_row(row(step, grad_norm=math.nan))
    log.close()
    log = quiet_log(tmp_path, step=2)
    log.train_row(row(3))
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(item["step"], "grad_norm" in item) for item in rows] == [(1, True), (2, True), (3, False)]
    assert rows[0]["grad_norm"] is None


def test_the_bar_says_what_matters(tmp_path, capsys):
    log = quiet_log(tmp_path, progress=True)
    shown = []
    for more in ({}, {"mfu": 0.413}, {"mfu": 0.4, "data_wait": 0.04}, {"data_wait": 0.31}):
        log.train_row(row(1, **more))
        shown.append(log._bar.postfix)
    log.close()
    assert shown == [
        "loss 2.500, 12,346 tokens/s",
        "loss 2.500, 12,346 tokens/s, MFU 41.3%",
        "loss 2.500, 12,346 tokens/s, MFU 40.0%",
        "loss 2.500, 12,346 tokens/s, waits for data 31%",
    ]


def test_tensorboard_hides_steps_that_are_repeated(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 4), (3, 5)):
        config = load_config(
            None, ["name=run", f"output_dir={tmp_path}", "data.path=none", "model.size=tiny", "logging.wandb=disabled",
                   "logging.progress=false"],
        )  # fmt: skip
        log = MetricLog(config, first - 1, "id", active=True)
        for step in range(first, last + 1):
            log.train_row(row(step, data_wait=step / 100))
        log.close()
        if first == 1:
            time.sleep(1.1)  # the names of event files have the second of their start
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/data_wait")] == [1, 2, 3, 4, 5]


def test_the_picture_of_throughput(tmp_path, monkeypatch):
    rows = [row(step, kind="train", data_wait=step / 100, memory_peak_gb=3.0) for step in range(1, 21)]
    for item in rows[9::10]:
        item |= {"communication_share": 0.3, "exposed_communication_share": 0.1, "slowest_rank_excess": 0.05}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    assert [path.name for path in plot_run(tmp_path)] == ["loss.png", "throughput.png"]
    assert (tmp_path / "throughput.png").stat().st_size > 5000
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    plot_run(tmp_path)
    speed, shares, memory = figures[1].axes
    assert speed.lines[0].get_ydata().tolist() == [12345.6] * 20
    wait, communication, exposed, slowest = shares.lines
    assert wait.get_ydata().tolist() == [item["data_wait"] for item in rows]
    assert communication.get_xydata().tolist() == [[10, 0.3], [20, 0.3]]
    assert (exposed.get_ydata()[0], slowest.get_ydata()[0]) == (0.1, 0.05)
    assert memory.lines[0].get_ydata().tolist() == [3.0] * 20


def test_rows_of_a_run(chain_corpus, tmp_path, monkeypatch):
    """A run whose data come late says so."""
    from em_megatron.training.setup import Run

    config = run_config(
        chain_corpus, tmp_path, "training.train_steps=4", "logging.interval=2", "logging.communication_interval=1"
    )
    try:
        run = set_up(config, world_size=1)
        original = Run.training_data

        def late(self: Run):
            for batch in original(self):
                time.sleep(0.2)  # of two micro-batches a step
                yield batch

        monkeypatch.setattr(Run, "training_data", late)
        train(run)
    finally:
        shutdown()
    rows = [json.loads(line) for line in (tmp_path / "test/metrics.jsonl").read_text().splitlines()]
    rows = [item for item in rows if item["kind"] == "train"]
    assert [item["step"] for item in rows] == [2, 4]
    for item in rows:
        assert item["data_wait"] * item["step_seconds"] > 0.39
        assert item["data_wait"] < 1
        assert item["communication_share"] == item["exposed_communication_share"] == 0.0
        assert item["tokens_per_second"] > 0
        assert "slowest_rank" not in item
    assert (tmp_path / "test/throughput.png").stat().st_size > 5000
    assert (tmp_path / "test/wandb_id").is_file()
