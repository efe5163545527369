"""The Megatron model: sizes, documents, and decoding against training."""

from __future__ import annotations

import pytest
import torch

from em_megatron.config import ModelConfig
from em_megatron.model.initialization import initialize_weights
from em_megatron.model.language_model import build_model, memory_cache
from em_megatron.model.sizes import SIZES, apply_size, memory_parameters, num_parameters, padded_vocab_size
from em_megatron.ops.block_layout import BlockLayout
from tests.one_rank import one_rank, tiny_config

VOCAB = 24
# Logits of order 1 in fp32 after two layers: a few hundred roundings of 6e-8.
FP32 = {"rtol": 0.0, "atol": 2e-5}


@pytest.fixture(scope="module")
def layout():
    with one_rank() as groups:
        yield groups


def build(layout, *overrides: str) -> torch.nn.Module:
    config = tiny_config(*overrides)
    model = build_model(config, VOCAB, layout.pg_collection)
    initialize_weights([model], seed=5, std=0.3, num_layers=2)
    return model.eval()


def logits_of(model: torch.nn.Module, tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, None, None, packed_seq_params=BlockLayout.from_segment_ids(segments, 8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_is_that_of_the_built_model(layout, size, tied):
    config = tiny_config()
    config.model = ModelConfig(size=size, share_embeddings_and_output_weights=tied, qk_layernorm=tied)
    apply_size(config.model)
    vocab = padded_vocab_size(32000, config.model.make_vocab_size_divisible_by)
    with torch.device("meta"):
        model = build_model(config, vocab, layout.pg_collection)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config.model, vocab)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("memory.sampler=exponential", "memory.superchunk=2", "model.qk_layernorm=true"),
        ("memory.layers=1", "memory.order=3"),
        ("memory.kind=block_local",),
        ("memory.kind=full", "memory.layers=1"),
        ("memory.kind=transformer_xl",),
        ("memory.kind=subsample", "memory.sampler=exponential"),
        ("memory.kind=infini", "memory.update=delta"),
        ("memory.kind=memorizing", "memory.pairs=13", "memory.top_k=3"),
    ],
    ids=[
        "elastic",
        "exponential, superchunks, qk norm",
        "one memory layer",
        "block local",
        "full",
        "transformer xl",
        "subsample",
        "infini",
        "memorizing",
    ],
)
@pytest.mark.parametrize("chunks", [[40], [1] * 40, [13, 1, 1, 9, 16]], ids=["at once", "one by one", "odd pieces"])
def test_decoding_equals_training(layout, overrides, chunks):
    model = build(layout, *overrides)
    tokens = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = logits_of(model, tokens, torch.ones(2, 40, dtype=torch.int32))
    cache, pieces = memory_cache(model, batch_size=2), []
    with torch.no_grad():
        for piece in tokens.split(chunks, dim=1):
            pieces.append(model(piece, None, None, inference_context=cache, runtime_gather_output=True))
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **FP32)


@pytest.mark.parametrize("kind", ["infini", "memorizing"])
def test_parameters_of_a_kind_are_counted_and_split_by_heads(layout, kind):
    config = tiny_config(f"memory.kind={kind}", "memory.layers=all")
    model = build_model(config, VOCAB, layout.pg_collection)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config.model, VOCAB, config.memory)
    own = {name: p for name, p in model.named_parameters() if "core_attention" in name}
    assert sum(p.numel() for p in own.values()) == memory_parameters(config.model, config.memory) > 0
    for name, parameter in own.items():
        assert parameter.tolist() == 4 * [1.0 if name.endswith("scale") else 0.0]
        assert parameter.tensor_model_parallel


@pytest.mark.parametrize("overrides", [(), ("memory.kind=infini",), ("memory.kind=memorizing", "memory.pairs=16"),
                                       ("memory.kind=transformer_xl",)], ids=["elastic", "infini", "memorizing", "xl"])  # fmt: skip
def test_memory_of_a_generation_is_constant(layout, overrides):
    model = build(layout, *overrides)
    cache, sizes = memory_cache(model, batch_size=1), []
    with torch.no_grad():
        for _ in range(6):
            model(torch.ones(1, 16, dtype=torch.long), None, None, inference_context=cache, runtime_gather_output=True)
            sizes.append(cache.num_bytes)
    assert len(set(sizes)) == 1


def test_changing_one_document_leaves_the_others_bit_identical(layout):
    model = build(layout)
    segments = torch.tensor([[1] * 19 + [2] * 3 + [0] * 2 + [3] * 5 + [4] * 3 + [5] * 8, [1] * 40], dtype=torch.int32)
    tokens = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    before = logits_of(model, tokens, segments)
    for document in (1, 2, 3, 4, 5):
        mine = (segments == document) & (torch.arange(2)[:, None] == 0)
        changed = torch.where(mine, (tokens + 7) % VOCAB, tokens)
        after = logits_of(model, changed, segments)
        assert torch.equal(after[~mine], before[~mine]), f"document {document} leaks"
        assert not torch.equal(after[mine], before[mine])


def test_the_memory_reaches_beyond_the_block(layout):
    tokens = torch.randint(VOCAB, (1, 40), generator=torch.Generator().manual_seed(2))
    other = tokens.clone()
    other[0, :8] = (other[0, :8] + 5) % VOCAB
    one_document = torch.ones(1, 40, dtype=torch.int32)
    reaching = {
        "elastic": True,
        "block_local": False,
        "full": True,
        "subsample": True,
        "infini": True,
        "memorizing": True,
    }
    for kind, reaches in reaching.items():
        model = build(layout, f"memory.kind={kind}")
        last = [logits_of(model, t, one_document)[0, 32:] for t in (tokens, other)]
        assert (not torch.equal(*last)) == reaches, kind


def test_detached_memory_stops_the_gradient(layout):
    tokens = torch.randint(VOCAB, (1, 40), generator=torch.Generator().manual_seed(3))
    whole = BlockLayout.single_document(1, 40, 8)
    for detach in (False, True):
        model = build(layout, f"memory.detach_memory={detach}", "memory.layers=1")
        grads = []
        hook = model.embedding.word_embeddings.register_forward_hook(
            lambda module, args, out, grads=grads: out.register_hook(grads.append) and None
        )
        model(tokens, None, None, packed_seq_params=whole)[0, 32:].sum().backward()
        hook.remove()
        assert grads[0].abs().sum(-1).reshape(-1)[:8].any() != detach


def test_kernels_train_the_same_model(layout):
    """Logits and every gradient by name with Triton's kernels (in its interpreter) and with batched PyTorch."""
    segments = torch.tensor([[1] * 19 + [2] * 5 + [3] * 16])
    tokens = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    found = {}
    for kernels in ("batched", "triton"):
        model = build(layout, f"memory.kernels={kernels}", "memory.superchunk=2", "model.num_attention_heads=2",
                      "model.num_query_groups=1").train()  # fmt: skip
        logits = model(tokens, None, None, packed_seq_params=BlockLayout.from_segment_ids(segments, 8))
        logits.logsumexp(-1).sum().backward()
        gradients = {f"gradient of {name}": x.grad for name, x in model.named_parameters()}
        found[kernels] = {"logits": logits.detach(), **gradients}
    assert len(found["triton"]) > 10
    for name, truth in found["batched"].items():
        error = (found["triton"][name] - truth).norm() / truth.norm()
        assert error < 2e-5, f"{name}: relative error {error:.1e}"
