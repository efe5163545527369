"""Whether the output folder is the same folder on every node, and the offset of every node's clock."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from em_megatron.environment.exchange import Exchange
from em_megatron.environment.report import cause

PATIENCE_SECONDS = 5.0  # network file systems may show a new file late
CLOCK_READINGS = 3


@dataclass(frozen=True)
class FolderFacts:
    """Of one node: where its output folder is, its free bytes, and what is wrong with it (empty: nothing)."""

    path: str
    free: int
    error: str


def examine_folder(exchange: Exchange, folder: Path) -> FolderFacts:
    """Whether rank 0's file appears in `folder` here, and one can be written; called by the ranks that lead a node.

    Rank 0 makes the folder where it is missing, and everything made is removed again. Raises HealthError when a rank
    does not come in time.
    """
    here = folder.expanduser().absolute()
    if exchange.place.rank:
        return _look(exchange, here)
    with _present(here) as problem:
        name, token = f".health-{secrets.token_hex(8)}", secrets.token_hex(16)
        problem = problem or _write(here / name, token)
        exchange.put("file", [str(here), name, token, bool(problem)])
        try:
            for node in range(exchange.place.nodes - 1):
                exchange.get(f"looked/{node}", "a node")
        finally:
            with contextlib.suppress(OSError):
                (here / name).unlink()
        return FolderFacts(str(here), _free(here), problem)


def _look(exchange: Exchange, here: Path) -> FolderFacts:
    """On other nodes than rank 0's: nothing is said of a file that rank 0 could not write."""
    theirs, name, token, failed = exchange.get("file")
    error = "" if failed else _other_folder(here, theirs, name, token)
    if not failed and not error:
        mine = here / f"{name}-{exchange.place.rank}"
        error = _write(mine, token)
        with contextlib.suppress(OSError):
            mine.unlink()
    free = _free(here)
    exchange.put(f"looked/{exchange.store.add('lookers', 1) - 1}", True)
    return FolderFacts(str(here), free, error)


def clock_offset(exchange: Exchange) -> float:
    """Seconds by which this node's clock is ahead of rank 0's, to a few milliseconds; on ranks that lead a node.

    Rank 0 answers one node after another; of some readings the one with the shortest way there and back counts.
    """
    if exchange.place.rank == 0:
        for question in range((exchange.place.nodes - 1) * CLOCK_READINGS):
            exchange.get(f"asked/{question}", "a node")
            exchange.put(f"time/{question}", time.time())
        return 0.0
    first = (exchange.store.add("askers", 1) - 1) * CLOCK_READINGS
    readings = []
    for question in range(first, first + CLOCK_READINGS):
        if question:
            exchange.get(f"time/{question - 1}")  # the one before has been answered
        start, counter = time.time(), time.perf_counter()
        exchange.put(f"asked/{question}", True)
        answer = exchange.get(f"time/{question}")
        way = time.perf_counter() - counter
        readings.append((way, start + way / 2 - answer))
    return min(readings)[1]


@contextlib.contextmanager
def _present(folder: Path) -> Iterator[str]:
    """Makes `folder` where it is missing and takes away again what it made and is empty; yields why it could not."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = ""
    except OSError as error:
        problem = cause(error)
    yield problem
    for path in missing:
        with contextlib.suppress(OSError):
            path.rmdir()


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def _write(path: Path, text: str) -> str:
    try:
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot be written: {cause(error)}"
    return ""


def _other_folder(mine: Path, theirs: str, name: str, token: str) -> str:
    """What is wrong if rank 0's file does not appear here."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        with contextlib.suppress(OSError):
            os.listdir(mine)  # lets NFS look again
            if (mine / name).read_text() == token:
                return ""
        if time.monotonic() > end:
            return f"is another folder than {theirs} of node 0: a file written there did not appear in {PATIENCE_SECONDS:g} s"
        time.sleep(0.1)
