"""Every estimator within its own stated error, or a warning: never a confident wrong number."""

import functools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_digits

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.distributions import GaussianRBMModule, RBMModule
from pyro_ebm.distributions.boltzmann.interaction_graph import lattice_edges
from pyro_ebm.distributions.boltzmann.machine import BoltzmannMachine
from pyro_ebm.distributions.boltzmann.potts import Potts
from pyro_ebm.losses import fit_rbm
from pyro_ebm.normalizer import (
    UnreliableEstimateWarning,
    estimate_log_normalizer,
    mean_log_likelihood,
)
from tests.normalizer.targets import DOUBLE_WELL, assert_agrees, funnel, gaussian, wells
from tests.statistics import SIGMAS

JC = 0.4406868


def estimate(p, method="ais", **kwargs):
    return estimate_log_normalizer(p, method, disable_progbar=True, **kwargs)


def agrees_or_warns(p, truth, method="ais", **kwargs):
    """Whether the estimate came without a warning; it then agrees with the truth."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnreliableEstimateWarning)
        found = estimate(p, method, **kwargs)
    if caught:
        return False
    assert_agrees(found, truth)
    return True


# -- continuous ----------------------------------------------------------------------------------


def test_the_double_well():
    p = wells(1)
    assert_agrees(estimate(p), DOUBLE_WELL)
    wide = dist.Normal(torch.zeros(2), torch.tensor([2.5, 1.5])).to_event(1)
    assert_agrees(estimate(p, "importance", proposal=wide), DOUBLE_WELL)
    assert_agrees(estimate(p, proposal=wide), DOUBLE_WELL)


@pytest.mark.slow
def test_sixteen_double_wells():
    # chains stand in their wells long before the wells have their final shares, so that the weights
    # vary: many chains, or a warning
    truth = 16 * DOUBLE_WELL
    assert truth == pytest.approx(164.6957, abs=2e-4)
    agrees_or_warns(wells(16), truth, num_chains=2000)
    grid = torch.linspace(-4, 4, 2001)
    cdf = (-(grid**4 - 6 * grid**2 - grid / 2)).softmax(0).cumsum(0)
    x = grid[torch.searchsorted(cdf, torch.rand(1000, 16)).clamp(max=2000)]
    draws = torch.stack([x, torch.randn(1000, 16)], -1).flatten(1)
    well = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.16, 0.84])),
        dist.Normal(torch.tensor([-1.7, 1.75]), 0.4),
    )
    proposal = dist.TransformedDistribution(
        dist.Independent(Wells(well), 1),
        [dist.transforms.ReshapeTransform(torch.Size([16, 2]), torch.Size([32]))],
    )
    assert_agrees(estimate(wells(16), "bridge", proposal=proposal, samples=draws), truth)
    assert_agrees(estimate(wells(16), proposal=proposal, samples=draws), truth)


class Wells(dist.TorchDistribution):
    """Sixteen pairs: one element of a mixture, one normal."""

    support = dist.constraints.independent(dist.constraints.real, 1)
    arg_constraints = {}

    def __init__(self, well):
        self.well = well
        super().__init__(torch.Size([16]), torch.Size([2]), validate_args=False)

    def sample(self, sample_shape=()):
        shape = torch.Size(sample_shape) + torch.Size([16])
        return torch.stack([self.well.sample(shape), torch.randn(shape)], -1)

    def log_prob(self, value):
        x, y = value.unbind(-1)
        return self.well.log_prob(x) - y**2 / 2 - math.log(2 * math.pi) / 2

    def expand(self, batch_shape, _instance=None):
        assert torch.Size(batch_shape) == self.batch_shape
        return self


@pytest.mark.filterwarnings("ignore::pyro_ebm.normalizer.estimate_result.UnreliableEstimateWarning")
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_gaussians(condition):
    p, log_z, draws = gaussian(8, condition)
    # the preconditioner is diagonal and the Gaussian rotated: the kernel slows down, and says so
    assert agrees_or_warns(p, log_z) or condition == 1e4
    assert_agrees(estimate(p, "bridge", samples=draws), log_z)
    moments = dist.MultivariateNormal(draws.mean(0), 1.5 * draws.T.cov())
    assert_agrees(estimate(p, "importance", proposal=moments), log_z)
    assert_agrees(estimate(p, proposal=moments, samples=draws[:1000]), log_z)


def test_the_funnel_is_told():
    p, log_z = funnel(10)
    assert not agrees_or_warns(p, log_z)
    assert not agrees_or_warns(p, log_z, "bridge", num_samples=500)
    wide = dist.Normal(torch.zeros(10), 3.0).to_event(1)
    assert not agrees_or_warns(p, log_z, "importance", proposal=wide)


def test_a_funnel_in_other_coordinates():
    # v and x e^{-v / 2} are independent: a start that knows it
    p, log_z = funnel(10)

    class Funnel(dist.TorchDistribution):
        support = dist.constraints.independent(dist.constraints.real, 1)
        arg_constraints = {}

        def __init__(self):
            super().__init__(torch.Size(), torch.Size([10]), validate_args=False)

        def sample(self, sample_shape=()):
            v = 4 * torch.randn((*sample_shape, 1))
            return torch.cat([v, (v / 2).exp() * torch.randn((*sample_shape, 9)) * 1.2], -1)

        def log_prob(self, value):
            v, x = value[..., 0], value[..., 1:]
            scale = 1.2 * (v / 2).exp()[..., None]
            return dist.Normal(0.0, 4.0).log_prob(v) + dist.Normal(0.0, scale).log_prob(x).sum(-1)

    assert_agrees(estimate(p, "importance", proposal=Funnel()), log_z)


# -- discrete ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("couplings", "shape", "log_z"),
    [
        (0.2, (4, 4), 11.771470),
        (JC, (4, 4), 15.521916),
        (0.2, (10, 10), 73.453098),
        (JC, (10, 10), 93.610301),
    ],
)
def test_ising(couplings, shape, log_z):
    p = BoltzmannMachine(couplings, edges=lattice_edges(*shape))
    assert_agrees(estimate(p), log_z)


def test_ising_with_a_free_boundary():
    edges = lattice_edges(10, 10, periodic=False)
    assert_agrees(estimate(BoltzmannMachine(JC, edges=edges)), 89.692349)


def test_curie_weiss():
    n, beta = 40, 1.2
    couplings = (torch.ones(n, n) - torch.eye(n)) * beta / n
    # how many states have k spins up, and their energy by the square of the magnetization
    log_sum = torch.tensor([math.log(math.comb(n, k)) for k in range(n + 1)], dtype=torch.float64)
    log_sum += beta / (2 * n) * (2 * torch.arange(n + 1) - n) ** 2
    log_z = float(log_sum.logsumexp(0)) - beta / 2
    assert_agrees(estimate(BoltzmannMachine(couplings), num_temperatures=200), log_z)


@pytest.mark.parametrize(("shape", "log_z"), [((4, 4), 34.172593), ((6, 6), 75.571919)])
def test_potts(shape, log_z):
    p = Potts(1.005052, edges=lattice_edges(*shape), num_states=3)
    assert_agrees(estimate(p), log_z)


# -- machines ------------------------------------------------------------------------------------


@functools.cache
def digits():
    return torch.tensor((load_digits().data > 7).astype("float32"))


@functools.cache
def trained():
    """A machine on digits, whose 12 hidden units can be enumerated."""
    pyro.set_rng_seed(0)
    net = RBMModule(64, 12, digits(), centered=True)
    fit_rbm(net, digits()[:1500], num_epochs=10, batch_size=10, lr=0.01, disable_progbar=True)
    return net.requires_grad_(False)()


def test_a_trained_machine():
    p = trained()
    log_z = p.exact_log_normalizer()
    draws = p.exact_sample((1000,))
    both = estimate(p, samples=draws)
    assert_agrees(both, log_z)
    assert both.upper > log_z - SIGMAS * 2 * both.std_error
    result, exact = (mean_log_likelihood(p, digits()[1500:], z) for z in (both, log_z))
    assert abs(result.value - exact.value) < SIGMAS * result.normalizer_error
    assert exact.value > -25


def test_data_in_place_of_draws():
    # an upper bound only as far as the machine drew the data, and a warning where it did not
    p = trained()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnreliableEstimateWarning)
        found = estimate(p, samples=digits()[1500:])
    assert_agrees(found, p.exact_log_normalizer())
    gap = float(found.upper - found.value)
    assert caught or abs(gap) < 1


def test_a_machine_with_real_units():
    data = torch.tensor(load_digits().data[:, [18, 20, 27, 28, 35, 36, 43, 45]] / 16).float()
    net = GaussianRBMModule(data.shape[1], 6, data)
    fit_rbm(net, data, num_epochs=5, lr=0.01, disable_progbar=True)
    p = net.requires_grad_(False)()
    log_z = p.exact_log_normalizer()
    assert_agrees(estimate(p, samples=p.exact_sample((1000,))), log_z)
    assert_agrees(estimate(p, "bridge"), log_z)
    broad = dist.Normal(data.mean(0), 1.5 * data.std(0)).to_event(1)
    assert agrees_or_warns(p, log_z, "importance", proposal=broad)


# -- the stated error ----------------------------------------------------------------------------

_WELLS, _ISING = wells(1), BoltzmannMachine(0.3, edges=lattice_edges(4, 4))
_GAUSSIAN = gaussian(5, 10.0)
_START = dist.Normal(torch.zeros(5), 3.0).to_event(1)

RUNS = {
    "importance": lambda: (
        estimate(_GAUSSIAN[0], "importance", proposal=_START, num_samples=1000),
        _GAUSSIAN[1],
    ),
    "ais": lambda: (estimate(_GAUSSIAN[0], num_chains=200), _GAUSSIAN[1]),
    "ais, wells": lambda: (estimate(_WELLS, num_chains=300), DOUBLE_WELL),
    "ais, ising": lambda: (estimate(_ISING, num_chains=200), _ISING.exact_log_normalizer()),
    "reverse": lambda: (
        estimate(_ISING, "reverse_ais", samples=_ISING.exact_sample((200,))),
        _ISING.exact_log_normalizer(),
    ),
    "bridge": lambda: (
        estimate(_GAUSSIAN[0], "bridge", samples=_GAUSSIAN[2][torch.randperm(4000)[:600]]),
        _GAUSSIAN[1],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_stated_error_covers_the_truth(name):
    runs, z = 100, []
    for seed in range(runs):
        pyro.set_rng_seed(seed)
        found, truth = RUNS[name]()
        z.append(float((found.value - truth) / found.std_error))
    z = torch.tensor(z)
    # z is N(0, 1), but for a bias of log-mean-exp of about half an error's square
    assert z.mean().abs() < SIGMAS / math.sqrt(runs) + 0.1
    assert abs(z.std() - 1) < SIGMAS / math.sqrt(2 * runs)
    assert (z.abs() < 1.96).float().mean() > 0.95 - SIGMAS * math.sqrt(0.95 * 0.05 / runs)


@pytest.mark.slow
def test_the_mean_of_the_estimates_of_z_is_z():
    # unbiased in Z, not in log Z: with few temperatures, where the bias of the log is large
    p = UnnormalizedEnergy(lambda x: 8 * x**2)
    ratios = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)
        for seed in range(300):
            pyro.set_rng_seed(seed)
            found = estimate(p, proposal=dist.Normal(0.0, 1.0), num_chains=20, betas=[0, 0.3, 1])
            ratios.append((found.value - math.log(math.pi / 8) / 2).exp())
    ratios = torch.stack(ratios)
    assert abs(ratios.mean() - 1) < SIGMAS * ratios.std() / math.sqrt(300)
    assert ratios.log().mean() < -0.5 * ratios.std() ** 2 / 2
