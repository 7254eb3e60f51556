"""The density of an energy: values, scores, shapes, the three states of log Z, and bad input."""

import copy
import functools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.distributions import find_energy
from pyro_ebm.distributions.core.sampler import starting_points_only


def half_square(x):
    """The energy of N(0, 1): Z = sqrt(2 pi)."""
    return x.square() / 2


def half_square_norm(x):
    return x.square().sum(-1) / 2


HALF_LOG_2PI = math.log(2 * math.pi) / 2


class Quadratic(nn.Module):
    """E(x) = precision |x|^2 / 2."""

    def __init__(self, precision=2.0, dtype=None):
        super().__init__()
        self.precision = nn.Parameter(torch.tensor(precision, dtype=dtype))

    def forward(self, x):
        return self.precision * x.square().sum(-1) / 2


# -- values ------------------------------------------------------------------------------------


def test_log_prob_is_minus_the_energy_when_nothing_is_known():
    x = torch.linspace(-2, 2, 5)
    assert_close(UnnormalizedEnergy(half_square).log_prob(x), -x.square() / 2)


@pytest.mark.parametrize(
    ("energy", "support", "log_normalizer", "truth", "x"),
    [
        (half_square, constraints.real, HALF_LOG_2PI, dist.Normal(0.0, 1.0), [-1.0, 0.5]),
        (lambda x: 3 * x, constraints.positive, -math.log(3), dist.Exponential(3.0), [0.1, 2.0]),
        (
            lambda x: -3 * x.log() - (1 - x).log(),
            constraints.unit_interval,
            math.lgamma(4) + math.lgamma(2) - math.lgamma(6),
            dist.Beta(4.0, 2.0),
            [0.2, 0.9],
        ),
        (
            lambda x: x,
            constraints.greater_than(2.0),
            -2.0,
            dist.TransformedDistribution(
                dist.Exponential(1.0), [torch.distributions.AffineTransform(2.0, 1.0)]
            ),
            [2.5, 7.0],
        ),
        (lambda x: -0.5 * x, constraints.boolean, math.log1p(math.exp(0.5)), None, [0.0, 1.0]),
        (
            lambda x: -0.5 * x,
            constraints.integer_interval(0, 3),
            math.log(sum(math.exp(0.5 * k) for k in range(4))),
            dist.Categorical(logits=0.5 * torch.arange(4.0)),
            [0.0, 3.0],
        ),
    ],
)
def test_known_normalizer_gives_the_normalized_density(energy, support, log_normalizer, truth, x):
    truth = dist.Bernoulli(logits=0.5) if truth is None else truth
    p = UnnormalizedEnergy(energy, support=support, log_normalizer=log_normalizer)
    x = torch.tensor(x)
    assert p.is_normalized
    assert_close(p.log_prob(x), truth.log_prob(x))


def test_on_the_simplex():
    concentration = torch.tensor([2.0, 3.0, 4.0])
    truth = dist.Dirichlet(concentration)
    p = UnnormalizedEnergy(
        lambda x: -((concentration - 1) * x.log()).sum(-1),
        event_shape=(3,),
        support=constraints.simplex,
        log_normalizer=concentration.lgamma().sum() - concentration.sum().lgamma(),
    )
    x = truth.sample((4,))
    assert_close(p.log_prob(x), truth.log_prob(x))
    assert p.support.event_dim == 1


def test_tilt_of_a_base():
    # N(0, 1) tilted by exp(-(x - 2)^2 / 2) is N(1, 1/2), with Z = N(2; 0, 2)
    # sqrt(2 pi); the score is -2 (x - 1).
    truth = dist.Normal(1.0, 0.5**0.5)
    z = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(2.0)) + HALF_LOG_2PI
    p = UnnormalizedEnergy(
        lambda x: (x - 2).square() / 2, base=dist.Normal(0.0, 1.0), log_normalizer=z
    )
    x = torch.linspace(-3, 3, 7)
    assert_close(p.log_prob(x), truth.log_prob(x))
    assert_close(p.score(x), -2 * (x - 1))
    assert_close(
        p.unnormalized_log_prob(x), dist.Normal(0.0, 1.0).log_prob(x) - (x - 2).square() / 2
    )


