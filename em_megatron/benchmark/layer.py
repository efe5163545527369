"""`layer`: one layer of the Megatron model with and without memory, beside causal attention over the whole sample."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import torch
from torch import Tensor

from em_megatron.benchmark.floors import MemorySizes, Work, layer_work
from em_megatron.benchmark.memory_operator import BOTH, FORWARD
from em_megatron.benchmark.models import (
    FULL,
    LOCAL,
    Exchange,
    beside_the_block,
    kernels_note,
    memory_sizes,
    one_rank,
    run_config,
    variants,
)
from em_megatron.benchmark.options import LayerOptions
from em_megatron.benchmark.results import Chart, Findings, Rows, Target
from em_megatron.benchmark.timing import Call, Candidate
from em_megatron.config import RunConfig
from em_megatron.model.initialization import initialize_weights
from em_megatron.model.language_model import PRECISIONS, build_model, positions_per_sample
from em_megatron.model.sizes import shape_of
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.parallel.process_groups import Layout
from em_megatron.validate import validate

MELODI_WINDOW = 512  # its paper's; S = U = 64, L_inc = 32, G = 4096 are the defaults of the memory section
MELODI_LAYERS = {"none": "short-term tokens alone", "all": "long-term layer"}  # by memory.layers
_OVER_MELODI = [
    Target(f"melodi, window {MELODI_WINDOW}, {layer}/{BOTH}/elastic, order 540", "at least", 2.0)
    for layer in MELODI_LAYERS.values()
]
TARGETS: dict[str, list[Target]] = {"cpu": _OVER_MELODI, "cuda": _OVER_MELODI}


class LayerBenchmark:
    """The layer is a middle pipeline stage of one layer: hidden states in, hidden states out.

    Melodi's layer is a long-term one or not; as the last of its model it makes no summary tokens for a next layer, which
    is in its favour. Its input has the summary tokens of every window.
    """

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
        self.hidden = self._hidden(options.length)
        self.melodi = {
            f"melodi, window {window}, {title}": (window, layers)
            for window in dict.fromkeys((MELODI_WINDOW, options.block))
            for layers, title in MELODI_LAYERS.items()
            if options.length % window == 0 and options.length > window
        }
        self.melodi_layers = {name: self._melodi(layout, *kind) for name, kind in self.melodi.items()}

    def _hidden(self, positions: int) -> Tensor:
        shape = (positions, 1, shape_of(self.config.model).hidden_size)
        return torch.randn(shape, device=self.device).to(self.dtype).requires_grad_()

    def _melodi(self, layout: Layout, window: int, layers: str) -> tuple[RunConfig, torch.nn.Module]:
        memory = dataclasses.replace(self.config.memory, kind="melodi", block_length=window, layers=layers)
        config = dataclasses.replace(self.config, memory=memory)
        validate(config, 1)
        layer = build_model(config, 128, layout.pg_collection, pre_process=False, post_process=False).to(self.device)
        initialize_weights([layer], self.options.seed, config.model.init_method_std, 1)
        return config, layer

    def candidates(self) -> list[Candidate]:
        return [
            candidate
            for direction in (FORWARD, BOTH)
            for candidate in (
                *(self._candidate(name, direction) for name in self.variants),
                *(self._melodi_candidate(name, direction) for name in self.melodi_layers),
            )
        ]

    def _melodi_candidate(self, name: str, direction: str) -> Candidate:
        (config, layer), backward, tokens = self.melodi_layers[name], direction == BOTH, self.options.length
        window = config.memory.block_length

        def prepare() -> Call:
            hidden = self._hidden(positions_per_sample(config))
            blocks = BlockLayout.single_document(1, tokens, window, self.device)
            gradient = torch.randn_like(hidden, requires_grad=False)
            inputs = [hidden, *layer.parameters()]

            def forward() -> Tensor:
                layer.set_input_tensor(hidden)  # type: ignore[operator]
                out: Tensor = layer(None, None, None, packed_seq_params=blocks)
                return out

            return (lambda: torch.autograd.grad(forward(), inputs, gradient)) if backward else torch.no_grad()(forward)

        local = MemorySizes(1, 0, window, tokens)
        work = layer_work(shape_of(config.model), tokens, local, self.dtype.itemsize, backward)
        work += Work(beside_the_block(config) * tokens * (1.0 if backward else 1 / 3), 0.0)
        return Candidate(direction, name, prepare, tokens, work)

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
                    found.figures += [
                        rows.compared(f"{peer}/{direction}/{name}", f"{direction}: speed of {name}, over {peer}",
                               (direction, peer), (direction, name))
                        for peer in self.melodi
                    ]  # fmt: skip
            bars = {row["name"]: 1e3 * row["seconds"]["median"] for row in rows.group(direction) if row["seconds"]}
            found.charts.append(Chart(direction, f"ms for {self.options.length:,} tokens", "", bars=bars))
        found.notes = [
            kernels_note(self.config, self.device),
            "Melodi goes through its windows one after another; with the defaults of its paper S = U = 64, L_inc = 32, G = "
            "4096. One of a model's layers is a long-term layer. Where one window keeps the whole machine busy, as on a few "
            "CPU cores, going one after another costs little, and what is left is its work on summary and memory tokens.",
            "Floors: weights, input and output of the layer move; what lies between is left out.",
        ]
        return found
