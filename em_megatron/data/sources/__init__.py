"""Where the files of a corpus come from: a folder on this machine, or an address from which they are fetched."""

import re
from pathlib import Path

from em_megatron.data.manifest import DataError
from em_megatron.data.sources.base import Source, SourceOptions
from em_megatron.data.sources.folder import FolderSource
from em_megatron.data.sources.remote import RemoteSource
from em_megatron.data.sources.transports import open_transport

__all__ = ["FolderSource", "Source", "SourceOptions", "open_source"]

ADDRESS = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")


def open_source(location: str | Path, options: SourceOptions | None = None, verify: bool = True) -> Source:
    """The source that a location means; nothing is fetched yet.

    location: a folder; `http://...`, `https://...`, `s3://bucket/folder` or another address that fsspec knows; or
    `pipe:COMMAND`, whose output is the file of the name that stands for `{}` in it.
    options: SourceOptions() where it is None. verify: False is as SourceOptions(verify=False).

    Raises DataError for an address that cannot be one.
    """
    options = (options or SourceOptions()).with_verify(verify)
    text = str(location)
    if not text:
        raise DataError("the location of the corpus is empty; give its folder or its address")
    if isinstance(location, Path) or not ADDRESS.match(text):
        return FolderSource(Path(location).expanduser(), options)
    if text.startswith("file://"):
        return FolderSource(Path(text.removeprefix("file://")), options)
    return RemoteSource(open_transport(text, options.timeout), options)
