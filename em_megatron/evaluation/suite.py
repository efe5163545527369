"""The parts of an evaluation, each done unit by unit; finished units lie on disk, so a call goes on where the last one ended.

    part  ->  units (name, what to compute)  ->  FOLDER/parts/PART.json  ->  evaluation.json, report.md, PNGs

perplexity   held-out loss, bits per byte, by position
long_ppl     LongPPL, with an evaluator's key tokens
recall       passkey and needles over length and depth
corruption   a block of the text corrupted, its history left alone
sweep        other readers of the same weights: order, slots, sampler, pairs, top_k
noise        how much of white noise and of a smooth signal N coefficients keep
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from em_megatron.config import ConfigError
from em_megatron.data.stream import TokenStream
from em_megatron.evaluation import corruption, long_ppl, noise, recall
from em_megatron.evaluation.options import PARTS
from em_megatron.evaluation.subject import Subject, held_out
from em_megatron.evaluation.sweep import readers
from em_megatron.kinds import kind_of

Unit = tuple[str, Callable[[], Any]]


class Interrupted(Exception):  # noqa: N818  # as KeyboardInterrupt, no error
    """The evaluation was asked to end; what is finished is kept."""


class NotPossible(ConfigError):  # noqa: N818  # what `all` leaves out
    """A part that this model or corpus cannot do with the usual settings."""


@dataclass(frozen=True)
class Settings:
    """What the parts are done with; every number also stands in the report."""

    samples: int = 0  # held-out samples read for perplexity and sweeps, 0: all
    texts: int = 32  # held-out texts of the full length for LongPPL and corruption
    evaluator: str = ""  # run or folder that says which tokens are key; empty: the model itself
    long_ppl: long_ppl.Constants = field(default_factory=long_ppl.Constants)
    tasks: tuple[str, ...] = ("passkey", "single", "multi_key", "multi_value")
    lengths: tuple[int, ...] = ()  # tokens, empty: half a block, then doubled up to the sample
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 10
    digits: int = 0  # of a number; 0: as the task has it
    sweep: tuple[str, ...] = ()  # readers, such as "memory.order=32 memory.slots=8"; empty: the usual ones
    seed: int = 0


@dataclass
class Suite:
    """Parts of one subject. `stopped` is asked by all ranks together, who are told alike."""

    subject: Subject
    settings: Settings
    folder: Path
    evaluator: Subject | None = None
    stopped: Callable[[], bool] = lambda: False
    writes: bool = True  # one rank does

    def run(self, parts: Sequence[str]) -> dict[str, Any]:
        """Results by part. Raises Interrupted; ConfigError for a part that this model cannot do."""
        units = {part: self._units(part) for part in parts}  # all are checked before the first takes its time
        total = sum(map(len, units.values()))
        found = {}
        with tqdm(total=total, desc="evaluate", unit="unit", disable=not self.writes) as bar:
            for part in parts:
                found[part] = self._run(part, units[part], bar)
        return found

    def _run(self, part: str, units: Sequence[Unit], bar: Any) -> Any:
        path = self.folder / "parts" / f"{part}.json"
        identity = self.identity(part)
        state = self._agreed(read_state(path))
        done = state["units"] if state and state.get("identity") == identity else {}
        for name, compute in units:
            bar.set_postfix_str(f"{part} {name}", refresh=False)
            if name not in done:
                if self.stopped():
                    raise Interrupted
                done[name] = compute()
                if self.writes:
                    _write(path, {"identity": identity, "complete": False, "units": done})
            bar.update()
        result = FINISH[part]([done[name] for name, _ in units], self)
        if self.writes:
            _write(path, {"identity": identity, "complete": True, "units": done, "result": result})
        return result

    def _agreed(self, found: Any) -> Any:
        """What the first rank has read, on all ranks."""
        return self.subject.gather(found)[0]

    def identity(self, part: str) -> dict[str, Any]:
        """What a unit's result depends on: checkpoint, reader, corpus, settings."""
        settings = asdict(self.settings)
        kept = {name: settings[name] for name in (*DEPENDS[part], "seed")}
        text = json.dumps(kept, sort_keys=True, default=str)
        return (
            subject_identity(self.subject)
            | {"settings": hashlib.sha256(text.encode()).hexdigest()[:16]}
            | ({"evaluator": str(self.evaluator.path)} if part == "long_ppl" and self.evaluator is not None else {})
        )

    def possible(self, parts: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Those of the parts that can be done with the usual settings, and why not the others."""
        found, reasons = [], {}
        for part in parts:
            try:
                self._units(part)
                found.append(part)
            except NotPossible as error:
                reasons[part] = str(error)
        return found, reasons

    def _units(self, part: str) -> list[Unit]:
        if part not in PARTS:
            raise ConfigError(f"part '{part}' of the suite is unknown: choose from {', '.join(PARTS)}, or all")
        return list(UNITS[part](self))


def subject_identity(subject: Subject) -> dict[str, Any]:
    """Which model with which reader on samples of which corpus and length."""
    memory = dict(asdict(subject.config.memory))
    return {
        "checkpoint": str(subject.path),
        "step": subject.step,
        "memory": memory,
        "data": str(subject.config.data.path),
        "sequence_length": subject.config.data.sequence_length,
    }


def read_state(path: Path) -> dict[str, Any] | None:
    """A part's file, None where there is none or it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps(state, indent=1) + "\n")
    os.replace(temporary, path)


def _full_texts(subject: Subject, stream: TokenStream, count: int) -> list[list[int]]:
    """Ids of evenly spread held-out pieces that fill a whole sample; fewer where there are not so many.

    Raises:
        NotPossible: none is that long.
    """
    found: list[NDArray[np.int32]] = []
    for sample in stream.validation_samples():
        if sample["loss_mask"].all() and int(sample["segment_ids"][-1]) == 1:
            found.append(np.append(sample["tokens"], sample["labels"][-1:]).astype(np.int32))
    if not found:
        raise NotPossible(
            f"no held-out document fills a sample of {subject.config.data.sequence_length} tokens: give a shorter "
            "data.sequence_length, or leave long_ppl and corruption out of the suite"
        )
    wanted = min(count, len(found)) if count else len(found)
    return [found[index * len(found) // wanted].tolist() for index in range(wanted)]


def _perplexity(suite: Suite) -> Iterator[Unit]:
    held_out(suite.subject)
    yield "held-out split", lambda: _whole(suite.subject.perplexity(suite.settings.samples, suite.stopped))


def _whole(found: dict[str, Any] | None) -> dict[str, Any]:
    if found is None:
        raise Interrupted
    return found


def _long_ppl(suite: Suite) -> Iterator[Unit]:
    subject, settings = suite.subject, suite.settings
    judge = suite.evaluator or subject
    if judge.vocabulary.sha256 != subject.vocabulary.sha256:
        raise ConfigError(
            f"the evaluator {judge.path} has another tokenizer: LongPPL needs the same ids of both models"
        )
    texts = _full_texts(subject, held_out(subject), settings.texts)
    constants = long_ppl.fitting(settings.long_ppl, len(texts[0]) - 1)
    for index, ids in enumerate(texts):
        yield f"text {index}", partial(long_ppl.sums, subject.token_losses, judge.token_losses, ids, constants)


def _finish_long_ppl(found: list[Any], suite: Suite) -> Any:
    subject, judge = suite.subject, suite.evaluator or suite.subject
    constants = long_ppl.fitting(suite.settings.long_ppl, subject.config.data.sequence_length)
    named = {"evaluator": str(judge.path), "evaluator_kind": judge.config.memory.kind}
    return named | long_ppl.total(found, constants)


def _recall(suite: Suite) -> Iterator[Unit]:
    subject, settings = suite.subject, suite.settings
    subject.new_text()  # refuses at once
    for name in settings.tasks:
        if name not in recall.TASKS:
            raise ConfigError(f"task '{name}' is unknown: choose from {', '.join(recall.TASKS)}")
        for tokens in _lengths(suite, name):
            for depth in settings.depths:
                yield (
                    f"{name}, {tokens} tokens, depth {100 * depth:g}%",
                    partial(_recall_cell, suite, name, tokens, depth),
                )


def _lengths(suite: Suite, name: str) -> Sequence[int]:
    """Those asked for, or the usual ones in which the task has room.

    Raises:
        ConfigError: one that was asked for is too short.
        NotPossible: all of the usual ones are.
    """
    config, settings = suite.subject.config, suite.settings
    if settings.lengths:
        for tokens in settings.lengths:
            _check_room(suite, name, tokens)
        return settings.lengths
    found = []
    for tokens in recall.default_lengths(config.memory.block_length, config.data.sequence_length):
        try:
            _check_room(suite, name, tokens)
        except ConfigError:
            continue
        found.append(tokens)
    if not found:
        raise NotPossible(
            f"a sample of {config.data.sequence_length} tokens is too short for the task {name}: give --lengths, which may be "
            "longer"
        )
    return found


def _check_room(suite: Suite, name: str, tokens: int) -> None:
    vocabulary, settings, task = suite.subject.vocabulary, suite.settings, recall.TASKS[name]
    for depth in settings.depths:
        for number in range(settings.trials):
            recall.nth_question(vocabulary, task, tokens, depth, settings.digits or task.digits, number, settings.seed)


def _recall_cell(suite: Suite, name: str, tokens: int, depth: float) -> Any:
    subject, settings, task = suite.subject, suite.settings, recall.TASKS[name]
    digits = settings.digits or task.digits
    mine = [
        recall.trial(subject.new_text, subject.vocabulary, task, tokens, depth, digits, number, settings.seed)
        for number in subject.share(range(settings.trials))
    ]
    trials = [trial for part in subject.gather(mine) for trial in part]
    return {"task": name, "digits_asked": digits} | recall.summary(tokens, depth, trials)


def _finish_recall(found: list[Any], suite: Suite) -> Any:
    tasks: dict[str, list[Any]] = {}
    for cell in found:
        tasks.setdefault(cell["task"], []).append(cell)
    return {
        "block_length": suite.subject.config.memory.block_length,
        "tasks": {
            name: {
                "digits": cells[0]["digits_asked"],
                "chance_digits": 0.1,
                "chance_exact": 0.1
                ** (cells[0]["digits_asked"] * (recall.VALUES_TOLD if name == "multi_value" else 1)),
                "cells": [{k: v for k, v in cell.items() if k not in ("task", "digits_asked")} for cell in cells],
            }
            for name, cells in tasks.items()
        },
    }


def _corruption(suite: Suite) -> Iterator[Unit]:
    subject = suite.subject
    texts = _full_texts(subject, held_out(subject), suite.settings.texts)
    length = subject.config.memory.block_length
    candidates = np.flatnonzero(subject.vocabulary.token_bytes > 0).astype(np.int64)
    for share in corruption.SHARES:
        yield (
            f"{share:.0%}",
            partial(corruption.at_share, subject.token_losses, texts, length, candidates, share, suite.settings.seed),
        )


def _finish_corruption(found: list[Any], suite: Suite) -> Any:
    return {"block_length": suite.subject.config.memory.block_length, "shares": corruption.with_rise(found)}


def _sweep(suite: Suite) -> Iterator[Unit]:
    subject = suite.subject
    chosen = suite.settings.sweep or readers(subject.config.memory)
    if not chosen:
        raise ConfigError(f"a memory of kind '{subject.config.memory.kind}' has no reader to exchange: leave sweep out")
    for changes in chosen:
        subject.reader(changes.split())  # refuses at once
        yield changes or "as trained", partial(_read_with, suite, changes)


def _read_with(suite: Suite, changes: str) -> Any:
    subject = suite.subject
    before = subject.config.memory
    subject.use_reader(changes.split())
    try:
        found = _whole(subject.perplexity(suite.settings.samples, suite.stopped))
        memory = subject.config.memory
        return {
            "changes": changes,
            "reader": kind_of(memory).describe(memory),
            "loss": found["loss"],
            "perplexity": found["perplexity"],
            "bits_per_byte": found["bits_per_byte"],
        }
    finally:
        subject.use_reader([])
        assert subject.config.memory == before


def _noise(suite: Suite) -> Iterator[Unit]:
    config = suite.subject.config
    T, N = config.data.sequence_length, config.memory.order
    for tokens in sorted({max(2, T // 8), max(2, T // 4), max(2, T // 2), T}):
        if tokens <= LONGEST_NOISE:
            orders = sorted({N, *(max(1, tokens // part) for part in (2, 4, 8, 16, 32, 64))})
            chosen = [order for order in orders if order <= LARGEST_NOISE_ORDER]
            yield (
                f"{tokens} tokens",
                partial(noise.noise, [tokens], chosen, seed=suite.settings.seed),
            )


LONGEST_NOISE, LARGEST_NOISE_ORDER = 1 << 15, 1 << 12  # a matrix of 1 GiB in fp64


def _finish_noise(found: list[Any], suite: Suite) -> Any:
    return {"order": suite.subject.config.memory.order, "rows": [row for part in found for row in part["rows"]]}


UNITS: dict[str, Callable[[Suite], Iterator[Unit]]] = {
    "perplexity": _perplexity,
    "long_ppl": _long_ppl,
    "recall": _recall,
    "corruption": _corruption,
    "sweep": _sweep,
    "noise": _noise,
}
FINISH: dict[str, Callable[[list[Any], Suite], Any]] = {
    "perplexity": lambda found, suite: found[0],
    "long_ppl": _finish_long_ppl,
    "recall": _finish_recall,
    "corruption": _finish_corruption,
    "sweep": lambda found, suite: {"readers": found},
    "noise": _finish_noise,
}
# Settings that a part's numbers depend on.
DEPENDS = {
    "perplexity": ("samples",),
    "long_ppl": ("texts", "long_ppl"),
    "recall": ("trials", "digits"),
    "corruption": ("texts",),
    "sweep": ("samples",),
    "noise": (),
}
