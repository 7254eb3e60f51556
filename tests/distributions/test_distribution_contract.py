"""What every energy of the package owes to Pyro, whatever its family: a new one is a new line."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

from pyro_ebm import MCMC, UnnormalizedEnergy, mixture, negation, noise_conditional, product
from pyro_ebm.distributions import (
    RBM,
    BoltzmannMachine,
    ExponentialFamily,
    GaussianRBM,
    Potts,
    lattice_edges,
    log_normalizer_by_quadrature,
)
from pyro_ebm.mcmc.short_run import default_kernel


def square(x):
    return x.square().sum(-1) / 2


def noisy_square(x, sigma):
    return square(x) / (1 + sigma**2)


def layers(dtype):
    return (
        torch.linspace(-1, 1, 6, dtype=dtype).reshape(3, 2),
        torch.tensor([0.1, -0.2, 0.3], dtype=dtype),
        torch.tensor([0.2, 0.5], dtype=dtype),
    )


def ising(dtype):
    return BoltzmannMachine(torch.tensor(0.3, dtype=dtype), edges=lattice_edges(2, 3))


class Quartic(UnnormalizedEnergy):
    """A distribution of a user's own: the recipe in the docstring of the base class."""

    normalized_parts = ()

    def __init__(self, scale, **kwargs):
        self.scale = scale
        log_z = (scale.log() + math.log(2.0) + math.lgamma(1.25)).sum(-1)
        event, batch = scale.shape[-1:], scale.shape[:-1]
        super().__init__(None, event, batch_shape=batch, log_normalizer=log_z, **kwargs)

    def _energy(self, x):
        return (x / self.scale).pow(4).sum(-1)

    def sample(self, sample_shape=()):
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        size = dist.Gamma(self.like.new_tensor(0.25), 1.0).sample(shape).pow(0.25)
        return self.scale.detach() * size * (2 * torch.rand_like(size).round() - 1)


# each makes a member whose parameters have the dtype
MEMBERS = {
    "energy": lambda d: UnnormalizedEnergy(
        square, base=dist.Normal(torch.zeros(2, dtype=d), 1.0).to_event(1)
    ),
    "noise_conditional": lambda d: noise_conditional(
        noisy_square, [2.0, 0.5], base=dist.Normal(torch.zeros(2, dtype=d), 1.0).to_event(1)
    ),
    "boolean": lambda d: UnnormalizedEnergy(
        lambda x: x.sum(-1), (3,), constraints.boolean, base=dist.Bernoulli(
            torch.full((3,), 0.5, dtype=d)
        ).to_event(1)
    ),
    "RBM": lambda d: RBM(*layers(d)),
    "JointRBM": lambda d: RBM(*layers(d)).joint(),
    "GaussianRBM": lambda d: GaussianRBM(*layers(d)),
    "BoltzmannMachine": ising,
    "Potts": lambda d: Potts(
        torch.tensor(0.4, dtype=d), edges=lattice_edges(2, 2), num_states=3
    ),
    "ExponentialFamily": lambda d: ExponentialFamily.gamma(
        torch.tensor(2.0, dtype=d), torch.tensor(3.0, dtype=d)
    ),
    "product": lambda d: product(
        dist.Normal(torch.zeros(2, dtype=d), 1.0).to_event(1), UnnormalizedEnergy(square, (2,))
    ),
    "mixture": lambda d: mixture(
        torch.tensor([0.3, 0.7], dtype=d),
        [dist.Normal(torch.tensor(float(m), dtype=d), 1.0) for m in (-1, 1)],
    ),
    "negation": lambda d: negation(
        dist.Normal(torch.zeros((), dtype=d), 1.0), dist.Normal(torch.ones((), dtype=d), 2.0), 0.5
    ),
    "own": lambda d: Quartic(torch.tensor([1.0, 2.0], dtype=d)),
    "tempered": lambda d: ising(d).tempered(0.5),
}  # fmt: skip
PICKLED = [name for name in MEMBERS if name != "boolean"]  # whose energy is a lambda


