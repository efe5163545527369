"""What every reader is asked for and gives."""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

from em_megatron.data.manifest import DataError

MEND = "put a whole copy in its place (delete a fetched one, and run the command again)"
TEXT_MEND = "name a column of strings with --text-column"
ID_MEND = "name a column of strings or integers with --id-column"


class ColumnError(ValueError):
    """A column that holds no texts or no ids: the end of a sentence that says what it holds and how to mend it."""


class Position(NamedTuple):
    """Where a document begins in its file.

    row: its number among the documents of the file, from 0. place: bytes of decompressed content before it; in a
    parquet file its row again.
    """

    row: int = 0
    place: int = 0


class Columns(NamedTuple):
    """Names of what a row of a jsonl or parquet file holds; `id` may be missing in the file."""

    text: str = "text"
    id: str = "id"


class Entry(NamedTuple):
    """A document of a file. text: None where the row has null. id: None where the row says none."""

    position: Position
    text: str | None
    id: str | None = None


FIRST = Position()


def text_of(value: object, column: str) -> str | None:
    """A row's text; None for null. Raises ColumnError for what is no string."""
    if value is None or isinstance(value, str):
        return value
    raise wrong_type(column, type(value).__name__, TEXT_MEND)


def id_of(value: object, column: str) -> str | None:
    """A row's id as a string; None for null and for an empty string. The id of 1.0 is that of 1.

    Half of a surrogate pair, which JSON can hold, becomes a question mark. Raises ColumnError for what is neither a
    string nor a whole number.
    """
    if value is None or value == "":
        return None
    if isinstance(value, float):
        if not value.is_integer():
            raise ColumnError(f"column {column} holds {value}; {ID_MEND}")
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise wrong_type(column, type(value).__name__, ID_MEND)
    return str(value).encode("utf-8", "replace").decode()


def wrong_type(column: str, kind: object, mend: str) -> ColumnError:
    """Says of which type a column is."""
    return ColumnError(f"column {column} is of type {kind}; {mend}")


def optional_module(name: str, path: Path) -> Any:
    """A module of the extra `data`. Raises DataError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(f"{path} needs the package {package}; run pip install 'em-megatron[data]'") from None
