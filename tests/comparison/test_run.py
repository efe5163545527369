"""A tiny comparison through the real entry points: interrupted, gone on with, reported; a cell that fails leaves the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from em_megatron.comparison.plan import cells_of, load_plan
from em_megatron.comparison.running import evaluated, trained
from launch import compare
from tests.training import corpora

PLAN = """
name: tiny
output_dir: {folder}/out
base:
  model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 2, num_query_groups: 2, kv_channels: 16, ffn_hidden_size: 48}}
  memory: {{block_length: 16, order: 8, slots: 4, bank_cache: null}}
  data: {{sequence_length: 64}}
  training: {{precision: fp32, train_steps: {steps}, global_batch_size: 2, micro_batch_size: 2}}
  optimizer: {{warmup_steps: 1}}
  logging: {{wandb: disabled, tensorboard: false}}
vocab_size: 640
corpora:
  chain: {{shards: {folder}/corpus}}
sizes:
  1x: {{}}
groups:
  - {{kinds: [full, elastic], corpora: [chain], sizes: [1x], seeds: [1]}}
speed:
  kinds: [elastic]
  sizes: [1x]
  corpus: chain
  steps: 4
suite: perplexity,long_ppl,corruption
evaluate: [--texts, "2", --context, "16", --stride, "8"]
evaluator: full
claims:
  - {{text: memory is as good as all of the text, better: elastic_1x, than: full}}
workers: 2
"""


def write_plan(folder: Path, steps: int) -> Path:
    path = folder / "plan.yaml"
    path.write_text(PLAN.format(folder=folder, steps=steps))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    lengths = {"train": [300, 9, 81, 200] * 4, "validation": [200, 150, 30]}
    documents = {
        split: [corpora.chain_document(len(split) + seed, length) for seed, length in enumerate(row)]
        for split, row in lengths.items()
    }
    corpora.write_ids(folder / "corpus", corpora.tokenizer(folder), documents)
    return folder


def call(plan: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launch/compare.py", str(plan), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_comparison_is_interrupted_and_goes_on_to_its_report(folder):
    plan = write_plan(folder, steps=4000)
    cells = cells_of(load_plan(plan))
    first = call(plan, "--stages", "train")
    deadline = time.monotonic() + 90
    while not all((cell.run_dir / "metrics.jsonl").is_file() for cell in cells[:2]) and time.monotonic() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert "the same command goes on" in said
    reached = [json.loads((cell.run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] for cell in cells[:2]]
    assert all(0 < step < 4000 for step in reached)
    again = call(plan, "base.training.train_steps=" + str(max(reached) + 3))  # fewer steps are enough now
    out, said = again.communicate(timeout=200)
    assert again.returncode == 0, out + said
    cells = cells_of(load_plan(plan, [f"base.training.train_steps={max(reached) + 3}"]))
    assert all(trained(cell) and evaluated(cell) for cell in cells)
    for cell, step in zip(cells[:2], reached, strict=True):
        steps = [
            row["step"]
            for row in map(json.loads, (cell.run_dir / "metrics.jsonl").read_text().splitlines())
            if row["kind"] == "train"
        ]
        assert steps == list(range(1, max(reached) + 4)), f"step {step} was not gone on from"
    report = folder / "out/tiny/report"
    found = json.loads((report / "results.json").read_text())
    assert [row["label"] for row in found["rows"]] == ["full", "elastic_1x", "elastic_1x"]
    assert found["missing"] == []
    judge = found["rows"][1]["long_ppl"]
    assert judge["evaluator_kind"] == "full"
    assert judge["constants"]["context"] == 16
    page = (report / "report.md").read_text()
    assert "memory is as good as all of the text" in page
    assert "elastic_1x against full" in page
    for name in ("chain-1x-memory", "chain-1x-positions", "chain-1x-corruption", "speed"):
        assert f"({name}.png)" in page
        assert (report / f"{name}.png").stat().st_size > 5000


def test_a_cell_that_fails_leaves_the_others_and_is_named(folder, capsys):
    plan = write_plan(folder, steps=2)
    arguments = [str(plan), "name=broken", "speed.kinds=[]", "suite=perplexity"]
    (cell, other) = cells_of(load_plan(plan, arguments[1:]))
    cell.run_dir.parent.mkdir(parents=True, exist_ok=True)
    cell.run_dir.mkdir()
    (cell.run_dir / "checkpoints").write_text("in the way of the folder")
    assert compare.main([*arguments, "--stages", "train"]) == 1
    assert f"failed: {cell.name}, see {cell.run_dir / 'compare.log'}" in capsys.readouterr().err
    assert trained(other)


def test_shards_that_are_not_there_are_refused(folder, capsys):
    assert compare.main([str(write_plan(folder, steps=2)), "corpora.chain.shards=nowhere"]) == 2
    assert "corpus 'chain' has no shards in nowhere" in capsys.readouterr().err
