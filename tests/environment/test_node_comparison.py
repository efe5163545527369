"""What differs between nodes, what is too little, too slow or off, by rows of made-up nodes with GPUs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from em_megatron.environment import node_facts
from em_megatron.environment.exchange import Place
from em_megatron.environment.health import _nodes, _source_rows
from em_megatron.environment.health_report import HealthReport
from em_megatron.environment.links import Link, Measured, rounds
from em_megatron.environment.node_comparison import GIB, Node, clock_row, disk_rows, gpu_rows, link_rows, version_rows
from em_megatron.environment.node_facts import Facts, Gpu
from em_megatron.environment.report import Row
from em_megatron.environment.shared_folder import FolderFacts
from tests.environment.pretended_nodes import REPOSITORY
from tests.environment.test_slurm_facts import command

VERSIONS = {"torch": "2.14.1", "triton": "3.8.0", "apex": "none"}


def gpu(index: int = 0, free: float = 79.5, error: str = "", name: str = "H100") -> Gpu:
    return Gpu(index, name, 80 * GIB, int(free * GIB), error)


def node(number: int, gpus: list[Gpu], clock: float = 0.0, folder: str = "", **facts: Any) -> Node:
    place = Place(number, 9, 0, 1, number, 9, f"node{number}")
    defaults = {"versions": VERSIONS, "temporary_free": 10 * GIB, "shared_memory": 10 * GIB}
    found = Facts(place, gpus, **{"visible_gpus": len(gpus), "owns_gpu": True, **defaults, **facts})
    return Node(place.name, [number], found, gpus, FolderFacts("/runs", 100 * GIB, folder), clock, 0)


def levels(rows: Any) -> list[tuple[str, str]]:
    return [(row.level, row.text) for row in rows]


def test_gpus_alike_and_free() -> None:
    nodes = [node(i, [gpu(0), gpu(1)]) for i in range(2)]
    assert list(gpu_rows(nodes, 2)) == list(gpu_rows(nodes, None)) == [Row("GPUs", "2 × H100 80 GiB on every node")]


def test_gpus_that_differ() -> None:
    nodes = [node(0, [gpu(0), gpu(1)]), node(1, [gpu(0)]), node(2, [gpu(0), gpu(1, name="A100")])]
    assert levels(gpu_rows(nodes, None)) == [
        ("ERROR", "unequal numbers: 2 on node0, node2; 1 on node1"),
        ("ERROR", "unequal kinds: H100 80 GiB on node0, node1; A100 80 GiB, H100 80 GiB on node2"),
    ]
    assert ("ERROR", "2 expected on every node, but 2 on node0, node2; 1 on node1") in levels(gpu_rows(nodes, 2))


def test_gpus_with_faults() -> None:
    nodes = [
        node(0, [gpu(free=70)], gpu_faults=["GPU 0: memory rows wait"]),
        node(1, [gpu(free=75), gpu(1, error="wrong")]),
    ]
    nodes[1] = dataclasses.replace(nodes[1], ranks_without_gpu=2)
    texts = levels(gpu_rows([nodes[0], nodes[1]], None))
    assert ("warning", "node0 GPU 0: memory rows wait") in texts
    assert ("ERROR", "node0 GPU 0: 10.0 of 80 GiB are in use, by another process") in texts
    assert ("warning", "node1 GPU 0: 5.0 of 80 GiB are in use, by another process") in texts
    assert ("ERROR", "node1 GPU 1: wrong") in texts
    assert ("ERROR", "node1: 2 ranks have no GPU that works") in texts


def test_versions_and_variables() -> None:
    nodes = [node(i, []) for i in range(3)]
    assert list(version_rows(nodes)) == [Row("versions", "torch 2.14.1, triton 3.8.0 on every node")]
    nodes[1] = node(1, [], versions={**VERSIONS, "torch": "2.13.0", "apex": "0.1"}, variables={"NCCL_NET": "IB"})
    rows = list(version_rows(nodes))
    assert [(row.level, row.name, row.text) for row in rows if row.level != "ok"] == [
        ("ERROR", "torch", "differs: 2.14.1 on node0, node2; 2.13.0 on node1"),
        ("ERROR", "apex", "differs: none on node0, node2; 0.1 on node1"),
        ("warning", "NCCL_NET", "differs: not set on node0, node2; IB on node1"),
    ]


@pytest.mark.parametrize(("offset", "level"), [(0.4, "ok"), (-1.5, "warning"), (61.0, "ERROR")])
def test_clocks(offset: float, level: str) -> None:
    row = clock_row([node(0, []), node(1, [], clock=offset)])
    assert row.level == level
    if level != "ok":
        assert f"node1 is {offset:+.1f} s off node0" in row.text


def test_disks() -> None:
    good = node(0, [])
    assert levels(disk_rows([good])) == [("ok", "/runs, 100.0 GiB free")]
    little = dataclasses.replace(good, folder=FolderFacts("/runs", GIB, ""))
    assert levels(disk_rows([good, little])) == [("warning", "/runs, 1.0 GiB free, the same folder on every node")]
    bad = node(
        1, [], folder="is another folder", temporary="/tmp", temporary_error="full", temporary_free=0, shared_memory=0
    )
    assert levels(disk_rows([good, bad])) == [
        ("ERROR", "node1: /runs is another folder"),
        ("ERROR", "node1: /tmp: full"),
        ("warning", "less than 1 GiB free on node1"),
        ("warning", "/dev/shm has less than 1 GiB on node1"),
    ]


def test_rounds_measure_every_link_once_and_name_two_nodes() -> None:
    assert rounds([[0]]) == []
    assert rounds([[0, 1]]) == [[Link((0,), (0, 1))]]
    assert rounds([[0], [1]]) == [[Link((0, 1), (0, 1))]]
    own, even, odd, everyone = rounds([[0, 1], [2, 3], [4, 5], [6, 7]])
    assert [link.nodes for link in own] == [(0,), (1,), (2,), (3,)]
    assert [link.ranks for link in even] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [link.nodes for link in odd] == [(1, 2)]
    assert everyone == [Link((0, 1, 2, 3), tuple(range(8)))]
    for links in (own, even, odd):  # a round has no rank twice, so that its links are measured at the same time
        ranks = [rank for link in links for rank in link.ranks]
        assert len(ranks) == len(set(ranks))


def test_links_that_are_slow_or_wrong() -> None:
    nodes = [node(i, []) for i in range(5)]

    def pair(first: int, seconds: float, wrong: tuple[int, ...] = ()) -> Measured:
        return Measured(Link((first, first + 1), (first, first + 1)), seconds, 10**9, wrong)

    found = [pair(0, 1.0), pair(1, 1.0), pair(2, 3.0), pair(3, 1.0, (4,))]
    assert found[0].bandwidth == 1e9
    assert levels(link_rows(nodes, found, None)) == [
        ("ok", "all-reduce of 954 MiB: 0.33 to 1.00 GB/s of bus bandwidth, at most 3000.0 ms"),
        ("warning", "node2 and node3: 0.33 GB/s is slow beside 1.00 GB/s, the median"),
        ("ERROR", "node3 and node4: wrong sums on ranks 4"),
    ]
    assert ("ERROR", "node2 and node3: 0.33 GB/s is less than the 0.5 GB/s asked for") in levels(
        link_rows(nodes, found, 0.5e9)
    )


def test_nodes_of_one_name_are_told_apart() -> None:
    told = [
        [
            dataclasses.asdict(Facts(Place(rank, 4, rank % 2, 2, rank // 2, 2, "same"), [gpu(rank % 2)], 2, True)),
            folder,
            0.0,
        ]
        for rank, folder in enumerate([{"path": "/runs", "free": 0, "error": ""}] * 4)
    ]
    first, second = _nodes(told)
    assert (first.name, first.ranks, second.name, second.ranks) == ("same#0", [0, 1], "same#1", [2, 3])
    assert [found.index for found in second.gpus] == [0, 1]
    report = HealthReport([first, second])
    assert report.table()[1]["ranks"] == "2-3"
    assert report.verdict == "fit to train: 2 nodes, 4 ranks, 4 GPUs"


def test_faults_that_nvidia_smi_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert node_facts.gpu_faults() == []
    command(tmp_path, "nvidia-smi", 'printf "0, 0, No, No\\n1, 3, Yes, No\\n2, [N/A], [N/A], [N/A]\\n"')
    assert node_facts.gpu_faults() == [
        "GPU 1: uncorrected memory errors since the driver was loaded (3)",
        "GPU 1: memory rows wait for a reset to be replaced",
    ]
    command(tmp_path, "nvidia-smi", 'echo "Field remapped_rows.pending is not a valid field to query."; exit 2')
    assert node_facts.gpu_faults() == []


def test_commits(tmp_path: Path) -> None:
    import subprocess

    assert node_facts.commit(tmp_path) == "none"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file.py").write_text("1")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    clean = node_facts.commit(tmp_path)
    before = node_facts.source_digest(tmp_path)
    assert len(clean) == 12
    (tmp_path / "file.py").write_text("2")
    assert node_facts.commit(tmp_path) == clean + "+"
    assert node_facts.source_digest(tmp_path) != before


def test_a_package_that_is_not_beside_the_script(tmp_path: Path) -> None:
    assert _source_rows(REPOSITORY / "launch" / "health_check.py") == []
    assert _source_rows(tmp_path / "launch" / "health_check.py") == []  # a script without a package beside it
    (tmp_path / "em_megatron").mkdir()
    (row,) = _source_rows(tmp_path / "launch" / "health_check.py")
    assert row.level == "warning"
    assert row.text.endswith(f"set PYTHONPATH={tmp_path}")
