"""Recipes of every memory kind with equal memory: python launch/match.py RECIPE [--write FOLDER] [KEY=VALUE ...]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from em_megatron.config import ConfigError, load_config


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from em_megatron.planning.planner import DEFAULT_VOCAB_SIZE

    parser = argparse.ArgumentParser(
        prog="match.py",
        description="Takes the Elastic Memory of a recipe as 1x, and gives every other memory kind the sizes with which it "
        "keeps as many numbers per sequence, at each factor; prints them beside parameters and FLOPs per token. Kinds whose "
        "size is fixed by block length or head dimension, and those that grow with the context, are listed as they are.",
    )
    parser.add_argument("recipe", help="YAML recipe, such as launch/recipes/compare_125m.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options that replace the recipe's")
    parser.add_argument("--factors", default="1,2,4,8,16", help="of the recipe's memory floats (default 1,2,4,8,16)")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=DEFAULT_VOCAB_SIZE,
        help=f"ids of the tokenizer (default {DEFAULT_VOCAB_SIZE})",
    )
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="also write a recipe for each row there")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)

    from omegaconf import OmegaConf

    from em_megatron.kinds.matching import family, recipe_text
    from em_megatron.model.sizes import padded_vocab_size

    try:
        factors = tuple(int(factor) for factor in options.factors.split(","))
        config = load_config(options.recipe, options.overrides)
        rows = family(config, padded_vocab_size(options.vocab_size, config.model.make_vocab_size_divisible_by), factors)
    except ValueError as error:  # ConfigError is one
        print(f"error: {error}" if isinstance(error, ConfigError) else f"error: --factors: {error}", file=sys.stderr)
        return 2
    base = OmegaConf.merge(OmegaConf.load(options.recipe), OmegaConf.from_dotlist(list(options.overrides)))
    print(f"{'recipe':34} {'floats':>14} {'of wanted':>9} {'parameters':>13} {'own':>10} {'MFLOP/token':>11}  changes")
    for row in rows:
        cost = row.costs
        changed = " ".join(f"{s}.{key}={value}" for s, keys in row.changes.items() for key, value in keys.items())
        ratio = "grows" if row.grows else f"{cost.memory_floats_per_sequence / row.wanted:.3f}"
        print(
            f"{row.name:34} {cost.memory_floats_per_sequence:14,} {ratio:>9} {cost.parameters:13,} {cost.memory_parameters:10,} "
            f"{cost.flops_per_token / 1e6:11,.1f}  {changed}"
        )
        if options.write is not None:
            options.write.mkdir(parents=True, exist_ok=True)
            text = recipe_text(OmegaConf.to_yaml(base), row, config.name)
            (options.write / f"{row.name}.yaml").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
