"""GPUs, processors, memory and disks."""

from __future__ import annotations

import os
import resource
import shutil
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from em_megatron.environment import nvidia_driver
from em_megatron.environment.report import Row, attempt, cause

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
LITTLE_SHARED_MEMORY = GIB  # NCCL's buffers between the ranks of a node; containers start with 64 MiB
FEW_FILES = 4096  # sockets of a rank grow with the number of ranks, and shards are open too
LITTLE_DISK = 10 * GIB  # one checkpoint of a 0.7B model: 14 bytes a parameter (bf16 weights, fp32 master and moments)


def usable_gpus() -> int:
    """GPUs that torch sees; 0 also where torch does not import."""
    try:
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception:
        return 0


def gpus() -> Iterator[Row]:
    """Each GPU, after a computation on it; or why there is none."""
    import torch

    if not torch.cuda.is_available():
        yield missing_gpu(nvidia_driver.gpu_count())
        return
    for index in range(torch.cuda.device_count()):
        yield from attempt(f"GPU {index}", partial(_gpu, index))
    yield compiler()


def missing_gpu(present: int) -> Row:
    """Why torch sees no GPU where the driver shows `present` of them."""
    import torch

    if not present:
        return Row("GPU", "none: everything runs on CPU processes over gloo", "note")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        hidden = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}"
        return Row("GPU", f"none, {hidden} hides {present}: everything runs on CPU processes over gloo", "warning")
    if torch.version.cuda is None:
        return Row("GPU", f"the driver shows {present}, but this torch is built without CUDA: install another", "ERROR")
    try:
        torch.cuda.init()
    except Exception as error:
        return Row("GPU", f"the driver shows {present}, but torch cannot use them: {cause(error)}", "ERROR")
    return Row("GPU", f"the driver shows {present}, but torch.cuda.is_available() is False", "ERROR")


def compiler() -> Row:
    """What Triton and torch.compile build the callers of their kernels with."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    command = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if command is None:
        return Row("compiler", "no gcc or clang, which Triton and torch.compile need on GPUs: install one", "ERROR")
    if not header.is_file():
        return Row("compiler", f"{header} is missing, which Triton needs: install Python's development files", "ERROR")
    return Row("compiler", command)


def processors() -> Iterator[Row]:
    """Cores that this process may use, and memory of the machine."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (page * os.sysconf(name) / GIB for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    yield Row("processors", f"{len(os.sched_getaffinity(0))} cores, {total:.1f} GiB memory ({free:.1f} unused)")


def disks() -> Iterator[Row]:
    """The folders that runs and the memory's matrices go to by default."""
    from em_megatron.config import MemoryConfig, RunConfig

    yield folder("runs", RunConfig.output_dir, "set output_dir to another folder")
    cache = MemoryConfig.bank_cache
    if cache:
        yield folder("bank cache", cache, "set memory.bank_cache to another folder or null")


def folder(name: str, path: str, remedy: str) -> Row:
    """Room and permission where `path` is or would be made; `remedy` says what to do without."""
    wanted = Path(path).expanduser().absolute()
    there = next(place for place in (wanted, *wanted.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Row(name, f"{wanted} cannot be written: {remedy}", "warning")
    free = shutil.disk_usage(there).free
    text = f"{wanted}, {free / GIB:,.1f} GiB free"
    return Row(name, f"{text}: {remedy}", "warning") if free < LITTLE_DISK else Row(name, text)


def shared_memory(path: Path = SHARED_MEMORY) -> Iterator[Row]:
    """Room in /dev/shm, through which NCCL connects the ranks of a node."""
    if not path.is_dir():
        yield Row("shared memory", f"{path} is not there, which NCCL needs within a node", "warning")
        return
    usage = shutil.disk_usage(path)
    text = f"{path}, {usage.free / GIB:,.1f} of {usage.total / GIB:,.1f} GiB free"
    little = usage.free < LITTLE_SHARED_MEMORY
    mend = ": start the container with --ipc=host or --shm-size=8g, or remove what fills it"
    yield Row("shared memory", text + mend * little, "warning" if little else "ok")


def limits() -> Iterator[Row]:
    """Open files, and locked memory, which InfiniBand needs without limit."""
    files, locked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    yield limits_row(files, locked, Path("/sys/class/infiniband").is_dir())


def limits_row(files: int, locked: int, infiniband: bool) -> Row:
    """`files` that may be open, bytes that may be `locked` (-1: any), and whether this machine has InfiniBand."""
    spelled = "any number of" if files == resource.RLIM_INFINITY else str(files)
    memory = "no limit on" if locked == resource.RLIM_INFINITY else f"{locked / 2**20:,.0f} MiB of"
    mends = []
    if files != resource.RLIM_INFINITY and files < FEW_FILES:
        mends.append(f"ulimit -n {FEW_FILES} or more, for ranks on many nodes")
    if locked != resource.RLIM_INFINITY and infiniband:
        mends.append("ulimit -l unlimited, which InfiniBand needs")
    text = f"{spelled} open files, {memory} locked memory"
    return Row("limits", f"{text}: {'; '.join(mends)}", "warning") if mends else Row("limits", text)


def _gpu(index: int) -> Iterator[Row]:
    import torch

    from em_megatron.ops.dispatch import MIN_CAPABILITY
    from em_megatron.training.metrics import peak_flops

    card = torch.cuda.get_device_properties(index)
    text = (
        f"{card.name}, {card.total_memory / GIB:.0f} GiB, compute capability {card.major}.{card.minor}, "
        f"driver {nvidia_driver.version() or 'unknown'}"
    )
    if float((torch.ones(4, device=f"cuda:{index}") * 2).sum()) != 8:
        yield Row(f"GPU {index}", f"{text}: computes a wrong sum", "ERROR")
    elif (card.major, card.minor) < MIN_CAPABILITY:
        yield Row(f"GPU {index}", f"{text}: too old for the Triton kernels", "warning")
    elif peak_flops(card.name) is None:
        yield Row(f"GPU {index}", f"{text}; its peak is not known here, so no MFU is shown", "note")
    else:
        yield Row(f"GPU {index}", text)
