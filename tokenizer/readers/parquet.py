"""Documents of parquet files, a row each; row groups without a wanted row are not read."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.manifest import DataError
from tokenizer.readers.entry import (
    FIRST,
    ID_MEND,
    MEND,
    TEXT_MEND,
    ColumnError,
    Columns,
    Entry,
    Position,
    id_of,
    optional_module,
    wrong_type,
)

BATCH_ROWS = 64


def read_parquet(
    path: Path, columns: Columns, start: Position = FIRST, wanted: NDArray[np.bool_] | None = None
) -> Iterator[Entry]:
    """The documents from `start` on; of as many as `wanted` has entries, those where it is true.

    Raises DataError that names the row group that is damaged, or a column that is missing, twice there or of another
    type; OSError for a file that is not there or may not be read.
    """
    with open_parquet(path, (columns.text,), (columns.id,)) as (file, place):
        check_types(file.schema_arrow, columns)
        names = [name for name in (columns.text, columns.id) if name in file.schema_arrow.names]
        stop = file.metadata.num_rows if wanted is None else start.row + len(wanted)
        mask = np.zeros(max(stop, file.metadata.num_rows), np.bool_)
        mask[start.row : stop] = True if wanted is None else wanted
        first = 0
        for group in range(file.num_row_groups):
            place[0] = f"row group {group}"
            rows = file.metadata.row_group(group).num_rows
            if mask[first : first + rows].any():
                yield from group_entries(file, group, names, mask[first : first + rows], first)
            first += rows


def group_entries(file: Any, group: int, names: list[str], mask: NDArray[np.bool_], first: int) -> Iterator[Entry]:
    """The wanted documents of one row group, whose first row is number `first` of the file."""
    number = 0
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=names, use_threads=False):
        chosen = np.flatnonzero(mask[number : number + batch.num_rows])
        values = [batch.column(name).take(chosen).to_pylist() for name in names]
        for row, *fields in zip((first + number + chosen).tolist(), *values, strict=True):
            try:
                identifier = id_of(fields[1], names[1]) if len(fields) > 1 else None
            except ColumnError as error:
                raise ColumnError(f"row {row}: {error}") from None
            yield Entry(Position(row, row), fields[0], identifier)
        number += batch.num_rows


def check_types(schema: Any, columns: Columns) -> None:
    """Raises ColumnError for a column of texts that are no strings, or of ids that are neither these nor numbers."""
    types = importlib.import_module("pyarrow.types")
    strings = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    numbers = (types.is_integer, types.is_floating)
    for name, allowed, mend in ((columns.text, strings, TEXT_MEND), (columns.id, (*strings, *numbers), ID_MEND)):
        if name in schema.names:
            kind = schema.field(name).type
            values = kind.value_type if types.is_dictionary(kind) else kind
            if not any(is_allowed(values) for is_allowed in allowed):
                raise wrong_type(name, kind, mend)


def read_lengths(path: Path, text_column: str, length_column: str) -> NDArray[np.int64]:
    """The numbers in a column, int64 [rows], 0 where there is none. Raises DataError as `read_parquet` does."""
    with open_parquet(path, (text_column, length_column)) as (file, place):
        groups = [np.zeros(0, np.int64)]
        for group in range(file.num_row_groups):
            place[0] = f"row group {group}"
            values = file.read_row_group(group, [length_column], use_threads=False)[0].to_pylist()
            groups.append(np.array([value or 0 for value in values], np.int64))
        return np.concatenate(groups)


@contextmanager
def open_parquet(
    path: Path, needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[Any, list[str]]]:
    """A parquet file that has the needed columns, and a list of one string that says where its reader is.

    Raises DataError that names this place where the file is damaged, or a needed column that is missing, or a needed
    or optional one that is there twice.
    """
    parquet = optional_module("pyarrow.parquet", path)
    place = ["its footer"]
    try:
        with parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if not set(needed) <= set(names):
                raise DataError(f"{path} has the columns {', '.join(names)}, not {' and '.join(needed)}; {MEND}")
            if twice := [name for name in (*needed, *optional) if names.count(name) > 1]:
                raise DataError(
                    f"{path} has {names.count(twice[0])} columns of the name {twice[0]}; write it with one of them, or "
                    "name another column"
                )
            yield file, place
    except (DataError, FileNotFoundError, PermissionError):
        raise
    except ColumnError as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, ValueError, optional_module("pyarrow", path).ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is cut or damaged in {place[0]} ({reason}); {MEND}") from None
