"""Encodes texts into tokenized webdataset shards with a manifest.

    python -m tokenizer.encode --tokenizer tokenizer.model --input texts --output corpus

Inputs are .txt, .parquet and .jsonl files, .jsonl.gz, .jsonl.zst, .json.gz and .json.zst among them. A document is stored as bos, its ids, eos. The
output holds train-000000.tar, ..., validation-000000.tar, ..., an index (.idx) beside each, the tokenizer,
inputs.json and, written last, manifest.json: a folder without it is unfinished.

Any number of processes: the same command may run many times at once, on any machines that see the folder, from the
start or later; they share the work without a coordinator, take over from those that die, and end when all is done. The
shards are the same bytes whatever the number of processes and --workers, and whatever was killed and started again.

The work has three parts. All inputs are read once to find their documents (a file is the unit; small ones go
together). One process plans the shards, in 35 bytes of memory a document (43 with --deduplicate text). Each shard is
encoded from where its first document lies; what comes before it in a .gz or .zst file is decompressed again, so give
files of some GB at most. Documents are left out by their bytes (--min-bytes, --max-bytes; tokens are not known yet),
as repeated (--deduplicate), as empty, or as no Unicode, and counted. Memory holds a document and its ids for each
worker.

Running the same command again goes on: inputs that were read and shards that are finished are kept. On a finished
folder it does nothing, and reads only files whose time has changed. Other inputs, options or another tokenizer are
refused as soon as a shard is there, unless --overwrite is given; a finished corpus then stays until the new one is whole.
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from em_megatron.data.manifest import DTYPES, DataError, Manifest
from em_megatron.data.vocabulary import Vocabulary
from tokenizer.corpus import add_corpus_arguments, find_corpus, layout_of, selection_of
from tokenizer.encoding.claims import Claims
from tokenizer.encoding.folder import Job, prepare
from tokenizer.encoding.phases import Request, make_corpus
from tokenizer.encoding.scan import stamp_of

BYTES_PER_WORKER = 16 << 20  # less text is encoded sooner than another process starts


def request_of(arguments: argparse.Namespace) -> Request:
    """What the arguments ask for. Raises DataError for options out of range, inputs or a tokenizer that are not there."""
    if arguments.shard_bytes < 1 or arguments.workers < 1:
        raise DataError(
            f"--shard-bytes {arguments.shard_bytes} and --workers {arguments.workers}: give at least 1 of each"
        )
    layout, selection = layout_of(arguments), selection_of(arguments)
    vocabulary = Vocabulary(arguments.tokenizer)
    files = tuple(find_corpus(arguments))
    stamps = tuple(stamp_of(file) for file in files)
    options = {
        "tokenizer_sha256": vocabulary.sha256,
        "layout": layout._asdict(),
        "selection": selection._asdict(),
        "shard_bytes": arguments.shard_bytes,
    }
    job = Job(
        arguments.output,
        files,
        stamps,
        json.loads(json.dumps(options)),
        DTYPES[0] if vocabulary.size <= 1 << 16 else DTYPES[1],
    )
    workers = min(arguments.workers, 1 + sum(stamp.size for stamp in stamps) // BYTES_PER_WORKER)
    return Request(job, vocabulary, layout, selection, arguments.shard_bytes, workers, arguments.quiet)


def encode(arguments: argparse.Namespace) -> Manifest:
    """Encodes a corpus, or this command's share of it, and waits for the rest.

    Raises DataError for what is refused, cannot be read or cannot be written.
    """
    request = request_of(arguments)
    if prepare(request.job, request.vocabulary, arguments.overwrite):
        print(f"{arguments.output} already holds this corpus; nothing to do")
        return Manifest.load(arguments.output)
    with Claims(request.job.work / "claims") as claims, ended_by_signals(claims):
        return make_corpus(request, claims)


@contextmanager
def ended_by_signals(claims: Claims) -> Iterator[None]:
    """A signal that ends the command gives its claims up at once, so that others need not wait; workers end with it."""

    def end(number: int, _frame: object) -> None:
        claims.abandon()
        print("tokenizer.encode: ended by a signal; run the same command again to go on", file=sys.stderr, flush=True)
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="PATH", help="made by tokenizer.train, or a Hugging Face one"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the encoded corpus")
    add_corpus_arguments(parser)
    parser.add_argument(
        "--shard-bytes",
        type=int,
        default=256 << 20,
        metavar="N",
        help="UTF-8 bytes of text per shard, exceeded only by a document longer than that (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="K",
        help="at most K processes of this command, one for every 16 MiB of input files; a shard is the unit of work "
        "(default here: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another corpus in the output folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        manifest = encode(arguments)
    except DataError as error:
        print(f"tokenizer.encode: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        print(
            f"tokenizer.encode: cannot read or write{place} ({error.strerror or error}); mend that, and run the same "
            "command again to go on",
            file=sys.stderr,
        )
        return 2
    for split in manifest.splits:
        print(summary_line(manifest, split))
    return 0


if __name__ == "__main__":
    sys.exit(main())
