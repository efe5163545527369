"""Waiting for several files at once."""

import queue
import threading
from collections.abc import Callable, Sequence

THREADS = 8


def in_parallel[Item, Result](function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results in order, by a few threads; raises the first error.

    Unlike those of ThreadPoolExecutor, these threads do not keep a process from ending while they wait for a server.
    """
    if len(items) < 2:
        return [function(item) for item in items]
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(items)):
        waiting.put(index)
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def work() -> None:
        while not errors:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                results[index] = function(items[index])
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(THREADS, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(items))]
