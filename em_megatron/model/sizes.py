"""Named sizes, and what a model of a given shape costs: parameters, FLOPs per token, memory floats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from em_megatron.kinds import kind_of

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


# Megatron-Core's Mamba-2: dimension of a head, groups of keys and queries, dimension of the state; tokens of a chunk.
MAMBA_HEAD, MAMBA_GROUPS, MAMBA_STATE, CHUNK = 64, 8, 128, 64

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


def num_parameters(model: ModelConfig, vocab_size: int, memory: MemoryConfig | None = None) -> int:
    """Parameters of the built model, embeddings included; `vocab_size` is the padded one.

    The elastic memory adds none; without `memory` only the Transformer's own are counted.
    """
    shape, letters = shape_of(model), layer_letters(model)
    embeddings = vocab_size * shape.hidden_size * (1 if model.share_embeddings_and_output_weights else 2)
    norms = 2 * shape.hidden_size * shape.num_layers + (
        2 * shape.kv_channels if model.qk_layernorm else 0
    ) * letters.count("*")
    layers = sum(
        _mixer_matrices(shape, letter) + _mixer_vectors(shape, letter) + _mlp_matrices(shape) for letter in letters
    )
    own = embeddings + layers + norms + shape.hidden_size
    return own if memory is None else own + memory_parameters(model, memory)


def memory_parameters(model: ModelConfig, memory: MemoryConfig) -> int:
    """Parameters that the memory kind adds to the Transformer's."""
    return kind_of(memory).parameters(memory, shape_of(model), _layers_with_memory(model, memory))


def layer_letters(model: ModelConfig) -> str:
    """What each layer mixes tokens by: `*` attention, M Mamba-2, G Gated DeltaNet."""
    layers, pattern = shape_of(model).num_layers, model.layer_pattern or "*"
    return (pattern * layers)[:layers]


def _mixer_matrices(shape: Shape, letter: str) -> int:
    """Weights that every token is multiplied with, MLP apart; of M and G as Megatron-Core's layers have them."""
    query = shape.num_attention_heads * shape.kv_channels
    if letter == "G":  # query, key, value, output gate of the same width, two gates per head, a convolution of 4 tokens
        return (
            shape.hidden_size * (4 * query + 2 * shape.num_attention_heads) + 4 * 3 * query + query * shape.hidden_size
        )
    if letter == "M":
        inner, heads, groups = (
            2 * shape.hidden_size,
            2 * shape.hidden_size // MAMBA_HEAD,
            2 * MAMBA_GROUPS * MAMBA_STATE,
        )
        return shape.hidden_size * (2 * inner + groups + heads) + 4 * (inner + groups) + inner * shape.hidden_size
    key_value = 2 * shape.num_query_groups * shape.kv_channels
    return shape.hidden_size * (query + key_value) + query * shape.hidden_size


def _mixer_vectors(shape: Shape, letter: str) -> int:
    """Other numbers of M and G: rates, steps, biases, inner norms."""
    if letter == "G":
        return 2 * shape.num_attention_heads + shape.kv_channels
    if letter == "M":
        inner = 2 * shape.hidden_size
        return 3 * (inner // MAMBA_HEAD) + (inner + 2 * MAMBA_GROUPS * MAMBA_STATE) + inner
    return 0


def _mixer_recurrence(shape: Shape, letter: str) -> int:
    """Multiply-adds of a token in the chunkwise recurrence: states read, written and (G) corrected, and its chunk."""
    if letter == "G":
        return shape.num_attention_heads * shape.kv_channels * (3 * shape.kv_channels + 2 * CHUNK)
    return 2 * shape.hidden_size * (2 * MAMBA_STATE + CHUNK) if letter == "M" else 0


def _mlp_matrices(shape: Shape) -> int:
    return 3 * shape.hidden_size * shape.ffn_hidden_size


def _layers_with_memory(model: ModelConfig, memory: MemoryConfig) -> int:
    """How many attention layers have a memory."""
    letters = layer_letters(model)
    return sum(letters[layer] == "*" for layer in memory_layers(memory, len(letters)))


def memory_layers(memory: MemoryConfig, num_layers: int) -> tuple[int, ...]:
    """Layers (from 0) that have a memory: parses `auto`, `all`, `none`, or `0,4-7`.

    Raises:
        ConfigError: not such a list, or a layer the model does not have.
    """
    from em_megatron.config import ConfigError

    kind = kind_of(memory)
    if not kind.has_memory or memory.layers == "none":
        return ()
    if memory.layers == "auto":
        return kind.default_layers(num_layers)
    if memory.layers == "all":
        return tuple(range(num_layers))
    chosen: set[int] = set()
    for part in str(memory.layers).split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise ConfigError(f"memory.layers '{memory.layers}' is not 'auto', 'all', 'none' or a list such as 0,4-7")
        chosen.update(range(int(first), int(last or first) + 1))
    if not chosen or max(chosen) >= num_layers:
        raise ConfigError(f"memory.layers '{memory.layers}' does not fit a model with layers 0 to {num_layers - 1}")
    return tuple(sorted(chosen))


def memory_floats_per_sequence(model: ModelConfig, memory: MemoryConfig, sequence_length: int) -> int:
    """Numbers kept per sequence over all layers; of some kinds (`Kind.grows`) it grows with the sequence."""
    layers = _layers_with_memory(model, memory)
    return kind_of(memory).memory_floats(memory, shape_of(model), layers, sequence_length)


def weight_identity(model: ModelConfig, memory: MemoryConfig) -> tuple[object, ...]:
    """What decides the parameters that the memory kind adds; weights of one recipe fit another where it is equal."""
    return kind_of(memory).weight_identity(memory, memory_layers(memory, shape_of(model).num_layers))


@dataclass(frozen=True)
class Costs:
    """What a model with its memory costs: numbers kept per sequence of the length, parameters, those of them that the
    memory kind adds, forward and backward FLOPs per token."""

    memory_floats_per_sequence: int
    parameters: int
    memory_parameters: int
    flops_per_token: float


def costs(model: ModelConfig, memory: MemoryConfig, vocab_size: int, sequence_length: int) -> Costs:
    """Of a sample on one context-parallel rank; `vocab_size` is the padded one."""
    return Costs(
        memory_floats_per_sequence(model, memory, sequence_length),
        num_parameters(model, vocab_size, memory),
        memory_parameters(model, memory),
        flops_per_token(model, memory, vocab_size, sequence_length),
    )


def flops_per_token(
    model: ModelConfig, memory: MemoryConfig, vocab_size: int, sequence_length: int, context_parallel_size: int = 1
) -> float:
    """Forward and backward FLOPs per token of training, two per multiply-add, recomputation not counted.

    The Transformer's matrices; and what the memory kind counts: the triangle of the own block (L/2 keys on average), what
    is read of the memory, and writing it. A sample counts as one document.
    """
    shape, letters = shape_of(model), layer_letters(model)
    layers = _layers_with_memory(model, memory)
    mixers = sum(_mixer_matrices(shape, letter) + _mixer_recurrence(shape, letter) for letter in letters)
    matrices = mixers + shape.num_layers * _mlp_matrices(shape) + vocab_size * shape.hidden_size
    attention = replace(shape, num_layers=letters.count("*"))
    kind = kind_of(memory)
    return 6.0 * matrices + kind.attention_flops(memory, attention, layers, sequence_length, context_parallel_size)
