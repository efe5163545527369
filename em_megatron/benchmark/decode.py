"""`decode`: a token after short and long contexts, which are really read, beside a cache of all keys and values."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from em_megatron.benchmark.decode_megatron import MegatronBackend
from em_megatron.benchmark.floors import token_work
from em_megatron.benchmark.machine import resident_bytes
from em_megatron.benchmark.models import run_config
from em_megatron.benchmark.options import DecodeOptions
from em_megatron.benchmark.results import Chart, Figure, Findings, Row, Rows, Table, Target
from em_megatron.benchmark.timing import Call, Candidate, timed
from em_megatron.config import ConfigError, RunConfig
from em_megatron.model.language_model import PRECISIONS
from em_megatron.model.sizes import padded_vocab_size, shape_of

OURS = "constant memory"
SHORT, LONG = 4096, (262144, 1048576)  # a target is judged where these are the shortest and the longest context
TARGETS = {
    kind: [
        Target(f"{figure}/{SHORT}/{long}", "at most", limit)
        for long in LONG
        for figure, limit in (("token", 1.1), ("resident", 1.01))
    ]
    for kind in ("cpu", "cuda")
}
READINGS = 64  # of the resident memory while the longest context is read


class Generation(Protocol):
    """A model, and what it keeps of the tokens so far."""

    def feed(self, tokens: Tensor) -> Tensor:
        """Tokens [1, n], which are kept → logits [1, n or 1, vocabulary] of all or the last of them."""

    @property
    def num_bytes(self) -> int:
        """Bytes kept."""


class Backend(Protocol):
    """The model class that is measured and the peer that one would pick instead, both of one shape."""

    peer: str  # its name
    notes: list[str]

    def begin(self) -> Generation:
        """Ours, nothing read."""

    def peer_after(self, context: int, tokens: int) -> Generation:
        """The peer with a cache of `context` random keys and values, to go on for so many tokens."""


class DecodeBenchmark:
    """Candidates: the next token of each context; all contexts are whole blocks, so blocks end in the same round.

    Args:
        say: shows how far the reading is.
    """

    def __init__(
        self, options: DecodeOptions, device: torch.device, stack: ExitStack, say: Callable[[str], None]
    ) -> None:
        self.options, self.device, self.say = options, device, say
        self.config = _run_config(options)
        self.dtype = PRECISIONS[options.precision]
        self.vocabulary = padded_vocab_size(options.vocabulary, self.config.model.make_vocab_size_divisible_by)
        self.backend = _backend(options.through, self.config, self.vocabulary, device, stack)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.held: dict[int, dict[str, float]] = {}  # by context: bytes of caches and process, seconds of reading
        self.readings: list[tuple[float, float]] = []  # tokens read, resident bytes

    def candidates(self) -> list[Candidate]:
        contexts = sorted(self.options.contexts)
        return [self._candidate(context, OURS) for context in contexts] + [
            self._candidate(context, self.backend.peer) for context in contexts
        ]

    def _candidate(self, context: int, name: str) -> Candidate:
        options, shape = self.options, shape_of(self.config.model)
        ours = name == OURS
        keys = options.slots + options.block / 2 if ours else float(context)
        return Candidate(
            group=f"context of {context:,} tokens",
            name=name,
            prepare=lambda: self._read_context(context) if ours else self._fill(context),
            tokens=1,
            work=token_work(shape, keys, self.vocabulary, self.dtype.itemsize),
            is_peer=not ours,
            every=1 if ours else options.peer_every,
            single=True,
        )

    def _next_token(self, generation: Generation) -> Call:
        return partial(generation.feed, self.token)

    def _read_context(self, context: int) -> Call:
        """Reads so many random tokens, a block at a time; the longest context also takes the readings of all."""
        options, took = self.options, 0.0
        generation, blocks = self.backend.begin(), context // self.options.block
        longest = context == max(options.contexts)
        every = max(1, blocks // READINGS)
        for block in range(1, blocks + 1):
            tokens = torch.randint(0, options.vocabulary, (1, options.block), generator=self.generator).to(self.device)
            took += timed(partial(generation.feed, tokens), 1, self.device)
            read = block * options.block
            if longest and (block % every == 0 or read in options.contexts):
                self._take_reading(read, generation)
                self.say(f"{read:,} of {context:,} tokens read")
        self.held.setdefault(context, {})["tokens_per_second"] = context / took
        return self._next_token(generation)

    def _take_reading(self, read: int, generation: Generation) -> None:
        resident = resident_bytes()
        self.readings.append((read, resident))
        if read in self.options.contexts:
            held = self.held.setdefault(read, {})
            held["resident_bytes"], held["cache_bytes"] = resident, generation.num_bytes
            if self.device.type == "cuda":
                held["device_bytes"] = torch.cuda.memory_allocated(self.device)

    def _fill(self, context: int) -> Call:
        tokens = 2 + self.options.rounds * self.options.block // self.options.peer_every
        generation = self.backend.peer_after(context, tokens)
        self.held.setdefault(context, {})["peer_bytes"] = generation.num_bytes
        return self._next_token(generation)

    def findings(self, rows: Rows) -> Findings:
        contexts = sorted(self.options.contexts)
        whole = {context: self._means(rows, context) for context in contexts}
        found = Findings(
            figures=[*self._times(rows, whole), *self._memory()],
            tables=[self._table(whole)],
            charts=self._charts(rows, whole),
            data={"contexts": self.held, "readings": self.readings},
            notes=[
                "A row's time is the median token; the means over whole blocks also hold the block's end, where the "
                "state takes the block in and the slots are read anew.",
                "Resident memory is read while the longest context goes by, after unused memory was given back to the "
                "system; 'keys and values' is what the peer's cache holds.",
                *self.backend.notes,
            ],
        )
        return found

    def _means(self, rows: Rows, context: int) -> list[float]:
        """Seconds of a token as the means over whole blocks, to which the row is shortened; empty if not measured."""
        row = rows.find(f"context of {context:,} tokens", OURS)
        if row is None or not row["seconds"]:
            return []
        means = block_means(row["seconds"]["all"], self.options.block)
        row["seconds"]["all"] = means
        row["details"] = {"mean over a block, ms": f"{1e3 * statistics.median(means):,.4g}"}
        return means

    def _times(self, rows: Rows, whole: dict[int, list[float]]) -> list[Figure]:
        first, last, peer = min(whole), max(whole), self.backend.peer
        ratios = [kind(whole[last]) / kind(whole[first]) if whole[last] and whole[first] else None
                  for kind in (statistics.median, min)]  # fmt: skip
        groups = {context: f"context of {context:,} tokens" for context in whole}
        shown = f"{last:,} over {first:,} tokens of context"
        return [
            Figure(f"token/{first}/{last}", f"time of a token, {shown}: mean over whole blocks",
                   ratios[0], best=ratios[1]),
            rows.compared(f"median token/{first}/{last}", f"time of a token, {shown}: median token",
                          (groups[last], OURS), (groups[first], OURS)),
            rows.compared(f"peer/{first}/{last}", f"time of a token, {shown}: {peer}",
                          (groups[last], peer), (groups[first], peer)),
            *(
                rows.compared(f"speed/{context}", f"{groups[context]}: speed over the peer (median token)",
                              (groups[context], peer), (groups[context], OURS))
                for context in whole
            ),
        ]  # fmt: skip

    def _memory(self) -> list[Figure]:
        first, last = min(self.options.contexts), max(self.options.contexts)
        resident = [held["resident_bytes"] for held in self.held.values() if "resident_bytes" in held]
        ratio = max(resident) / min(resident) if len(resident) == len(self.options.contexts) else None
        text = f"resident memory of the process, largest over smallest of the contexts from {first:,} to {last:,}"
        held = self.held.get(last, {})
        saved = held["peer_bytes"] / held["cache_bytes"] if {"peer_bytes", "cache_bytes"} <= set(held) else None
        return [
            Figure(f"resident/{first}/{last}", text, ratio),
            Figure(f"bytes/{last}", f"{last:,} tokens: keys and values over the constant memory, in bytes", saved),
        ]

    def _table(self, whole: dict[int, list[float]]) -> Table:
        names = {
            "resident_bytes": "process, MB",
            "device_bytes": "GPU, MB",
            "cache_bytes": "constant memory, MB",
            "peer_bytes": "keys and values, MB",
        }
        names = {name: title for name, title in names.items() if any(name in held for held in self.held.values())}
        lines = []
        for context in sorted(whole):
            held = self.held.get(context, {})
            sizes = [f"{held[name] / 1e6:,.5g}" if name in held else "" for name in names]
            speed = held.get("tokens_per_second")
            lines.append([f"{context:,}", *sizes, f"{speed:,.0f}" if speed else ""])
        return Table("Memory", ["context", *names.values(), "tokens/s while reading it"], lines)

    def _charts(self, rows: Rows, whole: dict[int, list[float]]) -> list[Chart]:
        peer = self.backend.peer
        times: dict[str, list[tuple[float, float]]] = {OURS: [], peer: []}
        sizes: dict[str, list[tuple[float, float]]] = {OURS: [], peer: []}
        sizes["whole process with constant memory"] = [(read, resident / 1e6) for read, resident in self.readings]
        for context in sorted(whole):
            for name, points in times.items():
                row: Row | None = rows.find(f"context of {context:,} tokens", name)
                if row is not None and row["seconds"]:
                    points.append((context, 1e3 * row["seconds"]["median"]))
            for name, key in ((OURS, "cache_bytes"), (peer, "peer_bytes")):
                if key in self.held.get(context, {}):
                    sizes[name].append((context, self.held[context][key] / 1e6))
        return [
            Chart("time of a token (median)", "tokens of context", "ms", times),
            Chart("memory", "tokens of context", "MB", sizes),
        ]


def block_means(seconds: list[float], block: int) -> list[float]:
    """Means of whole blocks of readings; of all of them where there is no whole one."""
    whole = [seconds[start : start + block] for start in range(0, len(seconds) - block + 1, block)]
    return [statistics.fmean(part) for part in whole or [seconds]]


def _run_config(options: DecodeOptions) -> RunConfig:
    overrides = [
        f"model.num_layers={options.layers}",
        f"model.hidden_size={options.hidden}",
        f"model.num_attention_heads={options.heads}",
        f"model.num_query_groups={options.kv_heads}",
        f"model.kv_channels={options.head_dim}",
        f"model.ffn_hidden_size={options.ffn}",
        f"memory.block_length={options.block}",
        f"memory.slots={options.slots}",
        f"memory.order={options.order}",
    ]
    return run_config(overrides, options.block, options.precision, options.bank_cache, options.seed)


def _backend(through: str, config: RunConfig, vocabulary: int, device: torch.device, stack: ExitStack) -> Backend:
    if through == "megatron":
        return MegatronBackend(config, vocabulary, device, stack)
    try:  # imported here: all else runs without transformers
        from em_megatron.benchmark.decode_transformers import TransformersBackend
    except ModuleNotFoundError as error:
        raise ConfigError(f"--through {through} cannot be measured here: {error}") from None
    return TransformersBackend(config, vocabulary, device)
