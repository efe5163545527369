"""Documents of json lines, plain (.jsonl) or packed (.jsonl.gz, .json.zst, ...): one in every line that is not blank."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.manifest import DataError
from tokenizer.readers.entry import FIRST, MEND, ColumnError, Columns, Entry, Position, id_of, text_of
from tokenizer.readers.streams import chunks_of, pieces_between, without_mark


def read_jsonl(
    path: Path, columns: Columns, start: Position = FIRST, wanted: NDArray[np.bool_] | None = None
) -> Iterator[Entry]:
    """The documents from `start` on; of as many as `wanted` has entries, those where it is true. Others are not parsed.

    Raises DataError that names the line (where reading began behind the first one, the offset) where the file is cut,
    damaged, or holds no text under `columns.text`; OSError for one that is not there or may not be read.
    """
    line_number, row, place = 0, 0, start.place
    try:
        for line in pieces_between(chunks_of(path, start.place), b"\n"):
            line_number += 1
            content = without_mark(line, place)
            if content.strip():
                if wanted is None or wanted[row]:
                    yield Entry(Position(start.row + row, place), *values_in(content, columns))
                row += 1
                if wanted is not None and row == len(wanted):
                    return
            place += len(line) + 1
    except (DataError, FileNotFoundError, PermissionError):
        raise
    except ColumnError as error:
        raise DataError(f"{path}: {told(line_number, place, start)}: {error}") from None
    except EOFError as error:
        raise DataError(f"{path} is cut after {told(line_number, place, start)} ({error}); {MEND}") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged after {told(line_number, place, start)} ({error}); {MEND}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged at {told(line_number, place, start)} ({error}); {MEND}") from None


def told(line_number: int, place: int, start: Position) -> str:
    """A place in words; lines can be counted only from the beginning."""
    return f"line {line_number}" if start.place == 0 else f"offset {place}"


def values_in(line: bytes, columns: Columns) -> tuple[str | None, str | None]:
    """The text and the id in a line of JSON. Raises ValueError where there is no text, or where one is of another type."""
    entry = json.loads(line.decode("utf-8"))
    if not isinstance(entry, dict) or columns.text not in entry:
        raise ValueError(f"no text under {columns.text!r}")
    return text_of(entry[columns.text], columns.text), id_of(entry.get(columns.id), columns.id)
