"""The Triton kernels in Triton's interpreter, against the fp64 references: outputs, states and every gradient by name.

The interpreter takes tiles of 16, so that sizes of a few tens already have several tiles and ragged ends. Inputs are
strided views, new buffers are NaN until they are written.
"""

from __future__ import annotations

import pytest
import torch

from em_megatron.hippo.banks import MemoryBanks
from em_megatron.hippo.samplers import exponential
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.dispatch import interpreting
from em_megatron.ops.memory import memory_slots
from tests.ops.comparison import compare_attention, compare_memory, compare_passing_states, draw

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="Triton compiles for the GPU here: see test_on_gpu.py"),
    pytest.mark.usefixtures("unwritten_is_nan"),
]

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def one_document(blocks: int, length: int, rows: int = 1) -> torch.Tensor:
    return torch.ones(rows, blocks * length, dtype=torch.int32)


def packed(length: int) -> torch.Tensor:
    """Four blocks: documents of several blocks, short ones that share a block, and padding."""
    first = [1] * (length + 3) + [2] * (length - 5) + [0] * 2 + [3] * (2 * length)
    second = [1] * 2 + [2] * (length - 2) + [4] * (3 * length)
    return torch.tensor([first, second], dtype=torch.int32)


@pytest.mark.parametrize(
    ("documents", "dtype", "superchunk", "shape", "order", "slots"),
    [
        ("one", FP32, 5, (1, 16), 70, 16),  # whole tiles in every direction; the order takes two tiles
        ("one", FP32, 2, (2, 6), 40, 19),  # states of several tiles between superchunks
        ("packed", FP32, 1, (1, 6), 9, 19),
        ("packed", FP32, 3, (1, 20), 9, 5),
        ("packed", BF16, 2, (2, 6), 9, 19),
        ("packed", FP16, 5, (1, 6), 9, 19),
    ],
)
def test_memory(documents, dtype, superchunk, shape, order, slots):
    length = 16 if shape == (1, 16) else 17
    segments = one_document(5, length) if documents == "one" else packed(length)
    compare_memory(segments, MemoryBanks(order, length, exponential(slots, 2.0)), superchunk, shape, dtype, "triton")


@pytest.mark.parametrize(("superchunk", "order", "dtype"), [(1, 9, FP32), (2, 40, FP32), (2, 9, BF16)])
def test_memory_of_documents_that_come_and_go(superchunk, order, dtype):
    compare_passing_states(superchunk, order, dtype, "triton")


def test_state_stays_exact_over_many_blocks():
    """128 blocks of a trend: what a late block adds to the state is less than half precision could tell from nothing."""
    tokens = 128 * 4
    trend = torch.linspace(0, 1, tokens, dtype=torch.float64)[:, None, None, None]
    signal = (trend + draw(tokens, 1, 1, 4, dtype=FP32)).bfloat16()
    layout = BlockLayout.single_document(1, tokens, 4)
    banks = MemoryBanks(32, 4, exponential(5, 2.0))
    half = memory_slots(signal, layout, banks, 16, "triton")[-1].double()
    truth = memory_slots(signal.double(), layout, banks, 0, "batched")[-1]
    assert (half - truth).norm() / truth.norm() < 3 * 2**-8


@pytest.mark.parametrize(
    ("documents", "dtype", "length", "slots", "heads"),
    [
        ("one", FP32, 32, 16, (2, 1, 32)),  # whole tiles in every direction
        ("one", FP32, 21, 19, (2, 2, 6)),
        ("packed", FP32, 21, 19, (4, 2, 20)),
        ("packed", FP32, 21, 0, (1, 1, 6)),
        ("packed", BF16, 21, 5, (1, 1, 6)),
        ("one", FP16, 21, 5, (2, 1, 6)),
    ],
)
def test_attention(documents, dtype, length, slots, heads):
    segments = one_document(2, length) if documents == "one" else packed(length)[:, : 3 * length]
    compare_attention(segments, length, slots, heads, dtype, "triton")
