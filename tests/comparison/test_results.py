"""Means over seeds, claims and their verdicts, from rows of chosen numbers."""

from __future__ import annotations

import json

import pytest

from em_megatron.comparison.plan import Claim
from em_megatron.comparison.results import answers, grouped, mean, tokens_per_second

LOSSES = {("a", 1): 2.0, ("a", 2): 2.2, ("b", 1): 2.1, ("b", 2): 2.3, ("c", 1): 2.05, ("c", 2): 2.15, ("d", 1): 3.0}
ROWS = [
    {"label": label, "seed": seed, "corpus": "x", "size": "1x", "loss": loss, "speed_only": False}
    for (label, seed), loss in LOSSES.items()
]


@pytest.mark.parametrize(
    ("better", "than", "verdict"),
    [
        ("a", "b", "agrees (2 seeds)"),
        ("b", "a", "disagrees (2 seeds)"),
        ("a", "c", "cannot tell: in 1 of 2 seeds"),
        ("c", "d", "agrees (1 seed)"),
        ("d", "c", "disagrees (1 seed)"),
    ],
)
def test_verdicts(better, than, verdict):
    (answer,) = answers(Claim(text="", better=better, than=than), ROWS)
    assert answer.verdict == verdict


def test_a_claim_without_both_sides_is_not_answered():
    assert answers(Claim(text="", better="a", than="z"), ROWS) == []


def test_means_and_groups():
    found = mean([row["loss"] for row in grouped(ROWS, "x", "1x")["a"]])
    assert (found.value, found.spread, found.seeds) == pytest.approx((2.1, 0.1, 2))


def test_speed_is_the_median_without_the_first_quarter(tmp_path):
    rows = [
        {"kind": "train", "step": i, "tokens_per_second": value} for i, value in enumerate([1, 1, 5, 7, 9, 6, 8, 7])
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"kind": "tr')
    assert tokens_per_second(path) == 7
    assert tokens_per_second(tmp_path / "none.jsonl") is None
