"""Corpora in an S3 store: moto's server in a process of its own, reached as any store is, through the environment."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

import s3fs

from em_megatron.data import retry
from em_megatron.data.manifest import DataError, Manifest
from em_megatron.data.shards import ShardReader
from em_megatron.data.sources import Source, SourceOptions, open_source
from tests.data.served import Asked, Fetcher, tar_of, write_small_corpus
from tests.data.servers import Proxy
from tests.data.waiting import wait_until

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a store whose bucket `bucket` is empty."""
    log = tmp_path_factory.mktemp("moto") / "log"
    with open(log, "w") as output:
        command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **CREDENTIALS})
    try:
        wait_until(lambda: "Running on http://127.0.0.1:" in log.read_text() or process.poll() is not None)
        yield int(log.read_text().partition("Running on http://127.0.0.1:")[2].split()[0])
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def corpus(store: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local corpus, whose copy is at s3://bucket/corpora/small."""
    folder = tmp_path_factory.mktemp("corpora") / "corpus"
    write_small_corpus(folder, tokens=100_000)
    client = s3fs.S3FileSystem(
        key="key", secret="secret", endpoint_url=f"http://127.0.0.1:{store}", skip_instance_cache=True
    )
    client.mkdir("bucket")
    client.put(f"{folder}/", "bucket/corpora/small", recursive=True)
    return folder


@pytest.fixture
def tar(corpus: Path) -> Asked:
    return tar_of(Manifest.load(corpus).shards("train")[0])


@pytest.fixture(autouse=True)
def _environment(store: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.005)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    reach(f"http://127.0.0.1:{store}", monkeypatch)


def reach(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    s3fs.S3FileSystem.clear_instance_cache()  # a process keeps the endpoint it began with


def source_of(cache: Path, location: str = "s3://bucket/corpora/small", timeout: float = 20.0) -> Source:
    return open_source(location, SourceOptions(cache, timeout=timeout, attempts=4))


def test_over_s3_as_on_disk(corpus: Path, tmp_path: Path) -> None:
    local, remote = ShardReader(corpus), ShardReader(source_of(tmp_path))
    assert remote.manifest == local.manifest
    remote.prepare(range(2))
    for document in range(len(local)):
        assert np.array_equal(remote.tokens(document), local.tokens(document))


@pytest.mark.parametrize("stall", [False, True])
def test_going_on_after_broken_connections(
    stall: bool,
    store: int,
    corpus: Path,
    tar: Asked,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def arrived(answered: list[int]) -> None:
        wait_until(lambda: sum(p.stat().st_size for p in tmp_path.glob("*.partial")) > sum(answered) - headers)

    headers = 4096
    proxy = Proxy(store, stall)
    proxy.before_end = arrived
    proxy.limits = [300_000, 100_000]
    try:
        reach(proxy.url, monkeypatch)
        path = source_of(tmp_path, timeout=0.5 if stall else 20.0).path(*tar)
        assert path.read_bytes() == (corpus / tar[0]).read_bytes()
    finally:
        proxy.close()
    warnings = [record.getMessage() for record in caplog.records if record.name == retry.__name__]
    assert len(warnings) == 2
    assert all("attempt 1 of 4" in warning for warning in warnings), "both came further than the one before"
    assert proxy.answered[2] < tar[1] - 400_000 + 3 * headers, "the rest alone was fetched at last"


def test_what_is_not_there_or_refused(tar: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no corpus at s3://bucket/none: manifest\.json is missing"):
        ShardReader(source_of(tmp_path, "s3://bucket/none"))
    with pytest.raises(DataError, match=r"shard file train-000000\.tar is missing from s3://none/corpus"):
        source_of(tmp_path, "s3://none/corpus").path(*tar)
    with pytest.raises(DataError, match=r"train-000000\.tar in s3://bucket/corpora/small is truncated"):
        source_of(tmp_path).path(tar[0], tar[1] + 512, tar[2])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"credentials.*AWS_ACCESS_KEY_ID"):
        source_of(tmp_path).path(*tar)


def test_a_store_that_is_down(tar: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        reach(f"http://127.0.0.1:{unheard.getsockname()[1]}", monkeypatch)
        with pytest.raises(DataError, match=r"could not fetch train-000000\.tar from s3://.* in 4 attempts"):
            source_of(tmp_path).path(*tar)


def test_processes_and_threads_download_once(corpus: Path, tar: Asked, tmp_path: Path) -> None:
    fetchers = [Fetcher("s3://bucket/corpora/small", tmp_path, tar) for _ in range(2)]
    for fetcher in fetchers:
        fetcher.go()
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: source_of(tmp_path).path(*tar), range(4)))
    assert paths | {fetcher.path() for fetcher in fetchers} == {tmp_path / f"{tar[2]}.tar"}
    assert [path.name for path in tmp_path.iterdir()] == [f"{tar[2]}.tar"]
