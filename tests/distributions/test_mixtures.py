"""Mixtures against torch's, quadrature and enumeration; who owns which share of the draws."""

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

from pyro_ebm import MCMC, LangevinKernel, UnnormalizedEnergy
from pyro_ebm.distributions.mixture import mixture
from pyro_ebm.distributions.product import product
from tests.statistics import SIGMAS, assert_mean, assert_moments

X = torch.linspace(-8, 8, 4001, dtype=torch.double)
MEANS = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.double)
SCALES = torch.tensor([0.5, 1.0, 0.25], dtype=torch.double)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.double)


def gaussian(mean, scale, known):
    """N(mean, scale^2) as an energy."""
    log_z = torch.log(scale * math.sqrt(2 * math.pi)) if known else None
    return UnnormalizedEnergy(lambda x: (x - mean) ** 2 / (2 * scale**2), log_normalizer=log_z)


def components(known=True):
    return [gaussian(m, s, known) for m, s in zip(MEANS, SCALES, strict=True)]


def integral(p, region=X > -9):
    return torch.trapezoid(p.log_prob(X).exp() * region, X)


def assert_share(hits, p):
    """The fraction of independent draws is the probability."""
    n = hits.numel()
    assert abs(hits.double().mean() - p) < SIGMAS * math.sqrt(p * (1 - p) / n)


def test_it_is_the_mixture_of_torch():
    truth = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(WEIGHTS), torch.distributions.Normal(MEANS, SCALES)
    )
    ordinary = [dist.Normal(m, s) for m, s in zip(MEANS, SCALES, strict=True)]
    tilt = UnnormalizedEnergy(lambda x: 2 + 0 * x, base=ordinary[2], log_normalizer=-2.0)
    for parts in (ordinary, components(), [components()[0], ordinary[1], tilt]):
        p = mixture(WEIGHTS, parts)
        assert p.is_normalized
        assert p.log_normalizer == 0
        assert_close(p.log_prob(X), truth.log_prob(X))
        assert_close(p.unnormalized_log_prob(X), truth.log_prob(X))
        assert_close(integral(p), torch.tensor(1.0).double())


def test_weights_are_divided_by_their_sum_as_probs_are():
    p, q = mixture(WEIGHTS, components()), mixture(10 * WEIGHTS, components())
    assert_close(p.log_prob(X), q.log_prob(X))
    assert_close(
        mixture([1, 1, 2], components()).log_prob(X),
        mixture([0.25, 0.25, 0.5], components()).log_prob(X),
    )
    assert mixture([1.0, 1.0, 2.0], components()).log_prob(X).dtype == torch.double
    assert mixture(torch.tensor([1, 1, 2]), components()).is_normalized


def test_batches_of_weights_and_components():
    weights = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.8, 0.2]])
    means = torch.tensor([[-4.0], [4.0]])[:, None].expand(2, 3, 5)
    scales = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5])
    p = mixture(weights[:, None, :], [dist.Normal(means[0], scales), dist.Normal(4.0, 1.0)])
    assert p.batch_shape == (3, 5)
    truth = dist.MixtureSameFamily(
        dist.Categorical(weights[:, None, :].expand(3, 5, 2)),
        dist.Normal(
            torch.stack([means[0], means[1]], -1),
            torch.stack([scales.expand(3, 5), torch.ones(3, 5)], -1),
        ),
    )
    x = torch.randn(7, 3, 5) * 4
    assert_close(p.log_prob(x), truth.log_prob(x))
    for q in (p, p.expand((2, 3, 5))):
        draws = q.sample((1000,))
        assert draws.shape == (1000, *q.batch_shape)
        assert_moments(
            draws.unsqueeze(0).flatten(2),
            truth.mean.expand(q.batch_shape).flatten(),
            truth.variance.expand(q.batch_shape).flatten(),
        )


def test_the_gradient_reaches_weights_and_components():
    weights = torch.tensor([0.3, 0.7], requires_grad=True)
    mean = torch.tensor(1.0, requires_grad=True)
    x = torch.tensor(0.5)
    mixture(weights, [dist.Normal(mean, 1.0), dist.Normal(-1.0, 1.0)]).log_prob(x).backward()
    grads = weights.grad, mean.grad
    again = [t.detach().requires_grad_() for t in (weights, mean)]
    truth = dist.MixtureSameFamily(
        dist.Categorical(again[0]), dist.Normal(torch.stack([again[1], torch.tensor(-1.0)]), 1.0)
    )
    truth.log_prob(x).backward()
    assert_close(grads, (again[0].grad, again[1].grad))


