"""Encoding: reproducible shards, the split, what is left out, reuse, refusals."""

import codecs
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from em_megatron.data.manifest import DataError, Manifest
from em_megatron.data.shards import ShardReader
from em_megatron.data.vocabulary import Vocabulary
from tests.tokenizer.small_corpus import ODD_STRINGS, files_of, run_encode, write_texts
from tokenizer import encode
from tokenizer.encoding import folder
from tokenizer.encoding.processes import ordered_map


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def names_of(corpus: Path, split: str) -> list[str]:
    return list(ShardReader(corpus, split).names)


def test_same_bytes_whatever_the_workers(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BYTES_PER_WORKER", 1)
    for workers in ("1", "2"):
        assert run_encode(model, texts, tmp_path / workers, "--workers", workers, "--shard-bytes", "6000") == 0
    one, two = files_of(tmp_path / "1"), files_of(tmp_path / "2")
    assert one == two
    assert sum(name.startswith("train-") for name in one) > 8
    assert {name.rpartition(".")[2] for name in one} == {"tar", "idx", "json", "model"}
    manifest = Manifest.load(tmp_path / "1")
    assert all(shard.text_bytes <= 6000 or shard.documents == 1 for shard in manifest.shards("train"))


def test_documents_come_back_exactly(model: Path, tmp_path: Path) -> None:
    mixed = write_texts(tmp_path / "mixed", files=6, words=50, seed=3)
    for index, text in enumerate(ODD_STRINGS):
        (mixed / f"odd.with.dots.{index}.txt").write_text(text, encoding="utf-8", newline="")
    assert run_encode(model, mixed, tmp_path / "out") == 0
    vocabulary = Vocabulary(model)
    names: set[str] = set()
    for split in ("train", "validation"):
        reader = ShardReader(tmp_path / "out", split)
        reader.manifest.check_tokenizer(vocabulary)
        for document, name in enumerate(reader.names):
            content = (mixed / name).read_bytes().removeprefix(codecs.BOM_UTF8)
            ids = reader.tokens(document)
            assert ids[0] == vocabulary.bos_id
            assert ids[-1] == vocabulary.eos_id
            assert vocabulary.decode_bytes(ids[1:-1].tolist()) == content
            assert reader.document_bytes[document] == len(content) == vocabulary.token_bytes[ids].sum()
        names |= set(reader.names)
    assert names == {path.name for path in mixed.iterdir() if path.read_text(encoding="utf-8").strip()}


def test_webdataset_reads_the_shards(model: Path, texts: Path, tmp_path: Path) -> None:
    assert run_encode(model, texts, tmp_path / "out") == 0
    reader = ShardReader(tmp_path / "out", "train")
    dataset = webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False)
    for document, sample in enumerate(dataset):
        assert np.array_equal(np.frombuffer(sample["tokens.bin"], "<u2"), reader.tokens(document))
        assert json.loads(sample["json"])["name"] == reader.names[document]
    assert document == len(reader) - 1


def test_split_is_by_document_and_stable(model: Path, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", files=40, words=60)
    assert run_encode(model, texts, tmp_path / "a", "--validation-fraction", "0.25") == 0
    held, trained = names_of(tmp_path / "a", "validation"), names_of(tmp_path / "a", "train")
    sizes = {path.name: path.stat().st_size for path in texts.iterdir()}
    ordered = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest())
    reached = np.cumsum([sizes[name] for name in ordered])
    enough = int(np.argmax(reached >= 0.25 * reached[-1])) + 1
    assert held == sorted(ordered[:enough])
    assert trained == sorted(ordered[enough:])
    for name in trained[:5]:
        (texts / name).unlink()
    assert run_encode(model, texts, tmp_path / "b", "--validation-fraction", "0.25") == 0
    assert set(names_of(tmp_path / "b", "validation")) <= set(held)


def test_nothing_held_out_on_request(model: Path, texts: Path, tmp_path: Path) -> None:
    assert run_encode(model, texts, tmp_path / "out", "--validation-fraction", "0") == 0
    assert set(Manifest.load(tmp_path / "out").splits) == {"train"}
    with pytest.raises(DataError, match="no split 'validation'; it has train"):
        ShardReader(tmp_path / "out", "validation")


