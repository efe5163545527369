"""Melodi's layers in Megatron's stack: each window's summary tokens are put behind its tokens, and taken away at the end."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from torch import Tensor

from em_megatron.model.elastic_attention import ElasticTransformerConfig
from em_megatron.model.melodi_cache import MelodiCache
from em_megatron.model.norm import RMSNorm


class SummaryTokens(torch.nn.Module):
    """The learned embeddings that every window's summary tokens start from, [U, D]."""

    def __init__(self, config: ElasticTransformerConfig) -> None:
        super().__init__()
        shape = (config.memory.short_term_tokens, config.hidden_size)
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))


class MelodiStack(HybridStack):
    """Positions are [x of window 0; u; x of window 1; u; …] between the layers, T + U·T/W of them."""

    def __init__(self, config: ElasticTransformerConfig, submodules: HybridStackSubmodules, **kwargs: Any) -> None:
        super().__init__(config, submodules, **{**kwargs, "post_layer_norm": False})
        self.window, self.summary = config.memory.block_length, config.memory.short_term_tokens
        self.summary_tokens = SummaryTokens(config) if self.pre_process else None
        self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon) if self.post_process else None

    def forward(self, hidden_states: Any, *args: Any, inference_context: Any = None, **kwargs: Any) -> Tensor:
        """[T, b, D] of the embedding → [T, b, D], normed on the last stage; [T', b, D] between the stages."""
        if inference_context is not None:
            return self._continue(hidden_states, inference_context)
        if self.summary_tokens is not None:
            hidden_states = self._whole(self._with_summaries, hidden_states)
        hidden: Tensor = super().forward(hidden_states, *args, **kwargs)
        if self.final_norm is None:
            return hidden
        return self._whole(self._without_summaries, self.final_norm(hidden))

    def _whole(self, function: Any, x: Tensor) -> Tensor:
        """function(all positions); under sequence parallelism x and the result are this rank's part."""
        if not self.config.sequence_parallel:
            found: Tensor = function(x)
            return found
        group = self.pg_collection.tp
        whole = tensor_parallel.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=group)
        part: Tensor = tensor_parallel.scatter_to_sequence_parallel_region(function(whole), group=group)
        return part

    def _with_summaries(self, x: Tensor) -> Tensor:
        windows = x.unflatten(0, (-1, self.window))
        return torch.cat([windows, self._summaries(x).expand(windows.shape[0], -1, -1, -1)], 1).flatten(0, 1)

    def _without_summaries(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.window + self.summary))[:, : self.window].flatten(0, 1)

    def _summaries(self, like: Tensor) -> Tensor:
        """[U, b, D]."""
        assert self.summary_tokens is not None
        return self.summary_tokens.weight.to(like.dtype)[:, None].expand(-1, like.shape[1], -1)

    def _continue(self, x: Tensor, cache: MelodiCache) -> Tensor:
        """Decoding on one pipeline stage: the tokens go on where the cache stands, window piece by window piece."""
        assert self.final_norm is not None
        pieces, start = [], 0
        while start < x.shape[0]:
            stop = min(x.shape[0], start + cache.room)
            piece = x[start:stop]
            if stop - start == cache.room:
                piece = torch.cat([piece, self._summaries(x)])
            for layer in self.layers:
                piece = layer(piece, inference_context=cache)
            pieces.append(piece[: stop - start])
            start = stop
        found: Tensor = self.final_norm(torch.cat(pieces))
        return found
