"""The other memory kinds in `transformers`: padding, pieces, saved memories, generation, and what may be changed."""

from __future__ import annotations

import pytest
import torch

from em_megatron.config import ConfigError
from em_megatron.hf import kinds_elastic_memory
from em_megatron.hf.cache_elastic_memory import ElasticMemoryCache
from em_megatron.hf.generation import TransformersText
from em_megatron.hf.modeling_elastic_memory import ElasticMemoryForCausalLM
from tests.conftest import FP64
from tests.hf.tiny_model import GREEDY, KINDS, left_padded, make

GROWING = ("full", "subsample")


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return make(**KINDS[kind])


def test_pieces_equal_the_whole(model, ids):
    expected = model(ids).logits
    for sizes in ([1] * 37, [13, 1, 2, 21]):
        cache = ElasticMemoryCache(model.config)
        found = [model(part, cache=cache, use_cache=True).logits for part in ids.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(found, 1), expected, **FP64)


def test_gradients_of_pieces_equal_those_of_the_whole(model, ids):
    parameters = dict(model.named_parameters())
    whole = torch.autograd.grad(model(ids).logits.logsumexp(-1).sum(), list(parameters.values()))
    cache, total = ElasticMemoryCache(model.config), torch.zeros((), dtype=torch.float64)
    for part in ids.split([11, 26], 1):
        total = total + model(part, cache=cache, use_cache=True).logits.logsumexp(-1).sum()
    pieces = torch.autograd.grad(total, list(parameters.values()))
    for name, expected, found in zip(parameters, whole, pieces, strict=True):
        torch.testing.assert_close(found, expected, **FP64, msg=lambda m, name=name: f"{name}: {m}")
        assert expected.abs().max() > 0, name


def test_training_over_successive_calls(model, ids):
    """A cache that was detached gives the same numbers and no gradient of what was read before."""
    cache = ElasticMemoryCache(model.config)
    first = model(ids[:, :20], cache=cache, use_cache=True).logits
    first.sum().backward()
    second = model(ids[:, 20:], cache=cache.detach(), use_cache=True).logits
    torch.testing.assert_close(second, model(ids).logits[:, 20:], **FP64)
    second.sum().backward()


def test_gradients_survive_recomputation(model, ids, kind):
    again = make(**KINDS[kind]).train()
    getattr(again, "activation_checkpointing_enable", again.gradient_checkpointing_enable)()
    calls = []
    for each in (model, again):
        hook = each.model.layers[0].post_attention_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))
        each.zero_grad()
        each(ids, labels=ids).loss.backward()
        hook.remove()
        calls.append(0)
    assert calls == [1] * 5 + [0] + [1] * 10 + [0]  # five blocks, and then each of them twice
    for (name, expected), found in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, **FP64, msg=lambda m, name=name: f"{name}: {m}")


def test_many_queries_go_part_by_part(model, ids, monkeypatch):
    expected = model(ids).logits
    monkeypatch.setattr(kinds_elastic_memory, "QUERIES_AT_ONCE", 3)
    torch.testing.assert_close(model(ids).logits, expected, **FP64)


def test_rows_of_different_length_and_beams(model, ids):
    rows = (ids, ids[:, 10:], ids[:, 20:36])
    batch, mask = left_padded(*rows)
    for row, found in zip(rows, model.generate(batch, attention_mask=mask, num_beams=2, **GREEDY), strict=True):
        expected = model.generate(row, num_beams=2, **GREEDY)[0]
        assert torch.equal(found[batch.shape[1] - row.shape[1] :], expected)


def test_a_saved_memory_goes_on(model, ids, kind, tmp_path):
    rows = (ids[:, :29], ids[:, 5:21])  # one within a block, one at its end
    batch, mask = left_padded(*rows)
    cache = model.read(batch, attention_mask=mask)
    held = cache.num_bytes
    cache.save(tmp_path / "memory", model)
    loaded = model.load_memory(tmp_path / "memory")
    assert (loaded.num_bytes, loaded.tokens_read) == (held, [29, 16])
    question = ids[:, 29:]
    expected = torch.cat([model.generate(torch.cat([row, question], 1), **GREEDY)[:, row.shape[1] :] for row in rows])
    assert torch.equal(model.generate_from(loaded, torch.cat([question] * 2), **GREEDY), expected)
    other = make(**{**KINDS[kind], "memory_kind": "elastic"})
    with pytest.raises(ValueError, match="other weights, blocks or sizes"):
        other.load_memory(tmp_path / "memory")


