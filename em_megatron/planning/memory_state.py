"""Bytes of the memory itself on a rank: its matrices (banks), the states of a layer at work, states carried over steps.

Matrices are shared by all layers. Those that read (triangle, read_carry) are in the dtype of memory.bank_dtype, those of
states (inject, carry) in fp32, with the order padded for the kernels. Documents that begin with a rank's part of a
sample share its superchunks, one set for each part that such a document can begin at; others go block by block,
with matrices kept up to a limit (em_megatron/ops/memory/schedule.py, em_megatron/hippo/banks.py).
"""

from __future__ import annotations

from em_megatron.hippo.banks import ORDER_MULTIPLE
from em_megatron.parallel.handoff_cost import state_bytes
from em_megatron.planning.job import Job

STATE_ITEM = 4
PASSING_BYTES = 4 * 2**30  # of matrices that banks.py keeps for documents that begin anywhere


def padded_order(job: Job) -> int:
    """N rounded up as the kernels need it."""
    return -(-job.config.memory.order // ORDER_MULTIPLE) * ORDER_MULTIPLE


def bank_bytes(job: Job) -> int:
    """Matrices on the rank of a context-parallel group that holds most of them: the last, which documents reach from
    everywhere, or the one before it, which they also leave."""
    if not job.memory_layers:
        return 0
    if job.superchunk == 1:
        return _single_blocks(job, job.blocks) + _passing_bytes(job)
    last = job.context - 1
    shared = [
        sum(_set_bytes(job, part * job.blocks, leaves) for part in range(rank + 1))
        for rank, leaves in ((last, job.config.memory.carry_memory), (last - 1, True))
    ]
    return max(shared) + _passing_bytes(job)


def _set_bytes(job: Job, start: int, leaves: bool) -> int:
    """The superchunks of a rank's part for documents with `start` blocks before it, which leave it at its end or not."""
    starts = range(0, job.blocks, job.superchunk)
    total = 0
    for offset in starts:
        blocks = min(job.superchunk, job.blocks - offset)
        writes = leaves or offset + blocks < job.blocks
        total += superchunk_bytes(job, start + offset, blocks, writes, writes and len(starts) > 1)
    return total


def superchunk_bytes(job: Job, start_block: int, blocks: int, writes: bool, carries: bool) -> int:
    """Matrices of one superchunk; whether a state is written at its end, and one moved there from its start."""
    memory, order = job.config.memory, padded_order(job)
    item = 4 if memory.bank_dtype == "fp32" else job.itemsize
    elements = memory.slots * memory.block_length * (blocks * (blocks - 1) // 2)
    elements += blocks * memory.slots * order if start_block else 0
    state = order * blocks * memory.block_length * writes + order * order * (carries and start_block > 0)
    return elements * item + state * STATE_ITEM


def _single_blocks(job: Job, blocks: int) -> int:
    """An inject and a carry for each block, and one read for all."""
    memory, order = job.config.memory, padded_order(job)
    each = STATE_ITEM * order * (order + memory.block_length)
    return blocks * each + memory.slots * order * job.itemsize


def _passing_bytes(job: Job) -> int:
    """Matrices of documents that begin within a part and leave it, or come from another step."""
    if not job.passes_states:
        return 0
    if job.config.memory.carry_memory:  # their blocks are without number
        return PASSING_BYTES
    carries = (job.context - 1) * STATE_ITEM * job.config.memory.order**2
    return min(PASSING_BYTES, _single_blocks(job, job.blocks * job.context) + carries)


def working_state_bytes(job: Job) -> int:
    """States of one layer and micro-batch while it is computed: their values and their gradients."""
    if not job.memory_layers:
        return 0
    rows, between = job.config.training.micro_batch_size, -(-job.blocks // job.superchunk) - 1
    channels = job.kv_heads * 2 * job.shape.kv_channels
    copies = 3 if job.passes_states else 2
    states = rows * (between + (2 if job.passes_states else 0))
    return copies * state_bytes(padded_order(job), states * channels, STATE_ITEM)


def carried_bytes(job: Job, stage: int) -> int:
    """States kept from step to step: one read and one written for each sample of the rank and memory layer."""
    if not job.config.memory.carry_memory:
        return 0
    slots = job.micro_batches * job.config.training.micro_batch_size
    channels = job.kv_heads * 2 * job.shape.kv_channels
    each = state_bytes(job.config.memory.order, channels, STATE_ITEM)
    return 2 * slots * sum(job.memory_layers_of(stage)) * each


def handoff_bytes(job: Job) -> int:
    """States on their way between context-parallel ranks: everyone's and one's own, or what a chain passes on."""
    if job.context == 1 or not job.memory_layers:
        return 0
    return job.layer_state * (job.context + 1 if job.handoff == "all_gather" else 3)
