"""What ranks on other nodes are reached through: interfaces, InfiniBand, this host's name, and variables that steer them."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from em_megatron.environment import devices
from em_megatron.environment.report import Level, Row
from em_megatron.environment.slurm import nodes_of_job

INTERFACES = Path("/sys/class/net")
INFINIBAND = Path("/sys/class/infiniband")
VERBS = Path("/dev/infiniband")

VIRTUAL = ("veth", "docker", "br-", "virbr", "cali", "cni", "flannel", "ifb", "dummy")  # between containers of a host
PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_")
MEANINGS = {
    "NCCL_SOCKET_IFNAME": "interfaces that NCCL's own connections may take",
    "NCCL_IB_HCA": "InfiniBand devices that NCCL may take",
    "NCCL_IB_DISABLE": "1: NCCL leaves InfiniBand alone and goes over TCP",
    "NCCL_IB_GID_INDEX": "the address that RoCE devices take",
    "NCCL_IB_TIMEOUT": "how long an InfiniBand packet is waited for",
    "NCCL_NET": "the network that NCCL must take",
    "NCCL_NET_GDR_LEVEL": "how far apart GPU and network card may be for direct transfers",
    "NCCL_P2P_DISABLE": "1: GPUs of a node copy through main memory",
    "NCCL_SHM_DISABLE": "1: no shared memory between the ranks of a node",
    "NCCL_DEBUG": "how much NCCL says of its choices",
    "NCCL_DEBUG_FILE": "the file that it says it to",
    "NCCL_ALGO": "algorithms that NCCL is held to",
    "NCCL_PROTO": "protocols that NCCL is held to",
    "GLOO_SOCKET_IFNAME": "interfaces that gloo takes",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "what torch does after a failed or late collective",
    "TORCH_NCCL_BLOCKING_WAIT": "1: the host waits for every collective",
}
SLOWING = {
    "NCCL_P2P_DISABLE": "copies between GPUs are slow with it",
    "NCCL_SHM_DISABLE": "ranks of a node talk over the network with it",
}


def interfaces(folder: Path = INTERFACES) -> Iterator[Row]:
    """Network interfaces other than loopback that are up, with their speed where the kernel knows it."""
    names = [name for name in interface_names(folder) if not name.startswith(VIRTUAL)]
    up = [name for name in names if _word(folder / name / "operstate") in ("up", "unknown")]
    if not up:
        yield Row("interfaces", "none is up but loopback: nothing can be reached from here", "note")
        return
    down = f"; {len(names) - len(up)} down" if len(up) < len(names) else ""
    yield Row("interfaces", ", ".join(_interface(folder / name) for name in up) + down)


def infiniband(folder: Path = INFINIBAND, verbs: Path = VERBS) -> Iterator[Row]:
    """Ports of InfiniBand and RoCE devices with state and rate."""
    ports = [path for name in _names(folder) for path in sorted((folder / name / "ports").glob("*"))]
    if not ports:
        yield Row("InfiniBand", "no device: NCCL goes over TCP between nodes", "note")
        return
    if not list(verbs.glob("uverbs*")):
        text = f"{len(_names(folder))} devices, but {verbs} is not here: pass it into this container"
        yield Row("InfiniBand", text, "warning")
        return
    active = [path for path in ports if "ACTIVE" in _word(path / "state")]
    text = "; ".join(map(_port, ports))
    yield Row("InfiniBand", text if active else f"no port is active: {text}", "ok" if active else "warning")


def hostname() -> Iterator[Row]:
    """Whether this host's name leads to an address that other nodes can reach."""
    name = socket.gethostname()
    try:
        addresses = sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None)})
    except OSError:
        addresses = []
    yield hostname_row(name, addresses, nodes_of_job(os.environ))


def hostname_row(name: str, addresses: list[str], nodes: int) -> Row:
    """`addresses` that `name` leads to, in a job of `nodes` nodes."""
    level: Level = "warning" if nodes > 1 else "note"
    mend = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or mend /etc/hosts" if nodes > 1 else "enough for one node"
    if not addresses:
        return Row("hostname", f"{name} leads to no address: {mend}", level)
    if all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses):
        return Row(
            "hostname", f"{name} leads to {', '.join(addresses)} only, which no other node reaches: {mend}", level
        )
    return Row("hostname", f"{name} is {', '.join(addresses)}")


