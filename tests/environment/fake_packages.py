"""Packages that a test writes to a folder and finds on the import path, forgotten afterwards."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def write_packages(folder: Path, files: Mapping[str, str | None]) -> Path:
    """Writes path → source below `folder`; None makes a bare folder."""
    for name, source in files.items():
        path = folder / name
        (path if source is None else path.parent).mkdir(parents=True, exist_ok=True)
        if source is not None:
            path.write_text(source)
    return folder


@contextmanager
def importable(folder: Path, files: Mapping[str, str | None]) -> Iterator[Path]:
    """As `write_packages`, at the front of the import path; what was imported meanwhile is dropped again."""
    before = set(sys.modules)
    sys.path.insert(0, str(write_packages(folder, files)))
    importlib.invalidate_caches()
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
        roots = {Path(name).parts[0].removesuffix(".py") for name in files}
        for name in set(sys.modules) - before:
            if name.split(".")[0] in roots:
                del sys.modules[name]
