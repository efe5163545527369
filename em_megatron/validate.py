"""Every check of a run that needs no device: what cannot work is refused here, in one sentence, before anything is built."""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path

import torch

from em_megatron.config import ConfigError, MemoryConfig, RunConfig
from em_megatron.hippo.cost_model import plan
from em_megatron.hippo.recurrences import DISCRETIZATIONS
from em_megatron.hippo.samplers import sampler_points
from em_megatron.kinds import KINDS, kind_of
from em_megatron.model.sizes import memory_layers, shape_of, weight_identity
from em_megatron.ops.dispatch import REQUESTS, choose
from em_megatron.parallel.handoff_cost import HANDOFFS
from em_megatron.parallel.process_groups import validate_layout
from em_megatron.training.profiling import check_profiling

CHOICES = {
    "memory.kind": tuple(KINDS),
    "memory.update": ("linear", "delta"),
    "memory.discretization": DISCRETIZATIONS,
    "memory.kernels": REQUESTS,
    "memory.bank_dtype": ("compute", "fp32"),
    "training.precision": ("bf16", "fp32"),
    "training.recompute": ("none", "selective", "full"),
    "parallel.memory_handoff": ("auto", *HANDOFFS),
    "optimizer.schedule": ("cosine", "wsd", "constant"),
    "profiling.tool": ("torch", "nsys"),
    "logging.wandb": ("auto", "online", "offline", "disabled"),
}
AT_LEAST_ONE = [
    "model.num_layers",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.kv_channels",
    "model.ffn_hidden_size",
    "model.make_vocab_size_divisible_by",
    "memory.block_length",
    "memory.order",
    "memory.slots",
    "memory.pairs",
    "memory.short_term_tokens",
    "memory.long_term_tokens",
    "memory.long_term_increment",
    "data.sequence_length",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "training.train_steps",
    "training.global_batch_size",
    "training.micro_batch_size",
    "checkpoint.save_interval",
    "checkpoint.keep_last",
    "checkpoint.retry_interval",
    "data.shuffle_shards",
    "data.attempts",
    "faults.skip_window",
    "faults.spike_window",
    "profiling.steps",
    "logging.interval",
]


AT_LEAST_ZERO = [
    "seed",
    "memory.superchunk",
    "memory.top_k",
    "data.prefetch",
    "data.workers",
    "data.cache_gigabytes",
    "checkpoint.keep_every",
    "faults.skip_limit",
    "faults.spike_factor",
    "faults.hang_minutes",
    "profiling.first_step",
    "logging.communication_interval",
    "training.stop_after_steps",
    "optimizer.wsd_decay_steps",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "validation.interval",
    "validation.samples",
]


def validate(config: RunConfig, world_size: int) -> None:
    """Checks the whole tree against a world of `world_size` ranks.

    Raises:
        ConfigError: the first thing that cannot work.
    """
    _check_values(config)
    _check_shape(config)
    points_of(config.memory)
    memory_layers(config.memory, shape_of(config.model).num_layers)
    _check_layout(config, world_size)
    kind_of(config.memory).check(config)
    _check_pattern(config)
    _check_kernels(config)
    _check_schedule(config)
    check_profiling(config, world_size, torch.cuda.is_available())


def points_of(memory: MemoryConfig) -> torch.Tensor:
    """The sampler's moments, [S] fp64 in (0, 1).

    Raises:
        ConfigError: a sampler that cannot be.
    """
    try:
        return sampler_points(
            memory.sampler,
            memory.slots,
            a=memory.sampler_a,
            lo=memory.sampler_lo,
            hi=memory.sampler_hi,
            points=memory.sampler_points,
        )
    except ValueError as error:
        raise ConfigError(f"memory.sampler: {error}") from None


def check_same_weights(saved: RunConfig, now: RunConfig, checkpoint: Path) -> None:
    """Refuses a memory section whose own parameters are not those of the checkpoint.

    Raises:
        ConfigError: another kind with parameters, or another number of them.
    """
    if weight_identity(saved.model, saved.memory) != weight_identity(now.model, now.memory):
        raise ConfigError(
            f"{checkpoint} holds the weights of memory.kind '{saved.memory.kind}', and '{now.memory.kind}' as it is set "
            "here has others: kinds with weights of their own (infini, memorizing, melodi) keep kind, layers and sizes of "
            "those weights; between the kinds without, memory.* may change"
        )


