"""`data`: the loader alone, from shards on disk to tensors, beside Megatron-Core's dataset and a plain webdataset pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from em_megatron.benchmark.floors import Work
from em_megatron.benchmark.options import DataOptions
from em_megatron.benchmark.results import Chart, Figure, Findings, Rows, Target
from em_megatron.benchmark.timing import Call, Candidate
from em_megatron.data.loading import load
from em_megatron.data.manifest import Manifest
from em_megatron.data.shards import ShardReader
from em_megatron.data.stream import RankBatches, TokenStream
from em_megatron.data.writing import EncodedDocument, write_shard

GROUP = "batches from encoded shards"
OURS, CARRYING, MEGATRON, WEBDATASET = (
    "em-megatron",
    "em-megatron, memory carried",
    "Megatron-Core GPTDataset",
    "webdataset",
)
RATE, FLAT, SPEED = "million tokens per second", "anonymous memory", "speed"
TARGETS = {kind: [Target(RATE, "at least", 3.0), Target(FLAT, "at most", 1.05)] for kind in ("cpu", "cuda")}

BOS, EOS, PAD, VOCABULARY = 2, 3, 0, 32_000
LOG_MEAN, LOG_DEVIATION = 6.5, 1.2  # of document lengths: half are longer than 665 tokens, one in a hundred than 10,800
SLOTS = 8
TOKENS_PER_CALL = 1 << 21
READINGS = 50  # of the memory
SHOWN = 5  # of them in the picture

# Ids read (2 bytes) and written into tokens and labels (8 each), mask, segments and positions (4 each); then a batch of
# them is read and written once more.
BYTES_PER_TOKEN = 2 + 28 + 2 * 28
PEER_BYTES_PER_TOKEN = 2 + 8 + 2 * 8  # tokens only


def made_documents(tokens: int, seed: int) -> Iterator[NDArray[np.uint16]]:
    """Random documents of log-normal lengths, bos and eos included, of so many tokens together."""
    generator = np.random.default_rng(seed)
    while tokens > 0:
        length = min(int(generator.lognormal(LOG_MEAN, LOG_DEVIATION)) + 3, max(tokens, 3))
        ids = generator.integers(EOS + 1, VOCABULARY, length, dtype=np.uint16)
        ids[0], ids[-1] = BOS, EOS
        tokens -= length
        yield ids


def write_made_corpus(folder: Path, tokens: int, shards: int, seed: int) -> None:
    """A corpus of random documents in equal shards."""
    written = []
    for number in range(shards):
        documents = made_documents(tokens // shards, seed + number)
        encoded = (
            EncodedDocument(f"{number}/{index}", ids.tobytes(), 4 * len(ids)) for index, ids in enumerate(documents)
        )
        written.append(write_shard(folder, f"train-{number:06d}.tar", encoded, "<u2"))
    train = tuple(shard for shard in written if shard is not None)
    Manifest("0" * 64, VOCABULARY, "<u2", "0" * 64, {"train": train}).save(folder)


class DataBenchmark:
    """Candidates: this stream, with and without carried memory, and the peers, on the same documents."""

    dtype = torch.float32

    def __init__(self, options: DataOptions, stack: ExitStack, say: Callable[[str], None]) -> None:
        self.options, self.say = options, say
        self.folder = Path(stack.enter_context(TemporaryDirectory()))
        say("writing the corpus")
        write_made_corpus(self.folder, options.tokens, options.shards, options.seed)
        self.reader = ShardReader(self.folder)
        self.samples = max(1, min(TOKENS_PER_CALL, options.tokens) // options.length)

    def candidates(self) -> list[Candidate]:
        made: dict[str, tuple[Callable[[], Iterator[object]], int]] = {
            OURS: (partial(self._ours, 0), BYTES_PER_TOKEN),
            CARRYING: (partial(self._ours, SLOTS), BYTES_PER_TOKEN),
            MEGATRON: (self._megatron, PEER_BYTES_PER_TOKEN),
            WEBDATASET: (self._webdataset, PEER_BYTES_PER_TOKEN),
        }
        tokens = self.samples * self.options.length
        return [
            Candidate(
                GROUP, name, partial(self._call, batches), tokens, Work(0, each * tokens), is_peer=name == MEGATRON
            )
            for name, (batches, each) in made.items()
        ]

    def _call(self, batches: Callable[[], Iterator[object]]) -> Call:
        made = batches()
        return lambda: sum(1 for _ in islice(made, self.samples))

    def _stream(self, slots: int) -> TokenStream:
        options = self.options
        return TokenStream(
            self.reader, options.length, options.block, options.seed, PAD, slots=slots, shuffle_shards=options.group
        )

    def _ours(self, slots: int) -> Iterator[object]:
        return load(RankBatches(self._stream(slots), 0, 1, 0, 1))

    def _megatron(self) -> Iterator[object]:
        """Its index is built before anything is timed; samples are collated one by one, as ours."""
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        prefix = str(self.folder / "megatron")
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for document in range(len(self.reader)):
            ids = torch.from_numpy(self.reader.tokens(document).astype(np.int32))
            builder.add_document(ids, [len(ids)])
        builder.finalize(f"{prefix}.idx")
        config = GPTDatasetConfig(
            random_seed=self.options.seed,
            sequence_length=self.options.length,
            blend=([prefix], None),
            split="1,0,0",
            path_to_cache=str(self.folder / "cache"),
            reset_position_ids=True,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            tokenizer=SimpleNamespace(eod=EOS, pad=PAD, vocab_size=VOCABULARY, unique_identifiers={}),
        )
        sizes = [1 + 2 * self.options.tokens // self.options.length, None, None]
        dataset = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]
        return (torch.utils.data.default_collate([dataset[n % len(dataset)]]) for n in count())

    def _webdataset(self) -> Iterator[Tensor]:
        """Documents in the order of the shards, joined and cut every T tokens: no order, no resumption, no documents."""
        import webdataset

        urls = [str(self.folder / shard.name) for shard in self.reader.shards]
        held, length = np.empty(0, np.int64), self.options.length
        for sample in webdataset.WebDataset(urls, shardshuffle=False).repeat():
            held = np.concatenate([held, np.frombuffer(sample["tokens.bin"], "<u2").astype(np.int64)])
            while len(held) > length:
                yield torch.from_numpy(np.stack([held[: length + 1]]))
                held = held[length:]

    def findings(self, rows: Rows) -> Findings:
        rate = {kind: rows.seconds(GROUP, OURS, kind) for kind in ("median", "min")}
        tokens = self.samples * self.options.length / 1e6
        readings = self._readings()
        first, last = readings[len(readings) // 10][1], readings[-1][1]
        held = f"{FLAT} after {readings[-1][0]:,.0f} samples over that after {readings[len(readings) // 10][0]:,.0f}"
        figures = [
            Figure(
                RATE,
                f"{RATE}, one process, {self.options.threads} thread",
                tokens / rate["median"] if rate["median"] else None,
                "",
                tokens / rate["min"] if rate["min"] else None,
            ),
            rows.compared(f"{SPEED}/megatron", f"{SPEED} over {MEGATRON}", (GROUP, MEGATRON), (GROUP, OURS)),
            rows.compared(f"{SPEED}/webdataset", f"{SPEED} over {WEBDATASET}", (GROUP, WEBDATASET), (GROUP, OURS)),
            Figure(FLAT, held, last / first),
        ]
        text, packing = self._stream(0).efficiency, self._stream(SLOTS).efficiency
        return Findings(
            figures,
            [
                Chart("Tokens per second on one core", "million tokens/s", "", bars=_rates(rows)),
                Chart("Memory of the process, other candidates' included", "MB", "", bars=_shown(readings)),
            ],
            notes=[
                f"{len(self.reader):,} documents of log-normal length, {self.options.tokens:,} tokens in "
                f"{self.options.shards} shards, read from the page cache; T = {self.options.length}, L = {self.options.block}.",
                f"Of a sample's tokens {100 * text:.2f} % are text ({100 * packing:.2f} % with memory carried); the peers cut "
                "the joined documents anywhere.",
                "The peers give tokens, labels, mask and positions (Megatron-Core), or ids alone (webdataset); ours also the "
                "documents' segments.",
            ],
            data={"memory": readings},
        )

    def _readings(self) -> list[tuple[float, float]]:
        """(samples read, MB of anonymous memory) while `memory_samples` samples go by."""
        batches, found = self._ours(0), []
        every = max(1, self.options.memory_samples // READINGS)
        for read in range(every, self.options.memory_samples + 1, every):
            for _ in islice(batches, every):
                pass
            found.append((float(read), anonymous_megabytes()))
            self.say(f"memory: {read:,} of {self.options.memory_samples:,} samples")
        return found


def anonymous_megabytes() -> float:
    """What this process has allocated and touched; pages of mapped files belong to the system's cache. Linux."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) / 1e3 if found else float("nan")


def _shown(readings: list[tuple[float, float]]) -> dict[str, float]:
    """A few of the readings, by the samples read."""
    return {f"{samples:,.0f} samples": held for samples, held in readings[:: max(1, len(readings) // SHOWN)]}


def _rates(rows: Rows) -> dict[str, float]:
    return {row["name"]: row["tokens_per_second"] / 1e6 for row in rows.group(GROUP) if row["tokens_per_second"]}


def build(options: DataOptions, device: torch.device, stack: ExitStack, say: Callable[[str], None]) -> Any:
    """For the runner; the loader ends before a device begins."""
    return DataBenchmark(options, stack, say)
