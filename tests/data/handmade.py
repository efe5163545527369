"""Corpora whose every id is chosen by the test: document d holds bos, 100·d + 1, 100·d + 2, ..., eos."""

from pathlib import Path

import numpy as np

from em_megatron.data.manifest import Manifest
from tokenizer.encode import EncodedDocument, ShardWriter

PAD, BOS, EOS = 0, 2, 3


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
