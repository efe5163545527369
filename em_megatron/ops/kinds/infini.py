"""Infini-attention (arXiv 2404.07143): each block reads a matrix of associations of all blocks before it.

Legend: B blocks at hand, L block length, b samples, hq query and hk key/value heads, d head dimension.

What a block adds is computed for all blocks at once; only the sum over blocks, and for the delta rule what it takes away,
goes block by block. Under context parallelism a rank's blocks change the state that enters them by an affine map,
M → A M + U (A the identity for the linear update), and z → z + c: the ranks gather these maps and compose them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from em_megatron.hf.kinds_elastic_memory import positive
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.kinds.exchange import gather
from em_megatron.ops.kinds.reading import Reading, gated, readers, untouched
from em_megatron.ops.transfer import to_device
from em_megatron.parallel.memory_handoff import Route


def infini_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, reading: Reading, weights: Mapping[str, Tensor]
) -> Tensor:
    """σ(β) φ(Q) M / (φ(Q) z) + (1 − σ(β)) A_local where there is a history, A_local elsewhere: [T, b, hq, d]."""
    local = reading.local(query, key, value, layout)
    if not layout.runs and not layout.crosses_ranks:
        return untouched(local, weights)
    if reading.memory.detach_memory:
        key, value = key.detach(), value.detach()
    matrices, normalizers = _States(key, value, layout, reading).entering_blocks()
    blocks, rows, (length, heads) = layout.num_blocks, layout.batch_size, (layout.block_length, query.shape[2])
    found = positive(query).view(blocks, length, rows, key.shape[2], -1, query.shape[-1]).permute(0, 2, 3, 4, 1, 5)
    below = found @ normalizers[:, :, :, None, :, None]
    read = (found @ matrices[:, :, :, None]) / below.where(below > 0, torch.ones_like(below))
    read = read.permute(0, 4, 1, 2, 3, 5).reshape(blocks * length, rows, heads, -1)
    return gated(read, local, weights["gate"], layout)


class _States:
    """M and z before each block at hand; zeros where a block has no history."""

    def __init__(self, key: Tensor, value: Tensor, layout: BlockLayout, reading: Reading) -> None:
        self.layout, self.reading = layout, reading
        shape = (layout.num_blocks, layout.block_length, *key.shape[1:])
        self.keys = positive(key).view(shape).permute(0, 2, 3, 1, 4)  # [B, b, hk, L, d]
        self.values = value.to(self.keys.dtype).view(shape).permute(0, 2, 3, 1, 4)
        self.sums = self.keys.sum(3)
        self.added = self.keys.transpose(-1, -2) @ self.values
        self.delta = reading.memory.update == "delta"
        self.goes_on = _goes_on(layout, key.device).to(self.keys.dtype)[..., None, None]  # [B, b, 1, 1]

    def entering_blocks(self) -> tuple[Tensor, Tensor]:
        """[B, b, hk, d, d] and [B, b, hk, d]."""
        matrix, normalizer = self.added.new_zeros(self.added.shape[1:]), self.sums.new_zeros(self.sums.shape[1:])
        if self.layout.crosses_ranks:
            normalizer = self._from_the_left(self._end_of_sums())
            matrix = self._matrix_from_the_left(normalizer)
        found = []
        for block in range(self.layout.num_blocks):
            matrix, normalizer = matrix * self.goes_on[block][..., None], normalizer * self.goes_on[block]
            found.append((matrix, normalizer))
            if block + 1 < self.layout.num_blocks:
                if self.delta:
                    matrix = matrix - self._taken(block, normalizer, matrix)
                matrix, normalizer = matrix + self.added[block], normalizer + self.sums[block]
        return torch.stack([m for m, _ in found]), torch.stack([z for _, z in found])

    def _taken(self, block: int, normalizer: Tensor, matrix: Tensor) -> Tensor:
        """φ(K)ᵀ (φ(K) M / (φ(K) z)) of a block; zeros where nothing entered it."""
        below = self.keys[block] @ normalizer[..., None]
        return self.keys[block].transpose(-1, -2) @ (
            (self.keys[block] @ matrix) / below.where(below > 0, torch.ones_like(below))
        )

    def _end_of_sums(self) -> Tensor:
        """What the blocks here add to the z of the documents at their end, from zero, [b, hk, d]."""
        total = self.sums[0]
        for block in range(1, self.layout.num_blocks):
            total = total * self.goes_on[block] + self.sums[block]
        return total

    def _from_the_left(self, given: Tensor) -> Tensor:
        """Sum over the ranks before this one that hold the document that enters here, [b, …] of each rank's `given`."""
        everyone = gather(given, self.reading.group)
        return (everyone * self._sources(given)).sum(0)

    def _matrix_from_the_left(self, normalizer: Tensor) -> Tensor:
        """M of the documents that enter here, [b, hk, d, d]."""
        if not self.delta:
            total = self.added[0]
            for block in range(1, self.layout.num_blocks):
                total = total * self.goes_on[block][..., None] + self.added[block]
            return self._from_the_left(total)
        kept, added = self._end_of_delta(normalizer)
        everyone = gather(torch.cat([kept, added], -1), self.reading.group)
        sources, matrix = self._sources(added), torch.zeros_like(added)
        for rank, part in enumerate(everyone):
            keeps, adds = part.chunk(2, -1)
            matrix = torch.lerp(matrix, keeps @ matrix + adds, sources[rank])
        return matrix

    def _end_of_delta(self, normalizer: Tensor) -> tuple[Tensor, Tensor]:
        """The affine map M → A M + U of all blocks here, for documents that leave, [b, hk, d, d] each."""
        added = torch.zeros_like(self.added[0])
        kept = torch.eye(added.shape[-1], dtype=added.dtype, device=added.device).expand_as(added)
        for block in range(self.layout.num_blocks):
            on = self.goes_on[block][..., None]
            kept, added, normalizer = kept * on, added * on, normalizer * self.goes_on[block]
            kept = kept - self._taken(block, normalizer, kept)
            added = added - self._taken(block, normalizer, added) + self.added[block]
            normalizer = normalizer + self.sums[block]
        return kept, added

    def _sources(self, like: Tensor) -> Tensor:
        """[ranks, b, 1, …] 1 for ranks that hold the document that enters here, as many dimensions as `like` has and one."""
        found = _sources(self.layout, like.device)
        return found.to(like.dtype).view(*found.shape, *[1] * (like.dim() - 1))


def _goes_on(layout: BlockLayout, device: torch.device) -> Tensor:
    """[B, b] bool: blocks that go on with the document of the block before them."""
    if _goes_on not in layout.derived:
        found = torch.zeros(layout.num_blocks, layout.batch_size, dtype=torch.bool)
        for reader in readers(layout):
            found[reader.block, reader.row] = True
        layout.derived[_goes_on] = to_device(found, device)
    kept: Tensor = layout.derived[_goes_on]
    return kept


def _sources(layout: BlockLayout, device: torch.device) -> Tensor:
    """[ranks, b] bool: ranks before this one that hold the document that enters here."""
    if _sources not in layout.derived:
        found = torch.zeros(layout.sequence_size, layout.batch_size, dtype=torch.bool)
        route = Route.of(layout)
        for row in layout.entering_rows if layout.sequence_rank else ():
            found[route.sources(row), row] = True
        layout.derived[_sources] = to_device(found, device)
    kept: Tensor = layout.derived[_sources]
    return kept
