"""One source file becomes text files, and then a record of it that says so.

OUTPUT/train/FOLDER/*.txt, validation/, test/   a document each, at most 1000 in a folder
OUTPUT/records/NAME.json                        written last, so a source file without it is converted again
OUTPUT/unfinished/NAME                          what is being converted; moved in one step when it is whole
OUTPUT/downloads/NAME                           fetched files
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from em_megatron.data.manifest import DataError, file_sha256
from tokenizer.atomic import write_atomically
from tokenizer.paper_corpora.download import download
from tokenizer.paper_corpora.recipe import Recipe, Row, Selection, SourceFile

FOLDER_FILES = 1000
RECORDS, UNFINISHED, DOWNLOADS = "records", "unfinished", "downloads"


@dataclass
class Counts:
    """What became of the documents of a source file; `text_bytes` counts those that were kept."""

    documents: int = 0
    text_bytes: int = 0
    too_short: int = 0
    empty: int = 0
    not_unicode: int = 0


@dataclass
class Record:
    """A converted source file: what it was and what it became, as it stands in records/NAME.json."""

    name: str
    split: str
    source_bytes: int
    sha256: str
    selection: dict[str, int | None]
    counts: Counts = field(default_factory=Counts)


class Task(NamedTuple):
    """What a worker needs to fetch and convert one source file; `inputs` is the folder of files that are here."""

    recipe: Recipe
    source: SourceFile
    output: Path
    inputs: Path | None
    selection: Selection
    delete_download: bool


def record_path(output: Path, name: str) -> Path:
    return output / RECORDS / f"{name}.json"


def load_record(path: Path) -> Record:
    """Raises DataError for a record that this version did not write."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Record(**(fields | {"counts": Counts(**fields["counts"])}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no record of a converted file ({error}); delete it, and run again") from None


def destination(task: Task) -> Path:
    """The folder of the documents of a source file, or the file of its only one."""
    below = task.output / task.source.split
    return below / (task.recipe.document_path(task.source.name) if task.recipe.one_document else task.source.name)


def text_bytes_in(path: Path) -> tuple[int, int]:
    """Number and bytes of the text files below a folder, or of one file."""
    paths = [path] if path.is_file() else path.rglob("*.txt")
    sizes = [file.stat().st_size for file in paths]
    return len(sizes), sum(sizes)


def finished(task: Task) -> Record | None:
    """The record of a source file whose documents are all there, else None.

    Raises DataError if it was converted with other options.
    """
    path = record_path(task.output, task.source.name)
    if not path.is_file():
        return None
    record = load_record(path)
    if record.selection != task.selection._asdict() or record.split != task.source.split:
        raise DataError(
            f"{task.output} holds documents of {task.source.name} made with other options ({record.selection}); "
            "choose another --output"
        )
    same = task.source.size in (None, record.source_bytes)
    whole = text_bytes_in(destination(task)) == (record.counts.documents, record.counts.text_bytes)
    return record if same and whole else None


def convert_source(task: Task) -> Record:
    """Fetches a source file where it is not here, converts it, writes its record; does nothing if that was done.

    Raises:
        DataError: the file cannot be fetched, is damaged, was converted with other options, or the disk is full.
    """
    fetched = task.output / DOWNLOADS / task.source.name
    try:
        record = finished(task)
        if record is None:
            path = task.inputs / task.source.name if task.inputs else download(task.source, fetched)
            record = convert_file(task, path)
            content = json.dumps(asdict(record), indent=1, sort_keys=True) + "\n"
            write_atomically(record_path(task.output, task.source.name), content.encode())
        if task.delete_download:
            fetched.unlink(missing_ok=True)
        return record
    except OSError as error:
        raise DataError(f"cannot convert {task.source.name} ({error}); mend that and run the command again") from None


def convert_file(task: Task, path: Path) -> Record:
    """Writes the documents of a file that is here; they appear under their final name in one step."""
    record_path(task.output, task.source.name).unlink(missing_ok=True)
    work = task.output / UNFINISHED / task.source.name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    record = Record(
        task.source.name, task.source.split, path.stat().st_size, file_sha256(path), task.selection._asdict()
    )
    write_documents(task.recipe.read(path, task.selection), work, task.selection, record.counts)
    target = destination(task)
    target.unlink(missing_ok=True) if target.is_file() else shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not task.recipe.one_document:
        os.replace(work, target)
    elif record.counts.documents:
        os.replace(next(work.rglob("*.txt")), target)
    shutil.rmtree(work, ignore_errors=True)
    return record


def write_documents(rows: Iterable[Row], folder: Path, selection: Selection, counts: Counts) -> None:
    """Writes the documents that are kept, named after their place in the source file, and counts all of them."""
    for row in rows:
        if selection.limit is not None and counts.documents >= selection.limit:
            return
        content = kept_content(row, selection, counts)
        if content is not None:
            below = folder / f"{counts.documents // FOLDER_FILES:04d}"
            if counts.documents % FOLDER_FILES == 0:
                below.mkdir()
            (below / f"{row.number:09d}.txt").write_bytes(content)
            counts.documents += 1
            counts.text_bytes += len(content)


def kept_content(row: Row, selection: Selection, counts: Counts) -> bytes | None:
    """The UTF-8 text of a document; None, and a count more, for one that is left out."""
    if row.tokens is not None and row.tokens < selection.min_tokens:
        counts.too_short += 1
        return None
    if row.text is None or not row.text.strip():
        counts.empty += 1
        return None
    try:
        content = row.text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        counts.not_unicode += 1
        return None
    if len(content) < selection.min_bytes:
        counts.too_short += 1
        return None
    return content
