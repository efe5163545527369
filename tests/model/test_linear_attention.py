"""Layers M and G of model.layer_pattern: what is refused, and Gated DeltaNet in plain torch where its package is there."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from em_megatron.config import ConfigError
from em_megatron.model import linear_attention
from em_megatron.model.initialization import initialize_weights
from em_megatron.model.language_model import build_model, hybrid_pattern, memory_cache
from em_megatron.model.sizes import memory_floats_per_sequence, num_parameters
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.validate import validate
from tests.one_rank import one_rank, tiny_config

VOCAB = 24
SEGMENTS = torch.tensor([[1] * 19 + [2] * 3 + [0] * 2 + [3] * 5 + [4] * 3 + [5] * 8, [1] * 40], dtype=torch.int32)
needs_kernels = pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention")
REFUSED = {
    "model.layer_pattern=X*": "not made of the letters",
    "model.layer_pattern=G*G": "does not fill 2 layers",
    "model.layer_pattern=G* parallel.tensor_model_parallel_size=2": "on one rank",
    "model.layer_pattern=G* memory.kind=melodi": "another memory.kind than melodi",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_refused_in_one_sentence(overrides):
    with pytest.raises(ConfigError, match=REFUSED[overrides]) as refusal:
        validate(tiny_config(*overrides.split()), world_size=4)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("letter", "package"), [("M", "mamba-ssm"), ("G", "flash-linear-attention")])
def test_a_missing_package_is_named(letter, package, monkeypatch):
    monkeypatch.setattr(linear_attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        validate(tiny_config(f"model.layer_pattern={letter}*"), world_size=1)


def test_the_pattern_of_stages():
    config = tiny_config("model.num_layers=4", 'model.layer_pattern="*G"', "parallel.pipeline_model_parallel_size=2")
    assert hybrid_pattern(config) == "*-G-|*-G-"


def test_documents_of_packed_samples():
    found = linear_attention.documents(BlockLayout.from_segment_ids(SEGMENTS, 8))
    assert found == [[(0, 19), (19, 22), (22, 24), (24, 29), (29, 32), (32, 40)], [(0, 40)]]


@needs_kernels
def test_gated_delta_net_between_memory_layers():
    config = tiny_config("model.num_layers=4", 'model.layer_pattern="*G"')
    validate(config, world_size=1)
    tokens = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    layout = BlockLayout.from_segment_ids(SEGMENTS, 8)
    with one_rank() as groups:
        model = build_model(config, VOCAB, groups.pg_collection)
        assert sum(p.numel() for p in model.parameters()) == num_parameters(config.model, VOCAB, config.memory)
        assert memory_floats_per_sequence(config.model, config.memory, 40) == 2 * 2 * 12 * 8 * 2  # two memory layers
        initialize_weights([model], seed=5, std=0.3, num_layers=4)
        linear_attention.initialize_recurrences(model, seed=5)
        with pytest.raises(ConfigError, match="cannot be generated"):
            memory_cache(model, 1)
        with torch.no_grad():
            before = model(tokens, None, None, packed_seq_params=layout)
            for document in (1, 2, 3, 4, 5):
                mine = SEGMENTS.eq(document) & (torch.arange(2)[:, None] == 0)
                after = model(torch.where(mine, (tokens + 7) % VOCAB, tokens), None, None, packed_seq_params=layout)
                assert torch.equal(after[~mine], before[~mine]), f"document {document} leaks"
                assert not torch.equal(after[mine], before[mine])
        model.train()
        model(tokens, None, None, labels=tokens, packed_seq_params=layout).sum().backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters()
        )
