"""A resumed run is the run that never stopped, to the bit; other layouts, models and kills are handled."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from em_megatron.checkpoint.folder import CheckpointError
from em_megatron.checkpoint.sharded import CheckpointStore
from tests.checkpoint.tiny_run import TOLERANCE, Steps, in_writers, resume, save, trainer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU backend")

# test_asynchronous resumes on further layouts and optimizers.
RESUMED = [("tp2", "bf16 distributed"), ("dp2", "plain"), ("cp2", "distributed")]
# Killed in the middle of a save, and with a save in flight.
KILLED = ("killed", "killed in flight")


def probe_resume(root: Path) -> dict[str, tuple[Steps, Steps]]:
    """For each layout and optimizer: (what the run did after saving, what the resumed run did)."""
    results = {}
    for layout, kind in RESUMED:
        store = CheckpointStore(root / f"{layout} {kind}", keep_last=1)
        run = trainer(layout, kind, dropout=0.3)
        run.train(2)
        save(store, run)
        went_on = run.train(2)
        resumed = trainer(layout, kind, seed=8, dropout=0.3)
        assert resume(store, resumed) == {"step": 2, "consumed_samples": 8}
        results[f"{layout} {kind}"] = (went_on, resumed.train(2))
    return results


def probe_other_layouts(root: Path) -> dict[str, tuple[Steps, Steps]]:
    """Saved with the distributed optimizer on one layout, resumed on others, where random states are left alone."""
    results = {}
    for saved, others in (("tp2", ("vpp2", "dp2")), ("dp2", ("cp2",)), ("cp2", ("dp2",))):
        store = CheckpointStore(root / saved, keep_last=1)
        run = trainer(saved, "distributed")
        run.train(2)
        save(store, run)
        went_on = run.train(2)
        for layout in others:
            other = trainer(layout, "distributed", seed=8)
            before = torch.get_rng_state()
            resume(store, other)
            assert torch.equal(before, torch.get_rng_state())
            results[f"{saved} {layout}"] = (went_on, other.train(2))
    return results


def probe_errors(root: Path) -> dict[str, str]:
    """The message of each refused load or save."""
    store = CheckpointStore(root, keep_last=1)
    assert store.latest() is None
    # Adam has no state yet at this save.
    run = trainer("dp2", "plain")
    path = save(store, run)
    went_on = run.train(2)
    again = trainer("dp2", "plain", seed=8)
    resume(store, again)
    assert again.train(2) == went_on

    def message(where: Path = path, weights_only: bool = False, kind: str = "plain", **options: Any) -> str:
        other = trainer("dp2", kind, **options)
        weights = [chunk.module.decoder.layers[0].self_attention.linear_qkv.weight for chunk in other.chunks]
        before = [weight.detach().clone() for weight in weights]
        try:
            store.load(where, model_chunks=other.chunks, optimizer=None if weights_only else other.optimizer)
        except CheckpointError as error:
            assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
            return str(error)
        return ""

    found = {
        "width": message(width=32),
        "tied": message(tied=True),
        "tied with another optimizer": message(tied=True, kind="bf16 distributed"),
        "tied weights only": message(tied=True, weights_only=True),
        "optimizer does not matter": message(kind="distributed", weights_only=True),
        "nothing there": message(where=root / "step_00000007"),
    }
    try:
        store.save(
            5,
            model_chunks=run.chunks,
            optimizer=run.optimizer,
            scheduler=run.scheduler,
            train_state={"x": torch.zeros(1)},
            config_text="",
        )
    except CheckpointError as error:
        found["train state"] = str(error)
    return found


def probe_evaluation(root: Path) -> tuple[bool, bool]:
    """Weights only, into a bare model without DDP: equal weights, and random states left alone."""
    store = CheckpointStore(root, keep_last=1)
    run = trainer("tp2", "plain")
    run.train(1)
    path = save(store, run)
    other = trainer("tp2", "plain", seed=8)
    before = torch.get_rng_state()
    store.load(path, model_chunks=other.models)
    pairs = zip(run.models[0].parameters(), other.models[0].parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs), torch.equal(before, torch.get_rng_state())


def die_while_saving(root: Path) -> None:
    """Saves steps 1 and 2 to two folders; is killed, on rank 1, while step 3 is in flight to one and written to the other."""
    stores = [CheckpointStore(root / name, keep_last=2) for name in KILLED]
    run = trainer("vpp2", "distributed", dropout=0.3)
    for _ in range(2):
        run.train(1)
        save(stores[0], run)
        save(stores[1], run, asynchronous=True)
    run.train(1)
    with in_writers(partial(hang, root)):
        save(stores[1], run, asynchronous=True)
    while len(list(root.glob("writer_*"))) < 2:
        time.sleep(0.01)
    if dist.get_rank() == 1:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        FileSystemWriter.prepare_local_plan = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    save(stores[0], run)


def hang(root: Path) -> None:
    """A writer that never ends, and leaves its process number."""
    (root / f"writer_{os.getpid()}").touch()
    time.sleep(1000)


def writers_alive(root: Path) -> list[int]:
    """The writers left by `die_while_saving` that still run."""
    numbers = [int(path.name.removeprefix("writer_")) for path in root.glob("writer_*")]
    assert len(numbers) == 2
    return [n for n in numbers if psutil.pid_exists(n) and psutil.Process(n).status() != psutil.STATUS_ZOMBIE]


def go_on_after_death(root: Path) -> dict[str, tuple[Steps, Steps, list[str]]]:
    """For each folder: (what a run that never stopped did, what the resumed one did, the checkpoints then)."""
    assert not writers_alive(root), "a writer outlived its rank"
    never_stopped = trainer("vpp2", "distributed", dropout=0.3).train(4)
    results = {}
    for name in KILLED:
        folder = root / name
        store = CheckpointStore(folder, keep_last=2)
        run = trainer("vpp2", "distributed", seed=8, dropout=0.3)
        store.latest()
        assert (folder / ".step_00000003.writing").is_dir(), "only looking must not touch a save that may be going on"
        dist.barrier()
        resume(store, run)
        assert not (folder / ".step_00000003.writing").exists()
        resumed = run.train(2)
        save(store, run)
        results[name] = (never_stopped[2:], resumed, sorted(path.name for path in folder.iterdir()))
    return results


def probe(root: Path) -> dict[str, Any]:
    return {
        "resume": probe_resume(root / "resume"),
        "layouts": probe_other_layouts(root / "layouts"),
        "errors": probe_errors(root / "errors"),
        "evaluation": probe_evaluation(root / "evaluation"),
    }


@pytest.mark.parametrize(("layout", "kind"), RESUMED)
def test_resumed_run_is_equal_to_the_bit(layout: str, kind: str, ranks: Any) -> None:
    for rank in ranks:
        went_on, resumed = rank["sharded"]["resume"][f"{layout} {kind}"]
        assert went_on == resumed


@pytest.mark.parametrize("layouts", ["tp2 vpp2", "tp2 dp2", "dp2 cp2", "cp2 dp2"])
def test_another_layout_goes_on(layouts: str, ranks: Any) -> None:
    went_on, resumed = ranks[0]["sharded"]["layouts"][layouts]
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(went_on), **TOLERANCE)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("width", "tensors of another shape, such as decoder.final_norm.weight is [16] there and [32] here"),
        ("tied", "tensors unknown here, such as optimizer.state.exp_avg.output_layer.weight"),
        ("tied weights only", "1 tensors unknown here, such as output_layer.weight"),
        ("tied with another optimizer", "tensors unknown here, such as optimizer.state.exp_avg.output_layer.weight"),
        ("nothing there", "it is not a folder"),
        ("train state", "cannot be written as JSON"),
    ],
)
def test_what_cannot_work_is_refused_on_every_rank(case: str, message: str, ranks: Any) -> None:
    for rank in ranks:
        assert message in rank["sharded"]["errors"][case]


def test_weights_load_for_evaluation(ranks: Any) -> None:
    for rank in ranks:
        assert rank["sharded"]["errors"]["optimizer does not matter"] == ""
        assert rank["sharded"]["evaluation"] == (True, True)


def test_keep_last_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last is 0"):
        CheckpointStore(tmp_path, keep_last=0)


@pytest.mark.parametrize("folder", KILLED)
def test_killed_while_saving_then_resumed(folder: str, ranks: Any) -> None:
    for rank in ranks:
        never_stopped, resumed, folders = rank["killed"][folder]
        assert never_stopped == resumed
        assert folders == ["step_00000002", "step_00000004"]
