"""Exponential families: log Z, E[T(x)], members of named families, posteriors that move log Z."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_ebm import MCMC, LangevinKernel, UnnormalizedEnergy
from pyro_ebm.distributions.exponential_family import ExponentialFamily
from pyro_ebm.distributions.families import FORMULAS, Family, Repeated
from pyro_ebm.distributions.integrals import log_normalizer_by_quadrature
from pyro_ebm.distributions.positive_definite import FromLowerTriangle, positive_definite
from tests.statistics import SIGMAS, assert_mean

HALF_LOG_2PI = math.log(2 * math.pi) / 2
of = ExponentialFamily.from_distribution


def d(*values):
    """A double tensor."""
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


COVARIANCE = d([[2.0, 0.5], [0.5, 1.0]])
SIMPLEX = d([0.2, 0.3, 0.5])

DISTRIBUTIONS = {
    "Normal": dist.Normal(d(1.0, -2.0), d(0.5, 3.0)),
    "LogNormal": dist.LogNormal(d(0.3), d(0.5)),
    "HalfNormal": dist.HalfNormal(d(2.0)),
    "MultivariateNormal": dist.MultivariateNormal(d([[1.0, 2.0], [0.0, 0.0]]), COVARIANCE),
    "LowRank": dist.LowRankMultivariateNormal(
        d(1.0, 2.0, 3.0), d([[1.0], [0.5], [0.0]]), d(1.0, 2.0, 3.0)
    ),
    "Wishart": dist.Wishart(d(4.5, 6.0), COVARIANCE),
    "Laplace": dist.Laplace(d(0.0, 1.0), d(2.0)),
    "VonMises": dist.VonMises(d(1.0), d(3.0)),
    "Exponential": dist.Exponential(d(2.0)),
    "Gamma": dist.Gamma(d(0.5, 3.0), d(2.0)),
    "Chi2": dist.Chi2(d(3.0)),
    "InverseGamma": dist.InverseGamma(d(5.0), d(2.0)),
    "Weibull": dist.Weibull(d(2.0), d(1.5)),
    "Pareto": dist.Pareto(d(1.0, 2.0), d(3.0)),
    "Beta": dist.Beta(d(0.5, 1.0), d(2.0)),
    "Dirichlet": dist.Dirichlet(d([[0.5, 2.0, 1.0], [1.0, 1.0, 1.0]])),
    "ContinuousBernoulli": dist.ContinuousBernoulli(probs=d(0.3, 0.4995, 0.9)),
    "Bernoulli": dist.Bernoulli(probs=d(0.3, 0.9)),
    "Binomial": dist.Binomial(d(3.0, 5.0), d(0.3)),
    "Geometric": dist.Geometric(d(0.2, 0.9)),
    "NegativeBinomial": dist.NegativeBinomial(d(3.0), logits=d(0.5, -4.0)),
    "Poisson": dist.Poisson(d(4.0)),
    "Categorical": dist.Categorical(logits=d([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])),
    "OneHotCategorical": dist.OneHotCategorical(SIMPLEX),
    "Multinomial": dist.Multinomial(5, SIMPLEX),
    "to_event": dist.Normal(d([[1.0, -2.0, 0.0]]), d(0.5)).to_event(1),
    "to_event_2": dist.Laplace(d([[1.0, -2.0, 0.0], [1.0, 1.0, 1.0]]), d(0.5)).to_event(2),
    "to_event_of_vectors": dist.Dirichlet(d([[0.5, 2.0, 1.0], [1.0, 1.0, 1.0]])).to_event(1),
    "expanded": dist.Gamma(d(2.0), d(3.0)).expand([4, 3]).to_event(1),
    "expanded_count": dist.Poisson(d(4.0)).expand([2, 1]),
    "fixed_to_event": dist.Pareto(d(1.0, 2.0), d(3.0)).to_event(1),
    "count_to_event": dist.Binomial(d(3.0, 5.0), d(0.3)).to_event(1),
}
cases = pytest.mark.parametrize("q", list(DISTRIBUTIONS.values()), ids=list(DISTRIBUTIONS))


def test_every_named_family_is_a_case():
    assert FORMULAS.keys() <= DISTRIBUTIONS.keys()


# -- named families ----------------------------------------------------------------------------


@cases
def test_log_prob_is_that_of_the_distribution(q):
    p, x = of(q), q.sample((7,))
    assert (p.batch_shape, p.event_shape) == (q.batch_shape, q.event_shape)
    assert p.is_normalized
    assert_close(p.log_prob(x), q.log_prob(x))
    # and so is theta . T(x) + log h(x) - log Z, which the member is made of
    assert_close(p.unnormalized_log_prob(x) - p.log_normalizer, q.log_prob(x), rtol=1e-6, atol=1e-6)
    assert_close(p.log_density_ratio(x[:3], x[3:6]), q.log_prob(x[:3]) - q.log_prob(x[3:6]))
    assert p.support.check(x).all()


@cases
def test_draws_are_exact_and_their_statistic_has_the_gradient_of_log_z_as_mean(q):
    p = of(q)
    t = p.statistic(p.sample((5000,))).double()
    error = t.std(0) / 5000**0.5
    assert ((t.mean(0) - p.mean_parameters()).abs() <= SIGMAS * error + 1e-9).all()


@cases
def test_gradcheck_of_log_z(q):
    p = of(q)
    theta = p.natural_parameters.clone().requires_grad_()
    assert torch.autograd.gradcheck(p.family.log_normalizer, theta)


@cases
def test_gradients_reach_theta_through_log_prob(q):
    p, x = of(q), q.sample()
    theta = p.natural_parameters.clone().requires_grad_()
    log_prob = p.with_natural_parameters(theta).log_prob(x)
    (grad,) = torch.autograd.grad(log_prob.sum(), theta)
    # grad log p = T(x) - E[T]; torch's pieces near the singularity of ContinuousBernoulli are coarse
    t = p.statistic(x.double())
    rough = isinstance(q, dist.ContinuousBernoulli | dist.VonMises)
    want = t - p.mean_parameters()
    if isinstance(q, dist.Wishart | dist.MultivariateNormal):  # T is symmetric: so is its gradient
        assert_close(grad, want)
    else:
        assert_close(grad, want, atol=1e-2 if rough else 1e-7, rtol=1e-5)


@cases
def test_copies_and_families(q):
    p, x = of(q), q.sample()
    for new in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert_close(new.log_prob(x), p.log_prob(x))
        assert new.family == p.family
        assert hash(new.family) == hash(p.family)
        assert repr(new) == repr(p)
    assert of(q) is not of(q)
    assert of(p) is p
    wide = p.expand((2,) + p.batch_shape)
    assert wide.log_prob(x).shape == (2,) + p.batch_shape
    assert wide.sample((3,)).shape == (3, 2) + p.batch_shape + p.event_shape
    assert wide.mean_parameters().shape[:-1] == wide.batch_shape


def continuous():
    for name, q in DISTRIBUTIONS.items():
        if not q.support.is_discrete and name not in ("MultivariateNormal", "Wishart"):
            p = of(q)
            if torch.distributions.biject_to(p.support).inverse_shape(p.event_shape).numel() <= 2:
                yield pytest.param(p, id=name)


@pytest.mark.parametrize("p", [*continuous(), of(DISTRIBUTIONS["MultivariateNormal"])])
def test_log_z_by_quadrature_is_that_of_the_formula(p):
    assert_close(log_normalizer_by_quadrature(p, 1e-6), p.log_normalizer.expand(p.batch_shape))


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (ExponentialFamily.gaussian(1.0, 2.0), dist.Normal(1.0, 2.0)),
        (ExponentialFamily.exponential(2.0), dist.Exponential(2.0)),
        (ExponentialFamily.gamma(2.0, 3.0), dist.Gamma(2.0, 3.0)),
        (ExponentialFamily.bernoulli(0.3), dist.Bernoulli(0.3)),
        (ExponentialFamily.bernoulli(logits=0.3), dist.Bernoulli(logits=0.3)),
        (
            ExponentialFamily.categorical(torch.tensor([0.2, 0.3, 0.5])),
            dist.Categorical(torch.tensor([0.2, 0.3, 0.5])),
        ),
        (
            ExponentialFamily.categorical(logits=torch.tensor([0.2, 0.3, 0.5])),
            dist.Categorical(logits=torch.tensor([0.2, 0.3, 0.5])),
        ),
    ],
)
def test_members_by_name(p, q):
    x = q.sample((5,))
    assert p.sample((5,)).dtype == x.dtype
    assert p.log_prob(x).dtype == torch.float32
    assert_close(p.log_prob(x), q.log_prob(x))
    assert p.support.check(x).all()


def test_float32_far_from_zero():
    # theta . x is 1e8 here, and has no digit left below 1
    p, q = ExponentialFamily.gaussian(1000.0, 0.1), dist.Normal(1000.0, 0.1)
    x = q.sample((100,))
    assert_close(p.log_prob(x), q.log_prob(x), atol=0.05, rtol=0)
    assert_close(p.log_density_ratio(x, x.flip(0)), q.log_prob(x) - q.log_prob(x.flip(0)), atol=0.05, rtol=0)


def test_boundaries_where_theta_is_zero():
    # Gamma(1, b) and Beta(1, 1): 0 log 0 = 0; and no mass at 0 for Gamma(2, b)
    p = of(dist.Gamma(d(1.0, 2.0), d(3.0)))
    assert_close(p.unnormalized_log_prob(d(0.0)) - p.log_normalizer, d(math.log(3.0), -math.inf))
    uniform = of(dist.Beta(d(1.0), d(1.0)))
    assert_close(uniform.unnormalized_log_prob(d(0.0, 1.0)), d(0.0, 0.0))
    theta = uniform.natural_parameters.clone().requires_grad_()
    value = uniform.with_natural_parameters(theta).unnormalized_log_prob(d(0.0))
    (grad,) = torch.autograd.grad(value, theta)
    assert grad.tolist() == [-math.inf, 0.0]  # T(0) = (log 0, log 1)
    never = of(dist.Poisson(d(0.0)))  # theta = -inf
    assert_close(never.unnormalized_log_prob(d(0.0, 3.0)), d(0.0, -math.inf))
    only = ExponentialFamily.categorical(logits=d(0.0, -math.inf))
    assert_close(only.unnormalized_log_prob(torch.tensor([0, 1])), d(0.0, -math.inf))


@pytest.mark.parametrize(
    "q",
    [
        dist.Cauchy(0.0, 1.0),
        dist.Uniform(0.0, 1.0),
        dist.StudentT(3.0),
        dist.Normal(0.0, 1.0).mask(False),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)),
        dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.SigmoidTransform()]),
        dist.Delta(torch.tensor(0.0)),
        UnnormalizedEnergy(torch.square),
        dist.Cauchy(torch.zeros(2), 1.0).to_event(1),
    ],
)
def test_what_is_of_no_family_is_refused(q):
    with pytest.raises(ValueError, match=r"is not of an exponential family that is known here"):
        of(q)


@pytest.mark.parametrize(
    ("q", "theta", "message"),
    [
        (dist.Normal(0.0, 1.0), [0.0, 0.5], "outside the natural parameter space of Normal.*scale"),
        (dist.Normal(0.0, 1.0), [1.0, 0.0], "space of Normal"),
        (dist.Gamma(1.0, 1.0), [-1.5, -1.0], "concentration.*GreaterThan"),
        (dist.Beta(1.0, 1.0), [0.0, -1.0], "concentration0"),
        (dist.Exponential(1.0), [0.0], "rate"),
        (dist.Geometric(0.5), [0.1], "space of Geometric"),
        (dist.Poisson(1.0), [math.nan], "rate"),
        (dist.Bernoulli(0.5), [math.inf], "space of Bernoulli"),
        (
            dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
            [0.0, 0.0, -1.0, 2.0, 2.0, -1.0],
            "precision_matrix.*PositiveDefinite",
        ),
        (
            dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
            [0.0] * 6,
            "space of MultivariateNormal",
        ),
        (dist.Normal(0.0, 1.0), [1.0, -0.5, 2.0], r"of Normal have 2 components, got shape \(3,\)"),
    ],
)
def test_outside_the_natural_parameter_space(q, theta, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        of(q).with_natural_parameters(torch.tensor(theta))


def test_outside_it_where_validation_is_off_the_density_is_nan():
    with pyro.validation_enabled(False):
        p = of(dist.Normal(0.0, 1.0)).with_natural_parameters(torch.tensor([0.0, 0.5]))
        assert p.log_prob(torch.tensor(1.0)).isnan()
        own = ExponentialFamily(powers, d([[0.0, -1.0], [0.0, 1.0]]))
        assert own.log_normalizer.isnan().tolist() == [False, True]


def test_families_are_told_apart():
    def family(q):
        return of(q).family

    zero = torch.zeros(())
    assert family(dist.Normal(0.0, 1.0)) == family(dist.Normal(torch.ones(3), 2.0))
    assert family(dist.Chi2(3.0)) == family(dist.Gamma(1.0, 1.0))
    assert family(dist.Laplace(0.0, 1.0)) == family(dist.Laplace(0.0, 3.0))
    assert family(dist.Laplace(0.0, 1.0)) != family(dist.Laplace(1.0, 1.0))
    moving = zero.clone().requires_grad_()
    assert family(dist.Laplace(zero, 1.0)) != family(dist.Laplace(moving, 1.0))
    assert family(dist.Laplace(moving, 1.0)) == family(dist.Laplace(moving, 2.0))
    assert family(dist.Binomial(3, 0.5)) != family(dist.Binomial(4, 0.5))
    assert family(dist.Exponential(1.0)) != family(dist.Gamma(1.0, 1.0))
    assert family(dist.Dirichlet(torch.ones(3))) != family(dist.Dirichlet(torch.ones(2)))
    once, twice = dist.Normal(0.0, 1.0).expand([2]), dist.Normal(0.0, 1.0).expand([3])
    assert family(once.to_event(1)) == family(once.to_event(1))
    assert family(once.to_event(1)) != family(twice.to_event(1))
    assert family(once.to_event(1)) != family(once)
    assert ExponentialFamily(powers, torch.tensor([0.0, -1.0])).family == QUARTIC.family
    assert ExponentialFamily(powers, torch.tensor([0.0, -1.0]), powers).family != QUARTIC.family
    assert len({family(once), family(twice)}) == 1


# -- families of one's own ---------------------------------------------------------------------


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


def half_normal_base(x):
    """log h = -x, an exponential density without its constant."""
    return -2 * x


def test_base_measure_and_support():
    # h = exp(-2 x), T = log x on the positive numbers: Gamma(theta + 1, 2)
    theta = d([[2.0], [0.5]])
    p = ExponentialFamily(
        lambda x: x.log()[..., None], theta, half_normal_base, support=constraints.positive
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
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))  # bounded, in float32

    def gaussian(x):
        return -x.square().sum(-1) / 2

    p = ExponentialFamily(net, torch.tensor([0.5, -1.0, 2.0]), gaussian, event_shape=(2,))
    line = torch.linspace(-6, 6, 201)
    grid = torch.cartesian_prod(line, line)
    mass = p.log_prob(grid).exp().sum() * (line[1] - line[0]) ** 2
    assert mass.item() == pytest.approx(1.0, abs=1e-3)
    (grad,) = torch.autograd.grad(p.log_normalizer, net[0].weight)
    assert grad.abs().max() > 0


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
        (lambda: ExponentialFamily(powers, torch.tensor([0.0, 1.0])), "space of powers: the density"),
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
            r"map points of shape \(\d+,\) with event_shape=\(\) .* shape \(\d+, 'k'\), got \(\d+,\)",
        ),
        (lambda: ExponentialFamily(powers, torch.tensor([-1.0])), "2 components .* have 1"),
        (lambda: ExponentialFamily(powers, torch.tensor(-1.0)), r"\(\*batch, k\), got \(\)"),
        (lambda: ExponentialFamily(powers, [-1.0]), r"natural_parameters must be a floating"),
        (lambda: ExponentialFamily(powers, torch.tensor([1, 2])), r"must be a floating"),
        (lambda: ExponentialFamily(3.0, torch.tensor([-1.0])), "statistic must be callable, got float"),
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


# -- quadrature of any energy ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("energy", "support", "event_shape", "truth"),
    [
        (lambda x: x**2 / 2, constraints.real, (), HALF_LOG_2PI),
        (lambda x: 3 * x, constraints.positive, (), -math.log(3.0)),
        (lambda x: 0 * x, constraints.interval(-1.0, 3.0), (), math.log(4.0)),
        (lambda x: x, constraints.greater_than(2.0), (), -2.0),
        (lambda x: -x, constraints.less_than(-2.0), (), -2.0),
        (
            lambda x: -3 * x.log() - (1 - x).log(),
            constraints.unit_interval,
            (),
            math.lgamma(4) + math.lgamma(2) - math.lgamma(6),
        ),
        (lambda x: x.sum(-1), constraints.positive, (2,), 0.0),
        (lambda x: 0 * x.sum(-1), constraints.simplex, (3,), -math.log(2.0)),  # its area in two
        (lambda x: 0 * x.sum(-1), constraints.simplex, (2,), 0.0),
        (lambda x: x.square().sum((-1, -2)) / 2, constraints.real, (2, 1), 2 * HALF_LOG_2PI),
    ],
)
def test_quadrature_on_any_support(energy, support, event_shape, truth):
    p = UnnormalizedEnergy(energy, event_shape, support)
    assert log_normalizer_by_quadrature(p).item() == pytest.approx(truth, abs=1e-6)


def test_quadrature_of_tilts_batches_and_expansions():
    shift = d(-1.0, 0.0, 2.0)
    p = UnnormalizedEnergy(
        lambda x: -shift * x, base=dist.Normal(d(0.0), d(1.0)), batch_shape=(3,)
    )
    assert_close(log_normalizer_by_quadrature(p), shift**2 / 2)  # E[e^{s x}]
    wide = p.expand((4, 3))
    assert_close(log_normalizer_by_quadrature(wide), (shift**2 / 2).expand(4, 3))
    bounds = UnnormalizedEnergy(
        lambda x: x, (), constraints.greater_than(shift), batch_shape=(3,)
    )
    assert_close(log_normalizer_by_quadrature(bounds), -shift)
    q = p.normalized(log_normalizer_by_quadrature(p))
    assert_close(q.log_prob(d(0.3)), dist.Normal(shift, d(1.0)).log_prob(d(0.3)))


def test_quadrature_is_differentiable_in_a_network():
    net = nn.Linear(1, 1)
    p = UnnormalizedEnergy(lambda x: net(x[..., None])[..., 0], base=dist.Normal(0.0, 1.0))
    log_z = log_normalizer_by_quadrature(p)  # w^2 / 2 - b
    gradient = torch.autograd.grad(log_z, list(net.parameters()))
    assert_close(log_z, (net.weight**2 / 2 - net.bias).squeeze(), atol=1e-4, rtol=1e-4)
    assert_close(gradient[0], net.weight.detach(), atol=1e-4, rtol=1e-4)
    assert_close(gradient[1], torch.tensor([-1.0]))


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (UnnormalizedEnergy(torch.zeros_like), "not decayed far out"),
        (UnnormalizedEnergy(lambda x: -x, support=constraints.positive), "not decayed"),
        (UnnormalizedEnergy(lambda x: x.log(), support=constraints.positive), "not decayed"),
        (UnnormalizedEnergy(lambda x: x.sum(-1), (3,)), r"event_shape=\(3,\).* has 3"),
        (UnnormalizedEnergy(torch.square, support=constraints.boolean), "is discrete"),
    ],
)
def test_quadrature_refuses(p, message):
    with pytest.raises(ValueError, match=rf"(?s)log Z of Unnorm.*{message}"):
        log_normalizer_by_quadrature(p)


# -- in models ---------------------------------------------------------------------------------

DATA = torch.tensor([0.3, -0.9, 0.5, 1.4, -0.2, 0.8, -0.6, 0.1])


def precision_model(data):
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("x", ExponentialFamily.gaussian(0.0, tau.rsqrt()), obs=data)


def precision_model_by_quadrature(data):
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
    p = ExponentialFamily(squared, -tau[..., None] / 2)
    with pyro.plate("data", len(data)):
        pyro.sample("x", p, obs=data)


def squared(x):
    return x.square()[..., None]


@pytest.mark.parametrize("model", [precision_model, precision_model_by_quadrature])
def test_a_likelihood_whose_log_z_moves(model):
    # conjugate: Gamma(2 + n / 2, 1 + sum x^2 / 2). All chains at once, quadrature too: a fallback
    # to one after another would warn
    mcmc = MCMC(LangevinKernel(model), 200, 200, num_chains=16, disable_progbar=True)
    mcmc.run(DATA)
    tau = mcmc.get_samples(group_by_chain=True)["tau"].double()
    a, b = 2 + len(DATA) / 2, 1 + DATA.square().sum().item() / 2
    assert_mean(tau, a / b)
    assert_mean((tau - a / b).square(), a / b**2)


def test_nuts_agrees():
    mcmc = PyroMCMC(NUTS(precision_model), 400, warmup_steps=100, disable_progbar=True)
    mcmc.run(DATA)
    a, b = 2 + len(DATA) / 2, 1 + DATA.square().sum().item() / 2
    assert_mean(mcmc.get_samples(group_by_chain=True)["tau"].double(), a / b)


def latent_model():
    pyro.sample("own", QUARTIC)
    with pyro.plate("two", 2):
        pyro.sample("gamma", ExponentialFamily.gamma(3.0, 2.0))
    pyro.sample("y", dist.Normal(pyro.sample("mu", ExponentialFamily.gaussian(0.0, 1.0)), 1.0), obs=d(3.0))


def test_as_latents():
    mcmc = MCMC(LangevinKernel(latent_model), 300, 200, num_chains=16, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)
    assert_mean(powers(draws["own"].double()), QUARTIC.mean_parameters())
    assert_mean(draws["gamma"].double(), 1.5)
    assert_mean(draws["mu"].double(), 1.5)


def test_as_latents_of_nuts():
    mcmc = PyroMCMC(NUTS(latent_model), 300, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)
    assert_mean(powers(draws["own"].double()), QUARTIC.mean_parameters())
    assert_mean(draws["gamma"].double(), 1.5)


def test_a_plain_elbo_trains_theta_to_match_the_statistic():
    # maximum likelihood in an exponential family: E[T] is the mean of T over the data
    data = QUARTIC.sample((500,)).float()

    def model():
        a = pyro.param("a", torch.tensor(0.0))
        b = pyro.param("b", torch.tensor(0.5), constraints.positive)
        with pyro.plate("data", len(data)):
            pyro.sample("x", ExponentialFamily(powers, torch.stack([a, -b])), obs=data)

    svi = SVI(model, lambda: None, Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(150):
        svi.step()
    p = ExponentialFamily(powers, torch.stack([pyro.param("a"), -pyro.param("b")]))
    assert_close(p.mean_parameters().detach(), powers(data).mean(0), atol=2e-3, rtol=2e-3)


def test_a_categorical_is_summed_out():
    locs = torch.tensor([-2.0, 0.0, 3.0])
    data = torch.tensor([-1.0, 2.5])
    probs = torch.tensor([0.2, 0.3, 0.5])

    def model(prior):
        with pyro.plate("data", 2):
            k = pyro.sample("k", prior, infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=data)

    def loss(prior):
        return TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda prior: None, prior)

    want = dist.MixtureSameFamily(dist.Categorical(probs), dist.Normal(locs, 1.0))
    assert loss(ExponentialFamily.categorical(probs)) == pytest.approx(
        -want.log_prob(data).sum().item(), abs=1e-5
    )


def test_as_a_guide_and_in_predictive():
    def model():
        x = pyro.sample("x", ExponentialFamily.gaussian(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(3.0))

    def guide():
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraints.positive)
        pyro.sample("x", ExponentialFamily.gaussian(loc, scale))

    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO(num_particles=16))
    for _ in range(200):
        svi.step()
    # posterior N(1.5, 1/2); reparametrised draws, so the noise of the last steps is small
    assert pyro.param("loc").item() == pytest.approx(1.5, abs=0.1)
    assert pyro.param("scale").item() == pytest.approx(0.5**0.5, abs=0.1)
    x = Predictive(model, num_samples=500)()["x"]
    assert_mean(x.reshape(1, -1), 0.0)


def test_plates_subsample_and_masks():
    p = ExponentialFamily.gaussian(torch.tensor([0.0, 1.0, 2.0]), 1.0)
    q = dist.Normal(torch.tensor([0.0, 1.0, 2.0]), 1.0)
    x = torch.tensor([0.5, 0.5, 0.5])
    for wrap in (
        lambda p: p.to_event(1),
        lambda p: p.mask(torch.tensor([True, False, True])),
        lambda p: p.expand([2, 3]),
    ):
        assert_close(wrap(p).log_prob(x), wrap(q).log_prob(x))
    assert p.rsample((4,)).shape == (4, 3)
    assert p.starting_points((4,)).shape == (4, 3)


# -- positive definite matrices ----------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4])
def test_bijection_onto_positive_definite_matrices(n):
    transform = torch.distributions.biject_to(positive_definite)
    assert transform == FromLowerTriangle()
    z = torch.randn(3, n * (n + 1) // 2, dtype=torch.float64)
    x = transform(z)
    assert positive_definite.check(x).all()
    assert_close(transform.inv(x), z)
    assert transform.forward_shape(z.shape) == x.shape
    assert transform.inverse_shape(x.shape) == z.shape
    rows, columns = torch.tril_indices(n, n)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: transform(z)[rows, columns]))(z)
    assert_close(transform.log_abs_det_jacobian(z, x), jacobian.det().abs().log())
    with pytest.raises(ValueError, match=r"are square, got shape \(2, 3\)"):
        transform.inverse_shape((2, 3))


def test_a_wishart_latent():
    q = dist.Wishart(d(5.0), COVARIANCE)
    mcmc = MCMC(
        LangevinKernel(lambda: pyro.sample("x", of(q))), 300, 200, num_chains=16,
        disable_progbar=True,
    )  # fmt: skip
    mcmc.run()
    assert_mean(mcmc.get_samples(group_by_chain=True)["x"].double()[..., 0, 0], 10.0)


def test_independent_families_have_names():
    assert repr(of(DISTRIBUTIONS["to_event"]).family) == "Normal(3,)"
    assert isinstance(of(DISTRIBUTIONS["to_event"]).family, Repeated)
