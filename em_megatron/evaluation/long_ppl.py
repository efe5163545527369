"""LongPPL: perplexity on the tokens that need a long context (Fang et al., ICLR 2025; design, baselines.md, evaluation).

An evaluator, a model that reads the whole text, says which tokens these are. With log P0 its log-probabilities in nats,

    LSD_i = log P0(x_i | all before) - log P0(x_i | about the last K tokens)
    LCL_i = log P0(x_i | all before)
    key   = LSD_i > 2 and LCL_i > -2, never among the first K tokens
    LongPPL = exp(-mean over key tokens of log P(x_i | all before)), P the model under test

Short contexts are shared by `stride` tokens: a token sees K to K + stride - 1 tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Losses = Callable[[Sequence[Sequence[int]]], list[Floats]]


@dataclass(frozen=True)
class Constants:
    """context: K tokens; stride: tokens that share a short context; lsd, lcl: thresholds in nats."""

    context: int = 4096
    stride: int = 1024
    lsd: float = 2.0
    lcl: float = -2.0


def fitting(constants: Constants, sequence_length: int) -> Constants:
    """The constants, or, where texts are not longer than K, an eighth of the text for K and a thirty-second for the stride."""
    if constants.context < sequence_length:
        return constants
    return Constants(max(1, sequence_length // 8), max(1, sequence_length // 32), constants.lsd, constants.lcl)


def key_tokens(full: Floats, short: Floats, constants: Constants) -> Flags:
    """Which labels are key, from losses [T] in nats with all of the context and with a short one (NaN: none taken)."""
    with np.errstate(invalid="ignore"):
        found: Flags = (short - full > constants.lsd) & (-full > constants.lcl)
    return found


def short_losses(losses: Losses, ids: Sequence[int], constants: Constants) -> Floats:
    """Losses [len - 1] of ids[1:] with a short context; NaN for those that have fewer than K tokens before them."""
    found = np.full(len(ids) - 1, np.nan)
    starts = range(0, len(ids) - constants.context, constants.stride)
    windows = [ids[start : start + constants.context + constants.stride] for start in starts]
    for start, window, row in zip(starts, windows, losses(windows), strict=True):
        fresh = row[constants.context - 1 :]  # row[i] is the loss of window[i + 1]
        found[start + constants.context - 1 : start + len(window) - 1] = fresh
    return found


def sums(model: Losses, evaluator: Losses, ids: Sequence[int], constants: Constants) -> dict[str, float]:
    """Of one text longer than K tokens, whose ids both models use: losses summed over all and over key tokens, and how many.

    judge_*: of the evaluator.
    """
    (own,), (full,) = model([ids]), evaluator([ids])
    key = key_tokens(full, short_losses(evaluator, ids, constants), constants)
    return {
        "tokens": len(own),
        "key": int(key.sum()),
        "loss": float(own.sum()),
        "key_loss": float(own[key].sum()),
        "judge_loss": float(full.sum()),
        "judge_key_loss": float(full[key].sum()),
    }


def total(texts: Sequence[dict[str, float]], constants: Constants) -> dict[str, Any]:
    """LongPPL over some texts, from their `sums`.

    Returns:
        long_ppl (None without a key token), key_tokens, tokens, perplexity over all of them, the evaluator's own
        evaluator_long_ppl and evaluator_perplexity, texts, constants.
    """
    whole = {name: sum(text[name] for text in texts) for name in texts[0]}
    return {
        "long_ppl": _perplexity(whole["key_loss"], whole["key"]),
        "key_tokens": int(whole["key"]),
        "tokens": int(whole["tokens"]),
        "perplexity": _perplexity(whole["loss"], whole["tokens"]),
        "evaluator_long_ppl": _perplexity(whole["judge_key_loss"], whole["key"]),
        "evaluator_perplexity": _perplexity(whole["judge_loss"], whole["tokens"]),
        "texts": len(texts),
        "constants": asdict(constants),
    }


def _perplexity(loss: float, count: float) -> float | None:
    return math.exp(min(loss / count, 700.0)) if count else None
