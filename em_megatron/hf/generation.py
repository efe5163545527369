"""Text from a Hugging Face folder through `transformers`, with the memory kept between calls."""

from __future__ import annotations

import copy
import json
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from em_megatron.config import ConfigError
from em_megatron.data.vocabulary import Vocabulary, find_tokenizer
from em_megatron.evaluation.generation import Sampling, stream_text

READER_KEYS = {
    "order": int,
    "slots": int,
    "sampler": str,
    "sampler_a": float,
    "sampler_lo": float,
    "sampler_hi": float,
    "pairs": int,
    "top_k": int,
    "sampler_points": lambda text: [float(point) for point in text.strip("[]").split(",")],
}


def is_exported(path: Path) -> bool:
    """Whether this is a Hugging Face folder of ours."""
    try:
        fields = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.get("model_type") == "elastic_memory"


def reader_changes(overrides: Sequence[str]) -> dict[str, Any]:
    """`memory.KEY=VALUE` as arguments of `set_memory`.

    Raises:
        ConfigError: another key, or a value of another kind.
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        key, _, value = override.removeprefix("memory.").partition("=")
        if not override.startswith("memory.") or key not in READER_KEYS:
            known = ", ".join(f"memory.{name}" for name in READER_KEYS)
            raise ConfigError(f"override '{override}' does not fit a Hugging Face folder: only {known} can change")
        try:
            changes["points" if key == "sampler_points" else key] = READER_KEYS[key](value)  # type: ignore[operator]
        except ValueError:
            raise ConfigError(f"override '{override}' has no value of the right kind") from None
    return changes


class _Streamer:
    """Takes what `generate` puts: first the prompt, then id after id."""

    def __init__(self, ids: queue.Queue[Any]) -> None:
        self.ids, self.prompt_is_past = ids, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_is_past:
            self.ids.put(int(value))
        self.prompt_is_past = True

    def end(self) -> None:
        """Nothing: what follows `generate` says so."""


class TransformersText:
    """A model that was exported, its vocabulary, and its memory; see `evaluation.generation.TextModel`.

    Args:
        folder: of launch/export_hf.py.
        overrides: memory.KEY=VALUE, another reader.
        memory_file: a memory saved before, to go on from.

    Raises:
        ConfigError: the folder, an override or the memory cannot be used.
    """

    def __init__(self, folder: Path, overrides: Sequence[str] = (), memory_file: Path | None = None) -> None:
        from transformers.utils import logging

        from em_megatron.hf.cache_elastic_memory import ElasticMemoryCache
        from em_megatron.hf.modeling_elastic_memory import CACHE, ElasticMemoryForCausalLM

        logging.disable_progress_bar()
        self.cache_name = CACHE
        changes = reader_changes(overrides)
        try:
            model = ElasticMemoryForCausalLM.from_pretrained(folder, local_files_only=True).eval()
            self.model: Any = model.to("cuda" if torch.cuda.is_available() else "cpu").set_memory(**changes)
            new = ElasticMemoryCache(model.config)
            self.cache = new if memory_file is None else ElasticMemoryCache.load(memory_file, self.model)
            self._check_order()
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{folder} cannot be used: {error}") from None
        self.vocabulary = Vocabulary(find_tokenizer(folder))
        # generate() needs one token at least, so the last one always waits outside the memory.
        self.waiting = [] if memory_file is not None else [self.vocabulary.bos_id]

    def _check_order(self) -> None:
        """Raises ValueError for a memory that was read at a lower order than the model is to have now."""
        reader = self.model.model.reader()
        if reader is None:
            return
        for group in self.cache.groups:
            for layer in group.layers:
                layer.memory(reader)

    def read(self, text: str) -> None:
        ids = [*self.waiting, *self.vocabulary.encode(text)]
        self.waiting = ids[-1:]
        if len(ids) > 1:
            self.model.read(torch.tensor([ids[:-1]]), self.cache)

    def write(self, max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        if not self.waiting:
            raise ConfigError("a saved memory is asked with a text: give --prompt or --prompt-file")
        return stream_text(self.write_ids(max_new_tokens, sampling), self.vocabulary)

    def write_ids(self, max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
        """New ids one by one, by `generate` in a thread of its own."""
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sampling.temperature > 0}
        if sampling.temperature:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        ids: queue.Queue[int | BaseException | None] = queue.Queue()
        enough = threading.Event()

        def generate() -> None:
            try:
                torch.manual_seed(sampling.seed)
                prompt = torch.tensor([self.waiting], device=self.model.device)
                options[self.cache_name] = self.cache.fold()
                stop = [lambda tokens, _: torch.full((len(tokens),), enough.is_set(), device=tokens.device)]
                found = self.model.generate(prompt, streamer=_Streamer(ids), stopping_criteria=stop, **options)
                self.waiting = found[0, -1:].tolist()
            except BaseException as error:
                ids.put(error)
            ids.put(None)

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        try:
            while (token := ids.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                if token != self.vocabulary.eos_id:
                    yield token
        finally:  # also where nobody reads on
            enough.set()
            worker.join()

    def copy(self) -> TransformersText:
        other = copy.copy(self)
        other.cache, other.waiting = self.cache.copy(), list(self.waiting)
        return other

    def save(self, path: Path) -> None:
        """Writes the memory of everything read; its last token with it."""
        if self.waiting:
            self.model.read(torch.tensor([self.waiting]), self.cache)
            self.waiting = []
        try:
            self.cache.fold().save(path, self.model)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"the memory cannot be written to {path}: {error}") from None
