"""Text from a trained model, token by token, with a memory that does not grow."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from em_megatron.config import ConfigError
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.model.language_model import memory_cache
from em_megatron.model.memory_cache import MemoryCache


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for values that cannot be."""
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError("sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next ids [b] from logits [b, vocab]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float().cpu() / sampling.temperature
    if sampling.top_k:
        smallest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0  # the first token always stays
        probabilities = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


class Generator:
    """A model and its memory between calls: read as much as you like, then write."""

    def __init__(self, model: torch.nn.Module, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.cache: MemoryCache = memory_cache(model, batch_size=1)
        self.device = next(model.parameters()).device
        self._chunk = next(iter(self.cache.layers.values())).block_length

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Takes tokens in, a block at a time so that memory stays constant; logits after the last, [1, vocab].

        Raises:
            ConfigError: no tokens.
        """
        if not ids:
            raise ConfigError("the prompt holds no tokens: give some text")
        for start in range(0, len(ids), self._chunk):
            tokens = torch.tensor([list(ids[start : start + self._chunk])], device=self.device)
            logits: Tensor = self.model(tokens, None, None, inference_context=self.cache, runtime_gather_output=True)
        return logits[:, -1, : self.vocabulary.size]

    def write(self, logits: Tensor, max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
        """New ids one by one, until the end of the document or `max_new_tokens`."""
        generator = torch.Generator().manual_seed(sampling.seed)
        for left in range(max_new_tokens, 0, -1):
            token = int(choose(logits, sampling, generator))
            if token == self.vocabulary.eos_id:
                return
            yield token
            if left > 1:
                logits = self.read([token])


def stream_text(ids: Iterator[int], vocabulary: Vocabulary) -> Iterator[str]:
    """Text as it comes; a character whose bytes are not all there yet waits for them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        yield decoder.decode(vocabulary.decode_bytes([token]))
    yield decoder.decode(b"", final=True)
