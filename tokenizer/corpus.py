"""The documents of a text corpus: the options that say what it is, and the files that hold them.

Which documents are training and which are validation is decided in encoding/split.py. Training the tokenizer and
encoding the shards both use the two, so a held-out document is unseen by both.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from em_megatron.data.manifest import DataError
from tokenizer.readers.entry import Columns
from tokenizer.readers.files import SUFFIXES, Layout

TRAIN, VALIDATION = "train", "validation"
VALIDATION_FRACTION = 0.05  # where neither a fraction nor files are given
KINDS = ", ".join(SUFFIXES)
ENDINGS_NAMED = 6  # of the files that are passed over
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
        help=f"files, or folders searched for {KINDS}; a line of json or a row of parquet is a document",
    )
    corpus.add_argument(
        "--document-separator",
        metavar="STR",
        help="cut each text file (.txt, or given itself and of none of these endings) into documents at this string "
        "(\\n and \\t are understood); else it is one document. Those of json lines and parquet are never cut",
    )
    corpus.add_argument(
        "--text-column", default="text", metavar="NAME", help="of json lines and parquet (default: text)"
    )
    corpus.add_argument(
        "--id-column",
        default="id",
        metavar="NAME",
        help="of json lines and parquet (default: id); a row without one, and each part of a text file, has the id "
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


def find_files(inputs: Sequence[Path], passed_over: Counter[str] | None = None) -> list[InputFile]:
    """All files of documents among some files and folders, sorted by name.

    passed_over: counts the files in folders that have none of the known endings, by their ending. Raises DataError for
    none, for one name or file twice, for a name that is no UTF-8 and for a link that leads nowhere; OSError for a
    folder that cannot be read.
    """
    passed_over = Counter() if passed_over is None else passed_over
    names: dict[str, Path] = {}
    places: dict[str, tuple[str, Path]] = {}
    for root in inputs:
        for place, path in files_in(root, passed_over):
            name = path.name if path == root else path.relative_to(root).as_posix()
            check_name(name, path)
            before = places.setdefault(place, (name, path))
            if before != (name, path):
                raise DataError(
                    f"{before[1]} (as {before[0]}) and {path} (as {name}) are one file; give inputs that do not hold "
                    "each other, or delete one link"
                )
            if names.setdefault(name, path) != path:
                raise DataError(f"{names[name]} and {path} have the same name; give the folder above both as the input")
    if not names:
        others = f" (passed over: {passed_over_words(passed_over)})" if passed_over else ""
        raise DataError(
            f"no file of documents in {', '.join(map(str, inputs))}{others}; give files or folders of {KINDS}"
        )
    return [InputFile(name, names[name]) for name in sorted(names)]


def files_in(root: Path, passed_over: Counter[str]) -> Iterator[tuple[str, Path]]:
    """The real path and the path of an input file, or of each file of documents in an input folder."""
    if not root.exists():
        raise DataError(f"input {root} does not exist; give files or folders that hold {KINDS}")
    if root.is_file():
        yield os.path.realpath(root), root
    elif root.is_dir():
        yield from files_below(root, (os.path.realpath(root),), passed_over)
    else:
        raise DataError(f"input {root} is neither a file nor a folder; give files or folders that hold {KINDS}")


def files_below(folder: Path, above: tuple[str, ...], passed_over: Counter[str]) -> Iterator[tuple[str, Path]]:
    """Real path and path of the files of documents in a folder and those below it, links followed.

    above: real paths of the folder and of those that led to it; a link to one of them would go round in a circle.
    """
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = folder / entry.name
        place = os.path.join(above[-1], entry.name)
        if entry.is_symlink():
            if not path.exists():
                raise DataError(f"{path} is a link to {os.readlink(path)}, which is not there; mend or delete the link")
            place = os.path.realpath(place)
        if entry.is_dir():
            if place not in above:
                yield from files_below(path, (*above, place), passed_over)
        elif entry.is_file():
            if entry.name.endswith(SUFFIXES):
                yield place, path
            else:
                passed_over[ending_of(path)] += 1


def check_name(name: str, path: Path) -> None:
    """Raises DataError for a name that cannot be an id."""
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise DataError(f"the name of the file {shown} is not UTF-8; rename it (for example with convmv)") from None


def ending_of(path: Path) -> str:
    """What stands behind the last dot of a name, of a packed file behind the last two."""
    packed = path.suffix in (".gz", ".zst")
    return (Path(path.stem).suffix if packed else "") + path.suffix or "without an ending"


def passed_over_words(passed_over: Counter[str]) -> str:
    """How many files of each ending, the most frequent ones by name."""
    ordered = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{count} {ending}" for ending, count in ordered[:ENDINGS_NAMED]]
    if others := sum(count for _, count in ordered[ENDINGS_NAMED:]):
        words.append(f"{others} of other endings")
    return ", ".join(words)


def find_corpus(arguments: argparse.Namespace) -> list[InputFile]:
    """The files of --input, then those of --validation-input, whose names begin with validation/.

    Counts on stderr what the folders hold beside them. Raises DataError for none, or for one name or file twice, and
    what `find_files` raises.
    """
    passed_over: Counter[str] = Counter()
    files = find_files(arguments.input, passed_over)
    found = find_files(arguments.validation_input, passed_over) if arguments.validation_input else []
    if passed_over:
        print(f"passed over: {passed_over_words(passed_over)}", file=sys.stderr)
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
