"""What a memory kind says of itself without being built: layers, sizes, parameters, FLOPs, what it cannot do.

Legend: L block length, d head dimension, h key/value heads, T tokens of a sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from em_megatron.config import MemoryConfig, RunConfig
    from em_megatron.model.sizes import Shape


class Kind:
    """A memory kind. Without overrides: block-local attention in all layers and no parameters of its own.

    name: `memory.kind`. has_memory: whether any layer may have a memory. grows: whether what is kept grows with the
    context. reads_sampler: whether the sampler's moments decide what is read. detaches: whether the memory can do without
    a gradient. whole_layers: whether the kind replaces whole layers (attention and MLP), not the core attention alone.
    """

    name: str
    has_memory = True
    grows = False
    reads_sampler = False
    detaches = True
    whole_layers = False

    def default_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers (from 0) with a memory under `memory.layers=auto`."""
        return tuple(range(num_layers))

    def memory_floats(self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int) -> int:
        """Numbers kept per sequence by `layers` layers (design: elastic_memory.md, section 9)."""
        return 0

    def parameters(self, memory: MemoryConfig, shape: Shape, layers: int) -> int:
        """Parameters beyond those of the Transformer."""
        return 0

    def attention_flops(
        self, memory: MemoryConfig, shape: Shape, layers: int, sequence_length: int, context_parallel_size: int
    ) -> float:
        """Per token, forward and backward, two per multiply-add: all that is not the Transformer's own matrices."""
        return 6.0 * per_key(shape) * shape.num_layers * memory.block_length / 2

    def describe(self, memory: MemoryConfig) -> str:
        """The memory and its sizes in a few words, for reports."""
        return "no memory"

    def weight_identity(self, memory: MemoryConfig, layers: tuple[int, ...]) -> tuple[object, ...]:
        """What decides the kind's own parameters; weights fit a recipe where it is equal. Empty: there are none."""
        return ()

    def check(self, config: RunConfig) -> None:
        """Raises ConfigError for sizes, options and layouts that cannot work."""
        from em_megatron.config import ConfigError

        if config.memory.detach_memory and not self.detaches:
            raise ConfigError(
                f"memory.detach_memory has no meaning for memory.kind '{self.name}', which learns through its memory: leave "
                "it out"
            )


def per_key(shape: Shape) -> int:
    """Multiply-adds per query token and key that it meets: score and value, all heads."""
    return 2 * shape.num_attention_heads * shape.kv_channels


def history_share(block_length: int, sequence_length: int) -> float:
    """Share of the tokens of a one-document sample that have a block before theirs."""
    return 1.0 - block_length / sequence_length


def mean_history(block_length: int, sequence_length: int, limit: int | None = None) -> float:
    """Tokens in the blocks before, at most `limit`, on average over the blocks of a one-document sample."""
    blocks = sequence_length // block_length
    seen = [block * block_length if limit is None else min(block * block_length, limit) for block in range(blocks)]
    return sum(seen) / blocks
