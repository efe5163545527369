"""`decode` through `transformers`: the class that travels with Hugging Face folders, beside a Llama of its shape.

Imported only where that is asked for: all else of the benchmark runs without transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from em_megatron.config import RunConfig
from em_megatron.hf.cache_elastic_memory import ElasticMemoryCache
from em_megatron.hf.config_mapping import shared_fields
from em_megatron.hf.configuration_elastic_memory import ElasticMemoryConfig
from em_megatron.hf.modeling_elastic_memory import CACHE, ElasticMemoryForCausalLM
from em_megatron.model.language_model import PRECISIONS

MOST_POSITIONS = 2**30  # said to the peer, which makes no table of them


@dataclass(frozen=True)
class TransformersGeneration:
    """`decode.Generation`; logits of the last token, as `generate` has them."""

    model: nn.Module
    cache: Any  # an ElasticMemoryCache or a DynamicCache

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens, use_cache=True, logits_to_keep=1, **{CACHE: self.cache}).logits
        return logits

    @property
    def num_bytes(self) -> int:
        if isinstance(self.cache, ElasticMemoryCache):
            return self.cache.num_bytes
        return sum(x.numel() * x.element_size() for layer in self.cache.layers for x in (layer.keys, layer.values))


class TransformersBackend:
    """`decode.Backend` with weights at random, as `transformers` initializes them."""

    peer = "Llama of transformers with its DynamicCache, random numbers"

    def __init__(self, config: RunConfig, vocabulary: int, device: torch.device) -> None:
        self.like = torch.empty(0, dtype=PRECISIONS[config.training.precision], device=device)
        self.config = exported_config(config, vocabulary)
        self.model = self._ready(ElasticMemoryForCausalLM(self.config))
        self.peer_config = peer_config(self.config)
        self.peer_model = self._ready(LlamaForCausalLM(self.peer_config))
        self.notes = [
            f"Through `ElasticMemoryForCausalLM`, the class that travels with the weights, and transformers "
            f"{transformers.__version__}; the peer is its `LlamaForCausalLM` of the same shape with torch's attention.",
            "The peer's cache grows with every token, and transformers copies all of it to append one: that is in the "
            "peer's time. It begins at the context's length, and takes in a token per turn of the peer.",
        ]

    def _ready(self, model: nn.Module) -> nn.Module:
        return model.to(self.like.device, self.like.dtype).eval()

    def begin(self) -> TransformersGeneration:
        return TransformersGeneration(self.model, ElasticMemoryCache(self.config))

    def peer_after(self, context: int, tokens: int) -> TransformersGeneration:
        """`tokens` is not needed: a DynamicCache has no room set aside."""
        shape = (1, self.config.num_key_value_heads, context, self.config.head_dim)
        cache = DynamicCache(config=self.peer_config)
        for layer in range(self.config.num_hidden_layers):
            cache.update(self.like.new_empty(shape).normal_(), self.like.new_empty(shape).normal_(), layer)
        return TransformersGeneration(self.peer_model, cache)


def exported_config(config: RunConfig, vocabulary: int) -> ElasticMemoryConfig:
    """As an export of such a run has it, less token ids and length in training; `vocabulary` is the padded one."""
    return ElasticMemoryConfig(vocab_size=vocabulary, **shared_fields(config))


def peer_config(ours: ElasticMemoryConfig) -> Any:
    """A Llama of the same shape."""
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "initializer_range", "tie_word_embeddings",
    )  # fmt: skip
    return LlamaConfig(
        **{name: getattr(ours, name) for name in same},
        max_position_embeddings=MOST_POSITIONS,
        attn_implementation="sdpa",
    )
