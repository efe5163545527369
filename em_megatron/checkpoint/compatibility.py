"""Whether a checkpoint holds what a run asks for, decided before any number is overwritten."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from em_megatron.checkpoint.contents import StoredTensor, sharded_tensors
from em_megatron.checkpoint.folder import CheckpointError
from em_megatron.checkpoint.optimizer_formats import weight_of
from em_megatron.checkpoint.ranks import from_all_ranks, on_rank_zero

_OPTIMIZER, _EXTRA = "optimizer.", "extra."


def check_same_model(
    asked_state: dict[str, Any], stored: dict[str, StoredTensor], path: Path, with_optimizer: bool
) -> None:
    """Compare what all ranks ask for with what is stored; CheckpointError on every rank if they differ.

    Without an optimizer its tensors, and extra ones that nobody asks for, may lie there unread.
    """
    asked = {key: shape for part in from_all_ranks(_shapes(asked_state)) for key, shape in part.items()}
    extra = sorted(key for key in stored if key.startswith(_EXTRA))
    if not with_optimizer:
        unread = {key for key in stored if key.startswith(_OPTIMIZER)} | (set(extra) - asked.keys())
        stored = {key: tensor for key, tensor in stored.items() if key not in unread}
    elif extra and not any(key.startswith(_EXTRA) for key in asked):
        raise CheckpointError(
            f"{path} holds {len(extra)} tensors beside model and optimizer, such as {extra[0].removeprefix(_EXTRA)}, "
            "which this run would lose: load it with the config.yaml that lies in it."
        )
    if problems := _differences(asked, stored):
        raise CheckpointError(
            f"{path} is a checkpoint of another model or optimizer ({'; '.join(problems)}): "
            "load it with the config.yaml that lies in it."
        )


def sharded_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's ShardedTensors on the same memory, under keys that no weight has.

    Raises CheckpointError on every rank if the slices of all ranks do not make up whole tensors.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import validate_sharding_integrity

    renamed = {name: replace(tensor, key=_EXTRA + tensor.key) for name, tensor in extra.items()}
    everyone = from_all_ranks([tensor.without_data() for tensor in renamed.values()])

    def validate() -> None:
        try:
            validate_sharding_integrity(everyone)
        except (CheckpointingException, AssertionError) as error:
            raise CheckpointError(f"The slices of an extra tensor do not make up a whole one: {error}") from None

    on_rank_zero(validate)
    return renamed


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {tensor.key: tuple(tensor.global_shape) for tensor in sharded_tensors(state)}


def _differences(asked: dict[str, tuple[int, ...]], stored: dict[str, StoredTensor]) -> list[str]:
    """What differs, in words. A weight and its master copies count as one, for each may be read in place of another."""
    missing = sorted(asked.keys() - stored.keys())
    unexpected = sorted({weight_of(key) for key in stored} - {weight_of(key) for key in asked})
    shapes = [
        f"{key} is {list(stored[key].shape)} there and {list(shape)} here"
        for key, shape in sorted(asked.items())
        if key in stored and stored[key].shape != shape
    ]
    kinds = (
        ("tensors it lacks", missing),
        ("tensors unknown here", unexpected),
        ("tensors of another shape", shapes),
    )
    return [f"{len(found)} {what}, such as {found[0]}" for what, found in kinds if found]
