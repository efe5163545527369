"""Melodi (arXiv 2410.03156): summary tokens through all layers, short-term tokens in each, long-term tokens in one.

Legend: W tokens of a window (the block length), U summary and S short-term tokens (U = S), G long-term tokens of which
L_inc are new per window, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from em_megatron.kinds.base import Kind, mean_history, per_key

if TYPE_CHECKING:
    from em_megatron.config import MemoryConfig, RunConfig
    from em_megatron.model.sizes import Shape


class Melodi(Kind):
    name = "melodi"
    whole_layers = True
    detaches = False

    def default_layers(self, num_layers: int) -> tuple[int, ...]:
        """The long-term layer: the middle one."""
        return (num_layers // 2,)

    def memory_floats(self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int) -> int:
        """S·D in every layer, 2·G·d·h in a long-term layer (keys and values)."""
        short = shape.num_layers * memory.short_term_tokens * shape.hidden_size
        return short + layers * 2 * memory.long_term_tokens * shape.kv_channels * shape.num_query_groups

    def parameters(self, memory: MemoryConfig, shape: Shape, layers: int) -> int:
        """Summary tokens; per layer a norm and two token mixers with biases (the last layer: one); per long-term layer a
        third mixer and a gate per head and channel."""
        tokens, width = memory.short_term_tokens, memory.block_length + memory.short_term_tokens
        mixer = tokens * (width + 1)
        long = memory.long_term_increment * (width + 1) + shape.num_attention_heads * shape.kv_channels
        mixers = (2 * shape.num_layers - 1) * mixer + shape.num_layers * shape.hidden_size
        return tokens * shape.hidden_size + mixers + layers * long

    def attention_flops(
        self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int, context_parallel_size: int
    ) -> float:
        """Everything per window, over its W tokens: the matrices' work on summary and memory tokens included."""
        tokens, window, hidden = memory.short_term_tokens, memory.block_length, shape.hidden_size
        width, query = window + tokens, shape.num_attention_heads * shape.kv_channels
        key_value = 2 * shape.num_query_groups * shape.kv_channels
        matrices = hidden * (2 * query + key_value + 3 * shape.ffn_hidden_size)
        per_layer = float(tokens * matrices)  # summary tokens
        per_layer += tokens * hidden * key_value  # keys and values of short-term tokens
        per_layer += per_key(shape) * width * (tokens + width / 2)
        per_layer += 2 * tokens * width * hidden  # mixers
        windows = sequence_length // window
        long_tokens = mean_history(1, windows, None) * memory.long_term_increment if windows > 1 else 0.0
        per_long = per_key(shape) * width * min(long_tokens, memory.long_term_tokens)
        per_long += memory.long_term_increment * hidden * (width + key_value)
        unused = tokens * width * hidden  # the last layer makes no summary tokens
        return 6.0 * (shape.num_layers * per_layer - unused + layers * per_long) / window

    def describe(self, memory: MemoryConfig) -> str:
        return (
            f"{memory.short_term_tokens} short-term tokens, {memory.long_term_tokens} long-term tokens, "
            f"{memory.long_term_increment} new per window"
        )

    def weight_identity(self, memory: MemoryConfig, layers: tuple[int, ...]) -> tuple[object, ...]:
        sizes = (memory.block_length, memory.short_term_tokens, memory.long_term_increment)
        return ("melodi", *sizes, layers)

    def check(self, config: RunConfig) -> None:
        from em_megatron.config import ConfigError

        super().check(config)
        memory, parallel = config.memory, config.parallel
        if memory.long_term_tokens % memory.long_term_increment:
            raise ConfigError(
                f"memory.long_term_tokens {memory.long_term_tokens} is not a multiple of memory.long_term_increment "
                f"{memory.long_term_increment}: every window adds so many"
            )
        if parallel.context_parallel_size > 1:
            raise ConfigError(
                "memory.kind 'melodi' works through the windows of a sample one after another, so that "
                "context_parallel_size > 1 would leave all ranks but one waiting: set it to 1 and use tensor, pipeline "
                "or data parallelism"
            )
        windows = config.data.sequence_length // memory.block_length
        if windows < 2:
            raise ConfigError(
                f"memory.kind 'melodi' needs two windows a sample at least, not {windows}: lower memory.block_length or "
                "raise data.sequence_length"
            )
        tokens = config.data.sequence_length + windows * memory.short_term_tokens
        if parallel.sequence_parallel and tokens % parallel.tensor_model_parallel_size:
            raise ConfigError(
                f"a sample and its summary tokens are {tokens} positions, not a multiple of tensor_model_parallel_size "
                f"{parallel.tensor_model_parallel_size}: change memory.short_term_tokens or sequence_parallel"
            )
