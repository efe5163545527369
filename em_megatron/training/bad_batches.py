"""Which batches are skipped: those whose loss or gradient is not finite, and spikes of the loss.

The decision rests on numbers that every rank has alike, so all ranks take it alike, and on nothing but what a
checkpoint holds, so a resumed run takes it as the uninterrupted one.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from em_megatron.config import FaultConfig

MAD_TO_DEVIATION = 0.6745  # median absolute deviation over standard deviation of a normal distribution


@dataclass
class BadBatches:
    """The last losses and the batches skipped so far; `state` goes into every checkpoint.

    skipped: a row per batch with step, first_sample, last_sample, reason, loss, grad_norm.
    losses: of the last accepted steps, oldest first; empty where spikes are not looked for.
    """

    config: FaultConfig
    skipped: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "losses": self.losses}

    def objection(self, loss: float, grad_norm: float | None = None) -> str:
        """Why a batch with this loss (nats per token), and this gradient norm once it is known, is skipped; else empty."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the gradient norm is not finite at a loss of {loss:.4f}"
        if self.config.spike_factor and len(self.losses) >= self.config.spike_window:
            middle = statistics.median(self.losses)
            usual = statistics.median(abs(value - middle) for value in self.losses) / MAD_TO_DEVIATION
            if loss > middle + self.config.spike_factor * usual:
                return f"the loss of {loss:.4f} is a spike above {middle:.4f} ± {usual:.4f}"
        return ""

    def accept(self, loss: float) -> None:
        """A step was taken."""
        if self.config.spike_factor:
            self.losses = [*self.losses, loss][-self.config.spike_window :]

    def skip(self, row: dict[str, Any]) -> int:
        """A batch was skipped; gives the number of those within `skip_window` steps."""
        self.skipped.append(row)
        return sum(one["step"] > row["step"] - self.config.skip_window for one in self.skipped)

    @staticmethod
    def spoilt(model: list[torch.nn.Module]) -> bool:
        """Whether a weight of any rank is not finite, so that no batch can do better: one all-reduce of a number."""
        parameters = [parameter for chunk in model for parameter in chunk.parameters()]
        wrong = torch.zeros((), device=parameters[0].device)
        for parameter in parameters:
            wrong += (~torch.isfinite(parameter)).any()
        torch.distributed.all_reduce(wrong)
        return bool(wrong.item())

    def write(self, path: Path) -> None:
        """All rows, a line each, so that the batches can be looked at: `launch/replay.py`."""
        path.write_text("".join(json.dumps(row) + "\n" for row in self.skipped))
