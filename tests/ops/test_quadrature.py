"""Integrals by quadrature: closed forms, gradients, and refusals."""

import math

import pytest
import torch
from scipy import integrate
from torch.testing import assert_close

from pyro_ebm.ops.integration import quadrature_grid
from pyro_ebm.ops.integration.quadrature import log_integral

HALF_LOG_2PI = math.log(2 * math.pi) / 2
LOC = torch.tensor([0.0, 1e3, -1e6, 3.3, 1e-8], dtype=torch.float64)
SCALE = torch.tensor([1.0, 0.1, 1e3, 1e-6, 1e6], dtype=torch.float64)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def standardized(z):
    return (z[..., 0] - LOC) / SCALE


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log_f", "truth"),
    [
        (lambda z: -standardized(z).square() / 2, HALF_LOG_2PI + SCALE.log()),
        (lambda z: -standardized(z).abs(), math.log(2.0) + SCALE.log()),  # a kink
        (lambda z: -standardized(z).square().log1p(), math.log(math.pi) + SCALE.log()),  # Cauchy
        (  # logistic
            lambda z: -standardized(z) - 2 * torch.nn.functional.softplus(-standardized(z)),
            SCALE.log(),
        ),
        (  # Gumbel: one tail is double exponential, and overflows
            lambda z: -standardized(z) - standardized(z).neg().exp(),
            SCALE.log(),
        ),
    ],
)
def test_any_location_and_scale(log_f, truth):
    assert_close(log_integral(log_f, 1, (5,)), truth.expand(5), rtol=0, atol=2e-8)


@pytest.mark.parametrize(
    ("log_f", "truth"),
    [
        (lambda z: -z[..., 0].abs().sqrt(), math.log(4.0)),  # a cusp, slow tails
        (lambda z: -1.9 * z[..., 0].abs().log1p(), math.log(2 / 0.9)),  # slower ones
        (lambda z: 1e6 - z[..., 0] ** 2 / 2, 1e6 + HALF_LOG_2PI),
        (lambda z: -(z[..., 0] ** 2) / 2 - 1e6, HALF_LOG_2PI - 1e6),
        # 1 / (1 + e^(100 (|x| - 1))): a plateau with steep walls; its integral is that of a box
        (
            lambda z: -torch.nn.functional.softplus(100 * (z[..., 0].abs() - 1)),
            math.log(2 + 2 * math.log1p(math.exp(-100)) / 100),
        ),
    ],
)
def test_hard_shapes_in_one_dimension(log_f, truth):
    assert_close(log_integral(log_f, 1).item(), truth, rtol=1e-15, atol=2e-8)


def mixture(loc, scale, weight):
    """The log density of a mixture of Gaussians in one dimension, and no constant."""

    def log_f(z):
        x = (z - loc) / scale
        return (weight.log() - scale.log() - HALF_LOG_2PI - x**2 / 2).logsumexp(-1)

    return log_f


@pytest.mark.parametrize(
    ("loc", "scale", "weight"),
    [
        ((-1000.0, 1000.0), (0.1, 0.1), (0.5, 0.5)),  # between nodes at first
        ((0.0, 1000.0), (1.0, 0.1), (0.5, 0.5)),
        ((0.0, -3e4), (1.0, 5.0), (0.999, 0.001)),
        ((-7.0, 3.0, 11.0), (0.02, 1.0, 0.05), (0.2, 0.3, 0.5)),
    ],
)
def test_far_and_narrow_modes_are_found(loc, scale, weight):
    log_f = mixture(double(*loc), double(*scale), double(*weight))
    assert abs(log_integral(log_f, 1).item()) < 2e-8


def test_mixtures_at_random():
    torch.manual_seed(3)
    for _ in range(20):
        loc = 10 * torch.randn(3, dtype=torch.float64)
        scale = torch.randn(3, dtype=torch.float64).exp()
        weight = torch.rand(3, dtype=torch.float64)
        value = log_integral(mixture(loc, scale, weight), 1)
        assert_close(value, weight.sum().log(), rtol=0, atol=2e-8)


