"""The evidence of models that take longer, and how often intervals hold the truth."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import MCMC, ChEESKernel, estimate_log_normalizer, log_evidence
from pyro_ebm.distributions import BoltzmannMachine
from pyro_ebm.distributions.boltzmann.interaction_graph import lattice_edges
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.normalizer.bridge import bridge_to
from tests.evidence.models import (
    EFFECT,
    SIGMAS,
    SLEEP,
    assert_near,
    effect,
    linear,
    linear_data,
)
from tests.normalizer.targets import gaussian


def test_intervals_hold_the_truth_as_often_as_they_say():
    # 400 bridges at once, between correlated draws of N(0, I) in three dimensions and a fitted
    # Gaussian: of intervals of 1.96 errors .95 hold the truth
    p, log_z, _ = gaussian(3, 1.0)
    repeats, chains, draws = 400, 4, 300
    target = EnergyPotential(p.expand((repeats,)))
    z = torch.randn(chains, draws, repeats, 3)
    for t in range(1, draws):
        z[:, t] = 0.6 * z[:, t - 1] + 0.8 * z[:, t]
    estimate = bridge_to(target, z.flatten(1, 2), batch_shape=torch.Size((repeats,)))
    held = ((estimate.value - log_z).abs() < 1.96 * estimate.std_error).double().mean()
    assert abs(held - 0.95) < 0.02 + SIGMAS * math.sqrt(0.95 * 0.05 / repeats)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bridge", "ais"])
def test_coverage_over_a_hundred_repetitions(method):
    X, y, truth, draw = linear_data(2, 10)
    held = 0
    for _ in range(100):
        given = {"draws": draw(4, 200)} if method == "bridge" else {"num_chains": 200}
        estimate = log_evidence(linear, X, y, method=method, disable_progbar=True, **given)
        held += abs(float(estimate) - truth) < 1.96 * float(estimate.std_error)
    assert 90 <= held <= 99, held


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "truth", "within", "settings"),
    [
        (16, 238.64226, 0.1, {"num_chains": 500}),
        (32, 952.64808, 0.3, {"num_chains": 200}),
        # at the default's most, 10,001 temperatures, a fifth of 100 weights would be effective
        (64, 3808.67228, 1.0, {"num_chains": 100, "num_temperatures": 20_001}),
    ],
)
def test_ising_tori_at_the_critical_point(side, truth, within, settings):
    p = BoltzmannMachine(math.log(1 + math.sqrt(2)) / 2, edges=lattice_edges(side, side))
    estimate = estimate_log_normalizer(p, "ais", **settings, disable_progbar=True)
    gap = abs(float(estimate) - truth)
    assert gap < within, estimate
    assert gap < SIGMAS * float(estimate.std_error), estimate


SCHOOLS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        unit = pyro.sample("unit", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * unit, ERRORS), obs=y)


def schools_by_quadrature():
    """With the effects integrated out, y_i ~ N(mu, tau^2 + s_i^2): mu and log tau remain."""
    mu = torch.linspace(-40.0, 40.0, 1601, dtype=torch.float64)[:, None]
    log_tau = torch.linspace(-15.0, 15.0, 1601, dtype=torch.float64)
    tau = log_tau.exp()
    log_p = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    for y, s in zip(SCHOOLS.double(), ERRORS.double(), strict=True):
        log_p = log_p + dist.Normal(mu, (tau**2 + s**2).sqrt()).log_prob(y)
    cell = 80 / 1600 * 30 / 1600
    return float(log_p.flatten().logsumexp(0)) + math.log(cell)


def test_eight_schools():
    mcmc = MCMC(ChEESKernel(schools), 300, 200, num_chains=20, disable_progbar=True)
    mcmc.run(SCHOOLS)
    assert_near(log_evidence(mcmc), schools_by_quadrature())


def logistic(X, y):
    w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([X.shape[1]]).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=X @ w), obs=y)


def by_thermodynamic_integration(X, y, num=31):
    r"""``log Z = \int_0^1 E_beta[log p(y | w)] d beta``, by chains at each power posterior.

    At ``beta = t^5`` the integrand is smooth in t: Simpson's rule. Returns its error too.
    """

    def powered(beta):
        def model():
            w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([X.shape[1]]).to_event(1))
            pyro.factor("likelihood", beta * log_likelihood(w))

        return model

    def log_likelihood(w):
        return dist.Bernoulli(logits=w @ X.T).log_prob(y).sum(-1)

    t = torch.linspace(0.0, 1.0, num, dtype=torch.float64)
    simpson = torch.tensor([1.0, *[4.0, 2.0] * ((num - 3) // 2), 4.0, 1.0]).double() / 3 / (num - 1)
    mean, variance = [], []
    for beta in (t**5).tolist():
        kernel = ChEESKernel(powered(beta))
        mcmc = MCMC(kernel, 1000, 200, num_chains=16, disable_progbar=True)
        mcmc.run()
        value = log_likelihood(mcmc.get_samples(group_by_chain=True)["w"]).double()
        mean.append(value.mean())
        variance.append(value.mean(1).var() / len(value))
    weights = simpson * 5 * t**4
    return float(weights @ torch.stack(mean)), float((weights**2 @ torch.stack(variance)).sqrt())


@pytest.mark.slow
def test_logistic_regression_beside_thermodynamic_integration():
    torch.manual_seed(0)
    X = torch.randn(60, 4)
    y = dist.Bernoulli(logits=X @ torch.tensor([1.0, -1.0, 0.5, 0.0])).sample()
    truth, error = by_thermodynamic_integration(X, y)
    mcmc = MCMC(ChEESKernel(logistic), 500, 200, num_chains=20, disable_progbar=True)
    mcmc.run(X, y)
    for estimate in (
        log_evidence(mcmc),
        log_evidence(logistic, X, y, method="ais", disable_progbar=True),
    ):
        both = math.hypot(error, float(estimate.std_error))
        assert abs(float(estimate) - truth) < SIGMAS * both + 0.005, (estimate, truth, error)


@pytest.mark.slow
def test_the_error_of_the_t_test_is_the_spread_of_forty_estimates():
    mcmc = MCMC(ChEESKernel(effect), 40_000, 500, num_chains=20, disable_progbar=True)
    mcmc.run(SLEEP)
    draws = mcmc.get_samples(group_by_chain=True)
    scores = []
    for i in range(40):
        part = {name: x[:, 1000 * i : 1000 * (i + 1)] for name, x in draws.items()}
        estimate = log_evidence(effect, SLEEP, draws=part, shared_improper=["sigma2"])
        scores.append((float(estimate) - EFFECT) / float(estimate.std_error))
    scores = torch.tensor(scores)
    assert scores.mean().abs() < SIGMAS / math.sqrt(40)
    assert abs(scores.std() - 1) < SIGMAS / math.sqrt(2 * 40)
