"""The reference models against sums done by hand, and against a plain dictionary implementation."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from em_megatron.data.manifest import DataError
from em_megatron.data.shards import ShardReader
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.evaluation import reference_models
from em_megatron.evaluation.reference_models import (
    BOUNDARY,
    SYMBOLS,
    ByteModel,
    byte_model_bits_per_byte,
    reference_bits_per_byte,
    unigram_bits_per_byte,
    windows,
)
from tokenizer import encode, train

EXACT = {"rel": 1e-12}  # the same few operations in fp64, in another order


def plain_probability(documents: list[bytes], history: tuple[int, ...], symbol: int) -> float:
    """Witten-Bell interpolation written down from its definition."""
    if not history:
        return plain_order_0(documents, symbol)
    lower = plain_probability(documents, history[1:], symbol)
    followers: Counter[int] = Counter()
    for document in documents:
        symbols = [BOUNDARY] * len(history) + list(document) + [BOUNDARY]
        for at in range(len(history), len(symbols)):
            if tuple(symbols[at - len(history) : at]) == history:
                followers[symbols[at]] += 1
    if not followers:
        return lower
    return (followers[symbol] + len(followers) * lower) / (followers.total() + len(followers))


def plain_order_0(documents: list[bytes], symbol: int) -> float:
    counts = Counter(symbol for document in documents for symbol in [*document, BOUNDARY])
    return (counts[symbol] + len(counts) / SYMBOLS) / (counts.total() + len(counts))


def next_symbol(model: ByteModel, history: tuple[int, ...]) -> np.ndarray:
    """The distribution after a history of `order` symbols, [257]."""
    rows = np.array([[*history, symbol] for symbol in range(SYMBOLS)], dtype=np.int16)
    return model.probability(rows)


def test_unigram_by_hand():
    # Ids: 0 "ab" (2 bytes), 1 "c" (1 byte), 2 eos. Train: 0 0 0 1 2, so p = 4/8, 2/8, 2/8. Held out: 0 1 1 2.
    found = unigram_bits_per_byte(np.array([3, 1, 1]), np.array([1, 2, 1]), np.array([2, 1, 0], dtype=np.int32))
    assert found == pytest.approx((1 + 2 + 2 + 2) / 4, **EXACT)


def test_byte_model_by_hand():
    # Train "ab": order 0 sees a, b and the end once each; order 1 sees each of their contexts once.
    order_0 = (1 + 3 / 257) / 6
    assert byte_model_bits_per_byte([b"ab"], [b"ab"], order=0) == pytest.approx(-3 * math.log2(order_0) / 2, **EXACT)
    seen, unseen = (1 + order_0) / 2, order_0 / 2
    assert byte_model_bits_per_byte([b"ab"], [b"ab"], order=1) == pytest.approx(-3 * math.log2(seen) / 2, **EXACT)
    expected = -math.log2(unseen) - math.log2(seen)  # b never began a document, but it did end one
    assert byte_model_bits_per_byte([b"ab"], [b"b"], order=1) == pytest.approx(expected, **EXACT)


def test_windows_show_context_and_symbol():
    expected = [[BOUNDARY, BOUNDARY, 97], [BOUNDARY, 97, 98], [97, 98, BOUNDARY]]
    assert windows(b"ab", 2).tolist() == expected


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_byte_model_equals_its_definition(order):
    documents = [b"the cat sat on the mat", b"", b"that hat\xff\x00", b"a"]
    model = ByteModel(documents, order)
    rows = windows(b"that cat\x00 zq", order)
    expected = [plain_probability(documents, tuple(row[:-1]), row[-1]) for row in rows.tolist()]
    assert model.probability(rows) == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize(
    "history",
    [(BOUNDARY, BOUNDARY), (BOUNDARY, 116), (116, 104), (104, 101), (116, 122), (122, 122), (255, 0)],
    ids=["start", "first byte", "seen", "seen twice", "half seen", "unseen", "unseen bytes"],
)
def test_probabilities_sum_to_one(history):
    p = next_symbol(ByteModel([b"the cat sat on the mat", b"this"], 2), history)
    assert p.min() > 0
    assert p.sum() == pytest.approx(1, **EXACT)


def test_a_model_of_nothing_is_uniform():
    assert next_symbol(ByteModel([], 2), (97, 98)) == pytest.approx(1 / SYMBOLS, **EXACT)


def test_batches_of_documents_count_the_same(monkeypatch):
    documents = [b"the cat sat", b"on the mat", b"and the hat", b"sat"]
    rows = windows(b"the hat sat on that", 2)
    at_once = ByteModel(documents, 2).probability(rows)
    monkeypatch.setattr(reference_models, "BYTES_COUNTED_AT_ONCE", 15)
    assert (ByteModel(documents, 2).probability(rows) == at_once).all()


def test_random_bytes_cost_eight_bits():
    generator = np.random.default_rng(5)
    train_text, held_out = generator.bytes(300_000), generator.bytes(50_000)
    # Estimating 256 frequencies from n bytes costs about 256 / (2 n ln 2) bits: 0.0006, below the sampling error.
    assert byte_model_bits_per_byte([train_text], [held_out], order=0) == pytest.approx(8, abs=0.01)
    # There are 65,536 contexts of two bytes, seen five times each: too few to learn from, and no score is below 8.
    assert 8 < byte_model_bits_per_byte([train_text], [held_out], order=2) < 9.1


def test_random_hexadecimal_digits_cost_four_bits():
    generator = np.random.default_rng(5)
    train_text, held_out = generator.bytes(150_000).hex().encode(), generator.bytes(25_000).hex().encode()
    # 256 contexts of 16 outcomes, 1,170 samples each: 16 / (2 · 1170 · ln 2) = 0.01 bits of estimation error.
    assert byte_model_bits_per_byte([train_text], [held_out], order=2) == pytest.approx(4, abs=0.03)


def test_more_context_helps_where_there_is_some():
    text = b"to be, or not to be, that is the question: " * 50
    bits = [byte_model_bits_per_byte([text], [text[:430]], order) for order in range(4)]
    assert bits == sorted(bits, reverse=True)
    assert bits[-1] < 0.5


@pytest.mark.parametrize("order", [-1, 7])
def test_order_out_of_range_is_refused(order):
    with pytest.raises(ValueError, match="give 0 to 6"):
        byte_model_bits_per_byte([b"a"], [b"a"], order)


def test_no_held_out_text_is_refused():
    with pytest.raises(DataError, match="hold out more documents"):
        byte_model_bits_per_byte([b"a"], [b""])


@pytest.fixture(scope="module")
def texts_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(3)
    words = ["".join(generator.choice(list("abdeghiklmnorstuvwyé"), size)) for size in generator.integers(2, 9, 300)]
    for number in range(6):
        lines = [" ".join(generator.choice(words, 9)) for _ in range(60)]
        (folder / f"play_{number}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def encoded(texts_folder: Path, output: Path, fraction: str) -> Path:
    corpus = ["--input", str(texts_folder), "--validation-fraction", fraction]
    model = output / "made.model"
    assert train.main([*corpus, "--output", str(model), "--vocab-size", "512", "--model-type", "bpe"]) == 0
    arguments = ["--tokenizer", str(model), "--output", str(output / "shards"), "--quiet", "--workers", "1"]
    assert encode.main([*corpus, *arguments]) == 0
    return output / "shards"


def test_references_of_a_corpus(texts_folder, tmp_path):
    corpus = encoded(texts_folder, tmp_path, "0.2")
    found = reference_bits_per_byte(corpus)
    assert list(found) == ["unigram_tokens", "byte_order_2"]

    vocabulary = Vocabulary(corpus / "tokenizer.model")
    readers = [ShardReader(corpus, split) for split in ("train", "validation")]
    labels = [[int(t) for d in range(len(r)) for t in r.tokens(d)[1:]] for r in readers]
    assert all(ids.count(vocabulary.eos_id) == len(r) for ids, r in zip(labels, readers, strict=True))
    seen, total = Counter(labels[0]), len(labels[0]) + vocabulary.size
    bits = -sum(math.log2((seen[token] + 1) / total) for token in labels[1])
    texts = [[(texts_folder / name).read_bytes() for name in reader.names] for reader in readers]
    held_out_bytes = sum(len(text) for text in texts[1])
    assert found["unigram_tokens"] == pytest.approx(bits / held_out_bytes, **EXACT)
    assert found["byte_order_2"] == pytest.approx(byte_model_bits_per_byte(*texts, order=2), **EXACT)


def test_a_corpus_without_validation_is_refused(texts_folder, tmp_path):
    with pytest.raises(DataError, match="no split 'validation'"):
        reference_bits_per_byte(encoded(texts_folder, tmp_path, "0"))
