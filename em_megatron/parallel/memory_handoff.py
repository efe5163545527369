"""Context parallelism: the memory's states are passed between ranks, not keys and values.

Each rank r of a context-parallel group holds one contiguous run of blocks. What it adds to a document that goes on to
the right, D_r, is computed from a zero start, so that nobody waits to begin, and

    C_start(r) = Σ_{r' < r, same document} carry(end(r') → start(r)) D_{r'}

travels in one of two ways, both in fp32 (fp64 for fp64 signals) and exact:

    all_gather   every rank gets every D and sums for itself: one collective, (ranks − 1) states into each rank
    chain        rank r adds D_r to the carried C_start(r) and passes it on: one state over each link, in pieces, so that
                 the next rank works on the first piece while this one works on the second

Backward is the transposed sum, the same way round. A launch is issued as early as its input is there and waited for as
late as its output is needed: forward, the block's own attention lies between; backward, that attention's gradient. (On
the CPU a rank of the chain receives within its launch, so only the sends overlap; on a GPU the relay has a stream.)

Every rank of the group knows the documents of the whole sample (`BlockLayout.history`), so all agree, without asking, on
who takes part. Nothing here depends on the number of heads, which tensor parallelism may split beforehand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from em_megatron.hippo.banks import MemoryBanks
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.parallel.handoff_cost import HANDOFFS, chain_pieces

# torch 2.14 gave the collective another name and warns of the old one.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


@dataclass(frozen=True)
class Route:
    """What crosses the boundaries between ranks, for one micro-batch, as this rank sees it.

    history: BlockLayout.history. rank: this rank. part: blocks of a rank. rows: samples in which any document spans two
    ranks, the only ones whose states travel.
    """

    history: tuple[tuple[int, ...], ...]
    rank: int
    part: int
    rows: tuple[int, ...]

    @classmethod
    def of(cls, layout: BlockLayout) -> Route:
        crossing = [row for row in range(layout.batch_size) if any(line[row] for line in layout.history[1:-1])]
        return cls(layout.history, layout.sequence_rank, layout.num_blocks, tuple(crossing))

    @property
    def size(self) -> int:
        """Ranks that share the sample."""
        return len(self.history) - 1

    def entering(self, rank: int) -> list[int]:
        """Samples with a document that reaches `rank` from the rank before it."""
        return [row for row in self.rows if self.history[rank][row]] if 0 < rank < self.size else []

    def leaving(self, rank: int) -> list[int]:
        """Samples with a document that goes on from `rank` to the next rank."""
        return self.entering(rank + 1)

    def passing(self, rank: int) -> list[int]:
        """Samples with a document that reaches `rank` from the rank before it and goes on beyond it."""
        came = self.entering(rank)
        return [row for row in self.leaving(rank) if row in came and self.history[rank + 1][row] > self.part]

    def sources(self, row: int) -> list[int]:
        """Ranks before this one that hold the document entering here, nearest first."""
        found, rank = [], self.rank
        while rank > 0 and self.history[rank][row]:
            found.append(rank - 1)
            if self.history[rank][row] <= self.part:
                break
            rank -= 1
        return found

    def targets(self, row: int) -> list[int]:
        """Ranks after this one that hold the document leaving here, nearest first."""
        found, rank = [], self.rank + 1
        while rank < self.size and self.history[rank][row]:
            found.append(rank)
            if rank + 1 == self.size or self.history[rank + 1][row] <= self.part:
                break
            rank += 1
        return found

    def alike(self, rows: list[int]) -> list[list[int]]:
        """Rows grouped by equal histories on all ranks: they share every matrix."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            groups.setdefault(tuple(line[row] for line in self.history[1:-1]), []).append(row)
        return list(groups.values())


class Exchange(ABC):
    """States on their way between the ranks of a group, for one layer and micro-batch.

    launch and wait serve the forward pass, launch_gradient and wait_gradient the backward pass. States are
    [N, rows, h, c]; the rows of what leaves and enters are those of `Route.leaving` and `Route.entering`.
    """

    def __init__(self, route: Route, banks: MemoryBanks, group: dist.ProcessGroup) -> None:
        self.route, self.banks, self.group = route, banks, group
        self.enter = route.entering(route.rank)
        self.leave = route.leaving(route.rank)

    @abstractmethod
    def launch(self, contribution: Tensor) -> None:
        """Sends on its way what this rank adds to the documents that leave, [N, leaving, h, c]."""

    @abstractmethod
    def wait(self) -> Tensor:
        """C_start of the documents that enter, [N, entering, h, c]."""

    @abstractmethod
    def launch_gradient(self, gradient: Tensor | None) -> None:
        """Sends on its way the gradient of what `wait` gave, None where nothing entered."""

    @abstractmethod
    def wait_gradient(self) -> Tensor:
        """The gradient of what was launched, [N, leaving, h, c]."""

    def _carry(self, start: int, stop: int, like: Tensor) -> Tensor:
        return self.banks.carry(start, stop, like.dtype, like.device)


