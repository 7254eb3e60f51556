"""The distances of two samples: values that are known, and definitions written out."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from pyro_ebm.diagnostics import mmd, sliced_wasserstein
from tests.statistics import assert_mean_of_rows


def by_definition(x, y, widths):
    """The U-statistic, pair by pair."""

    def k(a, b):
        return np.mean([math.exp(-((a - b) ** 2).sum() / (2 * s**2)) for s in widths])

    def within(z):
        return np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])

    return within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])


@pytest.mark.parametrize("bandwidths", [None, 0.7, [0.5, 2.0]])
def test_mmd_is_its_definition(bandwidths):
    x, y = torch.randn(2, 3, 6, 2).double(), (2 * torch.randn(3, 9, 2) + 1).double()
    found = mmd(x, y, bandwidths)
    assert found.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        a, b = x[i, j].numpy(), y[j].numpy()
        z = np.concatenate([a, b])
        pairs = np.sort([np.linalg.norm(z[i] - z[j]) for i in range(15) for j in range(i)])
        median = pairs[(len(pairs) - 1) // 2]
        widths = [median] if bandwidths is None else np.atleast_1d(bandwidths)
        assert float(found[i, j]) == pytest.approx(by_definition(a, b, widths))


@pytest.mark.parametrize(("shift", "sd"), [(0.0, 1.0), (0.8, 1.0), (0.0, 2.0)])
def test_mmd_has_the_mean_of_two_gaussians(shift, sd):
    # E k(x, y) = (s^2 / v)^(d / 2) exp(-|shift|^2 / 2 v), v = s^2 + the sum of both variances
    d, s = 3, 1.3
    x, y = torch.randn(2000, 20, d), sd * torch.randn(2000, 30, d) + shift

    def mean(variances, apart):
        v = s**2 + variances
        return (s**2 / v) ** (d / 2) * math.exp(-d * apart**2 / (2 * v))

    truth = mean(2.0, 0.0) + mean(2 * sd**2, 0.0) - 2 * mean(1 + sd**2, shift)
    assert_mean_of_rows(mmd(x, y, s).double(), truth)


def test_mmd_far_from_the_origin_keeps_its_digits():
    x, y = torch.randn(100, 2).double(), torch.randn(100, 2).double()
    far = (x + 1024).float(), (y + 1024).float()  # which rounds by 6e-5
    assert float(mmd(*far)) == pytest.approx(float(mmd(x, y)), abs=1e-4)


@pytest.mark.parametrize("sizes", [(50, 50), (40, 60), (7, 300), (1, 5)])
def test_in_one_dimension_it_is_the_wasserstein_distance(sizes):
    x, y = torch.randn(sizes[0], 1).double(), 1 + 2 * torch.randn(sizes[1], 1).double()
    truth = wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy())
    assert float(sliced_wasserstein(x, y, p=1)) == pytest.approx(truth)
    # as many copies of each point as it takes: then both are sorted, and matched in order
    n = math.lcm(*sizes)
    u, v = (z.repeat_interleave(n // len(z), 0)[:, 0].sort().values for z in (x, y))
    for p in (1, 2, 3.5):
        apart = (u - v).abs().pow(p).mean().pow(1 / p)
        torch.testing.assert_close(sliced_wasserstein(x, y, p=p), apart)


def test_the_sliced_distance_of_a_cloud_and_itself_moved():
    # each direction sees (theta . v)^2, whose mean is |v|^2 / d
    x, v = torch.randn(40, 5).double(), torch.arange(5.0).double()
    squares = torch.stack([sliced_wasserstein(x, x + v, 1).square() for _ in range(3000)])
    assert_mean_of_rows(squares, v.square().sum() / 5)
    torch.manual_seed(1)
    together = sliced_wasserstein(x, x + v, 100)
    torch.manual_seed(1)
    directions = torch.randn(100, 5)
    directions = (directions / directions.norm(dim=-1, keepdim=True)).double()
    torch.testing.assert_close(together, (directions @ v).square().mean().sqrt())


def test_a_batch_is_its_elements():
    x, y = torch.randn(4, 1, 10, 3), torch.randn(2, 15, 3)
    torch.manual_seed(0)
    found = sliced_wasserstein(x, y, 20)
    assert found.shape == (4, 2)
    for i, j in np.ndindex(4, 2):
        torch.manual_seed(0)
        torch.testing.assert_close(found[i, j], sliced_wasserstein(x[i, 0], y[j], 20))


@pytest.mark.parametrize("distance", [mmd, sliced_wasserstein])
def test_distances_have_gradients(distance):
    x, y = torch.randn(30, 2), torch.randn(20, 2) + 3
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(distance(x, y), x)
    assert gradient.isfinite().all()
    assert (gradient.mean(0) < 0).all()  # towards y, both fall


@pytest.mark.parametrize("distance", [mmd, sliced_wasserstein])
def test_wrong_arguments(distance):
    x = torch.randn(5, 2)
    for wrong, match in [
        (torch.randn(5), r"y must hold at least . point\(s\)"),
        (torch.randn(0, 2), r"y must hold at least . point\(s\)"),
        (torch.randn(5, 3), "points of x have 2 numbers and those of y 3"),
        (torch.full((5, 2), torch.nan), "y holds points that are NaN"),
        ([[1.0, 2.0]], "y must be a tensor of real numbers"),
    ]:
        with pytest.raises(ValueError, match=match):
            distance(x, wrong)
    with pytest.raises(ValueError, match="do not broadcast"):
        distance(torch.randn(2, 5, 2), torch.randn(3, 5, 2))


def test_wrong_settings():
    x = torch.randn(5, 2)
    for wrong in (0.0, [1.0, -1.0], []):
        with pytest.raises(ValueError, match="bandwidths must be positive"):
            mmd(x, x, wrong)
    with pytest.raises(ValueError, match="bandwidths must be a number"):
        mmd(x, x, "wide")
    with pytest.raises(ValueError, match="coincide: give bandwidths"):
        mmd(torch.zeros(9, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="p must be at least 1"):
        sliced_wasserstein(x, x, p=0.5)
    with pytest.raises(ValueError, match="num_projections must be"):
        sliced_wasserstein(x, x, 0)
