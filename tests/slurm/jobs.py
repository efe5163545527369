"""Tiny runs as jobs of slurm/pretrain_1b.sh, and what is looked at in them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.slurm.box import SlurmBox
from tests.training.corpora import RUN

STEPS = 60
ONE_MACHINE = {"EM_ONE_MACHINE": "1", "EM_NPROC": "1", "OMP_NUM_THREADS": "1", "EM_ENVIRONMENT": ""}
REPLACED = ("training.train_steps=", "training.global_batch_size=", "training.micro_batch_size=")


def overrides(corpus: Path, runs: Path, name: str, steps: int, save_interval: int = 10) -> list[str]:
    """What makes the 1B recipe a tiny one that takes some seconds."""
    return [
        *(option for option in RUN if not option.startswith(REPLACED)),
        "model.size=tiny",
        "memory.sampler=uniform",
        "parallel.tensor_model_parallel_size=1",
        "parallel.sequence_parallel=false",
        "training.recompute=none",
        "training.global_batch_size=4",
        "training.micro_batch_size=1",
        f"training.train_steps={steps}",
        "validation.interval=20",
        "validation.samples=0",
        "logging.communication_interval=0",
        f"checkpoint.save_interval={save_interval}",
        f"data.path={corpus}",
        f"output_dir={runs}",
        f"name={name}",
    ]


def environment(check: bool = False, **more: str) -> dict[str, str]:
    """Variables of a job on the nodes of one machine."""
    venv = Path(os.sys.prefix)
    return {**ONE_MACHINE, "EM_ENVIRONMENT": f"venv:{venv}", "EM_HEALTH_CHECK": str(int(check)), **more}


def submit(box: SlurmBox, output: Path, script: str, *arguments: str, nodes: int = 2, **env: str) -> int:
    """A script of slurm/ on CPU nodes."""
    options = [f"--nodes={nodes}", "--gpus-per-node=0", "--time=10", f"--output={output}", f"slurm/{script}"]
    return box.sbatch(*options, *arguments, **(environment() | env))


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(box: SlurmBox, number: int | str, run: Path, step: int, seconds: float = 240) -> None:
    """Until the run of a job has made `step` steps."""
    end = time.monotonic() + seconds
    while not any(row["step"] >= step for row in rows(run)):
        state = box.job(number)["JobState"]
        assert state in ("RUNNING", "PENDING", "CONFIGURING", "COMPLETING"), state
        assert time.monotonic() < end, "no step in time"
        time.sleep(0.05)


def state(run: Path, scratch: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, optimizer state included."""
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    assert newest.name == f"step_{step:08d}"
    dcp_to_torch_save(newest, scratch)
    return {k: v for k, v in torch.load(scratch, weights_only=False).items() if isinstance(v, torch.Tensor)}


def losses(run: Path) -> list[tuple[str, int, float]]:
    return [(row["kind"], row["step"], row["loss"]) for row in rows(run) if row["kind"] in ("train", "validation")]


def assert_same(run: Path, undisturbed: Path, scratch: Path) -> None:
    """Losses of all steps, weights and optimizer state are equal, bit for bit."""
    assert losses(run) == losses(undisturbed)
    expected, actual = state(undisturbed, scratch / "expected.pt"), state(run, scratch / "actual.pt")
    assert len(expected) > 20
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
