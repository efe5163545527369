"""One tokenizer and its corpora for all tests of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import corpora


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def chain_corpus(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.chain_corpus(tmp_path_factory.mktemp("chain") / "corpus", model)


@pytest.fixture(scope="session")
def key_corpus(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.key_corpus(tmp_path_factory.mktemp("keys") / "corpus", model)


@pytest.fixture(scope="session")
def near_key_corpus(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.key_corpus(tmp_path_factory.mktemp("near-keys") / "corpus", model, corpora.NEAR)


@pytest.fixture(scope="session")
def copy_corpus(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.copy_corpus(tmp_path_factory.mktemp("copies") / "corpus", model)
