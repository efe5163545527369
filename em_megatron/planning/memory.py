"""Memory of a GPU by part: the rank of the pipeline stage that needs most."""

from __future__ import annotations

from dataclasses import dataclass, fields

from em_megatron.planning.activations import INPUT_BYTES, Activations, layer_peak, loss_peak
from em_megatron.planning.buffers import static_bytes
from em_megatron.planning.job import Job
from em_megatron.planning.memory_state import bank_bytes, carried_bytes, handoff_bytes, working_state_bytes

RESERVE = 0.08  # of a GPU, for the CUDA context, NCCL's own buffers, cuBLAS workspaces and fragmentation


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on one rank at the largest moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    memory: int
    communication: int

    @property
    def total(self) -> int:
        return sum(self.named().values())

    def named(self) -> dict[str, int]:
        """Part → bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def largest(self) -> str:
        """The name of the largest part."""
        parts = self.named()
        return max(parts, key=lambda name: parts[name])


def peak_memory(job: Job, bucketed: bool = True) -> MemoryParts:
    """The parts of the stage with the largest sum. `bucketed`: see `buffers.static_bytes`."""
    # The first stage holds most micro-batches, the last the loss; another one can only have more memory layers.
    stages = {0, job.pipeline - 1, max(range(job.pipeline), key=lambda stage: max(job.memory_layers_of(stage)))}
    return max((stage_memory(job, stage, bucketed) for stage in sorted(stages)), key=lambda parts: parts.total)


def stage_memory(job: Job, stage: int, bucketed: bool = True) -> MemoryParts:
    """What a rank of this pipeline stage needs at its largest moment."""
    static = static_bytes(job, stage, bucketed)
    return MemoryParts(
        weights=static.weights,
        gradients=static.gradients,
        optimizer=static.optimizer,
        activations=activation_bytes(job, stage),
        memory=bank_bytes(job) + working_state_bytes(job) + carried_bytes(job, stage),
        communication=communication_bytes(job),
    )


def passes_in_flight(job: Job, stage: int) -> int:
    """Forward passes of model chunks whose backward pass is still to come, at most: Megatron's warm-up and one more."""
    if job.pipeline == 1:
        return 1
    ahead = job.pipeline - stage - 1
    warmup = ahead if job.chunks == 1 else 2 * ahead + (job.chunks - 1) * job.pipeline
    return min(warmup + 1, job.micro_batches * job.chunks)


def activation_bytes(job: Job, stage: int) -> int:
    """Kept by all passes in flight, and the most that a backward pass needs beside."""
    kept, recompute = Activations.of(job), job.config.training.recompute
    memories = job.memory_layers_of(stage)
    each = kept.layers(recompute, job.layers_per_chunk, max(memories))
    each += kept.residual + INPUT_BYTES * job.tokens  # the chunk's output, and its micro-batch
    embedding = kept.embedding * (min(passes_in_flight(job, stage), job.pipeline) if stage == 0 else 0)
    beside = layer_peak(job, kept, any(memories))
    if stage == job.pipeline - 1:
        beside = max(beside, kept.head + loss_peak(job, kept))
    return passes_in_flight(job, stage) * each + embedding + beside


def communication_bytes(job: Job) -> int:
    """Buffers of collectives: Megatron's one buffer for gathered sequences, hidden states between stages, states."""
    hidden = job.tokens * job.shape.hidden_size * job.itemsize
    gathered = hidden if job.sequence_split > 1 else 0
    between_stages = 2 * hidden // job.sequence_split if job.pipeline > 1 else 0
    return gathered + between_stages + handoff_bytes(job)
