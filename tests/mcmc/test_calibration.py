r"""Simulation-based calibration: draw parameters from the prior and data given them, then the
posterior. The rank of the true parameter among its posterior draws is uniform.

Reference:
    Talts et al. (2018), Validating Bayesian inference algorithms with simulation-based calibration.
"""

import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chisquare

from pyro_ebm import LangevinKernel, MHKernel, UnnormalizedEnergy
from pyro_ebm.mcmc import EnergyPotential
from tests.statistics import run_kernel

DATA_SETS, DRAWS, THINNING, BINS = 2000, 63, 20, 16


def prior():
    return dist.Normal(torch.zeros(2), torch.tensor([2.0, 0.7])).to_event(1)  # mean, log scale


def likelihood(theta):
    return dist.Normal(theta[..., :1], theta[..., 1:].exp()).expand(theta.shape[:-1] + (5,))


def p_values(kernel, warmup_steps=400):
    """Of the uniformity of the ranks of mean, log scale and log likelihood."""
    truth = prior().sample((DATA_SETS,))
    data = likelihood(truth).sample()

    def log_likelihood(theta):
        return likelihood(theta).log_prob(data).sum(-1)

    # all posteriors at once: each is an element of the batch, with its own adaptation
    posteriors = UnnormalizedEnergy(
        lambda theta: -log_likelihood(theta), base=prior().expand([DATA_SETS])
    )
    potential = EnergyPotential(posteriors)
    z = potential.initial(DATA_SETS)
    draws, _ = run_kernel(kernel, potential, z, warmup_steps, DRAWS * THINNING)
    draws = draws[:, THINNING - 1 :: THINNING].transpose(0, 1)

    def quantities(theta):
        return torch.cat([theta, log_likelihood(theta)[..., None]], -1)

    ranks = (quantities(draws) < quantities(truth)).sum(0)
    counts = [torch.bincount(rank * BINS // (DRAWS + 1), minlength=BINS) for rank in ranks.T]
    return torch.tensor([chisquare(count.numpy()).pvalue for count in counts])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel",
    [
        LangevinKernel(),
        LangevinKernel(full_mass=True),
        MHKernel(),
        LangevinKernel(adjusted=False, step_size=lambda t: 0.1 / (1 + t / 10) ** 0.6),
    ],
    ids=["langevin", "langevin-dense", "walk", "decreasing"],
)
def test_ranks_are_uniform(kernel):
    assert p_values(kernel).min() > 1e-5  # of three


@pytest.mark.slow
def test_ranks_of_a_biased_kernel_are_not():
    biased = LangevinKernel(temperature=0.8)
    assert p_values(biased).min() < 1e-6
