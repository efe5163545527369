"""What a run reads: one corpus or a blend of several, with the tokenizer they share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from em_megatron.config import DataConfig, RunConfig
from em_megatron.data.blend import Blend, BlendedStream, Phase, parse_blend, parse_changes, shares_of, slots_of
from em_megatron.data.manifest import TOKENIZER_NAMES, DataError, Manifest
from em_megatron.data.order import ORDER_VERSION
from em_megatron.data.several import SeveralReaders
from em_megatron.data.shards import ShardReader, allow_many_files
from em_megatron.data.sources import FolderSource, Source, SourceOptions, open_source
from em_megatron.data.sources.base import default_cache_path
from em_megatron.data.stream import Documents, TokenStream
from em_megatron.data.vocabulary import Vocabulary

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Member:
    """One corpus of a blend; `name` is short, and no other of the blend has it."""

    name: str
    source: Source
    manifest: Manifest


@dataclass(frozen=True)
class Corpus:
    """Vocabulary, corpora and the proportions they are read in."""

    vocabulary: Vocabulary
    members: tuple[Member, ...]
    blend: Blend

    @classmethod
    def open(cls, data: DataConfig) -> Corpus:
        """Opens the folders or addresses of `data.path`, written by `tokenizer.encode`.

        Raises:
            DataError: something is missing, truncated, altered or does not belong together.
        """
        entries = parse_blend(data.path)
        sources = [open_source(entry.location, source_options(data)) for entry in entries]
        names = corpus_names([entry.location for entry in entries])
        members = tuple(
            Member(name, source, Manifest.read(source)) for name, source in zip(names, sources, strict=True)
        )
        vocabulary = _vocabulary(sources[0])
        for member in members:
            if member.manifest.tokenizer_sha256 != members[0].manifest.tokenizer_sha256:
                raise DataError(
                    f"{member.source.location} was encoded with another tokenizer than {sources[0].location}: encode the "
                    "corpora of a blend with one"
                )
        members[0].manifest.check_tokenizer(vocabulary)
        allow_many_files()
        _check_cache(members, data)
        phases = [(0, [entry.weight for entry in entries]), *parse_changes(data.blend_changes, len(entries))]
        return cls(vocabulary, members, Blend([Phase(start, shares_of(weights)) for start, weights in phases]))

    def identity(self, consumed_samples: int) -> str:
        """What the first samples of a run depend on, as a checkpoint keeps it."""
        corpora = [member.manifest.identity for member in self.members]
        return f"order {ORDER_VERSION}, {self.blend.identity(corpora, consumed_samples)}"

    def check_identity(self, expected: str, consumed_samples: int) -> None:
        """Refuses other corpora, or another blend, than those that a checkpoint was trained on (`expected`)."""
        found = self.identity(consumed_samples)
        if found != expected:
            raise DataError(
                f"the corpus or the blend is not the one this checkpoint was trained on ({found[:21]}; checkpoint: "
                f"{expected[:21]}): give data.path and data.blend_changes as they were, and what is to change from sample "
                f"{consumed_samples} or later in data.blend_changes; or start a new run"
            )

    def slots(self, config: RunConfig) -> list[int]:
        """Where memory is carried, how many slots of a batch belong to each corpus, else 0.

        Raises:
            DataError: they cannot be shared out so.
        """
        if not config.memory.carry_memory:
            return [0] * len(self.members)
        return slots_of(self.blend, config.training.global_batch_size)

    def training_stream(self, config: RunConfig) -> BlendedStream:
        """The samples of a run, packed for it."""
        shared = self.slots(config)
        readers = [self._reader(member, TRAIN, config.data) for member in self.members]
        streams = [_stream(config, reader, self.vocabulary, own) for reader, own in zip(readers, shared, strict=True)]
        return BlendedStream(streams, self.blend, sum(shared))

    def validation_readers(self, config: RunConfig) -> dict[str, ShardReader]:
        """The held-out documents of each corpus that has some.

        Raises:
            DataError: none has.
        """
        held_out = [member for member in self.members if member.manifest.splits.get(VALIDATION)]
        chosen = held_out or self.members[:1]  # whose error names the splits there are
        return {member.name: self._reader(member, VALIDATION, config.data) for member in chosen}

    def validation_streams(self, config: RunConfig) -> dict[str, TokenStream]:
        """The held-out documents of each corpus that has some, in order."""
        readers = self.validation_readers(config)
        return {name: _stream(config, reader, self.vocabulary, shuffle=False) for name, reader in readers.items()}

    def validation_stream(self, config: RunConfig) -> TokenStream:
        """The held-out documents of all corpora, one after the other."""
        readers = list(self.validation_readers(config).values())
        reader = readers[0] if len(readers) == 1 else SeveralReaders(readers)
        return _stream(config, reader, self.vocabulary, shuffle=False)

    def _reader(self, member: Member, split: str, data: DataConfig) -> ShardReader:
        # One process of a machine looks at all files: thousands that did would keep a shared file system busy for minutes.
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        kept = 2 * data.shuffle_shards + 8
        return ShardReader(member.source, split, shards_kept=kept, check_sizes=first, manifest=member.manifest)


def source_options(data: DataConfig) -> SourceOptions:
    """How shards are fetched, kept and compared."""
    return SourceOptions(
        cache_path=Path(data.cache_path).expanduser() if data.cache_path else default_cache_path(),
        cache_bytes=int(data.cache_gigabytes * 1e9),
        timeout=data.timeout_seconds,
        attempts=data.attempts,
        verify=data.verify_checksums,
    )


def _check_cache(members: Sequence[Member], data: DataConfig) -> None:
    """Refuses a cache that cannot hold the two groups of shards of each corpus that are read from at a time."""
    fetched = [member for member in members if not isinstance(member.source, FolderSource)]
    needed = 0
    for member in fetched:
        sizes = sorted((shard.file_bytes for shard in member.manifest.splits.get(TRAIN, ())), reverse=True)
        needed += sum(sizes[: 2 * data.shuffle_shards])
    if data.cache_gigabytes and needed > data.cache_gigabytes * 1e9:
        raise DataError(
            f"data.cache_gigabytes {data.cache_gigabytes:g} is less than the {needed / 1e9:.3g} GB of shards that are read from "
            "at a time: give more, or a smaller data.shuffle_shards"
        )


def _vocabulary(source: Source) -> Vocabulary:
    for name in TOKENIZER_NAMES:
        try:
            return Vocabulary.from_bytes(source.read(name), f"{source.location}/{name}")
        except FileNotFoundError:
            continue
    raise DataError(f"no tokenizer at {source.location}: copy {' or '.join(TOKENIZER_NAMES)} there, or encode it again")


def _stream(
    config: RunConfig,
    reader: Documents,
    vocabulary: Vocabulary,
    slots: int = 0,
    shuffle: bool = True,
) -> TokenStream:
    data = config.data
    return TokenStream(
        reader,
        data.sequence_length,
        config.memory.block_length,
        config.seed,
        vocabulary.pad_id,
        shuffle=shuffle,
        slots=slots,
        shuffle_shards=data.shuffle_shards,
        counts_folder=source_options(data).cache_path / "samples",
    )


def corpus_names(locations: Sequence[str]) -> list[str]:
    """The last parts of the locations; a number is added where one occurs twice."""
    names: list[str] = []
    for location in locations:
        parts = ["pipe"] if location.startswith("pipe:") else [part for part in location.split("/") if part]
        name = parts[-1] if parts else "corpus"
        if name in ("shards", "corpus") and len(parts) > 1:
            name = parts[-2]
        numbered = (f"{name}-{number}" for number in count(2))
        names.append(name if name not in names else next(other for other in numbered if other not in names))
    return names
