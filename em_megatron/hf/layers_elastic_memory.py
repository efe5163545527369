"""Layers of Elastic Memory for `transformers`, and of the systems it is measured against. This file travels with the weights.

Legend: g rows of the batch that stand at the same place, h key/value heads, r query heads per key/value head, n tokens
at hand, d head dimension, L block length, S moments read from the memory.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_elastic_memory import KeptMemory, LayerMemory
from .configuration_elastic_memory import ElasticMemoryConfig
from .hippo_elastic_memory import HOST, MemoryReader, made_once, sampler_points
from .kinds_elastic_memory import PARAMETERS, STEPS, Steps
from .melodi_elastic_memory import WindowMemory, mix_tokens, window_attention

QUERIES_AT_ONCE = 512  # bounds the scores held in memory


@lru_cache(maxsize=8)
@made_once
def rotary_tables(length: int, dim: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """cos and sin of position · base^(−2i/d), each [length, d/2]."""
    frequency = base ** (-torch.arange(0, dim, 2, **HOST) / dim)
    angle = torch.arange(length, **HOST)[:, None] * frequency
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


class ElasticMemoryAttention(nn.Module):
    """softmax([Q Kmemᵀ | RoPE(Q) RoPE(K)ᵀ + causal] / √d) [Vmem ; V]: one softmax, no parameter for the memory."""

    def __init__(self, config: ElasticMemoryConfig) -> None:
        super().__init__()
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)
        norm = nn.RMSNorm if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = (norm(config.head_dim, eps=config.rms_norm_eps) for _ in range(2))

    def forward(self, x: Tensor, memory: LayerMemory, reader: MemoryReader, cos: Tensor, sin: Tensor) -> Tensor:
        """x [g, n, hidden], n tokens within one block, cos and sin [n, d/2] of their places in it; moves `memory` on."""
        query, key, value = self.project(x)
        slots = memory.memory(reader)
        rotated, _, values = memory.take((rotate(key, cos, sin), key, value))
        pair = torch.stack([rotate(query, cos, sin), query]).unflatten(2, (self.kv_heads, -1))  # [2, g, h, r, n, d]
        past = rotated.shape[2] - x.shape[1]
        out = [
            self._attend(part, rotated, values, slots, past + QUERIES_AT_ONCE * i)
            for i, part in enumerate(pair.split(QUERIES_AT_ONCE, -2))
        ]
        if memory.filled == 0:
            memory.close(reader)
        return self.o_proj(torch.cat(out, -2).flatten(1, 2).transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[g, n, hidden] → query [g, hq, n, d], key and value [g, h, n, d], unrotated."""
        query = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        key = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        return query, key, self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _attend(self, pair: Tensor, keys: Tensor, values: Tensor, slots: Tensor | None, past: int) -> Tensor:
        """Queries rotated and plain [2, g, h, r, m, d], the first at position `past`: [g, h, r, m, d]."""
        last, count = past + pair.shape[-2], 0
        scores = pair[0] @ keys[:, :, None, :last].transpose(-1, -2)
        if last - past > 1:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(past + 1)
            scores = scores.masked_fill(future, float("-inf"))
        if slots is not None:
            slot_keys, slot_values = slots.to(keys.dtype)[:, :, None].chunk(2, -1)
            scores, count = torch.cat([pair[1] @ slot_keys.transpose(-1, -2), scores], -1), slot_keys.shape[-2]
        exact = torch.promote_types(scores.dtype, torch.float32)
        shares = torch.softmax(scores * self.head_dim**-0.5, -1, dtype=exact).to(values.dtype)
        out = shares[..., count:] @ values[:, :, None, :last]
        return out if slots is None else out + shares[..., :count] @ slot_values


class KindAttention(ElasticMemoryAttention):
    """Attention of another memory kind, which may have a number per query head of its own: `gate`, `scale`."""

    def __init__(self, config: ElasticMemoryConfig, layer: int) -> None:
        super().__init__(config)
        self.config, self.has_memory = config, layer in config.memory_layers
        self.start = PARAMETERS.get(config.memory_kind, {}) if self.has_memory else {}
        for name in self.start:
            self.register_parameter(name, nn.Parameter(torch.empty(config.num_attention_heads)))

    def forward(self, x: Tensor, memory: Any, reader: Any, cos: Tensor, sin: Tensor) -> Tensor:
        """As above; places in the block and the reader are the kind's own affair."""
        weights = {name: parameter for name, parameter in self.named_parameters() if "." not in name}
        steps = kind_steps(self.config, self.has_memory)
        out, memory.kept = steps.attend(*self.project(x), memory.kept, memory.tokens, weights)
        memory.tokens += x.shape[1]
        return self.o_proj(out.transpose(1, 2).flatten(2))


