"""Which tensors a checkpoint holds, and which ones a sharded state consists of."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


class StoredTensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Key → global shape and dtype of every tensor in the checkpoint.

    Read with torch alone: with torch 2.15 Megatron's own load_sharded_metadata fails (and with it every strict load).
    """
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        key: StoredTensor(tuple(part.size), part.properties.dtype)
        for key, part in metadata.items()
        if isinstance(part, TensorStorageMetadata)
    }


def sharded_tensors(value: Any) -> list[Any]:
    """The ShardedTensors in a state dict or one of its values, those that a factory builds included."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if isinstance(value, ShardedTensor):
        return [value]
    if isinstance(value, ShardedTensorFactory):
        value = value.build()
    if not isinstance(value, dict | list):
        return []
    return [tensor for part in nested_values(value) for tensor in sharded_tensors(part)]
