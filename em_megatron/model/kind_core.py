"""The core attention of every memory kind but Elastic Memory's own: an operator of `ops/kinds` and its parameters.

Heads are split over tensor-parallel ranks, parameters (one number per query head each) with them. All blocks of a sample
go at once; decoding goes block after block through `hf/kinds_elastic_memory.py`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from em_megatron.config import MemoryConfig
from em_megatron.hf.kinds_elastic_memory import PARAMETERS, STEPS, Kept, Steps
from em_megatron.kinds import kind_of
from em_megatron.model.head_parameters import HeadParameters
from em_megatron.model.sizes import memory_layers
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.kinds import OPERATORS, Reading
from em_megatron.validate import points_of

if TYPE_CHECKING:
    from em_megatron.model.elastic_attention import ElasticTransformerConfig
    from em_megatron.model.memory_attention import MemoryAttention


class KindCore(HeadParameters):
    """Block-local attention, and in layers of `memory.layers` what `memory.kind` adds to it."""

    def __init__(
        self,
        config: ElasticTransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.layer = (layer_number - 1) // 2  # sub-layers alternate: attention, MLP
        self.rotary_base = config.rotary_base
        self.has_memory = self.layer in memory_layers(config.memory, config.num_layers // 2)
        self.context_group = pg_collection.cp if pg_collection is not None else None
        self.use_reader(config.memory)
        self.tensor_group = pg_collection.tp if pg_collection is not None else None
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        for name, start in PARAMETERS.get(config.memory.kind, {}).items() if self.has_memory else ():
            self.add(name, heads, start, config.params_dtype)

    def use_reader(self, memory: MemoryConfig) -> None:
        """Reads by another memory section from now on, with the same weights."""
        points = tuple(points_of(memory).tolist()) if kind_of(memory).reads_sampler else ()
        self.memory = memory
        self.reading = Reading(memory, self.rotary_base, points, self.context_group)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The kind's own parameters, by name."""
        return dict(self.named_parameters())

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout) -> Tensor:
        """query [T, b, hq, d], key and value [T, b, hk, d], all unrotated, T of this rank → [T, b, hq·d]."""
        if not self.has_memory:
            return self.reading.local(query, key, value, layout).flatten(2)
        operator = OPERATORS[self.memory.kind]
        return operator(query, key, value, layout, self.reading, self.weights).flatten(2)

    def new_cache(
        self, attention: MemoryAttention, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> KindCache:
        """An empty cache of this layer for generation."""
        return KindCache(self)


def steps_of(memory: MemoryConfig, rotary_base: float, has_memory: bool) -> Steps:
    """The kind block after block, with the settings of a memory section."""
    settings: dict[str, dict[str, Any]] = {
        "subsample": {"points": points_of(memory).tolist(), "detach": memory.detach_memory},
        "infini": {"update": memory.update, "detach": memory.detach_memory},
        "memorizing": {"pairs": memory.pairs, "top_k": memory.top_k},
    }
    chosen = settings.get(memory.kind, {})
    return STEPS[memory.kind](memory.block_length, rotary_base, has_memory, **chosen)


class KindCache:
    """What a generation keeps of one layer on this tensor rank."""

    def __init__(self, core: KindCore) -> None:
        self.core, self.tokens = core, 0
        self.steps = steps_of(core.memory, core.rotary_base, core.has_memory)
        self.kept: Kept = {}
        self.state: Tensor | None = None  # only an elastic memory has one

    @property
    def room(self) -> int:
        """Tokens that still fit the current block."""
        return self.steps.block_length - self.tokens % self.steps.block_length

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for x in self.kept.values())

    def copy(self) -> KindCache:
        """A second one of the same content; tensors are replaced, not changed, so they are shared."""
        return copy.copy(self)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Takes n ≤ room tokens: query [n, b, hq, d], key and value [n, b, hk, d] → [n, b, hq, d]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out, self.kept = self.steps.attend(q, k, v, self.kept, self.tokens, self.core.weights)
        self.tokens += query.shape[0]
        return out.permute(2, 0, 1, 3)
