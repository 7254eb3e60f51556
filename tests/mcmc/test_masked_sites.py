"""Masked elements: missing data that are NaN, and latents that nothing depends on."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

from pyro_ebm import (
    MCMC,
    BarkerKernel,
    ChEESKernel,
    CompositeKernel,
    ExchangeKernel,
    GibbsKernel,
    LangevinKernel,
    MHKernel,
    TemperingKernel,
    UnnormalizedEnergy,
)
from pyro_ebm.mcmc.potentials.model import ModelPotential
from tests.statistics import assert_mean, assert_moments

NAN = math.nan
Y = torch.tensor([1.0, 2.0, NAN, 3.0, NAN])
SEEN = ~Y.isnan()
#  mu ~ N(0, 1), three of y ~ N(mu, 1) with sum 6: mu | y ~ N(6/4, 1/4)
MEAN, VARIANCE = 1.5, 0.25


def gaussian(mu):
    return dist.Normal(mu, 1.0)


def energy(mu):
    return UnnormalizedEnergy(lambda x: (x - mu) ** 2 / 2, constant_normalizer=True)


def base(mu):
    return UnnormalizedEnergy(lambda x: 0 * x, base=dist.Normal(mu, 1.0), constant_normalizer=True)


DENSITIES = {"normal": gaussian, "energy": energy, "tilt": base}


def site_mask(p):
    with pyro.plate("data", 5), poutine.mask(mask=SEEN):
        pyro.sample("y", p, obs=Y)


def own_mask(p):
    with pyro.plate("data", 5):
        pyro.sample("y", p.expand([5]).mask(SEEN), obs=Y)


def own_mask_of_an_event(p):
    pyro.sample("y", p.expand([5]).mask(SEEN).to_event(1), obs=Y)


def two_masks(p):
    with pyro.plate("data", 5), poutine.mask(mask=torch.tensor([True, True, False, True, True])):
        pyro.sample("y", p.expand([5]).mask(SEEN), obs=Y)


def obs_mask(p):
    with pyro.plate("data", 5):
        pyro.sample("y", p, obs=Y, obs_mask=SEEN)


MASKS = [site_mask, own_mask, own_mask_of_an_event, two_masks, obs_mask]


def potential_of(mask, density):
    def model():
        mask(DENSITIES[density](pyro.sample("mu", dist.Normal(0.0, 1.0))))

    return ModelPotential(model)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.__name__)
def test_missing_data_have_no_part_in_values_and_gradients(mask, density):
    potential = potential_of(mask, density)
    z = torch.randn(3, potential.dim)
    z[:, 1:] = 0.7  # those that are not observed
    value, grad = potential.value_and_grad(z)
    mu = z[:, 0].clone().requires_grad_()
    want = mu.square() / 2 + (Y[SEEN] - mu[:, None]).square().sum(-1) / 2
    if mask is obs_mask:
        want = want + (0.7 - mu).square()  # two of them
    (want_grad,) = torch.autograd.grad(want.sum(), mu)
    torch.testing.assert_close(grad[:, 0], want_grad, rtol=1e-4, atol=1e-4)
    constant = value - want.detach()
    torch.testing.assert_close(constant, constant[:1].expand(3), rtol=1e-4, atol=1e-4)


KERNELS = [LangevinKernel, BarkerKernel, MHKernel, ChEESKernel]


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(kernel):
    def model():
        site_mask(gaussian(pyro.sample("mu", dist.Normal(0.0, 1.0))))

    mcmc = MCMC(kernel(model), 40, 80, num_chains=400, disable_progbar=True)
    mcmc.run()
    assert_moments(mcmc.get_samples(group_by_chain=True)["mu"], MEAN, VARIANCE)


def test_kernels_around_kernels():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        site_mask(gaussian(mu))
        pyro.sample("z", dist.Normal(k, 1.0), obs=torch.tensor(0.5))

    inner = CompositeKernel(model, [LangevinKernel(), GibbsKernel()])
    mcmc = MCMC(inner, 30, 60, num_chains=400, disable_progbar=True)
    mcmc.run()
    assert_mean(mcmc.get_samples(group_by_chain=True)["mu"], MEAN)

    def continuous():
        site_mask(gaussian(pyro.sample("mu", dist.Normal(0.0, 1.0))))

    kernel = TemperingKernel(LangevinKernel(continuous), betas=[1.0, 0.5])
    mcmc = MCMC(kernel, 30, 60, num_chains=400, disable_progbar=True)
    mcmc.run()
    assert_mean(mcmc.get_samples(group_by_chain=True)["mu"], MEAN)


def test_exchange():
    """The precision of three numbers with |y|^2 = 14, under Gamma(1, 1): Gamma(2.5, 8)."""

    def model():
        theta = pyro.sample("theta", dist.Gamma(1.0, 1.0))
        p = UnnormalizedEnergy(lambda x: theta * x**2 / 2)
        with pyro.plate("data", 5), poutine.mask(mask=SEEN):
            pyro.sample("y", p, obs=Y)

    kernel = ExchangeKernel(model, num_inner_steps=10)
    mcmc = MCMC(kernel, 10, num_chains=2, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["theta"].isfinite().all()
    assert mcmc.get_extra_fields()["acceptance_rate"].mean() > 0.05


def test_counts_and_vectors():
    vectors = torch.stack([Y, Y], -1)

    def model():
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 5), poutine.mask(mask=SEEN):
            pyro.sample("count", dist.Poisson(rate), obs=Y)
            pyro.sample("vector", dist.Normal(rate, 1.0).expand([5, 2]).to_event(1), obs=vectors)
            pyro.sample("interval", dist.Uniform(0.0, 10.0), obs=Y)

    value, grad = ModelPotential(model).value_and_grad(torch.zeros(2, 1))
    assert value.isfinite().all()
    assert grad.isfinite().all()


def test_data_that_are_not_masked_are_missed():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)

    with pytest.raises(ValueError, match="'y'"):
        ModelPotential(model)


def test_a_mask_that_depends_on_a_latent():
    """y is seen where mu > 0 alone: it is not filled there, and mu > 0 has no density."""

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=mu < 0):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(NAN))

    with pyro.validation_enabled(False):
        potential = ModelPotential(model)
        value = potential(torch.tensor([[1.0], [-1.0]]))
    assert value[0].isfinite()
    assert value[1].isnan()


# -- latents -------------------------------------------------------------------------------------


def run(model):
    mcmc = MCMC(LangevinKernel(model), 150, 100, num_chains=60, disable_progbar=True)
    mcmc.run()
    return mcmc


@pytest.mark.parametrize("prior", [dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0)])
def test_elements_that_obs_mask_says_are_observed_do_not_drift(prior):
    y = torch.ones(50)
    seen = torch.arange(50) < 48

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        p = dist.LogNormal(mu, 1.0) if isinstance(prior, dist.LogNormal) else dist.Normal(mu, 1.0)
        with pyro.plate("data", 50):
            pyro.sample("y", p, obs=y, obs_mask=seen)

    mcmc = run(model)
    told = mcmc.diagnostics()
    assert told["y_unobserved"]["r_hat"].max() < 1.2  # it was 2.8
    assert told["mu"]["r_hat"] < 1.2
    draws = mcmc.get_samples(group_by_chain=True)
    z = y.log() if isinstance(prior, dist.LogNormal) else y
    assert_mean(draws["mu"], float(z[seen].sum() / 49))
    missing = draws["y_unobserved"][..., ~seen]
    missing = missing.log() if isinstance(prior, dist.LogNormal) else missing
    assert_mean(missing, float(z[seen].sum() / 49))


def test_padding_of_sequences_does_not_drift():
    lengths, y = torch.tensor([3, 1]), torch.tensor([[0.5, 1.0, 2.0], [1.0, NAN, NAN]])

    def model():
        with pyro.plate("sequence", 2):
            x = torch.zeros(2)
            for t in range(3):
                with poutine.mask(mask=lengths > t):
                    x = pyro.sample(f"x_{t}", dist.Normal(x, 1.0))
                    pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[:, t])

    mcmc = run(model)
    told = mcmc.diagnostics()
    assert max(told[f"x_{t}"]["r_hat"].max() for t in range(3)) < 1.1
    assert_mean(mcmc.get_samples(group_by_chain=True)["x_0"][..., 1], 0.5)


def test_a_flat_prior_that_data_make_proper_is_what_it_was():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.tensor([3.0, -2.0]))

    draws = run(model).get_samples(group_by_chain=True)["x"]
    assert_moments(draws, torch.tensor([3.0, -2.0]), 1.0)


def test_a_flat_prior_on_an_interval_is_uniform():
    def model():
        pyro.sample("x", dist.Beta(2.0, 5.0).mask(False))

    assert_moments(run(model).get_samples(group_by_chain=True)["x"], 0.5, 1 / 12)


def test_a_masked_latent_that_is_seen_through_a_branch_is_left_alone():
    """No gradient tells of it."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
        pyro.sample("y", dist.Normal((x > 0).float(), 0.1), obs=torch.tensor(1.0))

    z = torch.tensor([[2.0], [-2.0]])
    up, down = ModelPotential(model)(z)
    assert down - up == pytest.approx(50.0, abs=1e-3)


