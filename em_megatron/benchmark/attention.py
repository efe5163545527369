"""`attention`: memory and trapezoidal attention, beside causal attention over the whole sample."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from em_megatron.benchmark.floors import Heads, MemorySizes, Work, attention_work, causal_pairs, memory_work
from em_megatron.benchmark.floors import trapezoid_pairs as pairs_of
from em_megatron.benchmark.machine import DTYPES
from em_megatron.benchmark.memory_operator import BOTH, FORWARD, Compute, banks_of, differentiated, implementations
from em_megatron.benchmark.options import AttentionOptions
from em_megatron.benchmark.peers import causal_attention, flex_attention
from em_megatron.benchmark.results import Chart, Figure, Findings, Rows, Target
from em_megatron.benchmark.timing import Call, Candidate, UnavailableError
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.memory import block_memory
from em_megatron.ops.trapezoid_attention import trapezoid_attention

CAUSAL, FLEX = "causal attention over the whole sample", "FlexAttention, trapezoid mask, slots given"
ELASTIC, ALONE, MEMORY = "memory and attention", "attention alone, slots given", "memory alone"
TARGETS = {
    "cpu": [
        Target(f"speed/{BOTH}/16384", "at least", 6.0),
        Target(f"speed/{BOTH}/32768", "at least", 12.0),
        Target(f"scaling/{BOTH}/8192/32768", "at most", 4.4),
    ],
    "cuda": [],
}
Make = Callable[[bool], tuple[Compute, list[Tensor]]]  # with a backward pass or not → what to call, its inputs


class Sample:
    """Inputs of one length, made when first used and shared by all candidates; each is a leaf with a gradient."""

    def __init__(self, options: AttentionOptions, tokens: int, device: torch.device) -> None:
        self.options, self.tokens, self.device = options, tokens, device
        self.layout = BlockLayout.single_document(1, tokens, options.block, device)

    def _leaf(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(DTYPES[self.options.dtype]).requires_grad_()

    @cached_property
    def qkv(self) -> list[Tensor]:
        """[T, 1, h, d] as the model has them."""
        heads = (self.options.heads, self.options.kv_heads, self.options.kv_heads)
        return [self._leaf(self.tokens, 1, count, self.options.head_dim) for count in heads]

    @cached_property
    def slots(self) -> list[Tensor]:
        """Memory keys and values, [B, S, 1, hk, d]."""
        shape = (self.tokens // self.options.block, self.options.slots, 1, self.options.kv_heads, self.options.head_dim)
        return [self._leaf(*shape) for _ in range(2)]

    @cached_property
    def rows(self) -> list[Tensor]:
        """[1, h, T, d], the order that torch's attention likes best."""
        return [x.detach().permute(1, 2, 0, 3).contiguous().requires_grad_() for x in self.qkv]

    @cached_property
    def rows_with_slots(self) -> list[Tensor]:
        """[1, h, T, d] and twice [1, h, B·S + T, d], slots first."""
        keys = [torch.cat([s.detach().flatten(0, 1).permute(1, 2, 0, 3), x.detach()], 2)
                for s, x in zip(self.slots, self.rows[1:], strict=True)]  # fmt: skip
        return [self.rows[0], *(x.contiguous().requires_grad_() for x in keys)]


class Kind(NamedTuple):
    """One line of candidates: how to make the call, and its work by direction."""

    name: str
    make: Make
    work: Callable[[bool], Work]
    is_peer: bool = False


