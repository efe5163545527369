"""The documents of a text corpus: the options that say what it is, and the files that hold them.

Which documents are training and which are validation is decided in encoding/split.py. Training the tokenizer and
encoding the shards both use the two, so a held-out document is unseen by both.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from em_megatron.data.manifest import DataError
from tokenizer.readers.entry import Columns
from tokenizer.readers.files import SUFFIXES, Layout

TRAIN, VALIDATION = "train", "validation"
VALIDATION_FRACTION = 0.05  # where neither a fraction nor files are given
KINDS = ", ".join(SUFFIXES)
DEDUPLICATE = ("off", "id", "text")


@dataclass(frozen=True)
class InputFile:
    """A file of documents and its name, the path relative to the input it was found under.

    held_out: it was given as --validation-input, and its name begins with validation/.
    """

    name: str
    path: Path
    held_out: bool = False


class Selection(NamedTuple):
    """Which documents are kept, and which of them are held out.

    min_bytes, max_bytes: of their UTF-8 text, None for no limit. deduplicate: one of DEDUPLICATE. fraction: share of
    the bytes held out; None where files are held out instead.
    """

    min_bytes: int = 0
    max_bytes: int | None = None
    deduplicate: str = "id"
    fraction: float | None = VALIDATION_FRACTION


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what the corpus is; give tokenizer.train and tokenizer.encode the same ones."""
    corpus = parser.add_argument_group("the corpus")
    corpus.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        metavar="PATH",
        help=f"files, or folders searched for {KINDS}; a line of jsonl or a row of parquet is a document",
    )
    corpus.add_argument(
        "--document-separator",
        metavar="STR",
        help="cut each text file into documents at this string (\\n and \\t are understood); else a text file is one "
        "document",
    )
    corpus.add_argument("--text-column", default="text", metavar="NAME", help="of jsonl and parquet (default: text)")
    corpus.add_argument(
        "--id-column",
        default="id",
        metavar="NAME",
        help="of jsonl and parquet (default: id); a row without one, and each part of a text file, has the id "
        "FILE#NUMBER, a whole text file its name",
    )
    corpus.add_argument(
        "--validation-fraction",
        type=float,
        metavar="F",
        help="share of the bytes held out for validation, by document, in the order of the ids' sha256; 0 holds "
        f"nothing out (default: {VALIDATION_FRACTION})",
    )
    corpus.add_argument(
        "--validation-input",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="documents held out whole, instead of --validation-fraction: files or folders as for --input",
    )
    corpus.add_argument("--min-bytes", type=int, default=0, metavar="N", help="leave out texts of fewer UTF-8 bytes")
    corpus.add_argument("--max-bytes", type=int, metavar="N", help="leave out texts of more UTF-8 bytes")
    corpus.add_argument(
        "--deduplicate",
        choices=DEDUPLICATE,
        default="id",
        help="leave out a document whose id was seen before in the order of the files (those of --validation-input "
        "come last); text: also one whose text was (default: id)",
    )


def layout_of(arguments: argparse.Namespace) -> Layout:
    """How documents lie in the files. Raises DataError for an empty separator."""
    separator: str | None = arguments.document_separator
    if separator == "":
        raise DataError("--document-separator is empty; give a string, or leave the option out")
    understood = separator.replace("\\n", "\n").replace("\\t", "\t") if separator else None
    return Layout(understood, Columns(arguments.text_column, arguments.id_column))


def selection_of(arguments: argparse.Namespace) -> Selection:
    """Which documents are kept and held out. Raises DataError for options out of range."""
    smallest, largest = arguments.min_bytes, arguments.max_bytes
    if smallest < 0 or (largest is not None and largest < max(smallest, 1)):
        raise DataError(f"--min-bytes {smallest} and --max-bytes {largest} keep no document; give a range of bytes")
    fraction: float | None = arguments.validation_fraction
    if arguments.validation_input:
        if fraction is not None:
            raise DataError("--validation-input says what is held out; leave --validation-fraction out")
    else:
        fraction = VALIDATION_FRACTION if fraction is None else fraction
        if not 0 <= fraction < 1:
            raise DataError(f"--validation-fraction {fraction} is not in [0, 1)")
    return Selection(smallest, largest, arguments.deduplicate, fraction)


def find_files(inputs: Sequence[Path]) -> list[InputFile]:
    """All files of documents among some files and folders, sorted by name.

    Raises DataError for none, or for one name twice.
    """
    found: dict[str, Path] = {}
    for root in inputs:
        if not root.exists():
            raise DataError(f"input {root} does not exist; give files or folders that hold {KINDS}")
        paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.name.endswith(SUFFIXES))
        for path in (path for path in paths if path.is_file()):
            name = path.name if path == root else path.relative_to(root).as_posix()
            if found.setdefault(name, path) != path:
                raise DataError(f"{found[name]} and {path} have the same name; give the folder above both as the input")
    if not found:
        raise DataError(f"no file of documents in {', '.join(map(str, inputs))}; give files or folders of {KINDS}")
    return [InputFile(name, found[name]) for name in sorted(found)]


def find_corpus(arguments: argparse.Namespace) -> list[InputFile]:
    """The files of --input, then those of --validation-input, whose names begin with validation/.

    Raises DataError for none, or for one name or file twice.
    """
    files = find_files(arguments.input)
    if not arguments.validation_input:
        return files
    found = find_files(arguments.validation_input)
    held = [InputFile(f"{VALIDATION}/{file.name}", file.path, held_out=True) for file in found]
    places = {file.path.resolve(): file for file in files}
    names = {file.name: file for file in files}
    for file in held:
        twice = places.get(file.path.resolve()) or names.get(file.name)
        if twice:
            raise DataError(
                f"{file.path} of --validation-input and {twice.path} of --input are one file or have one name; "
                "give folders that do not hold each other"
            )
    return files + held
