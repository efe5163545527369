"""Host tensors to a device, without the host waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | None) -> Tensor:
    """`x` on the device (None: where it is), by way of page-locked memory to a GPU, so that the copy is asynchronous."""
    if device is None:
        return x
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
