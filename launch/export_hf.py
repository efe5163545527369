"""Writes a checkpoint as a Hugging Face folder: python launch/export_hf.py RUN_OR_CHECKPOINT FOLDER [memory.KEY=VALUE ...]"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from pathlib import Path

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export_hf.py",
        description="Writes a distributed checkpoint of any layout as a Hugging Face folder: safetensors, configuration, "
        "the model's own Python files, a fast tokenizer, a model card. Before it exits it loads the folder as a user "
        "would, and compares logits, memory states and token ids with the Megatron model; where they differ nothing is "
        "left behind. Runs on the CPU, in one process.",
    )
    parser.add_argument("checkpoint", type=Path, help="run folder, or one of its checkpoints/step_*")
    parser.add_argument("folder", type=Path, help="the folder to make; it must not hold anything yet")
    parser.add_argument("overrides", nargs="*", metavar="memory.KEY=VALUE", help="another reader for the memory")
    parser.add_argument(
        "--dtype", choices=("stored", "fp32", "bf16"), default="stored", help="of the weights (default: as trained)"
    )
    parser.add_argument(
        "--max-shard-size", type=size, default=size("5GB"), metavar="SIZE", help="of a weight file (default 5GB)"
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to compare on (default: held-out documents of the run where they are, else this package's source)",
    )
    return parser.parse_intermixed_args(argv)


def size(text: str) -> int:
    """Bytes from 500MB, 5GB or a number."""
    found = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper())
    if not found or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no size: write 500MB, 5GB or a number of bytes")
    return int(found[1]) * UNITS[found[2]]


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

    from em_megatron.checkpoint.folder import CheckpointError
    from em_megatron.config import ConfigError
    from em_megatron.data.manifest import DataError
    from em_megatron.hf.export import export, open_checkpoint
    from em_megatron.hf.model_card import model_card
    from em_megatron.hf.verification import sample_text, verify
    from em_megatron.hf.weight_mapping import ConversionError

    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)

    def describe(folder: Path) -> str:
        say("comparing with Megatron")
        found = verify(source, folder, arguments.overrides, text)
        say(
            f"{found.tokens:,} tokens: logits differ by at most {found.logits:.3g}, memory states by "
            f"{found.states:.3g}; {found.texts:,} texts: {found.other_ids or 'none'} got other ids"
        )
        if found.other_ids:
            say(
                "warning: where this tokenizer was trained without rounded scores, sentencepiece's own rounding decides "
                "between segmentations that score alike (most of them runs of spaces), the text being the same; where it "
                "rewrites text, odd texts may be rewritten otherwise"
            )
        return model_card(source, found)

    try:
        source = open_checkpoint(arguments.checkpoint, arguments.overrides, arguments.dtype)
        text = sample_text(source.config, source.vocabulary, arguments.text)
        export(source, arguments.folder, arguments.max_shard_size, describe, say)
    except (ConfigError, CheckpointError, DataError, ConversionError, OSError, UnicodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say(f"{arguments.folder} is ready")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was written goes with this process
    sys.exit(main())
