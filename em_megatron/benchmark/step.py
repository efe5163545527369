"""`step`: whole steps of the trainer with every kind of memory, beside causal attention over the whole sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from em_megatron.benchmark.floors import Work, step_work
from em_megatron.benchmark.models import (
    FULL,
    LOCAL,
    Exchange,
    beside_the_block,
    has_own_layers,
    kernels_note,
    memory_sizes,
    one_rank,
    run_config,
    variants,
)
from em_megatron.benchmark.options import StepOptions
from em_megatron.benchmark.results import Chart, Findings, Rows, Target
from em_megatron.benchmark.timing import Call, Candidate
from em_megatron.config import RunConfig
from em_megatron.kinds import kind_of
from em_megatron.model.language_model import PRECISIONS
from em_megatron.model.sizes import costs, flops_per_token, num_parameters, padded_vocab_size, shape_of
from em_megatron.parallel.process_groups import Layout
from em_megatron.training.bad_batches import BadBatches
from em_megatron.training.metrics import peak_flops
from em_megatron.training.microbatch import MicroBatch
from em_megatron.training.optimizer import build_optimizer, build_scheduler
from em_megatron.training.setup import build_chunks, connect_schedule, wrap_for_training
from em_megatron.training.step import train_step

GROUP = "training step"
TARGETS: dict[str, list[Target]] = {"cpu": [], "cuda": []}


@dataclass
class Trained:
    """A model with its optimizer and schedule, built as `training.setup.set_up` does."""

    model: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, vocabulary: int) -> Trained:
        model = wrap_for_training(config, build_chunks(config, layout, vocabulary), layout)
        optimizer = build_optimizer(config, model, layout.pg_collection)
        found = cls(model, optimizer, build_scheduler(config, optimizer))
        connect_schedule(model, optimizer)
        return found


class StepBenchmark:
    """One model, in which variants take turns by another core attention; a kind with layers of its own has its own."""

    def __init__(self, options: StepOptions, device: torch.device, stack: ExitStack) -> None:
        self.options, self.device = options, device
        overrides = [
            f"model.size={options.size}",
            f"memory.block_length={options.block}",
            f"memory.slots={options.slots}",
            f"training.global_batch_size={options.batch}",
            f"training.recompute={options.recompute}",
        ]
        self.config = run_config(overrides, options.length, options.precision, options.bank_cache, options.seed)
        self.dtype = PRECISIONS[options.precision]
        self.variants = variants(self.config, options.orders, options.kinds)
        self.layout = stack.enter_context(one_rank(self.config, device))
        self.common = Trained.of(self.config, self.layout, options.vocabulary)
        self.exchange = Exchange(self.common.model, self.variants, self.layout)
        self.vocabulary = padded_vocab_size(options.vocabulary, self.config.model.make_vocab_size_divisible_by)

    def candidates(self) -> list[Candidate]:
        return [self._candidate(name) for name in self.variants]

    def _candidate(self, name: str) -> Candidate:
        options, config = self.options, self.variants[name]

        def prepare() -> Call:
            batch, own = random_batch(options, config.memory.block_length, self.device), has_own_layers(config)
            trained = Trained.of(config, self.layout, options.vocabulary) if own else self.common

            def step() -> object:
                if not own:
                    self.exchange.put(name)
                feed: Iterator[MicroBatch] = iter([batch] * options.batch)
                parts = (trained.model, trained.optimizer, trained.scheduler)
                return train_step(config, self.layout, *parts, [feed], BadBatches(config.faults))

            return step

        shape, itemsize = shape_of(config.model), self.dtype.itemsize
        parameters = num_parameters(config.model, self.vocabulary, config.memory)
        sizes = memory_sizes(config)
        work = step_work(shape, options.batch, options.length, sizes, self.vocabulary, parameters, itemsize)
        tokens = options.batch * options.length
        work += Work(beside_the_block(config) * tokens, 0.0)
        return Candidate(GROUP, name, prepare, tokens, work, is_peer=name == FULL, resident=True)

    def findings(self, rows: Rows) -> Findings:
        found = Findings()
        for name in self.variants:
            if name not in (FULL, LOCAL):
                for kind, peer in (("full", FULL), ("local", LOCAL)):
                    text = f"speed of {name}, over {peer}"
                    found.figures.append(rows.compared(f"{kind}/{name}", text, (GROUP, peer), (GROUP, name)))
        names = [f"elastic, order {order}" for order in (min(self.options.orders), max(self.options.orders))]
        if names[0] != names[1]:
            text = f"time of a step, {names[1]} over {names[0]}"
            found.figures.append(rows.compared("orders", text, (GROUP, names[1]), (GROUP, names[0])))
        bars = {row["name"]: row["tokens_per_second"] for row in rows.group(GROUP) if row["seconds"]}
        found.charts.append(Chart("training", "tokens per second", "", bars=bars))
        found.notes = [
            kernels_note(self.config, self.device),
            self._utilization(rows),
            self._sizes(rows),
            "Floors: weights, gradients and the optimizer's numbers move; activations are left out.",
        ]
        if self.options.recompute != "none":
            found.notes.append(f"Recomputation ({self.options.recompute}) is in the times, not in the FLOPs.")
        if self.device.type == "cuda":
            held = torch.cuda.memory_allocated(self.device) / 1e9
            found.notes.append(f"Weights, gradients, optimizer and the memory's matrices hold {held:,.3g} GB.")
        return found

    def _sizes(self, rows: Rows) -> str:
        """Adds columns with floats per sequence, parameters of the kind, FLOPs per token, and what the memory is."""
        for row in rows.group(GROUP):
            config = self.variants[row["name"]]
            memory = config.memory
            cost = costs(config.model, memory, self.vocabulary, self.options.length)
            row |= dataclasses.asdict(cost)
            row["memory"] = kind_of(memory).describe(memory)
            row["details"] = row.get("details", {}) | {
                "memory floats": f"{cost.memory_floats_per_sequence:,}",
                "parameters (own)": f"{cost.parameters:,} ({cost.memory_parameters:,})",
                "GFLOP/token": f"{cost.flops_per_token / 1e9:.3g}",
                "memory": row["memory"],
            }
        return (
            "Memory floats are kept per sequence of this length over all layers; kinds with a size to choose have those of "
            f"Elastic Memory at order {min(self.options.orders)}. Own parameters are those that the kind adds."
        )

    def _utilization(self, rows: Rows) -> str:
        """Adds a column with the model FLOPs utilisation where the peak of the device is known."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        peak = peak_flops(name)
        if peak is None:
            return "MFU is not shown: the peak of this device is not known."
        for row in rows.group(GROUP):
            if row["seconds"]:
                config = self.variants[row["name"]]
                flops = flops_per_token(config.model, config.memory, self.vocabulary, self.options.length)
                row["mfu"] = row["tokens_per_second"] * flops / peak
                row["details"] = {"MFU": f"{row['mfu']:.1%}"}
        return f"MFU counts the FLOPs of `model.sizes.flops_per_token` against {peak / 1e12:,.0f} TFLOP/s."


def random_batch(options: StepOptions, block_length: int, device: torch.device) -> MicroBatch:
    """A micro-batch of one sample of random tokens, all one document."""
    generator = torch.Generator().manual_seed(options.seed)
    tokens = torch.randint(0, options.vocabulary, (1, options.length + 1), generator=generator)
    batch: dict[str, Tensor] = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(1, options.length),
        "positions": torch.arange(options.length)[None],
        "segment_ids": torch.ones(1, options.length, dtype=torch.int64),
        "history": torch.zeros(1, dtype=torch.int64),
        "continues": torch.zeros(1, dtype=torch.bool),
        "slot": torch.zeros(1, dtype=torch.int64),
    }
    return MicroBatch.from_batch(batch, block_length, device)
