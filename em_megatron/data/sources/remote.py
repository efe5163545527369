"""A corpus behind an address: its files are fetched into a cache on this machine, whatever happens on the way."""

import errno
import logging
import os
from contextlib import ExitStack
from pathlib import Path

from em_megatron.data.manifest import DataError, file_sha256
from em_megatron.data.retry import Fault, persistently
from em_megatron.data.sources.base import CACHE_VARIABLE, Source, SourceOptions, altered, wrong_size
from em_megatron.data.sources.cache import ShardCache, lock_of
from em_megatron.data.sources.locks import locked
from em_megatron.data.sources.transports import Download, Transport

log = logging.getLogger(__name__)

MEND = "put it there again or encode the corpus again"
ADVICE = "check the address, the network and the server, then start again: what was fetched is kept"


class RemoteSource(Source):
    """The files that a transport reaches. All fields of `options` are used."""

    def __init__(self, transport: Transport, options: SourceOptions) -> None:
        self.location = transport.location
        self._transport, self._options = transport, options
        self._cache = ShardCache(options.cache_path, options.cache_bytes)

    def read(self, name: str) -> bytes:
        def whole() -> bytes:
            with self._transport.open(name, 0) as download:
                content = b"".join(download.chunks)
            if download.total not in (None, len(content)):
                raise Fault(f"the connection ended after {len(content)} of {download.total} bytes")
            return content

        return persistently(self._what(name), whole, ADVICE, attempts=self._options.attempts)

    def check(self, name: str, size: int) -> None:
        """Nothing: a question to the server would cost more than it is worth."""

    def path(self, name: str, size: int, sha256: str) -> Path:
        target = self._cache.target(name, sha256)
        verify = self._options.verify
        try:
            if self._cache.has(target, size, verify):
                return target
            target.parent.mkdir(parents=True, exist_ok=True)
            with locked(lock_of(target)):
                if not self._cache.has(target, size, verify) and not self._cache.compare(target, size, sha256):
                    self._fetch(name, size, sha256, target)
        except OSError as error:
            if error.errno == errno.EMFILE:  # nothing is wrong with the disk
                raise
            raise self._cannot_store(name, error) from None
        return target

    def _fetch(self, name: str, size: int, sha256: str, target: Path) -> None:
        """Fetches a file to `target`. The caller holds its lock. Raises DataError, and OSError from the disk."""
        partial = self._cache.partial(target, size)
        self._cache.make_room(partial, size)
        try:
            found = self._fetch_whole(name, size, sha256, partial)
            if found == sha256:
                self._cache.keep(partial, target)
                return
            os.truncate(partial, 0)
            raise altered(name, self.location, found, sha256, MEND)
        finally:
            if partial.exists() and not partial.stat().st_size:
                partial.unlink()

    def _fetch_whole(self, name: str, size: int, sha256: str, partial: Path) -> str:
        """Fetches a file, and once more if it arrives altered; returns its sha256."""
        for again in (True, False):
            persistently(
                self._what(name),
                lambda: self._fetch_rest(name, partial, size),
                ADVICE,
                lambda: partial.stat().st_size,
                self._options.attempts,
            )
            found = file_sha256(partial)
            if found == sha256 or not again:
                break
            log.warning("%s arrived altered; it is fetched once more", self._what(name))
            os.truncate(partial, 0)
        return found

    def _fetch_rest(self, name: str, partial: Path, size: int) -> None:
        """Adds what is missing to a partial file. Raises Fault, DataError, and OSError from the disk."""
        start = partial.stat().st_size
        if start > size:
            os.truncate(partial, 0)
            start = 0
        if start == size:
            return
        with ExitStack() as stack:
            try:
                download = stack.enter_context(self._transport.open(name, start))
            except FileNotFoundError:
                raise DataError(f"shard file {name} is missing from {self.location}; {MEND}") from None
            if download.total not in (None, size):
                raise wrong_size(name, self.location, download.total or 0, size, MEND)
            length = self._append(download, name, partial, size)
        if length < size:
            raise Fault(f"it ended after {length} of {size} bytes")

    def _append(self, download: Download, name: str, partial: Path, size: int) -> int:
        """Writes what comes after the first `download.offset` bytes; returns the length then."""
        length = download.offset
        with open(partial, "r+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END) > length:
                file.truncate(length)
            file.seek(length)
            for chunk in download.chunks:
                length += len(chunk)
                if length > size:
                    raise wrong_size(name, self.location, length, size, MEND)
                rest = memoryview(chunk)
                while rest:
                    rest = rest[file.write(rest) :]
        return length

    def _what(self, name: str) -> str:
        return f"{name} from {self.location}"

    def _cannot_store(self, name: str, error: OSError) -> DataError:
        return DataError(
            f"{self._what(name)} cannot be stored in the cache {self._cache.folder} ({error.strerror}); make room there, "
            f"set a limit with cache_bytes, or name another folder with cache_path or {CACHE_VARIABLE}"
        )
