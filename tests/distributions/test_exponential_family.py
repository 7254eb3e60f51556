"""Exponential families of one's own: log Z by quadrature, E[T(x)], tempering, bad input."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_ebm.distributions.exponential.exponential_family import ExponentialFamily
from pyro_ebm.distributions.exponential.families import Family
from pyro_ebm.distributions.exponential.quadrature import log_normalizer_by_quadrature
from tests.statistics import assert_mean

of = ExponentialFamily.from_distribution


def d(*values):
    """A double tensor."""
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def powers(x):
    """T(x) = (x^2, x^4)."""
    return torch.stack([x**2, x**4], -1)


QUARTIC = ExponentialFamily(powers, d(1.0, -1.0))


def double_well_statistic(x):
    """T = (x^4, x^2, x, y^2)."""
    x, y = x.unbind(-1)
    return torch.stack([x**4, x**2, x, y**2], -1)


def test_double_well():
    p = ExponentialFamily(
        double_well_statistic, torch.tensor([-1.0, 6.0, 0.5, -0.5]), event_shape=(2,)
    )
    assert p.log_normalizer.item() == pytest.approx(10.29348, abs=1e-5)
    line = torch.linspace(-6, 6, 401)
    grid = torch.cartesian_prod(line, line)
    weight = p.log_prob(grid).exp() * (line[1] - line[0]) ** 2
    assert weight.sum().item() == pytest.approx(1.0, abs=1e-4)
    assert_close(p.mean_parameters(), weight @ p.statistic(grid), rtol=1e-4, atol=1e-4)


def test_mean_parameters_satisfy_steins_identity():
    # E[x . grad E(x)] = 1 in one dimension: -2 theta_1 E[x^2] - 4 theta_2 E[x^4] = 1
    theta = d([[1.0, -1.0], [-3.0, -0.1], [10.0, -1.0]])
    mean = ExponentialFamily(powers, theta).mean_parameters()
    assert_close(-2 * theta[:, 0] * mean[:, 0] - 4 * theta[:, 1] * mean[:, 1], d(1.0, 1.0, 1.0))


def test_log_z_can_be_differentiated_twice():
    theta = d(1.0, -1.0).requires_grad_()

    def log_z(theta):
        return ExponentialFamily(powers, theta).log_normalizer

    assert torch.autograd.gradcheck(log_z, theta)
    assert torch.autograd.gradgradcheck(log_z, theta)
    assert ExponentialFamily(powers, theta).mean_parameters().requires_grad


def test_log_z_by_quadrature_under_vmap():
    theta = d([[1.0, -1.0], [-3.0, -0.1], [1e3, -1e-2], [0.0, 1.0]])

    def log_z(theta):
        return ExponentialFamily(powers, theta).log_normalizer

    with pyro.validation_enabled(False):
        value, gradient = torch.func.vmap(torch.func.grad_and_value(log_z))(theta)[::-1]
    want = ExponentialFamily(powers, theta[:3])
    assert_close(value[:3], want.log_normalizer)
    assert_close(gradient[:3], want.mean_parameters())
    assert value[3].isnan()  # improper, which does not disturb the others


def falling(x):
    """log h = -2 x, an exponential density without its constant."""
    return -2 * x


def test_base_measure_and_support():
    # h = exp(-2 x), T = log x on the positive numbers: Gamma(theta + 1, 2)
    theta = d([[2.0], [0.5]])
    p = ExponentialFamily(
        lambda x: x.log()[..., None], theta, falling, support=constraints.positive
    )
    q = dist.Gamma(theta[:, 0] + 1, d(2.0))
    x = q.sample((5,))
    assert_close(p.log_prob(x), q.log_prob(x))
    assert_close(p.mean_parameters()[:, 0], torch.digamma(theta[:, 0] + 1) - math.log(2.0))
    # h is in the energy, not in `base`
    assert p.base is None
    assert_close(p.energy(x), 2 * x - theta[:, 0] * x.log())


def test_a_log_normalizer_of_ones_own():
    def log_z(theta):
        return -(-theta[..., 0]).log()

    theta = nn.Parameter(torch.tensor([[-2.0], [-0.5]]))
    p = ExponentialFamily(
        lambda x: x[..., None], theta, log_normalizer=log_z, support=constraints.positive
    )
    x = torch.tensor([[0.5], [3.0]])
    assert p.is_normalized
    assert_close(p.log_prob(x), dist.Exponential(torch.tensor([2.0, 0.5])).log_prob(x))
    assert_close(p.mean_parameters().detach(), torch.tensor([[0.5], [2.0]]))


@pytest.mark.parametrize("parameter", [nn.Parameter(torch.tensor([1.0, -1.0])), "pyro"])
def test_the_normalizer_is_known_whatever_theta_is(parameter):
    if parameter == "pyro":
        parameter = pyro.param("theta", torch.tensor([1.0, -1.0]))
    p = ExponentialFamily(powers, parameter)
    assert p.normalizer_state == "known"
    (grad,) = torch.autograd.grad(p.log_prob(torch.tensor(0.7)), parameter)
    assert_close(grad, powers(torch.tensor(0.7)) - p.mean_parameters().detach())


def test_sums_over_a_finite_support():
    # three coupled spins: T = (s1 s2 + s2 s3, s1 + s2 + s3)
    def chain(s):
        return torch.stack([(s[..., 1:] * s[..., :-1]).sum(-1), s.sum(-1)], -1)

    theta = d([[0.7, 0.0], [0.2, -0.4]])
    p = ExponentialFamily(chain, theta, support=constraints.boolean, event_shape=(3,))
    x = torch.cartesian_prod(*[d(0.0, 1.0)] * 3)[:, None]
    assert_close(p.log_prob(x).exp().sum(0), d(1.0, 1.0))
    assert_close(p.mean_parameters(), (p.log_prob(x).exp()[..., None] * chain(x)).sum(0))


def test_a_network_as_statistic():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))  # bounded, and in float32

    def gaussian(x):
        return -x.square().sum(-1) / 2

    p = ExponentialFamily(net, torch.tensor([0.5, -1.0, 2.0]), gaussian, event_shape=(2,))
    line = torch.linspace(-6, 6, 201)
    log_area = 2 * (line[1] - line[0]).log()
    by_hand = p.unnormalized_log_prob(torch.cartesian_prod(line, line)).logsumexp(0) + log_area
    assert_close(p.log_normalizer, by_hand, rtol=1e-4, atol=1e-4)
    weights = list(net.parameters())
    for got, want in zip(
        torch.autograd.grad(p.log_normalizer, weights),
        torch.autograd.grad(by_hand, weights),
        strict=True,
    ):
        assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("q", [dist.Beta(d(0.5), d(2.0)), dist.Dirichlet(d(2.0, 3.0, 1.5))])
def test_gradients_where_numbers_end_before_the_support(q):
    # the same family without its formula: the integrand has holes, and its gradient none
    p = of(q)
    theta = p.natural_parameters.clone().requires_grad_()
    by_quadrature = ExponentialFamily(
        p.statistic, theta, support=q.support, event_shape=q.event_shape
    )
    assert_close(by_quadrature.log_normalizer.detach(), p.log_normalizer)
    assert_close(by_quadrature.mean_parameters().detach(), p.mean_parameters())


class Maxwell(Family):
    """x^2 exp(theta x^2): without a distribution of Pyro."""

    support = constraints.positive

    def statistic(self, x):
        return x.square()[..., None]

    def log_base_measure(self, x):
        return 2 * x.log()

    def log_normalizer(self, theta):
        return -1.5 * (-theta[..., 0]).log() + math.log(math.pi) / 2 - math.log(4.0)


def test_a_family_of_ones_own():
    p = ExponentialFamily(Maxwell(), torch.tensor([[-0.5], [-2.0]]))
    assert_close(log_normalizer_by_quadrature(p), p.log_normalizer)
    assert_close(p.mean_parameters()[:, 0], torch.tensor([3.0, 0.75]))
    assert repr(p).startswith("ExponentialFamily(family=Maxwell, batch_shape=(2,)")
    assert_mean(p.sample((2000,))[None, :, 0].square(), 3.0)  # independent short chains
    assert not p.has_rsample
    assert not p.has_enumerate_support
    with pytest.raises(NotImplementedError, match="Maxwell has no distribution of Pyro"):
        p.rsample()
    with pytest.raises(ValueError, match="space of Maxwell: log Z would be nan"):
        p.with_natural_parameters(torch.tensor([1.0]))


def test_own_families_draw_by_chains():
    pyro.set_rng_seed(1)
    assert_mean(powers(QUARTIC.sample((2000,)))[None], QUARTIC.mean_parameters())


def test_pickles_and_copies_of_own_families():
    for p in (pickle.loads(pickle.dumps(QUARTIC)), copy.deepcopy(QUARTIC)):
        assert p.family == QUARTIC.family
        assert_close(p.log_prob(d(0.3)), QUARTIC.log_prob(d(0.3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExponentialFamily(powers, torch.tensor([1.0, 0.0])), "density has not decayed"),
        (
            lambda: ExponentialFamily(powers, torch.tensor([0.0, 1.0])),
            "space of powers: the density",
        ),
        (
            lambda: ExponentialFamily(powers, d([[0.0, -1.0], [0.0, 1.0]])),
            r"\(batch element \(1,\)\)",
        ),
        (lambda: ExponentialFamily(powers, torch.tensor([math.nan, -1.0])), "NaN"),
        (
            lambda: ExponentialFamily(lambda x: x, torch.tensor([-1.0]), event_shape=(3,)),
            r"log Z of lambda: quadrature takes one or two .* has 3\. Give log_normalizer=",
        ),
        (
            lambda: ExponentialFamily(lambda x: x**2, torch.tensor([-1.0])),
            r"map points of shape \(\d+,\) .* to a tensor of shape \(\d+, 'k'\), got \(\d+,\)",
        ),
        (lambda: ExponentialFamily(powers, torch.tensor([-1.0])), "2 components .* have 1"),
        (lambda: ExponentialFamily(powers, torch.tensor(-1.0)), r"\(\*batch, k\), got \(\)"),
        (lambda: ExponentialFamily(powers, [-1.0]), r"natural_parameters must be a floating"),
        (lambda: ExponentialFamily(powers, torch.tensor([1, 2])), r"must be a floating"),
        (
            lambda: ExponentialFamily(3.0, torch.tensor([-1.0])),
            "statistic must be callable, got float",
        ),
        (
            lambda: ExponentialFamily(powers, torch.tensor([0.0, -1.0]), 3.0),
            "log_base_measure must be callable, got float",
        ),
        (
            lambda: ExponentialFamily(powers, torch.tensor([0.0, -1.0]), log_normalizer=1.0),
            "log_normalizer must be callable, got float",
        ),
        (
            lambda: ExponentialFamily(
                powers, torch.tensor([0.0, -1.0]), log_normalizer=lambda theta: theta
            ),
            r"log_normalizer must map .* to a tensor of shape \(\), got \(2,\)",
        ),
        (
            lambda: ExponentialFamily(
                powers, torch.tensor([0.0, -1.0]), support=constraints.nonnegative_integer
            ),
            "not a finite set",
        ),
        (
            lambda: ExponentialFamily(powers, torch.tensor([0.0, -1.0]), event_shape=3),
            "event_shape must be a tuple",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_where_validation_is_off_an_improper_density_is_nan():
    with pyro.validation_enabled(False):
        p = of(dist.Normal(0.0, 1.0)).with_natural_parameters(torch.tensor([0.0, 0.5]))
        assert p.log_prob(torch.tensor(1.0)).isnan()
        own = ExponentialFamily(powers, d([[0.0, -1.0], [0.0, 1.0]]))
        assert own.log_normalizer.isnan().tolist() == [False, True]


def test_own_families_are_told_apart():
    theta = torch.tensor([0.0, -1.0])
    assert ExponentialFamily(powers, theta).family == QUARTIC.family
    assert ExponentialFamily(powers, theta, torch.sin).family != QUARTIC.family
    assert ExponentialFamily(powers, theta, support=constraints.positive).family != QUARTIC.family


# -- tempering, normalizers by hand ------------------------------------------------------------


def test_tempered_stays_in_the_family_where_h_is_1():
    p = of(dist.Normal(d(1.0, 2.0), d(3.0)))
    hot = p.tempered(0.25)
    assert isinstance(hot, ExponentialFamily)
    x = d([[0.0], [5.0]])
    assert_close(hot.log_prob(x), dist.Normal(d(1.0, 2.0), d(6.0)).log_prob(x))
    each = p.tempered(d(0.25, 1.0))
    assert_close(each.log_prob(x), dist.Normal(d(1.0, 2.0), d(6.0, 3.0)).log_prob(x))
    assert p.expand((4, 2)).tempered(0.25).batch_shape == (4, 2)
    assert_close(ExponentialFamily.bernoulli(d(0.9)).tempered(0.0).log_prob(d(1.0)), d(0.5).log())
    with pytest.raises(ValueError, match="space of Normal"):
        p.tempered(0.0)
    with pytest.raises(ValueError, match="space of Beta"):
        of(dist.Beta(0.5, 0.5)).tempered(3.0)
    with pytest.raises(ValueError, match="beta must be finite and at least 0"):
        p.tempered(-1.0)


def test_tempered_elsewhere_is_an_energy_without_its_log_z():
    p = of(dist.Poisson(d(4.0)))
    hot = p.tempered(0.5)
    assert hot.normalizer_state == "unknown"
    x, y = d(3.0), d(5.0)
    assert_close(hot.log_density_ratio(x, y), p.log_density_ratio(x, y) / 2)


def test_another_log_z_takes_the_place_of_its_own():
    p = ExponentialFamily.gaussian(d(0.0), d(1.0))
    x = d(0.5)
    own = p.log_normalizer
    assert_close(p.normalized(own + 1.0).log_prob(x), p.log_prob(x) - 1.0)
