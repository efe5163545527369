"""Runs Megatron-Core on processes without a GPU, with gloo, by patching what it asks of CUDA.

Nothing inside Megatron-Core changes and nothing here runs where a CUDA device is present. Every patch below was
taken out alone once: then something failed or, where marked [silent], went wrong without an error.
"""

import ctypes
import functools
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from em_megatron.parallel import fused_adamw

SUPPORTED_MEGATRON = (0, 19)

# The modules of megatron.core that create tensors with a literal device="cuda" on the training path.
_MODULES_WITH_LITERAL_CUDA = (
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "pipeline_parallel.schedules",
    "tensor_parallel.data",
    "transformer.utils",
    "utils",
    "models.common.embeddings.rope_utils",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
)

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h

_enabled = False


def device() -> torch.device:
    """The device of this process: cuda:LOCAL_RANK (0 when the variable is not set), or cpu without CUDA."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def distributed_backend() -> str:
    """The torch.distributed backend that fits `device()`: nccl or gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def keep_freed_memory() -> None:
    """Lets glibc keep freed buffers of up to 1 GiB for the next ones, where it would return those above 32 MiB to the
    system, which zeroes every page again at its next use: a tenth of a step on long samples. Does nothing with another C
    library, or where the environment already tunes malloc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def enable() -> bool:
    """Make Megatron-Core run on the CPU; True if it does, False (and nothing done) where CUDA is present.

    Call it before anything of Megatron-Core is built; a second call does nothing. Raises RuntimeError for a
    Megatron-Core release whose CUDA calls are not known.
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if _enabled:
        return True
    _check_version()
    keep_freed_memory()
    # Every module first, the patches after: torch.compile looks torch's objects up by identity on import.
    modules = [importlib.import_module(f"megatron.core.{name}") for name in _MODULES_WITH_LITERAL_CUDA]
    _patch_torch()
    proxy = _TorchOnCPU()
    for module in modules:
        module.torch = proxy  # type: ignore[attr-defined]
    _patch_rng()
    _patch_type_names()
    fused_adamw.install()
    _enabled = True
    return True


def _check_version() -> None:
    from megatron.core.package_info import MAJOR, MINOR, __shortversion__

    if (MAJOR, MINOR) != SUPPORTED_MEGATRON:
        wanted = ".".join(map(str, SUPPORTED_MEGATRON))
        raise RuntimeError(
            f"Running without a GPU is known to work with megatron-core {wanted} only, and {__shortversion__} "
            f"is installed: install 'megatron-core=={wanted}.*' or use a machine with a GPU."
        )


class _NoStream:
    """Stands for the current CUDA stream: on the CPU all work is done when the call returns."""

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _TorchOnCPU:
    """The torch module, except that its tensor factories make on the CPU what was asked for on CUDA."""

    def __init__(self) -> None:
        for factory in (torch.tensor, torch.zeros, torch.ones, torch.empty, torch.empty_like):
            setattr(self, factory.__name__, functools.partial(_make_on_cpu, factory))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _make_on_cpu(factory: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    if str(kwargs.get("device")).startswith("cuda"):
        kwargs["device"] = "cpu"
    kwargs.pop("pin_memory", None)
    return factory(*args, **kwargs)


def _patch_torch() -> None:
    cuda: Any = torch.cuda
    # Megatron creates most of its buffers with device=torch.cuda.current_device().
    cuda.current_device = lambda: torch.device("cpu")
    # DistributedDataParallel orders its reductions by streams.
    cuda.current_stream = lambda *args, **kwargs: _NoStream()
    # Batched point-to-point transfers and the checkpoint writer wait for the device.
    cuda.synchronize = lambda *args, **kwargs: None
    # The RNG tracker reads the state of the generator that dropout will use.
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    # [silent] Without a device torch only queues the seed and never applies it.
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    # RoPE under context parallelism, finalize_model_grads and the distributed optimizer move tensors this way.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _patch_rng() -> None:
    from megatron.core.tensor_parallel import random

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    # [silent] The original setter is queued for CUDA and never run, so recomputed dropout differs.
    random._set_cuda_rng_state = set_state
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    # The tracker warns when the CPU generator moves inside its context, which here is what it is for.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _patch_type_names() -> None:
    from megatron.core.models.mimo import optimizer as mimo_optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    # These three sort or check parameters by the string that param.type() returns.
    for cls in (optimizer.Float16OptimizerWithFloat16Params, distrib_optimizer.DistributedOptimizer):
        cls.__init__ = _with_cuda_type_names(cls.__init__)
    clip = _with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    for module in (clip_grads, optimizer, mimo_optimizer):
        module.clip_grad_by_total_norm_fp32 = clip


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, during which tensor.type() without arguments answers as a CUDA tensor would."""
    plain_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and self.dtype in _CUDA_TYPE_NAMES:
            return _CUDA_TYPE_NAMES[self.dtype]
        return plain_type(self, *args, **kwargs)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        torch.Tensor.type = cuda_type  # type: ignore[method-assign, assignment]
        try:
            return function(*args, **kwargs)
        finally:
            torch.Tensor.type = plain_type  # type: ignore[method-assign]

    return wrapped
