"""What every transport offers, and what those through fsspec share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from em_megatron.data.manifest import DataError
from em_megatron.data.retry import Fault

CHUNK = 1 << 16  # bytes taken at a time; aiohttp holds twice as many back, which are lost when the connection breaks


class Download(NamedTuple):
    """A file on its way. chunks: its bytes from `offset` on. total: bytes of the whole file, None where not known.

    Taking the next chunk raises Fault where the connection breaks or stalls.
    """

    offset: int
    total: int | None
    chunks: Iterator[bytes]


class Transport(ABC):
    """A way to the files at an address. location: the address, without passwords. Threads and forks may share it."""

    def __init__(self, address: str, timeout: float) -> None:
        self.location, self._address, self._timeout = without_secrets(address), address.rstrip("/"), timeout

    @abstractmethod
    def open(self, name: str, start: int) -> AbstractContextManager[Download]:
        """A download of a file from byte `start` on, or from its beginning where the other side sends no parts.

        Entering it raises FileNotFoundError where there is no such file, Fault where the next attempt may succeed, and
        DataError where it will not.
        """

    def _refused(
        self, name: str, reason: object, mend: str = "check the address and your right to read it"
    ) -> DataError:
        return DataError(f"{name} from {self.location} cannot be had ({reason}); {mend}")


def connection_fault(error: Exception, timeout: float) -> Fault:
    """What an exception of aiohttp means, in fewer words."""
    import aiohttp

    if isinstance(error, TimeoutError):
        return Fault(f"nothing came for {timeout:g} s")
    return Fault("the connection broke" if isinstance(error, aiohttp.ClientPayloadError) else error)


def without_secrets(address: str) -> str:
    """An address as it may be shown: without user, password and query, which may be a signature."""
    if "://" not in address:
        return address
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")).rstrip("/")


def file_system(address: str, settings: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Any, str]:
    """The fsspec file system of an address, one per process, and the folder in it.

    settings: entries of dictionaries among its arguments; the other entries are those of fsspec's configuration (files in
    ~/.config/fsspec, FSSPEC_... variables), as are the other arguments. Raises DataError where a package is missing or fsspec knows no such address.
    """
    try:
        from fsspec.config import conf
        from fsspec.core import url_to_fs

        configured = conf.get(address.partition("://")[0], {})
        arguments = {name: {**configured.get(name, {}), **values} for name, values in (settings or {}).items()}
        found: tuple[Any, str] = url_to_fs(address, **arguments)
        return found
    except ImportError as error:
        raise DataError(
            f"{without_secrets(address)} needs a package that is missing ({error}); pip install 'em-megatron[remote]', "
            "and for addresses other than http and s3 the package that fsspec names"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{without_secrets(address)} cannot be read ({error}); give a folder, an address that fsspec knows, or pipe:COMMAND"
        ) from None
