"""All-reduces within nodes, between neighbouring nodes and over all ranks: right sums, times and bandwidths."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

MESSAGE_BYTES = {"nccl": 64 * 2**20, "gloo": 8 * 2**20}
REPETITIONS = 5
LARGEST_ADDEND = 64  # sums stay exact in fp32 on up to 2**18 ranks


@dataclass(frozen=True)
class Link:
    """Ranks that reduce together, and the nodes, counted from 0, that they are on."""

    nodes: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """An all-reduce over `link`: the slowest rank's median time, and the ranks that got a wrong sum."""

    link: Link
    seconds: float
    message: int
    wrong: tuple[int, ...]

    @property
    def bandwidth(self) -> float:
        """Bytes per second through a rank's port: what a ring sends and receives, 2 (n − 1) / n of the message."""
        ranks = len(self.link.ranks)
        return 2 * (ranks - 1) / ranks * self.message / self.seconds


def rounds(nodes: list[list[int]]) -> list[list[Link]]:
    """Links measured at the same time, round after round, for `nodes` with their ranks.

    Each node's own ranks, neighbours (0, 1), (2, 3), ... and then (1, 2), (3, 4), ..., so that a slow or dead link has
    the names of two nodes, and last all. What would be the same as all is left out.
    """
    own = [Link((i,), tuple(ranks)) for i, ranks in enumerate(nodes) if len(ranks) > 1] if len(nodes) > 1 else []
    pairs = [Link((i, i + 1), (*nodes[i], *nodes[i + 1])) for i in range(len(nodes) - 1)] if len(nodes) > 2 else []
    everyone = Link(tuple(range(len(nodes))), tuple(rank for ranks in nodes for rank in ranks))
    last = [everyone] if len(everyone.ranks) > 1 else []
    return [links for links in (own, pairs[0::2], pairs[1::2], last) if links]


def measure(link: Link, rank: int, store: Any, backend: str, limit: float) -> tuple[float, bool]:
    """Median seconds of an all-reduce over `link`, of which this rank is one, and whether a first one was right.

    It takes a default process group of the link's ranks alone, through a `store` that no other link has; on GPUs with
    torch's current one. Raises what torch.distributed does when a peer is gone or, over gloo, later than `limit` seconds.
    """
    where = torch.device("cuda" if backend == "nccl" else "cpu")
    own, size = link.ranks.index(rank), len(link.ranks)
    # NCCL ends a late process without a sentence: Supervision, which has one, must come first.
    timeout = timedelta(seconds=limit if backend == "gloo" else 2 * limit + 30)
    dist.init_process_group(backend, store=store, rank=own, world_size=size, timeout=timeout)
    pattern = torch.arange(MESSAGE_BYTES[backend] // 4, device=where, dtype=torch.float32).remainder_(251)
    values = pattern + own % LARGEST_ADDEND
    dist.all_reduce(values)
    right = torch.equal(values, size * pattern + sum(other % LARGEST_ADDEND for other in range(size)))
    values.zero_()
    times = [_timed(values) for _ in range(REPETITIONS)]
    dist.destroy_process_group()
    return statistics.median(times), right


def _timed(values: Any) -> float:
    if values.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