def test_score_needs_no_normalizer():
    precision = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    x = torch.randn(3, 4, 2)
    known = UnnormalizedEnergy(
        lambda x: ((x @ precision) * x).sum(-1) / 2, event_shape=(2,), log_normalizer=7.0
    )
    with torch.no_grad():
        got = known.score(x)
    assert_close(got, -x @ precision)
    assert not got.requires_grad


def test_log_density_ratio_cancels_the_normalizer():
    truth = dist.Gamma(3.0, 2.0)
    for log_normalizer in (None, 123.0):
        p = UnnormalizedEnergy(
            lambda x: 2 * x - 2 * x.log(),
            support=constraints.positive,
            log_normalizer=log_normalizer,
        )
        x, y = torch.tensor([0.5, 1.0]), torch.tensor(3.0)
        assert_close(p.log_density_ratio(x, y), truth.log_prob(x) - truth.log_prob(y))


def test_nan_energies_stay_nan():
    assert UnnormalizedEnergy(lambda x: x * torch.nan).log_prob(torch.tensor(1.0)).isnan()


# -- shapes ------------------------------------------------------------------------------------


def test_conditional_energies_broadcast():
    mean = torch.tensor([-1.0, 0.0, 5.0])
    p = UnnormalizedEnergy(
        lambda x: (x - mean).square() / 2, batch_shape=(3,), log_normalizer=HALF_LOG_2PI
    )
    truth = dist.Normal(mean, 1.0)
    for x in (torch.tensor(0.3), torch.randn(3), torch.randn(4, 3), torch.randn(5, 1)):
        assert_close(p.log_prob(x), truth.log_prob(x))
        assert_close(p.score(x), (mean - x))
    assert p.shape() == (3,)


def test_defaults_come_from_the_base():
    base = dist.LogNormal(torch.zeros(5, 2), 1.0).to_event(1)
    p = UnnormalizedEnergy(lambda x: x.sum(-1), base=base)
    assert p.batch_shape == (5,)
    assert p.event_shape == (2,)
    assert p.support.event_dim == 1
    assert not p.support.check(torch.tensor([1.0, -1.0]))


def test_the_base_is_expanded_to_the_batch():
    p = UnnormalizedEnergy(half_square, base=dist.Normal(0.0, 1.0), batch_shape=(4,))
    assert p.base is not None
    assert p.base.batch_shape == (4,)


def test_expand_shares_the_energy_and_keeps_everything():
    p = UnnormalizedEnergy(
        lambda x: (x - torch.arange(3.0)).square() / 2,
        batch_shape=(3,),
        base=dist.Normal(0.0, torch.ones(3)),
        log_normalizer=torch.arange(3.0),
        num_steps=7,
        constant_normalizer=True,
        learned_normalizer=True,
    )
    wide = p.expand((2, 3))
    x = torch.randn(2, 3)
    assert wide.batch_shape == (2, 3)
    assert p.batch_shape == (3,)
    assert_close(wide.log_prob(x), p.log_prob(x))
    assert (wide.num_steps, wide.constant_normalizer) == (7, True)
    assert wide.normalizer_state == "learned"
    assert wide.expand((4, 2, 3)).log_prob(x).shape == (4, 2, 3)
    assert wide.starting_points((5,)).shape == (5, 2, 3)


def test_to_event_and_mask():
    p = UnnormalizedEnergy(half_square).expand([4]).to_event(1)
    x = torch.randn(3, 4)
    assert p.event_shape == (4,)
    assert_close(p.log_prob(x), -x.square().sum(-1) / 2)
    mask = torch.tensor([True, False, True, False])
    masked = UnnormalizedEnergy(half_square).expand([4]).mask(mask)
    assert_close(masked.log_prob(x), torch.where(mask, -x.square() / 2, 0.0))


def test_find_energy_looks_through_wrappers():
    p = UnnormalizedEnergy(half_square)
    exp = torch.distributions.ExpTransform()
    for wrapped in (
        p,
        p.expand([3]).to_event(1),
        p.mask(False),
        p.expand([3]).mask(torch.ones(3, dtype=torch.bool)).to_event(1),
        dist.TransformedDistribution(p, [exp]),
    ):
        found = find_energy(wrapped)
        assert found is not None
        assert found._energy is half_square
    assert find_energy(dist.Normal(0.0, 1.0).expand([2]).to_event(1)) is None


