"""Checkpoints that every rank writes a part of, that load on another layout, and that a kill cannot spoil.

A checkpoint is written to `.step_00000020.writing` and renamed to `step_00000020` when it is whole: megatron.core's
distributed checkpoint (weights, optimizer, RNG states), train_state.json, config.yaml, and COMPLETE, which lists the
size of every file and the SHA-256 of the small ones. A folder without COMPLETE, or whose files differ from it, is
never loaded.
"""

import json
import logging
import queue
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from em_megatron.checkpoint.folder import (
    CheckpointError,
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

logger = logging.getLogger(__name__)

# fully_reshardable is the one format of the distributed optimizer that loads on every other layout.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
_RNG_KEY = "rng_state"


class CheckpointStore:
    """The checkpoints of one run, in `root`, of which the newest `keep_last` are kept.

    Every method is called by all ranks together and gives or raises the same on all of them.
    """

    def __init__(self, root: Path, keep_last: int) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, but at least 1 checkpoint must be kept.")
        self.root = Path(root)
        self.keep_last = keep_last

    def save(
        self,
        step: int,
        *,
        model_chunks: Sequence[torch.nn.Module],
        optimizer: Any,
        scheduler: Any,
        train_state: dict[str, Any],
        config_text: str,
    ) -> Path:
        """Write the state after `step` optimizer steps and drop old checkpoints; returns the checkpoint's folder.

        `model_chunks` are Megatron models or their DDP wrappers (several with interleaving), `optimizer` a
        MegatronOptimizer, `scheduler` anything with state_dict(). `train_state` must be JSON. A checkpoint of this
        step that is there already is replaced. Raises CheckpointError when a rank could not write.
        """
        from megatron.core import dist_checkpointing

        writing = self.root / writing_name(step)
        document = _on_rank_zero(lambda: self._prepare(writing, train_state))
        _require_shared(writing)
        state = _model_state(model_chunks)
        _allocate_moments(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), metadata=dict(_METADATA))
        state["scheduler"] = scheduler.state_dict()
        state[_RNG_KEY] = _sharded_rng()
        try:
            with _results_in_this_process():
                dist_checkpointing.save(state, str(writing), _parallel_over_replicas())
        except CheckpointException as error:  # a BaseException: no caller's handler would see it
            reason = next((str(failure[0]) for failure in error.failures.values()), "unknown reason")
            raise CheckpointError(
                f"{writing} could not be written ({reason}); the checkpoints before it are whole"
            ) from None

        def complete() -> Path:
            texts = {"train_state.json": document, "config.yaml": config_text}
            finish(writing, step, texts, {"layout": _layout()})
            final = replace_step(self.root, writing, step)
            retain(self.root, self.keep_last)
            return final

        return _on_rank_zero(complete)

    def latest(self, *, resuming: bool = False) -> Path | None:
        """The newest whole checkpoint, None without any; damaged ones are passed over with a warning.

        With `resuming` it first removes what a killed save left. Leave it False where only reading is meant, such as
        evaluation: the run may be alive and in the middle of a save.
        """

        def newest() -> Path | None:
            if resuming:
                clean_leftovers(self.root)
            steps = complete_steps(self.root)
            return self.root / step_name(steps[-1]) if steps else None

        return _on_rank_zero(newest)

    def load(
        self,
        path: Path,
        *,
        model_chunks: Sequence[torch.nn.Module],
        optimizer: Any | None = None,
        scheduler: Any | None = None,
    ) -> dict[str, Any]:
        """Restore what is given and return the train_state that was saved with it.

        Without an optimizer only weights are read (evaluation). With one, the RNG states of python, numpy, torch and
        Megatron's tracker are restored too if the layout is the one that saved; otherwise they stay as the caller
        seeded them, and that is logged. Raises CheckpointError when the checkpoint is of another model or optimizer.
        """
        from megatron.core import dist_checkpointing

        path = Path(path)
        marker, train_state = _on_rank_zero(lambda: _read_documents(path))
        state = _model_state(model_chunks)
        if optimizer is not None:
            state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=True, metadata=dict(_METADATA))
        same_layout = marker["layout"] == _layout()
        if optimizer is not None and same_layout:
            state[_RNG_KEY] = _sharded_rng()
        _check_same_model(state, path, with_optimizer=optimizer is not None)
        loaded = dist_checkpointing.load(state, str(path))
        for name, model in _models(model_chunks):
            model.load_state_dict(loaded[name], strict=True)
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(loaded["scheduler"])
        if _RNG_KEY in state:
            _restore_rng(loaded[_RNG_KEY])
        elif optimizer is not None and dist.get_rank() == 0:
            logger.warning(
                "%s was saved on layout %s and is loaded on %s: random states start from the seed.",
                path.name,
                marker["layout"],
                _layout(),
            )
        return train_state

    def _prepare(self, writing: Path, train_state: dict[str, Any]) -> str:
        try:
            document = json.dumps(train_state, indent=1, sort_keys=True)
        except TypeError as error:
            message = f"train_state cannot be written as JSON ({error}): keep to plain Python values."
            raise CheckpointError(message) from None
        self.root.mkdir(parents=True, exist_ok=True)
        clean_leftovers(self.root)
        writing.mkdir()
        return document


