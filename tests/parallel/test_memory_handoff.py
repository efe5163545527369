"""The memory split over context-parallel ranks against the step-by-step reference on one, in fp64.

Both ways of handing states on, forward and backward, on real processes: slots, entering states, and the gradient of the
signal. Documents begin, end and span anywhere.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from em_megatron.hippo.banks import MemoryBanks
from em_megatron.hippo.samplers import exponential
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.memory import block_memory, memory_slots, memory_write
from em_megatron.ops.trapezoid_attention import batched, trapezoid_attention
from em_megatron.parallel import handoff_cost, memory_handoff
from em_megatron.parallel.handoff_cost import HANDOFFS
from em_megatron.parallel.memory_handoff import EXCHANGES, Handoff, Route
from tests.conftest import FP64
from tests.parallel.documents import random_segments

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the test of layouts covers GPUs")

SLOTS, ORDER, HEADS, CHANNELS = 5, 9, 2, 8


def signal_of(segments: list[list[int]]) -> Tensor:
    generator = torch.Generator().manual_seed(len(segments[0]))
    return torch.randn(len(segments[0]), len(segments), HEADS, CHANNELS, dtype=torch.float64, generator=generator)


def weights_of(blocks: int, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(blocks)
    return torch.randn(blocks, SLOTS, rows, HEADS, CHANNELS, dtype=torch.float64, generator=generator)


def split_memory(
    segments: list[list[int]], length: int, kind: str, superchunk: int, implementation: str = "batched"
) -> dict[str, Any]:
    """This rank's slots, entering states and gradient of the signal; kernels compute in fp32, all else in fp64."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ids, whole = torch.tensor(segments), signal_of(segments)
    layout = BlockLayout.from_segment_ids(ids, length, sequence_rank=rank, sequence_size=size)
    tokens, blocks = whole.shape[0] // size, layout.num_blocks
    banks = MemoryBanks(ORDER, length, exponential(SLOTS, 2.0))
    signal = whole[rank * tokens : (rank + 1) * tokens].clone()
    signal = (signal.float() if implementation == "triton" else signal).requires_grad_()
    memory = block_memory(*signal.chunk(2, -1), layout, banks, superchunk, implementation)
    state, handoff = None, None
    if layout.crosses_ranks:
        leaving = memory.leaving_states if rank < size - 1 else None
        handoff = Handoff(leaving, signal, layout, banks, dist.group.WORLD, kind)
        state = handoff.arrive() if layout.entering_rows else None
    slots = torch.cat(memory.slots(state), -1)
    loss = (slots * weights_of(blocks * size, ids.shape[0])[rank * blocks : (rank + 1) * blocks]).sum()
    loss = loss + (signal * 0.25).sum()  # as a rank whose tokens read no memory still has a loss
    if handoff is not None and not layout.entering_rows:
        loss = handoff.tie(loss)
    (gradient,) = torch.autograd.grad(loss, signal)
    return {
        "slots": slots.detach(),
        "state": None if state is None else state.detach(),
        "rows": layout.entering_rows,
        "gradient": gradient,
    }


