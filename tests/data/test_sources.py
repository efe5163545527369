"""Corpora in folders and behind addresses: what is fetched, whatever the server does, is what lies there."""

import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from em_megatron.data import retry
from em_megatron.data.manifest import DataError, Manifest
from em_megatron.data.shards import ShardReader
from em_megatron.data.sources import FolderSource, Source, SourceOptions, open_source
from em_megatron.data.sources.transports import other
from tests.data.served import Fetcher, index_of, tar_of, write_small_corpus
from tests.data.servers import FolderServer, Trouble
from tests.data.waiting import wait_until


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora") / "corpus"
    write_small_corpus(folder)
    return folder


@pytest.fixture
def manifest(corpus: Path) -> Manifest:
    return Manifest.load(corpus)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.005)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def serve(corpus: Path) -> Iterator[Callable[..., FolderServer]]:
    servers: list[FolderServer] = []

    def start(folder: Path = corpus, **settings: object) -> FolderServer:
        servers.append(FolderServer(folder, **settings))  # type: ignore[arg-type]
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def source_of(location: object, cache: Path, **options: object) -> Source:
    return open_source(str(location), SourceOptions(cache, **{"timeout": 20.0, **options}))  # type: ignore[arg-type]


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_file())


def test_over_http_as_on_disk(corpus: Path, serve: Callable[..., FolderServer], cache: Path) -> None:
    server = serve()
    local = ShardReader(corpus)
    for attempt in range(2):
        remote = ShardReader(source_of(server.url, cache))
        assert remote.manifest == local.manifest
        remote.prepare(range(2))
        for document in range(len(local)):
            assert np.array_equal(remote.tokens(document), local.tokens(document))
        assert len(server.requests) == 5 + attempt, "files in the cache are not fetched again"
    assert names(cache) == sorted(
        f"{sha256}{Path(name).suffix}" for shard in local.shards for name, _, sha256 in (tar_of(shard), index_of(shard))
    )
    spawned = pickle.loads(pickle.dumps(remote))
    assert np.array_equal(spawned.tokens(3), local.tokens(3)), "as a worker process gets it"
    other = ShardReader(source_of(serve(corpus.parent).url + "/corpus/", cache))
    assert np.array_equal(other.tokens(4), local.tokens(4)), "another address of the same corpus"


def test_a_corpus_that_is_not_there(serve: Callable[..., FolderServer], cache: Path, manifest: Manifest) -> None:
    server = serve()
    with pytest.raises(DataError, match=rf"no corpus at {server.url}/none: manifest\.json is missing"):
        ShardReader(source_of(f"{server.url}/none", cache))
    with pytest.raises(DataError, match=rf"shard file train-000000\.tar is missing from {server.url}/none"):
        source_of(f"{server.url}/none", cache).path(*tar_of(manifest.shards("train")[0]))
    assert names(cache) == []


