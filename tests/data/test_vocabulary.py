"""Which models are refused, and that encoding in chunks changes nothing. Round trips: tests/tokenizer/test_train.py."""

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from em_megatron.data import vocabulary as module
from em_megatron.data.manifest import DataError
from em_megatron.data.vocabulary import Vocabulary
from tests.tokenizer.small_corpus import train_model, write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), files=10, words=600)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_chunks_do_not_change_the_ids(
    texts: Path, tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = Vocabulary(train_model(texts, tmp_path / "m", "--model-type", model_type))
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(texts.iterdir())) + "no newline at the end"
    whole = vocabulary.encode(text)
    for chunk in (1, 7, 1000):
        monkeypatch.setattr(module, "CHUNK_CHARS", chunk)
        assert vocabulary.encode(text) == whole


def test_sha256_is_of_the_file(texts: Path, tmp_path: Path) -> None:
    path = train_model(texts, tmp_path / "m")
    assert Vocabulary(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*run tokenizer\.train"):
        Vocabulary(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(DataError, match="is not a sentencepiece model"):
        Vocabulary(tmp_path / "text.model")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"byte_fallback": False, "add_dummy_prefix": False}, "does not give every text back exactly"),
        ({"byte_fallback": True, "add_dummy_prefix": True}, "does not give every text back exactly"),
        ({"byte_fallback": True, "add_dummy_prefix": False, "pad_id": -1}, "has no pad, bos or eos id"),
    ],
)
def test_a_lossy_model_is_refused(texts: Path, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    lines = [line for path in sorted(texts.iterdir()) for line in path.read_text().splitlines()]
    serialized = io.BytesIO()
    defaults: dict[str, Any] = {"pad_id": 3, "remove_extra_whitespaces": False, "vocab_size": 500}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=serialized,
        normalization_rule_name="identity",
        model_type="bpe",
        minloglevel=2,
        **(defaults | options),
    )
    (tmp_path / "lossy.model").write_bytes(serialized.getvalue())
    with pytest.raises(DataError, match=reason):
        Vocabulary(tmp_path / "lossy.model")


def test_a_lone_surrogate_is_refused(texts: Path, tmp_path: Path) -> None:
    vocabulary = Vocabulary(train_model(texts, tmp_path / "m"))
    with pytest.raises(DataError, match="which UTF-8 cannot hold"):
        vocabulary.encode("a\ud800b")
