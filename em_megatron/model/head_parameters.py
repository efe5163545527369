"""Parameters with numbers for every query head, split by heads over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint


class HeadParameters(torch.nn.Module):
    """A module whose own parameters are all such vectors."""

    tensor_group: Any = None

    def add(self, name: str, size: int, start: float, dtype: torch.dtype) -> None:
        """This rank's part of a vector, `size` numbers that begin as `start`."""
        parameter = torch.nn.Parameter(torch.full((size,), start, dtype=dtype))
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        self.register_parameter(name, parameter)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoints."""
        state = self.state_dict(prefix="", keep_vars=True)
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            dict.fromkeys(state, 0),
            sharded_offsets,
            tp_group=self.tensor_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return found
