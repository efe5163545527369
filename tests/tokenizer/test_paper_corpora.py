"""Recipes of the paper's corpora on samples in their formats: formats, damage, restarts, downloads, official splits."""

import base64
import gzip
import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from em_megatron.data.manifest import DataError
from em_megatron.data.shards import ShardReader
from tests.tokenizer.small_corpus import files_of, run_encode, train_model, write_texts
from tests.tokenizer.test_encode import wait_until
from tokenizer.paper_corpora import convert, download
from tokenizer.paper_corpora.__main__ import main
from tokenizer.paper_corpora.recipe import SourceFile

REPOSITORIES = ("hoskinson-center/proof-pile", "HuggingFaceFW/fineweb-edu")


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def jsonl(*texts: object) -> bytes:
    return b"".join(json.dumps({"text": text, "meta": {"config": "arxiv"}}).encode() + b"\n" for text in texts)


def parquet(path: Path, lengths: list[int], group: int = 4, names: tuple[str, str] = ("text", "token_count")) -> Path:
    texts = [f"page {number} " * length for number, length in enumerate(lengths)]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({names[0]: texts, names[1]: lengths, "id": [str(n) for n in lengths]})
    pyarrow.parquet.write_table(table, path, row_group_size=group, compression="zstd", write_page_checksum=True)
    return path


def write_pg19(folder: Path, train: int = 8) -> Path:
    texts = write_texts(folder.parent / "texts", files=train + 3, words=400)
    splits = ["train"] * train + ["validation"] * 2 + ["test"]
    for number, (path, split) in enumerate(zip(sorted(texts.iterdir()), splits, strict=True)):
        put(folder / split / f"{995 + number}.txt", path.read_bytes())
    lines = [f'{995 + number},"A title, quoted",1901,http://x/{number}' for number in range(train + 2)]
    put(folder / "metadata.csv", ("\n".join(lines) + "\n").encode())
    return folder


def run(corpus: str, output: Path, *options: object) -> int:
    arguments = [corpus, "--output", output, "--quiet", "--workers", 1, *options]
    return main([str(argument) for argument in arguments])


def texts_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.txt"))}


def contents_of(output: Path) -> Any:
    return json.loads((output / "contents.json").read_text(encoding="utf-8"))


class Mirror:
    """A server of a folder with the paths of the bucket and of the hub; `answers` are taken first, one a request.

    An answer is a status, or a number of bytes below 0, after which the connection ends.
    """

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        self.folder, self.ranges = folder, ranges
        self.answers: list[int] = []
        self.requests: list[tuple[str, str | None]] = []
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.answer(self)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        listed = self.listing(parts.path, {key: values[0] for key, values in parse_qs(parts.query).items()})
        path = self.folder / re.sub(r"^(/deepmind-gutenberg|/datasets/[^/]+/[^/]+/resolve/main|)/", "", parts.path)
        planned = 0 if listed else self.answers.pop(0) if self.answers else 0
        if not listed:
            self.requests.append((path.name, request.headers.get("Range")))
        if planned > 0 or not (listed or path.is_file()):
            request.send_error(max(planned, 0) or 404)
            return
        content, link = listed or (path.read_bytes(), "")
        start = int((request.headers.get("Range") or "bytes=0-")[6:-1]) if self.ranges else 0
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if link:
            request.send_header("Link", link)
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        request.wfile.write(content[start:][: -planned or None])

    def listing(self, path: str, query: dict[str, str]) -> tuple[bytes, str] | None:
        """A page of two files, and where the next one is."""
        names = sorted(file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file())
        page = int(query.get("pageToken", query.get("cursor", "0")))
        more = page + 2 < len(names)
        if path == "/storage/v1/b/deepmind-gutenberg/o":
            names = [name for name in names if name.startswith(query["prefix"])]
            items = [self.bucket_item(name) for name in names[page : page + 2]]
            following = {"nextPageToken": str(page + 2)} if page + 2 < len(names) else {}
            return json.dumps({"items": items} | following).encode(), ""
        if path.startswith("/api/datasets/") and path[14:].partition("/tree/main")[0] in REPOSITORIES:
            entries = [self.hub_entry(name) for name in names[page : page + 2]] + [{"type": "directory", "path": "x"}]
            return json.dumps(entries).encode(), f'<{path}?cursor={page + 2}>; rel="next"' if more else ""
        return None

    def bucket_item(self, name: str) -> dict[str, str]:
        content = (self.folder / name).read_bytes()
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        return {"name": name, "size": str(len(content)), "md5Hash": digest}

    def hub_entry(self, name: str) -> dict[str, object]:
        content = (self.folder / name).read_bytes()
        large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return {"type": "file", "path": name, "size": len(content), "oid": "0", "lfs": large}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Mirror]]:
    monkeypatch.setattr(download, "FIRST_WAIT", 0.001)
    mirrors: list[Mirror] = []

    def start(folder: Path, ranges: bool = True) -> Mirror:
        mirrors.append(Mirror(folder, ranges))
        return mirrors[-1]

    yield start
    for mirror in mirrors:
        mirror.server.shutdown()
        mirror.server.server_close()