@pytest.mark.parametrize(
    ("support", "event_shape", "batch_shape"),
    [
        (constraints.real, (2, 3), ()),
        (constraints.positive, (2,), (4,)),
        (constraints.interval(-1.0, 3.0), (), ()),
        (constraints.greater_than(torch.tensor([1.0, 5.0])), (), (2,)),
        (constraints.greater_than(torch.tensor([1.0, 5.0])), (2,), (3,)),
        (constraints.less_than(-2.0), (2,), ()),
        (constraints.nonnegative, (), ()),
        (constraints.simplex, (3,), (2,)),
        (constraints.simplex, (4, 3), ()),
        (constraints.corr_cholesky, (3, 3), ()),
        (constraints.boolean, (5,), (2,)),
        (constraints.integer_interval(-1, 2), (5,), ()),
    ],
)
def test_starting_points_lie_in_the_support(support, event_shape, batch_shape):
    def energy(x):
        return x.flatten(x.dim() - len(event_shape)).sum(-1) if event_shape else x

    p = UnnormalizedEnergy(energy, event_shape, support, batch_shape)
    x = p.starting_points((6,))
    assert x.shape == (6, *batch_shape, *event_shape)
    assert p.support.check(x).shape == (6, *batch_shape)
    assert p.support.check(x).all()
    assert p.log_prob(x).shape == (6, *batch_shape)
    assert x.unique().numel() > 1


def test_a_base_wider_than_the_support_starts_inside():
    p = UnnormalizedEnergy(
        lambda x: x.sum(-1),
        base=dist.Normal(torch.zeros(10), 1.0).to_event(1),
        support=constraints.positive,
    )
    assert (p.starting_points((100,)) > 0).all()


def test_a_mixture_may_be_the_base():
    base = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-5.0, 5.0]), 1.0)
    )
    p = UnnormalizedEnergy(lambda x: torch.zeros_like(x), base=base)
    x = p.starting_points((50,))
    assert_close(p.log_prob(x), base.log_prob(x))
    assert (x > 0).any()
    assert (x < 0).any()


def test_starting_points_only_makes_sample_cheap():
    calls = []
    p = UnnormalizedEnergy(lambda x: (calls.append(1), x.square())[1])
    with starting_points_only():
        assert p.sample((3,)).shape == (3,)
    assert not calls
    p.sample((3,))
    assert calls


# -- the constant ------------------------------------------------------------------------------


def test_three_states():
    def state(log_normalizer, **kwargs):
        p = UnnormalizedEnergy(half_square, log_normalizer=log_normalizer, **kwargs)
        assert p.is_normalized == (p.normalizer_state == "known")
        return p.normalizer_state

    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.c = PyroParam(torch.tensor(0.0))
            self.positive = PyroParam(torch.tensor(1.0), constraints.positive)
            self.plain = nn.Parameter(torch.tensor(0.0))

        def forward(self):
            return [state(c) for c in (self.c, self.positive, self.plain)]

    net = Net()
    assert state(None) == "unknown"
    assert state(1.0) == state(0) == state(torch.tensor(1.0)) == "known"
    assert state(torch.tensor(1.0, requires_grad=True).exp()) == "known"
    assert state(nn.Parameter(torch.tensor(1.0))) == "learned"
    assert state(pyro.param("c", torch.tensor(0.0))) == "learned"
    assert state(pyro.param("d", torch.tensor(1.0), constraints.positive)) == "learned"
    assert state(pyro.param("c").detach()) == "known"  # estimated, and handed back
    assert net() == ["learned"] * 3
    assert [state(net.c), state(net.positive), state(net.plain)] == ["learned"] * 3
    assert state(pyro.param("c") + 1) == "known"  # a guess ...
    assert state(pyro.param("c") + 1, learned_normalizer=True) == "learned"  # ... overridden
    assert state(nn.Parameter(torch.tensor(1.0)), learned_normalizer=False) == "known"


def test_gradients_flow_to_energy_and_normalizer():
    net, c = Quadratic(3.0), nn.Parameter(torch.tensor(0.5))
    p = UnnormalizedEnergy(net, event_shape=(2,), log_normalizer=c)
    p.log_prob(torch.ones(4, 2)).sum().backward()
    assert_close(c.grad, torch.tensor(-4.0))
    assert_close(net.precision.grad, torch.tensor(-4.0))