def test_separator_and_empty_documents(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("one\n===\n \n===\ntwo\n===\nthree\n===\n")
    (texts / "empty.txt").write_text("")
    assert run_encode(model, texts, tmp_path / "out", "--document-separator", "\\n===\\n") == 0
    names = names_of(tmp_path / "out", "train") + names_of(tmp_path / "out", "validation")
    assert sorted(names) == ["a.txt#000000", "a.txt#000002", "a.txt#000003"]
    assert "3 empty documents are left out" in capsys.readouterr().err


def test_second_run_does_nothing_and_reads_only_what_may_have_changed(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = write_texts(tmp_path / "own", files=3, words=30)
    out = tmp_path / "out"
    assert run_encode(model, own, out) == 0
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    read: list[str] = []
    real = folder.file_sha256
    monkeypatch.setattr(folder, "file_sha256", lambda path: read.append(path.name) or real(path))
    assert run_encode(model, own, out, "--overwrite") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert read == []

    os.utime(own / "text0001.txt", ns=(1, 1))
    for _ in range(2):  # the new time is remembered
        assert run_encode(model, own, out) == 0
    assert read == ["text0001.txt"]

    (own / "text0001.txt").write_bytes((own / "text0001.txt").read_bytes()[::-1])
    assert run_encode(model, own, out) == 2
    assert "made from other texts, options or another tokenizer" in capsys.readouterr().err


def test_other_options_are_refused_and_overwritten(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_encode(model, texts, out, "--shard-bytes", "2000") == 0
    for options in (["--shard-bytes", "9000"], ["--deduplicate", "text"], ["--min-bytes", "5"], ["--id-column", "x"]):
        assert run_encode(model, texts, out, *options) == 2
        assert "--overwrite" in capsys.readouterr().err
    assert run_encode(model, texts, out, "--shard-bytes", "9000", "--overwrite") == 0
    assert run_encode(model, texts, tmp_path / "fresh", "--shard-bytes", "9000") == 0
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_a_damaged_shard_alone_is_encoded_again(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_encode(model, texts, out, "--shard-bytes", "9000") == 0
    before, shard = files_of(out), out / "train-000001.tar"
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    shard.write_bytes(shard.read_bytes()[:-1])
    (out / "train-000002.idx").unlink()
    assert run_encode(model, texts, out, "--shard-bytes", "9000") == 0
    assert "train-000001.tar, train-000002.tar missing or damaged" in capsys.readouterr().err
    assert files_of(out) == before
    again = {path.name for path in out.glob("*.tar") if path.stat().st_mtime_ns != stamps[path.name]}
    assert again == {"train-000001.tar", "train-000002.tar"}


def test_a_damaged_manifest_is_made_again(model: Path, texts: Path, tmp_path: Path) -> None:
    assert run_encode(model, texts, tmp_path) == 0
    before = files_of(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    assert run_encode(model, texts, tmp_path) == 0
    assert files_of(tmp_path) == before


def test_two_files_of_one_name_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(write_texts(tmp_path / name, files=2, words=20)) for name in ("a", "b")]
    assert encode.main(["--tokenizer", str(model), "--output", str(tmp_path / "o"), "--input", *folders]) == 2
    assert "same name" in capsys.readouterr().err
    assert run_encode(model, tmp_path, tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--shard-bytes", "0"], "give at least 1 of each"),
        (["--workers", "0"], "give at least 1 of each"),
        (["--min-bytes", "9", "--max-bytes", "8"], "keep no document"),
        (["--validation-fraction", "1"], "is not in [0, 1)"),
        (["--min-bytes", "1000000"], "every document is empty or left out by the options"),
        (["--input", "/nonexistent"], "does not exist"),
        (["--output", "/proc/out"], "cannot read or write"),
    ],
)
def test_refusals(
    options: list[str], reason: str, model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_encode(model, texts, tmp_path / "out", *options) == 2
    assert reason in capsys.readouterr().err
    assert run_encode(model, texts, tmp_path / "out") == 0  # no shard was there: nothing to refuse


def test_a_lost_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(DataError, match="ended from outside"):
        list(ordered_map(os._exit, [1, 2, 3], workers=2))


def running(pid: str) -> bool:
    """False also for a process that has ended and whose entry nobody has collected (state Z)."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """The workers write their ids; then the parent, which waits on a task that sleeps, is killed."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from pathlib import Path\n"
        "from tokenizer.encoding.processes import ordered_map\n"
        "def work(folder):\n"
        "    import os\n"
        "    Path(folder, str(os.getpid()) + '.pid').touch()\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        f"    list(ordered_map(work, [{str(tmp_path)!r}] * 2, workers=2))\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": os.getcwd()})
    try:
        wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    finally:
        process.kill()
        process.wait()
    pids = [path.stem for path in tmp_path.glob("*.pid")]
    wait_until(lambda: not any(running(pid) for pid in pids))
