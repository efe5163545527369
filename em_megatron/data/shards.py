"""Random access to the documents of an encoded corpus, straight from its tar shards through memory maps.

webdataset 1.0.2 reads a truncated shard short without an error and its order depends on the worker count; so here
the shards' indexes say where each document lies, and tokens are served by position. A shard and its index are opened,
and fetched where they are not on this machine, when a document of it is asked for.
"""

import errno
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.index import OFFSET, TEXT_BYTES, TOKENS, index_bytes, index_name, open_index
from em_megatron.data.manifest import DataError, Manifest, Shard
from em_megatron.data.sources import Source, open_source
from em_megatron.data.threads import in_parallel
from em_megatron.data.writing import read_names

SHARDS_KEPT = 256  # open at a time

Opened = tuple[NDArray[np.uint8] | None, NDArray[np.int64]]  # content, where it was asked for, and index


class ShardReader:
    """The documents of one split, numbered 0.. in shard order.

    corpus: its folder or address, or the source of its files. manifest: the corpus', where it was read already.
    shards_kept: so many are open at a time, with two files each.
    first_documents: int64 [shards + 1], the number of each shard's first document, and how many there are.

    File sizes of the split are checked here where that costs nothing (`check_sizes=False` leaves it to the moment a shard
    is opened), the sha256 of a shard before its first token is handed out (`verify=False` leaves that out). Raises DataError, naming the shard, if one is missing, truncated or
    altered.
    """

    def __init__(
        self,
        corpus: str | Path | Source,
        split: str = "train",
        verify: bool = True,
        shards_kept: int = SHARDS_KEPT,
        check_sizes: bool = True,
        manifest: Manifest | None = None,
    ) -> None:
        self.source = corpus if isinstance(corpus, Source) else open_source(corpus, verify=verify)
        self.split = split
        self.manifest = manifest or Manifest.read(self.source)
        self.shards = self.manifest.shards(split)
        self.first_documents = np.cumsum([0] + [shard.documents for shard in self.shards], dtype=np.int64)
        self._dtype = np.dtype(self.manifest.dtype)
        self._kept = shards_kept
        self._forget()
        for shard in self.shards if check_sizes else ():
            self.source.check(shard.name, shard.file_bytes)
            self.source.check(index_name(shard.name), index_bytes(shard.documents))

    def _forget(self) -> None:
        self._open: OrderedDict[int, Opened] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @property
    def identity(self) -> str:
        """Of the corpus and the split."""
        return f"{self.manifest.identity}/{self.split}"

    def __len__(self) -> int:
        return int(self.first_documents[-1])

    def lengths(self, shard: int) -> NDArray[np.int64]:
        """Stored ids of each document of a shard, bos and eos included."""
        return np.asarray(self._index(shard)[:, TOKENS])

    @cached_property
    def document_lengths(self) -> NDArray[np.int64]:
        """Stored ids of every document of the split, int64 [documents]."""
        return np.concatenate([self.lengths(shard) for shard in range(len(self.shards))])

    @cached_property
    def document_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of text of every document of the split, int64 [documents]."""
        return np.concatenate([self._index(shard)[:, TEXT_BYTES] for shard in range(len(self.shards))])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of every document of the split, read from the tars."""
        return tuple(name for shard in self.shards for name in read_names(self._path(shard)))

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.unsignedinteger]:
        """Ids start..stop of a document (bos is id 0 of it), a read-only view of the shard, [stop - start].

        Raises IndexError outside the document and DataError if the shard was altered.
        """
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of split {self.split}, which has {len(self)}")
        number = int(np.searchsorted(self.first_documents, document, side="right")) - 1
        content, index = self._content(number)
        row = index[document - self.first_documents[number]]
        length, offset = int(row[TOKENS]), int(row[OFFSET])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens {start}..{stop} of document {document}, which has {length}")
        size = self._dtype.itemsize
        return content[offset + start * size : offset + stop * size].view(self._dtype)

    def prepare(self, shards: Sequence[int]) -> None:
        """Fetches and checks shards and their indexes, some at a time, ahead of the first document that is asked for."""
        in_parallel(self._content, shards)

    def _index(self, number: int) -> NDArray[np.int64]:
        opened = self._recent(number)
        if opened is not None:
            return opened[1]
        shard = self.shards[number]

        def open_it() -> NDArray[np.int64]:
            path = self.source.path(index_name(shard.name), index_bytes(shard.documents), shard.index_sha256)
            return open_index(path, shard)

        index = _opened(open_it)
        self._keep(number, (None, index))
        return index

    def _content(self, number: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        opened = self._recent(number)
        if opened is not None and opened[0] is not None:
            return opened[0], opened[1]
        index = self._index(number)
        content = _opened(lambda: np.memmap(self._path(self.shards[number]), dtype=np.uint8, mode="r"))
        self._keep(number, (content, index))
        return content, index

    def _recent(self, number: int) -> Opened | None:
        with self._lock:
            opened = self._open.get(number)
            if opened is not None:
                self._open.move_to_end(number)
            return opened

    def _keep(self, number: int, opened: Opened) -> None:
        with self._lock:
            if opened[0] is not None or number not in self._open:
                self._open[number] = opened
            while len(self._open) > self._kept:
                self._open.popitem(last=False)

    def _path(self, shard: Shard) -> Path:
        return self.source.path(shard.name, shard.file_bytes, shard.sha256)


def _opened[File](open_it: Callable[[], File]) -> File:
    """Opens a file, and once more where another process made room for its own in between."""
    try:
        try:
            return open_it()
        except FileNotFoundError:
            return open_it()
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise DataError(
            f"too many files are open (a process may have {limit}): raise the limit with ulimit -n, or give a smaller "
            "data.shuffle_shards"
        ) from None


def allow_many_files() -> None:
    """Raises the limit of open files as far as this process may: two for every shard that is at hand."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
