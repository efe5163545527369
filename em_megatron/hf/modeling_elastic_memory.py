"""Elastic Memory for `transformers`: a Transformer that reads texts of any length in constant memory; and, by
`memory_kind`, the systems it is measured against.

This file and the five it imports travel with the weights; they need torch and transformers alone. After arXiv
2602.11212, written anew from its public description.

Legend: g rows of the batch that stand at the same place, h key/value heads, r query heads per key/value head, n tokens
at hand, d head dimension, L block length, S moments read from the memory.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .cache_elastic_memory import ElasticMemoryCache, KeptMemory, LayerMemory, RowGroup, real_tokens, refuse_packing
from .configuration_elastic_memory import ElasticMemoryConfig
from .hippo_elastic_memory import HOST, MemoryReader, made_once, memory_reader, sampler_points
from .kinds_elastic_memory import PARAMETERS, STEPS, Steps
from .melodi_elastic_memory import WindowMemory, mix_tokens, window_attention

# `past_key_values` is called `cache` since transformers 5.24.
CACHE = "cache" if "cache" in {x.name for x in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
QUERIES_AT_ONCE = 512  # bounds the scores held in memory
# Which kinds have what may change after training; what is not named belongs to those with a sampler.
READERS = {"memory_order": ("elastic",), "memory_pairs": ("memorizing",), "memory_top_k": ("memorizing",)}


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
        for name, start in PARAMETERS.get(config.memory_kind, {}).items() if self.has_memory else ():
            self.register_parameter(name, nn.Parameter(torch.full((config.num_attention_heads,), start)))

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
        self.weight = nn.Parameter(torch.randn(count, width) * config.initializer_range)
        self.bias = nn.Parameter(torch.zeros(count))

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
        self.long_gate = nn.Parameter(torch.zeros(width)) if is_long else None

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


class ElasticMemoryPreTrainedModel(PreTrainedModel):
    config_class = ElasticMemoryConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ElasticMemoryDecoderLayer", "MelodiDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _is_stateful = True  # what was read cannot be taken back: no assisted generation

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        functions = [*args, *kwargs.values()]
        if any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions):
            raise ValueError("gradients flow through the memory from block to block: set use_reentrant to False")
        super()._set_gradient_checkpointing(*args, **kwargs)


class ElasticMemoryModel(ElasticMemoryPreTrainedModel):
    """Embedding, layers, final norm. A text of any length goes through all layers block by block."""

    def __init__(self, config: ElasticMemoryConfig) -> None:
        config.check()  # what from_pretrained was given, too
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        melodi = config.memory_kind == "melodi"
        layer = MelodiDecoderLayer if melodi else ElasticMemoryDecoderLayer
        self.layers = nn.ModuleList([layer(config, index) for index in range(config.num_hidden_layers)])
        shape = (config.memory_short_term_tokens, config.hidden_size)
        self.summary_tokens = nn.Parameter(torch.randn(shape) * config.initializer_range) if melodi else None
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def reader(self) -> MemoryReader | None:
        """The elastic memory's reader as the configuration says now; other kinds have none."""
        c = self.config
        if c.memory_kind != "elastic":
            return None
        sampler = (c.memory_slots, c.memory_sampler_a, c.memory_sampler_lo, c.memory_sampler_hi, tuple(c.memory_points))
        return memory_reader(c.memory_order, c.memory_discretization, c.memory_sampler, *sampler)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: ElasticMemoryCache | None = None,
        past_key_values: ElasticMemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states [b, n, hidden]; at padded places they are 0.

        Args:
            input_ids, inputs_embeds: [b, n] or [b, n, hidden], one of them: what is new.
            attention_mask: [b, ≥ n], 0 for padding, its last n columns counting; places count real tokens only.
            cache, past_key_values: two names of one argument; what was read before, moved on in place.
            use_cache: return the cache; by default where no gradient is computed.
        """
        for option in ("output_attentions", "output_hidden_states"):
            if kwargs.get(option) or (kwargs.get(option) is None and getattr(self.config, option, False)):
                raise ValueError(f"attention weights and states of inner layers are not kept: leave {option} out")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        given = past_key_values if cache is None else cache
        cache = ElasticMemoryCache(self.config) if given is None else given
        if not hasattr(cache, "groups"):
            raise ValueError(f"{type(cache).__name__} cannot hold a memory: give an ElasticMemoryCache, or none")
        refuse_packing(attention_mask, *x.shape[:2], **kwargs)
        real = real_tokens(attention_mask, *x.shape[:2])
        counts = [x.shape[1]] * len(x) if real is None else real.sum(1).tolist()
        groups = cache.split(counts)
        moved: list[tuple[RowGroup, list[LayerMemory]]] = []
        if real is None and len(groups) == 1:
            out = self._read(x, groups[0][0], moved)
        else:
            out = torch.zeros_like(x)
            for group, count in groups:
                at = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
                at[group.rows] = True if real is None else real[group.rows]
                if count:
                    out[at] = self._read(x[at].view(-1, count, x.shape[2]), group, moved).flatten(0, 1)
        for group, layers in moved:  # all at once: who was interrupted may call again
            group.layers = layers
        cache.columns += x.shape[1]
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        kept = {CACHE: cache if use_cache or given is not None else None}
        found = BaseModelOutputWithPast(last_hidden_state=out, **kept)
        return found.to_tuple() if kwargs.get("return_dict") is False else found

    def _read(self, x: Tensor, group: RowGroup, moved: list[tuple[RowGroup, list[LayerMemory]]]) -> Tensor:
        """x [g, n, hidden], new to the rows of `group` → the same, normed; where they then stand goes to `moved`."""
        layers = group.layers
        c, reader, pieces, start = self.config, self.reader(), [], 0
        tables = rotary_tables(c.block_length, c.head_dim, c.rope_theta, x.dtype, x.device)
        while start < x.shape[1]:
            filled = layers[0].filled
            stop = min(x.shape[1], start + c.block_length - filled)
            cos, sin = (table[filled : filled + stop - start] for table in tables)
            piece, memories = x[:, start:stop], []
            if self.summary_tokens is not None and filled + stop - start == c.block_length:
                piece = torch.cat([piece, self.summary_tokens.to(x.dtype).expand(x.shape[0], -1, -1)], 1)
            for layer, memory in zip(self.layers, layers, strict=True):
                piece, moved_on = layer(piece, memory, reader, cos, sin)
                memories.append(moved_on)
            layers = memories
            pieces.append(piece[:, : stop - start])
            start = stop
        moved.append((group, layers))
        return self.norm(torch.cat(pieces, 1) if pieces else x)


class ElasticMemoryForCausalLM(ElasticMemoryPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ElasticMemoryConfig) -> None:
        super().__init__(config)
        self.model = ElasticMemoryModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: ElasticMemoryCache | None = None,
        past_key_values: ElasticMemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [b, n or logits_to_keep, vocab_size], and the mean loss where there are labels [b, n] (−100: none)."""
        found = self.model(
            input_ids, attention_mask, cache, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            items = kwargs.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=items)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: found.get(CACHE)})
        return out.to_tuple() if return_dict is False else out

    def set_memory(
        self,
        *,
        order: int | None = None,
        slots: int | None = None,
        sampler: str | None = None,
        sampler_a: float | None = None,
        sampler_lo: float | None = None,
        sampler_hi: float | None = None,
        points: Sequence[float] | None = None,
        pairs: int | None = None,
        top_k: int | None = None,
    ) -> ElasticMemoryForCausalLM:
        """Exchanges the memory's reader; it has no weights. Caches read before follow, down to a smaller order.

        Order belongs to the elastic memory, slots and sampler to it and to subsample, pairs and top_k to memorizing.

        Args:
            order: coefficients kept per head and channel.
            slots: moments read back.
            sampler: uniform, exponential, window, points; with its own sampler_a, or sampler_lo and sampler_hi.
            points: the moments themselves, ascending in (0, 1); implies their sampler and slots.
            pairs: of key and value kept from now on.
            top_k: best pairs that a query reads, 0: all.

        Raises:
            ValueError: values that cannot be, or that this memory does not have; it is then as before.
        """
        if points is not None:
            sampler, slots = "points", len(points)
        changed = copy.deepcopy(self.config)
        given: dict[str, Any] = {
            "memory_order": order,
            "memory_slots": slots,
            "memory_sampler": sampler,
            "memory_sampler_a": sampler_a,
            "memory_sampler_lo": sampler_lo,
            "memory_sampler_hi": sampler_hi,
            "memory_points": None if points is None else list(points),
            "memory_pairs": pairs,
            "memory_top_k": top_k,
        }
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            if self.config.memory_kind not in READERS.get(name, ("elastic", "subsample")):
                raise ValueError(f"a memory of kind '{self.config.memory_kind}' has no {name}: leave it out")
        for config in (changed, self.config):
            for name, value in given.items():
                setattr(config, name, value)
            config.check()
        return self

    @torch.no_grad()
    def read(
        self,
        input_ids: Tensor | Iterable[Tensor],
        cache: ElasticMemoryCache | None = None,
        attention_mask: Tensor | None = None,
    ) -> ElasticMemoryCache:
        """Reads a text, [b, n] ids or a stream of such pieces, in memory that does not grow (full, subsample: it does).

        Returns:
            The cache: `generate_from(cache, question_ids)` goes on from here, as often as you like.

        Raises:
            ValueError: a mask [b, ≥ n] for a stream: it is for one tensor.
        """
        cache = ElasticMemoryCache(self.config) if cache is None else cache
        if isinstance(input_ids, Tensor):
            input_ids = [input_ids]
        elif attention_mask is not None:
            raise ValueError("an attention_mask goes with one tensor of ids: read a stream without padding")
        for ids in input_ids:
            masks: Iterable[Tensor | None] = itertools.repeat(None)
            if attention_mask is not None:
                new = attention_mask[:, attention_mask.shape[1] - ids.shape[1] :].to(self.device)
                masks = new.split(self.config.block_length, 1)
            for part, mask in zip(ids.split(self.config.block_length, 1), masks, strict=False):
                self.model(part.to(self.device), mask, cache)
        return cache

    def generate_from(self, cache: ElasticMemoryCache, input_ids: Tensor, **kwargs: Any) -> Any:
        """`generate` after what `cache` has read, which stays as it was; `input_ids` [b, n] is only what is new."""
        return super().generate(input_ids, **{CACHE: cache.copy().fold()}, **kwargs)

    def load_memory(self, path: str | Path) -> ElasticMemoryCache:
        """What `save` of a cache wrote; see `ElasticMemoryCache.load`."""
        return ElasticMemoryCache.load(path, self)

    def fingerprint(self) -> str:
        """Of what decides a memory's content: shape, blocks, and some numbers of every weight, adapters included."""
        c, digest = self.config, hashlib.sha256()
        shape = (c.num_hidden_layers, c.num_key_value_heads, c.head_dim, c.block_length, c.rope_theta, c.memory_layers)
        digest.update(repr((*shape, c.memory_discretization)).encode())
        if c.memory_kind != "elastic":
            sizes = (c.memory_short_term_tokens, c.memory_long_term_tokens, c.memory_long_term_increment)
            digest.update(repr((c.memory_kind, c.memory_update, c.memory_pairs, sizes)).encode())
        for name, weight in self.named_parameters():
            if weight.is_meta:
                raise ValueError("weights that are offloaded cannot be told apart: load the model without offloading")
            few = weight.detach().flatten()[:: weight.numel() // 64 + 1]
            digest.update(name.encode() + few.float().cpu().numpy().tobytes())
        adapters = {str(getattr(module, "active_adapters", "")) for module in self.modules()}
        digest.update(repr(sorted(adapters)).encode())
        return digest.hexdigest()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As usual; rows that had no token before may then be generated."""
        suppressed = self.generation_config.suppress_tokens
        if new_num_tokens is not None and suppressed:
            self.generation_config.suppress_tokens = [x for x in suppressed if x >= new_num_tokens] or None
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        mask, given = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE)
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError("a prompt is padded on the right: set tokenizer.padding_side = 'left'")
        if given is not None and not hasattr(given, "groups"):
            raise ValueError(f"{type(given).__name__} cannot hold a memory: give an ElasticMemoryCache, or none")
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation '{generation_config.cache_implementation}' cannot hold a memory: leave it out"
            )
        if given is not None and generation_config.use_cache is False:
            raise ValueError("use_cache=False would read the text again at every token: leave it out, or the cache")
        if given is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = ElasticMemoryCache(self.config)
        elif given is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


ElasticMemoryConfig.register_for_auto_class()
ElasticMemoryModel.register_for_auto_class("AutoModel")
ElasticMemoryForCausalLM.register_for_auto_class("AutoModelForCausalLM")
