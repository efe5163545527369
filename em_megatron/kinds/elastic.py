"""Elastic Memory itself (arXiv 2602.11212): N coefficients per head and channel of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from em_megatron.kinds.base import Kind, per_key

if TYPE_CHECKING:
    from em_megatron.config import MemoryConfig
    from em_megatron.model.sizes import Shape


class Elastic(Kind):
    name = "elastic"
    reads_sampler = True

    def memory_floats(self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int) -> int:
        """2·N·d·h per layer."""
        return layers * 2 * memory.order * shape.kv_channels * shape.num_query_groups

    def attention_flops(
        self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int, context_parallel_size: int
    ) -> float:
        """The triangle, the slots, and the operator as planned for a context-parallel rank's part of a sample."""
        from em_megatron.hippo.cost_model import memory_cost, plan

        tokens = sequence_length // context_parallel_size
        split = context_parallel_size > 1 or memory.carry_memory
        attention = per_key(shape) * (shape.num_layers * memory.block_length / 2 + layers * memory.slots)
        if not layers:
            return 6.0 * attention
        blocks, sizes = tokens // memory.block_length, (memory.order, memory.slots, memory.block_length)
        superchunk = memory.superchunk or plan(blocks, *sizes, part_of_sample=split)
        channels = 2 * shape.num_query_groups * shape.kv_channels
        read_write = layers * channels * memory_cost(blocks, superchunk, *sizes, part_of_sample=split) / tokens
        return 6.0 * attention + 4.0 * read_write  # the memory's matrices have no gradient

    def describe(self, memory: MemoryConfig) -> str:
        return f"order {memory.order}, {memory.slots} slots, {sampler_text(memory)}"


def sampler_text(memory: MemoryConfig) -> str:
    """The sampler and its own settings."""
    details = {
        "exponential": f"a={memory.sampler_a:g}",
        "window": f"{memory.sampler_lo:g} to {memory.sampler_hi:g}",
    }.get(memory.sampler, "")
    return f"{memory.sampler} ({details})" if details else memory.sampler