class AttentionBenchmark:
    """Candidates in groups of one length and direction."""

    def __init__(self, options: AttentionOptions, device: torch.device) -> None:
        self.options, self.device, self.dtype = options, device, DTYPES[options.dtype]
        self.heads = Heads(options.heads, options.kv_heads, options.head_dim, self.dtype.itemsize)
        self.banks = banks_of(options, options.order)
        self.implementations, self.taken, self.obstacle = implementations(device, self.dtype, options.head_dim)

    def candidates(self) -> list[Candidate]:
        found = []
        for tokens in self.options.lengths:
            sample = Sample(self.options, tokens, self.device)
            for direction in (FORWARD, BOTH):
                found += [self._candidate(kind, tokens, direction) for kind in self._kinds(sample)]
        return found

    def _candidate(self, kind: Kind, tokens: int, direction: str) -> Candidate:
        backward = direction == BOTH

        def prepare() -> Call:
            run, inputs = kind.make(backward)
            return differentiated(run, inputs, backward)

        group = f"{tokens:,} tokens, {direction}"
        return Candidate(group, kind.name, prepare, tokens, kind.work(backward), kind.is_peer)

    def _kinds(self, sample: Sample) -> list[Kind]:
        options, heads, tokens = self.options, self.heads, sample.tokens
        sizes = MemorySizes(options.order, options.slots, options.block, tokens)
        pairs, keys = pairs_of(tokens, options.block, options.slots), tokens + sizes.blocks * options.slots

        def trapezoid(backward: bool) -> Work:
            return attention_work(tokens, keys, pairs, heads, backward)

        def memory(backward: bool) -> Work:
            return memory_work(sizes, heads, backward)

        kinds = [
            Kind(CAUSAL, lambda _: (lambda: causal_attention(*sample.rows), sample.rows),
                 lambda backward: attention_work(tokens, tokens, causal_pairs(tokens), heads, backward), is_peer=True)
        ]  # fmt: skip
        if options.flex:
            kinds.append(Kind(FLEX, partial(self._flex, sample), trapezoid))
        for name in self.implementations:
            kinds += [
                Kind(f"{ELASTIC}, {name}", partial(self._elastic, sample, name),
                     lambda backward: trapezoid(backward) + memory(backward)),
                Kind(f"{ALONE}, {name}", partial(self._alone, sample, name), trapezoid),
                Kind(f"{MEMORY}, {name}", partial(self._memory, sample, name), memory),
            ]  # fmt: skip
        return kinds

    def _flex(self, sample: Sample, backward: bool) -> tuple[Compute, list[Tensor]]:
        run = flex_attention(sample.tokens, self.options.block, self.options.slots, self.device, backward)
        # On the CPU it refuses inputs with a gradient even where none is asked for.
        inputs = sample.rows_with_slots if backward else [x.detach() for x in sample.rows_with_slots]
        return (lambda: run(*inputs)), inputs

    def _elastic(self, sample: Sample, name: str, _: bool) -> tuple[Compute, list[Tensor]]:
        self._require(name)
        query, key, value = sample.qkv

        def run() -> Tensor:
            memory = block_memory(key, value, sample.layout, self.banks, implementation=name)
            memory.read_own()
            return trapezoid_attention(query, key, value, memory.slots, sample.layout, implementation=name)

        return run, sample.qkv

    def _alone(self, sample: Sample, name: str, _: bool) -> tuple[Compute, list[Tensor]]:
        self._require(name)
        query, key, value = sample.qkv
        slots = (sample.slots[0], sample.slots[1])
        run = partial(trapezoid_attention, query, key, value, slots, sample.layout, implementation=name)
        return run, [*sample.qkv, *slots]

    def _memory(self, sample: Sample, name: str, _: bool) -> tuple[Compute, list[Tensor]]:
        self._require(name)
        key, value = sample.qkv[1:]
        return (lambda: block_memory(key, value, sample.layout, self.banks, implementation=name).slots()), [key, value]

    def _require(self, name: str) -> None:
        if name == "triton" and self.obstacle:
            raise UnavailableError(self.obstacle)

    def findings(self, rows: Rows) -> Findings:
        found, lengths = Findings(), sorted(self.options.lengths)
        ours = f"{ELASTIC}, {self.taken}"
        for direction in (FORWARD, BOTH):
            for tokens in lengths:
                found.figures += self._figures(rows, f"{tokens:,} tokens, {direction}", direction, tokens)
            groups = [(f"{tokens:,} tokens, {direction}", ours) for tokens in (lengths[-1], lengths[0])]
            if len(lengths) > 1:
                text = f"time at {lengths[-1]:,} over {lengths[0]:,} tokens, {direction}: {ours}"
                key = f"scaling/{direction}/{lengths[0]}/{lengths[-1]}"
                found.figures.append(rows.compared(key, text, groups[0], groups[1]))
            found.charts.append(self._chart(rows, direction))
        found.notes = [
            "The peer gets its inputs in the layout it likes best and no rotary embedding; the trapezoid gets them as the "
            "model has them, and rotates.",
            "FlexAttention and 'attention alone' are given their slots; compare these two.",
            f"`auto` takes {self.taken} here.",
        ]
        return found

    def _figures(self, rows: Rows, group: str, direction: str, tokens: int) -> list[Figure]:
        causal, ours, alone = ((group, name) for name in (CAUSAL, f"{ELASTIC}, {self.taken}", f"{ALONE}, {self.taken}"))
        work = [rows.find(*which) for which in (causal, ours)]
        flops = work[0]["flops"] / work[1]["flops"] if work[0] and work[1] else None
        figures = [
            rows.compared(f"speed/{direction}/{tokens}", f"{group}: speed of {ours[1]}, over {CAUSAL}", causal, ours),
            Figure(f"flops/{direction}/{tokens}", f"{group}: FLOPs of {CAUSAL} over ours", flops),
        ]
        if self.options.flex:
            text = f"{group}: speed of {alone[1]}, over FlexAttention"
            figures.append(rows.compared(f"flex/{direction}/{tokens}", text, (group, FLEX), alone))
        return figures

    def _chart(self, rows: Rows, direction: str) -> Chart:
        series: dict[str, list[tuple[float, float]]] = {}
        for tokens in self.options.lengths:
            for row in rows.group(f"{tokens:,} tokens, {direction}"):
                if row["seconds"]:
                    series.setdefault(row["name"], []).append((tokens, 1e3 * row["seconds"]["median"]))
        return Chart(direction, "tokens", "ms", series)
