"""Tokenizers of every kind: ids of the library they come from, exact bytes where they are lossless, and who is refused.

Round trips of those that tokenizer.train makes: tests/tokenizer/test_train.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from em_megatron.data import vocabulary as module
from em_megatron.data.manifest import DataError
from em_megatron.data.vocabulary import Vocabulary, find_tokenizer
from em_megatron.evaluation.generation import stream_text
from tests.data import made_tokenizers as made

ODD = [
    "",
    " ",
    "\n",
    "a\n b\n\nc  d\t\n e\r\n\r\nf",
    "\u00e9 e\u0301 \ufb01 \u2581 \u2581\u2581 \ufc5e\n\ufc5e",
    "<|endoftext|> </s> <s> <unk> <0x41>",
    "don't\nstop 123\n456",
    "\u4e2d\u6587\n\u6587\u5b57\U0001f642\x00\ufeff\u00a0\u3000\u0085",
]
LOSSLESS = {"no dummy prefix", "no pad, no bos", "GPT-2", "digits", "runs", "unknown pattern"}
UNCUT = {"suffix", "NFKC", "NFKC, no prefix", "prefix", "unknown pattern"}
Ids = Callable[[str], list[int]]


def sentencepiece_pair(kind: str, model_type: str, folder: Path) -> tuple[Vocabulary, Ids]:
    path = made.sentencepiece_model(folder / "tokenizer.model", model_type, **made.SENTENCEPIECE[kind])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return Vocabulary(path), lambda text: processor.encode(text, out_type=int)


def hugging_face_pair(kind: str, folder: Path) -> tuple[Vocabulary, Ids]:
    tokenizer = made.byte_level(kind) if kind in made.BYTE_LEVEL else made.space_marked(kind)
    made.saved(tokenizer, folder)
    tokenizer.encode_special_tokens = True
    return Vocabulary(folder), lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(
    scope="module",
    params=[
        *((kind, model_type) for kind in made.SENTENCEPIECE for model_type in ("bpe", "unigram")),
        *((kind, "") for kind in (*made.BYTE_LEVEL, *made.SPACE_MARKED)),
    ],
    ids=" ".join,
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Vocabulary, Ids]:
    """A kind of tokenizer, the vocabulary made of it, and the ids that its own library gives."""
    kind, model_type = request.param
    folder = tmp_path_factory.mktemp("tokenizer")
    return kind, *(sentencepiece_pair(kind, model_type, folder) if model_type else hugging_face_pair(kind, folder))


def test_ids_are_those_of_the_library_and_bytes_are_exact_where_lossless(pair: tuple[str, Vocabulary, Ids]) -> None:
    kind, vocabulary, library = pair
    assert vocabulary.lossless == (kind in LOSSLESS or kind.startswith("pattern"))
    own_marks = vocabulary.lossless and vocabulary.file_name == "tokenizer.model"  # sentencepiece loses U+2581
    for text in [*ODD, made.made_text(500, seed=1)]:
        ids = vocabulary.encode(text)
        spelled = kind == "Unigram" and "</s>" in text  # the library finds a special token there
        if not (own_marks and "\u2581" in text) and not spelled:
            assert ids == library(text)
        if vocabulary.lossless:
            assert vocabulary.decode(ids) == text
            assert "".join(stream_text(iter(ids), vocabulary)) == text
            assert int(vocabulary.token_bytes[ids].sum()) == len(text.encode())
        assert not set(ids) & {vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id}


def test_parts_of_a_long_text_give_the_ids_of_the_whole(
    pair: tuple[str, Vocabulary, Ids], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, vocabulary, _ = pair
    text = made.made_text(1000, seed=2) + "".join(ODD) + made.made_text(300, seed=3)
    whole = vocabulary.encode(text)
    for chars in (1, 7, 50, 1000):
        monkeypatch.setattr(module, "CHUNK_CHARS", chars)
        assert vocabulary.encode(text) == whole
        array = vocabulary.encode_array(text, "<u2")
        assert (array.dtype, array.tolist()) == (np.dtype("<u2"), whole)
    assert (len(list(vocabulary._parts(text))) == 1) == (kind in UNCUT)


def test_one_file_says_all(pair: tuple[str, Vocabulary, Ids], tmp_path: Path) -> None:
    _, vocabulary, _ = pair
    (tmp_path / vocabulary.file_name).write_bytes(vocabulary.serialized)
    again = Vocabulary(find_tokenizer(tmp_path))
    assert again.sha256 == vocabulary.sha256 == hashlib.sha256(vocabulary.serialized).hexdigest()
    assert again.serialized == vocabulary.serialized
    assert again.tokenizer.special == vocabulary.tokenizer.special
    assert again.lossless == vocabulary.lossless
    text = made.made_text(100)
    other_process = pickle.loads(pickle.dumps(vocabulary))
    assert again.encode(text) == other_process.encode(text) == vocabulary.encode(text)
    assert np.array_equal(again.token_bytes, vocabulary.token_bytes)


def test_a_lossy_tokenizer_is_warned_of_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sentencepiece_pair("no dummy prefix", "bpe", tmp_path)
        assert not caplog.records
        sentencepiece_pair("dummy prefix", "bpe", tmp_path)
    assert "is not lossless (it puts a space before each text): bits per byte are approximate" in caplog.text


def test_special_ids_come_from_the_files_beside_it_or_from_well_known_names(tmp_path: Path) -> None:
    tokenizer = made.byte_level(special=("<fill>", "<|endoftext|>", "<start>", "<stop>", "<pad>"))
    cases: dict[str, tuple[dict[str, Any], list[int]]] = {
        "lone": ({}, [1, 1, 4]),
        "named": ({"bos_token": "<start>", "eos_token": {"content": "<stop>"}, "pad_token": "<fill>"}, [2, 3, 0]),
        "without bos": ({"bos_token": None, "eos_token": "<stop>", "pad_token": None}, [3, 3, 3]),
        "nothing named": ({"model_max_length": 1024}, [1, 1, 4]),
    }
    for name, (config, expected) in cases.items():
        found = Vocabulary(made.saved(tokenizer, tmp_path / name, **config))
        assert [found.bos_id, found.eos_id, found.pad_id] == expected
    made.saved(tokenizer, tmp_path / "map")
    (tmp_path / "map/special_tokens_map.json").write_text('{"eos_token": "<stop>"}')
    assert Vocabulary(tmp_path / "map/tokenizer.json").eos_id == 3


def test_added_tokens_that_are_text_have_bytes(tmp_path: Path) -> None:
    tokenizer = made.byte_level()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("wide", lstrip=True)])
    vocabulary = Vocabulary(made.saved(tokenizer, tmp_path))
    ids = vocabulary.encode("a <tool> b")
    assert tokenizer.token_to_id("<tool>") in ids
    assert vocabulary.decode(ids) == "a <tool> b"
    assert not vocabulary.lossless  # " wide" gives "wide" back


def test_well_known_ends_of_sentencepiece_models_without_eos(tmp_path: Path) -> None:
    options = made.EXACT | {"add_dummy_prefix": False, "eos_id": -1, "bos_id": -1}
    path = made.sentencepiece_model(tmp_path / "m", control_symbols=["<|endoftext|>"], **options)
    vocabulary = Vocabulary(path)
    assert vocabulary.bos_id == vocabulary.eos_id == vocabulary.tokenizer.processor.piece_to_id("<|endoftext|>")
    with pytest.raises(DataError, match=r"has no eos id, .* option eos_id"):
        Vocabulary(made.sentencepiece_model(tmp_path / "m", **options))


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        [made.made_text(500)],
        trainers.WordPieceTrainer(vocab_size=100, special_tokens=["[UNK]", "</s>"], show_progress=False),
    )
    return tokenizer


def plain_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        [made.made_text(500)], trainers.BpeTrainer(vocab_size=100, special_tokens=["</s>"], show_progress=False)
    )
    return tokenizer


def changed(**changes: Any) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        made.saved(made.byte_level(), folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"] |= changes
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    return save


def with_file(name: str, text: str) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return save


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "WordPiece": (lambda f: made.saved(word_piece(), f), "is a WordPiece tokenizer whose ids do not stand for bytes"),
    "words without spaces": (lambda f: made.saved(plain_bpe(), f), "is a BPE tokenizer whose ids do not stand for bytes"),
    "no eos": (lambda f: made.saved(made.byte_level(special=("<x>",)), f), r'name it in .*\{"eos_token": '),
    "eos is no token": (lambda f: made.saved(made.byte_level(), f, eos_token="<x>"), r"no token '<x>', which .* as its eos_token"),
    "code": (
        lambda f: made.saved(made.byte_level(), f, auto_map={"AutoTokenizer": ["x.Y", None]}),
        "needs Python code of its own",
    ),
    "code alone": (
        lambda f: with_file("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}')(f).parent,
        "needs Python code of its own",
    ),
    "dropout": (changed(dropout=0.1), "draws its merges at random"),
    "unknown model": (changed(type="Strange"), "cannot be read by tokenizers .* newer version"),
    "empty folder": (lambda f: f, "holds no tokenizer.model or tokenizer.json; run"),
    "missing": (lambda f: f / "none.model", r"cannot read the tokenizer .*run tokenizer\.train"),
    "text": (with_file("x.model", "not a model"), "is neither a sentencepiece model nor a tokenizer.json"),
    "cut JSON": (with_file("tokenizer.json", '{"model": '), "is not valid JSON"),
    "other JSON": (with_file("tokenizer.json", '{"a": 1}'), "it holds no model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    prepare, reason = REFUSED[kind]
    path = prepare(tmp_path)
    with pytest.raises(DataError, match=reason):
        Vocabulary(path)


def test_a_lone_surrogate_is_refused(tmp_path: Path) -> None:
    vocabulary = Vocabulary(made.saved(made.byte_level(), tmp_path))
    with pytest.raises(DataError, match="which UTF-8 cannot hold"):
        vocabulary.encode("a\ud800b")
