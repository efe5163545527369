"""The other memory kinds in `transformers`: padding, pieces, saved memories, generation, and what may be changed."""

from __future__ import annotations

import pytest
import torch

from em_megatron.hf import kinds_elastic_memory
from em_megatron.hf.cache_elastic_memory import ElasticMemoryCache
from em_megatron.hf.kinds_elastic_memory import association_update, associations
from tests.conftest import FP64
from tests.hf.tiny_model import GREEDY, left_padded, make

KINDS = {
    "full": {"memory_kind": "full"},
    "transformer_xl": {"memory_kind": "transformer_xl"},
    "subsample": {"memory_kind": "subsample"},
    "infini": {"memory_kind": "infini", "memory_update": "delta"},
    "memorizing": {"memory_kind": "memorizing", "memory_pairs": 13, "memory_top_k": 3, "memory_layers": [1]},
    "melodi": {
        "memory_kind": "melodi",
        "memory_layers": [1],
        "memory_short_term_tokens": 3,
        "memory_long_term_tokens": 4,
        "memory_long_term_increment": 2,
    },
}
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


def test_rows_of_different_length_and_beams(model, ids):
    rows = (ids, ids[:, 10:], ids[:, 20:36])
    batch, mask = left_padded(*rows)
    for row, found in zip(rows, model.generate(batch, attention_mask=mask, num_beams=2, **GREEDY), strict=True):
        expected = model.generate(row, num_beams=2, **GREEDY)[0]
        assert torch.equal(found[batch.shape[1] - row.shape[1] :], expected)


def test_a_saved_memory_goes_on(model, ids, kind, tmp_path):
    cache = model.read(ids[:, :29])
    held = cache.num_bytes
    cache.save(tmp_path / "memory", model)
    loaded = model.load_memory(tmp_path / "memory")
    assert loaded.num_bytes == held
    expected = model.generate(ids, **GREEDY)[:, 29:]
    assert torch.equal(model.generate_from(loaded, ids[:, 29:], **GREEDY), expected)
    other = make(**{**KINDS[kind], "memory_kind": "elastic"})
    with pytest.raises(ValueError, match="other weights or blocks"):
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory_kind": "lstm"}, "memory_kind 'lstm' is unknown"),
        ({"memory_update": "other"}, "linear or delta"),
        ({"memory_top_k": -1}, "at least 0"),
        ({"memory_long_term_tokens": 33}, "not a multiple"),
    ],
)
def test_a_configuration_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_associations_stay_exact_under_autocast(update):
    """In bf16 a late block would add less than the matrix can tell from nothing."""
    generator = torch.Generator().manual_seed(0)
    kept, exact = (None, None), (None, None)
    for _ in range(40):
        key, value = (torch.randn(1, 2, 8, 6, generator=generator) for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16):
            kept = association_update(key, value, update, *kept)
        exact = association_update(key.double(), value.double(), update, *exact)
    query = torch.randn(1, 4, 8, 6, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        read = associations(query, *kept)
    for found, truth in ((kept[0], exact[0]), (kept[1], exact[1]), (read, associations(query.double(), *exact))):
        assert found.dtype == torch.float32
        assert (found - truth).norm() < 1e-5 * truth.norm()


def test_queries_in_parts_are_the_same(model, ids, monkeypatch):
    expected = model(ids).logits
    monkeypatch.setattr(kinds_elastic_memory, "QUERIES_AT_ONCE", 3)
    torch.testing.assert_close(model(ids).logits, expected, **FP64)