def one_rank(segments: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """Slots and gradient of the signal by the reference."""
    signal, layout = signal_of(segments).requires_grad_(), BlockLayout.from_segment_ids(torch.tensor(segments), length)
    banks = MemoryBanks(ORDER, length, exponential(SLOTS, 2.0))
    slots = memory_slots(signal, layout, banks, implementation="naive")
    loss = (slots * weights_of(layout.num_blocks, layout.batch_size)).sum() + (signal * 0.25).sum()
    return slots.detach(), torch.autograd.grad(loss, signal)[0]


def state_before(segments: list[int], row: int, signal: Tensor, token: int) -> Tensor:
    """The reference state of the document that spans `token`, after all of its tokens before it."""
    first = token
    while first > 0 and segments[first - 1] == segments[token]:
        first -= 1
    return memory_write(signal.new_zeros(ORDER, HEADS, CHANNELS), signal[first:token, row], 0)


def check(
    segments: list[list[int]], length: int, found: list[dict[str, Any]], tolerance: dict[str, float] = FP64
) -> None:
    slots, gradient = one_rank(segments, length)
    signal, tokens = signal_of(segments), len(segments[0]) // len(found)
    torch.testing.assert_close(torch.cat([part["slots"] for part in found]).double(), slots, **tolerance)
    torch.testing.assert_close(torch.cat([part["gradient"] for part in found]).double(), gradient, **tolerance)
    for rank, part in enumerate(found):
        for column, row in enumerate(part["rows"]):
            truth = state_before(segments[row], row, signal, rank * tokens)
            torch.testing.assert_close(part["state"][:, column].double(), truth, **tolerance)


SEGMENTS = {
    "one document": [[1] * 32, [1] * 32],
    "documents that begin with a rank's part": [[1] * 16 + [2] * 16, [1] * 8 + [2] * 24],
    "documents that begin anywhere": [[1] * 9 + [2] * 7 + [3] * 16, [1] * 3 + [2] * 1 + [3] * 28],
    "one row only": [[1] * 4 + [2] * 28, [1] * 8 + [2] * 8 + [3] * 8 + [4] * 8],
    "nothing crosses": [[1] * 8 + [2] * 8 + [3] * 8 + [4] * 8],
}


@pytest.mark.parametrize("kind", HANDOFFS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", SEGMENTS)
def test_equals_one_rank(ranks, name, size, kind):
    for length in (2, 4):
        for superchunk in (0, 1, 3):
            found = ranks(size).run(split_memory, SEGMENTS[name], length, kind, superchunk)
            check(SEGMENTS[name], length, found)


@pytest.mark.parametrize(("kind", "superchunk"), [("all_gather", 1), ("chain", 3)])
def test_kernels_hand_on_the_same_states(ranks, kind, superchunk):
    """The Triton kernels, in the interpreter, in fp32: sums of some tens of terms."""
    segments = SEGMENTS["documents that begin anywhere"]
    found = ranks(2).run(split_memory, segments, 4, kind, superchunk, "triton")
    check(segments, 4, found, {"rtol": 1e-5, "atol": 1e-5})


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_documents_any_split(ranks, data):
    """Random documents, block lengths, batch sizes, superchunks and degrees."""
    size = data.draw(st.sampled_from([2, 4]), "ranks")
    length = data.draw(st.integers(1, 6), "block length")
    blocks = size * data.draw(st.integers(1, 4), "blocks of a rank")
    seeds = data.draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=3), "seeds of the samples")
    segments = [random_segments(torch.Generator().manual_seed(seed), blocks, length) for seed in seeds]
    superchunk = data.draw(st.integers(0, 4), "superchunk")
    kind = data.draw(st.sampled_from(HANDOFFS), "kind")
    check(segments, length, ranks(size).run(split_memory, segments, length, kind, superchunk))


def test_without_a_gradient_nobody_waits_for_one(ranks):
    for kind in HANDOFFS:
        assert ranks(2).run(detached_memory, kind) == [True, True]


def detached_memory(kind: str) -> bool:
    """As `memory.detach_memory` does: states travel, gradients do not."""
    rank = dist.get_rank()
    layout = BlockLayout.from_segment_ids(torch.ones(1, 8), 2, sequence_rank=rank, sequence_size=2)
    banks = MemoryBanks(ORDER, 2, exponential(SLOTS, 2.0))
    signal = torch.randn(4, 1, HEADS, CHANNELS, dtype=torch.float64).requires_grad_()
    memory = block_memory(*signal.detach().chunk(2, -1), layout, banks)
    handoff = Handoff(None if rank else memory.leaving_states, signal.detach(), layout, banks, dist.group.WORLD, kind)
    out = signal.sum() if rank == 0 else signal.sum() + torch.cat(memory.slots(handoff.arrive())).sum()
    out = handoff.tie(out) if rank == 0 else out
    out.backward()
    return bool((signal.grad == 1).all())


def test_half_precision_states_travel_in_fp32(ranks):
    for kind in HANDOFFS:
        assert ranks(2).run(dtype_on_the_way, kind) == [{torch.float32}, {torch.float32}]


