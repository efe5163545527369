"""What a run shows: one progress bar, metrics.jsonl, TensorBoard, wandb, PNG plots. Rank 0 writes, nobody else."""

from __future__ import annotations

import json
import logging
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

from em_megatron.config import RunConfig, config_text
from em_megatron.training.tracking import attempt, open_trackers, replace_text, succeeds

log = logging.getLogger(__name__)

WORTH_SHOWING = 0.05  # share of time waited for data from which the bar says so

# Dense bf16 peak of one device in FLOP/s (vendor data sheets, without sparsity), for model FLOPs utilisation.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "GB200": 2250e12}


def peak_flops(device_name: str) -> float | None:
    """Peak of a device whose name holds a known model, else None."""
    return next((flops for name, flops in sorted(PEAK_FLOPS.items(), reverse=True) if name in device_name), None)


class MetricLog:
    """Rows of a run, in every place a user looks. On ranks other than 0 it does nothing.

    After a resume, rows later than the checkpoint are dropped from metrics.jsonl: the file tells one straight story.
    A failing TensorBoard, wandb or plot is warned of once and left out; rows that do not fit on a full disk are kept and
    written when there is room. None of it stops training.
    """

    def __init__(self, config: RunConfig, step: int, wandb_id: str, active: bool) -> None:
        self.config, self.active = config, active
        if not active:
            return
        self.path = config.run_dir / "metrics.jsonl"
        config.run_dir.mkdir(parents=True, exist_ok=True)
        attempt("config.yaml", lambda: replace_text(config.run_dir / "config.yaml", config_text(config)))
        attempt("metrics.jsonl", lambda: _drop_rows_after(self.path, step))
        self._rows = _Rows(self.path)
        self._trackers = open_trackers(config, step, wandb_id)
        self._bar = _open_bar(config, step)

    def train_row(self, row: dict[str, Any]) -> None:
        """One training row; moves the bar to its step."""
        if not self.active:
            return
        self._write({"kind": "train", **row}, "train")
        if self._bar is not None:
            self._bar.set_postfix_str(_in_short(row), refresh=False)
            self._bar.update(row["step"] - self._bar.n)

    def validation_row(self, row: dict[str, Any]) -> None:
        """One validation row, with its list of positions."""
        if not self.active:
            return
        self._write({"kind": "validation", **row}, "validation")
        self.say(
            f"step {row['step']}: held-out loss {row['loss']:.4f}, perplexity {row['perplexity']:.2f}, "
            f"bits per byte {row['bits_per_byte']:.4f}"
        )

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self, exit_code: int = 0) -> None:
        """Ends all writers and draws the plots; `exit_code` tells wandb whether the run failed."""
        if not self.active:
            return
        from em_megatron.training.plots import plot_run

        self._rows.close()
        if self._bar is not None:
            self._bar.close()
        attempt("the plots", lambda: plot_run(self.config.run_dir, block_length=self.config.memory.block_length))
        for tracker in self._trackers:
            attempt(tracker.name, partial(tracker.close, exit_code))

    def _write(self, row: dict[str, Any], prefix: str) -> None:
        self._rows.add(json.dumps(finite(row)))
        numbers = {f"{prefix}/{k}": v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        self._trackers = [
            tracker
            for tracker in self._trackers
            if succeeds(tracker.name, partial(tracker.write, numbers, row["step"]))
        ]


class _Rows:
    """Lines at the end of a file; what cannot be written, as on a full disk, is tried again with the next one."""

    def __init__(self, path: Path) -> None:
        self._path, self._pending, self._warned = path, b"", False
        self._file: int | None = None

    def add(self, line: str) -> None:
        self._pending += line.encode() + b"\n"
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            while self._pending:
                self._pending = self._pending[os.write(self._file, self._pending) :]
            self._warned = False
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s); its rows are kept, the run goes on", self._path, error)
            self._warned = True

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)


def finite(value: Any) -> Any:
    """The same with null for numbers JSON does not have (a perplexity may be infinite)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a row half written when the run was killed
    if step == 0:
        kept = []
    replace_text(path, "".join(f"{line}\n" for line in kept))


def _in_short(row: dict[str, Any]) -> str:
    """What the bar says of a training row."""
    parts = [f"loss {row['loss']:.3f}", f"{row['tokens_per_second']:,.0f} tokens/s"]
    if row.get("mfu"):
        parts.append(f"MFU {row['mfu']:.1%}")
    if row.get("data_wait", 0.0) > WORTH_SHOWING:
        parts.append(f"waits for data {row['data_wait']:.0%}")
    return ", ".join(parts)


def _open_bar(config: RunConfig, step: int) -> Any:
    if not config.logging.progress:
        return None
    from tqdm import tqdm

    return tqdm(total=config.training.train_steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1)


def perplexity(loss: float) -> float:
    """exp(loss), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf
