"""The closed forms against scipy, against each other, and against what HiPPO-LegS promises.

One tolerance: fp64 results of a few thousand operations on numbers of size 1 agree to 1e-10.
"""

import math

import pytest
import torch
from scipy.integrate import fixed_quad, quad
from scipy.special import eval_legendre

from em_megatron.hippo import legs

TOLERANCE = 1e-10
ORDERS = [1, 2, 63, 64, 540]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def phi(n: int, u: float) -> float:
    return math.sqrt(2 * n + 1) * eval_legendre(n, 2 * u - 1)


@pytest.mark.parametrize("order", ORDERS)
def test_legendre_and_read_match_scipy(order: int) -> None:
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    degrees = torch.arange(order, dtype=torch.float64)[:, None]
    expected = torch.as_tensor(eval_legendre(degrees.int().numpy(), x.numpy()))
    assert_close(legs.legendre(order, x), expected)
    points = (x[1:-1] + 1) / 2
    assert_close(legs.read(order, points), (expected[:, 1:-1] * torch.sqrt(2 * degrees + 1)).T)


def test_inject_matches_adaptive_quadrature() -> None:
    order, total = 24, 37
    matrix = legs.inject(order, 0, total, total)
    for n in (0, 1, 2, 11, 23):
        for j in (0, 17, 18, 36):
            expected, _ = quad(lambda u, n=n: phi(n, u), j / total, (j + 1) / total, epsabs=1e-13)
            assert abs(matrix[n, j].item() - expected) < TOLERANCE


