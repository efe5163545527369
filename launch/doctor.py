"""Says whether this environment is fit to train, and which path everything takes: python launch/doctor.py [--json]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

TITLES = ("versions", "devices", "operators", "communication")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="doctor.py",
        description="Prints one page on this environment: versions, GPUs, disks, the implementation that each operator "
        "takes and why, apex and Transformer Engine, gloo and NCCL, network, Slurm.",
        epilog="Lines are marked ok, note (worth knowing), warning (works, but worse than it could) or ERROR. The exit "
        "code is 0 without an ERROR and 1 with one. Nothing is changed, written or sent.",
    )
    parser.add_argument("--json", action="store_true", help="print the same lines as JSON")
    parser.add_argument("--only", nargs="+", choices=TITLES, default=TITLES, help="only these sections of the page")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        from em_megatron.environment.diagnosis import examine
    except ModuleNotFoundError as error:
        print(f"error: {error}: pip install -e . in the folder of em-megatron's pyproject.toml", file=sys.stderr)
        return 1
    report = examine(options.only)
    print(report.as_json() if options.json else report.as_text())
    return 0 if report.fit else 1


if __name__ == "__main__":
    sys.exit(main())
