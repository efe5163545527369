"""Memory floats, and FLOPs against what a built model does and against pairs of query and key counted one by one."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from em_megatron.kinds import KINDS
from em_megatron.kinds.base import per_key
from em_megatron.model.language_model import build_model
from em_megatron.model.sizes import flops_per_token, memory_floats_per_sequence, memory_layers, shape_of
from em_megatron.ops.block_layout import BlockLayout
from tests.one_rank import one_rank, tiny_config

TOKENS, BLOCK = 512, 64
SIZES = (
    f"data.sequence_length={TOKENS}",
    f"memory.block_length={BLOCK}",
    "memory.order=48",
    "memory.slots=16",
    "memory.pairs=200",
    "memory.short_term_tokens=8",
    "memory.long_term_increment=8",
    "memory.long_term_tokens=40",
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.kv_channels=32",
)
# Of 4 layers, 4 query and 2 key/value heads of 32: floats per sequence (design, elastic_memory.md, section 9).
FLOATS = {
    "elastic": 4 * 2 * 48 * 32 * 2,
    "block_local": 0,
    "full": 4 * 2 * 512 * 32 * 2,
    "subsample": 4 * 2 * 512 * 32 * 2,
    "transformer_xl": 4 * 2 * 64 * 32 * 2,
    "infini": 4 * (32 * 32 + 32) * 2,
    "memorizing": 2 * 200 * 32 * 2,
    "melodi": 4 * 8 * 64 + 2 * 40 * 32 * 2,
}


def config_of(kind: str, *overrides: str):
    return tiny_config(*SIZES, f"memory.kind={kind}", *overrides)


@pytest.mark.parametrize("kind", KINDS)
def test_floats(kind):
    config = config_of(kind)
    assert memory_floats_per_sequence(config.model, config.memory, TOKENS) == FLOATS[kind]


def keys_met(kind: str, pairs: int) -> float:
    """Keys that a query meets on average over a sample of one document, the block's own counted as L/2."""
    total = 0.0
    for token in range(TOKENS):
        history = token // BLOCK * BLOCK
        before = {
            "full": history,
            "transformer_xl": min(history, BLOCK),
            "subsample": 16 if history else 0,
            "memorizing": min(history, pairs),
        }[kind]
        total += BLOCK / 2 + before
    return total / TOKENS


@pytest.mark.parametrize("kind", ["full", "transformer_xl", "subsample", "memorizing"])
def test_flops_of_kinds_that_keep_tokens(kind):
    config, local = config_of(kind, "memory.layers=all", "memory.top_k=0"), config_of("block_local")
    difference = flops_per_token(config.model, config.memory, 32, TOKENS) - flops_per_token(
        local.model, local.memory, 32, TOKENS
    )
    expected = 6 * per_key(shape_of(config.model)) * 4 * (keys_met(kind, 200) - BLOCK / 2)
    assert difference == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("overrides", "least", "most"),
    [
        (("memory.kind=infini",), 0.97, 1.0),  # the last block is not written
        (("memory.kind=infini", "memory.update=delta"), 1.0, 1.2),  # what is taken away and what is added go apart
        (("memory.kind=melodi",), 1.0, 1.03),  # short-term tokens are also projected to queries, which nobody asks for
    ],
)
def test_flops_of_matrix_products(overrides, least, most):
    """Counted in a built model; torch does not count the CPU's attention, so that is taken off the formula."""
    config = tiny_config(*SIZES, *overrides)
    shape, memory = shape_of(config.model), config.memory
    with one_rank() as groups:
        model = build_model(config, 32, groups.pg_collection)
        ids, layout = torch.zeros(1, TOKENS, dtype=torch.int64), BlockLayout.single_document(1, TOKENS, BLOCK)
        with FlopCounterMode(display=False) as counter:
            model(ids, None, None, labels=ids, packed_seq_params=layout).sum().backward()
    layers = len(memory_layers(memory, 4))
    attention = 4 * per_key(shape) * BLOCK / 2
    if memory.kind == "melodi":
        width = BLOCK + 8
        long = sum(min(8 * window, 40) for window in range(8)) / 8
        attention = per_key(shape) * width * (4 * (8 + width / 2) + layers * long) / BLOCK
    planned = flops_per_token(config.model, memory, 32, TOKENS) - 6 * attention
    assert least <= counter.get_total_flops() / TOKENS / planned <= most
