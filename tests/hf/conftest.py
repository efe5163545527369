"""One tokenizer, one run and one exported folder for all tests of the folder; code of exported folders in a place of its own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf_modules_"))
os.environ["HF_HUB_OFFLINE"] = "1"

import copy

import pytest
import torch

from em_megatron.hf.modeling_elastic_memory import ElasticMemoryForCausalLM
from launch import export_hf
from tests.hf.made_runs import made_run
from tests.hf.tiny_model import make
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


@pytest.fixture(scope="module")
def shared() -> ElasticMemoryForCausalLM:
    return make()


@pytest.fixture
def model(shared) -> ElasticMemoryForCausalLM:
    return copy.deepcopy(shared)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 50, (1, 37), generator=torch.Generator().manual_seed(1))
