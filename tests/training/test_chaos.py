"""Ranks, launchers and checkpoint writers are killed at random moments, over and over: nothing is lost or repeated."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.training.corpora import recipe
from tests.training.test_resume import TORCHRUN, finish, losses, start, weights

STEPS, KILLS, SEED = 500, 24, 20261124


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue  # half written
    return 0


def ranks_and_writers(launcher: psutil.Process) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """The ranks that torchrun started, and the processes that they forked to write checkpoints."""
    try:
        ranks = [child for child in launcher.children() if "launch/pretrain.py" in child.cmdline()]
        return ranks, [child for rank in ranks for child in rank.children() if child.cmdline() == rank.cmdline()]
    except psutil.Error:
        return [], []


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is off where CUDA is present")
def test_nothing_is_lost_though_everything_is_killed(chain_corpus, tmp_path, capsys):
    options = (
        f"training.train_steps={STEPS}",
        "checkpoint.save_interval=5",
        "checkpoint.retry_interval=1",
        "validation.interval=50",
        "model.hidden_dropout=0.1",
        "parallel.tensor_model_parallel_size=2",
    )
    path = recipe(tmp_path / "recipe.yaml", chain_corpus, *options)
    finish(start(TORCHRUN, path, "name=whole"))
    chance, run = random.Random(SEED), tmp_path / "runs" / "chaos"
    killed = {"rank": 0, "launcher": 0, "writer": 0}
    process, launched = start(TORCHRUN, path, "name=chaos"), last_step(run)
    goal, target = chance.randint(1, 9), "rank"
    while sum(killed.values()) < KILLS:
        if process.poll() is not None:
            assert process.returncode != 0, "the run ended before all the kills"
            process, launched = start(TORCHRUN, path, "name=chaos"), last_step(run)
        time.sleep(0.005)
        ranks, writers = ranks_and_writers(psutil.Process(process.pid))
        if not ranks or last_step(run) < launched + goal or (target == "writer" and not writers):
            continue
        victims = {"rank": ranks, "launcher": [psutil.Process(process.pid)], "writer": writers}[target]
        try:
            chance.choice(victims).kill()
        except psutil.Error:
            continue
        killed[target] += 1
        launched = last_step(run) if target == "writer" else launched
        if target != "writer":
            process.communicate(timeout=120)
        goal, target = chance.randint(1, 9), chance.choice(["rank", "rank", "launcher", "writer", "writer", "writer"])
    process.communicate(timeout=600)
    while process.returncode != 0:
        process = start(TORCHRUN, path, "name=chaos")
        process.communicate(timeout=600)
    with capsys.disabled():
        print(f"\nkilled: {killed}")
    assert min(killed.values()) > 0
    assert losses(run) == losses(tmp_path / "runs" / "whole")
    expected = weights(tmp_path / "runs" / "whole", tmp_path / "whole.pt", STEPS)
    actual = weights(run, tmp_path / "chaos.pt", STEPS)
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