def dtype_on_the_way(kind: str) -> set[torch.dtype]:
    rank = dist.get_rank()
    layout = BlockLayout.from_segment_ids(torch.ones(1, 8), 2, sequence_rank=rank, sequence_size=2)
    banks = MemoryBanks(ORDER, 2, exponential(SLOTS, 2.0))
    signal = torch.randn(4, 1, HEADS, CHANNELS).bfloat16()
    memory = block_memory(*signal.chunk(2, -1), layout, banks)
    handoff = Handoff(None if rank else memory.leaving_states, signal, layout, banks, dist.group.WORLD, kind)
    seen = {handoff.token.dtype}
    if rank:
        seen.add(handoff.arrive().dtype)
    else:
        handoff.exchange.wait()
    return seen


# --- who takes part ---


def test_routes_by_hand():
    history = ((0, 0, 0), (2, 1, 0), (4, 0, 1), (1, 2, 3), (0, 0, 0))
    routes = [Route(history, rank, 2, (0, 1, 2)) for rank in range(4)]
    assert [route.entering(route.rank) for route in routes] == [[], [0, 1], [0, 2], [0, 1, 2]]
    assert [route.passing(route.rank) for route in routes] == [[], [0], [2], []]
    assert [route.sources(2) for route in routes] == [[], [], [1], [2, 1]]
    assert [route.targets(0) for route in routes] == [[1, 2], [2], [3], []]
    assert [route.targets(2) for route in routes] == [[], [2, 3], [3], []]


