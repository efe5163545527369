"""A checkpoint and its Hugging Face folder answer alike, under every reader; what they cannot do is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from em_megatron.config import ConfigError
from em_megatron.data.stream import collate
from em_megatron.evaluation.scoring import text_sample
from em_megatron.evaluation.subject import Subject, open_subject
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.microbatch import MicroBatch
from tests.evaluation.conftest import export_of
from tests.training import corpora

LENGTHS = (2, 16, 17, 18, 33, 40, 81, 17, 97, 200)  # of texts, at and beside the ends of blocks, longer than a sample
TEXTS = [corpora.chain_document(5000 + seed, length) for seed, length in enumerate(LENGTHS)]
READERS = {
    "elastic": (
        ["memory.order=7"],
        ["memory.slots=3", "memory.sampler=exponential"],
        ["memory.sampler=points", "memory.slots=2", "memory.sampler_points=[0.25,0.75]"],
        ["memory.order=40", "memory.sampler=window", "memory.sampler_lo=0.5"],
    ),
    "subsample": (["memory.slots=2"], ["memory.sampler=window", "memory.sampler_hi=0.5"]),
    "memorizing, top-k": (["memory.pairs=2"], ["memory.top_k=0"]),  # pairs fewer than the best that are read
}


@contextmanager
def opened(path: Path, *overrides: str) -> Iterator[Subject]:
    try:
        yield open_subject(path, overrides, world_size=1)
    finally:
        shutdown()


@pytest.fixture
def both(run_folder, exported) -> Iterator[tuple[Subject, Subject]]:
    with opened(run_folder) as run:
        yield run, open_subject(exported, (), world_size=1)


def same_losses(first, second, tolerance: float = 1e-5) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=0)


def same_perplexity(first, second) -> None:
    assert {k: first[k] for k in ("tokens", "bytes")} == {k: second[k] for k in ("tokens", "bytes")}
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
    assert first["bits_per_byte"] == pytest.approx(second["bits_per_byte"], rel=1e-5)
    assert len(first["positions"]) == len(second["positions"])
    for a, b in zip(first["positions"], second["positions"], strict=True):
        assert (a["start"], a["stop"], a["tokens"]) == (b["start"], b["stop"], b["tokens"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def figures(subject: Subject):
    return subject.perplexity(0, lambda: False), subject.token_losses(TEXTS)


def test_a_run_and_its_export_give_the_same_figures(both):
    run, folder = both
    assert (run.step, folder.step) == (8, 0)
    assert run.vocabulary.sha256 == folder.vocabulary.sha256
    same_perplexity(run.perplexity(0, lambda: False), folder.perplexity(0, lambda: False))
    same_perplexity(run.perplexity(3, lambda: False), folder.perplexity(3, lambda: False))
    same_losses(run.token_losses(TEXTS), folder.token_losses(TEXTS))


def test_token_losses_equal_a_plain_forward(both):
    subject = both[0]
    model = subject.run.model[0]
    found = subject.token_losses(TEXTS)
    for ids, losses in zip(TEXTS, found, strict=True):
        assert losses.shape == (len(ids) - 1,)
        sample = text_sample(ids, -(-(len(ids) - 1) // 16) * 16, subject.vocabulary.pad_id)
        batch = MicroBatch.from_batch(collate([sample]), 16, next(model.parameters()).device)
        with torch.no_grad():
            expected = model(batch.tokens, None, None, labels=batch.labels, packed_seq_params=batch.layout)
        same_losses([losses], [expected[0, : len(losses)].double().numpy()])
        (alone,) = subject.token_losses([ids])  # whatever stands beside it
        same_losses([losses], [alone])
    assert [len(row) for subject in both for row in subject.token_losses([TEXTS[0][:1], TEXTS[1]])] == [0, 15] * 2


def test_an_interrupted_perplexity_is_none(both):
    for subject in both:
        asked = iter((False, True))
        assert subject.perplexity(0, lambda asked=asked: next(asked)) is None


@pytest.mark.parametrize("kind", READERS)
def test_readers_are_exchanged_and_come_back(kind, run_folder, exported, kind_run, tmp_path):
    path = run_folder if kind == "elastic" else kind_run(kind)
    folder = exported if kind == "elastic" else export_of(path, tmp_path / "out")
    found = {}
    for which in (path, folder):
        with opened(which) as subject:
            before = figures(subject)
            rows = []
            for changes in READERS[kind]:
                subject.use_reader(changes)
                rows.append(figures(subject))
                assert subject.config.memory != subject.opened_with
            subject.use_reader([])
            after = figures(subject)
        assert after[0] == before[0]
        assert all(np.array_equal(a, b) for a, b in zip(after[1], before[1], strict=True))
        found[which] = [before, *rows]
        for changes, row in zip(READERS[kind], rows, strict=True):
            assert row[0]["loss"] != before[0]["loss"]
            with opened(which, *changes) as subject:
                same_losses(row[1], subject.token_losses(TEXTS), 1e-6)
    for run, exported_one in zip(found[path], found[folder], strict=True):
        same_perplexity(run[0], exported_one[0])
        same_losses(run[1], exported_one[1], 2e-5)


REFUSED = {
    "memory.block_length=8": "'memory.block_length=8' is no reader of a memory",
    "memory.kind=block_local": "'memory.kind=block_local' is no reader of a memory",
    "model.num_layers=3": "'model.num_layers=3' is no reader of a memory",
    "memory.pairs=3": "'memory.pairs=3' has no place in a memory of kind elastic",
    "memory.order=0": "memory.order is 0: it must be at least 1",
    "memory.sampler=some": "Unknown sampler 'some'",
    "memory.sampler=points": "was given 0 points for 8 slots",
}


def test_readers_that_cannot_be_are_refused_and_change_nothing(both):
    for subject in both:
        before = subject.token_losses(TEXTS[:6])
        for change, message in REFUSED.items():
            with pytest.raises(ConfigError) as found:
                subject.use_reader([change])
            assert message in str(found.value)
            assert subject.config.memory == subject.opened_with
        assert all(np.array_equal(a, b) for a, b in zip(subject.token_losses(TEXTS[:6]), before, strict=True))


def test_memories_without_a_reader(kind_run):
    for kind in ("melodi", "infini, linear", "block_local"):
        with opened(kind_run(kind)) as subject:
            subject.use_reader([])
            name = subject.config.memory.kind
            with pytest.raises(ConfigError, match=f"'memory.slots=3' has no place in a memory of kind {name}"):
                subject.use_reader(["memory.slots=3"])


def test_what_cannot_be_opened_is_refused(run_folder, exported, tmp_path):
    with pytest.raises(ConfigError, match="is a Hugging Face folder, which one process reads: call without torchrun"):
        open_subject(exported, (), world_size=2)
    for override in ("training.precision=bf16", "memory.block_length=8", "model.num_layers=3"):
        with pytest.raises(ConfigError, match=f"override '{override}' does not fit a Hugging Face folder"):
            open_subject(exported, (override,), world_size=1)
    with pytest.raises(ConfigError, match=r"would need other weights: model.\* is fixed by the checkpoint"):
        open_subject(run_folder, ("model.num_layers=3",), world_size=1)
    (tmp_path / "config.json").write_text((exported / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"holds no .*: export it again with launch/export_hf.py"):
        open_subject(tmp_path, (), world_size=1)


def test_a_folder_of_another_length_of_samples(run_folder, exported):
    with opened(run_folder, "data.sequence_length=160") as run:
        expected = run.perplexity(0, lambda: False)
    folder = open_subject(exported, ("data.sequence_length=160",), world_size=1)
    same_perplexity(folder.perplexity(0, lambda: False), expected)
