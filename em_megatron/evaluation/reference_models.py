"""What a language model must beat: two models without a network, fitted and scored on the same shards.

    train split       ->  counts   ->  model
    validation split  ->  bits of every token (or byte) and of every document's end  /  bytes of text

Both are charged for what a language model is charged for: the whole text of every held-out document and its end,
never its beginning. So the figures compare directly with the `bits_per_byte` of `evaluation.perplexity`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.manifest import DataError, Manifest
from em_megatron.data.shards import ShardReader
from em_megatron.data.vocabulary import Vocabulary, find_tokenizer

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

SYMBOLS = 257  # the bytes, and BOUNDARY before a document (only as context) and at its end (predicted)
BOUNDARY = 256
MAX_ORDER = 6  # 257**7 is the largest power that an int64 holds
BYTES_COUNTED_AT_ONCE = 16 << 20


def reference_bits_per_byte(corpus_path: Path) -> dict[str, float]:
    """Bits per byte of held-out text: {"unigram_tokens": ..., "byte_order_2": ...}.

    corpus_path: a folder written by `tokenizer.encode`. One pass over its text, some seconds per 10 MB; memory grows
    with the number of different byte triples, not with the text.

    Raises:
        DataError: the corpus is missing, damaged, or has no held-out text.
    """
    manifest = Manifest.load(corpus_path)
    vocabulary = Vocabulary(find_tokenizer(Path(corpus_path)))
    manifest.check_tokenizer(vocabulary)
    train, held_out = ShardReader(corpus_path, "train"), ShardReader(corpus_path, "validation")
    return {
        "unigram_tokens": unigram_bits_per_byte(
            token_counts(train, vocabulary.size), token_counts(held_out, vocabulary.size), vocabulary.token_bytes
        ),
        "byte_order_2": byte_model_bits_per_byte(texts(train, vocabulary), texts(held_out, vocabulary), order=2),
    }


def token_counts(reader: ShardReader, vocab_size: int) -> Integers:
    """How often each id is a label in a split, [vocab_size]: every stored id but the bos of each document."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for document in range(len(reader)):
        counts += np.bincount(reader.tokens(document, 1), minlength=vocab_size)
    return counts


def texts(reader: ShardReader, vocabulary: Vocabulary) -> Iterator[bytes]:
    """The UTF-8 text of every document of a split."""
    for document in range(len(reader)):
        yield vocabulary.decode_bytes(reader.tokens(document).tolist())


def unigram_bits_per_byte(train_counts: Integers, held_out_counts: Integers, token_bytes: NDArray[np.int32]) -> float:
    """Cross-entropy of held-out tokens under the train split's token frequencies, in bits per byte of their text.

    With n_i occurrences of id i in the train split and vocabulary size V, p_i = (n_i + 1) / (Σ n + V).

    Args:
        train_counts, held_out_counts: [V] occurrences of each id, eos included and bos not.
        token_bytes: [V] bytes of text each id stands for (0 for eos).

    Raises:
        DataError: no held-out text.
    """
    bits = math.log2(train_counts.sum() + len(train_counts)) - np.log2(train_counts + 1)
    return _per_byte(float(held_out_counts @ bits), int(held_out_counts @ token_bytes))


def byte_model_bits_per_byte(train: Iterable[bytes], held_out: Iterable[bytes], order: int = 2) -> float:
    """Bits per byte of the held-out documents under a `ByteModel` of the train documents.

    Raises:
        DataError: no held-out text.
        ValueError: an order outside 0..MAX_ORDER.
    """
    model = ByteModel(train, order)
    bits, text_bytes = 0.0, 0
    for document in held_out:
        bits -= float(np.log2(model.probability(windows(document, order))).sum())
        text_bytes += len(document)
    return _per_byte(bits, text_bytes)


def _per_byte(bits: float, text_bytes: int) -> float:
    if text_bytes == 0:
        raise DataError("the held-out documents hold no text, so there are no bits per byte; hold out more documents")
    return bits / text_bytes


class NGrams(NamedTuple):
    """The n-grams of one length that occur, as numbers in base SYMBOLS, and the contexts they follow; all sorted.

    codes, counts: [n-grams]. contexts: [contexts] an n-gram without its last symbol; totals, kinds: [contexts]
    occurrences of the context, and how many different symbols followed it.
    """

    codes: Integers
    counts: Integers
    contexts: Integers
    totals: Integers
    kinds: Integers


