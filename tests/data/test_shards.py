"""The manifest's refusals and random access to tokens."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from em_megatron.data.manifest import DataError, Manifest
from em_megatron.data.shards import ShardReader
from em_megatron.data.vocabulary import Vocabulary
from tests.data.handmade import document_ids, write_corpus
from tests.tokenizer.small_corpus import train_model, write_texts

LENGTHS = [5, 3, 17, 40, 8, 23, 3]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path, LENGTHS, shard_tokens=30)
    return tmp_path


def test_documents_and_slices(corpus: Path) -> None:
    reader = ShardReader(corpus)
    assert len(reader.manifest.shards("train")) == 4
    assert reader.document_lengths.tolist() == LENGTHS
    assert reader.document_bytes.tolist() == [2 * (length - 2) for length in LENGTHS]
    assert reader.names == tuple(f"document{d}" for d in range(len(LENGTHS)))
    for document, length in enumerate(LENGTHS):
        ids = document_ids(document, length)
        assert reader.tokens(document).tolist() == ids
        assert reader.tokens(document, 1, 3).tolist() == ids[1:3]
        assert reader.tokens(document, length).tolist() == []


def test_tokens_are_a_read_only_view_of_the_file(corpus: Path) -> None:
    ids = ShardReader(corpus).tokens(3)
    assert isinstance(ids, np.memmap)
    assert not ids.flags.writeable


@pytest.mark.parametrize("arguments", [(7,), (-1,), (0, 0, 6), (0, 4, 2), (0, -1, 2)])
def test_outside_is_an_index_error(corpus: Path, arguments: tuple[int, ...]) -> None:
    with pytest.raises(IndexError, match="document"):
        ShardReader(corpus).tokens(*arguments)


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-512])


def lengthen(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(Path.unlink, "is missing from"), (truncate, "is truncated"), (lengthen, "is too long")],
)
def test_missing_and_truncated_shards_are_named_at_the_start(
    corpus: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(corpus / "train-000003.tar")
    with pytest.raises(
        DataError, match=rf"shard file train-000003\.tar .*{reason}|shard file train-000003\.tar {reason}"
    ):
        ShardReader(corpus)


def test_a_flipped_byte_is_named_before_a_token_is_used(corpus: Path) -> None:
    shard = corpus / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(np.array(document_ids(3, 40), "<u2").tobytes()) + 5] ^= 1
    shard.write_bytes(content)
    reader = ShardReader(corpus)
    assert reader.tokens(0).tolist() == document_ids(0, 5)
    with pytest.raises(DataError, match=r"shard file train-000001\.tar .* was altered"):
        reader.tokens(3)
    assert ShardReader(corpus, verify=False).tokens(3).tolist() != document_ids(3, 40)


@pytest.mark.parametrize("place", [3, -8])
def test_a_flipped_byte_in_an_index_is_named(corpus: Path, place: int) -> None:
    index = corpus / "train-000001.idx"
    content = bytearray(index.read_bytes())
    content[place] ^= 1
    index.write_bytes(content)
    with pytest.raises(DataError, match=r"shard file train-000001\.idx .* was altered"):
        ShardReader(corpus).lengths(1)
    index.write_bytes(bytes(len(content)))
    with pytest.raises(DataError, match=r"the index train-000001\.idx of shard train-000001\.tar .* was altered"):
        ShardReader(corpus, verify=False).lengths(1)


def test_the_manifest_says_what_is_wrong_with_it(corpus: Path, tmp_path: Path) -> None:
    path = corpus / "manifest.json"
    fields = json.loads(path.read_text())
    for text, reason in {
        json.dumps(fields | {"format_version": 99}): "has format 99, this version reads format 2",
        json.dumps({name: value for name, value in fields.items() if name != "dtype"}): "lacks a field",
        json.dumps(fields | {"surprise": 1}): "one too many",
        json.dumps(fields | {"dtype": ">u2"}): "says dtype '>u2'",
        json.dumps([1]): "has format None",
        "{": "is not valid JSON",
    }.items():
        path.write_text(text)
        with pytest.raises(DataError, match=reason):
            Manifest.load(corpus)
    path.unlink()
    with pytest.raises(DataError, match="is missing; run tokenizer"):
        ShardReader(corpus)


def test_identity_follows_the_content_not_the_place(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    manifest = Manifest.load(corpus)
    elsewhere = tmp_path_factory.mktemp("copy") / "corpus"
    shutil.copytree(corpus, elsewhere)
    assert Manifest.load(elsewhere) == manifest
    assert Manifest.load(elsewhere).identity == manifest.identity
    first = manifest.splits["train"][0]
    altered = replace(manifest, splits={"train": (replace(first, sha256="0" * 64), *manifest.splits["train"][1:])})
    for other in (altered, replace(manifest, vocab_size=1), replace(manifest, tokenizer_sha256="x")):
        assert other.identity != manifest.identity


def test_another_tokenizer_is_refused(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = Vocabulary(train_model(write_texts(folder / "texts", files=10, words=600), folder / "m.model"))
    manifest = Manifest.load(corpus)
    with pytest.raises(DataError, match=r"encoded with another tokenizer .*beside its manifest"):
        manifest.check_tokenizer(vocabulary)
    replace(manifest, tokenizer_sha256=vocabulary.sha256).check_tokenizer(vocabulary)


def test_an_unknown_split_is_named(corpus: Path) -> None:
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        ShardReader(corpus, "test")


def test_too_many_open_files_are_told(corpus: Path) -> None:
    code = f"""
import resource
from em_megatron.data.shards import ShardReader
reader = ShardReader({str(corpus)!r}, verify=False)
reader.tokens(0)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
reader.tokens(6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "too many files are open (a process may have 3): raise the limit with ulimit -n" in done.stderr
