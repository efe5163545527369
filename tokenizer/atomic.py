"""Files that appear under their name in one step, so that a reader sees the old one or the whole new one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` at the end of the block; after an error nothing of it is left.

    Writers of one path are kept apart by machine and process number. The folder must exist. Raises OSError.
    """
    partial = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a whole file, and makes its folder where there is none. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(path) as file:
        file.write(content)
