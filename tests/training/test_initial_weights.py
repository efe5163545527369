"""A new run that starts from the weights of another: same weights, fresh optimizer, and only where they mean the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from em_megatron.checkpoint.folder import CheckpointError
from em_megatron.config import ConfigError
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.loop import train
from em_megatron.training.setup import set_up
from launch import export_hf, import_hf
from tests.tokenizer.small_corpus import train_model, write_texts
from tests.training import corpora


def rows(runs: Path, name: str, kind: str) -> list[dict]:
    lines = (runs / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def run(corpus: Path, runs: Path, *overrides: str) -> None:
    try:
        train(set_up(corpora.run_config(corpus, runs, *overrides), 1))
    finally:
        shutdown()


@pytest.fixture(scope="module")
def first(chain_corpus, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    run(chain_corpus, runs, "name=first", "training.train_steps=6")
    return runs


def test_goes_on_from_a_checkpoint_and_from_a_hugging_face_folder(first, chain_corpus, tmp_path):
    assert export_hf.main([str(first / "first"), str(tmp_path / "hf")]) == 0
    assert import_hf.main([str(tmp_path / "hf"), str(tmp_path / "imported")]) == 0
    last = rows(first, "first", "train")[-1]["loss"]
    assert f"Its training loss was {last:.4f} nats" in (tmp_path / "hf/README.md").read_text()
    before = rows(first, "first", "validation")[-1]["loss"]
    losses = []
    for name, start in (("a", first / "first"), ("b", tmp_path / "imported")):
        overrides = (f"name={name}", f"checkpoint.initial_load_path={start}", "training.train_steps=3")
        run(chain_corpus, tmp_path, *overrides, "optimizer.lr=1e-9", "optimizer.min_lr=0", "optimizer.warmup_steps=0")
        assert rows(tmp_path, name, "validation")[-1]["loss"] == pytest.approx(before, rel=1e-6)
        losses.append([row["loss"] for row in rows(tmp_path, name, "train")])
        assert [row["step"] for row in rows(tmp_path, name, "train")] == [1, 2, 3]
    assert losses[0] == losses[1]
    run(chain_corpus, tmp_path, *overrides[:2], "training.train_steps=5", "optimizer.lr=1e-9", "optimizer.min_lr=0",
        "optimizer.warmup_steps=0")  # fmt: skip
    assert rows(tmp_path, "b", "train")[-1]["step"] == 5  # its own checkpoint counts, not the initial weights


def test_memory_may_be_switched_on(first, chain_corpus, tmp_path):
    start = f"checkpoint.initial_load_path={first / 'first'}"
    run(chain_corpus, tmp_path, start, "memory.order=8", "memory.slots=3", "training.train_steps=3")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.rotary_base=500000", "model.rotary_base is 500000.0"),
        ("model.num_query_groups=4", "model.num_query_groups is 4"),
        ("model.layernorm_epsilon=1e-6", "model.layernorm_epsilon"),
        ("memory.kind=infini", "holds the weights of memory.kind 'elastic', and 'infini'"),
    ],
)
def test_weights_that_mean_something_else(override, words, first, chain_corpus, tmp_path):
    with pytest.raises(ConfigError, match=words):
        run(chain_corpus, tmp_path, f"checkpoint.initial_load_path={first / 'first'}", override)


def test_another_tokenizer_other_shapes_or_no_checkpoint(first, chain_corpus, tmp_path):
    wider = "model.make_vocab_size_divisible_by=512"
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight is \[640, 64\] there and \[1024, 64\] here"):
        run(chain_corpus, tmp_path, f"checkpoint.initial_load_path={first / 'first'}", wider)
    shutil.copytree(first / "first", tmp_path / "other")
    train_model(write_texts(tmp_path / "texts", files=20, words=400, seed=1), tmp_path / "other/tokenizer.model")
    with pytest.raises(ConfigError, match="another tokenizer"):
        run(chain_corpus, tmp_path, f"checkpoint.initial_load_path={tmp_path / 'other'}")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run(chain_corpus, tmp_path, f"checkpoint.initial_load_path={tmp_path / 'nothing'}")


def test_weights_alone_are_not_resumed(first, chain_corpus, tmp_path):
    assert export_hf.main([str(first / "first"), str(tmp_path / "hf")]) == 0
    assert import_hf.main([str(tmp_path / "hf"), str(tmp_path / "test")]) == 0
    recipe = corpora.recipe(tmp_path / "r.yaml", chain_corpus, f"output_dir={tmp_path}")
    found = subprocess.run([sys.executable, "launch/pretrain.py", recipe], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "holds weights alone" in found.stderr
    assert f"checkpoint.initial_load_path={tmp_path / 'test'}" in found.stderr
