"""Claims of processes on units of work, as files in one folder that all of them see.

A claim is a hard link, which only one process can make, and which has its content from the first moment on. It is
touched while it is held. It is stale when its process on this machine is gone, or when it was not touched for two
minutes by the clock of the file system, also where its process lives; then another process takes it over. Two processes may come to do one unit after
all (one was stopped for minutes and woke up): work must have the same result twice.
"""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

STALE_SECONDS = 120.0
BEAT_SECONDS = 20.0


def machine_name() -> str:
    """This machine, since its last start, and its process numbers: containers may count processes on their own."""
    started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{os.uname().nodename} {started} {os.readlink('/proc/self/ns/pid')}"


def start_time(pid: int) -> str | None:
    """When a process of this machine was started, in ticks; None where it is gone (or ended and not collected)."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Claims:
    """The claims that this process makes in `folder`, which must exist. Use it as a context: the end releases all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.owner = [machine_name(), os.getpid(), start_time(os.getpid()), os.urandom(4).hex()]
        self._held: set[str] = set()
        self._asked, self._ahead = float("-inf"), 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for unit in tuple(self._held):
            self.release(unit)

    def acquire(self, unit: str) -> bool:
        """Claims a unit; False where a living process has it. Raises FileNotFoundError where the folder is gone."""
        path = self.folder / unit
        if not self._create(path) and not (self._put_aside(path) and self._create(path)):
            return False
        self._held.add(unit)
        return True

    def release(self, unit: str) -> None:
        """Gives up a claim of this process."""
        self._held.discard(unit)
        (self.folder / unit).unlink(missing_ok=True)

    def abandon(self) -> None:
        """Gives up all claims of this process, also one that it is making while a signal ends it."""
        for name in os.listdir(self.folder) if self.folder.is_dir() else ():
            path = self.folder / name
            with contextlib.suppress(FileNotFoundError):
                if path.read_bytes() == self._content():
                    path.unlink()

    def owners(self) -> dict[str, str]:
        """The living other processes by the units that they have claimed."""
        found = {}
        for name in (name for name in os.listdir(self.folder) if not name.startswith(".")):
            content = self._living(self.folder / name)
            if content is not None and content != self._content():
                found[name] = content.decode()
        return found

    def _content(self) -> bytes:
        return json.dumps(self.owner).encode()

    def _create(self, path: Path) -> bool:
        if path.exists():
            return False
        made = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")
        try:
            made.write_bytes(self._content())
            os.link(made, path)
            return True
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                return path.read_bytes() == self._content()  # NFS may answer so to a request that it got twice
            return False
        finally:
            made.unlink(missing_ok=True)

    def _living(self, path: Path) -> bytes | None:
        """The content of a claim that is held; None where it is stale or gone."""
        try:
            content = path.read_bytes()
            modified = path.stat().st_mtime
        except FileNotFoundError:
            return None
        try:
            machine, pid, started, _ = json.loads(content)
        except (ValueError, TypeError):
            machine, pid, started = None, 0, None  # not written by this program
        if machine == self.owner[0] and start_time(pid) != started:
            return None
        if content == self._content() and path.name not in self._held:
            return None  # of this process, given up, and put back by one that was slow to take it over
        return content if self._now() - modified < STALE_SECONDS else None

    def _put_aside(self, path: Path) -> bool:
        """Removes a stale claim; False for one that is held."""
        if self._living(path) is not None:
            return False
        aside = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.stale")
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return True
        fresh = self._living(aside) is not None  # another process was faster, and this is its new claim
        if fresh:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)
        return not fresh

    def _now(self) -> float:
        """The clock of the file system, which may not be that of this machine; asked for now and then."""
        if time.monotonic() - self._asked > BEAT_SECONDS:
            clock = self.folder / f".clock.{os.uname().nodename}-{os.getpid()}"
            clock.touch()
            self._ahead = clock.stat().st_mtime - time.monotonic()
            self._asked = time.monotonic()
            clock.unlink(missing_ok=True)
        return time.monotonic() + self._ahead

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            for unit in tuple(self._held):
                with contextlib.suppress(OSError):
                    os.utime(self.folder / unit)