class ByteModel:
    """Each byte given the `order` bytes before it, every order interpolated with the one below.

    Witten-Bell smoothing (method C of Witten and Bell 1991, "The zero-frequency problem"): where context h occurred
    N(h) times and was followed by T(h) different symbols,

        p(c | h) = (n(h c) + T(h) · p(c | h without its first symbol)) / (N(h) + T(h)),

    and a context that never occurred leaves it to the shorter one. Below order 0 all 257 symbols are equally likely,
    so the probabilities of every context sum to 1 and none is 0. On English plays, order 2, interpolated Kneser-Ney
    smoothing with its best discount scores 0.3 % fewer bits; the choice of smoothing decides nothing here.
    """

    def __init__(self, documents: Iterable[bytes], order: int) -> None:
        if not 0 <= order <= MAX_ORDER:
            raise ValueError(f"the byte model's order is {order}; give 0 to {MAX_ORDER}")
        self.order = order
        empty = np.zeros(0, dtype=np.int64)
        counted = [(empty, empty)] * (order + 1)
        for batch in _batches(documents, order):
            for level in range(order + 1):
                codes, counts = np.unique(_codes(batch, level), return_counts=True)
                counted[level] = _merge(counted[level], (codes, counts))
        self.levels = [_with_contexts(codes, counts) for codes, counts in counted]

    def probability(self, rows: NDArray[np.int16]) -> Floats:
        """p(last symbol | those before it) for rows of `windows`, [n, order + 1] -> [n]."""
        p = np.full(len(rows), 1 / SYMBOLS)
        for level, grams in enumerate(self.levels):
            codes = _codes(rows, level)
            found = _look_up(grams.codes, codes, grams.counts)
            total = _look_up(grams.contexts, codes // SYMBOLS, grams.totals)
            kinds = _look_up(grams.contexts, codes // SYMBOLS, grams.kinds)
            p = np.where(total > 0, (found + kinds * p) / np.maximum(total + kinds, 1), p)
        return p


def windows(document: bytes, order: int) -> NDArray[np.int16]:
    """For every byte of a document and its end: the `order` symbols before it, then itself; [bytes + 1, order + 1]."""
    symbols = np.full(order + len(document) + 1, BOUNDARY, dtype=np.int16)
    symbols[order:-1] = np.frombuffer(document, dtype=np.uint8)
    return np.lib.stride_tricks.sliding_window_view(symbols, order + 1)


def _batches(documents: Iterable[bytes], order: int) -> Iterator[NDArray[np.int16]]:
    """The windows of many documents at once: counting short ones singly would cost more than the counting."""
    waiting: list[bytes] = []
    size = 0
    for document in documents:
        waiting.append(document)
        size += len(document)
        if size >= BYTES_COUNTED_AT_ONCE:
            yield np.concatenate([windows(text, order) for text in waiting])
            waiting, size = [], 0
    if waiting:
        yield np.concatenate([windows(text, order) for text in waiting])


def _codes(rows: NDArray[np.int16], level: int) -> Integers:
    """The last level + 1 symbols of each row as one number in base SYMBOLS, [n, order + 1] -> [n]."""
    codes = np.zeros(len(rows), dtype=np.int64)
    for column in range(rows.shape[1] - level - 1, rows.shape[1]):
        codes = codes * SYMBOLS + rows[:, column]
    return codes


def _merge(first: tuple[Integers, Integers], second: tuple[Integers, Integers]) -> tuple[Integers, Integers]:
    """(codes, counts) of two batches together."""
    codes, where = np.unique(np.concatenate([first[0], second[0]]), return_inverse=True)
    counts = np.zeros(len(codes), dtype=np.int64)
    np.add.at(counts, where, np.concatenate([first[1], second[1]]))
    return codes, counts


def _with_contexts(codes: Integers, counts: Integers) -> NGrams:
    contexts, firsts, kinds = np.unique(codes // SYMBOLS, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, firsts) if len(firsts) else np.zeros(0, dtype=np.int64)
    return NGrams(codes, counts, contexts, totals, kinds)


def _look_up(keys: Integers, wanted: Integers, values: Integers) -> Integers:
    """values[i] where wanted == keys[i] (sorted), else 0; [n]."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
