"""The plan's matrices and states of the memory against those that the kernels' host side really builds."""

from __future__ import annotations

import pytest
import torch

from em_megatron.hippo import banks as banks_module
from em_megatron.hippo.banks import MemoryBanks
from em_megatron.hippo.samplers import exponential
from em_megatron.model.language_model import handoff_kind, layer_state_bytes
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.ops.memory.triton import TritonMemory
from em_megatron.planning import memory_state
from em_megatron.planning.job import Job
from tests.one_rank import tiny_config

ORDER, SLOTS, LENGTH, BLOCKS = 20, 5, 8, 8


def job_of(*overrides: str, ranks: int = 1) -> Job:
    config = tiny_config(
        f"memory.order={ORDER}", f"memory.slots={SLOTS}", f"memory.block_length={LENGTH}",
        f"data.sequence_length={LENGTH * BLOCKS}", *overrides,
    )  # fmt: skip
    return Job(config, ranks, 24)


def built(banks: MemoryBanks) -> int:
    """Bytes of the matrices for kernels that these banks hold for good."""
    chunks = list(banks._superchunks.values())
    tensors = [value for chunk in chunks for value in vars(chunk).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def use(job: Job, rank: int) -> MemoryBanks:
    """Forward and backward of the operator on this context-parallel rank, for a document that fills the sample and for
    one that begins with each rank's part."""
    banks = MemoryBanks(ORDER, LENGTH, exponential(SLOTS, 2.0))
    part = BLOCKS * LENGTH // job.context
    for start in range(rank + 1):
        segments = torch.ones(1, BLOCKS * LENGTH, dtype=torch.int32)
        segments[:, start * part :] = 2
        layout = BlockLayout.from_segment_ids(segments, LENGTH, sequence_rank=rank, sequence_size=job.context)
        dtype = torch.bfloat16 if job.itemsize == 2 else torch.float32
        key, value = (torch.randn(part, 1, 1, 4, dtype=dtype, requires_grad=True) for _ in range(2))
        memory = TritonMemory(key, value, layout, banks, job.superchunk, dtype)
        rows = layout.entering_rows
        entering = torch.randn(ORDER, len(rows), 1, 8, requires_grad=True) if rows else None
        leaving = memory.leaving_states
        total = sum(x.float().sum() for x in memory.slots(entering))
        (total + (leaving.sum() if leaving is not None else 0)).backward()
    return banks


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        (("memory.superchunk=8",), 1),
        (("memory.superchunk=5", "training.precision=bf16"), 1),
        (("memory.superchunk=2", "parallel.context_parallel_size=2"), 2),
        (("memory.superchunk=4", "parallel.context_parallel_size=2", "training.precision=bf16"), 2),
    ],
    ids=["parallel", "superchunks", "context, superchunks", "context, parallel"],
)
def test_shared_matrices(overrides, ranks):
    job = job_of(*overrides, ranks=ranks)
    found = max(built(use(job, rank)) for rank in range(ranks))
    assert memory_state.bank_bytes(job) - memory_state._passing_bytes(job) == found


def test_matrices_of_single_blocks():
    job = job_of("memory.superchunk=1")
    banks = use(job, 0)
    chunks = [banks.block(block, torch.float32, "cpu") for block in range(BLOCKS)]
    tensors = {
        tensor.data_ptr(): tensor.nbytes
        for chunk in chunks
        for name, tensor in vars(chunk).items()
        if name.startswith("padded_") and isinstance(tensor, torch.Tensor)
    }
    assert (
        sum(tensors.values()) <= memory_state.bank_bytes(job) <= 1.5 * sum(tensors.values())
    )  # of BLOCKS, one never writes


def test_limits_and_choices_are_those_of_the_product():
    assert memory_state.PASSING_BYTES == banks_module._PASSING_BYTES
    for handoff in ("auto", "chain"):
        job = job_of("parallel.context_parallel_size=4", f"parallel.memory_handoff={handoff}", ranks=4)
        assert job.handoff == handoff_kind(job.config)
        assert job.layer_state == layer_state_bytes(job.config)


def test_without_memory_nothing_is_held():
    job = job_of("memory.kind=block_local")
    assert memory_state.bank_bytes(job) == memory_state.working_state_bytes(job) == memory_state.handoff_bytes(job) == 0


def test_carried_memory_keeps_a_shelf_of_matrices():
    job = job_of("memory.carry_memory=true")
    assert memory_state.bank_bytes(job) > memory_state.PASSING_BYTES
