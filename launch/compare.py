"""Trains and evaluates a grid of memory kinds, sizes, corpora and seeds: python launch/compare.py PLAN [KEY=VALUE ...]"""

from __future__ import annotations

import argparse
import fnmatch
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from em_megatron.config import ConfigError

STAGES = ("train", "evaluate", "report")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description="Runs every cell of a plan through launch/pretrain.py and launch/evaluate.py, and puts them side by side: "
        "tables, pictures and raw JSON. Called again, it does what is left. Ctrl-C and SIGTERM let the cells at work save. "
        "On a cluster: --variants FILE, then sbatch --array=1-N slurm/compare.sh (see docs/comparison.md).",
    )
    parser.add_argument("plan", help="YAML file, or a name in launch/plans: small_cpu, recall_cpu, one_gpu, paper")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="of the plan: workers=4 base.training.train_steps=50"
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cells by name, such as 'code-*-elastic_*'")
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="some of train,evaluate,report (default: all, in this order)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check every cell and list what it costs; run nothing")
    parser.add_argument(
        "--variants", type=Path, metavar="FILE", help="write the cells as variants of slurm/compare.sh, run nothing"
    )
    parser.add_argument("--output", type=Path, help="folder of the report (default: OUTPUT_DIR/NAME/report)")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)

    from em_megatron.comparison.overview import overview, write_variants
    from em_megatron.comparison.plan import cells_of, load_plan
    from em_megatron.data.manifest import DataError

    try:
        plan = load_plan(options.plan, options.overrides)
        cells = cells_of(plan)
        chosen = [cell for cell in cells if fnmatch.fnmatch(cell.name, options.only)]
        stages = options.stages.split(",")
        if unknown := set(stages) - set(STAGES):
            raise ConfigError(f"--stages: '{sorted(unknown)[0]}' is unknown: choose from {', '.join(STAGES)}")
        if not chosen:
            raise ConfigError(f"--only '{options.only}' fits no cell: --dry-run lists their names")
        if options.variants is not None:
            print(write_variants(plan, chosen, options.variants))
        elif options.dry_run:
            print(overview(plan, chosen))
        else:
            return run(plan, cells, chosen, stages, options.output)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(plan, cells, chosen, stages: Sequence[str], output: Path | None) -> int:  # type: ignore[no-untyped-def]
    """Prepares corpora, runs what is left, writes the report; 1 where a cell failed, 130 after a signal."""
    from em_megatron.comparison import corpora, report, running

    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda found, _: stopped.append(found))

    def say(text: str) -> None:
        print(text, flush=True)

    names = list(dict.fromkeys(cell.corpus for cell in chosen))
    if "train" in stages:
        for name in names:
            corpora.prepare(plan, name, say)
    work = [stage for stage in stages if stage != "report"]
    outcome = running.run_cells(plan, cells, chosen, work, say, lambda: bool(stopped))
    for name, log in outcome.failed.items():
        print(f"failed: {name}, see {log}", file=sys.stderr)
    if stopped:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    if "report" in stages:
        described = {name: corpora.describe(plan, name) for name in names}
        folder = output or plan.folder / "report"
        say(report.write(plan, cells, described, folder))
        say(f"report in {folder}")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
