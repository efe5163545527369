"""The attention layer as a Megatron-Core module: project → core attention of the memory kind → project back."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from em_megatron.model.memory_cache import BlockCache, MemoryCache
from em_megatron.ops.block_layout import BlockLayout


class MemoryAttention(SelfAttention):
    """Self-attention of a layer of any memory kind, block-local where `memory.layers` leaves the layer out.

    linear_qkv is column parallel, linear_proj row parallel, as in Megatron's own attention; the core attention is the
    kind's.
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
            raise ValueError("MemoryAttention needs a BlockLayout as packed_seq_params, or a MemoryCache")
        elif self.checkpoint_core_attention and self.training:
            context = tensor_parallel.checkpoint(
                lambda q, k, v: self.core_attention(q, k, v, packed_seq_params), False, query, key, value
            )
        else:
            context = self.core_attention(query, key, value, packed_seq_params)
        output, bias = self.linear_proj(context)
        return output, bias

    def _continue(self, query: Tensor, key: Tensor, value: Tensor, memory: BlockCache) -> Tensor:
        """Attends block piece by block piece from where the cache stands, and moves it on."""
        pieces, start = [], 0
        while start < query.shape[0]:
            stop = min(query.shape[0], start + memory.room)
            span = slice(start, stop)
            pieces.append(memory.attend(query[span], key[span], value[span]))
            start = stop
        return torch.cat(pieces).flatten(2)
