"""Importance sampling, against closed forms."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.distributions.flow import FlowDistribution, fit_flow, neural_spline_flow
from pyro_ebm.normalizer import UnreliableEstimateWarning, estimate_log_normalizer
from tests.normalizer.targets import DOUBLE_WELL, assert_agrees, double_well
from tests.statistics import SIGMAS

NORMAL = UnnormalizedEnergy(lambda x: x**2 / 2)


def importance(p, **kwargs):
    return estimate_log_normalizer(p, "importance", **kwargs)


def test_the_weights_are_those_of_the_formula():
    q = dist.Normal(1.0, 2.0)
    pyro.set_rng_seed(3)
    estimate = importance(NORMAL, proposal=q, num_samples=1000)
    pyro.set_rng_seed(3)
    x = q.sample((1000,))
    assert torch.allclose(estimate.log_weights, -(x**2) / 2 - q.log_prob(x))
    assert estimate.lower is estimate.value
    assert estimate.upper is None
    assert_agrees(estimate, math.log(2 * math.pi) / 2)


def test_a_base_proposes():
    # 1 / (1 + lambda)^a is the mean of e^{-lambda x} under Gamma(a, 1)
    p = UnnormalizedEnergy(lambda x: 0.5 * x, base=dist.Gamma(3.0, 1.0))
    assert_agrees(importance(p), -3 * math.log(1.5))


def test_a_proposal_on_bits():
    p = UnnormalizedEnergy(lambda x: x.sum(-1), (10,), constraints.boolean)
    q = dist.Bernoulli(0.4).expand([10]).to_event(1)
    assert_agrees(importance(p, proposal=q), 10 * math.log(1 + math.exp(-1)))


def test_a_guide_proposes_for_a_batch():
    scale = torch.tensor([0.5, 1.0, 2.0])
    p = UnnormalizedEnergy(lambda x: (x / scale) ** 2 / 2, batch_shape=(3,))

    def guide():
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.StudentT(5.0, 0.0, scale))

    estimate = importance(p, proposal=guide)
    assert estimate.log_weights.shape == (10_000, 3)
    assert_agrees(estimate, (2 * math.pi * scale**2).log() / 2)


def test_a_fitted_flow_proposes():
    p = UnnormalizedEnergy(double_well, event_shape=(2,))
    grid = torch.linspace(-4, 4, 1001)
    density = (-double_well(torch.stack([grid, 0 * grid], -1))).exp()
    x = grid[torch.multinomial(density, 4000, replacement=True)]
    net = neural_spline_flow(2, transforms=2, hidden_features=(32, 32))
    fit_flow(net, torch.stack([x, torch.randn(4000)], -1), num_steps=150, disable_progbar=True)
    assert_agrees(importance(p, proposal=FlowDistribution(net())), DOUBLE_WELL)


def test_points_outside_the_support_are_counted_zeros():
    p = UnnormalizedEnergy(lambda x: x, support=constraints.positive)
    estimate = importance(p, proposal=dist.Normal(0.0, 3.0))
    assert abs(estimate.zeros - 0.5) < SIGMAS * 0.5 / 100
    assert_agrees(estimate, 0.0)


def test_a_network_is_evaluated_without_dropout():
    net = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Flatten(-1))
    p = UnnormalizedEnergy(lambda x: net(x).square().sum(-1) / 2, event_shape=(2,))
    q = dist.Normal(torch.zeros(2), 1.5).to_event(1)
    assert_agrees(importance(p, proposal=q), math.log(2 * math.pi))
    assert net.training


@pytest.mark.parametrize("scale", [0.3, 0.5])
def test_a_proposal_that_is_too_narrow(scale):
    with pytest.warns(UnreliableEstimateWarning, match=r"Pareto k .* too low"):
        importance(NORMAL, proposal=dist.Normal(0.0, scale))


def test_a_proposal_that_is_wide_enough_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importance(NORMAL, proposal=dist.Normal(0.0, 1.5)).pareto_k < 0.5


def test_the_density_itself_proposes_without_an_error():
    estimate = importance(NORMAL, proposal=dist.Normal(0.0, 1.0))
    assert estimate.std_error < 1e-6
    assert abs(estimate.value - math.log(2 * math.pi) / 2) < 1e-5


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (lambda x: torch.where(x > 0, x, torch.nan), r"(49|50|51)\..*% .* are NaN"),
        (lambda x: torch.full_like(x, torch.inf), "100% of the weights"),
        (lambda x: torch.where(x > 0, x, -torch.inf), "are infinite"),
    ],
)
def test_weights_without_a_mean(energy, message):
    with pytest.raises(ValueError, match=message):
        importance(UnnormalizedEnergy(energy), proposal=dist.Normal(0.0, 1.0))


def test_nothing_to_propose_from():
    with pytest.raises(ValueError, match="has no base"):
        importance(NORMAL)


def test_a_proposal_that_does_not_cover_the_support():
    with pytest.raises(ValueError, match="does not cover the support"):
        importance(NORMAL, proposal=dist.Exponential(1.0))
