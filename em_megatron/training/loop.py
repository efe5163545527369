"""The training loop.

data → step (forward, backward, reduce, update) → log → validate → save
"""

from __future__ import annotations

import uuid

import torch

from em_megatron.evaluation.perplexity import evaluate
from em_megatron.model.sizes import flops_per_token, memory_floats_per_sequence, padded_vocab_size
from em_megatron.training.metrics import MetricLog, Throughput
from em_megatron.training.setup import Run
from em_megatron.training.step import TrainingError, train_step


def train(run: Run) -> None:
    """Trains `run` from where it stands to its last step, or for `training.stop_after_steps`.

    Raises:
        TrainingError: loss or gradient not finite. The newest checkpoint and the batch's samples are named.
    """
    config, state = run.config, run.state
    last_step = config.training.train_steps
    if config.training.stop_after_steps:
        last_step = min(last_step, state.step + config.training.stop_after_steps)
    state.wandb_id = state.wandb_id or uuid.uuid4().hex[:12]
    metrics = MetricLog(config, state.step, state.wandb_id, active=torch.distributed.get_rank() == 0)
    memory_floats = memory_floats_per_sequence(config.model, config.memory)
    speed = _throughput(run)
    data = run.training_data()
    validation = run.corpus.stream(config, "validation") if config.validation.interval else None
    try:
        tokens_since_row = 0
        while state.step < last_step:
            first_sample = state.consumed_samples
            try:
                result = train_step(config, run.layout, run.model, run.optimizer, run.scheduler, data)
            except TrainingError as error:
                last_sample = first_sample + config.training.global_batch_size - 1
                raise TrainingError(
                    f"step {state.step + 1} (samples {first_sample} to {last_sample}): {error}; "
                    f"the newest checkpoint in {run.store.root} is whole: lower optimizer.lr or look at the samples"
                ) from None
            state.step += 1
            state.consumed_samples += config.training.global_batch_size
            state.consumed_tokens += result.tokens
            tokens_since_row += result.tokens
            ends = state.step == last_step
            if state.step % config.logging.interval == 0 or ends:
                row = {
                    "step": state.step,
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "learning_rate": float(run.optimizer.param_groups[0]["lr"]),
                    "consumed_samples": state.consumed_samples,
                    "consumed_tokens": state.consumed_tokens,
                    **speed.read(tokens_since_row),
                    "memory_floats_per_sequence": memory_floats,
                }
                metrics.train_row(row, steps_done=(state.step - 1) % config.logging.interval + 1)
                tokens_since_row = 0
            if validation is not None and (ends or state.step % config.validation.interval == 0):
                token_bytes = torch.as_tensor(run.corpus.vocabulary.token_bytes)
                held_out = evaluate(config, run.layout, run.model, validation, token_bytes, config.validation.samples)
                metrics.validation_row({"step": state.step, **held_out})
                speed.restart()
            if ends or state.step % config.checkpoint.save_interval == 0:
                run.save()
                speed.restart()
    finally:
        metrics.close()


def _throughput(run: Run) -> Throughput:
    config = run.config
    vocab = padded_vocab_size(run.corpus.vocabulary.size, config.model.make_vocab_size_divisible_by)
    flops = flops_per_token(config.model, config.memory, vocab, config.data.sequence_length)
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu"
    return Throughput(flops, run.layout.world_size, name)
