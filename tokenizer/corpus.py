"""The documents of a text corpus: found, named, checked, and split by document into training and validation.

The validation documents are a share of all, or files of their own. Training the tokenizer and encoding the shards both
use this, so a held-out document is unseen by both.
"""

import argparse
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from em_megatron.data.manifest import DataError

TRAIN, VALIDATION = "train", "validation"
VALIDATION_FRACTION = 0.05  # where neither a fraction nor files are given


@dataclass(frozen=True)
class TextFile:
    """A .txt file and its name, the path relative to the input it was found under.

    held_out: it was given as --validation-input, and its name begins with validation/.
    """

    name: str
    path: Path
    held_out: bool = False


@dataclass(frozen=True)
class Document:
    """One document: its name, the text, and the UTF-8 bytes of the text."""

    name: str
    text: str
    text_bytes: int


@dataclass(frozen=True)
class FileSummary:
    """A file after one reading: (name, bytes) of its documents, empty ones left out, and the sha256 of its bytes."""

    name: str
    documents: tuple[tuple[str, int], ...]
    empty: int
    sha256: str


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what the corpus is; give tokenizer.train and tokenizer.encode the same ones."""
    parser.add_argument(
        "--input", nargs="+", type=Path, required=True, metavar="PATH", help=".txt files, or folders searched for them"
    )
    parser.add_argument(
        "--document-separator",
        metavar="STR",
        help="cut each file into documents at this string (\\n and \\t are understood); else a file is one document",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        metavar="F",
        help="share of the bytes held out for validation, by document; 0 holds nothing out "
        f"(default: {VALIDATION_FRACTION})",
    )
    parser.add_argument(
        "--validation-input",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="documents held out whole, instead of --validation-fraction: .txt files, or folders searched for them",
    )


def separator_of(arguments: argparse.Namespace) -> str | None:
    """The document separator with \\n and \\t replaced. Raises DataError for an empty one."""
    separator: str | None = arguments.document_separator
    if separator == "":
        raise DataError("--document-separator is empty; give a string, or leave the option out")
    return separator.replace("\\n", "\n").replace("\\t", "\t") if separator else None


def find_files(inputs: Sequence[Path]) -> list[TextFile]:
    """All .txt files of some files and folders, sorted by name. Raises DataError for none, or for one name twice."""
    found: dict[str, Path] = {}
    for root in inputs:
        if not root.exists():
            raise DataError(f"input {root} does not exist; give .txt files or folders that hold them")
        paths = [root] if root.is_file() else sorted(root.rglob("*.txt"))
        for path in (path for path in paths if path.is_file()):
            name = path.name if path == root else path.relative_to(root).as_posix()
            if found.setdefault(name, path) != path:
                raise DataError(f"{found[name]} and {path} have the same name; give the folder above both as the input")
    if not found:
        raise DataError(f"no .txt file in {', '.join(map(str, inputs))}; give .txt files or folders that hold them")
    return [TextFile(name, found[name]) for name in sorted(found)]


def find_corpus(arguments: argparse.Namespace) -> list[TextFile]:
    """The files of --input, then those of --validation-input, whose names begin with validation/.

    Raises DataError for none, one name or file twice, or --validation-input together with --validation-fraction.
    """
    files = find_files(arguments.input)
    if not arguments.validation_input:
        return files
    if arguments.validation_fraction is not None:
        raise DataError("--validation-input says what is held out; leave --validation-fraction out")
    found = find_files(arguments.validation_input)
    held = [TextFile(f"{VALIDATION}/{file.name}", file.path, held_out=True) for file in found]
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


def read_documents(file: TextFile, separator: str | None) -> tuple[list[Document], int, str]:
    """The non-empty documents of a file, the number of empty ones, and the sha256 of the file.

    Raises DataError that names the file and the offset where its bytes are not UTF-8.
    """
    content = file.path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}; convert the file "
            "(for example with iconv) or leave it out"
        ) from None
    texts = text.split(separator) if separator else [text]
    documents = [
        Document(f"{file.name}#{index:06d}" if separator else file.name, part, len(part.encode()))
        for index, part in enumerate(texts)
        if part.strip()
    ]
    return documents, len(texts) - len(documents), hashlib.sha256(content).hexdigest()


def summarize(file: TextFile, separator: str | None) -> FileSummary:
    """Names and sizes of a file's documents, without keeping their text."""
    documents, empty, sha256 = read_documents(file, separator)
    return FileSummary(file.name, tuple((d.name, d.text_bytes) for d in documents), empty, sha256)


def validation_share(arguments: argparse.Namespace) -> float | None:
    """The fraction of the bytes to hold out; None where files are held out instead."""
    if arguments.validation_input:
        return None
    return VALIDATION_FRACTION if arguments.validation_fraction is None else arguments.validation_fraction


def validation_names(
    files: Iterable[TextFile], summaries: Iterable[FileSummary], fraction: float | None
) -> frozenset[str]:
    """Names of the validation documents: those of the files that are held out, or a fraction of all.

    Raises DataError where one of the splits would be empty, and what `hold_out` raises.
    """
    if fraction is not None:
        return hold_out(summaries, fraction)
    held_files = {file.name for file in files if file.held_out}
    splits: dict[bool, set[str]] = {True: set(), False: set()}
    for summary in summaries:
        splits[summary.name in held_files].update(name for name, _ in summary.documents)
    for held, option in ((False, "--input"), (True, "--validation-input")):
        if not splits[held]:
            raise DataError(f"every document of {option} is empty; give .txt files with text in them")
    return frozenset(splits[True])


def hold_out(summaries: Iterable[FileSummary], fraction: float) -> frozenset[str]:
    """Names of the validation documents.

    Documents are taken in the order of the sha256 of their name until they hold `fraction` of all bytes: at least
    one, and at least one is left. Another document added to the corpus so moves few from one split to the other.
    Raises DataError for a fraction outside [0, 1) or fewer than two documents.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"--validation-fraction {fraction} is not in [0, 1)")
    sizes = {name: size for summary in summaries for name, size in summary.documents}
    if not sizes:
        raise DataError("every document is empty; give .txt files with text in them")
    if fraction == 0:
        return frozenset()
    if len(sizes) < 2:
        raise DataError(
            "one document cannot be split into training and validation; give more files, cut this one with "
            "--document-separator, or hold nothing out with --validation-fraction 0"
        )
    target = fraction * sum(sizes.values())
    held: set[str] = set()
    taken = 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest())[:-1]:
        if held and taken >= target:
            break
        held.add(name)
        taken += sizes[name]
    return frozenset(held)


def training_texts(files: Sequence[TextFile], separator: str | None, held: frozenset[str]) -> Iterator[str]:
    """The texts of all documents that are not held out."""
    for file in files:
        for document in read_documents(file, separator)[0]:
            if document.name not in held:
                yield document.text
