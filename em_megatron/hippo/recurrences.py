"""The per-token recurrences of HiPPO, as the same two linear maps that `legs` gives in closed form.

The LegS equation dC/dt = −(1/t) A C + (1/t) B f (arXiv 2008.07669) is stepped one token at a time. Since B = A e_0,
every scheme has the form

    C(k+1) = S_k C(k) + (I − S_k) e_0 f_k ,    k = tokens already seen ≥ 1 ,    C(1) = e_0 f_0

    forward_euler    S_k = I − A/k
    backward_euler   S_k = (I + A/k)⁻¹
    bilinear         S_k = (I + A/2k)⁻¹ (I − A/2k)
    zero_order_hold  S_k = exp(−A ln((k+1)/k))

This is the step index of HiPPO's equation c_{k+1} = (1 − A/k) c_k + (1/k) B f_k, the first token being stored
exactly. With it the zero-order hold and the exact projection are the same map, so both use the closed form.

All S_k are functions of one matrix and commute; hence a column e_0 swept backwards in time gives every column of
`inject`: with c_k = S_{total−1} ⋯ S_k e_0, token k enters as c_{k+1} − c_k, and c_0 = 0. Forward Euler may not be
reordered in floating point: its early steps amplify roundings by up to 2^N, and only the later steps, in their order,
cancel them. It is stepped forwards, in segments of 2N tokens or more, the length after which its transient is over.

One step costs O(N) (Euler) or O(N log N) (solves) per vector: A = diag(s) L diag(s) − diag(0 … N−1), s_n = √(2n+1),
L the lower triangle of ones.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from em_megatron.hippo import legs

DISCRETIZATIONS = ("exact", "forward_euler", "backward_euler", "bilinear", "zero_order_hold")
_CLOSED_FORM = ("exact", "zero_order_hold")


def check_discretization(discretization: str) -> None:
    """Raise ValueError unless the name is one of DISCRETIZATIONS."""
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"Unknown discretization {discretization!r}; choose one of {', '.join(DISCRETIZATIONS)}.")


def carry(discretization: str, order: int, t0: int, t1: int) -> Tensor:
    """Moves a state from time t0 to t1, nothing new arriving: fp64 [order, order], lower triangular, zero for t0 = 0.

    Raises ValueError for an unknown scheme, times out of order, or a forward Euler that overflows fp64 (order ≈ 500
    and more). The stepped schemes cost O(order² log order · (t1 − t0)): they are there to be compared with.
    """
    check_discretization(discretization)
    if discretization in _CLOSED_FORM:
        return legs.carry(order, t0, t1)
    legs.check_times(t0, t1)
    columns = torch.eye(order, dtype=torch.float64, device="cpu")
    if t0 == 0:
        return columns.zero_()
    for k in range(t0, t1):
        columns = _step(discretization, columns, k)
    return _finite(columns.T.tril(), discretization)


def carry_rows(discretization: str, rows: Tensor, t0: int, t1: int) -> Tensor:
    """rows @ carry for fp64 rows [R, order]; in closed form without building the [order, order] carry."""
    check_discretization(discretization)
    if discretization in _CLOSED_FORM:
        return legs.carry_rows(rows, t0, t1)
    return rows @ carry(discretization, rows.shape[1], t0, t1)


def inject(discretization: str, order: int, start: int, stop: int, total: int) -> Tensor:
    """Contribution of tokens start … stop−1 to the state at time `total`: fp64 [order, stop − start].

    Needs 0 ≤ start ≤ stop ≤ total; raises ValueError otherwise, and for an unknown scheme.
    """
    out = torch.empty(order, stop - start if stop > start else 0, dtype=torch.float64, device="cpu")
    for first, piece in inject_pieces(discretization, order, start, stop, total, max(1, stop - start)):
        out[:, first - start : first - start + piece.shape[1]] = piece
    return out


def inject_pieces(
    discretization: str, order: int, start: int, stop: int, total: int, piece_tokens: int
) -> Iterator[tuple[int, Tensor]]:
    """`inject` in pieces of at most `piece_tokens` columns, last tokens first: yields (first token, [order, columns]).

    Bounds the memory of a long span and sweeps a stepped recurrence only once.
    """
    check_discretization(discretization)
    legs.check_span(start, stop, total)
    bounds = [(max(start, b - piece_tokens), b) for b in range(stop, start, -piece_tokens)]
    if discretization in _CLOSED_FORM:
        for first, last in bounds:
            yield first, legs.inject(order, first, last, total)
        return
    if discretization == "forward_euler":
        yield from _forward_euler_pieces(order, start, stop, total, piece_tokens)
        return
    now = torch.zeros(order, dtype=torch.float64, device="cpu")
    now[0] = 1
    for k in range(total - 1, stop - 1, -1):
        now = _earlier(discretization, now, k)
    for first, last in bounds:
        piece = torch.empty(last - first, order, dtype=torch.float64, device="cpu")
        for k in range(last - 1, first - 1, -1):
            before = _earlier(discretization, now, k)
            torch.sub(now, before, out=piece[k - first])
            now = before
        yield first, piece.T


def _forward_euler_pieces(
    order: int, start: int, stop: int, total: int, piece_tokens: int
) -> Iterator[tuple[int, Tensor]]:
    """The pieces of `inject_pieces`, segment by segment: step a segment's tokens to its end, then carry them on."""
    edges = [*range(0, max(1, total - 2 * order + 1), 2 * order), total]
    onward = torch.eye(order, dtype=torch.float64, device="cpu")
    for a, b in zip(edges[-2::-1], edges[:0:-1], strict=True):
        first, last = max(a, start), min(b, stop)
        if first < last:
            columns = _finite(onward @ _forward_euler_segment(order, first, last, b), "forward_euler")
            for end in range(last, first, -piece_tokens):
                begin = max(first, end - piece_tokens)
                yield begin, columns[:, begin - first : end - first]
        if a > start:
            onward = onward @ carry("forward_euler", order, a, b)