# --- what it costs ---


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The bytes that each collective of a hand-off brings into this rank."""
    received: list[int] = []
    gather, receive = memory_handoff._all_gather, dist.recv

    def counted_gather(out: Tensor, mine: Tensor, **options: Any) -> Any:
        received.append(out.nbytes - mine.nbytes)
        return gather(out, mine, **options)

    def counted_receive(tensor: Tensor, **options: Any) -> Any:
        received.append(tensor.nbytes)
        return receive(tensor, **options)

    with patch.object(memory_handoff, "_all_gather", counted_gather), patch.object(dist, "recv", counted_receive):
        yield received


def count_bytes(kind: str) -> dict[str, int]:
    """Bytes received by this rank for one layer on a sample of one document, in fp32."""
    rank, size = dist.get_rank(), dist.get_world_size()
    layout = BlockLayout.from_segment_ids(torch.ones(1, 8 * size), 4, sequence_rank=rank, sequence_size=size)
    banks = MemoryBanks(ORDER, 4, exponential(SLOTS, 2.0))
    signal = torch.randn(8, 1, HEADS, CHANNELS).requires_grad_()
    memory = block_memory(*signal.chunk(2, -1), layout, banks)
    leaving = memory.leaving_states if rank < size - 1 else None
    with counted_bytes() as forward:
        handoff = Handoff(leaving, signal, layout, banks, dist.group.WORLD, kind)
        out = torch.cat(memory.slots(handoff.arrive() if rank else None)).sum()
        out = out if rank else handoff.tie(out)
    with counted_bytes() as backward:
        out.backward()
    return {"forward": sum(forward), "backward": sum(backward)}


@pytest.mark.parametrize("kind", HANDOFFS)
def test_bytes_moved_are_the_ones_reported(ranks, kind):
    size, channels = 4, HEADS * CHANNELS
    found = ranks(size).run(count_bytes, kind)
    state = handoff_cost.state_bytes(ORDER, channels)
    assert state == 4 * ORDER * channels
    assert found[-1]["forward"] == handoff_cost.received_bytes(kind, size, state)
    assert found[0]["backward"] == handoff_cost.received_bytes(kind, size, state)
    total = sum(rank["forward"] for rank in found)
    assert total == state * (size * (size - 1) if kind == "all_gather" else size - 1)


def test_bytes_of_the_design_page():
    """32k tokens on 8 ranks at N = 540: 1/7.6 in numbers, 1/3.8 in bytes; a chain 1/53 and 1/27."""
    channels = 2 * 128 * 8
    state, ring = handoff_cost.state_bytes(540, channels), handoff_cost.ring_attention_bytes(8, 4096, channels)
    gathered, chained = (handoff_cost.received_bytes(kind, 8, state) for kind in ("all_gather", "chain"))
    assert ring / gathered == pytest.approx(3.8, abs=0.02)
    assert ring / 2 / (gathered / 4) == pytest.approx(7.6, abs=0.02)
    assert ring / chained == pytest.approx(26.5, abs=0.1)
    assert ring / 2 / (chained / 4) == pytest.approx(53.1, abs=0.1)
    assert handoff_cost.received_bytes("chain", 1, state) == handoff_cost.ring_attention_bytes(1, 4096, channels) == 0


def test_choice_by_estimated_time():
    small, large = handoff_cost.state_bytes(64, 256), handoff_cost.state_bytes(8640, 2048)
    assert handoff_cost.choose_handoff(2, large) == "all_gather"  # one hop either way
    assert handoff_cost.choose_handoff(8, small) == "all_gather"
    assert handoff_cost.choose_handoff(8, large) == handoff_cost.choose_handoff(64, large) == "chain"
    times = [handoff_cost.estimated_seconds("chain", 64, state) for state in (small, large)]
    assert times[0] < times[1]


# --- what is kept ---


def exchanges_alive(kind: str) -> int:
    """Exchanges that outlive the backward pass of their layer, of three."""
    alive = []
    original = EXCHANGES[kind].__init__

    def remembered(exchange: Any, *args: Any) -> None:
        alive.append(weakref.ref(exchange))
        original(exchange, *args)

    with patch.object(EXCHANGES[kind], "__init__", remembered):
        for _ in range(3):
            one_layer(kind)
    gc.collect()
    return sum(reference() is not None for reference in alive) if len(alive) == 3 else -1


@pytest.mark.parametrize("kind", HANDOFFS)
def test_nothing_is_kept_after_the_backward_pass(ranks, kind):
    assert ranks(4).run(exchanges_alive, kind) == [0] * 4


# --- overlap ---


@contextmanager
def noted_events(kind: str) -> Iterator[list[str]]:
    """The order in which states are sent and waited for and attention is computed."""
    events: list[str] = []

    def noting(event: str, original: Any) -> Any:
        return lambda *args, **options: events.append(event) or original(*args, **options)

    with ExitStack() as stack:
        for name in ("launch", "wait", "launch_gradient", "wait_gradient"):
            exchange = EXCHANGES[kind]
            stack.enter_context(patch.object(exchange, name, noting(name, getattr(exchange, name))))
        for name, event in (("_flash", "attention"), ("_flash_backward", "attention gradient")):
            stack.enter_context(patch.object(batched, name, noting(event, getattr(batched, name))))
        yield events


def one_layer(kind: str) -> None:
    """Forward and backward of a layer's memory and attention on this rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    layout = BlockLayout.from_segment_ids(torch.ones(1, 4 * size), 2, sequence_rank=rank, sequence_size=size)
    banks = MemoryBanks(ORDER, 2, exponential(SLOTS, 2.0))
    key = torch.randn(4, 1, HEADS, 4, requires_grad=True)
    signal = torch.cat([key, key], -1)
    memory = block_memory(*signal.chunk(2, -1), layout, banks)
    handoff = Handoff(memory.leaving_states if rank < size - 1 else None, signal, layout, banks, dist.group.WORLD, kind)
    memory.read_own()

    def slots() -> tuple[Tensor, ...]:
        return memory.slots(handoff.arrive() if rank else None)

    out = trapezoid_attention(key, key, key, slots, layout)
    (out if rank else handoff.tie(out)).sum().backward()


def probe_order(kind: str) -> list[str]:
    with noted_events(kind) as events:
        one_layer(kind)
    return events


@pytest.mark.parametrize("kind", HANDOFFS)
def test_the_blocks_own_attention_lies_between_launch_and_wait(ranks, kind):
    for rank, events in enumerate(ranks(4).run(probe_order, kind)):
        assert events[:2] == ["launch", "attention"]
        assert events.index("wait") > events.index("attention")
        back = events[events.index("launch_gradient") :]
        local = back.index("attention gradient")  # the block's own, which comes after that of the slots
        assert local < back.index("wait_gradient")
        assert rank == 0 or back.count("attention gradient") == 1
