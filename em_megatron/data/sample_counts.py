"""How many samples the groups of a stream have, kept between starts.

Where sample n lies is known once all groups before it are packed, which takes a second per million documents. A run that
goes on far into a large corpus finds these counts here instead. They follow from the key, so that a lost file costs time
and nothing else, and processes that write at once write the same.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class SampleCounts:
    """The samples of groups 0, 1, ... as far as they were counted.

    folder: where they are kept; None: in this process only. key: everything they depend on.
    """

    def __init__(self, folder: Path | None, key: list[Any]) -> None:
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        self._path = folder / f"samples-{digest[:32]}.json" if folder else None
        self.counts: list[int] = self._read()
        self._written = len(self.counts)

    def look_again(self) -> None:
        """Takes over what another process, such as a data worker, has counted meanwhile."""
        found = self._read()
        if len(found) > len(self.counts):
            self.counts, self._written = found, len(found)

    def append(self, count: int) -> None:
        """The next group has so many."""
        self.counts.append(count)

    def save(self) -> None:
        """Keeps what was counted, unless another process has kept as much."""
        if self._path is None or len(self.counts) <= max(self._written, len(self._read())):
            return
        partial = self._path.with_name(f"{self._path.name}.{os.uname().nodename}-{os.getpid()}.partial")
        self._written = len(self.counts)
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self.counts))
            os.replace(partial, self._path)
        except OSError as error:
            log.warning("the sample counts of the data were not kept (%s); a later start will count again", error)

    def _read(self) -> list[int]:
        try:
            found = json.loads(self._path.read_text()) if self._path else []
        except (OSError, ValueError):
            return []
        whole = isinstance(found, list) and all(isinstance(count, int) and count >= 0 for count in found)
        return found if whole else []
