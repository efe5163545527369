"""Learning rates of the three schedules, step by step."""

from __future__ import annotations

import math

import pytest
import torch

from em_megatron.training.optimizer import build_scheduler
from tests.one_rank import tiny_config


class Groups:
    """What the schedule sees of an optimizer."""

    def __init__(self) -> None:
        self.param_groups = [{"lr": 0.0, "weight_decay": 0.0, "params": [torch.zeros(1)]}]


def rates(*overrides: str) -> list[float]:
    """The rate each of 40 steps is taken with."""
    config = tiny_config("training.train_steps=40", "optimizer.lr=1.0", "optimizer.min_lr=0.1", *overrides)
    groups, found = Groups(), []
    scheduler = build_scheduler(config, groups)
    for _ in range(40):
        found.append(groups.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return found


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_is_linear(schedule):
    assert rates(f"optimizer.schedule={schedule}", "optimizer.warmup_steps=8")[:9] == pytest.approx(
        [step / 8 for step in range(9)]
    )


def test_cosine_ends_at_the_minimum():
    found = rates("optimizer.schedule=cosine", "optimizer.warmup_steps=8")
    assert found[24] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert found[-1] == pytest.approx(0.1, abs=0.01)


def test_wsd_is_stable_then_decays():
    found = rates("optimizer.schedule=wsd", "optimizer.warmup_steps=8", "optimizer.wsd_decay_steps=10")
    assert found[8:31] == pytest.approx([1.0] * 23)
    assert found[35] < found[32] < 1.0
    assert found[-1] < 0.2


def test_constant_stays():
    assert rates("optimizer.schedule=constant", "optimizer.warmup_steps=8")[8:] == pytest.approx([1.0] * 32)