class AllGather(Exchange):
    """One all-gather of contributions forward, one of gradients backward; every rank sums for itself."""

    def launch(self, contribution: Tensor) -> None:
        self._shape = contribution.shape[2:]
        self._nothing = contribution.detach().new_empty(contribution.shape[0], 0, *self._shape)
        self._states, self._work = self._gather(contribution, self.leave)

    def wait(self) -> Tensor:
        self._work.wait()
        here = self.route.history[self.route.rank]
        found = self._states.new_zeros(self._states.shape[1], len(self.enter), *self._shape)
        for rows in self.route.alike(self.enter):
            at, columns = [self.enter.index(row) for row in rows], self._columns(rows)
            for source in self.route.sources(rows[0]):
                end = self.route.history[source + 1][rows[0]]
                found[:, at] += self._carried(self._states[source][:, columns], end, here[rows[0]])
        del self._states, self._work
        return found

    def launch_gradient(self, gradient: Tensor | None) -> None:
        part = self._nothing if gradient is None else gradient
        self._gradients, self._gradient_work = self._gather(part, self.enter)

    def wait_gradient(self) -> Tensor:
        self._gradient_work.wait()
        end = self.route.history[self.route.rank + 1]
        found = self._gradients.new_zeros(self._gradients.shape[1], len(self.leave), *self._shape)
        for rows in self.route.alike(self.leave):
            at, columns = [self.leave.index(row) for row in rows], self._columns(rows)
            for target in self.route.targets(rows[0]):
                start = self.route.history[target][rows[0]]
                found[:, at] += self._carried(self._gradients[target][:, columns], end[rows[0]], start, transpose=True)
        del self._gradients, self._gradient_work
        return found

    def _carried(self, state: Tensor, start: int, stop: int, transpose: bool = False) -> Tensor:
        """carry(start → stop blocks), or its transpose, times a state [N, ...]."""
        if start == stop:
            return state
        matrix = self._carry(start, stop, state)
        return torch.tensordot(matrix.T if transpose else matrix, state, 1)

    def _columns(self, rows: list[int]) -> list[int]:
        return [self.route.rows.index(row) for row in rows]

    def _gather(self, part: Tensor, rows: list[int]) -> tuple[Tensor, Any]:
        """Everyone's states [ranks, N, crossing rows, h, c], and what to wait for; zeros where a rank has none."""
        mine = part.new_zeros(part.shape[0], len(self.route.rows), *self._shape)
        mine[:, self._columns(rows)] = part
        everyone = mine.new_empty(self.route.size, *mine.shape)
        return everyone, _all_gather(everyone.flatten(0, 1), mine, group=self.group, async_op=True)


class Chain(Exchange):
    """From rank to rank, in pieces of the channels. On a GPU the relay runs on a stream of its own."""

    def launch(self, contribution: Tensor) -> None:
        self._nothing = contribution.detach().new_empty(contribution.shape[0], 0, *contribution.shape[2:])
        self._forward = self._relay(contribution, self.leave, self.enter, step=1)

    def wait(self) -> Tensor:
        relayed = self._forward
        del self._forward  # else this object and what it returned would keep each other alive
        return relayed.arrived()

    def launch_gradient(self, gradient: Tensor | None) -> None:
        gradient = self._nothing if gradient is None else gradient
        self._backward = self._relay(gradient, self.enter, self.leave, step=-1)

    def wait_gradient(self) -> Tensor:
        relayed = self._backward
        del self._backward
        return relayed.arrived()

    def _relay(self, own: Tensor, out_rows: list[int], in_rows: list[int], step: int) -> _Relayed:
        """Receives in_rows from rank − step, adds what passes through, carried, to `own`, and sends the result,
        out_rows, to rank + step; what came in is [N, in_rows, h, c]."""
        rank, pieces, relayed = self.route.rank, [], _Relayed()
        # Made and kept on the layer's own stream, and kept until what is queued beside it is done with them.
        carries = {row: self._carry(self.route.history[rank][row], self.route.history[rank + 1][row], own)
                   for row in self.route.passing(rank)}  # fmt: skip
        relayed.in_use = (own, carries)
        with relayed.beside():
            for piece in own.tensor_split(chain_pieces(self.route.size, own.shape[-1]), -1):
                came = piece.new_empty(piece.shape[0], len(in_rows), *piece.shape[2:])
                if in_rows:
                    dist.recv(came, group=self.group, group_src=rank - step)
                pieces.append(came)
                if not out_rows:
                    continue
                total = piece.clone(memory_format=torch.contiguous_format)
                for row, carry in carries.items():
                    matrix = carry if step > 0 else carry.T
                    total[:, out_rows.index(row)] += torch.tensordot(matrix, came[:, in_rows.index(row)], 1)
                relayed.sends.append((dist.isend(total, group=self.group, group_dst=rank + step), total))
            relayed.state = torch.cat(pieces, -1)
        return relayed


