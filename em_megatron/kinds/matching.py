"""Memory settings of every kind that keep as many numbers per sequence as an Elastic Memory of a given order.

Sizes: design, elastic_memory.md, section 9. Transformer-XL's are set by the block length, Infini-attention's by the head
dimension: they are what they are. Full attention and subsampling keep the whole sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from em_megatron.kinds import kind_of

if TYPE_CHECKING:
    from em_megatron.config import MemoryConfig, ModelConfig

FIXED = ("block_local", "transformer_xl", "infini", "full", "subsample")


@dataclass(frozen=True)
class Match:
    """A memory section, the settings that make its size, and its floats per sequence beside those wanted."""

    memory: MemoryConfig
    settings: dict[str, Any]
    floats: int
    wanted: int

    @property
    def ratio(self) -> float:
        """Floats over those wanted."""
        return self.floats / self.wanted


def matched(model: ModelConfig, memory: MemoryConfig, sequence_length: int, wanted: int) -> Match:
    """The section with the sizes whose floats per sequence come nearest to `wanted`; of fixed kinds as it is."""
    from em_megatron.model.sizes import memory_floats_per_sequence

    def floats(**changes: Any) -> int:
        return memory_floats_per_sequence(model, replace(memory, **changes), sequence_length)

    settings: dict[str, Any] = {}
    name = {"elastic": "order", "memorizing": "pairs", "melodi": "long_term_tokens"}.get(memory.kind)
    if name is not None:
        step = memory.long_term_increment if memory.kind == "melodi" else 1
        one, two = (floats(**{name: count * step}) for count in (1, 2))
        if two > one:
            settings[name] = step * max(1, 1 + round((wanted - one) / (two - one)))
    return Match(replace(memory, **settings), settings, floats(**settings), wanted)


def can_match(memory: MemoryConfig) -> bool:
    """Whether the kind has a size to choose."""
    return kind_of(memory).name not in FIXED
