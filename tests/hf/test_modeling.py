"""The model that travels with the weights: one computation however a text is cut, batched, searched or gone on with."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from em_megatron.hf.cache_elastic_memory import ElasticMemoryCache
from em_megatron.hf.configuration_elastic_memory import ElasticMemoryConfig
from em_megatron.hf.modeling_elastic_memory import CACHE, ElasticMemoryModel
from tests.conftest import FP64
from tests.hf.tiny_model import GREEDY, SHAPE, left_padded, make


@pytest.mark.parametrize("piece", [1, 3, 8, 13, 37])
@torch.no_grad()
def test_cached_equals_uncached(model, ids, piece):
    expected, cache = model(ids).logits, ElasticMemoryCache(model.config)
    found = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(piece, 1)], 1)
    torch.testing.assert_close(found, expected, **FP64)
    assert cache.tokens_read == [37]
    assert cache.get_seq_length() == 37


def test_with_a_gradient_the_numbers_are_the_same(model, ids):
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, **FP64)
    cache = model.read(ids[:, :11])  # buffers of a whole block, then a gradient from the middle of one
    torch.testing.assert_close(model(ids[:, 11:], cache=cache).logits, expected[:, 11:], **FP64)


@torch.no_grad()
@pytest.mark.parametrize("piece", [700, 1300])
def test_blocks_longer_than_the_queries_at_once(piece):
    """Query by query against the plain formula: one layer, one block of 1100 tokens and part of another."""
    model = make(num_hidden_layers=1, block_length=1100, memory_slots=3)
    ids = torch.randint(3, 50, (1, 1300), generator=torch.Generator().manual_seed(5))
    cache = ElasticMemoryCache(model.config)
    found = torch.cat([model(part, cache=cache).logits for part in ids.split(piece, 1)], 1)
    one_by_one, cache = [], ElasticMemoryCache(model.config)
    for token in ids.split(1, 1):
        one_by_one.append(model(token, cache=cache).logits)
    torch.testing.assert_close(found, torch.cat(one_by_one, 1), **FP64)


def test_generation(model, ids):
    expected = ids
    for _ in range(20):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)
    assert torch.equal(model.generate(ids, prefill_chunk_size=5, **GREEDY), expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beam_search(model, ids, options):
    cached, uncached = (model.generate(ids, use_cache=use, **GREEDY, **options) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_sampling(model, ids):
    found = []
    for use in (True, False):
        torch.manual_seed(3)
        found.append(model.generate(ids, use_cache=use, do_sample=True, top_k=0, max_new_tokens=20))
    assert torch.equal(*found)


def test_going_on_from_a_returned_cache(model, ids):
    expected = model.generate(ids, do_sample=False, max_new_tokens=30)
    first = model.generate(ids, do_sample=False, max_new_tokens=17, return_dict_in_generate=True)
    cache = first[CACHE]
    assert torch.equal(model.generate(first.sequences, **{CACHE: cache}, do_sample=False, max_new_tokens=13), expected)


def test_reading_once_and_asking_often(model, ids):
    whole, stream = model.read(ids[:, :30]), model.read(ids[:, :30].split(7, 1))
    expected = model.generate(ids, **GREEDY)[:, 30:]
    for cache in (whole, stream, whole):
        assert torch.equal(model.generate_from(cache, ids[:, 30:], **GREEDY), expected)
    beams = model.generate(ids, num_beams=3, **GREEDY)[:, 30:]
    assert torch.equal(model.generate_from(whole, ids[:, 30:], num_beams=3, **GREEDY), beams)
    two = torch.cat([ids[:, 30:], ids[:, :7]])  # a batch of questions on one text
    other = model.generate(torch.cat([ids[:, :30], ids[:, :7]], 1), **GREEDY)[:, 30:]
    assert torch.equal(model.generate_from(whole, two, **GREEDY), torch.cat([expected, other]))


def test_rows_of_different_length(model, ids):
    rows = (ids, ids[:, 10:], ids[:, 20:36])
    batch, mask = left_padded(*rows)
    alone = [model(row).logits for row in rows]
    found = model(batch, attention_mask=mask).logits
    for row, (expected, got) in enumerate(zip(alone, found, strict=True)):
        torch.testing.assert_close(got[mask[row] == 1], expected[0], **FP64)
    for options in (GREEDY, {**GREEDY, "num_beams": 2}, {**GREEDY, "prefill_chunk_size": 6}):
        found = model.generate(batch, attention_mask=mask, **options)
        for row, expected in enumerate(model.generate(row, **options) for row in rows):
            assert torch.equal(found[row, batch.shape[1] - rows[row].shape[1] :], expected[0])


def test_padding_on_the_right_is_read_but_not_gone_on_from(model, ids):
    batch, mask = left_padded(ids, ids[:, 10:])
    right = batch.clone()
    right[1] = batch[1].roll(-10)
    found = model(right, attention_mask=mask.flip(1)).logits
    torch.testing.assert_close(found[1, :27], model(ids[:, 10:]).logits[0], **FP64)
    with pytest.raises(ValueError, match="padding_side"):
        model.generate(right, attention_mask=mask.flip(1), **GREEDY)


@torch.no_grad()
def test_constant_memory(model):
    cache, held = ElasticMemoryCache(model.config), {}
    generator = torch.Generator().manual_seed(0)
    model = make(dtype=torch.float32, block_length=1024, num_hidden_layers=1)
    cache = ElasticMemoryCache(model.config)
    for read in range(4096, 262144 + 1, 4096):
        model.read(torch.randint(3, 50, (1, 4096), generator=generator), cache)
        held[read] = cache.num_bytes
    assert held[4096] == held[262144]
    assert set(held.values()) == {held[4096]}
    assert cache.tokens_read == [262144]


def test_an_interrupted_call_can_be_made_again(model, ids, monkeypatch):
    batch, mask = left_padded(ids, ids[:, 10:])
    expected = model(batch, attention_mask=mask).logits[:, 20:]
    cache = ElasticMemoryCache(model.config)
    with torch.no_grad():
        model(batch[:, :20], attention_mask=mask[:, :20], cache=cache)
        for fails_at in (1, 2, 4, 6):  # calls of the second layer: within either row, at a block's end or before it
            calls = 0
            forward = type(model.model.layers[1]).forward

            def interrupted(self, *arguments, at=fails_at, plain=forward):
                nonlocal calls
                calls += self is model.model.layers[1]
                if calls == at:
                    raise KeyboardInterrupt
                return plain(self, *arguments)

            with monkeypatch.context() as patch:
                patch.setattr(type(model.model.layers[1]), "forward", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    model(batch[:, 20:], attention_mask=mask, cache=cache)
        found = model(batch[:, 20:], attention_mask=mask, cache=cache).logits
    torch.testing.assert_close(found, expected, **FP64)


def test_set_memory(model, ids):
    other = make(memory_order=7, memory_slots=3, memory_sampler="uniform")
    other.load_state_dict(model.state_dict())
    cache = model.read(ids[:, :20])
    before = model.generate_from(cache, ids[:, 20:], **GREEDY)
    assert model.set_memory(order=7, slots=3, sampler="uniform") is model
    torch.testing.assert_close(model(ids).logits, other(ids).logits, **FP64)
    assert torch.equal(model.generate(ids, **GREEDY), other.generate(ids, **GREEDY))
    # A memory read at the higher order goes on at the lower one, as if it had been read so, as far as one layer sees.
    cut = cache.copy()
    model(ids[:, 20:24], cache=cut)
    direct = other.read(ids[:, :24])
    ours, theirs = (c.groups[0].layers[0] for c in (cut, direct))
    torch.testing.assert_close(ours.state, theirs.state, **FP64)
    torch.testing.assert_close(ours.slots, theirs.slots, **FP64)
    assert cache.groups[0].layers[0].state.shape[2] == 12
    model.set_memory(order=12, slots=5, sampler="exponential")
    assert torch.equal(model.generate_from(cache, ids[:, 20:], **GREEDY), before)
    with pytest.raises(ValueError, match="too small for order 12"):
        model(ids[:, 24:], cache=cut)
    model.set_memory(points=[0.2, 0.9])
    assert (model.config.memory_slots, model.config.memory_sampler) == (2, "points")


def test_set_memory_refuses_and_keeps(model, ids):
    expected = model(ids).logits
    for wrong in (
        {"order": 0},
        {"order": 3.5},
        {"slots": 0},
        {"sampler": "random"},
        {"sampler_a": -1.0},
        {"sampler": "window", "sampler_lo": 0.7, "sampler_hi": 0.2},
        {"points": [0.5, 0.1]},
        {"sampler": "points"},
    ):
        with pytest.raises(ValueError, match=r"\w"):
            model.set_memory(**wrong)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


def test_saving_and_loading_a_memory(model, ids, tmp_path):
    batch, mask = left_padded(ids[:, :30], ids[:, 5:19])
    cache = model.read(batch, attention_mask=mask)
    torch.save(cache, tmp_path / "pickled")
    pickled = torch.load(tmp_path / "pickled", weights_only=False)
    (tmp_path / "pickled").unlink()
    in_two = model.read(batch[:, 19:], model.read(batch[:, :19], attention_mask=mask[:, :19]), attention_mask=mask)
    cache.save(tmp_path / "memory.safetensors", model)
    again = ElasticMemoryCache.load(tmp_path / "memory.safetensors", model)
    question = torch.cat([ids[:, 30:], ids[:, 30:]])
    expected = model.generate_from(cache, question, **GREEDY)
    for other in (again, pickled, in_two):
        assert torch.equal(model.generate_from(other, question, **GREEDY), expected)
        assert (other.columns, other.tokens_read) == (30, [30, 14])
    assert torch.equal(expected[:1], model.generate(ids, **GREEDY)[:, 30:])
    assert again.tokens_read == [30, 14]
    changed = copy.deepcopy(model)
    torch.nn.init.zeros_(changed.model.layers[1].mlp.down_proj.weight)
    for other in (make(seed=1), changed, make(block_length=4)):
        with pytest.raises(ValueError, match="other weights"):
            ElasticMemoryCache.load(tmp_path / "memory.safetensors", other)
    whole = (tmp_path / "memory.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no whole memory"):
        ElasticMemoryCache.load(tmp_path / "cut.safetensors", model)
    with pytest.raises(FileNotFoundError, match="no file"):
        ElasticMemoryCache.load(tmp_path / "none.safetensors", model)
    assert {path.name for path in tmp_path.iterdir()} == {"memory.safetensors", "cut.safetensors"}


def test_refusals(model, ids):
    for options, words in (
        ({"cache_implementation": "static"}, "cannot hold a memory"),
        ({"assistant_model": make()}, "stateful"),
        ({"prompt_lookup_num_tokens": 2}, "stateful"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(ids, **GREEDY, **options)
    with pytest.raises(ValueError, match="cannot be cropped"):
        model.read(ids).crop(3)
    with pytest.raises(ValueError, match="does not fit a batch of 3"):
        model(ids.repeat(3, 1), cache=model.read(ids.repeat(2, 1)))
    with pytest.raises(ValueError, match="marks padding"):
        model(ids, attention_mask=torch.ones(1, 1, 37, 37))
    with pytest.raises(ValueError, match="not kept"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="DynamicCache cannot hold a memory"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="use_cache=False would read the text again"):
        model.generate_from(model.read(ids), ids, use_cache=False, **GREEDY)
    with pytest.raises(ValueError, match="read each other's memory"):
        model(ids, position_ids=torch.arange(37)[None] % 20)
    with pytest.raises(ValueError, match="without padding"):
        model.read([ids], attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"memory_layers": [2]}, "does not fit 2 layers"),
        ({"memory_discretization": "none"}, "unknown"),
        ({"memory_order": 0}, "at least 1"),
        ({"memory_order": 3.5}, "whole number"),
        ({"memory_slots": True}, "whole number"),
    ],
)
def test_a_configuration_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        ElasticMemoryConfig(**{**SHAPE, **changes})


def test_save_pretrained_again(exported, tmp_path, ids):
    from transformers import AutoModel, AutoModelForCausalLM

    first = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    with pytest.raises(ValueError, match="memory_sampler 'random' is unknown"):
        AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, memory_sampler="random")
    first.set_memory(order=5, sampler="uniform")
    first.save_pretrained(tmp_path / "again")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert type(second).__module__.startswith("transformers_modules")
    assert (second.config.memory_order, second.config.memory_sampler) == (5, "uniform")
    torch.testing.assert_close(second(ids).logits, first(ids).logits, rtol=0, atol=0)
    body = AutoModel.from_pretrained(exported, trust_remote_code=True)
    assert type(body).__name__ == ElasticMemoryModel.__name__
    assert isinstance(second.generation_config, GenerationConfig)
