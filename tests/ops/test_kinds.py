"""Operators of the other memory kinds against their query-by-query references: outputs, states, every gradient by name;
documents apart, block after block, over context-parallel ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from em_megatron.config import MemoryConfig
from em_megatron.hf.kinds_elastic_memory import PARAMETERS, STEPS
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.kinds import OPERATORS, Reading, naive
from tests.conftest import FP64

LENGTH, DIM, HEADS, KV_HEADS, BASE = 5, 6, 4, 2, 100.0
POINTS = (0.1, 0.55, 0.9)
# One document over all; one that ends within a block beside short ones, padding, and another of whole blocks.
SEGMENTS = torch.tensor([[1] * 30, [1] * 17 + [2, 2, 0] + [3] * 10])
DOCUMENTS = [(0, 0, 30), (1, 0, 17), (1, 17, 19), (1, 20, 30)]
KINDS: dict[str, dict[str, object]] = {
    "full": {"kind": "full"},
    "transformer_xl": {"kind": "transformer_xl"},
    "subsample": {"kind": "subsample"},
    "infini, linear": {"kind": "infini", "update": "linear"},
    "infini, delta": {"kind": "infini", "update": "delta"},
    "memorizing, dense": {"kind": "memorizing", "pairs": 100, "top_k": 0},
    "memorizing, few pairs": {"kind": "memorizing", "pairs": 8, "top_k": 0},
    "memorizing, top-k": {"kind": "memorizing", "pairs": 13, "top_k": 3},
}


def memory_of(kind: str, **changes: object) -> MemoryConfig:
    return MemoryConfig(block_length=LENGTH, slots=len(POINTS), **{**KINDS[kind], **changes})  # type: ignore[arg-type]


def draw(kind: str, tokens: int = 30, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    named = {"query": numbers(tokens, rows, HEADS, DIM)}
    named |= {name: numbers(tokens, rows, KV_HEADS, DIM) for name in ("key", "value")}
    named |= {name: 1 + 0.7 * numbers(HEADS) for name in PARAMETERS.get(str(KINDS[kind]["kind"]), ())}
    return {name: x.requires_grad_() for name, x in named.items()}


def own(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in named.items() if name in ("gate", "scale")}


def operate(named: dict[str, Tensor], layout: BlockLayout, memory: MemoryConfig, group: object = None) -> Tensor:
    reading = Reading(memory, BASE, POINTS, group)
    return OPERATORS[memory.kind](named["query"], named["key"], named["value"], layout, reading, own(named))


def reference(named: dict[str, Tensor], memory: MemoryConfig, row: int, start: int, stop: int) -> Tensor:
    """The document of those tokens, alone."""
    signal = [named[name][start:stop, row] for name in ("query", "key", "value")]
    if memory.kind == "subsample":
        return naive.subsample(*signal, LENGTH, BASE, POINTS)
    if memory.kind == "infini":
        return naive.infini(*signal, LENGTH, BASE, named["gate"], memory.update == "delta")[0]
    if memory.kind == "memorizing":
        sizes = (memory.pairs, memory.top_k)
        return naive.memorizing(*signal, LENGTH, BASE, named["gate"], named["scale"], *sizes)
    return {"full": naive.full, "transformer_xl": naive.transformer_xl}[memory.kind](*signal, LENGTH, BASE)


def gradients(out: Tensor, weight: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad((out * weight).sum(), list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(named.items(), found, strict=True)
    }


def compare(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        torch.testing.assert_close(ours[name], expected, **FP64, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_operator_equals_the_reference_of_each_document(kind):
    named, memory = draw(kind), memory_of(kind)
    # Short documents begin within a block, where positions and blocks of the reference begin with them.
    expected = torch.zeros_like(named["query"])
    for row, start, stop in DOCUMENTS:
        expected[start:stop, row] = reference(named, memory, row, start, stop)
    counted = (SEGMENTS > 0).T[..., None, None].double()
    weight = torch.randn_like(expected) * counted
    out = operate(named, BlockLayout.from_segment_ids(SEGMENTS, LENGTH), memory)
    compare({"out": out * counted}, {"out": expected})
    truth = gradients(expected, weight, named)
    compare(gradients(out, weight, named), truth)
    assert all(gradient.abs().max() > 0 for gradient in truth.values())


@pytest.mark.parametrize("kind", KINDS)
def test_block_after_block_equals_the_reference(kind):
    named, memory = draw(kind, tokens=23, rows=1), memory_of(kind)
    expected = reference(named, memory, 0, 0, 23)
    weight = torch.randn_like(expected)
    settings = {"subsample": {"points": POINTS}, "infini": {"update": memory.update}}.get(memory.kind, {})
    if memory.kind == "memorizing":
        settings = {"pairs": memory.pairs, "top_k": memory.top_k}
    steps = STEPS[memory.kind](LENGTH, BASE, True, **settings)
    kept: dict[str, Tensor] = {}
    pieces, start = [], 0
    for size in (5, 3, 2, 1, 4, 5, 3):  # within blocks
        part = [named[name][start : start + size].permute(1, 2, 0, 3) for name in ("query", "key", "value")]
        out, kept = steps.attend(*part, kept, start, own(named))
        pieces.append(out.permute(2, 0, 1, 3)[:, 0])
        start += size
    out = torch.cat(pieces)
    compare({"out": out, **gradients(out, weight, named)}, {"out": expected, **gradients(expected, weight, named)})
    compare_kept(kept, named, memory)


def compare_kept(kept: dict[str, Tensor], named: dict[str, Tensor], memory: MemoryConfig) -> None:
    """What is kept after 23 tokens: four blocks of them, and three tokens of the next."""
    key, value = (named[name][:, 0].transpose(0, 1) for name in ("key", "value"))  # [hk, T, d]
    truth = {"keys": key[:, 20:], "values": value[:, 20:]}
    if memory.kind in ("full", "subsample"):
        truth |= {"past_keys": key[:, :20], "past_values": value[:, :20]}
    if memory.kind == "transformer_xl":
        truth |= {"past_keys": key[:, 15:20], "past_values": value[:, 15:20]}
    if memory.kind == "infini":
        signal = [named[name][:, 0] for name in ("query", "key", "value")]
        states = naive.infini(*signal, LENGTH, BASE, named["gate"], memory.update == "delta")[1]
        truth |= dict(zip(("matrix", "normalizer"), states[3], strict=True))
    if memory.kind == "memorizing":
        last = slice(max(0, 20 - memory.pairs), 20)
        unit = key / torch.sqrt(key.square().sum(-1, keepdim=True) + 1e-6)
        truth |= {"past_keys": unit[:, last], "past_values": value[:, last]}
    compare({name: x[0] for name, x in kept.items()}, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_between_documents(kind):
    named, memory = draw(kind), memory_of(kind)
    layout = BlockLayout.from_segment_ids(SEGMENTS, LENGTH)
    before = operate(named, layout, memory)
    for row, start, stop in DOCUMENTS:
        changed = {name: x.detach().clone() for name, x in named.items()}
        for name in ("query", "key", "value"):
            changed[name][start:stop, row] += 3.0
        after = operate(changed, layout, memory)
        mine = torch.zeros(30, 2, dtype=torch.bool)
        mine[start:stop, row] = True
        assert torch.equal(after[~mine], before[~mine]), f"document {row}, {start} to {stop}"
        assert not torch.equal(after[mine], before[mine])


def test_memorizing_all_of_the_history_by_the_memory_path_alone_is_attention_over_it():
    named, memory = draw("memorizing, dense"), memory_of("memorizing, dense")
    named["gate"] = torch.full((HEADS,), 50.0, dtype=torch.float64)
    out = operate(named, BlockLayout.single_document(2, 30, LENGTH), memory)
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (named["query"], named["key"]))
    key, value = (x.repeat_interleave(2, 2) for x in (key, named["value"]))
    logits = torch.einsum("tbhd,sbhd->bhts", query, key) * named["scale"][:, None, None]
    history = torch.arange(30)[:, None] // LENGTH > torch.arange(30)[None] // LENGTH
    shares = torch.softmax(logits[:, :, LENGTH:].masked_fill(~history[LENGTH:], float("-inf")), -1)
    expected = torch.einsum("bhts,sbhd->tbhd", shares, value)
    torch.testing.assert_close(out[LENGTH:], expected, **FP64)


@pytest.mark.parametrize("kind", ["infini, linear", "infini, delta", "subsample"])
def test_a_detached_memory_has_no_gradient(kind):
    layout = BlockLayout.single_document(2, 30, LENGTH)
    for detach in (False, True):
        named = draw(kind)
        out = operate(named, layout, memory_of(kind, detach_memory=detach))
        (gradient,) = torch.autograd.grad(out[25:].sum(), named["value"])
        assert bool(gradient[:25].abs().max() > 0) != detach


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_operator_on_a_gpu(kind):
    """In fp32 against the CPU in fp64, outputs and every gradient by name."""
    named, memory = draw(kind), memory_of(kind)
    expected = operate(named, BlockLayout.from_segment_ids(SEGMENTS, LENGTH), memory)
    weight = torch.randn_like(expected) * (SEGMENTS > 0).T[..., None, None]
    truth = {"out": expected.detach() * (weight != 0), **gradients(expected, weight, named)}
    there = {name: x.detach().float().cuda().requires_grad_() for name, x in named.items()}
    out = operate(there, BlockLayout.from_segment_ids(SEGMENTS, LENGTH, torch.device("cuda")), memory)
    ours = {"out": out.detach() * (weight != 0).cuda(), **gradients(out, weight.float().cuda(), there)}
    for name, wanted in truth.items():
        error = (ours[name].double().cpu() - wanted).norm() / wanted.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def on_ranks(kind: str, named: dict[str, Tensor], weight: Tensor, segments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's part of the output, and its gradients: of its part of the signal, and its share of the parameters'."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(size)))
    torch.set_num_threads(1)
    part = slice(rank * 30 // size, (rank + 1) * 30 // size)
    mine = {name: (x[part] if x.dim() > 1 else x).detach().requires_grad_() for name, x in named.items()}
    layout = BlockLayout.from_segment_ids(segments, LENGTH, sequence_rank=rank, sequence_size=size)
    out = operate(mine, layout, memory_of(kind), group)
    return out.detach(), gradients(out, weight[part], mine)


CROSSINGS = {
    "two boundaries and one": SEGMENTS,
    "one boundary": torch.tensor([[1] * 10 + [2] * 10 + [3] * 10, [1] * 5 + [2] * 15 + [3] * 10]),
    "none on three ranks": torch.tensor(
        [[1] * 10 + [2] * 10 + [3] * 10, [1] * 9 + [0] + [2] * 10 + [3, 3, 4, 4, 4] * 2]
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_ranks_equal_one(ranks, kind, size):
    for segments in CROSSINGS.values():
        named = draw(kind)
        weight = torch.randn(30, 2, HEADS, DIM, dtype=torch.float64)
        expected = operate(named, BlockLayout.from_segment_ids(segments, LENGTH), memory_of(kind))
        truth = gradients(expected, weight, named)
        plain = {name: x.detach() for name, x in named.items()}
        found = ranks(size).run(on_ranks, kind, plain, weight, segments)
        parts = [part for _, part in found]
        ours = {
            name: torch.cat([part[name] for part in parts]) if x.dim() > 1 else sum(part[name] for part in parts)
            for name, x in named.items()
        }
        compare({"out": torch.cat([out for out, _ in found]), **ours}, {"out": expected.detach(), **truth})
