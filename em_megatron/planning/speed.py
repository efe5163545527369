"""An estimate of a step's time, good enough to rank layouts and to book a cluster; every constant is an assumption.

    step = compute + bubble + tensor + pipeline + context + data + optimizer

compute    (model FLOPs + recomputed FLOPs) / (peak · mfu). `mfu` is what forward and backward reach while a GPU
           computes; the share that remains of it after everything else is `Estimate.mfu`.
bubble     (p − 1) / (m · v) of compute: 1F1B, interleaved with v chunks a rank, m micro-batches (arXiv 2104.04473).
tensor     all of its bytes, over NVLink: the next product waits for them. Second gathers of sequence parallelism
           run beside a product and cost nothing here.
pipeline   all of its bytes without interleaving, which waits for them; half of them with it.
context    `handoff_cost.estimated_seconds` for each hand-off.
data       what is left of the gradients' reduction after the backward pass of the last micro-batch, over which the first
           stage spreads it, and the gathering of weights after the update.
optimizer  bytes of weights, gradients and state read and written once each, from the GPU's memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from em_megatron.model.sizes import flops_per_token
from em_megatron.parallel.handoff_cost import estimated_seconds
from em_megatron.planning.buffers import static_bytes
from em_megatron.planning.job import Cluster, Job
from em_megatron.planning.traffic import context_bytes, data_bytes, handoffs_per_layer, pipeline_bytes, tensor_bytes

DEFAULT_MFU = 0.40  # share of the peak; assumed, large dense models on Megatron-Core report 0.35 to 0.5
LINK_EFFICIENCY = 0.75  # of a link's data-sheet bandwidth that collectives reach
REDUCTION_OVERLAP = 0.8  # of the last backward pass that hides the reduction of gradients
INTERLEAVED_EXPOSED = 0.5  # of the pipeline's bytes with interleaving


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step by cause, and what follows from them.

    flops_per_token: model FLOPs, forward and backward, without recomputation. mfu: of the whole step.
    """

    seconds: dict[str, float]
    flops_per_token: float
    mfu: float
    tokens_per_second: float

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def model_flops_per_token(job: Job) -> float:
    """Forward and backward FLOPs of a token, as training reports them."""
    config = job.config
    return flops_per_token(config.model, config.memory, job.vocab, config.data.sequence_length, job.context)


def recomputed_share(job: Job) -> float:
    """FLOPs done again in the backward pass, as a share of forward and backward.

    Full recomputation repeats the forward pass of the layers, a third of their cost. Selective recomputation repeats the
    core attention and the memory operator: what of a layer does not lie in its matrices.
    """
    recompute, total = job.config.training.recompute, model_flops_per_token(job)
    head = 6.0 * job.vocab * job.shape.hidden_size
    if recompute == "full":
        return (total - head) / 3 / total
    return (total - head - 6.0 * _layer_weights(job)) / 3 / total if recompute == "selective" else 0.0


def _layer_weights(job: Job) -> int:
    shape = job.shape
    query, key = shape.num_attention_heads * shape.kv_channels, shape.num_query_groups * shape.kv_channels
    return shape.num_layers * shape.hidden_size * (2 * query + 2 * key + 3 * shape.ffn_hidden_size)


def estimate(job: Job, cluster: Cluster, mfu: float) -> Estimate:
    """Time of a step of `job` on `cluster`, whose GPUs compute at `mfu` of their peak."""
    gpu, flops = cluster.gpu, model_flops_per_token(job)
    needed = flops * job.tokens_per_step / cluster.world_size / gpu.peak_flops
    compute = needed * (1 + recomputed_share(job)) / mfu
    static = static_bytes(job, 0)
    moved = 2 * (static.weights + static.gradients + static.optimizer) - static.gradients
    seconds = {
        "compute": compute,
        "bubble": compute * (job.pipeline - 1) / (job.micro_batches * job.chunks),
        "tensor": job.micro_batches * tensor_bytes(job)[0] / (gpu.nvlink * LINK_EFFICIENCY),
        "pipeline": _pipeline_seconds(job, cluster),
        "context": _context_seconds(job),
        "data": _data_seconds(job, cluster, compute / job.micro_batches),
        "optimizer": moved / gpu.memory_bandwidth,
    }
    total = sum(seconds.values())
    return Estimate(seconds, flops, needed / total, job.tokens_per_step / total)


def _pipeline_seconds(job: Job, cluster: Cluster) -> float:
    whole_node = job.world_size <= cluster.gpus_per_node
    bandwidth = (cluster.gpu.nvlink if whole_node else cluster.gpu.network) * LINK_EFFICIENCY
    exposed = INTERLEAVED_EXPOSED if job.chunks > 1 else 1.0
    return exposed * job.micro_batches * pipeline_bytes(job) / bandwidth


def _context_seconds(job: Job) -> float:
    if not context_bytes(job):
        return 0.0
    layers = max(sum(job.memory_layers_of(stage)) for stage in range(job.pipeline))
    return job.micro_batches * layers * handoffs_per_layer(job) * estimated_seconds(
        job.handoff, job.context, job.layer_state
    )  # fmt: skip


def group_bandwidth(job: Job, cluster: Cluster) -> float:
    """Bytes/s of a rank in collectives over data- and context-parallel ranks.

    Tensor ranks are neighbours, then come context, data and pipeline. A group that spans nodes has the network ports of
    its members in a node, up to NVLink's speed.
    """
    if job.tensor * job.replicas <= cluster.gpus_per_node:
        return cluster.gpu.nvlink * LINK_EFFICIENCY
    members = max(1, cluster.gpus_per_node // job.tensor)
    return min(cluster.gpu.nvlink, members * cluster.gpu.network) * LINK_EFFICIENCY


def _data_seconds(job: Job, cluster: Cluster, micro_batch: float) -> float:
    gradients, weights = data_bytes(job)
    bandwidth = group_bandwidth(job, cluster)
    hidden = REDUCTION_OVERLAP * 2 / 3 * micro_batch if job.pipeline == 1 else 0.0
    return max(0.0, gradients / bandwidth - hidden) + weights / bandwidth
