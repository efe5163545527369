"""Checkpoints that every rank writes a part of, that load on another layout, and that a kill cannot spoil.

A checkpoint is written to `.step_00000020.writing` and renamed to `step_00000020` when it is whole: megatron.core's
distributed checkpoint (weights, optimizer, RNG states, what the caller adds), train_state.json, config.yaml, and
COMPLETE, which lists the size and the SHA-256 of every file. A folder without COMPLETE, or whose files differ from it,
is never loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from em_megatron.checkpoint.compatibility import check_same_model, sharded_extra
from em_megatron.checkpoint.contents import StoredTensor, stored_tensors
from em_megatron.checkpoint.folder import (
    CheckpointError,
    altered_file,
    clean_leftovers,
    complete_steps,
    damage,
    finish,
    read_marker,
    replace_step,
    retain,
    step_name,
    writing_name,
)
from em_megatron.checkpoint.optimizer_formats import SHARDING_TYPE, adapt, check_groups, members, read_fp32_masters
from em_megatron.checkpoint.random_state import RNG_KEY, restore_rng, sharded_rng
from em_megatron.checkpoint.ranks import from_all_ranks, on_rank_zero, require_shared
from em_megatron.checkpoint.writing import BackgroundWriter, write

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing import ShardedTensor

logger = logging.getLogger(__name__)

_METADATA = {
    "distrib_optim_sharding_type": SHARDING_TYPE,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


class CheckpointStore:
    """The checkpoints of one run, in `root`: the newest `keep_last` are kept, and those whose step `keep_every` divides.

    Every method is called by all ranks together and gives or raises the same on all of them.
    """

    def __init__(self, root: Path, keep_last: int, keep_every: int = 0) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, but at least 1 checkpoint must be kept.")
        self.root = Path(root)
        self.keep_last = keep_last
        self.keep_every = keep_every
        # The save that finalize() will complete: what writes its tensors, and what is left to do after that.
        self._pending: tuple[BackgroundWriter, Callable[[dict[str, str]], Path]] | None = None

    def save(
        self,
        step: int,
        *,
        model_chunks: Sequence[torch.nn.Module],
        optimizer: Any | None,
        scheduler: Any | None,
        train_state: dict[str, Any],
        config_text: str,
        extra: dict[str, ShardedTensor] | None = None,
        asynchronous: bool = False,
    ) -> Path:
        """Write the state after `step` optimizer steps and drop old checkpoints; returns the checkpoint's folder.

        `model_chunks` are Megatron models or their DDP wrappers (several with interleaving), `optimizer` a
        MegatronOptimizer, `scheduler` anything with state_dict(); None for both saves weights alone, to be read without
        an optimizer. `train_state` must be JSON. `extra` are further tensors, stored under the keys that the
        ShardedTensors carry; all ranks give a dictionary or none does. A checkpoint of this step that is there already
        is replaced. Raises CheckpointError when a rank could not write.

        An `asynchronous` save returns when the state is safe from what training does next, and the folder will be
        there after finalize(). A pending one is completed first, and its failure raised.
        """
        self.finalize(blocking=True)
        folder = self.root / writing_name(step)
        document = on_rank_zero(lambda: self._prepare(folder, train_state))
        require_shared(folder)
        state: dict[str, Any] = _model_state(model_chunks)
        if optimizer is not None:
            _allocate_moments(optimizer)
            state["optimizer"] = optimizer.sharded_state_dict(dict(state), metadata=dict(_METADATA))
        if scheduler is not None:
            state["scheduler"] = scheduler.state_dict()
        state[RNG_KEY] = sharded_rng()
        if extra is not None:
            state["extra"] = sharded_extra(extra)
        texts = {"train_state.json": document, "config.yaml": config_text}
        complete = partial(self._complete, step, texts, {"layout": _layout()})
        if asynchronous:
            self._pending = BackgroundWriter(state, folder), complete
            return self.root / step_name(step)
        sums = write(state, folder)
        return on_rank_zero(partial(complete, sums))

    def finalize(self, blocking: bool = False) -> Path | None:
        """Complete the asynchronous save whose tensors are written on all ranks; returns its folder, else None.

        Call it each training step, and with `blocking`, which waits for the writing, before the ranks end. Costs
        nothing when no save is pending, and one all-reduce of an integer when one still is. Raises CheckpointError
        when a rank could not write; the save is then given up.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        writer, complete = pending
        if not writer.ended(blocking):
            self._pending = pending
            return None
        sums = writer.checksums()
        return on_rank_zero(partial(complete, sums))

    def discard_failed(self) -> None:
        """Removes what a failed save left, which takes room on a disk that may be full. No save may be pending."""
        on_rank_zero(lambda: clean_leftovers(self.root))

    def latest(self, *, resuming: bool = False) -> Path | None:
        """The newest whole checkpoint, None without any; damaged ones are passed over with a warning.

        With `resuming` it first removes what a killed save left, and the ranks share the reading of every byte of the
        newest one. Leave it False where only reading is meant, such as evaluation: the run may be alive and in the
        middle of a save. A pending save of this store is left alone.
        """
        pending = self._pending[0].folder.name if self._pending else ""

        def whole() -> list[Path]:
            if resuming:
                clean_leftovers(self.root, keep=pending)
            return [self.root / step_name(step) for step in complete_steps(self.root)]

        for folder in reversed(on_rank_zero(whole)):
            if not resuming:
                return folder
            reasons = [reason for reason in from_all_ranks(_altered(folder)) if reason]
            if not reasons:
                return folder
            if dist.get_rank() == 0:
                logger.warning("Checkpoint %s is passed over: %s.", folder, reasons[0])
        return None

    def load(
        self,
        path: Path,
        *,
        model_chunks: Sequence[torch.nn.Module],
        optimizer: Any | None = None,
        scheduler: Any | None = None,
        extra: dict[str, ShardedTensor] | None = None,
    ) -> dict[str, Any]:
        """Restore what is given and return the train_state that was saved with it.

        Without an optimizer only weights (and `extra`) are read, for evaluation. With one, which may be another of
        Megatron's Adam optimizers and of another precision than the one that saved, the RNG states of python, numpy,
        torch and Megatron's tracker are restored too if the layout is the one that saved; otherwise they stay as the
        caller seeded them, and that is logged. The slices that `extra` describes are read into its tensors. Raises
        CheckpointError when the checkpoint is of another model or optimizer.
        """
        from megatron.core import dist_checkpointing

        path = Path(path)
        marker, train_state, stored = on_rank_zero(lambda: _read_documents(path))
        weights, rest = _model_state(model_chunks), {}
        if extra is not None:
            rest["extra"] = sharded_extra(extra)
        if optimizer is not None:
            check_groups(on_rank_zero(lambda: _saved_optimizer(path)), optimizer, path)
            rest["optimizer"] = optimizer.sharded_state_dict(dict(weights), is_loading=True, metadata=dict(_METADATA))
            read_fp32_masters(weights, rest["optimizer"], stored)
            if marker["layout"] == _layout():
                rest[RNG_KEY] = sharded_rng()
        check_same_model({**weights, **rest}, stored, path, with_optimizer=optimizer is not None)
        loaded = dist_checkpointing.load(weights, str(path))
        if rest:
            loaded |= dist_checkpointing.load(rest, str(path))
        for name, model in _models(model_chunks):
            model.load_state_dict(loaded[name], strict=True)
        if optimizer is not None:
            adapt(loaded["optimizer"])
            optimizer.load_state_dict(loaded["optimizer"])
            _restore_rng_or_say_why_not(loaded if RNG_KEY in rest else {}, path, marker["layout"])
        if scheduler is not None:
            scheduler.load_state_dict(loaded["scheduler"])
        for name, tensor in (extra or {}).items():
            _fill(tensor, loaded["extra"][name])
        return train_state

    def _prepare(self, folder: Path, train_state: dict[str, Any]) -> str:
        try:
            document = json.dumps(train_state, indent=1, sort_keys=True)
        except TypeError as error:
            message = f"train_state cannot be written as JSON ({error}): keep to plain Python values."
            raise CheckpointError(message) from None
        self.root.mkdir(parents=True, exist_ok=True)
        clean_leftovers(self.root)
        folder.mkdir()
        return document

    def _complete(self, step: int, texts: dict[str, str], facts: dict[str, Any], sums: dict[str, str]) -> Path:
        """What is left to do, by one rank, when all tensors are written."""
        folder = self.root / writing_name(step)
        finish(folder, step, texts, facts, sums)
        final = replace_step(self.root, folder, step)
        retain(self.root, step, self.keep_last, self.keep_every)
        return final


