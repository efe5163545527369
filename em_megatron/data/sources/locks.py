"""Locks between processes and threads of one machine, which end with their holder however it ends."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock file `path`, which is there only while someone holds it or waits, or after a holder was killed.

    wait: whether to wait for another holder; else the value is False where there is one. Raises OSError where the
    folder cannot be written.
    """
    file = _take(path, wait)
    if file is None:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)  # before the lock is given up: those who wait see that their file is gone
        os.close(file)


def _take(path: Path, wait: bool) -> int | None:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _flock(file, path, wait):
                os.close(file)
                return None
            if _is(file, path):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the holder removed it; the lock is on a newer one


def _flock(file: int, path: Path, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            return False
        log.debug("waiting for the holder of %s", path)
        fcntl.flock(file, fcntl.LOCK_EX)
    return True


def _is(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
