"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from em_megatron.model.sizes import memory_floats_per_sequence, num_parameters
from em_megatron.planning.gpus import GIB
from em_megatron.planning.job import Cluster, Job
from em_megatron.planning.planner import Plan, overrides_of
from em_megatron.planning.search import Planned, usable_bytes
from em_megatron.planning.traffic import traffic

ALTERNATIVES = 5
SECONDS_PER_DAY = 86400.0
SHOWN_IN_DAYS = 2.0
PARTS = {
    "weights": "weights",
    "gradients": "gradients (fp32)",
    "optimizer": "optimizer state",
    "activations": "activations",
    "memory": "memory: matrices and states",
    "communication": "communication buffers",
}
AXES = {
    "tensor": "sums over tensor ranks",
    "sequence": "gathered again for sequence parallelism",
    "pipeline": "hidden states between stages",
    "context": "memory states between context ranks",
    "data": "gradients and weights over data and context ranks",
}
CAUSES = {
    "compute": "forward, backward and recomputation",
    "bubble": "pipeline bubble",
    "tensor": "waiting for tensor ranks",
    "pipeline": "waiting for pipeline stages",
    "context": "waiting for memory states",
    "data": "waiting for gradients and weights",
    "optimizer": "update of the weights",
}


def as_text(plan: Plan) -> str:
    """What a person reads: the layout asked for, or the one to take instead where it cannot be laid out."""
    shown = plan.asked or next(iter(plan.proposals), None)
    lines = _head(plan)
    if plan.refusal is not None:
        lines += [f"REFUSED  {plan.refusal}"]
    if shown is not None:
        lines += _details(shown)
    lines += ["", *_proposals(plan)]
    return "\n".join([*lines, "", "assumptions", *(f"  {line}" for line in plan.assumptions)])


def _head(plan: Plan) -> list[str]:
    cluster, config = plan.cluster, plan.recipe
    tokens = config.training.train_steps * config.training.global_batch_size * config.data.sequence_length
    return [
        f"run      {config.name} on {count(cluster.world_size, 'GPU')} {cluster.gpu.name}: {_nodes(cluster)}",
        f"budget   {tokens / 1e9:,.1f} billion tokens: {count(config.training.train_steps, 'step')} of "
        f"{count(config.training.global_batch_size, 'sample')} of {config.data.sequence_length:,} tokens",
    ]


