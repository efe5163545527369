"""Melodi against a written-out reference, window by window; decoding, documents, a case worked out by hand, sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from em_megatron.hf.melodi_elastic_memory import mix_tokens
from em_megatron.model.initialization import initialize_weights
from em_megatron.model.language_model import build_model, memory_cache
from em_megatron.model.sizes import memory_parameters, num_parameters
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.melodi import Windows
from tests.conftest import FP64
from tests.one_rank import one_rank, tiny_config

VOCAB, WINDOW, TOKENS = 24, 8, 3
MELODI = (
    "memory.kind=melodi",
    "model.num_layers=3",
    f"memory.short_term_tokens={TOKENS}",
    "memory.long_term_increment=2",
    "memory.long_term_tokens=4",
)
SEGMENTS = torch.tensor([[1] * 40, [1] * 19 + [2] * 3 + [0] * 2 + [3] * 5 + [4] * 3 + [5] * 8], dtype=torch.int32)
DOCUMENTS = [(0, 0, 40), (1, 0, 19), (1, 19, 22), (1, 24, 29), (1, 29, 32), (1, 32, 40)]


@pytest.fixture(scope="module")
def layout():
    with one_rank() as groups:
        yield groups


def build(layout, *overrides: str):
    """In fp64, every vector (norms, biases, gates) with numbers of its own."""
    config = tiny_config(*MELODI, *overrides)
    model = build_model(config, VOCAB, layout.pg_collection)
    initialize_weights([model], seed=5, std=0.3, num_layers=3)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return config, model.double().eval()


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


class Reference:
    """One document, window after window, each through all layers; weights by Megatron's names."""

    def __init__(self, config, weights: dict[str, Tensor]) -> None:
        self.config, self.weights, self.layers = config, weights, config.model.num_layers
        self.heads, self.groups, self.dim = (
            config.model.num_attention_heads,
            config.model.num_query_groups,
            config.model.kv_channels,
        )
        self.short: list[Tensor | None] = [None] * self.layers  # [S, D] before norm
        self.long: dict[int, list[Tensor]] = {}  # of a long-term layer: tokens [L_inc, D], newest last

    def logits(self, tokens: Tensor) -> Tensor:
        w, out = self.weights, []
        for window in tokens.split(WINDOW):
            x, u = w["embedding.word_embeddings.weight"][window], w["decoder.summary_tokens.weight"]
            for layer in range(self.layers):
                x, u = self.layer(layer, x, u, len(window) == WINDOW)
            out.append(self.norm("decoder.final_norm.weight", x))
        return torch.cat(out) @ w["output_layer.weight"].T

    def layer(self, layer: int, x: Tensor, u: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
        here, w = f"decoder.layers.{layer}", self.weights
        both = torch.cat([x, u]) if whole else x
        past = self.short[layer]
        seen = both if past is None else torch.cat([past, both])
        q, k, v = self.project(here, both)[0], *self.project(here, seen)[1:]
        first = TOKENS + len(both) - len(seen)  # where what is seen begins: m at 0, x at S
        own = self.attend(self.turn(q, TOKENS), self.turn(k, first), v, causal=len(seen) - len(both))
        kept = self.long.get(layer, [])[-2:]  # G / L_inc windows
        if kept:
            _, k, v = self.project(here, torch.cat(kept))
            share = torch.sigmoid(w[f"{here}.long_gate.weight"]).view(self.heads, self.dim)
            own = share * own + (1 - share) * self.attend(q, k, v, causal=None)
        y = both + own.flatten(1) @ w[f"{here}.linear_proj.weight"].T
        gate, up = (self.norm(f"{here}.pre_mlp_layernorm.weight", y) @ w[f"{here}.mlp.linear_fc1.weight"].T).chunk(2, 1)
        y = y + (F.silu(gate) * up) @ w[f"{here}.mlp.linear_fc2.weight"].T
        if not whole:
            return y, u
        normed, x, u = self.norm(f"{here}.mixer_norm.weight", y), y[:WINDOW], y[WINDOW:]
        self.short[layer] = u + self.mix(f"{here}.short_mixer", normed)
        if f"{here}.long_mixer.weight" in w:
            self.long.setdefault(layer, []).append(self.mix(f"{here}.long_mixer", normed))
        if layer + 1 < self.layers:
            u = u + self.mix(f"{here}.summary_mixer", normed)
        return x, u

    def mix(self, name: str, normed: Tensor) -> Tensor:
        return torch.einsum("st,td->sd", self.weights[f"{name}.weight"], normed) + self.weights[f"{name}.bias"][:, None]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weights[name]

    def project(self, here: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, D] → [n, heads, d] each, keys and values repeated for their query heads."""
        mixed = self.norm(f"{here}.input_layernorm.weight", x) @ self.weights[f"{here}.linear_qkv.weight"].T
        each = self.heads // self.groups
        mixed = mixed.view(len(x), self.groups, each + 2, self.dim)
        q = mixed[:, :, :each].reshape(len(x), self.heads, self.dim)
        k, v = (mixed[:, :, each + i].repeat_interleave(each, 1) for i in range(2))
        return q, k, v

    def turn(self, x: Tensor, first: int) -> Tensor:
        half = self.dim // 2
        frequency = self.config.model.rotary_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = (torch.arange(len(x), dtype=torch.float64) + first)[:, None, None] * frequency
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: int | None) -> Tensor:
        """`causal` keys before the first query's own; None: all are seen."""
        scores = torch.einsum("qhd,khd->hqk", q, k) / self.dim**0.5
        if causal is not None:
            scores = scores.masked_fill(torch.ones(len(q), len(k)).triu(causal + 1).bool(), float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@pytest.mark.parametrize(
    "overrides", [(), ("memory.layers=none",), ("memory.layers=0,2",)], ids=["one long layer", "none", "two"]
)
def test_equals_the_reference(layout, overrides):
    """Logits and every gradient by name, on packed documents."""
    config, model = build(layout, *overrides)
    tokens, named = draw(0, 2, 40), dict(model.named_parameters())
    found = model(tokens, None, None, packed_seq_params=BlockLayout.from_segment_ids(SEGMENTS, WINDOW))
    expected = torch.zeros_like(found)
    for row, start, stop in DOCUMENTS:
        expected[row, start:stop] = Reference(config, named).logits(tokens[row, start:stop])
    counted = (SEGMENTS > 0)[..., None]
    torch.testing.assert_close(found * counted, expected, **FP64)
    weight = torch.randn_like(expected) * counted
    truth = torch.autograd.grad((expected * weight).sum(), list(named.values()))
    ours = torch.autograd.grad((found * weight).sum(), list(named.values()))
    for name, gradient, wanted in zip(named, ours, truth, strict=True):
        torch.testing.assert_close(gradient, wanted, **FP64, msg=lambda m, name=name: f"{name}: {m}")
        assert wanted.abs().max() > 0, name


@pytest.mark.parametrize("chunks", [[56], [1] * 56, [13, 1, 1, 9, 17, 15]], ids=["at once", "one by one", "odd pieces"])
def test_decoding_equals_training(layout, chunks):
    _, model = build(layout)
    tokens = draw(1, 2, 56)
    with torch.no_grad():
        expected = model(tokens, None, None, packed_seq_params=BlockLayout.single_document(2, 56, WINDOW))
        cache, pieces = memory_cache(model, batch_size=2), []
        for piece in tokens.split(chunks, dim=1):
            pieces.append(model(piece, None, None, inference_context=cache, runtime_gather_output=True))
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **FP64)


def test_what_a_generation_keeps_is_constant_once_the_long_term_tokens_are_full(layout):
    _, model = build(layout)
    cache, sizes = memory_cache(model, batch_size=1), []
    with torch.no_grad():
        for _ in range(5):
            model(torch.ones(1, 8, dtype=torch.long), None, None, inference_context=cache, runtime_gather_output=True)
            sizes.append(cache.num_bytes)
    assert sizes[0] < sizes[1] == sizes[2] == sizes[4]


def test_changing_one_document_leaves_the_others_bit_identical(layout):
    _, model = build(layout)
    tokens, blocks = draw(3, 2, 40), BlockLayout.from_segment_ids(SEGMENTS, WINDOW)
    with torch.no_grad():
        before = model(tokens, None, None, packed_seq_params=blocks)
        for row, start, stop in DOCUMENTS:
            mine = torch.zeros(2, 40, dtype=torch.bool)
            mine[row, start:stop] = True
            after = model(torch.where(mine, (tokens + 7) % VOCAB, tokens), None, None, packed_seq_params=blocks)
            assert torch.equal(after[~mine], before[~mine]), f"sample {row}, tokens {start} to {stop}"
            assert not torch.equal(after[mine], before[mine])


def test_a_layout_serves_models_of_different_sizes():
    """Masks are kept with the layout: one for every number of summary tokens."""
    blocks = BlockLayout.from_segment_ids(SEGMENTS, WINDOW)
    for tokens in (2, 3):
        memory = tiny_config(*MELODI, f"memory.short_term_tokens={tokens}").memory
        mask = Windows(blocks, memory).own_mask(2, with_short=True)
        assert mask is not None
        assert mask.shape == (2, 1, WINDOW + tokens, tokens + WINDOW + tokens)


def test_the_gradient_reaches_the_first_window_from_the_last(layout):
    _, model = build(layout)
    found: list[Tensor] = []
    hook = model.embedding.word_embeddings.register_forward_hook(
        lambda module, args, out: out.register_hook(found.append) and None
    )
    model(draw(4, 1, 40), None, None, packed_seq_params=BlockLayout.single_document(1, 40, WINDOW))[
        0, 32:
    ].sum().backward()
    hook.remove()
    assert found[0].abs().sum(-1).reshape(-1)[:WINDOW].min() > 0


def test_mixers_of_identity_blocks_pass_chosen_tokens_on():
    """W + U = 4 + 2 positions of 2 channels; rows that pick positions 1 and 3, then biases, worked out by hand."""
    normed = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 10.0], [11.0, 12.0]]])
    summary = normed[:, 4:]
    weight = torch.zeros(2, 6)
    weight[0, 1] = weight[1, 3] = 1.0
    picked = summary + mix_tokens(normed, weight, torch.zeros(2))
    assert picked.tolist() == [[[9.0 + 3.0, 10.0 + 4.0], [11.0 + 7.0, 12.0 + 8.0]]]
    minus = torch.zeros(2, 6)
    minus[0, 4] = minus[1, 5] = -1.0  # takes the residual away: what is left is the bias, the same for all channels
    assert (summary + mix_tokens(normed, minus, torch.tensor([0.5, 2.0]))).tolist() == [[[0.5, 0.5], [2.0, 2.0]]]


