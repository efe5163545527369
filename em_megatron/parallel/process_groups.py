"""Starts torch.distributed and Megatron-Core's process groups, and says where this rank stands in them."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from em_megatron.parallel import cpu_backend


@dataclass(frozen=True)
class Layout:
    """Sizes and this process's ranks of every parallel axis: world = tp × cp × dp × pp.

    `vpp_size` is the number of model chunks per pipeline stage, None without interleaving. `pg_collection` is the
    megatron.core ProcessGroupCollection to pass to models, DDP, the optimizer, schedules and finalize.
    """

    world_size: int
    world_rank: int
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    vpp_size: int | None
    cp_size: int
    cp_rank: int
    dp_size: int
    dp_rank: int
    pg_collection: Any


def validate_layout(
    world_size: int,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
) -> None:
    """Raise ValueError when these sizes cannot be laid out on `world_size` ranks."""
    sizes = {
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "context_parallel_size": context_parallel_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, but it must be at least 1.")
    model_ranks = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    if world_size % model_ranks:
        raise ValueError(
            f"One model copy takes tp {tensor_model_parallel_size} × pp {pipeline_model_parallel_size} × cp "
            f"{context_parallel_size} = {model_ranks} ranks, which does not divide the {world_size} ranks started: "
            f"start a multiple of {model_ranks} or lower one of the three sizes."
        )
    chunks = virtual_pipeline_model_parallel_size
    if chunks is None:
        return
    if pipeline_model_parallel_size == 1:
        raise ValueError(
            "virtual_pipeline_model_parallel_size interleaves pipeline stages, so it needs "
            "pipeline_model_parallel_size of 2 or more: raise that or set this one to 1."
        )
    if chunks < 2:
        raise ValueError(
            f"virtual_pipeline_model_parallel_size is {chunks}, but interleaving needs at least 2 chunks per "
            "stage: give None to switch it off."
        )


def initialize(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    timeout_minutes: int = 30,
) -> Layout:
    """Join the ranks that torchrun started (or a world of one without it) and form the parallel groups.

    Reads RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* from the environment. Without a GPU it enables the CPU backend
    and gives each rank its share of the cores. A process group that is already up is used as it is. Seeds are the
    caller's. `timeout_minutes` bounds every collective. Raises ValueError for a layout that does not fit the world.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    validate_layout(
        world_size,
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size,
        context_parallel_size,
    )
    # Tensor parallelism overlaps communication only where kernels start in the order they were queued.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if cpu_backend.enable():
        torch.set_num_threads(threads_per_rank())
    else:
        torch.cuda.set_device(cpu_backend.device())
    if not dist.is_initialized():
        _start_default_group(timeout_minutes)

    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )
    return _layout(virtual_pipeline_model_parallel_size)


def shutdown() -> None:
    """Leave all process groups; does nothing when none is up."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def threads_per_rank() -> int:
    """CPU threads for one rank: OMP_NUM_THREADS if set, else this machine's share, at least 1."""
    if wanted := os.environ.get("OMP_NUM_THREADS"):
        return max(1, int(wanted))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)


def _start_default_group(timeout_minutes: int) -> None:
    backend, timeout = cpu_backend.distributed_backend(), timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        # A plain `python launch/...`: a store inside the process needs neither an address nor a port.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def _layout(vpp_size: int | None) -> Layout:
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Layout(
        world_size=dist.get_world_size(),
        world_rank=dist.get_rank(),
        tp_size=groups.tp.size(),
        tp_rank=groups.tp.rank(),
        pp_size=groups.pp.size(),
        pp_rank=groups.pp.rank(),
        vpp_size=vpp_size,
        cp_size=groups.cp.size(),
        cp_rank=groups.cp.rank(),
        dp_size=groups.dp.size(),
        dp_rank=groups.dp.rank(),
        pg_collection=groups,
    )
