"""Makes a run of a Hugging Face folder: python launch/import_hf.py FOLDER RUN [memory.KEY=VALUE ...]"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="import_hf.py",
        description="Reads a Hugging Face folder of safetensors, one of launch/export_hf.py or a Llama-style model "
        "(Llama, Mistral without a window, Qwen3), into a run folder with one checkpoint of weights. Such a run can be "
        "evaluated, generated from and exported, and be the start of another: checkpoint.initial_load_path=RUN. Elastic "
        "Memory has no weights: a Llama-style model goes on training with it switched on. Alone, or under torchrun with "
        "parallel.tensor_model_parallel_size=N for a model that does not fit one device.",
    )
    parser.add_argument("folder", type=Path, help="Hugging Face folder")
    parser.add_argument("run", type=Path, help="the run folder to make, such as runs/NAME; it must not be there yet")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="memory.*, data.*, training.precision")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    from em_megatron.checkpoint.folder import CheckpointError
    from em_megatron.config import ConfigError
    from em_megatron.data.manifest import DataError
    from em_megatron.hf.importing import import_folder, read_folder, run_config
    from em_megatron.hf.weight_mapping import ConversionError
    from em_megatron.parallel.launcher import end_with_launcher, leave
    from em_megatron.parallel.process_groups import shutdown

    end_with_launcher()

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    try:
        folder = read_folder(arguments.folder)
        config = run_config(folder, arguments.run.absolute(), arguments.overrides)
        import_folder(folder, config, arguments.run.absolute(), world_size, say)
    except (ConfigError, CheckpointError, DataError, ConversionError, OSError) as error:
        if world_size > 1:
            leave(error, 2, on_all_ranks=True)
        print(f"error: {error}", file=sys.stderr)
        shutdown()
        return 2
    shutdown()
    say(f"{arguments.run} is ready: start a run from it with checkpoint.initial_load_path={arguments.run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
