"""One tokenizer, corpus, trained run and exported folder for all tests of the folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf_modules_"))
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.loop import train
from em_megatron.training.setup import set_up
from launch import export_hf
from tests.hf.made_runs import KINDS, made_run
from tests.training import corpora


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def corpus(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out documents that fill samples of 80 and of 160 tokens, and shorter ones."""
    lengths = {"train": [300, 9, 81, 4, 40, 200] * 4, "validation": [9, 400, 33, 81, 4, 250, 17, 40]}
    documents = {
        split: [corpora.chain_document(1000 * len(split) + seed, length) for seed, length in enumerate(row)]
        for split, row in lengths.items()
    }
    return corpora.write_ids(tmp_path_factory.mktemp("corpus") / "corpus", tokenizer, documents)


def trained_run(corpus: Path, folder: Path, *overrides: str) -> Path:
    """The folder of a run of 8 steps."""
    try:
        train(set_up(corpora.run_config(corpus, folder, "training.train_steps=8", *overrides), world_size=1))
    finally:
        shutdown()
    return folder / "test"


@pytest.fixture(scope="session")
def run_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(corpus, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_of(run_folder, tmp_path_factory.mktemp("exported") / "model")


def export_of(run: Path, folder: Path) -> Path:
    assert export_hf.main([str(run), str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def kind_run(tokenizer: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run folder of a memory kind with random weights, made at its first use."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            overrides = {**KINDS, "block_local": ("memory.kind=block_local",), "elastic": ()}[kind]
            folder = tmp_path_factory.mktemp("kinds") / "made"
            made[kind] = made_run(folder, tokenizer, f"data.path={corpus}", *overrides)
        return made[kind]

    return run
