"""Reads every byte of an encoded corpus and says which of its files are not what the manifest promises.

    python -m tokenizer.verify corpus

Compared are, shard by shard: size and sha256 of the tar and of its index; the tar's headers and the description beside
each document against the index; every id against the size of the vocabulary; bos and eos around every document; and,
where the tokenizer gives texts back exactly, the bytes that the ids stand for. Keys of ids in the index are covered by
its sha256 alone: the tar holds a document's name, which may be another than its id. Each bad shard is named with the
first thing that is wrong with it, and so is a tar or index that the manifest does not list. The exit status is 0 for a
corpus without fault, 1 for one with a fault, and 2 where there is nothing to compare.

A bad shard is mended by deleting its .tar and running the same tokenizer.encode command again: it encodes the shards
that are missing, and no others.
"""

import argparse
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from em_megatron.data.index import INDEX_SUFFIX, OFFSET, TEXT_BYTES, TOKENS, index_bytes, index_name, open_index
from em_megatron.data.manifest import DataError, Manifest, Shard, file_sha256
from em_megatron.data.vocabulary import Vocabulary, find_tokenizer
from em_megatron.data.writing import JSON_SUFFIX, TOKENS_SUFFIX
from tokenizer.encoding.processes import ordered_map


class Task(NamedTuple):
    """A shard to read. tokenizer: the corpus' own; None where it cannot be used, and ids are compared in part."""

    folder: Path
    shard: Shard
    dtype: str
    vocab_size: int
    tokenizer: Path | None


class BadShardError(Exception):
    """What is wrong with a shard, as half a sentence."""


MEND_SHARD = (
    "delete the .tar of each shard that is named and run the same tokenizer.encode command again, which encodes the "
    "missing shards alone; or copy them again"
)
_vocabulary = lru_cache(maxsize=1)(Vocabulary)  # one per worker process


def fault(task: Task) -> str:
    """The first thing that is wrong with a shard; "" for none."""
    try:
        _check_files(task)
        index = _opened_index(task)
        _check_members(task, index)
        _check_ids(task, index)
    except BadShardError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    return ""


def _check_files(task: Task) -> None:
    shard = task.shard
    expected = (
        (shard.name, shard.file_bytes, shard.sha256),
        (index_name(shard.name), index_bytes(shard.documents), shard.index_sha256),
    )
    for name, size, sha256 in expected:
        path = task.folder / name
        if not path.is_file():
            raise BadShardError(f"{name} is missing")
        found = path.stat().st_size
        if found != size:
            kind = "truncated" if found < size else "too long"
            raise BadShardError(f"{name} is {kind}: {found} bytes, the manifest says {size}")
        if (content := file_sha256(path)) != sha256:
            raise BadShardError(f"{name} was altered: its sha256 is {content[:12]}, the manifest says {sha256[:12]}")


def _opened_index(task: Task) -> NDArray[np.int64]:
    try:
        return open_index(task.folder / index_name(task.shard.name), task.shard)
    except DataError as error:
        raise BadShardError(str(error).partition("; ")[0]) from None  # what mends it is said once, for all shards


def _check_members(task: Task, index: NDArray[np.int64]) -> None:
    """The tar's headers and descriptions against the index."""
    found: list[tuple[int, int, int]] = []
    itemsize = np.dtype(task.dtype).itemsize
    try:
        for offset, size, entry in _documents(task.folder / task.shard.name):
            row = (offset, entry["tokens"], entry["bytes"])
            if size != itemsize * entry["tokens"]:
                raise BadShardError(f"document {len(found)} has {size} bytes of ids, its description says {row[1]} ids")
            found.append(row)
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise BadShardError(f"its tar cannot be read after {len(found)} documents ({error})") from None
    if len(found) != len(index):
        raise BadShardError(f"its tar holds {len(found)} documents, its index {len(index)}")
    differs = (np.array(found, np.int64) != index[:, [OFFSET, TOKENS, TEXT_BYTES]]).any(1)
    if differs.any():
        document = int(differs.argmax())
        expected = tuple(index[document, [OFFSET, TOKENS, TEXT_BYTES]].tolist())
        raise BadShardError(
            f"document {document} has offset, ids and bytes of text {found[document]} in the tar and {expected} in the index"
        )


