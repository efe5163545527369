"""The attention layer of Elastic Memory as a Megatron-Core module: project → read memory → attend → write memory.

Heads, keys, values and memory state are split over tensor-parallel ranks by KV head; nothing about the memory is
communicated between them. Layer l's memory depends on K and V of layer l only, so all blocks of a sample go at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from em_megatron.config import MemoryConfig
from em_megatron.hippo.banks import MemoryBanks, shared_banks
from em_megatron.model.memory_cache import LayerMemory, MemoryCache
from em_megatron.model.sizes import memory_layers
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.memory import memory_slots
from em_megatron.ops.trapezoid_attention import trapezoid_attention
from em_megatron.validate import points_of


@dataclass
class ElasticTransformerConfig(TransformerConfig):
    """Megatron's configuration plus the memory section of the recipe.

    num_layers counts sub-layers (attention and MLP apart), as Megatron's hybrid model does.
    """

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    rotary_base: float = 10000.0

    def banks(self) -> MemoryBanks:
        """The memory's matrices, one object for all layers of the process."""
        memory = self.memory
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
    """

    def __init__(self, config: ElasticTransformerConfig, layer_number: int, **_: Any) -> None:
        super().__init__()
        attention_index = (layer_number - 1) // 2  # sub-layers alternate: attention, MLP
        self.has_memory = attention_index in memory_layers(config.memory, config.num_layers // 2)
        self.memory = config.memory
        self.rotary_base = config.rotary_base
        self.banks = config.banks() if self.has_memory else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout) -> Tensor:
        """query [T, b, hq, d], key and value [T, b, hk, d], all unrotated → [T, b, hq·d]."""
        slots = self.slots(key, value, layout) if self.banks is not None and layout.runs else None
        out = trapezoid_attention(query, key, value, slots, layout, self.rotary_base)
        return out.flatten(2)

    def slots(self, key: Tensor, value: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
        """Memory keys and values of every block, each [B, S, b, hk, d]."""
        assert self.banks is not None
        signal = torch.cat([key, value], -1)
        if self.memory.detach_memory:
            signal = signal.detach()
        if self.memory.bank_dtype == "fp32":
            signal = signal.float()
        slots = memory_slots(signal, layout, self.banks, self.memory.superchunk).to(key.dtype)
        keys, values = slots.chunk(2, -1)
        return keys, values


class ElasticMemoryAttention(SelfAttention):
    """Self-attention of a layer with Elastic Memory, or block-local where `memory.layers` leaves the layer out.

    linear_qkv is column parallel, linear_proj row parallel, as in Megatron's own attention; no parameter is added.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: BlockLayout | None = None,
        inference_context: MemoryCache | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends within documents.

        Args:
            hidden_states: [T, b, hidden]; under sequence parallelism this rank's part of T.
            attention_mask: not used, the layout says what is visible.
            packed_seq_params: the documents of the micro-batch (training and evaluation).
            inference_context: the cache of a generation instead; the tokens go on where it stands.

        Returns:
            ([T, b, hidden], bias of the output projection or None).

        Raises:
            ValueError: neither a layout nor a cache was given.
        """
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if inference_context is not None:
            context = self._continue(query, key, value, inference_context.layers[self.layer_number])
        elif packed_seq_params is None:
            raise ValueError("ElasticMemoryAttention needs a BlockLayout as packed_seq_params, or a MemoryCache")
        elif self.checkpoint_core_attention and self.training:
            context = tensor_parallel.checkpoint(
                lambda q, k, v: self.core_attention(q, k, v, packed_seq_params), False, query, key, value
            )
        else:
            context = self.core_attention(query, key, value, packed_seq_params)
        output, bias = self.linear_proj(context)
        return output, bias

    def _continue(self, query: Tensor, key: Tensor, value: Tensor, memory: LayerMemory) -> Tensor:
        """Attends block piece by block piece from where the cache stands, and moves it on."""
        pieces, start = [], 0
        while start < query.shape[0]:
            stop = min(query.shape[0], start + memory.room)
            span = slice(start, stop)
            pieces.append(memory.attend(query[span], key[span], value[span]))
            start = stop
        return torch.cat(pieces).flatten(2)
