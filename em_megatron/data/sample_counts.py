"""How many samples the groups of a stream have, kept between starts.

Where sample n lies is known once all groups before it are packed, which takes a second per million documents. A run that
goes on far into a large corpus finds these counts here instead. They follow from the key, so that a lost or damaged file
costs time and nothing else.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from em_megatron.data.sources.locks import locked

log = logging.getLogger(__name__)


class SampleCounts:
    """The samples of groups 0, 1, ... as far as they were counted.

    folder: where they are kept; None: in this process only. key: everything they depend on.
    """

    def __init__(self, folder: Path | None, key: list[Any]) -> None:
        self._key = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        self.path = folder / f"samples-{self._key[:32]}.json" if folder else None
        self.counts: list[int] = self._read()

    def get(self, number: int, count: Callable[[int], int]) -> int:
        """The samples of a group, by `count` where they are not known; groups before it come first.

        Of the processes of a machine that ask at once, one counts and the others wait.
        """
        while number >= len(self.counts):
            with self._alone():
                self._look_again()
                if number >= len(self.counts):
                    self.counts.append(count(len(self.counts)))
                    self._write()
        return self.counts[number]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with ExitStack() as held:
            try:
                if self.path is not None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    held.enter_context(locked(self.path.with_suffix(".lock")))
            except OSError as error:
                log.warning("the sample counts of the data are not kept (%s); every start counts again", error)
                self.path = None
            yield

    def _look_again(self) -> None:
        found = self._read()
        if len(found) > len(self.counts):
            self.counts = found

    def _write(self) -> None:
        if self.path is None:
            return
        partial = self.path.with_name(f"{self.path.name}.{os.uname().nodename}-{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps({"counts": self.counts, "sha256": self._digest(self.counts)}))
            os.replace(partial, self.path)
        except OSError as error:
            log.warning("the sample counts of the data were not kept (%s); a later start counts again", error)
            partial.unlink(missing_ok=True)

    def _read(self) -> list[int]:
        try:
            found = json.loads(self.path.read_text()) if self.path else {}
            counts: list[int] = found["counts"]
            return counts if found["sha256"] == self._digest(counts) else []
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _digest(self, counts: list[int]) -> str:
        return hashlib.sha256(f"{self._key} {json.dumps(counts)}".encode()).hexdigest()