@pytest.mark.parametrize("order", [2, 63, 540])
def test_carry_matches_quadrature(order: int) -> None:
    """carry[n, m] = ∫₀ʳ φ_n(u) φ_m(u/r) du: the projection of the old basis on the new one."""
    t0, t1 = 19, 50
    r = t0 / t1
    matrix = legs.carry(order, t0, t1)
    for n, m in [(0, 0), (1, 0), (order - 1, 0), (order - 1, order // 2), (order - 1, order - 1)]:
        expected, _ = fixed_quad(lambda u, n=n, m=m: phi(n, u) * phi(m, u / r), 0, r, n=order + 1)
        assert abs(matrix[n, m].item() - expected) < TOLERANCE


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", [1, 7, 31])
def test_recurrence_equals_projection(order: int, block: int) -> None:
    """Block by block with an odd remainder, and token by token (block = 1)."""
    total = 23 if block == 1 else 5 * block + 2
    signal = noise(total, 3)
    state = torch.zeros(order, 3, dtype=torch.float64)
    for start in range(0, total, block):
        stop = min(start + block, total)
        new = legs.inject(order, start, stop, stop) @ signal[start:stop]
        state = legs.carry(order, start, stop) @ state + new
        assert_close(state, legs.inject(order, 0, stop, stop) @ signal[:stop])


@pytest.mark.parametrize("order", ORDERS)
def test_carry_composes_and_is_lower_triangular(order: int) -> None:
    whole = legs.carry(order, 301, 977)
    assert_close(legs.carry(order, 500, 977) @ legs.carry(order, 301, 500), whole)
    assert torch.equal(whole, whole.tril())
    assert_close(legs.carry(order, 301, 301), torch.eye(order, dtype=torch.float64))
    assert not legs.carry(order, 0, 977).any()


@pytest.mark.parametrize("order", [63, 64])
def test_carry_is_the_matrix_exponential(order: int) -> None:
    n = torch.arange(order, dtype=torch.float64)
    scale = torch.sqrt(2 * n + 1)
    generator = torch.tril(scale[:, None] * scale, diagonal=-1) + torch.diag(n + 1)
    assert_close(legs.carry(order, 700, 977), torch.matrix_exp(generator * math.log(700 / 977)))


@pytest.mark.parametrize("order", ORDERS)
def test_carry_rows_is_the_product(order: int) -> None:
    rows = legs.read(order, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    assert_close(legs.carry_rows(rows, 3, 7), rows @ legs.carry(order, 3, 7))
    assert not legs.carry_rows(rows, 0, 7).any()


def test_spectral_norm_is_the_root_of_the_ratio() -> None:
    """Shrinking time by r scales L² norms by √r at most; the bound is met once the order resolves [0, r]."""
    for order in ORDERS:
        assert torch.linalg.matrix_norm(legs.carry(order, 1000, 3000), 2) <= math.sqrt(1 / 3) + TOLERANCE
    norm = torch.linalg.matrix_norm(legs.carry(540, 1000, 3000), 2).item()
    assert norm == pytest.approx(math.sqrt(1 / 3), abs=TOLERANCE)


@pytest.mark.parametrize("smaller", [1, 2, 63])
def test_smaller_order_is_a_cut_of_the_larger(smaller: int) -> None:
    points = torch.tensor([0.01, 0.4, 0.99], dtype=torch.float64)
    assert_close(legs.inject(64, 5, 90, 101)[:smaller], legs.inject(smaller, 5, 90, 101))
    assert_close(legs.carry(64, 5, 90)[:smaller, :smaller], legs.carry(smaller, 5, 90))
    assert_close(legs.read(64, points)[:, :smaller], legs.read(smaller, points))


@pytest.mark.parametrize(("total", "explained"), [(2160, 0.237), (8192, 0.065)])
def test_white_noise_is_kept_in_proportion_to_the_order(total: int, explained: float) -> None:
    """Explained variance at the tokens' middles; 0.01 is the product's margin, the spread of 128 channels is 0.001."""
    signal = noise(total, 128)
    middles = (torch.arange(total, dtype=torch.float64) + 0.5) / total
    kept = legs.read(540, middles) @ (legs.inject(540, 0, total, total) @ signal)
    measured = 1 - ((signal - kept).square().mean() / signal.square().mean()).item()
    assert measured == pytest.approx(explained, abs=0.01)


def test_smooth_signal_is_kept_almost_entirely() -> None:
    total = 2160
    middles = (torch.arange(total, dtype=torch.float64) + 0.5) / total
    signal = torch.sin(40 * middles)[:, None]
    kept = legs.read(64, middles) @ (legs.inject(64, 0, total, total) @ signal)
    assert (signal - kept).square().mean() / signal.square().mean() < 1e-6


def test_a_million_tokens() -> None:
    """Next to both ends and in the middle. A single token has measure 1e-6, and its entry is the difference of two
    antiderivatives of size 1, right to a few roundings of 1e-16: nine digits or more, and the errors telescope."""
    order, total, half = 64, 1_000_000, 499_999
    for first in (0, 250_001, total - 3):
        matrix = legs.inject(order, first, first + 3, total)
        for n in (1, 2, 33, 63):
            expected, _ = fixed_quad(lambda u, n=n: phi(n, u), (first + 1) / total, (first + 2) / total, n=5)
            assert abs(matrix[n, 1].item() - expected) < 1e-15
    window = slice(half - 2000, half)
    moved = legs.carry(order, half, total) @ legs.inject(order, window.start, window.stop, half)
    assert_close(moved, legs.inject(order, window.start, window.stop, total))


def test_order_8640_stays_orthonormal() -> None:
    nodes, rests, weights = legs._gauss_nodes(8640)
    assert abs(weights.sum().item() - 1) < TOLERANCE
    assert_close(nodes + rests, torch.ones_like(nodes))
    last = torch.stack([row.clone() for row in legs._legendre(8640, nodes, rests)[[0, 4321, 8638, 8639]]])
    gram = (last * weights) @ last.T
    assert_close(gram, torch.diag(1 / (2 * torch.tensor([0, 4321, 8638, 8639], dtype=torch.float64) + 1)))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="start <= stop <= total"):
        legs.inject(4, 0, 9, 8)
    with pytest.raises(ValueError, match="0 <= t0 <= t1"):
        legs.carry(4, 9, 8)
    with pytest.raises(ValueError, match="at least 1"):
        legs.carry(0, 1, 2)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        legs.read(4, torch.tensor([1.5]))
    with pytest.raises(ValueError, match=r"in \[-1, 1\]"):
        legs.legendre(4, torch.tensor([2.0]))