def test_a_mask_of_a_latent_is_no_padding():
    def model():
        k = pyro.sample("k", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=k > 0):
            pyro.sample("x", dist.Normal(0.0, 0.1))

    z = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [-1.0, 1.0]])
    at = ModelPotential(model)(z)
    assert at[1] - at[0] == pytest.approx(50.0, abs=1e-3)
    assert at[3] == at[2]


@pytest.mark.parametrize(
    "prior",
    [
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).expand([3]),
        dist.ImproperUniform(constraints.positive_definite, (3,), (2, 2)),
    ],
    ids=["vectors", "matrices"],
)
def test_rows_of_events(prior):
    """Idle rows are standard normal on the reals, and the others what they are."""
    mask = torch.tensor([True, False, True])

    def model():
        with pyro.plate("rows", 3), poutine.mask(mask=mask):
            x = pyro.sample("x", prior)
            seen = x.flatten(1).square().sum(-1)
            pyro.factor("f", -seen / 2)

    potential = ModelPotential(model)
    z = torch.randn(2, potential.dim)
    _, grad = potential.value_and_grad(z)
    size = potential.dim // 3
    torch.testing.assert_close(grad[:, size : 2 * size], z[:, size : 2 * size])
    assert (grad[:, :size] - z[:, :size]).abs().max() > 1e-3
