"""Posteriors whose log Z depends on what is sampled: against the truth, where that is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

from pyro_ebm import LangevinKernel, MHKernel, UnnormalizedEnergy
from pyro_ebm.distributions import RBM, BoltzmannMachine
from pyro_ebm.mcmc import (
    NUTS,
    CompositeKernel,
    GibbsKernel,
    RandomWalk,
)
from pyro_ebm.mcmc.exchange.kernel import ExchangeKernel
from pyro_ebm.mcmc.exchange.potential import ExchangePotential
from tests.mcmc.exchange_models import (
    CONJUGATE,
    DATA,
    HALF_LOG_2PI,
    LATTICE,
    SMALL,
    Precision,
    aligned_spins,
    all_spins,
    draws_of,
    grid_posterior,
    hidden_ising,
    ising,
    precision,
    run,
)
from tests.statistics import (
    assert_cdf,
    assert_equal_means,
    assert_moments,
    standard_error,
)

# -- the Ising model -------------------------------------------------------------------------------


def ising_log_z(coupling):
    """log Z of the 10 x 10 lattice with a free boundary, by a transfer matrix over columns."""
    columns = all_spins(10)
    within = coupling * (columns[:, 1:] * columns[:, :-1]).sum(-1)
    between = (coupling * columns @ columns.T).exp()
    log_sum = within
    for _ in range(9):
        top = log_sum.max()
        log_sum = top + (between @ (log_sum - top).exp()).log() + within
    return log_sum.logsumexp(0)


def test_the_transfer_matrix():  # against the values that are known independently
    for coupling, want in ((0.2, 73.023066), (0.4406868, 89.692349)):
        assert abs(ising_log_z(coupling) - want) < 1e-5


def check_ising(coupling, aligned, num_inner_steps, chains, samples):
    pyro.set_rng_seed(0)
    x = aligned_spins(coupling, aligned)
    products = x[LATTICE[:, 0]] * x[LATTICE[:, 1]]
    assert (products > 0).double().mean() == pytest.approx(aligned, abs=0.02)
    low, high = (0.0, 0.4) if coupling < 0.2 else (0.15, 0.75)  # where the posterior is

    def log_posterior(grid):
        return grid * products.sum() - torch.stack([ising_log_z(j) for j in grid.tolist()])

    mean, variance = grid_posterior(log_posterior, low, high, num=80)
    kernel = ExchangeKernel(ising, num_inner_steps=num_inner_steps)
    assert_moments(draws_of(kernel, "J", x, chains=chains, samples=samples), mean, variance)


def test_ising_with_few_aligned_edges():
    check_ising(0.05, 0.525, num_inner_steps=15, chains=400, samples=8)


def test_ising_with_many_aligned_edges():
    check_ising(0.45, 0.825, num_inner_steps=80, chains=200, samples=8)


@pytest.mark.slow
@pytest.mark.parametrize(("coupling", "aligned"), [(0.05, 0.525), (0.3, 0.675), (0.45, 0.825)])
def test_ising_long(coupling, aligned):
    check_ising(coupling, aligned, num_inner_steps=200, chains=500, samples=100)


# -- a precision: the conjugate posterior ----------------------------------------------------------


INNER = {
    "exact": {},
    "langevin": {"inner_kernel": LangevinKernel(), "num_inner_steps": 12},
    "walk": {"inner_kernel": MHKernel(), "num_inner_steps": 24},
}


@pytest.mark.parametrize("inner", INNER)
def test_the_conjugate_posterior(inner):
    kernel = ExchangeKernel(precision, **INNER[inner])
    theta = draws_of(kernel, "theta", DATA)
    assert_moments(theta, CONJUGATE.mean, CONJUGATE.variance)
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    points = theta.flatten().quantile(quantiles.double())
    assert_cdf(theta, {float(p): float(CONJUGATE.cdf(p.float())) for p in points})


def test_a_chain_that_stays_at_the_data_gives_the_prior():
    kernel = ExchangeKernel(
        precision,
        num_inner_steps=1,
        inner_kernel=LangevinKernel(step_size=1e-12, adapt_step_size=False),
    )
    theta = draws_of(kernel, "theta", DATA)
    assert_moments(theta, 2.0, 2.0)  # Gamma(2, 1)


def test_an_independence_proposal_and_a_walk_of_fixed_scale():
    for proposal in ({"theta": dist.LogNormal(0.0, 1.0)}, RandomWalk(0.5)):
        kernel = ExchangeKernel(precision, proposal=proposal, adapt_step_size=False)
        theta = draws_of(kernel, "theta", DATA)
        assert_moments(theta, CONJUGATE.mean, CONJUGATE.variance)


def test_a_latent_site_whose_z_moves():
    y = torch.tensor([0.5, -1.5, 1.0])

    def model(known):
        theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
        log_z = HALF_LOG_2PI - theta.log() / 2 if known else None
        with pyro.plate("data", 3):
            x = pyro.sample("x", Precision(theta, log_normalizer=log_z))
            pyro.sample("y", dist.Normal(x, 0.5), obs=y)

    # x integrated out: y_i ~ N(0, 1 / theta + 1 / 4)
    def log_posterior(theta):
        scale = (1 / theta + 0.25).sqrt()
        log_p = dist.Normal(0.0, scale).log_prob(y[:, None].double()).sum(0)
        return log_p + dist.Gamma(2.0, 1.0).log_prob(theta)

    mean, variance = grid_posterior(log_posterior, 0.0, 20.0)
    theta = draws_of(ExchangeKernel(model), "theta", False, samples=15)
    assert_moments(theta, mean, variance)
    composite = CompositeKernel(model, [ExchangeKernel(), LangevinKernel()])
    theta = draws_of(composite, "theta", False)
    assert_moments(theta, mean, variance)
    theta = draws_of(LangevinKernel(model), "theta", True)
    assert_moments(theta, mean, variance)


def test_a_learned_normalizer_cancels_whatever_it_is():
    def model():
        theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
        wrong = {"log_normalizer": 3 * theta, "learned_normalizer": True}
        with pyro.plate("data", len(DATA)):
            pyro.sample("x", Precision(theta, **wrong), obs=DATA)

    theta = draws_of(ExchangeKernel(model), "theta")
    assert_moments(theta, CONJUGATE.mean, CONJUGATE.variance)


# -- several sites, rows, masks, transforms --------------------------------------------------------


def two_sites(known):
    a = pyro.sample("a", dist.Gamma(torch.tensor(3.0), torch.tensor(2.0)))
    b = pyro.sample("b", dist.Gamma(torch.tensor(2.0), torch.tensor(2.0)))
    log_z = (None, None)
    if known:  # of exp(-a x^2 / 2) on the reals, and of exp(-b x) above 0
        log_z = (HALF_LOG_2PI - a.log() / 2, -b.log())
    with pyro.plate("data", 4):
        p = UnnormalizedEnergy(lambda x: a * x**2 / 2, log_normalizer=log_z[0])
        x = pyro.sample("x", p, obs=torch.tensor([0.5, -1.0, 0.2, 1.5]))
        # what one site observes may move the energy of the next: it never sees an auxiliary
        rate = 1 + x.abs()
        q = UnnormalizedEnergy(
            lambda w: b * rate * w,
            support=constraints.positive,
            batch_shape=(4,),
            log_normalizer=None if log_z[1] is None else log_z[1] - rate.log(),
        )
        pyro.sample("w", q, obs=torch.tensor([0.4, 0.1, 0.9, 0.3]))
    pyro.sample("sum", dist.Normal(a + b, 0.5), obs=torch.tensor(3.0))


def test_two_energy_sites_and_an_ordinary_one():
    kernel = ExchangeKernel(two_sites, num_inner_steps=12)
    exchange = run(kernel, False)
    known = run(LangevinKernel(two_sites), True)
    found = []
    for mcmc in (exchange, known):
        draws = mcmc.get_samples(group_by_chain=True)
        draws = torch.stack([draws["a"], draws["b"]], -1).double()
        draws = torch.cat([draws, draws.square(), draws[..., :1] * draws[..., 1:]], -1)
        found += [draws.mean((0, 1)), standard_error(draws)]
    assert_equal_means(*found)
    assert set(exchange.kernel.auxiliaries) == {"x", "w"}


def test_every_row_has_an_auxiliary_of_its_own():
    def model():
        with pyro.plate("groups", 3):
            theta = pyro.sample("theta", dist.Gamma(torch.tensor([1.0, 50.0, 5000.0]), 1.0))
        with pyro.plate("groups_", 3, dim=-1), pyro.plate("rows", 40, dim=-2):
            p = UnnormalizedEnergy(lambda x: theta * x**2 / 2, batch_shape=(3,))
            pyro.sample("x", p, obs=torch.zeros(40, 3))

    potential = ExchangePotential(model, num_inner_steps=100)
    potential.bind_auxiliaries(0)
    z = torch.tensor([1.0, 50.0, 5000.0]).log().expand(4, 3)
    (chain,) = potential.inner_chains.values()
    assert chain.adaptation is not None
    chain.adaptation.step_size.fill_(1e-2)
    y = potential.draw(z).points["x"]
    assert y.shape == (4, 40, 3)
    assert y.unique().numel() > 0.99 * 4 * 40 * 2  # the chains of the third group reject most
    want = 1 / 50.0
    assert abs(y[..., 1].var() - want) < 5 * want * (2 / 160) ** 0.5


def groups(known):
    with pyro.plate("groups", 2, dim=-1):
        theta = pyro.sample("theta", dist.Gamma(torch.tensor([2.0, 4.0]), 1.0))
        with pyro.plate("rows", 4, dim=-2):
            pyro.sample("x", Precision(theta), obs=DATA.reshape(4, 2))


def test_a_posterior_for_each_group():
    theta = draws_of(ExchangeKernel(groups), "theta", False)
    squares = DATA.reshape(4, 2).square().sum(0)
    truth = dist.Gamma(torch.tensor([2.0, 4.0]) + 2, 1 + squares / 2)
    assert_moments(theta, truth.mean, truth.variance)


def masked(x):
    theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
    with pyro.plate("data", len(x)), poutine.mask(mask=x < 100):
        pyro.sample("x", UnnormalizedEnergy(lambda x: theta * x**2 / 2), obs=x)


def outside_a_plate(x):  # four numbers observed by one site: four factors 1 / Z
    theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
    pyro.sample("x", Precision(theta), obs=x)


def in_one_event(x):
    theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
    pyro.sample("x", Precision(theta).expand([len(x)]).to_event(1).mask(torch.tensor(True)), obs=x)


MISSING = torch.cat([DATA, torch.full((2,), 1e4)])
FORMS = {
    "masked": (masked, MISSING, {"num_inner_steps": 12}),
    "outside-a-plate": (outside_a_plate, DATA, {}),
    "one-event": (in_one_event, DATA, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_conjugate_posterior_in_other_forms(form):
    model, x, settings = FORMS[form]
    kernel = ExchangeKernel(model, **settings)
    theta = draws_of(kernel, "theta", x)
    assert_moments(theta, CONJUGATE.mean, CONJUGATE.variance)


def test_bijections_that_the_latent_moves():
    # x = exp(theta (1 + 2 u)), u ~ N(0, 1 / theta): log x ~ N(theta, 4 theta)
    x = torch.tensor([0.5, 3.0, 8.0])

    def model():
        theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
        transforms = [torch.distributions.AffineTransform(theta, 2 * theta)]
        transforms += [torch.distributions.ExpTransform()]
        with pyro.plate("data", 3):
            pyro.sample("x", dist.TransformedDistribution(Precision(theta), transforms), obs=x)

    def log_posterior(theta):
        p = dist.Normal(theta, 2 * theta.sqrt())
        return p.log_prob(x[:, None].double().log()).sum(0) + dist.Gamma(2.0, 1.0).log_prob(theta)

    mean, variance = grid_posterior(log_posterior, 0.0, 20.0)
    theta = draws_of(ExchangeKernel(model), "theta")
    assert_moments(theta, mean, variance)


# -- where Z is cheap ------------------------------------------------------------------------------


def small_ising(x, known):
    coupling = pyro.sample("J", dist.Normal(torch.tensor(0.0), 0.5))
    p = BoltzmannMachine(coupling, edges=SMALL)
    if known:
        p = p.normalized(p.exact_log_normalizer())
    with pyro.plate("data", len(x)):
        pyro.sample("x", p, obs=x)


WEIGHTS = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-1.2, 0.4], [0.6, 0.6]])


def small_rbm(x, known):
    scale = pyro.sample("J", dist.Normal(torch.tensor(0.0), 1.0))
    p = RBM(scale * WEIGHTS, torch.zeros(4), torch.zeros(2))
    if known:
        p = p.normalized(p.exact_log_normalizer())
    with pyro.plate("data", len(x)):
        pyro.sample("x", p, obs=x)


@pytest.mark.parametrize("inner", ["exact", "sweeps"])
@pytest.mark.parametrize("model", [small_ising, small_rbm])
def test_the_known_normalizer_gives_the_same_posterior(model, inner):
    pyro.set_rng_seed(0)
    x = BoltzmannMachine(0.4, edges=SMALL).exact_sample((5,))
    if model is small_rbm:
        x = RBM(WEIGHTS, torch.zeros(4), torch.zeros(2)).exact_sample((30,))
    settings = {} if inner == "exact" else {"inner_kernel": GibbsKernel(), "num_inner_steps": 15}
    kernel = ExchangeKernel(model, **settings)
    exchange = run(kernel, x, False)
    assert repr(exchange.kernel.auxiliaries["x"]) == (
        "exact draws" if inner == "exact" else "15 Gibbs sweeps"
    )
    known = run(LangevinKernel(model), x, True)
    found = []
    for mcmc in (exchange, known):
        draws = mcmc.get_samples(group_by_chain=True)["J"].double()
        draws = torch.stack([draws, draws.square()], -1)
        found += [draws.mean((0, 1)), standard_error(draws)]
    assert_equal_means(*found)


def test_nuts_with_the_known_normalizer_gives_the_same_posterior():
    pyro.set_rng_seed(0)
    x = BoltzmannMachine(0.4, edges=SMALL).exact_sample((5,))
    exchange = draws_of(ExchangeKernel(small_ising), "J", x, False)
    nuts = draws_of(NUTS(small_ising), "J", x, True, chains=1, samples=250, warmup=60)
    found = []
    for draws in (exchange, nuts):
        draws = torch.stack([draws, draws.square()], -1)
        found += [draws.mean((0, 1)), standard_error(draws)]
    assert_equal_means(*found)


# -- discrete energies without blocks, discrete latents --------------------------------------------


def graph_model(x):  # ties of a random graph of four people, and how many triangles they close
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 1.0))

    def energy(x):
        return -theta * (x.sum(-1) - triangles(x))

    def triangles(x):
        of = {tuple(pair): x[..., i] for i, pair in enumerate(pairs.tolist())}
        three = [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)]
        return sum(of[a, b] * of[a, c] * of[b, c] for a, b, c in three)

    p = UnnormalizedEnergy(energy, event_shape=(6,), support=constraints.boolean)
    with pyro.plate("graphs", len(x)):
        pyro.sample("x", p, obs=x)
    return p


def test_a_discrete_energy_without_blocks():
    x = torch.tensor([[1.0, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 1]])
    with poutine.condition(data={"theta": torch.tensor(1.0)}):
        statistic = graph_model(x).unnormalized_log_prob  # at theta = 1
    states = (all_spins(6) + 1) / 2
    each, seen = statistic(states), statistic(x.double()).sum()

    def log_posterior(theta):
        log_z = (theta[:, None] * each).logsumexp(-1)
        return theta * seen - len(x) * log_z - theta**2 / 2

    mean, variance = grid_posterior(log_posterior, -4.0, 4.0)
    kernel = ExchangeKernel(graph_model, num_inner_steps=4, inner_kernel=GibbsKernel())
    theta = draws_of(kernel, "theta", x, samples=10)
    assert repr(kernel.auxiliaries["x"]).startswith("4 steps of GibbsKernel()")
    assert_moments(theta, mean, variance)


def test_a_hidden_ising_model():
    """A noisy picture of spins whose coupling is unknown: exchange for J, Gibbs for the spins."""
    y = torch.tensor([1.5, 0.4, -0.2, 0.9, 1.3, -0.8, 0.7, 0.1, -1.1])
    states = all_spins(9)
    statistic = (states[:, SMALL[:, 0]] * states[:, SMALL[:, 1]]).sum(-1)
    log_seen = dist.Normal(states, 0.8).log_prob(y).sum(-1)

    def log_posterior(grid):
        log_p = grid[:, None] * statistic
        return (log_p + log_seen).logsumexp(-1) - log_p.logsumexp(-1)

    mean, variance = grid_posterior(log_posterior, 0.0, 1.0, 400)
    kernel = CompositeKernel(hidden_ising, [ExchangeKernel(), GibbsKernel()])
    mcmc = run(kernel, y)
    assert_moments(mcmc.get_samples(group_by_chain=True)["J"].double(), mean, variance)
    assert "lp" not in mcmc.get_extra_fields()


def test_a_discrete_latent_that_moves_no_z_is_summed_out():
    y = torch.tensor(1.0)

    def model(known):
        theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(theta + 2 * k, 0.5), obs=y)
        with pyro.plate("data", len(DATA)):
            pyro.sample("x", Precision(theta), obs=DATA)

    def log_posterior(theta):
        one, zero = (dist.Normal(theta + 2 * k, 0.5).log_prob(y) for k in (1, 0))
        mixed = torch.logaddexp(math.log(0.3) + one, math.log(0.7) + zero)
        return mixed + CONJUGATE.log_prob(theta)

    mean, variance = grid_posterior(log_posterior, 0.0, 10.0)
    mcmc = run(ExchangeKernel(model), False)
    assert_moments(mcmc.get_samples(group_by_chain=True)["theta"].double(), mean, variance)
