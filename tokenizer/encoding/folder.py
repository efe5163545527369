"""The output folder of an encoding: begun, gone on with, refused, mended, or finished.

OUTPUT/.encode-DIGEST/       while the encoding of one job is unfinished
    job.json                 which inputs and options it is for
    tokenizer.*              a copy of the tokenizer, from which all processes encode
    scan/NAME.npz            what was read of some input files
    plan/                    the plan
    made/NAME.tar, NAME.idx  finished shards; they move to OUTPUT when all are there
    shards/NAME.json         a record of every finished shard
    claims/UNIT              which process does what
    in-place                 some shards lie in OUTPUT already: it is being finished, or mended
OUTPUT/inputs.json           of a finished one: the input files and options, so that a second run reads nothing
OUTPUT/.encode.lock          held for the moment in which the folder is looked at or finished

A corpus that is replaced stays whole until the new one is. Nothing that tokenizer.encode did not write is removed.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from em_megatron.data.index import index_name
from em_megatron.data.manifest import MANIFEST_NAME, TOKENIZER_NAMES, DataError, Manifest, file_sha256
from em_megatron.data.vocabulary import Vocabulary
from tokenizer.atomic import write_atomically
from tokenizer.corpus import InputFile
from tokenizer.encoding.claims import Claims
from tokenizer.encoding.plan import Plan
from tokenizer.encoding.scan import Stamp
from tokenizer.encoding.shards import RECORD_SUFFIX, is_whole, load_record, save_record

WORK, INPUTS_NAME, JOB_NAME, LOCK, IN_PLACE = ".encode-", "inputs.json", "job.json", ".encode.lock", "in-place"
FOLDERS = ("scan", "plan", "made", "shards", "claims")
SHARD_PATTERN = re.compile(r"(train|validation)-\d{6}\.(tar|idx)")
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """What is to be encoded, and where to. options: all that decides the shards beside the files, as JSON has it."""

    output: Path
    files: tuple[InputFile, ...]
    stamps: tuple[Stamp, ...]
    options: dict[str, Any]
    dtype: str

    @property
    def work(self) -> Path:
        """Of this job alone: processes of another one cannot write to it."""
        return self.output / f"{WORK}{self.digest[:16]}"

    @cached_property
    def digest(self) -> str:
        """sha256 by which an unfinished encoding is recognised: the options, and names and sizes of the files.

        Not their times, which may differ where machines have copies of their own; contents are compared on the way.
        """
        files = [stamp[:2] for stamp in self.stamps]
        return hashlib.sha256(json.dumps([self.options, files]).encode()).hexdigest()

    def source(self, sha256: tuple[str, ...]) -> str:
        """sha256 of what decides the shards: the options, and names and contents of the files."""
        files = [[file.name, digest] for file, digest in zip(self.files, sha256, strict=True)]
        return hashlib.sha256(json.dumps([self.options, files]).encode()).hexdigest()


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """One process at a time."""
    with Claims(output) as claims:
        while not claims.acquire(LOCK):
            time.sleep(POLL_SECONDS)
        yield


def prepare(job: Job, vocabulary: Vocabulary, overwrite: bool) -> bool:
    """True if the folder already holds the wanted corpus; otherwise it is ready for the work, or for more of it.

    Raises DataError if it holds another corpus, finished or not, and `overwrite` is not set, if living processes write
    another one, or if it holds files under the names of a corpus' that are of none.
    """
    job.output.mkdir(parents=True, exist_ok=True)
    with locked(job.output):
        if (job.output / MANIFEST_NAME).exists():
            if not holds(job):
                refuse_unless(overwrite, job, "a corpus")
            elif not mend(job, vocabulary):
                return True
        elif not any((work / IN_PLACE).exists() for work in works(job.output)):
            refuse_strangers(job, vocabulary)
        for work in works(job.output):
            if work != job.work:
                refuse_unless(overwrite or not any((work / "shards").glob("*")), job, "an unfinished corpus", work)
                if (work / IN_PLACE).exists():
                    begin(job, vocabulary)
                    (job.work / IN_PLACE).touch()
                shutil.rmtree(work)
        begin(job, vocabulary)
    forget_damaged(job)
    return False


def works(output: Path) -> list[Path]:
    """The folders of unfinished encodings."""
    found = (path for path in output.glob(f"{WORK}*") if path.suffix != ".partial")
    return sorted(path for path in found if (path / JOB_NAME).is_file())


def refuse_unless(allowed: bool, job: Job, what: str, work: Path | None = None) -> None:
    """Raises DataError where what the folder holds must not be removed. work: of an unfinished encoding."""
    claims = work / "claims" if work else None
    if claims and claims.is_dir() and (owners := Claims(claims).owners()):
        raise DataError(
            f"{len(set(owners.values()))} processes write a corpus of other texts, options or another tokenizer to "
            f"{job.output}; choose another --output, or end them and wait two minutes"
        )
    if not allowed:
        raise DataError(
            f"{job.output} holds {what} made from other texts, options or another tokenizer; "
            "choose another --output, or replace it with --overwrite"
        )


def refuse_strangers(job: Job, vocabulary: Vocabulary) -> None:
    """Raises DataError for files that a corpus would replace, in a folder that holds none."""
    for path in sorted(job.output.iterdir()):
        same = path.name == vocabulary.file_name and path.read_bytes() == vocabulary.serialized
        if SHARD_PATTERN.fullmatch(path.name) or (path.name in (INPUTS_NAME, *TOKENIZER_NAMES) and not same):
            raise DataError(
                f"{job.output} holds {path.name}, which belongs to no corpus there; choose another --output, or move it away"
            )


def begin(job: Job, vocabulary: Vocabulary) -> None:
    """Makes the folders of an unfinished encoding; job.json says whose they are. Keeps what is there."""
    for name in FOLDERS:
        (job.work / name).mkdir(parents=True, exist_ok=True)
    if not (job.work / vocabulary.file_name).exists():
        write_atomically(job.work / vocabulary.file_name, vocabulary.serialized)
    content = {"digest": job.digest, "options": job.options}
    write_atomically(job.work / JOB_NAME, json.dumps(content, indent=1).encode())


def holds(job: Job) -> bool:
    """Whether the finished corpus in the folder is of this job; files of the same size and time are not read."""
    path = job.output / INPUTS_NAME
    try:
        known = json.loads(path.read_bytes())
        inputs = [(Stamp(*fields[:3]), fields[3]) for fields in known["inputs"]]
        if known["options"] != job.options or len(inputs) != len(job.stamps):
            return False
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False
    touched = False
    for file, stamp, (found, sha256) in zip(job.files, job.stamps, inputs, strict=True):
        if stamp[:2] != found[:2]:
            return False
        if stamp != found:
            if file_sha256(file.path) != sha256:
                return False
            touched = True
    if touched:
        save_inputs(job, tuple(sha256 for _, sha256 in inputs), known["left_out"])
    return True


def mend(job: Job, vocabulary: Vocabulary) -> bool:
    """Makes a finished corpus an unfinished one that lacks its damaged shards; False where all are whole."""
    try:
        shards = [shard for split in Manifest.load(job.output).splits.values() for shard in split]
        damaged = [shard.name for shard in shards if not is_whole(job.output, shard)]
    except DataError:
        shards, damaged = [], [MANIFEST_NAME]
    if not damaged:
        shutil.rmtree(job.work, ignore_errors=True)  # of a process that was ended when it had written the manifest
        return False
    print(
        f"tokenizer.encode: {', '.join(damaged[:4])}{', ...' if len(damaged) > 4 else ''} missing or damaged in "
        f"{job.output}; encoding again",
        file=sys.stderr,
    )
    begin(job, vocabulary)
    for shard in shards:
        if shard.name not in damaged:
            save_record(job.work / "shards", shard)
    (job.work / IN_PLACE).touch()
    (job.output / MANIFEST_NAME).unlink()
    return True


def forget_damaged(job: Job) -> None:
    """Removes the records of shards that are gone or truncated."""
    records = job.work / "shards"
    for path in list(records.glob(f"*{RECORD_SUFFIX}")):
        try:
            shard = load_record(records, path.name.removesuffix(RECORD_SUFFIX))
            whole = is_whole(job.work / "made", shard) or (
                (job.work / IN_PLACE).exists() and is_whole(job.output, shard, job.work / "made")
            )
        except (DataError, FileNotFoundError):
            whole = False
        if not whole:
            path.unlink(missing_ok=True)


def save_inputs(job: Job, sha256: tuple[str, ...], left_out: dict[str, int]) -> None:
    """Writes inputs.json. Raises OSError."""
    inputs = [[*stamp, digest] for stamp, digest in zip(job.stamps, sha256, strict=True)]
    content = {"options": job.options, "left_out": left_out, "inputs": inputs}
    write_atomically(job.output / INPUTS_NAME, json.dumps(content, indent=1).encode())


def finish(job: Job, plan: Plan, vocabulary: Vocabulary) -> Manifest:
    """Moves the shards of a corpus, which are all recorded, to their place, writes the manifest, and removes the work folder.

    Raises FileNotFoundError where a record is missing after all.
    """
    with locked(job.output):
        if not job.work.exists():  # another process has finished it
            return Manifest.load(job.output)
        splits = {
            split: tuple(load_record(job.work / "shards", shard.name) for shard in plan.shards if shard.split == split)
            for split in dict.fromkeys(shard.split for shard in plan.shards)
        }
        manifest = Manifest(vocabulary.sha256, vocabulary.size, job.dtype, job.source(plan.sha256), splits)
        replaced = (job.output / MANIFEST_NAME).exists() or (job.work / IN_PLACE).exists()
        (job.work / IN_PLACE).touch()
        (job.output / MANIFEST_NAME).unlink(missing_ok=True)
        move_shards(job, {name for shard in plan.shards for name in (shard.name, index_name(shard.name))}, replaced)
        if replaced:
            for name in TOKENIZER_NAMES:
                (job.output / name).unlink(missing_ok=True)
        write_atomically(job.output / vocabulary.file_name, vocabulary.serialized)
        save_inputs(job, plan.sha256, plan.counts)
        manifest.save(job.output)
        remove_work(job)
        return manifest


def move_shards(job: Job, wanted: set[str], replaced: bool) -> None:
    """Moves finished shards to OUTPUT. replaced: whether shards of another corpus may lie there, which go first."""
    if replaced:
        for path in list(job.output.iterdir()):
            if SHARD_PATTERN.fullmatch(path.name) and path.name not in wanted:
                path.unlink()
    for path in sorted((job.work / "made").iterdir()):
        if path.name in wanted:
            os.replace(path, job.output / path.name)


def remove_work(job: Job) -> None:
    """Removes the work folder in one step, so that no process takes it for one to go on with."""
    aside = job.output / f"{job.work.name}.{os.uname().nodename}-{os.getpid()}.partial"
    os.rename(job.work, aside)
    for path in job.output.glob(f"{WORK}*.partial"):
        shutil.rmtree(path, ignore_errors=True)