def _value(config: RunConfig, key: str) -> object:
    return attrgetter(key)(config)


def _check_values(config: RunConfig) -> None:
    for key, allowed in CHOICES.items():
        if _value(config, key) not in allowed:
            raise ConfigError(f"{key} '{_value(config, key)}' is unknown: choose one of {', '.join(allowed)}")
    for key in AT_LEAST_ONE:
        value = _value(config, key)
        assert isinstance(value, int)
        if value < 1:
            raise ConfigError(f"{key} is {value}: it must be at least 1")
    for key in AT_LEAST_ZERO:
        value = _value(config, key)
        assert isinstance(value, int | float)
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{key} is {value}: it must be at least 0")
    for key in ("model.hidden_dropout", "optimizer.beta1", "optimizer.beta2"):
        value = _value(config, key)
        assert isinstance(value, float)
        if not 0 <= value < 1:
            raise ConfigError(f"{key} is {value}: it must be at least 0 and below 1")
    for key in (
        "data.timeout_seconds",
        "model.rotary_base",
        "model.layernorm_epsilon",
        "model.init_method_std",
        "optimizer.epsilon",
    ):
        value = _value(config, key)
        assert isinstance(value, float)
        if not 0 < value < float("inf"):
            raise ConfigError(f"{key} is {value}: it must be above 0")
    if not re.fullmatch(r"\w[\w.-]*", config.name):
        raise ConfigError(f"name '{config.name}' cannot name a folder: use letters, digits, dot, dash, underscore")


def _check_shape(config: RunConfig) -> None:
    shape, memory, data = shape_of(config.model), config.memory, config.data
    if shape.num_attention_heads % shape.num_query_groups:
        raise ConfigError(
            f"model.num_attention_heads {shape.num_attention_heads} is not a multiple of "
            f"model.num_query_groups {shape.num_query_groups}: each key/value head serves equally many query heads"
        )
    if shape.kv_channels % 2:
        raise ConfigError(f"model.kv_channels {shape.kv_channels} is odd: rotary embedding needs an even number")
    if data.sequence_length % memory.block_length:
        raise ConfigError(
            f"data.sequence_length {data.sequence_length} is not a multiple of memory.block_length "
            f"{memory.block_length}: choose a whole number of blocks"
        )
    ranks = config.parallel.context_parallel_size
    if data.sequence_length % (memory.block_length * ranks):
        raise ConfigError(
            f"data.sequence_length {data.sequence_length} is not a multiple of memory.block_length "
            f"{memory.block_length} × context_parallel_size {ranks}: every context-parallel rank holds equally many "
            "whole blocks"
        )
    blocks = data.sequence_length // memory.block_length // ranks
    if memory.superchunk > blocks:
        raise ConfigError(
            f"memory.superchunk {memory.superchunk} is more than the {blocks} blocks of a sample on a rank: 0 chooses"
        )
    elastic_layers = memory_layers(memory, shape.num_layers) if memory.kind == "elastic" else ()
    if memory.carry_memory and not elastic_layers:
        raise ConfigError(
            "memory.carry_memory needs layers with an elastic memory: set memory.kind=elastic and memory.layers, or "
            "switch it off (the other kinds begin every sample with an empty memory)"
        )
    if elastic_layers and not memory.superchunk:
        try:
            split = ranks > 1 or memory.carry_memory
            plan(blocks, memory.order, memory.slots, memory.block_length, part_of_sample=split)
        except ValueError as error:
            raise ConfigError(f"memory: {error}") from None


def _check_pattern(config: RunConfig) -> None:
    pattern, parallel = config.model.layer_pattern, config.parallel
    if pattern is None:
        return
    if not pattern or set(pattern) - set("*MG"):
        raise ConfigError(f"model.layer_pattern '{pattern}' is not made of the letters *, M and G")
    if shape_of(config.model).num_layers % len(pattern):
        raise ConfigError(
            f"model.layer_pattern '{pattern}' does not fill {shape_of(config.model).num_layers} layers: give a length that "
            "divides them"
        )
    if not set(pattern) & {"M", "G"}:
        return
    if kind_of(config.memory).whole_layers or config.memory.carry_memory:
        raise ConfigError(
            "layers M and G of model.layer_pattern stand beside attention of the other memory kinds, with an empty memory "
            "at every sample: choose another memory.kind than melodi, and switch memory.carry_memory off"
        )
    if parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1:
        raise ConfigError(
            "layers M and G of model.layer_pattern go through whole documents on one rank: use pipeline and data "
            "parallelism, and set tensor_model_parallel_size and context_parallel_size to 1"
        )
    from em_megatron.model.linear_attention import missing_package

    for letter in sorted(set(pattern) & {"M", "G"}):
        if package := missing_package(letter):
            raise ConfigError(
                f"layers {letter} of model.layer_pattern need the package {package}, which is not installed: "
                f"`pip install {package}`"
            )
    if "M" in pattern and not torch.cuda.is_available():
        raise ConfigError("layers M of model.layer_pattern have kernels for GPUs only, and there is none")


