"""Documents of plain text files: the whole file, or what lies between separators."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.manifest import DataError
from tokenizer.readers.entry import FIRST, Entry, Position
from tokenizer.readers.streams import chunks_of, pieces_between, without_mark


def read_text(
    path: Path, separator: str | None = None, start: Position = FIRST, wanted: NDArray[np.bool_] | None = None
) -> Iterator[Entry]:
    """The documents of a text file from `start` on; of as many as `wanted` has entries, those where it is true.

    Raises DataError that names the offset where one of them is not UTF-8.
    """
    cut = separator.encode() if separator else None
    place = start.place
    pieces = pieces_between(chunks_of(path, place), cut) if cut else whole(path, wanted)
    for number, piece in enumerate(pieces):
        if wanted is None or wanted[number]:
            yield Entry(Position(start.row + number, place), decoded(piece, path, place))
        if wanted is not None and number + 1 == len(wanted):
            return
        place += len(piece) + len(cut or b"")


def whole(path: Path, wanted: NDArray[np.bool_] | None) -> Iterator[bytes]:
    """The one document of a file, which is not read where it is not wanted."""
    yield path.read_bytes() if wanted is None or wanted.any() else b""


def decoded(content: bytes, path: Path, place: int) -> str:
    """The text in the bytes at `place`, without a byte-order mark at the beginning of the file.

    Raises DataError that names the offset where they are not UTF-8.
    """
    text = without_mark(content, place)
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = place + len(content) - len(text) + error.start
        raise DataError(
            f"{path} is not UTF-8 at offset {offset} (byte 0x{text[error.start]:02x}); convert the file "
            "(for example with iconv) or leave it out"
        ) from None
