"""What the NVIDIA driver says of itself, without torch: a torch that cannot use it would not say so."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager


def cuda_version() -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports; None without a driver."""
    try:
        driver, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return None
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0 or number.value == 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def version() -> str | None:
    """The driver's version, such as 580.65.06; None if it cannot be asked."""
    with _management_library() as library:
        text = ctypes.create_string_buffer(96)
        if library is None or library.nvmlSystemGetDriverVersion(text, len(text)) != 0:
            return None
        return text.value.decode()


def gpu_count() -> int:
    """GPUs of this machine that the driver shows, also those hidden by CUDA_VISIBLE_DEVICES; 0 if it cannot be asked."""
    with _management_library() as library:
        number = ctypes.c_uint()
        if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(number)) != 0:
            return 0
        return number.value


@contextmanager
def _management_library() -> Iterator[ctypes.CDLL | None]:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        yield None
        return
    if library.nvmlInit_v2() != 0:
        yield None
        return
    try:
        yield library
    finally:
        library.nvmlShutdown()
