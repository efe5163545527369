"""The plan of a recipe on a cluster: the layout asked for, why it cannot be, and what to take instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from em_megatron.config import ConfigError, RunConfig, load_config
from em_megatron.data.blend import parse_blend
from em_megatron.data.manifest import MANIFEST_NAME, Manifest
from em_megatron.planning.gpus import GIB, find_gpu
from em_megatron.planning.job import Cluster, Job
from em_megatron.planning.memory import RESERVE
from em_megatron.planning.search import Planned, check, divisors, fitting_layouts, keeps_batch, usable_bytes
from em_megatron.planning.speed import DEFAULT_MFU

DEFAULT_VOCAB_SIZE = 32000
MOST_NODES = 4096
WORTH_A_LARGER_BATCH = 1.1  # times as fast as the best layout that keeps the batch


@dataclass(frozen=True)
class Plan:
    """What `launch/plan.py` prints.

    recipe: the resolved tree. asked: the layout of the recipe, None where it cannot be laid out. refusal: why it cannot
    run, one sentence; None where it can. layouts: those that fit and keep the global batch, the fastest first.
    larger_batch: faster ones that need a larger one. smallest: where nothing fits, the smallest number of nodes on which
    something does. assumptions: what was taken for granted.
    """

    recipe: RunConfig
    cluster: Cluster
    asked: Planned | None
    refusal: str | None
    layouts: list[Planned]
    larger_batch: list[Planned]
    smallest: Planned | None
    assumptions: list[str]

    @property
    def proposals(self) -> list[Planned]:
        """Layouts to take, the best first."""
        return [*self.layouts, *self.larger_batch]


PLANNED_KINDS = ("elastic", "block_local")


def make_plan(
    recipe: Path | str | RunConfig,
    overrides: Sequence[str] = (),
    nodes: int = 1,
    gpus_per_node: int = 8,
    gpu: str = "h100",
    mfu: float | None = None,
    vocab_size: int | None = None,
) -> Plan:
    """Plans a recipe; needs no GPU, no process group and no data.

    Args:
        recipe, overrides: as for `load_config`.
        nodes, gpus_per_node, gpu: the cluster.
        mfu: share of the peak that forward and backward reach, without waiting; default `DEFAULT_MFU`.
        vocab_size: ids of the tokenizer; default: that of the corpus at data.path, else `DEFAULT_VOCAB_SIZE`.

    Raises:
        ConfigError: a recipe that no layout mends, or an argument that makes no sense.
        DataError: data.path holds a manifest that cannot be read.
    """
    if min(nodes, gpus_per_node) < 1:
        raise ConfigError(f"--nodes {nodes} and --gpus-per-node {gpus_per_node}: each must be at least 1")
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu} is not a share of the peak: give a number above 0 and up to 1, such as 0.4")
    if vocab_size is not None and vocab_size < 1:
        raise ConfigError(f"--vocab-size is {vocab_size}: it must be at least 1")
    config, cluster = load_config(recipe, overrides), Cluster(find_gpu(gpu), nodes, gpus_per_node)
    if set(config.model.layer_pattern or "*") != {"*"}:
        raise ConfigError(
            "the memory of GPUs is planned for layers of attention, not yet for M and G of model.layer_pattern"
        )
    if config.memory.kind not in PLANNED_KINDS:
        raise ConfigError(
            f"the memory of GPUs is planned for memory.kind {' and '.join(PLANNED_KINDS)}, not yet for "
            f"'{config.memory.kind}': launch/match.py prints its parameters, FLOPs and memory floats"
        )
    _refuse_what_no_layout_mends(config)
    vocab, where = _vocab_size(config, vocab_size)
    share = DEFAULT_MFU if mfu is None else mfu
    asked, refusal = _asked(config, cluster, vocab, share)
    found = fitting_layouts(config, cluster, vocab, share)
    layouts = [planned for planned in found if keeps_batch(planned, config)]
    return Plan(
        recipe=config,
        cluster=cluster,
        asked=asked,
        refusal=refusal,
        layouts=layouts,
        larger_batch=_larger_batch([planned for planned in found if not keeps_batch(planned, config)], layouts),
        smallest=None if found else _smallest(config, cluster, vocab, share),
        assumptions=_assumptions(config, cluster, share, mfu is None, vocab, where),
    )


def _refuse_what_no_layout_mends(config: RunConfig) -> None:
    """Raises ConfigError for what is wrong with the recipe on any number of ranks: checked on one data-parallel rank,
    with samples shared by as many context-parallel ranks as the recipe says, or by any other number."""
    blocks = max(1, config.data.sequence_length // max(1, config.memory.block_length))
    refusals: list[ConfigError] = []
    for context in (max(1, config.parallel.context_parallel_size), *divisors(blocks)):
        parallel = dataclasses.replace(
            config.parallel,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            virtual_pipeline_model_parallel_size=1,
            context_parallel_size=context,
            sequence_parallel=False,
        )
        training = dataclasses.replace(config.training, global_batch_size=config.training.micro_batch_size)
        try:
            return check(dataclasses.replace(config, parallel=parallel, training=training), context)
        except ConfigError as error:
            refusals.append(error)
    raise refusals[0]


def _vocab_size(config: RunConfig, given: int | None) -> tuple[int, str]:
    """Ids of the tokenizer, and where the number comes from."""
    if given is not None:
        return given, "--vocab-size"
    folder = Path(parse_blend(config.data.path)[0].location).expanduser()
    if (folder / MANIFEST_NAME).is_file():
        return Manifest.load(folder).vocab_size, str(folder)
    return DEFAULT_VOCAB_SIZE, "assumed"


def _asked(config: RunConfig, cluster: Cluster, vocab: int, mfu: float) -> tuple[Planned | None, str | None]:
    """The layout of the recipe, and why it cannot run."""
    try:
        check(config, cluster.world_size)
    except ConfigError as error:
        return None, str(error)
    planned = Planned(Job(config, cluster.world_size, vocab), cluster, mfu)
    if planned.fits:
        return planned, None
    memory = planned.memory
    part = memory.largest()
    return planned, (
        f"the layout needs {memory.total / GIB:.1f} GiB on a GPU, of which a plan may fill "
        f"{usable_bytes(cluster) / GIB:.1f} GiB; the largest part is {part}, {memory.named()[part] / GIB:.1f} GiB: take "
        f"{_remedy(part, config)}"
    )


def _remedy(part: str, config: RunConfig) -> str:
    """What makes this part of the memory smaller."""
    if part in ("weights", "gradients", "optimizer"):
        return "a layout with more ranks that share the model, more GPUs, or a smaller model"
    if part == "memory":
        return "a smaller memory.order, or memory.superchunk=0, which chooses by cost"
    micro = "a smaller training.micro_batch_size, " if config.training.micro_batch_size > 1 else ""
    again = "training.recompute=full, " if config.training.recompute != "full" else ""
    return f"{micro}{again}or a layout in which more ranks share a sample"


def _larger_batch(found: list[Planned], layouts: list[Planned]) -> list[Planned]:
    """Of layouts with a larger global batch, those much faster than the `layouts` without; where there are none, all, the
    smallest change of the batch first."""
    if layouts:
        enough = WORTH_A_LARGER_BATCH * layouts[0].estimate.tokens_per_second
        return [planned for planned in found if planned.estimate.tokens_per_second > enough]
    return sorted(found, key=lambda planned: planned.job.config.training.global_batch_size)


def _smallest(config: RunConfig, cluster: Cluster, vocab: int, mfu: float) -> Planned | None:
    """The best layout on the smallest number of nodes, doubled each time, on which anything fits."""
    nodes = 2 * cluster.nodes
    while nodes <= MOST_NODES:
        larger = dataclasses.replace(cluster, nodes=nodes)
        found = fitting_layouts(config, larger, vocab, mfu)
        if found:
            return found[0]
        nodes *= 2
    return None


def _assumptions(
    config: RunConfig, cluster: Cluster, mfu: float, default_mfu: bool, vocab: int, where: str
) -> list[str]:
    gpu = cluster.gpu
    lines = [
        f"a GPU computes at {mfu:.0%} of its peak of {gpu.peak_flops / 1e12:,.0f} TFLOP/s"
        + (" (--mfu not given)" if default_mfu else " (--mfu)"),
        f"{RESERVE:.0%} of a GPU's {gpu.memory / GIB:.0f} GiB stay free for CUDA, NCCL and fragmentation",
        f"{gpu.network * 8 / 1e9:,.0f} Gbit/s of network for each GPU, {gpu.nvlink / 1e9:,.0f} GB/s of NVLink each way",
    ]
    if where == "assumed":
        lines.append(f"a vocabulary of {vocab:,} ids (no corpus at {config.data.path}; --vocab-size)")
    else:
        lines.append(f"a vocabulary of {vocab:,} ids ({where})")
    if config.memory.kernels in ("batched", "naive"):
        lines.append(
            f"activations of the Triton kernels, though memory.kernels={config.memory.kernels}, which keeps more"
        )
    return lines


def overrides_of(planned: Planned, recipe: RunConfig) -> list[str]:
    """What turns `recipe` into the planned run, as `section.key=value`."""
    found = []
    for section in ("parallel", "training", "optimizer"):
        new, old = getattr(planned.job.config, section), getattr(recipe, section)
        for field in dataclasses.fields(new):
            value = getattr(new, field.name)
            if value != getattr(old, field.name):
                found.append(f"{section}.{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    return found