def test_what_is_kept(model, kind):
    sizes, cache = [], ElasticMemoryCache(model.config)
    for _ in range(6):
        model.read(torch.full((1, 8), 5), cache)
        sizes.append(cache.num_bytes)
    assert (sizes[-1] > sizes[-2]) == (kind in GROWING)


def test_readers_that_a_kind_does_not_have_are_refused(kind):
    model = make(**KINDS[kind])
    with pytest.raises(ValueError, match="has no memory_order"):
        model.set_memory(order=4)
    if kind == "subsample":
        model.set_memory(sampler="uniform", slots=2)
    else:
        with pytest.raises(ValueError, match="has no memory_sampler"):
            model.set_memory(sampler="uniform")
    if kind == "memorizing":
        model.set_memory(pairs=30, top_k=0)
    else:
        with pytest.raises(ValueError, match="has no memory_pairs"):
            model.set_memory(pairs=30)


def test_the_command_line_refuses_them_too(tmp_path):
    make(**KINDS["infini"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'infini' has no memory_top_k: leave it out"):
        TransformersText(tmp_path, ["memory.top_k=2"])


@torch.no_grad()
def test_a_sampler_or_pairs_exchanged_after_reading(ids):
    for kind, before, after in (
        ("subsample", {"slots": 5}, {"slots": 2, "sampler": "uniform"}),
        ("memorizing", {"pairs": 13, "top_k": 3}, {"pairs": 5, "top_k": 0}),
    ):
        model = make(**{**KINDS[kind], "memory_layers": [1]}).set_memory(**before)  # what it keeps no memory decides
        cache = model.read(ids[:, :20])
        model.set_memory(**after)
        torch.testing.assert_close(model(ids[:, 20:], cache=cache).logits, model(ids).logits[:, 20:], **FP64)


def test_going_on_with_another_memory(kind, ids, tmp_path):
    """Weights that lack the parameters of a kind get those with which its training begins, not chance."""
    make().save_pretrained(tmp_path)
    model = ElasticMemoryForCausalLM.from_pretrained(tmp_path, **KINDS[kind])
    fresh = dict(make(**KINDS[kind]).named_parameters())
    for name, weight in model.named_parameters():
        if "gate" in name or "scale" in name or "bias" in name or name.endswith("mixer_norm.weight"):
            assert torch.equal(weight, fresh[name]) or "gate_proj" in name, name
        elif "mixer" in name or "summary" in name:
            assert 0.2 < weight.std() < 0.4, name
    assert model(ids, labels=ids).loss.isfinite()


def test_without_a_memory(ids):
    """Two names for one model: that of folders, and its own."""
    named, layerless = make(memory_kind="block_local"), make(memory_layers=[])
    torch.testing.assert_close(named(ids).logits, layerless(ids).logits, **FP64)
    assert torch.equal(named.generate(ids, **GREEDY), layerless.generate(ids, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("how", ["bf16", "autocast"])
@pytest.mark.parametrize("update", ["linear", "delta"])
def test_associations_are_exact_in_low_precision(how, update):
    low = {"memory_kind": "infini", "memory_update": update, "num_hidden_layers": 1}
    model = make(**low, dtype=torch.bfloat16 if how == "bf16" else torch.float32)
    cache, matrix, normalizer, errors = ElasticMemoryCache(model.config), None, None, []
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            model(torch.randint(3, 50, (1, 7), generator=generator), cache=cache)
            own = {name: x.clone() for name, x in cache.groups[0].layers[0].kept.items()}
            last = torch.randint(3, 50, (1, 1), generator=generator)
            _, *pair = model.model.layers[0].self_attn.project(
                model.model.layers[0].input_layernorm(model.model.embed_tokens(last))
            )
            model(last, cache=cache)
        key, value = (torch.cat([own[name], x], 2).double() for name, x in zip(("keys", "values"), pair, strict=True))
        matrix, normalizer = kinds_elastic_memory.association_update(key, value, update, matrix, normalizer)
        kept = cache.groups[0].layers[0].kept
        assert {kept["matrix"].dtype, kept["normalizer"].dtype} == {torch.float32}
        errors.append(float((kept["matrix"] - matrix).norm() / matrix.norm()))
    assert max(errors) < 1e-5  # in bf16 late blocks would be lost


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory_kind": "lstm"}, "memory_kind 'lstm' is unknown"),
        ({"memory_update": "other"}, "linear or delta"),
        ({"memory_top_k": -1}, "at least 0"),
        ({"memory_kind": "melodi", "memory_long_term_tokens": 33}, "not a multiple"),
    ],
)
def test_a_configuration_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)
