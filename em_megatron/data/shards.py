"""Random access to the documents of an encoded corpus, straight from its tar shards through memory maps.

webdataset 1.0.2 reads a truncated shard short without an error and its order depends on the worker count; so here
the tar headers are read once for an index (document -> offset), and tokens are served by position.
"""

import json
import tarfile
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.manifest import DataError, Manifest, Shard, check_content, check_size

TOKENS_SUFFIX = ".tokens.bin"
JSON_SUFFIX = ".json"


class ShardReader:
    """The documents of one split, numbered 0.. in shard order.

    manifest: the corpus' manifest. document_lengths: int64 [documents], stored ids with bos and eos.
    document_bytes: int64 [documents], UTF-8 bytes of text. names: the documents' names.

    File sizes of the split are checked here, the sha256 of a shard before its first token is handed out
    (`verify=False` leaves that out, for a corpus so large that hashing it takes too long on every rank).
    Raises DataError, naming the shard, if one is missing, truncated or altered.
    """

    def __init__(self, directory: str | Path, split: str = "train", verify: bool = True) -> None:
        self.directory = Path(directory)
        self.split = split
        self.manifest = Manifest.load(directory)
        self._shards = self.manifest.shards(split)
        self._dtype = np.dtype(self.manifest.dtype)
        self._maps: list[NDArray[np.uint8] | None] = [None] * len(self._shards)
        self._verify = verify
        self._lock = threading.Lock()
        for shard in self._shards:
            check_size(self.directory, shard)
        self._index()

    def _index(self) -> None:
        names: list[str] = []
        rows: list[tuple[int, int, int, int]] = []
        for number, shard in enumerate(self._shards):
            shard_names, shard_rows = _read_index(self.directory, shard, self._dtype.itemsize)
            names.extend(shard_names)
            rows.extend((number, *row) for row in shard_rows)
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        self.names = tuple(names)
        self._shard_of, self._offsets, self.document_lengths, self.document_bytes = table.T.copy()

    def __len__(self) -> int:
        return len(self.document_lengths)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.unsignedinteger]:
        """Ids start..stop of a document (bos is id 0 of it), a read-only view of the shard, [stop - start].

        Raises IndexError outside the document and DataError if the shard was altered.
        """
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of split {self.split}, which has {len(self)}")
        length = int(self.document_lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens {start}..{stop} of document {document}, which has {length}")
        offset = int(self._offsets[document])
        size = self._dtype.itemsize
        view = self._map(int(self._shard_of[document]))[offset + start * size : offset + stop * size]
        return view.view(self._dtype)

    def _map(self, number: int) -> NDArray[np.uint8]:
        with self._lock:
            found = self._maps[number]
            if found is None:
                shard = self._shards[number]
                if self._verify:
                    check_content(self.directory, shard)
                found = np.memmap(self.directory / shard.name, dtype=np.uint8, mode="r")
                self._maps[number] = found
            return found


def _read_index(directory: Path, shard: Shard, item_bytes: int) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names and (file offset, tokens, text bytes) of the documents of a shard, checked against the manifest."""
    tokens: dict[str, tuple[int, int]] = {}
    texts: dict[str, tuple[str, int]] = {}
    try:
        with tarfile.open(directory / shard.name, "r:") as tar:
            for member in tar:
                if member.name.endswith(TOKENS_SUFFIX):
                    tokens[member.name.removesuffix(TOKENS_SUFFIX)] = member.offset_data, member.size // item_bytes
                elif member.name.endswith(JSON_SUFFIX) and (file := tar.extractfile(member)):
                    entry = json.loads(file.read())
                    texts[member.name.removesuffix(JSON_SUFFIX)] = entry["name"], int(entry["bytes"])
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise _altered(directory, shard, f"it cannot be read as a tar of documents ({error})") from None
    rows = [(*tokens[key], texts[key][1]) for key in tokens if key in texts]
    found = len(rows), sum(row[1] for row in rows), sum(row[2] for row in rows)
    if found != (shard.documents, shard.tokens, shard.text_bytes) or len(tokens) != len(texts):
        raise _altered(directory, shard, "its documents, tokens or bytes are not those of the manifest")
    return [texts[key][0] for key in tokens], rows


def _altered(directory: Path, shard: Shard, why: str) -> DataError:
    return DataError(f"shard {shard.name} in {directory} was altered: {why}; copy it again or encode the corpus again")
