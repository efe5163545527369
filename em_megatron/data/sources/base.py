"""What every source of a corpus' files offers, and the settings they share."""

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from em_megatron.data.manifest import DataError

CACHE_VARIABLE = "EM_DATA_CACHE"


def default_cache_path() -> Path:
    """EM_DATA_CACHE where it is set, else ~/.cache/em_megatron/shards."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "em_megatron" / "shards"


@dataclass(frozen=True)
class SourceOptions:
    """How files are fetched, kept and compared.

    cache_path: folder of fetched files, and of the notes which files of folders were compared; processes, runs and
        corpora share it.
    cache_bytes: the fetched files together take at most so many bytes; 0: no limit.
    timeout: seconds without a byte after which a connection is taken for dead.
    attempts: in a row without a byte more than before, after which a file is given up.
    verify: whether the content of a folder's files, and of fetched files that were written to since, is compared. What
        is fetched is always compared.

    Raises DataError for a number that cannot be.
    """

    cache_path: Path = field(default_factory=default_cache_path)
    cache_bytes: int = 0
    timeout: float = 60.0
    attempts: int = 10
    verify: bool = True

    def __post_init__(self) -> None:
        for name, value, least in (
            ("cache_bytes", self.cache_bytes, 0),
            ("timeout", self.timeout, 0.001),
            ("attempts", self.attempts, 1),
        ):
            if value < least:
                raise DataError(f"{name} of the data source is {value}; give at least {least}")

    def with_verify(self, verify: bool) -> Self:
        """These options, without comparing where `verify` is False."""
        return self if verify else replace(self, verify=False)


class Source(ABC):
    """The files of one corpus, wherever they lie. `location` is what messages call it."""

    location: str

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A small file, whole. Raises FileNotFoundError where there is none, DataError where it cannot be had."""

    @abstractmethod
    def check(self, name: str, size: int) -> None:
        """Compares a file's size with `size` where that costs nothing. Raises DataError that names the file."""

    @abstractmethod
    def path(self, name: str, size: int, sha256: str) -> Path:
        """A whole copy of a file on this machine, fetched if it is not here, of this size and content.

        Threads and processes may ask for the same file at once. Open it at once: a fetched file may be removed for
        others a few seconds later, which does no harm to those that have it open.
        Raises DataError that names the file where it is missing, truncated or altered, or cannot be had.
        """


def wrong_size(name: str, location: str, found: int, size: int, mend: str) -> DataError:
    """What a file says that has `found` bytes in place of `size`."""
    kind = "truncated" if found < size else "too long"
    return DataError(f"shard file {name} in {location} is {kind}: {found} bytes, the manifest says {size}; {mend}")


def altered(name: str, location: str, found: str, sha256: str, mend: str) -> DataError:
    """What a file says whose sha256 is `found` in place of the manifest's."""
    return DataError(
        f"shard file {name} in {location} was altered: its sha256 is {found[:12]}, the manifest says {sha256[:12]}; {mend}"
    )
