"""The training loop.

data → step (forward, backward, reduce, update) → log → validate → save
"""

from __future__ import annotations

import uuid
from itertools import tee

import torch

from em_megatron.checkpoint.folder import CheckpointError, complete_steps, step_name
from em_megatron.data.stream import TokenStream
from em_megatron.evaluation.perplexity import evaluate
from em_megatron.model.sizes import flops_per_token, memory_floats_per_sequence, padded_vocab_size
from em_megatron.training.metrics import MetricLog, Throughput
from em_megatron.training.setup import Run
from em_megatron.training.step import StepResult, TrainingError, train_step


def train(run: Run) -> None:
    """Trains `run` from where it stands to its last step, or for `training.stop_after_steps`.

    Raises:
        TrainingError: loss or gradient not finite; names the batch's samples and the newest checkpoint.
        DataError: a shard turned out to be damaged.
    """
    config, state = run.config, run.state
    last_step = config.training.train_steps
    if config.training.stop_after_steps:
        last_step = min(last_step, state.step + config.training.stop_after_steps)
    state.wandb_id = state.wandb_id or uuid.uuid4().hex[:12]
    data = run.training_data()
    # Every chunk of the model reads the same micro-batches.
    feeds = tee(data, len(run.model)) if len(run.model) > 1 else (data,)
    held_out = run.corpus.stream(config, "validation") if config.validation.interval else None
    metrics = MetricLog(config, state.step, state.wandb_id, active=torch.distributed.get_rank() == 0)
    speed, tokens_since_row, exit_code = _throughput(run), 0, 1
    try:
        while state.step < last_step:
            try:
                result = train_step(config, run.layout, run.model, run.optimizer, run.scheduler, feeds)
            except TrainingError as error:  # on all ranks alike
                raise TrainingError(_explain(run, error)) from None
            if run.carried is not None:
                run.carried.advance()
            state.step += 1
            state.consumed_samples += config.training.global_batch_size
            state.consumed_tokens += result.tokens
            tokens_since_row += result.tokens
            ends = state.step == last_step
            if ends or state.step % config.logging.interval == 0:
                metrics.train_row(_row(run, result) | speed.read(tokens_since_row))
                tokens_since_row = 0
            if held_out is not None and (ends or state.step % config.validation.interval == 0):
                with speed.paused():
                    metrics.validation_row({"step": state.step} | _validate(run, held_out))
            run.store.finalize()
            if ends or state.step % config.checkpoint.save_interval == 0:
                with speed.paused():
                    run.save()
        run.store.finalize(blocking=True)
        exit_code = 0
    finally:
        data.close()
        metrics.close(exit_code)


def _row(run: Run, result: StepResult) -> dict[str, float]:
    return {
        "step": run.state.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": float(run.optimizer.param_groups[0]["lr"]),
        "consumed_samples": run.state.consumed_samples,
        "consumed_tokens": run.state.consumed_tokens,
        "memory_floats_per_sequence": memory_floats_per_sequence(run.config.model, run.config.memory),
    }


def _validate(run: Run, held_out: TokenStream) -> dict[str, object]:
    token_bytes = torch.as_tensor(run.corpus.vocabulary.token_bytes)
    return evaluate(run.config, run.layout, run.model, held_out, token_bytes, run.config.validation.samples)


def _explain(run: Run, error: TrainingError) -> str:
    try:
        run.store.finalize(blocking=True)
    except CheckpointError as failure:
        error = TrainingError(f"{error} (and {failure})")
    first = run.state.consumed_samples
    last = first + run.config.training.global_batch_size - 1
    steps = complete_steps(run.store.root)
    newest = f"{run.store.root / step_name(steps[-1])} is whole" if steps else "no checkpoint was written yet"
    step = run.state.step + 1
    return f"step {step} (samples {first} to {last}): {error}; {newest}: lower optimizer.lr or look at the samples"


def _throughput(run: Run) -> Throughput:
    config = run.config
    vocab = padded_vocab_size(run.corpus.vocabulary.size, config.model.make_vocab_size_divisible_by)
    flops = flops_per_token(
        config.model, config.memory, vocab, config.data.sequence_length, config.parallel.context_parallel_size
    )
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu"
    return Throughput(flops, run.layout.world_size, name)
