"""Real servers that fail as they are told: of a folder over HTTP, and a proxy for any TCP connection.

As a program (`python -m tests.data.servers FOLDER PORT STALL_AFTER`), a server of a folder that can be killed.
"""

import re
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Trouble(NamedTuple):
    """What happens to one answer. status: sent in place of the file; after so many bytes the connection breaks (`cut`) or
    says no more (`stall`), or the byte there is another (`flip`)."""

    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    cut: int | None = None
    stall: int | None = None
    flip: int | None = None


@dataclass
class FolderServer:
    """A folder over HTTP. troubles: taken one a request. requests: name and Range of each, in order.

    before_cut: called with the position in the file at which a connection is about to be reset, which may cost the client
    bytes that it has not read yet.
    """

    folder: Path
    ranges: bool = True
    port: int = 0
    always: Trouble | None = None
    before_cut: Callable[[int], None] | None = None
    troubles: list[Trouble] = field(default_factory=list)
    requests: list[tuple[str, str | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        outer = self
        self._lock, self._closed = threading.Lock(), threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients go away in the middle
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self.server.shutdown()
        self.server.server_close()

    def asked(self, name: str) -> list[str | None]:
        """The Range of every request of a file."""
        return [part for requested, part in self.requests if requested == name]

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        with self._lock:
            trouble = self.troubles.pop(0) if self.troubles else self.always or Trouble()
            self.requests.append((Path(parts.path).name, request.headers.get("Range")))
        path = self.folder / unquote(parts.path).lstrip("/")
        if trouble.status or not path.is_file():
            request.send_response(trouble.status or 404)
            for header, value in (*trouble.headers, ("Content-Length", "0")):
                request.send_header(header, value)
            request.end_headers()
            return
        content = bytearray(path.read_bytes())
        if trouble.flip is not None:
            content[trouble.flip] ^= 1
        match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "") if self.ranges else None
        start = int(match[1]) if match else 0
        if start and start >= len(content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(content)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if match else 200)
        if match:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        self._send(request, bytes(content), start, trouble)

    def _send(self, request: BaseHTTPRequestHandler, content: bytes, start: int, trouble: Trouble) -> None:
        end = trouble.cut if trouble.cut is not None else trouble.stall
        request.wfile.write(content[start:][:end])
        request.wfile.flush()
        if trouble.stall is not None:
            self._closed.wait()
        if end is not None:
            request.close_connection = True
        if trouble.cut is not None:
            if self.before_cut:
                self.before_cut(start + trouble.cut)
            reset(request.connection)


def reset(connection: socket.socket) -> None:
    """Ends a connection so that the other side sees it reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class Proxy:
    """Passes TCP connections on to a port of this machine.

    limits: of bytes of answers, taken one a connection; after them it ends, or says no more with `stall`. None: no limit.
    answered: bytes of answers that each connection passed on. before_end: called with `answered` before a connection
    ends, which may cost the client bytes that it has not read yet.
    """

    def __init__(self, target: int, stall: bool = False) -> None:
        self.limits: list[int | None] = []
        self.answered: list[int] = []
        self.before_end: Callable[[list[int]], None] | None = None
        self._target, self._stall, self._closed = target, stall, threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        start(self._listen)

    def close(self) -> None:
        self._closed.set()
        self._listener.close()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            limit = self.limits.pop(0) if self.limits else None
            self.answered.append(0)
            start(self._pass_on, client, server, None, None)
            start(self._pass_on, server, client, len(self.answered) - 1, limit)

    def _pass_on(self, source: socket.socket, sink: socket.socket, connection: int | None, limit: int | None) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(1 << 14):
                data = data[: None if limit is None else limit - passed]
                sink.sendall(data)
                passed += len(data)
                if connection is not None:
                    self.answered[connection] = passed
                if passed == limit:
                    break
            if passed == limit and self._stall:
                self._closed.wait()
            elif passed == limit and self.before_end:
                self.before_end(self.answered)
        for end in (source, sink):  # shutdown, as close would leave the other thread waiting
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def start(function: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()


if __name__ == "__main__":
    server = FolderServer(Path(sys.argv[1]), port=int(sys.argv[2]))
    if len(sys.argv) > 3:
        server.always = Trouble(stall=int(sys.argv[3]))
    print(server.port, flush=True)
    threading.Event().wait()
