"""Megatron models of one rank to measure, whose memory can be exchanged: it has no parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import tensor_parallel

from em_megatron.benchmark.floors import MemorySizes
from em_megatron.config import ConfigError, RunConfig, load_config
from em_megatron.kinds import kind_of
from em_megatron.kinds.matching import COMPARED, matched
from em_megatron.model.elastic_attention import TrapezoidCore
from em_megatron.model.kind_core import KindCore
from em_megatron.model.language_model import PRECISIONS, transformer_config
from em_megatron.model.memory_attention import MemoryAttention
from em_megatron.model.sizes import flops_per_token, memory_floats_per_sequence, shape_of
from em_megatron.ops.dispatch import choose
from em_megatron.parallel import cpu_backend
from em_megatron.parallel.process_groups import Layout, shutdown
from em_megatron.training.setup import initialize_layout
from em_megatron.validate import validate

FULL, LOCAL = "causal attention over the whole sample", "block-local attention, no memory"


def run_config(overrides: Iterable[str], length: int, precision: str, bank_cache: str, seed: int) -> RunConfig:
    """A checked run of one rank; `overrides` give the rest.

    Raises:
        ConfigError: what cannot be.
    """
    config = load_config(
        None,
        [
            "name=benchmark",
            "data.path=none",
            f"data.sequence_length={length}",
            f"training.precision={precision}",
            f"memory.bank_cache={bank_cache or 'null'}",
            f"seed={seed}",
            *overrides,
        ],
    )
    validate(config, 1)
    return config


@contextmanager
def one_rank(config: RunConfig, device: torch.device) -> Iterator[Layout]:
    """Megatron's groups and random states as `training.setup` has them; the thread count stays what it is.

    Raises:
        ConfigError: the trainer would take another device than the one to measure.
    """
    if cpu_backend.device().type != device.type:
        raise ConfigError("models run on the GPU where there is one: hide it with CUDA_VISIBLE_DEVICES= instead")
    threads = torch.get_num_threads()
    layout = initialize_layout(config)
    try:
        tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
        torch.set_num_threads(threads)
        yield layout
    finally:
        shutdown()
        torch.set_num_threads(threads)


def variants(config: RunConfig, orders: Iterable[int], kinds: Iterable[str] = ()) -> dict[str, RunConfig]:
    """By name: the model with a memory of each order, without one, with causal attention over the whole sample, and with
    the memory of each of `kinds`, its size matched to the smallest order where it has a size to choose.
    """

    def with_memory(**changes: Any) -> RunConfig:
        return dataclasses.replace(config, memory=dataclasses.replace(config.memory, **changes))

    found = {f"elastic, order {order}": with_memory(kind="elastic", order=order) for order in orders}
    smallest = with_memory(kind="elastic", order=min(orders)).memory
    found[LOCAL], found[FULL] = with_memory(kind="block_local"), with_memory(kind="full")
    for name in kinds:
        section, tokens = with_memory(**COMPARED[name]).memory, config.data.sequence_length
        wanted = memory_floats_per_sequence(config.model, smallest, tokens)
        found[name] = dataclasses.replace(config, memory=matched(config.model, section, tokens, wanted).memory)
    for variant in found.values():
        validate(variant, 1)
    return found


def has_own_layers(config: RunConfig) -> bool:
    """Whether the kind cannot take its turn in the common model by another core attention."""
    return kind_of(config.memory).whole_layers


def memory_sizes(config: RunConfig) -> MemorySizes | None:
    """As `floors` has them: no slots for block-local attention, None for causal attention over the whole sample.

    Of the other kinds the block's own attention: `beside_the_block` has the rest.
    """
    memory, tokens = config.memory, config.data.sequence_length
    if memory.kind == "full":
        return None
    if memory.kind != "elastic":
        return MemorySizes(1, 0, memory.block_length, tokens)
    return MemorySizes(memory.order, memory.slots, memory.block_length, tokens, memory.superchunk)


def beside_the_block(config: RunConfig) -> float:
    """FLOPs of a token, forward and backward, of a kind that `floors` does not count, beyond block-local attention."""
    if config.memory.kind in ("elastic", "block_local", "full"):
        return 0.0
    local = dataclasses.replace(config.memory, kind="block_local")
    both = (flops_per_token(config.model, memory, 0, config.data.sequence_length) for memory in (config.memory, local))
    return next(both) - next(both)


def kernels_note(config: RunConfig, device: torch.device) -> str:
    """Which implementation the elastic and block-local candidates take."""
    dtype, dim = PRECISIONS[config.training.precision], shape_of(config.model).kv_channels
    choice = choose(config.memory.kernels, device, dtype, dim)
    return f"`memory.kernels={config.memory.kernels}` takes {choice.name} here: {choice.reason}."


def core_of(config: RunConfig) -> type[TrapezoidCore] | type[KindCore]:
    """The class of the kind's core attention."""
    return TrapezoidCore if config.memory.kind in ("elastic", "block_local") else KindCore


class Exchange:
    """The core attentions of the variants of one model, put into it by name.

    A core's own parameters (a number or two per head of infini and memorizing) get gradients; the optimizer of the common
    model does not know them.
    """

    def __init__(self, chunks: list[torch.nn.Module], variants: dict[str, RunConfig], layout: Layout) -> None:
        self.attentions = [m for chunk in chunks for m in chunk.modules() if isinstance(m, MemoryAttention)]
        self.cores = {
            name: [
                core_of(variant)(
                    transformer_config(variant), attention.layer_number, pg_collection=layout.pg_collection
                ).to(cpu_backend.device())
                for attention in self.attentions
            ]
            for name, variant in variants.items()
            if not has_own_layers(variant)
        }

    def put(self, name: str) -> None:
        """From now on the model is this variant."""
        for attention, core in zip(self.attentions, self.cores[name], strict=True):
            attention.core_attention = core
