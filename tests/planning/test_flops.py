"""Parameters and FLOPs of the plan against built models, as torch counts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from em_megatron.config import RunConfig, load_config
from em_megatron.hippo.cost_model import memory_cost
from em_megatron.model.initialization import initialize_weights
from em_megatron.model.language_model import build_model
from em_megatron.model.sizes import num_parameters
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.planning.buffers import chunk_parameters
from em_megatron.planning.job import Job
from em_megatron.planning.speed import model_flops_per_token, recomputed_share
from tests.one_rank import one_rank, tiny_config

VOCAB = 24
SHAPES = {
    "parallel": ("memory.superchunk=4", "data.sequence_length=32"),
    "superchunks of two": ("memory.superchunk=2", "data.sequence_length=32", "memory.layers=1"),
    "recurrent": ("memory.superchunk=1", "data.sequence_length=32"),
    "wide, query norms": ("memory.superchunk=4", "data.sequence_length=32", "model.qk_layernorm=true",
                          "model.num_query_groups=4", "model.ffn_hidden_size=64", "memory.slots=7"),
    "no memory": ("memory.kind=block_local", "data.sequence_length=32"),
}  # fmt: skip


def flash(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of the CPU's flash kernel, which torch's counter does not know, by the counter's own rule for attention."""
    return sdpa_flop_count(query, key, value)


def flash_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flash_backward,
}


def counted(config: RunConfig, model: torch.nn.Module) -> int:
    """FLOPs of a forward and a backward pass over one sample that is one document."""
    tokens = config.data.sequence_length
    ids = torch.randint(0, VOCAB, (1, tokens))
    layout = BlockLayout.single_document(1, tokens, config.memory.block_length)
    model(ids, None, None, labels=ids, packed_seq_params=layout)  # builds the memory's matrices
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        model(ids, None, None, labels=ids, packed_seq_params=layout).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_and_flops(shape):
    """The CPU's kernels do more than the plan's model FLOPs in two places, both known exactly; the rest is equal.

    Attention is counted over the whole square of a block, where the plan counts the triangle that is needed; and its
    backward pass as five products, of which one makes the scores again, where the plan counts the four of the
    gradient: 7 products over L + S keys against 6 over L/2 + S. A carry between superchunks is a full square here, where
    the plan counts its triangle.
    """
    config = tiny_config("memory.kernels=batched", *SHAPES[shape])
    job = Job(config, 1, VOCAB)
    with one_rank() as groups:
        model = build_model(config, job.vocab, groups.pg_collection)
        initialize_weights([model], seed=5, std=0.3, num_layers=2)
        found = counted(config, model)
    parameters = num_parameters(config.model, job.vocab)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.elements for p in chunk_parameters(job, 0, 0)) == parameters
    planned = model_flops_per_token(job) * job.tokens
    assert found == planned + attention_beyond_plan(job) + carries_beyond_plan(job)


def attention_beyond_plan(job: Job) -> int:
    memory, layers = job.config.memory, job.shape.num_layers
    per_key = 2 * job.shape.num_attention_heads * job.shape.kv_channels * job.tokens  # a product over one key a token
    keys = layers * memory.block_length, len(job.memory_layers) * memory.slots
    counted = 7 * per_key * sum(keys)
    return counted - 6 * per_key * keys[0] // 2 - 6 * per_key * keys[1]


def carries_beyond_plan(job: Job) -> int:
    """The upper half of the carry of every superchunk but the first, which has nothing to carry, and the last."""
    if not job.memory_layers:
        return 0
    order, carries = job.config.memory.order, max(0, job.blocks // job.superchunk - 2)
    channels = 2 * job.shape.num_query_groups * job.shape.kv_channels
    return len(job.memory_layers) * 2 * 2 * carries * (order**2 - order**2 // 2) * channels


def test_memory_cost_is_in_the_plan():
    """Four FLOPs for each multiply-add of the memory operator: forward, and backward once, for its matrices have no gradient."""
    config = tiny_config("data.sequence_length=32", "memory.superchunk=2")
    with_memory = Job(config, 1, VOCAB)
    without = Job(load_config(config, ["memory.layers=none"]), 1, VOCAB)
    difference = (model_flops_per_token(with_memory) - model_flops_per_token(without)) * 32
    channels = 2 * config.model.num_query_groups * config.model.kv_channels
    slots = 6 * 2 * 4 * 8 * 2 * 5 * 32  # three times two products, heads, d, layers, slots, tokens
    assert difference == pytest.approx(4 * 2 * channels * memory_cost(4, 2, 12, 5, 8) + slots)


@pytest.mark.parametrize(
    ("recompute", "low", "high"), [("none", 0, 0), ("selective", 0.005, 0.1), ("full", 0.25, 0.34)]
)
def test_recomputed_share(recompute, low, high):
    config = load_config("launch/recipes/pretrain_1b.yaml", [f"training.recompute={recompute}"])
    assert low <= recomputed_share(Job(config, 8, 32000)) <= high
