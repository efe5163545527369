"""Runs the cells of a plan on one machine: each through launch/pretrain.py, then launch/evaluate.py, as one would by hand.

A cell's state lies in its own folder (checkpoints, evaluation), so a second call does what is left. SIGTERM and
Ctrl-C reach the cells at work, which save; a cell that fails leaves the others alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from em_megatron.checkpoint.folder import complete_steps
from em_megatron.comparison.plan import Cell, Plan

LAUNCH = Path(__file__).parents[2] / "launch"
POLL_SECONDS = 0.2
EVALUATED_NAME = "evaluation/evaluation.json"


def trained(cell: Cell) -> bool:
    """Whether the last step of the run has a whole checkpoint."""
    return cell.config.training.train_steps in complete_steps(cell.run_dir / "checkpoints")


def evaluated(cell: Cell) -> bool:
    """Whether its evaluation was written (last of all, after every part)."""
    return cell.speed_only or (cell.run_dir / EVALUATED_NAME).is_file()


def commands(plan: Plan, cell: Cell) -> list[list[str]]:
    """What is left to run for a cell, in order."""
    found = []
    if not trained(cell):
        quiet = ["logging.progress=false"] if plan.workers > 1 else []
        found.append(["pretrain.py", str(plan.folder / "base.yaml"), *cell.overrides, *quiet])
    if not evaluated(cell):
        found.append(["evaluate.py", str(cell.run_dir), "--suite", plan.suite, *plan.evaluate])
    return [[*_python(plan), str(LAUNCH / script), *arguments] for script, *arguments in found]


def _python(plan: Plan) -> list[str]:
    if plan.ranks == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={plan.ranks}"]


@dataclass
class Worker:
    """A cell at work: the commands left and the one that runs."""

    cell: Cell
    left: deque[list[str]]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    code: int = 0

    def advance(self, environment: dict[str, str]) -> bool:
        """Starts the next command when the last has ended well; whether there is still something to wait for."""
        if self.process is not None:
            if self.process.poll() is None:
                return True
            self.code = self.process.returncode
        self.process = None
        if self.code or not self.left:
            return False
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.left.popleft(), stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        return True

    def stop(self) -> None:
        """Asks the command at work to save and end; nothing is started after it."""
        self.left.clear()
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)


@dataclass
class Outcome:
    """Names of cells: finished now, failed (with the log that says why), and not run because of a stop."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, Path] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def run_cells(
    plan: Plan, cells: Sequence[Cell], say: Callable[[str], None], stopped: Callable[[], bool] = lambda: False
) -> Outcome:
    """Runs what is left of the cells, `plan.workers` at a time; those that measure speed at the end, one at a time."""
    outcome = Outcome()
    for alone in (False, True):
        chosen = [cell for cell in cells if cell.speed_only == alone]
        _run(plan, chosen, 1 if alone else plan.workers, outcome, say, stopped)
    return outcome


def _run(
    plan: Plan, cells: Sequence[Cell], workers: int, outcome: Outcome, say: Callable[[str], None],
    stopped: Callable[[], bool],
) -> None:  # fmt: skip
    waiting = deque((cell, left) for cell in cells if (left := commands(plan, cell)))
    total, done, started, at_work = len(waiting), 0, time.monotonic(), list[Worker]()
    environment = os.environ | {"OMP_NUM_THREADS": str(plan.threads)}
    while waiting or at_work:
        if stopped():
            outcome.left += [cell.name for cell, _ in waiting]
            waiting.clear()
            for worker in at_work:
                worker.stop()
        while waiting and len(at_work) < workers:
            cell, left = waiting.popleft()
            at_work.append(Worker(cell, deque(left), cell.run_dir / "compare.log"))
        for worker in [worker for worker in at_work if not worker.advance(environment)]:
            at_work.remove(worker)
            done += 1
            _note(worker, outcome)
            passed = time.monotonic() - started
            rest = passed / done * (total - done)
            state = "failed" if worker.cell.name in outcome.failed else "done"
            say(f"[{done}/{total}] {worker.cell.name} {state}; {_clock(passed)} passed, about {_clock(rest)} left")
        time.sleep(POLL_SECONDS)


def _note(worker: Worker, outcome: Outcome) -> None:
    cell = worker.cell
    if trained(cell) and evaluated(cell):
        outcome.finished.append(cell.name)
    elif worker.code > 0:
        outcome.failed[cell.name] = worker.log
    else:  # it was asked to end, and saved
        outcome.left.append(cell.name)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
