"""GPUs that can be planned for."""

from __future__ import annotations

from dataclasses import dataclass

from em_megatron.config import ConfigError
from em_megatron.training.metrics import PEAK_FLOPS

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One device.

    memory: bytes that CUDA offers (somewhat less than the data sheet's capacity, for error correction and firmware).
    peak_flops: dense bf16, FLOP/s. memory_bandwidth: bytes/s. nvlink: bytes/s in one direction, half of the data
    sheet's figure. network: bytes/s in one direction between nodes and per GPU, an assumption: one InfiniBand port of
    200 Gbit/s beside each A100, of 400 Gbit/s beside newer ones, as in the vendor's own nodes.
    """

    name: str
    memory: int
    peak_flops: float
    memory_bandwidth: float
    nvlink: float
    network: float


# Data sheets: A100 (1,555 and 2,039 GB/s, NVLink 600 GB/s), H100 SXM (3.35 TB/s, 900 GB/s), H200 SXM (141 GB, 4.8 TB/s,
# 900 GB/s), B200 SXM (180 GB, 7.7 TB/s, 1.8 TB/s), GH200 (96 GB HBM3, 4 TB/s, 900 GB/s to other GPUs). Memory in GiB,
# as `torch.cuda.mem_get_info` tells it, rounded down.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100-40", 39 * GIB, PEAK_FLOPS["A100"], 1.555e12, 300e9, 25e9),
        GPU("a100-80", 79 * GIB, PEAK_FLOPS["A100"], 2.039e12, 300e9, 25e9),
        GPU("h100", 78 * GIB, PEAK_FLOPS["H100"], 3.35e12, 450e9, 50e9),
        GPU("h200", 139 * GIB, PEAK_FLOPS["H200"], 4.8e12, 450e9, 50e9),
        GPU("gh200", 94 * GIB, PEAK_FLOPS["GH200"], 4.0e12, 450e9, 50e9),
        GPU("b200", 178 * GIB, PEAK_FLOPS["B200"], 7.7e12, 900e9, 50e9),
    )
}
ALIASES = {"a100": "a100-80"}


def find_gpu(name: str) -> GPU:
    """The GPU of this name, in any case.

    Raises:
        ConfigError: it is not in the table.
    """
    known = ALIASES.get(name.lower(), name.lower())
    if known not in GPUS:
        raise ConfigError(f"--gpu '{name}' is unknown: choose one of {', '.join([*GPUS, *ALIASES])}")
    return GPUS[known]
