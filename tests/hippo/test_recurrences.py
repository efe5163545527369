"""The stepped recurrences against a dense token-by-token loop, and against the exact hold they approximate.

One tolerance: fp64 results of a few thousand operations on numbers of size 1 agree to 1e-10.
"""

import math

import pytest
import scipy.linalg
import torch

from em_megatron.hippo import legs, recurrences

TOLERANCE = 1e-10
STABLE = ["exact", "backward_euler", "bilinear", "zero_order_hold"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_step(name: str, order: int, k: int) -> torch.Tensor:
    """S_k from its definition, with dense solves and a dense matrix exponential."""
    n = torch.arange(order, dtype=torch.float64)
    scale = torch.sqrt(2 * n + 1)
    A = torch.tril(scale[:, None] * scale, diagonal=-1) + torch.diag(n + 1)
    eye = torch.eye(order, dtype=torch.float64)
    if name == "forward_euler":
        return eye - A / k
    if name == "backward_euler":
        return torch.linalg.solve_triangular(eye + A / k, eye, upper=False)
    if name == "bilinear":
        return torch.linalg.solve_triangular(eye + A / (2 * k), eye - A / (2 * k), upper=False)
    # scipy's: torch.matrix_exp of a 2 × 2 matrix near the identity is off by 1e-11 in some releases.
    return torch.from_numpy(scipy.linalg.expm(-A.numpy() * math.log((k + 1) / k)))


def dense_states(name: str, order: int, signal: torch.Tensor) -> torch.Tensor:
    state = torch.zeros(order, signal.shape[1], dtype=torch.float64)
    state[0] = signal[0]
    for k in range(1, len(signal)):
        step = dense_step(name, order, k)
        state = step @ state - step[:, :1] * signal[k]
        state[0] += signal[k]
    return state


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", recurrences.DISCRETIZATIONS)
@pytest.mark.parametrize("order", [1, 2, 17, 33])
def test_inject_is_the_dense_loop(name: str, order: int) -> None:
    """Relative, because forward Euler's states are as large as 1e4; the exact hold is matched by exponentials."""
    signal = noise(83, 5)
    state = recurrences.inject(name, order, 0, 83, 83) @ signal
    assert relative_error(state, dense_states(name, order, signal)) < TOLERANCE


@pytest.mark.parametrize("name", recurrences.DISCRETIZATIONS)
@pytest.mark.parametrize(("order", "block"), [(1, 5), (2, 7), (63, 31), (64, 67)])
def test_block_recurrence_equals_inject(name: str, order: int, block: int) -> None:
    """Relative to the largest intermediate state, which only forward Euler makes larger than the last one."""
    total = 3 * block + 2
    signal = noise(total, 3)
    state, largest = torch.zeros(order, 3, dtype=torch.float64), 0.0
    for start in range(0, total, block):
        stop = min(start + block, total)
        new = recurrences.inject(name, order, start, stop, stop) @ signal[start:stop]
        moved = recurrences.carry(name, order, start, stop)
        largest = max(largest, (moved.abs() @ state.abs()).norm().item(), new.norm().item())
        state = moved @ state + new
    expected = recurrences.inject(name, order, 0, total, total) @ signal
    assert (state - expected).norm().item() < TOLERANCE * largest


@pytest.mark.parametrize("name", ["backward_euler", "bilinear"])
def test_order_540(name: str) -> None:
    signal = noise(301, 2)
    block = recurrences.inject(name, 540, 0, 280, 280) @ signal[:280]
    state = recurrences.carry(name, 540, 280, 301) @ block
    state += recurrences.inject(name, 540, 280, 301, 301) @ signal[280:]
    expected = recurrences.inject(name, 540, 0, 301, 301) @ signal
    torch.testing.assert_close(state, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", recurrences.DISCRETIZATIONS)
def test_pieces_join_to_inject_and_carry_rows_to_the_product(name: str) -> None:
    whole = recurrences.inject(name, 9, 4, 60, 71)
    for first, piece in recurrences.inject_pieces(name, 9, 4, 60, 71, 13):
        assert piece.shape[1] <= 13
        assert torch.equal(piece, whole[:, first - 4 : first - 4 + piece.shape[1]])
    rows = legs.read(9, torch.tensor([0.2, 0.7], dtype=torch.float64))
    product = rows @ recurrences.carry(name, 9, 20, 31)
    torch.testing.assert_close(recurrences.carry_rows(name, rows, 20, 31), product, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", recurrences.DISCRETIZATIONS)
def test_smaller_order_is_a_cut_of_the_larger(name: str) -> None:
    cut = recurrences.inject(name, 33, 0, 70, 70)[:16]
    assert relative_error(cut, recurrences.inject(name, 16, 0, 70, 70)) < TOLERANCE
    cut = recurrences.carry(name, 33, 40, 70)[:16, :16]
    assert relative_error(cut, recurrences.carry(name, 16, 40, 70)) < TOLERANCE


def test_bilinear_converges_to_the_exact_hold_for_a_smooth_signal() -> None:
    """First order: a signal four times as smooth (four times the tokens) has a quarter of the error."""
    errors = []
    for total in (100, 400, 1600):
        signal = torch.sin(6 * torch.arange(total, dtype=torch.float64) / total + 0.3)[:, None]
        exact = legs.inject(16, 0, total, total) @ signal
        errors.append(relative_error(recurrences.inject("bilinear", 16, 0, total, total) @ signal, exact))
    assert errors[1] < errors[0] / 3.9
    assert errors[2] < errors[1] / 3.9


def test_errors_on_white_noise() -> None:
    """N = 64, T = 192, 256 channels. Forward Euler is useless there, the solves lose half of the signal."""
    signal = noise(192, 256)
    exact = legs.inject(64, 0, 192, 192) @ signal
    error = {
        name: relative_error(recurrences.inject(name, 64, 0, 192, 192) @ signal, exact)
        for name in recurrences.DISCRETIZATIONS
    }
    assert 3000 < error["forward_euler"] < 30000
    assert error["backward_euler"] == pytest.approx(0.79, abs=0.02)
    assert error["bilinear"] == pytest.approx(0.52, abs=0.02)
    assert error["zero_order_hold"] == 0


@pytest.mark.parametrize("name", STABLE)
def test_carry_never_grows_a_state(name: str) -> None:
    assert torch.linalg.matrix_norm(recurrences.carry(name, 64, 10, 40), 2) <= 1 + TOLERANCE


def test_forward_euler_that_overflows_is_refused() -> None:
    with pytest.raises(ValueError, match="grows beyond fp64"):
        recurrences.inject("forward_euler", 1100, 0, 40, 450)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown discretization 'euler'"):
        recurrences.carry("euler", 4, 1, 2)
    for name in recurrences.DISCRETIZATIONS:
        with pytest.raises(ValueError, match="start <= stop <= total"):
            recurrences.inject(name, 4, 3, 2, 8)
        with pytest.raises(ValueError, match="0 <= t0 <= t1"):
            recurrences.carry(name, 4, 9, 8)