def test_pg19_from_its_bucket_to_shards_with_the_official_split(tmp_path: Path, serve: Callable[..., Mirror]) -> None:
    source, out = write_pg19(tmp_path / "pg19"), tmp_path / "out"
    assert run("pg19", out, "--base-url", serve(source).url, "--workers", 2) == 0
    assert texts_of(out / "train").keys() == {f"{n // 1000:03d}/{n}.txt" for n in range(995, 1003)}
    assert (out / "validation" / "001" / "1003.txt").read_bytes() == (source / "validation" / "1003.txt").read_bytes()
    contents = contents_of(out)
    assert {split: counts["documents"] for split, counts in contents["splits"].items()} == {
        "test": 1,
        "train": 8,
        "validation": 2,
    }
    assert contents["companion"]["books"] == 10
    assert contents["companion"]["unknown_books"] == 1
    assert "Apache" in contents["licence"]
    test = source / "test" / "1005.txt"
    assert contents["sources"]["test/1005.txt"]["sha256"] == hashlib.sha256(test.read_bytes()).hexdigest()

    splits = ["--validation-input", str(out / "validation")]
    model = train_model(out / "train", tmp_path / "m.model", *splits)
    assert run_encode(model, out / "train", tmp_path / "shards", *splits) == 0
    assert set(ShardReader(tmp_path / "shards", "train").names) == texts_of(out / "train").keys()
    held = ["validation/001/1003.txt", "validation/001/1004.txt"]
    assert list(ShardReader(tmp_path / "shards", "validation").names) == held


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["jsonl", "gz", "zst"])
def test_proof_pile_formats(pack: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "FOLDER_FILES", 2)
    ending = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[pack]
    name = f"proofpile_train_0.jsonl{ending}"
    parts = [jsonl("Théorème\n", "", "a " * 300_000), jsonl(" \n", "\ud800", "last").rstrip(b"\n")]
    put(tmp_path / "in" / "train" / name, b"".join(pack(part) for part in parts))  # two members, two frames
    put(tmp_path / "in" / "dev" / "proofpile_dev.jsonl", jsonl("held"))
    assert run("proof_pile", tmp_path / "out", "--input", tmp_path / "in") == 0
    assert texts_of(tmp_path / "out" / "train") == {
        f"train/{name}/0000/000000001.txt": "Théorème\n".encode(),
        f"train/{name}/0000/000000003.txt": b"a " * 300_000,
        f"train/{name}/0001/000000006.txt": b"last",
    }
    assert list(texts_of(tmp_path / "out" / "validation").values()) == [b"held"]
    counts = contents_of(tmp_path / "out")["splits"]["train"]
    assert (counts["documents"], counts["empty"], counts["not_unicode"]) == (3, 2, 1)


