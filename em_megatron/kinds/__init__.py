"""The memory kinds by name: Elastic Memory, and the systems it is measured against, in the same model.

A kind is described here, without torch modules; `em_megatron/model/kind_core.py` and its neighbours build
it, `em_megatron/ops` computes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from em_megatron.kinds.attention import BlockLocal, Full, Subsample, TransformerXL
from em_megatron.kinds.base import Kind
from em_megatron.kinds.elastic import Elastic
from em_megatron.kinds.infini import Infini
from em_megatron.kinds.melodi import Melodi
from em_megatron.kinds.memorizing import Memorizing

if TYPE_CHECKING:
    from em_megatron.config import MemoryConfig

__all__ = ["KINDS", "Kind", "kind_of"]

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (Elastic(), BlockLocal(), Full(), TransformerXL(), Subsample(), Infini(), Memorizing(), Melodi())
}


def kind_of(memory: MemoryConfig) -> Kind:
    """The kind of a memory section.

    Raises:
        ConfigError: an unknown one.
    """
    from em_megatron.config import ConfigError

    if memory.kind not in KINDS:
        raise ConfigError(f"memory.kind '{memory.kind}' is unknown: choose one of {', '.join(KINDS)}")
    return KINDS[memory.kind]
