"""Health checks on processes of this machine that stand for nodes, each with its own name, folder and environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "launch" / "health_check.py"


@dataclass
class Pretended:
    """A node of `ranks` ranks started in `folder` (None: the repository), with more `variables`."""

    folder: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    ranks: int = 1


@contextmanager
def started(nodes: Sequence[Pretended], *arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
    """A health check with these arguments on all nodes; the processes in the order of ranks, killed at the end.

    They get what torchrun would give them. Rank 0 keeps the store, which torchrun's agent does elsewhere.
    """
    port = free_port()
    world_size = sum(node.ranks for node in nodes)
    processes: list[subprocess.Popen[str]] = []
    try:
        for number, node in enumerate(nodes):
            for local_rank in range(node.ranks):
                environment = {
                    **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "NCCL_"))},
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(REPOSITORY),
                    "SLURMD_NODENAME": f"node{number + 1}",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "RANK": str(len(processes)),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_RANK": str(local_rank),
                    "LOCAL_WORLD_SIZE": str(node.ranks),
                    "GROUP_RANK": str(number),
                    "GROUP_WORLD_SIZE": str(len(nodes)),
                    **node.variables,
                }
                command = [sys.executable, str(SCRIPT), *arguments]
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
                processes.append(subprocess.Popen(command, cwd=node.folder, env=environment, **pipes))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def outcomes(processes: Sequence[subprocess.Popen[str]], seconds: float = 200) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each, once all have ended."""
    texts = [process.communicate(timeout=seconds) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
