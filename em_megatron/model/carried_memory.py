"""States that go on from step to step, for documents longer than a sample (`memory.carry_memory`).

    step s:    sample of slot g reads states[layer][slot g], and writes what its last document hands on, detached
    step s+1:  the next sample of slot g, which goes on with that document, reads it

Every slot is read once and written once per step, so two shelves suffice: what is read stays as it is until `advance`,
also when a layer is recomputed in the backward pass. Under context parallelism every rank of a group keeps the same
states; tensor parallelism splits them by heads, pipeline parallelism by layers, data parallelism by slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class CarriedMemory:
    """The states of this rank's layers and slots, each [N, h, c] in fp32 or better.

    Args:
        shapes: layer (from 0, over the whole model) → shape [N, h, c] of a state here.
        dtype, device: of the states.
    """

    def __init__(self, shapes: dict[int, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        self.shapes, self.dtype, self.device = shapes, dtype, device
        self._now: dict[tuple[int, int], Tensor] = {}
        self._next: dict[tuple[int, int], Tensor] = {}

    def read(self, layer: int, slots: Sequence[int]) -> Tensor:
        """[N, slots, h, c] as the step before left them.

        Raises:
            KeyError: a slot has no state, though its document is said to go on.
        """
        missing = [slot for slot in slots if (layer, slot) not in self._now]
        if missing:
            raise KeyError(f"batch slot {missing[0]} goes on with a document, but layer {layer} holds no state for it")
        return torch.stack([self._now[layer, slot] for slot in slots], 1)

    def write(self, layer: int, slots: Sequence[int], states: Tensor) -> None:
        """Keeps [N, slots, h, c] for the next step."""
        for slot, state in zip(slots, states.detach().unbind(1), strict=True):
            self._next[layer, slot] = state.clone()

    def advance(self) -> None:
        """Ends a step: what was written becomes what is read."""
        self._now, self._next = self._next, {}

    def clear_nonfinite(self) -> None:
        """States that hold a number which is not finite become zeros: as if that history had been silent."""
        for key, state in self._now.items():
            if not torch.isfinite(state).all():
                self._now[key] = torch.zeros_like(state)

    @property
    def num_bytes(self) -> int:
        """Bytes held for the next step."""
        return sum(state.nbytes for state in self._now.values())

    def most_bytes(self, slots: int) -> int:
        """Bytes held while a step reads and writes a state for each of `slots` batch slots."""
        return 2 * slots * sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize

    def sharded_state(self, groups: Any, slots: Sequence[int], num_slots: int, loading: bool) -> dict[str, Any]:
        """Megatron ShardedTensors of the states of `slots`, for a checkpoint: key → [num_slots, N, h of all ranks, c].

        Slots without a state are saved as zeros; a document that goes on never reads one of those. When loading, the
        tensors become the states that are read, so that filling them fills this object.

        Args:
            groups: Megatron's process groups.
            slots: batch slots of this data-parallel rank.
            num_slots: of all ranks, the global batch size.
        """
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        found = {}
        for layer, shape in self.shapes.items():
            nothing = torch.zeros(shape, dtype=self.dtype, device=self.device)
            for slot in slots:
                state = self._now.get((layer, slot), nothing)
                if loading:
                    state = self._now[layer, slot] = torch.zeros_like(nothing)
                found[f"layer{layer}.slot{slot}"] = ShardedTensor.from_rank_offsets(
                    f"carried_memory.layer{layer}",
                    state[None],
                    (0, slot, num_slots),
                    (2, groups.tp.rank(), groups.tp.size()),
                    replica_id=groups.cp.rank(),
                )
        return found