def test_with_identity_blocks_the_short_term_tokens_are_the_last_tokens_of_the_window(layout):
    """A layer whose attention and MLP add nothing hands on x itself; the mixer picks the last three of its tokens."""
    config, model = build(layout, "memory.layers=none")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("linear_proj.weight", "linear_fc2.weight", "bias")):
                parameter.zero_()
            if name.endswith("mixer_norm.weight"):
                parameter.fill_(1.0)
            if name.endswith("_mixer.weight"):
                parameter.zero_()
            if name.endswith("short_mixer.weight"):
                parameter[:, WINDOW - TOKENS : WINDOW] = torch.eye(TOKENS)
    tokens, cache = draw(5, 1, WINDOW), memory_cache(model, batch_size=1)
    with torch.no_grad():
        model(tokens, None, None, inference_context=cache, runtime_gather_output=True)
    x, u = model.embedding.word_embeddings.weight[tokens[0]], model.decoder.summary_tokens.weight
    scale = (x.square().mean(-1, keepdim=True) + config.model.layernorm_epsilon).sqrt()
    for layer in cache.layers.values():
        torch.testing.assert_close(layer.memory.short[0], u + (x / scale)[-TOKENS:], **FP64)


def test_parameter_count_is_that_of_the_built_model(layout):
    config = tiny_config(*MELODI, "memory.layers=0,2", "model.qk_layernorm=true")
    with torch.device("meta"):
        model = build_model(config, VOCAB, layout.pg_collection)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config.model, VOCAB, config.memory)
    own = memory_parameters(config.model, config.memory)
    names = ("summary_tokens", "mixer", "long_gate")
    assert sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in names)) == own
