"""The attention operators of the other memory kinds, all blocks of a sample at once; see `em_megatron/kinds`.

An operator takes query [T, b, hq, d], key and value [T, b, hk, d], all unrotated, the layout of the documents, what it
reads by (`Reading`) and the layer's own parameters, and gives [T, b, hq, d]. Beside each lies a query-by-query reference
(`naive.py`), and `em_megatron/hf/kinds_elastic_memory.py` has the same kinds block after block, for decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.kinds.full import full_attention
from em_megatron.ops.kinds.infini import infini_attention
from em_megatron.ops.kinds.memorizing import memorizing_attention
from em_megatron.ops.kinds.reading import Reading
from em_megatron.ops.kinds.subsample import subsample_attention
from em_megatron.ops.kinds.transformer_xl import previous_block_attention

__all__ = ["OPERATORS", "Operator", "Reading"]

Operator = Callable[[Tensor, Tensor, Tensor, BlockLayout, Reading, Mapping[str, Tensor]], Tensor]

OPERATORS: dict[str, Operator] = {
    "full": full_attention,
    "transformer_xl": previous_block_attention,
    "subsample": subsample_attention,
    "infini": infini_attention,
    "memorizing": memorizing_attention,
}
