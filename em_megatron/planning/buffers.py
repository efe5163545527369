"""Weights, gradients and optimizer state of a rank, as Megatron-Core's DistributedDataParallel and optimizers lay them out.

Gradients lie in one fp32 buffer per model chunk. With the distributed optimizer the weights lie in such a buffer too; each
parameter begins at a multiple of 64 elements, and each bucket ends at a multiple of the ranks that share it and of 128,
so that every rank owns an equal part of every bucket (megatron.core.optimizer.param_layout).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from em_megatron.planning.job import Job

GRADIENT_BYTES = 4  # wrap_for_training reduces gradients in fp32
MOMENT_BYTES = 8  # AdamW's two moments in fp32
MASTER_BYTES = 4  # of a bf16 weight


@dataclass(frozen=True)
class StaticBytes:
    """Bytes of a rank that stay from step to step."""

    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class Parameter:
    """elements on this rank; alone: whether it has a bucket of its own, as a tied embedding on several stages does."""

    elements: int
    alone: bool = False


def static_bytes(job: Job, stage: int, bucketed: bool = True) -> StaticBytes:
    """What a rank of pipeline stage `stage` holds.

    Args:
        job: the run.
        stage: pipeline rank.
        bucketed: whether gradients are reduced in buckets during the backward pass, as on GPUs.
    """
    distributed = job.config.parallel.use_distributed_optimizer
    elements = owned = weights = 0
    for chunk in range(job.chunks):
        parameters = chunk_parameters(job, stage, chunk)
        if not distributed:
            size = sum(parameter.elements for parameter in parameters)
            weights, elements, owned = weights + size, elements + size, owned + size
            continue
        size, share = _padded_buffer(parameters, job.replicas, bucketed and stage == 0 and chunk == 0)
        weights, elements, owned = weights + size, elements + size, owned + share
    state = MOMENT_BYTES + (MASTER_BYTES if job.itemsize == 2 else 0)
    return StaticBytes(weights * job.itemsize, elements * GRADIENT_BYTES, owned * state)


def chunk_parameters(job: Job, stage: int, chunk: int) -> tuple[Parameter, ...]:
    """Parameters of a model chunk on a tensor-parallel rank, in the order in which the model registers them."""
    shape, model = job.shape, job.config.model
    hidden, tied = shape.hidden_size, model.share_embeddings_and_output_weights
    first = stage == 0 and chunk == 0
    last = stage == job.pipeline - 1 and chunk == job.chunks - 1
    vocabulary = Parameter(job.vocab // job.tensor * hidden, alone=tied and not (first and last))
    query, key = job.heads * shape.kv_channels, job.kv_heads * shape.kv_channels
    ffn = shape.ffn_hidden_size // job.tensor
    layer = [hidden, query * hidden, (query + 2 * key) * hidden]  # norm, linear_proj, linear_qkv
    layer += [shape.kv_channels] * 2 if model.qk_layernorm else []
    layer += [hidden, 2 * ffn * hidden, ffn * hidden]  # norm, linear_fc1, linear_fc2
    return (
        *([vocabulary] if first else []),
        *(Parameter(elements) for _ in range(job.layers_per_chunk) for elements in layer),
        *([Parameter(hidden)] if last else []),
        *([vocabulary] if last and not (tied and first) else []),
    )


@lru_cache(maxsize=4096)
def _padded_buffer(parameters: tuple[Parameter, ...], ranks: int, bucketed: bool) -> tuple[int, int]:
    """Elements of a buffer of the distributed optimizer, and how many of them, padding apart, the first rank owns."""
    limit = max(40_000_000, 1_000_000 * ranks) if bucketed else math.inf  # Megatron's default bucket
    divisor = math.lcm(ranks, 128)
    end = bucket_start = owned = 0
    spans: list[tuple[int, int]] = []

    def close() -> None:
        nonlocal end, bucket_start, owned, spans
        end = -(-end // divisor) * divisor
        share_end = bucket_start + (end - bucket_start) // ranks
        owned += sum(max(0, min(stop, share_end) - start) for start, stop in spans)
        bucket_start, spans = end, []

    for parameter in reversed(parameters):  # the order of the backward pass
        end = -(-end // 64) * 64
        if parameter.alone and spans:
            close()
        spans.append((end, end + parameter.elements))
        end += parameter.elements
        if parameter.alone or end - bucket_start >= limit:
            close()
    if spans:
        close()
    return end, owned