def _forward_euler_segment(order: int, first: int, last: int, end: int) -> Tensor:
    """Tokens first … last−1 stepped one by one to time `end`: [order, last − first]."""
    columns = torch.zeros(last - first, order, dtype=torch.float64, device="cpu")
    unit = torch.zeros(order, dtype=torch.float64, device="cpu")
    unit[0] = 1
    for k in range(first, end):
        seen = min(k, last) - first
        columns[:seen] = _step("forward_euler", columns[:seen], k) if seen else columns[:seen]
        if k < last:
            columns[seen] = unit - _earlier("forward_euler", unit, k)
    return columns.T


def _finite(matrix: Tensor, discretization: str) -> Tensor:
    if not bool(matrix.isfinite().all()):
        raise ValueError(
            f"The {discretization} recurrence of order {matrix.shape[0]} grows beyond fp64 in its first steps; "
            "use another discretization or a smaller order."
        )
    return matrix


def _earlier(discretization: str, column: Tensor, k: int) -> Tensor:
    """c_k from c_{k+1}; before the first token there is nothing."""
    return _step(discretization, column, k) if k else torch.zeros_like(column)


def _step(discretization: str, states: Tensor, k: int) -> Tensor:
    """S_k applied to each state in the last dimension: [..., order] → [..., order]."""
    if discretization == "forward_euler":
        return _apply_a(states).mul_(-1 / k).add_(states)
    if discretization == "backward_euler":
        return _solve(states, 1 / k)
    return _solve(states, 1 / (2 * k)).mul_(2).sub_(states)  # (I + αA)⁻¹(I − αA) = 2(I + αA)⁻¹ − I


def _apply_a(states: Tensor) -> Tensor:
    """A x in O(order) by a running sum."""
    n = torch.arange(states.shape[-1], dtype=torch.float64, device="cpu")
    scale = torch.sqrt(2 * n + 1)
    return (scale * states).cumsum_(dim=-1).mul_(scale).addcmul_(n, states, value=-1)


def _solve(states: Tensor, alpha: float) -> Tensor:
    """x with (I + αA) x = y, for 0 < α ≤ 1.

    Forward substitution on the running sum z_n = Σ_{m≤n} s_m x_m is the linear recurrence
    z_n = f_n z_{n−1} + s_n y_n/(1 + α(n+1)) with f_n = (1 − αn)/(1 + α(n+1)). Since |f_n| < 1 it is solved stably
    for all n together, doubling the reach of every entry log2(order) times.
    """
    n = torch.arange(states.shape[-1], dtype=torch.float64, device="cpu")
    scale, diagonal = torch.sqrt(2 * n + 1), 1 + alpha * (n + 1)
    total, factor = states * (scale / diagonal), (1 - alpha * n) / diagonal
    factor[0] = 0
    reach = 1
    while reach < len(n):
        total[..., reach:] += factor[reach:] * total[..., :-reach]
        factor = torch.cat([factor[:reach], factor[reach:] * factor[:-reach]])
        reach *= 2
    solved = states / diagonal
    solved[..., 1:] -= (alpha * scale / diagonal)[1:] * total[..., :-1]
    return solved