@pytest.mark.parametrize("known", [True, False])
def test_the_shares_of_unnormalized_components_are_w_times_z(known):
    p = mixture(WEIGHTS, components(known), unnormalized_weights=True)
    z = SCALES * math.sqrt(2 * math.pi)
    log_z = (WEIGHTS * z).sum().log()
    densities = WEIGHTS * (-((X[:, None] - MEANS) ** 2) / (2 * SCALES**2)).exp()
    assert_close(p.unnormalized_log_prob(X), densities.sum(-1).log())
    assert p.normalizer_state == ("known" if known else "unknown")
    q = p if known else p.normalized(log_z)
    assert_close(q.log_normalizer, log_z)
    assert_close(integral(q), torch.tensor(1.0).double())
    shares = WEIGHTS * z / (WEIGHTS * z).sum()
    edge = torch.tensor(2.0).double()
    right = (shares * (1 - dist.Normal(MEANS, SCALES).cdf(edge))).sum()
    # the trapezoid at the edge is off by half a step of the density there
    off = (X[1] - X[0]) / 2 * q.log_prob(edge).exp()
    assert_close(integral(q, edge < X) + off, right)
    if known:  # draws have the shares; chains would have those of their starts
        assert_share(p.sample((4000,)) > edge, right.item())


def test_draws_give_far_modes_their_share():
    p = mixture([0.1, 0.9], [dist.Normal(-50.0, 1.0), dist.Normal(50.0, 1.0)])
    assert_share(p.sample((4000,)) > 0, 0.9)
    p = mixture(
        [0.1, 0.9], [gaussian(torch.tensor(m), torch.tensor(1.0), True) for m in (-6.0, 6.0)]
    )
    draws = p.sample((2000,))  # by chains, within the components
    assert_share(draws > 0, 0.9)
    assert_moments((draws.abs())[None], 6.0, 1.0)
    assert not draws.requires_grad


def test_chains_start_in_the_components_in_proportion_to_the_weights():
    tilts = [UnnormalizedEnergy(torch.cos, base=dist.Normal(m, 1.0)) for m in (-9.0, 9.0)]
    p = mixture([3.0, 1.0], tilts, unnormalized_weights=True)
    assert_share(p.starting_points((4000,)) > 0, 0.25)
    assert_share(p.sample((4000,)) > 0, 0.25)  # chains that have not crossed
    mcmc = MCMC(
        LangevinKernel(mixture([1.0, 1.0], [dist.Normal(0.0, 1.0), dist.Normal(1.0, 2.0)])),
        num_samples=60,
        warmup_steps=100,
        num_chains=200,
    )
    mcmc.run()
    (draws,) = mcmc.get_samples(group_by_chain=True).values()
    assert_moments(draws, 0.5, 0.5 * (1 + 0) + 0.5 * (4 + 1) - 0.25)


def test_chains_cross_between_near_modes_and_give_them_their_shares():
    scales = torch.tensor([0.5, 2.0])
    parts = [UnnormalizedEnergy(lambda x, s=s: x**2 / (2 * s**2), num_steps=300) for s in scales]
    draws = mixture([1.0, 1.0], parts, unnormalized_weights=True).sample((2000,))
    assert_moments(draws[None], 0.0, 0.2 * 0.25 + 0.8 * 4)  # shares as the scales


def test_enumerated_mixtures():
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    bernoulli = dist.Bernoulli(torch.tensor([0.1, 0.6, 0.9])).to_event(1)
    coupled = UnnormalizedEnergy(
        lambda x: 2 * x[..., 0] * x[..., 1] - x[..., 2], (3,), constraints.boolean
    )
    log_z = coupled.unnormalized_log_prob(x).logsumexp(0)
    p = mixture([0.3, 0.7], [bernoulli, coupled.normalized(log_z)])
    want = 0.3 * bernoulli.log_prob(x).exp() + 0.7 * coupled.unnormalized_log_prob(x).softmax(0)
    assert_close(p.log_prob(x).exp(), want)
    q = mixture([0.3, 0.7], [bernoulli, coupled], unnormalized_weights=True)
    want = 0.3 * bernoulli.log_prob(x).exp() + 0.7 * coupled.unnormalized_log_prob(x).exp()
    assert_close(q.unnormalized_log_prob(x).softmax(0), want / want.sum())
    draws = mixture([0.3, 0.7], [bernoulli, dist.Bernoulli(0.5).expand([3]).to_event(1)]).sample(
        (4000,)
    )
    assert_mean(draws[None], 0.3 * bernoulli.mean + 0.35)


