"""What a run of a subcommand found: rows, figures read off them, and the stated targets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from em_megatron.benchmark.machine import Ceilings
from em_megatron.benchmark.timing import Measurement

Row = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A ratio or other number worth a line of its own; `key` is what a target refers to.

    value: from medians. best: from the shortest readings, which tell how far a busy machine disturbed the medians.
    """

    key: str
    text: str
    value: float | None
    unit: str = "×"
    best: float | None = None


@dataclass(frozen=True)
class Target:
    """What the project promises for the default shapes of a subcommand."""

    key: str
    bound: Literal["at least", "at most"]
    limit: float

    def met(self, value: float) -> bool:
        return value >= self.limit if self.bound == "at least" else value <= self.limit


@dataclass(frozen=True)
class Table:
    """A table of the report beside those of the candidates; cells are text."""

    title: str
    header: list[str]
    lines: list[list[str]]


@dataclass(frozen=True)
class Chart:
    """A panel of the picture: points [(x, y)] by label, or with `bars` one y for each label."""

    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    bars: dict[str, float] = field(default_factory=dict)


@dataclass
class Findings:
    """What a subcommand reads off its rows; `data` is kept in the JSON."""

    figures: list[Figure] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


class Rows:
    """The rows of all candidates, found by group and name."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def seconds(self, group: str, name: str, kind: str = "median") -> float | None:
        """Median, min or max seconds of a call; None where it was not measured."""
        row = self.find(group, name)
        return row["seconds"][kind] if row is not None and row["seconds"] else None

    def find(self, group: str, name: str) -> Row | None:
        return next((row for row in self.rows if row["group"] == group and row["name"] == name), None)

    def ratio(self, slow: tuple[str, str], fast: tuple[str, str], kind: str = "median") -> float | None:
        """Time of `slow` over that of `fast`, each (group, name); None unless both were measured."""
        a, b = self.seconds(*slow, kind), self.seconds(*fast, kind)
        return a / b if a is not None and b is not None else None

    def compared(self, key: str, text: str, slow: tuple[str, str], fast: tuple[str, str]) -> Figure:
        """`ratio` as a figure: the speed of `fast` over `slow`, or the time of `slow` over `fast`."""
        return Figure(key, text, self.ratio(slow, fast), best=self.ratio(slow, fast, "min"))

    def group(self, name: str) -> list[Row]:
        return [row for row in self.rows if row["group"] == name]

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(row["group"] for row in self.rows))


def rows_of(measurements: list[Measurement], ceilings: Ceilings) -> list[Row]:
    """One row per candidate, with its floor, and its rate over that of its group's peer."""
    peers = {m.candidate.group: _rate(m) for m in measurements if m.candidate.is_peer}
    return [_row(m, ceilings, peers.get(m.candidate.group)) for m in measurements]


def _rate(measurement: Measurement) -> float | None:
    """Tokens per second by the median."""
    if not measurement.seconds:
        return None
    return measurement.candidate.tokens / statistics.median(measurement.seconds)


def _row(measurement: Measurement, ceilings: Ceilings, peer: float | None) -> Row:
    candidate, seconds, rate = measurement.candidate, measurement.seconds, _rate(measurement)
    row: Row = {
        "group": candidate.group,
        "name": candidate.name,
        "is_peer": candidate.is_peer,
        "status": "measured" if seconds else "not measured",
        "reason": measurement.reason,
        "tokens": candidate.tokens,
        "flops": candidate.work.flops,
        "bytes": candidate.work.bytes,
        "floor_seconds": ceilings.floor_seconds(candidate.work),
        "seconds": None,
        "tokens_per_second": rate,
        "times_peer": rate / peer if rate and peer else None,
        "peak_bytes": measurement.peak_bytes,
    }
    if seconds:
        median = statistics.median(seconds)
        row["seconds"] = {"median": median, "min": min(seconds), "max": max(seconds), "all": seconds}
        row["flops_per_second"] = candidate.work.flops / median
        row["times_floor"] = median / row["floor_seconds"]
    return row


def judged(targets: Sequence[Target], figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """The targets whose figure was asked for: wanted, measured (None where it was not), met or not."""
    values = {figure.key: figure for figure in figures}
    return [
        {
            "target": values[target.key].text,
            "wanted": f"{target.bound} {target.limit:g}",
            "measured": (value := values[target.key].value),
            "by_shortest_readings": values[target.key].best,
            "unit": values[target.key].unit,
            "met": None if value is None else target.met(value),
        }
        for target in targets
        if target.key in values
    ]
