"""HiPPO-LegS in closed form: the three fp64 matrices that project, move and read a memory.

A signal f on [0, t], piecewise constant with one unit of time per token, has the state

    C[n] = (1/t) ∫₀ᵗ f(x) φ_n(x/t) dx,    φ_n(u) = √(2n+1)·P_n(2u−1)   (orthonormal on [0, 1])

which obeys the LegS equation dC/dt = −(1/t) A C + (1/t) B f of HiPPO (arXiv 2008.07669). Nothing here
integrates that equation: `inject` uses the antiderivative of P_n, and `carry` evaluates the projection of
a rescaled polynomial by Gauss–Legendre quadrature, which is exact for polynomials. Hence

    C(t1) = carry(t0 → t1) C(t0) + inject(t0 … t1; t1) X      equals      inject(0 … t1; t1) X.

Precision. The three-term recurrence is run on the differences D_n = P_n − P_{n−1} (Reinsch's form),

    (n+1) D_{n+1} = n D_n − (2n+1)(1 − x) P_n,

with 1 − x handed in as twice the distance to the nearer end of [0, 1]. Integer token counts make that
distance exact, so nothing cancels next to the ends, where φ_n is steepest.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

_CARRY_ROWS = 1024  # rows of a carry multiplied at once, so that its upper triangle is mostly skipped


def legendre(order: int, x: Tensor) -> Tensor:
    """Legendre polynomials P_0 … P_{order−1} at x ∈ [−1, 1]: fp64 [order, *x.shape]."""
    _check_order(order)
    x = x.detach().to("cpu", torch.float64)
    if bool((x.abs() > 1).any()) or not bool(x.isfinite().all()):
        raise ValueError("legendre needs x in [-1, 1]; rescale the points to that interval.")
    return _legendre(order, (1 + x) / 2, (1 - x) / 2)


def read(order: int, points: Tensor) -> Tensor:
    """φ_n at the points u ∈ [0, 1] (0 = first token, 1 = now): fp64 [len(points), order].

    `read(order, u) @ C` is the value at u of the polynomial whose coefficients are C.
    """
    _check_order(order)
    u = points.detach().to("cpu", torch.float64)
    if u.dim() != 1 or not bool(((u >= 0) & (u <= 1)).all()):
        raise ValueError("read needs a one-dimensional tensor of points in [0, 1].")
    return (_legendre(order, u, 1 - u) * _scales(order)[:, None]).T.contiguous()


def inject(order: int, start: int, stop: int, total: int) -> Tensor:
    """Contribution of tokens start … stop−1 to the state at time `total`: fp64 [order, stop − start].

    Entry [n, j] = ∫ φ_n over [(start+j)/total, (start+j+1)/total]
                 = [P_{n+1}(x) − P_{n−1}(x)] / (2√(2n+1)) between the two ends x = 2u − 1, and 1/total for n = 0.
    Needs 0 ≤ start ≤ stop ≤ total; raises ValueError otherwise.
    """
    _check_order(order)
    check_span(start, stop, total)
    edges = torch.arange(start, stop + 1, dtype=torch.float64, device="cpu")
    near = torch.minimum(edges, total - edges) / total
    sign = torch.where(2 * edges < total, -1.0, 1.0).to(torch.float64)
    out = torch.empty(order, stop - start, dtype=torch.float64, device="cpu")
    out[0] = 1 / total
    antiderivative, last = torch.empty_like(near), torch.zeros_like(near)
    for n, (_, difference) in enumerate(_recurrence(order, near), start=-1):
        # `difference` is D_{n+1}: D_n + D_{n+1} = P_{n+1} − P_{n−1}, odd in x for even n.
        if n >= 1:
            torch.add(difference, last, out=antiderivative)
            if n % 2 == 0:
                antiderivative.mul_(sign)
            torch.sub(antiderivative[1:], antiderivative[:-1], out=out[n])
            out[n].div_(2 * math.sqrt(2 * n + 1))
        last.copy_(difference)
    return out


def carry(order: int, t0: int, t1: int) -> Tensor:
    """Moves a state from time t0 to t1 ≥ t0, nothing new arriving: fp64 [order, order], lower triangular.

    carry = exp(A ln r) with r = t0/t1, of spectral norm at most √r. It is zero for t0 = 0, where there is no
    history yet. Raises ValueError unless 0 ≤ t0 ≤ t1 and t1 > 0.
    """
    _check_order(order)
    check_times(t0, t1)
    out = torch.zeros(order, order, dtype=torch.float64, device="cpu")
    if t0 == 0:
        return out
    left, right = _carry_factors(order, t0, t1)
    for a in range(0, order, _CARRY_ROWS):
        b = min(a + _CARRY_ROWS, order)
        torch.mm(left[a:b], right[:b].T, out=out[a:b, :b])
    return out.tril_()


def carry_rows(rows: Tensor, t0: int, t1: int) -> Tensor:
    """rows @ carry(order, t0, t1) for fp64 rows [R, order], in R·order² instead of order³ multiply-adds."""
    order = rows.shape[1]
    check_times(t0, t1)
    if t0 == 0:
        return torch.zeros_like(rows)
    left, right = _carry_factors(order, t0, t1)
    return (rows @ left) @ right.T


def check_times(t0: int, t1: int) -> None:
    """Raise ValueError unless 0 ≤ t0 ≤ t1 and t1 > 0."""
    if not 0 <= t0 <= t1 or t1 == 0:
        raise ValueError(f"A state moves from t0 to t1 tokens with 0 <= t0 <= t1 and t1 > 0, got {t0} and {t1}.")


def check_span(start: int, stop: int, total: int) -> None:
    """Raise ValueError unless 0 ≤ start ≤ stop ≤ total and total > 0."""
    if not 0 <= start <= stop <= total or total == 0:
        raise ValueError(
            f"Tokens start … stop enter a state of total > 0 tokens with 0 <= start <= stop <= total, "
            f"got start {start}, stop {stop}, total {total}."
        )


def _check_order(order: int) -> None:
    if order < 1:
        raise ValueError(f"The memory order counts coefficients and must be at least 1, got {order}.")


def _scales(order: int) -> Tensor:
    return torch.sqrt(2 * torch.arange(order, dtype=torch.float64, device="cpu") + 1)


def _recurrence(last: int, near: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (P_n, P_n − P_{n−1}) at x = 1 − 2·near for n = 0 … last; both buffers are reused, so copy to keep."""
    value, difference = torch.ones_like(near), torch.zeros_like(near)
    yield value, difference
    for n in range(last):
        difference.mul_(n / (n + 1)).addcmul_(near, value, value=-2 * (2 * n + 1) / (n + 1))
        value.add_(difference)
        yield value, difference


