"""The plan of an encoding: which documents each shard holds. A pure function of the scans and the options.

WORK/plan/fates.npy holds a byte a document (`split.FATES`), WORK/plan/plan.json, written last, the rest. A shard is a
range of documents of the corpus; of those it holds the ones of its split.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.manifest import DataError
from tokenizer.atomic import open_atomically
from tokenizer.corpus import TRAIN, VALIDATION, Selection
from tokenizer.encoding.scan import Stamp, read_scan
from tokenizer.encoding.split import FATES, counts_of, decide
from tokenizer.readers.entry import Position

PLAN_NAME, FATES_NAME = "plan.json", "fates.npy"


class ShardPlan(NamedTuple):
    """The documents first..stop of the corpus that are of `split` become shard NAME; the first lies at `row`, `place`.

    documents, text_bytes: of those.
    """

    name: str
    split: str
    first: int
    stop: int
    row: int
    place: int
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class Plan:
    """stamps, sha256: of the input files. first_documents: the number of each file's first one, and how many in all.

    counts: how many documents have each fate.
    """

    stamps: tuple[Stamp, ...]
    sha256: tuple[str, ...]
    first_documents: tuple[int, ...]
    shards: tuple[ShardPlan, ...]
    counts: dict[str, int]

    @property
    def text_bytes(self) -> int:
        """Of all shards."""
        return sum(shard.text_bytes for shard in self.shards)


class Corpus(NamedTuple):
    """All scans together: arrays of one entry a document, and what is known of the files."""

    sha256: tuple[str, ...]
    first_documents: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    id_keys: NDArray[np.int64]
    text_keys: NDArray[np.int64] | None

    def fates(self, held_out: Sequence[bool], selection: Selection) -> NDArray[np.uint8]:
        """What becomes of each document, uint8 [documents]. held_out: of each file. Raises DataError."""
        held = held_out.index(True) if True in held_out else None
        first = None if held is None else int(self.first_documents[held])
        return decide(self.text_bytes, self.id_keys, self.text_keys, first, selection)


def gather(scans: Sequence[Path], with_text_keys: bool) -> Corpus:
    """Reads the scans of all files, in order. Raises DataError for a damaged one."""
    documents = np.concatenate([read_scan(path, "documents") for path in scans])
    sha256 = [digest for path in scans for digest in read_scan(path, "sha256").tolist()]
    first_documents = np.concatenate([np.zeros(1, np.int64), np.cumsum(documents)])
    names = ("text_bytes", "id_keys", "text_keys") if with_text_keys else ("text_bytes", "id_keys")
    arrays = [np.empty(int(first_documents[-1]), np.int64) for _ in names]
    filled = 0
    for path in scans:
        for name, array in zip(names, arrays, strict=True):
            part = read_scan(path, name)
            array[filled : filled + len(part)] = part
        filled += len(part)
    return Corpus(tuple(sha256), first_documents, arrays[0], arrays[1], arrays[2] if with_text_keys else None)


def make_plan(
    stamps: Sequence[Stamp],
    held_out: Sequence[bool],
    scans: Sequence[Path],
    groups: Sequence[range],
    selection: Selection,
    shard_bytes: int,
) -> tuple[Plan, NDArray[np.uint8]]:
    """The plan, and the fate of every document. scans: a file for each of the groups of input files.

    Raises DataError where a split would be empty or a scan is damaged.
    """
    corpus = gather(scans, selection.deduplicate == "text")
    fates = corpus.fates(held_out, selection)
    cuts = [
        (f"{split}-{number:06d}.tar", split, *cut)
        for split in (TRAIN, VALIDATION)
        for number, cut in enumerate(cut_shards(np.flatnonzero(fates == FATES.index(split)), corpus, shard_bytes))
    ]
    positions = find_positions([first for _, _, first, *_ in cuts], corpus.first_documents, scans, groups)
    shards = [
        ShardPlan(name, split, first, stop, *positions[first], documents, text_bytes)
        for name, split, first, stop, documents, text_bytes in cuts
    ]
    firsts = tuple(corpus.first_documents.tolist())
    return Plan(tuple(stamps), corpus.sha256, firsts, tuple(shards), counts_of(fates)), fates


def cut_shards(numbers: NDArray[np.int64], corpus: Corpus, shard_bytes: int) -> Iterable[tuple[int, int, int, int]]:
    """Cuts the documents of a split into shards: first, stop, documents and bytes of each.

    A shard holds at most `shard_bytes` of text, unless a single document is longer.
    """
    ends = corpus.text_bytes[numbers]
    np.cumsum(ends, out=ends)  # in place: these are the largest arrays of the plan
    start = written = 0
    while start < len(numbers):
        stop = max(int(np.searchsorted(ends, written + shard_bytes, side="right")), start + 1)
        total = int(ends[stop - 1])
        yield int(numbers[start]), int(numbers[stop - 1]) + 1, stop - start, total - written
        start, written = stop, total


def find_positions(
    documents: Sequence[int], first_documents: NDArray[np.int64], scans: Sequence[Path], groups: Sequence[range]
) -> dict[int, Position]:
    """Where documents lie in their files, by their numbers; each scan is opened once."""
    positions: dict[int, Position] = {}
    group_starts = first_documents[[group.start for group in groups]]
    places, opened = np.zeros(0, np.int64), -1
    for document in sorted(set(documents)):
        group = int(np.searchsorted(group_starts, document, side="right")) - 1
        if group != opened:
            places, opened = read_scan(scans[group], "places"), group
        file = int(np.searchsorted(first_documents, document, side="right")) - 1
        place = int(places[document - group_starts[group]])
        positions[document] = Position(document - int(first_documents[file]), place)
    return positions


def save_plan(folder: Path, plan: Plan, fates: NDArray[np.uint8]) -> None:
    """Writes both files, plan.json last. Raises OSError."""
    with open_atomically(folder / FATES_NAME) as file:
        np.save(file, fates)
    with open_atomically(folder / PLAN_NAME) as file:
        file.write(json.dumps(vars(plan)).encode())


def load_plan(folder: Path) -> Plan | None:
    """The plan of an encoding, None before it is made. Raises DataError where it is damaged."""
    path = folder / PLAN_NAME
    try:
        fields = json.loads(path.read_bytes())
        return Plan(
            tuple(Stamp(*stamp) for stamp in fields["stamps"]),
            tuple(fields["sha256"]),
            tuple(fields["first_documents"]),
            tuple(ShardPlan(*shard) for shard in fields["shards"]),
            fields["counts"],
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it, and run the command again") from None
