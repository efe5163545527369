"""The files around a checkpoint's tensors: one process's work, safe against a kill at any moment."""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MARKER = "COMPLETE"
_HASHED_BYTES = 1 << 20
_STEP = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"\.(step_\d{8,})\.(writing|replaced|deleting)")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or loaded; the message says why and what to do."""


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def writing_name(step: int) -> str:
    return f".{step_name(step)}.writing"


def finish(folder: Path, step: int, texts: dict[str, str], facts: dict[str, Any], sums: dict[str, str]) -> None:
    """Write the text files and then the marker, which lists every file of `folder` and carries `facts`.

    `sums` are the checksums of the tensors' files, as their writers took them.
    """
    for name, text in texts.items():
        _write(folder / name, text)
    for path in folder.iterdir():
        _sync(path)
    files = {path.name: _describe(path, sums) for path in sorted(folder.iterdir())}
    _write(folder / MARKER, json.dumps({"step": step, **facts, "files": files}, indent=1))
    _sync(folder)


def replace_step(root: Path, writing: Path, step: int) -> Path:
    """Give the finished folder its final name, in place of an older one of the same step; returns it."""
    final, aside = root / step_name(step), root / f".{step_name(step)}.replaced"
    if final.exists():
        final.rename(aside)
    writing.rename(final)
    _sync(root)
    shutil.rmtree(aside, ignore_errors=True)
    return final


def retain(root: Path, newest: int, keep_last: int, keep_every: int = 0) -> None:
    """Keep the checkpoint of step `newest`, just written, and the `keep_last` - 1 before it; delete older whole ones, but
    for those of a step that `keep_every` divides.

    Later steps, which the run that wrote `newest` did not go on from, do not count. A half-deleted one never has a valid
    name.
    """
    for step in [step for step in complete_steps(root) if step <= newest][:-keep_last]:
        if keep_every and step % keep_every == 0:
            continue
        doomed = root / f".{step_name(step)}.deleting"
        (root / step_name(step)).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clean_leftovers(root: Path, keep: str = "") -> None:
    """Remove what a killed save left, after giving back a checkpoint that was about to be replaced.

    The folder named `keep` is left alone: it is being written.
    """
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        found = _LEFTOVER.fullmatch(path.name)
        if not found or path.name == keep:
            continue
        final = root / found[1]
        if found[2] == "replaced" and not final.exists():
            path.rename(final)
        else:
            shutil.rmtree(path)


def complete_steps(root: Path) -> list[int]:
    """Steps of the whole checkpoints in `root`, oldest first; warns of damaged ones."""
    steps = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        found = _STEP.fullmatch(path.name)
        if not found:
            continue
        if reason := damage(path):
            logger.warning("Checkpoint %s is passed over: %s.", path, reason)
        else:
            steps.append(int(found[1]))
    return sorted(steps)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder itself, or the newest complete one of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    path = path.expanduser().resolve()
    if (path / "COMPLETE").is_file():
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = complete_steps(root) if root.is_dir() else []
    if not steps:
        raise CheckpointError(f"no complete checkpoint in {path}: give a run folder or one of its checkpoints/step_*")
    return root / step_name(steps[-1])


def damage(folder: Path) -> str:
    """Why this is not a whole checkpoint; empty if it is."""
    if not folder.is_dir():
        return "it is not a folder"
    try:
        files = read_marker(folder)["files"]
    except FileNotFoundError:
        return f"it has no {MARKER} file, so its writing did not end"
    except (OSError, ValueError, KeyError) as error:
        return f"its {MARKER} file cannot be read ({error})"
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
        if facts["bytes"] <= _HASHED_BYTES and "sha256" in facts and sha256(path) != facts["sha256"]:
            return f"{name} has changed since it was written"
    return ""


def altered_file(folder: Path, part: int, parts: int) -> str:
    """Why the large files of a checkpoint, of which every `parts`-th is read here, are not what was written; empty if they are.

    It reads them whole: all parts together read as many bytes as a run that loads the checkpoint.
    """
    large = [(name, facts) for name, facts in read_marker(folder)["files"].items() if facts["bytes"] > _HASHED_BYTES]
    for name, facts in large[part::parts]:
        if "sha256" in facts and sha256(folder / name) != facts["sha256"]:
            return f"{name} has changed since it was written"
    return ""


def read_marker(folder: Path) -> dict[str, Any]:
    marker: dict[str, Any] = json.loads((folder / MARKER).read_text())
    return marker


def _describe(path: Path, sums: dict[str, str]) -> dict[str, Any]:
    size = path.stat().st_size
    if path.name in sums:
        return {"bytes": size, "sha256": sums[path.name]}
    return {"bytes": size, "sha256": sha256(path)} if size <= _HASHED_BYTES else {"bytes": size}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's renames and new names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
