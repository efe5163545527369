"""Ranks that end with the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
