"""Kinds that keep tokens as they are: none, all, the block before, some at the sampler's moments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from em_megatron.kinds.base import Kind, history_share, per_key
from em_megatron.kinds.elastic import sampler_text

if TYPE_CHECKING:
    from em_megatron.config import MemoryConfig
    from em_megatron.model.sizes import Shape


class BlockLocal(Kind):
    """No memory: the floor."""

    name = "block_local"
    has_memory = False


class KeepsAll(Kind):
    """A kind that keeps the keys and values of the whole context."""

    grows = True

    def memory_floats(self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int) -> int:
        """2·T·d·h per layer: all keys and values."""
        return layers * 2 * sequence_length * shape.kv_channels * shape.num_query_groups


class Full(KeepsAll):
    """Causal attention over the document: the ceiling in quality, whose memory is the context."""

    name = "full"
    detaches = False

    def attention_flops(
        self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int, context_parallel_size: int
    ) -> float:
        local = (shape.num_layers - layers) * memory.block_length / 2
        return 6.0 * per_key(shape) * (layers * sequence_length / 2 + local)

    def describe(self, memory: MemoryConfig) -> str:
        return "causal attention over the document"


class TransformerXL(Kind):
    """The block before, detached (arXiv 1901.02860)."""

    name = "transformer_xl"

    def memory_floats(self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int) -> int:
        """2·L·d·h per layer."""
        return layers * 2 * memory.block_length * shape.kv_channels * shape.num_query_groups

    def attention_flops(
        self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int, context_parallel_size: int
    ) -> float:
        before = memory.block_length * history_share(memory.block_length, sequence_length)
        return 6.0 * per_key(shape) * (shape.num_layers * memory.block_length / 2 + layers * before)

    def describe(self, memory: MemoryConfig) -> str:
        return "keys and values of the block before"


class Subsample(KeepsAll):
    """S raw keys and values at the sampler's moments, no compression: which are read changes with the length of the
    history, so all have to be kept."""

    name = "subsample"
    reads_sampler = True

    def attention_flops(
        self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int, context_parallel_size: int
    ) -> float:
        slots = memory.slots * history_share(memory.block_length, sequence_length)
        return 6.0 * per_key(shape) * (shape.num_layers * memory.block_length / 2 + layers * slots)

    def describe(self, memory: MemoryConfig) -> str:
        return f"{memory.slots} raw tokens, {sampler_text(memory)}"