def count(number: int, thing: str) -> str:
    """`1 node`, `8 nodes`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _nodes(cluster: Cluster) -> str:
    return f"{count(cluster.nodes, 'node')} of {cluster.gpus_per_node}"


def _details(planned: Planned) -> list[str]:
    job, found, parts = planned.job, planned.estimate, planned.memory
    usable = usable_bytes(planned.cluster)
    return [
        f"model    {num_parameters(job.config.model, job.vocab, job.config.memory):,} parameters, vocabulary {job.vocab:,}, "
        f"{found.flops_per_token / 1e9:,.2f} GFLOP per token; memory "
        f"{memory_floats_per_sequence(job.config.model, job.config.memory, job.config.data.sequence_length):,} floats per sequence",
        f"layout   {job.layout}; {_schedule(job)}",
        "",
        *_rows("memory of a GPU, the pipeline stage that needs most", "GiB", PARTS, parts.named(), GIB),
        _row(f"together, of {usable / GIB:.1f} that a plan may fill", parts.total / GIB),
        "",
        *_rows("sent by a GPU in a step (and received)", "GB", AXES, dataclasses.asdict(traffic(job)), 1e9),
        "",
        *_rows("time of a step, estimated", "ms", CAUSES, found.seconds, 1e-3),
        _row("together", 1e3 * found.step_seconds),
        "",
        f"speed    {found.tokens_per_second:,.0f} tokens/s, MFU {found.mfu:.1%}; {_time(planned)} for the budget",
    ]


def _schedule(job: Job) -> str:
    training, parallel = job.config.training, job.config.parallel
    optimizer = "distributed" if parallel.use_distributed_optimizer else "whole"
    passes = f"{job.micro_batches} micro-batch{'' if job.micro_batches == 1 else 'es'}"
    return f"{passes} of {count(training.micro_batch_size, 'sample')}, recompute {training.recompute}, {optimizer} optimizer"


def _rows(title: str, unit: str, names: dict[str, str], values: Mapping[str, float], scale: float) -> list[str]:
    return [f"{title:62} {unit:>9}", *(_row(names[name], value / scale) for name, value in values.items())]


def _row(name: str, value: float) -> str:
    return f"  {name:60} {value:9.2f}"


def _time(planned: Planned) -> str:
    days = days_of(planned)
    return f"{days:,.1f} days" if days >= SHOWN_IN_DAYS else f"{24 * days:,.1f} hours"


def days_of(planned: Planned) -> float:
    """For all steps of the run."""
    return planned.estimate.step_seconds * planned.job.config.training.train_steps / SECONDS_PER_DAY


def _proposals(plan: Plan) -> list[str]:
    """The table of layouts, and what to paste."""
    if plan.smallest is not None:
        cluster = plan.smallest.cluster
        return [
            f"nothing fits {count(plan.cluster.world_size, 'GPU')}; {cluster.world_size:,} ({_nodes(cluster)}) do, with "
            f"{plan.smallest.job.layout}",
            *_pasted(plan.smallest, plan),
        ]
    if not plan.proposals:
        return [NOTHING_FITS]
    lines = []
    if plan.layouts:
        lines += _table("layouts that fit, the fastest first", plan.layouts[:ALTERNATIVES])
    if plan.larger_batch:
        title = "faster, with a larger global batch" if plan.layouts else "layouts that fit with a larger global batch"
        lines += [*([""] if lines else []), *_table(title, plan.larger_batch[: 2 if plan.layouts else ALTERNATIVES])]
    best = plan.proposals[0]
    if plan.refusal is None and not is_faster(best, plan):
        return [*lines, "", "the layout of the recipe is as fast as any that keep its global batch"]
    lines += ["", "to take the first of them, paste", *_pasted(best, plan)]
    if plan.layouts and plan.larger_batch:
        lines += ["", "or, with the larger global batch and as many tokens", *_pasted(plan.larger_batch[0], plan)]
    return lines


def is_faster(best: Planned, plan: Plan) -> bool:
    """Whether a proposal differs from the layout of the recipe and is faster."""
    assert plan.asked is not None
    changes = overrides_of(best, plan.recipe)
    return bool(changes) and best.estimate.tokens_per_second > plan.asked.estimate.tokens_per_second


NOTHING_FITS = (
    "nothing fits, on any number of GPUs: one sample, its part of the model and the memory are too large even when shared "
    "by all of them; take a shorter data.sequence_length, a smaller model, or a smaller memory.order"
)


def _pasted(planned: Planned, plan: Plan) -> list[str]:
    return [f"  {line}" for line in overrides_of(planned, plan.recipe)] or ["  (the recipe as it is)"]


def _table(title: str, rows: list[Planned]) -> list[str]:
    layouts = [row.job.layout for row in rows]
    width = max(len(title), *map(len, layouts))
    head = f"{title:{width}}  batch  micro  recompute    GiB    tokens/s    MFU  time"
    return [head, *(f"{layout:{width}}  {_columns(row)}" for layout, row in zip(layouts, rows, strict=True))]


def _columns(row: Planned) -> str:
    training, found = row.job.config.training, row.estimate
    return (
        f"{training.global_batch_size:5}  {training.micro_batch_size:5}  {training.recompute:9}  "
        f"{row.memory.total / GIB:5.1f} {found.tokens_per_second:11,.0f} {found.mfu:6.1%}  {_time(row)}"
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    """The same for programs: bytes, seconds, tokens."""
    return {
        "run": plan.recipe.name,
        "gpu": dataclasses.asdict(plan.cluster.gpu),
        "nodes": plan.cluster.nodes,
        "gpus_per_node": plan.cluster.gpus_per_node,
        "usable_bytes": usable_bytes(plan.cluster),
        "fits": plan.refusal is None,
        "refusal": plan.refusal,
        "asked": None if plan.asked is None else _as_dict(plan.asked, plan),
        "layouts": [_as_dict(planned, plan) for planned in plan.layouts[:ALTERNATIVES]],
        "larger_batch": [_as_dict(planned, plan) for planned in plan.larger_batch[:ALTERNATIVES]],
        "smallest": None if plan.smallest is None else _as_dict(plan.smallest, plan),
        "assumptions": plan.assumptions,
    }


def _as_dict(planned: Planned, plan: Plan) -> dict[str, Any]:
    job, found = planned.job, planned.estimate
    return {
        "layout": job.layout,
        "overrides": overrides_of(planned, plan.recipe),
        "world_size": job.world_size,
        "parameters": num_parameters(job.config.model, job.vocab, job.config.memory),
        "vocab_size": job.vocab,
        "flops_per_token": found.flops_per_token,
        "memory_bytes": {**planned.memory.named(), "total": planned.memory.total},
        "fits": planned.fits,
        "bytes_per_step": dataclasses.asdict(traffic(job)),
        "seconds": found.seconds,
        "step_seconds": found.step_seconds,
        "tokens_per_second": found.tokens_per_second,
        "mfu": found.mfu,
        "days": days_of(planned),
    }
