"""Texts that teach a task of evaluation.recall: python -m em_megatron.evaluation.recall_texts passkey --output FOLDER"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from em_megatron.evaluation.recall import TASKS, training_texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m em_megatron.evaluation.recall_texts",
        description="Writes texts in which a fact is told and asked again and again, to train a small model on that "
        "launch/evaluate.py --suite recall can ask (a model of general text needs none).",
    )
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the texts")
    parser.add_argument("--documents", type=int, default=4000, help="texts (default 4000)")
    parser.add_argument("--characters", type=int, default=3800, help="of a text, about (default 3800)")
    parser.add_argument("--digits", type=int, default=3, help="of a number (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0; the questions of the evaluation are others)")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.output
    if (folder / "contents.json").exists():
        print(f"recall_texts: {folder} already holds such texts; give another --output", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    made = training_texts(
        TASKS[arguments.task], arguments.documents, arguments.characters, arguments.digits, arguments.seed
    )
    for number, text in enumerate(made):
        (folder / f"{number:06}.txt").write_text(text, encoding="utf-8")
    contents = {name: value for name, value in vars(arguments).items() if name != "output"}
    (folder / "contents.json").write_text(json.dumps(contents, indent=1) + "\n")  # last: the folder is whole
    print(f"{folder}: {arguments.documents} texts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
