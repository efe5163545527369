"""Readers that a trained checkpoint is tried with: the memory has no weights, so they may change at test time."""

from __future__ import annotations

from em_megatron.config import MemoryConfig
from em_megatron.hf.config_mapping import MEMORY
from em_megatron.hf.configuration_elastic_memory import reader_kinds
from em_megatron.hf.generation import READER_KEYS

FACTORS = (8, 4, 2)
SAMPLERS = (
    "memory.sampler=uniform",
    "memory.sampler=exponential memory.sampler_a=1",
    "memory.sampler=exponential memory.sampler_a=3",
    "memory.sampler=exponential memory.sampler_a=6",
    "memory.sampler=window memory.sampler_lo=0.5 memory.sampler_hi=1.0",
)


def reader_keys(memory: MemoryConfig) -> tuple[str, ...]:
    """Keys of the memory section that are the kind's reader; none for kinds without."""
    return tuple(key for key in READER_KEYS if memory.kind in reader_kinds(MEMORY[key]))


def readers(memory: MemoryConfig) -> list[str]:
    """Changes of the reader that make sense for the kind, the one it was trained with ("") first; none for kinds without.

    Order, slots, pairs: an eighth to four times those of training. Samplers: `SAMPLERS`.
    """
    keys = reader_keys(memory)
    sizes = [name for name in ("order", "slots", "pairs") if name in keys]
    if memory.sampler == "points" and "slots" in sizes:
        sizes.remove("slots")  # the points are as many
    found = [""] if keys else []
    for name in sizes:
        trained = getattr(memory, name)
        wanted = [*(trained // factor for factor in FACTORS), 2 * trained, 4 * trained]
        found += [f"memory.{name}={size}" for size in wanted if size >= 1]
    if "sampler" in keys:
        found += SAMPLERS
    if memory.kind == "memorizing":
        found += [f"memory.top_k={count}" for count in (0, 8, 32) if count != memory.top_k and count <= memory.pairs]
    return found
