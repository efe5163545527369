"""What the nodes of a job found, node beside node: a table, and what is wrong with which of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from em_megatron.environment.devices import LITTLE_DISK, LITTLE_SHARED_MEMORY
from em_megatron.environment.links import Link, Measured
from em_megatron.environment.node_facts import Facts, Gpu
from em_megatron.environment.report import Level, Row
from em_megatron.environment.shared_folder import FolderFacts

GIB = 2**30
NAMES_SHOWN = 8
CLOCK_WARNING, CLOCK_ERROR = 1.0, 60.0  # seconds
USED_WARNING, USED_ERROR = (0.05, 2 * GIB), (0.1, 4 * GIB)  # share of a GPU's memory, and never less than so many bytes
LITTLE_TEMPORARY = GIB
SLOW_SHARE = 0.5  # of the median of its kind: below it a link is slow


@dataclass(frozen=True)
class Node:
    """One node: its ranks, what its leading rank says of it, and the GPUs of all of them."""

    name: str
    ranks: list[int]
    facts: Facts
    gpus: list[Gpu]
    folder: FolderFacts
    clock: float
    ranks_without_gpu: int


def gpu_rows(nodes: list[Node], expected: int | None) -> Iterator[Row]:
    """GPUs as many as `expected` (None: as on the others), alike, right and free."""
    if not any(node.facts.visible_gpus for node in nodes) and not expected:
        yield Row("GPUs", "none on any node: ranks train on CPUs over gloo", "note")
        return
    counts = grouped(nodes, lambda node: str(node.facts.visible_gpus))
    if expected is not None and list(counts) != [str(expected)]:
        yield Row("GPUs", f"{expected} expected on every node, but {spelled(counts)}", "ERROR")
    elif len(counts) > 1:
        yield Row("GPUs", f"unequal numbers: {spelled(counts)}", "ERROR")
    kinds = grouped(
        nodes, lambda node: ", ".join(sorted({f"{g.name} {g.total / GIB:.0f} GiB" for g in node.gpus})) or "none"
    )
    if len(kinds) > 1:
        yield Row("GPUs", f"unequal kinds: {spelled(kinds)}", "ERROR")
    elif len(counts) == 1 and nodes[0].gpus:
        yield Row("GPUs", f"{next(iter(counts))} × {next(iter(kinds))} on every node")
    for node in nodes:
        if node.facts.visible_gpus and node.ranks_without_gpu:
            yield Row("GPUs", f"{node.name}: {node.ranks_without_gpu} ranks have no GPU that works", "ERROR")
        yield from (Row("GPUs", f"{node.name} GPU {gpu.index}: {gpu.error}", "ERROR") for gpu in node.gpus if gpu.error)
        yield from (Row("GPUs", f"{node.name} {fault}", "warning") for fault in node.facts.gpu_faults)
        yield from _foreign_use(node)


def version_rows(nodes: list[Node]) -> Iterator[Row]:
    """Whatever must be the same on all nodes: one row if it is, else one for each difference."""
    same = []
    for name in nodes[0].facts.versions:
        values = grouped(nodes, lambda node, name=name: node.facts.versions[name])  # type: ignore[misc]
        if len(values) > 1:
            yield Row(name, f"differs: {spelled(values)}", "ERROR")
        elif (value := next(iter(values))) != "none":
            same.append(f"{name} {value}")
    yield Row("versions", f"{', '.join(same)}{' on every node' if len(nodes) > 1 else ''}")
    variables = sorted({name for node in nodes for name in node.facts.variables})
    for name in variables:
        values = grouped(nodes, lambda node, name=name: node.facts.variables.get(name, "not set"))  # type: ignore[misc]
        if len(values) > 1:
            yield Row(name, f"differs: {spelled(values)}", "warning")


def clock_row(nodes: list[Node]) -> Row:
    """Clocks beside that of the first node."""
    worst = max(nodes, key=lambda node: abs(node.clock))
    if abs(worst.clock) <= CLOCK_WARNING:
        return Row("clocks", f"within {abs(worst.clock):.3f} s of each other" if len(nodes) > 1 else "one node only")
    late = [node for node in nodes if abs(node.clock) > CLOCK_WARNING]
    text = ", ".join(f"{node.name} is {node.clock:+.1f} s" for node in late[:NAMES_SHOWN])
    level: Level = "ERROR" if abs(worst.clock) > CLOCK_ERROR else "warning"
    return Row("clocks", f"{text} off {nodes[0].name}: have their time service looked at", level)


def disk_rows(nodes: list[Node]) -> Iterator[Row]:
    """The output folder, the same and with room; the folder for temporary files; shared memory."""
    broken = {node.name: f"{node.folder.path} {node.folder.error}" for node in nodes if node.folder.error}
    for name, error in list(broken.items())[:NAMES_SHOWN]:
        yield Row("output", f"{name}: {error}", "ERROR")
    if not broken:
        free = min(node.folder.free for node in nodes)
        text = f"{nodes[0].folder.path}, {free / GIB:,.1f} GiB free"
        shared = ", the same folder on every node" if len(nodes) > 1 else ""
        yield Row("output", text + shared, "warning" if free < LITTLE_DISK else "ok")
    for node in nodes:
        if node.facts.temporary_error:
            yield Row("temporary", f"{node.name}: {node.facts.temporary}: {node.facts.temporary_error}", "ERROR")
    full = [node.name for node in nodes if node.facts.temporary_free < LITTLE_TEMPORARY]
    if full:
        yield Row("temporary", f"less than {LITTLE_TEMPORARY / GIB:g} GiB free on {listed(full)}", "warning")
    small = [node.name for node in nodes if node.facts.shared_memory < LITTLE_SHARED_MEMORY]
    if small:
        yield Row(
            "shared memory", f"/dev/shm has less than {LITTLE_SHARED_MEMORY / GIB:g} GiB on {listed(small)}", "warning"
        )


def link_rows(nodes: list[Node], measured: list[Measured], minimum: float | None) -> Iterator[Row]:
    """One row for each kind of link, then those that are wrong, below `minimum` bytes/s or slow beside the others."""
    kinds = grouped(measured, lambda found: _kind(found.link, len(nodes)))
    for kind, links in kinds.items():
        speeds = sorted(found.bandwidth for found in links)
        median, slowest = speeds[len(speeds) // 2], speeds[0]
        message, seconds = links[0].message, max(found.seconds for found in links)
        rate = f"{slowest / 1e9:.2f} GB/s" if len(links) == 1 else f"{slowest / 1e9:.2f} to {speeds[-1] / 1e9:.2f} GB/s"
        yield Row(
            kind, f"all-reduce of {message / 2**20:.0f} MiB: {rate} of bus bandwidth, at most {seconds * 1e3:.1f} ms"
        )
        for found in links:
            between = (
                " and ".join(nodes[i].name for i in found.link.nodes) if len(found.link.nodes) < 3 else "all nodes"
            )
            speed = f"{between}: {found.bandwidth / 1e9:.2f} GB/s"
            if found.wrong:
                yield Row(kind, f"{between}: wrong sums on ranks {', '.join(map(str, found.wrong))}", "ERROR")
            if minimum is not None and found.bandwidth < minimum:
                yield Row(kind, f"{speed} is less than the {minimum / 1e9:g} GB/s asked for", "ERROR")
            elif found.bandwidth < SLOW_SHARE * median:
                yield Row(kind, f"{speed} is slow beside {median / 1e9:.2f} GB/s, the median", "warning")


def grouped[T](things: Iterable[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    """`things` by their `key`, the largest group first."""
    groups: dict[str, list[T]] = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def spelled(groups: dict[str, list[Node]]) -> str:
    """Values and the nodes that have them."""
    return "; ".join(f"{value} on {listed([node.name for node in nodes])}" for value, nodes in groups.items())


def listed(names: list[str]) -> str:
    """Some names, and the number of the others."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _kind(link: Link, nodes: int) -> str:
    if len(link.nodes) == nodes:
        return "all ranks"
    return "within nodes" if len(link.nodes) == 1 else "neighbours"


def _foreign_use(node: Node) -> Iterator[Row]:
    for gpu in node.gpus:
        used = gpu.total - gpu.free
        if gpu.error or used < _threshold(gpu, USED_WARNING):
            continue
        text = (
            f"{node.name} GPU {gpu.index}: {used / GIB:.1f} of {gpu.total / GIB:.0f} GiB are in use, by another process"
        )
        yield Row("GPU memory", text, "ERROR" if used >= _threshold(gpu, USED_ERROR) else "warning")


def _threshold(gpu: Gpu, limit: tuple[float, int]) -> float:
    return max(limit[0] * gpu.total, limit[1])