def _on_rank_zero[T](work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank; its exception as CheckpointError, so that no rank waits."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except CheckpointError as error:
            answer[1] = str(error)
        except (OSError, ValueError) as error:
            answer[1] = f"The checkpoint folder cannot be used: {error}."
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise CheckpointError(answer[1])
    result: T = answer[0]
    return result


def _parallel_over_replicas() -> Any:
    """Save strategy in which data-parallel replicas share the writing instead of leaving it to the first."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), replicas)


def _require_shared(folder: Path) -> None:
    seen: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(seen, folder.is_dir())
    if not all(seen):
        raise CheckpointError(
            f"{folder.parent} is not the same folder on every rank (rank {seen.index(False)} does not see what rank 0 "
            "made there): keep checkpoints on a file system that all nodes share."
        )


def _read_documents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if reason := damage(path):
        raise CheckpointError(f"{path} cannot be loaded: {reason}.")
    return read_marker(path), json.loads((path / "train_state.json").read_text())


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
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not part.is_stub_optimizer and part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)


@contextmanager
def _results_in_this_process() -> Iterator[None]:
    """Hand write results over in a plain queue: Megatron would start a manager process, even for a synchronous save,
    which outlives a killed rank and needs an entry script with a __main__ guard."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy

    # The synchronous save goes through the asynchronous one and would warn that the caller should not.
    torch_strategy._logged_mcore_async_deprecation = True
    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


def _sharded_rng() -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(_RNG_KEY, state, (dist.get_world_size(),), (dist.get_rank(),))


def _restore_rng(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _check_same_model(state: dict[str, Any], path: Path, with_optimizer: bool) -> None:
    """Compare what all ranks ask for with what is stored, before any number is overwritten."""
    stored = _on_rank_zero(lambda: _stored_in(path))
    if not with_optimizer:
        stored = {key: shape for key, shape in stored.items() if not key.startswith("optimizer.")}
    asked = _asked_for(state)
    missing, unexpected = sorted(asked.keys() - stored.keys()), sorted(stored.keys() - asked.keys())
    shapes = [
        f"{key} is {list(stored[key])} there and {list(shape)} here"
        for key, shape in sorted(asked.items())
        if key in stored and stored[key] != shape
    ]
    problems = [
        f"{len(found)} {what}, such as {found[0]}"
        for what, found in (
            ("tensors it lacks", missing),
            ("tensors unknown here", unexpected),
            ("tensors of another shape", shapes),
        )
        if found
    ]
    if problems:
        raise CheckpointError(
            f"{path} is a checkpoint of another model or optimizer ({'; '.join(problems)}): "
            "load it with the config.yaml that lies in it."
        )


def _stored_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Key → global shape of every tensor in the checkpoint.

    Read with torch alone: with torch 2.15 Megatron's own load_sharded_metadata fails (and with it every strict load).
    """
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    return {key: tuple(part.size) for key, part in metadata.items() if isinstance(part, TensorStorageMetadata)}


def _asked_for(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Key → global shape of every tensor that any rank asks for."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    mine: dict[str, tuple[int, ...]] = {}

    def note(value: Any) -> None:
        if isinstance(value, ShardedTensorFactory):
            for part in nested_values(value.build()):
                note(part)
        elif isinstance(value, ShardedTensor):
            mine[value.key] = tuple(value.global_shape)

    for value in nested_values(state):
        note(value)
    everyone: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return {key: shape for part in everyone for key, shape in part.items()}
