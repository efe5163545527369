"""200 MB of real text, the Python sources of the packages installed here, encoded and streamed twice.

    pytest -m slow tests/tokenizer/test_load.py -s

prints sizes, rates, and how full samples are.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import site
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from em_megatron.data.loading import ahead, load
from em_megatron.data.manifest import Manifest
from em_megatron.data.shards import ShardReader
from em_megatron.data.stream import RankBatches, TokenStream

WANTED = 210_000_000  # bytes of text
T, L, SEED = 8192, 1024, 7
SHARD_BYTES = 16 << 20
Row = dict[str, str]


def sources() -> Iterator[Row]:
    """The Python files of the installed packages, by path, until there is text enough."""
    total = 0
    root = Path(site.getsitepackages()[0])
    for path in sorted(root.rglob("*.py")):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield {"id": path.relative_to(root).as_posix(), "text": text}
            total += len(text.encode())
        if total >= WANTED:
            return
    pytest.skip(f"only {total / 1e6:.0f} MB of sources are installed here")


def write_inputs(folder: Path) -> int:
    """The same documents in every format, a quarter in each; gives the bytes of their text."""
    rows = list(sources())
    parts = [rows[index::4] for index in range(4)]
    lines = ["".join(json.dumps(row) + "\n" for row in part).encode() for part in parts]
    (folder / "a.jsonl").write_bytes(lines[0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[1], 1))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines[2], 1))
    columns = {name: [row[name] for row in parts[3]] for name in ("id", "text")}
    parquet.write_table(pyarrow.table(columns), folder / "d.parquet", row_group_size=500)
    return sum(len(row["text"].encode()) for row in rows)


def command(*arguments: object) -> float:
    """Runs a module; gives the seconds it took."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True, timeout=1000)
    return time.monotonic() - started


def fingerprint(corpus: Path, samples: int, workers: int, ranks: int) -> str:
    """sha256 over the tokens of the first samples of the run, in their order."""
    streams = [TokenStream(ShardReader(corpus), T, L, SEED, pad_id=0, shuffle_shards=3) for _ in range(ranks)]
    loaders = [ahead(load(RankBatches(stream, 0, 4, rank, ranks), workers), 4) for rank, stream in enumerate(streams)]
    digest = hashlib.sha256()
    for _ in range(samples // (4 * ranks)):
        for loader in loaders:
            for batch, _ in islice(loader, 1):
                digest.update(batch["tokens"].numpy().tobytes())
    for loader in loaders:
        loader.close()
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_200_megabytes_are_encoded_and_streamed_twice_alike(tmp_path: Path) -> None:
    inputs, corpus = tmp_path / "inputs", tmp_path / "corpus"
    inputs.mkdir()
    text = write_inputs(inputs)
    assert text >= 200e6
    model = tmp_path / "tokenizer.model"
    common = ("--input", inputs, "--validation-fraction", "0.01")
    trained = command("tokenizer.train", *common, "--output", model, "--vocab-size", 16_000)
    options = ("--tokenizer", model, "--output", corpus, "--workers", 2, "--shard-bytes", SHARD_BYTES)
    encoded = command("tokenizer.encode", *common, *options, "--quiet")
    verified = command("tokenizer.verify", corpus, "--workers", 2)
    for length, block in ((1024, 128), (T, L), (32768, 2048), (32768, 512)):
        print(f"T = {length}, L = {block}", flush=True)
        command("tokenizer.statistics", corpus, "--sequence-length", length, "--block-length", block, "--quiet")

    manifest = Manifest.load(corpus)
    kept = manifest.text_bytes("train") + manifest.text_bytes("validation")
    stream = TokenStream(ShardReader(corpus), T, L, SEED, pad_id=0, shuffle_shards=3)
    samples = stream.num_samples() // 8 * 8
    started = time.monotonic()
    once = fingerprint(corpus, samples, workers=0, ranks=1)
    streamed = time.monotonic() - started
    assert fingerprint(corpus, samples, workers=2, ranks=2) == once
    print(
        f"{text / 1e6:.1f} MB of text, {kept / 1e6:.1f} MB kept in {len(manifest.shards('train'))} shards, "
        f"{manifest.tokens('train'):,} tokens; tokenizer {trained:.0f} s, encoded in {encoded:.0f} s "
        f"({text / 1e6 / encoded:.1f} MB/s by 2 processes), verified in {verified:.0f} s; an epoch of {samples:,} samples "
        f"streamed in {streamed:.1f} s ({samples * T / streamed / 1e6:.1f} million tokens/s), twice alike: {once[:16]}"
    )
