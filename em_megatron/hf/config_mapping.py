"""A run's recipe and a Hugging Face configuration: one table of fields, read in both directions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from em_megatron.config import MemoryConfig, ModelConfig, RunConfig
from em_megatron.model.sizes import memory_layers, padded_vocab_size, shape_of

if TYPE_CHECKING:
    from em_megatron.data.vocabulary import Vocabulary
    from em_megatron.hf.configuration_elastic_memory import ElasticMemoryConfig

MODEL = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
    "qk_layernorm": "qk_norm",
    "rotary_base": "rope_theta",
    "layernorm_epsilon": "rms_norm_eps",
    "init_method_std": "initializer_range",
}
MEMORY = {
    "block_length": "block_length",
    "order": "memory_order",
    "slots": "memory_slots",
    "sampler": "memory_sampler",
    "sampler_a": "memory_sampler_a",
    "sampler_lo": "memory_sampler_lo",
    "sampler_hi": "memory_sampler_hi",
    "sampler_points": "memory_points",
    "discretization": "memory_discretization",
    "pairs": "memory_pairs",
    "top_k": "memory_top_k",
    "update": "memory_update",
    "short_term_tokens": "memory_short_term_tokens",
    "long_term_tokens": "memory_long_term_tokens",
    "long_term_increment": "memory_long_term_increment",
}
NOT_IN_HUGGING_FACE = (
    "size",
    "hidden_dropout",
    "layer_pattern",  # refused by the export
    "make_vocab_size_divisible_by",
    "kind",  # block_local is elastic without layers
    "layers",  # written as a list
    "detach_memory",
    "carry_memory",
    "superchunk",
    "kernels",
    "bank_dtype",
    "bank_cache",
)


def hugging_face_config(config: RunConfig, vocabulary: Vocabulary) -> ElasticMemoryConfig:
    """What a run's model is to `transformers`; rows of the embedding without a token stay."""
    from em_megatron.hf.configuration_elastic_memory import ElasticMemoryConfig

    return ElasticMemoryConfig(
        vocab_size=padded_vocab_size(vocabulary.size, config.model.make_vocab_size_divisible_by),
        training_length=config.data.sequence_length,
        bos_token_id=vocabulary.bos_id,
        eos_token_id=vocabulary.eos_id,
        pad_token_id=vocabulary.pad_id,
        **shared_fields(config),
    )


def shared_fields(config: RunConfig) -> dict[str, Any]:
    """What the recipe says of model and memory, in the names of `transformers`."""
    fields: dict[str, Any] = {theirs: getattr(config.model, ours) for ours, theirs in MODEL.items()}
    fields |= {theirs: getattr(config.memory, ours) for ours, theirs in MEMORY.items()}
    fields["memory_kind"] = "elastic" if config.memory.kind == "block_local" else config.memory.kind
    fields["memory_layers"] = memory_layers(config.memory, shape_of(config.model).num_layers)
    return fields


def take_model(model: ModelConfig, fields: dict[str, Any]) -> None:
    """Fills the section with what a Hugging Face configuration of our own says of the model."""
    model.size = None
    for ours, theirs in MODEL.items():
        setattr(model, ours, type(getattr(ModelConfig(), ours) or 0)(fields[theirs]))


def take_memory(memory: MemoryConfig, fields: dict[str, Any]) -> None:
    """Fills the section with what a Hugging Face configuration of our own says of the memory."""
    for ours, theirs in MEMORY.items():
        setattr(memory, ours, fields[theirs])
    layers, everywhere = list(fields["memory_layers"]), list(range(fields["num_hidden_layers"]))
    kind = fields["memory_kind"]
    memory.kind = "block_local" if kind == "elastic" and not layers else kind
    if memory.kind == "block_local" or layers == everywhere:
        memory.layers = "all"
    else:
        memory.layers = ",".join(map(str, layers)) or "none"
