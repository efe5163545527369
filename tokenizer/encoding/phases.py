"""The way of an encoding: scan the inputs, plan the shards, encode them, finish; shared with any other processes."""

import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from em_megatron.data.manifest import DataError, Manifest
from em_megatron.data.vocabulary import Vocabulary
from tokenizer.corpus import InputFile, Selection
from tokenizer.encoding.claims import Claims
from tokenizer.encoding.folder import Job, finish, holds
from tokenizer.encoding.plan import Plan, ShardPlan, load_plan, make_plan, save_plan
from tokenizer.encoding.processes import Board, Workers, work_off
from tokenizer.encoding.scan import groups_of, save_scan, scan_files, scan_name, stamp_of
from tokenizer.encoding.shards import RECORD_SUFFIX, Part, ShardTask, encode_shard
from tokenizer.encoding.split import left_out_lines
from tokenizer.readers.files import Layout

SCAN_SUFFIX = ".npz"
WAIT_SECONDS = 1.0  # between two looks at what other processes do
PLAN_UNIT = "plan"


@dataclass(frozen=True)
class Request:
    """What one command was asked for: the job, and how it does its share."""

    job: Job
    vocabulary: Vocabulary
    layout: Layout
    selection: Selection
    shard_bytes: int
    workers: int
    quiet: bool


class ScanTask(NamedTuple):
    """What a worker needs to read some input files."""

    path: Path
    files: tuple[InputFile, ...]
    layout: Layout


def scan(task: ScanTask) -> None:
    """Reads some input files and keeps what was found. Raises what `scan_files` raises."""
    save_scan(task.path, scan_files(task.files, task.layout))


def make_corpus(request: Request, claims: Claims) -> Manifest:
    """Does what is left and nobody else does, waits for the others and takes over from those that die; the manifest.

    Raises DataError for what cannot be read, encoded or written.
    """
    job = request.job
    try:
        with Workers(request.workers) as workers:
            plan = load_plan(job.work / "plan") or agree_on_plan(request, claims, scan_inputs(request, claims, workers))
            for line in left_out_lines(plan.counts):
                print(f"tokenizer.encode: warning: {line}", file=sys.stderr)
            encode_shards(request, claims, workers, plan)
        return finish(job, plan, request.vocabulary)
    except FileNotFoundError:
        if job.work.exists():
            raise
        if not holds(job):
            raise DataError(f"{job.output} was given to another corpus meanwhile; choose another --output") from None
        return Manifest.load(job.output)  # another process has finished it


@contextmanager
def bar(workers: Workers, title: str, total: int, done: int, quiet: bool) -> Iterator[None]:
    """A progress bar in bytes for what the workers do in the block."""
    with tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=title, disable=quiet) as progress:
        workers.progress = progress.update
        yield


def scan_inputs(request: Request, claims: Claims, workers: Workers) -> list[Path]:
    """Reads the inputs that nobody has read or reads; waits for the others. Returns all scans, in order."""
    job, folder = request.job, request.job.work / "scan"
    groups = {scan_name(request.layout, job.stamps[g.start : g.stop]): g for g in groups_of(job.stamps)}
    board = Board(tuple(groups), folder, SCAN_SUFFIX)

    def task_of(name: str) -> ScanTask:
        group = groups[name]
        for file, stamp in zip(job.files[group.start : group.stop], job.stamps[group.start : group.stop], strict=True):
            if stamp_of(file) != stamp:
                raise DataError(f"{file.path} was changed; run the command again")
        return ScanTask(folder / (name + SCAN_SUFFIX), job.files[group.start : group.stop], request.layout)

    sizes = {name: sum(job.stamps[number].size for number in group) for name, group in groups.items()}
    done = sum(sizes.values()) - sum(sizes[name] for name in board.left())
    with bar(workers, "read", sum(sizes.values()), done, request.quiet):
        told = False
        while left := work_off(board, claims, workers, scan, task_of):
            if not told:
                print(
                    f"tokenizer.encode: waiting for other processes that read {len(left)} of {len(groups)} parts of the "
                    "inputs",
                    file=sys.stderr,
                )
                told = True
            time.sleep(WAIT_SECONDS)
    return [folder / (name + SCAN_SUFFIX) for name in groups]


def agree_on_plan(request: Request, claims: Claims, scans: list[Path]) -> Plan:
    """The plan, made by this process or another one."""
    job, folder = request.job, request.job.work / "plan"
    while (plan := load_plan(folder)) is None:
        if claims.acquire(PLAN_UNIT):
            if load_plan(folder) is None:
                groups = list(groups_of(job.stamps))
                held_out = [file.held_out for file in job.files]
                made = make_plan(job.stamps, held_out, scans, groups, request.selection, request.shard_bytes)
                save_plan(folder, *made)
            claims.release(PLAN_UNIT)
        else:
            time.sleep(WAIT_SECONDS)
    return plan


def encode_shards(request: Request, claims: Claims, workers: Workers, plan: Plan) -> None:
    """Encodes the shards that nobody has encoded or encodes, and waits until all are there."""
    job = request.job
    shards = {shard.name: shard for shard in plan.shards}
    board = Board(tuple(shards), job.work / "shards", RECORD_SUFFIX)
    done = plan.text_bytes - sum(shards[name].text_bytes for name in board.left())
    told = False
    with bar(workers, "encode", plan.text_bytes, done, request.quiet):
        while left := work_off(
            board, claims, workers, encode_shard, lambda name: shard_task(request, plan, shards[name])
        ):
            if not told and (owners := claims.owners()):
                print(
                    f"tokenizer.encode: waiting for {len(set(owners.values()))} other processes that encode {len(left)} of "
                    f"{len(shards)} shards",
                    file=sys.stderr,
                )
                told = True
            time.sleep(WAIT_SECONDS)


def shard_task(request: Request, plan: Plan, shard: ShardPlan) -> ShardTask:
    """What a worker needs to encode a shard."""
    job, firsts = request.job, plan.first_documents
    first_file = bisect_right(firsts, shard.first) - 1
    parts = []
    for number in range(first_file, len(job.files)):
        if firsts[number] >= shard.stop:
            break
        file = job.files[number], plan.stamps[number], plan.sha256[number]
        parts.append(Part(*file, firsts[number], firsts[number + 1]))
    made, planned, records = (job.work / name for name in ("made", "plan", "shards"))
    tokenizer = job.work / request.vocabulary.file_name
    return ShardTask(made, planned, records, tokenizer, job.dtype, request.layout, shard, tuple(parts))
