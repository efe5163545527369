"""Merged corpora read as one, take no room, go on after an interruption, and refuse what does not fit together."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from em_megatron.data.manifest import Manifest
from em_megatron.data.shards import ShardReader
from em_megatron.data.vocabulary import Vocabulary
from tests.data import made_tokenizers as made
from tests.tokenizer.made_corpora import texts, write_corpus
from tests.tokenizer.small_corpus import files_of
from tokenizer import merge, verify


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(made.saved(made.byte_level(), tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def parts(vocabulary: Vocabulary, tmp_path: Path) -> list[Path]:
    first = {"train": [texts("a", [3, 5]), texts("b", [2])], "validation": [texts("v", [6])]}
    write_corpus(tmp_path / "first", vocabulary, first)
    write_corpus(tmp_path / "second", vocabulary, {"train": [texts("c", [4, 4, 9])]})
    return [tmp_path / "first", tmp_path / "second"]


def run(output: Path, parts: list[Path], *options: str) -> int:
    return merge.main([str(output), *map(str, parts), "--quiet", *options])


@pytest.mark.parametrize("options", [[], ["--copy"]])
def test_the_documents_of_all_in_order(
    options: list[str], parts: list[Path], tmp_path: Path, vocabulary: Vocabulary
) -> None:
    assert run(tmp_path / "merged", parts, *options) == 0
    readers = [ShardReader(part) for part in parts]
    merged = ShardReader(tmp_path / "merged")
    expected = [reader.tokens(document).tolist() for reader in readers for document in range(len(reader))]
    assert [merged.tokens(document).tolist() for document in range(len(merged))] == expected
    assert merged.names == ("a0", "a1", "b0", "c0", "c1", "c2")
    assert ShardReader(tmp_path / "merged", "validation").names == ("v0",)
    assert verify.main([str(tmp_path / "merged"), "--workers", "1", "--quiet"]) == 0
    linked = os.path.samefile(parts[1] / "train-000000.tar", tmp_path / "merged/train-000002.tar")
    assert linked == (not options)
    assert (tmp_path / "merged" / vocabulary.file_name).read_bytes() == vocabulary.serialized


def test_the_same_parts_give_the_same_corpus_and_another_order_another(parts: list[Path], tmp_path: Path) -> None:
    for name, corpora in (("x", parts), ("y", parts), ("z", parts[::-1])):
        assert run(tmp_path / name, corpora) == 0
    assert files_of(tmp_path / "x") == files_of(tmp_path / "y")
    identities = [Manifest.load(tmp_path / name).source for name in "xyz"]
    assert identities[0] == identities[1] != identities[2]


def test_a_second_run_does_nothing_and_other_parts_are_refused(
    parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "merged", parts) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()}
    assert run(tmp_path / "merged", parts) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()}
    assert run(tmp_path / "merged", parts[:1]) == 2
    assert "holds another corpus" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--copy"]])
def test_it_goes_on_after_an_interruption(
    options: list[str], parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed, place = [], merge.place

    def interrupted(file: merge.File, copy: bool) -> None:
        if len(placed) == 3:
            raise KeyboardInterrupt
        placed.append(file.target.name)
        place(file, copy)

    monkeypatch.setattr(merge, "place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "merged", parts, *options)
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == sorted(placed)
    (tmp_path / "merged" / "train-000002.tar.host-1.partial").write_bytes(b"x")  # of a process that was killed
    if options:
        (tmp_path / "merged" / placed[0]).write_bytes(b"damaged")
    monkeypatch.setattr(merge, "place", place)
    assert run(tmp_path / "merged", parts, *options) == 0
    assert run(tmp_path / "whole", parts, *options) == 0
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "whole")


def test_shards_of_another_file_system_are_copied(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(origin: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", link)
    assert run(tmp_path / "merged", parts) == 0
    assert not os.path.samefile(parts[0] / "train-000000.tar", tmp_path / "merged/train-000000.tar")
    assert verify.main([str(tmp_path / "merged"), "--workers", "1", "--quiet"]) == 0


def test_a_document_in_two_corpora_is_refused(
    parts: list[Path], tmp_path: Path, vocabulary: Vocabulary, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(
        tmp_path / "third", vocabulary, {"train": [texts("z", [1]), {"v0": "held out there", "c1": "x", "new": "y"}]}
    )
    corpora = [*parts, tmp_path / "third"]
    assert run(tmp_path / "merged", corpora) == 2
    assert "2 documents are in two of the corpora, such as v0, c1: " in capsys.readouterr().err
    assert run(tmp_path / "merged", corpora, "--allow-duplicates") == 0
    assert len(ShardReader(tmp_path / "merged")) == 10


def test_corpora_that_do_not_fit_are_refused(
    parts: list[Path], tmp_path: Path, vocabulary: Vocabulary, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(output: Path, *corpora: Path) -> str:
        assert run(output, list(corpora)) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        return error

    other = Vocabulary(made.saved(made.byte_level("digits"), tmp_path / "other tokenizer"))
    write_corpus(tmp_path / "other", other, {"train": [texts("o", [1])]})
    assert "other was encoded with another tokenizer than" in refused(tmp_path / "merged", parts[0], tmp_path / "other")
    write_corpus(tmp_path / "wide", vocabulary, {"train": [texts("w", [1])]}, dtype="<u4")
    assert "wide stores ids as <u4 and" in refused(tmp_path / "merged", parts[0], tmp_path / "wide")
    assert "is one of the corpora to merge" in refused(parts[0], *parts)
    assert "no corpus at" in refused(tmp_path / "merged", tmp_path / "nowhere")
    assert not (tmp_path / "merged").exists()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/notes.txt").write_text("mine")
    assert "holds notes.txt, which this merge does not make" in refused(tmp_path / "merged", *parts)
    (parts[1] / "train-000000.tar").unlink()
    assert "train-000000.tar is missing or has another size" in refused(tmp_path / "new", *parts)


def test_an_altered_shard_is_not_copied(parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = parts[1] / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(bytes(content))
    assert run(tmp_path / "merged", parts, "--copy") == 2
    assert f"{path} was altered" in capsys.readouterr().err
    assert not (tmp_path / "merged/manifest.json").exists()
