"""Where a long text may be cut so that its parts give the ids of the whole; tokenizers' memory grows with one call.

Each function takes a text and a position, and gives the first place from there on where a cut changes no id, or -1.
"""

import unicodedata
from collections.abc import Callable, Iterable
from functools import partial

SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character

NextCut = Callable[[str, int], int]


def never(text: str, at: int) -> int:
    """For tokenizers that are not understood well enough: no cut."""
    return -1


def between_pieces(pieces: Iterable[str], known_only: bool) -> NextCut:
    """Cuts for tokenizers without a pre-tokenizer: between two characters that stand side by side in no piece.

    No piece spans such a place, nor does anything it is merged from, so both sides are segmented on their own.
    known_only: unknown characters share one id with unknown neighbours, so a cut comes after a known character.
    """
    pieces = [piece.replace(SPACE_MARK, " ") for piece in pieces]
    pairs = frozenset(piece[place : place + 2] for piece in pieces for place in range(len(piece) - 1))
    known = frozenset(piece for piece in pieces if len(piece) == 1) if known_only else None
    return partial(_between_pieces, pairs, known)


def _between_pieces(pairs: frozenset[str], known: frozenset[str] | None, text: str, at: int) -> int:
    for place in range(max(1, at), len(text)):
        pair = text[place - 1 : place + 1].replace(SPACE_MARK, " ")
        if pair not in pairs and (known is None or pair[0] in known):
            return place
    return -1


def after_lines(text: str, at: int) -> int:
    """Cuts for the byte-level pre-tokenizers of GPT-2, Llama 3, Qwen, DeepSeek and o200k: after a newline between words.

    Before the newline stands a letter, number, mark or sign, after it a letter. All their patterns end a part there,
    and none looks further than the newline or the letter to do so. (With white space before the newline it matters
    what comes behind it: "\\n\\n" at the end of a text is one part, before a letter it is two.) Unicode's canonical
    normalisation changes nothing across a newline.
    """
    newline = text.find("\n", max(1, at - 1))
    while 0 <= newline < len(text) - 1:
        before = unicodedata.category(text[newline - 1])[0]
        if before in "LNPS" and text[newline + 1].isalpha():
            return newline + 1
        newline = text.find("\n", newline + 1)
    return -1
