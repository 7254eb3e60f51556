"""Data that inner chains of an exchange start at: inside their support, and each row by itself."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

from pyro_ebm import MCMC, ExchangeKernel
from pyro_ebm.distributions import UnnormalizedEnergy


def run(energy, x, support=constraints.real, mask=True):
    def model():
        theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
        p = UnnormalizedEnergy(lambda x: energy(theta, x), support=support)
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("x", p, obs=x)

    mcmc = MCMC(ExchangeKernel(model, num_inner_steps=2), 3, 3, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples()["theta"]


def test_rows_that_influence_each_other():
    with pytest.raises(ValueError, match=r"site 'x' \(lambda\) depends on the other rows"):
        run(lambda theta, x: theta * (x - x.mean()).square(), torch.randn(8))


@pytest.mark.parametrize("support", [constraints.unit_interval, constraints.nonnegative])
def test_data_on_the_boundary(support):
    x = torch.tensor([0.0, 0.2, 0.4, 0.0])
    with pytest.raises(ValueError, match="2 of 4 values of the data at site 'x' lie on the bound"):
        run(lambda theta, x: theta * x, x, support)


def test_masked_rows_may_lie_there():
    x, mask = torch.tensor([0.0, 0.2, 0.4, 0.0]), torch.tensor([False, True, True, False])
    assert run(lambda theta, x: theta * x, x, constraints.unit_interval, mask).shape == (3,)
