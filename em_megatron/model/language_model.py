"""Builds the Megatron-Core language model of a run."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from em_megatron.config import ConfigError, MemoryConfig, RunConfig
from em_megatron.kinds import kind_of
from em_megatron.model.carried_memory import CarriedMemory
from em_megatron.model.elastic_attention import ElasticTransformerConfig
from em_megatron.model.layer_specs import elastic_stack_spec, melodi_stack_spec
from em_megatron.model.melodi_cache import MelodiCache
from em_megatron.model.melodi_layer import MelodiLayer
from em_megatron.model.memory_attention import MemoryAttention
from em_megatron.model.memory_cache import MemoryCache
from em_megatron.model.sizes import MAMBA_GROUPS, MAMBA_HEAD, MAMBA_STATE, layer_letters, shape_of
from em_megatron.parallel.handoff_cost import choose_handoff, state_bytes

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def transformer_config(config: RunConfig) -> ElasticTransformerConfig:
    """Megatron's view of the run; fusions that need CUDA or compiled modules are on only where they can be."""
    shape, parallel, training = shape_of(config.model), config.parallel, config.training
    on_gpu = torch.cuda.is_available()
    interleaved = model_chunks(config) if model_chunks(config) > 1 else None
    dtype = PRECISIONS[training.precision]
    parts = sub_layers(config)
    recomputation: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": parts},
    }
    return ElasticTransformerConfig(
        memory=config.memory,
        memory_handoff=handoff_kind(config),
        rotary_base=config.model.rotary_base,
        num_layers=parts * shape.num_layers,
        is_hybrid_model=True,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        ffn_hidden_size=shape.ffn_hidden_size,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=config.model.layernorm_epsilon,
        qk_layernorm=config.model.qk_layernorm,
        hidden_dropout=config.model.hidden_dropout,
        attention_dropout=0.0,
        init_method_std=config.model.init_method_std,
        perform_initialization=False,  # initialize_weights fills them the same for every layout
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=interleaved,
        batch_p2p_comm=interleaved is None,  # gloo mixes up the batched transfers of interleaved chunks
        overlap_p2p_comm=interleaved is not None and on_gpu,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=training.precision == "bf16",
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        deterministic_mode=not on_gpu and "G" in layer_letters(config.model),  # Gated DeltaNet in plain torch
        linear_key_head_dim=shape.kv_channels,
        linear_value_head_dim=shape.kv_channels,
        linear_num_key_heads=shape.num_attention_heads,
        linear_num_value_heads=shape.num_attention_heads,
        mamba_head_dim=MAMBA_HEAD,
        mamba_num_groups=MAMBA_GROUPS,
        mamba_state_dim=MAMBA_STATE,
        cuda_graph_impl="none",
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=on_gpu and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        **recomputation[training.recompute],
    )


def model_chunks(config: RunConfig) -> int:
    """Chunks of the model on every pipeline rank; 1 without interleaving."""
    return config.parallel.virtual_pipeline_model_parallel_size


def sub_layers(config: RunConfig) -> int:
    """What Megatron counts as layers in one Transformer layer: attention and MLP, or both at once."""
    return 1 if kind_of(config.memory).whole_layers else 2


def positions_per_sample(config: RunConfig) -> int:
    """Hidden states of a sample between layers: its tokens, and Melodi's summary tokens of every window."""
    tokens, memory = config.data.sequence_length, config.memory
    if memory.kind != "melodi":
        return tokens
    return tokens + tokens // memory.block_length * memory.short_term_tokens


def handoff_kind(config: RunConfig) -> str:
    """How states pass between context-parallel ranks."""
    if config.parallel.memory_handoff != "auto":
        return config.parallel.memory_handoff
    return choose_handoff(config.parallel.context_parallel_size, layer_state_bytes(config))


def layer_state_bytes(config: RunConfig) -> int:
    """Bytes of the states of one layer and micro-batch on a rank."""
    shape, parallel = shape_of(config.model), config.parallel
    heads = shape.num_query_groups // parallel.tensor_model_parallel_size
    return state_bytes(config.memory.order, config.training.micro_batch_size * heads * 2 * shape.kv_channels)


