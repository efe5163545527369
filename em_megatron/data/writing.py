"""One shard, written whole: a tar that webdataset reads, and its index."""

import json
import os
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.index import INDEX_DTYPE, KEY, OFFSET, TEXT_BYTES, TOKENS, document_key, index_name
from em_megatron.data.manifest import Shard, file_sha256

TOKENS_SUFFIX = ".tokens.bin"
JSON_SUFFIX = ".json"


class EncodedDocument(NamedTuple):
    """A document's name, its raw little-endian ids with bos and eos, the UTF-8 bytes of its text, and its key.

    key: `document_key` of its id; None where the name is the id.
    """

    name: str
    tokens: bytes
    text_bytes: int
    key: int | None = None


def write_shard(directory: Path, name: str, documents: Iterable[EncodedDocument], dtype: str) -> Shard | None:
    """Writes DIRECTORY/NAME and its index; the same documents give the same bytes. None, and no file, for no document.

    Both get their name when they are complete, the index first. Until then the files of two writers of one shard are
    kept apart by machine and process number. dtype: numpy name of the ids.
    Raises OSError where the disk does; nothing is left behind then.
    """
    tar_path, index_path = directory / name, directory / index_name(name)
    writer = f"{os.uname().nodename}-{os.getpid()}.partial"
    partial_tar, partial_index = (path.with_name(f"{path.name}.{writer}") for path in (tar_path, index_path))
    try:
        with open(partial_tar, "wb") as file:
            rows = _write_members(file, name.partition(".")[0], documents, np.dtype(dtype).itemsize)
            _sync(file)
        if not rows:
            return None
        table = np.array(rows, INDEX_DTYPE)
        table[:, OFFSET] = read_offsets(partial_tar)
        with open(partial_index, "wb") as file:
            file.write(table.tobytes())
            _sync(file)
        tokens, text_bytes = int(table[:, TOKENS].sum()), int(table[:, TEXT_BYTES].sum())
        size, sums = partial_tar.stat().st_size, (file_sha256(partial_tar), file_sha256(partial_index))
        os.replace(partial_index, index_path)
        os.replace(partial_tar, tar_path)
        return Shard(name, len(rows), tokens, text_bytes, size, *sums)
    finally:
        for path in (partial_tar, partial_index):
            path.unlink(missing_ok=True)


def read_offsets(tar_path: Path) -> NDArray[np.int64]:
    """Where the ids of each document begin in a tar, in bytes, read from its headers. Raises tarfile.TarError."""
    with tarfile.open(tar_path, "r:") as tar:
        offsets = [member.offset_data for member in tar if member.name.endswith(TOKENS_SUFFIX)]
    return np.array(offsets, np.int64)


def read_names(tar_path: Path) -> list[str]:
    """The names of a tar's documents, in order."""
    names = []
    with tarfile.open(tar_path, "r:") as tar:
        for member in tar:
            if member.name.endswith(JSON_SUFFIX) and (file := tar.extractfile(member)):
                names.append(json.loads(file.read())["name"])
    return names


def _write_members(file: BinaryIO, stem: str, documents: Iterable[EncodedDocument], item_bytes: int) -> list[list[int]]:
    """Writes a tar; gives the rows of its index, without the offsets."""
    # webdataset imports torch, which would cost every encoding process seconds at the top of this module.
    import webdataset

    rows: list[list[int]] = []
    with webdataset.TarWriter(file, mtime=0, encoder=False) as tar:
        for number, document in enumerate(documents):
            tokens = len(document.tokens) // item_bytes
            # No dot in the key (webdataset cuts names at the first one), and short enough for a plain tar header.
            key = f"{stem}-{number:07d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', document.name)[:48]}"
            entry = {"name": document.name, "tokens": tokens, "bytes": document.text_bytes}
            content = json.dumps(entry, ensure_ascii=True, sort_keys=True).encode()
            tar.write({"__key__": key, JSON_SUFFIX[1:]: content, TOKENS_SUFFIX[1:]: document.tokens})
            row = [0, 0, 0, 0]
            row[TOKENS], row[TEXT_BYTES] = tokens, document.text_bytes
            row[KEY] = document_key(document.name) if document.key is None else document.key
            rows.append(row)
    return rows


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
