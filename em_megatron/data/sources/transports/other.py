"""Files of any other store that an installed package makes known to fsspec: gs://, abfs://, hf://, sftp:// and more."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from em_megatron.data.manifest import DataError
from em_megatron.data.retry import Fault
from em_megatron.data.sources.transports.base import Download, Transport, file_system

PIECE = 4 << 20  # bytes asked for at a time
FINAL = (PermissionError, NotImplementedError, ValueError, TypeError, ImportError)


class FsspecTransport(Transport):
    """Reads pieces of PIECE bytes; a piece that does not come within the timeout is a fault."""

    @contextmanager
    def open(self, name: str, start: int) -> Iterator[Download]:
        fs, root = file_system(self._address)
        path = f"{root.rstrip('/')}/{name}"
        total = self._ask(name, lambda: fs.info(path)).get("size")

        def chunks() -> Iterator[bytes]:
            position = start
            while total is None or position < total:
                first, last = position, position + PIECE if total is None else min(position + PIECE, total)
                piece = self._ask(name, partial(fs.cat_file, path, start=first, end=last))
                position += len(piece)
                if piece:
                    yield piece
                if len(piece) < last - first:
                    return

        yield Download(start, total, chunks())

    def _ask[Answer](self, name: str, question: Callable[[], Answer]) -> Answer:
        try:
            return within(self._timeout, question)
        except (FileNotFoundError, DataError):
            raise
        except FINAL as error:
            raise self._refused(name, error) from None
        except Exception as error:  # every package raises its own
            raise Fault(error) from error


def within[Answer](seconds: float, question: Callable[[], Answer]) -> Answer:
    """The answer of a function; TimeoutError where it takes longer, and then its thread is left to itself."""
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(question())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="data-source", daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"nothing came for {seconds:g} s") from None
