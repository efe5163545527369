"""Named sizes, and what a model of a given shape costs: parameters, FLOPs per token, memory floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from em_megatron.config import MemoryConfig, ModelConfig


@dataclass(frozen=True)
class Shape:
    """A Transformer's shape, in Megatron's terms."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int


SIZES = {
    "tiny": Shape(4, 256, 4, 2, 64, 768),
    "125m": Shape(12, 768, 12, 12, 64, 2048),
    "400m": Shape(24, 1024, 16, 16, 64, 2816),
    "1b": Shape(20, 2048, 16, 8, 128, 5632),
    "3b": Shape(28, 3072, 24, 8, 128, 8192),
    "7b": Shape(32, 4096, 32, 8, 128, 14336),
}


def apply_size(model: ModelConfig) -> None:
    """Fills the fields that the recipe leaves open from the named size.

    Raises:
        ConfigError: unknown name, or a field that neither the recipe nor a size gives.
    """
    from em_megatron.config import ConfigError

    if model.size is not None:
        if model.size not in SIZES:
            raise ConfigError(f"model.size '{model.size}' is unknown: choose one of {', '.join(SIZES)}")
        for name, value in vars(SIZES[model.size]).items():
            if getattr(model, name) is None:
                setattr(model, name, value)
    missing = [name for name in Shape.__dataclass_fields__ if getattr(model, name) is None]
    if missing:
        raise ConfigError(f"model.{missing[0]} is not set: give it, or a model.size")


def shape_of(model: ModelConfig) -> Shape:
    """The resolved shape of a model section (after `apply_size`)."""
    return Shape(**{name: getattr(model, name) for name in Shape.__dataclass_fields__})


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """The vocabulary rounded up, the same for every layout so that losses are."""
    return -(-vocab_size // divisible_by) * divisible_by


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the built model, embeddings included; `vocab_size` is the padded one. The memory adds none."""
    shape = shape_of(model)
    embeddings = vocab_size * shape.hidden_size * (1 if model.share_embeddings_and_output_weights else 2)
    norms = 2 * shape.hidden_size + (2 * shape.kv_channels if model.qk_layernorm else 0)
    return embeddings + shape.num_layers * (_layer_matrices(shape) + norms) + shape.hidden_size


def _layer_matrices(shape: Shape) -> int:
    query = shape.num_attention_heads * shape.kv_channels
    key_value = 2 * shape.num_query_groups * shape.kv_channels
    attention = shape.hidden_size * (query + key_value) + query * shape.hidden_size
    return attention + 3 * shape.hidden_size * shape.ffn_hidden_size


def memory_layers(memory: MemoryConfig, num_layers: int) -> tuple[int, ...]:
    """Layers (from 0) that have a memory: parses `all`, `none`, or `0,4-7`.

    Raises:
        ConfigError: not such a list, or a layer the model does not have.
    """
    from em_megatron.config import ConfigError

    if memory.kind == "block_local" or memory.layers == "none":
        return ()
    if memory.layers == "all":
        return tuple(range(num_layers))
    chosen: set[int] = set()
    for part in str(memory.layers).split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise ConfigError(f"memory.layers '{memory.layers}' is not 'all', 'none' or a list such as 0,4-7")
        chosen.update(range(int(first), int(last or first) + 1))
    if not chosen or max(chosen) >= num_layers:
        raise ConfigError(f"memory.layers '{memory.layers}' does not fit a model with layers 0 to {num_layers - 1}")
    return tuple(sorted(chosen))


def memory_floats_per_sequence(model: ModelConfig, memory: MemoryConfig) -> int:
    """Numbers kept per sequence over all layers: 2·N·d·h per memory layer, whatever the length of the context."""
    shape = shape_of(model)
    layers = len(memory_layers(memory, shape.num_layers))
    return layers * 2 * memory.order * shape.kv_channels * shape.num_query_groups


def flops_per_token(
    model: ModelConfig, memory: MemoryConfig, vocab_size: int, sequence_length: int, context_parallel_size: int = 1
) -> float:
    """Forward and backward FLOPs per token of training, two per multiply-add, recomputation not counted.

    Matrices, the triangle of the own block (L/2 keys on average), the slots, and the memory operator as planned for the
    part of a sample that a context-parallel rank holds.
    """
    from em_megatron.hippo.cost_model import memory_cost, plan

    shape = shape_of(model)
    tokens = sequence_length // context_parallel_size
    split = context_parallel_size > 1 or memory.carry_memory
    blocks = tokens // memory.block_length
    layers = len(memory_layers(memory, shape.num_layers))
    matrices = shape.num_layers * _layer_matrices(shape) + vocab_size * shape.hidden_size
    per_key = 2 * shape.num_attention_heads * shape.kv_channels
    attention = per_key * (shape.num_layers * memory.block_length / 2 + layers * memory.slots)
    read_write = 0.0
    if layers:
        sizes = (memory.order, memory.slots, memory.block_length)
        superchunk = memory.superchunk or plan(blocks, *sizes, part_of_sample=split)
        channels = 2 * shape.num_query_groups * shape.kv_channels
        read_write = layers * channels * memory_cost(blocks, superchunk, *sizes, part_of_sample=split) / tokens
    return 6.0 * (matrices + attention) + 4.0 * read_write  # the memory's matrices have no gradient
