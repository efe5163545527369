"""Memorizing Transformer (arXiv 2203.08913): a FIFO of the last M keys and values in one layer, behind a gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from em_megatron.kinds.base import Kind, mean_history, per_key

if TYPE_CHECKING:
    from em_megatron.config import MemoryConfig
    from em_megatron.model.sizes import Shape


class Memorizing(Kind):
    name = "memorizing"

    def default_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layer at three quarters of the depth: the 9th of 12."""
        return (max(0, round(3 * num_layers / 4) - 1),)

    def memory_floats(self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int) -> int:
        """2·M·d·h per layer."""
        return layers * 2 * memory.pairs * shape.kv_channels * shape.num_query_groups

    def parameters(self, memory: MemoryConfig, shape: Shape, layers: int) -> int:
        """A gate and a scale per query head."""
        return layers * 2 * shape.num_attention_heads

    def attention_flops(
        self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int, context_parallel_size: int
    ) -> float:
        """Scores of all pairs that are there, and values of those that are read."""
        found = mean_history(memory.block_length, sequence_length, memory.pairs)
        read = min(memory.top_k, found) if memory.top_k else found
        local = shape.num_layers * memory.block_length / 2
        return 6.0 * per_key(shape) * (local + layers * (found + read) / 2)

    def describe(self, memory: MemoryConfig) -> str:
        reads = f"the {memory.top_k} best read" if memory.top_k else "all read (dense)"
        return f"{memory.pairs} pairs, {reads}"

    def weight_identity(self, memory: MemoryConfig, layers: tuple[int, ...]) -> tuple[object, ...]:
        return ("memorizing", layers)
