"""What differs between the checkpoints of Megatron's Adam optimizers, so that each loads what another has saved.

All of them store moments per parameter under the same keys. The fp32 master copy of a weight X, and the parameter
groups with Adam's step and settings, they keep in different places:

    optimizer                           master copy of X              in the common state
    FP32Optimizer                       X, the weight itself          param_groups
    Float16OptimizerWithFloat16Params   optimizer.state.fp32_param.X  optimizer.param_groups
    DistributedOptimizer                optimizer.state.param.X       optimizer.param_groups, param_state_sharding_type

A ChainedOptimizer of one is stored like that one, of several as {index: state}.
"""

from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch

from em_megatron.checkpoint.contents import StoredTensor, sharded_tensors
from em_megatron.checkpoint.folder import CheckpointError

# The one format of the distributed optimizer that loads on every other layout.
SHARDING_TYPE = "fully_reshardable"
_STATE = "optimizer.state."
_MASTERS = (f"{_STATE}param.", f"{_STATE}fp32_param.")


def weight_of(key: str) -> str:
    """The key of the weight whose master copy `key` names; `key` itself if it names no master copy."""
    return next((key.removeprefix(master) for master in _MASTERS if key.startswith(master)), key)


def members(optimizer: Any) -> list[Any]:
    """The optimizers of a ChainedOptimizer; the optimizer itself if it is none."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def read_fp32_masters(weights: dict[str, Any], optimizer: dict[str, Any], stored: dict[str, StoredTensor]) -> None:
    """Let every fp32 weight and master copy be read from where the checkpoint has it in fp32.

    Changes the keys of ShardedTensors and factories in place. What is stored in fp32 under its own key keeps it, and
    so does what is stored nowhere in fp32. `weights` and `optimizer` may then ask for one key, so load them apart.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    def in_fp32(value: Any, key: str) -> bool:
        value.key = key
        parts = [stored.get(tensor.key) for tensor in sharded_tensors(value)]
        return all(part is not None and part.dtype == torch.float32 for part in parts)

    for value in chain(nested_values(weights), nested_values(optimizer)):
        if not isinstance(value, ShardedTensor | ShardedTensorFactory):
            continue
        own, weight = value.key, weight_of(value.key)
        if value.data.dtype == torch.float32 and not weight.startswith(_STATE):
            places = (own, *(master + weight for master in _MASTERS), weight)
            value.key = next((key for key in places if in_fp32(value, key)), own)


def check_groups(saved: dict[Any, Any], optimizer: Any, path: Path) -> None:
    """CheckpointError if the stored parameter groups are not those of `optimizer`, between which Megatron matches."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    there = [_groups(state) for state in _states(saved)]
    here = [member.optimizer.param_groups for member in members(optimizer)]
    if [len(groups) for groups in there] != [len(groups) for groups in here]:
        raise CheckpointError(
            f"{path} was saved by an optimizer with other groups of parameters ({[len(groups) for groups in there]} "
            f"there and {[len(groups) for groups in here]} here): load it with the config.yaml that lies in it."
        )
    for key in param_group_identifier_keys:
        before, now = (sorted({str(group.get(key)) for group in chain(*lists)}) for lists in (there, here))
        if before != now:
            raise CheckpointError(
                f"{path} was saved by an optimizer with {key} {', '.join(before)} instead of {', '.join(now)}: "
                "load it with the config.yaml that lies in it."
            )


def adapt(loaded: dict[Any, Any]) -> None:
    """Bring what Megatron loaded into the form that the optimizer which asked for it takes, in place.

    Megatron merges the common state as it was saved with the tensors and parameter indices that were asked for.
    """
    nothing: dict[str, Any] = {}
    for state in _states(loaded):
        outer, inner = state.pop("param_groups", []), state.get("optimizer", {}).pop("param_groups", [])
        groups = [{**one, **other} for one, other in zip_longest(outer, inner, fillvalue=nothing)]
        if "param_state" in state:  # DistributedOptimizer
            state["optimizer"] = {"param_groups": groups}
            state["param_state_sharding_type"] = SHARDING_TYPE
        elif "fp32_from_fp16_params" in state:  # Float16OptimizerWithFloat16Params
            state["optimizer"]["param_groups"] = groups
        else:
            state["param_groups"] = groups


def _states(state: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    """The state of each member of a chain."""
    yield from state.values() if all(isinstance(key, int) for key in state) else [state]


def _groups(state: dict[str, Any]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = state.get("param_groups") or state["optimizer"]["param_groups"]
    return groups