def hybrid_pattern(config: RunConfig) -> str:
    """Megatron's layer pattern: attention `*` (or M, G) and MLP `-` alternate, `|` between pipeline stages and their chunks;
    a kind with whole layers has `*` only."""
    stages = config.parallel.pipeline_model_parallel_size * model_chunks(config)
    letters, tail = layer_letters(config.model), "-"[: sub_layers(config) - 1]
    size = len(letters) // stages
    return "|".join("".join(x + tail for x in letters[at : at + size]) for at in range(0, len(letters), size))


def build_model(
    config: RunConfig,
    vocab_size: int,
    pg_collection: ProcessGroupCollection,
    pre_process: bool = True,
    post_process: bool = True,
    chunk: int = 0,
) -> torch.nn.Module:
    """One chunk of the model of this rank (all of it without interleaving), weights not yet initialized.

    Args:
        config: a validated run.
        vocab_size: padded vocabulary.
        pg_collection: Megatron's process groups.
        pre_process, post_process: whether this chunk holds the embedding, the output layer.
        chunk: which chunk of an interleaved pipeline.

    Returns:
        HybridModel in fp32, or wrapped to compute in bf16.
    """
    megatron_config, whole = transformer_config(config), kind_of(config.memory).whole_layers
    model = HybridModel(
        config=megatron_config,
        hybrid_stack_spec=melodi_stack_spec()
        if whole
        else elastic_stack_spec(megatron_config, layer_letters(config.model)),
        vocab_size=vocab_size,
        max_sequence_length=config.data.sequence_length,
        hybrid_layer_pattern=hybrid_pattern(config),
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=config.model.share_embeddings_and_output_weights,
        position_embedding_type="none",
        pg_collection=pg_collection,
        vp_stage=chunk if model_chunks(config) > 1 else None,
    )
    return Float16Module(megatron_config, model) if megatron_config.bf16 else model


def attach_carried_memory(model_chunks: list[torch.nn.Module]) -> CarriedMemory:
    """Gives the memory layers of this rank a place to keep states from step to step, empty at first."""
    attentions = [module for chunk in model_chunks for module in chunk.modules() if isinstance(module, MemoryAttention)]
    shapes: dict[int, tuple[int, ...]] = {
        attention.core_attention.layer: (
            attention.core_attention.memory.order,
            attention.num_query_groups_per_partition,
            2 * attention.hidden_size_per_attention_head,
        )
        for attention in attentions
        if attention.core_attention.has_memory
    }
    parameter = next(model_chunks[0].parameters())
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    carried = CarriedMemory(shapes, dtype, parameter.device)
    for attention in attentions:
        attention.core_attention.carried = carried
    return carried


def exchange_reader(model_chunks: list[torch.nn.Module], memory: MemoryConfig) -> None:
    """Gives every attention layer of the chunks another reader: order, slots, sampler, pairs, top_k. No weights change.

    `memory` is a section that fits the weights (`validate.check_same_weights`) and the block length.

    Raises:
        ConfigError: Melodi, whose sizes are those of its weights.
    """
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, MelodiLayer):
                raise ConfigError("a memory of kind melodi has no reader to exchange: its sizes belong to its weights")
            if isinstance(module, MemoryAttention):
                module.core_attention.use_reader(memory)


def memory_cache(model: torch.nn.Module, batch_size: int) -> MemoryCache | MelodiCache:
    """An empty cache for generation with `model`.

    Raises:
        ConfigError: layers that Megatron-Core cannot generate with.
    """
    if any(hasattr(module, "A_log") for module in model.modules()):
        raise ConfigError("text cannot be generated with layers M or G of model.layer_pattern: they are for training")
    whole = [module for module in model.modules() if isinstance(module, MelodiLayer)]
    if whole:
        return MelodiCache([layer.layer_number for layer in whole], whole[0].inner.memory.block_length)
    attentions = [module for module in model.modules() if isinstance(module, MemoryAttention)]
    parameter = next(model.parameters())
    return MemoryCache(attentions, batch_size, parameter.dtype, parameter.device)
