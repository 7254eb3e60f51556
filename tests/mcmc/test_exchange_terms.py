"""Exchange moves whose terms are large: what cancels exactly, and what rounding would decide."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ebm import BarkerKernel, LangevinKernel, MHKernel, UnnormalizedEnergy
from pyro_ebm.distributions import BoltzmannMachine
from pyro_ebm.mcmc import CompositeKernel, GibbsKernel, Proposal, TemperingKernel
from pyro_ebm.mcmc.exchange import terms as exchange_terms
from pyro_ebm.mcmc.exchange.kernel import ExchangeKernel
from pyro_ebm.mcmc.exchange.watch import Watch
from pyro_ebm.mcmc.state import State
from tests.mcmc.exchange_models import (
    CONJUGATE,
    DATA,
    Precision,
    all_spins,
    draws_of,
    grid_posterior,
    precision,
    run,
)
from tests.statistics import assert_moments

EDGES = torch.tensor([[0, 1], [1, 2], [0, 2]])
COUPLINGS = torch.tensor([0.1, 0.4, 0.9, 1.7, 2.5])


def spins(x):
    coupling = pyro.sample("J", dist.LogNormal(torch.tensor(0.0), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", BoltzmannMachine(coupling, edges=EDGES), obs=x)


def bound(model, *args, warmup=0, **settings):
    kernel = ExchangeKernel(model, **settings)
    potential = kernel.make_potential(*args)
    kernel.bind(potential, warmup)
    return kernel, potential


def log_unit(model, z, *args):
    """The exact log posterior at positions, up to a constant, with Z by enumeration."""
    states = all_spins(3).float()
    (x,) = args
    log_f = [BoltzmannMachine(j, edges=EDGES).unnormalized_log_prob for j in z.exp()]
    log_z = torch.stack([f(states).logsumexp(0) for f in log_f])
    log_p = torch.stack([f(x).sum() for f in log_f]) - len(x) * log_z
    return log_p + dist.Normal(0.0, 1.0).log_prob(z)


@pytest.mark.parametrize("units", [0.0, 2e5])
def test_detailed_balance_for_every_auxiliary(units, monkeypatch):
    """Flows by way of each y are equal, with the rejection of what is undecided at work."""
    monkeypatch.setattr(exchange_terms, "UNITS", units)
    x = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, 1.0]])
    kernel, potential = bound(spins, x)
    z, states = COUPLINGS.log(), all_spins(3).float()
    potential(z[:2, None])  # from here on all chains at once
    potential.draw(z[:2, None])
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5), torch.arange(8), torch.arange(8))
    old, new, first, second = pairs.T
    y = torch.stack([states[first], states[second]], 1)
    there, here = (potential.terms(z[i][:, None], {"x": y}) for i in (new, old))
    values = [State(z[i][:, None], potential(z[i][:, None]), None) for i in (new, old)]
    log_ratio, error = potential.log_ratio(there, here, values[1].potential - values[0].potential)
    log_u = torch.zeros(len(pairs))
    _, info = kernel.transition(values[1], values[0], log_ratio, error, 0 * log_u, log_u)
    log_f = torch.stack(
        [BoltzmannMachine(j, edges=EDGES).unnormalized_log_prob(states) for j in COUPLINGS]
    )
    log_q = log_f - log_f.logsumexp(-1, keepdim=True)
    log_p = log_unit(spins, z, x)
    proposed = (log_p[old] + log_q[new, first] + log_q[new, second]).exp()
    flow = (proposed * info.accept_prob).reshape(5, 5, 64)
    torch.testing.assert_close(flow, flow.transpose(0, 1), rtol=1e-4, atol=1e-9)
    refused = (info.accept_prob == 0).double().mean()
    assert 0.1 < refused < 0.9 if units else refused == 0


def test_the_posterior_with_undecided_moves_rejected(monkeypatch):
    monkeypatch.setattr(exchange_terms, "UNITS", 1e5)
    start = {"theta": torch.zeros(1000)}  # a start far out would have no decided move
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*of the moves are rejected because")
        kernel = ExchangeKernel(precision)
        theta = draws_of(kernel, "theta", DATA, initial_params=start)
    assert kernel.num_lost > 20
    assert_moments(theta, CONJUGATE.mean, CONJUGATE.variance)


def heavy(x, scale=2.5):
    theta = pyro.sample("theta", dist.LogNormal(torch.tensor(0.0), scale))
    with pyro.plate("data", len(x)):
        pyro.sample("x", UnnormalizedEnergy(lambda x: theta * x**2 / 2), obs=x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_prior_is_left_where_the_auxiliary_is_the_data(dtype):
    torch.set_default_dtype(dtype)
    x = DATA.to(dtype)
    _, potential = bound(heavy, x)
    z = torch.tensor([[60.0], [-60.0], [0.0]], dtype=dtype)  # energies of up to 1e26
    other = torch.tensor([[0.3], [0.3], [0.3]], dtype=dtype)
    same = {"x": x.expand(3, -1)}
    new, old = (potential.terms(where, same) for where in (z, other))
    log_ratio, error = potential.log_ratio(new, old, torch.full((3,), math.nan, dtype=dtype))
    prior = dist.Normal(torch.tensor(0.0, dtype=dtype), 2.5)
    want = (prior.log_prob(z) - prior.log_prob(other))[:, 0]
    torch.testing.assert_close(log_ratio, want)
    assert (error == 0).all()
    moved = {"x": torch.cat([x[:1] + 1, x[1:]]).expand(3, -1)}
    back, forth = (potential.terms(where, moved) for where in (other, z))
    log_ratio, error = potential.log_ratio(forth, back, log_ratio)
    again, same_error = potential.log_ratio(back, forth, log_ratio)
    torch.testing.assert_close(log_ratio, -again)
    assert torch.equal(error, same_error)
    assert (error > exchange_terms.UNDECIDED).tolist() == [True, False, False]


PRIORS = {
    "log-normal": (dist.LogNormal, (0.0, 2.5), 1),
    "half-Cauchy": (dist.HalfCauchy, (1.0,), 1),
    "narrow log-normal": (dist.LogNormal, (0.0, 0.7), 8),
}


@pytest.mark.parametrize(
    "prior",
    [
        "log-normal",
        pytest.param("half-Cauchy", marks=pytest.mark.slow),
        pytest.param("narrow log-normal", marks=pytest.mark.slow),
    ],
)
def test_heavy_tails_with_inner_chains(prior):
    make, args, num = PRIORS[prior]
    x = DATA[:num]

    def model():
        theta = pyro.sample("theta", make(*(torch.tensor(a) for a in args)))
        with pyro.plate("data", num):
            pyro.sample("x", UnnormalizedEnergy(lambda x: theta * x**2 / 2), obs=x)

    def log_posterior(z):
        likelihood = num * z / 2 - z.exp() * x.double().square().sum() / 2
        return make(*args).log_prob(z.exp()) + z + likelihood

    mean, variance = grid_posterior(log_posterior, -25.0, 12.0, 20_000)
    kernel = ExchangeKernel(model, num_inner_steps=30)
    log_theta = draws_of(kernel, "theta", chains=400, samples=8, warmup=40).log()
    assert_moments(log_theta, mean, variance)


def test_extreme_couplings():
    x = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, -1.0]])

    def model():
        coupling = pyro.sample("J", dist.LogNormal(torch.tensor(0.0), 3.0))
        with pyro.plate("data", 2):
            pyro.sample("x", BoltzmannMachine(coupling, edges=EDGES), obs=x)

    statistic = BoltzmannMachine(1.0, edges=EDGES).unnormalized_log_prob

    def log_posterior(z):
        each = z.exp()[:, None] * statistic(all_spins(3).float())
        seen = z.exp() * statistic(x).sum()
        return seen - 2 * each.logsumexp(-1) + dist.Normal(0.0, 3.0).log_prob(z)

    mean, variance = grid_posterior(log_posterior, -20.0, 15.0, 20_000)
    log_j = draws_of(ExchangeKernel(model), "J").log()
    assert_moments(log_j, mean, variance)


def test_idle_elements_beside_it():
    def model():
        theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
        with pyro.plate("two", 2), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("m", dist.Normal(1.0, 0.5))
        with pyro.plate("data", len(DATA)):
            pyro.sample("x", Precision(theta), obs=DATA)

    mcmc = run(ExchangeKernel(model))
    draws = mcmc.get_samples(group_by_chain=True)
    assert_moments(draws["theta"].double(), CONJUGATE.mean, CONJUGATE.variance)
    assert_moments(draws["m"].double(), torch.tensor([1.0, 0.0]), torch.tensor([0.25, 1.0]))


# -- inner chains that stand still -----------------------------------------------------------------


class Never(Proposal):
    symmetric = True

    def sample(self, z):
        return torch.full_like(z, math.nan)


def test_acceptance_made_of_standing_still_is_not_believed():
    kernel = ExchangeKernel(heavy, inner_kernel=MHKernel(proposal=Never()), num_inner_steps=2)
    with pytest.warns(UserWarning, match="inner chain of site 'x' stands still"):
        mcmc = run(kernel, DATA, chains=10, samples=20, warmup=20)
    assert mcmc.kernel.adaptation.population.out is None  # potentials without log Z do not tell
    assert mcmc.get_extra_fields()["step_size"].max() < 1e-2  # and not as wide as the prior


def test_langevin_steps_that_cannot_follow_are_told():
    kernel = ExchangeKernel(heavy, inner_kernel=LangevinKernel(), num_inner_steps=10)
    with pytest.warns(UserWarning, match="stands still.*Leave inner_kernel at its default"):
        run(kernel, DATA[:1], chains=100, samples=30, warmup=30)


def watched(accepted, still, lost=None, steps=40):
    watch = Watch(0)
    lost = torch.zeros_like(accepted) if lost is None else lost
    for _ in range(steps):
        watch.add(accepted, still, lost, {"x": "a chain"}, torch.float32)
    return watch


def test_one_chain_that_is_lost_is_seen_among_many():
    accepted, still = torch.ones(1000, dtype=torch.bool), torch.zeros(1000)
    watched(accepted, still)
    still[17] = 1.0
    with pytest.warns(UserWarning, match="100% of the accepted moves of chain 17"):
        watched(accepted, still)
    with pytest.warns(UserWarning, match="5% of the accepted moves of all chains"):
        watched(accepted, torch.full((1000,), 0.05))
    rejected = torch.zeros(1000, dtype=torch.bool)
    watched(rejected, torch.ones(1000))  # where nothing is accepted, nothing is wrong


def test_what_was_counted_is_saved():
    accepted = torch.tensor([True, False])
    with pytest.warns(UserWarning, match="rejected because"):
        watch = watched(accepted, torch.zeros(2), lost=~accepted, steps=20)
    again = Watch(0)
    again.load_state_dict(watch.state_dict())
    assert again.num_lost == watch.num_lost == 20
    again.add(accepted, torch.zeros(2), ~accepted, {}, torch.float32)  # which is not told again
    assert again.num_lost == 21


# -- single precision ------------------------------------------------------------------------------


class Shifted(Precision):
    """An energy of a million that is the same for all data."""

    def __init__(self, theta):
        super().__init__(theta)
        self._energy = lambda x: theta * (x**2 / 2 + 1e6)


def shifted(x):
    theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", Shifted(theta), obs=x)


def test_energies_too_large_for_single_precision():
    kernel = ExchangeKernel(shifted)
    with pytest.warns(UserWarning, match=r"rounding in float32 would decide.*x\.double"):
        run(kernel, DATA, chains=20, samples=20, warmup=20)
    assert kernel.num_lost > 20
    torch.set_default_dtype(torch.float64)
    theta = draws_of(kernel, "theta", DATA.double())
    assert_moments(theta, CONJUGATE.mean, CONJUGATE.variance)
    assert kernel.num_lost == 0


# -- inner kernels of another target ---------------------------------------------------------------


def test_inner_kernels_at_another_temperature():
    hot = LangevinKernel(temperature=2.0)
    with pytest.raises(ValueError, match=r"temperature=2\.0, but inner_kernel"):
        ExchangeKernel(heavy, inner_kernel=hot)

    def model(kernel):
        theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
        pyro.sample("x", UnnormalizedEnergy(lambda x: theta * x**2, kernel=kernel), obs=DATA)

    with pytest.raises(ValueError, match=r"has temperature=2\.0"):
        run(ExchangeKernel(model), hot, chains=2)
    others = (TemperingKernel(LangevinKernel(), [1.0, 0.5]), CompositeKernel(None, [GibbsKernel()]))
    for kernel in others:
        with pytest.raises(ValueError, match="must be one plain kernel"):
            run(ExchangeKernel(model), kernel, chains=2)
    assert "5 steps of BarkerKernel()" in repr(bound(heavy, DATA, num_inner_steps=5)[0].auxiliaries)
    assert run(
        ExchangeKernel(model, inner_kernel=BarkerKernel(), num_inner_steps=2),
        hot,
        chains=2,
        samples=5,
        warmup=2,
    )
