"""The random states of a rank, as an object of a Megatron checkpoint."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

RNG_KEY = "rng_state"


def sharded_rng() -> Any:
    """ShardedObject with the states of python, numpy, torch and Megatron's tracker on this rank."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(RNG_KEY, state, (dist.get_world_size(),), (dist.get_rank(),))


def restore_rng(state: dict[str, Any]) -> None:
    """Set this rank's random states to what `sharded_rng` took."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
