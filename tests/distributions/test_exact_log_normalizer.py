"""Energies on finite supports: the sum over their states, and draws from the table of them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch.testing import assert_close

from pyro_ebm import MCMC, ExchangeKernel, UnnormalizedEnergy
from pyro_ebm.distributions.enumerated import sample_by_table
from pyro_ebm.mcmc import inner_steps_report
from pyro_ebm.mcmc.potentials.model import ModelPotential
from tests.enumeration import assert_counts

COUNTS = constraints.integer_interval(0, 99)
NU = torch.tensor(1.5, dtype=torch.double)
RATES = torch.tensor([0.5, 1.8], dtype=torch.double)
K = torch.arange(100.0, dtype=torch.double)


def log_terms(rate, nu):  # of a Conway-Maxwell-Poisson distribution: e^(a k) / k!^nu
    return rate[..., None] * K - nu * torch.lgamma(K + 1)


def counts(rate, nu, **kwargs):
    return UnnormalizedEnergy(
        lambda k: nu * torch.lgamma(k + 1) - rate * k,
        batch_shape=rate.shape,
        support=COUNTS,
        **kwargs,
    )


def test_the_sum_and_its_gradient():
    rate, nu = RATES.clone().requires_grad_(), NU.clone().requires_grad_()
    log_z = counts(rate, nu).exact_log_normalizer()
    assert_close(log_z, log_terms(rate, nu).logsumexp(-1))
    (of_rate,) = torch.autograd.grad(log_z.sum(), rate)
    assert_close(of_rate, (log_terms(RATES, NU).softmax(-1) * K).sum(-1))  # the mean


def test_several_variables_in_a_plate_are_summed_once():
    p = UnnormalizedEnergy(lambda x: x.sum(-1), (9,), constraints.boolean).expand((50,))
    log_z = p.exact_log_normalizer()
    assert log_z.shape == ()
    assert_close(log_z, torch.tensor(9 * math.log1p(math.exp(-1))))


def test_the_points_of_an_integer_base_stay_integers():
    table = torch.tensor([0.0, 1.0, 2.0])
    p = UnnormalizedEnergy(lambda k: table[k], base=dist.Categorical(torch.ones(3)))
    assert_close(p.exact_log_normalizer(), (-table).exp().mean().log())


def test_a_latent_moves_it():
    y = torch.tensor([0.0, 3.0, 2.0, 7.0], dtype=torch.double)

    def model(known):
        rate = pyro.sample("rate", dist.Normal(torch.zeros_like(NU), 1.0))
        p = counts(rate.expand(4), NU)
        log_z = log_terms(rate, NU).logsumexp(-1) if known else p.exact_log_normalizer()
        with pyro.plate("data", 4):
            pyro.sample("y", p.normalized(log_z), obs=y)

    z = torch.linspace(-2, 2, 5, dtype=torch.double)[:, None]
    (value, grad), known = (ModelPotential(model, (k,)).value_and_grad(z) for k in (False, True))
    assert_close(value, known[0])
    assert_close(grad, known[1])


def test_what_is_no_short_sum_is_refused():
    with pytest.raises(ValueError, match=r"a sum over a finite support, and .* use estimate_log_n"):
        UnnormalizedEnergy(torch.square).exact_log_normalizer()
    with pytest.raises(ValueError, match=r"3 variables of 100 values have 100\^3 states"):
        UnnormalizedEnergy(lambda k: k.sum(-1), (3,), COUNTS).exact_log_normalizer(max_units=10)
    unbounded = UnnormalizedEnergy(lambda k: k, support=constraints.nonnegative_integer)
    with pytest.raises(ValueError, match="not a finite set"):
        unbounded.exact_log_normalizer()


def test_draws_from_the_table():
    k = sample_by_table(counts(RATES, NU), (20_000,))
    assert k.shape == (20_000, 2)
    for i in range(2):
        seen = k[:, i].long().bincount(minlength=100)
        assert_counts(seen, log_terms(RATES, NU)[i].softmax(-1))
    with pytest.raises(ValueError, match="states"):
        sample_by_table(UnnormalizedEnergy(lambda k: k.sum(-1), (2,), COUNTS), max_units=10)


def test_auxiliaries_of_few_states_are_exact():
    few = constraints.integer_interval(0, 1999)  # more than 2^10 values, of a single variable

    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 3):
            energy = UnnormalizedEnergy(lambda k: rate * k, support=few)
            pyro.sample("y", energy, obs=y)
        bits = UnnormalizedEnergy(lambda x: rate * x.sum(-1), (4,), constraints.boolean)
        pyro.sample("bits", bits, obs=torch.tensor([1.0, 0.0, 1.0, 0.0]))
        many = UnnormalizedEnergy(lambda x: rate * x.sum(-1), (12,), constraints.boolean)
        pyro.sample("many", many, obs=torch.ones(12))

    kernel = ExchangeKernel(model, num_inner_steps=1)
    mcmc = MCMC(kernel, 4, 2, num_chains=2, disable_progbar=True, check_convergence=False)
    mcmc.run(torch.tensor([0.0, 2.0, 1.0]))
    ways = {name: repr(a) for name, a in kernel.auxiliaries.items()}
    assert ways["y"] == ways["bits"] == "exact draws"
    assert ways["many"].startswith("1 steps of GibbsKernel()")
    assert inner_steps_report(mcmc, factor=2).num_steps == {"many": (1, 2)}
