"""Held-out figures against a plain computation, and the entry points that print them."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from em_megatron.data.stream import collate
from em_megatron.evaluation.perplexity import evaluate
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.loop import train
from em_megatron.training.microbatch import MicroBatch
from em_megatron.training.setup import set_up
from tests.training import corpora


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 8 steps: (run, folder)."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = corpora.chain_corpus(folder / "corpus", corpora.tokenizer(folder))
    run = set_up(corpora.run_config(corpus, folder, "training.train_steps=8"), world_size=1)
    train(run)
    yield run, folder / "test"
    shutdown()


def test_figures_equal_a_plain_computation(trained):
    run, _ = trained
    stream = run.corpus.validation_stream(run.config)
    token_bytes = torch.as_tensor(run.corpus.vocabulary.token_bytes)
    found = evaluate(run.config, run.layout, run.model, stream, token_bytes)
    total, tokens, text_bytes, bins = 0.0, 0, 0, {}
    for sample in stream.validation_samples():
        batch = MicroBatch.from_batch(collate([sample]), 16, run.device)
        with torch.no_grad():
            losses = run.model[0](batch.tokens, None, None, labels=batch.labels, packed_seq_params=batch.layout)
        for at in range(80):
            if batch.loss_mask[0, at]:
                loss = float(losses[0, at])
                total, tokens = total + loss, tokens + 1
                text_bytes += int(token_bytes[batch.labels[0, at]])
                bins.setdefault(int(batch.positions[0, at]) // 8, []).append(loss)
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / text_bytes, rel=1e-6)
    for row in found["positions"]:
        losses = bins.pop(row["start"] // 8)
        assert row["tokens"] == len(losses)
        assert row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert not bins


def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, f"launch/{script}", *arguments], capture_output=True, text=True, timeout=120)


def test_evaluate_reports_and_takes_another_reader(trained, tmp_path):
    _, folder = trained
    done = call("evaluate.py", str(folder), "--reference-models", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "order-2 model of the bytes" in done.stdout
    report = json.loads((tmp_path / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert report["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-6)
    assert (tmp_path / "positions.png").stat().st_size > 0
    done = call("evaluate.py", str(folder), "memory.order=4", "memory.sampler=exponential", "--output", str(tmp_path))
    assert "order 4, 8 slots, exponential" in done.stdout
    assert json.loads((tmp_path / "evaluation.json").read_text())["loss"] != report["loss"]


def test_generate_streams_and_is_deterministic(trained):
    _, folder = trained
    arguments = (str(folder), "--prompt", "abc de", "--max-new-tokens", "40", "--seed", "3")
    first, second = call("generate.py", *arguments), call("generate.py", *arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("abc de")
    assert len(first.stdout) > len("abc de\n")
    assert first.stdout == second.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("nowhere", "--prompt", "a"), "no complete checkpoint in ", marks=pytest.mark.slow),
        (("RUN", "--prompt", "a", "model.num_layers=3"), "model.* is fixed by the checkpoint"),
        pytest.param(("RUN", "--prompt", "a", "--top-p", "2"), "0 < top_p <= 1", marks=pytest.mark.slow),
    ],
)
def test_generate_refuses_in_one_sentence(trained, arguments, message):
    done = call("generate.py", *(str(trained[1]) if part == "RUN" else part for part in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
