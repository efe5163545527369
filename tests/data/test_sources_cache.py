"""The folder of fetched files and its limit, and notes of which files of a folder were compared."""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from em_megatron.data.manifest import DataError, Manifest
from em_megatron.data.shards import ShardReader
from em_megatron.data.sources import FolderSource, Source, SourceOptions, folder, open_source
from em_megatron.data.sources import cache as cache_module
from em_megatron.data.sources.locks import locked
from tests.data.served import Asked, Fetcher, tar_of, write_small_corpus
from tests.data.servers import FolderServer, Trouble
from tests.data.waiting import wait_until


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpora") / "corpus"
    write_small_corpus(path, shards=4, tokens=2000)
    return path


@pytest.fixture
def tars(corpus: Path) -> list[Asked]:
    return [tar_of(shard) for shard in Manifest.load(corpus).shards("train")]


@pytest.fixture
def server(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FolderServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = FolderServer(corpus)
    yield server
    server.close()


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "FRESH", 0.0)


@pytest.fixture
def limited(server: FolderServer, tmp_path: Path, tars: list[Asked]) -> Callable[[float], Source]:
    """A source whose cache has room for so many tars."""
    size = tars[0][1]
    return lambda count: open_source(server.url, SourceOptions(tmp_path / "cache", cache_bytes=int(count * size)))


@pytest.mark.usefixtures("no_wait")
def test_the_least_recently_used_go(
    limited: Callable[[float], Source], tars: list[Asked], server: FolderServer
) -> None:
    source = limited(2.5)
    first, second = source.path(*tars[0]), source.path(*tars[1])
    source.path(*tars[0])
    third = source.path(*tars[2])
    assert (first.exists(), second.exists(), third.exists()) == (True, False, True)
    source.path(*tars[1])
    assert server.asked(tars[1][0]) == [None, None]
    assert sum(path.stat().st_size for path in first.parent.iterdir()) <= 2.5 * tars[0][1]


@pytest.mark.usefixtures("no_wait")
def test_mapped_files_go_last_and_stay_readable(
    limited: Callable[[float], Source], tars: list[Asked], corpus: Path
) -> None:
    source = limited(2)
    first = source.path(*tars[0])
    mapped = np.memmap(first, np.uint8, "r")
    second = source.path(*tars[1])
    source.path(*tars[2])
    assert (first.exists(), second.exists()) == (True, False)
    other = np.memmap(source.path(*tars[2]), np.uint8, "r")
    source.path(*tars[3])
    assert not first.exists()
    assert mapped.tobytes() == (corpus / tars[0][0]).read_bytes()
    assert other.tobytes() == (corpus / tars[2][0]).read_bytes()


def test_a_reader_through_a_cache_that_holds_one_shard(
    server: FolderServer, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "FRESH", 0.05)
    local = ShardReader(corpus)
    options = SourceOptions(tmp_path / "cache", cache_bytes=local.shards[0].file_bytes + 1000)
    remote = ShardReader(open_source(server.url, options))
    remote.prepare(range(4))
    for document in range(len(local)):
        assert np.array_equal(remote.tokens(document), local.tokens(document))


def test_a_file_just_handed_out_is_not_removed(
    limited: Callable[[float], Source], tars: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "FRESH", 1.0)
    source = limited(1)
    first = source.path(*tars[0])
    start = time.monotonic()
    source.path(*tars[1])
    assert not first.exists()
    assert time.monotonic() - start > 0.5


@pytest.mark.usefixtures("no_wait")
def test_abandoned_beginnings_go_and_running_downloads_stay(
    limited: Callable[[float], Source], tars: list[Asked], server: FolderServer, tmp_path: Path
) -> None:
    server.troubles = [Trouble(stall=1000)]
    fetcher = Fetcher(server.url, tmp_path / "cache", tars[0])
    fetcher.go()
    beginning = tmp_path / "cache" / f"{tars[0][2]}.tar.{tars[0][1]}.partial"
    wait_until(lambda: beginning.exists() and beginning.stat().st_size == 1000)
    source = limited(1.5)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(source.path, *tars[1])
        wait_until(lambda: Path(tmp_path / "cache" / f"{tars[1][2]}.tar.lock").exists())
        assert not waiting.done()
        assert beginning.exists()
        fetcher.process.kill()
        fetcher.process.communicate()
        assert waiting.result(60).exists()
    assert not beginning.exists()


def test_a_file_beyond_the_limit(limited: Callable[[float], Source], tars: list[Asked], server: FolderServer) -> None:
    with pytest.raises(DataError, match=r"does not fit the limit of \d+ bytes .* smaller shards"):
        limited(0.9).path(*tars[0])
    assert server.requests == []


def test_a_full_disk(server: FolderServer, tmp_path: Path, tars: list[Asked]) -> None:
    name, size, sha256 = tars[0]
    (tmp_path / f"{sha256}.tar.{size}.partial").symlink_to("/dev/full")
    source = open_source(server.url, SourceOptions(tmp_path))
    with pytest.raises(DataError, match=rf"{name} from .* cannot be stored in the cache .*{os.strerror(errno.ENOSPC)}"):
        source.path(name, size, sha256)
    assert server.asked(name) == [None], "a full disk is no reason to try again"
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be stored in the cache .*EM_DATA_CACHE"):
        open_source(server.url, SourceOptions(tmp_path / "file")).path(name, size, sha256)


