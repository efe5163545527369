"""How a launch ended, in one word, for the script that started it: torchrun's exit code says only whether it failed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

FILE = "EM_OUTCOME_FILE"  # where a batch script wants it; nothing is written without

# finished: the run has all its steps. paused: training.stop_after_steps. stopped: a signal came, the state is saved.
# refused: it cannot work as it is, so starting it again is of no use. failed: anything else.
OUTCOMES = ("finished", "paused", "stopped", "refused", "failed")


def report_outcome(outcome: str, step: int | None = None) -> None:
    """Writes `outcome`, and the step reached if it is known, to the file that the environment names.

    The first word of a launch stays: what fails later, when ranks are ended, is not the cause. A file that cannot be
    written is passed over: the script then takes the launch for failed.
    """
    if outcome not in OUTCOMES:
        raise ValueError(f"outcome '{outcome}' is not one of {', '.join(OUTCOMES)}")
    path = os.environ.get(FILE)
    if not path:
        return
    with contextlib.suppress(OSError), open(path, "x") as file:
        file.write(outcome if step is None else f"{outcome} {step}")


def report_progress(step: int) -> None:
    """Writes the step of a checkpoint that is whole: what fails after it has not failed without progress."""
    path = os.environ.get(FILE)
    if path:
        with contextlib.suppress(OSError):
            Path(f"{path}.progress").write_text(str(step))
