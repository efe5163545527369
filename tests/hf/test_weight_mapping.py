"""The table against Megatron's model: names, shapes, split over tensor ranks, and the layout inside a tensor."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

from em_megatron.config import MemoryConfig, ModelConfig
from em_megatron.hf.config_mapping import MEMORY, MODEL, NOT_IN_HUGGING_FACE
from em_megatron.hf.configuration_elastic_memory import ElasticMemoryConfig
from em_megatron.hf.weight_mapping import (
    ConversionError,
    check_complete,
    shapes_there,
    table,
    tensor_parallel_part,
    to_hugging_face,
    to_megatron,
)
from em_megatron.model.sizes import padded_vocab_size, shape_of
from em_megatron.training.setup import build_chunks, initialize_layout
from tests.hf.made_runs import KINDS, config_of

MODELS = {
    "plain": [],
    "tied, qk-norm": ["model.share_embeddings_and_output_weights=true", "model.qk_layernorm=true"],
    "many heads to one": ["model.num_attention_heads=6", "model.num_query_groups=2", "model.kv_channels=4"],
    **{kind: list(KINDS[kind]) for kind in ("infini, linear", "memorizing, top-k", "melodi")},
}


def parameters_of_rank(overrides: list[str]) -> dict[str, tuple[torch.Tensor, int | None]]:
    """This tensor rank's weights and Megatron's own word on how each is split."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    config = config_of("parallel.tensor_model_parallel_size=2", *overrides)
    model = build_chunks(config, initialize_layout(config), 100)[0]
    return {
        name: (p.detach(), p.partition_dim if getattr(p, "tensor_model_parallel", False) else None)
        for name, p in model.named_parameters()
    }


def whole_parameters(overrides: list[str]) -> dict[str, torch.Tensor]:
    from em_megatron.parallel.process_groups import shutdown

    try:
        config = config_of(*overrides)
        model = build_chunks(config, initialize_layout(config), 100)[0]
        return {name: p.detach() for name, p in model.named_parameters()}
    finally:
        shutdown()


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_megatrons(name, ranks):
    config = config_of(*MODELS[name])
    rows = table(config.model, padded_vocab_size(100, 128), config.memory)
    whole, parts = whole_parameters(MODELS[name]), ranks(2).run(parameters_of_rank, MODELS[name])
    assert {row.megatron: row.shape for row in rows} == {key: tuple(weight.shape) for key, weight in whole.items()}
    for row in rows:
        for rank, found in enumerate(parts):
            part, split = found[row.megatron]
            assert split == row.split, row.megatron
            assert torch.equal(tensor_parallel_part(row, whole[row.megatron], rank, 2), part), row.megatron


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name):
    config = config_of(*MODELS[name])
    shape = shape_of(config.model)
    for row in table(config.model, 128, config.memory):
        weight = torch.randn(row.shape)
        there = to_hugging_face(row, weight, shape)
        assert {key: tuple(part.shape) for key, part in there.items()} == shapes_there(row, shape)
        assert torch.equal(to_megatron(row, there, shape), weight)


def test_query_key_and_value_lie_by_key_value_head():
    config = config_of("model.num_attention_heads=6", "model.num_query_groups=2", "model.kv_channels=4")
    row = next(row for row in table(config.model, 128, config.memory) if row.layout == "qkv")
    at = torch.arange(row.shape[0])[:, None].expand(row.shape).float()
    query, key, value = (
        part[:, 0].view(-1, 4)[:, 0].tolist() for part in to_hugging_face(row, at, shape_of(config.model)).values()
    )
    assert query == [0, 4, 8, 20, 24, 28]
    assert key == [12, 32]
    assert value == [16, 36]


def test_what_does_not_match_is_named():
    expected = {"a": (2, 3), "b": (4,)}
    check_complete(expected, {"a": [2, 3], "b": [4]}, "it")
    for found, words in (
        ({"a": (2, 3)}, "1 tensors are missing, such as b"),
        ({**expected, "c": (1,)}, "1 tensors have no row in the table, such as c"),
        ({**expected, "a": (3, 2)}, r"a is \[3, 2\] instead of \[2, 3\]"),
    ):
        with pytest.raises(ConversionError, match=words):
            check_complete(expected, found, "it")


def test_every_field_of_a_recipe_has_a_place_there_or_is_left_out_on_purpose():
    fields = {field.name for section in (ModelConfig, MemoryConfig) for field in dataclasses.fields(section)}
    assert sorted([*MODEL, *MEMORY, *NOT_IN_HUGGING_FACE]) == sorted(fields)
    there = inspect.signature(ElasticMemoryConfig).parameters
    assert {*MODEL.values(), *MEMORY.values()} <= there.keys()
