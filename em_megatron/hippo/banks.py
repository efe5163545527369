"""The matrices of the memory: built once in fp64, cast, kept, and shared by all layers.

With R = read (S points × N coefficients), blocks of L tokens and t_i = i·L, a superchunk of m blocks from `start` is

    M_i   = A(i) C_start + Σ_{start ≤ j < i} G(i,j) X_j       A(i) = R carry(t_start → t_i),  G(i,j) = R inject(block j; t_i)
    C_end = carry C_start + inject X_superchunk

The G(i,j) form a strict lower triangle of blocks. It is stored by levels of a binary split: at level l, with w = 2^l,
pair p multiplies block rows (2p+1)w … (2p+2)w − 1 with block columns 2pw … (2p+1)w − 1. The tiles cover each pair
j < i once and nothing else, so row i appears at the levels given by the bits set in i.

On disk a file is named by the hash of everything that determines it, written beside its place and renamed, so that a
killed process or several ranks building at once never leave half a file under a valid name.

Everything is built outside inference mode: a bank first used in an evaluation must still serve training.
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from em_megatron.hippo import legs, recurrences

_FORMAT = 1  # of the files in the disk cache
_PIECE_BYTES = 128 * 2**20  # fp64 columns of `inject` held at once while a triangle is built
_PASSING_BYTES = 4 * 2**30  # of matrices for one moment of one document, which may never come again
ORDER_MULTIPLE = 64  # of the padded order, so that tiles of kernels over the order are whole
_STEPS_KEPT = 8  # inference needs the step of the current block, for each sequence in flight


class _Shelf:
    """Things kept while they are among the most recently used `limit` bytes; the newest is kept whatever its size."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._things: OrderedDict[tuple[object, ...], tuple[Any, int]] = OrderedDict()

    def get(self, key: tuple[object, ...], make: Callable[[], tuple[Any, int]]) -> Any:
        """What `make` gave for this key, with its bytes."""
        if key not in self._things:
            with torch.inference_mode(False):
                self._things[key] = make()
            held = sum(size for _, size in self._things.values())
            while held > self.limit and len(self._things) > 1:
                held -= self._things.popitem(last=False)[1][1]
        self._things.move_to_end(key)
        return self._things[key][0]


@dataclass(frozen=True, eq=False)
class Superchunk:
    """The matrices of blocks start_block … start_block + num_blocks − 1, in one dtype on one device (m = num_blocks).

    read_carry: A(i) stacked over i, [m·S, N]; None if start_block is 0, where there is no history.
    triangle: level l with w = 2^l is [pairs, w·S, w·L], pairs = number of p with (2p+1)w < m; rows of the last pair
        that belong to blocks ≥ m are zero. Empty for m = 1.
    carry, inject: [N, N] and [N, m·L], state at start → state at end, in fp32 or better: what a block adds to a long
        history is less than bf16 can tell from nothing. The last superchunk (in the parallel form the only one) never
        needs them. carry is zero if start_block is 0.

    For kernels, with N rounded up to P by zero rows and columns: padded_read_carry [m·S, P], padded_carry [P, P],
    padded_inject [P, m·L], and packed_triangle, the rows [S, i·L] for i = 1 … m − 1 one after another.

    Each is built when it is first used.
    """

    start_block: int
    num_blocks: int
    dtype: torch.dtype
    device: torch.device
    _build: dict[str, Callable[[], list[Tensor]]] = field(repr=False)  # fp64, by name

    def _built(self, name: str, shape: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, ...]:
        state = name in ("carry", "inject")
        dtype = torch.promote_types(self.dtype, torch.float32) if state else self.dtype
        with torch.inference_mode(False):
            return tuple(shape(x).to(dtype).to(self.device) for x in self._build[name]())

    @cached_property
    def read_carry(self) -> Tensor | None:
        return self._built("read_carry")[0] if self.start_block else None

    @cached_property
    def triangle(self) -> tuple[Tensor, ...]:
        return self._built("triangle") if self.num_blocks > 1 else ()

    @cached_property
    def carry(self) -> Tensor:
        return self._built("carry")[0]

    @cached_property
    def inject(self) -> Tensor:
        return self._built("inject")[0]

    @cached_property
    def padded_read_carry(self) -> Tensor:
        return self._built("read_carry", lambda x: _padded(x, 0, ORDER_MULTIPLE))[0]

    @cached_property
    def padded_carry(self) -> Tensor:
        return self._built("carry", lambda x: _padded(x, ORDER_MULTIPLE, ORDER_MULTIPLE))[0]

    @cached_property
    def padded_inject(self) -> Tensor:
        return self._built("inject", lambda x: _padded(x, ORDER_MULTIPLE, 0))[0]

    @cached_property
    def packed_triangle(self) -> Tensor:
        if self.num_blocks == 1:
            return torch.empty(0, dtype=self.dtype, device=self.device)
        with torch.inference_mode(False):
            levels = [level.to(self.dtype) for level in self._build["triangle"]()]
            rows = [_packed_row(levels, i, self.num_blocks) for i in range(1, self.num_blocks)]
            return torch.cat(rows).to(self.device)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """x with zero rows and columns up to multiples of these numbers; 0 leaves a side as it is."""
    more = [-x.shape[0] % rows if rows else 0, -x.shape[1] % columns if columns else 0]
    return functional.pad(x, (0, more[1], 0, more[0]))