@pytest.fixture(params=MEMBERS)
def name(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def make(name, dtype=torch.float32):
    return MEMBERS[name](dtype)


def test_shapes_and_dtypes(name, dtype):
    p = make(name, dtype)
    x = p.starting_points((4, 2))
    assert x.shape == (4, 2) + p.batch_shape + p.event_shape
    assert p.support.check(x).all()
    for value in (p.energy(x), p.log_prob(x), p.unnormalized_log_prob(x)):
        assert value.shape == (4, 2) + p.batch_shape
        assert value.dtype == dtype
        assert value.isfinite().all()
    assert p.support.event_dim == p.event_dim == len(p.event_shape)


def test_draws(name, dtype):
    p = make(name, dtype)
    p.num_steps = 5
    with torch.no_grad():  # as predictive draws are
        x = p.sample((6,))
    assert x.shape == (6,) + p.event_shape
    assert x.dtype == dtype
    assert not x.requires_grad
    assert p.support.check(x).all()
    assert p.sample().shape == p.event_shape


def test_expand(name):
    p = make(name)
    wide = p.expand((5, 3))
    assert type(wide) is type(p)
    assert wide.batch_shape == (5, 3)
    assert p.batch_shape == ()
    x = p.starting_points((5, 3))
    torch.testing.assert_close(wide.log_prob(x), p.log_prob(x))
    assert wide.unexpanded is p
    assert wide.normalizer_state == p.normalizer_state
    with pytest.raises(ValueError, match="does not expand"):
        wide.expand((4,))


def test_wrappers_and_plates(name):
    p = make(name)
    x = p.starting_points((3,))

    def model(x):
        with pyro.plate("rows", 3), poutine.scale(scale=2.0):
            pyro.sample("x", p, obs=x)

    trace = poutine.trace(model).get_trace(x)
    torch.testing.assert_close(trace.log_prob_sum(), 2 * p.log_prob(x).sum())
    mask = torch.tensor([True, False, True])
    got = p.expand((3,)).mask(mask).log_prob(x)
    torch.testing.assert_close(got, torch.where(mask, p.log_prob(x), 0.0))
    got = p.expand((3,)).to_event(1).log_prob(x)
    torch.testing.assert_close(got, p.log_prob(x).sum())


def test_a_site_of_a_model_moves(name):
    p = make(name)
    kernel = type(default_kernel(p))
    mcmc = MCMC(kernel(p), 8, 4, num_chains=3, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert x.shape == (3, 8) + p.event_shape
    assert p.support.check(x).all()
    assert (x != x[:1, :1]).any()


def test_known_normalizer(name):
    p = make(name)
    known = p.normalized(1.25)
    assert known.is_normalized
    assert known.log_normalizer == 1.25
    x = p.starting_points((3,))
    torch.testing.assert_close(known.log_prob(x), p.unnormalized_log_prob(x) - 1.25)
    assert known.expand((3,)).log_normalizer == 1.25
    with pytest.raises(ValueError, match="must be finite"):
        p.normalized(float("nan"))


@pytest.mark.parametrize("name", PICKLED)
def test_pickles(name):
    p = make(name)
    again = pickle.loads(pickle.dumps(p))
    x = p.starting_points((3,))
    torch.testing.assert_close(again.log_prob(x), p.log_prob(x))
    assert repr(again) == repr(p)


def test_repr_and_wrong_points(name):
    p = make(name)
    assert repr(p).startswith(type(p).__name__ + "(")
    if p.event_dim:
        with pytest.raises(ValueError, match=r"must end in event_shape=\(.*\), got shape \(2, 7\)"):
            p.energy(torch.zeros(2, 7))


def test_a_distribution_of_ones_own_is_normalized_whatever_moves_it():
    scale = torch.tensor([1.0, 2.0], requires_grad=True)
    p, x = Quartic(scale), torch.randn(5, 2)
    assert not p.lags(x)
    one = Quartic(torch.tensor([1.5], dtype=torch.float64))
    torch.testing.assert_close(log_normalizer_by_quadrature(one), one.log_normalizer)
    torch.manual_seed(0)
    moments = one.sample((100_000,)).pow(4) / one.scale**4  # of Gamma(1/4, 1): 1/4, sd 1/2
    assert abs(moments.mean() - 0.25) < 5 * 0.5 / 100_000**0.5
