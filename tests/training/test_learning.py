"""The proof that memories carry information: what stands in the first block decides tokens of later blocks."""

from __future__ import annotations

import math

import pytest
import torch

from em_megatron.data.stream import collate
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.loop import train
from em_megatron.training.microbatch import MicroBatch
from em_megatron.training.setup import set_up
from tests.training.corpora import ANSWERS, BLOCK, FIRST_SYMBOL, NEAR, PLACES, SYMBOLS, run_config

CHANCE = math.log(len(ANSWERS))

# Every kind that can reach a key three blocks back; sizes that hold the task.
REACHING = {
    "elastic": (),
    "full": ("memory.kind=full",),
    "subsample": ("memory.kind=subsample",),
    "infini, linear": ("memory.kind=infini",),
    "infini, delta": ("memory.kind=infini", "memory.update=delta"),
    "memorizing, dense": ("memory.kind=memorizing", "memory.top_k=0", "memory.pairs=80"),
    "memorizing, top-k": ("memory.kind=memorizing", "memory.top_k=8", "memory.pairs=80"),
    "melodi": (
        "memory.kind=melodi",
        "memory.short_term_tokens=8",
        "memory.long_term_tokens=16",
        "memory.long_term_increment=4",
    ),
}
LOCAL, XL = ("memory.kind=block_local",), ("memory.kind=transformer_xl",)
# Keys and values of these have no gradient from later blocks, or write over each other at first: more steps.
STEPS = {"infini, delta": 320, "memorizing, dense": 320, "memorizing, top-k": 320}
HELP = {"infini, delta": ("model.init_method_std=0.2",)}
COPY_STEPS = 500
COPY = ("optimizer.lr=1e-2", "model.init_method_std=0.2", "model.num_query_groups=4", "memory.layers=all")
EXACT = ("full", "memorizing, dense")  # kinds that keep every token of the task, and read all of them


def answer_losses(corpus, runs, answers: range, steps: int, *overrides: str) -> dict[int, torch.Tensor]:
    """Held-out losses in nats on tokens of `answers` after training, by block."""
    config = run_config(
        corpus,
        runs,
        "model.init_method_std=0.1",
        f"training.train_steps={steps}",
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
        stream = run.corpus.validation_stream(config)
        batch = MicroBatch.from_batch(collate(list(stream.validation_samples())), BLOCK, run.device)
        with torch.no_grad():
            losses = run.model[0](batch.tokens, None, None, labels=batch.labels, packed_seq_params=batch.layout)
        is_answer = (batch.labels >= answers.start) & (batch.labels < answers.stop)
        by_block = zip(losses.split(BLOCK, 1), is_answer.split(BLOCK, 1), strict=True)
        return {block: loss[mask] for block, (loss, mask) in enumerate(by_block) if mask.any()}
    finally:
        shutdown()


@pytest.mark.parametrize("kind", REACHING)
def test_a_memory_knows_the_key(key_corpus, tmp_path, kind):
    losses = answer_losses(key_corpus, tmp_path, ANSWERS, STEPS.get(kind, 160), *REACHING[kind], *HELP.get(kind, ()))
    assert {block: len(found) for block, found in losses.items()} == {3: 64, 4: 64}
    loss = float(torch.cat(list(losses.values())).mean())
    print(f"{kind}: {loss:.3f} nats on the answers, chance is {CHANCE:.3f}")
    assert loss < 0.25 * CHANCE


def test_without_a_memory_nobody_knows_the_key(key_corpus, tmp_path):
    losses = answer_losses(key_corpus, tmp_path, ANSWERS, 160, *LOCAL)
    loss = float(torch.cat(list(losses.values())).mean())
    print(f"block_local: {loss:.3f} nats on the answers, chance is {CHANCE:.3f}")
    assert loss > 0.9 * CHANCE


def test_transformer_xl_knows_the_key_within_its_reach_only(near_key_corpus, tmp_path):
    """Two layers, whose memory is detached: what a layer reads is one block away, two for what the first passed on."""
    losses = answer_losses(near_key_corpus, tmp_path, ANSWERS, 160, *XL)
    near, far = (float(losses[block].mean()) for block in NEAR)
    print(f"transformer_xl: {near:.3f} nats one block after the key, {far:.3f} four blocks after it")
    assert near < 0.25 * CHANCE
    assert far > 0.9 * CHANCE


@pytest.mark.parametrize(
    "kind", [*EXACT, *(pytest.param(kind, marks=pytest.mark.slow) for kind in REACHING if kind not in EXACT)]
)
def test_exact_recall(copy_corpus, tmp_path, kind):
    """Twelve random symbols, each asked for once, in the two blocks after them.

    All kinds train alike, with their memory in both layers: what a detached memory holds is trained by other uses of it
    alone, and the sharpness of normalised keys grows from 1 by steps of the learning rate.
    """
    symbols = range(FIRST_SYMBOL, FIRST_SYMBOL + PLACES * SYMBOLS)
    losses = answer_losses(copy_corpus, tmp_path, symbols, COPY_STEPS, *REACHING[kind], *COPY)
    chance = math.log(SYMBOLS)
    recalled = [losses[block] for block in (1, 2)]
    loss = float(torch.cat(recalled).mean())
    print(f"{kind}: {loss:.3f} nats on the copied symbols, chance is {chance:.3f}")
    assert [len(found) for found in recalled] == 2 * [64 * PLACES // 2]
    if kind in EXACT:
        assert loss < 0.1 * chance
