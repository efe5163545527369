"""What Slurm says: its version and partitions, and the job that this process is in."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping

from em_megatron.environment.report import Row

SECONDS = 5  # for each question to the controller
PARTITIONS_SHOWN = 6


def slurm() -> Iterator[Row]:
    """Whether this process is inside a Slurm job or could start one; partitions; the time that a job has left."""
    sbatch = shutil.which("sbatch")
    version = _ask("sinfo", "--version")
    yield slurm_row(os.environ, sbatch, version)
    job = os.environ.get("SLURM_JOB_ID")
    if job and (left := _ask("squeue", "--noheader", "--job", job, "--format", "%L")):
        yield Row("time left", left)
    elif version and sbatch and not job:
        yield partitions_row(_ask("sinfo", "--noheader", "--format", "%P|%a|%l|%D|%G"))


def slurm_row(environment: Mapping[str, str], sbatch: str | None, version: str | None = None) -> Row:
    """The job that `environment` tells of, the path of sbatch, and the answer of `sinfo --version`."""
    submit = f"sbatch is {sbatch}" if sbatch else "sbatch is not there"
    submit += f", {version}" if version else ""
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return Row("Slurm", f"not inside a job; {submit}", "ok" if sbatch else "note")
    told = {
        "nodes": environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES"),
        "tasks": environment.get("SLURM_NTASKS"),
        "GPUs on this node": environment.get("SLURM_GPUS_ON_NODE"),
        "partition": environment.get("SLURM_JOB_PARTITION"),
        "restarts": environment.get("SLURM_RESTART_COUNT"),
    }
    facts = ", ".join(f"{name} {value}" for name, value in told.items() if value)
    return Row("Slurm", f"inside job {job}{': ' if facts else ''}{facts}; {submit}")


def partitions_row(answer: str | None) -> Row:
    """Partitions from lines of name|state|time limit|nodes|generic resources; None if the controller is silent."""
    if not answer:
        return Row("partitions", "sinfo gets no answer from Slurm's controller", "warning")
    texts = []
    for line in answer.splitlines():
        name, state, limit, nodes, resources = line.split("|")
        facts = [f"{nodes} nodes", *([resources] if resources != "(null)" else []), f"up to {limit}"]
        texts.append(f"{name} ({', '.join([*facts, *([state] if state != 'up' else [])])})")
    more = len(texts) - PARTITIONS_SHOWN
    return Row("partitions", ", ".join(texts[:PARTITIONS_SHOWN]) + (f" and {more} more" if more > 0 else ""))


def nodes_of_job(environment: Mapping[str, str]) -> int:
    """Nodes of the Slurm job that `environment` tells of; 1 outside one."""
    told = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or "1"
    return int(told) if told.isdigit() else 1


def _ask(*command: str) -> str | None:
    """What a command of Slurm prints; None if it is not there, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
