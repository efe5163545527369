"""The core attention of Elastic Memory: read memory → attend → write memory.

Heads, keys, values and memory state are split over tensor-parallel ranks by KV head; nothing about the memory is
communicated between them. Context-parallel ranks hand on the states of documents that span them. Layer l's memory
depends on K and V of layer l only, so all blocks of a sample go at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from em_megatron.config import MemoryConfig
from em_megatron.hippo.banks import MemoryBanks, shared_banks
from em_megatron.model.carried_memory import CarriedMemory
from em_megatron.model.memory_cache import LayerCache
from em_megatron.model.sizes import memory_layers
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.memory import block_memory
from em_megatron.ops.trapezoid_attention import trapezoid_attention
from em_megatron.parallel.memory_handoff import Handoff
from em_megatron.validate import points_of

if TYPE_CHECKING:
    from em_megatron.model.memory_attention import MemoryAttention


@dataclass
class ElasticTransformerConfig(TransformerConfig):
    """Megatron's configuration plus the memory section of the recipe.

    num_layers counts sub-layers (attention and MLP apart), as Megatron's hybrid model does.
    """

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    memory_handoff: str = "all_gather"
    rotary_base: float = 10000.0

    def banks(self) -> MemoryBanks:
        """The memory's matrices, one object for all layers of the process."""
        return banks_of(self.memory)


def banks_of(memory: MemoryConfig) -> MemoryBanks:
    """The matrices of a memory section, one object for all layers of the process."""
    with torch.device("cpu"):  # also while a model is laid out on the meta device
        return shared_banks(
            memory.order,
            memory.block_length,
            tuple(points_of(memory).tolist()),
            memory.discretization,
            Path(memory.bank_cache).expanduser() if memory.bank_cache else None,
        )


class TrapezoidCore(torch.nn.Module):
    """The core attention: memory operator and trapezoidal attention, without parameters.

    Takes the place of Megatron's core attention, so that `recompute_granularity="selective"` recomputes it.
    `carried` keeps states from step to step where the run asks for it (set by training; None otherwise).
    """

    def __init__(
        self,
        config: ElasticTransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.layer = (layer_number - 1) // 2  # sub-layers alternate: attention, MLP
        self.has_memory = self.layer in memory_layers(config.memory, config.num_layers // 2)
        self.memory, self.handoff = config.memory, config.memory_handoff
        self.rotary_base = config.rotary_base
        self.banks = config.banks() if self.has_memory else None
        self.context_group = pg_collection.cp if pg_collection is not None else None
        self.carried: CarriedMemory | None = None

    def use_reader(self, memory: MemoryConfig) -> None:
        """Reads by another memory section from now on; it has no weights."""
        self.memory = memory
        self.banks = banks_of(memory) if self.has_memory else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout) -> Tensor:
        """query [T, b, hq, d], key and value [T, b, hk, d], all unrotated, T of this rank → [T, b, hq·d]."""
        uses_memory = layout.runs or layout.crosses_ranks or layout.continued_rows
        if self.banks is None or not uses_memory:
            return self._attend(query, key, value, None, layout).flatten(2)
        memory = LayerMemory(self, key, value, layout)
        out = self._attend(query, key, value, memory.slots if layout.runs else None, layout)
        return memory.close(out).flatten(2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, slots: Callable[[], tuple[Tensor, Tensor]] | None,
        layout: BlockLayout,
    ) -> Tensor:  # fmt: skip
        return trapezoid_attention(query, key, value, slots, layout, self.rotary_base, self.memory.kernels)

    def new_cache(
        self, attention: MemoryAttention, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """An empty cache of this layer for generation."""
        return LayerCache(attention, batch_size, dtype, device)


class LayerMemory:
    """The memory of one layer and micro-batch: written and sent on construction, read by `slots`, ended by `close`."""

    def __init__(self, core: TrapezoidCore, key: Tensor, value: Tensor, layout: BlockLayout) -> None:
        assert core.banks is not None
        self.core, self.layout, self.dtype = core, layout, key.dtype
        if core.memory.detach_memory:
            key, value = key.detach(), value.detach()
        bank_dtype = torch.promote_types(key.dtype, torch.float32) if core.memory.bank_dtype == "fp32" else key.dtype
        self.memory = block_memory(
            key, value, layout, core.banks, core.memory.superchunk, core.memory.kernels, bank_dtype
        )
        self.state = self._from_the_step_before()
        nothing = torch.cat([key[:0], value[:0]], -1)
        self.handoff = self._send(nothing) if layout.crosses_ranks else None
        self.memory.read_own()

    def _from_the_step_before(self) -> Tensor | None:
        """What the first rank's documents bring from their slots' samples of the step before, [N, entering, h, c]."""
        rows = self.layout.entering_rows
        if self.layout.sequence_rank > 0 or not rows:
            return None
        assert self.core.carried is not None
        return self.core.carried.read(self.core.layer, [self.layout.slots[row] for row in rows])

    def _send(self, signal: Tensor) -> Handoff:
        group, banks = self.core.context_group, self.core.banks
        assert group is not None
        assert banks is not None
        last = self.layout.sequence_rank == self.layout.sequence_size - 1
        leaving = None if last else self._leaving()
        return Handoff(leaving, signal, self.layout, banks, group, self.core.handoff)

    def _leaving(self) -> Tensor | None:
        """[N, leaving, h, c] states after the last block here: what the blocks here add, and what is known to have
        entered before them."""
        assert self.core.banks is not None
        added, entering = self.memory.leaving_states, self.state
        if added is None or entering is None:
            return added
        carried = []
        for index, run in enumerate(self.layout.leaving):
            state = added[:, index]
            if run.history:
                start, stop = run.history, run.history + run.num_blocks
                matrix = self.core.banks.carry(start, stop, state.dtype, state.device)
                state = state + torch.tensordot(matrix, entering[:, self.layout.entering_rows.index(run.row)], 1)
            carried.append(state)
        return torch.stack(carried, 1)

    def slots(self) -> tuple[Tensor, Tensor]:
        """Memory keys and values of every block, each [B, S, b, hk, d]; waits for states on their way."""
        if self.handoff is not None and self.state is None and self.layout.entering_rows:
            self.state = self.handoff.arrive()
        keys, values = self.memory.slots(self.state)
        return keys.to(self.dtype), values.to(self.dtype)

    def close(self, out: Tensor) -> Tensor:
        """Keeps what goes on in the next step, and returns the layer's output, tied to what other ranks wait for."""
        if self.handoff is not None and (self.layout.sequence_rank == 0 or not self.layout.entering_rows):
            out = self.handoff.tie(out)
        if self.layout.continued_rows:
            self._keep()
        return out

    @torch.no_grad()
    def _keep(self) -> None:
        """The last rank's states at the end of the sample, given to the whole context-parallel group."""
        core, layout, rows = self.core, self.layout, self.layout.continued_rows
        assert core.carried is not None
        shape, dtype = core.carried.shapes[core.layer], core.carried.dtype
        last = layout.sequence_rank == layout.sequence_size - 1
        end = self._leaving() if last else None
        states = torch.empty(shape[0], len(rows), *shape[1:], dtype=dtype, device=core.carried.device)
        if end is not None:
            states.copy_(end)
        if layout.sequence_size > 1:
            dist.broadcast(states, group=core.context_group, group_src=layout.sequence_size - 1)
        core.carried.write(core.layer, [layout.slots[row] for row in rows], states)