def _altered(folder: Path) -> str:
    try:
        return altered_file(folder, dist.get_rank(), dist.get_world_size())
    except OSError as error:
        return str(error)


def _read_documents(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, StoredTensor]]:
    if reason := damage(path):
        raise CheckpointError(f"{path} cannot be loaded: {reason}.")
    return read_marker(path), json.loads((path / "train_state.json").read_text()), stored_tensors(path)


def _saved_optimizer(path: Path) -> dict[str, Any]:
    """The optimizer's common state: parameter groups, but no tensors."""
    from megatron.core import dist_checkpointing

    common: dict[str, dict[str, Any]] = dist_checkpointing.load_common_state_dict(str(path))
    if "optimizer" not in common:
        raise CheckpointError(
            f"{path} holds weights alone, so no run can go on from it: start a new one, under another name, with "
            f"checkpoint.initial_load_path={path.parent.parent}"
        )
    return common["optimizer"]


def _models(model_chunks: Sequence[torch.nn.Module]) -> list[tuple[str, Any]]:
    from megatron.core.utils import unwrap_model

    models = unwrap_model(list(model_chunks))
    if len(models) == 1:
        return [("model", models[0])]
    return [(f"model{index}", model) for index, model in enumerate(models)]


def _model_state(model_chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    return {name: model.sharded_state_dict(metadata=dict(_METADATA)) for name, model in _models(model_chunks)}


def _layout() -> dict[str, int]:
    from megatron.core import parallel_state

    return {
        "world": dist.get_world_size(),
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "cp": parallel_state.get_context_parallel_world_size(),
    }


def _allocate_moments(optimizer: Any) -> None:
    """Give Adam its zero moments if it has not stepped yet, so that a save before the first step is whole too."""
    for member in members(optimizer):
        if not member.is_stub_optimizer and member.init_state_fn is not None:
            member.init_state_fn(member.optimizer, member.config)


def _restore_rng_or_say_why_not(loaded: dict[str, Any], path: Path, saved_layout: dict[str, int]) -> None:
    if loaded:
        restore_rng(loaded[RNG_KEY])
    elif dist.get_rank() == 0:
        logger.warning(
            "%s was saved on layout %s and is loaded on %s: random states start from the seed.",
            path.name,
            saved_layout,
            _layout(),
        )


@torch.no_grad()
def _fill(sharded: ShardedTensor, loaded: torch.Tensor) -> None:
    """Put what was loaded into the caller's tensor; Megatron has read into its memory already where that is dense."""
    if sharded.data is None:
        sharded.data = loaded
    elif sharded.data.data_ptr() != loaded.data_ptr():
        sharded.data.copy_(loaded)
