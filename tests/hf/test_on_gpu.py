"""The model that travels, on a GPU: the numbers of the CPU, and constant memory on the device."""

from __future__ import annotations

import pytest
import torch

from em_megatron.hf.cache_elastic_memory import ElasticMemoryCache
from tests.hf.tiny_model import GREEDY, KINDS, left_padded, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("changes", [{}, {"memory_order": 540}, *KINDS.values()], ids=str)
def test_logits_and_states_are_those_of_the_cpu(changes):
    model = make(dtype=torch.float32, block_length=64, **changes)
    ids = torch.randint(3, 50, (2, 300), generator=torch.Generator().manual_seed(0))
    caches = [ElasticMemoryCache(model.config) for _ in range(2)]
    with torch.no_grad():
        expected = model(ids, cache=caches[0]).logits
        found = model.cuda()(ids.cuda(), cache=caches[1]).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    for here, there in zip(*(cache.groups[0].layers for cache in caches), strict=True):
        for name, kept in here.tensors().items():
            limit = 1e-4 * max(1.0, float(kept.abs().max()))
            torch.testing.assert_close(there.tensors()[name].cpu(), kept, rtol=0, atol=limit)


@pytest.mark.parametrize("changes", [{}, *KINDS.values()], ids=str)
def test_generation_with_padding_beams_and_a_memory_from_the_disk(changes, tmp_path):
    model = make(dtype=torch.float32, **changes)
    ids = torch.randint(3, 50, (1, 37), generator=torch.Generator().manual_seed(0))
    batch, mask = left_padded(ids, ids[:, 9:])
    expected = [model.generate(batch, attention_mask=mask, **GREEDY, num_beams=beams) for beams in (1, 3)]
    model.cuda()
    for beams, wanted in zip((1, 3), expected, strict=True):
        found = model.generate(batch.cuda(), attention_mask=mask.cuda(), **GREEDY, num_beams=beams)
        assert torch.equal(found.cpu(), wanted)
    model.read(ids[:, :30]).save(tmp_path / "memory", model)
    again = model.generate_from(model.load_memory(tmp_path / "memory"), ids[:, 30:].cuda(), **GREEDY)
    assert torch.equal(again.cpu(), expected[0][:1, 30:])


@torch.no_grad()
def test_memory_on_the_device_is_constant():
    model = make(dtype=torch.bfloat16, block_length=512, memory_order=128).cuda()
    cache, held = ElasticMemoryCache(model.config), set()
    for _ in range(64):
        model.read(torch.randint(3, 50, (1, 4096)), cache)
        held.add(torch.cuda.memory_allocated())
    assert max(held) - min(held) <= 1 << 20
