"""A rank of a world of any size in this process, with tensors that have shapes but no data: what a GPU would allocate.

Model, schedules, recomputation and autograd are the product's own; collectives do nothing, and the Triton kernels are
not launched (they write into tensors that their callers have allocated). Two modules that differ between CPU and GPU
are put in place as a GPU has them: RMSNorm keeps its input and one number a row (as `aten::_fused_rms_norm` does for
CUDA), SwiGLU is one fused function that keeps its input. Nothing is computed, so real sizes take a second or two.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from em_megatron.config import RunConfig
from em_megatron.parallel.process_groups import Layout, shutdown


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made while it is active and still referenced, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._known: dict[int, tuple[int, str]] = {}
        self._at_peak: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self._see(value, str(func))
        return out

    def _see(self, value: Tensor, name: str) -> None:
        storage = value.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known or not size:
            return
        self._known[key] = (size, f"{name} {tuple(value.shape)} {value.dtype}")
        weakref.finalize(storage, self._gone, key)
        self.now += size
        if self.now > self.most:
            self.most, self._at_peak = self.now, dict(self._known)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)[0]

    def forget_peak(self) -> None:
        """From here on, `most` counts anew."""
        self.most, self._at_peak = self.now, {}

    def at_peak(self) -> dict[str, int]:
        """Bytes by operator and shape when `most` was reached, for whoever looks into a difference."""
        found: dict[str, int] = {}
        for size, name in self._at_peak.values():
            found[name] = found.get(name, 0) + size
        return dict(sorted(found.items(), key=lambda item: -item[1]))


class FusedNorm(torch.autograd.Function):
    """The allocations of torch's CUDA kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rstd = x.new_zeros((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, rstd)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad.clone(), torch.zeros_like(ctx.saved_tensors[1])


class FusedSwiglu(torch.autograd.Function):
    """The allocations of Megatron's compiled function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x[..., : x.shape[-1] // 2].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])


class NoKernel:
    """Stands for a kernel: a launch does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


class SizesOfBanks:
    """Stands for the memory's matrices: their shapes for the launches, without them."""

    def __init__(self, order: int, slots: int, block_length: int) -> None:
        self.order, self.slots, self.block_length = order, slots, block_length

    def make_room(self, blocks: int) -> None:
        pass

    def carry(self, start: int, stop: int, dtype: torch.dtype, device: Any) -> Tensor:
        return torch.empty(self.order, self.order, dtype=dtype)

    def superchunk(self, start: int, blocks: int, dtype: torch.dtype, device: Any) -> Any:
        nothing = torch.empty(0, 0)
        return SimpleNamespace(
            start_block=start, num_blocks=blocks, padded_inject=nothing, padded_carry=nothing,
            padded_read_carry=nothing, packed_triangle=nothing,
        )  # fmt: skip

    def block(self, block: int, dtype: torch.dtype, device: Any) -> Any:
        return self.superchunk(block, 1, dtype, device)


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[FakeTensorMode]:
    """torch.distributed as this rank of such a world sees it, on fake tensors."""
    from em_megatron.parallel import cpu_backend

    cpu_backend.enable()
    threads = torch.get_num_threads()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with ExitStack() as stack:
            stack.enter_context(forms_of_a_gpu())
            for target, name, value in _without_numbers():
                stack.enter_context(patch.object(target, name, value))
            yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    finally:
        shutdown()
        torch.set_num_threads(threads)


@contextmanager
def forms_of_a_gpu() -> Iterator[None]:
    """RMSNorm and SwiGLU keep for the backward pass what they keep on a GPU; what they compute is not looked at."""
    from megatron.core.transformer import mlp

    from em_megatron.model import language_model, norm

    whole = language_model.transformer_config

    def fused(config: RunConfig) -> Any:
        return dataclasses.replace(whole(config), bias_activation_fusion=True)

    with (
        patch.object(language_model, "transformer_config", fused),
        patch.object(norm.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x, self.weight)),
        patch.object(mlp, "bias_swiglu_impl", lambda x, *_: FusedSwiglu.apply(x)),
    ):
        yield


def _without_numbers() -> list[tuple[Any, str, Any]]:
    """What needs numbers, or would keep a tensor without them for others: (where, name, in its place)."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    from em_megatron.model import elastic_attention
    from em_megatron.ops import rotary
    from em_megatron.ops.memory import kernels as memory_kernels
    from em_megatron.ops.trapezoid_attention import kernels as attention_kernels
    from em_megatron.ops.trapezoid_attention import triton as attention

    def banks(config: Any) -> SizesOfBanks:
        return SizesOfBanks(config.memory.order, config.memory.slots, config.memory.block_length)

    kernels = [
        (module, name, NoKernel())
        for module in (memory_kernels, attention_kernels)
        for name in vars(module)
        if name.endswith("_kernel")
    ]
    return [
        *kernels,
        (elastic_attention.ElasticTransformerConfig, "banks", banks),
        (attention, "rotary_tables", rotary._tables),
        (torch.nn.Module, "bfloat16", lambda self: self),  # parameters are made in their dtype, on their device
        (torch.nn.Module, "to", lambda self, *_: self),
        (CudaRNGStatesTracker, "fork", lambda self, *_: nullcontext()),
    ]


@dataclass(frozen=True)
class Measured:
    """Bytes of a rank: weights and gradient buffers, and the most that a step had beside them, by operator and shape too."""

    weights: int
    gradients: int
    peak: int
    at_peak: dict[str, int]


def measure(config: RunConfig, rank: int, world_size: int, vocab_size: int) -> Measured:
    """Forward and backward passes of one step, as the product runs them, on samples of one document each."""
    from megatron.core import tensor_parallel

    from em_megatron.training import setup
    from em_megatron.training.step import forward_step, run_schedule

    with fake_rank(rank, world_size), LiveBytes() as live:
        layout = setup.initialize_layout(config)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        chunks = setup.build_chunks(config, layout, vocab_size, initialize=False)
        model = setup.wrap_for_training(config, chunks, layout)
        gradients = sum(buffer.grad_data.nbytes for chunk in model for buffer in chunk.buffers)
        static = live.now
        live.forget_peak()
        data = [_micro_batches(config, layout) for _ in model]
        count = config.training.global_batch_size // (config.training.micro_batch_size * layout.dp_size)
        run_schedule(forward_step, data, model, config, count, config.training.micro_batch_size, forward_only=False)
        return Measured(static - gradients, gradients, live.most - static, live.at_peak())


def _micro_batches(config: RunConfig, layout: Layout) -> Iterator[Any]:
    from em_megatron.ops.block_layout import BlockLayout
    from em_megatron.training.microbatch import MicroBatch

    rows, size = config.training.micro_batch_size, layout.cp_size
    tokens = config.data.sequence_length // size
    with _disable_current_modes():  # the layout is read off real numbers
        documents = BlockLayout.from_segment_ids(
            torch.ones(rows, size * tokens, dtype=torch.int32),
            config.memory.block_length,
            sequence_rank=layout.cp_rank,
            sequence_size=size,
        )
    while True:
        shown = dataclasses.replace(
            documents,
            segment_ids=torch.empty(rows, tokens, dtype=torch.int32),
            memory_tokens=torch.empty(rows, tokens, dtype=torch.bool),
        )
        dtypes = (torch.int64, torch.int64, torch.float32, torch.int64)
        yield MicroBatch(*[torch.empty(rows, tokens, dtype=dtype) for dtype in dtypes], layout=shown)
