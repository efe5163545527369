"""A resumed run is the run that never stopped, to the bit; other layouts, models and kills are handled."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from em_megatron.checkpoint.folder import CheckpointError
from em_megatron.checkpoint.sharded import CheckpointStore
from em_megatron.parallel import process_groups
from tests.multi_rank import RankError, run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU backend")

# fp32 losses on another layout: sums in another order differ by a few units in the last place of 1.2e-7.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "dp2": {},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {"dropout": 0.3},
    "distributed": {"dropout": 0.3, "distributed_optimizer": True},
    "bf16": {"dropout": 0.3, "bf16": True},
    "bf16 distributed": {"dropout": 0.3, "bf16": True, "distributed_optimizer": True},
}
# Every layout and every optimizer, each at least once.
RESUMED = [
    ("tp2", "plain"),
    ("tp2", "bf16 distributed"),
    ("vpp2", "bf16"),
    ("vpp2", "distributed"),
    ("dp2", "plain"),
    ("dp2", "bf16 distributed"),
]
Steps = list[tuple[float, float]]


def trainer(sizes: dict[str, int], options: dict[str, Any], seed: int = 7) -> Any:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    layout = process_groups.initialize(**sizes)
    from tests.tiny_megatron import Options, Trainer

    return Trainer(layout, Options(**options), seed=seed)


def save(store: CheckpointStore, run: Any) -> Path:
    return store.save(
        run.step,
        model_chunks=run.chunks,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        train_state={"step": run.step, "consumed_samples": 4 * run.step},
        config_text="name: tiny\n",
    )


def resume(store: CheckpointStore, run: Any) -> dict[str, Any]:
    newest = store.latest(resuming=True)
    assert newest is not None
    state = store.load(newest, model_chunks=run.chunks, optimizer=run.optimizer, scheduler=run.scheduler)
    run.step = state["step"]
    return state


def probe_resume(root: Path) -> dict[str, tuple[Steps, Steps]]:
    """For each layout and optimizer: (what the run did after saving, what the resumed run did)."""
    results = {}
    for layout, kind in RESUMED:
        sizes, options = LAYOUTS[layout], OPTIMIZERS[kind]
        store = CheckpointStore(root / f"{layout} {kind}", keep_last=1)
        run = trainer(sizes, options)
        run.train(2)
        save(store, run)
        went_on = run.train(2)
        resumed = trainer(sizes, options, seed=8)
        assert resume(store, resumed) == {"step": 2, "consumed_samples": 8}
        results[f"{layout} {kind}"] = (went_on, resumed.train(2))
    return results


def probe_other_layouts(root: Path) -> dict[str, tuple[Steps, Steps]]:
    """Saved on TP2 with the distributed optimizer, resumed on the other layouts."""
    options = {"distributed_optimizer": True}
    store = CheckpointStore(root, keep_last=1)
    run = trainer(LAYOUTS["tp2"], options)
    run.train(2)
    save(store, run)
    went_on, results = run.train(2), {}
    for layout in ("vpp2", "dp2"):
        other = trainer(LAYOUTS[layout], options, seed=8)
        before = torch.get_rng_state()
        resume(store, other)
        assert torch.equal(before, torch.get_rng_state())
        results[layout] = (went_on, other.train(2))
    return results


def probe_errors(root: Path) -> dict[str, str]:
    """The message of each refused load or save."""
    store = CheckpointStore(root, keep_last=1)
    assert store.latest() is None
    # Adam has no state yet at this save.
    run = trainer({}, {})
    path = save(store, run)
    went_on = run.train(2)
    again = trainer({}, {}, seed=8)
    resume(store, again)
    assert again.train(2) == went_on

    def message(options: dict[str, Any], where: Path = path, weights_only: bool = False) -> str:
        other = trainer({}, options)
        weights = [chunk.module.decoder.layers[0].self_attention.linear_qkv.weight for chunk in other.chunks]
        before = [weight.detach().clone() for weight in weights]
        try:
            store.load(where, model_chunks=other.chunks, optimizer=None if weights_only else other.optimizer)
        except CheckpointError as error:
            assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
            return str(error)
        return ""

    found = {
        "width": message({"width": 32}),
        "tied": message({"tied": True}),
        "tied weights only": message({"tied": True}, weights_only=True),
        "optimizer": message({"distributed_optimizer": True}),
        "optimizer does not matter": message({"distributed_optimizer": True}, weights_only=True),
        "nothing there": message({}, where=root / "step_00000007"),
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
    run = trainer(LAYOUTS["tp2"], {})
    run.train(1)
    path = save(store, run)
    other = trainer(LAYOUTS["tp2"], {}, seed=8)
    before = torch.get_rng_state()
    store.load(path, model_chunks=other.models)
    pairs = zip(run.models[0].parameters(), other.models[0].parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs), torch.equal(before, torch.get_rng_state())


def die_while_saving(root: Path) -> None:
    """Saves steps 1 and 2 and is killed in the middle of step 3, on rank 1."""
    store = CheckpointStore(root, keep_last=2)
    run = trainer(LAYOUTS["vpp2"], OPTIMIZERS["distributed"])
    for _ in range(2):
        run.train(1)
        save(store, run)
    run.train(1)
    if dist.get_rank() == 1:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        FileSystemWriter.prepare_local_plan = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    save(store, run)


def go_on_after_death(root: Path) -> tuple[Steps, Steps, list[str]]:
    never_stopped = trainer(LAYOUTS["vpp2"], OPTIMIZERS["distributed"]).train(4)
    store = CheckpointStore(root, keep_last=2)
    run = trainer(LAYOUTS["vpp2"], OPTIMIZERS["distributed"], seed=8)
    store.latest()
    assert (root / ".step_00000003.writing").is_dir(), "only looking must not touch a save that may be going on"
    dist.barrier()
    resume(store, run)
    assert not (root / ".step_00000003.writing").exists()
    resumed = run.train(2)
    save(store, run)
    return never_stopped[2:], resumed, sorted(path.name for path in root.iterdir())


def probe(root: Path) -> dict[str, Any]:
    """Everything on two ranks, in one go: starting them costs more than what they do."""
    process_groups.initialize()
    return {
        "resume": probe_resume(root / "resume"),
        "layouts": probe_other_layouts(root / "layouts"),
        "errors": probe_errors(root / "errors"),
        "evaluation": probe_evaluation(root / "evaluation"),
        "killed": go_on_after_death(root / "killed"),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("checkpoints")
    with pytest.raises(RankError, match="Rank 1 was ended by signal 9"):
        run_ranks(die_while_saving, 2, root / "killed", timeout=140)
    assert (root / "killed" / ".step_00000003.writing").is_dir()
    return run_ranks(probe, 2, root, timeout=140)


@pytest.mark.parametrize(("layout", "kind"), RESUMED)
def test_resumed_run_is_equal_to_the_bit(layout: str, kind: str, ranks: Any) -> None:
    for rank in ranks:
        went_on, resumed = rank["resume"][f"{layout} {kind}"]
        assert went_on == resumed


@pytest.mark.parametrize("layout", ["vpp2", "dp2"])
def test_another_layout_goes_on(layout: str, ranks: Any) -> None:
    went_on, resumed = ranks[0]["layouts"][layout]
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(went_on), **TOLERANCE)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("width", "tensors of another shape, such as decoder.final_norm.weight is [16] there and [32] here"),
        ("tied", "tensors unknown here, such as optimizer.state.exp_avg.output_layer.weight"),
        ("tied weights only", "1 tensors unknown here, such as output_layer.weight"),
        ("optimizer", "tensors it lacks, such as optimizer.state.param."),
        ("nothing there", "it is not a folder"),
        ("train state", "cannot be written as JSON"),
    ],
)
def test_what_cannot_work_is_refused_on_every_rank(case: str, message: str, ranks: Any) -> None:
    for rank in ranks:
        assert message in rank["errors"][case]


def test_weights_load_for_evaluation(ranks: Any) -> None:
    for rank in ranks:
        assert rank["errors"]["optimizer does not matter"] == ""
        assert rank["evaluation"] == (True, True)


def test_keep_last_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last is 0"):
        CheckpointStore(tmp_path, keep_last=0)


def test_killed_while_saving_then_resumed(ranks: Any) -> None:
    for rank in ranks:
        never_stopped, resumed, folders = rank["killed"]
        assert never_stopped == resumed
        assert folders == ["step_00000002", "step_00000004"]
