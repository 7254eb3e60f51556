"""Combined energies in models: plates, chains, networks, latents that move log Z."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_ebm import (
    MCMC,
    ContrastiveDivergence,
    LangevinKernel,
    NormalizerError,
    UnnormalizedEnergy,
)
from pyro_ebm.distributions.core.introspection import modules
from pyro_ebm.distributions.mixture import mixture
from pyro_ebm.distributions.product import product
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.models.checks.intractability import check_normalizers
from tests.statistics import assert_moments


class Quadratic(nn.Module):
    """E(x) = precision (x - mean)^2 / 2, summed over the last ``event_dim`` dimensions."""

    def __init__(self, mean, precision, event_dim=0):
        super().__init__()
        self.mean, self.event_dim = torch.as_tensor(mean), event_dim
        self.precision = nn.Parameter(torch.as_tensor(precision))

    def forward(self, x):
        energy = self.precision * (x - self.mean) ** 2 / 2
        return energy.flatten(energy.dim() - self.event_dim).sum(-1) if self.event_dim else energy


def quadratic(mean, precision):
    """N(mean, 1 / precision) as an energy with an unknown log Z."""
    mean, precision = torch.as_tensor(mean), torch.as_tensor(precision)
    batch = torch.broadcast_shapes(mean.shape, precision.shape)
    return UnnormalizedEnergy(Quadratic(mean, precision), batch_shape=batch)


def ring(x):
    return 8 * (x.norm(dim=-1) - 2) ** 2


def test_chains_of_a_product_have_its_moments():
    p = product(
        UnnormalizedEnergy(Quadratic(torch.tensor([1.0, -1.0]), 3.0, event_dim=1), (2,)),
        dist.Normal(torch.tensor([-1.0, 3.0]), 1.0).to_event(1),
    )
    mcmc = MCMC(LangevinKernel(p), num_samples=60, warmup_steps=80, num_chains=200)
    mcmc.run()
    (draws,) = mcmc.get_samples(group_by_chain=True).values()
    assert_moments(draws, torch.tensor([0.5, 0.0]), 0.25)
    chains = p.sample((2000,))
    assert_moments(chains[None], torch.tensor([0.5, 0.0]), 0.25)


def test_plates_expand_and_pickle():
    p = product(quadratic(torch.zeros(3), 1.0), dist.Laplace(torch.tensor([[1.0], [2.0]]), 1.0))

    def model():
        with pyro.plate("a", 4, dim=-3), pyro.plate("b", 2, dim=-2), pyro.plate("c", 3, dim=-1):
            return pyro.sample("x", p)

    trace = pyro.poutine.trace(model).get_trace()
    site = trace.nodes["x"]
    trace.compute_log_prob()
    x = site["value"]
    assert x.shape == (4, 2, 3)
    want = -(x**2) / 2 + dist.Laplace(torch.tensor([[1.0], [2.0]]), 1.0).log_prob(x)
    assert_close(site["log_prob"], want)
    assert site["fn"].unexpanded is p
    for again in (pickle.loads(pickle.dumps(p)), copy.deepcopy(p)):
        assert_close(again.log_prob(x), p.log_prob(x))
        assert repr(again) == repr(p)


def test_it_vectorizes():
    p = product(UnnormalizedEnergy(ring, (2,)), dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.validation_enabled(False):
        x = torch.randn(5, 2)
        assert_close(torch.func.vmap(p.log_prob)(x), p.log_prob(x))


def test_chains_of_a_tempered_mixture_start_in_its_components():
    p = mixture([0.25, 0.75], [dist.Normal(-9.0, 1.0), dist.Normal(9.0, 1.0)])
    for q in (p.tempered(2.0), product(quadratic(0.0, 1e-3), p)):
        share = (q.starting_points((4000,)) > 0).double().mean()
        assert abs(share - 0.75) < 4.5 * math.sqrt(0.75 * 0.25 / 4000)
    q = product(p, UnnormalizedEnergy(torch.abs, support=constraints.positive))
    assert (q.starting_points((99,)) > 0).all()


# -- what is inside stays visible ----------------------------------------------------------------


def test_modules_are_found_however_deep():
    nets = [nn.Sequential(nn.Linear(2, 1), nn.Flatten(-2)) for _ in range(4)]
    a, b, c, d = (UnnormalizedEnergy(lambda x, net=net: net(x), (2,)) for net in nets)
    p = product(mixture([1.0, 2.0], [product(a, b).tempered(0.5), c], True), d)
    p = mixture([1.0], [product(mixture([1.0], [p], True), d)], True).tempered(0.5)
    found = modules(p._energy)
    assert all(net in found for net in nets)
    assert p.starting_points((3,)).shape == (3, 2)


def test_dropout_is_off_in_chains():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1), nn.Flatten(-2))
    a = UnnormalizedEnergy(net, (2,))
    potential = EnergyPotential(product(mixture([1.0, 1.0], [a, a], True), a))
    z = torch.randn(6, 2)
    assert_close(potential(z), potential(z))
    assert net.training


def test_points_outside_the_support_of_a_part_raise_nothing_in_chains():
    checks = {"validate_args": True}
    gamma = dist.Gamma(2.0, 1.0, **checks)
    tilt = UnnormalizedEnergy(torch.abs, base=dist.Pareto(1.0, 2.0, **checks))
    for p in (
        product(gamma, dist.LogNormal(0.0, 1.0, **checks), gamma),
        product(tilt, tilt),
        mixture([1.0, 1.0], [tilt, tilt], unnormalized_weights=True),
        product(mixture([1.0, 1.0], [gamma, gamma]), gamma),
    ):
        value = EnergyPotential(p)(torch.tensor([[math.nan], [0.3]]))
        assert value.isfinite().tolist() == [False, True]


def test_dtype_follows_the_parts():
    p = product(quadratic(0.0, torch.tensor(1.0).double()), UnnormalizedEnergy(torch.square))
    assert p.sample((3,)).dtype == torch.double
    q = product(torch.distributions.Gumbel(torch.zeros(2).double(), 1.0), quadratic(0.0, 1.0))
    assert q.starting_points().dtype == torch.double


def test_the_gradient_reaches_every_network():
    nets = nn.ModuleList([Quadratic(torch.zeros(2), 1.0, event_dim=1) for _ in range(2)])
    p = product(*(UnnormalizedEnergy(net, (2,)) for net in nets))

    def model(x):
        pyro.module("nets", nets)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    x = torch.randn(500, 2) / 2  # N(0, 1/4): precisions sum up to 4
    loss = ContrastiveDivergence(num_steps=5, persistent=True)
    svi = SVI(model, lambda x: None, Adam({"lr": 0.02}), loss)
    for _ in range(300):
        svi.step(x)
    first, second = (net.precision.item() for net in nets)
    assert abs(first - second) < 1e-3  # the same gradient
    # of n = 1,000 numbers the precision has the relative error sqrt(2 / n) at best
    assert abs(first + second - 4) < 4.5 * 4 * math.sqrt(2 * 2 / 1000)


# -- latents -------------------------------------------------------------------------------------


def moved(theta, known=False):
    log_z = -theta.log() / 2 + math.log(2 * math.pi) / 2 if known else None
    return UnnormalizedEnergy(lambda x: theta * x**2 / 2, log_normalizer=log_z)


FIXED = UnnormalizedEnergy(torch.cos, base=dist.Normal(0.0, 1.0))

UNKNOWN = {
    "an energy": lambda t: product(moved(t), FIXED),
    "a known energy": lambda t: product(FIXED, moved(t, known=True)),
    "an ordinary part": lambda t: product(FIXED, dist.Laplace(0.0, t)),
    "the base": lambda t: product(dist.Laplace(0.0, t), FIXED),
    "a power": lambda t: FIXED.tempered(t),
    "the power 1": lambda t: FIXED.tempered(t.clamp(1.0, 1.0)),
    "a component": lambda t: mixture([0.5, 0.5], [moved(t), FIXED], unnormalized_weights=True),
    "weights": lambda t: mixture(torch.stack([t, 1 / t]), [FIXED, FIXED], True),
    "nested": lambda t: product(mixture([0.5, 0.5], [moved(t), FIXED], True), FIXED),
    "two location families": lambda t: product(
        UnnormalizedEnergy(lambda x: (x - t) ** 2, constant_normalizer=True), FIXED
    ),
}


def seen_through(whole):
    def model():
        theta = pyro.sample("theta", dist.Gamma(2.0, 2.0))
        pyro.sample("x", whole(theta), obs=torch.tensor(0.7))

    return model


@pytest.mark.parametrize("whole", UNKNOWN.values(), ids=UNKNOWN)
def test_a_latent_that_moves_an_unknown_normalizer_is_refused(whole):
    with pytest.raises(NormalizerError, match=r"site 'x'.*'theta'"):
        check_normalizers(seen_through(whole))


@pytest.mark.parametrize(
    "whole",
    [
        lambda t: product(FIXED, FIXED),
        lambda t: product(moved(t), FIXED, constant_normalizer=True),
        lambda t: mixture([0.5, 0.5], [moved(t), moved(t)], True, constant_normalizer=True),
        lambda t: mixture(torch.stack([t, 1 / t]), [moved(t, known=True), dist.Normal(t, 1.0)]),
        lambda t: mixture(torch.stack([t, 1 / t]), [moved(t, known=True)] * 2, True),
        lambda t: product(moved(t), FIXED).normalized(t.log()),
        lambda t: product(dist.Normal(t, 1.0), dist.Normal(0.0, t)),
    ],
)
def test_a_normalizer_that_is_known_or_vouched_for_is_not(whole):
    check_normalizers(seen_through(whole))


def test_the_posterior_through_a_product_whose_log_z_is_known():
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        #  N(x; theta, 1) N(x; 0, 1) is proportional to N(x; theta / 2, 1 / 2)
        p = product(dist.Normal(theta, 1.0), dist.Normal(0.0, 1.0))
        pyro.sample("x", p, obs=torch.tensor(1.0))

    mcmc = MCMC(LangevinKernel(model), num_samples=60, warmup_steps=80, num_chains=200)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)["theta"]
    assert_moments(draws, 2 / 3, 2 / 3)  # precision 1 + (1/2)^2 / (1/2)
