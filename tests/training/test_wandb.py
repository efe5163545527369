"""wandb: one run over all calls, by its id; offline segments, uploaded in order by slurm/sync_wandb.sh to a server here."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from em_megatron.config import RunConfig, load_config
from em_megatron.training import tracking
from em_megatron.training.metrics import MetricLog
from em_megatron.training.tracking import wandb_id_of
from tests.training.wandb_server import wandb_server

SYNC = Path("slurm/sync_wandb.sh")

# One call of a run: rows of some steps, then the end, perhaps by SIGKILL.
CALL = """
import os, signal, sys, time
from em_megatron.config import load_config
from em_megatron.training.tracking import Wandb, wandb_id_of
folder, mode, end, *steps = sys.argv[1:]
config = load_config(None, ["name=run", f"output_dir={folder}", "data.path=none", "model.size=tiny", f"logging.wandb={mode}"])
wandb = Wandb(config, wandb_id_of(config.run_dir, ""))
for step in map(int, steps):
    wandb.write({"train/loss": 10.0 - step}, step)
    if step % 2 == 0:
        wandb.write({"validation/loss": 11.0 - step}, step)
if end == "killed":
    time.sleep(35)
if "killed" in end:
    os.kill(os.getpid(), signal.SIGKILL)
wandb.close(int(end == "failed"))
"""


def call(folder: Path, mode: str, end: str, steps: range, **environment: str) -> None:
    arguments = [str(folder), mode, end, *map(str, steps)]
    done = subprocess.run(
        [sys.executable, "-c", CALL, *arguments],
        env=os.environ | environment,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert done.returncode == (-9 if "killed" in end else 0), done.stderr


def sync(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SYNC, *arguments], env=os.environ | environment, timeout=120, capture_output=True, text=True, check=False
    )


def segments(run: Path) -> list[Path]:
    return sorted(run.glob("wandb/offline-run-*"))


def age(segment: Path, minutes: float) -> None:
    then = time.time() - 60 * minutes
    for file in segment.glob("*.wandb"):
        os.utime(file, (then, then))


def cut_off(segment: Path) -> None:
    """As a call leaves it that was killed while its client wrote: the last record, which says that it ended, is cut."""
    (file,) = segment.glob("*.wandb")
    file.write_bytes(file.read_bytes()[:-3])
    age(segment, minutes=6)


def test_an_id_for_all_calls(tmp_path):
    run = tmp_path / "run"
    first = wandb_id_of(run, "")
    assert (run / "wandb_id").read_text() == f"{first}\n"
    assert wandb_id_of(run, "") == first  # a call that was killed before its first checkpoint
    assert wandb_id_of(run, "saved1") == "saved1"  # the checkpoint counts most
    assert wandb_id_of(run, "") == "saved1"
    (run / "wandb_id").write_text("")
    assert wandb_id_of(run, "") not in ("", first, "saved1")
    assert [path.name for path in run.iterdir()] == ["wandb_id"]


def test_an_id_that_cannot_be_kept_is_warned_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tracking, "replace_text", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    assert wandb_id_of(tmp_path, "")
    assert "the disk is full" in caplog.text


def test_offline_segments_become_one_run(tmp_path):
    """A second call repeats two steps: every row is in the one run, in the order in which they came."""
    run = tmp_path / "run"
    call(tmp_path, "offline", "failed", range(1, 5))
    call(tmp_path, "offline", "finished", range(3, 7))
    wandb_id = (run / "wandb_id").read_text().strip()
    parts = segments(run)
    assert len(parts) == 2
    assert all(part.name.endswith(f"-{wandb_id}") for part in parts)

    assert sync(run).stdout == f"{parts[0]}: written to in the last 5 minutes, left for later\n"
    age(parts[0], minutes=6)
    to_upload = f"{parts[0]} -> wandb run {wandb_id}"
    assert sync("--list", run).stdout.splitlines() == [
        to_upload,
        f"{parts[1]}: written to in the last 5 minutes, left for later",
    ]
    with wandb_server() as server:
        assert sync(run, **server.environment).stdout.splitlines()[0] == to_upload
        assert [row["step"] for row in server.history[wandb_id]] == [1, 2, 2, 3, 4, 4]
        cut_off(parts[1])
        assert sync(run, **server.environment).returncode == 0
        assert sync("--all", run, **server.environment).stdout == ""  # it is all there
        rows = server.history[wandb_id]
    assert list(server.history) == [wandb_id]
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 3, 4, 4, 5, 6, 6]
    assert [row["_step"] for row in rows] == list(range(12))  # none takes another's place
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [10.0 - s for s in (1, 2, 3, 4, 3, 4, 5, 6)]


@pytest.mark.slow
def test_rows_of_a_call_that_is_killed(tmp_path):
    """The client writes every 15 seconds; what it has written by then is uploaded."""
    call(tmp_path, "offline", "killed", range(1, 5))
    call(tmp_path, "offline", "killed at once", range(5, 6))
    with wandb_server() as server:
        assert sync("--all", tmp_path / "run", **server.environment).returncode == 0
    (rows,) = server.history.values()
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]


def test_online_calls_become_one_run(tmp_path):
    with wandb_server() as server:
        for steps in (range(1, 4), range(2, 6)):
            call(tmp_path, "online", "finished", steps, **server.environment)
    (rows,) = server.history.values()
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 2, 3, 4, 5]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    assert segments(tmp_path / "run") == []


def test_a_segment_that_fails_holds_back_the_later_ones(tmp_path):
    """The order is kept over calls of the script, and other runs do not wait."""
    for name in ("a", "b"):
        for time_of_start in ("20260102_000000", "20260101_000000"):
            segment = tmp_path / name / f"wandb/offline-run-{time_of_start}-id{name}"
            segment.mkdir(parents=True)
            (segment / f"run-id{name}.wandb").write_bytes(bytes(100))
        (tmp_path / name / "wandb_id").write_text(f"id{name}\n")
    client = tmp_path / ".venv/bin/wandb"
    client.parent.mkdir(parents=True)
    calls = tmp_path / "calls"
    client.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n'
        'case "$3" in ida) echo "no answer";; *) touch "$4/run-$3.wandb.synced";; esac\n'
    )
    client.chmod(0o755)
    (tmp_path / "slurm").mkdir()
    script = shutil.copy(SYNC, tmp_path / "slurm")
    done = subprocess.run(
        [script, "--all", tmp_path / "a", tmp_path / "b/"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"no answer\nerror: {tmp_path}/a/wandb/offline-run-20260101_000000-ida was not uploaded\n"
    wanted = [("a", "20260101"), ("b", "20260101"), ("b", "20260102")]
    assert calls.read_text().splitlines() == [
        f"sync --id id{name} {tmp_path}/{name}/wandb/offline-run-{day}_000000-id{name}" for name, day in wanted
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "usage: sync_wandb.sh"),
        ([], 2, "error: no run folder given"),
        (["--lst", "runs/a"], 2, "error: unknown option --lst"),
        (["/nowhere"], 1, "error: /nowhere has no wandb_id"),
    ],
)
def test_the_script_says_what_is_wrong(arguments, status, text):
    done = sync(*arguments)
    assert done.returncode == status
    assert text in done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", SYNC], check=True)


# --- it never stops a run ---


def quiet_config(folder: Path, *overrides: str) -> RunConfig:
    off = ["logging.tensorboard=false", "logging.progress=false"]
    return load_config(
        None, ["name=run", f"output_dir={folder}", "data.path=none", "model.size=tiny", *off, *overrides]
    )


class Failing:
    """A client whose runs fail at the second row."""

    rows = 0

    def define_metric(self, *args: object, **options: object) -> None: ...

    def log(self, row: dict[str, float]) -> None:
        self.rows += 1
        if self.rows > 1:
            raise ConnectionError("the network is gone")

    def finish(self, exit_code: int) -> None:
        time.sleep(60)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_client_that_fails_or_hangs_is_left_out(tmp_path, caplog, monkeypatch, mode):
    import wandb

    run = Failing()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setattr(tracking, "WANDB_SECONDS", 0.1)
    log = MetricLog(quiet_config(tmp_path, f"logging.wandb={mode}"), 0, "id", active=True)
    for step in range(1, 5):
        log.train_row({"step": step, "loss": 1.0, "tokens_per_second": 1.0})
    started = time.monotonic()
    log.close()
    assert time.monotonic() - started < 30
    assert run.rows == 2  # not asked again
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "wandb failed (the network is gone); the run goes on without it" in caplog.text


def test_a_hanging_finish_does_not_keep_the_run(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: Failing())
    monkeypatch.setattr(tracking, "WANDB_SECONDS", 0.1)
    log = MetricLog(quiet_config(tmp_path, "logging.wandb=offline"), 0, "id", active=True)
    started = time.monotonic()
    log.close()
    assert time.monotonic() - started < 30


def test_no_network_means_an_offline_segment(tmp_path, caplog, monkeypatch):
    import wandb

    modes = []

    def init(mode: str, **options: object) -> Failing:
        modes.append(mode)
        if mode == "online":
            raise TimeoutError("no answer")
        assert options["resume"] == "allow"  # or its upload would take the place of what is there
        return Failing()

    monkeypatch.setattr(wandb, "init", init)
    tracking.Wandb(quiet_config(tmp_path, "logging.wandb=online"), "id")
    assert modes == ["online", "offline"]
    assert "wandb online failed (no answer); the run goes on without it" in caplog.text


@pytest.mark.parametrize("key", ["", "k" * 40])
def test_auto_is_online_with_a_key(tmp_path, monkeypatch, key):
    import wandb

    modes = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr(wandb, "init", lambda mode, **_: modes.append(mode) or Failing())
    tracking.Wandb(quiet_config(tmp_path), "id")
    assert modes == ["online" if key else "offline"]
