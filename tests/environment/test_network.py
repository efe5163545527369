"""Interfaces, InfiniBand, hostname and variables, on folders laid out as the kernel lays them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from em_megatron.environment import network
from em_megatron.environment.report import Row
from tests.environment.fake_packages import write_packages

PORT = {"state": "4: ACTIVE\n", "rate": "400 Gb/sec (4X NDR)\n", "link_layer": "InfiniBand\n"}


def adapters(folder: Path, **states: str) -> Path:
    files = {f"{name}/ports/1/{key}": text for name in states for key, text in PORT.items()}
    return write_packages(folder, {**files, **{f"{name}/ports/1/state": state for name, state in states.items()}})


def test_interfaces_with_their_speed(tmp_path: Path) -> None:
    states = {"lo": "unknown", "eth0": "up", "ib0": "up", "eth1": "down", "veth12": "up", "docker0": "up"}
    files = {f"{name}/operstate": f"{state}\n" for name, state in states.items()}
    write_packages(tmp_path, {**files, "eth0/speed": "25000\n", "ib0/speed": "-1\n"})
    assert list(network.interfaces(tmp_path)) == [
        Row("interfaces", "eth0 (25 Gb/s), ib0 (unknown speed); 1 down"),
    ]


def test_no_interface(tmp_path: Path) -> None:
    write_packages(tmp_path, {"lo/operstate": "unknown\n", "eth0/operstate": "down\n"})
    (row,) = network.interfaces(tmp_path)
    assert row.level == "note"


def test_infiniband_ports(tmp_path: Path) -> None:
    verbs = write_packages(tmp_path / "dev", {"uverbs0": ""})
    some = adapters(tmp_path / "some", mlx5_0="4: ACTIVE", mlx5_1="1: DOWN")
    assert list(network.infiniband(some, verbs)) == [
        Row(
            "InfiniBand",
            "mlx5_0 port 1 active, 400 Gb/sec (4X NDR), InfiniBand; mlx5_1 port 1 down, 400 Gb/sec (4X NDR), InfiniBand",
        )
    ]
    (row,) = network.infiniband(adapters(tmp_path / "none", mlx5_0="1: DOWN"), verbs)
    assert row.level == "warning"
    assert row.text.startswith("no port is active: ")
    (row,) = network.infiniband(some, tmp_path / "nowhere")
    assert row.level == "warning"
    assert "pass it into this container" in row.text
    (row,) = network.infiniband(tmp_path / "nothing", verbs)
    assert row.level == "note"


def test_hostnames() -> None:
    assert network.hostname_row("a", ["10.0.0.1", "127.0.0.1"], 4) == Row("hostname", "a is 10.0.0.1, 127.0.0.1")
    for addresses in ([], ["127.0.1.1"], ["127.0.0.1", "::1"]):
        assert network.hostname_row("a", addresses, 1).level == "note"
        row = network.hostname_row("a", addresses, 2)
        assert row.level == "warning"
        assert "set GLOO_SOCKET_IFNAME" in row.text
    assert network.hostname_row("a", ["fe80::1%eth0"], 2).level == "ok"


def test_hostnames_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    assert [row.level for row in network.hostname()] == ["warning"]
    monkeypatch.delenv("SLURM_JOB_NUM_NODES")
    assert [row.level for row in network.hostname()] == ["note"]


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [
        ("eth", ["eth0", "eth1"]),
        ("eth1,ib", ["eth1", "ib0"]),
        ("=eth", []),
        ("=ib0", ["ib0"]),
        ("^eth", ["ib0"]),
        ("^=eth0", ["eth1", "ib0"]),
        ("ib0:1", ["ib0"]),
        ("", []),
    ],
)
def test_what_nccl_selects(pattern: str, taken: list[str]) -> None:
    assert network.selected(pattern, ["eth0", "eth1", "ib0"]) == taken


@pytest.mark.parametrize(
    ("name", "value", "on_gpu", "off_gpu"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", "ok", "ok"),
        ("NCCL_SOCKET_IFNAME", "bond", "ERROR", "warning"),
        ("NCCL_IB_HCA", "mlx5", "ok", "ok"),
        ("NCCL_IB_HCA", "=mlx4_0", "ERROR", "warning"),
        ("GLOO_SOCKET_IFNAME", "eth0", "ok", "ok"),
        ("GLOO_SOCKET_IFNAME", "eth", "warning", "ERROR"),
        ("NCCL_IB_DISABLE", "1", "warning", "warning"),
        ("NCCL_P2P_DISABLE", "1", "warning", "warning"),
        ("NCCL_P2P_DISABLE", "0", "ok", "ok"),
        ("NCCL_DEBUG", "INFO", "ok", "ok"),
    ],
)
def test_variables(name: str, value: str, on_gpu: str, off_gpu: str) -> None:
    for gpu, level in ((True, on_gpu), (False, off_gpu)):
        environment = {name: value, "PATH": "/bin"}
        (row,) = network.variable_rows(environment, ["eth0", "ib0"], ["mlx5_0"], gpu)
        assert (row.name, row.level) == (name, level)
        assert row.text.startswith(f"{value} (")


def test_no_variables_and_unknown_ones() -> None:
    (row,) = network.variable_rows({"PATH": "/bin"}, ["eth0"], [], False)
    assert row.name == "variables"
    assert list(network.variable_rows({"NCCL_ZZ": "1", "GLOO_YY": "2"}, ["eth0"], [], False)) == [
        Row("other variables", "GLOO_YY=2, NCCL_ZZ=1")
    ]
