"""Does a model use its memory? Tokens of its own block are replaced by random ones, what came before is left alone.

A text of B blocks is read once as it is and once for each share with its last block corrupted: each of the block's
tokens is replaced with that probability. Only tokens whose label is clean count. A model that remembers loses less than one
that must rely on its block: `memory_benefit` is what the history is worth then, the loss of the corrupted block read
alone, minus that with its history.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Losses = Callable[[Sequence[Sequence[int]]], list[Floats]]
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75)


def corrupted(
    ids: Sequence[int], first: int, share: float, candidates: NDArray[np.int64], rng: np.random.Generator
) -> tuple[list[int], NDArray[np.bool_]]:
    """The ids with a share of those from `first` on replaced, and which were [len]."""
    found = np.array(ids, dtype=np.int64)
    hit = rng.random(len(found)) < share
    hit[:first] = False
    found[hit] = rng.choice(candidates, int(hit.sum()))
    return found.tolist(), hit


def at_share(
    losses: Losses, texts: Sequence[Sequence[int]], block_length: int, candidates: NDArray[np.int64], share: float,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Loss in nats on clean tokens of the last block at one share, with the history before it and without.

    Args:
        losses: of texts, each read with an empty memory.
        texts: ids; their last `block_length` inputs are the block that is corrupted, a whole block of the model's.
        candidates: ids that a corrupted token may become.
    """
    rng = np.random.default_rng([seed, round(1000 * share)])
    changed = [corrupted(ids, len(ids) - 1 - block_length, share, candidates, rng) for ids in texts]
    whole = losses([ids for ids, _ in changed])
    alone = losses([ids[-block_length - 1 :] for ids, _ in changed])
    clean = [~hit[-block_length:] for _, hit in changed]  # of the labels of the block
    with_history = np.concatenate([row[-block_length:][keep] for row, keep in zip(whole, clean, strict=True)])
    without = np.concatenate([row[keep] for row, keep in zip(alone, clean, strict=True)])
    return {
        "share": share,
        "loss": float(with_history.mean()),
        "loss_without_history": float(without.mean()),
        "memory_benefit": float(without.mean() - with_history.mean()),
        "tokens": len(with_history),
        "texts": len(texts),
    }


def with_rise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with how much its loss is above that of the first, the clean one; with its history and without."""
    first = rows[0]
    return [
        row
        | {
            "rise": row["loss"] - first["loss"],
            "rise_without_history": row["loss_without_history"] - first["loss_without_history"],
        }
        for row in rows
    ]