def double_well(z):
    """Its log Z is in closed form in y, and a quadrature of its own in x."""
    x, y = z[..., 0], z[..., 1]
    return -(x**4) + 6 * x**2 + x / 2 - y**2 / 2


def test_double_well():
    in_x = integrate.quad(lambda x: math.exp(-(x**4) + 6 * x**2 + x / 2 - 9), -6, 6, epsabs=0)[0]
    truth = math.log(in_x) + 9 + HALF_LOG_2PI
    assert truth == pytest.approx(10.29348, abs=5e-6)
    assert log_integral(double_well, 2).item() == pytest.approx(truth, abs=1e-8)


def test_ring():
    radial = integrate.quad(lambda r: 2 * math.pi * r * math.exp(-8 * (r - 2) ** 2), 0, 8)[0]
    value = log_integral(lambda z: -8 * (z.norm(dim=-1) - 2) ** 2, 2)
    assert value.item() == pytest.approx(math.log(radial), abs=2e-8)


@pytest.mark.parametrize("correlation", [0.0, 0.9, -0.99, 0.999])
def test_correlated_gaussian(correlation):
    covariance = double(1.0, correlation, correlation, 1.0).reshape(2, 2)
    precision, mean = covariance.inverse(), double(3.0, -200.0)
    value = log_integral(lambda z: -(((z - mean) @ precision) * (z - mean)).sum(-1) / 2, 2)
    assert_close(value, 2 * HALF_LOG_2PI + covariance.logdet() / 2, rtol=0, atol=2e-8)


def test_scales_that_differ_between_dimensions():
    mean, scale = double(100.0, -3.0), double(1e3, 1e-3)
    value = log_integral(lambda z: -((z - mean) / scale).square().sum(-1) / 2, 2)
    assert value.item() == pytest.approx(2 * HALF_LOG_2PI, abs=1e-10)


def test_batches_have_grids_of_their_own():
    loc = torch.linspace(-50, 50, 6, dtype=torch.float64).reshape(2, 3)
    scale = double(0.1, 1.0, 10.0)
    value = log_integral(
        lambda z: -(((z[..., 0] - loc) / scale) ** 2) / 2 - (z[..., 1] / loc.abs()) ** 2 / 2,
        2,
        (2, 3),
    )
    assert value.shape == (2, 3)
    assert_close(value, 2 * HALF_LOG_2PI + scale.log() + loc.abs().log(), rtol=0, atol=2e-8)


def test_in_float32():
    weight = torch.ones(1, 1)  # refuses doubles
    value = log_integral(lambda z: -((z @ weight)[..., 0] ** 2) / 2, 1, like=torch.empty(()))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(HALF_LOG_2PI, abs=1e-5)


def test_nan_far_out_is_cut_off_where_the_integrand_has_decayed():
    # inf - inf beyond 700
    value = log_integral(lambda z: z[..., 0].cosh() - z[..., 0].cosh() - z[..., 0] ** 2 / 2, 1)
    assert value.item() == pytest.approx(HALF_LOG_2PI, abs=1e-8)
    value = log_integral(lambda z: (z.exp() - z.exp() - z**2 / 2).sum(-1), 2)  # on one side only
    assert value.item() == pytest.approx(2 * HALF_LOG_2PI, abs=1e-8)


def test_accuracy_and_cost_follow_rtol():
    nodes = []

    def kinks(z):
        nodes.append(len(z))
        return -z.abs().sum(-1)

    errors, costs = [], []
    for rtol in (1e-2, 1e-4):
        nodes.clear()
        errors.append(abs(log_integral(kinks, 2, rtol=rtol).item() - math.log(4.0)))
        costs.append(sum(nodes))
        assert errors[-1] < rtol
    assert costs[1] > 4 * costs[0]


# -- gradients ---------------------------------------------------------------------------------


def quadratic(a, b):
    return lambda z: (a * z[..., 0] - b * z[..., 0] ** 2).squeeze(-1)


