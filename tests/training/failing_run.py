"""launch/pretrain.py with a fault: the last rank raises, or is killed, in the middle of a forward pass.

usage: failing_run.py raise|kill RECIPE [section.key=value ...]   under torchrun
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

CALLS = 9  # of the attention core, so that the first step is over


def install(how: str) -> None:
    from em_megatron.model.elastic_attention import TrapezoidCore

    original, calls = TrapezoidCore.forward, [0]

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        calls[0] += 1
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 and calls[0] == CALLS:
            print(f"FAILS AT {time.time()}", flush=True)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the fault of this test")
        return original(self, *args, **options)

    TrapezoidCore.forward = forward  # type: ignore[method-assign]


if __name__ == "__main__":
    fault = sys.argv.pop(1)
    from launch.pretrain import main

    install(fault)
    sys.exit(main())
