"""Attention of one Melodi window over [m; x; u] and the long-term tokens, for packed samples.

Legend: W tokens and U summary tokens of a window, S = U short-term tokens, z long-term tokens there, b samples, hq and hk
heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from em_megatron.config import MemoryConfig
from em_megatron.hf.melodi_elastic_memory import mixed
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.kinds.reading import causal_attention, readers
from em_megatron.ops.transfer import to_device


class Windows:
    """The windows of a micro-batch: which see the window before, and who in them; masks are made once for all layers.

    count: windows of a sample. length: W. summary: U. long_windows: windows whose long-term tokens are kept.
    """

    def __init__(self, layout: BlockLayout, memory: MemoryConfig) -> None:
        self.layout, self.memory = layout, memory
        self.count, self.length, self.summary = layout.num_blocks, layout.block_length, memory.short_term_tokens
        self.long_windows = memory.long_term_tokens // memory.long_term_increment
        history = layout.derived.get(Windows)
        if history is None:
            history = [[0] * layout.batch_size for _ in range(self.count)]
            for reader in readers(layout):
                history[reader.block][reader.row] = reader.history
            layout.derived[Windows] = history
        self.history: list[list[int]] = history

    def all_read(self, window: int) -> bool:
        """Whether every token of the window, of every sample, has the window before as its past."""
        return all(self.history[window]) and not self.layout.shared[window]

    def own_mask(self, window: int, with_short: bool) -> Tensor | None:
        """Who sees whom, [b, 1, W+U, (S+) W+U] bool; None where plain causal attention is right."""
        if not self.layout.shared[window] and (not with_short or self.all_read(window)):
            return None
        return self._once(self._own_mask, window, with_short)

    def _once(self, make: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """What a method makes of these arguments, for all layers of models with as many memory tokens."""
        sizes = (self.summary, self.memory.long_term_increment)
        name = (make.__name__, *arguments, *sizes)
        if name not in self.layout.derived:
            self.layout.derived[name] = make(*arguments)
        found: Tensor = self.layout.derived[name]
        return found

    def _own_mask(self, window: int, with_short: bool) -> Tensor:
        layout, span = self.layout, slice(window * self.length, (window + 1) * self.length)
        ids = layout.segment_ids[:, span]
        rows, width = ids.shape[0], self.length + self.summary
        visible = torch.ones(rows, width, width, dtype=torch.bool, device=ids.device)
        visible[:, : self.length, : self.length] = ids[:, :, None] == ids[:, None, :]
        visible = visible.tril()
        if with_short:
            past = self.reads(window)[:, :, None].expand(-1, -1, self.summary)
            visible = torch.cat([past, visible], -1)
        return visible[:, None]

    def reads(self, window: int) -> Tensor:
        """[b, W+U] bool: positions that see the window before."""
        return self._once(self._reads, window)

    def _reads(self, window: int) -> Tensor:
        span = slice(window * self.length, (window + 1) * self.length)
        tokens = self.layout.memory_tokens[:, span]
        goes_on = to_device(torch.tensor([bool(blocks) for blocks in self.history[window]]), tokens.device)
        return torch.cat([tokens, goes_on[:, None].expand(-1, self.summary)], 1)

    def long_mask(self, window: int, kept: int) -> Tensor | None:
        """[b, 1, 1, z] which long-term tokens are of the document that goes on, of `kept` windows; None: all of them.

        Samples without a history see all: what they find is not used.
        """
        if all(blocks == 0 or blocks >= kept for blocks in self.history[window]):
            return None
        return self._once(self._long_mask, window, kept)

    def _long_mask(self, window: int, kept: int) -> Tensor:
        seen = [[kept - at <= blocks or not blocks for at in range(kept)] for blocks in self.history[window]]
        mask = torch.tensor(seen).repeat_interleave(self.memory.long_term_increment, 1)
        return to_device(mask, self.layout.segment_ids.device)[:, None, None]


def attend_window(
    own: tuple[Tensor, ...],
    short: tuple[Tensor, Tensor] | None,
    long: tuple[Tensor, Tensor] | None,
    gate: Tensor | None,
    windows: Windows,
    window: int,
) -> Tensor:
    """[b, hq, W+U, d].

    Args:
        own: rotated queries [b, hq, W+U, d] and keys, values [b, hk, W+U, d], and the queries before rotation.
        short: rotated keys, and values of the short-term tokens, [b, hk, S, d]; None in the first window.
        long: keys and values of the long-term tokens, [b, hk, z, d], of the last windows; None where there are none.
        gate: [hq·d] of a long-term layer.
    """
    query, key, value, plain = own
    mask = windows.own_mask(window, short is not None)
    if short is not None:
        key, value = torch.cat([short[0], key], 2), torch.cat([short[1], value], 2)
    out = causal_attention(query, key, value) if mask is None else _masked(query, key, value, mask)
    if gate is None or long is None:
        return out
    kept = long[0].shape[2] // windows.memory.long_term_increment
    both = mixed(out, _masked(plain, *long, windows.long_mask(window, kept)), gate)
    if windows.all_read(window):
        return both
    return torch.where(windows.reads(window)[:, None, :, None], both, out)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    if mask is not None:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
