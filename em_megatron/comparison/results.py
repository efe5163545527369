"""What the runs of a comparison found: one row per cell, means over seeds, and the answers to the plan's claims."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from em_megatron.comparison.plan import Cell, Claim, grows
from em_megatron.comparison.running import EVALUATED_NAME, MACHINE_NAME, trained
from em_megatron.training.plots import read_rows

Row = dict[str, Any]
OTHER_PARTS = ("long_ppl", "corruption", "sweep", "recall", "noise")


def collect(cells: Sequence[Cell]) -> list[Row]:
    """A row for each cell that is done: what it is, what it costs, what its evaluation and its metrics say."""
    return [row for cell in cells if (row := _row(cell)) is not None]


def _row(cell: Cell) -> Row | None:
    path = cell.run_dir / EVALUATED_NAME
    if not (trained(cell) if cell.speed_only else path.is_file()):
        return None
    memory = cell.config.memory
    row: Row = {
        "name": cell.name,
        "label": cell.label,
        "kind": cell.kind,
        "memory_kind": memory.kind,
        "factor": cell.factor,
        "block_length": memory.block_length,
        "corpus": cell.corpus,
        "size": cell.size,
        "seed": cell.seed,
        "speed_only": cell.speed_only,
        "grows": grows(cell),
        "overrides": list(cell.overrides),
        **vars(cell.costs),
        "machine": _machine(cell.run_dir / MACHINE_NAME),
        "training_tokens_per_second": tokens_per_second(cell.run_dir / "metrics.jsonl"),
    }
    if not cell.speed_only:
        found = json.loads(path.read_text())
        names = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes", "positions", *OTHER_PARTS)
        row |= {name: found[name] for name in names if name in found}
        if "long_ppl" in row:  # of which run, not where it lies
            judge = Path(row["long_ppl"]["evaluator"])
            row["long_ppl"]["evaluator"] = judge.parents[1].name if judge.parent.name == "checkpoints" else judge.name
            if "long_ppl" not in cell.suite:
                del row["long_ppl"]  # by itself, before the plan named an evaluator
        # Costs with the vocabulary that the corpus really has.
        row |= {name: found[name] for name in vars(cell.costs)}
    return row


def _machine(path: Path) -> str:
    """Device and commit of a run."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return "a machine that is not noted"
    commit, *rest = found["commit"].split(" ", 1)
    return f"{found['device']}, {found['cores']} cores, torch {found['torch']}, commit {' '.join([commit[:12], *rest])}"


def tokens_per_second(path: Path) -> float | None:
    """Median over the steps of a run, its first quarter (warm-up) left out."""
    rows = [row["tokens_per_second"] for row in read_rows(path) if row.get("kind") == "train"]
    return statistics.median(rows[len(rows) // 4 :]) if rows else None


@dataclass(frozen=True)
class Mean:
    """Of one figure over seeds: the mean, the largest distance of a seed from it, and how many seeds."""

    value: float
    spread: float
    seeds: int


def mean(values: Sequence[float]) -> Mean:
    """Raises statistics.StatisticsError for no values."""
    middle = statistics.fmean(values)
    return Mean(middle, max(abs(value - middle) for value in values), len(values))


def later_loss(row: Row) -> float:
    """Loss in nats per token behind the first block, where a memory can have something to say."""
    later = [part for part in row["positions"] if part["start"] >= row["block_length"]]
    return sum(part["loss"] * part["tokens"] for part in later) / sum(part["tokens"] for part in later)


def grouped(rows: Iterable[Row], corpus: str, size: str) -> dict[str, list[Row]]:
    """Rows with a held-out loss of one corpus and size, by label, seeds in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if (row["corpus"], row["size"]) == (corpus, size) and "loss" in row:
            found.setdefault(row["label"], []).append(row)
    return {label: sorted(group, key=lambda row: row["seed"]) for label, group in found.items()}


def places(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """(corpus, size) that rows with a held-out loss have, in their order."""
    return list(dict.fromkeys((row["corpus"], row["size"]) for row in rows if "loss" in row))


@dataclass(frozen=True)
class Answer:
    """A claim on one corpus: losses in nats of both sides; differences: better - than, by shared seed, negative where the
    claim holds. Runs of one seed read the same samples in the same order, so they are compared pair by pair."""

    corpus: str
    size: str
    better: Mean
    than: Mean
    differences: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """agrees or disagrees where all seeds say the same."""
        holds, seeds = sum(difference < 0 for difference in self.differences), len(self.differences)
        if 0 < holds < seeds:
            return f"cannot tell: in {holds} of {seeds} seeds"
        return f"{'agrees' if holds else 'disagrees'} ({seeds} {'seed' if seeds == 1 else 'seeds'})"


def answers(claim: Claim, rows: Sequence[Row]) -> list[Answer]:
    """The claim on every corpus and size that has both sides with a seed in common."""
    found = []
    for corpus, size in places(rows):
        groups = grouped(rows, corpus, size)
        sides = [{row["seed"]: row["loss"] for row in groups.get(label, [])} for label in (claim.better, claim.than)]
        shared = sorted(sides[0].keys() & sides[1].keys())
        if shared:
            better, than = (mean([side[seed] for seed in shared]) for side in sides)
            found.append(Answer(corpus, size, better, than, tuple(sides[0][seed] - sides[1][seed] for seed in shared)))
    return found
