"""Plans a run before it is started: python launch/plan.py RECIPE --nodes N --gpus-per-node G --gpu h100 [KEY=VALUE ...]"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from em_megatron.config import ConfigError, describe_options


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from em_megatron.planning.gpus import ALIASES, GPUS
    from em_megatron.planning.planner import DEFAULT_VOCAB_SIZE
    from em_megatron.planning.speed import DEFAULT_MFU

    parser = argparse.ArgumentParser(
        prog="plan.py",
        description="Says what a recipe costs on a cluster, without a GPU and without data: parameters, FLOPs per token, "
        "memory of a GPU by part, bytes moved by axis, tokens per second and days; and the layouts that fit, as options "
        "to paste behind launch/pretrain.py. The exit code is 0 where the layout of the recipe fits, 1 where it "
        "does not, 2 for an error in the recipe.",
        epilog="Times are estimates whose assumptions are printed (em_megatron/planning/speed.py says how they are made); "
        "memory is compared with what built models allocate (tests/planning).\n\n" + describe_options(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML recipe, such as launch/recipes/pretrain_1b.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options that replace the recipe's")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the cluster (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of a node, joined by NVLink (default 8)")
    parser.add_argument("--gpu", default="h100", help=f"{', '.join([*GPUS, *ALIASES])} (default h100)")
    parser.add_argument(
        "--mfu", type=float, help="share of the GPU's peak that forward and backward reach while it computes; waiting and "
        f"recomputation are taken off it (default {DEFAULT_MFU}, an assumption)",
    )  # fmt: skip
    parser.add_argument(
        "--vocab-size", type=int, help="ids of the tokenizer (default: of the corpus at data.path, and "
        f"{DEFAULT_VOCAB_SIZE}, an assumption, where there is none)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the plan as JSON: bytes, seconds, tokens")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)

    from em_megatron.data.manifest import DataError
    from em_megatron.planning.planner import make_plan
    from em_megatron.planning.report import as_dict, as_text

    try:
        plan = make_plan(
            options.recipe,
            options.overrides,
            options.nodes,
            options.gpus_per_node,
            options.gpu,
            options.mfu,
            options.vocab_size,
        )
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(as_dict(plan), indent=1) if options.json else as_text(plan))
    return 0 if plan.refusal is None else 1


if __name__ == "__main__":
    sys.exit(main())
