"""Where the files of a corpus come from: a folder on this machine."""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

from em_megatron.data.manifest import DataError


class Source(ABC):
    """The files of one corpus, wherever they lie. `location` is what the recipe calls it."""

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

        Raises DataError that names the file where it is missing, truncated or altered, or cannot be had.
        """


class FolderSource(Source):
    """A folder on this machine or a shared file system. verify: whether `path` compares the content."""

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.location, self.folder, self._verify = str(folder), folder, verify

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def check(self, name: str, size: int) -> None:
        path = self.folder / name
        if not path.is_file():
            raise DataError(f"shard file {name} is missing from {self.folder}; copy it again or encode the corpus again")
        found = path.stat().st_size
        if found != size:
            kind = "truncated" if found < size else "too long"
            raise DataError(
                f"shard file {name} in {self.folder} is {kind}: {found} bytes, the manifest says {size}; "
                "copy it again or encode the corpus again"
            )

    def path(self, name: str, size: int, sha256: str) -> Path:
        self.check(name, size)
        path = self.folder / name
        if self._verify:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise DataError(
                    f"shard file {name} in {self.folder} was altered: its sha256 is {found[:12]}, the manifest says "
                    f"{sha256[:12]}; copy it again or encode the corpus again"
                )
        return path


def open_source(location: str | Path, verify: bool = True) -> Source:
    """The source that a location means."""
    return FolderSource(Path(location).expanduser(), verify)
