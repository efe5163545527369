"""What every reader is asked for and gives."""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

from em_megatron.data.manifest import DataError

MEND = "put a whole copy in its place (delete a fetched one, and run the command again)"


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
    """A document of a file. text: None where a parquet row has none. id: None where the row says none."""

    position: Position
    text: str | None
    id: str | None = None


FIRST = Position()


def id_of(value: object) -> str | None:
    """A row's id as a string; None for what is neither a number nor a string with something in it.

    Half of a surrogate pair, which JSON can hold, becomes a question mark.
    """
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        return None
    return str(value).encode("utf-8", "replace").decode()


def optional_module(name: str, path: Path) -> Any:
    """A module of the extra `data`. Raises DataError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(f"{path} needs the package {package}; run pip install 'em-megatron[data]'") from None
