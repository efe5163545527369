"""One tokenizer, one run and one exported folder for all tests of the folder; code of exported folders in a place of its own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf_modules_"))
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from launch import export_hf
from tests.hf.made_runs import made_run
from tests.training import corpora


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def run_folder(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("runs") / "made", tokenizer)


@pytest.fixture(scope="session")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert export_hf.main([str(run_folder), str(folder)]) == 0
    return folder
