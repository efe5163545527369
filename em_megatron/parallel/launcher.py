"""How ranks end: with the process that started them, and on an error without waiting for each other."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SECONDS_FOR_RANK_0 = 5


def end_with_launcher() -> None:
    """Asks Linux to kill this rank when torchrun dies.

    torchrun's workers have a session of their own: when torchrun is killed they would train on, unseen, and write to
    the same run as the next launch. Does nothing without torchrun or on other systems.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the request was heard
        os.kill(os.getpid(), signal.SIGKILL)


def leave(error: BaseException, exit_code: int, on_all_ranks: bool) -> NoReturn:
    """Prints one sentence and ends this rank at once; torchrun then ends the others.

    Process groups are not taken down: that may wait for ranks that will not come. An error that all ranks raise
    together is printed by rank 0, which the others give a moment before torchrun ends everyone.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0 or not on_all_ranks:
        where = f" (rank {rank})" if rank else ""
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
    elif world_size > 1:
        time.sleep(_SECONDS_FOR_RANK_0)
    sys.stdout.flush()
    os._exit(exit_code)
