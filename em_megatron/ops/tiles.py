"""What the Triton kernels share: the matrix product of two tiles, and how a launch finds its tile sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from em_megatron.ops.dispatch import interpreting

INTERPRETED = tl.constexpr(interpreting())

# Tile sizes of the interpreter: small ones, so that small tensors already take many tiles.
INTERPRETED_TILE = 16


@triton.jit  # type: ignore[untyped-decorator]
def dot(a, b, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a b in fp32: a [M, K], b [K, N] of one dtype, acc [M, N]."""
    if INTERPRETED:  # which would multiply bf16 as integers and fp16 in fp16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def precision_of(dtype: torch.dtype) -> str:
    """How fp32 tiles are multiplied beside inputs of this dtype.

    Half-precision inputs lose nothing in TF32, whose products are then as good as theirs. For fp32 inputs three TF32
    products come near to fp32, unless the user allows TF32 in torch's own products.
    """
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype != torch.float32 or allowed else "tf32x3"


def padded(size: int, multiple: int = 16) -> int:
    """`size` rounded up."""
    return -(-size // multiple) * multiple


Tiles = dict[str, int]  # tile sizes, num_warps, num_stages


def tuned(
    configs: list[Tiles], key: list[str], element: str, fits: Callable[[Tiles, int, int, int], bool], **options: Any
) -> Any:
    """`triton.autotune` over tile sizes that fit the device; the choice is kept on disk, so that runs repeat it.

    Args:
        configs: tile sizes, num_warps and num_stages of each; the last is taken where none fits.
        key: arguments whose values call for a choice of their own.
        element: the argument whose elements fill the tiles.
        fits: (config, width of a tile, bytes per element, bytes of shared memory) → whether it is worth a try.
        options: more for `triton.autotune`, such as restore_value.
    """
    if interpreting():
        small = {name: INTERPRETED_TILE for name in configs[0] if name.startswith("BLOCK_")}
        return triton.autotune(configs=[triton.Config(small)], key=key, **options)

    def fitting(candidates: list[triton.Config], arguments: dict[str, Any], **more: Any) -> list[triton.Config]:
        named = {**arguments, **more}
        width, itemsize, limit = named["BLOCK_D"], named[element].element_size(), _shared_memory(named[element].device)
        return [c for c in candidates if fits(_tiles(c), width, itemsize, limit)] or candidates[-1:]

    return triton.autotune(
        configs=[_config(tiles) for tiles in configs],
        key=key,
        prune_configs_by={"early_config_prune": fitting},
        cache_results=True,
        **options,
    )


def _config(tiles: Tiles) -> triton.Config:
    sizes = {name: value for name, value in tiles.items() if name.startswith("BLOCK_")}
    return triton.Config(sizes, num_warps=tiles["num_warps"], num_stages=tiles["num_stages"])


def _tiles(config: triton.Config) -> Tiles:
    return {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}


def _shared_memory(device: torch.device) -> int:
    """What a program may use at most, in bytes."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])