class _Relayed:
    """What a rank of the chain received, and what it is still sending."""

    state: Tensor
    in_use: Any

    def __init__(self) -> None:
        self.sends: list[tuple[Any, Tensor]] = []
        self._event: Any = None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work inside is queued beside the layer's own on a GPU, the ends of the sends after it; on the CPU it is done
        when the block ends, except for the sends."""
        if not torch.cuda.is_available():
            yield
            return
        stream = _side_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
            self._event = stream.record_event()
            for work, _ in self.sends:
                work.wait()

    def arrived(self) -> Tensor:
        """The state, when it is there."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
            self.state.record_stream(torch.cuda.current_stream())
        else:
            for work, _ in self.sends:
                work.wait()
        return self.state


_streams: dict[int, Any] = {}


def _side_stream() -> Any:
    device = torch.cuda.current_device()
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


EXCHANGES: dict[str, type[Exchange]] = {"all_gather": AllGather, "chain": Chain}
assert tuple(EXCHANGES) == HANDOFFS


class Launch(torch.autograd.Function):
    """Forward: launches the states. Backward: waits for their gradients. The token ties it to `Arrive` or `Tie`."""

    @staticmethod
    def forward(ctx: Any, contribution: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.launch(contribution)
        return contribution.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait_gradient(), None


class Arrive(torch.autograd.Function):
    """Forward: waits for the states that enter. Backward: launches their gradients."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.wait()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.launch_gradient(gradient)
        return gradient.new_empty(0), None


class Tie(torch.autograd.Function):
    """Where nothing enters: passes `x` through, and takes part in the gradients' way back when x's gradient comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.token = exchange, token.dtype
        exchange.wait()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.exchange.launch_gradient(None)
        return gradient, gradient.new_empty(0, dtype=ctx.token), None


class Handoff:
    """The states of one layer and micro-batch, sent on construction.

    Args:
        leaving: [N, leaving, h, c] from `BlockMemory.leaving_states`; None where no document goes on.
        signal: [any, b, h, c], what the memory is written from, or nothing of it that is still tied to its gradient.
        layout: the documents; `layout.crosses_ranks` must hold.
        banks: the matrices of the memory.
        group: the context-parallel group.
        kind: all_gather or chain.
    """

    def __init__(
        self,
        leaving: Tensor | None,
        signal: Tensor,
        layout: BlockLayout,
        banks: MemoryBanks,
        group: dist.ProcessGroup,
        kind: str,
    ) -> None:
        route = Route.of(layout)
        self.exchange = EXCHANGES[kind](route, banks, group)
        if leaving is None:
            # Nothing, but cut from the signal: whoever asks for its gradient takes part in the way back.
            dtype = torch.promote_types(signal.dtype, torch.float32)
            leaving = signal.reshape(-1)[:0].to(dtype).view(banks.order, 0, *signal.shape[-2:])
        self.token = Launch.apply(leaving, self.exchange)

    def arrive(self) -> Tensor:
        """C_start of the documents that entered from other ranks, [N, entering, h, c]."""
        state: Tensor = Arrive.apply(self.token, self.exchange)
        return state

    def tie(self, x: Tensor) -> Tensor:
        """For ranks on which nothing enters: `x`, whose gradient then also starts the way back."""
        if not self.token.requires_grad:  # then there is no way back on any rank
            self.exchange.wait()
            return x
        tied: Tensor = Tie.apply(x, self.token, self.exchange)
        return tied
