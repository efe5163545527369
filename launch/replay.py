"""Looks at training batches one by one, such as those that a run skipped: python launch/replay.py RUN [--samples A-B]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from em_megatron.config import ConfigError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="replay.py",
        description="Prints, for each sample of the batches that a run skipped (its skipped.jsonl) or of those given, the "
        "documents in it, the beginning of their text, and its loss under the newest checkpoint, or under the one given. "
        "Nothing is changed. Memory carried from step to step is not: every sample begins with an empty one.",
    )
    parser.add_argument("run", type=Path, help="run folder, or one of its checkpoints/step_*")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options that replace the run's")
    parser.add_argument("--samples", metavar="A-B", help="samples of the run, counted from 0, both ends included")
    parser.add_argument("--characters", type=int, default=160, help="of text shown per document (default 160)")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse()
    from em_megatron.checkpoint.folder import CheckpointError
    from em_megatron.data.manifest import DataError
    from em_megatron.evaluation.replay import chosen_samples, replay
    from em_megatron.parallel.process_groups import shutdown
    from em_megatron.training.restore import restore

    try:
        run = restore(arguments.run, arguments.overrides, world_size=1)
        samples = chosen_samples(run, arguments.samples)
        for line in replay(run, samples, arguments.characters):
            print(line, flush=True)
    except (ConfigError, CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
