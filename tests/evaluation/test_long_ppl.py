"""LongPPL against the package of its authors on the same logits, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from em_megatron.evaluation.long_ppl import Constants, fitting, key_tokens, short_losses, sums, total

WORDS = [f"w{index}" for index in range(30)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token, and tells where it stands in the text."""
    words = Tokenizer(models.WordLevel({"?": 0} | {word: index + 1 for index, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=31, max_position_embeddings=128, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models_of_both() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    return llama(1), llama(2)


def losses_of(model: LlamaForCausalLM):
    @torch.no_grad()
    def losses(texts):
        rows = [(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:])) for ids in texts]
        return [F.cross_entropy(logits, labels, reduction="none").double().numpy() for logits, labels in rows]

    return losses


# Lengths, K and strides. The package cannot do a last window of one token, of which it makes a number instead of a list.
@pytest.mark.parametrize(
    ("length", "context", "stride"), [(101, 16, 8), (101, 32, 32), (77, 13, 5), (64, 7, 3), (50, 48, 7), (90, 8, 60)]
)
@pytest.mark.parametrize(("lsd", "lcl"), [(0.05, -30.0), (0.3, -4.0)])
def test_figures_are_those_of_the_package(length, context, stride, lsd, lcl, tokenizer, models_of_both):
    package = pytest.importorskip("longppl.longppl")
    words = np.random.default_rng(length).choice(WORDS, length)
    text, (model, evaluator) = " ".join(words), models_of_both
    expected = package.compute_longppl(
        text, model, evaluator, tokenizer, tokenizer, trunc_len=context, sliding_window=stride, alpha=lsd, beta=lcl
    )
    ids, constants = tokenizer(text)["input_ids"], Constants(context, stride, lsd, lcl)
    assert len(ids) == length == expected["n_token"]
    found = total([sums(losses_of(model), losses_of(evaluator), ids, constants)], constants)
    assert found["perplexity"] == pytest.approx(float(expected["ppl"]), rel=1e-5)
    assert found["key_tokens"] == (expected["n_key_token"] or 0)
    if length > 50:
        assert found["key_tokens"] > 2
    if found["key_tokens"]:
        assert found["long_ppl"] == pytest.approx(float(expected["longppl"]), rel=1e-5)
    own = total([sums(losses_of(evaluator), losses_of(evaluator), ids, constants)], constants)
    for name in ("long_ppl", "perplexity"):
        assert own[name] == own[f"evaluator_{name}"] == found[f"evaluator_{name}"]


def test_without_a_key_token_there_is_no_figure(tokenizer, models_of_both):
    package = pytest.importorskip("longppl.longppl")
    text, model = " ".join(WORDS), models_of_both[0]
    expected = package.compute_longppl(
        text, model, model, tokenizer, tokenizer, trunc_len=9, sliding_window=6, alpha=99, beta=-2
    )
    constants = Constants(9, 6, lsd=99)
    ids = tokenizer(text)["input_ids"]
    found = total([sums(losses_of(model), losses_of(model), ids, constants)], constants)
    assert expected["longppl"] is None
    assert (found["long_ppl"], found["evaluator_long_ppl"], found["key_tokens"]) == (None, None, 0)


def test_key_tokens_by_hand():
    full = np.array([1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.9, 2.0])
    short = np.array([np.nan, 4.0, 6.0, 2.9, 3.1, 3.0, 5.0, 9.0])
    found = key_tokens(full, short, Constants())
    assert found.tolist() == [False, True, False, False, True, False, True, False]


@pytest.mark.parametrize(("length", "stride"), [(12, 3), (11, 3), (10, 3), (5, 3), (6, 1), (12, 50)])
def test_short_contexts_hold_k_tokens_and_up_to_a_stride_more(length, stride):
    K, ids = 4, list(range(100, 100 + length))

    def tokens_before(texts):
        assert all(len(text) <= K + stride for text in texts)
        return [np.arange(1.0, len(text)) for text in texts]

    before = short_losses(tokens_before, ids, Constants(K, stride))
    assert np.isnan(before[: K - 1]).all()  # labels of tokens 1 to K - 1: the first K tokens are never key
    assert before[K - 1 :].tolist() == [K + index % stride for index in range(length - K)]
    labels = short_losses(lambda texts: [np.array(text[1:], float) for text in texts], ids, Constants(K, stride))
    assert labels[K - 1 :].tolist() == ids[K:]


def test_the_first_k_tokens_are_never_key():
    def losses(texts):
        return [np.full(len(text) - 1, 0.5 if len(text) == 20 else 9.0) for text in texts]

    assert sums(losses, losses, list(range(20)), Constants(7, 5))["key"] == 20 - 7


def test_total_by_hand():
    one = {"tokens": 10, "key": 2, "loss": 20.0, "key_loss": 6.0, "judge_loss": 10.0, "judge_key_loss": 1.0}
    two = {"tokens": 30, "key": 0, "loss": 40.0, "key_loss": 0.0, "judge_loss": 10.0, "judge_key_loss": 0.0}
    found = total([one, two], Constants())
    assert found["long_ppl"] == pytest.approx(math.exp(3.0))
    assert found["perplexity"] == pytest.approx(math.exp(1.5))
    assert found["evaluator_long_ppl"] == pytest.approx(math.exp(0.5))
    assert found["evaluator_perplexity"] == pytest.approx(math.exp(0.5))
    assert (found["key_tokens"], found["tokens"], found["texts"]) == (2, 40, 2)
    assert found["constants"] == {"context": 4096, "stride": 1024, "lsd": 2.0, "lcl": -2.0}


def test_constants_fit_short_texts():
    assert fitting(Constants(), 32768) == Constants()
    assert fitting(Constants(), 4096) == Constants(512, 128)
    assert fitting(Constants(16, 5, 1.0, -3.0), 17) == Constants(16, 5, 1.0, -3.0)
    assert fitting(Constants(16, 5, 1.0, -3.0), 16) == Constants(2, 1, 1.0, -3.0)
