"""Changes of variables: kernels with gradients on supports with an edge, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import MCMC, BarkerKernel, ChEESKernel, UnnormalizedEnergy
from tests.statistics import assert_cdf, assert_mean, assert_moments


@pytest.fixture(params=[BarkerKernel, ChEESKernel])
def sample(request):
    """Draws of ``x``, shape ``(chains, draws, ...)``."""

    def run(model, **settings):
        kernel = request.param(model, **settings)
        mcmc = MCMC(kernel, 80, 100, num_chains=500, disable_progbar=True)
        mcmc.run()
        return mcmc.get_samples(group_by_chain=True)["x"]

    return run


def test_arcsine(sample):
    x = sample(lambda: pyro.sample("x", dist.Beta(0.5, 0.5)))
    assert ((x > 0) & (x < 1)).all()
    assert_moments(x, 0.5, 1 / 8)
    assert_cdf(x, {p: 2 / math.pi * math.asin(p**0.5) for p in (0.01, 0.1, 0.5, 0.9)})


@pytest.mark.parametrize("full_mass", [False, True])
def test_dirichlet(sample, full_mass):
    alpha = torch.tensor([0.7, 2.0, 5.0])
    x = sample(lambda: pyro.sample("x", dist.Dirichlet(alpha)), full_mass=full_mass)
    mean, total = alpha / alpha.sum(), alpha.sum()
    assert_moments(x, mean, mean * (1 - mean) / (total + 1))
    assert_mean(x[..., 0] * x[..., 1], alpha[0] * alpha[1] / (total * (total + 1)))


def test_half_cauchy(sample):
    x = sample(UnnormalizedEnergy(lambda x: (x**2).log1p(), support=constraints.positive))
    assert_cdf(x, {t: 2 / math.pi * math.atan(t) for t in (0.01, 0.3, 1.0, 3.0, 100.0)})


def test_two_sites_of_different_support(sample):
    # x | s ~ N(0, s), s ~ Gamma(5, 5): E[x^2] = E[s^2] = 1.2
    def model():
        s = pyro.sample("s", dist.Gamma(5.0, 5.0))
        return pyro.sample("x", dist.Normal(0.0, s).expand([2]).to_event(1))

    assert_moments(sample(model), 0.0, 1.2)
