"""Samplers give the asked number of ascending points inside (0, 1), and say what is wrong with bad ones."""

import pytest
import torch

from em_megatron.hippo import samplers

DEFAULTS = {"a": 3.0, "lo": 0.25, "hi": 0.5, "points": (0.1, 0.2, 0.9)}


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("slots", [1, 3, 511])
def test_points_ascend_inside_the_unit_interval(name: str, slots: int) -> None:
    given = [(j + 1) / (slots + 1) for j in range(slots)]
    points = samplers.sampler_points(name, slots, **{**DEFAULTS, "points": given})
    assert points.shape == (slots,)
    assert points.dtype == torch.float64
    assert 0 < points.min() <= points.max() < 1
    assert (points.diff() > 0).all()


def test_values() -> None:
    assert samplers.uniform(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert samplers.window(2, 0.5, 1.0).tolist() == [0.625, 0.875]
    assert samplers.given((0.1, 0.7)).tolist() == [0.1, 0.7]
    s = torch.tensor([5 / 6, 1 / 2, 1 / 6], dtype=torch.float64)
    expected = 1 - (torch.exp(2.5 * s) - 1) / (torch.exp(torch.tensor(2.5, dtype=torch.float64)) - 1)
    torch.testing.assert_close(samplers.exponential(3, 2.5), expected, rtol=0, atol=1e-15)


def test_exponential_tends_to_uniform_and_leans_to_the_present() -> None:
    """First order in a: the points move by at most a/8."""
    torch.testing.assert_close(samplers.exponential(65, 1e-9), samplers.uniform(65), rtol=0, atol=1e-9)
    gaps = samplers.exponential(65, 4.0).diff()
    assert (gaps.diff() < 0).all()


@pytest.mark.parametrize(
    ("name", "slots", "changes", "message"),
    [
        ("random", 3, {}, "Unknown sampler 'random'"),
        ("uniform", 0, {}, "one slot or more"),
        ("exponential", 3, {"a": 0.0}, "finite a > 0"),
        ("exponential", 3, {"a": -1.0}, "finite a > 0"),
        ("exponential", 3, {"a": float("nan")}, "finite a > 0"),
        ("exponential", 64, {"a": 800.0}, "choose a smaller a"),
        ("window", 3, {"lo": 0.5, "hi": 0.5}, "0 <= lo < hi <= 1"),
        ("window", 3, {"hi": 1.5}, "0 <= lo < hi <= 1"),
        ("window", 64, {"lo": 0.5, "hi": 0.5 + 1e-15}, "too narrow"),
        ("points", 4, {}, "3 points for 4 slots"),
        ("points", 0, {"points": ()}, "one slot or more"),
        ("points", 3, {"points": (0.2, 0.1, 0.9)}, "ascend strictly"),
        ("points", 3, {"points": (0.0, 0.1, 0.9)}, r"inside \(0, 1\)"),
        ("points", 3, {"points": (0.1, 0.2, float("nan"))}, r"inside \(0, 1\)"),
    ],
)
def test_bad_input_is_refused(name: str, slots: int, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        samplers.sampler_points(name, slots, **{**DEFAULTS, **changes})
