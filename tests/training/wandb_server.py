"""As much of wandb's server as its client needs to upload a run: it keeps the history of each, line by line."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class WandbServer:
    """history: of each run's id, its rows; posts: how many lines each upload found there, and how many it brought."""

    url: str = ""
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    posts: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What sends a client here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "k" * 40}

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """To a request of its GraphQL interface."""
        name = variables.get("name") or ""
        project = {"id": "project", "name": "p", "entity": {"id": "entity", "name": "us"}}
        if operation == "UpsertBucket":
            bucket = {"id": name, "name": name, "displayName": name, "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket | self._counts(name), "inserted": name not in self.history}}
        if operation == "RunResumeStatus":
            return {"model": project | {"bucket": self._state(name) if name in self.history else None}}
        if operation == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/files/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        return {}

    def take(self, run: str, files: dict[str, Any]) -> None:
        """A part of a run's files: lines from an offset on, in place of what is there."""
        if chunk := files.get("wandb-history.jsonl"):
            rows = self.history.setdefault(run, [])
            self.posts.append((run, len(rows), len(chunk["content"])))
            rows[chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]

    def _counts(self, name: str) -> dict[str, int]:
        return {"historyLineCount": len(self.history.get(name, []))}

    def _state(self, name: str) -> dict[str, Any]:
        last = json.dumps(self.history[name][-1])
        counts = self._counts(name) | {"eventsLineCount": 0, "logLineCount": 0}
        counts["wandbConfig"] = json.dumps({"t": {}})  # else the run counts as never begun
        tails = {"historyTail": json.dumps([last]), "eventsTail": "[]", "summaryMetrics": last}
        return {"id": name, "name": name, "displayName": name, "config": "{}", "tags": [], **counts, **tails}


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server on a free port of this machine."""
    server = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self._body()
            self._reply({})

        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            body = self._body()
            if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                server.take(stream[1], json.loads(body).get("files") or {})
                self._reply({"exitcode": None, "limits": {}})
            elif self.path.startswith("/graphql"):
                request = json.loads(body)
                operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
                answer = server.answer(operation[1] if operation else "", request.get("variables") or {})
                self._reply({"data": answer})
            else:
                self._reply({})

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _reply(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.handle_error = lambda *args: None  # clients that hang up
        server.url = f"http://127.0.0.1:{http.server_port}"
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield server
        http.shutdown()