def _check_kernels(config: RunConfig) -> None:
    kernels, device = config.memory.kernels, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    if kernels == "naive" and (config.parallel.context_parallel_size > 1 or config.memory.carry_memory):
        raise ConfigError(
            "memory.kernels 'naive' gives no states to hand on: choose auto, or leave context_parallel_size at 1 and "
            "carry_memory off"
        )
    try:
        choose(kernels, device, dtype, shape_of(config.model).kv_channels)
    except ValueError as error:
        raise ConfigError(f"memory.kernels: {error}") from None


def _check_layout(config: RunConfig, world_size: int) -> None:
    shape, parallel, training = shape_of(config.model), config.parallel, config.training
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks, context = parallel.virtual_pipeline_model_parallel_size, parallel.context_parallel_size
    try:
        validate_layout(world_size, tensor, pipeline, None if chunks == 1 else chunks, context)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(shape, name) % tensor:
            raise ConfigError(
                f"model.{name} {getattr(shape, name)} is not divisible by tensor_model_parallel_size {tensor}: "
                "every tensor rank holds an equal share"
            )
    if config.model.make_vocab_size_divisible_by % tensor:
        raise ConfigError(
            f"model.make_vocab_size_divisible_by {config.model.make_vocab_size_divisible_by} is not divisible by "
            f"tensor_model_parallel_size {tensor}: choose a multiple"
        )
    if shape.num_layers % (pipeline * chunks):
        interleaved = f" × virtual_pipeline_model_parallel_size {chunks}" if chunks > 1 else ""
        raise ConfigError(
            f"model.num_layers {shape.num_layers} is not divisible by pipeline_model_parallel_size {pipeline}"
            f"{interleaved}: every stage holds equally many layers"
        )
    if parallel.sequence_parallel and (tensor == 1 or config.data.sequence_length // context % tensor):
        raise ConfigError(
            f"parallel.sequence_parallel needs tensor_model_parallel_size > 1 (it is {tensor}) that divides the "
            f"{config.data.sequence_length // context} tokens of a sample on a rank: switch it off or change the layout"
        )
    data_parallel = world_size // (tensor * pipeline * context)
    if training.global_batch_size % (training.micro_batch_size * data_parallel):
        raise ConfigError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} × data-parallel size {data_parallel}: change one of them"
        )
    micro_batches = training.global_batch_size // (training.micro_batch_size * data_parallel)
    if chunks > 1 and micro_batches % pipeline:
        raise ConfigError(
            f"virtual_pipeline_model_parallel_size {chunks} needs micro-batches per step ({micro_batches}) that are a "
            f"multiple of pipeline_model_parallel_size {pipeline}: change global_batch_size or micro_batch_size"
        )


def _check_schedule(config: RunConfig) -> None:
    optimizer, steps = config.optimizer, config.training.train_steps
    if not optimizer.lr > 0 or not 0 <= optimizer.min_lr <= optimizer.lr:
        raise ConfigError(
            f"optimizer.lr {optimizer.lr} and min_lr {optimizer.min_lr}: need 0 <= min_lr <= lr and lr > 0"
        )
    if not 0 <= optimizer.warmup_steps < steps:
        raise ConfigError(
            f"optimizer.warmup_steps {optimizer.warmup_steps} does not fit training.train_steps {steps}: "
            "warm up for fewer steps than the run has"
        )
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + decay_steps(config) > steps:
        raise ConfigError(
            f"optimizer: warm-up {optimizer.warmup_steps} and wsd_decay_steps {decay_steps(config)} are longer than "
            f"training.train_steps {steps}: shorten one"
        )


def decay_steps(config: RunConfig) -> int:
    """Steps of the final decay of a wsd schedule."""
    return config.optimizer.wsd_decay_steps or max(1, config.training.train_steps // 10)
