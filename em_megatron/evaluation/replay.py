"""Training samples looked at again: which documents lie in them, and their loss under a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
import torch

from em_megatron.config import ConfigError, load_config
from em_megatron.data.manifest import DataError
from em_megatron.data.stream import Sample, collate
from em_megatron.training.corpus import Corpus
from em_megatron.training.loop import SKIPPED
from em_megatron.training.microbatch import MicroBatch
from em_megatron.training.restore import Restored
from em_megatron.training.step import run_schedule, token_loss_step


def chosen_samples(run: Restored, text: str | None) -> list[int]:
    """Samples A to B of `text`, or those of the batches that the run skipped.

    Raises:
        ConfigError: `text` is not of that form, or nothing was skipped.
    """
    if text is not None:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ConfigError(f"--samples {text} is not of the form A-B, such as 800-807")
        return list(range(int(found[1]), int(found[2] or found[1]) + 1))
    path = run.checkpoint.parent.parent / SKIPPED
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if not rows:
        raise ConfigError(f"{path} lists no batch, so none was skipped: give --samples A-B")
    return [sample for row in rows for sample in range(row["first_sample"], row["last_sample"] + 1)]


def replay(run: Restored, samples: list[int], characters: int) -> Iterator[str]:
    """A line per sample and, below it, one per document or piece of one.

    Raises:
        DataError: the corpus of the run is not there any more, or is another one.
    """
    saved = load_config(run.checkpoint / "config.yaml")
    saved.data.path = run.config.data.path
    corpus = Corpus.open(saved.data)
    state = json.loads((run.checkpoint / "train_state.json").read_text())
    if state.get("data_identity"):
        corpus.check_identity(state["data_identity"], state["consumed_samples"])
    elif corpus.vocabulary.sha256 != run.vocabulary.sha256:
        raise DataError(f"{saved.data.path} has another tokenizer than the run: give data.path=FOLDER")
    stream = corpus.training_stream(saved)
    yield f"under {run.checkpoint.name}:"
    for number in samples:
        sample = stream.sample(number)
        yield _line(number, sample, _losses(run, sample))
        for segment in range(1, int(sample["segment_ids"].max()) + 1):
            yield f"    {_document(corpus, sample, segment, characters)}"


def _losses(run: Restored, sample: Sample) -> torch.Tensor:
    """[T] loss of every token; those that do not count are zero. The sample begins with an empty memory."""
    alone = sample | {"history": np.zeros_like(sample["history"]), "continues": np.zeros_like(sample["continues"])}
    device = next(run.model[0].parameters()).device
    batch = MicroBatch.from_batch(collate([alone]), run.config.memory.block_length, device)
    with torch.no_grad():
        found = run_schedule(token_loss_step, [iter([batch])], run.model, run.config, 1, 1, forward_only=True)
    return (found[0].float() * batch.loss_mask)[0].cpu()


def _line(number: int, sample: Sample, losses: torch.Tensor) -> str:
    tokens = int(sample["loss_mask"].sum())
    finite = torch.isfinite(losses)
    text = f"sample {number}: {tokens} of {len(losses)} tokens count, loss {losses.sum() / max(tokens, 1):.4f}"
    if finite.all():
        at = int(losses.argmax())
        return f"{text}, the largest {losses[at]:.4f} at position {at}"
    return f"{text}, {int((~finite).sum())} losses are not finite, the first at position {int(finite.int().argmin())}"


def _document(corpus: Corpus, sample: Sample, segment: int, characters: int) -> str:
    where = np.flatnonzero(sample["segment_ids"] == segment)
    text = corpus.vocabulary.decode(sample["tokens"][where[: 4 * characters]])[:characters]
    return f"positions {where[0]} to {where[-1]}: {json.dumps(text, ensure_ascii=False)}"
