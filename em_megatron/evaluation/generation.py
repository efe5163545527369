"""Text from a trained model, token by token, with a memory that does not grow."""

from __future__ import annotations

import codecs
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TextIO

import torch
from torch import Tensor

from em_megatron.config import ConfigError
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.model.language_model import memory_cache
from em_megatron.model.melodi_cache import MelodiCache
from em_megatron.model.memory_cache import MemoryCache

CHARACTERS_AT_ONCE = 1 << 14
LONGEST_LINE = 1 << 20


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


class TextModel(Protocol):
    """A model and its memory between calls: read as much as you like, then write."""

    def read(self, text: str) -> None:
        """Takes a text in; constant memory."""

    def write(self, max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        """New text as it comes, until the end of the document or `max_new_tokens`; it enters the memory too."""

    def copy(self) -> TextModel:
        """A second one with the same memory; what is read or written there leaves this one as it was."""


class MegatronText:
    """A Megatron model on one rank, or on tensor-parallel ranks that all do the same."""

    def __init__(self, model: torch.nn.Module, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.cache: MemoryCache | MelodiCache = memory_cache(model, batch_size=1)
        self.device = next(model.parameters()).device
        self._chunk = self.cache.room  # a block, as long as it is empty
        self.logits = self.read_ids([vocabulary.bos_id])  # of the next token, [1, vocab]

    def read(self, text: str) -> None:
        if ids := self.vocabulary.encode(text):
            self.logits = self.read_ids(ids)

    @torch.no_grad()
    def read_ids(self, ids: Sequence[int]) -> Tensor:
        """Takes one token or more in, a block at a time; logits after the last, [1, vocab]."""
        for start in range(0, len(ids), self._chunk):
            tokens = torch.tensor([list(ids[start : start + self._chunk])], device=self.device)
            logits: Tensor = self.model(tokens, None, None, inference_context=self.cache, runtime_gather_output=True)
        return logits[:, -1, : self.vocabulary.size]

    def write(self, max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        return stream_text(self.write_ids(max_new_tokens, sampling), self.vocabulary)

    def write_ids(self, max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
        """New ids one by one."""
        generator = torch.Generator().manual_seed(sampling.seed)
        for _ in range(max_new_tokens):
            token = int(choose(self.logits, sampling, generator))
            if token == self.vocabulary.eos_id:
                return
            yield token
            self.logits = self.read_ids([token])

    def copy(self) -> MegatronText:
        other = copy.copy(self)
        other.cache = self.cache.copy()
        return other


def stream_text(ids: Iterator[int], vocabulary: Vocabulary) -> Iterator[str]:
    """Text as it comes; a character whose bytes are not all there yet waits for them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        yield decoder.decode(vocabulary.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


def read_lines(
    model: TextModel, lines: Iterable[str], question: str | None, answer: Callable[[TextModel], None]
) -> Iterator[int]:
    """Reads an endless text line by line in constant memory; yields the characters read so far.

    Ids are those of the whole text where a line's end is a token of its own, as in the tokenizers of `tokenizer.train`.

    Args:
        lines: with their ends, as a file gives them.
        question: lines that begin so are not read: the rest of the line is put to a copy of the memory.
        answer: what to do with that copy.
    """
    waiting, read = "", 0
    for line in lines:
        if question is not None and line.startswith(question):
            model.read(waiting)
            waiting, asked = "", model.copy()
            asked.read(line.removeprefix(question))
            answer(asked)
            continue
        waiting, read = waiting + line, read + len(line)
        if len(waiting) >= CHARACTERS_AT_ONCE:
            model.read(waiting)
            waiting = ""
            yield read
    model.read(waiting)
    yield read


def pieces(file: TextIO) -> Iterator[str]:
    """Lines of a file; one longer than LONGEST_LINE comes in parts, so that memory stays bounded."""
    while line := file.readline(LONGEST_LINE):
        yield line
