"""Measures speed and memory beside what a user would pick instead: python launch/benchmark.py SUBCOMMAND [--option X]"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from em_megatron.benchmark.options import parse
from em_megatron.config import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    given_line = list(sys.argv[1:] if arguments is None else arguments)
    try:
        subcommand, given = parse(given_line)
        if given.get("device") == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: the trainer takes a GPU where it sees one
        from em_megatron.benchmark.runner import run

        report = run(subcommand, given, given_line)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
