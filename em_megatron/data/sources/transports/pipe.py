"""Files that a command of the user prints, such as `ssh host cat /data/corpus/{}`."""

import os
import select
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from em_megatron.data.manifest import DataError
from em_megatron.data.retry import Fault
from em_megatron.data.sources.transports.base import CHUNK, Download, Transport

PREFIX = "pipe:"
PLACE = "{}"
NOT_STARTED = {126: "it cannot be executed", 127: "there is no such command"}
SHOWN = 300  # characters of what a command says of its failure


class PipeTransport(Transport):
    """pipe:COMMAND for the shell; `{}` in it is the file's name, quoted. Every file begins at its beginning.

    Raises DataError for a command without `{}`.
    """

    def __init__(self, address: str, timeout: float) -> None:
        self.location, self._timeout, self._command = address, timeout, address.removeprefix(PREFIX).strip()
        if PLACE not in self._command:
            raise DataError(
                f"{address!r} has no {PLACE} for the file's name; write for example 'pipe:ssh host cat /data/corpus/{PLACE}'"
            )

    @contextmanager
    def open(self, name: str, start: int) -> Iterator[Download]:
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                self._command.replace(PLACE, shlex.quote(name)),
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # so that all of a pipeline can be ended
            )
            try:
                yield Download(0, None, self._chunks(name, process, errors))
            finally:
                _end(process)

    def _chunks(self, name: str, process: subprocess.Popen[bytes], errors: IO[bytes]) -> Iterator[bytes]:
        assert process.stdout is not None
        output = process.stdout.fileno()
        poll = select.poll()
        poll.register(output)
        while True:
            if not poll.poll(self._timeout * 1000):
                raise Fault(f"the command printed nothing for {self._timeout:g} s")
            chunk = os.read(output, CHUNK)
            if not chunk:
                break
            yield chunk
        try:
            status = process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            raise Fault(f"the command did not end within {self._timeout:g} s of its last byte") from None
        if status:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()[-SHOWN:]
            if status in NOT_STARTED:
                raise self._refused(name, f"{NOT_STARTED[status]}: {said}", "correct the command")
            raise Fault(f"the command ended with status {status}" + (f": {said}" if said else ""))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and all that it started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
