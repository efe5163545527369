"""What a generation with Melodi keeps: constant in the length of the context once the long-term tokens are full."""

from __future__ import annotations

import copy

import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import BaseInferenceContext
from torch import Tensor

from em_megatron.hf.melodi_elastic_memory import WindowMemory


class MelodiLayerCache:
    """Window at hand, short-term and long-term tokens of one layer on this tensor rank."""

    def __init__(self, block_length: int) -> None:
        self.block_length, self.memory = block_length, WindowMemory()
        self.state: Tensor | None = None  # only an elastic memory has one

    @property
    def room(self) -> int:
        """Tokens that still fit the window."""
        return self.block_length - self.memory.tokens % self.block_length

    def memory_ends(self, positions: int) -> bool:
        """Whether so many new positions end the window, its summary tokens among them."""
        return positions > self.room

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for x in vars(self.memory).values() if isinstance(x, torch.Tensor))


class MelodiCache(BaseInferenceContext):
    """The whole model's memory during a generation; every row of the batch has read equally many tokens."""

    def __init__(self, layer_numbers: list[int], block_length: int) -> None:
        super().__init__(InferenceConfig())
        self.layers = {number: MelodiLayerCache(block_length) for number in layer_numbers}

    @property
    def room(self) -> int:
        """Tokens that still fit the window."""
        return next(iter(self.layers.values())).room

    def copy(self) -> MelodiCache:
        """A second one of the same content; tensors are replaced, not changed, so they are shared."""
        other = copy.copy(self)
        other.layers = {number: copy.copy(layer) for number, layer in self.layers.items()}
        return other

    def is_static_batching(self) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers on this rank."""
        return sum(layer.num_bytes for layer in self.layers.values())
