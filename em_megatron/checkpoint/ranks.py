"""What one rank finds out, known to all: they give or raise the same, so that none waits for one that failed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from em_megatron.checkpoint.folder import CheckpointError


def on_rank_zero[T](work: Callable[[], T]) -> T:
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


def from_all_ranks[T](mine: T) -> list[T]:
    """What every rank brings, in rank order, on every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def require_shared(folder: Path) -> None:
    """Raise CheckpointError on every rank if one of them does not see `folder`."""
    seen = from_all_ranks(folder.is_dir())
    if not all(seen):
        raise CheckpointError(
            f"{folder.parent} is not the same folder on every rank (rank {seen.index(False)} does not see what rank 0 "
            "made there): keep checkpoints on a file system that all nodes share."
        )
