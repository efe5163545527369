"""Held-out perplexity and bits per byte of a checkpoint: python launch/evaluate.py RUN_OR_CHECKPOINT [KEY=VALUE ...]"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from em_megatron.config import ConfigError, plain_overrides
from em_megatron.training.stopping import StopRequest


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Reads the held-out documents once and reports loss, perplexity and bits per byte, overall and by "
        "position in the context, as a table, JSON and PNG. Alone or under torchrun (ranks share the samples). The "
        "memory's reader can be changed without retraining: memory.slots=64 memory.sampler=uniform memory.order=32 (or --memory.slots=64).",
    )
    parser.add_argument("checkpoint", type=Path, help="run folder, or one of its checkpoints/step_*")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options that replace the run's")
    parser.add_argument("--samples", type=int, default=0, help="read only so many held-out samples; 0: all (default)")
    parser.add_argument("--reference-models", action="store_true", help="also fit and score n-gram models to beat")
    parser.add_argument("--output", type=Path, help="folder of the report (default: RUN/evaluation)")
    return parser.parse_intermixed_args(plain_overrides(sys.argv[1:]))


def main() -> int:
    stop = StopRequest().catch()  # before torch is imported, which takes seconds
    arguments = parse()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    from em_megatron.checkpoint.folder import CheckpointError
    from em_megatron.data.manifest import DataError
    from em_megatron.evaluation.report import evaluate_checkpoint, write_report
    from em_megatron.parallel.launcher import end_with_launcher, leave
    from em_megatron.parallel.outcome import report_outcome
    from em_megatron.parallel.process_groups import shutdown
    from em_megatron.training.restore import restore

    end_with_launcher()
    try:
        if arguments.samples and arguments.reference_models:
            raise ConfigError("--reference-models are scored on the whole held-out split: leave --samples out")
        run = restore(arguments.checkpoint, arguments.overrides, world_size)
        found = evaluate_checkpoint(run, arguments.samples, arguments.reference_models and rank == 0, stop.agreed)
        if rank == 0 and found is not None:
            print(write_report(run, found, arguments.output or run.checkpoint.parent.parent / "evaluation"))
    except (ConfigError, CheckpointError, DataError) as error:
        report_outcome("refused")
        leave(error, 2, on_all_ranks=not isinstance(error, DataError))
    if rank == 0:
        report_outcome("stopped" if found is None else "finished")
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
