"""The bytes of plain, gzip and zstandard files from any place on, and the pieces between separators."""

import codecs
import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizer.readers.entry import optional_module

CHUNK = 1 << 18
COMPRESSED_CHUNK = 1 << 14  # of zstandard, which gives all that a chunk holds at once


def chunks_of(path: Path, start: int = 0) -> Iterator[bytes]:
    """The decompressed bytes of a file behind its first `start`, by its ending.

    A plain file is sought in; a compressed one is decompressed from its beginning. Raises EOFError for one that is
    cut, OSError or zlib.error for one that is damaged.
    """
    if path.suffix not in (".gz", ".zst"):
        yield from plain_chunks(path, start=start)
        return
    for chunk in gzip_chunks(path) if path.suffix == ".gz" else zstandard_chunks(path):
        if start < len(chunk):
            yield chunk[start:]
        start = max(start - len(chunk), 0)


def plain_chunks(path: Path, size: int = CHUNK, start: int = 0) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        while chunk := file.read(size):
            yield chunk


def gzip_chunks(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        while chunk := file.read1(CHUNK):  # gives what is whole before it raises for what is not
            yield chunk


def zstandard_chunks(path: Path) -> Iterator[bytes]:
    """All frames of a file. Raises EOFError for a last one that is cut, which the library's own reader passes over."""
    zstandard = optional_module("zstandard", path)
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    try:
        for data in plain_chunks(path, COMPRESSED_CHUNK):
            while data:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from None
    if frame is not None:
        raise EOFError("the last frame is cut")


def without_mark(piece: bytes, place: int) -> bytes:
    """What lies at `place` of a file, at its beginning without the byte-order mark of UTF-8."""
    return piece.removeprefix(codecs.BOM_UTF8) if place == 0 else piece


def pieces_between(chunks: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    """What lies between the separators, as bytes.split has it; memory holds one piece of it."""
    overlap = len(separator) - 1  # a separator may lie across two chunks
    gathered: list[bytes] = []
    tail = b""
    for chunk in chunks:
        first, *others = (tail + chunk).split(separator)
        gathered.append(first)
        for other in others:
            yield b"".join(gathered)
            gathered = [other]
        last = gathered.pop()
        cut = max(len(last) - overlap, 0)
        gathered.append(last[:cut])
        tail = last[cut:]
    yield b"".join([*gathered, tail])
