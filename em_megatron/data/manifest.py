"""The manifest of an encoded corpus: what its shards hold, and how a damaged or exchanged one is noticed.

A corpus folder is

    manifest.json                   written last, so a folder without it is an unfinished encoding
    tokenizer.model                 a copy of the tokenizer the shards were encoded with
    train-000000.tar, ...           members KEY.tokens.bin (raw little-endian ids) and KEY.json
    train-000000.idx, ...           where the documents of a shard lie (data/index.py)
    validation-000000.tar, ...
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from em_megatron.data.sources import Source
    from em_megatron.data.vocabulary import Vocabulary

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"
TOKENIZER_NAMES = (TOKENIZER_NAME, "tokenizer.json")  # sentencepiece, Hugging Face
DTYPES = ("<u2", "<u4")


class DataError(ValueError):
    """A corpus, shard, manifest or tokenizer that cannot be used; the message says why and how to mend it."""


@dataclass(frozen=True)
class Shard:
    """One tar file. `tokens` counts stored ids with bos and eos, `text_bytes` the UTF-8 text they stand for.

    sha256, index_sha256: of the tar and of its index.
    """

    name: str
    documents: int
    tokens: int
    text_bytes: int
    file_bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything a run must know of its corpus before it reads a token.

    dtype: numpy name of the stored ids, "<u2" or "<u4". source: sha256 of what the corpus was made from (the
    documents' names and contents, and the settings of the encoding).
    """

    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    source: str
    splits: Mapping[str, tuple[Shard, ...]]
    format_version: int = FORMAT_VERSION

    @cached_property
    def identity(self) -> str:
        """sha256 over the canonical JSON: equal exactly when two corpora hold the same tokens in the same order."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists, as they stand in manifest.json."""
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "splits"}
        return fields | {"splits": {split: [asdict(s) for s in shards] for split, shards in self.splits.items()}}

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split in order. Raises DataError for a split the corpus does not have."""
        if not self.splits.get(split):
            raise DataError(f"the corpus has no split {split!r}; it has {', '.join(sorted(self.splits)) or 'none'}")
        return self.splits[split]

    def tokens(self, split: str) -> int:
        """Stored ids of a split, bos and eos included."""
        return sum(shard.tokens for shard in self.shards(split))

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of text of a split."""
        return sum(shard.text_bytes for shard in self.shards(split))

    def check_tokenizer(self, vocabulary: "Vocabulary") -> None:
        """Refuses a tokenizer other than the one the shards were encoded with."""
        if vocabulary.sha256 != self.tokenizer_sha256:
            raise DataError(
                f"the corpus was encoded with another tokenizer (sha256 {self.tokenizer_sha256[:12]}, this one is "
                f"{vocabulary.sha256[:12]}): use the tokenizer that lies beside its manifest"
            )

    def save(self, directory: Path) -> Path:
        """Writes manifest.json in one step: readers see the whole of it or nothing."""
        path = directory / MANIFEST_NAME
        partial = path.with_name(path.name + ".partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(self.to_json(), indent=1, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Reads DIRECTORY/manifest.json. Raises DataError where it is missing, unreadable or of another format."""
        from em_megatron.data.sources import FolderSource

        return cls.read(FolderSource(Path(directory)))

    @classmethod
    def read(cls, source: "Source") -> "Manifest":
        """Reads a corpus' manifest.json. Raises DataError where it is missing, unreadable or of another format."""
        path = f"{source.location}/{MANIFEST_NAME}"
        try:
            fields = json.loads(source.read(MANIFEST_NAME).decode("utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"no corpus at {source.location}: {MANIFEST_NAME} is missing; run tokenizer.encode"
            ) from None
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is not valid JSON ({error}); encode the corpus again") from None
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format {version!r}, this version reads format {FORMAT_VERSION}; encode the corpus again"
            )
        return cls._from_json(fields, path)

    @classmethod
    def _from_json(cls, fields: dict[str, Any], path: str) -> "Manifest":
        try:
            splits = {name: tuple(Shard(**s) for s in shards) for name, shards in fields.pop("splits").items()}
            manifest = cls(splits=splits, **fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} lacks a field or has one too many ({error}); encode the corpus again") from None
        if manifest.dtype not in DTYPES:
            raise DataError(f"{path} says dtype {manifest.dtype!r}, not one of {DTYPES}; encode the corpus again")
        return manifest


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
