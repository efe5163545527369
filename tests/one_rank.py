"""A world of one rank inside the test process, and tiny models built in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from em_megatron.config import RunConfig, load_config
from em_megatron.parallel.process_groups import Layout, initialize, shutdown

TINY = (
    "name=test",
    "data.path=nowhere",
    "data.sequence_length=40",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.kv_channels=8",
    "model.ffn_hidden_size=48",
    "model.make_vocab_size_divisible_by=8",
    "memory.block_length=8",
    "memory.order=12",
    "memory.slots=5",
    "memory.bank_cache=",
    "training.precision=fp32",
)


def tiny_config(*overrides: str) -> RunConfig:
    """A model of two layers on samples of five blocks."""
    return load_config(None, [*TINY, *overrides])


@contextmanager
def one_rank() -> Iterator[Layout]:
    """Megatron's groups for one CPU rank, taken down at the end."""
    threads = torch.get_num_threads()
    layout = initialize()
    try:
        yield layout
    finally:
        shutdown()
        torch.set_num_threads(threads)