def _documents(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Offset and bytes of the ids of each document, and its description. Raises what damaged tars and JSON raise."""
    entry: dict[str, Any] | None = None
    place: tuple[int, int] | None = None
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.name.endswith(JSON_SUFFIX) and (file := tar.extractfile(member)):
                entry = json.loads(file.read())
            elif member.name.endswith(TOKENS_SUFFIX):
                place = member.offset_data, member.size
            else:
                raise ValueError(f"member {member.name} does not belong there")
            if entry is not None and place is not None:
                yield *place, entry
                entry = place = None
    if entry is not None or place is not None:
        raise ValueError("the last document has no ids or no description")


def _check_ids(task: Task, index: NDArray[np.int64]) -> None:
    content = np.memmap(task.folder / task.shard.name, np.uint8, "r")
    vocabulary = _vocabulary(task.tokenizer) if task.tokenizer else None
    itemsize = np.dtype(task.dtype).itemsize
    for document, row in enumerate(index):
        offset, tokens = int(row[OFFSET]), int(row[TOKENS])
        ids = content[offset : offset + tokens * itemsize].view(task.dtype)
        if tokens < 2:
            raise BadShardError(f"document {document} has {tokens} ids, fewer than bos and eos")
        if (largest := int(ids.max())) >= task.vocab_size:
            raise BadShardError(f"document {document} holds id {largest} of a vocabulary of {task.vocab_size}")
        if vocabulary is None:
            continue
        if (int(ids[0]), int(ids[-1])) != (vocabulary.bos_id, vocabulary.eos_id):
            raise BadShardError(f"document {document} does not begin with bos and end with eos: {ids[0]} ... {ids[-1]}")
        if vocabulary.lossless and (found := int(vocabulary.token_bytes[ids].sum())) != row[TEXT_BYTES]:
            raise BadShardError(
                f"document {document} has ids for {found} bytes of text, the index says {row[TEXT_BYTES]}"
            )


def check_tokenizer(folder: Path, manifest: Manifest) -> tuple[Path | None, str]:
    """The corpus' tokenizer, None where it cannot be used, and what is wrong with it, "" for nothing."""
    try:
        vocabulary = Vocabulary(find_tokenizer(folder))
    except DataError as error:
        return None, str(error)
    if vocabulary.sha256 != manifest.tokenizer_sha256:
        return None, (
            f"the corpus was encoded with another tokenizer than {vocabulary.path.name} beside its manifest (sha256 "
            f"{manifest.tokenizer_sha256[:12]}, this one has {vocabulary.sha256[:12]}); copy the right one there"
        )
    if vocabulary.size != manifest.vocab_size:
        return None, f"{vocabulary.path.name} has {vocabulary.size} ids, the manifest says {manifest.vocab_size}"
    return vocabulary.path, ""


def chosen_shards(manifest: Manifest, splits: Sequence[str]) -> list[Shard]:
    """The shards of these splits, of all where none is named. Raises DataError for a split that is not there."""
    if not splits:
        return [shard for shards in manifest.splits.values() for shard in shards]
    return [shard for split in splits for shard in manifest.shards(split)]


def extra_files(folder: Path, manifest: Manifest, splits: Sequence[str]) -> list[str]:
    """Names of tars and indices in the folder that the manifest does not list; of these splits, of all for none."""
    shards = chosen_shards(manifest, ())
    listed = {name for shard in shards for name in (shard.name, index_name(shard.name))}
    found = (path.name for path in folder.iterdir() if path.suffix in (".tar", INDEX_SUFFIX))
    return sorted(
        name for name in found if name not in listed and (not splits or name.startswith(tuple(f"{s}-" for s in splits)))
    )


def verify(folder: Path, splits: Sequence[str], workers: int, quiet: bool = False) -> Iterator[tuple[str, str]]:
    """Name and fault of everything in a corpus that is wrong, shards in their order, then files that do not belong.

    splits: which to read; none means all. Raises DataError where there is no corpus, or no such split.
    """
    manifest = Manifest.load(folder)
    chosen = chosen_shards(manifest, splits)
    tokenizer, wrong = check_tokenizer(folder, manifest)
    if wrong:
        yield "tokenizer", wrong
    tasks = [Task(folder, shard, manifest.dtype, manifest.vocab_size, tokenizer) for shard in chosen]
    total = sum(shard.file_bytes for shard in chosen)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=quiet) as progress:
        for shard, found in zip(chosen, ordered_map(fault, tasks, max(1, min(workers, len(tasks)))), strict=True):
            progress.update(shard.file_bytes)
            if found:
                yield shard.name, found
    for name in extra_files(folder, manifest, splits):
        yield name, "lies in the folder but not in the manifest; delete it"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenizer.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "corpus", type=Path, metavar="CORPUS", help="folder written by tokenizer.encode or tokenizer.merge"
    )
    parser.add_argument(
        "--split", action="append", default=[], metavar="S", help="read this split only; may be repeated (default: all)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="K",
        help="processes; each reads a shard at a time (default here: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for each fault and a summary; the number of faults. Raises DataError."""
    if arguments.workers < 1:
        raise DataError(f"--workers {arguments.workers}: give at least 1")
    started, named = time.monotonic(), []
    for name, found in verify(arguments.corpus, arguments.split, arguments.workers, arguments.quiet):
        named.append(name)
        tqdm.write(f"{name}: {found}")
    shards = chosen_shards(Manifest.load(arguments.corpus), arguments.split)
    size, seconds = sum(shard.file_bytes for shard in shards), time.monotonic() - started
    counts = [f"{sum(getattr(shard, unit) for shard in shards):,} {unit}" for unit in ("documents", "tokens")]
    bad_shards = not {shard.name for shard in shards}.isdisjoint(named)
    verdict = f"{len(named)} FAULTS{f': {MEND_SHARD}' if bad_shards else ''}" if named else "no fault"
    print(
        f"{arguments.corpus}: {len(shards)} shards, {', '.join(counts)}, {size / 1e6:,.1f} MB in {seconds:.1f} s: {verdict}"
    )
    return len(named)


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        return 1 if run(arguments) else 0
    except DataError as error:
        print(f"tokenizer.verify: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        print(f"tokenizer.verify: cannot read{place} ({error.strerror or error}); mend that", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