def variables() -> Iterator[Row]:
    """Variables of NCCL and gloo that are set, and those that name what is not there."""
    on_gpu = devices.usable_gpus() > 0
    yield from variable_rows(os.environ, interface_names(INTERFACES), _names(INFINIBAND), on_gpu)


def variable_rows(environment: Mapping[str, str], nets: list[str], adapters: list[str], on_gpu: bool) -> Iterator[Row]:
    """One row per known variable of `environment`, one for all others.

    Args:
        environment: variables by name.
        nets: network interfaces of this machine.
        adapters: InfiniBand devices of this machine.
        on_gpu: whether ranks talk through NCCL here, else through gloo.
    """
    found = network_variables(environment)
    if not found:
        yield Row("variables", "no NCCL_* or GLOO_* is set: NCCL and gloo choose their networks themselves")
    for name, value in found.items():
        if name in MEANINGS:
            text = f"{value} ({MEANINGS[name]})"
            wrong = wrong_variable(name, value, nets, adapters, on_gpu)
            yield Row(name, f"{text}: {wrong[1]}", wrong[0]) if wrong else Row(name, text)
    others = [f"{name}={value}" for name, value in found.items() if name not in MEANINGS]
    if others:
        yield Row("other variables", ", ".join(others))


def wrong_variable(
    name: str, value: str, nets: list[str], adapters: list[str], on_gpu: bool
) -> tuple[Level, str] | None:
    """What is wrong with a known variable here, or None. Arguments as in `variable_rows`."""
    if name == "NCCL_SOCKET_IFNAME" and not selected(value, [*nets, "lo"]):
        return "ERROR" if on_gpu else "warning", f"no interface here is called so, but {', '.join(nets)}"
    if name == "NCCL_IB_HCA" and adapters and not selected(value, adapters):
        return "ERROR" if on_gpu else "warning", f"no device here is called so, but {', '.join(adapters)}"
    if name == "GLOO_SOCKET_IFNAME" and not set(value.split(",")) <= {*nets, "lo"}:
        return "warning" if on_gpu else "ERROR", f"gloo wants whole names, and here are {', '.join(nets)}"
    if name == "NCCL_IB_DISABLE" and value == "1" and adapters:
        return "warning", f"{', '.join(adapters)} would be faster"
    if name in SLOWING and value == "1":
        return "warning", SLOWING[name]
    return None


def selected(pattern: str, names: list[str]) -> list[str]:
    """The `names` that NCCL takes by `pattern`: beginnings of names, after = whole names, after ^ all but those."""
    without, pattern = pattern.startswith("^"), pattern.removeprefix("^")
    exactly, pattern = pattern.startswith("="), pattern.removeprefix("=")
    wanted = [part.split(":")[0] for part in pattern.split(",") if part]
    return [
        name
        for name in names
        if any(name == part if exactly else name.startswith(part) for part in wanted) is not without
    ]


def network_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of `environment` that NCCL, gloo or torch's NCCL groups read, by name."""
    return {name: environment[name] for name in sorted(environment) if name.startswith(PREFIXES)}


def interface_names(folder: Path) -> list[str]:
    """All interfaces but loopback."""
    return [name for name in _names(folder) if name != "lo"]


def _interface(path: Path) -> str:
    speed = _word(path / "speed")
    known = f"{int(speed) / 1000:g} Gb/s" if speed.isdigit() and int(speed) > 0 else "unknown speed"
    return f"{path.name} ({known})"


def _port(path: Path) -> str:
    device, number = path.parents[1].name, path.name
    state = _word(path / "state").split(":")[-1].strip().lower()
    facts = (state, _word(path / "rate"), _word(path / "link_layer"))
    return f"{device} port {number} {', '.join(fact for fact in facts if fact)}"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def _word(path: Path) -> str:
    """The text of a file of the kernel; nothing where it cannot be read, as the speed of an interface that is down."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