def kind_steps(config: ElasticMemoryConfig, has_memory: bool) -> Steps:
    """The kind block after block, as the configuration says now."""
    c = config
    settings: dict[str, Any] = {}
    if c.memory_kind == "subsample":
        sampler = (c.memory_sampler_a, c.memory_sampler_lo, c.memory_sampler_hi, tuple(c.memory_points))
        settings = {"points": sampler_points(c.memory_sampler, c.memory_slots, *sampler).tolist()}
    elif c.memory_kind == "infini":
        settings = {"update": c.memory_update}
    elif c.memory_kind == "memorizing":
        settings = {"pairs": c.memory_pairs, "top_k": c.memory_top_k}
    return STEPS[c.memory_kind](c.block_length, c.rope_theta, has_memory, **settings)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i+d/2}) of x [..., n, d] by angles [n, d/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class ElasticMemoryMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ElasticMemoryConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ElasticMemoryDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each pre-normed."""

    def __init__(self, config: ElasticMemoryConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        kind = config.memory_kind in STEPS
        self.self_attn = KindAttention(config, layer) if kind else ElasticMemoryAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = ElasticMemoryMLP(config)

    def forward(
        self, x: Tensor, memory: Any, reader: Any, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, LayerMemory | KeptMemory]:
        memory = copy.copy(memory)
        x = x + self.self_attn(self.input_layernorm(x), memory, reader, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x)), memory


class TokenMixer(nn.Module):
    """A linear map over the token axis."""

    def __init__(self, config: ElasticMemoryConfig, count: int) -> None:
        super().__init__()
        width = config.block_length + config.memory_short_term_tokens
        self.weight, self.bias = nn.Parameter(torch.empty(count, width)), nn.Parameter(torch.empty(count))

    def forward(self, normed: Tensor) -> Tensor:
        """[g, W+U, hidden] → [g, count, hidden]."""
        return mix_tokens(normed, self.weight, self.bias)


class MelodiDecoderLayer(ElasticMemoryDecoderLayer):
    """A layer of Melodi: attention over [m; x; u], MLP, and the mixers that make m and u anew at a window's end."""

    def __init__(self, config: ElasticMemoryConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.config = config
        is_long, tokens = layer in config.memory_layers, config.memory_short_term_tokens
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.short_mixer = TokenMixer(config, tokens)
        self.summary_mixer = TokenMixer(config, tokens) if layer + 1 < config.num_hidden_layers else None
        self.long_mixer = TokenMixer(config, config.memory_long_term_increment) if is_long else None
        width = config.num_attention_heads * config.head_dim
        self.long_gate = nn.Parameter(torch.empty(width)) if is_long else None

    def forward(self, x: Tensor, memory: Any, reader: Any, cos: Tensor, sin: Tensor) -> tuple[Tensor, KeptMemory]:
        """x [g, n, hidden], n tokens of one window, its summary tokens last where they fill it up."""
        memory = copy.copy(memory)
        ends = x.shape[1] > memory.block_length - memory.filled
        summary = self.config.memory_short_term_tokens if ends else 0
        window = WindowMemory(tokens=memory.tokens, **memory.kept)
        query, *own = self.self_attn.project(self.input_layernorm(x))
        window = window.with_window(*own)
        out = window_attention(query, window, window.short_pair, self.long_gate, self.config.rope_theta)
        x = x + self.self_attn.o_proj(out.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.post_attention_layernorm(x))
        window = window.with_outputs(x, x.shape[1] - summary)
        if summary:
            normed = self.mixer_norm(window.outputs)
            window = self._next_window(window, normed)
            if self.summary_mixer is not None:
                x = torch.cat([x[:, :-summary], x[:, -summary:] + self.summary_mixer(normed)], 1)
        kept = {name: value for name, value in vars(window).items() if isinstance(value, Tensor)}
        memory.tokens, memory.kept = window.tokens, kept
        return x, memory

    def _keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        _, key, value = self.self_attn.project(self.input_layernorm(tokens))
        return key, value

    def _next_window(self, window: WindowMemory, normed: Tensor) -> WindowMemory:
        if self.long_mixer is not None:
            new = self._keys_and_values(self.long_mixer(normed))
            window = window.with_long(*new, self.config.memory_long_term_tokens)
        assert window.outputs is not None
        short = window.outputs[:, -self.config.memory_short_term_tokens :] + self.short_mixer(normed)
        return window.next_window(short, *self._keys_and_values(short))
