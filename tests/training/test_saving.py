"""A save that fails stops nothing: training goes on, the save is tried again, and nothing half written is left."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from em_megatron.checkpoint.folder import CheckpointError, complete_steps
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training import loop, saving
from em_megatron.training.setup import set_up
from em_megatron.training.step import TrainingError
from tests.training.corpora import run_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is off where CUDA is present")


@contextmanager
def at_steps(actions):
    """Does something before a step of the run."""
    step = loop.train_step

    def acting(config, layout, model, optimizer, scheduler, *rest):
        number = scheduler.num_steps + 1
        if number in actions:
            actions[number]()
        return step(config, layout, model, optimizer, scheduler, *rest)

    with patch.object(loop, "train_step", acting):
        yield


def limit(size: int) -> None:
    """The limit on the size of files stands for a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def weights(run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in run.model for parameter in chunk.parameters()]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_is_waited_out(chain_corpus, tmp_path, asynchronous, capsys):
    options = [
        "training.train_steps=9",
        "checkpoint.save_interval=3",
        "checkpoint.retry_interval=1",
        f"checkpoint.asynchronous={asynchronous}",
    ]
    root = tmp_path / "full" / "test" / "checkpoints"
    seen = []
    free = resource.RLIM_INFINITY
    actions = {
        4: lambda: None,
        5: lambda: limit(200_000),
        7: lambda: time.sleep(3),  # the writer in the background has failed by then, on a slow machine too
        8: lambda: (seen.extend(path.name for path in root.iterdir()), limit(free)),
    }
    try:
        undisturbed = set_up(run_config(chain_corpus, tmp_path / "free", *options), world_size=1)
        assert loop.train(undisturbed) == "finished"
        expected = weights(undisturbed)
        shutdown()
        run = set_up(run_config(chain_corpus, tmp_path / "full", *options), world_size=1)
        with at_steps(actions):
            assert loop.train(run) == "finished"
        assert all(torch.equal(a, b) for a, b in zip(expected, weights(run), strict=True))
    finally:
        limit(free)
        shutdown()
    told = capsys.readouterr().out
    assert "could not be written" in told
    assert "training goes on, the next attempt is at step" in told
    assert seen[0] == "step_00000003"
    assert not [name for name in seen if name.endswith(".writing")] or asynchronous == "true"
    assert complete_steps(root)[-1] == 9
    assert len(complete_steps(root)) == 2
    assert not list(root.glob(".*"))


def test_a_disk_that_stays_full_ends_in_a_sentence(chain_corpus, tmp_path):
    options = ("training.train_steps=4", "checkpoint.save_interval=2")
    try:
        run = set_up(run_config(chain_corpus, tmp_path, *options), world_size=1)
        with (
            at_steps({4: lambda: limit(200_000)}),
            patch.object(saving, "SECONDS_BETWEEN_LAST_ATTEMPTS", 0.1),
            pytest.raises(
                CheckpointError, match=r"step 4 could not be saved in 3 attempts: make room in .*checkpoints"
            ),
        ):
            loop.train(run)
    finally:
        limit(resource.RLIM_INFINITY)
        shutdown()
    assert complete_steps(tmp_path / "test" / "checkpoints") == [2]
    try:  # and the next call goes on from there
        run = set_up(run_config(chain_corpus, tmp_path, *options), world_size=1)
        assert run.state.step == 2
        assert loop.train(run) == "finished"
    finally:
        shutdown()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_small_disk(chain_corpus, tmp_path):
    """A real one, which holds a checkpoint and no second one; then it is emptied."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=6m none {disk}"):
        pytest.skip("this machine does not let us mount")
    ballast = disk / "ballast"

    def fill() -> None:
        with ballast.open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            except OSError:
                pass

    steps = 60
    options = (f"training.train_steps={steps}", "checkpoint.save_interval=10", "checkpoint.retry_interval=5")
    try:
        run = set_up(run_config(chain_corpus, disk, *options, "validation.interval=0"), world_size=1)
        with at_steps({14: fill, 48: ballast.unlink}):
            assert loop.train(run) == "finished"
        assert complete_steps(disk / "test" / "checkpoints")[-1] == steps
        rows = (disk / "test" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, steps + 1))
    finally:
        shutdown()
        os.system(f"umount -l {disk}")


def test_spoilt_weights_are_not_saved(chain_corpus, tmp_path):
    """Such a checkpoint would push out good ones, and no run could go on from it."""
    options = ("training.train_steps=8", "checkpoint.save_interval=2", "checkpoint.keep_last=1")
    step = loop.train_step

    def spoiling(config, layout, model, *rest):
        result = step(config, layout, model, *rest)
        if rest[1].num_steps == 4:
            with torch.no_grad():
                next(model[0].parameters()).view(-1)[0] = float("nan")
        return result

    try:
        run = set_up(run_config(chain_corpus, tmp_path, *options), world_size=1)
        message = "after step 4 weights are not finite, so that it is not saved; .*step_00000002 is whole"
        with patch.object(loop, "train_step", spoiling), pytest.raises(TrainingError, match=message):
            loop.train(run)
    finally:
        shutdown()
    assert complete_steps(tmp_path / "test" / "checkpoints") == [2]


def test_a_damaged_newest_checkpoint_is_passed_over_on_resume(chain_corpus, tmp_path, caplog):
    """A byte flipped in the tensors, whose file keeps its size: the one before it is resumed from."""
    options = (
        "training.train_steps=6",
        "checkpoint.save_interval=2",
        "model.hidden_size=256",
        "model.ffn_hidden_size=512",
    )
    try:
        run = set_up(run_config(chain_corpus, tmp_path, *options, "training.stop_after_steps=4"), world_size=1)
        assert loop.train(run) == "paused"
        shutdown()
        newest = tmp_path / "test" / "checkpoints" / "step_00000004"
        largest = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
        assert largest.stat().st_size > 1 << 20
        flip_middle(largest)
        run = set_up(run_config(chain_corpus, tmp_path, *options), world_size=1)
        assert run.state.step == 2
        assert f"{newest} is passed over: {largest.name} has changed since it was written" in caplog.text
        assert loop.train(run) == "finished"
    finally:
        shutdown()


def flip_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
