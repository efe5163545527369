"""Formulas of FLOPs against torch's own counter, and against masks written out."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from em_megatron.benchmark.floors import (
    Heads,
    MemorySizes,
    attention_flops,
    attention_work,
    layer_work,
    matrix_elements,
    memory_work,
    trapezoid_pairs,
)
from em_megatron.benchmark.peers import FLEX_TILE, causal_attention, flex_mask, per_token_recurrence
from em_megatron.hippo.banks import MemoryBanks
from em_megatron.hippo.cost_model import bank_elements
from em_megatron.hippo.samplers import uniform
from em_megatron.model.initialization import initialize_weights
from em_megatron.model.language_model import build_model
from em_megatron.model.sizes import flops_per_token, shape_of
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.memory import block_memory, memory_write
from tests.one_rank import one_rank, tiny_config

HEADS = Heads(query=4, kv=2, dim=8, itemsize=4)


def trapezoid(tokens: int, block: int, slots: int) -> torch.Tensor:
    """[T, B·S + T] bool, slots of all blocks first, written out query by query."""
    blocks = tokens // block
    mask = torch.zeros(tokens, blocks * slots + tokens, dtype=torch.bool)
    for query in range(tokens):
        own = query // block
        mask[query, own * slots : (own + 1) * slots] = own > 0
        mask[query, blocks * slots + own * block : blocks * slots + query + 1] = True
    return mask


def test_pairs_are_those_of_the_mask():
    assert trapezoid_pairs(24, 8, 5) == trapezoid(24, 8, 5).sum()
    assert trapezoid_pairs(24, 24, 5) == 24 * 25 // 2  # one block: causal attention


def test_mask_of_flex_attention_is_the_trapezoid():
    tokens, block, slots = 4 * FLEX_TILE, 2 * FLEX_TILE, FLEX_TILE
    mask, wanted = flex_mask(tokens, block, slots, torch.device("cpu")), trapezoid(tokens, block, slots)
    queries, keys = torch.arange(wanted.shape[0])[:, None], torch.arange(wanted.shape[1])[None]
    assert torch.equal(mask.mask_mod(0, 0, queries, keys), wanted)
    tiles = wanted.unflatten(0, (-1, FLEX_TILE)).unflatten(2, (-1, FLEX_TILE))
    some, all_ = tiles.any(3).any(1), tiles.all(3).all(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), some)
    assert torch.equal(mask.kv_num_blocks[0, 0].long(), (some & ~all_).sum(-1))
    assert torch.equal(mask.full_kv_num_blocks[0, 0].long(), all_.sum(-1))


def test_attention_flops_are_those_torch_counts():
    query, key = (1, 4, 24, 8), (1, 4, 40, 8)
    forward = sdpa_flop_count(query, key, key)
    assert attention_flops(24 * 40, HEADS, backward=False) == forward
    assert attention_flops(24 * 40, HEADS, backward=True) == forward + sdpa_backward_flop_count(query, query, key, key)


def test_attention_moves_inputs_and_outputs_once():
    queries, keys = 24 * 4 * 8, 40 * 2 * 8
    assert attention_work(24, 40, 1, HEADS, backward=False).bytes == 4 * (2 * queries + 2 * keys)
    # once more backward, with the gradient of the output, and three gradients
    assert attention_work(24, 40, 1, HEADS, backward=True).bytes == 4 * (6 * queries + 6 * keys)


@pytest.mark.parametrize("superchunk", [8, 2, 1])
@pytest.mark.parametrize("backward", [False, True])
def test_memory_flops_are_those_of_its_products(superchunk, backward):
    sizes = MemorySizes(order=6, slots=4, block=16, tokens=128, superchunk=superchunk)
    banks, layout = MemoryBanks(6, 16, uniform(4)), BlockLayout.single_document(1, 128, 16)
    key, value = (torch.randn(128, 1, 2, 8, requires_grad=True) for _ in range(2))

    def run() -> None:
        slots = block_memory(key, value, layout, banks, superchunk, "batched").slots()
        if backward:
            torch.autograd.grad(slots, [key, value], [torch.ones_like(x) for x in slots])

    run()  # builds the matrices
    with FlopCounterMode(display=False) as counter:
        run()
    channels, carries = 2 * 2 * 8, len(range(superchunk, 128 // 16 - superchunk, superchunk))
    full_squares = 2 * channels * carries * (36 - 18) * (2 if backward else 1)  # a carry is counted as a triangle
    assert counter.get_total_flops() == memory_work(sizes, HEADS, backward).flops + full_squares


def test_matrices_are_the_banks_without_their_zeros():
    for superchunk in (1, 2, 4, 8):
        stored = bank_elements(8, superchunk, 6, 4, 16)
        carries = len(range(superchunk, 8 - superchunk, superchunk))
        assert matrix_elements(8, superchunk, 6, 4, 16) == stored - carries * 15


def test_the_recurrence_token_by_token_is_the_memory():
    signal = torch.randn(12, 1, 2, 4, dtype=torch.float64)
    state = per_token_recurrence(5, signal, tokens=4, tokens_before=0)()
    wanted = memory_write(torch.zeros(5, 1, 2, 4, dtype=torch.float64), signal[:4], 0)
    torch.testing.assert_close(state, wanted.flatten(1))


def test_the_peer_is_causal_attention():
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    scores = query @ key.repeat_interleave(2, 1).mT / 8**0.5
    scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), float("-inf"))
    torch.testing.assert_close(causal_attention(query, key, value), scores.softmax(-1) @ value.repeat_interleave(2, 1))


def counted(function) -> int:
    """FLOPs of matrix products, and of the CPU's attention kernel on the whole square that it is asked for."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    with FlopCounterMode(display=False, custom_mapping={flash: attention}) as counter:
        function()
    return counter.get_total_flops()


def test_layers_and_models_are_counted_as_torch_counts_them():
    config = tiny_config("memory.kind=block_local")
    shape, tokens, block = shape_of(config.model), 40, 8
    layout, ids = BlockLayout.single_document(1, tokens, block), torch.randint(0, 24, (1, tokens))
    with one_rank() as groups:
        model = build_model(config, 24, groups.pg_collection)
        initialize_weights([model], 1, 0.02, 2)

        def run(backward: bool) -> None:
            loss = model(ids, None, None, labels=ids, packed_seq_params=layout).sum()
            if backward:
                loss.backward()

        run(False)
        forward, both = counted(lambda: run(False)), counted(lambda: run(True))
    square = 4 * 4 * 8 * block * tokens * 2  # 4·d·hq·L per token, two layers
    output = 2 * 24 * 32 * tokens
    # flops_per_token counts half of the square, forward and twice backward; the kernel's backward is not counted here.
    exact = flops_per_token(config.model, config.memory, 24, tokens) * tokens
    assert forward - square == pytest.approx(exact / 3 - square / 2)
    assert both - square == pytest.approx(exact - 3 * square / 2)
    sizes = MemorySizes(1, 0, block, tokens)
    triangle = attention_flops(trapezoid_pairs(tokens, block, 0), Heads(4, 2, 8, 4), backward=False)
    assert forward - square - output == 2 * (layer_work(shape, tokens, sizes, 4, backward=False).flops - triangle)
    assert both - square - 3 * output == 2 * (layer_work(shape, tokens, sizes, 4, backward=True).flops - 3.5 * triangle)
