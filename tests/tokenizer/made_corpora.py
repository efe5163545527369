"""Corpora written shard by shard, of documents that the test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from em_megatron.data.manifest import Manifest
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.data.writing import EncodedDocument, write_shard

Texts = Mapping[str, str]  # by the document's name


def write_corpus(
    folder: Path, vocabulary: Vocabulary, splits: Mapping[str, Sequence[Texts]], dtype: str = "<u2"
) -> Manifest:
    """A corpus of these shards in each split."""
    folder.mkdir(parents=True)
    shards = {}
    for split, contents in splits.items():
        written = [
            write_shard(
                folder,
                f"{split}-{number:06d}.tar",
                [_encoded(vocabulary, *item, dtype) for item in texts.items()],
                dtype,
            )
            for number, texts in enumerate(contents)
        ]
        shards[split] = tuple(shard for shard in written if shard)
    (folder / vocabulary.file_name).write_bytes(vocabulary.serialized)
    manifest = Manifest(vocabulary.sha256, vocabulary.size, dtype, f"source of {folder.name}", shards)
    manifest.save(folder)
    return manifest


def _encoded(vocabulary: Vocabulary, name: str, text: str, dtype: str) -> EncodedDocument:
    ids = np.array([vocabulary.bos_id, *vocabulary.encode(text), vocabulary.eos_id], dtype)
    return EncodedDocument(name, ids.tobytes(), len(text.encode()))


def texts(prefix: str, words: Sequence[int]) -> dict[str, str]:
    """A document of so many words for each number."""
    return {f"{prefix}{number}": "word " * count for number, count in enumerate(words)}
