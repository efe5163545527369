"""One small tokenizer and its texts for all tests of the folder."""

from pathlib import Path

import pytest

from tests.tokenizer.small_corpus import train_model, write_texts


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), files=20, words=400)


@pytest.fixture(scope="session")
def model(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_model(texts, tmp_path_factory.mktemp("model") / "tokenizer.model", "--reserved", "2")
