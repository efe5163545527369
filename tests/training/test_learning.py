"""The proof that the memory carries information: a key in the first block decides tokens two blocks and more later."""

from __future__ import annotations

import math

import pytest
import torch

from em_megatron.data.stream import collate
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.loop import train
from em_megatron.training.microbatch import MicroBatch
from em_megatron.training.setup import set_up
from tests.training.corpora import ANSWERS, run_config

CHANCE = math.log(len(ANSWERS))


def answer_loss(corpus, runs, *overrides: str) -> float:
    """Held-out loss in nats on the answers, after training."""
    config = run_config(
        corpus,
        runs,
        "model.init_method_std=0.1",
        "training.train_steps=160",
        "training.global_batch_size=16",
        "training.micro_batch_size=16",
        "optimizer.lr=5e-3",
        "optimizer.warmup_steps=20",
        "validation.interval=0",
        *overrides,
    )
    try:
        run = set_up(config, world_size=1)
        train(run)
        stream = run.corpus.stream(config, "validation")
        batch = MicroBatch.from_batch(collate(list(stream.validation_samples())), 16, run.device)
        with torch.no_grad():
            losses = run.model[0](batch.tokens, None, None, labels=batch.labels, packed_seq_params=batch.layout)
        is_answer = (batch.labels >= ANSWERS.start) & (batch.labels < ANSWERS.stop)
        assert int(is_answer.sum()) == 2 * 64
        return float(losses[is_answer].mean())
    finally:
        shutdown()


@pytest.mark.parametrize("kind", ["elastic", "block_local"])
def test_only_the_memory_knows_the_key(key_corpus, tmp_path, kind):
    loss = answer_loss(key_corpus, tmp_path, f"memory.kind={kind}")
    print(f"{kind}: {loss:.3f} nats on the answers, chance is {CHANCE:.3f}")
    if kind == "elastic":
        assert loss < 0.25 * CHANCE
    else:
        assert loss > 0.9 * CHANCE
