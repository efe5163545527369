"""The memory operator with Triton kernels, and its gradients; it is linear, so nothing is saved for the backward pass.

Where no state enters or leaves, all is one function: the states between superchunks one after another, then one launch
per superchunk for everything its blocks read. Otherwise the same kernels go in three steps (`TritonMemory`), so that
what other ranks wait for is sent first and what comes from them is needed last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from em_megatron.hippo.banks import MemoryBanks
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.memory.launches import MemoryLaunches, Pair


class Remember(torch.autograd.Function):
    """Keys and values [T, b, h, d] → slots [B, b, h, S, d] of documents that begin and end here."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, launches: MemoryLaunches) -> Pair:
        ctx.launches = launches
        states, slots = launches.new_states(), launches.new_slots()
        launches.write((key, value), states)
        launches.read((key, value), states, slots)
        return slots

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_keys: Tensor, d_values: Tensor) -> tuple[Tensor, Tensor, None]:
        launches: MemoryLaunches = ctx.launches
        d_slots, d_states = (d_keys.contiguous(), d_values.contiguous()), launches.new_states()
        launches.state_gradients(d_slots, d_states, "segments")
        return *launches.signal_gradients(d_slots, d_states), None


class Write(torch.autograd.Function):
    """Keys and values → states [P, states, h, 2d] after each superchunk, as if nothing had been there before."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, launches: MemoryLaunches) -> Tensor:
        ctx.launches = launches
        states = launches.new_states()
        launches.write((key, value), states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        launches: MemoryLaunches = ctx.launches
        d_states = grad.clone(memory_format=torch.contiguous_format)
        launches.state_gradients(None, d_states, "links", accumulate=True)
        return *launches.signal_gradients(None, d_states), None


class ReadOwn(torch.autograd.Function):
    """Keys and values → what blocks read from their own superchunk, [B, b, h, S, d]."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, launches: MemoryLaunches) -> Pair:
        ctx.launches = launches
        whole = launches.schedule.reads_all and all(chunk.num_blocks > 1 for chunk in launches.chunks)
        slots = launches.new_slots(zero=not whole)
        launches.read((key, value), None, slots)
        return slots

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_keys: Tensor, d_values: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.launches.signal_gradients((d_keys.contiguous(), d_values.contiguous()), None), None


class AddStates(torch.autograd.Function):
    """Adds what blocks read from the states before their superchunk: those computed here and what documents brought."""

    @staticmethod
    def forward(
        ctx: Any,
        own_keys: Tensor,
        own_values: Tensor,
        states: Tensor,
        entering: Tensor | None,
        launches: MemoryLaunches,
    ) -> Pair:
        """own_*: [B, b, h, S, d]; states as `Write` gives them; entering [N, entering, h, 2d]."""
        ctx.launches, ctx.brings = launches, entering is not None
        total, slots = states, (own_keys.clone(), own_values.clone())
        if entering is not None:
            brought = launches.new_states()
            brought[: entering.shape[0], : entering.shape[1]] = entering
            launches.write(slots, brought, "carries", tokens=False)
            total = states + brought
            ctx.order = entering.shape[0]
        launches.read(slots, total, slots, tokens=False, accumulate=True)
        return slots

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_keys: Tensor, d_values: Tensor) -> tuple[Tensor | None, ...]:
        launches: MemoryLaunches = ctx.launches
        d_states, d_entering = launches.new_states(), None
        launches.state_gradients((d_keys.contiguous(), d_values.contiguous()), d_states, "segments", carry=False)
        if ctx.brings:
            d_brought = d_states.clone()
            launches.state_gradients(None, d_brought, "brought", accumulate=True)
            d_entering = d_brought[: ctx.order, : launches.schedule.num_entering]
        return d_keys, d_values, d_states, d_entering, None


class TritonMemory:
    """The memory of the blocks at hand in three steps, as `batched.BlockMemory`.

    Args:
        key, value: [T_local, b, h, d], read in place whatever their strides are.
        layout, banks, superchunk: as in `memory_slots`.
        bank_dtype: of the matrices that read.
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        layout: BlockLayout,
        banks: MemoryBanks,
        superchunk: int,
        bank_dtype: torch.dtype,
    ) -> None:
        self.key, self.value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
        self.launches = MemoryLaunches(key, layout, banks, superchunk, bank_dtype)
        self.order, schedule = banks.order, self.launches.schedule
        self.apart = bool(schedule.num_entering or schedule.num_leaving)
        self._states = Write.apply(self.key, self.value, self.launches) if self.apart else None
        self._own: Pair | None = None

    @property
    def leaving_states(self) -> Tensor | None:
        """[N, leaving runs, h, 2d] in the order of layout.leaving, as if nothing had been there before; or None."""
        leaving = self.launches.schedule.num_leaving
        if self._states is None or not leaving:
            return None
        return self._states[: self.order, -leaving:]

    def read_own(self) -> None:
        """Computes what needs no state from elsewhere, if anything does."""
        if self.apart:
            self._own = ReadOwn.apply(self.key, self.value, self.launches)

    def slots(self, entering: Tensor | None = None) -> Pair:
        """Memory keys and values [B_local, S, b, h, d], zeros for blocks without a history.

        Args:
            entering: [N, rows, h, 2d] in the order of layout.entering_rows; None if there are none.
        """
        if not self.apart:
            keys, values = Remember.apply(self.key, self.value, self.launches)
        else:
            if self._own is None:
                self.read_own()
            assert self._own is not None
            keys, values = AddStates.apply(*self._own, self._states, entering, self.launches)
        return keys.permute(0, 3, 1, 2, 4), values.permute(0, 3, 1, 2, 4)