@pytest.mark.parametrize("ranges", [True, False])
def test_going_on_after_every_fault(
    ranges: bool,
    serve: Callable[..., FolderServer],
    cache: Path,
    manifest: Manifest,
    corpus: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def arrived(position: int) -> None:
        wait_until(lambda: [path.stat().st_size for path in cache.glob("*.partial")] == [position])

    server = serve(ranges=ranges, before_cut=arrived)
    server.troubles = [
        Trouble(cut=30_000),
        Trouble(503),
        Trouble(429, (("Retry-After", "0"),)),
        Trouble(stall=50_000),
        Trouble(cut=0),
    ]
    asked = tar_of(manifest.shards("train")[0])
    path = source_of(server.url, cache, timeout=0.3).path(*asked)
    assert path.read_bytes() == (corpus / asked[0]).read_bytes()
    if ranges:
        assert server.asked(asked[0]) == [None, *["bytes=30000-"] * 3, *["bytes=80000-"] * 2]
    else:
        assert server.asked(asked[0]) == [None, *["bytes=30000-"] * 3, "bytes=50000-", None]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 5
    assert warnings[1].startswith(f"{asked[0]} from {server.url}: attempt 2 of 10 failed (503 Service Unavailable)")
    assert "attempt 1 of 10 failed (nothing came for 0.3 s)" in warnings[3]


def test_the_manifest_is_asked_for_again(serve: Callable[..., FolderServer], cache: Path, manifest: Manifest) -> None:
    server = serve()
    server.troubles = [Trouble(500), Trouble(cut=20), Trouble(stall=20)]
    assert Manifest.read(source_of(server.url, cache, timeout=0.2)) == manifest


def test_giving_up(serve: Callable[..., FolderServer], cache: Path, manifest: Manifest) -> None:
    server = serve(always=Trouble(502))
    asked = tar_of(manifest.shards("train")[0])
    with pytest.raises(
        DataError, match=r"could not fetch train-000000\.tar from http.* in 3 attempts \(502 Bad Gateway\)"
    ):
        source_of(server.url, cache, attempts=3).path(*asked)
    assert len(server.requests) == 3
    server.always = Trouble(403)
    with pytest.raises(DataError, match=r"train-000000\.tar from http.*the server answers 403 Forbidden"):
        source_of(server.url, cache).path(*asked)
    assert len(server.requests) == 4
    closed = serve()
    closed.close()
    with pytest.raises(DataError, match=r"in 2 attempts \(.*Connect"):
        source_of(closed.url, cache, attempts=2).read("manifest.json")


def test_a_flipped_byte_is_fetched_once_more(
    serve: Callable[..., FolderServer], cache: Path, manifest: Manifest, corpus: Path
) -> None:
    server = serve()
    asked = tar_of(manifest.shards("train")[1])
    server.troubles = [Trouble(flip=70_000)]
    source = source_of(server.url, cache)
    assert source.path(*asked).read_bytes() == (corpus / asked[0]).read_bytes()
    assert server.asked(asked[0]) == [None, None]
    server.always = Trouble(flip=7)
    wrong = index_of(manifest.shards("train")[1])
    with pytest.raises(DataError, match=rf"shard file train-000001\.idx in {server.url} was altered"):
        source.path(*wrong)
    assert server.asked(wrong[0]) == [None, None]
    assert names(cache) == [source.path(*asked).name]


@pytest.mark.parametrize("change", [-512, 512])
def test_another_size_is_named(
    change: int, serve: Callable[..., FolderServer], cache: Path, manifest: Manifest
) -> None:
    server = serve()
    name, size, sha256 = tar_of(manifest.shards("train")[0])
    kind = "truncated" if change > 0 else "too long"
    with pytest.raises(DataError, match=rf"train-000000\.tar in http.* is {kind}: {size} bytes, the manifest says"):
        source_of(server.url, cache).path(name, size + change, sha256)


def test_a_killed_server_comes_back(
    cache: Path, corpus: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    def start(*arguments: object) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-m", "tests.data.servers", str(corpus), *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    asked = tar_of(manifest.shards("train")[0])
    server, port = start(0, 40_000)
    with ThreadPoolExecutor(1) as pool:
        try:
            source = source_of(f"http://127.0.0.1:{port}", cache, attempts=1000)
            found = pool.submit(source.path, *asked)
            wait_until(lambda: any(path.stat().st_size == 40_000 for path in cache.glob("*.partial")))
        finally:
            server.kill()
            server.wait()
        wait_until(lambda: any("Connect" in record.getMessage() for record in caplog.records))
        server, _ = start(port)
        try:
            assert found.result(60).read_bytes() == (corpus / asked[0]).read_bytes()
        finally:
            server.kill()
            server.wait()


def test_two_processes_download_once(
    serve: Callable[..., FolderServer], cache: Path, corpus: Path, manifest: Manifest
) -> None:
    server = serve()
    asked = tar_of(manifest.shards("train")[0])
    fetchers = [Fetcher(server.url, cache, asked) for _ in range(2)]
    for fetcher in fetchers:
        fetcher.go()
    paths = {fetcher.path() for fetcher in fetchers}
    with ThreadPoolExecutor(8) as pool:
        paths |= set(pool.map(lambda _: source_of(server.url, cache).path(*asked), range(8)))
    assert len(paths) == 1
    assert paths.pop().read_bytes() == (corpus / asked[0]).read_bytes()
    assert server.asked(asked[0]) == [None]


def test_threads_download_once(serve: Callable[..., FolderServer], cache: Path, manifest: Manifest) -> None:
    server = serve()
    source, asked = source_of(server.url, cache), tar_of(manifest.shards("train")[0])
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: source.path(*asked), range(8)))) == 1
    assert server.asked(asked[0]) == [None]
    assert len(names(cache)) == 1


def test_after_a_killed_downloader_another_goes_on(
    serve: Callable[..., FolderServer], cache: Path, corpus: Path, manifest: Manifest
) -> None:
    server = serve()
    server.troubles = [Trouble(stall=50_000)]
    asked = tar_of(manifest.shards("train")[0])
    first = Fetcher(server.url, cache, asked)
    first.go()
    wait_until(lambda: any(path.stat().st_size == 50_000 for path in cache.glob("*.partial")))
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(source_of(server.url, cache).path, *asked)
        first.process.send_signal(signal.SIGKILL)
        first.process.communicate()
        assert second.result(60).read_bytes() == (corpus / asked[0]).read_bytes()
    assert server.asked(asked[0]) == [None, "bytes=50000-"]


