"""One shard of the plan is encoded, and then a record of it says so.

WORK/shards/NAME.json is the record, written last: the shard's entry in the manifest.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from em_megatron.data.index import index_bytes, index_name
from em_megatron.data.manifest import DataError, Shard, file_sha256
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.data.writing import EncodedDocument, write_shard
from tokenizer.atomic import open_atomically
from tokenizer.corpus import InputFile
from tokenizer.encoding.plan import FATES_NAME, ShardPlan
from tokenizer.encoding.processes import advance
from tokenizer.encoding.scan import Stamp, document_id, naming, stamp_of
from tokenizer.encoding.split import FATES
from tokenizer.readers.entry import FIRST, Position
from tokenizer.readers.files import Layout, read_documents

RECORD_SUFFIX = ".json"


class Part(NamedTuple):
    """A file that documents of a shard lie in, as it was read before. first, stop: numbers of its documents in the corpus."""

    file: InputFile
    stamp: Stamp
    sha256: str
    first: int
    stop: int


class ShardTask(NamedTuple):
    """What a worker needs to encode one shard."""

    made: Path
    plan_folder: Path
    records: Path
    model: Path
    dtype: str
    layout: Layout
    shard: ShardPlan
    parts: tuple[Part, ...]


_vocabularies: dict[Path, Vocabulary] = {}  # one per process


def vocabulary_of(path: Path) -> Vocabulary:
    """The tokenizer, loaded once in a process."""
    if path not in _vocabularies:
        _vocabularies[path] = Vocabulary(path)
    return _vocabularies[path]


def encode_shard(task: ShardTask) -> None:
    """Writes a shard and its record.

    Raises DataError where an input file has changed since it was read or is damaged, or where the shard cannot be
    written; nothing of it is left then.
    """
    plan = task.shard
    try:
        shard = write_shard(task.made, plan.name, documents_of(task), task.dtype)
    except OSError as error:
        if not task.records.exists():
            raise  # the work folder is gone: another process has finished the corpus, or replaced it
        raise DataError(
            f"shard {plan.name} cannot be written to {task.made.parent.parent} ({error.strerror or error}); mend that, and run the "
            "same command again to go on"
        ) from None
    if shard is None or (shard.documents, shard.text_bytes) != (plan.documents, plan.text_bytes):
        raise DataError(
            f"the texts of shard {plan.name} are not those that were read before; run again with --overwrite"
        )
    save_record(task.records, shard)


def documents_of(task: ShardTask) -> Iterator[EncodedDocument]:
    """The documents of a shard, each encoded when it is asked for. Raises DataError, also for a file that changed."""
    vocabulary = vocabulary_of(task.model)
    fates = np.load(task.plan_folder / FATES_NAME, mmap_mode="r")
    split = FATES.index(task.shard.split)
    for part in task.parts:
        first, stop = max(part.first, task.shard.first), min(part.stop, task.shard.stop)
        start = Position(task.shard.row, task.shard.place) if first > part.first else FIRST
        wanted = np.asarray(fates[first:stop]) == split
        if not wanted.any():
            continue
        with naming(part.file):
            stamp = stamp_of(part.file)
            if not _is_same(part, stamp):
                raise _changed(part)
            for entry in read_documents(part.file.path, task.layout, start, wanted):
                yield encode_document(
                    vocabulary, document_id(part.file, task.layout, entry), entry.text or "", task.dtype
                )
            if stamp_of(part.file) != stamp:
                raise _changed(part)


@lru_cache(maxsize=1024)
def _is_same(part: Part, stamp: Stamp) -> bool:
    """Whether a file is the one that was read before; one with another time is compared by content, once."""
    if stamp == part.stamp:
        return True
    return stamp[:2] == part.stamp[:2] and file_sha256(part.file.path) == part.sha256


def _changed(part: Part) -> DataError:
    return DataError(f"{part.file.path} was changed while it was being encoded; run again with --overwrite")


def encode_document(vocabulary: Vocabulary, identifier: str, text: str, dtype: str) -> EncodedDocument:
    """The ids of a text between bos and eos, with its id and bytes."""
    text_bytes = len(text.encode())
    parts = [
        np.array([vocabulary.bos_id], dtype),
        vocabulary.encode_array(text, dtype),
        np.array([vocabulary.eos_id], dtype),
    ]
    advance(text_bytes)
    return EncodedDocument(identifier, np.concatenate(parts).tobytes(), text_bytes)


def save_record(records: Path, shard: Shard) -> None:
    """Says that a shard is whole. Raises FileNotFoundError where the corpus was finished meanwhile."""
    with open_atomically(records / (shard.name + RECORD_SUFFIX)) as file:
        file.write(json.dumps(asdict(shard)).encode())


def load_record(records: Path, name: str) -> Shard:
    """Raises DataError for a record that is damaged, FileNotFoundError where there is none."""
    path = records / (name + RECORD_SUFFIX)
    try:
        return Shard(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it, and run the command again") from None


def is_whole(folder: Path, shard: Shard, first: Path | None = None) -> bool:
    """Whether the files of a shard have their sizes. first: where a file of it may also lie, on its way to `folder`."""
    sizes = {shard.name: shard.file_bytes, index_name(shard.name): index_bytes(shard.documents)}
    try:
        return all(
            (first / name if first and (first / name).exists() else folder / name).stat().st_size == size
            for name, size in sizes.items()
        )
    except FileNotFoundError:
        return False
