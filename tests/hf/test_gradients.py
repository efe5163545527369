"""Gradients of the model that travels, by name through the table, and its greedy text are Megatron's, for every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from em_megatron.evaluation.generation import MegatronText, Sampling
from em_megatron.hf.generation import TransformersText
from em_megatron.hf.weight_mapping import table, to_hugging_face
from em_megatron.model.sizes import shape_of
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.restore import restore
from launch import export_hf
from tests.hf.made_runs import KINDS, SLOW, VARIANTS, made_run

TOLERANCE = 2e-5  # of the norm, in fp32: that of the parity suite


@pytest.fixture(
    scope="module",
    params=[
        "qk-norm, exponential",
        "tied",
        *(pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS),
    ],
)
def run_and_export(request, tokenizer, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("variant")
    run = made_run(folder / "run", tokenizer, *VARIANTS[request.param])
    assert export_hf.main([str(run), str(folder / "out")]) == 0
    return run, folder / "out"


def test_gradients(run_and_export):
    run, exported = run_and_export
    ids = torch.randint(
        4, 640, (2, 80), generator=torch.Generator().manual_seed(0)
    )  # five blocks, gradients through four
    found = restore(run, [], 1)
    try:
        layout = BlockLayout.from_segment_ids(torch.ones_like(ids), 16, ids.device)
        logits = found.model[0](ids, None, None, packed_seq_params=layout, runtime_gather_output=True)
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradients = {name: weight.grad for name, weight in found.model[0].named_parameters()}
    finally:
        shutdown()
    model = TransformersText(exported).model.train()
    cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = {name: weight.grad for name, weight in model.named_parameters()}
    for row in table(found.config.model, 640, found.config.memory):
        for name, expected in to_hugging_face(row, gradients[row.megatron], shape_of(found.config.model)).items():
            error = (theirs.pop(name) - expected).norm() / expected.norm()
            assert error < TOLERANCE, f"{name}: {error}"
    assert not theirs


def test_greedy_text(run_and_export):
    run, exported = run_and_export
    greedy, prompt = Sampling(temperature=0), "abcdef ghi " * 3
    found = restore(run, [], 1)
    try:
        here = MegatronText(found.model[0], found.vocabulary)
        here.read(prompt)
        expected = list(here.write_ids(60, greedy))
    finally:
        shutdown()
    there = TransformersText(exported)
    there.read(prompt)
    assert there.cache.tokens_read[0] > 32  # two blocks are in the memory
    assert len(expected) > 32, len(expected)  # and two more get there
    assert list(there.write_ids(60, greedy)) == expected
