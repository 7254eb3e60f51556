"""Every adjusted kernel leaves targets with known moments invariant, constrained ones included."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import MCMC, LangevinKernel, MHKernel, UnnormalizedEnergy
from pyro_ebm.mcmc import EnergyPotential
from tests.statistics import assert_cdf, assert_mean, assert_moments, run_kernel

KERNELS = [
    pytest.param(LangevinKernel, id="langevin"),
    pytest.param(MHKernel, id="walk"),
]
DENSE = pytest.param(lambda model: LangevinKernel(model, full_mass=True), id="langevin-dense")


def draw(kernel):
    mcmc = MCMC(kernel, 80, 100, num_chains=500, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples(group_by_chain=True)["x"]


@pytest.mark.parametrize("make", KERNELS)
def test_arcsine(make):
    x = draw(make(lambda: pyro.sample("x", dist.Beta(0.5, 0.5))))
    assert ((x > 0) & (x < 1)).all()
    assert_moments(x, 0.5, 1 / 8)
    assert_cdf(x, {p: 2 / math.pi * math.asin(p**0.5) for p in (0.01, 0.1, 0.5, 0.9)})


@pytest.mark.parametrize("make", [*KERNELS, DENSE])
def test_dirichlet(make):
    alpha = torch.tensor([0.7, 2.0, 5.0])
    x = draw(make(lambda: pyro.sample("x", dist.Dirichlet(alpha))))
    torch.testing.assert_close(x.sum(-1), torch.ones(x.shape[:2]))
    mean, total = alpha / alpha.sum(), alpha.sum()
    assert_moments(x, mean, mean * (1 - mean) / (total + 1))
    # a covariance, which a wrong Jacobian of one coordinate would leave askew
    assert_mean(x[..., 0] * x[..., 1], alpha[0] * alpha[1] / (total * (total + 1)))


@pytest.mark.parametrize("make", KERNELS)
def test_truncated_normal(make):
    target = UnnormalizedEnergy(lambda x: x.square() / 2, support=constraints.interval(-0.5, 2.0))
    x = draw(make(target))
    assert ((x > -0.5) & (x < 2)).all()

    def density(t):
        return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)

    def cdf(t):
        return 0.5 * math.erfc(-t / math.sqrt(2))

    mass = cdf(2.0) - cdf(-0.5)
    mean = (density(-0.5) - density(2.0)) / mass
    second = 1 + (-0.5 * density(-0.5) - 2 * density(2.0)) / mass
    assert_mean(x, mean)
    assert_mean(x.square(), second)
    assert_cdf(x, {t: (cdf(t) - cdf(-0.5)) / mass for t in (-0.4, 0.0, 1.0, 1.9)})


@pytest.mark.parametrize("make", KERNELS)
def test_half_cauchy(make):
    x = draw(make(UnnormalizedEnergy(lambda x: (x**2).log1p(), support=constraints.positive)))
    assert_cdf(x, {t: 2 / math.pi * math.atan(t) for t in (0.01, 0.3, 1.0, 3.0, 100.0)})


@pytest.mark.parametrize("make", [*KERNELS, DENSE])
def test_two_sites_of_different_support(make):
    # x | s ~ N(0, s), s ~ Gamma(5, 5): E[x^2] = E[s^2] = 1.2
    def model():
        s = pyro.sample("s", dist.Gamma(5.0, 5.0))
        return pyro.sample("x", dist.Normal(0.0, s).expand([2]).to_event(1))

    assert_moments(draw(make(model)), 0.0, 1.2)


@pytest.mark.parametrize("make", KERNELS)
@pytest.mark.parametrize(
    "target",
    [dist.Gamma(4.0, 2.0), dist.Beta(2.0, 0.8), dist.Dirichlet(torch.tensor([0.7, 2.0, 5.0]))],
    ids=["gamma", "beta", "dirichlet"],
)
def test_an_energy_without_a_model(target, make):
    energy = UnnormalizedEnergy(
        lambda x: -target.log_prob(x), event_shape=target.event_shape, support=target.support
    )
    potential = EnergyPotential(energy)
    z, _ = run_kernel(make(None), potential, potential.initial(300), 150, 150)
    x = potential.to_points(z.transpose(0, 1)).unflatten(0, (150, 300)).transpose(0, 1)
    assert_moments(x, target.mean, target.variance)
