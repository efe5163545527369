"""`memory`: the memory operator, its factorisations and its orders, beside the recurrence token by token."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from em_megatron.benchmark.floors import Heads, MemorySizes, memory_work, per_token_work
from em_megatron.benchmark.machine import DTYPES
from em_megatron.benchmark.options import HeadOptions, MemoryOptions
from em_megatron.benchmark.peers import per_token_recurrence
from em_megatron.benchmark.results import Chart, Figure, Findings, Rows, Target
from em_megatron.benchmark.timing import Call, Candidate, UnavailableError
from em_megatron.config import ConfigError
from em_megatron.hippo.banks import MemoryBanks
from em_megatron.hippo.cost_model import bank_elements
from em_megatron.hippo.samplers import uniform
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.dispatch import choose, triton_obstacle
from em_megatron.ops.memory import block_memory

Compute = Callable[[], Tensor | tuple[Tensor, ...]]

FORWARD, BOTH = "forward", "forward + backward"
PLANNED, PARALLEL, RECURRENT = "planned", "parallel (one superchunk)", "recurrent (block by block)"
PER_TOKEN = "token by token"
LARGE_ORDER, MIDDLE_ORDER = 8640, 540
TARGETS = {"cpu": [Target(f"order/{BOTH}", "at most", 1.1)], "cuda": [Target(f"order/{BOTH}", "at most", 1.1)]}


def implementations(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[list[str], str, str | None]:
    """Those to measure, the one that `auto` takes, and why Triton cannot run (None if it can)."""
    taken = choose("auto", device, dtype, head_dim).name
    return ["triton", "batched"], taken, triton_obstacle(device, dtype, head_dim)


def banks_of(options: HeadOptions, order: int) -> MemoryBanks:
    """The matrices of an order, with uniform sampling."""
    folder = Path(options.bank_cache).expanduser() if options.bank_cache else None
    return MemoryBanks(order, options.block, uniform(options.slots), cache_dir=folder)


def differentiated(make: Compute, inputs: list[Tensor], backward: bool) -> Call:
    """`make` without gradients, or with the backward pass from fixed gradients to all inputs."""
    if not backward:
        return torch.no_grad()(make)
    with torch.no_grad():
        found = make()
    gradients = [torch.randn_like(x) for x in (found if isinstance(found, tuple) else (found,))]
    del found
    return lambda: torch.autograd.grad(make(), inputs, gradients)


class MemoryBenchmark:
    """Candidates: factorisations × implementations × orders, in groups of one order and direction."""

    def __init__(self, options: MemoryOptions, device: torch.device) -> None:
        if options.peer_tokens > options.length // 2:
            raise ConfigError(f"--peer-tokens {options.peer_tokens} is more than half of --length {options.length}")
        self.options, self.device, self.dtype = options, device, DTYPES[options.dtype]
        self.heads = Heads(options.kv_heads, options.kv_heads, options.head_dim, self.dtype.itemsize)
        shape = (2, options.length, 1, options.kv_heads, options.head_dim)
        key, value = torch.randn(shape, device=device).to(self.dtype).unbind()
        self.signal = (key.requires_grad_(), value.requires_grad_())
        self.layout = BlockLayout.single_document(1, options.length, options.block, device)
        self.banks = cache(partial(banks_of, options))
        self.implementations, self.taken, self.obstacle = implementations(device, self.dtype, options.head_dim)

    def candidates(self) -> list[Candidate]:
        """Orders innermost: what differs in the order only runs one right after another."""
        blocks, orders = self.options.length // self.options.block, self.options.orders
        forms = ((PLANNED, 0), (PARALLEL, blocks), (RECURRENT, 1))
        return [
            *(
                self._operator(order, direction, implementation, form, superchunk)
                for direction in (FORWARD, BOTH)
                for implementation in self.implementations
                for form, superchunk in forms
                for order in orders
            ),
            *(self._per_token(order) for order in orders),
        ]

    def _operator(self, order: int, direction: str, implementation: str, form: str, superchunk: int) -> Candidate:
        options, backward = self.options, direction == BOTH
        sizes = MemorySizes(order, options.slots, options.block, options.length, superchunk)

        def prepare() -> Call:
            if implementation == "triton" and self.obstacle:
                raise UnavailableError(self.obstacle)
            shape = (sizes.blocks, sizes.m, order, options.slots, options.block)
            size = bank_elements(*shape) * self.dtype.itemsize / 2**30
            if size > options.bank_limit:
                raise UnavailableError(
                    f"its matrices take {size:,.1f} GiB, more than --bank-limit {options.bank_limit:g}"
                )

            def run() -> tuple[Tensor, Tensor]:
                memory = block_memory(*self.signal, self.layout, self.banks(order), superchunk, implementation)
                return memory.slots()

            return differentiated(run, [*self.signal], backward)

        return Candidate(
            group=f"order {order}, {direction}",
            name=f"{form}{f', {sizes.m} at once' if form == PLANNED else ''}, {implementation}",
            prepare=prepare,
            tokens=options.length,
            work=memory_work(sizes, self.heads, backward),
            is_peer=backward and form == RECURRENT and implementation == "batched",
        )

    def _per_token(self, order: int) -> Candidate:
        count = self.options.peer_tokens

        def prepare() -> Call:
            return torch.no_grad()(
                per_token_recurrence(order, torch.cat(self.signal, -1), count, self.options.length // 2)
            )

        name = f"{PER_TOKEN}, measured over {count} tokens"
        work = per_token_work(order, count, self.heads)
        return Candidate(f"order {order}, {FORWARD}", name, prepare, count, work, is_peer=True)

    def findings(self, rows: Rows) -> Findings:
        found, taken = Findings(), self.taken
        for order in self.options.orders:
            found.figures += self._figures_of_order(rows, order)
        for direction in (FORWARD, BOTH):
            names = [(f"order {order}, {direction}", f"{PARALLEL}, {taken}") for order in (LARGE_ORDER, MIDDLE_ORDER)]
            text = f"parallel form, order {LARGE_ORDER} over order {MIDDLE_ORDER}: time of {direction}, {taken}"
            if {LARGE_ORDER, MIDDLE_ORDER} <= set(self.options.orders):
                found.figures.append(rows.compared(f"order/{direction}", text, names[0], names[1]))
        for direction in (FORWARD, BOTH):
            bars = {
                f"N={order}, {row['name']}": 1e3 * row["seconds"]["median"]
                for order in self.options.orders
                for row in rows.group(f"order {order}, {direction}")
                if row["seconds"] and PER_TOKEN not in row["name"]
            }
            found.charts.append(Chart(direction, f"ms for {self.options.length:,} tokens", "", bars=bars))
        found.notes = [
            "Peer of the forward pass: HiPPO-LegS token by token. Its tokens/s are measured over a few tokens from the "
            "middle of the sample; that the whole sample would take T times as long is an extrapolation.",
            "Peer of forward and backward: the recurrence block by block in batched PyTorch.",
            f"`auto` takes {taken} here.",
        ]
        return found

    def _figures_of_order(self, rows: Rows, order: int) -> list[Figure]:
        group, figures = f"order {order}, {FORWARD}", []
        planned = [row for row in rows.group(group) if row["name"].startswith(PLANNED) and row["status"] == "measured"]
        slow = next(row for row in rows.group(group) if row["is_peer"])
        best = next((row for row in planned if row["name"].endswith(self.taken)), None)
        if best is not None:
            text = f"order {order}: speed of the planned form, {self.taken}, over the recurrence token by token (extrapolated)"
            figures.append(Figure(f"per token/{order}", text, best["times_peer"]))
        if slow["seconds"]:
            each = slow["seconds"]["median"] / slow["tokens"]
            text = (
                f"order {order}: a token of that recurrence (× T = {each * self.options.length:,.3g} s, extrapolated)"
            )
            figures.append(Figure(f"seconds per token/{order}", text, 1e3 * each, "ms"))
        return figures
