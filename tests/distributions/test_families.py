"""Named exponential families: T, h, log Z and theta of Pyro's distributions."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.distributions.exponential.exponential_family import ExponentialFamily
from pyro_ebm.distributions.exponential.families import FORMULAS, Repeated
from pyro_ebm.distributions.exponential.quadrature import log_normalizer_by_quadrature
from tests.statistics import SIGMAS

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
# torch draws a Wishart again when rounding has made it singular, and says so
pytestmark = pytest.mark.filterwarnings("ignore:Singular sample detected")
cases = pytest.mark.parametrize("q", list(DISTRIBUTIONS.values()), ids=list(DISTRIBUTIONS))


def test_every_named_family_is_a_case():
    assert FORMULAS.keys() <= DISTRIBUTIONS.keys()


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
    # grad log p = T(x) - E[T]; torch's own log Z of these two is a coarse approximation
    rough = isinstance(q, dist.ContinuousBernoulli | dist.VonMises)
    want = p.statistic(x.double()) - p.mean_parameters()
    assert_close(grad, want, atol=1e-2 if rough else 1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS.keys() - {"Wishart", "Multinomial"}))
def test_members_under_vmap(name):
    # torch's Wishart and Multinomial look at values
    p, x = of(DISTRIBUTIONS[name]), DISTRIBUTIONS[name].sample()
    theta = p.natural_parameters * torch.stack([d(1.0), d(1.01)]).reshape(
        (2,) + (1,) * p.natural_parameters.dim()
    )

    def log_prob(theta):
        return ExponentialFamily(p.family, theta).log_prob(x)

    with pyro.validation_enabled(False):
        assert_close(torch.func.vmap(log_prob)(theta), torch.stack([*map(log_prob, theta)]))


@cases
def test_copies_and_families(q):
    p, x = of(q), q.sample()
    for new in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert_close(new.log_prob(x), p.log_prob(x))
        assert new.family == p.family
        assert hash(new.family) == hash(p.family)
        assert repr(new) == repr(p)
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
    assert_close(
        p.log_density_ratio(x, x.flip(0)), q.log_prob(x) - q.log_prob(x.flip(0)), atol=0.05, rtol=0
    )


def test_boundaries_where_theta_is_zero():
    # Gamma(1, b) and Beta(1, 1): 0 log 0 = 0; and no mass at 0 for Gamma(2, b)
    p = of(dist.Gamma(d(1.0, 2.0), d(3.0)))
    assert_close(p.unnormalized_log_prob(d(0.0)) - p.log_normalizer, d(math.log(3.0), -math.inf))
    uniform = of(dist.Beta(d(1.0), d(1.0)))
    assert_close(uniform.unnormalized_log_prob(d(0.0, 1.0)), d(0.0, 0.0))
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
        (dist.Beta(1.0, 1.0), [0.0, -1.0], "space of Beta.*concentration"),
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
    assert len({family(once), family(twice)}) == 1


def test_independent_families_have_names():
    assert repr(of(DISTRIBUTIONS["to_event"]).family) == "Normal(3,)"
    assert isinstance(of(DISTRIBUTIONS["to_event"]).family, Repeated)
