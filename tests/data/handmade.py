"""Corpora whose every id is chosen by the test.

On disk, document d holds bos, 100·d + 1, 100·d + 2, ..., eos; in memory, id k of document d is SPACING·d + k.
"""

from pathlib import Path

import numpy as np

from em_megatron.data.manifest import Manifest
from tokenizer.encode import EncodedDocument, ShardWriter

PAD, BOS, EOS = 0, 2, 3
SPACING = 10_000


def document_ids(document: int, length: int) -> list[int]:
    return [BOS, *(100 * document + k for k in range(1, length - 1)), EOS]


def write_corpus(directory: Path, lengths: list[int], shard_tokens: int = 1 << 20) -> Manifest:
    """A corpus with documents of these stored lengths in its train split; two bytes of text per inner id."""
    writer = ShardWriter(directory, "train", shard_tokens, item_bytes=2)
    for document, length in enumerate(lengths):
        ids = np.array(document_ids(document, length), "<u2")
        writer.add(EncodedDocument(f"document{document}", ids.tobytes(), 2 * (length - 2)))
    writer.close()
    manifest = Manifest("t" * 64, 60_000, "<u2", "s" * 64, {"train": tuple(writer.shards)})
    manifest.save(directory)
    return manifest


class CountingReader:
    """What a stream needs of a ShardReader, for documents of any length below SPACING: ids tell where they stand."""

    def __init__(self, lengths: list[int]) -> None:
        self.document_lengths = np.array(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.document_lengths)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.document_lengths[document]
        return SPACING * document + np.arange(start, stop)
