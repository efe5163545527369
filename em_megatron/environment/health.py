"""Whether the nodes of a job are fit to train together: looked at from every rank at once, printed by rank 0."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import em_megatron
from em_megatron.environment.exchange import START_SECONDS, Exchange, HealthError, Place
from em_megatron.environment.health_report import HealthReport
from em_megatron.environment.links import MESSAGE_BYTES, Link, Measured, measure, rounds
from em_megatron.environment.node_comparison import (
    Node,
    clock_row,
    disk_rows,
    gpu_rows,
    link_rows,
    version_rows,
)
from em_megatron.environment.node_facts import Facts, Gpu, collect
from em_megatron.environment.report import Row
from em_megatron.environment.shared_folder import FolderFacts, clock_offset, examine_folder
from em_megatron.environment.supervision import Supervision


@dataclass(frozen=True)
class Options:
    """`output` is the folder of the runs; `minimum_bandwidth` is in bytes/s; `time_limit` in seconds for each step."""

    output: Path
    expected_gpus: int | None = None
    minimum_bandwidth: float | None = None
    time_limit: float = 60.0
    json: bool = False


def check(options: Options) -> int:
    """The whole check, called on every rank; 0 on all of them if everything is fit, else 1.

    A rank that dies, hangs or fails ends every process with code 1, after a sentence that names it.
    """
    place = Place.from_environment()
    report = HealthReport()

    def last_words(sentence: str) -> None:
        if place.rank == 0 and report.nodes:
            report.rows.append(Row("check", sentence, "ERROR"))
            print(report.as_json() if options.json else report.as_text(), flush=True)
        print(sentence, file=sys.stderr, flush=True)

    try:
        exchange = Exchange.open(place, options.time_limit)
    except HealthError as error:
        last_words(f"error (node {place.name}): {error}")
        return 1
    with Supervision(exchange, last_words) as supervision:
        with supervision.step("waiting for all ranks to start", START_SECONDS):
            exchange.meet()
        layout = _look_at_nodes(exchange, supervision, options, report)
        measured = _measure(exchange, supervision, layout)
        with supervision.step("coming to a verdict"):
            if place.rank == 0:
                report.measured = measured
                report.rows += link_rows(report.nodes, measured, options.minimum_bandwidth)
                print(report.as_json() if options.json else report.as_text(), flush=True)
            fit = exchange.share("fit", report.fit)
            exchange.gather("left", True)  # the store may end with rank 0
    return 0 if fit else 1


def _look_at_nodes(
    exchange: Exchange, supervision: Supervision, options: Options, report: HealthReport
) -> dict[str, Any]:
    """Fills rank 0's report with all but the links; returns {"nodes": ranks of each, "names", "backend"} on every rank."""
    place = exchange.place
    with supervision.step("looking at this node and its GPUs"):
        facts = collect(place)
    folder, clock = FolderFacts("", 0, ""), 0.0
    if place.leads:
        with supervision.step("looking at the output folder"):
            folder = examine_folder(exchange, options.output)
        with supervision.step("comparing clocks"):
            clock = clock_offset(exchange)
    with supervision.step("comparing nodes"):
        told = exchange.gather("facts", [asdict(facts), asdict(folder), clock])
        layout = {}
        if place.rank == 0:
            report.nodes = nodes = _nodes(told)
            report.rows += [
                *_world_rows(place),
                *_source_rows(Path(sys.argv[0])),
                *version_rows(nodes),
                *gpu_rows(nodes, options.expected_gpus),
                clock_row(nodes),
                *disk_rows(nodes),
            ]
            on_gpu = all(rank["owns_gpu"] for rank, _, _ in told)
            layout = {
                "nodes": [node.ranks for node in nodes],
                "names": [node.name for node in nodes],
                "backend": "nccl" if on_gpu else "gloo",
            }
        return exchange.share("layout", layout)


def _measure(exchange: Exchange, supervision: Supervision, layout: dict[str, Any]) -> list[Measured]:
    """All links, in rounds; their figures on rank 0."""
    place, backend = exchange.place, layout["backend"]
    if backend == "nccl":
        torch.cuda.set_device(place.local_rank)
    planned = [link for links in rounds(layout["nodes"]) for link in links]
    figures = {}
    for index, link in enumerate(planned):
        if place.rank in link.ranks:
            names = [layout["names"][node] for node in link.nodes]
            where = "over all nodes" if len(names) > 2 else f"on {' and '.join(names)}"
            with supervision.step(f"in an all-reduce {where}"):
                figures[index] = measure(link, place.rank, exchange.store_for(f"link/{index}"), backend, exchange.limit)
    with supervision.step("collecting what was measured"):
        told = exchange.gather("measured", figures)
        return [_measured(str(index), link, told, backend) for index, link in enumerate(planned)] if told else []


def _measured(index: str, link: Link, told: list[dict[str, tuple[float, bool]]], backend: str) -> Measured:
    seconds = max(told[rank][index][0] for rank in link.ranks)
    wrong = tuple(rank for rank in link.ranks if not told[rank][index][1])
    return Measured(link, seconds, MESSAGE_BYTES[backend], wrong)


def _nodes(told: list[Any]) -> list[Node]:
    """Nodes by torchrun's numbers, from what every rank told; a name that two nodes have is followed by its number."""
    ranks: dict[int, list[Facts]] = {}
    led: dict[int, tuple[Facts, FolderFacts, float]] = {}
    for facts, folder, clock in told:
        place = Place(**facts.pop("place"))
        found = Facts(place, [Gpu(**gpu) for gpu in facts.pop("gpus")], **facts)
        ranks.setdefault(place.node_rank, []).append(found)
        if place.leads:
            led[place.node_rank] = (found, FolderFacts(**folder), clock)
    names = [leader.place.name for leader, _, _ in led.values()]
    nodes = []
    for number in sorted(ranks):
        leader, folder, clock = led[number]
        name = leader.place.name if names.count(leader.place.name) == 1 else f"{leader.place.name}#{number}"
        gpus = sorted((gpu for found in ranks[number] for gpu in found.gpus), key=lambda gpu: gpu.index)
        without = sum(not found.owns_gpu for found in ranks[number])
        members = [found.place.rank for found in ranks[number]]
        nodes.append(Node(name, members, leader, gpus, folder, clock, without))
    return nodes


def _world_rows(place: Place) -> list[Row]:
    """Whether the ranks form one world: where nodes do not find each other, each may start one of its own."""
    step = os.environ.get("SLURM_STEP_NUM_NODES", "1")
    if step.isdigit() and int(step) > place.nodes:
        text = (
            f"Slurm started this on {step} nodes, but only {place.nodes} found each other: look at torchrun's address"
        )
        return [Row("world", text, "ERROR")]
    return []


def _source_rows(script: Path) -> list[Row]:
    """Whether the package that is imported lies beside the script that runs: in a container it may be the image's."""
    beside, imported = script.absolute().parent.parent, Path(em_megatron.__file__).absolute().parents[1]
    if not (beside / "em_megatron").is_dir() or beside.samefile(imported):
        return []
    text = f"{beside / 'em_megatron'} is not what runs, but {imported / 'em_megatron'}: set PYTHONPATH={beside}"
    return [Row("source", text, "warning")]
