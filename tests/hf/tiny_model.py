"""A small model of `transformers`, and batches for it."""

from __future__ import annotations

import torch

from em_megatron.hf.configuration_elastic_memory import ElasticMemoryConfig
from em_megatron.hf.modeling_elastic_memory import ElasticMemoryForCausalLM

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "block_length": 8,
    "memory_order": 12,
    "memory_slots": 5,
    "memory_sampler": "exponential",
    "initializer_range": 0.3,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
# The other memory kinds, busy in 37 tokens.
KINDS: dict[str, dict[str, object]] = {
    "full": {"memory_kind": "full"},
    "transformer_xl": {"memory_kind": "transformer_xl"},
    "subsample": {"memory_kind": "subsample"},
    "infini": {"memory_kind": "infini", "memory_update": "delta"},
    "memorizing": {"memory_kind": "memorizing", "memory_pairs": 13, "memory_top_k": 3, "memory_layers": [1]},
    "melodi": {
        "memory_kind": "melodi",
        "memory_layers": [1],
        "memory_short_term_tokens": 3,
        "memory_long_term_tokens": 4,
        "memory_long_term_increment": 2,
    },
}
GREEDY = {"do_sample": False, "max_new_tokens": 20}


def make(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object) -> ElasticMemoryForCausalLM:
    torch.manual_seed(seed)
    return ElasticMemoryForCausalLM(ElasticMemoryConfig(**{**SHAPE, **changes})).to(dtype).eval()


def left_padded(*rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(row.shape[1] for row in rows)
    padded = [torch.cat([torch.zeros(1, length - row.shape[1], dtype=row.dtype), row], 1) for row in rows]
    mask = [torch.arange(length)[None] >= length - row.shape[1] for row in rows]
    return torch.cat(padded), torch.cat(mask).long()