def test_a_forked_process_fetches_too(serve: Callable[..., FolderServer], cache: Path, manifest: Manifest) -> None:
    server = serve()
    source, (first, second) = source_of(server.url, cache), manifest.shards("train")
    source.path(*tar_of(first))
    child = os.fork()
    if not child:
        os._exit(0 if source.path(*tar_of(second)).exists() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert source.path(*index_of(second)).exists()


def test_pipes(cache: Path, corpus: Path, tmp_path: Path, manifest: Manifest) -> None:
    spaced = tmp_path / "a folder's"
    shutil.copytree(corpus, spaced)
    remote, local = ShardReader(source_of(f'pipe:cat "{spaced}"/{{}}', cache)), ShardReader(corpus)
    assert np.array_equal(remote.tokens(5), local.tokens(5))
    once = f"test -e {tmp_path}/second || {{ touch {tmp_path}/second; head -c 1000 {corpus}/{{}}; exit 3; }}; cat {corpus}/{{}}"
    asked = tar_of(manifest.shards("train")[0])
    path = source_of("pipe:" + once, tmp_path / "other").path(*asked)
    assert path.read_bytes() == (corpus / asked[0]).read_bytes()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo broken pipe >&2; exit 3; {}", r"in 2 attempts \(the command ended with status 3: broken pipe\)"),
        ("printf abc; : {}; sleep 300", r"in 2 attempts \(the command printed nothing for 0\.2 s\)"),
        ("printf abc; : {}", r"in 2 attempts \(it ended after 3 of "),
        ("no_such_command {}", r"cannot be had \(there is no such command"),
        ("yes {}", "is too long"),
        ("cat /data/corpus", r"has no \{\} for the file's name"),
    ],
)
def test_pipes_that_fail(command: str, reason: str, cache: Path, manifest: Manifest) -> None:
    with pytest.raises(DataError, match=reason):
        source_of(f"pipe:{command}", cache, timeout=0.2, attempts=2).path(*tar_of(manifest.shards("train")[0]))


def test_a_stalled_command_is_ended_whole(cache: Path, tmp_path: Path) -> None:
    command = f"pipe:sh -c 'echo $$ > {tmp_path}/pid; sleep 300' {{}} | cat"
    with pytest.raises(DataError, match="printed nothing"):
        source_of(command, cache, timeout=0.5, attempts=1).read("manifest.json")
    process = int((tmp_path / "pid").read_text())
    wait_until(lambda: not Path(f"/proc/{process}").exists() or "Z" in Path(f"/proc/{process}/stat").read_text())


def test_any_protocol_of_fsspec(cache: Path, corpus: Path, manifest: Manifest) -> None:
    import fsspec

    fsspec.filesystem("memory").put(f"{corpus}/", "/corpora/memory/", recursive=True)
    assert np.array_equal(
        ShardReader(source_of("memory://corpora/memory", cache)).tokens(1), ShardReader(corpus).tokens(1)
    )
    assert isinstance(open_source(f"file://{corpus}"), FolderSource)


def test_a_store_that_stalls(cache: Path, corpus: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    monkeypatch.setattr(other, "PIECE", 50_000)
    ended, reads = threading.Event(), []

    class StallingFileSystem(LocalFileSystem):
        protocol = ("stalling",)

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
            reads.append((start, end))
            if len(reads) == 2:
                ended.wait()
            return super().cat_file(path, start=start, end=end, **options)

    fsspec.register_implementation("stalling", StallingFileSystem, clobber=True)
    try:
        asked = tar_of(manifest.shards("train")[0])
        source = source_of(f"stalling://{corpus}", cache, timeout=0.3)
        assert source.path(*asked).read_bytes() == (corpus / asked[0]).read_bytes()
    finally:
        ended.set()
    assert [start for start, _ in reads] == [0, 50_000, 50_000, 100_000]


@pytest.mark.parametrize(
    ("location", "module", "reason"),
    [
        ("http://127.0.0.1:9/corpus", "aiohttp", "pip install 'em-megatron[remote]'"),
        ("s3://bucket/corpus", "s3fs", "pip install 'em-megatron[remote]'"),
        ("gs://bucket/corpus", "gcsfs", "gcsfs"),
        ("nonsense://bucket/corpus", "", "Protocol not known"),
    ],
)
def test_missing_packages(location: str, module: str, reason: str, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "without.py").write_text(
        "import sys\n"
        f"sys.modules[{module!r}] = None\n"
        "from em_megatron.data.sources import *\n"
        f"open_source({location!r}).read('manifest.json')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    result = subprocess.run(
        [sys.executable, str(tmp_path / "without.py")], capture_output=True, text=True, env=environment, timeout=60
    )
    assert "DataError" in result.stderr
    assert reason in result.stderr


def test_secrets_are_not_shown(serve: Callable[..., FolderServer], cache: Path, corpus: Path) -> None:
    server = serve()
    source = source_of(f"http://user:secret@127.0.0.1:{server.port}/?signature=abc", cache)
    assert source.location == server.url
    assert source.read("manifest.json") == (corpus / "manifest.json").read_bytes()
