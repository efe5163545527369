"""Options of launch/evaluate.py and what they become; no torch is imported here, so that `--help` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from em_megatron.config import ConfigError

if TYPE_CHECKING:
    from em_megatron.evaluation.suite import Settings

PARTS = {
    "perplexity": "loss, perplexity, bits per byte of the held-out split, and by position in the context",
    "long_ppl": "LongPPL on the tokens that an evaluator finds to need long context",
    "recall": "passkey and needles, greedy decoding, over length and depth",
    "corruption": "tokens of the last block replaced at random, the history left alone",
    "sweep": "other readers of the same weights (order, slots, sampler; pairs, top_k)",
    "noise": "what N coefficients keep of white noise and of a smooth signal",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Everything but the checkpoint and its overrides."""
    described = "; ".join(f"{name}: {text}" for name, text in PARTS.items())
    add = parser.add_argument
    add(
        "--suite",
        default="perplexity",
        metavar="PARTS",
        help=f"all, or parts with commas (default perplexity). {described}",
    )
    add("--output", type=Path, help="folder of the report (default: RUN/evaluation)")
    add("--samples", type=int, default=0, help="held-out samples for perplexity and sweep; 0: all (default)")
    add("--reference-models", action="store_true", help="also fit and score n-gram models to beat")
    add("--texts", type=int, default=32, help="held-out texts of full length for long_ppl and corruption (default 32)")
    add("--evaluator", type=Path, help="long_ppl: run or folder that finds the key tokens (default: the model itself)")
    add("--context", type=int, default=4096, help="long_ppl: K, tokens of a short context (default 4096; an eighth of the text "
        "where that is not longer)")  # fmt: skip
    add("--stride", type=int, default=1024, help="long_ppl: tokens that share a short context (default 1024)")
    add("--tasks", default="passkey,single,multi_key,multi_value", help="recall: tasks (default: all four)")
    add(
        "--lengths",
        default="",
        help="recall: tokens, such as 2048,8192 (default: half a block, doubled up to the sample)",
    )
    add(
        "--depths",
        default="0,0.25,0.5,0.75,1",
        help="recall: where the fact lies, 0 the begin (default 0,0.25,0.5,0.75,1)",
    )
    add("--trials", type=int, default=10, help="recall: questions per length and depth (default 10)")
    add("--digits", type=int, default=0, help="recall: of a number; 0: 5 for a passkey, 7 for needles (default)")
    add("--reader", action="append", default=[], metavar="'KEY=VALUE ...'",
        help="sweep: a reader to try, such as 'memory.order=32 memory.slots=8'; again for more (default: the usual ones)")  # fmt: skip
    add("--seed", type=int, default=0, help="of recall, corruption and noise (default 0)")


def parts_of(arguments: argparse.Namespace) -> list[str]:
    """The parts asked for, in the order of `PARTS`; `all` leaves out what the model cannot do (`report.possible`).

    Raises:
        ConfigError: an unknown part, or references of a part of the split or without perplexity.
    """
    if arguments.samples and arguments.reference_models:
        raise ConfigError("--reference-models are scored on the whole held-out split: leave --samples out")
    if arguments.suite == "all":
        return ["all"]
    chosen = arguments.suite.split(",")
    for name in chosen:
        if name not in PARTS:
            raise ConfigError(f"--suite: part '{name}' is unknown: choose from {', '.join(PARTS)}, or all")
    if arguments.reference_models and "perplexity" not in chosen:
        raise ConfigError("--reference-models stand beside perplexity: add it to --suite")
    return [name for name in PARTS if name in chosen]


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings of the suite.

    Raises:
        ConfigError: a list that is none, or numbers that cannot be.
    """
    from em_megatron.evaluation.long_ppl import Constants
    from em_megatron.evaluation.recall import TASKS
    from em_megatron.evaluation.suite import Settings

    tasks = tuple(arguments.tasks.split(","))
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"--tasks: '{task}' is unknown: choose from {', '.join(TASKS)}")
    for name in ("samples", "texts", "context", "stride", "trials", "digits", "seed"):
        least = 0 if name in ("samples", "digits", "seed") else 1
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name} must be at least {least}")
    depths = _numbers("--depths", arguments.depths, float)
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ConfigError("--depths lie between 0 and 1")
    lengths = _numbers("--lengths", arguments.lengths, int)
    if any(length < 1 for length in lengths):
        raise ConfigError("--lengths must be at least 1")
    return Settings(
        samples=arguments.samples,
        texts=arguments.texts,
        evaluator=str(arguments.evaluator or ""),
        long_ppl=Constants(arguments.context, arguments.stride),
        tasks=tasks,
        lengths=lengths,
        depths=depths,
        trials=arguments.trials,
        digits=arguments.digits,
        sweep=tuple(arguments.reader),
        seed=arguments.seed,
    )


def _numbers[Number: (int, float)](name: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"{name} '{text}' is not a list of numbers with commas") from None
