"""Energies of whole numbers without an upper bound: a walk moves them, a proposal gives log Z."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import MHKernel, UnnormalizedEnergy, estimate_log_normalizer
from pyro_ebm.mcmc import ExchangeKernel, IntegerWalk
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from tests.mcmc.exchange_models import draws_of
from tests.normalizer.targets import assert_agrees
from tests.statistics import SIGMAS, assert_moments

COUNTS = constraints.nonnegative_integer
WALK = MHKernel(proposal=IntegerWalk())


def poisson(rate, **kwargs):  # Z = e^rate
    return UnnormalizedEnergy(lambda k: torch.lgamma(k + 1) - k * rate.log(), **kwargs)


RATE = torch.tensor(3.0)
TILTED = UnnormalizedEnergy(  # of a Poisson of rate 4 to one of rate 6, Z = e^2
    lambda k: -k * torch.tensor(1.5).log(), base=dist.Poisson(torch.tensor(4.0))
)


@pytest.mark.parametrize("kernel", [None, WALK])
def test_draws(kernel):
    pyro.set_rng_seed(0)
    x = poisson(RATE, support=COUNTS, kernel=kernel).sample((4000,))
    assert (x == x.round()).all()
    assert (x.mean() - 3).abs() < SIGMAS * (3 / 4000) ** 0.5
    wide = poisson(RATE, support=COUNTS, kernel=kernel).expand((2,)).sample((5,))
    assert wide.shape == (5, 2)


def test_all_whole_numbers():
    pyro.set_rng_seed(0)
    k = torch.arange(-60.0, 61.0)
    variance = ((-(k**2) / 8).softmax(0) * k**2).sum()
    p = UnnormalizedEnergy(lambda k: k**2 / 8, support=constraints.integer)
    x = p.sample((4000,))
    assert (x.square().mean() - variance).abs() < SIGMAS * variance * (2 / 4000) ** 0.5


def test_no_density_beyond_a_bound():
    seen = []

    def energy(k):
        seen.append(k)
        return 0 * k

    p = UnnormalizedEnergy(energy, support=COUNTS)
    value = EnergyPotential(p)(torch.tensor([[-1.0], [0.0], [2.0]]))
    assert value.tolist() == [torch.inf, 0.0, 0.0]
    assert all((k >= 0).all() for k in seen)  # which may be indices


@pytest.mark.parametrize(
    ("p", "log_z", "settings"),
    [
        (poisson(RATE, support=COUNTS), 3.0, {"proposal": dist.Poisson(4.0)}),
        (
            poisson(RATE, support=COUNTS),
            3.0,
            {"method": "importance", "proposal": dist.Poisson(4.0)},
        ),
        (TILTED, 2.0, {}),
        (TILTED, 2.0, {"method": "importance"}),
        (TILTED, 2.0, {"kernel": WALK}),
    ],
)
def test_log_z(p, log_z, settings):
    pyro.set_rng_seed(0)
    assert_agrees(estimate_log_normalizer(p, **settings, disable_progbar=True), log_z)


def test_log_z_needs_a_start():
    with pytest.raises(ValueError, match=r"no uniform density to start at: give the energy a base"):
        estimate_log_normalizer(poisson(RATE, support=COUNTS))


@pytest.mark.parametrize("kernel", [None, WALK])
def test_exchange(kernel):
    x = torch.tensor([2.0, 4.0, 3.0, 5.0])

    def model(x):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", poisson(rate, support=COUNTS), obs=x)

    proposal = {"rate": dist.LogNormal(1.1, 0.4)}
    exchange = ExchangeKernel(
        model, num_inner_steps=40, inner_kernel=kernel, proposal=proposal, adapt_step_size=False
    )
    posterior = dist.Gamma(2 + x.sum(), 1.0 + len(x))
    draws = draws_of(exchange, "rate", x, chains=500, samples=6, warmup=16)
    assert repr(exchange.auxiliaries["x"]).startswith("40 steps of MHKernel(proposal=IntegerWalk")
    assert_moments(draws, posterior.mean, posterior.variance)
