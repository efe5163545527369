"""Small corpora for the tests of sources, and programs that fetch their files."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from em_megatron.data.index import index_bytes, index_name
from em_megatron.data.manifest import Manifest, Shard
from em_megatron.data.writing import EncodedDocument, write_shard

Asked = tuple[str, int, str]  # name, size and sha256 of a file

FETCH = """
import sys
from pathlib import Path
from em_megatron.data import retry
from em_megatron.data.sources import SourceOptions, open_source
retry.FIRST_WAIT = 0.02
location, cache, name, size, sha256 = sys.argv[1:]
source = open_source(location, SourceOptions(cache_path=Path(cache), timeout=30))
print("ready", flush=True)
sys.stdin.readline()
print(source.path(name, int(size), sha256), flush=True)
"""


def write_small_corpus(folder: Path, shards: int = 2, tokens: int = 20_000, seed: int = 0) -> Manifest:
    """Shards of three documents with `tokens` ids each, chosen by chance."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    written = []
    for number in range(shards):
        ids = [random.integers(4, 60_000, tokens, dtype="<u2").tobytes() for _ in range(3)]
        documents = [EncodedDocument(f"{number}/{d}", content, 2 * tokens) for d, content in enumerate(ids)]
        shard = write_shard(folder, f"train-{number:06d}.tar", documents, "<u2")
        assert shard is not None
        written.append(shard)
    manifest = Manifest("t" * 64, 60_000, "<u2", "s" * 64, {"train": tuple(written)})
    manifest.save(folder)
    return manifest


def tar_of(shard: Shard) -> Asked:
    """What `Source.path` is asked for to have a shard's tar."""
    return shard.name, shard.file_bytes, shard.sha256


def index_of(shard: Shard) -> Asked:
    """What `Source.path` is asked for to have a shard's index."""
    return index_name(shard.name), index_bytes(shard.documents), shard.index_sha256


class Fetcher:
    """A process that fetches a file once it is told to `go`, and prints where it is."""

    def __init__(self, location: str, cache: Path, asked: Asked) -> None:
        command = [sys.executable, "-c", FETCH, location, str(cache), *map(str, asked)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def path(self) -> Path:
        output, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return Path(output.strip())
