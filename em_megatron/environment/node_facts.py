"""What one rank finds on its node: versions, GPUs, room on local disks. Rank 0 compares it with the others'."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import em_megatron
from em_megatron.environment import nvidia_driver
from em_megatron.environment.devices import SHARED_MEMORY, usable_gpus
from em_megatron.environment.exchange import Place
from em_megatron.environment.network import network_variables
from em_megatron.environment.report import cause

PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine", "apex", "transformers", "em-megatron")
HEALTH_QUERY = {  # field of nvidia-smi → what another answer than none means
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors since the driver was loaded",
    "remapped_rows.pending": "memory rows wait for a reset to be replaced",
    "remapped_rows.failure": "memory rows could not be replaced",
}
PRODUCT_SIZE = 2048  # of two square matrices whose product is exact in fp32
HARMLESS = ("0", "No", "")


@dataclass(frozen=True)
class Gpu:
    """A GPU after a small computation; memory in bytes, `error` empty if the result was right."""

    index: int
    name: str
    total: int
    free: int
    error: str = ""


@dataclass(frozen=True)
class Facts:
    """Of one rank; from `versions` on, of its node, told by the rank that leads it. Sizes in bytes.

    `owns_gpu` says whether the rank has a GPU of its own, without which there is no NCCL. Versions of what is not
    installed are "none", of what cannot be found out "?".
    """

    place: Place
    gpus: list[Gpu]
    visible_gpus: int
    owns_gpu: bool
    versions: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    gpu_faults: list[str] = field(default_factory=list)
    temporary: str = ""
    temporary_free: int = 0
    temporary_error: str = ""
    shared_memory: int = 0


def collect(place: Place) -> Facts:
    """Looks at this rank's share of the GPUs and, on the rank that leads the node, at the rest of it."""
    visible = usable_gpus()
    gpus = [_gpu(index) for index in range(place.local_rank, visible, place.local_world_size)]
    owns_gpu = bool(gpus) and not gpus[0].error
    if not place.leads:
        return Facts(place, gpus, visible, owns_gpu)
    folder = tempfile.gettempdir()
    return Facts(
        place,
        gpus,
        visible,
        owns_gpu,
        versions=versions(),
        variables=network_variables(os.environ),
        gpu_faults=gpu_faults() if visible else [],
        temporary=folder,
        temporary_free=shutil.disk_usage(folder).free,
        temporary_error=writing_error(Path(folder)),
        shared_memory=shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else 0,
    )


def versions() -> dict[str, str]:
    """Everything that must be the same on all nodes, by name."""
    import torch

    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    tree = Path(em_megatron.__file__).parent
    return {
        "python": platform.python_version(),
        **{name: _installed(name) for name in PACKAGES},
        "CUDA": torch.version.cuda or "none",
        "NCCL": ".".join(map(str, nccl)) or "none",
        "driver": nvidia_driver.version() or "none",
        "source": source_digest(tree),
        "commit": commit(tree.parent),
    }


def source_digest(tree: Path) -> str:
    """Eight hexadecimal digits that change with any Python file below `tree`."""
    digest = hashlib.sha256()
    for path in sorted(tree.rglob("*.py")):
        digest.update(f"{path.relative_to(tree)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def commit(tree: Path) -> str:
    """The commit that a git checkout at `tree` has, with a + where tracked files differ from it; else none or ?."""
    if not (tree / ".git").exists():
        return "none"
    head = _git(tree, "rev-parse", "--short=12", "HEAD")
    changed = _git(tree, "status", "--porcelain", "--untracked-files=no")
    return "?" if head is None or changed is None else head + "+" * bool(changed)


def writing_error(folder: Path) -> str:
    """Why no file can be written to `folder`; empty if one can."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
            file.flush()
    except OSError as error:
        return cause(error)
    return ""


def gpu_faults() -> list[str]:
    """Faults that nvidia-smi counts, one sentence each; none where it is not there or does not know the fields."""
    query = ["nvidia-smi", f"--query-gpu=index,{','.join(HEALTH_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=15, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    faults = []
    for row in done.stdout.splitlines():
        index, *answers = (answer.strip() for answer in row.split(","))
        for meaning, answer in zip(HEALTH_QUERY.values(), answers, strict=False):
            if answer not in HARMLESS and not answer.startswith("["):  # [N/A], [Not Supported]
                faults.append(f"GPU {index}: {meaning}{f' ({answer})' if answer.isdigit() else ''}")
    return faults


def _gpu(index: int) -> Gpu:
    import torch

    name, total = "a GPU", 0
    try:
        card = torch.cuda.get_device_properties(index)
        name, total = card.name, card.total_memory
        free, total = torch.cuda.mem_get_info(index)
        numbers = torch.arange(PRODUCT_SIZE, device=f"cuda:{index}", dtype=torch.float32).remainder_(7)
        product = numbers.expand(PRODUCT_SIZE, -1) @ torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, device=f"cuda:{index}")
        right = bool((product == sum(number % 7 for number in range(PRODUCT_SIZE))).all())
    except Exception as error:
        return Gpu(index, name, total, 0, cause(error))
    return Gpu(index, name, total, free, "" if right else "a matrix product is wrong")


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _git(tree: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(tree), *arguments], capture_output=True, text=True, timeout=15, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
