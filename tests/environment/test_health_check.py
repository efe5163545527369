"""The health check as a whole, on processes that stand for nodes: fit ones, faults of every kind, and peers that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.environment.fake_packages import write_packages
from tests.environment.pretended_nodes import REPOSITORY, SCRIPT, Pretended, free_port, outcomes, started

without_gpus = pytest.mark.skipif(torch.cuda.is_available(), reason="nodes that share one machine share its GPUs")


def rows_of(page: dict[str, Any], level: str) -> dict[str, str]:
    return {row["name"]: row["text"] for row in page["rows"] if row["level"] == level}


def wait_for(folder: Path, pattern: str, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert time.monotonic() < end, f"no {pattern} appeared"
        time.sleep(0.005)


def alone(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """A check of one process without torchrun."""
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=200
    )
    return done.returncode, done.stdout, done.stderr


def test_one_process_alone(tmp_path: Path) -> None:
    code, out, err = alone("--output", str(tmp_path / "a" / "runs"))
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split()[:3] == ["node", "ranks", "GPUs"]
    assert out.splitlines()[-1].startswith("fit to train: 1 node, 1 rank, ")
    assert list(tmp_path.iterdir()) == []  # folders that it made are gone again


def test_faults_that_one_process_finds(tmp_path: Path) -> None:
    """A missing GPU, an output folder that is a file, and a Slurm step whose nodes did not find each other."""
    (tmp_path / "file").touch()
    gpus = torch.cuda.device_count()
    code, out, _ = alone("--output", str(tmp_path / "file"), "--expected-gpus", str(gpus + 1), SLURM_STEP_NUM_NODES="4")
    text = " ".join(out.split())
    assert code == 1
    assert f"{gpus + 1} expected on every node, but {gpus} on " in text
    assert f"{tmp_path}/file FileExistsError" in text
    assert "Slurm started this on 4 nodes, but only 1 found each other" in text
    assert text.endswith("not fit: 3 errors")


@without_gpus
def test_fit_nodes(tmp_path: Path) -> None:
    with started([Pretended(ranks=2), Pretended()], "--output", str(tmp_path), "--json") as processes:
        ended = outcomes(processes)
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert [out == "" for _, out, _ in ended] == [False, True, True]
    page = json.loads(ended[0][1])
    assert rows_of(page, "ERROR") == rows_of(page, "warning") == {}
    assert page["verdict"] == "fit to train: 2 nodes, 3 ranks, 0 GPUs"
    first, second = page["nodes"]
    assert (first["node"], first["ranks"], second["node"], second["ranks"]) == ("node1", "0-1", "node2", "2")
    assert float(first["own ranks"]) > 0
    assert float(first["with next"]) > 0
    assert second["own ranks"] == second["with next"] == "-"
    assert list(tmp_path.iterdir()) == []


@without_gpus
def test_every_difference_names_nodes_and_values(tmp_path: Path) -> None:
    """Node 2 has another triton, another folder under the same relative name, and another NCCL variable."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        (folder / "runs").mkdir(parents=True)
    other = write_packages(tmp_path / "site", {"triton-9.9.dist-info/METADATA": "Name: triton\nVersion: 9.9\n"})
    path = os.pathsep.join([str(other), str(REPOSITORY)])
    nodes = [
        Pretended(folders[0]),
        Pretended(folders[1], {"PYTHONPATH": path, "NCCL_ALGO": "ring"}),
        Pretended(folders[0]),
    ]
    with started(nodes, "--expected-gpus", "1", "--minimum-bandwidth", "1e6", "--json") as processes:
        ended = outcomes(processes)
    assert [code for code, _, _ in ended] == [1, 1, 1], ended
    page = json.loads(ended[0][1])
    errors = rows_of(page, "ERROR")
    assert "9.9 on node2" in errors["triton"]
    assert "on node1, node3" in errors["triton"]
    assert errors["GPUs"] == "1 expected on every node, but 0 on node1, node2, node3"
    assert errors["output"].startswith(f"node2: {folders[1]}/runs is another folder than {folders[0]}/runs of node 0")
    assert errors["neighbours"].startswith("node2 and node3: ")
    assert errors["all ranks"].endswith("GB/s is less than the 1e+06 GB/s asked for")
    assert rows_of(page, "warning") == {"NCCL_ALGO": "differs: not set on node1, node3; ring on node2"}
    assert page["verdict"] == f"not fit: {page['errors']} errors"
    assert all(list((folder / "runs").iterdir()) == [] for folder in folders)


@without_gpus
@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(signal.SIGKILL, id="dies", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, id="hangs", marks=pytest.mark.slow),
    ],
)
def test_a_peer_that_ends_during_the_check_is_named(tmp_path: Path, sent: signal.Signals) -> None:
    limit = 4
    with started([Pretended(), Pretended()], "--output", str(tmp_path), "--time-limit", str(limit)) as processes:
        wait_for(tmp_path, ".health-*")
        processes[1].send_signal(sent)
        start = time.monotonic()
        code, _, err = outcomes(processes[:1])[0]
        assert code == 1
        assert time.monotonic() - start < limit + 30  # a busy machine
    sentences = [line for line in err.splitlines() if line.startswith("error ")]
    assert len(sentences) == 1
    assert sentences[0].startswith("error (node node1): ")
    assert "no sign of life from node2" in sentences[0]
    assert list(tmp_path.glob(".health-*-0")) == []


@without_gpus
@pytest.mark.slow
def test_two_torchruns(tmp_path: Path) -> None:
    """What Slurm starts on two nodes, here on one: pages on rank 0, the same exit code from both, also when unfit."""
    for arguments, wanted in (([], 0), (["--expected-gpus", "8"], 1)):
        port, processes = free_port(), []
        for node in range(2):
            options = ["--nnodes=2", f"--node-rank={node}", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
            script = [f"--master-port={port}", str(SCRIPT), "--output", str(tmp_path), *arguments]
            command = [sys.executable, "-m", "torch.distributed.run", *options, *script]
            environment = {**os.environ, "SLURMD_NODENAME": f"node{node + 1}"}
            processes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        (code, out, err), (other_code, other_out, _) = outcomes(processes)
        assert (code, other_code) == (wanted, wanted), err
        assert other_out == ""
        assert ("fit to train: 2 nodes, 4 ranks, 0 GPUs" in out) is (wanted == 0)
        assert ("not fit: 1 error" in out) is (wanted == 1)
