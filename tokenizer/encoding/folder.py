"""The output folder of an encoding: begun, gone on with, refused, mended, or finished.

OUTPUT/work/                 while the encoding is unfinished
    job.json                 which inputs and options it is for
    scan/NAME.npz            what was read of some input files
    plan/                    the plan
    shards/NAME.json         a record of every finished shard
    claims/UNIT              which process does what
OUTPUT/inputs.json           of a finished one: the input files and options, so that a second run reads nothing
OUTPUT/encode.lock           held for the moment in which the folder is looked at, cleared or finished
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
from pathlib import Path
from typing import Any

from em_megatron.data.manifest import MANIFEST_NAME, TOKENIZER_NAMES, DataError, Manifest, file_sha256
from em_megatron.data.vocabulary import Vocabulary
from tokenizer.atomic import write_atomically
from tokenizer.corpus import InputFile
from tokenizer.encoding.claims import Claims
from tokenizer.encoding.plan import Plan
from tokenizer.encoding.scan import Stamp
from tokenizer.encoding.shards import RECORD_SUFFIX, is_whole, load_record, save_record

WORK, INPUTS_NAME, JOB_NAME, LOCK = "work", "inputs.json", "job.json", "encode.lock"
FOLDERS = ("scan", "plan", "shards", "claims")
SHARD_PATTERN = re.compile(r"(train|validation)-\d{6}\.(tar|idx)(\..*partial)?")
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
        return self.output / WORK

    @property
    def digest(self) -> str:
        """sha256 by which an unfinished encoding is recognised: the options, and names, sizes and times of the files."""
        return hashlib.sha256(json.dumps([self.options, self.stamps]).encode()).hexdigest()

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


def prepare(job: Job, overwrite: bool) -> bool:
    """True if the folder already holds the wanted corpus; otherwise it is ready for the work, or for more of it.

    Raises DataError if it holds another corpus, or shards of one, and `overwrite` is not set, or if living processes
    write another one.
    """
    job.output.mkdir(parents=True, exist_ok=True)
    with locked(job.output):
        if (job.output / MANIFEST_NAME).exists():
            if not holds(job):
                refuse_unless(overwrite, job, "a corpus")
                clear(job)
            elif not mend(job):
                return True
        elif job.work.exists():
            if job_digest(job) != job.digest:
                refuse_unless(overwrite or not any((job.work / "shards").glob("*")), job, "an unfinished corpus")
                clear(job)
        else:
            clear(job)
        begin(job)
    forget_damaged(job)
    return False


def refuse_unless(allowed: bool, job: Job, what: str) -> None:
    """Raises DataError where what the folder holds must not be removed."""
    claims = job.work / "claims"
    if claims.is_dir() and (owners := Claims(claims).owners()):
        raise DataError(
            f"{len(set(owners.values()))} processes write a corpus of other texts, options or another tokenizer to "
            f"{job.output}; choose another --output, or end them and wait two minutes"
        )
    if not allowed:
        raise DataError(
            f"{job.output} holds {what} made from other texts, options or another tokenizer; "
            "choose another --output, or replace it with --overwrite"
        )


def job_digest(job: Job) -> str | None:
    """Of the job that the folder is unfinished with."""
    try:
        found: str = json.loads((job.work / JOB_NAME).read_bytes())["digest"]
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return None


def begin(job: Job) -> None:
    """Makes the folders of an unfinished encoding; job.json says whose they are. Keeps what is there."""
    for name in FOLDERS:
        (job.work / name).mkdir(parents=True, exist_ok=True)
    content = {"digest": job.digest, "options": job.options}
    write_atomically(job.work / JOB_NAME, json.dumps(content, indent=1).encode())


def clear(job: Job) -> None:
    """Removes another corpus and what was begun of it; the manifest first, so that it is never taken for complete.

    Scans stay: they are good for any job with the same files.
    """
    (job.output / MANIFEST_NAME).unlink(missing_ok=True)
    for name in ("plan", "shards", "claims"):
        shutil.rmtree(job.work / name, ignore_errors=True)
    for path in list(job.output.iterdir()):
        if SHARD_PATTERN.fullmatch(path.name) or path.name in (INPUTS_NAME, *TOKENIZER_NAMES):
            path.unlink()


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


def mend(job: Job) -> bool:
    """Makes a finished corpus an unfinished one that lacks its damaged shards; False where all are whole."""
    manifest = Manifest.load(job.output)
    shards = [shard for split in manifest.splits.values() for shard in split]
    damaged = [shard.name for shard in shards if not is_whole(job.output, shard)]
    if not damaged:
        shutil.rmtree(job.work, ignore_errors=True)  # of a process that was ended when it had written the manifest
        return False
    print(
        f"tokenizer.encode: {', '.join(damaged[:4])}{', ...' if len(damaged) > 4 else ''} missing or truncated in "
        f"{job.output}; encoding again",
        file=sys.stderr,
    )
    begin(job)
    for shard in shards:
        if shard.name not in damaged:
            save_record(job.work / "shards", shard)
    (job.output / MANIFEST_NAME).unlink()
    return True


def forget_damaged(job: Job) -> None:
    """Removes the records of shards that are gone or truncated."""
    records = job.work / "shards"
    for path in list(records.glob(f"*{RECORD_SUFFIX}")):
        try:
            whole = is_whole(job.output, load_record(records, path.name.removesuffix(RECORD_SUFFIX)))
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
    """Writes the manifest of a corpus whose shards are all recorded, and removes the work folder.

    Raises FileNotFoundError where a record is missing after all.
    """
    with locked(job.output):
        if (job.output / MANIFEST_NAME).exists():
            return Manifest.load(job.output)
        splits = {
            split: tuple(load_record(job.work / "shards", shard.name) for shard in plan.shards if shard.split == split)
            for split in dict.fromkeys(shard.split for shard in plan.shards)
        }
        manifest = Manifest(vocabulary.sha256, vocabulary.size, job.dtype, job.source(plan.sha256), splits)
        write_atomically(job.output / vocabulary.file_name, vocabulary.serialized)
        save_inputs(job, plan.sha256, plan.counts)
        manifest.save(job.output)
        remove_work(job)
        return manifest


def remove_work(job: Job) -> None:
    """Removes the work folder in one step, and what killed processes left."""
    aside = job.output / f"{WORK}.{os.uname().nodename}-{os.getpid()}.partial"
    os.rename(job.work, aside)
    for path in list(job.output.iterdir()):
        if path.name.startswith(f"{WORK}.") and path.name.endswith(".partial"):
            shutil.rmtree(path, ignore_errors=True)
        elif SHARD_PATTERN.fullmatch(path.name) and path.name.endswith(".partial"):
            path.unlink(missing_ok=True)
