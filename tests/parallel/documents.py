"""Packed samples for parity tests: documents of all kinds, in the form the data stream gives them."""

from __future__ import annotations

import torch
from torch import Tensor


def random_segments(generator: torch.Generator, blocks: int, block_length: int) -> list[int]:
    """Segment ids of a sample that obeys the rules of packing: a document of a block or more starts at a block boundary,
    shorter ones lie within a block, the rest of a block may be filled by short ones or padding."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    ids: list[int] = []
    segment, total = 0, blocks * block_length
    while len(ids) < total:
        room, kind = total - len(ids), draw(0, 3)
        segment += 1
        if kind == 0:  # one of whole blocks
            ids += [segment] * (block_length * draw(1, room // block_length))
        elif kind == 1:  # one that ends anywhere
            ids += [segment] * draw(block_length, room)
        while len(ids) % block_length or kind > 1:  # fill the block up
            kind, segment = 0, segment + 1
            length = draw(1, block_length - len(ids) % block_length)
            ids += [segment if draw(0, 3) else 0] * length
    return ids


def batch(seed: int, samples: int, blocks: int, block_length: int, vocabulary: int) -> dict[str, Tensor]:
    """`samples` whole samples with unequal loss masks; the first is one document, the second has one of half its length.

    The same keys as `data.stream.collate`; slot is the number of the sample.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, half = blocks * block_length, blocks // 2 * block_length
    rows = [random_segments(generator, blocks, block_length) for _ in range(samples)]
    rows[0] = [1] * tokens
    if samples > 1:
        rows[1] = [1] * half + random_segments(generator, blocks - blocks // 2, block_length)
        rows[1][half:] = [segment + 1 if segment else 0 for segment in rows[1][half:]]
    segments = torch.tensor(rows, dtype=torch.int32)
    ids = torch.randint(vocabulary, (samples, tokens + 1), generator=generator)
    keep = torch.rand(samples, tokens, generator=generator) < torch.linspace(0.15, 0.95, samples)[:, None]
    keep[:, : tokens // 4] &= torch.rand(samples, 1, generator=generator) < 0.5  # some parts have no loss at all
    return {
        "tokens": ids[:, :-1].contiguous(),
        "labels": ids[:, 1:].contiguous(),
        "loss_mask": (keep & (segments > 0)).float(),
        "segment_ids": segments,
        "positions": torch.zeros_like(segments),
        "history": torch.zeros(samples, dtype=torch.int64),
        "continues": torch.zeros(samples, dtype=torch.bool),
        "slot": torch.arange(samples),
    }


def successive(
    seed: int, samples: int, blocks: int, block_length: int, vocabulary: int, steps: int
) -> list[dict[str, Tensor]]:
    """`steps` global batches whose documents go on from step to step in their slot: `batch` of longer samples, cut."""
    long, tokens = batch(seed, samples, steps * blocks, block_length, vocabulary), blocks * block_length
    found = []
    for step in range(steps):
        here = slice(step * tokens, (step + 1) * tokens)
        cut = {name: value[:, here] if value.dim() == 2 else value.clone() for name, value in long.items()}
        for row, ids in enumerate(long["segment_ids"].tolist()):
            cut["history"][row] = _tokens_before(ids, step * tokens)
            cut["continues"][row] = step < steps - 1 and _tokens_before(ids, (step + 1) * tokens) > 0
        found.append(cut)
    return found


def _tokens_before(ids: list[int], at: int) -> int:
    """Tokens of the document that spans `at` before it, 0 if none does."""
    if at == 0 or ids[at] == 0 or ids[at - 1] != ids[at]:
        return 0
    first = at
    while first > 0 and ids[first - 1] == ids[at]:
        first -= 1
    return at - first
