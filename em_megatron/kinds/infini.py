"""Infini-attention (arXiv 2404.07143): a matrix of associations per head, read through φ = ELU + 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from em_megatron.kinds.base import Kind, per_key

if TYPE_CHECKING:
    from em_megatron.config import MemoryConfig
    from em_megatron.model.sizes import Shape


class Infini(Kind):
    name = "infini"

    def memory_floats(self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int) -> int:
        """(d·d + d)·h per layer."""
        return layers * (shape.kv_channels + 1) * shape.kv_channels * shape.num_query_groups

    def parameters(self, memory: MemoryConfig, shape: Shape, layers: int) -> int:
        """One β per query head."""
        return layers * shape.num_attention_heads

    def attention_flops(
        self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int, context_parallel_size: int
    ) -> float:
        local = per_key(shape) * shape.num_layers * memory.block_length / 2
        entry = (shape.kv_channels + 1) * shape.kv_channels
        writes = 2 if memory.update == "delta" else 1
        return 6.0 * (local + layers * entry * (shape.num_attention_heads + writes * shape.num_query_groups))

    def describe(self, memory: MemoryConfig) -> str:
        return f"association matrix, {memory.update} update"

    def weight_identity(self, memory: MemoryConfig, layers: tuple[int, ...]) -> tuple[object, ...]:
        return ("infini", layers)