def test_mixtures_of_products_and_products_of_mixtures():
    a, b, c = (dist.Laplace(m, 1.0) for m in (-1.0, 0.0, 2.0))
    la, lb, lc = (d.log_prob(X) for d in (a, b, c))
    p = mixture([2.0, 1.0], [product(a, b), product(b, c)], unnormalized_weights=True)
    assert_close(p.unnormalized_log_prob(X), (2 * (la + lb).exp() + (lb + lc).exp()).log())
    q = product(mixture([2.0, 1.0], [a, b]), mixture([1.0, 3.0], [b, c]), c)
    want = ((2 * la.exp() + lb.exp()) / 3).log() + ((lb.exp() + 3 * lc.exp()) / 4).log() + lc
    assert_close(q.unnormalized_log_prob(X), want)
    assert_close(
        mixture([1.0, 1.0], [mixture([1.0, 3.0], [a, b]), c]).log_prob(X),
        ((la.exp() + 3 * lb.exp() + 4 * lc.exp()) / 8).log(),
    )


def test_kernel_and_steps_are_those_of_the_components():
    kernel = LangevinKernel()
    p = UnnormalizedEnergy(torch.square, kernel=kernel, num_steps=250)
    q = mixture([1.0, 1.0], [dist.Normal(0.0, 1.0), p], unnormalized_weights=True)
    assert q.kernel is kernel
    assert q.num_steps == 250


def test_it_pickles_and_lives_in_plates():
    p = mixture(
        [1.0, 3.0],
        [
            dist.Normal(0.0, 1.0),
            UnnormalizedEnergy(torch.square, log_normalizer=math.log(math.pi) / 2),
        ],
    )

    def model():
        with pyro.plate("data", 5):
            return pyro.sample("x", p)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    x = trace.nodes["x"]["value"]
    assert_close(trace.nodes["x"]["log_prob"], p.log_prob(x))
    for again in (pickle.loads(pickle.dumps(p)), copy.deepcopy(p)):
        assert_close(again.log_prob(x), p.log_prob(x))
        assert again.sample((2,)).shape == (2,)
    assert (
        repr(p) == "Mixture(energy=mixture of Normal, square, event_shape=(), log_normalizer=known)"
    )
    with pyro.validation_enabled(False):
        assert_close(torch.func.vmap(p.log_prob)(x), p.log_prob(x))


def test_weights_may_be_latent():
    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("data", len(x)):
            pyro.sample(
                "x", mixture(weights, [dist.Normal(-9.0, 1.0), dist.Normal(9.0, 1.0)]), obs=x
            )

    x = torch.tensor([-9.0] * 3 + [9.0] * 6)
    mcmc = MCMC(LangevinKernel(model), num_samples=60, warmup_steps=80, num_chains=200)
    mcmc.run(x)  # the posterior is Dirichlet(4, 7)
    draws = mcmc.get_samples(group_by_chain=True)["weights"][..., :1]
    assert_moments(draws, 4 / 11, 28 / (121 * 12))


NORMAL = dist.Normal(0.0, 1.0)
UNKNOWN = UnnormalizedEnergy(torch.square)
LEARNED = UnnormalizedEnergy(torch.square, log_normalizer=nn.Parameter(torch.tensor(0.5)))


@pytest.mark.parametrize(
    ("weights", "parts", "message"),
    [
        ([], [], "at least one component"),
        ([1.0], [torch.square], "component 0 must be an energy"),
        ([0.5, 0.5], [NORMAL, UNKNOWN], "log Z of component 1.*square.*unknown.*_weights=True"),
        ([0.5, 0.5], [LEARNED, NORMAL], "log Z of component 0.*is learned"),
        ([0.5, 0.5, 1.0], [NORMAL, NORMAL], r"weights must be of shape \(\*batch, 2\).*got \(3,\)"),
        (1.0, [NORMAL], r"got \(\)"),
        ([1.0, 0.0], [NORMAL, NORMAL], "greater than 0"),
        ([1.0, -1.0], [NORMAL, NORMAL], "greater than 0"),
        ([1.0, math.nan], [NORMAL, NORMAL], "must be finite"),
        ([1.0, 1.0], [NORMAL, dist.Gamma(1.0, 1.0)], "component 1 .*support.*must be the same"),
        ([1.0, 1.0], [dist.Uniform(0.0, 1.0), dist.Uniform(0.0, 2.0)], "must be the same"),
        ([1.0, 1.0], [NORMAL, NORMAL.expand([2]).to_event(1)], "event_shape"),
        (torch.ones(3, 2), [NORMAL.expand([4]), NORMAL], "batch shapes"),
        ([1.0], [dist.Delta(torch.tensor(0.0))], "no density"),
    ],
)
def test_bad_input(weights, parts, message):
    with pytest.raises(ValueError, match=message):
        mixture(weights, parts)
