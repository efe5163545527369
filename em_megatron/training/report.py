"""What a run says of itself before its first step."""

from __future__ import annotations

import torch

from em_megatron.config import RunConfig
from em_megatron.data.blend import Phase
from em_megatron.kinds import kind_of
from em_megatron.model.language_model import PRECISIONS, handoff_kind, layer_state_bytes
from em_megatron.model.sizes import (
    flops_per_token,
    memory_floats_per_sequence,
    memory_layers,
    memory_parameters,
    num_parameters,
    padded_vocab_size,
    shape_of,
)
from em_megatron.ops.dispatch import choose
from em_megatron.parallel.handoff_cost import received_bytes, ring_attention_bytes, state_bytes
from em_megatron.training.setup import Run


def describe_run(run: Run) -> str:
    """A few lines: model, memory, data, layout, folder."""
    config, layout, memory = run.config, run.layout, run.config.memory
    shape = shape_of(config.model)
    vocab = padded_vocab_size(run.corpus.vocabulary.size, config.model.make_vocab_size_divisible_by)
    flops = flops_per_token(
        config.model, memory, vocab, config.data.sequence_length, config.parallel.context_parallel_size
    )
    layers, kind = len(memory_layers(memory, shape.num_layers)), kind_of(memory)
    blocks = config.data.sequence_length // memory.block_length
    interleaved = f" × {layout.vpp_size} chunks" if layout.vpp_size else ""
    lines = [
        f"run     {config.run_dir}, step {run.state.step} of {config.training.train_steps}",
        f"model   {num_parameters(config.model, vocab, memory):,} parameters{_own(config)}, {shape.num_layers} layers × "
        f"{shape.hidden_size}, vocabulary {vocab}, {flops / 1e6:,.1f} MFLOP per token, {config.training.precision}",
        f"memory  {memory.kind} in {layers} of {shape.num_layers} layers: {kind.describe(memory)}, "
        f"{memory_floats_per_sequence(config.model, memory, config.data.sequence_length):,} floats per sequence"
        f"{' of this length' if kind.grows else ''}",
        *_corpora(run),
        f"samples {config.data.sequence_length} tokens = {blocks} blocks of {memory.block_length}, "
        f"{config.training.global_batch_size} samples a step",
        f"kernels {_kernels(config, run.device)}",
        f"layout  {layout.world_size} ranks on {run.device.type}: tensor {layout.tp_size}, pipeline "
        f"{layout.pp_size}{interleaved}, context {layout.cp_size}, data {layout.dp_size}",
    ]
    if layout.cp_size > 1 and layers and memory.kind == "elastic":
        lines.append(f"context {describe_handoff(config)}")
    if run.carried is not None:
        held = run.carried.most_bytes(len(run.batch_slots))
        lines.append(f"carried states from step to step, up to {held / 1e6:,.3g} MB on a rank")
    return "\n".join(lines)


def _corpora(run: Run) -> list[str]:
    """A line per corpus: its share, size, and how much of its samples is padding."""
    lines = []
    for member, stream, share in zip(
        run.corpus.members, run.stream.streams, run.corpus.blend.phases[0].shares, strict=True
    ):
        part = f"{100 * float(share):.4g} % of the samples, " if len(run.corpus.members) > 1 else ""
        lines.append(
            f"data    {member.source.location}: {part}{member.manifest.tokens('train'):,} tokens in "
            f"{len(stream.reader):,} documents, {100 * stream.efficiency:.1f} % of a sample's tokens are text"
        )
    return lines + [
        f"        from sample {phase.start} on: {_shares(run, phase)}" for phase in run.corpus.blend.phases[1:]
    ]


def _shares(run: Run, phase: Phase) -> str:
    members = zip(run.corpus.members, phase.shares, strict=True)
    return ", ".join(f"{member.name} {100 * float(share):.4g} %" for member, share in members)


def _own(config: RunConfig) -> str:
    """How many of the parameters are the memory kind's, where it has any."""
    own = memory_parameters(config.model, config.memory)
    return f" ({own:,} of them {config.memory.kind}'s)" if own else ""


def _kernels(config: RunConfig, device: torch.device) -> str:
    chosen = choose(
        config.memory.kernels, device, PRECISIONS[config.training.precision], shape_of(config.model).kv_channels
    )
    return f"{chosen.name} for memory and attention ({chosen.reason})"


def describe_handoff(config: RunConfig) -> str:
    """What context parallelism moves per layer, beside what ring attention would move for the same sample."""
    ranks, kind, state = config.parallel.context_parallel_size, handoff_kind(config), layer_state_bytes(config)
    tokens, itemsize = config.data.sequence_length // ranks, PRECISIONS[config.training.precision].itemsize
    channels = state // state_bytes(config.memory.order, 1)
    received, ring = received_bytes(kind, ranks, state), ring_attention_bytes(ranks, tokens, channels, itemsize)
    return (
        f"{ranks} ranks × {tokens} tokens; states by {kind}: up to {received / 1e6:,.3g} MB into a rank per layer and "
        f"micro-batch forward, as much backward (ring attention: {ring / 1e6:,.3g} MB of keys and values forward, "
        f"{ring / received:.3g} times as much)"
    )
