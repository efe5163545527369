"""A run that is killed, during a save too, ends with the same weights as one that is not, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.training.corpora import recipe

PRETRAIN = [sys.executable, "launch/pretrain.py"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "launch/pretrain.py"]
OVERRIDES = (
    "training.train_steps=12",
    "checkpoint.save_interval=2",
    "validation.interval=6",
    "model.hidden_dropout=0.1",
)


def start(command: list[str], path: Path, *extra: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(path), *extra],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    return output


def kill_when(process: subprocess.Popen[str], ready) -> None:
    """SIGKILL to every process of the run as soon as `ready()` says so."""
    end = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def weights(run: Path, scratch: Path, step: int = 12) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, optimizer state included."""
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    assert newest.name == f"step_{step:08d}"
    dcp_to_torch_save(newest, scratch)
    return {k: v for k, v in torch.load(scratch, weights_only=False).items() if isinstance(v, torch.Tensor)}


def losses(run: Path) -> list[tuple[str, int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["kind"], row["step"], row["loss"]) for row in rows]


def check_kills(command: list[str], corpus: Path, folder: Path, *extra: str) -> None:
    path = recipe(folder / "recipe.yaml", corpus, *OVERRIDES, *extra)
    runs = folder / "runs"
    finish(start(command, path, "name=whole"))
    metrics, checkpoints = runs / "killed" / "metrics.jsonl", runs / "killed" / "checkpoints"
    kill_when(
        start(command, path, "name=killed"),
        lambda: metrics.exists() and metrics.read_text().count("\n") >= 3 and any(checkpoints.glob("step_*")),
    )
    saved = {p.name for p in checkpoints.glob("step_*")}
    kill_when(
        start(command, path, "name=killed"),
        lambda: any(p.name[1:].removesuffix(".writing") not in saved for p in checkpoints.glob(".step_*.writing/*")),
    )
    output = finish(start(command, path, "name=killed"))
    assert "resumed from" in output
    assert not list(checkpoints.glob(".step_*"))
    assert losses(runs / "killed") == losses(runs / "whole")
    expected = weights(runs / "whole", folder / "whole.pt")
    actual = weights(runs / "killed", folder / "killed.pt")
    assert expected.keys() == actual.keys()
    assert len(expected) > 20
    different = [name for name in expected if not torch.equal(expected[name], actual[name])]
    assert not different


@pytest.mark.slow
def test_killed_run_ends_as_an_undisturbed_one(chain_corpus, tmp_path):
    check_kills(PRETRAIN, chain_corpus, tmp_path)


@pytest.mark.slow
def test_killed_run_on_two_ranks_ends_as_an_undisturbed_one(chain_corpus, tmp_path):
    check_kills(TORCHRUN, chain_corpus, tmp_path, "parallel.tensor_model_parallel_size=2")


def test_corpus_that_changed_is_refused_on_resume(chain_corpus, model, tmp_path):
    from tests.training.corpora import chain_document, write_ids

    path = recipe(tmp_path / "recipe.yaml", chain_corpus, "training.train_steps=3")
    finish(start(PRETRAIN, path))
    other = write_ids(
        tmp_path / "other", model, {"train": [chain_document(1, 300)], "validation": [chain_document(2, 99)]}
    )
    process = start(PRETRAIN, path, f"data.path={other}", "training.train_steps=4")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert output.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in output
