"""Pretrains a model: python launch/pretrain.py RECIPE.yaml [section.key=value ...], alone or under torchrun."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback

from em_megatron.config import ConfigError, RunConfig, describe_options, load_config
from em_megatron.parallel.outcome import report_outcome
from em_megatron.training.stopping import StopRequest


def parse() -> RunConfig:
    parser = argparse.ArgumentParser(
        prog="pretrain.py",
        description="Pretrains a language model with Elastic Memory on Megatron-Core. Calling it again goes on from "
        "the newest complete checkpoint. SIGUSR1 and SIGTERM save and end. On several processes: torchrun "
        "--nproc-per-node=N launch/pretrain.py ...; on a cluster: sbatch slurm/pretrain_1b.sh.",
        epilog=describe_options(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML recipe, such as launch/recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options that replace the recipe's")
    arguments = parser.parse_args()
    return load_config(arguments.recipe, arguments.overrides)


def main() -> int:
    stop = StopRequest().catch()  # before torch is imported, which takes seconds
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        config = parse()
        from em_megatron.validate import validate

        validate(config, world_size)
    except ConfigError as error:
        report_outcome("refused")
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit:  # arguments that are none, or --help
        report_outcome("refused")
        raise

    import torch

    from em_megatron.checkpoint.folder import CheckpointError
    from em_megatron.data.manifest import DataError
    from em_megatron.parallel.launcher import end_with_launcher, leave
    from em_megatron.parallel.process_groups import shutdown
    from em_megatron.training.loop import train, watchdog_of
    from em_megatron.training.report import describe_run
    from em_megatron.training.setup import set_up
    from em_megatron.training.step import TrainingError

    end_with_launcher()
    watchdog = watchdog_of(config, rank, stop).start()
    try:
        run = set_up(config, world_size)
        if rank == 0:
            print(describe_run(run), flush=True)
        train(run, stop, watchdog)
        torch.distributed.barrier()  # rank 0 closes its logs meanwhile; the launcher ends all when one has ended
    except (ConfigError, DataError, CheckpointError, TrainingError) as error:
        # A disk that is full, or does not answer, may do better at the next start.
        report_outcome("failed" if isinstance(error, CheckpointError) else "refused")
        leave(error, 2 if isinstance(error, ConfigError) else 1, on_all_ranks=not isinstance(error, DataError))
    except BaseException as error:
        report_outcome("failed")
        traceback.print_exc()
        leave(error, 1, on_all_ranks=False)
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
