"""Where rows go besides metrics.jsonl: TensorBoard and wandb. Neither ever stops a run, or makes it wait for a network."""

from __future__ import annotations

import logging
import os
import re
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from em_megatron.config import RunConfig, config_text

log = logging.getLogger(__name__)

WANDB_SECONDS = 60
WANDB_ID_NAME = "wandb_id"


class Tracker(Protocol):
    """Takes the numbers of a step, in the order of the rows."""

    name: str

    def write(self, numbers: dict[str, float], step: int) -> None: ...

    def close(self, exit_code: int) -> None: ...


def open_trackers(config: RunConfig, step: int, wandb_id: str) -> list[Tracker]:
    """Those the recipe asks for that could be opened; the others have been warned of. `step`: the last one done."""
    wanted: list[tuple[str, Callable[[], Tracker]]] = []
    if config.logging.tensorboard:
        wanted.append((TensorBoard.name, lambda: TensorBoard(config, step)))
    if config.logging.wandb != "disabled":
        wanted.append((Wandb.name, lambda: Wandb(config, wandb_id)))
    opened = [attempt(name, work) for name, work in wanted]
    return [tracker for tracker in opened if tracker is not None]


def attempt[T](what: str, work: Callable[[], T]) -> T | None:
    """What `work` gives; None, with a warning, if it fails."""
    try:
        return work()
    except Exception as error:
        log.warning("%s failed (%s); the run goes on without it", what, error)
        return None


def succeeds(what: str, work: Callable[[], object]) -> bool:
    """Does `work`; False, with a warning, if it fails."""

    def done() -> bool:
        work()
        return True

    return bool(attempt(what, done))


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves the old text or the new one."""
    temporary = path.with_name(f"{path.name}.writing")
    temporary.write_text(text)
    os.replace(temporary, path)


class TensorBoard:
    """Events in runs/NAME/tensorboard; after a resume, later steps of the calls before are hidden."""

    name = "TensorBoard"

    def __init__(self, config: RunConfig, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self, exit_code: int) -> None:
        self._writer.close()


class Wandb:
    """One wandb run over all calls of a run, tied by its id.

    Online, the client goes on in the run of that id. Offline, each call leaves a segment in runs/NAME/wandb, marked to be
    appended to that run, and slurm/sync_wandb.sh uploads them in order. The client numbers the rows itself; the x axis of
    all charts is the row's own `step`, so that steps repeated after a resume lie where they belong and none is refused.
    """

    name = "wandb"

    def __init__(self, config: RunConfig, wandb_id: str) -> None:
        mode = config.logging.wandb
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") or "api.wandb.ai" in _netrc() else "offline"
        opened = attempt("wandb online", lambda: _start(config, wandb_id, "online")) if mode == "online" else None
        self._run: Any = opened or _start(config, wandb_id, "offline")

    def write(self, numbers: dict[str, float], step: int) -> None:
        self._run.log({"step": step, **numbers})

    def close(self, exit_code: int) -> None:
        """Waits at most `WANDB_SECONDS`; the client itself may wait for a network that is gone."""
        finish = threading.Thread(
            target=lambda: attempt(self.name, lambda: self._run.finish(exit_code=exit_code)), daemon=True
        )
        finish.start()
        finish.join(WANDB_SECONDS)


def wandb_id_of(run_dir: Path, saved: str) -> str:
    """The id of a run's one wandb run; for rank 0.

    saved: the one in the checkpoint, which counts most; else the one an earlier call left in run_dir/wandb_id, which may
    have ended before its first checkpoint; else a new one. It is in that file afterwards.
    """
    path = run_dir / WANDB_ID_NAME
    left = attempt(str(path), lambda: path.read_text().strip() if path.is_file() else "") or ""
    known = saved or (left if re.fullmatch(r"[\w-]+", left) else "") or uuid.uuid4().hex[:12]
    if known != left:
        run_dir.mkdir(parents=True, exist_ok=True)
        attempt(str(path), lambda: replace_text(path, f"{known}\n"))
    return known


def _start(config: RunConfig, wandb_id: str, mode: Any) -> Any:
    import wandb

    recipe: Any = OmegaConf.to_container(OmegaConf.create(config_text(config)))
    run = wandb.init(
        project=config.logging.wandb_project,
        name=config.name,
        id=wandb_id,
        resume="allow",
        mode=mode,
        dir=str(config.run_dir),
        config=recipe,
        settings=wandb.Settings(silent=True, init_timeout=WANDB_SECONDS),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _netrc() -> str:
    path = Path.home() / ".netrc"
    return path.read_text() if path.is_file() else ""
