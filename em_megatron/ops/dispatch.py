"""Which implementation an operator takes: decided here and nowhere else, and shown by `launch/doctor.py`."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

IMPLEMENTATIONS = ("triton", "batched", "naive")
REQUESTS = ("auto", *IMPLEMENTATIONS)
MIN_CAPABILITY = (8, 0)  # bf16 matrix units
# Largest head dimension whose tiles fit shared memory, by bytes per number: data-centre GPUs, and those with 100 kB.
MAX_HEAD_DIM = {2: 256, 4: 128}
MAX_HEAD_DIM_SMALL = {2: 128, 4: 64}
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why, as the end of a sentence."""

    name: str
    reason: str


def choose(requested: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> Choice:
    """The implementation of the memory and attention operators for tensors of this kind.

    Args:
        requested: auto takes Triton kernels on GPUs and batched PyTorch elsewhere; the others are taken as they are.
        device, dtype, head_dim: of queries, keys and values.

    Raises:
        ValueError: an unknown name, or Triton kernels asked for where they cannot run.
    """
    if requested not in REQUESTS:
        raise ValueError(f"implementation '{requested}' is unknown: choose one of {', '.join(REQUESTS)}")
    if requested in ("batched", "naive"):
        return Choice(requested, "asked for")
    obstacle = triton_obstacle(torch.device(device), dtype, head_dim)
    if requested == "triton":
        if interpreting() and torch.device(device).type == "cpu":
            obstacle = _obstacle_of_kind(dtype, head_dim)
        if obstacle:
            raise ValueError(f"Triton kernels cannot run here, {obstacle}: ask for 'batched' or 'auto'")
        return Choice("triton", "asked for")
    return Choice("batched", obstacle) if obstacle else Choice("triton", "the device is a GPU that Triton compiles for")


def triton_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why compiled Triton kernels cannot run on such tensors; None if they can."""
    if device.type != "cuda":
        return f"the device is a {device.type}, not a GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"the GPU's compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.0"
    small = capability[0] == 12 or capability in ((8, 6), (8, 9))
    return _obstacle_of_kind(dtype, head_dim, MAX_HEAD_DIM_SMALL if small else MAX_HEAD_DIM)


def _obstacle_of_kind(dtype: torch.dtype, head_dim: int, largest: dict[int, int] = MAX_HEAD_DIM) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"they compute in bf16, fp16 and fp32, not in {str(dtype).removeprefix('torch.')}"
    if head_dim > largest[dtype.itemsize] or head_dim % 2:
        return f"the head dimension {head_dim} is not an even number up to {largest[dtype.itemsize]}"
    return None


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (TRITON_INTERPRET=1, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
