"""HiPPO-LegS memory matrices: closed forms, samplers, banks and the cost model that sizes them."""

from em_megatron.hippo.banks import MemoryBanks, Superchunk, shared_banks
from em_megatron.hippo.cost_model import memory_cost, plan
from em_megatron.hippo.recurrences import DISCRETIZATIONS
from em_megatron.hippo.samplers import SAMPLERS, sampler_points

__all__ = [
    "DISCRETIZATIONS",
    "SAMPLERS",
    "MemoryBanks",
    "Superchunk",
    "memory_cost",
    "plan",
    "sampler_points",
    "shared_banks",
]
