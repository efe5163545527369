"""Makes one corpus of several that were encoded with the same tokenizer.

    python -m tokenizer.merge merged corpus-a corpus-b

The shards are numbered anew, those of the first corpus first, and are hard links to the old ones, so that the merged
corpus takes no room; they are copied where a link cannot be made, or with --copy. A run reads a merged corpus as one,
its documents in one order; to read corpora in proportions of your own choice leave them as they are and give them to
the run as a blend.

A document whose id is in two of the corpora is an error (the ids are compared by 64 bits of their sha256). The manifest
is written last: a folder without it is unfinished, and the same command goes on where it was.
"""

import argparse
import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from em_megatron.data.index import KEY, index_bytes, index_name, open_index
from em_megatron.data.manifest import MANIFEST_NAME, DataError, Manifest, Shard, file_sha256
from em_megatron.data.vocabulary import Vocabulary, find_tokenizer
from em_megatron.data.writing import read_names
from tokenizer.atomic import open_atomically, write_atomically

SHOWN_NAMES = 5
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
COPIED_AT_ONCE = 16 << 20


class Part(NamedTuple):
    """One of the corpora to merge."""

    folder: Path
    manifest: Manifest

    @property
    def shards(self) -> list[Shard]:
        return [shard for split in self.manifest.splits.values() for shard in split]


class File(NamedTuple):
    """A file to link or copy."""

    origin: Path
    target: Path
    size: int
    sha256: str


def open_parts(folders: Sequence[Path]) -> list[Part]:
    """The corpora, which fit together and whose files are all there. Raises DataError."""
    parts = [Part(folder, Manifest.load(folder)) for folder in folders]
    first = parts[0]
    for part in parts[1:]:
        if part.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
            raise DataError(
                f"{part.folder} was encoded with another tokenizer than {first.folder}: encode one of them again with the "
                "tokenizer of the other"
            )
        if part.manifest.dtype != first.manifest.dtype:
            raise DataError(
                f"{part.folder} stores ids as {part.manifest.dtype} and {first.folder} as {first.manifest.dtype}: encode one "
                "of them again"
            )
    for part in parts:
        for shard in part.shards:
            for name, size in ((shard.name, shard.file_bytes), (index_name(shard.name), index_bytes(shard.documents))):
                path = part.folder / name
                if not path.is_file() or path.stat().st_size != size:
                    raise DataError(
                        f"shard file {path} is missing or has another size than its manifest says: tokenizer.verify "
                        f"{part.folder} shows what to fetch again"
                    )
    return parts


def document_keys(part: Part) -> NDArray[np.int64]:
    """The keys of all documents, each once, sorted."""
    indexes = [open_index(part.folder / index_name(shard.name), shard)[:, KEY] for shard in part.shards]
    return np.unique(np.concatenate(indexes)) if indexes else np.zeros(0, np.int64)


def check_no_common_documents(parts: Sequence[Part]) -> None:
    """Raises DataError, with some of the names, where a document is in two corpora. Takes 16 bytes a document."""
    keys = np.concatenate([document_keys(part) for part in parts])
    keys.sort()
    common = np.unique(keys[1:][keys[1:] == keys[:-1]])
    if len(common):
        names = ", ".join(_names(parts, common))
        raise DataError(
            f"{len(common)} documents are in two of the corpora, such as {names}: encode one of them without these, or merge "
            "all the same with --allow-duplicates"
        )


def _names(parts: Sequence[Part], keys: NDArray[np.int64]) -> list[str]:
    """The names of the first documents with one of these keys, in the order of the corpora."""
    found: dict[int, str] = {}
    for part in parts:
        for shard in part.shards:
            column = open_index(part.folder / index_name(shard.name), shard)[:, KEY]
            rows = np.flatnonzero(np.isin(column, keys))
            if len(rows):
                names = read_names(part.folder / shard.name)
                for row in rows.tolist():
                    found.setdefault(int(column[row]), names[row])
            if len(found) >= SHOWN_NAMES:
                return list(found.values())[:SHOWN_NAMES]
    return list(found.values())


