"""Elastic Memory for `transformers`: a Transformer that reads texts of any length in constant memory; and, by
`memory_kind`, the systems it is measured against.

This file and the six it imports travel with the weights; they need torch and transformers alone. After arXiv
2602.11212, written anew from its public description.

Legend: g rows of the batch that stand at the same place, b rows of the batch, n tokens at hand.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .cache_elastic_memory import ElasticMemoryCache, LayerMemory, RowGroup, real_tokens, refuse_packing
from .configuration_elastic_memory import ElasticMemoryConfig, reader_kinds
from .hippo_elastic_memory import MemoryReader, memory_reader
from .layers_elastic_memory import (
    ElasticMemoryDecoderLayer,
    KindAttention,
    MelodiDecoderLayer,
    TokenMixer,
    rotary_tables,
)

# `past_key_values` is called `cache` since transformers 5.24.
CACHE = "cache" if "cache" in {x.name for x in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"


class ElasticMemoryPreTrainedModel(PreTrainedModel):
    config_class = ElasticMemoryConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ElasticMemoryDecoderLayer", "MelodiDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _is_stateful = True  # what was read cannot be taken back: no assisted generation

    def _init_weights(self, module: nn.Module) -> None:
        """Of what is not loaded: where a model goes on with another memory, the parameters of that."""
        super()._init_weights(module)
        if isinstance(module, KindAttention):
            for name, start in module.start.items():
                init.constant_(getattr(module, name), start)
        elif isinstance(module, TokenMixer):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, MelodiDecoderLayer) and module.long_gate is not None:
            init.zeros_(module.long_gate)
        elif isinstance(module, ElasticMemoryModel) and module.summary_tokens is not None:
            init.normal_(module.summary_tokens, std=self.config.initializer_range)

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
        self.summary_tokens = nn.Parameter(torch.empty(shape)) if melodi else None
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
            if self.config.memory_kind not in reader_kinds(name):
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
