"""A random walk on sites of whole numbers, against sums over their values."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import tensor

from pyro_ebm import (
    MCMC,
    CompositeKernel,
    DiscreteLangevinKernel,
    GibbsKernel,
    GibbsWithGradientsKernel,
    LangevinKernel,
    MHKernel,
    TemperingKernel,
    UnnormalizedEnergy,
)
from pyro_ebm.mcmc import Flip, IntegerWalk, Site
from tests.statistics import assert_mean, assert_moments


def walk(model=None, **settings):
    return MHKernel(model, proposal=IntegerWalk(), **settings)


def draws(kernel, samples=40, warmup=80, chains=500, **settings):
    mcmc = MCMC(kernel, samples, warmup, num_chains=chains, disable_progbar=True, **settings)
    mcmc.run()
    return mcmc.get_samples(group_by_chain=True)


def truth(log_prob, values):
    """Mean and variance of a density on whole numbers."""
    p = log_prob(values).double().softmax(0)
    mean = (p * values).sum()
    return mean, (p * (values - mean).square()).sum()


SITES = {
    "rare": dist.Poisson(0.1),
    "Poisson": dist.Poisson(4.0),
    "large": dist.Poisson(500.0),
    "Geometric": dist.Geometric(0.2),
    "NegativeBinomial": dist.NegativeBinomial(tensor(3.0), tensor(0.6)),
    "GammaPoisson": dist.GammaPoisson(tensor(4.0), tensor(0.5)),
    "ZeroInflatedPoisson": dist.ZeroInflatedPoisson(tensor(5.0), gate=tensor(0.4)),
    "LogNormalNegativeBinomial": dist.LogNormalNegativeBinomial(
        tensor(3.0), tensor(0.5), tensor(0.3)
    ),
    "Binomial": dist.Binomial(1000, tensor(0.3)),
    "BetaBinomial": dist.BetaBinomial(tensor(2.0), tensor(1.0), 10),
    "Categorical": dist.Categorical(tensor([0.1, 0.2, 0.3, 0.4])),
    "at both ends": dist.Categorical(tensor([0.45, 0.05, 0.05, 0.45])),
}


@pytest.mark.parametrize("name", SITES)
def test_moments_of_one_site(name):
    fn = SITES[name]
    count = {"Binomial": 1001, "BetaBinomial": 11, "Categorical": 4, "at both ends": 4}
    mean, variance = truth(fn.log_prob, torch.arange(1.0 * count.get(name, 1000)))
    warmup = 400 if name == "ZeroInflatedPoisson" else 80  # from 0 to the rest is a rare step
    n = draws(walk(lambda: pyro.sample("n", fn)), warmup=warmup)["n"]
    assert n.min() >= 0
    assert_moments(n, mean, variance)


def test_proposals_are_symmetric():
    """The walk itself, with neither density nor bounds: P(z -> z') = P(z' -> z)."""
    proposal = IntegerWalk(scale=1.5)
    site = Site("n", torch.Size([2]), torch.float32, None, support_values=torch.empty(0, 1))  # pyright: ignore[reportArgumentType]

    class Two:
        sites, sizes, dtype, device = [site], [2], torch.float32, torch.device("cpu")

    bound = proposal.bind(Two())  # pyright: ignore[reportArgumentType]
    factor = tensor([[[1.0, 0.0], [0.8, 0.6]]])
    bound = bound.adapted(torch.full((40_000, 1), 1.5), factor)
    jumps = bound.sample(torch.full((40_000, 2), 7.0)) - 7
    assert torch.equal(jumps, jumps.round())
    assert (jumps != 0).any(-1).all()
    for jump in ([1, 0], [0, 1], [1, 1], [2, 1], [-1, 1]):
        forth, back = ((jumps == sign * tensor(jump)).all(-1).double() for sign in (1, -1))
        difference = (forth - back).mean()
        error = (forth + back).mean().div(len(jumps)).sqrt()
        assert difference.abs() < 4.5 * error


def test_several_sites_with_bounds_and_without():
    """Capture and recapture: the animals that there are, and how many of them are marked."""

    def model():
        n = pyro.sample("n", dist.Poisson(6.0))
        marked = pyro.sample("marked", dist.Binomial(8, 0.4))
        pyro.sample("y", dist.Normal(n + 2 * marked, 2.0), obs=tensor(15.0))

    n, marked = torch.meshgrid(torch.arange(40.0), torch.arange(9.0), indexing="ij")
    log_p = dist.Poisson(6.0).log_prob(n) + dist.Binomial(8, tensor(0.4)).log_prob(marked)
    log_p = log_p + dist.Normal(n + 2 * marked, 2.0).log_prob(tensor(15.0))
    p = log_p.double().flatten().softmax(0).reshape(n.shape)
    found = draws(walk(model))
    assert_mean(found["n"], (p * n).sum())
    assert_mean(found["marked"], (p * marked).sum())
    assert_mean(found["n"] * found["marked"], (p * n * marked).sum())


def test_bounds_that_another_latent_moves():
    def model():
        n = pyro.sample("n", dist.Poisson(5.0))
        k = pyro.sample("k", dist.Binomial(n, 0.5))
        pyro.sample("y", dist.Normal(k, 1.0), obs=tensor(3.0))

    n, k = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    log_p = dist.Poisson(5.0).log_prob(n) + dist.Normal(k, 1.0).log_prob(tensor(3.0))
    choose = dist.Binomial(n.clamp(min=k), 0.5, validate_args=False).log_prob(k)
    log_p = torch.where(k <= n, log_p + choose, -torch.inf)
    p = log_p.double().flatten().softmax(0).reshape(n.shape)
    found = draws(walk(model))
    assert (found["k"] <= found["n"]).all()
    assert_mean(found["n"], (p * n).sum())
    assert_mean(found["k"], (p * k).sum())


def test_beside_continuous_and_binary_sites():
    """Poisson counts of an unknown rate, of which some are zero for another reason."""

    def model():
        rate = pyro.sample("rate", dist.Gamma(4.0, 1.0))
        n = pyro.sample("n", dist.Poisson(rate))
        b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(n + 3 * b, 1.0), obs=tensor(5.0))

    kernels = [GibbsKernel(), walk(), LangevinKernel()]
    found = draws(CompositeKernel(model, kernels))
    n = torch.arange(60.0)[:, None]
    b = torch.arange(2.0)
    log_p = dist.NegativeBinomial(tensor(4.0), tensor(0.5)).log_prob(n)  # the rate integrated out
    log_p = log_p + dist.Bernoulli(0.3).log_prob(b)
    log_p = log_p + dist.Normal(n + 3 * b, 1.0).log_prob(tensor(5.0))
    p = log_p.double().flatten().softmax(0).reshape(log_p.shape)
    assert_mean(found["n"], (p * n).sum())
    assert_mean(found["b"], (p * b).sum())
    assert_mean(found["rate"], (p * (4 + n) / 2).sum())  # rate | n ~ Gamma(4 + n, 2)


def test_plates_and_other_ways_to_run():
    y = tensor([1.0, 4.0, 0.0])

    def model():
        with pyro.plate("data", 3):
            n = pyro.sample("n", dist.Poisson(tensor([1.0, 4.0, 0.2])))
            pyro.sample("y", dist.Normal(n, 1.0), obs=y)

    n = torch.arange(60.0)[:, None]
    log_p = dist.Poisson(tensor([1.0, 4.0, 0.2])).log_prob(n) + dist.Normal(n, 1.0).log_prob(y)
    mean = (log_p.double().softmax(0) * n).sum(0)
    for kernel in (
        walk(model),
        walk(model, jit_compile="capture"),
        TemperingKernel(walk(model), (1.0, 0.5)),
    ):
        assert_mean(draws(kernel)["n"], mean)
    one = draws(walk(model), samples=1500, warmup=100, chains=1, chain_method="sequential")["n"]
    assert_mean(one, mean)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Poisson(3.0),
        dist.Geometric(0.5),
        dist.NegativeBinomial(3, tensor(0.5)),
        dist.ZeroInflatedPoisson(tensor(3.0), gate=tensor(0.5)),
        dist.Binomial(tensor([2.0, 3.0]), 0.5),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_errors_of_other_kernels_lead_here(fn):
    def model():
        return pyro.sample("n", fn)

    kernels = [GibbsKernel, GibbsWithGradientsKernel, DiscreteLangevinKernel]
    for kernel in (*kernels, lambda model: MHKernel(model, proposal=Flip())):
        with pytest.raises(ValueError, match=r"\['n'\] are whole numbers without.*IntegerWalk"):
            kernel(model).setup(0)
    with pytest.raises(ValueError, match=r"discrete sites \['n'\]: add a MHKernel\(proposal=Int"):
        CompositeKernel(model).setup(0)
    if not fn.has_enumerate_support:
        with pytest.raises(ValueError, match=r"site 'n' is discrete .*proposal=IntegerWalk"):
            LangevinKernel(model).setup(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        walk(model).setup(0)


@pytest.mark.parametrize(
    "fn",
    [dist.Multinomial(4, torch.ones(3)), dist.DirichletMultinomial(torch.ones(3), 4)],
    ids=lambda fn: type(fn).__name__,
)
def test_counts_that_share_a_total_are_refused_by_name(fn):
    for kernel in (walk, GibbsKernel, LangevinKernel):
        with pytest.raises(ValueError, match=r"site 'x' .*one Binomial after another"):
            kernel(lambda: pyro.sample("x", fn)).setup(0)


def test_other_values_are_not_walked_on():
    for fn in (dist.Normal(0.0, 1.0), dist.OneHotCategorical(torch.ones(3))):
        with pytest.raises(ValueError, match=r"\['x'\] are not|not move .*\['x'\]"):
            walk(lambda fn=fn: pyro.sample("x", fn)).setup(0)


def test_starts_are_whole_numbers():
    kernel = walk(lambda: pyro.sample("n", dist.Poisson(3.0)))
    kernel.initial_params = {"n": tensor(2.5)}
    with pytest.raises(ValueError, match=r"'n'.* must hold whole numbers"):
        kernel.setup(0)
    kernel.initial_params = {"n": tensor(-2.0)}
    with pytest.raises(ValueError, match="initial_params of chain 0 are no start"):
        kernel.setup(0)


def test_the_model_sees_whole_numbers_within_their_bounds_only():
    prices = torch.arange(6.0)

    def model():
        n = pyro.sample("n", dist.Poisson(1.0))
        k = pyro.sample("k", dist.Binomial(n, 0.5))
        assert k >= 0
        assert k <= n
        pyro.sample("y", dist.Normal(prices[n.long().clamp(max=5)], 1.0), obs=tensor(2.0))

    n = torch.arange(20.0)

    def log_prob(n):
        likelihood = dist.Normal(prices[n.long().clamp(max=5)], 1.0).log_prob(tensor(2.0))
        return dist.Poisson(1.0).log_prob(n) + likelihood

    assert_mean(draws(walk(model))["n"].float(), truth(log_prob, n)[0])


@pytest.mark.parametrize("base", [dist.Poisson(4.0), None], ids=["Poisson", "counting"])
def test_energies_on_whole_numbers(base):
    support = None if base else dist.constraints.nonnegative_integer
    p = UnnormalizedEnergy(lambda x: 0.5 * x, base=base, support=support)
    mean = 4 * math.exp(-0.5) if base else 1 / math.expm1(0.5)
    assert_mean(draws(walk(lambda: pyro.sample("x", p)))["x"].float(), tensor(mean))
    with pytest.raises(ValueError, match="IntegerWalk"):
        UnnormalizedEnergy(
            lambda x: 0.5 * x, base=base, support=support, kernel=GibbsKernel()
        ).sample((3,))


def test_a_mixture_of_counts():
    parts = dist.Poisson(tensor([1.0, 5.0]))
    p = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)
    assert_mean(draws(walk(lambda: pyro.sample("x", p)))["x"].float(), tensor(3.0))


def test_one_hot_sites_are_sent_to_gibbs():
    kernel = walk(lambda: pyro.sample("k", dist.OneHotCategorical(torch.ones(3))))
    with pytest.raises(ValueError, match=r"IntegerWalk.*'k'.*GibbsKernel"):
        draws(kernel)
