"""Builds the Megatron-Core language model of a run."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from em_megatron.config import RunConfig
from em_megatron.model.elastic_attention import ElasticMemoryAttention, ElasticTransformerConfig
from em_megatron.model.layer_specs import elastic_stack_spec
from em_megatron.model.memory_cache import MemoryCache
from em_megatron.model.sizes import shape_of

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def transformer_config(config: RunConfig) -> ElasticTransformerConfig:
    """Megatron's view of the run; fusions that need CUDA or compiled modules are on only where they can be."""
    shape, parallel, training = shape_of(config.model), config.parallel, config.training
    on_gpu = torch.cuda.is_available()
    dtype = PRECISIONS[training.precision]
    recomputation: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    }
    return ElasticTransformerConfig(
        memory=config.memory,
        rotary_base=config.model.rotary_base,
        num_layers=2 * shape.num_layers,
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
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=training.precision == "bf16",
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        cuda_graph_impl="none",
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=on_gpu and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        **recomputation[training.recompute],
    )


def hybrid_pattern(config: RunConfig) -> str:
    """Megatron's layer pattern: attention `*` and MLP `-` alternate, `|` between pipeline stages."""
    stages = config.parallel.pipeline_model_parallel_size
    layers = shape_of(config.model).num_layers
    return "|".join(["*-" * (layers // stages)] * stages)


def build_model(
    config: RunConfig,
    vocab_size: int,
    pg_collection: ProcessGroupCollection,
    pre_process: bool = True,
    post_process: bool = True,
) -> torch.nn.Module:
    """The model of this rank, weights not yet initialized.

    Args:
        config: a validated run.
        vocab_size: padded vocabulary.
        pg_collection: Megatron's process groups.
        pre_process, post_process: whether this pipeline stage holds the embedding, the output layer.

    Returns:
        HybridModel in fp32, or wrapped to compute in bf16.
    """
    megatron_config = transformer_config(config)
    model = HybridModel(
        config=megatron_config,
        hybrid_stack_spec=elastic_stack_spec(megatron_config),
        vocab_size=vocab_size,
        max_sequence_length=config.data.sequence_length,
        hybrid_layer_pattern=hybrid_pattern(config),
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=config.model.share_embeddings_and_output_weights,
        position_embedding_type="none",
        pg_collection=pg_collection,
    )
    return Float16Module(megatron_config, model) if megatron_config.bf16 else model


def memory_cache(model: torch.nn.Module, batch_size: int) -> MemoryCache:
    """An empty cache for generation with `model`."""
    attentions = [module for module in model.modules() if isinstance(module, ElasticMemoryAttention)]
    parameter = next(model.parameters())
    return MemoryCache(attentions, batch_size, parameter.dtype, parameter.device)
