"""Fetches a corpus of the paper and makes a folder of text files of it, for tokenizer.train and tokenizer.encode.

    python -m tokenizer.paper_corpora pg19 --output data/pg19
    python -m tokenizer.encode --input data/pg19/train --validation-input data/pg19/validation ...

The output holds train/, validation/ and test/ (those that the corpus has), one document a .txt file, and, written last,
contents.json. The same command again goes on where it stopped: with a half-fetched file, and behind the files that are
converted. --input takes files that were fetched otherwise, in the folders that the source has them in.
"""

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from em_megatron.data.manifest import DataError
from tokenizer.atomic import write_atomically
from tokenizer.encoding.processes import ordered_map
from tokenizer.paper_corpora import fineweb_edu, pg19, proof_pile
from tokenizer.paper_corpora.convert import DOWNLOADS, RECORDS, UNFINISHED, Record, Task, convert_source
from tokenizer.paper_corpora.download import download
from tokenizer.paper_corpora.recipe import Recipe, Selection, SourceFile, find_local

RECIPES: dict[str, Recipe] = {r.RECIPE.key: r.RECIPE for r in (pg19, proof_pile, fineweb_edu)}
CONTENTS_NAME = "contents.json"


@dataclass
class Remaining:
    """How many documents of each split may still come; None is no limit."""

    limit: int | None
    taken: Counter[str]

    def of(self, split: str) -> int | None:
        return None if self.limit is None else self.limit - self.taken[split]


def build_parser() -> argparse.ArgumentParser:
    facts = "\n".join(f"  {r.key}: {r.title}, {r.homepage}\n    {r.size}\n    {r.licence}" for r in RECIPES.values())
    parser = argparse.ArgumentParser(
        prog="python -m tokenizer.paper_corpora",
        description=__doc__,
        epilog=f"corpora:\n{facts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("corpus", choices=sorted(RECIPES), help="which one")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the texts")
    parser.add_argument("--input", type=Path, metavar="DIR", help="files that are here already; nothing is fetched")
    parser.add_argument("--base-url", metavar="URL", help="a mirror with the paths of the public address")
    parser.add_argument("--subset", metavar="FOLDER", help=f"of FineWeb-Edu on the hub (default: {fineweb_edu.SUBSET})")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N documents of each split, one file at a time")
    parser.add_argument(
        "--min-tokens",
        type=int,
        metavar="N",
        help=f"leave out documents whose length column says less (FineWeb-Edu only, default: {fineweb_edu.MIN_TOKENS})",
    )
    parser.add_argument("--min-bytes", type=int, default=0, metavar="N", help="leave out texts of fewer UTF-8 bytes")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="K",
        help="files that are fetched and converted at a time (default here: %(default)s)",
    )
    parser.add_argument("--delete-downloads", action="store_true", help="delete each fetched file once it is converted")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def selection_of(recipe: Recipe, arguments: argparse.Namespace) -> Selection:
    """Which documents are kept. Raises DataError for options that are out of range or do not go together."""
    if min(arguments.workers, arguments.limit if arguments.limit is not None else 1) < 1:
        raise DataError(f"--workers {arguments.workers}, --limit {arguments.limit}: give at least 1 of each")
    if min(arguments.min_tokens or 0, arguments.min_bytes) < 0:
        raise DataError("--min-tokens and --min-bytes are below 0; give 0 to keep every document")
    if arguments.min_tokens and recipe.length_column is None:
        raise DataError(f"{recipe.title} has no column of token counts; give --min-bytes instead of --min-tokens")
    if arguments.input and (arguments.base_url or arguments.subset or arguments.delete_downloads):
        raise DataError("--input fetches nothing; leave --base-url, --subset and --delete-downloads out")
    if arguments.subset and not recipe.subset:
        raise DataError(f"{recipe.title} has no subsets; leave --subset out")
    tokens = recipe.min_tokens if arguments.min_tokens is None else arguments.min_tokens
    return Selection(tokens, arguments.min_bytes, arguments.limit)


def find_sources(recipe: Recipe, arguments: argparse.Namespace) -> list[SourceFile]:
    """The files of the corpus, by name. Raises DataError where there are none, or one of them has no place."""
    if arguments.input:
        sources = find_local(recipe, arguments.input)
    else:
        base_url = (arguments.base_url or recipe.base_url).rstrip("/")
        sources = recipe.list_remote(base_url, arguments.subset or recipe.subset)
        if not any(source.split for source in sources):
            raise DataError(f"{base_url} lists no file of {recipe.title}; give another --base-url or --subset")
    return sorted(sources, key=lambda source: source.name)


