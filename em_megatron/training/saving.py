"""When a run saves, and what it does when it cannot: training goes on, and the save is tried again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from em_megatron.checkpoint.folder import CheckpointError
from em_megatron.parallel.outcome import report_progress
from em_megatron.training.setup import Run
from em_megatron.training.step import TrainingError

LAST_ATTEMPTS = 3
SECONDS_BETWEEN_LAST_ATTEMPTS = 5.0


class Saver:
    """The checkpoints of a run: called by all ranks together, it decides alike on all of them.

    Args:
        run: what is saved.
        say: prints a line on rank 0.
    """

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._saved: tuple[int, bool] | None = self._now()  # what the newest save holds that was begun and did not fail
        self._retry_at, self._ending = 0, False

    def poll(self) -> None:
        """Completes a save that is written; one that failed is tried again later."""
        self._finalize(blocking=False)

    def due(self) -> bool:
        """Whether a checkpoint is to be written after this step."""
        step = self._run.state.step
        return step % self._run.config.checkpoint.save_interval == 0 or step == self._retry_at

    def save(self) -> None:
        """Begins a checkpoint of this step, in the background if the run says so.

        Raises:
            TrainingError: weights are not finite: such a checkpoint would push out good ones.
        """
        if self._run.bad.spoilt(self._run.model):
            raise TrainingError(f"after step {self._run.state.step} weights are not finite, so that it is not saved")
        self._finalize(blocking=True)
        try:
            folder = self._run.save()
            self._saved = self._now()
        except CheckpointError as error:
            self._put_off(error)
        else:
            self._completed(None if self._run.config.checkpoint.asynchronous else folder)

    def last(self) -> None:
        """Saves this step unless that is done, and waits until it is whole.

        Raises:
            CheckpointError: it could not be written, after several attempts.
        """
        self._ending = True
        for attempt in range(1, LAST_ATTEMPTS + 1):
            self._finalize(blocking=True)
            if self._saved == self._now():
                return
            self.save()
            self._finalize(blocking=True)
            if self._saved == self._now():
                return
            if attempt < LAST_ATTEMPTS:
                time.sleep(SECONDS_BETWEEN_LAST_ATTEMPTS)
        raise CheckpointError(
            f"step {self._run.state.step} could not be saved in {LAST_ATTEMPTS} attempts: make room in "
            f"{self._run.store.root} and call this again, which goes on from the newest checkpoint there"
        )

    def _finalize(self, blocking: bool) -> None:
        try:
            self._completed(self._run.store.finalize(blocking))
        except CheckpointError as error:
            self._put_off(error)

    def _completed(self, folder: Path | None) -> None:
        if folder is not None and dist.get_rank() == 0:
            report_progress(int(folder.name.rpartition("_")[2]))

    def _now(self) -> tuple[int, bool]:
        return self._run.state.step, self._run.state.owes_validation

    def _put_off(self, error: CheckpointError) -> None:
        self._saved = None
        self._retry_at = self._run.state.step + self._run.config.checkpoint.retry_interval
        then = (
            "it is tried again" if self._ending else f"training goes on, the next attempt is at step {self._retry_at}"
        )
        self._say(f"warning: {error}; {then}")
        with contextlib.suppress(CheckpointError):
            self._run.store.discard_failed()
