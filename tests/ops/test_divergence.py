"""Scores of many distributions, Fisher divergences, and estimates of a divergence's trace."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import tensor

from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.ops.score import (
    draw_probes,
    fisher_divergence,
    projected_divergence,
    row_divergence,
    score,
)

SIGMAS = 4.5
COVARIANCE = tensor([[2.0, 0.5], [0.5, 1.0]])
SCORES = {
    "normal": (dist.Normal(1.0, 2.0), lambda x: (1 - x) / 4),
    "gamma": (dist.Gamma(3.0, 2.0), lambda x: 2 / x - 2),
    "beta": (dist.Beta(2.0, 5.0), lambda x: 1 / x - 4 / (1 - x)),
    "exponential": (dist.Exponential(3.0), lambda x: torch.full_like(x, -3.0)),
    "log-normal": (dist.LogNormal(0.5, 2.0), lambda x: -(1 + (x.log() - 0.5) / 4) / x),
    "student": (dist.StudentT(5.0, 1.0, 2.0), lambda x: -6 * (x - 1) / (20 + (x - 1) ** 2)),
    "cauchy": (dist.Cauchy(0.0, 1.0), lambda x: -2 * x / (1 + x**2)),
    "laplace": (dist.Laplace(0.3, 2.0), lambda x: -(x - 0.3).sign() / 2),
    "logistic": (dist.Logistic(0.0, 1.0), lambda x: -torch.tanh(x / 2)),
    "inverse-gamma": (dist.InverseGamma(3.0, 2.0), lambda x: -4 / x + 2 / x**2),
    "weibull": (dist.Weibull(2.0, 1.5), lambda x: 0.5 / x - 1.5 / 2 * (x / 2) ** 0.5),
    "von-mises": (dist.VonMises(0.2, 3.0), lambda x: -3 * (x - 0.2).sin()),
    "multivariate": (
        dist.MultivariateNormal(torch.zeros(2), COVARIANCE),
        lambda x: -x @ torch.linalg.inv(COVARIANCE),
    ),
    "independent": (dist.Normal(torch.zeros(2), 3.0).to_event(1), lambda x: -x / 9),
    "dirichlet": (dist.Dirichlet(tensor([2.0, 3.0, 4.0])), lambda x: tensor([1.0, 2.0, 3.0]) / x),
    "mixture": (
        dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Normal(tensor([-1.0, 1.0]), 1.0)
        ),
        lambda x: torch.tanh(x) - x,
    ),
    "energy": (UnnormalizedEnergy(lambda x: x**4, log_normalizer=3.0), lambda x: -4 * x**3),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_their_formulas(name):
    p, formula = SCORES[name]
    x = p.sample((2, 20))
    torch.testing.assert_close(score(p, x), formula(x), rtol=1e-4, atol=1e-4)


def test_a_batch_of_densities_has_a_score_each():
    p = dist.Normal(torch.zeros(3, 1), tensor([[1.0], [2.0], [3.0]]))
    x = tensor([1.0, 2.0])
    got = score(p.expand([3, 2]), x)
    torch.testing.assert_close(got, -x / tensor([[1.0], [4.0], [9.0]]))


def test_fisher_divergences_of_gaussians():
    # 1/2 E_{N(m, s^2)} |(m - x) / s^2 - (n - x) / t^2|^2, by the moments of the normal
    m, s, n, t = 0.5, 1.5, -1.0, 2.0
    x = dist.Normal(m, s).sample((200_000,)).double()
    got = fisher_divergence(dist.Normal(m, s), dist.Normal(n, t), x)
    slope = 1 / t**2 - 1 / s**2
    exact = (slope**2 * s**2 + ((n - m) / t**2) ** 2) / 2
    per_row = ((slope * (x - m) - (n - m) / t**2) ** 2) / 2
    assert (got - exact).abs() < SIGMAS * per_row.std() / len(x) ** 0.5


def test_fisher_divergences_need_no_constant_and_add_over_dimensions():
    x = torch.randn(50, 3)
    p = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    q = UnnormalizedEnergy(lambda x: (x - 1).square().sum(-1) / 2, (3,))
    assert fisher_divergence(p, q, x) == pytest.approx(1.5)
    assert fisher_divergence(p, p, x) == 0
    by_functions = fisher_divergence(p.log_prob, q.log_prob, x, event_dim=1)
    assert by_functions == pytest.approx(1.5)
    with pytest.raises(ValueError, match="give event_dim"):
        fisher_divergence(p.log_prob, q.log_prob, x)
    with pytest.raises(ValueError, match="1 and 0 event dimensions"):
        fisher_divergence(p, dist.Normal(0.0, 1.0), x)
    assert fisher_divergence(p, q, x, event_dim=1).shape == ()


def hutchinson(h, distribution, n):
    x = torch.zeros(n, len(h), dtype=h.dtype, requires_grad=True)
    probes = draw_probes(distribution, (1,), x)
    return projected_divergence(x @ h, x, probes)[0][0].detach()


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
def test_the_variance_of_the_estimated_trace(distribution):
    torch.manual_seed(3)
    d, n = 4, 100_000
    h = torch.randn(d, d).double()
    h = h + h.T
    draws = hutchinson(h, distribution, n)
    off = h.square().sum() - h.diagonal().square().sum()
    total, trace = h.square().sum(), h.trace()
    variance = {
        "rademacher": 2 * off,
        "gaussian": 2 * total,
        # E (v^T H v)^2 = (2 |H|^2 + tr(H)^2) d / (d + 2) on the sphere of radius sqrt(d)
        "sphere": (2 * total + trace**2) * d / (d + 2) - trace**2,
    }[distribution]
    assert (draws.mean() - trace).abs() < SIGMAS * draws.std() / n**0.5
    squares = (draws - trace).square()
    assert (squares.mean() - variance).abs() < SIGMAS * squares.std() / n**0.5


def test_rademacher_probes_are_exact_for_a_diagonal():
    h = torch.diag(tensor([1.0, 2.0, -4.0]))
    torch.testing.assert_close(hutchinson(h, "rademacher", 50), torch.full((50,), -1.0))


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
def test_probes_have_unit_covariance(distribution):
    n, d = 100_000, 3
    v = draw_probes(distribution, (), torch.zeros(n, d).double())
    assert v.dtype == torch.float64
    outer = torch.einsum("ni,nj->nij", v, v)
    error = outer.std(0) / n**0.5
    assert ((outer.mean(0) - torch.eye(d)).abs() <= SIGMAS * error + 1e-9).all()
    with pytest.raises(ValueError, match="distribution must be"):
        draw_probes("uniform", (), torch.zeros(2, 2))


def test_the_divergence_of_a_field():
    x = torch.randn(5, 3, requires_grad=True)
    field = torch.stack([x[:, 0] * x[:, 1], x[:, 1].exp(), x[:, 0] - x[:, 2] ** 2], -1)
    got = row_divergence(field, x)
    torch.testing.assert_close(got, x[:, 1] + x[:, 1].exp() - 2 * x[:, 2])
    (again,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(again[:, 2], torch.full((5,), -2.0))
    assert not row_divergence(torch.ones(5, 3) * math.pi, x).any()


def test_points_of_another_shape_are_named_and_events_may_be_of_several_elements():
    p, q = (dist.Normal(torch.full((2,), m), 1.0).to_event(1) for m in (0.0, 1.0))
    with pytest.raises(ValueError, match=r"x must hold points of p, .* \(2,\), got shape \(5, 3\)"):
        fisher_divergence(p, q, torch.zeros(5, 3))
    p, q = dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0)  # independent elements, each 1 / 2
    assert fisher_divergence(p, q, torch.randn(10, 3), event_dim=1).item() == pytest.approx(1.5)
