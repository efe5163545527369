"""Bytes that a rank sends in a step by axis; it receives as many. The rank that sends most is meant.

An all-reduce of X bytes over n ranks sends 2 (n − 1)/n X from each (ring), an all-gather or reduce-scatter half of that.
"""

from __future__ import annotations

from dataclasses import dataclass

from em_megatron.parallel.handoff_cost import received_bytes
from em_megatron.planning.buffers import static_bytes
from em_megatron.planning.job import Job


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by a rank in a step.

    tensor: sums of partial products. sequence: what sequence parallelism gathers a second time, in the backward pass.
    pipeline: hidden states and their gradients. context: memory states. data: gradients, and weights under the
    distributed optimizer (over data- and context-parallel ranks).
    """

    tensor: float
    sequence: float
    pipeline: float
    context: float
    data: float


def traffic(job: Job) -> Traffic:
    """Of a step with its recomputation."""
    tensor, sequence = tensor_bytes(job)
    return Traffic(
        tensor=job.micro_batches * tensor,
        sequence=job.micro_batches * sequence,
        pipeline=float(job.micro_batches * pipeline_bytes(job)),
        context=float(job.micro_batches * context_bytes(job)),
        data=sum(data_bytes(job)),
    )


def layers_of_a_rank(job: Job) -> int:
    return job.layers_per_chunk * job.chunks


def tensor_bytes(job: Job) -> tuple[float, float]:
    """Of a micro-batch: sums (an all-reduce, or a reduce-scatter and its all-gather), and gathers repeated for gradients.

    A layer sums twice forward and twice backward, and twice more where it is recomputed in full. Embedding and output
    layer add one each, as on a rank that has both.
    """
    if job.tensor == 1:
        return 0.0, 0.0
    half = (job.tensor - 1) / job.tensor * job.tokens * job.shape.hidden_size * job.itemsize
    layers, ends = layers_of_a_rank(job), 2 if job.pipeline == 1 else 1
    sums = layers * (6 if job.config.training.recompute == "full" else 4) + ends
    again = 2 * layers + 1 if job.sequence_split > 1 else 0
    return 2 * half * sums, half * again


def pipeline_bytes(job: Job) -> int:
    """Of a micro-batch: its hidden states forward and their gradients backward, for each model chunk."""
    if job.pipeline == 1:
        return 0
    return 2 * job.chunks * job.tokens // job.sequence_split * job.shape.hidden_size * job.itemsize


def context_bytes(job: Job) -> int:
    """Of a micro-batch: states of every memory layer forward and backward, forward twice where it is recomputed."""
    if job.context == 1 or not job.memory_layers:
        return 0
    once = received_bytes(job.handoff, job.context, job.layer_state)
    return once * handoffs_per_layer(job) * max(sum(job.memory_layers_of(stage)) for stage in range(job.pipeline))


def handoffs_per_layer(job: Job) -> int:
    """Times that a layer's states or their gradients travel for one micro-batch."""
    return 2 if job.config.training.recompute == "none" else 3


def data_bytes(job: Job) -> tuple[float, float]:
    """Of a step: gradients in fp32, and weights gathered by the distributed optimizer."""
    if job.replicas == 1:
        return 0.0, 0.0
    static, share = static_bytes(job, 0), (job.replicas - 1) / job.replicas
    gradients = static.gradients * share
    if not job.config.parallel.use_distributed_optimizer:
        return 2 * gradients, 0.0
    return gradients, static.weights * share
