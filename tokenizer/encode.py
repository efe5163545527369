"""Encodes text files into tokenized webdataset shards with a manifest.

    python -m tokenizer.encode --tokenizer tokenizer.model --input texts --output corpus

A document is stored as bos, its ids, eos. The output holds train-000000.tar, ..., validation-000000.tar, ...,
tokenizer.model and, written last, manifest.json: a folder without it is unfinished, and running the same command
again starts over. The same inputs and options give the same bytes, whatever --workers is. A second run on a finished
folder does nothing; other inputs or another tokenizer need --overwrite. Each input file is read whole into memory.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from hashlib import sha256
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from em_megatron.data.manifest import (
    DTYPES,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    DataError,
    Manifest,
    Shard,
)
from em_megatron.data.shards import ShardReader
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.data.writing import EncodedDocument, write_shard
from tokenizer.corpus import (
    TRAIN,
    VALIDATION,
    FileSummary,
    TextFile,
    add_corpus_arguments,
    find_corpus,
    read_documents,
    separator_of,
    summarize,
    validation_names,
    validation_share,
)
from tokenizer.train import write_atomically

SHARD_PATTERN = re.compile(r"(train|validation)-\d{6}\.(tar|idx)(\..*partial)?")
BYTES_PER_WORKER = 16 << 20  # less text is encoded sooner than another process starts
TASKS_PER_WORKER = 4  # files in flight, so that memory does not grow with the corpus


class EncodeTask(NamedTuple):
    """What a worker needs to encode one file."""

    model_path: Path
    dtype: str
    file: TextFile
    separator: str | None


_vocabularies: dict[Path, Vocabulary] = {}  # one per worker process


def encode_file(task: EncodeTask) -> list[EncodedDocument]:
    """Encodes the non-empty documents of one file."""
    vocabulary = _vocabularies.get(task.model_path)
    if vocabulary is None:
        vocabulary = _vocabularies[task.model_path] = Vocabulary(task.model_path)
    encoded = []
    for document in read_documents(task.file, task.separator)[0]:
        ids = [vocabulary.bos_id, *vocabulary.encode(document.text), vocabulary.eos_id]
        encoded.append(EncodedDocument(document.name, np.array(ids, task.dtype).tobytes(), document.text_bytes))
    return encoded


def end_with_parent() -> None:
    """Ends this worker when the process that spawned it is gone; a pool's idle workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("end_with_parent was called outside a worker process")

    def watch(parent: BaseProcess = parent) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def ordered_map[Task, Result](
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Results in the order of the tasks, computed by spawned processes (in this one if workers is 1)."""
    if workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                pending.append(pool.submit(function, task))
                if len(pending) == workers * TASKS_PER_WORKER:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a worker process was ended from outside (out of memory?); run the command again, with fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


class ShardWriter:
    """Writes the documents of one split to shards of about `shard_tokens` ids each.

    A shard has a temporary name until it is complete. `shards` describes the finished ones, in order.
    """

    def __init__(self, directory: Path, split: str, shard_tokens: int, item_bytes: int) -> None:
        self.shards: list[Shard] = []
        self._directory = directory
        self._split = split
        self._shard_tokens = shard_tokens
        self._item_bytes = item_bytes
        self._documents: list[EncodedDocument] = []
        self._tokens = 0

    def add(self, document: EncodedDocument) -> None:
        tokens = len(document.tokens) // self._item_bytes
        if self._tokens and self._tokens + tokens > self._shard_tokens:
            self.close()
        self._documents.append(document)
        self._tokens += tokens

    def close(self) -> None:
        """Writes what has been gathered as one shard."""
        name = f"{self._split}-{len(self.shards):06d}.tar"
        shard = write_shard(self._directory, name, self._documents, f"<u{self._item_bytes}")
        if shard:
            self.shards.append(shard)
        self._documents, self._tokens = [], 0


def source_digest(summaries: Iterable[FileSummary], arguments: argparse.Namespace, separator: str | None) -> str:
    """sha256 of what decides the shards: names and contents of the files, and the options (not the workers)."""
    settings = [validation_share(arguments), arguments.shard_tokens, separator]
    files = [(summary.name, summary.sha256) for summary in summaries]
    return sha256(json.dumps([settings, files]).encode()).hexdigest()


def prepare_output(directory: Path, wanted: Manifest, overwrite: bool) -> bool:
    """True if the folder already holds the wanted corpus; otherwise makes it ready to be written.

    Raises DataError if it holds another corpus and `overwrite` is not set. The old manifest goes first, so that the
    folder is never taken for complete while its shards change.
    """
    if (directory / MANIFEST_NAME).exists() and not overwrite:
        found = Manifest.load(directory)
        if (found.source, found.tokenizer_sha256) != (wanted.source, wanted.tokenizer_sha256):
            raise DataError(
                f"{directory} holds a corpus made from other texts, options or another tokenizer; "
                "choose another --output, or replace it with --overwrite"
            )
        try:
            for split in found.splits:
                ShardReader(directory, split)
            return True
        except DataError as error:
            print(f"tokenizer.encode: {error}; encoding again", file=sys.stderr)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    for path in directory.iterdir():
        if SHARD_PATTERN.fullmatch(path.name):
            path.unlink()
    return False


def write_shards(
    arguments: argparse.Namespace,
    summaries: list[FileSummary],
    files: list[TextFile],
    separator: str | None,
    dtype: str,
) -> dict[str, tuple[Shard, ...]]:
    """Encodes all documents in parallel and writes them in order; returns the shards of each split."""
    held = validation_names(files, summaries, validation_share(arguments))
    item_bytes = np.dtype(dtype).itemsize
    writers = {
        split: ShardWriter(arguments.output, split, arguments.shard_tokens, item_bytes)
        for split in ((TRAIN, VALIDATION) if held else (TRAIN,))
    }
    tasks = [EncodeTask(arguments.tokenizer, dtype, file, separator) for file in files]
    total = sum(size for summary in summaries for _, size in summary.documents)
    workers = min(arguments.workers, 1 + total // BYTES_PER_WORKER)
    with tqdm(total=total, unit="B", unit_scale=True, desc="encode", disable=arguments.quiet) as progress:
        for documents in ordered_map(encode_file, tasks, workers):
            for document in documents:
                writers[VALIDATION if document.name in held else TRAIN].add(document)
                progress.update(document.text_bytes)
    for writer in writers.values():
        writer.close()
    return {split: tuple(writer.shards) for split, writer in writers.items()}


def encode(arguments: argparse.Namespace) -> tuple[Manifest, bool]:
    """Encodes a corpus; returns its manifest and whether it was already there."""
    if arguments.shard_tokens < 1 or arguments.workers < 1:
        raise DataError(
            f"--shard-tokens {arguments.shard_tokens} and --workers {arguments.workers}: give at least 1 of each"
        )
    vocabulary = Vocabulary(arguments.tokenizer)
    dtype = DTYPES[0] if vocabulary.size <= 1 << 16 else DTYPES[1]
    separator = separator_of(arguments)
    files = find_corpus(arguments)
    summaries = [summarize(file, separator) for file in tqdm(files, desc="read", disable=arguments.quiet)]
    source = source_digest(summaries, arguments, separator)
    wanted = Manifest(vocabulary.sha256, vocabulary.size, dtype, source, {})
    empty = sum(summary.empty for summary in summaries)
    if empty:
        print(f"tokenizer.encode: warning: {empty} empty documents are left out", file=sys.stderr)
    if prepare_output(arguments.output, wanted, arguments.overwrite):
        return Manifest.load(arguments.output), True
    splits = write_shards(arguments, summaries, files, separator, dtype)
    write_atomically(arguments.output / TOKENIZER_NAME, arguments.tokenizer.read_bytes())
    manifest = Manifest(vocabulary.sha256, vocabulary.size, dtype, source, splits)
    manifest.save(arguments.output)
    return manifest, False


def summary_line(manifest: Manifest, split: str) -> str:
    """One line about a split, for people."""
    shards, tokens, text_bytes = manifest.shards(split), manifest.tokens(split), manifest.text_bytes(split)
    documents = sum(shard.documents for shard in shards)
    per_token = text_bytes / (tokens - 2 * documents)
    return (
        f"{split}: {documents} documents, {text_bytes} bytes, {tokens} tokens, {len(shards)} shards, "
        f"{per_token:.3f} bytes per token"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenizer.encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="M.model", help="made by tokenizer.train")
    add_corpus_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the encoded corpus")
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=64 << 20,
        metavar="N",
        help="ids per shard, exceeded only by a document longer than that (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="K",
        help="at most K encoding processes, one for every 16 MiB of text; a file is the unit of work "
        "(default here: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another corpus in the output folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        manifest, reused = encode(arguments)
    except DataError as error:
        print(f"tokenizer.encode: {error}", file=sys.stderr)
        return 2
    if reused:
        print(f"{arguments.output} already holds this corpus; nothing to do")
    for split in manifest.splits:
        print(summary_line(manifest, split))
    return 0


if __name__ == "__main__":
    sys.exit(main())
