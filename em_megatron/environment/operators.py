"""Which implementation each operator takes here, read from the code that decides it, for a run with default options."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from em_megatron.environment.report import Row, cause

if TYPE_CHECKING:
    from em_megatron.ops.dispatch import Choice

HEAD_DIMS = (64, 128)
ORIGINS = {  # first part of a module's name → who brings it
    "transformer_engine": "Transformer Engine",
    "transformer_engine_torch": "Transformer Engine",
    "apex": "apex",
    "amp_C": "apex",
    "megatron": "Megatron-Core",
    "em_megatron": "this project",
}


def cpu_backend() -> Iterator[Row]:
    """Without a GPU Megatron-Core is patched, which is done for known releases only."""
    from em_megatron.parallel import cpu_backend

    if cpu_backend.enable():
        yield Row("CPU backend", "Megatron-Core is patched to run without a GPU")


def block_operators() -> Iterator[Row]:
    """Memory operator and trapezoidal attention, whose one decision is `ops.dispatch.choose`."""
    import torch

    from em_megatron.ops.dispatch import choose
    from em_megatron.parallel.cpu_backend import device

    kinds: dict[Choice, list[str]] = {}
    for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        for head_dim in HEAD_DIMS:
            kinds.setdefault(choose("auto", device(), dtype, head_dim), []).append(f"{name}/{head_dim}")
    for operator in ("memory operator", "trapezoidal attention"):
        for choice, tried in kinds.items():
            yield choice_row(operator, choice, tried)


def choice_row(operator: str, choice: Choice, tried: list[str]) -> Row:
    """What `operator` takes for the tensors in `tried`; Triton, which is chosen by name alone, is imported too."""
    from em_megatron.parallel.cpu_backend import device

    text = f"{choice.name} for {', '.join(tried)} (dtype/head dimension): {choice.reason}"
    if choice.name == "triton":
        try:
            importlib.import_module("triton")
        except Exception as error:
            return Row(operator, f"{text}, but triton does not import ({cause(error)}): install it again", "ERROR")
    slow = device().type == "cuda" and choice.name != "triton"
    return Row(operator, text, "warning" if slow else "ok")


def norm() -> Iterator[Row]:
    """The norm named by the layers' specification."""
    from em_megatron.model.layer_specs import elastic_stack_spec

    layer = elastic_stack_spec(default_config()).submodules.attention_layer
    chosen = layer.submodules.input_layernorm
    yield Row("RMSNorm", f"{_full_name(chosen)} on torch's rms_norm, whatever apex or Transformer Engine offer")


def swiglu() -> Iterator[Row]:
    """Fused by Megatron-Core where the model's configuration says so."""
    from megatron.core import jit

    if default_config().bias_activation_fusion:
        yield Row("SwiGLU", f"Megatron-Core's bias_swiglu_impl, fused by {_full_name(jit.jit_fuser)}, as on every GPU")
    else:
        yield Row("SwiGLU", "Megatron-Core's unfused one: the fused one is taken on GPUs only")


def gradient_accumulation_fusion() -> Iterator[Row]:
    """Weight gradients added into the fp32 buffer by the matrix product itself."""
    from megatron.core.tensor_parallel import layers

    from em_megatron.environment.optional_packages import GRADIENT_ACCUMULATION
    from em_megatron.parallel.cpu_backend import device

    name, on_gpu = "gradient accumulation", device().type == "cuda"
    if default_config().gradient_accumulation_fusion:
        loaded = layers._grad_accum_fusion_available
        text = f"fused into the matrix product by {GRADIENT_ACCUMULATION}"
        broken = f"{text} was chosen, but that module does not load: build apex for this torch, or remove it"
        yield Row(name, text if loaded else broken, "ok" if loaded else "ERROR")
    elif on_gpu:
        yield Row(name, f"not fused: apex's compiled module {GRADIENT_ACCUMULATION} is not there", "note")
    else:
        yield Row(name, "not fused: the fused kernel is for GPUs only")


def cross_entropy() -> Iterator[Row]:
    """What HybridModel's loss calls under the model's configuration."""
    config = default_config()
    if not config.cross_entropy_loss_fusion:
        yield Row(
            "cross entropy", "Megatron-Core's vocab_parallel_cross_entropy in torch: its fusion is not switched on"
        )
    elif config.cross_entropy_fusion_impl == "te":
        yield Row("cross entropy", "Transformer Engine's parallel_cross_entropy")
    else:
        yield Row("cross entropy", "Megatron-Core's fused_vocab_parallel_cross_entropy")


def optimizer() -> Iterator[Row]:
    """Adam as Megatron-Core has it once this project has looked after it, and one step of it."""
    from megatron.core import optimizer as megatron_optimizer

    from em_megatron.parallel import fused_adamw

    fused_adamw.install()
    yield adam_row(megatron_optimizer.Adam)


def adam_row(adam: Any) -> Row:
    """The class of the optimizer, and whether it takes a right step on this device."""
    import torch

    from em_megatron.parallel.cpu_backend import device
    from em_megatron.parallel.fused_adamw import FusedAdamW

    name = f"{_origin(adam)}'s {_full_name(adam)}"
    weight = torch.nn.Parameter(torch.ones(4, device=device()))
    weight.grad = torch.ones_like(weight)
    try:
        adam([weight], lr=0.25).step()
    except Exception as error:
        mend = f"train on a GPU that it supports, or take {_origin(adam)} out of this environment"
        return Row("optimizer", f"{name} is taken, but fails on this device ({cause(error)}): {mend}", "ERROR")
    if not torch.allclose(weight.detach(), torch.full_like(weight, 0.75), atol=1e-3):  # Adam's first step is lr long
        return Row("optimizer", f"{name} is taken, but its first step leads from 1 to {weight.tolist()}", "ERROR")
    if adam is FusedAdamW:
        name += ", on torch's fused kernel, as Megatron-Core found neither Transformer Engine nor apex"
    return Row("optimizer", f"{name}; one step of it is right")


def gradient_clipping() -> Iterator[Row]:
    """The norm and scaling that Megatron-Core imported, and one norm taken with them."""
    import torch
    from megatron.core.optimizer import clip_grads

    from em_megatron.parallel.cpu_backend import device

    name = f"{_origin(clip_grads.l2_norm_impl)}'s {_full_name(clip_grads.l2_norm_impl)}"
    gradients = torch.tensor([3.0, 4.0], device=device())
    flag = torch.zeros(1, dtype=torch.int, device=device())
    try:
        norm = float(clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, flag, [[gradients]], False)[0])
    except Exception as error:
        yield Row("gradient clipping", f"{name} is taken, but fails on this device ({cause(error)})", "ERROR")
        return
    right = abs(norm - 5) < 1e-5
    text = f"{name}; the norm of (3, 4) is {norm:g} with it"
    yield Row("gradient clipping", text, "ok" if right else "ERROR")


def default_config() -> Any:
    """Megatron's configuration of a run with default options, where all fusions are decided."""
    from em_megatron.config import load_config
    from em_megatron.model.language_model import transformer_config

    return transformer_config(load_config(None, ["name=doctor", "data.path=none", "model.size=125m"]))


def _full_name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__name__}"


def _origin(thing: Any) -> str:
    package = str(thing.__module__).split(".")[0]
    return ORIGINS.get(package, package)
