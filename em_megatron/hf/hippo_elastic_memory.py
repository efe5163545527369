"""HiPPO-LegS in closed form: the matrices that write, move and read a memory. This file travels with the weights.

With φ_n(u) = √(2n+1) P_n(2u−1), orthonormal on [0, 1] (u = 1 is the present), the state of a signal that is constant
over each of its t tokens is C[n] = ∫ f(t·u) φ_n(u) du (HiPPO, arXiv 2008.07669). Everything is computed in fp64.

Legend: N order, S moments, t tokens, [g, h, …, c] rows, heads and channels of a state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

HOST: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def made_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Its tensors are made without autograd, and fit for training whatever the mode of the caller."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args)

    return wrapped


def legendre(order: int, x: Tensor) -> Tensor:
    """P_0 … P_{order−1} at x in [−1, 1]: [order, len(x)]."""
    out = torch.ones(order, len(x), **HOST)
    for n in range(1, order):
        torch.mul(x, out[n - 1], out=out[n]).mul_((2 * n - 1) / n)
        if n > 1:
            out[n].sub_(out[n - 2], alpha=(n - 1) / n)
    return out


def basis(order: int, u: Tensor) -> Tensor:
    """φ_0 … φ_{order−1} at u in [0, 1]: [order, len(u)]."""
    return legendre(order, 2 * u - 1) * torch.sqrt(2 * torch.arange(order, **HOST) + 1)[:, None]


def inject(order: int, start: int, stop: int) -> Tensor:
    """What tokens start … stop − 1 add to the state at time stop, the integrals of φ over each: [order, stop − start]."""
    values = legendre(order + 1, 2 * torch.arange(start, stop + 1, **HOST) / stop - 1)
    areas = values[2:] - values[:-2] if order > 1 else values[:0]  # (2n+1) times the antiderivative of P_n, n ≥ 1
    scale = 2 * torch.sqrt(2 * torch.arange(1, order, **HOST) + 1)
    first = torch.full((1, stop - start), 1 / stop, **HOST)
    return torch.cat([first, areas.diff(dim=1) / scale[:, None]])


def carry(order: int, before: int, after: int, device: torch.device | None = None) -> Tensor:
    """Moves a state from time `before` > 0 to `after`, nothing new arriving: [order, order], lower triangular.

    Its order³ multiply-adds are done on `device` where that computes in fp64.
    """
    (nodes, weights), r = gauss_rule(order), before / after
    where = device if device is not None and device.type == "cuda" else torch.device("cpu")
    left, right = r * basis(order, r * nodes) * weights, basis(order, nodes)
    return (left.to(where) @ right.to(where).T).tril_()


@lru_cache(maxsize=4)
def gauss_rule(order: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gauss–Legendre rule on [0, 1], by Newton's method."""
    x = torch.cos(math.pi * (torch.arange(order, **HOST) + 0.75) / (order + 0.5))
    for _ in range(6):
        last, value = torch.zeros_like(x), torch.ones_like(x)
        for n in range(order):
            last, value = value, ((2 * n + 1) * x * value - n * last) / (n + 1)
        slope = order * (x * value - last) / (x.square() - 1)
        x = x - value / slope
    return (1 + x) / 2, 1 / ((1 - x.square()) * slope.square())


def recur(state: Tensor, block: Tensor, before: int, scheme: str) -> Tensor:
    """The state [..., N, c] after the tokens [..., n, c], one by one, by one of HiPPO's other discretizations."""
    order = state.shape[-2]
    n = torch.arange(order, **HOST)
    root = torch.sqrt(2 * n + 1)
    a = (torch.outer(root, root).tril(-1) + torch.diag(n + 1)).to(state.device)
    eye, state = torch.eye(order, dtype=torch.float64, device=state.device), state.double()
    unit = eye[:, :1]
    for j in range(block.shape[-2]):
        now, k = unit * block[..., j : j + 1, :].double(), before + j
        if k == 0:
            state = now.expand_as(state)
            continue
        rest, half = state - now, {"bilinear": 0.5}.get(scheme, 1.0) / k
        if scheme in ("forward_euler", "bilinear"):
            rest = rest - half * (a @ rest)
        if scheme in ("backward_euler", "bilinear"):
            rest = torch.linalg.solve_triangular(eye + half * a, rest, upper=False)
        state = rest + now
    return state


def sampler_points(name: str, slots: int, a: float, lo: float, hi: float, points: tuple[float, ...]) -> Tensor:
    """The moments that are read back, ascending in (0, 1): [S] in fp64."""
    if name == "points":
        return torch.tensor(points, **HOST)
    even = (torch.arange(slots, **HOST) + 0.5) / slots
    if name == "exponential":
        return 1 - torch.exp(-a * even) * torch.expm1(-a * (1 - even)) / math.expm1(-a)
    if name not in ("uniform", "window"):
        raise ValueError(f"memory_sampler '{name}' is unknown")
    return lo + (hi - lo) * even if name == "window" else even


class MemoryReader:
    """The matrices of one memory; shared by all layers, those of the last block are kept."""

    def __init__(self, order: int, points: Tensor, discretization: str) -> None:
        self.order, self.points, self.discretization = order, points, discretization
        self.step = lru_cache(maxsize=1)(made_once(self._step))  # all layers in turn, then never again
        self.moments = lru_cache(maxsize=8)(made_once(self._moments))

    def _step(self, before: int, after: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor]:
        moved = carry(self.order, before, after, device).to(device, dtype) if before else None
        return moved, inject(self.order, before, after).to(device, dtype)

    def _moments(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return basis(self.order, self.points).T.to(device, dtype)

    def write(self, state: Tensor | None, block: Tensor, before: int) -> Tensor:
        """State [g, h, N, c] after `before` tokens, None for none, and the next ones [g, h, n, c] → the state after."""
        with torch.autocast(block.device.type, enabled=False):  # a late block adds less than bf16 can tell from nothing
            return self._write(state, block, before)

    def _write(self, state: Tensor | None, block: Tensor, before: int) -> Tensor:
        if self.discretization not in ("exact", "zero_order_hold"):
            empty = block.new_zeros(*block.shape[:2], self.order, block.shape[3])
            return recur(empty if state is None else state, block, before, self.discretization).to(block.dtype)
        moved, added = self.step(before, before + block.shape[2], block.dtype, block.device)
        added = added @ block
        return added if state is None or moved is None else moved @ state + added

    def read(self, state: Tensor) -> Tensor:
        """State [g, h, N, c] → its moments [g, h, S, c]."""
        with torch.autocast(state.device.type, enabled=False):
            return self.moments(state.dtype, state.device) @ state


@lru_cache(maxsize=8)
@made_once
def memory_reader(order: int, discretization: str, *sampler: Any) -> MemoryReader:
    """The one reader of these settings in this process."""
    return MemoryReader(order, sampler_points(*sampler), discretization)