def test_fineweb_edu_keeps_long_documents(tmp_path: Path, serve: Callable[..., Mirror]) -> None:
    parquet(tmp_path / "in" / "sample" / "10BT" / "000_00000.parquet", [3, 50, 2, 1, 1, 1, 2, 3, 70, 40, 60, 1])
    assert run("fineweb_edu", tmp_path / "out", "--base-url", serve(tmp_path / "in").url, "--min-tokens", 50) == 0
    names = [Path(name).stem for name in texts_of(tmp_path / "out" / "train")]
    assert names == ["000000001", "000000008", "000000010"]
    contents = contents_of(tmp_path / "out")
    assert contents["splits"]["train"]["too_short"] == 9
    assert contents["columns"] == {"text": "text", "length": "token_count"}
    assert run("fineweb_edu", tmp_path / "none", "--input", tmp_path / "in") == 0
    assert contents_of(tmp_path / "none")["splits"]["train"]["documents"] == 0


GOOD = jsonl("one", "two", "three" * 50_000)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train/a.jsonl", GOOD[:-9], r"a\.jsonl is damaged at line 3 "),
        ("train/a.jsonl", GOOD + b"[1]\n", r"damaged at line 4 \(no text under 'text'\)"),
        ("train/a.jsonl", GOOD + b'{"text": "\xff"}\n', "damaged at line 4 "),
        ("train/a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-200], r"a\.jsonl\.gz is cut after line 2 "),
        ("train/a.jsonl.gz", gzip.compress(GOOD)[:-8] + b"\0" * 8, "damaged after line 3 .*CRC"),
        ("train/a.jsonl.gz", GOOD, "damaged after line 0 "),
        ("train/a.jsonl.zst", zstandard.compress(GOOD)[:-3], r"a\.jsonl\.zst is cut after line "),
        ("train/a.jsonl.zst", GOOD, "damaged after line 0 "),
        ("other/a.jsonl", GOOD, "lies in none of the folders train, dev"),
    ],
)
def test_damaged_lines(
    name: str, content: bytes, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "in" / name, content)
    assert run("proof_pile", tmp_path / "out", "--input", tmp_path / "in") == 2
    assert re.search(reason, capsys.readouterr().err)
    assert not list((tmp_path / "out").glob("train/*"))
    assert not (tmp_path / "out" / "contents.json").exists()


