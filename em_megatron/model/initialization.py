"""Initial weights that do not depend on the parallel layout.

Megatron-Core draws each rank's part from that rank's generator, so the same seed gives another model at another
tensor or pipeline size. Here every global tensor is drawn whole from a generator seeded by its checkpoint key, and
each rank keeps its slice: runs of any layout start from the same numbers.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize_weights(model_chunks: Sequence[torch.nn.Module], seed: int, std: float, num_layers: int) -> None:
    """Draw every parameter of two or more dimensions from N(0, std²), in place.

    Weights that write to the residual stream (linear_proj, linear_fc2) take std/√(2·num_layers), as in GPT-2,
    `num_layers` being the Transformer layers (attention and MLP together) of the whole model. Vectors, that is norm
    weights and biases, keep what their constructors gave. Copies of one tensor, such as tied embeddings on the
    first and last pipeline stage, get equal values. The draw is in fp32 on the CPU and leaves torch's own
    generators alone. Call it before the optimizer is built, which copies the weights. `model_chunks` are Megatron
    models or their DistributedDataParallel wrappers. Raises RuntimeError when a matrix is not part of the model's
    sharded state dict.
    """
    from megatron.core.utils import unwrap_model

    for model in unwrap_model(list(model_chunks)):
        drawn = set()
        for sharded in _sharded_parts(model.sharded_state_dict()):
            if len(sharded.local_shape) < 2:
                continue
            scale = std / math.sqrt(2 * num_layers) if sharded.key.endswith(_RESIDUAL_OUTPUTS) else std
            _fill(sharded, seed, scale)
            drawn.add(sharded.data.data_ptr())
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and parameter.data_ptr() not in drawn:
                raise RuntimeError(f"{name} is not in the model's sharded state dict, so it got no initial weights.")


def _fill(sharded: Any, seed: int, std: float) -> None:
    """Write this rank's slice of the global draw of `sharded`, a megatron.core ShardedTensor, into its data."""
    digest = hashlib.sha256(f"{seed}:{sharded.key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    whole = torch.empty(sharded.global_shape).normal_(0.0, std, generator=generator)
    sharded.data.copy_(whole[sharded.global_slice()])


def _sharded_parts(state: Any) -> Iterator[Any]:
    """The ShardedTensors in a sharded state dict, factories (a gated MLP's two halves) taken apart."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, ShardedTensorFactory):
        yield from _sharded_parts(state.build())
    elif isinstance(state, dict):
        for value in state.values():
            yield from _sharded_parts(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _sharded_parts(value)
