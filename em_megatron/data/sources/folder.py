"""A corpus in a folder of this machine or of a shared file system."""

import errno
import hashlib
import json
import logging
import os
import time
from contextlib import ExitStack
from pathlib import Path

from em_megatron.data.manifest import DataError, file_sha256
from em_megatron.data.sources.base import Source, SourceOptions, altered, wrong_size
from em_megatron.data.sources.locks import locked

log = logging.getLogger(__name__)

MEND = "copy it again or encode the corpus again"
YOUNG = 2.0  # seconds; a younger file may change again without new times, which disks round


class FolderSource(Source):
    """A folder. options: SourceOptions() where it is None; `verify` and `cache_path` are used.

    With `verify`, a file's content is compared once per machine: a note in CACHE_PATH/verified says of which size, times
    and inode it was then, and it is compared again when one of them is another.
    """

    def __init__(self, folder: Path, options: SourceOptions | None = None) -> None:
        self.location, self.folder = str(folder), folder
        self._options = options or SourceOptions()

    def read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(str(error)) from None
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataError(f"{name} in {self.folder} cannot be read ({error.strerror}); {MEND}") from None

    def check(self, name: str, size: int) -> None:
        path = self.folder / name
        if not path.is_file():
            raise DataError(f"shard file {name} is missing from {self.folder}; {MEND}")
        if (found := path.stat().st_size) != size:
            raise wrong_size(name, self.location, found, size, MEND)

    def path(self, name: str, size: int, sha256: str) -> Path:
        self.check(name, size)
        path = self.folder / name
        if self._options.verify:
            try:
                found = verified_sha256(path, sha256, self._options.cache_path / "verified")
            except OSError as error:
                if error.errno == errno.EMFILE:  # nothing is wrong with the file
                    raise
                raise DataError(
                    f"shard file {name} in {self.folder} cannot be read ({error.strerror}); {MEND}"
                ) from None
            if found != sha256:
                raise altered(name, self.location, found, sha256, MEND)
        return path


def verified_sha256(path: Path, expected: str, notes: Path) -> str:
    """The sha256 of a file: `expected` where a note says so, else as one process finds it while others wait.

    notes: the folder of the notes. Where it cannot be written, every process finds the sha256 itself.
    Raises OSError where the file cannot be read.
    """
    resolved = path.resolve()
    note = notes / hashlib.sha256(os.fsencode(resolved)).hexdigest()
    if _says(note, resolved, expected):
        return expected
    with ExitStack() as held:
        try:
            notes.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(note.with_suffix(".lock")))
        except OSError as error:
            _warn_once(notes, error)
            return file_sha256(path)
        if _says(note, resolved, expected):
            return expected
        state, start = _state(resolved, expected), time.time()
        old_enough = start - resolved.stat().st_ctime > YOUNG
        found = file_sha256(path)
        if found == expected and old_enough and state == _state(resolved, expected):
            _write(note, state)
        return found


def _state(path: Path, sha256: str) -> str:
    found = path.stat()
    return json.dumps([str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, sha256])


def _says(note: Path, path: Path, sha256: str) -> bool:
    try:
        return note.read_text() == _state(path, sha256)
    except OSError:
        return False


def _write(note: Path, text: str) -> None:
    partial = note.with_suffix(".partial")
    try:
        partial.write_text(text)
        os.replace(partial, note)
    except OSError as error:
        _warn_once(note.parent, error)


_warned: set[Path] = set()


def _warn_once(notes: Path, error: OSError) -> None:
    if notes not in _warned:
        _warned.add(notes)
        log.warning(
            "cannot note in %s which shards were compared (%s), so every process compares them itself; give a "
            "cache folder that can be written",
            notes,
            error.strerror,
        )
