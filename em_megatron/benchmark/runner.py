"""Runs a subcommand: ceilings, candidates in turns, ceilings again, and what follows from them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from em_megatron.benchmark import attention, data, decode, layer, memory_operator, step
from em_megatron.benchmark.machine import ceiling_candidates, ceilings_of, describe, pick_device
from em_megatron.benchmark.options import Options, at_default_shapes, resolve
from em_megatron.benchmark.report import Report
from em_megatron.benchmark.results import Findings, Rows, Target, judged, rows_of
from em_megatron.benchmark.timing import Candidate, Measurement, measure

FOLDER = "docs/results/benchmark"
CEILING_ROUNDS = 3


class Benchmark(Protocol):
    """A subcommand: what to time, in which dtype, and what to read off the rows."""

    dtype: torch.dtype

    def candidates(self) -> list[Candidate]:
        """In the order in which they take turns."""

    def findings(self, rows: Rows) -> Findings:
        """Figures, charts and notes; may add `details` to rows."""


Build = Callable[[Any, torch.device, ExitStack, Callable[[str], None]], Benchmark]
BUILD: dict[str, Build] = {
    "memory": lambda options, device, stack, say: memory_operator.MemoryBenchmark(options, device),
    "attention": lambda options, device, stack, say: attention.AttentionBenchmark(options, device),
    "layer": lambda options, device, stack, say: layer.LayerBenchmark(options, device, stack),
    "step": lambda options, device, stack, say: step.StepBenchmark(options, device, stack),
    "decode": decode.DecodeBenchmark,
    "data": data.build,
}
TARGETS: dict[str, dict[str, list[Target]]] = {
    "memory": memory_operator.TARGETS,
    "attention": attention.TARGETS,
    "layer": layer.TARGETS,
    "step": step.TARGETS,
    "decode": decode.TARGETS,
    "data": data.TARGETS,
}


def run(subcommand: str, given: dict[str, Any], arguments: list[str]) -> Report:
    """Measures, and writes the report to its folder.

    Args:
        subcommand: one of `options.SUBCOMMANDS`.
        given: the options given, as text by name.
        arguments: the whole command line after the program, for the report.

    Raises:
        ConfigError: options that cannot be.
    """
    device = pick_device(given.get("device", "auto"))
    options = resolve(subcommand, given, device.type)
    with ExitStack() as stack:
        stack.enter_context(threads_of(options.threads))
        progress = stack.enter_context(Progress(subcommand))
        torch.manual_seed(options.seed)
        benchmark = BUILD[subcommand](options, device, stack, progress.say)
        report = _measured(subcommand, options, device, benchmark, progress, arguments)
    report.write(Path(options.output or default_folder(subcommand, options, device.type)))
    return report


def default_folder(subcommand: str, options: Options, device_type: str) -> str:
    """Where the report goes unless told otherwise."""
    through = getattr(options, "through", "megatron")
    return f"{FOLDER}/{subcommand}{'' if through == 'megatron' else f'-{through}'}-{device_type}"


def _measured(
    subcommand: str,
    options: Options,
    device: torch.device,
    benchmark: Benchmark,
    progress: Progress,
    arguments: list[str],
) -> Report:
    machine = describe(device, benchmark.dtype)
    ceilings = _ceilings(device, benchmark.dtype, progress)
    turns = options.rounds * (options.block if subcommand == "decode" else 1)  # type: ignore[attr-defined]
    found = measure(benchmark.candidates(), device, turns, options.seconds, progress.watch)
    best = ceilings_of(ceilings + _ceilings(device, benchmark.dtype, progress))
    rows = Rows(rows_of(found, best))
    findings = benchmark.findings(rows)
    targets = TARGETS[subcommand].get(device.type, []) if at_default_shapes(options, device.type) else []
    command = shlex.join(["python", "launch/benchmark.py", *arguments])
    return Report(subcommand, command, options, machine, best, rows.rows, findings, judged(targets, findings.figures))


def _ceilings(device: torch.device, dtype: torch.dtype, progress: Progress) -> list[Measurement]:
    return measure(ceiling_candidates(device, dtype), device, CEILING_ROUNDS, 60.0, progress.watch)


@contextmanager
def threads_of(threads: int) -> Iterator[None]:
    """So many CPU threads meanwhile; 0 leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Progress:
    """One line on standard error: how many calls are done, and which is running."""

    def __init__(self, title: str) -> None:
        from tqdm import tqdm

        self.bar: Any = tqdm(desc=title, unit="call", dynamic_ncols=True, mininterval=0.5)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def watch(self, done: int, total: int, candidate: Candidate) -> None:
        """`timing.Watch`."""
        self.bar.total, self.bar.n = total, done
        self.say(f"{candidate.group}: {candidate.name}")

    def say(self, text: str) -> None:
        """What is being done now."""
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(0)
