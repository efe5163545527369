"""The reader of a file, by its ending."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenizer.readers.entry import FIRST, Columns, Entry, Position
from tokenizer.readers.jsonl import read_jsonl
from tokenizer.readers.parquet import read_parquet
from tokenizer.readers.text import read_text

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
SUFFIXES = (".txt", *JSONL_SUFFIXES, ".parquet")


class Layout(NamedTuple):
    """How documents lie in files: the separator of text files (None: a file is one document), names of columns.

    Documents of jsonl and parquet files are not cut at the separator.
    """

    separator: str | None = None
    columns: Columns = Columns()

    def has_one_document(self, path: Path) -> bool:
        """Whether a file is one document, which then bears the file's name."""
        return self.separator is None and not path.name.endswith((*JSONL_SUFFIXES, ".parquet"))


def read_documents(
    path: Path, layout: Layout, start: Position = FIRST, wanted: NDArray[np.bool_] | None = None
) -> Iterator[Entry]:
    """The documents of a file from `start` on, in order; of as many as `wanted` has entries, those where it is true.

    A file of another ending than SUFFIXES is read as plain text. Memory holds one document, of parquet files 64 rows.
    Raises DataError that names the place of what is damaged or is no UTF-8.
    """
    if path.name.endswith(JSONL_SUFFIXES):
        return read_jsonl(path, layout.columns, start, wanted)
    if path.suffix == ".parquet":
        return read_parquet(path, layout.columns, start, wanted)
    return read_text(path, layout.separator, start, wanted)
