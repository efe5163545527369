"""Lengths of an encoded corpus' documents, and how well they fill the samples of a run.

    python -m tokenizer.statistics corpus --sequence-length 16384 --block-length 2048 --output statistics

Prints a table and, with --output, writes statistics.json and lengths.png. Only the indexes of the shards are read.
Lengths count stored ids, bos and eos included; bytes per token leaves these two out.

Packing is shown both ways: with a memory that starts anew in each sample (memory.carry_memory off), and with
one that is carried from sample to sample, where the rest of a cut document must follow at the next sample's start.
Documents are packed in their stored order here, in a shuffled one in a run; over many documents that makes little
difference.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from em_megatron.data.index import TOKENS, index_bytes, index_name, open_index
from em_megatron.data.manifest import DataError, Manifest
from em_megatron.data.packing import pack
from em_megatron.data.sources import Source, open_source
from tokenizer.atomic import write_atomically
from tokenizer.length_picture import draw_lengths

QUANTILES = (1, 5, 25, 50, 75, 95, 99)  # percent of the documents
MOST_PACKED = 50_000_000  # documents; more would take gigabytes and minutes
JSON_NAME, PICTURE_NAME = "statistics.json", "lengths.png"


class Lengths:
    """How many documents have each length: exact, for any number of documents.

    values: int64 [different lengths], ascending. counts: of documents, int64 [different lengths].
    """

    def __init__(self) -> None:
        self.values = np.zeros(0, np.int64)
        self.counts = np.zeros(0, np.int64)

    def add(self, lengths: NDArray[np.int64]) -> None:
        values, counts = np.unique(lengths, return_counts=True)
        together = np.concatenate([self.values, values])
        self.values, place = np.unique(together, return_inverse=True)
        self.counts = np.bincount(place, np.concatenate([self.counts, counts])).astype(np.int64)

    @property
    def documents(self) -> int:
        return int(self.counts.sum())

    @property
    def tokens(self) -> int:
        return int(self.values @ self.counts)

    def quantile(self, percent: float) -> int:
        """The smallest length that at least so many percent of the documents do not exceed."""
        rank = max(1, -(-int(percent * self.documents) // 100))
        return int(self.values[np.searchsorted(np.cumsum(self.counts), rank)])

    def share_in_longer(self, length: int) -> float:
        """Share of the tokens that lie in documents of more than so many ids, 0..1."""
        longer = self.values > length
        return int(self.values[longer] @ self.counts[longer]) / self.tokens


def shard_lengths(source: Source, manifest: Manifest, split: str) -> Iterator[NDArray[np.int64]]:
    """Stored ids of each document, shard by shard. Raises DataError for an index that is missing or altered."""
    for shard in manifest.shards(split):
        path = source.path(index_name(shard.name), index_bytes(shard.documents), shard.index_sha256)
        yield np.array(open_index(path, shard)[:, TOKENS])


def split_statistics(
    source: Source, manifest: Manifest, split: str, sequence_length: int | None, block_length: int | None, quiet: bool
) -> tuple[dict[str, Any], Lengths]:
    """What is written of a split, and its lengths. Raises DataError."""
    lengths = Lengths()
    first: list[NDArray[np.int64]] = []
    shards = shard_lengths(source, manifest, split)
    for found in tqdm(shards, desc=split, unit=" shards", total=len(manifest.shards(split)), disable=quiet):
        room = MOST_PACKED - sum(map(len, first)) if block_length else 0
        if room > 0:
            first.append(found[:room])
        lengths.add(found)
    documents, text_bytes = lengths.documents, manifest.text_bytes(split)
    summary: dict[str, Any] = {
        "shards": len(manifest.shards(split)),
        "documents": documents,
        "tokens": lengths.tokens,
        "text_bytes": text_bytes,
        "bytes_per_token": text_bytes / max(1, lengths.tokens - 2 * documents),
        "mean_length": lengths.tokens / documents,
        "length_percentiles": {f"p{percent}": lengths.quantile(percent) for percent in QUANTILES},
        "longest": int(lengths.values[-1]),
    }
    if sequence_length:
        summary["share_of_tokens_in_documents_longer_than_sequence"] = lengths.share_in_longer(sequence_length)
    if sequence_length and block_length:
        summary["packing"] = packing(np.concatenate(first), documents, sequence_length, block_length)
    return summary, lengths


def packing(lengths: NDArray[np.int64], documents: int, sequence_length: int, block_length: int) -> dict[str, Any]:
    """Samples and the share of them that is filled, with a new and with a carried memory.

    lengths: of the first documents, of `documents` in all. Raises DataError for lengths or sizes that do not fit.
    """
    found: dict[str, Any] = {"documents": len(lengths), "of_documents": documents}
    for name, rest_follows in (("new_memory", False), ("carried_memory", True)):
        try:
            index = pack(lengths, np.arange(len(lengths)), sequence_length, block_length, rest_follows)
        except ValueError as error:
            raise DataError(str(error)) from None
        found[name] = {"samples": index.num_samples, "filled": index.efficiency}
    return found


def statistics(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Lengths]]:
    """What is written of a corpus, and the lengths of each split. Raises DataError."""
    sequence_length, block_length = arguments.sequence_length, arguments.block_length
    for option, value in (("--sequence-length", sequence_length), ("--block-length", block_length)):
        if value is not None and value < 1:
            raise DataError(f"{option} {value}: give at least 1")
    if block_length and not sequence_length:
        raise DataError("--block-length says how samples are packed: give their --sequence-length too")
    source = open_source(arguments.corpus, verify=False)
    manifest = Manifest.read(source)
    splits: dict[str, Any] = {}
    lengths: dict[str, Lengths] = {}
    for split in (split for split, shards in manifest.splits.items() if shards):
        splits[split], lengths[split] = split_statistics(
            source, manifest, split, sequence_length, block_length, arguments.quiet
        )
    summary = {
        "corpus": source.location,
        "identity": manifest.identity,
        "vocab_size": manifest.vocab_size,
        "sequence_length": sequence_length,
        "block_length": block_length,
        "splits": splits,
    }
    return summary, lengths


def table(summary: dict[str, Any]) -> str:
    """The statistics for people, a column for each split."""
    splits = summary["splits"]
    rows: list[tuple[str, list[str]]] = [("", list(splits))]

    def add(label: str, values: list[Any], form: str = ",") -> None:
        rows.append((label, [format(value, form) for value in values]))

    for name in ("shards", "documents", "tokens", "text_bytes"):
        add(name.replace("text_bytes", "bytes of text"), [split[name] for split in splits.values()])
    add("bytes per token", [split["bytes_per_token"] for split in splits.values()], ".3f")
    add("mean length (tokens)", [split["mean_length"] for split in splits.values()], ",.1f")
    for percent in QUANTILES:
        add(f"length, {percent} % are at most", [s["length_percentiles"][f"p{percent}"] for s in splits.values()])
    add("longest", [split["longest"] for split in splits.values()])
    sequence_length, block_length = summary["sequence_length"], summary["block_length"]
    if sequence_length:
        share = "share_of_tokens_in_documents_longer_than_sequence"
        add(f"tokens in documents over {sequence_length:,}", [split[share] for split in splits.values()], ".1%")
    if block_length:
        for key, label in (("new_memory", "new memory"), ("carried_memory", "carried memory")):
            found = [split["packing"][key] for split in splits.values()]
            add(f"samples of {sequence_length:,}, {label}", [packed["samples"] for packed in found])
            add("  of which filled", [packed["filled"] for packed in found], ".2%")
    widths = [max(len(row[1][column]) for row in rows) for column in range(len(splits))]
    first = max(len(label) for label, _ in rows)
    return "\n".join(
        "  ".join(
            [label.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))]
        ).rstrip()
        for label, cells in rows
    )


def notes(summary: dict[str, Any]) -> list[str]:
    """A sentence for each split of which only the first documents were packed."""
    packed = {split: found["packing"] for split, found in summary["splits"].items() if "packing" in found}
    return [
        f"{split}: packed were the first {found['documents']:,} of {found['of_documents']:,} documents"
        for split, found in packed.items()
        if found["documents"] < found["of_documents"]
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenizer.statistics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", metavar="CORPUS", help="folder or address of a corpus written by tokenizer.encode")
    parser.add_argument(
        "--sequence-length", type=int, metavar="T", help="tokens of a sample: how many tokens lie in longer documents"
    )
    parser.add_argument(
        "--block-length",
        type=int,
        metavar="L",
        help="tokens of a memory block: how many samples of T there are, how full",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"folder for {JSON_NAME} and {PICTURE_NAME} (default: print only)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        summary, lengths = statistics(arguments)
        if arguments.output:
            write_atomically(arguments.output / JSON_NAME, (json.dumps(summary, indent=1) + "\n").encode())
            marks = {"block": arguments.block_length, "sample": arguments.sequence_length}
            histograms = {split: (found.values, found.counts) for split, found in lengths.items()}
            draw_lengths(histograms, marks, arguments.output / PICTURE_NAME)
    except (DataError, OSError) as error:
        print(f"tokenizer.statistics: {error}", file=sys.stderr)
        return 2
    print("\n".join([table(summary), *notes(summary)]))
    if arguments.output:
        print(f"written: {arguments.output / JSON_NAME}, {arguments.output / PICTURE_NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
