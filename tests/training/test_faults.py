"""Bad input while training: one clear sentence, and nothing lost."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

from em_megatron.config import ConfigError
from em_megatron.data.manifest import DataError
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.corpus import Corpus
from em_megatron.training.loop import train
from em_megatron.training.setup import set_up
from em_megatron.training.step import TrainingError
from tests.tokenizer.small_corpus import train_model, write_texts
from tests.training.corpora import recipe, run_config


def test_spoilt_weights_stop_the_run_before_anything_changes(chain_corpus, tmp_path):
    config = run_config(chain_corpus, tmp_path, "checkpoint.save_interval=2", "training.stop_after_steps=2")
    try:
        run = set_up(config, world_size=1)
        assert train(run) == "paused"
        config.training.stop_after_steps = 0
        weight = dict(run.model[0].named_parameters())["module.decoder.final_norm.weight"]
        with torch.no_grad():
            weight[0] = float("nan")
        before = {name: p.detach().clone() for name, p in run.model[0].named_parameters()}
        message = r"step 3 \(samples 8 to 11\): the loss is nan; weights are not finite, .*step_00000002 is whole"
        with pytest.raises(TrainingError, match=message):
            train(run)
        for name, parameter in run.model[0].named_parameters():
            assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
        assert run.store.latest().name == "step_00000002"
    finally:
        shutdown()


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_shard_is_named(chain_corpus, tmp_path, damage):
    corpus = tmp_path / "corpus"
    shutil.copytree(chain_corpus, corpus)
    shard = corpus / "train-000000.tar"
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        shard.write_bytes(content[:middle] if damage == "truncated" else flipped)
    path = recipe(tmp_path / "recipe.yaml", corpus)
    done = subprocess.run(
        [sys.executable, "launch/pretrain.py", str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "train-000000.tar" in errors[0]
    assert "Traceback" not in done.stderr


def test_settings_that_may_not_change_on_resume(chain_corpus, tmp_path):
    try:
        train(set_up(run_config(chain_corpus, tmp_path, "training.train_steps=3"), world_size=1))
        for override, message in {
            "seed=9": "seed was 1234 when step_00000003 was saved and is 9 now",
            "data.sequence_length=160": "data.sequence_length was 80",
            "model.rotary_base=500": "model.rotary_base was 10000.0",
            "checkpoint.resume=false": "checkpoint.resume is false",
        }.items():
            shutdown()
            with pytest.raises(ConfigError, match=re.escape(message)):
                set_up(run_config(chain_corpus, tmp_path, override), world_size=1)
        shutdown()
        run = set_up(run_config(chain_corpus, tmp_path, "training.train_steps=5", "memory.slots=4"), world_size=1)
        assert run.state.step == 3
    finally:
        shutdown()


def test_one_failing_rank_ends_all_with_its_sentence(chain_corpus, tmp_path):
    """Data-parallel ranks read different samples; the one that meets a damaged shard speaks, the other does not hang."""
    corpus = tmp_path / "corpus"
    shutil.copytree(chain_corpus, corpus)
    shard = corpus / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    path = recipe(tmp_path / "recipe.yaml", corpus)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    started = time.monotonic()
    done = subprocess.run([*command, "launch/pretrain.py", str(path)], capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert re.search(r"^error( \(rank 1\))?: shard file train-000000.tar", done.stderr, re.MULTILINE), done.stderr
    assert time.monotonic() - started < 90


def test_wrong_tokenizer_is_refused(chain_corpus, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(chain_corpus, corpus)
    texts = write_texts(tmp_path / "texts", files=10, words=300, seed=9)
    train_model(texts, corpus / "tokenizer.model")
    with pytest.raises(DataError, match="tokenizer"):
        Corpus.open(run_config(corpus, tmp_path).data)


def test_metrics_tell_one_straight_story(chain_corpus, tmp_path):
    """A run in three calls writes the rows of one call, without the rows a kill left behind."""
    rows = {}
    try:
        for name, stops in (("whole", [0]), ("pieces", [3, 4, 0])):
            for stop in stops:
                config = run_config(
                    chain_corpus,
                    tmp_path,
                    f"name={name}",
                    "training.train_steps=10",
                    f"training.stop_after_steps={stop}",
                )
                train(set_up(config, world_size=1))
                shutdown()
                metrics = tmp_path / name / "metrics.jsonl"
                if stop:
                    with metrics.open("a") as file:
                        file.write('{"kind": "train", "step": 9, "loss": 0.0}\n{"kind": "tra')
            read = [json.loads(line) for line in metrics.read_text().splitlines()]
            rows[name] = [(row["kind"], row["step"], row["loss"], row.get("consumed_tokens")) for row in read]
    finally:
        shutdown()
    stories = {name: [row for row in found if row[0] == "train"] for name, found in rows.items()}
    assert stories["pieces"] == stories["whole"]
    assert [row[1] for row in stories["whole"]] == list(range(1, 11))
    for picture in ("loss.png", "positions.png", "config.yaml", "tokenizer.model"):
        assert (tmp_path / "whole" / picture).stat().st_size > 0