def _packed_row(levels: list[Tensor], i: int, num_blocks: int) -> Tensor:
    """Row i of a triangle, [S, i·L], flat, from the levels of its binary split: the bits of i, the highest first."""
    tiles = []
    for level, g in reversed(list(enumerate(levels))):
        width = 1 << level
        if i & width:
            slots = g.shape[1] // width
            tiles.append(g[i // (2 * width), i % width * slots : (i % width + 1) * slots])
    return torch.cat(tiles, 1).flatten()


class MemoryBanks:
    """All matrices of one (order N, block_length L, points, discretization).

    Kept in memory per (dtype, device); the fp64 originals are dropped after the cast, so a second dtype is read from
    `cache_dir`, or rebuilt without one. Superchunks are kept for good: `cost_model.plan` bounds the size of those
    of one history, and a context-parallel rank may need one set for each rank before it. Single
    blocks and carries between any two moments, of which documents that begin anywhere ask for ever new ones, are kept
    while they fit in 4 GiB or what `make_room` asks for (the least recently used go first), the steps of a generation only for the last few blocks;
    neither is written to disk.

    Args: points fp64 [S] in (0, 1); cache_dir a folder for the disk cache, made if absent, None for no disk cache.
    Raises ValueError for sizes below 1, points outside (0, 1) or an unknown discretization.
    """

    def __init__(
        self,
        order: int,
        block_length: int,
        points: Tensor,
        discretization: str = "exact",
        cache_dir: Path | None = None,
    ) -> None:
        points = points.detach().to("cpu", torch.float64)
        if min(order, block_length) < 1:
            raise ValueError(f"order and block_length must be at least 1, got {order} and {block_length}.")
        if points.dim() != 1 or len(points) == 0 or not bool(((points > 0) & (points < 1)).all()):
            raise ValueError("Memory points must be a non-empty list inside (0, 1), 0 and 1 excluded.")
        recurrences.check_discretization(discretization)
        self.order, self.block_length, self.slots = order, block_length, len(points)
        self.points, self.discretization, self.cache_dir = points, discretization, cache_dir
        if cache_dir is not None:
            cache_dir.mkdir(parents=True, exist_ok=True)
        self._reads: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._superchunks: dict[tuple[int, int, torch.dtype, torch.device], Superchunk] = {}
        self._passing = _Shelf(_PASSING_BYTES)
        self._decoding = _Shelf(_STEPS_KEPT * 8 * order * (order + block_length))

    def read(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """R, the values of the basis at the points: [S, N]."""
        return self._read_in("read_carry", dtype, torch.device(device))

    def _read_in(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (name, dtype, device)
        if key not in self._reads:
            alone = Superchunk(1, 1, dtype, device, {"read_carry": lambda: [self._read]})
            self._reads[key] = getattr(alone, name)
        return self._reads[key]

    def superchunk(
        self, start_block: int, num_blocks: int, dtype: torch.dtype, device: torch.device | str
    ) -> Superchunk:
        """The matrices of `num_blocks` ≥ 1 blocks from block `start_block` ≥ 0; the same object on every call."""
        if start_block < 0 or num_blocks < 1:
            raise ValueError(
                f"A superchunk needs start_block >= 0 and num_blocks >= 1, got {start_block} and {num_blocks}."
            )
        key = (start_block, num_blocks, dtype, torch.device(device))
        if key not in self._superchunks:
            with torch.inference_mode(False):
                self._superchunks[key] = self._make_superchunk(*key)
        return self._superchunks[key]

    def block(self, block: int, dtype: torch.dtype, device: torch.device | str) -> Superchunk:
        """The superchunk of one block ≥ 0: carry and inject take the state from token block·L to (block+1)·L."""
        return self._passing.get(
            ("block", block, dtype, torch.device(device)), partial(self._make_block, block, dtype, device)
        )

    def make_room(self, blocks: int) -> None:
        """Keeps at least so many single blocks, with a carry each: those a layer goes through must serve the next."""
        each = 4 * self.order * (2 * self.order + self.block_length)
        self._passing.limit = max(self._passing.limit, blocks * each)

    def step(self, block: int, dtype: torch.dtype, device: torch.device | str) -> Superchunk:
        """As `block`, but only the last few are kept: a generation never comes back to one."""
        return self._decoding.get((block, dtype, torch.device(device)), partial(self._make_block, block, dtype, device))

    def _make_block(self, block: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Superchunk, int]:
        if block < 0:
            raise ValueError(f"Blocks are numbered from 0, got {block}.")
        where, state_dtype = torch.device(device), torch.promote_types(dtype, torch.float32)
        build = {
            "read_carry": lambda: [self._read],
            "carry": lambda: [self._carry(block, 1, keep=False)],
            "inject": lambda: [self._inject(block, 1)],
        }
        chunk = Superchunk(block, 1, dtype, where, build)
        for name in ("read_carry", "padded_read_carry"):  # the same for every block
            vars(chunk)[name] = self._read_in(name, dtype, where) if block else None
        return chunk, state_dtype.itemsize * self.order * (self.order + self.block_length)

    def carry(self, start_block: int, stop_block: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """State after start_block > 0 blocks → state after stop_block blocks, nothing new arriving: [N, N]."""
        if not 0 < start_block <= stop_block:
            raise ValueError(f"A carry needs 0 < start_block <= stop_block, got {start_block} and {stop_block}.")

        def make() -> tuple[Tensor, int]:
            matrix = self._carry(start_block, stop_block - start_block, keep=False).to(device, dtype)
            return matrix, matrix.nbytes

        return self._passing.get(("carry", start_block, stop_block, dtype, torch.device(device)), make)

    @cached_property
    def _read(self) -> Tensor:
        return legs.read(self.order, self.points)

    def _make_superchunk(self, start: int, blocks: int, dtype: torch.dtype, device: torch.device) -> Superchunk:
        build = {
            "triangle": lambda: self._cached("triangle", start, blocks, lambda: self._triangle(start, blocks)),
            "read_carry": lambda: self._cached("read_carry", start, blocks, lambda: [self._read_carry(start, blocks)]),
            "carry": lambda: [self._carry(start, blocks)],
            "inject": lambda: [self._inject(start, blocks)],
        }
        return Superchunk(start, blocks, dtype, device, build)

    def _read_carry(self, start: int, blocks: int) -> Tensor:
        """A(i) for i = start … start + blocks − 1: fp64 [blocks·S, N]; the first needs no carry."""
        t = [self.block_length * (start + i) for i in range(blocks)]
        moved = [recurrences.carry_rows(self.discretization, self._read, t[0], t_i) for t_i in t[1:]]
        return torch.cat([self._read, *moved])

    def _triangle(self, start: int, blocks: int) -> list[Tensor]:
        """The levels of the strict triangle, fp64."""
        S, L = self.slots, self.block_length
        levels, width = [], 1
        while width < blocks:
            pairs = len(range(width, blocks, 2 * width))
            levels.append(torch.zeros(pairs, width * S, width * L, dtype=torch.float64, device="cpu"))
            width *= 2
        for i in range(1, blocks):
            row = self._triangle_row(start, i)
            for l, level in enumerate(levels):
                width = 1 << l
                if i & width:
                    p, offset = i // (2 * width), i % width
                    tile = row[:, 2 * p * width * L : (2 * p + 1) * width * L]
                    level[p, offset * S : (offset + 1) * S] = tile
        return levels

    def _triangle_row(self, start: int, i: int) -> Tensor:
        """G(start + i, j) for j = start … start + i − 1 side by side: fp64 [S, i·L]."""
        begin, end = start * self.block_length, (start + i) * self.block_length
        row = torch.empty(self.slots, end - begin, dtype=torch.float64, device="cpu")
        tokens = max(1, _PIECE_BYTES // (8 * self.order))
        pieces = recurrences.inject_pieces(self.discretization, self.order, begin, end, end, tokens)
        for first, piece in pieces:
            row[:, first - begin : first - begin + piece.shape[1]] = self._read @ piece
        return row

    def _carry(self, start: int, blocks: int, keep: bool = True) -> Tensor:
        t0, t1 = start * self.block_length, (start + blocks) * self.block_length

        def build() -> list[Tensor]:
            return [recurrences.carry(self.discretization, self.order, t0, t1)]

        return (build() if t0 == 0 or not keep else self._cached("carry", start, blocks, build))[0]

    def _inject(self, start: int, blocks: int) -> Tensor:
        t0, t1 = start * self.block_length, (start + blocks) * self.block_length
        return recurrences.inject(self.discretization, self.order, t0, t1, t1)

    def _cached(self, kind: str, start: int, blocks: int, build: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `build` gives, by way of the disk cache if there is one."""
        if self.cache_dir is None:
            return build()
        key = json.dumps(
            {
                "format": _FORMAT,
                "kind": kind,
                "order": self.order,
                "block_length": self.block_length,
                "points": [point.hex() for point in self.points.tolist()],
                "discretization": self.discretization,
                "start_block": start,
                "num_blocks": blocks,
            }
        )
        path = self.cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()}.pt"
        tensors = _load(path, key) if path.exists() else None
        if tensors is None:
            tensors = build()
            _save(path, key, tensors)
        return tensors


@cache
def shared_banks(
    order: int, block_length: int, points: tuple[float, ...], discretization: str, cache_dir: Path | None
) -> MemoryBanks:
    """The one MemoryBanks of this process for these arguments, so that all layers share their matrices."""
    return MemoryBanks(order, block_length, torch.tensor(points, dtype=torch.float64), discretization, cache_dir)


def _checksum(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _load(path: Path, key: str) -> list[Tensor] | None:
    """The tensors of a cache file, or None with a warning if it is damaged or belongs to something else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        tensors: list[Tensor] = content["tensors"]
        if content["key"] != key:
            raise ValueError("it was made for other sizes")
        if content["checksum"] != _checksum(tensors):
            raise ValueError("its checksum does not match its contents")
        return tensors
    except Exception as e:  # a damaged pickle may raise anything
        warnings.warn(f"The memory matrices in {path} cannot be used ({e}); they are built again.", stacklevel=2)
        return None


def _save(path: Path, key: str, tensors: list[Tensor]) -> None:
    """Write beside the path and rename; a full or read-only disk costs only a warning, the run has its matrices."""
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem[:16], suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            torch.save({"key": key, "checksum": _checksum(tensors), "tensors": tensors}, file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        warnings.warn(f"The memory matrices could not be kept in {path} ({e}).", stacklevel=2)
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
