"""Corpora whose every id is chosen by the test.

On disk, document d holds bos, 100·d + 1, 100·d + 2, ..., eos; in memory, id k of document d is SPACING·d + k.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from em_megatron.data.manifest import Manifest
from em_megatron.data.writing import EncodedDocument, write_shard

PAD, BOS, EOS = 0, 2, 3
SPACING = 10_000


def document_ids(document: int, length: int) -> list[int]:
    return [BOS, *(100 * document + k for k in range(1, length - 1)), EOS]


def write_corpus(directory: Path, lengths: list[int], shard_tokens: int = 1 << 20) -> Manifest:
    """A corpus with documents of these stored lengths in its train split; two bytes of text per inner id."""
    shards: list[list[EncodedDocument]] = [[]]
    tokens = 0
    for document, length in enumerate(lengths):
        if tokens and tokens + length > shard_tokens:
            shards.append([])
            tokens = 0
        tokens += length
        ids = np.array(document_ids(document, length), "<u2")
        shards[-1].append(EncodedDocument(f"document{document}", ids.tobytes(), 2 * (length - 2)))
    written = [
        write_shard(directory, f"train-{number:06d}.tar", documents, "<u2") for number, documents in enumerate(shards)
    ]
    manifest = Manifest("t" * 64, 60_000, "<u2", "s" * 64, {"train": tuple(shard for shard in written if shard)})
    manifest.save(directory)
    return manifest


class CountingReader:
    """What a stream needs of a ShardReader, for documents of any length below SPACING: ids tell where they stand.

    shards: how many shards they lie in, of about as many documents each. first_id: added to every id.
    """

    def __init__(self, lengths: list[int], shards: int = 1, first_id: int = 0) -> None:
        self.first_id = first_id
        self.document_lengths = np.array(lengths, dtype=np.int64)
        self.first_documents = np.arange(shards + 1) * len(lengths) // shards
        self.identity = f"{shards} shards of {lengths} from {first_id}"

    def __len__(self) -> int:
        return len(self.document_lengths)

    def lengths(self, shard: int) -> np.ndarray:
        return self.document_lengths[self.first_documents[shard] : self.first_documents[shard + 1]]

    def prepare(self, shards: Sequence[int]) -> None:
        assert all(0 <= shard < len(self.first_documents) - 1 for shard in shards)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.document_lengths[document]
        return self.first_id + SPACING * document + np.arange(start, stop)
