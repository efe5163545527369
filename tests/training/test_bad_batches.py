"""Bad batches are skipped on all ranks alike, written down, and counted; what follows does not depend on a resume."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from em_megatron.config import FaultConfig
from em_megatron.training.bad_batches import BadBatches
from tests.training.corpora import run_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is off where CUDA is present")

SMALL = ("data.prefetch=0", "validation.interval=0")


def parameters(run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in run.model for parameter in chunk.parameters()]


def trained(overrides: list[str], corpus: Path, folder: Path, bad: dict[int, str]) -> tuple[str, list, list, list[str]]:
    """A run in which the last rank's loss, or one of its gradients, goes wrong at the given steps.

    Gives how it ended, the skipped rows, the weights at the end, and the losses that rank 0 wrote down.
    """
    from em_megatron.parallel.process_groups import shutdown
    from em_megatron.training import step as step_module
    from em_megatron.training.loop import train
    from em_megatron.training.setup import set_up
    from em_megatron.training.step import TrainingError

    config = run_config(corpus, folder, *SMALL, *overrides)
    run = set_up(config, dist.get_world_size() if dist.is_initialized() else 1)
    schedule = step_module.run_schedule

    def going_wrong(*args, **options):
        found = schedule(*args, **options)
        kind = bad.get(run.state.step + 1, "")
        if dist.get_rank() == dist.get_world_size() - 1:
            if kind in ("nan", "spike"):
                found[0][0] += math.nan if kind == "nan" else 1e4
            if kind == "gradient":
                next(run.model[-1].parameters()).main_grad.view(-1)[0] = math.inf
        return found

    try:
        with patch.object(step_module, "run_schedule", going_wrong):
            ended = train(run)
    except TrainingError as error:
        ended = str(error)
    finally:
        rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        result = (ended, run.bad.skipped, parameters(run), [row["loss"] for row in rows if row["kind"] == "train"])
        if dist.get_world_size() == 1:
            shutdown()
    return result


def on_two_ranks(overrides: list[str], corpus: Path, folder: Path, bad: dict[int, str]):
    """As `trained`, in a process that other tests use after this one."""
    from em_megatron.parallel.process_groups import shutdown

    try:
        return trained(overrides, corpus, folder, bad)
    finally:
        dist.barrier()
        shutdown()


def test_a_step_with_a_bad_batch_changes_nothing_on_any_rank(ranks, chain_corpus, tmp_path):
    bad = {3: "nan", 5: "gradient"}
    results = ranks(2).run(on_two_ranks, ["training.train_steps=6"], chain_corpus, tmp_path, bad)
    for ended, skipped, _, _ in results:
        assert ended == "finished"
        assert [(row["step"], row["first_sample"], row["last_sample"]) for row in skipped] == [(3, 8, 11), (5, 16, 19)]
        assert skipped[0]["reason"] == "the loss is nan"
        assert skipped[1]["reason"].startswith("the gradient norm is not finite at a loss of 6.")
    assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in results[0][2])
    assert results[0][3][2] is None  # no number in JSON
    written = [json.loads(line) for line in (tmp_path / "test" / "skipped.jsonl").read_text().splitlines()]
    assert written == results[0][1]


def test_weights_before_and_after_a_skipped_step_are_the_same(chain_corpus, tmp_path):
    _, _, one, _ = trained(["training.stop_after_steps=2"], chain_corpus, tmp_path / "a", {})
    _, _, other, _ = trained(["training.stop_after_steps=3"], chain_corpus, tmp_path / "b", {3: "gradient"})
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("carried", [(), ("memory.carry_memory=true",)])
def test_resumed_equals_uninterrupted(chain_corpus, tmp_path, carried):
    """Spikes are measured against losses of before the resume; skips before it count."""
    faults = ["faults.spike_factor=20", "faults.spike_window=4", "faults.skip_limit=2", *carried]
    bad = {3: "nan", 8: "spike", 10: "spike"}
    steps = ["training.train_steps=12", *faults]
    whole = trained(steps, chain_corpus, tmp_path / "a", bad)
    first = trained([*steps, "training.stop_after_steps=7"], chain_corpus, tmp_path / "b", bad)
    assert first[0] == "paused"
    rest = trained(steps, chain_corpus, tmp_path / "b", bad)
    assert [row["step"] for row in whole[1]] == [3, 8, 10]
    assert "is a spike above" in whole[1][1]["reason"]
    assert whole[1] == rest[1]
    limit = "3 batches were skipped within 1000 steps and faults.skip_limit is 2"
    assert f"{limit}; no checkpoint was written yet" in whole[0]
    assert re.search(rf"{limit}; .*step_00000007 is whole", rest[0])
    assert whole[3] == rest[3]
    assert all(torch.equal(a, b) for a, b in zip(whole[2], rest[2], strict=True))


def test_a_spike_is_far_above_the_usual_distance_from_the_median():
    bad = BadBatches(FaultConfig(spike_factor=5.0, spike_window=8))
    for loss in (2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0):
        assert bad.objection(100.0) == ""  # too few to judge by
        bad.accept(loss)
    bad.accept(2.1)
    assert bad.objection(2.5) == ""
    assert bad.objection(3.2).startswith("the loss of 3.2000 is a spike above 2.0000 ± 0.1")
    assert bad.objection(0.1) == ""
    for _ in range(20):
        bad.accept(3.0)
    assert len(bad.losses) == 8
    assert bad.objection(3.0) == ""


def test_old_skips_do_not_count():
    bad = BadBatches(FaultConfig(skip_window=100))
    assert [bad.skip({"step": step}) for step in (1, 50, 100, 101, 500)] == [1, 2, 3, 3, 1]
