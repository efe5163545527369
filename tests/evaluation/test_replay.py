"""Batches that a run skipped can be looked at again."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch

from em_megatron.parallel.process_groups import shutdown
from em_megatron.training import loop
from em_megatron.training import step as step_module
from em_megatron.training.setup import set_up
from tests.training.corpora import chain_corpus as make_corpus
from tests.training.corpora import run_config, tokenizer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is off where CUDA is present")


def test_a_skipped_batch_is_shown_with_its_documents_and_losses(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", tokenizer(tmp_path))
    options = ("training.train_steps=4", "validation.interval=0", "memory.carry_memory=true")
    schedule = step_module.run_schedule
    try:
        run = set_up(run_config(corpus, tmp_path, *options), world_size=1)

        def going_wrong(*args, **rest):
            found = schedule(*args, **rest)
            found[0][0] += math.nan if run.state.step == 2 else 0.0
            return found

        with patch.object(step_module, "run_schedule", going_wrong):
            assert loop.train(run) == "finished"
        expected = run.corpus.training_stream(run.config).sample(9)
    finally:
        shutdown()
    done = subprocess.run(
        [sys.executable, "launch/replay.py", tmp_path / "test"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "under step_00000004:"
    shown = [line for line in lines if line.startswith("sample ")]
    assert [line.split(":")[0] for line in shown] == ["sample 8", "sample 9", "sample 10", "sample 11"]
    assert f"{int(expected['loss_mask'].sum())} of 80 tokens count, loss " in shown[1]
    assert 3 < float(shown[1].split("loss ")[1].split(",")[0]) < 8
    first = lines[lines.index(shown[1]) + 1]
    text = run.corpus.vocabulary.decode(expected["tokens"][expected["segment_ids"] == 1])[:160]
    assert first.endswith(json.dumps(text, ensure_ascii=False))
    refused = subprocess.run(
        [sys.executable, "launch/replay.py", tmp_path / "test", "--samples", "9-8"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 2
    assert "error: --samples 9-8 is not of the form A-B" in refused.stderr
