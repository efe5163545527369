"""Says whether all nodes of a job are fit to train together: torchrun --nnodes=N ... launch/health_check.py"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="health_check.py",
        description="Looks at every node before a job trains, and prints a table with a line for each, then what is "
        "wrong: GPUs, versions, the output folder, local disks, clocks, and all-reduces within nodes, between neighbours "
        "and over all ranks. Under torchrun with one rank per GPU (or one per node without GPUs); alone on one node.",
        epilog="The exit code is 0 on all ranks where every node is fit, else 1. A rank that dies or hangs ends it with "
        "one sentence. Nothing is left behind in the folders.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder that all nodes must share (runs)")
    parser.add_argument(
        "--expected-gpus", type=int, metavar="G", help="GPUs of each node (default: as many as the others)"
    )
    parser.add_argument(
        "--minimum-bandwidth", type=float, metavar="GBPS", help="least bus bandwidth of every all-reduce, in GB/s"
    )
    parser.add_argument("--time-limit", type=float, default=60, metavar="S", help="seconds for each step (60)")
    parser.add_argument("--json", action="store_true", help="print the same page as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    from em_megatron.environment.health import Options, check
    from em_megatron.parallel.launcher import end_with_launcher

    end_with_launcher()
    bandwidth = options.minimum_bandwidth
    return check(
        Options(
            output=options.output,
            expected_gpus=options.expected_gpus,
            minimum_bandwidth=None if bandwidth is None else bandwidth * 1e9,
            time_limit=options.time_limit,
            json=options.json,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
