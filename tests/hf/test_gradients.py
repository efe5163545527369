"""Every gradient of the model that travels is Megatron's, by name through the table."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from em_megatron.hf.generation import TransformersText
from em_megatron.hf.weight_mapping import table, to_hugging_face
from em_megatron.model.sizes import shape_of
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.restore import restore
from launch import export_hf
from tests.hf.made_runs import KINDS, SLOW, VARIANTS, made_run

TOLERANCE = 2e-5  # of the norm, in fp32: that of the parity suite


@pytest.mark.parametrize(
    "variant",
    [
        "qk-norm, exponential",
        "tied",
        *(pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS),
    ],
)
def test_gradients(variant, tokenizer, tmp_path):
    run = made_run(tmp_path / "run", tokenizer, *VARIANTS[variant])
    assert export_hf.main([str(run), str(tmp_path / "out")]) == 0
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
    model = TransformersText(tmp_path / "out").model.train()
    cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = {name: weight.grad for name, weight in model.named_parameters()}
    for row in table(found.config.model, 640, found.config.memory):
        for name, expected in to_hugging_face(row, gradients[row.megatron], shape_of(found.config.model)).items():
            error = (theirs.pop(name) - expected).norm() / expected.norm()
            assert error < TOLERANCE, f"{name}: {error}"
    assert not theirs
