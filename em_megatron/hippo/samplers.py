"""Where in the history the memory is read: S points u in (0, 1), 0 being the first token and 1 the present.

The points are not part of the weights, so any of these may be swapped in at test time. They keep away from 0 and 1,
where a polynomial of order N may be √N times as large as in the middle.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SAMPLERS = ("uniform", "exponential", "window", "points")


def sampler_points(name: str, slots: int, *, a: float, lo: float, hi: float, points: Sequence[float]) -> Tensor:
    """The points of the named sampler: fp64 [slots], strictly ascending, inside (0, 1).

    `a` is read by "exponential", `lo` and `hi` by "window", `points` by "points". Raises ValueError if the name is
    unknown, a parameter is out of range, or the number of points given is not `slots`.
    """
    if name == "uniform":
        return uniform(slots)
    if name == "exponential":
        return exponential(slots, a)
    if name == "window":
        return window(slots, lo, hi)
    if name == "points":
        if len(points) != slots:
            raise ValueError(f"The points sampler was given {len(points)} points for {slots} slots; make them equal.")
        return given(points)
    raise ValueError(f"Unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}.")


def uniform(slots: int) -> Tensor:
    """u_j = (j + ½)/slots: fp64 [slots]."""
    _check_slots(slots)
    return (torch.arange(slots, dtype=torch.float64, device="cpu") + 0.5) / slots


def exponential(slots: int, a: float) -> Tensor:
    """1 − u_j = (e^{a s_j} − 1)/(e^a − 1) with s_j = 1 − (j + ½)/slots: fp64 [slots], denser towards the present.

    a > 0 sets how much denser; a → 0 is uniform. Raises ValueError for other a, and for one so large that the last
    points round to 1.
    """
    if not (a > 0 and math.isfinite(a)):
        raise ValueError(f"The exponential sampler needs a finite a > 0, got {a}; use 'uniform' for the limit a = 0.")
    gap = uniform(slots).flip(0)
    # e^{a s} − 1 over e^a − 1, with e^{a(s−1)} taken out so that a large a cannot overflow.
    points = 1 - torch.exp(a * (gap - 1)) * torch.expm1(-a * gap) / math.expm1(-a)
    if not _valid(points):
        raise ValueError(f"The exponential sampler with a = {a} crowds {slots} points into 1.0; choose a smaller a.")
    return points


def window(slots: int, lo: float, hi: float) -> Tensor:
    """Uniform inside the part (lo, hi) of the history, 0 ≤ lo < hi ≤ 1: fp64 [slots]."""
    if not 0 <= lo < hi <= 1:
        raise ValueError(f"The window sampler needs 0 <= lo < hi <= 1, got lo = {lo} and hi = {hi}.")
    points = lo + (hi - lo) * uniform(slots)
    if not _valid(points):
        raise ValueError(f"The window ({lo}, {hi}) is too narrow to hold {slots} distinct points; widen it.")
    return points


def given(points: Sequence[float]) -> Tensor:
    """The user's own points, which must ascend strictly inside (0, 1): fp64 [len(points)]."""
    _check_slots(len(points))
    tensor = torch.tensor(list(points), dtype=torch.float64, device="cpu")
    if not _valid(tensor):
        raise ValueError(
            "Memory points must ascend strictly and lie inside (0, 1), 0 and 1 excluded; sort and trim them."
        )
    return tensor


def _check_slots(slots: int) -> None:
    if slots < 1:
        raise ValueError(f"A memory is read at one slot or more, got {slots}.")


def _valid(points: Tensor) -> bool:
    return bool(((points > 0) & (points < 1)).all() and (points.diff() > 0).all())
