"""Starts are normalized densities, and their draws are draws of them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.distributions import GaussianRBM
from pyro_ebm.distributions.boltzmann.machine import BoltzmannMachine
from pyro_ebm.distributions.exponential.exponential_family import ExponentialFamily
from pyro_ebm.distributions.flow import FlowDistribution, neural_spline_flow
from pyro_ebm.mcmc import EnergyPotential
from pyro_ebm.normalizer.proposals import checked_proposal, exact_draws
from pyro_ebm.normalizer.starts import DistributionStart, GaussianStart, ProductStart, deviations
from tests.statistics import SIGMAS

torch_double = torch.float64


def energy(event_shape=(), support=constraints.real, batch_shape=()):
    return UnnormalizedEnergy(
        lambda x: x.flatten(x.dim() - len(event_shape)).sum(-1) if event_shape else x,
        event_shape,
        support,
        batch_shape,
    )


@pytest.mark.parametrize("full", [False, True])
def test_a_gaussian_for_each_group(full):
    mean = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch_double)
    factor = torch.tensor([[[2.0, 0.0], [1.0, 0.5]], [[1.0, 0.0], [-1.0, 2.0]]], dtype=torch_double)
    covariance = factor @ factor.mT
    if not full:
        factor = factor.diagonal(dim1=-2, dim2=-1)
        covariance = torch.diag_embed(factor.square())
    start = GaussianStart(mean, factor)
    z = start.sample(5000)
    assert z.shape == (10_000, 2)
    want = dist.MultivariateNormal(mean, covariance).log_prob(z.reshape(5000, 2, 2)).flatten()
    assert torch.allclose(start(z), -want)
    value, grad = start.value_and_grad(z)
    assert torch.allclose(value, -want)
    assert torch.allclose(grad, super(GaussianStart, start).value_and_grad(z)[1])
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    draws = z.reshape(5000, 2, 2) - mean
    assert (draws.mean(0).abs() < SIGMAS * (variance / 5000).sqrt()).all()
    assert ((draws.square().mean(0) / variance - 1).abs() < SIGMAS * (2 / 5000) ** 0.5).all()


@pytest.mark.parametrize("full", [False, True])
def test_fitted_moments(full):
    z = torch.randn(4000, 3, dtype=torch_double) @ torch.diag(
        torch.tensor([1.0, 2.0, 0.1]).double()
    )
    z[:, 1] += z[:, 0]
    mean, factor = deviations(z, 1, full)
    assert torch.allclose(mean[0], z.mean(0))
    covariance = factor[0] @ factor[0].T if full else torch.diag(factor[0].square())
    want = z.T.cov() if full else torch.diag(z.var(0))
    assert torch.allclose(covariance, want, atol=2e-3)
    wide = GaussianStart.fitted(z, 1, width=1.5, full=full)
    assert torch.allclose(wide.factor, 1.5 * factor)


def test_a_coordinate_that_never_moved():
    z = torch.stack([torch.randn(50), torch.full((50,), 3.0)], -1)
    for full in (False, True):
        start = GaussianStart.fitted(z, 1, full=full)
        assert start.sample(5).isfinite().all()


@pytest.mark.parametrize("support_values", [[[0.0], [1.0]], [[-1.0], [1.0]], torch.eye(3).tolist()])
def test_a_product_of_discrete_variables(support_values):
    support_values = torch.tensor(support_values)
    k, b = support_values.shape
    start = ProductStart(support_values, torch.randn(2, 4, k))
    z = start.sample(20_000)
    assert z.shape == (40_000, 4 * b)
    variables = z.reshape(20_000, 2, 4, 1, b)
    share, want = (variables == support_values).all(-1).float().mean(0), start.log_probs.exp()
    assert ((share - want).abs() < SIGMAS * (want * (1 - want) / 20_000).sqrt()).all()
    # the probabilities of all states add up to 1
    grid = torch.cartesian_prod(*[torch.arange(k)] * 4)
    states = support_values[grid].reshape(len(grid), -1).repeat_interleave(2, 0)
    total = (-start(states)).reshape(-1, 2).logsumexp(0)
    assert torch.allclose(total, torch.zeros(2), atol=1e-5)


def test_a_fitted_product_has_the_frequencies():
    support_values = torch.tensor([[0.0], [1.0]])
    z = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    start = ProductStart.fitted(support_values, z, 1)
    want = torch.tensor([[2.5, 1.5], [0.5, 3.5]]) / 4
    assert torch.allclose(start.log_probs.exp()[0], want)


@pytest.mark.parametrize(
    ("support", "q"),
    [
        (constraints.positive, dist.Gamma(2.0, 3.0)),
        (constraints.unit_interval, dist.Beta(2.0, 3.0)),
        (constraints.real, dist.StudentT(3.0)),
    ],
)
def test_a_distribution_seen_on_positions_is_normalized(support, q):
    start = DistributionStart(q, EnergyPotential(energy(support=support)))
    z = torch.linspace(-60, 60, 240_001, dtype=torch_double)[:, None]
    total = torch.trapezoid((-start(z)).exp(), z[:, 0])
    assert abs(float(total) - 1) < 2e-3
    draws = start.sample(1000)
    assert draws.shape == (1000, 1)
    assert torch.allclose(start.potential.to_points(draws).mean(), q.mean, atol=0.3)


def test_a_guide_proposes():
    def guide():
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(torch.arange(3.0), 1.0))

    q = checked_proposal(guide, energy(batch_shape=(3,)))
    assert q.batch_shape == (3,)


def test_a_proposal_takes_the_batch_of_the_energy():
    q = checked_proposal(dist.Normal(0.0, 1.0), energy(batch_shape=(3,)))
    assert q.batch_shape == (3,)


@pytest.mark.parametrize("make", [lambda: ExponentialFamily.gaussian(0.0, 1.0)])
def test_energies_with_exact_draws_propose(make):
    q = checked_proposal(make(), energy())
    assert exact_draws(q, 5).shape == (5,)


def test_a_small_machine_proposes():
    ising = BoltzmannMachine(0.3, edges=torch.tensor([[0, 1], [1, 2]]))
    ising = ising.normalized(ising.exact_log_normalizer())
    q = checked_proposal(ising, BoltzmannMachine(0.1, edges=torch.tensor([[0, 1], [1, 2]])))
    assert exact_draws(q, 5).shape == (5, 3)
    rbm = GaussianRBM(torch.randn(2, 2), torch.zeros(2), torch.zeros(2))
    rbm = rbm.normalized(rbm.exact_log_normalizer())
    assert exact_draws(checked_proposal(rbm, energy((2,))), 4).shape == (4, 2)


def two_sites():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("q", "p", "message"),
    [
        (dist.Exponential(1.0), energy(), "does not cover the support"),
        (dist.Beta(1.0, 1.0), energy(support=constraints.positive), "does not cover"),
        (dist.Normal(0.0, 1.0), energy((2,), constraints.boolean), "event_shape"),
        (
            dist.Normal(torch.zeros(2), 1.0).to_event(1),
            energy((2,), constraints.boolean),
            "does not cover",
        ),
        (dist.Normal(0.0, 1.0), energy((2,)), r"write d.expand\(\(2,\)\).to_event\(1\)"),
        (dist.Normal(torch.zeros(4), 1.0), energy(batch_shape=(3,)), "does not expand"),
        (UnnormalizedEnergy(torch.square), energy(), "log Z is unknown"),
        (
            UnnormalizedEnergy(torch.square, log_normalizer=0.57),
            energy(),
            "ends of short chains",
        ),
        (two_sites, energy(), r"one sample site, and this one has \['a', 'b'\]"),
        ("normal", energy(), "must be a distribution, or a guide"),
        (neural_spline_flow(2)(), energy((2,)), "FlowDistribution"),
    ],
)
def test_proposals_that_will_not_do(q, p, message):
    with pytest.raises(ValueError, match=message):
        checked_proposal(q, p)


def test_a_flow_proposes():
    q = FlowDistribution(neural_spline_flow(2)())
    assert checked_proposal(q, energy((2,))) is q


def test_draws_outside_the_support_cannot_be_annealed():
    wide = DistributionStart(
        dist.Normal(0.0, 1.0), EnergyPotential(energy(support=constraints.positive))
    )
    with pytest.raises(ValueError, match="draws outside the support"):
        wide.sample(100)


def test_float64_stays():
    start = GaussianStart(
        torch.zeros(1, 2, dtype=torch_double), torch.ones(1, 2, dtype=torch_double)
    )
    assert start.sample(3).dtype == torch_double
    assert math.isclose(start(torch.zeros(1, 2, dtype=torch_double)), math.log(2 * math.pi))
