"""The training loop.

data → step (forward, backward, reduce, update) → log → validate → save

All ranks take every decision together: to skip a batch, to stop because one of them was asked to, to save again later.
"""

from __future__ import annotations

from itertools import tee

import torch

from em_megatron.checkpoint.folder import CheckpointError, complete_steps, step_name
from em_megatron.config import RunConfig
from em_megatron.data.stream import TokenStream
from em_megatron.evaluation.perplexity import combined, evaluate
from em_megatron.model.sizes import flops_per_token, memory_floats_per_sequence, padded_vocab_size
from em_megatron.parallel.outcome import report_outcome
from em_megatron.training.measurements import StepClock
from em_megatron.training.metrics import MetricLog, finite
from em_megatron.training.profiling import Profiler
from em_megatron.training.saving import Saver
from em_megatron.training.setup import Run
from em_megatron.training.step import StepResult, TrainingError, train_step
from em_megatron.training.stopping import StopRequest
from em_megatron.training.tracking import attempt, wandb_id_of
from em_megatron.training.watchdog import SAVING, Watchdog

SKIPPED = "skipped.jsonl"


def train(run: Run, stop: StopRequest | None = None, watchdog: Watchdog | None = None) -> str:
    """Trains `run` from where it stands to its last step, or for `training.stop_after_steps`, or until `stop` is asked for.

    A `watchdog` that watched over the set-up goes on; by default one starts here.

    Returns:
        "finished" at the last step of the run; "paused" before it, by stop_after_steps; "stopped", by a signal. The state
        is saved in each case.

    Raises:
        TrainingError: too many batches were skipped; names their samples and the newest checkpoint.
        DataError: a shard turned out to be damaged.
        CheckpointError: the last checkpoint could not be written.
    """
    config, state, stop = run.config, run.state, stop or StopRequest()
    last_step = config.training.train_steps
    if config.training.stop_after_steps:
        last_step = min(last_step, state.step + config.training.stop_after_steps)
    rank = torch.distributed.get_rank()
    if rank == 0:
        state.wandb_id = wandb_id_of(config.run_dir, state.wandb_id)
    held_out = run.corpus.validation_streams(config) if config.validation.interval else {}
    metrics = MetricLog(config, state.step, state.wandb_id, active=rank == 0)
    saver = Saver(run, metrics.say)
    watchdog = watchdog or watchdog_of(config, rank, stop).start()
    data, clock = run.training_data(), _clock(run)
    batches = clock.timed(data)
    # Every chunk of the model reads the same micro-batches.
    feeds = tee(batches, len(run.model)) if len(run.model) > 1 else (batches,)
    profiler, exit_code = Profiler(config, run.device, clock, state.step), 1
    validation = _Validation(run, held_out, metrics, stop, watchdog)
    try:
        with clock.paused():
            stopping = stop.agreed() or validation.stopped_if_owed()
        while state.step < last_step and not stopping:
            watchdog.beat(f"step {state.step + 1}")
            with profiler.step(state.step + 1):
                result = train_step(
                    config, run.layout, run.model, run.optimizer, run.scheduler, feeds, run.bad, lambda: stop.here
                )
            _advance(run, result)
            clock.count(result.tokens)
            if result.skipped:
                _skip(run, result, metrics)
            ends, stopping = state.step == last_step, result.stop
            if ends or state.step % config.logging.interval == 0:
                metrics.train_row(_row(run, result) | clock.row() | profiler.found())
            state.owes_validation = bool(held_out) and (ends or state.step % config.validation.interval == 0)
            with clock.paused():
                stopping = stopping or validation.stopped_if_owed()
                watchdog.beat(SAVING)
                saver.poll()
                if saver.due() and not (ends or stopping):
                    saver.save()
            watchdog.first_step_done()
        watchdog.beat(SAVING)
        saver.last()
        outcome, exit_code = _outcome(run, last_step, stopping), 0
        if rank == 0:
            report_outcome(outcome, state.step)  # now: closing wandb may take longer than this process is given
    except TrainingError as error:  # on all ranks alike
        raise TrainingError(f"{error}; {_newest(run)}") from None
    finally:
        data.close()
        profiler.close()
        watchdog.stop()
        metrics.close(exit_code)
    return outcome


def _outcome(run: Run, last_step: int, stopping: bool) -> str:
    if stopping and (run.state.step < last_step or run.state.owes_validation):
        return "stopped"
    return "finished" if run.state.step >= run.config.training.train_steps else "paused"


def watchdog_of(config: RunConfig, rank: int, stop: StopRequest) -> Watchdog:
    """The watchdog of a rank, with its stacks in the run's folder."""
    return Watchdog(config.run_dir / "stacks", rank, config.faults.hang_minutes, stop)


