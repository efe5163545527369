"""Ranks leave words for each other in the store of torch.distributed, which works before any collective does."""

from __future__ import annotations

import copy
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

START_SECONDS = 300.0  # some nodes read their packages from a slow disk
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.05  # seconds between looks at the store


class HealthError(RuntimeError):
    """The check cannot go on; its text is one sentence for the user."""


@dataclass(frozen=True)
class Place:
    """Where this rank stands: in the world, on its node, and which node that is."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    nodes: int
    name: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """By the variables of torchrun, without them a world of one; the node's name is Slurm's, else the host's."""

        def number(variable: str, otherwise: int) -> int:
            return int(environment.get(variable, otherwise))

        world_size = number("WORLD_SIZE", 1)
        return cls(
            rank=number("RANK", 0),
            world_size=world_size,
            local_rank=number("LOCAL_RANK", 0),
            local_world_size=number("LOCAL_WORLD_SIZE", world_size),
            node_rank=number("GROUP_RANK", 0),
            nodes=number("GROUP_WORLD_SIZE", 1),
            name=environment.get("SLURMD_NODENAME") or socket.gethostname(),
        )

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its node."""
        return self.local_rank == 0


class Exchange:
    """Values under names, as JSON. Whoever waits looks again and again, so that other threads may use the store too."""

    def __init__(self, store: Any, place: Place, limit: float) -> None:
        """`store` is one of torch.distributed; nothing is waited for longer than `limit` seconds."""
        self.store = dist.PrefixStore("health", store)  # type: ignore[attr-defined]
        self.place = place
        self.limit = limit

    @classmethod
    def open(cls, place: Place, limit: float) -> Exchange:
        """Joins the other ranks through torchrun's variables, or alone without them.

        Raises HealthError where the store does not answer.
        """
        if "RANK" not in os.environ:
            return cls(dist.HashStore(), place, limit)  # type: ignore[attr-defined]
        try:
            rendezvous = dist.rendezvous("env://", timeout=timedelta(seconds=START_SECONDS))  # type: ignore[attr-defined]
            store, _, _ = next(rendezvous)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise HealthError(f"the store of node 0 at {where} does not answer: {error}") from error
        return cls(store, place, limit)

    def clone(self) -> Exchange:
        """The same words through a connection of its own, for another thread."""
        other = copy.copy(self)
        other.store = self.store.clone()  # type: ignore[assignment]
        return other

    def store_for(self, name: str) -> Any:
        """A part of the store for a process group."""
        return dist.PrefixStore(name, self.store)  # type: ignore[attr-defined]

    def put(self, name: str, value: Any) -> None:
        """Leaves `value` under `name`."""
        self.store.set(name, json.dumps(value))

    def has(self, name: str) -> bool:
        """Whether something lies under `name`."""
        return bool(self.store.check([name]))

    def get(self, name: str, whose: str = "rank 0", limit: float | None = None) -> Any:
        """What `whose` rank leaves under `name`, once it does.

        Raises HealthError when it does not within `limit` seconds, by default those of this exchange.
        """
        limit = self.limit if limit is None else limit
        end, pause = time.monotonic() + limit, FIRST_PAUSE
        while not self.has(name):
            if time.monotonic() > end:
                raise HealthError(f"{whose} said nothing within {limit:g} s")
            time.sleep(pause)
            pause = min(1.2 * pause, LONGEST_PAUSE)
        return json.loads(self.store.get(name))

    def meet(self) -> None:
        """Returns once every rank has started. Raises HealthError when one has not within START_SECONDS."""
        self.put(f"here/{self.place.rank}", True)
        if self.place.rank == 0:
            for rank in range(self.place.world_size):
                self.get(f"here/{rank}", f"rank {rank}", START_SECONDS)
            self.put("met", True)
        self.get("met", limit=START_SECONDS)

    def gather(self, name: str, value: Any) -> list[Any]:
        """Every rank's `value` in the order of ranks, on rank 0; nothing on the others, which do not wait."""
        self.put(f"{name}/{self.place.rank}", value)
        if self.place.rank:
            return []
        return [self.get(f"{name}/{rank}", f"rank {rank}") for rank in range(self.place.world_size)]

    def share(self, name: str, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.place.rank == 0:
            self.put(name, value)
        return self.get(name)

    def first(self, name: str, value: str) -> bool:
        """Leaves the text `value` under `name` unless another lies there; whether it does now."""
        return bool(self.store.compare_set(name, "", value) == value.encode())
