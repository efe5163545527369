"""A run that is asked to stop saves and ends, wherever it is; a rank that hangs ends and says where it stood."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from em_megatron.parallel.process_groups import shutdown
from em_megatron.training import loop
from em_megatron.training.setup import set_up
from em_megatron.training.stopping import StopRequest
from tests.training.corpora import recipe, run_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is off where CUDA is present")


@pytest.fixture
def stop():
    """A request whose handlers are taken back after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield StopRequest().catch()
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def read(run_dir: Path) -> list[tuple[str, int, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["kind"], row["step"], row["loss"]) for row in rows]


@pytest.mark.parametrize("where", ["step", "validation", "save", "before the first step", "last step"])
def test_the_stopped_run_goes_on_as_if_nothing_had_been(chain_corpus, tmp_path, stop, where):
    options = ("training.train_steps=6", "validation.interval=3", "checkpoint.save_interval=4")
    actions = {
        "step": (loop, "train_step", 2),
        "validation": (loop, "evaluate", 1),
        "last step": (loop, "train_step", 6),
    }
    try:
        whole = set_up(run_config(chain_corpus, tmp_path / "whole", *options), world_size=1)
        assert loop.train(whole) == "finished"
        shutdown()
        run = set_up(run_config(chain_corpus, tmp_path / "parts", *options), world_size=1)
        if where == "before the first step":
            os.kill(os.getpid(), signal.SIGUSR1)
            assert loop.train(run, stop) == "stopped"
        else:
            target, name, call = actions.get(where, (type(run), "save", 1))
            with signalled(target, name, call):
                assert loop.train(run, stop) == "stopped"
        steps = {"step": 2, "validation": 3, "save": 5, "before the first step": 0, "last step": 6}
        assert run.state.step == steps[where]
        assert run.state.owes_validation == (where in ("validation", "last step"))
        shutdown()
        run = set_up(run_config(chain_corpus, tmp_path / "parts", *options), world_size=1)
        assert run.state.step == steps[where]
        assert loop.train(run, StopRequest()) == "finished"
        assert read(tmp_path / "parts" / "test") == read(tmp_path / "whole" / "test")
        pairs = zip(whole.model[0].parameters(), run.model[0].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    finally:
        shutdown()


def signalled(target, name: str, call: int):
    """SIGUSR1 to this process in the given call of a function."""
    original, calls = getattr(target, name), [0]

    def sending(*args, **options):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args, **options)

    return patch.object(target, name, sending)


def test_a_signal_is_known_to_other_threads_while_the_main_one_is_blocked(tmp_path):
    """As it is in a collective whose peers are gone: the watchdog ends the process after a SIGTERM, with stacks."""
    script = tmp_path / "blocked.py"
    script.write_text(
        textwrap.dedent(
            """
            import ctypes, sys
            from pathlib import Path
            from em_megatron.training import watchdog
            from em_megatron.training.stopping import StopRequest
            stop = StopRequest().catch()
            watchdog.SECONDS_AFTER_SIGTERM = 1.0
            watchdog.Watchdog(Path(sys.argv[1]), 3, 0, stop).start()
            print("ready", flush=True)
            def never_returns():  # nor does a signal interrupt it, so that Python's handler never runs
                libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
                libc.pthread_mutex_lock(mutex)
                libc.pthread_mutex_lock(mutex)
            never_returns()
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, script, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "after SIGTERM in: set-up; stacks in" in errors
    assert "never_returns" in (tmp_path / "rank_00003.txt").read_text()


def test_a_rank_that_hangs_ends_all_with_the_stacks_of_all(chain_corpus, tmp_path):
    path = recipe(tmp_path / "recipe.yaml", chain_corpus, "faults.hang_minutes=0.1", "training.train_steps=50")
    script = tmp_path / "hanging.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, time
            from launch.pretrain import main
            from em_megatron.training import loop
            step, calls = loop.train_step, [0]
            def sleeping_beauty(*arguments):
                calls[0] += 1
                if os.environ["RANK"] == "1" and calls[0] == 4:
                    time.sleep(600)
                return step(*arguments)
            loop.train_step = sleeping_beauty
            sys.exit(main())
            """
        )
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(path),
    ]
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 1
    assert time.monotonic() - started < 120
    assert "no progress for" in done.stderr
    assert "in: step 4" in done.stderr
    stacks = {rank: tmp_path / "runs" / "test" / "stacks" / f"rank_{rank:05d}.txt" for rank in (0, 1)}
    assert "sleeping_beauty" in stacks[1].read_text()
    if stacks[0].exists():  # torchrun may end rank 0 before its own time is up
        assert "in train_step" in stacks[0].read_text()