def _row(run: Run, result: StepResult) -> dict[str, float]:
    return {
        "step": run.state.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": float(run.optimizer.param_groups[0]["lr"]),
        "consumed_samples": run.state.consumed_samples,
        "consumed_tokens": run.state.consumed_tokens,
        "packing_efficiency": result.tokens / (run.config.training.global_batch_size * run.config.data.sequence_length),
        **(_epochs(run) if torch.distributed.get_rank() == 0 else {}),  # that of the row that is written
        "skipped_batches": len(run.bad.skipped),
        "memory_floats_per_sequence": memory_floats_per_sequence(
            run.config.model, run.config.memory, run.config.data.sequence_length
        ),
    }


def _epochs(run: Run) -> dict[str, float]:
    """How often the corpus was read so far, or each of a blend."""
    counts = run.stream.epochs(run.state.consumed_samples)
    if len(counts) == 1:
        return {"epochs": counts[0]}
    return {f"epochs/{member.name}": count for member, count in zip(run.corpus.members, counts, strict=True)}


class _Validation:
    """Held-out loss where a step owes one, given up where the run is asked to stop, and then still owed."""

    def __init__(
        self, run: Run, held_out: dict[str, TokenStream], metrics: MetricLog, stop: StopRequest, watchdog: Watchdog
    ) -> None:
        self._run, self._held_out, self._metrics = run, held_out, metrics
        self._stop, self._watchdog = stop, watchdog

    def stopped_if_owed(self) -> bool:
        """Validates if the last step owes it; whether that was interrupted."""
        run, state = self._run, self._run.state
        if not state.owes_validation or not self._held_out:
            return False
        token_bytes = torch.as_tensor(run.corpus.vocabulary.token_bytes)
        samples = -(-run.config.validation.samples // len(self._held_out))
        found = {}
        for name, stream in self._held_out.items():
            part = evaluate(
                run.config, run.layout, run.model, stream, token_bytes, samples, interrupted=self._interrupted
            )
            if part is None:
                return True
            found[name] = part
        state.owes_validation = False
        row = next(iter(found.values()))
        if len(found) > 1:
            row = combined(list(found.values()))
            row |= {f"{what}/{name}": part[what] for name, part in found.items() for what in ("loss", "bits_per_byte")}
        self._metrics.validation_row({"step": state.step} | row)
        return False

    def _interrupted(self) -> bool:
        self._watchdog.beat(f"validation after step {self._run.state.step}")
        return self._stop.agreed()


def _advance(run: Run, result: StepResult) -> None:
    """Counts a step, and makes the memories that it wrote those that the next one reads."""
    if run.carried is not None:
        run.carried.advance()
        if result.skipped:
            run.carried.clear_nonfinite()
    run.state.step += 1
    run.state.consumed_samples += run.config.training.global_batch_size
    run.state.consumed_tokens += result.tokens


def _skip(run: Run, result: StepResult, metrics: MetricLog) -> None:
    """Writes down the batch of the step that was just counted.

    Raises:
        TrainingError: it is one too many.
    """
    faults, last = run.config.faults, run.state.consumed_samples - 1
    first = last + 1 - run.config.training.global_batch_size
    row = {
        "step": run.state.step,
        "first_sample": first,
        "last_sample": last,
        "reason": result.skipped,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "data_identity": run.corpus.identity(run.state.consumed_samples),
    }
    count = run.bad.skip(finite(row))
    if torch.distributed.get_rank() == 0:
        attempt(SKIPPED, lambda: run.bad.write(run.config.run_dir / SKIPPED))
    what = f"step {run.state.step} (samples {first} to {last}): {result.skipped}"
    if run.bad.spoilt(run.model):
        raise TrainingError(f"{what}; weights are not finite, so no batch can do better")
    if count > faults.skip_limit:
        limit = f"{count} batches were skipped within {faults.skip_window} steps and faults.skip_limit is {faults.skip_limit}"
        raise TrainingError(f"{what}; no weight was changed; {limit}")
    metrics.say(f"warning: {what}; the batch is skipped ({count} of at most {faults.skip_limit})")


def _newest(run: Run) -> str:
    failure = ""
    try:
        run.store.finalize(blocking=True)
    except CheckpointError as error:
        failure = f" ({error})"
    steps = complete_steps(run.store.root)
    newest = f"{run.store.root / step_name(steps[-1])} is whole" if steps else "no checkpoint was written yet"
    return (
        f"{newest}{failure}: lower optimizer.lr, or look at the batches with launch/replay.py {run.config.run_dir} "
        f"(listed in {SKIPPED})"
    )


def _clock(run: Run) -> StepClock:
    config = run.config
    vocab = padded_vocab_size(run.corpus.vocabulary.size, config.model.make_vocab_size_divisible_by)
    flops = flops_per_token(
        config.model, config.memory, vocab, config.data.sequence_length, config.parallel.context_parallel_size
    )
    return StepClock(flops, run.layout.world_size, run.device)
