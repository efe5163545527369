"""What is evaluated: a Megatron checkpoint on the ranks at hand, or a Hugging Face folder; both answer the same questions.

token_losses(texts)  nats of every token, each text read with an empty memory
new_text()           a text model with an empty memory, to read and to write
use_reader(...)      another reader of the memory, without other weights
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from em_megatron.config import ConfigError, MemoryConfig, RunConfig, load_config
from em_megatron.data.stream import TokenStream
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.evaluation.generation import MegatronText, TextModel
from em_megatron.evaluation.perplexity import POSITION_BINS_PER_BLOCK, PositionTally, evaluate, summarise
from em_megatron.evaluation.scoring import text_losses
from em_megatron.evaluation.sweep import reader_keys
from em_megatron.hf.export import RECIPE_NAME
from em_megatron.hf.generation import READER_KEYS, TransformersText, is_exported
from em_megatron.training.corpus import Corpus
from em_megatron.training.restore import ALONE, Restored, restore
from em_megatron.validate import check_same_weights, validate

Floats = NDArray[np.float64]
Interrupted = Callable[[], bool]
FOLDER_KEYS = ("data.path=", "data.sequence_length=")  # of the recipe in an exported folder


class Subject(Protocol):
    """A trained model with its vocabulary and recipe (whose memory section is the reader in use)."""

    path: Path
    step: int  # of the checkpoint; 0 where it is not known
    vocabulary: Vocabulary

    @property
    def config(self) -> RunConfig: ...

    def perplexity(self, samples: int, interrupted: Interrupted) -> dict[str, Any] | None:
        """`perplexity.summarise` of the held-out split; None where it was interrupted."""

    def token_losses(self, texts: Sequence[Sequence[int]]) -> list[Floats]:
        """Losses [len - 1] in nats of the ids of each text but its first, each read with an empty memory."""

    def new_text(self) -> TextModel:
        """A text model that has read nothing yet. Raises ConfigError where the model cannot generate."""

    def reader(self, changes: Sequence[str]) -> RunConfig:
        """The recipe with the reader it was opened with, changed by memory.KEY=VALUE. Raises ConfigError where that cannot be."""

    def use_reader(self, changes: Sequence[str]) -> None:
        """Reads by `reader(changes)` from now on."""

    def share[Item](self, items: Sequence[Item]) -> Sequence[Item]:
        """Those of the items that this data-parallel rank does."""

    def gather(self, found: Any) -> list[Any]:
        """What each data-parallel rank found, on every rank."""


def open_subject(path: Path, overrides: Sequence[str], world_size: int, beside: Subject | None = None) -> Subject:
    """A run folder, a checkpoint, or a Hugging Face folder of launch/export_hf.py.

    beside: another one that is open in these processes, whose layout this one takes.

    Raises:
        CheckpointError, ConfigError, DataError: what cannot be used, in one sentence.
    """
    if is_exported(path):
        if world_size > 1:
            raise ConfigError(f"{path} is a Hugging Face folder, which one process reads: call without torchrun")
        return HuggingFaceSubject(path, overrides)
    if isinstance(beside, MegatronSubject):
        sizes = vars(beside.config.parallel)
        overrides = [*(f"parallel.{key}={value}" for key, value in sizes.items()), *overrides]
        return MegatronSubject(restore(path, overrides, world_size, beside.run.layout))
    return MegatronSubject(restore(path, overrides, world_size))


def held_out(subject: Subject) -> TokenStream:
    """The held-out split of the subject's corpus, packed as in training.

    Raises:
        DataError: the shards cannot be used, or were made by another tokenizer.
    """
    corpus = Corpus.open(subject.config.data)
    corpus.members[0].manifest.check_tokenizer(subject.vocabulary)
    return corpus.validation_stream(subject.config)


class MegatronSubject:
    """A checkpoint, spread over the ranks at hand; all of them call alike and get the same answers."""

    def __init__(self, run: Restored) -> None:
        self.run, self.path, self.step, self.vocabulary = run, run.checkpoint, run.step, run.vocabulary
        self.opened_with = run.config.memory

    @property
    def config(self) -> RunConfig:
        return self.run.config

    def perplexity(self, samples: int, interrupted: Interrupted) -> dict[str, Any] | None:
        run, token_bytes = self.run, torch.as_tensor(self.vocabulary.token_bytes)
        return evaluate(run.config, run.layout, run.model, held_out(self), token_bytes, samples, interrupted)

    def token_losses(self, texts: Sequence[Sequence[int]]) -> list[Floats]:
        run = self.run
        return text_losses(run.config, run.layout, run.model, texts, self.vocabulary.pad_id)

    def new_text(self) -> TextModel:
        layout = self.run.layout
        if layout.pp_size > 1 or layout.cp_size > 1:
            raise ConfigError("text is generated without pipeline and context parallelism: leave these overrides out")
        if self.run.config.parallel.sequence_parallel:
            raise ConfigError("one token cannot be split along the sequence: leave parallel.sequence_parallel out")
        return MegatronText(self.run.model[0], self.vocabulary)

    def reader(self, changes: Sequence[str]) -> RunConfig:
        config = _changed(replace(self.run.config, memory=self.opened_with), changes, self.path)
        validate(config, torch.distributed.get_world_size())
        return config

    def use_reader(self, changes: Sequence[str]) -> None:
        from em_megatron.model.language_model import exchange_reader

        config = self.reader(changes)
        if config.memory != self.run.config.memory:
            exchange_reader(self.run.model, config.memory)
            self.run.config = config

    def share[Item](self, items: Sequence[Item]) -> Sequence[Item]:
        layout = self.run.layout
        return items[layout.dp_rank :: layout.dp_size]

    def gather(self, found: Any) -> list[Any]:
        layout = self.run.layout
        mine = layout.tp_rank == 0 and layout.pp_rank == 0 and layout.cp_rank == 0
        gathered: list[Any] = [None] * layout.world_size
        torch.distributed.all_gather_object(gathered, (layout.dp_rank, found) if mine else None)
        return [part for _, part in sorted((x for x in gathered if x is not None), key=lambda pair: pair[0])]


class HuggingFaceSubject:
    """An exported folder in this process; its recipe says which corpus it was trained on."""

    def __init__(self, path: Path, overrides: Sequence[str]) -> None:
        from em_megatron.hf.generation import reader_changes

        recipe = path / RECIPE_NAME
        if not recipe.is_file():
            raise ConfigError(f"{path} holds no {RECIPE_NAME}: export it again with launch/export_hf.py")
        about_data = [override for override in overrides if override.startswith(FOLDER_KEYS)]
        readers = [override for override in overrides if override not in about_data]
        reader_changes(readers)  # refuses what has no place
        self.path, self._config = path, load_config(recipe, [*ALONE, *about_data, *readers])
        self.text = TransformersText(path, readers)
        self.vocabulary, self.step = self.text.vocabulary, 0
        self.opened_with = self._config.memory

    @property
    def config(self) -> RunConfig:
        return self._config

    def perplexity(self, samples: int, interrupted: Interrupted) -> dict[str, Any] | None:
        """Piece after piece of the same packed samples: a piece sees nothing of its neighbours, so it may stand alone."""
        stream, config = held_out(self), self.config
        width = max(1, config.memory.block_length // POSITION_BINS_PER_BLOCK)
        token_bytes = torch.as_tensor(self.vocabulary.token_bytes, dtype=torch.float64)
        tally = PositionTally(-(-config.data.sequence_length // width), width, token_bytes)
        for sample in stream.validation_samples(samples):
            if interrupted():
                return None
            for segment in range(1, int(sample["segment_ids"].max()) + 1):
                here = sample["segment_ids"] == segment
                tokens, labels = sample["tokens"][here], sample["labels"][here]
                (losses,) = self.token_losses([[*tokens.tolist(), int(labels[-1])]])
                positions, found = torch.as_tensor(sample["positions"][here]), torch.as_tensor(losses)
                tally.add(positions, torch.as_tensor(labels), found, torch.ones_like(found))
        return summarise(tally.sums, width)

    @torch.no_grad()
    def token_losses(self, texts: Sequence[Sequence[int]]) -> list[Floats]:
        return [self._losses(ids) for ids in texts]

    def _losses(self, ids: Sequence[int]) -> Floats:
        """Block after block, so that only a block's logits are held."""
        from em_megatron.hf.cache_elastic_memory import ElasticMemoryCache

        if len(ids) < 2:
            return np.zeros(0)
        model = self.text.model
        cache, found = ElasticMemoryCache(model.config), []
        row = torch.tensor([list(ids)], device=model.device)
        for inputs, labels in zip(
            row[:, :-1].split(model.config.block_length, 1), row[0, 1:].split(model.config.block_length), strict=True
        ):
            logits = model(inputs, **{self.text.cache_name: cache}).logits[0]
            found.append(F.cross_entropy(logits.float(), labels, reduction="none").double().cpu().numpy())
        return np.concatenate(found)

    def new_text(self) -> TextModel:
        from em_megatron.hf.cache_elastic_memory import ElasticMemoryCache

        text = self.text.copy()
        text.cache, text.waiting = ElasticMemoryCache(text.model.config), [self.vocabulary.bos_id]
        return text

    def reader(self, changes: Sequence[str]) -> RunConfig:
        config = _changed(replace(self._config, memory=self.opened_with), changes, self.path)
        validate(config, world_size=1)
        return config

    def use_reader(self, changes: Sequence[str]) -> None:
        from em_megatron.hf.generation import reader_changes

        config = self.reader(changes)
        try:
            self.text.model.set_memory(**reader_changes(_differences(self._config.memory, config.memory)))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._config = config

    def share[Item](self, items: Sequence[Item]) -> Sequence[Item]:
        return items

    def gather(self, found: Any) -> list[Any]:
        return [found]


def _changed(config: RunConfig, changes: Iterable[str], path: Path) -> RunConfig:
    """The tree with another reader. Raises ConfigError for changes of other sections, or that would need other weights."""
    changes, keys = list(changes), reader_keys(config.memory)
    for change in changes:
        name = change.partition("=")[0].removeprefix("memory.")
        if not change.startswith("memory.") or name not in READER_KEYS:
            raise ConfigError(f"'{change}' is no reader of a memory")
        if name not in keys:
            raise ConfigError(f"'{change}' has no place in a memory of kind {config.memory.kind}")
    changed = load_config(config, changes)
    check_same_weights(config, changed, path)
    return changed


def _differences(before: MemoryConfig, after: MemoryConfig) -> list[str]:
    """memory.KEY=VALUE of what is not the same; points only where they are read."""
    return [
        f"memory.{key}={value}"
        for key, value in vars(after).items()
        if getattr(before, key) != value and (key != "sampler_points" or after.sampler == "points")
    ]
