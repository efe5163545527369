"""Writes text with a trained model: python launch/generate.py RUN_OR_CHECKPOINT_OR_FOLDER --prompt "..." [memory.slots=64 ...]"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from em_megatron.config import ConfigError, plain_overrides


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Streams text from a checkpoint, or through transformers from a folder of launch/export_hf.py. The "
        "memory has a fixed size (that of memory.kind full and subsample grows): a prompt may be as long as you like, or "
        "never end. Its reader can be changed without "
        "retraining: memory.slots=64 memory.sampler=uniform memory.order=32 (or --memory.slots=64).",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="run folder, one of its checkpoints/step_*, or an exported folder"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options that replace the run's")
    parser.add_argument("--prompt", help="text to go on from; '-' reads standard input, line by line, without end")
    parser.add_argument("--prompt-file", type=Path, help="file with the text to go on from")
    parser.add_argument(
        "--question",
        metavar="PREFIX",
        help="lines of standard input or the prompt file that begin so are answered at once, from a copy of the memory",
    )
    parser.add_argument("--save-memory", type=Path, metavar="FILE", help="keep what was read (exported folders only)")
    parser.add_argument("--load-memory", type=Path, metavar="FILE", help="go on from what was read before")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="stop after so many tokens (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens; 0: all")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="only the likeliest tokens of this mass (default 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    return parser.parse_intermixed_args(plain_overrides(sys.argv[1:] if argv is None else argv))


def check(arguments: argparse.Namespace) -> None:
    if (arguments.prompt is None) == (arguments.prompt_file is None):
        raise ConfigError("give one of --prompt and --prompt-file")
    if arguments.prompt_file is not None and not arguments.prompt_file.is_file():
        raise ConfigError(f"prompt file '{arguments.prompt_file}' does not exist")
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {arguments.max_new_tokens}: it must be at least 1")
    if arguments.save_memory is not None and not arguments.save_memory.absolute().parent.is_dir():
        raise ConfigError(f"--save-memory {arguments.save_memory} lies in no folder: make it first")


def text_model(arguments: argparse.Namespace, world_size: int) -> Any:
    """The model with an empty memory, or the one that was saved."""
    from em_megatron.evaluation.generation import MegatronText
    from em_megatron.hf.generation import TransformersText, is_exported
    from em_megatron.training.restore import restore

    if is_exported(arguments.checkpoint):
        if world_size > 1:
            raise ConfigError("an exported folder is read by one process: call this without torchrun")
        return TransformersText(arguments.checkpoint, arguments.overrides, arguments.load_memory)
    if arguments.save_memory or arguments.load_memory:
        raise ConfigError("a memory is kept for exported folders only: call launch/export_hf.py on the run first")
    run = restore(arguments.checkpoint, arguments.overrides, world_size)
    if run.layout.world_size > run.layout.tp_size:
        raise ConfigError("generation runs on one process, or on tensor_model_parallel_size = all of them")
    if run.config.parallel.sequence_parallel:
        raise ConfigError("one token cannot be split along the sequence: leave parallel.sequence_parallel out")
    return MegatronText(run.model[0], run.vocabulary)


def lines_of(arguments: argparse.Namespace) -> Iterator[str]:
    from em_megatron.evaluation.generation import pieces

    if arguments.prompt_file is None and arguments.prompt != "-":
        yield arguments.prompt
    elif arguments.prompt == "-":
        yield from pieces(
            sys.stdin
            if not hasattr(sys.stdin, "buffer")
            else io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", newline="")
        )
    else:
        with arguments.prompt_file.open(encoding="utf-8", newline="") as file:
            yield from pieces(file)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    from tqdm import tqdm

    from em_megatron.checkpoint.folder import CheckpointError
    from em_megatron.data.manifest import DataError
    from em_megatron.evaluation.generation import Sampling, TextModel, read_lines
    from em_megatron.parallel.launcher import end_with_launcher, leave
    from em_megatron.parallel.process_groups import shutdown

    end_with_launcher()

    def show(piece: str) -> None:
        if rank == 0:
            print(piece, end="", flush=True)

    def answer(asked: TextModel) -> None:
        for piece in asked.write(arguments.max_new_tokens, sampling):
            show(piece)
        show("\n")

    try:
        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
        sampling.check()
        check(arguments)
        model = text_model(arguments, world_size)
        with tqdm(
            unit=" chars", unit_scale=True, desc="reading", disable=None if rank == 0 else True, leave=False
        ) as bar:
            for read in read_lines(model, lines_of(arguments), arguments.question, answer):
                bar.update(read - bar.n)
        if arguments.save_memory:
            model.save(arguments.save_memory)
        elif arguments.question is None:
            show(arguments.prompt if arguments.prompt not in (None, "-") else "")
            answer(model)
    except UnicodeDecodeError as error:
        print(f"error: the text is not UTF-8 ({error}): convert it first", file=sys.stderr)
        return 2
    except (ConfigError, CheckpointError, DataError) as error:
        if world_size > 1:
            leave(error, 2, on_all_ranks=not isinstance(error, DataError))
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if world_size == 1:
            shutdown()
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
