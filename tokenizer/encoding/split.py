"""What becomes of each document: training, validation, or left out and why.

Arrays hold one entry a document, in the order of the corpus: files by name, documents by place. Of a billion documents
the arguments take 16 GB (24 with the keys of the texts), the result 1 GB, and the work between at most 16 more.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.manifest import DataError
from tokenizer.corpus import KINDS, TRAIN, VALIDATION, Selection
from tokenizer.encoding.scan import EMPTY, NOT_UNICODE

FATES = (TRAIN, VALIDATION, "empty", "not_unicode", "too_short", "too_long", "id_seen", "text_seen")
IS_TRAIN, IS_VALIDATION, IS_EMPTY, IS_NOT_UNICODE, TOO_SHORT, TOO_LONG, ID_SEEN, TEXT_SEEN = range(len(FATES))
PARTS, PART_SHIFT = 32, 3  # documents are sorted in as many parts, by the highest bits of a byte of their keys
REASONS = {
    "empty": "empty documents",
    "not_unicode": "documents with half of a surrogate pair, which UTF-8 cannot hold,",
    "too_short": "documents of fewer than --min-bytes",
    "too_long": "documents of more than --max-bytes",
    "id_seen": "documents with the id of an earlier one (--deduplicate off keeps them)",
    "text_seen": "documents with the text of an earlier one",
}


def decide(
    text_bytes: NDArray[np.int64],
    id_keys: NDArray[np.int64],
    text_keys: NDArray[np.int64] | None,
    first_held: int | None,
    selection: Selection,
) -> NDArray[np.uint8]:
    """The number in FATES of every document.

    text_keys: needed only to deduplicate by text. first_held: the number of the first document of --validation-input,
    None without such files. Raises DataError where a split would be empty, and what `hold_out` raises.
    """
    fates = np.zeros(len(text_bytes), np.uint8)
    if selection.max_bytes is not None:
        fates[text_bytes > selection.max_bytes] = TOO_LONG
    fates[text_bytes < selection.min_bytes] = TOO_SHORT
    fates[text_bytes == EMPTY] = IS_EMPTY
    fates[text_bytes == NOT_UNICODE] = IS_NOT_UNICODE
    if selection.deduplicate != "off":
        mark_repeated(fates, id_keys, ID_SEEN)
    if selection.deduplicate == "text" and text_keys is not None:
        mark_repeated(fates, text_keys, TEXT_SEEN)
    if first_held is not None:
        later = fates[first_held:]
        later[later == IS_TRAIN] = IS_VALIDATION
        for fate, option in ((IS_TRAIN, "--input"), (IS_VALIDATION, "--validation-input")):
            if not (fates == fate).any():
                raise DataError(
                    f"every document of {option} is {left_out_words(fates)}; give {KINDS} with text in them"
                )
    elif selection.fraction is not None:
        fates[hold_out(fates == IS_TRAIN, text_bytes, id_keys, selection.fraction, fates)] = IS_VALIDATION
    return fates


def mark_repeated(fates: NDArray[np.uint8], keys: NDArray[np.int64], fate: int) -> None:
    """Gives the documents that are still kept, and have the key of an earlier such one, a fate.

    Goes through the keys by their highest bits, so that little is sorted at a time.
    """
    parts = keys.view(np.uint8)[7::8] >> PART_SHIFT
    for part in range(PARTS):
        chosen = np.flatnonzero((parts == part) & (fates == IS_TRAIN))
        order = np.argsort(keys[chosen], kind="stable")
        ordered = keys[chosen[order]]
        fates[chosen[order[1:]][ordered[1:] == ordered[:-1]]] = fate


def hold_out(
    kept: NDArray[np.bool_],
    text_bytes: NDArray[np.int64],
    id_keys: NDArray[np.int64],
    fraction: float,
    fates: NDArray[np.uint8],
) -> NDArray[np.int64]:
    """Numbers of the validation documents among those that are kept.

    Documents are taken in the order of the sha256 of their id until they hold `fraction` of all bytes: at least one,
    and at least one is left. Another document added to the corpus so moves few from one split to the other. Raises
    DataError for fewer than two documents.
    """
    count = int(kept.sum())
    if not count:
        raise DataError(f"every document is {left_out_words(fates)}; give {KINDS} with text in them")
    if fraction == 0:
        return np.zeros(0, np.int64)
    if count < 2:
        raise DataError(
            "one document cannot be split into training and validation; give more files, cut this one with "
            "--document-separator, or hold nothing out with --validation-fraction 0"
        )
    parts = id_keys.view(np.uint8)[0::8] >> PART_SHIFT  # keys are the beginning of the digest, little-endian
    target = fraction * int(text_bytes[kept].sum())
    held: list[NDArray[np.int64]] = []
    taken = missing = 0
    for part in range(PARTS):
        chosen = np.flatnonzero((parts == part) & kept)
        chosen = chosen[np.argsort(id_keys[chosen].byteswap().view(np.uint64), kind="stable")]
        reached = taken + np.cumsum(text_bytes[chosen])
        missing = int(np.searchsorted(reached, target)) + 1
        held.append(chosen[:missing])
        taken = int(reached[-1]) if len(chosen) else taken
        if missing <= len(chosen):
            break
    numbers = np.concatenate(held)
    return numbers[: count - 1]


def left_out_words(fates: NDArray[np.uint8]) -> str:
    """Why nothing is left, in a word or two."""
    only_empty = not ((fates > IS_VALIDATION) & (fates != IS_EMPTY)).any()
    return "empty" if only_empty else "empty or left out by the options"


def counts_of(fates: NDArray[np.uint8]) -> dict[str, int]:
    """How many documents have each fate."""
    return dict(zip(FATES, np.bincount(fates, minlength=len(FATES)).tolist(), strict=True))


def left_out_lines(counts: Mapping[str, int]) -> list[str]:
    """A sentence for every kind of documents that are left out."""
    return [f"{counts[name]} {words} are left out" for name, words in REASONS.items() if counts.get(name)]
