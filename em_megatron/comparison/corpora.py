"""Corpora of a plan: texts fetched, tokenizer trained and shards encoded where they are not there yet."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from em_megatron.comparison.plan import Plan
from em_megatron.config import ConfigError
from em_megatron.data.manifest import Manifest
from em_megatron.data.vocabulary import Vocabulary


def prepare(plan: Plan, corpus: str, say: Callable[[str], None]) -> None:
    """Makes the shards of a corpus; each step is skipped where its output, written last, is there.

    Raises:
        ConfigError: a step failed (its own message stands above), or shards given do not exist.
    """
    source, shards = plan.corpora[corpus], plan.shards(corpus)
    if (shards / "manifest.json").is_file():
        return
    if source.shards is not None:
        raise ConfigError(f"corpus '{corpus}' has no shards in {shards}: encode them with python -m tokenizer.encode")
    folder = plan.prepared(corpus)
    texts = Path(source.texts).expanduser() if source.texts else folder / "texts"
    if source.domain is not None:
        _step(say, f"fetching the texts of {corpus}", "tokenizer.domains", source.domain, "--output", str(texts))
    if source.recall is not None and not (texts / "contents.json").is_file():
        _step(
            say, f"making the texts of {corpus}", "em_megatron.evaluation.recall_texts", source.recall, "--output", str(texts),
            "--documents", str(source.recall_documents), "--digits", str(source.recall_digits),
        )  # fmt: skip
    model = folder / "tokenizer.model"
    if not model.is_file():
        _step(
            say, f"training the tokenizer of {corpus}", "tokenizer.train", "--input", str(texts),
            "--vocab-size", str(plan.vocab_size), "--output", str(model),
        )  # fmt: skip
    _step(
        say, f"encoding {corpus}", "tokenizer.encode", "--input", str(texts),
        "--tokenizer", str(model), "--output", str(shards),
    )  # fmt: skip


def _step(say: Callable[[str], None], what: str, module: str, *arguments: str) -> None:
    say(f"{what} ...")
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{what} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def describe(plan: Plan, corpus: str) -> dict[str, int | float | str]:
    """What a corpus is, for the report: documents, tokens and bytes of both splits, ids of the tokenizer.

    Raises:
        DataError: the shards are missing or damaged.
    """
    shards = plan.shards(corpus)
    manifest = Manifest.load(shards)
    vocabulary = Vocabulary(shards / "tokenizer.model")
    found: dict[str, int | float | str] = {"vocabulary": vocabulary.size}
    for split in ("train", "validation"):
        found[f"{split}_documents"] = sum(shard.documents for shard in manifest.shards(split))
        found[f"{split}_tokens"] = manifest.tokens(split)
        found[f"{split}_bytes"] = manifest.text_bytes(split)
    return found
