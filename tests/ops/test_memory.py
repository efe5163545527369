"""The batched memory operator against the step-by-step reference: slots and gradients, at every superchunk size."""

from __future__ import annotations

import pytest
import torch

from em_megatron.hippo.banks import MemoryBanks
from em_megatron.hippo.samplers import exponential
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.memory import memory_read, memory_slots, memory_write
from tests.conftest import FP64

LENGTH, SLOTS, ORDER = 7, 5, 9

SEGMENTS = {
    "one document": [[1] * 35, [1] * 35],
    "packed": [[1] * 17 + [2] * 3 + [0] + [3] * 14, [1, 1, 2, 2, 2, 3, 3] + [4] * 28],
    "nothing to remember": [[1] * 7 + [2] * 7 + [3] * 7 + [4] * 7 + [5] * 7],
}


def setting(name: str):
    rows = SEGMENTS[name]
    layout = BlockLayout.from_segment_ids(torch.tensor(rows), LENGTH)
    generator = torch.Generator().manual_seed(1)
    signal = torch.randn(35, len(rows), 2, 6, dtype=torch.float64, generator=generator).requires_grad_()
    return signal, layout, MemoryBanks(ORDER, LENGTH, exponential(SLOTS, 2.0))


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("superchunk", [0, 1, 2, 3, 5])
def test_equals_reference(name, superchunk):
    signal, layout, banks = setting(name)
    expected = memory_slots(signal, layout, banks, implementation="naive")
    actual = memory_slots(signal, layout, banks, superchunk)
    torch.testing.assert_close(actual, expected, **FP64, msg=lambda m: f"slots: {m}")
    if not layout.runs:
        assert not actual.any()
        return
    weight = torch.randn_like(expected)
    (truth,) = torch.autograd.grad((expected * weight).sum(), signal)
    (ours,) = torch.autograd.grad((actual * weight).sum(), signal)
    torch.testing.assert_close(ours, truth, **FP64, msg=lambda m: f"gradient of the signal: {m}")


@pytest.mark.parametrize("discretization", ["zero_order_hold", "bilinear", "forward_euler", "backward_euler"])
def test_other_discretizations_equal_the_reference(discretization):
    signal, layout, exact = setting("packed")
    banks = MemoryBanks(4, LENGTH, exact.points, discretization)
    expected = memory_slots(signal, layout, banks, implementation="naive")
    for superchunk in (1, 2, 5):
        torch.testing.assert_close(memory_slots(signal, layout, banks, superchunk), expected, **FP64)


@pytest.mark.parametrize("superchunk", [2, 5])
def test_gradcheck(superchunk):
    signal, layout, banks = setting("packed")
    torch.autograd.gradcheck(lambda x: memory_slots(x, layout, banks, superchunk), signal)


def test_documents_do_not_leak():
    signal, layout, banks = setting("packed")
    with torch.no_grad():
        before = memory_slots(signal, layout, banks)
        signal[:17, 0] += 100.0  # the first document of the first sample
        after = memory_slots(signal, layout, banks)
    changed = (before != after).flatten(3).any(-1).any(1)  # [B, b]
    assert changed.tolist() == [[False, False], [True, False], [True, False], [False, False], [False, False]]


def test_writing_block_by_block_equals_writing_at_once():
    signal = torch.randn(23, 4, dtype=torch.float64)
    state = torch.zeros(ORDER, 4, dtype=torch.float64)
    for start in range(0, 23, LENGTH):
        state = memory_write(state, signal[start : start + LENGTH], start)
    at_once = memory_write(torch.zeros(ORDER, 4, dtype=torch.float64), signal, 0)
    torch.testing.assert_close(state, at_once, **FP64)
    points = torch.tensor([0.25, 0.75], dtype=torch.float64)
    torch.testing.assert_close(memory_read(state, points), memory_read(at_once, points), **FP64)


def test_half_precision_stays_near():
    """bf16 operands with fp32 accumulation: a relative error of a few of bf16's 2⁻⁸ roundings, as the sums average out."""
    signal, layout, banks = setting("one document")
    truth = memory_slots(signal, layout, banks).float()
    half = memory_slots(signal.bfloat16(), layout, banks).float()
    assert (half - truth).norm() / truth.norm() < 3 * 2**-8


@pytest.mark.parametrize("superchunk", [1, 4, 0])
def test_half_precision_stays_near_over_many_blocks(superchunk):
    """256 blocks of a trend with noise: the state is kept in fp32, or what a block adds would be rounded away."""
    tokens, generator = 256 * 4, torch.Generator().manual_seed(2)
    trend = torch.linspace(0, 1, tokens, dtype=torch.float64)[:, None, None, None]
    signal = (trend + torch.randn(tokens, 1, 1, 8, dtype=torch.float64, generator=generator)).bfloat16()
    layout = BlockLayout.single_document(1, tokens, 4)
    banks = MemoryBanks(32, 4, exponential(SLOTS, 2.0))
    half = memory_slots(signal, layout, banks, superchunk)[-1].double()
    truth = memory_slots(signal.double(), layout, banks)[-1]
    assert (half - truth).norm() / truth.norm() < 3 * 2**-8


def test_documents_of_all_lengths_share_the_matrices():
    signal, layout, banks = setting("packed")
    memory_slots(signal, layout, banks, 5)
    assert len({run.num_blocks for run in layout.runs}) > 1
    assert len(banks._superchunks) == 1


def test_unknown_implementation_is_refused():
    signal, layout, banks = setting("packed")
    with pytest.raises(ValueError, match="'fast' is unknown"):
        memory_slots(signal, layout, banks, implementation="fast")
