"""A layer of Melodi as a Megatron-Core module: attention, MLP and token mixers, window after window.

Window w of layer l needs (w − 1, l) and (w, l − 1) only, so a layer goes through all windows of a sample, and layers,
pipeline stages and schedules stay as they are. Definition: design, baselines.md; mathematics of decoding:
hf/melodi_elastic_memory.py.

Legend: W tokens of a window, U = S summary and short-term tokens, T' = T + U·T/W positions, D hidden size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from em_megatron.hf.melodi_elastic_memory import WindowMemory, mix_tokens, window_attention
from em_megatron.model.elastic_attention import ElasticTransformerConfig
from em_megatron.model.head_parameters import HeadParameters
from em_megatron.model.melodi_cache import MelodiCache
from em_megatron.model.norm import RMSNorm
from em_megatron.model.sizes import memory_layers
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.kinds.reading import rotated
from em_megatron.ops.melodi import Windows, attend_window


class TokenMixer(torch.nn.Module):
    """A linear map over the token axis, [k, W+U] and a bias per token; the same on every tensor rank."""

    def __init__(self, config: ElasticTransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(outputs, inputs, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(outputs, dtype=config.params_dtype))

    def forward(self, normed: Tensor) -> Tensor:
        """[W+U, b, D] → [k, b, D]."""
        return mix_tokens(normed.transpose(0, 1), self.weight, self.bias).transpose(0, 1)


class LongTermGate(HeadParameters):
    """g, one number per query head and channel, [hq·d]; 0 at the start."""

    weight: torch.nn.Parameter

    def __init__(self, config: ElasticTransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__()
        assert config.kv_channels is not None
        self.tensor_group = groups.tp
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.add("weight", heads * config.kv_channels, 0.0, config.params_dtype)


class MelodiLayer(MegatronModule):
    """Attention over [m; x; u], MLP, and the mixers that make m of the next window and u of the next layer.

    Under sequence parallelism the layer gathers its positions and works on whole windows, as every tensor rank must;
    its linear layers are split over tensor ranks, its norms and mixers are not.
    """

    def __init__(
        self, config: ElasticTransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection, **_: Any
    ) -> None:
        super().__init__(config)
        self.layer_number, self.tensor_group = layer_number, pg_collection.tp
        self.splits_sequence = config.sequence_parallel
        inner = self.inner = copy.copy(config)
        inner.sequence_parallel = False
        memory, hidden = config.memory, config.hidden_size
        assert config.kv_channels is not None
        assert config.num_query_groups is not None
        self.dim = config.kv_channels
        query = config.num_attention_heads * self.dim
        groups: dict[str, Any] = {"config": inner, "bias": False, "skip_bias_add": True, "tp_group": pg_collection.tp}
        init: Any = config.init_method
        self.input_layernorm = RMSNorm(inner, hidden, config.layernorm_epsilon)
        self.linear_qkv = ColumnParallelLinear(
            hidden, query + 2 * config.num_query_groups * self.dim, init_method=init, gather_output=False, **groups
        )
        self.linear_proj = RowParallelLinear(query, hidden, init_method=init, input_is_parallel=True, **groups)
        head_norm = RMSNorm if config.qk_layernorm else None
        self.q_layernorm, self.k_layernorm = (
            head_norm(inner, self.dim, config.layernorm_epsilon) if head_norm else None for _ in range(2)
        )
        self.pre_mlp_layernorm = RMSNorm(inner, hidden, config.layernorm_epsilon)
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        self.mlp = MLP(inner, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp)
        width, tokens = memory.block_length + memory.short_term_tokens, memory.short_term_tokens
        self.mixer_norm = RMSNorm(inner, hidden, config.layernorm_epsilon)
        self.short_mixer = TokenMixer(inner, width, tokens)
        self.summary_mixer = TokenMixer(inner, width, tokens) if layer_number < config.num_layers else None
        self.is_long_term = layer_number - 1 in memory_layers(memory, config.num_layers)
        self.long_mixer = TokenMixer(inner, width, memory.long_term_increment) if self.is_long_term else None
        self.long_gate = LongTermGate(inner, pg_collection) if self.is_long_term else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: BlockLayout | None = None,
        inference_context: MelodiCache | None = None,
        **_: Any,
    ) -> Tensor:
        """[T', b, D] → the same; under sequence parallelism this rank's part of T'.

        With an inference context: n tokens of one window, followed by its summary tokens where they fill it up.

        Raises:
            ValueError: neither a layout nor a cache was given.
        """
        if inference_context is not None:
            return self._continue(hidden_states, inference_context)
        if packed_seq_params is None:
            raise ValueError("MelodiLayer needs a BlockLayout as packed_seq_params, or a MelodiCache")
        if self.splits_sequence:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.tensor_group
            )
        windows = Windows(packed_seq_params, self.inner.memory)
        out = self._all_windows(hidden_states, windows)
        if self.splits_sequence:
            out = tensor_parallel.scatter_to_sequence_parallel_region(out, group=self.tensor_group)
        return out

    def _all_windows(self, hidden: Tensor, windows: Windows) -> Tensor:
        queries, keys, values = self._project(self.input_layernorm(hidden))
        turned = [x.unflatten(0, (windows.count, -1)) for x in (queries, keys, values)]
        base, first = self.inner.rotary_base, windows.summary
        # RoPE positions S … S+W+U−1 in every window; m stands at 0 … S−1.
        q_rotated, k_rotated = (rotated(x.permute(0, 2, 3, 1, 4), first, base) for x in turned[:2])
        queries, values = (turned[i].permute(0, 2, 3, 1, 4) for i in (0, 2))
        out: list[Tensor] = []
        short: tuple[Tensor, Tensor] | None = None
        long: list[tuple[Tensor, Tensor]] = []
        for window, x in enumerate(hidden.chunk(windows.count)):
            context = self._core(
                (q_rotated[window], k_rotated[window], values[window], queries[window]), short, long, windows, window
            )
            after = self._after_attention(x, context.permute(2, 0, 1, 3).flatten(2))
            normed = self.mixer_norm(after)
            own, summary = after[: windows.length], after[windows.length :]
            made = summary if self.summary_mixer is None else summary + self.summary_mixer(normed)
            out += [own, made]
            if window + 1 < windows.count:
                key, value = self._keys_and_values(summary + self.short_mixer(normed))
                short = (rotated(key, 0, base), value)
                if self.long_mixer is not None:
                    long = [*long, self._keys_and_values(self.long_mixer(normed))][-windows.long_windows :]
        return torch.cat(out)

    def _core(
        self,
        window_tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        short: tuple[Tensor, Tensor] | None,
        long: list[tuple[Tensor, Tensor]],
        windows: Windows,
        window: int,
    ) -> Tensor:
        """Attention of one window, [b, hq, W+U, d]; recomputed in backward where the run says so."""
        gate = self.long_gate.weight if self.long_gate is not None else None
        past = [*(short or ()), *(x for pair in long for x in pair)]

        def attend(*tensors: Tensor) -> Tensor:
            own, rest = tensors[:4], list(tensors[4:])
            before = (rest[0], rest[1]) if short is not None else None
            kept = (torch.cat(rest[2::2], 2), torch.cat(rest[3::2], 2)) if long else None
            return attend_window(own, before, kept, gate, windows, window)

        if self.config.recompute_granularity == "selective" and self.training:
            found: Tensor = tensor_parallel.checkpoint(attend, False, *window_tensors, *past)
            return found
        return attend(*window_tensors, *past)

    def _project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, b, D] → query [n, b, hq, d], key and value [n, b, hk, d] of this tensor rank, unrotated."""
        mixed_qkv, _ = self.linear_qkv(normed)
        assert self.inner.num_query_groups is not None
        groups = self.inner.num_query_groups // self.inner.tensor_model_parallel_size
        heads = mixed_qkv.unflatten(-1, (groups, -1, self.dim))
        query, key, value = heads[..., :-2, :].flatten(2, 3), heads[..., -2, :], heads[..., -1, :]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value

    def _keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of memory tokens [n, b, D], through the input norm: [b, hk, n, d] each, unrotated."""
        _, key, value = self._project(self.input_layernorm(tokens))
        return key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)

    def _after_attention(self, x: Tensor, context: Tensor) -> Tensor:
        """Output projection and MLP with their residuals: x [n, b, D], context [n, b, hq·d] → [n, b, D]."""
        x = x + self._dropped(self.linear_proj(context)[0])
        return x + self._dropped(self.mlp(self.pre_mlp_layernorm(x))[0])

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.hidden_dropout, self.training) if self.config.hidden_dropout else x

    def _continue(self, x: Tensor, cache: MelodiCache) -> Tensor:
        """Decoding: [n, b, D], n within one window, its summary tokens last where they fill it up."""
        layer = cache.layers[self.layer_number]
        memory, tokens = layer.memory, x.shape[0]
        summary = self.inner.memory.short_term_tokens if layer.memory_ends(tokens) else 0
        query, key, value = (part.permute(1, 2, 0, 3) for part in self._project(self.input_layernorm(x)))
        memory = memory.with_window(key, value)
        gate = self.long_gate.weight if self.long_gate is not None else None
        context = window_attention(query, memory, memory.short_pair, gate, self.inner.rotary_base)
        after = self._after_attention(x, context.permute(2, 0, 1, 3).flatten(2))
        memory = memory.with_outputs(after.transpose(0, 1), tokens - summary)
        layer.memory = memory if not summary else self._next_window(memory)
        if summary and self.summary_mixer is not None:
            assert memory.outputs is not None
            made = self.summary_mixer(self.mixer_norm(memory.outputs.transpose(0, 1)))
            after = torch.cat([after[:-summary], after[-summary:] + made])
        return after

    def _next_window(self, memory: WindowMemory) -> WindowMemory:
        assert memory.outputs is not None
        outputs = memory.outputs.transpose(0, 1)
        normed = self.mixer_norm(outputs)
        if self.long_mixer is not None:
            memory = memory.with_long(
                *self._keys_and_values(self.long_mixer(normed)), self.inner.memory.long_term_tokens
            )
        short = outputs[-self.inner.memory.short_term_tokens :] + self.short_mixer(normed)
        return memory.next_window(short.transpose(0, 1), *self._keys_and_values(short))
