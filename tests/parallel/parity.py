"""Three training steps on whatever ranks there are, with everything kept that must not depend on the layout.

Each rank returns its parts of global tensors (gradients and weights by name, gradients of the input, memory slots and
states); `error` compares them with the whole tensors of a run on one rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from em_megatron.config import RunConfig, load_config
from tests.parallel.documents import batch, successive

VOCABULARY, SAMPLES, STEPS = 48, 8, 3
# Odd sizes: blocks of 5 tokens, 8 of them, order 7, 3 slots.
RUN = (
    "name=parity",
    "data.path=nowhere",
    "data.sequence_length=40",
    "memory.block_length=5",
    "memory.order=7",
    "memory.slots=3",
    "memory.sampler=exponential",
    "memory.bank_cache=null",
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.kv_channels=8",
    "model.ffn_hidden_size=40",
    "model.init_method_std=0.15",
    "model.make_vocab_size_divisible_by=8",
    "training.precision=fp32",
    "training.train_steps=10",
    f"training.global_batch_size={SAMPLES}",
    "optimizer.lr=1e-2",
    "optimizer.warmup_steps=1",
    # Adam divides by |g| + ε: with a small ε a gradient of rounding size would move a weight as far as any other.
    "optimizer.epsilon=1e-3",
)

Slices = tuple[tuple[int, int], ...]


@dataclass
class Parts:
    """Pieces of global tensors by name: where they lie, and their values."""

    pieces: dict[str, list[tuple[Slices, Tensor]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, where: list[tuple[int, int]], value: Tensor) -> None:
        self.pieces[name].append((tuple(where), value.detach().double().cpu()))

    def whole(self, name: str) -> Tensor:
        """The global tensor, of a run in which one rank has all of it; NaN where it has nothing."""
        pieces = self.pieces[name]
        shape = [max(where[axis][1] for where, _ in pieces) for axis in range(len(pieces[0][0]))]
        out = torch.full(shape, float("nan"), dtype=torch.float64)
        for where, value in pieces:
            out[tuple(slice(*bounds) for bounds in where)] = value
        return out


def error(name: str, truth: Parts, ranks: list[Parts], whole: bool) -> float:
    """The largest ‖part − truth‖ / ‖truth‖ of any part of any rank; with `whole` all of the tensor must be there."""
    expected = truth.whole(name)
    seen = torch.zeros(expected.shape, dtype=torch.bool)
    scale, worst = expected.nan_to_num().norm(), 0.0
    for parts in ranks:
        for where, value in parts.pieces.get(name, []):
            at = tuple(slice(*bounds) for bounds in where)
            seen[at] = True
            worst = max(worst, float((value - expected[at]).norm() / scale))
    assert not whole or bool(seen.all()), f"{name}: no rank has all of it"
    return worst


@dataclass
class Outcome:
    """What a rank saw: loss and gradient norm of every step, and its parts."""

    losses: list[float]
    grad_norms: list[float]
    parts: Parts


def config_of(overrides: tuple[str, ...]) -> RunConfig:
    return load_config(None, [*RUN, *overrides])


def global_batch(config: RunConfig, step: int) -> dict[str, Tensor]:
    """The whole samples of a step; documents go on from step to step where memory is carried."""
    blocks = config.data.sequence_length // config.memory.block_length
    sizes = (SAMPLES, blocks, config.memory.block_length, VOCABULARY)
    return successive(7, *sizes, STEPS)[step] if config.memory.carry_memory else batch(step, *sizes)


def run_case(overrides: tuple[str, ...]) -> Outcome:
    """Trains `STEPS` steps of the same global batches under a layout."""
    return Trained(config_of(overrides)).run()


class Trained:
    """A run put together from the product's own pieces, on hand-made batches."""

    def __init__(self, config: RunConfig) -> None:
        from megatron.core import tensor_parallel

        from em_megatron.model.language_model import attach_carried_memory
        from em_megatron.parallel import cpu_backend
        from em_megatron.training import setup
        from em_megatron.training.optimizer import build_optimizer, build_scheduler
        from em_megatron.validate import validate

        validate(config, dist.get_world_size())
        self.config, self.layout = config, setup.initialize_layout(config)
        self.device = cpu_backend.device()
        tensor_parallel.model_parallel_cuda_manual_seed(config.seed, force_reset_rng=True)
        self.chunks = setup.build_chunks(config, self.layout, VOCABULARY)
        self.model = setup.wrap_for_training(config, self.chunks, self.layout)
        self.optimizer = build_optimizer(config, self.model, self.layout.pg_collection)
        self.scheduler = build_scheduler(config, self.optimizer)
        setup.connect_schedule(self.model, self.optimizer)
        self.carried = attach_carried_memory(self.model) if config.memory.carry_memory else None
        self.recorded_step = STEPS - 1 if config.memory.carry_memory else 0  # a step in which documents go on
        self.parts = Parts()

    def run(self) -> Outcome:
        from em_megatron.training.bad_batches import BadBatches
        from em_megatron.training.step import train_step

        losses, norms, bad = [], [], BadBatches(self.config.faults)
        for step in range(STEPS):
            feeds = [self._micro_batches(step) for _ in self.model]
            with self._recording() if step == self.recorded_step else nullcontext():
                result = train_step(self.config, self.layout, self.model, self.optimizer, self.scheduler, feeds, bad)
            if self.carried is not None:
                self.carried.advance()
            losses.append(result.loss)
            norms.append(result.grad_norm)
        self._keep_parameters("weight")
        return Outcome(losses, norms, self.parts)

    def _micro_batches(self, step: int) -> Iterator[Any]:
        from em_megatron.training.microbatch import MicroBatch

        layout, size = self.layout, self.config.training.micro_batch_size
        whole = global_batch(self.config, step)
        for first in range(layout.dp_rank * size, SAMPLES, layout.dp_size * size):
            rows = {name: value[first : first + size] for name, value in whole.items()}
            yield MicroBatch.from_batch(
                rows, self.config.memory.block_length, self.device, layout.cp_rank, layout.cp_size
            )

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Keeps gradients of parameters and input, memory slots and entering states of a step."""
        from em_megatron.model import elastic_attention

        step, slots = self.optimizer.step, elastic_attention.LayerMemory.slots

        def recorded_step() -> Any:
            self._keep_gradients()
            return step()

        def recorded_slots(memory: Any) -> Any:
            found = slots(memory)
            self._keep_memory(memory, found)
            return found

        hook = None
        if self.layout.pp_rank == 0:
            hook = self.chunks[0].get_submodule(self._embedding()).register_forward_hook(self._keep_input_gradient)
        with (
            patch.object(self.optimizer, "step", recorded_step),
            patch.object(elastic_attention.LayerMemory, "slots", recorded_slots),
        ):
            yield
        if hook is not None:
            hook.remove()

    def _embedding(self) -> str:
        return next(name for name, _ in self.chunks[0].named_modules() if name.split(".")[-1] == "embedding")

    def _keep_input_gradient(self, module: Any, args: Any, out: Tensor) -> None:
        """The gradient of the summed loss by what enters the first layer: [tokens of this rank, b, hidden]."""
        count = getattr(self, "_embedded", 0)
        self._embedded = count + 1
        first = (count * self.layout.dp_size + self.layout.dp_rank) * out.shape[1]
        tokens = out.shape[0]
        start = self.layout.cp_rank * (self.config.data.sequence_length // self.layout.cp_size)
        if self.config.parallel.sequence_parallel:
            start += self.layout.tp_rank * tokens
        where = [(start, start + tokens), (first, first + out.shape[1]), (0, out.shape[2])]
        out.register_hook(lambda gradient: self.parts.add("input gradient", where, gradient))

    def _keep_memory(self, memory: Any, slots: tuple[Tensor, Tensor]) -> None:
        layout, layer, heads = memory.layout, memory.core.layer, slots[0].shape[3]
        head = (self.layout.tp_rank * heads, (self.layout.tp_rank + 1) * heads)
        blocks = (layout.sequence_rank * layout.num_blocks, (layout.sequence_rank + 1) * layout.num_blocks)
        rows = (layout.slots[0], layout.slots[-1] + 1)
        both = torch.cat(slots, -1)
        where = [blocks, (0, both.shape[1]), rows, head, (0, both.shape[-1])]
        self.parts.add(f"slots of layer {layer}", where, both)
        if memory.state is None:
            return
        for column, row in enumerate(layout.entering_rows):
            state, sample = memory.state[:, column], layout.slots[row]
            where = [(0, state.shape[0]), head, (0, state.shape[-1])]
            token = blocks[0] * layout.block_length
            self.parts.add(f"state of layer {layer}, sample {sample}, before token {token}", where, state)

    def _keep_gradients(self) -> None:
        for chunk in self.model:
            if self.config.parallel.use_distributed_optimizer:
                self._gather_gradients(chunk)
            weights = [parameter.detach().clone() for parameter in chunk.parameters()]
            with torch.no_grad():
                for parameter in chunk.parameters():
                    parameter.copy_(parameter.main_grad)
            self._keep_parameters("gradient", [chunk])
            with torch.no_grad():
                for parameter, weight in zip(chunk.parameters(), weights, strict=True):
                    parameter.copy_(weight)

    def _gather_gradients(self, chunk: Any) -> None:
        """The distributed optimizer leaves each rank its share of the reduced gradients: puts them together."""
        group = self.layout.pg_collection.dp_cp
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            for bucket in buffer.buckets:
                shares = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(shares, shares[group.rank()].clone(), group=group)

    def _keep_parameters(self, what: str, chunks: list[Any] | None = None) -> None:
        from megatron.core.utils import unwrap_model

        from em_megatron.model.initialization import _sharded_parts

        for model in unwrap_model(self.model if chunks is None else chunks):
            for part in _sharded_parts(model.sharded_state_dict()):
                where = [(bounds.start, bounds.stop) for bounds in part.global_slice()]
                self.parts.add(f"{what} of {part.key}", where, part.data.clone())


def entering_states(overrides: tuple[str, ...], at: set[tuple[int, int, int]]) -> Parts:
    """On one rank: the reference states {(layer, sample, token)}, stepped token run by token run from the layer's signal."""
    from em_megatron.model import elastic_attention
    from em_megatron.ops.memory import memory_write

    trained, signals = Trained(config_of(overrides)), {}
    original = elastic_attention.LayerMemory.__init__

    def recorded(memory: Any, core: Any, key: Tensor, value: Tensor, layout: Any) -> None:
        for column, sample in enumerate(layout.slots):
            signals[core.layer, sample] = torch.cat([key, value], -1)[:, column].detach().double().cpu()
        original(memory, core, key, value, layout)

    with patch.object(elastic_attention.LayerMemory, "__init__", recorded), torch.no_grad():
        for micro in trained._micro_batches(0):
            trained.model[0](micro.tokens, None, None, labels=micro.labels, packed_seq_params=micro.layout)
    segments = global_batch(trained.config, 0)["segment_ids"]
    parts = Parts()
    for layer, sample, token in at:
        first = token
        while first > 0 and segments[sample, first - 1] == segments[sample, token]:
            first -= 1
        signal = signals[layer, sample][first:token]
        state = memory_write(signal.new_zeros(trained.config.memory.order, *signal.shape[1:]), signal, 0)
        name = f"state of layer {layer}, sample {sample}, before token {token}"
        parts.add(name, [(0, size) for size in state.shape], state)
    return parts
