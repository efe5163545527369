"""The texts that a tokenizer learns from: all training documents of a corpus, or a sample that is read alone."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from em_megatron.data.index import document_key
from em_megatron.data.manifest import DataError
from tokenizer.corpus import InputFile, Selection
from tokenizer.encoding.scan import document_id, scan_files
from tokenizer.encoding.split import IS_TRAIN, IS_VALIDATION, decide
from tokenizer.readers.files import Layout, read_documents

SAMPLED_FILES = 256  # at least, where there are as many


class TextSource(NamedTuple):
    """read: gives the texts, from the beginning each time. words: what they are, for people."""

    read: Callable[[], Iterator[str]]
    words: str


def all_texts(files: Sequence[InputFile], layout: Layout, selection: Selection) -> TextSource:
    """The texts of all training documents, after one reading that finds out which those are.

    Raises DataError for a file that cannot be read, or where a split would be empty.
    """
    scan = scan_files(files, layout)
    firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(scan.documents)])
    held = next((int(first) for file, first in zip(files, firsts, strict=False) if file.held_out), None)
    fates = decide(scan.text_bytes, scan.id_keys, scan.text_keys, held, selection)

    def read() -> Iterator[str]:
        for file, first, stop in zip(files, firsts, firsts[1:], strict=False):
            wanted = fates[first:stop] == IS_TRAIN
            if wanted.any():
                for entry in read_documents(file.path, layout, wanted=wanted):
                    yield entry.text or ""

    return TextSource(read, f"{int((fates == IS_VALIDATION).sum())} documents held out")


def sampled_texts(
    files: Sequence[InputFile], layout: Layout, selection: Selection, sample_bytes: int, seed: int
) -> TextSource:
    """Training texts of about `sample_bytes`, from the beginnings of files in an order that the seed draws.

    Where a share of all documents is held out, only documents are taken whose id has a sha256 in the upper half. Held
    out are those with the lowest; they reach this half only where a few documents hold most of the text. The same
    arguments give the same texts. Raises DataError where there is none.
    """
    available = [file for file in files if not file.held_out]
    drawn = sorted(available, key=lambda file: hashlib.sha256(f"{seed}:{file.name}".encode()).digest())
    sizes = [file.path.stat().st_size for file in drawn]
    needed = next((n for n, total in enumerate(itertools.accumulate(sizes), 1) if total >= sample_bytes), len(drawn))
    count = max(needed, min(SAMPLED_FILES, len(drawn)))
    share = even_share(sizes[:count], sample_bytes)

    def read() -> Iterator[str]:
        for file in drawn[:count]:
            taken = 0
            for entry in read_documents(file.path, layout):
                size = len((entry.text or "").encode("utf-8", "replace"))
                if entry.text and fits(size, selection) and in_sample(document_id(file, layout, entry), selection):
                    yield entry.text.encode("utf-8", "replace").decode()
                    taken += size
                    if taken >= share:
                        break

    if next(read(), None) is None:
        raise DataError("--sample-bytes finds no training document; give more, or leave it out to read all")
    return TextSource(read, f"a sample of {count} of {len(available)} files")


def even_share(sizes: Sequence[int], total: int) -> int:
    """The number L for which the sum of min(size, L) is about `total`: what each file gives, or all it has."""
    left = total
    for number, size in enumerate(sorted(sizes)):
        share = -(-left // (len(sizes) - number))
        if size >= share:
            return share
        left -= size
    return max(sizes, default=0)


def fits(size: int, selection: Selection) -> bool:
    return size >= selection.min_bytes and (selection.max_bytes is None or size <= selection.max_bytes)


def in_sample(identifier: str, selection: Selection) -> bool:
    """Whether a document is far from those that are held out."""
    first_byte = document_key(identifier) & 0xFF  # of the sha256
    return not selection.fraction or first_byte >= 128