def test_cached_files_that_were_altered(server: FolderServer, tmp_path: Path, tars: list[Asked], corpus: Path) -> None:
    source = open_source(server.url, SourceOptions(tmp_path))
    path = source.path(*tars[0])
    content = (corpus / tars[0][0]).read_bytes()
    os.utime(path)
    assert source.path(*tars[0]) == path
    assert len(server.requests) == 1, "another time alone is compared, not fetched"
    for damaged in (content[:-1], bytes([content[0] ^ 1]) + content[1:]):
        path.write_bytes(damaged)
        assert source.path(*tars[0]).read_bytes() == content
    assert len(server.requests) == 3
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    unverified = open_source(server.url, SourceOptions(tmp_path), verify=False)
    assert unverified.path(*tars[0]).read_bytes() != content
    assert len(server.requests) == 3


def test_locks_pass_from_holder_to_holder(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "x.lock", [0], []

    def count(_: int) -> None:
        with locked(path):
            inside[0] += 1
            most.append(inside[0])
            time.sleep(0)
            inside[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(400)))
    assert set(most) == {1}
    with locked(path) as mine, locked(path, wait=False) as other:
        assert (mine, other) == (True, False)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose content was compared."""
    names: list[str] = []
    compare = folder.file_sha256
    monkeypatch.setattr(folder, "file_sha256", lambda path: names.append(path.name) or compare(path))
    return names


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "YOUNG", 0.0)


@pytest.mark.usefixtures("old")
def test_a_folder_is_compared_once_a_machine(
    corpus: Path, tmp_path: Path, tars: list[Asked], hashed: list[str]
) -> None:
    barrier = threading.Barrier(6)

    def ask(_: int) -> Path:
        source = FolderSource(corpus, SourceOptions(tmp_path))
        barrier.wait()
        return source.path(*tars[0])

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(ask, range(6))) == {corpus / tars[0][0]}
    assert hashed == [tars[0][0]]
    (corpus.parent / "linked").symlink_to(corpus)
    FolderSource(corpus.parent / "linked", SourceOptions(tmp_path)).path(*tars[0])
    FolderSource(corpus, SourceOptions(tmp_path, verify=False)).path(*tars[1])
    assert len(hashed) == 1
    assert len(list((tmp_path / "verified").iterdir())) == 1


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("keep_times", [False, True])
@pytest.mark.parametrize("replace", [False, True])
def test_a_note_hides_no_change(keep_times: bool, replace: bool, tmp_path: Path, hashed: list[str]) -> None:
    asked = tar_of(write_small_corpus(tmp_path / "corpus", shards=1, tokens=100).shards("train")[0])
    source = FolderSource(tmp_path / "corpus", SourceOptions(tmp_path / "cache"))
    path = source.path(*asked)
    source.path(*asked)
    assert len(hashed) == 1
    before, content = path.stat(), bytearray(path.read_bytes())
    content[700] ^= 1
    target = path.with_suffix(".new") if replace else path
    target.write_bytes(content)
    if replace:
        target.rename(path)
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=r"shard file train-000000\.tar in .* was altered"):
        source.path(*asked)
    with pytest.raises(DataError, match="was altered"):
        source.path(*asked)
    assert len(hashed) == 3


def test_young_files_are_not_noted(tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tar_of(write_small_corpus(tmp_path / "corpus", shards=1, tokens=100).shards("train")[0])
    source = FolderSource(tmp_path / "corpus", SourceOptions(tmp_path / "cache"))
    os.utime(
        tmp_path / "corpus" / asked[0], ns=(0, 0)
    )  # anyone can write an old time, but not as the time of the change
    for young, count in ((3600.0, 1), (3600.0, 2), (0.0, 3), (0.0, 3)):
        monkeypatch.setattr(folder, "YOUNG", young)
        source.path(*asked)
        assert len(hashed) == count


@pytest.mark.usefixtures("old")
def test_without_a_cache_folder_there_are_no_notes(
    corpus: Path, tmp_path: Path, tars: list[Asked], hashed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    source = FolderSource(corpus, SourceOptions(tmp_path / "file" / "cache"))
    for _ in range(2):
        source.path(*tars[0])
    assert len(hashed) == 2
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "every process compares them itself" in warnings[0].getMessage()


def test_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EM_DATA_CACHE", str(tmp_path))
    assert SourceOptions().cache_path == tmp_path
    monkeypatch.delenv("EM_DATA_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert SourceOptions().cache_path == Path("/home/someone/.cache/em_megatron/shards")
    for name, value in {"cache_bytes": -1, "timeout": 0.0, "attempts": 0}.items():
        with pytest.raises(DataError, match=rf"{name} of the data source is {value}; give at least"):
            SourceOptions(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="is empty"):
        open_source("")
