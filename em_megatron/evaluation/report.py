"""What an evaluation found: evaluation.json, report.md, pictures, and a table for the terminal."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from em_megatron.config import ConfigError
from em_megatron.data.blend import parse_blend
from em_megatron.data.sources import FolderSource, open_source
from em_megatron.evaluation import pictures, tables
from em_megatron.evaluation.options import PARTS
from em_megatron.evaluation.reference_models import reference_bits_per_byte
from em_megatron.evaluation.subject import MegatronSubject, Subject, open_subject
from em_megatron.evaluation.suite import Settings, Suite, read_state, subject_identity
from em_megatron.evaluation.sweep import readers
from em_megatron.model.sizes import Costs, costs, layer_letters, padded_vocab_size
from em_megatron.training.metrics import finite
from em_megatron.training.restore import reader_of
from em_megatron.training.stopping import StopRequest


def evaluate_subject(
    subject: Subject,
    settings: Settings,
    parts: Sequence[str],
    references: bool,
    output: Path | None,
    stop: StopRequest,
    writes: bool,
) -> str:
    """Runs the parts and writes the report; every rank takes part, the one that `writes` gets the table.

    references: also score n-gram models (on this rank). output: folder of the report, by default beside the model.

    Raises:
        Interrupted: it was asked to end; what is finished lies in the folder.
        ConfigError, DataError: a part that cannot be done.
    """
    folder = output or default_folder(subject)
    corpus = _folder(subject) if references else None
    skipped: dict[str, str] = {}
    everything = list(parts) == ["all"]
    if everything:
        parts, skipped = possible(subject)
    evaluator = None
    if settings.evaluator and "long_ppl" in parts:
        world_size = subject.run.layout.world_size if isinstance(subject, MegatronSubject) else 1
        evaluator = open_subject(Path(settings.evaluator), (), world_size, beside=subject)
    stopped = stop.agreed if isinstance(subject, MegatronSubject) else lambda: stop.here
    suite = Suite(subject, settings, folder, evaluator, stopped, writes)
    if everything:
        parts, reasons = suite.possible(parts)
        skipped |= reasons
    found = suite.run(parts)
    if not writes:
        return ""
    if corpus is not None:
        found.setdefault("perplexity", {})["references"] = reference_bits_per_byte(corpus)
    return write_report(subject, found, skipped, folder)


def _folder(subject: Subject) -> Path:
    """Of the subject's corpus. Raises ConfigError where it is a blend, or lies at an address."""
    entries = parse_blend(subject.config.data.path)
    source = open_source(entries[0].location)
    if len(entries) > 1 or not isinstance(source, FolderSource):
        raise ConfigError(
            "reference models are made of one corpus in a folder: give data.path=FOLDER, or leave them out"
        )
    return source.folder


def default_folder(subject: Subject) -> Path:
    """RUN/evaluation of a run, FOLDER/evaluation of a Hugging Face folder."""
    if isinstance(subject, MegatronSubject):
        return subject.path.parent.parent / "evaluation"
    return subject.path / "evaluation"


def possible(subject: Subject) -> tuple[list[str], dict[str, str]]:
    """Parts that the model can do, and why not the others."""
    skipped: dict[str, str] = {}
    memory, config = subject.config.memory, subject.config
    if not readers(memory):
        skipped["sweep"] = f"a memory of kind {memory.kind} has no reader to exchange"
    if memory.kind != "elastic":
        skipped["noise"] = f"a memory of kind {memory.kind} has no coefficients"
    if set(layer_letters(config.model)) != {"*"}:
        skipped["recall"] = "text cannot be generated with layers M or G"
    else:
        try:
            subject.new_text()
        except ConfigError as error:
            skipped["recall"] = str(error)
    return [part for part in PARTS if part not in skipped], skipped


def subject_costs(subject: Subject) -> Costs:
    """Memory floats, parameters, FLOPs."""
    config = subject.config
    vocab = padded_vocab_size(subject.vocabulary.size, config.model.make_vocab_size_divisible_by)
    return costs(config.model, config.memory, vocab, config.data.sequence_length)


def write_report(subject: Subject, found: dict[str, Any], skipped: dict[str, str], folder: Path) -> str:
    """Writes the files; parts of the same model and reader from earlier calls stay in. Returns the terminal's table.

    In evaluation.json the figures of perplexity stand at the top, the other parts by their name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = _earlier(subject, folder) | found
    perplexity = results.get("perplexity", {})
    header = {
        "checkpoint": str(subject.path),
        "step": subject.step,
        "reader": reader_of(subject.config.memory),
        "memory": dataclasses.asdict(subject.config.memory),
        "sequence_length": subject.config.data.sequence_length,
        **dataclasses.asdict(subject_costs(subject)),
    }
    others = {name: results[name] for name in PARTS if name in results and name != "perplexity"}
    document = finite(header | perplexity | others | ({"skipped": skipped} if skipped else {}))
    drawn = pictures.draw(document, folder, subject.config.memory.block_length)
    markdown = tables.markdown(document, drawn)
    (folder / "report.md").write_text(markdown)
    temporary = folder / "evaluation.writing"
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, folder / "evaluation.json")  # last: who sees it may rely on the rest
    return tables.terminal(document) + f"\nreport in {folder}"


def _earlier(subject: Subject, folder: Path) -> dict[str, Any]:
    """Results of whole parts that were done with this model, reader and corpus."""
    same, found = subject_identity(subject), {}
    for path in sorted((folder / "parts").glob("*.json")):
        state = read_state(path) or {}
        identity = {name: state.get("identity", {}).get(name) for name in same}
        if state.get("complete") and identity == json.loads(json.dumps(same)):
            found[path.stem] = state["result"]
    return found
