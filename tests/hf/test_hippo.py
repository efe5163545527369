"""The matrices that travel with the weights are those of em_megatron.hippo."""

from __future__ import annotations

import pytest
import torch

from em_megatron.hf import hippo_elastic_memory as travelling
from em_megatron.hippo import legs
from em_megatron.hippo.samplers import sampler_points
from em_megatron.ops.memory.naive import memory_write
from tests.conftest import FP64


@pytest.mark.parametrize("order", [1, 2, 63, 64, 540])
def test_matrices(order):
    for before, after in ((3, 10), (2048, 4096), (1_000_000, 1_002_048)):
        torch.testing.assert_close(travelling.carry(order, before, after), legs.carry(order, before, after), **FP64)
        expected = legs.inject(order, after - 7, after, after)
        torch.testing.assert_close(travelling.inject(order, after - 7, after), expected, **FP64)
    points = torch.tensor([1e-4, 0.3, 0.5, 0.999], dtype=torch.float64)
    torch.testing.assert_close(travelling.basis(order, points).T, legs.read(order, points), **FP64)


@pytest.mark.slow
def test_matrices_of_16_times_the_order():
    expected = legs.carry(8640, 32768, 34816)
    torch.testing.assert_close(travelling.carry(8640, 32768, 34816), expected, rtol=0, atol=1e-7)  # fp32 is kept


@pytest.mark.parametrize("name", ["uniform", "exponential", "window", "points"])
def test_samplers(name):
    points = (0.1, 0.2, 0.25, 0.7, 0.95)
    expected = sampler_points(name, 5, a=2.5, lo=0.1, hi=0.6, points=points)
    torch.testing.assert_close(travelling.sampler_points(name, 5, 2.5, 0.1, 0.6, points), expected, **FP64)


@pytest.mark.parametrize("scheme", ["exact", "zero_order_hold", "bilinear", "backward_euler", "forward_euler"])
def test_states_are_those_of_the_step_by_step_reference(scheme):
    torch.manual_seed(0)
    signal = torch.randn(2, 3, 29, 4, dtype=torch.float64)  # [g, h, t, c]
    reader = travelling.MemoryReader(6, torch.tensor([0.5], dtype=torch.float64), scheme)
    state, expected, read = None, torch.zeros(6, 2, 3, 4, dtype=torch.float64), 0
    for part in signal.split(8, 2):
        state = reader.write(state, part, read)
        expected = memory_write(expected, part.permute(2, 0, 1, 3), read, scheme)
        read += part.shape[2]
        torch.testing.assert_close(state.permute(2, 0, 1, 3), expected, **FP64)