# -- dtype, copies -----------------------------------------------------------------------------


def _float64_cases():
    one = torch.ones((), dtype=torch.float64)
    yield "module", UnnormalizedEnergy(Quadratic(1.0, torch.float64), event_shape=(2,))
    yield "closure", UnnormalizedEnergy(lambda x: one * x.square())
    yield "partial", UnnormalizedEnergy(functools.partial(torch.mul, one))
    yield "base", UnnormalizedEnergy(half_square, base=dist.Normal(one, one))
    yield "normalizer", UnnormalizedEnergy(half_square, log_normalizer=one)
    yield "bound", UnnormalizedEnergy(half_square, support=constraints.greater_than(one))
    yield "global", UnnormalizedEnergy(_energy_with_a_global)


GLOBAL_SCALE = torch.ones((), dtype=torch.float64)


def _energy_with_a_global(x):
    return GLOBAL_SCALE * x.square()


@pytest.mark.parametrize(("name", "p"), list(_float64_cases()))
def test_follows_float64(name, p):
    assert p.starting_points((2,)).dtype == torch.float64, name
    x = UnnormalizedEnergy.sample(p, (2,))
    assert x.dtype == torch.float64
    assert p.log_prob(x).dtype == torch.float64


def test_a_number_as_normalizer_keeps_the_energys_precision():
    one = torch.ones((), dtype=torch.float64)
    p = UnnormalizedEnergy(lambda x: one * x.square() / 2, log_normalizer=HALF_LOG_2PI)
    assert p.log_normalizer is not None
    assert p.log_normalizer.item() == HALF_LOG_2PI  # not rounded to float32
    q = UnnormalizedEnergy(half_square, log_normalizer=HALF_LOG_2PI)
    assert q.log_prob(torch.tensor(0.0)).dtype == torch.float32


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
@pytest.mark.parametrize(
    "p",
    [
        UnnormalizedEnergy(half_square, support=constraints.positive, log_normalizer=1.0),
        UnnormalizedEnergy(
            Quadratic(), event_shape=(3,), base=dist.Normal(0, torch.ones(3)).to_event(1)
        ),
        UnnormalizedEnergy(half_square_norm, event_shape=(3,), support=constraints.boolean),
        UnnormalizedEnergy(half_square, log_normalizer=nn.Parameter(torch.tensor(0.0))),
        UnnormalizedEnergy(functools.partial(torch.mul, torch.tensor(2.0)), batch_shape=(2,)),
    ],
)
def test_copies_and_pickles(duplicate, p):
    new = duplicate(p)
    pyro.set_rng_seed(1)
    x = p.starting_points((2,))
    pyro.set_rng_seed(1)
    assert_close(new.starting_points((2,)), x)
    assert_close(new.log_prob(x), p.log_prob(x))
    assert repr(new) == repr(p)
    assert new.normalizer_state == p.normalizer_state


