"""Writes text with a trained model: python launch/generate.py RUN_OR_CHECKPOINT --prompt "..." [memory.slots=64 ...]"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from em_megatron.config import ConfigError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Streams text from a checkpoint. The memory has a fixed size: a prompt may be as long as you like. "
        "Its reader can be changed without retraining: memory.slots=64 memory.sampler=uniform memory.order=32.",
    )
    parser.add_argument("checkpoint", type=Path, help="run folder, or one of its checkpoints/step_*")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options that replace the run's")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to go on from; '-' reads standard input")
    source.add_argument("--prompt-file", type=Path, help="file with the text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="stop after so many tokens (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens; 0: all")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="only the likeliest tokens of this mass (default 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    return parser.parse_intermixed_args()


def prompt_text(arguments: argparse.Namespace) -> str:
    if arguments.prompt_file is not None:
        if not arguments.prompt_file.is_file():
            raise ConfigError(f"prompt file '{arguments.prompt_file}' does not exist")
        return str(arguments.prompt_file.read_text())
    return sys.stdin.read() if arguments.prompt == "-" else str(arguments.prompt)


def main() -> int:
    arguments = parse()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    from em_megatron.checkpoint.folder import CheckpointError
    from em_megatron.data.manifest import DataError
    from em_megatron.evaluation.generation import Generator, Sampling, stream_text
    from em_megatron.parallel.launcher import end_with_launcher, leave
    from em_megatron.parallel.process_groups import shutdown
    from em_megatron.training.restore import restore

    end_with_launcher()
    try:
        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
        sampling.check()
        text = prompt_text(arguments)
        run = restore(arguments.checkpoint, arguments.overrides, world_size)
        if run.layout.world_size > run.layout.tp_size:
            raise ConfigError("generation runs on one process, or on tensor_model_parallel_size = all of them")
        if run.config.parallel.sequence_parallel:
            raise ConfigError("one token cannot be split along the sequence: leave parallel.sequence_parallel out")
        generator = Generator(run.model[0], run.vocabulary)
        logits = generator.read([run.vocabulary.bos_id, *run.vocabulary.encode(text)])
        show = (lambda piece: print(piece, end="", flush=True)) if rank == 0 else (lambda piece: None)
        show(text)
        for piece in stream_text(generator.write(logits, arguments.max_new_tokens, sampling), run.vocabulary):
            show(piece)
        show("\n")
    except (ConfigError, CheckpointError, DataError) as error:
        leave(error, 2, on_all_ranks=not isinstance(error, DataError))
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
