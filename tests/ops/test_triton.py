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
from em_megatron.ops.memory import block_memory, memory_slots
from tests.ops.comparison import as_views, close, compare_attention, compare_memory, draw

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
        ("one", FP32, 2, (2, 6), 9, 19),
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


@pytest.mark.parametrize(("superchunk", "dtype"), [(1, FP32), (2, FP32), (2, BF16)])
def test_memory_of_documents_that_come_and_go(superchunk, dtype):
    """Two ranks' parts of one sample, the first of which goes on from an earlier step: states are handed on by hand."""
    length, order, heads, dim = 5, 9, 1, 6
    segments = torch.tensor([[1] * 40, [1] * 15 + [2] * 15 + [3] * 10], dtype=torch.int32)
    banks = MemoryBanks(order, length, exponential(7, 2.0))
    before = torch.tensor([2 * length, 0])
    whole = BlockLayout.from_segment_ids(segments, length, history=before)
    parts = [
        BlockLayout.from_segment_ids(segments, length, history=before, sequence_rank=r, sequence_size=2) for r in (0, 1)
    ]
    named = {name: draw(40, 2, heads, dim, dtype=dtype).requires_grad_() for name in ("key", "value")}
    entering = draw(order, 1, heads, 2 * dim, dtype=FP32).requires_grad_()
    truth = memory_slots(torch.cat(list(named.values()), -1), whole, banks, 0, "naive", entering)
    weight = draw(*truth.shape, dtype=dtype)
    gradients = torch.autograd.grad((truth * weight).sum(), [*named.values(), entering])

    mine = as_views(named, dtype, "cpu")
    state = entering.detach().to(FP32).requires_grad_()
    memories = [
        block_memory(mine["key"][span], mine["value"][span], part, banks, superchunk, "triton")
        for span, part in zip((slice(0, 20), slice(20, 40)), parts, strict=True)
    ]
    first = torch.cat(memories[0].slots(state), -1)
    left = memories[0].leaving_states
    assert [run.row for run in parts[0].leaving] == parts[1].entering_rows == [0, 1]
    # What the document of sample 0 brought goes through the first part: carried over it, and added to what it wrote.
    passed = torch.tensordot(banks.carry(2, 6, FP32, "cpu"), state[:, 0], 1)
    second = torch.cat(memories[1].slots(torch.stack([left[:, 0] + passed, left[:, 1]], 1)), -1)
    slots = torch.cat([first, second])
    close(slots, truth.detach(), dtype, "slots")
    ours = torch.autograd.grad(slots, [*mine.values(), state], weight.to(dtype))
    for name, gradient, expected in zip([*named, "entering state"], ours, gradients, strict=True):
        close(gradient, expected, dtype, f"gradient of the {name}")


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
        ("packed", FP32, 21, 19, (2, 1, 20)),
        ("packed", FP32, 21, 0, (1, 1, 6)),
        ("packed", BF16, 21, 5, (1, 1, 6)),
        ("one", FP16, 21, 5, (2, 1, 6)),
    ],
)
def test_attention(documents, dtype, length, slots, heads):
    segments = one_document(2, length) if documents == "one" else packed(length)[:, : 3 * length]
    compare_attention(segments, length, slots, heads, dtype, "triton")
