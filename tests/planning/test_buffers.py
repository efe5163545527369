"""Weights, gradients, optimizer state, matrices and carried states: the bytes of built runs, exactly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from em_megatron.config import load_config
from em_megatron.parallel.process_groups import shutdown
from em_megatron.planning.buffers import chunk_parameters, static_bytes
from em_megatron.planning.job import Job
from em_megatron.planning.memory_state import carried_bytes
from em_megatron.planning.search import check
from tests.multi_rank import Pools, leave_groups
from tests.training import corpora

RECIPES = sorted(Path("launch/recipes").glob("*.yaml"))
DISTRIBUTED = "parallel.use_distributed_optimizer=true"
PIPELINE, TENSOR = "parallel.pipeline_model_parallel_size=2", "parallel.tensor_model_parallel_size=2"

BUILT = {  # name → (ranks, overrides)
    "one rank, bf16": (1, ("training.precision=bf16",)),
    "one rank, fp32, query norms": (1, ("model.qk_layernorm=true",)),
    "data, distributed": (2, (DISTRIBUTED, "training.precision=bf16", "model.hidden_size=40")),
    "data, distributed, fp32": (2, (DISTRIBUTED,)),
    "tensor, carried": (2, (TENSOR, "memory.carry_memory=true", "memory.layers=1")),
    "pipeline, tied, distributed": (
        2, (PIPELINE, DISTRIBUTED, "training.precision=bf16", "model.share_embeddings_and_output_weights=true")),
    "interleaved, carried": (
        2, (PIPELINE, "parallel.virtual_pipeline_model_parallel_size=2", "model.num_layers=4", "memory.carry_memory=true")),
    "context, distributed": (
        2, ("parallel.context_parallel_size=2", DISTRIBUTED, "data.sequence_length=96", "training.precision=bf16")),
}  # fmt: skip


def bytes_of_runs(corpus: Path, folder: Path, settings: list[tuple[str, ...]]) -> list[dict[str, int]]:
    """Sets up each run on the ranks at hand and updates its weights once: bytes of this rank's buffers and states, and its
    place."""
    import torch.distributed as dist

    from em_megatron.training.setup import set_up

    found = []
    for index, overrides in enumerate(settings):
        config = corpora.run_config(corpus, folder, f"name=run{index}", *overrides)
        run = set_up(config, dist.get_world_size() if dist.is_initialized() else 1)
        run.optimizer.step()  # with gradients of zero; AdamW makes its moments here
        found.append({"stage": run.layout.pp_rank, "owner": run.layout.dp_rank + run.layout.cp_rank, **held(run)})
        leave_groups()
    return found


def held(run: Any) -> dict[str, int]:
    chunks = run.model
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for c in chunks for p in c.parameters()}
    state: dict[int, int] = {}
    for optimizer in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        adam = optimizer.optimizer
        master = [p for group in adam.param_groups for p in group["params"]]
        moments = [value for p in master for value in adam.state[p].values() if isinstance(value, torch.Tensor)]
        for tensor in [*master, *moments]:
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in storages:
                state[pointer] = tensor.untyped_storage().nbytes()
    return {
        "weights": sum(storages.values()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(state.values()),
        "carried": run.carried.most_bytes(len(run.batch_slots)) if run.carried is not None else 0,
    }


@pytest.fixture(scope="module")
def measured(ranks: Pools, tmp_path_factory) -> dict[str, list[dict[str, int]]]:
    """What each rank of each run holds."""
    folder = tmp_path_factory.mktemp("planned")
    corpus = corpora.chain_corpus(folder / "corpus", corpora.tokenizer(folder / "tokenizer"))
    found: dict[str, list[dict[str, int]]] = {}
    for count in (1, 2):
        names = [name for name, (size, _) in BUILT.items() if size == count]
        settings = [BUILT[name][1] for name in names]
        if count == 1:
            try:
                per_rank = [bytes_of_runs(corpus, folder / "1", settings)]
            finally:
                shutdown()
        else:
            per_rank = ranks(count).run(bytes_of_runs, corpus, folder / "2", settings, timeout=240)
        found |= {name: [rank[index] for rank in per_rank] for index, name in enumerate(names)}
    return found


@pytest.mark.parametrize("case", BUILT)
def test_bytes_of_a_run(measured, case):
    count, overrides = BUILT[case]
    config = corpora.run_config(Path("nowhere"), Path("runs"), *overrides)
    job = Job(config, count, corpora.VOCAB_SIZE)
    for rank in measured[case]:
        plan = static_bytes(job, rank["stage"], bucketed=False)
        assert (rank["weights"], rank["gradients"]) == (plan.weights, plan.gradients)
        assert rank["carried"] == carried_bytes(job, rank["stage"])
        # The padding at the end of a bucket falls to its last owner, who therefore keeps less.
        if rank["owner"] == 0 or DISTRIBUTED not in overrides:
            assert rank["optimizer"] == plan.optimizer
        else:
            assert plan.optimizer - 128 * 12 * job.chunks <= rank["optimizer"] <= plan.optimizer + 12 * 64


@pytest.mark.parametrize("ranks_of_a_replica", [8, 24, 512])
@pytest.mark.parametrize("stage", [0, 1])
def test_buckets_are_megatrons(ranks_of_a_replica, stage):
    """The distributed optimizer's buffers with buckets, by Megatron's own function on parameters without storage."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    config = load_config(
        None,
        ["name=x", "data.path=nowhere", "model.size=1b", "model.qk_layernorm=true", PIPELINE, DISTRIBUTED,
         "model.share_embeddings_and_output_weights=true", f"training.global_batch_size={ranks_of_a_replica}"],
    )  # fmt: skip
    check(config, 2 * ranks_of_a_replica)
    job = Job(config, 2 * ranks_of_a_replica, 32000)
    parameters = []
    for parameter in chunk_parameters(job, stage, 0):
        made = torch.nn.Parameter(torch.empty(parameter.elements, dtype=torch.bfloat16, device="meta"))
        made.shared_embedding = parameter.alone
        parameters.append(made)
    limit = max(40_000_000, 1_000_000 * ranks_of_a_replica) if stage == 0 else None
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    full = DistributedOptimizer.compute_full_param_layout(parameters, limit, ranks_of_a_replica, options)
    (layout,) = full.layouts.values()
    plan = static_bytes(job, stage)
    assert plan.gradients == 4 * layout.bucket_indices[-1][1]
    owned = sum(
        max(0, min(stop, begin + (end - begin) // ranks_of_a_replica) - start)
        for start, stop, bucket in layout.param_index_map.values()
        for begin, end in [layout.bucket_indices[bucket]]
    )
    assert plan.optimizer == 12 * owned
    assert math.isclose(owned, sum(p.numel() for p in parameters) / ranks_of_a_replica, rel_tol=1e-3)
