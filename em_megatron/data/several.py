"""The documents of several readers as those of one, for held-out text, which is read in order."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.shards import ShardReader


class SeveralReaders:
    """The documents of all readers, numbered 0.. one reader after the other; what a stream needs of a ShardReader."""

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self.readers = tuple(readers)
        self._firsts = np.cumsum([0] + [len(reader) for reader in readers], dtype=np.int64)
        shards = [first + reader.first_documents[:-1] for first, reader in zip(self._firsts, readers, strict=False)]
        self.first_documents = np.concatenate([*shards, self._firsts[-1:]])
        self._places = [(reader, shard) for reader in readers for shard in range(len(reader.shards))]

    @property
    def identity(self) -> str:
        """Of the corpora and the splits."""
        return " ".join(reader.identity for reader in self.readers)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def lengths(self, shard: int) -> NDArray[np.int64]:
        """Stored ids of each document of a shard; shards are numbered over all readers."""
        reader, number = self._places[shard]
        return reader.lengths(number)

    @cached_property
    def document_lengths(self) -> NDArray[np.int64]:
        """Stored ids of every document, int64 [documents]."""
        return np.concatenate([reader.document_lengths for reader in self.readers])

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.unsignedinteger]:
        """Ids start..stop of a document, as ShardReader gives them."""
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        which = int(np.searchsorted(self._firsts, document, side="right")) - 1
        return self.readers[which].tokens(document - int(self._firsts[which]), start, stop)

    def prepare(self, shards: Sequence[int]) -> None:
        """Fetches and checks shards and their indexes."""
        for shard in shards:
            reader, number = self._places[shard]
            reader.prepare([number])
