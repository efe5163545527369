"""One reading of some input files: how long their documents are, where they begin, and keys to compare them by.

A scan is kept as an .npz file, so that a restart reads only what was not read yet.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.index import document_key
from em_megatron.data.manifest import DataError, file_sha256
from tokenizer.atomic import open_atomically
from tokenizer.corpus import InputFile
from tokenizer.encoding.processes import advance
from tokenizer.readers.entry import Entry
from tokenizer.readers.files import Layout, read_documents

EMPTY, NOT_UNICODE = 0, -1  # in place of the bytes of a document
GROUP_BYTES = 64 << 20
GROUP_FILES = 1000


class Stamp(NamedTuple):
    """By what a file is recognised without reading it. modified: in nanoseconds."""

    name: str
    size: int
    modified: int


class Scan(NamedTuple):
    """What was found in some files, document by document.

    documents: of each file, int64 [files]. sha256: of each file. text_bytes: UTF-8 bytes, EMPTY for nothing but white
    space, NOT_UNICODE for half of a surrogate pair, which JSON can hold. id_keys, text_keys: 64 bits of the sha256 of
    id and text. places: where it begins (`Position.place`). The last four are int64 [sum of documents].
    """

    documents: NDArray[np.int64]
    sha256: NDArray[np.str_]
    text_bytes: NDArray[np.int64]
    id_keys: NDArray[np.int64]
    text_keys: NDArray[np.int64]
    places: NDArray[np.int64]


def stamp_of(file: InputFile) -> Stamp:
    """Raises OSError."""
    status = file.path.stat()
    return Stamp(file.name, status.st_size, status.st_mtime_ns)


@contextmanager
def naming(file: InputFile) -> Iterator[None]:
    """Raises DataError that names the file where it cannot be read in the block."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{file.path} cannot be read ({error.strerror or error}); mend that and run again") from None


def document_id(file: InputFile, layout: Layout, entry: Entry) -> str:
    """A document's id: that of its row, else the name of its file, with its number if the file may hold more."""
    if entry.id is not None:
        return entry.id
    return file.name if layout.has_one_document(file.path) else f"{file.name}#{entry.position.row:06d}"


def groups_of(stamps: Sequence[Stamp]) -> Iterator[range]:
    """Cuts the files, in order, into the groups that are scanned together: a large one alone, small ones many."""
    first = size = 0
    for number, stamp in enumerate(stamps):
        if number > first and (size + stamp.size > GROUP_BYTES or number - first == GROUP_FILES):
            yield range(first, number)
            first, size = number, 0
        size += stamp.size
    yield range(first, len(stamps))


def scan_name(layout: Layout, stamps: Sequence[Stamp]) -> str:
    """The name under which a scan of these files is kept: another one if a file or the way of reading changes."""
    return hashlib.sha256(json.dumps([layout, stamps]).encode()).hexdigest()[:24]


def scan_files(files: Sequence[InputFile], layout: Layout) -> Scan:
    """Reads files. Raises DataError that names the place of what cannot be read or that changes meanwhile."""
    documents, digests = [], []
    rows: list[NDArray[np.int64]] = []
    for file in files:
        with naming(file):
            stamp = stamp_of(file)
            found = list(rows_of(file, layout))
            documents.append(sum(map(len, found)))
            digests.append(file_sha256(file.path))
            rows += found
            if stamp_of(file) != stamp:
                raise DataError(f"{file.path} was changed while it was being read; run the command again")
        advance(stamp.size)
    table = np.concatenate(rows) if rows else np.zeros((0, 4), np.int64)
    return Scan(np.array(documents, np.int64), np.array(digests), *np.ascontiguousarray(table.T))


def rows_of(file: InputFile, layout: Layout, batch: int = 1 << 16) -> Iterator[NDArray[np.int64]]:
    """Bytes, key of the id, key of the text and place of every document of a file, int64 [up to `batch`, 4]."""
    rows: list[tuple[int, int, int, int]] = []
    for entry in read_documents(file.path, layout):
        rows.append(row_of(entry, document_key(document_id(file, layout, entry))))
        if len(rows) == batch:
            yield np.array(rows, np.int64)
            rows = []
    if rows:
        yield np.array(rows, np.int64)


def row_of(entry: Entry, key: int) -> tuple[int, int, int, int]:
    """Bytes, key of the id, key of the text and place of a document."""
    place = entry.position.place
    if entry.text is None or not entry.text or entry.text.isspace():
        return EMPTY, key, 0, place
    try:
        content = entry.text.encode()
    except UnicodeEncodeError:
        return NOT_UNICODE, key, 0, place
    digest = hashlib.sha256(content).digest()
    return len(content), key, int.from_bytes(digest[:8], "little", signed=True), place


def save_scan(path: Path, scan: Scan) -> None:
    """Raises OSError."""
    with open_atomically(path) as file:
        np.savez(file, **scan._asdict())


def read_scan(path: Path, name: str) -> NDArray[Any]:
    """One array of a stored scan. Raises DataError where the file is damaged, FileNotFoundError where it is gone."""
    try:
        with np.load(path) as arrays:
            return np.asarray(arrays[name])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged ({error}); delete it, and run the command again") from None
