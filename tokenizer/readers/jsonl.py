"""Documents of .jsonl, .jsonl.gz and .jsonl.zst files: one in every line that is not blank."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.manifest import DataError
from tokenizer.readers.entry import FIRST, MEND, Columns, Entry, Position, id_of
from tokenizer.readers.streams import chunks_of, pieces_between


def read_jsonl(
    path: Path, columns: Columns, start: Position = FIRST, wanted: NDArray[np.bool_] | None = None
) -> Iterator[Entry]:
    """The documents from `start` on; of as many as `wanted` has entries, those where it is true. Others are not parsed.

    Raises DataError that names the line (where reading began behind the first one, the offset) where the file is cut,
    damaged, or holds no text under `columns.text`.
    """
    line_number, row, place = 0, 0, start.place
    try:
        for line in pieces_between(chunks_of(path, start.place), b"\n"):
            line_number += 1
            if line.strip():
                if wanted is None or wanted[row]:
                    yield Entry(Position(start.row + row, place), *values_in(line, columns))
                row += 1
                if wanted is not None and row == len(wanted):
                    return
            place += len(line) + 1
    except DataError:
        raise
    except EOFError as error:
        raise DataError(f"{path} is cut after {told(line_number, place, start)} ({error}); {MEND}") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged after {told(line_number, place, start)} ({error}); {MEND}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged at {told(line_number, place, start)} ({error}); {MEND}") from None


def told(line_number: int, place: int, start: Position) -> str:
    """A place in words; lines can be counted only from the beginning."""
    return f"line {line_number}" if start.place == 0 else f"offset {place}"


def values_in(line: bytes, columns: Columns) -> tuple[str, str | None]:
    """The text and the id in a line of JSON. Raises ValueError where there is no text."""
    entry = json.loads(line.decode("utf-8"))
    text = entry.get(columns.text) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"no text under {columns.text!r}")
    return text, id_of(entry.get(columns.id))