@pytest.mark.parametrize("fault", ["cut", "page", "column"])
def test_damaged_parquet(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("body" if fault == "column" else "text", "token_count")
    path = parquet(tmp_path / "in" / "a.parquet", [9, 9, 900, 901, 902, 9], group=2, names=names)
    content = bytearray(path.read_bytes())
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[start + 40 : start + 60] = bytes(20)
    path.write_bytes({"cut": bytes(content[:-5]), "page": bytes(content), "column": path.read_bytes()}[fault])
    assert run("fineweb_edu", tmp_path / "out", "--input", tmp_path / "in", "--min-tokens", 1) == 2
    expected = {"cut": "a.parquet is cut or damaged in its footer", "page": "row group 1", "column": "columns body"}
    assert expected[fault] in capsys.readouterr().err


def test_damaged_books(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_pg19(tmp_path / "in")
    put(source / "metadata.csv", b"995,Title,1901,x\nnumber,Title,1901,x\n")
    assert run("pg19", tmp_path / "a", "--input", source) == 2
    assert "metadata.csv is damaged at line 2" in capsys.readouterr().err
    put(source / "train" / "996.txt", b"caf\xe9")
    assert run("pg19", tmp_path / "b", "--input", source) == 2
    assert "996.txt is not UTF-8 at offset 3" in capsys.readouterr().err


@pytest.mark.parametrize(("corpus", "module"), [("proof_pile", "zstandard"), ("fineweb_edu", "pyarrow.parquet")])
def test_missing_packages(
    corpus: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "in" / "train" / ("a.jsonl.zst" if corpus == "proof_pile" else "a.parquet"), b"")
    put(tmp_path / "in" / "train" / ("b.jsonl.zst" if corpus == "proof_pile" else "b.parquet"), b"x")
    monkeypatch.setitem(sys.modules, module, None)
    assert run(corpus, tmp_path / "out", "--input", tmp_path / "in") == 2
    assert "pip install 'em-megatron[data]'" in capsys.readouterr().err


def test_restart_after_a_kill(tmp_path: Path) -> None:
    for index, count in enumerate((9, 3000, 9)):
        texts = [f"{index} {number}" for number in range(count)]
        put(tmp_path / "in" / "train" / f"{index}.jsonl.gz", gzip.compress(jsonl(*texts)))
    out, options = tmp_path / "out", ["--quiet", "--workers", "1", "--input", str(tmp_path / "in")]
    command = [sys.executable, "-m", "tokenizer.paper_corpora", "proof_pile", "--output", str(out), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: (out / "unfinished" / "train" / "1.jsonl.gz" / "0000" / "000000009.txt").exists())
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        process.kill()
        process.wait()
    records = out / "records" / "train"
    assert [path.name for path in records.iterdir()] == ["0.jsonl.gz.json"]
    assert not (out / "train" / "train" / "1.jsonl.gz").exists()
    stamp = (records / "0.jsonl.gz.json").stat().st_mtime_ns
    assert run("proof_pile", out, *options) == 0
    assert stamp == (records / "0.jsonl.gz.json").stat().st_mtime_ns
    assert run("proof_pile", tmp_path / "fresh", *options) == 0
    assert texts_of(out) == texts_of(tmp_path / "fresh")
    assert contents_of(out) == contents_of(tmp_path / "fresh")
    assert files_of(records) == files_of(tmp_path / "fresh" / "records" / "train")
    assert len(list((out / "train" / "train" / "1.jsonl.gz" / "0002").iterdir())) == 1000

    put(out / "train" / "train" / "2.jsonl.gz" / "0000" / "000000003.txt", b"2")  # lost by a dying disk
    assert run("proof_pile", out, *options) == 0
    assert texts_of(out) == texts_of(tmp_path / "fresh")


def test_other_options_and_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "in" / "train" / "a.jsonl", jsonl("one", "three"))
    assert run("proof_pile", tmp_path / "out", "--input", tmp_path / "in", "--min-bytes", 4) == 0
    assert list(texts_of(tmp_path / "out").values()) == [b"three"]
    assert run("proof_pile", tmp_path / "out", "--input", tmp_path / "in") == 2
    assert "made with other options" in capsys.readouterr().err
    (tmp_path / "in" / "train" / "a.jsonl").rename(tmp_path / "in" / "train" / "b.jsonl")
    assert run("proof_pile", tmp_path / "out", "--input", tmp_path / "in", "--min-bytes", 4) == 2
    assert "holds documents of train/a.jsonl" in capsys.readouterr().err
    for options, reason in {
        ("--min-tokens", 9): "has no column of token counts",
        ("--limit", 0): "give at least 1",
        ("--subset", "x"): "--input fetches nothing",
        ("--min-bytes", -1): "below 0",
    }.items():
        assert run("proof_pile", tmp_path / "new", "--input", tmp_path / "in", *options) == 2
        assert reason in capsys.readouterr().err
    assert run("fineweb_edu", tmp_path / "new", "--input", tmp_path / "in") == 2
    assert "no .parquet file in" in capsys.readouterr().err


def test_limit_and_what_is_fetched_for_it(tmp_path: Path, serve: Callable[..., Mirror]) -> None:
    for split in ("train", "test"):
        for index in range(3):
            put(tmp_path / "in" / split / f"{index}.jsonl", jsonl("a", "b"))
    mirror = serve(tmp_path / "in")
    for _ in range(2):
        options = ["--base-url", mirror.url, "--limit", 3, "--delete-downloads"]
        assert run("proof_pile", tmp_path / "out", *options) == 0
    assert [name for name, _ in mirror.requests] == ["0.jsonl", "1.jsonl"] * 2
    assert {split: counts["documents"] for split, counts in contents_of(tmp_path / "out")["splits"].items()} == {
        "train": 3,
        "test": 3,
    }
    assert not [path for path in (tmp_path / "out" / "downloads").rglob("*") if path.is_file()]


@pytest.mark.parametrize("ranges", [True, False])
def test_downloads_go_on(ranges: bool, tmp_path: Path, serve: Callable[..., Mirror]) -> None:
    content = bytes(range(256)) * 40
    mirror = serve(put(tmp_path / "in" / "x.bin", content).parent, ranges)
    mirror.answers = [-4000, 503, -1000]
    source = SourceFile("x.bin", "train", f"{mirror.url}/x.bin", 10240, ("md5", hashlib.md5(content).hexdigest()))
    target = tmp_path / "out" / "x.bin"
    assert download.download(source, target).read_bytes() == content
    assert [part for _, part in mirror.requests] == [
        None,
        "bytes=4000-",
        "bytes=4000-",
        "bytes=5000-" if ranges else "bytes=1000-",
    ]
    assert [path.name for path in target.parent.iterdir()] == ["x.bin"]
    target.rename(target.with_name("x.bin.partial")).write_bytes(b"older" * 100)  # goes on with another version's start
    assert download.download(source, target).read_bytes() == content
    assert download.download(source, target) == target
    assert len(mirror.requests) == (6 if ranges else 5)


@pytest.mark.parametrize(
    ("answers", "size", "reason"),
    [
        ([404], 6, "answers 404"),
        ([500] * 9, 6, "in 6 attempts"),
        ([-5] * 20, 6, "connection ended after 5 of 6"),
        ([], 7, "announced with 6 bytes, its list says 7"),
        ([], 6, "does not have the published md5"),
    ],
)
def test_downloads_that_fail(
    answers: list[int], size: int, reason: str, tmp_path: Path, serve: Callable[..., Mirror]
) -> None:
    mirror = serve(put(tmp_path / "in" / "x.bin", b"abcdef").parent, ranges=False)
    mirror.answers = answers
    source = SourceFile("x.bin", "train", f"{mirror.url}/x.bin", size, ("md5", "0" * 32))
    with pytest.raises(DataError, match=reason):
        download.download(source, tmp_path / "out" / "x.bin")
    assert not (tmp_path / "out" / "x.bin").exists()


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(download, "FIRST_WAIT", 0.001)
    for corpus in ("pg19", "proof_pile", "fineweb_edu"):
        assert run(corpus, tmp_path / "out", "--base-url", "http://127.0.0.1:9") == 2
        assert "Connection refused" in capsys.readouterr().err


def test_validation_input_is_refused_where_it_cannot_be(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = write_texts(tmp_path / "held", files=2, words=20)
    (tmp_path / "empty").mkdir()
    put(tmp_path / "empty" / "a.txt", b" \n")
    for options, reason in [
        ((held, "--validation-fraction", "0.05"), "leave --validation-fraction out"),
        ((texts,), "are one file or have one name"),
        ((tmp_path / "none",), "does not exist"),
        ((tmp_path / "empty",), "every document of --validation-input is empty"),
    ]:
        assert run_encode(model, texts, tmp_path / "out", "--validation-input", *map(str, options)) == 2
        assert reason in capsys.readouterr().err
    assert run_encode(model, texts, tmp_path / "out", "--validation-input", str(held)) == 0
    names = ["validation/text0000.txt", "validation/text0001.txt"]
    assert list(ShardReader(tmp_path / "out", "validation").names) == names
    assert len(ShardReader(tmp_path / "out", "train")) == 20
    assert run_encode(model, texts, tmp_path / "out") == 2
    assert "made from other texts, options" in capsys.readouterr().err
