"""Host side of the memory kernels: sizes, matrices and tables of one layer and micro-batch, and the launches.

`kernels.py` has the kernels and the legend, `schedule.py` the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from em_megatron.hippo.banks import ORDER_MULTIPLE, MemoryBanks, Superchunk
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.memory import kernels
from em_megatron.ops.memory.schedule import Schedule
from em_megatron.ops.tiles import padded, precision_of

Pair = tuple[Tensor, Tensor]  # the same of keys and of values


@dataclass(frozen=True)
class Launch:
    """One superchunk and the lines of its table."""

    chunk: Superchunk
    lines: Tensor
    writes: bool  # whether some document writes a state at its end
    carries: bool  # whether such a document has a state at its start

    def inject(self) -> Tensor:
        return self.chunk.padded_inject

    def triangle(self) -> Tensor | None:
        return self.chunk.packed_triangle if self.chunk.num_blocks > 1 else None

    def carry(self) -> Tensor | None:
        return self.chunk.padded_carry if self.carries else None


class MemoryLaunches:
    """The kernels for signals of one shape and layout.

    Args:
        like: keys [T, b, h, d].
        layout, banks, superchunk: as in `memory_slots`.
        bank_dtype: of the matrices that read.
    """

    def __init__(
        self, like: Tensor, layout: BlockLayout, banks: MemoryBanks, superchunk: int, bank_dtype: torch.dtype
    ) -> None:
        self.shape, self.dtype, self.device, self.layout = like.shape, like.dtype, like.device, layout
        self.heads, self.dim = like.shape[2:]
        self.slots, self.length, self.order = banks.slots, banks.block_length, padded(banks.order, ORDER_MULTIPLE)
        if ("schedule", superchunk) not in layout.derived:
            layout.derived["schedule", superchunk] = Schedule(layout, superchunk)
        self.schedule: Schedule = layout.derived["schedule", superchunk]
        singles = sum(not p.key.shared for p in self.schedule.passes)
        if singles:
            banks.make_room(singles)
        self.chunks = [p.key.matrices(banks, bank_dtype, like.device) for p in self.schedule.passes]
        largest = max((p.key.num_blocks for p in self.schedule.passes), default=0)
        if self.order * largest * max(self.length, self.slots) >= 2**31:
            raise ValueError(
                f"the matrices of a superchunk of {largest} blocks at order {banks.order} are beyond the 2³¹ numbers that "
                "kernels count to: choose a smaller memory.superchunk"
            )
        self.constants = {
            "P": self.order,
            "D": self.dim,
            "BLOCK_D": max(16, next_power_of_2(self.dim)),
            "PRECISION": precision_of(like.dtype),
        }

    def _launches(self, kind: str) -> list[Launch]:
        """In the order of the blocks, those that have lines of this kind."""
        return [
            Launch(
                chunk, self.schedule.table(index, kind, self.device), bool(found.writes), found.carries_a_state(kind)
            )
            for index, (found, chunk) in enumerate(zip(self.schedule.passes, self.chunks, strict=True))
            if getattr(found, kind)
        ]

    def _grid(self, rows: int, lines: Tensor) -> Any:
        return lambda meta: (self.heads, cdiv(rows, meta["BLOCK_M"]), len(lines))

    def _new(self, whole: bool, *shape: int) -> Tensor:
        """Not initialized if the kernels will write it whole."""
        new = torch.empty if whole else torch.zeros
        return new(shape, dtype=self.dtype, device=self.device)

    def new_states(self) -> Tensor:
        """[P, states, h, 2d] fp32, zero."""
        shape = (self.order, self.schedule.num_states, self.heads, 2 * self.dim)
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def new_slots(self, zero: bool = False) -> Pair:
        """[B, b, h, S, d], zero where no block reads, or all of it."""
        shape = (self.layout.num_blocks, self.shape[1], self.heads, self.slots, self.dim)
        whole = self.schedule.reads_all and not zero
        return self._new(whole, *shape), self._new(whole, *shape)

    def new_gradients(self) -> Pair:
        """[T, b, h, d], zero where no pass comes by."""
        return self._new(self.schedule.covers_all, *self.shape), self._new(self.schedule.covers_all, *self.shape)

    def write(self, signal: Pair, states: Tensor, kind: str = "writes", tokens: bool = True) -> None:
        """Fills the states at the end of the superchunks, one superchunk after another."""
        key, value = signal
        for launch in self._launches(kind):
            carry, inject = launch.carry(), launch.inject()
            kernels.write_kernel[self._grid(self.order, launch.lines)](
                key, value, states, carry if carry is not None else inject, inject, launch.lines,
                *key.stride()[:3], *value.stride()[:3], self.schedule.num_states, inject.shape[1],
                L=self.length, HAS_TOKENS=tokens, HAS_STATES=carry is not None, **self.constants,
            )  # fmt: skip

    def read(self, signal: Pair, states: Tensor | None, slots: Pair,
             tokens: bool = True, accumulate: bool = False) -> None:  # fmt: skip
        """Fills `slots` with what blocks read from tokens of their superchunk, from the states before it, or both."""
        key, value = signal
        for launch in self._launches("reads"):
            triangle = launch.triangle() if tokens else None
            carry = launch.chunk.padded_read_carry if states is not None and launch.chunk.start_block else None
            matrix = triangle if triangle is not None else carry
            if matrix is None:  # nothing to add
                continue
            kernels.read_kernel[self._grid(self.slots, launch.lines)](
                key, value, states if states is not None else matrix, matrix, carry if carry is not None else matrix,
                launch.lines, *slots, *key.stride()[:3], *value.stride()[:3], self.shape[1], self.schedule.num_states,
                S=self.slots, L=self.length, HAS_TOKENS=triangle is not None, HAS_STATES=carry is not None,
                ACCUMULATE=accumulate, **self.constants,
            )  # fmt: skip

    def state_gradients(self, d_slots: Pair | None, d_states: Tensor, kind: str,
                        carry: bool = True, accumulate: bool = False) -> None:  # fmt: skip
        """Fills the gradients of the states before the superchunks, the last superchunk first."""
        for launch in reversed(self._launches(kind)):
            read = launch.chunk.padded_read_carry if d_slots is not None else None
            moved = launch.carry() if carry else None
            if read is None and moved is None:  # nothing to add
                continue
            kernels.state_gradient_kernel[self._grid(self.order, launch.lines)](
                *(d_slots or (d_states, d_states)), d_states, read if read is not None else moved,
                moved if moved is not None else read, launch.lines,
                self.shape[1], self.schedule.num_states, S=self.slots, HAS_TOKENS=read is not None,
                HAS_STATES=moved is not None, ACCUMULATE=accumulate, **self.constants,
            )  # fmt: skip

    def signal_gradients(self, d_slots: Pair | None, d_states: Tensor | None) -> Pair:
        """Gradients of keys and values from those of the slots, of the states written, or both."""
        found = self.new_gradients()
        for launch in self._launches("blocks"):
            triangle = launch.triangle() if d_slots is not None else None
            inject = launch.inject() if d_states is not None and launch.writes else None
            matrix = triangle if triangle is not None else inject
            states = d_states if d_states is not None else found[0]
            kernels.signal_gradient_kernel[self._grid(self.length, launch.lines)](
                *(d_slots or (states, states)), states, matrix if matrix is not None else states,
                inject if inject is not None else matrix if matrix is not None else states, launch.lines, *found,
                self.shape[1], self.schedule.num_states, launch.chunk.num_blocks * self.length,
                S=self.slots, L=self.length, HAS_TOKENS=triangle is not None, HAS_STATES=inject is not None,
                **self.constants,
            )  # fmt: skip
        return found