def test_gradients_are_expectations():
    # exp(a x - b x^2): log Z = a^2 / 4b + log(pi / b) / 2, E[x] = a / 2b, Var = 1 / 2b
    a, b = double(3.0).requires_grad_(), double(0.5).requires_grad_()
    value = log_integral(lambda z: (a * z - b * z**2)[..., 0], 1)
    da, db = torch.autograd.grad(value, (a, b), create_graph=True)
    assert_close(da.detach(), double(3.0))
    assert_close(db.detach(), -double(1.0 + 9.0))
    (daa,) = torch.autograd.grad(da, a)
    assert_close(daa, double(1.0))


@pytest.mark.parametrize("dim", [1, 2])
def test_gradcheck(dim):
    def function(theta):
        return log_integral(
            lambda z: (
                (theta[:, 0] * z.T - theta[:, 1].exp() * z.T**4).sum(0).T
                if z.dim() == 2
                else (theta[:, 0, None] * z - theta[:, 1, None].exp() * z**4).sum(-1)
            ),
            dim,
            (2,),
        )

    theta = double(0.3, -1.0, 2.0, 0.5).reshape(2, 2).requires_grad_()
    assert torch.autograd.gradcheck(function, theta)
    assert torch.autograd.gradgradcheck(function, theta)


def test_chunks_change_nothing(monkeypatch):
    def value_and_gradient():
        b = double(0.5).requires_grad_()
        value = log_integral(lambda z: -(b * z**2).sum(-1), 2)
        return value.detach(), torch.autograd.grad(value, b)[0]

    whole = value_and_gradient()
    sizes = []
    monkeypatch.setattr(quadrature_grid, "CHUNK", 300)
    log_integral(lambda z: (sizes.append(len(z)), -z.square().sum(-1))[1], 2)
    assert max(sizes) <= 300
    assert_close(value_and_gradient(), whole)


# -- never silently wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log_f", "dim", "message"),
    [
        (lambda z: 0 * z[..., 0], 1, "improper"),
        (lambda z: z[..., 0], 1, "improper"),
        (lambda z: -z[..., 0].abs().log1p(), 1, "improper"),
        (lambda z: -1.05 * z[..., 0].abs().log1p(), 1, "tails are too heavy"),
        (lambda z: -((z[..., 0] - z[..., 1]) ** 2), 2, "improper"),
        (lambda z: -(z[..., 0] ** 2), 2, "improper"),
        (lambda z: z[..., 0] ** 2 - z[..., 1] ** 2, 2, "improper"),
        (lambda z: z[..., 0] * torch.nan, 1, "is NaN"),
        (lambda z: -z[..., 0].sqrt(), 1, "is NaN"),  # of half the line
        (lambda z: z[..., 0].log() - 2 * z[..., 0], 1, "is NaN"),
        (lambda z: -(z.sum(-1) + 0.5).sqrt() - z.square().sum(-1), 2, "is NaN"),
        (lambda z: z[..., 0] * 0 - torch.inf, 1, "-inf wherever"),
        (lambda z: -z[..., 0].abs().log() / 2 - z[..., 0] ** 2, 1, r"\+inf at a node"),
        (lambda z: torch.where(z[..., 0].abs() < 1, 0.0, -torch.inf), 1, "do not agree"),  # walls
        (
            lambda z: torch.logaddexp(  # far modes in two dimensions
                -(z / 0.01).square().sum(-1), -((z - 50) / 0.01).square().sum(-1)
            ),
            2,
            "do not agree",
        ),
    ],
)
def test_refuses(log_f, dim, message):
    with pytest.raises(ValueError, match=message):
        log_integral(log_f, dim, max_evaluations=2**20)


def test_names_the_batch_element():
    curvature = double(1.0, 1.0, -1.0)
    with pytest.raises(ValueError, match=r"improper.*\(batch element \(2,\)\)"):
        log_integral(lambda z: -curvature * z[..., 0] ** 2, 1, (3,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_integral(lambda z: -z.square().sum(-1), 3), "dim must be 1 or 2, got 3"),
        (
            lambda: log_integral(lambda z: -z.square(), 1),
            r"map points of shape \(\d+, 1\) to a tensor of shape \(\d+,\), got \(\d+, 1\)",
        ),
        (
            lambda: log_integral(lambda z: -z.square().sum(-1), 2, (100,), max_evaluations=10_000),
            "max_evaluations=10000 is too small for a batch of 100 integrals in 2",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
