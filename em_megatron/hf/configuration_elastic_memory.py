"""Configuration of Elastic Memory models for `transformers`. This file travels with the weights: it needs nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from transformers.configuration_utils import PretrainedConfig

SAMPLERS = ("uniform", "exponential", "window", "points")
KINDS = ("elastic", "block_local", "full", "transformer_xl", "subsample", "infini", "memorizing", "melodi")
DISCRETIZATIONS = ("exact", "zero_order_hold", "bilinear", "forward_euler", "backward_euler")


def reader_kinds(name: str) -> tuple[str, ...]:
    """The kinds whose field of the configuration may change after training."""
    own = {"memory_order": ("elastic",), "memory_pairs": ("memorizing",), "memory_top_k": ("memorizing",)}
    return own.get(name, ("elastic", "subsample"))


class ElasticMemoryConfig(PretrainedConfig):
    """A Transformer whose attention reads a memory of the tokens before the current block: Elastic Memory, of fixed size,
    or one of the systems it is measured against.

    Args:
        vocab_size: rows of the embedding; the tokenizer may use fewer.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
        rms_norm_eps, tie_word_embeddings, initializer_range: as in Llama.
        rope_theta: base of the rotary frequencies; positions count inside a block.
        qk_norm: RMSNorm on the queries and keys of each head.
        training_length: tokens per sample in training.
        max_position_embeddings: for tools that ask; the model has no maximum.
        block_length: tokens per block, L.
        memory_kind: elastic; block_local (none: exports say elastic without layers), full (causal attention),
            transformer_xl (the block before), subsample (raw tokens at the moments), infini, memorizing, melodi.
        memory_layers: layers (from 0) that have a memory (melodi: a long-term one); None: all.
        memory_order: polynomial coefficients kept per head and channel, N.
        memory_slots: moments read back per block, S.
        memory_sampler: which moments: uniform, exponential (dense near the present), window, points.
        memory_sampler_a: steepness of `exponential`, > 0.
        memory_sampler_lo, memory_sampler_hi: ends of `window` in the history, 0 ≤ lo < hi ≤ 1.
        memory_points: the moments of `points`, ascending in (0, 1).
        memory_discretization: how the signal is held between tokens.
        memory_pairs: memorizing: pairs of key and value kept.
        memory_top_k: memorizing: best pairs that a query reads, 0: all.
        memory_update: infini: linear or delta.
        memory_short_term_tokens: melodi: short-term tokens per layer, and summary tokens per block.
        memory_long_term_tokens, memory_long_term_increment: melodi: long-term tokens kept, and new per block.

    Raises:
        ValueError: values that cannot be, in one sentence.
    """

    model_type = "elastic_memory"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (Trainer adds lists to it)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        qk_norm: bool = False,
        training_length: int = 32768,
        max_position_embeddings: int = 1 << 20,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        block_length: int = 2048,
        memory_layers: Sequence[int] | None = None,
        memory_order: int = 540,
        memory_slots: int = 512,
        memory_sampler: str = "uniform",
        memory_sampler_a: float = 3.0,
        memory_sampler_lo: float = 0.0,
        memory_sampler_hi: float = 1.0,
        memory_points: Sequence[float] = (),
        memory_discretization: str = "exact",
        memory_kind: str = "elastic",
        memory_pairs: int = 8192,
        memory_top_k: int = 32,
        memory_update: str = "linear",
        memory_short_term_tokens: int = 64,
        memory_long_term_tokens: int = 4096,
        memory_long_term_increment: int = 32,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.rms_norm_eps, self.rope_theta, self.qk_norm = rms_norm_eps, rope_theta, qk_norm
        self.training_length, self.max_position_embeddings = training_length, max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache, self.block_length = use_cache, block_length
        self.memory_layers = list(range(num_hidden_layers) if memory_layers is None else memory_layers)
        self.memory_order, self.memory_slots, self.memory_sampler = memory_order, memory_slots, memory_sampler
        self.memory_sampler_a, self.memory_points = memory_sampler_a, list(memory_points)
        self.memory_sampler_lo, self.memory_sampler_hi = memory_sampler_lo, memory_sampler_hi
        self.memory_discretization, self.memory_kind = memory_discretization, memory_kind
        self.memory_pairs, self.memory_top_k, self.memory_update = memory_pairs, memory_top_k, memory_update
        self.memory_short_term_tokens = memory_short_term_tokens
        self.memory_long_term_tokens = memory_long_term_tokens
        self.memory_long_term_increment = memory_long_term_increment
        self.check()
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        sizes: tuple[str, ...] = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
        )  # fmt: skip
        kept = ("pairs", "short_term_tokens", "long_term_tokens", "long_term_increment", "order", "slots")
        sizes = (*sizes, "num_key_value_heads", "head_dim", "block_length", *(f"memory_{name}" for name in kept))
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value}: it must be a whole number of at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}: each key/value head serves equally many query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding needs an even number")
        if any(not 0 <= layer < self.num_hidden_layers for layer in self.memory_layers):
            raise ValueError(f"memory_layers {self.memory_layers} does not fit {self.num_hidden_layers} layers")
        if self.memory_discretization not in DISCRETIZATIONS:
            raise ValueError(
                f"memory_discretization '{self.memory_discretization}' is unknown: {', '.join(DISCRETIZATIONS)}"
            )
        if self.memory_kind not in KINDS:
            raise ValueError(f"memory_kind '{self.memory_kind}' is unknown: choose one of {', '.join(KINDS)}")
        if self.memory_update not in ("linear", "delta"):
            raise ValueError(f"memory_update '{self.memory_update}' is unknown: choose linear or delta")
        if not isinstance(self.memory_top_k, int) or self.memory_top_k < 0:
            raise ValueError(f"memory_top_k is {self.memory_top_k}: it must be a whole number of at least 0")
        if self.memory_kind == "melodi" and self.memory_long_term_tokens % self.memory_long_term_increment:
            raise ValueError(
                f"memory_long_term_tokens {self.memory_long_term_tokens} is not a multiple of "
                f"memory_long_term_increment {self.memory_long_term_increment}"
            )
        self._check_sampler()

    def _check_sampler(self) -> None:
        if self.memory_sampler not in SAMPLERS:
            raise ValueError(f"memory_sampler '{self.memory_sampler}' is unknown: choose one of {', '.join(SAMPLERS)}")
        if self.memory_sampler == "exponential" and not 0 < self.memory_sampler_a < float("inf"):
            raise ValueError(f"memory_sampler_a is {self.memory_sampler_a}: it must be above 0")
        if self.memory_sampler == "window" and not 0 <= self.memory_sampler_lo < self.memory_sampler_hi <= 1:
            raise ValueError(
                f"the window from {self.memory_sampler_lo} to {self.memory_sampler_hi} is none: 0 <= lo < hi <= 1"
            )
        points = self.memory_points
        if self.memory_sampler == "points" and len(points) != self.memory_slots:
            raise ValueError(f"{len(points)} memory_points were given for {self.memory_slots} slots: make them equal")
        if any(not 0 < point < 1 for point in points) or any(a >= b for a, b in itertools.pairwise(points)):
            raise ValueError("memory_points must ascend strictly inside (0, 1)")
