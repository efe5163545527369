"""`layer`: one layer of the Megatron model with and without memory, beside causal attention over the whole sample."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from em_megatron.benchmark.floors import layer_work
from em_megatron.benchmark.memory_operator import BOTH, FORWARD
from em_megatron.benchmark.models import (
    FULL,
    LOCAL,
    Exchange,
    kernels_note,
    memory_sizes,
    one_rank,
    run_config,
    variants,
)
from em_megatron.benchmark.options import LayerOptions
from em_megatron.benchmark.results import Chart, Findings, Rows, Target
from em_megatron.benchmark.timing import Call, Candidate
from em_megatron.model.initialization import initialize_weights
from em_megatron.model.language_model import PRECISIONS, build_model
from em_megatron.model.sizes import shape_of
from em_megatron.ops.block_layout import BlockLayout

TARGETS: dict[str, list[Target]] = {"cpu": [], "cuda": []}


class LayerBenchmark:
    """The layer is a middle pipeline stage of one layer: hidden states in, hidden states out."""

    def __init__(self, options: LayerOptions, device: torch.device, stack: ExitStack) -> None:
        self.options, self.device = options, device
        overrides = [
            f"model.size={options.size}",
            "model.num_layers=1",
            f"memory.block_length={options.block}",
            f"memory.slots={options.slots}",
        ]
        self.config = run_config(overrides, options.length, options.precision, options.bank_cache, options.seed)
        self.dtype = PRECISIONS[options.precision]
        self.variants = variants(self.config, options.orders)
        layout = stack.enter_context(one_rank(self.config, device))
        self.layer = build_model(self.config, 128, layout.pg_collection, pre_process=False, post_process=False)
        self.layer.to(device)
        initialize_weights([self.layer], options.seed, self.config.model.init_method_std, 1)
        self.exchange = Exchange([self.layer], self.variants, layout)
        shape = (options.length, 1, shape_of(self.config.model).hidden_size)
        self.hidden = torch.randn(shape, device=device).to(self.dtype).requires_grad_()

    def candidates(self) -> list[Candidate]:
        return [self._candidate(name, direction) for direction in (FORWARD, BOTH) for name in self.variants]

    def _candidate(self, name: str, direction: str) -> Candidate:
        config, backward = self.variants[name], direction == BOTH
        shape, tokens = shape_of(config.model), self.options.length

        def prepare() -> Call:
            blocks = BlockLayout.single_document(1, tokens, config.memory.block_length, self.device)
            gradient = torch.randn_like(self.hidden, requires_grad=False)
            inputs = [self.hidden, *self.layer.parameters()]

            def forward() -> Tensor:
                self.exchange.put(name)
                self.layer.set_input_tensor(self.hidden)  # type: ignore[operator]
                out: Tensor = self.layer(None, None, None, packed_seq_params=blocks)
                return out

            return (lambda: torch.autograd.grad(forward(), inputs, gradient)) if backward else torch.no_grad()(forward)

        work = layer_work(shape, tokens, memory_sizes(config), self.dtype.itemsize, backward)
        return Candidate(direction, name, prepare, tokens, work, is_peer=name == FULL)

    def findings(self, rows: Rows) -> Findings:
        found = Findings()
        for direction in (FORWARD, BOTH):
            for name in self.variants:
                if name not in (FULL, LOCAL):
                    found.figures += [
                        rows.compared(f"{kind}/{direction}/{name}", f"{direction}: speed of {name}, over {peer}",
                               (direction, peer), (direction, name))
                        for kind, peer in (("full", FULL), ("local", LOCAL))
                    ]  # fmt: skip
            bars = {row["name"]: 1e3 * row["seconds"]["median"] for row in rows.group(direction) if row["seconds"]}
            found.charts.append(Chart(direction, f"ms for {self.options.length:,} tokens", "", bars=bars))
        found.notes = [
            kernels_note(self.config, self.device),
            "Floors: weights, input and output of the layer move; what lies between is left out.",
        ]
        return found
