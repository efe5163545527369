"""Tensors beside model and optimizer: stored by slices, read into the caller's memory by other slices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from em_megatron.checkpoint.folder import CheckpointError
from em_megatron.checkpoint.sharded import CheckpointStore
from tests.checkpoint.tiny_run import resume, save, trainer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU backend")

# Row and column of each number can be read off it.
MEMORY = 10 * torch.arange(4.0)[:, None] + torch.arange(6.0)
SCALE = torch.tensor([7, 8], dtype=torch.int64)


def sharded(key: str, data: torch.Tensor, *offsets: tuple[int, int, int], replica: int = 0) -> Any:
    """This rank's part; `offsets` are (axis, index, number of parts)."""
    from megatron.core.dist_checkpointing import ShardedTensor

    return ShardedTensor.from_rank_offsets(key, data, *offsets, replica_id=replica)


def rows(rank: int, numbers: torch.Tensor = MEMORY) -> dict[str, Any]:
    """Two rows of the memory, one by one, and the same scale on both ranks."""
    parts = {
        f"row {row}": sharded("memory", numbers[row : row + 1].clone(), (0, row, 4)) for row in (2 * rank, 2 * rank + 1)
    }
    return parts | {"scale": sharded("scale", SCALE.clone(), replica=rank)}


def columns(rank: int) -> dict[str, Any]:
    """Three columns of a wider tensor, so that they do not lie together in memory, and a scale without memory yet."""
    wide = torch.full((4, 8), -1.0)
    part = sharded("memory", wide[:, 1:4], (1, rank, 2))
    return {"columns": part, "scale": sharded("scale", torch.zeros_like(SCALE), replica=rank).without_data()}


def message_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return ""


def probe_values(root: Path) -> dict[str, list[torch.Tensor]]:
    """What was read: the memory or its part, and the scale."""
    rank, results = dist.get_rank(), {}
    store = CheckpointStore(root, keep_last=1)
    run = trainer("dp2", "distributed")
    extra = rows(rank)
    save(store, run, extra=extra, asynchronous=True)
    for tensor in extra.values():
        tensor.data.zero_()
    store.finalize(blocking=True)
    for layout in ("tp2", "dp2"):
        other, extra = trainer(layout, "plain", seed=8), columns(rank)
        given = extra["columns"].data
        resume(store, other, extra=extra)
        results[f"columns {layout}"] = [given, extra["scale"].data]
    extra = rows(rank, torch.zeros_like(MEMORY))
    given = [tensor.data for tensor in extra.values()]
    store.load(store.latest(), model_chunks=other.chunks, extra=extra)
    results["rows, evaluated"] = [torch.cat(given[:2]), given[2]]
    return results


def probe_refused(root: Path) -> dict[str, str]:
    """The message of each refused load or save, empty where it was not refused."""
    rank = dist.get_rank()
    store, without = CheckpointStore(root / "with", keep_last=1), CheckpointStore(root / "without", keep_last=1)
    run = trainer("dp2", "plain")
    save(store, run, extra=rows(rank))
    save(without, run)
    memory_only = {name: tensor for name, tensor in rows(rank).items() if name != "scale"}
    longer = {"memory": sharded("memory", torch.zeros(2, 7), (0, rank, 2)), "scale": rows(rank)["scale"]}
    halved = {"memory": sharded("memory", torch.zeros(2, 6), (0, 0, 2))}
    path = store.latest()
    return {
        "forgotten": message_of(lambda: resume(store, run)),
        "forgotten, empty": message_of(lambda: resume(store, run, extra={})),
        "not wanted for evaluation": message_of(lambda: store.load(path, model_chunks=run.chunks)),
        "one wanted for evaluation": message_of(lambda: store.load(path, model_chunks=run.chunks, extra=memory_only)),
        "one forgotten": message_of(lambda: resume(store, run, extra=memory_only)),
        "not there": message_of(lambda: resume(without, run, extra=memory_only)),
        "not there for evaluation": message_of(
            lambda: store.load(without.latest(), model_chunks=run.chunks, extra=memory_only)
        ),
        "other shape": message_of(lambda: resume(store, run, extra=longer)),
        "same half twice": message_of(lambda: save(store, run, extra=halved)),
        "still whole": str(store.latest() == path),
    }


def probe(root: Path) -> dict[str, Any]:
    return {"values": probe_values(root / "values"), "refused": probe_refused(root / "refused")}


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_other_slices_are_filled_in_place(layout: str, ranks: Any) -> None:
    for rank, found in enumerate(ranks):
        part, scale = found["extra"]["values"][f"columns {layout}"]
        assert torch.equal(part, MEMORY[:, 3 * rank : 3 * rank + 3])
        assert torch.equal(scale, SCALE)


def test_weights_and_extra_for_evaluation(ranks: Any) -> None:
    for rank, found in enumerate(ranks):
        part, scale = found["extra"]["values"]["rows, evaluated"]
        assert torch.equal(part, MEMORY[2 * rank : 2 * rank + 2])
        assert torch.equal(scale, SCALE)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("forgotten", "holds 2 tensors beside model and optimizer, such as memory, which this run would lose"),
        ("forgotten, empty", "holds 2 tensors beside model and optimizer"),
        ("one forgotten", "1 tensors unknown here, such as extra.scale"),
        ("not there", "1 tensors it lacks, such as extra.memory"),
        ("not there for evaluation", "1 tensors it lacks, such as extra.memory"),
        ("other shape", "1 tensors of another shape, such as extra.memory is [4, 6] there and [4, 7] here"),
        ("same half twice", "The slices of an extra tensor do not make up a whole one"),
    ],
)
def test_what_would_lose_or_lack_tensors_is_refused_on_every_rank(case: str, message: str, ranks: Any) -> None:
    for rank in ranks:
        assert message in rank["extra"]["refused"][case]


def test_what_nobody_asks_for_does_not_matter_for_evaluation(ranks: Any) -> None:
    for rank in ranks:
        assert rank["extra"]["refused"]["not wanted for evaluation"] == ""
        assert rank["extra"]["refused"]["one wanted for evaluation"] == ""
        assert rank["extra"]["refused"]["still whole"] == "True"
