"""Runs the cells of a plan on one machine: each through launch/pretrain.py, then launch/evaluate.py, as one would by hand.

A cell's state lies in its own folder (checkpoints, evaluation), so a second call does what is left. SIGTERM and
Ctrl-C reach the cells at work, which save; a cell that fails leaves the others alone.
"""

from __future__ import annotations

import json
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
from em_megatron.comparison.plan import Cell, Plan, evaluator_of

LAUNCH = Path(__file__).parents[2] / "launch"
POLL_SECONDS = 0.2
EVALUATED_NAME = "evaluation/evaluation.json"
MACHINE_NAME = "machine.json"


def trained(cell: Cell) -> bool:
    """Whether the last step of the run has a whole checkpoint."""
    return cell.config.training.train_steps in complete_steps(cell.run_dir / "checkpoints")


def evaluated(cell: Cell) -> bool:
    """Whether its evaluation (evaluation.json, written last of all) has every part of its suite."""
    if cell.speed_only:
        return True
    try:
        found = json.loads((cell.run_dir / EVALUATED_NAME).read_text())
    except (OSError, ValueError):
        return False
    return all(("loss" if part == "perplexity" else part) in found for part in cell.suite.split(",") if part != "all")


def commands(plan: Plan, cell: Cell, stages: Sequence[str], evaluator: Path | None = None) -> list[list[str]]:
    """What is left to run for a cell, in order."""
    found = []
    if "train" in stages and not trained(cell):
        quiet = ["logging.progress=false"] if plan.workers > 1 else []
        found.append(["pretrain.py", str(plan.folder / "base.yaml"), *cell.overrides, *quiet])
    if "evaluate" in stages and not evaluated(cell) and (found or trained(cell)):
        found.append(["evaluate.py", str(cell.run_dir), *evaluation_arguments(plan, cell, evaluator)])
    return [[*_python(plan), str(LAUNCH / script), *arguments] for script, *arguments in found]


def evaluation_arguments(plan: Plan, cell: Cell, evaluator: Path | None) -> list[str]:
    """What evaluate.py is told about a cell."""
    judge = ["--evaluator", str(evaluator)] if evaluator is not None and "long_ppl" in cell.suite else []
    return ["--suite", cell.suite, *judge, *plan.evaluate]


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
    plan: Plan, cells: Sequence[Cell], chosen: Sequence[Cell], stages: Sequence[str], say: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Outcome:  # fmt: skip
    """Runs what is left of the chosen cells of a plan, `plan.workers` at a time; cells that measure speed one at a time.

    All are trained before the first is evaluated, for one of them may be the evaluator of the others.
    """
    outcome = Outcome()
    for stage in stages:
        for alone in (False, True):
            part = [cell for cell in chosen if cell.speed_only == alone and cell.name not in outcome.failed]
            work = [(cell, commands(plan, cell, [stage], evaluator_of(plan, cells, cell))) for cell in part]
            _run(plan, stage, [pair for pair in work if pair[1]], 1 if alone else plan.workers, outcome, say, stopped)
    return outcome


def _run(
    plan: Plan, stage: str, work: Sequence[tuple[Cell, list[list[str]]]], workers: int, outcome: Outcome,
    say: Callable[[str], None], stopped: Callable[[], bool],
) -> None:  # fmt: skip
    waiting = deque(work)
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
            if stage == "train":
                note_machine(cell)
            at_work.append(Worker(cell, deque(left), cell.run_dir / "compare.log"))
        for worker in [worker for worker in at_work if not worker.advance(environment)]:
            at_work.remove(worker)
            done += 1
            _note(worker, stage, outcome)
            passed = time.monotonic() - started
            rest = passed / done * (total - done)
            name = worker.cell.name
            state = "failed" if name in outcome.failed else "stopped" if name in outcome.left else "done"
            say(f"[{stage} {done}/{total}] {name} {state}; {_clock(passed)} passed, about {_clock(rest)} left")
        time.sleep(POLL_SECONDS)


def note_machine(cell: Cell) -> None:
    """Keeps beside a run what it is trained on."""
    import torch

    from em_megatron.benchmark.machine import describe, pick_device

    cell.run_dir.mkdir(parents=True, exist_ok=True)
    found = describe(pick_device("auto"), torch.float32)
    (cell.run_dir / MACHINE_NAME).write_text(json.dumps(found, indent=1) + "\n")


def _note(worker: Worker, stage: str, outcome: Outcome) -> None:
    cell = worker.cell
    if trained(cell) if stage == "train" else evaluated(cell):
        outcome.finished.append(cell.name)
    elif worker.code > 0:
        outcome.failed[cell.name] = worker.log
    else:  # it was asked to end, and saved
        outcome.left.append(cell.name)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
