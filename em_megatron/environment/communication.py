"""Whether ranks could talk to each other from here."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from em_megatron.environment.report import Level, Row, cause

TIMEOUT = timedelta(seconds=30)


def gloo() -> Iterator[Row]:
    """gloo, which trains where there is no GPU."""
    import torch
    import torch.distributed as dist

    failing: Level = "note" if torch.cuda.is_available() else "ERROR"
    if not (dist.is_available() and dist.is_gloo_available()):
        yield Row("gloo", "is not part of this torch: install one with gloo", failing)
        return
    yield reduced("gloo", "available", failing)


def nccl() -> Iterator[Row]:
    """NCCL, which trains on GPUs."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    if not (dist.is_available() and dist.is_nccl_available()):
        yield Row("NCCL", "is not part of this torch", "ERROR" if on_gpu else "note")
        return
    version = ".".join(map(str, torch.cuda.nccl.version()))
    if on_gpu:
        yield reduced("nccl", version, "ERROR")
    else:
        yield Row("NCCL", f"{version}, not in use: there is no GPU", "note")


def reduced(backend: str, text: str, failing: Level) -> Row:
    """An all-reduce of one rank in a group of its own, which is taken down again."""
    import torch
    import torch.distributed as dist

    from em_megatron.parallel.cpu_backend import device

    name, where = ("NCCL", device()) if backend == "nccl" else (backend, torch.device("cpu"))
    if dist.is_initialized():
        return Row(name, f"{text}; not tried, as this process is in a group already", "note")
    try:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
        values = torch.ones(4, device=where)
        dist.all_reduce(values)
        total = float(values.sum())
    except Exception as error:
        return Row(name, f"{text}, but an all-reduce of one rank fails: {cause(error)}", failing)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if total != 4:
        return Row(name, f"{text}, but an all-reduce of one rank gives a wrong sum", failing)
    return Row(name, f"{text}, an all-reduce of one rank works")
