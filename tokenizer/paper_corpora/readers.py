"""Documents of text, jsonl (plain, gzip, zstandard) and parquet files, one at a time, with damage named by its place."""

import gzip
import importlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from em_megatron.data.manifest import DataError
from tokenizer.paper_corpora.recipe import Row, Selection

CHUNK = 1 << 18
COMPRESSED_CHUNK = 1 << 14  # of zstandard, which gives all that a chunk holds at once
BATCH_ROWS = 64
MEND = "put a whole copy in its place (delete a fetched one, and run the command again)"


def optional_module(name: str, path: Path) -> Any:
    """A module of the extra `data`. Raises DataError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(f"{path} needs the package {package}; run pip install 'em-megatron[data]'") from None


def read_text(path: Path, selection: Selection) -> Iterator[Row]:
    """The one document of a text file. Raises DataError that names the offset where it is not UTF-8."""
    try:
        yield Row(0, path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at offset {error.start}; {MEND}") from None


def plain_chunks(path: Path, size: int = CHUNK) -> Iterator[bytes]:
    with open(path, "rb") as file:
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


def chunks_of(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file, by its ending."""
    readers = {".gz": gzip_chunks, ".zst": zstandard_chunks}
    return readers.get(path.suffix, plain_chunks)(path)


def lines_of(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their ends; memory holds one of them."""
    pieces: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        for other in others:
            yield b"".join(pieces)
            pieces = [other]
    if any(pieces):
        yield b"".join(pieces)


def read_jsonl(path: Path, column: str) -> Iterator[Row]:
    """The documents of a .jsonl, .jsonl.gz or .jsonl.zst file.

    Raises DataError that names the line where it is cut, damaged, or holds no text under `column`.
    """
    number = 0
    try:
        for number, line in enumerate(lines_of(chunks_of(path)), start=1):
            if line.strip():
                yield Row(number, text_in(line, column))
    except DataError:
        raise
    except EOFError as error:
        raise DataError(f"{path} is cut after line {number} ({error}); {MEND}") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged after line {number} ({error}); {MEND}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged at line {number} ({error}); {MEND}") from None


def text_in(line: bytes, column: str) -> str:
    """The text in a line of JSON. Raises ValueError where there is none."""
    entry = json.loads(line.decode("utf-8"))
    text = entry.get(column) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"no text under {column!r}")
    return text


def read_parquet(path: Path, column: str, length_column: str, selection: Selection) -> Iterator[Row]:
    """The documents of a parquet file; texts are read only in row groups that hold one that is long enough.

    Raises DataError that names the row group that is damaged, or a missing column.
    """
    parquet = optional_module("pyarrow.parquet", path)
    place, first = "its footer", 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if not {column, length_column} <= set(names):
                raise DataError(f"{path} has the columns {', '.join(names)}, not {column} and {length_column}; {MEND}")
            for group in range(file.num_row_groups):
                place = f"row group {group}"
                for row in read_group(file, group, (column, length_column), selection.min_tokens):
                    yield row._replace(number=first + row.number)
                first += file.metadata.row_group(group).num_rows
    except DataError:
        raise
    except (OSError, ValueError, optional_module("pyarrow", path).ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is cut or damaged in {place} ({reason}); {MEND}") from None


def read_group(file: Any, group: int, columns: tuple[str, str], min_tokens: int) -> Iterator[Row]:
    """The documents of one row group, numbered from 0; those that are too short may come without their text."""
    lengths = [tokens or 0 for tokens in file.read_row_group(group, [columns[1]], use_threads=False)[0].to_pylist()]
    if max(lengths, default=0) < min_tokens:
        yield from (Row(number, None, tokens) for number, tokens in enumerate(lengths))
        return
    number = 0
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[columns[0]], use_threads=False):
        for text in batch.column(0).to_pylist():
            yield Row(number, text, lengths[number])
            number += 1
