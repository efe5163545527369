"""What a run shows: one progress bar, metrics.jsonl, TensorBoard, wandb, PNG plots. Rank 0 writes, nobody else."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from em_megatron.config import RunConfig, config_text

log = logging.getLogger(__name__)

WANDB_SECONDS = 60

# Dense bf16 peak of one device in FLOP/s (vendor data sheets, without sparsity), for model FLOPs utilisation.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "GB200": 2250e12}


def peak_flops(device_name: str) -> float | None:
    """Peak of a device whose name holds a known model, else None."""
    return next((flops for name, flops in sorted(PEAK_FLOPS.items(), reverse=True) if name in device_name), None)


class MetricLog:
    """Rows of a run, in every place a user looks. On ranks other than 0 it does nothing.

    After a resume, rows later than the checkpoint are dropped from metrics.jsonl: the file tells one straight story.
    A failing TensorBoard, wandb or plot is warned of once and left out; it never stops training.
    """

    def __init__(self, config: RunConfig, step: int, wandb_id: str, active: bool) -> None:
        self.config, self.active = config, active
        if not active:
            return
        self.path = config.run_dir / "metrics.jsonl"
        config.run_dir.mkdir(parents=True, exist_ok=True)
        _replace_text(config.run_dir / "config.yaml", config_text(config))
        _drop_rows_after(self.path, step)
        self._file = self.path.open("a")
        self._tensorboard: Any = _attempt("TensorBoard", lambda: _open_tensorboard(config, step))
        self._wandb: Any = _attempt("wandb", lambda: _open_wandb(config, wandb_id))
        self._bar = _open_bar(config, step)

    def train_row(self, row: dict[str, Any]) -> None:
        """One training row; moves the bar to its step."""
        if not self.active:
            return
        self._write({"kind": "train", **row}, "train")
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s"
                + (f", MFU {row['mfu']:.1%}" if row.get("mfu") else ""),
                refresh=False,
            )
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

        self._file.close()
        if self._bar is not None:
            self._bar.close()
        _attempt("the plots", lambda: plot_run(self.config.run_dir, block_length=self.config.memory.block_length))
        if self._tensorboard is not None:
            _attempt("TensorBoard", self._tensorboard.close)
        if self._wandb is not None:
            # The client may wait for a network that is gone; the run does not.
            finish = partial(_attempt, "wandb", lambda: self._wandb.finish(exit_code=exit_code))
            thread = threading.Thread(target=finish, daemon=True)
            thread.start()
            thread.join(WANDB_SECONDS)

    def _write(self, row: dict[str, Any], prefix: str) -> None:
        self._file.write(json.dumps(finite(row)) + "\n")
        self._file.flush()
        numbers = {f"{prefix}/{k}": v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        if self._tensorboard is not None:
            self._tensorboard = _attempt("TensorBoard", lambda: self._to_tensorboard(numbers, row["step"]))
        if self._wandb is not None:
            self._wandb = _attempt("wandb", lambda: self._to_wandb(numbers, row["step"]))

    def _to_tensorboard(self, numbers: dict[str, float], step: int) -> Any:
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, step)
        return self._tensorboard

    def _to_wandb(self, numbers: dict[str, float], step: int) -> Any:
        self._wandb.log(numbers, step=step)
        return self._wandb


class Throughput:
    """Tokens per second since the last reading, and the share of the device's peak they make use of."""

    def __init__(self, flops_per_token: float, world_size: int, device_name: str) -> None:
        self._peak = peak_flops(device_name)
        self._flops, self._world = flops_per_token, world_size
        self._time = time.perf_counter()

    def read(self, tokens: int) -> dict[str, float]:
        """tokens_per_second, and mfu where the peak of the device is known."""
        now = time.perf_counter()
        rate = tokens / max(now - self._time, 1e-9)
        self._time = now
        found = {"tokens_per_second": rate}
        if self._peak is not None:
            found["mfu"] = rate * self._flops / (self._peak * self._world)
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens inside (validation, saving)."""
        start = time.perf_counter()
        yield
        self._time += time.perf_counter() - start


def finite(value: Any) -> Any:
    """The same with null for numbers JSON does not have (a perplexity may be infinite)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def _attempt[T](what: str, work: Callable[[], T]) -> T | None:
    """What `work` gives; None, with a warning, if it fails."""
    try:
        return work()
    except Exception as error:
        log.warning("%s failed (%s); the run goes on without it", what, error)
        return None


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.writing")
    temporary.write_text(text)
    os.replace(temporary, path)


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
    _replace_text(path, "".join(f"{line}\n" for line in kept))


def _open_tensorboard(config: RunConfig, step: int) -> Any:
    if not config.logging.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=step + 1)


def _open_wandb(config: RunConfig, wandb_id: str) -> Any:
    """One wandb run over all resumes where the client can; an offline segment per call, tied by its id, where not."""
    mode: Any = config.logging.wandb
    if mode == "auto":
        has_key = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in _netrc()
        mode = "online" if has_key else "offline"
    if mode == "disabled":
        return None
    import wandb

    def start(mode: Any) -> Any:
        return wandb.init(
            project=config.logging.wandb_project,
            name=config.name,
            id=wandb_id,
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(config.run_dir),
            settings=wandb.Settings(silent=True, init_timeout=WANDB_SECONDS),
        )

    if mode == "online":
        return _attempt("wandb online", lambda: start("online")) or start("offline")
    return start(mode)


def _netrc() -> str:
    path = Path.home() / ".netrc"
    return path.read_text() if path.is_file() else ""


def _open_bar(config: RunConfig, step: int) -> Any:
    if not config.logging.progress:
        return None
    from tqdm import tqdm

    return tqdm(total=config.training.train_steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1)


def perplexity(loss: float) -> float:
    """exp(loss), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf
