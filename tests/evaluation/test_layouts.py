"""Two ranks find what one does: losses of texts, held-out figures, recall; a checkpoint of random weights on each layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from em_megatron.config import ConfigError
from em_megatron.evaluation import recall
from em_megatron.evaluation.subject import open_subject
from em_megatron.parallel.process_groups import shutdown
from tests.training import corpora

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is off where CUDA is present")

TEXTS = [corpora.chain_document(7000 + seed, length) for seed, length in enumerate((2, 17, 18, 161, 40, 5, 33, 1, 90))]
COMMON = ("data.sequence_length=160", "training.micro_batch_size=2")
LAYOUTS = {
    "tensor": ("parallel.tensor_model_parallel_size=2",),
    "tensor, sequence": ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
    "pipeline": ("parallel.pipeline_model_parallel_size=2",),
    "interleaved": ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"),
    "context": ("parallel.context_parallel_size=2",),
    "data": (),
}
SLOW = ("tensor, sequence", "pipeline")
NO_TEXT = {
    "tensor, sequence": "one token cannot be split along the sequence: leave parallel.sequence_parallel out",
    "pipeline": "text is generated without pipeline and context parallelism: leave these overrides out",
    "interleaved": "text is generated without pipeline and context parallelism: leave these overrides out",
    "context": "text is generated without pipeline and context parallelism: leave these overrides out",
}


def figures(run: Path, overrides: tuple[str, ...], world_size: int) -> dict[str, Any]:
    """What a rank finds."""
    subject = open_subject(run, (*COMMON, *overrides), world_size)
    found: dict[str, Any] = {
        "losses": subject.token_losses(TEXTS),
        "perplexity": subject.perplexity(0, lambda: False),
        "fewer": subject.perplexity(3, lambda: False),
    }
    subject.use_reader(["memory.order=5", "memory.slots=3"])
    found["reader"] = subject.perplexity(0, lambda: False)
    subject.use_reader([])
    try:
        mine = [
            recall.trial(subject.new_text, subject.vocabulary, recall.TASKS["single"], 300, 0.5, 3, number, 0)
            for number in subject.share(range(3))
        ]
        trials = [trial for part in subject.gather(mine) for trial in part]
        found["recall"] = sorted(trials, key=lambda trial: trial["asked"])
    except ConfigError as error:
        found["recall"] = str(error)
    return found


@pytest.fixture(scope="module")
def alone(kind_run) -> dict[str, Any]:
    try:
        return figures(kind_run("elastic"), (), 1)
    finally:
        shutdown()


def same(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name in ("tokens", "bytes"):
        assert first[name] == second[name]
    assert first["loss"] == pytest.approx(second["loss"], rel=2e-5)
    for a, b in zip(first["positions"], second["positions"], strict=True):
        assert (a["start"], a["tokens"]) == (b["start"], b["tokens"])
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)


@pytest.mark.parametrize("layout", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in LAYOUTS])
def test_two_ranks_find_what_one_does(layout, ranks, kind_run, alone):
    assert len(alone["recall"]) == 3
    for found in ranks(2).run(figures, kind_run("elastic"), LAYOUTS[layout], 2):
        for row, expected in zip(found["losses"], alone["losses"], strict=True):
            np.testing.assert_allclose(row, expected, rtol=2e-5, atol=2e-5)
        for name in ("perplexity", "fewer", "reader"):
            same(found[name], alone[name])
        assert found["recall"] == NO_TEXT.get(layout, alone["recall"])
    assert alone["reader"]["loss"] != alone["perplexity"]["loss"]


def odd_blocks(run: Path, overrides: tuple[str, ...], world_size: int) -> list[np.ndarray]:
    subject = open_subject(run, ("memory.block_length=5", "data.sequence_length=80", *overrides), world_size)
    return subject.token_losses(TEXTS)


@pytest.mark.slow
def test_blocks_that_tensor_ranks_cannot_halve(ranks, kind_run):
    try:
        expected = odd_blocks(kind_run("elastic"), (), 1)
    finally:
        shutdown()
    for found in ranks(2).run(odd_blocks, kind_run("elastic"), LAYOUTS["tensor, sequence"], 2):
        for row, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(row, other, rtol=2e-5, atol=2e-5)


def another_beside(run: Path, other: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Losses of two models in the same processes, the second in the layout of the first."""
    first = open_subject(run, (*COMMON, *LAYOUTS["interleaved"]), 2)
    second = open_subject(other, (), 2, beside=first)
    return first.token_losses(TEXTS), second.token_losses(TEXTS)


@pytest.mark.slow
def test_an_evaluator_takes_the_layout_of_the_model_beside_it(ranks, kind_run, alone):
    try:
        expected = open_subject(kind_run("subsample"), (), 1).token_losses(TEXTS)
    finally:
        shutdown()
    for first, second in ranks(2).run(another_beside, kind_run("elastic"), kind_run("subsample")):
        for found, truth in ((first, alone["losses"]), (second, expected)):
            for row, other in zip(found, truth, strict=True):
                np.testing.assert_allclose(row, other, rtol=2e-5, atol=2e-5)