def merged_manifest(parts: Sequence[Part]) -> tuple[Manifest, list[tuple[Part, Shard, Shard]]]:
    """What the merged corpus will be, and of each shard where it lies, what it was and what it becomes."""
    moves: list[tuple[Part, Shard, Shard]] = []
    splits: dict[str, tuple[Shard, ...]] = {}
    for split in dict.fromkeys(split for part in parts for split in part.manifest.splits):
        old = [(part, shard) for part in parts for shard in part.manifest.splits.get(split, ())]
        new = [replace(shard, name=f"{split}-{number:06d}.tar") for number, (_, shard) in enumerate(old)]
        splits[split] = tuple(new)
        moves += [(part, shard, renamed) for (part, shard), renamed in zip(old, new, strict=True)]
    source = hashlib.sha256(json.dumps([part.manifest.identity for part in parts]).encode()).hexdigest()
    first = parts[0].manifest
    return Manifest(first.tokenizer_sha256, first.vocab_size, first.dtype, source, splits), moves


def files_of(moves: Iterable[tuple[Part, Shard, Shard]], output: Path) -> list[File]:
    """Tars and indexes, an index before its tar."""
    found = []
    for part, old, new in moves:
        for name, target, size, sha256 in (
            (index_name(old.name), index_name(new.name), index_bytes(old.documents), old.index_sha256),
            (old.name, new.name, old.file_bytes, old.sha256),
        ):
            found.append(File((part.folder / name).resolve(), output / target, size, sha256))
    return found


def place(file: File, copy: bool) -> None:
    """Links or copies a file, unless it is there. Raises DataError for one that was altered, or OSError."""
    if file.target.exists():
        same = os.path.samefile(file.origin, file.target)
        if same and not copy:
            return
        if not same and file.target.stat().st_size == file.size and file_sha256(file.target) == file.sha256:
            return
        file.target.unlink()
    if not copy:
        try:
            os.link(file.origin, file.target)
            return
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
    digest = hashlib.sha256()
    with open(file.origin, "rb") as origin, open_atomically(file.target) as target:
        while content := origin.read(COPIED_AT_ONCE):
            digest.update(content)
            target.write(content)
        if digest.hexdigest() != file.sha256:
            raise DataError(f"{file.origin} was altered: it has another sha256 than its manifest says; fetch it again")


def prepare_output(output: Path, wanted: Manifest, parts: Sequence[Part], targets: set[str]) -> bool:
    """True where the folder already is the wanted corpus; else makes it ready. Raises DataError for any other content."""
    if any(output.resolve() == part.folder.resolve() for part in parts):
        raise DataError(f"{output} is one of the corpora to merge: give another folder for the output")
    if (output / MANIFEST_NAME).exists():
        found = Manifest.load(output)
        if found.identity == wanted.identity:
            return True
        raise DataError(f"{output} holds another corpus: give another folder, or remove it")
    output.mkdir(parents=True, exist_ok=True)
    for path in sorted(output.iterdir()):
        if path.name.endswith(".partial"):
            path.unlink()
        elif path.name not in targets:
            raise DataError(
                f"{output} holds {path.name}, which this merge does not make: give another folder, or remove it"
            )
    return False


def merge(arguments: argparse.Namespace) -> tuple[Manifest, bool]:
    """Merges corpora; returns the manifest and whether it was already there. Raises DataError."""
    output: Path = arguments.output
    parts = open_parts(arguments.corpora)
    vocabulary = Vocabulary(find_tokenizer(parts[0].folder))
    parts[0].manifest.check_tokenizer(vocabulary)
    manifest, moves = merged_manifest(parts)
    files = files_of(moves, output)
    if prepare_output(output, manifest, parts, {vocabulary.file_name, *(file.target.name for file in files)}):
        return manifest, True
    if not arguments.allow_duplicates:
        check_no_common_documents(parts)
    total = sum(file.size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=arguments.quiet) as progress:
        for file in files:
            place(file, arguments.copy)
            progress.update(file.size)
    write_atomically(output / vocabulary.file_name, vocabulary.serialized)
    manifest.save(output)
    return manifest, False


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenizer.merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder of the merged corpus")
    parser.add_argument("corpora", type=Path, nargs="+", metavar="CORPUS", help="folders to merge, in this order")
    parser.add_argument(
        "--copy", action="store_true", help="copy the shards, and compare their sha256, instead of linking"
    )
    parser.add_argument(
        "--allow-duplicates", action="store_true", help="merge corpora although some documents are in two of them"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        manifest, reused = merge(arguments)
    except (DataError, OSError) as error:
        print(f"tokenizer.merge: {error}", file=sys.stderr)
        return 2
    if reused:
        print(f"{arguments.output} already holds this corpus; nothing to do")
    for split, shards in manifest.splits.items():
        documents, tokens = (sum(getattr(shard, unit) for shard in shards) for unit in ("documents", "tokens"))
        print(f"{split}: {documents:,} documents, {tokens:,} tokens, {len(shards)} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