def check_output(output: Path, sources: Sequence[SourceFile]) -> None:
    """Raises DataError if the folder holds documents of other source files; makes it unfinished otherwise."""
    known = {source.name for source in sources}
    folder = output / RECORDS
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix().removesuffix(".json")
        if name not in known:
            raise DataError(
                f"{output} holds documents of {name}, which is none of the files now; choose another --output"
            )
    (output / CONTENTS_NAME).unlink(missing_ok=True)


def make_tasks(
    recipe: Recipe, sources: Sequence[SourceFile], arguments: argparse.Namespace, kept: Selection, left: Remaining
) -> Iterator[Task]:
    """A task for each source file that may still give documents, made when a worker is about to take it."""
    for source in sources:
        limit = left.of(source.split)
        if source.split and limit != 0:
            selection = kept._replace(limit=limit)
            yield Task(recipe, source, arguments.output, arguments.input, selection, arguments.delete_downloads)


def place_companion(recipe: Recipe, sources: Sequence[SourceFile], arguments: argparse.Namespace) -> Path | None:
    """Puts the file that goes with the documents beside them; None where there is none."""
    output: Path = arguments.output
    for source in sources:
        if source.name == recipe.companion:
            fetched = output / DOWNLOADS / source.name
            path = arguments.input / source.name if arguments.input else download(source, fetched)
            write_atomically(output / source.name, path.read_bytes())
            return output / source.name
    return None


def contents_of(
    recipe: Recipe, records: Sequence[Record], arguments: argparse.Namespace, kept: Selection
) -> dict[str, Any]:
    """What contents.json says."""
    splits: dict[str, Counter[str]] = {}
    for record in records:
        splits.setdefault(record.split, Counter()).update(asdict(record.counts) | {"source_files": 1})
    return {
        "corpus": recipe.title,
        "source": str(arguments.base_url or recipe.base_url) if arguments.input is None else "files given with --input",
        "homepage": recipe.homepage,
        "licence": recipe.licence,
        "citation": recipe.citation,
        "columns": {"text": recipe.text_column, "length": recipe.length_column},
        "selection": kept._asdict() | {"subset": arguments.subset or recipe.subset},
        "splits": {split: dict(counts) for split, counts in splits.items()},
        "sources": {r.name: {"bytes": r.source_bytes, "sha256": r.sha256, **asdict(r.counts)} for r in records},
    }


def make_corpus(recipe: Recipe, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fetches and converts a corpus; returns its contents.json. Raises DataError."""
    kept = selection_of(recipe, arguments)
    sources = find_sources(recipe, arguments)
    check_output(arguments.output, sources)
    companion = place_companion(recipe, sources, arguments)
    left = Remaining(arguments.limit, Counter())
    workers = arguments.workers if arguments.limit is None else 1
    records: list[Record] = []
    total = sum(source.size or 0 for source in sources if source.split)
    with tqdm(total=total, unit="B", unit_scale=True, desc=recipe.key, disable=arguments.quiet) as progress:
        for record in ordered_map(convert_source, make_tasks(recipe, sources, arguments, kept, left), workers):
            left.taken[record.split] += record.counts.documents
            records.append(record)
            progress.update(record.source_bytes)
    contents = contents_of(recipe, records, arguments, kept)
    if companion and recipe.describe:
        contents["companion"] = recipe.describe(companion, [record.name for record in records])
    shutil.rmtree(arguments.output / UNFINISHED, ignore_errors=True)
    content = json.dumps(contents, indent=1, ensure_ascii=False) + "\n"
    write_atomically(arguments.output / CONTENTS_NAME, content.encode())
    return contents


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    recipe = RECIPES[arguments.corpus]
    try:
        contents = make_corpus(recipe, arguments)
    except DataError as error:
        print(f"tokenizer.paper_corpora: {error}", file=sys.stderr)
        return 2
    for split, counts in contents["splits"].items():
        print(
            f"{arguments.output / split}: {counts['documents']} documents, {counts['text_bytes']} bytes; left out: "
            f"{counts['too_short']} too short, {counts['empty']} empty, {counts['not_unicode']} not Unicode"
        )
    print(f"{recipe.title}: {recipe.licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
