"""Layouts of a recipe on a cluster: those that fit, the fastest first."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from em_megatron.config import ConfigError, RunConfig
from em_megatron.model.sizes import shape_of
from em_megatron.planning.job import Cluster, Job
from em_megatron.planning.memory import RESERVE, MemoryParts, peak_memory
from em_megatron.planning.speed import Estimate, estimate
from em_megatron.validate import validate

CHUNKS = (1, 2, 4)
RECOMPUTE = ("none", "selective", "full")  # from the fastest to the smallest


@dataclass(frozen=True)
class Planned:
    """A job with what it needs and how long it takes."""

    job: Job
    cluster: Cluster
    mfu: float

    @cached_property
    def memory(self) -> MemoryParts:
        return peak_memory(self.job)

    @cached_property
    def estimate(self) -> Estimate:
        return estimate(self.job, self.cluster, self.mfu)

    @property
    def fits(self) -> bool:
        return self.memory.total <= usable_bytes(self.cluster)


def usable_bytes(cluster: Cluster) -> int:
    """What a plan may fill of a GPU."""
    return int(cluster.gpu.memory * (1 - RESERVE))


def check(config: RunConfig, world_size: int) -> None:
    """`validate` for the GPUs that are planned for, not for the machine that plans.

    Raises:
        ConfigError: as `validate`.
    """
    if config.memory.kernels == "triton":
        config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, kernels="auto"))
    validate(config, world_size)


def fitting_layouts(config: RunConfig, cluster: Cluster, vocab_size: int, mfu: float) -> list[Planned]:
    """All layouts that fit, the fastest first: of each division into tensor, pipeline and context ranks the best micro-batch
    and number of model chunks, with the least recomputation with which it fits.

    A division that does not divide training.global_batch_size has the next larger one that it does; the run is then
    shortened, so that it sees as many tokens. A division may be there twice, with the batch as it is and with a larger.

    Args:
        config: the recipe; its parallel section, micro-batch size and recomputation are free, the rest stays.
        cluster, vocab_size, mfu: as in `Planned`.
    """
    best: dict[tuple[int, ...], Planned] = {}
    micro_batches = sorted({config.training.micro_batch_size, 1})
    for layout, micro_batch in itertools.product(_layouts(config, cluster), micro_batches):
        planned = _least_recomputation(config, layout, micro_batch, cluster, vocab_size, mfu)
        if planned is None:
            continue
        key = planned.job.tensor, planned.job.pipeline, planned.job.context, int(keeps_batch(planned, config))
        if key not in best or _rank(planned) < _rank(best[key]):
            best[key] = planned
    return [planned for planned in sorted(best.values(), key=_rank) if _is_valid(planned)]


def keeps_batch(planned: Planned, config: RunConfig) -> bool:
    """Whether it trains with the recipe's global batch size."""
    return planned.job.config.training.global_batch_size == config.training.global_batch_size


def _layouts(config: RunConfig, cluster: Cluster) -> Iterator[tuple[int, int, int, int]]:
    """(tensor, pipeline, chunks, context) that the model and the world divide; tensor ranks stay inside a node."""
    shape, world = shape_of(config.model), cluster.world_size
    blocks = config.data.sequence_length // config.memory.block_length
    shared = math.gcd(
        shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size, cluster.gpus_per_node,
        config.model.make_vocab_size_divisible_by,
    )  # fmt: skip
    sizes = itertools.product(divisors(shared), divisors(blocks), divisors(shape.num_layers))
    for tensor, context, pipeline in sizes:
        if world % (tensor * context * pipeline) or config.data.sequence_length // context % tensor:
            continue
        for chunks in CHUNKS if pipeline > 1 else (1,):
            if shape.num_layers % (pipeline * chunks) == 0:
                yield tensor, pipeline, chunks, context


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _least_recomputation(
    config: RunConfig,
    layout: tuple[int, int, int, int],
    micro_batch: int,
    cluster: Cluster,
    vocab_size: int,
    mfu: float,
) -> Planned | None:
    """The layout with the first kind of recomputation with which it fits; None if none does."""
    for recompute in RECOMPUTE:
        candidate = with_layout(config, layout, micro_batch, recompute, cluster.world_size)
        planned = Planned(Job(candidate, cluster.world_size, vocab_size), cluster, mfu)
        try:
            if planned.fits:
                return planned
        except ValueError:  # matrices of so many blocks are too large for any superchunk, or there are fewer than one
            return None
    return None


def with_layout(
    config: RunConfig, layout: tuple[int, int, int, int], micro_batch: int, recompute: str, world_size: int
) -> RunConfig:
    """The recipe under another layout (tensor, pipeline, chunks, context), with a global batch that it divides."""
    tensor, pipeline, chunks, context = layout
    data = world_size // (tensor * pipeline * context)
    parallel = dataclasses.replace(
        config.parallel,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=chunks,
        context_parallel_size=context,
        sequence_parallel=tensor > 1,
        use_distributed_optimizer=data * context > 1,
    )
    unit = micro_batch * data * (pipeline if chunks > 1 else 1)
    batch = -(-config.training.global_batch_size // unit) * unit
    training = dataclasses.replace(
        config.training, micro_batch_size=micro_batch, recompute=recompute, global_batch_size=batch
    )
    changed = dataclasses.replace(config, parallel=parallel, training=training)
    return changed if batch == config.training.global_batch_size else _same_tokens(changed, config)


def _same_tokens(changed: RunConfig, config: RunConfig) -> RunConfig:
    """`changed`, whose batch is larger, with fewer steps and a shorter warm-up and decay: as many tokens of each."""
    ratio = config.training.global_batch_size / changed.training.global_batch_size
    steps = max(1, round(config.training.train_steps * ratio))
    warmup = min(round(config.optimizer.warmup_steps * ratio), steps - 1)
    decay = config.optimizer.wsd_decay_steps
    decay = max(1, min(round(decay * ratio), steps - warmup)) if decay else 0
    return dataclasses.replace(
        changed,
        training=dataclasses.replace(changed.training, train_steps=steps),
        optimizer=dataclasses.replace(changed.optimizer, warmup_steps=warmup, wsd_decay_steps=decay),
    )


def _rank(planned: Planned) -> tuple[float, ...]:
    """Time of a token, equal where it differs by less than a hundredth or so; then the simpler layout first."""
    job = planned.job
    speed = round(100 * math.log(planned.estimate.tokens_per_second))
    return -speed, job.pipeline, job.chunks, job.context, job.tensor, -job.config.training.micro_batch_size


def _is_valid(planned: Planned) -> bool:
    try:
        check(planned.job.config, planned.job.world_size)
    except ConfigError:
        return False
    return True
