"""The index of a shard: where each document's ids lie, so that a run starts without reading a tar header.

Beside NAME.tar lies NAME.idx, raw little-endian int64 [documents, 4] with the columns

    offset      of the document's first id in the tar, in bytes
    tokens      stored ids, bos and eos included
    text_bytes  UTF-8 bytes of its text
    key         64 bits of the sha256 of its id (`document_key`), by which two corpora are searched for common documents
"""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.manifest import DataError, Shard

INDEX_SUFFIX = ".idx"
INDEX_DTYPE = np.dtype("<i8")
OFFSET, TOKENS, TEXT_BYTES, KEY = range(4)
COLUMNS = 4


def index_name(shard_name: str) -> str:
    """The name of a shard's index: train-000000.tar has train-000000.idx."""
    return shard_name.removesuffix(".tar") + INDEX_SUFFIX


def index_bytes(documents: int) -> int:
    """Size of an index file."""
    return documents * COLUMNS * INDEX_DTYPE.itemsize


def document_key(document_id: str) -> int:
    """64 bits of the id's sha256, signed. Of a billion ids, two agree by accident with a chance of 3 in 100."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "little", signed=True)


def open_index(path: Path, shard: Shard) -> NDArray[np.int64]:
    """A memory map of an index file, int64 [documents, 4], whose sums agree with the manifest's.

    Raises DataError that names the shard where they do not.
    """
    size = path.stat().st_size
    if size == index_bytes(shard.documents):
        table = np.memmap(path, INDEX_DTYPE, "r").reshape(-1, COLUMNS)
        lengths, offsets = table[:, TOKENS], table[:, OFFSET]
        found = int(lengths.sum()), int(table[:, TEXT_BYTES].sum())
        if found == (shard.tokens, shard.text_bytes) and lengths.min() > 0 and offsets.min() > 0:
            return table
    raise DataError(
        f"the index {path.name} of shard {shard.name} in {path.parent} was altered: its documents, tokens or bytes are "
        "not those of the manifest; copy it again, or delete the shard and run tokenizer.encode again"
    )
