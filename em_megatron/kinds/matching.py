"""Memory settings of every kind that keep as many numbers per sequence as an Elastic Memory of a given order.

Sizes: design, elastic_memory.md, section 9. Transformer-XL's are set by the block length, Infini-attention's by the head
dimension: they are what they are. Full attention and subsampling keep the whole sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from em_megatron.kinds import kind_of

if TYPE_CHECKING:
    from em_megatron.config import MemoryConfig, ModelConfig, RunConfig
    from em_megatron.model.sizes import Costs

CHOSEN_SIZES = {"elastic": "order", "memorizing": "pairs", "melodi": "long_term_tokens"}


@dataclass(frozen=True)
class Match:
    """A memory section, the settings that make its size, and its floats per sequence beside those wanted."""

    memory: MemoryConfig
    settings: dict[str, Any]
    floats: int
    wanted: int


def matched(model: ModelConfig, memory: MemoryConfig, sequence_length: int, wanted: int) -> Match:
    """The section with the sizes whose floats per sequence come nearest to `wanted`; of fixed kinds as it is."""
    from em_megatron.model.sizes import memory_floats_per_sequence

    def floats(**changes: Any) -> int:
        return memory_floats_per_sequence(model, replace(memory, **changes), sequence_length)

    settings: dict[str, Any] = {}
    if can_match(memory):
        name = CHOSEN_SIZES[memory.kind]
        step = memory.long_term_increment if memory.kind == "melodi" else 1
        one, two = (floats(**{name: count * step}) for count in (1, 2))
        if two > one:
            settings[name] = step * max(1, 1 + round((wanted - one) / (two - one)))
    return Match(replace(memory, **settings), settings, floats(**settings), wanted)


def can_match(memory: MemoryConfig) -> bool:
    """Whether the kind has a size to choose."""
    return memory.kind in CHOSEN_SIZES


# Recipe name → what it changes of the memory section.
COMPARED: dict[str, dict[str, Any]] = {
    "elastic": {"kind": "elastic"},
    "memorizing": {"kind": "memorizing", "top_k": 32},
    "memorizing_dense": {"kind": "memorizing", "top_k": 0},
    "melodi": {"kind": "melodi"},
    "infini": {"kind": "infini", "update": "linear"},
    "infini_delta": {"kind": "infini", "update": "delta"},
    "transformer_xl": {"kind": "transformer_xl"},
    "subsample": {"kind": "subsample"},
    "block_local": {"kind": "block_local"},
    "full": {"kind": "full"},
}
FACTORS = (1, 2, 4, 8, 16)
FFN_STEP = 8  # widths that equal parameters are sought in


@dataclass(frozen=True)
class Compared:
    """A recipe of the comparison: `changes` are its overrides of the base recipe, by section and key."""

    name: str
    changes: dict[str, dict[str, Any]]
    wanted: int
    costs: Costs
    grows: bool


def family(config: RunConfig, vocab_size: int, factors: tuple[int, ...] = FACTORS) -> list[Compared]:
    """Every kind at every factor of the floats of the recipe's Elastic Memory; of kinds of fixed size one each.

    `vocab_size` is the padded one. Melodi also comes with a narrower MLP, so that it has Elastic's parameters in all.
    """
    from em_megatron.model.sizes import memory_floats_per_sequence, num_parameters

    base = replace(config.memory, kind="elastic")
    once = memory_floats_per_sequence(config.model, base, config.data.sequence_length)
    aim = num_parameters(config.model, vocab_size, base)
    found = []
    for name, section in COMPARED.items():
        memory = replace(base, **section)
        for factor in factors if can_match(memory) else factors[:1]:
            match = matched(config.model, memory, config.data.sequence_length, factor * once)
            label = f"{name}_{factor}x" if can_match(memory) else name
            sections: dict[str, dict[str, Any]] = {"memory": section | match.settings}
            found.append(_compared(label, config, match, sections, vocab_size))
            if num_parameters(config.model, vocab_size, memory) > aim * 1.005:
                width = _narrower(config.model, memory, vocab_size, aim)
                narrow = replace(config, model=replace(config.model, ffn_hidden_size=width))
                sections = {"model": {"ffn_hidden_size": width}, **sections}
                found.append(_compared(f"{label}_equal_parameters", narrow, match, sections, vocab_size))
    return found


def _compared(
    name: str, config: RunConfig, match: Match, changes: dict[str, dict[str, Any]], vocab_size: int
) -> Compared:
    from em_megatron.model.sizes import costs

    return Compared(
        name=name,
        changes=changes,
        wanted=match.wanted,
        costs=costs(config.model, match.memory, vocab_size, config.data.sequence_length),
        grows=kind_of(match.memory).grows,
    )


def _narrower(model: ModelConfig, memory: MemoryConfig, vocab_size: int, aim: int) -> int:
    """The MLP width, a multiple of FFN_STEP, with which the model comes nearest to `aim` parameters."""
    from em_megatron.model.sizes import num_parameters

    assert model.ffn_hidden_size is not None
    assert model.num_layers is not None
    assert model.hidden_size is not None
    over = num_parameters(model, vocab_size, memory) - aim
    return model.ffn_hidden_size - FFN_STEP * round(over / (3 * model.num_layers * model.hidden_size * FFN_STEP))


def recipe_text(base: str, compared: Compared, prefix: str) -> str:
    """The base recipe's YAML text with the changes, and a head that says what it is."""
    from omegaconf import OmegaConf

    tree: Any = OmegaConf.merge(OmegaConf.create(base), OmegaConf.create(compared.changes))
    tree.name = f"{prefix}_{compared.name}"
    cost = compared.costs
    grows = ", growing with the context" if compared.grows else ""
    head = (
        f"# {cost.memory_floats_per_sequence:,} memory floats per sequence ({cost.memory_floats_per_sequence / compared.wanted:.3g} of those wanted{grows});\n"
        f"# {cost.parameters:,} parameters, {cost.memory_parameters:,} of them the memory kind's.\n"
        "# Written by launch/match.py.\n"
    )
    return head + OmegaConf.to_yaml(tree)