def test_repr():
    p = UnnormalizedEnergy(Quadratic(), event_shape=(3,), batch_shape=(2,), log_normalizer=0.0)
    assert repr(p) == (
        "UnnormalizedEnergy(energy=Quadratic, batch_shape=(2,), event_shape=(3,),"
        " log_normalizer=known)"
    )


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UnnormalizedEnergy(3.0), r"energy must be callable, got 3"),
        (lambda: UnnormalizedEnergy(half_square, num_steps=0), r"num_steps .* got 0"),
        (lambda: UnnormalizedEnergy(half_square, num_steps=2.5), r"num_steps .* got 2.5"),
        (
            lambda: UnnormalizedEnergy(half_square, support=constraints.simplex),
            r"support Simplex\(\) is of events with 1 dimension\(s\), but event_shape=\(\) has 0",
        ),
        (
            lambda: UnnormalizedEnergy(half_square, (3,), constraints.corr_cholesky),
            r"2 dimension\(s\), but event_shape=\(3,\) has 1",
        ),
        (
            lambda: UnnormalizedEnergy(half_square, (3, 2), constraints.corr_cholesky),
            r"event_shape=\(3, 2\) does not fit the support CorrCholesky",
        ),
        (
            lambda: UnnormalizedEnergy(half_square, (3,), dist.constraints.sphere),
            r"no bijection .* Sphere",
        ),
        (
            lambda: UnnormalizedEnergy(half_square, (3,), base=dist.Normal(0.0, 1.0)),
            r"base Normal has event_shape=\(\), the energy wants \(3,\): write base.expand\(\(3,\)",
        ),
        (
            lambda: UnnormalizedEnergy(
                half_square, base=dist.Normal(torch.zeros(2), 1.0), batch_shape=(3,)
            ),
            r"base Normal has batch_shape=\(2,\), which does not expand to the energy's \(3,\)",
        ),
        (
            lambda: UnnormalizedEnergy(half_square, log_normalizer=torch.zeros(3)),
            r"log_normalizer has shape \(3,\), which does not broadcast to batch_shape=\(\)",
        ),
        (
            lambda: UnnormalizedEnergy(half_square, base=UnnormalizedEnergy(half_square)),
            r"base must be normalized, .* is unknown",
        ),
        (
            lambda: UnnormalizedEnergy(half_square, event_shape=3),
            r"event_shape must be a tuple of sizes, such as \(3,\), got 3",
        ),
        (lambda: UnnormalizedEnergy(half_square, batch_shape=3), r"batch_shape must be a tuple"),
        (lambda: UnnormalizedEnergy(half_square, support=3), r"support must be a constraint"),
        (lambda: UnnormalizedEnergy(half_square, base=3.0), r"base must be a distribution, got 3"),
        (
            lambda: UnnormalizedEnergy(half_square, log_normalizer=math.nan),
            r"log_normalizer must be finite, got nan",
        ),
    ],
)
def test_the_constructor_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("p", "x", "message"),
    [
        (
            UnnormalizedEnergy(half_square, event_shape=(2,)),
            torch.ones(5, 2),
            r"half_square must map points of shape \(5, 2\) with event_shape=\(2,\) to a tensor of"
            r" shape \(5,\), got \(5, 2\)",
        ),
        (UnnormalizedEnergy(lambda x: 0.0), torch.ones(5), r"shape \(5,\), got a float"),
        (
            UnnormalizedEnergy(lambda x: (x - torch.zeros(3)).square()),
            torch.ones(()),
            r"got \(3,\).* batch_shape= to a conditional energy",
        ),
        (
            UnnormalizedEnergy(half_square_norm, (2,), validate_args=False),
            torch.ones(3),
            r"must end in event_shape=\(2,\), got shape \(3,\)",
        ),
        (
            UnnormalizedEnergy(half_square, batch_shape=(3,), validate_args=False),
            torch.ones(4),
            r"points of shape \(4,\) do not broadcast with batch_shape=\(3,\)",
        ),
        (
            UnnormalizedEnergy(half_square, support=constraints.positive),
            torch.tensor(-1.0),
            r"within the support",
        ),
    ],
)
def test_log_prob_refuses(p, x, message):
    with pytest.raises(ValueError, match=message):
        p.log_prob(x)


def test_discrete_starts_need_a_bound_or_a_base():
    counts = UnnormalizedEnergy(lambda x: x, support=constraints.nonnegative_integer)
    assert_close(counts.log_prob(torch.tensor(3.0)), torch.tensor(-3.0))
    assert set(counts.starting_points((200,)).tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    whole = UnnormalizedEnergy(torch.abs, support=dist.constraints.integer)
    assert set(whole.starting_points((200,)).tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    bounds = dist.constraints.integer_interval(0, torch.tensor([1, 2]))
    p = UnnormalizedEnergy(torch.abs, batch_shape=(2,), support=bounds)
    with pytest.raises(ValueError, match=r"is not a finite set .* give base="):
        p.starting_points()
    based = UnnormalizedEnergy(lambda x: x, base=dist.Poisson(2.0))
    assert based.starting_points((3,)).shape == (3,)


def test_a_weight_drawn_at_every_evaluation_is_refused():
    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x):
            return (self.weight * x).square()

    net = Net()
    for energy in (net, lambda x: (net.weight * x).square()):
        with pytest.raises(RuntimeError, match=r"draws its weight 'weight' \(a PyroSample\) anew"):
            UnnormalizedEnergy(energy).log_prob(torch.tensor(1.0))
    weight = net.weight
    p = UnnormalizedEnergy(lambda x: (weight * x).square() + 0 * len(net._pyro_samples))
    assert_close(p.log_prob(torch.tensor(2.0)), -4 * weight.square())
