"""Evaluates a checkpoint or a Hugging Face folder: python launch/evaluate.py CHECKPOINT [--suite all] [KEY=VALUE ...]"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from em_megatron.config import ConfigError, plain_overrides
from em_megatron.evaluation.options import add_options, parts_of, settings_of
from em_megatron.training.stopping import StopRequest


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Evaluates a run, a checkpoint, or a Hugging Face folder of launch/export_hf.py: a table here, JSON, "
        "Markdown and PNG in a folder. Alone or under torchrun (ranks share the work). A call that was ended goes on where "
        "it stopped; one with other settings begins anew. The memory's reader can be changed without retraining: "
        "memory.slots=64 memory.sampler=uniform memory.order=32 (or --memory.slots=64).",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="run folder, one of its checkpoints/step_*, or a Hugging Face folder"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options that replace the run's")
    add_options(parser)
    return parser.parse_intermixed_args(plain_overrides(sys.argv[1:]))


def main() -> int:
    stop = StopRequest().catch()  # before torch is imported, which takes seconds
    arguments = parse()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    from em_megatron.checkpoint.folder import CheckpointError
    from em_megatron.data.manifest import DataError
    from em_megatron.evaluation.report import evaluate_subject
    from em_megatron.evaluation.subject import open_subject
    from em_megatron.evaluation.suite import Interrupted
    from em_megatron.parallel.launcher import end_with_launcher, leave
    from em_megatron.parallel.outcome import report_outcome
    from em_megatron.parallel.process_groups import shutdown

    end_with_launcher()
    outcome = "finished"
    try:
        settings, parts = settings_of(arguments), parts_of(arguments)
        subject = open_subject(arguments.checkpoint, arguments.overrides, world_size)
        references = arguments.reference_models and rank == 0
        table = evaluate_subject(subject, settings, parts, references, arguments.output, stop, writes=rank == 0)
        if rank == 0:
            print(table)
    except Interrupted:
        outcome = "stopped"
        if rank == 0:
            print("stopped: the same command goes on from here", file=sys.stderr)
    except (ConfigError, CheckpointError, DataError) as error:
        report_outcome("refused")
        leave(error, 2, on_all_ranks=not isinstance(error, DataError))
    if rank == 0:
        report_outcome(outcome)
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