def _legendre(order: int, u: Tensor, rest: Tensor) -> Tensor:
    """P_n(2u − 1) for n < order, [order, *u.shape]; rest = 1 − u is given apart because it may be better known."""
    sign = torch.where(u < rest, -1.0, 1.0).to(torch.float64)
    out = torch.empty(order, *u.shape, dtype=torch.float64, device="cpu")
    for n, (value, _) in enumerate(_recurrence(order - 1, torch.minimum(u, rest))):
        torch.mul(value, sign if n % 2 else 1.0, out=out[n])
    return out


@lru_cache(maxsize=16)
def _gauss_nodes(order: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss–Legendre rule on [0, 1]: nodes v (ascending), 1 − v, weights, each fp64 [order].

    Newton in θ with x = cos θ on P_order, five times from θ_k = π(4k − 1)/(4·order + 2); the weights are the
    Christoffel numbers 1/Σ φ_n(v)². O(order²), where an eigenvalue solver takes O(order³).
    """
    k = torch.arange(1, (order + 1) // 2 + 1, dtype=torch.float64, device="cpu")
    theta = math.pi * (4 * k - 1) / (4 * order + 2)
    for _ in range(5):
        near = torch.sin(theta / 2).square()
        *_, (value, difference) = _recurrence(order, near)
        theta += value * torch.sin(theta) / (order * (2 * near * value - difference))
    near = torch.sin(theta / 2).square()
    christoffel = torch.zeros_like(near)
    for n, (value, _) in enumerate(_recurrence(order - 1, near)):
        christoffel.addcmul_(value, value, value=2 * n + 1)
    mirrored = order // 2
    nodes = torch.cat([near, 1 - near[:mirrored].flip(0)])
    rests = torch.cat([1 - near, near[:mirrored].flip(0)])
    weights = 1 / torch.cat([christoffel, christoffel[:mirrored].flip(0)])
    return nodes, rests, weights


def _carry_factors(order: int, t0: int, t1: int) -> tuple[Tensor, Tensor]:
    """(r·Φ(r v) diag(w), Φ(v)), each [order, nodes], whose product left @ rightᵀ is the carry; r = t0/t1 > 0."""
    nodes, rests, weights = _gauss_nodes(order)
    scales = _scales(order)[:, None]
    left = _legendre(order, t0 * nodes / t1, ((t1 - t0) + t0 * rests) / t1)
    right = _legendre(order, nodes, rests)
    return left.mul_(scales).mul_(weights * (t0 / t1)), right.mul_(scales)
