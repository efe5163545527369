"""Files of a web server, through fsspec's client for it (aiohttp)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from em_megatron.data.retry import PASSING_STATUSES, Fault, retry_after
from em_megatron.data.sources.transports.base import CHUNK, Download, Transport, connection_fault, file_system

GONE = frozenset({404, 410})
PROXIES = {"client_kwargs": {"trust_env": True}}  # HTTP_PROXY and its kin


class HttpTransport(Transport):
    """http and https. A query in the address, such as a signature, goes with every file."""

    @contextmanager
    def open(self, name: str, start: int) -> Iterator[Download]:
        fs, _ = file_system(self._address, PROXIES)
        import aiohttp
        from fsspec.asyn import sync

        async def request() -> Any:
            session = await fs.set_session()
            headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
            if start:
                headers["Range"] = f"bytes={start}-"
            limits = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout, sock_read=self._timeout)
            arguments = {**fs.kwargs, "headers": headers, "timeout": limits}
            return await session.get(fs.encode_url(self._url(name)), **arguments)

        def chunks(response: Any) -> Iterator[bytes]:
            try:
                while chunk := sync(fs.loop, response.content.read, CHUNK):
                    yield chunk
            except (aiohttp.ClientError, OSError) as error:
                raise connection_fault(error, self._timeout) from error

        try:
            response = sync(fs.loop, request)
        except (aiohttp.InvalidURL, aiohttp.ClientConnectorCertificateError) as error:
            raise self._refused(name, error) from None
        except (aiohttp.ClientError, OSError) as error:
            raise connection_fault(error, self._timeout) from error
        try:
            offset, total = self._part(name, start, response)
            yield Download(offset, total, chunks(response))
        finally:
            fs.loop.call_soon_threadsafe(response.close)

    def _url(self, name: str) -> str:
        parts = urlsplit(self._address)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))

    def _part(self, name: str, start: int, response: Any) -> tuple[int, int | None]:
        """Where the answer begins, and the size of the whole file."""
        status, headers = response.status, response.headers
        if status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
            if match is None or int(match[1]) != start:
                raise Fault(f"the server sent another part than the one from byte {start}")
            return start, None if match[2] == "*" else int(match[2])
        if status == 200:
            plain = headers.get("Content-Encoding", "identity") == "identity"
            return 0, response.content_length if plain else None
        if status in GONE:
            raise FileNotFoundError(f"{name} from {self.location}")
        match = re.fullmatch(r"bytes \*/(\d+)", headers.get("Content-Range", ""))
        if status == 416 and match and int(match[1]) <= start:
            return start, int(match[1])
        if status in PASSING_STATUSES:
            raise Fault(f"{status} {response.reason}", retry_after(headers))
        raise self._refused(name, f"the server answers {status} {response.reason}")
