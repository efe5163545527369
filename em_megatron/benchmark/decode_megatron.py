"""`decode` through the Megatron model: its MemoryCache, beside the same model with a cache of all keys and values."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from em_megatron.benchmark.models import one_rank
from em_megatron.benchmark.peers import GrowingCache
from em_megatron.config import RunConfig
from em_megatron.model.initialization import initialize_weights
from em_megatron.model.language_model import build_model, memory_cache
from em_megatron.model.memory_attention import MemoryAttention
from em_megatron.model.memory_cache import MemoryCache
from em_megatron.model.sizes import shape_of


@dataclass(frozen=True)
class MegatronGeneration:
    """`decode.Generation`; logits of all tokens, as a generation with the model has them."""

    model: nn.Module
    cache: MemoryCache | GrowingCache

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.model(tokens, None, None, inference_context=self.cache, runtime_gather_output=True)
        return out

    @property
    def num_bytes(self) -> int:
        return self.cache.num_bytes


class MegatronBackend:
    """`decode.Backend` on one rank, whose groups live as long as `stack`."""

    peer = "cache of all keys and values, random numbers"

    def __init__(self, config: RunConfig, vocabulary: int, device: torch.device, stack: ExitStack) -> None:
        layout = stack.enter_context(one_rank(config, device))
        self.model = build_model(config, vocabulary, layout.pg_collection).to(device).eval()
        layers = shape_of(config.model).num_layers
        initialize_weights([self.model], config.seed, config.model.init_method_std, layers)
        self.notes = ["The peer's cache is a buffer of its final size, into which a token writes only its own place."]

    def begin(self) -> MegatronGeneration:
        return MegatronGeneration(self.model, memory_cache(self.model, batch_size=1))

    def peer_after(self, context: int, tokens: int) -> MegatronGeneration:
        attentions = [module for module in self.model.modules() if isinstance(module, MemoryAttention)]
        like = next(self.model.parameters())
        return MegatronGeneration(self.model, GrowingCache(attentions, context, context + tokens, like))
