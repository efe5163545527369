"""What a generation keeps: constant in the length of the context.

Per layer: the state C of keys and values, the slots read from it, the keys and values of the current block, a counter.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Protocol

import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import BaseInferenceContext
from torch import Tensor

from em_megatron.hippo.banks import MemoryBanks
from em_megatron.ops.rotary import rotary_tables, rotate

if TYPE_CHECKING:
    from em_megatron.model.memory_attention import MemoryAttention


class BlockCache(Protocol):
    """What every kind's cache of a layer can do."""

    state: Tensor | None  # of an elastic memory, after the last whole block

    @property
    def room(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    def copy(self) -> BlockCache: ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


class LayerCache:
    """Elastic memory and current block of one layer on this tensor rank."""

    def __init__(self, attention: MemoryAttention, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        core, heads = attention.core_attention, attention.num_query_groups_per_partition
        dim = attention.hidden_size_per_attention_head
        self.banks: MemoryBanks | None = core.banks
        self.block_length: int = core.memory.block_length
        self.rotary_base: float = core.rotary_base
        self.blocks_done, self.filled = 0, 0
        # Current block, keys and values side by side: [L, b, hk, 2d]
        self.block = torch.zeros(self.block_length, batch_size, heads, 2 * dim, dtype=dtype, device=device)
        self.rotated = torch.zeros(self.block_length, batch_size, heads, dim, dtype=dtype, device=device)  # its keys
        self.state: Tensor | None = None  # [N, b, hk, 2d], in fp32 or better
        self.slots: Tensor | None = None  # [S, b, hk, 2d]

    @property
    def room(self) -> int:
        """Tokens that still fit the current block."""
        return self.block_length - self.filled

    @property
    def num_bytes(self) -> int:
        """Bytes held; the same from the end of the first block on, whatever is read."""
        held = (self.block, self.rotated, self.state, self.slots)
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    def copy(self) -> LayerCache:
        """A second one of the same content."""
        other = copy.copy(self)
        other.block, other.rotated = self.block.clone(), self.rotated.clone()  # the others are replaced, not changed
        return other

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Takes n ≤ room tokens: query [n, b, hq, d], key and value [n, b, hk, d] → [n, b, hq, d]."""
        first, last = self.filled, self.filled + query.shape[0]
        self.block[first:last] = torch.cat([key, value], -1)
        cos, sin = rotary_tables(self.block_length, query.shape[-1], self.rotary_base, query.dtype, query.device)
        cos, sin = cos[first:last, None, None], sin[first:last, None, None]
        self.rotated[first:last] = rotate(key, cos, sin)
        out = self._attention(query, rotate(query, cos, sin), first, last)
        self.filled = last
        if last == self.block_length:
            self._close_block()
        return out

    def _attention(self, query: Tensor, rotated: Tensor, first: int, last: int) -> Tensor:
        tokens, batch, heads, dim = query.shape
        own_keys, own_values = self.rotated[:last], self.block[:last, ..., dim:]
        group = (tokens, batch, own_keys.shape[2], -1, dim)
        rotated = rotated.view(group)
        scores = torch.einsum("qbgrd,kbgd->bgrqk", rotated, own_keys)
        future = torch.arange(last, device=query.device) > torch.arange(first, last, device=query.device)[:, None]
        scores = scores.masked_fill(future, float("-inf"))
        values = own_values
        if self.slots is not None:
            slot_keys, slot_values = self.slots.to(query.dtype).chunk(2, -1)
            scores = torch.cat([torch.einsum("qbgrd,sbgd->bgrqs", query.view(group), slot_keys), scores], -1)
            values = torch.cat([slot_values, values])
        out = torch.einsum("bgrqk,kbgd->qbgrd", torch.softmax(scores * dim**-0.5, -1), values)
        return out.reshape(tokens, batch, heads, dim)

    def _close_block(self) -> None:
        """C ← carry C + inject X, slots ← read C; the block starts anew."""
        if self.banks is not None:
            exact = torch.promote_types(self.block.dtype, torch.float32)
            step = self.banks.step(self.blocks_done, exact, self.block.device)
            added = torch.tensordot(step.inject, self.block.to(exact), 1)
            self.state = added if self.state is None else torch.tensordot(step.carry, self.state, 1) + added
            self.slots = torch.tensordot(self.banks.read(exact, self.block.device), self.state, 1)
        self.blocks_done += 1
        self.filled = 0


class MemoryCache(BaseInferenceContext):
    """The whole model's memory during a generation; every row of the batch has read equally many tokens."""

    def __init__(
        self,
        attentions: list[MemoryAttention],
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(InferenceConfig())
        self.layers: dict[int, BlockCache] = {
            layer.layer_number: layer.core_attention.new_cache(layer, batch_size, dtype, device) for layer in attentions
        }

    def copy(self) -> MemoryCache:
        """A second one of the same content: what is read into it leaves this one as it was."""
        other = copy.copy(self)
        other.layers = {number: layer.copy() for number, layer in self.layers.items()}
        return other

    @property
    def room(self) -> int:
        """Tokens that still fit the current block."""
        return next(iter(self.layers.values())).room

    def is_static_batching(self) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers on this rank."""
        return sum(layer.num_bytes for layer in self.layers.values())
