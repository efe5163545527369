"""The machine under the measurements: what it is called, and the rates it really reaches."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import math
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from em_megatron.benchmark.floors import Work
from em_megatron.benchmark.timing import Call, Candidate, Measurement, timed
from em_megatron.config import ConfigError
from em_megatron.parallel.cpu_backend import keep_freed_memory

GROUP = "machine"
COPY, READ, MATRIX = "copy of a large tensor", "sum of a large tensor", "large square matrix product"
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**30}
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
LONG_PRODUCT = 0.1  # seconds; twice the side would take eight times as long
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ceilings:
    """Rates reached in the same run: bytes per second of a copy (read and written) and of a sum (read), FLOPs per second."""

    copied_per_second: float
    read_per_second: float
    flops_per_second: float

    def floor_seconds(self, work: Work) -> float:
        """The least time for this work; what only reads may move bytes faster than a copy."""
        return max(work.bytes / max(self.copied_per_second, self.read_per_second), work.flops / self.flops_per_second)


def pick_device(requested: str) -> torch.device:
    """The device to measure.

    Raises:
        ConfigError: there is no such device here.
    """
    if requested not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device '{requested}' is unknown: choose auto, cpu or cuda")
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; leave the option out to measure the CPU")
    on_gpu = torch.cuda.is_available() if requested == "auto" else requested == "cuda"
    if not on_gpu:
        keep_freed_memory()  # as the trainer does
    return torch.device("cuda", 0) if on_gpu else torch.device("cpu")


def ceiling_candidates(device: torch.device, dtype: torch.dtype) -> list[Candidate]:
    """The copy, the sum and the matrix product whose best readings are the machine's ceilings."""

    def copy() -> Call:
        source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def read() -> Call:
        source = torch.ones(COPIED_BYTES[device.type] // 4, device=device)
        return source.sum

    def product() -> Call:
        a = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty_like(a)
        return lambda: torch.mm(a, a, out=out)

    side = _side(device, dtype)
    return [
        Candidate(GROUP, COPY, copy, 0, Work(0.0, 2.0 * COPIED_BYTES[device.type])),
        Candidate(GROUP, READ, read, 0, Work(0.0, 1.0 * COPIED_BYTES[device.type])),
        Candidate(GROUP, MATRIX, product, 0, Work(2.0 * side**3, 3.0 * side**2 * dtype.itemsize)),
    ]


def _side(device: torch.device, dtype: torch.dtype) -> int:
    """As large as MATRIX_SIDE, or less where even smaller products take their time (half precision on some CPUs)."""
    side = min(256, MATRIX_SIDE[device.type])
    while side < MATRIX_SIDE[device.type]:
        a = torch.ones(side, side, dtype=dtype, device=device)
        timed(lambda a=a: torch.mm(a, a), 1, device)  # type: ignore[misc]
        if timed(lambda a=a: torch.mm(a, a), 1, device) > LONG_PRODUCT:  # type: ignore[misc]
            break
        side *= 2
    return side


def ceilings_of(measurements: list[Measurement]) -> Ceilings:
    """From the best reading of each: a ceiling is what can be reached; not a number where none was taken."""
    work = {m.candidate.name: m.candidate.work for m in measurements}
    least = {m.candidate.name: min(m.seconds, default=math.nan) for m in measurements}
    return Ceilings(work[COPY].bytes / least[COPY], work[READ].bytes / least[READ], work[MATRIX].flops / least[MATRIX])


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Names and versions, for the head of a report."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "megatron-core": _version("megatron-core"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def resident_bytes() -> int:
    """What this process holds in memory, once garbage is collected and free memory given back to the system."""
    import psutil

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed memory for itself otherwise
    if trim is not None:
        trim(0)
    return int(psutil.Process().memory_info().rss)


def commit() -> str:
    """The commit of this checkout, with 'and uncommitted changes' where there are some."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":(top)em_megatron", ":(top)launch", ":(top)pyproject.toml")
        return git("rev-parse", "HEAD") + (" and uncommitted changes of the code" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown: not a git checkout"


def _processor() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
