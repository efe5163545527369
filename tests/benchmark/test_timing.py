"""Turns, failures and rows, on candidates that only note that they were called."""

from __future__ import annotations

import math

import pytest
import torch

from em_megatron.benchmark.floors import Work
from em_megatron.benchmark.machine import Ceilings
from em_megatron.benchmark.results import Figure, Rows, Target, judged, rows_of
from em_megatron.benchmark.timing import Candidate, Measurement, UnavailableError, measure

CPU = torch.device("cpu")
WORK = Work(flops=8.0, bytes=6.0)


def noting(name: str, calls: list[str], every: int = 1, fails_at: int | None = None) -> Candidate:
    """Appends its name to `calls`; its call number `fails_at`, from 0, raises."""
    own: list[int] = []

    def call() -> None:
        own.append(len(own))
        if own[-1] == fails_at:
            raise RuntimeError(f"{name} broke\nand this line is not shown")
        calls.append(name)

    return Candidate("group", name, lambda: call, tokens=1, work=WORK, every=every, single=True)


def refusing(error: Exception) -> Candidate:
    def prepare():
        raise error

    return Candidate("group", "refusing", prepare, tokens=1, work=WORK)


def test_every_candidate_runs_once_per_round_in_order():
    calls: list[str] = []
    found = measure([noting(name, calls) for name in "abc"], CPU, rounds=3, seconds=60.0)
    assert "".join(calls) == "abc" + "abc" * 3  # warm-up first
    assert [len(measurement.seconds) for measurement in found] == [3, 3, 3]


def test_some_take_part_in_every_so_many_rounds():
    calls: list[str] = []
    measure([noting("a", calls), noting("b", calls, every=2)], CPU, rounds=4, seconds=60.0)
    assert "".join(calls[2:]) == "abaaba"


def test_no_round_begins_after_the_time_is_over():
    calls: list[str] = []
    measure([noting("a", calls), noting("b", calls)], CPU, rounds=100, seconds=0.0)
    assert "".join(calls) == "abab"


@pytest.mark.parametrize("fails_at", [0, 1, 2], ids=["warm-up", "first round", "second round"])
def test_a_failing_candidate_is_not_measured_and_the_others_go_on(fails_at):
    calls: list[str] = []
    bad, good = measure([noting("a", calls, fails_at=fails_at), noting("b", calls)], CPU, rounds=3, seconds=60.0)
    assert bad.seconds == []
    assert bad.reason == "RuntimeError: a broke"
    assert good.reason is None
    assert len(good.seconds) == 3
    assert calls.count("a") == fails_at


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UnavailableError("there is no such kernel"), "there is no such kernel"),
        (torch.OutOfMemoryError("very long"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (NotImplementedError("not on this device"), "NotImplementedError: not on this device"),
    ],
)
def test_a_candidate_that_cannot_be_prepared_says_why(error, reason):
    (found,) = measure([refusing(error)], CPU, rounds=2, seconds=60.0)
    (row,) = rows_of([found], Ceilings(1.0, 1.0, 1.0))
    assert row["status"] == "not measured"
    assert row["reason"] == reason
    assert row["seconds"] is None
    assert row["floor_seconds"] > 0


def test_short_calls_are_repeated_within_a_reading():
    count = []
    short = Candidate("group", "short", lambda: lambda: count.append(1), tokens=1, work=WORK)
    (found,) = measure([short], CPU, rounds=2, seconds=60.0)
    assert len(found.seconds) == 2
    assert len(count) > 10


def measured(name: str, seconds: list[float], tokens: int = 10, is_peer: bool = False) -> Measurement:
    return Measurement(Candidate("group", name, lambda: lambda: None, tokens, WORK, is_peer), seconds)


def test_rows_compare_rates_with_the_peer_and_times_with_the_floor():
    found = [measured("ours", [3.0, 2.0, 9.0]), measured("peer", [6.0], tokens=5, is_peer=True), measured("none", [])]
    ours, peer, none = rows_of(found, Ceilings(copied_per_second=1.0, read_per_second=3.0, flops_per_second=2.0))
    assert ours["seconds"]["median"] == 3.0
    assert (ours["seconds"]["min"], ours["seconds"]["max"]) == (2.0, 9.0)
    assert ours["times_peer"] == pytest.approx((10 / 3) / (5 / 6))
    assert ours["floor_seconds"] == 4.0  # 8 FLOPs at 2 a second, longer than 6 bytes at 3 a second
    assert ours["times_floor"] == pytest.approx(0.75)
    assert peer["times_peer"] == 1.0
    assert none["times_peer"] is None
    rows = Rows([ours, peer, none])
    assert rows.ratio(("group", "peer"), ("group", "ours")) == 2.0
    assert rows.ratio(("group", "peer"), ("group", "none")) is None


def test_targets_are_judged_where_their_figure_was_asked_for():
    targets = [
        Target("a", "at least", 6.0),
        Target("b", "at most", 1.1),
        Target("c", "at most", 1.0),
        Target("d", "at least", 1),
    ]
    figures = [
        Figure("a", "speed", 5.9),
        Figure("b", "time", 1.1),
        Figure("d", "missing", None),
        Figure("e", "other", 1),
    ]
    found = judged(targets, figures)
    assert [(row["target"], row["met"]) for row in found] == [("speed", False), ("time", True), ("missing", None)]


def test_a_machine_without_readings_gives_no_floor():
    (row,) = rows_of([measured("ours", [1.0])], Ceilings(math.nan, math.nan, math.nan))
    assert math.isnan(row["floor_seconds"])
