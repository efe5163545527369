"""Tiny training runs, their saves and resumes, and what a checkpoint holds, for the tests of this folder."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader

from em_megatron.checkpoint.contents import stored_tensors
from em_megatron.checkpoint.sharded import CheckpointStore
from em_megatron.parallel import process_groups
from tests.multi_rank import leave_groups

# fp32 losses on another layout: sums in another order differ by a few units in the last place of 1.2e-7.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "dp2": {},
    "cp2": {"context_parallel_size": 2},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "distributed": {"distributed_optimizer": True},
    "bf16": {"bf16": True},
    "bf16 distributed": {"bf16": True, "distributed_optimizer": True},
}
Steps = list[tuple[float, float]]  # loss and gradient norm of each


def start_layout(name: str) -> process_groups.Layout:
    """Megatron's groups for two ranks in place of those before, whose threads and open files would add up."""
    leave_groups()
    return process_groups.initialize(**LAYOUTS[name])


def trainer(layout: str, optimizer: str, seed: int = 7, **options: Any) -> Any:
    groups = start_layout(layout)
    from tests.tiny_megatron import Options, Trainer

    return Trainer(groups, Options(**OPTIMIZERS[optimizer], **options), seed=seed)


def save(store: CheckpointStore, run: Any, **options: Any) -> Path:
    return store.save(
        run.step,
        model_chunks=run.chunks,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        train_state={"step": run.step, "consumed_samples": 4 * run.step},
        config_text="name: tiny\n",
        **options,
    )


def resume(store: CheckpointStore, run: Any, **options: Any) -> dict[str, Any]:
    newest = store.latest(resuming=True)
    assert newest is not None
    state = store.load(newest, model_chunks=run.chunks, optimizer=run.optimizer, scheduler=run.scheduler, **options)
    run.step = state["step"]
    return state


def content(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by its key."""
    tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in stored_tensors(path).items()}
    dcp.load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return tensors


@contextmanager
def in_writers(action: Callable[[], None]) -> Iterator[None]:
    """The forked writers of the saves that start meanwhile do `action` before they write."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    plain, rank = FileSystemWriterAsync.write_preloaded_data, os.getpid()

    def after_action(*args: Any, **kwargs: Any) -> Any:
        if os.getpid() != rank:
            action()
        return plain(*args, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(after_action)
    try:
        yield
    finally:
        FileSystemWriterAsync.write_preloaded_data = staticmethod(plain)
