"""The folder of fetched files, which processes, runs and corpora share.

    SHA256.tar                  a whole file, fetched and compared
    SHA256.tar.BYTES.partial    a file that is being fetched, or was when its process died; it will have BYTES
    NAME.lock                   see locks.py

A file's modification time is set to COMPARED once its content was compared: whatever writes to it afterwards sets another
time. Its access time says when it was last used.
"""

import logging
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from em_megatron.data.manifest import DataError, file_sha256
from em_megatron.data.sources.locks import locked

log = logging.getLogger(__name__)

COMPARED = 1_000_000_000  # seconds since 1970
FRESH = 2.0  # seconds in which whoever was given a file has opened it
POLL = 0.1
FILES = re.compile(r"([0-9a-f]{64}(?:\.\w+)?)(?:\.(\d+)\.partial)?")


class Kept(NamedTuple):
    """A file of the cache. size: in bytes, of a partial one when it is whole. used: seconds since 1970."""

    path: Path
    size: int
    used: float
    partial: bool


class ShardCache:
    """A folder of files named by their sha256 which together take at most `limit` bytes (0: any number)."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder.expanduser().resolve(), limit

    def target(self, name: str, sha256: str) -> Path:
        """Where a whole file lies."""
        return self.folder / (sha256 + Path(name).suffix)

    def has(self, target: Path, size: int, verify: bool) -> bool:
        """Whether a whole file is here, not written to since it was compared if `verify`; it then counts as used now."""
        try:
            found = target.stat()
            if found.st_size != size or (verify and found.st_mtime_ns != COMPARED * 10**9):
                return False
            os.utime(target, ns=(time.time_ns(), found.st_mtime_ns))
        except FileNotFoundError:
            return False
        return True

    def compare(self, target: Path, size: int, sha256: str) -> bool:
        """Whether a whole file is here that has this content; one that has not is removed. The caller holds its lock."""
        try:
            if target.stat().st_size == size and file_sha256(target) == sha256:
                _mark(target)
                return True
        except FileNotFoundError:
            return False
        log.warning("%s was altered; it is fetched again", target)
        target.unlink(missing_ok=True)
        return False

    def partial(self, target: Path, size: int) -> Path:
        """Where a file grows until it is whole."""
        return target.with_name(f"{target.name}.{size}.partial")

    def keep(self, partial: Path, target: Path) -> None:
        """Gives a fetched and compared file its name."""
        file = os.open(partial, os.O_RDWR)
        try:
            os.fsync(file)
        finally:
            os.close(file)
        _mark(partial)
        os.replace(partial, target)

    def make_room(self, partial: Path, size: int) -> None:
        """Creates `partial` where it is not there and removes files used longest ago until there is room for it.

        Files that this process has mapped go last. Waits while files that are being fetched take the room. The caller
        holds the lock of the file. Raises DataError where there can be no room for `size` bytes, OSError from the disk.
        """
        if not self.limit:
            partial.touch()
            return
        if size > self.limit:
            raise DataError(
                f"a shard file of {size} bytes does not fit the limit of {self.limit} bytes of the cache {self.folder}; "
                "raise cache_bytes, or encode the corpus into smaller shards"
            )
        waiting = False
        while not self._has_room(partial, size):
            if not waiting:
                log.warning(
                    "waiting for room in the cache %s of %d bytes; a larger one is faster", self.folder, self.limit
                )
                waiting = True
            time.sleep(POLL)

    def _has_room(self, partial: Path, size: int) -> bool:
        with locked(self.folder / "room.lock"):
            mapped = _mapped_files()
            others = [kept for kept in self._files() if kept.path != partial]
            others.sort(key=lambda kept: (str(kept.path) in mapped, kept.used))
            excess = sum(kept.size for kept in others) + size - self.limit
            for kept in others:
                if excess <= 0:
                    break
                if self._remove(kept):
                    excess -= kept.size
            if excess > 0:
                partial.unlink(missing_ok=True)  # else two that wait could keep the room from each other
                return False
            partial.touch()
            return True

    def _files(self) -> list[Kept]:
        files = []
        for entry in os.scandir(self.folder):
            if match := FILES.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    found = entry.stat()
                    partial = match[2] is not None
                    used = found.st_mtime if partial else found.st_atime
                    files.append(Kept(Path(entry.path), int(match[2]) if partial else found.st_size, used, partial))
        return files

    def _remove(self, kept: Kept) -> bool:
        """Removes a file, unless it is being fetched or was just handed out."""
        if not kept.partial:
            if 0 <= time.time() - kept.used < FRESH:
                return False
            kept.path.unlink(missing_ok=True)
            return True
        match = FILES.fullmatch(kept.path.name)
        assert match is not None
        with locked(lock_of(self.folder / match[1]), wait=False) as idle:
            if idle:
                kept.path.unlink(missing_ok=True)
            return idle


def lock_of(target: Path) -> Path:
    """The lock file of a file of the cache."""
    return target.with_name(target.name + ".lock")


def _mark(path: Path) -> None:
    os.utime(path, ns=(time.time_ns(), COMPARED * 10**9))


def _mapped_files() -> frozenset[str]:
    """Files that this process has mapped into memory; none where the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6)
