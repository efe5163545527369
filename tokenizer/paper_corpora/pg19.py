"""PG-19: books of Project Gutenberg from before 1919, a text file each, with official splits.

The bucket holds train/ID.txt, validation/ID.txt, test/ID.txt and metadata.csv, whose lines are book id, title, year of
publication and address, without a header. Its list gives the size and the MD5 of every file. There is no length column.
"""

import base64
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlencode

from em_megatron.data.manifest import DataError, file_sha256
from tokenizer.paper_corpora.download import get_json
from tokenizer.paper_corpora.recipe import (
    TEST,
    TRAIN,
    VALIDATION,
    Recipe,
    Row,
    Selection,
    SourceFile,
    checked_name,
    first_folder,
)
from tokenizer.readers.text import read_text

BUCKET = "deepmind-gutenberg"
METADATA = "metadata.csv"
SPLITS = {TRAIN: TRAIN, VALIDATION: VALIDATION, TEST: TEST}


def list_remote(base_url: str, subset: str) -> list[SourceFile]:
    """The files of the bucket. Raises DataError where it cannot be listed."""
    found: list[SourceFile] = []
    for prefix in (METADATA, *(f"{split}/" for split in SPLITS)):
        page: str | None = ""
        while page is not None:
            query = urlencode({"prefix": prefix} | ({"pageToken": page} if page else {}))
            url = f"{base_url}/storage/v1/b/{BUCKET}/o?{query}"
            answer, _ = get_json(url)
            try:
                items = [item for item in answer.get("items", ()) if not item["name"].endswith("/")]
                found += [file_of(item, base_url) for item in items]
                page = answer.get("nextPageToken")
            except (KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{url} is not a list of a bucket ({error!r}); give another --base-url") from None
    return found


def file_of(item: dict[str, str], base_url: str) -> SourceFile:
    """A file as an item of the bucket's list describes it."""
    name = checked_name(item["name"])
    checksum = ("md5", base64.b64decode(item["md5Hash"]).hex()) if "md5Hash" in item else None
    split = "" if name == METADATA else split_of(name)
    return SourceFile(name, split, f"{base_url}/{BUCKET}/{quote(name)}", int(item["size"]), checksum)


def split_of(name: str) -> str:
    """The split of a book. Raises DataError for a file that is none."""
    if not PurePosixPath(name).stem.isdecimal():
        raise DataError(f"{name} is not named after the number of a book; move it out of the folders of PG-19")
    return first_folder(name, SPLITS)


def read(path: Path, selection: Selection) -> Iterator[Row]:
    return (Row(entry.position.row, entry.text) for entry in read_text(path))


def document_path(name: str) -> str:
    """Where a book goes below its split: a folder for each thousand numbers."""
    number = int(PurePosixPath(name).stem)
    return f"{number // 1000:03d}/{number}.txt"


def read_metadata(path: Path) -> dict[str, tuple[str, str]]:
    """Book id -> (title, year). Raises DataError that names the line that has no id, title and year."""
    books: dict[str, tuple[str, str]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        try:
            for fields in filter(None, reader):
                if len(fields) < 3 or not fields[0].isdecimal():
                    raise ValueError("no book id, title and year")
                books[fields[0]] = (fields[1], fields[2])
        except (ValueError, csv.Error) as error:
            raise DataError(f"{path} is damaged at line {reader.line_num} ({error}); fetch it again") from None
    return books


def describe(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """What metadata.csv holds, and how many of the books it does not know."""
    books = read_metadata(path)
    unknown = sum(PurePosixPath(name).stem not in books for name in names)
    return {"file": METADATA, "sha256": file_sha256(path), "books": len(books), "unknown_books": unknown}


RECIPE = Recipe(
    key="pg19",
    title="PG-19",
    homepage="https://github.com/google-deepmind/pg19",
    base_url="https://storage.googleapis.com",
    licence="Apache License 2.0 for the collection; the books are out of copyright in the United States",
    citation="Rae, Potapenko, Jayakumar, Hillier, Lillicrap: Compressive Transformers for Long-Range Sequence "
    "Modelling, arXiv 1911.05507, 2019",
    size="28,602 books for training, 50 for validation, 100 for testing; about 11.5 GB of text",
    suffixes=(".txt",),
    list_remote=list_remote,
    split_of=split_of,
    read=read,
    one_document=True,
    document_path=document_path,
    companion=METADATA,
    describe=describe,
)
