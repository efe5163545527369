"""What the doctor says of Slurm; the commands are executables that the test puts on the path."""

from __future__ import annotations

from pathlib import Path

import pytest

from em_megatron.environment import slurm
from em_megatron.environment.report import Row


def command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that alone is searched for commands, outside any job."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


SINFO = 'if [ "$1" = --version ]; then echo slurm 23.11.4; else printf "gpu*|up|1-00:00:00|16|gpu:8\\ncpu|down|infinite|4|(null)\\n"; fi'


def test_no_slurm(path: Path) -> None:
    assert list(slurm.slurm()) == [Row("Slurm", "not inside a job; sbatch is not there", "note")]


def test_version_and_partitions(path: Path) -> None:
    command(path, "sbatch", "")
    command(path, "sinfo", SINFO)
    assert list(slurm.slurm()) == [
        Row("Slurm", f"not inside a job; sbatch is {path}/sbatch, slurm 23.11.4"),
        Row("partitions", "gpu* (16 nodes, gpu:8, up to 1-00:00:00), cpu (4 nodes, up to infinite, down)"),
    ]


def test_a_controller_that_does_not_answer(path: Path) -> None:
    command(path, "sbatch", "")
    command(path, "sinfo", 'if [ "$1" = --version ]; then echo slurm 23.11.4; else exit 1; fi')
    assert list(slurm.slurm())[1] == Row("partitions", "sinfo gets no answer from Slurm's controller", "warning")


def test_inside_a_job(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(path, "sinfo", SINFO)
    command(path, "squeue", 'if [ "$3" = 42 ]; then echo 3:14:15; fi')
    for name, value in {"JOB_ID": "42", "NNODES": "2", "NTASKS": "16", "GPUS_ON_NODE": "8"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert list(slurm.slurm()) == [
        Row("Slurm", "inside job 42: nodes 2, tasks 16, GPUs on this node 8; sbatch is not there, slurm 23.11.4"),
        Row("time left", "3:14:15"),
    ]


def test_many_partitions() -> None:
    row = slurm.partitions_row("\n".join(f"p{i}|up|1:00|1|(null)" for i in range(9)))
    assert row.text.endswith("p5 (1 nodes, up to 1:00) and 3 more")


def test_nodes_of_a_job() -> None:
    assert slurm.nodes_of_job({}) == 1
    assert slurm.nodes_of_job({"SLURM_NNODES": "4"}) == 4
    assert slurm.nodes_of_job({"SLURM_NNODES": "4", "SLURM_JOB_NUM_NODES": "2"}) == 2
