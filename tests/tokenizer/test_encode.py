"""Encoding: reproducible shards, the split, reuse, interruption, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from em_megatron.data.manifest import MANIFEST_NAME, DataError, Manifest
from em_megatron.data.shards import ShardReader
from em_megatron.data.vocabulary import Vocabulary
from tests.tokenizer.small_corpus import ODD_STRINGS, files_of, run_encode, write_texts
from tokenizer import encode


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_same_bytes_whatever_the_workers(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BYTES_PER_WORKER", 1)
    for workers in ("1", "2"):
        assert run_encode(model, texts, tmp_path / workers, "--workers", workers, "--shard-tokens", "3000") == 0
    one, two = files_of(tmp_path / "1"), files_of(tmp_path / "2")
    assert one == two
    assert sum(name.startswith("train-") for name in one) > 2
    assert not any(name.endswith(".partial") for name in one)


def test_documents_come_back_exactly(model: Path, texts: Path, tmp_path: Path) -> None:
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
            content = (mixed / name).read_bytes()
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
    held = set(ShardReader(tmp_path / "a", "validation").names)
    trained = set(ShardReader(tmp_path / "a", "train").names)
    assert not held & trained
    assert len(held | trained) == 40
    manifest = Manifest.load(tmp_path / "a")
    share = manifest.text_bytes("validation") / (manifest.text_bytes("validation") + manifest.text_bytes("train"))
    assert 0.25 <= share < 0.25 + 1.5 / 40
    for name in sorted(trained)[:5]:
        (texts / name).unlink()
    assert run_encode(model, texts, tmp_path / "b", "--validation-fraction", "0.25") == 0
    assert set(ShardReader(tmp_path / "b", "validation").names) <= held


def test_separator_and_empty_documents(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("one\n===\n \n===\ntwo\n===\nthree\n===\n")
    (texts / "empty.txt").write_text("")
    assert run_encode(model, texts, tmp_path / "out", "--document-separator", "\\n===\\n") == 0
    names = ShardReader(tmp_path / "out", "train").names + ShardReader(tmp_path / "out", "validation").names
    assert sorted(names) == ["a.txt#000000", "a.txt#000002", "a.txt#000003"]
    assert "3 empty documents are left out" in capsys.readouterr().err


def test_nothing_held_out_on_request(model: Path, texts: Path, tmp_path: Path) -> None:
    assert run_encode(model, texts, tmp_path / "out", "--validation-fraction", "0") == 0
    assert set(Manifest.load(tmp_path / "out").splits) == {"train"}
    with pytest.raises(DataError, match="no split 'validation'; it has train"):
        ShardReader(tmp_path / "out", "validation")


def test_second_run_does_nothing_and_others_are_refused(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_encode(model, texts, out) == 0
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run_encode(model, texts, out) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in out.iterdir()}

    assert run_encode(model, texts, out, "--shard-tokens", "500") == 2
    assert "--overwrite" in capsys.readouterr().err
    before = Manifest.load(out).identity
    assert run_encode(model, texts, out, "--shard-tokens", "500", "--overwrite") == 0
    assert Manifest.load(out).identity != before

    shard = out / "train-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert run_encode(model, texts, out, "--shard-tokens", "500") == 0
    assert "train-000001.tar" in capsys.readouterr().err
    assert shard.read_bytes() == whole


def test_invalid_utf8_names_file_and_offset(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_texts(tmp_path / "texts", files=3, words=20)
    (texts / "latin.txt").write_bytes(b"caf\xe9 au lait")
    assert run_encode(model, texts, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "latin.txt" in message
    assert "0xe9 at offset 3" in message
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_name_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(write_texts(tmp_path / name, files=2, words=20)) for name in ("a", "b")]
    assert encode.main(["--tokenizer", str(model), "--output", str(tmp_path / "o"), "--input", *folders]) == 2
    assert "same name" in capsys.readouterr().err
    assert run_encode(model, tmp_path, tmp_path / "out") == 0


def test_kill_leaves_no_manifest_and_a_rerun_completes(model: Path, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", files=1500, words=30)
    out = tmp_path / "out"
    options = ["--shard-tokens", "1", "--quiet", "--workers", "1"]  # a shard per document, so it takes a while
    command = [sys.executable, "-m", "tokenizer.encode", "--tokenizer", str(model), "--input", str(texts)]
    process = subprocess.Popen([*command, "--output", str(out), *options], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: (out / "train-000003.tar").exists())
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / MANIFEST_NAME).exists()
    with pytest.raises(DataError, match="is missing; run tokenizer"):
        ShardReader(out, "train")
    assert run_encode(model, texts, out, "--shard-tokens", "20000") == 0
    assert run_encode(model, texts, tmp_path / "fresh", "--shard-tokens", "20000") == 0
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_a_lost_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(DataError, match="ended from outside"):
        list(encode.ordered_map(os._exit, [1, 2, 3], workers=2))


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
        "from tokenizer.encode import ordered_map\n"
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


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path: Path) -> None:
    writer = encode.ShardWriter(tmp_path, "train", 10, np.dtype("<u4").itemsize)
    ids = np.array([2, 70_000, 131_071, 3], "<u4")
    writer.add(encode.EncodedDocument("a.txt", ids.tobytes(), 9))
    writer.close()
    Manifest("t", 131_072, "<u4", "s", {"train": tuple(writer.shards)}).save(tmp_path)
    assert ShardReader(tmp_path).tokens(0, 1, 4).tolist() == [70_000, 131_071, 3]
