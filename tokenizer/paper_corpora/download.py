"""Downloads that go on where they stopped, and of which nothing half-written is taken for whole.

A file grows as NAME.partial and gets its name when its size is the server's and its checksum the published one.
"""

import errno
import hashlib
import http.client
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urljoin
from urllib.request import Request, urlopen

from em_megatron.data.manifest import DataError
from em_megatron.data.retry import PASSING_STATUSES, Fault, persistently, retry_after
from tokenizer.paper_corpora.recipe import SourceFile

ATTEMPTS = 6  # in a row without a byte more than before
FIRST_WAIT = 1.0  # seconds, doubled with every attempt
LONGEST_WAIT = 300.0
TIMEOUT = 60.0
CHUNK = 1 << 20
DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO})
HEADERS = {"User-Agent": "em-megatron"}
OTHERWISE = "check the network, give a mirror with --base-url, or the files themselves with --input"


def fetching[Result](url: str, action: Callable[[], Result], progress: Callable[[], int] = int) -> Result:
    """The result of an action on the network, tried again while its faults are passing ones (see `persistently`).

    Raises:
        DataError: the server refuses, the disk does, or ATTEMPTS in a row came no further.
    """

    def attempt() -> Result:
        try:
            return action()
        except HTTPError as error:
            if error.code not in PASSING_STATUSES:
                raise DataError(f"{url} answers {error.code} {error.reason}; {OTHERWISE}") from None
            raise Fault(error, retry_after(error.headers)) from error
        except (OSError, http.client.HTTPException) as error:
            if not isinstance(error, URLError) and getattr(error, "errno", None) in DISK:
                raise DataError(f"cannot store {url} ({error}); make room and run the command again") from None
            raise Fault(getattr(error, "reason", None) or error) from error

    return persistently(url, attempt, OTHERWISE, progress, ATTEMPTS, FIRST_WAIT, LONGEST_WAIT)


def get_json(url: str) -> tuple[Any, str | None]:
    """A JSON document and the address of its next page, from the Link header. Raises DataError."""

    def fetch() -> tuple[bytes, str]:
        with urlopen(Request(url, headers=HEADERS), timeout=TIMEOUT) as response:
            return response.read(), response.headers.get("Link", "")

    content, link = fetching(url, fetch)
    match = re.search(r'<([^>]+)>\s*;\s*rel="next"', link)
    try:
        return json.loads(content), urljoin(url, match[1]) if match else None
    except ValueError as error:
        raise DataError(f"{url} does not answer with JSON ({error}); {OTHERWISE}") from None


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def matches(path: Path, source: SourceFile) -> bool:
    """Whether a file has the published checksum; True where none is published."""
    if source.checksum is None:
        return True
    algorithm, expected = source.checksum
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest() == expected


def download(source: SourceFile, target: Path) -> Path:
    """Makes sure the whole of a source file is at `target`; returns it.

    Raises:
        DataError: it cannot be fetched, or its size or checksum are not the published ones.
    """
    url = source.url
    if url is None:
        raise ValueError(f"{source.name} has no address")
    if target.exists() and source.size in (None, target.stat().st_size):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    for _ in range(2):  # the first may have gone on with the beginning of an older version
        fetching(url, lambda: fetch_rest(url, partial, source.size), lambda: size_of(partial))
        if matches(partial, source):
            os.replace(partial, target)
            return target
        partial.unlink()
    raise DataError(f"{url} does not have the published {source.checksum and source.checksum[0]}; {OTHERWISE}")


def fetch_rest(url: str, partial: Path, size: int | None) -> None:
    """Appends what is missing to a partial file; begins again where the server does not send parts.

    Raises:
        OSError: a passing fault; what came is kept.
        DataError: the size cannot be checked, or is another one than the source lists.
    """
    start = size_of(partial)
    if size is not None and start > size:
        partial.unlink()
        start = 0
    if size is not None and start == size and partial.exists():
        return
    headers = HEADERS | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as response:
            resumed = response.status == 206
            total = announced_size(response, start if resumed else 0)
            if total is None or (size is not None and total != size):
                raise DataError(f"{url} is announced with {total} bytes, its list says {size}; {OTHERWISE}")
            with open(partial, "ab" if resumed else "wb") as file:
                while block := response.read(CHUNK):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
    except HTTPError as error:
        if error.code == 416:  # the partial file is longer than the file is now
            partial.unlink(missing_ok=True)
        raise
    if size_of(partial) != total:
        raise OSError(f"the connection ended after {size_of(partial)} of {total} bytes")


def announced_size(response: Any, start: int) -> int | None:
    """Bytes of the whole file as the server announces them; None where it does not.

    Raises OSError for a part that begins elsewhere than was asked for.
    """
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise OSError(f"the server sent another part than the one from byte {start}")
        return int(match[2])
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None
