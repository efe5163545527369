"""Every sort of damage is found and named, all of it in one go; a whole corpus passes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from em_megatron.data.index import OFFSET, TEXT_BYTES, index_name
from em_megatron.data.manifest import Manifest, file_sha256
from em_megatron.data.vocabulary import Vocabulary
from tests.data import made_tokenizers as made
from tests.tokenizer.made_corpora import texts, write_corpus
from tests.tokenizer.small_corpus import files_of, run_encode, write_texts
from tokenizer import verify

SHARDS = [texts("a", [3, 5]), texts("b", [2]), texts("c", [4, 4, 9])]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return Vocabulary(made.sentencepiece_model(path, **made.SENTENCEPIECE["no dummy prefix"]))


@pytest.fixture
def corpus(vocabulary: Vocabulary, tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", vocabulary, {"train": SHARDS, "validation": [texts("v", [6])]})
    return tmp_path / "corpus"


def change_manifest(folder: Path, number: int, **changes: Any) -> None:
    manifest = Manifest.load(folder)
    shards = list(manifest.splits["train"])
    shards[number] = replace(shards[number], **changes)
    replace(manifest, splits={**manifest.splits, "train": tuple(shards)}).save(folder)


def believe(folder: Path, number: int) -> None:
    """Lets the manifest agree with the bytes that are there, so that only their meaning can be wrong."""
    shard = Manifest.load(folder).splits["train"][number]
    sums = file_sha256(folder / shard.name), file_sha256(folder / index_name(shard.name))
    change_manifest(folder, number, sha256=sums[0], index_sha256=sums[1])


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def set_id(folder: Path, at: int, value: int) -> None:
    """Writes another id into the first document of shard 1."""
    path = folder / "train-000001.tar"
    start = int(np.fromfile(folder / "train-000001.idx", "<i8")[OFFSET])
    content = bytearray(path.read_bytes())
    content[start + 2 * at : start + 2 * at + 2] = value.to_bytes(2, "little")
    path.write_bytes(bytes(content))
    believe(folder, 1)


def set_index(folder: Path, column: int, value: int) -> None:
    table = np.fromfile(folder / "train-000001.idx", "<i8")
    table[column] = value
    table.tofile(folder / "train-000001.idx")
    believe(folder, 1)


def rewrite_tar(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "train-000001.tar"
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    believe(folder, 1)


def first_id(folder: Path) -> int:
    return int(np.fromfile(folder / "train-000001.idx", "<i8")[OFFSET])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: (f / "train-000001.tar").unlink(), "train-000001.tar is missing"),
    "missing index": (lambda f: (f / "train-000001.idx").unlink(), "train-000001.idx is missing"),
    "truncated": (lambda f: (f / "train-000001.tar").write_bytes(b"x" * 512), "train-000001.tar is truncated: 512 bytes"),
    "one bit": (lambda f: flip(f / "train-000001.tar", 700), "train-000001.tar was altered: its sha256 is"),
    "one bit of the index": (lambda f: flip(f / "train-000001.idx", 0), "train-000001.idx was altered: its sha256 is"),
    "counts": (lambda f: change_manifest(f, 1, tokens=99), "its documents, tokens or bytes are not those of the manifest"),
    "offset": (lambda f: set_index(f, OFFSET, first_id(f) + 512), "document 0 has offset, ids and bytes of text"),
    "description": (lambda f: rewrite_tar(f, b'"bytes": 10', b'"bytes": 11'), "document 0 has offset, ids and bytes of text"),
    "description of ids": (lambda f: rewrite_tar(f, b'"tokens": ', b'"tokens":9'), "its description says 9"),
    "no description": (lambda f: rewrite_tar(f, b'{"bytes"', b'!"bytes"'), "its tar cannot be read after 0 documents"),
    "an id beyond": (lambda f: set_id(f, 1, 501), "document 0 holds id 501 of a vocabulary of 500"),
    "no bos": (lambda f: set_id(f, 0, 5), "does not begin with bos and end with eos: 5 ... 2"),
    "other bytes": (lambda f: set_id(f, 1, 0), "the index says 10"),
}  # fmt: skip


def test_a_whole_corpus_has_no_fault(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(corpus), "--workers", "1"]) == 0
    said = capsys.readouterr()
    assert "4 shards, 7 documents" in said.out
    assert "no fault" in said.out
    assert "verify: 100%" in said.err
    assert verify.main([str(corpus), "--workers", "1", "--quiet", "--split", "validation"]) == 0
    assert "1 shards, 1 documents" in capsys.readouterr().out


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_its_shard(kind: str, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, reason = DAMAGE[kind]
    damage(corpus)
    assert verify.main([str(corpus), "--workers", "1", "--quiet"]) == 1
    *faults, summary = capsys.readouterr().out.splitlines()
    assert len(faults) == 1
    assert faults[0].startswith("train-000001.tar: ")
    assert reason in faults[0]
    assert "1 FAULTS" in summary


def test_every_bad_shard_is_named_by_processes_too(corpus: Path) -> None:
    flip(corpus / "train-000000.tar", 700)
    (corpus / "train-000002.tar").unlink()
    (corpus / "tokenizer.model").write_bytes(b"x")
    command = [sys.executable, "-m", "tokenizer.verify", str(corpus), "--workers", "2"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    first, second, third, summary = found.stdout.splitlines()
    assert first.startswith("tokenizer: ")
    assert second.startswith("train-000000.tar: train-000000.tar was altered")
    assert third == "train-000002.tar: train-000002.tar is missing"
    assert "3 FAULTS" in summary
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.idx"])
def test_the_advice_mends_a_shard(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, out = write_texts(tmp_path / "in", files=6, words=40), tmp_path / "out"
    assert run_encode(model, inputs, out, "--shard-bytes", "500") == 0
    written = files_of(out)
    flip(out / name, 20)
    kept = (out / "train-000000.tar").stat().st_mtime_ns
    assert verify.main([str(out), "--workers", "1", "--quiet"]) == 1
    summary = capsys.readouterr().out.splitlines()[-1]
    assert "delete the .tar of each shard that is named and run the same tokenizer.encode command again" in summary
    (out / "train-000001.tar").unlink()
    assert run_encode(model, inputs, out, "--shard-bytes", "500") == 0
    assert verify.main([str(out), "--workers", "1", "--quiet"]) == 0
    assert files_of(out) == written
    assert (out / "train-000000.tar").stat().st_mtime_ns == kept


def test_files_that_the_manifest_does_not_list(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ending in ("tar", "idx"):
        shutil.copyfile(corpus / f"train-000000.{ending}", corpus / f"train-000099.{ending}")
    assert verify.main([str(corpus), "--workers", "1", "--quiet"]) == 1
    first, second, summary = capsys.readouterr().out.splitlines()
    assert first == "train-000099.idx: lies in the folder but not in the manifest; delete it"
    assert second.startswith("train-000099.tar: ")
    assert summary.endswith("2 FAULTS")
    assert verify.main([str(corpus), "--workers", "1", "--quiet", "--split", "validation"]) == 0


def test_another_tokenizer_is_named(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copyfile(
        made.sentencepiece_model(tmp_path / "m", **made.SENTENCEPIECE["dummy prefix"]), corpus / "tokenizer.model"
    )
    assert verify.main([str(corpus), "--workers", "1", "--quiet"]) == 1
    said = capsys.readouterr().out
    assert "tokenizer: the corpus was encoded with another tokenizer" in said
    assert "delete" not in said  # no shard is at fault


def test_text_bytes_of_a_tokenizer_that_is_not_lossless_are_not_compared(tmp_path: Path) -> None:
    vocabulary = Vocabulary(made.sentencepiece_model(tmp_path / "m", **made.SENTENCEPIECE["dummy prefix"]))
    write_corpus(tmp_path / "corpus", vocabulary, {"train": [texts("a", [3])]})
    shard = Manifest.load(tmp_path / "corpus").splits["train"][0]
    ids = int(np.fromfile(tmp_path / "corpus" / index_name(shard.name), "<i8")[TEXT_BYTES])
    assert ids == len("word " * 3)  # one less than the ids spell
    assert verify.main([str(tmp_path / "corpus"), "--workers", "1", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--split", "test"], "no split 'test'"), (["--workers", "0"], "give at least 1")],
)
def test_refusals(arguments: list[str], reason: str, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(corpus), *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert verify.main([str(corpus / "none")]) == 2
    assert "tokenizer.verify: no corpus at" in capsys.readouterr().err
    assert verify.main([str(corpus / "train-000000.tar")]) == 2
    assert "tokenizer.verify: " in capsys.readouterr().err
