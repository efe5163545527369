"""A plan before anything is run: its cells and what they take; and as variants for slurm/compare.sh."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from em_megatron.comparison.plan import Cell, Plan
from em_megatron.comparison.running import evaluated, trained
from em_megatron.config import ConfigError


def tokens_of(cell: Cell) -> int:
    """Tokens that a cell is trained on."""
    training = cell.config.training
    return training.train_steps * training.global_batch_size * cell.config.data.sequence_length


def overview(plan: Plan, cells: Sequence[Cell]) -> str:
    """A line for each cell, and the sum of the work."""
    width = max(len(cell.name) for cell in cells)
    lines = [f"{'cell':{width}} {'floats/sequence':>16} {'parameters':>14} {'MFLOP/token':>12} {'tokens':>9}  state"]
    for cell in cells:
        state = "done" if trained(cell) and evaluated(cell) else "trained" if trained(cell) else ""
        lines.append(
            f"{cell.name:{width}} {cell.costs.memory_floats_per_sequence:16,} {cell.costs.parameters:14,} "
            f"{cell.costs.flops_per_token / 1e6:12,.1f} {_short(tokens_of(cell)):>9}  {state}".rstrip()
        )
    work = sum(cell.costs.flops_per_token * tokens_of(cell) for cell in cells)
    tokens = sum(tokens_of(cell) for cell in cells)
    lines.append(
        f"{len(cells)} cells, {_short(tokens)} tokens, {work:.3g} FLOP of training: {work / 4e14 / 3600:,.1f} GPU hours at "
        f"400 TFLOP/s, {work / 7e10 / 3600:,.1f} core hours at 70 GFLOP/s"
    )
    return "\n".join(lines)


def _short(tokens: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.1f}{unit}"
    return str(tokens)


def write_variants(plan: Plan, cells: Sequence[Cell], path: Path) -> str:
    """Writes a line for each cell as slurm/compare.sh reads them, and the base recipe; returns the command to submit.

    Cells of the speed measurement are among them: each is a job of its own, so nothing runs beside it.

    Raises:
        ConfigError: an override with a blank in it, which a variant cannot have.
    """
    lines = [f"# {len(cells)} cells of the plan {plan.name}, written by launch/compare.py"]
    for cell in cells:
        words = [word for word in cell.overrides if not word.startswith("name=")]
        if any(len(shlex.split(word)) != 1 for word in words):
            raise ConfigError(f"cell {cell.name} has an override with a blank, which slurm/compare.sh cannot pass on")
        lines.append(" ".join([cell.name, *words]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    # Key tokens come from a run that another task trains, so LongPPL waits for all of them.
    parts = [part for part in plan.suite.split(",") if part != "long_ppl" or not plan.evaluator]
    suite = shlex.quote(" ".join(["--suite", ",".join(parts), *plan.evaluate]))
    return (
        f"{path}: {len(cells)} variants\n"
        f"EM_EVALUATE={suite} sbatch --array=1-{len(cells)} slurm/compare.sh {plan.folder / 'base.yaml'} {path} "
        f"output_dir={plan.folder}\nthen: python launch/compare.py {plan.name} --stages evaluate,report"
    )
