"""A checkpoint's held-out figures as a table, JSON and a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from em_megatron.evaluation.perplexity import evaluate
from em_megatron.evaluation.reference_models import reference_bits_per_byte
from em_megatron.model.sizes import Costs, costs, padded_vocab_size
from em_megatron.training.metrics import finite
from em_megatron.training.plots import plot_positions
from em_megatron.training.restore import Restored, reader_of
from em_megatron.training.setup import Corpus

REFERENCES = {"unigram_tokens": "unigram model of the tokens", "byte_order_2": "order-2 model of the bytes"}


def evaluate_checkpoint(
    run: Restored, samples: int, with_references: bool, interrupted: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """Figures of the held-out split; every rank takes part and gets them. None where it was interrupted, see `evaluate`.

    Raises:
        DataError: the shards of the run cannot be used, or were made by another tokenizer.
    """
    corpus = Corpus.open(Path(run.config.data.path).expanduser())
    corpus.manifest.check_tokenizer(run.vocabulary)
    stream = corpus.stream(run.config, "validation")
    token_bytes = torch.as_tensor(run.vocabulary.token_bytes)
    found = evaluate(run.config, run.layout, run.model, stream, token_bytes, samples, interrupted)
    if found is not None and with_references:
        found["references"] = reference_bits_per_byte(corpus.path)
    return found


def write_report(run: Restored, found: dict[str, Any], folder: Path) -> str:
    """Writes evaluation.json and positions.png to `folder`; returns the table for the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "checkpoint": str(run.checkpoint),
        "step": run.step,
        "memory": dataclasses.asdict(run.config.memory),
        **dataclasses.asdict(_costs(run)),
        **found,
    }
    (folder / "evaluation.json").write_text(json.dumps(finite(document), indent=1) + "\n")
    plot_positions(found["positions"], folder / "positions.png", block_length=run.config.memory.block_length)
    return _table(run, found) + f"\nreport in {folder}"


def _costs(run: Restored) -> Costs:
    config = run.config
    vocab = padded_vocab_size(run.vocabulary.size, config.model.make_vocab_size_divisible_by)
    return costs(config.model, config.memory, vocab, config.data.sequence_length)


def _table(run: Restored, found: dict[str, Any]) -> str:
    cost = _costs(run)
    lines = [
        f"{run.checkpoint}: {reader_of(run.config.memory)}, {cost.memory_floats_per_sequence:,} memory floats per sequence",
        f"{cost.parameters:,} parameters, {cost.memory_parameters:,} of them the memory's, "
        f"{cost.flops_per_token / 1e6:,.1f} MFLOP per token of training",
        f"held-out: {found['tokens']:,} tokens, {found['bytes']:,} bytes of text",
        f"  loss {found['loss']:.4f} nats per token, perplexity {found['perplexity']:.2f}",
        f"  {found['bits_per_byte']:.4f} bits per byte",
    ]
    for name, value in found.get("references", {}).items():
        share = found["bits_per_byte"] / value - 1
        side = "lower" if share < 0 else "higher"
        lines.append(f"  {value:.4f} bits per byte: {REFERENCES[name]} (this model is {abs(share):.1%} {side})")
    lines.append("  position in the context    perplexity")
    for row in found["positions"]:
        lines.append(f"  {row['start']:>10,} to {row['stop'] - 1:<10,}  {row['perplexity']:10.2f}")
    return "\n".join(lines)
