"""Trying again: actions on a network that fail for a while and then succeed."""

import logging
import time
from collections.abc import Callable, Mapping

from em_megatron.data.manifest import DataError

log = logging.getLogger(__name__)

FIRST_WAIT = 1.0  # seconds, doubled with every attempt
LONGEST_WAIT = 60.0
PASSING_STATUSES = frozenset({408, 416, 425, 429, 500, 502, 503, 504})  # after which the same request may succeed


class Fault(Exception):  # noqa: N818  # most are mended before anyone sees them
    """A fault that may have passed at the next attempt. wait: seconds the other side asked for, where it did."""

    def __init__(self, reason: object, wait: float | None = None) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.wait = wait


def persistently[Result](
    what: str,
    action: Callable[[], Result],
    advice: str,
    progress: Callable[[], int] = int,
    attempts: int = 6,
    first_wait: float | None = None,
    longest_wait: float = LONGEST_WAIT,
) -> Result:
    """The result of an action, tried again with growing waits while it raises Fault; other exceptions end it.

    what: what is fetched and from where, for the messages. advice: what the user can do when it fails for good.
    progress: a number that grows as the action comes further; attempts that come further than any before are free.
    attempts: in a row that come no further. first_wait, longest_wait: in seconds.

    Raises DataError after the last attempt.
    """
    failures, best = 0, progress()
    while True:
        try:
            return action()
        except Fault as fault:
            reached = progress()
            failures = 1 if reached > best else failures + 1
            best = max(best, reached)
            if failures >= attempts:
                raise DataError(f"could not fetch {what} in {failures} attempts ({fault}); {advice}") from None
            first = FIRST_WAIT if first_wait is None else first_wait
            wait = min(first * 2 ** (failures - 1) if fault.wait is None else fault.wait, longest_wait)
            log.warning("%s: attempt %d of %d failed (%s); again in %.3g s", what, failures, attempts, fault, wait)
            time.sleep(wait)


def retry_after(headers: Mapping[str, str] | None) -> float | None:
    """Seconds of an HTTP answer's Retry-After; None where it gives none in seconds."""
    asked = headers.get("Retry-After", "") if headers else ""
    return float(asked) if asked.isdigit() else None
