"""A kill at any moment leaves the old checkpoints or the new one; damage is found and passed over."""

import inspect
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from em_megatron.checkpoint.folder import (
    MARKER,
    altered_file,
    clean_leftovers,
    complete_steps,
    damage,
    finish,
    replace_step,
    retain,
    sha256,
    step_name,
    writing_name,
)


def write_step(root: Path, step: int, content: str) -> Path:
    """One whole checkpoint, through the functions that CheckpointStore.save uses."""
    root.mkdir(parents=True, exist_ok=True)
    writing = root / writing_name(step)
    writing.mkdir()
    (writing / "__0_0.distcp").write_text(content)
    finish(writing, step, {"train_state.json": "{}"}, {"layout": {}}, {})
    return replace_step(root, writing, step)


def content_of(root: Path, step: int) -> str:
    return (root / step_name(step) / "__0_0.distcp").read_text()


# Saves step 30 over an old step 30 and deletes step 10, and is killed at the Nth thing it does to a file. The source of
# write_step is pasted in: importing this module would import pytest at each of some thirty starts.
KILLED = """
import os, signal, sys
from pathlib import Path
from em_megatron.checkpoint.folder import clean_leftovers, finish, replace_step, retain, writing_name

WRITE_STEP
left = int(sys.argv[2])
def kill_later(event, arguments):
    global left
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
root = Path(sys.argv[1])
sys.addaudithook(kill_later)
clean_leftovers(root)
write_step(root, 30, "new")
retain(root, 30, 2)
"""


def test_kill_at_every_file_operation(tmp_path: Path) -> None:
    script = KILLED.replace("WRITE_STEP", inspect.getsource(write_step))
    for point in range(60):
        root = tmp_path / str(point)
        for step in (10, 20, 30):
            write_step(root, step, "old")
        ended = subprocess.run([sys.executable, "-c", script, str(root), str(point)], check=False, timeout=60)
        clean_leftovers(root)
        steps = complete_steps(root)
        assert {20, 30} <= set(steps), f"killed at operation {point}: {steps}"
        assert content_of(root, 30) in ("old", "new")
        assert sorted(path.name for path in root.iterdir()) == [step_name(step) for step in steps]
        if ended.returncode == 0:
            assert steps == [20, 30]
            assert content_of(root, 30) == "new"
            break
        assert ended.returncode == -signal.SIGKILL
    else:
        pytest.fail("the save did not end within 60 file operations")
    assert point > 10


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / MARKER).unlink(), "writing did not end"),
        (lambda folder: (folder / MARKER).write_text("{"), "cannot be read"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda folder: (folder / "__0_0.distcp").write_text("ne"), "has 2 bytes instead of 3"),
        (lambda folder: (folder / "train_state.json").write_text("[]"), "train_state.json has changed"),
    ],
)
def test_damaged_newest_is_passed_over(spoil, reason: str, tmp_path: Path, caplog) -> None:
    write_step(tmp_path, 1, "old")
    spoil(write_step(tmp_path, 2, "new"))
    assert reason in damage(tmp_path / step_name(2))
    assert complete_steps(tmp_path) == [1]
    assert "is passed over" in caplog.text


def test_retention_counts_whole_checkpoints_only(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_step(tmp_path, step, "x")
    (tmp_path / step_name(4) / MARKER).unlink()
    retain(tmp_path, 3, 2)
    assert complete_steps(tmp_path) == [2, 3]


def test_a_later_one_that_was_passed_over_pushes_out_none(tmp_path: Path) -> None:
    """Its size is right, so that only a run that resumes knows that it is damaged."""
    for step in (100, 200, 150):
        write_step(tmp_path, step, "x")
        retain(tmp_path, step, 1)
    assert complete_steps(tmp_path) == [150, 200]


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    for step in (10, 15, 20, 25, 30, 35):
        write_step(tmp_path, step, "x")
    retain(tmp_path, 35, 1, keep_every=20)
    assert complete_steps(tmp_path) == [20, 35]


def test_every_byte_of_large_files_is_read_by_some_rank(tmp_path: Path) -> None:
    folder = tmp_path / writing_name(1)
    folder.mkdir()
    names = [f"__{rank}_0.distcp" for rank in range(5)]
    for name in names:
        (folder / name).write_bytes(b"x" * (2 << 20))
    sums = {name: sha256(folder / name) for name in names}
    finish(folder, 1, {}, {}, sums)
    assert [altered_file(folder, part, 2) for part in range(2)] == ["", ""]
    content = bytearray(b"x" * (2 << 20))
    content[1 << 20] ^= 1
    (folder / names[3]).write_bytes(content)
    assert damage(folder) == ""  # its size is right
    assert [altered_file(folder, part, 2) for part in range(2)] == ["", f"{names[3]} has changed since it was written"]


def test_steps_sort_by_number(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        write_step(tmp_path, step, "x")
    assert complete_steps(tmp_path) == [99_999_999, 100_000_000]


def test_marker_lists_every_file(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 5, "abc")
    marker = json.loads((folder / MARKER).read_text())
    assert marker["step"] == 5
    assert set(marker["files"]) == {"__0_0.distcp", "train_state.json"}
    assert marker["files"]["__0_0.distcp"]["bytes"] == 3


def test_nothing_there(tmp_path: Path) -> None:
    assert complete_steps(tmp_path / "none") == []
    clean_leftovers(tmp_path / "none")
