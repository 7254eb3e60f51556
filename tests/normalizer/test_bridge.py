"""Bridge sampling, against closed forms."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.distributions import RBM, GaussianRBM
from pyro_ebm.normalizer import UnreliableEstimateWarning, estimate_log_normalizer
from pyro_ebm.normalizer import bridge as module
from pyro_ebm.normalizer.bridge import meng_wong
from tests.normalizer.targets import assert_agrees, gaussian, wells
from tests.statistics import SIGMAS


def bridge(p, **kwargs):
    return estimate_log_normalizer(p, "bridge", **kwargs)


def log_ratio(x, mean):
    """Of exp(-x^2 / 2) e^3 over N(mean, 1), without the constants of both."""
    return 3 - x**2 / 2 + (x - mean) ** 2 / 2


def test_the_fixed_point_of_meng_and_wong(monkeypatch):
    # of independent draws, all of which count
    monkeypatch.setattr(module, "chain_sample_size", lambda f, **kwargs: f.new_full((1,), 1e9))
    p, q = torch.randn(300, 1).double(), 1 + torch.randn(700, 1).double()
    at_p, at_q = log_ratio(p, 1.0), log_ratio(q, 1.0)
    log_z, _, _ = meng_wong(at_p, at_q)
    # as many draws of q are expected to be p's as draws of p to be q's: with the odds
    # o = (n_1 p) / (n_2 q), sum_q o / (1 + o) = sum_p 1 / (1 + o)
    odds_p, odds_q = (300 / 700 * (ratio - log_z).exp() for ratio in (at_p, at_q))
    assert torch.allclose((odds_q / (1 + odds_q)).sum(0), (1 / (1 + odds_p)).sum(0))


def test_the_error_is_the_spread_of_the_estimate():
    p, q = torch.randn(400, 500).double(), 1 + torch.randn(400, 500).double()
    log_z, error, _ = meng_wong(log_ratio(p, 1.0), log_ratio(q, 1.0))
    assert abs(log_z.mean() - 3) < SIGMAS * log_z.std() / math.sqrt(500)
    # the draws of p count for a little less than they are: their effective number is estimated
    assert abs(error.mean() / log_z.std() - 1) < SIGMAS / math.sqrt(2 * 500) + 0.1


def test_correlated_draws_have_a_larger_error():
    chains, draws = 200, 800
    noise = torch.randn(draws, chains).double()
    p = noise.clone()
    for t in range(1, draws):
        p[t] = 0.9 * p[t - 1] + math.sqrt(1 - 0.81) * noise[t]
    q = 1 + torch.randn(800, chains).double()
    log_z, error, ess = meng_wong(log_ratio(p, 1.0), log_ratio(q, 1.0))
    assert abs(error.mean() / log_z.std() - 1) < SIGMAS / math.sqrt(2 * chains) + 0.15
    independent = meng_wong(log_ratio(noise, 1.0), log_ratio(q, 1.0))
    assert error.mean() > 1.5 * independent[1].mean()
    assert ess.mean() < 0.5 * independent[2].mean()


@pytest.mark.parametrize("condition", [1.0, 100.0, 1e4])
def test_gaussians_of_any_condition(condition):
    p, log_z, draws = gaussian(10, condition)
    assert_agrees(bridge(p, samples=draws), log_z)


@pytest.mark.parametrize("condition", [1.0, 10.0])
def test_the_energy_draws_for_itself(condition):
    p, log_z, _ = gaussian(5, condition)
    assert_agrees(bridge(p), log_z)


def test_machines_draw_exactly():
    for p in (
        RBM(torch.randn(8, 5), torch.randn(8), torch.randn(5)),
        GaussianRBM(0.5 * torch.randn(6, 4), torch.zeros(6), torch.zeros(4)),
    ):
        assert_agrees(bridge(p), p.exact_log_normalizer())


def test_supports_and_batches():
    rate = torch.tensor([1.0, 5.0])
    p = UnnormalizedEnergy(lambda x: rate * x, support=constraints.positive, batch_shape=(2,))
    estimate = bridge(p)
    assert estimate.value.shape == (2,)
    assert_agrees(estimate, -rate.log())
    p = UnnormalizedEnergy(lambda x: x.sum(-1), (5,), constraints.boolean)
    assert_agrees(bridge(p), 5 * math.log(1 + math.exp(-1)))


def test_a_proposal_of_ones_own():
    p = UnnormalizedEnergy(lambda x: x**2 / 2)
    draws = torch.randn(2000)
    narrow = bridge(p, proposal=dist.Normal(0.5, 0.5), samples=draws)  # may be narrower
    assert_agrees(narrow, math.log(2 * math.pi) / 2)
    assert_agrees(bridge(p, proposal=dist.StudentT(3.0), samples=draws), math.log(2 * math.pi) / 2)


def test_float64():
    p, log_z, draws = gaussian(3, 10.0, torch.float64)
    estimate = bridge(p, samples=draws)
    assert estimate.value.dtype == torch.float64
    assert_agrees(estimate, log_z)


def test_chains_that_do_not_cross_are_told():
    with pytest.warns(UnreliableEstimateWarning, match="R-hat is"):
        bridge(wells(1), num_samples=500)


def test_draws_that_do_not_overlap_are_told():
    p = UnnormalizedEnergy(lambda x: x**2 / 2)
    with pytest.warns(UnreliableEstimateWarning, match="hardly overlap"):
        bridge(p, proposal=dist.Normal(6.0, 1.0), samples=torch.randn(1000))
    with pytest.raises(ValueError, match="has not settled in 1000 iterations"):
        bridge(p, proposal=dist.Normal(9.0, 1.0), samples=torch.randn(1000))


def test_samples_on_the_boundary():
    p = UnnormalizedEnergy(lambda x: x, support=constraints.nonnegative)
    with pytest.raises(ValueError, match="boundary of the support"):
        bridge(p, samples=torch.tensor([0.0, 1.0, 2.0, 3.0]))
