"""One optimizer step through Megatron-Core's pipeline schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from em_megatron.config import RunConfig
from em_megatron.model.language_model import positions_per_sample
from em_megatron.parallel.process_groups import Layout
from em_megatron.training.bad_batches import BadBatches
from em_megatron.training.loss import loss_function, sum_over_world, token_loss_function
from em_megatron.training.microbatch import MicroBatch
from em_megatron.training.profiling import span


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is safe."""


@dataclass(frozen=True)
class StepResult:
    """Loss in nats per token over all ranks, gradient norm before clipping, tokens that counted.

    skipped: why no weight was changed; empty where the step was taken. stop: whether any rank has been asked to end.
    """

    loss: float
    grad_norm: float
    tokens: int
    skipped: str = ""
    stop: bool = False


def forward_step(data: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Forward of one micro-batch on this stage, and the function that turns the last stage's output into the loss."""
    with span("data"):
        batch = next(data)
    return _token_losses(batch, model), partial(loss_function, batch.loss_mask)


def token_loss_step(data: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """As `forward_step`, keeping every token's loss."""
    return _token_losses(next(data), model), token_loss_function


def _token_losses(batch: MicroBatch, model: torch.nn.Module) -> Tensor:
    """Losses of all tokens [b, T] on the last stage, hidden states on the others."""
    output: Tensor = model(batch.tokens, None, None, labels=batch.labels, packed_seq_params=batch.layout)
    return output


def is_reporting_rank(layout: Layout) -> bool:
    """One rank per data- and context-parallel rank holds its losses: the first tensor rank of the last pipeline stage."""
    return layout.tp_rank == 0 and layout.pp_rank == layout.pp_size - 1


def run_schedule(
    step_function: Any,
    data: Sequence[Iterator[MicroBatch]],
    model: list[torch.nn.Module],
    config: RunConfig,
    num_microbatches: int,
    micro_batch_size: int,
    forward_only: bool,
) -> list[Tensor]:
    """Megatron's schedule for this layout: what the loss function logged, per micro-batch (last stage only).

    `data` gives the same micro-batches to each chunk of `model`.
    """
    return get_forward_backward_func()(
        forward_step_func=step_function,
        data_iterator=list(data) if len(model) > 1 else data[0],
        model=model,
        num_microbatches=num_microbatches,
        seq_length=positions_per_sample(config),
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def train_step(
    config: RunConfig,
    layout: Layout,
    model: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    data: Sequence[Iterator[MicroBatch]],
    bad: BadBatches,
    stop_requested: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Forward, backward, reduction, clipping, update; on all ranks alike, no update where `bad` objects to the batch.

    `stop_requested` is asked on this rank after the backward pass.
    """
    for chunk in model:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    optimizer.zero_grad()
    micro = config.training.micro_batch_size
    count = config.training.global_batch_size // (micro * layout.dp_size)
    with span("forward and backward"):
        logged = run_schedule(forward_step, data, model, config, count, micro, forward_only=False)
    device = next(model[0].parameters()).device
    summed = torch.zeros(3, dtype=torch.float64, device=device)
    if logged and is_reporting_rank(layout):
        summed[:2] = torch.stack(logged).sum(0)
    summed[2] = float(stop_requested())
    total, tokens, stops = sum_over_world(summed, contributes=True).tolist()
    loss, grad_norm = total / max(tokens, 1.0), math.nan
    objection = bad.objection(loss)
    if not objection:
        optimizer.prepare_grads()
        grad_norm = _same_on_all_ranks(float(optimizer.get_grad_norm()), device)
        objection = bad.objection(loss, grad_norm)
    if not objection:
        with span("optimizer"):
            grad_norm = float(optimizer.step()[1])
        bad.accept(loss)
    scheduler.step(increment=1)
    return StepResult(loss, grad_norm, int(tokens), objection, stops > 0)


def _same_on_all_ranks(grad_norm: float, device: torch.device) -> float:
    """The norm, or NaN on every rank where it is not finite on one: a faulty GPU may spoil what others have right."""
    wrong = torch.tensor(float(not math.isfinite(grad_norm)), device=device)
    torch.distributed.all_reduce(wrong)
    return math.nan if wrong.item() else grad_norm
