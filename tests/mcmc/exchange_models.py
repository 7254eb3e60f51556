"""Doubly intractable models that the tests of the exchange kernel share, and how they are run."""

import math

import pyro
import pyro.distributions as dist
import torch

from pyro_ebm import MCMC, UnnormalizedEnergy
from pyro_ebm.distributions import BoltzmannMachine, lattice_edges

HALF_LOG_2PI = math.log(2 * math.pi) / 2


def run(kernel, *args, chains=1000, samples=8, warmup=32, seed=0, **settings):
    """A run of many short chains: the steps take the time, however many chains make them."""
    pyro.set_rng_seed(seed)
    mcmc = MCMC(kernel, samples, warmup, num_chains=chains, disable_progbar=True, **settings)
    mcmc.run(*args)
    return mcmc


def draws_of(kernel, name, *args, **settings):
    return run(kernel, *args, **settings).get_samples(group_by_chain=True)[name].double()


def grid_posterior(log_density, low, high, num=2000):
    """Mean and variance of a density on an interval, by the midpoint rule."""
    x = low + (high - low) * (torch.arange(num).double() + 0.5) / num
    weight = log_density(x).softmax(0)
    mean = (weight * x).sum()
    return mean, (weight * (x - mean).square()).sum()


def all_spins(n):
    return 2 * torch.cartesian_prod(*[torch.arange(2)] * n).double() - 1


LATTICE = lattice_edges(10, 10, periodic=False)


def aligned_spins(coupling, share):
    """Of some states of the lattice, that one whose share of aligned edges comes nearest."""
    x = BoltzmannMachine(coupling, edges=LATTICE, num_steps=100).sample((200,))
    aligned = (x[:, LATTICE[:, 0]] == x[:, LATTICE[:, 1]]).double().mean(1)
    return x[(aligned - share).abs().argmin()]


SMALL = lattice_edges(3, 3, periodic=False)


class Precision(UnnormalizedEnergy):
    """N(0, 1 / theta) whose log Z we pretend not to know, with exact draws."""

    def __init__(self, theta, **kwargs):
        self.theta = theta
        super().__init__(lambda x: theta * x**2 / 2, batch_shape=theta.shape, **kwargs)

    def exact_sample(self, sample_shape=()):
        shape = tuple(sample_shape) + self.batch_shape
        return torch.randn(shape, dtype=self.theta.dtype) / self.theta.sqrt()


DATA = torch.tensor([0.3, -1.2, 0.8, 1.5, -0.1, 0.4, -0.7, 2.0])
# Gamma(2, 1) x prod N(x_i; 0, 1 / theta) = Gamma(2 + n / 2, 1 + sum x_i^2 / 2)
CONJUGATE = dist.Gamma(2 + len(DATA) / 2, 1 + DATA.square().sum() / 2)
# Proposals much like it, of which few chains need fewer than of a walk.
ALIKE = {"proposal": {"theta": dist.LogNormal(0.0, 0.55)}, "adapt_step_size": False}


def precision(x):
    theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", Precision(theta), obs=x)


def ising(x):
    coupling = pyro.sample("J", dist.Uniform(0.0, 1.0))
    pyro.sample("x", BoltzmannMachine(coupling, edges=LATTICE), obs=x)


def hidden_ising(y):
    coupling = pyro.sample("J", dist.Uniform(torch.tensor(0.0), 1.0))
    s = pyro.sample("s", BoltzmannMachine(coupling, edges=SMALL))
    pyro.sample("y", dist.Normal(s, 0.8).to_event(1), obs=y)
