"""What a corpus is made of: where its files lie, which column holds the text, what it may be used for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from em_megatron.data.manifest import DataError

TRAIN, VALIDATION, TEST = "train", "validation", "test"


class Row(NamedTuple):
    """One document of a source file: its place in it, its text (None where it was not read) and its length column."""

    number: int
    text: str | None
    tokens: int | None = None


class Selection(NamedTuple):
    """Which documents of a source file are kept; `limit` is how many of them at most, None for all."""

    min_tokens: int = 0
    min_bytes: int = 0
    limit: int | None = None


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus, and what its source says of it.

    name: its path below the source. split: "" for a file that holds no documents. url: None for a file that is here
    already. checksum: (algorithm, hexadecimal digest), where the source publishes one.
    """

    name: str
    split: str
    url: str | None = None
    size: int | None = None
    checksum: tuple[str, str] | None = None


@dataclass(frozen=True)
class Recipe:
    """A corpus. The texts `licence`, `citation` and `size` are for people, and stand in contents.json.

    list_remote: (base URL, subset) -> its files. split_of: name of a file -> its split. read: (file, selection) -> its
    documents. one_document: a file is one document, else it becomes a folder of them. companion: a file beside the
    documents; `describe` checks it against the names of the sources and says what it holds.
    """

    key: str
    title: str
    homepage: str
    base_url: str
    licence: str
    citation: str
    size: str
    suffixes: tuple[str, ...]
    list_remote: Callable[[str, str], list[SourceFile]]
    split_of: Callable[[str], str]
    read: Callable[[Path, Selection], Iterator[Row]]
    text_column: str | None = None
    length_column: str | None = None
    min_tokens: int = 0
    subset: str = ""
    one_document: bool = False
    document_path: Callable[[str], str] = field(default=str)
    companion: str | None = None
    describe: Callable[[Path, Sequence[str]], dict[str, Any]] | None = None


def checked_name(name: str) -> str:
    """The name. Raises DataError for one that would lead out of the folder it is put into."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\x00" in name or "\\" in name:
        raise DataError(f"the source lists a file named {name!r}, which is no path below it; give another --base-url")
    return name


def first_folder(name: str, splits: dict[str, str]) -> str:
    """The split that the first folder of a name stands for. Raises DataError for a file in none of the folders."""
    folder, slash, _ = name.partition("/")
    if not slash or folder not in splits:
        raise DataError(f"{name} lies in none of the folders {', '.join(splits)}; move it into one of them")
    return splits[folder]


def find_local(recipe: Recipe, folder: Path) -> list[SourceFile]:
    """The files of a corpus that are in a folder already. Raises DataError where there are none."""
    if not folder.is_dir():
        raise DataError(f"input {folder} is no folder; give the one that holds the files of {recipe.title}")
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name.endswith(recipe.suffixes):
            found.append(SourceFile(name, recipe.split_of(name), size=path.stat().st_size))
    if not found:
        raise DataError(f"no {' or '.join(recipe.suffixes)} file in {folder}; give the folder of {recipe.title}")
    if recipe.companion and (folder / recipe.companion).is_file():
        found.append(SourceFile(recipe.companion, "", size=(folder / recipe.companion).stat().st_size))
    return found
