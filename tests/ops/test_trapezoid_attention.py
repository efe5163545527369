"""Trapezoidal attention against its query-by-query reference: outputs and every gradient, by name."""

from __future__ import annotations

import pytest
import torch

from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.trapezoid_attention import batched, trapezoid_attention
from tests.conftest import FP64

LENGTH = 5  # odd block length

SEGMENTS = {
    "one document": [[1] * 15, [1] * 15],
    "packed": [[1] * 12 + [2, 2, 0], [1, 1, 2, 2, 2] + [3] * 10],
    "short only": [[1, 1, 2, 3, 3, 4, 4, 4, 4, 4, 5, 5, 5, 6, 0], [1] * 15],
}


def inputs(segments: list[list[int]], heads: int, kv_heads: int, slots: int | None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    rows, tokens, dim = len(segments), len(segments[0]), 4

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()

    named = {
        "query": draw(tokens, rows, heads, dim),
        "key": draw(tokens, rows, kv_heads, dim),
        "value": draw(tokens, rows, kv_heads, dim),
    }
    if slots:
        named["slot_keys"] = draw(tokens // LENGTH, slots, rows, kv_heads, dim)
        named["slot_values"] = draw(tokens // LENGTH, slots, rows, kv_heads, dim)
    return named, BlockLayout.from_segment_ids(torch.tensor(segments), LENGTH)


def run(named: dict[str, torch.Tensor], layout: BlockLayout, implementation: str) -> torch.Tensor:
    slots = (named["slot_keys"], named["slot_values"]) if "slot_keys" in named else None
    return trapezoid_attention(
        named["query"], named["key"], named["value"], slots, layout, implementation=implementation
    )


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
@pytest.mark.parametrize(("heads", "kv_heads", "slots"), [(2, 2, 3), (6, 2, 7), (3, 1, None)])
@pytest.mark.parametrize("path", ["joined flash", "in pieces", "one softmax"])
def test_equals_reference(segments, heads, kv_heads, slots, path, monkeypatch):
    named, layout = inputs(segments, heads, kv_heads, slots)
    expected = run(named, layout, "naive")
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), named.values())
    if path == "in pieces":
        monkeypatch.setattr(batched, "_PIECE_BYTES", 1)  # a block each
    if path == "one softmax":  # as on GPUs without Triton
        monkeypatch.setattr(batched._Own, "start", lambda own: None)
    actual = run(named, layout, "batched")
    torch.testing.assert_close(actual, expected, **FP64, msg=lambda m: f"output: {m}")
    actual_grads = torch.autograd.grad((actual * weight).sum(), named.values())
    for name, ours, truth in zip(named, actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, truth, **FP64, msg=lambda m, name=name: f"gradient of {name}: {m}")


def test_gradcheck():
    named, layout = inputs(SEGMENTS["packed"], 2, 1, 3)
    names = list(named)
    torch.autograd.gradcheck(
        lambda *values: run(dict(zip(names, values, strict=True)), layout, "batched"), list(named.values())
    )


def test_slots_are_asked_for_after_the_blocks_own_part(monkeypatch):
    """What the slots wait for, such as states from other ranks, has that long to arrive; the numbers are the same."""
    named, layout = inputs(SEGMENTS["packed"], 2, 1, 3)
    order, local = [], batched.LocalFlash.apply
    monkeypatch.setattr(batched.LocalFlash, "apply", lambda *args: order.append("own part") or local(*args))

    def slots():
        order.append("slots")
        return named["slot_keys"], named["slot_values"]

    out = trapezoid_attention(named["query"], named["key"], named["value"], slots, layout)
    assert order == ["own part", "slots"]
    assert torch.equal(out, run(named, layout, "batched"))


def test_blocks_without_history_ignore_their_slots():
    named, layout = inputs([[1] * 5 + [2] * 10], 2, 2, 3)
    with torch.no_grad():
        before = run(named, layout, "batched")
        named["slot_values"][:2] = 1e6  # blocks 0 and 1 both start a document
        after = run(named, layout, "batched")
    assert torch.equal(before[:10], after[:10])
    grads = torch.autograd.grad(run(named, layout, "batched").sum(), named["slot_keys"])
    assert not grads[0][:2].any()


def test_unknown_implementation_is_refused():
    named, layout = inputs(SEGMENTS["packed"], 2, 1, 3)
    with pytest.raises(ValueError, match="'fast' is unknown: choose one of"):
        run(named, layout, "fast")


def test_layout_of_a_packed_sample_reads_as_a_person_would():
    layout = BlockLayout.from_segment_ids(torch.tensor(SEGMENTS["packed"]), LENGTH)
    assert [(run.row, run.first_block, run.num_blocks) for run in layout.runs] == [(0, 0, 3), (1, 1, 2)]
    assert layout.memory_tokens.int().tolist() == [
        [0, 0, 0, 0, 0] + [1, 1, 1, 1, 1] + [1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0] + [0, 0, 0, 0, 0] + [1, 1, 1, 1, 1],
    ]
    assert layout.shared_blocks
    with pytest.raises(ValueError, match="not a whole number of blocks"):
        BlockLayout.from_segment_ids(torch.ones(1, 7, dtype=torch.int32), LENGTH)
